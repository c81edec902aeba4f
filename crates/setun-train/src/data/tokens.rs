//! One side of the split as one stream of token ids.
//!
//! The documents stand in a seeded order, each followed by `<|endoftext|>`. The stream
//! is held in memory or read from a file in pieces, so that it may be larger than memory:
//! from a token file, or from a file without a name into which it went while it was
//! encoded. Both are read through [`TokenSet::read`]. Ids take two bytes where the
//! vocabulary has at most 65,536 entries, else four. Where conversations are among the
//! documents, one bit for each token says whether it is a target.

use super::{
    Corpus, DataError, DocumentKind, Permutation, Reader, Text,
    chat::{Piece, special_tokens},
    targets::TargetBits,
    token_file::{Spill, TokenFile},
};
use blake3::Hash;
use setun_formats::tokenizer::Tokenizer;
use std::{
    collections::BTreeMap,
    num::NonZero,
    path::Path,
    sync::{
        atomic::{AtomicBool, AtomicUsize, Ordering},
        mpsc,
    },
    thread,
    time::Duration,
};

/// Text that a thread encodes at a time; small enough to keep all cores busy to the end.
const CHUNK_BYTES: u64 = 1 << 18;

/// Chunks for each thread that may be encoded while an earlier one, of a huge document, is
/// not: they wait in memory.
const CHUNKS_AHEAD: usize = 8;

/// Seed of the order of documents that are evaluated or kept: one order for all, so that a
/// loss does not depend on a run's seed.
pub const FIXED_ORDER: u64 = 0;

/// The order of documents uses this epoch, which no order of windows reaches.
const DOCUMENT_ORDER_EPOCH: u64 = u64::MAX;

/// Streams of at most this many bytes stay in memory.
const SPILL_BYTES: usize = 4 << 20;

/// A token stream and what is known about it.
#[derive(Debug)]
pub struct TokenSet {
    pub(super) source: Source,
    pub(super) document_starts: Vec<u64>,
    /// `None` where every token is a target.
    pub(super) targets: Option<TargetBits>,
    pub(super) info: TokenInfo,
}

/// What the header of a token file says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TokenInfo {
    /// Tokens in the stream, separators included.
    pub num_tokens: u64,
    /// UTF-8 bytes of what is learned, separators not counted: all of a text, the answers
    /// of a conversation.
    pub raw_bytes: u64,
    /// Every id is below this.
    pub vocab_size: u32,
    /// Id of `<|endoftext|>`, the last token of each document.
    pub end_of_text: u32,
    /// blake3 of the tokenizer's JSON.
    pub tokenizer_hash: Hash,
}

/// Where the ids are.
#[derive(Debug)]
pub(super) enum Source {
    Memory(Ids),
    File(TokenFile),
}

/// Ids in memory.
#[derive(Debug)]
pub(super) enum Ids {
    U16(Vec<u16>),
    U32(Vec<u32>),
}

impl TokenSet {
    /// Encodes `documents` (indices into `corpus`) on all cores.
    ///
    /// A stream of more than 4 MiB goes into a file in the folder `spill` while it comes. The
    /// file has no name, so that nothing of it stays behind, whatever happens; without `spill`
    /// all ids stay in memory. `progress` is called on this thread with (bytes done, bytes in
    /// all) of the documents in their files.
    ///
    /// # Errors
    /// No documents, a tokenizer without `<|endoftext|>`, a document that cannot be read or
    /// that the tokenizer refuses, with its place, and what the system says of the file.
    pub fn encode(
        corpus: &Corpus,
        documents: &[usize],
        tokenizer: &Tokenizer,
        seed: u64,
        spill: Option<&Path>,
        progress: &dyn Fn(u64, u64),
    ) -> Result<Self, DataError> {
        let end_of_text = tokenizer
            .end_of_text()
            .ok_or_else(|| DataError::BadTokens {
                reason: "the tokenizer has no <|endoftext|> to separate documents; \
                     use one made by setun tokenizer train, or a Qwen tokenizer"
                    .to_owned(),
            })?;
        let encode = |texts: &[&str]| tokenizer.encode_batch(texts).map_err(|why| why.to_string());
        let is_chat = |&d: &usize| corpus.documents[d].kind == DocumentKind::Conversation;
        let has_chat = documents.iter().any(is_chat);
        let encoder = Encoder {
            special: has_chat.then(|| special_tokens(tokenizer)),
            vocab_size: tokenizer.vocab_size() as u32,
            end_of_text,
            tokenizer_hash: blake3::hash(tokenizer.to_json().as_bytes()),
            encode: &encode,
        };
        Self::encode_with(corpus, documents, &encoder, seed, spill, progress)
    }

