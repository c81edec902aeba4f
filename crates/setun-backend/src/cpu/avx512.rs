//! AVX-512: the inner loops of products that gain from vectors of sixteen, with outputs in
//! the lanes. What is not here runs as in [`avx2`](super::avx2).

use super::gemm::{MR, NR, TileOperands};
use super::int8::{self, Int8Shape, LANES};
use crate::kernels::product::BLOCK;
use std::arch::x86_64::*;

/// Lanes of a vector of f32, and columns of a register tile.
const W: usize = 16;
const _: () = assert!(NR == W && LANES == W);

/// Denormals to zeros of their sign; NaN stays.
#[inline]
#[target_feature(enable = "avx512f,avx512dq")]
pub(super) fn flush(x: __m512) -> __m512 {
    const DENORMAL: i32 = 0x20;
    let denormal = _mm512_fpclass_ps_mask::<DENORMAL>(x);
    _mm512_mask_and_ps(x, denormal, x, _mm512_set1_ps(-0.0))
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
    // SAFETY: as in `tile_sequential`.
    unsafe {
        let mut sums: [__m512; MR] =
            std::array::from_fn(|i| flush(_mm512_loadu_ps(c.add(i * stride))));
        for start in (0..depth).step_by(BLOCK) {
            let steps = BLOCK.min(depth - start);
            let left = tile.left.as_ptr().add(start * tile.step);
            let right = tile.right.as_ptr().add(start * NR);
            let [even, odd] = even_and_odd::<MR>(steps, (left, tile.row, tile.step), (right, NR));
            for (sum, (&even, &odd)) in sums.iter_mut().zip(even.iter().zip(&odd)) {
                *sum = flush(_mm512_add_ps(*sum, _mm512_add_ps(even, odd)));
            }
        }
        for (i, sum) in sums.iter().enumerate() {
            _mm512_storeu_ps(c.add(i * stride), *sum);
        }
    }
}

/// The even and the odd chain of `ROWS` rows over `n` steps, from zero.
///
/// # Safety
/// `left` points to `n` steps of `ROWS` values, `row` apart, and `right` to `n` times [`W`] values;
/// steps are `step` and `lanes` apart.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn even_and_odd<const ROWS: usize>(
    n: usize,
    (mut left, row, step): (*const f32, usize, usize),
    (mut right, lanes): (*const f32, usize),
) -> [[__m512; ROWS]; 2] {
    let (mut even, mut odd) = ([_mm512_setzero_ps(); ROWS], [_mm512_setzero_ps(); ROWS]);
    // Two at a time: chains that are chosen by a number would not stay in registers.
    for _ in 0..n / 2 {
        // SAFETY: the caller's promise.
        unsafe {
            advance(&mut even, left, row, right);
            let (left, right) = (left.add(step), right.add(lanes));
            advance(&mut odd, left, row, right);
        }
        left = left.wrapping_add(2 * step);
        right = right.wrapping_add(2 * lanes);
    }
    if n % 2 == 1 {
        // SAFETY: as above.
        unsafe { advance(&mut even, left, row, right) };
    }
    [even, odd]
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
                let steps = BLOCK.min(depth - start);
                let (x, y) = (x.as_ptr().add(start), y.as_ptr().add(start * lanes + at));
                let [even, odd] = even_and_odd::<M>(steps, (x, stride, 1), (y, lanes));
                for (sum, (&even, &odd)) in sums.iter_mut().zip(even.iter().zip(&odd)) {
                    *sum = flush(_mm512_add_ps(*sum, _mm512_add_ps(even, odd)));
                }
            }
            for (i, sum) in sums.iter().enumerate() {
                _mm512_storeu_ps(to.add(i * lanes), *sum);
            }
        }
    }
}

