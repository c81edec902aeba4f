//! The matrices of a product, packed block by block into plain values.
//!
//! Packing is where rounding to bf16, `a * q` and `s * t` happen. Values are converted in
//! short runs of a stored row whose length is known when the code is compiled, straight to
//! the place that the register tiles read, so that a value is touched once.

use super::gemm::{COLS, DEPTH, MR, NR, PANEL, ROWS};
use crate::cpu::{Isa, multiversion, prefetch};
use crate::real::Real;
use half::bf16;
use setun_ternary::groups_per_row;
use std::ops::Range;

/// Most runs of a stored row in a block: those of [`MR`] values of a left operand.
const RUNS: usize = ROWS / MR;
const _: () = assert!(RUNS >= COLS / NR && RUNS >= DEPTH / NR);
/// Mark of a run that touches more than one group.
const MIXED: usize = usize::MAX;

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

/// A packed block of the left operand: value `(i, k)` of the tile at row `i0` is
/// `values[at(i0) + i * row + k * step]`.
#[derive(Clone, Copy)]
pub(super) struct Left<'a, R> {
    values: &'a [R],
    /// Distance of neighbouring rows of the result.
    pub row: usize,
    /// Distance of neighbouring steps of the reduction.
    pub step: usize,
}

impl<'a, R: Real> Left<'a, R> {
    /// The values from row `i0` of the block on, a multiple of the tile's height.
    pub fn tile(&self, i0: usize) -> &'a [R] {
        let at = if self.step == 1 {
            i0 * DEPTH
        } else {
            i0 / MR * PANEL
        };
        &self.values[at..]
    }

    /// Least exponents of each [`MR`] rows of a block of `rows` rows.
    fn exponents(&self, isa: Isa, rows: usize, depth: usize, out: &mut [i32]) {
        for (unit, out) in out.iter_mut().enumerate().take(rows.div_ceil(MR)) {
            let values = self.tile(unit * MR);
            *out = if self.step == 1 {
                let rows = MR.min(rows - unit * MR);
                let of_row = |i| least_exponent(isa, &values[i * DEPTH..][..depth]);
                (0..rows).map(of_row).min().unwrap_or(i32::MAX)
            } else {
                least_exponent(isa, &values[..MR * depth])
            };
        }
    }
}

/// Least exponents in the parts of a block: what decides on flushing.
pub(super) struct Exponents {
    left: [i32; ROWS / MR],
    right: [i32; COLS / NR],
}

impl Default for Exponents {
    fn default() -> Self {
        Self {
            left: [0; ROWS / MR],
            right: [0; COLS / NR],
        }
    }
}

impl Exponents {
    /// Those of the tile at row `i` and column `j` of the block.
    pub fn of(&self, i: usize, j: usize) -> (i32, i32) {
        (self.left[i / MR], self.right[j / NR])
    }

    /// Looks at both packed operands of a block of `rows` by `cols` outputs.
    pub fn measure<R: Real>(
        &mut self,
        isa: Isa,
        (left, right): (Left<'_, R>, &[R]),
        (rows, cols, depth): (usize, usize, usize),
    ) {
        left.exponents(isa, rows, depth, &mut self.left);
        let panels = right.chunks(DEPTH * NR).take(cols.div_ceil(NR));
        for (panel, out) in panels.zip(&mut self.right) {
            *out = least_exponent(isa, &panel[..depth * NR]);
        }
    }
}

impl<'a, R: Real> Operand<'a, R> {
    /// The same of f32, if that is what its values are.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn as_f32(&self) -> Option<Operand<'a, f32>> {
        let same = std::any::TypeId::of::<R>() == std::any::TypeId::of::<f32>();
        same.then(|| Operand {
            values: match self.values {
                Values::Plain(x) => Values::Plain(bytemuck::cast_slice(x)),
                Values::Rounded(x) => Values::Rounded(bytemuck::cast_slice(x)),
                Values::Bf16(x) => Values::Bf16(x),
                Values::Int8 {
                    q,
                    scales,
                    group_size,
                } => Values::Int8 {
                    q,
                    scales,
                    group_size,
                },
                Values::Ternary {
                    trits,
                    scales,
                    group_size,
                } => Values::Ternary {
                    trits,
                    scales,
                    group_size,
                },
            },
            width: self.width,
            depth_in_rows: self.depth_in_rows,
        })
    }

