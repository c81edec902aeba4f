//! Packed files: safetensors with trits, scales and metadata.

use crate::exhibit::{Exhibit, Item};
use crate::specimen::{DOWN, EMBED, NORM, Parts, config_json, half};
use half::f16;
use serde_json::{Value, json};
use setun_formats::tensors::Dtype;

const TRITS: &str = "model.embed_tokens.weight.trits";
const SCALES: &str = "model.embed_tokens.weight.scales";

/// The packed file after a change.
fn changed(change: impl FnOnce(&mut Parts)) -> Vec<u8> {
    let mut parts = Parts::packed();
    change(&mut parts);
    parts.bytes()
}

fn metadata(key: &str, value: &str) -> Vec<u8> {
    changed(|parts| drop(parts.metadata.insert(key.to_owned(), value.to_owned())))
}

fn without_metadata(key: &str) -> Vec<u8> {
    changed(|parts| drop(parts.metadata.remove(key)))
}

/// Another configuration in the metadata.
fn config(key: &str, value: Value) -> Vec<u8> {
    let mut config = config_json();
    config[key] = value;
    metadata("config", &config.to_string())
}

/// Another scale in row 3 of the embedding, which has one group to a row.
fn scale(bits: [u8; 2]) -> Vec<u8> {
    changed(|parts| parts.poke(SCALES, 2 * 3, &bits))
}

fn norm(value: f32) -> Vec<u8> {
    changed(|parts| parts.poke(NORM, 4 * 2, &value.to_le_bytes()))
}

pub fn good() -> Vec<Item> {
    let bytes = [
        changed(|_| {}),
        scale(half(0.0)),
        scale(half(65_280.0)),
        norm(-3.0),
        metadata("note", "keys of others are fine"),
    ];
    bytes.into_iter().map(Item::Packed).collect()
}

pub fn exhibits() -> Vec<Exhibit> {
    let mut all = containers();
    all.extend(metadata_keys());
    all.extend(configs());
    all.extend(tensors());
    all.extend(values());
    all
}

fn exhibit(
    name: &'static str,
    wrong: &'static str,
    words: &'static [&'static str],
    bytes: Vec<u8>,
) -> Exhibit {
    Exhibit::new(name, wrong, words, Item::Packed(bytes))
}

fn containers() -> Vec<Exhibit> {
    let good = changed(|_| {});
    vec![
        exhibit("empty", "no bytes", &["0 bytes"], Vec::new()),
        exhibit(
            "cut",
            "the second half is gone",
            &["end at byte", "follow"],
            good[..good.len() * 3 / 4].to_vec(),
        ),
        exhibit(
            "trailing",
            "a byte too many",
            &["end at byte", "follow"],
            [&good[..], &[0]].concat(),
        ),
        exhibit(
            "not-packed",
            "plain weights",
            &["`format` is missing"],
            changed(|parts| *parts = Parts::dense()),
        ),
        exhibit(
            "no-tensors",
            "a header without tensors",
            &[EMBED, "missing"],
            changed(|parts| {
                parts.infos.clear();
                parts.payloads.clear();
            }),
        ),
    ]
}

