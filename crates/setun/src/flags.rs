//! Definition of every subcommand and flag, with help texts. `args` turns what was
//! matched into plain values. The flags of settings follow from the settings table.

mod bench;
mod convert;
mod sweep;

use setun_backend::CacheKind;
use setun_ternary::Numerics;
use std::convert::Infallible;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use clap::builder::ValueParser;
use clap::{Arg, ArgAction, Command, value_parser};
use setun_train::data::{DataError, DocumentOptions};
use setun_train::settings::SplitOn;
use setun_train::settings::schema::{self, Key};
use setun_train::settings::value::SettingValue;

use crate::args::{CheckpointChoice, Drafting};

const EXAMPLES: &str = "\
Examples:
  setun train recipes/quickstart.toml           train a small ternary model
  setun verify runs/quickstart                  prove that what it holds is ternary
  setun generate --model runs/quickstart --prompt \"The telephone is\"
  setun eval --model runs/quickstart --data held-out.txt
  setun convert runs/quickstart out --to hf
  setun convert runs/quickstart model.gguf --to gguf-q2_0
  setun inspect model.gguf

`setun COMMAND --help` explains a command.
Exit codes: 0 success, 1 a check or the work failed, 2 wrong usage, 130 stopped on request.
The environment variable SETUN_ISA chooses the instruction set, for tests.";

/// The whole command line.
pub fn definition() -> Command {
    Command::new("setun")
        .version(env!("CARGO_PKG_VERSION"))
        .about("Trains, checks, exports and runs ternary language models.")
        .after_help(EXAMPLES)
        .subcommand_required(true)
        .arg_required_else_help(true)
        .subcommands([
            train(),
            verify(),
            generate(),
            eval(),
            tokenize(),
            tokenizer(),
            convert::convert(),
            convert::inspect(),
            report(),
            sweep::compare(),
            sweep::sweep(),
            bench::bench(),
        ])
}

/// Joins `--train.recompute false` to `--train.recompute=false`. A switch takes its
/// value only with `=`, or a recipe after the bare switch would be read as its value.
pub fn join_switch_values(args: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
    let mut joined: Vec<OsString> = Vec::new();
    let mut after_switch = false;
    for arg in args {
        if after_switch
            && (arg == "true" || arg == "false")
            && let Some(switch) = joined.last_mut()
        {
            switch.push("=");
            switch.push(&arg);
            after_switch = false;
            continue;
        }
        let name = arg.to_str().and_then(|arg| arg.strip_prefix("--"));
        let key = name.and_then(schema::find);
        after_switch = key.is_some_and(|key| key.is_switch);
        joined.push(arg);
    }
    joined
}

fn train() -> Command {
    const EXAMPLES: &str = "\
Examples:
  setun train recipes/quickstart.toml
  setun train recipes/path-b.toml --data.train 'books/*.txt' --train.steps 5000
  setun train --data.train notes.txt --run.name notes
  setun train recipes/quickstart.toml --init runs/quickstart --run.output runs/more
  setun train --resume runs/quickstart
  setun train --drafter-for runs/quickstart
  setun train recipes/path-b.toml --data.train books --dry-run";
    let settings = format!(
        "{EXAMPLES}\n\n\
         Settings. Each is a key of the recipe (lr under [train]) and a flag; flags win.\n\
         Lists are separated by commas; underscores may be written as dashes.\n{}",
        schema::help().trim_end()
    );
    Command::new("train")
        .about("Train a model from text; writes a run directory")
        .override_usage(
            "setun train [RECIPE.toml] [--SECTION.KEY VALUE]...\n       setun train --resume RUN\n       \
             setun train --drafter-for MODEL [--SECTION.KEY VALUE]...",
        )
        .arg(
            Arg::new("recipe")
                .value_name("RECIPE.toml")
                .value_parser(recipe)
                .help("Settings of the run; without it, defaults and flags"),
        )
        .arg(
            path_flag("init", "MODEL")
                .help("Start from the weights of a run, a checkpoint or an export"),
        )
        .arg(
            path_flag("resume", "RUN")
                .conflicts_with_all(["recipe", "init"])
                .help("Go on with a run from its newest checkpoint, bit for bit"),
        )
        .arg(
            path_flag("drafter-for", "MODEL")
                .conflicts_with_all(["recipe", "init", "resume", "dry-run", "profile"])
                .help(
                    "Train a block drafter for the ternary model of a run or an export; it goes \
                     to MODEL/drafter, for setun generate --draft MODEL/drafter",
                ),
        )
        .arg(switch("dry-run").help("Check the settings, print the memory plan, and stop; no data is read"))
        .arg(
            switch("profile").help(
                "Measure each operation of a step: prints a table and writes RUN/profile.json",
            ),
        )
        .args(SETTING_FLAGS.iter().map(setting_flag))
        .after_help(settings)
}

