//! `config.json` of a Qwen3 model: the sizes and constants behind the weights.
//!
//! Source: `Qwen3Config` and `modeling_rope_utils` of Hugging Face transformers, whose
//! two spellings of the rope settings both occur in the wild.

pub(crate) mod json;
mod parse;

use serde_json::{Map, Value, json};
use thiserror::Error;

/// Longest `config.json` that is read, in bytes.
pub const MAX_CONFIG_BYTES: usize = 1 << 20;
/// Largest `vocab_size`.
pub const MAX_VOCAB_SIZE: usize = 1 << 24;
/// Largest `hidden_size`.
pub const MAX_HIDDEN_SIZE: usize = 1 << 17;
/// Largest `intermediate_size`.
pub const MAX_INTERMEDIATE_SIZE: usize = 1 << 19;
/// Largest `num_hidden_layers`.
pub const MAX_HIDDEN_LAYERS: usize = 1024;
/// Largest `num_attention_heads`.
pub const MAX_ATTENTION_HEADS: usize = 1024;
/// Largest `head_dim`.
pub const MAX_HEAD_DIM: usize = 1024;
/// Largest `max_position_embeddings`: every position is exact in f32.
pub const MAX_POSITION_EMBEDDINGS: usize = 1 << 24;
/// Most parameters of a model.
pub const MAX_PARAMETERS: u64 = 1 << 40;

/// Why bytes are not the configuration of a model that Setun runs.
#[derive(Clone, Debug, PartialEq, Error)]
pub enum ConfigError {
    /// More than [`MAX_CONFIG_BYTES`].
    #[error("{found} bytes are too long for a model configuration (at most {MAX_CONFIG_BYTES})")]
    TooLong {
        /// Length of the input.
        found: usize,
    },
    /// Not JSON.
    #[error("not valid JSON: {0}; export or download the configuration again")]
    Json(String),
    /// JSON, but not an object.
    #[error("a model configuration is a JSON object, this is {0}")]
    NotAnObject(String),
    /// A required key is absent.
    #[error("`{key}` is missing; {remedy}")]
    Missing {
        /// The key, with the object that holds it.
        key: String,
        /// What to do about it.
        remedy: &'static str,
    },
    /// A value of the wrong JSON type.
    #[error("`{key}` is {found}; write {expected}")]
    WrongType {
        /// The key, with the object that holds it.
        key: String,
        /// The value as it was read.
        found: String,
        /// What belongs there.
        expected: &'static str,
    },
    /// A model that Setun does not run.
    #[error("`{key}` is {found}, which Setun does not run; {remedy}")]
    Unsupported {
        /// The key, with the object that holds it.
        key: String,
        /// The value as it was read.
        found: String,
        /// What Setun does run.
        remedy: &'static str,
    },
    /// A number outside its range, or one that contradicts another.
    #[error("`{key}` is {found}; it must be {allowed}")]
    OutOfRange {
        /// The key.
        key: &'static str,
        /// The value.
        found: String,
        /// The values that are fine.
        allowed: String,
    },
    /// The same setting twice, with two values.
    #[error("`{first}` and `{second}` disagree; keep one of them")]
    Conflict {
        /// One key.
        first: String,
        /// The other key.
        second: String,
    },
}

/// Configuration of a Qwen3 model, under Hugging Face's names.
///
/// [`parse`](Self::parse) and [`validate`](Self::validate) check everything, so that
/// later code never checks again.
#[derive(Clone, Debug, PartialEq)]
pub struct Qwen3Config {
    /// Rows of the token embedding.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the SwiGLU layer.
    pub intermediate_size: usize,
    /// Transformer layers.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads; divides `num_attention_heads`.
    pub num_key_value_heads: usize,
    /// Width of a head, even; `num_attention_heads * head_dim` need not be `hidden_size`.
    pub head_dim: usize,
    /// Longest context in tokens.
    pub max_position_embeddings: usize,
    /// Added to the mean square in every RMSNorm.
    pub rms_norm_eps: f64,
    /// Whether the head's weights are the embedding's.
    pub tie_word_embeddings: bool,
    /// Rotary position embedding.
    pub rope: RopeConfig,
    /// Token that starts a text, if the model has one. Setun never adds it by itself.
    pub bos_token_id: Option<u32>,
    /// Tokens that end a generation; may be empty.
    pub eos_token_ids: Vec<u32>,
}

