//! Keys and values of past tokens, in blocks: what decoding attends to.
//!
//! A cache is a pool of blocks of [`CACHE_BLOCK`] slots for each layer. A sequence is a
//! table of blocks: position `p` lies in slot `p % CACHE_BLOCK` of its block
//! `p / CACHE_BLOCK`. Who owns which block is the engine's affair; operations take slot
//! numbers `block * CACHE_BLOCK + lane`.
//!
//! Keys lie as `[block][kv head][head_dim][slot]`, so that the scores of neighbouring
//! positions fill the lanes of a vector; values as `[block][kv head][slot][head_dim]`.

use crate::memory::{Buf, Category, Plan};
use crate::ops::AttnBuf;
use half::bf16;

/// Positions of a block; divides the tile of attention, so a block lies in one tile.
pub const CACHE_BLOCK: usize = 16;

/// How a cache stores its numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CacheKind {
    /// Two bytes: what attention reads in numerics int8 and bf16, so nothing is lost.
    #[default]
    Bf16,
    /// Four bytes: for numerics f32.
    F32,
    /// One byte, with one f32 scale per token and head for keys and one for values:
    /// `a = absmax / 127`, `q = round_half_even(x / a)`. Attention reads `bf16(a * q)`.
    Int8,
}

impl CacheKind {
    /// All kinds.
    pub const ALL: [Self; 3] = [Self::Bf16, Self::F32, Self::Int8];

    /// Name as it is written on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Bf16 => "bf16",
            Self::F32 => "f32",
            Self::Int8 => "int8",
        }
    }

    /// The kind called `name`, if there is one.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }
}

/// Sizes of the cache of one layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheShape {
    /// How numbers are stored.
    pub kind: CacheKind,
    /// Blocks of the pool.
    pub num_blocks: usize,
    /// Key and value heads.
    pub num_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
}

impl CacheShape {
    /// Bytes of one token in one layer: keys and values of every head,
    /// `2 kv_heads (head_dim b + s)` with `b` bytes for a number and `s` for a scale.
    pub fn token_bytes(self) -> usize {
        let (number, scale) = match self.kind {
            CacheKind::Bf16 => (2, 0),
            CacheKind::F32 => (4, 0),
            CacheKind::Int8 => (1, 4),
        };
        2 * self.num_kv_heads * (self.head_dim * number + scale)
    }

    /// Reserves the cache of the layer called `name`.
    pub fn reserve(self, plan: &mut Plan, name: &str) -> CacheBuf {
        let heads = self.num_blocks * CACHE_BLOCK * self.num_kv_heads;
        let len = heads * self.head_dim;
        let kv = Category::KvCache;
        let (k, v) = (format!("{name}.k"), format!("{name}.v"));
        let data = match self.kind {
            CacheKind::Bf16 => CacheData::Bf16(plan.alloc(kv, k, len), plan.alloc(kv, v, len)),
            CacheKind::F32 => CacheData::F32(plan.alloc(kv, k, len), plan.alloc(kv, v, len)),
            CacheKind::Int8 => CacheData::Int8 {
                k_scales: plan.alloc(kv, format!("{k} scales"), heads),
                v_scales: plan.alloc(kv, format!("{v} scales"), heads),
                k: plan.alloc(kv, k, len),
                v: plan.alloc(kv, v, len),
            },
        };
        CacheBuf { shape: self, data }
    }
}

/// The cache of one layer.
#[derive(Clone, Copy, Debug)]
pub struct CacheBuf {
    /// Its sizes.
    pub shape: CacheShape,
    /// Its numbers.
    pub data: CacheData,
}

/// Keys `[block][kv head][head_dim][slot]` and values `[block][kv head][slot][head_dim]`.
#[derive(Clone, Copy, Debug)]
pub enum CacheData {
    /// [`CacheKind::Bf16`]: keys, values.
    Bf16(Buf<bf16>, Buf<bf16>),
    /// [`CacheKind::F32`]: keys, values.
    F32(Buf<f32>, Buf<f32>),
    /// [`CacheKind::Int8`]
    Int8 {
        /// Keys.
        k: Buf<i8>,
        /// Values.
        v: Buf<i8>,
        /// `[block][kv head][slot]`
        k_scales: Buf<f32>,
        /// `[block][kv head][slot]`
        v_scales: Buf<f32>,
    },
}

