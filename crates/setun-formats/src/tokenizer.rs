//! Byte-level BPE: training, encoding, decoding.
//!
//! Runs on the `tokenizers` crate and its `tokenizer.json`. What [`Tokenizer::train`]
//! makes has the structure of Qwen2's tokenizer, so that transformers and llama.cpp
//! (`qwen2`) read it identically.

mod check;
mod decode;
mod train;

pub(crate) use check::is_version_line;
pub use decode::DecodeStream;

use crate::config::json::cut;
use check::{check_bytes, check_file, check_model};
use std::sync::OnceLock;
use thiserror::Error;
use tokenizers::AddedToken;
use tokenizers::normalizers::NormalizerWrapper;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::split::SplitPattern;
use tokenizers::processors::PostProcessorWrapper;
use tokenizers::tokenizer::SplitDelimiterBehavior;

/// Special token that ends a document.
pub const END_OF_TEXT: &str = "<|endoftext|>";

/// Qwen2's pre-tokenizer: words never cross what this pattern matches.
pub const QWEN_PATTERN: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);

/// Longest `tokenizer.json` that is read, in bytes; Qwen3's has 11 million.
pub const MAX_TOKENIZER_BYTES: usize = 64 << 20;
/// Most tokens of a vocabulary.
pub const MAX_VOCAB_SIZE: usize = crate::config::MAX_VOCAB_SIZE;

/// Bytes after which a long text is cut at the next line; the crate below needs many
/// times the memory of what it is given.
const PIECE_BYTES: usize = 1 << 16;
/// Bytes that are encoded at once, on all threads.
const BATCH_BYTES: usize = 1 << 22;

/// Why there is no such tokenizer or no such encoding.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum TokenizerError {
    /// More than [`MAX_TOKENIZER_BYTES`].
    #[error("{found} bytes are too long for a tokenizer.json (at most {MAX_TOKENIZER_BYTES})")]
    TooLong {
        /// Length of the input.
        found: usize,
    },
    /// The `tokenizers` crate refuses the file.
    #[error("not a tokenizer.json: {0}; download it again or export it from the model")]
    Malformed(String),
    /// A tokenizer of another kind than Qwen's.
    #[error("{part} is {found}; Setun reads byte-level BPE like Qwen's, which has {expected}")]
    Unsupported {
        /// Part of the file.
        part: &'static str,
        /// What it is.
        found: String,
        /// What it should be.
        expected: &'static str,
    },
    /// An added token whose id in the file is not the one that it gets.
    #[error(
        "added token {content:?} has id {found}, but its place gives it {expected}; number it so"
    )]
    MisplacedToken {
        /// The token.
        content: String,
        /// Its id in the file.
        found: u32,
        /// The id that follows from the vocabulary.
        expected: u32,
    },
    /// A token without an id of its own.
    #[error("token {token:?} has id {id}, {problem}; download the tokenizer again")]
    BadToken {
        /// The token.
        token: String,
        /// Its id in the file.
        id: u32,
        /// What is wrong with it.
        problem: String,
    },
    /// A merge that the vocabulary does not allow.
    #[error("merge {index} of model.merges: {problem}; download the tokenizer again")]
    BadMerge {
        /// Place in the list, from 0.
        index: usize,
        /// What is wrong with it.
        problem: String,
    },
    /// More than [`MAX_VOCAB_SIZE`], or ids beyond it.
    #[error("token id {found} is too large; at most {MAX_VOCAB_SIZE} tokens are read")]
    VocabTooLarge {
        /// Largest id.
        found: u32,
    },
    /// A vocabulary that cannot hold all bytes and [`END_OF_TEXT`], or is absurdly large.
    #[error(
        "vocab_size {found} cannot be trained; choose {MIN_VOCAB_SIZE} (256 bytes and \
         {END_OF_TEXT}) to {MAX_VOCAB_SIZE}"
    )]
    VocabSize {
        /// The size that was asked for.
        found: usize,
    },
    /// The corpus has too few different words.
    #[error(
        "the corpus yields at most {largest} tokens, not {found}; lower vocab_size to {largest} \
         or train the tokenizer on more text"
    )]
    CorpusTooSmall {
        /// The size that was asked for.
        found: usize,
        /// Largest size that the corpus yields.
        largest: usize,
    },
    /// More text than the trainer can count.
    #[error("more than {max} bytes of text; train the tokenizer on a sample of them")]
    CorpusTooLarge {
        /// Most bytes.
        max: u64,
    },
    /// The `tokenizers` crate failed.
    #[error("the text cannot be tokenized: {0}")]
    Failed(String),
    /// Plain text came out as [`END_OF_TEXT`], through a vocabulary that spells it.
    #[error("the tokenizer turns plain text into {END_OF_TEXT}; use one that keeps it special")]
    EndOfTextInText,
}

