//! What a run says about itself is what it was: its data, its steps, its files, its place.

mod tiny;

use setun_backend::Isa;
use setun_train::finish::Finished;
use setun_train::prepare::prepare;
use setun_train::report::record::{DataFacts, DuplicatePair};
use setun_train::run::{Observer, RunEnd, RunOptions, train};
use setun_train::settings::Settings;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use tiny::Scratch;

/// Keeps what the user is told.
#[derive(Default)]
struct Listener(Vec<String>);

impl Observer for Listener {
    fn message(&mut self, text: &str) {
        self.0.push(text.to_owned());
    }

    fn progress(&mut self, _: &str, _: u64, _: u64, _: &str) {}
}

const FLAGS: [(&str, &str); 4] = [
    ("train.steps", "9"),
    ("eval.every", "0"),
    ("sample.prompts", "0"),
    ("export.formats", ""),
];

fn write(scratch: &Scratch, name: &str, text: &str) -> PathBuf {
    let path = scratch.join(name);
    std::fs::write(&path, text).unwrap();
    path
}

fn finish(settings: Settings) -> (Box<Finished>, Vec<String>) {
    let (stop, mut listener) = (AtomicBool::new(false), Listener::default());
    let options = RunOptions::new(Isa::detect(), &stop);
    match train(settings, &options, &mut listener).unwrap() {
        RunEnd::Finished(finished) => (finished, listener.0),
        RunEnd::Stopped { .. } => panic!("nobody has stopped it"),
    }
}

/// Words `name0 name1 ...`, so many.
fn words(name: &str, count: usize) -> String {
    let list: Vec<String> = (0..count).map(|i| format!("{name}{i}")).collect();
    list.join(" ")
}

/// A short exact copy, a long one, and a document that holds a part of another.
#[test]
fn copies_of_held_out_text_are_counted_named_and_left_out() {
    let scratch = Scratch::new("copies");
    let (short, long) = ("A few words only.", words("long", 20));
    let (corpus, whole) = (tiny::corpus(), words("part", 30));
    let (part, own) = (words("part", 20), words("own", 20));
    let train = [corpus.as_str(), short, &whole, &long].join("\n\n");
    let valid = [short, &long, &part, &own].join("\n\n");
    let train_file = write(&scratch, "train.txt", &train);
    let valid_file = write(&scratch, "valid.txt", &valid);
    let facts = |drop: &str| -> DataFacts {
        let flags = [
            ("data.valid", valid_file.to_str().unwrap()),
            ("data.drop_near_duplicates", drop),
        ];
        let settings = tiny::settings(&train_file, &flags);
        let prepared = prepare(&settings, None, &scratch.0, &mut Listener::default());
        prepared.unwrap().facts
    };
    let kept = facts("false");
    let found = kept.duplicates.unwrap();
    assert_eq!((found.exact, found.exact_dropped), (2, Some(0)));
    assert_eq!((found.dropped, found.across_split), (0, 2));
    // Each with the document that it is in.
    let place = |path: &Path, text: &str, start: &str| {
        let byte = text.find(start).unwrap();
        format!("{}, byte {byte}", path.display())
    };
    let pair = |start: &str| DuplicatePair {
        valid: place(&valid_file, &valid, start),
        train: place(&train_file, &train, start),
        similarity: 1.0,
    };
    assert_eq!(found.examples, [pair("long0"), pair("part0")]);

    let left = facts("true");
    let found = left.duplicates.unwrap();
    assert_eq!((found.exact, found.exact_dropped), (2, Some(2)));
    assert_eq!((found.dropped, found.across_split), (1, 0));
    assert_eq!(left.train_documents, kept.train_documents - 3);
    assert_eq!(left.valid_documents, kept.valid_documents);
}

#[test]
fn the_default_directory_is_recorded_as_it_became() {
    let scratch = Scratch::new("default-output");
    let corpus = write(&scratch, "corpus.txt", &tiny::corpus());
    let mut settings = tiny::settings(&corpus, &FLAGS);
    settings.run.output = Some(scratch.join("run"));
    for name in ["run", "run-2"] {
        let (finished, _) = finish(settings.clone());
        let expected = scratch.join(name);
        assert_eq!(finished.run, expected);
        let recorded = &finished.report.run.settings["run"]["output"];
        assert_eq!(recorded, expected.to_str().unwrap());
        let written = std::fs::read_to_string(expected.join("settings.toml")).unwrap();
        assert!(
            written.contains(&format!("output = \"{}\"", expected.display())),
            "{written}"
        );
        // Without an export, the trits in the checkpoint are the model.
        let file = &finished.report.run.files[0];
        assert_eq!(file.path, "checkpoints/step-00000009/packed.safetensors");
        assert_eq!(
            file.bytes,
            expected.join(&file.path).metadata().unwrap().len()
        );
    }
}

/// With few lines in the metrics, a dense model, and no room for event files.
#[test]
fn results_and_files_are_what_they_are_called() {
    let scratch = Scratch::new("labels");
    let corpus = write(&scratch, "corpus.txt", &tiny::corpus());
    let run = scratch.join("run");
    std::fs::create_dir(&run).unwrap();
    std::fs::write(run.join("tensorboard"), "in the way").unwrap();
    let more = [
        ("run.output", run.to_str().unwrap()),
        ("model.ternary", "false"),
        ("export.formats", "hf"),
        ("log.every", "4"),
        ("log.tensorboard", "true"),
    ];
    let settings = tiny::settings(&corpus, &[&FLAGS[..], &more].concat());
    let (finished, messages) = finish(settings);
    let warnings = messages.iter().filter(|text| text.starts_with("warning: "));
    assert_eq!(warnings.count(), 1, "{messages:#?}");

    let report = finished.report;
    let results = report.results.unwrap();
    assert_eq!((results.final_step, results.accepted_steps), (9, 9));
    // Steps 1, 4, 8 and 9.
    assert_eq!(results.logged_steps, 4);
    assert_eq!(results.tokens, 9 * 4 * 32);
    let epochs = results.tokens as f64 / report.run.data.train_tokens as f64;
    assert_eq!(results.epochs, epochs);
    let last = report.timeline.steps.last().unwrap();
    assert!((last.epoch - epochs).abs() < 1e-12, "after the step");
    assert!(report.run.seconds.unwrap() > 0.0);

    let [file] = &report.run.files[..] else {
        panic!("{:?}", report.run.files)
    };
    let weights = run.join("export/hf/model.safetensors").metadata().unwrap();
    assert_eq!(file.path, "export/hf");
    assert_eq!(file.bytes, weights.len());
    // Two bytes for a weight, and a header.
    assert!(file.bytes < 3 * report.run.model.parameters);
}
