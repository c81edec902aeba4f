//! `generation_config.json`: how a model is meant to be sampled, and what ends a text.

use serde::{Deserialize, Serialize};
use serde_json::Value;
use thiserror::Error;

/// Longest file that is read, in bytes; published ones have a few hundred.
pub const MAX_GENERATION_CONFIG_BYTES: usize = 1 << 20;
/// Most tokens that may end a text.
pub const MAX_EOS_TOKENS: usize = 256;

/// Why a `generation_config.json` is refused.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum GenerationConfigError {
    /// More than [`MAX_GENERATION_CONFIG_BYTES`].
    #[error(
        "{found} bytes are too long for a generation_config.json (at most \
         {MAX_GENERATION_CONFIG_BYTES})"
    )]
    TooLong {
        /// Length of the input.
        found: usize,
    },
    /// Not a JSON object.
    #[error("not a generation_config.json: {0}; correct it or remove it")]
    Malformed(String),
    /// A value that cannot be meant.
    #[error("{key} is {found}, but must be {expected}; correct it or remove the key")]
    BadValue {
        /// The key.
        key: &'static str,
        /// What it holds.
        found: String,
        /// What it may hold.
        expected: &'static str,
    },
}

/// The keys that Setun knows; `None` for a key that is absent or null.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct GenerationConfig {
    /// Whether tokens are drawn, or the likeliest is taken.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub do_sample: Option<bool>,
    /// Softmax temperature, at least 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub temperature: Option<f64>,
    /// Number of likeliest tokens to choose from; 0 for all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top_k: Option<u32>,
    /// Total probability of the tokens to choose from, above 0 and at most 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top_p: Option<f64>,
    /// Least probability relative to the likeliest token, 0 to 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_p: Option<f64>,
    /// Divisor of the logits of tokens that have appeared, above 0; 1 for none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub repetition_penalty: Option<f64>,
    /// Token that begins a text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bos_token_id: Option<u32>,
    /// Tokens that end a text; one of them is written as a number, more as a list.
    #[serde(
        rename = "eos_token_id",
        skip_serializing_if = "Vec::is_empty",
        serialize_with = "one_or_many"
    )]
    pub eos_token_ids: Vec<u32>,
    /// Token that fills up a batch.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pad_token_id: Option<u32>,
}

/// The file, before its values are checked.
#[derive(Deserialize)]
struct Raw {
    do_sample: Option<Value>,
    temperature: Option<Value>,
    top_k: Option<Value>,
    top_p: Option<Value>,
    min_p: Option<Value>,
    repetition_penalty: Option<Value>,
    bos_token_id: Option<Value>,
    eos_token_id: Option<Value>,
    pad_token_id: Option<Value>,
}

impl GenerationConfig {
    /// Reads a `generation_config.json`. Keys that are not fields of this struct are
    /// ignored.
    ///
    /// # Errors
    /// A file that is no JSON object or absurdly long, and values that are out of range
    /// or of another type.
    pub fn from_bytes(json: &[u8]) -> Result<Self, GenerationConfigError> {
        let found = json.len();
        if found > MAX_GENERATION_CONFIG_BYTES {
            return Err(GenerationConfigError::TooLong { found });
        }
        let malformed = |e: serde_json::Error| GenerationConfigError::Malformed(e.to_string());
        // Through an object: a struct would take a list of values as well.
        let object: serde_json::Map<String, Value> =
            serde_json::from_slice(json).map_err(malformed)?;
        let raw: Raw = serde_json::from_value(Value::Object(object)).map_err(malformed)?;
        let not_negative = "a number that is not negative";
        let positive = "a number above 0";
        Ok(Self {
            do_sample: read("do_sample", raw.do_sample, "true or false", Value::as_bool)?,
            temperature: real("temperature", raw.temperature, not_negative, |x| x >= 0.0)?,
            top_k: read(
                "top_k",
                raw.top_k,
                "a number of tokens, or 0 for all",
                token_id,
            )?,
            top_p: real("top_p", raw.top_p, "above 0 and at most 1", |x| {
                x > 0.0 && x <= 1.0
            })?,
            min_p: real("min_p", raw.min_p, "from 0 to 1", |x| {
                (0.0..=1.0).contains(&x)
            })?,
            repetition_penalty: real(
                "repetition_penalty",
                raw.repetition_penalty,
                positive,
                |x| x > 0.0,
            )?,
            bos_token_id: read("bos_token_id", raw.bos_token_id, "a token id", token_id)?,
            eos_token_ids: read(
                "eos_token_id",
                raw.eos_token_id,
                "a token id or a list of at most 256 of them",
                token_ids,
            )?
            .unwrap_or_default(),
            pad_token_id: read("pad_token_id", raw.pad_token_id, "a token id", token_id)?,
        })
    }

    /// The file, indented, ending in a line feed. Keys without a value are left out.
    pub fn to_json(&self) -> String {
        // Plain fields and string keys always have a JSON form.
        let mut text = serde_json::to_string_pretty(self).unwrap_or_default();
        text.push('\n');
        text
    }
}