    /// Opens a token file; below 1 GiB its payload is checked too (see [`Self::verify`]).
    ///
    /// # Errors
    /// A file that is foreign, cut short, damaged or of another version.
    pub fn open(path: &Path) -> Result<Self, DataError> {
        TokenFile::open(path)
    }

    /// Writes the token file `path`: all of it, or nothing when it fails.
    ///
    /// # Errors
    /// What the operating system says, with the path.
    pub fn save(&self, path: &Path) -> Result<(), DataError> {
        TokenFile::save(self, path)
    }

    /// Checks a token file's payload against its hash; a stream in memory passes.
    ///
    /// # Errors
    /// A file that has changed since it was written, or cannot be read.
    pub fn verify(&self) -> Result<(), DataError> {
        match &self.source {
            Source::Memory(_) => Ok(()),
            Source::File(file) => file.verify(),
        }
    }

    /// Refuses a stream that another tokenizer made.
    ///
    /// # Errors
    /// The two hashes differ.
    pub fn check_tokenizer(&self, tokenizer: &Tokenizer) -> Result<(), DataError> {
        let hash = blake3::hash(tokenizer.to_json().as_bytes());
        if hash == self.info.tokenizer_hash {
            return Ok(());
        }
        Err(DataError::BadTokens {
            reason: format!(
                "the tokens were made by another tokenizer (blake3 {} there, {hash} here): \
                 tokenize the text again with this one",
                self.info.tokenizer_hash
            ),
        })
    }

    /// Sizes and the tokenizer's hash.
    pub fn info(&self) -> &TokenInfo {
        &self.info
    }

    /// Tokens in the stream, separators included; at least 1.
    pub fn num_tokens(&self) -> u64 {
        self.info.num_tokens
    }

    /// Tokens that are learned and whose loss counts; others are only read.
    pub fn num_targets(&self) -> u64 {
        let bits = self.targets.as_ref();
        bits.map_or(self.info.num_tokens, TargetBits::num_targets)
    }

    /// Whether the token at `position`, which lies in the stream, is a target.
    pub fn is_target(&self, position: u64) -> bool {
        self.targets.as_ref().is_none_or(|bits| bits.at(position))
    }

    /// Position of each document's first token, ascending from 0.
    pub fn document_starts(&self) -> &[u64] {
        &self.document_starts
    }

    /// blake3 of the document starts, tokens and targets, as a token file stores them.
    ///
    /// # Errors
    /// A token file that cannot be read.
    pub fn content_hash(&self) -> Result<Hash, DataError> {
        let mut hasher = blake3::Hasher::new();
        self.each_payload_block(&mut |block| {
            hasher.update(block);
            Ok(())
        })?;
        Ok(hasher.finalize())
    }

