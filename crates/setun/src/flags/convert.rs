//! `setun convert` and `setun inspect`.

use super::{checkpoint_flag, json_flag, one_or_more, path_argument, switch};
use clap::{Arg, Command};
use setun_formats::packed::MAX_GROUP_SIZE;
use setun_io::Format;
use setun_io::MIN_GROUP_SIZE;
use setun_ternary::{Numerics, ScaleRule};

const HELP: &str = "\
Formats (--to):
  hf                  Hugging Face directory, bf16: loads in transformers
  hf-f16, hf-f32      the same in f16 or f32
  packed              smallest directory, for setun
  compressed-tensors  Hugging Face directory, 2 bits a weight, for vLLM
  mlx                 MLX directory, 2 bits a weight, for mlx-lm
  gguf-q2_0           GGUF file that stock llama.cpp runs; short: gguf
  gguf-pq2_0          GGUF for PrismML's fork, groups of 128
  gguf-q2_0-legacy    GGUF for PrismML's first loader, groups of 128
  gguf-ptq1_0         GGUF for PrismML's fork, 1.75 bits a weight
  gguf-tq1_0          GGUF, 1.69 bits a weight; needs group_size = 256
  gguf-tq2_0          GGUF, 2.06 bits a weight; needs group_size = 256
  gguf-f16, gguf-bf16, gguf-f32

A ternary model is recognised from its values and passes with the same trits and scales.
A dense model needs --ternarize for a format of trits. What would lose something is
refused; --lossy allows rounding of dense weights and joining of groups whose scales
differ. Every output records group size, scale rule and numerics. (compressed-tensors
keeps an embedding that is tied to the head in bf16: its readers cannot pack that one.)

Examples:
  setun convert runs/quickstart model.gguf --to gguf-q2_0
  setun convert Qwen3-0.6B ternary --to packed --ternarize --scale-rule least-squares
  setun convert model.gguf mlx-model --to mlx
  setun convert dense-f32 dense --to hf --lossy";

pub(super) fn convert() -> Command {
    Command::new("convert")
        .about("Convert a model between formats, or a dense model to a ternary one")
        .args([
            path_argument("input", "IN").help(
                "A run, a checkpoint, a model directory (Hugging Face, MLX, packed) or a file \
                 (.safetensors, .gguf)",
            ),
            path_argument("output", "OUT").help("Directory or .gguf file to write; must not exist"),
            Arg::new("to")
                .long("to")
                .value_name("FORMAT")
                .required(true)
                .value_parser(format)
                .help("Format to write, see below"),
            switch("ternarize").help("Project a dense model onto {-s, 0, +s} by groups"),
            Arg::new("group-size")
                .long("group-size")
                .value_name("N")
                .requires("ternarize")
                .value_parser(group_size)
                .default_value("128")
                .help("Weights that share a scale, for --ternarize"),
            Arg::new("scale-rule")
                .long("scale-rule")
                .value_name("RULE")
                .requires("ternarize")
                .value_parser(|text: &str| {
                    ScaleRule::from_name(text)
                        .ok_or("it is mean, max, mean-nonzero or least-squares")
                })
                .default_value(ScaleRule::default().name())
                .help(
                    "How scales follow from weights: mean, max, mean-nonzero or least-squares; \
                     mean for training on, least-squares without",
                ),
            Arg::new("numerics")
                .long("numerics")
                .value_name("MODE")
                .requires("ternarize")
                .value_parser(|text: &str| {
                    Numerics::from_name(text).ok_or("it is int8, bf16 or f32")
                })
                .default_value(Numerics::default().name())
                .help("Arithmetic to record for a model from --ternarize: int8, bf16 or f32"),
            switch("lossy").help("Allow what loses something"),
            Arg::new("shard-bytes")
                .long("shard-bytes")
                .value_name("N")
                .value_parser(one_or_more)
                .default_value("5000000000")
                .help(
                    "Bytes of weights in one file of a directory, where its format has several \
                     (hf, mlx, compressed-tensors); a tensor is never cut",
                ),
            checkpoint_flag(),
        ])
        .after_help(HELP)
}

pub(super) fn inspect() -> Command {
    Command::new("inspect")
        .about("Print metadata, tensors, types, sizes and bits per weight of a model")
        .arg(
            path_argument("path", "FILE").help(
                "A model file (.safetensors, .gguf), a model directory, a checkpoint or a run",
            ),
        )
        .arg(json_flag())
        .after_help(
            "Reads headers (and scales, if a file records no group size), and describes files \
             of other models too. Bits per weight count a tensor against the weights of its \
             parameter.\n\n\
             Examples:\n  setun inspect model.gguf\n  setun inspect runs/quickstart --json",
        )
}

fn format(text: &str) -> Result<Format, String> {
    Format::from_name(text).ok_or_else(|| {
        let names = Format::ALL.map(Format::name);
        format!("it is one of {}", names.join(", "))
    })
}

fn group_size(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(size) if (MIN_GROUP_SIZE..=MAX_GROUP_SIZE).contains(&size) => Ok(size),
        _ => Err(format!(
            "it is a whole number from {MIN_GROUP_SIZE} to {MAX_GROUP_SIZE}"
        )),
    }
}