/// Smallest vocabulary: every byte, and [`END_OF_TEXT`].
pub const MIN_VOCAB_SIZE: usize = 257;

/// A byte-level BPE tokenizer. Any text has an encoding, and decoding gives back its
/// NFC form.
#[derive(Clone)]
pub struct Tokenizer {
    special: tokenizers::Tokenizer,
    /// The same, to which special tokens are ordinary text. Made when it is needed: a copy of
    /// a large vocabulary takes a while.
    plain: OnceLock<tokenizers::Tokenizer>,
    json: String,
    vocab_size: usize,
    end_of_text: Option<u32>,
    cuts_at_lines: bool,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut shown = f.debug_struct("Tokenizer");
        shown.field("vocab_size", &self.vocab_size);
        shown.field("end_of_text", &self.end_of_text);
        shown.finish_non_exhaustive()
    }
}

impl Tokenizer {
    /// Reads a `tokenizer.json`. Truncation and padding that it asks for are not applied.
    ///
    /// # Errors
    /// Anything but byte-level BPE with all 256 bytes, random merges (`dropout`), added
    /// tokens out of place, absurd sizes.
    pub fn from_bytes(json: &[u8]) -> Result<Self, TokenizerError> {
        if json.len() > MAX_TOKENIZER_BYTES {
            return Err(TokenizerError::TooLong { found: json.len() });
        }
        let malformed = |e: &dyn std::fmt::Display| TokenizerError::Malformed(cut(&e.to_string()));
        let text = std::str::from_utf8(json).map_err(|e| malformed(&e))?;
        let inner = check_file(text)?.into_tokenizer()?;
        check_model(&inner)?;
        Self::new(inner, text.to_owned())
    }

    /// Trains a tokenizer like Qwen2's: NFC, [`QWEN_PATTERN`], byte-level BPE over all 256
    /// bytes, and [`END_OF_TEXT`] with the last id. `vocab_size` counts everything.
    ///
    /// `texts` are documents or parts of them; where they are cut does not matter at line
    /// ends. Text that spells [`END_OF_TEXT`] is text. The same texts give the same
    /// tokenizer, in any order and on any number of threads: pairs are merged by count,
    /// then by ids, and counts are sums.
    ///
    /// # Errors
    /// A `vocab_size` below [`MIN_VOCAB_SIZE`] or above what the texts yield (the error
    /// says how much that is); more than 2 GiB of text.
    pub fn train<T: AsRef<str>>(
        texts: impl Iterator<Item = T> + Send,
        vocab_size: usize,
    ) -> Result<Self, TokenizerError> {
        let inner = train::train(texts, vocab_size)?;
        let json = inner.to_string(false).map_err(failed)?;
        Self::new(inner, json)
    }

