//! int8 x ternary products (ARCHITECTURE.md, Numbers) on weights that stay packed, two bits each.
//!
//! # Layout
//! Outputs lie in panels of [`PANEL`]; the last panel is filled up with zeros. A panel holds,
//! for each group of the reduction, the f16 scales of its outputs and then words of 16
//! codes `t + 1`: `[word][output]`, each word four consecutive bytes of the packed file
//! (`setun-ternary`, low bits first). So making it from a file moves words and computes
//! nothing, one row of weights streams through memory once, and a vector of words holds
//! different outputs in its lanes.
//!
//! Code `s` of byte `j` of a word is that of input `4 j + s`. One shift and one mask give
//! the codes `s` of a whole vector, which meet the inputs `{s, 4 + s, 8 + s, 12 + s}`;
//! inputs are laid out in that order once per call, for all outputs.
//!
//! Integer sums are exact, so their order is free; the combine over groups is one FMA chain
//! over ascending groups, as [`int8_dot`](crate::kernels::product::int8_dot) defines it.

mod inputs;

pub(super) use inputs::{Blocks, PackedInputs};
pub(crate) use inputs::{Held, InputRows};

use crate::cpu::int8::Int8Rows;
use crate::cpu::{Isa, Pool, prefetch_early_at};
use crate::real::Real;
use half::f16;
use setun_ternary::groups_per_row;
use std::cell::RefCell;

/// Outputs of a panel.
pub const PANEL: usize = 32;
/// Codes of a word.
const WORD: usize = 16;
/// Bytes of the scales of a group.
pub(super) const SCALE_BYTES: usize = 2 * PANEL;
/// Bytes of the words with the same inputs.
pub(super) const WORD_BYTES: usize = 4 * PANEL;
/// Most rows that share a pass over the weights.
pub const MAX_ROWS: usize = 64;
/// Rows whose sums are in registers together.
pub(super) const MR: usize = 4;
/// Rows of a tile of AMX; [`MAX_ROWS`] are whole tiles.
const TILE: usize = 16;

/// Sizes of a packed matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackedShape {
    /// Outputs.
    pub out: usize,
    /// Length of the reduction.
    pub width: usize,
    /// Values that share a scale.
    pub group_size: usize,
}

impl PackedShape {
    /// Groups of a row.
    pub fn groups(self) -> usize {
        groups_per_row(self.width, self.group_size)
    }

    /// Words of an output in group `g`.
    pub(super) fn words_of(self, g: usize) -> usize {
        let values = self.group_size.min(self.width - g * self.group_size);
        values.div_ceil(WORD)
    }

    /// Words of an output.
    pub(super) fn words(self) -> usize {
        let groups = self.groups();
        (groups - 1) * self.group_size.div_ceil(WORD) + self.words_of(groups - 1)
    }

    /// Panels.
    pub fn panels(self) -> usize {
        self.out.div_ceil(PANEL)
    }

    /// Bytes of a panel.
    pub fn panel_bytes(self) -> usize {
        self.groups() * SCALE_BYTES + self.words() * WORD_BYTES
    }

    /// Bytes of the matrix.
    pub fn bytes(self) -> usize {
        self.panels() * self.panel_bytes()
    }
}

/// Bytes of scratch for inputs of `width` values.
pub fn scratch_len(width: usize, group_size: usize) -> usize {
    let groups = groups_per_row(width, group_size);
    let words = width / WORD + groups;
    MAX_ROWS * (words * WORD + 8 * groups)
}

/// Lays out the panels `first..` that `to` holds: from rows of the packed file `[out,
/// groups * ceil(group_size / 4)]` and their scales `[out, groups]`.
pub fn pack_panels(shape: PackedShape, trits: &[u8], scales: &[f16], first: usize, to: &mut [u8]) {
    let (groups, group_bytes) = (shape.groups(), shape.group_size.div_ceil(4));
    let row_bytes = groups * group_bytes;
    for (p, panel) in to.chunks_exact_mut(shape.panel_bytes()).enumerate() {
        let n0 = (first + p) * PANEL;
        let n = PANEL.min(shape.out - n0);
        if n < PANEL {
            panel.fill(0);
        }
        let mut rest = panel;
        for g in 0..groups {
            let words = shape.words_of(g);
            let (part, tail) = rest.split_at_mut(SCALE_BYTES + words * WORD_BYTES);
            rest = tail;
            let (heads, codes) = part.split_at_mut(SCALE_BYTES);
            for lane in 0..n {
                let scale = scales[(n0 + lane) * groups + g].to_le_bytes();
                heads[2 * lane..2 * lane + 2].copy_from_slice(&scale);
                let row = &trits[(n0 + lane) * row_bytes + g * group_bytes..][..group_bytes];
                pack_lane(row, lane, codes);
            }
        }
    }
}