    /// Reads the tokens `position..position + out.len()`. Allocates nothing.
    ///
    /// # Errors
    /// A token file that cannot be read, or that holds an id outside the vocabulary.
    ///
    /// # Panics
    /// When the range leaves the stream.
    pub fn read(&self, position: u64, out: &mut [u32]) -> Result<(), DataError> {
        let end = position.checked_add(out.len() as u64);
        assert!(
            end.is_some_and(|end| end <= self.info.num_tokens),
            "{} tokens from {position} of {}",
            out.len(),
            self.info.num_tokens
        );
        let range = position as usize..position as usize + out.len();
        match &self.source {
            Source::Memory(Ids::U16(ids)) => {
                for (out, &id) in out.iter_mut().zip(&ids[range]) {
                    *out = u32::from(id);
                }
            }
            Source::Memory(Ids::U32(ids)) => out.copy_from_slice(&ids[range]),
            Source::File(file) => file.read(position, self.info.vocab_size, out)?,
        }
        Ok(())
    }

    /// As [`Self::read`], on the stream repeated for ever.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn read_circular(&self, position: u64, out: &mut [u32]) -> Result<(), DataError> {
        let mut position = position % self.info.num_tokens;
        let mut rest = out;
        while !rest.is_empty() {
            let available = self.info.num_tokens - position;
            let (now, later) = rest.split_at_mut(available.min(rest.len() as u64) as usize);
            self.read(position, now)?;
            (position, rest) = (0, later);
        }
        Ok(())
    }

    /// Bytes of one id: 2 or 4.
    pub(super) fn id_bytes(&self) -> usize {
        id_bytes(self.info.vocab_size)
    }

    /// Calls `visit` with the payload of the token file in blocks: document starts as
    /// u64, then ids, then target bits as u64 if there are any, little-endian.
    pub(super) fn each_payload_block(
        &self,
        visit: &mut dyn FnMut(&[u8]) -> Result<(), DataError>,
    ) -> Result<(), DataError> {
        const BLOCK_IDS: usize = 1 << 14;
        let mut bytes = Vec::with_capacity(8 * BLOCK_IDS);
        for starts in self.document_starts.chunks(BLOCK_IDS) {
            bytes.clear();
            bytes.extend(starts.iter().flat_map(|start| start.to_le_bytes()));
            visit(&bytes)?;
        }
        let width = self.id_bytes();
        let mut ids = vec![0u32; BLOCK_IDS];
        let mut position = 0;
        while position < self.info.num_tokens {
            let now = (self.info.num_tokens - position).min(BLOCK_IDS as u64) as usize;
            self.read(position, &mut ids[..now])?;
            bytes.clear();
            for id in &ids[..now] {
                // An id of two bytes has zeros above them, because it is below vocab_size.
                bytes.extend_from_slice(&id.to_le_bytes()[..width]);
            }
            visit(&bytes)?;
            position += now as u64;
        }
        let words = self.targets.as_ref().map_or(&[][..], TargetBits::words);
        for words in words.chunks(BLOCK_IDS) {
            bytes.clear();
            bytes.extend(words.iter().flat_map(|word| word.to_le_bytes()));
            visit(&bytes)?;
        }
        Ok(())
    }

    fn encode_with(
        corpus: &Corpus,
        documents: &[usize],
        encoder: &Encoder<'_>,
        seed: u64,
        spill: Option<&Path>,
        progress: &dyn Fn(u64, u64),
    ) -> Result<Self, DataError> {
        if documents.is_empty() {
            let reason = "there are no documents to tokenize: name more text".to_owned();
            return Err(DataError::BadTokens { reason });
        }
        let permutation = Permutation::new(documents.len() as u64, seed, DOCUMENT_ORDER_EPOCH);
        let order: Vec<usize> = (0..documents.len() as u64)
            .map(|i| documents[permutation.at(i) as usize])
            .collect();
        let all_bytes = order.iter().map(|&d| corpus.documents[d].num_bytes).sum();
        let mut stream = Stream::new(encoder.vocab_size, encoder.special.is_some(), spill);
        encoder.run(corpus, &order, |chunk| {
            stream.append(&chunk)?;
            progress(stream.done_bytes, all_bytes);
            Ok(())
        })?;
        stream.finish(encoder.end_of_text, encoder.tokenizer_hash)
    }
}