/// Rotary position embedding.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeConfig {
    /// Base of the frequencies, above 1.
    pub rope_theta: f64,
    /// Extension to longer contexts, if any.
    pub yarn: Option<YarnConfig>,
}

/// YaRN (Peng et al., 2023): frequencies stretched by `factor`, the fast ones kept.
#[derive(Clone, Debug, PartialEq)]
pub struct YarnConfig {
    /// Ratio of the longer context to the original one, at least 1.
    pub factor: f64,
    /// Context of the pre-training, in tokens.
    pub original_max_position_embeddings: usize,
    /// Rotations over the original context above which a frequency is kept.
    pub beta_fast: f64,
    /// Rotations below which a frequency is divided by `factor`.
    pub beta_slow: f64,
    /// Scale of cosine and sine; `None` stands for `0.1 ln(factor) + 1`.
    pub attention_factor: Option<f64>,
    /// Whether the ends of the ramp are rounded to whole dimensions.
    pub truncate: bool,
}

/// Name and shape of one parameter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParameterInfo {
    /// Hugging Face name, such as `model.layers.0.self_attn.q_proj.weight`.
    pub name: String,
    /// `[out, in]` of a matrix, `[n]` of a norm.
    pub shape: Vec<usize>,
}

impl ParameterInfo {
    /// Whether it is a matrix, which a ternary model stores as trits; the others are norms.
    pub fn is_matrix(&self) -> bool {
        self.shape.len() == 2
    }

    /// Number of elements.
    pub fn numel(&self) -> usize {
        self.shape.iter().product()
    }
}

impl Qwen3Config {
    /// Checks every number on its own and against the others: the same checks as in
    /// [`parse`](Self::parse), for a configuration that was built in code.
    ///
    /// # Errors
    /// The first key whose value is zero, absurdly large, or at odds with another key.
    pub fn validate(&self) -> Result<(), ConfigError> {
        self.validate_sizes()?;
        if !self
            .num_attention_heads
            .is_multiple_of(self.num_key_value_heads)
        {
            let allowed = format!(
                "a divisor of num_attention_heads ({})",
                self.num_attention_heads
            );
            return Err(out_of_range(
                "num_key_value_heads",
                self.num_key_value_heads,
                allowed,
            ));
        }
        if !self.head_dim.is_multiple_of(2) {
            let allowed = "even: rope rotates pairs of its dimensions".to_owned();
            return Err(out_of_range("head_dim", self.head_dim, allowed));
        }
        if !(self.rms_norm_eps > 0.0 && self.rms_norm_eps < 1.0) {
            let allowed = "between 0 and 1, such as 1e-6".to_owned();
            return Err(out_of_range("rms_norm_eps", self.rms_norm_eps, allowed));
        }
        self.rope.validate()?;
        let below = |id: u32| (id as usize) < self.vocab_size;
        let allowed = || format!("null or below vocab_size ({})", self.vocab_size);
        if let Some(id) = self.bos_token_id.filter(|&id| !below(id)) {
            return Err(out_of_range("bos_token_id", id, allowed()));
        }
        if let Some(&id) = self.eos_token_ids.iter().find(|&&id| !below(id)) {
            return Err(out_of_range("eos_token_id", id, allowed()));
        }
        let num_parameters = self.num_parameters();
        if num_parameters > MAX_PARAMETERS || usize::try_from(num_parameters).is_err() {
            let allowed = format!("small enough for at most {MAX_PARAMETERS} parameters");
            let found = format!("part of a model of {num_parameters} parameters");
            return Err(out_of_range("hidden_size", found, allowed));
        }
        Ok(())
    }

    fn validate_sizes(&self) -> Result<(), ConfigError> {
        let sizes = [
            ("vocab_size", self.vocab_size, MAX_VOCAB_SIZE),
            ("hidden_size", self.hidden_size, MAX_HIDDEN_SIZE),
            (
                "intermediate_size",
                self.intermediate_size,
                MAX_INTERMEDIATE_SIZE,
            ),
            (
                "num_hidden_layers",
                self.num_hidden_layers,
                MAX_HIDDEN_LAYERS,
            ),
            (
                "num_attention_heads",
                self.num_attention_heads,
                MAX_ATTENTION_HEADS,
            ),
            (
                "num_key_value_heads",
                self.num_key_value_heads,
                MAX_ATTENTION_HEADS,
            ),
            ("head_dim", self.head_dim, MAX_HEAD_DIM),
            (
                "max_position_embeddings",
                self.max_position_embeddings,
                MAX_POSITION_EMBEDDINGS,
            ),
        ];
        for (key, found, max) in sizes {
            if found == 0 || found > max {
                return Err(out_of_range(key, found, format!("from 1 to {max}")));
            }
        }
        Ok(())
    }

