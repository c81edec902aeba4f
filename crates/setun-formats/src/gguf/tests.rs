//! The container: what is written is read, cut files and changed bytes are survived.

mod bad_files;

use super::*;
use crate::Qwen3Config;
use crate::config::tests::tied;
use setun_ternary::words::mlx_words;
use setun_ternary::{Numerics, PackedMatrix, ScaleRule, groups_per_row};
use std::io;

pub(super) type Tensor = (String, Vec<usize>, GgufType);
pub(super) type Metadata = Vec<(String, GgufValue)>;

fn parse(bytes: &[u8]) -> Result<GgufHeader, GgufError> {
    GgufHeader::parse(bytes, bytes.len() as u64, &GgufLimits::default())
}

fn tensor(name: &str, shape: &[usize], ggml_type: GgufType) -> Tensor {
    (name.to_owned(), shape.to_vec(), ggml_type)
}

/// A whole file with zeros as payloads.
fn written(metadata: &[(String, GgufValue)], tensors: &[Tensor]) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let layout = write_header(&mut bytes, metadata, tensors)?;
    assert_eq!(bytes.len() as u64, layout.data_offset);
    assert!(layout.tensors.len() == tensors.len() && layout.padding.len() == tensors.len());
    for (tensor, padding) in layout.tensors.iter().zip(&layout.padding) {
        assert_eq!(bytes.len() as u64, tensor.offset);
        bytes.resize(bytes.len() + (tensor.num_bytes + padding) as usize, 0);
    }
    assert_eq!(bytes.len() as u64, layout.file_len);
    Ok(bytes)
}

/// The tensors of a model: norms as F32, matrices as `ggml_type`.
pub(super) fn model_tensors(config: &Qwen3Config, ggml_type: GgufType) -> Vec<Tensor> {
    let of_parameter = |parameter: crate::ParameterInfo| {
        let name = tensor_name(&parameter.name).unwrap();
        let of_norm = GgufType::F32;
        let ggml_type = if parameter.is_matrix() {
            ggml_type
        } else {
            of_norm
        };
        (name, parameter.shape, ggml_type)
    };
    config.parameters().into_iter().map(of_parameter).collect()
}

/// The header of a whole model as a file without payloads would have it, and the length
/// of that file.
pub(super) fn model_header(
    config: &Qwen3Config,
    metadata: &[(String, GgufValue)],
) -> (Vec<u8>, u64) {
    let tensors = model_tensors(config, GgufType::F16);
    let mut bytes = Vec::new();
    let layout = write_header(&mut bytes, metadata, &tensors).unwrap();
    (bytes, layout.file_len)
}

/// One entry of every type.
fn all_values() -> Metadata {
    let numbers = |scalar, bytes: &[u8]| {
        GgufValue::Array(GgufArray::Numbers(GgufNumbers::new(scalar, bytes).unwrap()))
    };
    let strings = ["", "é\u{0}", "long ".repeat(50).as_str()].map(str::to_owned);
    let values = [
        GgufValue::U8(255),
        GgufValue::I8(-128),
        GgufValue::U16(65_535),
        GgufValue::I16(-2),
        GgufValue::U32(7),
        GgufValue::I32(-7),
        GgufValue::F32(1e-6),
        GgufValue::Bool(true),
        GgufValue::U64(u64::MAX),
        GgufValue::I64(i64::MIN),
        GgufValue::F64(-0.1),
        GgufValue::String("two\nlines".to_owned()),
        GgufValue::Array(GgufArray::Strings(strings.to_vec())),
        GgufValue::Array(GgufArray::Strings(Vec::new())),
        GgufValue::Array(GgufArray::Numbers(GgufNumbers::from_i32s(&[1, -1]))),
        numbers(GgufScalar::Bool, &[0, 1, 1]),
        numbers(GgufScalar::F64, &[0; 24]),
        numbers(GgufScalar::U8, &[]),
    ];
    let keyed = values.into_iter().enumerate();
    keyed
        .map(|(i, value)| (format!("test.{i}"), value))
        .collect()
}

#[test]
fn what_is_written_is_read() {
    let blocks = BlockType::ALL.map(GgufType::Block);
    let floats = [GgufType::F32, GgufType::F16, GgufType::Bf16];
    let types = floats.into_iter().chain(blocks);
    let tensors: Vec<Tensor> = types
        .map(|ggml_type| tensor(&format!("{ggml_type:?}"), &[3, 256], ggml_type))
        .chain([tensor("vector", &[5], GgufType::F32)])
        .chain([tensor("four", &[2, 3, 4, 5], GgufType::F16)])
        .collect();
    for alignment in [None, Some(8), Some(64), Some(4096)] {
        let mut metadata = all_values();
        let entry = |n: u32| ("general.alignment".to_owned(), GgufValue::U32(n));
        metadata.extend(alignment.map(entry));
        let header = parse(&written(&metadata, &tensors).unwrap()).unwrap();
        assert_eq!(header.metadata, metadata.into_iter().collect());
        let alignment = alignment.unwrap_or(32);
        assert!(header.data_offset.is_multiple_of(alignment.into()));
        for (info, (name, shape, ggml_type)) in header.tensors.iter().zip(&tensors) {
            assert_eq!((&info.name, &info.shape), (name, shape));
            assert_eq!(info.ggml_type, *ggml_type);
            assert_eq!(Some(info.num_bytes), ggml_type.num_bytes(shape));
            assert!(info.offset.is_multiple_of(alignment.into()));
        }
        assert_eq!(header.tensors.len(), tensors.len());
        assert_eq!(header.tensor("vector").unwrap().num_bytes, 20);
        assert!(header.tensor("nothing").is_none());
    }
}

