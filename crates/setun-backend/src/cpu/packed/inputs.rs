//! Rows of activations for packed weights: where each lies, and what prepares them.

use super::{MR, PackedShape, PanelScratch, TILE, WORD, multiply};
use crate::cpu::int8::Int8Rows;
use crate::cpu::{Isa, Pool, RowsMut};

/// Rows of activations in the order in which the words ask for them: blocks of `M` rows.
#[derive(Clone, Copy)]
pub(in crate::cpu) struct PackedInputs<'a> {
    /// `[blocks][words][4 shifts][M][4]`
    pub(in crate::cpu) q: &'a [i8],
    /// Sums of the values `[blocks][groups][M]`.
    pub(in crate::cpu) sums: &'a [i32],
    /// Scales `[blocks][groups][M]`.
    pub(in crate::cpu) scales: &'a [f32],
}

/// How rows lie in memory: in blocks that meet the weights together, zeros behind the last row.
#[derive(Clone, Copy)]
pub(in crate::cpu) struct Blocks {
    /// Rows of a block.
    size: usize,
    /// First row of the last block, which may have another number of rows.
    last: usize,
    /// End of the last block.
    end: usize,
}

impl Blocks {
    fn of(isa: Isa, shape: PackedShape, rows: usize) -> Self {
        if in_tiles(isa, shape, rows) {
            return Self::even(1, rows.next_multiple_of(TILE));
        }
        #[cfg(target_arch = "x86_64")]
        if isa.has_avx512() {
            let count = rows.div_ceil(crate::cpu::avx512_packed::BLOCK);
            let size = rows.div_ceil(count);
            return Self {
                size,
                last: (count - 1) * size,
                end: rows,
            };
        }
        #[cfg(target_arch = "x86_64")]
        if isa.has_avx2() && crate::cpu::avx2_packed::is_direct(shape, rows) {
            let last = (rows / MR).saturating_sub(1) * MR;
            let size = if last == 0 { rows } else { MR };
            return Self {
                size,
                last,
                end: rows,
            };
        }
        let size = if rows < 3 { rows.max(1) } else { MR };
        Self::even(size, rows.next_multiple_of(size))
    }

    fn even(size: usize, end: usize) -> Self {
        let last = end - size;
        Self { size, last, end }
    }

    /// Whether the last block is like the others.
    fn are_even(self) -> bool {
        self.end - self.last == self.size
    }

    /// Number of rows, zeros included.
    #[cfg(target_arch = "x86_64")]
    pub(in crate::cpu) fn rows(self) -> usize {
        self.end
    }

    /// First row of the block that has row `r`, and the block's number of rows.
    fn of_row(self, r: usize) -> (usize, usize) {
        match r >= self.last {
            true => (self.last, self.end - self.last),
            false => (r / self.size * self.size, self.size),
        }
    }

    /// First row and number of rows of each block.
    pub(in crate::cpu) fn iter(self) -> impl Iterator<Item = (usize, usize)> {
        let starts = (0..=self.last).step_by(self.size);
        starts.map(move |first| self.of_row(first))
    }
}

/// The tiles of AMX, configured on this thread, where rows meet the weights in them.
#[must_use]
pub(crate) struct Held {
    #[cfg(target_arch = "x86_64")]
    _tiles: Option<crate::cpu::amx::Tiles>,
}

/// Up to [`MAX_ROWS`](super::MAX_ROWS) rows, laid out in blocks.
pub(crate) struct InputRows<'s> {
    shape: PackedShape,
    pub(super) rows: usize,
    blocks: Blocks,
    q: &'s mut [i8],
    sums: &'s mut [i32],
    scales: &'s mut [f32],
}

