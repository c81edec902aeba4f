//! Directories that appear whole or not at all, and prove later that they are undamaged.
//!
//! The protocol: write into `.tmp-NAME-PID` beside the target, hashing while writing; then
//! sync each file; write and sync `MANIFEST.json`; sync the directory; rename it to its
//! name; sync the parent; read everything back. A crash at any point leaves either no
//! target or a whole one. What an error interrupts is removed.

use crate::IoError;
use crate::file_ops::{FileOps, OutputFile, RealOps};
use crate::manifest::{
    FileEntry, MANIFEST, Manifest, PieceHasher, is_plain_name, verify_manifest_with,
};
use std::collections::BTreeMap;
use std::fs;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Start of the names of directories and files that are being written.
pub(crate) const TEMPORARY: &str = ".tmp-";

const BUFFER_BYTES: usize = 1 << 20;

/// Writes a directory that appears under its name only when it is whole.
///
/// Dropped without [`DirWriter::commit`], it removes what it wrote.
pub struct DirWriter {
    ops: Arc<dyn FileOps>,
    parent: PathBuf,
    target: PathBuf,
    temporary: PathBuf,
    files: BTreeMap<String, FileEntry>,
    unsynced: Vec<(String, Box<dyn OutputFile>)>,
    failed: bool,
    committed: bool,
}

impl DirWriter {
    /// Begins the directory `parent/name`; `parent` is created if it is missing.
    ///
    /// # Errors
    /// The target exists already, or the operating system refuses.
    pub fn create(parent: &Path, name: &str) -> Result<Self, IoError> {
        Self::create_with(Arc::new(RealOps), parent, name)
    }

    /// As [`DirWriter::create`], through `ops`.
    ///
    /// # Errors
    /// As [`DirWriter::create`].
    pub fn create_with(ops: Arc<dyn FileOps>, parent: &Path, name: &str) -> Result<Self, IoError> {
        check_name(name)?;
        let target = parent.join(name);
        refuse_existing(&target)?;
        create_parent(ops.as_ref(), parent)?;
        // A process that died may have had the same number: take the next free name.
        for attempt in 0u32.. {
            let temporary = parent.join(temporary_name(name, attempt));
            match ops.create_dir(&temporary) {
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => continue,
                Err(e) => return Err(IoError::file("create", &temporary, e)),
                Ok(()) => {
                    return Ok(Self {
                        ops,
                        parent: parent.to_owned(),
                        target,
                        temporary,
                        files: BTreeMap::new(),
                        unsynced: Vec::new(),
                        failed: false,
                        committed: false,
                    });
                }
            }
        }
        Err(IoError::Exists { path: target })
    }

    /// Writes one file through `write`, which may stream: hashing and buffering are done
    /// here, syncing in [`DirWriter::commit`], so that the sources are free earlier.
    ///
    /// # Errors
    /// A name that is taken or not plain, what `write` returns, and a refusing operating
    /// system. After an error the directory can no longer be committed.
    pub fn file(
        &mut self,
        name: &str,
        write: impl FnOnce(&mut dyn Write) -> io::Result<()>,
    ) -> Result<(), IoError> {
        check_name(name)?;
        if name == MANIFEST || self.files.contains_key(name) {
            return Err(IoError::Exists {
                path: self.target.join(name),
            });
        }
        let path = self.temporary.join(name);
        self.failed = true;
        let (entry, file) = write_unsynced(self.ops.as_ref(), &path, write)
            .map_err(|e| IoError::file("write", &self.target.join(name), e))?;
        self.failed = false;
        self.unsynced.push((name.to_owned(), file));
        self.files.insert(name.to_owned(), entry);
        Ok(())
    }

    /// Makes the directory appear under its name, durably, and reads it back.
    ///
    /// `extra` is kept in the manifest. Returns the path of the directory.
    ///
    /// # Errors
    /// An earlier error of [`DirWriter::file`], a target that came into being meanwhile,
    /// a refusing operating system, and contents that do not read back. In all cases
    /// nothing stays behind.
    pub fn commit(mut self, extra: serde_json::Value) -> Result<PathBuf, IoError> {
        if self.failed {
            let place = self.target.display();
            return Err(IoError::Refused(format!(
                "{place} cannot be committed: writing one of its files failed"
            )));
        }
        for (name, mut file) in std::mem::take(&mut self.unsynced) {
            file.sync()
                .map_err(|e| IoError::file("sync", &self.target.join(name), e))?;
        }
        let manifest = Manifest {
            files: std::mem::take(&mut self.files),
            extra,
        };
        let path = self.temporary.join(MANIFEST);
        write_file(self.ops.as_ref(), &path, |out| {
            out.write_all(&manifest.to_bytes()?)
        })
        .map_err(|e| IoError::file("write", &self.target.join(MANIFEST), e))?;
        self.sync_dir(&self.temporary)?;
        refuse_existing(&self.target)?;
        self.ops
            .rename(&self.temporary, &self.target)
            .map_err(|e| IoError::file("rename to", &self.target, e))?;
        let durable = self.sync_dir(&self.parent);
        if let Err(error) = durable.and_then(|()| self.read_back()) {
            // Back under the temporary name, where dropping `self` removes it: a caller
            // that tries again must find the name free.
            let _ = self.ops.rename(&self.target, &self.temporary);
            return Err(error);
        }
        self.committed = true;
        Ok(self.target.clone())
    }

