//! What a `tokenizer.json` must hold before the `tokenizers` crate may see it, and the model
//! that is made of it.
//!
//! That crate trusts its input: a merge whose result is longer than every token is out of
//! bounds there, a prefix is cut off bytes that need not have it, of two tokens with one
//! id either may win, and behind a hole in the ids an added token takes the id of a word.

use super::decode::byte_of;
use super::{MAX_VOCAB_SIZE, TokenizerError};
use crate::config::json::{cut, refuse_repeated_keys_but};
use serde::de::{Error, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;
use std::borrow::Cow;
use std::collections::{BTreeMap, HashSet};
use std::fmt;
use tokenizers::models::ModelWrapper;
use tokenizers::models::bpe::{BPE, BpeBuilder, Vocab as Vocabulary};
use tokenizers::normalizers::NormalizerWrapper;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, DecoderWrapper};

/// An added token, whose id the `tokenizers` crate assigns anew.
#[derive(Deserialize)]
struct NumberedToken {
    id: u32,
    #[serde(flatten)]
    token: AddedToken,
}

/// Checks the text of a whole `tokenizer.json`; returns it in parts.
///
/// # Errors
/// What is not JSON, repeats a key or has no BPE model; ids that are used twice, leave a
/// hole or are too large; added tokens that are empty or repeated.
pub(super) fn check_file(text: &str) -> Result<TokenFile<'_>, TokenizerError> {
    let malformed = |e: serde_json::Error| TokenizerError::Malformed(cut(&e.to_string()));
    let large: [&[&str]; 2] = [&["model", "vocab"], &["model", "merges"]];
    refuse_repeated_keys_but(text.as_bytes(), &large).map_err(malformed)?;
    let file = serde_json::from_str::<TokenFile<'_>>(text).map_err(malformed);
    let kind = match &file {
        Ok(file) => file.model.kind.clone(),
        // A model of another kind has other keys, so that the file may not be read to its end.
        Err(_) => {
            let file: KindFile = serde_json::from_str(text).map_err(malformed)?;
            file.model.kind
        }
    };
    if let Some(kind) = kind.filter(|kind| kind != "BPE") {
        return unsupported("the model", quoted(&kind), "BPE");
    }
    let file = file?;
    let affixes = [
        &file.model.continuing_subword_prefix,
        &file.model.end_of_word_suffix,
    ];
    if let Some(affix) = affixes
        .into_iter()
        .flatten()
        .find(|affix| !affix.is_empty())
    {
        return unsupported("a prefix or suffix of model", quoted(affix), "null");
    }
    check_steps(&file)?;
    let vocab = &file.model.vocab.0;
    check_ids(vocab).map_err(|e| repeated(vocab).unwrap_or(e))?;
    check_spelling(&file.model.merges)?;
    check_added(&file.added_tokens)?;
    Ok(file)
}

#[derive(Deserialize)]
struct KindFile {
    model: Kind,
}

#[derive(Deserialize)]
struct Kind {
    #[serde(rename = "type")]
    kind: Option<String>,
}

// Texts are borrowed from the file where they have no escapes, and a merge is no untagged enum,
// because a large vocabulary is read each time that a program starts.
#[derive(Deserialize)]
pub(super) struct TokenFile<'a> {
    version: Option<String>,
    #[serde(default)]
    added_tokens: Vec<NumberedToken>,
    // Read twice: by the checks, and then by the crate, which panics over some.
    #[serde(borrow)]
    normalizer: Option<&'a RawValue>,
    #[serde(borrow)]
    pre_tokenizer: Option<&'a RawValue>,
    #[serde(borrow)]
    decoder: Option<&'a RawValue>,
    #[serde(borrow)]
    model: BpeFile<'a>,
}

impl TokenFile<'_> {
    /// The tokenizer of the crate.
    ///
    /// # Errors
    /// What the crate refuses; an added token whose id is not the one that it gets.
    pub(super) fn into_tokenizer(self) -> Result<tokenizers::Tokenizer, TokenizerError> {
        if let Some(version) = self.version.filter(|version| version != "1.0") {
            let problem = format!("unknown version {:?} of the format", cut(&version));
            return Err(TokenizerError::Malformed(problem));
        }
        let refused = |e: tokenizers::Error| TokenizerError::Malformed(cut(&e.to_string()));
        let mut tokenizer = tokenizers::Tokenizer::new(self.model.into_model()?);
        let normalizer: Option<NormalizerWrapper> = step("normalizer", self.normalizer)?;
        tokenizer.with_normalizer(normalizer).map_err(refused)?;
        let before: Option<PreTokenizerWrapper> = step("pre_tokenizer", self.pre_tokenizer)?;
        tokenizer.with_pre_tokenizer(before);
        tokenizer.with_decoder(step::<DecoderWrapper>("decoder", self.decoder)?);
        let added = self.added_tokens.iter().map(|added| added.token.clone());
        tokenizer.add_tokens(added).map_err(refused)?;
        for NumberedToken { id: found, token } in self.added_tokens {
            let content = token.content;
            match tokenizer.token_to_id(&content) {
                Some(expected) if expected != found => {
                    return Err(TokenizerError::MisplacedToken {
                        content,
                        found,
                        expected,
                    });
                }
                _ => {}
            }
        }
        Ok(tokenizer)
    }
}

