//! The header of a safetensors file, checked tensor by tensor so that errors have names.

use super::{Dtype, METADATA_KEY, TensorsError};
use crate::config::json::{cut, cut_at, refuse_repeated_keys};
use serde::de::{Deserialize, Deserializer, Error, MapAccess, Visitor};
use std::collections::BTreeMap;
use std::fmt;

/// Checks the JSON header of a safetensors file with `payload_bytes` bytes behind it.
///
/// Source: the format's own rules (README of safetensors). Linear in the header's length
/// but for one sort; allocates a small multiple of it.
///
/// # Errors
/// [`TensorsError::Damaged`]: what does not begin with `{` or is no JSON, a name or key
/// that occurs twice, an entry without type, shape and offsets, an unknown type, a shape
/// whose size overflows or is not the one of the offsets, and tensors that overlap, leave
/// a gap or do not end where the payload does. The reason names the tensor.
pub fn check_header(header: &[u8], payload_bytes: u64) -> Result<(), TensorsError> {
    if header.first() != Some(&b'{') {
        return Err(damaged("its header does not begin with {"));
    }
    let not_json = |e: serde_json::Error| damaged(&format!("its header is not valid: {e}"));
    let text = std::str::from_utf8(header)
        .map_err(|e| damaged(&format!("its header is not UTF-8: {e}")))?;
    refuse_repeated_keys(header).map_err(not_json)?;
    let Header { mut tensors } = serde_json::from_str(text).map_err(not_json)?;
    tensors.sort_by(|(a, left), (b, right)| (left.data_offsets, a).cmp(&(right.data_offsets, b)));
    let mut end = 0;
    for (name, entry) in &tensors {
        let in_tensor = |problem| damaged(&format!("tensor {:?} {problem}", shown(name)));
        end = entry.check(end).map_err(in_tensor)?;
    }
    if end != payload_bytes {
        let words = format!("its tensors end at byte {end}, but {payload_bytes} follow the header");
        return Err(damaged(&words));
    }
    Ok(())
}

/// All tensors in the order of the header.
struct Header {
    tensors: Vec<(String, Entry)>,
}

#[derive(serde::Deserialize)]
struct Entry {
    dtype: Dtype,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

impl Entry {
    /// The end of this tensor, which must begin at `expected`.
    fn check(&self, expected: u64) -> Result<u64, String> {
        let (begin, end) = self.data_offsets;
        if end < begin {
            return Err(format!("ends at byte {end}, before it begins at {begin}"));
        }
        if begin != expected {
            let what = if begin > expected {
                "a gap"
            } else {
                "an overlap"
            };
            return Err(format!(
                "begins at byte {begin}, {what}: the one before it ends at {expected}"
            ));
        }
        let num_bits = self
            .shape
            .iter()
            .try_fold(1u64, |n, &size| n.checked_mul(size));
        let num_bits = num_bits.and_then(|n| n.checked_mul(self.dtype.bitsize() as u64));
        let Some(num_bits) = num_bits else {
            return Err("has a shape whose size overflows 64 bits".to_owned());
        };
        let num_bytes = num_bits / 8;
        if !num_bits.is_multiple_of(8) {
            return Err(format!("has {num_bits} bits, which are no whole bytes"));
        }
        if num_bytes != end - begin {
            return Err(format!(
                "needs {num_bytes} bytes for its type and shape, its data_offsets hold {}",
                end - begin
            ));
        }
        Ok(end)
    }
}

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(HeaderVisitor)
    }
}

struct HeaderVisitor;

impl<'de> Visitor<'de> for HeaderVisitor {
    type Value = Header;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
        let mut tensors = Vec::new();
        while let Some(name) = map.next_key::<String>()? {
            if name == METADATA_KEY {
                let read = map.next_value::<Option<BTreeMap<String, String>>>();
                read.map_err(|e| A::Error::custom(format!("{METADATA_KEY}: {e}")))?;
                continue;
            }
            let entry = map.next_value::<Entry>();
            let entry = entry.map_err(|e| {
                let name = shown(&name);
                A::Error::custom(format!("tensor {name:?}: {e}"))
            })?;
            tensors.push((name, entry));
        }
        Ok(Header { tensors })
    }
}

/// A name, cut so that the rest of a message has room too.
fn shown(name: &str) -> String {
    const MAX_CHARS: usize = 100;
    cut_at(name, MAX_CHARS)
}

fn damaged(reason: &str) -> TensorsError {
    TensorsError::Damaged {
        reason: cut(reason),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reason(header: &str, payload_bytes: u64) -> String {
        let error = check_header(header.as_bytes(), payload_bytes).unwrap_err();
        error.to_string()
    }

    fn entry(dtype: &str, shape: &str, begin: u64, end: u64) -> String {
        format!(r#"{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{begin},{end}]}}"#)
    }

    #[test]
    fn good_headers_pass_in_any_order() {
        let (a, b) = (entry("F32", "[2]", 0, 8), entry("U8", "[3]", 8, 11));
        for header in [
            format!("{{\"a\":{a},\"b\":{b}}}"),
            format!("{{\"b\":{b},\"__metadata__\":{{\"k\":\"v\"}},\"a\":{a}}}  "),
            format!(
                "{{\"a\":{a},\"empty\":{},\"b\":{b}}}",
                entry("I64", "[0,9]", 8, 8)
            ),
        ] {
            assert_eq!(check_header(header.as_bytes(), 11), Ok(()), "{header}");
        }
        assert_eq!(check_header(b"{}", 0), Ok(()));
    }

    #[test]
    fn every_refusal_names_the_tensor() {
        let two = |a: &str, b: &str| format!("{{\"a\":{a},\"b\":{b}}}");
        let good = entry("U8", "[4]", 0, 4);
        for (b, words) in [
            (entry("F33", "[4]", 4, 8), "F33"),
            (entry("U8", "[-4]", 4, 8), "-4"),
            (entry("U8", "[4]", 5, 9), "a gap"),
            (entry("U8", "[4]", 3, 7), "an overlap"),
            (entry("U8", "[4]", 8, 4), "before it begins"),
            (entry("U8", "[5]", 4, 8), "needs 5 bytes"),
            (entry("F4", "[3]", 4, 6), "no whole bytes"),
            (entry("U8", "[4294967296,4294967296]", 4, 4), "overflows"),
            (entry("F64", "[2305843009213693952]", 4, 4), "overflows"),
            ("{}".to_owned(), "dtype"),
            ("7".to_owned(), "invalid type"),
        ] {
            let reason = reason(&two(&good, &b), 8);
            assert!(reason.contains("tensor \"b\""), "{reason}");
            assert!(reason.contains(words), "{words}: {reason}");
        }
    }

    #[test]
    fn names_are_unique_and_the_payload_is_covered() {
        let a = entry("U8", "[4]", 0, 4);
        let twice = reason(&format!("{{\"a\":{a},\"a\":{a}}}"), 4);
        assert!(twice.contains("\"a\" occurs twice"), "{twice}");
        let more = reason(&format!("{{\"a\":{a}}}"), 5);
        assert!(more.contains("end at byte 4, but 5"), "{more}");
        assert!(reason(&format!(" {{\"a\":{a}}}"), 4).contains("begin with {"));
        let long = reason(&format!("{{\"{}\":7}}", "x".repeat(10_000)), 0);
        assert!(long.len() < 1000);
    }
}
