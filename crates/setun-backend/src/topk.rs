//! Softmax and top-k in one pass: over logits that are given, or behind a head product
//! whose logits never exist as a whole.
//!
//! Each tile of [`TILE`] entries is shaped, its maximum and its sum of exponentials are
//! taken and its best entries kept, all while it is in the first-level cache. The plain
//! form reads the logits once for the maximum, once for the sum and once for the
//! probabilities, writes as many probabilities, and reads them again to select; here one
//! read is left, or none. Only the `k` kept entries get probabilities.
//!
//! Results do not depend on threads or instruction set: tiles are fixed, their sums are
//! added in ascending order, and ties go to the lower id.

use crate::cpu::packed::{Held, InputRows, MAX_ROWS, PANEL, PanelScratch};
use crate::cpu::{Isa, Pool, RowParts, RowsMut, multiversion};
use crate::kernels::topk::Best;
#[cfg(target_arch = "x86_64")]
use crate::kernels::topk::avx512;
pub use crate::kernels::topk::{Candidate, Shaping, TILE, TileSum, Total, by_rank};
use crate::real::Real;
use std::ops::Range;
use std::sync::Mutex;
use thiserror::Error;

/// What is wanted of rows of logits.
#[derive(Clone, Copy, Debug)]
pub struct TopK<'a> {
    /// Entries to keep of each row; at least 1. A smaller vocabulary gives fewer.
    pub k: usize,
    /// What logits go through first, for each row.
    pub shaping: &'a [Shaping],
    /// For each row, the tokens that occurred, ascending, each with how often it was
    /// generated.
    pub occurred: &'a [Vec<(u32, u32)>],
}

/// What was kept of rows of logits.
#[derive(Clone, Debug, Default)]
pub struct Kept {
    /// For each row its best entries, best first.
    pub candidates: Vec<Vec<Candidate>>,
    /// For each row its maximum and sum.
    pub totals: Vec<Total>,
}

/// Arguments that do not fit together.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum TopKError {
    /// Nothing would be kept, or there is nothing to keep.
    #[error("top-k: k is {k} and the vocabulary has {vocab_size} entries; both must be above 0")]
    Empty {
        /// Entries to keep.
        k: usize,
        /// Entries of the vocabulary.
        vocab_size: usize,
    },
    /// A slice of another length.
    #[error("top-k: {name} has {len} values, but the shape needs {expected}")]
    Length {
        /// Name of the argument.
        name: &'static str,
        /// Its length.
        len: usize,
        /// What it should be.
        expected: usize,
    },
}

/// Probabilities and ids of the `k` likeliest entries of each row of `logits`
/// `[batch, seq, vocab_size]`, into `probabilities` and `ids` `[batch, seq, k]`, best first;
/// ties go to the lower id.
///
/// A row with NaN, with positive infinity, or all of negative infinity has NaN
/// probabilities, as `softmax` by its definition has; its ids are right (NaN last). With
/// `k > vocab_size` the places behind are 0 and `u32::MAX`.
///
/// # Errors
/// `k` or a vocabulary of 0, and slices of another length.
pub fn softmax_topk(
    pool: &Pool,
    isa: Isa,
    (batch, seq, vocab_size): (usize, usize, usize),
    logits: &[f32],
    k: usize,
    (probabilities, ids): (&mut [f32], &mut [u32]),
) -> Result<(), TopKError> {
    if k == 0 || vocab_size == 0 {
        return Err(TopKError::Empty { k, vocab_size });
    }
    let rows = batch * seq;
    for (name, len, expected) in [
        ("logits", logits.len(), rows * vocab_size),
        ("probabilities", probabilities.len(), rows * k),
        ("ids", ids.len(), rows * k),
    ] {
        if len != expected {
            return Err(TopKError::Length {
                name,
                len,
                expected,
            });
        }
    }
    let wanted = TopK {
        k,
        shaping: &[],
        occurred: &[],
    };
    let mut kept = Kept::default();
    let source = Source::Logits(logits);
    run(pool, isa, (rows, vocab_size), source, wanted, &mut kept);
    probabilities.fill(0.0);
    ids.fill(u32::MAX);
    for row in 0..rows {
        let total = kept.totals[row];
        for (i, c) in kept.candidates[row].iter().enumerate() {
            probabilities[row * k + i] = Real::exp(c.value - total.max) / total.sum;
            ids[row * k + i] = c.id;
        }
    }
    Ok(())
}

