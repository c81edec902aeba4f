//! A tile of the cache in bf16, as it is stored: for few rows that is quicker than widening it to
//! f32 beforehand. Numbers of int8 become what they stand for in bf16 first.

use super::{CacheView, CachedView, Tile, block_of};
use crate::cache::{CACHE_BLOCK, CachedSegment};
use crate::cpu::widen::widen;
use crate::cpu::{Isa, prefetch_early};
use crate::kernels::product::StoredRows;
use crate::real::{Real, min_exponent_bf16};
use half::bf16;

/// Most blocks of a tile that is read so.
pub(super) const STORED_BLOCKS: usize = 4;

/// Numbers of int8 in a cache line.
const LINE: usize = 64;

/// Numbers of the blocks of a tile.
type Pieces<'a> = [&'a [bf16]; STORED_BLOCKS];

/// A tile's keys `[head_dim, slot]` and values `[slot, head_dim]`, block by block.
pub(super) struct StoredTile<'a> {
    keys: Pieces<'a>,
    values: Pieces<'a>,
    /// Of the tile behind it, as far as they are stored in bf16.
    next: [Pieces<'a>; 2],
    /// Number of blocks.
    pub(super) len: usize,
    next_len: usize,
}

impl StoredTile<'_> {
    /// The keys of each block as steps of a product.
    #[inline(always)]
    pub(super) fn keys(&self, head_dim: usize) -> [StoredRows<'_>; STORED_BLOCKS] {
        let mut blocks = [StoredRows {
            pieces: &[],
            steps: head_dim,
            lanes: CACHE_BLOCK,
            ahead: &[],
        }; STORED_BLOCKS];
        for (i, block) in blocks[..self.len].iter_mut().enumerate() {
            block.pieces = &self.keys[i..=i];
            if i < self.next_len {
                block.ahead = &self.next[0][i..=i];
            }
        }
        blocks
    }

    /// The values as steps of a product.
    #[inline(always)]
    pub(super) fn values(&self, head_dim: usize) -> StoredRows<'_> {
        StoredRows {
            pieces: &self.values[..self.len],
            steps: CACHE_BLOCK,
            lanes: head_dim,
            ahead: &self.next[1][..self.next_len],
        }
    }

    /// As [`Real::min_exponent`]
    #[inline(always)]
    pub(super) fn min_key(&self) -> i32 {
        least(&self.keys[..self.len])
    }

    /// As [`Real::min_exponent`]
    #[inline(always)]
    pub(super) fn min_value(&self) -> i32 {
        least(&self.values[..self.len])
    }

    /// Whether the values from slot `first` of the tile on are numbers.
    #[inline(always)]
    pub(super) fn is_finite_from(&self, first: usize, head_dim: usize) -> bool {
        for (i, values) in self.values[..self.len].iter().enumerate() {
            let seen = first.saturating_sub(i * CACHE_BLOCK).min(CACHE_BLOCK);
            // Not `all`, which looks at one after the other.
            let magnitudes = values[seen * head_dim..]
                .iter()
                .map(|v| v.to_bits() & 0x7fff);
            if magnitudes.fold(0, u16::max) >= bf16::INFINITY.to_bits() {
                return false;
            }
        }
        true
    }
}

// Not `map` and `min`, behind which a closure is compiled for the least processor.
#[inline(always)]
fn least(pieces: &[&[bf16]]) -> i32 {
    let mut least = i32::MAX;
    for piece in pieces {
        least = least.min(min_exponent_bf16(piece));
    }
    least
}

impl<S> CachedView<'_, S> {
    /// The tile of `n` positions from `j0`, at most [`STORED_BLOCKS`] blocks; what is not in bf16
    /// is written to `room`. `None` where it would lose bits.
    #[inline(always)]
    pub(super) fn stored<'t, R: Real>(
        &'t self,
        segment: &CachedSegment<'_>,
        (kv_head, j0, n): (usize, usize, usize),
        room: &'t mut Tile<'_, R>,
    ) -> Option<StoredTile<'t>> {
        let size = self.head_dim * CACHE_BLOCK;
        let mut blocks = segment.blocks[j0 / CACHE_BLOCK..].chunks(self.tile / CACHE_BLOCK);
        let (now, next) = (blocks.next().unwrap_or(&[]), blocks.next().unwrap_or(&[]));
        let now = &now[..n.div_ceil(CACHE_BLOCK)];
        let next = &next[..next.len().min(now.len())];
        let head = |block: u32| block as usize * self.num_kv_heads + kv_head;
        let mut tile = StoredTile {
            keys: [&[]; STORED_BLOCKS],
            values: [&[]; STORED_BLOCKS],
            next: [[&[]; STORED_BLOCKS]; 2],
            len: now.len(),
            next_len: 0,
        };
        match self.cache {
            CacheView::F32(..) => return None,
            CacheView::Bf16(k, v) => {
                for (i, &block) in now.iter().enumerate() {
                    let place = head(block) * size..(head(block) + 1) * size;
                    (tile.keys[i], tile.values[i]) = (&k[place.clone()], &v[place]);
                }
                for (i, &block) in next.iter().enumerate() {
                    let place = head(block) * size..(head(block) + 1) * size;
                    (tile.next[0][i], tile.next[1][i]) = (&k[place.clone()], &v[place]);
                }
                tile.next_len = next.len();
            }
            CacheView::Int8(..) => {
                let keys = bytemuck::cast_slice_mut::<R, bf16>(room.keys);
                let values = bytemuck::cast_slice_mut::<R, bf16>(room.values);
                let to = keys.chunks_mut(size).zip(values.chunks_mut(size));
                for (i, (&block, (keys, values))) in now.iter().zip(to).enumerate() {
                    let next = next.get(i).map(|&block| head(block));
                    let (how, to) = ((self.isa, self.head_dim), (&mut *keys, &mut *values));
                    if !self.cache.write_bf16(how, head(block), next, to) {
                        return None;
                    }
                    (tile.keys[i], tile.values[i]) = (keys, values);
                }
            }
        }
        Some(tile)
    }
}

impl CacheView<'_> {
    /// Numbers of a head of a block from int8, of which those of `next` will be read later. False
    /// where one may be none: a scale is zero or normal, and so are its products then.
    #[inline(always)]
    pub(crate) fn write_bf16(
        self,
        (isa, head_dim): (Isa, usize),
        head: usize,
        next: Option<usize>,
        (keys, values): (&mut [bf16], &mut [bf16]),
    ) -> bool {
        let CacheView::Int8(k, v, k_scales, v_scales) = self else {
            unreachable!("called for int8 only");
        };
        let size = keys.len();
        if let Some(next) = next {
            for at in (next * size..(next + 1) * size).step_by(LINE) {
                prefetch_early(k, at);
                prefetch_early(v, at);
            }
        }
        let [k_scales, v_scales] =
            [k_scales, v_scales].map(|scales| *block_of(scales, head * CACHE_BLOCK));
        let mut is_finite = true;
        for scale in k_scales.iter().chain(&v_scales) {
            is_finite &= scale.is_finite();
        }
        widen(isa, &k[head * size..][..size], &k_scales, keys);
        let v = v[head * size..][..size].chunks_exact(head_dim);
        for ((to, v), scale) in values.chunks_exact_mut(head_dim).zip(v).zip(v_scales) {
            widen(isa, v, &[scale; CACHE_BLOCK], to);
        }
        is_finite
    }
}
