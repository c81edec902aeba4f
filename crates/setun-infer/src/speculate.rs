//! Generation with drafts: guess, verify all guesses in one step, keep what is right.
//!
//! The text is the one that [`Engine::generate`] gives, token for token: a row's logits do
//! not depend on the rows beside it, a node's row attends to its path in the order of
//! positions, each position has its own random number, and penalties count the tokens of a
//! node's own path. Only drafts whose tokens are draws ([`Draft::proposals`]) give other
//! texts than plain sampling, of the same distribution.

use crate::distribution::Distribution;
use crate::draft::{Budget, Draft, DraftTree, Drafter, MAX_NODES, Target};
use crate::engine::{Chunk, Engine, EngineError, Wanted, occurrences};
use crate::generate::{Active, Answer, Generation, Request};
use crate::kept::{self, needed};
use crate::logprobs::Row;
use crate::plan::{Cycle, Planner};
use crate::sampler::{Sampler, SamplerError, uniform_at, uniform_draw};
use crate::verify::{DraftStats, Walk, walk, walk_rejecting};
use setun_backend::{CACHE_BLOCK, ROOT};
use std::ops::ControlFlow;

/// How large trees are.
#[derive(Clone, Debug)]
pub enum TreeSize {
    /// As large as the drafter makes them within this.
    Fixed(Budget),
    /// As large as pays.
    Adaptive(Box<Planner>),
}

/// Seconds since any fixed moment. They choose the size of trees and nothing else.
pub type Clock<'a> = dyn FnMut() -> f64 + 'a;

/// What a generation with drafts needs beside the request; it may serve one request after
/// another.
pub struct Speculator<'a> {
    /// Where guesses come from.
    pub drafter: &'a mut dyn Drafter,
    /// How large trees are.
    pub size: TreeSize,
    /// Times steps; only [`TreeSize::Adaptive`] asks it.
    pub clock: &'a mut Clock<'a>,
    /// What became of the drafts so far.
    pub stats: DraftStats,
}

impl<'a> Speculator<'a> {
    /// With trees as large as pays.
    pub fn new(drafter: &'a mut dyn Drafter, clock: &'a mut Clock<'a>) -> Self {
        let planner = Planner::default().expecting(|class| drafter.prior(class));
        Self {
            drafter,
            size: TreeSize::Adaptive(Box::new(planner)),
            clock,
            stats: DraftStats::default(),
        }
    }

    fn time(&mut self) -> f64 {
        match self.size {
            TreeSize::Fixed(_) => 0.0,
            TreeSize::Adaptive(_) => (self.clock)(),
        }
    }

    /// A draft for a step with `room`: as it was made, and the part to verify.
    fn draft(
        &mut self,
        target: Target<'_>,
        context: &[u32],
        room: Budget,
    ) -> Result<Drafted, EngineError> {
        let budget = match &mut self.size {
            TreeSize::Fixed(budget) => budget.min(room),
            TreeSize::Adaptive(planner) => planner.budget(room),
        };
        let mut drafted = Drafted {
            depth: budget.depth,
            ..Drafted::default()
        };
        if budget.is_empty() {
            return Ok(drafted);
        }
        let start = self.time();
        let whole = self.drafter.draft(target, context, budget)?.cut(budget);
        drafted.seconds = self.time() - start;
        match &self.size {
            TreeSize::Fixed(_) => drafted.verified = whole,
            TreeSize::Adaptive(planner) => {
                let chosen = planner.choose(&whole, drafted.seconds);
                drafted.verified = whole.keep(|node| chosen[node]);
                drafted.whole = Some(whole);
            }
        }
        Ok(drafted)
    }
}

#[derive(Default)]
struct Drafted {
    whole: Option<Draft>,
    verified: Draft,
    depth: usize,
    seconds: f64,
}

/// What the target says in each row of a step.
enum Said {
    /// Tokens, chosen with the position's own random number.
    Chosen(Vec<u32>),
    /// What tokens are to be drawn from.
    Left(Vec<Distribution>),
}

impl Engine {
    /// Continues `request` as [`generate`](Self::generate) does, with drafts.
    ///
    /// # Errors
    /// As [`generate`](Self::generate); a drafter's errors; a draft with a token outside of
    /// the vocabulary.
    pub fn speculate<A: Answer>(
        &mut self,
        request: &Request,
        speculator: &mut Speculator<'_>,
        mut on_token: impl FnMut(u32) -> A,
    ) -> Result<Generation, EngineError> {
        let mut active = self.admit(0, request)?;
        if let TreeSize::Adaptive(planner) = &mut speculator.size {
            planner.begin_text();
        }
        let done = self.cycles(request, &mut active, speculator, &mut |token| {
            on_token(token).flow()
        });
        self.free(active.sequence)?;
        done
    }

