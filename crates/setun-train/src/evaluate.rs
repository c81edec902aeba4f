//! Held-out loss, perplexity and bits per byte.

use crate::TrainError;
use crate::data::{EvalWindows, TokenSet};
use crate::trainer::BatchBuffers;
use serde::Serialize;
use setun_backend::ops::IGNORE_TARGET;
use setun_backend::{Backend, CacheKind, Host, HostWorkspace, Isa, Plan};
use setun_formats::tensors::write_header;
use setun_formats::{Dtype, TensorInfo};
use setun_infer::{Chunk, Engine, EngineOptions, Wanted, load_parameters, spec_of};
use setun_io::{IoError, OpenModel, write_atomic};
use setun_model::{Purpose, Qwen3};
use setun_ternary::Numerics;
use std::collections::BTreeMap;
use std::path::Path;

/// Rows of logits that exist at a time in an evaluation of a model on disk.
const HEAD_CHUNK: usize = 32;

/// Loss on held-out text, every target weighted alike.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Evaluation {
    /// Nats per token.
    pub loss: f64,
    /// `e^loss`; depends on the tokenizer.
    pub perplexity: f64,
    /// Total nats / (ln 2 x UTF-8 bytes of the text); does not.
    pub bits_per_byte: f64,
    /// Tokens that were predicted, separators included; of conversations, the answers.
    pub tokens: u64,
}

impl Evaluation {
    /// From the total over `tokens` tokens of `bytes` bytes of text.
    pub fn new(total_nats: f64, tokens: u64, bytes: u64) -> Self {
        let loss = total_nats / tokens as f64;
        let bits_per_byte = total_nats / (std::f64::consts::LN_2 * bytes as f64);
        Self {
            loss,
            perplexity: loss.exp(),
            bits_per_byte,
            tokens,
        }
    }
}

/// Evaluates windows one batch after the other; its buffers are reused.
pub struct Evaluator {
    windows: EvalWindows,
    document_mask: bool,
    batch: BatchBuffers,
}

impl Evaluator {
    /// For batches of at most `rows` tokens.
    pub fn new(windows: EvalWindows, rows: usize, document_mask: bool) -> Self {
        let batch = BatchBuffers::new(rows, windows.max_segments());
        Self {
            windows,
            document_mask,
            batch,
        }
    }

    /// The held-out tokens.
    pub fn windows(&self) -> &EvalWindows {
        &self.windows
    }

    /// Loss of `model` over all windows.
    ///
    /// # Errors
    /// Tokens that cannot be read.
    pub fn run<B: Backend<Real = f32>>(
        &mut self,
        backend: &mut B,
        model: &Qwen3<f32>,
    ) -> Result<Evaluation, TrainError> {
        let (mut total, mut tokens) = (0.0f64, 0u64);
        for k in 0..self.windows.num_batches() {
            let batch = &mut self.batch;
            let info = self
                .windows
                .fill(k, &mut batch.inputs, &mut batch.targets)?;
            self.windows
                .segments(k, self.document_mask, &mut batch.ranges);
            let n = info.num_targets;
            batch.select(0, n);
            model.write_batch(
                backend,
                &batch.inputs[..n],
                &batch.positions[..n],
                &batch.targets[..n],
            );
            model.forward(backend, n, &batch.segments);
            model.loss_and_backward(backend, n, &batch.segments, None, None);
            model.read_losses(backend, &mut batch.losses[..n]);
            // One by one: partial sums would depend on the batch size.
            for &loss in &batch.losses[..n] {
                total += f64::from(loss);
            }
            let counts = batch.targets[..n].iter().filter(|&&t| t != IGNORE_TARGET);
            tokens += counts.count() as u64;
        }
        let bytes = self.windows.tokens().info().raw_bytes;
        Ok(Evaluation::new(total, tokens, bytes))
    }
}

/// How [`evaluate_model`] runs.
#[derive(Clone, Copy, Debug)]
pub struct EvalOptions {
    /// Tokens of a window.
    pub seq_len: usize,
    /// Windows at a time.
    pub batch_size: usize,
    /// Whether tokens see those of their own document only (not through a cache).
    pub document_mask: bool,
    /// Threads; results do not depend on them.
    pub threads: usize,
    /// Instruction set; results do not depend on it.
    pub isa: Isa,
    /// Other numerics than the model's record says.
    pub numerics: Option<Numerics>,
}

/// Logits of an evaluation with the tokens that they belong to.
#[derive(Clone, Debug, Default)]
pub struct Logits {
    /// Input tokens, in the order of the evaluation.
    pub inputs: Vec<u32>,
    /// `[inputs, vocab_size]`
    pub values: Vec<f32>,
    /// Length of each window.
    pub windows: Vec<u32>,
}

