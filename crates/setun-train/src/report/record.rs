//! What a run writes down: one line per event in `metrics.jsonl`, and `run.json`.
//!
//! `step` counts finished steps: the first [`StepRecord`] has step 1, and an evaluation
//! or checkpoint of step N sees the weights after N steps (step 0: before training).
//! Losses are in nats per token. Floats that JSON has no number for are written as
//! `"NaN"`, `"inf"` and `"-inf"`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// The final training loss is the mean of this many last accepted steps.
pub const FINAL_LOSS_STEPS: usize = 20;

/// One training step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepRecord {
    /// Number of this step, from 1.
    pub step: u64,
    /// Mean loss of the step's tokens, in nats.
    #[serde(with = "float")]
    pub loss: f64,
    /// Mean divergence from the teacher, in nats; none without one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub divergence: Option<f64>,
    /// Learning rate.
    #[serde(with = "float")]
    pub lr: f64,
    /// 2-norm of all gradients before clipping.
    #[serde(with = "float")]
    pub grad_norm: f64,
    /// Whether the gradient was scaled down to the largest allowed norm.
    pub clipped: bool,
    /// Training tokens per second of this step.
    #[serde(with = "float")]
    pub tokens_per_second: f64,
    /// Epochs done after this step, with fraction.
    #[serde(with = "float")]
    pub epoch: f64,
    /// Why the guard refused the update; none for an accepted step.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub skipped: Option<String>,
}

impl StepRecord {
    /// Whether the step changed the weights.
    pub fn accepted(&self) -> bool {
        self.skipped.is_none()
    }
}

/// One pass over the held-out tokens.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EvalRecord {
    /// Steps done before this evaluation.
    pub step: u64,
    /// Held-out loss, in nats per token.
    #[serde(with = "float")]
    pub loss: f64,
    /// `exp(loss)`.
    #[serde(with = "float")]
    pub perplexity: f64,
    /// Total nats / (ln 2 x raw UTF-8 bytes of the held-out text).
    #[serde(with = "float")]
    pub bits_per_byte: f64,
    /// Number of tokens that were predicted.
    pub tokens: u64,
    /// Mean training loss of the accepted steps since the last evaluation; NaN when there
    /// is none.
    #[serde(with = "float")]
    pub train_loss: f64,
}

/// State of all ternary weights together.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TernaryRecord {
    /// Steps done before this measurement.
    pub step: u64,
    /// Share of trits that are 0.
    #[serde(with = "float")]
    pub zero_share: f64,
    /// Share of trits that changed since the previous record, per step.
    #[serde(with = "float")]
    pub flip_rate: f64,
    /// Median of all group scales.
    #[serde(with = "float")]
    pub scale_median: f64,
}

/// One line of `metrics.jsonl`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum Metric {
    /// A training step.
    Step(StepRecord),
    /// A held-out evaluation.
    Eval(EvalRecord),
    /// A look at the ternary weights.
    Ternary(TernaryRecord),
    /// Anything else worth a line: a resume, a checkpoint, a stop.
    Event {
        /// Steps done when it happened.
        step: u64,
        /// What happened.
        message: String,
    },
}

/// A line of `metrics.jsonl` that is not a metric.
#[derive(Debug, Error)]
#[error(
    "line {line} of the metrics is not a metric ({cause}); restore the file from a copy, or \
     delete that line if the gap is acceptable"
)]
pub struct MetricsError {
    /// Line number, from 1.
    pub line: usize,
    /// What the JSON reader found.
    pub cause: serde_json::Error,
}

/// The content of a `metrics.jsonl` file.
#[derive(Clone, Debug, PartialEq)]
pub struct ParsedMetrics {
    /// All whole lines, in file order.
    pub metrics: Vec<Metric>,
    /// Length of the whole lines: cut the file here before appending to it.
    pub whole_bytes: usize,
    /// Says that a torn last line was dropped, if one was.
    pub note: Option<String>,
}

