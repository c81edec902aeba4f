//! AVX-512 with byte dots: products with packed ternary weights, decoded in registers.
//!
//! The layout and its use are those of [`avx2_packed`](super::avx2_packed); a dot of four bytes
//! goes straight into 32 bits here, so sums need no care.

use super::packed::{
    Blocks, PANEL, PackedInputs, PackedShape, PanelScratch, SCALE_BYTES, WORD_BYTES,
};
use std::arch::x86_64::*;

/// Outputs in a vector.
const LANES: usize = 16;
/// Bytes that codes are asked for ahead of their use.
const AHEAD: usize = 4096;
/// Most rows of a block.
pub(super) const BLOCK: usize = 8;

/// The panel's outputs times all rows, which lie in blocks of at most [`BLOCK`]. Each block takes the
/// codes from their words anew: with eight rows that costs less than reading codes that were made bytes.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub(super) fn multiply_rows(
    shape: PackedShape,
    panel: &[u8],
    blocks: Blocks,
    x: PackedInputs<'_>,
    scratch: &mut PanelScratch,
) {
    for (first, m) in blocks.iter() {
        let (x, y) = (x.block(shape, first, m), &mut scratch.y[first..]);
        // Vectors of outputs and chains so that sums fill most of the 32 registers.
        match m {
            1 => multiply::<1, 2, 4>(shape, panel, x, y),
            2 => multiply::<2, 2, 4>(shape, panel, x, y),
            3 => multiply::<3, 2, 2>(shape, panel, x, y),
            4 => multiply::<4, 2, 2>(shape, panel, x, y),
            5 => multiply::<5, 1, 2>(shape, panel, x, y),
            6 => multiply::<6, 1, 2>(shape, panel, x, y),
            7 => multiply::<7, 1, 2>(shape, panel, x, y),
            8 => multiply::<8, 1, 2>(shape, panel, x, y),
            m => unreachable!("{m} rows in a block"),
        }
    }
}

/// The panel's outputs times `M` rows, `NV` vectors of outputs at a time.
///
/// Codes 0 and 2 of each byte's nibbles come as they are; codes 1 and 3 stay two bits up, in
/// sums of their own that are shifted down at the end of a group: exact, since each is a
/// multiple of four. `CHAINS` is 2, or 4 where so few rows would wait for each other's dots.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn multiply<const M: usize, const NV: usize, const CHAINS: usize>(
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
        let mut sums = [[_mm512_setzero_ps(); NV]; M];
        let (mut group, mut q) = (panel, x.q);
        for g in 0..groups {
            let words = shape.words_of(g);
            // SAFETY: the assertions above hold for all groups together, and each step
            // moves both slices on by what its group has.
            let dots = unsafe { group_dots::<M, NV, CHAINS>(&group[SCALE_BYTES..], v0, words, q) };
            for v in 0..NV {
                let scale = scales(&group[2 * LANES * (v0 + v)..]);
                for m in 0..M {
                    let at = g * M + m;
                    sums[m][v] = combine(dots[m][v], x.sums[at], scale, x.scales[at], sums[m][v]);
                }
            }
            group = &group[SCALE_BYTES + words * WORD_BYTES..];
            q = &q[words * 16 * M..];
        }
        for (y, sums) in y.iter_mut().zip(&sums) {
            for (v, sum) in sums.iter().enumerate() {
                let to = &mut y[(v0 + v) * LANES..(v0 + v + 1) * LANES];
                // SAFETY: sixteen values are there; the store needs no alignment.
                unsafe { _mm512_storeu_ps(to.as_mut_ptr(), *sum) };
            }
        }
    }
}

/// `y = fma(s * a, dot - sum, y)`
#[inline]
#[target_feature(enable = "avx512f")]
fn combine(dot: __m512i, sum: i32, scale: __m512, a: f32, y: __m512) -> __m512 {
    let dot = _mm512_cvtepi32_ps(_mm512_sub_epi32(dot, _mm512_set1_epi32(sum)));
    _mm512_fmadd_ps(_mm512_mul_ps(scale, _mm512_set1_ps(a)), dot, y)
}