    /// Packs rows `rows` of the result and steps `depths` of the reduction; rows up to the
    /// next multiple of [`MR`] are zero.
    pub(super) fn pack_left<'p>(
        &self,
        isa: Isa,
        rows: Range<usize>,
        depths: Range<usize>,
        packed: &'p mut [R],
    ) -> Left<'p, R> {
        let n = rows.len();
        if self.depth_in_rows {
            pack_left_steps(isa, self.values, self.width, depths, rows, packed);
            let (row, step) = (1, MR);
            return Left {
                values: packed,
                row,
                step,
            };
        }
        for i in n..n.next_multiple_of(MR) {
            packed[i * DEPTH..][..depths.len()].fill(R::ZERO);
        }
        let to = Layout {
            row: DEPTH,
            run: NR,
        };
        pack_left_rows(isa, self.values, self.width, rows, depths, to, packed);
        let (row, step) = (DEPTH, 1);
        Left {
            values: packed,
            row,
            step,
        }
    }

    /// Packs columns `columns` of the result and steps `depths` of the reduction into
    /// panels of [`NR`] columns, `[depth, NR]` each, `DEPTH * NR` apart.
    pub(super) fn pack_right(
        &self,
        isa: Isa,
        columns: Range<usize>,
        depths: Range<usize>,
        packed: &mut [R],
    ) {
        let n = columns.len();
        if self.depth_in_rows {
            let to = Layout {
                row: NR,
                run: DEPTH * NR,
            };
            pack_right_steps(isa, self.values, self.width, depths, columns, to, packed);
            return;
        }
        if !n.is_multiple_of(NR) {
            packed[n / NR * DEPTH * NR..][..depths.len() * NR].fill(R::ZERO);
        }
        for (j, row) in columns.enumerate() {
            let panel = &mut packed[j / NR * DEPTH * NR + j % NR..];
            pack_column(isa, self.values, self.width, row, depths.clone(), panel);
        }
    }
}

/// Where the runs of stored rows go.
#[derive(Clone, Copy)]
pub(crate) struct Layout {
    /// Distance of neighbouring stored rows.
    row: usize,
    /// Distance of neighbouring runs of a stored row.
    run: usize,
}

multiversion! {
    /// [`Real::min_exponent`]
    fn least_exponent[R: Real][R](values: &[R]) -> i32 = R::min_exponent;
}
multiversion! {
    /// Stored rows are steps, side by side for the left operand.
    fn pack_left_steps[R: Real][R](
        values: Values<'_, R>,
        width: usize,
        rows: Range<usize>,
        columns: Range<usize>,
        packed: &mut [R],
    ) = pack_panels;
}
multiversion! {
    /// Stored rows are rows of the result.
    fn pack_left_rows[R: Real][R](
        values: Values<'_, R>,
        width: usize,
        rows: Range<usize>,
        columns: Range<usize>,
        to: Layout,
        packed: &mut [R],
    ) = pack::<R, NR, false>;
}
multiversion! {
    /// Stored rows are steps, side by side for the right operand.
    fn pack_right_steps[R: Real][R](
        values: Values<'_, R>,
        width: usize,
        rows: Range<usize>,
        columns: Range<usize>,
        to: Layout,
        packed: &mut [R],
    ) = pack::<R, NR, true>;
}
multiversion! {
    /// A stored row becomes a column of a panel.
    fn pack_column[R: Real][R](
        values: Values<'_, R>,
        width: usize,
        row: usize,
        depths: Range<usize>,
        panel: &mut [R],
    ) = pack_column_kernel;
}

