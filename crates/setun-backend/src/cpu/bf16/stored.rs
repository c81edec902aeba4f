//! Products of a few rows with bf16 values as a cache stores them, in dots of two.
//!
//! The order is that of [`dots`](super::dots): two steps of one chain in each dot. The rows of
//! values are steps, so two of them, two apart, are interleaved on their way to the registers.

use super::dots::as_bf16;
use super::pack::{Pairs, row_halves, upper_halves};
use crate::cpu::avx512::flush;
use crate::kernels::product::{BLOCK, StoredRows};
use half::bf16;
use std::arch::x86_64::*;
use std::mem::MaybeUninit;

/// Lanes that advance together.
const W: usize = 16;
/// Most rows whose two chains are in registers together.
const ROWS: usize = 8;
/// Most rows that [`even_odd`] takes: it has no limit, but those of attention's tile have been tried.
pub(crate) const MOST_ROWS: usize = 64;
/// Most steps.
const MOST_STEPS: usize = 256;
/// Numbers of bf16 in a cache line.
const LINE: usize = 32;
/// Steps of which each chain takes a pair.
const FOUR: usize = 4;

/// `acc[i, l] += sum over r of x[i, r] * y[r, l]` for `rows` rows of `x` and of `acc`, which are
/// `x_stride` and `acc_stride` apart, and for each of `ys`, which have the same sizes and whose
/// results lie beside each other, of values whose products cannot be denormal. False, and
/// nothing is done, where the sizes do not suit.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
pub(crate) fn even_odd(
    rows: usize,
    (x, x_stride): (&[f32], usize),
    ys: &[StoredRows<'_>],
    (acc, acc_stride): (&mut [f32], usize),
) -> bool {
    let suits = |y: &StoredRows<'_>| {
        let depth = y.pieces.len() * y.steps;
        y.steps.is_multiple_of(FOUR) && y.lanes.is_multiple_of(W) && depth <= MOST_STEPS
    };
    if rows > MOST_ROWS || !ys.iter().all(suits) {
        return false;
    }
    let (mut first, runs) = (0, rows.div_ceil(ROWS));
    for run in 0..runs {
        let n = (rows - first).div_ceil(runs - run);
        let x = (&x[first * x_stride..], x_stride);
        let acc = (&mut acc[first * acc_stride..], acc_stride);
        // The first run asks for what comes next.
        let asks = run == 0;
        match n {
            1 => rows_of::<1>(x, (ys, asks), acc),
            2 => rows_of::<2>(x, (ys, asks), acc),
            3 => rows_of::<3>(x, (ys, asks), acc),
            4 => rows_of::<4>(x, (ys, asks), acc),
            5 => rows_of::<5>(x, (ys, asks), acc),
            6 => rows_of::<6>(x, (ys, asks), acc),
            7 => rows_of::<7>(x, (ys, asks), acc),
            _ => rows_of::<8>(x, (ys, asks), acc),
        }
        first += n;
    }
    true
}

/// Rows as dots want them, written as far as there are steps.
type PackedRows<const M: usize> = [[MaybeUninit<u16>; MOST_STEPS]; M];

