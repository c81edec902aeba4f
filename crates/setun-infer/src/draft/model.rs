//! Guessing with a smaller model.

use super::{Budget, Draft, Drafter, Target, class_of, middle_of};
use crate::engine::{Chunk, Engine, EngineError, Wanted};
use crate::kv::Sequence;
use setun_model::ModelSpec;

/// A path is not drafted on when its probability falls below this.
const LEAST_PROBABILITY: f64 = 0.02;

/// A smaller model with the target's tokens: its likeliest path, with the likeliest other
/// tokens beside each token of it.
///
/// It has an engine and a cache of its own, in which it keeps what its last context and the
/// next have in common.
pub struct ModelDrafter {
    engine: Engine,
    sequence: Option<Sequence>,
}

impl ModelDrafter {
    /// A drafter for `target`. The cache of `engine` needs room for the context and two
    /// blocks more.
    ///
    /// # Errors
    /// [`EngineError::DraftVocabulary`] for vocabularies of different sizes. Whether the
    /// tokens mean the same is for whoever has the tokenizers.
    pub fn new(engine: Engine, target: &ModelSpec) -> Result<Self, EngineError> {
        let (target, drafter) = (target.config.vocab_size, engine.spec().config.vocab_size);
        if target != drafter {
            return Err(EngineError::DraftVocabulary { target, drafter });
        }
        Ok(Self {
            engine,
            sequence: None,
        })
    }

    /// The sequence with what of `context` it has, never all of it.
    fn follow(&mut self, context: &[u32]) -> Result<(Sequence, usize), EngineError> {
        let sequence = match self.sequence {
            Some(sequence) => sequence,
            None => self.engine.start(context),
        };
        self.sequence = Some(sequence);
        let held = self.engine.tables().tokens(sequence)?;
        let same = held.iter().zip(context).take_while(|(a, b)| a == b).count();
        let same = same.min(context.len() - 1);
        self.engine.truncate(sequence, same)?;
        Ok((sequence, same))
    }
}

impl Drafter for ModelDrafter {
    fn prior(&self, class: usize) -> Option<f64> {
        middle_of(class)
    }

    fn draft(
        &mut self,
        _: Target<'_>,
        context: &[u32],
        budget: Budget,
    ) -> Result<Draft, EngineError> {
        let mut draft = Draft::default();
        let room = (self.engine.context() + 1).saturating_sub(context.len());
        let depth = budget.depth.min(budget.nodes).min(room);
        if depth == 0 || budget.width == 0 || context.is_empty() {
            return Ok(draft);
        }
        let (sequence, same) = self.follow(context)?;
        let width = (budget.nodes / depth).clamp(1, budget.width);
        let mut tokens = context[same..].to_vec();
        let (mut parent, mut probability) = (None, 1.0);
        for _ in 0..depth {
            let chunk = Chunk {
                sequence,
                tokens: &tokens,
                parents: None,
                logits: Wanted::Last,
            };
            let mut best = Vec::new();
            self.engine
                .step_topk(&[chunk], width, &[], &mut |_, _, candidates, total| {
                    let of = |value| libm::exp(total.log_probability(value));
                    best.extend(candidates.iter().map(|c| (c.id, of(c.value))));
                })?;
            let mut likeliest = None;
            for &(token, p) in &best {
                let nodes = draft.tree.len();
                let node = draft.tree.grow(parent, token);
                if draft.tree.len() > nodes {
                    draft.evidence.push(class_of(p));
                }
                likeliest = likeliest.or(node);
            }
            let (Some(node), Some(&(token, p))) = (likeliest, best.first()) else {
                break;
            };
            probability *= p;
            // Logits that are no numbers end the draft here too.
            if probability.is_nan() || probability < LEAST_PROBABILITY {
                break;
            }
            (parent, tokens) = (Some(node), vec![token]);
        }
        Ok(draft)
    }
}
