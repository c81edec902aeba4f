//! Every operation of the f32 backend once, in every numerics mode, with sizes beside
//! tiles and grains, so that the work is split in many ways.
#![allow(dead_code)] // Not every test looks at the results.

use crate::rig::{Rig, numbers, scales, trits};
use half::bf16;
use setun_backend::{
    ActBuf, AdamW, Attention, AttentionBackward, AttnBuf, Backend, Buf, CrossEntropy, Distillation,
    Dropout, Host, LayerNorm, LayerNormBackward, Limits, NormRope, RmsNorm, Segment, StoredBuf,
    TernaryBuf, WeightBuf, WeightData,
};
use setun_ternary::ScaleRule;

const ROWS: usize = 150;
const WIDTH: usize = 76;
/// Width of the other side of a weight, and size of the vocabulary. No number of threads
/// divides it.
const OUT: usize = 301;
const GROUP: usize = 32;
const NUM_HEADS: usize = 4;
const NUM_KV_HEADS: usize = 2;
const HEAD_DIM: usize = 18;
const POSITIONS: usize = 40;
/// Values of a work buffer: enough for every operand, and several tasks of operations
/// without rows.
const LEN: usize = 50_001;

/// What these operations need.
pub const LIMITS: Limits = Limits {
    width: OUT,
    head_dim: HEAD_DIM,
    group_size: GROUP,
};

/// A result of an operation.
#[derive(Clone, Copy)]
pub enum Seen {
    /// f32 values.
    F32(Buf<f32>),
    /// bf16 values.
    Bf16(Buf<bf16>),
    /// i8 values.
    I8(Buf<i8>),
    /// A number.
    Number(f64),
}

/// Called after each operation with its name, its mode and its results.
pub type Observer<'a> = dyn FnMut(&'static str, &'static str, &[Seen], &Host<f32>) + 'a;

