//! What an exhibit is, and who looks at it.

use setun_formats::config::{ConfigError, Qwen3Config};
use setun_formats::packed::{PackedError, PackedFile};
use setun_formats::tensors::{self, TensorsError};
use setun_formats::tokenizer::{Tokenizer, TokenizerError};
use setun_io::{IoError, OpenModel, TensorFile};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use crate::specimen;

/// A bad file and what its error must say.
pub struct Exhibit {
    /// Name in its room.
    pub name: &'static str,
    /// What is wrong.
    pub wrong: &'static str,
    /// What the message must contain: the place.
    pub words: &'static [&'static str],
    /// The file.
    pub item: Item,
}

impl Exhibit {
    pub fn new(
        name: &'static str,
        wrong: &'static str,
        words: &'static [&'static str],
        item: Item,
    ) -> Self {
        Self {
            name,
            wrong,
            words,
            item,
        }
    }
}

/// The files of a directory by name.
pub type Files = BTreeMap<String, Vec<u8>>;

/// Bytes and the kind of file that they claim to be.
pub enum Item {
    SafeTensors(Vec<u8>),
    Config(Vec<u8>),
    Tokenizer(Vec<u8>),
    Packed(Vec<u8>),
    /// A model directory of any kind.
    Directory(Files),
}

impl Item {
    /// Shows the item to all of its readers, in the directory `dir`. A file goes to the
    /// parser of bytes and, in its place in a model directory, to the reader of
    /// directories, which must name the file too.
    ///
    /// # Errors
    /// What the readers say; an item that one refuses and another accepts is accepted.
    pub fn read(&self, dir: &Path) -> Result<(), String> {
        match self {
            Self::SafeTensors(bytes) => {
                let parsed = read_safetensors(bytes).map_err(|e| e.to_string());
                let path = dir.join("some.safetensors");
                put(&path, bytes);
                let opened = TensorFile::open(&path).map(drop);
                agree(parsed, opened, "some.safetensors")
            }
            Self::Config(bytes) => {
                let parsed: Result<Qwen3Config, ConfigError> = Qwen3Config::parse(bytes);
                put_all(dir, &specimen::huggingface());
                put(&dir.join("config.json"), bytes);
                let opened = read_model(dir);
                agree(
                    parsed.map(drop).map_err(|e| e.to_string()),
                    opened,
                    "config.json",
                )
            }
            Self::Tokenizer(bytes) => {
                let parsed: Result<Tokenizer, TokenizerError> = Tokenizer::from_bytes(bytes);
                put_all(dir, &specimen::huggingface());
                put(&dir.join("tokenizer.json"), bytes);
                let opened = OpenModel::open(dir).and_then(|model| model.tokenizer().map(drop));
                agree(
                    parsed.map(drop).map_err(|e| e.to_string()),
                    opened,
                    "tokenizer.json",
                )
            }
            Self::Packed(bytes) => {
                let parsed = read_packed(bytes).map_err(|e| e.to_string());
                put(&dir.join("packed.safetensors"), bytes);
                agree(parsed, read_model(dir), "packed.safetensors")
            }
            Self::Directory(files) => {
                put_all(dir, files);
                read_model(dir).map_err(|e| e.to_string())
            }
        }
    }
}

/// Puts together what two readers say about a file called `name`.
fn agree(
    parsed: Result<(), String>,
    opened: Result<(), IoError>,
    name: &str,
) -> Result<(), String> {
    match (parsed, opened.map_err(|e| e.to_string())) {
        (Ok(()), Ok(())) => Ok(()),
        (Ok(()), Err(error)) => Err(format!("only the directory's reader refuses: {error}")),
        // Counts as accepted: one way in is enough.
        (Err(_), Ok(())) => Ok(()),
        (Err(message), Err(error)) if error.contains(name) => Err(message),
        (Err(_), Err(error)) => Err(format!("the file is not named: {error}")),
    }
}

fn read_safetensors(bytes: &[u8]) -> Result<(), TensorsError> {
    tensors::open(bytes)?;
    tensors::metadata(bytes).map(drop)
}

fn read_packed(bytes: &[u8]) -> Result<(), PackedError> {
    let file = PackedFile::parse(bytes)?;
    for parameter in file.header().config.parameters() {
        if parameter.is_matrix() {
            file.matrix(&parameter.name)?;
        } else {
            file.norm(&parameter.name)?;
        }
    }
    Ok(())
}

/// Opens a model directory and reads all of its weights.
fn read_model(dir: &Path) -> Result<(), IoError> {
    let model = OpenModel::open(dir)?;
    for parameter in model.config().parameters() {
        if parameter.is_matrix() {
            model.matrix(&parameter.name)?;
        } else {
            model.norm(&parameter.name)?;
        }
    }
    Ok(())
}

fn put(path: &Path, bytes: &[u8]) {
    fs::write(path, bytes).expect("the temporary directory is writable");
}

fn put_all(dir: &Path, files: &Files) {
    for (name, bytes) in files {
        put(&dir.join(name), bytes);
    }
}

/// A directory for the whole visit, removed when dropped.
pub struct Scratch {
    path: PathBuf,
    next: AtomicU32,
}

impl Scratch {
    pub fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("setun-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).expect("the temporary directory is writable");
        let next = AtomicU32::new(0);
        Self { path, next }
    }

    /// An empty directory of its own for each call. Its name is that of a checkpoint.
    pub fn room(&self) -> PathBuf {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let path = self.path.join(number.to_string()).join("step-00000007");
        fs::create_dir_all(&path).expect("the temporary directory is writable");
        path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.path);
    }
}
