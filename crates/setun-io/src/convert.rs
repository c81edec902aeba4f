//! From any format that opens to any format that can be written.
//!
//! Trits and scales pass as they are; a matrix is read, changed and written in blocks of
//! rows, so that memory does not grow with the model. What would lose something is refused
//! unless it is allowed by name.

use crate::encode::Encoding;
use crate::export::{
    DirectoryKind, ExportDtype, GgufWeights, MAX_SHARD_BYTES, ModelFiles, write_directory,
    write_gguf,
};
use crate::source::{Counted, Progress, Projected, Streamed, Widened};
use crate::weights::BLOCK_WEIGHTS;
use crate::{IoError, MANIFEST, ModelKind, OpenModel, TensorSource, verify_manifest};
use setun_formats::config::{ParameterInfo, Qwen3Config};
use setun_formats::packed::TernaryInfo;
use setun_ternary::blocks::{BlockType, fits};
use setun_ternary::{Numerics, ScaleRule};
use std::cell::RefCell;
use std::path::{Path, PathBuf};

/// The group size that is never too large: it is the default.
const USUAL_GROUP_SIZE: usize = 128;
/// Group sizes that MLX has kernels for, in order of preference.
const MLX_SIZES: [usize; 3] = [128, 64, 32];
/// Group sizes that servers run compressed-tensors with, in order of preference.
const COMPRESSED_SIZES: [usize; 4] = [128, 64, 32, 16];

/// A format to write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// A Hugging Face directory with one number for each weight.
    HuggingFace(ExportDtype),
    /// Setun's own directory: two bits for a weight.
    Packed,
    /// A Hugging Face directory with 2-bit words for the compressed-tensors library.
    CompressedTensors,
    /// An MLX directory with 2-bit words.
    Mlx,
    /// A GGUF file.
    Gguf(GgufWeights),
}

impl Format {
    /// Every format, in the order of [`Format::name`] in help texts.
    pub const ALL: [Self; 15] = [
        Self::HuggingFace(ExportDtype::Bf16),
        Self::HuggingFace(ExportDtype::F16),
        Self::HuggingFace(ExportDtype::F32),
        Self::Packed,
        Self::CompressedTensors,
        Self::Mlx,
        Self::Gguf(GgufWeights::Block(BlockType::Q2_0)),
        Self::Gguf(GgufWeights::Block(BlockType::Pq2_0)),
        Self::Gguf(GgufWeights::LegacyQ2_0),
        Self::Gguf(GgufWeights::Block(BlockType::Ptq1_0)),
        Self::Gguf(GgufWeights::Block(BlockType::Tq1_0)),
        Self::Gguf(GgufWeights::Block(BlockType::Tq2_0)),
        Self::Gguf(GgufWeights::F16),
        Self::Gguf(GgufWeights::Bf16),
        Self::Gguf(GgufWeights::F32),
    ];

    /// Name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::HuggingFace(ExportDtype::Bf16) => "hf",
            Self::HuggingFace(ExportDtype::F16) => "hf-f16",
            Self::HuggingFace(ExportDtype::F32) => "hf-f32",
            Self::Packed => "packed",
            Self::CompressedTensors => "compressed-tensors",
            Self::Mlx => "mlx",
            Self::Gguf(GgufWeights::Block(block)) => match block {
                BlockType::Q2_0 => "gguf-q2_0",
                BlockType::Pq2_0 => "gguf-pq2_0",
                BlockType::Ptq1_0 => "gguf-ptq1_0",
                BlockType::Tq1_0 => "gguf-tq1_0",
                BlockType::Tq2_0 => "gguf-tq2_0",
            },
            Self::Gguf(GgufWeights::LegacyQ2_0) => "gguf-q2_0-legacy",
            Self::Gguf(GgufWeights::F16) => "gguf-f16",
            Self::Gguf(GgufWeights::Bf16) => "gguf-bf16",
            Self::Gguf(GgufWeights::F32) => "gguf-f32",
        }
    }

    /// The format called `name`, in lower or upper case, if there is one. `gguf` stands
    /// for `gguf-q2_0`, which stock llama.cpp runs, and `hf-bf16` for `hf`.
    pub fn from_name(name: &str) -> Option<Self> {
        let name = match name.to_ascii_lowercase().as_str() {
            "gguf" => "gguf-q2_0".to_owned(),
            "hf-bf16" => "hf".to_owned(),
            other => other.to_owned(),
        };
        Self::ALL.into_iter().find(|format| format.name() == name)
    }

    /// Whether it holds numbers, which a dense model can be written in, and not trits.
    pub fn holds_floats(self) -> bool {
        matches!(
            self,
            Self::HuggingFace(_)
                | Self::Gguf(GgufWeights::F16 | GgufWeights::Bf16 | GgufWeights::F32)
        )
    }

    /// Refuses a format that cannot hold every model of this shape without loss: what a
    /// training should know before its first step.
    ///
    /// # Errors
    /// Rows that the format does not divide, and blocks that are larger than groups, with
    /// the remedy.
    pub fn check(self, config: &Qwen3Config, ternary: Option<&TernaryInfo>) -> Result<(), IoError> {
        check_format(config, ternary, &ConvertOptions::new(self))?;
        let (Self::Gguf(weights), Some(ternary)) = (self, ternary) else {
            return Ok(());
        };
        let Encoding::Blocks(block) = weights.encoding(true) else {
            return Ok(());
        };
        let group_size = ternary.group_size;
        let matrices = matrices(config);
        match matrices
            .iter()
            .find(|(_, cols)| !fits(block, *cols, group_size))
        {
            None => Ok(()),
            Some((name, _)) => Err(IoError::Refused(format!(
                "{name}: groups of {group_size} weights do not fit into blocks of {size} ({}), \
                 which have one scale; train with group_size = {size} (convert with --group-size \
                 {size}), or write a type with smaller blocks (gguf-q2_0 has 64)",
                self.name(),
                size = block.block_weights()
            ))),
        }
    }

    /// Whether it is one file, and not a directory.
    pub fn is_file(self) -> bool {
        matches!(self, Self::Gguf(_))
    }
}

