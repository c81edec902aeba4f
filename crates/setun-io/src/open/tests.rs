//! Every format gives the same model back; what does not fit is named.

use super::*;
use crate::fixture::{DOWN, Dense, EMBED, HEAD, Q_NORM, Scratch, Tiny, edit_tensor};
use crate::{ExportDtype, TensorSource, export_huggingface, export_packed};
use std::fs;

fn check_all(model: &OpenModel, source: &dyn TensorSource) {
    for parameter in model.config().parameters() {
        let name = &parameter.name;
        if parameter.is_matrix() {
            let expected = source.matrix(name).unwrap();
            assert!(model.matrix(name).unwrap() == expected, "{name}");
            assert!(model.norm(name).is_err());
        } else {
            assert_eq!(model.norm(name).unwrap(), source.norm(name).unwrap());
            assert!(model.matrix(name).is_err());
        }
    }
    assert!(model.matrix("model.layers.9.mlp.up_proj.weight").is_err());
}

#[test]
fn every_format_gives_the_same_model_back() {
    for (tied, group_size) in [(true, 16), (false, 32), (false, 128)] {
        let scratch = Scratch::new("open-formats");
        let tiny = Tiny::new(tied, group_size);
        let checkpoint = tiny.save(scratch.path(), 7, false);
        let tokenizer = Tiny::tokenizer().to_json();
        let json = Some(tokenizer.as_bytes());
        let (config, ternary) = (tiny.config(), tiny.ternary());
        let packed = export_packed(scratch.path(), "packed", config, ternary, json, &tiny).unwrap();
        let mut kinds = vec![
            (scratch.path().to_owned(), ModelKind::Checkpoint),
            (checkpoint.clone(), ModelKind::Checkpoint),
            (packed.clone(), ModelKind::Packed),
            (packed.join("packed.safetensors"), ModelKind::Packed),
        ];
        for dtype in [ExportDtype::Bf16, ExportDtype::F16, ExportDtype::F32] {
            let (parent, name) = (scratch.path(), dtype.name());
            let export = export_huggingface;
            let dir = export(parent, name, config, Some(ternary), dtype, json, &tiny).unwrap();
            kinds.push((dir.join("model.safetensors"), ModelKind::HuggingFace));
            kinds.push((dir, ModelKind::HuggingFace));
        }
        for (path, kind) in kinds {
            let model = OpenModel::open(&path).unwrap();
            assert_eq!(model.kind(), kind);
            assert_eq!(model.config(), config);
            assert_eq!(model.ternary(), Some(ternary));
            assert_eq!(model.tokenizer().unwrap().unwrap().to_json(), tokenizer);
            check_all(&model, &tiny);
            let latents = model.latents(EMBED).unwrap();
            let is_checkpoint = kind == ModelKind::Checkpoint;
            assert_eq!(latents.is_some(), is_checkpoint);
            assert!(latents.is_none_or(|latents| latents == tiny.latents[EMBED]));
            assert_eq!(model.step(), is_checkpoint.then_some(7));
        }
    }
}

#[test]
fn dense_models_stay_dense() {
    let scratch = Scratch::new("open-dense");
    let tiny = Tiny::new(false, 16);
    tiny.save(scratch.path(), 3, true);
    let model = OpenModel::open(scratch.path()).unwrap();
    assert_eq!(model.ternary(), None);
    check_all(&model, &Dense(&tiny));
    let config = tiny.config();
    let dtype = ExportDtype::F32;
    let hf = export_huggingface(scratch.path(), "hf", config, None, dtype, None, &model);
    let mut model = OpenModel::open(&hf.unwrap()).unwrap();
    assert!(model.tokenizer().unwrap().is_none());
    check_all(&model, &Dense(&tiny));
    assert_eq!(model.detect_ternary().unwrap(), None);
    assert_eq!(model.ternary(), None);
}

#[test]
fn ternary_values_without_metadata_are_detected_on_demand() {
    for group_size in [32, 64] {
        let scratch = Scratch::new("open-detect");
        let tiny = Tiny::new(false, group_size);
        let config = tiny.config();
        // The values of the ternary model, exported as if they were dense.
        let (parent, ternary) = (scratch.path(), Some(tiny.ternary()));
        let dtype = ExportDtype::F16;
        let marked =
            export_huggingface(parent, "marked", config, ternary, dtype, None, &tiny).unwrap();
        let values = Shards::open(&[marked.join("model.safetensors")]).unwrap();
        let mut unmarked = tiny.clone();
        for name in tiny.packed.keys() {
            unmarked
                .latents
                .insert(name.clone(), values.floats(name).unwrap());
        }
        let source = Dense(&unmarked);
        let plain = export_huggingface(parent, "plain", config, None, dtype, None, &source);
        let mut model = OpenModel::open(&plain.unwrap()).unwrap();
        assert!(matches!(model.matrix(EMBED).unwrap(), Matrix::Dense(_)));
        assert_eq!(model.detect_ternary().unwrap(), Some(group_size));
        check_all(&model, &tiny);
    }
}

