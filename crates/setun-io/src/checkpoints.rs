//! The checkpoints of a run: who may write them, which one is the newest that verifies,
//! and which old ones may go.
//!
//! There is no "latest" pointer that could be wrong: the names are scanned, newest
//! first, and a checkpoint counts when its manifest verifies. Invalid ones are reported
//! and skipped, never deleted.

use crate::commit::TEMPORARY;
use crate::file_ops::{FileOps, RealOps};
use crate::{IoError, Manifest, verify_manifest};
use std::fs::{self, File, TryLockError};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

/// Directory of the checkpoints in a run directory.
pub(crate) const CHECKPOINTS: &str = "checkpoints";

/// Start of the names of directories that are being removed.
const TRASH: &str = ".trash-";

/// The right to write into a run directory; held until dropped, or until the process
/// ends in whatever way.
#[derive(Debug)]
pub struct RunLock {
    run: PathBuf,
    // Closing the file releases the lock.
    _file: File,
}

impl RunLock {
    /// Locks the run directory `run`, which exists, through its file `lock`.
    ///
    /// # Errors
    /// [`IoError::Locked`] when another process or another lock of this one holds it.
    pub fn acquire(run: &Path) -> Result<Self, IoError> {
        let path = run.join("lock");
        let mut options = File::options();
        // Not truncated: the holder's number must survive a refused attempt.
        options.read(true).write(true).create(true).truncate(false);
        let mut file = options
            .open(&path)
            .map_err(|e| IoError::file("open", &path, e))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(IoError::Locked {
                    run: run.to_owned(),
                    holder: holder(&mut file),
                });
            }
            Err(TryLockError::Error(e)) => return Err(IoError::file("lock", &path, e)),
        }
        // The number is for people only; the lock itself does not need it.
        let text = format!("process {}\n", std::process::id());
        file.set_len(0)
            .and_then(|()| file.write_all(text.as_bytes()))
            .map_err(|e| IoError::file("write", &path, e))?;
        Ok(Self {
            run: run.to_owned(),
            _file: file,
        })
    }

    /// Removes what interrupted saves and removals left in the run directory and among
    /// its checkpoints: entries named `.tmp-*` and `.trash-*`. Holding the lock proves
    /// that no one is writing them. Returns what was removed, in order of name.
    ///
    /// # Errors
    /// A refusing operating system.
    pub fn remove_leftovers(&self) -> Result<Vec<PathBuf>, IoError> {
        self.remove_leftovers_with(&RealOps)
    }

    /// As [`RunLock::remove_leftovers`], through `ops`.
    ///
    /// # Errors
    /// As [`RunLock::remove_leftovers`].
    pub fn remove_leftovers_with(&self, ops: &dyn FileOps) -> Result<Vec<PathBuf>, IoError> {
        let mut removed = Vec::new();
        let folders = [
            self.run.clone(),
            self.run.join(CHECKPOINTS),
            self.run.join("export"),
        ];
        for dir in folders.into_iter().filter(|dir| dir.is_dir()) {
            for name in entry_names(&dir)? {
                if !(name.starts_with(TEMPORARY) || name.starts_with(TRASH)) {
                    continue;
                }
                let path = dir.join(name);
                let gone = if path.is_dir() && !path.is_symlink() {
                    ops.remove_dir_all(&path)
                } else {
                    ops.remove_file(&path)
                };
                gone.map_err(|e| IoError::file("remove", &path, e))?;
                removed.push(path);
            }
        }
        Ok(removed)
    }
}

/// Name of the checkpoint directory after `step` steps: `step-00001000`.
pub fn checkpoint_name(step: u64) -> String {
    format!("step-{step:08}")
}

/// The step of a checkpoint directory's name; the inverse of [`checkpoint_name`].
pub fn parse_checkpoint_name(name: &str) -> Option<u64> {
    let step = name.strip_prefix("step-")?.parse().ok()?;
    (checkpoint_name(step) == name).then_some(step)
}