/// Bytes of one id of a vocabulary.
pub(super) fn id_bytes(vocab_size: u32) -> usize {
    if vocab_size <= 1 << 16 { 2 } else { 4 }
}

impl Ids {
    fn num_bytes(&self) -> usize {
        match self {
            Self::U16(ids) => 2 * ids.len(),
            Self::U32(ids) => 4 * ids.len(),
        }
    }

    /// Empties the list and keeps its memory.
    fn clear(&mut self) {
        match self {
            Self::U16(ids) => ids.clear(),
            Self::U32(ids) => ids.clear(),
        }
    }
}

/// The stream while it grows.
struct Stream<'a> {
    vocab_size: u32,
    /// Where a large stream goes.
    directory: Option<&'a Path>,
    spill: Option<Spill>,
    /// What has not gone there.
    ids: Ids,
    num_tokens: u64,
    document_starts: Vec<u64>,
    targets: Option<TargetBits>,
    done_bytes: u64,
    raw_bytes: u64,
}

impl<'a> Stream<'a> {
    fn new(vocab_size: u32, has_targets: bool, directory: Option<&'a Path>) -> Self {
        Self {
            vocab_size,
            directory,
            spill: None,
            ids: match id_bytes(vocab_size) {
                2 => Ids::U16(Vec::new()),
                _ => Ids::U32(Vec::new()),
            },
            num_tokens: 0,
            document_starts: Vec::new(),
            targets: has_targets.then(TargetBits::default),
            done_bytes: 0,
            raw_bytes: 0,
        }
    }

    fn append(&mut self, chunk: &Chunk) -> Result<(), DataError> {
        let base = self.num_tokens;
        let starts = chunk
            .document_starts
            .iter()
            .map(|&start| base + start as u64);
        self.document_starts.extend(starts);
        self.num_tokens += chunk.ids.len() as u64;
        self.done_bytes += chunk.done_bytes;
        self.raw_bytes += chunk.raw_bytes;
        if let Some(targets) = &mut self.targets {
            chunk
                .targets
                .iter()
                .for_each(|&target| targets.push(target));
        }
        match &mut self.ids {
            // Encoder::encode_chunk has checked every id against the vocabulary.
            Ids::U16(ids) => ids.extend(chunk.ids.iter().map(|&id| id as u16)),
            Ids::U32(ids) => ids.extend_from_slice(&chunk.ids),
        }
        match self.directory {
            Some(directory) if self.ids.num_bytes() > SPILL_BYTES => self.spill_to(directory),
            _ => Ok(()),
        }
    }

    /// Moves the ids that are in memory to the end of the file.
    fn spill_to(&mut self, directory: &Path) -> Result<(), DataError> {
        let spill = match &mut self.spill {
            Some(spill) => spill,
            none => none.insert(Spill::create(directory)?),
        };
        spill.write(&self.ids)?;
        self.ids.clear();
        Ok(())
    }

    fn finish(mut self, end_of_text: u32, tokenizer_hash: Hash) -> Result<TokenSet, DataError> {
        if let (Some(directory), Some(_)) = (self.directory, &self.spill) {
            self.spill_to(directory)?;
        }
        Ok(TokenSet {
            info: TokenInfo {
                num_tokens: self.num_tokens,
                raw_bytes: self.raw_bytes,
                vocab_size: self.vocab_size,
                end_of_text,
                tokenizer_hash,
            },
            source: match self.spill {
                Some(spill) => Source::File(spill.finish()?),
                None => Source::Memory(self.ids),
            },
            document_starts: self.document_starts,
            targets: self.targets,
        })
    }
}

/// Neighbouring documents after encoding.
#[derive(Default)]
struct Chunk {
    ids: Vec<u32>,
    /// One for each id; empty where there are no conversations.
    targets: Vec<bool>,
    document_starts: Vec<usize>,
    done_bytes: u64,
    raw_bytes: u64,
}

