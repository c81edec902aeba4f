//! Writing GGUF files, tensor by tensor.

use super::settings::check_tokenizer;
use super::{ExportDtype, ModelFiles, items};
use crate::commit::create_file;
use crate::encode::{Encoder, Encoding, Item};
use crate::{IoError, TensorSource};
use setun_formats::gguf::{GgufType, file_type, metadata_for, tensor_name, write_header};
use setun_ternary::blocks::BlockType;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

/// How the matrices of a GGUF file are stored. Norms are always f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GgufWeights {
    /// Trits in blocks.
    Block(BlockType),
    /// Blocks of 128 under the number that ggml gives to blocks of 64: what PrismML's
    /// first files have and their old loader expects.
    LegacyQ2_0,
    /// 2 bytes a weight.
    F16,
    /// 2 bytes a weight.
    Bf16,
    /// 4 bytes a weight.
    F32,
}

impl GgufWeights {
    fn ggml_type(self) -> GgufType {
        match self {
            Self::Block(block) => GgufType::Block(block),
            Self::LegacyQ2_0 => GgufType::LegacyQ2_0,
            Self::F16 => GgufType::F16,
            Self::Bf16 => GgufType::Bf16,
            Self::F32 => GgufType::F32,
        }
    }

    /// How its matrices are encoded; with `exact`, rounding of floats is an error.
    pub(crate) fn encoding(self, exact: bool) -> Encoding {
        let dtype = match self {
            Self::Block(block) => return Encoding::Blocks(block),
            Self::LegacyQ2_0 => return Encoding::Blocks(BlockType::Pq2_0),
            Self::F16 => ExportDtype::F16,
            Self::Bf16 => ExportDtype::Bf16,
            Self::F32 => ExportDtype::F32,
        };
        Encoding::Values { dtype, exact }
    }
}

/// Writes `path` as a GGUF file that llama.cpp runs as `qwen3`. Returns its path.
///
/// # Errors
/// A file of that name; a tokenizer that the format cannot hold; what the encoder and the
/// operating system return. Nothing stays behind.
pub(crate) fn write_gguf(
    path: &Path,
    model: &ModelFiles<'_>,
    (weights, encoding): (GgufWeights, Encoding),
    source: &dyn TensorSource,
) -> Result<PathBuf, IoError> {
    check_tokenizer(model.config, model.tokenizer_json)?;
    let name = path.file_stem().map(|stem| stem.to_string_lossy());
    let metadata = metadata_for(
        model.config,
        model.ternary,
        model.tokenizer_json,
        model.chat_template,
        file_type(weights.ggml_type()),
        name.as_deref().unwrap_or("model"),
    )
    .map_err(|e| IoError::invalid(path, e.to_string()))?;
    let items = items(model.config, model.ternary, |_| encoding);
    let tensors = items
        .iter()
        .map(|item| gguf_tensor(item, weights))
        .collect::<Result<Vec<_>, _>>()?;
    let mut encoder = Encoder::new(source, model.ternary);
    create_file(path, |out| {
        let layout = write_header(out, &metadata, &tensors)?;
        for (item, padding) in items.iter().zip(&layout.padding) {
            encoder.write(out, item).map_err(io::Error::other)?;
            pad(out, *padding)?;
        }
        Ok(())
    })?;
    Ok(path.to_owned())
}

fn gguf_tensor(
    item: &Item,
    weights: GgufWeights,
) -> Result<(String, Vec<usize>, GgufType), IoError> {
    let parameter = &item.parameter;
    let name = tensor_name(&parameter.name).ok_or_else(|| {
        IoError::Refused(format!("{} has no name in a GGUF file", parameter.name))
    })?;
    let kind = match parameter.is_matrix() {
        true => weights.ggml_type(),
        false => GgufType::F32,
    };
    Ok((name, parameter.shape.clone(), kind))
}

fn pad(out: &mut dyn Write, num_bytes: u64) -> io::Result<()> {
    io::copy(&mut io::repeat(0).take(num_bytes), out).map(drop)
}
