//! The tokenizer of a Qwen3 model under llama.cpp's keys, and back.
//!
//! GGUF names the way of splitting text (`qwen2`) instead of spelling it out, and has a
//! type for each token instead of flags. So only tokenizers with the structure of Qwen2's
//! are written: NFC, [`QWEN_PATTERN`], byte-level BPE. Flags of added tokens that do not
//! follow from the types stand as JSON under [`ADDED_TOKENS`].

use super::{GgufArray, GgufError, GgufHeader, GgufNumbers, GgufValue};
use crate::tokenizer::{END_OF_TEXT, QWEN_PATTERN, Tokenizer, is_version_line};
use serde::ser::Serializer;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};

const MODEL: &str = "tokenizer.ggml.model";
const PRE: &str = "tokenizer.ggml.pre";
const TOKENS: &str = "tokenizer.ggml.tokens";
const TOKEN_TYPE: &str = "tokenizer.ggml.token_type";
const MERGES: &str = "tokenizer.ggml.merges";
/// The added tokens of the `tokenizer.json`, where token types do not say all.
const ADDED_TOKENS: &str = "setun.tokenizer.added_tokens";

/// Token types of llama.cpp.
const NORMAL: i32 = 1;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;

/// Tokens of Qwen that are CONTROL in GGUF files, but not special in `tokenizer.json`.
const NOT_SPECIAL: [&str; 6] = [
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
];

/// A `tokenizer.json` with the tokenizer of a file; `None` if the file has none. It is
/// read by [`Tokenizer::from_bytes`], which checks the merges.
///
/// # Errors
/// Tokenizers of another kind than Qwen2's; tokens, types and merges that contradict each
/// other.
pub fn tokenizer_from_metadata(header: &GgufHeader) -> Result<Option<String>, GgufError> {
    match header.text(MODEL)? {
        None | Some("none") => return Ok(None),
        Some("gpt2") => {}
        Some(_) => {
            return Err(unsupported(
                header,
                MODEL,
                "it reads byte-level BPE (\"gpt2\")",
            ));
        }
    }
    match header.text(PRE)? {
        Some("qwen2") => {}
        Some(_) => return Err(unsupported(header, PRE, "Qwen3 splits text as \"qwen2\"")),
        None => return Err(missing(PRE)),
    }
    let tokens = strings(header, TOKENS)?;
    let types = token_types(header, tokens.len())?;
    let mut seen = BTreeSet::new();
    let mut vocab = Vec::new();
    let mut added_tokens = Vec::new();
    for (id, (token, token_type)) in tokens.iter().zip(types).enumerate() {
        if !seen.insert(token.as_str()) {
            let (what, name) = ("token", token.clone());
            return Err(GgufError::Duplicate { what, name });
        }
        // An array has less than 2^32 elements.
        let id = id as u32;
        match token_type {
            NORMAL => vocab.push((token.as_str(), id)),
            CONTROL | USER_DEFINED => added_tokens.push(AddedToken::of_type(token, id, token_type)),
            UNUSED => {}
            other => return Err(bad_type(other, id)),
        }
    }
    if let Some(text) = header.text(ADDED_TOKENS)? {
        added_tokens = flagged_tokens(text, added_tokens)?;
    }
    if !follow_the_words(&vocab, &added_tokens) {
        // Ids are given by place, unless the vocabulary has them.
        vocab.extend(
            added_tokens
                .iter()
                .map(|token| (token.content.as_str(), token.id)),
        );
        vocab.sort_by_key(|&(_, id)| id);
    }
    let merges = strings(header, MERGES)?;
    let merges = merges
        .iter()
        .map(|merge| split_merge(merge))
        .collect::<Result<_, _>>()?;
    Ok(Some(tokenizer_json(&added_tokens, Vocab(&vocab), merges)))
}

