//! The operations of a transformer: the seam between the model and a device.
//!
//! Rules, once for all: parameter gradients `+=`, activation gradients `=`, the residual
//! stream `+=`. Rows are tokens. A weight has shape `[out, in]`. What an operation
//! computes is fixed to the bit by ARCHITECTURE.md, Numbers; how is the backend's affair.

use crate::cache::{CacheBuf, CacheStore, CachedAttention};
use crate::memory::{Buf, Extent, Shared};
use crate::real::Real;
use crate::topk::{Kept, TopK};
use bytemuck::Pod;
use half::bf16;
use setun_ternary::{PackedMatrix, ScaleError, ScaleRule};

/// Ternary weights in a backend: what the forward pass multiplies with.
#[derive(Clone, Copy, Debug)]
pub struct TernaryBuf {
    /// i8 `[out, in]`, values -1, 0, 1.
    pub trits: Buf<i8>,
    /// f32 `[out, groups]`, bf16 values that f16 holds.
    pub scales: Buf<f32>,
    /// Weights that share a scale.
    pub group_size: usize,
}

/// Ternary weights that stay packed, for inference in numerics `int8`. A device lays them
/// out as its products read them.
#[derive(Clone, Copy, Debug)]
pub struct PackedBuf {
    /// The device's own layout, [`Backend::packed_len`] bytes.
    pub bytes: Buf<u8>,
    /// Weights that share a scale.
    pub group_size: usize,
}

/// A weight matrix `[out, in]`.
#[derive(Clone, Copy, Debug)]
pub struct WeightBuf<R> {
    /// Output width.
    pub out: usize,
    /// Input width.
    pub inp: usize,
    /// Its values.
    pub data: WeightData<R>,
}

/// The values of a [`WeightBuf`].
#[derive(Clone, Copy, Debug)]
pub enum WeightData<R> {
    /// The weights themselves.
    Dense(Buf<R>),
    /// `s * t`.
    Ternary(TernaryBuf),
    /// `s * t`, packed; meets int8 activations only.
    Packed(PackedBuf),
}

/// Activations as they enter products, `[rows, width]`; its variant is the numerics mode.
#[derive(Clone, Copy, Debug)]
pub enum ActBuf<R> {
    /// Numerics `f32` (and the f64 oracle).
    Real(Buf<R>),
    /// Numerics `bf16`.
    Bf16(Buf<bf16>),
    /// Numerics `int8`: `x = a * q`, one `a` per row and group.
    Int8 {
        /// i8 `[rows, width]`.
        q: Buf<i8>,
        /// f32 `[rows, groups]`.
        scales: Buf<f32>,
        /// Values that share an `a`.
        group_size: usize,
    },
}

impl<R> ActBuf<R> {
    /// The part that begins at row `start` with `rows` rows of `width` values.
    pub fn rows(self, start: usize, rows: usize, width: usize) -> Self {
        match self {
            Self::Real(x) => Self::Real(x.part(start * width, rows * width)),
            Self::Bf16(x) => Self::Bf16(x.part(start * width, rows * width)),
            Self::Int8 {
                q,
                scales,
                group_size,
            } => {
                let groups = width.div_ceil(group_size);
                Self::Int8 {
                    q: q.part(start * width, rows * width),
                    scales: scales.part(start * groups, rows * groups),
                    group_size,
                }
            }
        }
    }
}

/// A product of activations that several products share.
#[derive(Clone, Copy, Debug)]
pub struct Product<R> {
    /// What they are multiplied with.
    pub weight: WeightBuf<R>,
    /// `[rows, out]`
    pub y: Buf<R>,
}

/// Queries, keys or values, `[rows, heads, head_dim]`: f32 in numerics `f32`, else bf16.
#[derive(Clone, Copy, Debug)]
pub enum AttnBuf<R> {
    /// Numerics `f32`.
    Real(Buf<R>),
    /// Numerics `bf16` and `int8`.
    Bf16(Buf<bf16>),
}

