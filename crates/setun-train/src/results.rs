//! What finished runs came down to, read from their directories.

use crate::TrainError;
use crate::metrics;
use crate::report::record::{FinalResults, RunRecord, Timeline, VerificationTable};
use serde::Deserialize;
use setun_io::IoError;
use std::path::{Path, PathBuf};

/// The report of a run.
const REPORT_FILE: &str = "report.json";

/// Whether the run in `directory` came to its end: its record says so, and the report, which is
/// written behind that, is there. (A report alone may be one of a run that was interrupted.)
pub fn is_finished(directory: &Path) -> bool {
    #[derive(Deserialize)]
    struct End {
        finished: Option<u64>,
    }
    let record = std::fs::read(directory.join("run.json")).unwrap_or_default();
    let end = serde_json::from_slice::<End>(&record);
    end.is_ok_and(|end| end.finished.is_some()) && directory.join(REPORT_FILE).exists()
}

/// A run, as its files tell it.
#[derive(Clone, Debug)]
pub struct RunResults {
    /// The run directory.
    pub path: PathBuf,
    /// `run.json`.
    pub record: RunRecord,
    /// `metrics.jsonl`.
    pub timeline: Timeline,
    /// The timeline, summed up.
    pub results: FinalResults,
    /// Whether the model files hold what they should; none where nothing was verified.
    pub verified: Option<bool>,
}

/// The part of `report.json` that is in no other file.
#[derive(Deserialize)]
struct Verified {
    verification: Option<VerificationTable>,
}

impl RunResults {
    /// Reads the run in `path`, which may be unfinished.
    ///
    /// # Errors
    /// A directory that is no run, or one that has not made a step.
    pub fn read(path: &Path) -> Result<Self, TrainError> {
        let file = path.join("run.json");
        let bytes = std::fs::read(&file).map_err(|e| {
            TrainError::refused(format!(
                "cannot read {}: {e}; name a run directory, as setun train writes it",
                file.display()
            ))
        })?;
        let record: RunRecord = serde_json::from_slice(&bytes)
            .map_err(|e| TrainError::refused(format!("{}: {e}", file.display())))?;
        let timeline = Timeline::new(&metrics::read(path, u64::MAX)?);
        let results = FinalResults::new(&record, &timeline).ok_or_else(|| {
            TrainError::refused(format!(
                "{} has no finished step yet: train it first",
                path.display()
            ))
        })?;
        Ok(Self {
            path: path.to_path_buf(),
            verified: verified(path)?,
            record,
            timeline,
            results,
        })
    }

    /// Training tokens of a step.
    pub fn tokens_per_step(&self) -> u64 {
        self.record.tokens_per_step()
    }

    /// Training tokens of the whole run.
    pub fn num_tokens(&self) -> u64 {
        self.results.tokens
    }

    /// Whether a loss in nats per token means the same in both: equal held-out tokens of
    /// equal tokenizers, each with as much text before it.
    pub fn same_held_out(&self, other: &Self) -> bool {
        let (a, b) = (&self.record.data, &other.record.data);
        // Records of earlier versions do not name the tokenizer.
        let known = !a.tokenizer_hash.is_empty() && !b.tokenizer_hash.is_empty();
        a.valid_hash == b.valid_hash
            && a.valid_tokens == b.valid_tokens
            && a.vocab_size == b.vocab_size
            && self.windows() == other.windows()
            && (!known || a.tokenizer_hash == b.tokenizer_hash)
    }

    /// The settings that say which tokens before it a held-out token sees.
    fn windows(&self) -> [&serde_json::Value; 2] {
        let settings = &self.record.settings;
        [
            &settings["train"]["seq_len"],
            &settings["data"]["document_mask"],
        ]
    }

    /// Last held-out loss over the best one: above 1 after overfitting.
    pub fn last_over_best(&self) -> Option<f64> {
        let (last, best) = (&self.results.final_eval, &self.results.best_eval);
        Some(last.as_ref()?.loss / best.as_ref()?.loss)
    }

    /// Last held-out loss over the training loss of the same time.
    pub fn held_out_over_train(&self) -> Option<f64> {
        let last = self.results.final_eval.as_ref()?;
        (self.results.train_loss > 0.0).then_some(last.loss / self.results.train_loss)
    }

    /// Share of zeros among the trits in the end; none for a dense model.
    pub fn zero_share(&self) -> Option<f64> {
        self.timeline.ternary.last().map(|look| look.zero_share)
    }

    /// Peak of resident memory in bytes; none where the system did not tell it, or the run has
    /// not come to an end.
    pub fn memory_bytes(&self) -> Option<u64> {
        self.record.memory.peak_bytes
    }
}

/// What the report says about the model files.
fn verified(run: &Path) -> Result<Option<bool>, TrainError> {
    let file = run.join(REPORT_FILE);
    if !file.exists() {
        return Ok(None);
    }
    let bytes = std::fs::read(&file).map_err(|e| IoError::file("read", &file, e))?;
    let report: Verified = serde_json::from_slice(&bytes)
        .map_err(|e| TrainError::refused(format!("{}: {e}", file.display())))?;
    Ok(report.verification.map(|table| table.passed()))
}
