//! What a file or directory holds: metadata, tensors, types, shapes and sizes. Headers
//! are enough for that; only where trits come without a recorded group size, opening the
//! model reads their scales too.

use crate::checkpoints::newest_valid_checkpoint;
use crate::gguf_file::GgufFile;
use crate::layout::{LATENTS, Located, PACKED, is_run, locate};
use crate::{IoError, OpenModel, TensorFile};
use serde::Serialize;
use setun_formats::gguf::GgufHeader;
use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

/// Longest value of metadata that is shown whole, in characters.
const MAX_VALUE_CHARS: usize = 100;
/// What a tensor's name ends in where it is a part of a parameter.
const PARTS: [&str; 7] = [
    ".trits", ".scales", "_packed", "_scale", "_shape", ".biases", ".weight",
];

/// What a path holds.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Inspection {
    /// The path.
    pub path: PathBuf,
    /// Its format, in words.
    pub format: String,
    /// Weights of the model that the configuration implies, if it is a Qwen3 model.
    pub num_weights: Option<u64>,
    /// Bytes of all tensors that a program reads to run the model: latents of a checkpoint
    /// that has packed weights do not count.
    pub weight_bytes: u64,
    /// The files of weights.
    pub files: Vec<InspectedFile>,
    /// Why it is no model that Setun opens, and what else the reader says.
    pub notes: Vec<String>,
}

/// One file of an [`Inspection`].
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct InspectedFile {
    /// Where it is.
    pub path: PathBuf,
    /// Its length.
    pub num_bytes: u64,
    /// Metadata, in order of key; long values and arrays are abbreviated.
    pub metadata: Vec<(String, String)>,
    /// Tensors, in order of name (GGUF: in order of the file).
    pub tensors: Vec<InspectedTensor>,
}

/// One tensor of an [`InspectedFile`].
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct InspectedTensor {
    /// Name in the file.
    pub name: String,
    /// Type in the file.
    pub dtype: String,
    /// Dimensions in the file, slowest first.
    pub shape: Vec<usize>,
    /// Bytes of its payload.
    pub num_bytes: u64,
    /// Bits that it takes for each weight of the parameter that it belongs to.
    pub bits_per_weight: Option<f64>,
}

impl Inspection {
    /// Bits for each weight of the model, norms included.
    pub fn bits_per_weight(&self) -> Option<f64> {
        let num_weights = self.num_weights.filter(|&n| n > 0)?;
        Some(8.0 * self.weight_bytes as f64 / num_weights as f64)
    }
}

/// Reads the headers of a run (its newest checkpoint), a checkpoint, a packed, Hugging
/// Face, compressed-tensors or MLX directory or file, or a GGUF file. Also describes
/// files of models that Setun does not run.
///
/// # Errors
/// A path that holds no such file; a header that is damaged.
pub fn inspect(path: &Path) -> Result<Inspection, IoError> {
    if is_run(path) {
        let (checkpoint, _, skipped) = newest_valid_checkpoint(path)?;
        let mut inspection = inspect(&checkpoint)?;
        inspection.notes.extend(skipped);
        return Ok(inspection);
    }
    let (format, paths) = match locate(path) {
        Ok(Located::Checkpoint(dir)) => {
            let packed = dir.join(PACKED);
            let files = [packed, dir.join(LATENTS)].into_iter();
            let files = files.filter(|file| file.is_file()).collect();
            ("training checkpoint", files)
        }
        Ok(Located::Packed(file)) => ("packed", vec![file]),
        Ok(Located::HuggingFace(_, files)) => ("Hugging Face", files),
        Ok(Located::Gguf(file)) => ("GGUF", vec![file]),
        // A safetensors file without a config.json can still be described.
        Err(IoError::NotAModel { .. }) if path.is_file() => ("safetensors", vec![path.to_owned()]),
        Err(error) => return Err(error),
    };
    describe(path, format, &paths)
}

fn describe(path: &Path, format: &str, files: &[PathBuf]) -> Result<Inspection, IoError> {
    let mut inspection = Inspection {
        path: path.to_owned(),
        format: format.to_owned(),
        num_weights: None,
        weight_bytes: 0,
        files: Vec::new(),
        notes: Vec::new(),
    };
    let mut weights = BTreeMap::new();
    match OpenModel::open(path) {
        Ok(model) => {
            let parameters = model.config().parameters().into_iter();
            weights = parameters.map(|p| (p.name.clone(), p.numel())).collect();
            inspection.num_weights = Some(model.config().num_parameters());
            inspection.notes.extend(model.notes().iter().cloned());
            inspection.format = described(format, &model);
        }
        Err(error) => inspection
            .notes
            .push(format!("not a model that Setun runs: {error}")),
    }
    for (i, file) in files.iter().enumerate() {
        let inspected = match format {
            "GGUF" => inspect_gguf(file)?,
            _ => inspect_tensors(file, &weights)?,
        };
        // Of a checkpoint, the first file is what runs.
        if i == 0 || format != "training checkpoint" {
            let bytes = inspected.tensors.iter().map(|tensor| tensor.num_bytes);
            inspection.weight_bytes += bytes.sum::<u64>();
        }
        inspection.files.push(inspected);
    }
    Ok(inspection)
}

