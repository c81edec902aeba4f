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

use crate::cpu::Isa;
use crate::kernels::loss::row_max;
use crate::kernels::product::{Order, needs_flush, vec_mat};
use crate::ops::Segment;
use crate::real::{Real, sum_indexed};
use bytemuck::Pod;
use half::bf16;

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
    /// First position that each query row sees, or all from 0.
    pub first_key: Option<&'a [u32]>,
}

/// What the backward pass reads beside [`View`].
#[derive(Clone, Copy)]
pub struct Saved<'a, R> {
    /// `[q rows, num_heads]`.
    pub lse: &'a [R],
    /// `[q rows, num_heads, head_dim]`.
    pub dout: &'a [R],
    /// `[q rows, num_heads]`: `rowsum(dout * out)` over the whole row.
    pub delta: &'a [R],
}

/// Scratch values that [`forward_block`], [`dq_block`] and [`dkdv_tile`] need.
pub fn scratch_len(head_dim: usize, tile: usize) -> usize {
    5 * head_dim * tile + 2 * tile * tile + 4 * tile + 2 * head_dim
}

impl<S> View<'_, S> {
    fn key_head(&self, head: usize) -> usize {
        head / (self.num_heads / self.num_kv_heads)
    }

    /// Positions `first..end` that query `i` of `segment` sees.
    fn visible(&self, segment: Segment, i: usize) -> (usize, usize) {
        let end = segment.kv_len - segment.q_len + i + 1;
        let first = self
            .first_key
            .map_or(0, |f| f[segment.q_start + i] as usize);
        (first, end)
    }

    fn scale<R: Real>(&self) -> R {
        R::ONE / R::from_f64(self.head_dim as f64).sqrt()
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
fn transpose<'a, R: Real>(
    panel: &Panel<'_, R>,
    width: usize,
    tile: usize,
    to: &'a mut [R],
) -> Panel<'a, R> {
    let to = &mut to[..width * tile];
    to.fill(R::ZERO);
    for (lane, row) in panel.values.chunks(width).enumerate() {
        for (d, &x) in row.iter().enumerate() {
            to[d * tile + lane] = x;
        }
    }
    Panel {
        values: to,
        min_exponent: panel.min_exponent,
    }
}

