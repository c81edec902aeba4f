//! Good models pass; each planted fault fails and is named.

use super::*;
use crate::fixture::{DOWN, Dense, EMBED, HEAD, Q_NORM, Scratch, Tiny, edit_tensor};
use crate::{ExportDtype, export_huggingface, export_packed};
use std::fs;

fn export(scratch: &Scratch, tiny: &Tiny, dtype: ExportDtype) -> PathBuf {
    let (parent, config, ternary) = (scratch.path(), tiny.config(), Some(tiny.ternary()));
    export_huggingface(parent, "hf", config, ternary, dtype, None, tiny).unwrap()
}

/// Exports values without metadata, as other tools do.
fn export_plain(scratch: &Scratch, tiny: &Tiny) -> PathBuf {
    let mut plain = tiny.clone();
    for (name, matrix) in &tiny.packed {
        let mut values = vec![0.0; matrix.rows * matrix.cols];
        for (row, values) in values.chunks_mut(matrix.cols).enumerate() {
            matrix.dequantize_row(row, values).unwrap();
        }
        plain.latents.insert(name.clone(), values);
    }
    let (parent, config, dtype) = (scratch.path(), tiny.config(), ExportDtype::Bf16);
    let source = Dense(&plain);
    export_huggingface(parent, "plain", config, None, dtype, None, &source).unwrap()
}

fn passes(path: &Path) -> VerifyReport {
    let report = verify(path).unwrap();
    assert!(report.ok(), "{report}");
    report
}

fn fails(path: &Path, expected: &[&str]) -> VerifyReport {
    let report = verify(path).unwrap();
    assert!(!report.ok());
    let named = |failure: &String| expected.iter().all(|e| failure.contains(e));
    assert!(
        report.failures.iter().any(named),
        "{expected:?} not in\n{report}"
    );
    assert!(report.to_string().contains("NOT verified"));
    report
}

#[test]
fn good_models_pass_in_every_format() {
    for (tied, group_size) in [(true, 16), (false, 32), (false, 128)] {
        let scratch = Scratch::new("verify-good");
        let tiny = Tiny::new(tied, group_size);
        let run = scratch.path();
        tiny.save(run, 1, false);
        let checkpoint = tiny.save(run, 2, false);
        let exports = run.join("export");
        let (config, ternary) = (tiny.config(), tiny.ternary());
        let packed = export_packed(&exports, "packed", config, ternary, None, &tiny).unwrap();
        let mut paths = vec![checkpoint, packed.join(PACKED), packed];
        for dtype in [ExportDtype::Bf16, ExportDtype::F16, ExportDtype::F32] {
            let name = dtype.name();
            let export = export_huggingface;
            paths.push(export(&exports, name, config, Some(ternary), dtype, None, &tiny).unwrap());
        }
        let mut hashes = Vec::new();
        for path in &paths {
            let report = passes(path);
            let model = &report.models[0];
            assert_eq!(
                (model.group_size, model.group_size_inferred),
                (group_size, false)
            );
            assert_eq!(model.tensors.len(), tiny.packed.len());
            assert_eq!(model.num_norms, 9);
            assert!(model.tensors.iter().all(|t| t.worst_distance == 0.0));
            hashes.push(model.ternary_hash.clone().unwrap());
        }
        assert!(hashes.iter().all(|hash| *hash == hashes[0]));
        let report = passes(run);
        assert_eq!(report.models.len(), 5);
        let linked = |note: &&String| note.contains("holds the weights of step-00000002");
        assert_eq!(report.notes.iter().filter(linked).count(), 4, "{report}");
    }
}

