//! Sentences that the numbers of a run allow: each is only there when it is true.

use std::collections::BTreeMap;

use serde::Serialize;

use super::record::{
    EvalRecord, FinalResults, Metric, RunRecord, StepRecord, Timeline, VerificationTable, median,
};
use super::{bytes, grouped, percent};

/// A rise of the held-out loss by less than this many nats is taken for noise.
pub const OVERFIT_NATS: f64 = 0.01;
/// A fall of the held-out loss by less than this many nats near the end counts as flat.
const FLAT_NATS: f64 = 0.005;
/// A sample with a longer verbatim match, in characters, is called a copy.
const COPIED_CHARS: usize = 80;
/// A sample with a larger share of repeated 4-grams is called repetitive.
const REPETITIVE: f64 = 0.2;
/// Share of zeros of Gaussian weights under the mean rule: `P(|x| < E|x| / 2)`.
const GAUSSIAN_ZERO_SHARE: f64 = 0.31;
/// Share of zeros of published ternary models.
const TRAINED_ZERO_SHARE: f64 = 0.40;
/// Memory that a run may take beside its plan: the program, pieces of the text, and before the
/// plan is allocated, the counts of the baselines.
const UNPLANNED_BYTES: u64 = 256 << 20;

/// How much an observation matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Something to look into.
    Warning,
    /// Worth knowing.
    Info,
    /// As it should be.
    Good,
}

/// One sentence about a run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Observation {
    /// How much it matters.
    pub severity: Severity,
    /// The sentence, with its numbers.
    pub text: String,
}

/// Held-out loss that rose while the training loss fell.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Overfit {
    /// Step of the best evaluation.
    pub best_step: u64,
    /// Step of the last evaluation.
    pub last_step: u64,
    /// Rise of the held-out loss from the best to the last evaluation, in nats.
    pub rise_nats: f64,
    /// Fall of the training loss between the same two, in nats.
    pub train_fall_nats: f64,
}

/// The model against one baseline on the same tokens.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Comparison {
    /// Name of the baseline.
    pub baseline: String,
    /// Whether both were judged on the same number of tokens; else nothing follows.
    pub same_tokens: bool,
    /// Baseline's loss minus the model's, in nats: above zero, the model is better.
    #[serde(with = "super::record::float")]
    pub lead_nats: f64,
    /// The same in bits per byte.
    #[serde(with = "super::record::float")]
    pub lead_bits_per_byte: f64,
}

/// All observations about a run, the most serious first.
pub fn observations(record: &RunRecord, metrics: &[Metric]) -> Vec<Observation> {
    let timeline = Timeline::new(metrics);
    let mut notes = Notes::default();
    if let Some(results) = FinalResults::new(record, &timeline) {
        held_out(&mut notes, &timeline, &results);
        worse_than_before(&mut notes, &timeline);
        against_baselines(&mut notes, record, &results);
        guard(&mut notes, &timeline, &results);
        throughput(&mut notes, &timeline);
        repeated_data(&mut notes, record, &results);
    } else {
        notes.warning("No training step is recorded.".to_owned());
    }
    projection_cost(&mut notes, record, &timeline);
    if let Some(stop) = &record.early_stop {
        notes.info(format!(
            "The run stopped early at step {}: {}.",
            grouped(stop.step),
            stop.reason
        ));
    }
    ternary(&mut notes, record, &timeline);
    samples(&mut notes, record);
    duplicates(&mut notes, record);
    memory(&mut notes, record);
    notes.0.sort_by_key(|note| note.severity);
    notes.0
}

