//! AVX2 and FMA: the inner loops of products, with outputs in the lanes.
//!
//! Every function computes what its portable counterpart does, bit for bit; the order of
//! operations of each output is the same, only several outputs advance together.

use super::gemm::{MR_EVEN_ODD, MR_SEQUENTIAL, NR};
use super::int8::{LANES, MR, QUADS_OF_A_PART};
use crate::kernels::product::BLOCK;
use std::arch::x86_64::*;

/// Lanes of a vector of f32.
const W: usize = 8;

/// Eight values from the start of `x`.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn load(x: &[f32]) -> __m256 {
    assert!(x.len() >= W);
    // SAFETY: eight values are there; the load needs no alignment.
    unsafe { _mm256_loadu_ps(x.as_ptr()) }
}

/// Writes eight values to the start of `x`.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn store(x: &mut [f32], v: __m256) {
    assert!(x.len() >= W);
    // SAFETY: eight values are there; the store needs no alignment.
    unsafe { _mm256_storeu_ps(x.as_mut_ptr(), v) }
}

/// Denormals to zero; NaN stays.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn flush(x: __m256) -> __m256 {
    let magnitude = _mm256_andnot_ps(_mm256_set1_ps(-0.0), x);
    let normal = _mm256_cmp_ps::<_CMP_NLT_UQ>(magnitude, _mm256_set1_ps(f32::MIN_POSITIVE));
    _mm256_and_ps(x, normal)
}

/// One register tile, one FMA chain per output: `tile[i][j] += a[k][i] * b[k][j]`.
#[target_feature(enable = "avx2,fma")]
pub(super) fn tile_sequential(a: &[f32], b: &[f32], tile: &mut [[f32; NR]; MR_SEQUENTIAL]) {
    let mut acc = [[_mm256_setzero_ps(); 2]; MR_SEQUENTIAL];
    for (acc, row) in acc.iter_mut().zip(&*tile) {
        *acc = [load(row), load(&row[W..])];
    }
    for (a, b) in a.chunks_exact(MR_SEQUENTIAL).zip(b.chunks_exact(NR)) {
        let b = [load(b), load(&b[W..])];
        for i in 0..MR_SEQUENTIAL {
            let x = _mm256_set1_ps(a[i]);
            acc[i][0] = _mm256_fmadd_ps(x, b[0], acc[i][0]);
            acc[i][1] = _mm256_fmadd_ps(x, b[1], acc[i][1]);
        }
    }
    for (acc, row) in acc.iter().zip(tile) {
        store(row, acc[0]);
        store(&mut row[W..], acc[1]);
    }
}

/// One register tile, an even and an odd chain per output, of values whose products
/// cannot be denormal.
#[target_feature(enable = "avx2,fma")]
pub(super) fn tile_even_odd(a: &[f32], b: &[f32], tile: &mut [[f32; NR]; MR_SEQUENTIAL]) {
    const M: usize = MR_EVEN_ODD;
    for (a, b) in a.chunks(BLOCK * M).zip(b.chunks(BLOCK * NR)) {
        let mut even = [[_mm256_setzero_ps(); 2]; M];
        let mut odd = even;
        let (a_pairs, b_pairs) = (a.chunks_exact(2 * M), b.chunks_exact(2 * NR));
        let last = (a_pairs.remainder(), b_pairs.remainder());
        for (a, b) in a_pairs.zip(b_pairs) {
            advance(&mut even, a, b);
            advance(&mut odd, &a[M..], &b[NR..]);
        }
        if last.0.len() >= M {
            advance(&mut even, last.0, last.1);
        }
        for i in 0..M {
            for half in 0..2 {
                let row = &mut tile[i][half * W..];
                let sum = _mm256_add_ps(even[i][half], odd[i][half]);
                store(row, flush(_mm256_add_ps(load(row), sum)));
            }
        }
    }
}

/// One step of the chains of a register tile.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn advance(chains: &mut [[__m256; 2]; MR_EVEN_ODD], a: &[f32], b: &[f32]) {
    let b = [load(b), load(&b[W..])];
    for i in 0..MR_EVEN_ODD {
        let x = _mm256_set1_ps(a[i]);
        chains[i][0] = _mm256_fmadd_ps(x, b[0], chains[i][0]);
        chains[i][1] = _mm256_fmadd_ps(x, b[1], chains[i][1]);
    }
}

