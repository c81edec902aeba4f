//! Dropout on the residual stream: on the embedding and on what each block adds.

use crate::qwen3::{Qwen3, Rows, rows_of};
use setun_backend::philox::Philox;
use setun_backend::{Backend, Buf, Real};

/// Stream of the random bits, apart from those of the initial weights.
const STREAM: u64 = 0x6472_6f70_6f75_7400;

/// Dropout of one training step. Which values go is a function of seed, step, place in the
/// model and place in the batch, so that micro-batches, recomputation and resumed runs agree.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepDropout {
    /// Share of the values that are left out, below 1.
    pub share: f64,
    /// Of the run.
    pub seed: u64,
    /// The training step.
    pub step: u64,
    /// Row of the batch that is the first one of the call.
    pub first_row: usize,
}

/// Where values are left out.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Site {
    /// The embedding.
    Embedding,
    /// What the attention of a layer adds.
    Attention(usize),
    /// What the feed-forward block of a layer adds.
    Mlp(usize),
}

impl Site {
    fn number(self) -> u64 {
        match self {
            Self::Embedding => 0,
            Self::Attention(l) => 1 + 2 * l as u64,
            Self::Mlp(l) => 2 + 2 * l as u64,
        }
    }
}

impl<R: Real> Qwen3<R> {
    /// Leaves values of `x_td`, or gradients of what came from them, out in place, if the step
    /// has a dropout.
    pub(crate) fn drop_out<B: Backend<Real = R>>(&self, b: &mut B, site: Site, x: Buf<R>) {
        let Some(dropout) = self.dropout else { return };
        let width = self.spec().config.hidden_size;
        // 2^16 places in a model, 2^48 steps.
        let of_site = Philox::new(dropout.seed, STREAM).block(dropout.step << 16 | site.number());
        b.dropout(setun_backend::Dropout {
            x,
            first: (dropout.first_row * width) as u32,
            share: dropout.share,
            seed: [of_site[0], of_site[1]],
        });
    }

    /// The gradient of what a block added to the residual stream, whose gradient is `dx_td`;
    /// in `dnorm_td`, where it differs.
    pub(crate) fn added_gradient<B: Backend<Real = R>>(
        &self,
        b: &mut B,
        site: Site,
        rows: Rows,
    ) -> Buf<R> {
        let (g, d) = (self.backward_buffers(), self.spec().config.hidden_size);
        let dx = rows_of(g.dx, rows, d);
        if self.dropout.is_none() {
            return dx;
        }
        let dropped = rows_of(g.dnorm, rows, d);
        b.copy(dx, dropped);
        self.drop_out(b, site, dropped);
        dropped
    }
}
