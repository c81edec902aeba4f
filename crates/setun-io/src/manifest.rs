//! What a committed directory must hold, and the check that it still does.

use crate::IoError;
use crate::file_ops::{FileOps, RealOps};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read};
use std::path::Path;

/// Name of the manifest in a committed directory.
pub const MANIFEST: &str = "MANIFEST.json";

const VERSION: u32 = 1;
const BUFFER_BYTES: usize = 1 << 20;
/// A manifest lists a handful of files; more is not one of ours.
const MAX_MANIFEST_BYTES: u64 = 16 << 20;
/// Bytes of a file that have a hash of their own, so that damage can be placed.
const PIECE_BYTES: usize = 1 << 20;
/// Hexadecimal digits of a piece's hash: it only places what the file's hash has proved.
const PIECE_DIGITS: usize = 16;

/// Size and hash of one committed file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    /// Length of the file.
    pub bytes: u64,
    /// BLAKE3 of its contents, 64 hexadecimal digits.
    pub blake3: String,
    /// The first 16 digits of the BLAKE3 of each MiB; manifests of old have none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub pieces: Vec<String>,
}

/// Hashes a file as a whole and piece by piece.
#[derive(Default)]
pub(crate) struct PieceHasher {
    whole: blake3::Hasher,
    piece: blake3::Hasher,
    piece_bytes: usize,
    entry: FileEntry,
}

impl PieceHasher {
    pub(crate) fn update(&mut self, mut bytes: &[u8]) {
        self.whole.update(bytes);
        self.entry.bytes += bytes.len() as u64;
        while !bytes.is_empty() {
            let (now, rest) = bytes.split_at(bytes.len().min(PIECE_BYTES - self.piece_bytes));
            self.piece.update(now);
            self.piece_bytes += now.len();
            if self.piece_bytes == PIECE_BYTES {
                self.end_piece();
            }
            bytes = rest;
        }
    }

    pub(crate) fn finish(mut self) -> FileEntry {
        if self.piece_bytes > 0 {
            self.end_piece();
        }
        self.entry.blake3 = self.whole.finalize().to_hex().to_string();
        self.entry
    }

    fn end_piece(&mut self) {
        let hash = self.piece.finalize().to_hex();
        self.entry.pieces.push(hash[..PIECE_DIGITS].to_owned());
        self.piece.reset();
        self.piece_bytes = 0;
    }
}

/// What a committed directory must hold. On disk it starts with a checksum over itself.
#[derive(Clone, Debug, PartialEq)]
pub struct Manifest {
    /// Every file but the manifest.
    pub files: BTreeMap<String, FileEntry>,
    /// What the writer recorded: step, hashes, number format.
    pub extra: serde_json::Value,
}

impl Manifest {
    /// Reads the manifest of `dir` and checks it against its own checksum.
    ///
    /// # Errors
    /// A missing manifest, one that was edited or damaged, and names that lead out of
    /// `dir`.
    pub fn read(dir: &Path) -> Result<Self, IoError> {
        Self::read_with(&RealOps, dir)
    }

    fn read_with(ops: &dyn FileOps, dir: &Path) -> Result<Self, IoError> {
        let path = dir.join(MANIFEST);
        let file = ops
            .open_file(&path)
            .map_err(|e| IoError::file("open", &path, e))?;
        let mut text = Vec::new();
        file.take(MAX_MANIFEST_BYTES)
            .read_to_end(&mut text)
            .map_err(|e| IoError::file("read", &path, e))?;
        if !checksum_fits(&text) {
            let end = text.len();
            let problem =
                format!("its checksum does not fit its contents, between the offsets 0 and {end}");
            return Err(IoError::damaged(&path, problem));
        }
        let on_disk: ManifestOnDisk = serde_json::from_slice(&text)
            .map_err(|e| IoError::damaged(&path, format!("not a manifest: {e}")))?;
        if on_disk.version != VERSION {
            let problem = format!(
                "manifest version {} is unknown: read it with the version of Setun that wrote it",
                on_disk.version
            );
            return Err(IoError::invalid(&path, problem));
        }
        if let Some(name) = on_disk.files.keys().find(|name| !is_plain_name(name)) {
            let problem = format!("{name:?} is not a plain file name");
            return Err(IoError::damaged(&path, problem));
        }
        Ok(Self {
            files: on_disk.files,
            extra: on_disk.extra,
        })
    }