#[test]
fn a_run_opens_its_best_its_newest_or_any_checkpoint() {
    let scratch = Scratch::new("open-which");
    let run = scratch.path();
    let tiny = Tiny::new(true, 16);
    for step in [10, 20, 30] {
        tiny.save(run, step, false);
    }
    let step = |which| OpenModel::open_with(run, which).map(|model| model.step());
    assert_eq!(OpenModel::open(run).unwrap().step(), Some(30));
    assert!(step(Which::Best).is_err());
    fs::write(run.join("best.json"), r#"{"step": 20, "loss": 1.5}"#).unwrap();
    assert_eq!(OpenModel::open(run).unwrap().step(), Some(20));
    assert_eq!(step(Which::Best).unwrap(), Some(20));
    assert_eq!(step(Which::Newest).unwrap(), Some(30));
    assert_eq!(step(Which::Step(10)).unwrap(), Some(10));
    assert!(step(Which::Step(11)).is_err());

    fs::write(run.join("checkpoints/step-00000020/config.json"), b"{}").unwrap();
    assert!(step(Which::Best).is_err());
    let model = OpenModel::open(run).unwrap();
    assert_eq!(model.step(), Some(30));
    assert!(model.notes()[0].contains("config.json"));
    assert_eq!(
        model.notes()[1..],
        ["the checkpoint of step 30 is used instead"]
    );
}

#[test]
fn shards_are_read_as_one_model() {
    let scratch = Scratch::new("open-shards");
    let tiny = Tiny::new(false, 16);
    let (parent, config, dtype) = (scratch.path(), tiny.config(), ExportDtype::F32);
    let source = Dense(&tiny);
    let whole = export_huggingface(parent, "whole", config, None, dtype, None, &source).unwrap();
    let values = TensorFile::open(&whole.join("model.safetensors")).unwrap();
    let dir = scratch.join("sharded");
    fs::create_dir(&dir).unwrap();
    fs::copy(whole.join("config.json"), dir.join("config.json")).unwrap();
    let names: Vec<_> = values.tensors().map(|t| t.0.to_owned()).collect();
    let mut weight_map = BTreeMap::new();
    for (i, names) in names.chunks(10).enumerate() {
        let shard = format!("model-{i}.safetensors");
        write_shard(&dir.join(&shard), names, &values);
        weight_map.extend(names.iter().map(|name| (name.clone(), shard.clone())));
    }
    let index = dir.join("model.safetensors.index.json");
    let json = serde_json::json!({ "weight_map": weight_map });
    fs::write(&index, json.to_string()).unwrap();
    check_all(&OpenModel::open(&dir).unwrap(), &source);

    fs::remove_file(dir.join("model-1.safetensors")).unwrap();
    let error = OpenModel::open(&dir).unwrap_err().to_string();
    assert!(error.contains("model-1.safetensors"), "{error}");
    let escape = json.to_string().replace("model-1.", "../whole/model.");
    fs::write(&index, escape).unwrap();
    let error = OpenModel::open(&dir).unwrap_err().to_string();
    assert!(error.contains("plain file name"), "{error}");
}

fn write_shard(path: &Path, names: &[String], values: &TensorFile) {
    let info = |name: &String| setun_formats::TensorInfo {
        name: name.clone(),
        dtype: setun_formats::Dtype::F32,
        shape: values.shape(name).unwrap().to_vec(),
    };
    let infos: Vec<_> = names.iter().map(info).collect();
    let mut bytes = Vec::new();
    setun_formats::tensors::write_header(&mut bytes, &infos, &BTreeMap::new()).unwrap();
    for name in names {
        bytes.extend(values.bytes(name).unwrap());
    }
    fs::write(path, bytes).unwrap();
}

#[test]
fn bad_weights_are_named_when_they_are_read() {
    let scratch = Scratch::new("open-bad");
    let tiny = Tiny::new(false, 16);
    let (parent, config, ternary) = (scratch.path(), tiny.config(), tiny.ternary());
    let packed = export_packed(parent, "packed", config, ternary, None, &tiny).unwrap();
    let packed = packed.join("packed.safetensors");
    let read = |path: &Path, name: &str| {
        let model = OpenModel::open(path).unwrap();
        model.matrix(name).unwrap_err().to_string()
    };
    // Down projection: 100 columns in 7 groups of 4 bytes.
    edit_tensor(&packed, &format!("{DOWN}.trits"), |bytes| {
        bytes[2 * 28 + 5] |= 0b1100
    });
    let error = read(&packed, DOWN);
    assert!(
        error.contains("row 2") && error.contains("column 21"),
        "{error}"
    );
    edit_tensor(&packed, &format!("{HEAD}.scales"), |bytes| {
        bytes[2 * (5 * 3 + 1) + 1] |= 0x80
    });
    let error = read(&packed, HEAD);
    assert!(
        error.contains("row 3 group 1") && error.contains("negative"),
        "{error}"
    );

    let dtype = ExportDtype::Bf16;
    let hf = export_huggingface(parent, "hf", config, Some(ternary), dtype, None, &tiny);
    let hf = hf.unwrap();
    edit_tensor(&hf.join("model.safetensors"), EMBED, |bytes| {
        bytes[2 * (4 * 72 + 9)..][..2].copy_from_slice(&[0x11, 0x3c])
    });
    let error = read(&hf, EMBED);
    assert!(error.contains(EMBED) && error.contains("row 4"), "{error}");
}

#[test]
fn what_does_not_fit_the_config_is_refused() {
    let scratch = Scratch::new("open-shape");
    let tiny = Tiny::new(false, 16);
    let (parent, config) = (scratch.path(), tiny.config());
    let (dtype, source) = (ExportDtype::Bf16, Dense(&tiny));
    let hf = export_huggingface(parent, "hf", config, None, dtype, None, &source).unwrap();
    let refused = |change: fn(&mut Qwen3Config), expected: &str| {
        let mut changed = config.clone();
        change(&mut changed);
        fs::write(hf.join("config.json"), changed.to_json()).unwrap();
        let error = OpenModel::open(&hf).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    };
    refused(
        |c| c.intermediate_size = 104,
        "mlp.gate_proj.weight has shape [100, 72]",
    );
    refused(|c| c.num_hidden_layers = 3, "model.layers.2.");
    refused(|c| c.num_hidden_layers = 1, "model.layers.1.");
    fs::write(hf.join("config.json"), config.to_json()).unwrap();
    OpenModel::open(&hf).unwrap();
}

#[test]
fn a_second_head_of_a_tied_model_is_ignored_and_other_extras_are_not() {
    let scratch = Scratch::new("open-extra");
    let tiny = Tiny::new(false, 16);
    let (dtype, source) = (ExportDtype::F32, Dense(&tiny));
    let config = tiny.config();
    let hf = export_huggingface(scratch.path(), "hf", config, None, dtype, None, &source);
    let hf = hf.unwrap();
    let mut tied = config.clone();
    tied.tie_word_embeddings = true;
    fs::write(hf.join("config.json"), tied.to_json()).unwrap();
    OpenModel::open(&hf).unwrap();
    let file = hf.join("model.safetensors");
    let mut bytes = fs::read(&file).unwrap();
    let renamed = Q_NORM.replace("q_norm.weight", "q_proj.bias__");
    assert_eq!(renamed.len(), Q_NORM.len());
    let at = bytes
        .windows(Q_NORM.len())
        .position(|w| w == Q_NORM.as_bytes());
    let at = at.unwrap();
    bytes[at..at + renamed.len()].copy_from_slice(renamed.as_bytes());
    fs::write(&file, bytes).unwrap();
    let error = OpenModel::open(&hf).unwrap_err().to_string();
    assert!(error.contains(Q_NORM), "{error}");
}

#[test]
fn strangers_get_an_explanation() {
    let scratch = Scratch::new("open-stranger");
    let missing = OpenModel::open(&scratch.join("nowhere")).unwrap_err();
    assert!(missing.to_string().contains("no such file"), "{missing}");
    let empty = OpenModel::open(scratch.path()).unwrap_err();
    assert!(empty.to_string().contains("expected a run"), "{empty}");
    fs::write(scratch.join("x.safetensors"), b"not one").unwrap();
    assert!(OpenModel::open(&scratch.join("x.safetensors")).is_err());
    fs::create_dir(scratch.join("checkpoints")).unwrap();
    let bare = OpenModel::open(scratch.path()).unwrap_err();
    assert!(matches!(bare, IoError::NoCheckpoint { .. }), "{bare}");
}
