//! Every format to every other: the same trits, scales, records and configuration, or a
//! refusal that says why.

use super::*;
use crate::fixture::{Dense, EMBED, HEAD, Scratch, Tiny};
use crate::{Matrix, ModelKind, export_huggingface, export_packed, inspect, verify};
use std::collections::BTreeMap;
use std::fs;
use std::ops::ControlFlow;

const TEXT: &str = "the quick dog jumps over the lazy fox";

fn formats(names: &[&str]) -> Vec<Format> {
    let format = |name: &&str| Format::from_name(name).unwrap();
    names.iter().map(format).collect()
}

fn to(scratch: &Scratch, name: &str, format: Format) -> PathBuf {
    let end = if format.is_file() { ".gguf" } else { "" };
    scratch.join(&format!("{name}-{}{end}", format.name()))
}

fn run(path: &Path, out: &Path, options: &ConvertOptions) -> Result<ConvertSummary, IoError> {
    convert(&OpenModel::open(path)?, out, options, &mut |_, _| {
        ControlFlow::Continue(())
    })
}

fn start(scratch: &Scratch, tiny: &Tiny) -> PathBuf {
    let tokenizer = Tiny::tokenizer().to_json();
    let json = Some(tokenizer.as_bytes());
    let (config, ternary) = (tiny.config(), tiny.ternary());
    export_packed(scratch.path(), "start", config, ternary, json, tiny).unwrap()
}

/// A dense directory with the values of the latents, in f32.
fn dense(scratch: &Scratch, tiny: &Tiny) -> PathBuf {
    let (config, dtype) = (tiny.config(), ExportDtype::F32);
    let source = Dense(tiny);
    export_huggingface(scratch.path(), "dense", config, None, dtype, None, &source).unwrap()
}

fn check(path: &Path, tiny: &Tiny) {
    let model = OpenModel::open(path).unwrap();
    let place = path.display();
    assert_eq!(model.config(), tiny.config(), "{place}");
    assert_eq!(model.ternary(), Some(tiny.ternary()), "{place}");
    assert!(model.notes().is_empty(), "{place}: {:?}", model.notes());
    check_weights(&model, tiny);
    let tokenizer = model.tokenizer().unwrap().unwrap();
    let ids = tokenizer.encode(TEXT).unwrap();
    assert_eq!(ids, Tiny::tokenizer().encode(TEXT).unwrap(), "{place}");
}

fn check_weights(model: &OpenModel, tiny: &Tiny) {
    for parameter in tiny.config().parameters() {
        let name = &parameter.name;
        if !parameter.is_matrix() {
            assert_eq!(model.norm(name).unwrap(), tiny.latents[name], "{name}");
            continue;
        }
        let Matrix::Ternary(matrix) = model.matrix(name).unwrap() else {
            panic!("{name} is dense");
        };
        assert!(matrix == tiny.packed[name], "{name} in {:?}", model.kind());
    }
}

fn refused(result: Result<ConvertSummary, IoError>, expected: &[&str]) {
    let error = result.unwrap_err().to_string();
    assert!(expected.iter().all(|e| error.contains(e)), "{error}");
}

#[test]
fn every_ordered_pair_of_formats_is_lossless() {
    // With groups of 256, every format holds the model.
    let scratch = Scratch::new("convert-pairs");
    let tiny = Tiny::even(true, 256);
    let packed = start(&scratch, &tiny);
    let mut written = vec![packed.clone()];
    for format in Format::ALL {
        let out = to(&scratch, "first", format);
        run(&packed, &out, &ConvertOptions::new(format)).unwrap();
        check(&out, &tiny);
        written.push(out);
    }
    for from in &written {
        for format in Format::ALL {
            let out = to(&scratch, "second", format);
            run(from, &out, &ConvertOptions::new(format)).unwrap();
            check(&out, &tiny);
            let _ = fs::remove_dir_all(&out);
            let _ = fs::remove_file(&out);
        }
    }
}