#[test]
fn the_table_counts_what_is_there() {
    let scratch = Scratch::new("verify-table");
    let tiny = Tiny::new(false, 16);
    let checkpoint = tiny.save(scratch.path(), 1, false);
    let report = passes(&checkpoint);
    let tensor = report.models[0]
        .tensors
        .iter()
        .find(|t| t.name == DOWN)
        .unwrap();
    let matrix = &tiny.packed[DOWN];
    assert_eq!(
        (tensor.shape.as_slice(), tensor.num_groups),
        (&[72, 100][..], 72 * 7)
    );
    let mut counts = [0usize; 3];
    let mut trits = vec![0; 100];
    for row in 0..72 {
        matrix.unpack_row(row, &mut trits).unwrap();
        trits.iter().for_each(|t| counts[(t + 1) as usize] += 1);
    }
    let shares = counts.map(|count| count as f64 / 7200.0);
    let found = [tensor.share_minus, tensor.share_zero, tensor.share_plus];
    assert_eq!(shares, found);
    let scales: Vec<f32> = matrix.scales.iter().map(|s| s.to_f32()).collect();
    assert_eq!(tensor.scale_max, scales.iter().copied().fold(0.0, f32::max));
    assert_eq!(tensor.scale_min, scales.iter().copied().fold(9.0, f32::min));
    let text = report.to_string();
    let line = text.lines().find(|line| line.starts_with(DOWN)).unwrap();
    assert!(line.contains("72 x 100"), "{line}");
    let total = text.lines().find(|line| line.starts_with("total")).unwrap();
    assert_eq!(line.len(), total.len());
    let json = serde_json::to_value(&report).unwrap();
    assert_eq!(json["models"][0]["kind"], "checkpoint");
}

#[test]
fn one_wrong_weight_is_named() {
    let scratch = Scratch::new("verify-weight");
    let tiny = Tiny::new(false, 16);
    let hf = export(&scratch, &tiny, ExportDtype::F32);
    let file = hf.join("model.safetensors");
    let original = fs::read(&file).unwrap();
    let at = 4 * (7 * 72 + 11);
    for factor in [1.5f32, 0.5, 1.001, 0.9999] {
        fs::write(&file, &original).unwrap();
        let mut value = 0.0;
        edit_tensor(&file, EMBED, |bytes| {
            // The first weight of row 7 from column 11 on that is not zero.
            let weights = bytes[at..].as_chunks_mut::<4>().0;
            let weight = weights.iter_mut().find(|w| f32::from_le_bytes(**w) != 0.0);
            let weight = weight.unwrap();
            value = f32::from_le_bytes(*weight) * factor;
            *weight = value.to_le_bytes();
        });
        let report = fails(
            &hf,
            &[
                EMBED,
                "row 7 column 1",
                &value.to_string(),
                "model.safetensors",
            ],
        );
        assert_eq!(report.failures.len(), 1, "{report}");
        assert!(report.models[0].tensors[0].worst_distance > 1e-5);
        assert_eq!(report.models[0].ternary_hash, None);
    }
    fs::write(&file, &original).unwrap();
    edit_tensor(&file, DOWN, |bytes| {
        bytes[8..12].copy_from_slice(&f32::NAN.to_le_bytes())
    });
    fails(&hf, &[DOWN, "row 0 column 2", "NaN"]);
}

#[test]
fn a_float_embedding_or_head_fails() {
    for name in [EMBED, HEAD] {
        let scratch = Scratch::new("verify-float");
        let tiny = Tiny::new(false, 16);
        let hf = export(&scratch, &tiny, ExportDtype::F32);
        let floats = &tiny.latents[name];
        edit_tensor(&hf.join("model.safetensors"), name, |bytes| {
            for (bytes, w) in bytes.as_chunks_mut::<4>().0.iter_mut().zip(floats) {
                *bytes = w.to_le_bytes();
            }
        });
        let report = fails(&hf, &[name, "row 0 column 0", "not ternary"]);
        assert_eq!(report.failures.len(), 1, "{report}");
    }
}