/// Spreads the bytes of one group of one output over its words.
#[inline(always)]
fn pack_lane(row: &[u8], lane: usize, codes: &mut [u8]) {
    let (whole, short) = row.as_chunks::<4>();
    let words = codes.as_chunks_mut::<4>().0;
    let mut of_lane = words.iter_mut().skip(lane).step_by(PANEL);
    for (word, to) in whole.iter().zip(&mut of_lane) {
        *to = *word;
    }
    if let Some(to) = of_lane.next() {
        *to = [0; 4];
        to[..short.len()].copy_from_slice(short);
    }
}

/// Effective weights `s * t` of output `row`, exact.
pub fn dequantize_row<R: Real>(shape: PackedShape, packed: &[u8], row: usize, to: &mut [R]) {
    let panel = &packed[row / PANEL * shape.panel_bytes()..][..shape.panel_bytes()];
    let lane = row % PANEL;
    let mut rest = panel;
    for (g, to) in to.chunks_mut(shape.group_size).enumerate() {
        let (part, tail) = rest.split_at(SCALE_BYTES + shape.words_of(g) * WORD_BYTES);
        rest = tail;
        let scale = R::from_f32(scale_of(part, lane));
        for (i, to) in to.iter_mut().enumerate() {
            *to = scale * R::from_f32((code_of(&part[SCALE_BYTES..], lane, i) - 1) as f32);
        }
    }
}

#[inline(always)]
fn scale_of(group: &[u8], lane: usize) -> f32 {
    f16::from_le_bytes([group[2 * lane], group[2 * lane + 1]]).to_f32()
}

#[inline(always)]
fn code_of(codes: &[u8], lane: usize, i: usize) -> i32 {
    let byte = codes[i / WORD * WORD_BYTES + 4 * lane + i % WORD / 4];
    i32::from(byte >> (2 * (i % 4)) & 3)
}

/// What the products with one panel need and give.
pub(crate) struct PanelScratch {
    /// Outputs of each row.
    pub(crate) y: [[f32; PANEL]; MAX_ROWS],
    /// Codes of a group, a byte each, where many rows share them.
    #[cfg_attr(not(target_arch = "x86_64"), expect(dead_code))]
    pub(super) codes: [u8; PANEL * MANY_GROUP],
}

thread_local! {
    /// Filling it anew for every product would take longer than a small product of one row.
    static SCRATCH: RefCell<PanelScratch> = RefCell::default();
}

/// Longest group whose codes fit into [`PanelScratch`], and whose sums fit into an i16:
/// `254 * 127 < 2^15`, with codes up to 2 and two products in each pair.
pub(super) const MANY_GROUP: usize = 256;

impl Default for PanelScratch {
    fn default() -> Self {
        Self {
            y: [[0.0; PANEL]; MAX_ROWS],
            codes: [0; PANEL * MANY_GROUP],
        }
    }
}

struct Columns<R> {
    start: *mut R,
    len: usize,
}

// SAFETY: tasks write disjoint columns only.
unsafe impl<R: Send> Sync for Columns<R> {}

/// One of the matrices that the same inputs are multiplied with.
pub struct PackedPart<'a, R> {
    /// Its sizes; width and groups are those of the other parts.
    pub shape: PackedShape,
    /// Its [`PackedShape::bytes`].
    pub weights: &'a [u8],
    /// The results `[rows, out]`.
    pub y: &'a mut [R],
}

/// A part with its results as columns that tasks share.
struct Part<'a, R> {
    shape: PackedShape,
    weights: &'a [u8],
    y: Columns<R>,
}

