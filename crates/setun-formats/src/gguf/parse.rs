//! Reading the start of a GGUF file.
//!
//! The bytes come from a stranger. Every count is checked against a limit and against
//! the length of the file before anything is allocated for it; nothing recurses, and
//! each byte is looked at once.

use super::layout::{ListedTensor, align, place, tensor_type};
use super::value::{ARRAY_ID, STRING_ID, quoted};
use super::{ALIGNMENT_KEY, DEFAULT_ALIGNMENT, MAGIC};
use super::{GgufArray, GgufError, GgufHeader, GgufLimits, GgufNumbers, GgufScalar, GgufValue};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

/// Most dimensions of a tensor, as in ggml.
const MAX_DIMS: u32 = 4;

impl GgufHeader {
    /// Reads the header of a file of `file_len` bytes from its first bytes.
    ///
    /// Checks that names and keys are unique and every payload lies within the file,
    /// behind the one before it, aligned. Of tensors with the id of `Q2_0` it says which
    /// of two layouts they have; see [`GgufType::LegacyQ2_0`](super::GgufType).
    ///
    /// # Errors
    /// [`GgufError::NeedMore`] where `prefix` ends within the header; read more and call
    /// again, with at least twice as much each time to stay linear.
    /// [`GgufError::Truncated`] where the file does. Everything that is not so.
    pub fn parse(prefix: &[u8], file_len: u64, limits: &GgufLimits) -> Result<Self, GgufError> {
        let mut reader = Reader::new(prefix, file_len, limits);
        let (num_tensors, num_entries) = reader.counts()?;
        let mut metadata = BTreeMap::new();
        for index in 0..num_entries {
            let (key, value) = reader.entry(index)?;
            if metadata.contains_key(&key) {
                let (what, name) = ("metadata key", key);
                return Err(GgufError::Duplicate { what, name });
            }
            metadata.insert(key, value);
        }
        let alignment = alignment(&metadata, limits)?;
        let mut tensors = Vec::new();
        let mut names = BTreeSet::new();
        for index in 0..num_tensors {
            let tensor = reader.tensor(index)?;
            if !names.insert(tensor.name.clone()) {
                let (what, name) = ("tensor", tensor.name);
                return Err(GgufError::Duplicate { what, name });
            }
            tensors.push(tensor);
        }
        let data_offset = reader.padding(alignment, tensors.is_empty())?;
        let tensors = place(tensors, data_offset, alignment, file_len)?;
        Ok(Self {
            metadata,
            tensors,
            data_offset,
        })
    }
}

/// `general.alignment`, or the default.
fn alignment(
    metadata: &BTreeMap<String, GgufValue>,
    limits: &GgufLimits,
) -> Result<u32, GgufError> {
    let max = limits.max_alignment;
    match metadata.get(ALIGNMENT_KEY) {
        None => Ok(DEFAULT_ALIGNMENT),
        Some(&GgufValue::U32(n)) if n.is_power_of_two() && (8..=max).contains(&n) => Ok(n),
        Some(other) => {
            let expected = format!("a power of two from 8 to {max}, as u32");
            Err(GgufError::bad_value(ALIGNMENT_KEY, other, expected))
        }
    }
}

/// What is being read, for messages.
#[derive(Clone, Copy)]
enum Place<'a> {
    FileHeader,
    Key(u64),
    Value(&'a str),
    TensorName(u64),
    Tensor(&'a str),
    Padding,
}

impl fmt::Display for Place<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::FileHeader => write!(f, "the file header"),
            Self::Key(index) => write!(f, "metadata key {index}"),
            Self::Value(key) => write!(f, "metadata key `{key}`"),
            Self::TensorName(index) => write!(f, "the name of tensor {index}"),
            Self::Tensor(name) => write!(f, "tensor `{name}`"),
            Self::Padding => write!(f, "the padding in front of the tensors"),
        }
    }
}

