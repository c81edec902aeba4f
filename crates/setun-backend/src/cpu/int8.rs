//! Blocked int8 x ternary products (ARCHITECTURE.md, Numbers), equal to
//! [`int8_dot`](crate::kernels::product::int8_dot) bit for bit.
//!
//! The integer sums are exact, so their order is free; only the combine over groups
//! rounds, and it stays one FMA chain over ascending groups. Weights are packed as codes
//! `t + 1` in quads of the reduction, sixteen outputs side by side; the dot of the codes
//! is corrected by the sum of the row's values.

use crate::cpu::{Isa, Pool, RowParts, RowsMut, multiversion};
use crate::real::Real;
use setun_ternary::groups_per_row;
use std::ops::Range;

/// Outputs in the lanes of a panel.
pub(super) const LANES: usize = 16;
/// Rows that share a pass over a panel.
pub(super) const MR: usize = 4;
/// Most rows of a task.
const ROWS: usize = 512;

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

impl Int8Shape {
    pub(super) fn groups(self) -> usize {
        groups_per_row(self.width, self.group_size)
    }

    /// Quads of group `g` of a row.
    pub(super) fn quads_of(self, g: usize) -> usize {
        let values = self.group_size.min(self.width - g * self.group_size);
        values.div_ceil(4)
    }

    /// Quads of a row: each group starts with a new one.
    pub(super) fn quads(self) -> usize {
        (0..self.groups()).map(|g| self.quads_of(g)).sum()
    }
}

/// Bytes of scratch that a worker needs for inputs of `width` values.
pub fn scratch_len(width: usize, group_size: usize) -> usize {
    let groups = groups_per_row(width, group_size);
    let quads = width.div_ceil(4) + groups;
    let values = 4 * quads * (LANES + ROWS);
    let own = (values + 4 * groups * (LANES + ROWS)).next_multiple_of(64);
    #[cfg(target_arch = "x86_64")]
    if super::amx::available() {
        let shape = Int8Shape {
            rows: ROWS,
            out: 0,
            width,
            group_size,
        };
        return own.max(super::amx::int8::scratch_len(shape).next_multiple_of(64));
    }
    own
}

struct Rectangles<R> {
    start: *mut R,
    len: usize,
}

// SAFETY: tasks write disjoint columns only.
unsafe impl<R: Send> Sync for Rectangles<R> {}

/// `y[r, n] = x[r] * w[n]`. `scratch` has [`scratch_len`] bytes for each worker.
pub fn int8_linear<R: Real>(
    pool: &Pool,
    isa: Isa,
    shape: Int8Shape,
    x: Int8Rows<'_>,
    w: TernaryRows<'_>,
    y: &mut [R],
    scratch: &mut [u8],
) {
    assert_eq!(y.len(), shape.rows * shape.out);
    if y.is_empty() {
        return;
    }
    let per_worker = scratch_len(shape.width, shape.group_size);
    let scratch = RowsMut::new(scratch, per_worker);
    let out = Rectangles {
        start: y.as_mut_ptr(),
        len: y.len(),
    };
    let out = &out;
    let tall = shape.rows.div_ceil(ROWS);
    // Wide tasks, because each packs its rows anew, but some for each thread, so that a
    // slow one does not hold up the others.
    let wide = (3 * pool.threads()).div_ceil(tall);
    let lanes = if isa == Isa::Amx { 2 * LANES } else { LANES };
    let step = lanes * shape.out.div_ceil(lanes).div_ceil(wide).max(1);
    let write = |row: usize, n0: usize, values: &[f32]| {
        let at = row * shape.out + n0;
        assert!(at + values.len() <= out.len);
        // SAFETY: inside `y` by the assertion; rows and columns of a task belong to it alone.
        let y = unsafe { std::slice::from_raw_parts_mut(out.start.add(at), values.len()) };
        // Whole panels are vectors.
        match (y.as_chunks_mut::<LANES>(), values.as_chunks::<LANES>()) {
            (([y], []), ([values], [])) => *y = values.map(R::from_f32),
            _ => {
                for (y, &v) in y.iter_mut().zip(values) {
                    *y = R::from_f32(v);
                }
            }
        }
    };
    pool.run(tall * shape.out.div_ceil(step), &|task, worker| {
        // SAFETY: each worker has its own row of scratch, and runs one task at a time.
        let scratch = unsafe { scratch.part(worker..worker + 1) };
        let (r0, first) = (task % tall * ROWS, task / tall * step);
        let rows = r0..shape.rows.min(r0 + ROWS);
        let outputs = first..shape.out.min(first + step);
        #[cfg(target_arch = "x86_64")]
        if isa == Isa::Amx {
            let (x, w) = ((x, rows), (w, outputs));
            // SAFETY: `Isa::Amx` is made by `Isa::available` only, where there is AMX.
            unsafe { super::amx::int8::task(shape, x, w, scratch, &mut |r, n, y| write(r, n, y)) };
            return;
        }
        let mut block = RowBlock::pack(isa, shape, x, rows, scratch);
        for n0 in outputs.step_by(LANES) {
            let n = LANES.min(shape.out - n0);
            block.pack_weights(isa, w, n0, n);
            block.multiply(isa, x, &mut |row, values: &[f32; LANES]| {
                write(row, n0, &values[..n])
            });
        }
    });
}