#[test]
fn group_sizes_and_heads_survive_where_the_format_holds_them() {
    let common = [
        "hf",
        "hf-f16",
        "hf-f32",
        "packed",
        "compressed-tensors",
        "mlx",
    ];
    let floats = ["gguf-f16", "gguf-bf16", "gguf-f32"];
    let cases: [(usize, &[&str], &[&str]); 3] = [
        (32, &[], &["gguf-q2_0", "gguf-pq2_0", "gguf-tq1_0"]),
        (64, &["gguf-q2_0"], &["gguf-q2_0-legacy", "gguf-tq2_0"]),
        (
            128,
            &["gguf-q2_0", "gguf-pq2_0", "gguf-q2_0-legacy", "gguf-ptq1_0"],
            &["gguf-tq1_0", "gguf-tq2_0"],
        ),
    ];
    for (group_size, blocks, bad) in cases {
        for tied in [true, false] {
            let scratch = Scratch::new("convert-groups");
            let tiny = Tiny::even(tied, group_size);
            let packed = start(&scratch, &tiny);
            let ternary = Some(tiny.ternary());
            for format in formats(&[&common, blocks, &floats].concat()) {
                let out = to(&scratch, "out", format);
                format.check(tiny.config(), ternary).unwrap();
                run(&packed, &out, &ConvertOptions::new(format)).unwrap();
                check(&out, &tiny);
                let back = to(&scratch, format.name(), Format::Packed);
                run(&out, &back, &ConvertOptions::new(Format::Packed)).unwrap();
                let bytes = |dir: &Path| fs::read(dir.join("packed.safetensors")).unwrap();
                assert!(bytes(&back) == bytes(&packed), "{}", format.name());
            }
            for format in formats(bad) {
                assert!(format.check(tiny.config(), ternary).is_err());
                let out = to(&scratch, "out", format);
                let result = run(&packed, &out, &ConvertOptions::new(format));
                refused(result, &[EMBED, "group_size"]);
                assert!(!out.exists());
            }
        }
    }
}

#[test]
fn rows_that_a_format_does_not_divide_are_refused_and_others_pass() {
    let scratch = Scratch::new("convert-odd");
    let tiny = Tiny::new(false, 32);
    let packed = start(&scratch, &tiny);
    for format in formats(&[
        "hf",
        "hf-f16",
        "hf-f32",
        "gguf-f16",
        "gguf-bf16",
        "gguf-f32",
    ]) {
        let out = to(&scratch, "out", format);
        run(&packed, &out, &ConvertOptions::new(format)).unwrap();
        check(&out, &tiny);
        let back = to(&scratch, format.name(), Format::Packed);
        run(&out, &back, &ConvertOptions::new(Format::Packed)).unwrap();
        check(&back, &tiny);
    }
    let before = fs::read_dir(scratch.path()).unwrap().count();
    let blocked = [
        "gguf-q2_0",
        "gguf-pq2_0",
        "gguf-ptq1_0",
        "gguf-tq1_0",
        "gguf-tq2_0",
    ];
    for format in formats(&blocked) {
        let mut options = ConvertOptions::new(format);
        for allow_lossy in [false, true] {
            options.allow_lossy = allow_lossy;
            let result = run(&packed, &to(&scratch, "bad", format), &options);
            refused(result, &[EMBED, "72", "do not divide"]);
        }
    }
    for format in formats(&["mlx", "compressed-tensors"]) {
        let result = run(
            &packed,
            &to(&scratch, "bad", format),
            &ConvertOptions::new(format),
        );
        refused(result, &[EMBED, "72", "groups of"]);
    }
    let count = fs::read_dir(scratch.path()).unwrap().count();
    assert_eq!(count, before);
}

#[test]
fn a_file_without_a_record_gets_the_largest_group_that_fits() {
    let scratch = Scratch::new("convert-unrecorded");
    let tiny = Tiny::even(false, 128);
    let packed = start(&scratch, &tiny);
    for format in formats(&["mlx", "compressed-tensors", "gguf-q2_0", "gguf-pq2_0"]) {
        let out = to(&scratch, "out", format);
        run(&packed, &out, &ConvertOptions::new(format)).unwrap();
        // The same length, so that no offset changes.
        let file = match format.is_file() {
            true => out.clone(),
            false => out.join("model.safetensors"),
        };
        let mut bytes = fs::read(&file).unwrap();
        for key in ["setun.group_size", "setun.scale_rule", "setun.numerics"] {
            let at = bytes.windows(key.len()).position(|w| w == key.as_bytes());
            bytes[at.unwrap()..][..5].copy_from_slice(b"other");
        }
        fs::write(&file, bytes).unwrap();
        let _ = fs::remove_file(out.join("MANIFEST.json"));
        let model = OpenModel::open(&out).unwrap();
        assert_eq!(model.ternary().unwrap().group_size, 128);
        assert!(model.notes()[0].contains("128"), "{:?}", model.notes());
        check_weights(&model, &tiny);
        let report = verify(&out).unwrap();
        assert!(
            report.ok() && report.models[0].group_size_inferred,
            "{report}"
        );
    }
}

