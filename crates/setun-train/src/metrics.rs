//! `metrics.jsonl`: one line for each step, evaluation and event, in full precision.

use crate::TrainError;
use crate::report::record::Metric;
use crate::tensorboard::{EventWriter, TensorboardError};
use setun_io::{IoError, write_atomic};
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

/// Writes metrics, and event files where they are wanted.
pub struct MetricsWriter {
    path: PathBuf,
    file: File,
    /// Length of the file's whole lines.
    whole_bytes: u64,
    /// Lines that the file does not hold yet: a full disk does not end a run.
    pending: String,
    /// Ends with its first error.
    events: Option<EventWriter>,
    /// That error, until somebody asks.
    warning: Option<String>,
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
    /// What the operating system returns about that file; event files that cannot be written
    /// are left out, see [`take_warning`](Self::take_warning).
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
        let mut writer = Self {
            path,
            file,
            whole_bytes: text.len() as u64,
            pending: String::new(),
            events: None,
            warning: None,
        };
        if let Some(now) = tensorboard {
            match EventWriter::create(&run.join("tensorboard"), now) {
                Ok(events) => writer.events = Some(events),
                Err(error) => writer.end_events(&error),
            }
        }
        Ok(writer)
    }

    /// Appends one line. Where the system refuses, the line waits for the next call, and event
    /// files end: see [`take_warning`](Self::take_warning). What must be known of a full disk is
    /// what [`sync`](Self::sync) returns.
    pub fn write(&mut self, metric: &Metric, now: f64) {
        self.pending.push_str(&metric.to_line());
        // Reported by `sync`, if it lasts until the next checkpoint.
        let _ = self.flush();
        if let Some(events) = &mut self.events
            && let Err(error) = write_event(events, metric, now)
        {
            self.end_events(&error);
        }
    }

    /// Why there are no event files any more, once: they are a convenience, and no reason to
    /// end a run.
    pub fn take_warning(&mut self) -> Option<String> {
        self.warning.take()
    }

    fn end_events(&mut self, error: &TensorboardError) {
        self.events = None;
        self.warning = Some(format!("{error}; the run goes on without event files"));
    }

    /// Makes every line durable.
    ///
    /// # Errors
    /// What the operating system returns; the lines that are not in the file wait.
    pub fn sync(&mut self) -> Result<(), TrainError> {
        let synced = self.flush().and_then(|()| self.file.sync_data());
        Ok(synced.map_err(|e| IoError::file("write", &self.path, e))?)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        if self.pending.is_empty() {
            return Ok(());
        }
        if let Err(error) = self.file.write_all(self.pending.as_bytes()) {
            // No half line may stay in front of the next one.
            self.file.set_len(self.whole_bytes)?;
            return Err(error);
        }
        self.whole_bytes += self.pending.len() as u64;
        self.pending.clear();
        Ok(())
    }
}

/// The numbers of `metric` for TensorBoard.
fn write_event(
    events: &mut EventWriter,
    metric: &Metric,
    now: f64,
) -> Result<(), TensorboardError> {
    let mut scalar = |step: u64, tag: &str, value: f64| events.scalar(step, now, tag, value);
    match metric {
        Metric::Step(r) => {
            scalar(r.step, "train/loss", r.loss)?;
            scalar(r.step, "train/lr", r.lr)?;
            scalar(r.step, "train/grad_norm", r.grad_norm)?;
            scalar(r.step, "train/tokens_per_second", r.tokens_per_second)
        }
        Metric::Eval(r) => {
            scalar(r.step, "valid/loss", r.loss)?;
            scalar(r.step, "valid/bits_per_byte", r.bits_per_byte)?;
            events.flush()
        }
        Metric::Ternary(r) => {
            scalar(r.step, "ternary/zero_share", r.zero_share)?;
            scalar(r.step, "ternary/flip_rate", r.flip_rate)
        }
        Metric::Event { .. } => Ok(()),
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;
    use crate::report::record::EvalRecord;

    /// `/dev/full` refuses every write as a full disk does.
    #[test]
    fn lines_wait_while_the_disk_is_full() {
        let run = std::env::temp_dir().join(format!("setun-metrics-{}", std::process::id()));
        std::fs::create_dir_all(&run).unwrap();
        let event = |step| Metric::Event {
            step,
            message: "a line".to_owned(),
        };
        let mut writer = MetricsWriter::create(&run, &[event(1)], None).unwrap();
        let full = File::options().write(true).open("/dev/full").unwrap();
        let file = std::mem::replace(&mut writer.file, full);
        writer.write(&event(2), 0.0);
        writer.write(&event(3), 0.0);
        let error = writer.sync().unwrap_err().to_string();
        assert!(error.contains("metrics.jsonl"), "{error}");
        assert_eq!(read(&run, 9).unwrap(), [event(1)]);
        writer.file = file;
        writer.write(&event(4), 0.0);
        writer.sync().unwrap();
        assert_eq!(read(&run, 9).unwrap(), [1, 2, 3, 4].map(event));
        std::fs::remove_dir_all(run).unwrap();
    }

    #[test]
    fn event_files_end_with_one_warning() {
        let name = format!("setun-metrics-events-{}", std::process::id());
        let run = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&run).unwrap();
        let eval = |step| {
            Metric::Eval(EvalRecord {
                step,
                loss: 2.0,
                perplexity: 7.4,
                bits_per_byte: 1.5,
                tokens: 100,
                train_loss: 2.1,
            })
        };
        let full = |run: &Path| {
            let full = File::options().write(true).open("/dev/full").unwrap();
            let mut writer = MetricsWriter::create(run, &[], None).unwrap();
            writer.events = Some(EventWriter::onto(Path::new("events"), full));
            writer
        };
        // A file in the place of the directory refuses the first one.
        std::fs::write(run.join("tensorboard"), "").unwrap();
        let never = MetricsWriter::create(&run, &[], Some(1.0)).unwrap();
        for mut writer in [never, full(&run)] {
            writer.write(&eval(1), 0.0);
            let warning = writer.take_warning().unwrap();
            assert!(
                warning.contains("TensorBoard file") && warning.contains("goes on without"),
                "{warning}"
            );
            writer.write(&eval(2), 0.0);
            assert_eq!(writer.take_warning(), None);
            writer.sync().unwrap();
        }
        // The metrics of the last one are all there.
        assert_eq!(read(&run, 9).unwrap(), [1, 2].map(eval));
        std::fs::remove_dir_all(run).unwrap();
    }
}