#[test]
fn types_have_the_ids_of_ggml() {
    for ggml_type in GgufType::ALL {
        let listed = GgufType::from_id(ggml_type.id()).unwrap();
        let legacy = ggml_type == GgufType::LegacyQ2_0;
        assert_eq!(listed == ggml_type, !legacy, "{ggml_type:?}");
    }
    let ids = GgufType::ALL.map(GgufType::id);
    assert_eq!(ids, [0, 1, 30, 42, 142, 143, 34, 35, 42]);
    let files = GgufType::ALL.map(file_type);
    assert_eq!(files, [0, 1, 32, 41, 141, 143, 36, 37, 41]);
}

#[test]
fn legacy_blocks_are_told_by_their_length() {
    let mainline = GgufType::Block(BlockType::Q2_0);
    for ggml_type in [mainline, GgufType::LegacyQ2_0] {
        let tensors = [
            tensor("small", &[1, 128], ggml_type),
            tensor("norm", &[128], GgufType::F32),
            tensor("large", &[16, 128], ggml_type),
        ];
        let header = parse(&written(&[], &tensors).unwrap()).unwrap();
        let types = header.tensors.iter().map(|tensor| tensor.ggml_type);
        assert!(types.eq([ggml_type, GgufType::F32, ggml_type]));
        assert_eq!(
            header.tensors[2].num_bytes,
            16 * if ggml_type == mainline { 36 } else { 34 }
        );
    }
    // 36 and 34 bytes take 64 with their padding: a reader cannot know.
    let tensors = [tensor("small", &[1, 128], GgufType::LegacyQ2_0)];
    let error = written(&[], &tensors).unwrap_err();
    assert!(error.to_string().contains("PQ2_0"), "{error}");
}

#[test]
fn prefixes_ask_for_more_until_the_header_is_whole() {
    let tensors = [tensor("x", &[300, 64], GgufType::F32)];
    let bytes = written(&all_values(), &tensors).unwrap();
    let whole = parse(&bytes).unwrap();
    let limits = GgufLimits::default();
    for length in 0..whole.data_offset as usize {
        let result = GgufHeader::parse(&bytes[..length], bytes.len() as u64, &limits);
        let Err(GgufError::NeedMore { at_least }) = result else {
            panic!("{length}: {result:?}");
        };
        assert!(at_least > length as u64 && at_least <= whole.data_offset);
    }
    let prefix = &bytes[..whole.data_offset as usize];
    let result = GgufHeader::parse(prefix, bytes.len() as u64, &limits);
    assert_eq!(result, Ok(whole));
}

#[test]
fn every_truncation_is_refused() {
    let tensors = [
        tensor("a", &[2, 64], GgufType::Block(BlockType::Q2_0)),
        tensor("b", &[8], GgufType::F32),
    ];
    let bytes = written(&all_values(), &tensors).unwrap();
    for length in 0..bytes.len() {
        let result = parse(&bytes[..length]);
        let truncated = matches!(result, Err(GgufError::Truncated { .. }));
        assert!(truncated, "{length}: {result:?}");
    }
    assert!(parse(&bytes).is_ok());
}

#[test]
fn every_flip_is_read_or_refused() {
    let ternary = crate::TernaryInfo {
        group_size: 128,
        scale_rule: ScaleRule::Mean,
        numerics: Numerics::Int8,
    };
    let config = tied();
    let metadata = metadata_for(&config, Some(&ternary), None, None, 41, "flip").unwrap();
    let (bytes, file_len) = model_header(&config, &metadata);
    let limits = GgufLimits::default();
    let (mut read, mut refused) = (0, 0);
    for at in 0..bytes.len() {
        for mask in [1, 2, 4, 8, 16, 32, 64, 128, 255] {
            let mut bytes = bytes.clone();
            bytes[at] ^= mask;
            let Ok(header) = GgufHeader::parse(&bytes, file_len, &limits) else {
                refused += 1;
                continue;
            };
            read += 1;
            // Whatever the metadata says now: an answer, or a refusal.
            let found = qwen3_config(&header);
            assert!(found.is_err() || found.is_ok_and(|found| found.validate().is_ok()));
            let _ = ternary_info(&header);
            let _ = tokenizer_from_metadata(&header);
        }
    }
    assert!(read > 1000 && refused > 1000, "{read} {refused}");
}

