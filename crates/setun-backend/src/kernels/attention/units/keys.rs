//! Keys and values as operands: rows of the same call, or those of a cache.

use crate::cache::CACHE_BLOCK;
use crate::cpu::bf16::rows::{Packed, Pairs, Rows};
use crate::cpu::prefetch;
use crate::kernels::attention::View;
use crate::kernels::attention::backward::Keys;
use half::bf16;

/// Where keys and values come from.
pub(super) enum Source<'a> {
    /// `view.k` and `view.v`.
    Rows(View<'a, bf16>),
    /// A cache.
    Cache(CachedKeys<'a>),
}

/// Keys and values of one head and sequence in a cache.
#[derive(Clone, Copy)]
pub(super) struct CachedKeys<'a> {
    /// `[blocks, num_kv_heads, head_dim, CACHE_BLOCK]`
    pub(super) k: &'a [bf16],
    /// `[blocks, num_kv_heads, CACHE_BLOCK, head_dim]`
    pub(super) v: &'a [bf16],
    /// The sequence's blocks.
    pub(super) blocks: &'a [u32],
    pub(super) num_kv_heads: usize,
    pub(super) head_dim: usize,
}

impl Source<'_> {
    /// A tile of at most `tile` keys as columns of a result, and of its values as steps.
    #[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512vl")]
    pub(super) fn pack<'t>(
        &self,
        pairs: Pairs,
        of_tile: Keys,
        tile: usize,
        (keys, values): (&'t mut [u16], &'t mut [u16]),
    ) -> (Packed<'t>, Packed<'t>) {
        match self {
            Self::Rows(view) => (
                Packed::columns(pairs, view.key_rows(view.k, of_tile), tile, keys),
                Packed::steps(pairs, view.key_rows(view.v, of_tile), values),
            ),
            Self::Cache(cache) => {
                let size = (of_tile.len(), cache.head_dim);
                let first = of_tile.range.0;
                let blocks = cache.blocks_of(of_tile, cache.k, of_tile.key_head);
                let row = |row| cache.value(first + row, of_tile.key_head);
                (
                    Packed::columns_of(pairs, blocks, (tile, cache.head_dim), keys),
                    Packed::steps_of(pairs, size, row, values),
                )
            }
        }
    }

    /// Asks the memory for a tile.
    pub(super) fn prefetch(&self, of_tile: Keys) {
        match self {
            Self::Rows(view) => {
                view.key_rows(view.k, of_tile).prefetch();
                view.key_rows(view.v, of_tile).prefetch();
            }
            Self::Cache(cache) => {
                for values in [cache.k, cache.v] {
                    for block in cache.blocks_of(of_tile, values, of_tile.key_head) {
                        for at in (0..block.len()).step_by(64 / size_of::<bf16>()) {
                            prefetch(block, at);
                        }
                    }
                }
            }
        }
    }
}

impl<'a> CachedKeys<'a> {
    /// What a head has in a block.
    fn block(&self, block: usize, key_head: usize) -> usize {
        let head = self.blocks[block] as usize * self.num_kv_heads + key_head;
        head * self.head_dim * CACHE_BLOCK
    }

    /// The keys or values of a tile, whole blocks.
    fn blocks_of(
        &self,
        of_tile: Keys,
        values: &'a [bf16],
        key_head: usize,
    ) -> impl Iterator<Item = &'a [bf16]> {
        let (start, end) = of_tile.range;
        let each = start / CACHE_BLOCK..end.div_ceil(CACHE_BLOCK);
        each.map(move |block| &values[self.block(block, key_head)..][..self.head_dim * CACHE_BLOCK])
    }

    /// The value at a position.
    pub(super) fn value(&self, position: usize, key_head: usize) -> &'a [bf16] {
        let at = self.block(position / CACHE_BLOCK, key_head);
        &self.v[at + position % CACHE_BLOCK * self.head_dim..][..self.head_dim]
    }
}

impl<'a> View<'a, bf16> {
    /// Rows of `values`, which are keys or values.
    pub(super) fn key_rows(&self, values: &'a [bf16], keys: Keys) -> Rows<'a, bf16> {
        let row = keys.segment.kv_start + keys.range.0;
        let at = (row * self.num_kv_heads + keys.key_head) * self.head_dim;
        Rows {
            values: &values[at..],
            stride: self.num_kv_heads * self.head_dim,
            len: keys.len(),
            width: self.head_dim,
        }
    }
}