    /// Number of parameters; a tied head counts once.
    pub fn num_parameters(&self) -> u64 {
        let numel = |p: &ParameterInfo| p.shape.iter().map(|&n| n as u64).product::<u64>();
        self.parameters().iter().map(numel).sum()
    }

    /// Every parameter in canonical order, the order in which Setun stores, hashes and
    /// updates them.
    pub fn parameters(&self) -> Vec<ParameterInfo> {
        let (hidden, inner) = (self.hidden_size, self.intermediate_size);
        let q_width = self.num_attention_heads * self.head_dim;
        let kv_width = self.num_key_value_heads * self.head_dim;
        let mut parameters = Vec::with_capacity(3 + 11 * self.num_hidden_layers);
        let mut add = |name: String, shape: &[usize]| {
            let shape = shape.to_vec();
            parameters.push(ParameterInfo { name, shape });
        };
        add(
            "model.embed_tokens.weight".to_owned(),
            &[self.vocab_size, hidden],
        );
        for layer in 0..self.num_hidden_layers {
            let of_layer: [(&str, &[usize]); 11] = [
                ("input_layernorm", &[hidden]),
                ("self_attn.q_proj", &[q_width, hidden]),
                ("self_attn.k_proj", &[kv_width, hidden]),
                ("self_attn.v_proj", &[kv_width, hidden]),
                ("self_attn.q_norm", &[self.head_dim]),
                ("self_attn.k_norm", &[self.head_dim]),
                ("self_attn.o_proj", &[hidden, q_width]),
                ("post_attention_layernorm", &[hidden]),
                ("mlp.gate_proj", &[inner, hidden]),
                ("mlp.up_proj", &[inner, hidden]),
                ("mlp.down_proj", &[hidden, inner]),
            ];
            for (part, shape) in of_layer {
                add(format!("model.layers.{layer}.{part}.weight"), shape);
            }
        }
        add("model.norm.weight".to_owned(), &[hidden]);
        if !self.tie_word_embeddings {
            add("lm_head.weight".to_owned(), &[self.vocab_size, hidden]);
        }
        parameters
    }

    /// `config.json` that transformers loads as `Qwen3ForCausalLM`, in Qwen3's own
    /// spelling. Its `torch_dtype` is `float32`, so that a loader that follows it rounds
    /// nothing; see [`to_json_as`](Self::to_json_as).
    pub fn to_json(&self) -> String {
        self.to_json_as("float32")
    }

    /// As [`to_json`](Self::to_json), with `torch_dtype` as given (`float32`,
    /// `bfloat16`, `float16`): the type in which transformers holds the weights.
    pub fn to_json_as(&self, torch_dtype: &str) -> String {
        let eos_token_id = match self.eos_token_ids[..] {
            [] => Value::Null,
            [id] => id.into(),
            _ => self.eos_token_ids.clone().into(),
        };
        // Keys in alphabetical order: the text is the same whether or not a build's
        // serde_json keeps the order of insertion.
        let value = json!({
            "architectures": ["Qwen3ForCausalLM"],
            "attention_bias": false,
            "attention_dropout": 0.0,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": eos_token_id,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "initializer_range": 0.02,
            "intermediate_size": self.intermediate_size,
            "max_position_embeddings": self.max_position_embeddings,
            "max_window_layers": self.num_hidden_layers,
            "model_type": "qwen3",
            "num_attention_heads": self.num_attention_heads,
            "num_hidden_layers": self.num_hidden_layers,
            "num_key_value_heads": self.num_key_value_heads,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_scaling": self.rope.yarn.as_ref().map(|yarn| yarn.to_value(self.max_position_embeddings)),
            "rope_theta": self.rope.rope_theta,
            "sliding_window": null,
            "tie_word_embeddings": self.tie_word_embeddings,
            "torch_dtype": torch_dtype,
            "use_cache": true,
            "use_sliding_window": false,
            "vocab_size": self.vocab_size,
        });
        format!("{value:#}\n")
    }
}

