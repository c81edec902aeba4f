//! Attention's loops on a [`Unit`].

use crate::cpu::Isa;
use crate::cpu::amx::Tiles;
use crate::cpu::bf16::rows::{MOST_OUTPUTS, Packed, Rows, multiply, packed_len};
use crate::cpu::bf16::{Dots, PAIR, Unit};
use crate::kernels::attention::backward::{KeyTile, QueryBlock, QueryGradients, Saved};
use crate::kernels::attention::{Running, Store, View, finish};
use crate::ops::Segment;
use crate::real::Real;
use half::bf16;
use std::any::TypeId;

/// Takes a row, its output and its logarithm.
type PutRow<'a> = dyn FnMut(usize, &[f32], f32) + 'a;

/// The view, where there is a unit for it.
#[inline(always)]
pub(super) fn suited<'a, R: Real, S: Store<R>>(view: &View<'a, S>) -> Option<View<'a, bf16>> {
    let is_stored =
        TypeId::of::<R>() == TypeId::of::<f32>() && TypeId::of::<S>() == TypeId::of::<bf16>();
    let fits = |size: usize| size.is_multiple_of(PAIR) && size <= MOST_OUTPUTS;
    let suits = is_stored && view.isa.has_bf16() && fits(view.tile) && fits(view.head_dim);
    suits.then(|| View {
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
    view: View<'_, bf16>,
    segment: Segment,
    head: usize,
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
    unsafe { forward(view, segment, head, rows, put, scratch) }
}

pub(super) fn add_gradients(
    view: View<'_, bf16>,
    saved: Saved<'_, f32>,
    tile: KeyTile,
    dq: Option<&mut dyn QueryGradients<f32>>,
    scratch: &mut [f32],
    sums: (&mut [f32], &mut [f32]),
) {
    let add = match view.isa {
        Isa::Amx => add_gradients_on::<Tiles>,
        _ => add_gradients_on::<Dots>,
    };
    // SAFETY: as in `forward`.
    unsafe { add(view, saved, tile, dq, scratch, sums) }
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

    /// The tile's rows of `values`, which are keys or values.
    fn key_rows(&self, values: &'a [bf16], tile: KeyTile) -> Rows<'a, bf16> {
        let row = tile.segment.kv_start + tile.j0;
        let at = (row * self.num_kv_heads + tile.key_head) * self.head_dim;
        Rows {
            values: &values[at..],
            stride: self.num_kv_heads * self.head_dim,
            len: tile.len(self.tile),
            width: self.head_dim,
        }
    }
}

/// # Safety
/// The processor has the unit, and AVX-512.
#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn forward_on<U: Unit>(
    view: View<'_, bf16>,
    segment: Segment,
    head: usize,
    rows: (usize, usize),
    put: &mut PutRow<'_>,
    scratch: &mut [f32],
) {
    let (e, tile, num_rows) = (view.head_dim, view.tile, rows.1 - rows.0);
    let mut room = Room(scratch);
    let [queries, keys, values] = [(); 3].map(|()| room.halves(packed_len(tile, e)));
    let probabilities = room.halves(packed_len(tile, tile));
    let [acc, kept] = [(); 2].map(|()| room.numbers(num_rows * e));
    let scores = room.numbers(num_rows * tile);
    let [max, sum] = [(); 2].map(|()| room.numbers(num_rows));
    acc.fill(0.0);
    max.fill(f32::NEG_INFINITY);
    sum.fill(0.0);
    // SAFETY: the caller's promise.
    let unit = unsafe { U::start() };
    let queries = Packed::left(U::PAIRS, view.query_rows(segment, head, rows), queries);
    let key_head = view.key_head(head);
    let end = view.visible(segment, rows.1 - 1).end;
    for j0 in (0..end).step_by(tile) {
        let of_tile = KeyTile {
            segment,
            key_head,
            j0,
        };
        let keys = Packed::columns(U::PAIRS, view.key_rows(view.k, of_tile), tile, keys);
        let values = Packed::steps(U::PAIRS, view.key_rows(view.v, of_tile), values);
        if j0 + tile < end {
            let next = KeyTile {
                j0: j0 + tile,
                ..of_tile
            };
            view.key_rows(view.k, next).prefetch();
            view.key_rows(view.v, next).prefetch();
        }
        scores.fill(0.0);
        // SAFETY: the caller's promise.
        unsafe { multiply(&unit, &queries, &keys, scores, tile) };
        let running = Running {
            max: &mut *max,
            sum: &mut *sum,
            acc: &mut *acc,
        };
        view.soften(segment, (rows.0, j0), scores, running);
        let scores = Rows {
            values: &*scores,
            stride: tile,
            len: num_rows,
            width: of_tile.len(tile),
        };
        let p = Packed::rounded(U::PAIRS, scores, probabilities);
        // A row that has seen no key yet has no maximum; it takes no part.
        let sees = |r: usize| view.visible(segment, rows.0 + r).end > j0;
        let seen = |r: usize| sees(r) && max[r] != f32::NEG_INFINITY;
        // SAFETY: the caller's promise.
        unsafe { multiply_seen(&unit, (&p, &values), (acc, e), kept, seen) };
    }
    for (r, acc) in acc.chunks_mut(e).enumerate() {
        let lse = finish(acc, max[r], sum[r]);
        put(rows.0 + r, acc, lse);
    }
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
#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn add_gradients_on<U: Unit>(
    view: View<'_, bf16>,
    saved: Saved<'_, f32>,
    tile: KeyTile,
    mut dq: Option<&mut dyn QueryGradients<f32>>,
    scratch: &mut [f32],
    (dk, dv): (&mut [f32], &mut [f32]),
) {
    let len = packed_len(view.tile, view.head_dim);
    let mut room = Room(scratch);
    let [keys, keys_t, values_t] = [(); 3].map(|()| room.halves(len));
    let (k, v) = (view.key_rows(view.k, tile), view.key_rows(view.v, tile));
    let panels = Panels {
        keys: Packed::steps(U::PAIRS, k, keys),
        keys_t: Packed::columns(U::PAIRS, k, view.tile, keys_t),
        values_t: Packed::columns(U::PAIRS, v, view.tile, values_t),
    };
    // SAFETY: the caller's promise.
    let unit = unsafe { U::start() };
    for block in tile.blocks(&view) {
        let room = Room(&mut *room.0);
        // SAFETY: the caller's promise.
        unsafe {
            let sums = (&mut *dk, &mut *dv);
            add_block((&unit, &panels), (view, saved), block, &mut dq, room, sums);
        }
    }
}

/// A tile of keys and values.
struct Panels<'a> {
    keys: Packed<'a>,
    keys_t: Packed<'a>,
    values_t: Packed<'a>,
}

