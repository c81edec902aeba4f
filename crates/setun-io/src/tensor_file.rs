//! A safetensors file that is read one tensor at a time: the header is parsed and
//! checked once, the payload stays on disk.

use crate::IoError;
use half::{bf16, f16};
use safetensors::tensor::{Metadata, TensorInfo};
use setun_formats::tensors::{Dtype, MAX_HEADER_BYTES, check_header};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// An open safetensors file. Offsets, sizes and the length of the file are checked when
/// it is opened, so reading fails only if the disk does or the file is changed.
#[derive(Debug)]
pub struct TensorFile {
    path: PathBuf,
    // Held open: a checkpoint that is retired meanwhile can still be read.
    file: Mutex<File>,
    payload_start: u64,
    tensors: BTreeMap<String, TensorInfo>,
    metadata: BTreeMap<String, String>,
}

impl TensorFile {
    /// Opens the file and checks its header.
    ///
    /// # Errors
    /// A file that cannot be read, is cut off, has bytes behind its last tensor, or whose
    /// header is not one of safetensors.
    pub fn open(path: &Path) -> Result<Self, IoError> {
        let read_error = |e| IoError::file("read", path, e);
        let mut file = File::open(path).map_err(|e| IoError::file("open", path, e))?;
        let file_bytes = file.metadata().map_err(read_error)?.len();
        let mut length = [0; 8];
        if file_bytes < 8 {
            return Err(cut(path, file_bytes, 8));
        }
        file.read_exact(&mut length).map_err(read_error)?;
        let header_bytes = u64::from_le_bytes(length);
        if header_bytes > MAX_HEADER_BYTES as u64 {
            let problem = "not a safetensors file (nor GGUF): name a model file, or its directory";
            return Err(IoError::invalid(path, problem));
        }
        let payload_start = 8 + header_bytes;
        if file_bytes < payload_start {
            return Err(cut(path, file_bytes, payload_start));
        }
        let mut header = vec![0; header_bytes as usize];
        file.read_exact(&mut header).map_err(read_error)?;
        let parsed: Metadata = serde_json::from_slice(&header)
            .map_err(|e| IoError::invalid(path, format!("bad safetensors header: {e}")))?;
        let expected = payload_start + parsed.data_len() as u64;
        if file_bytes < expected {
            return Err(cut(path, file_bytes, expected));
        }
        if file_bytes > expected {
            let problem = format!("{} bytes behind the last tensor", file_bytes - expected);
            return Err(IoError::invalid(path, problem));
        }
        // The parser above lets repeated names and leading spaces pass.
        check_header(&header, file_bytes - payload_start)
            .map_err(|e| IoError::invalid(path, e.to_string()))?;
        let tensors = parsed.tensors().into_iter();
        let metadata = parsed.metadata().clone().unwrap_or_default();
        Ok(Self {
            path: path.to_owned(),
            file: Mutex::new(file),
            payload_start,
            tensors: tensors.map(|(name, info)| (name, info.clone())).collect(),
            metadata: metadata.into_iter().collect(),
        })
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The `__metadata__` of the header.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// Every tensor's name, dtype and shape, in order of name.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, Dtype, &[usize])> {
        let all = self.tensors.iter();
        all.map(|(name, info)| (name.as_str(), info.dtype, info.shape.as_slice()))
    }

    /// Whether there is a tensor called `name`.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// The shape of `name`.
    ///
    /// # Errors
    /// No such tensor.
    pub fn shape(&self, name: &str) -> Result<&[usize], IoError> {
        self.info(name).map(|info| info.shape.as_slice())
    }