multiversion! {
    /// A block of rows of whole quads, and the sums of their groups.
    fn pack_whole_rows[][](
        rows: [&[i8]; MR],
        group_size: usize,
        inputs: &mut [i8],
        sums: &mut [i32],
    ) = pack_whole_rows_kernel;
}

#[inline(always)]
fn pack_whole_rows_kernel(
    rows: [&[i8]; MR],
    group_size: usize,
    inputs: &mut [i8],
    sums: &mut [i32],
) {
    let [a, b, c, d] = rows;
    let [a, b, c, d] = [a.as_chunks(), b.as_chunks(), c.as_chunks(), d.as_chunks()];
    let quads = a.0.iter().zip(b.0).zip(c.0).zip(d.0);
    let to = inputs.as_chunks_mut::<4>().0.as_chunks_mut::<MR>().0;
    for (to, (((&a, &b), &c), &d)) in to.iter_mut().zip(quads) {
        *to = [a, b, c, d];
    }
    for (g, sums) in sums.as_chunks_mut::<MR>().0.iter_mut().enumerate() {
        for (sum, row) in sums.iter_mut().zip(rows) {
            *sum = 0;
            for &q in row[g * group_size..].iter().take(group_size) {
                *sum += i32::from(q);
            }
        }
    }
}

/// Packed rows of a task, and one panel of weights at a time.
struct RowBlock<'s> {
    shape: Int8Shape,
    rows: Range<usize>,
    /// Codes `[quads][LANES][4]`; absent lanes are zero.
    codes: &'s mut [u8],
    /// `[groups][LANES]`
    scales: &'s mut [f32],
    /// Values `[rows / MR][quads][MR][4]`; absent values are zero.
    inputs: &'s mut [i8],
    /// Sums of the values `[rows / MR][groups][MR]`.
    sums: &'s mut [i32],
}

impl<'s> RowBlock<'s> {
    fn pack(
        isa: Isa,
        shape: Int8Shape,
        x: Int8Rows<'_>,
        rows: Range<usize>,
        scratch: &'s mut [u8],
    ) -> Self {
        let (groups, quads) = (shape.groups(), shape.quads());
        let padded = rows.len().next_multiple_of(MR);
        let (codes, rest) = scratch.split_at_mut(4 * LANES * quads);
        let (scales, rest) = rest.split_at_mut(4 * LANES * groups);
        let (sums, rest) = rest.split_at_mut(4 * padded * groups);
        let mut block = Self {
            shape,
            rows,
            codes,
            scales: bytemuck::cast_slice_mut(scales),
            inputs: bytemuck::cast_slice_mut(&mut rest[..4 * padded * quads]),
            sums: bytemuck::cast_slice_mut(sums),
        };
        block.pack_inputs(isa, x);
        block
    }