impl<R> AttnBuf<R> {
    /// The part that begins at row `start` with `rows` rows of `width` values.
    pub fn rows(self, start: usize, rows: usize, width: usize) -> Self {
        match self {
            Self::Real(x) => Self::Real(x.part(start * width, rows * width)),
            Self::Bf16(x) => Self::Bf16(x.part(start * width, rows * width)),
        }
    }
}

/// Queries that attend to a run of keys: the last `q_len` of its `kv_len` positions.
/// Query `i` sees the keys up to position `kv_len - q_len + i`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Row of the first query.
    pub q_start: usize,
    /// Number of queries.
    pub q_len: usize,
    /// Row of the key at position 0.
    pub kv_start: usize,
    /// Number of keys.
    pub kv_len: usize,
}

impl Segment {
    /// `len` tokens that attend to each other only, as in training.
    pub fn own(start: usize, len: usize) -> Self {
        Self {
            q_start: start,
            q_len: len,
            kv_start: start,
            kv_len: len,
        }
    }
}

/// Queries of a block drafter (`DFlash`): block `n` of `size` rows sees the first
/// `anchors[n]` keys of its segment, and all of its own keys, in both directions. The keys
/// of the queries are the last `q_len` of the segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DraftBlocks<'a> {
    /// Rows of a block; segments begin and end with whole blocks.
    pub size: usize,
    /// For each block of all queries: at most `kv_len - q_len` of its segment.
    pub anchors: &'a [u32],
}

/// Causal attention with grouped heads: query head `h` reads key head
/// `h / (num_heads / num_kv_heads)`.
#[derive(Clone, Copy, Debug)]
pub struct Attention<'a, R> {
    /// `[q rows, num_heads, head_dim]`, after norm and RoPE.
    pub q: AttnBuf<R>,
    /// `[kv rows, num_kv_heads, head_dim]`, after norm and RoPE.
    pub k: AttnBuf<R>,
    /// `[kv rows, num_kv_heads, head_dim]`.
    pub v: AttnBuf<R>,
    /// `[q rows, num_heads, head_dim]`.
    pub out: Buf<R>,
    /// `[q rows, num_heads]`: log of the sum of the exponentials, kept for backward.
    pub lse: Buf<R>,
    /// Who attends to whom: in ascending order, no row in two.
    pub segments: &'a [Segment],
    /// In place of the causal order.
    pub blocks: Option<DraftBlocks<'a>>,
    /// Query heads.
    pub num_heads: usize,
    /// Key and value heads.
    pub num_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
}

/// Gradients of [`Attention`].
#[derive(Clone, Copy, Debug)]
pub struct AttentionBackward<'a, R> {
    /// The forward operation, its `out` and `lse` as it left them.
    pub forward: Attention<'a, R>,
    /// `[q rows, num_heads, head_dim]`.
    pub dout: Buf<R>,
    /// `[q rows, num_heads]`: scratch for `rowsum(dout * out)`.
    pub delta: Buf<R>,
    /// `[q rows, num_heads, head_dim]`, `=`.
    pub dq: Buf<R>,
    /// `[kv rows, num_kv_heads, head_dim]`, `=`.
    pub dk: Buf<R>,
    /// `[kv rows, num_kv_heads, head_dim]`, `=`.
    pub dv: Buf<R>,
}

/// RMSNorm over the last dimension: `y = x * inv * weight`, `inv = 1 / sqrt(mean x^2 + eps)`.
#[derive(Clone, Copy, Debug)]
pub struct RmsNorm<R> {
    /// `[rows, width]`.
    pub x: Buf<R>,
    /// `[width]`.
    pub weight: Buf<R>,
    /// `[rows]`, kept for backward.
    pub inv: Buf<R>,
    /// Width of a row.
    pub width: usize,
    /// Added to the mean square.
    pub eps: f64,
}

