//! Attention to a cache in blocks, and writing to it.
//!
//! The order of operations is that of [`attention`](super::attention): tiles of keys from
//! position 0, lane = position mod tile. Only where a key comes from differs, so one query,
//! a chunk, a batch and a tree give a row the same bits as the training pass does. A tile
//! is widened once for all queries of a group of heads and of a block of rows, and some rows at a
//! time go through it; for few (row, head) pairs the products read it as it is stored. Sequences that
//! begin with the same blocks, as beams of one prompt do, go through those together. Where rows
//! see different ends of a tile, each has zeros as the probabilities of what it does not see. In a
//! tree that branches, the lanes behind the shared past are gathered anew for each row, along
//! its path.

use super::attention::{
    Panel, Running, Store, load_row, mask, multiply_active, multiply_rows, online_softmax, units,
};
use super::product::{Order, most_stored_rows, needs_flush, stored_mat};
use crate::cache::{Among, CACHE_BLOCK, CachedSegment};
use crate::cpu::{Isa, prefetch};
use crate::real::{Real, min_exponent_bf16};
use half::bf16;
use std::ops::Range;
use stored::STORED_BLOCKS;

mod stored;

/// Keys and values of one layer, as they are stored.
#[derive(Clone, Copy)]
pub enum CacheView<'a> {
    /// Keys, values.
    Bf16(&'a [bf16], &'a [bf16]),
    /// Keys, values.
    F32(&'a [f32], &'a [f32]),
    /// Keys, values, and the scales of both.
    Int8(&'a [i8], &'a [i8], &'a [f32], &'a [f32]),
}

/// Queries against a cache.
#[derive(Clone, Copy)]
pub struct CachedView<'a, S> {
    /// `[q rows, num_heads, head_dim]`
    pub q: &'a [S],
    /// Keys and values.
    pub cache: CacheView<'a>,
    /// Query heads.
    pub num_heads: usize,
    /// Key heads.
    pub num_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Keys of a tile.
    pub tile: usize,
    /// Instruction set; results do not depend on it.
    pub isa: Isa,
}

/// A tile as products read it: keys `[head_dim, tile]`, values `[tile, head_dim]`.
struct Tile<'a, R> {
    keys: &'a mut [R],
    values: &'a mut [R],
    min_key: i32,
    min_value: i32,
}

impl<R: Real> Tile<'_, R> {
    /// Whether the values of the lanes are numbers: one that a row does not see is multiplied
    /// with zero, which must stay zero.
    #[inline(always)]
    fn is_finite(&self, lanes: Range<usize>, head_dim: usize) -> bool {
        let values = &self.values[lanes.start * head_dim..lanes.end * head_dim];
        values.iter().all(|&v| v.to_f64().is_finite())
    }
}

