//! AVX2 and FMA: the inner loops of products, with outputs in the lanes.
//!
//! Every function computes what its portable counterpart does, bit for bit; the order of
//! operations of each output is the same, only several outputs advance together.

use super::gemm::{MR, NR, TileOperands};
use super::int8::{self, LANES};
use crate::kernels::product::{BLOCK, StoredRows};
use half::bf16;
use std::arch::x86_64::*;

/// Lanes of a vector of f32.
const W: usize = 8;
/// Numbers of bf16 in a cache line.
const LINE: usize = 32;
/// Quads whose sums fit into an i16: 2 * 2 * 127 * 64 < 2^15.
const QUADS_OF_A_PART: usize = 64;

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

/// Denormals to zeros of their sign; NaN stays.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn flush(x: __m256) -> __m256 {
    let sign = _mm256_set1_ps(-0.0);
    let magnitude = _mm256_andnot_ps(sign, x);
    let normal = _mm256_cmp_ps::<_CMP_NLT_UQ>(magnitude, _mm256_set1_ps(f32::MIN_POSITIVE));
    _mm256_and_ps(x, _mm256_or_ps(normal, sign))
}

/// One register tile, one FMA chain per output.
///
/// # Safety
/// `c` points to [`MR`] rows of [`NR`] values, `stride` apart, that nobody else
/// uses.
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn tile_sequential(tile: TileOperands<'_, f32>, c: *mut f32, stride: usize) {
    let mut chains = [[_mm256_setzero_ps(); 2]; MR];
    for (i, chain) in chains.iter_mut().enumerate() {
        // SAFETY: row `i` of the caller's tile.
        unsafe {
            let at = c.add(i * stride);
            *chain = [_mm256_loadu_ps(at), _mm256_loadu_ps(at.add(W))];
        }
    }
    let depth = tile.right.len() / NR;
    check_reach(&tile, depth);
    for k in 0..depth {
        // SAFETY: `check_reach` has shown that all steps lie inside the operands.
        unsafe {
            let left = tile.left.as_ptr().add(k * tile.step);
            advance(&mut chains, left, tile.row, tile.right.as_ptr().add(k * NR));
        }
    }
    for (i, chain) in chains.iter().enumerate() {
        // SAFETY: as above.
        unsafe {
            let at = c.add(i * stride);
            _mm256_storeu_ps(at, chain[0]);
            _mm256_storeu_ps(at.add(W), chain[1]);
        }
    }
}

/// One register tile, an even and an odd chain per output, of values whose products
/// cannot be denormal.
///
/// Those products, and all rounded sums of them, are multiples of 2^-126. If the sums so far
/// are, too, all sums stay such multiples: below 2^-102 they are exact in f32, above its
/// spacing is a multiple of 2^-126 itself. Then nothing is denormal, and nothing is flushed.
///
/// # Safety
/// `c` points to [`MR`] rows of [`NR`] values, `stride` apart, that nobody else
/// uses.
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn tile_even_odd(tile: TileOperands<'_, f32>, c: *mut f32, stride: usize) {
    // SAFETY: the caller's promise.
    unsafe {
        if is_coarse(c, stride) {
            even_odd_blocks::<false>(tile, c, stride);
        } else {
            even_odd_blocks::<true>(tile, c, stride);
        }
    }
}

/// Whether all values of a register tile are zero or at least 2^-103, and so multiples of
/// 2^-126.
///
/// # Safety
/// `c` points to [`MR`] rows of [`NR`] values, `stride` apart.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn is_coarse(c: *const f32, stride: usize) -> bool {
    // One less than the bits of 2^-103; zero wraps around to the largest number.
    const LEAST: i32 = (24 << 23) - 1;
    let magnitude = _mm256_set1_epi32(i32::MAX);
    let one = _mm256_set1_epi32(1);
    let mut least = _mm256_set1_epi32(-1);
    for i in 0..MR {
        for half in 0..2 {
            // SAFETY: the caller's promise; the load needs no alignment.
            let bits = unsafe { _mm256_loadu_si256(c.add(i * stride + half * W).cast()) };
            let bits = _mm256_sub_epi32(_mm256_and_si256(bits, magnitude), one);
            least = _mm256_min_epu32(least, bits);
        }
    }
    let enough = _mm256_max_epu32(least, _mm256_set1_epi32(LEAST));
    _mm256_movemask_epi8(_mm256_cmpeq_epi32(enough, least)) == -1
}

