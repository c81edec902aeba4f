//! Sweeps and comparisons from the command line.

mod support;

use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use support::{
    Output, Scratch, Signal, command, documents, evaluation, finish, interrupt, json, metrics,
    recipe, setun, training, workspace,
};

/// A sweep over two learning rates and two seeds, with dense twins.
fn spec(scratch: &Scratch, more: &str) -> PathBuf {
    let train = scratch.write("train.txt", documents(0..30));
    let valid = scratch.write("valid.txt", documents(30..36));
    let tokenizer = scratch.join("tokenizer.json");
    if !tokenizer.exists() {
        let (train, tokenizer) = (train.to_str().unwrap(), tokenizer.to_str().unwrap());
        let flags = ["--vocab-size", "384", "--output", tokenizer, train];
        setun([&["tokenizer", "train"], &flags[..]].concat()).ok();
    }
    let text = format!(
        "recipe = {recipe:?}\noutput = \"out\"\nseeds = [1, 2]\ndense_twin = true\n\
         base = \"lr-0.001\"\n{more}\n\
         [set]\n\"train.steps\" = 6\n\"eval.every\" = 3\n\"checkpoint.every\" = 2\n\
         \"run.threads\" = 1\n\"export.formats\" = []\n\"sample.prompts\" = 0\n\
         \"train.warmup_steps\" = 1\n\"data.train\" = [{train:?}]\n\"data.valid\" = [{valid:?}]\n\
         \"tokenizer.path\" = {tokenizer:?}\n\
         [grid]\n\"train.lr\" = [4e-3, 1e-3]\n",
        recipe = recipe(),
    );
    scratch.write("spec.toml", text)
}

fn sweep(spec: &Path, flags: &[&str]) -> Output {
    let spec = spec.to_str().unwrap();
    setun([&["sweep", spec], flags].concat())
}

fn float(value: &Value) -> f64 {
    value
        .as_f64()
        .unwrap_or_else(|| panic!("{value} is no number"))
}

#[test]
fn a_sweep_is_a_table_of_paired_runs_and_goes_on_where_it_was() {
    let scratch = Scratch::new("sweep");
    let spec = spec(&scratch, "");
    let plan = sweep(&spec, &["--dry-run"]).ok().stdout;
    for words in [
        "lr-0.001 (base): ternary, train.lr=0.001",
        "dense twin: lr-0.004-dense",
        "768 tokens, ",
        "seed 2: new",
        "4 cells, 8 runs, 6144 training tokens to go",
    ] {
        assert!(plan.contains(words), "{words:?} in {plan}");
    }
    assert!(!scratch.join("out").exists(), "a dry run writes nothing");

    sweep(&spec, &[]).ok();
    let run = |cell: &str, seed: u64| scratch.join(&format!("out/{cell}/seed-{seed}"));
    let loss = |cell: &str, seed| float(&evaluation(&run(cell, seed), 6)["loss"]);
    let table = json(&scratch.join("out/sweep.json"));
    let fast = &table["cells"][0];
    assert_eq!(fast["name"], "lr-0.004");
    assert_eq!(float(&fast["row"]["losses"]["2"]), loss("lr-0.004", 2));
    // Differences are taken seed by seed.
    for (key, other) in [("against_base", "lr-0.001"), ("gap", "lr-0.004-dense")] {
        let pairs = [1, 2].map(|seed| loss("lr-0.004", seed) - loss(other, seed));
        let mean = (pairs[0] + pairs[1]) / 2.0;
        // Of two values: half their distance is the standard error of the mean.
        let error = (pairs[0] - pairs[1]).abs() / 2.0;
        assert!((float(&fast[key]["mean"]) - mean).abs() < 1e-12, "{fast}");
        assert!((float(&fast[key]["standard_error"]) - error).abs() < 1e-12);
        assert_eq!(fast[key]["num_pairs"], 2);
    }
    // Pairs share initial weights and data: a step of the twin's learning rate apart.
    let first = |cell: &str| metrics(&run(cell, 1))[1].clone();
    let of = |line: &str, key: &str| serde_json::from_str::<Value>(line).unwrap()[key].clone();
    assert_eq!(
        of(&first("lr-0.004"), "loss"),
        of(&first("lr-0.001"), "loss")
    );
    assert_ne!(loss("lr-0.004", 1), loss("lr-0.004", 2));
    let page = fs::read_to_string(scratch.join("out/sweep.md")).unwrap();
    assert!(page.contains("| lr-0.001 "), "{page}");
    assert!(page.contains("Best ternary cell"), "{page}");

    // Again: nothing is left to train.
    let again = sweep(&spec, &[]).ok();
    assert!(!again.stderr.contains("=="), "{again:?}");
    let plan = sweep(&spec, &["--dry-run"]).ok().stdout;
    assert!(plan.contains("0 training tokens to go"), "{plan}");
    // Other settings under the same names are another experiment.
    let names = ["lr-0.004/seed-1", "train.steps = 6", "has 7"];
    sweep(&spec, &["--set", "train.steps=7"]).refused(1, &names);
    sweep(&spec, &["--set", "train.lr=1"]).refused(2, &["what the cells differ in"]);
}

