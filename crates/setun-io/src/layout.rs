//! What lies where on disk, and the checks of headers against the config that opening
//! and verifying share.

use crate::checkpoints::CHECKPOINTS;
use crate::manifest::is_plain_name;
use crate::{IoError, TensorFile};
use half::{bf16, f16};
use serde::Deserialize;
use setun_formats::config::Qwen3Config;
use setun_formats::packed::{
    FORMAT, MAX_GROUP_SIZE, PackedHeader, TernaryInfo, VERSION, packed_tensor_infos,
};
use setun_formats::tensors::Dtype;
use setun_ternary::{Numerics, PackedMatrix, ScaleRule};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

pub(crate) const BEST: &str = "best.json";
pub(crate) const CONFIG: &str = "config.json";
pub(crate) const TOKENIZER: &str = "tokenizer.json";
pub(crate) const LATENTS: &str = "latents.safetensors";
pub(crate) const PACKED: &str = "packed.safetensors";
pub(crate) const HF_SINGLE: &str = "model.safetensors";
const HF_INDEX: &str = "model.safetensors.index.json";

/// Group sizes that are tried where a file records none, largest first.
pub(crate) const GROUP_SIZES: [usize; 4] = [256, 128, 64, 32];

const FLOATS: [Dtype; 3] = [Dtype::F32, Dtype::F16, Dtype::BF16];

/// What a path that is not a run directory holds.
#[derive(Debug)]
pub(crate) enum Located {
    /// A checkpoint directory.
    Checkpoint(PathBuf),
    /// A packed file.
    Packed(PathBuf),
    /// A Hugging Face directory and its safetensors files.
    HuggingFace(PathBuf, Vec<PathBuf>),
}

pub(crate) fn is_run(path: &Path) -> bool {
    path.join(CHECKPOINTS).is_dir()
}

