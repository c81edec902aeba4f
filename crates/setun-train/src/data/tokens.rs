//! One side of the split as one stream of token ids.
//!
//! The documents stand in a seeded order, each followed by `<|endoftext|>`. The stream
//! is held in memory or read from a token file in pieces, so that it may be larger than
//! memory; both are read through [`TokenSet::read`]. Ids take two bytes where the
//! vocabulary has at most 65,536 entries, else four.

use super::{Corpus, DataError, Permutation, token_file::TokenFile};
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
};

/// Text that a thread encodes at a time; small enough to keep all cores busy to the end.
const CHUNK_BYTES: usize = 1 << 18;

/// The order of documents uses this epoch, which no order of windows reaches.
const DOCUMENT_ORDER_EPOCH: u64 = u64::MAX;

/// A token stream and what is known about it.
#[derive(Debug)]
pub struct TokenSet {
    pub(super) source: Source,
    pub(super) document_starts: Vec<u64>,
    pub(super) info: TokenInfo,
}

/// What the header of a token file says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TokenInfo {
    /// Tokens in the stream, separators included.
    pub num_tokens: u64,
    /// UTF-8 bytes of the documents, separators not counted.
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
    /// `progress` is called on this thread with (bytes done, bytes in all).
    ///
    /// # Errors
    /// No documents, a tokenizer without `<|endoftext|>`, and a document that the
    /// tokenizer refuses, with its place.
    pub fn encode(
        corpus: &Corpus,
        documents: &[usize],
        tokenizer: &Tokenizer,
        seed: u64,
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
        let encoder = Encoder {
            vocab_size: tokenizer.vocab_size() as u32,
            end_of_text,
            tokenizer_hash: blake3::hash(tokenizer.to_json().as_bytes()),
            encode: &encode,
        };
        Self::encode_with(corpus, documents, &encoder, seed, progress)
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

    /// Position of each document's first token, ascending from 0.
    pub fn document_starts(&self) -> &[u64] {
        &self.document_starts
    }

    /// blake3 of the document starts and tokens, as a token file stores them.
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
    /// u64, then ids, little-endian.
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
        Ok(())
    }

    fn encode_with(
        corpus: &Corpus,
        documents: &[usize],
        encoder: &Encoder<'_>,
        seed: u64,
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
        let raw_bytes = order
            .iter()
            .map(|&d| corpus.documents[d].text.len() as u64)
            .sum();
        let mut stream = Stream::new(encoder.vocab_size);
        encoder.run(corpus, &order, |chunk| {
            stream.append(&chunk);
            progress(stream.done_bytes, raw_bytes);
        })?;
        Ok(Self {
            info: TokenInfo {
                num_tokens: stream.ids.len() as u64,
                raw_bytes,
                vocab_size: encoder.vocab_size,
                end_of_text: encoder.end_of_text,
                tokenizer_hash: encoder.tokenizer_hash,
            },
            source: Source::Memory(stream.ids),
            document_starts: stream.document_starts,
        })
    }
}

/// Bytes of one id of a vocabulary.
pub(super) fn id_bytes(vocab_size: u32) -> usize {
    if vocab_size <= 1 << 16 { 2 } else { 4 }
}

impl Ids {
    fn len(&self) -> usize {
        match self {
            Self::U16(ids) => ids.len(),
            Self::U32(ids) => ids.len(),
        }
    }
}

/// The stream while it grows.
struct Stream {
    ids: Ids,
    document_starts: Vec<u64>,
    done_bytes: u64,
}

impl Stream {
    fn new(vocab_size: u32) -> Self {
        Self {
            ids: match id_bytes(vocab_size) {
                2 => Ids::U16(Vec::new()),
                _ => Ids::U32(Vec::new()),
            },
            document_starts: Vec::new(),
            done_bytes: 0,
        }
    }

