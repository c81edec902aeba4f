//! safetensors: reading with the `safetensors` crate, writing as a stream.
//!
//! The crate's reader checks every offset, but names no tensor for most of what it
//! refuses and lets repeated names pass; [`check_header`] comes first. Its writer wants
//! all tensors in memory at once, so [`write_header`] writes the header from a list and
//! the payloads follow one by one.

mod header;

pub use header::check_header;

pub use safetensors::tensor::TensorView;
pub use safetensors::{Dtype, SafeTensors};

use half::{bf16, f16};
use safetensors::SafeTensorError;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Write};
use thiserror::Error;

/// Longest header that is read or written, in bytes. The largest published Qwen3 needs
/// about 50 kB.
pub const MAX_HEADER_BYTES: usize = 16 << 20;

/// Key of the header under which metadata stands; no tensor may have this name.
const METADATA_KEY: &str = "__metadata__";

/// Why bytes are not the expected safetensors file.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum TensorsError {
    /// Not a safetensors file, or a damaged one.
    #[error("not a whole safetensors file: {reason}; copy, download or export it again")]
    Damaged {
        /// What is wrong with it.
        reason: String,
    },
    /// A tensor is absent.
    #[error("tensor `{name}` is missing; the file is not of the model that it should be")]
    Missing {
        /// Name of the tensor.
        name: String,
    },
    /// A tensor whose element type cannot be converted to f32.
    #[error("tensor `{name}` has type {found}; convert it to F32, F16 or BF16")]
    NotFloat {
        /// Name of the tensor.
        name: String,
        /// Its type.
        found: Dtype,
    },
}

/// Opens the bytes of a whole safetensors file; nothing is copied.
///
/// # Errors
/// [`TensorsError::Damaged`]: a header that is no header or longer than
/// [`MAX_HEADER_BYTES`], and all that [`check_header`] refuses.
pub fn open(bytes: &[u8]) -> Result<SafeTensors<'_>, TensorsError> {
    let (header, payload) = split_header(bytes)?;
    check_header(header, payload.len() as u64)?;
    SafeTensors::deserialize(bytes).map_err(|error| damaged(&error))
}

/// The string metadata of a safetensors file; empty where it has none.
///
/// # Errors
/// As [`open`].
pub fn metadata(bytes: &[u8]) -> Result<BTreeMap<String, String>, TensorsError> {
    let (header, payload) = split_header(bytes)?;
    check_header(header, payload.len() as u64)?;
    let (_, header) = SafeTensors::read_metadata(bytes).map_err(|error| damaged(&error))?;
    let metadata = header.metadata().clone().unwrap_or_default();
    Ok(metadata.into_iter().collect())
}

/// The tensor called `name`.
///
/// # Errors
/// [`TensorsError::Missing`].
pub fn tensor<'a>(tensors: &SafeTensors<'a>, name: &str) -> Result<TensorView<'a>, TensorsError> {
    let missing = |_| TensorsError::Missing {
        name: name.to_owned(),
    };
    tensors.tensor(name).map_err(missing)
}

/// The values of an F32, F16 or BF16 tensor as f32, which holds all three exactly.
///
/// # Errors
/// [`TensorsError::NotFloat`] for other types; `name` is for the message.
pub fn f32_values(name: &str, tensor: &TensorView<'_>) -> Result<Vec<f32>, TensorsError> {
    let data = tensor.data();
    let pairs = || {
        data.chunks_exact(2)
            .map(|b| u16::from_le_bytes([b[0], b[1]]))
    };
    match tensor.dtype() {
        Dtype::F32 => Ok(data
            .chunks_exact(4)
            .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
            .collect()),
        Dtype::F16 => Ok(pairs().map(|bits| f16::from_bits(bits).to_f32()).collect()),
        Dtype::BF16 => Ok(pairs().map(|bits| bf16::from_bits(bits).to_f32()).collect()),
        found => Err(TensorsError::NotFloat {
            name: name.to_owned(),
            found,
        }),
    }
}

