//! A block drafter on disk: a directory `drafter` beside its target's files.

use crate::export::write_parameters;
use crate::{DirWriter, IoError, OpenModel, TensorSource, verify_manifest};
use setun_formats::{DrafterFile, DrafterHeader, ParameterInfo, Qwen3Config};
use setun_ternary::PackedMatrix;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

/// Name of the directory.
pub const DRAFTER_DIRECTORY: &str = "drafter";
/// Name of its file.
const FILE: &str = "drafter.safetensors";
/// Largest file that is read: it is held in memory whole.
const MAX_BYTES: u64 = 4 << 30;

/// Writes a drafter to `parent/drafter`, which must not exist, and returns that path. It
/// appears whole or not at all.
///
/// # Errors
/// What the source or the file system refuses.
pub fn export_drafter(
    parent: &Path,
    header: &DrafterHeader,
    source: &dyn TensorSource,
) -> Result<PathBuf, IoError> {
    let mut dir = DirWriter::create(parent, DRAFTER_DIRECTORY)?;
    let mut hash = String::new();
    dir.file(FILE, |out| {
        let parameters = (header.parameters(), &header.ternary);
        hash = write_parameters(out, parameters, &header.metadata(), source)?;
        Ok(())
    })?;
    dir.commit(serde_json::json!({ "ternary_hash": hash }))
}

/// A drafter whose file is in memory.
#[derive(Debug)]
pub struct OpenDrafter {
    path: PathBuf,
    bytes: Vec<u8>,
    header: DrafterHeader,
}

/// The file of the drafter at `path`, which is that file or its directory; none where there
/// is no drafter.
pub fn find_drafter(path: &Path) -> Option<PathBuf> {
    let places = [path.join(FILE), path.to_owned()];
    let named = |p: &PathBuf| p.file_name().is_some_and(|name| name == FILE);
    places.into_iter().find(|p| named(p) && p.is_file())
}

impl OpenDrafter {
    /// Reads the file at `path`, which [`find_drafter`] has found, and checks all of it.
    ///
    /// # Errors
    /// A file that cannot be read or is no drafter, by key or tensor.
    pub fn open(path: &Path) -> Result<Self, IoError> {
        let read = || -> io::Result<Vec<u8>> {
            let file = File::open(path)?;
            let mut bytes = Vec::new();
            file.take(MAX_BYTES).read_to_end(&mut bytes)?;
            Ok(bytes)
        };
        let bytes = read().map_err(|e| IoError::file("read", path, e))?;
        let drafter = Self {
            header: parse(path, &bytes)?.header,
            path: path.to_owned(),
            bytes,
        };
        for parameter in drafter.header.parameters() {
            if parameter.is_matrix() {
                drafter.matrix(&parameter.name)?;
            } else {
                drafter.norm(&parameter.name)?;
            }
        }
        Ok(drafter)
    }

    /// What its metadata says.
    pub fn header(&self) -> &DrafterHeader {
        &self.header
    }

    /// Refuses a target for which the drafter cannot be used. For other weights of the same
    /// shape it can: fewer of its drafts are accepted, and the text stays the same.
    ///
    /// # Errors
    /// Widths, rope, layers or groups that are not those of its target.
    pub fn check_target(&self, target: &OpenModel) -> Result<(), IoError> {
        let (own, other) = (&self.header.config, target.config());
        // All but what a drafter has for itself: layers, vocabulary, tokens with a meaning.
        let widths = |c: &Qwen3Config| Qwen3Config {
            vocab_size: 1,
            num_hidden_layers: 1,
            tie_word_embeddings: true,
            bos_token_id: None,
            eos_token_ids: Vec::new(),
            ..c.clone()
        };
        let last = self.header.target_layer_ids.last();
        let refuse = |what: &str| {
            let problem = format!(
                "this drafter was trained for another model than {}: {what}; train one with \
                 setun train --drafter-for",
                target.directory().display()
            );
            Err(IoError::invalid(&self.path, problem))
        };
        if widths(own) != widths(other) {
            return refuse("its hidden_size, heads, rope or another width is not the model's");
        }
        if last.is_none_or(|&layer| layer >= other.num_hidden_layers) {
            return refuse("it reads layers that the model does not have");
        }
        let Some(ternary) = target.ternary() else {
            return refuse("that one is dense");
        };
        if ternary.group_size != self.header.ternary.group_size {
            return refuse("its group_size is not the model's");
        }
        Ok(())
    }

    /// The matrix called `name`, checked.
    ///
    /// # Errors
    /// No such matrix.
    pub fn matrix(&self, name: &str) -> Result<PackedMatrix, IoError> {
        let matrix = parse(&self.path, &self.bytes)?.tensors.matrix(name);
        matrix.map_err(|e| IoError::invalid(&self.path, e.to_string()))
    }

    /// The norm called `name`.
    ///
    /// # Errors
    /// No such norm.
    pub fn norm(&self, name: &str) -> Result<Vec<f32>, IoError> {
        let norm = parse(&self.path, &self.bytes)?.tensors.norm(name);
        norm.map_err(|e| IoError::invalid(&self.path, e.to_string()))
    }
}

/// Checks the drafter of the run at `run`, if it has one: hashes, and every trit and scale.
/// Returns its file and number of weights in matrices.
///
/// # Errors
/// The first thing that is wrong.
pub(crate) fn verify_drafter(run: &Path) -> Result<Option<(PathBuf, u64)>, IoError> {
    let directory = run.join(DRAFTER_DIRECTORY);
    if !directory.exists() {
        return Ok(None);
    }
    verify_manifest(&directory)?;
    let file = directory.join(FILE);
    let drafter = OpenDrafter::open(&file)?;
    let parameters = drafter.header.parameters().into_iter();
    let matrices = parameters.filter(ParameterInfo::is_matrix);
    let weights = matrices.map(|p| p.numel() as u64).sum();
    Ok(Some((file, weights)))
}

fn parse<'a>(path: &Path, bytes: &'a [u8]) -> Result<DrafterFile<'a>, IoError> {
    DrafterFile::parse(bytes).map_err(|e| IoError::invalid(path, e.to_string()))
}