/// A row's values, whole pairs of steps of one chain side by side, block by block.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn pack_row(x: &[f32], to: &mut [MaybeUninit<u16>; MOST_STEPS]) {
    let order = upper_halves(Pairs::OfOneChain);
    for (x, to) in x.chunks(BLOCK).zip(to.chunks_exact_mut(BLOCK)) {
        // SAFETY: there is room for 32 values; the store needs no alignment.
        unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), row_halves(order, x)) };
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn rows_of<const M: usize>(
    (x, x_stride): (&[f32], usize),
    (ys, asks): (&[StoredRows<'_>], bool),
    (acc, acc_stride): (&mut [f32], usize),
) {
    let Some(first) = ys.first() else { return };
    let depth = first.pieces.len() * first.steps;
    let mut rows: PackedRows<M> = [const { [const { MaybeUninit::uninit() }; MOST_STEPS] }; M];
    for (i, to) in rows.iter_mut().enumerate() {
        pack_row(&x[i * x_stride..][..depth], to);
    }
    for (i, &y) in ys.iter().enumerate() {
        assert_eq!(y.pieces.len() * y.steps, depth);
        let ahead = if asks { y.ahead } else { &[] };
        let acc = (&mut acc[i * y.lanes..], acc_stride);
        // SAFETY: so many steps of all rows are written, to the end of their block.
        unsafe { multiply(&rows, StoredRows { ahead, ..y }, acc) };
    }
}

/// # Safety
/// The steps of `y` are written in all rows.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn multiply<const M: usize>(
    rows: &PackedRows<M>,
    y: StoredRows<'_>,
    (acc, acc_stride): (&mut [f32], usize),
) {
    let (steps, lanes) = (y.steps, y.lanes);
    assert!(acc.len() >= (M - 1) * acc_stride + lanes);
    assert!(y.pieces.iter().all(|piece| piece.len() >= steps * lanes));
    for at in (0..lanes).step_by(W) {
        let mut sums: [__m512; M] = std::array::from_fn(|i| {
            // SAFETY: as asserted, each row has `lanes` sums; the load needs no alignment.
            flush(unsafe { _mm512_loadu_ps(acc.as_ptr().add(i * acc_stride + at)) })
        });
        let mut chains = [[_mm512_setzero_ps(); M]; 2];
        let mut step = 0;
        for (i, piece) in y.pieces.iter().enumerate() {
            let ahead = y.ahead.get(i).filter(|_| at.is_multiple_of(LINE));
            for row in (0..steps).step_by(FOUR) {
                if let Some(ahead) = ahead {
                    for r in row..row + FOUR {
                        _mm_prefetch::<_MM_HINT_T1>(
                            ahead.as_ptr().wrapping_add(r * lanes + at).cast(),
                        );
                    }
                }
                for (parity, chain) in chains.iter_mut().enumerate() {
                    let place =
                        step / BLOCK * BLOCK + Pairs::OfOneChain.place(step % BLOCK + parity) - 1;
                    // SAFETY: the piece has `steps` rows of `lanes` values, and row `row +
                    // parity + 2` is one of them; each row of `x` has a pair at `place`. The
                    // loads need no alignment.
                    unsafe {
                        let from = piece.as_ptr().add((row + parity) * lanes + at);
                        let values = as_bf16(interleaved(from, from.add(2 * lanes)));
                        for (chain, x) in chain.iter_mut().zip(rows) {
                            let x = x.as_ptr().add(place).cast::<i32>().read_unaligned();
                            let x = as_bf16(_mm512_set1_epi32(x));
                            *chain = _mm512_dpbf16_ps(*chain, values, x);
                        }
                    }
                }
                step += FOUR;
                if step.is_multiple_of(BLOCK) {
                    add_chains(&mut sums, &mut chains);
                }
            }
        }
        if !step.is_multiple_of(BLOCK) {
            add_chains(&mut sums, &mut chains);
        }
        for (i, sum) in sums.iter().enumerate() {
            // SAFETY: as above.
            unsafe { _mm512_storeu_ps(acc.as_mut_ptr().add(i * acc_stride + at), *sum) };
        }
    }
}

/// `sums += even + odd`, and new chains from zero.
#[inline]
#[target_feature(enable = "avx512f,avx512dq")]
fn add_chains<const M: usize>(sums: &mut [__m512; M], chains: &mut [[__m512; M]; 2]) {
    let [even, odd] = *chains;
    for (sum, (even, odd)) in sums.iter_mut().zip(even.into_iter().zip(odd)) {
        *sum = flush(_mm512_add_ps(*sum, _mm512_add_ps(even, odd)));
    }
    *chains = [[_mm512_setzero_ps(); M]; 2];
}

/// Sixteen values of an earlier and of a later step, the earlier ones in the upper halves.
///
/// # Safety
/// They are there.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) unsafe fn interleaved(earlier: *const bf16, later: *const bf16) -> __m512i {
    const ORDER: [u16; 2 * W] = {
        let mut order = [0; 2 * W];
        let mut lane = 0;
        while lane < W {
            // Words of the second operand count from 32.
            order[2 * lane] = lane as u16 + 32;
            order[2 * lane + 1] = lane as u16;
            lane += 1;
        }
        order
    };
    // SAFETY: the caller's promise, and 32 words of `ORDER`; the loads need no alignment.
    unsafe {
        let order = _mm512_loadu_si512(ORDER.as_ptr().cast());
        let earlier = _mm512_castsi256_si512(_mm256_loadu_si256(earlier.cast()));
        let later = _mm512_castsi256_si512(_mm256_loadu_si256(later.cast()));
        _mm512_permutex2var_epi16(earlier, order, later)
    }
}
