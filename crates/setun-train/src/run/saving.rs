//! Checkpoints of a run in progress: written beside training, which waits only before it
//! changes what is being written; when one fails, which ones stay, and whether there is
//! room for them at all.

use super::recovery::NUM_ANCHORS;
use super::{Observer, Session};
use crate::TrainError;
use crate::checkpoint::{self, Constants};
use crate::machine;
use crate::muon::is_updated;
use crate::report::record::Metric;
use crate::settings::OptimizerKind;
use setun_formats::PackedHeader;
use setun_io::{
    IoError, Retention, checkpoint_name, checkpoints, remove_checkpoint, retire, verify_manifest,
};
use setun_model::Parameter;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::thread::JoinHandle;

/// Failed saves in a row after which a run stops.
const MAX_FAILED_SAVES: u32 = 3;

/// A checkpoint that is being written beside training.
pub(super) struct PendingSave {
    step: u64,
    best: Option<(u64, f64)>,
    best_before: Option<(u64, f64)>,
    writer: JoinHandle<Result<Option<String>, TrainError>>,
}

impl Session {
    /// Begins to save the current step beside training; `best_before` is the best
    /// evaluation that has a checkpoint already. An earlier save is finished first.
    ///
    /// # Errors
    /// The third failure in a row.
    pub(super) fn save(
        &mut self,
        best_before: Option<(u64, f64)>,
        observer: &mut dyn Observer,
    ) -> Result<(), TrainError> {
        self.finish_save(observer)?;
        let step = self.trainer.step;
        let began = self.begin_save(best_before);
        began.or_else(|error| self.save_failed(step, best_before, &error, observer))
    }

    /// Saves where there is no later interval to try again in, and waits for it.
    ///
    /// # Errors
    /// The third failure in a row.
    pub(super) fn save_now(&mut self, observer: &mut dyn Observer) -> Result<(), TrainError> {
        self.finish_save(observer)?;
        let best = self.state.best;
        loop {
            let failures = self.failed_saves;
            // A failure must not cost the last evaluation its place.
            self.save(best, observer)?;
            self.finish_save(observer)?;
            if self.failed_saves <= failures {
                return Ok(());
            }
        }
    }

    /// Ends the save in progress if its writer is done.
    ///
    /// # Errors
    /// The third failure in a row.
    pub(super) fn poll_save(&mut self, observer: &mut dyn Observer) -> Result<(), TrainError> {
        match &self.pending {
            Some(pending) if pending.writer.is_finished() => self.finish_save(observer),
            _ => Ok(()),
        }
    }

    /// Waits for the save in progress where its outcome is of no use any more.
    pub(super) fn join_saver(&mut self) {
        if let Some(pending) = self.pending.take() {
            let _ = pending.writer.join();
        }
    }

    /// Waits for the save in progress, if there is one, and retires old checkpoints. A
    /// failure is a warning; the third in a row ends the run.
    ///
    /// # Errors
    /// The third failure in a row.
    pub(super) fn finish_save(&mut self, observer: &mut dyn Observer) -> Result<(), TrainError> {
        let Some(pending) = self.pending.take() else {
            return Ok(());
        };
        self.trainer.wait_for_saver();
        let PendingSave {
            step,
            best,
            best_before,
            writer,
        } = pending;
        let written = match writer.join() {
            Ok(written) => written,
            Err(panic) => std::panic::resume_unwind(panic),
        };
        let committed = written.and_then(|hash| self.committed(step, best, hash));
        match committed {
            Ok(()) => {
                self.failed_saves = 0;
                Ok(())
            }
            Err(error) => self.save_failed(step, best_before, &error, observer),
        }
    }

    fn save_failed(
        &mut self,
        step: u64,
        best_before: Option<(u64, f64)>,
        error: &TrainError,
        observer: &mut dyn Observer,
    ) -> Result<(), TrainError> {
        if self.state.best.is_some_and(|best| best.0 == step) {
            // The best is one that can be read; the next better one will be.
            self.state.best = best_before;
        }
        self.failed_saves += 1;
        let message = format!("the checkpoint of step {step} could not be saved: {error}");
        observer.message(&format!("warning: {message}"));
        let event = Metric::Event { step, message };
        self.metrics.write(&event, machine::now());
        if self.failed_saves < MAX_FAILED_SAVES {
            return Ok(());
        }
        Err(TrainError::refused(format!(
            "{MAX_FAILED_SAVES} saves in a row have failed, the last one with: {error}; the \
             earlier checkpoints are as they were: remove the cause, then go on with setun \
             train --resume {}",
            self.run.display()
        )))
    }

