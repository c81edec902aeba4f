//! Blocked products of real numbers: `c[i, j] += sum over r of a(i, r) * b(r, j)`.
//!
//! The reduction of one output is one sequence over ascending r, whatever the blocking:
//! between blocks of r the accumulator rests in `c`, which loses nothing. So the result
//! equals [`vec_mat`](crate::kernels::product::vec_mat) bit for bit. Work is split over
//! rectangles of outputs. [`Operand`]s are packed into panels of plain values, which is
//! where rounding to bf16 and `s * t` happen.

use crate::cpu::multiversion;
use crate::cpu::{Isa, Pool, RowParts, RowsMut};
use crate::kernels::product::{BLOCK, Order, needs_flush};
use crate::real::Real;
use half::bf16;
use std::ops::Range;

/// Steps of the reduction in a block: a multiple of [`BLOCK`].
const DEPTH: usize = 256;
/// Most rows of a rectangle; a multiple of both row tiles.
const ROWS: usize = 384;
/// Most columns of a rectangle.
const COLS: usize = 256;
/// Columns of a register tile.
pub(super) const NR: usize = 16;
/// Rows of a register tile, f32: 6 x 16 accumulators fill 12 vector registers.
pub(super) const MR_SEQUENTIAL: usize = 6;
/// Rows of a register tile, bf16: as many registers, for even and odd chains.
pub(super) const MR_EVEN_ODD: usize = 3;

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

/// Values of a matrix that enters a product, in the form in which it is stored.
#[derive(Clone, Copy)]
pub enum Values<'a, R> {
    /// As they are.
    Plain(&'a [R]),
    /// Rounded to bf16.
    Rounded(&'a [R]),
    /// bf16.
    Bf16(&'a [bf16]),
    /// `bf16(a * q)` of int8 activations.
    Int8 {
        /// `[rows, width]`
        q: &'a [i8],
        /// `[rows, groups]`
        scales: &'a [f32],
        /// Values that share a scale.
        group_size: usize,
    },
    /// `s * t`.
    Ternary {
        /// `[rows, width]`
        trits: &'a [i8],
        /// `[rows, groups]`
        scales: &'a [f32],
        /// Weights that share a scale.
        group_size: usize,
    },
}

/// A matrix of a product.
#[derive(Clone, Copy)]
pub struct Operand<'a, R> {
    /// Its values, row-major.
    pub values: Values<'a, R>,
    /// Values in a stored row.
    pub width: usize,
    /// Whether a stored row is a step of the reduction (else it is a row or column of the
    /// result).
    pub depth_in_rows: bool,
}

/// Largest run of values that is packed at a time.
const RUN: usize = if ROWS > COLS { ROWS } else { COLS };

impl<R: Real> Operand<'_, R> {
    /// Packs lanes `lanes` and steps `depths` into panels of `unit` lanes, `[depth, unit]`
    /// each, `DEPTH * unit` apart, and notes the least exponent of each panel.
    fn pack(
        &self,
        isa: Isa,
        (lanes, depths): (Range<usize>, Range<usize>),
        unit: usize,
        panels: &mut [R],
        exponents: &mut [i32],
    ) {
        let mut run = [R::ZERO; RUN];
        let (n, depth) = (lanes.len(), depths.len());
        let num_panels = n.div_ceil(unit);
        for panel in 0..num_panels {
            if (panel + 1) * unit > n {
                panels[panel * DEPTH * unit..][..depth * unit].fill(R::ZERO);
            }
        }
        if self.depth_in_rows {
            for (k, row) in depths.enumerate() {
                convert_run(
                    isa,
                    self.values,
                    self.width,
                    row,
                    lanes.clone(),
                    &mut run[..n],
                );
                for (panel, part) in run[..n].chunks(unit).enumerate() {
                    let at = (panel * DEPTH + k) * unit;
                    copy_short(part, &mut panels[at..at + part.len()]);
                }
            }
        } else {
            for (i, row) in lanes.enumerate() {
                convert_run(
                    isa,
                    self.values,
                    self.width,
                    row,
                    depths.clone(),
                    &mut run[..depth],
                );
                let panel = &mut panels[i / unit * DEPTH * unit..][..depth * unit];
                for (to, &x) in panel.chunks_exact_mut(unit).zip(&run[..depth]) {
                    to[i % unit] = x;
                }
            }
        }
        for (panel, exponent) in exponents.iter_mut().enumerate().take(num_panels) {
            *exponent = least_exponent(isa, &panels[panel * DEPTH * unit..][..depth * unit]);
        }
    }
}

