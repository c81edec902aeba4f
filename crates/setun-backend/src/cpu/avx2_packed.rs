//! AVX2: products with packed ternary weights, decoded in registers.

use super::packed::{
    Blocks, MANY_GROUP, MR, PANEL, PackedInputs, PackedShape, PanelScratch, SCALE_BYTES, WORD_BYTES,
};
use std::arch::x86_64::*;

/// Outputs in a vector.
const LANES: usize = 8;
/// Most rows that meet the codes in registers. More of them share codes that were made bytes.
const MOST_DIRECT: usize = 16;
/// Words whose sums fit into an i16. A byte product is at most `2 * 127`, two are added by
/// `maddubs`, and a word adds four of those: `16 * 4 * 2 * 254 = 32512`.
const WORDS_OF_A_PART: usize = 16;
/// As [`WORDS_OF_A_PART`], where codes keep their place two bits up: products are four times
/// as large, and a sum takes half of a word.
const WORDS_OF_A_SHIFTED_PART: usize = 8;

/// Bytes that codes are asked for ahead of their use.
const AHEAD: usize = 4096;

/// Whether so many rows meet the codes in registers.
pub(super) fn is_direct(shape: PackedShape, rows: usize) -> bool {
    rows <= MOST_DIRECT || shape.group_size > MANY_GROUP
}

/// The panel's outputs times all rows, which lie in blocks of [`MR`] with up to seven in the
/// last one where [`is_direct`] says so.
#[target_feature(enable = "avx2,fma")]
pub(super) fn multiply_rows(
    shape: PackedShape,
    panel: &[u8],
    blocks: Blocks,
    x: PackedInputs<'_>,
    scratch: &mut PanelScratch,
) {
    if !is_direct(shape, blocks.rows()) {
        return multiply_many(shape, panel, blocks.rows(), x, scratch);
    }
    for (first, m) in blocks.iter() {
        let (x, y) = (x.block(shape, first, m), &mut scratch.y[first..]);
        // As many vectors of outputs as leave room for their sums in 16 registers.
        match m {
            1 => multiply::<1, 4>(shape, panel, x, y),
            2 => multiply::<2, 4>(shape, panel, x, y),
            3 => multiply::<3, 2>(shape, panel, x, y),
            4 => multiply::<4, 2>(shape, panel, x, y),
            5 => multiply::<5, 1>(shape, panel, x, y),
            6 => multiply::<6, 1>(shape, panel, x, y),
            7 => multiply::<7, 1>(shape, panel, x, y),
            m => unreachable!("{m} rows in a block"),
        }
    }
}

/// The panel's outputs times `M` rows, `NV` vectors of outputs at a time.
#[target_feature(enable = "avx2,fma")]
fn multiply<const M: usize, const NV: usize>(
    shape: PackedShape,
    panel: &[u8],
    x: PackedInputs<'_>,
    y: &mut [[f32; PANEL]],
) {
    let groups = shape.groups();
    assert!(M <= y.len() && panel.len() >= shape.panel_bytes());
    assert!(x.q.len() >= shape.words() * 16 * M);
    assert!(x.sums.len() >= groups * M && x.scales.len() >= groups * M);
    for v0 in (0..PANEL / LANES).step_by(NV) {
        let mut sums = [[_mm256_setzero_ps(); NV]; M];
        let (mut group, mut q) = (panel, x.q);
        for g in 0..groups {
            let words = shape.words_of(g);
            let codes = &group[SCALE_BYTES..];
            // SAFETY: the assertions above hold for all groups together, and each step
            // moves both slices on by what its group has.
            let dots = unsafe {
                match M {
                    1 => group_dots_shifted::<M, NV>(codes, v0, words, q),
                    _ => group_dots::<M, NV>(codes, v0, words, q),
                }
            };
            for v in 0..NV {
                let scale = scales(&group[2 * LANES * (v0 + v)..]);
                for m in 0..M {
                    let sum = _mm256_set1_epi32(x.sums[g * M + m]);
                    let dot = _mm256_cvtepi32_ps(_mm256_sub_epi32(dots[m][v], sum));
                    let factor = _mm256_mul_ps(scale, _mm256_set1_ps(x.scales[g * M + m]));
                    sums[m][v] = _mm256_fmadd_ps(factor, dot, sums[m][v]);
                }
            }
            group = &group[SCALE_BYTES + words * WORD_BYTES..];
            q = &q[words * 16 * M..];
        }
        for (y, sums) in y.iter_mut().zip(&sums) {
            for (v, sum) in sums.iter().enumerate() {
                let to = &mut y[(v0 + v) * LANES..(v0 + v + 1) * LANES];
                // SAFETY: eight values are there; the store needs no alignment.
                unsafe { _mm256_storeu_ps(to.as_mut_ptr(), *sum) };
            }
        }
    }
}

