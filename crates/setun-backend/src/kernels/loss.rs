//! Softmax cross entropy of one row of logits.

use crate::ops::IGNORE_TARGET;
use crate::real::{Real, sum_indexed, sum_slices};

/// What the gradient of a row of logits is taken of.
#[derive(Clone, Copy, Debug)]
pub struct RowGradient<R> {
    /// Weight of the row in the loss.
    pub scale: R,
    /// Weight of the squared log-sum-exp beside the negative log-likelihood.
    pub z_loss: R,
}

/// As [`cross_entropy_row`] of logits `c * tanh(x / c)`, `c` being `softcap`.
#[inline(always)]
pub fn capped_cross_entropy_row<R: Real>(
    logits: &mut [R],
    target: usize,
    gradient: Option<RowGradient<R>>,
    softcap: R,
) -> R {
    if target == IGNORE_TARGET as usize {
        ignore_row(logits, gradient.map(|g| g.scale));
        return R::ZERO;
    }
    let two = R::ONE + R::ONE;
    let tanh = |x: R| R::ONE - two / ((two * x).exp() + R::ONE);
    let capped = |x: R| softcap * tanh(x / softcap);
    // The cap keeps the order.
    let max = capped(R::largest(logits));
    let sum = sum_slices([&*logits], |[x]| (capped(x) - max).exp());
    let loss = max + sum.ln() - capped(logits[target]);
    let Some(RowGradient { scale, z_loss }) = gradient else {
        return loss;
    };
    let weight = scale + scale * (z_loss + z_loss) * (max + sum.ln());
    let factor = weight / sum;
    for (i, x) in logits.iter_mut().enumerate() {
        let t = tanh(*x / softcap);
        let of_target = if i == target { scale } else { R::ZERO };
        let slope = R::ONE - t * t;
        *x = ((softcap * t - max).exp() * factor - of_target) * slope;
    }
    loss
}

/// Returns the negative log-likelihood of `target`; with `gradient` the logits become the
/// gradient of `(NLL + z_loss * L^2) * scale`, `L` being the log of the sum of the
/// exponentials: `(softmax * (1 + 2 z_loss L) - onehot) * scale`. A target
/// [`IGNORE_TARGET`] gives 0, and zeros.
#[inline(always)]
pub fn cross_entropy_row<R: Real>(
    logits: &mut [R],
    target: usize,
    gradient: Option<RowGradient<R>>,
) -> R {
    if target == IGNORE_TARGET as usize {
        ignore_row(logits, gradient.map(|g| g.scale));
        return R::ZERO;
    }
    let max = R::largest(logits);
    let of_target = logits[target];
    let Some(RowGradient { scale, z_loss }) = gradient else {
        let sum = sum_slices([&*logits], |[x]| (x - max).exp_small());
        return max + sum.ln() - of_target;
    };
    for x in logits.iter_mut() {
        *x = (*x - max).exp_small();
    }
    let sum = sum_slices([&*logits], |[x]| x);
    // Through the sum and not through its logarithm, which is rounded where max is large.
    let mut weight = scale;
    if z_loss > R::ZERO {
        let lse = max + sum.ln();
        weight += scale * (z_loss + z_loss) * lse;
    }
    let factor = weight / sum;
    for x in logits.iter_mut() {
        *x = *x * factor;
    }
    logits[target] = logits[target] - scale;
    max + sum.ln() - of_target
}

/// How a row of logits learns from a teacher's.
#[derive(Clone, Copy, Debug)]
pub struct Mix<R> {
    /// Share of the divergence in the loss.
    pub weight: R,
    /// Temperature of both distributions in the divergence.
    pub temperature: R,
}

/// Returns the negative log-likelihood of `target` and `KL(teacher || student)` at the
/// temperature. With `gradient_scale` the logits become the gradient of
/// `(1 - weight) * NLL + weight * T^2 * KL`, times that scale; the teacher's become scratch.
/// A target [`IGNORE_TARGET`] gives 0 for both, and zeros.
#[inline(always)]
pub fn distill_row<R: Real>(
    logits: &mut [R],
    teacher: &mut [R],
    target: usize,
    mix: Mix<R>,
    gradient_scale: Option<R>,
) -> (R, R) {
    if target == IGNORE_TARGET as usize {
        ignore_row(logits, gradient_scale);
        return (R::ZERO, R::ZERO);
    }
    let n = logits.len();
    let inverse = R::ONE / mix.temperature;
    let (max, teacher_max) = (R::largest(logits), R::largest(teacher));
    let soft = |x: R, max: R| ((x - max) * inverse).exp();
    let sum = sum_indexed(n, |i| (logits[i] - max).exp());
    let soft_sum = sum_indexed(n, |i| soft(logits[i], max));
    let teacher_sum = sum_indexed(n, |i| soft(teacher[i], teacher_max));
    let cross = sum_indexed(n, |i| {
        soft(teacher[i], teacher_max) * (teacher[i] - logits[i])
    });
    let divergence = cross / teacher_sum * inverse - (teacher_max * inverse + teacher_sum.ln())
        + (max * inverse + soft_sum.ln());
    let loss = max + sum.ln() - logits[target];
    if let Some(scale) = gradient_scale {
        let hard = scale * (R::ONE - mix.weight);
        let soft_scale = scale * mix.weight * mix.temperature;
        let (a, b) = (hard / sum, soft_scale / soft_sum);
        let c = soft_scale / teacher_sum;
        for (x, t) in logits.iter_mut().zip(teacher.iter_mut()) {
            let of_teacher = soft(*t, teacher_max);
            let of_student = soft(*x, max);
            *x = (*x - max).exp() * a + of_student * b - of_teacher * c;
        }
        logits[target] = logits[target] - hard;
    }
    (loss, divergence)
}

