//! Products of bf16 values on a unit that is made for them: [`gemm`](crate::cpu::gemm::gemm) in
//! its even-odd order.
//!
//! A [`Unit`] takes both operands as tiles of 16 rows, or columns, and 32 steps of the reduction.

mod dots;
mod pack;
pub(crate) mod rows;
pub(crate) mod stored;

pub(crate) use dots::Dots;
pub(super) use dots::rounds;
pub(crate) use pack::Pairs;

use crate::cpu::gemm::{DEPTH, Gemm, SCRATCH, copy_rows};
use crate::cpu::operand::Operand;
use crate::cpu::{Pool, RowsMut};
use crate::kernels::product::{BLOCK, Order, needs_flush};
use crate::real::{Real, min_exponent_bf16};
use pack::{Side, TILE_VALUES, pack, pack_plain_rows, pack_plain_steps};
use std::cell::RefCell;
use std::ops::Range;

/// Rows and columns of a tile of sums.
pub(crate) const TILE: usize = 16;
/// Rows and columns that advance together, two tiles of each.
pub(crate) const PAIR: usize = 2 * TILE;

/// What multiplies tiles, and how it wants them.
pub(crate) trait Unit {
    /// Which two steps of the reduction are neighbours in a tile.
    const PAIRS: Pairs;

    /// Prepares the unit on this thread.
    ///
    /// # Safety
    /// The processor has it, and AVX-512.
    unsafe fn start() -> Self;

    /// `sums += left * right`, of values whose products cannot be denormal.
    ///
    /// # Safety
    /// The pointers of `strip` lead to that many tiles and sums, and nobody else uses the sums.
    unsafe fn multiply(&self, strip: Strip);
}

/// Two tiles of rows against pairs of tiles of columns.
#[derive(Clone, Copy)]
pub(crate) struct Strip {
    /// Tiles of the upper rows, one for each 32 steps of the reduction; those of the lower
    /// rows follow.
    pub(super) left: *const u16,
    /// Tiles of the first 16 columns, likewise; those of the next columns follow.
    pub(super) right: *const u16,
    /// Tiles in the direction of the reduction, at least one.
    pub(super) depth: usize,
    /// Pairs of tiles of columns, at least one.
    pub(super) pairs: usize,
    /// Sums of the first row and column.
    pub(super) sums: *mut f32,
    /// Values from a row of the sums to the next.
    pub(super) stride: usize,
}

/// Values of a packed panel: [`PAIR`] rows or columns and at most [`DEPTH`] steps.
const PANEL: usize = PAIR * DEPTH;
/// Panels of rows, and of columns, of a task.
const OF_TASK: (usize, usize) = (2, 16);
const _: () = assert!(DEPTH.is_multiple_of(BLOCK) && 2 * PANEL <= SCRATCH);

/// `c += a * b`, `c` row-major. `scratch` has [`SCRATCH`] values for each worker; together they hold
/// the panels of a block of outputs, which all workers pack and all of them read.
///
/// # Safety
/// The processor has the unit, and AVX-512.
pub(super) unsafe fn gemm<U: Unit>(
    pool: &Pool,
    shape: Gemm,
    (a, b): (&Operand<'_, f32>, &Operand<'_, f32>),
    c: &mut [f32],
    scratch: &mut [f32],
) {
    assert_eq!(c.len(), shape.rows * shape.cols);
    if c.is_empty() {
        return;
    }
    // A panel takes half as many numbers of 32 bits as it has values, and its exponent.
    let room = scratch.len() / (PANEL / 2 + 1);
    let (exponents, values) = scratch.split_at_mut(room);
    let (exponents, values) = (
        bytemuck::cast_slice_mut(exponents),
        bytemuck::cast_slice_mut(values),
    );
    let (all_tall, all_wide) = (shape.rows.div_ceil(PAIR), shape.cols.div_ceil(PAIR));
    let even = |all: usize, most: usize| all.div_ceil(all.div_ceil(most));
    let wide = even(all_wide, room.saturating_sub(all_tall).max(room / 2));
    let tall = even(all_tall, room - wide);
    for i in (0..shape.rows).step_by(tall * PAIR) {
        for j in (0..shape.cols).step_by(wide * PAIR) {
            for d in (0..shape.depth).step_by(DEPTH) {
                let block = Block {
                    rows: i..shape.rows.min(i + tall * PAIR),
                    columns: j..shape.cols.min(j + wide * PAIR),
                    depths: d..shape.depth.min(d + DEPTH),
                };
                // SAFETY: the caller's promise.
                unsafe {
                    block.pack::<U>(pool, (a, b), values, exponents);
                    let c = (&mut *c, shape.cols);
                    block.multiply::<U>(pool, (values, exponents), c);
                }
            }
        }
    }
}

