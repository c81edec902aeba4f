//! Every differentiable operation against central differences, in f64 on the reference
//! instruction set, through the [`Backend`] trait.
//!
//! One table of cases drives it. A case computes `y` from its inputs and, with a given
//! `dy`, the gradients of `sum(dy * y)`; the driver moves elements of the inputs.

mod rig;

use rig::{Rig, content, numbers, randoms, scales, trits};
use setun_backend::{
    ActBuf, AdamW, Attention, AttentionBackward, AttnBuf, Backend, Buf, CrossEntropy, Distillation,
    DraftBlocks, Host, Isa, LayerNorm, LayerNormBackward, Limits, NormRope, RmsNorm, Segment,
    StoredBuf, TernaryBuf, WeightBuf, WeightData,
};

/// Step of the central differences.
const STEP: f64 = 1e-6;
/// Content of gradient buffers before an operation: those that it must add to keep it,
/// those that it must overwrite lose it.
const BEFORE: f64 = 0.25;
/// Elements of an input that are moved; larger inputs are sampled.
const MOST: usize = 120;

/// What a case computes.
struct Outcome {
    y: Vec<f64>,
    /// One gradient for each input.
    gradients: Vec<Vec<f64>>,
}

/// `(inputs, dy) -> outcome`
type Compute = Box<dyn Fn(&[Vec<f64>], &[f64]) -> Outcome>;