impl RopeConfig {
    fn validate(&self) -> Result<(), ConfigError> {
        if !(self.rope_theta.is_finite() && self.rope_theta > 1.0) {
            let allowed = "a finite number above 1, such as 1000000".to_owned();
            return Err(out_of_range("rope_theta", self.rope_theta, allowed));
        }
        match &self.yarn {
            Some(yarn) => yarn.validate(),
            None => Ok(()),
        }
    }
}

impl YarnConfig {
    fn validate(&self) -> Result<(), ConfigError> {
        if !(self.factor.is_finite() && self.factor >= 1.0) {
            let allowed = "a finite number, at least 1".to_owned();
            return Err(out_of_range("factor", self.factor, allowed));
        }
        let original = self.original_max_position_embeddings;
        if original == 0 || original > MAX_POSITION_EMBEDDINGS {
            let allowed = format!("from 1 to {MAX_POSITION_EMBEDDINGS}");
            return Err(out_of_range(
                "original_max_position_embeddings",
                original,
                allowed,
            ));
        }
        if !(self.beta_slow.is_finite() && self.beta_slow > 0.0) {
            let allowed = "a finite number above 0".to_owned();
            return Err(out_of_range("beta_slow", self.beta_slow, allowed));
        }
        if !(self.beta_fast.is_finite() && self.beta_fast >= self.beta_slow) {
            let allowed = format!("finite and at least beta_slow ({})", self.beta_slow);
            return Err(out_of_range("beta_fast", self.beta_fast, allowed));
        }
        match self.attention_factor {
            Some(factor) if !(factor.is_finite() && factor > 0.0) => {
                let allowed = "null or a finite number above 0".to_owned();
                Err(out_of_range("attention_factor", factor, allowed))
            }
            _ => Ok(()),
        }
    }

    /// The object under `rope_scaling`. `truncate` is younger than the other keys, so it
    /// appears only where it is not the default. Nor does the original length where it is
    /// `max_positions`, its default: some versions of transformers take their quotient for
    /// the factor as soon as it is there.
    fn to_value(&self, max_positions: usize) -> Value {
        let mut map = Map::new();
        if let Some(factor) = self.attention_factor {
            map.insert("attention_factor".to_owned(), factor.into());
        }
        map.insert("beta_fast".to_owned(), self.beta_fast.into());
        map.insert("beta_slow".to_owned(), self.beta_slow.into());
        map.insert("factor".to_owned(), self.factor.into());
        let original = self.original_max_position_embeddings;
        if original != max_positions {
            let key = "original_max_position_embeddings".to_owned();
            map.insert(key, original.into());
        }
        map.insert("rope_type".to_owned(), "yarn".into());
        if !self.truncate {
            map.insert("truncate".to_owned(), false.into());
        }
        map.into()
    }
}