    fn new(mut inner: tokenizers::Tokenizer, json: String) -> Result<Self, TokenizerError> {
        check_bytes(&inner)?;
        // The ids of the model have no holes; an added token may be one of its words.
        let added = inner.get_added_tokens_decoder().into_keys().max();
        let vocab_size = inner
            .get_vocab_size(false)
            .max(added.map_or(0, |id| id as usize + 1));
        let largest = vocab_size.saturating_sub(1) as u32;
        if vocab_size > MAX_VOCAB_SIZE {
            return Err(TokenizerError::VocabTooLarge { found: largest });
        }
        inner.with_truncation(None).map_err(failed)?;
        inner.with_padding(None);
        // No token is ever added, and a template could repeat or swap texts.
        inner.with_post_processor(None::<PostProcessorWrapper>);
        let end_of_text = inner.token_to_id(END_OF_TEXT);
        if end_of_text.is_some() {
            // Special in any case, so that plain text never becomes this token.
            let token = AddedToken::from(END_OF_TEXT, true);
            inner.add_special_tokens([token]).map_err(failed)?;
        }
        let cuts_at_lines = splits_at_lines(&inner);
        Ok(Self {
            special: inner,
            plain: OnceLock::new(),
            json,
            vocab_size,
            end_of_text,
            cuts_at_lines,
        })
    }

    /// The `tokenizer.json`: the one that was read, byte for byte, or the one that was
    /// trained, on one line.
    pub fn to_json(&self) -> String {
        self.json.clone()
    }

    /// Token ids of plain text, such as a document of a corpus. No token is added, and
    /// text that spells a special token stays text.
    ///
    /// # Errors
    /// [`TokenizerError::EndOfTextInText`] for a foreign vocabulary that has
    /// [`END_OF_TEXT`] as an ordinary word.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        let mut ids = self.encode_batch(&[text])?;
        Ok(ids.pop().unwrap_or_default())
    }

    /// Token ids of each text, as [`encode`](Self::encode) gives them, on all threads.
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub fn encode_batch(&self, texts: &[&str]) -> Result<Vec<Vec<u32>>, TokenizerError> {
        let mut ids = vec![Vec::new(); texts.len()];
        let mut batch = Vec::new();
        let mut num_bytes = 0;
        for (index, text) in texts.iter().enumerate() {
            for piece in Pieces::new(text, self.cuts_at_lines) {
                batch.push((index, piece));
                num_bytes += piece.len();
                if num_bytes >= BATCH_BYTES {
                    self.encode_pieces(&batch, &mut ids)?;
                    batch.clear();
                    num_bytes = 0;
                }
            }
        }
        self.encode_pieces(&batch, &mut ids)?;
        Ok(ids)
    }

    /// Appends the ids of each `(index, piece)` to `ids[index]`.
    fn encode_pieces(
        &self,
        batch: &[(usize, &str)],
        ids: &mut [Vec<u32>],
    ) -> Result<(), TokenizerError> {
        let pieces: Vec<&str> = batch.iter().map(|&(_, piece)| piece).collect();
        let encodings = self
            .plain()
            .encode_batch_fast(pieces, false)
            .map_err(failed)?;
        for (&(index, _), encoding) in batch.iter().zip(&encodings) {
            let piece_ids = encoding.get_ids();
            if self.end_of_text.is_some_and(|end| piece_ids.contains(&end)) {
                return Err(TokenizerError::EndOfTextInText);
            }
            ids[index].extend_from_slice(piece_ids);
        }
        Ok(())
    }

    fn plain(&self) -> &tokenizers::Tokenizer {
        self.plain.get_or_init(|| {
            let mut plain = self.special.clone();
            plain.set_encode_special_tokens(true);
            plain
        })
    }

    /// Token ids of a prompt in which text that spells a special token is that token. No
    /// token is added.
    ///
    /// # Errors
    /// A failure of the `tokenizers` crate.
    pub fn encode_with_special(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        let encoding = self.special.encode_fast(text, false).map_err(failed)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Text of `ids`, special tokens included. Bytes that are not UTF-8 become U+FFFD;
    /// ids without a token are skipped.
    pub fn decode(&self, ids: &[u32]) -> String {
        let mut bytes = Vec::new();
        for &id in ids {
            self.append_bytes(id, &mut bytes);
        }
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Decodes token by token: what comes out, put together, is what
    /// [`decode`](Self::decode) gives.
    pub fn stream(&self) -> DecodeStream<'_> {
        DecodeStream::new(self)
    }

    /// Number of token ids, specials included: one more than the largest. An embedding
    /// needs at least as many rows.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The first id that is not the same token for `other`: what one writes, the other must
    /// not read where there is one.
    pub fn first_difference(&self, other: &Self) -> Option<u32> {
        let token = |tokenizer: &Self, id| tokenizer.special.id_to_token(id);
        let mut ids = 0..self.vocab_size.max(other.vocab_size) as u32;
        ids.find(|&id| token(self, id) != token(other, id))
    }

    /// Id of [`END_OF_TEXT`], if the vocabulary has it.
    pub fn end_of_text(&self) -> Option<u32> {
        self.end_of_text
    }
}

