//! Beam search over a batch of prompts.
//!
//! # Rules
//! Each prompt has a pool of at most `K` beams; prompts do not influence each other.
//! A step extends every unfinished beam of the pool by its `(1 + E) K` likeliest tokens,
//! `E` end tokens among all; a beam whose last token is an end token is finished. Finished
//! beams stay in the pool as they are and compete. The new pool is the best `K` of all.
//!
//! A beam's log-probability is the plain sum of its tokens' and is never altered. Its score
//! is that sum over the length penalty of its generated tokens: the prompt does not count,
//! the end token does. Ties go to beams that had finished before the step, then in the
//! order of the pool they come from, then of token ids.
//!
//! # When it is over
//! A prompt is done when its whole pool is finished, when no unfinished beam can still
//! win, or at the token limit; results are the pool, best score first.
//!
//! Why [`Item::best_possible`] bounds what an unfinished beam can reach: its sum `s` can
//! only fall, since log-probabilities are at most 0, and so it ends with some `s' <= s <= 0`
//! at a length `n` of at most the limit `L`. The penalty `c(n)` is positive, and for
//! `alpha >= 0` it grows with `n`. So `s' / c(n) <= s / c(n) <= s / c(L)`: the score is at
//! most the present sum over the penalty at the limit. For `alpha < 0` the penalty falls
//! with the length and `s / c(n)` is largest at the smallest `n` that is left, one more
//! token than now. A finished beam that is at least as good stays ahead, because ties go
//! to finished beams.

use crate::engine::{Chunk, Engine, EngineError, Wanted};
use crate::generate::check_each;
use crate::kept;
use crate::kv::Sequence;
use setun_backend::CACHE_BLOCK;
use setun_backend::topk::{Candidate, Total};

/// What a sum of log-probabilities is divided by, for `n` generated tokens.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum LengthPenalty {
    /// `n ^ alpha` (Hugging Face).
    Power(f64),
    /// `((5 + n) / 6) ^ alpha` (Wu et al., 2016).
    Google(f64),
}

impl LengthPenalty {
    fn of(self, n: usize) -> f64 {
        match self {
            Self::Power(alpha) => libm::pow(n as f64, alpha),
            Self::Google(alpha) => libm::pow((5.0 + n as f64) / 6.0, alpha),
        }
    }

    fn grows(self) -> bool {
        match self {
            Self::Power(alpha) | Self::Google(alpha) => alpha >= 0.0,
        }
    }
}

/// What beams of a step are ranked by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Ranking {
    /// The score.
    #[default]
    Score,
    /// The sum of log-probabilities, as Hugging Face ranks running beams. Results are still
    /// sorted by score.
    Sum,
}

/// When a prompt with unfinished beams is done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EarlyStopping {
    /// When no unfinished beam can get ahead of the best finished one.
    #[default]
    Exact,
    /// When `K` beams have finished since the start, in the pool or not (Hugging Face:
    /// `True`).
    WhenFull,
    /// When no unfinished beam's present score is above that of the worst finished one of
    /// the pool (Hugging Face: `False`).
    Heuristic,
    /// When no unfinished beam can get ahead of the worst finished one of the pool (Hugging
    /// Face: `"never"`).
    Never,
}

/// How beams are searched.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BeamOptions {
    /// `K`, at least 1.
    pub num_beams: usize,
    /// Length penalty of the score.
    pub length_penalty: LengthPenalty,
    /// What beams are ranked by.
    pub ranking: Ranking,
    /// When to stop.
    pub early_stopping: EarlyStopping,
}

impl BeamOptions {
    /// `num_beams` beams, scored by `sum / n^0.6`.
    pub fn new(num_beams: usize) -> Self {
        Self {
            num_beams: num_beams.max(1),
            length_penalty: LengthPenalty::Power(0.6),
            ranking: Ranking::default(),
            early_stopping: EarlyStopping::default(),
        }
    }
}

/// A result.
#[derive(Clone, Debug, PartialEq)]
pub struct Hypothesis {
    /// The generated tokens, the end token included.
    pub tokens: Vec<u32>,
    /// Sum of their log-probabilities.
    pub sum: f64,
    /// The sum over the length penalty.
    pub score: f64,
    /// Whether it ends in an end token.
    pub is_finished: bool,
}