#[test]
fn without_metadata_the_group_size_is_inferred() {
    for group_size in [32, 64] {
        let scratch = Scratch::new("verify-infer");
        let tiny = Tiny::new(true, group_size);
        let plain = export_plain(&scratch, &tiny);
        let report = passes(&plain);
        let model = &report.models[0];
        assert_eq!(
            (model.group_size, model.group_size_inferred),
            (group_size, true)
        );
        assert!(report.to_string().contains("inferred from the values"));
        edit_tensor(&plain.join("model.safetensors"), DOWN, |bytes| {
            bytes[2 * 70..][..2].copy_from_slice(&0x3d8fu16.to_le_bytes())
        });
        fails(&plain, &["not a ternary model", "no group size"]);
        fails(&plain, &[DOWN, "row 0 column 70"]);
    }
}

#[test]
fn a_wrong_group_size_fails() {
    let scratch = Scratch::new("verify-size");
    let tiny = Tiny::new(false, 16);
    let hf = export(&scratch, &tiny, ExportDtype::Bf16);
    let file = hf.join("model.safetensors");
    let bytes = fs::read(&file).unwrap();
    let key = br#""setun.group_size":"16""#;
    let at = bytes.windows(key.len()).position(|w| w == key).unwrap() + key.len() - 3;
    for (size, expected) in [(b"64", "not ternary"), (b"04", "proves nothing")] {
        let mut bytes = bytes.clone();
        bytes[at..at + 2].copy_from_slice(size);
        fs::write(&file, bytes).unwrap();
        fails(&hf, &[expected]);
        fails(&hf, &["group_size is 16 in the manifest"]);
    }
}

#[test]
fn a_dense_model_is_not_a_ternary_model() {
    let scratch = Scratch::new("verify-dense");
    let tiny = Tiny::new(false, 16);
    let checkpoint = tiny.save(scratch.path(), 1, true);
    fails(&checkpoint, &["not a ternary model"]);
    let run = fails(scratch.path(), &["not a ternary model"]);
    assert!(run.is_dense && run.failures.len() == 1, "{run}");
    let (parent, config, dtype) = (scratch.path(), tiny.config(), ExportDtype::Bf16);
    let source = Dense(&tiny);
    let hf = export_huggingface(parent, "hf", config, None, dtype, None, &source).unwrap();
    fails(&hf, &["not a ternary model"]);
}

#[test]
fn exchanged_scales_are_named() {
    let scratch = Scratch::new("verify-scales");
    let mut tiny = Tiny::new(false, 16);
    let matrix = tiny.packed.get_mut(DOWN).unwrap();
    assert_ne!(matrix.scales[8], matrix.scales[9]);
    matrix.scales.swap(8, 9);
    // Saved so: hashes and manifest agree with the wrong weights.
    let checkpoint = tiny.save(scratch.path(), 1, false);
    let report = fails(
        &checkpoint,
        &[PACKED, DOWN, "row 1 group 1", "latents give"],
    );
    assert_eq!(report.failures.len(), 1, "{report}");
}

#[test]
fn edited_latents_are_named() {
    let scratch = Scratch::new("verify-latents");
    let mut tiny = Tiny::new(true, 16);
    // Another sign keeps the scale: only the trit differs.
    let weight = &mut tiny.latents.get_mut(EMBED).unwrap()[3 * 72 + 20..];
    let i = weight.iter().position(|w| w.abs() > 0.4).unwrap();
    weight[i] = -weight[i];
    let (row, column) = ((3 * 72 + 20 + i) / 72, (3 * 72 + 20 + i) % 72);
    let checkpoint = tiny.save(scratch.path(), 1, false);
    let place = format!("row {row} column {column}");
    let report = fails(&checkpoint, &[EMBED, &place, "the latent"]);
    assert_eq!(report.failures.len(), 1, "{report}");
}

#[test]
fn edited_norms_are_named() {
    let scratch = Scratch::new("verify-norms");
    let checkpoint = Tiny::new(true, 16).save(scratch.path(), 1, false);
    edit_tensor(&checkpoint.join(PACKED), Q_NORM, |bytes| bytes[4 * 6] ^= 1);
    fails(&checkpoint, &[Q_NORM, "element 6", "latents hold"]);
    edit_tensor(&checkpoint.join(PACKED), Q_NORM, |bytes| {
        bytes[..4].copy_from_slice(&f32::INFINITY.to_le_bytes())
    });
    fails(&checkpoint, &[Q_NORM, "element 0 is inf"]);
}

