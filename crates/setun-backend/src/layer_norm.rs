//! LayerNorm on its own: slices in, slices out, without a plan or a backend.
//!
//! It is the arithmetic that [`Host`](crate::Host) runs behind
//! [`Backend::layer_norm`](crate::Backend::layer_norm), on one thread, with the same bits.
//! At f64 it is an accuracy oracle. The input may be f32, f64 or bf16.
//!
//! # Layout
//! `x`, `y` and their gradients are `[batch, seq, width]`, row-major, normed over the last
//! dimension. `gamma`, `beta` and their gradients are `[width]`, the three statistics
//! `[batch, seq]`.

use crate::cpu::{Isa, multiversion};
use crate::kernels::attention::Store;
use crate::kernels::layer_norm::{
    BLOCK_ROWS, GradientRows, Statistics, add_blocks, layer_norm, layer_norm_backward,
};
use crate::kernels::rounding::ActRows;
use crate::real::Real;
use thiserror::Error;

/// Sizes of a LayerNorm. All are at least 1.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LayerNormShape {
    /// Sequences.
    pub batch: usize,
    /// Tokens of a sequence.
    pub seq: usize,
    /// Values of a token.
    pub width: usize,
    /// Added to the variance; positive as an f32, so that a constant row has an answer.
    pub eps: f64,
}

/// What cannot be normed.
#[derive(Clone, Debug, PartialEq, Error)]
pub enum LayerNormError {
    /// A size is zero, or the sizes are too large to be multiplied.
    #[error(
        "layer norm: batch {batch}, seq {seq} and width {width} must be at least 1, and \
         their product must fit this machine"
    )]
    Shape {
        /// Sequences.
        batch: usize,
        /// Tokens of a sequence.
        seq: usize,
        /// Values of a token.
        width: usize,
    },
    /// No number to add to the variance.
    #[error("layer norm: eps is {0}, but must be finite, and positive as an f32")]
    Eps(f64),
    /// A slice has the wrong length.
    #[error("layer norm: {name} has {len} values, but {layout} needs {expected}")]
    Length {
        /// Name of the argument.
        name: &'static str,
        /// Its length.
        len: usize,
        /// Its dimensions.
        layout: &'static str,
        /// Their product.
        expected: usize,
    },
}

impl LayerNormShape {
    fn rows(self) -> Result<usize, LayerNormError> {
        let Self {
            batch,
            seq,
            width,
            eps,
        } = self;
        if !(eps as f32 > 0.0 && eps.is_finite()) {
            return Err(LayerNormError::Eps(eps));
        }
        let rows = batch.checked_mul(seq);
        let values = rows.and_then(|rows| rows.checked_mul(width));
        match (rows, values) {
            (Some(rows), Some(1..)) => Ok(rows),
            _ => Err(LayerNormError::Shape { batch, seq, width }),
        }
    }

    fn matrix(self, name: &'static str, len: usize) -> Result<(), LayerNormError> {
        let expected = self.rows()? * self.width;
        check(name, len, "[batch, seq, width]", expected)
    }

    fn column(self, name: &'static str, len: usize) -> Result<(), LayerNormError> {
        check(name, len, "[batch, seq]", self.rows()?)
    }

    fn row(self, name: &'static str, len: usize) -> Result<(), LayerNormError> {
        check(name, len, "[width]", self.width)
    }
}

fn check(
    name: &'static str,
    len: usize,
    layout: &'static str,
    expected: usize,
) -> Result<(), LayerNormError> {
    if len == expected {
        return Ok(());
    }
    Err(LayerNormError::Length {
        name,
        len,
        layout,
        expected,
    })
}