/// Where logits come from.
#[derive(Clone, Copy)]
pub(crate) enum Source<'a> {
    /// They are there, `[rows, vocab_size]`.
    Logits(&'a [f32]),
    /// A head product with packed weights.
    Head {
        weights: &'a [u8],
        inputs: &'a InputRows<'a>,
    },
}

impl<'a> Source<'a> {
    /// The logits, if they are there and nothing changes them first.
    fn as_they_are(self, wanted: TopK<'_>) -> Option<&'a [f32]> {
        match self {
            Self::Logits(logits) if wanted.shaping.is_empty() => Some(logits),
            _ => None,
        }
    }

    /// What a thread that computes many of them keeps.
    fn hold(self, isa: Isa) -> Option<Held> {
        match self {
            Self::Logits(_) => None,
            Self::Head { inputs, .. } => Some(inputs.hold(isa)),
        }
    }

    /// Rows that share a tile: all of them where weights are read for it.
    fn step(&self, rows: usize) -> usize {
        match self {
            Self::Logits(_) => 1,
            Self::Head { .. } => rows,
        }
    }
}

/// What a worker holds.
struct Bench {
    /// The best entries of each row.
    best: Vec<Best>,
    /// The logits of some rows in one tile.
    tile: Vec<[f32; TILE]>,
    panel: PanelScratch,
}

impl Bench {
    /// Looks at the tiles of some rows, whose sums go to `sums` `[tiles, group]`.
    fn run(
        &mut self,
        isa: Isa,
        source: Source<'_>,
        wanted: TopK<'_>,
        vocab_size: usize,
        (rows, tiles): (Range<usize>, Range<usize>),
        sums: &mut [TileSum],
    ) {
        let group = sums.len() / tiles.len();
        let _held = source.hold(isa);
        for first in rows.clone().step_by(self.tile.len()) {
            for (t, sums) in tiles.clone().zip(sums.chunks_mut(group)) {
                let tile = t * TILE..vocab_size.min((t + 1) * TILE);
                let sums = &mut sums[first - rows.start..];
                if let Some(logits) = source.as_they_are(wanted) {
                    let values = &logits[first * vocab_size..][tile.clone()];
                    sums[0] = look_at(isa, tile.start, values, &mut self.best[first]);
                    continue;
                }
                self.fill(isa, source, vocab_size, first, &tile);
                for ((row, values), sum) in (first..).zip(&mut self.tile).zip(sums) {
                    let values = &mut values[..tile.len()];
                    if let Some(shaping) = wanted.shaping.get(row) {
                        let occurred = wanted.occurred.get(row).map_or(&[][..], Vec::as_slice);
                        shaping.apply(tile.start, occurred, values);
                    }
                    *sum = look_at(isa, tile.start, values, &mut self.best[row]);
                }
            }
        }
    }

