//! The cache of keys and values of [`Host`].

use super::{Host, TILE};
use crate::cache::{CACHE_BLOCK, CacheBuf, CacheData, CacheStore, CachedAttention, CachedSegment};
use crate::cpu::multiversion;
use crate::cpu::{Isa, Pool, RowParts, RowsMut};
use crate::kernels::attention::Store;
use crate::kernels::cache::{
    Bundle, CacheView, CachedView, cached_block, quantize_head, rows_together,
};
use crate::memory::Lease;
use crate::ops::AttnBuf;
use crate::real::Real;
use std::ops::Range;

/// Where the numbers of one slot lie.
#[derive(Clone, Copy)]
struct Slot {
    num_kv_heads: usize,
    head_dim: usize,
    block: usize,
    lane: usize,
}

impl Slot {
    fn of(cache: &CacheBuf, slot: u32) -> Self {
        Self {
            num_kv_heads: cache.shape.num_kv_heads,
            head_dim: cache.shape.head_dim,
            block: slot as usize / CACHE_BLOCK,
            lane: slot as usize % CACHE_BLOCK,
        }
    }

    fn head(self, head: usize) -> usize {
        self.block * self.num_kv_heads + head
    }

    fn key(self, head: usize, d: usize) -> usize {
        (self.head(head) * self.head_dim + d) * CACHE_BLOCK + self.lane
    }

    fn value(self, head: usize) -> usize {
        (self.head(head) * CACHE_BLOCK + self.lane) * self.head_dim
    }

    fn scale(self, head: usize) -> usize {
        self.head(head) * CACHE_BLOCK + self.lane
    }

    /// Writes the key and the value of one head, whose numbers of this block these are.
    fn put_head<T: Copy>(self, (k, v): (&[T], &[T]), (to_k, to_v): (&mut [T], &mut [T])) {
        for (to, &x) in to_k[self.lane..].iter_mut().step_by(CACHE_BLOCK).zip(k) {
            *to = x;
        }
        to_v[self.lane * self.head_dim..][..self.head_dim].copy_from_slice(v);
    }
}

/// Stores rows of keys and values, each thread those of some heads.
fn put_rows<T: Copy + Send + Sync>(
    pool: &Pool,
    slots: &[Slot],
    (k, v): (&[T], &[T]),
    (to_k, to_v): (&mut [T], &mut [T]),
) {
    /// Less is stored before another thread has heard of it.
    const WORTH_A_THREAD: usize = 8 << 10;
    let Some(&Slot {
        num_kv_heads,
        head_dim,
        ..
    }) = slots.first()
    else {
        return;
    };
    let of_block = head_dim * CACHE_BLOCK;
    let (to_k, to_v) = (RowsMut::new(to_k, of_block), RowsMut::new(to_v, of_block));
    let grain = (WORTH_A_THREAD / (slots.len() * head_dim)).clamp(1, num_kv_heads);
    pool.run(num_kv_heads.div_ceil(grain), &|task, _| {
        for head in task * grain..num_kv_heads.min((task + 1) * grain) {
            for (row, slot) in slots.iter().enumerate() {
                let from = (row * num_kv_heads + head) * head_dim;
                let (k, v) = (&k[from..from + head_dim], &v[from..from + head_dim]);
                let at = slot.head(head);
                // SAFETY: the numbers of a head belong to one task, which takes those of one
                // block at a time.
                let to = unsafe { (to_k.part(at..at + 1), to_v.part(at..at + 1)) };
                slot.put_head((k, v), to);
            }
        }
    });
}

/// Rows of keys or values in f32, exactly.
fn rows_f32<R: Real>(lease: &mut Lease<'_>, x: AttnBuf<R>, len: usize) -> Vec<f32> {
    match x {
        AttnBuf::Real(x) => lease.read(x)[..len].iter().map(|x| x.to_f32()).collect(),
        AttnBuf::Bf16(x) => lease.read(x)[..len].iter().map(|x| x.to_f32()).collect(),
    }
}

/// Heads of keys or values in int8, and the scale of each.
fn quantize(pool: &Pool, isa: Isa, x: &[f32], head_dim: usize) -> (Vec<i8>, Vec<f32>) {
    /// Heads that one task rounds.
    const HEADS: usize = 64;
    let heads = x.len() / head_dim;
    let (mut q, mut scales) = (vec![0; x.len()], vec![0.0; heads]);
    let to = (RowsMut::new(&mut q, head_dim), RowsMut::new(&mut scales, 1));
    pool.run(heads.div_ceil(HEADS), &|task, _| {
        let run = task * HEADS..heads.min((task + 1) * HEADS);
        let x = &x[run.start * head_dim..run.end * head_dim];
        // SAFETY: a head belongs to one task, which asks once.
        let (q, scales) = unsafe { to.part(run) };
        quantize_heads(isa, x, q, scales);
    });
    (q, scales)
}

