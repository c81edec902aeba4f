//! Lines of metrics, timelines and what they come to.

use super::super::demo;
use super::*;

fn step(step: u64, loss: f64) -> StepRecord {
    StepRecord {
        step,
        loss,
        divergence: None,
        lr: 1e-3,
        grad_norm: 0.5,
        clipped: false,
        tokens_per_second: 1000.0 + step as f64,
        epoch: step as f64 / 100.0,
        skipped: None,
    }
}

fn eval(step: u64, loss: f64) -> Metric {
    Metric::Eval(EvalRecord {
        step,
        loss,
        perplexity: loss.exp(),
        bits_per_byte: 1.5,
        tokens: 100,
        train_loss: loss,
    })
}

#[test]
fn lines_survive_a_round_trip() {
    let mut bad = step(2, f64::NAN);
    bad.grad_norm = f64::NEG_INFINITY;
    bad.lr = f64::INFINITY;
    bad.skipped = Some("loss is NaN".to_owned());
    let ternary = TernaryRecord {
        step: 2,
        zero_share: 0.25,
        flip_rate: 0.5,
        scale_median: 2.0,
    };
    let metrics = [
        Metric::Step(step(1, 4.0)),
        Metric::Step(bad),
        eval(2, 3.5),
        Metric::Ternary(ternary),
        Metric::Event {
            step: 2,
            message: "two\nlines".to_owned(),
        },
    ];
    let text: String = metrics.iter().map(Metric::to_line).collect();
    assert!(
        text.starts_with("{\"kind\":\"step\",\"step\":1,\"loss\":4.0,"),
        "{text}"
    );
    assert!(text.contains("\"loss\":\"NaN\",\"lr\":\"inf\",\"grad_norm\":\"-inf\""));
    assert_eq!(text.lines().count(), metrics.len());
    let parsed = Metric::parse_lines(text.as_bytes()).unwrap();
    // NaN is unequal to itself, so the debug texts are compared.
    assert_eq!(format!("{:?}", parsed.metrics), format!("{metrics:?}"));
    assert_eq!((parsed.whole_bytes, parsed.note), (text.len(), None));
}

#[test]
fn whole_numbers_are_read_as_floats() {
    let line = b"{\"kind\":\"ternary\",\"step\":3,\"zero_share\":0,\"flip_rate\":-1,\
        \"scale_median\":1e400}\n";
    assert!(
        Metric::parse_lines(line).is_err(),
        "1e400 is not a finite number"
    );
    let line = b"{\"kind\":\"ternary\",\"step\":3,\"zero_share\":0,\"flip_rate\":-1,\
        \"scale_median\":2}\n";
    let parsed = Metric::parse_lines(line).unwrap();
    let Metric::Ternary(record) = &parsed.metrics[0] else {
        panic!("{parsed:?}")
    };
    assert_eq!((record.zero_share, record.flip_rate), (0.0, -1.0));
}

#[test]
fn a_bad_line_is_named_and_a_torn_last_line_is_dropped() {
    let good = eval(1, 2.0).to_line();
    for bad in [
        "",
        "{}",
        "nonsense",
        "{\"kind\":\"other\"}",
        "\0\0",
        &good[..30],
    ] {
        let text = format!("{good}{bad}\n{good}");
        assert_eq!(
            Metric::parse_lines(text.as_bytes()).unwrap_err().line,
            2,
            "{bad:?}"
        );
    }
    for cut in 1..good.len() {
        let mut bytes = good.clone().into_bytes();
        bytes.extend_from_slice(&good.as_bytes()[..cut]);
        let parsed = Metric::parse_lines(&bytes).unwrap();
        assert_eq!((parsed.metrics.len(), parsed.whole_bytes), (1, good.len()));
        assert!(parsed.note.unwrap().contains("line 2"));
    }
    let empty = Metric::parse_lines(b"").unwrap();
    assert_eq!((empty.metrics.len(), empty.note), (0, None));
}

#[test]
fn a_resumed_run_replaces_the_steps_that_it_repeats() {
    let mut metrics: Vec<Metric> = (1..=6).map(|n| Metric::Step(step(n, 9.0))).collect();
    metrics.insert(2, eval(2, 9.0));
    metrics.push(eval(6, 9.0));
    metrics.push(Metric::Event {
        step: 2,
        message: "resumed".to_owned(),
    });
    metrics.extend((3..=4).map(|n| Metric::Step(step(n, 1.0))));
    metrics.push(eval(4, 1.0));
    let timeline = Timeline::new(&metrics);
    let losses: Vec<_> = timeline.steps.iter().map(|s| (s.step, s.loss)).collect();
    assert_eq!(losses, [(1, 9.0), (2, 9.0), (3, 1.0), (4, 1.0)]);
    let evals: Vec<_> = timeline.evals.iter().map(|e| e.step).collect();
    assert_eq!(evals, [2, 4]);
    assert_eq!(timeline.events, [(2, "resumed".to_owned())]);
}