/// Exact dots of one group's codes with the values.
///
/// # Safety
/// `codes` holds `words` times [`WORD_BYTES`] bytes, `q` `words` times `16 M` values, and
/// `v0 + NV` vectors of outputs are at most [`PANEL`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
unsafe fn group_dots<const M: usize, const NV: usize, const CHAINS: usize>(
    codes: &[u8],
    v0: usize,
    words: usize,
    q: &[i8],
) -> [[__m512i; NV]; M] {
    debug_assert!(codes.len() >= words * WORD_BYTES && q.len() >= words * 16 * M);
    let (low_mask, high_mask) = (_mm512_set1_epi8(0b11), _mm512_set1_epi8(0b1100));
    // Even ones of codes 0 and 2, odd ones of codes 1 and 3.
    let mut chains = [[[_mm512_setzero_si512(); NV]; M]; CHAINS];
    for w in 0..words {
        let ahead = codes.as_ptr().wrapping_add(w * WORD_BYTES + AHEAD);
        prefetch(ahead);
        prefetch(ahead.wrapping_add(WORD_BYTES / 2));
        // SAFETY: the caller's promise, for word `w`; loads need no alignment.
        unsafe {
            let from = codes.as_ptr().add(w * WORD_BYTES + 4 * LANES * v0);
            let q = q.as_ptr().add(w * 16 * M).cast::<i32>();
            for v in 0..NV {
                let word = _mm512_loadu_si512(from.add(4 * LANES * v).cast());
                let upper = _mm512_srli_epi16::<4>(word);
                let codes = [
                    _mm512_and_si512(word, low_mask),
                    _mm512_and_si512(word, high_mask),
                    _mm512_and_si512(upper, low_mask),
                    _mm512_and_si512(upper, high_mask),
                ];
                for (shift, &codes) in codes.iter().enumerate() {
                    for (m, chains) in chains[shift % CHAINS].iter_mut().enumerate() {
                        let x = _mm512_set1_epi32(q.add(shift * M + m).read_unaligned());
                        chains[v] = _mm512_dpbusd_epi32(chains[v], codes, x);
                    }
                }
            }
        }
    }
    let mut dots = [[_mm512_setzero_si512(); NV]; M];
    for m in 0..M {
        for v in 0..NV {
            let (mut low, mut high) = (chains[0][m][v], chains[1][m][v]);
            if CHAINS == 4 {
                low = _mm512_add_epi32(low, chains[2][m][v]);
                high = _mm512_add_epi32(high, chains[3][m][v]);
            }
            dots[m][v] = _mm512_add_epi32(low, _mm512_srai_epi32::<2>(high));
        }
    }
    dots
}

/// Codes as bytes: `[words][4 shifts][PANEL outputs][4]`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) fn spread(words: &[u8], codes: &mut [u8]) {
    let mask = _mm512_set1_epi8(0b11);
    for (word, codes) in words
        .chunks_exact(WORD_BYTES)
        .zip(codes.chunks_exact_mut(4 * WORD_BYTES))
    {
        prefetch(word.as_ptr().wrapping_add(AHEAD));
        prefetch(word.as_ptr().wrapping_add(AHEAD + WORD_BYTES / 2));
        for half in [0, 4 * LANES] {
            // SAFETY: a word of 32 outputs has 128 bytes, and its codes four times as many; no
            // alignment is needed.
            unsafe {
                let word = _mm512_loadu_si512(word.as_ptr().add(half).cast());
                let shifted = [
                    word,
                    _mm512_srli_epi16::<2>(word),
                    _mm512_srli_epi16::<4>(word),
                    _mm512_srli_epi16::<6>(word),
                ];
                for (shift, shifted) in shifted.into_iter().enumerate() {
                    let to = codes.as_mut_ptr().add(shift * WORD_BYTES + half);
                    _mm512_storeu_si512(to.cast(), _mm512_and_si512(shifted, mask));
                }
            }
        }
    }
}

/// Asks for the line at `address`, wherever that is: panels follow each other in memory.
#[inline]
fn prefetch(address: *const u8) {
    // SAFETY: a hint, which reads nothing; an address outside of memory is ignored.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) };
}

/// Sixteen f16 as f32, exactly.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn scales(bytes: &[u8]) -> __m512 {
    assert!(bytes.len() >= 2 * LANES);
    // SAFETY: 32 bytes are there; the load needs no alignment.
    _mm512_cvtph_ps(unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) })
}
