//! From the logits of one position to one token: a pure function of logits, history,
//! options and one uniform number.
//!
//! The filters are those of Hugging Face's `generate`, in its order: repetition penalty,
//! temperature, top-k, top-p, min-p; behind the first of them the presence and frequency
//! penalties of OpenAI's interface. Every tie is broken by the lowest token id, sums run
//! over ascending ids in f64, and `exp` is that of the `libm` crate, so that the same
//! logits give the same token on every platform and in every batch. With the number of
//! [`uniform_at`], a request's text depends on its own seed and positions only, never on
//! what else the engine computes.

use crate::distribution::Distribution;
use crate::kept::shaping;
use setun_backend::philox::Philox;
use std::cmp::Ordering;
use thiserror::Error;

/// How a token is chosen. Names and meanings are Hugging Face's, of the presence and frequency
/// penalties OpenAI's.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SamplerOptions {
    /// Divides the logits; finite, at least 0. 0 takes the best token (greedy).
    pub temperature: f32,
    /// Keeps this many of the best tokens. 0: all.
    pub top_k: usize,
    /// Keeps the fewest of the best tokens whose probabilities sum to at least this much,
    /// and always the best one; in `[0, 1]`. 1: all.
    pub top_p: f32,
    /// Keeps the tokens that are at least this share as probable as the best one; in
    /// `[0, 1]`. 0: all.
    pub min_p: f32,
    /// Positive logits of tokens in prompt or text are divided by it, negative ones
    /// multiplied, once per distinct token; finite, above 0. 1: no change.
    pub repetition_penalty: f32,
    /// Subtracted from the logits of tokens that were generated; finite. 0: no change.
    pub presence_penalty: f32,
    /// Subtracted from the logit of a token once for each time that it was generated; finite.
    /// 0: no change.
    pub frequency_penalty: f32,
}

impl Default for SamplerOptions {
    /// The model's own distribution: temperature 1, no filter.
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
        }
    }
}

impl SamplerOptions {
    /// The best token, always.
    pub fn greedy() -> Self {
        Self {
            temperature: 0.0,
            ..Self::default()
        }
    }

    /// Checks every option.
    ///
    /// # Errors
    /// [`SamplerError::OutOfRange`] for the first option that is outside its range.
    pub fn validate(&self) -> Result<(), SamplerError> {
        let check = |holds: bool, option, value, range| match holds {
            true => Ok(()),
            false => Err(SamplerError::OutOfRange {
                option,
                value,
                range,
            }),
        };
        let share = 0.0..=1.0;
        let &Self {
            temperature: t,
            top_p,
            min_p,
            repetition_penalty: penalty,
            presence_penalty: presence,
            frequency_penalty: frequency,
            top_k: _,
        } = self;
        check(
            t.is_finite() && t >= 0.0,
            "temperature",
            t,
            "finite and at least 0",
        )?;
        check(share.contains(&top_p), "top_p", top_p, "between 0 and 1")?;
        check(share.contains(&min_p), "min_p", min_p, "between 0 and 1")?;
        check(
            penalty.is_finite() && penalty > 0.0,
            "repetition_penalty",
            penalty,
            "finite and above 0",
        )?;
        check(presence.is_finite(), "presence_penalty", presence, "finite")?;
        let is_finite = frequency.is_finite();
        check(is_finite, "frequency_penalty", frequency, "finite")
    }

    /// Whether logits depend on the tokens before them.
    pub fn penalises(&self) -> bool {
        let (presence, frequency) = (self.presence_penalty, self.frequency_penalty);
        self.repetition_penalty != 1.0 || presence != 0.0 || frequency != 0.0
    }
}

/// Why no token could be chosen.
#[derive(Clone, Debug, PartialEq, Error)]
pub enum SamplerError {
    /// An option is outside its range.
    #[error("{option} is {value}; it must be {range}")]
    OutOfRange {
        /// Name of the option.
        option: &'static str,
        /// What it was set to.
        value: f32,
        /// What it may be.
        range: &'static str,
    },
    /// Token ids from 0 to the vocabulary size do not fit the sampler.
    #[error("a vocabulary of {0} tokens cannot be sampled; it must have 1 to 4294967295")]
    VocabSize(usize),
    /// The row of logits has the wrong length.
    #[error("{found} logits for a vocabulary of {vocab_size} tokens; pass one row of the head")]
    LogitsLength {
        /// Entries of the vocabulary.
        vocab_size: usize,
        /// Logits that were passed.
        found: usize,
    },
    /// A token of the history is not in the vocabulary.
    #[error(
        "token {token} of the history is outside the vocabulary of {vocab_size} tokens; \
         encode the prompt with the model's own tokenizer"
    )]
    HistoryToken {
        /// The token.
        token: u32,
        /// Entries of the vocabulary.
        vocab_size: usize,
    },
    /// The uniform number is not one.
    #[error("the uniform number is {0}; it must be at least 0 and below 1")]
    Uniform(f64),
    /// A logit is NaN or plus infinity.
    #[error(
        "the logit of token {token} is {value}; \
         the model's weights or activations are damaged: verify the model file"
    )]
    InvalidLogit {
        /// The first token with such a logit.
        token: u32,
        /// NaN or infinity.
        value: f32,
    },
    /// Some logit is NaN, and which one has not been looked for.
    #[error(
        "a logit is NaN; the model's weights or activations are damaged: verify the model file"
    )]
    NotANumber,
    /// Every logit is minus infinity.
    #[error("every token is excluded (all logits are -inf); allow at least one")]
    NoCandidate,
}

