//! Metadata values: eleven kinds of numbers, strings, and arrays of one of them.

use std::fmt;

/// Id of a string in the file.
pub(super) const STRING_ID: u32 = 8;
/// Id of an array in the file.
pub(super) const ARRAY_ID: u32 = 9;

/// Kind of a number, or a truth value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // The names say it.
pub enum GgufScalar {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    U64,
    I64,
    F64,
}

impl GgufScalar {
    const ALL: [Self; 11] = [
        Self::U8,
        Self::I8,
        Self::U16,
        Self::I16,
        Self::U32,
        Self::I32,
        Self::F32,
        Self::Bool,
        Self::U64,
        Self::I64,
        Self::F64,
    ];

    pub(super) fn from_id(id: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|scalar| scalar.id() == id)
    }

    /// Id in the file; 8 and 9 are strings and arrays.
    pub(super) fn id(self) -> u32 {
        match self {
            Self::U8 => 0,
            Self::I8 => 1,
            Self::U16 => 2,
            Self::I16 => 3,
            Self::U32 => 4,
            Self::I32 => 5,
            Self::F32 => 6,
            Self::Bool => 7,
            Self::U64 => 10,
            Self::I64 => 11,
            Self::F64 => 12,
        }
    }

    /// Bytes of one.
    pub fn num_bytes(self) -> usize {
        match self {
            Self::U8 | Self::I8 | Self::Bool => 1,
            Self::U16 | Self::I16 => 2,
            Self::U32 | Self::I32 | Self::F32 => 4,
            Self::U64 | Self::I64 | Self::F64 => 8,
        }
    }

    /// The value of [`num_bytes`](Self::num_bytes) bytes; `None` for another number of
    /// bytes, and for a truth value other than 0 and 1.
    pub(super) fn read(self, bytes: &[u8]) -> Option<GgufValue> {
        if bytes.len() != self.num_bytes() {
            return None;
        }
        // Little-endian, with the sign or zeros in front.
        let mut wide = [0; 8];
        wide[..bytes.len()].copy_from_slice(bytes);
        let bits = u64::from_le_bytes(wide);
        Some(match self {
            Self::U8 => GgufValue::U8(bits as u8),
            Self::I8 => GgufValue::I8(bits as i8),
            Self::U16 => GgufValue::U16(bits as u16),
            Self::I16 => GgufValue::I16(bits as i16),
            Self::U32 => GgufValue::U32(bits as u32),
            Self::I32 => GgufValue::I32(bits as i32),
            Self::F32 => GgufValue::F32(f32::from_bits(bits as u32)),
            Self::Bool if bits > 1 => return None,
            Self::Bool => GgufValue::Bool(bits == 1),
            Self::U64 => GgufValue::U64(bits),
            Self::I64 => GgufValue::I64(bits as i64),
            Self::F64 => GgufValue::F64(f64::from_bits(bits)),
        })
    }
}

/// Numbers of one kind, as they stand in the file.
#[derive(Clone, PartialEq, Eq)]
pub struct GgufNumbers {
    scalar: GgufScalar,
    bytes: Vec<u8>,
}

impl GgufNumbers {
    /// An array of i32.
    pub fn from_i32s(values: &[i32]) -> Self {
        let bytes = values.iter().flat_map(|value| value.to_le_bytes());
        let (scalar, bytes) = (GgufScalar::I32, bytes.collect());
        Self { scalar, bytes }
    }

    /// `None` unless `bytes` are whole values of the kind.
    pub(super) fn new(scalar: GgufScalar, bytes: &[u8]) -> Option<Self> {
        let whole = bytes.len().is_multiple_of(scalar.num_bytes());
        let truths = scalar != GgufScalar::Bool || bytes.iter().all(|&byte| byte <= 1);
        let bytes = bytes.to_vec();
        (whole && truths).then_some(Self { scalar, bytes })
    }

    /// Kind of the elements.
    pub fn scalar(&self) -> GgufScalar {
        self.scalar
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.bytes.len() / self.scalar.num_bytes()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// The elements in order.
    pub fn iter(&self) -> impl Iterator<Item = GgufValue> {
        let values = self.bytes.chunks_exact(self.scalar.num_bytes());
        values.filter_map(|bytes| self.scalar.read(bytes))
    }

    /// The elements, if they are i32.
    pub fn to_i32s(&self) -> Option<Vec<i32>> {
        let value = |b: &[u8]| i32::from_le_bytes([b[0], b[1], b[2], b[3]]);
        (self.scalar == GgufScalar::I32).then(|| self.bytes.chunks_exact(4).map(value).collect())
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

impl fmt::Debug for GgufNumbers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {:?}", self.len(), self.scalar)
    }
}

/// An array; GGUF's arrays of arrays are not read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GgufArray {
    /// Of numbers or truth values.
    Numbers(GgufNumbers),
    /// Of strings.
    Strings(Vec<String>),
}