/// What the check of the model file says.
pub fn observe_verification(table: &VerificationTable) -> Observation {
    let failed = table
        .rows
        .iter()
        .filter(|row| !row.pass)
        .map(|row| &row.name);
    let failed_checks = table
        .checks
        .iter()
        .filter(|check| !check.pass)
        .map(|check| &check.name);
    let failed: Vec<&str> = failed_checks.chain(failed).map(String::as_str).collect();
    let (severity, text) = match failed.first() {
        _ if table.rows.is_empty() => (
            Severity::Warning,
            format!("{} holds no ternary tensor.", table.subject),
        ),
        None => {
            let count = table.rows.len();
            (
                Severity::Good,
                format!("All {count} matrices of {} are ternary.", table.subject),
            )
        }
        Some(first) => {
            let count = failed.len();
            let text = format!(
                "Verification of {} failed {count} times, first: {first}.",
                table.subject
            );
            (Severity::Warning, text)
        }
    };
    Observation { severity, text }
}

/// Whether the held-out loss has turned up while the training loss goes on falling: at
/// least two evaluations after the best, the last of them [`OVERFIT_NATS`] above it. The
/// evaluation before training, which has no training loss beside it, is not asked.
pub fn overfit(evals: &[EvalRecord]) -> Option<Overfit> {
    let trained = evals.iter().filter(|eval| eval.step > 0);
    let finite = trained.filter(|eval| eval.loss.is_finite());
    let best = finite.min_by(|a, b| a.loss.total_cmp(&b.loss))?;
    let last = evals.last()?;
    let num_after = evals.iter().filter(|eval| eval.step > best.step).count();
    let rise_nats = last.loss - best.loss;
    let train_fall_nats = best.train_loss - last.train_loss;
    (num_after >= 2 && rise_nats >= OVERFIT_NATS && train_fall_nats > 0.0).then_some(Overfit {
        best_step: best.step,
        last_step: last.step,
        rise_nats,
        train_fall_nats,
    })
}

/// `eval` against every baseline of the run.
pub fn compare(record: &RunRecord, eval: &EvalRecord) -> Vec<Comparison> {
    let compared = record.baselines.iter().map(|baseline| Comparison {
        baseline: baseline.name.clone(),
        same_tokens: baseline.tokens == eval.tokens,
        lead_nats: baseline.loss - eval.loss,
        lead_bits_per_byte: baseline.bits_per_byte - eval.bits_per_byte,
    });
    compared.collect()
}

#[derive(Default)]
struct Notes(Vec<Observation>);

impl Notes {
    fn warning(&mut self, text: String) {
        self.0.push(Observation {
            severity: Severity::Warning,
            text,
        });
    }

    fn info(&mut self, text: String) {
        self.0.push(Observation {
            severity: Severity::Info,
            text,
        });
    }

    fn good(&mut self, text: String) {
        self.0.push(Observation {
            severity: Severity::Good,
            text,
        });
    }
}

/// What a run that starts from a dense model lost and won back.
fn projection_cost(notes: &mut Notes, record: &RunRecord, timeline: &Timeline) {
    let (Some(cost), Some(best)) = (record.projection, timeline.best_eval()) else {
        return;
    };
    let left = best.loss - cost.before;
    notes.info(format!(
        "The dense model had a held-out loss of {:.4} nats per token; its projection had {:.4} \
         without training, and {:.4} at best with it (step {}): {:.4} {} the dense model.",
        cost.before,
        cost.after,
        best.loss,
        best.step,
        left.abs(),
        if left > 0.0 { "above" } else { "below" },
    ));
}