impl Metric {
    /// The metric as one line of JSON, with its newline.
    pub fn to_line(&self) -> String {
        // Every map key is a field name and floats go through `float`, so JSON can hold it.
        let mut line = serde_json::to_string(self).expect("a metric is plain JSON");
        line.push('\n');
        line
    }

    /// Reads a whole `metrics.jsonl`. A last line without its newline was torn by a crash:
    /// it is dropped, with a note. Any other line that is not a metric is an error.
    pub fn parse_lines(bytes: &[u8]) -> Result<ParsedMetrics, MetricsError> {
        let whole_bytes = bytes
            .iter()
            .rposition(|&b| b == b'\n')
            .map_or(0, |at| at + 1);
        let mut metrics = Vec::new();
        for (index, line) in bytes[..whole_bytes]
            .split_inclusive(|&b| b == b'\n')
            .enumerate()
        {
            let metric = serde_json::from_slice(line).map_err(|cause| MetricsError {
                line: index + 1,
                cause,
            })?;
            metrics.push(metric);
        }
        let torn = bytes.len() - whole_bytes;
        let note = (torn > 0).then(|| {
            let line = metrics.len() + 1;
            format!("line {line} of the metrics was cut off after {torn} bytes and is left out")
        });
        Ok(ParsedMetrics {
            metrics,
            whole_bytes,
            note,
        })
    }
}

/// The metrics of a run sorted by kind, each step once.
///
/// A run that is resumed from a checkpoint repeats steps. The repetition counts: a step
/// that is not after the last one drops every record from that step on.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Timeline {
    /// Training steps, ascending. Left out of JSON: they are all in `metrics.jsonl`.
    #[serde(skip)]
    pub steps: Vec<StepRecord>,
    /// Held-out evaluations, ascending.
    pub evals: Vec<EvalRecord>,
    /// Looks at the ternary weights, ascending.
    pub ternary: Vec<TernaryRecord>,
    /// Step and message of all events, in the order they were written.
    pub events: Vec<(u64, String)>,
}

impl Timeline {
    /// Sorts `metrics`, which are in the order they were written.
    pub fn new(metrics: &[Metric]) -> Self {
        let mut timeline = Self::default();
        for metric in metrics {
            match metric {
                Metric::Step(record) => {
                    if timeline
                        .steps
                        .last()
                        .is_some_and(|last| record.step <= last.step)
                    {
                        timeline.steps.retain(|other| other.step < record.step);
                        timeline.evals.retain(|other| other.step < record.step);
                        timeline.ternary.retain(|other| other.step < record.step);
                    }
                    timeline.steps.push(record.clone());
                }
                Metric::Eval(record) => {
                    while timeline
                        .evals
                        .pop_if(|last| last.step >= record.step)
                        .is_some()
                    {}
                    timeline.evals.push(record.clone());
                }
                Metric::Ternary(record) => {
                    while timeline
                        .ternary
                        .pop_if(|last| last.step >= record.step)
                        .is_some()
                    {}
                    timeline.ternary.push(record.clone());
                }
                Metric::Event { step, message } => timeline.events.push((*step, message.clone())),
            }
        }
        timeline
    }

    /// Steps that changed the weights.
    pub fn accepted(&self) -> impl DoubleEndedIterator<Item = &StepRecord> {
        self.steps.iter().filter(|step| step.accepted())
    }

    /// The evaluation with the smallest loss; the earliest of equals. Losses that are not
    /// finite never win.
    pub fn best_eval(&self) -> Option<&EvalRecord> {
        let finite = self.evals.iter().filter(|eval| eval.loss.is_finite());
        finite.min_by(|a, b| a.loss.total_cmp(&b.loss))
    }
}

