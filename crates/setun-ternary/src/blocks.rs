//! The block types of GGUF that hold trits: one f16 scale and the codes of a fixed
//! number of consecutive weights.
//!
//! | type | id | weights | fields in order | bytes |
//! |---|---|---|---|---|
//! | `Q2_0` | 42 | 64 | f16 scale, 16 bytes of codes | 18 |
//! | `PQ2_0` | 142 | 128 | f16 scale, 32 bytes of codes | 34 |
//! | `PTQ1_0` | 143 | 128 | 24 and 2 bytes of base-3 digits, f16 scale | 28 |
//! | `TQ1_0` | 34 | 256 | 48 and 4 bytes of base-3 digits, f16 scale | 54 |
//! | `TQ2_0` | 35 | 256 | 64 bytes of codes, f16 scale | 66 |
//!
//! `Q2_0`, `TQ1_0` and `TQ2_0` are ggml's, `PQ2_0` and `PTQ1_0` those of PrismML's fork.
//! Its older files have the 34-byte blocks of `PQ2_0` under the id and name of `Q2_0`.
//!
//! The codes of `Q2_0` and `PQ2_0` are `t + 1`, low bits first. Byte `m` of the half `h`
//! of a `TQ2_0` block has weight `128 h + 32 n + m` at bits `2 n`. For base 3 see
//! [`digits`].
//!
//! A group of any size fits a block as long as no block has two scales. What comes out
//! is exactly the trits and scales that went in; everything else is refused.

mod digits;

use crate::codes::{self, MAX_GROUP_SIZE, is_scale, is_whole};
use crate::{PackError, PackedMatrix, groups_per_row, packed_row_bytes};
use half::f16;
use thiserror::Error;

/// A GGUF block type that holds trits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(non_camel_case_types)] // The names of ggml.
pub enum BlockType {
    /// ggml's two-bit type: 64 weights.
    Q2_0,
    /// PrismML's two-bit type: 128 weights.
    Pq2_0,
    /// PrismML's base-3 type: 128 weights.
    Ptq1_0,
    /// ggml's base-3 type: 256 weights.
    Tq1_0,
    /// ggml's older two-bit type: 256 weights.
    Tq2_0,
}

impl BlockType {
    /// All of them, smallest block first.
    pub const ALL: [Self; 5] = [
        Self::Q2_0,
        Self::Pq2_0,
        Self::Ptq1_0,
        Self::Tq1_0,
        Self::Tq2_0,
    ];

    /// Name as ggml writes it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Q2_0 => "Q2_0",
            Self::Pq2_0 => "PQ2_0",
            Self::Ptq1_0 => "PTQ1_0",
            Self::Tq1_0 => "TQ1_0",
            Self::Tq2_0 => "TQ2_0",
        }
    }

    /// The type called `name`, in upper or lower case, if there is one.
    pub fn from_name(name: &str) -> Option<Self> {
        let named = |block: &Self| block.name().eq_ignore_ascii_case(name);
        Self::ALL.into_iter().find(named)
    }

    /// Weights of a block.
    pub fn block_weights(self) -> usize {
        match self {
            Self::Q2_0 => 64,
            Self::Pq2_0 | Self::Ptq1_0 => 128,
            Self::Tq1_0 | Self::Tq2_0 => 256,
        }
    }

    /// Bytes of a block, its scale included.
    pub fn block_bytes(self) -> usize {
        match self {
            Self::Q2_0 => 18,
            Self::Pq2_0 => 34,
            Self::Ptq1_0 => 28,
            Self::Tq1_0 => 54,
            Self::Tq2_0 => 66,
        }
    }

    /// Bytes of a row of `cols` weights; `None` unless blocks divide it.
    pub fn row_bytes(self, cols: usize) -> Option<usize> {
        if cols == 0 || !cols.is_multiple_of(self.block_weights()) {
            return None;
        }
        (cols / self.block_weights()).checked_mul(self.block_bytes())
    }

    /// Where the scale stands in a block.
    fn scale_at(self) -> usize {
        match self {
            Self::Q2_0 | Self::Pq2_0 => 0,
            Self::Ptq1_0 | Self::Tq1_0 | Self::Tq2_0 => self.block_bytes() - 2,
        }
    }

    /// Scale and the bytes of the weights.
    fn split(self, block: &[u8]) -> (f16, &[u8]) {
        let at = self.scale_at();
        let scale = f16::from_bits(u16::from_le_bytes([block[at], block[at + 1]]));
        let weights = if at == 0 { &block[2..] } else { &block[..at] };
        (scale, weights)
    }
}

