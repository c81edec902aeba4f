//! Opening any model on disk: one view of parameters, wherever they come from.
//!
//! Headers are parsed and every tensor's dtype and shape is checked against the config
//! when a model is opened; payloads are read one tensor at a time.

use crate::checkpoints::{
    CHECKPOINTS, checkpoint_name, newest_valid_checkpoint, parse_checkpoint_name, verify_checkpoint,
};
use crate::gguf_file::GgufFile;
use crate::huggingface::{Storage, check_tensors, read_checkpoint};
use crate::layout::{
    BEST, CONFIG, GROUP_SIZES, LATENTS, Located, PACKED, Shards, TOKENIZER, check_latents, is_run,
    locate, packed_header, read, read_config, read_generation, ternary_metadata,
};
use crate::weights::{BLOCK_WEIGHTS, Block, Weights, row_blocks};
use crate::{IoError, Manifest, TensorFile, verify_manifest};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use setun_formats::config::Qwen3Config;
use setun_formats::generation_config::GenerationConfig;
use setun_formats::gguf::{GgufValue, tokenizer_from_metadata};
use setun_formats::packed::TernaryInfo;
use setun_formats::tokenizer::Tokenizer;
use setun_ternary::{Numerics, PackedMatrix, ScaleRule};
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// Where the weights of an open model come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum ModelKind {
    /// A training checkpoint: latents, and the packed file if the model is ternary.
    Checkpoint,
    /// `packed.safetensors`, alone or in its export directory.
    Packed,
    /// `config.json` with `model.safetensors` or shards.
    HuggingFace,
    /// A Hugging Face directory whose matrices are packed for compressed-tensors.
    CompressedTensors,
    /// A Hugging Face directory whose matrices are packed for MLX.
    Mlx,
    /// A GGUF file.
    Gguf,
}

/// Which checkpoint of a run to open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which {
    /// The one that `best.json` names.
    Best,
    /// The newest that verifies.
    Newest,
    /// The one after this many steps.
    Step(u64),
}

/// A weight matrix `[out, in]`.
#[derive(Clone, Debug, PartialEq)]
pub enum Matrix {
    /// Row-major values.
    Dense(Vec<f32>),
    /// Trits and scales.
    Ternary(PackedMatrix),
}

/// A model on disk whose headers have been checked.
#[derive(Debug)]
pub struct OpenModel {
    kind: ModelKind,
    directory: PathBuf,
    config: Qwen3Config,
    ternary: Option<TernaryInfo>,
    /// Whether `ternary` comes from the file, and not from its values.
    recorded: bool,
    shapes: BTreeMap<String, Vec<usize>>,
    weights: Weights,
    latents: Option<TensorFile>,
    step: Option<u64>,
    notes: Vec<String>,
    /// The setting that makes the weights of a training neither dense nor ternary.
    experiment: Option<String>,
}

impl OpenModel {
    /// Opens a run directory (its best checkpoint if `best.json` is there and that one
    /// verifies, else the newest that does), a checkpoint, a packed file or directory, a
    /// Hugging Face, MLX or compressed-tensors directory or file, or a GGUF file.
    ///
    /// Packed trits whose file records no group size get the largest one that fits them;
    /// [`OpenModel::notes`] says so.
    ///
    /// # Errors
    /// Names the file, the tensor and what differs from the config; a checkpoint whose
    /// manifest does not verify.
    pub fn open(path: &Path) -> Result<Self, IoError> {
        if !is_run(path) {
            return Self::open_single(path);
        }
        let mut notes = Vec::new();
        if path.join(BEST).exists() {
            match best_checkpoint(path) {
                Ok((dir, step)) => return open_checkpoint(&dir, Some(step), notes),
                Err(reason) => notes.push(reason.to_string()),
            }
        }
        let (dir, step, skipped) = newest_valid_checkpoint(path)?;
        let others = skipped.into_iter().filter(|note| !notes.contains(note));
        let others: Vec<String> = others.collect();
        notes.extend(others);
        if !notes.is_empty() {
            notes.push(format!("the checkpoint of step {step} is used instead"));
        }
        open_checkpoint(&dir, Some(step), notes)
    }

