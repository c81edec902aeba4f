//! GGUF, the file of llama.cpp: metadata, tensor list, then one aligned payload after the
//! other.
//!
//! [`GgufHeader::parse`] reads the start of a file, [`write_header`] writes it, and the
//! functions beside them say what a Qwen3 model puts into it: [`qwen3_config`] and
//! [`metadata_for`], [`tensor_name`] and [`hf_name`], [`tokenizer_from_metadata`].
//! Payloads are not touched here; the codecs of ternary ones are
//! [`setun_ternary::blocks`].
//!
//! Sources: `docs/gguf.md` of ggml for the container, llama.cpp's loader for the keys.

mod config;
mod error;
mod layout;
mod names;
mod parse;
mod tokenizer;
mod value;
mod write;

pub use config::{metadata_for, qwen3_config, ternary_info};
pub use error::GgufError;
pub use names::{hf_name, tensor_name};
pub use tokenizer::tokenizer_from_metadata;
pub use value::{GgufArray, GgufNumbers, GgufScalar, GgufValue};
pub use write::{GgufLayout, write_header};

use setun_ternary::blocks::BlockType;
use std::collections::BTreeMap;

/// First bytes of every GGUF file.
const MAGIC: [u8; 4] = *b"GGUF";
/// Version that is written. Version 2 has the same layout and is read too.
const VERSION: u32 = 3;
/// Key of the alignment of payloads.
const ALIGNMENT_KEY: &str = "general.alignment";
/// Alignment where the metadata has none.
const DEFAULT_ALIGNMENT: u32 = 32;
/// Id of `Q2_0`: ggml's blocks of 64 weights, and the 128 of PrismML's older files.
const Q2_0_ID: u32 = 42;

/// Type of a tensor's elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GgufType {
    /// Four bytes each.
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of an f32.
    Bf16,
    /// Blocks of trits.
    Block(BlockType),
    /// Blocks of [`BlockType::Pq2_0`] under the id and the name of `Q2_0`, as in
    /// PrismML's older files. Told apart by the length of the payloads.
    LegacyQ2_0,
}

impl GgufType {
    /// All of them.
    pub const ALL: [Self; 9] = [
        Self::F32,
        Self::F16,
        Self::Bf16,
        Self::Block(BlockType::Q2_0),
        Self::Block(BlockType::Pq2_0),
        Self::Block(BlockType::Ptq1_0),
        Self::Block(BlockType::Tq1_0),
        Self::Block(BlockType::Tq2_0),
        Self::LegacyQ2_0,
    ];

    /// Id in the tensor list (`ggml_type`).
    pub fn id(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Bf16 => 30,
            Self::Block(BlockType::Tq1_0) => 34,
            Self::Block(BlockType::Tq2_0) => 35,
            Self::Block(BlockType::Q2_0) | Self::LegacyQ2_0 => Q2_0_ID,
            Self::Block(BlockType::Pq2_0) => 142,
            Self::Block(BlockType::Ptq1_0) => 143,
        }
    }

    /// The type with this id; `Q2_0` for that of the legacy one.
    pub fn from_id(id: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|ggml_type| ggml_type.id() == id)
    }

    /// Name as ggml writes it.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
            Self::Block(block) => block.name(),
            Self::LegacyQ2_0 => "legacy Q2_0",
        }
    }

    /// The blocks of a ternary type.
    pub fn block(self) -> Option<BlockType> {
        match self {
            Self::F32 | Self::F16 | Self::Bf16 => None,
            Self::Block(block) => Some(block),
            Self::LegacyQ2_0 => Some(BlockType::Pq2_0),
        }
    }

    /// Bytes of a tensor of this shape, slowest dimension first; `None` if they overflow
    /// or blocks do not divide its rows.
    pub fn num_bytes(self, shape: &[usize]) -> Option<u64> {
        let (&cols, outer) = shape.split_last()?;
        let row = match self {
            Self::F32 => cols.checked_mul(4)?,
            Self::F16 | Self::Bf16 => cols.checked_mul(2)?,
            Self::Block(_) | Self::LegacyQ2_0 => self.block()?.row_bytes(cols)?,
        };
        let mut bytes = row as u64;
        for &n in outer {
            bytes = bytes.checked_mul(n as u64)?;
        }
        Some(bytes)
    }
}

/// Value of `general.file_type` for a file whose matrices have this type
/// (`llama_ftype`; the two fork types as in the files that PrismML ships).
pub fn file_type(ggml_type: GgufType) -> u32 {
    match ggml_type {
        GgufType::F32 => 0,
        GgufType::F16 => 1,
        GgufType::Bf16 => 32,
        GgufType::Block(BlockType::Tq1_0) => 36,
        GgufType::Block(BlockType::Tq2_0) => 37,
        GgufType::Block(BlockType::Q2_0) | GgufType::LegacyQ2_0 => 41,
        GgufType::Block(BlockType::Pq2_0) => 141,
        GgufType::Block(BlockType::Ptq1_0) => 143,
    }
}

/// Name, place and shape of one tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GgufTensorInfo {
    /// Name in the file, such as `blk.0.attn_q.weight`.
    pub name: String,
    /// Dimensions, slowest first: `[out, in]` of a matrix. The file has them reversed.
    pub shape: Vec<usize>,
    /// Type of the elements.
    pub ggml_type: GgufType,
    /// First byte of the payload, from the start of the file.
    pub offset: u64,
    /// Length of the payload without padding.
    pub num_bytes: u64,
}

/// What a reader accepts at most; everything else is refused before it is allocated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GgufLimits {
    /// Bytes in front of the first payload.
    pub max_header_bytes: u64,
    /// Metadata entries.
    pub max_metadata_entries: u64,
    /// Tensors.
    pub max_tensors: u64,
    /// Bytes of a metadata key.
    pub max_key_bytes: u64,
    /// Bytes of a tensor's name; ggml holds 63.
    pub max_tensor_name_bytes: u64,
    /// Bytes of a string, such as a chat template.
    pub max_string_bytes: u64,
    /// Elements of an array.
    pub max_array_len: u64,
    /// Alignment of the payloads, a power of two from 8.
    pub max_alignment: u32,
}

impl Default for GgufLimits {
    /// Well above what the largest published Qwen3 files have: a header of 6 MB, most of
    /// it a vocabulary.
    fn default() -> Self {
        Self {
            max_header_bytes: 64 << 20,
            max_metadata_entries: 4096,
            max_tensors: 1 << 16,
            max_key_bytes: 256,
            max_tensor_name_bytes: 63,
            max_string_bytes: 1 << 20,
            max_array_len: 1 << 21,
            max_alignment: 4096,
        }
    }
}

/// Everything in front of the payloads.
#[derive(Clone, Debug, PartialEq)]
pub struct GgufHeader {
    /// Metadata by key.
    pub metadata: BTreeMap<String, GgufValue>,
    /// Tensors in the order of their payloads.
    pub tensors: Vec<GgufTensorInfo>,
    /// Where the payloads start.
    pub data_offset: u64,
}

impl GgufHeader {
    /// The tensor called `name`.
    pub fn tensor(&self, name: &str) -> Option<&GgufTensorInfo> {
        self.tensors.iter().find(|tensor| tensor.name == name)
    }

    /// The string under `key`; `None` if there is none.
    ///
    /// # Errors
    /// A value of another type.
    pub fn text(&self, key: &str) -> Result<Option<&str>, GgufError> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(GgufValue::String(text)) => Ok(Some(text)),
            Some(other) => Err(GgufError::bad_value(key, other, "a string")),
        }
    }
}

#[cfg(test)]
mod tests;
