//! The file of a block drafter: safetensors, two bits for a weight.
//!
//! Tensors are stored as in a [packed file](crate::packed), for the parameters of
//! [`DrafterHeader::parameters`]. The metadata has the configuration of the layers (a
//! vocabulary of one, the mask), the ternary format, and the settings of `DFlash` under its
//! names.

use crate::config::{ParameterInfo, Qwen3Config};
use crate::packed::{
    PackedError, PackedTensors, TernaryInfo, bad_value, parse_ternary, ternary_entries, value,
};
use crate::tensors;
use std::collections::BTreeMap;

/// Value of the metadata key `format`.
pub const FORMAT: &str = "setun-drafter";
/// Value of the metadata key `version`.
pub const VERSION: &str = "1";
/// Most rows of a block.
pub const MAX_BLOCK_SIZE: usize = 64;

/// What the metadata of a drafter's file says.
#[derive(Clone, Debug, PartialEq)]
pub struct DrafterHeader {
    /// Its layers; widths are the target's, and `vocab_size` is 1.
    pub config: Qwen3Config,
    /// Its ternary format.
    pub ternary: TernaryInfo,
    /// Rows of a block: the anchor and the guesses.
    pub block_size: usize,
    /// Layers of the target, counted from 0, behind which hidden states are read.
    pub target_layer_ids: Vec<usize>,
}

impl DrafterHeader {
    /// Every parameter in canonical order.
    pub fn parameters(&self) -> Vec<ParameterInfo> {
        drafter_parameters(&self.config, self.target_layer_ids.len())
    }

    /// The metadata of the file.
    pub fn metadata(&self) -> BTreeMap<String, String> {
        let ids: Vec<String> = self.target_layer_ids.iter().map(usize::to_string).collect();
        let entries = [
            ("format", FORMAT.to_owned()),
            ("version", VERSION.to_owned()),
            ("config", self.config.to_json()),
            ("block_size", self.block_size.to_string()),
            ("target_layer_ids", ids.join(",")),
        ];
        let owned = entries.map(|(key, value)| (key.to_owned(), value));
        let ternary = ternary_entries(&self.ternary, "");
        owned.into_iter().chain(ternary).collect()
    }

    /// Reads the metadata of a file.
    ///
    /// # Errors
    /// A key that is absent or has a value that cannot be used, by key.
    pub fn parse(metadata: &BTreeMap<String, String>) -> Result<Self, PackedError> {
        if value(metadata, "format")? != FORMAT {
            let expected = format!("{FORMAT:?}; train a drafter with setun train --drafter-for");
            return Err(bad_value(metadata, "format", expected));
        }
        if value(metadata, "version")? != VERSION {
            let expected = format!("{VERSION:?}; a newer Setun wrote this file, update Setun");
            return Err(bad_value(metadata, "version", expected));
        }
        let config = Qwen3Config::parse(value(metadata, "config")?.as_bytes())?;
        if config.vocab_size != 1 || !config.tie_word_embeddings {
            let expected = "a configuration with a vocab_size of 1 and a tied head".to_owned();
            return Err(bad_value(metadata, "config", expected));
        }
        let block_size = value(metadata, "block_size")?.parse().ok();
        let block_size = block_size.filter(|n| (2..=MAX_BLOCK_SIZE).contains(n));
        let block_size = block_size.ok_or_else(|| {
            let expected = format!("a whole number from 2 to {MAX_BLOCK_SIZE}");
            bad_value(metadata, "block_size", expected)
        })?;
        let ids = value(metadata, "target_layer_ids")?.split(',');
        let ids: Result<Vec<usize>, _> = ids.map(str::parse).collect();
        let ids = ids.ok().filter(|ids| {
            let bound = crate::config::MAX_HIDDEN_LAYERS;
            ids.is_sorted_by(|a, b| a < b) && ids.iter().all(|&id| id < bound)
        });
        let target_layer_ids = ids.ok_or_else(|| {
            let expected = "ascending layer numbers with commas between them".to_owned();
            bad_value(metadata, "target_layer_ids", expected)
        })?;
        Ok(Self {
            config,
            ternary: parse_ternary(metadata, "")?,
            block_size,
            target_layer_ids,
        })
    }
}

