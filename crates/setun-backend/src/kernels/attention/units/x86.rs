//! Attention's loops on a [`Unit`].

use super::keys::{CachedKeys, Source};
use super::softmax::{soften, soften_gradients};
use crate::cache::CachedSegment;
use crate::cpu::Isa;
use crate::cpu::amx::Tiles;
use crate::cpu::bf16::rows::{MOST_OUTPUTS, Packed, Rows, multiply, packed_len};
use crate::cpu::bf16::{Dots, PAIR, Pairs, Unit};
use crate::kernels::attention::backward::{KEY_TILES, Keys, QueryBlock, QueryGradients, Saved};
use crate::kernels::attention::{QUERY_BLOCKS, Running, Sight, Store, View, finish};
use crate::kernels::cache::{CacheView, CachedView};
use crate::kernels::product::BLOCK;
use crate::ops::Segment;
use crate::real::Real;
use half::bf16;
use std::any::TypeId;
use std::ops::Range;

/// Takes a row, a head, the output and its logarithm.
type PutRow<'a> = dyn FnMut(usize, usize, &[f32], f32) + 'a;

/// Whether there is a unit for such numbers and sizes.
#[inline(always)]
fn has_unit<R: Real, S: Store<R>>(isa: Isa, sizes: [usize; 2]) -> bool {
    let is_f32 = TypeId::of::<R>() == TypeId::of::<f32>();
    let is_stored = TypeId::of::<S>() == TypeId::of::<bf16>();
    let fits = |size: usize| size.is_multiple_of(PAIR) && size <= MOST_OUTPUTS;
    is_f32 && is_stored && isa.has_bf16() && sizes.into_iter().all(fits)
}

/// The view, where there is a unit for it.
#[inline(always)]
pub(super) fn suited<'a, R: Real, S: Store<R>>(view: &View<'a, S>) -> Option<View<'a, bf16>> {
    has_unit::<R, S>(view.isa, [view.tile, view.head_dim]).then(|| View {
        q: bytemuck::cast_slice(view.q),
        k: bytemuck::cast_slice(view.k),
        v: bytemuck::cast_slice(view.v),
        num_heads: view.num_heads,
        num_kv_heads: view.num_kv_heads,
        head_dim: view.head_dim,
        tile: view.tile,
        isa: view.isa,
        sight: view.sight,
    })
}

pub(super) fn forward(
    (view, source): (View<'_, bf16>, Source<'_>),
    segment: Segment,
    heads: Range<usize>,
    rows: (usize, usize),
    put: &mut PutRow<'_>,
    scratch: &mut [f32],
) {
    let forward = match view.isa {
        Isa::Amx => forward_on::<Tiles>,
        _ => forward_on::<Dots>,
    };
    // SAFETY: an `Isa` that has a unit for bf16 is made by `Isa::available` only, where the
    // processor has it, and AVX-512.
    unsafe { forward((view, &source), segment, heads, rows, put, scratch) }
}

/// Blocks of queries that [`forward_cached`] takes: what fits into the scratch of
/// [`cached_block`](crate::kernels::cache::cached_block).
const CACHED_BLOCKS: usize = 2 * QUERY_BLOCKS;

/// Whether [`forward_cached`] takes so many heads, and how many rows then.
#[inline(always)]
pub(super) fn cached_rows<R: Real, S: Store<R>>(
    view: &CachedView<'_, S>,
    heads: usize,
) -> Option<usize> {
    let suits = has_unit::<R, S>(view.isa, [view.tile, view.head_dim]);
    let is_in_bf16 = !matches!(view.cache, CacheView::F32(..));
    (suits && is_in_bf16 && heads <= CACHED_BLOCKS).then_some(CACHED_BLOCKS / heads * view.tile)
}

