//! Attention of [`Host`] over keys and values of the same call.

use super::cache::assert_disjoint;
use super::scratch::Scratch;
use super::*;
use crate::cpu::multiversion;
use crate::kernels::attention::{
    self, QUERY_BLOCKS, QueryGradients, Saved, Sight, Store, View, dkdv_tile, dq_block,
    forward_block, head_gradients,
};
use crate::ops::*;

impl<R: Real> Host<R> {
    pub(super) fn attention_op(&mut self, op: Attention<'_, R>) {
        let mut lease = self.arena.lease();
        let width = op.num_heads * op.head_dim;
        let out = RowsMut::new(lease.write(op.out), op.head_dim);
        let lse = RowsMut::new(lease.write(op.lse), 1);
        let scratch = Scratch::lease(&mut lease, &self.workspace);
        let (isa, pool) = (self.isa, &self.pool);
        debug_assert!(op.out.len().is_multiple_of(width));
        match (op.q, op.k, op.v) {
            (AttnBuf::Real(q), AttnBuf::Real(k), AttnBuf::Real(v)) => {
                let view = view(isa, &op, lease.read(q), lease.read(k), lease.read(v));
                attention_forward(pool, isa, view, op.segments, (out, lse), &scratch);
            }
            (AttnBuf::Bf16(q), AttnBuf::Bf16(k), AttnBuf::Bf16(v)) => {
                let view = view(isa, &op, lease.read(q), lease.read(k), lease.read(v));
                attention_forward(pool, isa, view, op.segments, (out, lse), &scratch);
            }
            _ => panic!("queries, keys and values must be stored alike"),
        }
    }

    pub(super) fn attention_backward_op(&mut self, op: AttentionBackward<'_, R>) {
        let forward = op.forward;
        let mut lease = self.arena.lease();
        let (dout, out) = (lease.read(op.dout), lease.read(forward.out));
        let lse = lease.read(forward.lse);
        let delta = lease.write(op.delta);
        let e = forward.head_dim;
        self.pool.by_rows(
            delta.len(),
            64,
            RowsMut::new(&mut *delta, 1),
            |rows, delta| {
                let (dout, out) = (rows_of(dout, &rows, e), rows_of(out, &rows, e));
                deltas_of(self.isa, dout, out, e, delta);
            },
        );
        let saved = Saved { lse, dout, delta };
        let dq = RowsMut::new(lease.write(op.dq), e);
        let dk = RowsMut::new(lease.write(op.dk), e);
        let dv = RowsMut::new(lease.write(op.dv), e);
        let scratch = Scratch::lease(&mut lease, &self.workspace);
        let grads = Gradients { dq, dk, dv };
        let (isa, pool, segments) = (self.isa, &self.pool, forward.segments);
        match (forward.q, forward.k, forward.v) {
            (AttnBuf::Real(q), AttnBuf::Real(k), AttnBuf::Real(v)) => {
                let view = view(isa, &forward, lease.read(q), lease.read(k), lease.read(v));
                attention_gradients(pool, isa, view, saved, segments, grads, &scratch);
            }
            (AttnBuf::Bf16(q), AttnBuf::Bf16(k), AttnBuf::Bf16(v)) => {
                let view = view(isa, &forward, lease.read(q), lease.read(k), lease.read(v));
                attention_gradients(pool, isa, view, saved, segments, grads, &scratch);
            }
            _ => panic!("queries, keys and values must be stored alike"),
        }
    }
}

fn view<'a, R, S>(
    isa: Isa,
    op: &Attention<'a, R>,
    q: &'a [S],
    k: &'a [S],
    v: &'a [S],
) -> View<'a, S> {
    View {
        q,
        k,
        v,
        num_heads: op.num_heads,
        num_kv_heads: op.num_kv_heads,
        head_dim: op.head_dim,
        tile: TILE,
        isa,
        sight: op.blocks.map_or(Sight::Causal, Sight::Blocks),
    }
}