impl<S> CachedView<'_, S> {
    /// Widens the keys and values of `n` positions from `j0`.
    #[inline(always)]
    fn load<R: Real>(
        &self,
        segment: &CachedSegment<'_>,
        kv_head: usize,
        (j0, n): (usize, usize),
        tile: &mut Tile<'_, R>,
    ) {
        let e = self.head_dim;
        (tile.min_key, tile.min_value) = (i32::MAX, i32::MAX);
        for first in (0..n).step_by(CACHE_BLOCK) {
            let block = segment.blocks[(j0 + first) / CACHE_BLOCK] as usize;
            let lanes = CACHE_BLOCK.min(n - first);
            let head = block * self.num_kv_heads + kv_head;
            let at = head * e * CACHE_BLOCK;
            let next = segment.blocks.get((j0 + first) / CACHE_BLOCK + 1);
            let next = next.map_or(at, |&block| {
                (block as usize * self.num_kv_heads + kv_head) * e * CACHE_BLOCK
            });
            for d in 0..e {
                let to = tile.keys[d * self.tile + first..].first_chunk_mut();
                let to = to.expect("a tile is a number of blocks");
                self.load_keys(at + d * CACHE_BLOCK, head, to);
                self.prefetch(next + d * CACHE_BLOCK);
            }
            for lane in 0..lanes {
                let to = &mut tile.values[(first + lane) * e..][..e];
                self.load_values(at + lane * e, head * CACHE_BLOCK + lane, to);
            }
            if let CacheView::Bf16(k, v) = self.cache {
                // Half as much to read as behind the widening.
                let min_key = min_exponent_bf16(&k[at..at + e * CACHE_BLOCK]);
                let min_value = min_exponent_bf16(&v[at..at + e * lanes]);
                tile.min_key = tile.min_key.min(min_key);
                tile.min_value = tile.min_value.min(min_value);
            }
        }
        let lanes = n.next_multiple_of(CACHE_BLOCK);
        if lanes < self.tile {
            for d in 0..e {
                // Lanes that nothing was loaded into are masked, but must not slow the rest.
                tile.keys[d * self.tile + lanes..(d + 1) * self.tile].fill(R::ZERO);
            }
        }
        if !matches!(self.cache, CacheView::Bf16(..)) {
            tile.min_key = R::min_exponent(tile.keys);
            tile.min_value = R::min_exponent(&tile.values[..n * e]);
        }
    }

    /// One dimension of the keys of a block.
    #[inline(always)]
    fn load_keys<R: Real>(&self, at: usize, head: usize, to: &mut [R; CACHE_BLOCK]) {
        match self.cache {
            CacheView::Bf16(k, _) => *to = block_of(k, at).map(R::from_bf16),
            CacheView::F32(k, _) => *to = block_of(k, at).map(R::from_f32),
            CacheView::Int8(k, _, scales, _) => {
                let scales = block_of(scales, head * CACHE_BLOCK);
                let each = block_of(k, at).iter().zip(scales);
                for (to, (&k, &a)) in to.iter_mut().zip(each) {
                    *to = R::from_f32((a * f32::from(k)).round_bf16());
                }
            }
        }
    }

    /// Asks for the line of keys and that of values at `at`: the numbers of a head fill
    /// some lines of each block, too few for the machine to see where the next ones lie.
    #[inline(always)]
    fn prefetch(&self, at: usize) {
        match self.cache {
            CacheView::Bf16(k, v) => {
                prefetch(k, at);
                prefetch(v, at);
            }
            CacheView::F32(k, v) => {
                prefetch(k, at);
                prefetch(v, at);
            }
            CacheView::Int8(k, v, ..) => {
                prefetch(k, at);
                prefetch(v, at);
            }
        }
    }

    /// One number of one key.
    #[inline(always)]
    fn key<R: Real>(&self, at: usize, scale: usize) -> R {
        match self.cache {
            CacheView::Bf16(k, _) => R::from_bf16(k[at]),
            CacheView::F32(k, _) => R::from_f32(k[at]),
            CacheView::Int8(k, _, scales, _) => {
                R::from_f32((scales[scale] * f32::from(k[at])).round_bf16())
            }
        }
    }

    /// The value of one slot.
    #[inline(always)]
    fn load_values<R: Real>(&self, at: usize, scale: usize, to: &mut [R]) {
        let e = self.head_dim;
        match self.cache {
            CacheView::Bf16(_, v) => {
                for (to, &v) in to.iter_mut().zip(&v[at..at + e]) {
                    *to = R::from_bf16(v);
                }
            }
            CacheView::F32(_, v) => {
                for (to, &v) in to.iter_mut().zip(&v[at..at + e]) {
                    *to = R::from_f32(v);
                }
            }
            CacheView::Int8(_, v, _, scales) => {
                let a = scales[scale];
                for (to, &v) in to.iter_mut().zip(&v[at..at + e]) {
                    *to = R::from_f32((a * f32::from(v)).round_bf16());
                }
            }
        }
    }

    /// The key and value of one slot, into one lane.
    #[inline(always)]
    fn load_lane<R: Real>(&self, slot: usize, kv_head: usize, lane: usize, tile: &mut Tile<'_, R>) {
        let (e, from) = (self.head_dim, slot % CACHE_BLOCK);
        let head = slot / CACHE_BLOCK * self.num_kv_heads + kv_head;
        let at = head * e * CACHE_BLOCK;
        for d in 0..e {
            let key = self.key(at + d * CACHE_BLOCK + from, head * CACHE_BLOCK + from);
            tile.keys[d * self.tile + lane] = key;
            tile.min_key = tile.min_key.min(R::min_exponent(&[key]));
        }
        let to = &mut tile.values[lane * e..(lane + 1) * e];
        self.load_values(at + from * e, head * CACHE_BLOCK + from, to);
        tile.min_value = tile.min_value.min(R::min_exponent(to));
    }

    /// Gathers the lanes of the tile from `j0` that lie on the path of row `i`.
    #[inline(always)]
    fn gather<R: Real>(
        &self,
        segment: &CachedSegment<'_>,
        kv_head: usize,
        i: usize,
        j0: usize,
        tile: &mut Tile<'_, R>,
    ) {
        let mut node = Some(i);
        let mut position = segment.past + segment.depth(i);
        while let Some(row) = node {
            if position < j0 {
                return;
            }
            if position < j0 + self.tile {
                let slot = segment.slot(segment.past + row);
                self.load_lane(slot, kv_head, position - j0, tile);
            }
            node = segment.parent(row);
            position = position.wrapping_sub(1);
        }
    }
}

