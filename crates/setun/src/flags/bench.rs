//! `setun bench`.

use super::{
    draft_flag, json_flag, kv_flag, length, model_flag, number, path_flag, threads_flag, within,
};
use crate::args::{Decoding, Shape};
use clap::{Arg, ArgAction, Command};

/// Largest number of anything: products of a few of them still are sizes.
const MOST: usize = 1 << 20;

const HELP: &str = "\
Each figure stands beside the machine's own limit, measured in the same run on as many
threads, and the share of it that was reached. Times are medians. Nothing else should run.

Examples:
  setun bench peak
  setun bench matmul --shape path-b --threads 1
  setun bench attention --seq 4096 --head-dim 128
  setun bench train --shape path-b --json
  setun bench decode --model runs/quickstart --threads 2
  setun bench speculate --model runs/path-b --draft ngram --text held-out.txt --repeat 9";

pub(super) fn bench() -> Command {
    Command::new("bench")
        .about("Measure the speed of this machine and of Setun on it")
        .subcommand_required(true)
        .arg_required_else_help(true)
        .after_help(HELP)
        .subcommands([
            benchmark(
                "peak",
                "Multiply-adds a second in registers, f32, bf16 and int8",
            ),
            benchmark("bandwidth", "Bytes a second from main memory"),
            benchmark("matmul", "Products of a training step: forward, dx and dw")
                .arg(shape("Model whose matrices are multiplied")),
            benchmark("attention", "Attention forward and backward, causal, bf16").args([
                list("seq", "Tokens of the sequence", "1024,4096"),
                list("head-dim", "Width of a head", "64,128"),
                bounded("heads", "Number of heads").default_value("8"),
            ]),
            benchmark(
                "layer-norm",
                "LayerNorm and RMSNorm, forward and backward, f32",
            )
            .args([
                bounded("rows", "Number of rows").default_value("4096"),
                list("width", "Width of a row", "1024,4096"),
            ]),
            benchmark("train", "Whole training steps on random tokens").args([
                shape("Model to train"),
                length("batch-size", "Sequences in a step [default: the shape's]"),
                length("seq-len", "Tokens in a sequence [default: the shape's]"),
                super::switch("profile").help("Also print the time of each operation"),
            ]),
        ])
        .subcommand(speculate())
        .subcommands(Decoding::ALL.map(decoding))
}

fn speculate() -> Command {
    let about = "Decoding with drafts against decoding without, in turns";
    benchmark("speculate", about).args([
        model_flag(),
        draft_flag().required(true),
        path_flag("text", "FILE")
            .required(true)
            .help("Text that the model has not seen; its passages are continued"),
        bounded("tokens", "Tokens of a text").default_value("300"),
    ])
}

fn decoding(what: Decoding) -> Command {
    let about = match what {
        Decoding::Decode => "One new token for each sequence: the speed of writing",
        Decoding::Prefill => "A prompt: the speed of reading",
        Decoding::VerifyWidth => "Steps of several tokens, against a step of one",
        Decoding::SoftmaxTopk => "Softmax and top-k of given logits",
        Decoding::Kv => "Memory of the cache of keys and values",
    };
    let command = match what {
        // A formula: nothing is measured.
        Decoding::Kv => Command::new(what.name()).about(about).arg(json_flag()),
        _ => benchmark(what.name(), about),
    };
    let model = path_flag("model", "PATH")
        .help("A run, a checkpoint or an export [default: 0.6B shape, random weights]");
    let tokens = |help| {
        let tokens = number("tokens", "N", help, "512");
        tokens.value_parser(|text: &str| within(text, 0, MOST))
    };
    let batch = |help| bounded("batch", help).default_value("1");
    let held = "Tokens in the cache before";
    command.arg(model).args(match what {
        Decoding::Decode => {
            let help = "The sequences are forks of one, as beams and texts with one prompt are";
            let forked = Arg::new("forked").long("forked").help(help);
            let forked = forked.action(ArgAction::SetTrue);
            vec![tokens(held), batch("Sequences"), forked, kv_flag()]
        }
        Decoding::Prefill => {
            let tokens = tokens("Tokens of the prompt");
            vec![tokens, batch("Sequences"), kv_flag()]
        }
        Decoding::VerifyWidth => vec![tokens(held), kv_flag()],
        Decoding::SoftmaxTopk => {
            let k = bounded("k", "Entries to keep").default_value("64");
            vec![batch("Rows of logits"), k]
        }
        Decoding::Kv => vec![kv_flag().help("Only bf16, f32 or int8 [default: all of them]")],
    })
}

/// A number of which products still have sizes.
fn bounded(name: &'static str, help: &'static str) -> Arg {
    length(name, help).value_parser(|text: &str| within(text, 1, MOST))
}

fn benchmark(name: &'static str, about: &'static str) -> Command {
    Command::new(name).about(about).args([
        threads_flag(),
        bounded("repeat", "Measurements, of which the median counts").default_value("5"),
        json_flag(),
    ])
}

fn shape(help: &'static str) -> Arg {
    Arg::new("shape")
        .long("shape")
        .value_name("SHAPE")
        .value_parser(|name: &str| {
            Shape::from_name(name).ok_or("it is quickstart, path-b or qwen3-0.6b")
        })
        .default_value("path-b")
        .help(format!("{help}: quickstart, path-b or qwen3-0.6b"))
}

fn list(name: &'static str, help: &'static str, default: &'static str) -> Arg {
    bounded(name, help)
        .value_name("N,...")
        .value_delimiter(',')
        .default_value(default)
}