/// The step called `name` before or behind the model in the type that reads it.
fn step<'a, T: Deserialize<'a>>(
    name: &str,
    json: Option<&'a RawValue>,
) -> Result<Option<T>, TokenizerError> {
    let read = json
        .map(|json| serde_json::from_str(json.get()))
        .transpose();
    read.map_err(|e| TokenizerError::Malformed(cut(&format!("{name}: {e}"))))
}

/// A step before or behind the model; serde_json bounds how deep they nest.
#[derive(Deserialize)]
struct Part {
    #[serde(rename = "type")]
    kind: Option<String>,
    behavior: Option<String>,
    #[serde(default)]
    normalizers: Vec<Part>,
    #[serde(default)]
    pretokenizers: Vec<Part>,
}

impl Part {
    fn kind(&self) -> &str {
        self.kind.as_deref().unwrap_or_default()
    }
}

/// The model of a `tokenizer.json`.
#[derive(Deserialize)]
struct BpeFile<'a> {
    #[serde(rename = "type")]
    kind: Option<String>,
    #[serde(borrow)]
    vocab: Vocab<'a>,
    #[serde(borrow)]
    merges: Vec<Merge<'a>>,
    continuing_subword_prefix: Option<String>,
    end_of_word_suffix: Option<String>,
    dropout: Option<f32>,
    unk_token: Option<String>,
    fuse_unk: Option<bool>,
    byte_fallback: Option<bool>,
    ignore_merges: Option<bool>,
}

impl BpeFile<'_> {
    /// The model of the crate, which reads a file more slowly: it keeps every merge in a tree
    /// first, to see which of the two spellings it has.
    ///
    /// # Errors
    /// Merges of or into words that are no tokens, and what else the crate refuses, such as a
    /// `dropout` above 1.
    fn into_model(self) -> Result<BPE, TokenizerError> {
        let vocab = &self.vocab.0;
        let longest = vocab.iter().map(|(Word(token), _)| token.len()).max();
        let mut merges = Vec::with_capacity(self.merges.len());
        for merge in &self.merges {
            match merge.pair() {
                // Longer than every token would be out of bounds in the crate.
                Some((left, right)) if Some(left.len() + right.len()) <= longest => {
                    merges.push((left.to_owned(), right.to_owned()));
                }
                _ if merge.is_version_line() => {}
                _ => return Err(self.bad_merge("a merge is too long")),
            }
        }
        let words = vocab
            .iter()
            .map(|(Word(token), id)| (token.to_string(), *id));
        let words: Vocabulary = words.collect();
        if words.len() < vocab.len()
            && let Some(error) = repeated(vocab)
        {
            return Err(error);
        }
        let mut builder = BpeBuilder::new()
            .vocab_and_merges(words, merges)
            .fuse_unk(self.fuse_unk.unwrap_or_default())
            .byte_fallback(self.byte_fallback.unwrap_or_default())
            .ignore_merges(self.ignore_merges.unwrap_or_default());
        if let Some(dropout) = self.dropout {
            builder = builder.dropout(dropout);
        }
        if let Some(token) = &self.unk_token {
            builder = builder.unk_token(token.clone());
        }
        builder.build().map_err(|e| self.bad_merge(&e.to_string()))
    }

    /// The first merge of or into a word that is no token, which the crate finds, too, but not
    /// its place; else `problem`.
    fn bad_merge(&self, problem: &str) -> TokenizerError {
        let tokens = self.vocab.0.iter().map(|(token, _)| &*token.0).collect();
        let merges = self.merges.iter().enumerate();
        let mut errors = merges.filter_map(|(i, merge)| check_merge(i, merge, &tokens).err());
        let malformed = || TokenizerError::Malformed(cut(problem));
        errors.next().unwrap_or_else(malformed)
    }
}

/// A text of the file.
#[derive(Deserialize)]
struct Word<'a>(#[serde(borrow)] Cow<'a, str>);

/// Tokens with their ids, in the order of the file.
struct Vocab<'a>(Vec<(Word<'a>, u32)>);

