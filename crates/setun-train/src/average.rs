//! A moving average of the weights: an option.
//!
//! After each update, `average += (1 - d) (latent - average)` with `d = min(decay, (1 + n) / (10 +
//! n))` after `n` updates, so that the first weights are soon forgotten. The average has
//! projections of its own. Evaluations, checkpoints and exports are the average's; training goes
//! on with the latents, which a checkpoint keeps beside the moments.

use crate::TrainError;
use setun_backend::{Backend, Plan};
use setun_model::Parameters;

/// The average of all parameters.
#[derive(Clone, Debug)]
pub struct Average {
    /// Averaged values, and their projections as of [`Average::project`].
    pub parameters: Parameters<f32>,
    decay: f64,
}

impl Average {
    /// Reserves memory for an average of `of`.
    pub fn reserve(plan: &mut Plan, of: &Parameters<f32>, decay: f64) -> Self {
        Self {
            parameters: of.twin(plan),
            decay,
        }
    }

    /// Begins anew at the values of `of`.
    pub fn start<B: Backend<Real = f32>>(&self, b: &mut B, of: &Parameters<f32>) {
        for (p, average) in of.list.iter().zip(&self.parameters.list) {
            b.copy(p.values(), average.values());
        }
    }

    /// Takes in the values of `of` after `updates` updates.
    pub fn update<B: Backend<Real = f32>>(&self, b: &mut B, of: &Parameters<f32>, updates: u64) {
        let n = updates as f64;
        let decay = self.decay.min((1.0 + n) / (10.0 + n));
        for (p, average) in of.list.iter().zip(&self.parameters.list) {
            b.lerp(p.values(), 1.0 - decay, average.values());
        }
    }

    /// Projects the average as it is now.
    ///
    /// # Errors
    /// A scale that cannot be shipped.
    pub fn project<B: Backend<Real = f32>>(&self, b: &mut B) -> Result<(), TrainError> {
        self.parameters.project(b)?;
        Ok(())
    }
}
