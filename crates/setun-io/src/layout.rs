//! What lies where on disk, and the checks of headers against the config that opening
//! and verifying share.

use crate::checkpoints::CHECKPOINTS;
use crate::huggingface::{read_index, unexpected};
use crate::manifest::is_plain_name;
use crate::{IoError, TensorFile};
use half::{bf16, f16};
use setun_formats::config::Qwen3Config;
use setun_formats::generation_config::GenerationConfig;
use setun_formats::packed::{
    FORMAT, PackedHeader, TernaryInfo, packed_tensor_infos, parse_header, parse_ternary,
};
use setun_formats::tensors::Dtype;
use setun_ternary::PackedMatrix;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

pub(crate) const BEST: &str = "best.json";
pub(crate) const CONFIG: &str = "config.json";
pub(crate) const GENERATION: &str = "generation_config.json";
pub(crate) const TOKENIZER: &str = "tokenizer.json";
pub(crate) const LATENTS: &str = "latents.safetensors";
pub(crate) const PACKED: &str = "packed.safetensors";
pub(crate) const HF_SINGLE: &str = "model.safetensors";
pub(crate) const HF_INDEX: &str = "model.safetensors.index.json";

/// What the name of a matrix is followed by in the name of the learned factors of its scales,
/// which the checkpoint of an experiment holds.
pub const SCALE_FACTOR: &str = ".scale_factor";

/// Group sizes that are tried where a file records none, largest first.
pub(crate) const GROUP_SIZES: [usize; 4] = [256, 128, 64, 32];

/// Prefix of Setun's keys in metadata that belong to others.
pub(crate) const KEY_PREFIX: &str = "setun.";

/// What a path that is not a run directory holds.
#[derive(Debug)]
pub(crate) enum Located {
    /// A checkpoint directory.
    Checkpoint(PathBuf),
    /// A packed file.
    Packed(PathBuf),
    /// A Hugging Face directory and its safetensors files; also MLX and
    /// compressed-tensors.
    HuggingFace(PathBuf, Vec<PathBuf>),
    /// A GGUF file.
    Gguf(PathBuf),
}

/// Whether `path` is a run directory with a place for checkpoints.
pub fn is_run(path: &Path) -> bool {
    path.join(CHECKPOINTS).is_dir()
}

/// Recognises a checkpoint, a packed file or directory, a Hugging Face directory or file,
/// or a GGUF file, by the names that are there; contents are checked later.
pub(crate) fn locate(path: &Path) -> Result<Located, IoError> {
    let not_a_model = |problem: &str| IoError::NotAModel {
        path: path.to_owned(),
        problem: problem.to_owned(),
    };
    if path.is_file() {
        if starts_as_gguf(path)? {
            return Ok(Located::Gguf(path.to_owned()));
        }
        let file = TensorFile::open(path)?;
        if file.metadata().get("format").is_some_and(|f| f == FORMAT) {
            return Ok(Located::Packed(path.to_owned()));
        }
        let dir = path.parent().unwrap_or(Path::new(""));
        if dir.join(CONFIG).is_file() {
            let files = vec![path.to_owned()];
            return Ok(Located::HuggingFace(dir.to_owned(), files));
        }
        return Err(not_a_model(
            "it is not a packed file, and there is no config.json beside it",
        ));
    }
    if !path.is_dir() {
        return Err(not_a_model("there is no such file or directory"));
    }
    let dir = path.to_owned();
    if path.join(LATENTS).is_file() {
        return Ok(Located::Checkpoint(dir));
    }
    if path.join(PACKED).is_file() {
        return Ok(Located::Packed(path.join(PACKED)));
    }
    if path.join(HF_SINGLE).is_file() {
        return Ok(Located::HuggingFace(dir, vec![path.join(HF_SINGLE)]));
    }
    if path.join(HF_INDEX).is_file() {
        return Ok(Located::HuggingFace(dir, sharded_files(path)?));
    }
    if path.join("pytorch_model.bin").is_file() || path.join(TORCH_INDEX).is_file() {
        return Err(not_a_model(
            "its weights are pickled (pytorch_model.bin); save them as safetensors with \
             transformers (save_pretrained) first",
        ));
    }
    if path.join("settings.toml").is_file() && path.join("run.json").is_file() {
        return Err(not_a_model(
            "the run has no checkpoint yet; wait for its first one, or go on with setun train \
             --resume",
        ));
    }
    Err(not_a_model(
        "expected a run (checkpoints/), a checkpoint (latents.safetensors), a packed model \
         (packed.safetensors), a Hugging Face or MLX model (config.json with \
         model.safetensors or model.safetensors.index.json) or a GGUF file",
    ))
}

