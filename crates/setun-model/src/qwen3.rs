//! Qwen3, forward and backward, explicitly: the one definition of the architecture.
//!
//! Pre-norm RMSNorm, grouped-query attention with per-head norm of queries and keys
//! before RoPE, SwiGLU, no biases, tied or separate head, as Hugging Face's
//! `Qwen3ForCausalLM`. Dense and ternary models differ only in what a parameter's
//! [`weight`](crate::Parameter::weight) is.

use crate::buffers::{Buffers, LayerBuffers, Purpose};
use crate::dropout::{Site, StepDropout};
use crate::parameters::{Parameter, ParameterUse, Parameters, Scheme};
use crate::rope::RopeTable;
use setun_backend::topk::{Kept, TopK};
use setun_backend::{
    ActBuf, Attention, AttentionBackward, Backend, Buf, CacheStore, CachedAttention, CachedSegment,
    CrossEntropy, Distillation, DraftBlocks, NormRope, Plan, Product, Real, RmsNorm, Segment,
};
use setun_formats::Qwen3Config;
use setun_ternary::Numerics;

/// What a model computes.
#[derive(Clone, Debug)]
pub struct ModelSpec {
    /// Shape and constants.
    pub config: Qwen3Config,
    /// How matrices become ternary; none for a dense model.
    pub scheme: Option<Scheme>,
    /// Arithmetic of the products.
    pub numerics: Numerics,
}

/// Indices of a layer's parameters in canonical order.
const INPUT_NORM: usize = 0;
const Q_PROJ: usize = 1;
const K_PROJ: usize = 2;
const V_PROJ: usize = 3;
const Q_NORM: usize = 4;
const K_NORM: usize = 5;
const O_PROJ: usize = 6;
const POST_NORM: usize = 7;
const GATE_PROJ: usize = 8;
const UP_PROJ: usize = 9;
const DOWN_PROJ: usize = 10;
const PER_LAYER: usize = 11;

/// A model laid out in a plan.
pub struct Qwen3<R: Real> {
    spec: ModelSpec,
    /// Weights and gradients.
    pub parameters: Parameters<R>,
    /// Weight of the squared log-sum-exp in the loss that is learned, see [`CrossEntropy`];
    /// 0 unless set.
    pub z_loss: f64,
    /// Bound of the logits, see [`CrossEntropy`]; 0, none, unless set. Only losses know it.
    pub softcap: f64,
    /// What the passes of a training step leave out; none unless set.
    pub dropout: Option<StepDropout>,
    /// Where a drafter reads hidden states.
    pub(crate) taps: Vec<Tap<R>>,
    pub(crate) buffers: Buffers<R>,
}

/// Hidden states of a layer, rounded for the product that reads them.
#[derive(Clone, Copy)]
pub(crate) struct Tap<R> {
    /// The layer behind which they are taken.
    pub(crate) layer: usize,
    /// `[rows, hidden_size]`
    pub(crate) act: ActBuf<R>,
}

/// A model whose distribution another one learns.
#[derive(Clone, Copy)]
pub struct Teacher<'a, R: Real> {
    /// A model with as large a vocabulary, whose forward pass has seen the same batch.
    pub model: &'a Qwen3<R>,
    /// Share of the divergence in the loss.
    pub weight: f64,
    /// Temperature of the divergence.
    pub temperature: f64,
}

/// Rows of the buffers.
#[derive(Clone, Copy)]
pub(crate) struct Rows {
    pub(crate) first: usize,
    pub(crate) len: usize,
}

impl Rows {
    /// With all rows before them.
    fn with_context(self) -> Self {
        Self {
            first: 0,
            len: self.first + self.len,
        }
    }
}

/// One call of the forward pass.
#[derive(Clone, Copy)]
pub(crate) struct Call<'a, R> {
    /// Rows in use.
    pub(crate) rows: Rows,
    pub(crate) keys: Keys<'a, R>,
}