    /// Opens the asked checkpoint of the run directory `path`; for what is not a run,
    /// the same as [`OpenModel::open`].
    ///
    /// # Errors
    /// As [`OpenModel::open`]; never falls back to another checkpoint than asked.
    pub fn open_with(path: &Path, which: Which) -> Result<Self, IoError> {
        if !is_run(path) {
            return Self::open_single(path);
        }
        let (dir, step, notes) = match which {
            Which::Newest => newest_valid_checkpoint(path)?,
            Which::Best => {
                let (dir, step) = best_checkpoint(path)?;
                (dir, step, Vec::new())
            }
            Which::Step(step) => (checkpoint_of(path, step)?, step, Vec::new()),
        };
        open_checkpoint(&dir, Some(step), notes)
    }

    fn open_single(path: &Path) -> Result<Self, IoError> {
        match locate(path)? {
            Located::Checkpoint(dir) => {
                verify_manifest(&dir)?;
                let name = dir.file_name().and_then(|name| name.to_str());
                let step = name.and_then(parse_checkpoint_name);
                open_checkpoint(&dir, step, Vec::new())
            }
            Located::Packed(file) => open_packed(&file),
            Located::HuggingFace(dir, files) => open_huggingface(&dir, &files),
            Located::Gguf(file) => open_gguf(&file),
        }
    }

    /// Where the weights come from.
    pub fn kind(&self) -> ModelKind {
        self.kind
    }

    /// The directory that holds the files of the model.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The architecture.
    pub fn config(&self) -> &Qwen3Config {
        &self.config
    }

    /// How the weights are ternary; `None` for a dense model.
    pub fn ternary(&self) -> Option<&TernaryInfo> {
        self.ternary.as_ref()
    }

    /// Whether the file itself says how its weights are ternary.
    pub(crate) fn records_group_size(&self) -> bool {
        self.recorded
    }

    /// The step of a checkpoint that lies under its usual name.
    pub fn step(&self) -> Option<u64> {
        self.step
    }

    /// What the user should know: checkpoints that were skipped and why, a group size
    /// that is not recorded, a vocabulary that is not the configuration's.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// The tokenizer beside the model, or in its GGUF metadata, if there is one.
    ///
    /// # Errors
    /// A `tokenizer.json` or metadata that cannot be read or used.
    pub fn tokenizer(&self) -> Result<Option<Tokenizer>, IoError> {
        let Some(json) = self.tokenizer_json()? else {
            return Ok(None);
        };
        let path = match &self.weights {
            Weights::Gguf(file) => file.path().to_owned(),
            _ => self.directory.join(TOKENIZER),
        };
        let tokenizer = Tokenizer::from_bytes(&json);
        tokenizer
            .map(Some)
            .map_err(|e| IoError::invalid(&path, e.to_string()))
    }

    /// The bytes of `tokenizer.json` beside the model, if there is one; for a GGUF file,
    /// what its metadata say in that form.
    ///
    /// # Errors
    /// A file or metadata that cannot be read.
    pub fn tokenizer_json(&self) -> Result<Option<Vec<u8>>, IoError> {
        if let Weights::Gguf(file) = &self.weights {
            let json = tokenizer_from_metadata(file.header())
                .map_err(|e| IoError::invalid(file.path(), e.to_string()))?;
            return Ok(json.map(String::into_bytes));
        }
        let path = self.directory.join(TOKENIZER);
        if !path.exists() {
            return Ok(None);
        }
        read(&path).map(Some)
    }

