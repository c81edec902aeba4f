//! Blocked products of real numbers: `c[i, j] += sum over r of a(i, r) * b(r, j)`.
//!
//! The reduction of one output is one sequence over ascending r, whatever the blocking:
//! between blocks of r the accumulator rests in `c`, which loses nothing. So the result
//! equals [`vec_mat`](crate::kernels::product::vec_mat) bit for bit. Work is split over
//! rectangles of outputs. Operands are packed into panels of f32 by closures of the
//! caller, which is where rounding to bf16 and `s * t` happen.

use crate::cpu::multiversion;
use crate::cpu::{Isa, Pool, RowParts, RowsMut};
use crate::kernels::product::{BLOCK, Order, needs_flush};
use crate::real::Real;
use std::ops::Range;

/// Steps of the reduction in a block: a multiple of [`BLOCK`].
const DEPTH: usize = 256;
/// Most rows of a rectangle; a multiple of both row tiles.
const ROWS: usize = 384;
/// Most columns of a rectangle.
const COLS: usize = 256;
/// Columns of a register tile.
const NR: usize = 16;
/// Rows of a register tile, f32: 6 x 16 accumulators fill 12 vector registers.
const MR_SEQUENTIAL: usize = 6;
/// Rows of a register tile, bf16: as many registers, for even and odd chains.
const MR_EVEN_ODD: usize = 3;

/// Values of scratch that a worker needs.
pub const SCRATCH: usize = DEPTH * (ROWS + COLS);

/// Shape and order of a product.
#[derive(Clone, Copy, Debug)]
pub struct Gemm {
    /// Rows of `c`.
    pub rows: usize,
    /// Columns of `c`.
    pub cols: usize,
    /// Length of the reduction.
    pub depth: usize,
    /// Order of the reduction.
    pub order: Order,
}

/// Output that tasks write in disjoint rectangles.
struct Rectangles<R> {
    start: *mut R,
}

// SAFETY: tasks write disjoint rectangles only.
unsafe impl<R: Send> Sync for Rectangles<R> {}

