//! Dots of two bf16 values (AVX512-BF16) in the order of the tiles of AMX.
//!
//! `vdpbf16ps` adds to each lane the product of the upper two values and then that of the lower
//! two, rounding and flushing denormals each time. Two steps of the even chain of
//! [`Order::EvenOdd`](crate::kernels::product::Order::EvenOdd) in one dot, the earlier one
//! above, are the definition's own two steps; likewise of the odd chain.

use super::{PAIR, Pairs, Strip, TILE, TILE_VALUES, Unit};
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
        let panel = strip.depth * TILE_VALUES;
        for columns in 0..2 * strip.pairs {
            let right = strip.right.wrapping_add(columns * panel);
            for row in (0..PAIR).step_by(ROWS) {
                let left = row / TILE * panel + row % TILE * 2 * TILE;
                let left = strip.left.wrapping_add(left);
                let sums = strip.sums.wrapping_add(row * strip.stride + columns * TILE);
                // SAFETY: the caller's promise.
                unsafe { multiply_rows(strip.depth, left, right, (sums, strip.stride)) };
            }
        }
    }
}

/// Denormals to zeros of their sign; NaN stays.
#[inline]
#[target_feature(enable = "avx512f,avx512dq")]
fn flush(x: __m512) -> __m512 {
    const DENORMAL: i32 = 0x20;
    let denormal = _mm512_fpclass_ps_mask::<DENORMAL>(x);
    _mm512_mask_and_ps(x, denormal, x, _mm512_set1_ps(-0.0))
}

/// [`ROWS`] rows of a tile of `left` times a tile of columns, `depth` tiles along the reduction.
///
/// # Safety
/// The processor has AVX512-BF16; the pointers lead to so many tiles, and to rows of 16 sums
/// that are `stride` apart and that nobody else uses.
#[target_feature(enable = "avx512f,avx512dq,avx512bf16")]
unsafe fn multiply_rows(
    depth: usize,
    mut left: *const u16,
    mut right: *const u16,
    (to, stride): (*mut f32, usize),
) {
    // SAFETY: the caller's promise; loads and stores need no alignment.
    unsafe {
        let mut sums: [__m512; ROWS] =
            std::array::from_fn(|i| flush(_mm512_loadu_ps(to.add(i * stride))));
        for _ in 0..depth {
            let [even, odd] = [0, 1].map(|chain| {
                let (left, right) = (left.add(chain * TILE), right.add(chain * TILE_VALUES / 2));
                chain_of_rows(left.cast(), right.cast())
            });
            for (sum, (&even, &odd)) in sums.iter_mut().zip(even.iter().zip(&odd)) {
                *sum = flush(_mm512_add_ps(*sum, _mm512_add_ps(even, odd)));
            }
            left = left.add(TILE_VALUES);
            right = right.add(TILE_VALUES);
        }
        for (i, sum) in sums.iter().enumerate() {
            _mm512_storeu_ps(to.add(i * stride), *sum);
        }
    }
}

/// One chain of a tile from zero.
///
/// # Safety
/// The pointers lead to the chain's pairs of the rows of a tile and of all its columns.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn chain_of_rows(left: *const i32, right: *const i32) -> [__m512; ROWS] {
    let mut chain = [_mm512_setzero_ps(); ROWS];
    for pair in 0..OF_CHAIN {
        // SAFETY: the caller's promise; the loads need no alignment.
        unsafe {
            let right = as_bf16(_mm512_loadu_si512(right.add(pair * TILE).cast()));
            for (i, chain) in chain.iter_mut().enumerate() {
                let left = as_bf16(_mm512_set1_epi32(left.add(i * TILE + pair).read_unaligned()));
                *chain = _mm512_dpbf16_ps(*chain, right, left);
            }
        }
    }
    chain
}

#[inline]
#[target_feature(enable = "avx512f")]
fn as_bf16(bits: __m512i) -> __m512bh {
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
