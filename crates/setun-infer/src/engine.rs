//! Sequences against a cache of keys and values.
//!
//! Prefill and decode call the same forward pass as training does, with the past in the
//! cache, so the logits of a token do not depend on what is computed beside it: on the
//! other sequences of a step, on the size of the chunks of a prompt, on how much of it was
//! found in the cache, or on the threads.

use crate::kv::{KvError, KvTables, Sequence};
use crate::sampler::SamplerError;
use setun_backend::topk::{Candidate, Kept, Shaping, TopK, Total};
use setun_backend::{
    Backend, CACHE_BLOCK, CacheKind, CachedSegment, Host, HostWorkspace, Isa, Plan,
};
use setun_io::{IoError, OpenModel};
use setun_model::{
    BlockDrafter, CachedRows, DecodeShape, DrafterSpec, ModelSpec, ParameterUse, Parameters,
    Purpose, Qwen3, SetError,
};
use setun_ternary::Numerics;
use thiserror::Error;

mod blocks;
mod load;

use blocks::Unread;
pub use load::{exact_cache, load_parameters, spec_of};

/// Rows of logits that exist at a time.
const HEAD_ROWS: usize = 64;

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
    /// The cache has no room, or not the sequence.
    #[error(transparent)]
    Kv(#[from] KvError),
    /// A tree does not fit into one call.
    #[error("a tree of {found} tokens does not fit into a step of {max_rows} rows")]
    TreeTooLarge {
        /// Tokens of the tree.
        found: usize,
        /// Most rows of a call.
        max_rows: usize,
    },
    /// A row of a tree that does not come after its parent.
    #[error("row {0} of a tree names a parent that does not come before it")]
    BadTree(usize),
    /// A sequence that a step names twice.
    #[error("two chunks of a step go on the same sequence; join them")]
    Repeated,
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
    /// A drafter of another vocabulary.
    #[error(
        "the drafter has a vocabulary of {drafter} tokens and the model one of {target}; \
         use a drafter with the model's own tokenizer"
    )]
    DraftVocabulary {
        /// Size of the target's vocabulary.
        target: usize,
        /// Size of the drafter's.
        drafter: usize,
    },
    /// int8 numerics without ternary weights.
    #[error("numerics int8 need a ternary model; choose bf16 or f32")]
    DenseInt8,
    /// One of several requests cannot be continued; nothing has been computed for any of them.
    #[error("request {number}: {source}")]
    Request {
        /// Which one, counted from 1.
        number: usize,
        /// What is wrong with it.
        source: Box<EngineError>,
    },
}

/// How an [`Engine`] runs.
#[derive(Clone, Copy, Debug)]
pub struct EngineOptions {
    /// Most positions of a sequence; the model's own limit at most.
    pub context: usize,
    /// Threads; results do not depend on them.
    pub threads: usize,
    /// Instruction set; results do not depend on it.
    pub isa: Isa,
    /// Other numerics than the model's record says.
    pub numerics: Option<Numerics>,
    /// How keys and values are stored; by default as [`exact_cache`] says.
    pub cache: Option<CacheKind>,
    /// Tokens of the cache, over all sequences; by default `context`.
    pub cache_tokens: Option<usize>,
    /// Most tokens that a call of the model takes; longer steps are cut, larger trees refused.
    /// Results do not depend on it.
    pub max_rows: usize,
}

impl EngineOptions {
    /// Room for one sequence of `context` positions.
    pub fn new(context: usize, threads: usize, isa: Isa) -> Self {
        Self {
            context,
            threads,
            isa,
            numerics: None,
            cache: None,
            cache_tokens: None,
            max_rows: 256,
        }
    }
}

/// Tokens of one sequence in a step.
#[derive(Clone, Copy, Debug)]
pub struct Chunk<'a> {
    /// The sequence that they go on.
    pub sequence: Sequence,
    /// At least one token.
    pub tokens: &'a [u32],
    /// None: a chain, which the sequence then holds. Else a tree: the parent of each
    /// token, an earlier token of the chunk or [`ROOT`](setun_backend::ROOT). A tree is
    /// pending until [`Engine::commit`] keeps one of its paths; any other step with the
    /// sequence forgets it.
    pub parents: Option<&'a [u32]>,
    /// Which logits are wanted.
    pub logits: Wanted,
}

