//! What a run writes down: one line per event in `metrics.jsonl`, and `run.json`.
//!
//! `step` counts finished steps: the first [`StepRecord`] has step 1, and an evaluation
//! or checkpoint of step N sees the weights after N steps (step 0: before training).
//! Losses are in nats per token. Floats that JSON has no number for are written as
//! `"NaN"`, `"inf"` and `"-inf"`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// The final training loss is the mean of this many last accepted steps, of those that are in
/// the metrics.
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
    /// Place in the data after this step, in epochs: batches that a rewind passed over count.
    /// (Earlier versions wrote the place before the step.)
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

    /// The evaluation after a step with the smallest loss; the earliest of equals. Losses
    /// that are not finite never win, and nor does the one before training, which no
    /// checkpoint is of.
    pub fn best_eval(&self) -> Option<&EvalRecord> {
        let after = self.evals.iter().filter(|eval| eval.step > 0);
        let finite = after.filter(|eval| eval.loss.is_finite());
        finite.min_by(|a, b| a.loss.total_cmp(&b.loss))
    }

    /// The evaluation before the first step.
    pub fn eval_before_training(&self) -> Option<&EvalRecord> {
        self.evals.iter().find(|eval| eval.step == 0)
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
    /// Accepted steps in the metrics: with `log.every` above 1 not all of them; 0 in records
    /// of earlier versions.
    #[serde(default)]
    pub logged_steps: u64,
    /// Those of them whose gradient was clipped.
    pub clipped_steps: u64,
    /// Mean loss of the last [`FINAL_LOSS_STEPS`] accepted steps in the metrics; NaN when
    /// there is none.
    #[serde(with = "float")]
    pub train_loss: f64,
    /// Median over the accepted steps in the metrics; NaN when there is none.
    #[serde(with = "float")]
    pub tokens_per_second: f64,
    /// Training tokens of all steps; 0 in records of earlier versions.
    #[serde(default)]
    pub tokens: u64,
    /// How many times these are the training text. Batches that a rewind passed over are not
    /// among them.
    #[serde(with = "float")]
    pub epochs: f64,
    /// The last held-out evaluation.
    pub final_eval: Option<EvalRecord>,
    /// The held-out evaluation with the smallest loss, but for the one before training.
    pub best_eval: Option<EvalRecord>,
}

impl FinalResults {
    /// Sums up the timeline of the run of `record`; none when it has no step.
    pub fn new(record: &RunRecord, timeline: &Timeline) -> Option<Self> {
        let last = timeline.steps.last()?;
        let accepted: Vec<&StepRecord> = timeline.accepted().collect();
        let tail = &accepted[accepted.len().saturating_sub(FINAL_LOSS_STEPS)..];
        let speeds = accepted.iter().map(|step| step.tokens_per_second).collect();
        // With `log.every` above 1, the last steps may have no line of their own.
        let later = [
            timeline.evals.last().map(|eval| eval.step),
            timeline.ternary.last().map(|look| look.step),
            record.early_stop.as_ref().map(|stop| stop.step),
        ];
        let final_step = later.into_iter().flatten().fold(last.step, u64::max);
        // Every skipped step has its line.
        let skipped_steps = (timeline.steps.len() - accepted.len()) as u64;
        let tokens = final_step.saturating_mul(record.tokens_per_step());
        Some(Self {
            final_step,
            accepted_steps: final_step.saturating_sub(skipped_steps),
            skipped_steps,
            logged_steps: accepted.len() as u64,
            clipped_steps: accepted.iter().filter(|step| step.clipped).count() as u64,
            train_loss: tail.iter().map(|step| step.loss).sum::<f64>() / tail.len() as f64,
            tokens_per_second: median(speeds),
            tokens,
            epochs: match (tokens, record.data.train_tokens) {
                // Settings that do not tell the size of a step.
                (0, _) | (_, 0) => last.epoch,
                (tokens, all) => tokens as f64 / all as f64,
            },
            final_eval: timeline.evals.last().cloned(),
            best_eval: timeline.best_eval().cloned(),
        })
    }

    /// Whether every accepted step is in the metrics.
    pub fn all_logged(&self) -> bool {
        self.logged_steps >= self.accepted_steps
    }

