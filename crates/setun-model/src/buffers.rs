//! Activations of a model: what the forward pass writes and the backward pass reads.

use crate::qwen3::ModelSpec;
use half::bf16;
use setun_backend::{
    ActBuf, AttnBuf, Buf, CacheBuf, CacheKind, CacheShape, Category, Limits, Plan, Real,
};
use setun_ternary::{Numerics, groups_per_row};

/// Group size for which dense models reserve scratch memory.
const USUAL_GROUP: usize = 128;

impl ModelSpec {
    /// What the scratch memory of a host must serve.
    pub fn limits(&self) -> Limits {
        let c = &self.config;
        let heads = c.num_attention_heads * c.head_dim;
        Limits {
            width: c.intermediate_size.max(c.hidden_size).max(heads),
            head_dim: c.head_dim,
            group_size: self.scheme.map_or(USUAL_GROUP, |s| s.group_size),
        }
    }
}

/// What a model is laid out for.
#[derive(Clone, Copy, Debug)]
pub enum Purpose {
    /// Forward and backward over whole windows.
    Train(TrainShape),
    /// Forward over whole windows.
    Infer {
        /// Most new tokens of a call.
        rows: usize,
        /// Most positions of a window.
        context: usize,
        /// Rows of logits that exist at a time.
        head_chunk: usize,
    },
    /// Forward over new tokens of any number of sequences, against a cache in blocks.
    Decode(DecodeShape),
}

/// Sizes of decoding.
#[derive(Clone, Copy, Debug)]
pub struct DecodeShape {
    /// Most new tokens of a call.
    pub rows: usize,
    /// Most positions of a sequence.
    pub positions: usize,
    /// How keys and values are stored.
    pub cache: CacheKind,
    /// Blocks of the cache.
    pub num_blocks: usize,
    /// Rows of logits that exist at a time.
    pub head_chunk: usize,
}

/// Sizes of a training.
#[derive(Clone, Copy, Debug)]
pub struct TrainShape {
    /// Most tokens of a micro-batch.
    pub rows: usize,
    /// Most positions of a window.
    pub positions: usize,
    /// Keep only each layer's input, and compute the rest again in backward.
    pub recompute: bool,
    /// Rows of logits that exist at a time.
    pub head_chunk: usize,
}

/// Saved activations of one layer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LayerBuffers<R> {
    /// Residual stream behind the attention `[t, d]`.
    pub x_mid: Buf<R>,
    /// `[t]`
    pub inv_input: Buf<R>,
    /// `[t]`
    pub inv_post: Buf<R>,
    /// Normed input of q, k, v `[t, d]`.
    pub act_qkv: ActBuf<R>,
    /// Queries before norm and RoPE `[t, h, e]`.
    pub q_pre: Buf<R>,
    /// Keys before norm and RoPE `[t, k, e]`.
    pub k_pre: Buf<R>,
    /// `[t, h]`
    pub inv_q: Buf<R>,
    /// `[t, k]`
    pub inv_k: Buf<R>,
    /// Queries `[t, h, e]`.
    pub q: AttnBuf<R>,
    /// Keys `[t, k, e]`.
    pub k: AttnBuf<R>,
    /// Values `[t, k, e]`.
    pub v: AttnBuf<R>,
    /// Attention output `[t, h, e]`.
    pub attn: Buf<R>,
    /// `[t, h]`
    pub lse: Buf<R>,
    /// Attention output, rounded `[t, h * e]`.
    pub act_o: ActBuf<R>,
    /// Normed input of gate and up `[t, d]`.
    pub act_mlp: ActBuf<R>,
    /// `[t, f]`
    pub gate: Buf<R>,
    /// `[t, f]`
    pub up: Buf<R>,
    /// SwiGLU output, rounded `[t, f]`.
    pub act_down: ActBuf<R>,
}

/// Scratch of the backward pass.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BackwardBuffers<R> {
    /// Gradient of the residual stream `[t, d]`.
    pub dx: Buf<R>,
    /// Gradient of a normed input `[t, d]`.
    pub dnorm: Buf<R>,
    /// `[t, f]`
    pub dmlp: Buf<R>,
    /// `[t, h, e]`
    pub dattn: Buf<R>,
    /// `[t, h]`
    pub delta: Buf<R>,
    /// `[t, h, e]`
    pub dq: Buf<R>,
    /// `[t, k, e]`
    pub dk: Buf<R>,
    /// `[t, k, e]`
    pub dv: Buf<R>,
}