#[inline(always)]
fn block_of<T>(values: &[T], at: usize) -> &[T; CACHE_BLOCK] {
    values[at..].first_chunk().expect("whole blocks")
}

/// Segments whose rows are computed together.
#[derive(Clone, Copy)]
pub struct Bundle<'a, 's> {
    segments: &'a [CachedSegment<'s>],
    /// Positions that lie in the same blocks for all of them and are seen by all of their rows;
    /// whole tiles, and 0 for a segment alone.
    shared: usize,
}

impl<'a, 's> Bundle<'a, 's> {
    /// Of the first of `segments` and those behind it that go together with it; and the rest.
    fn split(
        segments: &'a [CachedSegment<'s>],
        most: usize,
        tile: usize,
    ) -> (Self, &'a [CachedSegment<'s>]) {
        let first = &segments[0];
        let (mut len, mut rows, mut shared) = (1, first.q_len, 0);
        for next in &segments[1..] {
            rows += next.q_len;
            if rows > most {
                break;
            }
            let same = first.blocks.iter().zip(next.blocks);
            let same = CACHE_BLOCK * same.take_while(|(a, b)| a == b).count();
            let same = same.min(first.past).min(next.past) / tile * tile;
            // One that shares little would take more from the others than it brings.
            if same == 0 || same < shared / 2 {
                break;
            }
            shared = if len == 1 { same } else { shared.min(same) };
            len += 1;
        }
        let (segments, rest) = segments.split_at(len);
        (Self { segments, shared }, rest)
    }

    /// Bundles that have all of some segments, one after the other; with several segments, a bundle
    /// has at most `most` rows.
    pub fn of(
        mut segments: &'a [CachedSegment<'s>],
        most: usize,
        tile: usize,
    ) -> impl Iterator<Item = Self> {
        std::iter::from_fn(move || {
            let bundle;
            (bundle, segments) =
                (!segments.is_empty()).then(|| Self::split(segments, most, tile))?;
            Some(bundle)
        })
    }

    /// Runs of at most `step` rows that are computed apart from each other.
    pub fn runs(self, step: usize) -> usize {
        match self.segments {
            [segment] => segment.q_len.div_ceil(step),
            _ => 1,
        }
    }

    /// Rows of run `index`.
    pub fn rows(self, index: usize, step: usize) -> (usize, usize) {
        match self.segments {
            [segment] => (index * step, segment.q_len.min((index + 1) * step)),
            _ => (0, self.segments.iter().map(|s| s.q_len).sum()),
        }
    }

    /// Each segment and the rows of it that are computed: `rows` if it is alone, else all.
    #[inline(always)]
    fn parts(
        self,
        rows: (usize, usize),
    ) -> impl Iterator<Item = (CachedSegment<'s>, (usize, usize))> {
        let is_alone = self.segments.len() == 1;
        self.segments.iter().map(move |segment| {
            let rows = if is_alone { rows } else { (0, segment.q_len) };
            (segment.simplified(), rows)
        })
    }
}

/// Sums of the (row, head) pairs of a block.
struct Sums<'a, R> {
    acc: &'a mut [R],
    max: &'a mut [R],
    sum: &'a mut [R],
    scores: &'a mut [R],
    q: &'a mut [R],
}

