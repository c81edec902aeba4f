//! Gradients of attention: the scores of a tile once more from `lse`, and from them `dq`, `dk`
//! and `dv`.
//!
//! Two ways, the same bits. [`head_gradients`] goes over the keys of one key head once, with
//! five products for each pair of tiles, and is one task. [`dq_block`] and [`dkdv_tile`] compute scores
//! and their gradients each for itself, seven products, in as many tasks as there are tiles.

use super::{Panel, Store, View, multiply_active, multiply_rows, pack_rows, turned, units};
use crate::kernels::product::transpose;
use crate::ops::Segment;
use crate::real::{Real, sum_slices};

/// Tiles of keys that [`head_gradients`] works on together.
pub const KEY_TILES: usize = 4;

/// Values of sums that [`head_gradients`] and [`dkdv_tile`] need.
pub fn sums_len(head_dim: usize, tile: usize) -> usize {
    2 * KEY_TILES * head_dim * tile
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

/// `delta = rowsum(dout * out)` of one row of one head: over the whole row, not per tile.
#[inline(always)]
pub fn row_delta<R: Real>(dout: &[R], out: &[R]) -> R {
    sum_slices([dout, out], |[dout, out]| dout * out)
}

/// [`row_delta`] of each row of `width` values.
#[inline(always)]
pub fn row_deltas<R: Real>(dout: &[R], out: &[R], width: usize, delta: &mut [R]) {
    let rows = dout.chunks(width).zip(out.chunks(width));
    for (delta, (dout, out)) in delta.iter_mut().zip(rows) {
        *delta = row_delta(dout, out);
    }
}

/// A block of queries against one tile of keys.
#[derive(Clone, Copy)]
pub(super) struct QueryBlock {
    pub(super) segment: Segment,
    pub(super) head: usize,
    /// First query, and the end.
    pub(super) rows: (usize, usize),
    /// Position of the tile's first key.
    pub(super) j0: usize,
}

impl QueryBlock {
    pub(super) fn num_rows(&self) -> usize {
        self.rows.1 - self.rows.0
    }

    /// The end of what its last query sees, which sees most.
    pub(super) fn last_end<S>(&self, view: &View<'_, S>) -> usize {
        view.visible(self.segment, self.rows.1 - 1).end
    }

    /// Row of `lse` and `delta` of query `r` of the block.
    pub(super) fn row_head<S>(&self, view: View<'_, S>, r: usize) -> usize {
        (self.segment.q_start + self.rows.0 + r) * view.num_heads + self.head
    }

    /// Whether query `r` sees a key at or behind the tile's first.
    #[inline(always)]
    pub(super) fn sees<R: Real, S>(
        &self,
        view: View<'_, S>,
        saved: Saved<'_, R>,
        r: usize,
    ) -> bool {
        let end = view.visible(self.segment, self.rows.0 + r).end;
        end > self.j0 && saved.lse[self.row_head(view, r)] != R::NEG_INFINITY
    }

    /// `p = exp(s - lse)` and `ds = p * (dp - delta)`, rounded, `[rows, tile]` each; zeros
    /// for queries that see nothing.
    #[inline(always)]
    fn gradients<R: Real, S: Store<R>>(
        &self,
        view: View<'_, S>,
        saved: Saved<'_, R>,
        (queries, douts): (&[R], &[R]),
        (keys_t, values_t): (&Panel<'_, R>, &Panel<'_, R>),
        (p, ds): (&mut [R], &mut [R]),
    ) {
        let (e, tile) = (view.head_dim, view.tile);
        p.fill(R::ZERO);
        ds.fill(R::ZERO);
        multiply_rows::<R, S>(view.isa, queries, (e, e), keys_t, tile, p);
        multiply_rows::<R, S>(view.isa, douts, (e, e), values_t, tile, ds);
        self.soften(view, saved, (p, ds));
    }

    /// From products of queries with keys, and of `dout` with values, to `p` and `ds`.
    #[inline(always)]
    pub(super) fn soften<R: Real, S: Store<R>>(
        &self,
        view: View<'_, S>,
        saved: Saved<'_, R>,
        (p, ds): (&mut [R], &mut [R]),
    ) {
        let tile = view.tile;
        for (r, (p, ds)) in p.chunks_mut(tile).zip(ds.chunks_mut(tile)).enumerate() {
            if !self.sees(view, saved, r) {
                p.fill(R::ZERO);
                ds.fill(R::ZERO);
                continue;
            }
            let visible = view.visible(self.segment, self.rows.0 + r);
            visible.mask(p, view.scale(), self.j0);
            let row_head = self.row_head(view, r);
            let (lse, delta) = (saved.lse[row_head], saved.delta[row_head]);
            // One step a loop: all in one, compilers do not vectorise it.
            for p in p.iter_mut() {
                *p = (*p - lse).exp_small();
            }
            for (ds, &p) in ds.iter_mut().zip(&*p) {
                *ds = p * (*ds - delta);
            }
            ds.iter_mut().for_each(|x| *x = S::round(*x));
            p.iter_mut().for_each(|x| *x = S::round(*x));
        }
    }

    /// `dout` of the block's rows, rounded, `[rows, head_dim]`.
    #[inline(always)]
    fn pack_douts<'b, R: Real, S: Store<R>>(
        &self,
        view: View<'_, S>,
        saved: Saved<'_, R>,
        to: &'b mut [R],
    ) -> Panel<'b, R> {
        let e = view.head_dim;
        let from = (self.segment.q_start + self.rows.0, self.num_rows());
        let at = (view.num_heads * e, self.head * e, e);
        pack_rows(saved.dout, from, at, S::round, to)
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
    let num_rows = rows.1 - rows.0;
    let (k_rows, scratch) = scratch.split_at_mut(e * tile);
    let (k_t, scratch) = scratch.split_at_mut(e * tile);
    let (v_rows, scratch) = scratch.split_at_mut(e * tile);
    let (v_t, scratch) = scratch.split_at_mut(e * tile);
    let (q_rows, scratch) = scratch.split_at_mut(e * tile);
    let (dout_rows, scratch) = scratch.split_at_mut(e * tile);
    let (acc, scratch) = scratch.split_at_mut(e * tile);
    let (p, scratch) = scratch.split_at_mut(tile * tile);
    let (p, ds) = (&mut p[..num_rows * tile], &mut scratch[..num_rows * tile]);
    let acc = &mut acc[..num_rows * e];
    acc.fill(R::ZERO);
    let mut block = QueryBlock {
        segment,
        head,
        rows,
        j0: 0,
    };
    let queries = view.pack_queries(segment, head, rows, q_rows).values;
    let douts = block.pack_douts(view, saved, dout_rows).values;
    let kv_at = (view.num_kv_heads * e, view.key_head(head) * e, e);
    for j0 in (0..view.visible(segment, rows.1 - 1).end).step_by(tile) {
        block.j0 = j0;
        let n = tile.min(segment.kv_len - j0);
        let keys = pack_rows(view.k, (segment.kv_start + j0, n), kv_at, S::load, k_rows);
        let keys_t = turned(view.isa, &keys, e, tile, k_t);
        let values = pack_rows(view.v, (segment.kv_start + j0, n), kv_at, S::load, v_rows);
        let values_t = turned(view.isa, &values, e, tile, v_t);
        let panels = (&keys_t, &values_t);
        block.gradients(view, saved, (queries, douts), panels, (&mut *p, &mut *ds));
        let sees = |r| block.sees(view, saved, r);
        multiply_active::<R, S>(view.isa, ds, (tile, n), &keys, e, acc, sees);
    }
    let scale = view.scale::<R>();
    for (r, acc) in acc.chunks_mut(e).enumerate() {
        acc.iter_mut().for_each(|x| *x = *x * scale);
        put(rows.0 + r, acc);
    }
}

