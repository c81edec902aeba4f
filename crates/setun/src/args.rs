//! What the user asked for, as plain values.

use setun_backend::CacheKind;
use std::ffi::OsString;
use std::path::PathBuf;

use clap::ArgMatches;
use clap::error::ErrorKind;
use clap::parser::ValueSource;
use setun_formats::TernaryInfo;
use setun_io::Format;
use setun_ternary::Numerics;
use setun_train::data::DocumentOptions;
use setun_train::settings::{Override, schema};
use setun_train::sweep::SweepOptions;

use crate::flags;

mod bench;

pub use bench::{BenchArgs, Benchmark, Decoding, DecodingArgs, Shape, SpeculateArgs};

/// A command with its arguments.
#[derive(Clone, Debug, PartialEq)]
pub enum Command {
    /// `setun train`
    Train(TrainArgs),
    /// `setun verify`
    Verify(VerifyArgs),
    /// `setun generate`
    Generate(GenerateArgs),
    /// `setun eval`
    Eval(EvalArgs),
    /// `setun tokenize`
    Tokenize(TokenizeArgs),
    /// `setun tokenizer train`
    TokenizerTrain(TokenizerTrainArgs),
    /// `setun tokenizer show`
    TokenizerShow(TokenizerShowArgs),
    /// `setun convert`
    Convert(ConvertArgs),
    /// `setun inspect`
    Inspect(InspectArgs),
    /// `setun report`
    Report(ReportArgs),
    /// `setun compare`
    Compare(CompareArgs),
    /// `setun sweep`
    Sweep(SweepArgs),
    /// `setun bench`
    Bench(BenchArgs),
}

/// Arguments of `setun train`.
#[derive(Clone, Debug, PartialEq)]
pub struct TrainArgs {
    /// Recipe to read; `None` starts from the defaults.
    pub recipe: Option<PathBuf>,
    /// Settings given as flags, in the order of the settings table; `--init` is among
    /// them as `model.init_from`.
    pub overrides: Vec<Override>,
    /// Run to go on with; excludes a recipe and `--init`.
    pub resume: Option<PathBuf>,
    /// Model to train a block drafter for; excludes all of the others.
    pub drafter_for: Option<PathBuf>,
    /// Whether to stop before the first step.
    pub dry_run: bool,
    /// Whether to measure the time of each operation.
    pub profile: bool,
}

/// Arguments of `setun verify`.
#[derive(Clone, Debug, PartialEq)]
pub struct VerifyArgs {
    /// Run, checkpoint, export or model file.
    pub path: PathBuf,
    /// Whether to print JSON.
    pub json: bool,
}

/// Arguments of `setun generate`.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerateArgs {
    /// Run, checkpoint or export.
    pub model: PathBuf,
    /// Which checkpoint, if `model` is a run; `None` for the best, or the newest without one.
    pub checkpoint: Option<CheckpointChoice>,
    /// Text to continue, unless there are `prompts`.
    pub prompt: Option<String>,
    /// File with a prompt on each line.
    pub prompts: Option<PathBuf>,
    /// Beams of a beam search; 0 samples.
    pub beams: usize,
    /// Exponent of the length in the score of a beam, if it was given.
    pub length_penalty: Option<f64>,
    /// How keys and values are stored; `None` for exactly.
    pub kv: Option<CacheKind>,
    /// Where drafts come from.
    pub draft: Drafting,
    /// Most tokens to generate.
    pub max_tokens: usize,
    /// Softmax temperature; 0 is greedy.
    pub temperature: f64,
    /// Number of likeliest tokens to choose from; 0 for all.
    pub top_k: usize,
    /// Total probability of the tokens to choose from, above 0 and at most 1.
    pub top_p: f64,
    /// Least probability relative to the likeliest token, at least 0 and below 1.
    pub min_p: f64,
    /// Divisor of the logits of tokens that occurred; 1 is off.
    pub repetition_penalty: f64,
    /// Subtracted from the logits of tokens that were generated; 0 is off.
    pub presence_penalty: f64,
    /// Subtracted once for each time that a token was generated; 0 is off.
    pub frequency_penalty: f64,
    /// Whether to print log-probabilities, and how many tokens beside the chosen one.
    pub logprobs: Option<usize>,
    /// Seed of the sampling.
    pub seed: u64,
    /// Flags of the sampling that were given, by name.
    pub sampling: Vec<&'static str>,
    /// Number of threads; 0 for all cores.
    pub threads: usize,
    /// Whether to print tokens and speed.
    pub stats: bool,
}