/// What the rows of a call attend to.
#[derive(Clone, Copy)]
pub(crate) enum Keys<'a, R> {
    /// The call's own rows.
    Own(&'a [Segment]),
    /// A cache, to which the rows are added first.
    Cached(CachedRows<'a>),
    /// The rows before the call's, and its own.
    Draft(DraftKeys<'a, R>),
}

/// Keys of a block drafter in training: the rows before those of the call are a context, of
/// which layers make keys and values and nothing else.
#[derive(Clone, Copy)]
pub(crate) struct DraftKeys<'a, R> {
    /// One run of queries behind the context.
    pub(crate) segments: &'a [Segment],
    /// Which of the context they see.
    pub(crate) blocks: DraftBlocks<'a>,
    /// What all layers read in the rows of the context.
    pub(crate) context: RmsNorm<R>,
    /// Gradient of the context before its norm, `+=`, and of the norm's weight.
    pub(crate) gradients: Option<(Buf<R>, Buf<R>)>,
}

/// Rows of a call that has a cache.
#[derive(Clone, Copy, Debug)]
pub struct CachedRows<'a> {
    /// Slot of the cache for each row.
    pub slots: &'a [u32],
    /// Sequences.
    pub segments: &'a [CachedSegment<'a>],
    /// Rows of earlier calls whose hidden states a drafter has not read yet.
    pub unread: usize,
}

pub(crate) fn rows_of<R>(buf: Buf<R>, rows: Rows, width: usize) -> Buf<R> {
    buf.part(rows.first * width, rows.len * width)
}

pub(crate) fn act_rows<R>(act: ActBuf<R>, rows: Rows, width: usize) -> ActBuf<R> {
    act.rows(rows.first, rows.len, width)
}

impl<'a, R> Call<'a, R> {
    fn own(len: usize, segments: &'a [Segment]) -> Self {
        Self {
            rows: Rows { first: 0, len },
            keys: Keys::Own(segments),
        }
    }

    /// Rows of hidden states that are kept before those of this call.
    fn unread(&self) -> usize {
        match self.keys {
            Keys::Cached(cached) => cached.unread,
            Keys::Own(_) | Keys::Draft(_) => 0,
        }
    }

    pub(crate) fn cached(cached: CachedRows<'a>) -> Self {
        let len = cached.slots.len();
        Self {
            rows: Rows { first: 0, len },
            keys: Keys::Cached(cached),
        }
    }
}

/// `dw += dy * x`, unless the matrix is frozen.
pub(crate) fn weight_gradient<R: Real, B: Backend<Real = R>>(
    b: &mut B,
    p: &Parameter<R>,
    dy: Buf<R>,
    x: ActBuf<R>,
) {
    if let Some(gradient) = p.grad {
        b.linear_dw(dy, x, p.rows, p.cols, gradient);
    }
}

impl<R: Real> Qwen3<R> {
    /// Reserves all memory of the model.
    pub fn reserve(plan: &mut Plan, spec: ModelSpec, purpose: Purpose) -> Self {
        let train = matches!(purpose, Purpose::Train(_));
        let parameters = ParameterUse {
            train,
            ..ParameterUse::default()
        };
        Self::reserve_with(plan, spec, purpose, parameters)
    }

    /// As [`reserve`](Self::reserve), with a say in the memory of the parameters.
    pub fn reserve_with(
        plan: &mut Plan,
        spec: ModelSpec,
        purpose: Purpose,
        parameters: ParameterUse<'_>,
    ) -> Self {
        let parameters = Parameters::reserve(plan, &spec.config, spec.scheme, parameters);
        let buffers = Buffers::reserve(plan, &spec, purpose);
        Self {
            spec,
            parameters,
            z_loss: 0.0,
            softcap: 0.0,
            dropout: None,
            taps: Vec::new(),
            buffers,
        }
    }

    /// What the model computes.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// Most rows of a call.
    pub fn max_rows(&self) -> usize {
        self.buffers.rows
    }