    /// The logits of rows from `first` in one tile.
    fn fill(
        &mut self,
        isa: Isa,
        source: Source<'_>,
        vocab_size: usize,
        first: usize,
        tile: &Range<usize>,
    ) {
        match source {
            Source::Logits(logits) => {
                for (row, to) in self.tile.iter_mut().enumerate() {
                    let from = &logits[(first + row) * vocab_size..][tile.clone()];
                    to[..from.len()].copy_from_slice(from);
                }
            }
            Source::Head { weights, inputs } => {
                for panel in tile.start / PANEL..tile.end.div_ceil(PANEL) {
                    inputs.panel(isa, inputs.shape(), weights, panel, &mut self.panel);
                    for (to, y) in self.tile.iter_mut().zip(&self.panel.y) {
                        to[panel * PANEL - tile.start..][..PANEL].copy_from_slice(y);
                    }
                }
            }
        }
    }
}

/// Runs all rows of a source. At most [`MAX_ROWS`] rows where it is a head product.
pub(crate) fn run(
    pool: &Pool,
    isa: Isa,
    (rows, vocab_size): (usize, usize),
    source: Source<'_>,
    wanted: TopK<'_>,
    kept: &mut Kept,
) {
    debug_assert!(rows <= MAX_ROWS || matches!(source, Source::Logits(_)));
    if rows == 0 {
        return *kept = Kept::default();
    }
    let grid = Grid::new(pool, (rows, vocab_size), source);
    let none = TileSum { max: 0.0, sum: 0.0 };
    let mut sums = vec![none; grid.groups() * grid.tiles * grid.group];
    let out = RowsMut::new(&mut sums, grid.group);
    let k = wanted.k.min(vocab_size);
    let benches: Vec<Mutex<Bench>> = (0..pool.threads())
        .map(|_| {
            Mutex::new(Bench {
                best: vec![Best::new(k); rows],
                tile: vec![[0.0; TILE]; source.step(rows)],
                panel: PanelScratch::default(),
            })
        })
        .collect();
    pool.run(grid.tasks(), &|task, worker| {
        let (group, tiles) = grid.task(task);
        let before = group * grid.tiles;
        // SAFETY: a tile of a group belongs to one task, which asks once.
        let sums = unsafe { out.part(before + tiles.start..before + tiles.end) };
        let mut bench = benches[worker]
            .lock()
            .expect("a lock that only its worker takes");
        let group = group * grid.group..rows.min((group + 1) * grid.group);
        bench.run(isa, source, wanted, vocab_size, (group, tiles), sums);
    });
    collect(&grid, &sums, benches, kept);
}

/// How rows and tiles are shared out.
struct Grid {
    rows: usize,
    tiles: usize,
    /// Rows whose tiles a task takes.
    group: usize,
    /// Tiles that a task takes.
    step: usize,
}

impl Grid {
    /// Whole rows where there are enough of them: the best of a row are then sought once, and
    /// not by each thread among the tiles that it had.
    fn new(pool: &Pool, (rows, vocab_size): (usize, usize), source: Source<'_>) -> Self {
        let (tiles, tasks) = (vocab_size.div_ceil(TILE), 4 * pool.threads());
        let group = match source {
            Source::Logits(_) => rows.div_ceil(tasks),
            Source::Head { .. } => rows,
        };
        let step = tiles.div_ceil(tasks.div_ceil(rows.div_ceil(group)));
        Self {
            rows,
            tiles,
            group,
            step,
        }
    }

    fn groups(&self) -> usize {
        self.rows.div_ceil(self.group)
    }

    fn steps(&self) -> usize {
        self.tiles.div_ceil(self.step)
    }

    fn tasks(&self) -> usize {
        self.groups() * self.steps()
    }

    /// Group and tiles of a task.
    fn task(&self, task: usize) -> (usize, Range<usize>) {
        let first = task % self.steps() * self.step;
        (
            task / self.steps(),
            first..self.tiles.min(first + self.step),
        )
    }

    /// The sums of the tiles of a row, in ascending order.
    fn of_row<'a>(
        &self,
        sums: &'a [TileSum],
        row: usize,
    ) -> impl Iterator<Item = TileSum> + Clone + use<'a> {
        let (tiles, group, at) = (self.tiles, self.group, row % self.group);
        let sums = &sums[row / group * tiles * group..][..tiles * group];
        sums.chunks(group).map(move |tile| tile[at])
    }
}

fn collect(grid: &Grid, sums: &[TileSum], benches: Vec<Mutex<Bench>>, kept: &mut Kept) {
    let mut best = benches.into_iter().map(|bench| {
        let bench = bench.into_inner();
        bench.expect("no panic while the lock is held").best
    });
    let mut all = best.next().unwrap_or_default();
    for others in best {
        for (best, other) in all.iter_mut().zip(&others) {
            best.merge(other);
        }
    }
    kept.candidates.clear();
    kept.totals.clear();
    for (row, best) in all.iter_mut().enumerate() {
        kept.candidates.push(best.sorted());
        kept.totals.push(Total::of(grid.of_row(sums, row)));
    }
}

