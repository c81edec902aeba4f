//! Writing models for others to load: directories for Hugging Face, compressed-tensors,
//! MLX and Setun itself, committed atomically and holding exactly the weights that were
//! trained.
//!
//! Ternary matrices are never projected again: `s * t` is written as it is, and it is
//! exact in f32, f16 and bf16. A value that its dtype cannot hold is an error that names
//! the place.

mod gguf;
mod settings;

pub use gguf::GgufWeights;
pub(crate) use gguf::write_gguf;

use crate::encode::{Encoder, Encoding, Item};
use crate::layout::{CONFIG, GENERATION, HF_INDEX, HF_SINGLE, KEY_PREFIX, PACKED, TOKENIZER};
use crate::{DirWriter, IoError, TensorSource};
use half::{bf16, f16};
use serde_json::{Value, json};
use settings::{check_tokenizer, generation_config, tokenizer_settings};
use setun_formats::config::{ParameterInfo, Qwen3Config};
use setun_formats::generation_config::GenerationConfig;
use setun_formats::packed::{PackedHeader, TernaryInfo, packed_metadata, ternary_entries};
use setun_formats::tensors::{Dtype, TensorInfo, write_header};
use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// Bytes of weights in a file before the next one begins, as transformers has it.
pub const MAX_SHARD_BYTES: u64 = 5_000_000_000;

/// Dtype of the matrices in a Hugging Face export. Norms are always f32, so that nothing
/// is lost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ExportDtype {
    /// 4 bytes a weight; for dense models that must not be rounded.
    F32,
    /// 2 bytes a weight; the default.
    #[default]
    Bf16,
    /// 2 bytes a weight, largest value 65504.
    F16,
}

impl ExportDtype {
    /// Name as `config.json` spells it.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::Bf16 => "bfloat16",
            Self::F16 => "float16",
        }
    }

    pub(crate) fn dtype(self) -> Dtype {
        match self {
            Self::F32 => Dtype::F32,
            Self::Bf16 => Dtype::BF16,
            Self::F16 => Dtype::F16,
        }
    }

    /// What is read back after `value` was stored; infinite where it does not fit.
    pub(crate) fn rounded(self, value: f32) -> f32 {
        match self {
            Self::F32 => value,
            Self::Bf16 => bf16::from_f32(value).to_f32(),
            Self::F16 => f16::from_f32(value).to_f32(),
        }
    }

    pub(crate) fn append(self, value: f32, bytes: &mut Vec<u8>) {
        match self {
            Self::F32 => bytes.extend(value.to_le_bytes()),
            Self::Bf16 => bytes.extend(bf16::from_f32(value).to_le_bytes()),
            Self::F16 => bytes.extend(f16::from_f32(value).to_le_bytes()),
        }
    }
}

/// Writes `parent/name` as a Hugging Face directory that transformers loads as
/// `Qwen3ForCausalLM`: config, `model.safetensors` (or shards of [`MAX_SHARD_BYTES`] and
/// their index), tokenizer files if there is a tokenizer, generation settings and a
/// manifest. Returns its path.
///
/// With `ternary`, every matrix of `source` must be ternary; the metadata record the
/// number format and the manifest the ternary hash. Without, every matrix must be dense
/// and is rounded to `dtype`.
///
/// # Errors
/// A target that exists; a matrix that is float where it must be ternary, or of another
/// shape; a value that `dtype` cannot hold; a tokenizer with more entries than the
/// vocabulary; what `source` and the operating system return. Nothing stays behind.
pub fn export_huggingface(
    parent: &Path,
    name: &str,
    config: &Qwen3Config,
    ternary: Option<&TernaryInfo>,
    dtype: ExportDtype,
    tokenizer_json: Option<&[u8]>,
    source: &dyn TensorSource,
) -> Result<PathBuf, IoError> {
    let model = ModelFiles {
        config,
        ternary,
        tokenizer_json,
        chat_template: None,
        generation: None,
        max_shard_bytes: MAX_SHARD_BYTES,
    };
    let exact = ternary.is_some();
    let kind = DirectoryKind::HuggingFace { dtype, exact };
    write_directory(parent, name, &model, kind, source)
}

