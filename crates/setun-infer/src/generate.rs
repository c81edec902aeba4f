//! Continuing prompts: one, or many at a time.

use crate::engine::{Chunk, Engine, EngineError, Shaped, Wanted, occurrences};
use crate::kept::{choose, needed, shaping};
use crate::kv::Sequence;
use crate::logprobs::{Row, TokenLogprobs};
use crate::sampler::{Sampler, SamplerOptions, uniform_at};
use crate::stop::{FinishReason, StopRules};
use setun_backend::CACHE_BLOCK;
use std::ops::ControlFlow;

/// A prompt with what is wanted of it.
#[derive(Clone, Debug)]
pub struct Request {
    /// At least one token.
    pub prompt: Vec<u32>,
    /// How tokens are chosen.
    pub sampler: SamplerOptions,
    /// When it ends.
    pub stop: StopRules,
    /// Seed and number of the request: with the position they choose each token.
    pub seed: (u64, u64),
    /// Whether log-probabilities are wanted, and of how many of the likeliest tokens beside
    /// the chosen one.
    pub logprobs: Option<usize>,
}

/// What was generated.
#[derive(Clone, Debug, PartialEq)]
pub struct Generation {
    /// The new tokens; an end token is not among them.
    pub tokens: Vec<u32>,
    /// Why it ended.
    pub reason: FinishReason,
    /// Of each token, if [`Request::logprobs`] asked for them.
    pub logprobs: Vec<TokenLogprobs>,
}

/// What a caller says to a token: nothing, or whether the text goes on.
pub trait Answer {
    /// Break to end the text with this token.
    fn flow(self) -> ControlFlow<()>;
}

impl Answer for () {
    fn flow(self) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }
}

impl Answer for ControlFlow<()> {
    fn flow(self) -> ControlFlow<()> {
        self
    }
}

impl Request {
    /// Most blocks of the cache that it comes to hold in a context of `context` positions.
    pub fn most_blocks(&self, context: usize) -> usize {
        let tokens = self.prompt.len().saturating_add(self.stop.max_tokens);
        tokens.min(context).div_ceil(CACHE_BLOCK)
    }
}

/// A request on its way.
pub(crate) struct Active {
    index: usize,
    pub(crate) sequence: Sequence,
    /// Prompt and text.
    pub(crate) history: Vec<u32>,
    num_prompt: usize,
    /// Of each token of the text, if they are wanted.
    pub(crate) logprobs: Vec<TokenLogprobs>,
    /// Whether the caller wants no more of it.
    pub(crate) is_stopped: bool,
}

impl Active {
    /// What penalties count; nothing where there are none.
    pub(crate) fn occurred(&self, options: &SamplerOptions) -> Vec<(u32, u32)> {
        match options.penalises() {
            true => occurrences(&self.history, self.num_prompt),
            false => Vec::new(),
        }
    }

    /// Penalties with what they count.
    pub(crate) fn shaped(&self, options: &SamplerOptions) -> Shaped {
        match options.penalises() {
            true => Shaped::new(shaping(options), &self.history, self.num_prompt),
            false => Shaped::default(),
        }
    }
}

impl Engine {
    /// Continues `request`: the same seed, request and options give the same tokens,
    /// whatever else the engine computes. `on_token` sees each token as it comes, but for one
    /// of the end tokens of [`StopRules`], and may end the text with it.
    ///
    /// # Errors
    /// What [`step`](Engine::step) and the sampler refuse.
    pub fn generate<A: Answer>(
        &mut self,
        request: &Request,
        mut on_token: impl FnMut(u32) -> A,
    ) -> Result<Generation, EngineError> {
        // Here, where the error need not say which request.
        self.check_request(request)?;
        let requests = std::slice::from_ref(request);
        let all = self.generate_batch(requests, |_, token| on_token(token))?;
        all.into_iter().next().ok_or(EngineError::EmptyPrompt)
    }