/// Outputs and steps whose panels fit into the scratch memory.
struct Block {
    rows: Range<usize>,
    columns: Range<usize>,
    depths: Range<usize>,
}

/// Outputs that tasks write in disjoint rectangles.
struct Rectangles {
    start: *mut f32,
    stride: usize,
}

// SAFETY: tasks write disjoint rectangles only.
unsafe impl Sync for Rectangles {}

impl Block {
    /// Panels of rows, and of columns.
    fn panels(&self) -> (usize, usize) {
        let panels = |outputs: &Range<usize>| outputs.len().div_ceil(PAIR);
        (panels(&self.rows), panels(&self.columns))
    }

    /// Tiles along the reduction.
    fn depth(&self) -> usize {
        self.depths.len().div_ceil(BLOCK)
    }

    /// Packs all panels, those of rows first, and finds their least exponents.
    ///
    /// # Safety
    /// As [`gemm`].
    unsafe fn pack<U: Unit>(
        &self,
        pool: &Pool,
        (a, b): (&Operand<'_, f32>, &Operand<'_, f32>),
        values: &mut [u16],
        exponents: &mut [i32],
    ) {
        let (tall, wide) = self.panels();
        let of_panel = 2 * self.depth() * TILE_VALUES;
        let parts = (RowsMut::new(values, of_panel), RowsMut::new(exponents, 1));
        pool.by_rows(tall + wide, 1, parts, |panels, (values, exponent)| {
            let panel = panels.start;
            let (side, operand, outputs, index) = match panel.checked_sub(tall) {
                None => (Side::Left, a, &self.rows, panel),
                Some(index) => (Side::Right, b, &self.columns, index),
            };
            let first = outputs.start + index * PAIR;
            let outputs = first..outputs.end.min(first + PAIR);
            // SAFETY: the caller's promise.
            unsafe {
                let depths = self.depths.clone();
                pack((side, U::PAIRS), operand, outputs, depths, values);
                exponent[0] = least_exponent(values);
            }
        });
    }

    /// `c += left * right` of the packed panels.
    ///
    /// # Safety
    /// As [`gemm`].
    unsafe fn multiply<U: Unit>(
        &self,
        pool: &Pool,
        (values, exponents): (&[u16], &[i32]),
        (c, stride): (&mut [f32], usize),
    ) {
        let (tall, wide) = self.panels();
        let depth = self.depth();
        let of_panel = 2 * depth * TILE_VALUES;
        let (left, right) = values.split_at(tall * of_panel);
        let (left_exponents, right_exponents) = exponents.split_at(tall);
        let across = wide.div_ceil(OF_TASK.1);
        let out = &Rectangles {
            start: c.as_mut_ptr(),
            stride,
        };
        pool.run(tall.div_ceil(OF_TASK.0) * across, &|task, _| {
            // SAFETY: the caller's promise.
            let unit = unsafe { U::start() };
            let first = task % across * OF_TASK.1;
            let columns = first..wide.min(first + OF_TASK.1);
            let cols = self.columns.len().min(columns.end * PAIR) - first * PAIR;
            let right = Panels {
                values: &right[first * of_panel..columns.end * of_panel],
                exponents: &right_exponents[columns],
                depth,
            };
            let i = task / across * OF_TASK.0;
            for i in i..tall.min(i + OF_TASK.0) {
                let left = (&left[i * of_panel..(i + 1) * of_panel], left_exponents[i]);
                let row = i * PAIR;
                let size = (PAIR.min(self.rows.len() - row), cols);
                // SAFETY: rows and columns of this block lie in `c`, and those of a task
                // belong to it alone.
                unsafe {
                    let at = (self.rows.start + row) * out.stride + self.columns.start;
                    let c = out.start.add(at + first * PAIR);
                    multiply_panel(&unit, size, left, right, (c, out.stride));
                }
            }
        });
    }
}