/// [`tile_even_odd`], sums flushed or not.
///
/// # Safety
/// As there.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn even_odd_blocks<const FLUSH: bool>(
    tile: TileOperands<'_, f32>,
    c: *mut f32,
    stride: usize,
) {
    let depth = tile.right.len() / NR;
    check_reach(&tile, depth);
    // Both chains of half the rows fill the registers. One chain of all rows after the
    // other needs fewer loads: a tenth faster where another program shares the core, a
    // tenth slower where none does.
    for first in (0..MR).step_by(HALF) {
        for start in (0..depth).step_by(BLOCK) {
            let steps = BLOCK.min(depth - start);
            let at = first * tile.row + start * tile.step;
            // SAFETY: `check_reach` has shown that the rows `first..first + HALF` and the
            // steps `start..start + steps` lie inside the operands.
            let chains = unsafe {
                let left = tile.left.as_ptr().add(at);
                even_and_odd(steps, left, &tile, tile.right.as_ptr().add(start * NR))
            };
            let [even, odd] = chains;
            for i in 0..HALF {
                for half in 0..2 {
                    let sum = _mm256_add_ps(even[i][half], odd[i][half]);
                    // SAFETY: row `first + i` of the caller's tile.
                    unsafe {
                        let at = c.add((first + i) * stride + half * W);
                        let so_far = _mm256_loadu_ps(at);
                        let total = if FLUSH {
                            flush(_mm256_add_ps(flush(so_far), sum))
                        } else {
                            _mm256_add_ps(so_far, sum)
                        };
                        _mm256_storeu_ps(at, total);
                    }
                }
            }
        }
    }
}

/// Rows that advance together in [`tile_even_odd`].
const HALF: usize = MR / 2;
const _: () = assert!(MR == 2 * HALF);

/// The even and the odd chain of [`HALF`] rows over `n` steps, from zero.
///
/// # Safety
/// From `left` and `right` on, that many steps lie inside the operands of `tile`.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn even_and_odd(
    n: usize,
    mut left: *const f32,
    tile: &TileOperands<'_, f32>,
    mut right: *const f32,
) -> [[[__m256; 2]; HALF]; 2] {
    let mut even = [[_mm256_setzero_ps(); 2]; HALF];
    let mut odd = even;
    for _ in 0..n / 2 {
        // SAFETY: the caller's promise.
        unsafe {
            advance(&mut even, left, tile.row, right);
            advance(&mut odd, left.add(tile.step), tile.row, right.add(NR));
        }
        left = left.wrapping_add(2 * tile.step);
        right = right.wrapping_add(2 * NR);
    }
    if n % 2 == 1 {
        // SAFETY: as above.
        unsafe { advance(&mut even, left, tile.row, right) };
    }
    [even, odd]
}

/// Panics unless [`MR`] rows and `depth` steps lie inside the operands.
#[inline]
fn check_reach(tile: &TileOperands<'_, f32>, depth: usize) {
    let last = (MR - 1) * tile.row + depth.saturating_sub(1) * tile.step;
    assert!(last < tile.left.len() && depth * NR <= tile.right.len());
}