/// `sum + maddubs(code, x)` in 16 bits. In assembly because the compiler, which may add
/// integers in any order, adds the products of several steps first and runs out of registers.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn add_products(sum: __m256i, code: __m256i, x: __m256i) -> __m256i {
    let mut sum = sum;
    // SAFETY: two instructions on registers, of AVX2, which the caller has.
    unsafe {
        std::arch::asm!(
            "vpmaddubsw {pairs}, {code}, {x}",
            "vpaddw {sum}, {sum}, {pairs}",
            sum = inout(ymm_reg) sum,
            code = in(ymm_reg) code,
            x = in(ymm_reg) x,
            pairs = out(ymm_reg) _,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sum
}

/// The words of `NV` vectors of outputs, and the values that they meet.
///
/// # Safety
/// `codes` holds `w + 1` times [`WORD_BYTES`] bytes, `q` `w + 1` times `16 M` values, and
/// `v0 + NV` vectors of outputs are at most [`PANEL`].
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn word_of<const M: usize, const NV: usize>(
    codes: &[u8],
    v0: usize,
    w: usize,
    q: &[i8],
) -> ([__m256i; NV], *const i32) {
    if v0 == 0 {
        let ahead = codes.as_ptr().wrapping_add(w * WORD_BYTES + AHEAD);
        prefetch(ahead);
        prefetch(ahead.wrapping_add(WORD_BYTES / 2));
    }
    let mut words = [_mm256_setzero_si256(); NV];
    // SAFETY: the caller's promise; loads need no alignment.
    unsafe {
        let from = codes.as_ptr().add(w * WORD_BYTES + 4 * LANES * v0);
        for (v, word) in words.iter_mut().enumerate() {
            *word = _mm256_loadu_si256(from.cast::<__m256i>().add(v));
        }
        (words, q.as_ptr().add(w * 16 * M).cast())
    }
}

/// Exact dots of one group's codes with the values.
///
/// # Safety
/// As [`word_of`], for all of `words` words.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn group_dots<const M: usize, const NV: usize>(
    codes: &[u8],
    v0: usize,
    words: usize,
    q: &[i8],
) -> [[__m256i; NV]; M] {
    debug_assert!(codes.len() >= words * WORD_BYTES && q.len() >= words * 16 * M);
    let (ones, zero) = (_mm256_set1_epi16(1), _mm256_setzero_si256());
    let mask = _mm256_set1_epi8(0b11);
    let mut dots = [[zero; NV]; M];
    for start in (0..words).step_by(WORDS_OF_A_PART) {
        let mut sums = [[zero; NV]; M];
        for w in start..words.min(start + WORDS_OF_A_PART) {
            // SAFETY: the caller's promise, for word `w`.
            let (words, q) = unsafe { word_of::<M, NV>(codes, v0, w, q) };
            let mut step = |shift: usize, words: [__m256i; NV]| {
                for (m, sums) in sums.iter_mut().enumerate() {
                    // SAFETY: as above: four values for each shift and row.
                    let x = unsafe { q.add(shift * M + m).read_unaligned() };
                    let x = _mm256_set1_epi32(x);
                    for (sum, word) in sums.iter_mut().zip(words) {
                        *sum = add_products(*sum, _mm256_and_si256(word, mask), x);
                    }
                }
            };
            step(0, words);
            step(1, shifted::<2, NV>(words));
            step(2, shifted::<4, NV>(words));
            step(3, shifted::<6, NV>(words));
        }
        for (dot, sum) in dots.as_flattened_mut().iter_mut().zip(sums.as_flattened()) {
            *dot = _mm256_add_epi32(*dot, _mm256_madd_epi16(*sum, ones));
        }
    }
    dots
}

