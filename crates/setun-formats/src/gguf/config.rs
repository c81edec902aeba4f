//! The metadata of a Qwen3 model: its configuration under llama.cpp's keys.
//!
//! GGUF holds floats as f32. A value that its f32 does not give back, read as a decimal,
//! stands a second time as f64 under `setun.` and the key, so that a configuration comes
//! back as it went in. What llama.cpp has no key for stands under `setun.` too, or is
//! refused where leaving it out would change the logits.

use super::tokenizer::{eos_token_id, tokenizer_entries};
use super::{ALIGNMENT_KEY, DEFAULT_ALIGNMENT};
use super::{GgufError, GgufHeader, GgufTensorInfo, GgufValue, hf_name, tensor_name};
use crate::config::{Qwen3Config, RopeConfig, YarnConfig};
use crate::packed::{self, TernaryInfo};
use std::collections::BTreeMap;

const ARCHITECTURE: &str = "qwen3";
const BLOCK_COUNT: &str = "qwen3.block_count";
const CONTEXT_LENGTH: &str = "qwen3.context_length";
const EMBEDDING_LENGTH: &str = "qwen3.embedding_length";
const FEED_FORWARD_LENGTH: &str = "qwen3.feed_forward_length";
const VOCAB_SIZE: &str = "qwen3.vocab_size";
const HEAD_COUNT: &str = "qwen3.attention.head_count";
const HEAD_COUNT_KV: &str = "qwen3.attention.head_count_kv";
const KEY_LENGTH: &str = "qwen3.attention.key_length";
const VALUE_LENGTH: &str = "qwen3.attention.value_length";
const RMS_EPSILON: &str = "qwen3.attention.layer_norm_rms_epsilon";
const SLIDING_WINDOW: &str = "qwen3.attention.sliding_window";
const EXPERT_COUNT: &str = "qwen3.expert_count";
const ROPE_DIMENSIONS: &str = "qwen3.rope.dimension_count";
const FREQ_BASE: &str = "qwen3.rope.freq_base";
const SCALING_TYPE: &str = "qwen3.rope.scaling.type";
const SCALING_FACTOR: &str = "qwen3.rope.scaling.factor";
const SCALE_LINEAR: &str = "qwen3.rope.scale_linear";
const ORIGINAL_CONTEXT: &str = "qwen3.rope.scaling.original_context_length";
/// Factor on top of the `0.1 ln(factor) + 1` that llama.cpp applies by itself.
const ATTN_FACTOR: &str = "qwen3.rope.scaling.attn_factor";
const BETA_FAST: &str = "qwen3.rope.scaling.yarn_beta_fast";
const BETA_SLOW: &str = "qwen3.rope.scaling.yarn_beta_slow";
/// Keys of the same kind that must have no effect, with the value that has none.
const NEUTRAL: [(&str, f64); 3] = [
    ("qwen3.rope.scaling.yarn_ext_factor", 1.0),
    ("qwen3.rope.scaling.yarn_attn_factor", 1.0),
    ("qwen3.rope.scaling.yarn_log_multiplier", 0.0),
];
const BOS: &str = "tokenizer.ggml.bos_token_id";
const EOS: &str = "tokenizer.ggml.eos_token_id";
/// All of `eos_token_ids` as a JSON list, where it is not the one of [`EOS`].
const EOS_LIST: &str = "setun.eos_token_ids";
/// `attention_factor` itself, as f64.
const ATTENTION_FACTOR: &str = "setun.qwen3.rope.scaling.attention_factor";
const SETUN: &str = "setun.";
/// Keys of models whose weights are rotated; without the rotation they are noise.
const HADAMARD: &str = "prism.hadamard.";
const DAMAGED: &str = "export or download the file again";

