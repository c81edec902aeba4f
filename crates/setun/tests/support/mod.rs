//! What the tests of the command line share: scratch directories, a small corpus, the
//! built program and its output, and looks into what it wrote.

// Each test binary has its own copy and uses a part of it.
#![allow(dead_code)]

use serde_json::Value;
use std::ffi::OsStr;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// A directory of one test; removed at its end, also when it fails.
pub struct Scratch(PathBuf);

impl Scratch {
    /// Creates an empty directory for the test `name`.
    pub fn new(name: &str) -> Self {
        let name = format!("setun-{}-{name}", std::process::id());
        let path = std::env::temp_dir().join(name);
        let _ = fs::remove_dir_all(&path);
        fs::create_dir(&path).unwrap();
        Self(path)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    pub fn join(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// Writes a file and returns its path.
    pub fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
        let path = self.join(name);
        fs::write(&path, bytes).unwrap();
        path
    }

    /// A corpus that takes a fraction of a second: some documents of the encyclopedia.
    pub fn corpus(&self) -> PathBuf {
        self.write("corpus.txt", documents(0..36))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Documents of the encyclopedia, separated by blank lines.
pub fn documents(range: Range<usize>) -> String {
    let text = fs::read_to_string(workspace().join("data/encyclopedia.txt")).unwrap();
    let all: Vec<&str> = text.split("\n\n").collect();
    all[range].join("\n\n")
}

pub fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// The recipe of the tests.
pub fn recipe() -> PathBuf {
    workspace().join("recipes/tiny.toml")
}

/// How the program ended.
#[derive(Debug)]
pub struct Output {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Output {
    fn of(output: std::process::Output) -> Self {
        Self {
            code: output.status.code(),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }

    /// Insists on success.
    #[track_caller]
    pub fn ok(self) -> Self {
        assert_eq!(self.code, Some(0), "{self:#?}");
        assert!(!self.stderr.contains("error:"), "{self:#?}");
        self
    }

    /// Insists that it was asked to stop, and did.
    #[track_caller]
    pub fn stopped(self) -> Self {
        assert_eq!(self.code, Some(130), "{self:#?}");
        assert!(!self.stderr.contains("error:"), "{self:#?}");
        self
    }

    /// Insists on exit code `code` and one error line that contains all of `words`.
    #[track_caller]
    pub fn refused(self, code: i32, words: &[&str]) -> Self {
        assert_eq!(self.code, Some(code), "{self:#?}");
        assert!(!self.stderr.contains("panicked"), "{self:#?}");
        let is_error = |line: &&str| line.starts_with("error:");
        let errors: Vec<&str> = self.stderr.lines().filter(is_error).collect();
        assert_eq!(errors.len(), 1, "{self:#?}");
        for word in words {
            assert!(self.stderr.contains(word), "{word:?} in {self:#?}");
        }
        self
    }

    /// Insists on a verification that ran and found failures; each of `words` must be in
    /// one of their lines.
    #[track_caller]
    pub fn not_verified(self, words: &[&str]) -> Self {
        assert_eq!(self.code, Some(1), "{self:#?}");
        assert_eq!(self.stderr.lines().count(), 1, "{self:#?}");
        assert!(self.stderr.starts_with("error: "), "{self:#?}");
        assert!(self.stdout.contains("NOT verified"), "{self:#?}");
        let failures: Vec<&str> = self
            .stdout
            .lines()
            .filter(|line| line.starts_with("FAILED:"))
            .collect();
        for word in words {
            let found = failures.iter().any(|line| line.contains(word));
            assert!(found, "{word:?} in {failures:#?}");
        }
        self
    }
}

/// The program with arguments, in an environment that says nothing.
pub fn command<A: AsRef<OsStr>>(args: impl IntoIterator<Item = A>) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_setun"));
    command.args(args).env_remove("SETUN_ISA");
    command.stdin(Stdio::null());
    command
}

/// Runs a command to its end.
pub fn finish(command: &mut Command) -> Output {
    Output::of(command.output().unwrap())
}

/// Runs the program to its end.
pub fn setun<A: AsRef<OsStr>>(args: impl IntoIterator<Item = A>) -> Output {
    finish(&mut command(args))
}

/// `setun train` of the tiny recipe on `corpus` into `run`, with `flags` on top.
pub fn training(run: &Path, corpus: &Path, flags: &[&str]) -> Command {
    let mut training = command([OsStr::new("train"), recipe().as_os_str()]);
    training.args([OsStr::new("--run.output"), run.as_os_str()]);
    training.args([OsStr::new("--data.train"), corpus.as_os_str()]);
    training.args(["--tokenizer.vocab_size", "384", "--run.threads", "1"]);
    training.args(flags);
    training
}

/// `setun train --resume RUN`.
pub fn resuming(run: &Path) -> Command {
    command([OsStr::new("train"), OsStr::new("--resume"), run.as_os_str()])
}

/// A signal of `kill`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Signal {
    /// Finish the step, save, stop.
    Interrupt,
    /// Stop at once, like a crash.
    Kill,
}

/// Starts `training` and sends `signal` when the metrics show `step`, or the first step
/// after those that they show already.
pub fn interrupt(training: &mut Command, run: &Path, step: u64, signal: Signal) -> Output {
    let step = step.max(last_step(run) + 1);
    training.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = training.spawn().unwrap();
    wait_for_step(&mut child, run, step);
    let flag = match signal {
        Signal::Interrupt => "-INT",
        Signal::Kill => "-KILL",
    };
    let pid = child.id().to_string();
    assert!(
        Command::new("kill")
            .args([flag, &pid])
            .status()
            .unwrap()
            .success()
    );
    Output::of(child.wait_with_output().unwrap())
}

fn last_step(run: &Path) -> u64 {
    let metrics = fs::read_to_string(run.join("metrics.jsonl")).unwrap_or_default();
    let mut steps = metrics.lines().filter_map(|line| {
        let rest = line.strip_prefix("{\"kind\":\"step\",\"step\":")?;
        rest.split(',').next()?.parse().ok()
    });
    steps.next_back().unwrap_or(0)
}

/// Waits until the metrics of `run` show `step`.
pub fn wait_for_step(child: &mut Child, run: &Path, step: u64) {
    let line = format!("{{\"kind\":\"step\",\"step\":{step},");
    let start = Instant::now();
    let shown = || fs::read_to_string(run.join("metrics.jsonl")).is_ok_and(|m| m.contains(&line));
    while !shown() {
        assert_eq!(
            child.try_wait().unwrap(),
            None,
            "it ended before step {step}"
        );
        assert!(start.elapsed() < Duration::from_secs(60), "no step {step}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A JSON file.
#[track_caller]
pub fn json(path: &Path) -> Value {
    let text = fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// The lines of `metrics.jsonl` as they are, without the one number that is no result.
pub fn metrics(run: &Path) -> Vec<String> {
    let text = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let without_speed = |line: &str| match line.split_once("\"tokens_per_second\":") {
        Some((before, after)) => format!("{before}{}", after.split_once(',').unwrap().1),
        None => line.to_owned(),
    };
    text.lines().map(without_speed).collect()
}

/// The held-out evaluation of a run after `step` steps.
pub fn evaluation(run: &Path, step: u64) -> Value {
    let start = format!("{{\"kind\":\"eval\",\"step\":{step},");
    let all = metrics(run);
    let line = all.iter().find(|line| line.starts_with(&start)).unwrap();
    serde_json::from_str(line).unwrap()
}

/// What the manifest of a checkpoint says about its weights.
pub fn params_hash(run: &Path, step: u64) -> String {
    let manifest = json(&checkpoint(run, step).join("MANIFEST.json"));
    manifest["extra"]["params_hash"]
        .as_str()
        .unwrap()
        .to_owned()
}

/// Directory of a checkpoint.
pub fn checkpoint(run: &Path, step: u64) -> PathBuf {
    run.join(format!("checkpoints/step-{step:08}"))
}

/// Paths of all files below `dir`, relative to it, sorted.
pub fn files(dir: &Path) -> Vec<String> {
    fn collect(base: &Path, dir: &Path, found: &mut Vec<String>) {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                collect(base, &path, found);
            } else {
                let path = path.strip_prefix(base).unwrap();
                found.push(path.to_str().unwrap().to_owned());
            }
        }
    }
    let mut found = Vec::new();
    collect(dir, dir, &mut found);
    found.sort();
    found
}

/// Copies a directory with everything in it.
pub fn copy_dir(from: &Path, to: &Path) {
    for file in files(from) {
        let target = to.join(&file);
        fs::create_dir_all(target.parent().unwrap()).unwrap();
        fs::copy(from.join(&file), target).unwrap();
    }
}

/// Changes the bytes of a file.
pub fn edit(path: &Path, change: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = fs::read(path).unwrap();
    change(&mut bytes);
    fs::write(path, bytes).unwrap();
}

/// Where the payload of a tensor lies in a safetensors file.
pub fn tensor_bytes(file: &[u8], name: &str) -> Range<usize> {
    let header = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    let tensors: Value = serde_json::from_slice(&file[8..8 + header]).unwrap();
    let offset = |i: usize| tensors[name]["data_offsets"][i].as_u64().unwrap() as usize;
    8 + header + offset(0)..8 + header + offset(1)
}