/// Takes bytes from the front of a file.
struct Reader<'a> {
    prefix: &'a [u8],
    position: usize,
    file_len: u64,
    limits: &'a GgufLimits,
}

impl<'a> Reader<'a> {
    fn new(prefix: &'a [u8], file_len: u64, limits: &'a GgufLimits) -> Self {
        let within = usize::try_from(file_len).unwrap_or(usize::MAX);
        Self {
            prefix: &prefix[..prefix.len().min(within)],
            position: 0,
            file_len,
            limits,
        }
    }

    /// Magic and version; then the numbers of tensors and of metadata entries.
    fn counts(&mut self) -> Result<(u64, u64), GgufError> {
        let place = Place::FileHeader;
        let magic = self.take(4, place)?;
        if magic != MAGIC {
            let found = String::from_utf8_lossy(magic).into_owned();
            return Err(GgufError::NotGguf { found });
        }
        let found = self.u32(place)?;
        if !matches!(found, 2 | 3) {
            return Err(GgufError::Version { found });
        }
        let (num_tensors, num_entries) = (self.u64(place)?, self.u64(place)?);
        let limits = self.limits;
        check_limit(num_tensors, "tensors", limits.max_tensors, place)?;
        check_limit(
            num_entries,
            "metadata entries",
            limits.max_metadata_entries,
            place,
        )?;
        Ok((num_tensors, num_entries))
    }

    /// One metadata key and its value.
    fn entry(&mut self, index: u64) -> Result<(String, GgufValue), GgufError> {
        let key = self.name(self.limits.max_key_bytes, Place::Key(index))?;
        let id = self.u32(Place::Value(&key))?;
        let value = match id {
            STRING_ID => GgufValue::String(self.string(Place::Value(&key))?),
            ARRAY_ID => GgufValue::Array(self.array(&key)?),
            id => {
                let scalar = scalar(&key, id)?;
                let bytes = self.take(scalar.num_bytes() as u64, Place::Value(&key))?;
                scalar.read(bytes).ok_or_else(|| no_truth(&key))?
            }
        };
        Ok((key, value))
    }

    fn array(&mut self, key: &str) -> Result<GgufArray, GgufError> {
        let place = Place::Value(key);
        let id = self.u32(place)?;
        let len = self.u64(place)?;
        check_limit(len, "elements", self.limits.max_array_len, place)?;
        if id != STRING_ID {
            let scalar = scalar(key, id)?;
            let bytes = self.take(len.saturating_mul(scalar.num_bytes() as u64), place)?;
            let numbers = GgufNumbers::new(scalar, bytes).ok_or_else(|| no_truth(key))?;
            return Ok(GgufArray::Numbers(numbers));
        }
        // A string takes at least the eight bytes of its length.
        self.end_of(len.saturating_mul(8), place)?;
        let mut strings = Vec::with_capacity(len as usize);
        for _ in 0..len {
            strings.push(self.string(place)?);
        }
        Ok(GgufArray::Strings(strings))
    }

    /// One line of the tensor list.
    fn tensor(&mut self, index: u64) -> Result<ListedTensor, GgufError> {
        let name = self.name(self.limits.max_tensor_name_bytes, Place::TensorName(index))?;
        let place = Place::Tensor(&name);
        let bad = |why: String| GgufError::BadTensor {
            name: name.clone(),
            why,
        };
        let num_dims = self.u32(place)?;
        if !(1..=MAX_DIMS).contains(&num_dims) {
            return Err(bad(format!("{num_dims} dimensions, not 1 to {MAX_DIMS}")));
        }
        let mut shape = Vec::new();
        for _ in 0..num_dims {
            let n = self.u64(place)?;
            let n = usize::try_from(n).ok().filter(|&n| n > 0);
            shape.push(n.ok_or_else(|| bad("a dimension is zero or too large".to_owned()))?);
        }
        shape.reverse();
        let id = self.u32(place)?;
        let offset = self.u64(place)?;
        let ggml_type = tensor_type(&name, id)?;
        Ok(ListedTensor {
            name,
            shape,
            ggml_type,
            offset,
        })
    }