/// The search of one prompt, without a model: it asks for log-probabilities and says which
/// beams go on.
#[derive(Clone, Debug)]
pub struct Item {
    options: BeamOptions,
    end_tokens: Vec<u32>,
    max_tokens: usize,
    pool: Vec<Hypothesis>,
    num_finished: usize,
}

/// A beam of the pool after a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Origin {
    /// The beam of the pool before the step that it comes from.
    pub parent: usize,
    /// The token that was added; none for a beam that had finished.
    pub token: Option<u32>,
}

impl Item {
    /// One beam without tokens.
    pub fn new(options: BeamOptions, end_tokens: &[u32], max_tokens: usize) -> Self {
        let empty = Hypothesis {
            tokens: Vec::new(),
            sum: 0.0,
            score: 0.0,
            is_finished: false,
        };
        Self {
            options,
            end_tokens: end_tokens.to_vec(),
            max_tokens,
            pool: vec![empty],
            num_finished: 0,
        }
    }

    /// Tokens of each unfinished beam that a step looks at: `(1 + E) K`.
    pub fn num_candidates(&self) -> usize {
        (1 + self.end_tokens.len()).saturating_mul(self.options.num_beams)
    }

    /// The pool, in the order of the ranking.
    pub fn pool(&self) -> &[Hypothesis] {
        &self.pool
    }

    /// Replaces the pool. `candidates[i]` holds the likeliest tokens of beam `i` of the
    /// pool, best first, with their log-probabilities; finished beams have none.
    pub fn advance(&mut self, candidates: &[Vec<(u32, f64)>]) -> Vec<Origin> {
        let mut all: Vec<(Origin, f64, bool, usize)> = Vec::new();
        for (parent, beam) in self.pool.iter().enumerate() {
            let len = beam.tokens.len();
            if beam.is_finished {
                let origin = Origin {
                    parent,
                    token: None,
                };
                all.push((origin, beam.sum, true, len));
                continue;
            }
            for &(token, log_probability) in candidates[parent].iter().take(self.num_candidates()) {
                let origin = Origin {
                    parent,
                    token: Some(token),
                };
                let ends = self.end_tokens.contains(&token);
                all.push((origin, beam.sum + log_probability, ends, len + 1));
            }
        }
        let key = |sum: f64, len: usize| match self.options.ranking {
            Ranking::Score => self.score(sum, len),
            Ranking::Sum => sum,
        };
        all.sort_by(|a, b| {
            let order = key(b.1, b.3).total_cmp(&key(a.1, a.3));
            let place = |o: &Origin| (o.token.is_some(), o.parent, o.token);
            order.then_with(|| place(&a.0).cmp(&place(&b.0)))
        });
        all.truncate(self.options.num_beams);
        let next = all.iter().map(|&(origin, sum, is_finished, len)| {
            let mut tokens = self.pool[origin.parent].tokens.clone();
            tokens.extend(origin.token);
            Hypothesis {
                tokens,
                sum,
                score: self.score(sum, len),
                is_finished,
            }
        });
        let next = next.collect();
        let ended = all
            .iter()
            .filter(|(o, _, ends, _)| *ends && o.token.is_some());
        self.num_finished += ended.count();
        self.pool = next;
        all.iter().map(|&(origin, ..)| origin).collect()
    }

    /// Whether the search is over.
    pub fn is_done(&self) -> bool {
        let (finished, open): (Vec<_>, Vec<_>) = self.pool.iter().partition(|b| b.is_finished);
        let at_limit = open.iter().all(|b| b.tokens.len() >= self.max_tokens);
        if open.is_empty() || at_limit {
            return true;
        }
        let scores = || finished.iter().map(|b| b.score);
        let possible = open.iter().map(|b| self.best_possible(b));
        let possible = possible.fold(f64::NEG_INFINITY, f64::max);
        let present = open
            .iter()
            .map(|b| b.score)
            .fold(f64::NEG_INFINITY, f64::max);
        let best = scores().fold(f64::NEG_INFINITY, f64::max);
        let worst = scores().fold(f64::INFINITY, f64::min);
        match self.options.early_stopping {
            _ if finished.is_empty() && self.options.early_stopping != EarlyStopping::WhenFull => {
                false
            }
            EarlyStopping::Exact => possible <= best,
            EarlyStopping::WhenFull => self.num_finished >= self.options.num_beams,
            EarlyStopping::Heuristic => present <= worst,
            EarlyStopping::Never => possible <= worst,
        }
    }

