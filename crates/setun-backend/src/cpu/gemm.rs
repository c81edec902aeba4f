//! Blocked products of real numbers: `c[i, j] += sum over r of a(i, r) * b(r, j)`.
//!
//! The reduction of one output is one sequence over ascending r, whatever the blocking:
//! between blocks of r the accumulator rests in `c`, which loses nothing. So the result
//! equals [`vec_mat`](crate::kernels::product::vec_mat) bit for bit. Work is split over
//! rectangles of outputs, whose [`Operand`]s are packed a block of steps at a time.

use super::operand::{Exponents, Left, Operand};
#[cfg(target_arch = "x86_64")]
use super::{amx, bf16};
use crate::cpu::{Isa, Pool, RowParts, RowsMut};
use crate::kernels::product::{BLOCK, Order, needs_flush};
use crate::real::Real;
use std::ops::Range;

/// Steps of the reduction in a block: a multiple of [`BLOCK`].
pub(super) const DEPTH: usize = 256;
/// Most rows of a rectangle; a multiple of [`MR`].
pub(super) const ROWS: usize = 384;
/// Most columns of a rectangle.
pub(super) const COLS: usize = 256;
/// Columns of a register tile.
pub(super) const NR: usize = 16;
/// Rows of a register tile: 6 x 16 accumulators fill 12 vector registers.
pub(super) const MR: usize = 6;

/// Values that a panel of [`MR`] rows, step by step, is from the next one: some more than it
/// holds, so that its last step may be written with a whole vector.
pub(super) const PANEL: usize = MR * DEPTH + 16;
/// Values of scratch for the left operand.
const LEFT: usize = ROWS / MR * PANEL;

/// Values of scratch that a worker needs.
pub const SCRATCH: usize = LEFT + DEPTH * COLS;

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

/// Computes `c += a * b`, `c` row-major `[rows, cols]`. `scratch` has [`SCRATCH`] values
/// for each worker.
pub fn gemm<R: Real>(
    pool: &Pool,
    isa: Isa,
    shape: Gemm,
    a: Operand<'_, R>,
    b: Operand<'_, R>,
    c: &mut [R],
    scratch: &mut [R],
) {
    assert_eq!(c.len(), shape.rows * shape.cols);
    #[cfg(target_arch = "x86_64")]
    if let Some((a, b)) = as_tiles(isa, shape.order, &a, &b) {
        let (c, scratch) = (
            bytemuck::cast_slice_mut(c),
            bytemuck::cast_slice_mut(scratch),
        );
        let multiply = match isa {
            Isa::Amx => bf16::gemm::<amx::Tiles>,
            _ => bf16::gemm::<bf16::Dots>,
        };
        // SAFETY: an `Isa` that has a unit for bf16 is made by `Isa::available` only, where the
        // processor has it.
        return unsafe { multiply(pool, shape, (&a, &b), c, scratch) };
    }
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
        // SAFETY: the rectangle lies in `c` (asserted above).
        let at = unsafe { out.start.add(rows.start * shape.cols + columns.start) };
        let (left, right) = scratch.split_at_mut(LEFT);
        let mut exponents = Exponents::default();
        for d in (0..shape.depth).step_by(DEPTH) {
            let depths = d..shape.depth.min(d + DEPTH);
            let block = Block {
                rows: rows.len(),
                cols: columns.len(),
                depth: depths.len(),
            };
            b.pack_right(isa, columns.clone(), depths.clone(), right);
            let left = a.pack_left(isa, rows.clone(), depths, left);
            if shape.order == Order::EvenOdd {
                let sizes = (block.rows, block.cols, block.depth);
                exponents.measure(isa, (left, right), sizes);
            }
            let operands = (left, &*right);
            // SAFETY: the rectangle lies in `c` (asserted above) and belongs to this task.
            unsafe {
                multiply_block(
                    isa,
                    shape.order,
                    block,
                    operands,
                    &exponents,
                    at,
                    shape.cols,
                );
            }
        }
    });
}

