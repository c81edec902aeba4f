//! `setun convert` and `setun inspect`: a trained model through other programs' formats,
//! run from each of them, and what is refused.

mod support;

use std::path::Path;
use support::{Scratch, finish, setun, training};

fn arg(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

#[test]
fn a_trained_model_runs_the_same_from_every_format() {
    let scratch = Scratch::new("convert");
    let (run, corpus) = (scratch.join("run"), scratch.corpus());
    // Rows that the blocks of every format divide; the recipe's own are odd on purpose.
    let flags = ["--model.intermediate_size", "192"];
    finish(&mut training(&run, &corpus, &flags)).ok();
    let text = scratch.write(
        "text.txt",
        "A tree is a tall plant. The sea is wide and deep.\n",
    );
    let logits = |model: &Path| {
        let out = scratch.join("logits.safetensors");
        let _ = std::fs::remove_file(&out);
        let (model, text, file) = (arg(model), arg(&text), arg(&out));
        setun([
            "eval", "--model", &model, "--data", &text, "--logits", &file,
        ])
        .ok();
        std::fs::read(out).unwrap()
    };
    let expected = logits(&run);
    let mut input = run;
    for (format, name) in [
        ("gguf-q2_0", "a.gguf"),
        ("mlx", "mlx"),
        ("compressed-tensors", "words"),
        ("hf-f16", "hf"),
        ("gguf-f32", "b.gguf"),
        ("packed", "packed"),
    ] {
        let out = scratch.join(name);
        let (from, to) = (arg(&input), arg(&out));
        let output = setun(["convert", &from, &to, "--to", format]).ok();
        assert!(output.stdout.contains("bits per weight"), "{output:?}");
        assert!(logits(&out) == expected, "{format}");
        setun(["verify", &to]).ok();
        let shown = setun(["inspect", &to]).ok();
        assert!(shown.stdout.contains("weights in"), "{shown:?}");
        input = out;
    }
}

#[test]
fn wrong_requests_name_the_remedy() {
    let scratch = Scratch::new("convert-wrong");
    let nowhere = arg(&scratch.join("nowhere"));
    let out = arg(&scratch.join("out"));
    setun(["convert", &nowhere, &out, "--to", "mlx"]).refused(1, &["nowhere", "no such file"]);
    setun(["convert", &nowhere, &out, "--to", "q4_k"]).refused(2, &["gguf-q2_0", "mlx"]);
    setun(["convert", &nowhere, &out]).refused(2, &["--to"]);
    setun([
        "convert",
        &nowhere,
        &out,
        "--to",
        "mlx",
        "--group-size",
        "64",
    ])
    .refused(2, &["--ternarize"]);
    setun(["inspect", &nowhere]).refused(1, &["nowhere"]);
    let junk = scratch.write("junk.gguf", "GGUF, or so it says");
    setun(["inspect", &arg(&junk)]).refused(1, &["junk.gguf"]);
    assert!(!scratch.join("out").exists());
}
