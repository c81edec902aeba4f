//! Softmax fused with top-k, a tile of the vocabulary at a time: the arithmetic.
//!
//! A tile gives its maximum `m_t` and `d_t`, the sum of `exp(y - m_t)`, as in the online
//! softmax (Milakov and Gimelshein, 2018). Tiles begin at multiples of [`TILE`], so which
//! thread had which tile does not show: [`Total::of`] adds them up in ascending order.

use crate::real::{Real, sum_slices};

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;

/// Entries of the vocabulary that are handled together.
pub const TILE: usize = 1024;
/// Entries that are compared with the threshold at once, as many as a mask has bits.
const RUN: usize = 64;

/// What a row of logits goes through before its softmax, in this order. The defaults
/// change nothing.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Shaping {
    /// Positive logits of tokens that occurred are divided by it, negative ones multiplied.
    pub repetition_penalty: f32,
    /// Subtracted from the logits of tokens that were generated.
    pub presence_penalty: f32,
    /// Subtracted once for each time that a token was generated.
    pub frequency_penalty: f32,
    /// Divides all logits; above 0.
    pub temperature: f32,
}

impl Default for Shaping {
    fn default() -> Self {
        Self {
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            temperature: 1.0,
        }
    }
}

impl Shaping {
    /// Changes the logits `tile` of the entries from `first` on. `occurred` has the tokens
    /// that occurred, ascending, each with how often it was generated: 0 times if only the
    /// prompt has it.
    #[inline(always)]
    pub fn apply(&self, first: usize, occurred: &[(u32, u32)], tile: &mut [f32]) {
        let from = occurred.partition_point(|&(id, _)| (id as usize) < first);
        for &(id, count) in &occurred[from..] {
            let Some(x) = tile.get_mut(id as usize - first) else {
                break;
            };
            if x.is_finite() {
                let scaled = if *x < 0.0 {
                    *x * self.repetition_penalty
                } else {
                    *x / self.repetition_penalty
                };
                let less = match count {
                    0 => 0.0,
                    _ => self.presence_penalty + self.frequency_penalty * count as f32,
                };
                // A penalty must not exclude a token: only an infinity does.
                *x = (scaled - less).clamp(f32::MIN, f32::MAX);
            }
        }
        if self.temperature != 1.0 {
            for x in tile.iter_mut() {
                *x /= self.temperature;
            }
        }
    }
}

/// Maximum and sum of the exponentials of a tile.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TileSum {
    /// The largest value.
    pub max: f32,
    /// Sum of `exp(y - max)`.
    pub sum: f32,
}

impl TileSum {
    /// Of the values of a tile.
    #[inline(always)]
    pub fn of(tile: &[f32]) -> Self {
        let max = f32::largest(tile);
        let sum = sum_slices([tile], |[x]| Real::exp_small(x - max));
        Self { max, sum }
    }
}

/// Maximum and sum of the exponentials of a row.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Total {
    /// The largest value.
    pub max: f32,
    /// Sum of `exp(y - max)`.
    pub sum: f32,
}

impl Total {
    /// Of the tiles of a row, in ascending order. A tile that is all negative infinity adds
    /// nothing, unless the whole row is.
    pub fn of(tiles: impl Iterator<Item = TileSum> + Clone) -> Self {
        let max = tiles
            .clone()
            .fold(f32::NEG_INFINITY, |max, t| Real::maximum(max, t.max));
        let mut sum = 0.0f32;
        for tile in tiles {
            if tile.max != f32::NEG_INFINITY || max == f32::NEG_INFINITY {
                sum += tile.sum * Real::exp(tile.max - max);
            }
        }
        Self { max, sum }
    }

    /// Log of the sum of the exponentials of the row.
    pub fn log_sum_exp(&self) -> f64 {
        f64::from(self.max) + libm::log(f64::from(self.sum))
    }

    /// Log of the probability of an entry of the row, from its value behind [`Shaping`].
    pub fn log_probability(&self, value: f32) -> f64 {
        f64::from(value) - self.log_sum_exp()
    }
}

/// An entry that is kept.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Candidate {
    /// Its value, behind [`Shaping`].
    pub value: f32,
    /// Its index in the vocabulary.
    pub id: u32,
}

/// Better first: larger value, then lower id; NaN last.
pub fn by_rank(a: &Candidate, b: &Candidate) -> std::cmp::Ordering {
    Rank::of(*b).cmp(&Rank::of(*a))
}

/// A candidate as one integer, the larger the better: integers are selected and sorted several
/// times as fast as what is compared value by value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Rank(u64);

impl Rank {
    /// The sign of a zero and what a NaN holds are lost.
    #[inline(always)]
    fn of(candidate: Candidate) -> Self {
        // Both zeros are one value.
        let bits = (candidate.value + 0.0).to_bits();
        // Bits of negative values fall where values rise, and lie above those of positive ones.
        let value = match bits >> 31 {
            _ if candidate.value.is_nan() => 0,
            0 => bits | 1 << 31,
            _ => !bits,
        };
        Self(u64::from(value) << 32 | u64::from(!candidate.id))
    }