/// The operands of a product that a unit for bf16 computes.
#[cfg(target_arch = "x86_64")]
fn as_tiles<'a, R: Real>(
    isa: Isa,
    order: Order,
    a: &Operand<'a, R>,
    b: &Operand<'a, R>,
) -> Option<(Operand<'a, f32>, Operand<'a, f32>)> {
    (isa.has_bf16() && order == Order::EvenOdd).then_some(())?;
    Some((a.as_f32()?, b.as_f32()?))
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
        let row_step = even(shape.rows, ROWS, MR);
        let mut split = Self {
            shape,
            row_step,
            col_step: even(shape.cols, COLS, NR),
        };
        // A few tasks for each thread, so that a slow one does not hold up the others; cut
        // where fewer values are packed anew.
        while threads > 1 && split.tasks() < 3 * threads {
            let again_left = shape.rows * split.wide();
            let again_right = shape.cols * split.tall();
            let (by_rows, by_cols) = (split.row_step > 48, split.col_step > 64);
            if by_rows && (again_right <= again_left || !by_cols) {
                split.row_step = (split.row_step / 2).next_multiple_of(MR);
            } else if by_cols {
                split.col_step = (split.col_step / 2).next_multiple_of(NR);
            } else {
                break;
            }
        }
        split
    }

    fn wide(&self) -> usize {
        self.shape.cols.div_ceil(self.col_step)
    }

    fn tall(&self) -> usize {
        self.shape.rows.div_ceil(self.row_step)
    }

    fn tasks(&self) -> usize {
        self.tall() * self.wide()
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
    (left, right): (Left<'_, R>, &[R]),
    exponents: &Exponents,
    c: *mut R,
    stride: usize,
) {
    for j in (0..block.cols).step_by(NR) {
        let n = NR.min(block.cols - j);
        let right = &right[j * DEPTH..j * DEPTH + block.depth * NR];
        for i in (0..block.rows).step_by(MR) {
            let m = MR.min(block.rows - i);
            let (a, b) = exponents.of(i, j);
            let operands = TileOperands {
                left: left.tile(i),
                row: left.row,
                step: left.step,
                right,
                flush: needs_flush(order, a, b),
            };
            // SAFETY: rows `i..i + m` and columns `j..j + n` lie in the caller's block.
            unsafe {
                let c = c.add(i * stride + j);
                if (m, n) == (MR, NR) {
                    multiply_tile(isa, order, operands, c, stride);
                } else {
                    let mut whole = [[R::ZERO; NR]; MR];
                    copy_rows(c, stride, whole.as_mut_ptr().cast(), NR, (m, n));
                    multiply_tile(isa, order, operands, whole.as_mut_ptr().cast(), NR);
                    copy_rows(whole.as_ptr().cast(), NR, c, stride, (m, n));
                }
            }
        }
    }
}

/// # Safety
/// `from` and `to` point to `m` rows of `n` values, `from_stride` and `to_stride` apart,
/// and nobody else uses `to`.
pub(super) unsafe fn copy_rows<R: Real>(
    from: *const R,
    from_stride: usize,
    to: *mut R,
    to_stride: usize,
    (m, n): (usize, usize),
) {
    for i in 0..m {
        // SAFETY: the caller's promise; the two are different memory.
        unsafe {
            let (from, to) = (from.add(i * from_stride), to.add(i * to_stride));
            std::ptr::copy_nonoverlapping(from, to, n);
        }
    }
}

/// What one register tile reads.
#[derive(Clone, Copy)]
pub(super) struct TileOperands<'a, R> {
    /// Value `(i, k)` at `i * row + k * step`.
    pub left: &'a [R],
    /// Distance of neighbouring rows.
    pub row: usize,
    /// Distance of neighbouring steps.
    pub step: usize,
    /// `[depth, NR]`
    pub right: &'a [R],
    /// Whether products may be denormal.
    pub flush: bool,
}

