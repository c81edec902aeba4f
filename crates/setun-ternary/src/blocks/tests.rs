//! Every block type against bytes that were computed by hand, round trips over many
//! shapes, and what is refused.

use super::*;
use crate::codes::samples::{Numbers, matrix};

/// 0.5 as f16, little-endian: sign 0, exponent 14, fraction 0.
const HALF: [u8; 2] = [0x00, 0x38];

/// One row of `cols` weights, all zero but those that are named, with the scale 0.5.
fn row(cols: usize, group_size: usize, nonzero: &[(usize, i8)]) -> PackedMatrix {
    let mut trits = vec![0i8; cols];
    for &(at, trit) in nonzero {
        trits[at] = trit;
    }
    let scales = vec![0.5; groups_per_row(cols, group_size)];
    PackedMatrix::from_trits(&trits, &scales, cols, group_size)
}

/// `bytes` with some of them replaced.
fn with(mut bytes: Vec<u8>, changes: &[(usize, u8)]) -> Vec<u8> {
    for &(at, byte) in changes {
        bytes[at] = byte;
    }
    bytes
}

fn check(block: BlockType, matrix: &PackedMatrix, bytes: &[u8]) {
    assert_eq!(encode_matrix(block, matrix).unwrap(), bytes, "{block:?}");
    let (rows, cols, group_size) = (matrix.rows, matrix.cols, matrix.group_size);
    let back = decode_matrix(block, rows, cols, bytes, group_size).unwrap();
    assert_eq!(&back, matrix, "{block:?}");
}

#[test]
fn two_bit_blocks_by_hand() {
    // Zero has code 1, four of them 0b01010101. Weight 0 is -1: code 0 at bits 0, 0x54.
    // Weight 5 is +1: code 2 at bits 2 of the next byte, 0b01011001.
    let nonzero = [(0, -1), (5, 1), (63, 1)];
    let scale = HALF.to_vec();
    let zeros = |n: usize| [scale.clone(), vec![0x55; n]].concat();
    // Weight 63 is +1: code 2 at bits 6 of byte 15, 0b10010101.
    let bytes = with(zeros(16), &[(2, 0x54), (3, 0x59), (17, 0x95)]);
    check(BlockType::Q2_0, &row(64, 64, &nonzero), &bytes);
    let bytes = with(zeros(32), &[(2, 0x54), (3, 0x59), (17, 0x95)]);
    check(BlockType::Pq2_0, &row(128, 128, &nonzero), &bytes);
    // Two mainline blocks are one of 128, with the scale repeated.
    let first = with(zeros(16), &[(2, 0x54), (3, 0x59), (17, 0x95)]);
    let bytes = [first, zeros(16)].concat();
    check(BlockType::Q2_0, &row(128, 128, &nonzero), &bytes);
}

#[test]
fn tq2_0_by_hand() {
    // Byte 0 has weights 0, 32, 64, 96; byte 32 has 128, 160, 192, 224.
    let nonzero = [(0, -1), (33, 1), (127, -1), (192, 1)];
    let zeros = [vec![0x55; 64], HALF.to_vec()].concat();
    let bytes = with(
        zeros,
        &[
            (0, 0b0101_0100),
            (1, 0b0101_1001),
            (31, 0b0001_0101),
            (32, 0b0110_0101),
        ],
    );
    check(BlockType::Tq2_0, &row(256, 256, &nonzero), &bytes);
}

#[test]
fn base_three_blocks_by_hand() {
    // Five zeros are 11111 in base 3, 121: ceil(121 * 256 / 243) = 128. Four zeros and
    // the zero behind them are 11110, 120: ceil(126.4) = 127.
    let five = 0x80;
    let four = 0x7f;
    // Byte 0 has weights 0, 16, 32, 48, 64. Weight 0 is -1: 01111 is 40, ceil(42.1) = 43.
    // Byte 1: weight 17 is +1: 12111 is 148, ceil(155.9) = 156. Byte 16 has weights 80,
    // 88, ..., 112; 80 + 8 * 4 + 7 = 119 is the last digit of byte 23: +1 gives 11112, 122,
    // ceil(128.5) = 129. Byte 25 (qh[1]) has weights 121, 123, 125, 127: 127 at -1 gives
    // 11100, 117, ceil(123.3) = 124.
    let nonzero = [(0, -1), (17, 1), (119, 1), (127, -1)];
    let zeros = [vec![five; 24], vec![four; 2], HALF.to_vec()].concat();
    let bytes = with(zeros, &[(0, 43), (1, 156), (23, 129), (25, 124)]);
    check(BlockType::Ptq1_0, &row(128, 128, &nonzero), &bytes);
    // Byte 0 has weights 0, 32, ..., 128; byte 32 has 160, 176, ..., 224; byte 48 (qh[0])
    // has 240, 244, 248, 252. Weight 33 is the second digit of byte 1, 239 the last of
    // byte 47, 252 the fourth of byte 48, at the place of threes: 11100 for -1.
    let nonzero = [(0, -1), (33, 1), (239, 1), (252, -1)];
    let zeros = [vec![five; 48], vec![four; 4], HALF.to_vec()].concat();
    let bytes = with(zeros, &[(0, 43), (1, 156), (47, 129), (48, 124)]);
    check(BlockType::Tq1_0, &row(256, 256, &nonzero), &bytes);
}

