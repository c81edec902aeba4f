//! Directories of others: what is read, and what is refused at which place.

use super::*;
use crate::fixture::{Dense, EMBED, HEAD, Scratch, Tiny};
use crate::{ConvertOptions, ExportDtype, Format, Matrix, OpenModel, convert, export_huggingface};
use serde_json::json;
use setun_formats::tensors::{TensorInfo, write_header};
use std::fs;
use std::ops::ControlFlow;

fn export(scratch: &Scratch, tiny: &Tiny) -> PathBuf {
    let (config, source) = (tiny.config(), Dense(tiny));
    let dtype = ExportDtype::F32;
    let dir = export_huggingface(scratch.path(), "hf", config, None, dtype, None, &source);
    let dir = dir.unwrap();
    fs::remove_file(dir.join("MANIFEST.json")).unwrap();
    dir
}

/// Changes keys of a JSON file; null removes one.
fn edit_json(path: &Path, changes: &[(&str, Value)]) {
    let mut value: Map<String, Value> = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    for (key, new) in changes {
        match new {
            Value::Null => drop(value.remove(*key)),
            new => drop(value.insert((*key).to_owned(), new.clone())),
        }
    }
    fs::write(path, Value::Object(value).to_string()).unwrap();
}

/// Writes the tensors of a file again, changed by `change`.
fn rewrite(path: &Path, change: impl Fn(&mut Vec<(TensorInfo, Vec<u8>)>)) {
    let file = TensorFile::open(path).unwrap();
    let mut tensors: Vec<(TensorInfo, Vec<u8>)> = file
        .tensors()
        .map(|(name, dtype, shape)| {
            let (name, shape) = (name.to_owned(), shape.to_vec());
            let bytes = file.bytes(&name).unwrap();
            (TensorInfo { name, dtype, shape }, bytes)
        })
        .collect();
    change(&mut tensors);
    let infos: Vec<TensorInfo> = tensors.iter().map(|(info, _)| info.clone()).collect();
    let mut bytes = Vec::new();
    write_header(&mut bytes, &infos, file.metadata()).unwrap();
    bytes.extend(tensors.into_iter().flat_map(|(_, payload)| payload));
    fs::write(path, bytes).unwrap();
}

fn refused(dir: &Path, expected: &[&str]) {
    let error = OpenModel::open(dir).unwrap_err().to_string();
    assert!(expected.iter().all(|e| error.contains(e)), "{error}");
}

#[test]
fn the_vocabulary_is_the_embedding_whatever_the_config_says() {
    let scratch = Scratch::new("hf-vocabulary");
    let tiny = Tiny::new(true, 16);
    let dir = export(&scratch, &tiny);
    for (stated, eos) in [(301, 7), (320, 7), (200, 280)] {
        let changes = [("vocab_size", json!(stated)), ("eos_token_id", json!(eos))];
        edit_json(&dir.join("config.json"), &changes);
        edit_json(
            &dir.join("generation_config.json"),
            &[("eos_token_id", json!(eos))],
        );
        let model = OpenModel::open(&dir).unwrap();
        assert_eq!(model.config().vocab_size, 301);
        assert_eq!(model.config().eos_token_ids, [eos]);
        assert_eq!(model.notes().len(), usize::from(stated != 301));
        assert!(model.notes().iter().all(|note| note.contains("301 rows")));
    }
    edit_json(&dir.join("config.json"), &[("eos_token_id", json!(301))]);
    refused(&dir, &["config.json", "eos_token_id", "301"]);
    edit_json(&dir.join("config.json"), &[("eos_token_id", json!(1))]);
    edit_json(
        &dir.join("generation_config.json"),
        &[("eos_token_id", json!([1, 301]))],
    );
    refused(&dir, &["generation_config.json", "301"]);
}