fn held_out(notes: &mut Notes, timeline: &Timeline, results: &FinalResults) {
    let (Some(last), Some(best)) = (&results.final_eval, &results.best_eval) else {
        let why = match timeline.evals.iter().any(|eval| eval.step > 0) {
            true => "There is no finite held-out loss",
            false => "The trained model has not been evaluated yet",
        };
        notes.warning(format!("{why}, so no perplexity can be given."));
        return;
    };
    if !last.loss.is_finite() {
        let step = grouped(last.step);
        notes.warning(format!(
            "The last held-out loss, at step {step}, is not finite."
        ));
    }
    if let Some(overfit) = overfit(&timeline.evals) {
        notes.warning(format!(
            "Overfitting from step {}: by step {} the held-out loss rose by {:.3} nats while the \
             training loss fell by {:.3}.",
            grouped(overfit.best_step),
            grouped(overfit.last_step),
            overfit.rise_nats,
            overfit.train_fall_nats
        ));
    }
    if best.step == last.step {
        still_falling(notes, &timeline.evals, last);
    } else {
        notes.info(format!(
            "The best checkpoint is not the last: held-out loss {:.3} at step {}, {:.3} at step {}.",
            best.loss,
            grouped(best.step),
            last.loss,
            grouped(last.step)
        ));
    }
    let gap = last.loss - results.train_loss;
    if gap.abs() >= OVERFIT_NATS {
        let place = if gap > 0.0 { "above" } else { "below" };
        notes.info(format!(
            "The final held-out loss ({:.3}) is {:.3} nats {place} the final training loss \
             ({:.3}, {}).",
            last.loss,
            gap.abs(),
            results.train_loss,
            results.train_loss_of()
        ));
    }
}

/// A model that no step has made better than what training started from.
fn worse_than_before(notes: &mut Notes, timeline: &Timeline) {
    let before = timeline.eval_before_training();
    let (Some(before), Some(best)) = (before, timeline.best_eval()) else {
        return;
    };
    if before.loss < best.loss {
        notes.warning(format!(
            "Training made the model worse than it was at the start: the held-out loss was {:.3} \
             before the first step and {:.3} at best after it (step {}).",
            before.loss,
            best.loss,
            grouped(best.step)
        ));
    }
}

/// Looks at the last tenth of the steps, or the last two evaluations if they are further
/// apart.
fn still_falling(notes: &mut Notes, evals: &[EvalRecord], last: &EvalRecord) {
    let earlier = evals
        .iter()
        .rev()
        .find(|eval| eval.step <= last.step - last.step.div_ceil(10));
    let Some(earlier) = earlier.filter(|eval| eval.step > 0) else {
        return;
    };
    let (fall, steps) = (earlier.loss - last.loss, grouped(last.step - earlier.step));
    if fall >= FLAT_NATS {
        notes.info(format!(
            "The held-out loss was still falling at the end, by {fall:.3} nats over the last \
             {steps} steps: more steps may help."
        ));
    } else if fall.is_finite() {
        notes.good(format!(
            "The held-out loss has settled: it changed by {fall:.3} nats over the last {steps} steps."
        ));
    }
}

fn against_baselines(notes: &mut Notes, record: &RunRecord, results: &FinalResults) {
    let Some(best) = &results.best_eval else {
        return;
    };
    for (comparison, baseline) in compare(record, best).iter().zip(&record.baselines) {
        let name = &comparison.baseline;
        let losses = format!(
            "{:.3} against {:.3} nats, {:.3} against {:.3} bits per byte",
            best.loss, baseline.loss, best.bits_per_byte, baseline.bits_per_byte
        );
        if !comparison.same_tokens {
            notes.warning(format!(
                "The {name} was judged on {} tokens and the model on {}: they cannot be compared.",
                grouped(baseline.tokens),
                grouped(best.tokens)
            ));
        } else if comparison.lead_nats > 0.0 {
            notes.good(format!(
                "Beats the {name} by {:.3} nats ({losses}).",
                comparison.lead_nats
            ));
        } else {
            notes.warning(format!(
                "Does not beat the {name}: {:.3} nats behind ({losses}).",
                -comparison.lead_nats
            ));
        }
    }
    let uniform = (record.data.vocab_size as f64).ln();
    if best.loss >= uniform {
        notes.warning(format!(
            "The held-out loss {:.3} is no better than guessing all {} tokens alike ({uniform:.3}).",
            best.loss,
            grouped(record.data.vocab_size as u64)
        ));
    }
}

