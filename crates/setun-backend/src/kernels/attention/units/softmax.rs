//! The softmax of a tile with AVX-512: from scores straight to rounded probabilities in the tiles
//! of a unit. The operations are those of [`View::soften`] and of packing behind it, one by one.

use crate::cpu::bf16::rows::{PAIR, Packed, Pairs, TILE, TILE_VALUES, in_order, packed_len};
use crate::cpu::lanes::{Largest, W, exp_small, load, sum_of_lanes};
use crate::kernels::attention::backward::{QueryBlock, Saved};
use crate::kernels::attention::{Running, View, Visible};
use crate::kernels::product::BLOCK;
use crate::ops::Segment;
use crate::real::Real;
use half::bf16;
use std::arch::x86_64::*;

/// Rows that go step by step together: one alone would wait for its maximum, then for its
/// exponentials.
const TOGETHER: usize = 8;

impl Visible {
    /// Whether all positions of a tile from `j0` on are seen.
    fn is_whole(self, j0: usize, tile: usize) -> bool {
        let outside_gap = self.gap.1 <= j0 || self.gap.0 >= j0 + tile || self.gap.0 >= self.gap.1;
        self.first <= j0 && self.end >= j0 + tile && outside_gap
    }
}

/// What some neighbouring rows need between the two passes over their scores.
#[derive(Clone, Copy, Default)]
struct Row {
    /// Whether it has seen a key by now.
    is_active: bool,
    /// What its scores are to be multiplied by.
    factor: f32,
    /// Of what has been summed before.
    shrink: f32,
}

/// As [`View::soften`] for a whole tile of keys from `j0` on; `scores`, `[rows, tile]`, become
/// probabilities as rows of a product. Those of rows without any key say nothing.
#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
pub(super) fn soften<'a>(
    pairs: Pairs,
    view: View<'_, bf16>,
    (segment, first_row, j0): (Segment, usize, usize),
    scores: &mut [f32],
    running: Running<'_, f32>,
    to: &'a mut [u16],
) -> Packed<'a> {
    let (tile, scale, num_rows) = (view.tile, view.scale(), running.max.len());
    let e = running.acc.len() / num_rows;
    let to = &mut to[..packed_len(num_rows, tile)];
    for first in (0..num_rows).step_by(TOGETHER) {
        let together = TOGETHER.min(num_rows - first);
        let mut rows = [Row::default(); TOGETHER];
        for (r, row) in (first..).zip(&mut rows[..together]) {
            let visible = view.visible(segment, first_row + r);
            if visible.end <= j0 {
                continue;
            }
            let scores = &mut scores[r * tile..][..tile];
            row.factor = scale;
            if !visible.is_whole(j0, tile) {
                visible.mask(scores, scale, j0);
                row.factor = 1.0;
            }
            let max = Real::maximum(running.max[r], largest(scores, row.factor));
            if max != f32::NEG_INFINITY {
                row.is_active = true;
                row.shrink = running.max[r] - max;
                running.max[r] = max;
            }
        }
        rows.iter_mut()
            .for_each(|r| r.shrink = r.shrink.exp_small());
        for (r, row) in (first..).zip(&rows[..together]) {
            if !row.is_active {
                blank(to, (r, tile));
                continue;
            }
            let (scores, max) = (&scores[r * tile..][..tile], running.max[r]);
            let sum = probabilities(pairs, scores, (row.factor, max), (to, r));
            running.sum[r] = running.sum[r] * row.shrink + sum;
            // Where the maximum is the old one there is nothing to flush either.
            if row.shrink != 1.0 {
                let acc = &mut running.acc[r * e..(r + 1) * e];
                acc.iter_mut().for_each(|x| *x = (*x * row.shrink).flush());
            }
        }
    }
    for row in num_rows..num_rows.next_multiple_of(PAIR) {
        blank(to, (row, tile));
    }
    Packed::of(to, num_rows, tile)
}

/// Where the values of row `row` and of a block of steps lie in tiles of rows of `width` values.
#[inline(always)]
fn place((row, width): (usize, usize), block: usize) -> usize {
    (row / TILE * (width / BLOCK) + block) * TILE_VALUES + row % TILE * BLOCK
}

/// A row that says nothing: -0, as behind the last row.
fn blank(to: &mut [u16], row: (usize, usize)) {
    for block in 0..row.1 / BLOCK {
        to[place(row, block)..][..BLOCK].fill(1 << 15);
    }
}

