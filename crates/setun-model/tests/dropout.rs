//! Dropout: gradients against finite differences, micro-batches and recomputation against the
//! whole batch, nothing left out of evaluations.

use setun_backend::philox::Philox;
use setun_backend::{Backend, Host, HostWorkspace, Isa, Limits, Plan, Segment};
use setun_formats::{Qwen3Config, RopeConfig};
use setun_model::{ModelSpec, Purpose, Qwen3, StepDropout, TrainShape};
use setun_ternary::Numerics;

const SEQ: usize = 5;
const IDS: [u32; 2 * SEQ] = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3];
const TARGETS: [u32; 2 * SEQ] = [1, 4, 1, 5, 9, 2, 6, 5, 3, 5];

fn config() -> Qwen3Config {
    Qwen3Config {
        vocab_size: 10,
        hidden_size: 8,
        intermediate_size: 12,
        num_hidden_layers: 2,
        num_attention_heads: 2,
        num_key_value_heads: 1,
        head_dim: 4,
        max_position_embeddings: 16,
        rms_norm_eps: 1e-6,
        tie_word_embeddings: true,
        rope: RopeConfig {
            rope_theta: 1e4,
            yarn: None,
        },
        bos_token_id: None,
        eos_token_ids: Vec::new(),
    }
}

struct Training {
    backend: Host<f64>,
    model: Qwen3<f64>,
}

impl Training {
    fn new(recompute: bool) -> Self {
        let mut plan = Plan::new();
        let spec = ModelSpec {
            config: config(),
            scheme: None,
            numerics: Numerics::F32,
        };
        let shape = TrainShape {
            rows: 2 * SEQ,
            positions: SEQ,
            recompute,
            head_chunk: 3,
        };
        let model = Qwen3::reserve(&mut plan, spec, Purpose::Train(shape));
        let limits = Limits {
            width: 12,
            head_dim: 4,
            group_size: 8,
        };
        let workspace = HostWorkspace::reserve(&mut plan, 2, limits);
        let mut backend = Host::new(&plan, workspace, Isa::detect());
        model.prepare(&mut backend);
        for (stream, p) in (0u64..).zip(&model.parameters.list) {
            let random = Philox::new(1, stream);
            let of_norm = |j| 1.0 + 0.2 * random.normal_pair(j).0;
            let of_matrix = |j| 0.5 * random.normal_pair(j).0;
            let numbers = 0..p.numel() as u64;
            let values: Vec<f64> = match p.is_matrix {
                true => numbers.map(of_matrix).collect(),
                false => numbers.map(of_norm).collect(),
            };
            backend.write(p.values(), &values);
        }
        Self { backend, model }
    }

    /// Sum of the losses, `windows` of the batch at a time; gradients too, if asked for.
    fn loss(&mut self, dropout: Option<(f64, u64)>, windows: usize, backward: bool) -> f64 {
        let (b, n) = (&mut self.backend, windows * SEQ);
        if backward {
            let gradients = self.model.parameters.list.iter().filter_map(|p| p.grad);
            gradients.for_each(|gradient| b.zero(gradient));
        }
        let segments: Vec<Segment> = (0..windows).map(|i| Segment::own(i * SEQ, SEQ)).collect();
        let positions: Vec<u32> = (0..n).map(|i| (i % SEQ) as u32).collect();
        let mut total = 0.0;
        for start in (0..IDS.len()).step_by(n) {
            self.model.dropout = dropout.map(|(share, step)| StepDropout {
                share,
                seed: 42,
                step,
                first_row: start,
            });
            let (ids, targets) = (&IDS[start..start + n], &TARGETS[start..start + n]);
            self.model.write_batch(b, ids, &positions, targets);
            self.model.forward(b, n, &segments);
            let scale = backward.then_some(1.0);
            self.model.loss_and_backward(b, n, &segments, scale, None);
            let mut losses = vec![0.0; n];
            self.model.read_losses(b, &mut losses);
            total += losses.iter().sum::<f64>();
        }
        total
    }

    fn gradients(&mut self, dropout: Option<(f64, u64)>, windows: usize) -> Vec<Vec<f64>> {
        self.loss(dropout, windows, true);
        let read = |p: &setun_model::Parameter<f64>| {
            let mut gradient = vec![0.0; p.numel()];
            self.backend.read(p.gradient(), &mut gradient);
            gradient
        };
        self.model.parameters.list.iter().map(read).collect()
    }
}

#[test]
fn gradients_equal_central_differences() {
    const STEP: f64 = 1e-5;
    const DROPOUT: Option<(f64, u64)> = Some((0.3, 7));
    let mut training = Training::new(false);
    let gradients = training.gradients(DROPOUT, 2);
    let list = training.model.parameters.list.clone();
    for (p, gradient) in list.iter().zip(&gradients) {
        assert!(gradient.iter().any(|g| *g != 0.0), "{} learns", p.name);
        let mut values = vec![0.0; p.numel()];
        training.backend.read(p.values(), &mut values);
        for i in (0..p.numel()).step_by((p.numel() / 12).max(1) | 1) {
            let kept = values[i];
            let mut loss = |value: f64| {
                values[i] = value;
                training.backend.write(p.values(), &values);
                training.loss(DROPOUT, 2, false)
            };
            let difference = (loss(kept + STEP) - loss(kept - STEP)) / (2.0 * STEP);
            loss(kept);
            let (name, found) = (&p.name, gradient[i]);
            let error = (found - difference).abs() / (1.0 + difference.abs());
            assert!(error < 1e-7, "{name}[{i}]: {found} against {difference}");
        }
    }
}

#[test]
fn what_goes_depends_on_the_step_and_not_on_how_a_batch_is_computed() {
    let dropout = Some((0.5, 3));
    let mut training = Training::new(false);
    let whole = training.gradients(dropout, 2);
    let parts = training.gradients(dropout, 1);
    let recomputed = Training::new(true).gradients(dropout, 2);
    assert_eq!(whole, recomputed);
    for (a, b) in whole.iter().flatten().zip(parts.iter().flatten()) {
        assert!((a - b).abs() < 1e-12 * (1.0 + a.abs()), "{a} and {b}");
    }
    let loss = training.loss(dropout, 2, false);
    assert_ne!(loss, training.loss(Some((0.5, 4)), 2, false));
    let plain = training.loss(None, 2, false);
    assert_ne!(loss, plain);
    assert_eq!(training.loss(Some((0.0, 3)), 2, false), plain);
}