    fn read_back(&self) -> Result<(), IoError> {
        verify_manifest_with(self.ops.as_ref(), &self.target).map(drop)
    }

    fn sync_dir(&self, dir: &Path) -> Result<(), IoError> {
        self.ops
            .sync_dir(dir)
            .map_err(|e| IoError::file("sync", dir, e))
    }
}

impl Drop for DirWriter {
    fn drop(&mut self) {
        if !self.committed {
            // Open files cannot be removed everywhere.
            self.unsynced.clear();
            // Nothing can be done about a failure here; the next start removes leftovers.
            let _ = self.ops.remove_dir_all(&self.temporary);
        }
    }
}

/// Where a file called `path` is written by a rename: behind symbolic links, so that they stay.
///
/// # Errors
/// Something of that name that is no file, such as a device, which the rename would remove.
pub fn output_path(path: &Path) -> Result<PathBuf, IoError> {
    let refused = |what: &str| {
        let place = path.display();
        IoError::Refused(format!("{place} is {what}: name a file to write"))
    };
    match fs::metadata(path) {
        Ok(found) if found.is_file() => {
            fs::canonicalize(path).map_err(|e| IoError::file("find", path, e))
        }
        Ok(found) if found.is_dir() => Err(refused("a directory")),
        Ok(_) => Err(refused("no regular file")),
        Err(e) if e.kind() == io::ErrorKind::NotFound && path.is_symlink() => {
            Err(refused("a link to what is not there"))
        }
        Err(_) => match path.parent() {
            Some(parent) if !(parent.as_os_str().is_empty() || parent.is_dir()) => {
                Err(refused("in a directory that is not there"))
            }
            _ => Ok(path.to_owned()),
        },
    }
}

/// Replaces the file `path` by `bytes`: readers see the old contents or the new ones.
///
/// # Errors
/// What [`output_path`] refuses; a refusing operating system. The old file then stays as it was.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<(), IoError> {
    write_atomic_with(&RealOps, path, bytes)
}

/// As [`write_atomic`], through `ops`.
///
/// # Errors
/// As [`write_atomic`].
pub fn write_atomic_with(ops: &dyn FileOps, path: &Path, bytes: &[u8]) -> Result<(), IoError> {
    let path = &*output_path(path)?;
    let name = path.file_name().and_then(|name| name.to_str());
    let name =
        name.ok_or_else(|| IoError::Refused(format!("{} has no file name", path.display())))?;
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let temporary = parent.join(temporary_name(name, 0));
    // A leftover of a process that died with the same number is nobody's.
    match ops.remove_file(&temporary) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            return Err(IoError::file("remove", &temporary, e));
        }
        _ => {}
    }
    let written = write_file(ops, &temporary, |out| out.write_all(bytes))
        .and_then(|_| ops.rename(&temporary, path));
    if let Err(e) = written {
        let _ = ops.remove_file(&temporary);
        return Err(IoError::file("write", path, e));
    }
    ops.sync_dir(parent)
        .map_err(|e| IoError::file("sync", parent, e))
}