fn verify() -> Command {
    Command::new("verify")
        .about("Check hashes, and prove that a run or model file is ternary")
        .arg(path_argument("path", "PATH").help("A run, a checkpoint, an export or a model file"))
        .arg(json_flag())
        .after_help(
            "Exits 1 when a check fails; each is named with its file and tensor.\n\n\
             Examples:\n  setun verify runs/quickstart\n  setun verify out/model.safetensors --json",
        )
}

fn generate() -> Command {
    Command::new("generate")
        .about("Continue a text")
        .args([
            model_flag(),
            Arg::new("prompt")
                .long("prompt")
                .value_name("TEXT")
                .required_unless_present("prompts")
                .conflicts_with("prompts")
                .allow_hyphen_values(true)
                .help("Text to continue; required unless there is --prompts"),
            path_flag("prompts", "FILE")
                .help("Continue every line of a file, together; prints JSON lines"),
            number(
                "beams",
                "K",
                "Search with K beams instead of sampling; 0: sample",
                "0",
            )
            .value_parser(|text: &str| within(text, 0, MAX_BEAMS)),
            decimal(
                "length-penalty",
                exponent,
                "A beam's score is its log-probability / tokens^X",
                "0.6",
            ),
            kv_flag(),
            draft_flag().default_value("none"),
            checkpoint_flag(),
            number("max-tokens", "N", "Most tokens to generate", "100"),
        ])
        .args(sampling_flags())
        .args([
            threads_flag(),
            switch("stats").help("Print tokens, speed and drafts to standard error"),
        ])
        .after_help(
            "Examples:\n  \
             setun generate --model runs/quickstart --prompt \"The telephone is\"\n  \
             setun generate --model out --prompt \"Iron\" --temperature 0 --max-tokens 40 --stats\n  \
             setun generate --model out --prompt \"Iron\" --draft ngram --stats",
        )
}

/// Most beams of a search.
const MAX_BEAMS: usize = 1024;
/// Most windows of an evaluation at a time.
const MAX_EVAL_BATCH: usize = 65_536;
/// Most threads of a command.
const MAX_THREADS: usize = 1024;
/// Most tokens whose log-probabilities are printed.
const MAX_LOGPROBS: usize = 1024;

fn sampling_flags() -> [Arg; 9] {
    [
        decimal(
            "temperature",
            not_negative,
            "Softmax temperature; 0 is greedy",
            "0.8",
        ),
        number(
            "top-k",
            "N",
            "Likeliest tokens to choose from; 0 for all",
            "40",
        ),
        decimal(
            "top-p",
            top_p,
            "Total probability of the tokens to choose from",
            "0.95",
        ),
        decimal(
            "min-p",
            below_one,
            "Least probability, relative to the likeliest",
            "0",
        ),
        decimal(
            "repetition-penalty",
            above_zero,
            "Above 1 makes tokens that occurred less likely",
            "1",
        ),
        decimal(
            "presence-penalty",
            any_number,
            "Above 0 makes tokens that were generated less likely",
            "0",
        ),
        decimal(
            "frequency-penalty",
            any_number,
            "The same, once for each time",
            "0",
        ),
        Arg::new("logprobs")
            .long("logprobs")
            .value_name("N")
            .value_parser(|text: &str| {
                let n = text.parse().ok().filter(|n: &usize| *n <= MAX_LOGPROBS);
                n.ok_or(format!("it is a number from 0 to {MAX_LOGPROBS}"))
            })
            .help("Print the log-probability of each token, and the N likeliest at its place"),
        Arg::new("seed")
            .long("seed")
            .value_name("N")
            .value_parser(value_parser!(u64))
            .default_value("1")
            .help("Seed of the sampling; the same seed gives the same text"),
    ]
}