/// All checkpoint directories of `run` as `(step, path)`, newest first, unverified.
///
/// # Errors
/// A refusing operating system. A run without the directory `checkpoints` has none.
pub fn checkpoints(run: &Path) -> Result<Vec<(u64, PathBuf)>, IoError> {
    let dir = run.join(CHECKPOINTS);
    let mut found: Vec<(u64, PathBuf)> = entry_names(&dir)?
        .iter()
        .filter_map(|name| Some((parse_checkpoint_name(name)?, dir.join(name))))
        .collect();
    found.sort_by_key(|&(step, _)| std::cmp::Reverse(step));
    Ok(found)
}

/// The newest checkpoint of `run` that verifies: its path, its step, and why newer ones
/// were skipped.
///
/// # Errors
/// [`IoError::NoCheckpoint`] when none verifies.
pub fn newest_valid_checkpoint(run: &Path) -> Result<(PathBuf, u64, Vec<String>), IoError> {
    let mut skipped = Vec::new();
    for (step, path) in checkpoints(run)? {
        match verify_checkpoint(step, &path) {
            Ok(()) => return Ok((path, step, skipped)),
            Err(reason) => skipped.push(reason.to_string()),
        }
    }
    Err(IoError::NoCheckpoint {
        run: run.to_owned(),
        skipped,
    })
}

/// Checks the manifest of the checkpoint `path` and that it was saved under its name.
pub(crate) fn verify_checkpoint(step: u64, path: &Path) -> Result<(), IoError> {
    let manifest = verify_manifest(path)?;
    let recorded = manifest.extra.get("step").and_then(|step| step.as_u64());
    if recorded.is_some_and(|recorded| recorded != step) {
        let problem = "its manifest records another step: give it its name back";
        return Err(IoError::invalid(path, problem));
    }
    Ok(())
}

/// Which checkpoints stay when a new one has been committed.
#[derive(Clone, Copy, Debug, Default)]
pub struct Retention<'a> {
    /// The newest so many whose files are all there.
    pub keep_last: usize,
    /// Those whose step is a multiple of this; 0 for none.
    pub keep_every: u64,
    /// These steps.
    pub protected: &'a [u64],
    /// A step that was read back just now and need not be read once more.
    pub verified: Option<u64>,
}

/// Removes old checkpoints of `run` and returns their steps, newest first.
///
/// Kept are those of `retention`, the newest one that verifies (so never the only valid
/// one), and those with missing or cut files, which are for a person to look at.
///
/// # Errors
/// A refusing operating system; what was not removed then stays usable.
pub fn retire(
    ops: &dyn FileOps,
    run: &Path,
    retention: &Retention<'_>,
) -> Result<Vec<u64>, IoError> {
    let all = checkpoints(run)?;
    let newest = match retention.verified {
        Some(step) if all.first().is_some_and(|newest| newest.0 == step) => step,
        _ => match newest_valid_checkpoint(run) {
            Ok((_, step, _)) => step,
            Err(IoError::NoCheckpoint { .. }) => return Ok(Vec::new()),
            Err(e) => return Err(e),
        },
    };
    let mut kept = 0;
    let mut removed = Vec::new();
    for (step, path) in all {
        // Hashing every one at each save would cost more than saving.
        let whole = Manifest::read(&path).and_then(|manifest| manifest.check_sizes(&path));
        if whole.is_err() {
            continue;
        }
        let every = retention.keep_every;
        if kept < retention.keep_last {
            kept += 1;
        } else if step != newest
            && !retention.protected.contains(&step)
            && !(every > 0 && step.is_multiple_of(every))
        {
            remove_checkpoint(ops, &path)?;
            removed.push(step);
        }
    }
    Ok(removed)
}

