//! Continuing prompts: one, or many at a time.

use crate::engine::{Chunk, Engine, EngineError, Shaped, Wanted};
use crate::kept::{choose, needed, shaping};
use crate::kv::Sequence;
use crate::sampler::{Sampler, SamplerOptions, uniform_at};
use crate::stop::{FinishReason, StopRules};
use setun_backend::CACHE_BLOCK;

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
}

/// What was generated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Generation {
    /// The new tokens; an end token is not among them.
    pub tokens: Vec<u32>,
    /// Why it ended.
    pub reason: FinishReason,
}

/// A request on its way.
pub(crate) struct Active {
    index: usize,
    pub(crate) sequence: Sequence,
    /// Prompt and text.
    pub(crate) history: Vec<u32>,
}

impl Engine {
    /// Continues `request`: the same seed, request and options give the same tokens,
    /// whatever else the engine computes. `on_token` sees each token as it comes.
    ///
    /// # Errors
    /// What [`step`](Engine::step) and the sampler refuse.
    pub fn generate(
        &mut self,
        request: &Request,
        mut on_token: impl FnMut(u32),
    ) -> Result<Generation, EngineError> {
        let requests = std::slice::from_ref(request);
        let all = self.generate_batch(requests, |_, token| on_token(token))?;
        all.into_iter().next().ok_or(EngineError::EmptyPrompt)
    }

    /// Continues all `requests`, as many at a time as the cache holds, in their order. The
    /// result of one does not depend on the others. `on_token` sees the number of the
    /// request with each token.
    ///
    /// # Errors
    /// What [`step`](Engine::step) and the sampler refuse; a request that is larger than
    /// the whole cache.
    pub fn generate_batch(
        &mut self,
        requests: &[Request],
        mut on_token: impl FnMut(usize, u32),
    ) -> Result<Vec<Generation>, EngineError> {
        let mut active = Vec::new();
        let done = self.continue_all(requests, &mut active, &mut on_token);
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
        on_token: &mut impl FnMut(usize, u32),
    ) -> Result<Vec<Generation>, EngineError> {
        let mut done: Vec<Option<Generation>> = vec![None; requests.len()];
        // Made where the whole row of logits is needed.
        let mut samplers = vec![None; requests.len()];
        let (mut next, mut promised) = (0, 0);
        while next < requests.len() || !active.is_empty() {
            while let Some(request) = requests.get(next) {
                let blocks = self.blocks_of(request);
                let total = self.tables().available() + self.held(active);
                if !active.is_empty() && promised + blocks > total {
                    break;
                }
                promised += blocks;
                active.push(self.admit(next, request)?);
                next += 1;
            }
            self.step_all(requests, active, &mut samplers, on_token)?;
            let mut still = Vec::new();
            for request in active.drain(..) {
                let wanted = &requests[request.index];
                match self.end_of(wanted, &request) {
                    None => still.push(request),
                    Some(generation) => {
                        promised -= self.blocks_of(wanted);
                        done[request.index] = Some(generation);
                        self.free(request.sequence)?;
                    }
                }
            }
            *active = still;
        }
        Ok(done.into_iter().flatten().collect())
    }

    /// Most blocks that a request comes to hold.
    fn blocks_of(&self, request: &Request) -> usize {
        let tokens = request.prompt.len().saturating_add(request.stop.max_tokens);
        tokens.min(self.context()).div_ceil(CACHE_BLOCK)
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
        request.sampler.validate()?;
        let found = request.prompt.len();
        if found == 0 {
            return Err(EngineError::EmptyPrompt);
        }
        if found > self.context() {
            let context = self.context();
            return Err(EngineError::TooLong { found, context });
        }
        Ok(Active {
            index,
            sequence: self.start(&request.prompt),
            history: request.prompt.clone(),
        })
    }

    /// One step: what is missing of each history, then one new token for each request
    /// that has not ended.
    fn step_all(
        &mut self,
        requests: &[Request],
        active: &mut [Active],
        samplers: &mut [Option<Sampler>],
        on_token: &mut impl FnMut(usize, u32),
    ) -> Result<(), EngineError> {
        let mut running = Vec::new();
        for (i, request) in active.iter().enumerate() {
            if self.end_of(&requests[request.index], request).is_none() {
                running.push((i, self.len(request.sequence)?));
            }
        }
        let chunks: Vec<Chunk<'_>> = running
            .iter()
            .map(|&(i, past)| Chunk {
                sequence: active[i].sequence,
                tokens: &active[i].history[past..],
                parents: None,
                logits: Wanted::Last,
            })
            .collect();
        let uniforms: Vec<f64> = running
            .iter()
            .map(|&(i, _)| {
                let (seed, request) = requests[active[i].index].seed;
                uniform_at(seed, request, active[i].history.len() as u64)
            })
            .collect();
        let options = |c: usize| requests[active[running[c].0].index].sampler;
        let needed: Option<Vec<usize>> = (0..chunks.len()).map(|c| needed(&options(c))).collect();
        let mut chosen = vec![Ok(0); chunks.len()];
        if let Some(k) = needed.and_then(|needed| needed.into_iter().max()) {
            let shaped: Vec<Shaped> = (0..chunks.len())
                .map(|c| shaped(&options(c), &active[running[c].0].history))
                .collect();
            self.step_topk(&chunks, k, &shaped, &mut |c, _, best, total| {
                chosen[c] = choose(&options(c), best, total, uniforms[c]);
            })?;
        } else {
            let vocab_size = self.spec().config.vocab_size;
            for (c, &(i, _)) in running.iter().enumerate() {
                let sampler = &mut samplers[active[i].index];
                if sampler.is_none() {
                    *sampler = Some(Sampler::new(options(c), vocab_size)?);
                }
            }
            self.step(&chunks, &mut |c, _, logits| {
                let request = &active[running[c].0];
                if let Some(sampler) = &mut samplers[request.index] {
                    chosen[c] = sampler.sample(logits, &request.history, uniforms[c]);
                }
            })?;
        }
        drop(chunks);
        for (&(i, _), token) in running.iter().zip(chosen) {
            let (request, token) = (&mut active[i], token?);
            request.history.push(token);
            if !requests[request.index].stop.end_tokens.contains(&token) {
                on_token(request.index, token);
            }
        }
        Ok(())
    }

    pub(crate) fn end_of(&self, request: &Request, active: &Active) -> Option<Generation> {
        let num_prompt = request.prompt.len();
        let generated = &active.history[num_prompt..];
        let reason = request
            .stop
            .finish_reason(generated, num_prompt, self.context())?;
        let mut tokens = generated.to_vec();
        if matches!(reason, FinishReason::EndToken(_)) {
            tokens.pop();
        }
        Some(Generation { tokens, reason })
    }
}

/// Penalties with what they count, where there are any.
fn shaped(options: &SamplerOptions, history: &[u32]) -> Shaped {
    if options.repetition_penalty == 1.0 {
        return Shaped::default();
    }
    Shaped::new(shaping(options), history)
}