/// Where the gradients of a segment's queries lie.
pub trait QueryGradients<R> {
    /// The `[head_dim]` values of a row and a head.
    fn of(&mut self, row: usize, head: usize) -> &mut [R];
}

/// `dq`, `dk` and `dv` of one key head of `segment` and of the query heads that share it, in one
/// pass over the keys; `put(position, dk, dv)`.
///
/// `sums` has [`sums_len`] values.
#[allow(clippy::too_many_arguments)]
#[inline(always)]
pub fn head_gradients<R: Real, S: Store<R>>(
    view: View<'_, S>,
    saved: Saved<'_, R>,
    segment: Segment,
    key_head: usize,
    dq: &mut dyn QueryGradients<R>,
    mut put: impl FnMut(usize, &[R], &[R]),
    scratch: &mut [R],
    sums: &mut [R],
) {
    let heads = view.query_heads(key_head);
    for head in heads.clone() {
        for row in 0..segment.q_len {
            dq.of(row, head).fill(R::ZERO);
        }
    }
    for start in (0..segment.kv_len).step_by(KEY_TILES * view.tile) {
        let end = segment.kv_len.min(start + KEY_TILES * view.tile);
        let keys = Keys {
            segment,
            key_head,
            range: (start, end),
        };
        key_gradients(view, saved, keys, Some(&mut *dq), &mut put, scratch, sums);
    }
    let scale = view.scale::<R>();
    for head in heads {
        for row in 0..segment.q_len {
            dq.of(row, head).iter_mut().for_each(|x| *x = *x * scale);
        }
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
    put: impl FnMut(usize, &[R], &[R]),
    scratch: &mut [R],
    sums: &mut [R],
) {
    let keys = Keys {
        segment,
        key_head,
        range: (j0, segment.kv_len.min(j0 + view.tile)),
    };
    key_gradients(view, saved, keys, None, put, scratch, sums);
}

/// Neighbouring keys of one head, those of a tile or of several.
#[derive(Clone, Copy)]
pub(super) struct Keys {
    pub(super) segment: Segment,
    pub(super) key_head: usize,
    /// Position of the first, and the end.
    pub(super) range: (usize, usize),
}

impl Keys {
    pub(super) fn len(&self) -> usize {
        self.range.1 - self.range.0
    }

    pub(super) fn tiles(self, tile: usize) -> impl Iterator<Item = Self> {
        let starts = (self.range.0..self.range.1).step_by(tile);
        starts.map(move |start| Self {
            range: (start, self.range.1.min(start + tile)),
            ..self
        })
    }

    /// The blocks of queries that see keys at or behind the first.
    pub(super) fn blocks<S>(self, view: &View<'_, S>) -> impl Iterator<Item = QueryBlock> {
        let (segment, j0) = (self.segment, self.range.0);
        let starts = move |head| {
            (0..segment.q_len)
                .step_by(view.tile)
                .map(move |i0| (head, i0))
        };
        let blocks = view.query_heads(self.key_head).flat_map(starts);
        let blocks = blocks.map(move |(head, i0)| QueryBlock {
            segment,
            head,
            rows: (i0, segment.q_len.min(i0 + view.tile)),
            j0,
        });
        blocks.filter(move |block| block.last_end(view) > j0)
    }
}

/// `dk` and `dv` of some keys, and with `dq` their share of that, unscaled.
#[inline(always)]
fn key_gradients<R: Real, S: Store<R>>(
    view: View<'_, S>,
    saved: Saved<'_, R>,
    keys: Keys,
    mut dq: Option<&mut dyn QueryGradients<R>>,
    mut put: impl FnMut(usize, &[R], &[R]),
    scratch: &mut [R],
    sums: &mut [R],
) {
    let e = view.head_dim;
    let of_sum = keys.len() * e;
    let (dk, dv) = sums[..2 * of_sum].split_at_mut(of_sum);
    dk.fill(R::ZERO);
    dv.fill(R::ZERO);
    if !units::add_gradients(&view, saved, keys, &mut dq, scratch, (&mut *dk, &mut *dv)) {
        let of_tile = view.tile * e;
        let sums = dk.chunks_mut(of_tile).zip(dv.chunks_mut(of_tile));
        for (keys, sums) in keys.tiles(view.tile).zip(sums) {
            add_gradients(view, saved, keys, &mut dq, scratch, sums);
        }
    }
    let scale = view.scale::<R>();
    for (lane, (dk, dv)) in dk.chunks_mut(e).zip(dv.chunks(e)).enumerate() {
        dk.iter_mut().for_each(|x| *x = *x * scale);
        put(keys.range.0 + lane, dk, dv);
    }
}

/// The sums of [`key_gradients`] for the keys of a tile, unscaled.
#[inline(always)]
fn add_gradients<R: Real, S: Store<R>>(
    view: View<'_, S>,
    saved: Saved<'_, R>,
    of_tile: Keys,
    dq: &mut Option<&mut dyn QueryGradients<R>>,
    scratch: &mut [R],
    (dk, dv): (&mut [R], &mut [R]),
) {
    let (e, tile) = (view.head_dim, view.tile);
    let (k_rows, scratch) = scratch.split_at_mut(e * tile);
    let (k_t, scratch) = scratch.split_at_mut(e * tile);
    let (v_t, scratch) = scratch.split_at_mut(e * tile);
    let kv_at = (view.num_kv_heads * e, of_tile.key_head * e, e);
    let from = (of_tile.segment.kv_start + of_tile.range.0, of_tile.len());
    // The rows of values are needed no longer than the queries that come there.
    let values = pack_rows(view.v, from, kv_at, S::load, scratch);
    let values_t = turned(view.isa, &values, e, tile, v_t);
    let keys = pack_rows(view.k, from, kv_at, S::load, k_rows);
    let keys_t = turned(view.isa, &keys, e, tile, k_t);
    let panels = Panels {
        keys,
        keys_t,
        values_t,
    };
    for block in of_tile.blocks(&view) {
        let sums = (&mut *dk, &mut *dv);
        block.add_gradients(view, saved, &panels, dq, scratch, sums);
    }
}

/// A tile of keys and values.
struct Panels<'a, R> {
    /// `[keys, head_dim]`
    keys: Panel<'a, R>,
    /// `[head_dim, tile]`
    keys_t: Panel<'a, R>,
    /// `[head_dim, tile]`
    values_t: Panel<'a, R>,
}