/// Which tokens of a [`Chunk`] have their logits computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// None.
    Nothing,
    /// Those behind the last token.
    Last,
    /// Those behind every token.
    All,
}

/// Takes the index of a chunk, the index of a token in it, and the logits behind it.
pub type OnLogits<'a> = dyn FnMut(usize, usize, &mut [f32]) + 'a;

/// Takes the index of a chunk, the index of a token in it, the best entries of the logits
/// behind it, best first, and the sum of all their exponentials.
pub type OnTopK<'a> = dyn FnMut(usize, usize, &[Candidate], Total) + 'a;

/// What logits go through before their best entries are kept.
#[derive(Clone, Debug, Default)]
pub struct Shaped {
    /// Penalties and temperature.
    pub shaping: Shaping,
    /// Tokens that occurred, ascending, each with how often it was generated: 0 times if only
    /// the prompt has it.
    pub occurred: Vec<(u32, u32)>,
}

impl Shaped {
    /// With the tokens of `history`, of which the first `num_prompt` are the prompt.
    pub fn new(shaping: Shaping, history: &[u32], num_prompt: usize) -> Self {
        Self {
            shaping,
            occurred: occurrences(history, num_prompt),
        }
    }
}

/// The tokens of `history`, ascending, each with how often it occurs behind the first
/// `num_prompt` tokens.
pub fn occurrences(history: &[u32], num_prompt: usize) -> Vec<(u32, u32)> {
    let (prompt, generated) = history.split_at(num_prompt.min(history.len()));
    let of_prompt = prompt.iter().map(|&token| (token, 0));
    let mut all: Vec<(u32, u32)> = of_prompt.chain(generated.iter().map(|&t| (t, 1))).collect();
    all.sort_unstable();
    all.dedup_by(|next, kept| {
        let same = next.0 == kept.0;
        if same {
            kept.1 += next.1;
        }
        same
    });
    all
}

/// What a step does with the logits that are wanted.
enum Output<'a, 'b> {
    Logits(&'a mut OnLogits<'b>),
    TopK {
        k: usize,
        shaped: &'a [Shaped],
        on_top: &'a mut OnTopK<'b>,
    },
}

/// A model with its cache.
///
/// ```no_run
/// use setun_backend::Isa;
/// use setun_infer::{Chunk, Engine, EngineOptions, Wanted};
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let model = setun_io::OpenModel::open("out".as_ref())?;
/// let mut engine = Engine::load(&model, EngineOptions::new(512, 2, Isa::detect()))?;
/// let sequence = engine.start(&[1, 2, 3]);
/// let chunk = Chunk {
///     sequence,
///     tokens: &[1, 2, 3][engine.len(sequence)?..],
///     parents: None,
///     logits: Wanted::Last,
/// };
/// engine.step(&[chunk], &mut |_, _, logits| println!("{:?}", logits.len()))?;
/// # Ok(())
/// # }
/// ```
pub struct Engine {
    backend: Host<f32>,
    model: Qwen3<f32>,
    /// A block drafter, whose cache has the slots of the model's.
    drafter: Option<BlockDrafter<f32>>,
    unread: Unread,
    context: usize,
    tables: KvTables,
    /// Tokens of prompts that were found in the cache.
    reused: usize,
    /// The tree of each sequence that waits for its commit.
    pending: Vec<Pending>,
    /// Most rows of logits at a time.
    head_rows: usize,
    /// Scratch: rows of logits, where they are asked for.
    logits: Vec<f32>,
    kept: Kept,
    batch: Batch,
}

struct Pending {
    sequence: Sequence,
    tokens: Vec<u32>,
    parents: Vec<u32>,
}

/// Rows of a call.
#[derive(Default)]
struct Batch {
    ids: Vec<u32>,
    positions: Vec<u32>,
    slots: Vec<u32>,
    moves: Vec<(u32, u32)>,
    /// Chunk, its first token, number of tokens.
    pieces: Vec<(usize, usize, usize)>,
}

impl Batch {
    fn clear(&mut self) {
        self.ids.clear();
        self.positions.clear();
        self.slots.clear();
        self.pieces.clear();
    }
}