fn guard(notes: &mut Notes, timeline: &Timeline, results: &FinalResults) {
    let num_steps = grouped(results.final_step);
    if results.skipped_steps > 0 {
        let mut reasons: BTreeMap<&str, usize> = BTreeMap::new();
        for reason in timeline
            .steps
            .iter()
            .filter_map(|step| step.skipped.as_deref())
        {
            *reasons.entry(reason).or_default() += 1;
        }
        let mut reasons: Vec<_> = reasons.into_iter().collect();
        reasons.sort_by_key(|&(_, count)| std::cmp::Reverse(count));
        let shown: Vec<_> = reasons
            .iter()
            .take(3)
            .map(|(why, n)| format!("{n} \u{d7} {why}"))
            .collect();
        let more = if reasons.len() > shown.len() {
            ", and others"
        } else {
            ""
        };
        let share = results.skipped_steps as f64 / results.final_step as f64;
        let text = format!(
            "{} of {num_steps} steps were skipped ({}): {}{more}.",
            grouped(results.skipped_steps),
            percent(share),
            shown.join(", ")
        );
        if share > 0.01 {
            notes.warning(text)
        } else {
            notes.info(text)
        }
    } else {
        notes.good(format!("None of {num_steps} steps was skipped."));
    }
    if results.clipped_steps > 0 {
        let share = results.clipped_steps as f64 / results.logged_steps as f64;
        let logged = match results.all_logged() {
            true => "",
            false => " that were logged",
        };
        let text = format!(
            "The gradient was clipped in {} of the accepted steps{logged}.",
            percent(share)
        );
        if share > 0.5 {
            notes.warning(text)
        } else {
            notes.info(text)
        }
    }
    let bad = timeline
        .accepted()
        .filter(|step| !step.loss.is_finite())
        .count();
    if bad > 0 {
        notes.warning(format!(
            "{bad} accepted steps have a loss that is not finite."
        ));
    }
}

/// Medians of the first and the last tenth, after a twentieth of warm-up.
fn throughput(notes: &mut Notes, timeline: &Timeline) {
    let accepted: Vec<&StepRecord> = timeline.accepted().collect();
    if accepted.len() < 40 {
        return;
    }
    let speed = |steps: &[&StepRecord]| median(steps.iter().map(|s| s.tokens_per_second).collect());
    let (warm_up, tenth) = (accepted.len() / 20, accepted.len() / 10);
    let first = speed(&accepted[warm_up..warm_up + tenth]);
    let last = speed(&accepted[accepted.len() - tenth..]);
    let change = last / first - 1.0;
    let speeds = format!(
        "{} to {} tokens/s",
        grouped(first as u64),
        grouped(last as u64)
    );
    if change <= -0.1 {
        notes.warning(format!(
            "Training slowed down by {} ({speeds}).",
            percent(-change)
        ));
    } else if change >= 0.1 {
        notes.info(format!(
            "Training sped up by {} ({speeds}).",
            percent(change)
        ));
    } else if change.is_finite() {
        notes.good(format!("The speed was steady ({speeds})."));
    }
}

fn repeated_data(notes: &mut Notes, record: &RunRecord, results: &FinalResults) {
    if results.tokens > 0 && record.model.parameters > 0 {
        notes.info(format!(
            "The model saw {} tokens, {:.2} per parameter, in {:.2} epochs.",
            grouped(results.tokens),
            results.tokens as f64 / record.model.parameters as f64,
            results.epochs
        ));
    }
}

fn ternary(notes: &mut Notes, record: &RunRecord, timeline: &Timeline) {
    let Some(last) = timeline.ternary.last() else {
        return;
    };
    let share = last.zero_share;
    // The two marks hold for the mean rule only.
    if record.model.scale_rule == "mean" {
        let text = format!(
            "{} of the trits are zero; Gaussian weights have {}, trained models about {}.",
            percent(share),
            percent(GAUSSIAN_ZERO_SHARE),
            percent(TRAINED_ZERO_SHARE)
        );
        if (0.2..0.6).contains(&share) {
            notes.info(text)
        } else {
            notes.warning(text)
        }
    } else {
        notes.info(format!("{} of the trits are zero.", percent(share)));
    }
    let rates = timeline
        .ternary
        .iter()
        .map(|look| look.flip_rate)
        .filter(|rate| rate.is_finite());
    let peak = rates.fold(0.0, f64::max);
    if peak > 0.0 && timeline.ternary.len() >= 3 && last.flip_rate.is_finite() {
        let rates = format!(
            "{} of them per step at the end, {} at the peak",
            percent(last.flip_rate),
            percent(peak)
        );
        if last.flip_rate <= 0.1 * peak {
            notes.good(format!("The trits have settled: {rates}."));
        } else {
            notes.info(format!("The trits are still changing: {rates}."));
        }
    }
}