/// All activations.
#[derive(Clone, Debug)]
pub(crate) struct Buffers<R> {
    /// Most rows of a call.
    pub rows: usize,
    /// Rows of logits that exist at a time.
    pub head_chunk: usize,
    /// Positions of the RoPE table.
    pub positions_len: usize,
    /// `[t]`
    pub ids: Buf<u32>,
    /// `[t]`
    pub targets: Buf<u32>,
    /// `[t]`
    pub positions: Buf<u32>,
    /// `[positions, e / 2]`
    pub cos: Buf<R>,
    /// `[positions, e / 2]`
    pub sin: Buf<R>,
    /// Residual stream before each layer and behind the last: `[t, d]` each.
    pub x: Vec<Buf<R>>,
    /// Whether the layers share their buffers, so that backward computes them again.
    pub shared: bool,
    /// One for each layer; the same one where layers share.
    pub layers: Vec<LayerBuffers<R>>,
    /// In decoding, one for each layer.
    pub caches: Vec<CacheBuf>,
    /// Values before rounding `[t, k, e]`.
    pub v_pre: Buf<R>,
    /// `[t]`
    pub inv_final: Buf<R>,
    /// Normed input of the head `[t, d]`.
    pub act_head: ActBuf<R>,
    /// `[head_chunk, v]`
    pub logits: Buf<R>,
    /// `[t]`
    pub losses: Buf<R>,
    /// `[t]`, in training: divergences from a teacher.
    pub divergences: Buf<R>,
    /// In training.
    pub backward: Option<BackwardBuffers<R>>,
}

/// Allocates the buffers of one kind with their names.
struct Allocator<'a> {
    plan: &'a mut Plan,
    numerics: Numerics,
    group_size: usize,
    rows: usize,
}

impl Allocator<'_> {
    fn real<R: Real>(&mut self, name: &str, width: usize) -> Buf<R> {
        self.plan
            .alloc(Category::Activations, name, self.rows * width)
    }

    fn act<R: Real>(&mut self, name: &str, width: usize) -> ActBuf<R> {
        let n = self.rows * width;
        match self.numerics {
            Numerics::F32 => ActBuf::Real(self.real(name, width)),
            Numerics::Bf16 => ActBuf::Bf16(self.plan.alloc::<bf16>(Category::Activations, name, n)),
            Numerics::Int8 => {
                let groups = self.rows * groups_per_row(width, self.group_size);
                ActBuf::Int8 {
                    q: self.plan.alloc(Category::Activations, name, n),
                    scales: self.plan.alloc(
                        Category::Activations,
                        format!("{name} scales"),
                        groups,
                    ),
                    group_size: self.group_size,
                }
            }
        }
    }

    fn attn<R: Real>(&mut self, name: &str, width: usize) -> AttnBuf<R> {
        let len = self.rows * width;
        match self.numerics {
            Numerics::F32 => AttnBuf::Real(self.real(name, width)),
            Numerics::Bf16 | Numerics::Int8 => {
                AttnBuf::Bf16(self.plan.alloc(Category::Activations, name, len))
            }
        }
    }

    fn layer<R: Real>(&mut self, l: &str, spec: &ModelSpec) -> LayerBuffers<R> {
        let c = &spec.config;
        let (h, k) = (c.num_attention_heads, c.num_key_value_heads);
        let (qw, kw) = (h * c.head_dim, k * c.head_dim);
        let (d, f) = (c.hidden_size, c.intermediate_size);
        let name = |what: &str| format!("{l}.{what}");
        LayerBuffers {
            x_mid: self.real(&name("x_mid"), d),
            inv_input: self.real(&name("inv_input"), 1),
            inv_post: self.real(&name("inv_post"), 1),
            act_qkv: self.act(&name("act_qkv"), d),
            q_pre: self.real(&name("q_pre"), qw),
            k_pre: self.real(&name("k_pre"), kw),
            inv_q: self.real(&name("inv_q"), h),
            inv_k: self.real(&name("inv_k"), k),
            q: self.attn(&name("q"), qw),
            k: self.attn(&name("k"), kw),
            v: self.attn(&name("v"), kw),
            attn: self.real(&name("attn"), qw),
            lse: self.real(&name("lse"), h),
            act_o: self.act(&name("act_o"), qw),
            act_mlp: self.act(&name("act_mlp"), d),
            gate: self.real(&name("gate"), f),
            up: self.real(&name("up"), f),
            act_down: self.act(&name("act_down"), f),
        }
    }
}

