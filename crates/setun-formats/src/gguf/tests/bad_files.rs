//! Files that were put together byte by byte to be refused, each under a name.

use super::super::{GgufError, GgufHeader, GgufLimits};
use super::parse;

/// A file before it is put together.
#[derive(Clone)]
struct Raw {
    magic: [u8; 4],
    version: u32,
    num_tensors: Option<u64>,
    num_entries: Option<u64>,
    entries: Vec<Vec<u8>>,
    tensors: Vec<Vec<u8>>,
    padding: u8,
    data_len: usize,
}

impl Raw {
    /// A good file: an architecture and two tensors.
    fn good() -> Self {
        Self {
            magic: *b"GGUF",
            version: 3,
            num_tensors: None,
            num_entries: None,
            entries: vec![entry("general.architecture", 8, &text(b"qwen3"))],
            tensors: vec![
                listed("token_embd.weight", &[64, 3], 42, 0),
                listed("output_norm.weight", &[8], 0, 64),
            ],
            padding: 0,
            data_len: 96,
        }
    }

    fn with_entry(entry: Vec<u8>) -> Self {
        let mut raw = Self::good();
        raw.entries.push(entry);
        raw
    }

    /// With another list of tensors.
    fn with_tensors(tensors: &[Vec<u8>], data_len: usize) -> Self {
        Self {
            tensors: tensors.to_vec(),
            data_len,
            ..Self::good()
        }
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = self.magic.to_vec();
        bytes.extend(self.version.to_le_bytes());
        let count = |given: Option<u64>, found: &[Vec<u8>]| given.unwrap_or(found.len() as u64);
        bytes.extend(count(self.num_tensors, &self.tensors).to_le_bytes());
        bytes.extend(count(self.num_entries, &self.entries).to_le_bytes());
        bytes.extend(self.entries.concat());
        bytes.extend(self.tensors.concat());
        bytes.resize(bytes.len().next_multiple_of(32), self.padding);
        bytes.resize(bytes.len() + self.data_len, 0);
        bytes
    }
}

fn text(bytes: &[u8]) -> Vec<u8> {
    text_of_length(bytes.len() as u64, bytes)
}

fn text_of_length(length: u64, bytes: &[u8]) -> Vec<u8> {
    [&length.to_le_bytes()[..], bytes].concat()
}

fn entry(key: &str, id: u32, value: &[u8]) -> Vec<u8> {
    [&text(key.as_bytes())[..], &id.to_le_bytes(), value].concat()
}

/// An array entry.
fn array(key: &str, id: u32, length: u64, elements: &[u8]) -> Vec<u8> {
    let value = [&id.to_le_bytes()[..], &length.to_le_bytes(), elements].concat();
    entry(key, 9, &value)
}

/// A line of the tensor list; dimensions as in the file, fastest first.
fn listed(name: &str, dims: &[u64], id: u32, offset: u64) -> Vec<u8> {
    let mut bytes = text(name.as_bytes());
    bytes.extend((dims.len() as u32).to_le_bytes());
    dims.iter().for_each(|n| bytes.extend(n.to_le_bytes()));
    bytes.extend(id.to_le_bytes());
    bytes.extend(offset.to_le_bytes());
    bytes
}

/// Name of a bad file, the file, and what the refusal says.
type Exhibit = (&'static str, Raw, &'static str);

fn bad_headers() -> Vec<Exhibit> {
    let good = Raw::good;
    let changed = |change: &dyn Fn(&mut Raw)| {
        let mut raw = good();
        change(&mut raw);
        raw
    };
    vec![
        (
            "another magic",
            changed(&|r| r.magic = *b"GGML"),
            "starts with \"GGML\"",
        ),
        ("version 0", changed(&|r| r.version = 0), "version 0"),
        (
            "version 1 had other lengths",
            changed(&|r| r.version = 1),
            "version 1",
        ),
        ("version 4", changed(&|r| r.version = 4), "version 4"),
        (
            "big-endian",
            changed(&|r| r.version = 3 << 24),
            "version 50331648",
        ),
        (
            "2^64 - 1 tensors",
            changed(&|r| r.num_tensors = Some(u64::MAX)),
            "18446744073709551615 tensors",
        ),
        (
            "2^64 - 1 entries",
            changed(&|r| r.num_entries = Some(u64::MAX)),
            "18446744073709551615 metadata entries",
        ),
        (
            "tensors just above the limit",
            changed(&|r| r.num_tensors = Some((1 << 16) + 1)),
            "65537 tensors",
        ),
        (
            "more entries than there are",
            changed(&|r| r.num_entries = Some(4)),
            "metadata key",
        ),
        (
            "more tensors than there are",
            changed(&|r| r.num_tensors = Some(40)),
            "the name of tensor 2",
        ),
        (
            "fewer tensors than there are",
            changed(&|r| r.num_tensors = Some(1)),
            "the padding",
        ),
        ("dirty padding", changed(&|r| r.padding = 1), "not zero"),
        (
            "bytes behind the last tensor",
            changed(&|r| r.data_len += 1),
            "1 bytes follow",
        ),
        (
            "a last tensor cut off",
            changed(&|r| r.data_len -= 1),
            "`output_norm.weight`",
        ),
    ]
}

