//! Repeated trouble: back to an earlier checkpoint, and past the data since then.
//!
//! A rewind is a function of the run, like everything else. It goes back to an anchor: a
//! checkpoint whose step follows from the settings, so that one that was saved because
//! somebody stopped the run makes no difference. A run that is killed in the middle of a
//! rewind does the steps before it again, meets the same trouble and goes back to the same
//! anchor.

use super::{Observer, Session, due};
use crate::TrainError;
use crate::checkpoint;
use crate::machine;
use crate::metrics::{self, MetricsWriter};
use crate::report::record::Metric;
use crate::trainer::StepOutcome;
use setun_io::{IoError, checkpoints, remove_checkpoint, verify_manifest};
use std::path::PathBuf;

/// The newest so many anchors are kept. Two of them are at least half of the distance
/// apart, so the third one lies far enough back.
pub(super) const NUM_ANCHORS: usize = 3;

/// Whether `step` is the first one in its stretch of `distance` steps at which a
/// checkpoint is due, once in `every` steps.
fn is_anchor(step: u64, every: u64, distance: u64) -> bool {
    due(step, every) && step % distance.max(1) < every
}

impl Session {
    /// Whether the checkpoint of `step` is one that trouble goes back to.
    pub(super) fn is_anchor(&self, step: u64) -> bool {
        let every = self.settings.checkpoint.every;
        is_anchor(step, every, self.settings.train.rewind_steps)
    }

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
        let above = skip.limit().map(|limit| format!(" (above {limit:.4})"));
        observer.message(&format!(
            "step {step} was skipped: {}{}",
            skip.reason(),
            above.unwrap_or_default()
        ));
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
        // What is being saved now may be what the run goes back to, or away from.
        self.finish_save(observer)?;
        let from = self.trainer.step;
        let train = &self.settings.train;
        let first = self.state.recent_skips.first().copied().unwrap_or(from);
        let no_way_back = |why: String| {
            TrainError::refused(format!(
                "{trouble}; nothing of them was kept, and {why}: lower train.lr, or look at the \
                 data, and start again from a checkpoint"
            ))
        };
        let count = self.state.rewinds.len() as u64;
        if count >= train.max_rewinds {
            let why = format!("the run went back {count} times already");
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
        let mut rewinds = std::mem::take(&mut self.state.rewinds);
        let offset = self.trainer.data_offset;
        let identity = self.state.data.clone();
        self.state = checkpoint::restore(&dir, &mut self.trainer, &identity)?;
        let to = self.trainer.step;
        self.trainer.data_offset = offset + (from - to);
        self.forget_after(to)?;
        let message = format!(
            "went back from step {from} to step {to}, to go on {} batches further in the data: \
             {trouble}",
            from - to
        );
        observer.message(&message);
        rewinds.push((u64::MAX, message));
        // Of the time behind the checkpoint: a run that is resumed from it writes them anew.
        let step = to + 1;
        for (when, message) in rewinds.iter_mut().filter(|rewind| rewind.0 > to) {
            *when = step;
            let message = message.clone();
            let event = Metric::Event { step, message };
            self.metrics.write(&event, machine::now());
        }
        self.state.rewinds = rewinds;
        Ok(())
    }

    /// The newest valid anchor of at most `step` steps.
    fn valid_until(&self, step: u64) -> Result<Option<PathBuf>, TrainError> {
        let all = checkpoints(&self.run)?.into_iter();
        let early = all.filter(|c| c.0 <= step && self.is_anchor(c.0));
        let mut early = early.map(|c| c.1);
        Ok(early.find(|dir| verify_manifest(dir).is_ok()))
    }

    /// Removes what the run did behind step `to`, the newest first.
    fn forget_after(&mut self, to: u64) -> Result<(), TrainError> {
        let best = self.run.join("best.json");
        match self.state.best {
            Some(best) => self.write_best(Some(best))?,
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Whatever the interval and the distance: behind any step, one of the newest anchors
    /// lies at least the distance back, and not much further than needed.
    #[test]
    fn there_is_always_an_anchor_to_go_back_to() {
        for every in 1..40 {
            for distance in 1..60 {
                let mut anchors = Vec::new();
                for step in 1..400 {
                    if is_anchor(step, every, distance) {
                        anchors.push(step);
                    }
                    let kept = anchors.iter().rev().take(NUM_ANCHORS);
                    let target = kept.into_iter().find(|&&c| c + distance <= step);
                    let enough = 2 * (every + distance);
                    let case = (every, distance, step, target);
                    assert!(target.is_some() || step < enough, "{case:?}");
                    assert!(target.is_none_or(|&c| step < c + enough), "{case:?}");
                }
            }
        }
        assert!(!is_anchor(10, 0, 5));
    }
}