#[test]
fn results_use_the_last_accepted_steps_only() {
    let mut metrics: Vec<Metric> = (1..=30).map(|n| Metric::Step(step(n, n as f64))).collect();
    let mut skipped = step(31, f64::INFINITY);
    skipped.skipped = Some("spike".to_owned());
    metrics.push(Metric::Step(skipped));
    metrics.extend([
        eval(10, 3.0),
        eval(20, 2.0),
        eval(25, 2.0),
        eval(31, f64::NAN),
    ]);
    let record = demo::record();
    let results = FinalResults::new(&record, &Timeline::new(&metrics)).unwrap();
    assert_eq!(results.train_loss, (11..=30).sum::<u64>() as f64 / 20.0);
    assert_eq!(
        results.train_loss_of(),
        "mean of the last 20 accepted steps"
    );
    assert_eq!(results.tokens, 31 * 2048);
    assert_eq!(results.epochs, (31 * 2048) as f64 / 88_310.0);
    assert_eq!((results.final_step, results.accepted_steps), (31, 30));
    assert_eq!((results.skipped_steps, results.clipped_steps), (1, 0));
    assert_eq!(results.tokens_per_second, 1016.0);
    assert_eq!(
        results.best_eval.unwrap().step,
        20,
        "the earliest of equals, never NaN"
    );
    assert_eq!(results.final_eval.unwrap().step, 31);
    assert_eq!(FinalResults::new(&record, &Timeline::default()), None);
}

/// With `log.every = 10`, which step 1 and skipped steps are no part of.
#[test]
fn results_know_the_steps_that_were_not_logged() {
    let logged = [1, 10, 20, 30].map(|n| Metric::Step(step(n, n as f64)));
    let mut metrics = logged.to_vec();
    let mut skipped = step(33, 9.0);
    skipped.skipped = Some("spike".to_owned());
    metrics.push(Metric::Step(skipped));
    // The run stops early behind it.
    metrics.push(eval(35, 2.0));
    let results = FinalResults::new(&demo::record(), &Timeline::new(&metrics)).unwrap();
    assert_eq!((results.final_step, results.accepted_steps), (35, 34));
    assert_eq!((results.skipped_steps, results.logged_steps), (1, 4));
    assert_eq!(results.tokens, 35 * 2048);
    assert_eq!(results.train_loss_of(), "mean of the last 4 logged steps");
}

#[test]
fn the_evaluation_before_training_is_never_the_best() {
    let metrics = [eval(0, 1.0), Metric::Step(step(1, 3.0)), eval(1, 2.0)];
    let timeline = Timeline::new(&metrics);
    assert_eq!(timeline.best_eval().unwrap().step, 1);
    assert_eq!(timeline.eval_before_training().unwrap().loss, 1.0);
    let timeline = Timeline::new(&metrics[..1]);
    assert_eq!(timeline.best_eval(), None);
}

/// What a version before these fields wrote.
#[test]
fn records_of_earlier_versions_are_read() {
    let mut json = serde_json::to_value(demo::record()).unwrap();
    let object = json.as_object_mut().unwrap();
    for field in ["seconds", "files"] {
        object.remove(field).unwrap();
    }
    let duplicates = object["data"]["duplicates"].as_object_mut().unwrap();
    duplicates.remove("exact_dropped").unwrap();
    duplicates["exact"] = serde_json::json!(5);
    duplicates["dropped"] = serde_json::json!(2);
    let mut record: RunRecord = serde_json::from_value(json).unwrap();
    assert_eq!((record.seconds, record.smallest_file()), (None, None));
    let found = record.data.checked_duplicates().unwrap();
    assert_eq!((found.exact_left_out(), found.near_left_out()), (2, 0));
    // There, 0 for token files meant nothing.
    record.data.sources = vec!["text.tokens".to_owned()];
    assert_eq!(record.data.checked_duplicates(), None);
}

#[test]
fn an_empty_verification_proves_nothing() {
    assert!(!VerificationTable::default().passed());
}