/// Parameters of a drafter whose layers are those of `config`, reading from `num_taps` of
/// the target's layers: those of the layers, then what makes the context.
pub fn drafter_parameters(config: &Qwen3Config, num_taps: usize) -> Vec<ParameterInfo> {
    let d = config.hidden_size;
    let mut parameters = config.parameters();
    parameters.extend((0..num_taps).map(|i| ParameterInfo {
        name: format!("fc.{i}.weight"),
        shape: vec![d, d],
    }));
    parameters.push(ParameterInfo {
        name: "hidden_norm.weight".to_owned(),
        shape: vec![d],
    });
    parameters
}

/// A drafter's file.
#[derive(Debug)]
pub struct DrafterFile<'a> {
    /// Its metadata.
    pub header: DrafterHeader,
    /// Its weights.
    pub tensors: PackedTensors<'a>,
}

impl<'a> DrafterFile<'a> {
    /// Opens the bytes of a whole file. Checks the metadata and that every tensor is there
    /// with its type and shape, and no other; values are checked when they are read.
    ///
    /// # Errors
    /// Everything that is not so, by key or tensor.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, PackedError> {
        let header = DrafterHeader::parse(&tensors::metadata(bytes)?)?;
        let parameters = header.parameters();
        let tensors = PackedTensors::open(bytes, parameters, header.ternary.group_size)?;
        Ok(Self { header, tensors })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::RopeConfig;
    use setun_ternary::{Numerics, ScaleRule};

    fn header() -> DrafterHeader {
        DrafterHeader {
            config: Qwen3Config {
                vocab_size: 1,
                hidden_size: 24,
                intermediate_size: 40,
                num_hidden_layers: 2,
                num_attention_heads: 3,
                num_key_value_heads: 1,
                head_dim: 6,
                max_position_embeddings: 32,
                rms_norm_eps: 1e-6,
                tie_word_embeddings: true,
                rope: RopeConfig {
                    rope_theta: 1e4,
                    yarn: None,
                },
                bos_token_id: None,
                eos_token_ids: Vec::new(),
            },
            ternary: TernaryInfo {
                group_size: 8,
                scale_rule: ScaleRule::Mean,
                numerics: Numerics::Int8,
            },
            block_size: 5,
            target_layer_ids: vec![0, 3, 7],
        }
    }

    #[test]
    fn metadata_comes_back() {
        assert_eq!(DrafterHeader::parse(&header().metadata()), Ok(header()));
        let names: Vec<String> = header().parameters().into_iter().map(|p| p.name).collect();
        assert_eq!(names.len(), 1 + 2 * 11 + 1 + 3 + 1);
        assert_eq!(names.last().map(String::as_str), Some("hidden_norm.weight"));
    }

    #[test]
    fn bad_metadata_is_named() {
        let cases = [
            ("format", "setun-packed"),
            ("version", "2"),
            ("block_size", "1"),
            ("block_size", "65"),
            ("target_layer_ids", "3,1"),
            ("target_layer_ids", ""),
            ("target_layer_ids", "1,x"),
            ("numerics", "int4"),
        ];
        for (key, bad) in cases {
            let mut metadata = header().metadata();
            metadata.insert(key.to_owned(), bad.to_owned());
            let error = DrafterHeader::parse(&metadata).unwrap_err().to_string();
            assert!(error.contains(key), "{key} = {bad:?}: {error}");
            metadata.remove(key);
            let error = DrafterHeader::parse(&metadata).unwrap_err().to_string();
            assert!(error.contains(key), "no {key}: {error}");
        }
    }
}