/// The buffers of all operations.
pub struct EveryOp {
    acts: [(&'static str, ActBuf<f32>); 3],
    attentions: [(&'static str, [AttnBuf<f32>; 3]); 2],
    weights: [(&'static str, WeightBuf<f32>); 2],
    projected: TernaryBuf,
    /// Moments of bf16.
    moments: [Buf<bf16>; 2],
    ids: Buf<u32>,
    positions: Buf<u32>,
    /// What the work buffers begin each operation with.
    source: [Buf<f32>; 4],
    work: [Buf<f32>; 4],
}

impl EveryOp {
    /// Adds the buffers to a rig.
    pub fn new(rig: &mut Rig<f32>) -> Self {
        let groups = WIDTH.div_ceil(GROUP);
        let ternary = TernaryBuf {
            trits: rig.put(&trits(1, OUT * WIDTH)),
            scales: rig.put(&scales(2, OUT * groups)),
            group_size: GROUP,
        };
        let weight = |data| WeightBuf {
            out: OUT,
            inp: WIDTH,
            data,
        };
        let int8 = ActBuf::Int8 {
            q: rig.room(ROWS * WIDTH),
            scales: rig.room(ROWS * groups),
            group_size: GROUP,
        };
        let mut ids = numbers(4, ROWS, OUT as u32);
        // The first and the last row of a matrix, too.
        ids[..2].copy_from_slice(&[0, OUT as u32 - 1]);
        let sizes = [NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS].map(|n| ROWS * n * HEAD_DIM);
        Self {
            acts: [
                ("f32", ActBuf::Real(rig.room(ROWS * WIDTH))),
                ("bf16", ActBuf::Bf16(rig.room(ROWS * WIDTH))),
                ("int8", int8),
            ],
            attentions: [
                ("f32", sizes.map(|n| AttnBuf::Real(rig.room(n)))),
                ("bf16", sizes.map(|n| AttnBuf::Bf16(rig.room(n)))),
            ],
            weights: [
                (
                    "dense",
                    weight(WeightData::Dense(rig.random(3, OUT * WIDTH))),
                ),
                ("ternary", weight(WeightData::Ternary(ternary))),
            ],
            projected: TernaryBuf {
                trits: rig.room(OUT * WIDTH),
                scales: rig.room(OUT * groups),
                group_size: GROUP,
            },
            moments: [(); 2].map(|()| rig.room(LEN)),
            ids: rig.put(&ids),
            positions: rig.put(&numbers(5, ROWS, POSITIONS as u32)),
            source: [6, 7, 8, 9].map(|stream| rig.random(stream, LEN)),
            work: [(); 4].map(|()| rig.room(LEN)),
        }
    }

    /// Runs every operation; the same work each time.
    pub fn run(&self, host: &mut Host<f32>, after: &mut Observer<'_>) {
        self.norms(host, after);
        self.layer_norms(host, after);
        self.rotations(host, after);
        self.products(host, after);
        self.input_gradients(host, after);
        self.attention(host, after);
        self.embeddings(host, after);
        self.pointwise(host, after);
        self.updates(host, after);
    }

    /// The work buffers, as they are before every operation.
    fn fresh(&self, host: &mut Host<f32>) -> [Buf<f32>; 4] {
        for (from, to) in self.source.into_iter().zip(self.work) {
            host.copy(from, to);
        }
        self.work
    }

    fn norms(&self, host: &mut Host<f32>, after: &mut Observer<'_>) {
        let [a, b, c, d] = self.fresh(host);
        let norm = RmsNorm {
            x: a.part(0, ROWS * WIDTH),
            weight: b.part(0, WIDTH),
            inv: c.part(0, ROWS),
            width: WIDTH,
            eps: 1e-6,
        };
        for (mode, y) in self.acts {
            host.rms_norm(norm, y);
            after("rms_norm", mode, &[Seen::F32(norm.inv)], host);
            after("rms_norm", mode, &seen_act(y), host);
        }
        let dy = d.part(0, ROWS * WIDTH);
        let (dx, dweight) = (d.part(ROWS * WIDTH, ROWS * WIDTH), b.part(WIDTH, WIDTH));
        host.rms_norm_backward(norm, dy, dx, dweight);
        let results = [Seen::F32(dx), Seen::F32(dweight)];
        after("rms_norm_backward", "", &results, host);
    }

    fn layer_norms(&self, host: &mut Host<f32>, after: &mut Observer<'_>) {
        let [a, b, c, d] = self.fresh(host);
        let op = LayerNorm {
            x: StoredBuf::Real(a.part(0, ROWS * WIDTH)),
            gamma: b.part(0, WIDTH),
            beta: b.part(WIDTH, WIDTH),
            center: c.part(0, ROWS),
            rest: c.part(ROWS, ROWS),
            inv: c.part(2 * ROWS, ROWS),
            width: WIDTH,
            eps: 1e-5,
        };
        for (mode, y) in self.acts {
            host.layer_norm(op, y);
            let kept = [op.center, op.rest, op.inv].map(Seen::F32);
            after("layer_norm", mode, &kept, host);
            after("layer_norm", mode, &seen_act(y), host);
        }
        let backward = LayerNormBackward {
            forward: op,
            dy: d.part(0, ROWS * WIDTH),
            dx: d.part(ROWS * WIDTH, ROWS * WIDTH),
            accumulate: true,
            dgamma: b.part(2 * WIDTH, WIDTH),
            dbeta: b.part(3 * WIDTH, WIDTH),
            partial: c.part(3 * ROWS, LayerNormBackward::<f32>::partial_len(ROWS, WIDTH)),
        };
        host.layer_norm_backward(backward);
        let results = [backward.dx, backward.dgamma, backward.dbeta].map(Seen::F32);
        after("layer_norm_backward", "", &results, host);
    }

    fn rotations(&self, host: &mut Host<f32>, after: &mut Observer<'_>) {
        let [a, b, c, d] = self.fresh(host);
        let (rows, half) = (ROWS * NUM_HEADS, HEAD_DIM / 2);
        let op = NormRope {
            norm: RmsNorm {
                x: a.part(0, rows * HEAD_DIM),
                weight: b.part(0, HEAD_DIM),
                inv: c.part(0, rows),
                width: HEAD_DIM,
                eps: 1e-6,
            },
            heads: NUM_HEADS,
            cos: b.part(HEAD_DIM, POSITIONS * half),
            sin: b.part(HEAD_DIM + POSITIONS * half, POSITIONS * half),
            positions: self.positions,
        };
        for (mode, [y, _, _]) in self.attentions {
            host.norm_rope(op, y);
            after(
                "norm_rope",
                mode,
                &[Seen::F32(op.norm.inv), seen_attn(y)],
                host,
            );
        }
        let (dx, dweight) = (d.part(0, rows * HEAD_DIM), c.part(rows, HEAD_DIM));
        host.norm_rope_backward(op, dx, dweight);
        let results = [Seen::F32(dx), Seen::F32(dweight)];
        after("norm_rope_backward", "", &results, host);
    }

    fn products(&self, host: &mut Host<f32>, after: &mut Observer<'_>) {
        for (mode, x) in self.acts {
            let [a, b, c, d] = self.fresh(host);
            host.round_activation(a.part(0, ROWS * WIDTH), WIDTH, x);
            after("round_activation", mode, &seen_act(x), host);
            let y = d.part(0, ROWS * OUT);
            for (kind, w) in self.weights {
                if (kind, mode) != ("dense", "int8") {
                    host.linear(x, w, y);
                    after("linear", mode, &[Seen::F32(y)], host);
                }
            }
            let dw = c.part(0, OUT * WIDTH);
            host.linear_dw(b.part(0, ROWS * OUT), x, OUT, WIDTH, dw);
            after("linear_dw", mode, &[Seen::F32(dw)], host);
        }
    }

    fn input_gradients(&self, host: &mut Host<f32>, after: &mut Observer<'_>) {
        for (_, w) in self.weights {
            for (mode, numerics_f32) in [("f32", true), ("bf16", false)] {
                for accumulate in [false, true] {
                    let [a, b, _, _] = self.fresh(host);
                    let (dy, dx) = (a.part(0, ROWS * OUT), b.part(0, ROWS * WIDTH));
                    host.linear_dx(dy, w, dx, numerics_f32, accumulate);
                    after("linear_dx", mode, &[Seen::F32(dx)], host);
                }
            }
        }
    }

    fn attention(&self, host: &mut Host<f32>, after: &mut Observer<'_>) {
        let segments = [
            Segment::own(0, 71),
            Segment::own(71, 1),
            Segment::own(72, 78),
        ];
        let (query, key) = (NUM_HEADS * HEAD_DIM, NUM_KV_HEADS * HEAD_DIM);
        for (mode, [q, k, v]) in self.attentions {
            let [a, b, c, d] = self.fresh(host);
            host.round_attention(a.part(0, ROWS * query), q);
            host.round_attention(b.part(0, ROWS * key), k);
            host.round_attention(c.part(0, ROWS * key), v);
            after("round_attention", mode, &[q, k, v].map(seen_attn), host);
            let forward = Attention {
                q,
                k,
                v,
                out: d.part(0, ROWS * query),
                lse: d.part(ROWS * query, ROWS * NUM_HEADS),
                segments: &segments,
                blocks: None,
                num_heads: NUM_HEADS,
                num_kv_heads: NUM_KV_HEADS,
                head_dim: HEAD_DIM,
            };
            host.attention(forward);
            let results = [Seen::F32(forward.out), Seen::F32(forward.lse)];
            after("attention", mode, &results, host);
            let backward = AttentionBackward {
                forward,
                dout: a.part(0, ROWS * query),
                delta: b.part(0, ROWS * NUM_HEADS),
                dq: c.part(0, ROWS * query),
                dk: c.part(ROWS * query, ROWS * key),
                dv: c.part(ROWS * (query + key), ROWS * key),
            };
            host.attention_backward(backward);
            let results = [backward.dq, backward.dk, backward.dv].map(Seen::F32);
            after("attention_backward", mode, &results, host);
        }
    }

    fn embeddings(&self, host: &mut Host<f32>, after: &mut Observer<'_>) {
        let [a, b, c, _] = self.fresh(host);
        for (kind, weight) in self.weights {
            let y = a.part(0, ROWS * WIDTH);
            host.embedding(self.ids, weight, y);
            after("embedding", kind, &[Seen::F32(y)], host);
        }
        let dweight = c.part(0, OUT * WIDTH);
        host.embedding_backward(self.ids, b.part(0, ROWS * WIDTH), dweight);
        after("embedding_backward", "", &[Seen::F32(dweight)], host);
    }

    fn pointwise(&self, host: &mut Host<f32>, after: &mut Observer<'_>) {
        let [a, b, c, d] = self.fresh(host);
        for (mode, y) in self.acts {
            let (gate, up) = (a.part(0, ROWS * WIDTH), b.part(0, ROWS * WIDTH));
            host.swiglu(gate, up, WIDTH, y);
            after("swiglu", mode, &seen_act(y), host);
        }
        host.swiglu_backward(a, b, c);
        after("swiglu_backward", "", &[Seen::F32(b), Seen::F32(c)], host);
        host.add(b, c);
        after("add", "", &[Seen::F32(c)], host);
        host.lerp(b, 0.125, c);
        after("lerp", "", &[Seen::F32(c)], host);
        host.dropout(Dropout {
            x: c,
            first: u32::MAX - 1000,
            share: 0.3,
            seed: [5, 6],
        });
        after("dropout", "", &[Seen::F32(c)], host);
        for (mode, gradient_scale) in [("loss", None), ("gradient", Some(0.01))] {
            let op = CrossEntropy {
                logits: a.part(0, ROWS * OUT),
                targets: self.ids,
                losses: b.part(0, ROWS),
                gradient_scale,
                z_loss: 0.0,
                softcap: 0.0,
            };
            host.cross_entropy(op);
            let results = [Seen::F32(op.logits), Seen::F32(op.losses)];
            after("cross_entropy", mode, &results, host);
            let capped = CrossEntropy { softcap: 8.0, ..op };
            host.cross_entropy(capped);
            after("capped cross_entropy", mode, &results, host);
            let op = Distillation {
                student: op,
                teacher: c.part(0, ROWS * OUT),
                divergences: d.part(0, ROWS),
                weight: 0.75,
                temperature: 2.0,
            };
            host.distill(op);
            let results = [op.student.logits, op.student.losses, op.divergences];
            after("distill", mode, &results.map(Seen::F32), host);
        }
    }

    fn updates(&self, host: &mut Host<f32>, after: &mut Observer<'_>) {
        let [weight, grad, m, v] = self.fresh(host);
        self.moments.into_iter().for_each(|buf| host.zero(buf));
        let squares = Seen::Number(host.sum_squares(grad));
        after("sum_squares", "", &[squares], host);
        host.zero(v);
        let real = [m, v].map(StoredBuf::Real);
        let half = self.moments.map(StoredBuf::Bf16);
        for (mode, step, [m, v]) in [("f32", 1, real), ("f32", 2, real), ("bf16", 2, half)] {
            host.adamw(AdamW {
                weight,
                grad,
                m,
                v,
                grad_scale: 0.7,
                lr: 1e-3,
                beta1: 0.9,
                beta2: 0.95,
                eps: 1e-8,
                weight_decay: 0.1,
                step,
            });
            let moments = [m, v].map(|buf| match buf {
                StoredBuf::Real(x) => Seen::F32(x),
                StoredBuf::Bf16(x) => Seen::Bf16(x),
            });
            after("adamw", mode, &[Seen::F32(weight)], host);
            after("adamw", mode, &moments, host);
        }
        let latent = weight.part(0, OUT * WIDTH);
        for rule in ScaleRule::ALL {
            let to = self.projected;
            let stats = host.project(latent, WIDTH, rule, to);
            let stats = stats.expect("finite latents");
            let results = [
                Seen::I8(to.trits),
                Seen::F32(to.scales),
                Seen::Number(stats.zeros as f64),
                Seen::Number(stats.flips as f64),
            ];
            after("project", rule.name(), &results, host);
        }
        let blended = m.part(0, OUT * WIDTH);
        host.blend(latent, WIDTH, self.projected, 0.3, blended);
        after("blend", "", &[Seen::F32(blended)], host);
    }
}

fn seen_act(x: ActBuf<f32>) -> [Seen; 2] {
    match x {
        ActBuf::Real(x) => [Seen::F32(x); 2],
        ActBuf::Bf16(x) => [Seen::Bf16(x); 2],
        ActBuf::Int8 { q, scales, .. } => [Seen::I8(q), Seen::F32(scales)],
    }
}

fn seen_attn(x: AttnBuf<f32>) -> Seen {
    match x {
        AttnBuf::Real(x) => Seen::F32(x),
        AttnBuf::Bf16(x) => Seen::Bf16(x),
    }
}