/// Name, element type and shape of a tensor that is about to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Name in the header.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Dimensions, slowest first; empty for a scalar.
    pub shape: Vec<usize>,
}

impl TensorInfo {
    /// Length of the payload in bytes; `None` if it overflows or is not whole.
    pub fn num_bytes(&self) -> Option<u64> {
        let mut bits = self.dtype.bitsize() as u64;
        for &n in &self.shape {
            bits = bits.checked_mul(u64::try_from(n).ok()?)?;
        }
        bits.is_multiple_of(8).then_some(bits / 8)
    }
}

/// Writes the header of a safetensors file: tensors in list order, without gaps. The
/// payload of each tensor must follow in the same order, little-endian. The header is
/// padded with spaces to a multiple of 8 bytes.
///
/// The same arguments give the same bytes.
///
/// # Errors
/// A name that occurs twice or is reserved, sizes that overflow, a header of more than
/// [`MAX_HEADER_BYTES`] (all [`io::ErrorKind::InvalidInput`], with nothing written), and
/// what `out` refuses.
pub fn write_header(
    out: &mut dyn Write,
    tensors: &[TensorInfo],
    metadata: &BTreeMap<String, String>,
) -> io::Result<()> {
    let mut header = header_json(tensors, metadata)?.into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    if header.len() > MAX_HEADER_BYTES {
        let found = header.len();
        let why = format!("a safetensors header of {found} bytes is over {MAX_HEADER_BYTES}");
        return Err(invalid(why));
    }
    out.write_all(&(header.len() as u64).to_le_bytes())?;
    out.write_all(&header)
}

/// Writes values as the payload of an F32 tensor.
///
/// # Errors
/// What `out` refuses.
pub fn write_f32(out: &mut dyn Write, values: &[f32]) -> io::Result<()> {
    let mut words = [0u32; 1024];
    for values in values.chunks(words.len()) {
        let words = &mut words[..values.len()];
        for (word, value) in words.iter_mut().zip(values) {
            *word = value.to_bits().to_le();
        }
        out.write_all(bytemuck::cast_slice(words))?;
    }
    Ok(())
}

/// Writes values as the payload of an F16 tensor.
///
/// # Errors
/// What `out` refuses.
pub fn write_f16(out: &mut dyn Write, values: &[f16]) -> io::Result<()> {
    write_halves(out, values, |value| value.to_bits())
}

/// Writes values as the payload of a BF16 tensor.
///
/// # Errors
/// What `out` refuses.
pub fn write_bf16(out: &mut dyn Write, values: &[bf16]) -> io::Result<()> {
    write_halves(out, values, |value| value.to_bits())
}

fn write_halves<T: Copy>(
    out: &mut dyn Write,
    values: &[T],
    bits: impl Fn(T) -> u16,
) -> io::Result<()> {
    let mut words = [0u16; 2048];
    for values in values.chunks(words.len()) {
        let words = &mut words[..values.len()];
        for (word, &value) in words.iter_mut().zip(values) {
            *word = bits(value).to_le();
        }
        out.write_all(bytemuck::cast_slice(words))?;
    }
    Ok(())
}

