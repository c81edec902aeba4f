//! int8 x ternary products in tiles: of trits, a byte each, and of packed weights.
//!
//! A group of the reduction is a few tiles of 64 values. Its integer sums come out exactly,
//! and meet their scales in one FMA each, as in every other kernel. A value that is missing in
//! the last tile of a group is a zero on one side.

use super::{Bytes, Dots, PAIR, ROW_BYTES, TILE, TILE_BYTES, Tiles, int8_dots};
use crate::cpu::avx2::turn;
use crate::cpu::avx512_packed::{scales, spread};
use crate::cpu::int8::{Int8Rows, Int8Shape, TernaryRows};
use crate::cpu::packed::{PANEL, PackedInputs, PackedShape, PanelScratch, SCALE_BYTES, WORD_BYTES};
use std::arch::x86_64::*;
use std::ops::Range;

const _: () = assert!(PANEL == PAIR);

/// Values of a tile along the reduction.
const STEPS: usize = ROW_BYTES;

/// Tiles along group `g`.
fn tiles_of(shape: Int8Shape, g: usize) -> usize {
    let values = shape.group_size.min(shape.width - g * shape.group_size);
    values.div_ceil(STEPS)
}

/// Bytes of a row with its groups in whole tiles.
fn row_bytes(shape: Int8Shape) -> usize {
    (0..shape.groups())
        .map(|g| tiles_of(shape, g) * STEPS)
        .sum()
}

/// Bytes of scratch for [`task`] with so many rows.
pub(in crate::cpu) fn scratch_len(shape: Int8Shape) -> usize {
    let rows = shape.rows.next_multiple_of(PAIR) + PAIR;
    rows * row_bytes(shape) + 4 * PAIR * shape.groups()
}

