//! Power is lost at every point of a sequence of saves, in every way that the model of
//! `journal` knows: the newest checkpoint that was reported as committed always reads.

#[path = "power_loss/journal.rs"]
mod journal;

use journal::{Entry, JournalOps, Op, ROOT, Random, state_after};
use serde_json::json;
use setun_io::{
    DirWriter, FileOps, Retention, RunLock, checkpoint_name, checkpoints, newest_valid_checkpoint,
    retire, verify_manifest, write_atomic_with,
};
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// States for each prefix of the journal.
const DRAWS: usize = 72;

struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let name = format!("setun-io-power-{}-{name}", std::process::id());
        let path = std::env::temp_dir().join(name);
        let _ = fs::remove_dir_all(&path);
        fs::create_dir(&path).unwrap();
        Self(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn save(ops: Arc<dyn FileOps>, run: &Path, step: u64) {
    let parent = run.join("checkpoints");
    let mut dir = DirWriter::create_with(ops, &parent, &checkpoint_name(step)).unwrap();
    dir.file("latents", |out| {
        for part in 0..3u8 {
            out.write_all(&[part + step as u8; 40])?;
            // Each part is a write of its own to the file.
            out.flush()?;
        }
        Ok(())
    })
    .unwrap();
    dir.file("state.json", |out| write!(out, "{{\"step\": {step}}}"))
        .unwrap();
    dir.commit(json!({ "step": step })).unwrap();
}

/// What a run does with its checkpoints, and what it is told at which point.
fn record_a_run(name: &str) -> Vec<Op> {
    let scratch = Scratch::new(name);
    let run = scratch.0.clone();
    let ops = JournalOps::new(&run);
    for step in 1..=8 {
        save(Arc::new(ops.clone()), &run, step);
        ops.report("checkpoint", step);
        write_atomic_with(&ops, &run.join("best.json"), step.to_string().as_bytes()).unwrap();
        ops.report("best", step);
        let retention = Retention {
            keep_last: 2,
            keep_every: 4,
            protected: &[],
            verified: Some(step),
        };
        retire(&ops, &run, &retention).unwrap();
    }
    ops.ops()
}

/// What was lost, over `draws` states behind each operation; the number of states, and of different ones.
fn lose_power(ops: &[Op], draws: usize, scratch: &Scratch) -> (Vec<String>, usize, usize) {
    let mut random = Random::new(7);
    let mut seen: BTreeSet<(u64, u64, Entry)> = BTreeSet::new();
    let (mut lost, mut states) = (Vec::new(), 0);
    for end in 0..=ops.len() {
        let reported = |wanted: &str| {
            let of = |op: &Op| match op {
                Op::Reported { what, number } if *what == wanted => Some(*number),
                _ => None,
            };
            ops[..end].iter().rev().find_map(of).unwrap_or(0)
        };
        let known = (reported("checkpoint"), reported("best"));
        for _ in 0..draws {
            states += 1;
            let state = state_after(&ops[..end], &mut random);
            if !seen.insert((known.0, known.1, state.clone())) {
                continue;
            }
            let path = scratch.0.join("run");
            fs::create_dir(&path).unwrap();
            state.write_below(&path).unwrap();
            if let Err(what) = check(&path, known, seen.len().is_multiple_of(16)) {
                lost.push(format!("after operation {end}: {what}"));
            }
            fs::remove_dir_all(&path).unwrap();
        }
    }
    (lost, states, seen.len())
}

/// Reads a run after the loss of power as a resumed training does.
fn check(run: &Path, (step, best): (u64, u64), go_on: bool) -> Result<(), String> {
    let newest = newest_valid_checkpoint(run);
    if step > 0 {
        let (_, found, skipped) = newest.map_err(|e| e.to_string())?;
        if found < step || !skipped.is_empty() {
            return Err(format!(
                "step {step} was committed, {found} reads: {skipped:?}"
            ));
        }
    }
    // What has the name of a checkpoint is one.
    for (_, path) in checkpoints(run).map_err(|e| e.to_string())? {
        verify_manifest(&path).map_err(|e| e.to_string())?;
    }
    let text = fs::read_to_string(run.join("best.json")).unwrap_or_default();
    let found = text.parse().unwrap_or(0);
    if found < best {
        return Err(format!(
            "best.json of step {best} was written, {text:?} reads"
        ));
    }
    if go_on {
        let lock = RunLock::acquire(run).map_err(|e| e.to_string())?;
        lock.remove_leftovers().map_err(|e| e.to_string())?;
        save(Arc::new(setun_io::RealOps), run, 100);
        let newest = newest_valid_checkpoint(run).map_err(|e| e.to_string())?.1;
        let mut left = fs::read_dir(run.join("checkpoints")).unwrap();
        let hidden = left.any(|e| e.unwrap().file_name().to_string_lossy().starts_with('.'));
        if newest != 100 || hidden {
            return Err(format!("going on: step {newest}, leftovers: {hidden}"));
        }
    }
    Ok(())
}

#[test]
fn what_was_reported_as_committed_survives_the_loss_of_power() {
    let ops = record_a_run("record");
    let scratch = Scratch::new("replay");
    let (lost, states, different) = lose_power(&ops, DRAWS, &scratch);
    println!(
        "{} operations, {states} states, {different} different",
        ops.len()
    );
    assert!(states >= 10_000, "{states} states");
    assert!(lost.is_empty(), "{} lost: {:#?}", lost.len(), &lost[..1]);
}

/// A saver that forgot to sync would be found out, so the simulation can fail.
#[test]
fn forgotten_syncs_are_found() {
    let ops = record_a_run("record-again");
    let scratch = Scratch::new("forgotten");
    let is_dir = |wanted: usize| {
        ops.iter()
            .any(|op| matches!(op, Op::Create { node, is_dir: true, .. } if *node == wanted))
            || wanted == ROOT
    };
    for dirs in [false, true] {
        let forgotten = |op: &&Op| !matches!(op, Op::Sync { node } if is_dir(*node) == dirs);
        let careless: Vec<Op> = ops.iter().filter(forgotten).cloned().collect();
        assert!(careless.len() < ops.len());
        let (lost, ..) = lose_power(&careless[..careless.len() / 4], 8, &scratch);
        assert!(!lost.is_empty(), "directories: {dirs}");
    }
}