    /// Checks that every file of `dir` is there with its size: quick, no hashing.
    ///
    /// # Errors
    /// The first missing file or file of another size.
    pub fn check_sizes(&self, dir: &Path) -> Result<(), IoError> {
        for (name, entry) in &self.files {
            let path = dir.join(name);
            let bytes = match fs::metadata(&path) {
                Ok(metadata) => metadata.len(),
                Err(e) if e.kind() == io::ErrorKind::NotFound => {
                    return Err(IoError::damaged(&path, "the file is missing"));
                }
                Err(e) => return Err(IoError::file("read", &path, e)),
            };
            if bytes != entry.bytes {
                let problem = format!("it has {bytes} bytes, the manifest says {}", entry.bytes);
                return Err(IoError::damaged(&path, problem));
            }
        }
        Ok(())
    }

    fn check_hashes(&self, ops: &dyn FileOps, dir: &Path) -> Result<(), IoError> {
        for (name, entry) in &self.files {
            let path = dir.join(name);
            let found = hash_file(ops, &path).map_err(|e| IoError::file("read", &path, e))?;
            if found.blake3 != entry.blake3 {
                let problem = format!(
                    "its BLAKE3 is {}, the manifest says {}{}",
                    found.blake3,
                    entry.blake3,
                    entry.first_difference(&found)
                );
                return Err(IoError::damaged(&path, problem));
            }
        }
        Ok(())
    }

    pub(crate) fn to_bytes(&self) -> io::Result<Vec<u8>> {
        let on_disk = ManifestOnDisk {
            checksum: NO_CHECKSUM.to_owned(),
            version: VERSION,
            files: self.files.clone(),
            extra: self.extra.clone(),
        };
        let mut text = serde_json::to_vec_pretty(&on_disk)?;
        text.push(b'\n');
        let checksum = blake3::hash(&text).to_hex();
        text[CHECKSUM_PREFIX.len()..][..NO_CHECKSUM.len()].copy_from_slice(checksum.as_bytes());
        Ok(text)
    }
}

/// Checks sizes and hashes of the directory `dir` against its manifest.
///
/// Files that the manifest does not list are not looked at.
///
/// # Errors
/// A missing or damaged manifest, and the first file that is missing or differs.
pub fn verify_manifest(dir: &Path) -> Result<Manifest, IoError> {
    verify_manifest_with(&RealOps, dir)
}

/// As [`verify_manifest`], reading through `ops`.
///
/// # Errors
/// As [`verify_manifest`].
pub fn verify_manifest_with(ops: &dyn FileOps, dir: &Path) -> Result<Manifest, IoError> {
    let manifest = Manifest::read_with(ops, dir)?;
    manifest.check_sizes(dir)?;
    manifest.check_hashes(ops, dir)?;
    Ok(manifest)
}

impl FileEntry {
    /// Where `found` begins to differ, for the error.
    fn first_difference(&self, found: &Self) -> String {
        let mut pairs = self.pieces.iter().zip(&found.pieces);
        let Some(piece) = pairs.position(|(expected, found)| expected != found) else {
            return String::new();
        };
        let start = (piece * PIECE_BYTES) as u64;
        let end = self.bytes.min(start + PIECE_BYTES as u64);
        format!("; the first damage is between the offsets {start} and {end}")
    }
}

/// A plain file name: one component, not hidden, so never a way out of the directory.
pub(crate) fn is_plain_name(name: &str) -> bool {
    !name.is_empty() && !name.starts_with('.') && !name.contains(['/', '\\', '\0', ':'])
}

/// The checksum field is first in the file, so its place is known before parsing.
#[derive(Serialize, Deserialize)]
struct ManifestOnDisk {
    checksum: String,
    version: u32,
    files: BTreeMap<String, FileEntry>,
    extra: serde_json::Value,
}

