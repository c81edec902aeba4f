//! The text that a drafter learns from: beginnings from the corpus, continued by its target.

use crate::TrainError;
use crate::data::Permutation;
use crate::prepare::Prepared;
use crate::run::{Observer, RunOptions};
use crate::settings::Settings;
use setun_infer::{Engine, EngineOptions, Request, SamplerOptions, StopRules};
use setun_io::OpenModel;
use std::sync::atomic::{AtomicBool, Ordering};

/// Texts that the target writes at a time.
const TOGETHER: usize = 32;

/// Windows of equal length.
pub struct Windows {
    tokens: Vec<u32>,
    len: usize,
}

impl Windows {
    /// The windows in order.
    pub fn iter(&self) -> impl Iterator<Item = &[u32]> {
        self.tokens.chunks(self.len)
    }

    /// The window of the `visit`-th visit; each round through all of them has an order of
    /// its own.
    pub fn visit(&self, visit: u64, seed: u64) -> &[u32] {
        let n = (self.tokens.len() / self.len) as u64;
        let order = Permutation::new(n, seed, visit / n);
        let at = order.at(visit % n) as usize * self.len;
        &self.tokens[at..at + self.len]
    }
}

/// Both sides.
pub struct Texts {
    pub train: Windows,
    pub valid: Windows,
}

impl Texts {
    /// Lets the target continue windows of both sides of the corpus behind their first
    /// `drafter.prompt_tokens`: every other one greedily, the rest as `[sample]` says.
    /// Held-out texts are greedy.
    ///
    /// # Errors
    /// Tokens that cannot be read; a target that cannot run; an interrupt.
    pub fn write(
        settings: &Settings,
        model: &OpenModel,
        prepared: &Prepared,
        run: &RunOptions<'_>,
        observer: &mut dyn Observer,
    ) -> Result<Self, TrainError> {
        let (s, seq_len) = (&settings.drafter, settings.train.seq_len);
        let threads = crate::machine::threads(settings.run.threads);
        let options = EngineOptions {
            cache_tokens: Some(TOGETHER * (seq_len + 16)),
            ..EngineOptions::new(seq_len, threads, run.isa)
        };
        let mut writer = Writer {
            engine: Engine::load(model, options)?,
            settings,
            stop: run.stop,
            observer,
        };
        let train = first_windows(s.windows, seq_len, |batch, inputs, targets| {
            let tokens = prepared.batches.targets_per_batch();
            inputs.resize(tokens, 0);
            targets.resize(tokens, 0);
            prepared.batches.fill(batch, inputs, targets)?;
            Ok(true)
        })?;
        let batches = prepared.windows.num_batches();
        let wanted = s.valid_windows;
        // Batches at equal distances, since neighbours are of one text.
        let stride = (batches / wanted as u64).max(1);
        let rows = settings.eval.batch_size * seq_len;
        let valid = first_windows(wanted, seq_len, |i, inputs, targets| {
            inputs.resize(rows, 0);
            targets.resize(rows, 0);
            if i * stride >= batches {
                return Ok(false);
            }
            let filled = prepared.windows.fill(i * stride, inputs, targets)?;
            inputs.truncate(filled.num_targets / seq_len * seq_len);
            Ok(true)
        })?;
        if valid.is_empty() {
            return Err(TrainError::refused(format!(
                "the held-out text has no window of {seq_len} tokens; hold out more with \
                 --data.valid, or shorten --train.seq_len"
            )));
        }
        Ok(Self {
            train: writer.continue_all("training text", train, true)?,
            valid: writer.continue_all("held-out text", valid, false)?,
        })
    }
}

/// Up to `n` windows of `seq_len` tokens from batches that `fill` writes, until it says
/// that there are no more.
fn first_windows(
    n: usize,
    seq_len: usize,
    mut fill: impl FnMut(u64, &mut Vec<u32>, &mut Vec<u32>) -> Result<bool, TrainError>,
) -> Result<Vec<u32>, TrainError> {
    let (mut all, mut inputs, mut targets) = (Vec::new(), Vec::new(), Vec::new());
    for batch in 0.. {
        if all.len() >= n * seq_len || !fill(batch, &mut inputs, &mut targets)? {
            break;
        }
        all.extend_from_slice(&inputs);
    }
    all.truncate(n * seq_len);
    Ok(all)
}

struct Writer<'a> {
    engine: Engine,
    settings: &'a Settings,
    stop: &'a AtomicBool,
    observer: &'a mut dyn Observer,
}

impl Writer<'_> {
    fn continue_all(
        &mut self,
        stage: &str,
        windows: Vec<u32>,
        sampled: bool,
    ) -> Result<Windows, TrainError> {
        let (len, prompt) = (
            self.settings.train.seq_len,
            self.settings.drafter.prompt_tokens,
        );
        let total = (windows.len() / len) as u64;
        let mut tokens = Vec::with_capacity(windows.len());
        for group in windows.chunks(TOGETHER * len) {
            if self.stop.load(Ordering::Relaxed) {
                return Err(super::stopped());
            }
            let number = (tokens.len() / len) as u64;
            let requests: Vec<Request> = (number..)
                .zip(group.chunks(len))
                .map(|(i, window)| self.request(&window[..prompt], i, sampled && i % 2 == 1))
                .collect();
            let written = self.engine.generate_batch(&requests, |_, _| {})?;
            for (request, text) in requests.iter().zip(&written) {
                tokens.extend_from_slice(&request.prompt);
                tokens.extend_from_slice(&text.tokens);
            }
            let done = (tokens.len() / len) as u64;
            self.observer.progress(stage, done, total, "windows");
        }
        Ok(Windows { tokens, len })
    }

    /// A text of a whole window. It has no end tokens: what follows an end is text too.
    fn request(&self, prompt: &[u32], number: u64, sampled: bool) -> Request {
        let sample = &self.settings.sample;
        let greedy = SamplerOptions {
            temperature: 0.0,
            ..SamplerOptions::default()
        };
        let sampler = SamplerOptions {
            temperature: sample.temperature as f32,
            top_k: sample.top_k,
            top_p: sample.top_p as f32,
            min_p: sample.min_p as f32,
            ..SamplerOptions::default()
        };
        Request {
            prompt: prompt.to_vec(),
            sampler: if sampled { sampler } else { greedy },
            stop: StopRules {
                end_tokens: Vec::new(),
                max_tokens: self.settings.train.seq_len - prompt.len(),
            },
            seed: (self.settings.run.seed, number),
            logprobs: None,
        }
    }
}
