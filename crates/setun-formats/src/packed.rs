//! The packed file: a ternary model as safetensors, two bits for a weight.
//!
//! For each matrix `NAME` of the configuration there are `NAME.trits`, u8
//! `[out, groups * ceil(group_size / 4)]` (code `t + 1`, low bits first, each group on a
//! byte boundary), and `NAME.scales`, f16 `[out, groups]`. Norms are f32 under their own
//! name. The metadata says how to read and to run them.

use crate::config::{ConfigError, ParameterInfo, Qwen3Config};
use crate::tensors::{self, Dtype, SafeTensors, TensorInfo, TensorsError};
use half::{bf16, f16};
use setun_ternary::{
    Numerics, PackError, PackedMatrix, ScaleRule, groups_per_row, packed_row_bytes,
};
use std::collections::{BTreeMap, BTreeSet};
use thiserror::Error;

/// Value of the metadata key `format`.
pub const FORMAT: &str = "setun-packed";
/// Value of the metadata key `version`: the layout described above.
pub const VERSION: &str = "1";
/// Largest group: up to it the int8 products of a group sum to less than 2^24, so that
/// their sum is exact in f32.
pub const MAX_GROUP_SIZE: usize = 1 << 16;

/// How a ternary model was projected and how its products are computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TernaryInfo {
    /// Weights that share a scale, along the input dimension; 1 to [`MAX_GROUP_SIZE`].
    pub group_size: usize,
    /// How the scales follow from latent weights.
    pub scale_rule: ScaleRule,
    /// Arithmetic of the products.
    pub numerics: Numerics,
}

/// What the metadata of a packed file says.
#[derive(Clone, Debug, PartialEq)]
pub struct PackedHeader {
    /// The model.
    pub config: Qwen3Config,
    /// Its ternary format.
    pub ternary: TernaryInfo,
}

/// Why bytes are not a packed ternary model.
#[derive(Clone, Debug, PartialEq, Error)]
pub enum PackedError {
    /// The container is damaged.
    #[error(transparent)]
    Tensors(#[from] TensorsError),
    /// A metadata key is absent.
    #[error("metadata key `{key}` is missing: not a packed file; export the model as packed")]
    MissingMetadata {
        /// The key.
        key: String,
    },
    /// A metadata value that cannot be used.
    #[error("metadata key `{key}` is {found:?}; expected {expected}")]
    BadMetadata {
        /// The key.
        key: String,
        /// Its value.
        found: String,
        /// What is read.
        expected: String,
    },
    /// The configuration in the metadata is refused.
    #[error("metadata key `config`: {0}")]
    Config(#[from] ConfigError),
    /// A tensor whose type or shape is not that of the configuration.
    #[error("tensor `{name}` is {found}; the configuration asks for {expected}; export it again")]
    WrongTensor {
        /// Name of the tensor.
        name: String,
        /// Its type and shape.
        found: String,
        /// Type and shape that belong there.
        expected: String,
    },
    /// A tensor that the configuration does not know.
    #[error("tensor `{name}` belongs to no parameter of the configuration; export it again")]
    ExtraTensor {
        /// Name of the tensor.
        name: String,
    },
    /// No parameter of this kind has the name.
    #[error("the model has no {kind} `{name}`; names are those of Hugging Face")]
    NoSuchParameter {
        /// `matrix` or `norm`.
        kind: &'static str,
        /// The name that was asked for.
        name: String,
    },
    /// Bytes that are no trits.
    #[error("tensor `{name}.trits`, row {row}: {why}; the file is damaged, export it again")]
    BadTrits {
        /// Name of the matrix.
        name: String,
        /// Row of the matrix.
        row: usize,
        /// What is wrong.
        why: PackError,
    },
    /// A scale that no projection gives.
    #[error(
        "tensor `{name}.scales`, row {row}, group {group}: {found} is not a scale (finite, not \
         negative, exact in bf16); the file is damaged, export it again"
    )]
    BadScale {
        /// Name of the matrix.
        name: String,
        /// Row of the matrix.
        row: usize,
        /// Group in its row.
        group: usize,
        /// The scale.
        found: f32,
    },
    /// A norm weight that is NaN or infinite.
    #[error("tensor `{name}`, element {index}: {found} is not finite; export the model again")]
    BadNorm {
        /// Name of the norm.
        name: String,
        /// Element.
        index: usize,
        /// The weight.
        found: f32,
    },
}