/// Copies a few values; whole register tiles without a call.
#[inline(always)]
fn copy_short<R: Copy>(from: &[R], to: &mut [R]) {
    if let (Ok(from), Ok(to)) = (
        <&[R; NR]>::try_from(from),
        <&mut [R; NR]>::try_from(&mut *to),
    ) {
        *to = *from;
    } else if let (Ok(from), Ok(to)) = (
        <&[R; MR_EVEN_ODD]>::try_from(from),
        <&mut [R; MR_EVEN_ODD]>::try_from(&mut *to),
    ) {
        *to = *from;
    } else {
        to.copy_from_slice(from);
    }
}

multiversion! {
    /// [`Real::min_exponent`]
    fn least_exponent[R: Real][R](values: &[R]) -> i32 = R::min_exponent;
}

multiversion! {
    /// Values `columns` of stored row `row`, as products see them.
    fn convert_run[R: Real][R](
        values: Values<'_, R>,
        width: usize,
        row: usize,
        columns: Range<usize>,
        out: &mut [R],
    ) = convert_run_kernel;
}

#[inline(always)]
fn convert_run_kernel<R: Real>(
    values: Values<'_, R>,
    width: usize,
    row: usize,
    columns: Range<usize>,
    out: &mut [R],
) {
    let at = row * width + columns.start..row * width + columns.end;
    match values {
        Values::Plain(x) => out.copy_from_slice(&x[at]),
        Values::Rounded(x) => {
            for (to, x) in out.iter_mut().zip(&x[at]) {
                *to = x.round_bf16();
            }
        }
        Values::Bf16(x) => {
            for (to, &x) in out.iter_mut().zip(&x[at]) {
                *to = R::from_bf16(x);
            }
        }
        Values::Int8 {
            q,
            scales,
            group_size,
        } => {
            let scales = &scales[row * width.div_ceil(group_size)..];
            by_group(&columns, group_size, |group, part| {
                let a = scales[group];
                let from = &q[row * width + columns.start..][part.clone()];
                for (to, &q) in out[part].iter_mut().zip(from) {
                    *to = R::from_f32((a * f32::from(q)).round_bf16());
                }
            });
        }
        Values::Ternary {
            trits,
            scales,
            group_size,
        } => {
            let scales = &scales[row * width.div_ceil(group_size)..];
            by_group(&columns, group_size, |group, part| {
                let s = scales[group];
                let from = &trits[row * width + columns.start..][part.clone()];
                for (to, &t) in out[part].iter_mut().zip(from) {
                    *to = R::from_f32(f32::from(t) * s);
                }
            });
        }
    }
}

/// Calls `each(group, part)` for the groups that `columns` touch; parts count from the
/// first column.
#[inline(always)]
fn by_group(columns: &Range<usize>, group_size: usize, mut each: impl FnMut(usize, Range<usize>)) {
    let mut k = columns.start;
    while k < columns.end {
        let group = k / group_size;
        let end = columns.end.min((group + 1) * group_size);
        each(group, k - columns.start..end - columns.start);
        k = end;
    }
}

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
    let split = Split::new(shape, pool.threads());
    let out = Rectangles {
        start: c.as_mut_ptr(),
    };
    let scratch = RowsMut::new(scratch, SCRATCH);
    let out = &out;
    let mr = register_rows(shape.order);
    pool.run(split.tasks(), &|task, worker| {
        let (rows, columns) = split.rectangle(task);
        // SAFETY: each worker has its own row of scratch, and runs one task at a time.
        let scratch = unsafe { scratch.part(worker..worker + 1) };
        let (a_panels, b_panels) = scratch.split_at_mut(DEPTH * ROWS);
        let mut exponents = Exponents::default();
        for d in (0..shape.depth).step_by(DEPTH) {
            let depths = d..shape.depth.min(d + DEPTH);
            let a_part = (rows.clone(), depths.clone());
            a.pack(isa, a_part, mr, a_panels, &mut exponents.a);
            let b_part = (columns.clone(), depths.clone());
            b.pack(isa, b_part, NR, b_panels, &mut exponents.b);
            let block = Block {
                rows: rows.len(),
                cols: columns.len(),
                depth: depths.len(),
            };
            let panels = (&*a_panels, &*b_panels);
            // SAFETY: the rectangle lies in `c` (asserted above) and belongs to this task.
            unsafe {
                let at = out.start.add(rows.start * shape.cols + columns.start);
                multiply_block(isa, shape.order, block, panels, &exponents, at, shape.cols);
            }
        }
    });
}

