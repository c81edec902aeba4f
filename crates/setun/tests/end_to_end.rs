//! From text to a checked model through the command line alone: the tiny recipe, its run
//! directory, verification, generation, evaluation, and training from exports.

mod support;

use std::ffi::OsStr;
use std::fs;
use std::path::Path;

use serde_json::Value;
use support::{
    Output, Scratch, checkpoint, command, documents, evaluation, files, finish, json, recipe,
    setun, training,
};

const RUN_FILES: [&str; 31] = [
    "best.json",
    "checkpoints/step-00000010/MANIFEST.json",
    "checkpoints/step-00000010/config.json",
    "checkpoints/step-00000010/latents.safetensors",
    "checkpoints/step-00000010/optimizer.safetensors",
    "checkpoints/step-00000010/packed.safetensors",
    "checkpoints/step-00000010/state.json",
    "checkpoints/step-00000010/tokenizer.json",
    "checkpoints/step-00000020/MANIFEST.json",
    "checkpoints/step-00000020/config.json",
    "checkpoints/step-00000020/latents.safetensors",
    "checkpoints/step-00000020/optimizer.safetensors",
    "checkpoints/step-00000020/packed.safetensors",
    "checkpoints/step-00000020/state.json",
    "checkpoints/step-00000020/tokenizer.json",
    "export/hf/MANIFEST.json",
    "export/hf/config.json",
    "export/hf/generation_config.json",
    "export/hf/model.safetensors",
    "export/hf/tokenizer.json",
    "export/hf/tokenizer_config.json",
    "export/packed/MANIFEST.json",
    "export/packed/config.json",
    "export/packed/packed.safetensors",
    "export/packed/tokenizer.json",
    "lock",
    "metrics.jsonl",
    "report.html",
    "report.json",
    "run.json",
    "settings.toml",
];

#[test]
fn a_run_directory_has_everything_and_verifies() {
    let scratch = Scratch::new("run-files");
    let run = scratch.join("run");
    let output = finish(&mut training(&run, &scratch.corpus(), &[])).ok();
    assert_eq!(files(&run), RUN_FILES);
    assert!(output.stdout.contains("verified, every matrix is ternary"));
    assert_eq!(json(&run.join("best.json"))["step"], 20);
    let lines = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let steps = lines.lines().filter(|l| l.contains("\"kind\":\"step\""));
    assert_eq!(steps.count(), 20);
    check_report(&run);
    for part in [
        "",
        "checkpoints/step-00000010",
        "export/hf",
        "export/packed",
    ] {
        let path = run.join(part);
        let output = setun([OsStr::new("verify"), path.as_os_str()]).ok();
        let verdict = "verified, every matrix is ternary\n";
        assert!(output.stdout.ends_with(verdict), "{output:?}");
    }
    let packed = run.join("export/packed/packed.safetensors");
    let output = setun([OsStr::new("verify"), packed.as_os_str(), "--json".as_ref()]).ok();
    let report: Value = serde_json::from_str(&output.stdout).unwrap();
    let recorded = &json(&run.join("run.json"))["ternary_hashes"]["step-00000020"];
    assert_eq!(&report["models"][0]["ternary_hash"], recorded);
    assert!(recorded.is_string());
}

/// One page that needs nothing from outside, and numbers that agree with the metrics.
fn check_report(run: &Path) {
    let html = fs::read_to_string(run.join("report.html")).unwrap();
    let html = html.replace("http://www.w3.org/2000/svg", "");
    for outside in [
        "http://",
        "https://",
        "src=\"//",
        "<link",
        "@import",
        "<script src",
    ] {
        assert!(!html.contains(outside), "{outside}");
    }
    assert!(html.contains("<svg") && html.trim_end().ends_with("</html>"));
    let report = json(&run.join("report.json"));
    let last = evaluation(run, 20);
    assert_eq!(report["results"]["best_eval"]["loss"], last["loss"]);
    let settings = fs::read_to_string(run.join("settings.toml")).unwrap();
    let settings: toml::Table = toml::from_str(&settings).unwrap();
    assert_eq!(settings["train"]["steps"].as_integer(), Some(20));
}

