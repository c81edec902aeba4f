//! Rounding of activations, once, where they enter products (ARCHITECTURE.md, Numbers).

use crate::real::Real;
use half::bf16;

/// Rows of activations for products, being written.
pub enum ActRows<'a, R> {
    /// Unrounded, `[rows, width]`.
    Real(&'a mut [R]),
    /// `[rows, width]`.
    Bf16(&'a mut [bf16]),
    /// int8 values and the scales of their groups.
    Int8 {
        /// `[rows, width]`.
        q: &'a mut [i8],
        /// `[rows, groups]`.
        scales: &'a mut [f32],
        /// Values that share a scale.
        group_size: usize,
    },
}

impl<R: Real> ActRows<'_, R> {
    /// Writes row `row` of rows as wide as `x`.
    #[inline(always)]
    pub fn write_row(&mut self, row: usize, x: &[R]) {
        let width = x.len();
        let at = row * width..(row + 1) * width;
        match self {
            Self::Real(y) => y[at].copy_from_slice(x),
            Self::Bf16(y) => round_bf16(x, &mut y[at]),
            Self::Int8 {
                q,
                scales,
                group_size,
            } => {
                let groups = width.div_ceil(*group_size);
                let scales = &mut scales[row * groups..(row + 1) * groups];
                let parts = x.chunks(*group_size).zip(q[at].chunks_mut(*group_size));
                for ((x, q), scale) in parts.zip(scales) {
                    *scale = round_int8(x, q);
                }
            }
        }
    }
}

/// `y = bf16(x)`.
#[inline(always)]
pub fn round_bf16<R: Real>(x: &[R], y: &mut [bf16]) {
    for (y, &x) in y.iter_mut().zip(x) {
        *y = x.to_bf16();
    }
}

/// Rounds one group to int8 and returns `a`: `a = absmax / 127`,
/// `q = clamp(round_half_even(x / a), -127, 127)`; zeros where `a < 2^-126`; NaN where
/// a value is not finite, so that the guard sees it.
#[inline(always)]
pub fn round_int8<R: Real>(x: &[R], q: &mut [i8]) -> f32 {
    /// Adding it rounds to the nearest integer, ties to even.
    const ROUND: f32 = 12_582_912.0;
    // The largest magnitude as an integer: finite order, infinities and NaN on top.
    let bits = |x: &R| x.to_f32().to_bits() & 0x7fff_ffff;
    let largest = x.iter().fold(0u32, |max, x| max.max(bits(x)));
    if largest >= 0x7f80_0000 {
        q.fill(0);
        return f32::NAN;
    }
    let a = f32::from_bits(largest) / 127.0;
    if a < f32::MIN_POSITIVE {
        q.fill(0);
        return 0.0;
    }
    for (q, &x) in q.iter_mut().zip(x) {
        let ratio = (x.to_f32() / a).clamp(-127.0, 127.0);
        let shifted = (ratio + ROUND).to_bits();
        *q = shifted.wrapping_sub(ROUND.to_bits()) as i32 as i8;
    }
    a
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn int8_follows_its_definition() {
        let x: Vec<f32> = (0..200)
            .map(|i| ((i * 37 % 199) as f32 - 99.0) * 0.013)
            .collect();
        let mut q = vec![0i8; 200];
        let a = round_int8(&x, &mut q);
        assert_eq!(a, x.iter().fold(0.0f32, |m, x| m.max(x.abs())) / 127.0);
        for (x, q) in x.iter().zip(&q) {
            assert_eq!(
                f32::from(*q),
                (x / a).round_ties_even().clamp(-127.0, 127.0)
            );
        }
        assert!(q.contains(&127) || q.contains(&-127));
    }

    #[test]
    fn int8_of_nothing_and_of_nan() {
        let mut q = [5i8; 3];
        assert_eq!(round_int8(&[0.0f32, 1e-40, 0.0], &mut q), 0.0);
        assert_eq!(q, [0; 3]);
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            assert!(round_int8(&[1.0, bad, 2.0], &mut q).is_nan());
        }
    }
}