impl<R: Real> Part<'_, R> {
    /// Multiplies one panel with all rows, the first of which is row `first` of the results.
    fn panel(&self, isa: Isa, inputs: &InputRows<'_>, first: usize, panel: usize) {
        SCRATCH.with_borrow_mut(|scratch| {
            for row in first..first + inputs.rows {
                // Results of many rows are too far apart for the stores to wait for them.
                let to = self
                    .y
                    .start
                    .wrapping_add(row * self.shape.out + panel * PANEL);
                prefetch_early_at(to);
                prefetch_early_at(to.wrapping_add(PANEL / 2));
            }
            inputs.panel(isa, self.shape, self.weights, panel, scratch);
            let n = PANEL.min(self.shape.out - panel * PANEL);
            for (row, values) in scratch.y.iter().enumerate().take(inputs.rows) {
                let at = (first + row) * self.shape.out + panel * PANEL;
                assert!(at + n <= self.y.len);
                // SAFETY: inside `y` by the assertion; a panel's columns belong to one task.
                let y = unsafe { std::slice::from_raw_parts_mut(self.y.start.add(at), n) };
                for (y, &v) in y.iter_mut().zip(values) {
                    *y = R::from_f32(v);
                }
            }
        });
    }
}

/// `y[r, n] = x[r] * w[n]` of every part, for any number of rows: the same bits for each as
/// [`int8_linear`](crate::cpu::int8::int8_linear) gives. `scratch` has [`scratch_len`] bytes.
///
/// # Panics
/// If parts differ in their inner sizes or their rows, or a length is not that of its shape.
pub fn packed_linear<R: Real>(
    pool: &Pool,
    isa: Isa,
    x: Int8Rows<'_>,
    parts: &mut [PackedPart<'_, R>],
    scratch: &mut [u8],
) {
    let Some(first) = parts.first() else { return };
    let (shape, rows) = (first.shape, first.y.len() / first.shape.out);
    let parts: Vec<Part<'_, R>> = parts
        .iter_mut()
        .map(|part| {
            let inner = |s: PackedShape| (s.width, s.group_size);
            assert_eq!(inner(part.shape), inner(shape), "parts share their inputs");
            assert_eq!(part.y.len(), rows * part.shape.out);
            assert_eq!(part.weights.len(), part.shape.bytes());
            Part {
                shape: part.shape,
                weights: part.weights,
                y: Columns {
                    start: part.y.as_mut_ptr(),
                    len: part.y.len(),
                },
            }
        })
        .collect();
    let panels: usize = parts.iter().map(|part| part.shape.panels()).sum();
    // Some tasks for each thread, so that a slow one does not hold up the others.
    let step = panels.div_ceil(4 * pool.threads());
    for first in (0..rows).step_by(MAX_ROWS) {
        let chunk = (first, MAX_ROWS.min(rows - first));
        let inputs = InputRows::pack(pool, isa, shape, chunk, x, scratch);
        let (parts, inputs) = (&parts, &inputs);
        pool.run(panels.div_ceil(step), &|task, _| {
            let _held = inputs.hold(isa);
            let mut skipped = 0;
            let run = task * step..panels.min((task + 1) * step);
            for part in parts {
                let end = skipped + part.shape.panels();
                for panel in run.start.max(skipped)..run.end.min(end) {
                    part.panel(isa, inputs, first, panel - skipped);
                }
                skipped = end;
            }
        });
    }
}

/// One panel times all rows.
fn multiply(
    isa: Isa,
    shape: PackedShape,
    panel: &[u8],
    (rows, blocks): (usize, Blocks),
    x: PackedInputs<'_>,
    scratch: &mut PanelScratch,
) {
    #[cfg(target_arch = "x86_64")]
    if inputs::in_tiles(isa, shape, rows) {
        // SAFETY: `Isa::Amx` is made by `Isa::available` only, where there is AMX.
        return unsafe { super::amx::int8::multiply_packed(shape, panel, rows, x, scratch) };
    }
    #[cfg(target_arch = "x86_64")]
    if isa.has_avx512() {
        // SAFETY: an `Isa` that has AVX-512 is made by `Isa::available` only, after CPUID has
        // shown it.
        return unsafe { super::avx512_packed::multiply_rows(shape, panel, blocks, x, scratch) };
    }
    #[cfg(target_arch = "x86_64")]
    if isa.has_avx2() {
        // SAFETY: an `Isa` that has AVX2 is made by `Isa::available` only, after CPUID has
        // shown it.
        return unsafe { super::avx2_packed::multiply_rows(shape, panel, blocks, x, scratch) };
    }
    let _ = (isa, rows);
    for (first, m) in blocks.iter() {
        let x = x.block(shape, first, m);
        multiply_plain(shape, panel, m, x, &mut scratch.y[first..]);
    }
}

impl<'a> PackedInputs<'a> {
    /// The block of `m` rows that begins at row `first`.
    pub(super) fn block(self, shape: PackedShape, first: usize, m: usize) -> Self {
        let (groups, values) = (shape.groups(), shape.words() * WORD);
        Self {
            q: &self.q[first * values..(first + m) * values],
            sums: &self.sums[first * groups..(first + m) * groups],
            scales: &self.scales[first * groups..(first + m) * groups],
        }
    }
}

fn multiply_plain(
    shape: PackedShape,
    panel: &[u8],
    m: usize,
    x: PackedInputs<'_>,
    y: &mut [[f32; PANEL]],
) {
    y[..m].fill([0.0; PANEL]);
    let (mut rest, mut word) = (panel, 0);
    for g in 0..shape.groups() {
        let words = shape.words_of(g);
        let (part, tail) = rest.split_at(SCALE_BYTES + words * WORD_BYTES);
        rest = tail;
        for (i, y) in y.iter_mut().enumerate().take(m) {
            for (lane, y) in y.iter_mut().enumerate() {
                let mut dot = 0;
                for k in 0..words * WORD {
                    let q = x.q[(((word + k / WORD) * 4 + k % 4) * m + i) * 4 + k % WORD / 4];
                    dot += code_of(&part[SCALE_BYTES..], lane, k) * i32::from(q);
                }
                let factor = scale_of(part, lane) * x.scales[g * m + i];
                *y = f32::mul_add(factor, (dot - x.sums[g * m + i]) as f32, *y);
            }
        }
        word += words;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::product::int8_dot;
    use crate::philox::Philox;
    use setun_ternary::PackedMatrix;

    /// Random weights and activations of a shape, with the product by definition.
    struct Case {
        shape: PackedShape,
        packed: Vec<u8>,
        q: Vec<i8>,
        scales: Vec<f32>,
        expected: Vec<u32>,
    }

    impl Case {
        fn new(out: usize, width: usize, group_size: usize, rows: usize) -> Self {
            let shape = PackedShape {
                out,
                width,
                group_size,
            };
            let random = Philox::new(7, (out * 1_000_003 + width * 1009 + group_size) as u64);
            let number = |i: usize| random.block(i as u64)[0];
            let trits: Vec<i8> = (0..out * width)
                .map(|i| (number(i) % 3) as i8 - 1)
                .collect();
            let groups = shape.groups();
            let weight_scales: Vec<f32> = (0..out * groups)
                .map(|i| f32::from(half::bf16::from_f32(number(i + 9) as f32 * 1e-11)))
                .collect();
            let matrix = PackedMatrix::from_trits(&trits, &weight_scales, width, group_size);
            let mut packed = vec![0xffu8; shape.bytes()];
            pack_panels(shape, &matrix.trits, &matrix.scales, 0, &mut packed);
            let q: Vec<i8> = (0..rows * width)
                .map(|i| (number(i + 5) % 255) as u8 as i8)
                .map(|q| q.max(-127))
                .collect();
            let scales: Vec<f32> = (0..rows * groups)
                .map(|i| number(i + 3) as f32 * 3e-12)
                .collect();
            let mut expected = Vec::new();
            for r in 0..rows {
                for n in 0..out {
                    let s: Vec<f32> = matrix.row_scales(n).iter().map(|s| s.to_f32()).collect();
                    let y: f32 = int8_dot(
                        &q[r * width..(r + 1) * width],
                        &scales[r * groups..(r + 1) * groups],
                        &trits[n * width..(n + 1) * width],
                        &s,
                        group_size,
                    );
                    expected.push(y.to_bits());
                }
            }
            Self {
                shape,
                packed,
                q,
                scales,
                expected,
            }
        }

        fn check(&self, rows: usize) {
            for isa in Isa::available() {
                for threads in [1, 2] {
                    let pool = Pool::new(threads);
                    let mut scratch = vec![0; scratch_len(self.shape.width, self.shape.group_size)];
                    let mut y = vec![0.0f32; rows * self.shape.out];
                    let x = Int8Rows {
                        q: &self.q,
                        scales: &self.scales,
                    };
                    let mut part = [PackedPart {
                        shape: self.shape,
                        weights: &self.packed,
                        y: &mut y,
                    }];
                    packed_linear(&pool, isa, x, &mut part, &mut scratch);
                    let bits: Vec<u32> = y.iter().map(|y| y.to_bits()).collect();
                    assert!(
                        bits == self.expected,
                        "{:?} {isa:?}, {rows} rows",
                        self.shape
                    );
                }
            }
        }
    }

    #[test]
    fn every_inner_size_equals_the_definition() {
        for group_size in [32, 64, 128, 256] {
            for width in 1..=300 {
                let rows = 1 + width % 6;
                Case::new(1 + width % 37, width, group_size, rows).check(rows);
            }
        }
    }

    #[test]
    fn every_number_of_rows_equals_the_definition() {
        for rows in (1..=20).chain([63, 64, 65, 70]) {
            Case::new(40, 160, 64, rows).check(rows);
        }
    }

    #[test]
    fn parts_are_products_of_their_own() {
        for rows in [1, 3, 6, 66] {
            let cases = [40, 7, 64, 100].map(|out| Case::new(out, 160, 64, rows));
            for (isa, threads) in Isa::available().into_iter().flat_map(|i| [(i, 1), (i, 2)]) {
                let mut results = cases.each_ref().map(|c| vec![0.0f32; rows * c.shape.out]);
                let parts = cases.iter().zip(&mut results).map(|(case, y)| PackedPart {
                    shape: case.shape,
                    weights: &case.packed,
                    y,
                });
                let x = Int8Rows {
                    q: &cases[0].q,
                    scales: &cases[0].scales,
                };
                let mut scratch = vec![0; scratch_len(160, 64)];
                let mut parts: Vec<_> = parts.collect();
                packed_linear(&Pool::new(threads), isa, x, &mut parts, &mut scratch);
                for (case, y) in cases.iter().zip(&results) {
                    let mut alone = vec![0.0f32; y.len()];
                    let mut part = [PackedPart {
                        shape: case.shape,
                        weights: &case.packed,
                        y: &mut alone,
                    }];
                    packed_linear(&Pool::new(1), Isa::Reference, x, &mut part, &mut scratch);
                    assert_eq!(*y, alone, "{isa:?}, {threads} threads, {rows} rows");
                }
            }
        }
    }

    #[test]
    fn the_largest_sums_do_not_overflow() {
        const ROWS: [usize; 13] = [1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 17, 20, 23];
        for group_size in [128, 256, 1024] {
            let shape = PackedShape {
                out: 32,
                width: 1024,
                group_size,
            };
            let trits = vec![1i8; 32 * 1024];
            let scales = vec![1.0f32; 32 * shape.groups()];
            let matrix = PackedMatrix::from_trits(&trits, &scales, 1024, group_size);
            let mut packed = vec![0u8; shape.bytes()];
            pack_panels(shape, &matrix.trits, &matrix.scales, 0, &mut packed);
            for (sign, rows) in [-127i8, 127].into_iter().flat_map(|s| ROWS.map(|r| (s, r))) {
                let (q, a) = (vec![sign; rows * 1024], vec![1.0; rows * shape.groups()]);
                let x = Int8Rows { q: &q, scales: &a };
                for isa in Isa::available() {
                    let mut y = vec![0.0f32; rows * 32];
                    let mut scratch = vec![0; scratch_len(1024, group_size)];
                    let mut part = [PackedPart {
                        shape,
                        weights: &packed,
                        y: &mut y,
                    }];
                    packed_linear(&Pool::new(1), isa, x, &mut part, &mut scratch);
                    let all = y.iter().all(|&y| y == 1024.0 * f32::from(sign));
                    assert!(all, "{isa:?}, {rows} rows, groups of {group_size}");
                }
            }
        }
    }

    #[test]
    fn a_row_comes_back_from_the_panels() {
        let (out, width) = (70, 100);
        let trits: Vec<i8> = (0..out * width)
            .map(|i| (i * 7 % 11 % 3) as i8 - 1)
            .collect();
        let shape = PackedShape {
            out,
            width,
            group_size: 32,
        };
        let scales: Vec<f32> = (0..out * 4).map(|i| i as f32 * 0.125).collect();
        let matrix = PackedMatrix::from_trits(&trits, &scales, width, 32);
        let mut packed = vec![0u8; shape.bytes()];
        pack_panels(shape, &matrix.trits, &matrix.scales, 0, &mut packed);
        let (mut got, mut expected) = (vec![0.0f32; width], vec![0.0f32; width]);
        for row in 0..out {
            dequantize_row(shape, &packed, row, &mut got);
            matrix.dequantize_row(row, &mut expected).unwrap();
            assert_eq!(got, expected);
        }
    }
}