    /// The chat template (Jinja) of the model, if it has one: from GGUF metadata,
    /// `chat_template.jinja`, or `tokenizer_config.json` (of several, the default one).
    ///
    /// # Errors
    /// A file that cannot be read.
    pub fn chat_template(&self) -> Result<Option<String>, IoError> {
        if let Weights::Gguf(file) = &self.weights {
            let value = file.header().metadata.get("tokenizer.chat_template");
            return Ok(match value {
                Some(GgufValue::String(template)) => Some(template.clone()),
                _ => None,
            });
        }
        let path = self.directory.join("chat_template.jinja");
        if path.is_file() {
            let template = String::from_utf8(read(&path)?);
            return template
                .map(Some)
                .map_err(|e| IoError::invalid(&path, format!("not UTF-8: {e}")));
        }
        let path = self.directory.join("tokenizer_config.json");
        if !path.is_file() {
            return Ok(None);
        }
        let settings: Value = serde_json::from_slice(&read(&path)?)
            .map_err(|e| IoError::invalid(&path, format!("not JSON: {e}")))?;
        Ok(template_in(&settings))
    }

    /// How the model is meant to be sampled: `generation_config.json` beside it, if there
    /// is one.
    ///
    /// # Errors
    /// A file that cannot be read, or says what cannot be meant.
    pub fn generation_config(&self) -> Result<Option<GenerationConfig>, IoError> {
        match &self.weights {
            Weights::Gguf(_) => Ok(None),
            _ => read_generation(&self.directory),
        }
    }

    /// The matrix called `name` (Hugging Face name). A ternary model gives trits and
    /// scales, recovered exactly where the file holds values.
    ///
    /// # Errors
    /// A name that the config does not imply, code 3, a scale that is negative or not
    /// finite, and a value that is not ternary, each with its place.
    pub fn matrix(&self, name: &str) -> Result<Matrix, IoError> {
        let (rows, _) = self.matrix_shape(name)?;
        self.matrix_rows(name, 0..rows)
    }

    /// Some rows of the matrix called `name`, as [`OpenModel::matrix`] gives all of them.
    /// Nothing else of the matrix is read.
    ///
    /// # Errors
    /// As [`OpenModel::matrix`], and rows that the matrix does not have.
    pub fn matrix_rows(&self, name: &str, rows: Range<usize>) -> Result<Matrix, IoError> {
        self.rows_with(name, rows, self.ternary.map(|ternary| ternary.group_size))
    }

    /// As [`OpenModel::matrix_rows`], read with groups of `group_size`.
    pub(crate) fn rows_with(
        &self,
        name: &str,
        rows: Range<usize>,
        group_size: Option<usize>,
    ) -> Result<Matrix, IoError> {
        let (_, cols) = self.matrix_shape(name)?;
        if let Some(experiment) = &self.experiment {
            return Err(IoError::Refused(format!(
                "{} was trained with {experiment}: its weights are neither dense nor what files \
                 call ternary, and only its own training can use them; train without that setting",
                self.directory.display()
            )));
        }
        self.weights.rows(&Block { name, rows, cols }, group_size)
    }

    /// The file that holds the parameter `name`.
    pub(crate) fn path_of(&self, name: &str) -> &Path {
        self.weights.path_of(name)
    }

    /// The norm weights called `name`, in f32.
    ///
    /// # Errors
    /// A name that the config does not imply, a weight that is not finite, or the disk
    /// fails.
    pub fn norm(&self, name: &str) -> Result<Vec<f32>, IoError> {
        let norm = match self.shapes.get(name) {
            Some(shape) if shape.len() == 1 => self.weights.norm(name)?,
            _ => return Err(self.unknown(name)),
        };
        if let Some(i) = norm.iter().position(|w| !w.is_finite()) {
            let problem = format!("{name} element {i} is {}, which no norm has", norm[i]);
            return Err(IoError::invalid(self.path_of(name), problem));
        }
        Ok(norm)
    }

    /// The latent weights or norm weights of a checkpoint; `None` for other models.
    ///
    /// # Errors
    /// A name that the config does not imply, or the disk fails.
    pub fn latents(&self, name: &str) -> Result<Option<Vec<f32>>, IoError> {
        self.latents
            .as_ref()
            .map(|file| file.floats(name))
            .transpose()
    }

    /// Looks for the largest group size in {256, 128, 64, 32} with which every matrix of
    /// a model without metadata is exactly ternary. If there is one, the model is ternary
    /// from then on, and the group size is returned.
    ///
    /// # Errors
    /// The disk fails.
    pub fn detect_ternary(&mut self) -> Result<Option<usize>, IoError> {
        if let Some(ternary) = &self.ternary {
            return Ok(Some(ternary.group_size));
        }
        let group_size = self.find_group_size()?;
        self.ternary = group_size.map(unrecorded);
        Ok(group_size)
    }