/// Least exponents of the panels of a block.
struct Exponents {
    a: [i32; ROWS / MR_EVEN_ODD],
    b: [i32; COLS / NR],
}

impl Default for Exponents {
    fn default() -> Self {
        Self {
            a: [0; ROWS / MR_EVEN_ODD],
            b: [0; COLS / NR],
        }
    }
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
    (a, b): (&[R], &[R]),
    exponents: &Exponents,
    c: *mut R,
    stride: usize,
) {
    let mr = register_rows(order);
    for j in (0..block.cols).step_by(NR) {
        let nr = NR.min(block.cols - j);
        let b = &b[j * DEPTH..j * DEPTH + block.depth * NR];
        for i in (0..block.rows).step_by(mr) {
            let m = mr.min(block.rows - i);
            let a = &a[i * DEPTH..i * DEPTH + block.depth * mr];
            let mut tile = [[R::ZERO; NR]; MR_SEQUENTIAL];
            // SAFETY: rows `i..i + m` and columns `j..j + nr` lie in the caller's block.
            unsafe { load_tile(&mut tile, c.add(i * stride + j), stride, m, nr) };
            match order {
                Order::Sequential => tile_sequential(isa, a, b, &mut tile),
                Order::EvenOdd => {
                    let flush = needs_flush(order, exponents.a[i / mr], exponents.b[j / NR]);
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
        copy_short(from, &mut row[..n]);
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
        copy_short(&row[..n], to);
    }
}

/// One register tile, one chain per output.
fn tile_sequential<R: Real>(isa: Isa, a: &[R], b: &[R], tile: &mut [[R; NR]; MR_SEQUENTIAL]) {
    #[cfg(target_arch = "x86_64")]
    if let (Isa::Avx2, Some((a, b, tile))) = (isa, as_f32(a, b, tile)) {
        // SAFETY: `Isa::Avx2` is made by `Isa::available` only, after CPUID has shown it.
        return unsafe { super::avx2::tile_sequential(a, b, tile) };
    }
    let _ = isa;
    sequential(a, b, tile);
}

/// One register tile, even and odd chains.
fn tile_even_odd<R: Real>(
    isa: Isa,
    flush: bool,
    a: &[R],
    b: &[R],
    tile: &mut [[R; NR]; MR_SEQUENTIAL],
) {
    #[cfg(target_arch = "x86_64")]
    if let (Isa::Avx2, false, Some((a, b, tile))) = (isa, flush, as_f32(a, b, tile)) {
        // SAFETY: `Isa::Avx2` is made by `Isa::available` only, after CPUID has shown it.
        return unsafe { super::avx2::tile_even_odd(a, b, tile) };
    }
    let _ = isa;
    even_odd(flush, a, b, tile);
}

/// Operands and accumulators of a register tile in f32.
#[cfg(target_arch = "x86_64")]
type TileF32<'a> = (&'a [f32], &'a [f32], &'a mut [[f32; NR]; MR_SEQUENTIAL]);

/// The operands as f32, if that is what they are.
#[cfg(target_arch = "x86_64")]
fn as_f32<'a, R: Real>(
    a: &'a [R],
    b: &'a [R],
    tile: &'a mut [[R; NR]; MR_SEQUENTIAL],
) -> Option<TileF32<'a>> {
    let same = std::any::TypeId::of::<R>() == std::any::TypeId::of::<f32>();
    same.then(|| {
        (
            bytemuck::cast_slice(a),
            bytemuck::cast_slice(b),
            bytemuck::cast_mut(tile),
        )
    })
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
