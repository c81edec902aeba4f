//! Safetensors files: eight bytes of length, a JSON header, the payload.

use crate::exhibit::{Exhibit, Item};
use crate::specimen::Parts;

/// A file with this header and a payload of zeros.
fn raw(header: impl AsRef<[u8]>, payload_bytes: usize) -> Vec<u8> {
    let header = header.as_ref();
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header);
    bytes.resize(bytes.len() + payload_bytes, 0);
    bytes
}

/// A file whose header claims `length` bytes.
fn claiming(length: u64) -> Vec<u8> {
    let mut bytes = one(&entry("U8", "[8]", "0,8"));
    bytes[..8].copy_from_slice(&length.to_le_bytes());
    bytes
}

fn entry(dtype: &str, shape: &str, offsets: &str) -> String {
    format!(r#"{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{offsets}]}}"#)
}

/// One tensor `a`, and eight bytes of payload.
fn one(entry: &str) -> Vec<u8> {
    raw(format!(r#"{{"a":{entry}}}"#), 8)
}

/// A good tensor `a` of four bytes, then `b`, and eight bytes of payload.
fn two(entry_b: &str) -> Vec<u8> {
    let a = entry("U8", "[4]", "0,4");
    raw(format!(r#"{{"a":{a},"b":{entry_b}}}"#), 8)
}

pub fn good() -> Vec<Item> {
    let bytes = [
        one(&entry("U8", "[8]", "0,8")),
        two(&entry("F16", "[2]", "4,8")),
        raw("{}", 0),
        Parts::dense().bytes(),
        Parts::packed().bytes(),
    ];
    bytes.into_iter().map(Item::SafeTensors).collect()
}

pub fn exhibits() -> Vec<Exhibit> {
    let mut all = lengths();
    all.extend(headers());
    all.extend(names());
    all.extend(entries());
    all.extend(offsets());
    all
}

fn exhibit(
    name: &'static str,
    wrong: &'static str,
    words: &'static [&'static str],
    bytes: Vec<u8>,
) -> Exhibit {
    Exhibit::new(name, wrong, words, Item::SafeTensors(bytes))
}

fn lengths() -> Vec<Exhibit> {
    let good = one(&entry("U8", "[8]", "0,8"));
    let header_end = good.len() - 8;
    vec![
        exhibit("empty", "no bytes at all", &["0 bytes"], Vec::new()),
        exhibit(
            "seven-bytes",
            "cut inside the length",
            &["7 bytes"],
            good[..7].to_vec(),
        ),
        exhibit(
            "length-only",
            "cut behind the length",
            &["but 0 follow"],
            good[..8].to_vec(),
        ),
        exhibit(
            "cut-header",
            "cut inside the header",
            &["header claims", "follow"],
            good[..header_end - 3].to_vec(),
        ),
        exhibit(
            "no-payload",
            "cut behind the header",
            &["but 0 follow"],
            good[..header_end].to_vec(),
        ),
        exhibit(
            "cut-payload",
            "the last byte is gone",
            &["end at byte 8, but 7"],
            good[..good.len() - 1].to_vec(),
        ),
        exhibit(
            "trailing-byte",
            "a byte behind the last tensor",
            &["end at byte 8, but 9"],
            {
                let mut bytes = good.clone();
                bytes.push(0);
                bytes
            },
        ),
        exhibit(
            "header-2-60",
            "a header of 2^60 bytes",
            &["1152921504606846976"],
            claiming(1 << 60),
        ),
        exhibit(
            "header-2-64",
            "a header of 2^64 - 1 bytes",
            &["18446744073709551615"],
            claiming(u64::MAX),
        ),
        exhibit(
            "header-one-over",
            "a header over the cap",
            &["16777217"],
            claiming((16 << 20) + 1),
        ),
        exhibit(
            "header-all-of-it",
            "the header claims the payload as well, and one byte more",
            &["header claims", "follow"],
            claiming(good.len() as u64 - 7),
        ),
        exhibit(
            "header-zero",
            "a header of no bytes",
            &["begin with {"],
            claiming(0),
        ),
        exhibit(
            "huge-real-header",
            "a header over the cap that is really there",
            &["header claims 16777232 bytes"],
            raw(" ".repeat((16 << 20) + 16), 0),
        ),
        exhibit(
            "big-endian",
            "the length in the other byte order",
            &["header claims"],
            {
                let mut bytes = good.clone();
                bytes[..8].reverse();
                bytes
            },
        ),
    ]
}

fn headers() -> Vec<Exhibit> {
    let a = entry("U8", "[8]", "0,8");
    vec![
        exhibit(
            "html",
            "a web page",
            &["header claims"],
            b"<!DOCTYPE html><html></html>".to_vec(),
        ),
        exhibit(
            "not-json",
            "a header of words",
            &["begin with {"],
            raw("tensors, many of them", 0),
        ),
        exhibit(
            "array",
            "a header that is a list",
            &["begin with {"],
            raw("[]", 0),
        ),
        exhibit(
            "null",
            "a header that is null",
            &["begin with {"],
            raw("null", 0),
        ),
        exhibit(
            "space-first",
            "a space before the header",
            &["begin with {"],
            raw(format!(" {{\"a\":{a}}}"), 8),
        ),
        exhibit(
            "byte-order-mark",
            "a mark before the header",
            &["begin with {"],
            raw(format!("\u{feff}{{\"a\":{a}}}"), 8),
        ),
        exhibit(
            "cut-json",
            "a header that does not close",
            &["not valid", "EOF"],
            raw(format!("{{\"a\":{a}"), 8),
        ),
        exhibit(
            "two-values",
            "a second value in the header",
            &["not valid", "trailing"],
            raw(format!("{{\"a\":{a}}}{{}}"), 8),
        ),
        exhibit(
            "nul-padding",
            "zeros behind the header",
            &["not valid", "trailing"],
            raw(format!("{{\"a\":{a}}}\0\0\0"), 8),
        ),
        exhibit(
            "bad-utf8",
            "a name that is not UTF-8",
            &["not UTF-8", "index 2"],
            {
                let mut header = b"{\"\xff\xfe\":".to_vec();
                header.extend(a.as_bytes());
                header.push(b'}');
                raw(header, 8)
            },
        ),
        exhibit(
            "half-surrogate",
            "half of a surrogate pair",
            &["not valid"],
            raw(format!("{{\"\\ud800\":{a}}}"), 8),
        ),
        exhibit(
            "depth-bomb",
            "a million nested lists",
            &["recursion limit"],
            raw(format!("{{\"a\":{}", "[".repeat(1 << 20)), 8),
        ),
        exhibit(
            "object-bomb",
            "a million nested objects",
            &["recursion limit"],
            raw("{\"a\":".repeat(1 << 20), 8),
        ),
        exhibit(
            "metadata-number",
            "metadata that is no text",
            &["__metadata__", "string"],
            raw(format!("{{\"__metadata__\":{{\"k\":1}},\"a\":{a}}}"), 8),
        ),
        exhibit(
            "metadata-list",
            "metadata that is a list",
            &["__metadata__", "map"],
            raw(format!("{{\"__metadata__\":[],\"a\":{a}}}"), 8),
        ),
        exhibit(
            "metadata-nested",
            "metadata inside metadata",
            &["__metadata__", "string"],
            raw(format!("{{\"__metadata__\":{{\"k\":{{}}}},\"a\":{a}}}"), 8),
        ),
    ]
}

fn names() -> Vec<Exhibit> {
    let a = entry("U8", "[8]", "0,8");
    vec![
        exhibit(
            "same-name",
            "two tensors of one name",
            &["\"a\" occurs twice"],
            raw(format!("{{\"a\":{a},\"a\":{a}}}"), 8),
        ),
        exhibit(
            "same-name-escaped",
            "one name in two spellings",
            &["\"a\" occurs twice"],
            raw(format!("{{\"a\":{a},\"\\u0061\":{a}}}"), 8),
        ),
        exhibit(
            "same-metadata",
            "a metadata key twice",
            &["\"k\" occurs twice"],
            raw(
                format!("{{\"__metadata__\":{{\"k\":\"1\",\"k\":\"2\"}},\"a\":{a}}}"),
                8,
            ),
        ),
        exhibit(
            "two-metadata",
            "metadata twice",
            &["\"__metadata__\" occurs twice"],
            raw(
                format!("{{\"__metadata__\":{{}},\"__metadata__\":{{}},\"a\":{a}}}"),
                8,
            ),
        ),
        exhibit(
            "two-dtypes",
            "a type twice",
            &["\"dtype\" occurs twice"],
            one(r#"{"dtype":"U8","dtype":"I8","shape":[8],"data_offsets":[0,8]}"#),
        ),
        exhibit(
            "long-name",
            "a name of a megabyte, and no tensor",
            &["invalid type"],
            raw(format!("{{\"{}\":7}}", "x".repeat(1 << 20)), 0),
        ),
    ]
}

fn entries() -> Vec<Exhibit> {
    let in_a: &[&str] = &["tensor \"a\""];
    vec![
        exhibit(
            "unknown-dtype",
            "a type that does not exist",
            &["tensor \"a\"", "F33"],
            one(&entry("F33", "[8]", "0,8")),
        ),
        exhibit(
            "empty-dtype",
            "a type without a name",
            in_a,
            one(&entry("", "[8]", "0,8")),
        ),
        exhibit(
            "lower-dtype",
            "a type in lower case",
            &["tensor \"a\"", "u8"],
            one(&entry("u8", "[8]", "0,8")),
        ),
        exhibit(
            "number-dtype",
            "a type that is a number",
            in_a,
            one(r#"{"dtype":8,"shape":[8],"data_offsets":[0,8]}"#),
        ),
        exhibit(
            "no-dtype",
            "no type",
            &["tensor \"a\"", "dtype"],
            one(r#"{"shape":[8],"data_offsets":[0,8]}"#),
        ),
        exhibit(
            "no-shape",
            "no shape",
            &["tensor \"a\"", "shape"],
            one(r#"{"dtype":"U8","data_offsets":[0,8]}"#),
        ),
        exhibit(
            "no-offsets",
            "no offsets",
            &["tensor \"a\"", "data_offsets"],
            one(r#"{"dtype":"U8","shape":[8]}"#),
        ),
        exhibit("null-entry", "a tensor that is null", in_a, one("null")),
        exhibit("text-entry", "a tensor that is a text", in_a, one("\"x\"")),
        exhibit(
            "negative-size",
            "a negative size",
            &["tensor \"a\"", "-8"],
            one(&entry("U8", "[-8]", "0,8")),
        ),
        exhibit(
            "fraction-size",
            "a size of 8.5",
            &["tensor \"a\"", "8.5"],
            one(&entry("U8", "[8.5]", "0,8")),
        ),
        exhibit(
            "size-over-64-bits",
            "a size of 2^64",
            in_a,
            one(&entry("U8", "[18446744073709551616]", "0,8")),
        ),
        exhibit(
            "text-shape",
            "a shape that is a text",
            in_a,
            one(&entry("U8", "\"8\"", "0,8")),
        ),
        exhibit(
            "nested-shape",
            "a shape in a shape",
            in_a,
            one(&entry("U8", "[[8]]", "0,8")),
        ),
        exhibit(
            "shape-wraps-to-0",
            "2^32 x 2^32 wraps to 0",
            &["tensor \"b\"", "overflows"],
            two(&entry("U8", "[4294967296,4294967296]", "4,4")),
        ),
        exhibit(
            "bytes-wrap-to-0",
            "2^61 x 8 bytes wrap to 0",
            &["tensor \"b\"", "overflows"],
            two(&entry("F64", "[2305843009213693952]", "4,4")),
        ),
        exhibit(
            "zero-hides-overflow",
            "0 behind an overflow",
            &["tensor \"b\"", "overflows"],
            two(&entry("U8", "[4294967296,4294967296,0]", "4,4")),
        ),
        exhibit(
            "half-a-byte",
            "three 4-bit numbers",
            &["tensor \"a\"", "whole bytes"],
            one(&entry("F4", "[3]", "0,8")),
        ),
        exhibit(
            "shape-too-large",
            "more elements than bytes",
            &["tensor \"a\"", "needs 9 bytes"],
            one(&entry("U8", "[9]", "0,8")),
        ),
        exhibit(
            "shape-too-small",
            "fewer elements than bytes",
            &["tensor \"a\"", "needs 7 bytes"],
            one(&entry("U8", "[7]", "0,8")),
        ),
        exhibit(
            "scalar-of-8",
            "a scalar with eight bytes",
            &["tensor \"a\"", "needs 4 bytes"],
            one(&entry("F32", "[]", "0,8")),
        ),
        exhibit(
            "million-sizes",
            "a shape of a million ones",
            &["tensor \"a\"", "needs 1 bytes"],
            one(&entry("U8", &format!("[1{}]", ",1".repeat(1 << 20)), "0,8")),
        ),
    ]
}

fn offsets() -> Vec<Exhibit> {
    let in_a: &[&str] = &["tensor \"a\""];
    vec![
        exhibit(
            "reversed",
            "offsets in reverse",
            &["tensor \"a\"", "before it begins"],
            one(&entry("U8", "[8]", "8,0")),
        ),
        exhibit(
            "negative-offset",
            "a negative offset",
            &["tensor \"a\"", "-1"],
            one(&entry("U8", "[8]", "-1,7")),
        ),
        exhibit(
            "fraction-offset",
            "an offset of 0.5",
            in_a,
            one(&entry("U8", "[8]", "0.5,8.5")),
        ),
        exhibit("one-offset", "no end", in_a, one(&entry("U8", "[8]", "0"))),
        exhibit(
            "three-offsets",
            "three offsets",
            in_a,
            one(&entry("U8", "[8]", "0,8,8")),
        ),
        exhibit(
            "hole-in-front",
            "a gap before the first",
            &["tensor \"a\"", "a gap"],
            one(&entry("U8", "[7]", "1,8")),
        ),
        exhibit(
            "hole",
            "a gap between two",
            &["tensor \"b\"", "a gap"],
            two(&entry("U8", "[3]", "5,8")),
        ),
        exhibit(
            "hole-behind",
            "a gap behind the last",
            &["end at byte 7, but 8"],
            two(&entry("U8", "[3]", "4,7")),
        ),
        exhibit(
            "overlap",
            "two tensors share a byte",
            &["tensor \"b\"", "an overlap"],
            two(&entry("U8", "[5]", "3,8")),
        ),
        exhibit(
            "same-bytes",
            "two tensors share all bytes",
            &["tensor \"b\"", "an overlap"],
            two(&entry("U8", "[4]", "0,4")),
        ),
        exhibit(
            "inside",
            "one tensor inside another",
            &["an overlap"],
            two(&entry("U8", "[2]", "1,3")),
        ),
        exhibit(
            "out-of-file",
            "an end behind the file",
            &["end at byte 12, but 8"],
            two(&entry("U8", "[8]", "4,12")),
        ),
        exhibit(
            "out-of-file-2-60",
            "an end at 2^60",
            &["end at byte 1152921504606846976"],
            one(&entry(
                "U8",
                "[1152921504606846976]",
                "0,1152921504606846976",
            )),
        ),
        exhibit(
            "offset-2-64",
            "an offset over 64 bits",
            in_a,
            one(&entry("U8", "[8]", "0,18446744073709551616")),
        ),
        exhibit(
            "end-wraps",
            "an end of 2^64 - 1",
            &["tensor \"b\"", "needs 4 bytes"],
            two(&entry("U8", "[4]", "4,18446744073709551615")),
        ),
    ]
}