#[test]
fn code_three_and_bad_scales_are_named() {
    let scratch = Scratch::new("verify-codes");
    let tiny = Tiny::new(false, 16);
    let (parent, config, ternary) = (scratch.path(), tiny.config(), tiny.ternary());
    let packed = export_packed(parent, "p", config, ternary, None, &tiny).unwrap();
    let file = packed.join(PACKED);
    let good = fs::read(&file).unwrap();
    edit_tensor(&file, &format!("{DOWN}.trits"), |bytes| {
        bytes[6 * 28 + 1] |= 0b11_0000
    });
    fails(&packed, &[PACKED, DOWN, "row 6", "code 3 at column 6"]);
    // 7 groups a row: row 2, group 3.
    for (scale, problem) in [
        (f32::INFINITY, "is not finite"),
        (f32::NAN, "is not finite"),
        (-0.5, "is negative"),
        (1.0 + 1.0 / 1024.0, "is not exact in bf16"),
    ] {
        fs::write(&file, &good).unwrap();
        edit_tensor(&file, &format!("{DOWN}.scales"), |bytes| {
            let scale = half::f16::from_f32(scale);
            bytes[2 * 17..][..2].copy_from_slice(&scale.to_le_bytes())
        });
        fails(&packed, &[DOWN, "row 2 group 3", problem]);
    }
}

#[test]
fn damage_is_found_by_the_manifest() {
    let scratch = Scratch::new("verify-damage");
    let tiny = Tiny::new(false, 16);
    let old = tiny.save(scratch.path(), 1, false);
    let checkpoint = tiny.save(scratch.path(), 2, false);
    let latents = checkpoint.join(LATENTS);
    let good = fs::read(&latents).unwrap();
    // The lowest bit of one latent: no trit changes, only the hash can tell.
    let mut flipped = good.clone();
    flipped[good.len() - 4] ^= 1;
    fs::write(&latents, &flipped).unwrap();
    fails(&checkpoint, &[LATENTS, "BLAKE3"]);
    fails(scratch.path(), &["step-00000002", LATENTS, "BLAKE3"]);
    fs::write(&latents, &good[..good.len() - 1]).unwrap();
    fails(&checkpoint, &[LATENTS, "bytes"]);
    fails(&checkpoint, &[LATENTS, "cut off"]);
    fs::remove_file(checkpoint.join(PACKED)).unwrap();
    fails(&checkpoint, &[PACKED, "missing"]);
    fs::write(&latents, &good).unwrap();
    fs::write(old.join("config.json"), b"{}").unwrap();
    fails(scratch.path(), &["step-00000001", "config.json"]);

    let file = scratch.join("cut.safetensors");
    fs::write(&file, &good[..100]).unwrap();
    fails(&file, &["cut.safetensors", "cut off"]);
}

#[test]
fn another_hash_in_the_run_record_fails() {
    let scratch = Scratch::new("verify-record");
    let checkpoint = Tiny::new(false, 16).save(scratch.path(), 1, false);
    let record = serde_json::json!({"ternary_hashes": {"step-00000001": "0123"}});
    fs::write(scratch.join("run.json"), record.to_string()).unwrap();
    fails(&checkpoint, &["run.json", "step-00000001", "0123"]);
    fs::write(scratch.join("run.json"), b"{}").unwrap();
    let report = passes(&checkpoint);
    assert!(report.notes[0].contains("no ternary hash for step-00000001"));
    fs::write(scratch.join("run.json"), b"{").unwrap();
    fails(&checkpoint, &["run.json", "not a run record"]);
}

#[test]
fn what_is_no_model_is_an_error() {
    let scratch = Scratch::new("verify-nothing");
    assert!(verify(scratch.path()).is_err());
    assert!(verify(&scratch.join("nowhere")).is_err());
    fs::create_dir(scratch.join("checkpoints")).unwrap();
    assert!(verify(scratch.path()).is_err());
}