/// The sum of a tile, whose best entries are kept.
fn look_at(isa: Isa, first: usize, tile: &[f32], best: &mut Best) -> TileSum {
    #[cfg(target_arch = "x86_64")]
    if let (true, (runs, [])) = (isa.has_avx512(), tile.as_chunks()) {
        // SAFETY: an `Isa` that has AVX-512 is made by `Isa::available` only, after CPUID has
        // shown it.
        return unsafe { avx512::look_at(first, runs, best) };
    }
    look_at_any(isa, first, tile, best)
}

multiversion! {
    fn look_at_any[][](first: usize, tile: &[f32], best: &mut Best) -> TileSum = look_at_kernel;
}

#[inline(always)]
fn look_at_kernel(first: usize, tile: &[f32], best: &mut Best) -> TileSum {
    best.add(first, tile);
    TileSum::of(tile)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::philox::Philox;

    /// The plain form: every probability, then a sort.
    fn plain(logits: &[f32], k: usize) -> (Vec<f64>, Vec<u32>) {
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let p: Vec<f64> = logits.iter().map(|&x| f64::from(x - max).exp()).collect();
        let sum: f64 = p.iter().sum();
        let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
        ids.sort_by(|&a, &b| {
            let order = logits[b as usize].partial_cmp(&logits[a as usize]).unwrap();
            order.then(a.cmp(&b))
        });
        ids.truncate(k);
        (ids.iter().map(|&i| p[i as usize] / sum).collect(), ids)
    }

    fn random(stream: u64, n: usize) -> Vec<f32> {
        let random = Philox::new(5, stream);
        (0..n as u64)
            .map(|i| 3.0 * random.normal_pair(i).0 as f32)
            .collect()
    }

    fn fused(logits: &[f32], vocab_size: usize, k: usize) -> (Vec<f32>, Vec<u32>) {
        let rows = logits.len() / vocab_size;
        let mut first: Option<(Vec<f32>, Vec<u32>)> = None;
        for isa in Isa::available() {
            for threads in [1, 2, 3] {
                let pool = Pool::new(threads);
                let (mut p, mut ids) = (vec![0.0; rows * k], vec![0; rows * k]);
                let shape = (rows, 1, vocab_size);
                softmax_topk(&pool, isa, shape, logits, k, (&mut p, &mut ids)).unwrap();
                let (expected, same) = first.get_or_insert((p.clone(), ids.clone()));
                let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                assert!(bits(expected) == bits(&p) && *same == ids);
            }
        }
        first.unwrap()
    }

    fn compare(logits: &[f32], k: usize) {
        let (p, ids) = fused(logits, logits.len(), k);
        let (expected, expected_ids) = plain(logits, k);
        assert_eq!(ids, expected_ids);
        for (p, e) in p.iter().zip(&expected) {
            assert!((f64::from(*p) - e).abs() <= 2e-6 * e + 1e-30, "{p} {e}");
        }
    }

    #[test]
    fn equals_the_plain_form() {
        for (k, vocab_size) in [(1, 1), (1, 7), (5, 64), (64, 65), (64, 60_001)] {
            compare(&random(k as u64, vocab_size), k);
        }
        for k in [1, 2, 63, 256, 1000, 1024] {
            compare(&random(9, 51_234), k);
        }
    }

    #[test]
    fn ties_go_to_the_lowest_id() {
        let mut logits: Vec<f32> = random(1, 52_000).iter().map(|x| x.round()).collect();
        for k in [1, 64, 1024] {
            compare(&logits, k);
        }
        logits.fill(0.5);
        compare(&logits, 100);
    }

    #[test]
    fn rising_falling_and_huge_values() {
        let mut logits: Vec<f32> = (0..60_000).map(|i| i as f32 * 1e-3).collect();
        compare(&logits, 128);
        logits.reverse();
        compare(&logits, 128);
        logits[40_000] = 1e30;
        compare(&logits, 64);
        let (p, ids) = fused(&logits, 60_000, 2);
        assert_eq!((p, ids), (vec![1.0, 0.0], vec![40_000, 0]));
    }

    #[test]
    fn log_probabilities_add_up() {
        let logits = random(4, 3000);
        let mut kept = Kept::default();
        let wanted = TopK {
            k: 3000,
            shaping: &[],
            occurred: &[],
        };
        let source = Source::Logits(&logits);
        run(
            &Pool::new(2),
            Isa::detect(),
            (1, 3000),
            source,
            wanted,
            &mut kept,
        );
        let total = kept.totals[0];
        let all = kept.candidates[0]
            .iter()
            .map(|c| total.log_probability(c.value).exp());
        assert!((all.sum::<f64>() - 1.0).abs() < 1e-6);
    }

    #[test]
    fn shaping_comes_before_the_softmax() {
        let logits = [1.0f32, 2.0, -2.0, 4.0];
        let shaping = Shaping {
            repetition_penalty: 2.0,
            presence_penalty: 0.5,
            frequency_penalty: 0.25,
            temperature: 0.5,
        };
        let wanted = TopK {
            k: 4,
            shaping: &[shaping],
            occurred: &[vec![(2, 1), (3, 2)]],
        };
        let mut kept = Kept::default();
        let source = Source::Logits(&logits);
        run(
            &Pool::new(1),
            Isa::detect(),
            (1, 4),
            source,
            wanted,
            &mut kept,
        );
        let got: Vec<(u32, f32)> = kept.candidates[0].iter().map(|c| (c.id, c.value)).collect();
        assert_eq!(got, [(1, 4.0), (0, 2.0), (3, 2.0), (2, -9.5)]);
    }

    #[test]
    fn infinities_follow_the_definition() {
        let mut logits = random(3, 50_500);
        for i in (0..logits.len()).filter(|i| i % 3 != 0 || *i > 20_000) {
            logits[i] = f32::NEG_INFINITY;
        }
        compare(&logits, 300);
        compare(&logits, 50_500);
        logits[7] = f32::INFINITY;
        let (p, ids) = fused(&logits, 50_500, 2);
        assert!(ids[0] == 7 && p.iter().all(|p| p.is_nan()));
        let (p, ids) = fused(&[f32::NEG_INFINITY; 1500], 1500, 2);
        assert!(ids == [0, 1] && p.iter().all(|p| p.is_nan()));
        logits[7] = f32::NAN;
        let (p, ids) = fused(&logits, 50_500, 2);
        assert!(!ids.contains(&7) && p.iter().all(|p| p.is_nan()));
    }

    #[test]
    fn rows_are_independent_and_bad_arguments_are_refused() {
        // Few rows, whose tiles are shared out, and many, which threads take whole.
        for (rows, vocab_size) in [(4, 3000), (29, 1088), (29, 1089)] {
            let logits = random(8, rows * vocab_size);
            let (p, ids) = fused(&logits, vocab_size, 17);
            for (row, logits) in logits.chunks(vocab_size).enumerate() {
                let alone = fused(logits, vocab_size, 17);
                assert_eq!(
                    (&p[row * 17..][..17], &ids[row * 17..][..17]),
                    (&*alone.0, &*alone.1)
                );
            }
        }
        let pool = Pool::new(1);
        let mut out = ([0.0; 2], [0u32; 2]);
        let mut call = |shape, k| {
            let (p, ids) = (&mut out.0[..], &mut out.1[..]);
            softmax_topk(&pool, Isa::Reference, shape, &[1.0, 2.0], k, (p, ids))
        };
        assert_eq!(call((1, 1, 2), 2), Ok(()));
        let no_rows = (&mut [][..], &mut [][..]);
        let none = softmax_topk(&Pool::new(2), Isa::Reference, (0, 1, 1025), &[], 1, no_rows);
        assert_eq!(none, Ok(()));
        assert!(matches!(call((1, 1, 2), 0), Err(TopKError::Empty { .. })));
        assert!(matches!(
            call((1, 1, 3), 2),
            Err(TopKError::Length { name: "logits", .. })
        ));
    }
}
