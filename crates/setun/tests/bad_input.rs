//! What goes wrong is named: one line that says where and what to do, the right exit
//! code, no panic, and nothing half-written.

mod support;

use std::ffi::OsStr;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use support::{
    Scratch, Signal, checkpoint, command, copy_dir, documents, edit, files, finish, interrupt,
    metrics, params_hash, recipe, resuming, setun, tensor_bytes, training,
};

/// Embedding of the tiny model, 512 x 64 or less, one group of 64 to a row.
const EMBEDDING: &str = "model.embed_tokens.weight";

/// File name, contents, flags of the training, and words of the message.
type TextCase<'a> = (&'a str, &'a [u8], &'a [&'a str], &'a [&'a str]);

#[test]
fn texts_that_cannot_be_trained_on() {
    let scratch = Scratch::new("texts");
    let some = documents(0..20);
    let cases: [TextCase<'_>; 7] = [
        ("empty.txt", b"", &[], &["empty.txt", "has no text"]),
        ("blank.txt", b" \n\n \n", &[], &["blank.txt", "has no text"]),
        (
            "bytes.txt",
            b"good \xff bad",
            &[],
            &["bytes.txt", "not UTF-8 at byte 5", "iconv"],
        ),
        (
            "short.txt",
            b"One document.",
            &[],
            &["cannot split", "held-out files"],
        ),
        (
            "lines.jsonl",
            b"{\"text\": \"a\"}\n{\"body\": \"b\"}\n",
            &[],
            &["lines.jsonl:2", "\"text\""],
        ),
        (
            "window.txt",
            b"A first text here.\n\nA second text here.\n\nA third text here.",
            &[
                "--tokenizer.vocab_size",
                "260",
                "--data.valid_fraction",
                "0.5",
                "--train.seq_len",
                "128",
            ],
            &["seq_len"],
        ),
        (
            "vocabulary.txt",
            some.as_bytes(),
            &["--tokenizer.vocab_size", "60000"],
            &["the corpus yields at most", "not 60000", "lower vocab_size"],
        ),
    ];
    for (name, text, flags, words) in cases {
        let run = scratch.join("run");
        let corpus = scratch.write(name, text);
        finish(training(&run, &corpus, &[]).args(flags)).refused(1, words);
        assert!(!run.exists(), "{name}");
        fs::remove_file(corpus).unwrap();
    }
    let missing = scratch.join("missing.txt");
    let output = finish(&mut training(&scratch.join("run"), &missing, &[]));
    output.refused(1, &["no file or folder at", missing.to_str().unwrap()]);
    assert!(files(scratch.path()).is_empty());
}

#[test]
fn settings_that_make_no_model_or_no_sense() {
    let scratch = Scratch::new("bad-settings");
    let corpus = scratch.corpus();
    let cases: [(&[&str], &[&str]); 9] = [
        (
            &[
                "--model.num_attention_heads",
                "3",
                "--model.num_key_value_heads",
                "2",
            ],
            &["3 query heads cannot share 2", "model.num_attention_heads"],
        ),
        (&["--model.head_dim", "31"], &["model.head_dim = 31 is odd"]),
        (
            &["--train.stepps", "5"],
            &["--train.stepps", "'--train.steps'"],
        ),
        (
            &["--train.steps", "many"],
            &["train.steps must be a whole number", "\"many\""],
        ),
        (
            &["--train.lr", "fast"],
            &["train.lr must be a finite number", "\"fast\""],
        ),
        (
            &["--model.scale_rule", "median"],
            &["model.scale_rule", "mean", "\"median\""],
        ),
        (
            &["--train.micro_batch_size", "3"],
            &["train.micro_batch_size = 3", "divisor"],
        ),
        (
            &["--train.seq_len", "4096"],
            &["train.seq_len = 4096", "max_position_embeddings"],
        ),
        (
            &["--train.warmup_steps", "400"],
            &["train.warmup_steps = 400"],
        ),
    ];
    let run = scratch.join("run");
    for (flags, words) in cases {
        finish(training(&run, &corpus, &[]).args(flags)).refused(2, words);
        assert!(!run.exists(), "{flags:?}");
    }
    assert_eq!(files(scratch.path()), ["corpus.txt"]);
}

#[test]
fn recipes_that_cannot_be_read() {
    let scratch = Scratch::new("bad-recipes");
    let cases = [
        (
            "[train]\nstep = 5\n",
            "recipe.toml:2: ",
            "did you mean train.steps?",
        ),
        (
            "[train]\n\nlr = \"fast\"\n",
            "recipe.toml:3: ",
            "train.lr must be a finite number",
        ),
        (
            "[trian]\nlr = 1.0\n",
            "recipe.toml:1: ",
            "did you mean [train]?",
        ),
        ("[train]\nlr = 1.0.0\n", "line 2", "not valid TOML"),
    ];
    for (text, line, problem) in cases {
        let recipe = scratch.write("recipe.toml", text);
        let output = setun(["train", recipe.to_str().unwrap()]);
        output.refused(2, &["recipe.toml", line, problem]);
    }
    setun(["train", scratch.join("no.toml").to_str().unwrap()]).refused(2, &["no.toml"]);
    assert_eq!(files(scratch.path()), ["recipe.toml"]);
}

#[test]
fn wrong_usage() {
    let beams = ["generate", "--model", "m", "--prompt", "a", "--beams", "2"];
    let drafted_beams = [&beams[..], &["--draft", "ngram"]].concat();
    let cases: [(&[&str], &str); 11] = [
        (&drafted_beams, "leave out --beams or --draft"),
        (&["trane"], "'train'"),
        (&["verify"], "<PATH>"),
        (&["generate", "--prompt", "a"], "--model"),
        (
            &["eval", "--model", "m", "--data", "d", "--numerics", "int4"],
            "it is int8, bf16 or f32",
        ),
        (
            &[
                "generate",
                "--model",
                "m",
                "--prompt",
                "a",
                "--temperature",
                "-1",
            ],
            "0 or more",
        ),
        (&["convert", "m", "out", "--to", "q4_k"], "gguf-q2_0"),
        (
            &["generate", "--model", "m", "--prompt", ""],
            "--prompt is empty",
        ),
        (
            &[
                "generate",
                "--model",
                "m",
                "--prompt",
                "a",
                "--length-penalty",
                "1",
            ],
            "add --beams",
        ),
        (
            &[
                "bench",
                "speculate",
                "--model",
                "m",
                "--text",
                "t",
                "--draft",
                "none",
            ],
            "nothing to measure",
        ),
        (
            &["bench", "peak", "--repeat", "18446744073709551615"],
            "from 1 to",
        ),
    ];
    for (args, words) in cases {
        setun(args).refused(2, &[words]);
    }
}

/// As with `| head`: the reader of a pipe may leave.
#[test]
fn a_closed_output_is_no_failure() {
    let scratch = Scratch::new("pipe");
    let run = finished_run(&scratch);
    let model = run.to_str().unwrap();
    let commands: [&[&str]; 3] = [
        &["verify", model],
        &["generate", "--model", model, "--prompt", "a", "--stats"],
        &["report", model],
    ];
    for args in commands {
        let mut command = command(args);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        drop((child.stdout.take(), child.stderr.take()));
        assert_eq!(child.wait().unwrap().code(), Some(0), "{args:?}");
    }
    // Nor is what nobody reads written to its end.
    let mut command = command(commands[1]);
    command.args(["--max-tokens", "40"]);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    drop(child.stdout.take());
    let stderr = String::from_utf8(child.wait_with_output().unwrap().stderr).unwrap();
    let whole = finish(&mut command).ok().stderr;
    let new_tokens = |stats: &str| {
        let (before, _) = stats.split_once(" new tokens").unwrap();
        before.rsplit(' ').next().unwrap().parse::<usize>().unwrap()
    };
    assert!(
        new_tokens(&stderr) < new_tokens(&whole),
        "{stderr}\n{whole}"
    );
}

#[cfg(target_os = "linux")]
#[test]
fn an_output_that_takes_nothing_is_a_failure() {
    let scratch = Scratch::new("full-output");
    let run = finished_run(&scratch);
    let model = run.to_str().unwrap();
    let full = std::fs::File::options()
        .write(true)
        .open("/dev/full")
        .unwrap();
    let output = finish(command(["verify", model]).stdout(full));
    output.refused(1, &["cannot write to standard output"]);
}

#[test]
fn an_unknown_instruction_set() {
    let scratch = Scratch::new("isa");
    let run = scratch.join("run");
    let corpus = scratch.corpus();
    let mut train = training(&run, &corpus, &[]);
    let output = finish(train.env("SETUN_ISA", "nonsense"));
    output.refused(2, &["SETUN_ISA=nonsense", "reference"]);
    assert!(!run.exists());
}

/// Files that are no model, given to every command that opens one.
#[test]
fn what_is_not_a_model() {
    let scratch = Scratch::new("foreign");
    let corpus = scratch.corpus();
    let (data, recipe) = (corpus.to_str().unwrap(), recipe());
    scratch.write("noise.bin", [0x5a; 4096]);
    scratch.write("header.safetensors", b"\x02\0\0\0\0\0\0\0{}");
    fs::create_dir(scratch.join("empty")).unwrap();
    fs::create_dir(scratch.join("half")).unwrap();
    scratch.write("half/model.safetensors", b"\x02\0\0\0\0\0\0\0{}");
    for name in [
        "noise.bin",
        "header.safetensors",
        "empty",
        "half",
        "missing",
    ] {
        let path = scratch.join(name);
        let model = path.to_str().unwrap();
        let out = scratch.join("out");
        let commands: [&[&str]; 4] = [
            &["generate", "--model", model, "--prompt", "a"],
            &["eval", "--model", model, "--data", data],
            &["convert", model, out.to_str().unwrap(), "--to", "hf"],
            &[
                "train",
                recipe.to_str().unwrap(),
                "--init",
                model,
                "--run.output",
                out.to_str().unwrap(),
            ],
        ];
        for args in commands {
            setun(args).refused(1, &[model]);
            assert!(!out.exists(), "{args:?}");
        }
        let verified = setun(["verify", model]);
        assert_eq!(verified.code, Some(1), "{verified:#?}");
        let text = format!("{}{}", verified.stdout, verified.stderr);
        assert!(
            text.contains(model) && !text.contains("panicked"),
            "{verified:#?}"
        );
    }
}

/// A finished tiny run for tests that damage copies of it.
fn finished_run(scratch: &Scratch) -> std::path::PathBuf {
    let run = scratch.join("run");
    finish(&mut training(&run, &scratch.corpus(), &[])).ok();
    run
}

fn verify(path: &Path) -> support::Output {
    setun([OsStr::new("verify"), path.as_os_str()])
}

#[test]
fn flipped_bits_are_found_and_not_used() {
    let scratch = Scratch::new("bit-flips");
    let run = finished_run(&scratch);
    let whole = checkpoint(&run, 20);
    for file in files(&whole) {
        let copy = scratch.join("step-00000020");
        copy_dir(&whole, &copy);
        edit(&copy.join(&file), |bytes| {
            let middle = bytes.len() / 2;
            bytes[middle] ^= 4;
        });
        verify(&copy).not_verified(&[&file]);
        let model = copy.to_str().unwrap();
        let output = setun(["generate", "--model", model, "--prompt", "a"]);
        assert_eq!(output.stdout, "", "{file}");
        output.refused(1, &[&file]);
        fs::remove_dir_all(&copy).unwrap();
    }
}

#[test]
fn a_planted_weight_is_found_without_a_hash() {
    let scratch = Scratch::new("planted");
    let run = finished_run(&scratch);
    let export = run.join("export/hf");
    // Row 5, column 7 of the embedding gets half of its scale.
    edit(&export.join("model.safetensors"), |bytes| {
        let row = tensor_bytes(bytes, EMBEDDING).start + 5 * 64 * 2;
        let value = |i: usize| u16::from_le_bytes([bytes[row + 2 * i], bytes[row + 2 * i + 1]]);
        let scale = (0..64).map(value).find(|&v| v != 0 && v != 0x8000).unwrap() & 0x7fff;
        // The exponent of a bf16 number begins at bit 7.
        let half = (scale - (1 << 7)).to_le_bytes();
        bytes[row + 14..row + 16].copy_from_slice(&half);
    });
    let place = format!("{EMBEDDING} row 5 column 7: ");
    verify(&export).not_verified(&[&place, "is not ternary", "MANIFEST.json", "is damaged"]);
    verify(&run).not_verified(&[&place]);
    fs::remove_file(export.join("MANIFEST.json")).unwrap();
    verify(&export).not_verified(&[&place]);
    let model = export.to_str().unwrap();
    let output = setun(["generate", "--model", model, "--prompt", "a"]);
    output.refused(1, &["model.safetensors", "row 5 column 7"]);
}

#[test]
fn swapped_scales_are_found() {
    let scratch = Scratch::new("scales");
    let run = finished_run(&scratch);
    let swap = |path: &Path| {
        edit(path, |bytes| {
            let scales = tensor_bytes(bytes, &format!("{EMBEDDING}.scales"));
            let (first, rest) = bytes[scales].split_at_mut(2);
            let other = rest.chunks_exact_mut(2).find(|other| *other != first);
            first.swap_with_slice(other.unwrap());
        });
    };
    let export = run.join("export/packed");
    swap(&export.join("packed.safetensors"));
    verify(&export).not_verified(&["packed.safetensors is damaged", "ternary_hash is"]);
    let whole = checkpoint(&run, 20);
    swap(&whole.join("packed.safetensors"));
    // Each by itself would do: the hash of the file, the latents, and the run's record.
    let row = format!("{EMBEDDING} row 0");
    verify(&whole).not_verified(&["packed.safetensors is damaged", &row, "run.json"]);
    let output = setun(["eval", "--model", whole.to_str().unwrap(), "--data", "x"]);
    output.refused(1, &["packed.safetensors is damaged"]);
}

#[test]
fn a_dense_model_is_not_ternary() {
    let scratch = Scratch::new("dense");
    let run = scratch.join("run");
    let mut dense = training(&run, &scratch.corpus(), &["--model.ternary", "false"]);
    finish(&mut dense).ok();
    assert!(!run.join("export/packed").exists());
    let embedding = format!("{EMBEDDING} row 0 column 0: ");
    verify(&run).not_verified(&["not a ternary model", "trained dense"]);
    let export = verify(&run.join("export/hf"));
    export.not_verified(&["not a ternary model", &embedding, "is not ternary"]);
    let (model, out) = (run.to_str().unwrap(), scratch.join("out"));
    let output = setun(["convert", model, out.to_str().unwrap(), "--to", "packed"]);
    output.refused(1, &["dense", "--ternarize"]);
    assert!(!out.exists());
}

/// One float matrix in a ternary model: a single embedding of another kind is enough.
#[test]
fn a_float_embedding_is_found() {
    let scratch = Scratch::new("float-embedding");
    let run = finished_run(&scratch);
    let dense = scratch.join("dense");
    let corpus = scratch.join("corpus.txt");
    finish(&mut training(
        &dense,
        &corpus,
        &["--model.ternary", "false"],
    ))
    .ok();
    let donor = fs::read(dense.join("export/hf/model.safetensors")).unwrap();
    let export = run.join("export/hf");
    edit(&export.join("model.safetensors"), |bytes| {
        let target = tensor_bytes(bytes, EMBEDDING);
        bytes[target].copy_from_slice(&donor[tensor_bytes(&donor, EMBEDDING)]);
    });
    fs::remove_file(export.join("MANIFEST.json")).unwrap();
    let failed = verify(&export);
    let failures = failed.stdout.lines().filter(|l| l.starts_with("FAILED:"));
    assert_eq!(failures.count(), 1, "{failed:#?}");
    failed.not_verified(&[&format!("{EMBEDDING} row 0 column 0: ")]);
}

/// Files may not grow beyond 300 kB, so that saving fails half-way as on a full disk.
fn with_little_space(command: &Command) -> Command {
    let mut shell = Command::new("sh");
    // The signal that comes with the limit is ignored, so that the write itself fails.
    let script = "trap '' XFSZ; ulimit -f 600; exec \"$0\" \"$@\"";
    shell.args(["-c", script]).arg(command.get_program());
    shell.args(command.get_args());
    shell
}

#[test]
fn a_full_disk_costs_no_checkpoint() {
    let scratch = Scratch::new("full");
    let corpus = scratch.corpus();
    let flags = ["--checkpoint.every", "5", "--train.batch_size", "16"];
    let expected = scratch.join("expected");
    finish(&mut training(&expected, &corpus, &flags)).ok();

    let run = scratch.join("run");
    let mut first = training(&run, &corpus, &flags);
    interrupt(&mut first, &run, 6, Signal::Interrupt).stopped();
    let saved: Vec<String> = files(&run.join("checkpoints"));
    let failed = finish(&mut with_little_space(&resuming(&run)));
    failed.refused(1, &["cannot write", ".safetensors", "File too large"]);
    assert_eq!(files(&run.join("checkpoints")), saved);
    assert_eq!(files(&run).iter().find(|file| file.contains(".tmp-")), None);
    verify(&run).ok();

    // What a crash at that moment would leave is removed at the next start.
    fs::create_dir(run.join("checkpoints/.tmp-step-00000015-1")).unwrap();
    fs::write(
        run.join("checkpoints/.tmp-step-00000015-1/latents.safetensors"),
        "half",
    )
    .unwrap();
    finish(&mut resuming(&run)).ok();
    assert_eq!(files(&run).iter().find(|file| file.contains(".tmp-")), None);
    assert!(!run.join("checkpoints/.tmp-step-00000015-1").exists());
    assert_eq!(metrics(&run), metrics(&expected));
    assert_eq!(params_hash(&run, 20), params_hash(&expected, 20));
    verify(&run).ok();
}

#[test]
fn an_export_that_fails_leaves_nothing() {
    let scratch = Scratch::new("full-export");
    let flags = [
        "--model.hidden_size",
        "128",
        "--model.intermediate_size",
        "384",
    ];
    let run = scratch.join("run");
    finish(training(&run, &scratch.corpus(), &flags).args(["--train.steps", "4"])).ok();
    let before = files(scratch.path());
    let out = scratch.join("out");
    let mut export = command([OsStr::new("convert"), run.as_ref(), out.as_ref()]);
    export.args(["--to", "hf"]);
    finish(&mut with_little_space(&export)).refused(1, &["model.safetensors", "File too large"]);
    let logits = scratch.join("logits.safetensors");
    let mut eval = command([OsStr::new("eval"), "--model".as_ref(), run.as_ref()]);
    eval.args([OsStr::new("--data"), scratch.join("corpus.txt").as_ref()]);
    eval.args([OsStr::new("--logits"), logits.as_ref()]);
    let failed = finish(&mut with_little_space(&eval));
    failed.refused(1, &["logits.safetensors", "File too large"]);
    assert_eq!(files(scratch.path()), before);
}