/// One step of the chains of `ROWS` rows.
///
/// # Safety
/// `left` points to `ROWS` values, `row` apart, and `right` to [`NR`] values.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn advance<const ROWS: usize>(
    chains: &mut [[__m256; 2]; ROWS],
    left: *const f32,
    row: usize,
    right: *const f32,
) {
    // SAFETY: the caller's promise; the loads need no alignment.
    unsafe {
        let b = [_mm256_loadu_ps(right), _mm256_loadu_ps(right.add(W))];
        for (i, chain) in chains.iter_mut().enumerate() {
            let x = _mm256_set1_ps(*left.add(i * row));
            chain[0] = _mm256_fmadd_ps(x, b[0], chain[0]);
            chain[1] = _mm256_fmadd_ps(x, b[1], chain[1]);
        }
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
            let so_far = if block == 0 {
                flush(load(to))
            } else {
                load(to)
            };
            store(to, flush(_mm256_add_ps(so_far, sum)));
        }
    }
}

/// Rows that [`rows_even_odd`] advances together: with two vectors each they fill the
/// registers, and a load serves all of them.
pub(crate) const ROWS_TOGETHER: usize = 6;

/// `acc[i, l] += sum over r of x[i * stride + r] * y[r * lanes + l]` for up to
/// [`ROWS_TOGETHER`] rows of `lanes` values, a multiple of 16, and `depth` steps: as
/// [`vec_mat_even_odd`] on each row, of values whose products cannot be denormal.
#[target_feature(enable = "avx2,fma")]
pub(crate) fn rows_even_odd(
    x: &[f32],
    (stride, depth): (usize, usize),
    y: &[f32],
    lanes: usize,
    acc: &mut [f32],
) {
    match acc.len() / lanes {
        6 => rows_of::<6>(x, (stride, depth), y, lanes, acc),
        5 => rows_of::<5>(x, (stride, depth), y, lanes, acc),
        4 => rows_of::<4>(x, (stride, depth), y, lanes, acc),
        3 => rows_of::<3>(x, (stride, depth), y, lanes, acc),
        2 => rows_of::<2>(x, (stride, depth), y, lanes, acc),
        1 => rows_of::<1>(x, (stride, depth), y, lanes, acc),
        rows => unreachable!("{rows} rows at a time"),
    }
}

#[inline]
#[target_feature(enable = "avx2,fma")]
fn rows_of<const M: usize>(
    x: &[f32],
    (stride, depth): (usize, usize),
    y: &[f32],
    lanes: usize,
    acc: &mut [f32],
) {
    assert!(x.len() >= (M - 1) * stride + depth && y.len() >= depth * lanes);
    assert!(acc.len() >= M * lanes && lanes.is_multiple_of(2 * W));
    for at in (0..lanes).step_by(2 * W) {
        for start in (0..depth).step_by(BLOCK) {
            let steps = BLOCK.min(depth - start);
            let mut chains = [[[_mm256_setzero_ps(); 2]; M]; 2];
            // SAFETY: by the assertions all rows of `x` have `depth` values, and steps
            // below `depth` of `y` have `lanes`, of which `at..at + 16` are read.
            unsafe {
                let (x, y) = (x.as_ptr().add(start), y.as_ptr().add(start * lanes + at));
                if M <= BOTH_CHAINS {
                    both_chains(&mut chains, steps, (x, stride), (y, lanes), None);
                } else {
                    let [even, odd] = &mut chains;
                    row_chains(even, steps.div_ceil(2), (x, stride), (y, lanes), None);
                    let (x, y) = (x.wrapping_add(1), y.wrapping_add(lanes));
                    row_chains(odd, steps / 2, (x, stride), (y, lanes), None);
                }
            }
            add_chains(chains, start == 0, &mut acc[at..], lanes);
        }
    }
}

/// Adds the sums of a block to 16 values of each of `M` rows, `stride` apart.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn add_chains<const M: usize>(
    [even, odd]: [[[__m256; 2]; M]; 2],
    is_first: bool,
    acc: &mut [f32],
    stride: usize,
) {
    for i in 0..M {
        for half in 0..2 {
            let to = &mut acc[i * stride + half * W..];
            let sum = _mm256_add_ps(even[i][half], odd[i][half]);
            let so_far = match is_first {
                true => flush(load(to)),
                false => load(to),
            };
            store(to, flush(_mm256_add_ps(so_far, sum)));
        }
    }
}