/// Removes a checkpoint directory. It is renamed before it is unlinked: a crash leaves no
/// half-removed directory under a name that looks like a checkpoint.
///
/// # Errors
/// A refusing operating system; the checkpoint is then whole, or gone from its name.
pub fn remove_checkpoint(ops: &dyn FileOps, path: &Path) -> Result<(), IoError> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(IoError::Refused(format!(
            "{} is not a checkpoint",
            path.display()
        )));
    };
    let trash = parent.join(format!("{TRASH}{}", name.to_string_lossy()));
    if trash.exists() {
        ops.remove_dir_all(&trash)
            .map_err(|e| IoError::file("remove", &trash, e))?;
    }
    ops.rename(path, &trash)
        .and_then(|()| ops.sync_dir(parent))
        .and_then(|()| ops.remove_dir_all(&trash))
        .map_err(|e| IoError::file("remove", path, e))
}

/// Sorted names of the entries of `dir`; none if there is no such directory.
pub(crate) fn entry_names(dir: &Path) -> Result<Vec<String>, IoError> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(IoError::file("read", dir, e)),
    };
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry.map_err(|e| IoError::file("read", dir, e))?;
        // Names of ours are ASCII; others are not looked at.
        names.extend(entry.file_name().into_string().ok());
    }
    names.sort();
    Ok(names)
}