/// Values as they are stored: real numbers, or bf16 that is read as it is.
#[derive(Clone, Copy, Debug)]
pub enum StoredBuf<R> {
    /// Real numbers.
    Real(Buf<R>),
    /// bf16.
    Bf16(Buf<bf16>),
}

impl<R> StoredBuf<R> {
    /// Number of values.
    pub fn len(self) -> usize {
        match self {
            Self::Real(x) => x.len(),
            Self::Bf16(x) => x.len(),
        }
    }

    /// Whether there are no values.
    pub fn is_empty(self) -> bool {
        self.len() == 0
    }
}

impl<R> From<StoredBuf<R>> for Extent {
    fn from(buf: StoredBuf<R>) -> Self {
        match buf {
            StoredBuf::Real(x) => x.into(),
            StoredBuf::Bf16(x) => x.into(),
        }
    }
}

/// LayerNorm over the last dimension of `[batch, seq, width]` (Ba et al., 2016):
/// `y = (x - mean) * inv * gamma + beta`, `inv = 1 / sqrt(variance + eps)` with the
/// variance over all `width` values. A row is one of the `batch * seq`.
#[derive(Clone, Copy, Debug)]
pub struct LayerNorm<R> {
    /// `[rows, width]`.
    pub x: StoredBuf<R>,
    /// `[width]`: the scale.
    pub gamma: Buf<R>,
    /// `[width]`: the shift.
    pub beta: Buf<R>,
    /// `[rows]`, kept for backward: the mean, rounded to one number.
    pub center: Buf<R>,
    /// `[rows]`, kept for backward: the mean of `x - center`.
    pub rest: Buf<R>,
    /// `[rows]`, kept for backward: the reciprocal deviation.
    pub inv: Buf<R>,
    /// Width of a row.
    pub width: usize,
    /// Added to the variance; positive, so that a constant row gives `beta`.
    pub eps: f64,
}

/// Gradients of [`LayerNorm`].
#[derive(Clone, Copy, Debug)]
pub struct LayerNormBackward<R> {
    /// The forward operation, its statistics as it left them.
    pub forward: LayerNorm<R>,
    /// `[rows, width]`.
    pub dy: Buf<R>,
    /// `[rows, width]`.
    pub dx: Buf<R>,
    /// Whether `dx` is added to what is there, as on a residual stream, or written.
    pub accumulate: bool,
    /// `[width]`, `+=`.
    pub dgamma: Buf<R>,
    /// `[width]`, `+=`.
    pub dbeta: Buf<R>,
    /// Scratch of [`LayerNormBackward::partial_len`] values.
    pub partial: Buf<R>,
}

impl<R> LayerNormBackward<R> {
    /// Values of `partial`: two sums of a row's width for each block of rows.
    pub fn partial_len(rows: usize, width: usize) -> usize {
        rows.div_ceil(crate::kernels::layer_norm::BLOCK_ROWS) * 2 * width
    }
}

/// Per-head RMSNorm and rotary embedding of queries or keys.
#[derive(Clone, Copy, Debug)]
pub struct NormRope<R> {
    /// The norm over each head: x `[rows, heads, head_dim]`, inv `[rows, heads]`.
    pub norm: RmsNorm<R>,
    /// Heads.
    pub heads: usize,
    /// `[positions, head_dim / 2]`.
    pub cos: Buf<R>,
    /// `[positions, head_dim / 2]`.
    pub sin: Buf<R>,
    /// `[rows]`: position of each row.
    pub positions: Buf<u32>,
}

/// A target that does not count: its row has loss 0, divergence 0 and gradient 0. A mean
/// over the rows that count is up to `gradient_scale` and to who adds the losses up.
pub const IGNORE_TARGET: u32 = u32::MAX;

