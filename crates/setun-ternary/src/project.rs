//! Projection of latent weights onto {-s, 0, +s}, and the way back.

use crate::ScaleRule;
use thiserror::Error;

/// Smallest scale that is kept: below it a group is all zeros. It is the smallest
/// binade in which every bf16 value is exact in f16 (f16 subnormals end at 2^-24 and
/// bf16 has 7 fraction bits).
pub const MIN_SCALE: f32 = 1.0 / 131_072.0;

/// Largest scale that f16 holds.
pub const MAX_SCALE: f32 = 65_504.0;

/// Why a group has no scale that can be shipped.
#[derive(Clone, Copy, Debug, PartialEq, Error)]
pub enum ScaleError {
    /// The scale does not fit into f16.
    #[error("scale {0} is larger than 65504, the largest f16")]
    TooLarge(f32),
    /// A latent weight is NaN or infinite.
    #[error("a latent weight is NaN or infinite")]
    NotFinite,
}

/// Projects one group: writes the trits and returns the scale, a bf16 value that f16
/// holds exactly (for [`ScaleRule::MeanF16`]: an f16 value).
///
/// `s = bf16(rule(|w|))`, taken in f64 and rounded once; `s < 2^-17` becomes 0;
/// `t = sign(w)` where `|w| > s / 2`, else 0 (for [`ScaleRule::MeanNonzero`]: where
/// `|w| > mean / 2`). `latents` and `trits` have the length of the group.
pub fn project_group(
    latents: &[f32],
    rule: ScaleRule,
    trits: &mut [i8],
) -> Result<f32, ScaleError> {
    let (exact, threshold) = match rule {
        ScaleRule::Mean | ScaleRule::MeanF16 => (mean_abs(latents), None),
        ScaleRule::Max => (f64::from(max_abs(latents)), None),
        ScaleRule::MeanNonzero => {
            let threshold = (0.5 * mean_abs(latents)) as f32;
            (mean_abs_above(latents, threshold), Some(threshold))
        }
        ScaleRule::LeastSquares => (least_squares(latents), None),
    };
    let fraction = match rule {
        ScaleRule::MeanF16 => 10,
        ScaleRule::Mean | ScaleRule::Max | ScaleRule::MeanNonzero | ScaleRule::LeastSquares => 7,
    };
    threshold_group(latents, (exact, fraction), threshold, trits)
}

/// As [`project_group`] with the rule [`ScaleRule::Mean`] and `factor` on the scale, a learned
/// one: an experiment. A factor below zero gives the scale 0.
pub fn project_group_scaled(
    latents: &[f32],
    factor: f32,
    trits: &mut [i8],
) -> Result<f32, ScaleError> {
    // Not `max`, which would make zero of NaN.
    let factor = if factor < 0.0 { 0.0 } else { f64::from(factor) };
    let exact = mean_abs(latents) * factor;
    threshold_group(latents, (exact, 7), None, trits)
}

/// The mean of the magnitudes, whose learned factor [`project_group_scaled`] takes.
pub fn group_mean(latents: &[f32]) -> f32 {
    mean_abs(latents) as f32
}

/// Rounds a scale to `fraction` bits and writes the trits: of what lies above `threshold`,
/// which is half of the rounded scale if it is not given.
fn threshold_group(
    latents: &[f32],
    (exact, fraction): (f64, u32),
    threshold: Option<f32>,
    trits: &mut [i8],
) -> Result<f32, ScaleError> {
    debug_assert_eq!(latents.len(), trits.len());
    if !exact.is_finite() {
        return Err(ScaleError::NotFinite);
    }
    let mut scale = round_to_bits(exact, fraction);
    if scale > MAX_SCALE {
        return Err(ScaleError::TooLarge(scale));
    }
    if scale < MIN_SCALE {
        scale = 0.0;
        trits.fill(0);
        return Ok(scale);
    }
    let threshold = threshold.unwrap_or(0.5 * scale);
    for (trit, &w) in trits.iter_mut().zip(latents) {
        *trit = i8::from(w > threshold) - i8::from(w < -threshold);
    }
    Ok(scale)
}

/// Latent weights from which [`project_group`] gives `(trits, scale)` back:
/// `t * s * n / (number of non-zeros)` for the mean rule, `t * s` for the others.
pub fn reconstruct_latents(trits: &[i8], scale: f32, rule: ScaleRule, latents: &mut [f32]) {
    let nonzero = trits.iter().filter(|&&t| t != 0).count();
    let magnitude = match rule {
        ScaleRule::Mean | ScaleRule::MeanF16 => {
            (f64::from(scale) * trits.len() as f64 / nonzero.max(1) as f64) as f32
        }
        ScaleRule::Max | ScaleRule::MeanNonzero | ScaleRule::LeastSquares => scale,
    };
    for (latent, &trit) in latents.iter_mut().zip(trits) {
        *latent = f32::from(trit) * magnitude;
    }
}

