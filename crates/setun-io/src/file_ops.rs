//! The file operations under everything that is saved: the operating system, or whatever
//! a test puts in its place.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::Path;

/// The operations that a save consists of. All that must survive a crash goes through
/// here, so that tests can make each of them fail and replay a loss of power
/// ([`FaultyOps`](crate::FaultyOps)).
pub trait FileOps: Send + Sync {
    /// Creates a directory that must not exist yet.
    ///
    /// # Errors
    /// As the operating system says; so for all methods.
    fn create_dir(&self, path: &Path) -> io::Result<()>;
    /// Creates a file that must not exist yet.
    ///
    /// # Errors
    /// As [`FileOps::create_dir`].
    fn create_file(&self, path: &Path) -> io::Result<Box<dyn OutputFile>>;
    /// Opens a file to read it back.
    ///
    /// # Errors
    /// As [`FileOps::create_dir`].
    fn open_file(&self, path: &Path) -> io::Result<Box<dyn Read>>;
    /// Makes the names in a directory durable.
    ///
    /// # Errors
    /// As [`FileOps::create_dir`].
    fn sync_dir(&self, path: &Path) -> io::Result<()>;
    /// Renames within one file system; a file in the way is replaced.
    ///
    /// # Errors
    /// As [`FileOps::create_dir`].
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Removes a file.
    ///
    /// # Errors
    /// As [`FileOps::create_dir`].
    fn remove_file(&self, path: &Path) -> io::Result<()>;
    /// Removes a directory with everything in it.
    ///
    /// # Errors
    /// As [`FileOps::create_dir`].
    fn remove_dir_all(&self, path: &Path) -> io::Result<()>;
    /// Bytes that can still be written below the directory `path`; none if the system
    /// does not say.
    ///
    /// # Errors
    /// As [`FileOps::create_dir`].
    fn available_bytes(&self, path: &Path) -> io::Result<Option<u64>>;
}

/// A file that is being written.
pub trait OutputFile: Write + Send {
    /// Makes the contents durable.
    ///
    /// # Errors
    /// As the operating system says. What was written must then count as lost: a second
    /// attempt may succeed without having written anything.
    fn sync(&mut self) -> io::Result<()>;
}

impl OutputFile for File {
    fn sync(&mut self) -> io::Result<()> {
        self.sync_all()
    }
}

/// The operating system.
#[derive(Clone, Copy, Debug, Default)]
pub struct RealOps;

impl FileOps for RealOps {
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        fs::create_dir(path)
    }

    fn create_file(&self, path: &Path) -> io::Result<Box<dyn OutputFile>> {
        Ok(Box::new(File::create_new(path)?))
    }

    fn open_file(&self, path: &Path) -> io::Result<Box<dyn Read>> {
        Ok(Box::new(File::open(path)?))
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        // Other systems cannot open a directory; their renames are journaled.
        if cfg!(unix) {
            File::open(path)?.sync_all()?;
        }
        Ok(())
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn remove_dir_all(&self, path: &Path) -> io::Result<()> {
        fs::remove_dir_all(path)
    }

    #[cfg(unix)]
    fn available_bytes(&self, path: &Path) -> io::Result<Option<u64>> {
        let found = rustix::fs::statvfs(path)?;
        Ok(Some(found.f_bavail.saturating_mul(found.f_frsize)))
    }

    #[cfg(not(unix))]
    fn available_bytes(&self, _: &Path) -> io::Result<Option<u64>> {
        Ok(None)
    }
}