#[test]
fn a_cell_learns_from_the_run_of_an_earlier_one() {
    let scratch = Scratch::new("sweep-taught");
    let spec = spec(&scratch, "");
    let text = fs::read_to_string(&spec).unwrap();
    let text = text.replace("dense_twin = true\nbase = \"lr-0.001\"\n", "");
    let (head, _) = text.split_once("[grid]").unwrap();
    let cells = "[[cell]]\nname = \"dense\"\nset = { \"model.ternary\" = false }\n\
                 [[cell]]\nname = \"taught\"\nteacher = \"dense\"\n\
                 set = { \"distill.weight\" = 0.5 }\n";
    fs::write(&spec, format!("{head}{cells}")).unwrap();
    sweep(&spec, &["--dry-run"]).ok();
    // The base runs along, which is the teacher here.
    sweep(&spec, &["--seeds", "1", "--cells", "taught"]).ok();
    let run = scratch.join("out/taught/seed-1");
    let settings = fs::read_to_string(run.join("settings.toml")).unwrap();
    let teacher = scratch.join("out/dense/seed-1");
    assert!(
        settings.contains(teacher.to_str().unwrap()),
        "{settings} without {teacher:?}"
    );
    // The same sweep at another place: nothing is trained again.
    let moved = scratch.join("moved");
    fs::rename(scratch.join("out"), &moved).unwrap();
    let again = ["--output", moved.to_str().unwrap(), "--seeds", "1"];
    let again = sweep(&spec, &again).ok();
    assert!(!again.stderr.contains("=="), "{again:?}");
    // A run whose report was written early is not finished.
    let record = moved.join("taught/seed-1/run.json");
    let text = fs::read_to_string(&record).unwrap();
    let mut unfinished: Value = serde_json::from_str(&text).unwrap();
    unfinished["finished"] = Value::Null;
    fs::write(&record, unfinished.to_string()).unwrap();
    let plan = ["--output", moved.to_str().unwrap(), "--dry-run"];
    let plan = sweep(&spec, &plan).ok().stdout;
    assert!(plan.contains("seed 1: interrupted"), "{plan}");
}

#[test]
fn an_interrupted_cell_ends_with_the_same_bits() {
    let scratch = Scratch::new("sweep-stop");
    let spec = spec(&scratch, "");
    let text = fs::read_to_string(&spec).unwrap();
    let small = text.replace("seeds = [1, 2]", "seeds = [1]");
    let small = small.replace("dense_twin = true", "dense_twin = false");
    fs::write(&spec, small.replace("steps\" = 6", "steps\" = 40")).unwrap();
    let whole = scratch.join("whole");
    let flags = ["--set", "checkpoint.every=5"];
    let output = ["--output", whole.to_str().unwrap()];
    sweep(&spec, &[flags, output].concat()).ok();

    let run = scratch.join("out/lr-0.004/seed-1");
    let line = || command(["sweep", spec.to_str().unwrap(), flags[0], flags[1]]);
    let stopped = interrupt(&mut line(), &run, 7, Signal::Interrupt).stopped();
    assert!(stopped.stdout.contains("the same command goes on"));
    assert!(!run.join("report.json").exists());
    interrupt(&mut line(), &run, 20, Signal::Kill);
    finish(&mut line()).ok();
    let whole = whole.join("lr-0.004/seed-1");
    assert_eq!(evaluation(&run, 40), evaluation(&whole, 40));
    assert_eq!(
        support::params_hash(&run, 40),
        support::params_hash(&whole, 40)
    );
}