/// Writes `parent/name` with `packed.safetensors`, `config.json`, the tokenizer if there
/// is one, and a manifest. Returns its path.
///
/// # Errors
/// As [`export_huggingface`]; a float matrix cannot be packed.
pub fn export_packed(
    parent: &Path,
    name: &str,
    config: &Qwen3Config,
    ternary: &TernaryInfo,
    tokenizer_json: Option<&[u8]>,
    source: &dyn TensorSource,
) -> Result<PathBuf, IoError> {
    let model = ModelFiles {
        config,
        ternary: Some(ternary),
        tokenizer_json,
        chat_template: None,
        generation: None,
        max_shard_bytes: MAX_SHARD_BYTES,
    };
    write_directory(parent, name, &model, DirectoryKind::Packed, source)
}

/// Writes the packed file (header and payload) to `out` and returns the ternary hash.
///
/// # Errors
/// As [`export_packed`], and what `out` returns.
pub fn write_packed(
    out: &mut dyn Write,
    header: &PackedHeader,
    source: &dyn TensorSource,
) -> Result<String, IoError> {
    let (parameters, metadata) = (header.config.parameters(), packed_metadata(header));
    write_parameters(out, (parameters, &header.ternary), &metadata, source)
        .map_err(|e| IoError::file("write", Path::new(PACKED), e))
}

/// Trits, scales and norms of `parameters`, with `metadata`; returns their ternary hash.
pub(crate) fn write_parameters(
    out: &mut dyn Write,
    (parameters, ternary): (Vec<ParameterInfo>, &TernaryInfo),
    metadata: &BTreeMap<String, String>,
    source: &dyn TensorSource,
) -> io::Result<String> {
    let item = |parameter| Item::new(parameter, Encoding::Packed, Some(ternary));
    let items: Vec<Item> = parameters.into_iter().map(item).collect();
    let mut encoder = Encoder::new(source, Some(ternary));
    write_tensors(out, &items, metadata, &mut encoder)?;
    Ok(encoder.finish())
}

/// A model that is about to be written, but for its weights.
pub(crate) struct ModelFiles<'a> {
    pub(crate) config: &'a Qwen3Config,
    pub(crate) ternary: Option<&'a TernaryInfo>,
    pub(crate) tokenizer_json: Option<&'a [u8]>,
    pub(crate) chat_template: Option<&'a str>,
    pub(crate) generation: Option<&'a GenerationConfig>,
    /// Bytes of weights in a file of a Hugging Face directory before the next one begins.
    pub(crate) max_shard_bytes: u64,
}

/// Which kind of directory.
#[derive(Clone, Copy, Debug)]
pub(crate) enum DirectoryKind {
    /// One number for each weight; with `exact`, rounding is an error.
    HuggingFace { dtype: ExportDtype, exact: bool },
    /// Words of 2-bit codes for the compressed-tensors library, groups of this size.
    CompressedTensors { group_size: usize },
    /// Words of 2-bit codes for MLX, groups of this size.
    Mlx { group_size: usize },
    /// Setun's own file.
    Packed,
}

impl DirectoryKind {
    fn name(self) -> &'static str {
        match self {
            Self::HuggingFace { .. } => "huggingface",
            Self::CompressedTensors { .. } => "compressed-tensors",
            Self::Mlx { .. } => "mlx",
            Self::Packed => "packed",
        }
    }

    fn encoding(self, config: &Qwen3Config, name: &str) -> Encoding {
        match self {
            Self::HuggingFace { dtype, exact } => Encoding::Values { dtype, exact },
            // The library replaces `weight` by packed tensors; a head that is tied to the
            // embedding's `weight` would have nothing left to be tied to.
            Self::CompressedTensors { .. }
                if config.tie_word_embeddings && name == "model.embed_tokens.weight" =>
            {
                Encoding::Values {
                    dtype: ExportDtype::Bf16,
                    exact: true,
                }
            }
            Self::CompressedTensors { group_size } => Encoding::Compressed { group_size },
            Self::Mlx { group_size } => Encoding::Mlx { group_size },
            Self::Packed => Encoding::Packed,
        }
    }

    /// `config.json` as the readers of this kind expect it.
    fn config_json(self, config: &Qwen3Config) -> Result<String, IoError> {
        let quantization = match self {
            Self::HuggingFace { dtype, .. } => return Ok(config.to_json_as(dtype.name())),
            Self::Packed => return Ok(config.to_json()),
            Self::Mlx { group_size } => json!({ "bits": 2, "group_size": group_size }),
            Self::CompressedTensors { group_size } => {
                compressed_settings(group_size, config.tie_word_embeddings)
            }
        };
        let not_json = |e: serde_json::Error| IoError::invalid(Path::new(CONFIG), e.to_string());
        let dtype = ExportDtype::F16.name();
        let text = config.to_json_as(dtype);
        let mut keys: BTreeMap<String, Value> = serde_json::from_str(&text).map_err(not_json)?;
        keys.insert("quantization_config".to_owned(), quantization.clone());
        if matches!(self, Self::Mlx { .. }) {
            keys.insert("quantization".to_owned(), quantization);
        }
        serde_json::to_string_pretty(&keys).map_err(not_json)
    }
}

