//! Counter-based random numbers: Philox 4x32-10 of Salmon, Moraes, Dror and Shaw,
//! "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011).
//!
//! A number is a pure function of `(seed, stream, counter)`: there is no state that
//! advances, so nothing depends on how many numbers were drawn before, on threads or on
//! where a run was resumed. Callers choose what the stream and the counter mean (the
//! parameter and the element, the request and the position).

/// Multipliers and Weyl constants of Philox 4x32 (Salmon et al., section 3.3).
const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
const NUM_ROUNDS: usize = 10;

/// A family of 2^64 independent blocks of random bits, one per counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Philox {
    key: [u32; 2],
    /// Upper half of the 128-bit counter.
    stream: [u32; 2],
}

impl Philox {
    /// The numbers of `stream` under `seed`.
    ///
    /// The seed is Philox's key. The stream is the upper half of its 128-bit counter and
    /// the `counter` of [`block`](Self::block) the lower half. For a given seed every
    /// `(stream, counter)` is thus a different input of one permutation: two streams never
    /// share a block.
    pub const fn new(seed: u64, stream: u64) -> Self {
        Self {
            key: words(seed),
            stream: words(stream),
        }
    }

    /// 128 random bits.
    pub const fn block(&self, counter: u64) -> [u32; 4] {
        let [low, high] = words(counter);
        let mut state = [low, high, self.stream[0], self.stream[1]];
        let mut key = self.key;
        let mut num_done = 0;
        while num_done < NUM_ROUNDS {
            state = round(state, key);
            key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
            num_done += 1;
        }
        state
    }

    /// A uniform number in `[0, 1)`: a multiple of 2^-53, from the first two words of the
    /// block.
    pub const fn uniform(&self, counter: u64) -> f64 {
        let [low, high, _, _] = self.block(counter);
        unit_interval(low, high)
    }

    /// Two independent standard normal numbers by the method of Box and Muller, from one
    /// block.
    ///
    /// `log`, `sin` and `cos` are those of the `libm` crate, which are the same code
    /// everywhere; the standard library's differ in the last bits between platforms, and
    /// with them every initial weight would.
    pub fn normal_pair(&self, counter: u64) -> (f64, f64) {
        let [w0, w1, w2, w3] = self.block(counter);
        // In (0, 1], so that the logarithm is finite.
        let u = 1.0 - unit_interval(w0, w1);
        let angle = std::f64::consts::TAU * unit_interval(w2, w3);
        // IEEE 754 rounds the square root correctly: it is the same everywhere.
        let radius = (-2.0 * libm::log(u)).sqrt();
        (radius * libm::cos(angle), radius * libm::sin(angle))
    }
}

/// One round: two wide products, whose high halves are mixed with the key and the other
/// words.
const fn round(state: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let [low0, high0] = words(MULTIPLIERS[0] as u64 * state[0] as u64);
    let [low1, high1] = words(MULTIPLIERS[1] as u64 * state[2] as u64);
    [
        high1 ^ state[1] ^ key[0],
        low1,
        high0 ^ state[3] ^ key[1],
        low0,
    ]
}

/// Low word first.
const fn words(x: u64) -> [u32; 2] {
    [x as u32, (x >> 32) as u32]
}