/// Packed panels of columns with their least exponents.
#[derive(Clone, Copy)]
struct Panels<'a> {
    values: &'a [u16],
    exponents: &'a [i32],
    /// Tiles along the reduction, at least one.
    depth: usize,
}

/// `c += left * right` of one panel of rows, of which `m` count, and of panels of columns, of which
/// `cols` columns count; `c` points to the first output, and its rows are `stride` apart.
///
/// # Safety
/// The processor has the unit, and AVX-512; `c` points to that many rows and columns, and nobody
/// else uses them.
unsafe fn multiply_panel<U: Unit>(
    unit: &U,
    (m, cols): (usize, usize),
    (left, exponent): (&[u16], i32),
    right: Panels<'_>,
    (c, stride): (*mut f32, usize),
) {
    let depth = right.depth;
    let of_panel = 2 * depth * TILE_VALUES;
    assert!(left.len() >= of_panel && right.values.len() >= cols.div_ceil(PAIR) * of_panel);
    let calm = |j: usize| !needs_flush(Order::EvenOdd, exponent, right.exponents[j / PAIR]);
    let mut j = 0;
    while j < cols {
        let right = &right.values[j / PAIR * of_panel..];
        // As many whole pairs of tiles as follow each other.
        let whole = (j..cols)
            .step_by(PAIR)
            .take_while(|&j| m == PAIR && j + PAIR <= cols && calm(j));
        let pairs = whole.count();
        // SAFETY: column `j` is the caller's, and so are the rows and columns that follow;
        // there are tiles for all of them.
        unsafe {
            let c = c.add(j);
            if pairs > 0 {
                unit.multiply(strip(depth, (left, right), pairs, c, stride));
                j += pairs * PAIR;
                continue;
            }
            let size = (m, PAIR.min(cols - j));
            let mut sums = [[0.0f32; PAIR]; PAIR];
            copy_rows(c, stride, sums.as_mut_ptr().cast(), PAIR, size);
            if calm(j) {
                let sums = sums.as_mut_ptr().cast();
                unit.multiply(strip(depth, (left, right), 1, sums, PAIR));
            } else {
                flushed(U::PAIRS, depth, (left, right), &mut sums);
            }
            copy_rows(sums.as_ptr().cast(), PAIR, c, stride, size);
        }
        j += PAIR;
    }
}

fn strip(
    depth: usize,
    (left, right): (&[u16], &[u16]),
    pairs: usize,
    sums: *mut f32,
    stride: usize,
) -> Strip {
    Strip {
        left: left.as_ptr(),
        right: right.as_ptr(),
        depth,
        pairs,
        sums,
        stride,
    }
}

/// Least exponent of packed values.
#[target_feature(enable = "avx512f,avx512bw")]
fn least_exponent(values: &[u16]) -> i32 {
    min_exponent_bf16(bytemuck::cast_slice(values))
}

