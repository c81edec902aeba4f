//! Parity with transformers and PyTorch (ARCHITECTURE.md, Numbers): every case directory below
//! `tests/data/parity`, and below `SETUN_PARITY_DIR` where that is set.
//!
//! A case is a Hugging Face checkpoint with `expected.safetensors`; numerics `f32`.

use setun_backend::{Backend, Host, HostWorkspace, Isa, Limits, Plan, Segment};
use setun_formats::Qwen3Config;
use setun_io::TensorFile;
use setun_model::{ModelSpec, Purpose, Qwen3, Scheme, TrainShape};
use setun_ternary::{Numerics, ScaleRule};
use setun_train::optimizer::{AdamWOptions, Optimizer};
use setun_train::settings::OptimizerState;
use std::path::{Path, PathBuf};

struct Case {
    name: String,
    config: Qwen3Config,
    weights: TensorFile,
    expected: TensorFile,
    /// `[batch, seq]`
    ids: Vec<u32>,
    batch: usize,
    seq: usize,
}

struct Running {
    backend: Host<f32>,
    model: Qwen3<f32>,
    optimizer: Optimizer,
}

fn cases() -> Vec<Case> {
    let mut roots = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/parity")];
    roots.extend(std::env::var_os("SETUN_PARITY_DIR").map(PathBuf::from));
    let mut cases = Vec::new();
    for root in roots {
        let entries =
            std::fs::read_dir(&root).unwrap_or_else(|e| panic!("{}: {e}", root.display()));
        let mut dirs: Vec<PathBuf> = entries.map(|e| e.unwrap().path()).collect();
        dirs.sort();
        cases.extend(
            dirs.iter()
                .filter(|d| d.join("expected.safetensors").exists())
                .map(|d| open(d)),
        );
    }
    assert!(!cases.is_empty());
    cases
}

fn open(dir: &Path) -> Case {
    let config = Qwen3Config::parse(&std::fs::read(dir.join("config.json")).unwrap()).unwrap();
    let expected = TensorFile::open(&dir.join("expected.safetensors")).unwrap();
    let shape = expected.shape("input_ids").unwrap().to_vec();
    let bytes = expected.bytes("input_ids").unwrap();
    let ids = bytes
        .chunks_exact(8)
        .map(|b| i64::from_le_bytes(b.try_into().unwrap()) as u32);
    Case {
        name: dir.file_name().unwrap().to_string_lossy().into_owned(),
        config,
        weights: TensorFile::open(&dir.join("model.safetensors")).unwrap(),
        ids: ids.collect(),
        expected,
        batch: shape[0],
        seq: shape[1],
    }
}

impl Case {
    fn run(&self, ternary: bool, recompute: bool) -> Running {
        let scheme = Scheme {
            group_size: 128,
            scale_rule: ScaleRule::Mean,
        };
        let spec = ModelSpec {
            config: self.config.clone(),
            scheme: ternary.then_some(scheme),
            numerics: Numerics::F32,
        };
        let shape = TrainShape {
            rows: self.batch * self.seq,
            positions: self.seq,
            recompute,
            head_chunk: 7,
        };
        let c = &self.config;
        let width = c
            .intermediate_size
            .max(c.hidden_size)
            .max(c.num_attention_heads * c.head_dim);
        let limits = Limits {
            width,
            head_dim: c.head_dim,
            group_size: 128,
        };
        let mut plan = Plan::new();
        let workspace = HostWorkspace::reserve(&mut plan, 2, limits);
        let model = Qwen3::reserve(&mut plan, spec, Purpose::Train(shape));
        let options = AdamWOptions {
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            state: OptimizerState::F32,
        };
        let optimizer = Optimizer::reserve(&mut plan, &model.parameters, options);
        let mut backend = Host::new(&plan, workspace, Isa::detect());
        model.prepare(&mut backend);
        for p in &model.parameters.list {
            let values = self.weights.floats(&p.name).unwrap();
            model
                .parameters
                .set_values(&mut backend, &p.name, &values)
                .unwrap();
        }
        model.parameters.project(&mut backend).unwrap();
        Running {
            backend,
            model,
            optimizer,
        }
    }

    /// Forward over `len` tokens of each row of the batch, with the next ones as targets.
    fn forward(&self, run: &mut Running, len: usize) -> Vec<Segment> {
        let mut inputs = Vec::new();
        let mut targets = Vec::new();
        let mut positions = Vec::new();
        let mut segments = Vec::new();
        for (b, row) in self.ids.chunks(self.seq).enumerate() {
            inputs.extend_from_slice(&row[..len]);
            targets.extend((0..len).map(|i| row.get(i + 1).copied().unwrap_or(0)));
            positions.extend(0..len as u32);
            segments.push(Segment::own(b * len, len));
        }
        run.model
            .write_batch(&mut run.backend, &inputs, &positions, &targets);
        run.model.forward(&mut run.backend, inputs.len(), &segments);
        segments
    }

    fn logits(&self, run: &mut Running) -> Vec<f32> {
        self.forward(run, self.seq);
        let mut all = Vec::new();
        let mut row_logits = vec![0.0; self.config.vocab_size];
        for row in 0..self.ids.len() {
            run.model
                .read_logits(&mut run.backend, row, &mut row_logits);
            all.extend_from_slice(&row_logits);
        }
        all
    }