#[test]
fn names_and_sizes_are_those_of_the_table() {
    for block in BlockType::ALL {
        assert_eq!(BlockType::from_name(block.name()), Some(block));
        let lower = block.name().to_lowercase();
        assert_eq!(BlockType::from_name(&lower), Some(block));
        let (weights, bytes) = (block.block_weights(), block.block_bytes());
        assert_eq!(block.row_bytes(3 * weights), Some(3 * bytes));
        assert_eq!(block.row_bytes(3 * weights + 32), None);
        assert_eq!(block.row_bytes(0), None);
    }
    assert_eq!(BlockType::from_name("Q4_0"), None);
    let bits = |block: BlockType| 8.0 * block.block_bytes() as f64 / block.block_weights() as f64;
    let expected = [2.25, 2.125, 1.75, 1.6875, 2.0625];
    assert_eq!(BlockType::ALL.map(bits), expected);
}

#[test]
fn whatever_fits_round_trips() {
    let mut numbers = Numbers(3);
    let mut round_trips = 0;
    // Miri checks every access and takes thousands of times as long.
    let cases = if cfg!(miri) { 8 } else { 400 };
    for seed in 0..cases {
        let block = BlockType::ALL[numbers.below(5) as usize];
        let weights = block.block_weights();
        let cols = weights * (1 + numbers.below(4) as usize);
        let rows = 1 + numbers.below(4) as usize;
        let sizes = [32, 64, 128, 256, 512, 5, 96, 3 * weights];
        let group_size = sizes[numbers.below(8) as usize];
        // Scales that change at the ends of groups and nowhere else.
        let m = matrix(seed, rows, cols, group_size, 1);
        let lossless = fits(block, cols, group_size);
        match encode_matrix(block, &m) {
            Ok(bytes) => {
                assert_eq!(bytes.len(), rows * block.row_bytes(cols).unwrap());
                assert!(group_fits(block, rows, cols, &bytes, group_size));
                let back = decode_matrix(block, rows, cols, &bytes, group_size);
                assert_eq!(back.as_ref(), Ok(&m), "{block:?} {cols} {group_size}");
                round_trips += 1;
            }
            Err(error) => {
                assert!(!lossless, "{block:?} {cols} {group_size}: {error}");
                assert!(matches!(error, BlockError::Scales { .. }), "{error}");
            }
        }
    }
    assert!(3 * round_trips > cases, "{round_trips}");
}

#[test]
fn small_groups_with_equal_scales_fit_larger_blocks() {
    for group_size in [32, 64, 128, 256] {
        for block in BlockType::ALL {
            let weights = block.block_weights();
            let span = weights.max(group_size);
            let m = matrix(11, 3, 512, group_size, span);
            let bytes = encode_matrix(block, &m).unwrap();
            let back = decode_matrix(block, 3, 512, &bytes, group_size);
            assert_eq!(back, Ok(m), "{block:?} {group_size}");
            // The scales of a row's blocks differ, so a group of a whole row does not fit.
            assert!(!group_fits(block, 3, 512, &bytes, 512));
        }
    }
}

#[test]
fn fits_is_what_the_formats_promise() {
    use BlockType::{Pq2_0, Ptq1_0, Q2_0, Tq1_0, Tq2_0};
    for (block, cols, group_size, expected) in [
        (Q2_0, 1024, 128, true),
        (Q2_0, 1024, 64, true),
        (Q2_0, 1024, 32, false),
        (Q2_0, 1000, 64, false),
        (Pq2_0, 1024, 128, true),
        (Pq2_0, 1024, 64, false),
        (Pq2_0, 192, 128, false),
        (Ptq1_0, 9728, 128, true),
        (Tq1_0, 1024, 128, false),
        (Tq1_0, 1024, 256, true),
        (Tq2_0, 9728, 256, true),
        (Tq2_0, 256, 1000, true),
        (Tq2_0, 512, 300, false),
        (Q2_0, 64, 0, false),
    ] {
        assert_eq!(fits(block, cols, group_size), expected, "{block:?} {cols}");
    }
}