/// Adds to a whole register tile.
///
/// # Safety
/// `c` points to the tile's rows of [`NR`] values, `stride` apart, that nobody else uses.
unsafe fn multiply_tile<R: Real>(
    isa: Isa,
    order: Order,
    operands: TileOperands<'_, R>,
    c: *mut R,
    stride: usize,
) {
    #[cfg(target_arch = "x86_64")]
    if let (true, false, Some(operands)) = (isa.has_avx2(), operands.flush, as_f32(operands)) {
        use super::{avx2, avx512};
        let c = c.cast();
        // SAFETY: an `Isa` that has AVX2 or AVX-512 is made by `Isa::available` only, after
        // CPUID has shown it; R is f32, so `c` is what the caller says it is.
        return unsafe {
            match (order, isa.has_avx512()) {
                (Order::Sequential, true) => avx512::tile_sequential(operands, c, stride),
                (Order::Sequential, false) => avx2::tile_sequential(operands, c, stride),
                (Order::EvenOdd, true) => avx512::tile_even_odd(operands, c, stride),
                (Order::EvenOdd, false) => avx2::tile_even_odd(operands, c, stride),
            }
        };
    }
    let _ = isa;
    let mut tile = [[R::ZERO; NR]; MR];
    let size = (MR, NR);
    // SAFETY: the caller's promise, and `tile` has at least as many rows.
    unsafe { copy_rows(c, stride, tile.as_mut_ptr().cast(), NR, size) };
    match (order, operands.flush) {
        (Order::Sequential, _) => sequential(operands, &mut tile),
        (Order::EvenOdd, false) => even_odd::<R, false>(operands, &mut tile),
        (Order::EvenOdd, true) => even_odd::<R, true>(operands, &mut tile),
    }
    // SAFETY: as above.
    unsafe { copy_rows(tile.as_ptr().cast(), NR, c, stride, size) };
}

/// The operands as f32, if that is what they are.
#[cfg(target_arch = "x86_64")]
fn as_f32<R: Real>(operands: TileOperands<'_, R>) -> Option<TileOperands<'_, f32>> {
    let same = std::any::TypeId::of::<R>() == std::any::TypeId::of::<f32>();
    same.then(|| TileOperands {
        left: bytemuck::cast_slice(operands.left),
        row: operands.row,
        step: operands.step,
        right: bytemuck::cast_slice(operands.right),
        flush: operands.flush,
    })
}

/// One chain per output.
fn sequential<R: Real>(operands: TileOperands<'_, R>, tile: &mut [[R; NR]; MR]) {
    for (k, b) in operands.right.chunks_exact(NR).enumerate() {
        for (i, acc) in tile.iter_mut().enumerate() {
            let a = operands.left[i * operands.row + k * operands.step];
            for (acc, &b) in acc.iter_mut().zip(b) {
                *acc = a.mul_add(b, *acc);
            }
        }
    }
}

/// Even and odd chains.
fn even_odd<R: Real, const FLUSH: bool>(operands: TileOperands<'_, R>, tile: &mut [[R; NR]; MR]) {
    let flush = |x: R| if FLUSH { x.flush() } else { x };
    for (block, right) in operands.right.chunks(BLOCK * NR).enumerate() {
        let mut chains = [[[R::ZERO; NR]; MR]; 2];
        for (k, b) in right.chunks_exact(NR).enumerate() {
            let at = (block * BLOCK + k) * operands.step;
            for (i, acc) in chains[k % 2].iter_mut().enumerate() {
                let a = operands.left[i * operands.row + at];
                for (acc, &b) in acc.iter_mut().zip(b) {
                    *acc = flush(a.mul_add(b, *acc));
                }
            }
        }
        let [even, odd] = &chains;
        for (tile, (even, odd)) in tile.iter_mut().zip(even.iter().zip(odd)) {
            for (acc, (&even, &odd)) in tile.iter_mut().zip(even.iter().zip(odd)) {
                // Always flushed: the accumulator itself may come from anywhere.
                *acc = (acc.flush() + flush(even + odd)).flush();
            }
        }
    }
}
