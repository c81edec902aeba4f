//! The JSON files beside the weights that tell other programs how to use them.

use crate::IoError;
use crate::layout::TOKENIZER;
use serde::Deserialize;
use serde_json::{Value, json};
use setun_formats::config::Qwen3Config;
use setun_formats::generation_config::GenerationConfig;
use setun_formats::tokenizer::{END_OF_TEXT, Tokenizer};
use std::collections::BTreeMap;
use std::path::Path;

// Sorted maps: the same bytes whether or not a build of serde_json keeps insertion order.
type Settings = BTreeMap<&'static str, Value>;

/// Checks that the tokenizer fits the vocabulary; the id of its end-of-text token.
pub(super) fn check_tokenizer(
    config: &Qwen3Config,
    tokenizer_json: Option<&[u8]>,
) -> Result<Option<u32>, IoError> {
    let Some(json) = tokenizer_json else {
        return Ok(None);
    };
    let path = Path::new(TOKENIZER);
    let tokenizer =
        Tokenizer::from_bytes(json).map_err(|e| IoError::invalid(path, e.to_string()))?;
    if tokenizer.vocab_size() > config.vocab_size {
        let problem = format!(
            "it has {} entries, the model's vocabulary {}: use the tokenizer of this model",
            tokenizer.vocab_size(),
            config.vocab_size
        );
        return Err(IoError::invalid(path, problem));
    }
    Ok(tokenizer.end_of_text())
}

/// `generation_config.json`: how the model is meant to be sampled, as `base` says, and
/// which tokens begin, end and pad, as the configuration says.
pub(super) fn generation_config(
    base: Option<&GenerationConfig>,
    config: &Qwen3Config,
    end_of_text: Option<u32>,
) -> GenerationConfig {
    let eos_token_ids = match config.eos_token_ids.as_slice() {
        [] => end_of_text.into_iter().collect(),
        ids => ids.to_vec(),
    };
    let pad_token_id = end_of_text.or(config.eos_token_ids.first().copied());
    let base = base.cloned().unwrap_or_default();
    GenerationConfig {
        bos_token_id: config.bos_token_id,
        eos_token_ids,
        pad_token_id: base.pad_token_id.or(pad_token_id),
        ..base
    }
}

#[derive(Deserialize)]
struct TokenFile {
    #[serde(default)]
    added_tokens: Vec<AddedToken>,
}

/// One entry of `added_tokens`, in the fields that `tokenizer_config.json` repeats.
#[derive(Deserialize)]
struct AddedToken {
    id: u32,
    content: String,
    #[serde(default)]
    lstrip: bool,
    #[serde(default)]
    normalized: bool,
    #[serde(default)]
    rstrip: bool,
    #[serde(default)]
    single_word: bool,
    #[serde(default)]
    special: bool,
}

/// `tokenizer_config.json` of Qwen2's tokenizer: added tokens, the token that ends a text
/// by the configuration, and the chat template if there is one.
///
/// # Errors
/// A `tokenizer.json` that is none.
pub(super) fn tokenizer_settings(
    config: &Qwen3Config,
    tokenizer_json: &[u8],
    end_of_text: Option<u32>,
    chat_template: Option<&str>,
) -> Result<Settings, IoError> {
    let file: TokenFile = serde_json::from_slice(tokenizer_json)
        .map_err(|e| IoError::invalid(Path::new(TOKENIZER), e.to_string()))?;
    let mut settings: Settings = BTreeMap::from([
        ("add_bos_token", false.into()),
        ("add_prefix_space", false.into()),
        ("bos_token", Value::Null),
        ("clean_up_tokenization_spaces", false.into()),
        ("errors", "replace".into()),
        ("model_max_length", config.max_position_embeddings.into()),
        ("split_special_tokens", false.into()),
        ("tokenizer_class", "Qwen2Tokenizer".into()),
        ("unk_token", Value::Null),
    ]);
    let content = |id: u32| {
        let token = file.added_tokens.iter().find(|token| token.id == id);
        token.map(|token| token.content.as_str())
    };
    let end = config.eos_token_ids.first().and_then(|&id| content(id));
    let end_of_text = end_of_text.map(|_| END_OF_TEXT);
    if let Some(token) = end.or(end_of_text) {
        settings.insert("eos_token", token.into());
    }
    if let Some(token) = end_of_text {
        settings.insert("pad_token", token.into());
    }
    let added: BTreeMap<String, Settings> = file
        .added_tokens
        .iter()
        .map(|token| (token.id.to_string(), added_token(token)))
        .collect();
    if !added.is_empty() {
        settings.insert("added_tokens_decoder", json!(added));
    }
    if let Some(template) = chat_template {
        settings.insert("chat_template", template.into());
    }
    Ok(settings)
}

fn added_token(token: &AddedToken) -> Settings {
    BTreeMap::from([
        ("content", token.content.as_str().into()),
        ("lstrip", token.lstrip.into()),
        ("normalized", token.normalized.into()),
        ("rstrip", token.rstrip.into()),
        ("single_word", token.single_word.into()),
        ("special", token.special.into()),
    ])
}