#[test]
fn types_may_be_mixed_and_a_tied_head_may_be_stored_again() {
    let scratch = Scratch::new("hf-mixed");
    let tiny = Tiny::new(true, 16);
    let dir = export(&scratch, &tiny);
    rewrite(&dir.join("model.safetensors"), |tensors| {
        let half = |values: &[u8]| -> Vec<u8> {
            let values = values.as_chunks::<4>().0.iter();
            let value = |&b: &[u8; 4]| half::f16::from_f32(f32::from_le_bytes(b)).to_le_bytes();
            values.flat_map(value).collect()
        };
        let mut head = tensors.iter().find(|t| t.0.name == EMBED).unwrap().clone();
        head.0.name = HEAD.to_owned();
        for (info, bytes) in tensors.iter_mut() {
            if info.name.contains("layers.0.mlp") {
                (info.dtype, *bytes) = (Dtype::F16, half(bytes));
            }
        }
        tensors.push(head);
    });
    let model = OpenModel::open(&dir).unwrap();
    let name = "model.layers.0.mlp.up_proj.weight";
    let rounded = tiny.latents[name]
        .iter()
        .map(|&v| half::f16::from_f32(v).to_f32());
    assert_eq!(
        model.matrix(name).unwrap(),
        Matrix::Dense(rounded.collect())
    );
    assert!(model.matrix(HEAD).is_err());
}

#[test]
fn models_of_others_are_refused_by_what_they_are() {
    let cases: [(&str, Value, &str); 9] = [
        ("model_type", json!("llama"), "model_type"),
        ("model_type", json!("qwen3_moe"), "model_type"),
        ("attention_bias", json!(true), "attention_bias"),
        (
            "quantization_config",
            json!({ "quant_method": "gptq", "bits": 4 }),
            "gptq",
        ),
        (
            "quantization_config",
            json!({ "quant_method": "awq", "bits": 2 }),
            "awq",
        ),
        (
            "quantization",
            json!({ "bits": 4, "group_size": 64 }),
            "quantization.bits is 4",
        ),
        (
            "quantization",
            json!({ "bits": 2, "group_size": 16 }),
            "quantization.group_size",
        ),
        (
            "quantization",
            json!({ "bits": 2, "group_size": 64, "model.embed_tokens": { "bits": 4 } }),
            "model.embed_tokens",
        ),
        (
            "quantization_config",
            json!({ "quant_method": "compressed-tensors", "format": "int-quantized" }),
            "quantization_config.format",
        ),
    ];
    let scratch = Scratch::new("hf-others");
    let dir = export(&scratch, &Tiny::new(true, 16));
    let config = fs::read(dir.join("config.json")).unwrap();
    for (key, value, expected) in cases {
        fs::write(dir.join("config.json"), &config).unwrap();
        edit_json(&dir.join("config.json"), &[(key, value)]);
        refused(&dir, &["config.json", expected]);
    }
}

#[test]
fn tensors_of_others_are_refused_by_what_they_are() {
    let scratch = Scratch::new("hf-tensors");
    let cases = [
        ("model.layers.0.self_attn.q_proj.bias", "has no biases"),
        (
            "model.layers.0.mlp.experts.0.up_proj.weight",
            "mixture of experts",
        ),
        ("model.layers.0.mlp.up_proj.qweight", "GPTQ or AWQ"),
        ("visual.patch_embed.weight", "not part of a Qwen3 model"),
    ];
    let dir = export(&scratch, &Tiny::new(true, 16));
    let file = dir.join("model.safetensors");
    let good = fs::read(&file).unwrap();
    for (name, expected) in cases {
        fs::write(&file, &good).unwrap();
        rewrite(&file, |tensors| {
            let mut extra = tensors[0].clone();
            extra.0.name = name.to_owned();
            tensors.push(extra);
        });
        refused(&dir, &["model.safetensors", name, expected]);
    }
    fs::write(&file, &good).unwrap();
    rewrite(&file, |tensors| {
        tensors.retain(|t| t.0.name != "model.norm.weight")
    });
    refused(&dir, &["model.norm.weight", "missing"]);
    fs::write(&file, &good).unwrap();
    rewrite(&file, |tensors| {
        tensors[1].0.dtype = Dtype::U32;
    });
    refused(&dir, &["model.safetensors", "U32"]);
}

