//! Keys and values as operands: rows of the same call, or those of a cache.

use crate::cache::CACHE_BLOCK;
use crate::cpu::bf16::rows::{Packed, Pairs, Rows};
use crate::cpu::{Isa, prefetch};
use crate::kernels::attention::View;
use crate::kernels::attention::backward::Keys;
use crate::kernels::cache::CacheView;
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
    /// Of bf16 or int8.
    pub(super) cache: CacheView<'a>,
    pub(super) isa: Isa,
    /// The sequence's blocks.
    pub(super) blocks: &'a [u32],
    pub(super) num_kv_heads: usize,
    pub(super) head_dim: usize,
}

impl Source<'_> {
    /// Numbers that [`pack`](Self::pack) needs room for.
    pub(super) fn room_len(&self, tile: usize) -> usize {
        match self {
            Self::Cache(cache) if matches!(cache.cache, CacheView::Int8(..)) => {
                2 * tile * cache.head_dim
            }
            _ => 0,
        }
    }

    /// A tile of at most `tile` keys as columns of a result, and of its values as steps.
    #[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512vl")]
    pub(super) fn pack<'t>(
        &self,
        pairs: Pairs,
        of_tile: Keys,
        tile: usize,
        room: &mut [bf16],
        (keys, values): (&'t mut [u16], &'t mut [u16]),
    ) -> (Packed<'t>, Packed<'t>) {
        match self {
            Self::Rows(view) => (
                Packed::columns(pairs, view.key_rows(view.k, of_tile), tile, keys),
                Packed::steps(pairs, view.key_rows(view.v, of_tile), values),
            ),
            Self::Cache(cache) => {
                let (len, e) = (of_tile.len(), cache.head_dim);
                let (size, columns) = ((len, e), (tile, e));
                if let CacheView::Bf16(k, _) = cache.cache {
                    let blocks = cache.blocks_of(of_tile, k);
                    let row = |row| cache.value(of_tile.range.0 + row, of_tile.key_head);
                    return (
                        Packed::columns_of(pairs, blocks, columns, keys),
                        Packed::steps_of(pairs, size, row, values),
                    );
                }
                let (k, v) = room.split_at_mut(tile * e);
                cache.write_bf16(of_tile, (k, v));
                let blocks = k.chunks(e * CACHE_BLOCK).take(len.div_ceil(CACHE_BLOCK));
                (
                    Packed::columns_of(pairs, blocks, columns, keys),
                    Packed::steps_of(pairs, size, |row| &v[row * e..][..e], values),
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
            Self::Cache(cache) => match cache.cache {
                CacheView::Bf16(k, v) => {
                    cache.prefetch(of_tile, k);
                    cache.prefetch(of_tile, v);
                }
                CacheView::Int8(k, v, ..) => {
                    cache.prefetch(of_tile, k);
                    cache.prefetch(of_tile, v);
                }
                CacheView::F32(..) => {}
            },
        }
    }
}

impl<'a> CachedKeys<'a> {
    /// A head in a block.
    fn head(&self, block: usize, key_head: usize) -> usize {
        self.blocks[block] as usize * self.num_kv_heads + key_head
    }

    /// The keys or values of a tile, whole blocks.
    fn blocks_of<T>(&self, of_tile: Keys, values: &'a [T]) -> impl Iterator<Item = &'a [T]> {
        let (start, end) = of_tile.range;
        let size = self.head_dim * CACHE_BLOCK;
        let each = start / CACHE_BLOCK..end.div_ceil(CACHE_BLOCK);
        each.map(move |block| &values[self.head(block, of_tile.key_head) * size..][..size])
    }

    fn prefetch<T>(&self, of_tile: Keys, values: &'a [T]) {
        for block in self.blocks_of(of_tile, values) {
            for at in (0..block.len()).step_by(64 / size_of::<T>()) {
                prefetch(block, at);
            }
        }
    }

    /// The blocks of a tile of int8, in bf16.
    fn write_bf16(&self, of_tile: Keys, (k, v): (&mut [bf16], &mut [bf16])) {
        let size = self.head_dim * CACHE_BLOCK;
        let first = of_tile.range.0 / CACHE_BLOCK;
        let blocks = first..of_tile.range.1.div_ceil(CACHE_BLOCK);
        for (block, to) in blocks.zip(k.chunks_mut(size).zip(v.chunks_mut(size))) {
            let head = self.head(block, of_tile.key_head);
            let how = (self.isa, self.head_dim);
            let is_done = self.cache.write_bf16(how, head, None, to);
            debug_assert!(is_done, "`has_scales` said so");
        }
    }

    /// Whether all scales of the first `len` positions, in whole blocks, are numbers.
    fn has_scales(&self, len: usize, key_head: usize) -> bool {
        let CacheView::Int8(_, _, k, v) = self.cache else {
            return true;
        };
        (0..len.div_ceil(CACHE_BLOCK)).all(|block| {
            let at = self.head(block, key_head) * CACHE_BLOCK..;
            let of_block = |scales: &[f32]| {
                scales[at.clone()][..CACHE_BLOCK]
                    .iter()
                    .all(|a| a.is_finite())
            };
            of_block(k) && of_block(v)
        })
    }

    /// The value at a position, stored in bf16.
    fn value(&self, position: usize, key_head: usize) -> &'a [bf16] {
        let CacheView::Bf16(_, v) = self.cache else {
            unreachable!("called for bf16 only");
        };
        let at = self.head(position / CACHE_BLOCK, key_head) * self.head_dim * CACHE_BLOCK;
        &v[at + position % CACHE_BLOCK * self.head_dim..][..self.head_dim]
    }

    /// Whether what is read of the first `len` positions is numbers wherever not all rows see it:
    /// from position `seen` on.
    pub(super) fn is_finite(&self, (seen, len): (usize, usize), key_head: usize) -> bool {
        match self.cache {
            CacheView::Bf16(..) => {
                let is_finite = |at| self.value(at, key_head).iter().all(|v| v.is_finite());
                (seen..len).all(is_finite)
            }
            _ => self.has_scales(len, key_head),
        }
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
