//! Products in their plain form: the definition that blocked kernels reproduce.

use crate::cpu::Isa;
#[cfg(target_arch = "x86_64")]
use crate::cpu::{amx, avx2, avx512, bf16 as units};
use crate::real::Real;
use half::bf16;
use setun_ternary::groups_per_row;
#[cfg(target_arch = "x86_64")]
use std::any::TypeId;

/// Order in which a sum of products is taken (ARCHITECTURE.md, Numbers).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// f32: one FMA chain over the ascending index.
    Sequential,
    /// bf16, as the AMX unit does it: per 32 values one FMA chain over even and one over
    /// odd indices, both from zero, then `acc += even + odd`; denormals, of `acc` too, become
    /// zeros of their sign.
    EvenOdd,
}

/// Values of the reduction that share a pair of chains in [`Order::EvenOdd`].
pub const BLOCK: usize = 32;

/// Below this sum of exponents a product chain may meet denormals: bf16 values have 8
/// significant bits, so every product and every rounded sum of products is a multiple of
/// `2^(ea - 7) * 2^(eb - 7)`, and nothing between 0 and 2^-126 can appear while
/// `ea + eb - 14 >= -126`.
pub const SAFE_EXPONENTS: i32 = -112;

/// Whether products of values with these least exponents need their denormals flushed.
pub fn needs_flush(order: Order, min_exponent_a: i32, min_exponent_b: i32) -> bool {
    order == Order::EvenOdd && min_exponent_a.saturating_add(min_exponent_b) < SAFE_EXPONENTS
}

/// `acc[l] += sum over r of x[r] * y[r * lanes + l]`, in the given order.
///
/// `flush` may be false where [`needs_flush`] is; the result is the same, sooner.
#[inline(always)]
pub fn vec_mat<R: Real>(
    isa: Isa,
    order: Order,
    flush: bool,
    x: &[R],
    y: &[R],
    lanes: usize,
    acc: &mut [R],
) {
    debug_assert!(y.len() >= x.len() * lanes && acc.len() == lanes);
    // Wide enough that the latency of an FMA is hidden, narrow enough for 16 registers.
    let mut at = vector_lanes(isa, order, flush, x, y, lanes, acc);
    if order == Order::Sequential {
        at = run_chains::<R, 64>(order, flush, x, y, lanes, at, acc);
    }
    at = run_chains::<R, 32>(order, flush, x, y, lanes, at, acc);
    at = run_chains::<R, 8>(order, flush, x, y, lanes, at, acc);
    run_chains::<R, 1>(order, flush, x, y, lanes, at, acc);
}

/// Rows that [`rows_mat`] takes at a time.
pub const ROWS_TOGETHER: usize = 6;

/// `acc[i, l] += sum over r of x[i * stride + r] * y[r * lanes + l]` for at most
/// [`ROWS_TOGETHER`] rows of `acc`, in [`Order::EvenOdd`], of values that need no flush: as
/// [`vec_mat`] on each row, sooner. False where there is no loop for it; nothing is done then.
#[inline(always)]
pub fn rows_mat<R: Real>(
    isa: Isa,
    x: &[R],
    (stride, depth): (usize, usize),
    y: &[R],
    lanes: usize,
    acc: &mut [R],
) -> bool {
    #[cfg(target_arch = "x86_64")]
    if isa.has_avx2() && lanes.is_multiple_of(16) && TypeId::of::<R>() == TypeId::of::<f32>() {
        const { assert!(ROWS_TOGETHER == avx2::ROWS_TOGETHER) };
        let (x, y) = (bytemuck::cast_slice(x), bytemuck::cast_slice(y));
        let acc = bytemuck::cast_slice_mut(acc);
        // SAFETY: an `Isa` that has AVX2 or AVX-512 is made by `Isa::available` only, after CPUID
        // has shown it.
        unsafe {
            if isa.has_avx512() {
                avx512::rows_even_odd(x, (stride, depth), y, lanes, acc);
            } else {
                avx2::rows_even_odd(x, (stride, depth), y, lanes, acc);
            }
        }
        return true;
    }
    let _ = (isa, x, stride, depth, y, lanes, acc);
    false
}