/// The tensors of a packed file in the order in which they are written: parameters in
/// canonical order, trits before scales. `group_size` is at least 1.
pub fn packed_tensor_infos(config: &Qwen3Config, group_size: usize) -> Vec<TensorInfo> {
    tensor_infos(config.parameters(), group_size)
}

/// As [`packed_tensor_infos`], of any parameters.
pub(crate) fn tensor_infos(parameters: Vec<ParameterInfo>, group_size: usize) -> Vec<TensorInfo> {
    let mut infos = Vec::new();
    for parameter in parameters {
        let name = parameter.name;
        let [rows, cols] = parameter.shape[..] else {
            let (dtype, shape) = (Dtype::F32, parameter.shape);
            infos.push(TensorInfo { name, dtype, shape });
            continue;
        };
        infos.push(TensorInfo {
            name: format!("{name}.trits"),
            dtype: Dtype::U8,
            shape: vec![rows, packed_row_bytes(cols, group_size)],
        });
        infos.push(TensorInfo {
            name: format!("{name}.scales"),
            dtype: Dtype::F16,
            shape: vec![rows, groups_per_row(cols, group_size)],
        });
    }
    infos
}

/// The metadata of a packed file.
pub fn packed_metadata(header: &PackedHeader) -> BTreeMap<String, String> {
    let entries = [
        ("format", FORMAT.to_owned()),
        ("version", VERSION.to_owned()),
        ("config", header.config.to_json()),
    ];
    let owned = entries.map(|(key, value)| (key.to_owned(), value));
    let ternary = ternary_entries(&header.ternary, "");
    owned.into_iter().chain(ternary).collect()
}

/// A packed file whose tensors are those of its configuration.
#[derive(Debug)]
pub struct PackedFile<'a> {
    header: PackedHeader,
    tensors: PackedTensors<'a>,
}

impl<'a> PackedFile<'a> {
    /// Opens the bytes of a whole packed file. Checks the metadata and that every tensor
    /// of the configuration is there with its type and shape, and no other; the values
    /// are checked when they are read.
    ///
    /// # Errors
    /// Everything that is not so, by key or tensor.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, PackedError> {
        let header = parse_header(&tensors::metadata(bytes)?)?;
        let parameters = header.config.parameters();
        let tensors = PackedTensors::open(bytes, parameters, header.ternary.group_size)?;
        Ok(Self { header, tensors })
    }

    /// Configuration and ternary format.
    pub fn header(&self) -> &PackedHeader {
        &self.header
    }

    /// See [`PackedTensors::matrix`].
    ///
    /// # Errors
    /// As there.
    pub fn matrix(&self, name: &str) -> Result<PackedMatrix, PackedError> {
        self.tensors.matrix(name)
    }

    /// See [`PackedTensors::norm`].
    ///
    /// # Errors
    /// As there.
    pub fn norm(&self, name: &str) -> Result<Vec<f32>, PackedError> {
        self.tensors.norm(name)
    }
}

/// Trits, scales and norms of a file that holds these parameters and nothing else.
#[derive(Debug)]
pub struct PackedTensors<'a> {
    group_size: usize,
    shapes: BTreeMap<String, Vec<usize>>,
    tensors: SafeTensors<'a>,
}

impl<'a> PackedTensors<'a> {
    /// Opens the bytes of a whole file. Checks that every tensor is there with its type and
    /// shape, and no other; the values are checked when they are read.
    ///
    /// # Errors
    /// Everything that is not so, by tensor.
    pub fn open(
        bytes: &'a [u8],
        parameters: Vec<ParameterInfo>,
        group_size: usize,
    ) -> Result<Self, PackedError> {
        let tensors = tensors::open(bytes)?;
        let expected = tensor_infos(parameters.clone(), group_size);
        for info in &expected {
            check_tensor(&tensors, info)?;
        }
        if tensors.len() != expected.len() {
            let mut names = tensors.names();
            // The reader keeps its names in a hash map.
            names.sort_unstable();
            let known: BTreeSet<&str> = expected.iter().map(|info| info.name.as_str()).collect();
            if let Some(name) = names.into_iter().find(|name| !known.contains(name)) {
                let name = name.to_owned();
                return Err(PackedError::ExtraTensor { name });
            }
        }
        Ok(Self {
            group_size,
            shapes: parameters.into_iter().map(|p| (p.name, p.shape)).collect(),
            tensors,
        })
    }