    /// Checks that `name` is there with this shape and one of these dtypes.
    ///
    /// # Errors
    /// Says what was expected and what the file has.
    pub fn expect(&self, name: &str, dtypes: &[Dtype], shape: &[usize]) -> Result<(), IoError> {
        let info = self.info(name)?;
        if info.shape != shape {
            let found = &info.shape;
            let problem = format!("{name} has shape {found:?}, the config asks for {shape:?}");
            return Err(IoError::invalid(&self.path, problem));
        }
        if !dtypes.contains(&info.dtype) {
            let problem = format!("{name} is {:?}, expected one of {dtypes:?}", info.dtype);
            return Err(IoError::invalid(&self.path, problem));
        }
        Ok(())
    }

    /// The payload of `name`, little-endian, row-major.
    ///
    /// # Errors
    /// No such tensor, or the disk fails.
    pub fn bytes(&self, name: &str) -> Result<Vec<u8>, IoError> {
        let info = self.info(name)?;
        self.read(info.data_offsets.0..info.data_offsets.1)
    }

    /// The payload of some rows (slices along the first dimension) of `name`.
    ///
    /// # Errors
    /// As [`TensorFile::bytes`], and rows that the tensor does not have.
    pub fn row_bytes(&self, name: &str, rows: Range<usize>) -> Result<Vec<u8>, IoError> {
        let info = self.info(name)?;
        let (start, end) = info.data_offsets;
        let num_rows = info.shape.first().copied().unwrap_or(1);
        if rows.start > rows.end || rows.end > num_rows {
            let problem = format!("{name} has {num_rows} rows, asked for {rows:?}");
            return Err(IoError::invalid(&self.path, problem));
        }
        let row = (end - start).checked_div(num_rows).unwrap_or(0);
        self.read(start + rows.start * row..start + rows.end * row)
    }

    /// The values of `name`, which is f32, f16 or bf16, exactly as f32.
    ///
    /// # Errors
    /// As [`TensorFile::bytes`], and another dtype.
    pub fn floats(&self, name: &str) -> Result<Vec<f32>, IoError> {
        self.to_floats(name, &self.bytes(name)?)
    }

    /// The values of some rows of `name`, as [`TensorFile::floats`].
    ///
    /// # Errors
    /// As [`TensorFile::row_bytes`], and another dtype.
    pub fn float_rows(&self, name: &str, rows: Range<usize>) -> Result<Vec<f32>, IoError> {
        self.to_floats(name, &self.row_bytes(name, rows)?)
    }

    fn to_floats(&self, name: &str, bytes: &[u8]) -> Result<Vec<f32>, IoError> {
        match self.info(name)?.dtype {
            Dtype::F32 => Ok(words(bytes).map(f32::from_le_bytes).collect()),
            Dtype::F16 => Ok(words(bytes)
                .map(|b| f16::from_le_bytes(b).to_f32())
                .collect()),
            Dtype::BF16 => Ok(words(bytes)
                .map(|b| bf16::from_le_bytes(b).to_f32())
                .collect()),
            other => {
                let problem = format!("{name} is {other:?}, expected F32, F16 or BF16");
                Err(IoError::invalid(&self.path, problem))
            }
        }
    }

    fn info(&self, name: &str) -> Result<&TensorInfo, IoError> {
        let info = self.tensors.get(name);
        info.ok_or_else(|| IoError::invalid(&self.path, format!("tensor {name} is missing")))
    }

    fn read(&self, range: Range<usize>) -> Result<Vec<u8>, IoError> {
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        // Not zeros that are read over: that takes as long as reading.
        let mut bytes = Vec::with_capacity(range.len());
        file.seek(SeekFrom::Start(self.payload_start + range.start as u64))
            .and_then(|_| {
                (&mut *file)
                    .take(range.len() as u64)
                    .read_to_end(&mut bytes)
            })
            .and_then(|found| match found == range.len() {
                true => Ok(bytes),
                false => Err(io::ErrorKind::UnexpectedEof.into()),
            })
            .map_err(|e| IoError::file("read", &self.path, e))
    }
}

fn words<const N: usize>(bytes: &[u8]) -> impl Iterator<Item = [u8; N]> {
    bytes.as_chunks::<N>().0.iter().copied()
}