/// What a finished run comes down to.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FinalResults {
    /// Number of the last step.
    pub final_step: u64,
    /// Steps that changed the weights.
    pub accepted_steps: u64,
    /// Steps that the guard refused.
    pub skipped_steps: u64,
    /// Accepted steps whose gradient was clipped.
    pub clipped_steps: u64,
    /// Mean loss of the last [`FINAL_LOSS_STEPS`] accepted steps; NaN when there is none.
    #[serde(with = "float")]
    pub train_loss: f64,
    /// Median over the accepted steps; NaN when there is none.
    #[serde(with = "float")]
    pub tokens_per_second: f64,
    /// Epochs done.
    #[serde(with = "float")]
    pub epochs: f64,
    /// The last held-out evaluation.
    pub final_eval: Option<EvalRecord>,
    /// The held-out evaluation with the smallest loss.
    pub best_eval: Option<EvalRecord>,
}

impl FinalResults {
    /// Sums a timeline up; none when it has no step.
    pub fn from_timeline(timeline: &Timeline) -> Option<Self> {
        let last = timeline.steps.last()?;
        let accepted: Vec<&StepRecord> = timeline.accepted().collect();
        let tail = &accepted[accepted.len().saturating_sub(FINAL_LOSS_STEPS)..];
        let speeds = accepted.iter().map(|step| step.tokens_per_second).collect();
        Some(Self {
            final_step: last.step,
            accepted_steps: accepted.len() as u64,
            skipped_steps: (timeline.steps.len() - accepted.len()) as u64,
            clipped_steps: accepted.iter().filter(|step| step.clipped).count() as u64,
            train_loss: tail.iter().map(|step| step.loss).sum::<f64>() / tail.len() as f64,
            tokens_per_second: median(speeds),
            epochs: last.epoch,
            final_eval: timeline.evals.last().cloned(),
            best_eval: timeline.best_eval().cloned(),
        })
    }
}

/// Upper median of `values`; NaN of none.
pub(super) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Held-out loss on both sides of the projection that a run begins with.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct ProjectionCost {
    /// Of the dense model, in nats per token.
    #[serde(with = "float")]
    pub before: f64,
    /// Of its projection, before any training.
    #[serde(with = "float")]
    pub after: f64,
}

/// `run.json`: everything about a run that is not a time series.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunRecord {
    /// Name of the run.
    pub name: String,
    /// The resolved settings.
    pub settings: serde_json::Value,
    /// Seed of the data order, the initial weights and the samples.
    pub seed: u64,
    /// Version of the program that trained.
    pub code_version: String,
    /// Where it ran.
    pub machine: Machine,
    /// What it was trained and judged on.
    pub data: DataFacts,
    /// What was trained.
    pub model: ModelFacts,
    /// Planned and measured memory.
    pub memory: MemoryFacts,
    /// Count models on the held-out tokens.
    #[serde(default)]
    pub baselines: Vec<Baseline>,
    /// Checkpoint name to the hash of the ternary weights that its last forward pass used.
    #[serde(default)]
    pub ternary_hashes: BTreeMap<String, String>,
    /// Start of the run, in seconds since 1970 (UTC).
    pub started: u64,
    /// End of the run, in seconds since 1970 (UTC); none while it runs.
    #[serde(default)]
    pub finished: Option<u64>,
    /// Results; none while it runs.
    #[serde(default)]
    pub results: Option<FinalResults>,
    /// Continuations of held-out prompts.
    #[serde(default)]
    pub samples: Vec<Sample>,
    /// Why the run ended before its last planned step, if it did.
    #[serde(default)]
    pub early_stop: Option<EarlyStop>,
    /// What the projection of a dense model cost; none for other beginnings.
    #[serde(default)]
    pub projection: Option<ProjectionCost>,
}

/// The machine of a run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    /// Model name of the processor.
    pub cpu: String,
    /// Cores that the operating system offers.
    pub cores: usize,
    /// Main memory, in bytes.
    pub memory_bytes: u64,
    /// Operating system and architecture.
    pub os: String,
    /// Instruction set of the kernels that ran.
    pub isa: String,
    /// Threads that computed.
    pub threads: usize,
}

