//! Where payloads lie: one behind the other in the order of the list, each padded to the
//! alignment. llama.cpp reads nothing else, so neither does Setun: gaps and overlaps
//! cannot occur.

use super::{GgufError, GgufTensorInfo, GgufType};
use setun_ternary::blocks::BlockType;

/// A tensor as the list has it.
pub(super) struct ListedTensor {
    pub(super) name: String,
    /// Slowest dimension first.
    pub(super) shape: Vec<usize>,
    pub(super) ggml_type: GgufType,
    /// From the start of the data.
    pub(super) offset: u64,
}

/// `n` rounded up to a multiple of `alignment`; `None` if it overflows.
pub(super) fn align(n: u64, alignment: u32) -> Option<u64> {
    n.checked_next_multiple_of(alignment.into())
}

/// Length of a payload.
///
/// # Errors
/// A shape that the type cannot have, or whose length overflows.
pub(super) fn payload_bytes(
    name: &str,
    shape: &[usize],
    ggml_type: GgufType,
) -> Result<u64, GgufError> {
    ggml_type.num_bytes(shape).ok_or_else(|| {
        let (kind, most) = (ggml_type.name(), u64::MAX);
        let why = format!("{kind} blocks do not divide {shape:?}, or it has over {most} bytes");
        let name = name.to_owned();
        GgufError::BadTensor { name, why }
    })
}

/// Places the tensors of a file.
///
/// A tensor of id 42 is listed as mainline `Q2_0`; if the offsets contradict that, but
/// not the legacy layout, all of them are [`GgufType::LegacyQ2_0`]. If no tensor has more
/// than 1,920 weights, padding may make the two equal; then they are mainline.
///
/// # Errors
/// A tensor that does not follow the one before it or goes on behind the end of the
/// file; bytes behind the last one.
pub(super) fn place(
    mut tensors: Vec<ListedTensor>,
    data_offset: u64,
    alignment: u32,
    file_len: u64,
) -> Result<Vec<GgufTensorInfo>, GgufError> {
    let mainline = place_as_listed(&tensors, data_offset, alignment, file_len);
    let (num_placed, error) = match mainline {
        Ok(infos) => return Ok(infos),
        Err(failure) => failure,
    };
    for tensor in &mut tensors {
        if tensor.ggml_type == GgufType::Block(BlockType::Q2_0) {
            tensor.ggml_type = GgufType::LegacyQ2_0;
        }
    }
    match place_as_listed(&tensors, data_offset, alignment, file_len) {
        Ok(infos) => Ok(infos),
        // The reading that went further is the one that was meant.
        Err((legacy_placed, legacy)) if legacy_placed > num_placed => Err(legacy),
        Err(_) => Err(error),
    }
}

/// Places tensors whose types are known; an error comes with the number of tensors in
/// front of it.
fn place_as_listed(
    tensors: &[ListedTensor],
    data_offset: u64,
    alignment: u32,
    file_len: u64,
) -> Result<Vec<GgufTensorInfo>, (usize, GgufError)> {
    let mut infos = Vec::with_capacity(tensors.len());
    let mut expected = 0;
    for (index, tensor) in tensors.iter().enumerate() {
        let info = place_one(tensor, expected, data_offset, file_len);
        let info = info.map_err(|error| (index, error))?;
        // A payload within the file, rounded up, is far from overflowing.
        expected = align(tensor.offset + info.num_bytes, alignment).unwrap_or(u64::MAX);
        infos.push(info);
    }
    let end = data_offset.saturating_add(expected);
    if file_len > end {
        let found = file_len - end;
        return Err((tensors.len(), GgufError::TrailingBytes { found }));
    }
    Ok(infos)
}

fn place_one(
    tensor: &ListedTensor,
    expected: u64,
    data_offset: u64,
    file_len: u64,
) -> Result<GgufTensorInfo, GgufError> {
    let num_bytes = payload_bytes(&tensor.name, &tensor.shape, tensor.ggml_type)?;
    if tensor.offset != expected {
        return Err(GgufError::Misplaced {
            name: tensor.name.clone(),
            found: tensor.offset,
            expected,
        });
    }
    let offset = data_offset.saturating_add(tensor.offset);
    let end = offset.saturating_add(num_bytes);
    if end > file_len {
        return Err(GgufError::Truncated {
            place: format!("tensor `{}`", tensor.name),
            end,
            file_len,
        });
    }
    Ok(GgufTensorInfo {
        name: tensor.name.clone(),
        shape: tensor.shape.clone(),
        ggml_type: tensor.ggml_type,
        offset,
        num_bytes,
    })
}

/// The type with this id.
///
/// # Errors
/// Types that Setun does not read, by name where ggml has one.
pub(super) fn tensor_type(name: &str, id: u32) -> Result<GgufType, GgufError> {
    GgufType::from_id(id).ok_or_else(|| {
        let known = KNOWN_TYPES.iter().find(|&&(known, _)| known == id);
        GgufError::TensorType {
            name: name.to_owned(),
            id,
            known_as: known.map_or_else(String::new, |(_, name)| format!(" ({name})")),
        }
    })
}

/// Other types of ggml that files are full of, for the message.
const KNOWN_TYPES: [(u32, &str); 15] = [
    (2, "Q4_0"),
    (3, "Q4_1"),
    (6, "Q5_0"),
    (7, "Q5_1"),
    (8, "Q8_0"),
    (10, "Q2_K"),
    (11, "Q3_K"),
    (12, "Q4_K"),
    (13, "Q5_K"),
    (14, "Q6_K"),
    (20, "IQ4_NL"),
    (23, "IQ4_XS"),
    (28, "F64"),
    (39, "MXFP4"),
    (41, "Q1_0"),
];
