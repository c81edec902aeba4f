//! Learning rate and weight decay as pure functions of the step, counted from 0.
//!
//! With `N` steps, `W` warm-up steps, peak `P` and floor `F = min_lr_ratio * P`:
//!
//! - warm-up, `t < W`: `P * (t + 1) / W`, so the last warm-up step has the peak;
//! - then with `p = (t - W) / (N - W)`, which is 0 at the first step after warm-up and
//!   would be 1 at step `N`, so that no step is wasted at a floor of 0:
//!   - constant: `P`
//!   - linear: `P + (F - P) * p`
//!   - cosine: `F + (P - F) * (1 + cos(pi * p)) / 2`
//!   - wsd: `P` before `D = decay_start * N`, then `P + (F - P) * (t - D) / (N - D)`
//!   - two-stage: the line from `P` to `F` while `t < N / 2`, then the line from
//!     `second_peak_ratio * P` to the same `F` at the same `p`. This is the ternary
//!     schedule of BitNet b1.58 and TriLM: the drop brings a large fall of the loss.
//!
//! From step `N` on, `p` stays 1. Weight decay is constant, except that two-stage
//! removes it from step `2 N / 3` on (TriLM): it acts on latent weights, and late in
//! training makes trits flip that should settle.

use crate::settings::{ScheduleKind, TrainSettings};

/// Learning rate and weight decay of a run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    kind: ScheduleKind,
    num_steps: u64,
    warmup_steps: u64,
    peak: f64,
    second_peak: f64,
    floor: f64,
    decay_start: f64,
    weight_decay: f64,
}

impl Schedule {
    /// The schedule of a recipe's `[train]` section, which must have been checked.
    pub fn new(train: &TrainSettings) -> Self {
        Self {
            kind: train.schedule,
            num_steps: train.steps,
            warmup_steps: train.warmup_steps,
            peak: train.lr,
            second_peak: train.lr * train.second_peak_ratio,
            floor: train.lr * train.min_lr_ratio,
            decay_start: train.decay_start * train.steps as f64,
            weight_decay: train.weight_decay,
        }
    }

    /// Learning rate of `step`.
    pub fn lr(&self, step: u64) -> f64 {
        if step < self.warmup_steps {
            return self.peak * (step + 1) as f64 / self.warmup_steps as f64;
        }
        let progress = self.progress_since(self.warmup_steps as f64, step);
        match self.kind {
            ScheduleKind::Constant => self.peak,
            ScheduleKind::Linear => line(self.peak, self.floor, progress),
            ScheduleKind::Cosine => {
                let height = (1.0 + libm::cos(std::f64::consts::PI * progress)) / 2.0;
                line(self.floor, self.peak, height)
            }
            ScheduleKind::Wsd => {
                let decayed = self.progress_since(self.decay_start, step);
                line(self.peak, self.floor, decayed)
            }
            ScheduleKind::TwoStage if self.is_past(step, 1, 2) => {
                line(self.second_peak, self.floor, progress)
            }
            ScheduleKind::TwoStage => line(self.peak, self.floor, progress),
        }
    }

    /// Decoupled weight decay of `step`, to be multiplied by its learning rate.
    pub fn weight_decay(&self, step: u64) -> f64 {
        if self.kind == ScheduleKind::TwoStage && self.is_past(step, 2, 3) {
            0.0
        } else {
            self.weight_decay
        }
    }

    /// Share of the way from step `start` to the end, within 0 and 1.
    fn progress_since(&self, start: f64, step: u64) -> f64 {
        let length = self.num_steps as f64 - start;
        if length <= 0.0 {
            return 1.0;
        }
        ((step as f64 - start) / length).clamp(0.0, 1.0)
    }

    /// Whether `step >= num_steps * numerator / denominator`, in whole numbers.
    fn is_past(&self, step: u64, numerator: u64, denominator: u64) -> bool {
        u128::from(step) * u128::from(denominator)
            >= u128::from(self.num_steps) * u128::from(numerator)
    }
}

