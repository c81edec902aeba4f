//! Small models with random weights, in an engine and in the training forward pass.
#![allow(dead_code)] // Each test binary uses its part.

use setun_backend::philox::Philox;
use setun_backend::{Backend, Host, HostWorkspace, Isa, Limits, Plan, Segment};
use setun_formats::config::{Qwen3Config, RopeConfig};
use setun_infer::{Engine, EngineOptions};
use setun_model::{ModelSpec, Parameters, Purpose, Qwen3, Scheme};
use setun_ternary::{Numerics, PackedMatrix, ScaleRule, groups_per_row};

/// Random numbers of one test case, in their order.
pub struct Numbers {
    random: Philox,
    next: u64,
}

impl Numbers {
    /// The numbers of case `case`.
    pub fn new(case: u64) -> Self {
        Self {
            random: Philox::new(2026, case),
            next: 0,
        }
    }

    /// A whole number in `low..=high`.
    pub fn between(&mut self, low: usize, high: usize) -> usize {
        self.next += 1;
        low + self.random.block(self.next)[0] as usize % (high - low + 1)
    }

    /// One of the values.
    pub fn one_of<T: Copy>(&mut self, values: &[T]) -> T {
        values[self.between(0, values.len() - 1)]
    }

    /// A standard normal number.
    pub fn normal(&mut self) -> f64 {
        self.next += 1;
        self.random.normal_pair(self.next).0
    }

    /// A number in `[0, 1)`.
    pub fn uniform(&mut self) -> f64 {
        self.next += 1;
        self.random.uniform(self.next)
    }

    /// Tokens below `vocab_size`.
    pub fn tokens(&mut self, n: usize, vocab_size: usize) -> Vec<u32> {
        (0..n)
            .map(|_| self.between(0, vocab_size - 1) as u32)
            .collect()
    }
}

/// A model with its weights.
pub struct Model {
    pub spec: ModelSpec,
    pub matrices: Vec<(String, PackedMatrix)>,
    /// Matrices of a dense model, in place of the ternary ones.
    pub values: Vec<(String, Vec<f32>)>,
    pub norms: Vec<(String, Vec<f32>)>,
}

impl Model {
    /// A model of random shape, weights and numerics.
    pub fn random(numbers: &mut Numbers, numerics: Numerics) -> Self {
        let num_key_value_heads = numbers.between(1, 3);
        let config = Qwen3Config {
            vocab_size: numbers.between(20, 70),
            hidden_size: numbers.between(20, 90),
            intermediate_size: numbers.between(20, 100),
            num_hidden_layers: numbers.between(1, 2),
            num_attention_heads: num_key_value_heads * numbers.between(1, 3),
            num_key_value_heads,
            head_dim: 2 * numbers.between(2, 20),
            max_position_embeddings: 256,
            rms_norm_eps: 1e-6,
            tie_word_embeddings: numbers.between(0, 1) == 0,
            rope: RopeConfig {
                rope_theta: 1e4,
                yarn: None,
            },
            bos_token_id: None,
            eos_token_ids: vec![0],
        };
        let group_size = numbers.one_of(&[32, 64, 128]);
        Self::with(numbers, config, group_size, numerics)
    }

    /// A model of the given shape.
    pub fn with(
        numbers: &mut Numbers,
        config: Qwen3Config,
        group_size: usize,
        numerics: Numerics,
    ) -> Self {
        let (mut matrices, mut norms) = (Vec::new(), Vec::new());
        for info in config.parameters() {
            let cols = *info.shape.last().unwrap();
            if !info.is_matrix() {
                let norm = (0..cols).map(|_| 1.0 + 0.2 * numbers.normal() as f32);
                norms.push((info.name.clone(), norm.collect()));
                continue;
            }
            let rows = info.numel() / cols;
            let trits: Vec<i8> = (0..rows * cols)
                .map(|_| numbers.between(0, 2) as i8 - 1)
                .collect();
            let scale = |x: f64| half::bf16::from_f64((1.0 + 0.3 * x).abs() / (cols as f64).sqrt());
            let scales: Vec<f32> = (0..rows * groups_per_row(cols, group_size))
                .map(|_| scale(numbers.normal()).to_f32())
                .collect();
            let matrix = PackedMatrix::from_trits(&trits, &scales, cols, group_size);
            matrices.push((info.name.clone(), matrix));
        }
        let scheme = Some(Scheme {
            group_size,
            scale_rule: ScaleRule::Mean,
        });
        Self {
            spec: ModelSpec {
                config,
                scheme,
                numerics,
            },
            matrices,
            values: Vec::new(),
            norms,
        }
    }

    /// The same shape with dense weights.
    pub fn dense(mut self, numbers: &mut Numbers) -> Self {
        for (name, matrix) in self.matrices.drain(..) {
            let scale = (matrix.cols as f64).sqrt();
            let value = |_| (numbers.normal() / scale) as f32;
            let values = (0..matrix.rows * matrix.cols).map(value).collect();
            self.values.push((name, values));
        }
        self.spec.scheme = None;
        self
    }

    fn load<B: Backend<Real = f32>>(&self, parameters: &Parameters<f32>, b: &mut B) {
        for (name, matrix) in &self.matrices {
            parameters.set_ternary(b, name, matrix).unwrap();
        }
        for (name, values) in self.values.iter().chain(&self.norms) {
            parameters.set_values(b, name, values).unwrap();
        }
    }

    /// The model in an engine.
    pub fn engine(&self, options: EngineOptions) -> Engine {
        let mut engine = Engine::reserve(self.spec.clone(), options);
        self.fill(&mut engine);
        engine
    }

    /// Gives an engine the weights.
    pub fn fill(&self, engine: &mut Engine) {
        let (parameters, backend) = engine.parts();
        let parameters = parameters.clone();
        self.load(&parameters, backend);
    }

    /// The model in the forward pass of training and evaluation.
    pub fn trained(&self, rows: usize) -> Trained {
        let c = &self.spec.config;
        let limits = Limits {
            width: c
                .intermediate_size
                .max(c.hidden_size)
                .max(c.num_attention_heads * c.head_dim),
            head_dim: c.head_dim,
            group_size: 32,
        };
        let mut plan = Plan::new();
        let workspace = HostWorkspace::reserve(&mut plan, 1, limits);
        let purpose = Purpose::Infer {
            rows,
            context: rows,
            head_chunk: 1,
        };
        let model = Qwen3::reserve(&mut plan, self.spec.clone(), purpose);
        let mut backend = Host::new(&plan, workspace, Isa::Reference);
        model.prepare(&mut backend);
        self.load(&model.parameters, &mut backend);
        Trained { model, backend }
    }
}

/// A model as training has it, on the reference instruction set and one thread.
pub struct Trained {
    model: Qwen3<f32>,
    backend: Host<f32>,
}

impl Trained {
    /// Bits of the logits behind each token.
    pub fn logits(&mut self, tokens: &[u32]) -> Vec<Vec<u32>> {
        let n = tokens.len();
        let positions: Vec<u32> = (0..n as u32).collect();
        self.model
            .write_batch(&mut self.backend, tokens, &positions, &[]);
        self.model
            .forward(&mut self.backend, n, &[Segment::own(0, n)]);
        let mut logits = vec![0.0f32; self.model.spec().config.vocab_size];
        (0..n)
            .map(|row| {
                self.model.read_logits(&mut self.backend, row, &mut logits);
                bits(&logits)
            })
            .collect()
    }
}

/// Bits of values.
pub fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}