/// Why a matrix cannot be blocks, or blocks cannot be a matrix.
#[derive(Clone, Debug, PartialEq, Error)]
pub enum BlockError {
    /// Rows that are not whole blocks.
    #[error(
        "rows of {cols} weights are no multiple of the {} weights of a {} block; choose a \
         format with smaller blocks, or one without blocks",
        block.block_weights(),
        block.name()
    )]
    Columns {
        /// The block type.
        block: BlockType,
        /// Weights of a row.
        cols: usize,
    },
    /// A group of no weights or absurdly many, a row of none, or fields that contradict
    /// each other.
    #[error(
        "{rows} x {cols} weights in groups of {group_size} do not describe the matrix given; \
         pass the shape with which it was packed"
    )]
    Shape {
        /// Rows.
        rows: usize,
        /// Weights of a row.
        cols: usize,
        /// Weights that share a scale.
        group_size: usize,
    },
    /// Bytes of another length than the shape asks for.
    #[error("{found} bytes, but {} blocks of this shape are {expected}; the file is cut off \
        or of another type", block.name())]
    Length {
        /// The block type.
        block: BlockType,
        /// Length of the input.
        found: usize,
        /// Length that the shape asks for.
        expected: usize,
    },
    /// Groups of one block with different scales: the format cannot say so.
    #[error(
        "row {row}, block {index}: the groups of {group_size} in this {} block have different \
         scales, and it holds one; train with group_size = {}, or choose a format with \
         smaller blocks",
        block.name(),
        block.block_weights()
    )]
    Scales {
        /// The block type.
        block: BlockType,
        /// Weights that share a scale.
        group_size: usize,
        /// Row of the matrix.
        row: usize,
        /// Block in its row.
        index: usize,
    },
    /// Blocks of one group with different scales.
    #[error(
        "row {row}, group {group}: its {} blocks have different scales; read the file in \
         groups of {}",
        block.name(),
        block.block_weights()
    )]
    GroupScales {
        /// The block type.
        block: BlockType,
        /// Row of the matrix.
        row: usize,
        /// Group in its row.
        group: usize,
    },
    /// Codes that are no trits.
    #[error("row {row}: {why}; the weights are damaged or not ternary")]
    Codes {
        /// Row of the matrix.
        row: usize,
        /// What is wrong.
        why: PackError,
    },
    /// A base-3 byte that stands for no digits.
    #[error(
        "row {row}, block {index}: byte {byte:#04x} is not one that base-3 digits give; the \
         weights are damaged"
    )]
    Digits {
        /// Row of the matrix.
        row: usize,
        /// Block in its row.
        index: usize,
        /// The byte.
        byte: u8,
    },
    /// A scale that no group has.
    #[error(
        "row {row}, block {index}: {found} is not a scale (finite, not negative); the weights \
         are damaged"
    )]
    BadScale {
        /// Row of the matrix.
        row: usize,
        /// Block in its row.
        index: usize,
        /// The scale.
        found: f32,
    },
}

/// Whether blocks hold every matrix of this shape: they divide its rows, and none of
/// them has a part of two groups.
pub fn fits(block: BlockType, cols: usize, group_size: usize) -> bool {
    let one_group = group_size >= cols || group_size.is_multiple_of(block.block_weights());
    group_size > 0 && block.row_bytes(cols).is_some() && one_group
}

/// Writes `matrix` as rows of blocks.
///
/// # Errors
/// Rows that blocks do not divide; a block whose groups have different scales; a matrix
/// that is damaged.
pub fn encode_matrix(block: BlockType, matrix: &PackedMatrix) -> Result<Vec<u8>, BlockError> {
    let (rows, cols) = (matrix.rows, matrix.cols);
    if !is_whole(matrix) {
        return Err(shape_error(rows, cols, matrix.group_size));
    }
    let Some(row_bytes) = block.row_bytes(cols) else {
        return Err(BlockError::Columns { block, cols });
    };
    let num_codes = block.block_weights() / 4;
    let mut bytes = vec![0; rows * row_bytes];
    let mut codes = vec![0; cols / 4];
    for (row, out) in bytes.chunks_exact_mut(row_bytes).enumerate() {
        codes::read_row(matrix, row, &mut codes).map_err(|why| BlockError::Codes { row, why })?;
        let blocks = out.chunks_exact_mut(block.block_bytes());
        for (index, (out, codes)) in blocks.zip(codes.chunks_exact(num_codes)).enumerate() {
            let scale = block_scale(block, matrix, row, index)?;
            let at = block.scale_at();
            out[at..at + 2].copy_from_slice(&scale.to_le_bytes());
            let weights = if at == 0 {
                &mut out[2..]
            } else {
                &mut out[..at]
            };
            encode_weights(block, codes, weights);
        }
    }
    Ok(bytes)
}