/// Facts about the text.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct DataFacts {
    /// Documents to train on.
    pub train_documents: u64,
    /// Held-out documents.
    pub valid_documents: u64,
    /// Tokens to train on, separators included.
    pub train_tokens: u64,
    /// Held-out tokens, separators included.
    pub valid_tokens: u64,
    /// Raw UTF-8 bytes of the held-out text, without separators.
    pub valid_bytes: u64,
    /// Hash of the training part.
    pub train_hash: String,
    /// Hash of the held-out part.
    pub valid_hash: String,
    /// Documents that were too short to use or to compare.
    pub short_documents: u64,
    /// Equal and nearly equal documents.
    pub duplicates: Duplicates,
    /// Entries of the vocabulary.
    pub vocab_size: usize,
    /// blake3 of the tokenizer file; empty in records of earlier versions.
    #[serde(default)]
    pub tokenizer_hash: String,
    /// Where the text came from, as written in the settings.
    #[serde(default)]
    pub sources: Vec<String>,
}

/// Documents that occur more than once.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Duplicates {
    /// Documents with the same text as an earlier one.
    pub exact: u64,
    /// How many of those were left out.
    pub dropped: u64,
    /// Held-out documents with a near-duplicate in the training part.
    pub across_split: u64,
    /// Some near-duplicates across the split.
    #[serde(default)]
    pub examples: Vec<DuplicatePair>,
}

/// A held-out document and its nearest training document.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DuplicatePair {
    /// Start or name of the held-out document.
    pub valid: String,
    /// Start or name of the training document.
    pub train: String,
    /// Estimated similarity, 0 to 1.
    #[serde(with = "float")]
    pub similarity: f64,
}

/// Facts about the model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelFacts {
    /// The model's `config.json`.
    pub config: serde_json::Value,
    /// All parameters.
    pub parameters: u64,
    /// Parameters in matrices: those are ternary, unless the model is dense.
    pub matrix_parameters: u64,
    /// Parameters in norms, kept in f32.
    pub norm_parameters: u64,
    /// Weights that share a scale; none for a dense model.
    pub group_size: Option<usize>,
    /// Name of the scale rule; empty for a dense model.
    #[serde(default)]
    pub scale_rule: String,
    /// Name of the arithmetic mode.
    pub numerics: String,
    /// Bits per parameter of the shipped file.
    #[serde(with = "float")]
    pub bits_per_weight: f64,
    /// Size of the shipped file, in bytes.
    pub packed_bytes: u64,
}

/// Memory as planned before step 0 and as measured.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct MemoryFacts {
    /// The plan.
    #[serde(default)]
    pub plan: Vec<MemoryRow>,
    /// Largest resident size of the process, in bytes, where the system tells it.
    #[serde(default)]
    pub peak_bytes: Option<u64>,
}

/// One category of the memory plan.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MemoryRow {
    /// What the memory holds.
    pub category: String,
    /// Size in bytes.
    pub bytes: u64,
}

/// A count model, fitted on the training tokens and judged on the held-out tokens.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Baseline {
    /// For example `interpolated trigram`.
    pub name: String,
    /// Held-out loss, in nats per token.
    #[serde(with = "float")]
    pub loss: f64,
    /// The same in bits per raw byte.
    #[serde(with = "float")]
    pub bits_per_byte: f64,
    /// Number of tokens that were predicted.
    pub tokens: u64,
}

/// A continuation of a held-out prompt.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// Start of a held-out document.
    pub prompt: String,
    /// What the model wrote after it.
    pub text: String,
    /// How tokens were chosen, for people.
    pub decoding: String,
    /// Length of `match_text`, in characters.
    pub match_chars: usize,
    /// Longest piece of `text` that occurs in the training text.
    pub match_text: String,
    /// Share of 4-grams of words in `text` that occurred before in it.
    #[serde(with = "float")]
    pub repetition_rate: f64,
}

/// An end before the last planned step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EarlyStop {
    /// Steps done.
    pub step: u64,
    /// Why, for people.
    pub reason: String,
}