    /// The matrix called `name`, such as `model.embed_tokens.weight`, with every trit
    /// and scale checked.
    ///
    /// # Errors
    /// A name that is no matrix of the model; code 3 or dirty padding, by row; a scale
    /// that is NaN, infinite, negative or not exact in bf16, by row and group.
    pub fn matrix(&self, name: &str) -> Result<PackedMatrix, PackedError> {
        let Some([rows, cols]) = self.shapes.get(name).map(Vec::as_slice) else {
            let (kind, name) = ("matrix", name.to_owned());
            return Err(PackedError::NoSuchParameter { kind, name });
        };
        let trits = tensors::tensor(&self.tensors, &format!("{name}.trits"))?;
        let scales = tensors::tensor(&self.tensors, &format!("{name}.scales"))?;
        let scales = scales.data().chunks_exact(2);
        let matrix = PackedMatrix {
            rows: *rows,
            cols: *cols,
            group_size: self.group_size,
            trits: trits.data().to_vec(),
            scales: scales
                .map(|b| f16::from_bits(u16::from_le_bytes([b[0], b[1]])))
                .collect(),
        };
        check_trits(name, &matrix)?;
        check_scales(name, &matrix)?;
        Ok(matrix)
    }

    /// The norm called `name`, such as `model.norm.weight`.
    ///
    /// # Errors
    /// A name that is no norm of the model; a weight that is not finite.
    pub fn norm(&self, name: &str) -> Result<Vec<f32>, PackedError> {
        if self.shapes.get(name).is_none_or(|shape| shape.len() != 1) {
            let (kind, name) = ("norm", name.to_owned());
            return Err(PackedError::NoSuchParameter { kind, name });
        }
        let weights = tensors::f32_values(name, &tensors::tensor(&self.tensors, name)?)?;
        if let Some(index) = weights.iter().position(|w| !w.is_finite()) {
            let (name, found) = (name.to_owned(), weights[index]);
            return Err(PackedError::BadNorm { name, index, found });
        }
        Ok(weights)
    }
}

/// Reads the metadata of a packed file; its tensors are checked by the caller.
///
/// # Errors
/// A key that is absent or has a value that cannot be used, by key.
pub fn parse_header(metadata: &BTreeMap<String, String>) -> Result<PackedHeader, PackedError> {
    if value(metadata, "format")? != FORMAT {
        let expected = format!("{FORMAT:?}; export the model as packed");
        return Err(bad_value(metadata, "format", expected));
    }
    if value(metadata, "version")? != VERSION {
        let expected = format!("{VERSION:?}; a newer Setun wrote this file, update Setun");
        return Err(bad_value(metadata, "version", expected));
    }
    let ternary = parse_ternary(metadata, "")?;
    let config = Qwen3Config::parse(value(metadata, "config")?.as_bytes())?;
    Ok(PackedHeader { config, ternary })
}

/// Reads a ternary format from the keys `group_size`, `scale_rule` and `numerics`, each
/// behind `prefix` (`setun.` in files whose metadata others share).
///
/// # Errors
/// A key that is absent or has a value that cannot be used, by key.
pub fn parse_ternary(
    metadata: &BTreeMap<String, String>,
    prefix: &str,
) -> Result<TernaryInfo, PackedError> {
    let key = format!("{prefix}group_size");
    let group_size = value(metadata, &key)?.parse().ok();
    let group_size = group_size.filter(|n| (1..=MAX_GROUP_SIZE).contains(n));
    let group_size = group_size.ok_or_else(|| {
        let expected = format!("a whole number from 1 to {MAX_GROUP_SIZE}");
        bad_value(metadata, &key, expected)
    })?;
    let key = format!("{prefix}scale_rule");
    let scale_rule = ScaleRule::from_name(value(metadata, &key)?);
    let scale_rule = scale_rule.ok_or_else(|| {
        bad_value(
            metadata,
            &key,
            "mean, max, mean-nonzero or least-squares".to_owned(),
        )
    })?;
    let key = format!("{prefix}numerics");
    let numerics = Numerics::from_name(value(metadata, &key)?);
    let numerics =
        numerics.ok_or_else(|| bad_value(metadata, &key, "int8, bf16 or f32".to_owned()))?;
    Ok(TernaryInfo {
        group_size,
        scale_rule,
        numerics,
    })
}

