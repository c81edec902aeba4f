//! Reading `config.json`: key by key, with an error for each key.

use super::json::{cut, cut_at, refuse_repeated_keys};
use super::{ConfigError, MAX_CONFIG_BYTES, Qwen3Config, RopeConfig, YarnConfig, out_of_range};
use serde_json::{Map, Value};

impl Qwen3Config {
    /// Reads the bytes of a `config.json` and validates what it says.
    ///
    /// Both spellings of the rope settings are read (`rope_theta` with `rope_scaling`,
    /// and `rope_parameters`). A missing `head_dim` is `hidden_size` divided by
    /// `num_attention_heads`. Keys without influence on the forward pass are ignored.
    ///
    /// # Errors
    /// Anything but JSON, a key that occurs twice, other architectures, experts, biases,
    /// sliding windows, quantized checkpoints, unknown rope types, and everything that
    /// [`validate`](Self::validate) refuses.
    pub fn parse(json: &[u8]) -> Result<Self, ConfigError> {
        if json.len() > MAX_CONFIG_BYTES {
            return Err(ConfigError::TooLong { found: json.len() });
        }
        let not_json = |e: serde_json::Error| ConfigError::Json(cut(&e.to_string()));
        refuse_repeated_keys(json).map_err(not_json)?;
        let value: Value = serde_json::from_slice(json).map_err(not_json)?;
        let Value::Object(map) = &value else {
            return Err(ConfigError::NotAnObject(shown(&value)));
        };
        let fields = Fields { map, object: None };
        refuse_other_models(&fields)?;
        let num_hidden_layers = fields.required_size("num_hidden_layers")?;
        refuse_sliding_window(&fields, num_hidden_layers)?;
        let hidden_size = fields.required_size("hidden_size")?;
        let num_attention_heads = fields.required_size("num_attention_heads")?;
        let num_key_value_heads = fields.size("num_key_value_heads")?;
        let head_dim = match fields.size("head_dim")? {
            Some(head_dim) => head_dim,
            None => default_head_dim(hidden_size, num_attention_heads)?,
        };
        let max_position_embeddings = fields.required_size("max_position_embeddings")?;
        let config = Self {
            vocab_size: fields.required_size("vocab_size")?,
            hidden_size,
            intermediate_size: fields.required_size("intermediate_size")?,
            num_hidden_layers,
            num_attention_heads,
            num_key_value_heads: num_key_value_heads.unwrap_or(num_attention_heads),
            head_dim,
            max_position_embeddings,
            rms_norm_eps: fields.real("rms_norm_eps")?.unwrap_or(1e-6),
            tie_word_embeddings: fields.flag("tie_word_embeddings")?.unwrap_or(false),
            rope: parse_rope(&fields, max_position_embeddings)?,
            bos_token_id: fields.token_id("bos_token_id")?,
            eos_token_ids: fields.token_ids("eos_token_id")?,
        };
        config.validate()?;
        Ok(config)
    }
}

fn refuse_other_models(fields: &Fields) -> Result<(), ConfigError> {
    let remedy = "Setun runs Qwen3 (model_type \"qwen3\")";
    match fields.text("model_type")? {
        Some("qwen3") => {}
        Some(_) => return Err(fields.unsupported("model_type", remedy)),
        None => return Err(fields.missing("model_type", "write \"qwen3\" if the model is one")),
    }
    if let Some(value) = fields.value("architectures") {
        let Value::Array(names) = value else {
            return Err(fields.wrong_type("architectures", "a list of strings or null"));
        };
        if !names.iter().any(|name| name == "Qwen3ForCausalLM") {
            let remedy = "it runs Qwen3ForCausalLM, the model with a language head";
            return Err(fields.unsupported("architectures", remedy));
        }
    }
    for key in ["num_experts", "num_local_experts"] {
        if fields.size(key)?.is_some_and(|num_experts| num_experts > 0) {
            return Err(fields.unsupported(key, "it runs dense models, without experts"));
        }
    }
    if fields.text("hidden_act")?.is_some_and(|act| act != "silu") {
        return Err(fields.unsupported("hidden_act", "Qwen3 uses \"silu\""));
    }
    for key in ["attention_bias", "mlp_bias"] {
        if fields.flag(key)?.unwrap_or(false) {
            return Err(fields.unsupported(key, "Qwen3's projections have no biases"));
        }
    }
    if fields
        .real("partial_rotary_factor")?
        .is_some_and(|factor| factor != 1.0)
    {
        return Err(fields.unsupported("partial_rotary_factor", "Qwen3 rotates the whole head"));
    }
    if fields.value("quantization_config").is_some() {
        let remedy = "start from the unquantized checkpoint (f32, f16 or bf16)";
        return Err(fields.unsupported("quantization_config", remedy));
    }
    Ok(())
}