#[test]
fn dense_models_are_projected_once_and_only_when_asked() {
    let scratch = Scratch::new("convert-dense");
    let tiny = Tiny::even(false, 128);
    let dense = dense(&scratch, &tiny);
    for format in formats(&["packed", "mlx", "compressed-tensors", "gguf-q2_0"]) {
        let out = to(&scratch, "refused", format);
        let result = run(&dense, &out, &ConvertOptions::new(format));
        refused(result, &["dense", "--ternarize", format.name()]);
    }
    for format in formats(&["packed", "hf", "gguf-q2_0", "mlx"]) {
        let out = to(&scratch, "projected", format);
        let options = ConvertOptions {
            ternarize: Some(*tiny.ternary()),
            ..ConvertOptions::new(format)
        };
        let summary = run(&dense, &out, &options).unwrap();
        assert_eq!(summary.ternary, Some(*tiny.ternary()));
        let model = OpenModel::open(&out).unwrap();
        assert_eq!(model.ternary(), Some(tiny.ternary()));
        check_weights(&model, &tiny);

        let again = to(
            &scratch,
            &format!("again-{}", format.name()),
            Format::Packed,
        );
        let options = ConvertOptions {
            format: Format::Packed,
            ..options
        };
        let summary = run(&out, &again, &options).unwrap();
        assert!(summary.notes[0].contains("changes nothing"));
        check_weights(&OpenModel::open(&again).unwrap(), &tiny);
    }
}

#[test]
fn ternary_values_are_recognised_with_their_exact_scales() {
    let scratch = Scratch::new("convert-recognise");
    let tiny = Tiny::even(false, 64);
    let mut values = tiny.clone();
    for (name, matrix) in &tiny.packed {
        let mut effective = vec![0.0; matrix.rows * matrix.cols];
        for (row, effective) in effective.chunks_mut(matrix.cols).enumerate() {
            matrix.dequantize_row(row, effective).unwrap();
        }
        values.latents.insert(name.clone(), effective);
    }
    let plain = dense(&scratch, &values);
    for format in formats(&["packed", "gguf-q2_0", "mlx", "hf"]) {
        let out = to(&scratch, "out", format);
        let summary = run(&plain, &out, &ConvertOptions::new(format)).unwrap();
        assert!(summary.notes[0].contains("ternary by their values"));
        let model = OpenModel::open(&out).unwrap();
        assert_eq!(model.ternary().unwrap().group_size, 64);
        check_weights(&model, &tiny);
    }
}

#[test]
fn a_loss_must_be_allowed_by_name() {
    let scratch = Scratch::new("convert-lossy");
    let tiny = Tiny::even(false, 128);
    let dense = dense(&scratch, &tiny);
    for format in formats(&["hf", "hf-f16", "gguf-bf16"]) {
        let mut options = ConvertOptions::new(format);
        let out = to(&scratch, "rounded", format);
        refused(run(&dense, &out, &options), &[EMBED, "row 0", "--lossy"]);
        assert!(!out.exists());
        options.allow_lossy = true;
        run(&dense, &out, &options).unwrap();
        let Matrix::Dense(values) = OpenModel::open(&out).unwrap().matrix(DOWN_0).unwrap() else {
            panic!("{DOWN_0} became ternary");
        };
        let dtype = match format.name() {
            "hf-f16" => ExportDtype::F16,
            _ => ExportDtype::Bf16,
        };
        let rounded = tiny.latents[DOWN_0].iter().map(|&v| dtype.rounded(v));
        assert!(values.iter().copied().eq(rounded));
    }
    let exact = to(&scratch, "exact", Format::Gguf(GgufWeights::F32));
    run(
        &dense,
        &exact,
        &ConvertOptions::new(Format::Gguf(GgufWeights::F32)),
    )
    .unwrap();
    let Matrix::Dense(values) = OpenModel::open(&exact).unwrap().matrix(HEAD).unwrap() else {
        panic!("{HEAD} became ternary");
    };
    assert!(values == tiny.latents[HEAD]);
}

const DOWN_0: &str = "model.layers.0.mlp.down_proj.weight";

