//! A run that was interrupted and resumed is the run that was not: every loss, every
//! evaluation, and the hash of all weights, whatever the interruption, the number of
//! threads and the instruction set.

mod support;

use std::fs;
use std::path::{Path, PathBuf};

use support::{
    Scratch, Signal, checkpoint, copy_dir, edit, files, finish, interrupt, json, metrics,
    params_hash, recipe, resuming, setun, training,
};

const STEPS: u64 = 20;

/// Steps that take some 20 ms, so that a signal arrives between two of them.
const SETTINGS: [&str; 8] = [
    "--train.batch_size",
    "16",
    "--checkpoint.every",
    "4",
    "--checkpoint.keep",
    "3",
    "--eval.every",
    "5",
];

/// Everything that a run computed must be the same in both.
#[track_caller]
fn assert_same_run(found: &Path, expected: &Path, steps: u64) {
    assert_eq!(metrics(found), metrics(expected));
    assert_eq!(params_hash(found, steps), params_hash(expected, steps));
    for file in [
        "best.json",
        "export/packed/packed.safetensors",
        "export/hf/model.safetensors",
    ] {
        let [found, expected] = [found, expected].map(|run| fs::read(run.join(file)).unwrap());
        assert!(found == expected, "{file}");
    }
    let hashes = [found, expected].map(|run| json(&run.join("run.json"))["ternary_hashes"].clone());
    let last = format!("step-{steps:08}");
    assert_eq!(hashes[0][&last], hashes[1][&last]);
}

/// A run without interruption.
fn straight(scratch: &Scratch, corpus: &Path, flags: &[&str]) -> PathBuf {
    let run = scratch.join("straight");
    finish(training(&run, corpus, &SETTINGS).args(flags)).ok();
    run
}

/// The step that a stopped run says it stopped after.
fn stopped_after(stdout: &str) -> u64 {
    let rest = stdout
        .strip_prefix("stopped after step ")
        .unwrap_or_else(|| panic!("{stdout:?}"));
    rest.split(';').next().unwrap().parse().unwrap()
}

#[test]
fn an_interrupted_run_ends_like_a_straight_one() {
    let scratch = Scratch::new("interrupt");
    let corpus = scratch.corpus();
    let expected = straight(&scratch, &corpus, &[]);
    for step in [1, 7, 12] {
        let run = scratch.join(&format!("from-{step}"));
        let mut first = training(&run, &corpus, &SETTINGS);
        let output = interrupt(&mut first, &run, step, Signal::Interrupt).stopped();
        let stopped = stopped_after(&output.stdout);
        assert!((step..STEPS).contains(&stopped), "{output:?}");
        assert!(
            output.stdout.contains("setun train --resume "),
            "{output:?}"
        );
        assert!(!run.join("report.html").exists());
        let output = finish(&mut resuming(&run)).ok();
        assert!(
            output.stderr.contains(&format!("after step {stopped}\n")),
            "{output:?}"
        );
        assert_same_run(&run, &expected, STEPS);
    }
}

#[test]
fn interruptions_and_crashes_add_up_to_the_same_run() {
    let scratch = Scratch::new("crash");
    let corpus = scratch.corpus();
    let expected = straight(&scratch, &corpus, &[]);
    let run = scratch.join("run");
    let mut first = training(&run, &corpus, &SETTINGS);
    let output = interrupt(&mut first, &run, 6, Signal::Kill);
    assert_eq!(output.code, None);
    let second = interrupt(&mut resuming(&run), &run, 9, Signal::Interrupt).stopped();
    assert!(stopped_after(&second.stdout) < STEPS);
    let third = interrupt(&mut resuming(&run), &run, 12, Signal::Kill);
    assert_eq!(third.code, None);
    finish(&mut resuming(&run)).ok();
    assert_same_run(&run, &expected, STEPS);
    let leftover = |file: &String| file.contains(".tmp-") || file.contains(".trash-");
    assert_eq!(files(&run).iter().find(|file| leftover(file)), None);
    // To resume a finished run changes nothing.
    finish(&mut resuming(&run)).ok();
    assert_same_run(&run, &expected, STEPS);
}

