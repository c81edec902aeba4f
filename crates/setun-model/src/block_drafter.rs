//! A block drafter in the manner of `DFlash`: guesses the tokens behind a text in one pass.
//!
//! Qwen3 layers of the target's width read a block of rows: the last token of the text, the
//! anchor, and `block_size - 1` masks, each of which becomes a guess. A block's rows see
//! each other in both directions, and the text before the anchor as *context*: hidden states
//! of some of the target's layers, summed by a product each (`fc`), normed (`hidden_norm`),
//! and made into keys and values by every layer's own projections. Embedding and head are
//! the target's.
//!
//! `DFlash` puts the states side by side and multiplies once; a sum of products is the same
//! map, and needs no copy.

use crate::buffers::{Purpose, activation};
use crate::parameters::{Parameter, ParameterUse, Scheme};
use crate::qwen3::{
    CachedRows, Call, DraftKeys, Keys, ModelSpec, Qwen3, Rows, Tap, act_rows, rows_of,
    weight_gradient,
};
use setun_backend::topk::{Kept, TopK};
use setun_backend::{
    Backend, Buf, Category, CrossEntropy, DraftBlocks, Plan, Real, RmsNorm, Segment, WeightBuf,
    WeightData,
};
use setun_formats::{DrafterHeader, ParameterInfo, drafter_parameters};
use setun_ternary::Numerics;

/// What a drafter computes.
#[derive(Clone, Debug)]
pub struct DrafterSpec {
    /// Its layers: widths, rope and constants of the target, a vocabulary of one, the mask.
    pub model: ModelSpec,
    /// Rows of a block: the anchor and the guesses.
    pub block_size: usize,
    /// Layers of the target, counted from 0, behind which hidden states are read.
    pub target_layer_ids: Vec<usize>,
}

impl DrafterSpec {
    /// What the file of a drafter computes beside a target that runs in `numerics`.
    pub fn new(header: &DrafterHeader, numerics: Numerics) -> Self {
        Self {
            model: ModelSpec {
                config: header.config.clone(),
                scheme: Some(Scheme {
                    group_size: header.ternary.group_size,
                    scale_rule: header.ternary.scale_rule,
                }),
                numerics,
            },
            block_size: header.block_size,
            target_layer_ids: header.target_layer_ids.clone(),
        }
    }

    /// Every parameter in canonical order: those of the layers, then what makes the context.
    pub fn parameters(&self) -> Vec<ParameterInfo> {
        drafter_parameters(&self.model.config, self.target_layer_ids.len())
    }
}

/// Blocks of one text, for training.
#[derive(Clone, Copy, Debug)]
pub struct DraftBatch<'a> {
    /// Tokens of the text, which the target's last forward pass has seen.
    pub context: usize,
    /// Position of each block's anchor, below `context`; ascending.
    pub anchors: &'a [u32],
    /// The tokens there.
    pub tokens: &'a [u32],
    /// `[anchors, block_size]`: what each row is to say; ignored where that is
    /// [`IGNORE_TARGET`](setun_backend::ops::IGNORE_TARGET), as it must be for anchors.
    pub targets: &'a [u32],
}

/// A drafter laid out in a plan.
pub struct BlockDrafter<R: Real> {
    /// Its layers; the parameters are all of the drafter's.
    pub body: Qwen3<R>,
    block_size: usize,
    taps: Vec<Tap<R>>,
    /// Most rows of context.
    context: usize,
    /// The context before its norm `[context, d]`.
    states: Buf<R>,
    /// One product of it `[context, d]`.
    term: Buf<R>,
    /// `[context]`
    inv_states: Buf<R>,
    /// Embedding of each anchor, and of the mask behind them `[blocks + 1, d]`.
    embedded: Buf<R>,
    /// Ids of anchors, and of the mask `[blocks + 1]`.
    ids: Buf<u32>,
    /// Row of `embedded` for each row `[rows]`.
    gather: Buf<u32>,
    /// In training: gradients of `states` and `embedded`.
    gradients: Option<(Buf<R>, Buf<R>)>,
}

