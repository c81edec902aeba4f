//! The guard: looks at loss and gradient norm before the optimizer touches anything.
//!
//! A step is refused if one of the two is not finite, or if one of them lies more than
//! `spike_sigma` standard deviations above the mean of the last [`WINDOW`] accepted
//! values. A gradient that clipping would leave as it is is no spike however far out it lies:
//! late in a run norms hardly vary, and an odd document would be one. Only accepted values
//! enter the windows: a value that is not finite would
//! poison every mean behind it, and a spike would hide the next one. The windows are in
//! the checkpoint, so a resumed run judges as a run without a stop.

use serde::{Deserialize, Serialize};
use std::collections::VecDeque;

/// Accepted values that a new one is compared with.
pub const WINDOW: usize = 128;

/// Fewer values say too little about their spread.
pub const MIN_VALUES: usize = 64;

/// Why a step changed nothing.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Skip {
    /// The loss is NaN or infinite.
    Loss,
    /// The gradient norm is NaN or infinite.
    GradientNorm,
    /// The loss lies above this limit.
    LossSpike(f64),
    /// The gradient norm lies above this limit.
    GradientSpike(f64),
}

impl Skip {
    /// Text for the metrics.
    pub fn reason(self) -> &'static str {
        match self {
            Self::Loss => "the loss is not finite",
            Self::GradientNorm => "the gradient norm is not finite",
            Self::LossSpike(_) => "the loss is a spike",
            Self::GradientSpike(_) => "the gradient norm is a spike",
        }
    }

    /// What a spike lies above.
    pub fn limit(self) -> Option<f64> {
        match self {
            Self::LossSpike(limit) | Self::GradientSpike(limit) => Some(limit),
            Self::Loss | Self::GradientNorm => None,
        }
    }
}

/// What counts as a spike.
#[derive(Clone, Copy, Debug)]
pub struct SpikeRule {
    /// Allowed distance from the mean in standard deviations; 0 for any.
    pub sigma: f64,
    /// The norm to which gradients are clipped; none up to it is a spike.
    pub grad_clip: f64,
}

/// What the guard remembers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Guard {
    losses: VecDeque<f64>,
    norms: VecDeque<f64>,
}

impl Default for Guard {
    fn default() -> Self {
        // Of full size from the beginning: a step allocates nothing.
        Self {
            losses: VecDeque::with_capacity(WINDOW + 1),
            norms: VecDeque::with_capacity(WINDOW + 1),
        }
    }
}

impl Guard {
    /// Judges a step of `loss` nats and a gradient of 2-norm `norm`, and remembers what it
    /// accepts.
    pub fn inspect(&mut self, loss: f64, norm: f64, rule: SpikeRule) -> Result<(), Skip> {
        if !loss.is_finite() {
            return Err(Skip::Loss);
        }
        if !norm.is_finite() {
            return Err(Skip::GradientNorm);
        }
        if let Some(limit) = limit(&self.losses, rule.sigma).filter(|&limit| loss > limit) {
            return Err(Skip::LossSpike(limit));
        }
        let limit = limit(&self.norms, rule.sigma).map(|limit| limit.max(rule.grad_clip));
        if let Some(limit) = limit.filter(|&limit| norm > limit) {
            return Err(Skip::GradientSpike(limit));
        }
        remember(&mut self.losses, loss);
        remember(&mut self.norms, norm);
        Ok(())
    }

    /// Takes the windows of a checkpoint over.
    pub(crate) fn restore(&mut self, saved: &Self) {
        self.losses.clone_from(&saved.losses);
        self.norms.clone_from(&saved.norms);
        for window in [&mut self.losses, &mut self.norms] {
            window.reserve(WINDOW + 1 - window.len().min(WINDOW));
        }
    }
}

fn remember(window: &mut VecDeque<f64>, value: f64) {
    if window.len() >= WINDOW {
        window.pop_front();
    }
    window.push_back(value);
}