#[inline]
#[target_feature(enable = "avx2,fma")]
fn shifted<const BITS: i32, const NV: usize>(mut words: [__m256i; NV]) -> [__m256i; NV] {
    for word in &mut words {
        *word = _mm256_srli_epi16::<BITS>(*word);
    }
    words
}

/// [`group_dots`] for so few rows that it matters how codes are taken from their words.
///
/// Codes 0 and 2 of each byte's nibbles come as they are; codes 1 and 3 stay two bits up,
/// in sums of their own that are shifted down once per part: exact, since each is a
/// multiple of four.
///
/// # Safety
/// As [`group_dots`].
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn group_dots_shifted<const M: usize, const NV: usize>(
    codes: &[u8],
    v0: usize,
    words: usize,
    q: &[i8],
) -> [[__m256i; NV]; M] {
    debug_assert!(codes.len() >= words * WORD_BYTES && q.len() >= words * 16 * M);
    let (ones, zero) = (_mm256_set1_epi16(1), _mm256_setzero_si256());
    let (low_mask, high_mask) = (_mm256_set1_epi8(0b11), _mm256_set1_epi8(0b1100));
    let mut dots = [[zero; NV]; M];
    for start in (0..words).step_by(WORDS_OF_A_SHIFTED_PART) {
        let (mut low, mut high) = ([[zero; NV]; M], [[zero; NV]; M]);
        for w in start..words.min(start + WORDS_OF_A_SHIFTED_PART) {
            // SAFETY: the caller's promise, for word `w`.
            let (words, q) = unsafe { word_of::<M, NV>(codes, v0, w, q) };
            let upper = shifted::<4, NV>(words);
            for m in 0..M {
                // SAFETY: as above: four values for each shift and row.
                let x = |shift: usize| unsafe {
                    _mm256_set1_epi32(q.add(shift * M + m).read_unaligned())
                };
                let x = [x(0), x(1), x(2), x(3)];
                for v in 0..NV {
                    let code = |word, mask| _mm256_and_si256(word, mask);
                    low[m][v] = add_products(low[m][v], code(words[v], low_mask), x[0]);
                    high[m][v] = add_products(high[m][v], code(words[v], high_mask), x[1]);
                    low[m][v] = add_products(low[m][v], code(upper[v], low_mask), x[2]);
                    high[m][v] = add_products(high[m][v], code(upper[v], high_mask), x[3]);
                }
            }
        }
        for m in 0..M {
            for v in 0..NV {
                let sum = _mm256_add_epi16(low[m][v], _mm256_srai_epi16::<2>(high[m][v]));
                dots[m][v] = _mm256_add_epi32(dots[m][v], _mm256_madd_epi16(sum, ones));
            }
        }
    }
    dots
}

/// Rows and vectors of outputs whose sums fill the registers in [`multiply_many`].
const MANY: (usize, usize) = (MR, 2);