/// The configuration of the Qwen3 model in a file: from its metadata, the rows of
/// `token_embd.weight`, and whether there is an `output.weight`.
///
/// # Errors
/// Other architectures and features that Setun does not run, missing keys, everything
/// that [`Qwen3Config::validate`] refuses, and tensors that are not exactly those of the
/// configuration.
pub fn qwen3_config(header: &GgufHeader) -> Result<Qwen3Config, GgufError> {
    refuse_other_models(header)?;
    let fields = Fields { header };
    let embedding = header.tensor("token_embd.weight");
    let embedding = embedding.ok_or_else(|| GgufError::MissingTensor {
        name: "token_embd.weight".to_owned(),
    })?;
    let hidden_size = fields.required_size(EMBEDDING_LENGTH)?;
    let num_attention_heads = fields.required_size(HEAD_COUNT)?;
    let head_dim = match fields.size(KEY_LENGTH)? {
        Some(head_dim) => head_dim,
        None => hidden_size
            .checked_div(num_attention_heads)
            .unwrap_or_default(),
    };
    for key in [VALUE_LENGTH, ROPE_DIMENSIONS] {
        if fields.size(key)?.is_some_and(|length| length != head_dim) {
            return Err(unsupported(header, key, "Qwen3 has one head_dim for all"));
        }
    }
    let max_position_embeddings = fields.required_size(CONTEXT_LENGTH)?;
    let config = Qwen3Config {
        // Never from a key: two sizes are in circulation for one model.
        vocab_size: embedding.shape[0],
        hidden_size,
        intermediate_size: fields.required_size(FEED_FORWARD_LENGTH)?,
        num_hidden_layers: fields.required_size(BLOCK_COUNT)?,
        num_attention_heads,
        num_key_value_heads: fields.size(HEAD_COUNT_KV)?.unwrap_or(num_attention_heads),
        head_dim,
        max_position_embeddings,
        rms_norm_eps: fields.required_real(RMS_EPSILON)?,
        tie_word_embeddings: header.tensor("output.weight").is_none(),
        rope: RopeConfig {
            rope_theta: fields.required_real(FREQ_BASE)?,
            yarn: yarn(&fields, max_position_embeddings)?,
        },
        bos_token_id: fields.token_id(BOS)?,
        eos_token_ids: eos_token_ids(&fields)?,
    };
    config.validate()?;
    check_tensors(header, &config)?;
    Ok(config)
}

/// How the ternary model in a file was projected and runs: the keys `setun.group_size`,
/// `setun.scale_rule` and `setun.numerics`. `None` for files of other programs.
///
/// # Errors
/// Some of the keys without the others, or values that cannot be used.
pub fn ternary_info(header: &GgufHeader) -> Result<Option<TernaryInfo>, GgufError> {
    let mut entries = BTreeMap::new();
    for key in ["group_size", "scale_rule", "numerics"] {
        let key = format!("{SETUN}{key}");
        if let Some(text) = header.text(&key)? {
            entries.insert(key, text.to_owned());
        }
    }
    if entries.is_empty() {
        return Ok(None);
    }
    Ok(Some(packed::parse_ternary(&entries, SETUN)?))
}

