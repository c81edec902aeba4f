//! Weights as they lie in a file of any format, read a block of rows at a time.

use crate::gguf_file::{GgufFile, GgufRows, blocks_fit};
use crate::layout::{Shards, bad_scale, missing};
use crate::regroup::{self, regroup};
use crate::{IoError, Matrix, TensorFile};
use half::f16;
use setun_ternary::PackedMatrix;
use setun_ternary::words::{from_compressed_words, from_mlx_words};
use std::ops::Range;
use std::path::Path;

/// Weights that are read at a time where whole matrices are streamed: 4 MiB of f32.
pub(crate) const BLOCK_WEIGHTS: usize = 1 << 20;

/// Where the parameters of an open model lie.
#[derive(Debug)]
pub(crate) enum Weights {
    /// Trits and scales; norms in f32.
    Packed { file: TensorFile, group_size: usize },
    /// One value for each weight.
    Values(Shards),
    /// Codes `t + 1` in words, with scales and biases; a matrix without scales is values.
    Mlx { shards: Shards, group_size: usize },
    /// Codes `t + 2` in words, with scales; a matrix without packed weights is values.
    Compressed { shards: Shards, group_size: usize },
    /// Blocks, or values.
    Gguf(GgufFile),
}

/// Which rows of which matrix.
#[derive(Clone, Debug)]
pub(crate) struct Block<'a> {
    /// Hugging Face name of the matrix.
    pub(crate) name: &'a str,
    /// Rows to read.
    pub(crate) rows: Range<usize>,
    /// Columns of the matrix.
    pub(crate) cols: usize,
}

impl Weights {
    /// Rows of a matrix. With `group_size` the result is ternary with such groups.
    ///
    /// # Errors
    /// Bytes that are no trits, scales that are none, groups that need more than one
    /// scale, and values that are not ternary, each with its place.
    pub(crate) fn rows(
        &self,
        block: &Block<'_>,
        group_size: Option<usize>,
    ) -> Result<Matrix, IoError> {
        let stored = match self {
            Self::Gguf(file) => match file.rows(block.name, block.rows.clone())? {
                GgufRows::Values(values) => Matrix::Dense(values),
                GgufRows::Blocks(kind, bytes) => {
                    let size = group_size.unwrap_or(kind.block_weights());
                    let shape = (block.rows.clone(), block.cols);
                    let blocks = (kind, bytes.as_slice());
                    Matrix::Ternary(file.decode(block.name, blocks, shape, size)?)
                }
            },
            other => other.stored(block)?,
        };
        match (stored, group_size) {
            (Matrix::Ternary(matrix), Some(size)) => {
                self.regrouped(block, matrix, size).map(Matrix::Ternary)
            }
            (Matrix::Dense(values), Some(size)) => {
                self.recovered(block, &values, size).map(Matrix::Ternary)
            }
            (stored, None) => Ok(stored),
        }
    }

    /// Whether the rows can be read with groups of each of `sizes`; those that cannot be
    /// are removed.
    pub(crate) fn retain_sizes(
        &self,
        block: &Block<'_>,
        sizes: &mut Vec<usize>,
    ) -> Result<(), IoError> {
        if let Self::Gguf(file) = self
            && let GgufRows::Blocks(kind, bytes) = file.rows(block.name, block.rows.clone())?
        {
            let shape = (block.rows.len(), block.cols);
            sizes.retain(|&size| blocks_fit((kind, &bytes), shape, size));
            return Ok(());
        }
        match self.rows(block, None)? {
            Matrix::Ternary(matrix) => sizes.retain(|&size| regroup::fits(&matrix, size)),
            Matrix::Dense(values) => {
                let fits = |size| PackedMatrix::from_effective(&values, block.cols, size).is_ok();
                sizes.retain(|&size| fits(size));
            }
        }
        Ok(())
    }

    /// The norm called `name`, in f32.
    pub(crate) fn norm(&self, name: &str) -> Result<Vec<f32>, IoError> {
        match self {
            Self::Packed { file, .. } => file.floats(name),
            Self::Gguf(file) => file.norm(name),
            Self::Values(shards) | Self::Mlx { shards, .. } | Self::Compressed { shards, .. } => {
                shards.floats(name)
            }
        }
    }