/// Softmax cross entropy of a chunk of logits.
#[derive(Clone, Copy, Debug)]
pub struct CrossEntropy<R> {
    /// `[rows, vocab]`; overwritten with its gradient where `gradient_scale` is given.
    pub logits: Buf<R>,
    /// `[rows]`: below `vocab`, or [`IGNORE_TARGET`].
    pub targets: Buf<u32>,
    /// `[rows]`: negative log-likelihood of each target, 0 where it is ignored.
    pub losses: Buf<R>,
    /// Weight of a row in the loss whose gradient is taken, `1 / tokens` for a mean.
    pub gradient_scale: Option<f64>,
    /// Weight of the squared log-sum-exp in that loss, which keeps logits from drifting
    /// (PaLM, Chowdhery et al., 2022); 0 for none. `losses` do not have it.
    pub z_loss: f64,
    /// Bound of the logits: `softcap * tanh(logit / softcap)` takes their place (Gemma 2,
    /// 2024); 0 for none.
    pub softcap: f64,
}

/// Cross entropy mixed with the divergence from a teacher (Hinton et al., 2015), for a
/// chunk of logits: `(1 - weight) * CE + weight * T^2 * KL(teacher || student)`, with both
/// distributions at temperature `T` in the divergence.
#[derive(Clone, Copy, Debug)]
pub struct Distillation<R> {
    /// The student's side: losses stay the cross entropy alone; the gradient is of the mix,
    /// which has neither `z_loss` nor `softcap`.
    pub student: CrossEntropy<R>,
    /// `[rows, vocab]`: the teacher's logits; left as scratch.
    pub teacher: Buf<R>,
    /// `[rows]`: the divergence of each row, in nats at temperature `T`.
    pub divergences: Buf<R>,
    /// Share of the divergence in the loss, from 0 to 1.
    pub weight: f64,
    /// `T`, positive.
    pub temperature: f64,
}

/// Dropout (Srivastava et al., 2014): each value becomes 0 with probability `share`, else
/// grows by `1 / (1 - share)`. On a gradient the same operation is the backward pass: which
/// values go is a function of `seed` and of their numbers.
#[derive(Clone, Copy, Debug)]
pub struct Dropout<R> {
    /// The values, in place.
    pub x: Buf<R>,
    /// Number of the first one; the others follow, modulo 2^32.
    pub first: u32,
    /// Below 1; probabilities are multiples of 2^-32.
    pub share: f64,
    /// Of the random bits.
    pub seed: [u32; 2],
}

/// One AdamW update (Loshchilov and Hutter, 2019), in PyTorch's order of operations.
///
/// Moments of bf16 are read exactly, updated in the real type, used for the weight, and
/// only then rounded: up or down, by chance in proportion to what is cut off, with random
/// bits that are a hash of update and index. (To nearest, a second moment that falls by a
/// thousandth an update would never fall.)
#[derive(Clone, Copy, Debug)]
pub struct AdamW<R> {
    /// Weights.
    pub weight: Buf<R>,
    /// Their gradient.
    pub grad: Buf<R>,
    /// First moment.
    pub m: StoredBuf<R>,
    /// Second moment, stored as the first.
    pub v: StoredBuf<R>,
    /// Factor on the gradient: the clipping.
    pub grad_scale: f64,
    /// Learning rate.
    pub lr: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the denominator.
    pub eps: f64,
    /// Decoupled decay.
    pub weight_decay: f64,
    /// Number of this update, from 1.
    pub step: u64,
}

/// What a projection did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ProjectStats {
    /// Weights that are zero now.
    pub zeros: u64,
    /// Trits that differ from those before.
    pub flips: u64,
}

/// A scale that cannot be shipped, with its place.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ProjectError {
    /// Row of the matrix.
    pub row: usize,
    /// Group in the row.
    pub group: usize,
    /// What is wrong.
    pub why: ScaleError,
}

/// Reads buffers of a device.
pub trait Reader {
    /// Copies a buffer out.
    ///
    /// # Panics
    /// For a buffer that this reader may not read, or another length.
    fn copy_out<T: Pod>(&self, buf: Buf<T>, out: &mut [T]);
}

impl Reader for Shared {
    fn copy_out<T: Pod>(&self, buf: Buf<T>, out: &mut [T]) {
        out.copy_from_slice(self.read(buf));
    }
}