/// The value of a key by `convert`, which gives `None` for a bad one.
fn read<T>(
    key: &'static str,
    value: Option<Value>,
    expected: &'static str,
    convert: impl Fn(&Value) -> Option<T>,
) -> Result<Option<T>, GenerationConfigError> {
    let Some(value) = value.filter(|v| !v.is_null()) else {
        return Ok(None);
    };
    match convert(&value) {
        Some(value) => Ok(Some(value)),
        None => {
            let found: String = value.to_string().chars().take(80).collect();
            Err(GenerationConfigError::BadValue {
                key,
                found,
                expected,
            })
        }
    }
}

fn real(
    key: &'static str,
    value: Option<Value>,
    expected: &'static str,
    fits: impl Fn(f64) -> bool,
) -> Result<Option<f64>, GenerationConfigError> {
    let convert = |value: &Value| value.as_f64().filter(|&x| x.is_finite() && fits(x));
    read(key, value, expected, convert)
}

fn token_id(value: &Value) -> Option<u32> {
    value.as_u64().and_then(|id| u32::try_from(id).ok())
}

fn token_ids(value: &Value) -> Option<Vec<u32>> {
    match value {
        Value::Array(ids) if ids.len() > MAX_EOS_TOKENS => None,
        Value::Array(ids) => ids.iter().map(token_id).collect(),
        id => token_id(id).map(|id| vec![id]),
    }
}

fn one_or_many<S: serde::Serializer>(ids: &[u32], serializer: S) -> Result<S::Ok, S::Error> {
    match ids {
        [id] => id.serialize(serializer),
        ids => ids.serialize(serializer),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn published_settings_are_read() {
        // The keys and values of Qwen3-8B's file.
        let json = br#"{"bos_token_id": 151643, "do_sample": true,
            "eos_token_id": [151645, 151643], "pad_token_id": 151643, "temperature": 0.6,
            "top_k": 20, "top_p": 0.95, "transformers_version": "4.51.0"}"#;
        let config = GenerationConfig::from_bytes(json).unwrap();
        let expected = GenerationConfig {
            do_sample: Some(true),
            temperature: Some(0.6),
            top_k: Some(20),
            top_p: Some(0.95),
            bos_token_id: Some(151_643),
            eos_token_ids: vec![151_645, 151_643],
            pad_token_id: Some(151_643),
            ..GenerationConfig::default()
        };
        assert_eq!(config, expected);
        let again = GenerationConfig::from_bytes(config.to_json().as_bytes());
        assert_eq!(again.unwrap(), config);
    }

    #[test]
    fn one_end_is_a_number_and_absent_keys_stay_absent() {
        let json = br#"{"eos_token_id": 7, "min_p": 0, "repetition_penalty": 1.1,
            "top_p": null, "unknown": {"deep": [1]}}"#;
        let config = GenerationConfig::from_bytes(json).unwrap();
        assert_eq!((&config.eos_token_ids, config.top_p), (&vec![7], None));
        let text = config.to_json();
        let expected = "{\n  \"min_p\": 0.0,\n  \"repetition_penalty\": 1.1,\n  \
             \"eos_token_id\": 7\n}\n";
        assert_eq!(text, expected);
        let empty = GenerationConfig::from_bytes(b"{}").unwrap();
        assert_eq!(empty, GenerationConfig::default());
        assert_eq!(empty.to_json(), "{}\n");
    }

    #[test]
    fn bad_values_are_refused_by_their_key() {
        let long = format!("{{\"eos_token_id\": [{}1]}}", "1,".repeat(MAX_EOS_TOKENS));
        for (key, json) in [
            ("do_sample", r#"{"do_sample": 1}"#),
            ("temperature", r#"{"temperature": -0.1}"#),
            ("temperature", r#"{"temperature": "0.6"}"#),
            ("top_k", r#"{"top_k": -1}"#),
            ("top_k", r#"{"top_k": 4294967296}"#),
            ("top_p", r#"{"top_p": 0}"#),
            ("top_p", r#"{"top_p": 1.01}"#),
            ("min_p", r#"{"min_p": 2}"#),
            ("repetition_penalty", r#"{"repetition_penalty": 0}"#),
            ("bos_token_id", r#"{"bos_token_id": 1.5}"#),
            ("pad_token_id", r#"{"pad_token_id": [1]}"#),
            ("eos_token_id", r#"{"eos_token_id": [1, "2"]}"#),
            ("eos_token_id", r#"{"eos_token_id": {"a": 1}}"#),
            ("eos_token_id", long.as_str()),
        ] {
            match GenerationConfig::from_bytes(json.as_bytes()) {
                Err(GenerationConfigError::BadValue { key: found, .. }) => {
                    assert_eq!(found, key, "{json}");
                }
                other => panic!("{json}: {other:?}"),
            }
        }
    }

    #[test]
    fn other_files_are_refused() {
        for bad in [
            &b""[..],
            b"[]",
            b"null",
            b"{\"top_k\": 1",
            b"\xff",
            b"[1, 2, 3]",
        ] {
            let result = GenerationConfig::from_bytes(bad);
            assert!(matches!(result, Err(GenerationConfigError::Malformed(_))));
        }
        let long = vec![b' '; MAX_GENERATION_CONFIG_BYTES + 1];
        let result = GenerationConfig::from_bytes(&long);
        assert!(matches!(result, Err(GenerationConfigError::TooLong { .. })));
    }
}