fn kv_flag() -> Arg {
    Arg::new("kv")
        .long("kv")
        .value_name("KIND")
        .value_parser(|text: &str| CacheKind::from_name(text).ok_or("it is bf16, f32 or int8"))
        .help("How keys and values are stored: bf16, f32 or int8 [default: as exact as the model]")
}

fn eval() -> Command {
    Command::new("eval")
        .about("Perplexity and bits per byte of a model on text")
        .args([
            model_flag(),
            Arg::new("data")
                .long("data")
                .value_name("FILE")
                .required(true)
                .num_args(1..)
                .value_parser(value_parser!(PathBuf))
                .help("Text files (.txt, .jsonl), folders or patterns; or a .tokens file"),
            checkpoint_flag(),
            length(
                "seq-len",
                "Tokens in a window [default: as in training, or the model's limit, at most 512]",
            ),
            length(
                "batch-size",
                "Windows processed at a time; results do not depend on it",
            )
            .value_parser(|text: &str| within(text, 1, MAX_EVAL_BATCH))
            .default_value("8"),
            threads_flag(),
            Arg::new("numerics")
                .long("numerics")
                .value_name("MODE")
                .value_parser(|text: &str| {
                    Numerics::from_name(text).ok_or("it is int8, bf16 or f32")
                })
                .help("Arithmetic to use instead of the model's own: int8, bf16 or f32"),
            kv_flag()
                .conflicts_with("logits")
                .help("Evaluate through the cache of generation, stored as bf16, f32 or int8"),
            path_flag("logits", "FILE")
                .help("Also write the logits of every token, as a safetensors file"),
            json_flag(),
        ])
        .args(document_flags())
        .after_help("Example:\n  setun eval --model runs/quickstart --data held-out.txt --json")
}

fn tokenize() -> Command {
    Command::new("tokenize")
        .about("Turn text into a token file for training")
        .args([
            path_flag("tokenizer", "FILE")
                .required_unless_present("model")
                .conflicts_with("model")
                .help("A tokenizer.json"),
            path_flag("model", "PATH").help("A run or model whose tokenizer is used"),
            path_flag("output", "FILE")
                .required(true)
                .help("Token file to write; end its name in .tokens"),
            sources(),
        ])
        .args(document_flags())
        .after_help(
            "Example:\n  \
             setun tokenize --tokenizer tokenizer.json --output books.tokens books/*.txt\n  \
             setun tokenize --tokenizer tokenizer.json --output other.tokens other.txt\n  \
             setun train recipes/path-b.toml --tokenizer.path tokenizer.json \\\n      \
             --data.train books.tokens --data.valid other.tokens",
        )
}

fn tokenizer() -> Command {
    let train = Command::new("train")
        .about("Train a byte-level BPE tokenizer on text")
        .args([
            length(
                "vocab-size",
                "Number of entries, the 256 bytes and special tokens included",
            )
            .required(true),
            path_flag("output", "FILE")
                .required(true)
                .help("tokenizer.json to write"),
            sources(),
        ])
        .args(document_flags())
        .after_help(
            "Example:\n  \
             setun tokenizer train --vocab-size 8192 --output tokenizer.json books/*.txt",
        );
    let show = Command::new("show")
        .about("Describe a tokenizer, or show how it splits a text")
        .arg(path_argument("file", "FILE").help("A tokenizer.json, or a run or model with one"))
        .arg(
            Arg::new("text")
                .long("text")
                .value_name("TEXT")
                .allow_hyphen_values(true)
                .help("Text to split into tokens"),
        )
        .after_help("Example:\n  setun tokenizer show tokenizer.json --text \"Hello there\"");
    Command::new("tokenizer")
        .about("Train or show a tokenizer")
        .subcommand_required(true)
        .arg_required_else_help(true)
        .subcommands([train, show])
}