/// One piece of an attention: a segment and the first of its rows or keys, of which a piece has
/// `size`.
fn piece(
    segments: &[Segment],
    size: usize,
    mut index: usize,
    len: impl Fn(&Segment) -> usize,
) -> (Segment, usize) {
    for segment in segments {
        let blocks = len(segment).div_ceil(size);
        if index < blocks {
            return (*segment, index * size);
        }
        index -= blocks;
    }
    unreachable!("a task outside of the segments")
}

fn pieces(segments: &[Segment], size: usize, len: impl Fn(&Segment) -> usize) -> usize {
    segments.iter().map(|s| len(s).div_ceil(size)).sum()
}

/// Rows of queries of a task of [`attention_forward`]: many, which share the work on a tile of
/// keys, where there are tasks enough.
fn query_rows(tiles: usize, threads: usize) -> usize {
    const TASKS_OF_A_THREAD: usize = 16;
    match tiles >= TASKS_OF_A_THREAD * QUERY_BLOCKS * threads {
        true => QUERY_BLOCKS * TILE,
        false => TILE,
    }
}

fn attention_forward<R: Real, S: Store<R>>(
    pool: &Pool,
    isa: Isa,
    view: View<'_, S>,
    segments: &[Segment],
    (out, lse): (RowsMut<'_, R>, RowsMut<'_, R>),
    scratch: &Scratch<'_, R>,
) {
    assert_disjoint(segments.iter().map(|s| (s.q_start, s.q_len)));
    let heads = view.num_heads;
    let len = |s: &Segment| s.q_len;
    let size = query_rows(pieces(segments, TILE, len) * heads, pool.threads());
    pool.run(pieces(segments, size, len) * heads, &|task, worker| {
        let (segment, start) = piece(segments, size, task / heads, len);
        let head = task % heads;
        let rows = (start, segment.q_len.min(start + size));
        let mut put = |row: usize, values: &[R], log_sum: R| {
            let at = (segment.q_start + row) * heads + head;
            // SAFETY: row `at` of this head belongs to this task alone: segments share none.
            unsafe {
                out.part(at..at + 1).copy_from_slice(values);
                lse.part(at..at + 1)[0] = log_sum;
            }
        };
        forward_task(isa, view, segment, head, rows, &mut put, scratch.of(worker));
    });
}

/// Gradients that tasks write, no two of them those of the same row and head.
struct Gradients<'a, R> {
    dq: RowsMut<'a, R>,
    dk: RowsMut<'a, R>,
    dv: RowsMut<'a, R>,
}

impl<'a, R: Real> Gradients<'a, R> {
    /// Those of a query.
    fn query(&self, segment: Segment, row: usize, (head, heads): (usize, usize)) -> &'a mut [R] {
        let at = (segment.q_start + row) * heads + head;
        // SAFETY: a row of a head belongs to one task, as segments share no row, and the task
        // asks for one at a time.
        unsafe { self.dq.part(at..at + 1) }
    }

    /// Writes those of a key head's keys and values, by their position.
    fn key(
        &self,
        segment: Segment,
        (key_head, kv_heads): (usize, usize),
    ) -> impl FnMut(usize, &[R], &[R]) + use<'_, 'a, R> {
        move |position, dk, dv| {
            let at = (segment.kv_start + position) * kv_heads + key_head;
            // SAFETY: a key of a head belongs to one task, likewise.
            unsafe {
                self.dk.part(at..at + 1).copy_from_slice(dk);
                self.dv.part(at..at + 1).copy_from_slice(dv);
            }
        }
    }
}

/// Those of the queries of a segment's head, in the task that has it.
struct OfSegment<'g, 'a, R> {
    grads: &'g Gradients<'a, R>,
    segment: Segment,
    heads: usize,
}

impl<R: Real> QueryGradients<R> for OfSegment<'_, '_, R> {
    fn of(&mut self, row: usize, head: usize) -> &mut [R] {
        self.grads.query(self.segment, row, (head, self.heads))
    }
}