/// Sums in f64 over four interleaved chains: f32 inputs make the sum exact to far below
/// the one rounding that follows.
fn mean_abs(latents: &[f32]) -> f64 {
    let mut sums = [0.0f64; 4];
    for chunk in latents.chunks(4) {
        for (sum, &w) in sums.iter_mut().zip(chunk) {
            *sum += f64::from(w.abs());
        }
    }
    ((sums[0] + sums[2]) + (sums[1] + sums[3])) / latents.len() as f64
}

/// The scale of the ternary group nearest to `latents`. With the `k` largest magnitudes kept,
/// their sum `S` and the scale `S / k`, the squared error is `sum w^2 - S^2 / k`; so the best
/// `k` is that of the largest `S^2 / k`.
fn least_squares(latents: &[f32]) -> f64 {
    let (mut short, mut long) = ([0u32; 256], Vec::new());
    let magnitudes = match short.get_mut(..latents.len()) {
        Some(short) => short,
        None => {
            long.resize(latents.len(), 0);
            &mut long[..]
        }
    };
    for (magnitude, w) in magnitudes.iter_mut().zip(latents) {
        // The bits of values without a sign have the order of the values.
        *magnitude = w.abs().to_bits();
    }
    magnitudes.sort_unstable();
    let (mut sum, mut best) = (0.0, (0.0, 0.0));
    for (i, &magnitude) in magnitudes.iter().rev().enumerate() {
        let k = (i + 1) as f64;
        sum += f64::from(f32::from_bits(magnitude));
        let less = sum * sum / k;
        if less > best.0 {
            best = (less, sum / k);
        }
    }
    // A NaN is greater than nothing, and would leave the best of nothing.
    if sum.is_finite() { best.1 } else { sum }
}

/// Rounds a finite value to `fraction` bits behind the leading one (bf16 has 7, f16 10),
/// once, to nearest even. (`half` drops the low half of the f64 before it rounds, which
/// breaks ties the wrong way.) In f16's subnormal range its own spacing is the coarser one.
/// Exact for the range of scales; values below f32's normal range are far below
/// [`MIN_SCALE`].
fn round_to_bits(x: f64, fraction: u32) -> f32 {
    const SUBNORMAL: f64 = 1.0 / 16_384.0;
    if fraction > 7 && x < SUBNORMAL {
        // The spacing of f16 there is 2^-24.
        return ((x * 16_777_216.0).round_ties_even() / 16_777_216.0) as f32;
    }
    let dropped = 52 - fraction;
    let bits = x.to_bits();
    let half_even = (1 << (dropped - 1)) - 1 + (bits >> dropped & 1);
    f64::from_bits((bits + half_even) >> dropped << dropped) as f32
}

fn max_abs(latents: &[f32]) -> f32 {
    // f32::max drops NaN, so a NaN is carried by hand.
    latents.iter().fold(0.0, |max, &w| {
        if w.is_nan() || w.abs() > max {
            w.abs()
        } else {
            max
        }
    })
}