/// Evaluates a model on disk, in windows as in training.
///
/// # Errors
/// Tokens or weights that cannot be read.
pub fn evaluate_model(
    open: &OpenModel,
    tokens: TokenSet,
    options: EvalOptions,
    keep_logits: bool,
) -> Result<(Evaluation, Logits), TrainError> {
    let windows = EvalWindows::new(tokens, options.seq_len, options.batch_size)?;
    let rows = options.seq_len * options.batch_size;
    let spec = spec_of(open, options.numerics)?;
    let c = spec.config.clone();
    let mut plan = Plan::new();
    let workspace = HostWorkspace::reserve(&mut plan, options.threads, spec.limits());
    let model = Qwen3::reserve(
        &mut plan,
        spec,
        Purpose::Infer {
            rows,
            context: rows,
            head_chunk: rows.min(HEAD_CHUNK),
        },
    );
    let mut backend = Host::new(&plan, workspace, options.isa);
    model.prepare(&mut backend);
    load_parameters(open, &model.parameters, &mut backend)?;
    let mut evaluator = Evaluator::new(windows, rows, options.document_mask);
    let evaluation = evaluator.run(&mut backend, &model)?;
    let mut logits = Logits::default();
    if keep_logits {
        evaluator.logits(&mut backend, &model, c.vocab_size, &mut logits)?;
    }
    Ok((evaluation, logits))
}

/// Evaluates a model on disk through the cache of keys and values that generation uses,
/// stored as `kind`: what a smaller cache costs. With a cache as exact as the model the
/// logits are those of [`evaluate_model`], bit for bit.
///
/// # Errors
/// As [`evaluate_model`].
pub fn evaluate_cached(
    open: &OpenModel,
    tokens: TokenSet,
    options: EvalOptions,
    kind: CacheKind,
) -> Result<Evaluation, TrainError> {
    let windows = EvalWindows::new(tokens, options.seq_len, 1)?;
    let mut engine = Engine::load(
        open,
        EngineOptions {
            numerics: options.numerics,
            cache: Some(kind),
            max_rows: HEAD_CHUNK,
            ..EngineOptions::new(options.seq_len, options.threads, options.isa)
        },
    )?;
    let (mut inputs, mut targets) = (vec![0; options.seq_len], vec![0; options.seq_len]);
    let (mut total, mut count) = (0.0f64, 0u64);
    for k in 0..windows.num_batches() {
        let n = windows.fill(k, &mut inputs, &mut targets)?.num_targets;
        // Not by the prompt, which could find an earlier window's keys.
        let sequence = engine.start(&[]);
        let chunk = Chunk {
            sequence,
            tokens: &inputs[..n],
            parents: None,
            logits: Wanted::All,
        };
        engine.step(&[chunk], &mut |_, i, logits| {
            if targets[i] != IGNORE_TARGET {
                total += nats(logits, targets[i]);
                count += 1;
            }
        })?;
        engine.free(sequence)?;
    }
    let bytes = windows.tokens().info().raw_bytes;
    Ok(Evaluation::new(total, count, bytes))
}

/// Cross entropy of one row of logits.
fn nats(logits: &[f32], target: u32) -> f64 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let exps = logits.iter().map(|&x| f64::from(x - max).exp());
    f64::from(max) + exps.sum::<f64>().ln() - f64::from(logits[target as usize])
}

impl Evaluator {
    /// Logits of every window.
    fn logits<B: Backend<Real = f32>>(
        &mut self,
        backend: &mut B,
        model: &Qwen3<f32>,
        vocab_size: usize,
        out: &mut Logits,
    ) -> Result<(), TrainError> {
        let mut row_logits = vec![0.0f32; vocab_size];
        for k in 0..self.windows.num_batches() {
            let batch = &mut self.batch;
            let n = self
                .windows
                .fill(k, &mut batch.inputs, &mut batch.targets)?
                .num_targets;
            self.windows
                .segments(k, self.document_mask, &mut batch.ranges);
            batch.select(0, n);
            model.write_batch(
                backend,
                &batch.inputs[..n],
                &batch.positions[..n],
                &batch.targets[..n],
            );
            model.forward(backend, n, &batch.segments);
            for row in 0..n {
                model.read_logits(backend, row, &mut row_logits);
                out.values.extend_from_slice(&row_logits);
            }
            out.inputs.extend_from_slice(&batch.inputs[..n]);
            out.windows
                .extend(batch.ranges.iter().map(|r| r.len as u32));
        }
        Ok(())
    }
}

/// Writes logits as safetensors: `input_ids` i64 `[n]`, `windows` i64, `logits` f32 `[n, v]`.
///
/// # Errors
/// What the operating system returns.
pub fn write_logits(path: &Path, logits: &Logits) -> Result<(), TrainError> {
    let n = logits.inputs.len();
    let info = |name: &str, dtype, shape: &[usize]| TensorInfo {
        name: name.to_owned(),
        dtype,
        shape: shape.to_vec(),
    };
    let infos = [
        info("input_ids", Dtype::I64, &[n]),
        info("windows", Dtype::I64, &[logits.windows.len()]),
        info("logits", Dtype::F32, &[n, logits.values.len() / n.max(1)]),
    ];
    let mut bytes = Vec::new();
    let wide = |x: &[u32]| {
        x.iter()
            .flat_map(|&x| i64::from(x).to_le_bytes())
            .collect::<Vec<u8>>()
    };
    write_header(&mut bytes, &infos, &BTreeMap::new())
        .map_err(|e| IoError::file("write", path, e))?;
    bytes.extend(wide(&logits.inputs));
    bytes.extend(wide(&logits.windows));
    bytes.extend(logits.values.iter().flat_map(|x| x.to_le_bytes()));
    write_atomic(path, &bytes)?;
    Ok(())
}