/// Reads rows of blocks as the matrix `[rows, cols]` in groups of `group_size`.
///
/// # Errors
/// Rows that blocks do not divide; another number of bytes; code 3, base-3 bytes that no
/// writer makes, scales that are NaN, infinite or negative; blocks of one group whose
/// scales differ.
pub fn decode_matrix(
    block: BlockType,
    rows: usize,
    cols: usize,
    bytes: &[u8],
    group_size: usize,
) -> Result<PackedMatrix, BlockError> {
    let row_bytes = check_length(block, rows, cols, bytes, group_size)?;
    let packed_bytes = packed_row_bytes(cols, group_size);
    let too_large = || shape_error(rows, cols, group_size);
    let total = rows.checked_mul(packed_bytes).ok_or_else(too_large)?;
    let num_codes = block.block_weights() / 4;
    let mut trits = vec![0; total];
    let mut scales = Vec::with_capacity(rows * groups_per_row(cols, group_size));
    let mut codes = vec![0; cols / 4];
    let mut block_scales = vec![f16::ZERO; cols / block.block_weights()];
    let both = bytes.chunks_exact(row_bytes);
    for (row, (bytes, packed)) in both.zip(trits.chunks_exact_mut(packed_bytes)).enumerate() {
        let blocks = bytes.chunks_exact(block.block_bytes());
        let both = blocks.zip(codes.chunks_exact_mut(num_codes));
        for (index, (bytes, codes)) in both.enumerate() {
            let (scale, weights) = block.split(bytes);
            if !is_scale(scale) {
                let found = scale.to_f32();
                return Err(BlockError::BadScale { row, index, found });
            }
            block_scales[index] = scale;
            decode_weights(block, weights, codes).map_err(|byte| BlockError::Digits {
                row,
                index,
                byte,
            })?;
        }
        codes::write_row(&codes, group_size, packed)
            .map_err(|why| BlockError::Codes { row, why })?;
        group_scales(block, &block_scales, cols, group_size, &mut scales)
            .map_err(|group| BlockError::GroupScales { block, row, group })?;
    }
    Ok(PackedMatrix {
        rows,
        cols,
        group_size,
        trits,
        scales,
    })
}

/// Whether the blocks of each group of `group_size` have the same scale, so that
/// [`decode_matrix`] can read them so; finds the largest group of a file that records
/// none. Trits are not looked at.
pub fn group_fits(
    block: BlockType,
    rows: usize,
    cols: usize,
    bytes: &[u8],
    group_size: usize,
) -> bool {
    let Ok(row_bytes) = check_length(block, rows, cols, bytes, group_size) else {
        return false;
    };
    let mut block_scales = Vec::new();
    let mut scales = Vec::new();
    bytes.chunks_exact(row_bytes).all(|bytes| {
        let blocks = bytes.chunks_exact(block.block_bytes());
        block_scales.clear();
        block_scales.extend(blocks.map(|bytes| block.split(bytes).0));
        scales.clear();
        group_scales(block, &block_scales, cols, group_size, &mut scales).is_ok()
    })
}

/// Bytes of a row, after a check that `bytes` are the blocks of the whole matrix.
fn check_length(
    block: BlockType,
    rows: usize,
    cols: usize,
    bytes: &[u8],
    group_size: usize,
) -> Result<usize, BlockError> {
    if cols == 0 || group_size == 0 || group_size > MAX_GROUP_SIZE {
        return Err(shape_error(rows, cols, group_size));
    }
    let Some(row_bytes) = block.row_bytes(cols) else {
        return Err(BlockError::Columns { block, cols });
    };
    let found = bytes.len();
    match rows.checked_mul(row_bytes) {
        None => Err(shape_error(rows, cols, group_size)),
        Some(expected) if expected != found => Err(BlockError::Length {
            block,
            found,
            expected,
        }),
        Some(_) => Ok(row_bytes),
    }
}