/// The entries that [`parse_ternary`] reads.
pub fn ternary_entries(ternary: &TernaryInfo, prefix: &str) -> [(String, String); 3] {
    [
        ("group_size", ternary.group_size.to_string()),
        ("scale_rule", ternary.scale_rule.name().to_owned()),
        ("numerics", ternary.numerics.name().to_owned()),
    ]
    .map(|(key, value)| (format!("{prefix}{key}"), value))
}

pub(crate) fn value<'a>(
    metadata: &'a BTreeMap<String, String>,
    key: &str,
) -> Result<&'a str, PackedError> {
    let value = metadata.get(key).map(String::as_str);
    value.ok_or_else(|| PackedError::MissingMetadata {
        key: key.to_owned(),
    })
}

pub(crate) fn bad_value(
    metadata: &BTreeMap<String, String>,
    key: &str,
    expected: String,
) -> PackedError {
    PackedError::BadMetadata {
        key: key.to_owned(),
        found: metadata.get(key).cloned().unwrap_or_default(),
        expected,
    }
}

fn check_tensor(tensors: &SafeTensors<'_>, info: &TensorInfo) -> Result<(), PackedError> {
    let tensor = tensors::tensor(tensors, &info.name)?;
    if tensor.dtype() == info.dtype && tensor.shape() == info.shape {
        return Ok(());
    }
    Err(PackedError::WrongTensor {
        name: info.name.clone(),
        found: format!("{} {:?}", tensor.dtype(), tensor.shape()),
        expected: format!("{} {:?}", info.dtype, info.shape),
    })
}

fn check_trits(name: &str, matrix: &PackedMatrix) -> Result<(), PackedError> {
    let group_size = matrix.group_size;
    let padded = !group_size.is_multiple_of(4) || !matrix.cols.is_multiple_of(group_size);
    let mut trits = vec![0i8; matrix.cols];
    for row in 0..matrix.rows {
        // Both bits of a code set is code 3. Without padding that is all there is to
        // check, and it vectorizes; the walk over trits then only finds the column.
        let bytes = matrix.row_bytes(row);
        let codes = bytes
            .iter()
            .fold(0, |seen, byte| seen | (byte & byte >> 1 & 0x55));
        if codes == 0 && !padded {
            continue;
        }
        matrix.unpack_row(row, &mut trits).map_err(|why| {
            let name = name.to_owned();
            PackedError::BadTrits { name, row, why }
        })?;
    }
    Ok(())
}

