//! Words by hand, against the blocks of GGUF, and what is refused.

use super::*;
use crate::blocks::{BlockType, encode_matrix};
use crate::codes::samples::matrix;

/// One group of 32 weights: -1 first, then a +1, the rest zero.
fn one_group() -> PackedMatrix {
    let mut trits = [0i8; 32];
    trits[0] = -1;
    trits[17] = 1;
    PackedMatrix::from_trits(&trits, &[0.25], 32, 32)
}

#[test]
fn words_by_hand() {
    // Zeros are 01 in each code: 0x55555555. Weight 0 is code 0 at bits 0, weight 17 code
    // 2 at bits 2 of the second word.
    let m = one_group();
    assert_eq!(mlx_words(&m).unwrap(), [0x5555_5554, 0x5555_5559]);
    // Codes are one higher: zeros 10, which makes 0xaaaaaaaa.
    assert_eq!(compressed_words(&m).unwrap(), [0xaaaa_aaa9, 0xaaaa_aaae]);
}

#[test]
fn words_are_the_codes_of_a_pq2_0_block() {
    let m = matrix(9, 3, 256, 128, 128);
    let blocks = encode_matrix(BlockType::Pq2_0, &m).unwrap();
    let codes = blocks.chunks(34).flat_map(|block| block[2..].to_vec());
    let words = mlx_words(&m).unwrap().into_iter();
    assert!(words.flat_map(u32::to_le_bytes).eq(codes));
}

#[test]
fn words_round_trip() {
    for group_size in [4, 16, 32, 64, 80, 128, 256] {
        let (rows, cols) = (3, 1280);
        let m = matrix(group_size as u64, rows, cols, group_size, group_size);
        let words = compressed_words(&m).unwrap();
        assert_eq!(words.len(), rows * cols / 16);
        let back = from_compressed_words(rows, cols, group_size, &words, &m.scales);
        assert_eq!(back.as_ref(), Ok(&m), "{group_size}");
        let is_mlx = MLX_GROUP_SIZES.contains(&group_size);
        let Ok(words) = mlx_words(&m) else {
            assert!(!is_mlx);
            let error = from_mlx_words(rows, cols, group_size, &words, &m.scales).unwrap_err();
            assert_eq!(error, WordsError::MlxGroup { found: group_size });
            continue;
        };
        assert!(is_mlx);
        let back = from_mlx_words(rows, cols, group_size, &words, &m.scales);
        assert_eq!(back, Ok(m));
    }
}

#[test]
fn rows_that_do_not_divide_are_refused() {
    for (cols, group_size) in [(24, 8), (160, 64), (0, 32), (96, 0), (32, 64)] {
        let error = from_compressed_words(1, cols, group_size, &[], &[]).unwrap_err();
        assert_eq!(error, WordsError::Columns { cols, group_size });
    }
    let m = matrix(1, 1, 160, 64, 64);
    let error = mlx_words(&m).unwrap_err();
    assert!(matches!(error, WordsError::Columns { cols: 160, .. }));
}

#[test]
fn damaged_words_are_refused_by_place() {
    let m = matrix(4, 2, 64, 32, 32);
    let mlx = mlx_words(&m).unwrap();
    let compressed = compressed_words(&m).unwrap();
    let mut bad = mlx.clone();
    bad[5] |= 3 << 8;
    let why = PackError::BadCode { column: 20 };
    let error = from_mlx_words(2, 64, 32, &bad, &m.scales);
    assert_eq!(error, Err(WordsError::Codes { row: 1, why }));
    let mut bad = compressed.clone();
    bad[5] &= !(3 << 8);
    let error = from_compressed_words(2, 64, 32, &bad, &m.scales);
    let (row, column) = (1, 20);
    assert_eq!(error, Err(WordsError::MinusTwo { row, column }));
    let mut scales = m.scales.clone();
    for bits in [0x7c00, 0x7e00, 0x8001] {
        scales[3] = f16::from_bits(bits);
        for error in [
            from_mlx_words(2, 64, 32, &mlx, &scales).unwrap_err(),
            from_compressed_words(2, 64, 32, &compressed, &scales).unwrap_err(),
        ] {
            let place = matches!(
                error,
                WordsError::BadScale {
                    row: 1,
                    group: 1,
                    ..
                }
            );
            assert!(place, "{error}");
        }
    }
    for (words, scales) in [(&mlx[1..], &m.scales[..]), (&mlx[..], &m.scales[1..])] {
        let error = from_mlx_words(2, 64, 32, words, scales).unwrap_err();
        assert!(matches!(error, WordsError::Length { .. }), "{error}");
    }
    assert!(from_mlx_words(usize::MAX, 64, 32, &mlx, &m.scales).is_err());
    let mut cut = m;
    cut.trits.pop();
    assert!(matches!(mlx_words(&cut), Err(WordsError::Length { .. })));
}
