//! Operands as tiles: rounded, scaled, and turned to where the unit reads them.
//!
//! A tile of rows holds 16 rows of the result with 32 steps of the reduction each. A tile of
//! columns holds 16 pairs of steps, and in each the two values of 16 columns side by side.
//! So of a matrix stored by columns, or by steps for the rows, the pairs are turned like the
//! elements of a square of 32-bit numbers.

use super::TILE;
use crate::cpu::avx2::turn;
use crate::cpu::operand::{Operand, Source, with_source};
use crate::kernels::product::BLOCK;
use std::arch::x86_64::*;
use std::ops::Range;

/// Values of a tile.
pub(crate) const TILE_VALUES: usize = TILE * BLOCK;
/// Added to a chain as `-0 * 0`, it changes nothing, not even the sign of
/// a zero.
const NEGATIVE_ZERO: f32 = -0.0;

/// Which operand of a product.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    /// Its rows are rows of the result.
    Left,
    /// Its columns are columns of the result.
    Right,
}

/// Which two of the 32 steps of a tile make a pair: a unit takes both at a time.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pairs {
    /// An even step and the odd one behind it, each for its own chain.
    Neighbours,
    /// Two steps of one chain, the later one first: the even steps in eight pairs, then the odd
    /// ones.
    OfOneChain,
}

impl Pairs {
    /// Where the values of a step lie among those of their row.
    pub(super) const fn place(self, step: usize) -> usize {
        match self {
            Self::Neighbours => step,
            Self::OfOneChain => step % 2 * TILE + step / 4 * 2 + 1 - step / 2 % 2,
        }
    }

    /// The step whose values lie there.
    pub(super) const fn step(self, place: usize) -> usize {
        match self {
            Self::Neighbours => place,
            Self::OfOneChain => place % TILE / 2 * 4 + (1 - place % 2) * 2 + place / TILE,
        }
    }

    /// The steps in order of their places, each `factor` times and `shift` more.
    const fn order(self, factor: u16, shift: u16) -> [u16; BLOCK] {
        let mut words = [0; BLOCK];
        let mut place = 0;
        while place < BLOCK {
            words[place] = factor * self.step(place) as u16 + shift;
            place += 1;
        }
        words
    }
}

/// Packs rows or columns `outputs` of the result and steps `depths` of the reduction, a
/// multiple of 32 on, as tiles `[outputs / 16][depths / 32]`, up to a multiple of two tiles of
/// outputs. What is missing in the last tiles is filled with zeros, which add nothing.
///
/// # Safety
/// The processor has AVX-512.
pub(super) unsafe fn pack(
    (side, pairs): (Side, Pairs),
    operand: &Operand<'_, f32>,
    outputs: Range<usize>,
    depths: Range<usize>,
    tiles: &mut [u16],
) {
    let padding = match side {
        Side::Left => NEGATIVE_ZERO,
        Side::Right => 0.0,
    };
    let by_steps = operand.depth_in_rows;
    let block = Block {
        pairs,
        padding,
        by_steps,
        turned: by_steps == (side == Side::Left),
        outputs,
        depths,
    };
    with_source!(operand.values, operand.width, source => {
        // SAFETY: the caller's promise.
        unsafe { pack_block(&source, &block, tiles) };
    });
}

/// A part of an operand.
struct Block {
    pairs: Pairs,
    /// What lies where there are no outputs or no steps.
    padding: f32,
    /// Whether a stored row is a step of the reduction.
    by_steps: bool,
    /// Whether pairs of steps become columns of the tile, or are no longer.
    turned: bool,
    outputs: Range<usize>,
    depths: Range<usize>,
}

#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")]
fn pack_block<S: Source<f32>>(source: &S, block: &Block, tiles: &mut [u16]) {
    let across = block.outputs.len().div_ceil(2 * TILE) * 2;
    let along = block.depths.len().div_ceil(BLOCK);
    let tiles = tiles[..across * along * TILE_VALUES].chunks_exact_mut(TILE_VALUES);
    let mut square = [[0u32; TILE]; TILE];
    for (i, tile) in tiles.enumerate() {
        let output = block.outputs.start + i / along * TILE;
        let step = block.depths.start + i % along * BLOCK;
        let tile: &mut [u32] = bytemuck::cast_slice_mut(tile);
        let rows = match block.turned {
            true => &mut square,
            false => bytemuck::from_bytes_mut(bytemuck::cast_slice_mut(&mut *tile)),
        };
        if block.by_steps {
            pack_pairs(source, block, (output, step), rows);
        } else {
            pack_rows(source, block, (output, step), rows);
        }
        if block.turned {
            turn(square.as_flattened(), tile);
        }
    }
}