fn report() -> Command {
    Command::new("report")
        .about("Write report.html and report.json of a run again")
        .arg(path_argument("run", "RUN").help("A run directory"))
        .after_help("Example:\n  setun report runs/quickstart")
}

/// A setting with the dashed spelling of its flag; clap wants names that live forever.
struct SettingFlag {
    key: &'static Key,
    dashed: String,
}

static SETTING_FLAGS: LazyLock<Vec<SettingFlag>> = LazyLock::new(|| {
    let flag = |key: &'static Key| SettingFlag {
        key,
        dashed: key.path.replace('_', "-"),
    };
    schema::keys().iter().map(flag).collect()
});

/// Values stay text here; the settings read and check them. Hidden, because the help
/// of the settings table is printed instead.
fn setting_flag(flag: &'static SettingFlag) -> Arg {
    let arg = Arg::new(flag.key.path)
        .long(flag.key.path)
        .value_name(flag.key.placeholder)
        .action(ArgAction::Append)
        .allow_negative_numbers(true)
        .hide(true);
    let arg = if flag.dashed == flag.key.path {
        arg
    } else {
        arg.alias(flag.dashed.as_str())
    };
    if flag.key.is_switch {
        arg.num_args(0..=1)
            .require_equals(true)
            .default_missing_value("true")
    } else {
        arg
    }
}

/// How text files are read, for commands without a recipe, with the same defaults.
fn document_flags() -> [Arg; 3] {
    let defaults = DocumentOptions::default();
    [
        Arg::new("split-on")
            .long("split-on")
            .value_name(SplitOn::PLACEHOLDER)
            .value_parser(split_on)
            .help(format!(
                "What separates documents: {} [default: {}]",
                SplitOn::choices().join(", "),
                defaults.split_on
            )),
        Arg::new("text-field")
            .long("text-field")
            .value_name("TEXT")
            .help(format!(
                "Field of a .jsonl line that holds the text [default: {}]",
                defaults.text_field
            )),
        Arg::new("min-document-chars")
            .long("min-document-chars")
            .value_name("N")
            .value_parser(whole_number)
            .help(format!(
                "Shorter documents are kept, but counted and reported [default: {}]",
                defaults.min_document_chars
            )),
    ]
}

fn draft_flag() -> Arg {
    Arg::new("draft")
        .long("draft")
        .value_name("ngram|PATH|none")
        .value_parser(|text: &str| Ok::<_, Infallible>(Drafting::parse(text)))
        .help(
            "Guess ahead from the text so far, with a block drafter (MODEL/drafter), or with a \
             smaller model: the same text, often sooner",
        )
}

fn model_flag() -> Arg {
    path_flag("model", "PATH")
        .required(true)
        .help("A run, a checkpoint or an export")
}

fn checkpoint_flag() -> Arg {
    Arg::new("checkpoint")
        .long("checkpoint")
        .value_name("best|newest|STEP")
        .value_parser(CheckpointChoice::parse)
        .help("Which checkpoint of a run [default: the best; before there is one, the newest]")
}

fn threads_flag() -> Arg {
    number("threads", "N", "Number of threads; 0 for all cores", "0")
        .value_parser(|text: &str| within(text, 0, MAX_THREADS))
}

fn json_flag() -> Arg {
    switch("json").help("Print JSON")
}

fn sources() -> Arg {
    path_argument("sources", "SOURCES")
        .num_args(1..)
        .help("Text files (.txt, .jsonl), folders or patterns")
}

