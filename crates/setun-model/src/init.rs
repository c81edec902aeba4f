//! Random initialisation: a pure function of the seed.

use crate::parameters::{Parameters, SetError};
use setun_backend::philox::Philox;
use setun_backend::{Backend, Real};

impl<R: Real> Parameters<R> {
    /// Norms 1; matrices normal with standard deviation `std`, or `fan_in^-0.5` where
    /// `std` is 0; projections onto the residual stream (`o_proj`, `down_proj`) times
    /// `residual_scale`. Parameter `i` draws from stream `i`.
    ///
    /// # Errors
    /// None for parameters with latents.
    pub fn initialize<B: Backend<Real = R>>(
        &self,
        b: &mut B,
        seed: u64,
        std: f64,
        residual_scale: f64,
    ) -> Result<(), SetError> {
        for (stream, p) in self.list.iter().enumerate() {
            if !p.is_matrix {
                self.set_values(b, &p.name, &vec![1.0; p.numel()])?;
                continue;
            }
            let residual =
                p.name.ends_with("o_proj.weight") || p.name.ends_with("down_proj.weight");
            let fan_in = 1.0 / (p.cols as f64).sqrt();
            let std = if std > 0.0 { std } else { fan_in };
            let std = if residual { std * residual_scale } else { std };
            let random = Philox::new(seed, stream as u64);
            let mut values = vec![0.0f32; p.numel()];
            for (i, pair) in values.chunks_mut(2).enumerate() {
                let (first, second) = random.normal_pair(i as u64);
                for (value, x) in pair.iter_mut().zip([first, second]) {
                    *value = (x * std) as f32;
                }
            }
            self.set_values(b, &p.name, &values)?;
        }
        Ok(())
    }
}