/// Rows `rows` of `x` times outputs `outputs` of `w`; `put(row, first output, values)`.
///
/// # Safety
/// [`available`](super::available) is true.
pub(in crate::cpu) unsafe fn task(
    shape: Int8Shape,
    (x, rows): (Int8Rows<'_>, Range<usize>),
    (w, outputs): (TernaryRows<'_>, Range<usize>),
    scratch: &mut [u8],
    put: &mut dyn FnMut(usize, usize, &[f32]),
) {
    let (groups, row_bytes) = (shape.groups(), row_bytes(shape));
    let (inputs, rest) = scratch.split_at_mut(rows.len().next_multiple_of(PAIR) * row_bytes);
    let (weights, rest) = rest.split_at_mut(PAIR * row_bytes);
    let scales: &mut [f32] = bytemuck::cast_slice_mut(&mut rest[..4 * PAIR * groups]);
    pack_rows(shape, x.q, rows.clone(), inputs);
    // SAFETY: the caller's promise.
    let tiles = unsafe { Tiles::configure() };
    let mut dots = Dots([[0; PAIR]; PAIR]);
    for n0 in outputs.clone().step_by(PAIR) {
        let n = PAIR.min(outputs.end - n0);
        pack_outputs(shape, w, n0..n0 + n, weights, scales);
        for (first, row) in rows.clone().enumerate().step_by(PAIR) {
            let m = PAIR.min(rows.end - row);
            let mut y = [[0.0f32; PAIR]; PAIR];
            let mut at = 0;
            for g in 0..groups {
                let depth = tiles_of(shape, g);
                let scales = &scales[g * PAIR..(g + 1) * PAIR];
                let of_row = |i: usize| (0, x.scales[(row + i) * groups + g]);
                // SAFETY: a row of `inputs` and a tile row of `weights` have `row_bytes`, of
                // which all groups together take all; there is AVX-512 where there is AMX.
                unsafe {
                    let upper = inputs.as_ptr().add(first * row_bytes + at);
                    let left = weights.as_ptr().add(TILE * at);
                    let (a, b) = (
                        Bytes {
                            tiles: [upper, upper.add(TILE * row_bytes)],
                            row: row_bytes,
                            step: STEPS,
                        },
                        Bytes {
                            tiles: [left, left.add(TILE * row_bytes)],
                            row: ROW_BYTES,
                            step: TILE_BYTES,
                        },
                    );
                    int8_dots::<true>(&tiles, a, b, depth, &mut dots);
                    combine(&dots, load_scales(scales), of_row, &mut y[..m]);
                }
                at += depth * STEPS;
            }
            for (i, y) in y.iter().enumerate().take(m) {
                put(row + i, n0, &y[..n]);
            }
        }
    }
}

/// Rows with each group in whole tiles.
fn pack_rows(shape: Int8Shape, q: &[i8], rows: Range<usize>, to: &mut [u8]) {
    let row_bytes = row_bytes(shape);
    for (row, to) in rows.zip(to.chunks_exact_mut(row_bytes)) {
        let row = &q[row * shape.width..(row + 1) * shape.width];
        spread_row(row, shape.group_size, to);
    }
}

/// The groups of a row, each in whole tiles.
#[inline]
fn spread_row(row: &[i8], group_size: usize, mut to: &mut [u8]) {
    for group in row.chunks(group_size) {
        let (part, rest) = to.split_at_mut(group.len().next_multiple_of(STEPS));
        part[..group.len()].copy_from_slice(bytemuck::cast_slice(group));
        part[group.len()..].fill(0);
        to = rest;
    }
}

/// Outputs as tiles `[2][tiles along a row]` with 16 times four values of each of 16 outputs,
/// and their scales `[groups][32]`; outputs that are missing are zeros.
fn pack_outputs(
    shape: Int8Shape,
    w: TernaryRows<'_>,
    outputs: Range<usize>,
    to: &mut [u8],
    scales: &mut [f32],
) {
    let (groups, row_bytes) = (shape.groups(), row_bytes(shape));
    if outputs.len() < PAIR {
        scales.fill(0.0);
    }
    for (i, n) in outputs.clone().enumerate() {
        let of_output = &w.scales[n * groups..(n + 1) * groups];
        for (&scale, to) in of_output.iter().zip(scales[i..].iter_mut().step_by(PAIR)) {
            *to = scale;
        }
    }
    for (half, to) in to.chunks_exact_mut(TILE * row_bytes).enumerate() {
        let first = outputs.start + half * TILE;
        let outputs = first..outputs.end.min(first + TILE);
        let mut tiles = to.chunks_exact_mut(TILE_BYTES);
        for g in 0..groups {
            let start = g * shape.group_size;
            let end = shape.width.min(start + shape.group_size);
            for first in (start..end).step_by(STEPS) {
                let mut square = [0u32; TILE * TILE];
                let rows: &mut [i8] = bytemuck::cast_slice_mut(&mut square);
                for (n, row) in outputs.clone().zip(rows.chunks_exact_mut(STEPS)) {
                    let values = first..end.min(first + STEPS);
                    let len = values.len();
                    row[..len].copy_from_slice(&w.trits[n * shape.width..][values]);
                }
                let tile = tiles.next().expect("a tile for each 64 values of a group");
                // SAFETY: there is AVX2 where there is AMX, which the caller has.
                unsafe { turn(&square, bytemuck::cast_slice_mut(tile)) };
            }
        }
    }
}

#[target_feature(enable = "avx512f")]
fn load_scales(scales: &[f32]) -> [__m512; 2] {
    assert!(scales.len() >= PAIR);
    // SAFETY: 32 values are there; the loads need no alignment.
    unsafe {
        [
            _mm512_loadu_ps(scales.as_ptr()),
            _mm512_loadu_ps(scales.as_ptr().add(TILE)),
        ]
    }
}

/// `y = fma(s * a, dot - sum, y)` of the rows of `y`; `of_row` knows sum and `a`.
#[inline]
#[target_feature(enable = "avx512f")]
fn combine(
    dots: &Dots,
    scales: [__m512; 2],
    of_row: impl Fn(usize) -> (i32, f32),
    y: &mut [[f32; PAIR]],
) {
    for (i, (y, dots)) in y.iter_mut().zip(&dots.0).enumerate() {
        let (sum, a) = of_row(i);
        for (half, &scale) in scales.iter().enumerate() {
            // SAFETY: both halves of the rows have 16 values; no alignment is needed.
            unsafe {
                let dot = _mm512_loadu_si512(dots.as_ptr().add(half * TILE).cast());
                let dot = _mm512_cvtepi32_ps(_mm512_sub_epi32(dot, _mm512_set1_epi32(sum)));
                let factor = _mm512_mul_ps(scale, _mm512_set1_ps(a));
                let to = y.as_mut_ptr().add(half * TILE);
                _mm512_storeu_ps(to, _mm512_fmadd_ps(factor, dot, _mm512_loadu_ps(to)));
            }
        }
    }
}

/// Whether [`multiply_packed`] can take such a matrix: groups of whole tiles.
pub(in crate::cpu) fn suits(shape: PackedShape) -> bool {
    shape.group_size.is_multiple_of(STEPS)
        && shape.width.is_multiple_of(STEPS)
        && shape.group_size <= crate::cpu::packed::MANY_GROUP
}

/// One panel of packed weights times `rows` rows, which lie one by one, up to a multiple of
/// [`TILE`]: the codes of a group become bytes once, in the first-level cache, already in the
/// order of tiles of columns.
///
/// # Safety
/// [`available`](super::available) is true.
pub(in crate::cpu) unsafe fn multiply_packed(
    shape: PackedShape,
    panel: &[u8],
    rows: usize,
    x: PackedInputs<'_>,
    scratch: &mut PanelScratch,
) {
    let (groups, row_bytes) = (shape.groups(), shape.words() * 16);
    assert!(suits(shape) && rows <= scratch.y.len() && panel.len() >= shape.panel_bytes());
    assert!(x.q.len() >= rows.next_multiple_of(TILE) * row_bytes);
    assert!(x.sums.len() >= rows * groups && x.scales.len() >= rows * groups);
    scratch.y[..rows].fill([0.0; PANEL]);
    let mut dots = Dots([[0; PAIR]; PAIR]);
    // SAFETY: the caller's promise.
    let tiles = unsafe { Tiles::configure() };
    let codes = &mut scratch.codes;
    let right = Bytes {
        tiles: [codes.as_ptr(), codes[ROW_BYTES..].as_ptr()],
        row: 4 * PANEL,
        step: TILE * 4 * PANEL,
    };
    let (mut group, mut at) = (panel, 0);
    for g in 0..groups {
        let words = shape.words_of(g);
        // SAFETY: there is AVX-512 where there is AMX. Each group has its scales and words in the
        // panel, and `codes` has room for those of a group, whole tiles; the rows from `i` on have
        // `row_bytes`, up to the end of their tile.
        unsafe {
            spread(&group[SCALE_BYTES..][..words * WORD_BYTES], codes);
            let scales = [scales(group), scales(&group[2 * TILE..])];
            for i in (0..rows).step_by(PAIR) {
                let values = x.q.as_ptr().cast::<u8>().add(i * row_bytes + at);
                let left = Bytes {
                    tiles: [values, values.wrapping_add(TILE * row_bytes)],
                    row: row_bytes,
                    step: STEPS,
                };
                if rows - i > TILE {
                    int8_dots::<true>(&tiles, left, right, words / 4, &mut dots);
                } else {
                    int8_dots::<false>(&tiles, left, right, words / 4, &mut dots);
                }
                let of_row = |r: usize| {
                    let at = (i + r) * groups + g;
                    (x.sums[at], x.scales[at])
                };
                combine(&dots, scales, of_row, &mut scratch.y[i..rows.min(i + PAIR)]);
            }
        }
        group = &group[SCALE_BYTES + words * WORD_BYTES..];
        at += words * 16;
    }
}