/// The panel's outputs times more than [`MOST_DIRECT`] rows, in blocks of [`MR`]: the codes of a group
/// become bytes once, in the first-level cache, and all rows read them there.
#[target_feature(enable = "avx2,fma")]
fn multiply_many(
    shape: PackedShape,
    panel: &[u8],
    rows: usize,
    x: PackedInputs<'_>,
    scratch: &mut PanelScratch,
) {
    let (groups, all_words) = (shape.groups(), shape.words());
    let rows = rows.next_multiple_of(MR);
    assert!(shape.group_size <= MANY_GROUP && rows <= scratch.y.len());
    assert!(panel.len() >= shape.panel_bytes() && x.q.len() >= rows * all_words * 16);
    assert!(x.sums.len() >= rows * groups && x.scales.len() >= rows * groups);
    scratch.y[..rows].fill([0.0; PANEL]);
    let (mut group, mut word) = (panel, 0);
    for g in 0..groups {
        let words = shape.words_of(g);
        spread(
            &group[SCALE_BYTES..][..words * WORD_BYTES],
            &mut scratch.codes,
        );
        let mut weights = [_mm256_setzero_ps(); PANEL / LANES];
        for (v, weight) in weights.iter_mut().enumerate() {
            *weight = scales(&group[2 * LANES * v..]);
        }
        for first in (0..rows).step_by(MR) {
            let at = first * groups + g * MR;
            let q = &x.q[(first * all_words + word * MR) * 16..][..words * 16 * MR];
            for v0 in (0..PANEL / LANES).step_by(MANY.1) {
                let codes = &scratch.codes[v0 * 4 * LANES..];
                // SAFETY: codes of `words` words have been spread, and `v0` and the next
                // vector are below `PANEL / LANES`.
                let dots = unsafe { byte_dots(codes, words, q) };
                for (m, dots) in dots.iter().enumerate() {
                    let sum = _mm256_set1_epi32(x.sums[at + m]);
                    let scale = _mm256_set1_ps(x.scales[at + m]);
                    let y = &mut scratch.y[first + m][v0 * LANES..][..MANY.1 * LANES];
                    for (v, y) in y.chunks_exact_mut(LANES).enumerate() {
                        let dot = _mm256_cvtepi32_ps(_mm256_sub_epi32(dots[v], sum));
                        let factor = _mm256_mul_ps(weights[v0 + v], scale);
                        // SAFETY: eight values are there, and no alignment is needed.
                        unsafe {
                            let so_far = _mm256_loadu_ps(y.as_ptr());
                            let y = y.as_mut_ptr();
                            _mm256_storeu_ps(y, _mm256_fmadd_ps(factor, dot, so_far));
                        }
                    }
                }
            }
        }
        group = &group[SCALE_BYTES + words * WORD_BYTES..];
        word += words;
    }
}

/// Codes as bytes: `[words][4 shifts][PANEL outputs][4]`.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn spread(words: &[u8], codes: &mut [u8]) {
    let mask = _mm256_set1_epi8(0b11);
    for (word, codes) in words
        .chunks_exact(WORD_BYTES)
        .zip(codes.chunks_exact_mut(4 * WORD_BYTES))
    {
        prefetch(word.as_ptr().wrapping_add(AHEAD));
        prefetch(word.as_ptr().wrapping_add(AHEAD + WORD_BYTES / 2));
        for v in 0..PANEL / LANES {
            let (from, to) = (&word[v * 4 * LANES..][..4 * LANES], v * 4 * LANES);
            // SAFETY: 32 bytes are there; the load needs no alignment.
            let word = unsafe { _mm256_loadu_si256(from.as_ptr().cast()) };
            let shifted = [
                word,
                _mm256_srli_epi16::<2>(word),
                _mm256_srli_epi16::<4>(word),
                _mm256_srli_epi16::<6>(word),
            ];
            for (shift, shifted) in shifted.into_iter().enumerate() {
                let to = &mut codes[shift * WORD_BYTES + to..][..4 * LANES];
                // SAFETY: 32 bytes are there; the store needs no alignment.
                unsafe {
                    let to = to.as_mut_ptr().cast();
                    _mm256_storeu_si256(to, _mm256_and_si256(shifted, mask));
                }
            }
        }
    }
}