fn metadata_keys() -> Vec<Exhibit> {
    vec![
        exhibit(
            "no-format",
            "no format",
            &["`format` is missing"],
            without_metadata("format"),
        ),
        exhibit(
            "no-version",
            "no version",
            &["`version` is missing"],
            without_metadata("version"),
        ),
        exhibit(
            "no-config",
            "no configuration",
            &["`config` is missing"],
            without_metadata("config"),
        ),
        exhibit(
            "no-group-size",
            "no group size",
            &["`group_size` is missing"],
            without_metadata("group_size"),
        ),
        exhibit(
            "no-scale-rule",
            "no rule",
            &["`scale_rule` is missing"],
            without_metadata("scale_rule"),
        ),
        exhibit(
            "no-numerics",
            "no numerics",
            &["`numerics` is missing"],
            without_metadata("numerics"),
        ),
        exhibit(
            "other-format",
            "a format of others",
            &["`format`", "gptq"],
            metadata("format", "gptq"),
        ),
        exhibit(
            "future",
            "version 2",
            &["`version` is \"2\""],
            metadata("version", "2"),
        ),
        exhibit(
            "version-text",
            "version one",
            &["`version` is \"one\""],
            metadata("version", "one"),
        ),
        exhibit(
            "group-zero",
            "groups of 0",
            &["`group_size` is \"0\""],
            metadata("group_size", "0"),
        ),
        exhibit(
            "group-negative",
            "groups of -8",
            &["`group_size`"],
            metadata("group_size", "-8"),
        ),
        exhibit(
            "group-fraction",
            "groups of 8.0",
            &["`group_size`"],
            metadata("group_size", "8.0"),
        ),
        exhibit(
            "group-huge",
            "groups of 2^60",
            &["`group_size`"],
            metadata("group_size", "1152921504606846976"),
        ),
        exhibit(
            "group-over-the-cap",
            "groups of 65537",
            &["`group_size`"],
            metadata("group_size", "65537"),
        ),
        exhibit(
            "group-of-others",
            "groups of 4",
            &["embed_tokens.weight.trits", "[280, 2]"],
            metadata("group_size", "5"),
        ),
        exhibit(
            "rule-unknown",
            "a rule of others",
            &["`scale_rule` is \"median\""],
            metadata("scale_rule", "median"),
        ),
        exhibit(
            "numerics-unknown",
            "numerics of others",
            &["`numerics` is \"fp8\""],
            metadata("numerics", "fp8"),
        ),
        exhibit(
            "numerics-upper",
            "numerics in capitals",
            &["`numerics` is \"INT8\""],
            metadata("numerics", "INT8"),
        ),
    ]
}

fn configs() -> Vec<Exhibit> {
    vec![
        exhibit(
            "config-not-json",
            "no JSON",
            &["`config`", "JSON"],
            metadata("config", "{"),
        ),
        exhibit(
            "config-llama",
            "another model",
            &["`config`", "`model_type`"],
            config("model_type", json!("llama")),
        ),
        exhibit(
            "config-zero",
            "no layers",
            &["`config`", "`num_hidden_layers` is 0"],
            config("num_hidden_layers", json!(0)),
        ),
        exhibit(
            "config-wider",
            "a wider model",
            &["embed_tokens.weight.trits", "[280, 4]"],
            config("hidden_size", json!(16)),
        ),
        exhibit(
            "config-deeper",
            "one layer more",
            &["model.layers.1", "missing"],
            config("num_hidden_layers", json!(2)),
        ),
        exhibit(
            "config-deepest",
            "1024 layers",
            &["model.layers.1.", "missing"],
            config("num_hidden_layers", json!(1024)),
        ),
        exhibit(
            "config-untied",
            "a head that is not there",
            &["lm_head.weight.trits", "missing"],
            config("tie_word_embeddings", json!(false)),
        ),
        exhibit(
            "config-more-words",
            "one word more",
            &["embed_tokens.weight.trits", "[281, 2]"],
            config("vocab_size", json!(281)),
        ),
        exhibit(
            "config-of-2-40",
            "as many weights as may be",
            &["embed_tokens.weight.trits"],
            config("vocab_size", json!(1 << 24)),
        ),
    ]
}

