//! Sixteen values of f32 in a register of AVX-512: operations whose bits are those of the generic
//! code of [`crate::real`].

use crate::real::exp;
use std::arch::x86_64::*;

/// Lanes of a register.
pub(crate) const W: usize = 16;

/// The first sixteen values.
#[inline]
#[target_feature(enable = "avx512f")]
pub(crate) fn load(x: &[f32]) -> __m512 {
    let x: &[f32; W] = x.first_chunk().expect("a register's values");
    // SAFETY: 16 values are there; the load needs no alignment.
    unsafe { _mm512_loadu_ps(x.as_ptr()) }
}

/// [`exp_small_f32`](crate::real::exp_small_f32)
#[inline]
#[target_feature(enable = "avx512f")]
pub(crate) fn exp_small(x: __m512) -> __m512 {
    let least = _mm512_set1_ps(exp::LEAST);
    let round = _mm512_set1_ps(exp::ROUND);
    // The second operand where either is NaN.
    let clamped = _mm512_max_ps(least, x);
    let shifted = _mm512_fmadd_ps(clamped, _mm512_set1_ps(std::f32::consts::LOG2_E), round);
    let n = _mm512_sub_ps(shifted, round);
    let r = _mm512_fnmadd_ps(n, _mm512_set1_ps(exp::LN_2[0]), clamped);
    let r = _mm512_fnmadd_ps(n, _mm512_set1_ps(exp::LN_2[1]), r);
    let [first, rest @ ..] = exp::TERMS;
    let mut p = _mm512_set1_ps(first);
    for term in rest {
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(term));
    }
    let bias = _mm512_set1_epi32(127 - exp::ROUND.to_bits() as i32);
    let power = _mm512_slli_epi32::<23>(_mm512_add_epi32(_mm512_castps_si512(shifted), bias));
    let is_more = _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(x, least);
    _mm512_maskz_mul_ps(is_more, p, _mm512_castsi512_ps(power))
}

/// The tree of [`sum_lanes`](crate::real::sum_lanes) over 16 lanes.
#[inline]
#[target_feature(enable = "avx512f,avx512dq")]
pub(crate) fn sum_of_lanes(lanes: __m512) -> f32 {
    let eight = _mm256_add_ps(
        _mm512_castps512_ps256(lanes),
        _mm512_extractf32x8_ps::<1>(lanes),
    );
    let four = _mm_add_ps(
        _mm256_castps256_ps128(eight),
        _mm256_extractf128_ps::<1>(eight),
    );
    let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
}

/// The largest value so far, as [`Real::largest`](crate::real::Real::largest) has it.
#[derive(Clone, Copy)]
pub(crate) struct Largest {
    max: __m512,
    nan: __mmask16,
}

impl Largest {
    /// Of no values.
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(crate) fn none() -> Self {
        Self {
            max: _mm512_set1_ps(f32::NEG_INFINITY),
            nan: 0,
        }
    }

    /// Looks at sixteen more.
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(crate) fn add(&mut self, x: __m512) {
        self.max = _mm512_max_ps(self.max, x);
        self.nan |= _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(x, x);
    }

    /// The largest; NaN if there was one.
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(crate) fn get(self) -> f32 {
        match self.nan {
            0 => _mm512_reduce_max_ps(self.max),
            _ => f32::NAN,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::Isa;
    use crate::real::{exp_small_f32, sum_lanes};

    #[test]
    fn exponentials_and_sums_are_the_same_to_the_bit() {
        if !Isa::available().iter().any(|isa| isa.has_avx512()) {
            return;
        }
        let mut values = vec![
            0.0, -0.0, -1e-40, -1e-30, -86.999, -87.0, -87.01, -1e30, 80.0,
        ];
        values.extend([f32::NEG_INFINITY, f32::NAN]);
        values.extend((0..100_000).map(|i| -(i as f32) * 9.1e-4));
        for chunk in values.chunks(W) {
            let mut x = [0.0; W];
            x[..chunk.len()].copy_from_slice(chunk);
            let expected = x.map(exp_small_f32);
            // SAFETY: the processor has AVX-512.
            let (found, sum): ([f32; W], f32) = unsafe {
                let y = exp_small(load(&x));
                (std::mem::transmute::<__m512, [f32; W]>(y), sum_of_lanes(y))
            };
            for (x, (found, expected)) in x.iter().zip(found.iter().zip(&expected)) {
                let alike = found.to_bits() == expected.to_bits();
                assert!(
                    alike || x.is_nan() && found.is_nan(),
                    "{x}: {found} {expected}"
                );
            }
            let expected = sum_lanes(expected.into_iter());
            assert!(sum == expected || expected.is_nan() && sum.is_nan());
        }
    }
}