/// Attention to a cache of rows of a chain, as many as [`cached_rows`] says; `put(row, head,
/// values)`. False, and nothing is done, where a value that some row does not see is no number.
pub(super) fn forward_cached<S: bytemuck::Pod>(
    of_cache: &CachedView<'_, S>,
    segment: &CachedSegment<'_>,
    heads: Range<usize>,
    rows: (usize, usize),
    put: &mut dyn FnMut(usize, usize, &[f32]),
    scratch: &mut [f32],
) -> bool {
    let keys = CachedKeys {
        cache: of_cache.cache,
        isa: of_cache.isa,
        blocks: segment.blocks,
        num_kv_heads: of_cache.num_kv_heads,
        head_dim: of_cache.head_dim,
    };
    let view = View {
        q: bytemuck::cast_slice(of_cache.q),
        k: &[],
        v: &[],
        num_heads: of_cache.num_heads,
        num_kv_heads: of_cache.num_kv_heads,
        head_dim: of_cache.head_dim,
        tile: of_cache.tile,
        isa: of_cache.isa,
        sight: Sight::Causal,
    };
    let key_head = view.key_head(heads.start);
    let unseen = (segment.end(rows.0), segment.end(rows.1 - 1));
    if !keys.is_finite(unseen, key_head) {
        return false;
    }
    let segment = Segment {
        q_start: segment.q_start,
        q_len: segment.q_len,
        kv_start: 0,
        kv_len: segment.past + segment.q_len,
    };
    let mut put = |row: usize, head: usize, out: &[f32], _: f32| put(row, head, out);
    forward(
        (view, Source::Cache(keys)),
        segment,
        heads,
        rows,
        &mut put,
        scratch,
    );
    true
}

pub(super) fn add_gradients(
    view: View<'_, bf16>,
    saved: Saved<'_, f32>,
    keys: Keys,
    dq: Option<&mut dyn QueryGradients<f32>>,
    scratch: &mut [f32],
    sums: (&mut [f32], &mut [f32]),
) {
    let add = match view.isa {
        Isa::Amx => add_gradients_on::<Tiles>,
        _ => add_gradients_on::<Dots>,
    };
    // SAFETY: as in `forward`.
    unsafe { add(view, saved, keys, dq, scratch, sums) }
}

/// Memory that operands and results are cut from.
struct Room<'a>(&'a mut [f32]);

impl<'a> Room<'a> {
    fn numbers(&mut self, len: usize) -> &'a mut [f32] {
        let (numbers, rest) = std::mem::take(&mut self.0).split_at_mut(len);
        self.0 = rest;
        numbers
    }

    /// `len` numbers of 16 bits, an even number of them.
    fn halves<T: bytemuck::Pod>(&mut self, len: usize) -> &'a mut [T] {
        bytemuck::cast_slice_mut(self.numbers(len / 2))
    }
}

impl<'a> View<'a, bf16> {
    fn query_rows(&self, segment: Segment, head: usize, rows: (usize, usize)) -> Rows<'a, bf16> {
        let at = ((segment.q_start + rows.0) * self.num_heads + head) * self.head_dim;
        Rows {
            values: &self.q[at..],
            stride: self.num_heads * self.head_dim,
            len: rows.1 - rows.0,
            width: self.head_dim,
        }
    }
}

/// Some rows of queries, with what is running for them.
struct Queries<'a> {
    head: usize,
    rows: (usize, usize),
    packed: Packed<'a>,
    running: Running<'a, f32>,
}

impl<'a> Queries<'a> {
    #[target_feature(enable = "avx2,fma,avx512f,avx512bw")]
    fn pack(
        pairs: Pairs,
        view: View<'_, bf16>,
        (segment, head): (Segment, usize),
        rows: (usize, usize),
        room: &mut Room<'a>,
    ) -> Self {
        let num_rows = rows.1 - rows.0;
        let packed = room.halves(packed_len(view.tile, view.head_dim));
        let running = Running {
            max: room.numbers(num_rows),
            sum: room.numbers(num_rows),
            acc: room.numbers(num_rows * view.head_dim),
        };
        running.max.fill(f32::NEG_INFINITY);
        running.sum.fill(0.0);
        running.acc.fill(0.0);
        Self {
            head,
            rows,
            packed: Packed::left(pairs, view.query_rows(segment, head, rows), packed),
            running,
        }
    }
}

