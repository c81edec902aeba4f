//! Causal attention, tile by tile: online softmax forward (Milakov and Gimelshein, 2018),
//! recomputation backward (Dao et al., 2022).
//!
//! Keys come in tiles from position 0 of their segment, lane = position mod tile, so the
//! bits of a row depend on its own keys only, whatever else is computed. A tile above the
//! diagonal is skipped; a partly masked one is masked before the exponential; a row that
//! has seen no key yet skips a wholly masked tile, so no infinity meets another.
//! Nothing of size sequence x sequence exists.
//!
//! With values of bf16 all products follow [`Order::EvenOdd`], and the probabilities,
//! their gradient and `dout` are rounded to bf16 before they enter products. The
//! denominator sums the unrounded probabilities.

mod backward;
pub(super) mod units;

pub use backward::{
    QueryGradients, Saved, dkdv_tile, dq_block, head_gradients, row_delta, row_deltas, sums_len,
};

use crate::cpu::Isa;
use crate::kernels::product::{
    Order, ROWS_TOGETHER, needs_flush, rows_mat, tiles_mat, transpose, vec_mat,
};
use crate::ops::{DraftBlocks, Segment};
use crate::real::{Real, sum_slices};
use bytemuck::Pod;
use half::bf16;
use std::ops::Range;

/// How queries, keys and values are stored, and what follows from it.
pub trait Store<R: Real>: Pod + Send + Sync {
    /// Order of all products.
    const ORDER: Order;
    /// The value.
    fn load(self) -> R;
    /// Rounding before a product.
    fn round(x: R) -> R;
}

impl<R: Real> Store<R> for R {
    const ORDER: Order = Order::Sequential;
    #[inline(always)]
    fn load(self) -> R {
        self
    }
    #[inline(always)]
    fn round(x: R) -> R {
        x
    }
}

impl<R: Real> Store<R> for bf16 {
    const ORDER: Order = Order::EvenOdd;
    #[inline(always)]
    fn load(self) -> R {
        R::from_bf16(self)
    }
    #[inline(always)]
    fn round(x: R) -> R {
        x.round_bf16()
    }
}

/// Inputs of an attention: queries `[q rows, num_heads, head_dim]`, keys and values
/// `[kv rows, num_kv_heads, head_dim]`.
#[derive(Clone, Copy)]
pub struct View<'a, S> {
    /// Queries.
    pub q: &'a [S],
    /// Keys.
    pub k: &'a [S],
    /// Values.
    pub v: &'a [S],
    /// Query heads.
    pub num_heads: usize,
    /// Key heads.
    pub num_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Keys of a tile, and queries of a block.
    pub tile: usize,
    /// Instruction set; results do not depend on it.
    pub isa: Isa,
    /// Which keys a query sees.
    pub sight: Sight<'a>,
}

/// Which of a segment's keys its queries see.
#[derive(Clone, Copy, Debug, Default)]
pub enum Sight<'a> {
    /// Those up to their own position.
    #[default]
    Causal,
    /// Of those, the ones from the position that is given for each query row.
    From(&'a [u32]),
    /// Those of a block drafter.
    Blocks(DraftBlocks<'a>),
}

/// Positions that a query sees: `first..gap.0` and `gap.1..end`.
#[derive(Clone, Copy)]
struct Visible {
    first: usize,
    gap: (usize, usize),
    end: usize,
}

/// Scratch values that [`forward_block`], [`dq_block`], [`dkdv_tile`] and [`head_gradients`] need.
pub fn scratch_len(head_dim: usize, tile: usize) -> usize {
    (5 + 2 * backward::KEY_TILES) * head_dim * tile + 5 * tile * tile + 2 * QUERY_BLOCKS * tile
}

/// Most blocks of `tile` queries that [`forward_block`] takes.
pub const QUERY_BLOCKS: usize = 4;

impl<S> View<'_, S> {
    fn key_head(&self, head: usize) -> usize {
        head / (self.num_heads / self.num_kv_heads)
    }

    /// What query `i` of `segment` sees. The end does not fall with `i`.
    fn visible(&self, segment: Segment, i: usize) -> Visible {
        let context = segment.kv_len - segment.q_len;
        let end = context + i + 1;
        let (first, gap, end) = match self.sight {
            Sight::Causal => (0, (end, end), end),
            Sight::From(first) => (first[segment.q_start + i] as usize, (end, end), end),
            Sight::Blocks(DraftBlocks { size, anchors }) => {
                let start = i / size * size;
                let anchor = anchors[(segment.q_start + start) / size] as usize;
                (0, (anchor, context + start), context + start + size)
            }
        };
        Visible { first, gap, end }
    }

    /// The query heads that share a key head.
    fn query_heads(&self, key_head: usize) -> Range<usize> {
        let group = self.num_heads / self.num_kv_heads;
        key_head * group..(key_head + 1) * group
    }

    /// Queries `rows` of one head, `[rows, head_dim]`.
    #[inline(always)]
    fn pack_queries<'b, R: Real>(
        &self,
        segment: Segment,
        head: usize,
        rows: (usize, usize),
        to: &'b mut [R],
    ) -> Panel<'b, R>
    where
        S: Store<R>,
    {
        let from = (segment.q_start + rows.0, rows.1 - rows.0);
        let at = (
            self.num_heads * self.head_dim,
            head * self.head_dim,
            self.head_dim,
        );
        pack_rows(self.q, from, at, S::load, to)
    }

    fn scale<R: Real>(&self) -> R {
        R::ONE / R::from_f64(self.head_dim as f64).sqrt()
    }

    /// From products of rows from `first_row` with the keys from `j0` to probabilities.
    #[inline(always)]
    fn soften<R: Real>(
        &self,
        segment: Segment,
        (first_row, j0): (usize, usize),
        scores: &mut [R],
        running: Running<'_, R>,
    ) where
        S: Store<R>,
    {
        let sees = |r: usize| self.visible(segment, first_row + r).end > j0;
        let scale = self.scale();
        for (r, scores) in scores.chunks_mut(self.tile).enumerate() {
            if sees(r) {
                let visible = self.visible(segment, first_row + r);
                visible.mask(scores, scale, j0);
            }
        }
        online_softmax::<R, S>(scores, self.tile, running, sees);
    }
}