/// Up to so many rows the even and the odd chains advance together, in the registers that
/// more rows would fill, and hide the latency of an FMA.
const BOTH_CHAINS: usize = 3;

/// Most rows that [`stored_even_odd`] takes.
pub(crate) const MOST_STORED: usize = 16;

/// [`rows_even_odd`] on up to [`MOST_STORED`] rows of `x` and of `acc`, which are `x_stride` and
/// `acc_stride` apart, with `y` as it is stored.
#[target_feature(enable = "avx2,fma")]
pub(crate) fn stored_even_odd(
    rows: usize,
    (x, x_stride): (&[f32], usize),
    mut y: StoredRows<'_>,
    (acc, acc_stride): (&mut [f32], usize),
) {
    assert!(rows <= MOST_STORED);
    let runs = rows.div_ceil(ROWS_TOGETHER);
    let mut first = 0;
    for run in 0..runs {
        let n = (rows - first).div_ceil(runs - run);
        let (x, acc) = (&x[first * x_stride..], &mut acc[first * acc_stride..]);
        let (x, acc) = ((x, x_stride), (acc, acc_stride));
        match n {
            6 => stored_chain_by_chain::<6>(x, y, acc),
            5 => stored_chain_by_chain::<5>(x, y, acc),
            4 => stored_chain_by_chain::<4>(x, y, acc),
            3 => stored_rows_of::<3>(x, y, acc),
            2 => stored_rows_of::<2>(x, y, acc),
            _ => stored_rows_of::<1>(x, y, acc),
        }
        first += n;
        y.ahead = &[];
    }
}

/// Number of steps of the pieces. Panics unless `M` rows of `x` have as many, each piece has its
/// rows, and these are whole pairs of vectors.
#[inline]
fn check_stored<const M: usize>(x: &[f32], x_stride: usize, y: StoredRows<'_>) -> usize {
    let (steps, lanes) = (y.steps, y.lanes);
    let depth = y.pieces.len() * steps;
    assert!(steps > 0 && (steps.is_multiple_of(2) || y.pieces.len() == 1));
    assert!(y.pieces.iter().all(|piece| piece.len() >= steps * lanes));
    assert!(x.len() >= (M - 1) * x_stride + depth && lanes.is_multiple_of(2 * W));
    depth
}