const TORCH_INDEX: &str = "pytorch_model.bin.index.json";

fn starts_as_gguf(path: &Path) -> Result<bool, IoError> {
    let mut magic = Vec::new();
    File::open(path)
        .and_then(|file| file.take(4).read_to_end(&mut magic))
        .map_err(|e| IoError::file("read", path, e))?;
    Ok(magic == b"GGUF")
}

fn sharded_files(dir: &Path) -> Result<Vec<PathBuf>, IoError> {
    let path = dir.join(HF_INDEX);
    let names: BTreeSet<String> = read_index(&path)?.into_values().collect();
    if let Some(name) = names.iter().find(|name| !is_plain_name(name)) {
        let problem = format!("{name:?} is not a plain file name");
        return Err(IoError::invalid(&path, problem));
    }
    Ok(names.iter().map(|name| dir.join(name)).collect())
}

/// Files of values that together hold each tensor once.
#[derive(Debug, Default)]
pub(crate) struct Shards {
    files: Vec<TensorFile>,
    file_of: BTreeMap<String, usize>,
}

impl Shards {
    pub(crate) fn single(file: TensorFile) -> Self {
        let file_of = file.tensors().map(|t| (t.0.to_owned(), 0)).collect();
        Self {
            files: vec![file],
            file_of,
        }
    }

    pub(crate) fn open(paths: &[PathBuf]) -> Result<Self, IoError> {
        let mut shards = Self {
            files: Vec::new(),
            file_of: BTreeMap::new(),
        };
        for (i, path) in paths.iter().enumerate() {
            let file = TensorFile::open(path)?;
            for (name, _, _) in file.tensors() {
                if shards.file_of.insert(name.to_owned(), i).is_some() {
                    let problem = format!("{name} is in another shard too");
                    return Err(IoError::invalid(path, problem));
                }
            }
            shards.files.push(file);
        }
        Ok(shards)
    }

    /// Every tensor's name, in order, with the file that holds it.
    pub(crate) fn tensors(&self) -> impl Iterator<Item = (&str, &TensorFile)> {
        let all = self.file_of.iter();
        all.map(|(name, &i)| (name.as_str(), &self.files[i]))
    }

    pub(crate) fn file_of(&self, name: &str) -> Option<&TensorFile> {
        self.file_of.get(name).map(|&i| &self.files[i])
    }

    /// The file that holds `name`; the first one for a name that none holds.
    pub(crate) fn path_of(&self, name: &str) -> &Path {
        let file = self.file_of(name).or(self.files.first());
        file.map_or(Path::new(""), TensorFile::path)
    }

    pub(crate) fn floats(&self, name: &str) -> Result<Vec<f32>, IoError> {
        match self.file_of(name) {
            Some(file) => file.floats(name),
            None => Err(missing(self.path_of(name), name)),
        }
    }
}

pub(crate) fn missing(path: &Path, name: &str) -> IoError {
    IoError::invalid(path, format!("tensor {name} is missing"))
}

pub(crate) fn read(path: &Path) -> Result<Vec<u8>, IoError> {
    fs::read(path).map_err(|e| IoError::file("read", path, e))
}

/// The `generation_config.json` in `dir`, if there is one.
pub(crate) fn read_generation(dir: &Path) -> Result<Option<GenerationConfig>, IoError> {
    let path = dir.join(GENERATION);
    if !path.is_file() {
        return Ok(None);
    }
    GenerationConfig::from_bytes(&read(&path)?)
        .map(Some)
        .map_err(|e| IoError::invalid(&path, e.to_string()))
}

pub(crate) fn read_config(path: &Path) -> Result<Qwen3Config, IoError> {
    Qwen3Config::parse(&read(path)?).map_err(|e| IoError::invalid(path, e.to_string()))
}

