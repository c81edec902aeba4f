//! One parameter at a time into the tensors of a file: rows arrive in blocks, codes are
//! written as they come, scales follow behind them.

use crate::export::ExportDtype;
use crate::hash::canonical_scales;
use crate::layout::{bad_scale, negative_or_infinite};
use crate::regroup::regroup;
use crate::{IoError, Matrix, TensorSource, TernaryHasher};
use half::f16;
use setun_formats::config::ParameterInfo;
use setun_formats::packed::TernaryInfo;
use setun_formats::tensors::{Dtype, TensorInfo};
use setun_ternary::blocks::{BlockType, encode_matrix};
use setun_ternary::words::{compressed_words, mlx_words};
use setun_ternary::{PackedMatrix, groups_per_row, packed_row_bytes};
use std::io::Write;

/// How a matrix is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Encoding {
    /// One number for each weight; with `exact`, rounding is an error.
    Values { dtype: ExportDtype, exact: bool },
    /// Setun's trits and scales.
    Packed,
    /// MLX words with groups of this size.
    Mlx { group_size: usize },
    /// compressed-tensors words with groups of this size.
    Compressed { group_size: usize },
    /// GGUF blocks.
    Blocks(BlockType),
}

/// One parameter and the tensors that hold it.
#[derive(Clone, Debug)]
pub(crate) struct Item {
    pub(crate) parameter: ParameterInfo,
    pub(crate) encoding: Encoding,
    /// Its tensors in a safetensors file, in the order in which they are written; empty
    /// for GGUF.
    pub(crate) tensors: Vec<TensorInfo>,
}

impl Item {
    /// A parameter stored with `encoding`; norms are always f32 values.
    pub(crate) fn new(
        parameter: ParameterInfo,
        encoding: Encoding,
        ternary: Option<&TernaryInfo>,
    ) -> Self {
        let encoding = match parameter.is_matrix() {
            true => encoding,
            false => Encoding::Values {
                dtype: ExportDtype::F32,
                exact: true,
            },
        };
        let tensors = tensors_of(&parameter, encoding, ternary);
        Self {
            parameter,
            encoding,
            tensors,
        }
    }

    /// Bytes of its tensors in a safetensors file.
    pub(crate) fn num_bytes(&self) -> u64 {
        let bytes = self.tensors.iter().filter_map(TensorInfo::num_bytes);
        bytes.sum()
    }
}

fn tensors_of(
    parameter: &ParameterInfo,
    encoding: Encoding,
    ternary: Option<&TernaryInfo>,
) -> Vec<TensorInfo> {
    let name = &parameter.name;
    let tensor = |name: String, dtype: Dtype, shape: &[usize]| TensorInfo {
        name,
        dtype,
        shape: shape.to_vec(),
    };
    let &[rows, cols] = parameter.shape.as_slice() else {
        return vec![tensor(name.clone(), Dtype::F32, &parameter.shape)];
    };
    match encoding {
        Encoding::Values { dtype, .. } => {
            vec![tensor(name.clone(), dtype.dtype(), &[rows, cols])]
        }
        Encoding::Packed => {
            let size = ternary.map_or(cols, |ternary| ternary.group_size);
            let (bytes, groups) = (packed_row_bytes(cols, size), groups_per_row(cols, size));
            vec![
                tensor(format!("{name}.trits"), Dtype::U8, &[rows, bytes]),
                tensor(format!("{name}.scales"), Dtype::F16, &[rows, groups]),
            ]
        }
        Encoding::Mlx { group_size } => {
            let module = name.strip_suffix(".weight").unwrap_or(name);
            let groups = [rows, cols / group_size];
            vec![
                tensor(name.clone(), Dtype::U32, &[rows, cols / 16]),
                tensor(format!("{module}.scales"), Dtype::F16, &groups),
                tensor(format!("{module}.biases"), Dtype::F16, &groups),
            ]
        }
        Encoding::Compressed { group_size } => {
            let groups = [rows, cols / group_size];
            vec![
                tensor(format!("{name}_packed"), Dtype::I32, &[rows, cols / 16]),
                tensor(format!("{name}_scale"), Dtype::F16, &groups),
                tensor(format!("{name}_shape"), Dtype::I64, &[2]),
            ]
        }
        Encoding::Blocks(_) => Vec::new(),
    }
}

/// Writes the payloads of items, and hashes the ternary matrices that pass.
pub(crate) struct Encoder<'a> {
    source: &'a dyn TensorSource,
    ternary: Option<&'a TernaryInfo>,
    hasher: TernaryHasher,
}

impl<'a> Encoder<'a> {
    pub(crate) fn new(source: &'a dyn TensorSource, ternary: Option<&'a TernaryInfo>) -> Self {
        Self {
            source,
            ternary,
            hasher: TernaryHasher::new(),
        }
    }

    /// The ternary hash of all that was written.
    pub(crate) fn finish(self) -> String {
        self.hasher.finish()
    }