    /// What [`train_loss`](Self::train_loss) is, for people.
    pub fn train_loss_of(&self) -> String {
        let count = self.logged_steps.min(FINAL_LOSS_STEPS as u64);
        let which = if self.all_logged() {
            "accepted"
        } else {
            "logged"
        };
        format!("mean of the last {count} {which} steps")
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
    /// Seconds that the sessions of the run took, each until it last wrote this record; none
    /// where an earlier version made one of them.
    #[serde(default)]
    pub seconds: Option<f64>,
    /// Files with the weights of the finished model; empty while it runs, and in records of
    /// earlier versions.
    #[serde(default)]
    pub files: Vec<ModelFile>,
    /// Results; none while it runs.
    #[serde(default)]
    pub results: Option<FinalResults>,
    /// Continuations of held-out prompts.
    #[serde(default)]
    pub samples: Vec<Sample>,
    /// Bytes of training text that the samples were compared with; none if it was all.
    #[serde(default)]
    pub compared_bytes: Option<u64>,
    /// Why the run ended before its last planned step, if it did.
    #[serde(default)]
    pub early_stop: Option<EarlyStop>,
    /// What the projection of a dense model cost; none for other beginnings.
    #[serde(default)]
    pub projection: Option<ProjectionCost>,
}

impl RunRecord {
    /// Training tokens of a step; 0 where the settings do not say.
    pub fn tokens_per_step(&self) -> u64 {
        let train = &self.settings["train"];
        let size = |key: &str| train[key].as_u64().unwrap_or(0);
        size("batch_size").saturating_mul(size("seq_len"))
    }

    /// The smallest of the files with the model's weights.
    pub fn smallest_file(&self) -> Option<&ModelFile> {
        self.files.iter().min_by_key(|file| file.bytes)
    }
}

/// A file, or a directory of files, that holds the weights of the finished model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelFile {
    /// Where it is below the run directory, for example `export/packed`.
    pub path: String,
    /// Bytes of the files with weights.
    pub bytes: u64,
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
    /// Training text that is held out, too; none where nobody has compared the documents:
    /// see [`DataFacts::checked_duplicates`].
    #[serde(default)]
    pub duplicates: Option<Duplicates>,
    /// Entries of the vocabulary.
    pub vocab_size: usize,
    /// blake3 of the tokenizer file; empty in records of earlier versions.
    #[serde(default)]
    pub tokenizer_hash: String,
    /// Where the text came from, as written in the settings.
    #[serde(default)]
    pub sources: Vec<String>,
}

impl DataFacts {
    /// What was found about duplicates; none for token files, whose documents are not
    /// compared. (Records of earlier versions say 0 there.)
    pub fn checked_duplicates(&self) -> Option<&Duplicates> {
        let are_compared = !self.sources.iter().any(|name| name.ends_with(".tokens"));
        self.duplicates.as_ref().filter(|_| are_compared)
    }
}

/// Training documents whose text is held out, too, all of it or a part.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Duplicates {
    /// Training documents that are exact copies of held-out ones, before any was left out.
    pub exact: u64,
    /// How many of those were left out; none in records of earlier versions, see
    /// [`Duplicates::exact_left_out`].
    #[serde(default)]
    pub exact_dropped: Option<u64>,
    /// Other training documents that were left out, because they share text with held-out
    /// ones; see [`Duplicates::near_left_out`].
    pub dropped: u64,
    /// Held-out documents that share text with the training documents that are left.
    pub across_split: u64,
    /// Some of those, or where documents were left out, some that did.
    #[serde(default)]
    pub examples: Vec<DuplicatePair>,
}

impl Duplicates {
    /// Exact copies that were left out. (In records of earlier versions `dropped` has both
    /// kinds.)
    pub fn exact_left_out(&self) -> u64 {
        self.exact_dropped.unwrap_or(self.dropped).min(self.exact)
    }

    /// Other training documents that were left out.
    pub fn near_left_out(&self) -> u64 {
        match self.exact_dropped {
            Some(_) => self.dropped,
            None => self.dropped - self.exact_left_out(),
        }
    }
}

/// A held-out document and its nearest training document.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DuplicatePair {
    /// Start or name of the held-out document.
    pub valid: String,
    /// Start or name of the training document.
    pub train: String,
    /// Share of the held-out document's runs of 13 words that the other one has, 0 to 1.
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
    /// Parameters in matrices: those are ternary, unless the model is dense or an experiment.
    pub matrix_parameters: u64,
    /// Parameters in norms, kept in f32.
    pub norm_parameters: u64,
    /// Weights that share a scale; none for a dense model.
    pub group_size: Option<usize>,
    /// The setting that makes the model neither dense nor what files call ternary.
    #[serde(default)]
    pub experiment: Option<String>,
    /// Name of the scale rule; without meaning for a dense model.
    #[serde(default)]
    pub scale_rule: String,
    /// Name of the arithmetic mode.
    pub numerics: String,
    /// Bits per parameter that follow from `packed_bytes`.
    #[serde(with = "float")]
    pub bits_per_weight: f64,
    /// Bytes of all weights in the packed format, computed from the shape; of a dense model,
    /// which has no such file, those of its latents in f32. [`RunRecord::files`] has what was
    /// written.
    pub packed_bytes: u64,
}

/// Memory as planned before step 0 and as measured.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct MemoryFacts {
    /// The plan.
    #[serde(default)]
    pub plan: Vec<MemoryRow>,
    /// Largest resident size of the process over the whole run, from the reading of the data
    /// to the samples, in bytes, where the system tells it: see
    /// [`crate::machine::peak_resident_bytes`]. (Earlier versions wrote the anonymous memory at
    /// the end of training.)
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
mod tests;