#[test]
fn groups_are_joined_only_when_a_loss_is_allowed() {
    let scratch = Scratch::new("convert-widen");
    let tiny = Tiny::even(false, 128);
    let packed = start(&scratch, &tiny);
    let format = Format::Gguf(GgufWeights::Block(BlockType::Tq2_0));
    let mut options = ConvertOptions::new(format);
    let out = to(&scratch, "wide", format);
    refused(run(&packed, &out, &options), &[EMBED, "group_size = 256"]);
    options.allow_lossy = true;
    let summary = run(&packed, &out, &options).unwrap();
    assert!(summary.notes[0].contains("lossy"));
    let model = OpenModel::open(&out).unwrap();
    assert_eq!(model.ternary().unwrap().group_size, 256);
    let Matrix::Ternary(wide) = model.matrix(DOWN_0).unwrap() else {
        panic!("{DOWN_0} is dense");
    };
    let narrow = &tiny.packed[DOWN_0];
    assert_eq!(wide.trits, narrow.trits);
    assert_ne!(wide.scales[0], narrow.scales[0]);
}

#[test]
fn shards_hold_every_tensor_once_and_read_as_one() {
    let scratch = Scratch::new("convert-shards");
    let tiny = Tiny::even(false, 128);
    let packed = start(&scratch, &tiny);
    for format in formats(&["hf", "mlx", "compressed-tensors"]) {
        let out = to(&scratch, "shards", format);
        let options = ConvertOptions {
            max_shard_bytes: 10_000,
            ..ConvertOptions::new(format)
        };
        run(&packed, &out, &options).unwrap();
        let index = fs::read(out.join("model.safetensors.index.json")).unwrap();
        let index: serde_json::Value = serde_json::from_slice(&index).unwrap();
        let map = index["weight_map"].as_object().unwrap();
        let mut total = 0;
        for (name, file) in map {
            let file = crate::TensorFile::open(&out.join(file.as_str().unwrap())).unwrap();
            total += file.bytes(name).unwrap().len() as u64;
        }
        assert_eq!(index["metadata"]["total_size"], total);
        let mut shards: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for (name, file) in map {
            shards.entry(file.as_str().unwrap()).or_default().push(name);
        }
        assert!(shards.len() > 5, "{index}");
        for (i, (file, names)) in shards.iter().enumerate() {
            let expected = format!("model-{:05}-of-{:05}.safetensors", i + 1, shards.len());
            assert_eq!(*file, expected);
            let bytes = fs::metadata(out.join(file)).unwrap().len();
            // Only a parameter that is larger by itself makes a file larger.
            let module = |name: &str| name.rsplit_once('.').map(|(module, _)| module.to_owned());
            let alone = names.iter().all(|name| module(name) == module(names[0]));
            assert!(bytes < 11_000 || alone, "{file}: {bytes} bytes");
        }
        check(&out, &tiny);
        assert!(verify(&out).unwrap().ok());
    }
}

#[test]
fn a_damaged_model_is_not_converted() {
    let scratch = Scratch::new("convert-damaged");
    let packed = start(&scratch, &Tiny::even(true, 128));
    let file = packed.join("packed.safetensors");
    let mut bytes = fs::read(&file).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&file, bytes).unwrap();
    let mlx = to(&scratch, "mlx", Format::Mlx);
    let error = run(&packed, &mlx, &ConvertOptions::new(Format::Mlx)).unwrap_err();
    assert!(matches!(error, IoError::Damaged { .. }), "{error}");
    assert!(!mlx.exists());
}

#[test]
fn the_chat_template_and_sampling_settings_travel() {
    let scratch = Scratch::new("convert-template");
    let tiny = Tiny::even(true, 128);
    let packed = start(&scratch, &tiny);
    let hf = to(&scratch, "hf", Format::HuggingFace(ExportDtype::Bf16));
    run(
        &packed,
        &hf,
        &ConvertOptions::new(Format::HuggingFace(ExportDtype::Bf16)),
    )
    .unwrap();
    let _ = fs::remove_file(hf.join("MANIFEST.json"));
    let template = "{% for m in messages %}{{ m.content }}{% endfor %}";
    fs::write(hf.join("chat_template.jinja"), template).unwrap();
    let generation = r#"{"temperature": 0.6, "top_k": 20, "eos_token_id": [279, 5]}"#;
    fs::write(hf.join("generation_config.json"), generation).unwrap();
    for format in formats(&["hf", "mlx", "compressed-tensors", "packed", "gguf-q2_0"]) {
        let out = to(&scratch, "out", format);
        run(&hf, &out, &ConvertOptions::new(format)).unwrap();
        let model = OpenModel::open(&out).unwrap();
        assert_eq!(model.chat_template().unwrap().as_deref(), Some(template));
        assert_eq!(model.config().eos_token_ids, [279, 5], "{}", format.name());
        if !format.is_file() {
            let generation = model.generation_config().unwrap().unwrap();
            assert_eq!(
                (generation.temperature, generation.top_k),
                (Some(0.6), Some(20))
            );
        }
    }
}