fn refuse_sliding_window(fields: &Fields, num_layers: usize) -> Result<(), ConfigError> {
    let remedy = "it attends over the whole context";
    if fields.flag("use_sliding_window")?.unwrap_or(false) {
        return Err(fields.unsupported("use_sliding_window", remedy));
    }
    let Some(value) = fields.value("layer_types") else {
        return Ok(());
    };
    let Value::Array(layer_types) = value else {
        return Err(fields.wrong_type("layer_types", "a list of strings or null"));
    };
    if let Some(other) = layer_types.iter().find(|kind| *kind != "full_attention") {
        let (key, found) = ("layer_types".to_owned(), shown(other));
        return Err(ConfigError::Unsupported { key, found, remedy });
    }
    if layer_types.len() != num_layers {
        let found = format!("a list of {}", layer_types.len());
        let allowed = format!("as long as num_hidden_layers ({num_layers})");
        return Err(out_of_range("layer_types", found, allowed));
    }
    Ok(())
}

fn default_head_dim(hidden_size: usize, num_attention_heads: usize) -> Result<usize, ConfigError> {
    match hidden_size.checked_rem(num_attention_heads) {
        Some(0) => Ok(hidden_size / num_attention_heads),
        _ => Err(ConfigError::Missing {
            key: "head_dim".to_owned(),
            remedy: "write it down, as hidden_size is no multiple of num_attention_heads",
        }),
    }
}

/// The older spelling has `rope_theta` beside `rope_scaling`, the newer one has both in
/// `rope_parameters`; files that carry the two must agree.
fn parse_rope(fields: &Fields, max_positions: usize) -> Result<RopeConfig, ConfigError> {
    let objects = [
        fields.object("rope_parameters")?,
        fields.object("rope_scaling")?,
    ];
    let mut rope_theta = fields.real("rope_theta")?;
    for object in objects.iter().flatten() {
        let inner = object.real("rope_theta")?;
        if rope_theta.is_some() && inner.is_some() && rope_theta != inner {
            return Err(object.conflict("rope_theta", "rope_theta".to_owned()));
        }
        rope_theta = rope_theta.or(inner);
    }
    let Some(rope_theta) = rope_theta else {
        return Err(fields.missing("rope_theta", "add it (Qwen3 has 1000000)"));
    };
    let yarn = match &objects {
        [Some(first), Some(second)] => {
            let yarn = parse_yarn(first, max_positions)?;
            if yarn != parse_yarn(second, max_positions)? {
                let (first, second) = ("rope_parameters".to_owned(), "rope_scaling".to_owned());
                return Err(ConfigError::Conflict { first, second });
            }
            yarn
        }
        [Some(object), None] | [None, Some(object)] => parse_yarn(object, max_positions)?,
        [None, None] => None,
    };
    Ok(RopeConfig { rope_theta, yarn })
}

fn parse_yarn(object: &Fields, max_positions: usize) -> Result<Option<YarnConfig>, ConfigError> {
    let (new, old) = (object.text("rope_type")?, object.text("type")?);
    if new.is_some() && old.is_some() && new != old {
        return Err(object.conflict("rope_type", object.path("type")));
    }
    let key = if new.is_some() { "rope_type" } else { "type" };
    if object
        .real("partial_rotary_factor")?
        .is_some_and(|factor| factor != 1.0)
    {
        return Err(object.unsupported("partial_rotary_factor", "Qwen3 rotates the whole head"));
    }
    match new.or(old) {
        None | Some("default") => return Ok(None),
        Some("yarn") => {}
        Some(_) => return Err(object.unsupported(key, "it runs \"default\" and \"yarn\"")),
    }
    for key in ["mscale", "mscale_all_dim"] {
        if object.value(key).is_some() {
            return Err(object.unsupported(key, "write the result as attention_factor"));
        }
    }
    let Some(factor) = object.real("factor")? else {
        return Err(object.missing("factor", "YaRN needs it (Qwen3 documents 4.0)"));
    };
    Ok(Some(YarnConfig {
        factor,
        original_max_position_embeddings: object
            .size("original_max_position_embeddings")?
            .unwrap_or(max_positions),
        beta_fast: object.real("beta_fast")?.unwrap_or(32.0),
        beta_slow: object.real("beta_slow")?.unwrap_or(1.0),
        attention_factor: object.real("attention_factor")?,
        truncate: object.flag("truncate")?.unwrap_or(true),
    }))
}