    /// Writes the payload of one item, little-endian.
    ///
    /// # Errors
    /// A matrix that is float where it must be ternary, or of another shape; a value or a
    /// group that the encoding cannot hold; what the source and `out` return.
    pub(crate) fn write(&mut self, out: &mut dyn Write, item: &Item) -> Result<(), IoError> {
        let parameter = &item.parameter;
        if !parameter.is_matrix() {
            return put(out, &norm_bytes(parameter, self.source)?);
        }
        match (item.encoding, self.ternary) {
            (Encoding::Values { dtype, exact }, None) => {
                self.write_dense(out, parameter, dtype, exact)
            }
            (Encoding::Values { dtype, .. }, Some(_)) => {
                self.write_effective(out, parameter, dtype)
            }
            (Encoding::Packed, _) => self.write_packed(out, parameter),
            (Encoding::Mlx { group_size }, _) => self.write_mlx(out, parameter, group_size),
            (Encoding::Compressed { group_size }, _) => {
                self.write_compressed(out, parameter, group_size)
            }
            (Encoding::Blocks(block), _) => self.write_blocks(out, parameter, block),
        }
    }

    fn write_dense(
        &mut self,
        out: &mut dyn Write,
        parameter: &ParameterInfo,
        dtype: ExportDtype,
        exact: bool,
    ) -> Result<(), IoError> {
        let (name, cols) = (&parameter.name, parameter.shape[1]);
        let mut num_values = 0;
        self.source
            .for_each_block(parameter, &mut |first, matrix| {
                let Matrix::Dense(values) = matrix else {
                    return Err(IoError::Refused(format!(
                        "{name} is ternary: the export must record its group size and numerics"
                    )));
                };
                num_values += values.len();
                for (row, values) in values.chunks(cols).enumerate() {
                    put(out, &row_bytes(name, first + row, values, dtype, exact)?)?;
                }
                Ok(())
            })?;
        if num_values == parameter.numel() {
            return Ok(());
        }
        Err(IoError::Refused(format!(
            "{name} has {num_values} values, the config asks for {:?}",
            parameter.shape
        )))
    }

    fn write_effective(
        &mut self,
        out: &mut dyn Write,
        parameter: &ParameterInfo,
        dtype: ExportDtype,
    ) -> Result<(), IoError> {
        let (name, mut values) = (&parameter.name, vec![0.0; parameter.shape[1]]);
        self.for_each_ternary(parameter, true, &mut |first, matrix| {
            for row in 0..matrix.rows {
                matrix
                    .dequantize_row(row, &mut values)
                    .map_err(|e| IoError::Refused(format!("{name} row {}: {e}", first + row)))?;
                put(out, &row_bytes(name, first + row, &values, dtype, true)?)?;
            }
            Ok(())
        })
    }

    fn write_packed(
        &mut self,
        out: &mut dyn Write,
        parameter: &ParameterInfo,
    ) -> Result<(), IoError> {
        let mut scales = Vec::new();
        self.for_each_ternary(parameter, true, &mut |_, matrix| {
            scales.extend_from_slice(&matrix.scales);
            put(out, &matrix.trits)
        })?;
        put_halves(out, &scales)
    }

    fn write_mlx(
        &mut self,
        out: &mut dyn Write,
        parameter: &ParameterInfo,
        group_size: usize,
    ) -> Result<(), IoError> {
        let mut scales = Vec::new();
        self.for_each_ternary(parameter, false, &mut |first, matrix| {
            let matrix = grouped(parameter, first, matrix, group_size)?;
            let words = mlx_words(&matrix).map_err(|e| unfit(parameter, first, &e))?;
            scales.extend_from_slice(&matrix.scales);
            put_words(out, &words)
        })?;
        put_halves(out, &scales)?;
        for scale in &mut scales {
            // No negative zero: its sign would say something.
            if *scale != f16::ZERO {
                *scale = -*scale;
            }
        }
        put_halves(out, &scales)
    }

    fn write_compressed(
        &mut self,
        out: &mut dyn Write,
        parameter: &ParameterInfo,
        group_size: usize,
    ) -> Result<(), IoError> {
        let mut scales = Vec::new();
        self.for_each_ternary(parameter, false, &mut |first, matrix| {
            let matrix = grouped(parameter, first, matrix, group_size)?;
            let words = compressed_words(&matrix).map_err(|e| unfit(parameter, first, &e))?;
            scales.extend_from_slice(&matrix.scales);
            put_words(out, &words)
        })?;
        put_halves(out, &scales)?;
        for &n in &parameter.shape {
            put(out, &(n as i64).to_le_bytes())?;
        }
        Ok(())
    }

    fn write_blocks(
        &mut self,
        out: &mut dyn Write,
        parameter: &ParameterInfo,
        block: BlockType,
    ) -> Result<(), IoError> {
        self.for_each_ternary(parameter, false, &mut |first, matrix| {
            let bytes = encode_matrix(block, &matrix).map_err(|e| unfit(parameter, first, &e))?;
            put(out, &bytes)
        })
    }