/// All metadata of a Qwen3 model, in the order in which it is written.
///
/// `ternary` is of a ternary model, `tokenizer_json` the bytes of its `tokenizer.json`,
/// `file_type` that of [`file_type`](super::file_type), `name` what people call the
/// model. Without a tokenizer the file says `none`, and its vocabulary is the embedding's.
///
/// # Errors
/// A configuration, a tokenizer or rope settings that GGUF cannot hold.
pub fn metadata_for(
    config: &Qwen3Config,
    ternary: Option<&TernaryInfo>,
    tokenizer_json: Option<&[u8]>,
    chat_template: Option<&str>,
    file_type: u32,
    name: &str,
) -> Result<Vec<(String, GgufValue)>, GgufError> {
    config.validate()?;
    let mut entries = Entries::default();
    entries.text("general.architecture", ARCHITECTURE);
    entries.text("general.name", name);
    entries.add("general.file_type", GgufValue::U32(file_type));
    entries.add("general.quantization_version", GgufValue::U32(2));
    entries.add(ALIGNMENT_KEY, GgufValue::U32(DEFAULT_ALIGNMENT));
    for (key, size) in [
        (BLOCK_COUNT, config.num_hidden_layers),
        (CONTEXT_LENGTH, config.max_position_embeddings),
        (EMBEDDING_LENGTH, config.hidden_size),
        (FEED_FORWARD_LENGTH, config.intermediate_size),
        (VOCAB_SIZE, config.vocab_size),
        (HEAD_COUNT, config.num_attention_heads),
        (HEAD_COUNT_KV, config.num_key_value_heads),
        (KEY_LENGTH, config.head_dim),
        (VALUE_LENGTH, config.head_dim),
        (ROPE_DIMENSIONS, config.head_dim),
    ] {
        // A validated configuration has no size above 2^24.
        entries.add(key, GgufValue::U32(size as u32));
    }
    entries.real(RMS_EPSILON, config.rms_norm_eps);
    entries.real(FREQ_BASE, config.rope.rope_theta);
    if let Some(yarn) = &config.rope.yarn {
        yarn_entries(yarn, &mut entries)?;
    }
    match tokenizer_json {
        Some(json) => entries.extend(tokenizer_entries(json, config.vocab_size)?),
        None => entries.text("tokenizer.ggml.model", "none"),
    }
    special_tokens(config, tokenizer_json, &mut entries)?;
    if let Some(template) = chat_template {
        entries.text("tokenizer.chat_template", template);
    }
    if let Some(ternary) = ternary {
        for (key, value) in packed::ternary_entries(ternary, SETUN) {
            entries.text(&key, &value);
        }
    }
    Ok(entries.list)
}

fn refuse_other_models(header: &GgufHeader) -> Result<(), GgufError> {
    let key = "general.architecture";
    match header.text(key)? {
        Some(ARCHITECTURE) => {}
        Some(_) => return Err(unsupported(header, key, "it runs dense Qwen3 (\"qwen3\")")),
        None => return Err(missing(key)),
    }
    if let Some(key) = header.metadata.keys().find(|key| key.starts_with(HADAMARD)) {
        return Err(unsupported(header, key, "its weights are rotated"));
    }
    let fields = Fields { header };
    for key in [EXPERT_COUNT, SLIDING_WINDOW] {
        if fields.size(key)?.is_some_and(|n| n > 0) {
            return Err(unsupported(
                header,
                key,
                "it runs dense models that see all",
            ));
        }
    }
    Ok(())
}

fn yarn(fields: &Fields, max_positions: usize) -> Result<Option<YarnConfig>, GgufError> {
    let header = fields.header;
    let factor = fields.real(SCALING_FACTOR)?;
    match header.text(SCALING_TYPE)? {
        Some("yarn") => {}
        Some("none") => return Ok(None),
        // llama.cpp divides positions by the factor if it finds no type.
        Some("linear") | None => {
            for key in [SCALING_FACTOR, SCALE_LINEAR] {
                if fields.real(key)?.is_some_and(|factor| factor != 1.0) {
                    return Err(unsupported(header, key, "it runs rope scaling \"yarn\""));
                }
            }
            return Ok(None);
        }
        Some(_) => return Err(unsupported(header, SCALING_TYPE, "it runs \"yarn\"")),
    }
    for (key, neutral) in NEUTRAL {
        if fields.real(key)?.is_some_and(|value| value != neutral) {
            return Err(unsupported(header, key, "write the result as attn_factor"));
        }
    }
    let factor = factor.ok_or_else(|| missing(SCALING_FACTOR))?;
    Ok(Some(YarnConfig {
        factor,
        original_max_position_embeddings: fields.size(ORIGINAL_CONTEXT)?.unwrap_or(max_positions),
        beta_fast: fields.real(BETA_FAST)?.unwrap_or(32.0),
        beta_slow: fields.real(BETA_SLOW)?.unwrap_or(1.0),
        attention_factor: attention_factor(fields, factor)?,
        // llama.cpp always rounds the ends of the ramp.
        truncate: true,
    }))
}

