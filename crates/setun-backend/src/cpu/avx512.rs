//! AVX-512: the inner loops of products that gain from vectors of sixteen, with outputs in
//! the lanes. What is not here runs as in [`avx2`](super::avx2).

use super::gemm::{MR, NR, TileOperands};
use super::int8::{self, LANES};
use crate::kernels::product::BLOCK;
use std::arch::x86_64::*;

/// Lanes of a vector of f32, and columns of a register tile.
const W: usize = 16;
const _: () = assert!(NR == W && LANES == W);

/// Denormals to zeros of their sign; NaN stays.
#[inline]
#[target_feature(enable = "avx512f,avx512dq")]
fn flush(x: __m512) -> __m512 {
    let sign = _mm512_set1_ps(-0.0);
    let magnitude = _mm512_andnot_ps(sign, x);
    let least = _mm512_set1_ps(f32::MIN_POSITIVE);
    let denormal = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(magnitude, least);
    _mm512_mask_and_ps(x, denormal, x, sign)
}

/// Panics unless [`MR`] rows and `depth` steps lie inside the operands.
#[inline]
fn check_reach(tile: &TileOperands<'_, f32>, depth: usize) {
    let last = (MR - 1) * tile.row + depth.saturating_sub(1) * tile.step;
    assert!(last < tile.left.len() && depth * NR <= tile.right.len());
}

/// One register tile, one FMA chain per output.
///
/// # Safety
/// `c` points to [`MR`] rows of [`NR`] values, `stride` apart, that nobody else uses.
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn tile_sequential(tile: TileOperands<'_, f32>, c: *mut f32, stride: usize) {
    let depth = tile.right.len() / NR;
    check_reach(&tile, depth);
    // SAFETY: `check_reach` has shown that all steps lie inside the operands; the rest is the
    // caller's promise. Nothing needs an alignment.
    unsafe {
        let mut chains: [__m512; MR] = std::array::from_fn(|i| _mm512_loadu_ps(c.add(i * stride)));
        for k in 0..depth {
            let left = tile.left.as_ptr().add(k * tile.step);
            advance(&mut chains, left, tile.row, tile.right.as_ptr().add(k * NR));
        }
        for (i, chain) in chains.iter().enumerate() {
            _mm512_storeu_ps(c.add(i * stride), *chain);
        }
    }
}

/// One register tile, an even and an odd chain per output, of values whose products cannot be
/// denormal: no sum but that in `c` can be (see `avx2`).
///
/// # Safety
/// `c` points to [`MR`] rows of [`NR`] values, `stride` apart, that nobody else uses.
#[target_feature(enable = "avx512f,avx512dq")]
pub(super) unsafe fn tile_even_odd(tile: TileOperands<'_, f32>, c: *mut f32, stride: usize) {
    let depth = tile.right.len() / NR;
    check_reach(&tile, depth);
    let zero = _mm512_setzero_ps();
    // SAFETY: as in `tile_sequential`.
    unsafe {
        let mut sums: [__m512; MR] =
            std::array::from_fn(|i| flush(_mm512_loadu_ps(c.add(i * stride))));
        for start in (0..depth).step_by(BLOCK) {
            let steps = BLOCK.min(depth - start);
            let mut chains = [[zero; MR]; 2];
            for k in start..start + steps {
                let left = tile.left.as_ptr().add(k * tile.step);
                let right = tile.right.as_ptr().add(k * NR);
                advance(&mut chains[k % 2], left, tile.row, right);
            }
            let [even, odd] = &chains;
            for (sum, (&even, &odd)) in sums.iter_mut().zip(even.iter().zip(odd)) {
                *sum = flush(_mm512_add_ps(*sum, _mm512_add_ps(even, odd)));
            }
        }
        for (i, sum) in sums.iter().enumerate() {
            _mm512_storeu_ps(c.add(i * stride), *sum);
        }
    }
}

/// One step of the chains of `ROWS` rows.
///
/// # Safety
/// `left` points to `ROWS` values, `row` apart, and `right` to [`W`] values.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn advance<const ROWS: usize>(
    chains: &mut [__m512; ROWS],
    left: *const f32,
    row: usize,
    right: *const f32,
) {
    // SAFETY: the caller's promise; the load needs no alignment.
    unsafe {
        let right = _mm512_loadu_ps(right);
        for (i, chain) in chains.iter_mut().enumerate() {
            *chain = _mm512_fmadd_ps(_mm512_set1_ps(*left.add(i * row)), right, *chain);
        }
    }
}