fn bad_keys() -> Vec<Exhibit> {
    let with = Raw::with_entry;
    let long_key = "k".repeat(257);
    vec![
        ("an empty key", with(entry("", 4, &[0; 4])), "is no name"),
        (
            "a NUL in a key",
            with(entry("a\0b", 4, &[0; 4])),
            "is no name",
        ),
        (
            "a space in a key",
            with(entry("a b", 4, &[0; 4])),
            "is no name",
        ),
        (
            "a key that is not ASCII",
            with(entry("é", 4, &[0; 4])),
            "is no name",
        ),
        (
            "a long key",
            with(entry(&long_key, 4, &[0; 4])),
            "257 bytes",
        ),
        (
            "a key of 2^64 - 1 bytes",
            with(text_of_length(u64::MAX, b"key")),
            "18446744073709551615 bytes",
        ),
        (
            "a key that goes on behind the file",
            with(text_of_length(250, b"key")),
            "but the file ends",
        ),
        (
            "a key twice",
            with(entry("general.architecture", 4, &[0; 4])),
            "`general.architecture` occurs twice",
        ),
    ]
}

fn bad_values() -> Vec<Exhibit> {
    let with = Raw::with_entry;
    vec![
        (
            "a value of type 13",
            with(entry("k", 13, &[0; 8])),
            "value type 13",
        ),
        (
            "a value of type 2^32 - 1",
            with(entry("k", u32::MAX, &[0; 8])),
            "value type 4294967295",
        ),
        ("a truth value of 2", with(entry("k", 7, &[2])), "0 or 1"),
        (
            "truth values of 2",
            with(array("k", 7, 2, &[1, 2])),
            "0 or 1",
        ),
        (
            "text that is not UTF-8",
            with(entry("k", 8, &text(&[0xff, 0xfe]))),
            "not UTF-8",
        ),
        (
            "text of 2^64 - 1 bytes",
            with(entry("k", 8, &text_of_length(u64::MAX, b"x"))),
            "18446744073709551615 bytes in a string",
        ),
        (
            "text of 2^63 bytes",
            with(entry("k", 8, &text_of_length(1 << 63, b"x"))),
            "9223372036854775808 bytes in a string",
        ),
        (
            "text just above the limit",
            with(entry("k", 8, &text_of_length((1 << 20) + 1, b"x"))),
            "1048577 bytes in a string",
        ),
        (
            "text that goes on behind the file",
            with(entry("k", 8, &text_of_length(1 << 20, b"x"))),
            "but the file ends",
        ),
    ]
}

fn bad_arrays() -> Vec<Exhibit> {
    let with = Raw::with_entry;
    vec![
        (
            "2^64 - 1 numbers",
            with(array("k", 10, u64::MAX, &[0; 8])),
            "615 elements",
        ),
        (
            "2^61 numbers, whose bytes wrap",
            with(array("k", 10, 1 << 61, &[])),
            "elements",
        ),
        (
            "numbers behind the file",
            with(array("k", 10, 1 << 21, &[])),
            "but the file ends",
        ),
        (
            "2^64 - 1 strings",
            with(array("k", 8, u64::MAX, &[])),
            "615 elements",
        ),
        (
            "strings behind the file",
            with(array("k", 8, 1 << 21, &[])),
            "but the file ends",
        ),
        (
            "a string of an array that is too long",
            with(array("k", 8, 1, &text_of_length(u64::MAX, b""))),
            "bytes in a string",
        ),
        (
            "a string of an array that is not UTF-8",
            with(array("k", 8, 2, &[text(b"a"), text(&[0x80])].concat())),
            "not UTF-8",
        ),
        (
            "elements of type 99",
            with(array("k", 99, 1, &[0; 8])),
            "value type 99",
        ),
        (
            "an array of arrays",
            with(array(
                "k",
                9,
                1,
                &[&4u32.to_le_bytes()[..], &[0; 8]].concat(),
            )),
            "arrays of arrays",
        ),
        (
            "a million nested arrays",
            with(array(
                "k",
                9,
                1,
                &[9, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0].repeat(1 << 20),
            )),
            "arrays of arrays",
        ),
    ]
}