/// Cosine and sine scale of a factor, before [`ATTN_FACTOR`].
fn default_attention_factor(factor: f64) -> f64 {
    0.1 * factor.ln() + 1.0
}

fn attention_factor(fields: &Fields, factor: f64) -> Result<Option<f64>, GgufError> {
    let on_top = fields.real(ATTN_FACTOR)?;
    let default = default_attention_factor(factor);
    if let Some(&GgufValue::F64(exact)) = fields.header.metadata.get(ATTENTION_FACTOR)
        && on_top.map(|on_top| on_top as f32) == Some((exact / default) as f32)
    {
        return Ok(Some(exact));
    }
    let on_top = on_top.filter(|&on_top| on_top != 1.0);
    Ok(on_top.map(|on_top| on_top * default))
}

fn yarn_entries(yarn: &YarnConfig, entries: &mut Entries) -> Result<(), GgufError> {
    if !yarn.truncate {
        return Err(GgufError::Unwritable {
            what: "YaRN with truncate = false".to_owned(),
            remedy: "llama.cpp would compute other logits; choose another format",
        });
    }
    let original = yarn.original_max_position_embeddings;
    entries.text(SCALING_TYPE, "yarn");
    entries.real(SCALING_FACTOR, yarn.factor);
    // Validated to be at most 2^24.
    entries.add(ORIGINAL_CONTEXT, GgufValue::U32(original as u32));
    entries.real(BETA_FAST, yarn.beta_fast);
    entries.real(BETA_SLOW, yarn.beta_slow);
    if let Some(factor) = yarn.attention_factor {
        let on_top = factor / default_attention_factor(yarn.factor);
        entries.add(ATTN_FACTOR, GgufValue::F32(on_top as f32));
        entries.add(ATTENTION_FACTOR, GgufValue::F64(factor));
    }
    Ok(())
}

/// One end-of-text token is all that GGUF has. A model without one gets that of its
/// tokenizer, because llama.cpp would take token 11.
fn special_tokens(
    config: &Qwen3Config,
    tokenizer_json: Option<&[u8]>,
    entries: &mut Entries,
) -> Result<(), GgufError> {
    if let Some(id) = config.bos_token_id {
        entries.add(BOS, GgufValue::U32(id));
    }
    let eos = match (config.eos_token_ids.first(), tokenizer_json) {
        (Some(&id), _) => Some(id),
        (None, Some(json)) => eos_token_id(json)?,
        (None, None) => None,
    };
    if let Some(id) = eos {
        entries.add(EOS, GgufValue::U32(id));
    }
    let alone: Vec<u32> = eos.into_iter().collect();
    if alone != config.eos_token_ids {
        let ids: Vec<String> = config.eos_token_ids.iter().map(u32::to_string).collect();
        entries.text(EOS_LIST, &format!("[{}]", ids.join(",")));
    }
    Ok(())
}

fn eos_token_ids(fields: &Fields) -> Result<Vec<u32>, GgufError> {
    let Some(text) = fields.header.text(EOS_LIST)? else {
        return Ok(fields.token_id(EOS)?.into_iter().collect());
    };
    serde_json::from_str(text).map_err(|_| {
        let value = GgufValue::String(text.to_owned());
        GgufError::bad_value(EOS_LIST, &value, "a list of token ids")
    })
}