    /// Passes a matrix by, checked and hashed. With `bf16_scales`, scales must be exact in
    /// bf16.
    fn for_each_ternary(
        &mut self,
        parameter: &ParameterInfo,
        bf16_scales: bool,
        each: &mut dyn FnMut(usize, PackedMatrix) -> Result<(), IoError>,
    ) -> Result<(), IoError> {
        let (name, shape) = (&parameter.name, &parameter.shape);
        let Some(ternary) = self.ternary else {
            return Err(float_matrix(name));
        };
        let (rows, cols, group_size) = (shape[0], shape[1], ternary.group_size);
        let hasher = &mut self.hasher;
        hasher.begin(name, rows, cols, group_size);
        let (mut num_rows, mut scales) = (0, Vec::new());
        self.source
            .for_each_block(parameter, &mut |first, matrix| {
                let Matrix::Ternary(matrix) = matrix else {
                    return Err(float_matrix(name));
                };
                num_rows += matrix.rows;
                let found = (num_rows, matrix.cols, matrix.group_size);
                if num_rows > rows || (found.1, found.2) != (cols, group_size) {
                    return Err(wrong_shape(name, found, (rows, cols, group_size)));
                }
                let problem = match bf16_scales {
                    true => bad_scale(&matrix, first),
                    false => negative_or_infinite(&matrix, first),
                };
                if let Some(problem) = problem {
                    let remedy = match negative_or_infinite(&matrix, first) {
                        None => "; GGUF's ternary types and mlx can hold it",
                        Some(_) => "",
                    };
                    return Err(IoError::Refused(format!("{name} {problem}{remedy}")));
                }
                hasher.trits(&matrix.trits);
                scales.extend(canonical_scales(&matrix));
                each(first, matrix)
            })?;
        if num_rows != rows {
            let found = (num_rows, cols, group_size);
            return Err(wrong_shape(name, found, (rows, cols, group_size)));
        }
        hasher.scales(&scales);
        Ok(())
    }
}

fn grouped(
    parameter: &ParameterInfo,
    first_row: usize,
    matrix: PackedMatrix,
    group_size: usize,
) -> Result<PackedMatrix, IoError> {
    regroup(matrix, group_size).map_err(|place| {
        let (name, row) = (&parameter.name, first_row + place.row);
        let column = place.column;
        IoError::Refused(format!(
            "{name} row {row} column {column}: the scale changes within a group of {group_size}"
        ))
    })
}

fn unfit(parameter: &ParameterInfo, first_row: usize, why: &dyn std::fmt::Display) -> IoError {
    let name = &parameter.name;
    IoError::Refused(match first_row {
        0 => format!("{name}: {why}"),
        first => format!("{name}, rows counted from {first}: {why}"),
    })
}

fn float_matrix(name: &str) -> IoError {
    IoError::Refused(format!(
        "{name} is a float matrix: a ternary export needs every matrix ternary; \
         export the model as dense instead"
    ))
}

fn wrong_shape(
    name: &str,
    found: (usize, usize, usize),
    expected: (usize, usize, usize),
) -> IoError {
    IoError::Refused(format!(
        "{name} has (rows, columns, group size) {found:?}, expected {expected:?}"
    ))
}

/// One row in `dtype`; with `exact`, rounding is an error too.
fn row_bytes(
    name: &str,
    row: usize,
    values: &[f32],
    dtype: ExportDtype,
    exact: bool,
) -> Result<Vec<u8>, IoError> {
    let mut bytes = Vec::with_capacity(4 * values.len());
    for (column, &value) in values.iter().enumerate() {
        let stored = dtype.rounded(value);
        if !stored.is_finite() || exact && stored != value {
            let held = dtype.name();
            let remedy = match stored.is_finite() {
                true => "export another dtype, or convert with --lossy to round",
                false => "export another dtype",
            };
            return Err(IoError::Refused(format!(
                "{name} row {row} column {column}: {held} cannot hold {value}; {remedy}"
            )));
        }
        dtype.append(value, &mut bytes);
    }
    Ok(bytes)
}

fn norm_bytes(parameter: &ParameterInfo, source: &dyn TensorSource) -> Result<Vec<u8>, IoError> {
    let (name, values) = (&parameter.name, source.norm(&parameter.name)?);
    if values.len() != parameter.numel() {
        return Err(IoError::Refused(format!(
            "{name} has {} values, the config asks for {:?}",
            values.len(),
            parameter.shape
        )));
    }
    if let Some(i) = values.iter().position(|v| !v.is_finite()) {
        let value = values[i];
        return Err(IoError::Refused(format!("{name} element {i} is {value}")));
    }
    Ok(values.iter().flat_map(|v| v.to_le_bytes()).collect())
}

fn put(out: &mut dyn Write, bytes: &[u8]) -> Result<(), IoError> {
    out.write_all(bytes).map_err(IoError::Stream)
}

fn put_halves(out: &mut dyn Write, values: &[f16]) -> Result<(), IoError> {
    setun_formats::tensors::write_f16(out, values).map_err(IoError::Stream)
}

fn put_words(out: &mut dyn Write, words: &[u32]) -> Result<(), IoError> {
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    put(out, &bytes)
}