/// Rows of bf16 as they are stored, in pieces that need not lie together: `steps` rows of `lanes`
/// values each. There is one piece, or `steps` is even.
#[derive(Clone, Copy)]
pub struct StoredRows<'a> {
    /// `[steps, lanes]` each.
    pub pieces: &'a [&'a [bf16]],
    /// Rows of a piece.
    pub steps: usize,
    /// Values of a row.
    pub lanes: usize,
    /// What will be read next, in as many pieces of the same size or fewer: asked for meanwhile.
    pub ahead: &'a [&'a [bf16]],
}

/// Most rows that [`stored_mat`] takes; 0 where there is no loop for it.
#[inline(always)]
pub fn most_stored_rows<R: Real>(isa: Isa) -> usize {
    #[cfg(target_arch = "x86_64")]
    if isa.has_avx2() && TypeId::of::<R>() == TypeId::of::<f32>() {
        return match isa {
            isa if isa.has_bf16() => units::stored::MOST_ROWS,
            _ => avx2::MOST_STORED,
        };
    }
    let _ = isa;
    0
}

/// [`rows_mat`] for `rows` rows of `x` and `acc`, which are `x_stride` and `acc_stride` apart, with
/// each of `ys` as it is stored: widening them beforehand takes longer than so few products. They
/// have the same sizes, and their results lie beside each other. False for more than
/// [`most_stored_rows`] and where the sizes do not suit; nothing is done then.
#[inline(always)]
pub fn stored_mat<R: Real>(
    isa: Isa,
    rows: usize,
    (x, x_stride): (&[R], usize),
    ys: &[StoredRows<'_>],
    (acc, acc_stride): (&mut [R], usize),
) -> bool {
    #[cfg(target_arch = "x86_64")]
    if (1..=most_stored_rows::<R>(isa)).contains(&rows)
        && ys.iter().all(|y| y.lanes.is_multiple_of(16))
    {
        let (x, acc) = (bytemuck::cast_slice(x), bytemuck::cast_slice_mut(acc));
        if isa.has_bf16() {
            // SAFETY: such an `Isa` is made by `Isa::available` only, after CPUID has shown
            // AVX512-BF16.
            let is_done = unsafe {
                units::stored::even_odd(rows, (x, x_stride), ys, (&mut *acc, acc_stride))
            };
            if is_done || rows > avx2::MOST_STORED {
                return is_done;
            }
        }
        for (i, &y) in ys.iter().enumerate() {
            let acc = (&mut acc[i * y.lanes..], acc_stride);
            // SAFETY: `most_stored_rows` is 0 without AVX2. An `Isa` that has it is made by
            // `Isa::available` only, after CPUID has shown it.
            unsafe { avx2::stored_even_odd(rows, (x, x_stride), y, acc) };
        }
        return true;
    }
    let _ = (isa, rows, x, x_stride, ys, acc, acc_stride);
    false
}

/// [`rows_mat`] for any number of rows, and with denormals flushed, on a unit that is made for
/// it. False where there is none or the sizes do not suit; nothing is done then.
#[inline(always)]
pub fn tiles_mat<R: Real>(
    isa: Isa,
    x: &[R],
    (stride, depth): (usize, usize),
    y: &[R],
    lanes: usize,
    acc: &mut [R],
) -> bool {
    #[cfg(target_arch = "x86_64")]
    if isa.has_bf16() && TypeId::of::<R>() == TypeId::of::<f32>() {
        let (x, y) = (bytemuck::cast_slice(x), bytemuck::cast_slice(y));
        let acc = bytemuck::cast_slice_mut(acc);
        let multiply = match isa {
            Isa::Amx => units::rows_even_odd::<amx::Tiles>,
            _ => units::rows_even_odd::<units::Dots>,
        };
        // SAFETY: an `Isa` that has a unit for bf16 is made by `Isa::available` only, where the
        // processor has it.
        return unsafe { multiply(x, (stride, depth), y, lanes, acc) };
    }
    let _ = (isa, x, stride, depth, y, lanes, acc);
    false
}

/// Transposes the rows of `from`, `width` wide, into the lanes of `to` `[width, tile]`;
/// lanes without a row become zero.
#[inline(always)]
pub fn transpose<R: Real>(isa: Isa, from: &[R], width: usize, tile: usize, to: &mut [R]) {
    let rows = from.len() / width;
    if rows < tile {
        to.fill(R::ZERO);
    }
    let done = vector_transpose(isa, from, width, tile, to);
    for (lane, row) in from.chunks(width).enumerate().skip(done) {
        for (d, &x) in row.iter().enumerate() {
            to[d * tile + lane] = x;
        }
    }
}

/// Transposes the rows that the instruction set has a loop for and returns their number.
#[inline(always)]
fn vector_transpose<R: Real>(
    isa: Isa,
    from: &[R],
    width: usize,
    tile: usize,
    to: &mut [R],
) -> usize {
    #[cfg(target_arch = "x86_64")]
    if isa.has_avx2() && width.is_multiple_of(8) && TypeId::of::<R>() == TypeId::of::<f32>() {
        let from: &[f32] = bytemuck::cast_slice(from);
        let to: &mut [f32] = bytemuck::cast_slice_mut(to);
        let whole = from.len() / width / 8 * 8;
        for row in (0..whole).step_by(8) {
            let (from, to) = (&from[row * width..], &mut to[row..]);
            // SAFETY: an `Isa` that has AVX2 is made by `Isa::available` only, after CPUID has shown it.
            unsafe { avx2::transpose_eight(from, width, tile, to) };
        }
        return whole;
    }
    let _ = (isa, from, width, tile, to);
    0
}

/// Runs the lanes that the instruction set has a loop for and returns their number.
#[inline(always)]
fn vector_lanes<R: Real>(
    isa: Isa,
    order: Order,
    flush: bool,
    x: &[R],
    y: &[R],
    lanes: usize,
    acc: &mut [R],
) -> usize {
    #[cfg(target_arch = "x86_64")]
    if isa.has_avx2() && !flush && TypeId::of::<R>() == TypeId::of::<f32>() {
        let whole = lanes / 8 * 8;
        let (x, y) = (bytemuck::cast_slice(x), bytemuck::cast_slice(y));
        let acc = bytemuck::cast_slice_mut(&mut acc[..whole]);
        // SAFETY: an `Isa` that has AVX2 is made by `Isa::available` only, after CPUID has shown it.
        unsafe {
            match order {
                Order::Sequential => avx2::vec_mat_sequential(x, y, lanes, 0, acc),
                Order::EvenOdd => avx2::vec_mat_even_odd(x, y, lanes, 0, acc),
            }
        }
        return whole;
    }
    let _ = (isa, order, flush, x, y, lanes, acc);
    0
}

/// Runs the chains from lane `at`, `W` at a time, and returns the first lane left.
#[inline(always)]
fn run_chains<R: Real, const W: usize>(
    order: Order,
    flush: bool,
    x: &[R],
    y: &[R],
    lanes: usize,
    mut at: usize,
    acc: &mut [R],
) -> usize {
    while at + W <= lanes {
        let mut regs = [R::ZERO; W];
        regs.copy_from_slice(&acc[at..at + W]);
        chains::<R, W>(order, flush, x, y, lanes, at, &mut regs);
        acc[at..at + W].copy_from_slice(&regs);
        at += W;
    }
    at
}

/// The chains of `W` neighbouring lanes from lane `at`.
#[inline(always)]
fn chains<R: Real, const W: usize>(
    order: Order,
    flush: bool,
    x: &[R],
    y: &[R],
    lanes: usize,
    at: usize,
    acc: &mut [R; W],
) {
    match (order, flush) {
        (Order::Sequential, _) => {
            for (r, &x) in x.iter().enumerate() {
                fma_row::<R, W, false>(x, &y[r * lanes + at..], acc);
            }
        }
        (Order::EvenOdd, false) => even_odd::<R, W, false>(x, y, lanes, at, acc),
        (Order::EvenOdd, true) => even_odd::<R, W, true>(x, y, lanes, at, acc),
    }
}

#[inline(always)]
fn even_odd<R: Real, const W: usize, const FLUSH: bool>(
    x: &[R],
    y: &[R],
    lanes: usize,
    at: usize,
    acc: &mut [R; W],
) {
    let flush = |v: R| if FLUSH { v.flush() } else { v };
    for (b, block) in x.chunks(BLOCK).enumerate() {
        let y = &y[b * BLOCK * lanes..];
        let (mut even, mut odd) = ([R::ZERO; W], [R::ZERO; W]);
        for (r, &x) in block.iter().enumerate() {
            let chain = if r % 2 == 0 { &mut even } else { &mut odd };
            fma_row::<R, W, FLUSH>(x, &y[r * lanes + at..], chain);
        }
        for ((acc, &e), &o) in acc.iter_mut().zip(&even).zip(&odd) {
            // Always flushed: the accumulator itself may come from anywhere.
            *acc = (acc.flush() + flush(e + o)).flush();
        }
    }
}

#[inline(always)]
fn fma_row<R: Real, const W: usize, const FLUSH: bool>(x: R, y: &[R], acc: &mut [R; W]) {
    let y: &[R; W] = y[..W].try_into().expect("W values");
    for (acc, &y) in acc.iter_mut().zip(y) {
        *acc = x.mul_add(y, *acc);
        if FLUSH {
            *acc = acc.flush();
        }
    }
}

/// One int8 row times one ternary row (ARCHITECTURE.md, Numbers):
/// `y = fma(s[g] * a[g], dot[g], y)` over ascending groups, with exact integer dots.
#[inline(always)]
pub fn int8_dot<R: Real>(
    q: &[i8],
    a: &[f32],
    trits: &[i8],
    scales: &[f32],
    group_size: usize,
) -> R {
    debug_assert_eq!(a.len(), groups_per_row(q.len(), group_size));
    let groups = q.chunks(group_size).zip(trits.chunks(group_size));
    let mut y = R::ZERO;
    for ((q, t), (&a, &s)) in groups.zip(a.iter().zip(scales)) {
        let dot: i32 = q
            .iter()
            .zip(t)
            .map(|(&q, &t)| i32::from(q) * i32::from(t))
            .sum();
        y = R::from_f32(s * a).mul_add(R::from_f32(dot as f32), y);
    }
    y
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(n: usize, scale: f32) -> Vec<f32> {
        (0..n)
            .map(|i| ((i * 7919 % 1009) as f32 / 504.5 - 1.0) * scale)
            .collect()
    }

    #[test]
    fn even_odd_follows_its_definition() {
        for (n, lanes) in [(1, 1), (31, 3), (32, 16), (33, 17), (100, 40)] {
            let x: Vec<f32> = values(n, 1.0).iter().map(|x| x.round_bf16()).collect();
            let y: Vec<f32> = values(n * lanes, 0.3)
                .iter()
                .map(|x| x.round_bf16())
                .collect();
            let mut got = vec![0.5; lanes];
            vec_mat(
                Isa::Reference,
                Order::EvenOdd,
                false,
                &x,
                &y,
                lanes,
                &mut got,
            );
            for (l, got) in got.iter().enumerate() {
                let mut acc = 0.5f32;
                for b in (0..n).step_by(32) {
                    let mut chain = [0.0f32; 2];
                    for r in b..n.min(b + 32) {
                        chain[r % 2] = x[r].mul_add(y[r * lanes + l], chain[r % 2]);
                    }
                    acc += chain[0] + chain[1];
                }
                assert_eq!(*got, acc);
            }
        }
    }

    #[test]
    fn skipping_the_flush_is_exact_where_it_is_allowed() {
        for e in [-100i32, -56, -50] {
            let x: Vec<f32> = values(97, 2.0f32.powi(e))
                .iter()
                .map(|x| x.round_bf16())
                .collect();
            let y: Vec<f32> = values(97, 2.0f32.powi(-56))
                .iter()
                .map(|x| x.round_bf16())
                .collect();
            let (mut with, mut without) = ([0.0f32], [0.0f32]);
            vec_mat(Isa::Reference, Order::EvenOdd, true, &x, &y, 1, &mut with);
            vec_mat(
                Isa::Reference,
                Order::EvenOdd,
                false,
                &x,
                &y,
                1,
                &mut without,
            );
            let needed = needs_flush(Order::EvenOdd, f32::min_exponent(&x), f32::min_exponent(&y));
            assert!(needed || with == without);
        }
    }

    #[test]
    fn several_rows_at_once_equal_each_row() {
        for isa in Isa::available() {
            for (depth, lanes) in [(1, 16), (31, 32), (32, 16), (33, 48), (64, 64), (70, 16)] {
                let (stride, rounded) = (depth + 3, |x: &f32| x.round_bf16());
                let y: Vec<f32> = values(depth * lanes, 0.3).iter().map(rounded).collect();
                for rows in 1..=ROWS_TOGETHER {
                    let x: Vec<f32> = values(rows * stride, 1.0).iter().map(rounded).collect();
                    let mut got = values(rows * lanes, 2.0);
                    let mut expected = got.clone();
                    if !rows_mat(isa, &x, (stride, depth), &y, lanes, &mut got) {
                        assert_eq!(got, expected, "nothing is done");
                        continue;
                    }
                    for (x, acc) in x.chunks(stride).zip(expected.chunks_mut(lanes)) {
                        let (isa, order) = (Isa::Reference, Order::EvenOdd);
                        vec_mat(isa, order, false, &x[..depth], &y, lanes, acc);
                    }
                    assert_eq!(got, expected, "{rows} rows, depth {depth}, {lanes} lanes");
                }
            }
        }
    }

    #[test]
    fn rows_as_they_are_stored_equal_widened_ones() {
        for isa in Isa::available() {
            for (pieces, steps, lanes) in [
                (1, 1, 16),
                (1, 31, 16),
                (1, 128, 16),
                (4, 16, 64),
                (3, 22, 48),
            ] {
                let y: Vec<f32> = values(pieces * steps * lanes, 0.3);
                let y: Vec<bf16> = y.iter().map(|&x| bf16::from_f32(x)).collect();
                let wide: Vec<f32> = y.iter().map(|x| x.to_f32()).collect();
                let parts: Vec<&[bf16]> = y.chunks(steps * lanes).collect();
                let stored = StoredRows {
                    pieces: &parts,
                    steps,
                    lanes,
                    ahead: &parts[1..],
                };
                let (depth, apart) = (pieces * steps, lanes + 16);
                for rows in 1..=17 {
                    let x: Vec<f32> = values(rows * (depth + 3), 1.0);
                    let x: Vec<f32> = x.iter().map(|x| x.round_bf16()).collect();
                    let mut got = values(rows * apart, 2.0);
                    let mut expected = got.clone();
                    if stored_mat(isa, rows, (&x, depth + 3), &[stored], (&mut got, apart)) {
                        for (x, acc) in x.chunks(depth + 3).zip(expected.chunks_mut(apart)) {
                            let (isa, order) = (Isa::Reference, Order::EvenOdd);
                            let acc = &mut acc[..lanes];
                            vec_mat(isa, order, false, &x[..depth], &wide, lanes, acc);
                        }
                    }
                    assert_eq!(got, expected, "{rows} rows, {pieces} x {steps} x {lanes}");
                }
            }
        }
    }

    #[test]
    fn transposing_fills_lanes_without_a_row_with_zeros() {
        for isa in Isa::available() {
            for (rows, width, tile) in [(1, 1, 1), (8, 8, 8), (13, 24, 16), (16, 20, 16), (5, 3, 7)]
            {
                let from = values(rows * width, 1.0);
                let mut to = vec![f32::NAN; width * tile];
                transpose(isa, &from, width, tile, &mut to);
                for (i, &x) in to.iter().enumerate() {
                    let (d, lane) = (i / tile, i % tile);
                    let expected = from.get(lane * width + d).filter(|_| lane < rows);
                    assert_eq!(x, expected.copied().unwrap_or(0.0), "{rows} x {width}");
                }
            }
        }
    }
}