/// A form of storage: values of stored row `row` from `column` on.
pub(super) trait Source<R: Real> {
    /// Values that share a scale; `usize::MAX` where there are no scales.
    fn group_size(&self) -> usize;
    /// Number of values.
    fn len(&self) -> usize;
    /// `N` values that all lie in `group`.
    fn run<const N: usize>(&self, row: usize, column: usize, group: usize, out: &mut [R; N]);
    /// One value.
    fn one(&self, row: usize, column: usize) -> R;
    /// Asks the memory for the value, which will be read soon.
    #[cfg_attr(not(target_arch = "x86_64"), expect(dead_code))]
    fn prefetch(&self, row: usize, column: usize);
}

/// Calls `$body` with `$source`, the source of the values.
macro_rules! with_source {
    ($values:expr, $width:expr, $source:ident => $body:expr) => {
        match $values {
            $crate::cpu::operand::Values::Plain(x) => {
                let $source = $crate::cpu::operand::Plain(x, $width);
                $body
            }
            $crate::cpu::operand::Values::Rounded(x) => {
                let $source = $crate::cpu::operand::Rounded(x, $width);
                $body
            }
            $crate::cpu::operand::Values::Bf16(x) => {
                let $source = $crate::cpu::operand::Halves(x, $width);
                $body
            }
            $crate::cpu::operand::Values::Int8 {
                q,
                scales,
                group_size,
            } => {
                let $source =
                    $crate::cpu::operand::Scaled::<true>::new(q, scales, group_size, $width);
                $body
            }
            $crate::cpu::operand::Values::Ternary {
                trits,
                scales,
                group_size,
            } => {
                let $source =
                    $crate::cpu::operand::Scaled::<false>::new(trits, scales, group_size, $width);
                $body
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
pub(super) use with_source;

/// Converts `columns` of the stored rows `rows` in runs of `N`. With `PAD` the rest of the
/// last run is filled with zeros.
#[inline(always)]
fn pack<R: Real, const N: usize, const PAD: bool>(
    values: Values<'_, R>,
    width: usize,
    rows: Range<usize>,
    columns: Range<usize>,
    to: Layout,
    packed: &mut [R],
) {
    with_source!(values, width, source => {
        pack_runs::<R, _, N, PAD>(&source, rows, columns, to, packed);
    });
}

#[inline(always)]
fn pack_runs<R: Real, S: Source<R>, const N: usize, const PAD: bool>(
    source: &S,
    rows: Range<usize>,
    columns: Range<usize>,
    to: Layout,
    packed: &mut [R],
) {
    let whole = columns.len() / N;
    let groups = groups_of_runs::<N>(source.group_size(), columns.start, whole);
    let rest = columns.start + whole * N..columns.end;
    for (r, row) in rows.enumerate() {
        let at = r * to.row;
        for (run, &group) in groups.iter().enumerate().take(whole) {
            let column = columns.start + run * N;
            let out = packed[at + run * to.run..].first_chunk_mut::<N>();
            let out = out.expect("the block fits into its scratch memory");
            if group == MIXED {
                for (i, out) in out.iter_mut().enumerate() {
                    *out = source.one(row, column + i);
                }
            } else {
                source.run(row, column, group, out);
            }
        }
        if !rest.is_empty() {
            let out = &mut packed[at + whole * to.run..];
            for (out, column) in out.iter_mut().zip(rest.clone()) {
                *out = source.one(row, column);
            }
            if PAD {
                out[rest.len()..N].fill(R::ZERO);
            }
        }
    }
}

/// Values that [`pack_panels`] writes at a time, a vector; [`MR`] of them stay.
const WRITTEN: usize = 8;
/// Panels whose values it converts at a time: short runs would be converted one by one.
const TOGETHER: usize = 8;
/// Their rows.
const LONG: usize = TOGETHER * MR;

/// Converts `columns` of the stored rows `rows` into panels of [`MR`] columns, `[depth, MR]`
/// each, [`PANEL`] apart. What is written too much lies where the next step's values go.
#[inline(always)]
fn pack_panels<R: Real>(
    values: Values<'_, R>,
    width: usize,
    rows: Range<usize>,
    columns: Range<usize>,
    packed: &mut [R],
) {
    with_source!(values, width, source => {
        pack_long_runs::<R, _>(&source, width, rows, columns, packed);
    });
}

#[inline(always)]
fn pack_long_runs<R: Real, S: Source<R>>(
    source: &S,
    width: usize,
    rows: Range<usize>,
    columns: Range<usize>,
    packed: &mut [R],
) {
    let runs = columns.len().div_ceil(LONG);
    let groups = groups_of_runs::<LONG>(source.group_size(), columns.start, runs);
    for (step, row) in rows.enumerate() {
        for (run, &group) in groups.iter().enumerate().take(runs) {
            let column = columns.start + run * LONG;
            let used = LONG.min(columns.end - column);
            let mut long = [R::ZERO; LONG + WRITTEN - MR];
            // Values behind `columns` are read where there are any, and then forgotten.
            let whole = group != MIXED && row * width + column + LONG <= source.len();
            match long.first_chunk_mut::<LONG>() {
                Some(long) if whole => source.run(row, column, group, long),
                _ => {
                    for (i, x) in long.iter_mut().enumerate().take(used) {
                        *x = source.one(row, column + i);
                    }
                }
            }
            long[used..].fill(R::ZERO);
            let panels = packed[run * TOGETHER * PANEL..].chunks_mut(PANEL);
            for (i, panel) in panels.enumerate().take(used.div_ceil(MR)) {
                let from = long[i * MR..].first_chunk::<WRITTEN>();
                let to = panel[step * MR..].first_chunk_mut::<WRITTEN>();
                if let (Some(from), Some(to)) = (from, to) {
                    *to = *from;
                }
            }
        }
    }
}

/// Group of each run, or [`MIXED`].
#[inline(always)]
fn groups_of_runs<const N: usize>(group_size: usize, start: usize, runs: usize) -> [usize; RUNS] {
    let mut groups = [0; RUNS];
    for (run, group) in groups.iter_mut().enumerate().take(runs) {
        let (first, last) = (start + run * N, start + run * N + N - 1);
        *group = first / group_size;
        if last / group_size != *group {
            *group = MIXED;
        }
    }
    groups
}

#[inline(always)]
fn pack_column_kernel<R: Real>(
    values: Values<'_, R>,
    width: usize,
    row: usize,
    depths: Range<usize>,
    panel: &mut [R],
) {
    let mut run = [R::ZERO; DEPTH];
    let rows = row..row + 1;
    let n = depths.len();
    let to = Layout { row: 0, run: NR };
    with_source!(values, width, source => {
        pack_runs::<R, _, NR, false>(&source, rows, depths, to, &mut run);
    });
    for (to, &x) in panel.iter_mut().step_by(NR).zip(&run[..n]) {
        *to = x;
    }
}

/// [`Values::Plain`] and the width of a row.
pub(super) struct Plain<'a, R>(pub(super) &'a [R], pub(super) usize);

impl<R: Real> Source<R> for Plain<'_, R> {
    #[inline(always)]
    fn group_size(&self) -> usize {
        usize::MAX
    }

    #[inline(always)]
    fn len(&self) -> usize {
        self.0.len()
    }

    #[inline(always)]
    fn run<const N: usize>(&self, row: usize, column: usize, _: usize, out: &mut [R; N]) {
        out.copy_from_slice(&self.0[row * self.1 + column..][..N]);
    }

    #[inline(always)]
    fn one(&self, row: usize, column: usize) -> R {
        self.0[row * self.1 + column]
    }

    #[inline(always)]
    fn prefetch(&self, row: usize, column: usize) {
        prefetch(self.0, row * self.1 + column);
    }
}

/// [`Values::Rounded`] and the width of a row.
pub(super) struct Rounded<'a, R>(pub(super) &'a [R], pub(super) usize);

impl<R: Real> Source<R> for Rounded<'_, R> {
    #[inline(always)]
    fn group_size(&self) -> usize {
        usize::MAX
    }

    #[inline(always)]
    fn len(&self) -> usize {
        self.0.len()
    }

    #[inline(always)]
    fn run<const N: usize>(&self, row: usize, column: usize, _: usize, out: &mut [R; N]) {
        let x = &self.0[row * self.1 + column..][..N];
        for (out, x) in out.iter_mut().zip(x) {
            *out = x.round_bf16();
        }
    }

    #[inline(always)]
    fn one(&self, row: usize, column: usize) -> R {
        self.0[row * self.1 + column].round_bf16()
    }

    #[inline(always)]
    fn prefetch(&self, row: usize, column: usize) {
        prefetch(self.0, row * self.1 + column);
    }
}