    /// The file that holds the parameter `name`.
    pub(crate) fn path_of(&self, name: &str) -> &Path {
        match self {
            Self::Packed { file, .. } => file.path(),
            Self::Gguf(file) => file.path(),
            Self::Values(shards) => shards.path_of(name),
            Self::Mlx { shards, .. } => shards.path_of(name),
            Self::Compressed { shards, .. } => {
                let packed = format!("{name}_packed");
                match shards.file_of(&packed) {
                    Some(file) => file.path(),
                    None => shards.path_of(name),
                }
            }
        }
    }

    /// Rows in the form in which safetensors files hold them.
    fn stored(&self, block: &Block<'_>) -> Result<Matrix, IoError> {
        match self {
            Self::Packed { file, group_size } => {
                packed_rows(file, block, *group_size).map(Matrix::Ternary)
            }
            Self::Mlx { shards, group_size } => mlx_rows(shards, block, *group_size),
            Self::Compressed { shards, group_size } => compressed_rows(shards, block, *group_size),
            Self::Values(shards) => value_rows(shards, block),
            Self::Gguf(file) => Err(missing(file.path(), block.name)),
        }
    }

    fn regrouped(
        &self,
        block: &Block<'_>,
        matrix: PackedMatrix,
        group_size: usize,
    ) -> Result<PackedMatrix, IoError> {
        let stored = matrix.group_size;
        regroup(matrix, group_size).map_err(|place| {
            let (row, column) = (block.rows.start + place.row, place.column);
            let problem = format!(
                "{} row {row} column {column}: the scale changes within a group of {group_size} \
                 (the file stores one for {stored} weights)",
                block.name
            );
            IoError::invalid(self.path_of(block.name), problem)
        })
    }

    fn recovered(
        &self,
        block: &Block<'_>,
        values: &[f32],
        group_size: usize,
    ) -> Result<PackedMatrix, IoError> {
        let matrix = PackedMatrix::from_effective(values, block.cols, group_size);
        matrix.map_err(|(row, column)| {
            let value = values[row * block.cols + column];
            let row = block.rows.start + row;
            let problem = format!(
                "{} row {row} column {column}: {value} is not ternary in its group of \
                 {group_size}",
                block.name
            );
            IoError::invalid(self.path_of(block.name), problem)
        })
    }
}

fn value_rows(shards: &Shards, block: &Block<'_>) -> Result<Matrix, IoError> {
    let file = file_with(shards, block.name)?;
    let values = file.float_rows(block.name, block.rows.clone())?;
    Ok(Matrix::Dense(values))
}

/// Reads and checks rows of a packed file whose header was checked.
fn packed_rows(
    file: &TensorFile,
    block: &Block<'_>,
    group_size: usize,
) -> Result<PackedMatrix, IoError> {
    let name = block.name;
    let scales = file.row_bytes(&format!("{name}.scales"), block.rows.clone())?;
    let matrix = PackedMatrix {
        rows: block.rows.len(),
        cols: block.cols,
        group_size,
        trits: file.row_bytes(&format!("{name}.trits"), block.rows.clone())?,
        scales: halves(&scales),
    };
    if let Some(problem) = bad_scale(&matrix, block.rows.start) {
        return Err(IoError::invalid(file.path(), format!("{name} {problem}")));
    }
    matrix.check().map_err(|(row, e)| {
        let row = block.rows.start + row;
        IoError::invalid(file.path(), format!("{name} row {row}: {e}"))
    })?;
    Ok(matrix)
}