fn check_scales(name: &str, matrix: &PackedMatrix) -> Result<(), PackedError> {
    // A bf16 that is exact in f16 is at most 65280, so the largest f16 needs no check.
    let is_scale = |scale: &f16| {
        let value = scale.to_f32();
        scale.is_finite() && scale.is_sign_positive() && bf16::from_f32(value).to_f32() == value
    };
    let Some(at) = matrix.scales.iter().position(|scale| !is_scale(scale)) else {
        return Ok(());
    };
    Err(PackedError::BadScale {
        name: name.to_owned(),
        row: at / matrix.groups(),
        group: at % matrix.groups(),
        found: matrix.scales[at].to_f32(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::RopeConfig;

    const EMBED: &str = "model.embed_tokens.weight";

    fn header(group_size: usize) -> PackedHeader {
        let config = Qwen3Config {
            vocab_size: 19,
            hidden_size: 24,
            intermediate_size: 40,
            num_hidden_layers: 2,
            num_attention_heads: 3,
            num_key_value_heads: 1,
            head_dim: 6,
            max_position_embeddings: 32,
            rms_norm_eps: 1e-6,
            tie_word_embeddings: false,
            rope: RopeConfig {
                rope_theta: 1e4,
                yarn: None,
            },
            bos_token_id: None,
            eos_token_ids: vec![18],
        };
        let ternary = TernaryInfo {
            group_size,
            scale_rule: ScaleRule::Mean,
            numerics: Numerics::Int8,
        };
        PackedHeader { config, ternary }
    }

    fn latents(rows: usize, cols: usize) -> Vec<f32> {
        let value = |i: usize| ((i * 37 % 101) as f32 - 50.0) / 50.0;
        (0..rows * cols).map(value).collect()
    }

    fn matrix(shape: &[usize], group_size: usize) -> PackedMatrix {
        let values = latents(shape[0], shape[1]);
        PackedMatrix::from_latents(&values, shape[1], group_size, ScaleRule::Mean).unwrap()
    }

    /// Tensors by name, to be changed before they are written.
    struct Parts {
        infos: Vec<TensorInfo>,
        payloads: Vec<Vec<u8>>,
        metadata: BTreeMap<String, String>,
    }

    impl Parts {
        fn new(header: &PackedHeader) -> Self {
            let group_size = header.ternary.group_size;
            let mut payloads = Vec::new();
            for parameter in header.config.parameters() {
                let mut scales = Vec::new();
                if parameter.is_matrix() {
                    let matrix = matrix(&parameter.shape, group_size);
                    payloads.push(matrix.trits.clone());
                    tensors::write_f16(&mut scales, &matrix.scales).unwrap();
                } else {
                    let weights = latents(1, parameter.numel());
                    tensors::write_f32(&mut scales, &weights).unwrap();
                }
                payloads.push(scales);
            }
            Self {
                infos: packed_tensor_infos(&header.config, group_size),
                payloads,
                metadata: packed_metadata(header),
            }
        }

        fn at(&self, name: &str) -> usize {
            let found = self.infos.iter().position(|info| info.name == name);
            found.unwrap_or_else(|| panic!("no {name}"))
        }

        fn payload(&mut self, name: &str) -> &mut Vec<u8> {
            let at = self.at(name);
            &mut self.payloads[at]
        }

        fn bytes(&self) -> Vec<u8> {
            let mut out = Vec::new();
            tensors::write_header(&mut out, &self.infos, &self.metadata).unwrap();
            out.extend(self.payloads.concat());
            out
        }
    }

    fn error(parts: &Parts) -> PackedError {
        PackedFile::parse(&parts.bytes()).unwrap_err()
    }

    #[test]
    fn round_trips_over_group_sizes() {
        for group_size in [1, 5, 8, 24, 128] {
            let header = header(group_size);
            let bytes = Parts::new(&header).bytes();
            let file = PackedFile::parse(&bytes).unwrap();
            assert_eq!(file.header(), &header);
            for parameter in header.config.parameters() {
                if parameter.is_matrix() {
                    let expected = matrix(&parameter.shape, group_size);
                    assert_eq!(file.matrix(&parameter.name).unwrap(), expected);
                    assert!(file.norm(&parameter.name).is_err());
                } else {
                    let expected = latents(1, parameter.numel());
                    assert_eq!(file.norm(&parameter.name).unwrap(), expected);
                    assert!(file.matrix(&parameter.name).is_err());
                }
            }
            assert!(file.matrix("nothing").is_err());
        }
    }

    #[test]
    fn infos_cover_the_payload() {
        let parts = Parts::new(&header(5));
        for (info, payload) in parts.infos.iter().zip(&parts.payloads) {
            assert_eq!(
                info.num_bytes(),
                Some(payload.len() as u64),
                "{}",
                info.name
            );
        }
        assert_eq!(parts.infos.len(), parts.payloads.len());
    }

    #[test]
    fn every_metadata_key_is_needed_and_checked() {
        let good = Parts::new(&header(8));
        let keys: Vec<String> = good.metadata.keys().cloned().collect();
        assert_eq!(keys.len(), 6);
        for key in keys {
            let mut parts = Parts::new(&header(8));
            parts.metadata.remove(&key);
            let missing = error(&parts);
            assert!(
                matches!(missing, PackedError::MissingMetadata { .. }),
                "{missing}"
            );
            assert!(missing.to_string().contains(&key));
            parts.metadata.insert(key.clone(), "7 sins".to_owned());
            assert!(error(&parts).to_string().contains(&key));
        }
        for group_size in ["0", "65537", "-8", "8.0"] {
            let mut parts = Parts::new(&header(8));
            parts
                .metadata
                .insert("group_size".to_owned(), group_size.to_owned());
            assert!(matches!(error(&parts), PackedError::BadMetadata { .. }));
        }
    }

    #[test]
    fn wrong_tensors_are_named() {
        let trits = format!("{EMBED}.trits");
        let mut parts = Parts::new(&header(8));
        let at = parts.at(&trits);
        parts.infos[at].dtype = Dtype::I8;
        assert!(matches!(error(&parts), PackedError::WrongTensor { name, .. } if name == trits));

        let mut parts = Parts::new(&header(8));
        parts.infos[at].shape.reverse();
        assert!(matches!(error(&parts), PackedError::WrongTensor { name, .. } if name == trits));

        let mut parts = Parts::new(&header(8));
        parts.infos.remove(at);
        parts.payloads.remove(at);
        let missing = TensorsError::Missing { name: trits };
        assert_eq!(error(&parts), PackedError::Tensors(missing));

        let mut parts = Parts::new(&header(8));
        let (name, dtype, shape) = ("extra".to_owned(), Dtype::U8, vec![1]);
        parts.infos.push(TensorInfo {
            name: name.clone(),
            dtype,
            shape,
        });
        parts.payloads.push(vec![0]);
        assert_eq!(error(&parts), PackedError::ExtraTensor { name });
    }

    #[test]
    fn a_group_size_of_another_file_is_refused() {
        let mut parts = Parts::new(&header(8));
        parts
            .metadata
            .insert("group_size".to_owned(), "12".to_owned());
        assert!(matches!(error(&parts), PackedError::WrongTensor { .. }));
    }

    #[test]
    fn code_three_and_dirty_padding_are_located() {
        let row_bytes = packed_row_bytes(24, 8);
        let mut parts = Parts::new(&header(8));
        parts.payload(&format!("{EMBED}.trits"))[7 * row_bytes + 2] |= 0b1100;
        let bytes = parts.bytes();
        let file = PackedFile::parse(&bytes).unwrap();
        let why = PackError::BadCode { column: 9 };
        let (name, row) = (EMBED.to_owned(), 7);
        assert_eq!(
            file.matrix(EMBED),
            Err(PackedError::BadTrits { name, row, why })
        );
        assert!(file.matrix("lm_head.weight").is_ok());

        // Groups of 5 leave three codes unused in their second byte.
        let row_bytes = packed_row_bytes(24, 5);
        let mut parts = Parts::new(&header(5));
        parts.payload(&format!("{EMBED}.trits"))[3 * row_bytes + 1] |= 0b0100;
        let bytes = parts.bytes();
        let why = PackError::BadPadding { group: 0 };
        let (name, row) = (EMBED.to_owned(), 3);
        let result = PackedFile::parse(&bytes).unwrap().matrix(EMBED);
        assert_eq!(result, Err(PackedError::BadTrits { name, row, why }));
    }

    #[test]
    fn bad_scales_are_located() {
        let not_bf16 = f16::from_f32(1.0 + 1.0 / 1024.0);
        for bad in [
            f16::NAN,
            f16::INFINITY,
            f16::from_f32(-1.0),
            f16::NEG_ZERO,
            f16::MAX,
            not_bf16,
        ] {
            let mut parts = Parts::new(&header(8));
            let at = 2 * (4 * 3 + 1);
            let scales = parts.payload(&format!("{EMBED}.scales"));
            scales[at..at + 2].copy_from_slice(&bad.to_le_bytes());
            let bytes = parts.bytes();
            let result = PackedFile::parse(&bytes).unwrap().matrix(EMBED);
            let Err(PackedError::BadScale {
                name, row, group, ..
            }) = result
            else {
                panic!("{bad} was taken for a scale");
            };
            assert_eq!((name.as_str(), row, group), (EMBED, 4, 1));
        }
    }

    #[test]
    fn the_smallest_and_largest_scales_are_fine() {
        for scale in [0.0, setun_ternary::MIN_SCALE, 65_280.0] {
            let mut parts = Parts::new(&header(8));
            let scales = parts.payload(&format!("{EMBED}.scales"));
            scales[..2].copy_from_slice(&f16::from_f32(scale).to_le_bytes());
            let bytes = parts.bytes();
            let matrix = PackedFile::parse(&bytes).unwrap().matrix(EMBED).unwrap();
            assert_eq!(matrix.scales[0].to_f32(), scale);
        }
    }

    #[test]
    fn norms_must_be_finite() {
        let name = "model.layers.1.self_attn.k_norm.weight";
        let mut parts = Parts::new(&header(8));
        parts.payload(name)[8..12].copy_from_slice(&f32::INFINITY.to_le_bytes());
        let bytes = parts.bytes();
        let result = PackedFile::parse(&bytes).unwrap().norm(name);
        assert!(matches!(result, Err(PackedError::BadNorm { index: 2, .. })));
    }

    #[test]
    fn truncated_files_are_refused() {
        let bytes = Parts::new(&header(8)).bytes();
        for length in (0..bytes.len()).step_by(97) {
            let result = PackedFile::parse(&bytes[..length]);
            assert!(
                matches!(result, Err(PackedError::Tensors(_))),
                "length {length}"
            );
        }
    }
}