const CHECKSUM_PREFIX: &str = "{\n  \"checksum\": \"";
/// Stands for the checksum while it is computed.
const NO_CHECKSUM: &str = "0000000000000000000000000000000000000000000000000000000000000000";

fn checksum_fits(text: &[u8]) -> bool {
    let (start, end) = (
        CHECKSUM_PREFIX.len(),
        CHECKSUM_PREFIX.len() + NO_CHECKSUM.len(),
    );
    let Some(checksum) = text.get(start..end) else {
        return false;
    };
    let mut hasher = blake3::Hasher::new();
    hasher.update(&text[..start]);
    hasher.update(NO_CHECKSUM.as_bytes());
    hasher.update(&text[end..]);
    hasher.finalize().to_hex().as_bytes() == checksum
}

fn hash_file(ops: &dyn FileOps, path: &Path) -> io::Result<FileEntry> {
    let mut file = ops.open_file(path)?;
    let mut hasher = PieceHasher::default();
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok(hasher.finish()),
            Ok(n) => hasher.update(&buffer[..n]),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DirWriter;
    use crate::fixture::Scratch;
    use std::path::PathBuf;

    fn save(scratch: &Scratch) -> PathBuf {
        let mut dir = DirWriter::create(scratch.path(), "x").unwrap();
        dir.file("weights.bin", |out| out.write_all(&[7; 10_000]))
            .unwrap();
        dir.file("state.json", |out| out.write_all(b"{\"step\": 12}"))
            .unwrap();
        dir.commit(serde_json::json!({"step": 12, "loss": 0.1}))
            .unwrap()
    }

    #[test]
    fn every_flipped_bit_is_found() {
        let scratch = Scratch::new("commit-flip");
        let path = save(&scratch);
        for file in ["state.json", MANIFEST] {
            let good = fs::read(path.join(file)).unwrap();
            for bit in 0..8 * good.len() {
                let mut bad = good.clone();
                bad[bit / 8] ^= 1 << (bit % 8);
                fs::write(path.join(file), &bad).unwrap();
                let error = verify_manifest(&path).unwrap_err().to_string();
                assert!(error.contains(file), "{error}");
            }
            fs::write(path.join(file), &good).unwrap();
        }
        verify_manifest(&path).unwrap();
    }

    #[test]
    fn truncated_and_missing_files_are_named() {
        let scratch = Scratch::new("commit-truncate");
        let path = save(&scratch);
        let weights = path.join("weights.bin");
        fs::write(&weights, [7; 9_999]).unwrap();
        let error = verify_manifest(&path).unwrap_err().to_string();
        assert!(
            error.contains("weights.bin") && error.contains("9999 bytes"),
            "{error}"
        );
        fs::remove_file(&weights).unwrap();
        let error = verify_manifest(&path).unwrap_err().to_string();
        assert!(
            error.contains("weights.bin") && error.contains("missing"),
            "{error}"
        );
    }

    #[test]
    fn damage_is_placed() {
        let scratch = Scratch::new("commit-place");
        let mut dir = DirWriter::create(scratch.path(), "x").unwrap();
        let bytes: Vec<u8> = (0..3 * PIECE_BYTES + 5).map(|i| (i / 1000) as u8).collect();
        dir.file("weights.bin", |out| {
            // In pieces that are not those of the manifest.
            bytes
                .chunks(70_001)
                .try_for_each(|part| out.write_all(part))
        })
        .unwrap();
        let path = dir.commit(serde_json::json!(null)).unwrap();
        for (offset, place) in [
            (0, "offsets 0 and 1048576"),
            (2 * PIECE_BYTES, "offsets 2097152 and 3145728"),
            (bytes.len() - 1, "offsets 3145728 and 3145733"),
        ] {
            let mut bad = bytes.clone();
            bad[offset] ^= 16;
            fs::write(path.join("weights.bin"), bad).unwrap();
            let error = verify_manifest(&path).unwrap_err().to_string();
            assert!(
                error.contains("weights.bin") && error.contains(place),
                "{error}"
            );
        }
    }
}