fn samples(notes: &mut Notes, record: &RunRecord) {
    let count = record.samples.len();
    let Some(longest) = record.samples.iter().map(|sample| sample.match_chars).max() else {
        return;
    };
    let copied = record
        .samples
        .iter()
        .filter(|sample| sample.match_chars > COPIED_CHARS)
        .count();
    let first = record.compared_bytes.map_or(String::new(), |bytes| {
        format!("first {} MiB of the ", bytes >> 20)
    });
    if copied > 0 {
        notes.warning(format!(
            "{copied} of {count} samples copy more than {COPIED_CHARS} characters of the \
             {first}training text, the longest {longest}."
        ));
    } else {
        notes.good(format!(
            "No sample copies more than {longest} characters in a row from the {first}training \
             text."
        ));
    }
    let repetitive = record
        .samples
        .iter()
        .filter(|s| s.repetition_rate > REPETITIVE)
        .count();
    let worst = record
        .samples
        .iter()
        .map(|s| s.repetition_rate)
        .fold(0.0, f64::max);
    let worst = percent(worst);
    if repetitive > 0 {
        notes.warning(format!(
            "{repetitive} of {count} samples repeat themselves: up to {worst} of the 4-grams of \
             words came before."
        ));
    } else {
        notes.good(format!(
            "No sample repeats more than {worst} of its 4-grams of words."
        ));
    }
}

fn duplicates(notes: &mut Notes, record: &RunRecord) {
    let data = &record.data;
    let Some(duplicates) = data.checked_duplicates() else {
        notes.info(
            "Whether held-out text is in the training part as well was not checked: the data are \
             token files."
                .to_owned(),
        );
        return;
    };
    let copies = duplicates.exact - duplicates.exact_left_out();
    if duplicates.across_split > 0 {
        notes.warning(format!(
            "{} of {} held-out documents have a near-duplicate in the training part: the held-out \
             loss flatters the model.",
            grouped(duplicates.across_split),
            grouped(data.valid_documents)
        ));
    } else if data.valid_documents > 0 && copies == 0 {
        notes.good(format!(
            "None of {} held-out documents has a near-duplicate in the training part.",
            grouped(data.valid_documents)
        ));
    }
    if copies > 0 {
        notes.warning(format!(
            "{} training documents are exact copies of held-out ones: the held-out loss flatters \
             the model.",
            grouped(copies)
        ));
    }
    let (exact, near) = (duplicates.exact_left_out(), duplicates.near_left_out());
    if exact > 0 || near > 0 {
        notes.info(format!(
            "Left out of training: {} exact copies of held-out documents, and {} other documents \
             that share text with them.",
            grouped(exact),
            grouped(near)
        ));
    }
}

fn memory(notes: &mut Notes, record: &RunRecord) {
    let planned: u64 = record.memory.plan.iter().map(|row| row.bytes).sum();
    let Some(peak) = record.memory.peak_bytes.filter(|_| planned > 0) else {
        return;
    };
    let text = format!(
        "Peak resident memory {}, planned {}.",
        bytes(peak),
        bytes(planned)
    );
    // The plan leaves out threads and what comes before and after training, so some excess is
    // normal.
    let (peak, limit) = (peak as f64, 1.25 * planned as f64);
    if peak > limit + UNPLANNED_BYTES as f64 {
        notes.warning(text)
    } else if peak > limit {
        notes.info(text)
    } else {
        notes.good(text)
    }
}

#[cfg(test)]
mod tests;
