//! Blocked int8 x ternary products (DESIGN 3.3), equal to
//! [`int8_dot`](crate::kernels::product::int8_dot) bit for bit.
//!
//! The integer sums are exact, so their order is free; only the combine over groups
//! rounds, and it stays one FMA chain over ascending groups. Sixteen outputs lie in the
//! lanes of i16 vectors: a trit times an int8 is at most 127, and [`PART`] of them fit
//! into an i16 sum.

use crate::cpu::multiversion;
use crate::cpu::{Isa, Pool, RowParts, RowsMut};
use crate::real::Real;
use setun_ternary::groups_per_row;

/// Outputs in the lanes of a panel.
const LANES: usize = 16;
/// Rows that share a pass over a panel.
const MR: usize = 4;
/// Products that an i16 holds: 127 * 256 < 2^15.
const PART: usize = 256;
/// Output panels of a task.
const PANELS: usize = 4;

/// int8 activations `[rows, width]` with their scales `[rows, groups]`.
#[derive(Clone, Copy)]
pub struct Int8Rows<'a> {
    /// Values.
    pub q: &'a [i8],
    /// Scales.
    pub scales: &'a [f32],
}

/// Ternary weights `[out, width]` with their scales `[out, groups]`.
#[derive(Clone, Copy)]
pub struct TernaryRows<'a> {
    /// Trits.
    pub trits: &'a [i8],
    /// Scales.
    pub scales: &'a [f32],
}

/// Widths of a product.
#[derive(Clone, Copy)]
pub struct Int8Shape {
    /// Rows of activations.
    pub rows: usize,
    /// Outputs.
    pub out: usize,
    /// Length of the reduction.
    pub width: usize,
    /// Values that share a scale.
    pub group_size: usize,
}

/// Scratch values that a worker needs for inputs of `width` values.
pub fn scratch_len(width: usize, group_size: usize) -> usize {
    let scales = 2 * LANES * groups_per_row(width, group_size);
    ((LANES + MR) * width + scales).next_multiple_of(32)
}

struct Rectangles<R> {
    start: *mut R,
    len: usize,
}

// SAFETY: tasks write disjoint columns only.
unsafe impl<R: Send> Sync for Rectangles<R> {}

/// `y[r, n] = x[r] * w[n]`. `scratch` has [`scratch_len`] values for each worker.
pub fn int8_linear<R: Real>(
    pool: &Pool,
    isa: Isa,
    shape: Int8Shape,
    x: Int8Rows<'_>,
    w: TernaryRows<'_>,
    y: &mut [R],
    scratch: &mut [i16],
) {
    assert_eq!(y.len(), shape.rows * shape.out);
    let per_worker = scratch_len(shape.width, shape.group_size);
    let scratch = RowsMut::new(scratch, per_worker);
    let out = Rectangles {
        start: y.as_mut_ptr(),
        len: y.len(),
    };
    let out = &out;
    pool.run(shape.out.div_ceil(LANES * PANELS), &|task, worker| {
        // SAFETY: each worker has its own row of scratch, and runs one task at a time.
        let scratch = unsafe { scratch.part(worker..worker + 1) };
        let first = task * LANES * PANELS;
        for n0 in (first..shape.out.min(first + LANES * PANELS)).step_by(LANES) {
            let n = LANES.min(shape.out - n0);
            panel(
                isa,
                shape,
                x,
                w,
                n0,
                n,
                scratch,
                &mut |row, values: &[f32; LANES]| {
                    let at = row * shape.out + n0;
                    assert!(at + n <= out.len);
                    for (i, &v) in values[..n].iter().enumerate() {
                        // SAFETY: inside `y` by the assertion; columns `n0..n0 + n` belong to
                        // this task alone.
                        unsafe { *out.start.add(at + i) = R::from_f32(v) };
                    }
                },
            );
        }
    });
}

/// All rows of one panel of `n` outputs from `n0`; `put(row, values)`.
#[allow(clippy::too_many_arguments)]
fn panel(
    isa: Isa,
    shape: Int8Shape,
    x: Int8Rows<'_>,
    w: TernaryRows<'_>,
    n0: usize,
    n: usize,
    scratch: &mut [i16],
    put: &mut dyn FnMut(usize, &[f32; LANES]),
) {
    let groups = groups_per_row(shape.width, shape.group_size);
    let (trits, rest) = scratch.split_at_mut(LANES * shape.width);
    let (inputs, rest) = rest.split_at_mut(MR * shape.width);
    let scales: &mut [f32] = bytemuck::cast_slice_mut(&mut rest[..2 * LANES * groups]);
    trits.fill(0);
    scales.fill(0.0);
    for lane in 0..n {
        let row = &w.trits[(n0 + lane) * shape.width..(n0 + lane + 1) * shape.width];
        for (k, &t) in row.iter().enumerate() {
            trits[k * LANES + lane] = i16::from(t);
        }
        for g in 0..groups {
            scales[g * LANES + lane] = w.scales[(n0 + lane) * groups + g];
        }
    }
    for r0 in (0..shape.rows).step_by(MR) {
        let m = MR.min(shape.rows - r0);
        let mut a = [&x.scales[..0]; MR];
        for (i, a) in a.iter_mut().enumerate() {
            // Rows behind the last repeat it; their results are not used.
            let r = r0 + i.min(m - 1);
            *a = &x.scales[r * groups..(r + 1) * groups];
            let q = &x.q[r * shape.width..(r + 1) * shape.width];
            for (k, &q) in q.iter().enumerate() {
                inputs[k * MR + i] = i16::from(q);
            }
        }
        let mut y = [[0.0f32; LANES]; MR];
        row_block(isa, shape.group_size, inputs, a, trits, scales, &mut y);
        for (i, y) in y.iter().enumerate().take(m) {
            put(r0 + i, y);
        }
    }
}

multiversion! {
    /// Four rows against one panel.
    fn row_block[][](
        group_size: usize,
        inputs: &[i16],
        a: [&[f32]; MR],
        trits: &[i16],
        scales: &[f32],
        y: &mut [[f32; LANES]; MR],
    ) = row_block_kernel;
}

#[inline(always)]
fn row_block_kernel(
    group_size: usize,
    inputs: &[i16],
    a: [&[f32]; MR],
    trits: &[i16],
    scales: &[f32],
    y: &mut [[f32; LANES]; MR],
) {
    let groups = inputs
        .chunks(MR * group_size)
        .zip(trits.chunks(LANES * group_size));
    for (g, ((q, t), s)) in groups.zip(scales.chunks_exact(LANES)).enumerate() {
        let mut dots = [[0i32; LANES]; MR];
        for (q, t) in q.chunks(MR * PART).zip(t.chunks(LANES * PART)) {
            let mut part = [[0i16; LANES]; MR];
            for (q, t) in q.chunks_exact(MR).zip(t.chunks_exact(LANES)) {
                for i in 0..MR {
                    for j in 0..LANES {
                        part[i][j] = part[i][j].wrapping_add(q[i].wrapping_mul(t[j]));
                    }
                }
            }
            for i in 0..MR {
                for j in 0..LANES {
                    dots[i][j] += i32::from(part[i][j]);
                }
            }
        }
        for i in 0..MR {
            for j in 0..LANES {
                y[i][j] = f32::mul_add(s[j] * a[i][g], dots[i][j] as f32, y[i][j]);
            }
        }
    }
}