impl QueryBlock {
    /// Adds the block's share to `dk` (unscaled) and `dv`, `[keys, head_dim]`, and the tile's to
    /// `dq` (unscaled), if it is asked for.
    #[inline(always)]
    fn add_gradients<R: Real, S: Store<R>>(
        &self,
        view: View<'_, S>,
        saved: Saved<'_, R>,
        panels: &Panels<'_, R>,
        dq: &mut Option<&mut dyn QueryGradients<R>>,
        scratch: &mut [R],
        (dk, dv): (&mut [R], &mut [R]),
    ) {
        let (e, tile) = (view.head_dim, view.tile);
        let num_rows = self.num_rows();
        let (q_rows, scratch) = scratch.split_at_mut(e * tile);
        let (dout_rows, scratch) = scratch.split_at_mut(e * tile);
        let (p, scratch) = scratch.split_at_mut(tile * tile);
        let (ds, scratch) = scratch.split_at_mut(tile * tile);
        let (p_t, scratch) = scratch.split_at_mut(tile * tile);
        let (ds_t, scratch) = scratch.split_at_mut(tile * tile);
        let (p, ds) = (&mut p[..num_rows * tile], &mut ds[..num_rows * tile]);
        let queries = view.pack_queries(self.segment, self.head, self.rows, q_rows);
        let douts = self.pack_douts(view, saved, dout_rows);
        let operands = (queries.values, douts.values);
        let of_tile = (&panels.keys_t, &panels.values_t);
        self.gradients(view, saved, operands, of_tile, (&mut *p, &mut *ds));
        transpose(view.isa, p, tile, tile, p_t);
        transpose(view.isa, ds, tile, tile, ds_t);
        let keys = dk.len() / e * tile;
        let depth = (tile, num_rows);
        multiply_rows::<R, S>(view.isa, &p_t[..keys], depth, &douts, e, dv);
        multiply_rows::<R, S>(view.isa, &ds_t[..keys], depth, &queries, e, dk);
        if let Some(dq) = dq {
            let acc = &mut scratch[..num_rows * e];
            self.add_query_gradients::<R, S>((view, saved), ds, &panels.keys, &mut **dq, acc);
        }
    }