/// `quantization_config` of compressed-tensors; keys in alphabetical order.
fn compressed_settings(group_size: usize, tied: bool) -> Value {
    let ignore: &[&str] = if tied { &["lm_head"] } else { &[] };
    let targets: &[&str] = if tied {
        &["Linear"]
    } else {
        &["Embedding", "Linear"]
    };
    json!({
        "config_groups": {
            "group_0": {
                "input_activations": null,
                "output_activations": null,
                "targets": targets,
                "weights": {
                    "actorder": null,
                    "block_structure": null,
                    "dynamic": false,
                    "group_size": group_size,
                    "num_bits": 2,
                    "observer_kwargs": {},
                    "strategy": "group",
                    "symmetric": true,
                    "type": "int",
                },
            },
        },
        "format": "pack-quantized",
        "global_compression_ratio": null,
        "ignore": ignore,
        "kv_cache_scheme": null,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    })
}

/// Writes `parent/name` as a directory of this kind. Returns its path.
///
/// # Errors
/// As [`export_huggingface`].
pub(crate) fn write_directory(
    parent: &Path,
    name: &str,
    model: &ModelFiles<'_>,
    kind: DirectoryKind,
    source: &dyn TensorSource,
) -> Result<PathBuf, IoError> {
    let (config, ternary) = (model.config, model.ternary);
    let end_of_text = check_tokenizer(config, model.tokenizer_json)?;
    let items = items(config, ternary, |name| kind.encoding(config, name));
    let mut dir = DirWriter::create(parent, name)?;
    let mut encoder = Encoder::new(source, ternary);
    if let (DirectoryKind::Packed, Some(ternary)) = (kind, ternary) {
        let (config, ternary) = (config.clone(), *ternary);
        let metadata = packed_metadata(&PackedHeader { config, ternary });
        dir.file(PACKED, |out| {
            write_tensors(out, &items, &metadata, &mut encoder)
        })?;
    } else {
        let metadata = values_metadata(kind, ternary);
        write_shards(
            &mut dir,
            &items,
            &metadata,
            model.max_shard_bytes,
            &mut encoder,
        )?;
    }
    write_text(&mut dir, CONFIG, &kind.config_json(config)?)?;
    let is_packed = matches!(kind, DirectoryKind::Packed);
    if !is_packed || model.generation.is_some() {
        let generation = generation_config(model.generation, config, end_of_text);
        write_text(&mut dir, GENERATION, &generation.to_json())?;
    }
    if let Some(json) = model.tokenizer_json {
        dir.file(TOKENIZER, |out| out.write_all(json))?;
        if !is_packed || model.chat_template.is_some() {
            let settings = tokenizer_settings(config, json, end_of_text, model.chat_template)?;
            write_json(&mut dir, "tokenizer_config.json", &settings)?;
        }
    }
    let hash = encoder.finish();
    dir.commit(manifest_extra(kind.name(), ternary.map(|t| (t, hash))))
}