impl<R: Real> BlockDrafter<R> {
    /// Reserves the memory of a drafter for `target`, which notes from now on what the
    /// drafter reads. In training, `purpose` has room for the context and all blocks behind
    /// it; in decoding for the rows of the target's calls.
    pub fn reserve(
        plan: &mut Plan,
        spec: &DrafterSpec,
        (purpose, parameters): (Purpose, ParameterUse<'_>),
        target: &mut Qwen3<R>,
    ) -> Self {
        let d = spec.model.config.hidden_size;
        let mut body = Qwen3::reserve_with(plan, spec.model.clone(), purpose, parameters);
        let extra = spec.parameters().split_off(body.parameters.list.len());
        body.parameters.extend(plan, extra, parameters);
        let context = target.max_rows();
        let train = matches!(purpose, Purpose::Train(_));
        let rows = body.max_rows();
        let blocks = rows / spec.block_size + 1;
        let mut taps = Vec::new();
        for (i, &layer) in spec.target_layer_ids.iter().enumerate() {
            let name = format!("target.{i}");
            let act = activation(plan, &spec.model, &name, context, d);
            taps.push(Tap { layer, act });
        }
        target.taps.extend(taps.iter().copied());
        let mut real = |name: &str, len| plan.alloc(Category::Activations, name, len);
        let gradients = train.then(|| {
            (
                real("d states", context * d),
                real("d embedded", (blocks + 1) * d),
            )
        });
        Self {
            body,
            block_size: spec.block_size,
            taps,
            context,
            states: real("states", context * d),
            term: real("states term", context * d),
            inv_states: real("inv_states", context),
            embedded: real("embedded", (blocks + 1) * d),
            gradients,
            ids: plan.alloc(Category::Activations, "anchor ids", blocks + 1),
            gather: plan.alloc(Category::Activations, "gather", rows),
        }
    }

    /// Rows of a block.
    pub fn block_size(&self) -> usize {
        self.block_size
    }

    /// Writes the RoPE table; once, after the memory is there.
    pub fn prepare<B: Backend<Real = R>>(&self, b: &mut B) {
        self.body.prepare(b);
    }

    fn width(&self) -> usize {
        self.body.spec().config.hidden_size
    }

    /// The products of the target's states and the norm behind them: the last parameters.
    fn fc(&self, i: usize) -> &Parameter<R> {
        let list = &self.body.parameters.list;
        &list[list.len() - 1 - self.taps.len() + i]
    }

    fn hidden_norm(&self) -> &Parameter<R> {
        let list = &self.body.parameters.list;
        &list[list.len() - 1]
    }

    fn context_norm(&self, rows: usize) -> RmsNorm<R> {
        RmsNorm {
            x: self.states.part(0, rows * self.width()),
            weight: self.hidden_norm().values(),
            inv: self.inv_states.part(0, rows),
            width: self.width(),
            eps: self.body.spec().config.rms_norm_eps,
        }
    }

    /// The sum of products of the target's hidden states.
    fn read_states<B: Backend<Real = R>>(&self, b: &mut B, rows: usize) {
        let d = self.width();
        let states = self.states.part(0, rows * d);
        let term = self.term.part(0, rows * d);
        for (i, tap) in self.taps.iter().enumerate() {
            let to = if i == 0 { states } else { term };
            b.linear(tap.act.rows(0, rows, d), self.fc(i).weight(), to);
            if i > 0 {
                b.add(term, states);
            }
        }
    }

    /// Writes the residual stream of blocks: anchors from the target's embedding, masks.
    fn embed<B: Backend<Real = R>>(
        &self,
        b: &mut B,
        target: &Qwen3<R>,
        anchors: &[u32],
        to: Buf<R>,
    ) {
        let (d, n) = (self.width(), anchors.len());
        b.write(self.ids.part(0, n), anchors);
        b.write(self.ids.part(n, 1), &[0]);
        let rows: Vec<u32> = (0..n * self.block_size)
            .map(|row| match row % self.block_size {
                0 => (row / self.block_size) as u32,
                _ => n as u32,
            })
            .collect();
        let gather = self.gather.part(0, rows.len());
        b.write(gather, &rows);
        let embedding = target.parameters.list[0].weight();
        b.embedding(self.ids.part(0, n), embedding, self.embedded.part(0, n * d));
        let mask = self.body.parameters.list[0].weight();
        b.embedding(self.ids.part(n, 1), mask, self.embedded.part(n * d, d));
        let embedded = WeightBuf {
            out: n + 1,
            inp: d,
            data: WeightData::Dense(self.embedded.part(0, (n + 1) * d)),
        };
        b.embedding(gather, embedded, to);
    }

    /// Forward pass, losses of all rows, and with `gradient_scale` the gradients of all
    /// parameters, `+=`, of the sum of the losses times that scale. The target's last call
    /// was [`Qwen3::forward`] of the text.
    pub fn train<B: Backend<Real = R>>(
        &self,
        b: &mut B,
        target: &Qwen3<R>,
        batch: DraftBatch<'_>,
        gradient_scale: Option<f64>,
    ) {
        let rows = Rows {
            first: batch.context,
            len: batch.targets.len(),
        };
        assert!(batch.context <= self.context && rows.first + rows.len <= self.body.max_rows());
        let size = self.block_size as u32;
        let of_block = batch.anchors.iter().flat_map(|&a| a..a + size);
        let positions: Vec<u32> = (0..batch.context as u32).chain(of_block).collect();
        b.write(
            self.body.buffers.positions.part(0, positions.len()),
            &positions,
        );
        b.write(rows_of(self.body.buffers.targets, rows, 1), batch.targets);
        self.read_states(b, batch.context);
        self.embed(b, target, batch.tokens, self.body.first_residual(rows));
        let segments = [Segment {
            q_start: 0,
            q_len: rows.len,
            kv_start: 0,
            kv_len: rows.first + rows.len,
        }];
        let hidden_norm = self.hidden_norm().grad;
        let dstates = self.gradients.map(|(dstates, _)| dstates);
        let dstates = dstates.map(|d| d.part(0, batch.context * self.width()));
        let call = Call {
            rows,
            keys: Keys::Draft(DraftKeys {
                segments: &segments,
                blocks: DraftBlocks {
                    size: self.block_size,
                    anchors: batch.anchors,
                },
                context: self.context_norm(batch.context),
                gradients: dstates.zip(hidden_norm),
            }),
        };
        self.body.run_layers(b, call);
        self.losses(b, target, rows, gradient_scale);
        if gradient_scale.is_some() {
            self.backward(b, call, batch.anchors.len());
        }
    }

    /// Cross entropy of the rows behind the target's head, a chunk at a time; the gradient
    /// of the normed residual stream goes to `dnorm`.
    fn losses<B: Backend<Real = R>>(
        &self,
        b: &mut B,
        target: &Qwen3<R>,
        rows: Rows,
        gradient_scale: Option<f64>,
    ) {
        let head = target.head_parameter().weight();
        let (d, chunk) = (head.inp, target.buffers.head_chunk);
        for start in (0..rows.len).step_by(chunk) {
            let part = Rows {
                first: rows.first + start,
                len: chunk.min(rows.len - start),
            };
            let logits = target.logits(part.len);
            b.linear(act_rows(self.body.buffers.act_head, part, d), head, logits);
            b.cross_entropy(CrossEntropy {
                logits,
                targets: rows_of(self.body.buffers.targets, part, 1),
                losses: rows_of(self.body.buffers.losses, part, 1),
                gradient_scale,
                z_loss: 0.0,
                softcap: 0.0,
            });
            if gradient_scale.is_some() {
                let dnorm = rows_of(self.body.backward_buffers().dnorm, part, d);
                b.linear_dx(logits, head, dnorm, self.body.exact(), false);
            }
        }
    }

    fn backward<B: Backend<Real = R>>(&self, b: &mut B, call: Call<'_, R>, blocks: usize) {
        let d = self.width();
        let context = call.rows.first;
        let (dstates, dembedded) = self.gradients.expect("a drafter that is trained");
        let dstates = dstates.part(0, context * d);
        b.zero(dstates);
        self.body.backward(b, call);
        for (i, tap) in self.taps.iter().enumerate() {
            weight_gradient(b, self.fc(i), dstates, tap.act.rows(0, context, d));
        }
        let Some(mask) = self.body.parameters.list[0].grad else {
            return;
        };
        let dembedded = dembedded.part(0, (blocks + 1) * d);
        b.zero(dembedded);
        let gather = self.gather.part(0, call.rows.len);
        b.embedding_backward(gather, self.body.first_gradient(call.rows), dembedded);
        b.add(dembedded.part(blocks * d, d), mask);
    }

    /// Losses of the rows of the last [`train`](Self::train), `[anchors, block_size]`.
    pub fn read_losses<B: Backend<Real = R>>(&self, b: &B, context: usize, losses: &mut [R]) {
        let len = losses.len();
        let rows = Rows {
            first: context,
            len,
        };
        b.read(rows_of(self.body.buffers.losses, rows, 1), losses);
    }

    /// Most rows of the target's calls whose hidden states can wait to be read.
    pub fn max_unread(&self) -> usize {
        self.context
    }

    /// Adds rows of the target's last calls to the drafter's cache: `slots` and `positions` are
    /// those of the target's rows, from the call on in which [`CachedRows::unread`] was 0.
    pub fn absorb<B: Backend<Real = R>>(&self, b: &mut B, slots: &[u32], positions: &[u32]) {
        let rows = slots.len();
        b.write(self.body.buffers.positions.part(0, rows), positions);
        self.read_states(b, rows);
        self.body.store_context(b, self.context_norm(rows), slots);
    }

    /// Guesses behind `anchor`, which is at `position`: for each of the first masks the `k`
    /// best entries of its logits. `cached` has the rows of the block, each of which sees all of
    /// them.
    pub fn draft<B: Backend<Real = R>>(
        &self,
        b: &mut B,
        target: &Qwen3<R>,
        (anchor, position): (u32, u32),
        cached: CachedRows<'_>,
        (guesses, k): (usize, usize),
        kept: &mut Kept,
    ) {
        let call = Call::cached(cached);
        let rows = call.rows;
        let positions: Vec<u32> = (position..).take(rows.len).collect();
        b.write(rows_of(self.body.buffers.positions, rows, 1), &positions);
        self.embed(b, target, &[anchor], self.body.first_residual(rows));
        self.body.run_layers(b, call);
        let head = target.head_parameter().weight();
        let masks = Rows {
            first: 1,
            len: guesses.min(rows.len - 1),
        };
        let wanted = TopK {
            k,
            shaping: &[],
            occurred: &[],
        };
        let x = act_rows(self.body.buffers.act_head, masks, head.inp);
        b.linear_topk(x, head, target.logits(masks.len), wanted, kept);
    }

    /// Copies slots `(from, to)` of the cache, in this order.
    pub fn move_cached<B: Backend<Real = R>>(&self, b: &mut B, moves: &[(u32, u32)]) {
        self.body.move_cached(b, moves);
    }
}
