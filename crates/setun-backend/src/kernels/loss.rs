//! Softmax cross entropy of one row of logits.

use crate::real::{Real, sum_indexed};

/// Returns the negative log-likelihood of `target`; with `gradient_scale` the logits
/// become `(softmax - onehot) * scale`.
#[inline(always)]
pub fn cross_entropy_row<R: Real>(logits: &mut [R], target: usize, gradient_scale: Option<R>) -> R {
    let max = row_max(logits);
    let sum = sum_indexed(logits.len(), |i| (logits[i] - max).exp());
    let lse = max + sum.ln();
    let loss = lse - logits[target];
    if let Some(scale) = gradient_scale {
        for x in logits.iter_mut() {
            *x = (*x - lse).exp() * scale;
        }
        logits[target] = logits[target] - scale;
    }
    loss
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