    /// Writes the RoPE table; once, after the memory is there.
    pub fn prepare<B: Backend<Real = R>>(&self, b: &mut B) {
        let c = &self.spec.config;
        let table = RopeTable::new(&c.rope, c.head_dim, self.buffers.positions_len);
        let real = |x: &[f32]| x.iter().map(|&x| R::from_f32(x)).collect::<Vec<R>>();
        b.write(self.buffers.cos, &real(&table.cos));
        b.write(self.buffers.sin, &real(&table.sin));
    }

    /// Writes a batch: tokens, their positions, and targets where the loss is wanted.
    pub fn write_batch<B: Backend<Real = R>>(
        &self,
        b: &mut B,
        ids: &[u32],
        positions: &[u32],
        targets: &[u32],
    ) {
        b.write(self.buffers.ids.part(0, ids.len()), ids);
        b.write(self.buffers.positions.part(0, ids.len()), positions);
        b.write(self.buffers.targets.part(0, targets.len()), targets);
    }

    /// Forward pass of the batch in the buffers: `rows` tokens, attention within
    /// `segments`.
    pub fn forward<B: Backend<Real = R>>(&self, b: &mut B, rows: usize, segments: &[Segment]) {
        self.run(b, Call::own(rows, segments));
    }

    /// As [`forward`](Self::forward), of a model laid out for decoding: the tokens are
    /// added to the cache and attend to what their sequences have there.
    pub fn forward_cached<B: Backend<Real = R>>(&self, b: &mut B, cached: CachedRows<'_>) {
        self.run(b, Call::cached(cached));
    }

    /// Copies slots `(from, to)` of the cache, in every layer, in this order.
    pub fn move_cached<B: Backend<Real = R>>(&self, b: &mut B, moves: &[(u32, u32)]) {
        for &cache in &self.buffers.caches {
            b.cache_move(cache, moves);
        }
    }

    fn run<B: Backend<Real = R>>(&self, b: &mut B, call: Call<'_, R>) {
        let embedding = self.parameters.list[0].weight();
        let ids = rows_of(self.buffers.ids, call.rows, 1);
        let x = self.first_residual(call.rows);
        b.embedding(ids, embedding, x);
        self.drop_out(b, Site::Embedding, x);
        self.run_layers(b, call);
    }

    /// The residual stream before the first layer.
    pub(crate) fn first_residual(&self, rows: Rows) -> Buf<R> {
        rows_of(self.residual(0), rows, self.spec.config.hidden_size)
    }

    /// All layers and the last norm, from the residual stream before the first one.
    pub(crate) fn run_layers<B: Backend<Real = R>>(&self, b: &mut B, call: Call<'_, R>) {
        let (rows, d) = (call.rows, self.spec.config.hidden_size);
        for l in 0..self.spec.config.num_hidden_layers {
            self.layer_forward(b, l, call);
            for tap in self.taps.iter().filter(|tap| tap.layer == l) {
                let x = rows_of(self.residual(l + 1), rows, d);
                let to = tap.act.rows(call.unread(), rows.len, d);
                b.round_activation(x, d, to);
            }
        }
        let y = act_rows(self.buffers.act_head, rows, d);
        b.rms_norm(self.final_norm(rows), y);
    }

    /// Losses of the last forward pass, one for each row; `loss(rows)` reads them. With
    /// `gradient_scale` also the gradients of all parameters, `+=`, of the sum of the
    /// losses times that scale; with a `teacher` of the mix that
    /// [`Distillation`] defines, while the losses stay the cross entropy.
    pub fn loss_and_backward<B: Backend<Real = R>>(
        &self,
        b: &mut B,
        rows: usize,
        segments: &[Segment],
        gradient_scale: Option<f64>,
        teacher: Option<Teacher<'_, R>>,
    ) {
        self.head(b, rows, gradient_scale, teacher);
        if gradient_scale.is_some() {
            let call = Call::own(rows, segments);
            self.backward(b, call);
            if let Some(gradient) = self.parameters.list[0].grad {
                let dx = self.first_gradient(call.rows);
                self.drop_out(b, Site::Embedding, dx);
                b.embedding_backward(rows_of(self.buffers.ids, call.rows, 1), dx, gradient);
            }
        }
    }