/// Rows of a packed matrix are written in blocks of a multiple of this.
pub const PACKED_ROWS: usize = 64;

/// A device. All methods block until their result is there.
pub trait Backend {
    /// Reads from another thread, see [`Backend::share`].
    type Shared: Reader + Send + 'static;

    /// Floating-point type of the residual stream, the losses and the gradients.
    type Real: Real;

    /// Threads that share the work; results do not depend on it.
    fn threads(&self) -> usize;
    /// Copies a buffer out.
    fn read<T: Pod>(&self, buf: Buf<T>, out: &mut [T]);
    /// Copies values in.
    fn write<T: Pod>(&mut self, buf: Buf<T>, values: &[T]);
    /// Lets another thread read the buffers `extents`. Until what is returned is dropped,
    /// no operation may write them, and nothing else can be shared.
    fn share(&mut self, extents: &[Extent]) -> Self::Shared;
    /// Sets all bytes to zero.
    fn zero<T: Pod>(&mut self, buf: Buf<T>);
    /// `to = from`.
    fn copy(&mut self, from: Buf<Self::Real>, to: Buf<Self::Real>);
    /// `to += from`.
    fn add(&mut self, from: Buf<Self::Real>, to: Buf<Self::Real>);
    /// `to += share * (from - to)`.
    fn lerp(&mut self, from: Buf<Self::Real>, share: f64, to: Buf<Self::Real>);
    /// Leaves values out by chance.
    fn dropout(&mut self, op: Dropout<Self::Real>);

    /// Projects latent weights `[out, cols]` into `to` (ARCHITECTURE.md, Numbers).
    fn project(
        &mut self,
        latent: Buf<Self::Real>,
        cols: usize,
        rule: ScaleRule,
        to: TernaryBuf,
    ) -> Result<ProjectStats, ProjectError>;

    /// Bytes of a packed matrix `[out, in]`.
    fn packed_len(out: usize, inp: usize, group_size: usize) -> usize;
    /// Lays out rows of a matrix, whose codes are valid: `rows` are the first of them, a multiple
    /// of [`PACKED_ROWS`], and the number of rows of the whole matrix.
    fn write_packed(&mut self, to: PackedBuf, rows: (usize, usize), matrix: &PackedMatrix);

    /// `y[r] = weight[ids[r]]`, unrounded.
    fn embedding(&mut self, ids: Buf<u32>, weight: WeightBuf<Self::Real>, y: Buf<Self::Real>);
    /// `dweight[ids[r]] += dy[r]`, over ascending r.
    fn embedding_backward(&mut self, ids: Buf<u32>, dy: Buf<Self::Real>, dweight: Buf<Self::Real>);

    /// RMSNorm, rounded for the products that follow.
    fn rms_norm(&mut self, norm: RmsNorm<Self::Real>, y: ActBuf<Self::Real>);
    /// `dx += `, `dweight += `; `dy` is left as scratch.
    fn rms_norm_backward(
        &mut self,
        norm: RmsNorm<Self::Real>,
        dy: Buf<Self::Real>,
        dx: Buf<Self::Real>,
        dweight: Buf<Self::Real>,
    );

    /// LayerNorm, rounded for the products that follow. No part of Qwen3.
    fn layer_norm(&mut self, op: LayerNorm<Self::Real>, y: ActBuf<Self::Real>);
    /// Its gradients.
    fn layer_norm_backward(&mut self, op: LayerNormBackward<Self::Real>);

    /// Norm and RoPE of queries or keys.
    fn norm_rope(&mut self, op: NormRope<Self::Real>, y: AttnBuf<Self::Real>);
    /// `dy` becomes dx in place; `dweight +=`.
    fn norm_rope_backward(
        &mut self,
        op: NormRope<Self::Real>,
        dy: Buf<Self::Real>,
        dweight: Buf<Self::Real>,
    );