/// Exact dots of the codes of two vectors of outputs with [`MR`] rows.
///
/// # Safety
/// `codes` holds `4 words - 1` times [`WORD_BYTES`] bytes and two vectors more, `q` `words`
/// times `16 MR` values, and `words` is at most [`MANY_GROUP`] / 16.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn byte_dots(codes: &[u8], words: usize, q: &[i8]) -> [[__m256i; MANY.1]; MR] {
    debug_assert!(codes.len() + WORD_BYTES >= 4 * words * WORD_BYTES + 8 * LANES);
    debug_assert!(q.len() >= words * 16 * MR);
    let mut sums = [[_mm256_setzero_si256(); MANY.1]; MR];
    let (mut codes, mut q) = (codes.as_ptr(), q.as_ptr());
    for _ in 0..words {
        // Four steps at a time: counting would cost a quarter of a step.
        for _ in 0..4 {
            // SAFETY: the caller's promise; loads need no alignment, and the pointers move
            // on by what a step reads, at most to the end.
            unsafe {
                let step = codes.cast::<__m256i>();
                let code = [_mm256_loadu_si256(step), _mm256_loadu_si256(step.add(1))];
                for (m, sums) in sums.iter_mut().enumerate() {
                    let x = _mm256_set1_epi32(q.cast::<i32>().add(m).read_unaligned());
                    for (sum, code) in sums.iter_mut().zip(code) {
                        *sum = add_products(*sum, code, x);
                    }
                }
                codes = codes.wrapping_add(WORD_BYTES);
                q = q.wrapping_add(4 * MR);
            }
        }
    }
    let ones = _mm256_set1_epi16(1);
    for sum in sums.as_flattened_mut() {
        *sum = _mm256_madd_epi16(*sum, ones);
    }
    sums
}

/// Lays out the values of a group as row `i` of `m`, four for each word and shift, and
/// returns their sum. Their number is a multiple of 32.
#[inline]
#[target_feature(enable = "avx2,fma")]
pub(super) fn spread_group(values: &[i8], (m, i): (usize, usize), to: &mut [i8]) -> i32 {
    assert!(values.len().is_multiple_of(32) && i < m && to.len() >= values.len() * m);
    // Values 4 j + s of 16 to place 4 s + j.
    let turn = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    let turn = _mm256_broadcastsi128_si256(turn);
    let (ones, one_words) = (_mm256_set1_epi8(1), _mm256_set1_epi16(1));
    let mut sums = _mm256_setzero_si256();
    for (values, to) in values.chunks_exact(32).zip(to.chunks_exact_mut(32 * m)) {
        // SAFETY: 32 values are there; the load needs no alignment.
        let x = unsafe { _mm256_loadu_si256(values.as_ptr().cast()) };
        let pairs = _mm256_maddubs_epi16(ones, x);
        sums = _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, one_words));
        let mut turned = [0i32; 8];
        // SAFETY: eight numbers are there; the store needs no alignment.
        unsafe {
            let x = _mm256_shuffle_epi8(x, turn);
            _mm256_storeu_si256(turned.as_mut_ptr().cast(), x);
        }
        for (four, to) in turned.iter().zip(to.chunks_exact_mut(4 * m)) {
            let bytes = four.to_le_bytes().map(|b| b as i8);
            to[4 * i..4 * i + 4].copy_from_slice(&bytes);
        }
    }
    let mut lanes = [0i32; 8];
    // SAFETY: as above.
    unsafe { _mm256_storeu_si256(lanes.as_mut_ptr().cast(), sums) };
    lanes.iter().sum()
}

/// Asks for the line at `address`, wherever that is: panels follow each other in memory.
#[inline]
fn prefetch(address: *const u8) {
    // SAFETY: a hint, which reads nothing; an address outside of memory is ignored.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) };
}

/// Eight f16 as f32, exactly: the exponent's bias is made up for by a product with a power
/// of two, which also makes denormals right.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn scales(bytes: &[u8]) -> __m256 {
    assert!(bytes.len() >= 2 * LANES);
    // SAFETY: sixteen bytes are there; the load needs no alignment.
    let halves = unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) };
    let wide = _mm256_cvtepu16_epi32(halves);
    let magnitude = _mm256_slli_epi32::<13>(_mm256_and_si256(wide, _mm256_set1_epi32(0x7fff)));
    let sign = _mm256_slli_epi32::<16>(_mm256_and_si256(wide, _mm256_set1_epi32(0x8000)));
    let bias = _mm256_set1_ps(f32::from_bits((112 + 127) << 23));
    let value = _mm256_mul_ps(_mm256_castsi256_ps(magnitude), bias);
    _mm256_or_ps(value, _mm256_castsi256_ps(sign))
}