/// What to do on the way.
#[derive(Clone, Copy, Debug)]
pub struct ConvertOptions {
    /// Format to write.
    pub format: Format,
    /// Projects a dense model; changes nothing about a ternary one.
    pub ternarize: Option<TernaryInfo>,
    /// Allows rounding of dense weights to a smaller type, and joining of groups whose
    /// scales differ.
    pub allow_lossy: bool,
    /// Bytes of weights in a file of a directory before the next one begins.
    pub max_shard_bytes: u64,
    /// Weights that are read at a time (whole rows, at least one).
    pub block_weights: usize,
}

impl ConvertOptions {
    /// Lossless conversion to `format`.
    pub fn new(format: Format) -> Self {
        Self {
            format,
            ternarize: None,
            allow_lossy: false,
            max_shard_bytes: MAX_SHARD_BYTES,
            block_weights: BLOCK_WEIGHTS,
        }
    }
}

/// What a conversion wrote.
#[derive(Clone, Debug, PartialEq)]
pub struct ConvertSummary {
    /// The directory or file.
    pub path: PathBuf,
    /// Bytes of all files.
    pub num_bytes: u64,
    /// Weights of the model, norms included.
    pub num_weights: u64,
    /// Number format of what was written; `None` for a dense model.
    pub ternary: Option<TernaryInfo>,
    /// What the user should know.
    pub notes: Vec<String>,
}

/// Writes `model` to `out`, which must not exist yet. `progress` is told the weights that
/// are done and their total, and may end the work, which then leaves nothing behind.
///
/// Weights whose values are ternary are recognised and pass without a projection, with
/// their exact scales. Memory stays within a few blocks of rows and the scales of one
/// matrix.
///
/// # Errors
/// Files that are not those of the manifest beside them; a dense model for a format of trits; groups
/// that are longer than every row; rows that the format cannot divide; a loss that is
/// not allowed; what reading and writing return. Nothing half-written stays.
pub fn convert(
    model: &OpenModel,
    out: &Path,
    options: &ConvertOptions,
    progress: &mut Progress<'_>,
) -> Result<ConvertSummary, IoError> {
    // Opening has looked at a checkpoint already, and what lies beside a GGUF file is not its own.
    let is_listed = !matches!(model.kind(), ModelKind::Checkpoint | ModelKind::Gguf);
    if is_listed && model.directory().join(MANIFEST).exists() {
        verify_manifest(model.directory())?;
    }
    let mut notes = Vec::new();
    let recognised = recognise(model, options, &mut notes)?;
    let mut ternary = recognised.or(options.ternarize);
    let config = model.config();
    let form = check_format(config, ternary.as_ref(), options)?;
    let streamed = Streamed {
        model,
        group_size: recognised.map(|ternary| ternary.group_size),
        block_weights: options.block_weights.max(1),
    };
    let projected;
    let mut source: &dyn TensorSource = &streamed;
    if let (None, Some(ternary)) = (recognised, options.ternarize) {
        check_group_size(config, ternary.group_size)?;
        projected = Projected { source, ternary };
        source = &projected;
    }
    let widened;
    if let (Some(group_size), Some(info)) = (form.widened, &mut ternary) {
        notes.push(format!(
            "lossy: groups of {} were joined to groups of {group_size}; each has the mean of \
             its non-zero magnitudes as its scale",
            info.group_size
        ));
        info.group_size = group_size;
        widened = Widened { source, group_size };
        source = &widened;
    }
    let counted = Counted {
        source,
        done: RefCell::new(0),
        total: config.num_parameters(),
        progress: RefCell::new(progress),
    };
    let path = write(
        model,
        out,
        (options, &form.target),
        ternary.as_ref(),
        &counted,
    )?;
    Ok(ConvertSummary {
        num_bytes: num_bytes(&path)?,
        path,
        num_weights: config.num_parameters(),
        ternary,
        notes,
    })
}