/// Gives the ids of each text, or says why it cannot.
type EncodeTexts<'a> = dyn Fn(&[&str]) -> Result<Vec<Vec<u32>>, String> + Sync + 'a;

/// What encoding needs of a tokenizer.
struct Encoder<'a> {
    vocab_size: u32,
    end_of_text: u32,
    tokenizer_hash: Hash,
    /// Special tokens, where there are conversations.
    special: Option<Vec<(String, u32)>>,
    /// Ids of each text.
    encode: &'a EncodeTexts<'a>,
}

impl Encoder<'_> {
    /// Encodes the documents in `order` on all cores and hands the chunks, in order, to
    /// `take` on this thread.
    fn run(
        &self,
        corpus: &Corpus,
        order: &[usize],
        mut take: impl FnMut(Chunk) -> Result<(), DataError>,
    ) -> Result<(), DataError> {
        let chunks = chunk_documents(corpus, order);
        let num_threads = thread::available_parallelism().map_or(1, NonZero::get);
        let (next, failed) = (AtomicUsize::new(0), AtomicBool::new(false));
        // The first chunk that has not been taken.
        let expected = AtomicUsize::new(0);
        let (sender, receiver) = mpsc::sync_channel(num_threads);
        let work = |sender: mpsc::SyncSender<_>| {
            let _end = EndOnPanic(&failed);
            let mut reader = corpus.reader();
            // A claimed chunk is always encoded: so every chunk before a bad one is, and
            // the error that is reported does not depend on timing.
            while !failed.load(Ordering::Relaxed) {
                let index = next.fetch_add(1, Ordering::Relaxed);
                let Some(&documents) = chunks.get(index) else {
                    break;
                };
                let is_early = || index >= expected.load(Ordering::Relaxed) + ahead(num_threads);
                while is_early() && !failed.load(Ordering::Relaxed) {
                    thread::sleep(Duration::from_millis(1));
                }
                let result = self.encode_chunk(corpus, &mut reader, documents);
                failed.fetch_or(result.is_err(), Ordering::Relaxed);
                if sender.send((index, result)).is_err() {
                    break;
                }
            }
        };
        thread::scope(|scope| {
            for _ in 0..num_threads.min(chunks.len()) {
                let sender = sender.clone();
                scope.spawn(|| work(sender));
            }
            drop(sender);
            let _end = EndOnPanic(&failed);
            let mut first_error: Option<(usize, DataError)> = None;
            // Not more than may be encoded ahead.
            let mut waiting = BTreeMap::new();
            for (index, result) in receiver {
                match result {
                    Ok(chunk) => {
                        waiting.insert(index, chunk);
                    }
                    Err(why) if first_error.as_ref().is_none_or(|(i, _)| index < *i) => {
                        first_error = Some((index, why));
                    }
                    Err(_) => {}
                }
                while let Some(chunk) = waiting.remove(&expected.load(Ordering::Relaxed)) {
                    let taken = take(chunk);
                    failed.fetch_or(taken.is_err(), Ordering::Relaxed);
                    taken?;
                    expected.fetch_add(1, Ordering::Relaxed);
                }
            }
            first_error.map_or(Ok(()), |(_, why)| Err(why))
        })
    }

    fn encode_chunk(
        &self,
        corpus: &Corpus,
        reader: &mut Reader<'_>,
        documents: &[usize],
    ) -> Result<Chunk, DataError> {
        let fail = |document, reason| DataError::Encode {
            place: corpus.place(document),
            reason,
        };
        let texts: Vec<Text> = documents
            .iter()
            .map(|&d| reader.read(d))
            .collect::<Result<_, _>>()?;
        let pieces: Vec<Vec<Piece>> = texts.iter().map(|text| self.pieces(text)).collect();
        let is_plain = |piece: &&Piece| piece.special.is_none();
        let plain: Vec<&str> = pieces
            .iter()
            .flatten()
            .filter(is_plain)
            .map(|piece| piece.text)
            .collect();
        let encoded = (self.encode)(&plain).map_err(|reason| {
            // The tokenizer does not say which text it refused: ask for each document.
            let refused = |(&d, pieces): (&usize, &Vec<Piece>)| {
                let texts: Vec<&str> = pieces.iter().filter(is_plain).map(|p| p.text).collect();
                Some((d, (self.encode)(&texts).err()?))
            };
            let found = documents.iter().zip(&pieces).find_map(refused);
            let (document, reason) = found.unwrap_or((documents[0], reason));
            fail(document, reason)
        })?;
        let mut encoded = encoded.into_iter();
        let mut chunk = Chunk::default();
        for ((&document, Text { text, conversation }), pieces) in
            documents.iter().zip(&texts).zip(&pieces)
        {
            chunk.document_starts.push(chunk.ids.len());
            for piece in pieces {
                let ids = match piece.special {
                    Some(id) => vec![id],
                    None => encoded.next().unwrap_or_default(),
                };
                self.check_ids(&ids).map_err(|why| fail(document, why))?;
                if self.special.is_some() {
                    chunk.targets.extend(ids.iter().map(|_| piece.is_target));
                }
                chunk.ids.extend(ids);
            }
            // What follows a conversation is nothing that the assistant says.
            if self.special.is_some() {
                chunk.targets.push(conversation.is_none());
            }
            chunk.ids.push(self.end_of_text);
            chunk.done_bytes += corpus.documents[document].num_bytes;
            chunk.raw_bytes += match conversation {
                Some(conversation) => conversation.num_target_bytes(),
                None => text.len() as u64,
            };
        }
        Ok(chunk)
    }

    /// The parts of a document that are encoded on their own.
    fn pieces<'t>(&self, document: &'t Text) -> Vec<Piece<'t>> {
        let Text { text, conversation } = document;
        match (conversation, &self.special) {
            (Some(conversation), Some(special)) => conversation.pieces(text, special),
            _ => vec![Piece {
                text,
                special: None,
                is_target: true,
            }],
        }
    }

    /// Refuses ids outside the vocabulary, and separators inside a document, which would
    /// look like the end of it.
    fn check_ids(&self, ids: &[u32]) -> Result<(), String> {
        let is_bad = |id: u32| id >= self.vocab_size || id == self.end_of_text;
        match ids.iter().find(|&&id| is_bad(id)) {
            None => Ok(()),
            Some(id) if *id == self.end_of_text => {
                Err(format!("its text becomes <|endoftext|> (id {id})"))
            }
            Some(id) => Err(format!("id {id} in a vocabulary of {}", self.vocab_size)),
        }
    }
}

/// Distance from the first chunk that has not been taken at which threads wait for it.
fn ahead(num_threads: usize) -> usize {
    CHUNKS_AHEAD * num_threads
}

/// Tells the other threads when this one panics, so that none waits for it.
struct EndOnPanic<'a>(&'a AtomicBool);

impl Drop for EndOnPanic<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.store(true, Ordering::Relaxed);
        }
    }
}

/// Cuts `order` into runs of about [`CHUNK_BYTES`] of text.
fn chunk_documents<'a>(corpus: &Corpus, order: &'a [usize]) -> Vec<&'a [usize]> {
    let mut chunks = Vec::new();
    let (mut start, mut bytes) = (0, 0);
    for (i, &document) in order.iter().enumerate() {
        bytes += corpus.documents[document].num_bytes;
        if bytes >= CHUNK_BYTES || i + 1 == order.len() {
            chunks.push(&order[start..=i]);
            (start, bytes) = (i + 1, 0);
        }
    }
    chunks
}

#[cfg(test)]
pub(super) mod tests;