impl Engine {
    /// Loads a model. In numerics int8 its weights stay packed.
    ///
    /// # Errors
    /// What the files refuse; int8 numerics for a dense model.
    pub fn load(model: &OpenModel, options: EngineOptions) -> Result<Self, EngineError> {
        let spec = spec_of(model, options.numerics)?;
        let mut engine = Self::reserve(spec, options);
        load_parameters(model, &engine.model.parameters, &mut engine.backend)?;
        Ok(engine)
    }

    /// An engine whose weights are all zero, for [`Parameters::set_ternary`] and
    /// [`Parameters::set_values`] by way of [`parts`](Self::parts).
    pub fn reserve(spec: ModelSpec, options: EngineOptions) -> Self {
        Self::reserve_parts(spec, None, options)
    }

    fn reserve_parts(
        spec: ModelSpec,
        drafter: Option<DrafterSpec>,
        options: EngineOptions,
    ) -> Self {
        let longest = spec.config.max_position_embeddings;
        let context = options.context.clamp(1, longest);
        let limits = spec.limits();
        let rows = options.max_rows.max(1);
        // All guesses of a block have logits at once.
        let block_size = drafter.as_ref().map_or(0, |spec| spec.block_size);
        let shape = DecodeShape {
            rows,
            positions: context,
            cache: options.cache.unwrap_or(exact_cache(spec.numerics)),
            num_blocks: options
                .cache_tokens
                .unwrap_or(context)
                .div_ceil(CACHE_BLOCK),
            head_chunk: rows.max(block_size).min(HEAD_ROWS),
        };
        let packed = spec.scheme.is_some() && spec.numerics == Numerics::Int8;
        let parameters = ParameterUse {
            packed: packed.then_some(Host::<f32>::packed_len),
            ..ParameterUse::default()
        };
        let mut plan = Plan::new();
        let workspace = HostWorkspace::reserve(&mut plan, options.threads, limits);
        let mut model = Qwen3::reserve_with(&mut plan, spec, Purpose::Decode(shape), parameters);
        let drafter = drafter.map(|spec| {
            let purpose = Purpose::Decode(DecodeShape {
                rows: rows.max(spec.block_size),
                // The last block may begin at the last position.
                positions: context + spec.block_size,
                head_chunk: 1,
                ..shape
            });
            BlockDrafter::reserve(&mut plan, &spec, (purpose, parameters), &mut model)
        });
        let mut backend = Host::new(&plan, workspace, options.isa);
        model.prepare(&mut backend);
        if let Some(drafter) = &drafter {
            drafter.prepare(&mut backend);
        }
        Self {
            backend,
            model,
            drafter,
            unread: Unread::default(),
            context,
            tables: KvTables::new(shape.num_blocks),
            reused: 0,
            pending: Vec::new(),
            head_rows: shape.head_chunk,
            logits: Vec::new(),
            kept: Kept::default(),
            batch: Batch::default(),
        }
    }

    /// Parameters and the backend that holds them. Weights are set before the first step: the
    /// cache keeps what it has.
    pub fn parts(&mut self) -> (&Parameters<f32>, &mut Host<f32>) {
        (&self.model.parameters, &mut self.backend)
    }

    /// Most positions of a sequence.
    pub fn context(&self) -> usize {
        self.context
    }

    /// Most tokens that a call of the model takes, and so most of a tree.
    pub fn max_rows(&self) -> usize {
        self.model.max_rows()
    }

    /// What the model computes.
    pub fn spec(&self) -> &ModelSpec {
        self.model.spec()
    }

    /// Blocks and tables of the cache.
    pub fn tables(&self) -> &KvTables {
        &self.tables
    }

    /// A new sequence, which holds what the cache has of the beginning of `prompt`; see
    /// [`KvTables::create_with_prefix`]. The tokens behind [`len`](Self::len) are to be
    /// computed.
    pub fn start(&mut self, prompt: &[u32]) -> Sequence {
        let sequence = self.tables.create_with_prefix(prompt);
        self.reused += self.tables.tokens(sequence).map_or(0, <[u32]>::len);
        sequence
    }

    /// Tokens that did not have to be computed so far, since the cache had them behind the same
    /// text.
    pub fn reused(&self) -> usize {
        self.reused
    }