#[test]
fn verify_proves_every_format_and_the_hash_is_the_same() {
    let scratch = Scratch::new("convert-verify");
    let tiny = Tiny::even(false, 256);
    let packed = start(&scratch, &tiny);
    let hash = |path: &Path| {
        let report = verify(path).unwrap();
        assert!(report.ok(), "{report}");
        let model = &report.models[0];
        assert_eq!((model.group_size, model.tensors.len()), (256, 9));
        assert_eq!(
            (model.num_norms, model.num_norm_weights),
            (5, 3 * 256 + 2 * 32)
        );
        model.ternary_hash.clone().unwrap()
    };
    let expected = hash(&packed);
    for format in Format::ALL {
        let out = to(&scratch, "out", format);
        run(&packed, &out, &ConvertOptions::new(format)).unwrap();
        assert_eq!(hash(&out), expected, "{}", format.name());
    }
}

#[test]
fn verify_finds_planted_faults() {
    let scratch = Scratch::new("convert-faults");
    let tiny = Tiny::even(false, 128);
    let packed = start(&scratch, &tiny);
    let fails = |path: &Path, expected: &[&str]| {
        let report = verify(path).unwrap();
        let named = |failure: &String| expected.iter().all(|e| failure.contains(e));
        assert!(
            report.failures.iter().any(named),
            "{expected:?} not in\n{report}"
        );
    };
    let mlx = to(&scratch, "out", Format::Mlx);
    run(&packed, &mlx, &ConvertOptions::new(Format::Mlx)).unwrap();
    let file = mlx.join("model.safetensors");
    let bias = "lm_head.biases";
    crate::fixture::edit_tensor(&file, bias, |bytes| bytes[2 * (2 * 7 + 1)] ^= 0x10);
    fails(
        &mlx,
        &["model.safetensors", bias, "row 7 group 1", "not ternary"],
    );

    let format = Format::CompressedTensors;
    let words = to(&scratch, "out", format);
    run(&packed, &words, &ConvertOptions::new(format)).unwrap();
    let file = words.join("model.safetensors");
    let packed_name = format!("{DOWN_0}_packed");
    crate::fixture::edit_tensor(&file, &packed_name, |bytes| bytes[64 * 3] = 0);
    fails(&words, &["model.safetensors", DOWN_0, "row 3"]);

    let format = Format::Gguf(GgufWeights::Block(BlockType::Pq2_0));
    let gguf = to(&scratch, "out", format);
    run(&packed, &gguf, &ConvertOptions::new(format)).unwrap();
    let (file, _) = crate::gguf_file::GgufFile::open(&gguf).unwrap();
    let tensor = file.header().tensor("blk.0.ffn_down.weight").unwrap();
    let at = tensor.offset as usize + 34 * (2 * 5 + 1) + 2;
    let mut bytes = fs::read(&gguf).unwrap();
    bytes[at] = 0xff;
    fs::write(&gguf, bytes).unwrap();
    fails(
        &gguf,
        &["out-gguf-pq2_0.gguf", DOWN_0, "row 5", "column 128"],
    );
    let dense = dense(&scratch, &tiny);
    let format = Format::Gguf(GgufWeights::F32);
    let floats = to(&scratch, "floats", format);
    run(&dense, &floats, &ConvertOptions::new(format)).unwrap();
    fails(&floats, &["floats-gguf-f32.gguf", "not a ternary model"]);
}

