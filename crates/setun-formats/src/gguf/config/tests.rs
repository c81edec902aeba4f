//! Configurations through the metadata and back, and metadata of other models.

use super::super::tests::{Metadata, Tensor, model_header, model_tensors};
use super::super::{GgufLimits, GgufType, write_header};
use super::*;
use crate::config::tests::{tied, with_yarn, yarn};
use setun_ternary::blocks::BlockType;
use setun_ternary::{Numerics, ScaleRule};

fn metadata(config: &Qwen3Config) -> Metadata {
    metadata_for(config, None, None, None, 1, "test").unwrap()
}

fn header(config: &Qwen3Config, metadata: &Metadata) -> GgufHeader {
    let (bytes, file_len) = model_header(config, metadata);
    GgufHeader::parse(&bytes, file_len, &GgufLimits::default()).unwrap()
}

/// The metadata of the tied model with one entry changed, added or removed.
fn changed(key: &str, value: Option<GgufValue>) -> GgufHeader {
    let config = tied();
    let mut metadata = metadata(&config);
    metadata.retain(|(found, _)| found != key);
    metadata.extend(value.map(|value| (key.to_owned(), value)));
    header(&config, &metadata)
}

#[test]
fn configurations_come_back() {
    let exact = YarnConfig {
        attention_factor: Some(1.2345),
        beta_fast: 31.5,
        beta_slow: 0.1 + 0.2,
        factor: 10.0 / 3.0,
        ..yarn()
    };
    let neutral = YarnConfig {
        attention_factor: Some(default_attention_factor(4.0)),
        ..yarn()
    };
    let configs = [
        tied(),
        with_yarn(yarn()),
        with_yarn(exact),
        with_yarn(neutral),
        Qwen3Config {
            tie_word_embeddings: false,
            bos_token_id: Some(1),
            eos_token_ids: vec![319],
            rms_norm_eps: 0.1 + 0.2,
            ..tied()
        },
        Qwen3Config {
            eos_token_ids: vec![3, 1],
            head_dim: 64,
            num_key_value_heads: 1,
            rope: RopeConfig {
                rope_theta: 5e6 + 0.1,
                yarn: None,
            },
            ..tied()
        },
    ];
    for config in configs {
        let header = header(&config, &metadata(&config));
        assert_eq!(qwen3_config(&header), Ok(config));
    }
}

#[test]
fn metadata_has_the_keys_that_programs_read() {
    let ternary = TernaryInfo {
        group_size: 128,
        scale_rule: ScaleRule::MeanNonzero,
        numerics: Numerics::Bf16,
    };
    let config = with_yarn(yarn());
    let entries = metadata_for(&config, Some(&ternary), None, Some("{{ x }}"), 41, "a name");
    let entries = entries.unwrap();
    let u32 = GgufValue::U32;
    let f32 = GgufValue::F32;
    let text = |text: &str| GgufValue::String(text.to_owned());
    let expected = [
        ("general.architecture", text("qwen3")),
        ("general.name", text("a name")),
        ("general.file_type", u32(41)),
        ("general.quantization_version", u32(2)),
        ("general.alignment", u32(32)),
        ("qwen3.block_count", u32(2)),
        ("qwen3.context_length", u32(256)),
        ("qwen3.embedding_length", u32(128)),
        ("qwen3.feed_forward_length", u32(256)),
        ("qwen3.vocab_size", u32(320)),
        ("qwen3.attention.head_count", u32(4)),
        ("qwen3.attention.head_count_kv", u32(2)),
        ("qwen3.attention.key_length", u32(32)),
        ("qwen3.attention.value_length", u32(32)),
        ("qwen3.rope.dimension_count", u32(32)),
        ("qwen3.attention.layer_norm_rms_epsilon", f32(1e-6)),
        ("qwen3.rope.freq_base", f32(1e6)),
        ("qwen3.rope.scaling.type", text("yarn")),
        ("qwen3.rope.scaling.factor", f32(4.0)),
        ("qwen3.rope.scaling.original_context_length", u32(64)),
        ("qwen3.rope.scaling.yarn_beta_fast", f32(32.0)),
        ("qwen3.rope.scaling.yarn_beta_slow", f32(1.0)),
        ("tokenizer.ggml.model", text("none")),
        ("tokenizer.chat_template", text("{{ x }}")),
        ("setun.group_size", text("128")),
        ("setun.scale_rule", text("mean-nonzero")),
        ("setun.numerics", text("bf16")),
    ];
    let expected = expected.map(|(key, value)| (key.to_owned(), value));
    assert_eq!(entries, expected);
    let header = header(&config, &entries);
    assert_eq!(ternary_info(&header), Ok(Some(ternary)));
    assert_eq!(header.text("tokenizer.chat_template"), Ok(Some("{{ x }}")));
}