impl<'de: 'a, 'a> Deserialize<'de> for Vocab<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;

        impl<'de> Visitor<'de> for Entries {
            type Value = Vocab<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a map of tokens to their ids")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Vocab<'de>, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(Vocab(entries))
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

/// Both spellings of a merge; the older one separates the two by a space.
enum Merge<'a> {
    Pair(Word<'a>, Word<'a>),
    Text(Cow<'a, str>),
}

impl Merge<'_> {
    /// Its two tokens, if it has the form of a merge.
    fn pair(&self) -> Option<(&str, &str)> {
        match self {
            Self::Pair(Word(left), Word(right)) => Some((left, right)),
            Self::Text(text) => {
                let pair = text.split_once(' ')?;
                (!self.is_version_line() && !pair.1.contains(' ')).then_some(pair)
            }
        }
    }

    /// Whether it is the first line of a `merges.txt`, which is no merge.
    fn is_version_line(&self) -> bool {
        matches!(self, Self::Text(text) if is_version_line(text))
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Merge<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Spelling;

        impl<'de> Visitor<'de> for Spelling {
            type Value = Merge<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a merge: two tokens in a list, or in a text with a space between")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut pair: A) -> Result<Merge<'de>, A::Error> {
                let wrong = |found| A::Error::invalid_length(found, &self);
                let left = pair.next_element()?.ok_or_else(|| wrong(0))?;
                let right = pair.next_element()?.ok_or_else(|| wrong(1))?;
                match pair.next_element::<IgnoredAny>()? {
                    None => Ok(Merge::Pair(left, right)),
                    Some(_) => Err(wrong(3)),
                }
            }

            fn visit_borrowed_str<E: Error>(self, text: &'de str) -> Result<Merge<'de>, E> {
                Ok(Merge::Text(Cow::Borrowed(text)))
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Merge<'de>, E> {
                Ok(Merge::Text(Cow::Owned(text.to_owned())))
            }
        }
        deserializer.deserialize_any(Spelling)
    }
}

/// Only what leaves text as it is, up to its Unicode normal form. Others lose text (lower
/// case, stripping, removed delimiters), and some panic over bad tables.
fn check_steps(file: &TokenFile<'_>) -> Result<(), TokenizerError> {
    let mut rest: Vec<Part> = step("normalizer", file.normalizer)?.into_iter().collect();
    while let Some(part) = rest.pop() {
        match part.kind() {
            "NFC" | "NFD" | "NFKC" | "NFKD" => {}
            "Sequence" => rest.extend(part.normalizers),
            other => return unsupported("normalizer", quoted(other), "NFC"),
        }
    }
    rest.extend(step::<Part>("pre_tokenizer", file.pre_tokenizer)?);
    while let Some(part) = rest.pop() {
        let removes = part.behavior.as_deref() == Some("Removed");
        match part.kind() {
            "Split" | "Punctuation" if removes => {
                let found = "one that removes text".to_owned();
                return unsupported("pre_tokenizer", found, "the behavior \"Isolated\"");
            }
            "ByteLevel" | "Split" | "Punctuation" | "Digits" | "UnicodeScripts" => {}
            "Sequence" => rest.extend(part.pretokenizers),
            other => return unsupported("pre_tokenizer", quoted(other), "Split and ByteLevel"),
        }
    }
    match step::<Part>("decoder", file.decoder)? {
        Some(part) if part.kind() != "ByteLevel" => {
            unsupported("decoder", quoted(part.kind()), "ByteLevel")
        }
        _ => Ok(()),
    }
}