/// The largest value that is no spike; none while too few values are known, and where
/// they are all the same.
fn limit(window: &VecDeque<f64>, sigma: f64) -> Option<f64> {
    if sigma <= 0.0 || window.len() < MIN_VALUES {
        return None;
    }
    let count = window.len() as f64;
    let mean = window.iter().sum::<f64>() / count;
    let squares = window.iter().map(|x| (x - mean) * (x - mean));
    let deviation = (squares.sum::<f64>() / (count - 1.0)).sqrt();
    (deviation > 0.0).then_some(mean + sigma * deviation)
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULE: SpikeRule = SpikeRule {
        sigma: 6.0,
        grad_clip: 1.0,
    };

    /// Losses around 3, norms around 1.
    fn usual(step: u64) -> (f64, f64) {
        let wave = (step as f64 * 0.7).sin();
        (3.0 + 0.1 * wave, 1.0 - 0.2 * wave)
    }

    fn trained(steps: u64) -> Guard {
        let mut guard = Guard::default();
        for (loss, norm) in (0..steps).map(usual) {
            assert_eq!(guard.inspect(loss, norm, RULE), Ok(()));
        }
        guard
    }

    #[test]
    fn spikes_are_refused_and_forgotten() {
        let mut guard = trained(200);
        let before = guard.clone();
        let loss = guard.inspect(4.0, 1.0, RULE);
        assert!(matches!(loss, Err(Skip::LossSpike(limit)) if (3.3..3.7).contains(&limit)));
        let norm = guard.inspect(3.0, 9.0, RULE);
        assert!(matches!(norm, Err(Skip::GradientSpike(limit)) if (1.7..2.1).contains(&limit)));
        assert_eq!(guard, before);
        assert_eq!(guard.inspect(3.2, 1.3, RULE), Ok(()));
        assert_ne!(guard, before);
        // Falling is no spike.
        assert_eq!(guard.inspect(0.1, 0.0, RULE), Ok(()));
    }

    #[test]
    fn what_clipping_leaves_alone_is_no_spike() {
        let rule = |grad_clip| SpikeRule { grad_clip, ..RULE };
        assert_eq!(trained(200).inspect(3.0, 4.0, rule(5.0)), Ok(()));
        let beyond = trained(200).inspect(3.0, 5.1, rule(5.0));
        assert_eq!(beyond, Err(Skip::GradientSpike(5.0)));
        // Without clipping the spread of the norms decides alone.
        assert!(trained(200).inspect(3.0, 4.0, rule(0.0)).is_err());
    }

    /// llm.c computes its deviations with the bad value inside, and applies the step.
    #[test]
    fn a_value_that_is_not_finite_poisons_nothing() {
        let mut guard = trained(100);
        let before = guard.clone();
        for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            assert_eq!(guard.inspect(bad, 1.0, RULE), Err(Skip::Loss));
            assert_eq!(guard.inspect(3.0, bad, RULE), Err(Skip::GradientNorm));
        }
        assert_eq!(guard, before);
        // OLMo-core's window holds the NaN, and skips the 128 steps behind it.
        for (loss, norm) in (100..300).map(usual) {
            assert_eq!(guard.inspect(loss, norm, RULE), Ok(()));
        }
        assert!(guard.inspect(9.0, 1.0, RULE).is_err());
    }

    #[test]
    fn the_window_forgets_the_oldest() {
        let mut guard = trained(300);
        assert_eq!((guard.losses.len(), guard.norms.len()), (WINDOW, WINDOW));
        assert_eq!(guard.losses[0], usual(300 - WINDOW as u64).0);
        let capacity = guard.losses.capacity();
        assert_eq!(guard.inspect(3.0, 1.0, RULE), Ok(()));
        assert_eq!(guard.losses.capacity(), capacity);
    }

    #[test]
    fn there_is_no_judgement_without_knowledge() {
        let mut guard = trained(MIN_VALUES as u64 - 1);
        assert_eq!(guard.inspect(100.0, 100.0, RULE), Ok(()));
        let mut flat = Guard::default();
        for _ in 0..WINDOW {
            assert_eq!(flat.inspect(1.0, 1.0, RULE), Ok(()));
        }
        assert_eq!(flat.inspect(1.1, 1.1, RULE), Ok(()));
        let mut off = trained(200);
        let none = SpikeRule { sigma: 0.0, ..RULE };
        assert_eq!(off.inspect(1e9, 1e9, none), Ok(()));
        assert_eq!(off.inspect(f64::NAN, 1.0, none), Err(Skip::Loss));
    }

    #[test]
    fn a_saved_guard_judges_with_the_same_bits() {
        let guard = trained(150);
        let json = serde_json::to_string(&guard).unwrap();
        let read: Guard = serde_json::from_str(&json).unwrap();
        let mut restored = Guard::default();
        restored.restore(&read);
        assert_eq!(restored, guard);
        assert!(restored.losses.capacity() > WINDOW);
    }
}