#[test]
fn moments_of_bf16_survive_an_interruption() {
    let scratch = Scratch::new("bf16-state");
    let corpus = scratch.corpus();
    let flags = ["--train.optimizer_state", "bf16"];
    let expected = straight(&scratch, &corpus, &flags);
    let run = scratch.join("run");
    let mut first = training(&run, &corpus, &SETTINGS);
    interrupt(first.args(flags), &run, 7, Signal::Interrupt).stopped();
    finish(&mut resuming(&run)).ok();
    assert_same_run(&run, &expected, STEPS);
}

/// Means and rates over several steps.
#[test]
fn what_spans_several_steps_survives_an_interruption() {
    let scratch = Scratch::new("spans");
    let corpus = scratch.corpus();
    // The state of the trits is recorded every third step.
    let flags = [
        "--train.steps",
        "150",
        "--log.every",
        "4",
        "--eval.every",
        "50",
        "--checkpoint.every",
        "50",
    ];
    let [straight, run] = ["straight", "run"].map(|name| scratch.join(name));
    finish(&mut training(&straight, &corpus, &flags)).ok();
    let mut first = training(&run, &corpus, &flags);
    interrupt(&mut first, &run, 24, Signal::Interrupt).stopped();
    interrupt(&mut resuming(&run), &run, 68, Signal::Interrupt).stopped();
    finish(&mut resuming(&run)).ok();
    assert_same_run(&run, &straight, 150);
}

/// An evaluation that is due where the run stops is not lost.
#[test]
fn a_stop_waits_for_the_evaluation() {
    let scratch = Scratch::new("due");
    let corpus = scratch.corpus();
    let flags = ["--eval.every", "1", "--train.steps", "8"];
    let [straight, run] = ["straight", "run"].map(|name| scratch.join(name));
    finish(&mut training(&straight, &corpus, &flags)).ok();
    let mut first = training(&run, &corpus, &flags);
    interrupt(&mut first, &run, 2, Signal::Interrupt).stopped();
    finish(&mut resuming(&run)).ok();
    assert_same_run(&run, &straight, 8);
}

/// A run that stopped early is finished: it does not go on when it is resumed.
#[test]
fn an_early_stop_is_an_end() {
    let scratch = Scratch::new("early");
    // With this learning rate the loss rises.
    let flags = [
        "--train.early_stop",
        "true",
        "--train.early_stop_patience",
        "2",
    ];
    let mut training = training(&scratch.join("run"), &scratch.corpus(), &flags);
    training.args([
        "--train.lr",
        "3",
        "--train.steps",
        "200",
        "--eval.every",
        "2",
    ]);
    let output = finish(&mut training).ok();
    assert!(output.stderr.contains("stopping early"), "{output:?}");
    let run = scratch.join("run");
    let before = metrics(&run);
    assert!(
        before.last().unwrap().contains("early stop: no better"),
        "{before:?}"
    );
    finish(&mut resuming(&run)).ok();
    assert_eq!(metrics(&run), before);
}

#[test]
fn threads_and_instruction_sets_change_no_bit() {
    let scratch = Scratch::new("threads");
    let corpus = scratch.corpus();
    let expected = scratch.join("expected");
    let slow = ["--train.batch_size", "4", "--eval.every", "0"];
    finish(&mut training(&expected, &corpus, &slow)).ok();
    let two = scratch.join("two");
    finish(training(&two, &corpus, &slow).args(["--run.threads", "2"])).ok();
    assert_same_run(&two, &expected, STEPS);
    // In the middle of a run as well.
    let mixed = scratch.join("mixed");
    let mut first = training(&mixed, &corpus, &slow);
    let first = first.env("SETUN_ISA", "reference");
    interrupt(first, &mixed, 5, Signal::Interrupt).stopped();
    finish(resuming(&mixed).args(["--run.threads", "2"])).ok();
    assert_same_run(&mixed, &expected, STEPS);
    let reference = scratch.join("reference");
    let mut plain = training(&reference, &corpus, &slow);
    finish(
        plain
            .args(["--run.threads", "2"])
            .env("SETUN_ISA", "reference"),
    )
    .ok();
    assert_same_run(&reference, &expected, STEPS);
}

