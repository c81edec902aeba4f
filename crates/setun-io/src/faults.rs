//! File operations that fail on purpose: for the tests of everything that saves.

use crate::file_ops::{FileOps, OutputFile, RealOps};
use std::io::{self, Read, Write};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The operation fails; a write has taken half of its bytes by then.
    Error(io::ErrorKind),
    /// A write takes half of its bytes and reports success, as it may; other operations
    /// pass.
    ShortWrite,
}

/// The operating system, but the operation with the number `first` (from 0) goes wrong;
/// with `forever` all from there on.
#[derive(Clone, Debug)]
pub struct FaultyOps {
    fault: Fault,
    first: u64,
    forever: bool,
    count: Arc<AtomicU64>,
}

impl FaultyOps {
    /// See the type.
    pub fn new(fault: Fault, first: u64, forever: bool) -> Self {
        Self {
            fault,
            first,
            forever,
            count: Arc::default(),
        }
    }

    /// Operations so far.
    pub fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }

    /// Counts an operation; true if it is to go wrong.
    fn strikes(&self) -> bool {
        let number = self.count.fetch_add(1, Ordering::Relaxed);
        number == self.first || self.forever && number > self.first
    }

    fn pass(&self) -> io::Result<()> {
        match self.fault {
            Fault::Error(kind) if self.strikes() => Err(kind.into()),
            Fault::Error(_) => Ok(()),
            Fault::ShortWrite => {
                self.strikes();
                Ok(())
            }
        }
    }
}

impl FileOps for FaultyOps {
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        self.pass()?;
        RealOps.create_dir(path)
    }

    fn create_file(&self, path: &Path) -> io::Result<Box<dyn OutputFile>> {
        self.pass()?;
        Ok(Box::new(FaultyFile {
            ops: self.clone(),
            file: RealOps.create_file(path)?,
        }))
    }

    fn open_file(&self, path: &Path) -> io::Result<Box<dyn Read>> {
        self.pass()?;
        RealOps.open_file(path)
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.pass()?;
        RealOps.sync_dir(path)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.pass()?;
        RealOps.rename(from, to)
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        self.pass()?;
        RealOps.remove_file(path)
    }

    fn remove_dir_all(&self, path: &Path) -> io::Result<()> {
        self.pass()?;
        RealOps.remove_dir_all(path)
    }

    fn available_bytes(&self, path: &Path) -> io::Result<Option<u64>> {
        self.pass()?;
        RealOps.available_bytes(path)
    }
}

struct FaultyFile {
    ops: FaultyOps,
    file: Box<dyn OutputFile>,
}

impl Write for FaultyFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if !self.ops.strikes() {
            return self.file.write(bytes);
        }
        let half = bytes.len().div_ceil(2);
        match self.ops.fault {
            Fault::ShortWrite => self.file.write(&bytes[..half]),
            // A call that was interrupted has written nothing.
            Fault::Error(io::ErrorKind::Interrupted) => Err(io::ErrorKind::Interrupted.into()),
            Fault::Error(kind) => {
                self.file.write_all(&bytes[..half])?;
                Err(kind.into())
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl OutputFile for FaultyFile {
    fn sync(&mut self) -> io::Result<()> {
        self.ops.pass()?;
        self.file.sync()
    }
}