/// Products that may be denormal, one step after the other as they are defined. The unit flushes
/// them, too, but asks whether a number is tiny after it has rounded it as if there were smaller
/// exponents (Intel SDM, volume 1, 4.9.1.5): the last numbers below 2^-126 would end differently.
#[target_feature(enable = "avx2,fma")]
fn flushed(
    pairs: Pairs,
    depth: usize,
    (left, right): (&[u16], &[u16]),
    sums: &mut [[f32; PAIR]; PAIR],
) {
    let value = |bits: u16| f32::from_bits(u32::from(bits) << 16);
    for (i, row) in sums.iter_mut().enumerate() {
        for (j, sum) in row.iter_mut().enumerate() {
            for k in 0..depth {
                let a = &left[((i / TILE * depth + k) * TILE + i % TILE) * BLOCK..][..BLOCK];
                let b = &right[(j / TILE * depth + k) * TILE_VALUES + j % TILE * 2..];
                let mut chains = [0.0f32; 2];
                for (step, chain) in (0..BLOCK).map(|step| (step, step % 2)) {
                    let place = pairs.place(step);
                    let (a, b) = (a[place], b[place / 2 * 2 * TILE + place % 2]);
                    let chain = &mut chains[chain];
                    *chain = value(a).mul_add(value(b), *chain).flush();
                }
                *sum = (sum.flush() + (chains[0] + chains[1]).flush()).flush();
            }
        }
    }
}

/// Fewest rows of a product that [`rows_even_odd`] takes: less would leave tiles half empty.
const LEAST_ROWS: usize = 8;
/// Most rows, a tile of attention.
const MOST_ROWS: usize = 64;
/// Most steps.
const MOST_DEPTH: usize = 256;

/// Tiles of such a product: the left operand, and a pair of columns of the right one.
struct Small {
    left: [u16; MOST_ROWS * MOST_DEPTH],
    right: [u16; PAIR * MOST_DEPTH],
}

thread_local! {
    static SMALL: RefCell<Small> = const {
        RefCell::new(Small {
            left: [0; MOST_ROWS * MOST_DEPTH],
            right: [0; PAIR * MOST_DEPTH],
        })
    };
}