/// Heads that share a key head. A tile of keys and values is packed once for all heads and rows.
///
/// # Safety
/// The processor has the unit, and AVX-512.
#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn forward_on<U: Unit>(
    (view, source): (View<'_, bf16>, &Source<'_>),
    segment: Segment,
    heads: Range<usize>,
    rows: (usize, usize),
    put: &mut PutRow<'_>,
    scratch: &mut [f32],
) {
    let (e, tile) = (view.head_dim, view.tile);
    let mut room = Room(scratch);
    let [keys, values] = [(); 2].map(|()| room.halves(packed_len(tile, e)));
    let widened = room.halves(source.room_len(tile));
    // Not a `Vec`: training allocates nothing.
    let mut blocks = [const { None::<Queries<'_>> }; CACHED_BLOCKS];
    let of_head = (rows.1 - rows.0).div_ceil(tile);
    for (i, block) in blocks[..heads.len() * of_head].iter_mut().enumerate() {
        let (head, start) = (heads.start + i / of_head, rows.0 + i % of_head * tile);
        let rows = (start, rows.1.min(start + tile));
        *block = Some(Queries::pack(
            U::PAIRS,
            view,
            (segment, head),
            rows,
            &mut room,
        ));
    }
    // SAFETY: the caller's promise.
    let unit = unsafe { U::start() };
    let seen = Keys {
        segment,
        key_head: view.key_head(heads.start),
        range: (0, view.visible(segment, rows.1 - 1).end),
    };
    let mut tiles = seen.tiles(tile).peekable();
    while let Some(of_tile) = tiles.next() {
        let (keys, values) = source.pack(U::PAIRS, of_tile, tile, widened, (keys, values));
        if let Some(&next) = tiles.peek() {
            source.prefetch(next);
        }
        let j0 = of_tile.range.0;
        let sees = |block: &&mut Queries<'_>| view.visible(segment, block.rows.1 - 1).end > j0;
        for block in blocks.iter_mut().flatten().filter(sees) {
            let room = Room(&mut *room.0);
            // SAFETY: the caller's promise.
            unsafe { attend(&unit, view, of_tile, (&keys, &values), block, room) };
        }
    }
    for block in blocks.into_iter().flatten() {
        let Running { max, sum, acc } = block.running;
        for (r, acc) in acc.chunks_mut(e).enumerate() {
            let lse = finish(acc, max[r], sum[r]);
            put(block.rows.0 + r, block.head, acc, lse);
        }
    }
}

/// What the queries of a block take from a tile of keys and values.
///
/// # Safety
/// The processor has the unit, and AVX-512.
#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn attend<U: Unit>(
    unit: &U,
    view: View<'_, bf16>,
    of_tile: Keys,
    (keys, values): (&Packed<'_>, &Packed<'_>),
    block: &mut Queries<'_>,
    mut room: Room<'_>,
) {
    let (e, tile, num_rows) = (view.head_dim, view.tile, block.rows.1 - block.rows.0);
    let (segment, j0) = (of_tile.segment, of_tile.range.0);
    let probabilities = room.halves(packed_len(tile, tile));
    let kept = room.numbers(num_rows * e);
    let scores = room.numbers(num_rows * tile);
    scores.fill(0.0);
    // SAFETY: the caller's promise.
    unsafe { multiply(unit, &block.packed, keys, scores, tile) };
    let Running { max, sum, acc } = &mut block.running;
    let running = Running { max, sum, acc };
    let width = of_tile.len();
    let p = if width == tile {
        let at = (segment, block.rows.0, j0);
        soften(U::PAIRS, view, at, scores, running, probabilities)
    } else {
        view.soften(segment, (block.rows.0, j0), scores, running);
        let scores = Rows {
            values: &*scores,
            stride: tile,
            len: num_rows,
            width,
        };
        Packed::rounded(U::PAIRS, scores, probabilities)
    };
    // A row that has seen no key yet has no maximum; it takes no part.
    let Running { max, acc, .. } = &mut block.running;
    let sees = |r: usize| view.visible(segment, block.rows.0 + r).end > j0;
    let seen = |r: usize| sees(r) && max[r] != f32::NEG_INFINITY;
    // SAFETY: the caller's promise.
    unsafe { multiply_seen(unit, (&p, values), (acc, e), kept, seen) };
}

/// `acc += left * right` in the rows that are seen; with `kept` as scratch for the others.
///
/// # Safety
/// As [`multiply`].
unsafe fn multiply_seen<U: Unit>(
    unit: &U,
    (left, right): (&Packed<'_>, &Packed<'_>),
    (acc, width): (&mut [f32], usize),
    kept: &mut [f32],
    seen: impl Fn(usize) -> bool,
) {
    let mut unseen = (0..acc.len() / width).filter(|&r| !seen(r)).peekable();
    if unseen.peek().is_some() {
        kept.copy_from_slice(acc);
    }
    // SAFETY: the caller's promise.
    unsafe { multiply(unit, left, right, acc, width) };
    for r in unseen {
        let row = r * width..(r + 1) * width;
        acc[row.clone()].copy_from_slice(&kept[row]);
    }
}

/// # Safety
/// The processor has the unit, and AVX-512.
#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn add_gradients_on<U: Unit>(
    view: View<'_, bf16>,
    saved: Saved<'_, f32>,
    keys: Keys,
    mut dq: Option<&mut dyn QueryGradients<f32>>,
    scratch: &mut [f32],
    (dk, dv): (&mut [f32], &mut [f32]),
) {
    let mut room = Room(scratch);
    let mut tiles = [const { None }; KEY_TILES];
    assert!(keys.len() <= KEY_TILES * view.tile);
    for (tile, keys) in tiles.iter_mut().zip(keys.tiles(view.tile)) {
        *tile = Some(Panels::pack(U::PAIRS, view, keys, &mut room));
    }
    // SAFETY: the caller's promise.
    let unit = unsafe { U::start() };
    for block in keys.blocks(&view) {
        let room = Room(&mut *room.0);
        // SAFETY: the caller's promise.
        unsafe {
            let sums = (&mut *dk, &mut *dv);
            add_block((&unit, &tiles), (view, saved), block, &mut dq, room, sums);
        }
    }
}