/// Arguments of `setun eval`.
#[derive(Clone, Debug, PartialEq)]
pub struct EvalArgs {
    /// Run, checkpoint or export.
    pub model: PathBuf,
    /// Which checkpoint, if `model` is a run; `None` for the best, or the newest without one.
    pub checkpoint: Option<CheckpointChoice>,
    /// Files, folders and patterns.
    pub data: Vec<PathBuf>,
    /// How text files are read.
    pub documents: DocumentOptions,
    /// Tokens in a window; `None` for the run's own, or the model's limit.
    pub seq_len: Option<usize>,
    /// Windows processed at a time, at least 1.
    pub batch_size: usize,
    /// Number of threads; 0 for all cores.
    pub threads: usize,
    /// Other numerics than the model's record says.
    pub numerics: Option<Numerics>,
    /// To evaluate through a cache of keys and values stored like this.
    pub kv: Option<CacheKind>,
    /// Where to write the logits of every token.
    pub logits: Option<PathBuf>,
    /// Whether to print JSON.
    pub json: bool,
}

/// Arguments of `setun tokenize`.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenizeArgs {
    /// Where the tokenizer is.
    pub tokenizer: TokenizerSource,
    /// Token file to write.
    pub output: PathBuf,
    /// Files, folders and patterns.
    pub sources: Vec<PathBuf>,
    /// How text files are read.
    pub documents: DocumentOptions,
}

/// Arguments of `setun tokenizer train`.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenizerTrainArgs {
    /// Number of entries, special tokens included.
    pub vocab_size: usize,
    /// `tokenizer.json` to write.
    pub output: PathBuf,
    /// Files, folders and patterns.
    pub sources: Vec<PathBuf>,
    /// How text files are read.
    pub documents: DocumentOptions,
}

/// Arguments of `setun tokenizer show`.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenizerShowArgs {
    /// A `tokenizer.json`, or a run or model that has one.
    pub file: PathBuf,
    /// Text to split into tokens.
    pub text: Option<String>,
}

/// Arguments of `setun convert`.
#[derive(Clone, Debug, PartialEq)]
pub struct ConvertArgs {
    /// Run, checkpoint, model directory or file.
    pub input: PathBuf,
    /// Which checkpoint, if `input` is a run; `None` for the best, or the newest without one.
    pub checkpoint: Option<CheckpointChoice>,
    /// Directory or file to write.
    pub output: PathBuf,
    /// Format to write.
    pub format: Format,
    /// How to project a dense model, if it shall be.
    pub ternarize: Option<TernaryInfo>,
    /// Whether a loss is allowed.
    pub lossy: bool,
    /// Bytes of weights in one file of a directory.
    pub shard_bytes: usize,
}

/// Arguments of `setun inspect`.
#[derive(Clone, Debug, PartialEq)]
pub struct InspectArgs {
    /// Run, checkpoint, model directory or file.
    pub path: PathBuf,
    /// Whether to print JSON.
    pub json: bool,
}

/// Arguments of `setun report`.
#[derive(Clone, Debug, PartialEq)]
pub struct ReportArgs {
    /// Run directory.
    pub run: PathBuf,
}

/// Arguments of `setun compare`.
#[derive(Clone, Debug, PartialEq)]
pub struct CompareArgs {
    /// Run directories, at least two.
    pub runs: Vec<PathBuf>,
    /// Where to write table and page.
    pub output: Option<PathBuf>,
}

/// Arguments of `setun sweep`.
#[derive(Clone, Debug, PartialEq)]
pub struct SweepArgs {
    /// File that describes the sweep.
    pub spec: PathBuf,
    /// What is said besides the file.
    pub options: SweepOptions,
    /// Whether to list the runs only.
    pub dry_run: bool,
    /// Whether to write the table only.
    pub table: bool,
}

/// Which checkpoint of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CheckpointChoice {
    /// The one with the lowest held-out loss.
    Best,
    /// The newest one that verifies.
    Newest,
    /// The one written after this many steps.
    Step(u64),
}

impl CheckpointChoice {
    /// Reads `best`, `newest` or a number of steps.
    ///
    /// # Errors
    /// Anything else, with what is allowed.
    pub fn parse(text: &str) -> Result<Self, String> {
        match text {
            "best" => Ok(Self::Best),
            "newest" => Ok(Self::Newest),
            _ => text
                .parse()
                .map(Self::Step)
                .map_err(|_| "it is best, newest or a number of steps".to_owned()),
        }
    }
}

/// Where the drafts of speculative decoding come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Drafting {
    /// Nowhere: one token in each step.
    None,
    /// From the text so far.
    Ngram,
    /// From a smaller model.
    Model(PathBuf),
}