/// [`Values::Bf16`] and the width of a row.
pub(super) struct Halves<'a>(pub(super) &'a [bf16], pub(super) usize);

impl<R: Real> Source<R> for Halves<'_> {
    #[inline(always)]
    fn group_size(&self) -> usize {
        usize::MAX
    }

    #[inline(always)]
    fn len(&self) -> usize {
        self.0.len()
    }

    #[inline(always)]
    fn run<const N: usize>(&self, row: usize, column: usize, _: usize, out: &mut [R; N]) {
        let x = &self.0[row * self.1 + column..][..N];
        for (out, &x) in out.iter_mut().zip(x) {
            *out = R::from_bf16(x);
        }
    }

    #[inline(always)]
    fn one(&self, row: usize, column: usize) -> R {
        R::from_bf16(self.0[row * self.1 + column])
    }

    #[inline(always)]
    fn prefetch(&self, row: usize, column: usize) {
        prefetch(self.0, row * self.1 + column);
    }
}

/// Integers with scales: int8 activations, whose products with their scale are rounded to
/// bf16, or trits, whose products are exact.
pub(super) struct Scaled<'a, const ROUND: bool> {
    integers: &'a [i8],
    scales: &'a [f32],
    group_size: usize,
    width: usize,
    groups: usize,
}

