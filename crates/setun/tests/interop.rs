//! The unpacked export in transformers, and the independent checker, on a tiny run.
//!
//! Runs where `SETUN_PYTHON` names a Python with torch, transformers, numpy and
//! safetensors; elsewhere it says so and does nothing.

mod support;

use std::path::Path;
use std::process::Command;
use support::{Scratch, recipe, setun, workspace};

fn python(program: &Path, script: &str, args: &[&Path]) {
    let script = workspace().join("reference").join(script);
    let output = Command::new(program)
        .arg(script)
        .args(args)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    println!("{text}");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}{errors}");
}

#[test]
fn transformers_and_the_checker_agree() {
    let Some(program) = std::env::var_os("SETUN_PYTHON") else {
        println!("SETUN_PYTHON is not set: not compared with transformers");
        return;
    };
    let program = Path::new(&program);
    let scratch = Scratch::new("interop");
    let run = scratch.join("run");
    let corpus = scratch.corpus();
    let arg = |path: &Path| path.to_string_lossy().into_owned();
    let recipe = arg(&recipe());
    let data = arg(&corpus);
    let output = arg(&run);
    setun([
        "train",
        &recipe,
        "--data.train",
        &data,
        "--run.output",
        &output,
    ])
    .ok();
    let export = run.join("export/hf");
    let text = scratch.write(
        "text.txt",
        "A tree is a tall plant. The sea is wide and deep.\n",
    );
    let mut logits = Vec::new();
    for numerics in ["f32", "int8"] {
        let file = scratch.join(&format!("{numerics}.safetensors"));
        let (model, text, out) = (arg(&export), arg(&text), arg(&file));
        let args = [
            "eval",
            "--model",
            &model,
            "--data",
            &text,
            "--numerics",
            numerics,
            "--logits",
            &out,
        ];
        setun(args).ok();
        logits.push(file);
    }
    python(
        program,
        "check_transformers.py",
        &[&export, &logits[0], &logits[1]],
    );
    let packed = run.join("export/packed/packed.safetensors");
    python(program, "check_ternary.py", &[&packed, &export]);
}