/// Activations `[rows, width]` as the products of a model read them.
pub(crate) fn activation<R: Real>(
    plan: &mut Plan,
    spec: &ModelSpec,
    name: &str,
    rows: usize,
    width: usize,
) -> ActBuf<R> {
    let mut allocator = Allocator {
        plan,
        numerics: spec.numerics,
        group_size: spec.scheme.map_or(1, |s| s.group_size),
        rows,
    };
    allocator.act(name, width)
}

impl<R: Real> Buffers<R> {
    pub fn reserve(plan: &mut Plan, spec: &ModelSpec, purpose: Purpose) -> Self {
        let c = &spec.config;
        let (rows, positions_len, shared, head_chunk) = match purpose {
            Purpose::Train(s) => (s.rows, s.positions, s.recompute, s.head_chunk),
            Purpose::Infer {
                rows,
                context,
                head_chunk,
            } => (rows, context, true, head_chunk),
            Purpose::Decode(s) => (s.rows, s.positions, true, s.head_chunk),
        };
        let train = matches!(purpose, Purpose::Train(_));
        let group_size = spec.scheme.map_or(1, |s| s.group_size);
        let table = positions_len * c.head_dim / 2;
        let (cos, sin) = (
            plan.alloc(Category::Workspace, "rope cos", table),
            plan.alloc(Category::Workspace, "rope sin", table),
        );
        let logits = plan.alloc(Category::Workspace, "logits", head_chunk * c.vocab_size);
        let mut a = Allocator {
            plan,
            numerics: spec.numerics,
            group_size,
            rows,
        };
        let ids = a.plan.alloc(Category::Activations, "ids", rows);
        let targets = a.plan.alloc(Category::Activations, "targets", rows);
        let positions = a.plan.alloc(Category::Activations, "positions", rows);
        let residuals = if train { c.num_hidden_layers + 1 } else { 2 };
        let x: Vec<_> = (0..residuals)
            .map(|l| a.real(&format!("layers.{l}.x"), c.hidden_size))
            .collect();
        let layers = layer_buffers(&mut a, spec, shared);
        let caches = caches(a.plan, spec, purpose);
        let backward = train.then(|| backward_buffers(&mut a, spec));
        Self {
            rows,
            head_chunk,
            positions_len,
            ids,
            targets,
            positions,
            cos,
            sin,
            x,
            shared,
            layers,
            caches,
            v_pre: a.real("v_pre", c.num_key_value_heads * c.head_dim),
            inv_final: a.real("inv_final", 1),
            act_head: a.act("act_head", c.hidden_size),
            logits,
            losses: a.real("losses", 1),
            divergences: a.real("divergences", usize::from(backward.is_some())),
            backward,
        }
    }
}

/// Buffers of each layer; the same ones where layers share.
fn layer_buffers<R: Real>(
    a: &mut Allocator<'_>,
    spec: &ModelSpec,
    shared: bool,
) -> Vec<LayerBuffers<R>> {
    let num_layers = spec.config.num_hidden_layers;
    if shared {
        return vec![a.layer("layers.shared", spec); num_layers];
    }
    let names = (0..num_layers).map(|l| format!("layers.{l}"));
    names.map(|name| a.layer(&name, spec)).collect()
}

/// The cache of each layer, in decoding.
fn caches(plan: &mut Plan, spec: &ModelSpec, purpose: Purpose) -> Vec<CacheBuf> {
    let Purpose::Decode(decode) = purpose else {
        return Vec::new();
    };
    let shape = CacheShape {
        kind: decode.cache,
        num_blocks: decode.num_blocks,
        num_kv_heads: spec.config.num_key_value_heads,
        head_dim: spec.config.head_dim,
    };
    let layers = 0..spec.config.num_hidden_layers;
    layers
        .map(|l| shape.reserve(plan, &format!("layers.{l}")))
        .collect()
}

fn backward_buffers<R: Real>(a: &mut Allocator<'_>, spec: &ModelSpec) -> BackwardBuffers<R> {
    let c = &spec.config;
    let (h, k) = (c.num_attention_heads, c.num_key_value_heads);
    BackwardBuffers {
        dx: a.real("dx", c.hidden_size),
        dnorm: a.real("dnorm", c.hidden_size),
        dmlp: a.real("dmlp", c.intermediate_size),
        dattn: a.real("dattn", h * c.head_dim),
        delta: a.real("delta", h),
        dq: a.real("dq", h * c.head_dim),
        dk: a.real("dk", k * c.head_dim),
        dv: a.real("dv", k * c.head_dim),
    }
}