/// `[outputs][pairs of steps]` of stored rows that are outputs.
#[inline]
#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")]
fn pack_rows<S: Source<f32>>(
    source: &S,
    block: &Block,
    (output, step): (usize, usize),
    rows: &mut [[u32; TILE]; TILE],
) {
    let order = upper_halves(block.pairs);
    let runs = [step, step + TILE].map(|first| Run::of(source, first..block.depths.end));
    for (output, row) in (output..).zip(rows) {
        // The next tile of these outputs.
        source.prefetch(output, step + BLOCK);
        source.prefetch(output, step + BLOCK + TILE);
        let at = (output, block.outputs.end);
        let [low, high] = &runs;
        let low = read(source, at, low, block.padding);
        let high = read(source, at, high, block.padding);
        let halves = _mm512_permutex2var_epi16(low, order, high);
        // SAFETY: a row has as many numbers; the store needs no alignment.
        unsafe { _mm512_storeu_si512(row.as_mut_ptr().cast(), halves) };
    }
}

/// `[pairs of steps][outputs]` of stored rows that are steps.
#[inline]
#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")]
fn pack_pairs<S: Source<f32>>(
    source: &S,
    block: &Block,
    (output, step): (usize, usize),
    rows: &mut [[u32; TILE]; TILE],
) {
    let upper = _mm512_set1_epi32(0xffff_0000_u32 as i32);
    let run = Run::of(source, output..block.outputs.end);
    for (pair, row) in rows.iter_mut().enumerate() {
        // The next tile of these outputs.
        source.prefetch(step + BLOCK + 2 * pair, output);
        source.prefetch(step + BLOCK + 2 * pair + 1, output);
        let of_place = |place| {
            let at = (step + block.pairs.step(place), block.depths.end);
            read(source, at, &run, block.padding)
        };
        let low = _mm512_srli_epi32::<16>(of_place(2 * pair));
        let high = _mm512_and_si512(of_place(2 * pair + 1), upper);
        // SAFETY: as in `pack_rows`.
        unsafe { _mm512_storeu_si512(row.as_mut_ptr().cast(), _mm512_or_si512(low, high)) };
    }
}

/// Neighbouring columns of stored rows, of which the first sixteen are read.
struct Run {
    columns: Range<usize>,
    /// Their group, if there are as many and they share it.
    group: Option<usize>,
}

impl Run {
    #[inline(always)]
    fn of<S: Source<f32>>(source: &S, columns: Range<usize>) -> Self {
        let (first, group_size) = (columns.start, source.group_size());
        let group = first / group_size;
        let is_whole = columns.len() >= TILE && (first + TILE - 1) / group_size == group;
        Self {
            columns,
            group: is_whole.then_some(group),
        }
    }
}

/// A run of a stored row, in f32; `padding` where there are no values, or where the row is not
/// below its end.
#[inline]
#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")]
fn read<S: Source<f32>>(
    source: &S,
    (row, end): (usize, usize),
    run: &Run,
    padding: f32,
) -> __m512i {
    if let Some(group) = run.group.filter(|_| row < end) {
        // In a register: an array that two branches fill would go through memory.
        let mut values = [0.0; TILE];
        source.run(row, run.columns.start, group, &mut values);
        return as_bits(&values);
    }
    as_bits(&read_partly(source, (row, end), run, padding))
}

/// [`read`] at the end of an operand, or over the end of a group; apart, so that the rest is
/// inlined.
#[cold]
#[inline(never)]
fn read_partly<S: Source<f32>>(
    source: &S,
    (row, end): (usize, usize),
    run: &Run,
    padding: f32,
) -> [f32; TILE] {
    let mut values = [padding; TILE];
    if row < end {
        for (to, column) in values.iter_mut().zip(run.columns.clone()) {
            *to = source.one(row, column);
        }
    }
    values
}

