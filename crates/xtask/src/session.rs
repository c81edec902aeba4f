//! One process that trains, from its start to the instant at which it is stopped.

use setun_io::{checkpoints, parse_checkpoint_name};
use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

/// Longest that a session may take: far beyond any of a tiny model.
const PATIENCE: Duration = Duration::from_secs(300);

/// How the processes of an experiment are started.
pub struct Trainings<'a> {
    /// The program.
    pub setun: &'a Path,
    /// Text to learn from.
    pub corpus: &'a Path,
    /// Steps of a run.
    pub steps: u64,
}

/// How a process ended.
pub struct Ended {
    /// Whether it ended by itself with success.
    pub success: bool,
    /// What it printed.
    pub stdout: String,
    /// Its messages.
    pub stderr: String,
    /// From the signal, if there was one, to the end.
    pub waited: Duration,
}

impl Trainings<'_> {
    /// Starts a run in `run`, or goes on with the one that is there.
    pub fn start(&self, run: &Path) -> std::io::Result<Child> {
        let mut command = Command::new(self.setun);
        command.arg("train").env_remove("SETUN_ISA");
        if run.join("settings.toml").exists() {
            command.arg("--resume").arg(run);
        } else {
            let recipe = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../recipes/tiny.toml");
            command.arg(recipe).arg("--run.output").arg(run);
            command.arg("--data.train").arg(self.corpus);
            command.args(["--train.steps", &self.steps.to_string()]);
            command.args(["--tokenizer.vocab_size", "384", "--run.threads", "1"]);
            command.args(["--checkpoint.every", "3", "--eval.every", "20"]);
            command.args(["--sample.prompts", "0"]);
        }
        command.stdin(Stdio::null());
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command.spawn()
    }
}

/// Waits until `child` has ended; `since` is when it was asked to.
pub fn end(mut child: Child, since: Instant) -> Result<Ended, Box<dyn Error>> {
    while child.try_wait()?.is_none() {
        if since.elapsed() > PATIENCE {
            child.kill()?;
            return Err("a session did not end".into());
        }
        sleep(Duration::from_millis(1));
    }
    let waited = since.elapsed();
    let output = child.wait_with_output()?;
    Ok(Ended {
        // Stopped on request is 130.
        success: output.status.success() || output.status.code() == Some(130),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        waited,
    })
}

/// Waits for the `count`-th save from now, then `delay` into it; false if the process
/// ended before.
pub fn wait_for_save(
    child: &mut Child,
    run: &Path,
    count: u64,
    delay: Duration,
) -> std::io::Result<bool> {
    let mut seen: Option<PathBuf> = None;
    let mut left = count;
    while child.try_wait()?.is_none() {
        let saving = unfinished(run);
        if saving.is_some() && saving != seen {
            left -= 1;
            if left == 0 {
                spin(delay);
                return Ok(true);
            }
        }
        seen = saving.or(seen);
        std::thread::yield_now();
    }
    Ok(false)
}

/// Waits `delay`; false if the process ended before.
pub fn wait(child: &mut Child, delay: Duration) -> std::io::Result<bool> {
    let start = Instant::now();
    while start.elapsed() < delay {
        if child.try_wait()?.is_some() {
            return Ok(false);
        }
        sleep(Duration::from_micros(200));
    }
    Ok(child.try_wait()?.is_none())
}

/// A directory of a save that is in progress, or was interrupted.
pub fn unfinished(run: &Path) -> Option<PathBuf> {
    let entries = fs::read_dir(run.join("checkpoints")).ok()?;
    let mut paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
    paths.find(|path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        name.starts_with(".tmp-step-")
    })
}

/// Step of the newest checkpoint by name, 0 without one.
pub fn newest(run: &Path) -> u64 {
    let all = checkpoints(run).unwrap_or_default();
    all.first().map_or(0, |checkpoint| checkpoint.0)
}

/// The checkpoint names of a run that do not verify.
pub fn damaged(run: &Path) -> Vec<String> {
    let all = checkpoints(run).unwrap_or_default();
    let bad = all
        .iter()
        .filter(|c| setun_io::verify_manifest(&c.1).is_err());
    let name = |path: &Path| {
        path.file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned()
    };
    let names = bad.map(|c| name(&c.1));
    names
        .filter(|name| parse_checkpoint_name(name).is_some())
        .collect()
}

/// Sleeping would be too coarse: a save of a tiny model takes milliseconds.
fn spin(delay: Duration) {
    let start = Instant::now();
    while start.elapsed() < delay {
        std::hint::spin_loop();
    }
}
