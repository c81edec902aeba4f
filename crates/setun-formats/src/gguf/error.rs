//! Why bytes are not a GGUF file of a model that Setun runs.

use super::GgufValue;
use crate::config::ConfigError;
use crate::packed::PackedError;
use crate::tokenizer::TokenizerError;
use thiserror::Error;

/// Why bytes are not a GGUF file that Setun reads, or a model not one that GGUF holds.
#[derive(Clone, Debug, PartialEq, Error)]
pub enum GgufError {
    /// Other first bytes.
    #[error("not a GGUF file: it starts with {found:?}; choose a .gguf file")]
    NotGguf {
        /// The first four bytes.
        found: String,
    },
    /// A version that was never published or is too old.
    #[error(
        "GGUF version {found} is not read (little-endian 2 and 3 are); convert the file again \
         with a current llama.cpp"
    )]
    Version {
        /// The version.
        found: u32,
    },
    /// The header goes on behind the bytes that were given.
    #[error("the header needs at least the first {at_least} bytes of the file")]
    NeedMore {
        /// Bytes to try next; more may follow.
        at_least: u64,
    },
    /// The file ends too early.
    #[error(
        "{place} goes to byte {end}, but the file ends at {file_len}; copy or download it again"
    )]
    Truncated {
        /// What is cut off.
        place: String,
        /// Where it would end.
        end: u64,
        /// Length of the file.
        file_len: u64,
    },
    /// More than a limit of [`GgufLimits`](super::GgufLimits).
    #[error("{place}: {found} {what}, more than the {max} that are read; the file is damaged")]
    TooLarge {
        /// Where.
        place: String,
        /// What is counted.
        what: &'static str,
        /// The count.
        found: u64,
        /// The limit.
        max: u64,
    },
    /// A name that cannot be one.
    #[error("{place}: {found:?} is no name ({rule}); the file is damaged")]
    BadName {
        /// Where.
        place: String,
        /// The name, cut.
        found: String,
        /// What a name is.
        rule: &'static str,
    },
    /// A string that is not UTF-8.
    #[error("{place} is not UTF-8; the file is damaged")]
    NotText {
        /// Where.
        place: String,
    },
    /// The same name twice.
    #[error("{what} `{name}` occurs twice; the file is damaged, export it again")]
    Duplicate {
        /// `metadata key` or `tensor`.
        what: &'static str,
        /// The name.
        name: String,
    },
    /// A value of a type that does not exist, or an array of arrays.
    #[error("metadata key `{key}` has value type {found}; {why}")]
    ValueType {
        /// The key.
        key: String,
        /// Id of the type.
        found: u32,
        /// Why it is refused.
        why: &'static str,
    },
    /// A value that cannot be used.
    #[error("metadata key `{key}` is {found}; expected {expected}")]
    BadValue {
        /// The key.
        key: String,
        /// Its value, cut.
        found: String,
        /// What is read.
        expected: String,
    },
    /// A key that a Qwen3 model needs.
    #[error("metadata key `{key}` is missing; {remedy}")]
    Missing {
        /// The key.
        key: String,
        /// What to do about it.
        remedy: &'static str,
    },
    /// A model or a feature that Setun does not run.
    #[error("metadata key `{key}` is {found}, which Setun does not run; {remedy}")]
    Unsupported {
        /// The key.
        key: String,
        /// Its value, cut.
        found: String,
        /// What to do about it.
        remedy: &'static str,
    },
    /// A tensor type that is not ternary and not a float.
    #[error(
        "tensor `{name}` has type {id}{known_as}, which Setun does not read (F32, F16, BF16 and \
         the ternary types are read); convert the model from its F16 file"
    )]
    TensorType {
        /// The tensor.
        name: String,
        /// Id of its type.
        id: u32,
        /// Name of the type in brackets, if ggml has one.
        known_as: String,
    },
    /// A tensor that cannot be what it says.
    #[error("tensor `{name}`: {why}; the file is damaged, export it again")]
    BadTensor {
        /// The tensor.
        name: String,
        /// What is wrong.
        why: String,
    },
    /// A payload that does not follow the one before it.
    #[error(
        "tensor `{name}` starts at byte {found} of the data, but the one before it ends at \
         {expected}; the file is damaged, or its tensors are out of order"
    )]
    Misplaced {
        /// The tensor.
        name: String,
        /// Its offset.
        found: u64,
        /// Where it belongs.
        expected: u64,
    },
    /// Bytes between header and payloads that are not zero.
    #[error("the padding in front of the tensors is not zero; the file is damaged")]
    Padding,
    /// Bytes behind the last payload.
    #[error(
        "{found} bytes follow the last tensor; the file is damaged, or holds more than a model"
    )]
    TrailingBytes {
        /// Their number.
        found: u64,
    },
    /// A tensor that the metadata asks for.
    #[error("tensor `{name}` is missing; the file is no whole Qwen3 model, export it again")]
    MissingTensor {
        /// The tensor.
        name: String,
    },
    /// A tensor of another model.
    #[error("tensor `{name}` belongs to no parameter of a Qwen3 model; export it again")]
    ExtraTensor {
        /// The tensor.
        name: String,
    },
    /// The configuration is refused; its keys have Hugging Face's names.
    #[error("the metadata describes no model that Setun runs: {0}")]
    Config(#[from] ConfigError),
    /// The keys `setun.*` are refused.
    #[error(transparent)]
    Ternary(#[from] PackedError),
    /// The tokenizer to be written is refused.
    #[error("the tokenizer cannot be written: {0}")]
    Tokenizer(#[from] TokenizerError),
    /// Something that GGUF cannot say.
    #[error("GGUF cannot hold {what}; {remedy}")]
    Unwritable {
        /// What it is.
        what: String,
        /// What to do about it.
        remedy: &'static str,
    },
}

impl GgufError {
    /// `found` under `key` is not `expected`.
    pub(super) fn bad_value(key: &str, found: &GgufValue, expected: impl Into<String>) -> Self {
        Self::BadValue {
            key: key.to_owned(),
            found: found.to_string(),
            expected: expected.into(),
        }
    }
}