    fn append(&mut self, chunk: &Chunk) {
        let base = self.ids.len() as u64;
        let starts = chunk
            .document_starts
            .iter()
            .map(|&start| base + start as u64);
        self.document_starts.extend(starts);
        self.done_bytes += chunk.raw_bytes;
        match &mut self.ids {
            // Encoder::encode_chunk has checked every id against the vocabulary.
            Ids::U16(ids) => ids.extend(chunk.ids.iter().map(|&id| id as u16)),
            Ids::U32(ids) => ids.extend_from_slice(&chunk.ids),
        }
    }
}

/// Neighbouring documents after encoding.
struct Chunk {
    ids: Vec<u32>,
    document_starts: Vec<usize>,
    raw_bytes: u64,
}

/// Gives the ids of each text, or says why it cannot.
type EncodeTexts<'a> = dyn Fn(&[&str]) -> Result<Vec<Vec<u32>>, String> + Sync + 'a;

/// What encoding needs of a tokenizer.
struct Encoder<'a> {
    vocab_size: u32,
    end_of_text: u32,
    tokenizer_hash: Hash,
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
        mut take: impl FnMut(Chunk),
    ) -> Result<(), DataError> {
        let chunks = chunk_documents(corpus, order);
        let num_threads = thread::available_parallelism().map_or(1, NonZero::get);
        let (next, failed) = (AtomicUsize::new(0), AtomicBool::new(false));
        let (sender, receiver) = mpsc::channel();
        let work = |sender: mpsc::Sender<_>| {
            // A claimed chunk is always encoded: so every chunk before a bad one is, and
            // the error that is reported does not depend on timing.
            while !failed.load(Ordering::Relaxed) {
                let index = next.fetch_add(1, Ordering::Relaxed);
                let Some(&documents) = chunks.get(index) else {
                    break;
                };
                let result = self.encode_chunk(corpus, documents);
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
            let mut first_error: Option<(usize, DataError)> = None;
            let mut waiting = BTreeMap::new();
            let mut expected = 0;
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
                while let Some(chunk) = waiting.remove(&expected) {
                    take(chunk);
                    expected += 1;
                }
            }
            first_error.map_or(Ok(()), |(_, why)| Err(why))
        })
    }

    fn encode_chunk(&self, corpus: &Corpus, documents: &[usize]) -> Result<Chunk, DataError> {
        let text = |document: usize| corpus.documents[document].text.as_str();
        let fail = |document, reason| DataError::Encode {
            place: corpus.place(document),
            reason,
        };
        let texts: Vec<&str> = documents.iter().map(|&d| text(d)).collect();
        let all_ids = (self.encode)(&texts).map_err(|reason| {
            // The tokenizer does not say which text it refused: ask for each.
            let refused = |&d: &usize| Some((d, (self.encode)(&[text(d)]).err()?));
            let found = documents.iter().find_map(refused);
            let (document, reason) = found.unwrap_or((documents[0], reason));
            fail(document, reason)
        })?;
        let mut chunk = Chunk {
            ids: Vec::with_capacity(all_ids.iter().map(|ids| ids.len() + 1).sum()),
            document_starts: Vec::with_capacity(documents.len()),
            raw_bytes: 0,
        };
        for (&document, ids) in documents.iter().zip(all_ids) {
            self.check_ids(&ids).map_err(|why| fail(document, why))?;
            chunk.document_starts.push(chunk.ids.len());
            chunk.ids.extend(ids);
            chunk.ids.push(self.end_of_text);
            chunk.raw_bytes += text(document).len() as u64;
        }
        Ok(chunk)
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

/// Cuts `order` into runs of about [`CHUNK_BYTES`] of text.
fn chunk_documents<'a>(corpus: &Corpus, order: &'a [usize]) -> Vec<&'a [usize]> {
    let mut chunks = Vec::new();
    let (mut start, mut bytes) = (0, 0);
    for (i, &document) in order.iter().enumerate() {
        bytes += corpus.documents[document].text.len();
        if bytes >= CHUNK_BYTES || i + 1 == order.len() {
            chunks.push(&order[start..=i]);
            (start, bytes) = (i + 1, 0);
        }
    }
    chunks
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::data::Document;
    use std::{cell::RefCell, path::PathBuf};

    /// A corpus of these texts in one file.
    fn corpus(texts: &[String]) -> Corpus {
        let documents = texts.iter().map(|text| Document {
            source: 0,
            offset: 5,
            text: text.clone(),
        });
        Corpus {
            sources: vec![PathBuf::from("a.txt")],
            documents: documents.collect(),
            ..Corpus::default()
        }
    }

    /// Encodes with one id per byte; `vocab_size - 1` is `<|endoftext|>`.
    fn encode_bytes(
        texts: &[String],
        vocab_size: u32,
        seed: u64,
        progress: &dyn Fn(u64, u64),
    ) -> Result<TokenSet, DataError> {
        let encode_one = |text: &&str| {
            if text.contains('!') {
                return Err(format!("no ! please: {}", text.len()));
            }
            Ok(text.bytes().map(u32::from).collect())
        };
        let encode = |texts: &[&str]| texts.iter().map(encode_one).collect();
        let encoder = Encoder {
            vocab_size,
            end_of_text: vocab_size - 1,
            tokenizer_hash: blake3::hash(b"bytes"),
            encode: &encode,
        };
        let documents: Vec<usize> = (0..texts.len()).collect();
        TokenSet::encode_with(&corpus(texts), &documents, &encoder, seed, progress)
    }

    /// A stream of documents with these ids (without separators), in this order.
    pub(in crate::data) fn token_set(documents: &[Vec<u32>], vocab_size: u32) -> TokenSet {
        let mut stream = Stream::new(vocab_size);
        for document in documents {
            stream.append(&Chunk {
                ids: [&document[..], &[vocab_size - 1]].concat(),
                document_starts: vec![0],
                raw_bytes: document.len() as u64,
            });
        }
        TokenSet {
            info: TokenInfo {
                num_tokens: stream.ids.len() as u64,
                raw_bytes: stream.done_bytes,
                vocab_size,
                end_of_text: vocab_size - 1,
                tokenizer_hash: blake3::hash(b"test"),
            },
            source: Source::Memory(stream.ids),
            document_starts: stream.document_starts,
        }
    }

    pub(in crate::data) fn all(tokens: &TokenSet) -> Vec<u32> {
        let mut ids = vec![0; tokens.num_tokens() as usize];
        tokens.read(0, &mut ids).expect("reads");
        ids
    }

    /// Several chunks of text, some documents larger than a chunk.
    fn texts() -> Vec<String> {
        let line = |i: usize| format!("document {i} ").repeat(1 + i * i % 977);
        let mut texts: Vec<String> = (0..300).map(line).collect();
        texts.push("x".repeat(CHUNK_BYTES + 1));
        texts
    }

    #[test]
    fn every_document_is_there_once_in_the_seeded_order() {
        let texts = texts();
        let tokens = encode_bytes(&texts, 257, 3, &|_, _| {}).expect("encodes");
        let ids = all(&tokens);
        let starts = tokens.document_starts();
        let ends = starts.iter().skip(1).copied().chain([ids.len() as u64]);
        let mut found: Vec<String> = Vec::new();
        for (&from, to) in starts.iter().zip(ends) {
            let (last, body) = ids[from as usize..to as usize]
                .split_last()
                .expect("not empty");
            assert_eq!(*last, 256);
            found.push(body.iter().map(|&id| id as u8 as char).collect());
        }
        assert_ne!(found, texts, "the order is shuffled");
        let (mut found, mut texts) = (found, texts);
        found.sort();
        texts.sort();
        assert_eq!(found, texts);
        let raw: usize = texts.iter().map(String::len).sum();
        assert_eq!(tokens.info().raw_bytes, raw as u64);
        assert_eq!(tokens.num_tokens(), (raw + texts.len()) as u64);
    }

    #[test]
    fn a_real_tokenizer_gives_the_text_back_and_is_recognised() {
        let texts = ["one small text, <|endoftext|> included", "another\none"].map(str::to_owned);
        let train = |size| Tokenizer::train(texts.iter().map(String::as_str), size);
        let tokenizer = train(260).expect("trains");
        let corpus = corpus(&texts);
        let tokens = TokenSet::encode(&corpus, &[0, 1], &tokenizer, 1, &|_, _| {});
        let tokens = tokens.expect("encodes");
        let end = tokenizer.end_of_text().expect("it was trained here");
        let mut found: Vec<String> = all(&tokens)
            .split_inclusive(|&id| id == end)
            .map(|document| tokenizer.decode(&document[..document.len() - 1]))
            .collect();
        found.sort();
        assert_eq!(found, [texts[1].clone(), texts[0].clone()]);
        tokens.check_tokenizer(&tokenizer).expect("the same");
        let other = train(261).expect("trains");
        let why = tokens.check_tokenizer(&other).expect_err("another");
        assert!(why.to_string().contains("another tokenizer"), "{why}");
    }

    #[test]
    fn the_stream_is_a_function_of_the_seed() {
        let texts = texts();
        let hash = |seed| {
            let tokens = encode_bytes(&texts, 257, seed, &|_, _| {}).expect("encodes");
            tokens.content_hash().expect("hashes")
        };
        assert_eq!(hash(1), hash(1));
        assert_ne!(hash(1), hash(2));
    }

    #[test]
    fn progress_rises_to_the_total() {
        let seen = RefCell::new(Vec::new());
        let progress = |done, total| seen.borrow_mut().push((done, total));
        let tokens = encode_bytes(&texts(), 257, 0, &progress).expect("encodes");
        let seen = seen.into_inner();
        assert!(seen.len() > 2 && seen.is_sorted());
        let total = tokens.info().raw_bytes;
        assert_eq!(seen.last(), Some(&(total, total)));
    }

    #[test]
    fn the_first_bad_document_is_named_whatever_the_threads_do() {
        let mut texts = texts();
        for text in texts.iter_mut().skip(200) {
            text.push('!');
        }
        let messages: Vec<String> = (0..5)
            .map(|_| encode_bytes(&texts, 257, 3, &|_, _| {}).expect_err("bad"))
            .map(|why| why.to_string())
            .collect();
        assert!(
            messages[0].contains("a.txt, byte 5: no ! please"),
            "{}",
            messages[0]
        );
        assert!(messages.iter().all(|m| *m == messages[0]), "{messages:?}");
    }

    #[test]
    fn ids_outside_the_vocabulary_and_no_documents_are_refused() {
        let message = |vocab_size| {
            let why = encode_bytes(&["abc".to_owned()], vocab_size, 0, &|_, _| {});
            why.expect_err("refused").to_string()
        };
        assert!(
            message(98).contains("<|endoftext|> (id 97)"),
            "{}",
            message(98)
        );
        assert!(
            message(97).contains("id 97 in a vocabulary of 97"),
            "{}",
            message(97)
        );
        let why = encode_bytes(&[], 257, 0, &|_, _| {}).expect_err("none");
        assert!(why.to_string().contains("no documents"), "{why}");
    }

    #[test]
    fn the_width_follows_the_vocabulary() {
        let narrow = token_set(&[vec![65_534, 0]], 65_536);
        assert!(matches!(narrow.source, Source::Memory(Ids::U16(_))));
        assert_eq!(all(&narrow), [65_534, 0, 65_535]);
        let wide = token_set(&[vec![65_536, 0]], 65_537 + 1);
        assert!(matches!(wide.source, Source::Memory(Ids::U32(_))));
        assert_eq!(all(&wide), [65_536, 0, 65_537]);
    }

    #[test]
    fn circular_reads_wrap() {
        let tokens = token_set(&[vec![1, 2], vec![3]], 10);
        let mut out = [0; 12];
        tokens.read_circular(7, &mut out).expect("reads");
        assert_eq!(out, [9, 3, 9, 1, 2, 9, 3, 9, 1, 2, 9, 3]);
    }

    #[test]
    #[should_panic(expected = "2 tokens from 3 of 4")]
    fn reads_outside_are_refused() {
        let tokens = token_set(&[vec![1, 2, 3]], 10);
        let _ = tokens.read(3, &mut [0; 2]);
    }
}