fn header_json(tensors: &[TensorInfo], metadata: &BTreeMap<String, String>) -> io::Result<String> {
    let mut entries = Vec::with_capacity(1 + tensors.len());
    if !metadata.is_empty() {
        let metadata = serde_json::to_string(metadata).map_err(io::Error::from)?;
        entries.push(format!("\"{METADATA_KEY}\":{metadata}"));
    }
    let mut names = BTreeSet::new();
    let mut begin = 0u64;
    for info in tensors {
        if info.name == METADATA_KEY || !names.insert(&info.name) {
            let why = format!("tensor name `{}` is reserved or occurs twice", info.name);
            return Err(invalid(why));
        }
        let end = info.num_bytes().and_then(|n| begin.checked_add(n));
        let Some(end) = end else {
            let why = format!(
                "tensor `{}` of shape {:?} has no size in whole bytes below 2^64",
                info.name, info.shape
            );
            return Err(invalid(why));
        };
        // `Value` quotes and escapes the name; a list of numbers prints as JSON.
        let name = Value::from(info.name.as_str());
        let (dtype, shape) = (info.dtype, Value::from(info.shape.as_slice()));
        entries.push(format!(
            "{name}:{{\"dtype\":\"{dtype}\",\"shape\":{shape},\"data_offsets\":[{begin},{end}]}}"
        ));
        begin = end;
    }
    Ok(format!("{{{}}}", entries.join(",")))
}

/// The header and the payload behind it.
fn split_header(bytes: &[u8]) -> Result<(&[u8], &[u8]), TensorsError> {
    let Some((length, rest)) = bytes.split_first_chunk::<8>() else {
        let reason = format!("{} bytes are shorter than any header", bytes.len());
        return Err(TensorsError::Damaged { reason });
    };
    let length = u64::from_le_bytes(*length);
    if length > MAX_HEADER_BYTES as u64 {
        let reason =
            format!("its header claims {length} bytes, at most {MAX_HEADER_BYTES} are read");
        return Err(TensorsError::Damaged { reason });
    }
    // At most MAX_HEADER_BYTES, so the cast keeps the number.
    rest.split_at_checked(length as usize).ok_or_else(|| {
        let follow = rest.len();
        let reason = format!("its header claims {length} bytes, but {follow} follow");
        TensorsError::Damaged { reason }
    })
}

fn damaged(error: &SafeTensorError) -> TensorsError {
    let reason = match error {
        SafeTensorError::MetadataIncompleteBuffer => {
            "it is longer or shorter than its header says".to_owned()
        }
        other => other.to_string(),
    };
    TensorsError::Damaged { reason }
}