/// Pairs of a row and a head from which on a unit for bf16 is worth packing tiles for it.
const WORTH_A_UNIT: usize = 64;

/// Rows that [`cached_block`] works on together for `heads` heads, which share a key head, where a
/// segment has `q_len`; it takes more of them one run after the other.
pub fn rows_together<R: Real, S: Store<R>>(
    view: &CachedView<'_, S>,
    q_len: usize,
    heads: usize,
) -> usize {
    let of_unit = units::cached_rows::<R, S>(view, heads);
    let of_unit = of_unit.filter(|_| q_len * heads >= WORTH_A_UNIT);
    of_unit.unwrap_or((view.tile / heads).max(1))
}

/// Attention of the query heads `heads`, which share a key head and are at most `tile`, in rows
/// `rows` of the segment of a bundle, or in all rows if it has several; `put(row, head, values)` with
/// rows as `view` counts them. `scratch` has [`scratch_len`](super::attention::scratch_len) and
/// [`sums_len`](super::attention::sums_len) values.
#[inline(always)]
pub fn cached_block<R: Real, S: Store<R>>(
    view: CachedView<'_, S>,
    bundle: Bundle<'_, '_>,
    heads: Range<usize>,
    rows: (usize, usize),
    mut put: impl FnMut(usize, usize, &[R]),
    scratch: &mut [R],
) {
    let [segment] = bundle.segments else {
        return cached_pairs(view, bundle, heads, rows, &mut put, scratch);
    };
    let segment = &segment.simplified();
    let few = (view.tile / heads.len()).max(1);
    let is_worth_it = (rows.1 - rows.0) * heads.len() >= WORTH_A_UNIT;
    if is_worth_it && matches!(segment.among, Among::Chain) {
        let (heads, scratch) = (heads.clone(), &mut *scratch);
        let mut put = |row: usize, head: usize, values: &[R]| {
            put(segment.q_start + row, head, values);
        };
        if units::forward_cached(&view, segment, heads, rows, &mut put, scratch) {
            return;
        }
    }
    for start in (rows.0..rows.1).step_by(few) {
        let (heads, rows) = (heads.clone(), (start, rows.1.min(start + few)));
        cached_pairs(view, bundle, heads, rows, &mut put, scratch);
    }
}

/// [`cached_block`] of at most `tile` pairs of a row and a head.
#[inline(always)]
fn cached_pairs<R: Real, S: Store<R>>(
    view: CachedView<'_, S>,
    bundle: Bundle<'_, '_>,
    heads: Range<usize>,
    rows: (usize, usize),
    put: &mut impl FnMut(usize, usize, &[R]),
    scratch: &mut [R],
) {
    let (e, tile) = (view.head_dim, view.tile);
    let kv_head = heads.start / (view.num_heads / view.num_kv_heads);
    let group = heads.len();
    let parts = || bundle.parts(rows);
    let pairs = parts().map(|(_, rows)| rows.1 - rows.0).sum::<usize>() * group;
    let (keys, scratch) = scratch.split_at_mut(e * tile);
    let (values, scratch) = scratch.split_at_mut(e * tile);
    let mut sums = Sums::new(pairs, (e, tile), scratch);
    let mut q = sums.q.chunks_mut(group * e);
    for (segment, rows) in parts() {
        for (i, q) in (rows.0..rows.1).zip(&mut q) {
            let at = (segment.q_start + i) * view.num_heads + heads.start;
            load_row(view.q, at * e, q);
        }
    }
    let mut loaded = Tile {
        keys,
        values,
        min_key: i32::MAX,
        min_value: i32::MAX,
    };
    for j0 in (0..bundle.shared).step_by(tile) {
        let (segment, of_tile) = (&bundle.segments[0], (kv_head, j0, tile));
        if !sums.add_stored::<S>(&view, segment, of_tile, |_| tile, &mut loaded) {
            view.load(segment, kv_head, (j0, tile), &mut loaded);
            sums.add::<S>(&view, 0..pairs, tile, |_| tile, &loaded);
        }
    }
    let mut first = 0;
    for (segment, rows) in parts() {
        let end = first + (rows.1 - rows.0) * group;
        let mut sums = sums.part(first..end, (e, tile));
        let of_part = (kv_head, rows, bundle.shared);
        sums.add_tiles::<S>(&view, &segment, of_part, &mut loaded);
        for (pair, acc) in sums.finish(e).enumerate() {
            let row = segment.q_start + rows.0 + pair / group;
            put(row, heads.start + pair % group, acc);
        }
        first = end;
    }
}