fn bad_alignments() -> Vec<Exhibit> {
    let with = Raw::with_entry;
    let alignment = |id, value: &[u8]| with(entry("general.alignment", id, value));
    vec![
        ("alignment 0", alignment(4, &[0; 4]), "a power of two"),
        (
            "alignment 4",
            alignment(4, &4u32.to_le_bytes()),
            "a power of two",
        ),
        (
            "alignment 48",
            alignment(4, &48u32.to_le_bytes()),
            "a power of two",
        ),
        (
            "alignment 2^31",
            alignment(4, &(1u32 << 31).to_le_bytes()),
            "a power of two",
        ),
        (
            "alignment as u64",
            alignment(10, &32u64.to_le_bytes()),
            "as u32",
        ),
        ("alignment as text", alignment(8, &text(b"32")), "as u32"),
    ]
}

fn bad_names() -> Vec<Exhibit> {
    let with = |tensor: Vec<u8>| Raw::with_tensors(&[tensor], 96);
    let two =
        |first: Vec<u8>, second: Vec<u8>, data_len| Raw::with_tensors(&[first, second], data_len);
    let vector = |name: &str, offset| listed(name, &[8], 0, offset);
    vec![
        ("an empty name", with(vector("", 0)), "is no name"),
        ("a name with a NUL", with(vector("x\0", 0)), "is no name"),
        (
            "a name of 64 bytes",
            with(vector(&"n".repeat(64), 0)),
            "64 bytes",
        ),
        (
            "a name of 2^64 - 1 bytes",
            with(text_of_length(u64::MAX, b"x")),
            "18446744073709551615 bytes",
        ),
        (
            "a name twice",
            two(vector("x", 0), vector("x", 32), 64),
            "`x` occurs twice",
        ),
    ]
}

fn bad_shapes() -> Vec<Exhibit> {
    let with = |tensor: Vec<u8>| Raw::with_tensors(&[tensor], 96);
    let one = |dims: &[u64], id| with(listed("x", dims, id, 0));
    let many_dims = [&text(b"x")[..], &u32::MAX.to_le_bytes()].concat();
    vec![
        ("no dimensions", one(&[], 0), "0 dimensions"),
        ("five dimensions", one(&[1; 5], 0), "5 dimensions"),
        (
            "2^32 - 1 dimensions",
            with(many_dims),
            "4294967295 dimensions",
        ),
        ("a dimension of 0", one(&[8, 0], 0), "is zero"),
        ("rows of 0", one(&[0, 8], 42), "is zero"),
        (
            "elements that wrap to 0",
            one(&[1 << 33, 1 << 31], 0),
            "over",
        ),
        ("elements of 2^64 - 1", one(&[u64::MAX], 0), "over"),
        (
            "blocks whose bytes wrap",
            one(&[1 << 62, 1 << 10], 42),
            "over",
        ),
        (
            "rows that blocks do not divide",
            one(&[32, 2], 42),
            "do not divide",
        ),
        (
            "rows of half a large block",
            one(&[128, 2], 35),
            "do not divide",
        ),
        ("Q4_K", one(&[256], 12), "(Q4_K)"),
        ("a type that ggml removed", one(&[256], 4), "type 4,"),
        (
            "a type out of range",
            one(&[256], u32::MAX),
            "type 4294967295",
        ),
    ]
}