    fn cycles(
        &mut self,
        request: &Request,
        active: &mut Active,
        speculator: &mut Speculator<'_>,
        on_token: &mut dyn FnMut(u32) -> ControlFlow<()>,
    ) -> Result<Generation, EngineError> {
        let mut sampler = None;
        loop {
            if let Some(generation) = self.end_of(request, active) {
                return Ok(generation);
            }
            self.catch_up(active)?;
            let room = self.room(request, active)?;
            let target = Target {
                sequence: active.sequence,
                engine: &mut *self,
            };
            let drafted = speculator.draft(target, &active.history, room)?;
            let start = speculator.time();
            let (said, rows) = self.verify(request, active, &drafted.verified, &mut sampler)?;
            let (mut walk, chosen) = said.walk(request, active, &drafted.verified);
            let tree = &drafted.verified.tree;
            let emitted = self.keep(request, active, tree, &walk)?;
            let step_seconds = speculator.time() - start;
            // What is done with the tokens is not the step's time.
            let emitted = tell(request, active, (&walk, &rows), emitted, on_token);
            walk.accepted.truncate(emitted);
            speculator.stats.add(tree, &chosen, &walk, emitted);
            if active.is_stopped {
                continue;
            }
            let new = active.history.len() - emitted;
            if let TreeSize::Adaptive(planner) = &mut speculator.size {
                planner.observe(Cycle {
                    draft: drafted.whole.as_ref(),
                    depth: drafted.depth,
                    draft_seconds: drafted.seconds,
                    rows: 1 + tree.len(),
                    step_seconds,
                    tokens: &active.history[new..],
                });
            }
        }
    }

    /// Computes what the cache lacks of the text, but for the last token.
    fn catch_up(&mut self, active: &Active) -> Result<(), EngineError> {
        let past = self.len(active.sequence)?;
        let missing = &active.history[past..active.history.len() - 1];
        if missing.is_empty() {
            return Ok(());
        }
        let chunk = Chunk {
            sequence: active.sequence,
            tokens: missing,
            parents: None,
            logits: Wanted::Nothing,
        };
        self.step(&[chunk], &mut |_, _, _| {})
    }

    /// What fits behind the last token: into a call, into the context, into the free blocks
    /// of the cache, and no path that would go beyond the end of the text.
    fn room(&self, request: &Request, active: &Active) -> Result<Budget, EngineError> {
        let len = active.history.len();
        let blocks = self.tables().blocks(active.sequence)?.len() + self.tables().available();
        let slots = self.context().min(blocks * CACHE_BLOCK);
        let generated = len - request.prompt.len();
        let left = request.stop.max_tokens - generated;
        let left = left.min(self.context() - len);
        let nodes = slots.saturating_sub(len).min(self.max_rows() - 1);
        Ok(Budget {
            nodes: nodes.min(MAX_NODES),
            depth: left - 1,
            width: MAX_NODES,
        })
    }

    /// One step for the last token and the tree behind it; with what is left of each row,
    /// where log-probabilities are wanted.
    fn verify(
        &mut self,
        request: &Request,
        active: &Active,
        draft: &Draft,
        sampler: &mut Option<Sampler>,
    ) -> Result<(Said, Vec<Row>), EngineError> {
        let tree = &draft.tree;
        let mut tokens = active.history[active.history.len() - 1..].to_vec();
        tokens.extend_from_slice(tree.tokens());
        let mut parents = vec![ROOT];
        let below = |&parent: &u32| if parent == ROOT { 0 } else { parent + 1 };
        parents.extend(tree.parents().iter().map(below));
        let chunk = Chunk {
            sequence: active.sequence,
            tokens: &tokens,
            parents: (!tree.is_empty()).then_some(&parents),
            logits: Wanted::All,
        };
        let draws = !draft.proposals.is_empty() && request.sampler.temperature != 0.0;
        let mut rows = Rows {
            request,
            active,
            tree,
            said: match draws {
                true => Said::Left(Vec::new()),
                false => Said::Chosen(Vec::new()),
            },
            failed: None,
            kept: Vec::new(),
        };
        let options = &request.sampler;
        let alike = !options.penalises() || tree.is_empty();
        match needed(options).filter(|_| alike) {
            Some(k) => {
                let k = k.max(request.logprobs.unwrap_or(0));
                let shaped = active.shaped(options);
                self.step_topk(&[chunk], k, &[shaped], &mut |_, row, best, total| {
                    rows.keep(|| Row::Kept(best.to_vec(), total));
                    rows.add(row, |uniform| match uniform {
                        None => kept::distribution(options, best, total).map(Choice::Left),
                        Some(u) => kept::choose(options, best, total, u).map(Choice::Token),
                    });
                })?;
            }
            None => {
                let vocab_size = self.spec().config.vocab_size;
                let sampler = match sampler {
                    Some(sampler) => sampler,
                    None => sampler.insert(Sampler::new(*options, vocab_size)?),
                };
                self.step(&[chunk], &mut |_, row, logits| {
                    let occurred = rows.occurred(row);
                    rows.add(row, |uniform| match uniform {
                        None => sampler.distribution(logits, &occurred).map(Choice::Left),
                        Some(u) => sampler.sample(logits, &occurred, u).map(Choice::Token),
                    });
                    rows.keep(|| Row::Whole(logits.to_vec()));
                })?;
            }
        }
        match rows.failed {
            Some(error) => Err(error.into()),
            None => Ok((rows.said, rows.kept)),
        }
    }