fn cut(path: &Path, found: u64, expected: u64) -> IoError {
    IoError::damaged(
        path,
        format!("it is cut off: {found} bytes, at least {expected} expected"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::Scratch;
    use std::fs;

    fn file(header: &str, payload: &[u8]) -> Vec<u8> {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.extend(payload);
        bytes
    }

    fn good() -> Vec<u8> {
        let header = r#"{"__metadata__":{"k":"v"},
            "a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]},
            "b":{"dtype":"BF16","shape":[2],"data_offsets":[16,20]},
            "c":{"dtype":"F16","shape":[2],"data_offsets":[20,24]}}"#;
        let mut payload: Vec<u8> = [1.0f32, -2.0, 3.5, 0.1].map(f32::to_le_bytes).concat();
        payload.extend(
            [1.5f32, -3.0]
                .map(|x| bf16::from_f32(x).to_le_bytes())
                .concat(),
        );
        payload.extend(
            [0.25f32, 6e-8]
                .map(|x| f16::from_f32(x).to_le_bytes())
                .concat(),
        );
        file(header, &payload)
    }

    #[test]
    fn tensors_and_rows_are_read() {
        let scratch = Scratch::new("tensors");
        let path = scratch.join("x.safetensors");
        fs::write(&path, good()).unwrap();
        let tensors = TensorFile::open(&path).unwrap();
        assert_eq!(tensors.metadata()["k"], "v");
        assert_eq!(tensors.floats("a").unwrap(), [1.0, -2.0, 3.5, 0.1]);
        assert_eq!(tensors.float_rows("a", 1..2).unwrap(), [3.5, 0.1]);
        assert_eq!(tensors.floats("b").unwrap(), [1.5, -3.0]);
        assert_eq!(tensors.floats("c").unwrap(), [0.25, 2.0f32.powi(-24)]);
        assert!(tensors.float_rows("a", 1..3).is_err());
        let missing = tensors.floats("d").unwrap_err().to_string();
        assert!(missing.contains("x.safetensors") && missing.contains("tensor d"));
        tensors.expect("b", &[Dtype::BF16], &[2]).unwrap();
        assert!(tensors.expect("b", &[Dtype::F32], &[2]).is_err());
        assert!(tensors.expect("b", &[Dtype::BF16], &[1, 2]).is_err());
    }

    #[test]
    fn every_cut_and_every_surplus_byte_is_refused() {
        let scratch = Scratch::new("tensors-cut");
        let path = scratch.join("x.safetensors");
        let good = good();
        for length in 0..good.len() {
            fs::write(&path, &good[..length]).unwrap();
            let error = TensorFile::open(&path).unwrap_err();
            assert!(matches!(error, IoError::Damaged { .. }), "{error}");
        }
        let longer = [good.as_slice(), &[0]].concat();
        fs::write(&path, longer).unwrap();
        assert!(TensorFile::open(&path).is_err());
    }

    #[test]
    fn bad_headers_are_refused() {
        let scratch = Scratch::new("tensors-bad");
        let path = scratch.join("x.safetensors");
        let entry = |shape: &str, from: u64, to: u64| {
            let text =
                format!(r#"{{"a":{{"dtype":"U8","shape":{shape},"data_offsets":[{from},{to}]}}}}"#);
            file(&text, &[0; 8])
        };
        for bytes in [
            entry("[9]", 0, 8),
            entry("[8]", 1, 8),
            entry("[4294967296,4294967296,8]", 0, 8),
            entry("[-8]", 0, 8),
            file("{}", &[0; 8]),
            file("nonsense", &[0; 8]),
            u64::MAX.to_le_bytes().repeat(2),
        ] {
            fs::write(&path, &bytes).unwrap();
            assert!(TensorFile::open(&path).is_err());
        }
        fs::write(&path, entry("[8]", 0, 8)).unwrap();
        TensorFile::open(&path).unwrap();
    }
}