#[test]
fn payloads_of_qwen3_have_the_published_sizes() {
    let config = |size: [usize; 6], vocab_size, tied_head| Qwen3Config {
        vocab_size,
        hidden_size: size[0],
        num_hidden_layers: size[1],
        num_attention_heads: size[2],
        num_key_value_heads: size[3],
        head_dim: size[4],
        intermediate_size: size[5],
        max_position_embeddings: 40_960,
        tie_word_embeddings: tied_head,
        ..tied()
    };
    // reference/formats.md, section 5: PQ2_0, PTQ1_0, Q2_0 in groups of 64 and MLX; for
    // 151,669 and 151,936 rows.
    let cases = [
        (
            [1024, 28, 16, 8, 128, 3072],
            [158_235_728, 130_311_776, 167_543_712],
            [158_308_352, 130_371_584, 167_620_608],
        ),
        (
            [2048, 28, 16, 8, 128, 6144],
            [456_849_568, 376_229_056, 483_723_072],
            [456_994_816, 376_348_672, 483_876_864],
        ),
        (
            [2560, 36, 32, 8, 128, 9728],
            [1_068_234_440, 879_722_480, 1_131_071_760],
            [1_068_416_000, 879_872_000, 1_131_264_000],
        ),
        (
            [4096, 36, 32, 8, 128, 12_288],
            [2_175_001_216, 1_791_177_472, 2_302_942_464],
            [2_175_582_208, 1_791_655_936, 2_303_557_632],
        ),
    ];
    for (size, trimmed, stock) in cases {
        for (vocab_size, expected) in [(151_669, trimmed), (151_936, stock)] {
            let config = config(size, vocab_size, size[0] != 4096);
            config.validate().unwrap();
            let matrices = config.parameters().into_iter().filter(|p| p.is_matrix());
            let shapes: Vec<Vec<usize>> = matrices.map(|parameter| parameter.shape).collect();
            let sum = |bytes: &dyn Fn(&[usize]) -> u64| -> u64 {
                shapes.iter().map(|shape| bytes(shape)).sum()
            };
            let blocks = [BlockType::Pq2_0, BlockType::Ptq1_0, BlockType::Q2_0];
            let found =
                blocks.map(|block| sum(&|shape| GgufType::Block(block).num_bytes(shape).unwrap()));
            assert_eq!(found, expected, "{size:?} {vocab_size}");
            // Words, scales and biases.
            let mlx = |shape: &[usize]| {
                let row = PackedMatrix::from_trits(
                    &vec![0; shape[1]],
                    &vec![0.0; groups_per_row(shape[1], 128)],
                    shape[1],
                    128,
                );
                let words = mlx_words(&row).unwrap();
                (shape[0] * (4 * words.len() + 2 * 2 * row.scales.len())) as u64
            };
            assert_eq!(sum(&mlx), expected[2]);
        }
    }
}

#[test]
fn files_that_cannot_be_are_not_written() {
    let entry = |key: &str, value| vec![(key.to_owned(), value)];
    let one = || GgufValue::U32(1);
    let twice = [entry("a", one()), entry("a", one())].concat();
    let f32 = GgufType::F32;
    let block = GgufType::Block(BlockType::Tq2_0);
    let cases: [(&str, Metadata, Vec<Tensor>); 12] = [
        ("occurs twice", twice, vec![]),
        ("is no name", entry("", one()), vec![]),
        ("is no name", entry("a b", one()), vec![]),
        (
            "power of two",
            entry("general.alignment", GgufValue::U32(48)),
            vec![],
        ),
        (
            "above 0",
            entry("general.alignment", GgufValue::U32(0)),
            vec![],
        ),
        (
            "above 0",
            entry("general.alignment", GgufValue::U64(32)),
            vec![],
        ),
        (
            "bytes in a string",
            entry("a", GgufValue::String("x".repeat(2 << 20))),
            vec![],
        ),
        (
            "occurs twice",
            vec![],
            vec![tensor("x", &[1], f32), tensor("x", &[1], f32)],
        ),
        ("dimension", vec![], vec![tensor("x", &[0, 4], f32)]),
        ("5 dimensions", vec![], vec![tensor("x", &[1; 5], f32)]),
        ("do not divide", vec![], vec![tensor("x", &[2, 128], block)]),
        ("over", vec![], vec![tensor("x", &[usize::MAX, 8], f32)]),
    ];
    for (expected, metadata, tensors) in cases {
        let mut out = Vec::new();
        let error = write_header(&mut out, &metadata, &tensors).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        assert!(error.to_string().contains(expected), "{expected}: {error}");
        assert!(out.is_empty());
    }
}
