//! Opening any model on disk: one view of parameters, wherever they come from.
//!
//! Headers are parsed and every tensor's dtype and shape is checked against the config
//! when a model is opened; payloads are read one tensor at a time.

use crate::checkpoints::{
    CHECKPOINTS, checkpoint_name, newest_valid_checkpoint, parse_checkpoint_name, verify_checkpoint,
};
use crate::layout::{
    BEST, CONFIG, GROUP_SIZES, LATENTS, Located, PACKED, Shards, TOKENIZER, bad_scale,
    check_latents, check_values, is_run, locate, packed_header, read, read_config,
    ternary_metadata,
};
use crate::{IoError, Manifest, TensorFile, verify_manifest};
use half::f16;
use serde::{Deserialize, Serialize};
use setun_formats::config::Qwen3Config;
use setun_formats::packed::TernaryInfo;
use setun_formats::tokenizer::Tokenizer;
use setun_ternary::{Numerics, PackedMatrix, ScaleRule};
use std::collections::BTreeMap;
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
    shapes: BTreeMap<String, Vec<usize>>,
    weights: Weights,
    latents: Option<TensorFile>,
    step: Option<u64>,
    notes: Vec<String>,
}

impl OpenModel {
    /// Opens a run directory (its best checkpoint if `best.json` is there and that one
    /// verifies, else the newest that does), a checkpoint, a packed file or directory,
    /// or a Hugging Face directory or file.
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
        notes.extend(skipped);
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

    /// The step of a checkpoint that lies under its usual name.
    pub fn step(&self) -> Option<u64> {
        self.step
    }

    /// What the user should know: checkpoints that were skipped and why.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// The tokenizer beside the model, if there is one.
    ///
    /// # Errors
    /// A `tokenizer.json` that cannot be read or used.
    pub fn tokenizer(&self) -> Result<Option<Tokenizer>, IoError> {
        let Some(json) = self.tokenizer_json()? else {
            return Ok(None);
        };
        let path = self.directory.join(TOKENIZER);
        let tokenizer = Tokenizer::from_bytes(&json);
        tokenizer
            .map(Some)
            .map_err(|e| IoError::invalid(&path, e.to_string()))
    }

    /// The bytes of `tokenizer.json` beside the model, if there is one.
    ///
    /// # Errors
    /// A file that cannot be read.
    pub fn tokenizer_json(&self) -> Result<Option<Vec<u8>>, IoError> {
        let path = self.directory.join(TOKENIZER);
        if !path.exists() {
            return Ok(None);
        }
        read(&path).map(Some)
    }

    /// The matrix called `name` (Hugging Face name). A ternary model gives trits and
    /// scales, recovered exactly where the file holds values.
    ///
    /// # Errors
    /// A name that the config does not imply, code 3, a scale that is negative or not
    /// finite, and a value that is not ternary, each with its place.
    pub fn matrix(&self, name: &str) -> Result<Matrix, IoError> {
        let (rows, cols) = self.matrix_shape(name)?;
        match (&self.weights, &self.ternary) {
            (Weights::Packed { file, group_size }, _) => {
                packed_matrix(file, name, rows, cols, *group_size).map(Matrix::Ternary)
            }
            (Weights::Values(shards), Some(ternary)) => {
                let values = shards.floats(name)?;
                let matrix = PackedMatrix::from_effective(&values, cols, ternary.group_size);
                matrix.map(Matrix::Ternary).map_err(|(row, column)| {
                    let value = values[row * cols + column];
                    let problem = format!(
                        "{name} row {row} column {column}: {value} is not ternary in its group \
                         of {}",
                        ternary.group_size
                    );
                    IoError::invalid(shards.path_of(name), problem)
                })
            }
            (Weights::Values(shards), None) => shards.floats(name).map(Matrix::Dense),
        }
    }

