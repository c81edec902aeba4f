//! Operands as tiles: rounded, scaled, and turned to where the unit reads them.
//!
//! A tile of rows holds 16 rows of the result with 32 steps of the reduction each. A tile of
//! columns holds 16 pairs of steps, and in each the two values of 16 columns side by side.
//! So of a matrix stored by columns, or by steps for the rows, the pairs are turned like the
//! elements of a square of 32-bit numbers.

use super::TILE;
use crate::cpu::avx2;
use crate::cpu::operand::{Operand, Source, with_source};
use crate::kernels::product::BLOCK;
use std::ops::Range;

/// Values of a tile.
pub(super) const TILE_VALUES: usize = TILE * BLOCK;
/// Added to a chain as `-0 * 0`, it changes nothing, not even the sign of a zero.
const NEGATIVE_ZERO: u16 = 0x8000;

/// Which operand of a product.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    /// Its rows are rows of the result.
    Left,
    /// Its columns are columns of the result.
    Right,
}

/// Packs rows or columns `outputs` of the result and steps `depths` of the reduction, a
/// multiple of 32 on, as tiles `[outputs / 16][depths / 32]`, up to a multiple of two tiles of
/// outputs. What is missing in the last tiles is filled with zeros, which add nothing.
///
/// # Safety
/// The processor has AVX-512.
pub(super) unsafe fn pack(
    side: Side,
    operand: &Operand<'_, f32>,
    outputs: Range<usize>,
    depths: Range<usize>,
    tiles: &mut [u16],
) {
    with_source!(operand.values, operand.width, source => {
        let block = Block { side, by_steps: operand.depth_in_rows, outputs, depths };
        // SAFETY: the caller's promise.
        unsafe { pack_block(&source, &block, tiles) };
    });
}

/// A part of an operand.
struct Block {
    side: Side,
    /// Whether a stored row is a step of the reduction.
    by_steps: bool,
    outputs: Range<usize>,
    depths: Range<usize>,
}

/// One value of padding in every place of a tile.
fn padding(side: Side) -> u16 {
    match side {
        Side::Left => NEGATIVE_ZERO,
        Side::Right => 0,
    }
}

#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")]
fn pack_block<S: Source<f32>>(source: &S, block: &Block, tiles: &mut [u16]) {
    let across = block.outputs.len().div_ceil(2 * TILE) * 2;
    let along = block.depths.len().div_ceil(BLOCK);
    let turned = block.by_steps == (block.side == Side::Left);
    let tiles = tiles[..across * along * TILE_VALUES].chunks_exact_mut(TILE_VALUES);
    let mut square = [0u32; TILE * TILE];
    for (i, tile) in tiles.enumerate() {
        let first = block.outputs.start + i / along * TILE;
        let outputs = first..block.outputs.end.min(first + TILE);
        let first = block.depths.start + i % along * BLOCK;
        let depths = first..block.depths.end.min(first + BLOCK);
        let into: &mut [u16] = if turned {
            bytemuck::cast_slice_mut(&mut square)
        } else {
            &mut *tile
        };
        if outputs.len() < TILE || depths.len() < BLOCK {
            into.fill(padding(block.side));
        }
        if block.by_steps {
            pack_pairs(source, outputs, depths, into);
        } else {
            pack_rows(source, outputs, depths, into);
        }
        if turned {
            turn(&square, bytemuck::cast_slice_mut(tile));
        }
    }
}

/// `[outputs][depths]` of stored rows that are outputs.
#[inline]
#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")]
fn pack_rows<S: Source<f32>>(
    source: &S,
    outputs: Range<usize>,
    depths: Range<usize>,
    tile: &mut [u16],
) {
    for (row, to) in outputs.zip(tile.chunks_exact_mut(BLOCK)) {
        read(source, row, depths.clone(), to);
    }
}

/// `[pairs of depths][outputs][2]` of stored rows that are depths.
#[inline]
#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")]
fn pack_pairs<S: Source<f32>>(
    source: &S,
    outputs: Range<usize>,
    depths: Range<usize>,
    tile: &mut [u16],
) {
    let mut steps = [[0u16; TILE]; 2];
    for (step, to) in depths
        .clone()
        .step_by(2)
        .zip(tile.chunks_exact_mut(2 * TILE))
    {
        read(source, step, outputs.clone(), &mut steps[0]);
        let whole = step + 1 < depths.end;
        if whole {
            read(source, step + 1, outputs.clone(), &mut steps[1]);
        }
        let [even, odd] = &steps;
        for (pair, (&even, &odd)) in to
            .chunks_exact_mut(2)
            .zip(even.iter().zip(odd))
            .take(outputs.len())
        {
            pair[0] = even;
            if whole {
                pair[1] = odd;
            }
        }
    }
}

/// Values `columns` of a stored row, at most `to.len()` of them, as bf16.
#[inline]
#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")]
fn read<S: Source<f32>>(source: &S, row: usize, columns: Range<usize>, to: &mut [u16]) {
    let upper = |x: f32| (x.to_bits() >> 16) as u16;
    let group_size = source.group_size();
    for (run, to) in to.chunks_exact_mut(TILE).enumerate() {
        let first = columns.start + run * TILE;
        let group = first / group_size;
        if first + TILE <= columns.end && (first + TILE - 1) / group_size == group {
            let mut values = [0.0; TILE];
            source.run(row, first, group, &mut values);
            for (to, x) in to.iter_mut().zip(values) {
                *to = upper(x);
            }
        } else {
            for (to, column) in to.iter_mut().zip(first..columns.end) {
                *to = upper(source.one(row, column));
            }
        }
    }
}

/// Transposes a square of 16 x 16.
#[inline]
#[target_feature(enable = "avx2,fma")]
pub(super) fn turn(from: &[u32; TILE * TILE], to: &mut [u32]) {
    // Moved, not computed with: any bits stay what they are.
    let (from, to) = (bytemuck::cast_slice(from), bytemuck::cast_slice_mut(to));
    avx2::transpose_eight(from, TILE, TILE, to);
    avx2::transpose_eight(&from[8 * TILE..], TILE, TILE, &mut to[8..]);
}