#[test]
fn the_seed_decides_the_text() {
    let scratch = Scratch::new("generate");
    let run = scratch.join("run");
    finish(&mut training(&run, &scratch.corpus(), &[])).ok();
    let generate = |model: &Path, seed: &str, temperature: &str| {
        let mut generate = command([OsStr::new("generate"), "--model".as_ref(), model.as_ref()]);
        generate.args(["--prompt", "The telephone", "--max-tokens", "24"]);
        generate.args(["--seed", seed, "--temperature", temperature]);
        finish(&mut generate).ok().stdout
    };
    let text = generate(&run, "7", "1");
    assert!(
        text.starts_with("The telephone") && text.len() > 24,
        "{text:?}"
    );
    assert_eq!(generate(&run, "7", "1"), text);
    assert_ne!(generate(&run, "8", "1"), text);
    assert_eq!(generate(&run.join("export/packed"), "7", "1"), text);
    assert_eq!(generate(&run.join("export/hf"), "7", "1"), text);
    assert_eq!(generate(&run, "7", "0"), generate(&run, "8", "0"));
    // Its normal form has more tokens than it has bytes, the guess by which the weights are
    // loaded beside the tokenizer.
    let mut generate_long = command([OsStr::new("generate"), "--model".as_ref(), run.as_ref()]);
    let prompt = "\u{958}".repeat(6);
    generate_long.args(["--prompt", &prompt, "--max-tokens", "4"]);
    let output = finish(&mut generate_long).ok();
    assert!(output.stdout.starts_with(&prompt), "{:?}", output.stdout);
    assert_eq!(output.stderr, "");
    let file = scratch.write("prompts.txt", "The telephone\nIron\n");
    let batch = |flags: &[&str]| {
        let mut generate = command([OsStr::new("generate"), "--model".as_ref(), run.as_ref()]);
        generate.args([OsStr::new("--prompts"), file.as_ref()]);
        generate.args(["--max-tokens", "24"]);
        let lines = finish(generate.args(flags)).ok().stdout;
        let parse = |line: &str| serde_json::from_str(line).unwrap();
        lines.lines().map(parse).collect::<Vec<Value>>()
    };
    let lines = batch(&["--temperature", "0"]);
    let first = format!("The telephone{}", lines[0]["text"].as_str().unwrap());
    assert_eq!(first + "\n", generate(&run, "7", "0"));
    assert_eq!(
        (lines.len(), &lines[1]["prompt"]),
        (2, &Value::from("Iron"))
    );
    // Drafts change no text, from the text itself or from another model.
    let packed = run.join("export/packed");
    for draft in ["ngram", packed.to_str().unwrap()] {
        let drafted = batch(&["--temperature", "0", "--draft", draft]);
        assert_eq!(drafted, lines, "{draft}");
        let mut generate = command([OsStr::new("generate"), "--model".as_ref(), run.as_ref()]);
        generate.args(["--prompt", "The telephone", "--max-tokens", "24"]);
        generate.args(["--seed", "7", "--temperature", "1"]);
        let output = finish(generate.args(["--draft", draft, "--stats"])).ok();
        assert_eq!(output.stdout, text, "{draft}");
        assert!(
            output.stderr.contains("tokens per step"),
            "{}",
            output.stderr
        );
    }
    let beams = batch(&["--beams", "3"]);
    let score = |i: usize| beams[i]["score"].as_f64().unwrap();
    assert!(beams.len() == 6 && score(0) >= score(1) && score(3) >= score(4));
}

/// `setun eval` on `text`; returns the JSON that it prints and the logits file.
fn eval(model: &Path, text: &Path, logits: &Path, flags: &[&str]) -> (Value, Vec<u8>) {
    let mut eval = command([OsStr::new("eval"), "--json".as_ref()]);
    eval.args([OsStr::new("--model"), model.as_ref()]);
    eval.args([OsStr::new("--data"), text.as_ref()]);
    eval.args([OsStr::new("--logits"), logits.as_ref()]);
    let output: Output = finish(eval.args(flags)).ok();
    let logits = fs::read(logits).unwrap();
    (serde_json::from_str(&output.stdout).unwrap(), logits)
}