/// [`stored_even_odd`] for more than [`BOTH_CHAINS`] rows.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn stored_chain_by_chain<const M: usize>(
    (x, x_stride): (&[f32], usize),
    y: StoredRows<'_>,
    (acc, acc_stride): (&mut [f32], usize),
) {
    let (steps, lanes) = (y.steps, y.lanes);
    let depth = check_stored::<M>(x, x_stride, y);
    for at in (0..lanes).step_by(2 * W) {
        for start in (0..depth).step_by(BLOCK) {
            let end = depth.min(start + BLOCK);
            let mut chains = [[[_mm256_setzero_ps(); 2]; M]; 2];
            for (parity, chains) in chains.iter_mut().enumerate() {
                let mut r = start;
                while r < end {
                    let (piece, row) = (r / steps, r % steps);
                    let n = (steps - row).min(end - r);
                    let from = (row + parity) * lanes + at;
                    let ahead = y.ahead.get(piece).filter(|_| at.is_multiple_of(LINE));
                    let ahead = ahead.map(|ahead| ahead.as_ptr().wrapping_add(from));
                    // SAFETY: as was checked, all rows of `x` have `depth` values, and the
                    // piece has `steps` rows of `lanes` values, of which `at..at + 16` are read
                    // in rows `row + parity` and every second one behind it, below `row + n`.
                    // Even steps are at even places of `x`: `n` is even but at the end.
                    unsafe {
                        let x = x.as_ptr().add(r).wrapping_add(parity);
                        let y = y.pieces[piece].as_ptr().wrapping_add(from);
                        let count = (n + 1 - parity) / 2;
                        row_chains(chains, count, (x, x_stride), (y, lanes), ahead);
                    }
                    r += n;
                }
            }
            add_chains(chains, start == 0, &mut acc[at..], acc_stride);
        }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma")]
fn stored_rows_of<const M: usize>(
    (x, x_stride): (&[f32], usize),
    y: StoredRows<'_>,
    (acc, acc_stride): (&mut [f32], usize),
) {
    let (steps, lanes) = (y.steps, y.lanes);
    let depth = check_stored::<M>(x, x_stride, y);
    for at in (0..lanes).step_by(2 * W) {
        let mut pieces = y.pieces.iter();
        let mut pieces_ahead = y.ahead.iter();
        let mut piece: &[bf16] = &[];
        let mut ahead = None;
        for start in (0..depth).step_by(BLOCK) {
            let end = depth.min(start + BLOCK);
            let mut chains = [[[_mm256_setzero_ps(); 2]; M]; 2];
            let mut r = start;
            while r < end {
                if piece.is_empty() {
                    piece = &pieces.as_slice()[0][..steps * lanes];
                    pieces.next();
                    let next = pieces_ahead.next().filter(|_| at.is_multiple_of(LINE));
                    ahead = next.map(|next| next.as_ptr().wrapping_add(at));
                }
                let n = (piece.len() / lanes).min(end - r);
                // SAFETY: as was checked, all rows of `x` have `depth` values, and `r + n` is at
                // most `depth`; `piece` has `n` rows of `lanes` values at least, of which `at..at
                // + 16` are read. Even steps are at even places of `x`: `n` is even but at the end.
                unsafe {
                    let (x, y) = (x.as_ptr().add(r), piece.as_ptr().add(at));
                    both_chains(&mut chains, n, (x, x_stride), (y, lanes), ahead);
                }
                ahead = ahead.map(|ahead| ahead.wrapping_add(n * lanes));
                (piece, r) = (&piece[n * lanes..], r + n);
            }
            add_chains(chains, start == 0, &mut acc[at..], acc_stride);
        }
    }
}

/// A number as it is stored.
trait Stored: Copy {
    /// Eight values in f32, exactly.
    ///
    /// # Safety
    /// They are there, and the processor has AVX2.
    unsafe fn eight(from: *const Self) -> __m256;
}

impl Stored for f32 {
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn eight(from: *const Self) -> __m256 {
        // SAFETY: the caller's promise; the load needs no alignment.
        unsafe { _mm256_loadu_ps(from) }
    }
}

impl Stored for bf16 {
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn eight(from: *const Self) -> __m256 {
        // SAFETY: the caller's promise; the load needs no alignment.
        let bits = unsafe { _mm_loadu_si128(from.cast()) };
        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(bits)))
    }
}

/// Advances the even and odd chains of `M` rows by `n` neighbouring steps, and asks memory for
/// the lines of as many rows from `ahead`.
///
/// # Safety
/// As [`row_chains`], for `n` steps of both.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn both_chains<const M: usize, T: Stored>(
    chains: &mut [[[__m256; 2]; M]; 2],
    n: usize,
    (x, stride): (*const f32, usize),
    (y, lanes): (*const T, usize),
    ahead: Option<*const T>,
) {
    let step = |r: usize, chains: &mut [[__m256; 2]; M]| {
        if let Some(ahead) = ahead {
            _mm_prefetch::<_MM_HINT_T1>(ahead.wrapping_add(r * lanes).cast());
        }
        // SAFETY: the caller's promise, as `r < n`; the loads need no alignment.
        unsafe {
            let y = y.add(r * lanes);
            let values = [T::eight(y), T::eight(y.add(W))];
            for (i, chain) in chains.iter_mut().enumerate() {
                let x = _mm256_set1_ps(*x.add(i * stride + r));
                chain[0] = _mm256_fmadd_ps(x, values[0], chain[0]);
                chain[1] = _mm256_fmadd_ps(x, values[1], chain[1]);
            }
        }
    };
    for pair in 0..n / 2 {
        step(2 * pair, &mut chains[0]);
        step(2 * pair + 1, &mut chains[1]);
    }
    if n % 2 == 1 {
        step(n - 1, &mut chains[0]);
    }
}