    /// Continues all `requests`, as many at a time as the cache holds, in their order. The
    /// result of one does not depend on the others. `on_token` sees the index of the
    /// request with each token, and may end that request's text with it.
    ///
    /// # Errors
    /// What [`check_requests`](Engine::check_requests) refuses, before anything is computed;
    /// logits that are no numbers; a request that is larger than the whole cache.
    pub fn generate_batch<A: Answer>(
        &mut self,
        requests: &[Request],
        mut on_token: impl FnMut(usize, u32) -> A,
    ) -> Result<Vec<Generation>, EngineError> {
        self.check_requests(requests)?;
        let mut active = Vec::new();
        let done = self.continue_all(requests, &mut active, &mut |index, token| {
            on_token(index, token).flow()
        });
        // Nothing is left behind, also after an error.
        for request in &active {
            self.free(request.sequence)?;
        }
        done
    }

    fn continue_all(
        &mut self,
        requests: &[Request],
        active: &mut Vec<Active>,
        on_token: &mut dyn FnMut(usize, u32) -> ControlFlow<()>,
    ) -> Result<Vec<Generation>, EngineError> {
        let mut done: Vec<Option<Generation>> = vec![None; requests.len()];
        // Made where the whole row of logits is needed; its scratch serves all requests.
        let mut sampler = None;
        let (mut next, mut promised) = (0, 0);
        while next < requests.len() || !active.is_empty() {
            while let Some(request) = requests.get(next) {
                let blocks = request.most_blocks(self.context());
                let total = self.tables().available() + self.held(active);
                if !active.is_empty() && promised + blocks > total {
                    break;
                }
                promised += blocks;
                active.push(self.admit(next, request)?);
                next += 1;
            }
            self.step_all(requests, active, &mut sampler, on_token)?;
            let mut still = Vec::new();
            for request in active.drain(..) {
                let wanted = &requests[request.index];
                match self.end_of(wanted, &request) {
                    None => still.push(request),
                    Some(generation) => {
                        promised -= wanted.most_blocks(self.context());
                        done[request.index] = Some(generation);
                        self.free(request.sequence)?;
                    }
                }
            }
            *active = still;
        }
        Ok(done.into_iter().flatten().collect())
    }

    /// Whether all `requests` can be continued by this engine; computes nothing.
    ///
    /// # Errors
    /// [`EngineError::Request`] for the first one whose prompt has no tokens, too many, or one
    /// outside of the vocabulary, or whose sampling options are out of range.
    pub fn check_requests(&self, requests: &[Request]) -> Result<(), EngineError> {
        check_each(requests, |request| self.check_request(request))
    }

    fn check_request(&self, request: &Request) -> Result<(), EngineError> {
        request.sampler.validate()?;
        self.check_prompt(&request.prompt)
    }

    pub(crate) fn check_prompt(&self, prompt: &[u32]) -> Result<(), EngineError> {
        let (found, context) = (prompt.len(), self.context());
        if found == 0 {
            return Err(EngineError::EmptyPrompt);
        }
        if found > context {
            return Err(EngineError::TooLong { found, context });
        }
        let vocab_size = self.spec().config.vocab_size;
        match prompt.iter().find(|&&token| token as usize >= vocab_size) {
            Some(&token) => Err(EngineError::BadToken { token, vocab_size }),
            None => Ok(()),
        }
    }

    /// Blocks that the active requests hold; shared ones count once.
    fn held(&self, active: &[Active]) -> usize {
        let blocks = active
            .iter()
            .filter_map(|a| self.tables().blocks(a.sequence).ok());
        let mut all: Vec<u32> = blocks.flatten().copied().collect();
        all.sort_unstable();
        all.dedup();
        all.len()
    }

    pub(crate) fn admit(&mut self, index: usize, request: &Request) -> Result<Active, EngineError> {
        self.check_request(request)?;
        Ok(Active {
            index,
            sequence: self.start(&request.prompt),
            history: request.prompt.clone(),
            num_prompt: request.prompt.len(),
            logprobs: Vec::new(),
            is_stopped: false,
        })
    }