    /// The zeros in front of the payloads; returns where these start. A file without
    /// tensors may end before.
    fn padding(&mut self, alignment: u32, no_tensors: bool) -> Result<u64, GgufError> {
        let position = self.position as u64;
        let data_offset = align(position, alignment).unwrap_or(u64::MAX);
        let mut len = data_offset - position;
        if no_tensors {
            len = len.min(self.file_len - position);
        }
        let padding = self.take(len, Place::Padding)?;
        match padding.iter().all(|&byte| byte == 0) {
            true => Ok(data_offset),
            false => Err(GgufError::Padding),
        }
    }

    /// A key or a tensor's name: printable ASCII without spaces.
    fn name(&mut self, max: u64, place: Place) -> Result<String, GgufError> {
        let len = self.u64(place)?;
        check_limit(len, "bytes", max, place)?;
        let bytes = self.take(len, place)?;
        let name = String::from_utf8_lossy(bytes);
        if name.is_empty() || !name.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(GgufError::BadName {
                place: place.to_string(),
                found: quoted(&name),
                rule: "printable ASCII without spaces",
            });
        }
        Ok(name.into_owned())
    }

    fn string(&mut self, place: Place) -> Result<String, GgufError> {
        let len = self.u64(place)?;
        check_limit(
            len,
            "bytes in a string",
            self.limits.max_string_bytes,
            place,
        )?;
        let bytes = self.take(len, place)?;
        let text = std::str::from_utf8(bytes);
        let not_text = |_| GgufError::NotText {
            place: place.to_string(),
        };
        text.map(str::to_owned).map_err(not_text)
    }

    fn u32(&mut self, place: Place) -> Result<u32, GgufError> {
        let b = self.take(4, place)?;
        Ok(u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
    }

    fn u64(&mut self, place: Place) -> Result<u64, GgufError> {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(self.take(8, place)?);
        Ok(u64::from_le_bytes(bytes))
    }

    /// The next `len` bytes, exactly.
    fn take(&mut self, len: u64, place: Place) -> Result<&'a [u8], GgufError> {
        let end = self.end_of(len, place)?;
        let bytes = &self.prefix[self.position..end];
        self.position = end;
        Ok(bytes)
    }

    /// Where the next `len` bytes end, if the prefix has them.
    fn end_of(&self, len: u64, place: Place) -> Result<usize, GgufError> {
        let end = (self.position as u64).saturating_add(len);
        if end > self.file_len {
            return Err(GgufError::Truncated {
                place: place.to_string(),
                end,
                file_len: self.file_len,
            });
        }
        check_limit(end, "bytes", self.limits.max_header_bytes, place)?;
        match usize::try_from(end) {
            Ok(end) if end <= self.prefix.len() => Ok(end),
            _ => Err(GgufError::NeedMore { at_least: end }),
        }
    }
}

fn check_limit(found: u64, what: &'static str, max: u64, place: Place) -> Result<(), GgufError> {
    if found <= max {
        return Ok(());
    }
    Err(GgufError::TooLarge {
        place: place.to_string(),
        what,
        found,
        max,
    })
}

/// The kind of number with this id.
fn scalar(key: &str, found: u32) -> Result<GgufScalar, GgufError> {
    GgufScalar::from_id(found).ok_or_else(|| GgufError::ValueType {
        key: key.to_owned(),
        found,
        why: match found {
            ARRAY_ID => "arrays of arrays are not read, and no Qwen3 file has them",
            _ => "there is no such type; the file is damaged",
        },
    })
}

fn no_truth(key: &str) -> GgufError {
    GgufError::BadValue {
        key: key.to_owned(),
        found: "a truth value above 1".to_owned(),
        expected: "0 or 1".to_owned(),
    }
}