impl<'a, R: Real> Sums<'a, R> {
    /// Of `pairs` pairs that have seen nothing, cut from `scratch`.
    #[inline(always)]
    fn new(pairs: usize, (e, tile): (usize, usize), scratch: &'a mut [R]) -> Self {
        let (acc, scratch) = scratch.split_at_mut(e * pairs);
        let (max, scratch) = scratch.split_at_mut(pairs);
        let (sum, scratch) = scratch.split_at_mut(pairs);
        let (scores, scratch) = scratch.split_at_mut(tile * pairs);
        let q = &mut scratch[..e * pairs];
        acc.fill(R::ZERO);
        max.fill(R::NEG_INFINITY);
        sum.fill(R::ZERO);
        Self {
            acc,
            max,
            sum,
            scores,
            q,
        }
    }

    /// Those of neighbouring pairs.
    #[inline(always)]
    fn part(&mut self, pairs: Range<usize>, (e, tile): (usize, usize)) -> Sums<'_, R> {
        Sums {
            acc: &mut self.acc[pairs.start * e..pairs.end * e],
            max: &mut self.max[pairs.clone()],
            sum: &mut self.sum[pairs.clone()],
            scores: &mut self.scores[pairs.start * tile..pairs.end * tile],
            q: &mut self.q[pairs.start * e..pairs.end * e],
        }
    }

    /// Folds the tiles from position `from` on into the pairs, all those of rows `rows` of a
    /// segment.
    #[inline(always)]
    fn add_tiles<S: Store<R>>(
        &mut self,
        view: &CachedView<'_, S>,
        segment: &CachedSegment<'_>,
        (kv_head, rows, from): (usize, (usize, usize), usize),
        loaded: &mut Tile<'_, R>,
    ) {
        let (e, tile, pairs) = (view.head_dim, view.tile, self.max.len());
        let group = pairs / (rows.1 - rows.0);
        let ends = (rows.0..rows.1).map(|i| segment.end(i));
        let last_end = ends.max().unwrap_or(0);
        // Every row sees all keys below this.
        let shared = segment.common_end(rows.0);
        let is_tree = matches!(segment.among, Among::Tree(_));
        for j0 in (from..last_end).step_by(tile) {
            let own_lanes = is_tree && j0 + tile > segment.past;
            let end = if own_lanes { segment.past } else { last_end };
            let n = end.saturating_sub(j0).min(tile);
            let end_of = |i: usize| segment.end(i).saturating_sub(j0);
            let is_same = j0 + tile <= shared;
            let end_of_pair = |pair| match is_same {
                true => tile,
                false => end_of(rows.0 + pair / group),
            };
            let of_tile = (kv_head, j0, n);
            if !own_lanes && self.add_stored::<S>(view, segment, of_tile, end_of_pair, loaded) {
                continue;
            }
            view.load(segment, kv_head, (j0, n), loaded);
            if is_same || !own_lanes && loaded.is_finite(end_of_pair(0)..n, e) {
                self.add::<S>(view, 0..pairs, n, end_of_pair, loaded);
                continue;
            }
            for i in rows.0..rows.1 {
                let end = end_of(i);
                if end == 0 {
                    continue;
                }
                if own_lanes {
                    view.gather(segment, kv_head, i, j0, loaded);
                }
                let first = (i - rows.0) * group;
                self.add::<S>(view, first..first + group, end.min(tile), |_| end, loaded);
            }
        }
    }

    /// The outputs of the pairs.
    #[inline(always)]
    fn finish(&mut self, e: usize) -> impl Iterator<Item = &[R]> {
        for (acc, &sum) in self.acc.chunks_mut(e).zip(&*self.sum) {
            let factor = if sum == R::ZERO {
                R::ZERO
            } else {
                R::ONE / sum
            };
            acc.iter_mut().for_each(|x| *x = *x * factor);
        }
        self.acc.chunks(e)
    }

    /// Folds the first `n` lanes of a tile into neighbouring pairs, each of which sees those
    /// below its `end_of`.
    #[inline(always)]
    fn add<S: Store<R>>(
        &mut self,
        view: &CachedView<'_, S>,
        pairs: Range<usize>,
        n: usize,
        end_of: impl Fn(usize) -> usize,
        tile: &Tile<'_, R>,
    ) {
        let (e, lanes) = (view.head_dim, view.tile);
        let keys = Panel {
            values: &*tile.keys,
            min_exponent: tile.min_key,
        };
        let q = &self.q[pairs.start * e..pairs.end * e];
        let scores = &mut self.scores[pairs.start * lanes..pairs.end * lanes];
        scores.fill(R::ZERO);
        multiply_rows::<R, S>(view.isa, q, (e, e), &keys, lanes, scores);
        self.soften::<S>(view, pairs.clone(), &end_of);
        self.add_values::<S>(view, pairs, n, end_of, tile);
    }

    /// From products with keys to probabilities, for the lanes of a tile that each pair sees.
    #[inline(always)]
    fn soften<S: Store<R>>(
        &mut self,
        view: &CachedView<'_, S>,
        pairs: Range<usize>,
        end_of: impl Fn(usize) -> usize,
    ) {
        let (e, lanes) = (view.head_dim, view.tile);
        let scale = R::ONE / R::from_f64(e as f64).sqrt();
        let first = pairs.start;
        let scores = &mut self.scores[first * lanes..pairs.end * lanes];
        for (scores, pair) in scores.chunks_mut(lanes).zip(pairs.clone()) {
            if end_of(pair) > 0 {
                mask(scores, scale, 0, end_of(pair));
            }
        }
        let running = Running {
            max: &mut self.max[pairs.clone()],
            sum: &mut self.sum[pairs.clone()],
            acc: &mut self.acc[first * e..pairs.end * e],
        };
        online_softmax::<R, S>(scores, lanes, running, |r| end_of(first + r) > 0);
    }

    /// Adds the first `n` values of a tile, times their probabilities, which are zeros for
    /// those that a pair does not see.
    #[inline(always)]
    fn add_values<S: Store<R>>(
        &mut self,
        view: &CachedView<'_, S>,
        pairs: Range<usize>,
        n: usize,
        end_of: impl Fn(usize) -> usize,
        tile: &Tile<'_, R>,
    ) {
        let (e, lanes) = (view.head_dim, view.tile);
        let values = Panel {
            values: &tile.values[..n * e],
            min_exponent: tile.min_value,
        };
        let scores = &self.scores[pairs.start * lanes..pairs.end * lanes];
        let acc = &mut self.acc[pairs.start * e..pairs.end * e];
        // A row that has seen no key yet has no maximum; it takes no part.
        let max = &self.max[pairs.clone()];
        let seen = |r: usize| end_of(pairs.start + r) > 0 && max[r] != R::NEG_INFINITY;
        multiply_active::<R, S>(view.isa, scores, (lanes, n), &values, e, acc, seen);
    }

    /// As [`add`](Self::add) for all pairs and the tile of `n` positions from `j0`, in bf16 as it
    /// is stored; no later pair sees less. False where there are too many pairs, a pair sees
    /// nothing, or products may be denormal; what was done then, `add` begins anew.
    #[inline(always)]
    fn add_stored<S: Store<R>>(
        &mut self,
        view: &CachedView<'_, S>,
        segment: &CachedSegment<'_>,
        (kv_head, j0, n): (usize, usize, usize),
        end_of: impl Fn(usize) -> usize,
        loaded: &mut Tile<'_, R>,
    ) -> bool {
        let (e, lanes, pairs) = (view.head_dim, view.tile, self.max.len());
        let is_few = pairs <= most_stored_rows::<R>(view.isa) && n <= STORED_BLOCKS * CACHE_BLOCK;
        if S::ORDER != Order::EvenOdd || !is_few || end_of(0) == 0 {
            return false;
        }
        let Some(stored) = view.stored(segment, (kv_head, j0, n), loaded) else {
            return false;
        };
        // Values that not all pairs see are multiplied with zeros.
        if !stored.is_finite_from(end_of(0), e)
            || needs_flush(S::ORDER, R::min_exponent(self.q), stored.min_key())
        {
            return false;
        }
        self.scores.fill(R::ZERO);
        let scores = (&mut *self.scores, lanes);
        let keys = stored.keys(e);
        if !stored_mat(view.isa, pairs, (self.q, e), &keys[..stored.len], scores) {
            return false;
        }
        self.soften::<S>(view, 0..pairs, &end_of);
        let all_seen = self.max.iter().all(|&max| max != R::NEG_INFINITY);
        let least = R::min_exponent(self.scores);
        let is_calm = !needs_flush(S::ORDER, least, stored.min_value());
        let (scores, acc) = ((&*self.scores, lanes), (&mut *self.acc, e));
        let values = [stored.values(e)];
        if !(all_seen && is_calm && stored_mat(view.isa, pairs, scores, &values, acc)) {
            view.load(segment, kv_head, (j0, n), loaded);
            self.add_values::<S>(view, 0..pairs, n, end_of, loaded);
        }
        true
    }
}