/// What the queries of a block add.
///
/// # Safety
/// The processor has the unit, and AVX-512.
#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn add_block<U: Unit>(
    (unit, panels): (&U, &Panels<'_>),
    (view, saved): (View<'_, bf16>, Saved<'_, f32>),
    block: QueryBlock,
    dq: &mut Option<&mut dyn QueryGradients<f32>>,
    mut room: Room<'_>,
    (dk, dv): (&mut [f32], &mut [f32]),
) {
    let (e, tile, pairs) = (view.head_dim, view.tile, U::PAIRS);
    let (num_rows, keys) = (block.num_rows(), dk.len() / e);
    let [q_left, q_steps, dout_left, dout_steps] =
        [(); 4].map(|()| room.halves(packed_len(tile, e)));
    let douts = room.halves(tile * e);
    let [p_t, ds_t, ds_left] = [(); 3].map(|()| room.halves(packed_len(tile, tile)));
    let [p, ds] = [(); 2].map(|()| room.numbers(num_rows * tile));
    let queries = view.query_rows(block.segment, block.head, block.rows);
    let douts = block.round_douts(view, saved, douts);
    p.fill(0.0);
    ds.fill(0.0);
    let left = Packed::left(pairs, queries, q_left);
    let dout_left = Packed::left(pairs, douts, dout_left);
    // SAFETY: the caller's promise.
    unsafe {
        multiply(unit, &left, &panels.keys_t, p, tile);
        multiply(unit, &dout_left, &panels.values_t, ds, tile);
    }
    block.soften::<f32, bf16>(view, saved, (p, ds));
    let rows = |values, width| Rows {
        values,
        stride: tile,
        len: num_rows,
        width,
    };
    let (p, ds) = (&*p, &*ds);
    let p_t = Packed::turned(pairs, rows(p, tile), keys, p_t);
    let ds_t = Packed::turned(pairs, rows(ds, tile), keys, ds_t);
    // SAFETY: the caller's promise.
    unsafe {
        multiply(unit, &p_t, &Packed::steps(pairs, douts, dout_steps), dv, e);
        multiply(unit, &ds_t, &Packed::steps(pairs, queries, q_steps), dk, e);
    }
    let Some(dq) = dq else { return };
    let ds = Packed::rounded(pairs, rows(ds, keys), ds_left);
    let [acc, kept] = [(); 2].map(|()| room.numbers(num_rows * e));
    block.load_dq(&mut **dq, acc);
    let seen = |r| block.sees(view, saved, r);
    // SAFETY: the caller's promise.
    unsafe { multiply_seen(unit, (&ds, &panels.keys), (acc, e), kept, seen) };
    block.store_dq(&mut **dq, acc);
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