/// A long text cut into pieces that encode on their own to the same ids.
///
/// Cuts lie between a line feed and a character that is not white space: no match of
/// [`QWEN_PATTERN`] has both, none looks ahead over that place, and NFC never composes a
/// line feed with what follows.
struct Pieces<'a> {
    rest: &'a str,
    cuts_at_lines: bool,
}

impl<'a> Pieces<'a> {
    fn new(text: &'a str, cuts_at_lines: bool) -> Self {
        Self {
            rest: text,
            cuts_at_lines,
        }
    }

    /// Length of the first piece.
    fn cut(&self) -> usize {
        let all = self.rest.len();
        if !self.cuts_at_lines || all <= PIECE_BYTES {
            return all;
        }
        let ends = self.rest.as_bytes().iter().enumerate().skip(PIECE_BYTES);
        let mut ends = ends
            .filter(|&(_, &byte)| byte == b'\n')
            .map(|(at, _)| at + 1);
        let cuts = |end: &usize| !self.rest[*end..].starts_with(char::is_whitespace);
        ends.find(cuts).unwrap_or(all)
    }
}

impl<'a> Iterator for Pieces<'a> {
    type Item = &'a str;

    fn next(&mut self) -> Option<&'a str> {
        if self.rest.is_empty() {
            return None;
        }
        let (piece, rest) = self.rest.split_at(self.cut());
        self.rest = rest;
        Some(piece)
    }
}

/// Whether the tokenizer splits text as [`Pieces`] needs it.
fn splits_at_lines(inner: &tokenizers::Tokenizer) -> bool {
    let normalizer = matches!(
        inner.get_normalizer(),
        None | Some(NormalizerWrapper::NFC(_))
    );
    let Some(PreTokenizerWrapper::Sequence(sequence)) = inner.get_pre_tokenizer() else {
        return false;
    };
    let [
        PreTokenizerWrapper::Split(split),
        PreTokenizerWrapper::ByteLevel(bytes),
    ] = sequence.as_ref()
    else {
        return false;
    };
    let pattern = matches!(&split.pattern, SplitPattern::Regex(r) if r == QWEN_PATTERN);
    let isolated = split.behavior == SplitDelimiterBehavior::Isolated && !split.invert;
    let crosses = |token: &AddedToken| token.lstrip || token.rstrip || token.content.contains('\n');
    let crossed = inner.get_added_tokens_decoder().values().any(crosses);
    normalizer && pattern && isolated && !bytes.add_prefix_space && !bytes.use_regex && !crossed
}