impl GgufArray {
    /// Number of elements.
    pub fn len(&self) -> usize {
        match self {
            Self::Numbers(numbers) => numbers.len(),
            Self::Strings(strings) => strings.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A metadata value.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)] // The names say it.
pub enum GgufValue {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    U64(u64),
    I64(i64),
    F64(f64),
    String(String),
    Array(GgufArray),
}

impl GgufValue {
    /// A whole number of any kind that is not negative.
    pub fn as_u64(&self) -> Option<u64> {
        match *self {
            Self::U8(value) => Some(value.into()),
            Self::U16(value) => Some(value.into()),
            Self::U32(value) => Some(value.into()),
            Self::U64(value) => Some(value),
            Self::I8(value) => value.try_into().ok(),
            Self::I16(value) => value.try_into().ok(),
            Self::I32(value) => value.try_into().ok(),
            Self::I64(value) => value.try_into().ok(),
            _ => None,
        }
    }

    /// The strings of an array.
    pub fn as_strings(&self) -> Option<&[String]> {
        match self {
            Self::Array(GgufArray::Strings(strings)) => Some(strings),
            _ => None,
        }
    }
}

/// For people: strings in quotes, long values cut.
impl fmt::Display for GgufValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::U8(value) => value.fmt(f),
            Self::I8(value) => value.fmt(f),
            Self::U16(value) => value.fmt(f),
            Self::I16(value) => value.fmt(f),
            Self::U32(value) => value.fmt(f),
            Self::I32(value) => value.fmt(f),
            Self::F32(value) => write!(f, "{value:?}"),
            Self::Bool(value) => value.fmt(f),
            Self::U64(value) => value.fmt(f),
            Self::I64(value) => value.fmt(f),
            Self::F64(value) => write!(f, "{value:?}"),
            Self::String(text) => f.write_str(&quoted(text)),
            Self::Array(array) => {
                const SHOWN: usize = 5;
                let first: Vec<String> = match array {
                    GgufArray::Numbers(numbers) => numbers
                        .iter()
                        .take(SHOWN)
                        .map(|value| value.to_string())
                        .collect(),
                    GgufArray::Strings(strings) => {
                        strings.iter().take(SHOWN).map(|s| quoted(s)).collect()
                    }
                };
                let more = if array.len() > SHOWN { ", ..." } else { "" };
                write!(f, "[{}{more}] ({} values)", first.join(", "), array.len())
            }
        }
    }
}

/// `text` in quotes, escaped, cut to what fits into a line.
pub(super) fn quoted(text: &str) -> String {
    const MAX_CHARS: usize = 60;
    match text.char_indices().nth(MAX_CHARS) {
        Some((end, _)) => format!("{:?}...", &text[..end]),
        None => format!("{text:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_read_as_they_were_written() {
        let numbers = GgufNumbers::from_i32s(&[-1, 7, i32::MIN]);
        assert_eq!(numbers.to_i32s(), Some(vec![-1, 7, i32::MIN]));
        let values: Vec<GgufValue> = numbers.iter().collect();
        assert_eq!(values[0], GgufValue::I32(-1));
        assert_eq!(numbers.len(), 3);
        assert_eq!(
            GgufNumbers::new(GgufScalar::U8, &[1, 2]).unwrap().to_i32s(),
            None
        );
        assert!(GgufNumbers::new(GgufScalar::U32, &[0; 6]).is_none());
        assert!(GgufNumbers::new(GgufScalar::Bool, &[0, 1, 2]).is_none());
        assert_eq!(GgufScalar::I8.read(&[0xff]), Some(GgufValue::I8(-1)));
        assert_eq!(
            GgufScalar::I16.read(&[0xfe, 0xff]),
            Some(GgufValue::I16(-2))
        );
        assert_eq!(GgufScalar::Bool.read(&[2]), None);
        assert_eq!(GgufScalar::F64.read(&[0; 4]), None);
    }

    #[test]
    fn only_whole_numbers_that_are_not_negative_are_counts() {
        assert_eq!(GgufValue::I64(3).as_u64(), Some(3));
        assert_eq!(GgufValue::I8(-3).as_u64(), None);
        assert_eq!(GgufValue::F32(3.0).as_u64(), None);
        assert_eq!(GgufValue::Bool(true).as_u64(), None);
    }

    #[test]
    fn long_values_are_shown_in_part() {
        let text = GgufValue::String("é".repeat(100));
        assert_eq!(text.to_string(), format!("\"{}\"...", "é".repeat(60)));
        let numbers = GgufNumbers::from_i32s(&[1, 2, 3, 4, 5, 6]);
        let array = GgufValue::Array(GgufArray::Numbers(numbers));
        assert_eq!(array.to_string(), "[1, 2, 3, 4, 5, ...] (6 values)");
        assert_eq!(GgufValue::F32(1e-6).to_string(), "1e-6");
    }
}