/// One JSON object, read key by key; null counts as absent.
struct Fields<'a> {
    map: &'a Map<String, Value>,
    /// Key under which the object was found; `None` for the whole file.
    object: Option<&'static str>,
}

impl<'a> Fields<'a> {
    fn value(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    fn size(&self, key: &str) -> Result<Option<usize>, ConfigError> {
        let read = |value: &Value| usize::try_from(value.as_u64()?).ok();
        self.read(key, "a whole number", read)
    }

    fn required_size(&self, key: &str) -> Result<usize, ConfigError> {
        let size = self.size(key)?;
        size.ok_or_else(|| self.missing(key, "export or download the configuration again"))
    }

    fn real(&self, key: &str) -> Result<Option<f64>, ConfigError> {
        self.read(key, "a number", Value::as_f64)
    }

    fn flag(&self, key: &str) -> Result<Option<bool>, ConfigError> {
        self.read(key, "true or false", Value::as_bool)
    }

    fn text(&self, key: &str) -> Result<Option<&'a str>, ConfigError> {
        self.read(key, "a string", Value::as_str)
    }

    fn object(&self, key: &'static str) -> Result<Option<Fields<'a>>, ConfigError> {
        let map = self.read(key, "an object or null", Value::as_object)?;
        let object = Some(key);
        Ok(map.map(|map| Fields { map, object }))
    }

    fn token_id(&self, key: &str) -> Result<Option<u32>, ConfigError> {
        self.read(key, "a token id or null", as_u32)
    }

    /// Null, one id, or a list of ids.
    fn token_ids(&self, key: &str) -> Result<Vec<u32>, ConfigError> {
        let ids = |value: &Value| match value {
            Value::Array(values) => values.iter().map(as_u32).collect(),
            value => Some(vec![as_u32(value)?]),
        };
        let ids = self.read(key, "a token id, a list of token ids or null", ids)?;
        Ok(ids.unwrap_or_default())
    }

    fn read<T>(
        &self,
        key: &str,
        expected: &'static str,
        read: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, ConfigError> {
        let Some(value) = self.value(key) else {
            return Ok(None);
        };
        let found = read(value);
        found
            .map(Some)
            .ok_or_else(|| self.wrong_type(key, expected))
    }

    fn path(&self, key: &str) -> String {
        match self.object {
            Some(object) => format!("{object}.{key}"),
            None => key.to_owned(),
        }
    }

    fn missing(&self, key: &str, remedy: &'static str) -> ConfigError {
        let key = self.path(key);
        ConfigError::Missing { key, remedy }
    }

    fn wrong_type(&self, key: &str, expected: &'static str) -> ConfigError {
        let found = shown(self.map.get(key).unwrap_or(&Value::Null));
        let key = self.path(key);
        ConfigError::WrongType {
            key,
            found,
            expected,
        }
    }

    fn unsupported(&self, key: &str, remedy: &'static str) -> ConfigError {
        let found = shown(self.map.get(key).unwrap_or(&Value::Null));
        let key = self.path(key);
        ConfigError::Unsupported { key, found, remedy }
    }

    fn conflict(&self, key: &str, second: String) -> ConfigError {
        let first = self.path(key);
        ConfigError::Conflict { first, second }
    }
}

fn as_u32(value: &Value) -> Option<u32> {
    u32::try_from(value.as_u64()?).ok()
}

/// The value as JSON, cut to what fits into a message.
fn shown(value: &Value) -> String {
    const MAX_CHARS: usize = 60;
    cut_at(&value.to_string(), MAX_CHARS)
}

#[cfg(test)]
mod tests {
    use super::super::tests::{parse, tied, with_yarn, yarn};
    use super::super::{MAX_HIDDEN_SIZE, MAX_VOCAB_SIZE};
    use super::*;
    use serde_json::json;

    /// What transformers 5 writes, with `extra` lines in front.
    fn written(extra: &str, rope_parameters: &str) -> String {
        format!(
            r#"{{ {extra}
            "architectures": ["Qwen3ForCausalLM"], "attention_bias": false,
            "attention_dropout": 0.0, "bos_token_id": null, "dtype": "float32",
            "eos_token_id": null, "hidden_act": "silu",
            "hidden_size": 128, "initializer_range": 0.1,
            "layer_types": ["full_attention", "full_attention"],
            "max_position_embeddings": 256, "max_window_layers": 28, "model_type": "qwen3",
            "num_hidden_layers": 2, "pad_token_id": null, "rms_norm_eps": 1e-06,
            "rope_parameters": {rope_parameters}, "sliding_window": null,
            "use_cache": true, "use_sliding_window": false, "rope_theta": 1000000.0 }}"#
        )
    }