impl Visible {
    /// Scales the scores of a tile from position `j0`, before the end, and masks those that
    /// are not seen.
    #[inline(always)]
    fn mask<R: Real>(self, scores: &mut [R], scale: R, j0: usize) {
        let lane = |position: usize| position.saturating_sub(j0).min(scores.len());
        let gap = lane(self.gap.0)..lane(self.gap.1);
        mask(scores, scale, self.first.saturating_sub(j0), self.end - j0);
        scores[gap].fill(R::NEG_INFINITY);
    }
}

/// A tile of keys or values: its values and the least exponent among them.
pub(super) struct Panel<'a, R> {
    pub(super) values: &'a [R],
    pub(super) min_exponent: i32,
}

/// Copies rows `start..start + n` of one head to `[n, head_dim]`, rounded.
#[inline(always)]
fn pack_rows<'a, R: Real, T: Copy>(
    from: &[T],
    (start, n): (usize, usize),
    (stride, offset, width): (usize, usize, usize),
    load: impl Fn(T) -> R,
    to: &'a mut [R],
) -> Panel<'a, R> {
    let to = &mut to[..n * width];
    for (r, to) in to.chunks_mut(width).enumerate() {
        let at = (start + r) * stride + offset;
        for (to, &x) in to.iter_mut().zip(&from[at..at + width]) {
            *to = load(x);
        }
    }
    Panel {
        min_exponent: R::min_exponent(to),
        values: to,
    }
}

/// Transposes a panel `[n, width]` to `[width, tile]`, zeros behind the n-th lane.
#[inline(always)]
fn turned<'a, R: Real>(
    isa: Isa,
    panel: &Panel<'_, R>,
    width: usize,
    tile: usize,
    to: &'a mut [R],
) -> Panel<'a, R> {
    let to = &mut to[..width * tile];
    transpose(isa, panel.values, width, tile, to);
    Panel {
        values: to,
        min_exponent: panel.min_exponent,
    }
}

/// `acc += x * panel`, flushing denormals only where they can occur.
#[inline(always)]
fn multiply<R: Real, S: Store<R>>(
    isa: Isa,
    x: &[R],
    panel: &Panel<'_, R>,
    lanes: usize,
    acc: &mut [R],
) {
    let flush =
        S::ORDER == Order::EvenOdd && needs_flush(S::ORDER, R::min_exponent(x), panel.min_exponent);
    vec_mat(isa, S::ORDER, flush, x, panel.values, lanes, acc);
}