/// Computes `c += a * b`, `c` row-major `[rows, cols]`.
///
/// `pack_a(rows, depths, panel)` puts `a(rows.start + i, depths.start + k)` into lane i at
/// depth k of the panel; `pack_b(cols, depths, panel)` does likewise with
/// `b(depths.start + k, cols.start + j)`. Panels come zeroed. `scratch` has [`SCRATCH`]
/// values for each worker.
pub fn gemm<R: Real>(
    pool: &Pool,
    isa: Isa,
    shape: Gemm,
    pack_a: impl Fn(Range<usize>, Range<usize>, Panel<'_, R>) + Sync,
    pack_b: impl Fn(Range<usize>, Range<usize>, Panel<'_, R>) + Sync,
    c: &mut [R],
    scratch: &mut [R],
) {
    assert_eq!(c.len(), shape.rows * shape.cols);
    let split = Split::new(shape, pool.threads());
    let out = Rectangles {
        start: c.as_mut_ptr(),
    };
    let scratch = RowsMut::new(scratch, SCRATCH);
    let out = &out;
    pool.run(split.tasks(), &|task, worker| {
        let (rows, columns) = split.rectangle(task);
        // SAFETY: each worker has its own row of scratch, and runs one task at a time.
        let scratch = unsafe { scratch.part(worker..worker + 1) };
        let (a, b) = scratch.split_at_mut(DEPTH * ROWS);
        for d in (0..shape.depth).step_by(DEPTH) {
            let depths = d..shape.depth.min(d + DEPTH);
            let mr = register_rows(shape.order);
            for i in rows.clone().step_by(mr) {
                let values = &mut a[(i - rows.start) * DEPTH..][..mr * depths.len()];
                values.fill(R::ZERO);
                pack_a(
                    i..rows.end.min(i + mr),
                    depths.clone(),
                    Panel { values, lanes: mr },
                );
            }
            for j in columns.clone().step_by(NR) {
                let values = &mut b[(j - columns.start) * DEPTH..][..NR * depths.len()];
                values.fill(R::ZERO);
                pack_b(
                    j..columns.end.min(j + NR),
                    depths.clone(),
                    Panel { values, lanes: NR },
                );
            }
            let block = Block {
                rows: rows.len(),
                cols: columns.len(),
                depth: depths.len(),
            };
            // SAFETY: the rectangle lies in `c` (asserted above) and belongs to this task.
            unsafe {
                let at = out.start.add(rows.start * shape.cols + columns.start);
                multiply_block(isa, shape.order, block, a, b, at, shape.cols);
            }
        }
    });
}

/// How the outputs are cut into rectangles of about equal size.
struct Split {
    shape: Gemm,
    row_step: usize,
    col_step: usize,
}

impl Split {
    fn new(shape: Gemm, threads: usize) -> Self {
        let even = |n: usize, most: usize, unit: usize| {
            n.div_ceil(n.div_ceil(most).max(1))
                .next_multiple_of(unit)
                .max(unit)
        };
        let row_step = even(shape.rows, ROWS, MR_SEQUENTIAL);
        let mut split = Self {
            shape,
            row_step,
            col_step: even(shape.cols, COLS, NR),
        };
        // A few tasks for each thread, so that a slow one does not hold up the others.
        while threads > 1 && split.tasks() < 3 * threads && split.col_step > 4 * NR {
            split.col_step = (split.col_step / 2).next_multiple_of(NR);
        }
        split
    }

    fn wide(&self) -> usize {
        self.shape.cols.div_ceil(self.col_step)
    }

    fn tasks(&self) -> usize {
        self.shape.rows.div_ceil(self.row_step) * self.wide()
    }

    fn rectangle(&self, task: usize) -> (Range<usize>, Range<usize>) {
        let (i, j) = (
            task / self.wide() * self.row_step,
            task % self.wide() * self.col_step,
        );
        let rows = i..self.shape.rows.min(i + self.row_step);
        (rows, j..self.shape.cols.min(j + self.col_step))
    }
}

/// A strip of an operand as the register tiles read it: `[depth, lanes]`.
pub struct Panel<'a, R> {
    /// Values.
    pub values: &'a mut [R],
    /// Rows or columns of the strip.
    pub lanes: usize,
}

impl<R: Real> Panel<'_, R> {
    /// Fills lane `lane` from `values` along the depth.
    #[inline(always)]
    pub fn put_lane(&mut self, lane: usize, values: impl Iterator<Item = R>) {
        for (row, x) in self.values.chunks_exact_mut(self.lanes).zip(values) {
            row[lane] = x;
        }
    }

    /// Fills depth `k` from `values` along the lanes.
    #[inline(always)]
    pub fn put_depth(&mut self, k: usize, values: impl Iterator<Item = R>) {
        let row = &mut self.values[k * self.lanes..(k + 1) * self.lanes];
        for (to, x) in row.iter_mut().zip(values) {
            *to = x;
        }
    }
}

/// Rows of a register tile.
pub fn register_rows(order: Order) -> usize {
    match order {
        Order::Sequential => MR_SEQUENTIAL,
        Order::EvenOdd => MR_EVEN_ODD,
    }
}

/// Sizes of one packed block.
#[derive(Clone, Copy)]
struct Block {
    rows: usize,
    cols: usize,
    depth: usize,
}

/// # Safety
/// `c` points to `block.rows` rows of `block.cols` values, `stride` apart, that nobody
/// else uses.
unsafe fn multiply_block<R: Real>(
    isa: Isa,
    order: Order,
    block: Block,
    a: &[R],
    b: &[R],
    c: *mut R,
    stride: usize,
) {
    let mr = register_rows(order);
    for j in (0..block.cols).step_by(NR) {
        let nr = NR.min(block.cols - j);
        let b = &b[j * DEPTH..j * DEPTH + block.depth * NR];
        let b_exponent = if order == Order::EvenOdd {
            R::min_exponent(b)
        } else {
            0
        };
        for i in (0..block.rows).step_by(mr) {
            let m = mr.min(block.rows - i);
            let a = &a[i * DEPTH..i * DEPTH + block.depth * mr];
            let mut tile = [[R::ZERO; NR]; MR_SEQUENTIAL];
            // SAFETY: rows `i..i + m` and columns `j..j + nr` lie in the caller's block.
            unsafe { load_tile(&mut tile, c.add(i * stride + j), stride, m, nr) };
            match order {
                Order::Sequential => tile_sequential(isa, a, b, &mut tile),
                Order::EvenOdd => {
                    let flush = needs_flush(order, R::min_exponent(a), b_exponent);
                    tile_even_odd(isa, flush, a, b, &mut tile);
                }
            }
            // SAFETY: as above.
            unsafe { store_tile(&tile, c.add(i * stride + j), stride, m, nr) };
        }
    }
}