#[test]
fn matrices_that_do_not_fit_are_refused_with_a_remedy() {
    let m = matrix(5, 2, 512, 128, 128);
    let error = encode_matrix(BlockType::Tq2_0, &m).unwrap_err();
    assert_eq!(
        error.to_string(),
        "row 0, block 0: the groups of 128 in this TQ2_0 block have different scales, and it \
         holds one; train with group_size = 256, or choose a format with smaller blocks"
    );
    let error = encode_matrix(BlockType::Pq2_0, &row(192, 64, &[])).unwrap_err();
    assert_eq!(
        error,
        BlockError::Columns {
            block: BlockType::Pq2_0,
            cols: 192
        }
    );
    for bits in [0x7c00, 0x7e00, 0xb800, 0x8000] {
        let mut m = row(64, 64, &[]);
        m.scales[0] = f16::from_bits(bits);
        let error = encode_matrix(BlockType::Q2_0, &m).unwrap_err();
        assert!(matches!(error, BlockError::BadScale { .. }), "{bits:#x}");
    }
    let mut m = row(64, 64, &[]);
    m.trits[3] = 0xc0;
    let error = encode_matrix(BlockType::Q2_0, &m).unwrap_err();
    let why = PackError::BadCode { column: 15 };
    assert_eq!(error, BlockError::Codes { row: 0, why });
    m.trits.pop();
    let error = encode_matrix(BlockType::Q2_0, &m).unwrap_err();
    assert!(matches!(error, BlockError::Shape { .. }));
}

#[test]
fn damaged_blocks_are_refused_by_place() {
    for block in BlockType::ALL {
        let weights = block.block_weights();
        let (rows, cols) = (2, 2 * weights);
        let m = matrix(21, rows, cols, weights, weights);
        let good = encode_matrix(block, &m).unwrap();
        let decode = |bytes: &[u8]| decode_matrix(block, rows, cols, bytes, weights);
        // The last block of the last row.
        let start = good.len() - block.block_bytes();
        for bits in [0x7c00u16, 0x7e01, 0xfc00, 0x8000, 0xb800] {
            let [low, high] = bits.to_le_bytes();
            let at = start + block.scale_at();
            let error = decode(&with(good.clone(), &[(at, low), (at + 1, high)])).unwrap_err();
            let place = matches!(
                error,
                BlockError::BadScale {
                    row: 1,
                    index: 1,
                    ..
                }
            );
            assert!(place, "{block:?} {error}");
        }
        let at = start + if block.scale_at() == 0 { 2 } else { 0 };
        let error = decode(&with(good.clone(), &[(at, 0xff)]));
        match block {
            BlockType::Q2_0 | BlockType::Pq2_0 | BlockType::Tq2_0 => {
                let column = weights;
                let why = PackError::BadCode { column };
                assert_eq!(error, Err(BlockError::Codes { row: 1, why }));
            }
            // 0xff stands for 22222.
            BlockType::Ptq1_0 | BlockType::Tq1_0 => assert!(error.is_ok()),
        }
        for length in [0, 1, good.len() - 1] {
            let error = decode(&good[..length]).unwrap_err();
            assert!(matches!(error, BlockError::Length { .. }), "{error}");
        }
        let longer = [good.as_slice(), &[0]].concat();
        assert!(matches!(decode(&longer), Err(BlockError::Length { .. })));
    }
}

#[test]
fn bytes_that_no_digits_give_are_refused() {
    for (block, four_digits) in [(BlockType::Ptq1_0, 24), (BlockType::Tq1_0, 48)] {
        let weights = block.block_weights();
        let good = encode_matrix(block, &row(weights, weights, &[])).unwrap();
        for (at, codes) in [(0, 243), (four_digits, 81)] {
            let decodes = |byte: &u8| {
                let bytes = with(good.clone(), &[(at, *byte)]);
                match decode_matrix(block, 1, weights, &bytes, weights) {
                    Ok(matrix) => encode_matrix(block, &matrix).unwrap() == bytes,
                    Err(error) => {
                        let (row, index, byte) = (0, 0, *byte);
                        assert_eq!(error, BlockError::Digits { row, index, byte });
                        false
                    }
                }
            };
            assert_eq!((0..=255).filter(decodes).count(), codes, "{block:?}");
        }
    }
}

#[test]
fn blocks_of_one_group_must_agree() {
    let m = matrix(2, 1, 512, 128, 128);
    let bytes = encode_matrix(BlockType::Q2_0, &m).unwrap();
    let fit = [32, 64, 128, 256].map(|g| group_fits(BlockType::Q2_0, 1, 512, &bytes, g));
    assert_eq!(fit, [true, true, true, false]);
    let error = decode_matrix(BlockType::Q2_0, 1, 512, &bytes, 256).unwrap_err();
    assert!(matches!(error, BlockError::GroupScales { row: 0, .. }));
    assert!(error.to_string().ends_with("in groups of 64"), "{error}");
}

#[test]
fn absurd_shapes_are_refused() {
    for (rows, cols, group_size) in [
        (1, 0, 64),
        (1, 64, 0),
        (1, 64, usize::MAX),
        (usize::MAX, 64, 64),
        (1, usize::MAX - 63, 64),
    ] {
        let result = decode_matrix(BlockType::Q2_0, rows, cols, &[0; 18], group_size);
        assert!(result.is_err(), "{rows} {cols} {group_size}");
        let fits = group_fits(BlockType::Q2_0, rows, cols, &[0; 18], group_size);
        assert!(!fits, "{rows} {cols} {group_size}");
    }
}
