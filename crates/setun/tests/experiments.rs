//! Options of the recipe study: each resumes exactly, and what is no ternary model in the
//! sense of the file formats is refused by everything that reads files.

mod support;

use serde_json::Value;
use std::path::Path;
use support::{
    Scratch, Signal, evaluation, finish, interrupt, metrics, params_hash, resuming, setun, training,
};

fn losses(run: &Path) -> Vec<Value> {
    let lines = metrics(run).into_iter();
    lines
        .map(|line| serde_json::from_str::<Value>(&line).unwrap())
        .filter(|line| line["kind"] == "step")
        .map(|line| line["loss"].clone())
        .collect()
}

/// Trains with `flags` on one thread, and again with a stop and a second thread on the way;
/// insists on equal bits. Returns the losses.
fn exact(scratch: &Scratch, name: &str, flags: &[&str]) -> Vec<Value> {
    let corpus = scratch.corpus();
    let (whole, parts) = (scratch.join(name), scratch.join(&format!("{name}-parts")));
    finish(&mut training(&whole, &corpus, flags)).ok();
    interrupt(
        &mut training(&parts, &corpus, flags),
        &parts,
        7,
        Signal::Interrupt,
    )
    .stopped();
    finish(resuming(&parts).args(["--run.threads", "2"])).ok();
    assert_eq!(params_hash(&whole, 20), params_hash(&parts, 20), "{name}");
    assert_eq!(evaluation(&whole, 20), evaluation(&parts, 20), "{name}");
    losses(&whole)
}

fn float(value: &Value) -> f64 {
    value.as_f64().unwrap()
}

#[test]
fn muon_z_loss_dropout_and_the_clipped_estimator_learn_and_resume_exactly() {
    let scratch = Scratch::new("options");
    let run = |name: &str, flags: &[&str]| {
        let run = scratch.join(name);
        finish(&mut training(&run, &scratch.corpus(), flags)).ok();
        losses(&run)
    };
    let plain = run("plain", &[]);
    let muon = [
        "--train.optimizer",
        "muon",
        "--train.lr",
        "2e-2",
        "--train.adamw_lr",
        "3e-3",
    ];
    let muon = exact(&scratch, "muon", &muon);
    // The first loss is that of the first weights, whatever updates them.
    assert_eq!(muon[0], plain[0]);
    assert_ne!(muon[2], plain[2]);
    let fall = float(&muon[0]) - float(&muon[19]);
    assert!(fall > 0.3, "{muon:?}");
    // It is learned and not reported.
    let z_loss = run("z-loss", &["--train.z_loss", "1e-2"]);
    assert_eq!(z_loss[0], plain[0]);
    assert_ne!(z_loss[2], plain[2]);
    let dropout = exact(&scratch, "dropout", &["--train.dropout", "0.1"]);
    assert_ne!(dropout[0], plain[0]);
    assert!(
        float(&dropout[0]) - float(&dropout[19]) > 0.3,
        "{dropout:?}"
    );
    let clipped = exact(&scratch, "clipped", &["--train.ste", "clipped"]);
    assert_eq!(clipped[0], plain[0]);
    assert_ne!(clipped[2], plain[2]);
    assert!(
        float(&clipped[0]) - float(&clipped[19]) > 0.3,
        "{clipped:?}"
    );
}

#[test]
fn experiments_train_and_no_file_format_gets_them() {
    let scratch = Scratch::new("experiments");
    let plain = scratch.join("plain");
    finish(&mut training(&plain, &scratch.corpus(), &[])).ok();
    let plain = losses(&plain);
    for (name, flags) in [
        (
            "embedding",
            ["--model.ternary_embedding", "false", "--sample.prompts=0"],
        ),
        (
            "f16",
            ["--model.scale_rounding", "f16", "--sample.prompts=0"],
        ),
        (
            "learned",
            ["--model.learned_scales", "true", "--sample.prompts=0"],
        ),
        (
            "capped",
            ["--model.logit_softcap", "15", "--sample.prompts=0"],
        ),
    ] {
        let losses = exact(&scratch, name, &flags);
        assert_ne!(losses[19], plain[19], "{name} does nothing");
        assert!(float(&losses[0]) - float(&losses[19]) > 0.3, "{losses:?}");
        let run = scratch.join(name);
        let path = run.to_str().unwrap();
        assert!(
            !run.join("checkpoints/step-00000020/packed.safetensors")
                .exists()
        );
        let out = scratch.join("out");
        let words = [flags[0].trim_start_matches("--"), "neither dense nor"];
        setun(["generate", "--model", path, "--prompt", "A"]).refused(1, &words);
        setun(["convert", path, out.to_str().unwrap(), "--to", "hf"]).refused(1, &words);
        assert!(!out.exists());
        setun(["report", path]).ok();
    }
}

#[test]
fn options_that_do_not_go_together_are_refused() {
    let scratch = Scratch::new("experiments-wrong");
    let corpus = scratch.corpus();
    let refused = |flags: &[&str], words: &[&str]| {
        let run = scratch.join("run");
        finish(&mut training(&run, &corpus, flags)).refused(2, words);
        assert!(!run.exists());
    };
    let muon = ["--train.optimizer", "muon"];
    let bf16 = ["--train.optimizer_state", "bf16"];
    refused(&[muon, bf16].concat(), &["momentum in f32"]);
    refused(&["--train.adamw_lr", "1e-3"], &["set train.lr"]);
    let dense = ["--model.ternary", "false"];
    let clipped = ["--train.ste", "clipped"];
    refused(&[dense, clipped].concat(), &["needs a ternary model"]);
    let embedding = ["--model.ternary_embedding", "false"];
    let formats = ["--export.formats", "hf"];
    refused(&[embedding, formats].concat(), &["no format can hold"]);
    let prompts = ["--sample.prompts", "1"];
    refused(&[embedding, prompts].concat(), &["set sample.prompts = 0"]);
    refused(&["--train.dropout", "1"], &["at least 0 and below 1"]);
    let learned = ["--model.learned_scales", "true"];
    refused(&[learned, dense].concat(), &["needs a ternary model"]);
    refused(&[learned, formats].concat(), &["no format can hold"]);
    let capped = ["--model.logit_softcap", "30"];
    refused(&[dense, capped, formats].concat(), &["no format can hold"]);
    let f16 = ["--model.scale_rounding", "f16"];
    let max = ["--model.scale_rule", "max"];
    refused(&[f16, max].concat(), &["with the rule mean, not max"]);
    refused(&[learned, max].concat(), &["with the rule mean, not max"]);
}