/// Refuses groups that only padding would fill.
fn check_group_size(config: &Qwen3Config, group_size: usize) -> Result<(), IoError> {
    let widest = matrices(config).into_iter().map(|(_, cols)| cols).max();
    let most = widest.unwrap_or(0).max(USUAL_GROUP_SIZE);
    if group_size <= most {
        return Ok(());
    }
    Err(IoError::Refused(format!(
        "groups of {group_size} weights are longer than every row of this model: make them at most \
         {most}"
    )))
}

/// The ternary format of the model, recorded or found in its values.
fn recognise(
    model: &OpenModel,
    options: &ConvertOptions,
    notes: &mut Vec<String>,
) -> Result<Option<TernaryInfo>, IoError> {
    let recorded = model.ternary().copied();
    let ternary = match recorded {
        Some(ternary) => Some(ternary),
        None => model.find_group_size()?.map(|group_size| TernaryInfo {
            group_size,
            scale_rule: ScaleRule::default(),
            numerics: Numerics::default(),
        }),
    };
    if let (None, Some(ternary)) = (recorded, &ternary) {
        notes.push(format!(
            "the weights are ternary by their values, with groups of {}; scales pass exactly",
            ternary.group_size
        ));
    }
    if let (Some(ternary), Some(_)) = (&ternary, &options.ternarize) {
        notes.push(format!(
            "the model is ternary already (groups of {}): --ternarize changes nothing",
            ternary.group_size
        ));
    }
    Ok(ternary)
}

/// What the shape of a model makes of a format.
struct Form {
    target: Target,
    /// Group size to which groups must be joined, with loss.
    widened: Option<usize>,
}

enum Target {
    Directory(DirectoryKind),
    Gguf(GgufWeights, Encoding),
}

/// Checks before anything is written whether the format can hold a model of this shape.
fn check_format(
    config: &Qwen3Config,
    ternary: Option<&TernaryInfo>,
    options: &ConvertOptions,
) -> Result<Form, IoError> {
    let (format, exact) = (options.format, !options.allow_lossy);
    if ternary.is_none() && !format.holds_floats() {
        return Err(IoError::Refused(format!(
            "the model is dense, and {} holds trits: project it with --ternarize, or write \
             another format (hf, gguf-bf16)",
            format.name()
        )));
    }
    let group_size = ternary.map_or(0, |ternary| ternary.group_size);
    let mut widened = None;
    let target = match format {
        Format::HuggingFace(dtype) => {
            Target::Directory(DirectoryKind::HuggingFace { dtype, exact })
        }
        Format::Packed => Target::Directory(DirectoryKind::Packed),
        Format::Mlx => {
            let group_size = word_group_size(config, group_size, &MLX_SIZES, format)?;
            Target::Directory(DirectoryKind::Mlx { group_size })
        }
        Format::CompressedTensors => {
            let group_size = word_group_size(config, group_size, &COMPRESSED_SIZES, format)?;
            Target::Directory(DirectoryKind::CompressedTensors { group_size })
        }
        Format::Gguf(weights) => {
            let encoding = weights.encoding(exact);
            if let Encoding::Blocks(block) = encoding {
                widened = check_blocks(config, block, group_size, options)?;
            }
            Target::Gguf(weights, encoding)
        }
    };
    Ok(Form { target, widened })
}

