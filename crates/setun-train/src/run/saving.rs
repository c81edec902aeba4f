//! Checkpoints of a run in progress: when one fails, which ones stay, and whether there
//! is room for them at all.

use super::recovery::NUM_ANCHORS;
use super::{Observer, Session};
use crate::TrainError;
use crate::checkpoint::{self, Constants};
use crate::machine;
use crate::report::record::Metric;
use setun_formats::PackedHeader;
use setun_io::{
    IoError, Retention, checkpoint_name, checkpoints, remove_checkpoint, retire, verify_manifest,
};
use std::path::Path;

/// Failed saves in a row after which a run stops.
const MAX_FAILED_SAVES: u32 = 3;

impl Session {
    /// Saves; a failure is a warning, and the third in a row ends the run. Returns
    /// whether there is a checkpoint of the current step now.
    ///
    /// # Errors
    /// The third failure in a row.
    pub(super) fn save(&mut self, observer: &mut dyn Observer) -> Result<bool, TrainError> {
        let error = match self.save_once() {
            Ok(()) => {
                self.failed_saves = 0;
                return Ok(true);
            }
            Err(error) => error,
        };
        self.failed_saves += 1;
        let step = self.trainer.step;
        let message = format!("the checkpoint of step {step} could not be saved: {error}");
        observer.message(&format!("warning: {message}"));
        let event = Metric::Event { step, message };
        self.metrics.write(&event, machine::now())?;
        if self.failed_saves < MAX_FAILED_SAVES {
            return Ok(false);
        }
        Err(TrainError::refused(format!(
            "{MAX_FAILED_SAVES} saves in a row have failed, the last one with: {error}; the \
             earlier checkpoints are as they were: remove the cause, then go on with setun \
             train --resume {}",
            self.run.display()
        )))
    }

    /// Saves where there is no later interval to try again in.
    ///
    /// # Errors
    /// The third failure in a row.
    pub(super) fn save_now(&mut self, observer: &mut dyn Observer) -> Result<(), TrainError> {
        while !self.save(observer)? {}
        Ok(())
    }

    /// Commits a checkpoint of the current step, unless a valid one is there, and retires
    /// old ones.
    fn save_once(&mut self) -> Result<(), TrainError> {
        self.state.step = self.trainer.step;
        self.state.updates = self.trainer.optimizer.updates;
        self.state.data_offset = self.trainer.data_offset;
        self.state.guard = self.trainer.guard.clone();
        // Lines that a resumed run keeps must not be lost with the power.
        self.metrics.sync()?;
        let folder = self.run.join("checkpoints");
        let name = checkpoint_name(self.trainer.step);
        let target = folder.join(&name);
        if target.exists() {
            if verify_manifest(&target).is_ok() {
                // The attempt that wrote it may have failed behind the renaming.
                let synced = self.files.sync_dir(&folder);
                synced.map_err(|e| IoError::file("sync", &folder, e))?;
                self.write_record()?;
                return self.write_best();
            }
            // A damaged one that was skipped at resume: this session wrote these steps anew.
            remove_checkpoint(self.files.as_ref(), &target)?;
        }
        self.check_space()?;
        let config_json = self.config.to_json();
        let constants = Constants {
            config_json: &config_json,
            tokenizer_json: self.tokenizer_json.as_bytes(),
            ternary: self.ternary_info().map(|ternary| PackedHeader {
                config: self.config.clone(),
                ternary,
            }),
        };
        let (_, hash) = checkpoint::save(
            &self.files,
            &self.run,
            &self.trainer,
            &self.state,
            &constants,
        )?;
        if let Some(hash) = hash {
            self.record.ternary_hashes.insert(name, hash);
        }
        self.write_record()?;
        self.write_best()?;
        self.retire()
    }

    /// Removes what the settings do not keep, now that the newest one has been read back.
    fn retire(&self) -> Result<(), TrainError> {
        let step = self.trainer.step;
        let best = self.state.best.map(|(step, _)| step);
        // What a run in trouble goes back to.
        let all = checkpoints(&self.run)?;
        let anchors = all.iter().map(|c| c.0).filter(|&c| self.is_anchor(c));
        let protected: Vec<u64> = best.into_iter().chain(anchors.take(NUM_ANCHORS)).collect();
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

    /// What a checkpoint takes, but for the few kB of its small files.
    fn checkpoint_bytes(&self) -> u64 {
        let list = &self.trainer.model.parameters.list;
        let values: usize = list
            .iter()
            .map(|p| p.numel() * if p.frozen { 1 } else { 3 })
            .sum();
        4 * values as u64 + self.record.model.packed_bytes + self.tokenizer_json.len() as u64
    }
}

fn free_bytes(files: &dyn setun_io::FileOps, run: &Path) -> Result<u64, TrainError> {
    let free = files.available_bytes(run);
    let free = free.map_err(|e| IoError::file("read the free space of", run, e))?;
    Ok(free.unwrap_or(u64::MAX))
}