/// An operation at one shape.
struct Case {
    name: String,
    inputs: Vec<(&'static str, Vec<f64>)>,
    dy: Vec<f64>,
    compute: Compute,
}

#[test]
fn gradients_equal_central_differences() {
    let table = [
        rms_norms(),
        layer_norms(),
        norm_ropes(),
        linears(),
        ternary_linears(),
        embeddings(),
        swiglus(),
        attentions(),
        cross_entropies(),
        distillations(),
        adds(),
    ];
    for case in table.into_iter().flatten() {
        check(&case);
    }
}

fn check(case: &Case) {
    let (names, values): (Vec<_>, Vec<_>) = case.inputs.iter().cloned().unzip();
    let gradients = (case.compute)(&values, &case.dy).gradients;
    assert_eq!(gradients.len(), values.len(), "{}", case.name);
    for (input, gradient) in gradients.iter().enumerate() {
        let len = values[input].len();
        assert_eq!(gradient.len(), len, "{}: {}", case.name, names[input]);
        // An odd step visits the columns of most widths alike.
        let step = if len <= MOST { 1 } else { (len / MOST) | 1 };
        for i in (0..len).step_by(step) {
            let loss = |by: f64| {
                let mut moved = values.clone();
                moved[input][i] += by;
                let y = (case.compute)(&moved, &case.dy).y;
                y.iter().zip(&case.dy).map(|(y, dy)| y * dy).sum::<f64>()
            };
            let expected = (loss(STEP) - loss(-STEP)) / (2.0 * STEP);
            let got = gradient[i];
            // The floor is the rounding of the two losses over the step.
            let bound = 1e-5 * expected.abs() + 3e-8;
            assert!(
                (got - expected).abs() < bound,
                "{}: d{}[{i}] is {got}, by differences {expected}",
                case.name,
                names[input]
            );
        }
    }
}

/// The reference backend of a rig.
fn reference(rig: Rig<f64>) -> Host<f64> {
    let limits = Limits {
        width: 128,
        head_dim: 32,
        group_size: 8,
    };
    rig.host(Isa::Reference, 1, limits)
}

/// A gradient buffer with something in it.
fn stale(rig: &mut Rig<f64>, len: usize) -> Buf<f64> {
    rig.put(&vec![BEFORE; len])
}

/// What an operation added to a gradient buffer.
fn added(host: &Host<f64>, buf: Buf<f64>) -> Vec<f64> {
    let values = content(host, buf);
    values.into_iter().map(|x| x - BEFORE).collect()
}

fn rms_norms() -> Vec<Case> {
    let case = |(rows, width): (usize, usize)| Case {
        name: format!("rms_norm [{rows}, {width}]"),
        inputs: vec![
            ("x", randoms(1, rows * width)),
            ("weight", randoms(2, width)),
        ],
        dy: randoms(3, rows * width),
        compute: Box::new(move |inputs, dy| {
            let mut rig = Rig::new();
            let norm = RmsNorm {
                x: rig.put(&inputs[0]),
                weight: rig.put(&inputs[1]),
                inv: rig.room(rows),
                width,
                eps: 1e-3,
            };
            let (y, dy) = (rig.room(rows * width), rig.put(dy));
            let (dx, dweight) = (stale(&mut rig, rows * width), stale(&mut rig, width));
            let mut host = reference(rig);
            host.rms_norm(norm, ActBuf::Real(y));
            host.rms_norm_backward(norm, dy, dx, dweight);
            Outcome {
                y: content(&host, y),
                gradients: vec![added(&host, dx), added(&host, dweight)],
            }
        }),
    };
    [(1, 1), (3, 7), (17, 33), (2, 65)].map(case).into()
}

fn layer_norms() -> Vec<Case> {
    let case = |(rows, width, accumulate): (usize, usize, bool)| Case {
        name: format!("layer_norm [{rows}, {width}]"),
        inputs: vec![
            ("x", randoms(61, rows * width)),
            ("gamma", randoms(62, width)),
            ("beta", randoms(63, width)),
        ],
        dy: randoms(64, rows * width),
        compute: Box::new(move |inputs, dy| {
            let mut rig = Rig::new();
            let op = LayerNorm {
                x: StoredBuf::Real(rig.put(&inputs[0])),
                gamma: rig.put(&inputs[1]),
                beta: rig.put(&inputs[2]),
                center: rig.room(rows),
                rest: rig.room(rows),
                inv: rig.room(rows),
                width,
                eps: 1e-3,
            };
            let y = rig.room(rows * width);
            let gradients = LayerNormBackward {
                forward: op,
                dy: rig.put(dy),
                dx: stale(&mut rig, rows * width),
                accumulate,
                dgamma: stale(&mut rig, width),
                dbeta: stale(&mut rig, width),
                partial: rig.room(LayerNormBackward::<f64>::partial_len(rows, width)),
            };
            let mut host = reference(rig);
            host.layer_norm(op, ActBuf::Real(y));
            host.layer_norm_backward(gradients);
            let dx = match accumulate {
                true => added(&host, gradients.dx),
                false => content(&host, gradients.dx),
            };
            let (dgamma, dbeta) = (gradients.dgamma, gradients.dbeta);
            Outcome {
                y: content(&host, y),
                gradients: vec![dx, added(&host, dgamma), added(&host, dbeta)],
            }
        }),
    };
    [(1, 2, false), (3, 7, true), (17, 33, false), (70, 19, true)]
        .map(case)
        .into()
}

fn norm_ropes() -> Vec<Case> {
    const POSITIONS: usize = 11;
    let case = |(rows, heads, head_dim): (usize, usize, usize)| Case {
        name: format!("norm_rope [{rows}, {heads}, {head_dim}]"),
        inputs: vec![
            ("x", randoms(4, rows * heads * head_dim)),
            ("weight", randoms(5, head_dim)),
        ],
        dy: randoms(6, rows * heads * head_dim),
        compute: Box::new(move |inputs, dy| {
            let mut rig = Rig::new();
            let angles: Vec<f64> = randoms(7, POSITIONS * head_dim / 2);
            let table = |f: fn(f64) -> f64| angles.iter().map(|&a| f(a)).collect::<Vec<_>>();
            let norm = RmsNorm {
                x: rig.put(&inputs[0]),
                weight: rig.put(&inputs[1]),
                inv: rig.room(rows * heads),
                width: head_dim,
                eps: 1e-3,
            };
            let op = NormRope {
                norm,
                heads,
                cos: rig.put(&table(f64::cos)),
                sin: rig.put(&table(f64::sin)),
                positions: rig.put(&numbers(8, rows, POSITIONS as u32)),
            };
            let (y, dx) = (rig.room(inputs[0].len()), rig.put(dy));
            let dweight = stale(&mut rig, head_dim);
            let mut host = reference(rig);
            host.norm_rope(op, AttnBuf::Real(y));
            host.norm_rope_backward(op, dx, dweight);
            Outcome {
                y: content(&host, y),
                gradients: vec![content(&host, dx), added(&host, dweight)],
            }
        }),
    };
    [(1, 1, 2), (5, 3, 6), (17, 2, 10), (19, 1, 34)]
        .map(case)
        .into()
}

/// `[rows, out, inp]`: below, at and beside the sizes of register tiles.
const LINEAR_SHAPES: [(usize, usize, usize); 5] =
    [(1, 1, 1), (3, 5, 7), (7, 17, 19), (13, 16, 33), (2, 35, 70)];

fn linears() -> Vec<Case> {
    let case = |(rows, out, inp): (usize, usize, usize)| Case {
        name: format!("linear, dense [{rows}, {inp}] x [{out}, {inp}]"),
        inputs: vec![("x", randoms(9, rows * inp)), ("w", randoms(10, out * inp))],
        dy: randoms(11, rows * out),
        compute: Box::new(move |inputs, dy| {
            let mut rig = Rig::new();
            let x = ActBuf::Real(rig.put(&inputs[0]));
            let w = WeightBuf {
                out,
                inp,
                data: WeightData::Dense(rig.put(&inputs[1])),
            };
            let (y, dy) = (stale(&mut rig, rows * out), rig.put(dy));
            let (dx, sum) = (stale(&mut rig, rows * inp), stale(&mut rig, rows * inp));
            let dw = stale(&mut rig, out * inp);
            let mut host = reference(rig);
            host.linear(x, w, y);
            host.linear_dx(dy, w, dx, true, false);
            host.linear_dx(dy, w, sum, true, true);
            host.linear_dw(dy, x, out, inp, dw);
            for (dx, sum) in content(&host, dx).iter().zip(added(&host, sum)) {
                assert!((dx - sum).abs() < 1e-12, "{sum} was added instead of {dx}");
            }
            Outcome {
                y: content(&host, y),
                gradients: vec![content(&host, dx), added(&host, dw)],
            }
        }),
    };
    LINEAR_SHAPES.map(case).into()
}

/// Straight-through: the gradient of `w` is that of the effective weights `s * t`. They
/// cannot be moved by a small step, so the moved `y` comes from a dense product with
/// them, after a check that both products agree; all gradients come from the ternary one.
fn ternary_linears() -> Vec<Case> {
    const GROUP: usize = 8;
    let case = |(rows, out, inp): (usize, usize, usize)| {
        let (t, groups) = (trits(12, out * inp), inp.div_ceil(GROUP));
        let s = scales(13, out * groups);
        let scale = |i: usize| s[i / inp * groups + i % inp / GROUP];
        let weight = |(i, &t): (usize, &i8)| f64::from(t) * f64::from(scale(i));
        let effective: Vec<f64> = t.iter().enumerate().map(weight).collect();
        Case {
            name: format!("linear, ternary [{rows}, {inp}] x [{out}, {inp}]"),
            inputs: vec![("x", randoms(14, rows * inp)), ("s * t", effective.clone())],
            dy: randoms(15, rows * out),
            compute: Box::new(move |inputs, dy| {
                let mut rig = Rig::new();
                let x = ActBuf::Real(rig.put(&inputs[0]));
                let weight = |data| WeightBuf { out, inp, data };
                let dense = weight(WeightData::Dense(rig.put(&inputs[1])));
                let ternary = weight(WeightData::Ternary(TernaryBuf {
                    trits: rig.put(&t),
                    scales: rig.put(&s),
                    group_size: GROUP,
                }));
                let (y, z) = (rig.room(rows * out), rig.room(rows * out));
                let (dy, dx) = (rig.put(dy), stale(&mut rig, rows * inp));
                let dw = stale(&mut rig, out * inp);
                let mut host = reference(rig);
                host.linear(x, dense, y);
                host.linear(x, ternary, z);
                host.linear_dx(dy, ternary, dx, true, false);
                host.linear_dw(dy, x, out, inp, dw);
                if inputs[1] == effective {
                    assert_eq!(content(&host, y), content(&host, z));
                }
                Outcome {
                    y: content(&host, y),
                    gradients: vec![content(&host, dx), added(&host, dw)],
                }
            }),
        }
    };
    LINEAR_SHAPES.map(case).into()
}

fn embeddings() -> Vec<Case> {
    let case = |(vocab, width, rows): (usize, usize, usize)| Case {
        name: format!("embedding [{vocab}, {width}], {rows} rows"),
        inputs: vec![("weight", randoms(16, vocab * width))],
        dy: randoms(17, rows * width),
        compute: Box::new(move |inputs, dy| {
            let mut rig = Rig::new();
            // More rows than words: some words come twice and some never.
            let ids = rig.put(&numbers(18, rows, vocab as u32));
            let weight = WeightBuf {
                out: vocab,
                inp: width,
                data: WeightData::Dense(rig.put(&inputs[0])),
            };
            let (y, dy) = (rig.room(rows * width), rig.put(dy));
            let dweight = stale(&mut rig, vocab * width);
            let mut host = reference(rig);
            host.embedding(ids, weight, y);
            host.embedding_backward(ids, dy, dweight);
            Outcome {
                y: content(&host, y),
                gradients: vec![added(&host, dweight)],
            }
        }),
    };
    [(1, 1, 1), (5, 3, 9), (13, 7, 19)].map(case).into()
}

fn swiglus() -> Vec<Case> {
    let case = |(rows, width): (usize, usize)| Case {
        name: format!("swiglu [{rows}, {width}]"),
        inputs: vec![
            ("gate", randoms(19, rows * width)),
            ("up", randoms(20, rows * width)),
        ],
        dy: randoms(21, rows * width),
        compute: Box::new(move |inputs, dy| {
            let mut rig = Rig::new();
            let (gate, up) = (rig.put(&inputs[0]), rig.put(&inputs[1]));
            let (y, dy) = (rig.room(rows * width), rig.put(dy));
            let mut host = reference(rig);
            host.swiglu(gate, up, width, ActBuf::Real(y));
            let y = content(&host, y);
            host.swiglu_backward(dy, gate, up);
            Outcome {
                y,
                gradients: vec![content(&host, gate), content(&host, up)],
            }
        }),
    };
    [(1, 1), (3, 7), (19, 31)].map(case).into()
}

fn segment(q_start: usize, q_len: usize, kv_start: usize, kv_len: usize) -> Segment {
    Segment {
        q_start,
        q_len,
        kv_start,
        kv_len,
    }
}

fn attentions() -> Vec<Case> {
    let whole = vec![Segment::own(0, 5)];
    let packed = vec![Segment::own(0, 7), Segment::own(7, 1), Segment::own(8, 13)];
    // More than one tile; then queries that are the last of a longer run of keys.
    let long = vec![Segment::own(0, 67), Segment::own(67, 3)];
    let cached = vec![segment(0, 3, 0, 71), segment(3, 9, 71, 9)];
    // Blocks of three behind contexts of 5 and of 70 keys, which is more than a tile.
    let drafts = vec![segment(0, 6, 0, 11), segment(6, 66, 11, 136)];
    let anchors = [5, 1].into_iter().chain((0..22).map(|n| 3 * n + 4));
    let anchors: Vec<u32> = anchors.collect();
    vec![
        attention([1, 1, 1], whole, None),
        attention([3, 3, 5], packed.clone(), None),
        attention([6, 2, 7], packed, None),
        attention([2, 1, 6], long, None),
        attention([4, 2, 3], cached, None),
        attention([2, 1, 3], drafts, Some((3, anchors))),
    ]
}

fn attention(heads: [usize; 3], segments: Vec<Segment>, blocks: Option<(usize, Vec<u32>)>) -> Case {
    let [num_heads, num_kv_heads, head_dim] = heads;
    let queries: usize = segments.iter().map(|s| s.q_len).sum();
    let keys: usize = segments.iter().map(|s| s.kv_len).sum();
    let (q_len, kv_len) = (
        queries * num_heads * head_dim,
        keys * num_kv_heads * head_dim,
    );
    let name = format!("attention of {num_heads}/{num_kv_heads} heads of {head_dim}, {segments:?}");
    Case {
        name,
        inputs: vec![
            ("q", randoms(22, q_len)),
            ("k", randoms(23, kv_len)),
            ("v", randoms(24, kv_len)),
        ],
        dy: randoms(25, q_len),
        compute: Box::new(move |inputs, dy| {
            let mut rig = Rig::new();
            let forward = Attention {
                q: AttnBuf::Real(rig.put(&inputs[0])),
                k: AttnBuf::Real(rig.put(&inputs[1])),
                v: AttnBuf::Real(rig.put(&inputs[2])),
                out: stale(&mut rig, q_len),
                lse: rig.room(queries * num_heads),
                segments: &segments,
                blocks: blocks.as_ref().map(|(size, anchors)| DraftBlocks {
                    size: *size,
                    anchors,
                }),
                num_heads,
                num_kv_heads,
                head_dim,
            };
            let backward = AttentionBackward {
                forward,
                dout: rig.put(dy),
                delta: rig.room(queries * num_heads),
                dq: stale(&mut rig, q_len),
                dk: stale(&mut rig, kv_len),
                dv: stale(&mut rig, kv_len),
            };
            let mut host = reference(rig);
            host.attention(forward);
            host.attention_backward(backward);
            let gradients = [backward.dq, backward.dk, backward.dv];
            Outcome {
                y: content(&host, forward.out),
                gradients: gradients.map(|d| content(&host, d)).into(),
            }
        }),
    }
}

fn cross_entropies() -> Vec<Case> {
    let case = |(rows, vocab): (usize, usize)| Case {
        name: format!("cross_entropy [{rows}, {vocab}]"),
        inputs: vec![("logits", randoms(26, rows * vocab))],
        // The weight of a row is the same for all: the mean.
        dy: vec![1.0 / rows as f64; rows],
        compute: Box::new(move |inputs, dy| {
            let mut rig = Rig::new();
            let op = CrossEntropy {
                logits: rig.put(&inputs[0]),
                targets: rig.put(&numbers(27, rows, vocab as u32)),
                losses: stale(&mut rig, rows),
                gradient_scale: None,
                z_loss: 0.0,
                softcap: 0.0,
            };
            let mut host = reference(rig);
            host.cross_entropy(op);
            assert_eq!(
                content(&host, op.logits),
                inputs[0],
                "no gradient was asked for"
            );
            let y = content(&host, op.losses);
            host.cross_entropy(CrossEntropy {
                gradient_scale: Some(dy[0]),
                ..op
            });
            assert_eq!(content(&host, op.losses), y);
            Outcome {
                y,
                gradients: vec![content(&host, op.logits)],
            }
        }),
    };
    [(1, 2), (3, 7), (9, 37)].map(case).into()
}

/// The loss that a student has from its targets and its teacher.
fn distillations() -> Vec<Case> {
    let case = |(rows, vocab, weight, temperature): (usize, usize, f64, f64)| Case {
        name: format!("distill [{rows}, {vocab}], weight {weight}, temperature {temperature}"),
        inputs: vec![("logits", randoms(31, rows * vocab))],
        dy: vec![1.0 / rows as f64; rows],
        compute: Box::new(move |inputs, dy| {
            let mut rig = Rig::new();
            let teacher_logits: Vec<f64> = randoms(32, rows * vocab);
            let student = CrossEntropy {
                logits: rig.put(&inputs[0]),
                targets: rig.put(&numbers(27, rows, vocab as u32)),
                losses: stale(&mut rig, rows),
                gradient_scale: Some(dy[0]),
                z_loss: 0.0,
                softcap: 0.0,
            };
            let op = Distillation {
                student,
                teacher: rig.put(&teacher_logits),
                divergences: stale(&mut rig, rows),
                weight,
                temperature,
            };
            let mut host = reference(rig);
            host.distill(op);
            let divergences = content(&host, op.divergences);
            let logits = inputs[0].chunks(vocab).zip(teacher_logits.chunks(vocab));
            for (&found, (student, teacher)) in divergences.iter().zip(logits) {
                let plain = kl_divergence(teacher, student, temperature);
                assert!((found - plain).abs() < 1e-13, "{found} for {plain}");
            }
            let rows = content(&host, student.losses).into_iter().zip(divergences);
            let mix = |(loss, kl)| (1.0 - weight) * loss + weight * temperature * temperature * kl;
            Outcome {
                y: rows.map(mix).collect(),
                gradients: vec![content(&host, student.logits)],
            }
        }),
    };
    let sizes = [(1, 2, 1.0, 1.0), (3, 7, 0.5, 2.0), (9, 37, 0.9, 0.7)];
    sizes.map(case).into()
}

/// `KL(softmax(teacher / t) || softmax(student / t))`, term by term.
fn kl_divergence(teacher: &[f64], student: &[f64], temperature: f64) -> f64 {
    let log_softmax = |logits: &[f64]| -> Vec<f64> {
        let sum: f64 = logits.iter().map(|x| (x / temperature).exp()).sum();
        logits.iter().map(|x| x / temperature - sum.ln()).collect()
    };
    let pairs = log_softmax(teacher).into_iter().zip(log_softmax(student));
    pairs.map(|(p, q)| p.exp() * (p - q)).sum()
}

/// `y = to + from`: both gradients are `dy`, which a model gets by adding it in place.
fn adds() -> Vec<Case> {
    let case = |len: usize| Case {
        name: format!("add [{len}]"),
        inputs: vec![("from", randoms(28, len)), ("to", randoms(29, len))],
        dy: randoms(30, len),
        compute: Box::new(move |inputs, dy| {
            let mut rig = Rig::new();
            let (from, to) = (rig.put(&inputs[0]), rig.put(&inputs[1]));
            let (dy, dfrom) = (rig.put(dy), stale(&mut rig, len));
            let mut host = reference(rig);
            host.add(from, to);
            host.add(dy, dfrom);
            assert_eq!(content(&host, from), inputs[0]);
            Outcome {
                y: content(&host, to),
                gradients: vec![added(&host, dfrom), content(&host, dy)],
            }
        }),
    };
    [1, 7, 33].map(case).into()
}

/// `torch.optim.AdamW`, its single-tensor form, line by line.
struct TorchAdamW {
    exp_avg: Vec<f64>,
    exp_avg_sq: Vec<f64>,
}

impl TorchAdamW {
    fn step(&mut self, op: &AdamW<f64>, param: &mut [f64], grad: &[f64]) {
        let (beta1, beta2) = (op.beta1, op.beta2);
        for i in 0..param.len() {
            let grad = grad[i] * op.grad_scale;
            param[i] *= 1.0 - op.lr * op.weight_decay;
            // exp_avg.lerp_(grad, 1 - beta1)
            self.exp_avg[i] += (1.0 - beta1) * (grad - self.exp_avg[i]);
            // exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            self.exp_avg_sq[i] = self.exp_avg_sq[i] * beta2 + (1.0 - beta2) * grad * grad;
            let bias_correction1 = 1.0 - beta1.powf(op.step as f64);
            let bias_correction2 = 1.0 - beta2.powf(op.step as f64);
            let step_size = op.lr / bias_correction1;
            let denom = self.exp_avg_sq[i].sqrt() / bias_correction2.sqrt() + op.eps;
            // param.addcdiv_(exp_avg, denom, value=-step_size)
            param[i] -= step_size * self.exp_avg[i] / denom;
        }
    }
}

#[test]
fn adamw_equals_pytorch() {
    for (len, weight_decay, grad_scale) in [(1, 0.0, 1.0), (7, 0.1, 0.3), (33, 0.01, 1.0)] {
        let mut rig = Rig::new();
        let mut weights = randoms::<f64>(31, len);
        let (m, v) = (rig.room(len), rig.room(len));
        let mut op = AdamW {
            weight: rig.put(&weights),
            grad: rig.room(len),
            m: StoredBuf::Real(m),
            v: StoredBuf::Real(v),
            grad_scale,
            lr: 0.02,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            weight_decay,
            step: 0,
        };
        let mut host = reference(rig);
        let mut torch = TorchAdamW {
            exp_avg: vec![0.0; len],
            exp_avg_sq: vec![0.0; len],
        };
        for step in 1..=20 {
            op.step = step;
            // Of the scale of eps at first, so that its place shows.
            let size = 10f64.powi(step as i32 - 9);
            let grad: Vec<f64> = randoms(100 + step, len);
            let grad: Vec<f64> = grad.iter().map(|g| g * size).collect();
            host.write(op.grad, &grad);
            host.adamw(op);
            torch.step(&op, &mut weights, &grad);
            let results = [
                ("weight", op.weight, &weights),
                ("m", m, &torch.exp_avg),
                ("v", v, &torch.exp_avg_sq),
            ];
            for (name, buf, expected) in results {
                for (got, expected) in content(&host, buf).iter().zip(expected) {
                    let error = (got - expected).abs();
                    assert!(
                        error <= 1e-12 * expected.abs(),
                        "{name} of step {step}: {got} {expected}"
                    );
                }
            }
            assert_eq!(content(&host, op.grad), grad);
        }
    }
}