/// Recognises a checkpoint, a packed file or directory, or a Hugging Face directory or
/// file, by the names that are there; contents are checked later.
pub(crate) fn locate(path: &Path) -> Result<Located, IoError> {
    let not_a_model = |problem: &str| IoError::NotAModel {
        path: path.to_owned(),
        problem: problem.to_owned(),
    };
    if path.is_file() {
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
    Err(not_a_model(
        "expected a run (checkpoints/), a checkpoint (latents.safetensors), a packed model \
         (packed.safetensors) or a Hugging Face model (config.json with model.safetensors \
         or model.safetensors.index.json)",
    ))
}

#[derive(Deserialize)]
struct ShardIndex {
    weight_map: BTreeMap<String, String>,
}

fn sharded_files(dir: &Path) -> Result<Vec<PathBuf>, IoError> {
    let path = dir.join(HF_INDEX);
    let index: ShardIndex = serde_json::from_slice(&read(&path)?)
        .map_err(|e| IoError::invalid(&path, format!("not a shard index: {e}")))?;
    let names: BTreeSet<&String> = index.weight_map.values().collect();
    if let Some(name) = names.iter().find(|name| !is_plain_name(name)) {
        let problem = format!("{name:?} is not a plain file name");
        return Err(IoError::invalid(&path, problem));
    }
    Ok(names.iter().map(|name| dir.join(name)).collect())
}

/// Files of values that together hold each tensor once.
#[derive(Debug)]
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

pub(crate) fn read_config(path: &Path) -> Result<Qwen3Config, IoError> {
    Qwen3Config::parse(&read(path)?).map_err(|e| IoError::invalid(path, e.to_string()))
}

/// Checks that `file` holds the latents of all parameters, f32, and nothing else.
pub(crate) fn check_latents(file: &TensorFile, config: &Qwen3Config) -> Result<(), IoError> {
    let parameters = config.parameters();
    for parameter in &parameters {
        file.expect(&parameter.name, &[Dtype::F32], &parameter.shape)?;
    }
    let known: BTreeSet<&str> = parameters.iter().map(|p| p.name.as_str()).collect();
    match file.tensors().find(|t| !known.contains(t.0)) {
        None => Ok(()),
        Some((name, _, _)) => Err(unexpected(file.path(), name)),
    }
}

/// Checks that Hugging Face files hold all parameters as floats, and nothing that would
/// be silently dropped. `dir` is named when there is no file at all.
pub(crate) fn check_values(
    shards: &Shards,
    config: &Qwen3Config,
    dir: &Path,
) -> Result<(), IoError> {
    let parameters = config.parameters();
    for parameter in &parameters {
        let Some(file) = shards.file_of(&parameter.name) else {
            return Err(missing(dir, &parameter.name));
        };
        file.expect(&parameter.name, &FLOATS, &parameter.shape)?;
    }
    let known: BTreeSet<&str> = parameters.iter().map(|p| p.name.as_str()).collect();
    for (name, file) in shards.tensors() {
        // Older writers store the tied head again and a table that RoPE recomputes.
        let redundant = config.tie_word_embeddings && name == "lm_head.weight"
            || name.ends_with(".rotary_emb.inv_freq");
        if !known.contains(name) && !redundant {
            return Err(unexpected(file.path(), name));
        }
    }
    Ok(())
}

fn unexpected(path: &Path, name: &str) -> IoError {
    IoError::invalid(
        path,
        format!("tensor {name} is not part of a Qwen3 model of this config"),
    )
}

/// How Hugging Face files say that they are ternary; `None` if they do not.
pub(crate) fn ternary_metadata(shards: &Shards) -> Result<Option<TernaryInfo>, IoError> {
    let marked = |file: &&TensorFile| file.metadata().contains_key("setun.group_size");
    let Some(file) = shards.files.iter().find(marked) else {
        return Ok(None);
    };
    ternary_info(file, "setun.").map(Some)
}

/// Checks the header of a packed file: every tensor that its config implies with its
/// dtype and shape, and nothing else.
pub(crate) fn packed_header(file: &TensorFile) -> Result<PackedHeader, IoError> {
    let invalid = |problem: String| IoError::invalid(file.path(), problem);
    let metadata = file.metadata();
    let field = |key: &str| metadata.get(key).map_or("", String::as_str);
    if field("format") != FORMAT {
        return Err(invalid(
            "not a packed model: its metadata has no format \"setun-packed\"".into(),
        ));
    }
    if field("version") != VERSION {
        let problem = format!(
            "packed version {:?} is unknown: read it with the version of Setun that wrote it",
            field("version")
        );
        return Err(invalid(problem));
    }
    let config = Qwen3Config::parse(field("config").as_bytes())
        .map_err(|e| invalid(format!("metadata \"config\": {e}")))?;
    let ternary = ternary_info(file, "")?;
    let expected = packed_tensor_infos(&config, ternary.group_size);
    for info in &expected {
        file.expect(&info.name, &[info.dtype], &info.shape)?;
    }
    let known: BTreeSet<&str> = expected.iter().map(|info| info.name.as_str()).collect();
    if let Some((name, _, _)) = file.tensors().find(|t| !known.contains(t.0)) {
        return Err(unexpected(file.path(), name));
    }
    Ok(PackedHeader { config, ternary })
}

fn ternary_info(file: &TensorFile, prefix: &str) -> Result<TernaryInfo, IoError> {
    let field = |key: &str| {
        let key = format!("{prefix}{key}");
        let value = file.metadata().get(&key).map(String::as_str);
        (key, value.unwrap_or_default())
    };
    let bad = |key: String, value: &str, expected: &str| {
        let problem = format!("metadata {key:?} is {value:?}, expected {expected}");
        IoError::invalid(file.path(), problem)
    };
    let (key, value) = field("group_size");
    let group_size = value
        .parse()
        .ok()
        .filter(|size| (1..=MAX_GROUP_SIZE).contains(size));
    let group_size =
        group_size.ok_or_else(|| bad(key, value, "a number of weights from 1 to 65536"))?;
    let (key, value) = field("scale_rule");
    let scale_rule =
        ScaleRule::from_name(value).ok_or_else(|| bad(key, value, "mean, max or mean-nonzero"))?;
    let (key, value) = field("numerics");
    let numerics =
        Numerics::from_name(value).ok_or_else(|| bad(key, value, "int8, bf16 or f32"))?;
    Ok(TernaryInfo {
        group_size,
        scale_rule,
        numerics,
    })
}

/// The first group of `matrix` whose scale cannot be one, with the reason.
pub(crate) fn bad_scale(matrix: &PackedMatrix) -> Option<String> {
    let groups = matrix.groups();
    let scales = matrix.scales.iter().enumerate();
    scales.into_iter().find_map(|(i, &scale)| {
        let problem = scale_problem(scale)?;
        let (row, group) = (i / groups, i % groups);
        Some(format!("row {row} group {group}: scale {scale} {problem}"))
    })
}

/// Why `scale` cannot be the scale of a group, if it cannot.
pub(crate) fn scale_problem(scale: f16) -> Option<&'static str> {
    if !scale.is_finite() {
        Some("is not finite")
    } else if scale.is_sign_negative() {
        Some("is negative")
    } else if bf16::from_f32(scale.to_f32()).to_f32() != scale.to_f32() {
        Some("is not exact in bf16")
    } else {
        None
    }
}