/// The uniform number, in `[0, 1)`, that chooses the token at `position` of `request`.
///
/// It is the number `position` of Philox's stream `request` under `seed`.
pub fn uniform_at(seed: u64, request: u64, position: u64) -> f64 {
    Philox::new(seed, request).uniform(position)
}

/// As [`uniform_at`], which is draw 0, for rules that draw several numbers at a position
/// (below 2^40): the number `draw * 2^40 + position` of the request's stream.
pub fn uniform_draw(seed: u64, request: u64, position: u64, draw: usize) -> f64 {
    uniform_at(seed, request, ((draw as u64) << 40) + position)
}

/// Chooses tokens. It holds options and scratch only: no call depends on an earlier one, and
/// choosing allocates nothing.
#[derive(Clone, Debug)]
pub struct Sampler {
    options: SamplerOptions,
    /// Ids that are still candidates; capacity `vocab_size`.
    candidates: Vec<u32>,
    /// `[vocab_size]`, by id, valid for candidates: probability relative to the best
    /// token's, `exp((logit - max) / temperature)`.
    weights: Vec<f64>,
}

impl Sampler {
    /// A sampler for rows of `vocab_size` logits.
    ///
    /// # Errors
    /// [`SamplerError::OutOfRange`] for a bad option, [`SamplerError::VocabSize`] for an
    /// empty vocabulary or one whose ids do not fit u32.
    pub fn new(options: SamplerOptions, vocab_size: usize) -> Result<Self, SamplerError> {
        options.validate()?;
        if vocab_size == 0 || u32::try_from(vocab_size).is_err() {
            return Err(SamplerError::VocabSize(vocab_size));
        }
        Ok(Self {
            options,
            candidates: Vec::with_capacity(vocab_size),
            weights: vec![0.0; vocab_size],
        })
    }

    /// The same scratch for other options, which are valid.
    pub(crate) fn set_options(&mut self, options: SamplerOptions) {
        debug_assert!(options.validate().is_ok());
        self.options = options;
    }

    /// Chooses one token by inverting the cumulative distribution, in ascending order of
    /// ids, at `uniform` in `[0, 1)`.
    ///
    /// `logits` is one row, `[vocab_size]`; penalties are written into it. `occurred` holds the
    /// tokens so far ([`occurrences`](crate::occurrences)). A logit of -inf excludes its token.
    ///
    /// # Errors
    /// Any [`SamplerError`] about an argument; the logits are then unchanged.
    pub fn sample(
        &mut self,
        logits: &mut [f32],
        occurred: &[(u32, u32)],
        uniform: f64,
    ) -> Result<u32, SamplerError> {
        self.check(logits, occurred, uniform)?;
        let best = self.filter(logits, occurred)?;
        if self.options.temperature == 0.0 {
            return Ok(best);
        }
        Ok(self.pick(uniform).unwrap_or(best))
    }

    /// What [`sample`](Self::sample) draws from: all that the options leave of the
    /// distribution; with temperature 0 the best token alone.
    ///
    /// # Errors
    /// As [`sample`](Self::sample).
    pub fn distribution(
        &mut self,
        logits: &mut [f32],
        occurred: &[(u32, u32)],
    ) -> Result<Distribution, SamplerError> {
        self.check(logits, occurred, 0.0)?;
        let best = self.filter(logits, occurred)?;
        if self.options.temperature == 0.0 {
            return Ok(Distribution::point(best));
        }
        let left = self.candidates.iter();
        let weights = left.map(|&id| (id, self.weights[id as usize]));
        Ok(Distribution::new(weights.collect()))
    }

    /// Leaves the candidates with their weights; the best token.
    fn filter(&mut self, logits: &mut [f32], occurred: &[(u32, u32)]) -> Result<u32, SamplerError> {
        shaping(&self.options).apply(0, occurred, logits);
        let best = argmax(logits).ok_or(SamplerError::NoCandidate)?;
        if self.options.temperature == 0.0 {
            return Ok(best);
        }
        self.candidates.clear();
        let ids = logits.iter().zip(0u32..);
        self.candidates
            .extend(ids.filter(|(logit, _)| logit.is_finite()).map(|(_, id)| id));
        self.keep_top_k(logits);
        self.weigh(logits, logits[best as usize]);
        self.keep_top_p(logits);
        self.keep_min_p();
        Ok(best)
    }