    /// Losses of the last [`loss_and_backward`](Self::loss_and_backward).
    pub fn read_losses<B: Backend<Real = R>>(&self, b: &B, losses: &mut [R]) {
        b.read(self.buffers.losses.part(0, losses.len()), losses);
    }

    /// Divergences from the teacher, of the last
    /// [`loss_and_backward`](Self::loss_and_backward) with one.
    pub fn read_divergences<B: Backend<Real = R>>(&self, b: &B, divergences: &mut [R]) {
        b.read(
            self.buffers.divergences.part(0, divergences.len()),
            divergences,
        );
    }

    /// Room for `n` rows of logits.
    pub(crate) fn logits(&self, n: usize) -> Buf<R> {
        self.buffers.logits.part(0, n * self.head_parameter().rows)
    }

    /// Logits of `n` rows from `start` of the last forward pass, `[n, v]`, in a buffer of
    /// the model.
    fn chunk_of_logits<B: Backend<Real = R>>(&self, b: &mut B, start: usize, n: usize) -> Buf<R> {
        let head = self.head_parameter().weight();
        let logits = self.logits(n);
        b.linear(self.buffers.act_head.rows(start, n, head.inp), head, logits);
        logits
    }

    /// Logits of rows `start..` of the last forward pass, `[rows, v]`, a chunk at a time.
    pub fn read_logit_rows<B: Backend<Real = R>>(&self, b: &mut B, start: usize, logits: &mut [R]) {
        let (v, chunk) = (self.head_parameter().rows, self.buffers.head_chunk);
        for (i, logits) in logits.chunks_mut(v * chunk).enumerate() {
            let from = self.chunk_of_logits(b, start + i * chunk, logits.len() / v);
            b.read(from, logits);
        }
    }

    /// The best entries of the logits of rows `start..start + n` of the last forward pass,
    /// with the sums of their exponentials; at most `head_chunk` rows.
    pub fn topk_rows<B: Backend<Real = R>>(
        &self,
        b: &mut B,
        (start, n): (usize, usize),
        wanted: TopK<'_>,
        kept: &mut Kept,
    ) {
        let head = self.head_parameter().weight();
        let x = self.buffers.act_head.rows(start, n, head.inp);
        let logits = self.logits(n);
        b.linear_topk(x, head, logits, wanted, kept);
    }

    /// Logits `[1, v]` of row `row` of the last forward pass.
    pub fn read_logits<B: Backend<Real = R>>(&self, b: &mut B, row: usize, logits: &mut [R]) {
        let head = self.head_parameter().weight();
        let to = self.buffers.logits.part(0, head.out);
        b.linear(self.buffers.act_head.rows(row, 1, head.inp), head, to);
        b.read(to, logits);
    }

    fn residual(&self, l: usize) -> Buf<R> {
        // Without a backward pass two buffers take turns.
        self.buffers.x[if self.buffers.backward.is_some() {
            l
        } else {
            l % 2
        }]
    }

    fn layer_parameter(&self, l: usize, which: usize) -> &Parameter<R> {
        &self.parameters.list[1 + l * PER_LAYER + which]
    }

    fn final_norm_parameter(&self) -> &Parameter<R> {
        &self.parameters.list[1 + self.spec.config.num_hidden_layers * PER_LAYER]
    }

    pub(crate) fn head_parameter(&self) -> &Parameter<R> {
        if self.spec.config.tie_word_embeddings {
            &self.parameters.list[0]
        } else {
            &self.parameters.list[2 + self.spec.config.num_hidden_layers * PER_LAYER]
        }
    }

    fn final_norm(&self, rows: Rows) -> RmsNorm<R> {
        let c = &self.spec.config;
        RmsNorm {
            x: rows_of(self.residual(c.num_hidden_layers), rows, c.hidden_size),
            weight: self.final_norm_parameter().values(),
            inv: rows_of(self.buffers.inv_final, rows, 1),
            width: c.hidden_size,
            eps: c.rms_norm_eps,
        }
    }

