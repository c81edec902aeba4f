//! A block drafter on the engine of its target: it reads the hidden states of every step,
//! and its cache has the slots of the target's, so that what is forked, kept or forgotten
//! there is here too.
//!
//! Hidden states wait until a block is guessed: read together, many rows cost little more than
//! one, and a text whose drafts do not pay hardly pays for its drafter.

use super::{Engine, EngineError, EngineOptions, load_parameters, spec_of};
use crate::kv::Sequence;
use setun_backend::topk::Candidate;
use setun_backend::{Among, CachedSegment, Host};
use setun_io::{OpenDrafter, OpenModel};
use setun_model::{BlockDrafter, CachedRows, DrafterSpec, ModelSpec, Parameters};

/// Rows whose hidden states wait for the drafter. A slot that came to hold another token in the
/// meantime occurs twice, and keeps the later row.
#[derive(Default)]
pub(super) struct Unread {
    pub(super) slots: Vec<u32>,
    positions: Vec<u32>,
}

impl Unread {
    pub(super) fn extend(&mut self, slots: &[u32], positions: &[u32]) {
        self.slots.extend_from_slice(slots);
        self.positions.extend_from_slice(positions);
    }
}

impl Engine {
    /// Lets the drafter read the hidden states that wait for it: before slots of the cache are
    /// read or moved.
    pub(super) fn read_hidden_states(&mut self) {
        let Unread { slots, positions } = &mut self.unread;
        if let Some(drafter) = &self.drafter
            && !slots.is_empty()
        {
            drafter.absorb(&mut self.backend, slots, positions);
        }
        slots.clear();
        positions.clear();
    }

    /// Before the batch is run.
    pub(super) fn make_room_for_hidden_states(&mut self) {
        let rows = self.unread.slots.len() + self.batch.slots.len();
        if self.drafter.as_ref().is_some_and(|d| rows > d.max_unread()) {
            self.read_hidden_states();
        }
    }

    /// As [`load`](Self::load), with a block drafter, for
    /// [`BlockGuesses`](crate::BlockGuesses).
    ///
    /// # Errors
    /// What the files refuse; a drafter of another model.
    pub fn load_with_drafter(
        model: &OpenModel,
        drafter: &OpenDrafter,
        options: EngineOptions,
    ) -> Result<Self, EngineError> {
        drafter.check_target(model)?;
        let spec = spec_of(model, options.numerics)?;
        let of_drafter = DrafterSpec::new(drafter.header(), spec.numerics);
        let mut engine = Self::reserve_with_drafter(spec, of_drafter, options);
        load_parameters(model, &engine.model.parameters, &mut engine.backend)?;
        if let Some((parameters, backend)) = engine.drafter_parts() {
            for p in &parameters.list {
                match p.is_matrix {
                    true => parameters.set_ternary(backend, &p.name, &drafter.matrix(&p.name)?)?,
                    false => parameters.set_values(backend, &p.name, &drafter.norm(&p.name)?)?,
                }
            }
        }
        Ok(engine)
    }

    /// As [`reserve`](Self::reserve), with a block drafter of the model's width and
    /// numerics; see [`drafter_parts`](Self::drafter_parts).
    pub fn reserve_with_drafter(
        spec: ModelSpec,
        drafter: DrafterSpec,
        options: EngineOptions,
    ) -> Self {
        Self::reserve_parts(spec, Some(drafter), options)
    }

    /// Parameters of the block drafter, where there is one, and the backend.
    pub fn drafter_parts(&mut self) -> Option<(&Parameters<f32>, &mut Host<f32>)> {
        let drafter = self.drafter.as_ref()?;
        Some((&drafter.body.parameters, &mut self.backend))
    }

    /// Rows of the block drafter's blocks: an anchor and the guesses behind it.
    pub fn block_size(&self) -> Option<usize> {
        self.drafter.as_ref().map(BlockDrafter::block_size)
    }

    /// Guesses of the block drafter behind `anchor`, the token behind those of `sequence`:
    /// for each of `num_guesses` positions, at most one less than a block has rows, the `k`
    /// best tokens with their log-probabilities, best first. Nothing without a drafter or
    /// without room for a block in the cache. The guesses do not depend on their number: a
    /// block is always computed whole, since its rows see each other. A tree that is pending for
    /// the sequence is forgotten.
    ///
    /// # Errors
    /// A sequence that is not in the cache, a token outside of the vocabulary.
    pub fn guess_block(
        &mut self,
        sequence: Sequence,
        anchor: u32,
        num_guesses: usize,
        k: usize,
    ) -> Result<Vec<Vec<(u32, f64)>>, EngineError> {
        let (past, vocab_size) = (self.len(sequence)?, self.spec().config.vocab_size);
        if anchor as usize >= vocab_size {
            let token = anchor;
            return Err(EngineError::BadToken { token, vocab_size });
        }
        let n = self.block_size().unwrap_or(0);
        let guesses = num_guesses.min(n.saturating_sub(1));
        self.batch.moves.clear();
        self.pending.retain(|p| p.sequence != sequence);
        if guesses == 0
            || self
                .tables
                .reserve(sequence, n, &mut self.batch.moves)
                .is_err()
        {
            return Ok(Vec::new());
        }
        self.move_cached();
        self.read_hidden_states();
        let slots: Result<Vec<u32>, _> = (past..past + n)
            .map(|p| self.tables.slot(sequence, p))
            .collect();
        let blocks = self.tables.blocks(sequence)?;
        let block = CachedSegment {
            q_start: 0,
            q_len: n,
            past,
            blocks,
            among: Among::All,
        };
        let cached = CachedRows {
            slots: &slots?,
            segments: &[block],
            unread: 0,
        };
        let Some(drafter) = &self.drafter else {
            return Ok(Vec::new());
        };
        let anchor = (anchor, past as u32);
        let wanted = (guesses, k.max(1));
        let (b, kept) = (&mut self.backend, &mut self.kept);
        drafter.draft(b, &self.model, anchor, cached, wanted, kept);
        // The guesses take no part in the text: their slots are free again.
        self.tables.truncate(sequence, past)?;
        let each = self.kept.candidates.iter().zip(&self.kept.totals);
        let rows = each.map(|(candidates, total)| {
            let of = |c: &Candidate| (c.id, total.log_probability(c.value));
            candidates.iter().map(of).collect()
        });
        Ok(rows.collect())
    }
}