    /// Adds a walk to the text, up to where that ends, and keeps its rows in the cache; the
    /// number of tokens.
    fn keep(
        &mut self,
        request: &Request,
        active: &mut Active,
        tree: &DraftTree,
        walk: &Walk,
    ) -> Result<usize, EngineError> {
        let mut emitted = 0;
        for token in walk.tokens(tree) {
            active.history.push(token);
            emitted += 1;
            if self.end_of(request, active).is_some() {
                break;
            }
        }
        if !tree.is_empty() {
            let path: Vec<usize> = rows_of(walk).take(1 + emitted).collect();
            self.commit(active.sequence, &path)?;
        }
        Ok(emitted)
    }
}

/// Hands over the last `emitted` tokens of the text, which come from the first rows of the
/// walk, with their log-probabilities where those are wanted; how many stay: what follows the
/// one that the caller ends the text with is taken back.
fn tell(
    request: &Request,
    active: &mut Active,
    (walk, rows): (&Walk, &[Row]),
    emitted: usize,
    on_token: &mut dyn FnMut(u32) -> ControlFlow<()>,
) -> usize {
    let first = active.history.len() - emitted;
    for (at, row) in (first..active.history.len()).zip(rows_of(walk)) {
        let token = active.history[at];
        if let (Some(num_top), Some(row)) = (request.logprobs, rows.get(row)) {
            active.logprobs.push(row.of(token, num_top));
        }
        if !request.stop.end_tokens.contains(&token) && on_token(token).is_break() {
            active.is_stopped = true;
            active.history.truncate(at + 1);
            return at + 1 - first;
        }
    }
    emitted
}

/// Rows of the accepted path: the last token of the text, then nodes.
fn rows_of(walk: &Walk) -> impl Iterator<Item = usize> + '_ {
    let nodes = walk.accepted.iter().map(|&node| node + 1);
    std::iter::once(0).chain(nodes)
}

impl Said {
    /// The accepted path, and the token that was chosen in each row, for the statistics.
    fn walk(self, request: &Request, active: &Active, draft: &Draft) -> (Walk, Vec<u32>) {
        let (seed, number) = request.seed;
        let len = active.history.len();
        match self {
            Self::Chosen(chosen) => (walk(&draft.tree, &chosen), chosen),
            Self::Left(left) => {
                let mut uniform =
                    |depth: usize, draw| uniform_draw(seed, number, (len + depth) as u64, draw);
                let walk = walk_rejecting(draft, &left, &mut uniform);
                let best = left.iter().filter_map(Distribution::best).collect();
                (walk, best)
            }
        }
    }
}

/// What the target says in one row.
enum Choice {
    Token(u32),
    Left(Distribution),
}

/// Collects what the target says, row by row.
struct Rows<'a> {
    request: &'a Request,
    active: &'a Active,
    tree: &'a DraftTree,
    said: Said,
    failed: Option<SamplerError>,
    /// The rows, where log-probabilities are wanted.
    kept: Vec<Row>,
}

impl Rows<'_> {
    /// What penalties count of the tokens that a row of the step has before it.
    fn occurred(&self, row: usize) -> Vec<(u32, u32)> {
        if !self.request.sampler.penalises() {
            return Vec::new();
        }
        let path = row.checked_sub(1).map(|node| self.tree.path(node));
        let history = [&self.active.history, path.unwrap_or_default().as_slice()].concat();
        occurrences(&history, self.request.prompt.len())
    }

    fn keep(&mut self, row: impl FnOnce() -> Row) {
        if self.request.logprobs.is_some() {
            self.kept.push(row());
        }
    }

    /// Adds what `say` makes of a row: a token, if it is given the random number of the
    /// row's position, else what is left to draw from.
    fn add(&mut self, row: usize, say: impl FnOnce(Option<f64>) -> Result<Choice, SamplerError>) {
        let uniform = match self.said {
            Said::Left(_) => None,
            Said::Chosen(_) => {
                let (seed, number) = self.request.seed;
                let depth = row.checked_sub(1).map_or(0, |node| self.tree.depth(node));
                Some(uniform_at(
                    seed,
                    number,
                    (self.active.history.len() + depth) as u64,
                ))
            }
        };
        match (&mut self.said, say(uniform)) {
            (Said::Left(all), Ok(Choice::Left(left))) => all.push(left),
            (Said::Chosen(all), Ok(Choice::Token(token))) => all.push(token),
            (_, Ok(_)) => unreachable!("rows say what they are asked for"),
            (_, Err(error)) => {
                self.failed.get_or_insert(error);
            }
        }
    }
}