/// A tile of keys and values.
struct Panels<'a> {
    range: (usize, usize),
    keys: Packed<'a>,
    keys_t: Packed<'a>,
    values_t: Packed<'a>,
}

impl<'a> Panels<'a> {
    #[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512vl")]
    fn pack(pairs: Pairs, view: View<'_, bf16>, of_tile: Keys, room: &mut Room<'a>) -> Self {
        let len = packed_len(view.tile, view.head_dim);
        let (k, v) = (
            view.key_rows(view.k, of_tile),
            view.key_rows(view.v, of_tile),
        );
        Self {
            range: of_tile.range,
            keys: Packed::steps(pairs, k, room.halves(len)),
            keys_t: Packed::columns(pairs, k, view.tile, room.halves(len)),
            values_t: Packed::columns(pairs, v, view.tile, room.halves(len)),
        }
    }
}

/// A block's queries and gradients of outputs, as rows and as steps.
struct Operands<'a> {
    queries: [Packed<'a>; 2],
    douts: [Packed<'a>; 2],
}

/// What the queries of a block add, one tile of keys after the other.
///
/// # Safety
/// The processor has the unit, and AVX-512.
#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn add_block<U: Unit>(
    (unit, tiles): (&U, &[Option<Panels<'_>>]),
    (view, saved): (View<'_, bf16>, Saved<'_, f32>),
    mut block: QueryBlock,
    dq: &mut Option<&mut dyn QueryGradients<f32>>,
    mut room: Room<'_>,
    (dk, dv): (&mut [f32], &mut [f32]),
) {
    let (e, tile, pairs) = (view.head_dim, view.tile, U::PAIRS);
    let len = packed_len(tile, e);
    let queries = view.query_rows(block.segment, block.head, block.rows);
    let douts = block.round_douts(view, saved, room.halves(tile * e));
    let operands = Operands {
        queries: [
            Packed::left(pairs, queries, room.halves(len)),
            Packed::steps(pairs, queries, room.halves(len)),
        ],
        douts: [
            Packed::left(pairs, douts, room.halves(len)),
            Packed::steps(pairs, douts, room.halves(len)),
        ],
    };
    let acc = room.numbers(block.num_rows() * e);
    if let Some(dq) = dq {
        block.load_dq(&mut **dq, acc);
    }
    let (last_end, first) = (block.last_end(&view), block.j0);
    for panels in tiles
        .iter()
        .flatten()
        .take_while(|tile| tile.range.0 < last_end)
    {
        block.j0 = panels.range.0;
        let [start, end] = [panels.range.0, panels.range.1].map(|at| (at - first) * e);
        let sums = (&mut dk[start..end], &mut dv[start..end]);
        let acc = dq.is_some().then_some(&mut *acc);
        let room = Room(&mut *room.0);
        // SAFETY: the caller's promise.
        unsafe {
            add_tile(
                (unit, panels),
                (view, saved),
                (&block, &operands),
                acc,
                room,
                sums,
            )
        };
    }
    if let Some(dq) = dq {
        block.store_dq(&mut **dq, acc);
    }
}

/// What the queries of a block add to the sums of a tile, and with `dq` the tile to theirs.
///
/// # Safety
/// The processor has the unit, and AVX-512.
#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn add_tile<U: Unit>(
    (unit, panels): (&U, &Panels<'_>),
    (view, saved): (View<'_, bf16>, Saved<'_, f32>),
    (block, operands): (&QueryBlock, &Operands<'_>),
    dq: Option<&mut [f32]>,
    mut room: Room<'_>,
    (dk, dv): (&mut [f32], &mut [f32]),
) {
    let (e, tile, pairs) = (view.head_dim, view.tile, U::PAIRS);
    let (num_rows, keys) = (block.num_rows(), dk.len() / e);
    let [scores, dp] = [(); 2].map(|()| room.numbers(num_rows * tile));
    let [p, ds] = [(); 2].map(|()| room.halves(num_rows * tile));
    let [p_t, ds_t, ds_left] = [(); 3].map(|()| room.halves(packed_len(tile, tile)));
    scores.fill(0.0);
    dp.fill(0.0);
    let [queries, query_steps] = &operands.queries;
    let [douts, dout_steps] = &operands.douts;
    // SAFETY: the caller's promise.
    unsafe {
        multiply(unit, queries, &panels.keys_t, scores, tile);
        multiply(unit, douts, &panels.values_t, dp, tile);
    }
    soften_gradients(view, saved, block, (scores, dp), keys, (&mut *p, &mut *ds));
    let rows = |values, width| Rows {
        values,
        stride: tile,
        len: num_rows,
        width,
    };
    let p_t = Packed::turned(pairs, rows(p, tile), keys, p_t);
    let ds_t = Packed::turned(pairs, rows(ds, tile), keys, ds_t);
    // SAFETY: the caller's promise.
    unsafe {
        multiply(unit, &p_t, dout_steps, dv, e);
        multiply(unit, &ds_t, query_steps, dk, e);
    }
    let Some(acc) = dq else { return };
    let ds = Packed::left(pairs, rows(ds, keys.next_multiple_of(BLOCK)), ds_left);
    let kept = room.numbers(num_rows * e);
    let seen = |r| block.sees(view, saved, r);
    // SAFETY: the caller's promise.
    unsafe { multiply_seen(unit, (&ds, &panels.keys), (acc, e), kept, seen) };
}

impl QueryBlock {
    /// `dout` of the block's rows, rounded, `[rows, head_dim]`.
    #[inline(always)]
    fn round_douts<'a>(
        &self,
        view: View<'_, bf16>,
        saved: Saved<'_, f32>,
        to: &'a mut [bf16],
    ) -> Rows<'a, bf16> {
        let from = self.dout_rows(view, saved);
        for (r, to) in to.chunks_mut(from.width).take(from.len).enumerate() {
            for (to, x) in to.iter_mut().zip(from.row(r)) {
                *to = x.to_bf16();
            }
        }
        Rows {
            values: to,
            stride: from.width,
            len: from.len,
            width: from.width,
        }
    }

    fn dout_rows<'a>(&self, view: View<'_, bf16>, saved: Saved<'a, f32>) -> Rows<'a, f32> {
        let row = self.segment.q_start + self.rows.0;
        Rows {
            values: &saved.dout[(row * view.num_heads + self.head) * view.head_dim..],
            stride: view.num_heads * view.head_dim,
            len: self.num_rows(),
            width: view.head_dim,
        }
    }
}