/// Every parameter of the configuration is there with its shape, and nothing else.
fn check_tensors(header: &GgufHeader, config: &Qwen3Config) -> Result<(), GgufError> {
    let found = |tensor: &'_ GgufTensorInfo| (tensor.name.clone(), tensor.clone());
    let mut tensors: BTreeMap<String, GgufTensorInfo> = header.tensors.iter().map(found).collect();
    for parameter in config.parameters() {
        let name = tensor_name(&parameter.name).unwrap_or(parameter.name);
        let Some(tensor) = tensors.remove(&name) else {
            return Err(GgufError::MissingTensor { name });
        };
        let ternary_norm = parameter.shape.len() == 1 && tensor.ggml_type.block().is_some();
        if tensor.shape != parameter.shape || ternary_norm {
            let (kind, shape) = (tensor.ggml_type.name(), tensor.shape);
            let why = format!("{kind} {shape:?} where {:?} belongs", parameter.shape);
            return Err(GgufError::BadTensor { name, why });
        }
    }
    match tensors.into_keys().next() {
        None => Ok(()),
        Some(name) if hf_name(&name).is_none() => Err(GgufError::ExtraTensor { name }),
        Some(name) => {
            let why = "a layer that block_count does not have".to_owned();
            Err(GgufError::BadTensor { name, why })
        }
    }
}

/// Metadata in the order in which it is written.
#[derive(Default)]
struct Entries {
    list: Vec<(String, GgufValue)>,
}

impl Entries {
    fn add(&mut self, key: &str, value: GgufValue) {
        self.list.push((key.to_owned(), value));
    }

    fn text(&mut self, key: &str, text: &str) {
        self.add(key, GgufValue::String(text.to_owned()));
    }

    fn real(&mut self, key: &str, value: f64) {
        let rounded = value as f32;
        self.add(key, GgufValue::F32(rounded));
        if decimal(rounded) != value {
            self.add(&format!("{SETUN}{key}"), GgufValue::F64(value));
        }
    }

    fn extend(&mut self, entries: Vec<(String, GgufValue)>) {
        self.list.extend(entries);
    }
}

/// The f64 with the shortest decimal that gives `value` as f32: 1e-6 for 1e-6, where a
/// conversion gives 9.99999997e-7.
fn decimal(value: f32) -> f64 {
    value.to_string().parse().unwrap_or(f64::from(value))
}

/// Metadata read key by key.
struct Fields<'a> {
    header: &'a GgufHeader,
}

impl Fields<'_> {
    fn size(&self, key: &str) -> Result<Option<usize>, GgufError> {
        let read = |value: &GgufValue| usize::try_from(value.as_u64()?).ok();
        self.read(key, "one whole number", read)
    }

    fn required_size(&self, key: &str) -> Result<usize, GgufError> {
        self.size(key)?.ok_or_else(|| missing(key))
    }

    fn token_id(&self, key: &str) -> Result<Option<u32>, GgufError> {
        let read = |value: &GgufValue| u32::try_from(value.as_u64()?).ok();
        self.read(key, "a token id", read)
    }

    fn real(&self, key: &str) -> Result<Option<f64>, GgufError> {
        let read = |value: &GgufValue| match *value {
            GgufValue::F32(value) => Some(value),
            _ => None,
        };
        let rounded = self.read(key, "an f32", read)?;
        let exact = self.header.metadata.get(&format!("{SETUN}{key}"));
        Ok(rounded.map(|rounded| match exact {
            Some(&GgufValue::F64(exact)) if exact as f32 == rounded => exact,
            _ => decimal(rounded),
        }))
    }

    fn required_real(&self, key: &str) -> Result<f64, GgufError> {
        self.real(key)?.ok_or_else(|| missing(key))
    }

    fn read<T>(
        &self,
        key: &str,
        expected: &str,
        read: impl FnOnce(&GgufValue) -> Option<T>,
    ) -> Result<Option<T>, GgufError> {
        let Some(value) = self.header.metadata.get(key) else {
            return Ok(None);
        };
        let found = read(value);
        found
            .map(Some)
            .ok_or_else(|| GgufError::bad_value(key, value, expected))
    }
}

fn missing(key: &str) -> GgufError {
    let (key, remedy) = (key.to_owned(), DAMAGED);
    GgufError::Missing { key, remedy }
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