#[test]
fn files_of_other_programs_are_read() {
    let plain = changed("setun.nothing", None);
    assert_eq!(ternary_info(&plain), Ok(None));
    for key in [VALUE_LENGTH, ROPE_DIMENSIONS, KEY_LENGTH, VOCAB_SIZE] {
        assert_eq!(qwen3_config(&changed(key, None)), Ok(tied()), "{key}");
    }
    // Converters differ in the kind of whole number.
    for value in [GgufValue::U64(2), GgufValue::I32(2), GgufValue::U8(2)] {
        assert_eq!(qwen3_config(&changed(BLOCK_COUNT, Some(value))), Ok(tied()));
    }
    let scaling = |text: &str| Some(GgufValue::String(text.to_owned()));
    for text in ["none", "linear"] {
        assert_eq!(
            qwen3_config(&changed(SCALING_TYPE, scaling(text))),
            Ok(tied())
        );
    }
    let factor = GgufValue::F32(1.0);
    assert_eq!(
        qwen3_config(&changed(SCALING_FACTOR, Some(factor))),
        Ok(tied())
    );
    let eos = changed(EOS, Some(GgufValue::U32(9)));
    assert_eq!(qwen3_config(&eos).unwrap().eos_token_ids, [9]);
}

#[test]
fn llama_cpp_applies_the_attention_factor_on_top() {
    let config = with_yarn(YarnConfig {
        attention_factor: Some(1.0),
        ..yarn()
    });
    let mut metadata = metadata(&config);
    let on_top = (1.0 / (0.1 * 4.0f64.ln() + 1.0)) as f32;
    assert!(metadata.contains(&(ATTN_FACTOR.to_owned(), GgufValue::F32(on_top))));
    // Without our own key it is what the f32 says.
    metadata.retain(|(key, _)| key != ATTENTION_FACTOR);
    let found = qwen3_config(&header(&config, &metadata)).unwrap();
    let factor = found.rope.yarn.unwrap().attention_factor.unwrap();
    assert!((factor - 1.0).abs() < 1e-7, "{factor}");
}

#[test]
fn other_models_are_refused_by_key() {
    let text = |text: &str| Some(GgufValue::String(text.to_owned()));
    let u32 = |n| Some(GgufValue::U32(n));
    let f32 = |x| Some(GgufValue::F32(x));
    let cases: [(&str, Option<GgufValue>, &str); 25] = [
        ("general.architecture", None, "is missing"),
        ("general.architecture", text("llama"), "\"llama\""),
        ("general.architecture", u32(3), "expected a string"),
        ("prism.hadamard.version", u32(1), "rotated"),
        (EXPERT_COUNT, u32(8), "dense"),
        (SLIDING_WINDOW, u32(4096), "dense"),
        (BLOCK_COUNT, None, "is missing"),
        (BLOCK_COUNT, text("2"), "one whole number"),
        (BLOCK_COUNT, u32(0), "num_hidden_layers"),
        (BLOCK_COUNT, u32(u32::MAX), "num_hidden_layers"),
        (
            BLOCK_COUNT,
            u32(1),
            "a layer that block_count does not have",
        ),
        (BLOCK_COUNT, u32(3), "`blk.2.attn_norm.weight` is missing"),
        (HEAD_COUNT, u32(8), "`blk.0.attn_q.weight`"),
        (HEAD_COUNT, u32(0), "num_attention_heads"),
        (HEAD_COUNT_KV, u32(3), "num_key_value_heads"),
        (
            EMBEDDING_LENGTH,
            Some(GgufValue::I64(-1)),
            "one whole number",
        ),
        (VALUE_LENGTH, u32(64), "head_dim"),
        (ROPE_DIMENSIONS, u32(16), "head_dim"),
        (FREQ_BASE, f32(f32::NAN), "rope_theta"),
        (FREQ_BASE, None, "is missing"),
        (RMS_EPSILON, Some(GgufValue::F64(1e-6)), "an f32"),
        (SCALING_TYPE, text("longrope"), "longrope"),
        (SCALING_FACTOR, f32(4.0), "rope scaling"),
        (EOS, u32(320), "eos_token_id"),
        (EOS_LIST, text("[1,"), "a list of token ids"),
    ];
    for (key, value, expected) in cases {
        let error = qwen3_config(&changed(key, value)).unwrap_err().to_string();
        assert!(error.contains(expected), "{key}: {error}");
    }
}