    /// Mean loss over `batch * (seq - 1)` positions, with gradients where asked for.
    fn loss(&self, run: &mut Running, gradients: bool) -> f64 {
        let segments = self.forward(run, self.seq - 1);
        let rows = self.batch * (self.seq - 1);
        if gradients {
            for p in &run.model.parameters.list {
                run.backend.zero(p.gradient());
            }
        }
        let scale = gradients.then_some(1.0 / rows as f64);
        run.model
            .loss_and_backward(&mut run.backend, rows, &segments, scale, None);
        let mut losses = vec![0.0f32; rows];
        run.model.read_losses(&run.backend, &mut losses);
        losses.iter().map(|&x| f64::from(x)).sum::<f64>() / rows as f64
    }

    fn scalar(&self, name: &str) -> f64 {
        f64::from(self.expected.floats(name).unwrap()[0])
    }
}

/// Largest difference relative to the largest magnitude of the reference.
fn relative_to_largest(found: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let largest = expected.iter().fold(0.0f32, |m, x| m.max(x.abs()));
    let pairs = found.iter().zip(expected);
    f64::from(pairs.fold(0.0f32, |m, (a, b)| m.max((a - b).abs())) / largest)
}

/// Relative difference in the 2-norm.
fn relative_norm(found: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let square = |x: f64| x * x;
    let pairs = found.iter().zip(expected);
    let difference: f64 = pairs
        .map(|(&a, &b)| square(f64::from(a) - f64::from(b)))
        .sum();
    let norm: f64 = expected.iter().map(|&x| square(f64::from(x))).sum();
    (difference / norm.max(1e-30)).sqrt()
}

#[test]
fn dense_logits_and_loss() {
    for case in cases() {
        let mut run = case.run(false, false);
        let error = relative_to_largest(
            &case.logits(&mut run),
            &case.expected.floats("dense.logits").unwrap(),
        );
        let loss = case.loss(&mut run, false);
        let loss_error = (loss - case.scalar("dense.loss")).abs();
        println!(
            "{}: dense logits {error:.1e}, loss {loss_error:.1e}",
            case.name
        );
        assert!(error < 1e-4 && loss_error < 1e-5, "{}", case.name);
    }
}

#[test]
fn ternary_projection_is_equal() {
    for case in cases() {
        let run = case.run(true, false);
        for p in &run.model.parameters.list {
            let Some(buf) = p.ternary else { continue };
            let mut trits = vec![0i8; buf.trits.len()];
            let mut scales = vec![0.0f32; buf.scales.len()];
            run.backend.read(buf.trits, &mut trits);
            run.backend.read(buf.scales, &mut scales);
            let expected = case
                .expected
                .bytes(&format!("ternary.trits.{}", p.name))
                .unwrap();
            let expected: Vec<i8> = expected.iter().map(|&b| b as i8).collect();
            assert_eq!(trits, expected, "{} {}", case.name, p.name);
            let expected = case
                .expected
                .floats(&format!("ternary.scale.{}", p.name))
                .unwrap();
            assert_eq!(scales, expected, "{} {}", case.name, p.name);
        }
    }
}

#[test]
fn ternary_logits_loss_and_gradients() {
    for case in cases() {
        for recompute in [false, true] {
            let mut run = case.run(true, recompute);
            let logits = case.expected.floats("ternary.logits").unwrap();
            let error = relative_to_largest(&case.logits(&mut run), &logits);
            let loss_error = (case.loss(&mut run, true) - case.scalar("ternary.loss")).abs();
            let mut worst = 0.0f64;
            for p in &run.model.parameters.list {
                let mut gradient = vec![0.0f32; p.numel()];
                run.backend.read(p.gradient(), &mut gradient);
                let expected = case
                    .expected
                    .floats(&format!("ternary.grad.{}", p.name))
                    .unwrap();
                let error = relative_norm(&gradient, &expected);
                assert!(
                    error < 1e-3,
                    "{} {}: gradient {error:.1e}",
                    case.name,
                    p.name
                );
                worst = worst.max(error);
            }
            println!(
                "{}: ternary logits {error:.1e}, loss {loss_error:.1e}, worst gradient {worst:.1e}",
                case.name
            );
            assert!(error < 1e-4 && loss_error < 1e-5, "{}", case.name);
        }
    }
}

#[test]
fn six_losses_of_adamw() {
    for case in cases() {
        let mut run = case.run(true, false);
        let expected = case.expected.floats("ternary.train_loss").unwrap();
        let mut worst = 0.0f64;
        for (step, &expected) in expected.iter().enumerate() {
            let loss = case.loss(&mut run, true);
            worst = worst.max((loss - f64::from(expected)).abs());
            assert!(
                worst < 1e-3,
                "{} step {step}: {loss} against {expected}",
                case.name
            );
            let parameters = &run.model.parameters;
            let norm = Optimizer::gradient_norm(&mut run.backend, parameters);
            let clip = (1.0 / (norm + 1e-6)).min(1.0);
            run.optimizer
                .step(&mut run.backend, parameters, 1e-3, 0.01, clip);
            parameters.project(&mut run.backend).unwrap();
        }
        println!("{}: six losses within {worst:.1e}", case.name);
    }
}