/// Creates the file `path`, which appears under its name only when it is whole; `write`
/// may stream. Returns its length in bytes.
///
/// # Errors
/// A file of that name, what `write` returns, and a refusing operating system; nothing
/// stays behind.
pub(crate) fn create_file(
    path: &Path,
    write: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> Result<u64, IoError> {
    create_file_with(&RealOps, path, write)
}

fn create_file_with(
    ops: &dyn FileOps,
    path: &Path,
    write: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> Result<u64, IoError> {
    let name = path.file_name().and_then(|name| name.to_str());
    let name =
        name.ok_or_else(|| IoError::Refused(format!("{} has no file name", path.display())))?;
    check_name(name)?;
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    refuse_existing(path)?;
    create_parent(ops, parent)?;
    let temporary = free_name(parent, name);
    let entry = write_file(ops, &temporary, write);
    let named = entry
        .map_err(|e| IoError::file("write", path, e))
        .and_then(|entry| {
            refuse_existing(path)?;
            ops.rename(&temporary, path)
                .map_err(|e| IoError::file("rename to", path, e))?;
            Ok(entry.bytes)
        });
    if named.is_err() {
        // Nothing can be done about a failure here.
        let _ = ops.remove_file(&temporary);
    }
    let num_bytes = named?;
    ops.sync_dir(parent)
        .map_err(|e| IoError::file("sync", parent, e))?;
    Ok(num_bytes)
}

/// A temporary name that nothing in `parent` has.
fn free_name(parent: &Path, name: &str) -> PathBuf {
    let mut names = (0u32..).map(|attempt| parent.join(temporary_name(name, attempt)));
    let first = parent.join(temporary_name(name, 0));
    names
        .find(|path| fs::symlink_metadata(path).is_err())
        .unwrap_or(first)
}

fn check_name(name: &str) -> Result<(), IoError> {
    if is_plain_name(name) {
        return Ok(());
    }
    let problem = "use letters, digits, '-' and '_', with no '/' and no '.' in front";
    Err(IoError::Refused(format!(
        "{name:?} is not a plain file name: {problem}"
    )))
}

fn refuse_existing(target: &Path) -> Result<(), IoError> {
    // Rename alone would replace an empty directory.
    match fs::symlink_metadata(target) {
        Ok(_) => Err(IoError::Exists {
            path: target.to_owned(),
        }),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(IoError::file("read", target, e)),
    }
}

fn create_parent(ops: &dyn FileOps, parent: &Path) -> Result<(), IoError> {
    if parent.is_dir() || parent.as_os_str().is_empty() {
        return Ok(());
    }
    let above = match parent.parent() {
        Some(above) if !above.as_os_str().is_empty() => above,
        _ => Path::new("."),
    };
    create_parent(ops, above)?;
    match ops.create_dir(parent) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => {
            Err(IoError::file("create", parent, e))
        }
        _ => ops
            .sync_dir(above)
            .map_err(|e| IoError::file("sync", above, e)),
    }
}

fn temporary_name(name: &str, attempt: u32) -> String {
    let pid = std::process::id();
    match attempt {
        0 => format!("{TEMPORARY}{name}-{pid}"),
        n => format!("{TEMPORARY}{name}-{pid}-{n}"),
    }
}

fn write_file(
    ops: &dyn FileOps,
    path: &Path,
    write: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> io::Result<FileEntry> {
    let (entry, mut file) = write_unsynced(ops, path, write)?;
    file.sync()?;
    Ok(entry)
}

fn write_unsynced(
    ops: &dyn FileOps,
    path: &Path,
    write: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> io::Result<(FileEntry, Box<dyn OutputFile>)> {
    let file = ops.create_file(path)?;
    let mut out = HashingWriter {
        sink: BufWriter::with_capacity(BUFFER_BYTES, file),
        hasher: PieceHasher::default(),
    };
    write(&mut out)?;
    out.flush()?;
    let file = out.sink.into_inner().map_err(|e| e.into_error())?;
    Ok((out.hasher.finish(), file))
}

struct HashingWriter {
    sink: BufWriter<Box<dyn OutputFile>>,
    hasher: PieceHasher,
}

impl Write for HashingWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.sink.write(bytes)?;
        self.hasher.update(&bytes[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.sink.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::Scratch;
    use crate::{Fault, FaultyOps, verify_manifest};
    use serde_json::json;

    fn save(ops: Arc<dyn FileOps>, parent: &Path, name: &str) -> Result<PathBuf, IoError> {
        let mut dir = DirWriter::create_with(ops, parent, name)?;
        dir.file("weights.bin", |out| out.write_all(&[7; 10_000]))?;
        dir.file("state.json", |out| write!(out, "{{\"name\": \"{name}\"}}"))?;
        dir.commit(json!({"name": name}))
    }

    fn names(dir: &Path) -> Vec<String> {
        let entries = fs::read_dir(dir).unwrap();
        let mut names: Vec<String> = entries
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn a_committed_directory_reads_back() {
        let scratch = Scratch::new("commit-good");
        let path = save(Arc::new(RealOps), &scratch.join("new/parent"), "one").unwrap();
        let manifest = verify_manifest(&path).unwrap();
        assert_eq!(manifest.files["weights.bin"].bytes, 10_000);
        assert_eq!(
            manifest.files["weights.bin"].blake3,
            blake3::hash(&[7; 10_000]).to_hex().as_str()
        );
        assert_eq!(manifest.extra, json!({"name": "one"}));
        assert_eq!(names(&scratch.join("new/parent")), ["one"]);
    }

    #[test]
    fn an_existing_target_is_never_replaced() {
        let scratch = Scratch::new("commit-exists");
        fs::create_dir(scratch.join("empty")).unwrap();
        let refused = save(Arc::new(RealOps), scratch.path(), "empty").unwrap_err();
        assert!(matches!(refused, IoError::Exists { .. }), "{refused}");
        // The target comes into being after the start.
        let mut dir = DirWriter::create(scratch.path(), "late").unwrap();
        dir.file("a", |out| out.write_all(b"a")).unwrap();
        fs::create_dir(scratch.join("late")).unwrap();
        let refused = dir.commit(json!(null)).unwrap_err();
        assert!(matches!(refused, IoError::Exists { .. }), "{refused}");
        assert_eq!(names(scratch.path()), ["empty", "late"]);
        assert!(names(&scratch.join("late")).is_empty());
    }

    #[test]
    fn dropped_or_failed_writers_leave_nothing() {
        let scratch = Scratch::new("commit-drop");
        let mut dir = DirWriter::create(scratch.path(), "x").unwrap();
        dir.file("a", |out| out.write_all(b"a")).unwrap();
        assert_eq!(names(scratch.path()).len(), 1);
        drop(dir);
        assert!(names(scratch.path()).is_empty());

        let mut dir = DirWriter::create(scratch.path(), "x").unwrap();
        let failed = dir.file("a", |_| Err(io::Error::other("the source broke")));
        assert!(failed.unwrap_err().to_string().contains("the source broke"));
        assert!(dir.commit(json!(null)).is_err());
        assert!(names(scratch.path()).is_empty());
    }

    #[test]
    fn two_writers_of_one_name_do_not_meet() {
        let scratch = Scratch::new("commit-two");
        let mut first = DirWriter::create(scratch.path(), "x").unwrap();
        let mut second = DirWriter::create(scratch.path(), "x").unwrap();
        first.file("a", |out| out.write_all(b"1")).unwrap();
        second.file("a", |out| out.write_all(b"2")).unwrap();
        let path = first.commit(json!(null)).unwrap();
        assert!(second.commit(json!(null)).is_err());
        assert_eq!(fs::read(path.join("a")).unwrap(), b"1");
        assert_eq!(names(scratch.path()), ["x"]);
    }

    #[test]
    fn names_cannot_lead_out() {
        let scratch = Scratch::new("commit-names");
        for name in ["", ".", "..", "../x", "a/b", ".hidden", "a\0b", "C:x"] {
            assert!(DirWriter::create(scratch.path(), name).is_err(), "{name:?}");
        }
        let mut dir = DirWriter::create(scratch.path(), "x").unwrap();
        dir.file("a", |_| Ok(())).unwrap();
        for name in ["../a", "a", MANIFEST] {
            assert!(dir.file(name, |_| Ok(())).is_err(), "{name:?}");
        }
    }

    /// SQLite's loop: fail the first operation, then the second, ... until all succeed.
    #[test]
    fn every_failing_operation_leaves_the_earlier_directory() {
        use io::ErrorKind::{Interrupted, Other, PermissionDenied, QuotaExceeded, StorageFull};
        for kind in [
            StorageFull,
            Other,
            QuotaExceeded,
            PermissionDenied,
            Interrupted,
        ] {
            for forever in [false, true] {
                // A call that is interrupted for ever is tried for ever.
                if forever && kind == Interrupted {
                    continue;
                }
                let scratch = Scratch::new("commit-sweep");
                save(Arc::new(RealOps), scratch.path(), "old").unwrap();
                // Writes that are interrupted once are tried again.
                let harmless = kind == Interrupted;
                let failures = (0..NUM_OPERATIONS)
                    .filter(|&n| fails_cleanly(&scratch, n, forever, kind))
                    .count();
                let expected = NUM_OPERATIONS as usize - if harmless { 3 } else { 0 };
                assert_eq!(failures, expected, "{kind:?}");
                assert!(!fails_cleanly(&scratch, NUM_OPERATIONS, forever, kind));
            }
        }
    }

    /// 1 directory, 3 x (create, write, sync), 2 directory syncs, 1 rename, and 3 files
    /// opened to be read back.
    const NUM_OPERATIONS: u64 = 16;

    #[test]
    fn short_writes_are_completed() {
        let scratch = Scratch::new("commit-short");
        for forever in [false, true] {
            let ops = FaultyOps::new(Fault::ShortWrite, 0, forever);
            let path = save(Arc::new(ops), scratch.path(), "short").unwrap();
            verify_manifest(&path).unwrap();
            fs::remove_dir_all(path).unwrap();
        }
    }

    fn fails_cleanly(scratch: &Scratch, n: u64, forever: bool, kind: io::ErrorKind) -> bool {
        let ops = FaultyOps::new(Fault::Error(kind), n, forever);
        let result = save(Arc::new(ops), scratch.path(), "new");
        verify_manifest(&scratch.join("old")).unwrap();
        let Err(error) = result else {
            verify_manifest(&scratch.join("new")).unwrap();
            fs::remove_dir_all(scratch.join("new")).unwrap();
            return false;
        };
        let named = error
            .to_string()
            .contains(scratch.path().to_str().expect("a UTF-8 path"));
        assert!(named, "{error}");
        if forever {
            // Removing fails too, so what is left is either marked as temporary or whole.
            for name in names(scratch.path()) {
                let path = scratch.join(&name);
                match name.as_str() {
                    "old" => {}
                    "new" => drop(verify_manifest(&path).unwrap()),
                    other => assert!(other.starts_with(TEMPORARY), "{other}"),
                }
                if name != "old" {
                    fs::remove_dir_all(&path).unwrap();
                }
            }
        } else {
            assert_eq!(names(scratch.path()), ["old"], "operation {n}");
        }
        true
    }

    #[test]
    fn a_created_file_is_whole_or_absent() {
        let scratch = Scratch::new("commit-create");
        for n in 0.. {
            let path = scratch.join("model.gguf");
            let ops = FaultyOps::new(Fault::Error(io::ErrorKind::StorageFull), n, false);
            let result = create_file_with(&ops, &path, |out| out.write_all(b"weights"));
            if result.is_ok() {
                assert_eq!(fs::read(&path).unwrap(), b"weights");
                // Create, write, sync, rename, and sync of the directory.
                assert_eq!(n, 5);
                break;
            }
            // Only the last step, syncing the directory, comes after the renaming.
            let expected: &[&str] = if n < 4 { &[] } else { &["model.gguf"] };
            assert_eq!(names(scratch.path()), expected, "operation {n}");
            let _ = fs::remove_file(&path);
        }
        let path = scratch.join("model.gguf");
        let again = create_file(&path, |out| out.write_all(b"other"));
        assert!(matches!(again, Err(IoError::Exists { .. })));
        let path = scratch.join("new/other.gguf");
        let failed = create_file(&path, |_| Err(io::Error::other("the source broke")));
        assert!(failed.unwrap_err().to_string().contains("the source broke"));
        assert!(names(&scratch.join("new")).is_empty());
        assert_eq!(fs::read(scratch.join("model.gguf")).unwrap(), b"weights");
    }

    #[cfg(unix)]
    #[test]
    fn links_stay_and_what_is_no_file_is_refused() {
        let scratch = Scratch::new("commit-link");
        let (file, link) = (scratch.join("file"), scratch.join("link"));
        fs::write(&file, b"old").unwrap();
        std::os::unix::fs::symlink("file", &link).unwrap();
        write_atomic(&link, b"new").unwrap();
        assert!(link.is_symlink());
        assert_eq!(fs::read(&file).unwrap(), b"new");
        let socket = scratch.join("socket");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        let dangling = scratch.join("dangling");
        std::os::unix::fs::symlink("nothing", &dangling).unwrap();
        for (path, problem) in [
            (&socket, "no regular file"),
            (&dangling, "a link to what is not there"),
            (&scratch.path().to_owned(), "a directory"),
            (&scratch.join("no/file"), "in a directory that is not there"),
        ] {
            let error = write_atomic(path, b"x").unwrap_err().to_string();
            assert!(error.contains(problem), "{error}");
        }
        assert_eq!(
            names(scratch.path()),
            ["dangling", "file", "link", "socket"]
        );
    }

    #[test]
    fn write_atomic_replaces_or_keeps() {
        let scratch = Scratch::new("commit-atomic");
        let path = scratch.join("best.json");
        write_atomic(&path, b"old").unwrap();
        for n in 0.. {
            let ops = FaultyOps::new(Fault::Error(io::ErrorKind::StorageFull), n, false);
            let result = write_atomic_with(&ops, &path, b"new");
            let contents = fs::read(&path).unwrap();
            assert_eq!(names(scratch.path()), ["best.json"]);
            if result.is_ok() {
                assert_eq!((n, contents.as_slice()), (6, b"new".as_slice()));
                break;
            }
            // Only the last step, syncing the directory, comes after the replacement.
            assert_eq!(contents, if n < 5 { b"old" } else { b"new" });
        }
    }
}