/// `acc += x * panel`, flushing denormals only where they can occur.
#[inline(always)]
pub(super) fn multiply<R: Real, S: Store<R>>(
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

/// Attention of queries `rows` of `segment` for one head into `out` and `lse`, which are
/// those rows' `[rows, num_heads, head_dim]` and `[rows, num_heads]`.
#[inline(always)]
pub fn forward_block<R: Real, S: Store<R>>(
    view: View<'_, S>,
    segment: Segment,
    head: usize,
    rows: (usize, usize),
    mut put: impl FnMut(usize, &[R], R),
    scratch: &mut [R],
) {
    let (e, tile) = (view.head_dim, view.tile);
    let (first_row, end_row) = rows;
    let num_rows = end_row - first_row;
    let (k_rows, scratch) = scratch.split_at_mut(e * tile);
    let (k_t, scratch) = scratch.split_at_mut(e * tile);
    let (v_rows, scratch) = scratch.split_at_mut(e * tile);
    let (acc, scratch) = scratch.split_at_mut(e * tile);
    let (scores, scratch) = scratch.split_at_mut(tile);
    let (max, scratch) = scratch.split_at_mut(tile);
    let (sum, scratch) = scratch.split_at_mut(tile);
    let q_row = &mut scratch[..e];
    acc[..num_rows * e].fill(R::ZERO);
    max[..num_rows].fill(R::NEG_INFINITY);
    sum[..num_rows].fill(R::ZERO);
    let kv_at = (view.num_kv_heads * e, view.key_head(head) * e, e);
    let scale = view.scale::<R>();
    let last_end = view.visible(segment, end_row - 1).1;
    for j0 in (0..last_end).step_by(tile) {
        let n = tile.min(segment.kv_len - j0);
        let keys = pack_rows(view.k, (segment.kv_start + j0, n), kv_at, S::load, k_rows);
        let keys = transpose(&keys, e, tile, k_t);
        let values = pack_rows(view.v, (segment.kv_start + j0, n), kv_at, S::load, v_rows);
        for i in first_row..end_row {
            let r = i - first_row;
            let (first, end) = view.visible(segment, i);
            if end <= j0 {
                continue;
            }
            load_row(
                view.q,
                ((segment.q_start + i) * view.num_heads + head) * e,
                q_row,
            );
            scores.fill(R::ZERO);
            multiply::<R, S>(view.isa, q_row, &keys, tile, scores);
            mask(scores, scale, first.saturating_sub(j0), end - j0);
            let acc = &mut acc[r * e..(r + 1) * e];
            online_softmax::<R, S>(view.isa, scores, &values, n, &mut max[r], &mut sum[r], acc);
        }
    }
    for r in 0..num_rows {
        let acc = &mut acc[r * e..(r + 1) * e];
        let nothing = sum[r] == R::ZERO;
        let factor = if nothing { R::ZERO } else { R::ONE / sum[r] };
        acc.iter_mut().for_each(|x| *x = *x * factor);
        let lse = if nothing {
            R::NEG_INFINITY
        } else {
            max[r] + sum[r].ln()
        };
        put(first_row + r, acc, lse);
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

/// Folds one tile of masked scores into the running maximum, denominator and output.
#[inline(always)]
pub(super) fn online_softmax<R: Real, S: Store<R>>(
    isa: Isa,
    scores: &mut [R],
    values: &Panel<'_, R>,
    n: usize,
    max: &mut R,
    sum: &mut R,
    acc: &mut [R],
) {
    let new_max = (*max).maximum(row_max(scores));
    if new_max == R::NEG_INFINITY {
        return;
    }
    for s in scores.iter_mut() {
        *s = (*s - new_max).exp();
    }
    let shrink = (*max - new_max).exp();
    *max = new_max;
    *sum = *sum * shrink + sum_indexed(scores.len(), |i| scores[i]);
    for s in scores.iter_mut() {
        *s = S::round(*s);
    }
    for x in acc.iter_mut() {
        *x = (*x * shrink).flush();
    }
    multiply::<R, S>(isa, &scores[..n], values, acc.len(), acc);
}

/// `delta = rowsum(dout * out)` of one row of one head: over the whole row, not per tile.
#[inline(always)]
pub fn row_delta<R: Real>(dout: &[R], out: &[R]) -> R {
    sum_indexed(out.len(), |i| dout[i] * out[i])
}

/// `p = exp(s - lse)` and `ds = p * (dp - delta)` of one query against one tile.
struct RowGradient<'a, R> {
    p: &'a mut [R],
    ds: &'a mut [R],
    q: &'a mut [R],
    dout: &'a mut [R],
}

impl<R: Real> RowGradient<'_, R> {
    #[inline(always)]
    fn compute<S: Store<R>>(
        &mut self,
        view: View<'_, S>,
        saved: Saved<'_, R>,
        row_head: usize,
        lanes: (usize, usize),
        keys_t: &Panel<'_, R>,
        values_t: &Panel<'_, R>,
    ) {
        let (e, tile) = (view.head_dim, view.tile);
        load_row(view.q, row_head * e, self.q);
        for (to, &x) in self.dout.iter_mut().zip(&saved.dout[row_head * e..]) {
            *to = S::round(x);
        }
        self.p.fill(R::ZERO);
        multiply::<R, S>(view.isa, self.q, keys_t, tile, self.p);
        mask(self.p, view.scale(), lanes.0, lanes.1);
        let lse = saved.lse[row_head];
        for p in self.p.iter_mut() {
            *p = (*p - lse).exp();
        }
        self.ds.fill(R::ZERO);
        multiply::<R, S>(view.isa, self.dout, values_t, tile, self.ds);
        let delta = saved.delta[row_head];
        for (ds, &p) in self.ds.iter_mut().zip(&*self.p) {
            *ds = S::round(p * (*ds - delta));
        }
    }
}

/// `dq` of queries `rows` of `segment` for one head; `put(row, dq)`.
#[inline(always)]
pub fn dq_block<R: Real, S: Store<R>>(
    view: View<'_, S>,
    saved: Saved<'_, R>,
    segment: Segment,
    head: usize,
    rows: (usize, usize),
    mut put: impl FnMut(usize, &[R]),
    scratch: &mut [R],
) {
    let (e, tile) = (view.head_dim, view.tile);
    let (k_rows, scratch) = scratch.split_at_mut(e * tile);
    let (k_t, scratch) = scratch.split_at_mut(e * tile);
    let (v_rows, scratch) = scratch.split_at_mut(e * tile);
    let (v_t, scratch) = scratch.split_at_mut(e * tile);
    let (acc, scratch) = scratch.split_at_mut(e * tile);
    let (p, scratch) = scratch.split_at_mut(tile);
    let (ds, scratch) = scratch.split_at_mut(tile);
    let (q, scratch) = scratch.split_at_mut(e);
    let mut row = RowGradient {
        p,
        ds,
        q,
        dout: &mut scratch[..e],
    };
    acc[..(rows.1 - rows.0) * e].fill(R::ZERO);
    let kv_at = (view.num_kv_heads * e, view.key_head(head) * e, e);
    for j0 in (0..view.visible(segment, rows.1 - 1).1).step_by(tile) {
        let n = tile.min(segment.kv_len - j0);
        let keys = pack_rows(view.k, (segment.kv_start + j0, n), kv_at, S::load, k_rows);
        let keys_t = transpose(&keys, e, tile, k_t);
        let values = pack_rows(view.v, (segment.kv_start + j0, n), kv_at, S::load, v_rows);
        let values_t = transpose(&values, e, tile, v_t);
        for i in rows.0..rows.1 {
            let (first, end) = view.visible(segment, i);
            let row_head = (segment.q_start + i) * view.num_heads + head;
            if end <= j0 || saved.lse[row_head] == R::NEG_INFINITY {
                continue;
            }
            let lanes = (first.saturating_sub(j0), end - j0);
            row.compute(view, saved, row_head, lanes, &keys_t, &values_t);
            let acc = &mut acc[(i - rows.0) * e..(i - rows.0 + 1) * e];
            multiply::<R, S>(view.isa, &row.ds[..n], &keys, e, acc);
        }
    }
    let scale = view.scale::<R>();
    for (r, acc) in acc[..(rows.1 - rows.0) * e].chunks_mut(e).enumerate() {
        acc.iter_mut().for_each(|x| *x = *x * scale);
        put(rows.0 + r, acc);
    }
}

/// `dk` and `dv` `[n, head_dim]` of the keys of one tile from position `j0`: sums over
/// the query heads of the group, ascending, and over all query blocks, ascending.
#[allow(clippy::too_many_arguments)]
#[inline(always)]
pub fn dkdv_tile<R: Real, S: Store<R>>(
    view: View<'_, S>,
    saved: Saved<'_, R>,
    segment: Segment,
    key_head: usize,
    j0: usize,
    mut put: impl FnMut(usize, &[R], &[R]),
    scratch: &mut [R],
    sums: &mut [R],
) {
    let (e, tile) = (view.head_dim, view.tile);
    let (k_t, scratch) = scratch.split_at_mut(e * tile);
    let (v_t, scratch) = scratch.split_at_mut(e * tile);
    let (rows_a, scratch) = scratch.split_at_mut(e * tile);
    let (rows_b, scratch) = scratch.split_at_mut(e * tile);
    let kv_at = (view.num_kv_heads * e, key_head * e, e);
    let n = tile.min(segment.kv_len - j0);
    let keys = pack_rows(view.k, (segment.kv_start + j0, n), kv_at, S::load, rows_a);
    let keys_t = transpose(&keys, e, tile, k_t);
    let values = pack_rows(view.v, (segment.kv_start + j0, n), kv_at, S::load, rows_b);
    let values_t = transpose(&values, e, tile, v_t);
    let (dk, dv) = sums[..2 * e * tile].split_at_mut(e * tile);
    dk.fill(R::ZERO);
    dv.fill(R::ZERO);
    let group = view.num_heads / view.num_kv_heads;
    for head in key_head * group..(key_head + 1) * group {
        for i0 in (0..segment.q_len).step_by(tile) {
            let i1 = segment.q_len.min(i0 + tile);
            if view.visible(segment, i1 - 1).1 <= j0 {
                continue;
            }
            let block = QueryBlock {
                segment,
                head,
                j0,
                n,
                rows: (i0, i1),
            };
            let panels = (&keys_t, &values_t);
            block.add(
                view,
                saved,
                panels,
                (&mut *rows_a, &mut *rows_b),
                scratch,
                (dk, dv),
            );
        }
    }
    let scale = view.scale::<R>();
    for (lane, (dk, dv)) in dk.chunks_mut(e).zip(dv.chunks(e)).take(n).enumerate() {
        dk.iter_mut().for_each(|x| *x = *x * scale);
        put(j0 + lane, dk, dv);
    }
}

/// One block of queries against one tile of keys.
struct QueryBlock {
    segment: Segment,
    head: usize,
    j0: usize,
    n: usize,
    rows: (usize, usize),
}

impl QueryBlock {
    /// Adds the block's share to `dk` (unscaled) and `dv`.
    #[inline(always)]
    fn add<R: Real, S: Store<R>>(
        &self,
        view: View<'_, S>,
        saved: Saved<'_, R>,
        (keys_t, values_t): (&Panel<'_, R>, &Panel<'_, R>),
        (q_rows, dout_rows): (&mut [R], &mut [R]),
        scratch: &mut [R],
        (dk, dv): (&mut [R], &mut [R]),
    ) {
        let (e, tile) = (view.head_dim, view.tile);
        let (p_t, scratch) = scratch.split_at_mut(tile * tile);
        let (ds_t, scratch) = scratch.split_at_mut(tile * tile);
        let (p, scratch) = scratch.split_at_mut(tile);
        let (ds, scratch) = scratch.split_at_mut(tile);
        let (q, scratch) = scratch.split_at_mut(e);
        let mut row = RowGradient {
            p,
            ds,
            q,
            dout: &mut scratch[..e],
        };
        let num_rows = self.rows.1 - self.rows.0;
        for i in self.rows.0..self.rows.1 {
            let r = i - self.rows.0;
            let (first, end) = view.visible(self.segment, i);
            let row_head = (self.segment.q_start + i) * view.num_heads + self.head;
            if end <= self.j0 || saved.lse[row_head] == R::NEG_INFINITY {
                row.p.fill(R::ZERO);
                row.ds.fill(R::ZERO);
            } else {
                let lanes = (first.saturating_sub(self.j0), end - self.j0);
                row.compute(view, saved, row_head, lanes, keys_t, values_t);
            }
            for lane in 0..self.n {
                p_t[lane * tile + r] = S::round(row.p[lane]);
                ds_t[lane * tile + r] = row.ds[lane];
            }
        }
        let from = (self.segment.q_start + self.rows.0, num_rows);
        let at = (view.num_heads * e, self.head * e, e);
        let queries = pack_rows(view.q, from, at, S::load, q_rows);
        let douts = pack_rows(saved.dout, from, at, S::round, dout_rows);
        for lane in 0..self.n {
            let rows = lane * tile..lane * tile + num_rows;
            multiply::<R, S>(
                view.isa,
                &p_t[rows.clone()],
                &douts,
                e,
                &mut dv[lane * e..(lane + 1) * e],
            );
            multiply::<R, S>(
                view.isa,
                &ds_t[rows],
                &queries,
                e,
                &mut dk[lane * e..(lane + 1) * e],
            );
        }
    }
}
