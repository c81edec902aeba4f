//! What happens to a run when saving fails: one failure is a warning, three in a row are
//! an end, and what was committed stays.

mod tiny;

use setun_backend::Isa;
use setun_io::{Fault, FaultyOps, FileOps, Manifest, newest_valid_checkpoint};
use setun_train::TrainError;
use setun_train::run::{Observer, RunEnd, RunOptions, train};
use setun_train::settings::Settings;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tiny::Scratch;

/// Keeps what the user is told; asks to stop at a step.
#[derive(Default)]
struct Listener {
    messages: Vec<String>,
    stop_at: Option<u64>,
    stop_after_rewind: bool,
    stop: Arc<AtomicBool>,
}

impl Observer for Listener {
    fn message(&mut self, text: &str) {
        self.messages.push(text.to_owned());
        if self.stop_after_rewind && text.starts_with("went back") {
            self.stop.store(true, Ordering::Relaxed);
        }
    }

    fn progress(&mut self, stage: &str, done: u64, _: u64, _: &str) {
        if stage == "training" && self.stop_at == Some(done) {
            self.stop.store(true, Ordering::Relaxed);
        }
    }
}

const FLAGS: [(&str, &str); 6] = [
    ("train.steps", "9"),
    ("checkpoint.every", "2"),
    ("eval.every", "0"),
    ("sample.prompts", "0"),
    ("export.formats", ""),
    ("train.rewind_steps", "3"),
];

fn corpus(scratch: &Scratch) -> PathBuf {
    let path = scratch.join("corpus.txt");
    std::fs::write(&path, tiny::corpus()).unwrap();
    path
}

fn settings_with(scratch: &Scratch, run: &str, more: &[(&str, &str)]) -> Settings {
    let output = scratch.join(run);
    let output = [("run.output", output.to_str().unwrap())];
    let flags = [FLAGS.as_slice(), &output, more].concat();
    tiny::settings(&corpus(scratch), &flags)
}

/// Trains through `files`; resumes if the run exists.
fn run(
    settings: Settings,
    files: Arc<dyn FileOps>,
    listener: &mut Listener,
) -> Result<RunEnd, TrainError> {
    let directory = settings.output().to_path_buf();
    let resume = directory.join("settings.toml").exists();
    let stop = Arc::clone(&listener.stop);
    let options = RunOptions {
        resume: resume.then_some(directory.as_path()),
        files,
        ..RunOptions::new(Isa::detect(), &stop)
    };
    let settings = match resume {
        true => Settings::load_run(&directory, &[]).unwrap(),
        false => settings,
    };
    train(settings, &options, listener)
}

fn undisturbed(settings: Settings) -> RunEnd {
    run(
        settings,
        Arc::new(setun_io::RealOps),
        &mut Listener::default(),
    )
    .unwrap()
}

/// Hash of the weights after the last step.
fn params_hash(run: &Path) -> String {
    let manifest = Manifest::read(&run.join("checkpoints/step-00000009")).unwrap();
    manifest.extra["params_hash"].as_str().unwrap().to_owned()
}

fn leftovers(run: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(run.join("checkpoints")).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.starts_with('.')).collect()
}

