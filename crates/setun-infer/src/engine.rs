//! One sequence against a cache of keys and values.
//!
//! Prefill and decode call the same forward pass as training does, with the past in the
//! cache, so the logits of a token do not depend on how many came with it.

use crate::sampler::{Sampler, SamplerError, SamplerOptions, uniform_at};
use crate::stop::{FinishReason, StopRules};
use setun_backend::{Backend, Host, HostWorkspace, Isa, Limits, Plan, Segment};
use setun_io::{IoError, Matrix, OpenModel};
use setun_model::{ModelSpec, Parameters, Purpose, Qwen3, Scheme, SetError};
use setun_ternary::Numerics;
use thiserror::Error;

/// Tokens of a prompt that are processed at a time.
const PREFILL_ROWS: usize = 64;

/// Why a model does not run.
#[derive(Debug, Error)]
pub enum EngineError {
    /// The files cannot be read.
    #[error(transparent)]
    Io(#[from] IoError),
    /// The files hold something else than the model has.
    #[error(transparent)]
    Set(#[from] SetError),
    /// A sampling option, or logits that are no numbers.
    #[error(transparent)]
    Sampler(#[from] SamplerError),
    /// A prompt without tokens.
    #[error("the prompt has no tokens; give some text")]
    EmptyPrompt,
    /// More tokens than the context holds.
    #[error("{found} tokens do not fit into a context of {context}; shorten the prompt")]
    TooLong {
        /// Tokens in the prompt.
        found: usize,
        /// Positions.
        context: usize,
    },
    /// A token outside of the vocabulary.
    #[error(
        "token {token} is outside of the vocabulary of {vocab_size}; use the model's own tokenizer"
    )]
    BadToken {
        /// The token.
        token: u32,
        /// Size of the vocabulary.
        vocab_size: usize,
    },
    /// int8 numerics without ternary weights.
    #[error("numerics int8 need a ternary model; choose bf16 or f32")]
    DenseInt8,
}

/// How an [`Engine`] runs.
#[derive(Clone, Copy, Debug)]
pub struct EngineOptions {
    /// Positions of the cache; the model's own limit at most.
    pub context: usize,
    /// Threads; results do not depend on them.
    pub threads: usize,
    /// Instruction set; results do not depend on it.
    pub isa: Isa,
    /// Other numerics than the model's record says.
    pub numerics: Option<Numerics>,
}

/// What a model on disk computes. Dense models without another wish run in f32.
pub fn spec_of(model: &OpenModel, numerics: Option<Numerics>) -> Result<ModelSpec, EngineError> {
    let ternary = model.ternary();
    let recorded = ternary.map_or(Numerics::F32, |t| t.numerics);
    let numerics = numerics.unwrap_or(recorded);
    if ternary.is_none() && numerics == Numerics::Int8 {
        return Err(EngineError::DenseInt8);
    }
    let scheme = ternary.map(|t| Scheme {
        group_size: t.group_size,
        scale_rule: t.scale_rule,
    });
    Ok(ModelSpec {
        config: model.config().clone(),
        scheme,
        numerics,
    })
}

/// Fills the parameters from files; latents from a ternary model are those that project
/// onto it.
///
/// # Errors
/// What the files or the parameters refuse.
pub fn load_parameters<B: Backend<Real = f32>>(
    model: &OpenModel,
    parameters: &Parameters<f32>,
    backend: &mut B,
) -> Result<(), EngineError> {
    for p in &parameters.list {
        if !p.is_matrix {
            parameters.set_values(backend, &p.name, &model.norm(&p.name)?)?;
            continue;
        }
        match model.matrix(&p.name)? {
            Matrix::Ternary(m) => parameters.set_ternary(backend, &p.name, &m)?,
            Matrix::Dense(values) => parameters.set_values(backend, &p.name, &values)?,
        }
    }
    Ok(())
}

/// A model with one sequence in its cache.
pub struct Engine {
    backend: Host<f32>,
    model: Qwen3<f32>,
    context: usize,
    past: usize,
    logits: Vec<f32>,
}

/// What was generated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Generation {
    /// The new tokens; an end token is not among them.
    pub tokens: Vec<u32>,
    /// Why it ended.
    pub reason: FinishReason,
}