impl Drafting {
    /// Reads `none`, `ngram`, or else the path of a model.
    pub fn parse(text: &str) -> Self {
        match text {
            "none" => Self::None,
            "ngram" => Self::Ngram,
            path => Self::Model(path.into()),
        }
    }
}

/// Where a tokenizer comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TokenizerSource {
    /// A `tokenizer.json`.
    File(PathBuf),
    /// A run or model that has one.
    Model(PathBuf),
}

/// Reads a command line, program name first.
///
/// # Errors
/// Wrong usage, and the requests for help or version; the error prints itself and
/// knows its exit code.
pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Command, clap::Error> {
    let mut definition = flags::definition();
    let matches = definition.try_get_matches_from_mut(flags::join_switch_values(args))?;
    let command = match matches.subcommand() {
        Some(("train", matches)) => Command::Train(train(matches)),
        Some(("verify", matches)) => Command::Verify(VerifyArgs {
            path: value(matches, "path"),
            json: matches.get_flag("json"),
        }),
        Some(("generate", matches)) => Command::Generate(generate(matches)),
        Some(("eval", matches)) => Command::Eval(eval(matches)),
        Some(("tokenize", matches)) => Command::Tokenize(tokenize(matches)),
        Some(("tokenizer", matches)) => match matches.subcommand() {
            Some(("train", matches)) => Command::TokenizerTrain(tokenizer_train(matches)),
            Some(("show", matches)) => Command::TokenizerShow(TokenizerShowArgs {
                file: value(matches, "file"),
                text: matches.get_one("text").cloned(),
            }),
            _ => return Err(definition.error(ErrorKind::MissingSubcommand, "train or show?")),
        },
        Some(("convert", matches)) => Command::Convert(convert(matches)),
        Some(("inspect", matches)) => Command::Inspect(InspectArgs {
            path: value(matches, "path"),
            json: matches.get_flag("json"),
        }),
        Some(("bench", matches)) => match bench::bench(matches) {
            Some(args) => Command::Bench(args),
            None => return Err(definition.error(ErrorKind::MissingSubcommand, "which benchmark?")),
        },
        Some(("report", matches)) => Command::Report(ReportArgs {
            run: value(matches, "run"),
        }),
        Some(("compare", matches)) => Command::Compare(CompareArgs {
            runs: paths(matches, "runs"),
            output: matches.get_one("output").cloned(),
        }),
        Some(("sweep", matches)) => Command::Sweep(sweep(matches)),
        _ => return Err(definition.error(ErrorKind::MissingSubcommand, "which command?")),
    };
    Ok(command)
}

fn train(matches: &ArgMatches) -> TrainArgs {
    let mut overrides = Vec::new();
    for key in schema::keys() {
        let Some(values) = matches.get_many::<String>(key.path) else {
            continue;
        };
        // A repeated flag adds to a list; of anything else the last one counts.
        let values: Vec<&str> = values.map(String::as_str).collect();
        let skipped = if key.is_list { 0 } else { values.len() - 1 };
        overrides.push(Override {
            key: key.path.to_owned(),
            value: values[skipped..].join(","),
        });
    }
    if let Some(model) = matches.get_one::<PathBuf>("init") {
        overrides.push(Override {
            key: "model.init_from".to_owned(),
            value: model.to_string_lossy().into_owned(),
        });
    }
    TrainArgs {
        recipe: matches.get_one("recipe").cloned(),
        overrides,
        resume: matches.get_one("resume").cloned(),
        drafter_for: matches.get_one("drafter-for").cloned(),
        dry_run: matches.get_flag("dry-run"),
        profile: matches.get_flag("profile"),
    }
}

/// Flags that choose how tokens are drawn.
const SAMPLING: [&str; 8] = [
    "temperature",
    "top-k",
    "top-p",
    "min-p",
    "repetition-penalty",
    "presence-penalty",
    "frequency-penalty",
    "seed",
];