/// Rows of an MLX matrix: `weight` in words, `scales`, and `biases = -scales`.
fn mlx_rows(shards: &Shards, block: &Block<'_>, group_size: usize) -> Result<Matrix, IoError> {
    let module = block.name.strip_suffix(".weight").unwrap_or(block.name);
    let scales_name = format!("{module}.scales");
    if shards.file_of(&scales_name).is_none() {
        return value_rows(shards, block);
    }
    let rows = &block.rows;
    let scales = exact_halves(shards, &scales_name, rows)?;
    let biases_name = format!("{module}.biases");
    let biases = file_with(shards, &biases_name)?.float_rows(&biases_name, rows.clone())?;
    let bad = |(scale, bias): (&f16, &f32)| scale.to_f32() != -bias;
    if let Some(i) = scales.iter().zip(&biases).position(bad) {
        let groups = block.cols / group_size;
        let problem = format!(
            "{biases_name} row {} group {}: bias {} with scale {} is not ternary (the bias must \
             be the negative scale); mlx_lm.convert -q rounds ternary weights, so write the MLX \
             files with setun convert --to mlx",
            rows.start + i / groups,
            i % groups,
            biases[i],
            scales[i]
        );
        return Err(IoError::invalid(shards.path_of(&biases_name), problem));
    }
    let file = file_with(shards, block.name)?;
    let words = words(&file.row_bytes(block.name, rows.clone())?);
    from_mlx_words(rows.len(), block.cols, group_size, &words, &scales)
        .map(Matrix::Ternary)
        .map_err(|e| words_error(file, block, &e))
}

/// Rows of a compressed-tensors matrix: `weight_packed` in words and `weight_scale`.
fn compressed_rows(
    shards: &Shards,
    block: &Block<'_>,
    group_size: usize,
) -> Result<Matrix, IoError> {
    let packed_name = format!("{}_packed", block.name);
    let Some(file) = shards.file_of(&packed_name) else {
        return value_rows(shards, block);
    };
    let rows = &block.rows;
    let scales = exact_halves(shards, &format!("{}_scale", block.name), rows)?;
    let words = words(&file.row_bytes(&packed_name, rows.clone())?);
    from_compressed_words(rows.len(), block.cols, group_size, &words, &scales)
        .map(Matrix::Ternary)
        .map_err(|e| words_error(file, block, &e))
}

/// Scales of any float type that f16 holds exactly.
fn exact_halves(shards: &Shards, name: &str, rows: &Range<usize>) -> Result<Vec<f16>, IoError> {
    let file = file_with(shards, name)?;
    let values = file.float_rows(name, rows.clone())?;
    let halves: Vec<f16> = values.iter().map(|&v| f16::from_f32(v)).collect();
    let unfit = |(half, value): (&f16, &f32)| half.to_f32() != *value || value.is_sign_negative();
    match halves.iter().zip(&values).position(unfit) {
        None => Ok(halves),
        Some(i) => {
            let groups = values.len() / rows.len().max(1);
            let (row, group) = (rows.start + i / groups, i % groups);
            let problem = format!(
                "{name} row {row} group {group}: scale {} is negative or not exact in f16",
                values[i]
            );
            Err(IoError::invalid(file.path(), problem))
        }
    }
}

fn file_with<'a>(shards: &'a Shards, name: &str) -> Result<&'a TensorFile, IoError> {
    let file = shards.file_of(name);
    file.ok_or_else(|| missing(shards.path_of(name), name))
}

fn words_error(file: &TensorFile, block: &Block<'_>, error: &dyn std::fmt::Display) -> IoError {
    let problem = match block.rows.start {
        0 => format!("{}: {error}", block.name),
        first => format!("{}, rows counted from {first}: {error}", block.name),
    };
    IoError::invalid(file.path(), problem)
}

fn words(bytes: &[u8]) -> Vec<u32> {
    let words = bytes.as_chunks::<4>().0.iter();
    words.map(|&b| u32::from_le_bytes(b)).collect()
}

fn halves(bytes: &[u8]) -> Vec<f16> {
    let halves = bytes.as_chunks::<2>().0.iter();
    halves.map(|&b| f16::from_le_bytes(b)).collect()
}

/// Blocks of rows of about `block_weights` weights that cover a matrix in order.
pub(crate) fn row_blocks(
    rows: usize,
    cols: usize,
    block_weights: usize,
) -> impl Iterator<Item = Range<usize>> {
    let step = (block_weights / cols.max(1)).max(1);
    let starts = (0..rows).step_by(step);
    starts.map(move |start| start..rows.min(start + step))
}