#[test]
fn other_data_are_refused_and_nothing_is_lost() {
    let scratch = Scratch::new("data");
    let corpus = scratch.corpus();
    let expected = straight(&scratch, &corpus, &[]);
    let run = scratch.join("run");
    let mut first = training(&run, &corpus, &SETTINGS);
    interrupt(&mut first, &run, 6, Signal::Kill);
    let before = metrics(&run);
    let text = fs::read_to_string(&corpus).unwrap();
    scratch.write("corpus.txt", text.replacen("telephone", "telegraph", 3));
    let changed = [
        "the data have changed",
        "state.json",
        "put the files back",
        "--init",
    ];
    finish(&mut resuming(&run)).refused(1, &changed);
    assert_eq!(metrics(&run), before);
    scratch.write("corpus.txt", text);
    finish(&mut resuming(&run)).ok();
    assert_same_run(&run, &expected, STEPS);
}

type Damage = fn(&mut Vec<u8>);

#[test]
fn a_damaged_checkpoint_is_passed_over() {
    let scratch = Scratch::new("damage");
    let expected = straight(&scratch, &scratch.corpus(), &[]);
    let damages: [(&str, Damage); 5] = [
        ("latents.safetensors", |bytes| bytes[200_000] ^= 1),
        ("optimizer.safetensors", |bytes| {
            bytes.truncate(bytes.len() / 2)
        }),
        ("state.json", |bytes| bytes.push(b' ')),
        ("packed.safetensors", Vec::clear),
        ("MANIFEST.json", |bytes| bytes.truncate(bytes.len() / 2)),
    ];
    for (file, damage) in damages {
        let run = scratch.join(file);
        copy_dir(&expected, &run);
        edit(&checkpoint(&run, STEPS).join(file), damage);
        setun(["verify", run.to_str().unwrap()]).not_verified(&["step-00000020", file]);
        let output = finish(&mut resuming(&run)).ok();
        assert!(output.stderr.contains(file), "{output:?}");
        assert!(output.stderr.contains("after step 16\n"), "{output:?}");
        assert_same_run(&run, &expected, STEPS);
        setun(["verify", run.to_str().unwrap()]).ok();
    }
    // With none left there is nothing to go on from.
    let run = scratch.join("none");
    copy_dir(&expected, &run);
    for step in [15, 16, 20] {
        edit(&checkpoint(&run, step).join("state.json"), |bytes| {
            bytes.push(b' ')
        });
    }
    finish(&mut resuming(&run)).refused(1, &["no usable checkpoint", "step-00000015"]);
}

#[test]
fn settings_that_change_the_run_are_refused() {
    let scratch = Scratch::new("settings");
    let run = straight(&scratch, &scratch.corpus(), &[]);
    let refused = finish(resuming(&run).args(["--train.lr", "0.1"]));
    refused.refused(2, &["--train.lr would change", "--init"]);
    let with_recipe = finish(resuming(&run).arg(recipe()));
    with_recipe.refused(2, &["--resume", "cannot be used with"]);
    // Nor may the file be changed.
    edit(&run.join("settings.toml"), |bytes| {
        let text = String::from_utf8(bytes.clone()).unwrap();
        let longer = text.replace("\nsteps = 20\n", "\nsteps = 30\n");
        assert_ne!(longer, text);
        *bytes = longer.into_bytes();
    });
    let changed = finish(&mut resuming(&run));
    changed.refused(
        1,
        &[
            "settings.toml: train.steps is 30",
            "began with 20",
            "--init",
        ],
    );
    let nowhere = scratch.join("nowhere");
    let place = nowhere.join("settings.toml");
    finish(&mut resuming(&nowhere)).refused(2, &[place.to_str().unwrap()]);
    assert!(!nowhere.exists());
}