/// New keys and values for a cache.
#[derive(Clone, Copy, Debug)]
pub struct CacheStore<'a, R> {
    /// `[rows, num_kv_heads, head_dim]`, after norm and RoPE.
    pub k: AttnBuf<R>,
    /// `[rows, num_kv_heads, head_dim]`.
    pub v: AttnBuf<R>,
    /// Slot of each row; of rows of the same slot the last one stays.
    pub slots: &'a [u32],
    /// Where they go.
    pub cache: CacheBuf,
}

/// A node whose parent is the last token before the segment's rows.
pub const ROOT: u32 = u32::MAX;

/// Whom the rows of a segment see among themselves.
#[derive(Clone, Copy, Debug, Default)]
pub enum Among<'a> {
    /// Row `i` sees the rows up to itself.
    #[default]
    Chain,
    /// The parent of each row, a smaller row or [`ROOT`]; a row sees itself and its ancestors, each
    /// at position `past + depth`, in which place it enters the sums (ARCHITECTURE.md, Numbers).
    Tree(&'a [u32]),
    /// Each row sees all of them: the block of a block drafter.
    All,
}

impl<'a> From<Option<&'a [u32]>> for Among<'a> {
    /// A tree of these parents, a chain without.
    fn from(parents: Option<&'a [u32]>) -> Self {
        parents.map_or(Self::Chain, Self::Tree)
    }
}

/// Queries of one sequence: `q_len` rows behind `past` tokens of the cache. Row `i` has
/// been stored at position `past + i` of the block table.
#[derive(Clone, Copy, Debug)]
pub struct CachedSegment<'a> {
    /// Row of the first query.
    pub q_start: usize,
    /// Number of queries.
    pub q_len: usize,
    /// Tokens before them, which all of them see.
    pub past: usize,
    /// Block of the pool for each run of [`CACHE_BLOCK`] positions.
    pub blocks: &'a [u32],
    /// Which of each other the queries see.
    pub among: Among<'a>,
}

impl CachedSegment<'_> {
    /// Slot of position `p` of the table.
    pub fn slot(&self, p: usize) -> usize {
        self.blocks[p / CACHE_BLOCK] as usize * CACHE_BLOCK + p % CACHE_BLOCK
    }

    /// With a tree that is a chain as a chain: the same bits, sooner.
    #[must_use]
    pub fn simplified(self) -> Self {
        let is_chain = |parents: &[u32]| {
            let before = std::iter::once(ROOT).chain(0..);
            parents.iter().zip(before).all(|(&p, before)| p == before)
        };
        match self.among {
            Among::Tree(parents) if is_chain(parents) => Self {
                among: Among::Chain,
                ..self
            },
            _ => self,
        }
    }

    /// The position behind the last one that row `i` sees.
    pub fn end(&self, i: usize) -> usize {
        let own = match self.among {
            Among::Chain => i + 1,
            Among::Tree(_) => self.depth(i) + 1,
            Among::All => self.q_len,
        };
        self.past + own
    }

    /// The position up to which the rows from `i` on see everything.
    pub(crate) fn common_end(&self, i: usize) -> usize {
        match self.among {
            Among::Tree(_) => self.past,
            Among::Chain | Among::All => self.end(i),
        }
    }

    /// The row before row `i` in the text, if that is a row of the segment.
    pub fn parent(&self, i: usize) -> Option<usize> {
        match self.among {
            Among::Tree(parents) => (parents[i] != ROOT).then_some(parents[i] as usize),
            Among::Chain | Among::All => i.checked_sub(1),
        }
    }

    /// Number of the row's ancestors in the segment.
    pub fn depth(&self, mut i: usize) -> usize {
        let Among::Tree(_) = self.among else { return i };
        let mut depth = 0;
        while let Some(parent) = self.parent(i) {
            assert!(parent < i, "a parent comes before its children");
            (i, depth) = (parent, depth + 1);
        }
        depth
    }
}

/// Attention of new queries to cached keys, theirs included.
#[derive(Clone, Copy, Debug)]
pub struct CachedAttention<'a, R> {
    /// `[q rows, num_heads, head_dim]`, after norm and RoPE.
    pub q: AttnBuf<R>,
    /// `[q rows, num_heads, head_dim]`.
    pub out: Buf<R>,
    /// Keys and values.
    pub cache: CacheBuf,
    /// Sequences: in ascending order, no row in two.
    pub segments: &'a [CachedSegment<'a>],
    /// Query heads.
    pub num_heads: usize,
}