    fn check(
        &self,
        logits: &[f32],
        occurred: &[(u32, u32)],
        uniform: f64,
    ) -> Result<(), SamplerError> {
        let vocab_size = self.weights.len();
        if logits.len() != vocab_size {
            return Err(SamplerError::LogitsLength {
                vocab_size,
                found: logits.len(),
            });
        }
        let outside = |&&(token, _): &&(u32, u32)| token as usize >= vocab_size;
        if let Some(&(token, _)) = occurred.iter().find(outside) {
            return Err(SamplerError::HistoryToken { token, vocab_size });
        }
        if !(0.0..1.0).contains(&uniform) {
            return Err(SamplerError::Uniform(uniform));
        }
        let is_invalid = |logit: f32| logit.is_nan() || logit == f32::INFINITY;
        match logits
            .iter()
            .zip(0u32..)
            .find(|(logit, _)| is_invalid(**logit))
        {
            Some((&value, token)) => Err(SamplerError::InvalidLogit { token, value }),
            None => Ok(()),
        }
    }

    /// Exactly `top_k` survive, whatever ties there are. The temperature does not change
    /// the order, so this may come before it.
    fn keep_top_k(&mut self, logits: &[f32]) {
        let k = self.options.top_k;
        if k == 0 || k >= self.candidates.len() {
            return;
        }
        self.candidates
            .select_nth_unstable_by(k - 1, |&a, &b| by_rank(logits, a, b));
        self.candidates.truncate(k);
        self.candidates.sort_unstable();
    }

    /// Subtracting the maximum before the division keeps any temperature from overflowing.
    fn weigh(&mut self, logits: &[f32], max: f32) {
        let temperature = f64::from(self.options.temperature);
        for &id in &self.candidates {
            let below = f64::from(logits[id as usize]) - f64::from(max);
            self.weights[id as usize] = libm::exp(below / temperature);
        }
    }

    /// A token goes when the better ones alone have `top_p` of the mass. Usually few
    /// survive, so the ranks are sorted in blocks of doubling size, no further than
    /// needed.
    fn keep_top_p(&mut self, logits: &[f32]) {
        const FIRST_BLOCK: usize = 64;
        if self.options.top_p == 1.0 {
            return;
        }
        let wanted = f64::from(self.options.top_p) * self.total_weight();
        let num_candidates = self.candidates.len();
        let mut mass = 0.0;
        let mut num_kept = 0;
        'blocks: while num_kept < num_candidates {
            let end = (2 * num_kept).max(FIRST_BLOCK).min(num_candidates);
            let rest = &mut self.candidates[num_kept..];
            let block_len = end - num_kept;
            if block_len < rest.len() {
                rest.select_nth_unstable_by(block_len - 1, |&a, &b| by_rank(logits, a, b));
            }
            rest[..block_len].sort_unstable_by(|&a, &b| by_rank(logits, a, b));
            for &id in &rest[..block_len] {
                if num_kept > 0 && mass >= wanted {
                    break 'blocks;
                }
                mass += self.weights[id as usize];
                num_kept += 1;
            }
        }
        self.candidates.truncate(num_kept);
        self.candidates.sort_unstable();
    }

    /// The best token has weight 1, so weights are the shares that `min_p` bounds.
    fn keep_min_p(&mut self) {
        let min_p = f64::from(self.options.min_p);
        let weights = &self.weights;
        self.candidates.retain(|&id| weights[id as usize] >= min_p);
    }

    /// A weight of 0 (underflow) is never chosen: it does not raise the sum.
    fn pick(&self, uniform: f64) -> Option<u32> {
        let target = uniform * self.total_weight();
        let mut sum = 0.0;
        self.candidates.iter().copied().find(|&id| {
            sum += self.weights[id as usize];
            sum > target
        })
    }

    /// Over candidates in ascending order of ids.
    fn total_weight(&self) -> f64 {
        let weights = self.candidates.iter().map(|&id| self.weights[id as usize]);
        weights.fold(0.0, |sum, weight| sum + weight)
    }
}

/// The lowest id with the largest logit; none if all are -inf.
fn argmax(logits: &[f32]) -> Option<u32> {
    let mut best = None;
    let mut max = f32::NEG_INFINITY;
    for (&logit, id) in logits.iter().zip(0u32..) {
        if logit > max {
            max = logit;
            best = Some(id);
        }
    }
    best
}

/// Better tokens first: larger logit, then lower id. Candidates are never NaN.
fn by_rank(logits: &[f32], a: u32, b: u32) -> Ordering {
    let (logit_a, logit_b) = (logits[a as usize], logits[b as usize]);
    let larger_first = logit_b.partial_cmp(&logit_a).unwrap_or(Ordering::Equal);
    larger_first.then(a.cmp(&b))
}

#[cfg(test)]
mod tests;