multiversion! {
    /// Rounds heads to int8, as many as there are scales.
    fn quantize_heads[][](x: &[f32], q: &mut [i8], scales: &mut [f32]) = quantize_heads_kernel;
}

#[inline(always)]
fn quantize_heads_kernel(x: &[f32], q: &mut [i8], scales: &mut [f32]) {
    let head_dim = x.len() / scales.len();
    let heads = x.chunks_exact(head_dim).zip(q.chunks_exact_mut(head_dim));
    for (scale, (x, q)) in scales.iter_mut().zip(heads) {
        *scale = quantize_head(x, q);
    }
}

impl<R: Real> Host<R> {
    pub(super) fn cache_store_op(&mut self, op: CacheStore<'_, R>) {
        let shape = op.cache.shape;
        let width = shape.num_kv_heads * shape.head_dim;
        let mut lease = self.arena.lease();
        let slots = op.slots.iter().map(|&slot| Slot::of(&op.cache, slot));
        let slots: Vec<Slot> = slots.collect();
        if let (AttnBuf::Bf16(k), AttnBuf::Bf16(v), CacheData::Bf16(to_k, to_v)) =
            (op.k, op.v, op.cache.data)
        {
            let from = (lease.read(k), lease.read(v));
            let to = (lease.write(to_k), lease.write(to_v));
            put_rows(&self.pool, &slots, from, to);
            return;
        }
        let len = op.slots.len() * width;
        let k = rows_f32(&mut lease, op.k, len);
        let v = rows_f32(&mut lease, op.v, len);
        match op.cache.data {
            CacheData::Bf16(to_k, to_v) => {
                let to = (lease.write(to_k), lease.write(to_v));
                let round = |x: &[f32]| x.iter().map(|x| x.to_bf16()).collect::<Vec<_>>();
                put_rows(&self.pool, &slots, (&round(&k), &round(&v)), to);
            }
            CacheData::F32(to_k, to_v) => {
                let to = (lease.write(to_k), lease.write(to_v));
                put_rows(&self.pool, &slots, (&k, &v), to);
            }
            CacheData::Int8 {
                k: to_k,
                v: to_v,
                k_scales,
                v_scales,
            } => {
                let round = |x: &[f32]| quantize(&self.pool, self.isa, x, shape.head_dim);
                let ((k, of_k), (v, of_v)) = (round(&k), round(&v));
                let to = (lease.write(to_k), lease.write(to_v));
                put_rows(&self.pool, &slots, (&k, &v), to);
                let (k_scales, v_scales) = (lease.write(k_scales), lease.write(v_scales));
                let of_slots = of_k
                    .chunks(shape.num_kv_heads)
                    .zip(of_v.chunks(shape.num_kv_heads));
                for (slot, (of_k, of_v)) in slots.iter().zip(of_slots) {
                    for head in 0..shape.num_kv_heads {
                        let at = slot.scale(head);
                        (k_scales[at], v_scales[at]) = (of_k[head], of_v[head]);
                    }
                }
            }
        }
    }

    pub(super) fn cache_move_op(&mut self, cache: CacheBuf, moves: &[(u32, u32)]) {
        let mut lease = self.arena.lease();
        match cache.data {
            CacheData::Bf16(k, v) => {
                move_slots(&cache, moves, lease.write(k), lease.write(v));
            }
            CacheData::F32(k, v) => move_slots(&cache, moves, lease.write(k), lease.write(v)),
            CacheData::Int8 {
                k,
                v,
                k_scales,
                v_scales,
            } => {
                move_slots(&cache, moves, lease.write(k), lease.write(v));
                let (k_scales, v_scales) = (lease.write(k_scales), lease.write(v_scales));
                for &(from, to) in moves {
                    let (from, to) = (Slot::of(&cache, from), Slot::of(&cache, to));
                    for head in 0..from.num_kv_heads {
                        k_scales[to.scale(head)] = k_scales[from.scale(head)];
                        v_scales[to.scale(head)] = v_scales[from.scale(head)];
                    }
                }
            }
        }
    }

    pub(super) fn cached_attention_op(&mut self, op: CachedAttention<'_, R>) {
        let shape = op.cache.shape;
        let mut lease = self.arena.lease();
        let cache = match op.cache.data {
            CacheData::Bf16(k, v) => CacheView::Bf16(lease.read(k), lease.read(v)),
            CacheData::F32(k, v) => CacheView::F32(lease.read(k), lease.read(v)),
            CacheData::Int8 {
                k,
                v,
                k_scales,
                v_scales,
            } => CacheView::Int8(
                lease.read(k),
                lease.read(v),
                lease.read(k_scales),
                lease.read(v_scales),
            ),
        };
        let out = RowsMut::new(lease.write(op.out), shape.head_dim);
        let scratch = RowsMut::new(lease.write(self.workspace.real), self.workspace.real_len);
        let (isa, pool) = (self.isa, &self.pool);
        match op.q {
            AttnBuf::Real(q) => {
                let view = view(isa, &op, lease.read(q), cache);
                attend(pool, view, op.segments, out, &scratch);
            }
            AttnBuf::Bf16(q) => {
                let view = view(isa, &op, lease.read(q), cache);
                attend(pool, view, op.segments, out, &scratch);
            }
        }
    }
}