fn tensors() -> Vec<Exhibit> {
    vec![
        exhibit(
            "no-trits",
            "no trits",
            &[TRITS, "missing"],
            changed(|parts| parts.remove(TRITS)),
        ),
        exhibit(
            "no-scales",
            "no scales",
            &[SCALES, "missing"],
            changed(|parts| parts.remove(SCALES)),
        ),
        exhibit(
            "no-norm",
            "no norm",
            &[NORM, "missing"],
            changed(|parts| parts.remove(NORM)),
        ),
        exhibit(
            "trits-i8",
            "trits of another type",
            &[TRITS, "I8 [280, 2]"],
            changed(|parts| parts.retype(TRITS, Dtype::I8, &[280, 2])),
        ),
        exhibit(
            "scales-f32",
            "scales of another type",
            &[SCALES, "F32 [280, 1]"],
            changed(|parts| parts.retype(SCALES, Dtype::F32, &[280, 1])),
        ),
        exhibit(
            "scales-bf16",
            "scales of the other half type",
            &[SCALES, "BF16 [280, 1]"],
            changed(|parts| parts.retype(SCALES, Dtype::BF16, &[280, 1])),
        ),
        exhibit(
            "norm-f16",
            "a norm of another type",
            &[NORM, "F16 [8]"],
            changed(|parts| parts.retype(NORM, Dtype::F16, &[8])),
        ),
        exhibit(
            "trits-flat",
            "trits in one row",
            &[TRITS, "U8 [560]"],
            changed(|parts| parts.retype(TRITS, Dtype::U8, &[560])),
        ),
        exhibit(
            "trits-turned",
            "rows for columns",
            &[TRITS, "U8 [2, 280]"],
            changed(|parts| parts.retype(TRITS, Dtype::U8, &[2, 280])),
        ),
        exhibit(
            "row-short",
            "a row too few",
            &[TRITS, "U8 [279, 2]"],
            changed(|parts| parts.retype(TRITS, Dtype::U8, &[279, 2])),
        ),
        exhibit(
            "scale-per-tensor",
            "one scale for all",
            &[SCALES, "F16 [1, 1]"],
            changed(|parts| parts.retype(SCALES, Dtype::F16, &[1, 1])),
        ),
        exhibit(
            "extra",
            "a tensor of no one",
            &["`extra`", "no parameter"],
            changed(|parts| parts.add("extra", Dtype::U8, &[1], vec![0])),
        ),
        exhibit(
            "float-too",
            "the weights as floats as well",
            &[EMBED, "no parameter"],
            changed(|parts| parts.add(EMBED, Dtype::F32, &[280, 8], vec![0; 280 * 8 * 4])),
        ),
        exhibit("bias", "a bias", &["q_proj.bias", "no parameter"], {
            let name = "model.layers.0.self_attn.q_proj.bias";
            changed(|parts| parts.add(name, Dtype::F32, &[8], vec![0; 32]))
        }),
    ]
}

fn values() -> Vec<Exhibit> {
    let down = "model.layers.0.mlp.down_proj.weight.trits";
    vec![
        exhibit(
            "code-3",
            "a code that is no trit",
            &[EMBED, "row 3", "column 5"],
            changed(|parts| parts.poke(TRITS, 2 * 3 + 1, &[0b0101_1101])),
        ),
        exhibit(
            "code-3-last",
            "the last code of all",
            &[DOWN, "row 7", "column 15"],
            changed(|parts| parts.poke(down, 8 * 4 - 1, &[0b1101_0101])),
        ),
        exhibit(
            "all-ones",
            "a row of set bits",
            &[EMBED, "row 0", "column 0"],
            changed(|parts| parts.poke(TRITS, 0, &[0xff, 0xff])),
        ),
        exhibit(
            "negative-scale",
            "a scale below 0",
            &[EMBED, "row 3", "-0.5"],
            scale(half(-0.5)),
        ),
        exhibit(
            "minus-zero",
            "a scale of -0",
            &[EMBED, "row 3", "-0"],
            scale(half(-0.0)),
        ),
        exhibit(
            "nan-scale",
            "a scale of NaN",
            &[EMBED, "row 3", "NaN"],
            scale(f16::NAN.to_le_bytes()),
        ),
        exhibit(
            "inf-scale",
            "an infinite scale",
            &[EMBED, "row 3", "inf"],
            scale(f16::INFINITY.to_le_bytes()),
        ),
        exhibit(
            "fine-scale",
            "a scale that bf16 rounds",
            &[EMBED, "row 3", "1.0009"],
            scale(half(1.0 + 1.0 / 1024.0)),
        ),
        exhibit(
            "largest-half",
            "65504, which bf16 rounds",
            &[EMBED, "row 3", "65504"],
            scale(f16::MAX.to_le_bytes()),
        ),
        exhibit(
            "nan-norm",
            "a norm of NaN",
            &[NORM, "element 2", "NaN"],
            norm(f32::NAN),
        ),
        exhibit(
            "inf-norm",
            "an infinite norm",
            &[NORM, "element 2", "inf"],
            norm(f32::INFINITY),
        ),
    ]
}
