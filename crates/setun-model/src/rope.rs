//! Rotary tables: default and YaRN, as Hugging Face computes them.

use setun_formats::RopeConfig;

/// Cosines and sines `[positions, head_dim / 2]`, row-major, in f32.
pub struct RopeTable {
    /// Cosines, times YaRN's attention factor.
    pub cos: Vec<f32>,
    /// Sines, times YaRN's attention factor.
    pub sin: Vec<f32>,
}

impl RopeTable {
    /// The table of positions `0..positions`. The angle is the f32 product of position
    /// and frequency, as in Hugging Face; `libm` gives every platform the same bits.
    pub fn new(rope: &RopeConfig, head_dim: usize, positions: usize) -> Self {
        let (frequencies, factor) = inverse_frequencies(rope, head_dim);
        let mut table = Self {
            cos: Vec::new(),
            sin: Vec::new(),
        };
        for position in 0..positions {
            for &frequency in &frequencies {
                let angle = f64::from(position as f32 * frequency);
                table.cos.push((libm::cos(angle) * factor) as f32);
                table.sin.push((libm::sin(angle) * factor) as f32);
            }
        }
        table
    }
}

/// Inverse frequencies `[head_dim / 2]` and the factor on cosine and sine.
///
/// Default: `theta^(-2i / head_dim)`. YaRN (Peng et al., 2023): the fast dimensions keep
/// their frequency, the slow ones are divided by `factor`, a linear ramp in between.
pub fn inverse_frequencies(rope: &RopeConfig, head_dim: usize) -> (Vec<f32>, f64) {
    let exponent = |i: usize| (2 * i) as f64 / head_dim as f64;
    let plain: Vec<f64> = (0..head_dim / 2)
        .map(|i| 1.0 / libm::pow(rope.rope_theta, exponent(i)))
        .collect();
    let Some(yarn) = &rope.yarn else {
        return (plain.iter().map(|&f| f as f32).collect(), 1.0);
    };
    // Dimension that turns `rotations` times over the original context.
    let dimension = |rotations: f64| {
        let context = yarn.original_max_position_embeddings as f64;
        let turns = context / (rotations * 2.0 * std::f64::consts::PI);
        head_dim as f64 * libm::log(turns) / (2.0 * libm::log(rope.rope_theta))
    };
    let (mut low, mut high) = (dimension(yarn.beta_fast), dimension(yarn.beta_slow));
    if yarn.truncate {
        (low, high) = (low.floor(), high.ceil());
    }
    (low, high) = (low.max(0.0), high.min(head_dim as f64 - 1.0));
    if low == high {
        high += 0.001;
    }
    let stretched = plain.iter().enumerate().map(|(i, &f)| {
        let slow = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
        (f / yarn.factor * slow + f * (1.0 - slow)) as f32
    });
    let default_factor = if yarn.factor <= 1.0 {
        1.0
    } else {
        0.1 * libm::log(yarn.factor) + 1.0
    };
    (
        stretched.collect(),
        yarn.attention_factor.unwrap_or(default_factor),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use setun_formats::YarnConfig;

    #[test]
    fn default_frequencies() {
        let rope = RopeConfig {
            rope_theta: 10_000.0,
            yarn: None,
        };
        let (f, factor) = inverse_frequencies(&rope, 4);
        assert_eq!((f, factor), (vec![1.0, 0.01], 1.0));
    }

    #[test]
    fn yarn_keeps_fast_and_divides_slow_dimensions() {
        let yarn = YarnConfig {
            factor: 4.0,
            original_max_position_embeddings: 64,
            beta_fast: 32.0,
            beta_slow: 1.0,
            attention_factor: None,
            truncate: true,
        };
        let plain = RopeConfig {
            rope_theta: 1e6,
            yarn: None,
        };
        let rope = RopeConfig {
            yarn: Some(yarn),
            ..plain.clone()
        };
        let (stretched, factor) = inverse_frequencies(&rope, 32);
        let (plain, _) = inverse_frequencies(&plain, 32);
        assert_eq!(stretched[0], plain[0]);
        assert!((stretched[15] * 4.0 / plain[15] - 1.0).abs() < 1e-6);
        assert!((factor - 1.138_629_4).abs() < 1e-6);
    }
}
