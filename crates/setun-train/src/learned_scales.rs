//! Learned scales: an experiment.
//!
//! The scale of a group is `s = bf16(f * mean |w|)` with a factor `f` of its own that begins
//! at 1. Its gradient is that of LSQ (Esser et al., 2020) with one positive and one negative
//! level: `ds = sum dL/d(s t) * (t - v)` over weights whose `v = w / s` lies between -1 and 1,
//! `* t` over the others, times `group_size^-0.5`; then `df = ds * mean |w|`.

use crate::TrainError;
use setun_backend::{Backend, ProjectStats};
use setun_io::SCALE_FACTOR;
use setun_model::{Parameter, Parameters, ProjectFailure};
use setun_ternary::{group_mean, groups_per_row, project_group_scaled};

/// Copies of one matrix at a time.
pub struct LearnedScales {
    latents: Vec<f32>,
    gradients: Vec<f32>,
    trits: Vec<i8>,
    before: Vec<i8>,
}

/// Names and numbers of the factors of all matrices.
pub fn factors(parameters: &Parameters<f32>) -> Vec<(String, usize)> {
    let each = parameters.list.iter();
    let each = each.filter_map(|p| Some((factor_name(p), p.ternary?.scales.len())));
    each.collect()
}

fn factor_name(p: &Parameter<f32>) -> String {
    format!("{}{SCALE_FACTOR}", p.name)
}

impl LearnedScales {
    /// Scratch for the largest matrix.
    pub fn new(parameters: &Parameters<f32>) -> Self {
        let len = parameters.list.iter().map(Parameter::numel).max();
        let len = len.unwrap_or(0);
        Self {
            latents: vec![0.0; len],
            gradients: vec![0.0; len],
            trits: vec![0; len],
            before: vec![0; len],
        }
    }

    /// Projects every matrix with its factors.
    ///
    /// # Errors
    /// A scale that cannot be shipped.
    pub fn project<B: Backend<Real = f32>>(
        &mut self,
        b: &mut B,
        parameters: &Parameters<f32>,
    ) -> Result<ProjectStats, TrainError> {
        let mut stats = ProjectStats::default();
        for p in &parameters.list {
            let Some(ternary) = p.ternary else { continue };
            let n = p.numel();
            let (latents, trits) = (&mut self.latents[..n], &mut self.trits[..n]);
            let before = &mut self.before[..n];
            b.read(p.values(), latents);
            b.read(ternary.trits, before);
            let factors = parameters.read_values(b, parameters.named(&factor_name(p))?);
            let groups = groups_per_row(p.cols, ternary.group_size);
            let mut scales = vec![0.0; factors.len()];
            let rows = latents.chunks(p.cols).zip(trits.chunks_mut(p.cols));
            for (row, (latents, trits)) in rows.enumerate() {
                let parts = latents.chunks(ternary.group_size);
                let parts = parts.zip(trits.chunks_mut(ternary.group_size));
                for (group, (latents, trits)) in parts.enumerate() {
                    let at = row * groups + group;
                    let scale = project_group_scaled(latents, factors[at], trits);
                    scales[at] = scale.map_err(|why| ProjectFailure {
                        name: p.name.clone(),
                        row,
                        group,
                        why,
                    })?;
                }
            }
            stats.zeros += trits.iter().filter(|&&t| t == 0).count() as u64;
            let moved = trits.iter().zip(before.iter()).filter(|(t, b)| t != b);
            stats.flips += moved.count() as u64;
            b.write(ternary.trits, trits);
            b.write(ternary.scales, &scales);
        }
        Ok(stats)
    }

    /// Writes the gradients of the factors, from those of the matrices.
    pub fn gradients<B: Backend<Real = f32>>(
        &mut self,
        b: &mut B,
        parameters: &Parameters<f32>,
    ) -> Result<(), TrainError> {
        for p in &parameters.list {
            let (Some(ternary), Some(grad)) = (p.ternary, p.grad) else {
                continue;
            };
            let n = p.numel();
            let (latents, gradients) = (&mut self.latents[..n], &mut self.gradients[..n]);
            b.read(p.values(), latents);
            b.read(grad, gradients);
            b.read(ternary.trits, &mut self.trits[..n]);
            let mut scales = vec![0.0; ternary.scales.len()];
            b.read(ternary.scales, &mut scales);
            let (size, cols) = (ternary.group_size, p.cols);
            let groups = groups_per_row(cols, size);
            let of_group = |at: usize| {
                let start = at / groups * cols + at % groups * size;
                let range = start..start + size.min(cols - at % groups * size);
                let (w, dw) = (&latents[range.clone()], &gradients[range.clone()]);
                factor_gradient(w, dw, &self.trits[range], scales[at])
            };
            let found: Vec<f32> = (0..scales.len()).map(of_group).collect();
            b.write(parameters.named(&factor_name(p))?.gradient(), &found);
        }
        Ok(())
    }
}

/// `df` of one group. A scale of zero has none.
fn factor_gradient(latents: &[f32], gradients: &[f32], trits: &[i8], scale: f32) -> f32 {
    if scale == 0.0 {
        return 0.0;
    }
    let mut sum = 0.0f64;
    for ((&w, &dw), &t) in latents.iter().zip(gradients).zip(trits) {
        let v = w / scale;
        let inside = if v.abs() < 1.0 { v } else { 0.0 };
        sum += f64::from(dw) * f64::from(f32::from(t) - inside);
    }
    let mean = f64::from(group_mean(latents));
    (sum * mean / (latents.len() as f64).sqrt()) as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_gradient_of_a_factor_is_lsqs() {
        // v = 0.2, 0.8, -2: t - v = -0.2, 0.2, and t = -1 beyond the levels.
        let (latents, gradients) = ([0.1f32, 0.4, -1.0], [2.0f32, 5.0, 3.0]);
        let found = factor_gradient(&latents, &gradients, &[0, 1, -1], 0.5);
        let sum = -0.2 * 2.0 + 0.2 * 5.0 - 3.0;
        let expected = sum * 0.5 / 3.0f64.sqrt();
        assert!((f64::from(found) - expected).abs() < 1e-6, "{found}");
        assert_eq!(factor_gradient(&latents, &gradients, &[0; 3], 0.0), 0.0);
    }
}