    /// The results: the pool, best score first.
    pub fn into_results(mut self) -> Vec<Hypothesis> {
        self.pool.sort_by(|a, b| {
            let order = b.score.total_cmp(&a.score);
            order.then(b.is_finished.cmp(&a.is_finished))
        });
        self.pool
    }

    /// No continuation of `beam` has a better score; see the module's comment.
    pub fn best_possible(&self, beam: &Hypothesis) -> f64 {
        let len = match self.options.length_penalty.grows() {
            true => self.max_tokens,
            false => beam.tokens.len() + 1,
        };
        beam.sum / self.options.length_penalty.of(len)
    }

    fn score(&self, sum: f64, len: usize) -> f64 {
        sum / self.options.length_penalty.of(len)
    }
}

/// A prompt whose continuations are searched.
#[derive(Clone, Debug)]
pub struct BeamRequest {
    /// At least one token.
    pub prompt: Vec<u32>,
    /// Tokens that end a beam.
    pub end_tokens: Vec<u32>,
    /// Most tokens of a beam, the end token included.
    pub max_tokens: usize,
}

impl BeamRequest {
    /// Most blocks of the cache that it comes to hold with `num_beams` beams in a context of
    /// `context` positions, one to write aside for each beam included.
    pub fn most_blocks(&self, num_beams: usize, context: usize) -> usize {
        let tokens = self.prompt.len().saturating_add(self.max_tokens);
        let tokens = tokens.min(context);
        let shared = self.prompt.len().min(context) / CACHE_BLOCK;
        let of_beam = tokens.div_ceil(CACHE_BLOCK) - shared + 1;
        num_beams.saturating_mul(of_beam).saturating_add(shared)
    }
}

/// Tokens with their log-probabilities, likeliest first.
type LogProbabilities = Vec<(u32, f64)>;

/// A request on its way, with the sequence of each unfinished beam of its pool.
struct Active {
    index: usize,
    item: Item,
    sequences: Vec<Option<Sequence>>,
}

impl Engine {
    /// Searches all requests, as many at a time as the cache holds; for each its results,
    /// best first. They do not depend on the other requests.
    ///
    /// # Errors
    /// Before anything is computed [`EngineError::Request`] for the first one whose prompt has
    /// no tokens, too many, or one outside of the vocabulary. Logits that are no numbers; a
    /// request that is larger than the whole cache.
    pub fn beam_search(
        &mut self,
        requests: &[BeamRequest],
        options: BeamOptions,
    ) -> Result<Vec<Vec<Hypothesis>>, EngineError> {
        check_each(requests, |request| self.check_prompt(&request.prompt))?;
        let mut results = vec![Vec::new(); requests.len()];
        let mut next = 0;
        while next < requests.len() {
            let mut active: Vec<Active> = Vec::new();
            let mut room = self.tables().available();
            while let Some(request) = requests.get(next) {
                let blocks = request.most_blocks(options.num_beams, self.context());
                if !active.is_empty() && blocks > room {
                    break;
                }
                room = room.saturating_sub(blocks);
                let sequence = self.start(&request.prompt);
                let max_tokens = self
                    .context()
                    .saturating_sub(request.prompt.len())
                    .min(request.max_tokens);
                active.push(Active {
                    index: next,
                    item: Item::new(options, &request.end_tokens, max_tokens),
                    sequences: vec![Some(sequence)],
                });
                next += 1;
            }
            let searched = self.search(requests, &mut active, &mut results);
            for sequence in active.iter().flat_map(|a| a.sequences.iter().flatten()) {
                self.free(*sequence)?;
            }
            searched?;
        }
        Ok(results)
    }