/// A panel of weights and the rows that meet it.
pub(super) struct Int8Panel<'a> {
    pub shape: Int8Shape,
    /// Codes `[quads][LANES][4]`.
    pub codes: &'a [u8],
    /// Scales of the weights `[groups][LANES]`.
    pub scales: &'a [f32],
    /// Values `[blocks][quads][MR][4]`.
    pub inputs: &'a [i8],
    /// Sums of the rows' values `[blocks][groups][MR]`.
    pub sums: &'a [i32],
    /// Scales of the rows `[rows][groups]`, which may end before the last block does.
    pub row_scales: &'a [f32],
}

/// `BLOCKS` blocks of [`int8::MR`] rows, into the first rows of `to`: integer dots of the codes with the rows' values,
/// exactly, then `y = fma(s * a, dot - sum, y)` over ascending groups, from zero.
#[target_feature(enable = "avx512f,avx512vnni")]
pub(super) fn int8_rows<const BLOCKS: usize>(panel: &Int8Panel<'_>, to: &mut [[f32; LANES]]) {
    const MR: usize = int8::MR;
    let shape = panel.shape;
    let (groups, row_quads) = (shape.groups(), shape.quads());
    assert!(panel.codes.len() >= row_quads * 4 * LANES && panel.scales.len() >= groups * LANES);
    assert!(panel.inputs.len() >= BLOCKS * row_quads * 4 * MR);
    assert!(panel.sums.len() >= BLOCKS * groups * MR);
    let mut y = [[_mm512_setzero_ps(); MR]; BLOCKS];
    let mut quad = 0;
    for g in 0..groups {
        let quads = quad..quad + shape.quads_of(g);
        quad = quads.end;
        // SAFETY: all groups together have `row_quads` quads, of which the codes and each block
        // of the inputs have as many.
        let dots = unsafe {
            let q = panel.inputs.as_ptr().cast::<i32>();
            quad_dots::<BLOCKS>(panel.codes.as_ptr(), q, row_quads, quads)
        };
        // SAFETY: sixteen scales are there; the load needs no alignment.
        let scale = unsafe { _mm512_loadu_ps(panel.scales[g * LANES..][..LANES].as_ptr()) };
        for (b, (y, dots)) in y.iter_mut().zip(&dots).enumerate() {
            for (i, (y, &dot)) in y.iter_mut().zip(dots).enumerate() {
                let a = panel.row_scales.get((b * MR + i) * groups + g);
                let sum = panel.sums[(b * groups + g) * MR + i];
                let dot = _mm512_cvtepi32_ps(_mm512_sub_epi32(dot, _mm512_set1_epi32(sum)));
                let factor = _mm512_mul_ps(scale, _mm512_set1_ps(a.copied().unwrap_or(0.0)));
                *y = _mm512_fmadd_ps(factor, dot, *y);
            }
        }
    }
    for (to, y) in to.iter_mut().zip(y.as_flattened()) {
        // SAFETY: sixteen values are there; the store needs no alignment.
        unsafe { _mm512_storeu_ps(to.as_mut_ptr(), *y) };
    }
}

/// Exact dots of a group's codes with the values of `BLOCKS` blocks of rows.
///
/// # Safety
/// There are codes for all of `quads`, and values of each block, which are `row_quads` apart.
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
unsafe fn quad_dots<const BLOCKS: usize>(
    codes: *const u8,
    q: *const i32,
    row_quads: usize,
    quads: std::ops::Range<usize>,
) -> [[__m512i; int8::MR]; BLOCKS] {
    let mut dots = [[_mm512_setzero_si512(); int8::MR]; BLOCKS];
    for quad in quads {
        // SAFETY: the caller's promise; the loads need no alignment.
        unsafe {
            let codes = _mm512_loadu_si512(codes.add(quad * LANES * 4).cast());
            for (b, dots) in dots.iter_mut().enumerate() {
                let q = q.add((b * row_quads + quad) * int8::MR);
                for (i, dot) in dots.iter_mut().enumerate() {
                    let x = _mm512_set1_epi32(q.add(i).read_unaligned());
                    *dot = _mm512_dpbusd_epi32(*dot, codes, x);
                }
            }
        }
    }
    dots
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