/// The entries of a tokenizer, with a vocabulary filled up to `vocab_size` tokens.
///
/// # Errors
/// Tokenizers that Setun does not read, or whose structure is not Qwen2's, or with more
/// tokens than the model.
pub(super) fn tokenizer_entries(
    json: &[u8],
    vocab_size: usize,
) -> Result<Vec<(String, GgufValue)>, GgufError> {
    Tokenizer::from_bytes(json)?;
    let file = TokenizerFile::parse(json)?;
    check_structure(&file)?;
    let (tokens, types) = tokens_and_types(&file, vocab_size)?;
    let mut merges = Vec::with_capacity(file.model.merges.len());
    for merge in &file.model.merges {
        if !matches!(merge, Merge::Text(text) if is_version_line(text)) {
            merges.push(merge.joined()?);
        }
    }
    let text = |text: &str| GgufValue::String(text.to_owned());
    let strings = |strings| GgufValue::Array(GgufArray::Strings(strings));
    let types_value = GgufArray::Numbers(GgufNumbers::from_i32s(&types));
    let mut entries = vec![
        (MODEL.to_owned(), text("gpt2")),
        (PRE.to_owned(), text("qwen2")),
        (TOKENS.to_owned(), strings(tokens)),
        (TOKEN_TYPE.to_owned(), GgufValue::Array(types_value)),
        (MERGES.to_owned(), strings(merges)),
        (
            "tokenizer.ggml.add_bos_token".to_owned(),
            GgufValue::Bool(false),
        ),
    ];
    if let Some(id) = end_of_text(&file) {
        let key = "tokenizer.ggml.padding_token_id".to_owned();
        entries.push((key, GgufValue::U32(id)));
    }
    let from_type = |token: &AddedToken| {
        AddedToken::of_type(&token.content, token.id, token.token_type()) == *token
    };
    if !file.added_tokens.iter().all(from_type) {
        entries.push((ADDED_TOKENS.to_owned(), text(&to_json(&file.added_tokens))));
    }
    Ok(entries)
}

/// Id of [`END_OF_TEXT`] in a `tokenizer.json`, if it has that token.
///
/// # Errors
/// Bytes that are no `tokenizer.json`.
pub(super) fn eos_token_id(json: &[u8]) -> Result<Option<u32>, GgufError> {
    Ok(end_of_text(&TokenizerFile::parse(json)?))
}

/// What GGUF takes from a `tokenizer.json`.
#[derive(Deserialize)]
struct TokenizerFile {
    #[serde(default)]
    added_tokens: Vec<AddedToken>,
    #[serde(default)]
    normalizer: Value,
    #[serde(default)]
    pre_tokenizer: Value,
    model: Bpe,
}

impl TokenizerFile {
    fn parse(json: &[u8]) -> Result<Self, GgufError> {
        serde_json::from_slice(json).map_err(|e| {
            let what = format!("a tokenizer.json that reads: {e}");
            let remedy = "download it again or export it from the model";
            GgufError::Unwritable { what, remedy }
        })
    }
}

#[derive(Deserialize)]
struct Bpe {
    vocab: BTreeMap<String, u32>,
    merges: Vec<Merge>,
    #[serde(default)]
    ignore_merges: bool,
}

/// Both spellings of a merge.
#[derive(Deserialize)]
#[serde(untagged)]
enum Merge {
    Pair(String, String),
    Text(String),
}

impl Merge {
    /// As GGUF has it: the two parts with a space between them.
    fn joined(&self) -> Result<String, GgufError> {
        let text = match self {
            Self::Pair(left, right) => format!("{left} {right}"),
            Self::Text(text) => text.clone(),
        };
        match text.matches(' ').count() {
            1 => Ok(text),
            _ => Err(GgufError::Unwritable {
                what: format!("the merge {text:?}, which has a space in a token"),
                remedy: "use a byte-level tokenizer, where a space is written Ġ",
            }),
        }
    }
}

/// A token that is matched in the text before anything else.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
struct AddedToken {
    id: u32,
    content: String,
    #[serde(default)]
    single_word: bool,
    #[serde(default)]
    lstrip: bool,
    #[serde(default)]
    rstrip: bool,
    #[serde(default)]
    normalized: bool,
    #[serde(default)]
    special: bool,
}

impl AddedToken {
    /// What a token of this type is taken for.
    fn of_type(content: &str, id: u32, token_type: i32) -> Self {
        Self {
            id,
            content: content.to_owned(),
            single_word: false,
            lstrip: false,
            rstrip: false,
            normalized: false,
            special: token_type == CONTROL && !NOT_SPECIAL.contains(&content),
        }
    }

    /// CONTROL for special tokens and for everything that looks like one, as llama.cpp's
    /// converter has it.
    fn token_type(&self) -> i32 {
        let in_bars = self.content.starts_with("<|") && self.content.ends_with("|>");
        if self.special || in_bars {
            CONTROL
        } else {
            USER_DEFINED
        }
    }
}

