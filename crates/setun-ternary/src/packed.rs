//! Packed trits: code `t + 1` in two bits, low bits first, each group on a byte boundary.

use crate::{ScaleRule, groups_per_row, project::ScaleError, project_group};
use half::f16;
use thiserror::Error;

/// Why packed bytes are not a ternary matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum PackError {
    /// Code 3 stands for no trit.
    #[error("code 3 at column {column}: no trit has that code")]
    BadCode {
        /// Column of the weight in its row.
        column: usize,
    },
    /// The unused bits behind a short group are not zero.
    #[error("padding bits behind group {group} are not zero")]
    BadPadding {
        /// Group in its row.
        group: usize,
    },
}

/// Bytes of one packed row of `cols` trits: `groups * ceil(group_size / 4)`.
pub fn packed_row_bytes(cols: usize, group_size: usize) -> usize {
    groups_per_row(cols, group_size) * group_size.div_ceil(4)
}

/// Packs one row of trits into `bytes`, which has [`packed_row_bytes`] bytes.
pub fn pack_row(trits: &[i8], group_size: usize, bytes: &mut [u8]) {
    bytes.fill(0);
    let stride = group_size.div_ceil(4);
    for (group, out) in trits.chunks(group_size).zip(bytes.chunks_mut(stride)) {
        for (byte, four) in out.iter_mut().zip(group.chunks(4)) {
            for (i, &trit) in four.iter().enumerate() {
                *byte |= ((trit + 1) as u8) << (2 * i);
            }
        }
    }
}

/// Unpacks one row into `trits`; the inverse of [`pack_row`].
///
/// # Errors
/// Code 3, and bits behind the last trit of a group that are not zero.
pub fn unpack_row(bytes: &[u8], group_size: usize, trits: &mut [i8]) -> Result<(), PackError> {
    let stride = group_size.div_ceil(4);
    let groups = trits.chunks_mut(group_size).zip(bytes.chunks(stride));
    for (group, (out, packed)) in groups.enumerate() {
        for (i, trit) in out.iter_mut().enumerate() {
            let code = packed[i / 4] >> (2 * (i % 4)) & 3;
            if code == 3 {
                let column = group * group_size + i;
                return Err(PackError::BadCode { column });
            }
            *trit = code as i8 - 1;
        }
        let used = out.len();
        let padded = (used..4 * stride).any(|i| packed[i / 4] >> (2 * (i % 4)) & 3 != 0);
        if padded {
            return Err(PackError::BadPadding { group });
        }
    }
    Ok(())
}

/// A ternary matrix as it is stored: `NAME.trits` and `NAME.scales` of the packed file.
#[derive(Clone, Debug, PartialEq)]
pub struct PackedMatrix {
    /// Rows, the output dimension.
    pub rows: usize,
    /// Columns, the input dimension.
    pub cols: usize,
    /// Weights that share a scale.
    pub group_size: usize,
    /// `[rows, packed_row_bytes]`, row-major.
    pub trits: Vec<u8>,
    /// `[rows, groups]`, row-major.
    pub scales: Vec<f16>,
}

impl PackedMatrix {
    /// Projects latent weights `[rows, cols]`.
    ///
    /// # Errors
    /// `(row, group, why)` of the first group that has no scale.
    pub fn from_latents(
        latents: &[f32],
        cols: usize,
        group_size: usize,
        rule: ScaleRule,
    ) -> Result<Self, (usize, usize, ScaleError)> {
        let rows = latents.len() / cols;
        let mut trits = vec![0i8; rows * cols];
        let mut scales = Vec::with_capacity(rows * groups_per_row(cols, group_size));
        let both = latents.chunks(cols).zip(trits.chunks_mut(cols));
        for (r, (latent_row, trit_row)) in both.enumerate() {
            let groups = latent_row
                .chunks(group_size)
                .zip(trit_row.chunks_mut(group_size));
            for (g, (latents, trits)) in groups.enumerate() {
                let scale = project_group(latents, rule, trits).map_err(|why| (r, g, why))?;
                scales.push(scale);
            }
        }
        Ok(Self::from_trits(&trits, &scales, cols, group_size))
    }