#[test]
fn blocks_of_rows_stay_small_and_the_result_does_not_depend_on_them() {
    let scratch = Scratch::new("convert-blocks");
    let tiny = Tiny::even(false, 128);
    let packed = start(&scratch, &tiny);
    for format in formats(&["packed", "hf", "mlx", "compressed-tensors", "gguf-q2_0"]) {
        let mut files = Vec::new();
        for block_weights in [1, 1000, BLOCK_WEIGHTS] {
            let options = ConvertOptions {
                block_weights,
                ..ConvertOptions::new(format)
            };
            let dir = scratch.join(&block_weights.to_string());
            fs::create_dir_all(&dir).unwrap();
            let out = dir.join(to(&scratch, "m", format).file_name().unwrap());
            let (mut last, mut steps) = (0, 0);
            let model = OpenModel::open(&packed).unwrap();
            convert(&model, &out, &options, &mut |done, total| {
                assert!(done > last && done <= total);
                assert!(done - last <= (block_weights as u64).max(256));
                (last, steps) = (done, steps + 1);
                ControlFlow::Continue(())
            })
            .unwrap();
            assert_eq!(last, tiny.config().num_parameters());
            let file = match format {
                Format::Gguf(_) => out,
                Format::Packed => out.join("packed.safetensors"),
                _ => out.join("model.safetensors"),
            };
            files.push(fs::read(file).unwrap());
        }
        assert!(
            files[0] == files[1] && files[1] == files[2],
            "{}",
            format.name()
        );
    }
}

#[test]
fn nothing_is_overwritten_and_names_are_checked() {
    let scratch = Scratch::new("convert-names");
    let tiny = Tiny::even(false, 128);
    let packed = start(&scratch, &tiny);
    let gguf = Format::from_name("gguf").unwrap();
    let again = run(&packed, &packed, &ConvertOptions::new(Format::Packed));
    assert!(matches!(again, Err(IoError::Exists { .. })));
    let nameless = run(
        &packed,
        &scratch.join("model.bin"),
        &ConvertOptions::new(gguf),
    );
    refused(nameless, &["model.bin", ".gguf"]);
    assert_eq!(fs::read_dir(scratch.path()).unwrap().count(), 1);
    assert!(
        Format::ALL
            .into_iter()
            .all(|f| Format::from_name(f.name()) == Some(f))
    );
    assert_eq!(Format::from_name("q4"), None);
}

#[test]
fn inspection_counts_bits_of_every_format() {
    let scratch = Scratch::new("convert-inspect");
    let tiny = Tiny::even(false, 256);
    let packed = start(&scratch, &tiny);
    let num_matrix: usize = tiny.packed.values().map(|m| m.rows * m.cols).sum();
    let num_norm = tiny.config().num_parameters() as usize - num_matrix;
    // Bytes of 256 weights of a matrix.
    let expected = [
        ("packed", 66),
        ("hf", 512),
        ("hf-f32", 1024),
        ("mlx", 72),
        ("gguf-q2_0", 72),
        ("gguf-pq2_0", 68),
        ("gguf-ptq1_0", 56),
        ("gguf-tq1_0", 54),
        ("gguf-tq2_0", 66),
        ("gguf-bf16", 512),
    ];
    for (name, bytes) in expected {
        let format = Format::from_name(name).unwrap();
        let out = to(&scratch, "out", format);
        let summary = run(&packed, &out, &ConvertOptions::new(format)).unwrap();
        let inspection = inspect(&out).unwrap();
        let weight_bytes = (num_matrix / 256 * bytes + 4 * num_norm) as u64;
        assert_eq!(inspection.weight_bytes, weight_bytes, "{name}");
        assert_eq!(inspection.num_weights, Some(summary.num_weights));
        let text = inspection.to_string();
        assert!(text.contains("group size 256"), "{text}");
        assert!(!text.contains("note:"), "{text}");
        assert!(text.contains("bits per weight"), "{text}");
        let longest = text.lines().map(|line| line.chars().count()).max();
        assert!(longest.unwrap() < 400, "{text}");
    }
}

#[test]
fn runs_and_checkpoints_convert_and_can_be_inspected() {
    let scratch = Scratch::new("convert-run");
    let tiny = Tiny::even(true, 128);
    tiny.save(scratch.path(), 4, false);
    let out = to(&scratch, "out", Format::Mlx);
    run(scratch.path(), &out, &ConvertOptions::new(Format::Mlx)).unwrap();
    check(&out, &tiny);
    let model = OpenModel::open(&out).unwrap();
    assert_eq!(model.kind(), ModelKind::Mlx);
    let inspection = inspect(scratch.path()).unwrap();
    assert!(inspection.format.contains("checkpoint"), "{inspection}");
    assert_eq!(inspection.files.len(), 2);
    assert!(inspection.bits_per_weight().unwrap() < 3.0);
}