/// Whether a file has the structure that `qwen2` stands for.
fn check_structure(file: &TokenizerFile) -> Result<(), GgufError> {
    let parts = &file.pre_tokenizer["pretokenizers"];
    let (split, byte_level) = (&parts[0], &parts[1]);
    let two_parts = parts.as_array().is_some_and(|parts| parts.len() == 2);
    let splits = split["type"] == "Split"
        && split["pattern"]["Regex"] == QWEN_PATTERN
        && split["behavior"] == "Isolated"
        && split["invert"] != true;
    let bytes = byte_level["type"] == "ByteLevel"
        && byte_level["add_prefix_space"] == false
        && byte_level["use_regex"] == false;
    let different = if file.normalizer["type"] != "NFC" {
        "a normalizer that is not NFC"
    } else if !(two_parts && splits && bytes) {
        "another pre-tokenizer than Qwen2's"
    } else if file.model.ignore_merges {
        "ignore_merges"
    } else {
        return Ok(());
    };
    Err(GgufError::Unwritable {
        what: format!("a tokenizer with {different}"),
        remedy: "it knows Qwen2's by name; choose another format for this model",
    })
}

fn tokens_and_types(
    file: &TokenizerFile,
    vocab_size: usize,
) -> Result<(Vec<String>, Vec<i32>), GgufError> {
    let mut slots: Vec<Option<(&str, i32)>> = vec![None; vocab_size];
    let words = file.model.vocab.iter();
    let words = words.map(|(token, &id)| (token.as_str(), id, NORMAL));
    let added = file.added_tokens.iter();
    let added = added.map(|token| (token.content.as_str(), token.id, token.token_type()));
    for (token, id, token_type) in words.chain(added) {
        let Some(slot) = slots.get_mut(id as usize) else {
            return Err(GgufError::Unwritable {
                what: format!("token {token:?} with id {id} in a model of {vocab_size} tokens"),
                remedy: "use the tokenizer that belongs to the model",
            });
        };
        // An added token may stand in the vocabulary as well; then it is that.
        *slot = Some((token, token_type));
    }
    let mut tokens = Vec::with_capacity(vocab_size);
    let mut types = Vec::with_capacity(vocab_size);
    for (id, slot) in slots.into_iter().enumerate() {
        let padding = format!("[PAD{id}]");
        if slot.is_none() && file.model.vocab.contains_key(&padding) {
            return Err(GgufError::Unwritable {
                what: format!("the token {padding:?}, the name of an unused one"),
                remedy: "rename it in the tokenizer",
            });
        }
        let (token, token_type) = slot.unwrap_or((&padding, UNUSED));
        tokens.push(token.to_owned());
        types.push(token_type);
    }
    Ok((tokens, types))
}

fn end_of_text(file: &TokenizerFile) -> Option<u32> {
    let added = file.added_tokens.iter();
    let mut ends = added.filter(|token| token.content == END_OF_TEXT);
    let added = ends.next().map(|token| token.id);
    added.or_else(|| file.model.vocab.get(END_OF_TEXT).copied())
}

fn token_types(header: &GgufHeader, num_tokens: usize) -> Result<Vec<i32>, GgufError> {
    let Some(value) = header.metadata.get(TOKEN_TYPE) else {
        return Err(missing(TOKEN_TYPE));
    };
    let types = match value {
        GgufValue::Array(GgufArray::Numbers(numbers)) => numbers.to_i32s(),
        _ => None,
    };
    let types = types.filter(|types| types.len() == num_tokens);
    let expected = || format!("{num_tokens} i32, one for each token");
    types.ok_or_else(|| GgufError::bad_value(TOKEN_TYPE, value, expected()))
}

fn strings<'a>(header: &'a GgufHeader, key: &str) -> Result<&'a [String], GgufError> {
    let value = header.metadata.get(key).ok_or_else(|| missing(key))?;
    let strings = value.as_strings();
    strings.ok_or_else(|| GgufError::bad_value(key, value, "a list of strings"))
}

/// The added tokens of the text, which must be the ones that the types name.
fn flagged_tokens(text: &str, named: Vec<AddedToken>) -> Result<Vec<AddedToken>, GgufError> {
    let bad = || {
        let value = GgufValue::String(text.to_owned());
        GgufError::bad_value(
            ADDED_TOKENS,
            &value,
            "the added tokens as a JSON list, by id",
        )
    };
    let flagged: Vec<AddedToken> = serde_json::from_str(text).map_err(|_| bad())?;
    let same = |(a, b): (&AddedToken, &AddedToken)| a.id == b.id && a.content == b.content;
    let mut sorted: Vec<AddedToken> = flagged.clone();
    sorted.sort_by_key(|token| token.id);
    match sorted.len() == named.len() && sorted.iter().zip(&named).all(same) {
        true => Ok(flagged),
        false => Err(bad()),
    }
}