/// Rounds one head of a token to int8 and returns the scale.
#[inline(always)]
pub fn quantize_head(x: &[f32], q: &mut [i8]) -> f32 {
    // Magnitudes as integers: those of NaN are the largest.
    let mut absmax = 0;
    for x in x {
        absmax = absmax.max(x.to_bits() & !(1 << 31));
    }
    let a = f32::from_bits(absmax) / 127.0;
    if a < f32::MIN_POSITIVE || a.is_nan() {
        q.fill(0);
        return if a.is_nan() { a } else { 0.0 };
    }
    for (q, &x) in q.iter_mut().zip(x) {
        *q = (x / a).round_ties_even().clamp(-127.0, 127.0) as i8;
    }
    a
}

#[cfg(test)]
mod tests {
    use super::*;

    const TILE: usize = 64;

    /// Lengths and shared positions of the bundles of sequences with these blocks, a row each.
    fn bundles<'a>(blocks: &[&'a [u32]], most: usize) -> Vec<(usize, usize)> {
        let segment = |(q_start, &blocks): (usize, &&'a [u32])| CachedSegment {
            q_start,
            q_len: 1,
            past: blocks.len() * CACHE_BLOCK - 1,
            blocks,
            among: Among::Chain,
        };
        let segments: Vec<_> = blocks.iter().enumerate().map(segment).collect();
        let each = Bundle::of(&segments, most, TILE);
        each.map(|bundle| (bundle.segments.len(), bundle.shared))
            .collect()
    }

    #[test]
    fn sequences_go_together_as_far_as_they_are_the_same() {
        let prompt: Vec<u32> = (0..20).collect();
        let with = |len: usize, own: &[u32]| [&prompt[..len], own].concat();
        let (a, b, c) = (with(9, &[50]), with(9, &[51, 52]), with(9, &[53]));
        // 144 positions, of which 128 are whole tiles.
        assert_eq!(bundles(&[&a, &b, &c], 8), [(3, 128)]);
        assert_eq!(bundles(&[&a, &b, &c], 2), [(2, 128), (1, 0)]);
        assert_eq!(bundles(&[&a, &b, &c], 0), [(1, 0); 3]);
        // The last position of the shared blocks is a row's own.
        assert_eq!(bundles(&[&prompt[..4], &prompt[..4]], 8), [(1, 0); 2]);
        // One that would take half of what the others share, and one that takes less.
        let (short, less) = (with(4, &[60, 61]), with(8, &[62]));
        let long = [with(20, &[54]), with(20, &[55])];
        assert_eq!(
            bundles(&[&long[0], &long[1], &short], 8),
            [(2, 320), (1, 0)]
        );
        assert_eq!(bundles(&[&a, &b, &less], 8), [(3, 128)]);
        // Others in between.
        assert_eq!(bundles(&[&a, &[70, 71, 72, 73, 74], &b], 8), [(1, 0); 3]);
    }
}