/// Advances the chains of `M` rows by `n` steps, two apart, and asks memory for the lines of as
/// many rows from `ahead`.
///
/// # Safety
/// `x` points to `M` rows, `stride` apart, and `y` to rows of 16 values, `lanes` apart; both
/// have that many steps.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn row_chains<const M: usize, T: Stored>(
    chains: &mut [[__m256; 2]; M],
    n: usize,
    (mut x, stride): (*const f32, usize),
    (mut y, lanes): (*const T, usize),
    mut ahead: Option<*const T>,
) {
    for _ in 0..n {
        if let Some(ahead) = &mut ahead {
            _mm_prefetch::<_MM_HINT_T1>(ahead.cast());
            *ahead = ahead.wrapping_add(2 * lanes);
        }
        // SAFETY: the caller's promise; the loads need no alignment.
        unsafe {
            let values = [T::eight(y), T::eight(y.add(W))];
            for (i, chain) in chains.iter_mut().enumerate() {
                let x = _mm256_set1_ps(*x.add(i * stride));
                chain[0] = _mm256_fmadd_ps(x, values[0], chain[0]);
                chain[1] = _mm256_fmadd_ps(x, values[1], chain[1]);
            }
        }
        x = x.wrapping_add(2);
        y = y.wrapping_add(2 * lanes);
    }
}

/// Transposes eight rows of `from`, `width` apart, into lanes `0..8` of the rows of `to`,
/// `tile` apart; `width` is a multiple of 8.
#[target_feature(enable = "avx2,fma")]
pub(crate) fn transpose_eight(from: &[f32], width: usize, tile: usize, to: &mut [f32]) {
    for d in (0..width).step_by(W) {
        let rows: [__m256; W] = std::array::from_fn(|i| load(&from[i * width + d..]));
        // Pairs, then fours within each half, then the halves.
        let pairs: [__m256; W] = std::array::from_fn(|i| {
            let (a, b) = (rows[i / 2 * 2], rows[i / 2 * 2 + 1]);
            if i % 2 == 0 {
                _mm256_unpacklo_ps(a, b)
            } else {
                _mm256_unpackhi_ps(a, b)
            }
        });
        let fours: [__m256; W] = std::array::from_fn(|i| {
            let (a, b) = (
                pairs[i / 4 * 4 + i % 4 / 2],
                pairs[i / 4 * 4 + i % 4 / 2 + 2],
            );
            if i % 2 == 0 {
                _mm256_shuffle_ps::<0x44>(a, b)
            } else {
                _mm256_shuffle_ps::<0xee>(a, b)
            }
        });
        for i in 0..W {
            let (a, b) = (fours[i % 4], fours[i % 4 + 4]);
            let row = if i < 4 {
                _mm256_permute2f128_ps::<0x20>(a, b)
            } else {
                _mm256_permute2f128_ps::<0x31>(a, b)
            };
            store(&mut to[(d + i) * tile..], row);
        }
    }
}