/// [`pack`] of `rows` rows of the result, `stride` apart, with `depth` steps each, as they are.
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) fn pack_plain_rows(
    pairs: Pairs,
    x: &[f32],
    (rows, stride, depth): (usize, usize, usize),
    tiles: &mut [u16],
) {
    let order = upper_halves(pairs);
    let along = depth.div_ceil(BLOCK);
    let places = rows.next_multiple_of(2 * TILE);
    let to = tiles[..places * along * BLOCK].chunks_exact_mut(BLOCK);
    for (i, to) in to.enumerate() {
        let (tile, row) = (i / TILE, i % TILE);
        let (row, first) = (tile / along * TILE + row, tile % along * BLOCK);
        let x = match row < rows {
            true => &x[row * stride + first..][..BLOCK.min(depth - first)],
            false => &[],
        };
        // SAFETY: 32 values are there; the store needs no alignment.
        unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), row_halves(order, x)) };
    }
}

/// The upper halves of the first 32 values of `x` in the order of their places; those of -0 behind
/// its end.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) fn row_halves(order: __m512i, x: &[f32]) -> __m512i {
    let mut padded = [NEGATIVE_ZERO; BLOCK];
    let x = x.first_chunk().unwrap_or_else(|| {
        padded[..x.len()].copy_from_slice(x);
        &padded
    });
    let [low, high] = halves(x);
    _mm512_permutex2var_epi16(as_bits(low), order, as_bits(high))
}

/// [`pack`] of at most two tiles of whole columns of the result, of `depth` steps of `lanes` values,
/// as they are.
#[target_feature(enable = "avx512f")]
pub(super) fn pack_plain_steps(
    pairs: Pairs,
    y: &[f32],
    (depth, lanes): (usize, usize),
    columns: Range<usize>,
    tiles: &mut [u16],
) {
    assert!(columns.len().is_multiple_of(TILE) && columns.end <= lanes);
    let upper = _mm512_set1_epi32(0xffff_0000_u32 as i32);
    let along = depth.div_ceil(BLOCK);
    let to = tiles[..2 * along * TILE_VALUES].chunks_exact_mut(2 * TILE);
    for (i, to) in to.enumerate() {
        let (tile, pair) = (i / TILE, i % TILE);
        let (column, first) = (columns.start + tile / along * TILE, tile % along * BLOCK);
        let of_place = |place| {
            let step = first + pairs.step(place);
            match step < depth && column < columns.end {
                true => as_bits(y[step * lanes + column..].first_chunk().expect("a tile")),
                false => _mm512_setzero_si512(),
            }
        };
        let low = _mm512_srli_epi32::<16>(of_place(2 * pair));
        let high = _mm512_and_si512(of_place(2 * pair + 1), upper);
        // SAFETY: 16 pairs are there; the store needs no alignment.
        unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), _mm512_or_si512(low, high)) };
    }
}

/// Both halves of 32 values.
#[inline(always)]
fn halves(x: &[f32; BLOCK]) -> [&[f32; TILE]; 2] {
    let (low, high) = x.split_at(TILE);
    [low, high].map(|half| half.first_chunk().expect("half of them"))
}

/// The bits of sixteen values.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn as_bits(x: &[f32; TILE]) -> __m512i {
    // SAFETY: sixteen values are there; the load needs no alignment.
    unsafe { _mm512_loadu_si512(x.as_ptr().cast()) }
}

/// The upper halves of 32 numbers of 32 bits, in order of their places, as words of 16 bits: the
/// operand of a permutation.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn upper_halves(pairs: Pairs) -> __m512i {
    load_order(match pairs {
        Pairs::Neighbours => const { &Pairs::Neighbours.order(2, 1) },
        Pairs::OfOneChain => const { &Pairs::OfOneChain.order(2, 1) },
    })
}

/// 32 numbers of 16 bits in order of their places, likewise.
#[inline]
#[target_feature(enable = "avx512f")]
pub(crate) fn in_order(pairs: Pairs) -> __m512i {
    load_order(match pairs {
        Pairs::Neighbours => const { &Pairs::Neighbours.order(1, 0) },
        Pairs::OfOneChain => const { &Pairs::OfOneChain.order(1, 0) },
    })
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load_order(order: &[u16; BLOCK]) -> __m512i {
    // SAFETY: 32 words are there; the load needs no alignment.
    unsafe { _mm512_loadu_si512(order.as_ptr().cast()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_step_has_its_place() {
        for pairs in [Pairs::Neighbours, Pairs::OfOneChain] {
            for step in 0..BLOCK {
                assert_eq!(Pairs::Neighbours.place(step), step);
                assert_eq!(pairs.step(pairs.place(step)), step);
            }
        }
        // What `vdpbf16ps` takes first lies in the upper half.
        let places = [1, 0, 3, 17].map(|place| Pairs::OfOneChain.step(place));
        assert_eq!(places, [0, 2, 4, 1]);
    }
}
