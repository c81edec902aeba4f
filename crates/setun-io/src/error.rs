//! One error type: every message names the file, the place and what to do about it.

use std::io;
use std::path::{Path, PathBuf};
use thiserror::Error;

/// Why a file could not be read, written or trusted.
#[derive(Debug, Error)]
pub enum IoError {
    /// The operating system refused.
    #[error("cannot {action} {}: {source}{}", path.display(), remedy(source))]
    File {
        /// What was tried, as a verb: "read", "write", "rename", ...
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The answer of the operating system.
        source: io::Error,
    },
    /// The target of a commit is already there; nothing is ever overwritten.
    #[error("{} already exists: remove it, or choose another name", path.display())]
    Exists {
        /// The target.
        path: PathBuf,
    },
    /// Another process trains in this run directory.
    #[error(
        "{} is in use by another trainer ({holder}): stop that one, or train into another \
         directory",
        run.display()
    )]
    Locked {
        /// The run directory.
        run: PathBuf,
        /// The process that holds the lock, as far as it is known.
        holder: String,
    },
    /// Sizes or hashes do not agree with the manifest.
    #[error("{} is damaged: {problem}; use another copy", path.display())]
    Damaged {
        /// The file, or the directory that lacks it.
        path: PathBuf,
        /// What differs.
        problem: String,
    },
    /// No checkpoint of a run can be used.
    #[error("no usable checkpoint in {}{}", run.display(), skipped_list(skipped))]
    NoCheckpoint {
        /// The run directory.
        run: PathBuf,
        /// Why each candidate was skipped.
        skipped: Vec<String>,
    },
    /// The path holds nothing that Setun can open.
    #[error("{} is not a model: {problem}", path.display())]
    NotAModel {
        /// What was given.
        path: PathBuf,
        /// What was looked for.
        problem: String,
    },
    /// A file is there but its contents are not what they must be.
    #[error("{}: {problem}", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// The place in it and what is wrong.
        problem: String,
    },
    /// An output refused; [`IoError::file`] adds its name.
    #[error("cannot write: {0}")]
    Stream(#[source] io::Error),
    /// The caller ended the work.
    #[error("stopped; nothing was written")]
    Stopped,
    /// A caller asked for something that cannot be written.
    #[error("{0}")]
    Refused(String),
}

impl IoError {
    /// Wraps an operating system error; takes out an [`IoError`] that travelled through
    /// a [`io::Write`] closure.
    pub fn file(action: &'static str, path: &Path, source: io::Error) -> Self {
        match source.downcast::<IoError>() {
            Ok(Self::Stream(source)) => Self::file(action, path, source),
            Ok(inner) => inner,
            Err(source) => Self::File {
                action,
                path: path.to_owned(),
                source,
            },
        }
    }

    pub(crate) fn invalid(path: &Path, problem: impl Into<String>) -> Self {
        Self::Invalid {
            path: path.to_owned(),
            problem: problem.into(),
        }
    }

    pub(crate) fn damaged(path: &Path, problem: impl Into<String>) -> Self {
        Self::Damaged {
            path: path.to_owned(),
            problem: problem.into(),
        }
    }
}

fn remedy(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            " (free some space and try again)"
        }
        io::ErrorKind::PermissionDenied => " (check the permissions of the directory)",
        io::ErrorKind::NotFound => " (check the path)",
        _ => "",
    }
}

fn skipped_list(skipped: &[String]) -> String {
    if skipped.is_empty() {
        ": it has no checkpoints directory with a step-* entry".to_owned()
    } else {
        format!("; skipped: {}", skipped.join("; "))
    }
}
