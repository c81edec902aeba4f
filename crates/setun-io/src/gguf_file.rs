//! A GGUF file that is read a few rows at a time: the header is parsed and checked once,
//! the payload stays on disk.

use crate::IoError;
use half::{bf16, f16};
use setun_formats::config::Qwen3Config;
use setun_formats::gguf::{
    GgufError, GgufHeader, GgufLimits, GgufTensorInfo, GgufType, hf_name, qwen3_config,
    ternary_info,
};
use setun_formats::packed::TernaryInfo;
use setun_ternary::PackedMatrix;
use setun_ternary::blocks::{BlockType, decode_matrix, group_fits};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// Bytes of the header that are read at first. A vocabulary of 151,936 tokens needs about
/// six times as much, and the prefix doubles until the header is whole.
const FIRST_PREFIX: u64 = 1 << 20;

/// An open GGUF file of a Qwen3 model whose tensors are those of its configuration.
#[derive(Debug)]
pub(crate) struct GgufFile {
    path: PathBuf,
    // Held open, as in [`TensorFile`](crate::TensorFile).
    file: Mutex<File>,
    header: GgufHeader,
    /// Place in the header of each tensor, by Hugging Face name.
    places: BTreeMap<String, usize>,
}

/// Rows of a matrix as a GGUF file holds them.
pub(crate) enum GgufRows {
    /// Exactly what the file says, as f32.
    Values(Vec<f32>),
    /// Blocks of trits.
    Blocks(BlockType, Vec<u8>),
}

impl GgufFile {
    /// Opens the file, parses the header and checks every tensor's name, type and shape
    /// against the configuration.
    ///
    /// # Errors
    /// A file that cannot be read, is cut off or damaged, and one that is not a dense
    /// Qwen3 model.
    pub(crate) fn open(path: &Path) -> Result<(Self, Qwen3Config), IoError> {
        let mut file = File::open(path).map_err(|e| IoError::file("open", path, e))?;
        let header = read_header(path, &mut file)?;
        let config = qwen3_config(&header).map_err(|e| invalid(path, &e))?;
        let mut places = BTreeMap::new();
        for (place, tensor) in header.tensors.iter().enumerate() {
            let known = hf_name(&tensor.name);
            let Some(name) = known else {
                let problem = format!("tensor {} is not part of a Qwen3 model", tensor.name);
                return Err(IoError::invalid(path, problem));
            };
            places.insert(name, place);
        }
        let file = Self {
            path: path.to_owned(),
            file: Mutex::new(file),
            header,
            places,
        };
        file.check(&config)?;
        Ok((file, config))
    }

    /// Opens any GGUF file for its header alone, whatever model it holds.
    pub(crate) fn header_of(path: &Path) -> Result<GgufHeader, IoError> {
        let mut file = File::open(path).map_err(|e| IoError::file("open", path, e))?;
        read_header(path, &mut file)
    }

