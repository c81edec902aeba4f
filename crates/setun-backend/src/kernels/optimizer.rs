//! Gradient norm and AdamW.

use crate::ops::AdamW;
use crate::real::{Real, sum_indexed};

/// Values whose squares are summed together; chunks are then added in ascending order,
/// so the norm does not depend on the number of threads.
pub const NORM_CHUNK: usize = 4096;

/// Sum of squares of a chunk, in f64.
#[inline(always)]
pub fn sum_squares<R: Real>(x: &[R]) -> f64 {
    sum_indexed(x.len(), |i| x[i].to_f64() * x[i].to_f64())
}

/// The scalars of an update, computed once.
#[derive(Clone, Copy)]
pub struct AdamWScalars<R> {
    grad_scale: R,
    keep: R,
    beta1: R,
    beta2: R,
    take1: R,
    take2: R,
    root_bias2: R,
    step_size: R,
    eps: R,
}

impl<R: Real> AdamWScalars<R> {
    /// Bias corrections and factors of update `op.step`.
    pub fn new(op: &AdamW<R>) -> Self {
        let steps = op.step as f64;
        let bias1 = 1.0 - libm::pow(op.beta1, steps);
        let bias2 = 1.0 - libm::pow(op.beta2, steps);
        Self {
            grad_scale: R::from_f64(op.grad_scale),
            keep: R::from_f64(1.0 - op.lr * op.weight_decay),
            beta1: R::from_f64(op.beta1),
            beta2: R::from_f64(op.beta2),
            take1: R::from_f64(1.0 - op.beta1),
            take2: R::from_f64(1.0 - op.beta2),
            root_bias2: R::from_f64(bias2.sqrt()),
            step_size: R::from_f64(op.lr / bias1),
            eps: R::from_f64(op.eps),
        }
    }
}

/// `w *= 1 - lr wd; m = b1 m + (1 - b1) g; v = b2 v + (1 - b2) g^2;
/// w -= lr / bias1 * m / (sqrt(v) / sqrt(bias2) + eps)`.
#[inline(always)]
pub fn adamw<R: Real>(s: AdamWScalars<R>, w: &mut [R], g: &[R], m: &mut [R], v: &mut [R]) {
    for (((w, &g), m), v) in w.iter_mut().zip(g).zip(m).zip(v) {
        let g = g * s.grad_scale;
        *m = s.beta1 * *m + s.take1 * g;
        *v = s.beta2 * *v + s.take2 * (g * g);
        let denominator = v.sqrt() / s.root_bias2 + s.eps;
        *w = *w * s.keep - s.step_size * (*m / denominator);
    }
}