#[test]
fn wrong_sweeps_are_refused_with_a_remedy() {
    let scratch = Scratch::new("sweep-wrong");
    let refused = |more: &str, words: &[&str]| {
        sweep(&spec(&scratch, more), &["--dry-run"]).refused(2, words);
    };
    refused("seedz = [1]", &["no key seedz", "did you mean seeds?"]);
    refused(
        "\"train.lr\" = 1e-3",
        &["settings go below [set], as \"train.lr\""],
    );
    let cell = "[[cell]]\nname = \"x\"\n";
    let unknown = format!("{cell}set = {{ \"train.lrr\" = 1 }}");
    refused(&unknown, &["cell x", "did you mean train.lr?"]);
    let own = format!("{cell}set = {{ \"run.seed\" = 1 }}");
    refused(&own, &["a sweep sets run.seed itself"]);
    refused(&format!("{cell}{cell}"), &["two cells called x"]);
    let twin = format!("{cell}dense_twin = \"lr-0.004\"");
    refused(&twin, &["lr-0.004, whose model is ternary"]);
    refused(
        &format!("{cell}dense_twin = \"y\""),
        &["y, which is no cell"],
    );

    let text = fs::read_to_string(spec(&scratch, "")).unwrap();
    let without = |line: &str| {
        let start = text.find(line).unwrap();
        let end = start + text[start..].find('\n').unwrap();
        scratch.write("spec.toml", text.replace(&text[start..end], ""))
    };
    sweep(&without("recipe ="), &["--dry-run"]).refused(2, &["has no recipe"]);
    sweep(&without("\"data.valid\""), &["--dry-run"])
        .refused(2, &["data.valid is empty", "name held-out files"]);
    sweep(&without("\"train.lr\""), &["--dry-run"]).refused(2, &["has no cells"]);
}

#[test]
fn runs_are_compared_and_what_cannot_be_is_marked() {
    let scratch = Scratch::new("compare");
    let corpus = scratch.corpus();
    let valid = scratch.write("valid.txt", documents(36..40));
    let flags = ["--data.valid", valid.to_str().unwrap()];
    let make = |name: &str, more: &[&str]| {
        let run = scratch.join(name);
        finish(&mut training(&run, &corpus, &[&flags, more].concat())).ok();
        run.to_str().unwrap().to_owned()
    };
    let ternary = make("ternary", &["--run.name", "a <b>"]);
    let dense = make("dense", &["--model.ternary", "false"]);
    let other = make(
        "other",
        &[
            "--data.valid_fraction",
            "0.2",
            "--data.valid",
            corpus.to_str().unwrap(),
            "--data.train",
            workspace().join("data/encyclopedia.txt").to_str().unwrap(),
        ],
    );
    let out = scratch.join("out");
    let output = ["--output", out.to_str().unwrap()];
    let text = setun([&["compare", &ternary, &dense], &output[..]].concat());
    let text = text.ok().stdout;
    assert!(
        text.contains("| passed |") || text.contains("   passed |"),
        "{text}"
    );
    let entries = json(&out.join("compare.json"));
    let loss = |run: &str| float(&evaluation(Path::new(run), 20)["loss"]);
    assert_eq!(float(&entries[0]["held_out_loss"]), loss(&ternary));
    let gap = loss(&dense) - loss(&ternary);
    assert!((float(&entries[1]["against_first"]) - gap).abs() < 1e-12);
    assert_eq!(entries[0]["verified"], true);
    assert_eq!(entries[1]["verified"], Value::Null);
    assert_eq!(entries[0]["tokens"], 20 * 4 * 32);
    assert!(float(&entries[0]["zero_share"]) > 0.1);
    assert!(float(&entries[0]["last_over_best"]) >= 1.0);
    let page = fs::read_to_string(out.join("compare.html")).unwrap();
    assert_eq!(page.matches("<svg").count(), 2, "the whole and its end");
    assert!(page.contains("a &lt;b&gt;") && !page.contains("a <b>"));
    assert!(!page.contains("<script") && page.contains("prefers-color-scheme:dark"));
    let picture = fs::read_to_string(out.join("compare.svg")).unwrap();
    assert!(picture.starts_with("<svg xmlns=") && picture.ends_with("</svg>\n"));
    assert!(picture.contains("1 a &lt;b&gt;") && picture.contains("--series-0:"));

    let marked = setun(["compare", &ternary, &dense, &other]).ok().stdout;
    assert!(marked.contains("not comparable"), "{marked}");
    assert!(marked.contains("Run 3 was judged on other held-out tokens"));
    setun(["compare", &ternary, "nowhere"]).refused(1, &["nowhere", "name a run directory"]);
    setun(["compare", &ternary]).refused(2, &["RUNS"]);
}