    fn layer_norm(&self, l: usize, post: bool, rows: Rows) -> RmsNorm<R> {
        let c = &self.spec.config;
        let s = &self.buffers.layers[l];
        let (x, inv, which) = if post {
            (s.x_mid, s.inv_post, POST_NORM)
        } else {
            (self.residual(l), s.inv_input, INPUT_NORM)
        };
        RmsNorm {
            x: rows_of(x, rows, c.hidden_size),
            weight: self.layer_parameter(l, which).values(),
            inv: rows_of(inv, rows, 1),
            width: c.hidden_size,
            eps: c.rms_norm_eps,
        }
    }

    fn head_norm(&self, l: usize, keys: bool, rows: Rows) -> NormRope<R> {
        let c = &self.spec.config;
        let s = &self.buffers.layers[l];
        let (x, inv, which, heads) = if keys {
            (s.k_pre, s.inv_k, K_NORM, c.num_key_value_heads)
        } else {
            (s.q_pre, s.inv_q, Q_NORM, c.num_attention_heads)
        };
        NormRope {
            norm: RmsNorm {
                x: rows_of(x, rows, heads * c.head_dim),
                weight: self.layer_parameter(l, which).values(),
                inv: rows_of(inv, rows, heads),
                width: c.head_dim,
                eps: c.rms_norm_eps,
            },
            heads,
            cos: self.buffers.cos,
            sin: self.buffers.sin,
            positions: rows_of(self.buffers.positions, rows, 1),
        }
    }