/// Every so-many-th operation of a whole run fails, once or for ever: the run survives or
/// stops, and resumed it ends with the same weights.
#[test]
fn every_failure_of_a_run_is_survived_or_resumed() {
    let scratch = Scratch::new("sweep");
    undisturbed(settings_with(&scratch, "straight", &[]));
    let expected = params_hash(&scratch.join("straight"));
    let (mut survived, mut stopped) = (0, 0);
    for number in (0..).step_by(7) {
        let forever = number % 2 == 1;
        let kind = [ErrorKind::StorageFull, ErrorKind::Other][(number / 2 % 2) as usize];
        let ops = FaultyOps::new(Fault::Error(kind), number, forever);
        let name = format!("run-{number}");
        let directory = scratch.join(&name);
        let mut listener = Listener::default();
        let settings = settings_with(&scratch, &name, &[]);
        let ended = run(settings.clone(), Arc::new(ops.clone()), &mut listener);
        if ops.count() <= number {
            // All operations of a run were reached.
            assert!(number > 100, "{number} operations");
            break;
        }
        match ended {
            Ok(_) => survived += 1,
            Err(_) => {
                stopped += 1;
                undisturbed(settings);
            }
        }
        assert_eq!(params_hash(&directory), expected, "operation {number}");
        newest_valid_checkpoint(&directory).unwrap();
        if !forever {
            // One failure alone leaves nothing behind.
            assert_eq!(leftovers(&directory), [""; 0], "operation {number}");
        }
        std::fs::remove_dir_all(directory).unwrap();
    }
    println!("{survived} survived, {stopped} stopped and were resumed");
    assert!(survived > 0 && stopped > 0);
}

#[test]
fn a_failed_save_warns_and_the_run_goes_on() {
    let scratch = Scratch::new("warn");
    undisturbed(settings_with(&scratch, "straight", &[]));
    let mut warned = false;
    for number in 20..60 {
        let name = format!("run-{number}");
        let fault = Fault::Error(ErrorKind::StorageFull);
        let ops = Arc::new(FaultyOps::new(fault, number, false));
        let mut listener = Listener::default();
        let ended = run(settings_with(&scratch, &name, &[]), ops, &mut listener);
        let Some(warning) = listener.messages.iter().find(|m| m.starts_with("warning")) else {
            continue;
        };
        warned = true;
        assert!(
            warning.contains("step") && warning.contains("free some space"),
            "{warning}"
        );
        assert!(matches!(ended, Ok(RunEnd::Finished(_))));
        let metrics = std::fs::read_to_string(scratch.join(&name).join("metrics.jsonl")).unwrap();
        assert!(metrics.contains("could not be saved"), "{metrics}");
        let expected = params_hash(&scratch.join("straight"));
        assert_eq!(params_hash(&scratch.join(&name)), expected);
        break;
    }
    assert!(warned, "no save failed");
}

/// A disk that stays full from some moment on.
#[test]
fn three_failures_in_a_row_stop_the_run() {
    let scratch = Scratch::new("three");
    undisturbed(settings_with(&scratch, "straight", &[]));
    // Stopped after step 3, then the disk is full.
    let mut listener = Listener {
        stop_at: Some(3),
        ..Listener::default()
    };
    let settings = settings_with(&scratch, "run", &[]);
    let files = Arc::new(setun_io::RealOps);
    let ended = run(settings.clone(), files, &mut listener).unwrap();
    assert!(matches!(ended, RunEnd::Stopped { step: 3, .. }));
    // The operations that begin the session pass: settings, record, and the space.
    let ops = FaultyOps::new(Fault::Error(ErrorKind::StorageFull), 17, true);
    let mut listener = Listener::default();
    let error = match run(settings.clone(), Arc::new(ops), &mut listener) {
        Err(error) => error.to_string(),
        Ok(_) => panic!("a full disk was not noticed"),
    };
    let warnings = listener
        .messages
        .iter()
        .filter(|m| m.starts_with("warning"));
    assert_eq!(warnings.count(), 3, "{:#?} {error}", listener.messages);
    for words in ["3 saves in a row", "free some space", "--resume"] {
        assert!(error.contains(words), "{error}");
    }
    let directory = scratch.join("run");
    assert_eq!(newest_valid_checkpoint(&directory).unwrap().1, 3);
    undisturbed(settings);
    assert_eq!(
        params_hash(&directory),
        params_hash(&scratch.join("straight"))
    );
    assert_eq!(leftovers(&directory), [""; 0]);
}

/// Says that there is no room.
struct NoRoom;