/// [`multiply`] on neighbouring rows: those of `x` are `stride` apart and have `depth` values
/// (behind them there may be zeros), those of `acc` have `lanes`.
#[inline(always)]
pub(super) fn multiply_rows<R: Real, S: Store<R>>(
    isa: Isa,
    x: &[R],
    (stride, depth): (usize, usize),
    panel: &Panel<'_, R>,
    lanes: usize,
    acc: &mut [R],
) {
    if S::ORDER == Order::EvenOdd && tiles_mat(isa, x, (stride, depth), panel.values, lanes, acc) {
        return;
    }
    let few = x.chunks(ROWS_TOGETHER * stride);
    for (x, acc) in few.zip(acc.chunks_mut(ROWS_TOGETHER * lanes)) {
        // Zeros behind a row do not count among the exponents.
        let calm = S::ORDER == Order::EvenOdd
            && !needs_flush(S::ORDER, R::min_exponent(x), panel.min_exponent);
        if calm && rows_mat(isa, x, (stride, depth), panel.values, lanes, acc) {
            continue;
        }
        for (x, acc) in x.chunks(stride).zip(acc.chunks_mut(lanes)) {
            multiply::<R, S>(isa, &x[..depth], panel, lanes, acc);
        }
    }
}

/// As [`multiply_rows`] for the rows that are `active`, and only for them.
#[inline(always)]
pub(super) fn multiply_active<R: Real, S: Store<R>>(
    isa: Isa,
    x: &[R],
    (stride, depth): (usize, usize),
    panel: &Panel<'_, R>,
    lanes: usize,
    acc: &mut [R],
    active: impl Fn(usize) -> bool,
) {
    let rows = acc.len() / lanes;
    let mut start = 0;
    while start < rows {
        let first = start;
        let seen = active(first);
        while start < rows && active(start) == seen {
            start += 1;
        }
        if seen {
            let (x, acc) = (
                &x[first * stride..start * stride],
                &mut acc[first * lanes..start * lanes],
            );
            multiply_rows::<R, S>(isa, x, (stride, depth), panel, lanes, acc);
        }
    }
}

/// Attention of queries `rows` of `segment` for one head, at most [`QUERY_BLOCKS`] tiles of
/// them; `put` takes a row, its output `[head_dim]` and its log-sum-exp.
#[inline(always)]
pub fn forward_block<R: Real, S: Store<R>>(
    view: View<'_, S>,
    segment: Segment,
    head: usize,
    rows: (usize, usize),
    mut put: impl FnMut(usize, &[R], R),
    scratch: &mut [R],
) {
    if units::forward(&view, segment, head, rows, &mut put, scratch) {
        return;
    }
    for start in (rows.0..rows.1).step_by(view.tile) {
        let rows = (start, rows.1.min(start + view.tile));
        forward_tile(view, segment, head, rows, &mut put, scratch);
    }
}

/// [`forward_block`] of one tile.
#[inline(always)]
fn forward_tile<R: Real, S: Store<R>>(
    view: View<'_, S>,
    segment: Segment,
    head: usize,
    rows: (usize, usize),
    put: &mut impl FnMut(usize, &[R], R),
    scratch: &mut [R],
) {
    let (e, tile) = (view.head_dim, view.tile);
    let (first_row, end_row) = rows;
    let num_rows = end_row - first_row;
    let (k_rows, scratch) = scratch.split_at_mut(e * tile);
    let (k_t, scratch) = scratch.split_at_mut(e * tile);
    let (v_rows, scratch) = scratch.split_at_mut(e * tile);
    let (q_rows, scratch) = scratch.split_at_mut(e * tile);
    let (acc, scratch) = scratch.split_at_mut(e * tile);
    let (scores, scratch) = scratch.split_at_mut(tile * tile);
    let (max, scratch) = scratch.split_at_mut(tile);
    let sum = &mut scratch[..tile];
    let acc = &mut acc[..num_rows * e];
    let scores = &mut scores[..num_rows * tile];
    acc.fill(R::ZERO);
    max[..num_rows].fill(R::NEG_INFINITY);
    sum[..num_rows].fill(R::ZERO);
    let queries = view.pack_queries(segment, head, rows, q_rows).values;
    let kv_at = (view.num_kv_heads * e, view.key_head(head) * e, e);
    let last_end = view.visible(segment, end_row - 1).end;
    for j0 in (0..last_end).step_by(tile) {
        let n = tile.min(segment.kv_len - j0);
        let keys = pack_rows(view.k, (segment.kv_start + j0, n), kv_at, S::load, k_rows);
        let keys = turned(view.isa, &keys, e, tile, k_t);
        let values = pack_rows(view.v, (segment.kv_start + j0, n), kv_at, S::load, v_rows);
        scores.fill(R::ZERO);
        multiply_rows::<R, S>(view.isa, queries, (e, e), &keys, tile, scores);
        let running = Running {
            max: &mut max[..num_rows],
            sum: &mut sum[..num_rows],
            acc,
        };
        view.soften(segment, (first_row, j0), scores, running);
        // A row that has seen no key yet has no maximum; it takes no part.
        let sees = |r: usize| view.visible(segment, first_row + r).end > j0;
        let seen = |r: usize| sees(r) && max[r] != R::NEG_INFINITY;
        multiply_active::<R, S>(view.isa, scores, (tile, n), &values, e, acc, seen);
    }
    for (r, acc) in acc.chunks_mut(e).enumerate() {
        let lse = finish(acc, max[r], sum[r]);
        put(first_row + r, acc, lse);
    }
}