    fn attention<'a>(
        &self,
        s: &LayerBuffers<R>,
        rows: Rows,
        (segments, blocks): (&'a [Segment], Option<DraftBlocks<'a>>),
    ) -> Attention<'a, R> {
        let c = &self.spec.config;
        let width = c.num_attention_heads * c.head_dim;
        Attention {
            q: s.q.rows(rows.first, rows.len, width),
            k: s.k,
            v: s.v,
            out: rows_of(s.attn, rows, width),
            lse: rows_of(s.lse, rows, c.num_attention_heads),
            segments,
            blocks,
            num_heads: c.num_attention_heads,
            num_kv_heads: c.num_key_value_heads,
            head_dim: c.head_dim,
        }
    }

    /// Attention of a call's queries, behind norm and RoPE, to the call's keys.
    fn attend<B: Backend<Real = R>>(&self, b: &mut B, l: usize, call: Call<'_, R>) {
        let c = &self.spec.config;
        let s = &self.buffers.layers[l];
        let qw = c.num_attention_heads * c.head_dim;
        match call.keys {
            Keys::Own(segments) => {
                b.attention(self.attention(s, call.rows, (segments, None)));
            }
            Keys::Draft(draft) => {
                let seen = (draft.segments, Some(draft.blocks));
                b.attention(self.attention(s, call.rows, seen));
            }
            Keys::Cached(cached) => {
                self.store(b, l, cached.slots);
                b.cached_attention(CachedAttention {
                    q: s.q.rows(0, call.rows.len, qw),
                    out: rows_of(s.attn, call.rows, qw),
                    cache: self.buffers.caches[l],
                    segments: cached.segments,
                    num_heads: c.num_attention_heads,
                });
            }
        }
    }

    /// Adds the first rows of keys and values to the cache.
    fn store<B: Backend<Real = R>>(&self, b: &mut B, l: usize, slots: &[u32]) {
        let c = &self.spec.config;
        let (s, kw) = (&self.buffers.layers[l], c.num_key_value_heads * c.head_dim);
        b.cache_store(CacheStore {
            k: s.k.rows(0, slots.len(), kw),
            v: s.v.rows(0, slots.len(), kw),
            slots,
            cache: self.buffers.caches[l],
        });
    }

    /// Adds rows to the cache that are a context only: `context` is what all layers read.
    pub(crate) fn store_context<B: Backend<Real = R>>(
        &self,
        b: &mut B,
        context: RmsNorm<R>,
        slots: &[u32],
    ) {
        let d = self.spec.config.hidden_size;
        for l in 0..self.spec.config.num_hidden_layers {
            let act = self.buffers.layers[l].act_qkv.rows(0, slots.len(), d);
            b.rms_norm(context, act);
            let len = slots.len();
            self.keys_and_values(b, l, Rows { first: 0, len }, None);
            self.store(b, l, slots);
        }
    }

    fn layer_forward<B: Backend<Real = R>>(&self, b: &mut B, l: usize, call: Call<'_, R>) {
        self.attention_forward(b, l, call);
        self.mlp_forward(b, l, call.rows);
    }

    /// `x_mid = x + o_proj(attention(norm(x)))`
    fn attention_forward<B: Backend<Real = R>>(&self, b: &mut B, l: usize, call: Call<'_, R>) {
        let c = &self.spec.config;
        let s = &self.buffers.layers[l];
        let weight = |which| self.layer_parameter(l, which).weight();
        let (rows, d) = (call.rows, c.hidden_size);
        let qw = c.num_attention_heads * c.head_dim;
        let act_qkv = act_rows(s.act_qkv, rows, d);
        b.rms_norm(self.layer_norm(l, false, rows), act_qkv);
        if let Keys::Draft(draft) = call.keys {
            b.rms_norm(draft.context, s.act_qkv.rows(0, rows.first, d));
        }
        let queries = Product {
            weight: weight(Q_PROJ),
            y: rows_of(s.q_pre, rows, qw),
        };
        self.keys_and_values(b, l, rows.with_context(), Some((act_qkv, queries)));
        let q = s.q.rows(rows.first, rows.len, qw);
        b.norm_rope(self.head_norm(l, false, rows), q);
        self.attend(b, l, call);
        let act_o = act_rows(s.act_o, rows, qw);
        b.round_activation(rows_of(s.attn, rows, qw), qw, act_o);
        let x_mid = rows_of(s.x_mid, rows, d);
        b.linear(act_o, weight(O_PROJ), x_mid);
        self.drop_out(b, Site::Attention(l), x_mid);
        b.add(rows_of(self.residual(l), rows, d), x_mid);
    }

    /// Keys, behind norm and RoPE, and values of a layer's normed input; and `queries`
    /// before norm and RoPE, which are of the same input or of its last rows.
    fn keys_and_values<B: Backend<Real = R>>(
        &self,
        b: &mut B,
        l: usize,
        rows: Rows,
        queries: Option<(ActBuf<R>, Product<R>)>,
    ) {
        let c = &self.spec.config;
        let s = &self.buffers.layers[l];
        let weight = |which| self.layer_parameter(l, which).weight();
        let kw = c.num_key_value_heads * c.head_dim;
        let act_qkv = act_rows(s.act_qkv, rows, c.hidden_size);
        let v_pre = rows_of(self.buffers.v_pre, rows, kw);
        let keys = Product {
            weight: weight(K_PROJ),
            y: rows_of(s.k_pre, rows, kw),
        };
        let values = Product {
            weight: weight(V_PROJ),
            y: v_pre,
        };
        match queries {
            Some((_, queries)) if queries.y.len() == rows.len * queries.weight.out => {
                b.linears(act_qkv, &[queries, keys, values]);
            }
            Some((act, queries)) => {
                b.linear(act, queries.weight, queries.y);
                b.linears(act_qkv, &[keys, values]);
            }
            None => b.linears(act_qkv, &[keys, values]),
        }
        b.norm_rope(
            self.head_norm(l, true, rows),
            s.k.rows(rows.first, rows.len, kw),
        );
        b.round_attention(v_pre, s.v.rows(rows.first, rows.len, kw));
    }

    /// `x = x_mid + down_proj(silu(gate_proj(n)) * up_proj(n))`, `n = norm(x_mid)`
    fn mlp_forward<B: Backend<Real = R>>(&self, b: &mut B, l: usize, rows: Rows) {
        let c = &self.spec.config;
        let s = &self.buffers.layers[l];
        let weight = |which| self.layer_parameter(l, which).weight();
        let (d, f) = (c.hidden_size, c.intermediate_size);
        let act_mlp = act_rows(s.act_mlp, rows, d);
        b.rms_norm(self.layer_norm(l, true, rows), act_mlp);
        let (gate, up) = (rows_of(s.gate, rows, f), rows_of(s.up, rows, f));
        let products = [(GATE_PROJ, gate), (UP_PROJ, up)].map(|(which, y)| Product {
            weight: weight(which),
            y,
        });
        b.linears(act_mlp, &products);
        let act_down = act_rows(s.act_down, rows, f);
        b.swiglu(gate, up, f, act_down);
        let next = rows_of(self.residual(l + 1), rows, d);
        b.linear(act_down, weight(DOWN_PROJ), next);
        self.drop_out(b, Site::Mlp(l), next);
        b.add(rows_of(s.x_mid, rows, d), next);
    }

    /// Cross entropy fused with the head, a chunk of rows at a time: the full logits
    /// never exist. Leaves the gradient of the normed residual stream in `dnorm`.
    fn head<B: Backend<Real = R>>(
        &self,
        b: &mut B,
        rows: usize,
        gradient_scale: Option<f64>,
        teacher: Option<Teacher<'_, R>>,
    ) {
        let parameter = self.head_parameter();
        let weight = parameter.weight();
        let d = weight.inp;
        let chunk = self.buffers.head_chunk;
        for start in (0..rows).step_by(chunk) {
            let n = chunk.min(rows - start);
            let act = self.buffers.act_head.rows(start, n, d);
            let logits = self.chunk_of_logits(b, start, n);
            let student = CrossEntropy {
                logits,
                targets: self.buffers.targets.part(start, n),
                losses: self.buffers.losses.part(start, n),
                gradient_scale,
                z_loss: self.z_loss,
                softcap: self.softcap,
            };
            match teacher {
                None => b.cross_entropy(student),
                Some(t) => {
                    let teacher = t.model.chunk_of_logits(b, start, n);
                    b.distill(Distillation {
                        student,
                        teacher,
                        divergences: self.buffers.divergences.part(start, n),
                        weight: t.weight,
                        temperature: t.temperature,
                    });
                }
            }
            if gradient_scale.is_some() {
                let dnorm = self.backward_buffers().dnorm.part(start * d, n * d);
                b.linear_dx(logits, weight, dnorm, self.exact(), false);
                weight_gradient(b, parameter, logits, act);
            }
        }
    }

    pub(crate) fn exact(&self) -> bool {
        self.spec.numerics == Numerics::F32
    }

    pub(crate) fn backward_buffers(&self) -> crate::buffers::BackwardBuffers<R> {
        self.buffers
            .backward
            .expect("a model that is trained has these buffers")
    }

    /// Gradient of the residual stream, before the first layer once a backward pass is done.
    pub(crate) fn first_gradient(&self, rows: Rows) -> Buf<R> {
        let d = self.spec.config.hidden_size;
        rows_of(self.backward_buffers().dx, rows, d)
    }

    /// From the gradient of the normed residual stream in `dnorm` to that of the residual
    /// stream before the first layer.
    pub(crate) fn backward<B: Backend<Real = R>>(&self, b: &mut B, call: Call<'_, R>) {
        let c = &self.spec.config;
        let g = self.backward_buffers();
        let (rows, d) = (call.rows, c.hidden_size);
        let (dx, dnorm) = (rows_of(g.dx, rows, d), rows_of(g.dnorm, rows, d));
        b.zero(dx);
        let dweight = self.final_norm_parameter().gradient();
        b.rms_norm_backward(self.final_norm(rows), dnorm, dx, dweight);
        for l in (0..c.num_hidden_layers).rev() {
            // Layers that share their buffers have only the last one's values there.
            if self.buffers.shared && l + 1 < c.num_hidden_layers {
                self.layer_forward(b, l, call);
            }
            self.mlp_backward(b, l, rows);
            self.attention_backward(b, l, call);
        }
    }

    fn mlp_backward<B: Backend<Real = R>>(&self, b: &mut B, l: usize, rows: Rows) {
        let c = &self.spec.config;
        let (s, g) = (&self.buffers.layers[l], self.backward_buffers());
        let (d, f) = (c.hidden_size, c.intermediate_size);
        let p = |which| self.layer_parameter(l, which);
        let (dx, dnorm) = (rows_of(g.dx, rows, d), rows_of(g.dnorm, rows, d));
        let dmlp = rows_of(g.dmlp, rows, f);
        let dy = self.added_gradient(b, Site::Mlp(l), rows);
        weight_gradient(b, p(DOWN_PROJ), dy, act_rows(s.act_down, rows, f));
        b.linear_dx(dy, p(DOWN_PROJ).weight(), dmlp, self.exact(), false);
        let (gate, up) = (rows_of(s.gate, rows, f), rows_of(s.up, rows, f));
        b.swiglu_backward(dmlp, gate, up);
        let act_mlp = act_rows(s.act_mlp, rows, d);
        weight_gradient(b, p(GATE_PROJ), gate, act_mlp);
        weight_gradient(b, p(UP_PROJ), up, act_mlp);
        b.linear_dx(gate, p(GATE_PROJ).weight(), dnorm, self.exact(), false);
        b.linear_dx(up, p(UP_PROJ).weight(), dnorm, self.exact(), true);
        b.rms_norm_backward(
            self.layer_norm(l, true, rows),
            dnorm,
            dx,
            p(POST_NORM).gradient(),
        );
    }

    fn attention_backward<B: Backend<Real = R>>(&self, b: &mut B, l: usize, call: Call<'_, R>) {
        let c = &self.spec.config;
        let (s, g) = (&self.buffers.layers[l], self.backward_buffers());
        let (rows, d) = (call.rows, c.hidden_size);
        let (qw, kw) = (
            c.num_attention_heads * c.head_dim,
            c.num_key_value_heads * c.head_dim,
        );
        let p = |which| self.layer_parameter(l, which);
        let (dx, dnorm) = (rows_of(g.dx, rows, d), rows_of(g.dnorm, rows, d));
        let (dattn, dq) = (rows_of(g.dattn, rows, qw), rows_of(g.dq, rows, qw));
        let keys = rows.with_context();
        let (dk, dv) = (rows_of(g.dk, keys, kw), rows_of(g.dv, keys, kw));
        let dy = self.added_gradient(b, Site::Attention(l), rows);
        weight_gradient(b, p(O_PROJ), dy, act_rows(s.act_o, rows, qw));
        b.linear_dx(dy, p(O_PROJ).weight(), dattn, self.exact(), false);
        let seen = match call.keys {
            Keys::Own(segments) => (segments, None),
            Keys::Draft(draft) => (draft.segments, Some(draft.blocks)),
            Keys::Cached(_) => unreachable!("a backward pass has no cache"),
        };
        b.attention_backward(AttentionBackward {
            forward: self.attention(s, rows, seen),
            dout: dattn,
            delta: rows_of(g.delta, rows, c.num_attention_heads),
            dq,
            dk,
            dv,
        });
        b.norm_rope_backward(self.head_norm(l, false, rows), dq, p(Q_NORM).gradient());
        b.norm_rope_backward(self.head_norm(l, true, keys), dk, p(K_NORM).gradient());
        let context = g.dnorm.part(0, rows.first * d);
        b.zero(context);
        let terms = [(dq, Q_PROJ, rows), (dk, K_PROJ, keys), (dv, V_PROJ, keys)];
        for (i, (dy, which, rows)) in terms.into_iter().enumerate() {
            weight_gradient(b, p(which), dy, act_rows(s.act_qkv, rows, d));
            let dnorm = rows_of(g.dnorm, rows, d);
            b.linear_dx(dy, p(which).weight(), dnorm, self.exact(), i > 0);
        }
        if let Keys::Draft(draft) = call.keys
            && let Some((dcontext, dweight)) = draft.gradients
        {
            b.rms_norm_backward(draft.context, context, dcontext, dweight);
        }
        b.rms_norm_backward(
            self.layer_norm(l, false, rows),
            dnorm,
            dx,
            p(INPUT_NORM).gradient(),
        );
    }
}