    fn pack_inputs(&mut self, isa: Isa, x: Int8Rows<'_>) {
        let (width, group_size) = (self.shape.width, self.shape.group_size);
        let (groups, quads) = (self.shape.groups(), self.shape.quads());
        let inputs = self.inputs.chunks_exact_mut(4 * MR * quads);
        let blocks = inputs.zip(self.sums.chunks_exact_mut(MR * groups));
        for (r0, (inputs, sums)) in self.rows.clone().step_by(MR).zip(blocks) {
            let row = |r: usize| &x.q[r * width..(r + 1) * width];
            let is_whole = r0 + MR <= self.rows.end;
            if is_whole && width.is_multiple_of(4) && group_size.is_multiple_of(4) {
                let rows = [row(r0), row(r0 + 1), row(r0 + 2), row(r0 + 3)];
                pack_whole_rows(isa, rows, group_size, inputs, sums);
                continue;
            }
            inputs.fill(0);
            sums.fill(0);
            for r in r0..self.rows.end.min(r0 + MR) {
                let mut slots = inputs.chunks_exact_mut(4).skip(r - r0).step_by(MR);
                for (g, group) in row(r).chunks(group_size).enumerate() {
                    sums[g * MR + r - r0] = group.iter().map(|&q| i32::from(q)).sum();
                    for (four, slot) in group.chunks(4).zip(&mut slots) {
                        slot[..four.len()].copy_from_slice(four);
                    }
                }
            }
        }
    }

    /// Takes outputs `n0..n0 + n` as the panel.
    fn pack_weights(&mut self, isa: Isa, w: TernaryRows<'_>, n0: usize, n: usize) {
        let (width, groups) = (self.shape.width, self.shape.groups());
        if n < LANES {
            self.codes.fill(0);
            self.scales.fill(0.0);
        }
        for lane in 0..n {
            let scales = &w.scales[(n0 + lane) * groups..][..groups];
            for (to, &scale) in self.scales[lane..].iter_mut().step_by(LANES).zip(scales) {
                *to = scale;
            }
        }
        #[cfg(target_arch = "x86_64")]
        if isa.has_avx2()
            && n == LANES
            && width.is_multiple_of(SQUARE)
            && self.shape.group_size.is_multiple_of(SQUARE)
        {
            let trits = &w.trits[n0 * width..(n0 + n) * width];
            // SAFETY: an `Isa` that has AVX2 is made by `Isa::available` only, after CPUID has
            // shown it.
            return unsafe { pack_codes(trits, width, self.codes) };
        }
        let _ = isa;
        for lane in 0..n {
            let row = &w.trits[(n0 + lane) * width..][..width];
            let mut slots = self.codes.chunks_exact_mut(4).skip(lane).step_by(LANES);
            for group in row.chunks(self.shape.group_size) {
                for (four, slot) in group.chunks(4).zip(&mut slots) {
                    match <[i8; 4]>::try_from(four) {
                        Ok(four) => slot.copy_from_slice(&four.map(|t| (t + 1) as u8)),
                        Err(_) => {
                            slot.fill(0);
                            for (code, &t) in slot.iter_mut().zip(four) {
                                *code = (t + 1) as u8;
                            }
                        }
                    }
                }
            }
        }
    }

    /// All rows against the panel; `put(row, values)`.
    fn multiply(&self, isa: Isa, x: Int8Rows<'_>, put: &mut dyn FnMut(usize, &[f32; LANES])) {
        let (groups, row_quads) = (self.shape.groups(), self.shape.quads());
        #[cfg(target_arch = "x86_64")]
        if isa.has_avx512() {
            return self.multiply_wide(x, put);
        }
        for (b, r0) in self.rows.clone().step_by(MR).enumerate() {
            let m = MR.min(self.rows.end - r0);
            let inputs = &self.inputs[b * 4 * MR * row_quads..];
            let sums = &self.sums[b * MR * groups..];
            let mut y = [[0.0f32; LANES]; MR];
            let mut quad = 0;
            for g in 0..groups {
                let quads = self.shape.quads_of(g);
                let codes = &self.codes[quad * LANES * 4..][..quads * LANES * 4];
                let q = &inputs[quad * MR * 4..][..quads * MR * 4];
                let scales = self.scales[g * LANES..].first_chunk();
                let mut group = Group {
                    codes,
                    q,
                    scales: scales.expect("a panel has a scale for each lane"),
                    a: [0.0; MR],
                    sums: [0; MR],
                };
                group.sums.copy_from_slice(&sums[g * MR..][..MR]);
                for (i, a) in group.a.iter_mut().enumerate().take(m) {
                    *a = x.scales[(r0 + i) * groups + g];
                }
                add_group(isa, &group, &mut y);
                quad += quads;
            }
            for (i, y) in y.iter().enumerate().take(m) {
                put(r0 + i, y);
            }
        }
    }