impl<'s> InputRows<'s> {
    /// Lays out `rows` rows of `x` from row `first`.
    pub(crate) fn pack(
        pool: &Pool,
        isa: Isa,
        shape: PackedShape,
        (first, rows): (usize, usize),
        x: Int8Rows<'_>,
        scratch: &'s mut [u8],
    ) -> Self {
        let (groups, width) = (shape.groups(), shape.words() * WORD);
        let blocks = Blocks::of(isa, shape, rows);
        let places = blocks.end;
        let (sums, rest) = scratch.split_at_mut(4 * places * groups);
        let (scales, rest) = rest.split_at_mut(4 * places * groups);
        let inputs = Self {
            shape,
            rows,
            blocks,
            q: bytemuck::cast_slice_mut(&mut rest[..places * width]),
            sums: bytemuck::cast_slice_mut(sums),
            scales: bytemuck::cast_slice_mut(scales),
        };
        if rows < places {
            inputs.q.fill(0);
            inputs.sums.fill(0);
            inputs.scales.fill(0.0);
        }
        // Less is laid out before another thread has heard of it.
        const WORTH_A_THREAD: usize = 8 << 10;
        let grain = match blocks.are_even() {
            true => (WORTH_A_THREAD / width).next_multiple_of(blocks.size),
            false => places,
        };
        let parts = (
            RowsMut::new(&mut *inputs.q, width),
            (
                RowsMut::new(&mut *inputs.sums, groups),
                RowsMut::new(&mut *inputs.scales, groups),
            ),
        );
        pool.by_rows(places, grain.max(blocks.size), parts, |part, to| {
            for r in part.start..part.end.min(rows) {
                let (block, m) = blocks.of_row(r);
                let at = (block - part.start, m, r - block);
                pack_row(
                    isa,
                    shape,
                    (x, first + r),
                    at,
                    (&mut *to.0, &mut *to.1.0, &mut *to.1.1),
                );
            }
        });
        inputs
    }

    /// Sizes of the matrix for which the rows were laid out.
    pub(crate) fn shape(&self) -> PackedShape {
        self.shape
    }

    /// Keeps ready on this thread what [`panel`](Self::panel) needs, for more than one of them.
    pub(crate) fn hold(&self, isa: Isa) -> Held {
        let _ = isa;
        Held {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `Isa::Amx`, without which no rows are in tiles, is made by
            // `Isa::available` only, where there is AMX.
            _tiles: in_tiles(isa, self.shape, self.rows)
                .then(|| unsafe { crate::cpu::amx::Tiles::configure() }),
        }
    }

    /// All rows times one panel of a matrix whose inner sizes are those of the rows, into
    /// `scratch.y`.
    pub(crate) fn panel(
        &self,
        isa: Isa,
        shape: PackedShape,
        weights: &[u8],
        panel: usize,
        scratch: &mut PanelScratch,
    ) {
        let bytes = shape.panel_bytes();
        let panel = &weights[panel * bytes..(panel + 1) * bytes];
        let inputs = PackedInputs {
            q: self.q,
            sums: self.sums,
            scales: self.scales,
        };
        multiply(isa, shape, panel, (self.rows, self.blocks), inputs, scratch);
    }
}

/// Lays out row `from` of `x` as row `i` of the block of `m` rows that begins at row `block` of
/// the values, sums and scales.
fn pack_row(
    isa: Isa,
    shape: PackedShape,
    (x, from): (Int8Rows<'_>, usize),
    (block, m, i): (usize, usize, usize),
    (q, sums, scales): (&mut [i8], &mut [i32], &mut [f32]),
) {
    let (groups, width) = (shape.groups(), shape.words() * WORD);
    let mut to = &mut q[block * width..(block + m) * width];
    let row = &x.q[from * shape.width..(from + 1) * shape.width];
    for (g, group) in row.chunks(shape.group_size).enumerate() {
        let (part, rest) = to.split_at_mut(group.len().div_ceil(WORD) * WORD * m);
        to = rest;
        let at = block * groups + g * m + i;
        sums[at] = spread_group(isa, group, (m, i), part);
        scales[at] = x.scales[from * groups + g];
    }
}

/// Whether so many rows meet the weights in the tiles of AMX, which want them one by one.
pub(super) fn in_tiles(isa: Isa, shape: PackedShape, rows: usize) -> bool {
    #[cfg(target_arch = "x86_64")]
    if isa == Isa::Amx {
        return rows > MR && crate::cpu::amx::int8::suits(shape);
    }
    let _ = (isa, shape, rows);
    false
}

/// Lays out the values of a group as row `i` of `m` and returns their sum.
fn spread_group(isa: Isa, values: &[i8], (m, i): (usize, usize), to: &mut [i8]) -> i32 {
    #[cfg(target_arch = "x86_64")]
    if isa.has_avx2() && values.len().is_multiple_of(2 * WORD) {
        // SAFETY: an `Isa` that has AVX2 is made by `Isa::available` only, after CPUID has shown it.
        return unsafe { crate::cpu::avx2_packed::spread_group(values, (m, i), to) };
    }
    let _ = isa;
    for (word, values) in values.chunks(WORD).enumerate() {
        let mut sixteen = [0i8; WORD];
        sixteen[..values.len()].copy_from_slice(values);
        for shift in 0..4 {
            let four = [0, 4, 8, 12].map(|j| sixteen[j + shift]);
            to[((word * 4 + shift) * m + i) * 4..][..4].copy_from_slice(&four);
        }
    }
    values.iter().map(|&q| i32::from(q)).sum()
}