fn move_slots<T: Copy>(cache: &CacheBuf, moves: &[(u32, u32)], k: &mut [T], v: &mut [T]) {
    for &(from, to) in moves {
        let (from, to) = (Slot::of(cache, from), Slot::of(cache, to));
        for head in 0..from.num_kv_heads {
            for d in 0..from.head_dim {
                k[to.key(head, d)] = k[from.key(head, d)];
            }
            let at = from.value(head);
            v.copy_within(at..at + from.head_dim, to.value(head));
        }
    }
}

fn view<'a, R, S>(
    isa: Isa,
    op: &CachedAttention<'_, R>,
    q: &'a [S],
    cache: CacheView<'a>,
) -> CachedView<'a, S> {
    CachedView {
        q,
        cache,
        num_heads: op.num_heads,
        num_kv_heads: op.cache.shape.num_kv_heads,
        head_dim: op.cache.shape.head_dim,
        tile: TILE,
        isa,
    }
}

/// Tasks are a bundle of segments, or a run of rows of one, and a key head, whose query heads
/// are split where they are more than a tile.
fn attend<R: Real, S: Store<R>>(
    pool: &Pool,
    view: CachedView<'_, S>,
    segments: &[CachedSegment<'_>],
    out: RowsMut<'_, R>,
    scratch: &RowsMut<'_, R>,
) {
    assert_disjoint(segments.iter().map(|s| (s.q_start, s.q_len)));
    let heads = view.num_heads;
    let group = heads / view.num_kv_heads;
    let runs = group.div_ceil(TILE);
    let parts = view.num_kv_heads * runs;
    let (longest, all) = segments.iter().fold((0, 0), |(longest, all), s| {
        (longest.max(s.q_len), all + s.q_len)
    });
    // Many rows share the work on a tile of keys; but no thread is to be without any.
    let most = (all * parts / (2 * pool.threads())).next_multiple_of(TILE);
    let step = rows_together::<R, S>(&view, longest, group.min(TILE)).min(most.max(TILE));
    // As many rows as a tile has room for, likewise.
    let most = (all * parts / (2 * pool.threads())).min(TILE / group.min(TILE));
    let bundles = || Bundle::of(segments, most, TILE);
    let tasks: usize = bundles().map(|bundle| bundle.runs(step)).sum();
    pool.run(tasks * parts, &|task, worker| {
        let (bundle, index) = at_run(bundles(), step, task / parts);
        let (kv_head, run) = (task % parts / runs, task % runs);
        let first = kv_head * group + run * TILE;
        let of_task = first..(first + TILE).min((kv_head + 1) * group);
        let mut put = |row: usize, head: usize, values: &[R]| {
            let at = row * heads + head;
            // SAFETY: row `at` of this head belongs to this task alone: segments share none.
            unsafe { out.part(at..at + 1) }.copy_from_slice(values);
        };
        // SAFETY: a worker runs one task at a time, and a task asks once.
        let scratch = unsafe { scratch.part(worker..worker + 1) };
        let rows = bundle.rows(index, step);
        cached_task(view.isa, view, bundle, of_task, rows, &mut put, scratch);
    });
}

/// Panics unless each run of rows, `(start, len)`, begins behind the one before it.
pub(super) fn assert_disjoint(runs: impl Iterator<Item = (usize, usize)>) {
    let mut end = 0;
    for (start, len) in runs {
        assert!(start >= end, "segments must ascend and share no row");
        end = start + len;
    }
}

/// The bundle that holds run `index` of all, and the run's number in it.
fn at_run<'a, 's>(
    bundles: impl Iterator<Item = Bundle<'a, 's>>,
    step: usize,
    mut index: usize,
) -> (Bundle<'a, 's>, usize) {
    for bundle in bundles {
        let runs = bundle.runs(step);
        if index < runs {
            return (bundle, index);
        }
        index -= runs;
    }
    unreachable!("a task outside of the segments")
}

/// Takes a row, a head and its output.
type PutHead<'a, R> = dyn FnMut(usize, usize, &[R]) + 'a;

multiversion! {
    /// [`cached_block`]
    fn cached_task[R: Real, S: Store<R>][R, S](
        view: CachedView<'_, S>,
        bundle: Bundle<'_, '_>,
        heads: Range<usize>,
        rows: (usize, usize),
        put: &mut PutHead<'_, R>,
        scratch: &mut [R],
    ) = cached_block;
}
