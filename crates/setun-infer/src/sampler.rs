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

/// Chooses tokens. It holds options and scratch only: no call depends on an earlier one,
/// and none allocates.
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

    /// The options that it was made with.
    pub fn options(&self) -> &SamplerOptions {
        &self.options
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
mod tests {
    use super::*;
    use crate::occurrences;

    const INF: f32 = f32::INFINITY;

    fn options(temperature: f32, top_k: usize, top_p: f32, min_p: f32) -> SamplerOptions {
        SamplerOptions {
            temperature,
            top_k,
            top_p,
            min_p,
            ..SamplerOptions::default()
        }
    }

    /// A history that is all prompt.
    fn prompt(history: &[u32]) -> Vec<(u32, u32)> {
        occurrences(history, history.len())
    }

    fn penalty(repetition_penalty: f32) -> SamplerOptions {
        SamplerOptions {
            repetition_penalty,
            ..SamplerOptions::greedy()
        }
    }

    fn sample(
        options: SamplerOptions,
        logits: &[f32],
        history: &[u32],
        uniform: f64,
    ) -> Result<u32, SamplerError> {
        Sampler::new(options, logits.len())?.sample(&mut logits.to_vec(), &prompt(history), uniform)
    }

    /// Every token that some of 1,000 evenly spaced uniform numbers gives, ascending.
    fn reachable(options: SamplerOptions, logits: &[f32]) -> Vec<u32> {
        let uniforms = (0..1000).map(|i| f64::from(i) / 1000.0);
        let mut tokens: Vec<u32> = uniforms
            .map(|uniform| sample(options, logits, &[], uniform).unwrap())
            .collect();
        tokens.sort_unstable();
        tokens.dedup();
        tokens
    }

    fn random_logits(stream: u64, vocab_size: usize, scale: f64) -> Vec<f32> {
        let philox = Philox::new(99, stream);
        (0..vocab_size as u64)
            .map(|i| (scale * philox.normal_pair(i).0) as f32)
            .collect()
    }

    /// The filters as Hugging Face spells them, each over the whole vocabulary with its
    /// own softmax. Returns probabilities by id.
    fn distribution_by_definition(
        logits: &[f32],
        history: &[u32],
        options: &SamplerOptions,
    ) -> Vec<f64> {
        let mut scores: Vec<f64> = logits.iter().map(|&x| f64::from(x)).collect();
        let penalty = f64::from(options.repetition_penalty);
        for (id, score) in (0u32..).zip(&mut scores) {
            if history.contains(&id) {
                *score *= if *score < 0.0 { penalty } else { 1.0 / penalty };
            }
            *score /= f64::from(options.temperature);
        }
        let mut ascending: Vec<usize> = (0..scores.len()).collect();
        ascending.sort_by(|&a, &b| scores[a].total_cmp(&scores[b]));
        if options.top_k > 0 {
            let num_removed = scores.len().saturating_sub(options.top_k);
            for &id in &ascending[..num_removed] {
                scores[id] = f64::NEG_INFINITY;
            }
        }
        if options.top_p < 1.0 {
            let probabilities = softmax(&scores);
            let mut cumulative = 0.0;
            for &id in &ascending[..scores.len() - 1] {
                cumulative += probabilities[id];
                if cumulative <= 1.0 - f64::from(options.top_p) {
                    scores[id] = f64::NEG_INFINITY;
                }
            }
        }
        let probabilities = softmax(&scores);
        let top = probabilities.iter().fold(0.0f64, |top, &p| top.max(p));
        for (score, &p) in scores.iter_mut().zip(&probabilities) {
            if p < f64::from(options.min_p) * top {
                *score = f64::NEG_INFINITY;
            }
        }
        softmax(&scores)
    }

    fn softmax(scores: &[f64]) -> Vec<f64> {
        let max = scores.iter().fold(f64::NEG_INFINITY, |max, &x| max.max(x));
        let weights: Vec<f64> = scores.iter().map(|x| (x - max).exp()).collect();
        let total: f64 = weights.iter().sum();
        weights.iter().map(|weight| weight / total).collect()
    }

    /// Checks that the middle of every token's interval of the cumulative distribution,
    /// as the definition has it, gives that token.
    fn check_against_definition(options: SamplerOptions, logits: &[f32], history: &[u32]) {
        let mut sampler = Sampler::new(options, logits.len()).unwrap();
        let mut before = 0.0;
        let probabilities = distribution_by_definition(logits, history, &options);
        for (id, &p) in (0u32..).zip(&probabilities) {
            if p > 1e-9 {
                let found =
                    sampler.sample(&mut logits.to_vec(), &prompt(history), before + p / 2.0);
                assert_eq!(found, Ok(id), "{options:?}");
            }
            before += p;
        }
    }

    #[test]
    fn agrees_with_the_definition_of_hugging_face() {
        let mut num_cases = 0;
        for (stream, vocab_size) in [(0, 2), (1, 13), (2, 700)] {
            let logits = random_logits(stream, vocab_size, 3.0);
            for temperature in [0.3, 1.0, 2.5] {
                for top_k in [0, 1, 5, 200] {
                    for top_p in [0.05, 0.5, 0.93, 0.9999, 1.0] {
                        for min_p in [0.0, 0.04, 0.6] {
                            let mut options = options(temperature, top_k, top_p, min_p);
                            check_against_definition(options, &logits, &[]);
                            options.repetition_penalty = 1.3;
                            check_against_definition(options, &logits, &[1, 0, 1, 1]);
                            num_cases += 2;
                        }
                    }
                }
            }
        }
        assert_eq!(num_cases, 2 * 3 * 3 * 4 * 5 * 3);
    }

    /// Chi-square with 4 degrees of freedom: 18.47 is its 99.9 % quantile.
    #[test]
    fn frequencies_follow_the_probabilities() {
        const NUM_DRAWS: u64 = 50_000;
        let shares = [0.4f64, 0.05, 0.25, 0.1, 0.2];
        let logits: Vec<f32> = shares.iter().map(|p| p.ln() as f32 + 3.0).collect();
        let mut sampler = Sampler::new(SamplerOptions::default(), 5).unwrap();
        let mut counts = [0.0; 5];
        for position in 0..NUM_DRAWS {
            let uniform = uniform_at(1, 2, position);
            let token = sampler.sample(&mut logits.clone(), &[], uniform).unwrap();
            counts[token as usize] += 1.0;
        }
        let chi_square: f64 = shares
            .iter()
            .zip(counts)
            .map(|(p, count)| (p * NUM_DRAWS as f64, count))
            .map(|(expected, count)| (count - expected).powi(2) / expected)
            .sum();
        assert!(chi_square < 18.47, "{chi_square}: {counts:?}");
    }

    #[test]
    fn uniform_numbers_depend_on_seed_request_and_position() {
        let mut numbers = Vec::new();
        for seed in 0..4 {
            for request in 0..4 {
                numbers.extend((0..4).map(|position| uniform_at(seed, request, position)));
            }
        }
        assert_eq!(uniform_at(3, 2, 1), numbers[3 * 16 + 2 * 4 + 1]);
        numbers.sort_by(f64::total_cmp);
        numbers.dedup();
        assert_eq!(numbers.len(), 64);
    }

    #[test]
    fn a_call_does_not_depend_on_earlier_calls_and_does_not_allocate() {
        let mut options = options(0.8, 40, 0.9, 0.01);
        options.repetition_penalty = 1.2;
        let mut shared = Sampler::new(options, 300).unwrap();
        let capacity = shared.candidates.capacity();
        for position in 0..50 {
            let logits = random_logits(position, 300, 4.0);
            let history: Vec<u32> = (0..position as u32).map(|i| i * 37 % 300).collect();
            let uniform = uniform_at(5, 6, position);
            let (mut row, mut fresh_row) = (logits.clone(), logits.clone());
            let found = shared.sample(&mut row, &prompt(&history), uniform);
            let mut fresh = Sampler::new(options, 300).unwrap();
            assert_eq!(
                found,
                fresh.sample(&mut fresh_row, &prompt(&history), uniform)
            );
            assert_eq!(row, fresh_row);
            let left = shared
                .distribution(&mut logits.clone(), &prompt(&history))
                .unwrap();
            assert_eq!(found.clone().ok(), left.pick(uniform));
            let reversed: Vec<u32> = history.iter().rev().copied().collect();
            assert_eq!(found, sample(options, &logits, &reversed, uniform));
        }
        assert_eq!(shared.candidates.capacity(), capacity);
    }

    #[test]
    fn greedy_takes_the_lowest_of_the_best() {
        let logits = [1.0, 3.0, -INF, 3.0, 2.0];
        for uniform in [0.0, 0.5, 0.999] {
            assert_eq!(
                sample(SamplerOptions::greedy(), &logits, &[], uniform),
                Ok(1)
            );
        }
        let negative_zero = [-0.0, 0.0];
        assert_eq!(
            sample(SamplerOptions::greedy(), &negative_zero, &[], 0.0),
            Ok(0)
        );
    }

    #[test]
    fn a_tiny_temperature_is_almost_greedy() {
        let logits = [-f32::MAX, 1.0, 1.000_001, f32::MIN_POSITIVE];
        let cold = options(1e-45, 0, 1.0, 0.0);
        assert_eq!(reachable(cold, &logits), [2]);
    }

    #[test]
    fn top_k_keeps_exactly_k_and_ties_fall_to_low_ids() {
        let logits = [1.0, 2.0, 1.0, 2.0, 1.0];
        let expected: [&[u32]; 5] = [&[1], &[1, 3], &[0, 1, 3], &[0, 1, 2, 3], &[0, 1, 2, 3, 4]];
        for (k, expected) in (1..).zip(expected) {
            assert_eq!(reachable(options(1.0, k, 1.0, 0.0), &logits), expected);
        }
        let all = [0, 1, 2, 3, 4];
        for k in [0, 6, usize::MAX] {
            assert_eq!(reachable(options(1.0, k, 1.0, 0.0), &logits), all);
        }
    }

    #[test]
    fn top_p_keeps_the_fewest_that_reach_it_and_never_none() {
        // Probabilities are exactly 1/4 each.
        let level = [0.0; 4];
        let cases: [(f32, &[u32]); 6] = [
            (0.0, &[0]),
            (1e-30, &[0]),
            (0.25, &[0]),
            (0.5, &[0, 1]),
            (0.500_001, &[0, 1, 2]),
            (0.8, &[0, 1, 2, 3]),
        ];
        for (top_p, expected) in cases {
            assert_eq!(reachable(options(1.0, 0, top_p, 0.0), &level), expected);
        }
    }

    /// More candidates than the first sorted block, all tied.
    #[test]
    fn top_p_crosses_blocks() {
        let level = [0.0; 400];
        let kept = reachable(options(1.0, 0, 0.625, 0.0), &level);
        assert_eq!(kept, (0..250).collect::<Vec<u32>>());
    }

    #[test]
    fn min_p_keeps_its_bound_and_always_the_best() {
        let logits = [0.0, 0.5f32.ln(), 3.0, 3.0];
        assert_eq!(reachable(options(1.0, 0, 1.0, 1.0), &logits), [2, 3]);
        let kept = reachable(options(1.0, 0, 1.0, 0.04), &logits);
        assert_eq!(kept, [0, 2, 3], "exp(-3) = 0.0498 stays, half of it goes");
    }

    #[test]
    fn repetition_penalty_counts_a_token_once_and_has_two_signs() {
        let mut logits = [4.0, -4.0, 4.0, -INF, 0.0];
        let mut sampler = Sampler::new(penalty(2.0), 5).unwrap();
        let occurred = occurrences(&[1, 0, 0, 3, 4, 1, 0], 3);
        assert_eq!(sampler.sample(&mut logits, &occurred, 0.0), Ok(2));
        assert_eq!(logits, [2.0, -8.0, 4.0, -INF, 0.0]);
    }

    #[test]
    fn presence_and_frequency_penalties_count_what_was_generated() {
        let options = SamplerOptions {
            presence_penalty: 1.0,
            frequency_penalty: 0.25,
            ..SamplerOptions::greedy()
        };
        let occurred = occurrences(&[0, 1, 1, 2, 1, 2, 3], 3);
        assert_eq!(occurred, [(0, 0), (1, 1), (2, 2), (3, 1)]);
        let mut logits = [4.0, 4.0, 4.0, -INF, 3.0];
        let mut sampler = Sampler::new(options, 5).unwrap();
        assert_eq!(sampler.sample(&mut logits, &occurred, 0.0), Ok(0));
        assert_eq!(logits, [4.0, 2.75, 2.5, -INF, 3.0]);
    }

    #[test]
    fn an_extreme_penalty_makes_no_infinity() {
        let mut logits = [f32::MAX, -f32::MAX];
        let mut sampler = Sampler::new(penalty(1e-30), 2).unwrap();
        assert_eq!(sampler.sample(&mut logits, &prompt(&[0]), 0.0), Ok(0));
        assert_eq!(logits, [f32::MAX, -f32::MAX]);
        let only_negative = [-1e30, -INF];
        assert_eq!(sample(penalty(1e30), &only_negative, &[0], 0.0), Ok(0));
    }

    #[test]
    fn excluded_tokens_are_never_chosen() {
        let logits = [-INF, 0.0, -INF, -200.0, 0.0, -INF];
        let last = 1.0 - f64::EPSILON / 2.0;
        for options in [
            SamplerOptions::default(),
            SamplerOptions::greedy(),
            options(1.0, 4, 0.999, 0.0),
            options(1000.0, 6, 1.0, 0.0),
        ] {
            for token in reachable(options, &logits) {
                assert!(logits[token as usize].is_finite(), "{token} {options:?}");
            }
            let token = sample(options, &logits, &[], last).unwrap();
            assert!(logits[token as usize].is_finite(), "{token} {options:?}");
        }
        // The last candidate underflows to probability 0: the ends of the unit interval
        // give the first and the last token that has any.
        let underflow = [-1e9, 0.0, 0.0, -1e9];
        assert_eq!(
            sample(SamplerOptions::default(), &underflow, &[], 0.0),
            Ok(1)
        );
        assert_eq!(
            sample(SamplerOptions::default(), &underflow, &[], last),
            Ok(2)
        );
    }

    #[test]
    fn bad_arguments_are_named_and_leave_the_logits_alone() {
        let mut sampler = Sampler::new(penalty(2.0), 3).unwrap();
        let mut fails = |logits: &[f32], history: &[u32], uniform: f64| {
            let mut row = logits.to_vec();
            let error = sampler
                .sample(&mut row, &prompt(history), uniform)
                .unwrap_err();
            let bits = |row: &[f32]| row.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&row), bits(logits));
            error.to_string()
        };
        assert!(fails(&[1.0, 2.0], &[0], 0.5).contains("2 logits"));
        assert!(fails(&[1.0; 3], &[0, 3], 0.5).contains("token 3 of the history"));
        for uniform in [1.0, -1e-9, f64::NAN] {
            assert!(fails(&[1.0; 3], &[0], uniform).contains("uniform"));
        }
        assert!(fails(&[1.0, f32::NAN, 2.0], &[0], 0.5).contains("token 1 is NaN"));
        assert!(fails(&[1.0, 2.0, INF], &[0], 0.5).contains("token 2 is inf"));
        assert!(fails(&[-INF; 3], &[0], 0.5).contains("every token is excluded"));
    }

    #[test]
    fn options_outside_their_range_are_named() {
        let good = SamplerOptions::default();
        let check = |options: SamplerOptions, name: &str| {
            let error = Sampler::new(options, 4).unwrap_err();
            assert!(options.validate().is_err());
            assert!(error.to_string().starts_with(name), "{error}");
        };
        for value in [-0.1, f32::NAN, INF] {
            let temperature = value;
            check(
                SamplerOptions {
                    temperature,
                    ..good
                },
                "temperature is",
            );
            let top_p = value;
            check(SamplerOptions { top_p, ..good }, "top_p is");
            let min_p = value;
            check(SamplerOptions { min_p, ..good }, "min_p is");
            check(penalty(value), "repetition_penalty is");
        }
        check(penalty(0.0), "repetition_penalty is");
        check(SamplerOptions { top_p: 1.1, ..good }, "top_p is");
        check(SamplerOptions { min_p: 1.1, ..good }, "min_p is");
        let edges = options(0.0, usize::MAX, 0.0, 1.0);
        assert_eq!(edges.validate(), Ok(()));
        let error = Sampler::new(good, 0).unwrap_err();
        assert_eq!(error, SamplerError::VocabSize(0));
    }
}
