//! `setun bench` and `--profile`: figures that are whole, and a training that they leave
//! alone.

mod support;

use std::fs;

use serde_json::Value;
use support::{Scratch, finish, json, metrics, params_hash, setun, training};

/// The figures of `setun bench ARGS --json`.
fn figures(args: &[&str]) -> Vec<Value> {
    let mut all = vec!["bench"];
    all.extend_from_slice(args);
    all.extend(["--json", "--repeat", "1", "--threads", "1"]);
    let output = setun(all).ok();
    let record: Value = serde_json::from_str(&output.stdout).unwrap();
    assert_eq!(record["machine"]["threads"], 1);
    record["figures"].as_array().unwrap().clone()
}

#[track_caller]
fn check(figures: &[Value], count: usize) {
    assert_eq!(figures.len(), count);
    for figure in figures {
        let positive = |key: &str| figure[key].as_f64().is_some_and(|x| x > 0.0);
        assert!(positive("rate") && positive("seconds"), "{figure}");
        if figure.get("limit").is_some() {
            let [rate, limit, ratio] = ["rate", "limit", "ratio"].map(|k| figure[k].as_f64());
            let expected = rate.unwrap() / limit.unwrap();
            assert!((ratio.unwrap() / expected - 1.0).abs() < 1e-9, "{figure}");
        }
    }
}

#[test]
fn benchmarks_print_rates_limits_and_ratios() {
    check(&figures(&["peak"]), 3);
    let attention = [
        "attention",
        "--seq",
        "100",
        "--head-dim",
        "16",
        "--heads",
        "2",
    ];
    check(&figures(&attention), 2);
    let norms = figures(&["layer-norm", "--rows", "130", "--width", "256"]);
    check(&norms, 4);
    for norm in norms.iter().filter(|f| f.get("dx_error").is_some()) {
        assert!(norm["dx_error"].as_f64().unwrap() <= 1e-6, "{norm}");
        assert!(norm["dgamma_error"].as_f64().unwrap() <= 1e-6, "{norm}");
    }
    let train = [
        "train",
        "--shape",
        "quickstart",
        "--batch-size",
        "1",
        "--seq-len",
        "16",
    ];
    let train = figures(&train);
    check(&train, 1);
    let loss = train[0]["loss"].as_f64().unwrap();
    assert!(
        (loss / 1024f64.ln() - 1.0).abs() < 0.2,
        "random tokens: {loss}"
    );
}

#[test]
fn wrong_benchmarks_are_refused() {
    setun(["bench", "train", "--shape", "huge"]).refused(2, &["path-b"]);
    let without = setun(["bench"]);
    assert_eq!(without.code, Some(2));
    assert!(without.stderr.contains("Usage"), "{without:?}");
}

#[test]
fn a_profile_accounts_for_the_steps_and_changes_nothing() {
    let scratch = Scratch::new("profile");
    let corpus = scratch.corpus();
    let [plain, profiled] = ["plain", "profiled"].map(|name| scratch.join(name));
    finish(&mut training(&plain, &corpus, &[])).ok();
    let output = finish(&mut training(&profiled, &corpus, &["--profile"])).ok();
    assert!(output.stderr.contains("linear dw"), "{output:?}");
    assert!(!plain.join("profile.json").exists());
    assert_eq!(metrics(&plain), metrics(&profiled));
    assert_eq!(params_hash(&plain, 20), params_hash(&profiled, 20));
    let profile = json(&profiled.join("profile.json"));
    assert_eq!(profile["steps"], 20);
    let operations = profile["operations"].as_array().unwrap();
    let shares: f64 = operations
        .iter()
        .filter_map(|op| op["share"].as_f64())
        .sum();
    assert!((shares - 1.0).abs() < 1e-6, "{shares}");
    let text = fs::read_to_string(profiled.join("profile.json")).unwrap();
    assert!(text.contains("attention backward"));
}