    /// The largest usual group size with which every matrix is exactly ternary.
    pub(crate) fn find_group_size(&self) -> Result<Option<usize>, IoError> {
        let mut sizes = GROUP_SIZES.to_vec();
        for (name, shape) in &self.shapes {
            let &[num_rows, cols] = shape.as_slice() else {
                continue;
            };
            for rows in row_blocks(num_rows, cols, BLOCK_WEIGHTS / 4) {
                self.weights
                    .retain_sizes(&Block { name, rows, cols }, &mut sizes)?;
                if sizes.is_empty() {
                    return Ok(None);
                }
            }
        }
        Ok(sizes.first().copied())
    }

    /// Takes what the file records, or else the largest group size that fits, or else
    /// the one in which the file stores its scales.
    fn settle_group_size(
        mut self,
        recorded: Option<TernaryInfo>,
        stored: usize,
    ) -> Result<Self, IoError> {
        self.ternary = recorded;
        if recorded.is_none() {
            let group_size = self.find_group_size()?.unwrap_or(stored);
            let ternary = unrecorded(group_size);
            self.ternary = Some(ternary);
            self.notes.push(format!(
                "the file records no group size: {group_size} is the largest that fits its \
                 scales; scale rule {} and numerics {} are assumed",
                ternary.scale_rule.name(),
                ternary.numerics.name()
            ));
        }
        Ok(self)
    }

    fn matrix_shape(&self, name: &str) -> Result<(usize, usize), IoError> {
        match self.shapes.get(name).map(Vec::as_slice) {
            Some(&[rows, cols]) => Ok((rows, cols)),
            _ => Err(self.unknown(name)),
        }
    }

    fn unknown(&self, name: &str) -> IoError {
        let problem = format!("the model has no such parameter: {name}");
        IoError::invalid(&self.directory, problem)
    }
}

#[derive(Deserialize)]
struct Best {
    step: u64,
}

fn best_checkpoint(run: &Path) -> Result<(PathBuf, u64), IoError> {
    let path = run.join(BEST);
    let best: Best = serde_json::from_slice(&read(&path)?)
        .map_err(|e| IoError::invalid(&path, format!("expected {{\"step\": N}}: {e}")))?;
    Ok((checkpoint_of(run, best.step)?, best.step))
}

fn checkpoint_of(run: &Path, step: u64) -> Result<PathBuf, IoError> {
    let dir = run.join(CHECKPOINTS).join(checkpoint_name(step));
    if !dir.is_dir() {
        let problem = format!("there is no checkpoint after step {step} in this run");
        return Err(IoError::NotAModel { path: dir, problem });
    }
    verify_checkpoint(step, &dir)?;
    Ok(dir)
}

/// Opens a checkpoint whose manifest has been verified.
fn open_checkpoint(
    dir: &Path,
    step: Option<u64>,
    notes: Vec<String>,
) -> Result<OpenModel, IoError> {
    let config = read_config(&dir.join(CONFIG))?;
    let latents = TensorFile::open(&dir.join(LATENTS))?;
    check_latents(&latents, &config)?;
    let mut model = OpenModel {
        kind: ModelKind::Checkpoint,
        directory: dir.to_owned(),
        ternary: None,
        recorded: false,
        shapes: shapes(&config),
        config,
        weights: Weights::Values(Shards::single(latents)),
        latents: None,
        step,
        notes,
        experiment: None,
    };
    let packed = dir.join(PACKED);
    if packed.exists() {
        let file = TensorFile::open(&packed)?;
        let header = packed_header(&file)?;
        if header.config != model.config {
            let problem = "its config differs from config.json beside it";
            return Err(IoError::invalid(&packed, problem));
        }
        model.ternary = Some(header.ternary);
        model.recorded = true;
        model.latents = Some(TensorFile::open(&dir.join(LATENTS))?);
        let group_size = header.ternary.group_size;
        model.weights = Weights::Packed { file, group_size };
    } else {
        let extra = Manifest::read(dir)?.extra;
        if extra.get("ternary_hash").is_some_and(|h| !h.is_null()) {
            let problem = "the file is missing, but the manifest calls the model ternary";
            return Err(IoError::damaged(&packed, problem));
        }
        let experiment = extra.get("experiment").and_then(Value::as_str);
        model.experiment = experiment.map(str::to_owned);
    }
    Ok(model)
}

