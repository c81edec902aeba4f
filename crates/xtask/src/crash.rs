//! The crash harness: real trainings, killed at random instants and resumed, must end with
//! the losses and the weights of one that nobody disturbed.

use crate::random::Random;
use crate::session::{Trainings, damaged, end, newest, unfinished, wait, wait_for_save};
use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

/// Longest that a session may go on after SIGTERM.
const GRACE: Duration = Duration::from_secs(15);

/// Saves into which a kill may fall are among the next so many.
const SAVES_AHEAD: u64 = 6;

/// What to do.
pub struct Plan {
    /// The program.
    pub setun: PathBuf,
    /// How often to kill.
    pub kills: u64,
    /// Steps of each run.
    pub steps: u64,
    /// Seed of the instants.
    pub seed: u64,
    /// Whether to ask with SIGTERM.
    pub term: bool,
}

/// What happened.
#[derive(Default)]
struct Tally {
    kills: u64,
    in_save: u64,
    runs: u64,
    slowest: Duration,
    problems: Vec<String>,
}

/// A directory that goes when it is dropped; kept if something was wrong.
struct Workplace {
    path: PathBuf,
    keep: bool,
}

impl Drop for Workplace {
    fn drop(&mut self) {
        if !self.keep {
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}

/// Runs the experiment and prints its outcome; true if nothing was lost.
///
/// # Errors
/// A program that does not start, and an undisturbed training that fails.
pub fn crash(plan: &Plan) -> Result<bool, Box<dyn Error>> {
    let path = std::env::temp_dir().join(format!("setun-crash-{}", std::process::id()));
    fs::create_dir(&path)?;
    let mut workplace = Workplace { path, keep: false };
    let corpus = workplace.path.join("corpus.txt");
    fs::write(&corpus, text()?)?;
    let trainings = Trainings {
        setun: &plan.setun,
        corpus: &corpus,
        steps: plan.steps,
    };
    let straight = workplace.path.join("straight");
    let start = Instant::now();
    let ended = end(trainings.start(&straight)?, start)?;
    if !ended.success {
        return Err(format!("the undisturbed training failed: {}", ended.stderr).into());
    }
    let whole = start.elapsed();
    println!("undisturbed: {} steps in {whole:.1?}", plan.steps);
    let mut tally = Tally::default();
    let mut random = Random::new(plan.seed);
    while tally.kills < plan.kills {
        tally.runs += 1;
        let run = workplace.path.join(format!("run-{}", tally.runs));
        torture(plan, &trainings, &run, whole, &mut random, &mut tally)?;
        compare(&run, &straight, plan.steps, &mut tally.problems);
        if tally.problems.is_empty() {
            fs::remove_dir_all(&run)?;
        }
    }
    println!(
        "{} {} in {} runs, {} of them inside a save, slowest end {:.2?}, {:.0?} in all",
        tally.kills,
        if plan.term {
            "requests to stop"
        } else {
            "kills"
        },
        tally.runs,
        tally.in_save,
        tally.slowest,
        start.elapsed()
    );
    for problem in &tally.problems {
        println!("PROBLEM: {problem}");
    }
    workplace.keep = !tally.problems.is_empty();
    if workplace.keep {
        println!("the runs are kept in {}", workplace.path.display());
    } else {
        println!("nothing lost; losses and weights are those of the undisturbed run");
    }
    Ok(!workplace.keep)
}

/// Kills and resumes one run until it ends by itself.
fn torture(
    plan: &Plan,
    trainings: &Trainings<'_>,
    run: &Path,
    whole: Duration,
    random: &mut Random,
    tally: &mut Tally,
) -> Result<(), Box<dyn Error>> {
    loop {
        let mut child = trainings.start(run)?;
        let reached = tally.kills < plan.kills && {
            // At least half of the kills are to fall into a save.
            if 2 * tally.in_save <= tally.kills {
                let count = 1 + random.below(SAVES_AHEAD);
                let delay = Duration::from_micros(random.below(20_000));
                wait_for_save(&mut child, run, count, delay)?
            } else {
                let delay = whole.mul_f64(random.below(1000) as f64 / 1000.0);
                wait(&mut child, delay)?
            }
        };
        let committed = newest(run);
        let since = Instant::now();
        if reached {
            tally.in_save += u64::from(unfinished(run).is_some());
            stop(&mut child, plan.term)?;
            tally.kills += 1;
        }
        let ended = end(child, since)?;
        if reached {
            tally.slowest = tally.slowest.max(ended.waited);
        }
        if let Some(problem) = lost(run, committed) {
            tally.problems.push(problem);
        }
        let stopped = ended.stdout.starts_with("stopped after step ");
        if ended.success && !stopped {
            return Ok(());
        }
        if plan.term && !ended.success && ended.stderr.is_empty() {
            // The request came before there was anyone to hear it.
            continue;
        }
        if !reached || plan.term && !ended.success {
            let text = format!("{}: a session failed: {}", run.display(), ended.stderr);
            tally.problems.push(text);
            return Ok(());
        }
        if plan.term && (ended.waited > GRACE || newest(run) != stopped_after(&ended.stdout)) {
            let text = format!("{}: no checkpoint at the stop, or too slow", run.display());
            tally.problems.push(text);
        }
    }
}

fn stop(child: &mut Child, term: bool) -> std::io::Result<()> {
    if !term {
        return child.kill();
    }
    let pid = child.id().to_string();
    Command::new("kill")
        .args(["-TERM", &pid])
        .status()
        .map(drop)
}

/// The step in "stopped after step N; ...".
fn stopped_after(stdout: &str) -> u64 {
    let digits = stdout.trim_start_matches("stopped after step ");
    let digits = digits.split(';').next().unwrap_or_default();
    digits.parse().unwrap_or(u64::MAX)
}

/// What is gone or broken of the checkpoints up to `committed`.
fn lost(run: &Path, committed: u64) -> Option<String> {
    let damaged = damaged(run);
    if newest(run) < committed || !damaged.is_empty() {
        let (run, now) = (run.display(), newest(run));
        return Some(format!(
            "{run}: step {committed} was committed, {now} is the newest, damaged: {damaged:?}"
        ));
    }
    None
}

/// Compares what two runs computed.
fn compare(run: &Path, straight: &Path, steps: u64, problems: &mut Vec<String>) {
    let pairs = results(run, steps)
        .into_iter()
        .zip(results(straight, steps));
    for ((what, found), (_, expected)) in pairs {
        if found.is_none() || found != expected {
            problems.push(format!("{}: {what} differs", run.display()));
        }
    }
}

/// What a run computed; nothing where a file is missing.
fn results(run: &Path, steps: u64) -> [(&'static str, Option<String>); 4] {
    let last = format!("checkpoints/step-{steps:08}/MANIFEST.json");
    let packed = fs::read(run.join("export/packed/packed.safetensors"));
    [
        ("metrics.jsonl", metrics(run)),
        ("the hash of the parameters", params_hash(&run.join(last))),
        ("best.json", fs::read_to_string(run.join("best.json")).ok()),
        (
            "the packed export",
            packed.ok().map(|bytes| format!("{bytes:?}")),
        ),
    ]
}

/// The lines without the one number that is no result.
fn metrics(run: &Path) -> Option<String> {
    let text = fs::read_to_string(run.join("metrics.jsonl")).ok()?;
    let without_speed = |line: &str| match line.split_once("\"tokens_per_second\":") {
        Some((before, after)) => {
            let after = after.split_once(',').map_or("", |parts| parts.1);
            format!("{before}{after}\n")
        }
        None => format!("{line}\n"),
    };
    Some(text.lines().map(without_speed).collect())
}

fn params_hash(manifest: &Path) -> Option<String> {
    let text = fs::read_to_string(manifest).ok()?;
    let manifest: serde_json::Value = serde_json::from_str(&text).ok()?;
    Some(manifest["extra"]["params_hash"].as_str()?.to_owned())
}

/// A corpus that takes a fraction of a second.
fn text() -> Result<String, Box<dyn Error>> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../data/encyclopedia.txt");
    let text = fs::read_to_string(path)?;
    let documents: Vec<&str> = text.split("\n\n").take(36).collect();
    Ok(documents.join("\n\n"))
}