/// The upper 53 of 64 bits as a multiple of 2^-53 in `[0, 1)`; exact.
const fn unit_interval(low: u32, high: u32) -> f64 {
    const STEP: f64 = 1.0 / (1u64 << 53) as f64;
    let bits = (high as u64) << 32 | low as u64;
    (bits >> 11) as f64 * STEP
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The vectors `philox4x32 10` of the file `kat_vectors` in Random123, with the four
    /// counter words grouped into (counter, stream) and the two key words into the seed.
    #[test]
    fn known_answers_of_random123() {
        let cases: [(u64, u64, u64, [u32; 4]); 3] = [
            (
                0,
                0,
                0,
                [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8],
            ),
            (
                u64::MAX,
                u64::MAX,
                u64::MAX,
                [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd],
            ),
            (
                0x299f_31d0_a409_3822,
                0x0370_7344_1319_8a2e,
                0x85a3_08d3_243f_6a88,
                [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
            ),
        ];
        for (seed, stream, counter, expected) in cases {
            let found = Philox::new(seed, stream).block(counter);
            assert_eq!(found, expected, "seed {seed:x}");
        }
    }

    #[test]
    fn every_argument_and_both_of_its_halves_matter() {
        let inputs = [0, 1, 2, 1 << 32, 1 << 33, 1 << 63];
        let mut blocks = Vec::new();
        for seed in inputs {
            for stream in inputs {
                blocks.extend(inputs.map(|counter| Philox::new(seed, stream).block(counter)));
            }
        }
        let num_blocks = blocks.len();
        blocks.sort_unstable();
        blocks.dedup();
        assert_eq!(blocks.len(), num_blocks);
    }

    #[test]
    fn unit_interval_is_half_open_and_exact() {
        assert_eq!(unit_interval(0, 0), 0.0);
        assert_eq!(unit_interval(0, 1 << 31), 0.5);
        // Bits below the 53 are dropped, never rounded up to 1.
        assert_eq!(unit_interval(u32::MAX, u32::MAX), 1.0 - f64::EPSILON / 2.0);
        assert_eq!(unit_interval((1 << 11) - 1, 0), 0.0);
        assert_eq!(unit_interval(1 << 11, 0), f64::EPSILON / 2.0);
    }

    /// Bounds are five standard errors of each moment.
    #[test]
    fn moments_of_uniform_numbers() {
        const N: u64 = 200_000;
        let philox = Philox::new(7, 3);
        let numbers: Vec<f64> = (0..N).map(|i| philox.uniform(i)).collect();
        assert!(numbers.iter().all(|u| (0.0..1.0).contains(u)));
        let tolerance = 5.0 / (N as f64).sqrt();
        let (mean, mean_square) = moments(&numbers);
        assert!((mean - 1.0 / 2.0).abs() < tolerance * (1.0f64 / 12.0).sqrt());
        assert!((mean_square - 1.0 / 3.0).abs() < tolerance * (4.0f64 / 45.0).sqrt());
        let lagged: f64 = numbers
            .windows(2)
            .map(|pair| (pair[0] - 0.5) * (pair[1] - 0.5))
            .sum();
        assert!((lagged / N as f64).abs() < tolerance / 12.0);
    }

    #[test]
    fn moments_of_normal_numbers() {
        const N: u64 = 100_000;
        let philox = Philox::new(11, 1 << 40);
        let pairs: Vec<(f64, f64)> = (0..N).map(|i| philox.normal_pair(i)).collect();
        let tolerance = 5.0 / (N as f64).sqrt();
        for half in [
            pairs.iter().map(|pair| pair.0).collect::<Vec<_>>(),
            pairs.iter().map(|pair| pair.1).collect::<Vec<_>>(),
        ] {
            let (mean, mean_square) = moments(&half);
            assert!(mean.abs() < tolerance);
            assert!((mean_square - 1.0).abs() < tolerance * 2.0f64.sqrt());
            let squares: Vec<f64> = half.iter().map(|x| x * x).collect();
            let (_, mean_fourth) = moments(&squares);
            assert!((mean_fourth - 3.0).abs() < tolerance * 96.0f64.sqrt());
            let beyond_two = half.iter().filter(|x| x.abs() > 2.0).count() as f64 / N as f64;
            assert!((beyond_two - 0.045_500_26).abs() < tolerance * 0.2084);
        }
        let covariance: f64 = pairs.iter().map(|(x, y)| x * y).sum::<f64>() / N as f64;
        assert!(covariance.abs() < tolerance);
    }

    /// The bits that initial weights are made of: a platform that computes others fails
    /// here. The decimals are the same formula with another library's functions, which
    /// agrees to rounding (and differs in the last bit of the last number).
    #[test]
    fn normal_numbers_have_fixed_bits() {
        let counters = [0, 1, 1 << 32, u64::MAX];
        let bits = [
            [0x3fe6_d6b3_d4f6_3e3a, 0xbfe7_92bf_8276_a6b9],
            [0xbffa_9987_8eb1_c672, 0x3fde_6d63_5778_3700],
            [0xbff8_73c8_8eeb_7ae2, 0xbfd4_8821_bbee_3d00],
            [0xbfdc_df68_458d_7237, 0xbfdf_72d2_b8b3_ed5e],
        ];
        let decimals = [
            [0.7137087973987442, -0.7366635845293877],
            [-1.6624827932359065, 0.4754265169329841],
            [-1.5282674391561888, -0.3208088240871376],
            [-0.4511357001518123, -0.4913832477320365],
        ];
        for (i, counter) in counters.into_iter().enumerate() {
            let (x, y) = Philox::new(42, 5).normal_pair(counter);
            assert_eq!([x.to_bits(), y.to_bits()], bits[i], "counter {counter}");
            assert!((x - decimals[i][0]).abs() < 1e-14);
            assert!((y - decimals[i][1]).abs() < 1e-14);
        }
    }

    fn moments(numbers: &[f64]) -> (f64, f64) {
        let n = numbers.len() as f64;
        let sum: f64 = numbers.iter().sum();
        let sum_of_squares: f64 = numbers.iter().map(|x| x * x).sum();
        (sum / n, sum_of_squares / n)
    }
}
