//! Operands of attention as tiles: rows of bf16 values as they are stored, and probabilities.
//!
//! What [`pack`](super::pack) does for any matrix by way of f32, here for few rows and whole
//! blocks of steps, on the 16 bits themselves.

use super::pack::pack_plain_rows;
pub(crate) use super::pack::{TILE_VALUES, in_order};
use super::stored::interleaved;
pub(crate) use super::{PAIR, Pairs, TILE};
use super::{Panels, Unit, least_exponent, multiply_panel};
use crate::cpu::avx2::turn;
use crate::cpu::prefetch;
use crate::kernels::product::BLOCK;
use half::bf16;
use std::arch::x86_64::*;

/// Most rows or columns of an operand.
pub(crate) const MOST_OUTPUTS: usize = 256;

/// Rows of values, `stride` apart.
#[derive(Clone, Copy)]
pub(crate) struct Rows<'a, T> {
    /// From the first value on.
    pub(crate) values: &'a [T],
    /// Values from a row to the next.
    pub(crate) stride: usize,
    /// Rows.
    pub(crate) len: usize,
    /// Values of a row.
    pub(crate) width: usize,
}

impl<'a, T> Rows<'a, T> {
    /// Asks the memory for the rows as far as they are there: they lie too far apart for the
    /// machine to see where the next ones are.
    pub(crate) fn prefetch(&self) {
        let line = 64 / size_of::<T>();
        for row in 0..self.len {
            for at in (0..self.width).step_by(line) {
                prefetch(self.values, row * self.stride + at);
            }
        }
    }

    pub(crate) fn row(&self, row: usize) -> &'a [T] {
        &self.values[row * self.stride..][..self.width]
    }
}

/// One side of a product.
pub(crate) struct Packed<'a> {
    /// `[outputs / 16][steps / 32]`
    tiles: &'a [u16],
    /// The least exponent of each panel.
    exponents: [i32; MOST_OUTPUTS / PAIR],
    /// Rows or columns of the result.
    outputs: usize,
    /// Tiles along the reduction.
    along: usize,
}

/// Values that an operand of so many outputs and steps takes in tiles.
pub(crate) const fn packed_len(outputs: usize, steps: usize) -> usize {
    outputs.next_multiple_of(PAIR) * steps.next_multiple_of(BLOCK)
}

impl<'a> Packed<'a> {
    /// Of tiles that are filled.
    #[target_feature(enable = "avx512f,avx512bw")]
    pub(crate) fn of(tiles: &'a [u16], outputs: usize, steps: usize) -> Self {
        let along = steps.div_ceil(BLOCK);
        let mut exponents = [0; MOST_OUTPUTS / PAIR];
        let panels = tiles.chunks_exact(2 * along * TILE_VALUES);
        for (to, panel) in exponents.iter_mut().zip(panels) {
            *to = least_exponent(panel);
        }
        Self {
            tiles,
            exponents,
            outputs,
            along,
        }
    }

    /// Rows as rows of the result, their width a multiple of 32.
    #[target_feature(enable = "avx2,fma,avx512f,avx512bw")]
    pub(crate) fn left(pairs: Pairs, rows: Rows<'_, bf16>, to: &'a mut [u16]) -> Self {
        let order = in_order(pairs);
        let along = rows.width / BLOCK;
        let tiles = &mut to[..packed_len(rows.len, rows.width)];
        for (i, to) in tiles.chunks_exact_mut(BLOCK).enumerate() {
            let (tile, row) = (i / TILE, i % TILE);
            let (row, step) = (tile / along * TILE + row, tile % along * BLOCK);
            let values = match row < rows.len {
                true => _mm512_permutexvar_epi16(order, block(&rows.row(row)[step..])),
                false => _mm512_set1_epi16(i16::MIN),
            };
            store(to, values);
        }
        Self::of(tiles, rows.len, rows.width)
    }

    /// Rows as columns of the result, as many as are asked for, zeros behind the last row; their
    /// width is a multiple of 32.
    #[target_feature(enable = "avx2,fma,avx512f,avx512bw")]
    pub(crate) fn columns(
        pairs: Pairs,
        rows: Rows<'_, bf16>,
        columns: usize,
        to: &'a mut [u16],
    ) -> Self {
        let order = in_order(pairs);
        let along = rows.width / BLOCK;
        let tiles = &mut to[..packed_len(columns, rows.width)];
        let mut square = [0u16; TILE_VALUES];
        for (i, tile) in tiles.chunks_exact_mut(TILE_VALUES).enumerate() {
            let (first, step) = (i / along * TILE, i % along * BLOCK);
            for (row, to) in (first..).zip(square.chunks_exact_mut(BLOCK)) {
                let values = match row < rows.len {
                    true => _mm512_permutexvar_epi16(order, block(&rows.row(row)[step..])),
                    false => _mm512_setzero_si512(),
                };
                store(to, values);
            }
            turn(
                bytemuck::cast_slice(&square),
                bytemuck::cast_slice_mut(tile),
            );
        }
        Self::of(tiles, columns, rows.width)
    }