    /// Starts the writer of a checkpoint of the current step, unless a valid one is there.
    fn begin_save(&mut self, best_before: Option<(u64, f64)>) -> Result<(), TrainError> {
        let step = self.trainer.step;
        self.state.step = step;
        self.state.updates = self.trainer.optimizer.updates;
        self.state.data_offset = self.trainer.data_offset;
        self.state.guard = self.trainer.guard.clone();
        // Lines that a resumed run keeps must not be lost with the power.
        self.metrics.sync()?;
        let folder = self.run.join("checkpoints");
        let target = folder.join(checkpoint_name(step));
        if target.exists() {
            if let Ok(manifest) = verify_manifest(&target) {
                // The attempt that wrote it may have failed behind the renaming.
                let synced = self.files.sync_dir(&folder);
                synced.map_err(|e| IoError::file("sync", &folder, e))?;
                let hash = manifest.extra["ternary_hash"].as_str().map(str::to_owned);
                self.committed(step, self.state.best, hash)?;
                self.failed_saves = 0;
                return Ok(());
            }
            // A damaged one that was skipped at resume: this session wrote these steps anew.
            remove_checkpoint(self.files.as_ref(), &target)?;
        }
        self.check_space()?;
        let constants = Constants {
            files: Arc::clone(&self.small_files),
            ternary: self.ternary_info().map(|ternary| PackedHeader {
                config: self.config.clone(),
                ternary,
            }),
            experiment: self.settings.experiment(),
        };
        let snapshot = checkpoint::snapshot(&mut self.trainer, &self.state, constants)?;
        let (sender, receiver) = channel();
        self.trainer.set_saver(receiver);
        let (files, run) = (Arc::clone(&self.files), self.run.clone());
        let writer = std::thread::Builder::new().name("saver".to_owned());
        let writer = writer.spawn(move || {
            let written = snapshot.write(&files, &run, move || drop(sender));
            written.map(|(_, hash)| hash)
        });
        let writer = writer.map_err(|e| TrainError::refused(format!("cannot save: {e}")))?;
        self.pending = Some(PendingSave {
            step,
            best: self.state.best,
            best_before,
            writer,
        });
        Ok(())
    }

    /// What follows a commit: records, and old checkpoints retire.
    fn committed(
        &mut self,
        step: u64,
        best: Option<(u64, f64)>,
        hash: Option<String>,
    ) -> Result<(), TrainError> {
        if let Some(hash) = hash {
            let name = checkpoint_name(step);
            self.record.ternary_hashes.insert(name, hash);
        }
        self.write_record()?;
        self.write_best(best)?;
        self.retire(step, best)
    }

    /// Removes what the settings do not keep, now that the checkpoint of `step` has been
    /// read back.
    fn retire(&self, step: u64, best: Option<(u64, f64)>) -> Result<(), TrainError> {
        // What a run in trouble goes back to.
        let all = checkpoints(&self.run)?;
        let anchors = all.iter().filter(|c| self.is_anchor(c.0));
        let mut protected: Vec<u64> = best.into_iter().map(|(step, _)| step).collect();
        for (anchor, dir) in anchors.take(NUM_ANCHORS) {
            // With what was best then, which is the best again after going back.
            protected.extend(checkpoint::best_step(dir));
            protected.push(*anchor);
        }
        let retention = Retention {
            keep_last: self.settings.checkpoint.keep.max(1),
            keep_every: self.settings.checkpoint.keep_every,
            protected: &protected,
            verified: Some(step),
        };
        retire(self.files.as_ref(), &self.run, &retention)?;
        Ok(())
    }

    /// Refuses to begin what cannot be saved: a checkpoint and a fifth of it must fit.
    ///
    /// # Errors
    /// Too little space, with both numbers; a system that cannot say.
    pub(super) fn check_space(&self) -> Result<(), TrainError> {
        let needed = self.checkpoint_bytes() + self.checkpoint_bytes() / 5;
        let free = free_bytes(self.files.as_ref(), &self.run)?;
        if free >= needed {
            return Ok(());
        }
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        Err(TrainError::refused(format!(
            "{} has {:.1} MiB of free space, a checkpoint needs {:.1} MiB: free some, or choose \
             another place with --run.output",
            self.run.display(),
            mib(free),
            mib(needed)
        )))
    }

    /// What a checkpoint takes, but for the few kB of its records.
    fn checkpoint_bytes(&self) -> u64 {
        let list = &self.trainer.model.parameters.list;
        let muon = self.settings.train.optimizer == OptimizerKind::Muon;
        let moments = |p: &Parameter<f32>| match p.frozen {
            true => 0,
            false if muon && is_updated(p) => 1,
            false => 2,
        };
        let values: usize = list.iter().map(|p| p.numel() * (1 + moments(p))).sum();
        let average = &self.trainer.optimizer.average;
        let averages: usize = average
            .iter()
            .flat_map(|_| list)
            .map(Parameter::numel)
            .sum();
        let values = values + averages;
        let small: usize = self.small_files.iter().map(|(_, bytes)| bytes.len()).sum();
        4 * values as u64 + self.record.model.packed_bytes + small as u64
    }
}

fn free_bytes(files: &dyn setun_io::FileOps, run: &Path) -> Result<u64, TrainError> {
    let free = files.available_bytes(run);
    let free = free.map_err(|e| IoError::file("read the free space of", run, e))?;
    Ok(free.unwrap_or(u64::MAX))
}