    /// [`multiply`](Self::multiply) in vectors of [`LANES`], for an `Isa` that has AVX-512 with
    /// byte dots.
    #[cfg(target_arch = "x86_64")]
    fn multiply_wide(&self, x: Int8Rows<'_>, put: &mut dyn FnMut(usize, &[f32; LANES])) {
        use super::avx512::{Int8Panel, int8_rows};
        /// Blocks whose sums hide the latency of a dot.
        const TOGETHER: usize = 2;
        let (groups, row_quads) = (self.shape.groups(), self.shape.quads());
        let mut y = [[0.0; LANES]; TOGETHER * MR];
        let mut r0 = self.rows.start;
        while r0 < self.rows.end {
            let block = (r0 - self.rows.start) / MR;
            let panel = Int8Panel {
                shape: self.shape,
                codes: self.codes,
                scales: self.scales,
                inputs: &self.inputs[block * 4 * MR * row_quads..],
                sums: &self.sums[block * MR * groups..],
                row_scales: &x.scales[r0 * groups..self.rows.end * groups],
            };
            let left = self.rows.end - r0;
            // SAFETY: an `Isa` that has AVX-512 is made by `Isa::available` only, after CPUID has
            // shown it.
            unsafe {
                if left > MR {
                    int8_rows::<TOGETHER>(&panel, &mut y);
                } else {
                    int8_rows::<1>(&panel, &mut y);
                }
            }
            for (row, y) in (r0..self.rows.end).zip(&y) {
                put(row, y);
            }
            r0 += TOGETHER * MR;
        }
    }
}

/// Values that [`pack_codes`] takes of each output at a time.
#[cfg(target_arch = "x86_64")]
const SQUARE: usize = 4 * LANES;

/// Codes `[quads][LANES][4]` of [`LANES`] outputs of `width` trits, a multiple of [`SQUARE`]: the
/// quads of a square are turned as wholes.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn pack_codes(trits: &[i8], width: usize, codes: &mut [u8]) {
    let mut square = [[0u32; LANES]; LANES];
    for (at, to) in (0..width)
        .step_by(SQUARE)
        .zip(codes.chunks_exact_mut(SQUARE * LANES))
    {
        for (quads, trits) in square.iter_mut().zip(trits.chunks_exact(width)) {
            let codes: &mut [u8] = bytemuck::cast_slice_mut(quads);
            for (code, &t) in codes.iter_mut().zip(&trits[at..at + SQUARE]) {
                *code = (t + 1) as u8;
            }
        }
        super::avx2::turn(square.as_flattened(), bytemuck::cast_slice_mut(to));
    }
}

/// A group of the reduction in all rows of a block.
pub(super) struct Group<'a> {
    /// Codes `[quads][LANES][4]`.
    pub codes: &'a [u8],
    /// Values `[quads][MR][4]`.
    pub q: &'a [i8],
    /// Scales of the weights.
    pub scales: &'a [f32; LANES],
    /// Scales of the rows.
    pub a: [f32; MR],
    /// Sums of the rows' values, by which the codes' dots are too large.
    pub sums: [i32; MR],
}

/// `y = fma(s * a, dot, y)` of one group.
fn add_group(isa: Isa, group: &Group<'_>, y: &mut [[f32; LANES]; MR]) {
    #[cfg(target_arch = "x86_64")]
    if isa.has_avx2() {
        // SAFETY: an `Isa` that has AVX2 is made by `Isa::available` only, after CPUID has shown it.
        return unsafe { super::avx2::int8_group(group, y) };
    }
    let _ = isa;
    let mut dots = [[0i32; LANES]; MR];
    let quads = group.codes.chunks_exact(LANES * 4);
    for (codes, q) in quads.zip(group.q.chunks_exact(MR * 4)) {
        for (i, dots) in dots.iter_mut().enumerate() {
            for (j, dot) in dots.iter_mut().enumerate() {
                for k in 0..4 {
                    *dot += i32::from(codes[4 * j + k]) * i32::from(q[4 * i + k]);
                }
            }
        }
    }
    for (i, y) in y.iter_mut().enumerate() {
        for ((y, &s), dot) in y.iter_mut().zip(group.scales).zip(dots[i]) {
            *y = f32::mul_add(s * group.a[i], (dot - group.sums[i]) as f32, *y);
        }
    }
}
