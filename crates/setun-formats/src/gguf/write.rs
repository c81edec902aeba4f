//! Writing the start of a GGUF file.

use super::layout::{align, payload_bytes};
use super::value::{ARRAY_ID, STRING_ID};
use super::{ALIGNMENT_KEY, DEFAULT_ALIGNMENT, MAGIC, VERSION};
use super::{GgufArray, GgufError, GgufHeader, GgufLimits, GgufTensorInfo, GgufType, GgufValue};
use std::io::{self, Write};

/// Where the payloads of a file belong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GgufLayout {
    /// Bytes that [`write_header`] wrote: where the first payload starts.
    pub data_offset: u64,
    /// The tensors in the order in which their payloads follow.
    pub tensors: Vec<GgufTensorInfo>,
    /// Zeros behind the payload of each tensor.
    pub padding: Vec<u64>,
    /// Length of the whole file.
    pub file_len: u64,
}

/// Writes the header of a file, padded to the alignment. The payload of each tensor must
/// follow in the order of `tensors`, and behind each one its zeros of
/// [`GgufLayout::padding`]. Shapes have the slowest dimension first.
///
/// Entries are written in their order; `general.alignment` counts.
///
/// # Errors
/// [`io::ErrorKind::InvalidInput`] for a file that [`GgufHeader::parse`] would not read
/// back: repeated or bad names, shapes that blocks do not divide, more than the default
/// limits, legacy `Q2_0` tensors all so small that they look like mainline ones. Nothing
/// is written then. Failures of `out`.
pub fn write_header(
    out: &mut dyn Write,
    metadata: &[(String, GgufValue)],
    tensors: &[(String, Vec<usize>, GgufType)],
) -> io::Result<GgufLayout> {
    let header = header_bytes(metadata, tensors).map_err(invalid)?;
    let last = header.offsets.last().copied().unwrap_or(0);
    let file_len = header.bytes.len() as u64 + last;
    let limits = GgufLimits::default();
    let read = GgufHeader::parse(&header.bytes, file_len, &limits).map_err(invalid)?;
    for (tensor, (name, _, ggml_type)) in read.tensors.iter().zip(tensors) {
        if tensor.ggml_type != *ggml_type {
            return Err(invalid(GgufError::Unwritable {
                what: format!("`{name}` as {}: it is too small", ggml_type.name()),
                remedy: "choose PQ2_0, which has the same blocks",
            }));
        }
    }
    out.write_all(&header.bytes)?;
    let ends = header.offsets.iter().skip(1);
    let padding = read.tensors.iter().zip(ends).map(|(tensor, end)| {
        let start = tensor.offset - read.data_offset;
        end - start - tensor.num_bytes
    });
    Ok(GgufLayout {
        data_offset: read.data_offset,
        padding: padding.collect(),
        tensors: read.tensors,
        file_len,
    })
}

struct HeaderBytes {
    bytes: Vec<u8>,
    /// Where each payload starts, and where the last one ends with its padding; from the
    /// start of the data.
    offsets: Vec<u64>,
}

fn header_bytes(
    metadata: &[(String, GgufValue)],
    tensors: &[(String, Vec<usize>, GgufType)],
) -> Result<HeaderBytes, GgufError> {
    let found = metadata.iter().find(|(key, _)| key == ALIGNMENT_KEY);
    let alignment = match found {
        Some((_, GgufValue::U32(alignment))) if *alignment > 0 => *alignment,
        Some((key, other)) => return Err(GgufError::bad_value(key, other, "u32 above 0")),
        None => DEFAULT_ALIGNMENT,
    };
    let mut bytes = MAGIC.to_vec();
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend((tensors.len() as u64).to_le_bytes());
    bytes.extend((metadata.len() as u64).to_le_bytes());
    for (key, value) in metadata {
        put_string(&mut bytes, key);
        put_value(&mut bytes, value);
    }
    let mut offsets = vec![0];
    let mut offset = 0u64;
    for (name, shape, ggml_type) in tensors {
        put_string(&mut bytes, name);
        bytes.extend((shape.len() as u32).to_le_bytes());
        for &n in shape.iter().rev() {
            bytes.extend((n as u64).to_le_bytes());
        }
        bytes.extend(ggml_type.id().to_le_bytes());
        bytes.extend(offset.to_le_bytes());
        let end = offset.checked_add(payload_bytes(name, shape, *ggml_type)?);
        let padded = end.and_then(|end| align(end, alignment));
        offset = padded.filter(|&end| end < u64::MAX / 2).ok_or_else(|| {
            let why = "the file has more bytes than can be counted".to_owned();
            let name = name.clone();
            GgufError::BadTensor { name, why }
        })?;
        offsets.push(offset);
    }
    bytes.resize(bytes.len().next_multiple_of(alignment as usize), 0);
    Ok(HeaderBytes { bytes, offsets })
}

fn put_string(bytes: &mut Vec<u8>, text: &str) {
    bytes.extend((text.len() as u64).to_le_bytes());
    bytes.extend(text.as_bytes());
}

fn put_value(bytes: &mut Vec<u8>, value: &GgufValue) {
    use super::GgufScalar as Scalar;
    let mut put = |scalar: Scalar, value: &[u8]| {
        bytes.extend(scalar.id().to_le_bytes());
        bytes.extend(value);
    };
    match value {
        GgufValue::U8(value) => put(Scalar::U8, &value.to_le_bytes()),
        GgufValue::I8(value) => put(Scalar::I8, &value.to_le_bytes()),
        GgufValue::U16(value) => put(Scalar::U16, &value.to_le_bytes()),
        GgufValue::I16(value) => put(Scalar::I16, &value.to_le_bytes()),
        GgufValue::U32(value) => put(Scalar::U32, &value.to_le_bytes()),
        GgufValue::I32(value) => put(Scalar::I32, &value.to_le_bytes()),
        GgufValue::F32(value) => put(Scalar::F32, &value.to_le_bytes()),
        GgufValue::Bool(value) => put(Scalar::Bool, &[u8::from(*value)]),
        GgufValue::U64(value) => put(Scalar::U64, &value.to_le_bytes()),
        GgufValue::I64(value) => put(Scalar::I64, &value.to_le_bytes()),
        GgufValue::F64(value) => put(Scalar::F64, &value.to_le_bytes()),
        GgufValue::String(text) => {
            bytes.extend(STRING_ID.to_le_bytes());
            put_string(bytes, text);
        }
        GgufValue::Array(array) => put_array(bytes, array),
    }
}

fn put_array(bytes: &mut Vec<u8>, array: &GgufArray) {
    bytes.extend(ARRAY_ID.to_le_bytes());
    let id = match array {
        GgufArray::Numbers(numbers) => numbers.scalar().id(),
        GgufArray::Strings(_) => STRING_ID,
    };
    bytes.extend(id.to_le_bytes());
    bytes.extend((array.len() as u64).to_le_bytes());
    match array {
        GgufArray::Numbers(numbers) => bytes.extend(numbers.bytes()),
        GgufArray::Strings(strings) => strings.iter().for_each(|text| put_string(bytes, text)),
    }
}

fn invalid(error: GgufError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, error)
}