fn mean_abs_above(latents: &[f32], threshold: f32) -> f64 {
    if !threshold.is_finite() {
        return f64::NAN;
    }
    let kept = latents.iter().filter(|w| w.abs() > threshold);
    let (sum, count) = kept.fold((0.0f64, 0usize), |(sum, count), w| {
        (sum + f64::from(w.abs()), count + 1)
    });
    sum / count.max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::bf16;

    /// Deterministic values in (-1, 1) with a heavy centre.
    fn latents(n: usize, seed: u64) -> Vec<f32> {
        let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1 << 24) as f32
        };
        (0..n).map(|_| (next() - 0.5) * next()).collect()
    }

    #[test]
    fn trits_equal_round_half_even_of_the_ratio() {
        for n in [1, 2, 3, 64, 127, 128, 200] {
            let w = latents(n, n as u64);
            let mut t = vec![0i8; n];
            let s = project_group(&w, ScaleRule::Mean, &mut t).unwrap();
            for (w, t) in w.iter().zip(&t) {
                let ratio = (w / s).round_ties_even().clamp(-1.0, 1.0);
                assert_eq!(f32::from(*t), ratio);
            }
        }
    }

    #[test]
    fn scale_is_exact_in_f16_and_bf16() {
        for seed in 0..if cfg!(miri) { 20 } else { 200 } {
            let mut w = latents(128, seed);
            let shrink = 2.0f32.powi(-(seed as i32 % 20));
            w.iter_mut().for_each(|w| *w *= shrink);
            let s = project_group(&w, ScaleRule::Mean, &mut [0; 128]).unwrap();
            assert_eq!(half::f16::from_f32(s).to_f32(), s);
            assert_eq!(bf16::from_f32(s).to_f32(), s);
        }
    }

    /// Every set of kept weights is tried, not only those of the largest magnitudes.
    #[test]
    fn no_scale_and_no_trits_lie_nearer_than_those_of_least_squares() {
        for n in 1..=if cfg!(miri) { 6 } else { 11 } {
            let w = latents(n, 50 + n as u64);
            let error = |kept: u32| {
                let kept = |i: usize| kept >> i & 1 == 1;
                let values = |keep: bool| (0..n).filter(move |&i| kept(i) == keep);
                let of = |i: usize| f64::from(w[i].abs());
                let mean = values(true).map(of).sum::<f64>() / values(true).count().max(1) as f64;
                let near = values(true).map(|i| (of(i) - mean).powi(2)).sum::<f64>();
                (
                    near + values(false).map(|i| of(i).powi(2)).sum::<f64>(),
                    mean,
                )
            };
            let all = (0..1 << n).map(error);
            let (_, best) = all.min_by(|a, b| a.0.total_cmp(&b.0)).unwrap();
            let mut t = vec![0i8; n];
            let s = project_group(&w, ScaleRule::LeastSquares, &mut t).unwrap();
            assert_eq!(s, bf16::from_f64(best).to_f32(), "n {n}");
            for (&w, &t) in w.iter().zip(&t) {
                assert_eq!(
                    t,
                    if w.abs() > s / 2.0 {
                        w.signum() as i8
                    } else {
                        0
                    }
                );
            }
        }
        let long: Vec<f32> = (0..700).map(|i| (i % 7) as f32).collect();
        let s = project_group(&long, ScaleRule::LeastSquares, &mut [0; 700]).unwrap();
        // 6, 5, 4 and 3 are kept: 18^2 / 4 is more than 20^2 / 5 and 15^2 / 3.
        assert_eq!(s, 4.5);
        let bad = project_group(&[1.0, f32::NAN], ScaleRule::LeastSquares, &mut [0; 2]);
        assert_eq!(bad, Err(ScaleError::NotFinite));
    }

    #[test]
    fn going_on_from_a_ternary_group_gives_the_same_group() {
        for rule in [ScaleRule::ALL.as_slice(), &[ScaleRule::MeanF16]].concat() {
            for n in (1..=130).step_by(if cfg!(miri) { 13 } else { 1 }) {
                let (mut t, mut again) = (vec![0i8; n], vec![9i8; n]);
                let s = project_group(&latents(n, 7 + n as u64), rule, &mut t).unwrap();
                let mut w = vec![0.0; n];
                reconstruct_latents(&t, s, rule, &mut w);
                let s_again = project_group(&w, rule, &mut again).unwrap();
                assert_eq!((s, &t), (s_again, &again), "rule {rule:?}, n {n}");
            }
        }
    }

    #[test]
    fn rounding_is_to_nearest_even_over_all_bits() {
        let tie = 1.0 + 1.0 / 256.0;
        assert_eq!(round_to_bits(tie, 7), 1.0);
        assert_eq!(round_to_bits(tie + f64::EPSILON, 7), 1.0 + 1.0 / 128.0);
        assert_eq!(round_to_bits(1.0 + 3.0 / 256.0, 7), 1.0 + 2.0 / 128.0);
    }

    #[test]
    fn finer_scales_are_those_of_f16() {
        for seed in 0..if cfg!(miri) { 16 } else { 400 } {
            let mut w = latents(128, seed);
            let shrink = 2.0f32.powi(-(seed as i32 % 16));
            w.iter_mut().for_each(|w| *w *= shrink);
            let (mut coarse_trits, mut trits) = ([0; 128], [0; 128]);
            let s = project_group(&w, ScaleRule::MeanF16, &mut trits).unwrap();
            let coarse = project_group(&w, ScaleRule::Mean, &mut coarse_trits).unwrap();
            assert_eq!(half::f16::from_f32(s).to_f32(), s, "exact in f16");
            let exact = mean_abs(&w);
            if s == 0.0 {
                assert!(exact < f64::from(MIN_SCALE));
                continue;
            }
            let error = |s: f32| (f64::from(s) - exact).abs();
            assert!(error(s) <= error(coarse), "{s} and {coarse} for {exact}");
            let nearest = half::f16::from_f64(exact).to_f32();
            assert!((f64::from(nearest) - exact).abs() >= error(s) - 1e-15);
        }
    }

    #[test]
    fn tiny_and_huge_scales() {
        let mut t = [1i8; 4];
        assert_eq!(project_group(&[1e-6; 4], ScaleRule::Mean, &mut t), Ok(0.0));
        assert_eq!(t, [0; 4]);
        assert_eq!(
            project_group(&[1e6; 4], ScaleRule::Mean, &mut t),
            Err(ScaleError::TooLarge(bf16::from_f32(1e6).to_f32()))
        );
        for rule in ScaleRule::ALL {
            let bad = [1.0, f32::NAN, 1.0, 1.0];
            assert_eq!(
                project_group(&bad, rule, &mut t),
                Err(ScaleError::NotFinite)
            );
        }
    }

    #[test]
    fn projecting_twice_is_not_the_identity() {
        // The reason why exports store (t, s) as they are.
        let w = latents(128, 3);
        let mut t = [0i8; 128];
        let s = project_group(&w, ScaleRule::Mean, &mut t).unwrap();
        let projected: Vec<f32> = t.iter().map(|&t| f32::from(t) * s).collect();
        let again = project_group(&projected, ScaleRule::Mean, &mut t).unwrap();
        assert!(again < 0.8 * s);
    }
}
