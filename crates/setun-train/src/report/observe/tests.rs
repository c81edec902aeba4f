//! Which sentences a run gets.

use super::super::demo;
use super::super::record::{Duplicates, TernaryRecord};
use super::*;

fn eval(step: u64, loss: f64, train_loss: f64) -> EvalRecord {
    let (perplexity, bits_per_byte) = (loss.exp(), 1.0);
    EvalRecord {
        step,
        loss,
        perplexity,
        bits_per_byte,
        tokens: 10,
        train_loss,
    }
}

fn has(notes: &[Observation], severity: Severity, words: &str) -> bool {
    notes
        .iter()
        .any(|note| note.severity == severity && note.text.contains(words))
}

#[test]
fn overfit_needs_a_rise_of_one_and_a_fall_of_the_other() {
    let evals = [
        eval(10, 3.0, 3.1),
        eval(20, 2.5, 2.4),
        eval(30, 2.6, 2.0),
        eval(40, 2.9, 1.5),
    ];
    let found = overfit(&evals).unwrap();
    assert_eq!((found.best_step, found.last_step), (20, 40));
    assert!((found.rise_nats - 0.4).abs() < 1e-9);
    assert!((found.train_fall_nats - 0.9).abs() < 1e-9);

    assert_eq!(
        overfit(&evals[..3]),
        None,
        "one evaluation after the best is no trend"
    );
    assert_eq!(overfit(&[]), None);
    let falling = [eval(10, 3.0, 3.0), eval(20, 2.0, 2.0), eval(30, 1.0, 1.0)];
    assert_eq!(overfit(&falling), None);
    let both_rise = [eval(10, 2.0, 2.0), eval(20, 2.5, 2.5), eval(30, 3.0, 3.0)];
    assert_eq!(
        overfit(&both_rise),
        None,
        "that is divergence, not overfitting"
    );
    let noise = [
        eval(10, 2.0, 2.0),
        eval(20, 2.001, 1.9),
        eval(30, 2.002, 1.8),
    ];
    assert_eq!(overfit(&noise), None);
    let not_finite = [eval(10, f64::NAN, 2.0), eval(20, f64::NAN, 1.0)];
    assert_eq!(overfit(&not_finite), None);
}

#[test]
fn the_demo_run_overfits_and_beats_its_baselines() {
    let (record, metrics) = (demo::record(), demo::metrics());
    let notes = observations(&record, &metrics);
    assert!(
        has(&notes, Severity::Warning, "Overfitting from step 800:"),
        "{notes:#?}"
    );
    assert!(has(
        &notes,
        Severity::Info,
        "The best checkpoint is not the last"
    ));
    assert!(has(
        &notes,
        Severity::Good,
        "Beats the interpolated trigram by"
    ));
    assert!(has(&notes, Severity::Info, "3 of 1,200 steps were skipped"));
    assert!(has(
        &notes,
        Severity::Warning,
        "copy more than 80 characters"
    ));
    assert!(has(&notes, Severity::Warning, "2 of 31 held-out documents"));
    assert!(!notes.iter().any(|note| note.text.contains("still falling")));
    assert!(
        notes
            .windows(2)
            .all(|pair| pair[0].severity <= pair[1].severity)
    );
}

#[test]
fn a_healthy_run_gets_no_warning() {
    let mut record = demo::record();
    record.samples.truncate(1);
    record.data.duplicates = Some(Duplicates::default());
    let mut metrics = demo::metrics();
    metrics.retain(|metric| match metric {
        Metric::Step(step) => step.accepted() && step.step <= 800,
        Metric::Eval(eval) => eval.step <= 800,
        Metric::Ternary(look) => look.step <= 800,
        Metric::Event { .. } => false,
    });
    let notes = observations(&record, &metrics);
    assert!(
        notes.iter().all(|note| note.severity != Severity::Warning),
        "{notes:#?}"
    );
    assert!(has(&notes, Severity::Info, "still falling at the end"));
    assert!(has(
        &notes,
        Severity::Good,
        "None of 800 steps was skipped."
    ));
}

#[test]
fn losing_and_incomparable_baselines_are_warnings() {
    let mut record = demo::record();
    record.baselines[0].loss = 0.5;
    record.baselines[1].tokens += 1;
    let notes = observations(&record, &demo::metrics());
    assert!(has(&notes, Severity::Warning, "Does not beat the unigram"));
    assert!(has(&notes, Severity::Warning, "they cannot be compared"));
}

