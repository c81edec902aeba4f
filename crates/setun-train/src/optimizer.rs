//! AdamW over all parameters, or beside Muon, and the gradient norm.

use crate::average::Average;
use crate::muon::{Muon, MuonOptions, MuonStep, is_updated};
use crate::settings::OptimizerState;
use setun_backend::{AdamW, Backend, Category, Plan, StoredBuf};
use setun_model::Parameters;

/// Constants of AdamW.
#[derive(Clone, Copy, Debug)]
pub struct AdamWOptions {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the denominator.
    pub eps: f64,
    /// How moments are stored.
    pub state: OptimizerState,
}

/// First and second moment of each parameter, in canonical order.
pub struct Optimizer {
    /// First moments; empty for a frozen parameter.
    pub m: Vec<StoredBuf<f32>>,
    /// Second moments; empty for what Muon updates, whose momentum is in `m`.
    pub v: Vec<StoredBuf<f32>>,
    /// Updates so far: steps that were skipped do not count.
    pub updates: u64,
    /// Average of what it updates, where there is one.
    pub average: Option<Average>,
    options: AdamWOptions,
    muon: Option<Muon>,
}

impl Optimizer {
    /// Reserves the moments.
    pub fn reserve(plan: &mut Plan, parameters: &Parameters<f32>, options: AdamWOptions) -> Self {
        Self::reserve_with(plan, parameters, options, None)
    }

    /// As [`reserve`](Self::reserve), with Muon for the matrices of the layers.
    pub fn reserve_with(
        plan: &mut Plan,
        parameters: &Parameters<f32>,
        options: AdamWOptions,
        muon: Option<MuonOptions>,
    ) -> Self {
        let mut moments = |letter: &str| {
            let each = parameters.list.iter().map(|p| {
                let unused = p.frozen || (letter == "v" && muon.is_some() && is_updated(p));
                let len = if unused { 0 } else { p.numel() };
                let (category, name) = (Category::Optimizer, format!("{}.{letter}", p.name));
                match options.state {
                    OptimizerState::F32 => StoredBuf::Real(plan.alloc(category, name, len)),
                    OptimizerState::Bf16 => StoredBuf::Bf16(plan.alloc(category, name, len)),
                }
            });
            each.collect::<Vec<_>>()
        };
        let (m, v) = (moments("m"), moments("v"));
        Self {
            m,
            v,
            updates: 0,
            average: None,
            options,
            muon: muon.map(|options| Muon::reserve(plan, parameters, options)),
        }
    }

    /// 2-norm of all gradients together: squares summed in f64 in a fixed order.
    pub fn gradient_norm<B: Backend<Real = f32>>(b: &mut B, parameters: &Parameters<f32>) -> f64 {
        let trained = parameters.list.iter().filter(|p| !p.frozen);
        let squares = trained.map(|p| b.sum_squares(p.gradient()));
        squares.sum::<f64>().sqrt()
    }

    /// Updates every parameter that is not frozen. Matrices decay, the embedding included; norms do not.
    /// `grad_scale` multiplies the gradients: the clipping.
    pub fn step<B: Backend<Real = f32>>(
        &mut self,
        b: &mut B,
        parameters: &Parameters<f32>,
        lr: f64,
        weight_decay: f64,
        grad_scale: f64,
    ) {
        self.updates += 1;
        let trained = parameters.list.iter().enumerate();
        for (i, p) in trained.filter(|(_, p)| !p.frozen) {
            let mut lr = lr;
            if let Some(muon) = &mut self.muon {
                if let (true, StoredBuf::Real(momentum)) = (is_updated(p), self.m[i]) {
                    let step = MuonStep {
                        lr,
                        weight_decay,
                        grad_scale,
                    };
                    muon.update(b, p, momentum, step);
                    continue;
                }
                lr *= muon.options().adamw_share;
            }
            b.adamw(AdamW {
                weight: p.values(),
                grad: p.gradient(),
                m: self.m[i],
                v: self.v[i],
                grad_scale,
                lr,
                beta1: self.options.beta1,
                beta2: self.options.beta2,
                eps: self.options.eps,
                weight_decay: if p.is_matrix { weight_decay } else { 0.0 },
                step: self.updates,
            });
        }
        if let Some(average) = &self.average {
            average.update(b, parameters, self.updates);
        }
    }
}