    /// Rows as steps of the reduction, their width a multiple of 32.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    pub(crate) fn steps(pairs: Pairs, rows: Rows<'_, bf16>, to: &'a mut [u16]) -> Self {
        Self::steps_of(pairs, (rows.len, rows.width), |row| rows.row(row), to)
    }

    /// As [`steps`](Self::steps), of `len` rows of `width` values, wherever they are.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    pub(crate) fn steps_of<'v>(
        pairs: Pairs,
        (len, width): (usize, usize),
        row: impl Fn(usize) -> &'v [bf16],
        to: &'a mut [u16],
    ) -> Self {
        let tiles = &mut to[..packed_len(width, len)];
        put_steps(pairs, (len, width), row, tiles);
        Self::of(tiles, width, len)
    }

    /// Columns of the result, sixteen of them from each of `blocks`, whose rows are steps: as many
    /// as are asked for, zeros behind the last. The number of steps is a multiple of 32.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    pub(crate) fn columns_of<'v>(
        pairs: Pairs,
        blocks: impl Iterator<Item = &'v [bf16]>,
        (columns, steps): (usize, usize),
        to: &'a mut [u16],
    ) -> Self {
        let tiles = &mut to[..packed_len(columns, steps)];
        let mut rest = tiles.chunks_exact_mut(steps * TILE);
        for (block, to) in blocks.zip(&mut rest) {
            put_steps(pairs, (steps, TILE), |row| &block[row * TILE..][..TILE], to);
        }
        rest.for_each(|to| to.fill(0));
        Self::of(tiles, columns, steps)
    }

    /// Rounded values as rows of the result.
    #[target_feature(enable = "avx512f,avx512bw")]
    pub(crate) fn rounded(pairs: Pairs, rows: Rows<'_, f32>, to: &'a mut [u16]) -> Self {
        let size = (rows.len, rows.stride, rows.width);
        pack_plain_rows(pairs, rows.values, size, to);
        Self::of(
            &to[..packed_len(rows.len, rows.width)],
            rows.len,
            rows.width,
        )
    }

    /// Rows as steps of the reduction, whose first `outputs` columns are rows of the result; their
    /// width is a multiple of 32.
    #[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512vl")]
    pub(crate) fn turned(
        pairs: Pairs,
        rows: Rows<'_, bf16>,
        outputs: usize,
        to: &'a mut [u16],
    ) -> Self {
        let none = [bf16::NEG_ZERO; TILE];
        let along = rows.len.div_ceil(BLOCK);
        let tiles = &mut to[..packed_len(rows.width, rows.len)];
        let mut square = [0u16; TILE_VALUES];
        for (i, tile) in tiles.chunks_exact_mut(TILE_VALUES).enumerate() {
            let (column, step) = (i / along * TILE, i % along * BLOCK);
            let of_place = |place| match step + pairs.step(place) {
                row if row < rows.len => &rows.row(row)[column..][..TILE],
                _ => &none,
            };
            for (pair, to) in square.chunks_exact_mut(BLOCK).enumerate() {
                let (low, high) = (of_place(2 * pair), of_place(2 * pair + 1));
                // SAFETY: both have sixteen values.
                store(to, unsafe { interleaved(high.as_ptr(), low.as_ptr()) });
            }
            turn(
                bytemuck::cast_slice(&square),
                bytemuck::cast_slice_mut(tile),
            );
        }
        Self::of(tiles, outputs, rows.len)
    }
}

/// Tiles of columns from rows that are steps.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn put_steps<'v>(
    pairs: Pairs,
    (len, width): (usize, usize),
    row: impl Fn(usize) -> &'v [bf16],
    tiles: &mut [u16],
) {
    let none = [bf16::ZERO; MOST_OUTPUTS];
    let along = len.div_ceil(BLOCK);
    let no_row = &none[..width];
    for step in (0..along * BLOCK).step_by(2) {
        let (block, pair) = (step / BLOCK, step % BLOCK / 2);
        let of_place = |place| match block * BLOCK + pairs.step(place) {
            at if at < len => row(at),
            _ => no_row,
        };
        let (low, high) = (of_place(2 * pair), of_place(2 * pair + 1));
        let mut at = block * TILE_VALUES + pair * 2 * TILE;
        for (low, high) in low.chunks_exact(TILE).zip(high.chunks_exact(TILE)) {
            // SAFETY: both have sixteen values.
            store(&mut tiles[at..], unsafe {
                interleaved(high.as_ptr(), low.as_ptr())
            });
            at += along * TILE_VALUES;
        }
    }
}

/// `acc += left * right`, its rows `stride` apart.
///
/// # Safety
/// The processor has the unit, and AVX-512.
pub(crate) unsafe fn multiply<U: Unit>(
    unit: &U,
    left: &Packed<'_>,
    right: &Packed<'_>,
    acc: &mut [f32],
    stride: usize,
) {
    let (rows, columns) = (left.outputs, right.outputs);
    assert!(rows > 0 && acc.len() >= (rows - 1) * stride + columns && columns <= stride);
    assert_eq!(left.along, right.along);
    let panels = left.tiles.chunks_exact(2 * left.along * TILE_VALUES);
    for ((first, panel), &exponent) in (0..rows).step_by(PAIR).zip(panels).zip(&left.exponents) {
        let right = Panels {
            values: right.tiles,
            exponents: &right.exponents,
            depth: right.along,
        };
        let size = (PAIR.min(rows - first), columns);
        // SAFETY: the caller's promise; as asserted, `acc` has these rows and columns.
        unsafe {
            let c = acc.as_mut_ptr().add(first * stride);
            multiply_panel(unit, size, (panel, exponent), right, (c, stride));
        }
    }
}

/// 32 values of bf16.
#[inline]
#[target_feature(enable = "avx512f")]
fn block(values: &[bf16]) -> __m512i {
    let values: &[bf16; BLOCK] = values.first_chunk().expect("a block of steps");
    // SAFETY: 32 values are there; the load needs no alignment.
    unsafe { _mm512_loadu_si512(values.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store(to: &mut [u16], values: __m512i) {
    let to: &mut [u16; BLOCK] = to.first_chunk_mut().expect("a row of a tile");
    // SAFETY: 32 values are there; the store needs no alignment.
    unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), values) };
}