/// # Safety
/// `c` points to `m` rows of `n` values, `stride` apart.
unsafe fn load_tile<R: Real>(
    tile: &mut [[R; NR]; MR_SEQUENTIAL],
    c: *const R,
    stride: usize,
    m: usize,
    n: usize,
) {
    for (i, row) in tile.iter_mut().enumerate().take(m) {
        // SAFETY: the caller's promise.
        let from = unsafe { std::slice::from_raw_parts(c.add(i * stride), n) };
        row[..n].copy_from_slice(from);
    }
}

/// # Safety
/// `c` points to `m` rows of `n` values, `stride` apart, that nobody else uses.
unsafe fn store_tile<R: Real>(
    tile: &[[R; NR]; MR_SEQUENTIAL],
    c: *mut R,
    stride: usize,
    m: usize,
    n: usize,
) {
    for (i, row) in tile.iter().enumerate().take(m) {
        // SAFETY: the caller's promise.
        let to = unsafe { std::slice::from_raw_parts_mut(c.add(i * stride), n) };
        to.copy_from_slice(&row[..n]);
    }
}

multiversion! {
    /// One register tile, one chain per output.
    fn tile_sequential[R: Real][R](a: &[R], b: &[R], tile: &mut [[R; NR]; MR_SEQUENTIAL])
        = sequential;
}

multiversion! {
    /// One register tile, even and odd chains.
    fn tile_even_odd[R: Real][R](
        flush: bool,
        a: &[R],
        b: &[R],
        tile: &mut [[R; NR]; MR_SEQUENTIAL],
    ) = even_odd;
}

#[inline(always)]
fn sequential<R: Real>(a: &[R], b: &[R], tile: &mut [[R; NR]; MR_SEQUENTIAL]) {
    let mut acc = *tile;
    for (a, b) in a.chunks_exact(MR_SEQUENTIAL).zip(b.chunks_exact(NR)) {
        for i in 0..MR_SEQUENTIAL {
            for j in 0..NR {
                acc[i][j] = a[i].mul_add(b[j], acc[i][j]);
            }
        }
    }
    *tile = acc;
}

#[inline(always)]
fn even_odd<R: Real>(flush: bool, a: &[R], b: &[R], tile: &mut [[R; NR]; MR_SEQUENTIAL]) {
    if flush {
        even_odd_chains::<R, true>(a, b, tile);
    } else {
        even_odd_chains::<R, false>(a, b, tile);
    }
}

#[inline(always)]
fn even_odd_chains<R: Real, const FLUSH: bool>(
    a: &[R],
    b: &[R],
    tile: &mut [[R; NR]; MR_SEQUENTIAL],
) {
    const MR: usize = MR_EVEN_ODD;
    let flush = |x: R| if FLUSH { x.flush() } else { x };
    for (a, b) in a.chunks(BLOCK * MR).zip(b.chunks(BLOCK * NR)) {
        let mut even = [[R::ZERO; NR]; MR];
        let mut odd = [[R::ZERO; NR]; MR];
        for (a, b) in a.chunks(2 * MR).zip(b.chunks(2 * NR)) {
            for i in 0..MR {
                for j in 0..NR {
                    even[i][j] = flush(a[i].mul_add(b[j], even[i][j]));
                }
            }
            if a.len() < 2 * MR {
                break;
            }
            for i in 0..MR {
                for j in 0..NR {
                    odd[i][j] = flush(a[MR + i].mul_add(b[NR + j], odd[i][j]));
                }
            }
        }
        for i in 0..MR {
            for j in 0..NR {
                tile[i][j] = (tile[i][j] + flush(even[i][j] + odd[i][j])).flush();
            }
        }
    }
}