fn path_argument(name: &'static str, value_name: &'static str) -> Arg {
    Arg::new(name)
        .value_name(value_name)
        .required(true)
        .value_parser(value_parser!(PathBuf))
}

fn path_flag(name: &'static str, value_name: &'static str) -> Arg {
    Arg::new(name)
        .long(name)
        .value_name(value_name)
        .value_parser(value_parser!(PathBuf))
}

fn switch(name: &'static str) -> Arg {
    Arg::new(name).long(name).action(ArgAction::SetTrue)
}

fn number(
    name: &'static str,
    unit: &'static str,
    help: &'static str,
    default: &'static str,
) -> Arg {
    Arg::new(name)
        .long(name)
        .value_name(unit)
        .value_parser(whole_number)
        .default_value(default)
        .help(help)
}

/// A whole number of at least 1.
fn length(name: &'static str, help: &'static str) -> Arg {
    Arg::new(name)
        .long(name)
        .value_name("N")
        .value_parser(one_or_more)
        .help(help)
}

fn decimal(
    name: &'static str,
    parse: fn(&str) -> Result<f64, String>,
    help: &'static str,
    default: &'static str,
) -> Arg {
    Arg::new(name)
        .long(name)
        .value_name("X")
        .value_parser(ValueParser::new(parse))
        .allow_negative_numbers(true)
        .default_value(default)
        .help(help)
}

fn recipe(text: &str) -> Result<PathBuf, String> {
    let path = Path::new(text);
    if path
        .extension()
        .is_some_and(|extension| extension == "toml")
    {
        return Ok(path.to_path_buf());
    }
    Err(
        "a recipe ends in .toml; separate the files of --data.train by commas, \
         and put patterns in quotes"
            .to_owned(),
    )
}

fn split_on(text: &str) -> Result<SplitOn, String> {
    text.parse().map_err(|error: DataError| error.to_string())
}

fn whole_number(text: &str) -> Result<usize, String> {
    text.parse()
        .map_err(|_| "it is a whole number, 0 or more".to_owned())
}

fn one_or_more(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(number) if number > 0 => Ok(number),
        _ => Err("it is a whole number, 1 or more".to_owned()),
    }
}

fn within(text: &str, least: usize, most: usize) -> Result<usize, String> {
    let number = text.parse().ok();
    let number = number.filter(|n: &usize| (least..=most).contains(n));
    number.ok_or_else(|| format!("it is a whole number from {least} to {most}"))
}

fn not_negative(text: &str) -> Result<f64, String> {
    checked(text, |number| number >= 0.0, "it is a number, 0 or more")
}

fn above_zero(text: &str) -> Result<f64, String> {
    checked(text, |number| number > 0.0, "it is a number above 0")
}

fn top_p(text: &str) -> Result<f64, String> {
    let allowed = |number| number > 0.0 && number <= 1.0;
    checked(text, allowed, "it is above 0 and at most 1")
}

fn below_one(text: &str) -> Result<f64, String> {
    checked(
        text,
        |number| (0.0..1.0).contains(&number),
        "it is at least 0 and below 1",
    )
}

/// So small that its power of no length is infinite.
fn exponent(text: &str) -> Result<f64, String> {
    let allowed = |number: f64| number.abs() <= 40.0;
    checked(text, allowed, "it is a number from -40 to 40")
}

fn any_number(text: &str) -> Result<f64, String> {
    checked(text, |_| true, "it is a number")
}

/// A number that is allowed also as the f32 that it becomes.
fn checked(text: &str, allowed: impl Fn(f64) -> bool, rule: &str) -> Result<f64, String> {
    let Some(number) = text.parse::<f64>().ok().filter(|number| number.is_finite()) else {
        return Err(rule.to_owned());
    };
    let single = f64::from(number as f32);
    match single.is_finite() && allowed(number) && allowed(single) {
        true => Ok(number),
        false if single.is_infinite() => Err(format!("{rule}, at most {:e} in size", f32::MAX)),
        false => Err(rule.to_owned()),
    }
}