fn bad_offsets() -> Vec<Exhibit> {
    let with = |tensor: Vec<u8>| Raw::with_tensors(&[tensor], 96);
    let two =
        |first: Vec<u8>, second: Vec<u8>, data_len| Raw::with_tensors(&[first, second], data_len);
    let vector = |name: &str, offset| listed(name, &[8], 0, offset);
    vec![
        (
            "a first offset that is not 0",
            with(vector("x", 32)),
            "starts at byte 32",
        ),
        (
            "an unaligned offset",
            two(vector("x", 0), vector("y", 33), 128),
            "starts at byte 33",
        ),
        (
            "overlapping tensors",
            two(vector("x", 0), vector("y", 0), 64),
            "starts at byte 0",
        ),
        (
            "a gap",
            two(vector("x", 0), vector("y", 64), 96),
            "starts at byte 64",
        ),
        (
            "tensors in reverse",
            two(vector("x", 32), vector("y", 0), 64),
            "starts at byte 32",
        ),
        (
            "an offset of 2^64 - 1",
            two(vector("x", 0), vector("y", u64::MAX), 64),
            "starts at byte 18446744073709551615",
        ),
        (
            "a tensor behind the file",
            two(vector("x", 0), listed("y", &[1 << 40], 0, 32), 64),
            "`y` goes to byte",
        ),
        (
            "sizes that wrap to a small sum",
            two(
                listed("x", &[0x1fff_ffff_ffff_fff0], 0, 0),
                listed("y", &[0x1fff_ffff_ffff_fff0], 0, 0x7fff_ffff_ffff_ffc0),
                128,
            ),
            "`x` goes to byte",
        ),
        (
            "neither mainline nor legacy",
            two(listed("x", &[128, 64], 42, 0), vector("y", 2240), 2272),
            "starts at byte 2240",
        ),
        (
            "a legacy file cut off",
            two(listed("x", &[128, 64], 42, 0), vector("y", 2176), 2200),
            "`y` goes to byte",
        ),
    ]
}

#[test]
fn bad_files_are_refused_by_name() {
    let good = Raw::good();
    parse(&good.bytes()).unwrap();
    let exhibits = [
        bad_headers(),
        bad_keys(),
        bad_values(),
        bad_arrays(),
        bad_alignments(),
        bad_names(),
        bad_shapes(),
        bad_offsets(),
    ];
    let exhibits = exhibits.concat();
    assert!(exhibits.len() >= 70, "{}", exhibits.len());
    for (name, raw, expected) in exhibits {
        let bytes = raw.bytes();
        let error = match parse(&bytes) {
            Ok(header) => panic!("{name}: read as {header:?}"),
            Err(error) => error.to_string(),
        };
        assert!(error.contains(expected), "{name}: {error}");
        assert!(error.len() < 400, "{name}: {error}");
    }
}

#[test]
fn limits_are_those_that_were_given() {
    let bytes = Raw::good().bytes();
    let file_len = bytes.len() as u64;
    let limits = GgufLimits::default();
    for limits in [
        GgufLimits {
            max_header_bytes: 100,
            ..limits
        },
        GgufLimits {
            max_metadata_entries: 0,
            ..limits
        },
        GgufLimits {
            max_tensors: 1,
            ..limits
        },
        GgufLimits {
            max_key_bytes: 19,
            ..limits
        },
        GgufLimits {
            max_tensor_name_bytes: 17,
            ..limits
        },
        GgufLimits {
            max_string_bytes: 4,
            ..limits
        },
    ] {
        let result = GgufHeader::parse(&bytes, file_len, &limits);
        assert!(
            matches!(result, Err(GgufError::TooLarge { .. })),
            "{limits:?}"
        );
    }
    let exact = GgufLimits {
        max_header_bytes: file_len - 96,
        max_metadata_entries: 1,
        max_tensors: 2,
        max_key_bytes: 20,
        max_tensor_name_bytes: 18,
        max_string_bytes: 5,
        max_array_len: 0,
        ..limits
    };
    assert!(GgufHeader::parse(&bytes, file_len, &exact).is_ok());
}

#[test]
fn files_without_tensors_or_padding_are_read() {
    let mut raw = Raw::good();
    raw.tensors.clear();
    raw.data_len = 0;
    let mut bytes = raw.bytes();
    let padded = parse(&bytes).unwrap();
    assert!(padded.tensors.is_empty());
    while bytes.last() == Some(&0) {
        bytes.pop();
    }
    let metadata = parse(&bytes).unwrap().metadata;
    assert_eq!(metadata, padded.metadata);
    // Some writers do not pad the last tensor: here 20 bytes of 32.
    let raw = Raw::with_tensors(&[listed("x", &[5], 0, 0)], 20);
    assert_eq!(parse(&raw.bytes()).unwrap().tensors[0].num_bytes, 20);
    let version_two = Raw {
        version: 2,
        ..Raw::good()
    };
    assert!(parse(&version_two.bytes()).is_ok());
}