fn shape_error(rows: usize, cols: usize, group_size: usize) -> BlockError {
    BlockError::Shape {
        rows,
        cols,
        group_size,
    }
}

/// The one scale of all groups that have weights in a block.
fn block_scale(
    block: BlockType,
    matrix: &PackedMatrix,
    row: usize,
    index: usize,
) -> Result<f16, BlockError> {
    let (weights, group_size) = (block.block_weights(), matrix.group_size);
    let first = index * weights / group_size;
    let last = ((index + 1) * weights - 1) / group_size;
    let scales = &matrix.row_scales(row)[first..=last];
    let scale = scales[0];
    if scales.iter().any(|s| s.to_bits() != scale.to_bits()) {
        return Err(BlockError::Scales {
            block,
            group_size,
            row,
            index,
        });
    }
    if !is_scale(scale) {
        let found = scale.to_f32();
        return Err(BlockError::BadScale { row, index, found });
    }
    Ok(scale)
}

/// Appends the scales of a row's groups, or says which group has blocks that disagree.
fn group_scales(
    block: BlockType,
    block_scales: &[f16],
    cols: usize,
    group_size: usize,
    scales: &mut Vec<f16>,
) -> Result<(), usize> {
    let weights = block.block_weights();
    for group in 0..groups_per_row(cols, group_size) {
        let first = group * group_size;
        let last = first + group_size.min(cols - first) - 1;
        let of_group = &block_scales[first / weights..=last / weights];
        let scale = of_group[0];
        if of_group.iter().any(|s| s.to_bits() != scale.to_bits()) {
            return Err(group);
        }
        scales.push(scale);
    }
    Ok(())
}

/// Writes the codes of a block the way that its type has them.
fn encode_weights(block: BlockType, codes: &[u8], weights: &mut [u8]) {
    match block {
        BlockType::Q2_0 | BlockType::Pq2_0 => weights.copy_from_slice(codes),
        BlockType::Tq2_0 => interleave(codes, weights),
        BlockType::Ptq1_0 => digits::encode(&digits::PTQ1_0, codes, weights),
        BlockType::Tq1_0 => digits::encode(&digits::TQ1_0, codes, weights),
    }
}

/// The inverse of [`encode_weights`]; fails with a byte that is no digits. Code 3 is
/// found later.
fn decode_weights(block: BlockType, weights: &[u8], codes: &mut [u8]) -> Result<(), u8> {
    match block {
        BlockType::Q2_0 | BlockType::Pq2_0 => codes.copy_from_slice(weights),
        BlockType::Tq2_0 => deinterleave(weights, codes),
        BlockType::Ptq1_0 => digits::decode(&digits::PTQ1_0, weights, codes)?,
        BlockType::Tq1_0 => digits::decode(&digits::TQ1_0, weights, codes)?,
    }
    Ok(())
}

/// Four consecutive weights share a byte of `codes`; in `TQ2_0`, weights that are 32
/// apart do.
fn interleave(codes: &[u8], weights: &mut [u8]) {
    for (codes, weights) in codes.chunks_exact(32).zip(weights.chunks_exact_mut(32)) {
        for (m, byte) in weights.iter_mut().enumerate() {
            let code = |n: usize| code_at(codes, 32 * n + m) << (2 * n);
            *byte = code(0) | code(1) | code(2) | code(3);
        }
    }
}

/// The inverse of [`interleave`].
fn deinterleave(weights: &[u8], codes: &mut [u8]) {
    for (weights, codes) in weights.chunks_exact(32).zip(codes.chunks_exact_mut(32)) {
        for (i, byte) in codes.iter_mut().enumerate() {
            let code = |j: usize| {
                let weight = 4 * i + j;
                (weights[weight % 32] >> (2 * (weight / 32)) & 3) << (2 * j)
            };
            *byte = code(0) | code(1) | code(2) | code(3);
        }
    }
}

/// Code of weight `i` of a block.
fn code_at(codes: &[u8], i: usize) -> u8 {
    codes[i / 4] >> (2 * (i % 4)) & 3
}

#[cfg(test)]
mod tests;