    fn search(
        &mut self,
        requests: &[BeamRequest],
        active: &mut Vec<Active>,
        results: &mut [Vec<Hypothesis>],
    ) -> Result<(), EngineError> {
        loop {
            let mut i = 0;
            while i < active.len() {
                if !active[i].item.is_done() {
                    i += 1;
                    continue;
                }
                let done = active.remove(i);
                for sequence in done.sequences.iter().flatten() {
                    self.free(*sequence)?;
                }
                results[done.index] = done.item.into_results();
            }
            if active.is_empty() {
                return Ok(());
            }
            let candidates = self.candidates(requests, active)?;
            for (active, candidates) in active.iter_mut().zip(&candidates) {
                let origins = active.item.advance(candidates);
                self.follow(active, &origins)?;
            }
        }
    }

    /// The likeliest tokens of every unfinished beam: `[active][beam][candidate]`.
    fn candidates(
        &mut self,
        requests: &[BeamRequest],
        active: &[Active],
    ) -> Result<Vec<Vec<LogProbabilities>>, EngineError> {
        let mut beams = Vec::new();
        let mut k = 1;
        for (a, active) in active.iter().enumerate() {
            k = k.max(active.item.num_candidates());
            for (b, sequence) in active.sequences.iter().enumerate() {
                if let Some(sequence) = sequence {
                    let prompt = &requests[active.index].prompt;
                    let past = self.len(*sequence)?;
                    let tokens = [prompt, active.item.pool()[b].tokens.as_slice()].concat();
                    beams.push((a, b, *sequence, tokens[past..].to_vec()));
                }
            }
        }
        let chunks: Vec<Chunk<'_>> = beams
            .iter()
            .map(|(_, _, sequence, tokens)| Chunk {
                sequence: *sequence,
                tokens,
                parents: None,
                logits: Wanted::Last,
            })
            .collect();
        let sizes = active.iter().map(|a| vec![Vec::new(); a.sequences.len()]);
        let mut all: Vec<Vec<Vec<(u32, f64)>>> = sizes.collect();
        let mut failed = None;
        let mut keep = |chunk: usize, _: usize, best: &[Candidate], total: Total| {
            let (a, b, ..) = beams[chunk];
            let n = active[a].item.num_candidates();
            match kept::best_of(best, total) {
                Ok(_) => all[a][b] = log_probabilities(&best[..n.min(best.len())], total),
                Err(error) => {
                    failed.get_or_insert(error);
                }
            }
        };
        self.step_topk(&chunks, k, &[], &mut keep)?;
        match failed {
            Some(error) => Err(error.into()),
            None => Ok(all),
        }
    }

    /// Gives each beam of the new pool its sequence: the first child of a beam takes over
    /// its sequence, others get forks, and what nobody needs is freed.
    fn follow(&mut self, active: &mut Active, origins: &[Origin]) -> Result<(), EngineError> {
        let mut sequences = vec![None; origins.len()];
        let mut taken = vec![false; active.sequences.len()];
        for (i, origin) in origins.iter().enumerate() {
            let Some(sequence) = active.sequences[origin.parent] else {
                continue;
            };
            if active.item.pool()[i].is_finished {
                continue;
            }
            sequences[i] = Some(match std::mem::replace(&mut taken[origin.parent], true) {
                false => sequence,
                true => self.fork(sequence)?,
            });
        }
        for (sequence, taken) in active.sequences.iter().zip(taken) {
            if let (Some(sequence), false) = (sequence, taken) {
                self.free(*sequence)?;
            }
        }
        active.sequences = sequences;
        Ok(())
    }
}

/// Log-probabilities of candidates; excluded tokens have none.
fn log_probabilities(candidates: &[Candidate], total: Total) -> Vec<(u32, f64)> {
    let each = candidates.iter().filter(|c| c.value > f32::NEG_INFINITY);
    each.map(|c| (c.id, total.log_probability(c.value)))
        .collect()
}

#[cfg(test)]
mod tests;