impl Engine {
    /// Loads a model.
    ///
    /// # Errors
    /// What the files refuse; int8 numerics for a dense model.
    pub fn load(model: &OpenModel, options: EngineOptions) -> Result<Self, EngineError> {
        let spec = spec_of(model, options.numerics)?;
        let c = &spec.config;
        let context = options.context.clamp(1, c.max_position_embeddings);
        let limits = Limits {
            width: c
                .intermediate_size
                .max(c.hidden_size)
                .max(c.num_attention_heads * c.head_dim),
            head_dim: c.head_dim,
            group_size: spec.scheme.map_or(128, |s| s.group_size),
        };
        let vocab_size = c.vocab_size;
        let mut plan = Plan::new();
        let workspace = HostWorkspace::reserve(&mut plan, options.threads, limits);
        let rows = PREFILL_ROWS.min(context);
        let qwen3 = Qwen3::reserve(
            &mut plan,
            spec,
            Purpose::Infer {
                rows,
                context,
                head_chunk: 1,
            },
        );
        let mut backend = Host::new(&plan, workspace, options.isa);
        qwen3.prepare(&mut backend);
        load_parameters(model, &qwen3.parameters, &mut backend)?;
        Ok(Self {
            backend,
            model: qwen3,
            context,
            past: 0,
            logits: vec![0.0; vocab_size],
        })
    }

    /// Positions of the cache.
    pub fn context(&self) -> usize {
        self.context
    }

    /// Tokens in the cache.
    pub fn past(&self) -> usize {
        self.past
    }

    /// Forgets the sequence.
    pub fn reset(&mut self) {
        self.past = 0;
    }

    /// Appends tokens to the sequence; [`logits`](Self::logits) are then those behind the
    /// last one.
    ///
    /// # Errors
    /// No tokens, too many, or one outside of the vocabulary.
    pub fn feed(&mut self, tokens: &[u32]) -> Result<(), EngineError> {
        self.run(tokens, |_, _| {}, false)
    }

    /// As [`feed`](Self::feed), with the logits behind every token.
    ///
    /// # Errors
    /// As [`feed`](Self::feed).
    pub fn feed_each(
        &mut self,
        tokens: &[u32],
        each: impl FnMut(usize, &[f32]),
    ) -> Result<(), EngineError> {
        self.run(tokens, each, true)
    }

    fn run(
        &mut self,
        tokens: &[u32],
        mut each: impl FnMut(usize, &[f32]),
        all: bool,
    ) -> Result<(), EngineError> {
        let vocab_size = self.logits.len();
        if tokens.is_empty() {
            return Err(EngineError::EmptyPrompt);
        }
        if self.past + tokens.len() > self.context {
            let found = self.past + tokens.len();
            return Err(EngineError::TooLong {
                found,
                context: self.context,
            });
        }
        if let Some(&token) = tokens.iter().find(|&&t| t as usize >= vocab_size) {
            return Err(EngineError::BadToken { token, vocab_size });
        }
        let mut done = 0;
        for chunk in tokens.chunks(self.model.max_rows()) {
            let mut positions = [0u32; PREFILL_ROWS];
            for (i, position) in positions.iter_mut().enumerate() {
                *position = (self.past + i) as u32;
            }
            let (rows, past) = (chunk.len(), self.past);
            self.model
                .write_batch(&mut self.backend, chunk, &positions[..rows], &[]);
            let segment = Segment {
                q_start: 0,
                q_len: rows,
                kv_start: 0,
                kv_len: past + rows,
            };
            self.model
                .forward(&mut self.backend, rows, past, &[segment]);
            self.past += rows;
            done += rows;
            for row in 0..rows {
                let index = done - rows + row;
                if all || index + 1 == tokens.len() {
                    self.model
                        .read_logits(&mut self.backend, row, &mut self.logits);
                    each(index, &self.logits);
                }
            }
        }
        Ok(())
    }

    /// Logits behind the last token.
    pub fn logits(&self) -> &[f32] {
        &self.logits
    }

    /// Continues `prompt`: the same seed, request and options give the same tokens.
    /// `on_token` sees each token as it comes.
    ///
    /// # Errors
    /// What [`feed`](Self::feed) and the sampler refuse.
    pub fn generate(
        &mut self,
        prompt: &[u32],
        options: SamplerOptions,
        stop: &StopRules,
        (seed, request): (u64, u64),
        mut on_token: impl FnMut(u32),
    ) -> Result<Generation, EngineError> {
        let mut sampler = Sampler::new(options, self.logits.len())?;
        self.reset();
        self.feed(prompt)?;
        let mut history = prompt.to_vec();
        loop {
            let generated = &history[prompt.len()..];
            if let Some(reason) = stop.finish_reason(generated, prompt.len(), self.context) {
                let mut tokens = generated.to_vec();
                if matches!(reason, FinishReason::EndToken(_)) {
                    tokens.pop();
                }
                return Ok(Generation { tokens, reason });
            }
            let uniform = uniform_at(seed, request, history.len() as u64);
            let token = sampler.sample(&mut self.logits, &history, uniform)?;
            history.push(token);
            if !stop.end_tokens.contains(&token) {
                on_token(token);
                if generated_len(&history, prompt) < stop.max_tokens && self.past < self.context {
                    self.feed(&[token])?;
                }
            }
        }
    }
}

fn generated_len(history: &[u32], prompt: &[u32]) -> usize {
    history.len() - prompt.len()
}