/// From `start` at 0 to `end` at 1, exact at both ends.
fn line(start: f64, end: f64, progress: f64) -> f64 {
    start * (1.0 - progress) + end * progress
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule(kind: ScheduleKind, steps: u64, warmup_steps: u64) -> Schedule {
        Schedule::new(&TrainSettings {
            schedule: kind,
            steps,
            warmup_steps,
            lr: 1.0,
            min_lr_ratio: 0.1,
            second_peak_ratio: 0.5,
            decay_start: 0.8,
            weight_decay: 0.1,
            ..TrainSettings::default()
        })
    }

    fn assert_close(actual: f64, expected: f64) {
        assert!(
            (actual - expected).abs() < 1e-12,
            "{actual} instead of {expected}"
        );
    }

    #[test]
    fn warm_up_rises_to_the_peak_in_every_schedule() {
        for kind in [
            ScheduleKind::TwoStage,
            ScheduleKind::Cosine,
            ScheduleKind::Linear,
            ScheduleKind::Constant,
            ScheduleKind::Wsd,
        ] {
            let schedule = schedule(kind, 110, 10);
            assert_close(schedule.lr(0), 0.1);
            assert_close(schedule.lr(4), 0.5);
            assert_close(schedule.lr(9), 1.0);
            assert_close(schedule.lr(10), 1.0);
            assert_close(self::schedule(kind, 100, 0).lr(0), 1.0);
        }
    }

    #[test]
    fn linear_and_cosine_reach_the_floor_after_the_last_step() {
        let linear = schedule(ScheduleKind::Linear, 110, 10);
        assert_close(linear.lr(60), 0.55);
        assert_close(linear.lr(109), 1.0 - 0.9 * 0.99);
        assert_close(linear.lr(110), 0.1);
        assert_close(linear.lr(1000), 0.1);

        let cosine = schedule(ScheduleKind::Cosine, 110, 10);
        assert_close(cosine.lr(60), 0.55);
        assert_close(cosine.lr(35), 0.55 + 0.45 * std::f64::consts::FRAC_1_SQRT_2);
        assert_close(cosine.lr(110), 0.1);
    }

    #[test]
    fn constant_stays_at_the_peak() {
        let constant = schedule(ScheduleKind::Constant, 110, 10);
        assert_close(constant.lr(60), 1.0);
        assert_close(constant.lr(109), 1.0);
    }

    #[test]
    fn wsd_decays_from_its_corner() {
        let wsd = schedule(ScheduleKind::Wsd, 100, 10);
        assert_close(wsd.lr(79), 1.0);
        assert_close(wsd.lr(80), 1.0);
        assert_close(wsd.lr(90), 0.55);
        assert_close(wsd.lr(100), 0.1);
    }

    #[test]
    fn two_stage_changes_lines_at_half() {
        let two_stage = schedule(ScheduleKind::TwoStage, 110, 10);
        assert_close(two_stage.lr(54), line(1.0, 0.1, 0.44));
        assert_close(two_stage.lr(55), line(0.5, 0.1, 0.45));
        assert_close(two_stage.lr(110), 0.1);
        // An odd number of steps: 2 is before half of 5, 3 after it.
        let odd = schedule(ScheduleKind::TwoStage, 5, 0);
        assert_close(odd.lr(2), line(1.0, 0.1, 0.4));
        assert_close(odd.lr(3), line(0.5, 0.1, 0.6));
    }

    #[test]
    fn only_two_stage_drops_weight_decay() {
        let two_stage = schedule(ScheduleKind::TwoStage, 100, 10);
        assert_eq!(two_stage.weight_decay(0), 0.1);
        assert_eq!(two_stage.weight_decay(66), 0.1);
        assert_eq!(two_stage.weight_decay(67), 0.0);
        assert_eq!(
            schedule(ScheduleKind::Cosine, 100, 10).weight_decay(99),
            0.1
        );
    }

    #[test]
    fn warm_up_may_fill_the_whole_run() {
        let schedule = schedule(ScheduleKind::Linear, 10, 10);
        assert_close(schedule.lr(9), 1.0);
        assert_close(schedule.lr(10), 0.1);
    }
}