    fn candidate(self) -> Candidate {
        let value = (self.0 >> 32) as u32;
        let value = match value >> 31 {
            _ if value == 0 => f32::NAN,
            0 => f32::from_bits(!value),
            _ => f32::from_bits(value & !(1 << 31)),
        };
        let id = !(self.0 as u32);
        Candidate { value, id }
    }
}

/// The best `k` entries among those seen, and a few that will be dropped.
#[derive(Clone, Debug)]
pub struct Best {
    k: usize,
    kept: Vec<Rank>,
    /// The k-th best value of some `k` entries: nothing at or below it with a larger id can
    /// be among the best.
    threshold: Option<f32>,
}

impl Best {
    /// Nothing seen; `k` is at least 1.
    pub fn new(k: usize) -> Self {
        Self {
            k,
            kept: Vec::new(),
            threshold: None,
        }
    }

    /// Entries that are kept before the best of them are selected: twice as many, so that
    /// each one is looked at twice on average, and the threshold rises soon.
    fn room(k: usize) -> usize {
        2 * k + RUN
    }

    /// Looks at the values of the entries from `first` on, which are larger ids than any
    /// seen before by this object.
    #[inline(always)]
    pub fn add(&mut self, first: usize, tile: &[f32]) {
        for (run, values) in tile.chunks(RUN).enumerate() {
            let above = match self.threshold {
                Some(threshold) => above(values, threshold),
                None => u64::MAX >> (RUN - values.len()),
            };
            if above != 0 {
                self.take(first + run * RUN, values, above);
            }
        }
    }

    /// Keeps those of the values of a run from entry `first` on whose bits are set in `above`.
    fn take(&mut self, first: usize, values: &[f32], mut above: u64) {
        while above != 0 {
            let i = above.trailing_zeros() as usize;
            above &= above - 1;
            let (id, value) = ((first + i) as u32, values[i]);
            self.kept.push(Rank::of(Candidate { value, id }));
        }
        if self.kept.len() >= Self::room(self.k) || self.is_first_full() {
            self.shrink();
        }
    }

    /// As soon as there are `k`, there is a threshold.
    fn is_first_full(&self) -> bool {
        self.threshold.is_none() && self.kept.len() >= self.k
    }

    fn shrink(&mut self) {
        if self.kept.len() >= self.k {
            let place = self.k - 1;
            self.kept.select_nth_unstable_by(place, |a, b| b.cmp(a));
            self.kept.truncate(self.k);
            let last = self.kept[place].candidate().value;
            self.threshold = (!last.is_nan()).then_some(last);
        }
    }

    /// Takes over what `other` has seen, of whatever ids.
    pub fn merge(&mut self, other: &Self) {
        self.kept.extend_from_slice(&other.kept);
    }

    /// The best `k`, or fewer if fewer were seen, best first.
    pub fn sorted(&mut self) -> Vec<Candidate> {
        self.shrink();
        self.kept.sort_unstable_by(|a, b| b.cmp(a));
        self.kept.iter().map(|rank| rank.candidate()).collect()
    }
}

/// Which values of a run are above a threshold.
#[inline(always)]
fn above(values: &[f32], threshold: f32) -> u64 {
    // Hardly any run has one: that is asked first.
    let any = values.iter().fold(false, |any, &x| any | (x > threshold));
    let bit = |(i, &x): (usize, &f32)| u64::from(x > threshold) << i;
    match any {
        true => values.iter().enumerate().map(bit).sum(),
        false => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_have_the_order_of_values_and_then_of_ids() {
        let values = [
            f32::INFINITY,
            f32::MAX,
            1.5,
            f32::MIN_POSITIVE,
            1e-45,
            0.0,
            -1e-45,
            -1.5,
            f32::MIN,
            f32::NEG_INFINITY,
            f32::NAN,
        ];
        let best_first: Vec<Candidate> = values
            .into_iter()
            .flat_map(|value| [0, 7, u32::MAX].map(|id| Candidate { value, id }))
            .collect();
        for (i, a) in best_first.iter().enumerate() {
            for (j, b) in best_first.iter().enumerate() {
                assert_eq!(by_rank(a, b), i.cmp(&j), "{a:?} {b:?}");
            }
            let back = Rank::of(*a).candidate();
            assert_eq!((back.value.to_bits(), back.id), (a.value.to_bits(), a.id));
        }
        let zeros = [-0.0, 0.0].map(|value| Candidate { value, id: 3 });
        assert!(by_rank(&zeros[0], &zeros[1]).is_eq());
        let negative_nan = Candidate {
            value: -f32::NAN,
            id: 3,
        };
        assert!(by_rank(&best_first[29], &negative_nan).is_lt());
    }
}