    /// Packs trits `[rows, cols]` and their scales `[rows, groups]`, which f16 holds.
    pub fn from_trits(trits: &[i8], scales: &[f32], cols: usize, group_size: usize) -> Self {
        let rows = trits.len() / cols;
        let row_bytes = packed_row_bytes(cols, group_size);
        let mut packed = vec![0u8; rows * row_bytes];
        for (row, bytes) in trits.chunks(cols).zip(packed.chunks_mut(row_bytes)) {
            pack_row(row, group_size, bytes);
        }
        let scales = scales.iter().map(|&s| f16::from_f32(s)).collect();
        Self {
            rows,
            cols,
            group_size,
            trits: packed,
            scales,
        }
    }

    /// Checks that every code is a trit's and all padding is zero, without unpacking.
    ///
    /// # Errors
    /// The first bad row, and what [`unpack_row`] says about it.
    pub fn check(&self) -> Result<(), (usize, PackError)> {
        let stride = self.group_size.div_ceil(4);
        let used = self.cols - (self.groups() - 1) * self.group_size;
        for row in 0..self.rows {
            let bytes = self.row_bytes(row);
            // Code 3 has both bits set. What is behind the last weight is zero.
            let bad = bytes.iter().fold(0, |bad, b| bad | (b & b >> 1 & 0x55));
            let last = &bytes[bytes.len() - stride..];
            let padded = (used..4 * stride).any(|i| last[i / 4] >> (2 * (i % 4)) & 3 != 0);
            let inner = !self.group_size.is_multiple_of(4);
            if bad != 0 || padded || inner {
                let mut trits = vec![0i8; self.cols];
                self.unpack_row(row, &mut trits).map_err(|e| (row, e))?;
            }
        }
        Ok(())
    }

    /// Groups of a row.
    pub fn groups(&self) -> usize {
        groups_per_row(self.cols, self.group_size)
    }

    /// The packed bytes of row `row`.
    pub fn row_bytes(&self, row: usize) -> &[u8] {
        let n = packed_row_bytes(self.cols, self.group_size);
        &self.trits[row * n..(row + 1) * n]
    }

    /// Unpacks row `row` into `trits`, which has `cols` elements.
    ///
    /// # Errors
    /// As [`unpack_row`].
    pub fn unpack_row(&self, row: usize, trits: &mut [i8]) -> Result<(), PackError> {
        unpack_row(self.row_bytes(row), self.group_size, trits)
    }

    /// The scales of row `row`, one for each group.
    pub fn row_scales(&self, row: usize) -> &[f16] {
        &self.scales[row * self.groups()..(row + 1) * self.groups()]
    }

    /// Effective weights `s * t` of row `row`, exact in f32, f16 and bf16.
    ///
    /// # Errors
    /// As [`unpack_row`].
    pub fn dequantize_row(&self, row: usize, weights: &mut [f32]) -> Result<(), PackError> {
        let mut trits = vec![0i8; self.cols];
        self.unpack_row(row, &mut trits)?;
        let groups = weights
            .chunks_mut(self.group_size)
            .zip(trits.chunks(self.group_size));
        for ((weights, trits), scale) in groups.zip(self.row_scales(row)) {
            for (w, &t) in weights.iter_mut().zip(trits) {
                *w = f32::from(t) * scale.to_f32();
            }
        }
        Ok(())
    }