fn invalid(why: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, why)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info(name: &str, dtype: Dtype, shape: &[usize]) -> TensorInfo {
        let (name, shape) = (name.to_owned(), shape.to_vec());
        TensorInfo { name, dtype, shape }
    }

    fn sample() -> Vec<u8> {
        let tensors = [
            info("bytes", Dtype::U8, &[3]),
            info("odd \"name\"\n", Dtype::F32, &[2, 2]),
            info("half", Dtype::F16, &[2]),
            info("brain", Dtype::BF16, &[1]),
            info("empty", Dtype::I64, &[0, 5]),
            info("scalar", Dtype::F32, &[]),
        ];
        let metadata = BTreeMap::from([
            ("format".to_owned(), "pt".to_owned()),
            ("config".to_owned(), "{\n \"a\": \"é\" }".to_owned()),
        ]);
        let mut out = Vec::new();
        write_header(&mut out, &tensors, &metadata).unwrap();
        assert_eq!(out.len() % 8, 0);
        out.extend([1u8, 2, 3]);
        write_f32(&mut out, &[1.5, -2.0, f32::MIN_POSITIVE, 1e30]).unwrap();
        write_f16(&mut out, &[f16::from_f32(0.25), f16::from_f32(-65504.0)]).unwrap();
        write_bf16(&mut out, &[bf16::from_f32(3.0)]).unwrap();
        write_f32(&mut out, &[7.0]).unwrap();
        out
    }

    #[test]
    fn what_is_written_is_read() {
        let bytes = sample();
        let tensors = open(&bytes).unwrap();
        assert_eq!(tensors.len(), 6);
        let values = |name: &str| f32_values(name, &tensor(&tensors, name).unwrap()).unwrap();
        assert_eq!(tensor(&tensors, "bytes").unwrap().data(), [1, 2, 3]);
        assert_eq!(
            values("odd \"name\"\n"),
            [1.5, -2.0, f32::MIN_POSITIVE, 1e30]
        );
        assert_eq!(values("half"), [0.25, -65504.0]);
        assert_eq!(values("brain"), [3.0]);
        assert_eq!(values("scalar"), [7.0]);
        assert_eq!(tensor(&tensors, "empty").unwrap().shape(), [0, 5]);
        let metadata = metadata(&bytes).unwrap();
        assert_eq!(metadata["config"], "{\n \"a\": \"é\" }");
        assert_eq!(metadata.len(), 2);
    }

    #[test]
    fn long_payloads_cross_the_buffers() {
        let values: Vec<f32> = (0..5000).map(|i| i as f32 * 0.5).collect();
        let mut out = Vec::new();
        let tensors = [
            info("x", Dtype::F32, &[5000]),
            info("y", Dtype::BF16, &[5000]),
        ];
        write_header(&mut out, &tensors, &BTreeMap::new()).unwrap();
        write_f32(&mut out, &values).unwrap();
        let halves: Vec<bf16> = values.iter().map(|&x| bf16::from_f32(x)).collect();
        write_bf16(&mut out, &halves).unwrap();
        let tensors = open(&out).unwrap();
        assert!(metadata(&out).unwrap().is_empty());
        let x = f32_values("x", &tensor(&tensors, "x").unwrap()).unwrap();
        let y = f32_values("y", &tensor(&tensors, "y").unwrap()).unwrap();
        assert_eq!(x, values);
        assert!(y.iter().zip(&halves).all(|(y, half)| *y == half.to_f32()));
    }

    #[test]
    fn headers_that_cannot_be_are_not_written() {
        let bad = [
            vec![info("a", Dtype::U8, &[1]), info("a", Dtype::U8, &[1])],
            vec![info("__metadata__", Dtype::U8, &[1])],
            vec![info("a", Dtype::F32, &[usize::MAX, 8])],
            (0..17)
                .map(|i| info(&i.to_string(), Dtype::U8, &[1 << 60]))
                .collect(),
            vec![info("a", Dtype::F4, &[3])],
            vec![info(&"n".repeat(MAX_HEADER_BYTES), Dtype::U8, &[1])],
        ];
        for tensors in bad {
            let mut out = Vec::new();
            let result = write_header(&mut out, &tensors, &BTreeMap::new());
            let refused = result.is_err_and(|e| e.kind() == io::ErrorKind::InvalidInput);
            assert!(refused && out.is_empty());
        }
    }

    #[test]
    fn every_truncation_is_refused() {
        let bytes = sample();
        for length in 0..bytes.len() {
            let result = open(&bytes[..length]);
            assert!(
                matches!(result, Err(TensorsError::Damaged { .. })),
                "length {length}"
            );
            assert!(metadata(&bytes[..length]).is_err());
        }
        let mut longer = bytes;
        longer.push(0);
        assert!(open(&longer).is_err());
    }

    #[test]
    fn a_huge_header_is_refused_before_it_is_read() {
        let mut bytes = sample();
        for length in [u64::MAX, MAX_HEADER_BYTES as u64 + 1] {
            bytes[..8].copy_from_slice(&length.to_le_bytes());
            let error = open(&bytes).unwrap_err();
            assert!(error.to_string().contains(&length.to_string()), "{error}");
        }
    }

    #[test]
    fn other_types_and_missing_tensors_are_named() {
        let bytes = sample();
        let tensors = open(&bytes).unwrap();
        let error = tensor(&tensors, "nothing").unwrap_err();
        assert_eq!(
            error,
            TensorsError::Missing {
                name: "nothing".to_owned()
            }
        );
        let view = tensor(&tensors, "bytes").unwrap();
        let error = f32_values("bytes", &view).unwrap_err();
        let (name, found) = ("bytes".to_owned(), Dtype::U8);
        assert_eq!(error, TensorsError::NotFloat { name, found });
    }
}