    const DEFAULT_ROPE: &str = r#"{ "rope_theta": 1000000.0, "rope_type": "default" }"#;
    const TIED: &str = r#""vocab_size": 320, "intermediate_size": 256, "head_dim": 32,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": true,"#;

    /// The tied configuration as JSON with some keys replaced; null removes a value.
    fn changed(changes: &[(&str, Value)]) -> String {
        let mut value: Value = serde_json::from_str(&tied().to_json()).unwrap();
        for (key, new) in changes {
            value[*key] = new.clone();
        }
        value.to_string()
    }

    #[test]
    fn reads_what_transformers_writes() {
        assert_eq!(parse(&written(TIED, DEFAULT_ROPE)), Ok(tied()));
        let one_kv_head = r#""vocab_size": 320, "intermediate_size": 256, "head_dim": 64,
            "num_attention_heads": 4, "num_key_value_heads": 1, "tie_word_embeddings": false,"#;
        let untied = Qwen3Config {
            head_dim: 64,
            num_key_value_heads: 1,
            tie_word_embeddings: false,
            ..tied()
        };
        assert_eq!(parse(&written(one_kv_head, DEFAULT_ROPE)), Ok(untied));
        let ragged = r#""vocab_size": 301, "intermediate_size": 200, "head_dim": 16,
            "num_attention_heads": 6, "num_key_value_heads": 3, "tie_word_embeddings": true,"#;
        let ragged_config = parse(&written(ragged, DEFAULT_ROPE)).unwrap();
        assert_eq!(
            (ragged_config.vocab_size, ragged_config.head_dim),
            (301, 16)
        );
        let long = r#"{ "factor": 4.0, "original_max_position_embeddings": 64,
            "rope_theta": 1000000.0, "rope_type": "yarn" }"#;
        assert_eq!(parse(&written(TIED, long)), Ok(with_yarn(yarn())));
    }

    #[test]
    fn reads_the_older_rope_spelling() {
        let plain = changed(&[("rope_theta", json!(5_000_000))]);
        let rope = RopeConfig {
            rope_theta: 5e6,
            yarn: None,
        };
        assert_eq!(parse(&plain), Ok(Qwen3Config { rope, ..tied() }));
        for key in ["type", "rope_type"] {
            let object = json!({ key: "yarn", "factor": 4.0,
                "original_max_position_embeddings": 64 });
            let json = changed(&[("rope_scaling", object)]);
            assert_eq!(parse(&json), Ok(with_yarn(yarn())));
        }
        let unstated = json!({ "type": "yarn", "factor": 2 });
        let config = parse(&changed(&[("rope_scaling", unstated)])).unwrap();
        let original = config.rope.yarn.unwrap().original_max_position_embeddings;
        assert_eq!(original, config.max_position_embeddings);
    }

    #[test]
    fn two_spellings_must_agree() {
        let default = json!({ "rope_type": "default", "rope_theta": 1e6 });
        let long = json!({ "rope_type": "yarn", "factor": 2.0 });
        let both = [("rope_parameters", default), ("rope_scaling", long.clone())];
        assert!(matches!(
            parse(&changed(&both)),
            Err(ConfigError::Conflict { .. })
        ));
        let same = [("rope_parameters", long.clone()), ("rope_scaling", long)];
        assert!(parse(&changed(&same)).is_ok());
        let theta = [("rope_parameters", json!({ "rope_theta": 1e4 }))];
        assert!(matches!(
            parse(&changed(&theta)),
            Err(ConfigError::Conflict { .. })
        ));
        let types = json!({ "rope_type": "yarn", "type": "default", "factor": 2.0 });
        let types = changed(&[("rope_scaling", types)]);
        assert!(matches!(parse(&types), Err(ConfigError::Conflict { .. })));
    }

    #[test]
    fn token_ids_may_be_null_one_or_many() {
        for (json, ids) in [
            (Value::Null, vec![]),
            (json!(7), vec![7]),
            (json!([7, 3]), vec![7, 3]),
        ] {
            let config = parse(&changed(&[("eos_token_id", json)])).unwrap();
            assert_eq!(config.eos_token_ids, ids);
        }
        let config = parse(&changed(&[("bos_token_id", json!(5))])).unwrap();
        assert_eq!(config.bos_token_id, Some(5));
        for bad in [
            json!(-1),
            json!("7"),
            json!([1, null]),
            json!(320),
            json!([1, 400]),
        ] {
            let error = parse(&changed(&[("eos_token_id", bad)])).unwrap_err();
            assert!(error.to_string().contains("eos_token_id"), "{error}");
        }
    }

    #[test]
    fn defaults_are_those_of_the_absent_keys() {
        let absent = [
            ("head_dim", Value::Null),
            ("num_key_value_heads", Value::Null),
            ("tie_word_embeddings", Value::Null),
            ("rms_norm_eps", Value::Null),
            ("hidden_act", Value::Null),
        ];
        let config = parse(&changed(&absent)).unwrap();
        let expected = Qwen3Config {
            num_key_value_heads: 4,
            tie_word_embeddings: false,
            ..tied()
        };
        assert_eq!(config, expected);
        let odd = [("head_dim", Value::Null), ("num_attention_heads", json!(6))];
        let error = parse(&changed(&odd)).unwrap_err();
        assert!(matches!(error, ConfigError::Missing { key, .. } if key == "head_dim"));
    }

    #[test]
    fn other_models_are_refused_by_key() {
        let cases = [
            ("model_type", json!("llama")),
            ("model_type", Value::Null),
            ("architectures", json!(["Qwen3ForSequenceClassification"])),
            ("hidden_act", json!("gelu")),
            ("attention_bias", json!(true)),
            ("use_sliding_window", json!(true)),
            (
                "layer_types",
                json!(["full_attention", "sliding_attention"]),
            ),
            ("layer_types", json!(["full_attention"])),
            ("quantization_config", json!({ "quant_method": "gptq" })),
            (
                "rope_scaling",
                json!({ "rope_type": "llama3", "factor": 8.0 }),
            ),
            ("rope_scaling", json!({ "type": "linear", "factor": 8.0 })),
            ("rope_scaling", json!({ "type": "yarn" })),
            (
                "rope_scaling",
                json!({ "type": "yarn", "factor": 2.0, "mscale": 1.0 }),
            ),
            ("rope_scaling", json!(4.0)),
            ("partial_rotary_factor", json!(0.5)),
            ("rope_theta", Value::Null),
        ];
        for (key, value) in cases {
            let error = parse(&changed(&[(key, value)])).unwrap_err();
            assert!(error.to_string().contains(key), "{key}: {error}");
        }
    }

    #[test]
    fn bad_numbers_are_refused_by_key() {
        let cases = [
            ("vocab_size", json!(0)),
            ("vocab_size", json!(1u64 << 40)),
            ("hidden_size", json!(-128)),
            ("hidden_size", json!(128.5)),
            ("hidden_size", json!("128")),
            ("hidden_size", Value::Null),
            ("num_hidden_layers", json!(1_000_000)),
            ("num_key_value_heads", json!(3)),
            ("head_dim", json!(33)),
            ("rms_norm_eps", json!(0.0)),
            ("rms_norm_eps", json!("1e-6")),
            ("rope_theta", json!(1.0)),
            ("tie_word_embeddings", json!(1)),
        ];
        for (key, value) in cases {
            let error = parse(&changed(&[(key, value)])).unwrap_err();
            assert!(error.to_string().contains(key), "{key}: {error}");
        }
        let huge = Qwen3Config {
            vocab_size: MAX_VOCAB_SIZE,
            hidden_size: MAX_HIDDEN_SIZE,
            tie_word_embeddings: false,
            ..tied()
        };
        assert!(matches!(
            huge.validate(),
            Err(ConfigError::OutOfRange { .. })
        ));
    }

    #[test]
    fn anything_but_an_object_is_refused() {
        assert!(matches!(parse("[1]"), Err(ConfigError::NotAnObject(_))));
        assert!(matches!(parse("{"), Err(ConfigError::Json(_))));
        let long = " ".repeat(MAX_CONFIG_BYTES + 1);
        assert!(matches!(parse(&long), Err(ConfigError::TooLong { .. })));
        // Deeper than serde_json's recursion limit: an error, not a stack overflow.
        assert!(matches!(
            parse(&"[".repeat(100_000)),
            Err(ConfigError::Json(_))
        ));
    }
}