    /// One step: what is missing of each history, then one new token for each request
    /// that has not ended.
    fn step_all(
        &mut self,
        requests: &[Request],
        active: &mut [Active],
        sampler: &mut Option<Sampler>,
        on_token: &mut dyn FnMut(usize, u32) -> ControlFlow<()>,
    ) -> Result<(), EngineError> {
        let mut running = Vec::new();
        for (i, request) in active.iter().enumerate() {
            if self.end_of(&requests[request.index], request).is_none() {
                running.push((i, self.len(request.sequence)?));
            }
        }
        if running.is_empty() {
            return Ok(());
        }
        let chunk = |&(i, past): &(usize, usize)| Chunk {
            sequence: active[i].sequence,
            tokens: &active[i].history[past..],
            parents: None,
            logits: Wanted::Last,
        };
        let chunks: Vec<Chunk<'_>> = running.iter().map(chunk).collect();
        let uniform = |&(i, _): &(usize, usize)| {
            let (seed, request) = requests[active[i].index].seed;
            uniform_at(seed, request, active[i].history.len() as u64)
        };
        let uniforms: Vec<f64> = running.iter().map(uniform).collect();
        let options = |c: usize| requests[active[running[c].0].index].sampler;
        let logprobs = |c: usize| requests[active[running[c].0].index].logprobs;
        let needed = (0..chunks.len())
            .map(|c| needed(&options(c)).map(|k| k.max(logprobs(c).unwrap_or(0))))
            .collect::<Option<Vec<usize>>>();
        let mut chosen = vec![Ok(0); chunks.len()];
        let mut rows: Vec<Option<Row>> = chunks.iter().map(|_| None).collect();
        if let Some(k) = needed.and_then(|needed| needed.into_iter().max()) {
            let shaped: Vec<Shaped> = (0..chunks.len())
                .map(|c| active[running[c].0].shaped(&options(c)))
                .collect();
            self.step_topk(&chunks, k, &shaped, &mut |c, _, best, total| {
                chosen[c] = choose(&options(c), best, total, uniforms[c]);
                rows[c] = logprobs(c).map(|_| Row::Kept(best.to_vec(), total));
            })?;
        } else {
            let vocab_size = self.spec().config.vocab_size;
            let sampler = match sampler {
                Some(sampler) => sampler,
                None => sampler.insert(Sampler::new(options(0), vocab_size)?),
            };
            self.step(&chunks, &mut |c, _, logits| {
                let occurred = active[running[c].0].occurred(&options(c));
                sampler.set_options(options(c));
                chosen[c] = sampler.sample(logits, &occurred, uniforms[c]);
                rows[c] = logprobs(c).map(|_| Row::Whole(logits.to_vec()));
            })?;
        }
        drop(chunks);
        for ((&(i, _), token), row) in running.iter().zip(chosen).zip(rows) {
            let (request, token) = (&mut active[i], token?);
            request.history.push(token);
            if let (Some(row), Some(num_top)) = (row, requests[request.index].logprobs) {
                request.logprobs.push(row.of(token, num_top));
            }
            if !requests[request.index].stop.end_tokens.contains(&token) {
                request.is_stopped = on_token(request.index, token).is_break();
            }
        }
        Ok(())
    }

    pub(crate) fn end_of(&self, request: &Request, active: &Active) -> Option<Generation> {
        let num_prompt = request.prompt.len();
        let generated = &active.history[num_prompt..];
        let rules = &request.stop;
        let reason = rules.finish_reason(generated, num_prompt, self.context());
        let reason = reason.or(active.is_stopped.then_some(FinishReason::Stopped))?;
        let mut tokens = generated.to_vec();
        if matches!(reason, FinishReason::EndToken(_)) {
            tokens.pop();
        }
        let logprobs = active.logprobs.iter().take(tokens.len());
        Some(Generation {
            logprobs: logprobs.cloned().collect(),
            tokens,
            reason,
        })
    }
}

/// Checks requests one by one, and names the first that is refused.
pub(crate) fn check_each<T>(
    requests: &[T],
    check: impl Fn(&T) -> Result<(), EngineError>,
) -> Result<(), EngineError> {
    for (request, number) in requests.iter().zip(1..) {
        check(request).map_err(|error| EngineError::Request {
            number,
            source: Box::new(error),
        })?;
    }
    Ok(())
}