    /// The norm weights called `name`, in f32.
    ///
    /// # Errors
    /// A name that the config does not imply, or the disk fails.
    pub fn norm(&self, name: &str) -> Result<Vec<f32>, IoError> {
        match self.shapes.get(name) {
            Some(shape) if shape.len() == 1 => self.weights.floats(name),
            _ => Err(self.unknown(name)),
        }
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
        let mut candidates = GROUP_SIZES.to_vec();
        for (name, shape) in self.shapes.iter().filter(|(_, shape)| shape.len() == 2) {
            let values = self.weights.floats(name)?;
            candidates
                .retain(|&size| PackedMatrix::from_effective(&values, shape[1], size).is_ok());
            if candidates.is_empty() {
                return Ok(None);
            }
        }
        self.ternary = candidates.first().map(|&group_size| TernaryInfo {
            group_size,
            scale_rule: ScaleRule::default(),
            numerics: Numerics::default(),
        });
        Ok(candidates.first().copied())
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

#[derive(Debug)]
enum Weights {
    /// Trits and scales; norms in f32.
    Packed { file: TensorFile, group_size: usize },
    /// One value for each weight.
    Values(Shards),
}

impl Weights {
    fn floats(&self, name: &str) -> Result<Vec<f32>, IoError> {
        match self {
            Self::Packed { file, .. } => file.floats(name),
            Self::Values(shards) => shards.floats(name),
        }
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
        shapes: shapes(&config),
        config,
        weights: Weights::Values(Shards::single(latents)),
        latents: None,
        step,
        notes,
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
        model.latents = Some(TensorFile::open(&dir.join(LATENTS))?);
        let group_size = header.ternary.group_size;
        model.weights = Weights::Packed { file, group_size };
    } else if Manifest::read(dir)?
        .extra
        .get("ternary_hash")
        .is_some_and(|h| !h.is_null())
    {
        let problem = "the file is missing, but the manifest calls the model ternary";
        return Err(IoError::damaged(&packed, problem));
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
        latents: None,
        step: None,
        notes: Vec::new(),
    })
}

fn open_huggingface(dir: &Path, files: &[PathBuf]) -> Result<OpenModel, IoError> {
    let config = read_config(&dir.join(CONFIG))?;
    let shards = Shards::open(files)?;
    check_values(&shards, &config, dir)?;
    Ok(OpenModel {
        kind: ModelKind::HuggingFace,
        directory: dir.to_owned(),
        ternary: ternary_metadata(&shards)?,
        shapes: shapes(&config),
        config,
        weights: Weights::Values(shards),
        latents: None,
        step: None,
        notes: Vec::new(),
    })
}

fn shapes(config: &Qwen3Config) -> BTreeMap<String, Vec<usize>> {
    let parameters = config.parameters().into_iter();
    parameters.map(|p| (p.name, p.shape)).collect()
}

/// Reads and checks one matrix of a packed file whose header was checked.
fn packed_matrix(
    file: &TensorFile,
    name: &str,
    rows: usize,
    cols: usize,
    group_size: usize,
) -> Result<PackedMatrix, IoError> {
    let scale_bytes = file.bytes(&format!("{name}.scales"))?;
    let matrix = PackedMatrix {
        rows,
        cols,
        group_size,
        trits: file.bytes(&format!("{name}.trits"))?,
        scales: scale_bytes
            .as_chunks::<2>()
            .0
            .iter()
            .map(|&bytes| f16::from_le_bytes(bytes))
            .collect(),
    };
    if let Some(problem) = bad_scale(&matrix) {
        return Err(IoError::invalid(file.path(), format!("{name} {problem}")));
    }
    let mut trits = vec![0; cols];
    for row in 0..rows {
        matrix
            .unpack_row(row, &mut trits)
            .map_err(|e| IoError::invalid(file.path(), format!("{name} row {row}: {e}")))?;
    }
    Ok(matrix)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{DOWN, Dense, EMBED, HEAD, Q_NORM, Scratch, Tiny, edit_tensor};
    use crate::{ExportDtype, TensorSource, export_huggingface, export_packed};
    use std::fs;

    fn check_all(model: &OpenModel, source: &dyn TensorSource) {
        for parameter in model.config().parameters() {
            let name = &parameter.name;
            if parameter.is_matrix() {
                let expected = source.matrix(name).unwrap();
                assert!(model.matrix(name).unwrap() == expected, "{name}");
                assert!(model.norm(name).is_err());
            } else {
                assert_eq!(model.norm(name).unwrap(), source.norm(name).unwrap());
                assert!(model.matrix(name).is_err());
            }
        }
        assert!(model.matrix("model.layers.9.mlp.up_proj.weight").is_err());
    }

    #[test]
    fn every_format_gives_the_same_model_back() {
        for (tied, group_size) in [(true, 16), (false, 32), (false, 128)] {
            let scratch = Scratch::new("open-formats");
            let tiny = Tiny::new(tied, group_size);
            let checkpoint = tiny.save(scratch.path(), 7, false);
            let tokenizer = Tiny::tokenizer().to_json();
            let json = Some(tokenizer.as_bytes());
            let (config, ternary) = (tiny.config(), tiny.ternary());
            let packed =
                export_packed(scratch.path(), "packed", config, ternary, json, &tiny).unwrap();
            let mut kinds = vec![
                (scratch.path().to_owned(), ModelKind::Checkpoint),
                (checkpoint.clone(), ModelKind::Checkpoint),
                (packed.clone(), ModelKind::Packed),
                (packed.join("packed.safetensors"), ModelKind::Packed),
            ];
            for dtype in [ExportDtype::Bf16, ExportDtype::F16, ExportDtype::F32] {
                let (parent, name) = (scratch.path(), dtype.name());
                let export = export_huggingface;
                let dir = export(parent, name, config, Some(ternary), dtype, json, &tiny).unwrap();
                kinds.push((dir.join("model.safetensors"), ModelKind::HuggingFace));
                kinds.push((dir, ModelKind::HuggingFace));
            }
            for (path, kind) in kinds {
                let model = OpenModel::open(&path).unwrap();
                assert_eq!(model.kind(), kind);
                assert_eq!(model.config(), config);
                assert_eq!(model.ternary(), Some(ternary));
                assert_eq!(model.tokenizer().unwrap().unwrap().to_json(), tokenizer);
                check_all(&model, &tiny);
                let latents = model.latents(EMBED).unwrap();
                let is_checkpoint = kind == ModelKind::Checkpoint;
                assert_eq!(latents.is_some(), is_checkpoint);
                assert!(latents.is_none_or(|latents| latents == tiny.latents[EMBED]));
                assert_eq!(model.step(), is_checkpoint.then_some(7));
            }
        }
    }

    #[test]
    fn dense_models_stay_dense() {
        let scratch = Scratch::new("open-dense");
        let tiny = Tiny::new(false, 16);
        tiny.save(scratch.path(), 3, true);
        let model = OpenModel::open(scratch.path()).unwrap();
        assert_eq!(model.ternary(), None);
        check_all(&model, &Dense(&tiny));
        let config = tiny.config();
        let dtype = ExportDtype::F32;
        let hf = export_huggingface(scratch.path(), "hf", config, None, dtype, None, &model);
        let mut model = OpenModel::open(&hf.unwrap()).unwrap();
        assert!(model.tokenizer().unwrap().is_none());
        check_all(&model, &Dense(&tiny));
        assert_eq!(model.detect_ternary().unwrap(), None);
        assert_eq!(model.ternary(), None);
    }

    #[test]
    fn ternary_values_without_metadata_are_detected_on_demand() {
        for group_size in [32, 64] {
            let scratch = Scratch::new("open-detect");
            let tiny = Tiny::new(false, group_size);
            let config = tiny.config();
            // The values of the ternary model, exported as if they were dense.
            let (parent, ternary) = (scratch.path(), Some(tiny.ternary()));
            let dtype = ExportDtype::F16;
            let marked =
                export_huggingface(parent, "marked", config, ternary, dtype, None, &tiny).unwrap();
            let values = Shards::open(&[marked.join("model.safetensors")]).unwrap();
            let mut unmarked = tiny.clone();
            for name in tiny.packed.keys() {
                unmarked
                    .latents
                    .insert(name.clone(), values.floats(name).unwrap());
            }
            let source = Dense(&unmarked);
            let plain = export_huggingface(parent, "plain", config, None, dtype, None, &source);
            let mut model = OpenModel::open(&plain.unwrap()).unwrap();
            assert!(matches!(model.matrix(EMBED).unwrap(), Matrix::Dense(_)));
            assert_eq!(model.detect_ternary().unwrap(), Some(group_size));
            check_all(&model, &tiny);
        }
    }

    #[test]
    fn a_run_opens_its_best_its_newest_or_any_checkpoint() {
        let scratch = Scratch::new("open-which");
        let run = scratch.path();
        let tiny = Tiny::new(true, 16);
        for step in [10, 20, 30] {
            tiny.save(run, step, false);
        }
        let step = |which| OpenModel::open_with(run, which).map(|model| model.step());
        assert_eq!(OpenModel::open(run).unwrap().step(), Some(30));
        assert!(step(Which::Best).is_err());
        fs::write(run.join("best.json"), r#"{"step": 20, "loss": 1.5}"#).unwrap();
        assert_eq!(OpenModel::open(run).unwrap().step(), Some(20));
        assert_eq!(step(Which::Best).unwrap(), Some(20));
        assert_eq!(step(Which::Newest).unwrap(), Some(30));
        assert_eq!(step(Which::Step(10)).unwrap(), Some(10));
        assert!(step(Which::Step(11)).is_err());

        fs::write(run.join("checkpoints/step-00000020/config.json"), b"{}").unwrap();
        assert!(step(Which::Best).is_err());
        let model = OpenModel::open(run).unwrap();
        assert_eq!(model.step(), Some(30));
        assert!(model.notes()[0].contains("config.json"));
    }

    #[test]
    fn shards_are_read_as_one_model() {
        let scratch = Scratch::new("open-shards");
        let tiny = Tiny::new(false, 16);
        let (parent, config, dtype) = (scratch.path(), tiny.config(), ExportDtype::F32);
        let source = Dense(&tiny);
        let whole =
            export_huggingface(parent, "whole", config, None, dtype, None, &source).unwrap();
        let values = TensorFile::open(&whole.join("model.safetensors")).unwrap();
        let dir = scratch.join("sharded");
        fs::create_dir(&dir).unwrap();
        fs::copy(whole.join("config.json"), dir.join("config.json")).unwrap();
        let names: Vec<_> = values.tensors().map(|t| t.0.to_owned()).collect();
        let mut weight_map = BTreeMap::new();
        for (i, names) in names.chunks(10).enumerate() {
            let shard = format!("model-{i}.safetensors");
            write_shard(&dir.join(&shard), names, &values);
            weight_map.extend(names.iter().map(|name| (name.clone(), shard.clone())));
        }
        let index = dir.join("model.safetensors.index.json");
        let json = serde_json::json!({ "weight_map": weight_map });
        fs::write(&index, json.to_string()).unwrap();
        check_all(&OpenModel::open(&dir).unwrap(), &source);

        fs::remove_file(dir.join("model-1.safetensors")).unwrap();
        let error = OpenModel::open(&dir).unwrap_err().to_string();
        assert!(error.contains("model-1.safetensors"), "{error}");
        let escape = json.to_string().replace("model-1.", "../whole/model.");
        fs::write(&index, escape).unwrap();
        let error = OpenModel::open(&dir).unwrap_err().to_string();
        assert!(error.contains("plain file name"), "{error}");
    }

    fn write_shard(path: &Path, names: &[String], values: &TensorFile) {
        let info = |name: &String| setun_formats::TensorInfo {
            name: name.clone(),
            dtype: setun_formats::Dtype::F32,
            shape: values.shape(name).unwrap().to_vec(),
        };
        let infos: Vec<_> = names.iter().map(info).collect();
        let mut bytes = Vec::new();
        setun_formats::tensors::write_header(&mut bytes, &infos, &BTreeMap::new()).unwrap();
        for name in names {
            bytes.extend(values.bytes(name).unwrap());
        }
        fs::write(path, bytes).unwrap();
    }

    #[test]
    fn bad_weights_are_named_when_they_are_read() {
        let scratch = Scratch::new("open-bad");
        let tiny = Tiny::new(false, 16);
        let (parent, config, ternary) = (scratch.path(), tiny.config(), tiny.ternary());
        let packed = export_packed(parent, "packed", config, ternary, None, &tiny).unwrap();
        let packed = packed.join("packed.safetensors");
        let read = |path: &Path, name: &str| {
            let model = OpenModel::open(path).unwrap();
            model.matrix(name).unwrap_err().to_string()
        };
        // Down projection: 100 columns in 7 groups of 4 bytes.
        edit_tensor(&packed, &format!("{DOWN}.trits"), |bytes| {
            bytes[2 * 28 + 5] |= 0b1100
        });
        let error = read(&packed, DOWN);
        assert!(
            error.contains("row 2") && error.contains("column 21"),
            "{error}"
        );
        edit_tensor(&packed, &format!("{HEAD}.scales"), |bytes| {
            bytes[2 * (5 * 3 + 1) + 1] |= 0x80
        });
        let error = read(&packed, HEAD);
        assert!(
            error.contains("row 3 group 1") && error.contains("negative"),
            "{error}"
        );

        let dtype = ExportDtype::Bf16;
        let hf = export_huggingface(parent, "hf", config, Some(ternary), dtype, None, &tiny);
        let hf = hf.unwrap();
        edit_tensor(&hf.join("model.safetensors"), EMBED, |bytes| {
            bytes[2 * (4 * 72 + 9)..][..2].copy_from_slice(&[0x11, 0x3c])
        });
        let error = read(&hf, EMBED);
        assert!(error.contains(EMBED) && error.contains("row 4"), "{error}");
    }

    #[test]
    fn what_does_not_fit_the_config_is_refused() {
        let scratch = Scratch::new("open-shape");
        let tiny = Tiny::new(false, 16);
        let (parent, config) = (scratch.path(), tiny.config());
        let (dtype, source) = (ExportDtype::Bf16, Dense(&tiny));
        let hf = export_huggingface(parent, "hf", config, None, dtype, None, &source).unwrap();
        let refused = |change: fn(&mut Qwen3Config), expected: &str| {
            let mut changed = config.clone();
            change(&mut changed);
            fs::write(hf.join("config.json"), changed.to_json()).unwrap();
            let error = OpenModel::open(&hf).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        };
        refused(
            |c| c.intermediate_size = 104,
            "mlp.gate_proj.weight has shape [100, 72]",
        );
        refused(|c| c.num_hidden_layers = 3, "model.layers.2.");
        refused(|c| c.num_hidden_layers = 1, "model.layers.1.");
        fs::write(hf.join("config.json"), config.to_json()).unwrap();
        OpenModel::open(&hf).unwrap();
    }

    #[test]
    fn a_second_head_of_a_tied_model_is_ignored_and_other_extras_are_not() {
        let scratch = Scratch::new("open-extra");
        let tiny = Tiny::new(false, 16);
        let (dtype, source) = (ExportDtype::F32, Dense(&tiny));
        let config = tiny.config();
        let hf = export_huggingface(scratch.path(), "hf", config, None, dtype, None, &source);
        let hf = hf.unwrap();
        let mut tied = config.clone();
        tied.tie_word_embeddings = true;
        fs::write(hf.join("config.json"), tied.to_json()).unwrap();
        OpenModel::open(&hf).unwrap();
        let file = hf.join("model.safetensors");
        let mut bytes = fs::read(&file).unwrap();
        let renamed = Q_NORM.replace("q_norm.weight", "q_proj.bias__");
        assert_eq!(renamed.len(), Q_NORM.len());
        let at = bytes
            .windows(Q_NORM.len())
            .position(|w| w == Q_NORM.as_bytes());
        let at = at.unwrap();
        bytes[at..at + renamed.len()].copy_from_slice(renamed.as_bytes());
        fs::write(&file, bytes).unwrap();
        let error = OpenModel::open(&hf).unwrap_err().to_string();
        assert!(error.contains(Q_NORM), "{error}");
    }

    #[test]
    fn strangers_get_an_explanation() {
        let scratch = Scratch::new("open-stranger");
        let missing = OpenModel::open(&scratch.join("nowhere")).unwrap_err();
        assert!(missing.to_string().contains("no such file"), "{missing}");
        let empty = OpenModel::open(scratch.path()).unwrap_err();
        assert!(empty.to_string().contains("expected a run"), "{empty}");
        fs::write(scratch.join("x.safetensors"), b"not one").unwrap();
        assert!(OpenModel::open(&scratch.join("x.safetensors")).is_err());
        fs::create_dir(scratch.join("checkpoints")).unwrap();
        let bare = OpenModel::open(scratch.path()).unwrap_err();
        assert!(matches!(bare, IoError::NoCheckpoint { .. }), "{bare}");
    }
}