/// LayerNorm forward: writes `y` and the statistics that [`backward`] needs.
///
/// # Errors
/// [`LayerNormError`] when the shape is impossible or a slice does not have its length;
/// nothing is written then.
pub fn forward<R: Real, S: Store<R>>(
    shape: LayerNormShape,
    x: &[S],
    gamma: &[R],
    beta: &[R],
    y: &mut [R],
    keep: Statistics<&mut [R]>,
) -> Result<(), LayerNormError> {
    shape.matrix("x", x.len())?;
    shape.row("gamma", gamma.len())?;
    shape.row("beta", beta.len())?;
    shape.matrix("y", y.len())?;
    shape.column("center", keep.center.len())?;
    shape.column("rest", keep.rest.len())?;
    shape.column("inv", keep.inv.len())?;
    let mut scratch = vec![R::ZERO; shape.width];
    let mut y = ActRows::Real(y);
    let affine = (gamma, beta);
    forward_all(
        Isa::detect(),
        x,
        affine,
        shape.eps,
        keep,
        &mut y,
        &mut scratch,
    );
    Ok(())
}

/// Operands of [`backward`].
#[derive(Clone, Copy, Debug)]
pub struct Upstream<'a, R, S> {
    /// `[batch, seq, width]`, as [`forward`] saw it.
    pub x: &'a [S],
    /// `[width]`.
    pub gamma: &'a [R],
    /// Gradient of `y`, `[batch, seq, width]`.
    pub dy: &'a [R],
}

/// LayerNorm backward: writes the gradients of `sum(dy * y)`.
///
/// # Errors
/// As [`forward`].
pub fn backward<R: Real, S: Store<R>>(
    shape: LayerNormShape,
    inputs: Upstream<'_, R, S>,
    saved: Statistics<&[R]>,
    dx: &mut [R],
    dgamma: &mut [R],
    dbeta: &mut [R],
) -> Result<(), LayerNormError> {
    let Upstream { x, gamma, dy } = inputs;
    shape.matrix("x", x.len())?;
    shape.row("gamma", gamma.len())?;
    shape.matrix("dy", dy.len())?;
    shape.column("center", saved.center.len())?;
    shape.column("rest", saved.rest.len())?;
    shape.column("inv", saved.inv.len())?;
    shape.matrix("dx", dx.len())?;
    shape.row("dgamma", dgamma.len())?;
    shape.row("dbeta", dbeta.len())?;
    let (isa, width) = (Isa::detect(), shape.width);
    let blocks = shape.rows()?.div_ceil(BLOCK_ROWS);
    let mut partial = vec![R::ZERO; blocks * 2 * width];
    let mut scratch = vec![R::ZERO; 2 * width];
    let block = BLOCK_ROWS * width;
    let parts = x
        .chunks(block)
        .zip(dy.chunks(block))
        .zip(dx.chunks_mut(block));
    for (b, (((x, dy), dx), partial)) in parts.zip(partial.chunks_mut(2 * width)).enumerate() {
        let first = b * BLOCK_ROWS;
        let rows = first..first + x.len() / width;
        let rows = GradientRows {
            x,
            dy,
            gamma,
            center: &saved.center[rows.clone()],
            rest: &saved.rest[rows.clone()],
            inv: &saved.inv[rows],
            accumulate: false,
        };
        backward_block(isa, rows, dx, partial, &mut scratch);
    }
    for (which, sum) in [dgamma, dbeta].into_iter().enumerate() {
        sum.fill(R::ZERO);
        sum_blocks(isa, &partial, width, which, 0, sum);
    }
    Ok(())
}

multiversion! {
    /// [`layer_norm`]
    fn forward_all[R: Real, S: Store<R>][R, S](
        x: &[S],
        affine: (&[R], &[R]),
        eps: f64,
        keep: Statistics<&mut [R]>,
        y: &mut ActRows<'_, R>,
        scratch: &mut [R],
    ) = layer_norm;
}
multiversion! {
    /// [`layer_norm_backward`]
    fn backward_block[R: Real, S: Store<R>][R, S](
        rows: GradientRows<'_, R, S>,
        dx: &mut [R],
        partial: &mut [R],
        scratch: &mut [R],
    ) = layer_norm_backward;
}
multiversion! {
    /// [`add_blocks`]
    fn sum_blocks[R: Real][R](
        partial: &[R],
        width: usize,
        which: usize,
        start: usize,
        sum: &mut [R],
    ) = add_blocks;
}