/// Transposes a square of 16 x 16 numbers of 32 bits.
#[inline]
#[target_feature(enable = "avx2,fma")]
pub(super) fn turn(from: &[u32], to: &mut [u32]) {
    const SIDE: usize = 2 * W;
    // Moved, not computed with: any bits stay what they are.
    let (from, to) = (bytemuck::cast_slice(from), bytemuck::cast_slice_mut(to));
    transpose_eight(from, SIDE, SIDE, to);
    transpose_eight(&from[W * SIDE..], SIDE, SIDE, &mut to[W..]);
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

/// One group of [`int8::MR`] rows and [`LANES`] outputs: integer dots of the codes with the
/// rows' values, exactly, then `y = fma(s * a, dot - sum, y)`.
///
/// A byte product is at most 2 * 127; two are added by `maddubs` and up to
/// [`QUADS_OF_A_PART`] such sums fit into an i16.
#[target_feature(enable = "avx2,fma")]
pub(super) fn int8_group(group: &int8::Group<'_>, y: &mut [[f32; LANES]; int8::MR]) {
    let ones = _mm256_set1_epi16(1);
    let mut sums = [[_mm256_setzero_si256(); 2]; int8::MR];
    let parts = group
        .codes
        .chunks(QUADS_OF_A_PART * LANES * 4)
        .zip(group.q.chunks(QUADS_OF_A_PART * int8::MR * 4));
    for (codes, q) in parts {
        let mut part = [[_mm256_setzero_si256(); 2]; int8::MR];
        for (codes, q) in codes
            .chunks_exact(LANES * 4)
            .zip(q.chunks_exact(int8::MR * 4))
        {
            // SAFETY: a chunk of codes has 64 bytes; the loads need no alignment.
            let w = unsafe {
                let at = codes.as_ptr().cast::<__m256i>();
                [_mm256_loadu_si256(at), _mm256_loadu_si256(at.add(1))]
            };
            for i in 0..int8::MR {
                let four = [q[4 * i], q[4 * i + 1], q[4 * i + 2], q[4 * i + 3]];
                let x = _mm256_set1_epi32(i32::from_le_bytes(four.map(|b| b as u8)));
                for half in 0..2 {
                    let products = _mm256_maddubs_epi16(w[half], x);
                    part[i][half] = _mm256_add_epi16(part[i][half], products);
                }
            }
        }
        for i in 0..int8::MR {
            for half in 0..2 {
                let wide = _mm256_madd_epi16(part[i][half], ones);
                sums[i][half] = _mm256_add_epi32(sums[i][half], wide);
            }
        }
    }
    for (i, (y, dots)) in y.iter_mut().zip(&sums).enumerate() {
        let too_large = _mm256_set1_epi32(group.sums[i]);
        let a = _mm256_set1_ps(group.a[i]);
        for (half, &dots) in dots.iter().enumerate() {
            let dot = _mm256_cvtepi32_ps(_mm256_sub_epi32(dots, too_large));
            let scale = _mm256_mul_ps(load(&group.scales[half * W..]), a);
            let to = &mut y[half * W..];
            store(to, _mm256_fmadd_ps(scale, dot, load(to)));
        }
    }
}

/// [`peak::fma`](super::peak::fma) on one thread; returns the multiply-adds.
#[target_feature(enable = "avx2,fma")]
pub(super) fn fma_rounds(rounds: usize) -> f64 {
    const CHAINS: usize = 12;
    let a = _mm256_set1_ps(std::hint::black_box(0.999));
    let b = _mm256_set1_ps(std::hint::black_box(1e-3));
    let mut chains = [_mm256_set1_ps(1.0); CHAINS];
    for _ in 0..rounds {
        for chain in &mut chains {
            *chain = _mm256_fmadd_ps(*chain, a, b);
        }
    }
    std::hint::black_box(chains);
    (rounds * CHAINS * W) as f64
}

/// [`peak::int8`](super::peak::int8) on one thread; returns the multiply-adds.
#[target_feature(enable = "avx2,fma")]
pub(super) fn int8_rounds(rounds: usize) -> f64 {
    const CHAINS: usize = 8;
    let bytes = std::hint::black_box([1i8; 4 * CHAINS]);
    let codes = std::array::from_fn::<_, CHAINS, _>(|i| _mm256_set1_epi8(bytes[i]));
    let mut sums = [_mm256_setzero_si256(); CHAINS];
    let mut x = _mm256_set1_epi8(bytes[CHAINS]);
    let step = _mm256_set1_epi8(bytes[CHAINS + 1]);
    for _ in 0..rounds {
        // Another x each round: the products must not be taken out of the loop.
        x = _mm256_add_epi8(x, step);
        for (sum, &code) in sums.iter_mut().zip(&codes) {
            *sum = _mm256_add_epi16(*sum, _mm256_maddubs_epi16(code, x));
        }
    }
    std::hint::black_box(sums);
    (rounds * CHAINS * 4 * W) as f64
}