    fn check(&self, config: &Qwen3Config) -> Result<(), IoError> {
        let parameters = config.parameters();
        for parameter in &parameters {
            let tensor = self.tensor(&parameter.name)?;
            if tensor.shape != parameter.shape {
                let problem = format!(
                    "tensor {} has shape {:?}, the metadata ask for {:?}",
                    tensor.name, tensor.shape, parameter.shape
                );
                return Err(IoError::invalid(&self.path, problem));
            }
            if !parameter.is_matrix() && tensor.ggml_type.block().is_some() {
                let problem = format!("norm {} is stored as trits, expected F32", tensor.name);
                return Err(IoError::invalid(&self.path, problem));
            }
        }
        let known = |name: &str| parameters.iter().any(|p| p.name == name);
        match self.places.keys().find(|name| !known(name)) {
            None => Ok(()),
            Some(name) => {
                let name = &self.tensor(name)?.name;
                let problem = format!("tensor {name} is not part of a model of this size");
                Err(IoError::invalid(&self.path, problem))
            }
        }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn header(&self) -> &GgufHeader {
        &self.header
    }

    /// The ternary format that the metadata record.
    pub(crate) fn ternary_info(&self) -> Result<Option<TernaryInfo>, IoError> {
        ternary_info(&self.header).map_err(|e| invalid(&self.path, &e))
    }

    /// Weights in the smallest block of trits of any tensor; `None` if there is none.
    pub(crate) fn smallest_block(&self) -> Option<usize> {
        let weights = |tensor: &GgufTensorInfo| Some(tensor.ggml_type.block()?.block_weights());
        self.header.tensors.iter().filter_map(weights).min()
    }

    /// Rows of the matrix called `name`, as they are stored.
    pub(crate) fn rows(&self, name: &str, rows: Range<usize>) -> Result<GgufRows, IoError> {
        let tensor = self.tensor(name)?;
        let bytes = self.row_bytes(tensor, rows)?;
        Ok(match tensor.ggml_type.block() {
            Some(block) => GgufRows::Blocks(block, bytes),
            None => GgufRows::Values(floats(tensor.ggml_type, &bytes)),
        })
    }

    /// Rows of a matrix of blocks as trits and scales, with groups of `group_size`.
    pub(crate) fn decode(
        &self,
        name: &str,
        (block, bytes): (BlockType, &[u8]),
        (rows, cols): (Range<usize>, usize),
        group_size: usize,
    ) -> Result<PackedMatrix, IoError> {
        decode_matrix(block, rows.len(), cols, bytes, group_size).map_err(|e| {
            let problem = match rows.start {
                0 => format!("{name}: {e}"),
                first => format!("{name}, rows counted from {first}: {e}"),
            };
            IoError::invalid(&self.path, problem)
        })
    }

    /// The norm called `name`, in f32.
    pub(crate) fn norm(&self, name: &str) -> Result<Vec<f32>, IoError> {
        let tensor = self.tensor(name)?;
        Ok(floats(
            tensor.ggml_type,
            &self.read(tensor.offset, tensor.num_bytes)?,
        ))
    }

    fn tensor(&self, name: &str) -> Result<&GgufTensorInfo, IoError> {
        let place = self.places.get(name);
        place
            .and_then(|&place| self.header.tensors.get(place))
            .ok_or_else(|| IoError::invalid(&self.path, format!("tensor {name} is missing")))
    }

    fn row_bytes(&self, tensor: &GgufTensorInfo, rows: Range<usize>) -> Result<Vec<u8>, IoError> {
        let num_rows = tensor.shape.first().copied().unwrap_or(1);
        if rows.start > rows.end || rows.end > num_rows {
            let problem = format!("{} has {num_rows} rows, asked for {rows:?}", tensor.name);
            return Err(IoError::invalid(&self.path, problem));
        }
        let row = tensor.num_bytes.checked_div(num_rows as u64).unwrap_or(0);
        self.read(
            tensor.offset + rows.start as u64 * row,
            rows.len() as u64 * row,
        )
    }

    fn read(&self, offset: u64, num_bytes: u64) -> Result<Vec<u8>, IoError> {
        let length = usize::try_from(num_bytes).map_err(|_| {
            IoError::invalid(
                &self.path,
                format!("{num_bytes} bytes do not fit into memory"),
            )
        })?;
        let mut bytes = vec![0; length];
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        file.seek(SeekFrom::Start(offset))
            .and_then(|_| file.read_exact(&mut bytes))
            .map_err(|e| IoError::file("read", &self.path, e))?;
        Ok(bytes)
    }
}

/// Whether blocks can be read with groups of `group_size` without loss.
pub(crate) fn blocks_fit(
    (block, bytes): (BlockType, &[u8]),
    (rows, cols): (usize, usize),
    group_size: usize,
) -> bool {
    group_fits(block, rows, cols, bytes, group_size)
}

/// Parses the header from a prefix that grows until it holds all of it.
fn read_header(path: &Path, file: &mut File) -> Result<GgufHeader, IoError> {
    let read_error = |e| IoError::file("read", path, e);
    let file_len = file.metadata().map_err(read_error)?.len();
    let mut prefix = Vec::new();
    let mut wanted = FIRST_PREFIX;
    loop {
        let missing = wanted.min(file_len).saturating_sub(prefix.len() as u64);
        let read = file.take(missing).read_to_end(&mut prefix);
        if read.map_err(read_error)? as u64 != missing {
            return Err(IoError::damaged(
                path,
                "it became shorter while it was read",
            ));
        }
        match GgufHeader::parse(&prefix, file_len, &GgufLimits::default()) {
            Ok(header) => return Ok(header),
            Err(GgufError::NeedMore { at_least }) if (prefix.len() as u64) < file_len => {
                wanted = at_least.max(prefix.len() as u64 * 2);
            }
            Err(error) => return Err(invalid(path, &error)),
        }
    }
}

/// Values of a tensor that is not made of blocks.
fn floats(kind: GgufType, bytes: &[u8]) -> Vec<f32> {
    let pairs = bytes.as_chunks::<2>().0.iter();
    match kind {
        GgufType::F16 => pairs.map(|&b| f16::from_le_bytes(b).to_f32()).collect(),
        GgufType::Bf16 => pairs.map(|&b| bf16::from_le_bytes(b).to_f32()).collect(),
        _ => {
            let words = bytes.as_chunks::<4>().0.iter();
            words.map(|&b| f32::from_le_bytes(b)).collect()
        }
    }
}

fn invalid(path: &Path, error: &GgufError) -> IoError {
    IoError::invalid(path, error.to_string())
}