impl<'a, const ROUND: bool> Scaled<'a, ROUND> {
    #[inline(always)]
    pub(super) fn new(
        integers: &'a [i8],
        scales: &'a [f32],
        group_size: usize,
        width: usize,
    ) -> Self {
        Self {
            integers,
            scales,
            group_size,
            width,
            groups: groups_per_row(width, group_size),
        }
    }

    #[inline(always)]
    fn value<R: Real>(scale: f32, integer: i8) -> R {
        let product = scale * f32::from(integer);
        R::from_f32(if ROUND { product.round_bf16() } else { product })
    }
}

impl<R: Real, const ROUND: bool> Source<R> for Scaled<'_, ROUND> {
    #[inline(always)]
    fn group_size(&self) -> usize {
        self.group_size
    }

    #[inline(always)]
    fn len(&self) -> usize {
        self.integers.len()
    }

    #[inline(always)]
    fn run<const N: usize>(&self, row: usize, column: usize, group: usize, out: &mut [R; N]) {
        let scale = self.scales[row * self.groups + group];
        let integers = &self.integers[row * self.width + column..][..N];
        for (out, &integer) in out.iter_mut().zip(integers) {
            *out = Self::value(scale, integer);
        }
    }

    #[inline(always)]
    fn one(&self, row: usize, column: usize) -> R {
        let scale = self.scales[row * self.groups + column / self.group_size];
        Self::value(scale, self.integers[row * self.width + column])
    }

    #[inline(always)]
    fn prefetch(&self, row: usize, column: usize) {
        prefetch(self.integers, row * self.width + column);
    }
}