fn failed(error: tokenizers::Error) -> TokenizerError {
    TokenizerError::Failed(error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    const PROSE: &str = "The balance ternary machine of Moscow counted with minus one, zero and \
        one. It's small, it's cheap, and they've built fifty of them.\n\n  Weights that \
        are ternary need two bits; the scale of a group needs sixteen.\n";

    const TRICKY: &str = "naïve e\u{301}té, 漢字とかな 😀👩‍👩‍👧 \u{0}\u{7f}\r\n\t\tx  y\u{a0}z   \n 3.14 it'S \
        <|endoftext|> <|im_start|>\u{200b}";

    /// Words of the prose in a shuffled, repeated order: enough different pairs.
    fn corpus() -> Vec<String> {
        let words: Vec<&str> = PROSE.split_inclusive(' ').collect();
        let document = |i: usize| {
            let word = |j: usize| words[(i * 7 + j * j * 3 + j) % words.len()];
            (0..40).map(word).collect::<String>()
        };
        (0..30).map(document).chain([TRICKY.to_owned()]).collect()
    }

    fn train(texts: &[String], vocab_size: usize) -> Result<Tokenizer, TokenizerError> {
        Tokenizer::train(texts.iter().map(String::as_str), vocab_size)
    }

    fn trained() -> Tokenizer {
        train(&corpus(), 400).unwrap()
    }

    /// The trained tokenizer's file after a change.
    fn changed(change: impl FnOnce(&mut Value)) -> Result<Tokenizer, TokenizerError> {
        let mut file: Value = serde_json::from_str(&trained().to_json()).unwrap();
        change(&mut file);
        Tokenizer::from_bytes(file.to_string().as_bytes())
    }

    #[test]
    fn vocabulary_has_exactly_the_size_asked_for() {
        for vocab_size in [257, 258, 300, 400] {
            let tokenizer = train(&corpus(), vocab_size).unwrap();
            assert_eq!(tokenizer.vocab_size(), vocab_size);
            assert_eq!(tokenizer.end_of_text(), Some(vocab_size as u32 - 1));
        }
    }

    #[test]
    fn a_corpus_that_is_too_small_says_how_far_it_goes() {
        let texts = ["banana".to_owned()];
        let error = train(&texts, 1000).unwrap_err();
        let TokenizerError::CorpusTooSmall {
            found: 1000,
            largest,
        } = error
        else {
            panic!("{error}");
        };
        assert!(largest > MIN_VOCAB_SIZE);
        assert_eq!(train(&texts, largest).unwrap().vocab_size(), largest);
        assert!(train(&texts, largest + 1).is_err());
        assert_eq!(train(&[], 257).unwrap().vocab_size(), 257);
        for found in [0, 256, MAX_VOCAB_SIZE + 1] {
            assert_eq!(
                train(&texts, found).unwrap_err(),
                TokenizerError::VocabSize { found }
            );
        }
    }

    #[test]
    fn training_is_deterministic_in_any_order() {
        let mut texts = corpus();
        let first = train(&texts, 420).unwrap().to_json();
        for _ in 0..5 {
            texts.rotate_left(7);
            assert_eq!(train(&texts, 420).unwrap().to_json(), first);
        }
    }

    #[test]
    fn structure_is_that_of_qwen2() {
        let file: Value = serde_json::from_str(&trained().to_json()).unwrap();
        let byte_level = json!({ "type": "ByteLevel", "add_prefix_space": false,
            "trim_offsets": false, "use_regex": false });
        let split = json!({ "type": "Split", "pattern": { "Regex": QWEN_PATTERN },
            "behavior": "Isolated", "invert": false });
        assert_eq!(file["normalizer"], json!({ "type": "NFC" }));
        assert_eq!(
            file["pre_tokenizer"]["pretokenizers"],
            json!([split, byte_level])
        );
        assert_eq!(file["post_processor"], byte_level);
        assert_eq!(file["decoder"], byte_level);
        let end = json!([{ "id": 399, "content": END_OF_TEXT, "single_word": false,
            "lstrip": false, "rstrip": false, "normalized": false, "special": true }]);
        assert_eq!(file["added_tokens"], end);
        let model = &file["model"];
        assert_eq!(model["vocab"].as_object().unwrap().len(), 399);
        assert_eq!(model["merges"].as_array().unwrap().len(), 399 - 256);
        // Bytes first, in the order of their characters, as in Qwen's vocabulary.
        assert_eq!(
            (&model["vocab"]["!"], &model["vocab"]["Ń"]),
            (&json!(0), &json!(255))
        );
    }

    #[test]
    fn texts_round_trip() {
        let tokenizer = trained();
        let again = Tokenizer::from_bytes(tokenizer.to_json().as_bytes()).unwrap();
        assert_eq!(again.to_json(), tokenizer.to_json());
        for text in ["", " ", "\n", PROSE, TRICKY, "\u{1F9C2}"] {
            let ids = tokenizer.encode(text).unwrap();
            // NFC is the only thing that changes.
            let expected = text.replace("e\u{301}", "é");
            assert_eq!(tokenizer.decode(&ids), expected);
            assert_eq!(again.encode(text).unwrap(), ids);
            assert!(ids.iter().all(|&id| (id as usize) < tokenizer.vocab_size()));
        }
        let ids = tokenizer.encode(PROSE).unwrap();
        assert!(ids.len() < PROSE.len() * 2 / 3, "merges are not used");
    }

    #[test]
    fn only_prompts_spell_special_tokens() {
        let text = "a<|endoftext|>b";
        for special in [true, false] {
            let tokenizer = changed(|file| file["added_tokens"][0]["special"] = special.into());
            let tokenizer = tokenizer.unwrap();
            let end = tokenizer.end_of_text().unwrap();
            let plain = tokenizer.encode(text).unwrap();
            assert!(!plain.contains(&end));
            assert_eq!(
                tokenizer.encode_batch(&[text, text]).unwrap(),
                [plain.clone(), plain.clone()]
            );
            assert_eq!(tokenizer.decode(&plain), text);
            let prompt = tokenizer.encode_with_special(text).unwrap();
            assert_eq!(prompt.iter().filter(|&&id| id == end).count(), 1);
            assert_eq!(tokenizer.decode(&prompt), text);
        }
    }

    #[test]
    fn a_vocabulary_that_spells_the_end_of_text_is_caught() {
        let tokenizer = changed(|file| {
            // Merges that build the token letter by letter, without a pattern in the way.
            let mut built = String::from("<");
            let mut merges = Vec::new();
            for c in END_OF_TEXT.chars().skip(1) {
                merges.push(json!([built, c.to_string()]));
                built.push(c);
                let vocab = file["model"]["vocab"].as_object_mut().unwrap();
                let next = vocab.len();
                vocab.entry(&built).or_insert(next.into());
            }
            let last = file["model"]["vocab"][END_OF_TEXT].clone();
            file["model"]["merges"] = merges.into();
            file["added_tokens"][0]["id"] = last;
            file["pre_tokenizer"] = file["decoder"].clone();
        });
        let tokenizer = tokenizer.unwrap();
        assert_eq!(
            tokenizer.encode("a<|endoftext|>"),
            Err(TokenizerError::EndOfTextInText)
        );
        assert!(tokenizer.encode("a<|endoftext|").is_ok());
    }

    #[test]
    fn streams_give_whole_characters_and_the_same_text() {
        let tokenizer = train(&corpus(), 257).unwrap();
        let mut ids = tokenizer.encode(TRICKY).unwrap();
        ids.extend([tokenizer.end_of_text().unwrap(), 9999]);
        let mut stream = tokenizer.stream();
        let mut silent = 0;
        let mut text = String::new();
        for &id in &ids {
            match stream.push(id) {
                Some(part) => text.push_str(&part),
                None => silent += 1,
            }
        }
        assert_eq!(stream.finish(), None);
        assert_eq!(text, tokenizer.decode(&ids));
        assert!(!text.contains(char::REPLACEMENT_CHARACTER) && silent > 10);
        let ids = tokenizer.encode("é").unwrap();
        let mut stream = tokenizer.stream();
        assert_eq!(stream.push(ids[0]), None);
        assert_eq!(stream.finish().as_deref(), Some("\u{fffd}"));
    }

    #[test]
    fn long_texts_encode_as_in_one_piece() {
        let tokenizer = trained();
        assert!(tokenizer.cuts_at_lines);
        let line_ends = [
            "\n",
            "\n\n ",
            "\r\n",
            ".\n\u{301}",
            " \n\t",
            "\n<|endoftext|>\n",
        ];
        let mut long = String::new();
        for (i, line_end) in line_ends.iter().cycle().take(6000).enumerate() {
            long.push_str(&PROSE[i % 50..60 + i % 60]);
            long.push_str(line_end);
        }
        let pieces: Vec<&str> = Pieces::new(&long, true).collect();
        assert!(pieces.len() > 3);
        assert_eq!(pieces.concat(), long);
        assert_eq!(Pieces::new(&long, false).count(), 1);
        let whole = tokenizer.plain().encode_fast(long.as_str(), false).unwrap();
        assert_eq!(tokenizer.encode(&long).unwrap(), whole.get_ids());
        assert_eq!(
            tokenizer.encode_batch(&["x", &long]).unwrap()[1],
            whole.get_ids()
        );
        // Without a line end there is nothing to cut.
        let line = "x".repeat(3 * PIECE_BYTES);
        assert_eq!(Pieces::new(&line, true).count(), 1);
        assert!(
            !changed(|f| f["normalizer"] = json!({ "type": "NFKC" }))
                .unwrap()
                .cuts_at_lines
        );
    }

    #[test]
    fn truncation_and_padding_are_not_applied() {
        let tokenizer = changed(|file| {
            file["truncation"] = json!({ "direction": "Right", "max_length": 2,
                "strategy": "LongestFirst", "stride": 0 });
            file["padding"] = json!({ "strategy": { "Fixed": 50 }, "direction": "Right",
                "pad_to_multiple_of": null, "pad_id": 0, "pad_type_id": 0, "pad_token": "!" });
        });
        let tokenizer = tokenizer.unwrap();
        assert_eq!(
            tokenizer.encode(PROSE).unwrap(),
            trained().encode(PROSE).unwrap()
        );
        assert!(tokenizer.encode("").unwrap().is_empty());
    }

    #[test]
    fn other_tokenizers_are_refused() {
        type Change = fn(&mut Value);
        let cases: [(&str, Change); 7] = [
            ("dropout", |f| f["model"]["dropout"] = json!(0.1)),
            ("byte_fallback", |f| {
                f["model"]["byte_fallback"] = json!(true)
            }),
            ("pre_tokenizer", |f| f["pre_tokenizer"] = Value::Null),
            ("decoder", |f| f["decoder"] = Value::Null),
            ("byte 0x7a", |f| {
                let vocab = f["model"]["vocab"].as_object_mut().unwrap();
                let id = vocab.remove("z").unwrap();
                vocab.insert("zed".to_owned(), id);
                f["model"]["merges"] = json!([]);
            }),
            ("has id 7000", |f| f["added_tokens"][0]["id"] = json!(7000)),
            ("the model", |f| {
                f["model"] = json!({ "type": "WordLevel", "vocab": { "a": 0 }, "unk_token": "a" });
            }),
        ];
        for (part, change) in cases {
            let error = changed(change).unwrap_err().to_string();
            assert!(error.contains(part), "{part}: {error}");
        }
        for bad in [&b"{}"[..], b"", b"\xff\xfe", b"[1]"] {
            let result = Tokenizer::from_bytes(bad);
            assert!(matches!(result, Err(TokenizerError::Malformed(_))));
        }
        let long = vec![b' '; MAX_TOKENIZER_BYTES + 1];
        assert!(matches!(
            Tokenizer::from_bytes(&long),
            Err(TokenizerError::TooLong { .. })
        ));
    }

    #[test]
    fn a_published_tokenizer_loads() {
        let Some(path) = std::env::var_os("SETUN_TOKENIZER_FILE") else {
            println!("skipped: SETUN_TOKENIZER_FILE names no Qwen3 tokenizer.json");
            return;
        };
        let json = std::fs::read(path).unwrap();
        let tokenizer = Tokenizer::from_bytes(&json).unwrap();
        assert_eq!(tokenizer.vocab_size(), 151_669);
        assert_eq!(tokenizer.end_of_text(), Some(151_643));
        assert!(tokenizer.cuts_at_lines);
        assert_eq!(tokenizer.to_json().as_bytes(), json);
        for text in [PROSE, TRICKY] {
            let ids = tokenizer.encode(text).unwrap();
            assert_eq!(tokenizer.decode(&ids), text.replace("e\u{301}", "é"));
        }
        let chat = tokenizer
            .encode_with_special("<|im_start|>user\nHello")
            .unwrap();
        assert_eq!(chat, [151_644, 872, 198, 9707]);
    }
}