/// The largest of `sizes` into which all groups split and that divides all rows.
fn word_group_size(
    config: &Qwen3Config,
    group_size: usize,
    sizes: &[usize],
    format: Format,
) -> Result<usize, IoError> {
    let matrices = matrices(config);
    let splits = |size: usize, cols: usize| {
        cols.is_multiple_of(size) && (group_size.is_multiple_of(size) || cols <= group_size)
    };
    let fits_all = |size: &usize| matrices.iter().all(|(_, cols)| splits(*size, *cols));
    if let Some(&size) = sizes.iter().find(|size| fits_all(size)) {
        return Ok(size);
    }
    let unfit = |(_, cols): &&(String, usize)| !sizes.iter().any(|&size| splits(size, *cols));
    let mixed = "the matrices of this model".to_owned();
    let (name, cols) = match matrices.iter().find(unfit) {
        Some((name, cols)) => (name, cols.to_string()),
        None => (&mixed, "different numbers of".to_owned()),
    };
    let mut sizes = sizes.to_vec();
    sizes.sort_unstable();
    let sizes: Vec<String> = sizes.iter().map(usize::to_string).collect();
    Err(IoError::Refused(format!(
        "{name}: rows of {cols} weights in groups of {group_size} cannot be written as whole \
         groups of {}, which is what {} has; write packed, hf or a GGUF type, or train with \
         group_size = 128 and sizes that 128 divides",
        sizes.join(", "),
        format.name()
    )))
}

/// Checks that blocks divide all rows; the group size to join to where blocks are larger
/// than groups and loss is allowed.
fn check_blocks(
    config: &Qwen3Config,
    block: BlockType,
    group_size: usize,
    options: &ConvertOptions,
) -> Result<Option<usize>, IoError> {
    let matrices = matrices(config);
    let weights = block.block_weights();
    if let Some((name, cols)) = matrices
        .iter()
        .find(|(_, cols)| block.row_bytes(*cols).is_none())
    {
        return Err(IoError::Refused(format!(
            "{name}: blocks of {weights} weights ({}) do not divide rows of {cols}; write \
             {smaller}packed, hf or gguf-bf16",
            block.name(),
            smaller = match weights > 64 {
                true => "a type with smaller blocks (gguf-q2_0 has 64), ",
                false => "",
            }
        )));
    }
    let lossless = matrices
        .iter()
        .all(|(_, cols)| fits(block, *cols, group_size));
    // Without permission, the encoder looks at the scales: they may happen to agree.
    Ok((!lossless && options.allow_lossy).then_some(weights))
}

/// Name and columns of every matrix.
fn matrices(config: &Qwen3Config) -> Vec<(String, usize)> {
    let parameters = config.parameters().into_iter();
    parameters
        .filter(ParameterInfo::is_matrix)
        .map(|parameter| (parameter.name, parameter.shape[1]))
        .collect()
}

fn write(
    model: &OpenModel,
    out: &Path,
    (options, target): (&ConvertOptions, &Target),
    ternary: Option<&TernaryInfo>,
    source: &dyn TensorSource,
) -> Result<PathBuf, IoError> {
    let tokenizer_json = model.tokenizer_json()?;
    let chat_template = model.chat_template()?;
    let generation = model.generation_config()?;
    let files = ModelFiles {
        config: model.config(),
        ternary,
        tokenizer_json: tokenizer_json.as_deref(),
        chat_template: chat_template.as_deref(),
        generation: generation.as_ref(),
        max_shard_bytes: options.max_shard_bytes,
    };
    let out = std::path::absolute(out).map_err(|e| IoError::file("find", out, e))?;
    let (Some(parent), Some(name)) = (out.parent(), out.file_name().and_then(|n| n.to_str()))
    else {
        let problem = format!("{} is no name for a file or directory", out.display());
        return Err(IoError::Refused(problem));
    };
    match *target {
        Target::Directory(kind) => write_directory(parent, name, &files, kind, source),
        Target::Gguf(weights, encoding) if name.ends_with(".gguf") => {
            write_gguf(&out, &files, (weights, encoding), source)
        }
        Target::Gguf(..) => Err(IoError::Refused(format!(
            "{}: end the name of a GGUF file in .gguf",
            out.display()
        ))),
    }
}

/// Bytes of a file, or of the files in a directory.
fn num_bytes(path: &Path) -> Result<u64, IoError> {
    let read_error = |e| IoError::file("read", path, e);
    let metadata = std::fs::metadata(path).map_err(read_error)?;
    if !metadata.is_dir() {
        return Ok(metadata.len());
    }
    let mut total = 0;
    for entry in std::fs::read_dir(path).map_err(read_error)? {
        total += entry.and_then(|e| e.metadata()).map_err(read_error)?.len();
    }
    Ok(total)
}

#[cfg(test)]
mod tests;