/// What the check of a model file found, per tensor.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct VerificationTable {
    /// File or checkpoint that was checked.
    pub subject: String,
    /// Checks of the file as a whole.
    #[serde(default)]
    pub checks: Vec<VerificationCheck>,
    /// One row for each ternary matrix.
    pub rows: Vec<VerificationRow>,
}

impl VerificationTable {
    /// Whether something was checked and nothing failed.
    pub fn passed(&self) -> bool {
        !self.rows.is_empty()
            && self.rows.iter().all(|row| row.pass)
            && self.checks.iter().all(|check| check.pass)
    }
}

/// One check of a whole file, such as its hashes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VerificationCheck {
    /// What was checked.
    pub name: String,
    /// Whether it held.
    pub pass: bool,
    /// What was found.
    pub detail: String,
}

/// One tensor of a [`VerificationTable`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VerificationRow {
    /// Name of the tensor.
    pub name: String,
    /// `[out, in]`.
    pub shape: Vec<usize>,
    /// Number of groups, each with its scale.
    pub groups: u64,
    /// Share of trits that are -1.
    #[serde(with = "float")]
    pub minus_share: f64,
    /// Share of trits that are 0.
    #[serde(with = "float")]
    pub zero_share: f64,
    /// Share of trits that are +1.
    #[serde(with = "float")]
    pub plus_share: f64,
    /// Smallest scale.
    #[serde(with = "float")]
    pub scale_min: f64,
    /// Largest scale.
    #[serde(with = "float")]
    pub scale_max: f64,
    /// Largest distance of a stored weight from scale x trit; 0 for an exact file.
    #[serde(with = "float")]
    pub worst_distance: f64,
    /// Whether the tensor is ternary.
    pub pass: bool,
}

/// For `#[serde(with = "float")]`: a number, or the name of a value that JSON has no
/// number for.
pub mod float {
    use serde::{Deserializer, Serializer, de};

    /// Writes a number, `"NaN"`, `"inf"` or `"-inf"`.
    pub fn serialize<S: Serializer>(value: &f64, serializer: S) -> Result<S::Ok, S::Error> {
        if value.is_finite() {
            serializer.serialize_f64(*value)
        } else {
            serializer.collect_str(value)
        }
    }

    /// Reads what [`serialize`] writes.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
        deserializer.deserialize_any(Visitor)
    }

    struct Visitor;

    impl de::Visitor<'_> for Visitor {
        type Value = f64;

        fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
            f.write_str("a number, \"NaN\", \"inf\" or \"-inf\"")
        }

        fn visit_f64<E: de::Error>(self, value: f64) -> Result<f64, E> {
            Ok(value)
        }

        fn visit_i64<E: de::Error>(self, value: i64) -> Result<f64, E> {
            Ok(value as f64)
        }

        fn visit_u64<E: de::Error>(self, value: u64) -> Result<f64, E> {
            Ok(value as f64)
        }

        fn visit_str<E: de::Error>(self, text: &str) -> Result<f64, E> {
            match text {
                "NaN" => Ok(f64::NAN),
                "inf" => Ok(f64::INFINITY),
                "-inf" => Ok(f64::NEG_INFINITY),
                _ => Err(E::invalid_value(de::Unexpected::Str(text), &self)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
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
        let results = FinalResults::from_timeline(&Timeline::new(&metrics)).unwrap();
        assert_eq!(results.train_loss, (11..=30).sum::<u64>() as f64 / 20.0);
        assert_eq!((results.final_step, results.accepted_steps), (31, 30));
        assert_eq!((results.skipped_steps, results.clipped_steps), (1, 0));
        assert_eq!(results.tokens_per_second, 1016.0);
        assert_eq!(
            results.best_eval.unwrap().step,
            20,
            "the earliest of equals, never NaN"
        );
        assert_eq!(results.final_eval.unwrap().step, 31);
        assert_eq!(FinalResults::from_timeline(&Timeline::default()), None);
    }

    #[test]
    fn an_empty_verification_proves_nothing() {
        assert!(!VerificationTable::default().passed());
    }
}
