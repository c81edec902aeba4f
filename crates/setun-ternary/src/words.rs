//! 32-bit words of 16 codes: the two-bit formats of MLX and of compressed-tensors.
//!
//! Both have one row of words for each row of the matrix, low bits first. MLX's affine
//! quantization reads a code `q` as `scale * q + bias`, so that codes `t + 1`, scale `s`
//! and bias `-s` are the ternary weight; `mx.quantize` finds other, lossy codes.
//! compressed-tensors' `pack-quantized` adds 2 to a signed value, so its code is `t + 2`:
//! the word of MLX plus `0x55555555`.

use crate::codes::{self, is_scale, is_whole};
use crate::{PackError, PackedMatrix, groups_per_row, packed_row_bytes};
use half::f16;
use thiserror::Error;

/// Codes of a word.
const WORD_WEIGHTS: usize = 16;
/// One in each code of a word.
const ONES: u32 = 0x5555_5555;
/// Sizes of a group that MLX has kernels for.
pub const MLX_GROUP_SIZES: [usize; 3] = [32, 64, 128];

/// Why a matrix cannot be words, or words cannot be a matrix.
#[derive(Clone, Debug, PartialEq, Error)]
pub enum WordsError {
    /// Rows that are not whole groups of whole words.
    #[error(
        "rows of {cols} weights are no whole groups of {group_size} in whole words of 16; \
         choose a format without words, such as packed"
    )]
    Columns {
        /// Weights of a row.
        cols: usize,
        /// Weights that share a scale.
        group_size: usize,
    },
    /// A group that MLX does not know.
    #[error(
        "MLX has groups of 32, 64 and 128 weights, not of {found}; train with group_size = \
         128 for MLX, or choose another format"
    )]
    MlxGroup {
        /// Weights that share a scale.
        found: usize,
    },
    /// Another number of words, scales or bytes than the shape asks for.
    #[error(
        "{found} {what}, but {rows} x {cols} weights in groups of {group_size} have \
         {expected}; the file is damaged or of another shape"
    )]
    Length {
        /// `words`, `scales` or `bytes`.
        what: &'static str,
        /// Their number.
        found: usize,
        /// The number that the shape asks for.
        expected: usize,
        /// Rows.
        rows: usize,
        /// Weights of a row.
        cols: usize,
        /// Weights that share a scale.
        group_size: usize,
    },
    /// Codes that are no trits.
    #[error("row {row}: {why}; the weights are damaged or not ternary")]
    Codes {
        /// Row of the matrix.
        row: usize,
        /// What is wrong.
        why: PackError,
    },
    /// A compressed-tensors code 0, which stands for -2.
    #[error("row {row}, column {column}: the weight is -2 scales; the weights are not ternary")]
    MinusTwo {
        /// Row of the matrix.
        row: usize,
        /// Column of the weight.
        column: usize,
    },
    /// A scale that no group has.
    #[error(
        "row {row}, group {group}: {found} is not a scale (finite, not negative); the weights \
         are damaged"
    )]
    BadScale {
        /// Row of the matrix.
        row: usize,
        /// Group in its row.
        group: usize,
        /// The scale.
        found: f32,
    },
}

/// Codes `t + 1` as MLX packs them: `[rows, cols / 16]`, row-major. The scales are the
/// matrix's own, the biases their negatives.
///
/// # Errors
/// Groups that MLX does not have or that do not divide the rows; a damaged matrix.
pub fn mlx_words(matrix: &PackedMatrix) -> Result<Vec<u32>, WordsError> {
    check_mlx_group(matrix.group_size)?;
    words(matrix)
}

/// The matrix behind MLX's words and scales `[rows, cols / group_size]`. That the biases
/// are the negatives of the scales is for the caller to check.
///
/// # Errors
/// As [`mlx_words`]; another number of words or scales; code 3; scales that are NaN,
/// infinite or negative.
pub fn from_mlx_words(
    rows: usize,
    cols: usize,
    group_size: usize,
    words: &[u32],
    scales: &[f16],
) -> Result<PackedMatrix, WordsError> {
    check_mlx_group(group_size)?;
    from_words(rows, cols, group_size, words.iter().copied(), scales)
}

/// Codes `t + 2` as compressed-tensors packs them: `[rows, cols / 16]`, row-major.
///
/// # Errors
/// Groups that do not divide the rows, or rows that words do not; a damaged matrix.
pub fn compressed_words(matrix: &PackedMatrix) -> Result<Vec<u32>, WordsError> {
    let mut words = words(matrix)?;
    // Codes are at most 2, so no addition carries into the next one.
    words.iter_mut().for_each(|word| *word += ONES);
    Ok(words)
}