    /// Tokens of a sequence.
    ///
    /// # Errors
    /// A sequence that is not in the cache.
    pub fn len(&self, sequence: Sequence) -> Result<usize, EngineError> {
        Ok(self.tables.tokens(sequence)?.len())
    }

    /// A copy of a sequence; blocks are shared until one of them writes.
    ///
    /// # Errors
    /// A sequence that is not in the cache.
    pub fn fork(&mut self, sequence: Sequence) -> Result<Sequence, EngineError> {
        Ok(self.tables.fork(sequence)?)
    }

    /// Forgets the tokens of a sequence behind the first `len`.
    ///
    /// # Errors
    /// A sequence that is not in the cache.
    pub fn truncate(&mut self, sequence: Sequence, len: usize) -> Result<(), EngineError> {
        self.pending.retain(|p| p.sequence != sequence);
        Ok(self.tables.truncate(sequence, len)?)
    }

    /// Gives the memory of a sequence back.
    ///
    /// # Errors
    /// A sequence that is not in the cache.
    pub fn free(&mut self, sequence: Sequence) -> Result<(), EngineError> {
        self.pending.retain(|p| p.sequence != sequence);
        Ok(self.tables.free(sequence)?)
    }

    /// Keeps the tokens `path` of the tree that is pending for `sequence`, from the root
    /// on, and forgets the others.
    ///
    /// # Errors
    /// A path that is not one of the tree, which then stays; a sequence without a tree.
    pub fn commit(&mut self, sequence: Sequence, path: &[usize]) -> Result<(), EngineError> {
        self.tables.tokens(sequence)?;
        let at = self.pending.iter().position(|p| p.sequence == sequence);
        let at = at.ok_or(KvError::NoTree)?;
        let tree = &self.pending[at];
        let rows = (tree.tokens.as_slice(), tree.parents.as_slice());
        self.batch.moves.clear();
        self.tables
            .commit(sequence, rows, path, &mut self.batch.moves)?;
        self.pending.swap_remove(at);
        self.move_cached();
        Ok(())
    }