/// The format with what opening found out about it.
fn described(format: &str, model: &OpenModel) -> String {
    use crate::ModelKind;
    let format = match model.kind() {
        ModelKind::Mlx => "MLX",
        ModelKind::CompressedTensors => "compressed-tensors",
        _ => format,
    };
    match model.ternary() {
        None => format!("{format}, float weights"),
        Some(ternary) => format!(
            "{format}, ternary: group size {}, scale rule {}, numerics {}",
            ternary.group_size,
            ternary.scale_rule.name(),
            ternary.numerics.name()
        ),
    }
}

fn inspect_tensors(
    path: &Path,
    weights: &BTreeMap<String, usize>,
) -> Result<InspectedFile, IoError> {
    let file = TensorFile::open(path)?;
    let metadata = file.metadata().iter();
    let metadata = metadata.map(|(key, value)| (key.clone(), abbreviated(value)));
    let tensors = file.tensors().map(|(name, dtype, shape)| {
        let bits: usize = shape.iter().product::<usize>() * dtype.bitsize();
        let num_bytes = bits as u64 / 8;
        InspectedTensor {
            name: name.to_owned(),
            dtype: dtype.to_string(),
            shape: shape.to_vec(),
            num_bytes,
            bits_per_weight: parameter_weights(name, weights)
                .map(|weights| 8.0 * num_bytes as f64 / weights as f64),
        }
    });
    Ok(InspectedFile {
        path: path.to_owned(),
        num_bytes: file_bytes(path)?,
        metadata: metadata.collect(),
        tensors: tensors.collect(),
    })
}

/// Weights of the parameter that a tensor is or belongs to.
fn parameter_weights(name: &str, weights: &BTreeMap<String, usize>) -> Option<usize> {
    let known = |name: &str| weights.get(name).copied().filter(|&n| n > 0);
    known(name).or_else(|| {
        let stem = PARTS.iter().find_map(|part| name.strip_suffix(part))?;
        known(stem).or_else(|| known(&format!("{stem}.weight")))
    })
}

fn inspect_gguf(path: &Path) -> Result<InspectedFile, IoError> {
    let header: GgufHeader = GgufFile::header_of(path)?;
    let metadata = header.metadata.iter();
    let metadata = metadata.map(|(key, value)| (key.clone(), value.to_string()));
    let tensors = header.tensors.iter().map(|tensor| {
        let weights: usize = tensor.shape.iter().product();
        InspectedTensor {
            name: tensor.name.clone(),
            dtype: tensor.ggml_type.name().to_owned(),
            shape: tensor.shape.clone(),
            num_bytes: tensor.num_bytes,
            bits_per_weight: (weights > 0).then(|| 8.0 * tensor.num_bytes as f64 / weights as f64),
        }
    });
    Ok(InspectedFile {
        path: path.to_owned(),
        num_bytes: file_bytes(path)?,
        metadata: metadata.collect(),
        tensors: tensors.collect(),
    })
}

fn file_bytes(path: &Path) -> Result<u64, IoError> {
    let metadata = std::fs::metadata(path).map_err(|e| IoError::file("read", path, e))?;
    Ok(metadata.len())
}

/// A text on one line, cut to what fits.
fn abbreviated(text: &str) -> String {
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    match line.char_indices().nth(MAX_VALUE_CHARS) {
        None => line,
        Some((end, _)) => format!("{}... ({} characters)", &line[..end], text.chars().count()),
    }
}

impl fmt::Display for Inspection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.path.display())?;
        writeln!(f, "format: {}", self.format)?;
        for file in &self.files {
            writeln!(f, "\n{}: {} bytes", file.path.display(), file.num_bytes)?;
            for (key, value) in &file.metadata {
                writeln!(f, "  {key}: {value}")?;
            }
            write_tensors(f, &file.tensors)?;
        }
        if let (Some(num_weights), Some(bits)) = (self.num_weights, self.bits_per_weight()) {
            let bytes = self.weight_bytes;
            writeln!(
                f,
                "\n{num_weights} weights in {bytes} bytes: {bits:.4} bits per weight"
            )?;
        }
        for note in &self.notes {
            writeln!(f, "note: {note}")?;
        }
        Ok(())
    }
}

const HEADINGS: [&str; 5] = ["tensor", "type", "shape", "bytes", "bits per weight"];

/// Names and types to the left, numbers to the right, each column as wide as its widest
/// cell.
fn write_tensors(f: &mut fmt::Formatter<'_>, tensors: &[InspectedTensor]) -> fmt::Result {
    let mut rows = vec![HEADINGS.map(str::to_owned)];
    rows.extend(tensors.iter().map(|tensor| {
        let shape = tensor.shape.iter().map(usize::to_string);
        [
            tensor.name.clone(),
            tensor.dtype.clone(),
            shape.collect::<Vec<_>>().join(" x "),
            tensor.num_bytes.to_string(),
            tensor
                .bits_per_weight
                .map_or(String::new(), |bits| format!("{bits:.4}")),
        ]
    }));
    let width = |column: usize| rows.iter().map(|row| row[column].len()).max().unwrap_or(0);
    let widths = [0, 1, 2, 3, 4].map(width);
    for row in &rows {
        let [name, kind, shape, bytes, bits] = row;
        let [name_width, kind_width, shape_width, bytes_width, bits_width] = widths;
        writeln!(
            f,
            "  {name:<name_width$}  {kind:<kind_width$}  {shape:>shape_width$}  \
             {bytes:>bytes_width$}  {bits:>bits_width$}"
        )?;
    }
    Ok(())
}