fn out_of_range(key: &'static str, found: impl ToString, allowed: String) -> ConfigError {
    let found = found.to_string();
    ConfigError::OutOfRange {
        key,
        found,
        allowed,
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A small tied model.
    pub fn tied() -> Qwen3Config {
        Qwen3Config {
            vocab_size: 320,
            hidden_size: 128,
            intermediate_size: 256,
            num_hidden_layers: 2,
            num_attention_heads: 4,
            num_key_value_heads: 2,
            head_dim: 32,
            max_position_embeddings: 256,
            rms_norm_eps: 1e-6,
            tie_word_embeddings: true,
            rope: RopeConfig {
                rope_theta: 1e6,
                yarn: None,
            },
            bos_token_id: None,
            eos_token_ids: Vec::new(),
        }
    }

    pub fn yarn() -> YarnConfig {
        YarnConfig {
            factor: 4.0,
            original_max_position_embeddings: 64,
            beta_fast: 32.0,
            beta_slow: 1.0,
            attention_factor: None,
            truncate: true,
        }
    }

    pub fn with_yarn(yarn: YarnConfig) -> Qwen3Config {
        let rope = RopeConfig {
            rope_theta: 1e6,
            yarn: Some(yarn),
        };
        Qwen3Config { rope, ..tied() }
    }

    pub fn parse(json: &str) -> Result<Qwen3Config, ConfigError> {
        Qwen3Config::parse(json.as_bytes())
    }

    #[test]
    fn bad_yarn_is_refused() {
        let bad = [
            YarnConfig {
                factor: 0.5,
                ..yarn()
            },
            YarnConfig {
                factor: f64::NAN,
                ..yarn()
            },
            YarnConfig {
                original_max_position_embeddings: 0,
                ..yarn()
            },
            YarnConfig {
                beta_slow: 0.0,
                ..yarn()
            },
            YarnConfig {
                beta_fast: 0.5,
                ..yarn()
            },
            YarnConfig {
                attention_factor: Some(-1.0),
                ..yarn()
            },
        ];
        for yarn in bad {
            let result = with_yarn(yarn.clone()).validate();
            assert!(
                matches!(result, Err(ConfigError::OutOfRange { .. })),
                "{yarn:?}"
            );
        }
        assert_eq!(with_yarn(yarn()).validate(), Ok(()));
    }

    #[test]
    fn json_round_trips() {
        let full = YarnConfig {
            attention_factor: Some(0.1 * 4.0f64.ln() + 1.0),
            beta_fast: 31.5,
            truncate: false,
            ..yarn()
        };
        let configs = [
            tied(),
            with_yarn(yarn()),
            with_yarn(full),
            Qwen3Config {
                tie_word_embeddings: false,
                bos_token_id: Some(1),
                eos_token_ids: vec![319],
                rms_norm_eps: 0.1 + 0.2,
                ..tied()
            },
            Qwen3Config {
                eos_token_ids: vec![3, 1],
                ..tied()
            },
        ];
        for config in configs {
            let json = config.to_json();
            assert_eq!(parse(&json).as_ref(), Ok(&config), "{json}");
            assert_eq!(parse(&json).unwrap().to_json(), json);
        }
    }

    #[test]
    fn json_has_the_keys_that_transformers_reads() {
        let value: Value = serde_json::from_str(&tied().to_json_as("bfloat16")).unwrap();
        assert_eq!(value["architectures"], json!(["Qwen3ForCausalLM"]));
        assert_eq!(value["torch_dtype"], "bfloat16");
        assert_eq!(value["max_window_layers"], 2);
        let keys: Vec<&String> = value.as_object().unwrap().keys().collect();
        assert!(keys.is_sorted());
    }

    #[test]
    fn parameters_are_in_canonical_order() {
        let config = Qwen3Config {
            num_key_value_heads: 1,
            head_dim: 64,
            tie_word_embeddings: false,
            ..tied()
        };
        let parameters = config.parameters();
        assert_eq!(parameters.len(), 3 + 2 * 11);
        let shape = |name: &str| {
            let found = parameters.iter().find(|p| p.name == name);
            found.unwrap_or_else(|| panic!("no {name}")).shape.clone()
        };
        assert_eq!(parameters[0].name, "model.embed_tokens.weight");
        assert_eq!(parameters[1].name, "model.layers.0.input_layernorm.weight");
        assert_eq!(parameters[12].name, "model.layers.1.input_layernorm.weight");
        assert_eq!(parameters[23].name, "model.norm.weight");
        assert_eq!(parameters[24].name, "lm_head.weight");
        assert_eq!(shape("model.layers.1.self_attn.q_proj.weight"), [256, 128]);
        assert_eq!(shape("model.layers.1.self_attn.k_proj.weight"), [64, 128]);
        assert_eq!(shape("model.layers.1.self_attn.o_proj.weight"), [128, 256]);
        assert_eq!(shape("model.layers.1.self_attn.k_norm.weight"), [64]);
        assert_eq!(shape("model.layers.1.mlp.down_proj.weight"), [128, 256]);
        let matrices = parameters.iter().filter(|p| p.is_matrix()).count();
        assert_eq!(matrices, 2 + 2 * 7);
        let sum: usize = parameters.iter().map(ParameterInfo::numel).sum();
        assert_eq!(config.num_parameters(), sum as u64);
        let tied = Qwen3Config {
            tie_word_embeddings: true,
            ..config
        };
        assert_eq!(tied.parameters().len(), 2 + 2 * 11);
    }

    #[test]
    fn qwen3_has_its_published_size() {
        let config = Qwen3Config {
            vocab_size: 151_936,
            hidden_size: 1024,
            intermediate_size: 3072,
            num_hidden_layers: 28,
            num_attention_heads: 16,
            num_key_value_heads: 8,
            head_dim: 128,
            max_position_embeddings: 40_960,
            ..tied()
        };
        assert_eq!(config.validate(), Ok(()));
        assert_eq!(config.num_parameters(), 596_049_920);
    }
}
