//! `config.json`: keys that are wrong, missing, twice, or of another model.

use crate::exhibit::{Exhibit, Item};
use crate::specimen::config_json;
use serde_json::{Value, json};

/// The configuration with some keys replaced.
fn changed(changes: &[(&str, Value)]) -> Vec<u8> {
    let mut config = config_json();
    for (key, value) in changes {
        config[*key] = value.clone();
    }
    config.to_string().into_bytes()
}

/// The configuration without a key.
fn without(key: &str) -> Vec<u8> {
    let mut config = config_json();
    config.as_object_mut().expect("an object").remove(key);
    config.to_string().into_bytes()
}

/// The configuration as text, with `from` replaced by `to`.
fn replaced(from: &str, to: &str) -> Vec<u8> {
    let text = config_json().to_string();
    assert!(text.contains(from), "{from} is not in {text}");
    text.replacen(from, to, 1).into_bytes()
}

fn rope(object: Value) -> Vec<u8> {
    changed(&[("rope_scaling", object)])
}

pub fn good() -> Vec<Item> {
    let yarn =
        json!({ "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16 });
    let bytes = [
        changed(&[]),
        rope(yarn.clone()),
        changed(&[("eos_token_id", json!([0, 1])), ("bos_token_id", json!(2))]),
        changed(&[("num_experts", json!(0)), ("sliding_window", json!(4096))]),
    ];
    bytes.into_iter().map(Item::Config).collect()
}

pub fn exhibits() -> Vec<Exhibit> {
    let mut all = texts();
    all.extend(other_models());
    all.extend(sizes());
    all.extend(numbers());
    all.extend(ropes());
    all.extend(tokens());
    all
}

fn exhibit(
    name: &'static str,
    wrong: &'static str,
    words: &'static [&'static str],
    bytes: Vec<u8>,
) -> Exhibit {
    Exhibit::new(name, wrong, words, Item::Config(bytes))
}

/// One key with one bad value.
fn key(name: &'static str, words: &'static [&'static str], key: &str, value: Value) -> Exhibit {
    exhibit(
        name,
        "a value that cannot be",
        words,
        changed(&[(key, value)]),
    )
}

fn texts() -> Vec<Exhibit> {
    let good = changed(&[]);
    let deep = |open: &str| {
        let bomb = open.repeat(100_000);
        changed(&[("ignored", json!("BOMB"))])
            .into_iter()
            .map(char::from)
            .collect::<String>()
            .replace("\"BOMB\"", &bomb)
            .into_bytes()
    };
    vec![
        exhibit(
            "empty",
            "no bytes",
            &["not valid JSON", "line 1"],
            Vec::new(),
        ),
        exhibit(
            "cut",
            "the second half is gone",
            &["not valid JSON", "line 1"],
            good[..good.len() / 2].to_vec(),
        ),
        exhibit(
            "trailing",
            "a word behind the object",
            &["trailing", "line 1"],
            [&good[..], b"x"].concat(),
        ),
        exhibit("list", "a list", &["a JSON object", "[1]"], b"[1]".to_vec()),
        exhibit("null", "null", &["a JSON object", "null"], b"null".to_vec()),
        exhibit(
            "number",
            "a number",
            &["a JSON object", "42"],
            b"42".to_vec(),
        ),
        exhibit(
            "python",
            "a Python dict",
            &["line 1 column 2"],
            b"{'model_type': 'qwen3'}".to_vec(),
        ),
        exhibit(
            "comment",
            "a comment",
            &["line 1 column"],
            replaced("{", "{ // sizes\n"),
        ),
        exhibit(
            "trailing-comma",
            "a comma before the end",
            &["trailing comma"],
            {
                let text = String::from_utf8(good.clone()).expect("JSON is UTF-8");
                let end = text.rfind('}').expect("an object");
                format!("{},}}", &text[..end]).into_bytes()
            },
        ),
        exhibit(
            "bad-utf8",
            "a text that is not UTF-8",
            &["not valid JSON"],
            {
                let mut bytes = replaced("\"silu\"", "\"s?lu\"");
                let at = bytes
                    .iter()
                    .position(|&b| b == b'?')
                    .expect("it was put there");
                bytes[at] = 0xff;
                bytes
            },
        ),
        exhibit(
            "utf16",
            "UTF-16",
            &["not valid JSON"],
            good.iter().flat_map(|&b| [b, 0]).collect(),
        ),
        exhibit("nul", "zeros for a file", &["not valid JSON"], vec![0; 100]),
        exhibit(
            "too-long",
            "over a megabyte of spaces",
            &["too long"],
            vec![b' '; (1 << 20) + 1],
        ),
        exhibit(
            "list-bomb",
            "a hundred thousand nested lists",
            &["recursion limit"],
            deep("["),
        ),
        exhibit(
            "object-bomb",
            "nested objects",
            &["recursion limit"],
            deep("{\"a\":"),
        ),
        exhibit(
            "same-key",
            "a size twice",
            &["\"hidden_size\" occurs twice"],
            replaced("{", "{\"hidden_size\":8,"),
        ),
        exhibit(
            "same-nested-key",
            "a factor twice",
            &["\"factor\" occurs twice"],
            {
                let twice = r#""rope_scaling":{"type":"yarn","factor":2.0,"factor":4.0}"#;
                replaced("\"rope_scaling\":null", twice)
            },
        ),
        exhibit(
            "nan",
            "NaN",
            &["not valid JSON", "line 1 column"],
            replaced("\"rope_theta\":1000000.0", "\"rope_theta\":NaN"),
        ),
        exhibit(
            "infinity",
            "Infinity",
            &["not valid JSON", "line 1 column"],
            replaced("\"rope_theta\":1000000.0", "\"rope_theta\":Infinity"),
        ),
        exhibit(
            "1e999",
            "a number over the largest",
            &["out of range", "line 1 column"],
            replaced("\"rope_theta\":1000000.0", "\"rope_theta\":1e999"),
        ),
    ]
}

fn other_models() -> Vec<Exhibit> {
    let moe = changed(&[
        ("model_type", json!("qwen3_moe")),
        ("num_experts", json!(128)),
    ]);
    vec![
        exhibit(
            "no-model-type",
            "no model type",
            &["`model_type` is missing"],
            without("model_type"),
        ),
        key(
            "llama",
            &["`model_type`", "llama"],
            "model_type",
            json!("llama"),
        ),
        key(
            "qwen2",
            &["`model_type`", "qwen2"],
            "model_type",
            json!("qwen2"),
        ),
        exhibit(
            "moe",
            "a mixture of experts",
            &["`model_type`", "qwen3_moe"],
            moe,
        ),
        key(
            "experts",
            &["`num_experts`", "dense"],
            "num_experts",
            json!(8),
        ),
        key(
            "local-experts",
            &["`num_local_experts`"],
            "num_local_experts",
            json!(4),
        ),
        key(
            "type-is-a-list",
            &["`model_type`", "a string"],
            "model_type",
            json!(["qwen3"]),
        ),
        key(
            "classifier",
            &["`architectures`"],
            "architectures",
            json!(["Qwen3ForTokenClassification"]),
        ),
        key(
            "no-architecture",
            &["`architectures`"],
            "architectures",
            json!([]),
        ),
        key(
            "architecture-text",
            &["`architectures`", "list"],
            "architectures",
            json!("Qwen3MoeForCausalLM"),
        ),
        key(
            "gelu",
            &["`hidden_act`", "gelu"],
            "hidden_act",
            json!("gelu"),
        ),
        key(
            "biases",
            &["`attention_bias`", "biases"],
            "attention_bias",
            json!(true),
        ),
        key(
            "mlp-biases",
            &["`mlp_bias`", "biases"],
            "mlp_bias",
            json!(true),
        ),
        key(
            "bias-is-text",
            &["`attention_bias`", "true or false"],
            "attention_bias",
            json!("no"),
        ),
        key(
            "sliding",
            &["`use_sliding_window`"],
            "use_sliding_window",
            json!(true),
        ),
        key(
            "sliding-layer",
            &["`layer_types`", "sliding"],
            "layer_types",
            json!(["sliding_attention"]),
        ),
        key(
            "layer-types-long",
            &["`layer_types`", "num_hidden_layers"],
            "layer_types",
            json!(["full_attention", "full_attention"]),
        ),
        key(
            "layer-types-text",
            &["`layer_types`"],
            "layer_types",
            json!("full_attention"),
        ),
        key(
            "partial-rotary",
            &["`partial_rotary_factor`"],
            "partial_rotary_factor",
            json!(0.5),
        ),
    ]
}

fn sizes() -> Vec<Exhibit> {
    let no_head_dim = {
        let mut config = config_json();
        config["num_attention_heads"] = json!(3);
        config
            .as_object_mut()
            .expect("an object")
            .remove("head_dim");
        config.to_string().into_bytes()
    };
    let too_many = changed(&[
        ("vocab_size", json!(1 << 24)),
        ("hidden_size", json!(1 << 17)),
        ("eos_token_id", json!(0)),
    ]);
    vec![
        exhibit(
            "no-hidden-size",
            "no width",
            &["`hidden_size` is missing"],
            without("hidden_size"),
        ),
        exhibit(
            "no-vocab-size",
            "no vocabulary",
            &["`vocab_size` is missing"],
            without("vocab_size"),
        ),
        exhibit(
            "no-layers",
            "no depth",
            &["`num_hidden_layers` is missing"],
            without("num_hidden_layers"),
        ),
        exhibit(
            "no-context",
            "no context",
            &["`max_position_embeddings` is missing"],
            without("max_position_embeddings"),
        ),
        exhibit(
            "no-inner",
            "no inner width",
            &["`intermediate_size` is missing"],
            without("intermediate_size"),
        ),
        exhibit(
            "no-heads",
            "no heads",
            &["`num_attention_heads` is missing"],
            without("num_attention_heads"),
        ),
        key("zero-vocab", &["`vocab_size` is 0"], "vocab_size", json!(0)),
        key(
            "zero-hidden",
            &["`hidden_size` is 0"],
            "hidden_size",
            json!(0),
        ),
        key(
            "zero-layers",
            &["`num_hidden_layers` is 0"],
            "num_hidden_layers",
            json!(0),
        ),
        key(
            "zero-heads",
            &["`num_attention_heads` is 0"],
            "num_attention_heads",
            json!(0),
        ),
        key(
            "zero-kv-heads",
            &["`num_key_value_heads` is 0"],
            "num_key_value_heads",
            json!(0),
        ),
        key("zero-head-dim", &["`head_dim` is 0"], "head_dim", json!(0)),
        key(
            "zero-context",
            &["`max_position_embeddings` is 0"],
            "max_position_embeddings",
            json!(0),
        ),
        key(
            "negative-layers",
            &["`num_hidden_layers` is -1"],
            "num_hidden_layers",
            json!(-1),
        ),
        key(
            "fraction-hidden",
            &["`hidden_size` is 8.5", "whole"],
            "hidden_size",
            json!(8.5),
        ),
        key(
            "float-hidden",
            &["`hidden_size` is 8.0", "whole"],
            "hidden_size",
            json!(8.0),
        ),
        key(
            "text-hidden",
            &["`hidden_size` is \"8\""],
            "hidden_size",
            json!("8"),
        ),
        key(
            "null-hidden",
            &["`hidden_size` is missing"],
            "hidden_size",
            json!(null),
        ),
        key(
            "list-hidden",
            &["`hidden_size` is [8]"],
            "hidden_size",
            json!([8]),
        ),
        key(
            "huge-vocab",
            &["`vocab_size`", "1 to"],
            "vocab_size",
            json!(1u64 << 40),
        ),
        key(
            "huge-hidden",
            &["`hidden_size`", "1 to"],
            "hidden_size",
            json!(1u64 << 60),
        ),
        key(
            "hidden-2-64-minus-1",
            &["`hidden_size`"],
            "hidden_size",
            json!(u64::MAX),
        ),
        key(
            "huge-layers",
            &["`num_hidden_layers`"],
            "num_hidden_layers",
            json!(1_000_000),
        ),
        key(
            "huge-context",
            &["`max_position_embeddings`"],
            "max_position_embeddings",
            json!(1u64 << 32),
        ),
        key(
            "heads-not-shared",
            &["`num_key_value_heads` is 3"],
            "num_key_value_heads",
            json!(3),
        ),
        key(
            "more-kv-heads",
            &["`num_key_value_heads` is 4"],
            "num_key_value_heads",
            json!(4),
        ),
        key(
            "odd-head-dim",
            &["`head_dim` is 5", "even"],
            "head_dim",
            json!(5),
        ),
        exhibit(
            "head-dim-unclear",
            "a width that heads do not divide",
            &["`head_dim` is missing"],
            no_head_dim,
        ),
        exhibit(
            "too-many-weights",
            "every size in range, all too much",
            &["parameters"],
            too_many,
        ),
    ]
}

fn numbers() -> Vec<Exhibit> {
    vec![
        key(
            "zero-eps",
            &["`rms_norm_eps` is 0"],
            "rms_norm_eps",
            json!(0.0),
        ),
        key(
            "negative-eps",
            &["`rms_norm_eps` is -0.1"],
            "rms_norm_eps",
            json!(-0.1),
        ),
        key(
            "eps-of-one",
            &["`rms_norm_eps` is 1"],
            "rms_norm_eps",
            json!(1.0),
        ),
        key(
            "text-eps",
            &["`rms_norm_eps`", "a number"],
            "rms_norm_eps",
            json!("1e-6"),
        ),
        key(
            "tied-number",
            &["`tie_word_embeddings`"],
            "tie_word_embeddings",
            json!(1),
        ),
        key(
            "zero-theta",
            &["`rope_theta` is 0"],
            "rope_theta",
            json!(0.0),
        ),
        key(
            "theta-of-one",
            &["`rope_theta` is 1"],
            "rope_theta",
            json!(1.0),
        ),
        key(
            "negative-theta",
            &["`rope_theta` is -10000"],
            "rope_theta",
            json!(-1e4),
        ),
        exhibit(
            "no-theta",
            "no base",
            &["`rope_theta` is missing"],
            without("rope_theta"),
        ),
    ]
}

fn ropes() -> Vec<Exhibit> {
    let yarn = |key: &str, value: Value| {
        let mut object = json!({ "rope_type": "yarn", "factor": 4.0 });
        object[key] = value;
        rope(object)
    };
    let both = changed(&[
        ("rope_scaling", json!({ "type": "yarn", "factor": 2.0 })),
        (
            "rope_parameters",
            json!({ "rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6 }),
        ),
    ]);
    let thetas = changed(&[("rope_parameters", json!({ "rope_theta": 1e4 }))]);
    let types = json!({ "rope_type": "yarn", "type": "default", "factor": 2.0 });
    let linear = json!({ "type": "linear", "factor": 2.0 });
    vec![
        exhibit(
            "rope-number",
            "rope scaling that is a number",
            &["`rope_scaling` is 4"],
            rope(json!(4.0)),
        ),
        exhibit(
            "linear",
            "a rope type of others",
            &["`rope_scaling.type`", "linear"],
            rope(linear),
        ),
        exhibit(
            "dynamic",
            "another rope type",
            &["`rope_scaling.rope_type`", "dynamic"],
            rope(json!({ "rope_type": "dynamic", "factor": 2.0 })),
        ),
        exhibit(
            "llama3",
            "a third rope type",
            &["`rope_scaling.rope_type`", "llama3"],
            rope(json!({ "rope_type": "llama3", "factor": 8.0 })),
        ),
        exhibit(
            "yarn-alone",
            "YaRN without a factor",
            &["`rope_scaling.factor` is missing"],
            rope(json!({ "rope_type": "yarn" })),
        ),
        exhibit(
            "yarn-shrinks",
            "a factor below 1",
            &["`factor` is 0.5"],
            yarn("factor", json!(0.5)),
        ),
        exhibit(
            "yarn-zero",
            "a factor of 0",
            &["`factor` is 0"],
            yarn("factor", json!(0.0)),
        ),
        exhibit(
            "yarn-text",
            "a factor that is a text",
            &["`rope_scaling.factor`"],
            yarn("factor", json!("4")),
        ),
        exhibit(
            "yarn-no-origin",
            "an original context of 0",
            &["`original_max_position"],
            yarn("original_max_position_embeddings", json!(0)),
        ),
        exhibit(
            "yarn-far-origin",
            "a huge original context",
            &["`original_max_position"],
            yarn("original_max_position_embeddings", json!(1u64 << 40)),
        ),
        exhibit(
            "yarn-slow",
            "a slow end of 0",
            &["`beta_slow`"],
            yarn("beta_slow", json!(0.0)),
        ),
        exhibit(
            "yarn-fast",
            "ends in reverse",
            &["`beta_fast`"],
            yarn("beta_fast", json!(0.5)),
        ),
        exhibit(
            "yarn-attention",
            "a scale of 0",
            &["`attention_factor`"],
            yarn("attention_factor", json!(0.0)),
        ),
        exhibit(
            "yarn-truncate",
            "a flag that is a number",
            &["`rope_scaling.truncate`"],
            yarn("truncate", json!(1)),
        ),
        exhibit(
            "yarn-mscale",
            "a setting of another model",
            &["`rope_scaling.mscale`"],
            yarn("mscale", json!(1.0)),
        ),
        exhibit(
            "yarn-partial",
            "part of a head",
            &["`rope_scaling.partial_rotary_factor`"],
            yarn("partial_rotary_factor", json!(0.25)),
        ),
        exhibit(
            "two-ropes",
            "two spellings that differ",
            &["rope_parameters", "disagree"],
            both,
        ),
        exhibit(
            "two-thetas",
            "two bases that differ",
            &["rope_theta", "disagree"],
            thetas,
        ),
        exhibit(
            "two-types",
            "two types that differ",
            &["rope_scaling.type", "disagree"],
            rope(types),
        ),
    ]
}

fn tokens() -> Vec<Exhibit> {
    vec![
        key(
            "eos-outside",
            &["`eos_token_id` is 280"],
            "eos_token_id",
            json!(280),
        ),
        key(
            "eos-in-list",
            &["`eos_token_id` is 999"],
            "eos_token_id",
            json!([0, 999]),
        ),
        key(
            "eos-negative",
            &["`eos_token_id` is -1"],
            "eos_token_id",
            json!(-1),
        ),
        key(
            "eos-text",
            &["`eos_token_id`", "<|endoftext|>"],
            "eos_token_id",
            json!("<|endoftext|>"),
        ),
        key(
            "eos-nested",
            &["`eos_token_id` is [[0]]"],
            "eos_token_id",
            json!([[0]]),
        ),
        key(
            "eos-2-32",
            &["`eos_token_id` is 4294967296"],
            "eos_token_id",
            json!(1u64 << 32),
        ),
        key(
            "bos-outside",
            &["`bos_token_id` is 5000"],
            "bos_token_id",
            json!(5000),
        ),
        key(
            "bos-list",
            &["`bos_token_id` is [0]"],
            "bos_token_id",
            json!([0]),
        ),
    ]
}