/// The matrix behind compressed-tensors' words and scales `[rows, cols / group_size]`.
///
/// # Errors
/// As [`compressed_words`]; another number of words or scales; code 0, which is -2;
/// scales that are NaN, infinite or negative.
pub fn from_compressed_words(
    rows: usize,
    cols: usize,
    group_size: usize,
    words: &[u32],
    scales: &[f16],
) -> Result<PackedMatrix, WordsError> {
    check_columns(cols, group_size)?;
    let zero = |word: u32| !(word | word >> 1) & ONES;
    if let Some(at) = words.iter().position(|&word| zero(word) != 0) {
        let in_word = zero(words[at]).trailing_zeros() as usize / 2;
        let weight = at * WORD_WEIGHTS + in_word;
        let (row, column) = (weight / cols, weight % cols);
        return Err(WordsError::MinusTwo { row, column });
    }
    let words = words.iter().map(|word| word - ONES);
    from_words(rows, cols, group_size, words, scales)
}

fn words(matrix: &PackedMatrix) -> Result<Vec<u32>, WordsError> {
    let (rows, cols) = (matrix.rows, matrix.cols);
    check_columns(cols, matrix.group_size)?;
    if !is_whole(matrix) {
        let expected = packed_row_bytes(cols, matrix.group_size).saturating_mul(rows);
        let found = matrix.trits.len();
        return Err(length_error(
            "bytes",
            found,
            expected,
            [rows, cols, matrix.group_size],
        ));
    }
    check_scales(&matrix.scales, matrix.groups())?;
    let mut words = Vec::with_capacity(rows * (cols / WORD_WEIGHTS));
    let mut codes = vec![0; cols / 4];
    for row in 0..rows {
        codes::read_row(matrix, row, &mut codes).map_err(|why| WordsError::Codes { row, why })?;
        let of_row = codes.chunks_exact(4);
        words.extend(of_row.map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])));
    }
    Ok(words)
}

fn from_words(
    rows: usize,
    cols: usize,
    group_size: usize,
    words: impl ExactSizeIterator<Item = u32>,
    scales: &[f16],
) -> Result<PackedMatrix, WordsError> {
    check_columns(cols, group_size)?;
    let groups = groups_per_row(cols, group_size);
    let shape = [rows, cols, group_size];
    let lengths = [
        ("words", words.len(), cols / WORD_WEIGHTS),
        ("scales", scales.len(), groups),
    ];
    for (what, found, of_row) in lengths {
        let expected = rows.saturating_mul(of_row);
        if found != expected {
            return Err(length_error(what, found, expected, shape));
        }
    }
    check_scales(scales, groups)?;
    let codes: Vec<u8> = words.flat_map(u32::to_le_bytes).collect();
    let packed_bytes = packed_row_bytes(cols, group_size);
    let mut trits = vec![0; rows * packed_bytes];
    let both = codes.chunks_exact(cols / 4);
    for (row, (codes, packed)) in both.zip(trits.chunks_exact_mut(packed_bytes)).enumerate() {
        codes::write_row(codes, group_size, packed)
            .map_err(|why| WordsError::Codes { row, why })?;
    }
    Ok(PackedMatrix {
        rows,
        cols,
        group_size,
        trits,
        scales: scales.to_vec(),
    })
}

fn check_mlx_group(found: usize) -> Result<(), WordsError> {
    match MLX_GROUP_SIZES.contains(&found) {
        true => Ok(()),
        false => Err(WordsError::MlxGroup { found }),
    }
}

fn check_columns(cols: usize, group_size: usize) -> Result<(), WordsError> {
    let whole_words = cols > 0 && cols.is_multiple_of(WORD_WEIGHTS);
    if whole_words && group_size > 0 && cols.is_multiple_of(group_size) {
        return Ok(());
    }
    Err(WordsError::Columns { cols, group_size })
}

fn check_scales(scales: &[f16], groups: usize) -> Result<(), WordsError> {
    let Some(at) = scales.iter().position(|&scale| !is_scale(scale)) else {
        return Ok(());
    };
    Err(WordsError::BadScale {
        row: at / groups,
        group: at % groups,
        found: scales[at].to_f32(),
    })
}

fn length_error(
    what: &'static str,
    found: usize,
    expected: usize,
    [rows, cols, group_size]: [usize; 3],
) -> WordsError {
    WordsError::Length {
        what,
        found,
        expected,
        rows,
        cols,
        group_size,
    }
}

#[cfg(test)]
mod tests;
