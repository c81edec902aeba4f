//! Numbers of int8 times their scales, rounded to bf16: a cache of int8 on its way to products.

use super::Isa;
use crate::real::normal_to_bf16;
use half::bf16;

/// Numbers that have scales of their own.
pub(crate) const RUN: usize = 16;

/// `to[i] = bf16(scales[i % 16] * q[i])`, for scales that are zero or normal, as their products
/// are then. Of equal lengths.
#[inline(always)]
pub(crate) fn widen(isa: Isa, q: &[i8], scales: &[f32; RUN], to: &mut [bf16]) {
    assert_eq!(q.len(), to.len());
    #[cfg(target_arch = "x86_64")]
    if isa.has_avx2() {
        // SAFETY: an `Isa` that has AVX2, or dots of bf16, is made by `Isa::available` only, after
        // CPUID has shown it.
        return unsafe {
            match isa.has_bf16() {
                true => x86::widen_avx512(q, scales, to),
                false => x86::widen_avx2(q, scales, to),
            }
        };
    }
    let _ = isa;
    widen_any(q, scales, to);
}

#[inline(always)]
fn widen_any(q: &[i8], scales: &[f32; RUN], to: &mut [bf16]) {
    for (to, q) in to.chunks_mut(RUN).zip(q.chunks(RUN)) {
        for ((to, &q), &scale) in to.iter_mut().zip(q).zip(scales) {
            *to = normal_to_bf16(scale * f32::from(q));
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{RUN, widen_any};
    use half::bf16;
    use std::arch::x86_64::*;

    #[target_feature(enable = "avx2,fma")]
    pub(super) fn widen_avx2(q: &[i8], scales: &[f32; RUN], to: &mut [bf16]) {
        // SAFETY: sixteen scales are there; the loads need no alignment.
        let factors = unsafe { [0, 8].map(|at| _mm256_loadu_ps(scales.as_ptr().add(at))) };
        let (q, rest) = q.as_chunks::<RUN>();
        let (to, to_rest) = to.as_chunks_mut::<RUN>();
        for (to, q) in to.iter_mut().zip(q) {
            // SAFETY: sixteen numbers each; loads and store need no alignment.
            unsafe {
                let low = rounded(_mm_loadl_epi64(q.as_ptr().cast()), factors[0]);
                let high = rounded(_mm_loadl_epi64(q.as_ptr().add(8).cast()), factors[1]);
                // Each half of a register is packed for itself.
                let both =
                    _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packus_epi32(low, high));
                _mm256_storeu_si256(to.as_mut_ptr().cast(), both);
            }
        }
        widen_any(rest, scales, to_rest);
    }

    /// Eight products as bf16, each in 32 bits.
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    fn rounded(q: __m128i, scale: __m256) -> __m256i {
        let x = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(q)), scale);
        let bits = _mm256_castps_si256(x);
        let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
        let half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
        _mm256_srli_epi32::<16>(_mm256_add_epi32(bits, half))
    }

    #[target_feature(enable = "avx2,fma,avx512f,avx512bf16")]
    pub(super) fn widen_avx512(q: &[i8], scales: &[f32; RUN], to: &mut [bf16]) {
        // SAFETY: sixteen scales are there; the load needs no alignment.
        let factors = unsafe { _mm512_loadu_ps(scales.as_ptr()) };
        let (q, rest) = q.as_chunks::<{ 2 * RUN }>();
        let (to, to_rest) = to.as_chunks_mut::<{ 2 * RUN }>();
        for (to, q) in to.iter_mut().zip(q) {
            // SAFETY: 32 numbers each; loads and store need no alignment.
            unsafe {
                let low = _mm_loadu_si128(q.as_ptr().cast());
                let high = _mm_loadu_si128(q.as_ptr().add(RUN).cast());
                let low = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(low)), factors);
                let high = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(high)), factors);
                let both = _mm512_cvtne2ps_pbh(high, low);
                to.as_mut_ptr().cast::<__m512bh>().write_unaligned(both);
            }
        }
        widen_avx2(rest, scales, to_rest);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::philox::Philox;
    use crate::real::Real;

    #[test]
    fn the_same_bits_on_every_instruction_set() {
        let random = Philox::new(3, 1);
        for len in [0, 1, 15, 16, 17, 32, 40, 64, 100, 2048] {
            let q: Vec<i8> = (0..len).map(|i| (i * 37 % 255) as i8).collect();
            for case in 0..20 {
                let mut scales = [0.0; RUN];
                for (i, scale) in scales.iter_mut().enumerate() {
                    let exponent = [0, -126, 121, -3][(case + i) % 4];
                    let fraction = 1.0 + random.normal_pair((case * RUN + i) as u64).0.abs() / 8.0;
                    *scale = (fraction.min(1.9) * f64::exp2(f64::from(exponent))) as f32;
                }
                scales[case % RUN] = 0.0;
                let each = q.iter().enumerate();
                let expected: Vec<bf16> = each
                    .map(|(i, &q)| (scales[i % RUN] * f32::from(q)).to_bf16())
                    .collect();
                for isa in Isa::available() {
                    let mut to = vec![bf16::ONE; len];
                    widen(isa, &q, &scales, &mut to);
                    let bits = |x: &[bf16]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                    assert_eq!(bits(&to), bits(&expected), "{isa:?}, {len} numbers");
                }
            }
        }
    }
}
