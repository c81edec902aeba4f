//! A row of codes `t + 1` in two bits without gaps: the common ground of every format.
//!
//! Packed rows start each group on a byte. Blocks and words of other formats have no such
//! gaps, so codecs go through a row of `cols / 4` bytes, low bits first. Where groups are
//! whole bytes, that row is the packed row itself.

use crate::{PackError, PackedMatrix, pack_row, packed_row_bytes, unpack_row};
use half::f16;

/// Largest group that is read. A row takes at least the bytes of a whole group, so this
/// bounds what a few bytes of a file can ask for.
pub(crate) const MAX_GROUP_SIZE: usize = 1 << 16;

/// Copies the codes of row `row` to `codes`, which has `cols / 4` bytes; `cols` is a
/// multiple of 4.
///
/// # Errors
/// As [`unpack_row`].
pub(crate) fn read_row(
    matrix: &PackedMatrix,
    row: usize,
    codes: &mut [u8],
) -> Result<(), PackError> {
    let packed = matrix.row_bytes(row);
    let whole_groups = matrix.cols.is_multiple_of(matrix.group_size);
    if matrix.group_size.is_multiple_of(4) && whole_groups && !has_code_three(packed) {
        codes.copy_from_slice(packed);
        return Ok(());
    }
    let mut trits = vec![0i8; matrix.cols];
    matrix.unpack_row(row, &mut trits)?;
    pack_row(&trits, matrix.cols, codes);
    Ok(())
}

/// The inverse of [`read_row`]: packs `codes` into `packed`, which has
/// [`packed_row_bytes`] bytes.
///
/// # Errors
/// As [`unpack_row`].
pub(crate) fn write_row(
    codes: &[u8],
    group_size: usize,
    packed: &mut [u8],
) -> Result<(), PackError> {
    let cols = 4 * codes.len();
    let whole_groups = cols.is_multiple_of(group_size);
    if group_size.is_multiple_of(4) && whole_groups && !has_code_three(codes) {
        packed.copy_from_slice(codes);
        return Ok(());
    }
    let mut trits = vec![0i8; cols];
    unpack_row(codes, cols, &mut trits)?;
    pack_row(&trits, group_size, packed);
    Ok(())
}

/// Whether one of the four codes of a byte is 3, the code of no trit.
pub(crate) fn has_code_three(codes: &[u8]) -> bool {
    codes.iter().fold(0, |seen, code| seen | code & code >> 1) & 0x55 != 0
}

/// Whether the bytes and scales of `matrix` are as many as its shape asks for.
pub(crate) fn is_whole(matrix: &PackedMatrix) -> bool {
    let (rows, group_size) = (matrix.rows, matrix.group_size);
    if matrix.cols == 0 || group_size == 0 {
        return false;
    }
    let trits = rows.checked_mul(packed_row_bytes(matrix.cols, group_size));
    let scales = rows.checked_mul(matrix.groups());
    trits == Some(matrix.trits.len()) && scales == Some(matrix.scales.len())
}

/// Whether `scale` can be a group's: finite and not negative.
pub(crate) fn is_scale(scale: f16) -> bool {
    scale.is_finite() && scale.is_sign_positive()
}

/// Matrices for the tests of all codecs.
#[cfg(test)]
pub(crate) mod samples {
    use super::*;

    /// Pseudo-random numbers: the 64-bit congruential generator of Knuth's MMIX, upper
    /// half.
    pub struct Numbers(pub u64);

    impl Numbers {
        pub fn below(&mut self, n: u32) -> u32 {
            let (a, c) = (6_364_136_223_846_793_005, 1_442_695_040_888_963_407);
            self.0 = self.0.wrapping_mul(a).wrapping_add(c);
            (((self.0 >> 32) * u64::from(n)) >> 32) as u32
        }
    }

    /// A matrix of random trits. Groups of one run of `span` weights share a scale.
    pub fn matrix(
        seed: u64,
        rows: usize,
        cols: usize,
        group_size: usize,
        span: usize,
    ) -> PackedMatrix {
        let mut numbers = Numbers(seed);
        let trits: Vec<i8> = (0..rows * cols)
            .map(|_| numbers.below(3) as i8 - 1)
            .collect();
        let mut scales = Vec::new();
        for _ in 0..rows {
            let mut scale = 0.0;
            for column in (0..cols).step_by(group_size) {
                if column % span == 0 {
                    // Zero, subnormal, ordinary and the largest f16.
                    let bits = [0, 1, 0x7bff, 0x0400 + numbers.below(0x7000) as u16];
                    scale = f16::from_bits(bits[numbers.below(8).min(3) as usize]).to_f32();
                }
                scales.push(scale);
            }
        }
        PackedMatrix::from_trits(&trits, &scales, cols, group_size)
    }
}

#[cfg(test)]
mod tests {
    use super::samples::{Numbers, matrix};
    use super::*;

    #[test]
    fn rows_of_codes_round_trip_with_any_group() {
        let mut numbers = Numbers(7);
        for _ in 0..if cfg!(miri) { 10 } else { 300 } {
            let cols = 4 * (1 + numbers.below(80) as usize);
            let group_size = 1 + numbers.below(400) as usize;
            let m = matrix(u64::from(numbers.below(1 << 30)), 1, cols, group_size, 1);
            let mut codes = vec![0xff; cols / 4];
            read_row(&m, 0, &mut codes).unwrap();
            assert!(!has_code_three(&codes));
            let mut packed = vec![0xff; m.trits.len()];
            write_row(&codes, group_size, &mut packed).unwrap();
            assert_eq!(packed, m.trits, "{cols} in {group_size}");
            let at = numbers.below(cols as u32) as usize;
            codes[at / 4] |= 3 << (2 * (at % 4));
            let why = write_row(&codes, group_size, &mut packed);
            assert_eq!(why, Err(PackError::BadCode { column: at }));
        }
    }
}