#[test]
fn bad_yarn_is_refused() {
    let config = with_yarn(yarn());
    let f32 = GgufValue::F32;
    for (key, value, expected) in [
        (SCALING_FACTOR, None, "is missing"),
        (SCALING_FACTOR, Some(f32(0.5)), "factor"),
        (BETA_FAST, Some(f32(0.5)), "beta_fast"),
        (ORIGINAL_CONTEXT, Some(GgufValue::U32(0)), "original_max"),
        (ATTN_FACTOR, Some(f32(-1.0)), "attention_factor"),
        (NEUTRAL[0].0, Some(f32(0.5)), "attn_factor"),
        (NEUTRAL[2].0, Some(f32(0.1)), "attn_factor"),
    ] {
        let mut metadata = metadata(&config);
        metadata.retain(|(found, _)| found != key);
        metadata.extend(value.map(|value| (key.to_owned(), value)));
        let error = qwen3_config(&header(&config, &metadata)).unwrap_err();
        assert!(error.to_string().contains(expected), "{key}: {error}");
    }
    let config = with_yarn(YarnConfig {
        truncate: false,
        ..yarn()
    });
    let error = metadata_for(&config, None, None, None, 1, "x").unwrap_err();
    assert!(error.to_string().contains("truncate"), "{error}");
}

#[test]
fn tensors_must_be_those_of_the_configuration() {
    let config = tied();
    let metadata = metadata(&config);
    let error = |change: &dyn Fn(&mut Vec<Tensor>)| {
        let mut tensors = model_tensors(&config, GgufType::Bf16);
        change(&mut tensors);
        let mut bytes = Vec::new();
        let layout = write_header(&mut bytes, &metadata, &tensors).unwrap();
        let limits = GgufLimits::default();
        let header = GgufHeader::parse(&bytes, layout.file_len, &limits).unwrap();
        qwen3_config(&header).map_err(|error| error.to_string())
    };
    assert_eq!(error(&|_| ()), Ok(config.clone()));
    let missing = error(&|tensors| drop(tensors.remove(5)));
    assert!(missing.unwrap_err().contains("`blk.0.attn_q_norm.weight`"));
    let missing = error(&|tensors| drop(tensors.remove(0)));
    assert!(missing.unwrap_err().contains("`token_embd.weight`"));
    let shape = error(&|tensors| tensors[9].1.reverse());
    assert!(shape.unwrap_err().contains("where [256, 128] belongs"));
    let vector = error(&|tensors| tensors[0].1 = vec![320 * 128]);
    assert!(vector.is_err());
    let extra = error(&|tensors| {
        tensors.push(("rope_freqs.weight".to_owned(), vec![8], GgufType::F32));
    });
    assert!(extra.unwrap_err().contains("belongs to no parameter"));
    let ternary = error(&|tensors| tensors[1].2 = GgufType::Block(BlockType::Q2_0));
    assert!(ternary.unwrap_err().contains("Q2_0 [128]"));
    // An output.weight is what makes a model untied.
    let untied = error(&|tensors| {
        tensors.push(("output.weight".to_owned(), vec![320, 128], GgufType::F16));
    });
    assert!(!untied.unwrap().tie_word_embeddings);
}

#[test]
fn half_of_the_ternary_keys_is_refused() {
    let value = GgufValue::String("128".to_owned());
    let error = ternary_info(&changed("setun.group_size", Some(value))).unwrap_err();
    assert!(error.to_string().contains("setun.scale_rule"), "{error}");
    let error = ternary_info(&changed("setun.numerics", Some(GgufValue::U32(1)))).unwrap_err();
    assert!(error.to_string().contains("expected a string"), "{error}");
}