#[test]
fn every_format_and_every_way_to_it_has_the_same_bits() {
    let scratch = Scratch::new("eval");
    let run = scratch.join("run");
    finish(&mut training(&run, &scratch.corpus(), &[])).ok();
    let text = scratch.write("held-out.txt", documents(40..42));
    let logits = scratch.join("logits.safetensors");
    let (best, best_logits) = eval(&run, &text, &logits, &["--checkpoint", "best"]);
    assert!(best["tokens"].as_u64().unwrap() > 500, "{best}");
    assert!(best["loss"].as_f64().unwrap() > 1.0, "{best}");
    let same: [(&Path, &[&str]); 6] = [
        (&run.join("export/packed"), &[]),
        (&run.join("export/hf"), &[]),
        (
            &run.join("export/hf/model.safetensors"),
            &["--seq-len", "32"],
        ),
        (&checkpoint(&run, 20), &[]),
        (&run, &["--threads", "2", "--batch-size", "1"]),
        (&run, &["--threads", "1", "--batch-size", "5"]),
    ];
    for (model, flags) in same {
        let (found, found_logits) = eval(model, &text, &logits, flags);
        assert_eq!(found, best, "{} {flags:?}", model.display());
        assert!(found_logits == best_logits, "{} {flags:?}", model.display());
    }
    // Without a difference where there is one, equality would prove nothing.
    let (other, other_logits) = eval(&checkpoint(&run, 10), &text, &logits, &[]);
    assert_ne!(other["loss"], best["loss"]);
    assert!(other_logits != best_logits);
    let mut reference = command([OsStr::new("eval"), "--json".as_ref()]);
    reference.args([OsStr::new("--model"), run.as_ref()]);
    reference.args([OsStr::new("--data"), text.as_ref()]);
    let output = finish(reference.env("SETUN_ISA", "reference")).ok();
    assert_eq!(serde_json::from_str::<Value>(&output.stdout).unwrap(), best);
}

/// Through the cache of generation: exact where it is as exact as the model (but for the
/// order in which a row's exponentials are added), and near it in int8.
#[test]
fn a_smaller_cache_costs_little() {
    let scratch = Scratch::new("eval-kv");
    let run = scratch.join("run");
    finish(&mut training(&run, &scratch.corpus(), &[])).ok();
    let text = scratch.write("held-out.txt", documents(40..42));
    let loss = |flags: &[&str]| {
        let mut eval = command([OsStr::new("eval"), "--json".as_ref()]);
        eval.args([OsStr::new("--model"), run.as_ref()]);
        eval.args([OsStr::new("--data"), text.as_ref()]).args(flags);
        let output = finish(&mut eval).ok();
        let found: Value = serde_json::from_str(&output.stdout).unwrap();
        (found["loss"].as_f64().unwrap(), found["tokens"].clone())
    };
    let (exact, tokens) = loss(&[]);
    let (bf16, same_tokens) = loss(&["--kv", "bf16"]);
    assert_eq!(tokens, same_tokens);
    assert!((bf16 - exact).abs() < 1e-6, "{bf16} {exact}");
    let (int8, _) = loss(&["--kv", "int8"]);
    assert!(int8 != bf16 && (int8 - bf16).abs() < 1e-3, "{int8} {bf16}");
}

/// What the trainer measures, what `eval` measures on the export, and what a training
/// that starts from the export measures before its first step: one number, to the bit.
#[test]
fn training_from_an_export_starts_where_the_run_ended() {
    let scratch = Scratch::new("init");
    let run = scratch.join("run");
    let corpus = scratch.corpus();
    let held_out = scratch.write("held-out.txt", documents(40..45));
    let valid = held_out.to_str().unwrap();
    // The order of held-out documents is that of `eval`, whatever the seed.
    let data = ["--data.valid", valid, "--run.seed", "3"];
    finish(&mut training(&run, &corpus, &data)).ok();
    let best = json(&run.join("best.json"));
    let ended = evaluation(&run, best["step"].as_u64().unwrap());
    assert_eq!(ended["loss"], best["loss"]);
    for format in ["packed", "hf"] {
        let export = run.join("export").join(format);
        let logits = scratch.join("logits.safetensors");
        let (measured, _) = eval(&export, &held_out, &logits, &[]);
        for key in ["loss", "perplexity", "bits_per_byte", "tokens"] {
            assert_eq!(measured[key], ended[key], "{format}");
        }
        let next = scratch.join(format);
        let mut flags = vec!["--init", export.to_str().unwrap()];
        flags.extend(data);
        flags.extend(["--train.steps", "1", "--train.warmup_steps", "0"]);
        finish(&mut training(&next, &corpus, &flags)).ok();
        assert_eq!(evaluation(&next, 0)["loss"], ended["loss"], "{format}");
        assert_ne!(evaluation(&next, 1)["loss"], ended["loss"], "{format}");
    }
    // A run has its latent weights, too; a step of next to nothing leaves them alone.
    let next = scratch.join("again");
    let mut flags = vec!["--init", run.to_str().unwrap(), "--train.lr", "1e-30"];
    flags.extend(data);
    flags.extend(["--train.steps", "1", "--train.warmup_steps", "0"]);
    finish(&mut training(&next, &corpus, &flags)).ok();
    assert_eq!(evaluation(&next, 0)["loss"], ended["loss"]);
    let latents = |run: &Path, step| fs::read(checkpoint(run, step).join("latents.safetensors"));
    let best = best["step"].as_u64().unwrap();
    assert!(latents(&next, 1).unwrap() == latents(&run, best).unwrap());
}