#[test]
fn slowdown_clipping_and_zero_share_are_seen() {
    let mut metrics = demo::metrics();
    for metric in &mut metrics {
        if let Metric::Step(step) = metric {
            step.clipped = true;
            step.tokens_per_second *= if step.step > 1000 { 0.5 } else { 1.0 };
        }
    }
    let look = TernaryRecord {
        step: 1200,
        zero_share: 0.75,
        flip_rate: 0.5,
        scale_median: 1.0,
    };
    metrics.push(Metric::Ternary(look));
    let notes = observations(&demo::record(), &metrics);
    assert!(has(&notes, Severity::Warning, "Training slowed down by"));
    assert!(has(&notes, Severity::Warning, "clipped in 100"));
    assert!(has(
        &notes,
        Severity::Warning,
        "75.0\u{a0}% of the trits are zero"
    ));
    assert!(has(&notes, Severity::Info, "The trits are still changing"));
}

#[test]
fn a_held_out_loss_that_is_not_finite_is_a_warning() {
    let mut metrics = demo::metrics();
    metrics.push(Metric::Eval(eval(1200, f64::NAN, 2.0)));
    let notes = observations(&demo::record(), &metrics);
    assert!(
        has(&notes, Severity::Warning, "at step 1,200, is not finite"),
        "{notes:#?}"
    );
}

#[test]
fn duplicates_are_not_called_absent_where_nobody_looked() {
    let mut record = demo::record();
    let mut notes_of = |found: Option<Duplicates>| {
        record.data.duplicates = found;
        observations(&record, &demo::metrics())
    };
    let notes = notes_of(None);
    assert!(
        has(&notes, Severity::Info, "was not checked: the data are"),
        "{notes:#?}"
    );
    assert!(!has(&notes, Severity::Good, "near-duplicate"));
    let kept = Duplicates {
        exact: 3,
        exact_dropped: Some(0),
        ..Duplicates::default()
    };
    let notes = notes_of(Some(kept.clone()));
    assert!(has(&notes, Severity::Warning, "3 training documents are"));
    assert!(!has(&notes, Severity::Good, "near-duplicate"));
    let notes = notes_of(Some(Duplicates {
        exact_dropped: Some(3),
        dropped: 2,
        ..kept
    }));
    assert!(has(&notes, Severity::Info, "3 exact copies of held-out"));
    assert!(has(&notes, Severity::Info, "and 2 other documents"));
    assert!(has(&notes, Severity::Good, "None of 31 held-out documents"));
}

#[test]
fn counts_refer_to_the_steps_that_were_taken() {
    let mut metrics = demo::metrics();
    metrics.retain(|metric| match metric {
        Metric::Step(step) => !step.accepted() || step.step.is_multiple_of(10),
        _ => true,
    });
    let notes = observations(&demo::record(), &metrics);
    assert!(
        has(&notes, Severity::Info, "3 of 1,200 steps were skipped"),
        "{notes:#?}"
    );
    assert!(has(&notes, Severity::Info, "mean of the last 20 logged"));
    assert!(has(&notes, Severity::Info, "accepted steps that were"));
    assert!(has(&notes, Severity::Info, "saw 2,457,600 tokens"));
}

#[test]
fn a_model_that_training_made_worse_is_a_warning() {
    let (record, mut metrics) = (demo::record(), demo::metrics());
    let words = "worse than it was at the start";
    metrics.insert(0, Metric::Eval(eval(0, 9.0, f64::NAN)));
    assert!(!has(
        &observations(&record, &metrics),
        Severity::Warning,
        words
    ));
    metrics[0] = Metric::Eval(eval(0, 0.5, f64::NAN));
    let notes = observations(&record, &metrics);
    assert!(has(&notes, Severity::Warning, words), "{notes:#?}");
    // The best that there is a checkpoint of is still that of a step.
    assert!(has(&notes, Severity::Warning, "Overfitting from step 800:"));
    let notes = observations(&record, &metrics[..2]);
    assert!(has(&notes, Severity::Warning, "has not been evaluated yet"));
}

#[test]
fn memory_beside_the_plan_is_no_warning_before_there_is_much_of_it() {
    let mut record = demo::record();
    let planned: u64 = record.memory.plan.iter().map(|row| row.bytes).sum();
    for (more, severity) in [
        (0, Severity::Good),
        (100 << 20, Severity::Info),
        (400 << 20, Severity::Warning),
    ] {
        record.memory.peak_bytes = Some(planned + more);
        let notes = observations(&record, &demo::metrics());
        assert!(has(&notes, severity, "Peak resident memory"), "{notes:#?}");
    }
}

#[test]
fn a_run_without_steps_says_so() {
    let notes = observations(&demo::record(), &[]);
    assert!(has(
        &notes,
        Severity::Warning,
        "No training step is recorded."
    ));
}

#[test]
fn a_failed_verification_names_the_tensor() {
    let mut table = demo::verification();
    assert_eq!(observe_verification(&table).severity, Severity::Good);
    table.rows[2].pass = false;
    let note = observe_verification(&table);
    assert_eq!(note.severity, Severity::Warning);
    assert!(note.text.contains(&table.rows[2].name));
    assert_eq!(
        observe_verification(&VerificationTable::default()).severity,
        Severity::Warning
    );
}
