//! A block drafter as a user meets it: trained for a run, verified, used, refused.

mod support;

use std::fs;
use std::path::Path;
use support::{Output, Scratch, command, finish, training};

/// Trains a drafter for `target` in a moment.
fn train_drafter(target: &Path, flags: &[&str]) -> Output {
    let short = [
        "--train.steps",
        "30",
        "--drafter.windows",
        "24",
        "--drafter.valid_windows",
        "4",
        "--run.threads",
        "1",
    ];
    let mut command = command(["train", "--drafter-for"]);
    finish(command.arg(target).args(short).args(flags))
}

fn generate(model: &Path, flags: &[&str]) -> String {
    let mut command = command([
        "generate",
        "--max-tokens",
        "40",
        "--prompt",
        "The",
        "--model",
    ]);
    finish(command.arg(model).args(flags)).ok().stdout
}

#[test]
fn a_drafter_is_trained_verified_and_changes_no_text() {
    let scratch = Scratch::new("drafter");
    let run = scratch.join("run");
    let muon = ["--train.optimizer", "muon", "--train.adamw_lr", "1e-2"];
    finish(&mut training(&run, &scratch.corpus(), &muon)).ok();
    let trained = train_drafter(&run, &[]).ok();
    assert!(
        trained.stdout.contains("held-out loss by guess"),
        "{trained:#?}"
    );
    assert!(trained.stdout.contains("the same text"), "{trained:#?}");
    let drafter = run.join("drafter");
    for name in ["drafter.safetensors", "MANIFEST.json"] {
        assert!(drafter.join(name).is_file(), "{name}");
    }
    let verified = finish(command(["verify"]).arg(&run)).ok().stdout;
    assert!(verified.contains("a drafter"), "{verified}");
    let path = drafter.to_str().unwrap();
    for temperature in ["0", "0.9"] {
        let plain = generate(&run, &["--temperature", temperature]);
        let flags = ["--temperature", temperature, "--draft", path];
        assert_eq!(generate(&run, &flags), plain);
    }

    train_drafter(&run, &[]).refused(1, &["drafter", "is there already", "remove"]);
    let bytes = fs::read(drafter.join("drafter.safetensors")).unwrap();
    let mut damaged = bytes.clone();
    let last = damaged.len() - 9;
    damaged[last] ^= 1;
    fs::write(drafter.join("drafter.safetensors"), damaged).unwrap();
    finish(command(["verify"]).arg(&run)).not_verified(&["drafter.safetensors"]);
}

#[test]
fn what_is_no_pair_is_refused() {
    let scratch = Scratch::new("drafter-refused");
    let corpus = scratch.corpus();
    let (small, wide, dense) = (scratch.join("a"), scratch.join("b"), scratch.join("c"));
    finish(&mut training(&small, &corpus, &["--train.steps", "5"])).ok();
    let flags = ["--train.steps", "5", "--model.hidden_size", "128"];
    finish(&mut training(&wide, &corpus, &flags)).ok();
    let flags = ["--train.steps", "5", "--model.ternary", "false"];
    finish(&mut training(&dense, &corpus, &flags)).ok();
    train_drafter(&dense, &[]).refused(1, &["dense model", "--init"]);
    let dropout = train_drafter(&dense, &["--train.dropout", "0.1"]);
    dropout.refused(2, &["does not read --train.dropout"]);
    assert!(!dense.join("drafter").exists());
    train_drafter(&small, &["--drafter.block_size", "1"]).refused(1, &["block_size", "from 2"]);
    train_drafter(&small, &["--drafter.num_target_layers", "9"])
        .refused(1, &["num_target_layers", "from 1 to 2"]);
    train_drafter(&scratch.join("nothing"), &["--data.train", "x.txt"]).refused(1, &["nothing"]);
    finish(&mut command(["train", "r.toml", "--drafter-for", "run"]))
        .refused(2, &["--drafter-for"]);

    train_drafter(&small, &["--train.optimizer", "muon"]).ok();
    let mut command = command(["generate", "--prompt", "The", "--model"]);
    let command = command.arg(&wide).arg("--draft").arg(small.join("drafter"));
    finish(command).refused(1, &["another model", "hidden_size"]);
}