fn generate(matches: &ArgMatches) -> GenerateArgs {
    GenerateArgs {
        model: value(matches, "model"),
        checkpoint: optional(matches, "checkpoint"),
        prompt: matches.get_one("prompt").cloned(),
        prompts: matches.get_one("prompts").cloned(),
        beams: value(matches, "beams"),
        length_penalty: given(matches, &["length-penalty"])
            .pop()
            .map(|name| value(matches, name)),
        kv: matches.get_one("kv").copied(),
        draft: value(matches, "draft"),
        max_tokens: value(matches, "max-tokens"),
        temperature: value(matches, "temperature"),
        top_k: value(matches, "top-k"),
        top_p: value(matches, "top-p"),
        min_p: value(matches, "min-p"),
        repetition_penalty: value(matches, "repetition-penalty"),
        presence_penalty: value(matches, "presence-penalty"),
        frequency_penalty: value(matches, "frequency-penalty"),
        logprobs: matches.get_one("logprobs").copied(),
        seed: value(matches, "seed"),
        sampling: given(matches, &SAMPLING),
        threads: value(matches, "threads"),
        stats: matches.get_flag("stats"),
    }
}

fn eval(matches: &ArgMatches) -> EvalArgs {
    EvalArgs {
        model: value(matches, "model"),
        checkpoint: optional(matches, "checkpoint"),
        data: paths(matches, "data"),
        documents: document_options(matches),
        seq_len: matches.get_one("seq-len").copied(),
        batch_size: value(matches, "batch-size"),
        threads: value(matches, "threads"),
        numerics: matches.get_one("numerics").copied(),
        kv: matches.get_one("kv").copied(),
        logits: matches.get_one("logits").cloned(),
        json: matches.get_flag("json"),
    }
}

fn tokenize(matches: &ArgMatches) -> TokenizeArgs {
    let file = matches.get_one("tokenizer").cloned();
    TokenizeArgs {
        tokenizer: match file {
            Some(file) => TokenizerSource::File(file),
            None => TokenizerSource::Model(value(matches, "model")),
        },
        output: value(matches, "output"),
        sources: paths(matches, "sources"),
        documents: document_options(matches),
    }
}

fn tokenizer_train(matches: &ArgMatches) -> TokenizerTrainArgs {
    TokenizerTrainArgs {
        vocab_size: value(matches, "vocab-size"),
        output: value(matches, "output"),
        sources: paths(matches, "sources"),
        documents: document_options(matches),
    }
}

fn convert(matches: &ArgMatches) -> ConvertArgs {
    let ternary = TernaryInfo {
        group_size: value(matches, "group-size"),
        scale_rule: value(matches, "scale-rule"),
        numerics: value(matches, "numerics"),
    };
    ConvertArgs {
        input: value(matches, "input"),
        checkpoint: optional(matches, "checkpoint"),
        output: value(matches, "output"),
        format: value(matches, "to"),
        ternarize: matches.get_flag("ternarize").then_some(ternary),
        lossy: matches.get_flag("lossy"),
        shard_bytes: value(matches, "shard-bytes"),
    }
}

fn sweep(matches: &ArgMatches) -> SweepArgs {
    let overrides = matches.get_many::<Override>("set").into_iter().flatten();
    SweepArgs {
        spec: value(matches, "spec"),
        options: SweepOptions {
            output: matches.get_one("output").cloned(),
            seeds: many(matches, "seeds"),
            cells: many(matches, "cells"),
            overrides: overrides.cloned().collect(),
        },
        dry_run: matches.get_flag("dry-run"),
        table: matches.get_flag("table"),
    }
}

fn document_options(matches: &ArgMatches) -> DocumentOptions {
    let defaults = DocumentOptions::default();
    DocumentOptions {
        split_on: optional(matches, "split-on").unwrap_or(defaults.split_on),
        text_field: optional(matches, "text-field").unwrap_or(defaults.text_field),
        min_document_chars: optional(matches, "min-document-chars")
            .unwrap_or(defaults.min_document_chars),
    }
}

fn optional<T: Clone + Send + Sync + 'static>(matches: &ArgMatches, name: &str) -> Option<T> {
    matches.get_one::<T>(name).cloned()
}

fn value<T: Clone + Send + Sync + 'static>(matches: &ArgMatches, name: &str) -> T {
    optional(matches, name).expect("the definition makes it required or gives it a default")
}

/// Those of `names` that stand on the command line, also where they say what is the default.
fn given(matches: &ArgMatches, names: &[&'static str]) -> Vec<&'static str> {
    let mut given = names.to_vec();
    given.retain(|name| matches.value_source(name) == Some(ValueSource::CommandLine));
    given
}

fn many<T: Clone + Send + Sync + 'static>(matches: &ArgMatches, name: &str) -> Vec<T> {
    let values = matches.get_many::<T>(name);
    values.into_iter().flatten().cloned().collect()
}

fn paths(matches: &ArgMatches, name: &str) -> Vec<PathBuf> {
    let values = matches.get_many::<PathBuf>(name);
    values.into_iter().flatten().cloned().collect()
}

#[cfg(test)]
mod tests;
