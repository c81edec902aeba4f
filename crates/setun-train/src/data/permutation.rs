//! A seeded permutation of `0..n` that needs no table.
//!
//! A balanced Feistel network permutes the smallest even-bit power of two that holds
//! `n`; cycle walking (apply again while the result is outside) restricts it to `0..n`.
//! The value at an index is a pure function of (n, seed, epoch, index), so the data
//! order has no state to save.

use super::mix64;

/// Rounds of the network; 4 make a pseudo-random permutation (Luby and Rackoff 1988),
/// the rest is margin for the small domains of small corpora.
const NUM_ROUNDS: usize = 8;

/// Fewest bits of a half: below this a Feistel network reaches too few permutations.
const MIN_HALF_BITS: u32 = 3;

/// A bijection of `0..len`, chosen by (seed, epoch).
#[derive(Clone, Copy, Debug)]
pub struct Permutation {
    len: u64,
    half_bits: u32,
    round_keys: [u64; NUM_ROUNDS],
}

impl Permutation {
    /// The permutation of `0..len` for `(seed, epoch)`.
    pub fn new(len: u64, seed: u64, epoch: u64) -> Self {
        let bits = u64::BITS - len.saturating_sub(1).leading_zeros();
        let key = mix64(mix64(seed.wrapping_add(0x9e37_79b9_7f4a_7c15)).wrapping_add(epoch));
        let mut round_keys = [0; NUM_ROUNDS];
        for (round, round_key) in (1u64..).zip(&mut round_keys) {
            *round_key = mix64(key.wrapping_add(round.wrapping_mul(0x9e37_79b9_7f4a_7c15)));
        }
        Self {
            len,
            half_bits: bits.div_ceil(2).max(MIN_HALF_BITS),
            round_keys,
        }
    }

    /// Where `index` goes.
    ///
    /// # Panics
    /// When `index` is not in `0..len`; cycle walking need not end there.
    pub fn at(&self, index: u64) -> u64 {
        assert!(
            index < self.len,
            "index {index} of a permutation of {}",
            self.len
        );
        let mut x = self.network(index);
        while x >= self.len {
            x = self.network(x);
        }
        x
    }

    /// The network over `2 * half_bits` bits.
    fn network(&self, x: u64) -> u64 {
        // half_bits is at most 32, so neither shift overflows.
        let mask = (1u64 << self.half_bits) - 1;
        let (mut left, mut right) = (x >> self.half_bits, x & mask);
        for key in self.round_keys {
            (left, right) = (right, left ^ (mix64(right ^ key) & mask));
        }
        left << self.half_bits | right
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    fn image(len: u64, seed: u64, epoch: u64) -> Vec<u64> {
        let permutation = Permutation::new(len, seed, epoch);
        (0..len).map(|i| permutation.at(i)).collect()
    }

    #[test]
    fn every_length_is_a_bijection() {
        for len in (1..300).chain([1023, 1024, 1025, 4097]) {
            for seed in 0..3 {
                let mut sorted = image(len, seed, len % 5);
                sorted.sort_unstable();
                assert!(sorted.into_iter().eq(0..len), "length {len}, seed {seed}");
            }
        }
    }

    #[test]
    fn huge_lengths_stay_inside_and_distinct() {
        for len in [u64::from(u32::MAX), (1 << 40) + 1, u64::MAX] {
            let permutation = Permutation::new(len, 7, 1);
            let values: HashSet<u64> = (0..2000).map(|i| permutation.at(i)).collect();
            assert_eq!(values.len(), 2000);
            assert!(values.iter().all(|&v| v < len));
        }
    }

    #[test]
    fn seed_and_epoch_choose_the_order() {
        assert_eq!(image(100, 1, 0), image(100, 1, 0));
        let orders: HashSet<Vec<u64>> = (0..20)
            .flat_map(|seed| (0..20).map(move |epoch| image(100, seed, epoch)))
            .collect();
        assert_eq!(orders.len(), 400);
    }

    #[test]
    fn small_lengths_reach_every_order() {
        for (len, factorial) in [(2, 2), (3, 6), (4, 24), (5, 120)] {
            let orders: HashSet<Vec<u64>> = (0..4000).map(|seed| image(len, seed, 0)).collect();
            assert_eq!(orders.len(), factorial, "length {len}");
        }
    }

    #[test]
    fn positions_are_uniform() {
        // Chi-squared with 15 degrees of freedom; 44 is exceeded with probability 1e-4.
        let mut counts = [0u32; 16];
        for seed in 0..8000 {
            counts[Permutation::new(16, seed, 3).at(5) as usize] += 1;
        }
        let chi: f64 = counts
            .iter()
            .map(|&n| (f64::from(n) - 500.0).powi(2) / 500.0)
            .sum();
        assert!(chi < 44.0, "chi-squared {chi}");
    }

    #[test]
    fn neighbours_are_separated() {
        let order = image(10_000, 3, 0);
        let far = order
            .windows(2)
            .filter(|w| w[0].abs_diff(w[1]) > 500)
            .count();
        // A uniform pair differs by more than a twentieth with probability 0.9025.
        assert!((8900..9150).contains(&far), "{far} of 9999 pairs");
    }

    #[test]
    #[should_panic(expected = "index 3 of a permutation of 3")]
    fn an_index_outside_is_refused() {
        Permutation::new(3, 0, 0).at(3);
    }
}