/// `acc[i, l] += sum over r of x[i * stride + r] * y[r * lanes + l]` for up to
/// [`ROWS_TOGETHER`](super::avx2::ROWS_TOGETHER) rows of `lanes` values, a multiple of 16, and
/// `depth` steps, of values whose products cannot be denormal.
#[target_feature(enable = "avx512f,avx512dq")]
pub(crate) fn rows_even_odd(
    x: &[f32],
    sizes: (usize, usize),
    y: &[f32],
    lanes: usize,
    acc: &mut [f32],
) {
    match acc.len() / lanes {
        6 => rows_of::<6>(x, sizes, y, lanes, acc),
        5 => rows_of::<5>(x, sizes, y, lanes, acc),
        4 => rows_of::<4>(x, sizes, y, lanes, acc),
        3 => rows_of::<3>(x, sizes, y, lanes, acc),
        2 => rows_of::<2>(x, sizes, y, lanes, acc),
        1 => rows_of::<1>(x, sizes, y, lanes, acc),
        rows => unreachable!("{rows} rows at a time"),
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512dq")]
fn rows_of<const M: usize>(
    x: &[f32],
    (stride, depth): (usize, usize),
    y: &[f32],
    lanes: usize,
    acc: &mut [f32],
) {
    assert!(x.len() >= (M - 1) * stride + depth && y.len() >= depth * lanes);
    assert!(acc.len() >= M * lanes && lanes.is_multiple_of(W));
    for at in (0..lanes).step_by(W) {
        // SAFETY: by the assertions all rows of `x` have `depth` values, and steps below
        // `depth` of `y` and rows below `M` of `acc` have `lanes`, of which sixteen from `at`
        // are used. Nothing needs an alignment.
        unsafe {
            let to = acc.as_mut_ptr().add(at);
            let mut sums: [__m512; M] =
                std::array::from_fn(|i| flush(_mm512_loadu_ps(to.add(i * lanes))));
            for start in (0..depth).step_by(BLOCK) {
                let mut chains = [[_mm512_setzero_ps(); M]; 2];
                for r in start..depth.min(start + BLOCK) {
                    let (x, y) = (x.as_ptr().add(r), y.as_ptr().add(r * lanes + at));
                    advance(&mut chains[r % 2], x, stride, y);
                }
                let [even, odd] = &chains;
                for (sum, (&even, &odd)) in sums.iter_mut().zip(even.iter().zip(odd)) {
                    *sum = flush(_mm512_add_ps(*sum, _mm512_add_ps(even, odd)));
                }
            }
            for (i, sum) in sums.iter().enumerate() {
                _mm512_storeu_ps(to.add(i * lanes), *sum);
            }
        }
    }
}

/// One group of [`int8::MR`] rows and [`LANES`] outputs: integer dots of the codes with the
/// rows' values, exactly, then `y = fma(s * a, dot - sum, y)`.
#[target_feature(enable = "avx512f,avx512vnni")]
pub(super) fn int8_group(group: &int8::Group<'_>, y: &mut [[f32; LANES]; int8::MR]) {
    // Two chains for each row, or the latency of a dot would show.
    let mut sums = [[_mm512_setzero_si512(); 2]; int8::MR];
    let codes = group.codes.chunks_exact(LANES * 4);
    let values = group.q.chunks_exact(int8::MR * 4);
    for (k, (codes, q)) in codes.zip(values).enumerate() {
        // SAFETY: a chunk of codes has 64 bytes; the load needs no alignment.
        let codes = unsafe { _mm512_loadu_si512(codes.as_ptr().cast()) };
        for (i, sums) in sums.iter_mut().enumerate() {
            let four = [q[4 * i], q[4 * i + 1], q[4 * i + 2], q[4 * i + 3]];
            let x = _mm512_set1_epi32(i32::from_le_bytes(four.map(|b| b as u8)));
            sums[k % 2] = _mm512_dpbusd_epi32(sums[k % 2], codes, x);
        }
    }
    // SAFETY: a panel has a scale for each lane; the load needs no alignment.
    let scales = unsafe { _mm512_loadu_ps(group.scales.as_ptr()) };
    for (i, (y, sums)) in y.iter_mut().zip(&sums).enumerate() {
        let dot = _mm512_add_epi32(sums[0], sums[1]);
        let dot = _mm512_sub_epi32(dot, _mm512_set1_epi32(group.sums[i]));
        let factor = _mm512_mul_ps(scales, _mm512_set1_ps(group.a[i]));
        // SAFETY: a row has sixteen values; no alignment is needed.
        unsafe {
            let so_far = _mm512_loadu_ps(y.as_ptr());
            let sum = _mm512_fmadd_ps(factor, _mm512_cvtepi32_ps(dot), so_far);
            _mm512_storeu_ps(y.as_mut_ptr(), sum);
        }
    }
}

/// [`peak::fma`](super::peak::fma) on one thread; returns the multiply-adds.
#[target_feature(enable = "avx512f")]
pub(super) fn fma_rounds(rounds: usize) -> f64 {
    const CHAINS: usize = 12;
    let a = _mm512_set1_ps(std::hint::black_box(0.999));
    let b = _mm512_set1_ps(std::hint::black_box(1e-3));
    let mut chains = [_mm512_set1_ps(1.0); CHAINS];
    for _ in 0..rounds {
        for chain in &mut chains {
            *chain = _mm512_fmadd_ps(*chain, a, b);
        }
    }
    std::hint::black_box(chains);
    (rounds * CHAINS * W) as f64
}

/// [`peak::int8`](super::peak::int8) on one thread; returns the multiply-adds.
#[target_feature(enable = "avx512f,avx512vnni")]
pub(super) fn int8_rounds(rounds: usize) -> f64 {
    const CHAINS: usize = 12;
    let code = _mm512_set1_epi8(std::hint::black_box(1));
    let x = _mm512_set1_epi8(std::hint::black_box(3));
    let mut sums = [_mm512_setzero_si512(); CHAINS];
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = _mm512_dpbusd_epi32(*sum, code, x);
        }
    }
    std::hint::black_box(sums);
    (rounds * CHAINS * 4 * W) as f64
}