/// Two trainers in one directory would overwrite each other.
#[test]
fn a_run_in_progress_cannot_be_resumed() {
    let scratch = Scratch::new("lock");
    let run = scratch.join("run");
    let corpus = scratch.corpus();
    let steps = ["--train.steps", "100000", "--eval.every", "0"];
    let mut first = training(&run, &corpus, &steps);
    let mut first = first.stderr(std::process::Stdio::null()).spawn().unwrap();
    support::wait_for_step(&mut first, &run, 1);
    let refused = finish(&mut resuming(&run));
    first.kill().unwrap();
    first.wait().unwrap();
    let holder = format!("process {}", first.id());
    refused.refused(1, &["in use by another trainer", &holder]);
}

/// The second request to stop does not wait for the step, and harms nothing.
#[test]
fn a_second_signal_ends_at_once() {
    let scratch = Scratch::new("twice");
    let corpus = scratch.corpus();
    let flags = [
        "--train.batch_size",
        "128",
        "--train.steps",
        "8",
        "--checkpoint.every",
        "2",
    ];
    let expected = scratch.join("expected");
    finish(&mut training(&expected, &corpus, &flags)).ok();
    let run = scratch.join("run");
    let mut training = training(&run, &corpus, &flags);
    training.stdout(std::process::Stdio::null());
    let mut child = training
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    support::wait_for_step(&mut child, &run, 3);
    // Two kinds, because two of one kind may arrive as one.
    let script = format!("kill -INT {0}; kill -TERM {0}", child.id());
    let sent = std::process::Command::new("sh")
        .args(["-c", &script])
        .status();
    assert!(sent.unwrap().success());
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert!(!checkpoint(&run, 8).exists());
    finish(&mut resuming(&run)).ok();
    assert_same_run(&run, &expected, 8);
}

/// A run that was killed before its first checkpoint is started again by a resume.
#[test]
fn a_run_without_a_checkpoint_begins_anew() {
    let scratch = Scratch::new("anew");
    let corpus = scratch.corpus();
    let flags = ["--checkpoint.every", "0", "--eval.every", "0"];
    let flags = [&flags[..], &["--train.batch_size", "16"]].concat();
    let expected = scratch.join("expected");
    finish(&mut training(&expected, &corpus, &flags)).ok();
    let run = scratch.join("run");
    let mut first = training(&run, &corpus, &flags);
    interrupt(&mut first, &run, 5, Signal::Kill);
    assert!(!run.join("checkpoints").exists());
    let output = finish(&mut resuming(&run)).ok();
    assert!(output.stderr.contains("begins anew"), "{output:?}");
    assert_same_run(&run, &expected, STEPS);
}

/// As on a full disk, but with a limit on the size of files, which needs no rights: the
/// run tries three times and stops, and nothing of what was there is lost.
#[test]
fn a_run_that_cannot_save_stops_and_loses_nothing() {
    let scratch = Scratch::new("full");
    let corpus = scratch.corpus();
    let expected = straight(&scratch, &corpus, &[]);
    let run = scratch.join("run");
    let mut first = training(&run, &corpus, &SETTINGS);
    interrupt(&mut first, &run, 5, Signal::Interrupt).stopped();
    let before = files(&run.join("checkpoints"));
    // Half a kB each: metrics and records fit, weights do not.
    let script = "trap '' XFSZ; ulimit -f 200; exec \"$0\" train --resume \"$1\"";
    let mut limited = std::process::Command::new("sh");
    limited.args(["-c", script, env!("CARGO_BIN_EXE_setun")]);
    let output = finish(limited.arg(&run).env_remove("SETUN_ISA"));
    let words = ["3 saves in a row", "latents.safetensors", "--resume"];
    let output = output.refused(1, &words);
    assert_eq!(output.stderr.matches("warning: ").count(), 3, "{output:?}");
    assert_eq!(files(&run.join("checkpoints")), before);
    setun(["verify", run.to_str().unwrap()]).ok();
    finish(&mut resuming(&run)).ok();
    let lines = metrics(&run);
    let failures = lines
        .iter()
        .filter(|line| line.contains("could not be saved"));
    assert_eq!(failures.count(), 0, "the steps were done again");
    assert_same_run(&run, &expected, STEPS);
}