    /// `dq += ds * keys`, for the rows that see something of the tile; with `acc` as scratch.
    #[inline(always)]
    fn add_query_gradients<R: Real, S: Store<R>>(
        &self,
        (view, saved): (View<'_, S>, Saved<'_, R>),
        ds: &[R],
        keys: &Panel<'_, R>,
        dq: &mut dyn QueryGradients<R>,
        acc: &mut [R],
    ) {
        let (e, tile) = (view.head_dim, view.tile);
        self.load_dq(dq, acc);
        let depth = (tile, keys.values.len() / e);
        let sees = |r| self.sees(view, saved, r);
        multiply_active::<R, S>(view.isa, ds, depth, keys, e, acc, sees);
        self.store_dq(dq, acc);
    }

    /// Reads the gradients of the block's queries, `[rows, head_dim]`.
    #[inline(always)]
    pub(super) fn load_dq<R: Copy>(&self, dq: &mut dyn QueryGradients<R>, to: &mut [R]) {
        let e = to.len() / self.num_rows();
        for (row, to) in (self.rows.0..).zip(to.chunks_mut(e)) {
            to.copy_from_slice(dq.of(row, self.head));
        }
    }

    /// Writes them.
    #[inline(always)]
    pub(super) fn store_dq<R: Copy>(&self, dq: &mut dyn QueryGradients<R>, from: &[R]) {
        let e = from.len() / self.num_rows();
        for (row, from) in (self.rows.0..).zip(from.chunks(e)) {
            dq.of(row, self.head).copy_from_slice(from);
        }
    }
}
