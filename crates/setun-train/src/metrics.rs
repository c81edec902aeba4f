//! `metrics.jsonl`: one line for each step, evaluation and event, in full precision.

use crate::TrainError;
use crate::report::record::Metric;
use crate::tensorboard::EventWriter;
use setun_io::{IoError, write_atomic};
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

/// Writes metrics, and event files where they are wanted.
pub struct MetricsWriter {
    path: PathBuf,
    file: File,
    events: Option<EventWriter>,
}

/// What was measured up to and including `step`; later lines are from steps that a resumed
/// run does again.
///
/// # Errors
/// A line that is no metric.
pub fn read(run: &Path, step: u64) -> Result<Vec<Metric>, TrainError> {
    let path = run.join("metrics.jsonl");
    if !path.exists() {
        return Ok(Vec::new());
    }
    let bytes = std::fs::read(&path).map_err(|e| IoError::file("read", &path, e))?;
    let mut metrics = Metric::parse_lines(&bytes)?.metrics;
    metrics.retain(|metric| step_of(metric) <= step);
    Ok(metrics)
}

fn step_of(metric: &Metric) -> u64 {
    match metric {
        Metric::Step(r) => r.step,
        Metric::Eval(r) => r.step,
        Metric::Ternary(r) => r.step,
        Metric::Event { step, .. } => *step,
    }
}

impl MetricsWriter {
    /// Starts the file of `run` with `earlier` metrics, then appends.
    ///
    /// # Errors
    /// What the operating system returns.
    pub fn create(
        run: &Path,
        earlier: &[Metric],
        tensorboard: Option<f64>,
    ) -> Result<Self, TrainError> {
        let path = run.join("metrics.jsonl");
        let text: String = earlier.iter().map(Metric::to_line).collect();
        write_atomic(&path, text.as_bytes())?;
        let file = File::options().append(true).open(&path);
        let file = file.map_err(|e| IoError::file("open", &path, e))?;
        let events = tensorboard.map(|now| EventWriter::create(&run.join("tensorboard"), now));
        Ok(Self {
            path,
            file,
            events: events.transpose()?,
        })
    }

    /// Appends one line.
    ///
    /// # Errors
    /// What the operating system returns.
    pub fn write(&mut self, metric: &Metric, now: f64) -> Result<(), TrainError> {
        let line = metric.to_line();
        self.file
            .write_all(line.as_bytes())
            .map_err(|e| IoError::file("write", &self.path, e))?;
        let Some(events) = &mut self.events else {
            return Ok(());
        };
        let mut scalar = |step: u64, tag: &str, value: f64| events.scalar(step, now, tag, value);
        match metric {
            Metric::Step(r) => {
                scalar(r.step, "train/loss", r.loss)?;
                scalar(r.step, "train/lr", r.lr)?;
                scalar(r.step, "train/grad_norm", r.grad_norm)?;
                scalar(r.step, "train/tokens_per_second", r.tokens_per_second)?;
            }
            Metric::Eval(r) => {
                scalar(r.step, "valid/loss", r.loss)?;
                scalar(r.step, "valid/bits_per_byte", r.bits_per_byte)?;
                events.flush()?;
            }
            Metric::Ternary(r) => {
                scalar(r.step, "ternary/zero_share", r.zero_share)?;
                scalar(r.step, "ternary/flip_rate", r.flip_rate)?;
            }
            Metric::Event { .. } => {}
        }
        Ok(())
    }
}