fn write(model: &OpenModel, dir: &Path, options: &ConvertOptions) {
    convert(model, dir, options, &mut |_, _| ControlFlow::Continue(())).unwrap();
}

#[test]
fn an_index_must_describe_its_shards() {
    let scratch = Scratch::new("hf-index");
    let tiny = Tiny::even(true, 128);
    let hf = export(&scratch, &tiny);
    let model = OpenModel::open(&hf).unwrap();
    let dir = scratch.join("shards");
    let options = ConvertOptions {
        max_shard_bytes: 200_000,
        ..ConvertOptions::new(Format::HuggingFace(ExportDtype::F32))
    };
    write(&model, &dir, &options);
    let path = dir.join("model.safetensors.index.json");
    let index: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let with = |name: &str, file: Value| {
        let mut map = index["weight_map"].clone();
        map[name] = file;
        fs::write(&path, json!({ "weight_map": map }).to_string()).unwrap();
    };
    let other = index["weight_map"]["model.norm.weight"].clone();
    assert_ne!(index["weight_map"][EMBED], other);
    with(EMBED, other);
    refused(&dir, &["index.json", EMBED]);
    with("model.nothing.weight", index["weight_map"][EMBED].clone());
    refused(&dir, &["index.json", "model.nothing.weight"]);
    with(EMBED, json!("missing.safetensors"));
    refused(&dir, &["missing.safetensors"]);
    with(EMBED, json!("../escape.safetensors"));
    refused(&dir, &["index.json", "plain file name"]);
    for text in [
        "",
        "{}",
        "[]",
        r#"{"weight_map": {}}"#,
        r#"{"weight_map": {"a": 1}}"#,
    ] {
        fs::write(&path, text).unwrap();
        refused(&dir, &["index.json"]);
    }
    fs::write(&path, index.to_string()).unwrap();
    OpenModel::open(&dir).unwrap();
}

#[test]
fn quantized_tensors_must_have_the_shapes_of_their_config() {
    let scratch = Scratch::new("hf-quantized");
    let tiny = Tiny::even(false, 128);
    let hf = export(&scratch, &tiny);
    let model = OpenModel::open(&hf).unwrap();
    for (format, dropped, changed) in [
        (Format::Mlx, "lm_head.biases", "lm_head.scales"),
        (
            Format::CompressedTensors,
            "lm_head.weight_scale",
            "lm_head.weight_shape",
        ),
    ] {
        let dir = scratch.join(format.name());
        let options = ConvertOptions {
            ternarize: Some(*tiny.ternary()),
            ..ConvertOptions::new(format)
        };
        write(&model, &dir, &options);
        let file = dir.join("model.safetensors");
        let good = fs::read(&file).unwrap();
        rewrite(&file, |tensors| tensors.retain(|t| t.0.name != dropped));
        refused(&dir, &[dropped]);
        fs::write(&file, &good).unwrap();
        rewrite(&file, |tensors| {
            let tensor = tensors.iter_mut().find(|t| t.0.name == changed).unwrap();
            tensor.1[0] ^= 1;
            if format == Format::Mlx {
                tensor.0.shape.reverse();
            }
        });
        refused(&dir, &["model.safetensors", changed]);
        fs::write(&file, &good).unwrap();
        OpenModel::open(&dir).unwrap();
    }
}

#[test]
fn pickled_weights_get_a_remedy() {
    let scratch = Scratch::new("hf-pickle");
    let dir = export(&scratch, &Tiny::new(true, 16));
    fs::rename(dir.join("model.safetensors"), dir.join("pytorch_model.bin")).unwrap();
    refused(&dir, &["safetensors", "save_pretrained"]);
}