/// Divides the output of a row by its denominator; the logarithm of the sum of exponentials.
#[inline(always)]
fn finish<R: Real>(acc: &mut [R], max: R, sum: R) -> R {
    let nothing = sum == R::ZERO;
    let factor = if nothing { R::ZERO } else { R::ONE / sum };
    acc.iter_mut().for_each(|x| *x = *x * factor);
    if nothing {
        R::NEG_INFINITY
    } else {
        max + sum.ln()
    }
}

#[inline(always)]
pub(super) fn load_row<R: Real, S: Store<R>>(from: &[S], at: usize, to: &mut [R]) {
    let from = &from[at..at + to.len()];
    for (to, &x) in to.iter_mut().zip(from) {
        *to = x.load();
    }
}

/// Scales the scores of lanes `first..end` and masks the others.
#[inline(always)]
pub(super) fn mask<R: Real>(scores: &mut [R], scale: R, first: usize, end: usize) {
    for s in scores.iter_mut() {
        *s = *s * scale;
    }
    let end = end.min(scores.len());
    scores[end..].fill(R::NEG_INFINITY);
    scores[..first.min(end)].fill(R::NEG_INFINITY);
}

/// Running maxima, denominators and outputs of neighbouring rows.
pub(super) struct Running<'a, R> {
    /// `[rows]`
    pub(super) max: &'a mut [R],
    /// `[rows]`
    pub(super) sum: &'a mut [R],
    /// `[rows, head_dim]`
    pub(super) acc: &'a mut [R],
}

/// Folds one tile of masked scores `[rows, tile]` into what is running, for the rows that see
/// something of the tile, and leaves the probabilities that are to be multiplied with the values.
///
/// Step by step for some rows together: a row alone would wait for its maximum, then for its
/// exponentials, then for their sum.
#[inline(always)]
pub(super) fn online_softmax<R: Real, S: Store<R>>(
    scores: &mut [R],
    tile: usize,
    running: Running<'_, R>,
    sees: impl Fn(usize) -> bool,
) {
    /// Rows that go step by step together.
    const TOGETHER: usize = 8;
    let e = running.acc.len() / running.max.len();
    let rows = scores
        .chunks_mut(TOGETHER * tile)
        .zip(running.acc.chunks_mut(TOGETHER * e));
    let kept = running
        .max
        .chunks_mut(TOGETHER)
        .zip(running.sum.chunks_mut(TOGETHER));
    for (block, ((scores, acc), (max, sum))) in rows.zip(kept).enumerate() {
        let mut shrink = [R::ZERO; TOGETHER];
        let mut is_active = [false; TOGETHER];
        for (r, scores) in scores.chunks(tile).enumerate() {
            if !sees(block * TOGETHER + r) {
                continue;
            }
            let new_max = max[r].maximum(R::largest(scores));
            if new_max != R::NEG_INFINITY {
                is_active[r] = true;
                shrink[r] = max[r] - new_max;
                max[r] = new_max;
            }
        }
        for x in &mut shrink {
            *x = x.exp_small();
        }
        let active = |(r, _): &(usize, &mut [R])| is_active[*r];
        for (r, scores) in scores.chunks_mut(tile).enumerate().filter(active) {
            let max = max[r];
            for s in scores {
                *s = (*s - max).exp_small();
            }
        }
        for (r, scores) in scores.chunks_mut(tile).enumerate().filter(active) {
            sum[r] = sum[r] * shrink[r] + sum_slices([&*scores], |[x]| x);
        }
        for (_, scores) in scores.chunks_mut(tile).enumerate().filter(active) {
            for s in scores {
                *s = S::round(*s);
            }
        }
        for (r, acc) in acc.chunks_mut(e).enumerate().filter(active) {
            let shrink = shrink[r];
            // The maximum is the old one, and products in this order leave nothing to flush.
            if S::ORDER == Order::EvenOdd && shrink == R::ONE {
                continue;
            }
            for x in acc {
                *x = (*x * shrink).flush();
            }
        }
    }
}
