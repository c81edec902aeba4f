//! Arguments of `setun bench`.

use super::{Drafting, optional, value};
use clap::ArgMatches;
use setun_backend::CacheKind;
use std::path::PathBuf;

/// Arguments of `setun bench`.
#[derive(Clone, Debug, PartialEq)]
pub struct BenchArgs {
    /// What is measured.
    pub benchmark: Benchmark,
    /// Number of threads; 0 for all cores.
    pub threads: usize,
    /// Measurements, of which the median counts; 0 where nothing is measured.
    pub repeat: usize,
    /// Whether to print JSON.
    pub json: bool,
}

/// A benchmark with its own arguments.
#[derive(Clone, Debug, PartialEq)]
pub enum Benchmark {
    /// Multiply-adds in registers.
    Peak,
    /// Reading main memory.
    Bandwidth,
    /// Products of a training step.
    Matmul {
        /// Model whose matrices are multiplied.
        shape: Shape,
    },
    /// Attention forward and backward.
    Attention {
        /// Tokens of the sequence.
        seq: Vec<usize>,
        /// Width of a head.
        head_dim: Vec<usize>,
        /// Number of heads.
        heads: usize,
    },
    /// LayerNorm and RMSNorm.
    LayerNorm {
        /// Rows.
        rows: usize,
        /// Widths of a row.
        widths: Vec<usize>,
    },
    /// Training steps.
    Train {
        /// Model to train.
        shape: Shape,
        /// Sequences in a step; `None` for the shape's.
        batch_size: Option<usize>,
        /// Tokens in a sequence; `None` for the shape's.
        seq_len: Option<usize>,
        /// Whether to print the time of each operation.
        profile: bool,
    },
    /// Drafts against none.
    Speculate(SpeculateArgs),
    /// Generating text, and what it needs.
    Decoding(DecodingArgs),
}

/// Arguments of `setun bench speculate`.
#[derive(Clone, Debug, PartialEq)]
pub struct SpeculateArgs {
    /// The target.
    pub model: PathBuf,
    /// Where drafts come from.
    pub draft: Drafting,
    /// Text whose passages are continued.
    pub text: PathBuf,
    /// Tokens of a text.
    pub tokens: usize,
}

/// Arguments of the benchmarks of decoding.
#[derive(Clone, Debug, PartialEq)]
pub struct DecodingArgs {
    /// What is measured.
    pub what: Decoding,
    /// Model whose shape and weights are used; `None` for random weights.
    pub model: Option<PathBuf>,
    /// Tokens in the cache before what is timed, or of a prompt; 0 where there are none.
    pub tokens: usize,
    /// Rows of a step, or of logits; 0 where they are fixed.
    pub batch: usize,
    /// Whether sequences are forks of one, and have its tokens in common.
    pub forked: bool,
    /// Entries to keep; 0 where none are.
    pub k: usize,
    /// How keys and values are stored; `None` for exactly.
    pub kv: Option<CacheKind>,
}

/// A benchmark of decoding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decoding {
    /// Steps of one new token for each sequence.
    Decode,
    /// A prompt.
    Prefill,
    /// Steps of several new tokens against a step of one.
    VerifyWidth,
    /// Softmax and top-k of given logits.
    SoftmaxTopk,
    /// Memory of the cache.
    Kv,
}

impl Decoding {
    /// All of them.
    pub const ALL: [Self; 5] = [
        Self::Decode,
        Self::Prefill,
        Self::VerifyWidth,
        Self::SoftmaxTopk,
        Self::Kv,
    ];

    /// Name as it is written on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Decode => "decode",
            Self::Prefill => "prefill",
            Self::VerifyWidth => "verify-width",
            Self::SoftmaxTopk => "softmax-topk",
            Self::Kv => "kv",
        }
    }
}

/// Shapes of models that are measured; each has a recipe of that name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// 3.2 M weights.
    Quickstart,
    /// 29 M weights.
    PathB,
    /// Qwen3-0.6B, 596 M weights.
    Qwen3,
}

impl Shape {
    /// Every shape.
    pub const ALL: [Self; 3] = [Self::Quickstart, Self::PathB, Self::Qwen3];

    /// Name on the command line, and of its recipe.
    pub fn name(self) -> &'static str {
        match self {
            Self::Quickstart => "quickstart",
            Self::PathB => "path-b",
            Self::Qwen3 => "qwen3-0.6b",
        }
    }

    /// The shape called `name`.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|shape| shape.name() == name)
    }
}

/// Reads what stands behind `setun bench`; none without a benchmark.
pub(super) fn bench(matches: &ArgMatches) -> Option<BenchArgs> {
    let (name, matches) = matches.subcommand()?;
    let list = |name| -> Vec<usize> {
        let values = matches.get_many::<usize>(name);
        values.into_iter().flatten().copied().collect()
    };
    let benchmark = match name {
        "peak" => Benchmark::Peak,
        "bandwidth" => Benchmark::Bandwidth,
        "matmul" => Benchmark::Matmul {
            shape: value(matches, "shape"),
        },
        "attention" => Benchmark::Attention {
            seq: list("seq"),
            head_dim: list("head-dim"),
            heads: value(matches, "heads"),
        },
        "layer-norm" => Benchmark::LayerNorm {
            rows: value(matches, "rows"),
            widths: list("width"),
        },
        "train" => Benchmark::Train {
            shape: value(matches, "shape"),
            batch_size: optional(matches, "batch-size"),
            seq_len: optional(matches, "seq-len"),
            profile: matches.get_flag("profile"),
        },
        "speculate" => Benchmark::Speculate(SpeculateArgs {
            model: value(matches, "model"),
            draft: value(matches, "draft"),
            text: value(matches, "text"),
            tokens: value(matches, "tokens"),
        }),
        name => Benchmark::Decoding(DecodingArgs {
            what: Decoding::ALL.into_iter().find(|what| what.name() == name)?,
            model: optional(matches, "model"),
            tokens: of_some(matches, "tokens").unwrap_or(0),
            batch: of_some(matches, "batch").unwrap_or(0),
            forked: of_some(matches, "forked").unwrap_or(false),
            k: of_some(matches, "k").unwrap_or(0),
            kv: of_some(matches, "kv"),
        }),
    };
    Some(BenchArgs {
        benchmark,
        threads: of_some(matches, "threads").unwrap_or(0),
        repeat: of_some(matches, "repeat").unwrap_or(0),
        json: matches.get_flag("json"),
    })
}

/// The value of a flag that some benchmarks have and others do not.
fn of_some<T: Clone + Send + Sync + 'static>(matches: &ArgMatches, name: &str) -> Option<T> {
    matches.try_get_one::<T>(name).ok().flatten().cloned()
}