/// Checks that `file` holds the latents of all parameters, f32, and nothing else but the
/// learned factors of their scales.
pub(crate) fn check_latents(file: &TensorFile, config: &Qwen3Config) -> Result<(), IoError> {
    let parameters = config.parameters();
    for parameter in &parameters {
        file.expect(&parameter.name, &[Dtype::F32], &parameter.shape)?;
    }
    let known: BTreeSet<&str> = parameters.iter().map(|p| p.name.as_str()).collect();
    let is_known = |name: &str| known.contains(name.strip_suffix(SCALE_FACTOR).unwrap_or(name));
    match file.tensors().find(|t| !is_known(t.0)) {
        None => Ok(()),
        Some((name, _, _)) => Err(unexpected(file.path(), name)),
    }
}

/// How Hugging Face files say that they are ternary; `None` if they do not.
pub(crate) fn ternary_metadata(shards: &Shards) -> Result<Option<TernaryInfo>, IoError> {
    let key = format!("{KEY_PREFIX}group_size");
    let marked = |file: &&TensorFile| file.metadata().contains_key(&key);
    let Some(file) = shards.files.iter().find(marked) else {
        return Ok(None);
    };
    parse_ternary(file.metadata(), KEY_PREFIX)
        .map(Some)
        .map_err(|e| IoError::invalid(file.path(), e.to_string()))
}

/// Checks the header of a packed file: every tensor that its config implies with its
/// dtype and shape, and nothing else.
pub(crate) fn packed_header(file: &TensorFile) -> Result<PackedHeader, IoError> {
    let header =
        parse_header(file.metadata()).map_err(|e| IoError::invalid(file.path(), e.to_string()))?;
    let PackedHeader { config, ternary } = &header;
    let expected = packed_tensor_infos(config, ternary.group_size);
    for info in &expected {
        file.expect(&info.name, &[info.dtype], &info.shape)?;
    }
    let known: BTreeSet<&str> = expected.iter().map(|info| info.name.as_str()).collect();
    if let Some((name, _, _)) = file.tensors().find(|t| !known.contains(t.0)) {
        return Err(unexpected(file.path(), name));
    }
    Ok(header)
}

/// The first group of `matrix` whose scale cannot be one, with the reason; rows count
/// from `first_row`.
pub(crate) fn bad_scale(matrix: &PackedMatrix, first_row: usize) -> Option<String> {
    let groups = matrix.groups();
    let mut scales = matrix.scales.iter().enumerate();
    scales.find_map(|(i, &scale)| {
        let problem = scale_problem(scale)?;
        let (row, group) = (first_row + i / groups, i % groups);
        Some(format!("row {row} group {group}: scale {scale} {problem}"))
    })
}

/// As [`bad_scale`], for formats whose scales need not be exact in bf16.
pub(crate) fn negative_or_infinite(matrix: &PackedMatrix, first_row: usize) -> Option<String> {
    let bad = |scale: &f16| !scale.is_finite() || scale.is_sign_negative();
    let i = matrix.scales.iter().position(bad)?;
    let (groups, scale) = (matrix.groups(), matrix.scales[i]);
    let problem = scale_problem(scale)?;
    let (row, group) = (first_row + i / groups, i % groups);
    Some(format!("row {row} group {group}: scale {scale} {problem}"))
}

/// Why `scale` cannot be the scale of a group, if it cannot.
pub(crate) fn scale_problem(scale: f16) -> Option<&'static str> {
    // Most scales: no sign, finite, and the last three bits, which bf16 lacks, are zero. What
    // is left of a number below the normal ones has seven bits, too.
    let bits = scale.to_bits();
    if bits < f16::INFINITY.to_bits() && bits & 7 == 0 {
        None
    } else if !scale.is_finite() {
        Some("is not finite")
    } else if scale.is_sign_negative() {
        Some("is negative")
    } else if bf16::from_f32(scale.to_f32()).to_f32() != scale.to_f32() {
        Some("is not exact in bf16")
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scale_is_not_negative_finite_and_exact_in_bf16() {
        for scale in (0..=u16::MAX).map(f16::from_bits) {
            let value = scale.to_f32();
            let good = value.is_finite() && !value.is_sign_negative();
            let exact = bf16::from_f32(value).to_f32() == value;
            assert_eq!(scale_problem(scale).is_none(), good && exact, "{scale}");
        }
    }
}