#[test]
fn a_dry_run_prints_a_table_and_writes_nothing() {
    let scratch = Scratch::new("dry-run");
    let mut dry_run = command([OsStr::new("train"), recipe().as_os_str()]);
    let output = finish(dry_run.arg("--dry-run").current_dir(scratch.path())).ok();
    assert_eq!(fs::read_dir(scratch.path()).unwrap().count(), 0);
    let bytes = |line: &str| line.split_whitespace().nth(1)?.parse::<u64>().ok();
    let mut rows: Vec<u64> = output.stdout.lines().filter_map(bytes).collect();
    let total = rows.pop().unwrap();
    assert!(rows.len() >= 4, "{}", output.stdout);
    assert_eq!(rows.iter().sum::<u64>(), total, "{}", output.stdout);
}

#[test]
fn a_taken_directory_is_left_alone() {
    let scratch = Scratch::new("taken");
    let corpus = scratch.corpus();
    let steps = ["--train.steps", "1", "--train.warmup_steps", "0"];
    let train = || {
        let mut train = command([OsStr::new("train"), recipe().as_os_str()]);
        train.args([OsStr::new("--data.train"), corpus.as_os_str()]);
        train.args(["--tokenizer.vocab_size", "384"]).args(steps);
        finish(train.current_dir(scratch.path())).ok().stdout
    };
    for name in ["runs/tiny", "runs/tiny-2", "runs/tiny-3"] {
        let line = format!("run: {}\n", scratch.join(name).display());
        let stdout = train();
        assert!(stdout.contains(&line), "{line} in {stdout}");
        assert!(scratch.join(name).join("report.html").is_file());
    }
    let run = scratch.join("runs/tiny");
    let before = fs::read(run.join("run.json")).unwrap();
    let refused = finish(&mut training(&run, &corpus, &steps));
    refused.refused(1, &[run.to_str().unwrap(), "--resume", "--run.output"]);
    assert_eq!(fs::read(run.join("run.json")).unwrap(), before);
}

#[test]
fn an_export_in_another_number_type_holds_the_same_weights() {
    let scratch = Scratch::new("export");
    let run = scratch.join("run");
    finish(&mut training(&run, &scratch.corpus(), &[])).ok();
    let recorded = json(&run.join("run.json"))["ternary_hashes"]["step-00000010"].clone();
    for (i, format) in ["hf-f16", "packed"].into_iter().enumerate() {
        let out = scratch.join(&format!("out-{i}"));
        let mut export = command([OsStr::new("convert"), run.as_ref(), out.as_ref()]);
        finish(export.args(["--checkpoint", "10", "--to", format])).ok();
        let output = setun([OsStr::new("verify"), out.as_ref(), "--json".as_ref()]).ok();
        let report: Value = serde_json::from_str(&output.stdout).unwrap();
        assert_eq!(report["models"][0]["ternary_hash"], recorded);
        let mut again = command([OsStr::new("convert"), run.as_ref(), out.as_ref()]);
        finish(again.args(["--to", format])).refused(1, &[out.to_str().unwrap(), "already exists"]);
    }
}

#[test]
fn a_run_exports_the_formats_that_it_names() {
    let scratch = Scratch::new("formats");
    let run = scratch.join("run");
    let flags = [
        "--model.hidden_size",
        "256",
        "--model.intermediate_size",
        "256",
        "--model.head_dim",
        "128",
        "--export.formats",
    ];
    let train = |names: &str| {
        let mut flags = flags.to_vec();
        flags.push(names);
        finish(&mut training(&run, &scratch.corpus(), &flags))
    };
    // Before the first step, and by the dry run too.
    let words = ["export.formats names gguf-tq2_0", "group_size = 256"];
    train("hf,gguf-tq2_0").refused(1, &words);
    assert!(!run.exists());
    let mut dry = training(&run, &scratch.corpus(), &flags);
    finish(dry.args(["gguf-tq2_0", "--dry-run"])).refused(1, &words);
    train("gguf-q2_0,mlx").ok();
    for name in ["gguf-q2_0.gguf", "mlx"] {
        setun([OsStr::new("verify"), run.join("export").join(name).as_ref()]).ok();
    }
    assert!(!run.join("export/hf").exists());
}
