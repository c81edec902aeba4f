//! Dots of two bf16 values (AVX512-BF16) in the order of the tiles of AMX.
//!
//! `vdpbf16ps` adds to each lane the product of the upper two values and then that of the lower
//! two, rounding and flushing denormals each time. Two steps of the even chain of
//! [`Order::EvenOdd`](crate::kernels::product::Order::EvenOdd) in one dot, the earlier one
//! above, are the definition's own two steps; likewise of the odd chain.

use super::{PAIR, Pairs, Strip, TILE, TILE_VALUES, Unit};
use crate::cpu::avx512::flush;
use std::arch::x86_64::*;

/// Rows whose two chains and sums are in registers together.
const ROWS: usize = 8;
const _: () = assert!(PAIR.is_multiple_of(ROWS) && TILE.is_multiple_of(ROWS));
/// Pairs of steps of a chain in a tile.
const OF_CHAIN: usize = TILE / 2;

/// The unit that does them.
pub(crate) struct Dots;

impl Unit for Dots {
    const PAIRS: Pairs = Pairs::OfOneChain;

    unsafe fn start() -> Self {
        Self
    }

    unsafe fn multiply(&self, strip: Strip) {
        // SAFETY: the caller's promise, which is that of both.
        unsafe { multiply_strip(strip) };
    }
}

/// # Safety
/// As [`Unit::multiply`].
#[target_feature(enable = "avx512f,avx512dq,avx512bf16")]
unsafe fn multiply_strip(strip: Strip) {
    let panel = strip.depth * TILE_VALUES;
    for columns in 0..2 * strip.pairs {
        let right = strip.right.wrapping_add(columns * panel);
        for row in (0..PAIR).step_by(ROWS) {
            prefetch_next(strip, row, columns);
            let left = row / TILE * panel + row % TILE * 2 * TILE;
            let left = strip.left.wrapping_add(left);
            let sums = strip.sums.wrapping_add(row * strip.stride + columns * TILE);
            let sums = (sums, strip.stride);
            // SAFETY: the caller's promise.
            unsafe {
                if is_coarse(sums) {
                    multiply_rows::<false>(strip.depth, left, right, sums);
                } else {
                    multiply_rows::<true>(strip.depth, left, right, sums);
                }
            }
        }
    }
}

/// Asks for the sums behind those at `row` and `columns`.
#[inline]
#[target_feature(enable = "avx512f")]
fn prefetch_next(strip: Strip, row: usize, columns: usize) {
    let (row, columns) = match row + ROWS < PAIR {
        true => (row + ROWS, columns),
        false => (0, columns + 1),
    };
    for i in row..row + ROWS {
        let at = i * strip.stride + columns * TILE;
        _mm_prefetch::<_MM_HINT_T0>(strip.sums.wrapping_add(at).cast());
    }
}

/// Whether all of [`ROWS`] rows of 16 sums, `stride` apart, are zero or at least 2^-103. Sums of
/// products that cannot be denormal then stay multiples of 2^-126 (see
/// [`avx2`](crate::cpu::avx2)), and nothing is flushed.
///
/// # Safety
/// The rows are there, and the processor has AVX-512.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn is_coarse((sums, stride): (*mut f32, usize)) -> bool {
    // One less than the bits of 2^-103; zero wraps around to the largest number.
    const LEAST: i32 = (24 << 23) - 1;
    let (magnitude, one) = (_mm512_set1_epi32(i32::MAX), _mm512_set1_epi32(1));
    let mut least = _mm512_set1_epi32(-1);
    for i in 0..ROWS {
        // SAFETY: the caller's promise; the load needs no alignment.
        let bits = unsafe { _mm512_loadu_si512(sums.add(i * stride).cast()) };
        let bits = _mm512_sub_epi32(_mm512_and_si512(bits, magnitude), one);
        least = _mm512_min_epu32(least, bits);
    }
    _mm512_cmplt_epu32_mask(least, _mm512_set1_epi32(LEAST)) == 0
}

/// [`ROWS`] rows of a tile of `left` times a tile of columns, `depth` tiles along the reduction.
/// Without `FLUSH` where the sums are coarse.
///
/// # Safety
/// The processor has AVX512-BF16; the pointers lead to so many tiles, and to rows of 16 sums
/// that are `stride` apart and that nobody else uses.
#[target_feature(enable = "avx512f,avx512dq,avx512bf16")]
unsafe fn multiply_rows<const FLUSH: bool>(
    depth: usize,
    mut left: *const u16,
    mut right: *const u16,
    (to, stride): (*mut f32, usize),
) {
    let flushed = |x| if FLUSH { flush(x) } else { x };
    // SAFETY: the caller's promise; loads and stores need no alignment.
    unsafe {
        let mut sums: [__m512; ROWS] =
            std::array::from_fn(|i| flushed(_mm512_loadu_ps(to.add(i * stride))));
        for _ in 0..depth {
            let mut chains = [[_mm512_setzero_ps(); ROWS]; 2];
            for (parity, chain) in chains.iter_mut().enumerate() {
                for pair in parity * OF_CHAIN..(parity + 1) * OF_CHAIN {
                    let values = as_bf16(_mm512_loadu_si512(right.add(2 * pair * TILE).cast()));
                    let left = left.add(2 * pair).cast::<i32>();
                    for (i, chain) in chain.iter_mut().enumerate() {
                        let x = as_bf16(_mm512_set1_epi32(left.add(i * TILE).read_unaligned()));
                        *chain = _mm512_dpbf16_ps(*chain, values, x);
                    }
                }
            }
            let [even, odd] = &chains;
            for (sum, (&even, &odd)) in sums.iter_mut().zip(even.iter().zip(odd)) {
                *sum = flushed(_mm512_add_ps(*sum, _mm512_add_ps(even, odd)));
            }
            left = left.add(TILE_VALUES);
            right = right.add(TILE_VALUES);
        }
        for (i, sum) in sums.iter().enumerate() {
            _mm512_storeu_ps(to.add(i * stride), *sum);
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn as_bf16(bits: __m512i) -> __m512bh {
    // SAFETY: both are 64 bytes of which every pattern is a value.
    unsafe { std::mem::transmute(bits) }
}

/// [`peak::bf16`](crate::cpu::peak::bf16) on one thread; returns the multiply-adds.
#[target_feature(enable = "avx512f,avx512bf16")]
pub(in crate::cpu) fn rounds(rounds: usize) -> f64 {
    const CHAINS: usize = 12;
    let a = as_bf16(_mm512_set1_epi32(std::hint::black_box(0x3f80_3f80)));
    let b = as_bf16(_mm512_set1_epi32(std::hint::black_box(0x3c00_3c00)));
    let mut chains = [_mm512_setzero_ps(); CHAINS];
    for _ in 0..rounds {
        for chain in &mut chains {
            *chain = _mm512_dpbf16_ps(*chain, a, b);
        }
    }
    std::hint::black_box(chains);
    (rounds * CHAINS * 2 * TILE) as f64
}