impl FileOps for NoRoom {
    fn create_dir(&self, path: &Path) -> std::io::Result<()> {
        setun_io::RealOps.create_dir(path)
    }
    fn create_file(&self, path: &Path) -> std::io::Result<Box<dyn setun_io::OutputFile>> {
        setun_io::RealOps.create_file(path)
    }
    fn open_file(&self, path: &Path) -> std::io::Result<Box<dyn std::io::Read>> {
        setun_io::RealOps.open_file(path)
    }
    fn sync_dir(&self, path: &Path) -> std::io::Result<()> {
        setun_io::RealOps.sync_dir(path)
    }
    fn rename(&self, from: &Path, to: &Path) -> std::io::Result<()> {
        setun_io::RealOps.rename(from, to)
    }
    fn remove_file(&self, path: &Path) -> std::io::Result<()> {
        setun_io::RealOps.remove_file(path)
    }
    fn remove_dir_all(&self, path: &Path) -> std::io::Result<()> {
        setun_io::RealOps.remove_dir_all(path)
    }
    fn available_bytes(&self, _: &Path) -> std::io::Result<Option<u64>> {
        Ok(Some(100_000))
    }
}

#[test]
fn a_run_without_room_does_not_begin() {
    let scratch = Scratch::new("room");
    let mut listener = Listener::default();
    let settings = settings_with(&scratch, "run", &[]);
    let ended = run(settings, Arc::new(NoRoom), &mut listener);
    let error = ended.err().unwrap().to_string();
    assert!(error.contains("0.1 MiB of free space"), "{error}");
    assert!(error.contains("--run.output"), "{error}");
    assert!(!scratch.join("run/settings.toml").exists());
}

/// Too many bad steps: back to an earlier checkpoint, past the data in between, twice with
/// the same result, and resumed in the middle with the same result as well.
#[test]
fn repeated_trouble_goes_back_and_passes_the_data() {
    let scratch = Scratch::new("rewind");
    // As soon as there is a window, whatever lies above its mean is called a spike.
    let flags = [
        ("train.steps", "150"),
        ("train.spike_sigma", "0.01"),
        ("train.max_bad_steps", "2"),
        ("train.max_rewinds", "2"),
    ];
    let mut ends = Vec::new();
    for (name, stops) in [("one", false), ("two", false), ("three", true)] {
        let mut listener = Listener {
            stop_after_rewind: stops,
            ..Listener::default()
        };
        let settings = settings_with(&scratch, name, &flags);
        let mut ended = run(settings.clone(), Arc::new(setun_io::RealOps), &mut listener);
        if stops {
            assert!(matches!(ended, Ok(RunEnd::Stopped { .. })));
            listener.stop_after_rewind = false;
            listener.stop.store(false, Ordering::Relaxed);
            ended = run(settings, Arc::new(setun_io::RealOps), &mut listener);
        }
        let error = ended.err().expect("there is no way out").to_string();
        assert!(error.contains("went back 2 times already"), "{error}");
        let back = |m: &&String| m.starts_with("went back from step");
        let rewinds: Vec<String> = listener.messages.iter().filter(back).cloned().collect();
        assert_eq!(rewinds.len(), 2, "{:#?}", listener.messages);
        assert!(rewinds[0].contains("batches further"), "{rewinds:?}");
        let metrics = std::fs::read_to_string(scratch.join(name).join("metrics.jsonl")).unwrap();
        let without_speed = |line: &str| match line.split_once("\"tokens_per_second\":") {
            Some((before, after)) => format!("{before}{}", after.split_once(',').unwrap().1),
            None => line.to_owned(),
        };
        let metrics: Vec<String> = metrics.lines().map(without_speed).collect();
        for rewind in &rewinds {
            assert!(metrics.iter().any(|line| line.contains(rewind)), "{rewind}");
        }
        ends.push((error, rewinds, metrics));
    }
    assert_eq!(ends[0], ends[1]);
    assert_eq!(ends[0], ends[2]);
}
