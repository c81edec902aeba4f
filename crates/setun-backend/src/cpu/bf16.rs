//! Products of bf16 values on a unit that is made for them: [`gemm`](crate::cpu::gemm::gemm) in
//! its even-odd order.
//!
//! A [`Unit`] takes both operands as tiles of 16 rows, or columns, and 32 steps of the reduction.

mod dots;
mod pack;
pub(crate) mod stored;

pub(crate) use dots::Dots;
pub(super) use dots::rounds;
pub(crate) use pack::Pairs;
pub(super) use pack::turn;

use crate::cpu::gemm::{DEPTH, Gemm, SCRATCH, Split, copy_rows};
use crate::cpu::operand::{Operand, Values};
use crate::kernels::product::{BLOCK, Order, needs_flush};
use crate::real::{Real, min_exponent_bf16};
use pack::{Side, TILE_VALUES, pack};
use std::cell::RefCell;
use std::ops::Range;

/// Rows and columns of a tile of sums.
pub(super) const TILE: usize = 16;
/// Rows and columns that advance together, two tiles of each.
pub(super) const PAIR: usize = 2 * TILE;

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

/// Most rows of a task. Products are so fast here that packing counts: larger rectangles pack
/// less often.
pub(super) const ROWS: usize = 768;
/// Most columns of a task.
pub(super) const COLS: usize = 512;
/// Values of packed rows.
const LEFT: usize = ROWS * DEPTH;
const _: () = assert!(
    LEFT + COLS * DEPTH <= 2 * SCRATCH,
    "bf16 values in the place of f32"
);
const _: () =
    assert!(DEPTH.is_multiple_of(BLOCK) && ROWS.is_multiple_of(PAIR) && COLS.is_multiple_of(PAIR));

/// How a product is cut into tasks.
pub(super) fn split(shape: Gemm, threads: usize) -> Split {
    Split::new(shape, threads, (ROWS, PAIR), (COLS, PAIR))
}

/// `c += a * b` of one rectangle of outputs; `c` points to its first output, and its rows are
/// `stride` apart.
///
/// # Safety
/// The processor has the unit, and AVX-512; `c` points to that many rows and columns, and nobody
/// else uses them.
pub(super) unsafe fn rectangle<U: Unit>(
    (rows, columns): (Range<usize>, Range<usize>),
    depth: usize,
    (a, b): (&Operand<'_, f32>, &Operand<'_, f32>),
    (c, stride): (*mut f32, usize),
    scratch: &mut [f32],
) {
    let (left, right) = bytemuck::cast_slice_mut(scratch).split_at_mut(LEFT);
    for first in (0..depth).step_by(DEPTH) {
        let depths = first..depth.min(first + DEPTH);
        // SAFETY: the caller's promise.
        unsafe {
            pack(
                (Side::Left, U::PAIRS),
                a,
                rows.clone(),
                depths.clone(),
                left,
            );
            pack(
                (Side::Right, U::PAIRS),
                b,
                columns.clone(),
                depths.clone(),
                right,
            );
            let size = (rows.len(), columns.len(), depths.len().div_ceil(BLOCK));
            multiply::<U>(size, (left, right), (c, stride));
        }
    }
}

/// `c += left * right` of packed tiles, `depth` of them along the reduction.
///
/// # Safety
/// As [`rectangle`].
unsafe fn multiply<U: Unit>(
    (rows, cols, depth): (usize, usize, usize),
    (left, right): (&[u16], &[u16]),
    (c, stride): (*mut f32, usize),
) {
    if depth == 0 {
        return;
    }
    // Two tiles of rows, or of columns, with all their steps.
    let panel = 2 * depth * TILE_VALUES;
    let left = &left[..rows.div_ceil(PAIR) * panel];
    let right = &right[..cols.div_ceil(PAIR) * panel];
    let mut exponents = [0; COLS / PAIR];
    // SAFETY: the caller's promise.
    let exponent_of = |panel: &[u16]| unsafe { least_exponent(panel) };
    for (exponent, panel) in exponents.iter_mut().zip(right.chunks_exact(panel)) {
        *exponent = exponent_of(panel);
    }
    // SAFETY: the caller's promise.
    let unit = unsafe { U::start() };
    for (i, left) in (0..rows).step_by(PAIR).zip(left.chunks_exact(panel)) {
        let exponent = exponent_of(left);
        let calm = |j: usize| !needs_flush(Order::EvenOdd, exponent, exponents[j / PAIR]);
        let m = PAIR.min(rows - i);
        let mut j = 0;
        while j < cols {
            let right = &right[j / PAIR * panel..];
            // As many whole pairs of tiles as follow each other.
            let whole = (j..cols)
                .step_by(PAIR)
                .take_while(|&j| m == PAIR && j + PAIR <= cols && calm(j));
            let pairs = whole.count();
            // SAFETY: row `i` and column `j` are the caller's, and so are the rows and columns
            // that follow; there are tiles for all of them.
            unsafe {
                let c = c.add(i * stride + j);
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
    if !(LEAST_ROWS..=MOST_ROWS).contains(&rows) || depth > MOST_DEPTH {
        return false;
    }
    let operand = |values, width, depth_in_rows| Operand {
        values: Values::Plain(values),
        width,
        depth_in_rows,
    };
    let (x, y) = (operand(x, stride, false), operand(y, lanes, true));
    SMALL.with_borrow_mut(|Small { left, right }| {
        // SAFETY: the caller's promise, and `acc` has `rows` rows of `lanes` values.
        unsafe {
            pack((Side::Left, U::PAIRS), &x, 0..rows, 0..depth, left);
            for first in (0..lanes).step_by(PAIR) {
                let columns = first..lanes.min(first + PAIR);
                let size = (rows, columns.len(), depth.div_ceil(BLOCK));
                pack((Side::Right, U::PAIRS), &y, columns, 0..depth, right);
                let c = (acc.as_mut_ptr().add(first), lanes);
                multiply::<U>(size, (left.as_slice(), right.as_slice()), c);
            }
        }
    });
    true
}