fn attention_gradients<R: Real, S: Store<R>>(
    pool: &Pool,
    isa: Isa,
    view: View<'_, S>,
    saved: Saved<'_, R>,
    segments: &[Segment],
    grads: Gradients<'_, R>,
    scratch: &Scratch<'_, R>,
) {
    assert_disjoint(segments.iter().map(|s| (s.q_start, s.q_len)));
    assert_disjoint(segments.iter().map(|s| (s.kv_start, s.kv_len)));
    let (heads, kv_heads) = (view.num_heads, view.num_kv_heads);
    let sums = sums_len(view.head_dim, TILE);
    let grads = &grads;
    // A pass over the keys of a whole head takes five products instead of seven; where that
    // leaves threads without work, tiles are shared out instead. The bits are the same.
    let whole_heads = segments.len() * kv_heads;
    if pool.threads() == 1 || whole_heads >= 2 * pool.threads() {
        pool.run(whole_heads, &|task, worker| {
            let (segment, key_head) = (segments[task / kv_heads], task % kv_heads);
            let (sums, scratch) = scratch.of(worker).split_at_mut(sums);
            let mut dq = OfSegment {
                grads,
                segment,
                heads,
            };
            let mut put = grads.key(segment, (key_head, kv_heads));
            head_task(
                isa, view, saved, segment, key_head, &mut dq, &mut put, scratch, sums,
            );
        });
        return;
    }
    pool.run(
        pieces(segments, TILE, |s| s.q_len) * heads,
        &|task, worker| {
            let (segment, start) = piece(segments, TILE, task / heads, |s| s.q_len);
            let head = task % heads;
            let rows = (start, segment.q_len.min(start + TILE));
            let mut put = |row: usize, values: &[R]| {
                grads
                    .query(segment, row, (head, heads))
                    .copy_from_slice(values);
            };
            let scratch = scratch.of(worker);
            dq_task(isa, view, saved, segment, head, rows, &mut put, scratch);
        },
    );
    let key_tiles = pieces(segments, TILE, |s| s.kv_len);
    pool.run(key_tiles * kv_heads, &|task, worker| {
        let (segment, j0) = piece(segments, TILE, task / kv_heads, |s| s.kv_len);
        let key_head = task % kv_heads;
        let (sums, scratch) = scratch.of(worker).split_at_mut(sums);
        let mut put = grads.key(segment, (key_head, kv_heads));
        dkdv_task(
            isa, view, saved, segment, key_head, j0, &mut put, scratch, sums,
        );
    });
}

multiversion! {
    /// [`forward_block`]
    fn forward_task[R: Real, S: Store<R>][R, S](
        view: View<'_, S>,
        segment: Segment,
        head: usize,
        rows: (usize, usize),
        put: &mut dyn FnMut(usize, &[R], R),
        scratch: &mut [R],
    ) = forward_block;
}
multiversion! {
    /// [`dq_block`]
    fn dq_task[R: Real, S: Store<R>][R, S](
        view: View<'_, S>,
        saved: Saved<'_, R>,
        segment: Segment,
        head: usize,
        rows: (usize, usize),
        put: &mut dyn FnMut(usize, &[R]),
        scratch: &mut [R],
    ) = dq_block;
}
/// Takes the gradients of the key and the value at a position.
type PutKeyGradients<'a, R> = dyn FnMut(usize, &[R], &[R]) + 'a;

multiversion! {
    /// [`head_gradients`]
    fn head_task[R: Real, S: Store<R>][R, S](
        view: View<'_, S>,
        saved: Saved<'_, R>,
        segment: Segment,
        key_head: usize,
        dq: &mut dyn QueryGradients<R>,
        put: &mut PutKeyGradients<'_, R>,
        scratch: &mut [R],
        sums: &mut [R],
    ) = head_gradients;
}

multiversion! {
    /// [`dkdv_tile`]
    fn dkdv_task[R: Real, S: Store<R>][R, S](
        view: View<'_, S>,
        saved: Saved<'_, R>,
        segment: Segment,
        key_head: usize,
        j0: usize,
        put: &mut PutKeyGradients<'_, R>,
        scratch: &mut [R],
        sums: &mut [R],
    ) = dkdv_tile;
}
multiversion! {
    /// [`row_deltas`](attention::row_deltas)
    fn deltas_of[R: Real][R](dout: &[R], out: &[R], width: usize, delta: &mut [R])
        = attention::row_deltas;
}
