//! What a committed directory must hold, and the check that it still does.

use crate::IoError;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;

/// Name of the manifest in a committed directory.
pub const MANIFEST: &str = "MANIFEST.json";

const VERSION: u32 = 1;
const BUFFER_BYTES: usize = 1 << 20;
/// A manifest lists a handful of files; more is not one of ours.
const MAX_MANIFEST_BYTES: u64 = 16 << 20;

/// Size and hash of one committed file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    /// Length of the file.
    pub bytes: u64,
    /// BLAKE3 of its contents, 64 hexadecimal digits.
    pub blake3: String,
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
        let path = dir.join(MANIFEST);
        let file = File::open(&path).map_err(|e| IoError::file("open", &path, e))?;
        let mut text = Vec::new();
        file.take(MAX_MANIFEST_BYTES)
            .read_to_end(&mut text)
            .map_err(|e| IoError::file("read", &path, e))?;
        if !checksum_fits(&text) {
            let problem = "its checksum does not fit its contents";
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

    fn check_hashes(&self, dir: &Path) -> Result<(), IoError> {
        for (name, entry) in &self.files {
            let path = dir.join(name);
            let hash = hash_file(&path).map_err(|e| IoError::file("read", &path, e))?;
            if hash != entry.blake3 {
                let problem = format!("its BLAKE3 is {hash}, the manifest says {}", entry.blake3);
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
    let manifest = Manifest::read(dir)?;
    manifest.check_sizes(dir)?;
    manifest.check_hashes(dir)?;
    Ok(manifest)
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

fn hash_file(path: &Path) -> io::Result<String> {
    let mut file = File::open(path)?;
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok(hasher.finalize().to_hex().to_string()),
            Ok(n) => drop(hasher.update(&buffer[..n])),
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
}