    /// Adds the tokens of all chunks to their sequences, no two of which are alike, and
    /// hands over the logits that are wanted, in the order of chunks and tokens. What chunks have
    /// in common at their beginnings is computed once, unless all their logits are wanted.
    ///
    /// # Errors
    /// No tokens, too many, one outside of the vocabulary, a bad tree: nothing has
    /// happened. A full cache: every sequence has the tokens that it had, but a tree that was
    /// pending for one of the step's is forgotten.
    pub fn step(
        &mut self,
        chunks: &[Chunk<'_>],
        on_logits: &mut OnLogits<'_>,
    ) -> Result<(), EngineError> {
        self.step_into(chunks, &mut Output::Logits(on_logits))
    }

    /// As [`step`](Self::step), with the `k` best entries of the logits of each token in
    /// place of all of them: where the weights are packed, logits are never written. The
    /// logits of chunk `i` go through `shaped[i]` first, or nothing where that is missing.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn step_topk(
        &mut self,
        chunks: &[Chunk<'_>],
        k: usize,
        shaped: &[Shaped],
        on_top: &mut OnTopK<'_>,
    ) -> Result<(), EngineError> {
        let k = k.max(1);
        self.step_into(chunks, &mut Output::TopK { k, shaped, on_top })
    }

    fn step_into(
        &mut self,
        chunks: &[Chunk<'_>],
        output: &mut Output<'_, '_>,
    ) -> Result<(), EngineError> {
        for (i, chunk) in chunks.iter().enumerate() {
            self.check(chunk)?;
            if chunks[..i].iter().any(|c| c.sequence == chunk.sequence) {
                return Err(EngineError::Repeated);
            }
        }
        self.pending
            .retain(|p| chunks.iter().all(|c| c.sequence != p.sequence));
        self.batch.moves.clear();
        let wanted = chunks.iter().map(|c| (c.sequence, c.tokens.len()));
        let reserved = self.tables.reserve_all(wanted, &mut self.batch.moves);
        // In a full cache too: tables may name copies already.
        self.move_cached();
        reserved?;
        let max_rows = self.model.max_rows();
        let (mut index, mut done) = (0, 0);
        while index < chunks.len() {
            self.batch.clear();
            while index < chunks.len() {
                let chunk = &chunks[index];
                if done == 0 {
                    match self.begin(chunks, chunk)? {
                        Some(known) => done = known,
                        None => break,
                    }
                }
                let room = max_rows - self.batch.ids.len();
                let left = chunk.tokens.len() - done;
                let whole = chunk.parents.is_some();
                let n = if whole && left > room {
                    0
                } else {
                    left.min(room)
                };
                if n == 0 {
                    break;
                }
                self.add(index, chunk, done, n)?;
                done += n;
                if done == chunk.tokens.len() {
                    (index, done) = (index + 1, 0);
                }
            }
            self.run(chunks)?;
            self.hand_over(chunks, output);
        }
        Ok(())
    }

    /// Counts what the cache has of the beginning of a chunk to its sequence and returns the number
    /// of tokens. `None`, and nothing is done, if the batch is about to compute more of it.
    fn begin(
        &mut self,
        chunks: &[Chunk<'_>],
        chunk: &Chunk<'_>,
    ) -> Result<Option<usize>, EngineError> {
        let is_text = chunk.parents.is_none() && !matches!(chunk.logits, Wanted::All);
        let before = self.tables.tokens(chunk.sequence)?;
        // A block, and the token that is left for its logits.
        let is_long = chunk.tokens.len() > CACHE_BLOCK;
        if !is_text || !is_long || !before.len().is_multiple_of(CACHE_BLOCK) {
            return Ok(Some(0));
        }
        let known = self.tables.known(chunk.sequence, chunk.tokens)?;
        let last = chunk.tokens.len() - 1;
        for &(index, first, n) in &self.batch.pieces {
            let other = &chunks[index];
            let others = self.tables.tokens(other.sequence)?.iter();
            let others = others.chain(&other.tokens[first..first + n]);
            let own = before.iter().chain(&chunk.tokens[..last]);
            let same = own.zip(others).take_while(|(a, b)| a == b).count();
            if other.parents.is_none() && same / CACHE_BLOCK * CACHE_BLOCK > before.len() + known {
                return Ok(None);
            }
        }
        if known > 0 {
            self.tables
                .advance(chunk.sequence, &chunk.tokens[..known])?;
            self.reused += known;
        }
        Ok(Some(known))
    }

    fn check(&self, chunk: &Chunk<'_>) -> Result<(), EngineError> {
        let vocab_size = self.spec().config.vocab_size;
        let found = chunk.tokens.len();
        if found == 0 {
            return Err(EngineError::EmptyPrompt);
        }
        let all = self.len(chunk.sequence)? + found;
        if all > self.context {
            let context = self.context;
            return Err(EngineError::TooLong {
                found: all,
                context,
            });
        }
        let bad = chunk.tokens.iter().find(|&&t| t as usize >= vocab_size);
        if let Some(&token) = bad {
            return Err(EngineError::BadToken { token, vocab_size });
        }
        let Some(parents) = chunk.parents else {
            return Ok(());
        };
        let max_rows = self.model.max_rows();
        if found > max_rows {
            return Err(EngineError::TreeTooLarge { found, max_rows });
        }
        let late = |(i, &p): (usize, &u32)| p != setun_backend::ROOT && p as usize >= i;
        let bad = parents.iter().enumerate().position(late);
        match bad.or((parents.len() != found).then_some(parents.len().min(found))) {
            Some(row) => Err(EngineError::BadTree(row)),
            None => Ok(()),
        }
    }

    /// Copies what the tables have moved.
    fn move_cached(&mut self) {
        if self.batch.moves.is_empty() {
            return;
        }
        self.read_hidden_states();
        self.model.move_cached(&mut self.backend, &self.batch.moves);
        if let Some(drafter) = &self.drafter {
            drafter.move_cached(&mut self.backend, &self.batch.moves);
        }
    }

    /// Adds `n` tokens of a chunk, for which there is room, to the batch.
    fn add(
        &mut self,
        index: usize,
        chunk: &Chunk<'_>,
        first: usize,
        n: usize,
    ) -> Result<(), EngineError> {
        let past = self.len(chunk.sequence)?;
        let tree = CachedSegment {
            q_start: 0,
            q_len: n,
            past,
            blocks: &[],
            among: chunk.parents.into(),
        };
        for i in 0..n {
            self.batch.ids.push(chunk.tokens[first + i]);
            self.batch.positions.push((past + tree.depth(i)) as u32);
            let slot = self.tables.slot(chunk.sequence, past + i)?;
            self.batch.slots.push(slot);
        }
        self.batch.pieces.push((index, first, n));
        Ok(())
    }

    /// Runs the batch through the model and counts its tokens to their sequences.
    fn run(&mut self, chunks: &[Chunk<'_>]) -> Result<(), EngineError> {
        self.make_room_for_hidden_states();
        let batch = &self.batch;
        let mut segments = Vec::with_capacity(batch.pieces.len());
        let mut q_start = 0;
        for &(index, _, n) in &batch.pieces {
            let chunk = &chunks[index];
            segments.push(CachedSegment {
                q_start,
                q_len: n,
                past: self.tables.tokens(chunk.sequence)?.len(),
                blocks: self.tables.blocks(chunk.sequence)?,
                among: chunk.parents.into(),
            });
            q_start += n;
        }
        self.model
            .write_batch(&mut self.backend, &batch.ids, &batch.positions, &[]);
        let rows = CachedRows {
            slots: &batch.slots,
            segments: &segments,
            unread: self.unread.slots.len(),
        };
        self.model.forward_cached(&mut self.backend, rows);
        if self.drafter.is_some() {
            self.unread.extend(&batch.slots, &batch.positions);
        }
        for &(index, first, n) in &self.batch.pieces {
            let chunk = &chunks[index];
            match chunk.parents {
                None => {
                    let tokens = &chunk.tokens[first..first + n];
                    self.tables.advance(chunk.sequence, tokens)?;
                }
                Some(parents) => self.pending.push(Pending {
                    sequence: chunk.sequence,
                    tokens: chunk.tokens.to_vec(),
                    parents: parents.to_vec(),
                }),
            }
        }
        Ok(())
    }

    /// Computes the logits that are wanted of the batch, neighbouring rows together.
    fn hand_over(&mut self, chunks: &[Chunk<'_>], output: &mut Output<'_, '_>) {
        let mut wanted = Vec::new();
        let mut row = 0;
        for &(index, first, n) in &self.batch.pieces {
            let last = chunks[index].tokens.len() - 1;
            for token in first..first + n {
                let is_wanted = match chunks[index].logits {
                    Wanted::Nothing => false,
                    Wanted::Last => token == last,
                    Wanted::All => true,
                };
                if is_wanted {
                    wanted.push((row, index, token));
                }
                row += 1;
            }
        }
        let mut done = 0;
        while done < wanted.len() {
            let start = wanted[done].0;
            let run = wanted[done..].iter().zip(start..);
            let run = run.take_while(|((row, _, _), at)| row == at);
            let n = run.count().min(self.head_rows);
            self.head(&wanted[done..done + n], output);
            done += n;
        }
    }

    /// The head over neighbouring rows: (row, chunk, token).
    fn head(&mut self, rows: &[(usize, usize, usize)], output: &mut Output<'_, '_>) {
        let vocab_size = self.spec().config.vocab_size;
        let start = rows[0].0;
        match output {
            Output::Logits(on_logits) => {
                self.logits.resize(self.head_rows * vocab_size, 0.0);
                let logits = &mut self.logits[..rows.len() * vocab_size];
                self.model.read_logit_rows(&mut self.backend, start, logits);
                for (&(_, index, token), logits) in rows.iter().zip(logits.chunks_mut(vocab_size)) {
                    on_logits(index, token, logits);
                }
            }
            Output::TopK { k, shaped, on_top } => {
                let of_rows = rows.iter().filter_map(|(_, index, _)| shaped.get(*index));
                let (shaping, occurred): (Vec<_>, Vec<_>) =
                    of_rows.map(|s| (s.shaping, s.occurred.clone())).unzip();
                let wanted = TopK {
                    k: *k,
                    shaping: &shaping,
                    occurred: &occurred,
                };
                let at = (start, rows.len());
                self.model
                    .topk_rows(&mut self.backend, at, wanted, &mut self.kept);
                let each = self.kept.candidates.iter().zip(&self.kept.totals);
                for (&(_, index, token), (candidates, &total)) in rows.iter().zip(each) {
                    on_top(index, token, candidates, total);
                }
            }
        }
    }
}