/// All parameters, the matrices stored as `encoding` says for their name.
pub(crate) fn items(
    config: &Qwen3Config,
    ternary: Option<&TernaryInfo>,
    encoding: impl Fn(&str) -> Encoding,
) -> Vec<Item> {
    let parameters = config.parameters().into_iter();
    let item = |parameter: ParameterInfo| {
        let encoding = encoding(&parameter.name);
        Item::new(parameter, encoding, ternary)
    };
    parameters.map(item).collect()
}

/// Header and payload of one safetensors file.
fn write_tensors(
    out: &mut dyn Write,
    items: &[Item],
    metadata: &BTreeMap<String, String>,
    encoder: &mut Encoder<'_>,
) -> io::Result<()> {
    let tensors = items.iter().flat_map(|item| &item.tensors);
    let tensors: Vec<TensorInfo> = tensors.cloned().collect();
    write_header(out, &tensors, metadata)?;
    for item in items {
        encoder.write(out, item).map_err(io::Error::other)?;
    }
    Ok(())
}

/// `model.safetensors`, or shards and the index that names the shard of each tensor.
fn write_shards(
    dir: &mut DirWriter,
    items: &[Item],
    metadata: &BTreeMap<String, String>,
    max_shard_bytes: u64,
    encoder: &mut Encoder<'_>,
) -> Result<(), IoError> {
    let shards = shards(items, max_shard_bytes);
    if let [all] = shards.as_slice() {
        return dir.file(HF_SINGLE, |out| write_tensors(out, all, metadata, encoder));
    }
    let mut weight_map = BTreeMap::new();
    for (i, shard) in shards.iter().enumerate() {
        let file = format!("model-{:05}-of-{:05}.safetensors", i + 1, shards.len());
        for tensor in shard.iter().flat_map(|item| &item.tensors) {
            weight_map.insert(tensor.name.clone(), file.clone());
        }
        dir.file(&file, |out| write_tensors(out, shard, metadata, encoder))?;
    }
    let total_size: u64 = items.iter().map(Item::num_bytes).sum();
    let index = BTreeMap::from([
        ("metadata", json!({ "total_size": total_size })),
        ("weight_map", json!(weight_map)),
    ]);
    write_json(dir, HF_INDEX, &index)
}

/// Runs of items of at most `max_shard_bytes`; a parameter is never cut.
fn shards(items: &[Item], max_shard_bytes: u64) -> Vec<&[Item]> {
    let mut shards = Vec::new();
    let (mut start, mut bytes) = (0, 0u64);
    for (i, item) in items.iter().enumerate() {
        let size = item.num_bytes();
        if i > start && bytes.saturating_add(size) > max_shard_bytes {
            shards.push(&items[start..i]);
            (start, bytes) = (i, 0);
        }
        bytes = bytes.saturating_add(size);
    }
    shards.push(&items[start..]);
    shards
}

fn values_metadata(kind: DirectoryKind, ternary: Option<&TernaryInfo>) -> BTreeMap<String, String> {
    let format = match kind {
        DirectoryKind::Mlx { .. } => "mlx",
        _ => "pt",
    };
    let mut metadata = BTreeMap::from([("format".to_owned(), format.to_owned())]);
    metadata.extend(
        ternary
            .map(|ternary| ternary_entries(ternary, KEY_PREFIX))
            .into_iter()
            .flatten(),
    );
    metadata
}

fn manifest_extra(kind: &str, ternary: Option<(&TernaryInfo, String)>) -> Value {
    match ternary {
        None => json!({ "kind": kind }),
        Some((ternary, hash)) => json!({
            "kind": kind,
            "ternary_hash": hash,
            "group_size": ternary.group_size,
            "scale_rule": ternary.scale_rule.name(),
            "numerics": ternary.numerics.name(),
        }),
    }
}

fn write_json(
    dir: &mut DirWriter,
    name: &str,
    settings: &BTreeMap<&'static str, Value>,
) -> Result<(), IoError> {
    dir.file(name, |out| {
        serde_json::to_writer_pretty(&mut *out, settings)?;
        writeln!(out)
    })
}

fn write_text(dir: &mut DirWriter, name: &str, text: &str) -> Result<(), IoError> {
    dir.file(name, |out| writeln!(out, "{}", text.trim_end()))
}

#[cfg(test)]
mod tests;
