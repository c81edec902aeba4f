//! Softmax cross entropy of one row of logits.

use crate::real::{Real, sum_indexed};

/// Returns the negative log-likelihood of `target`; with `gradient_scale` the logits
/// become `(softmax - onehot) * scale`.
#[inline(always)]
pub fn cross_entropy_row<R: Real>(logits: &mut [R], target: usize, gradient_scale: Option<R>) -> R {
    let max = row_max(logits);
    let of_target = logits[target];
    let Some(scale) = gradient_scale else {
        let sum = sum_indexed(logits.len(), |i| (logits[i] - max).exp());
        return max + sum.ln() - of_target;
    };
    for x in logits.iter_mut() {
        *x = (*x - max).exp();
    }
    let sum = sum_indexed(logits.len(), |i| logits[i]);
    // Through the sum and not through its logarithm, which is rounded where max is large.
    let factor = scale / sum;
    for x in logits.iter_mut() {
        *x = *x * factor;
    }
    logits[target] = logits[target] - scale;
    max + sum.ln() - of_target
}

/// Largest value of a row; NaN where there is one. 16 lanes, which changes nothing about
/// a maximum but lets compilers vectorise it.
#[inline(always)]
pub fn row_max<R: Real>(x: &[R]) -> R {
    let mut lanes = [R::NEG_INFINITY; 16];
    let mut chunks = x.chunks_exact(16);
    for chunk in &mut chunks {
        for (lane, &x) in lanes.iter_mut().zip(chunk) {
            *lane = lane.maximum(x);
        }
    }
    let rest = chunks.remainder().iter();
    rest.chain(&lanes)
        .fold(R::NEG_INFINITY, |max, &x| max.maximum(x))
}
