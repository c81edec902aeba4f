//! Other group sizes for the same trits.
//!
//! A scale that is repeated says the same as one scale for the larger group, so groups
//! can be split freely and joined where their scales agree. Joining others changes the
//! model; [`widen`] does that when it is asked for by name.

use half::{bf16, f16};
use setun_ternary::{PackError, PackedMatrix, groups_per_row};

/// The first place where groups cannot be joined.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Disagreement {
    /// Row of the matrix.
    pub(crate) row: usize,
    /// Column at which the scale changes within the larger group.
    pub(crate) column: usize,
}

/// Whether `matrix` can have groups of `group_size` without loss.
pub(crate) fn fits(matrix: &PackedMatrix, group_size: usize) -> bool {
    scales_for(matrix, group_size).is_ok()
}

/// The same matrix with groups of `group_size`.
///
/// # Errors
/// The first place where one larger group would need two scales.
pub(crate) fn regroup(
    matrix: PackedMatrix,
    group_size: usize,
) -> Result<PackedMatrix, Disagreement> {
    if matrix.group_size == group_size {
        return Ok(matrix);
    }
    let scales = scales_for(&matrix, group_size)?;
    Ok(with_scales(&matrix, scales, group_size))
}

/// Joins groups whatever their scales: the trits stay, and the new scale is the mean
/// magnitude of the non-zero weights, rounded to bf16. That is the least squares scale
/// for these trits.
pub(crate) fn widen(matrix: &PackedMatrix, group_size: usize) -> Result<PackedMatrix, PackError> {
    let mut scales = Vec::with_capacity(matrix.rows * groups_per_row(matrix.cols, group_size));
    let mut values = vec![0.0f32; matrix.cols];
    for row in 0..matrix.rows {
        matrix.dequantize_row(row, &mut values)?;
        for group in values.chunks(group_size) {
            let nonzero = group.iter().filter(|&&w| w != 0.0);
            let (sum, count) = nonzero.fold((0.0f64, 0usize), |(sum, count), w| {
                (sum + f64::from(w.abs()), count + 1)
            });
            let mean = bf16::from_f32((sum / count.max(1) as f64) as f32);
            scales.push(f16::from_f32(mean.to_f32()));
        }
    }
    Ok(with_scales(matrix, scales, group_size))
}

/// One scale for each group of `group_size`, where the scales of `matrix` allow it.
fn scales_for(matrix: &PackedMatrix, group_size: usize) -> Result<Vec<f16>, Disagreement> {
    let groups = groups_per_row(matrix.cols, group_size);
    let mut scales = Vec::with_capacity(matrix.rows * groups);
    for row in 0..matrix.rows {
        let old = matrix.row_scales(row);
        for start in (0..matrix.cols).step_by(group_size) {
            let end = matrix.cols.min(start + group_size);
            let first = start / matrix.group_size;
            let last = (end - 1) / matrix.group_size;
            let differs = |group: &usize| old[*group] != old[first];
            if let Some(group) = (first..=last).find(differs) {
                let column = group * matrix.group_size;
                return Err(Disagreement { row, column });
            }
            scales.push(old[first]);
        }
    }
    Ok(scales)
}

/// The trits of `matrix`, packed for groups of `group_size`, with these scales.
fn with_scales(matrix: &PackedMatrix, scales: Vec<f16>, group_size: usize) -> PackedMatrix {
    let trits = repack(matrix, group_size);
    PackedMatrix {
        rows: matrix.rows,
        cols: matrix.cols,
        group_size,
        trits,
        scales,
    }
}

/// Packed trits for another group size. Codes are copied, so that none is judged here.
fn repack(matrix: &PackedMatrix, group_size: usize) -> Vec<u8> {
    let old = matrix.group_size;
    let whole_bytes = old.is_multiple_of(4) && group_size.is_multiple_of(4);
    if whole_bytes && matrix.cols.is_multiple_of(old) && matrix.cols.is_multiple_of(group_size) {
        // No padding on either side: the bytes are the same.
        return matrix.trits.clone();
    }
    let new_row = setun_ternary::packed_row_bytes(matrix.cols, group_size);
    let mut trits = vec![0u8; matrix.rows * new_row];
    let (old_stride, new_stride) = (old.div_ceil(4), group_size.div_ceil(4));
    for (row, packed) in trits.chunks_mut(new_row.max(1)).enumerate() {
        let from = matrix.row_bytes(row);
        for column in 0..matrix.cols {
            let (group, i) = (column / old, column % old);
            let code = from[group * old_stride + i / 4] >> (2 * (i % 4)) & 3;
            let (group, i) = (column / group_size, column % group_size);
            packed[group * new_stride + i / 4] |= code << (2 * (i % 4));
        }
    }
    trits
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matrix(rows: usize, cols: usize, group_size: usize) -> PackedMatrix {
        let trits: Vec<i8> = (0..rows * cols)
            .map(|i| (i * 7 % 11 % 3) as i8 - 1)
            .collect();
        let groups = rows * groups_per_row(cols, group_size);
        let scales: Vec<f32> = (1..=groups).map(|i| i as f32 * 0.125).collect();
        PackedMatrix::from_trits(&trits, &scales, cols, group_size)
    }

    fn values(matrix: &PackedMatrix) -> Vec<f32> {
        let mut values = vec![0.0; matrix.rows * matrix.cols];
        for (row, values) in values.chunks_mut(matrix.cols).enumerate() {
            matrix.dequantize_row(row, values).unwrap();
        }
        values
    }

    #[test]
    fn splitting_and_joining_are_inverse() {
        for cols in [12, 96, 100, 128, 300] {
            for (large, small) in [(64, 32), (256, 128), (96, 32), (128, 10), (10, 5)] {
                let whole = matrix(3, cols, large);
                if large % small != 0 && cols > large {
                    // A small group would lie across the border of two large ones.
                    assert!(!fits(&whole, small));
                    continue;
                }
                let split = regroup(whole.clone(), small).unwrap();
                assert_eq!(split.scales.len(), 3 * groups_per_row(cols, small));
                assert_eq!(values(&split), values(&whole));
                assert_eq!(regroup(split, large), Ok(whole), "{cols} {large} {small}");
            }
        }
    }

    #[test]
    fn groups_that_differ_are_located() {
        let mut split = regroup(matrix(4, 256, 128), 32).unwrap();
        split.scales[2 * 8 + 5] = f16::from_f32(100.0);
        assert!(fits(&split, 32) && !fits(&split, 64));
        let place = Disagreement {
            row: 2,
            column: 160,
        };
        assert_eq!(regroup(split, 128), Err(place));
    }

    #[test]
    fn widening_keeps_the_trits_and_takes_the_mean_of_what_is_not_zero() {
        let trits = [1i8, 0, -1, 0, 1, 1, 1, 1];
        let narrow = PackedMatrix::from_trits(&trits, &[1.0, 4.0], 8, 4);
        let wide = widen(&narrow, 8).unwrap();
        assert_eq!(wide.scales, [f16::from_f32(3.0)]);
        let expected = trits.map(|t| 3.0 * f32::from(t));
        assert_eq!(values(&wide), expected);
        let zeros = PackedMatrix::from_trits(&[0; 8], &[0.0, 0.0], 8, 4);
        assert_eq!(widen(&zeros, 8).unwrap().scales, [f16::ZERO]);
    }
}