    /// Rounds activations `[rows, width]` for products.
    fn round_activation(&mut self, x: Buf<Self::Real>, width: usize, y: ActBuf<Self::Real>);
    /// Rounds values for attention.
    fn round_attention(&mut self, x: Buf<Self::Real>, y: AttnBuf<Self::Real>);

    /// `y[r, n] = sum_k x[r, k] * w[n, k]`.
    fn linear(&mut self, x: ActBuf<Self::Real>, w: WeightBuf<Self::Real>, y: Buf<Self::Real>);
    /// [`linear`](Self::linear) of the same activations with several weights. A device may
    /// do them in one go.
    fn linears(&mut self, x: ActBuf<Self::Real>, products: &[Product<Self::Real>]) {
        for product in products {
            self.linear(x, product.weight, product.y);
        }
    }
    /// The best entries and the sums of `linear(x, w)` by row, without its result where
    /// the device can do so; `logits` `[rows, out]` is scratch.
    fn linear_topk(
        &mut self,
        x: ActBuf<Self::Real>,
        w: WeightBuf<Self::Real>,
        logits: Buf<Self::Real>,
        wanted: TopK<'_>,
        kept: &mut Kept,
    );
    /// `dx[r, k] (+)= sum_n dy[r, n] * w[n, k]`.
    fn linear_dx(
        &mut self,
        dy: Buf<Self::Real>,
        w: WeightBuf<Self::Real>,
        dx: Buf<Self::Real>,
        numerics_f32: bool,
        accumulate: bool,
    );
    /// `dw[n, k] += sum_r dy[r, n] * x[r, k]`, over ascending r.
    fn linear_dw(
        &mut self,
        dy: Buf<Self::Real>,
        x: ActBuf<Self::Real>,
        out: usize,
        inp: usize,
        dw: Buf<Self::Real>,
    );

    /// Attention, tile by tile with the online softmax; keeps `out` and `lse`.
    fn attention(&mut self, op: Attention<'_, Self::Real>);
    /// Writes new keys and values to slots of a cache.
    fn cache_store(&mut self, op: CacheStore<'_, Self::Real>);
    /// Copies slots `(from, to)` of a cache, in this order.
    fn cache_move(&mut self, cache: CacheBuf, moves: &[(u32, u32)]);
    /// Attention to a cache: the same bits as [`attention`](Self::attention) over the same
    /// keys, for a cache that stores them exactly.
    fn cached_attention(&mut self, op: CachedAttention<'_, Self::Real>);
    /// Gradients of [`attention`](Self::attention), recomputed tile by tile.
    fn attention_backward(&mut self, op: AttentionBackward<'_, Self::Real>);

    /// `y = silu(gate) * up`, rounded.
    fn swiglu(
        &mut self,
        gate: Buf<Self::Real>,
        up: Buf<Self::Real>,
        width: usize,
        y: ActBuf<Self::Real>,
    );
    /// `gate` and `up` become their gradients in place.
    fn swiglu_backward(&mut self, dy: Buf<Self::Real>, gate: Buf<Self::Real>, up: Buf<Self::Real>);

    /// Losses of a chunk of logits and, where asked for, its gradient in place.
    fn cross_entropy(&mut self, op: CrossEntropy<Self::Real>);

    /// As [`cross_entropy`](Self::cross_entropy), mixed with a teacher.
    fn distill(&mut self, op: Distillation<Self::Real>);
    /// `to = (1 - share) * latent + share * s * t`, `[rows, cols]`: a weight on its way to
    /// its projection.
    fn blend(
        &mut self,
        latent: Buf<Self::Real>,
        cols: usize,
        ternary: TernaryBuf,
        share: f64,
        to: Buf<Self::Real>,
    );

    /// Sum of squares in f64, over fixed chunks in ascending order.
    fn sum_squares(&mut self, x: Buf<Self::Real>) -> f64;
    /// One update.
    fn adamw(&mut self, op: AdamW<Self::Real>);
}