/// Whether the ids of words start at 0 and those of added tokens go on from there.
fn follow_the_words(vocab: &[(&str, u32)], added_tokens: &[AddedToken]) -> bool {
    let words = vocab.iter().map(|&(_, id)| id);
    let ids = words.chain(added_tokens.iter().map(|token| token.id));
    ids.zip(0..).all(|(id, expected)| id == expected)
}

fn split_merge(merge: &str) -> Result<(&str, &str), GgufError> {
    let parts = merge.split_once(' ');
    let parts =
        parts.filter(|(left, right)| !left.is_empty() && !right.is_empty() && !right.contains(' '));
    parts.ok_or_else(|| {
        let value = GgufValue::String(merge.to_owned());
        GgufError::bad_value(MERGES, &value, "two tokens with a space between them")
    })
}

/// Words in the order of their ids.
struct Vocab<'a>(&'a [(&'a str, u32)]);

impl Serialize for Vocab<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().copied())
    }
}

/// A `tokenizer.json` with Qwen2's structure, as [`Tokenizer::train`] makes it.
fn tokenizer_json(added_tokens: &[AddedToken], vocab: Vocab, merges: Vec<(&str, &str)>) -> String {
    #[derive(Serialize)]
    struct File<'a> {
        version: &'a str,
        truncation: Value,
        padding: Value,
        added_tokens: &'a [AddedToken],
        normalizer: Value,
        pre_tokenizer: Value,
        post_processor: Value,
        decoder: Value,
        model: Model<'a>,
    }
    #[derive(Serialize)]
    struct Model<'a> {
        #[serde(rename = "type")]
        kind: &'a str,
        dropout: Option<f32>,
        unk_token: Option<&'a str>,
        continuing_subword_prefix: Option<&'a str>,
        end_of_word_suffix: Option<&'a str>,
        fuse_unk: bool,
        byte_fallback: bool,
        ignore_merges: bool,
        vocab: Vocab<'a>,
        merges: Vec<(&'a str, &'a str)>,
    }
    let byte_level = json!({ "type": "ByteLevel", "add_prefix_space": false,
        "trim_offsets": false, "use_regex": false });
    let split = json!({ "type": "Split", "pattern": { "Regex": QWEN_PATTERN },
        "behavior": "Isolated", "invert": false });
    let pre_tokenizers = json!([split, byte_level]);
    to_json(&File {
        version: "1.0",
        truncation: Value::Null,
        padding: Value::Null,
        added_tokens,
        normalizer: json!({ "type": "NFC" }),
        pre_tokenizer: json!({ "type": "Sequence", "pretokenizers": pre_tokenizers }),
        post_processor: byte_level.clone(),
        decoder: byte_level,
        model: Model {
            kind: "BPE",
            dropout: None,
            unk_token: None,
            continuing_subword_prefix: None,
            end_of_word_suffix: None,
            fuse_unk: false,
            byte_fallback: false,
            ignore_merges: false,
            vocab,
            merges,
        },
    })
}

/// JSON of something whose keys are strings, which cannot fail.
fn to_json(value: &(impl Serialize + ?Sized)) -> String {
    serde_json::to_string(value).unwrap_or_default()
}

fn bad_type(found: i32, id: u32) -> GgufError {
    GgufError::BadValue {
        key: TOKEN_TYPE.to_owned(),
        found: format!("{found} for token {id}"),
        expected: "1 (normal), 3 (control), 4 (user defined) or 5 (unused)".to_owned(),
    }
}

fn missing(key: &str) -> GgufError {
    GgufError::Missing {
        key: key.to_owned(),
        remedy: "give the tokenizer.json of the model instead",
    }
}

fn unsupported(header: &GgufHeader, key: &str, remedy: &'static str) -> GgufError {
    GgufError::Unsupported {
        key: key.to_owned(),
        found: header
            .metadata
            .get(key)
            .map_or_else(String::new, GgufValue::to_string),
        remedy,
    }
}

#[cfg(test)]
mod tests;