fn open_packed(path: &Path) -> Result<OpenModel, IoError> {
    let file = TensorFile::open(path)?;
    let header = packed_header(&file)?;
    Ok(OpenModel {
        kind: ModelKind::Packed,
        directory: path.parent().unwrap_or(Path::new("")).to_owned(),
        shapes: shapes(&header.config),
        config: header.config,
        weights: Weights::Packed {
            file,
            group_size: header.ternary.group_size,
        },
        ternary: Some(header.ternary),
        recorded: true,
        latents: None,
        step: None,
        notes: Vec::new(),
        experiment: None,
    })
}

fn open_huggingface(dir: &Path, files: &[PathBuf]) -> Result<OpenModel, IoError> {
    let checkpoint = read_checkpoint(dir, files)?;
    let (shards, storage) = (checkpoint.shards, checkpoint.storage);
    check_tensors(&shards, &checkpoint.config, storage, dir)?;
    let recorded = ternary_metadata(&shards)?;
    let mut model = OpenModel {
        kind: ModelKind::HuggingFace,
        directory: dir.to_owned(),
        ternary: recorded,
        recorded: recorded.is_some(),
        shapes: shapes(&checkpoint.config),
        config: checkpoint.config,
        weights: Weights::Values(Shards::default()),
        latents: None,
        step: None,
        notes: checkpoint.notes,
        experiment: None,
    };
    match storage {
        Storage::Values => {
            model.weights = Weights::Values(shards);
            Ok(model)
        }
        Storage::Mlx { group_size } => {
            model.kind = ModelKind::Mlx;
            model.weights = Weights::Mlx { shards, group_size };
            model.settle_group_size(recorded, group_size)
        }
        Storage::Compressed { group_size } => {
            model.kind = ModelKind::CompressedTensors;
            model.weights = Weights::Compressed { shards, group_size };
            model.settle_group_size(recorded, group_size)
        }
    }
}

fn open_gguf(path: &Path) -> Result<OpenModel, IoError> {
    let (file, config) = GgufFile::open(path)?;
    let recorded = file.ternary_info()?;
    let smallest = file.smallest_block();
    let model = OpenModel {
        kind: ModelKind::Gguf,
        directory: path.parent().unwrap_or(Path::new("")).to_owned(),
        ternary: recorded,
        recorded: recorded.is_some(),
        shapes: shapes(&config),
        config,
        weights: Weights::Gguf(file),
        latents: None,
        step: None,
        notes: Vec::new(),
        experiment: None,
    };
    match smallest {
        Some(stored) => model.settle_group_size(recorded, stored),
        None => Ok(model),
    }
}

/// What is assumed where a file records nothing but its weights.
fn unrecorded(group_size: usize) -> TernaryInfo {
    TernaryInfo {
        group_size,
        scale_rule: ScaleRule::default(),
        numerics: Numerics::default(),
    }
}

/// The template in `tokenizer_config.json`: one, or the one called `default` of several.
fn template_in(settings: &Value) -> Option<String> {
    let text = |value: &Value| value.as_str().map(str::to_owned);
    match settings.get("chat_template")? {
        Value::Array(named) => {
            let default = named
                .iter()
                .find(|entry| entry.get("name").is_some_and(|name| name == "default"));
            text(default?.get("template")?)
        }
        one => text(one),
    }
}

fn shapes(config: &Qwen3Config) -> BTreeMap<String, Vec<usize>> {
    let parameters = config.parameters().into_iter();
    parameters.map(|p| (p.name, p.shape)).collect()
}

#[cfg(test)]
mod tests;