fn holder(file: &mut File) -> String {
    let mut text = String::new();
    match file.take(64).read_to_string(&mut text) {
        Ok(_) if !text.trim().is_empty() => text.trim().to_owned(),
        _ => "process unknown".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DirWriter;
    use crate::fixture::Scratch;
    use serde_json::json;

    fn save(run: &Path, step: u64) -> PathBuf {
        let mut dir = DirWriter::create(&run.join(CHECKPOINTS), &checkpoint_name(step)).unwrap();
        dir.file("weights.bin", |out| out.write_all(&step.to_le_bytes()))
            .unwrap();
        dir.commit(json!({ "step": step })).unwrap()
    }

    fn retire_all_but(run: &Path, keep_last: usize, protected: &[u64]) -> Vec<u64> {
        let retention = Retention {
            keep_last,
            protected,
            ..Retention::default()
        };
        retire(&RealOps, run, &retention).unwrap()
    }

    fn damage(checkpoint: &Path) {
        fs::write(checkpoint.join("weights.bin"), [0xff; 8]).unwrap();
    }

    fn steps(run: &Path) -> Vec<u64> {
        checkpoints(run).unwrap().iter().map(|c| c.0).collect()
    }

    #[test]
    fn names_go_both_ways() {
        for step in [0, 1, 99_999_999, 100_000_000, u64::MAX] {
            assert_eq!(parse_checkpoint_name(&checkpoint_name(step)), Some(step));
        }
        for name in [
            "step-1",
            "step-+0000001",
            "step-",
            "xstep-00000001",
            "step-0000000x",
        ] {
            assert_eq!(parse_checkpoint_name(name), None, "{name}");
        }
    }

    #[test]
    fn the_newest_that_verifies_is_used() {
        let scratch = Scratch::new("newest");
        let none = newest_valid_checkpoint(scratch.path()).unwrap_err();
        assert!(matches!(none, IoError::NoCheckpoint { .. }), "{none}");
        for step in [9, 10, 100, 2000] {
            save(scratch.path(), step);
        }
        let (path, step, skipped) = newest_valid_checkpoint(scratch.path()).unwrap();
        assert_eq!((step, skipped.len()), (2000, 0));
        damage(&path);
        fs::remove_file(scratch.join("checkpoints/step-00000100/MANIFEST.json")).unwrap();
        fs::create_dir(scratch.join("checkpoints/.tmp-step-00003000-1")).unwrap();
        let (_, step, skipped) = newest_valid_checkpoint(scratch.path()).unwrap();
        assert_eq!(step, 10);
        assert!(
            skipped[0].contains("step-00002000") && skipped[0].contains("weights.bin"),
            "{skipped:?}"
        );
        assert!(skipped[1].contains("step-00000100"), "{skipped:?}");
        assert_eq!(skipped.len(), 2);
    }

    #[test]
    fn a_renamed_checkpoint_is_not_taken_for_a_newer_one() {
        let scratch = Scratch::new("renamed");
        save(scratch.path(), 1);
        let second = save(scratch.path(), 2);
        fs::rename(second, scratch.join("checkpoints/step-00000009")).unwrap();
        let (_, step, skipped) = newest_valid_checkpoint(scratch.path()).unwrap();
        assert_eq!((step, skipped.len()), (1, 1));
    }

    #[test]
    fn old_checkpoints_retire() {
        let scratch = Scratch::new("retire");
        for step in 1..=6 {
            save(scratch.path(), step);
        }
        assert_eq!(retire_all_but(scratch.path(), 2, &[3]), [4, 2, 1]);
        assert_eq!(steps(scratch.path()), [6, 5, 3]);
        assert_eq!(retire_all_but(scratch.path(), 2, &[3]), [0u64; 0]);
    }

    #[test]
    fn every_so_many_steps_one_stays() {
        let scratch = Scratch::new("retire-every");
        let mut removed = Vec::new();
        for step in 1..=9 {
            save(scratch.path(), step);
            let retention = Retention {
                keep_last: 2,
                keep_every: 3,
                protected: &[1],
                verified: Some(step),
            };
            removed.extend(retire(&RealOps, scratch.path(), &retention).unwrap());
        }
        assert_eq!(removed, [2, 4, 5, 7]);
        assert_eq!(steps(scratch.path()), [9, 8, 6, 3, 1]);
    }

    #[test]
    fn the_only_valid_checkpoint_never_retires() {
        let scratch = Scratch::new("retire-valid");
        for step in 1..=4 {
            let path = save(scratch.path(), step);
            if step > 1 {
                damage(&path);
            }
        }
        // Same sizes: the damage shows in the hashes only.
        retire_all_but(scratch.path(), 1, &[]);
        assert!(steps(scratch.path()).contains(&1));
        assert_eq!(newest_valid_checkpoint(scratch.path()).unwrap().1, 1);
        retire_all_but(scratch.path(), 0, &[]);
        assert_eq!(newest_valid_checkpoint(scratch.path()).unwrap().1, 1);
    }

    #[test]
    fn visibly_damaged_checkpoints_are_neither_counted_nor_removed() {
        let scratch = Scratch::new("retire-damaged");
        for step in 1..=4 {
            save(scratch.path(), step);
        }
        fs::write(scratch.join("checkpoints/step-00000003/weights.bin"), b"").unwrap();
        assert_eq!(retire_all_but(scratch.path(), 2, &[]), [1]);
        assert_eq!(steps(scratch.path()), [4, 3, 2]);
    }

    #[test]
    fn a_second_trainer_is_refused() {
        let scratch = Scratch::new("lock");
        let lock = RunLock::acquire(scratch.path()).unwrap();
        for _ in 0..2 {
            let error = RunLock::acquire(scratch.path()).unwrap_err().to_string();
            let holder = format!("process {}", std::process::id());
            assert!(error.contains(&holder), "{error}");
            assert!(error.contains("another trainer"), "{error}");
        }
        drop(lock);
        RunLock::acquire(scratch.path()).unwrap();
    }

    #[test]
    fn leftovers_are_removed_at_the_start() {
        let scratch = Scratch::new("leftovers");
        let good = save(scratch.path(), 1);
        let trash = scratch.join("checkpoints/.trash-step-00000000");
        let half = scratch.join("checkpoints/.tmp-step-00000002-123");
        fs::create_dir(&trash).unwrap();
        fs::create_dir(&half).unwrap();
        fs::write(half.join("weights.bin"), b"half").unwrap();
        let file = scratch.join(".tmp-best.json-123");
        fs::write(&file, b"{").unwrap();
        let lock = RunLock::acquire(scratch.path()).unwrap();
        assert_eq!(lock.remove_leftovers().unwrap(), [file, half, trash]);
        assert!(lock.remove_leftovers().unwrap().is_empty());
        verify_manifest(&good).unwrap();
    }
}