/// From products of queries with keys, and of `dout` with values, `[rows, tile]` each, to the
/// rounded `p = exp(s - lse)` and `ds = p * (dp - delta)`, as
/// [`QueryBlock::soften`](crate::kernels::attention::backward::QueryBlock). Behind the first `keys`
/// columns of `ds` is -0, which adds nothing to a sum.
#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
pub(super) fn soften_gradients(
    view: View<'_, bf16>,
    saved: Saved<'_, f32>,
    block: &QueryBlock,
    (scores, dp): (&mut [f32], &[f32]),
    keys: usize,
    (p, ds): (&mut [bf16], &mut [bf16]),
) {
    let tile = view.tile;
    let rows = scores.chunks_mut(tile).zip(dp.chunks(tile));
    let to = p.chunks_mut(tile).zip(ds.chunks_mut(tile));
    for (r, ((scores, dp), (p, ds))) in rows.zip(to).enumerate() {
        if block.sees(view, saved, r) {
            let visible = view.visible(block.segment, block.rows.0 + r);
            let mut factor = view.scale();
            if !visible.is_whole(block.j0, tile) {
                visible.mask(scores, factor, block.j0);
                factor = 1.0;
            }
            let at = block.row_head(view, r);
            let of_row = (factor, saved.lse[at], saved.delta[at]);
            gradients((scores, dp), of_row, (p, ds));
        } else {
            p.fill(bf16::ZERO);
            ds.fill(bf16::ZERO);
        }
        ds[keys..].fill(bf16::NEG_ZERO);
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn gradients(
    (scores, dp): (&[f32], &[f32]),
    (factor, lse, delta): (f32, f32, f32),
    (p, ds): (&mut [bf16], &mut [bf16]),
) {
    let [factor, lse, delta] = [
        _mm512_set1_ps(factor),
        _mm512_set1_ps(lse),
        _mm512_set1_ps(delta),
    ];
    let from = scores.as_chunks::<BLOCK>().0.iter();
    let from = from.zip(dp.as_chunks::<BLOCK>().0);
    let to = p.as_chunks_mut::<BLOCK>().0.iter_mut();
    let to = to.zip(ds.as_chunks_mut::<BLOCK>().0);
    for ((scores, dp), (p, ds)) in from.zip(to) {
        let (low, high) = scores.split_at(W);
        let low = exp_small(_mm512_sub_ps(_mm512_mul_ps(load(low), factor), lse));
        let high = exp_small(_mm512_sub_ps(_mm512_mul_ps(load(high), factor), lse));
        store(p, rounded(low, high));
        let (dp_low, dp_high) = dp.split_at(W);
        let low = _mm512_mul_ps(low, _mm512_sub_ps(load(dp_low), delta));
        let high = _mm512_mul_ps(high, _mm512_sub_ps(load(dp_high), delta));
        store(ds, rounded(low, high));
    }
}

/// Both rounded, `low` first.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn rounded(low: __m512, high: __m512) -> __m512i {
    // SAFETY: both are 64 bytes of which every pattern is a value.
    unsafe { std::mem::transmute(_mm512_cvtne2ps_pbh(high, low)) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store<T: bytemuck::Pod>(to: &mut [T; BLOCK], values: __m512i) {
    const { assert!(size_of::<T>() == 2) }
    // SAFETY: 32 values of 16 bits are there; the store needs no alignment.
    unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), values) };
}

/// The largest of the scores times `factor`; NaN if there is one.
#[inline]
#[target_feature(enable = "avx512f")]
fn largest(scores: &[f32], factor: f32) -> f32 {
    let factor = _mm512_set1_ps(factor);
    let mut largest = Largest::none();
    for scores in scores.as_chunks::<W>().0 {
        largest.add(_mm512_mul_ps(load(scores), factor));
    }
    largest.get()
}

/// Writes the exponentials of row `row`, rounded, to its places in tiles; the sum of those that
/// are not rounded in the order of [`sum_lanes`](crate::real::sum_lanes).
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn probabilities(
    pairs: Pairs,
    scores: &[f32],
    (factor, max): (f32, f32),
    (to, row): (&mut [u16], usize),
) -> f32 {
    let order = in_order(pairs);
    let (factor, max) = (_mm512_set1_ps(factor), _mm512_set1_ps(max));
    let row = (row, scores.len());
    let mut sums = _mm512_setzero_ps();
    for (block, scores) in scores.as_chunks::<BLOCK>().0.iter().enumerate() {
        let (low, high) = scores.split_at(W);
        let low = exp_small(_mm512_sub_ps(_mm512_mul_ps(load(low), factor), max));
        let high = exp_small(_mm512_sub_ps(_mm512_mul_ps(load(high), factor), max));
        sums = _mm512_add_ps(_mm512_add_ps(sums, low), high);
        let both = _mm512_permutexvar_epi16(order, rounded(low, high));
        let to = to[place(row, block)..].first_chunk_mut();
        store(to.expect("a row of a tile"), both);
    }
    sum_of_lanes(sums)
}