    /// The ternary matrix behind effective weights `[rows, cols]`, if they are exactly
    /// one: the scale of a group is its largest magnitude, never its mean.
    ///
    /// # Errors
    /// `(row, column)` of the first weight that is not in {-s, 0, +s}, or whose group's
    /// scale f16 does not hold.
    pub fn from_effective(
        weights: &[f32],
        cols: usize,
        group_size: usize,
    ) -> Result<Self, (usize, usize)> {
        let mut trits = vec![0i8; weights.len()];
        let mut scales = Vec::new();
        for (row, (weights, trits)) in weights.chunks(cols).zip(trits.chunks_mut(cols)).enumerate()
        {
            let groups = weights.chunks(group_size).zip(trits.chunks_mut(group_size));
            for (g, (weights, trits)) in groups.enumerate() {
                let scale = weights.iter().fold(0.0f32, |max, w| max.max(w.abs()));
                let bad = |w: &f32| !(*w == 0.0 || w.abs() == scale);
                let unfit = scale.is_nan() || f16::from_f32(scale).to_f32() != scale;
                if let Some(i) = weights.iter().position(|w| unfit || bad(w)) {
                    return Err((row, g * group_size + i));
                }
                for (t, &w) in trits.iter_mut().zip(weights) {
                    *t = i8::from(w > 0.0) - i8::from(w < 0.0);
                }
                scales.push(scale);
            }
        }
        Ok(Self::from_trits(&trits, &scales, cols, group_size))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trits(n: usize) -> Vec<i8> {
        (0..n).map(|i| (i * 7 % 11 % 3) as i8 - 1).collect()
    }

    #[test]
    fn pack_and_unpack_over_odd_sizes() {
        for group_size in [1, 3, 5, 32, 128] {
            for cols in (1..=140).step_by(if cfg!(miri) { 9 } else { 1 }) {
                let t = trits(cols);
                let mut bytes = vec![0xff; packed_row_bytes(cols, group_size)];
                pack_row(&t, group_size, &mut bytes);
                let mut back = vec![9; cols];
                unpack_row(&bytes, group_size, &mut back).unwrap();
                assert_eq!(t, back);
            }
        }
    }

    #[test]
    fn code_three_and_dirty_padding_are_named() {
        let mut bytes = vec![0u8; packed_row_bytes(6, 5)];
        pack_row(&trits(6), 5, &mut bytes);
        let mut out = [0i8; 6];
        let good = bytes.clone();
        bytes[2] |= 3;
        assert_eq!(
            unpack_row(&bytes, 5, &mut out),
            Err(PackError::BadCode { column: 5 })
        );
        bytes = good;
        bytes[1] |= 0b0100;
        assert_eq!(
            unpack_row(&bytes, 5, &mut out),
            Err(PackError::BadPadding { group: 0 })
        );
    }

    #[test]
    fn the_check_finds_what_unpacking_finds() {
        for (cols, group_size) in [(6, 5), (70, 32), (64, 64)] {
            let latents: Vec<f32> = (0..3 * cols).map(|i| (i % 7) as f32 - 3.0).collect();
            let good = PackedMatrix::from_latents(&latents, cols, group_size, ScaleRule::Mean);
            let good = good.unwrap();
            assert_eq!(good.check(), Ok(()));
            // Miri takes thousands of times as long.
            let step = if cfg!(miri) { 29 } else { 1 };
            for bit in (0..8 * good.trits.len()).step_by(step) {
                let mut bad = good.clone();
                bad.trits[bit / 8] ^= 1 << (bit % 8);
                let mut out = vec![0; cols];
                let first = (0..3).find_map(|r| bad.unpack_row(r, &mut out).err().map(|e| (r, e)));
                assert_eq!(bad.check().err(), first);
            }
        }
    }

    #[test]
    fn effective_weights_give_the_matrix_back() {
        let latents: Vec<f32> = (0..3 * 70)
            .map(|i| ((i * 37 % 101) as f32 - 50.0) / 50.0)
            .collect();
        let m = PackedMatrix::from_latents(&latents, 70, 32, ScaleRule::Mean).unwrap();
        let mut w = vec![0.0; 3 * 70];
        for (r, row) in w.chunks_mut(70).enumerate() {
            m.dequantize_row(r, row).unwrap();
        }
        assert_eq!(PackedMatrix::from_effective(&w, 70, 32), Ok(m));
        w[2 * 70 + 5] *= 1.5;
        // The largest magnitude of the group is now the wrong one: its neighbours are off.
        let (row, column) = PackedMatrix::from_effective(&w, 70, 32).unwrap_err();
        assert!(row == 2 && column < 32);
    }
}
