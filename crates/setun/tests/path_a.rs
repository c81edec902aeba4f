//! From a dense model to a ternary one: projection, fine-tuning, distillation, gradual
//! projection and frozen parameters, through the command line.

mod support;

use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use support::{Scratch, evaluation, finish, json, metrics, setun, training};

const DENSE: [&str; 4] = ["--model.ternary", "false", "--train.steps", "60"];

/// A dense model to start from, in `NAME/export/hf`.
fn dense_model(scratch: &Scratch, corpus: &Path) -> PathBuf {
    let run = scratch.join("dense");
    finish(&mut training(&run, corpus, &DENSE)).ok();
    run.join("export/hf")
}

fn arg(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

/// Values of `key` in the lines of the steps.
fn of_steps(run: &Path, key: &str) -> Vec<Value> {
    let lines = metrics(run).into_iter();
    lines
        .map(|line| serde_json::from_str::<Value>(&line).unwrap())
        .filter(|line| line["kind"] == "step")
        .map(|line| line[key].clone())
        .collect()
}

#[test]
fn a_dense_model_becomes_a_verified_ternary_one() {
    let scratch = Scratch::new("path-a");
    let corpus = scratch.corpus();
    let dense = dense_model(&scratch, &corpus);
    let template = "{% for m in messages %}{{ m.content }}{% endfor %}";
    fs::write(dense.join("chat_template.jinja"), template).unwrap();
    let generation = dense.join("generation_config.json");
    let mut sampling = json(&generation);
    sampling["temperature"] = 0.6.into();
    fs::write(&generation, sampling.to_string()).unwrap();
    let run = scratch.join("student");
    let from = arg(&dense);
    let flags = ["--init", &from, "--distill.weight", "0.9"];
    let output = finish(&mut training(&run, &corpus, &flags)).ok();
    assert!(output.stdout.contains("verified, every matrix is ternary"));

    // How the model is talked to and sampled comes from the one that training started from.
    let exported = |name: &str| json(&run.join("export/hf").join(name));
    let settings = exported("tokenizer_config.json");
    assert_eq!(settings["chat_template"], template);
    assert_eq!(exported("generation_config.json")["temperature"], 0.6);

    // What the projection costs is measured before training, and training wins some back.
    let dense_loss = evaluation(&scratch.join("dense"), 60)["loss"]
        .as_f64()
        .unwrap();
    let cost = &json(&run.join("run.json"))["projection"];
    let (before, after) = (
        cost["before"].as_f64().unwrap(),
        cost["after"].as_f64().unwrap(),
    );
    // The export that it starts from is in bf16, the run's own evaluation is not.
    assert!(
        (before - dense_loss).abs() < 0.02,
        "{before} for {dense_loss}"
    );
    assert!(after > before + 0.05, "{before} to {after}");
    assert_eq!(evaluation(&run, 0)["loss"].as_f64(), Some(after));
    let end = evaluation(&run, 20)["loss"].as_f64().unwrap();
    assert!(end < after, "{after} to {end}");
    let divergences = of_steps(&run, "divergence");
    let value = |i: usize| divergences[i].as_f64().unwrap();
    assert!(value(0) > 0.0 && value(19) < value(0), "{divergences:?}");
    let report = fs::read_to_string(run.join("report.html")).unwrap();
    assert!(report.contains("its projection had"));
    assert!(report.contains("Divergence from the teacher"));

    // The teacher that is not named is the dense model.
    let settings = fs::read_to_string(run.join("settings.toml")).unwrap();
    assert!(
        settings.contains(&format!("teacher = {from:?}")),
        "{settings}"
    );
    setun(["verify", &arg(&run)]).ok();
}

#[test]
fn a_model_does_not_diverge_from_itself() {
    let scratch = Scratch::new("path-a-self");
    let corpus = scratch.corpus();
    let from = arg(&dense_model(&scratch, &corpus));
    let run = scratch.join("self");
    let flags = [
        "--init",
        &from,
        "--distill.weight",
        "1",
        "--model.ternary",
        "false",
        "--train.lr",
        "1e-30",
        "--train.steps",
        "2",
        "--train.warmup_steps",
        "0",
    ];
    finish(&mut training(&run, &corpus, &flags)).ok();
    for (divergence, norm) in of_steps(&run, "divergence")
        .iter()
        .zip(of_steps(&run, "grad_norm"))
    {
        assert!(divergence.as_f64().unwrap().abs() < 1e-5, "{divergence}");
        assert!(norm.as_f64().unwrap() < 1e-4, "{norm}");
    }
}

#[test]
fn gradual_projection_begins_with_the_dense_model() {
    let scratch = Scratch::new("path-a-blend");
    let corpus = scratch.corpus();
    let from = arg(&dense_model(&scratch, &corpus));
    let run = |name: &str, flags: &[&str]| {
        let run = scratch.join(name);
        let common = ["--init", &from, "--model.numerics", "f32"];
        finish(&mut training(&run, &corpus, &[&common, flags].concat())).ok();
        of_steps(&run, "loss")
    };
    let dense = run("as-it-is", &["--model.ternary", "false"]);
    let gradual = run("gradual", &["--train.blend_steps", "10"]);
    let at_once = run("at-once", &[]);
    assert_eq!(gradual[0], dense[0]);
    assert!(at_once[0].as_f64().unwrap() > dense[0].as_f64().unwrap() + 0.05);
    setun(["verify", &arg(&scratch.join("gradual"))]).ok();
}

#[test]
fn frozen_parameters_stay_what_the_projection_made_of_them() {
    let scratch = Scratch::new("path-a-freeze");
    let corpus = scratch.corpus();
    let from = arg(&dense_model(&scratch, &corpus));
    let run = scratch.join("run");
    let flags = ["--init", &from, "--train.freeze", "embed_tokens,layers.0"];
    finish(&mut training(&run, &corpus, &flags)).ok();
    let projected = arg(&scratch.join("projected"));
    let group = ["--ternarize", "--group-size", "64"];
    setun(
        [
            &["convert", &from, &projected, "--to", "packed"],
            &group[..],
        ]
        .concat(),
    )
    .ok();
    let payloads = |path: PathBuf| {
        let bytes = fs::read(path).unwrap();
        let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let entries: Value = serde_json::from_slice(&bytes[8..8 + header]).unwrap();
        move |name: &str| {
            let range = &entries[name]["data_offsets"];
            let at = |i: usize| 8 + header + range[i].as_u64().unwrap() as usize;
            bytes[at(0)..at(1)].to_vec()
        }
    };
    let before = payloads(scratch.join("projected/packed.safetensors"));
    let after = payloads(run.join("export/packed/packed.safetensors"));
    for (name, frozen) in [
        ("model.embed_tokens.weight.trits", true),
        ("model.embed_tokens.weight.scales", true),
        ("model.layers.0.mlp.up_proj.weight.trits", true),
        ("model.layers.1.mlp.up_proj.weight.scales", false),
    ] {
        assert_eq!(before(name) == after(name), frozen, "{name}");
    }
}

#[test]
fn what_cannot_be_adapted_is_refused() {
    let scratch = Scratch::new("path-a-refused");
    let corpus = scratch.corpus();
    let from = arg(&dense_model(&scratch, &corpus));
    let refused = |flags: &[&str], code: i32, words: &[&str]| {
        let run = scratch.join("refused");
        finish(&mut training(&run, &corpus, flags)).refused(code, words);
        assert!(!run.exists());
    };
    refused(
        &["--init", &from, "--train.freeze", "layers.7"],
        1,
        &["layers.7", "embed_tokens"],
    );
    refused(
        &["--init", &from, "--train.freeze", "model"],
        1,
        &["nothing to train"],
    );
    refused(&["--distill.weight", "1.5"], 2, &["distill.weight"]);
    refused(&["--distill.weight", "0.5"], 2, &["distill.teacher"]);
    let missing = [
        "--init",
        &from,
        "--distill.weight",
        "0.5",
        "--distill.teacher",
        "nowhere",
    ];
    refused(&missing, 1, &["the teacher cannot be opened", "nowhere"]);
}
