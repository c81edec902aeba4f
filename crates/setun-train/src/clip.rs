//! The clipped straight-through estimator: an experiment.
//!
//! `t = clip(round(w / s), -1, 1)`. The identity lets the gradient of `s t` through to every
//! `w`. The derivative of the clip is zero where the rounded value lies outside -1 to 1, which
//! is where `|w| > 1.5 s`: such weights are left to weight decay.

use setun_backend::Backend;
use setun_model::{Parameter, Parameters};
use setun_ternary::groups_per_row;

/// Largest `|w| / s` whose gradient passes.
const EDGE: f32 = 1.5;

/// Copies of one parameter at a time.
pub struct Clip {
    latents: Vec<f32>,
    gradients: Vec<f32>,
    scales: Vec<f32>,
}

impl Clip {
    /// Scratch for the largest matrix.
    pub fn new(parameters: &Parameters<f32>) -> Self {
        let len = parameters.list.iter().map(Parameter::numel).max();
        let values = vec![0.0; len.unwrap_or(0)];
        Self {
            latents: values.clone(),
            scales: values.clone(),
            gradients: values,
        }
    }

    /// Zeroes the gradients of the weights that the last projection clipped.
    pub fn apply<B: Backend<Real = f32>>(&mut self, b: &mut B, parameters: &Parameters<f32>) {
        for p in &parameters.list {
            let (Some(ternary), Some(grad)) = (p.ternary, p.grad) else {
                continue;
            };
            let n = p.numel();
            let latents = &mut self.latents[..n];
            let gradients = &mut self.gradients[..n];
            let scales = &mut self.scales[..ternary.scales.len()];
            b.read(p.values(), latents);
            b.read(grad, gradients);
            b.read(ternary.scales, scales);
            let groups = groups_per_row(p.cols, ternary.group_size);
            let rows = latents.chunks(p.cols).zip(gradients.chunks_mut(p.cols));
            for ((latents, gradients), scales) in rows.zip(scales.chunks(groups)) {
                clip_row(latents, scales, ternary.group_size, gradients);
            }
            b.write(grad, gradients);
        }
    }
}

/// A group whose scale is zero has nothing to clip at: its gradient passes.
fn clip_row(latents: &[f32], scales: &[f32], group_size: usize, gradients: &mut [f32]) {
    let groups = latents
        .chunks(group_size)
        .zip(gradients.chunks_mut(group_size));
    for ((latents, gradients), &scale) in groups.zip(scales) {
        for (gradient, w) in gradients.iter_mut().zip(latents) {
            if scale > 0.0 && w.abs() > EDGE * scale {
                *gradient = 0.0;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_clipped_weights_lose_their_gradient() {
        // Groups of three and a last one of two, with scales 1, 0 and 2.
        let latents = [1.5, -1.51, 0.2, 9.0, -9.0, 0.0, -3.0, 3.1];
        let mut gradients = [1.0; 8];
        clip_row(&latents, &[1.0, 0.0, 2.0], 3, &mut gradients);
        assert_eq!(gradients, [1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0]);
    }
}
