//! Repeated trouble: back to an earlier checkpoint, and past the data since then.
//!
//! A rewind is a function of the run, like everything else: it depends on steps and
//! checkpoints only. A run that is killed in the middle of one does the steps before it
//! again, meets the same trouble and goes back to the same checkpoint.

use super::{Observer, Session};
use crate::TrainError;
use crate::checkpoint;
use crate::machine;
use crate::metrics::{self, MetricsWriter};
use crate::report::record::Metric;
use crate::trainer::StepOutcome;
use setun_io::{IoError, checkpoints, remove_checkpoint, verify_manifest};
use std::path::PathBuf;

impl Session {
    /// Notes whether the last step was skipped. Where too many were, the run goes back.
    ///
    /// # Errors
    /// Trouble without a way back.
    pub(super) fn judge_trouble(
        &mut self,
        outcome: &StepOutcome,
        observer: &mut dyn Observer,
    ) -> Result<(), TrainError> {
        let step = self.trainer.step;
        let limit = self.settings.train.max_bad_steps as u64;
        let skips = &mut self.state.recent_skips;
        skips.retain(|&skipped| skipped + 2 * limit > step);
        let Some(skip) = outcome.skipped else {
            return Ok(());
        };
        skips.push(step);
        observer.message(&format!("step {step} was skipped: {}", skip.reason()));
        if (skips.len() as u64) < limit {
            return Ok(());
        }
        let steps = skips.iter().map(u64::to_string);
        let trouble = format!(
            "the steps {} were skipped, the last because {}",
            steps.collect::<Vec<_>>().join(", "),
            skip.reason()
        );
        self.rewind(&trouble, observer)
    }

    /// Goes back to the newest checkpoint that lies far enough before the trouble, and
    /// passes over the batches from there to here.
    fn rewind(&mut self, trouble: &str, observer: &mut dyn Observer) -> Result<(), TrainError> {
        let from = self.trainer.step;
        let train = &self.settings.train;
        let first = self.state.recent_skips.first().copied().unwrap_or(from);
        let no_way_back = |why: String| {
            TrainError::refused(format!(
                "{trouble}; nothing of them was kept, and {why}: lower train.lr, or look at the \
                 data, and start again from a checkpoint"
            ))
        };
        if self.state.rewinds >= train.max_rewinds {
            let why = format!("the run went back {} times already", self.state.rewinds);
            return Err(no_way_back(why));
        }
        let latest = first.checked_sub(train.rewind_steps);
        let Some(dir) = latest
            .map(|step| self.valid_until(step))
            .transpose()?
            .flatten()
        else {
            let why = format!("no checkpoint is {} steps older", train.rewind_steps);
            return Err(no_way_back(why));
        };
        let (rewinds, offset) = (self.state.rewinds + 1, self.trainer.data_offset);
        let identity = self.state.data.clone();
        self.state = checkpoint::restore(&dir, &mut self.trainer, &identity)?;
        let to = self.trainer.step;
        self.state.rewinds = rewinds;
        self.trainer.data_offset = offset + (from - to);
        self.forget_after(to)?;
        let message = format!(
            "went back from step {from} to step {to}, to go on {} batches further in the data: \
             {trouble}",
            from - to
        );
        observer.message(&message);
        // Of the time behind the checkpoint: a run that is resumed from it writes it anew.
        let step = to + 1;
        let event = Metric::Event { step, message };
        self.metrics.write(&event, machine::now())
    }

    /// The newest valid checkpoint of at most `step` steps.
    fn valid_until(&self, step: u64) -> Result<Option<PathBuf>, TrainError> {
        let all = checkpoints(&self.run)?.into_iter();
        let mut early = all.filter(|c| c.0 <= step).map(|c| c.1);
        Ok(early.find(|dir| verify_manifest(dir).is_ok()))
    }

    /// Removes what the run did behind step `to`, the newest first.
    fn forget_after(&mut self, to: u64) -> Result<(), TrainError> {
        let best = self.run.join("best.json");
        match self.state.best {
            Some(_) => self.write_best()?,
            None if best.exists() => {
                let removed = self.files.remove_file(&best);
                removed.map_err(|e| IoError::file("remove", &best, e))?;
            }
            None => {}
        }
        for (step, dir) in checkpoints(&self.run)? {
            if step > to {
                remove_checkpoint(self.files.as_ref(), &dir)?;
                let name = setun_io::checkpoint_name(step);
                self.record.ternary_hashes.remove(&name);
            }
        }
        self.write_record()?;
        let earlier = metrics::read(&self.run, to)?;
        let tensorboard = self.settings.log.tensorboard.then(machine::now);
        self.metrics = MetricsWriter::create(&self.run, &earlier, tensorboard)?;
        Ok(())
    }
}