/// `acc[i, l] += sum over r of x[i * stride + r] * y[r * lanes + l]`, `depth` steps of bf16
/// values, as [`vec_mat`](crate::kernels::product::vec_mat) on each row. False, and nothing is
/// done, where the sizes do not suit.
///
/// # Safety
/// The processor has the unit, and AVX-512.
pub(crate) unsafe fn rows_even_odd<U: Unit>(
    x: &[f32],
    (stride, depth): (usize, usize),
    y: &[f32],
    lanes: usize,
    acc: &mut [f32],
) -> bool {
    let rows = acc.len() / lanes;
    let suits = lanes.is_multiple_of(TILE) && (1..=MOST_DEPTH).contains(&depth);
    if !(LEAST_ROWS..=MOST_ROWS).contains(&rows) || !suits {
        return false;
    }
    let tiles = depth.div_ceil(BLOCK);
    let of_panel = 2 * tiles * TILE_VALUES;
    SMALL.with_borrow_mut(|Small { left, right }| {
        // SAFETY: the caller's promise, and `acc` has `rows` rows of `lanes` values.
        unsafe {
            pack_plain_rows(U::PAIRS, x, (rows, stride, depth), left);
            let mut exponents = [0; MOST_ROWS / PAIR];
            let panels = left.chunks_exact(of_panel).take(rows.div_ceil(PAIR));
            for (exponent, panel) in exponents.iter_mut().zip(panels) {
                *exponent = least_exponent(panel);
            }
            let unit = U::start();
            for first in (0..lanes).step_by(PAIR) {
                let columns = first..lanes.min(first + PAIR);
                let cols = columns.len();
                pack_plain_steps(U::PAIRS, y, (depth, lanes), columns, right);
                let right = Panels {
                    values: right,
                    exponents: &[least_exponent(&right[..of_panel])],
                    depth: tiles,
                };
                for (row, &exponent) in (0..rows).step_by(PAIR).zip(&exponents) {
                    let left = (&left[row / PAIR * of_panel..][..of_panel], exponent);
                    let c = acc.as_mut_ptr().add(row * lanes + first);
                    let size = (PAIR.min(rows - row), cols);
                    multiply_panel(&unit, size, left, right, (c, lanes));
                }
            }
        }
    });
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::Isa;
    use crate::cpu::operand::Values;
    use crate::kernels::product::vec_mat;

    /// The definition, step by step, on tiles as AMX wants them.
    struct Steps;

    impl Unit for Steps {
        const PAIRS: Pairs = Pairs::Neighbours;

        unsafe fn start() -> Self {
            Self
        }

        unsafe fn multiply(&self, strip: Strip) {
            let panel = 2 * strip.depth * TILE_VALUES;
            for pair in 0..strip.pairs {
                // SAFETY: the caller's promise.
                unsafe {
                    let left = std::slice::from_raw_parts(strip.left, panel);
                    let right = std::slice::from_raw_parts(strip.right.add(pair * panel), panel);
                    let to = strip.sums.add(pair * PAIR);
                    let (mut sums, size) = ([[0.0f32; PAIR]; PAIR], (PAIR, PAIR));
                    copy_rows(to, strip.stride, sums.as_mut_ptr().cast(), PAIR, size);
                    flushed(Self::PAIRS, strip.depth, (left, right), &mut sums);
                    copy_rows(sums.as_ptr().cast(), PAIR, to, strip.stride, size);
                }
            }
        }
    }

    /// An operand of so many outputs and steps, and its values by outputs.
    fn values(outputs: usize, depth: usize, by_steps: bool) -> (Vec<f32>, Vec<f32>) {
        let value = |o: usize, d: usize| ((o * 31 + d * 17 + 5) % 255) as f32 - 127.0;
        let all = |o: usize| (0..depth).map(move |d| value(o, d));
        let by_output: Vec<f32> = (0..outputs).flat_map(all).collect();
        let stored = match by_steps {
            true => (0..depth * outputs)
                .map(|i| value(i % outputs, i / outputs))
                .collect(),
            false => by_output.clone(),
        };
        (stored, by_output)
    }

    #[test]
    fn tiles_of_neighbours_hold_every_step_once() {
        if !Isa::available().iter().any(|isa| isa.has_avx512()) {
            return;
        }
        for (rows, cols, depth) in [(1, 1, 1), (33, 47, 31), (70, 5, 290), (16, 96, 64)] {
            for (a_by_steps, b_by_steps) in
                [(false, false), (false, true), (true, true), (true, false)]
            {
                let (a, a_rows) = values(rows, depth, a_by_steps);
                let (b, b_columns) = values(cols, depth, b_by_steps);
                let operand = |values, outputs, depth_in_rows: bool| Operand {
                    values: Values::Plain(values),
                    width: if depth_in_rows { outputs } else { depth },
                    depth_in_rows,
                };
                let (a, b) = (operand(&a, rows, a_by_steps), operand(&b, cols, b_by_steps));
                let shape = Gemm {
                    rows,
                    cols,
                    depth,
                    order: Order::EvenOdd,
                };
                let mut c = vec![0.25f32; rows * cols];
                let mut scratch = vec![0.0; 2 * SCRATCH];
                // SAFETY: there is AVX-512; the unit needs nothing.
                unsafe { gemm::<Steps>(&Pool::new(2), shape, (&a, &b), &mut c, &mut scratch) };
                for (i, c) in c.iter().enumerate() {
                    let x = &a_rows[i / cols * depth..][..depth];
                    let y = &b_columns[i % cols * depth..][..depth];
                    let mut expected = [0.25f32];
                    vec_mat(Isa::Reference, Order::EvenOdd, true, x, y, 1, &mut expected);
                    assert_eq!(c.to_bits(), expected[0].to_bits(), "{shape:?}, output {i}");
                }
            }
        }
    }
}