/// The gradient of a row that does not count.
#[inline(always)]
fn ignore_row<R: Real>(logits: &mut [R], gradient_scale: Option<R>) {
    if gradient_scale.is_some() {
        logits.fill(R::ZERO);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_gradient_of_the_z_loss_is_that_of_differences() {
        let row = [1.3f64, -0.4, 2.9, 0.05];
        for z_loss in [0.0, 1e-2, 0.7] {
            let total = |logits: &[f64; 4]| {
                let sum: f64 = logits.iter().map(|&x| libm::exp(x)).sum();
                let nll = cross_entropy_row(&mut logits.clone(), 2, None);
                0.25 * (nll + z_loss * libm::log(sum) * libm::log(sum))
            };
            let mut gradient = row;
            let wanted = RowGradient {
                scale: 0.25,
                z_loss,
            };
            cross_entropy_row(&mut gradient, 2, Some(wanted));
            for i in 0..4 {
                let at = |step: f64| {
                    let mut moved = row;
                    moved[i] += step;
                    total(&moved)
                };
                let slope = (at(1e-5) - at(-1e-5)) / 2e-5;
                let found = gradient[i];
                assert!(
                    (slope - found).abs() < 1e-8,
                    "{z_loss}: {slope} and {found}"
                );
            }
        }
    }

    #[test]
    fn a_cap_bounds_logits_and_its_gradient_is_that_of_differences() {
        let row = [13.0f64, -40.0, 2.9, 0.05];
        let wanted = Some(RowGradient {
            scale: 0.25,
            z_loss: 1e-2,
        });
        for cap in [5.0f64, 30.0] {
            let capped = |x: f64| cap * libm::tanh(x / cap);
            let expected = |row: &[f64; 4]| {
                let sum: f64 = row.iter().map(|&x| libm::exp(capped(x))).sum();
                libm::log(sum) - capped(row[2])
            };
            let nll = |row: &[f64; 4]| capped_cross_entropy_row(&mut row.clone(), 2, None, cap);
            assert!((nll(&row) - expected(&row)).abs() < 1e-9);
            let total = |row: &[f64; 4]| {
                let lse = expected(row) + capped(row[2]);
                0.25 * (expected(row) + 1e-2 * lse * lse)
            };
            let mut gradient = row;
            let loss = capped_cross_entropy_row(&mut gradient, 2, wanted, cap);
            assert!((loss - expected(&row)).abs() < 1e-9);
            for i in 0..4 {
                let at = |step: f64| {
                    let mut moved = row;
                    moved[i] += step;
                    total(&moved)
                };
                let slope = (at(1e-5) - at(-1e-5)) / 2e-5;
                assert!((slope - gradient[i]).abs() < 1e-8, "{cap}, {i}: {slope}");
            }
        }
        // Values whose exponential overflows are at the bound, not NaN.
        let mut huge = [3e38f32, -3e38, 0.0];
        assert!(capped_cross_entropy_row(&mut huge, 1, None, 30.0) >= 60.0);
        let ignored = IGNORE_TARGET as usize;
        assert_eq!(
            capped_cross_entropy_row(&mut huge, ignored, None, 30.0),
            0.0
        );
    }

    #[test]
    fn ignored_targets_cost_and_teach_nothing() {
        let ignored = IGNORE_TARGET as usize;
        let row = [1.0f32, f32::NAN, -3.0];
        let mut logits = row;
        assert_eq!(cross_entropy_row(&mut logits, ignored, None), 0.0);
        assert_eq!(logits[0], 1.0, "without a gradient the row stays");
        let gradient = RowGradient {
            scale: 0.5,
            z_loss: 0.1,
        };
        let gradient = Some(gradient);
        assert_eq!(cross_entropy_row(&mut logits, ignored, gradient), 0.0);
        assert_eq!(logits, [0.0; 3]);
        let mix = Mix {
            weight: 0.5,
            temperature: 2.0,
        };
        let (mut logits, mut teacher) = (row, [2.0; 3]);
        let losses = distill_row(&mut logits, &mut teacher, ignored, mix, Some(0.5));
        assert_eq!((losses, logits), ((0.0, 0.0), [0.0; 3]));
    }
}