/// Each of the ids 0 to n - 1 belongs to exactly one of the n tokens.
fn check_ids(vocab: &[(Word<'_>, u32)]) -> Result<(), TokenizerError> {
    let Some(largest) = vocab.iter().map(|&(_, id)| id).max() else {
        return unsupported("model.vocab", "empty".to_owned(), "a token for each byte");
    };
    if largest as usize >= MAX_VOCAB_SIZE {
        return Err(TokenizerError::VocabTooLarge { found: largest });
    }
    let mut owners: Vec<Option<&str>> = vec![None; vocab.len()];
    for (Word(token), id) in vocab {
        let id = *id;
        let Some(owner) = owners.get_mut(id as usize) else {
            let last = vocab.len() - 1;
            let problem = format!("but the ids of {} tokens run from 0 to {last}", vocab.len());
            return Err(bad_token(token, id, problem));
        };
        if let Some(first) = owner.replace(token) {
            let problem = format!("which is that of {:?} too", cut(first));
            return Err(bad_token(token, id, problem));
        }
    }
    Ok(())
}

/// Whether a text among merges is the first line of a `merges.txt`, which is no merge.
pub(crate) fn is_version_line(text: &str) -> bool {
    text.starts_with("#version")
}

/// All merges are spelled alike: other programs read one of both spellings.
fn check_spelling(merges: &[Merge<'_>]) -> Result<(), TokenizerError> {
    let is_text = |merge: &Merge<'_>| matches!(merge, Merge::Text(_));
    let Some(first) = merges.first().map(is_text) else {
        return Ok(());
    };
    match merges.iter().position(|merge| is_text(merge) != first) {
        None => Ok(()),
        Some(index) => Err(TokenizerError::BadMerge {
            index,
            problem: "it is a text and those before it are lists, or the other way round"
                .to_owned(),
        }),
    }
}

fn check_merge(
    index: usize,
    merge: &Merge<'_>,
    tokens: &HashSet<&str>,
) -> Result<(), TokenizerError> {
    let bad = |problem: String| Err(TokenizerError::BadMerge { index, problem });
    let Some((left, right)) = merge.pair() else {
        return match merge {
            Merge::Text(text) if !merge.is_version_line() => {
                let text = cut(text);
                bad(format!("{text:?} is not two tokens with a space between"))
            }
            _ => Ok(()),
        };
    };
    let whole = format!("{left}{right}");
    for token in [left, right, &whole] {
        if !tokens.contains(token) {
            return bad(format!("{:?} is no token of model.vocab", cut(token)));
        }
    }
    Ok(())
}

fn check_added(tokens: &[NumberedToken]) -> Result<(), TokenizerError> {
    let mut seen = BTreeMap::new();
    for NumberedToken { id, token } in tokens {
        if token.content.is_empty() {
            return Err(bad_token("", *id, "but it is empty".to_owned()));
        }
        if let Some(first) = seen.insert(&token.content, id) {
            let problem = format!("but it was added with id {first} before");
            return Err(bad_token(&token.content, *id, problem));
        }
    }
    Ok(())
}

/// Checks the kind of a tokenizer, part by part.
///
/// # Errors
/// Anything but byte-level BPE over the text as it is.
pub(super) fn check_model(inner: &tokenizers::Tokenizer) -> Result<(), TokenizerError> {
    let ModelWrapper::BPE(bpe) = inner.get_model() else {
        return unsupported("the model", "of another kind".to_owned(), "BPE");
    };
    if bpe.dropout.is_some_and(|dropout| dropout != 0.0) {
        return unsupported("model.dropout", format!("{:?}", bpe.dropout), "null");
    }
    if bpe.byte_fallback {
        return unsupported("model.byte_fallback", "true".to_owned(), "false");
    }
    let is_byte_level =
        |part: &PreTokenizerWrapper| matches!(part, PreTokenizerWrapper::ByteLevel(_));
    let maps_bytes = inner.get_pre_tokenizer().is_some_and(|part| match part {
        PreTokenizerWrapper::Sequence(parts) => parts.as_ref().iter().any(is_byte_level),
        part => is_byte_level(part),
    });
    if !maps_bytes {
        return unsupported("pre_tokenizer", "without ByteLevel".to_owned(), "it");
    }
    if !matches!(inner.get_decoder(), Some(DecoderWrapper::ByteLevel(_))) {
        return unsupported("decoder", "not ByteLevel".to_owned(), "that one");
    }
    Ok(())
}

/// A byte without a token would vanish from every text.
pub(super) fn check_bytes(inner: &tokenizers::Tokenizer) -> Result<(), TokenizerError> {
    let is_missing = |c: &char| inner.token_to_id(&c.to_string()).is_none();
    let missing = ByteLevel::alphabet().into_iter().filter(is_missing);
    match missing.filter_map(byte_of).min() {
        None => Ok(()),
        Some(byte) => {
            let found = format!("without a token for byte {byte:#04x}");
            unsupported("model.vocab", found, "one for each of the 256 bytes")
        }
    }
}

fn quoted(text: &str) -> String {
    format!("{:?}", cut(text))
}

/// What is wrong with a vocabulary that has a token twice, if it has.
fn repeated(vocab: &[(Word<'_>, u32)]) -> Option<TokenizerError> {
    let mut seen = HashSet::new();
    let (Word(token), _) = vocab.iter().find(|(Word(token), _)| !seen.insert(token))?;
    let problem = format!("key {:?} occurs twice in model.vocab", cut(token));
    Some(TokenizerError::Malformed(problem))
}

fn bad_token(token: &str, id: u32, problem: String) -> TokenizerError {
    let token = cut(token);
    TokenizerError::BadToken { token, id, problem }
}

fn unsupported<T>(
    part: &'static str,
    found: String,
    expected: &'static str,
) -> Result<T, TokenizerError> {
    Err(TokenizerError::Unsupported {
        part,
        found,
        expected,
    })
}