/// `acc[l] += sum over r of x[r] * y[r * lanes + l]` for `acc.len()` lanes from `at`,
/// a multiple of 8, one chain per lane.
#[target_feature(enable = "avx2,fma")]
pub(crate) fn vec_mat_sequential(x: &[f32], y: &[f32], lanes: usize, at: usize, acc: &mut [f32]) {
    const N: usize = 8;
    let mut done = 0;
    while done < acc.len() {
        let n = N.min((acc.len() - done) / W);
        let mut regs = [_mm256_setzero_ps(); N];
        for (v, reg) in regs.iter_mut().enumerate().take(n) {
            *reg = load(&acc[done + v * W..]);
        }
        for (r, &x) in x.iter().enumerate() {
            let row = &y[r * lanes + at + done..][..n * W];
            let x = _mm256_set1_ps(x);
            for (reg, y) in regs.iter_mut().zip(row.chunks_exact(W)) {
                *reg = _mm256_fmadd_ps(x, load(y), *reg);
            }
        }
        for (v, reg) in regs.iter().enumerate().take(n) {
            store(&mut acc[done + v * W..], *reg);
        }
        done += n * W;
    }
}

/// As [`vec_mat_sequential`] with even and odd chains, of values whose products cannot be
/// denormal.
#[target_feature(enable = "avx2,fma")]
pub(crate) fn vec_mat_even_odd(x: &[f32], y: &[f32], lanes: usize, at: usize, acc: &mut [f32]) {
    let mut done = 0;
    while acc.len() - done >= 4 * W {
        even_odd_lanes::<4>(x, &y[at + done..], lanes, &mut acc[done..]);
        done += 4 * W;
    }
    while done < acc.len() {
        even_odd_lanes::<1>(x, &y[at + done..], lanes, &mut acc[done..]);
        done += W;
    }
}

#[inline]
#[target_feature(enable = "avx2,fma")]
fn even_odd_lanes<const N: usize>(x: &[f32], y: &[f32], lanes: usize, acc: &mut [f32]) {
    for (block, x) in x.chunks(BLOCK).enumerate() {
        let y = &y[block * BLOCK * lanes..];
        let mut even = [_mm256_setzero_ps(); N];
        let mut odd = even;
        for (pair, x) in x.chunks(2).enumerate() {
            let at = 2 * pair * lanes;
            step(&mut even, x[0], &y[at..]);
            if let Some(&x) = x.get(1) {
                step(&mut odd, x, &y[at + lanes..]);
            }
        }
        for v in 0..N {
            let to = &mut acc[v * W..];
            let sum = _mm256_add_ps(even[v], odd[v]);
            store(to, flush(_mm256_add_ps(load(to), sum)));
        }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma")]
fn step<const N: usize>(chain: &mut [__m256; N], x: f32, y: &[f32]) {
    let y = &y[..N * W];
    let x = _mm256_set1_ps(x);
    for v in 0..N {
        chain[v] = _mm256_fmadd_ps(x, load(&y[v * W..]), chain[v]);
    }
}

/// Integer dots of [`MR`] rows with [`LANES`] outputs over one group: codes `t + 1` as
/// bytes `[quads][LANES][4]` times int8 `[quads][MR][4]`, exactly.
///
/// A byte product is at most 2 * 127; two are added by `maddubs` and up to
/// [`QUADS_OF_A_PART`] such sums fit into an i16.
#[target_feature(enable = "avx2,fma")]
pub(super) fn int8_dots(codes: &[u8], q: &[i8], dots: &mut [[i32; LANES]; MR]) {
    let ones = _mm256_set1_epi16(1);
    let mut sums = [[_mm256_setzero_si256(); 2]; MR];
    let parts = codes
        .chunks(QUADS_OF_A_PART * LANES * 4)
        .zip(q.chunks(QUADS_OF_A_PART * MR * 4));
    for (codes, q) in parts {
        let mut part = [[_mm256_setzero_si256(); 2]; MR];
        for (codes, q) in codes.chunks_exact(LANES * 4).zip(q.chunks_exact(MR * 4)) {
            // SAFETY: a chunk of codes has 64 bytes; the loads need no alignment.
            let w = unsafe {
                let at = codes.as_ptr().cast::<__m256i>();
                [_mm256_loadu_si256(at), _mm256_loadu_si256(at.add(1))]
            };
            for i in 0..MR {
                let four = [q[4 * i], q[4 * i + 1], q[4 * i + 2], q[4 * i + 3]];
                let x = _mm256_set1_epi32(i32::from_le_bytes(four.map(|b| b as u8)));
                for half in 0..2 {
                    let products = _mm256_maddubs_epi16(w[half], x);
                    part[i][half] = _mm256_add_epi16(part[i][half], products);
                }
            }
        }
        for i in 0..MR {
            for half in 0..2 {
                let wide = _mm256_madd_epi16(part[i][half], ones);
                sums[i][half] = _mm256_add_epi32(sums[i][half], wide);
            }
        }
    }
    for (dots, sums) in dots.iter_mut().zip(&sums) {
        // SAFETY: `dots` has 16 values of 4 bytes; the stores need no alignment.
        unsafe {
            let at = dots.as_mut_ptr().cast::<__m256i>();
            _mm256_storeu_si256(at, sums[0]);
            _mm256_storeu_si256(at.add(1), sums[1]);
        }
    }
}
