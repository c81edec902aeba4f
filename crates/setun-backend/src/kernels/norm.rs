//! RMSNorm and rotary position embedding, forward and backward.

use crate::kernels::rounding::ActRows;
use crate::real::{Real, sum_slices};

/// `inv = 1 / sqrt(mean x^2 + eps)` of one row (Zhang and Sennrich, 2019).
#[inline(always)]
pub fn inverse_rms<R: Real>(x: &[R], eps: f64) -> R {
    let sum = sum_slices([x], |[x]| x * x);
    R::ONE / (sum / R::from_f64(x.len() as f64) + R::from_f64(eps)).sqrt()
}

/// RMSNorm of the rows of `x`: writes `x * inv * weight`, rounded, and `inv`.
/// `scratch` has the width of a row.
#[inline(always)]
pub fn rms_norm<R: Real>(
    x: &[R],
    weight: &[R],
    eps: f64,
    inv: &mut [R],
    y: &mut ActRows<'_, R>,
    scratch: &mut [R],
) {
    let width = weight.len();
    for (row, (x, inv)) in x.chunks(width).zip(inv).enumerate() {
        *inv = inverse_rms(x, eps);
        for ((s, &x), &w) in scratch.iter_mut().zip(x).zip(weight) {
            *s = x * *inv * w;
        }
        y.write_row(row, scratch);
    }
}

/// `dx += inv * (dy * w - x * inv^2 * mean(dy * w * x))` of one row.
#[inline(always)]
fn rms_norm_dx<R: Real>(x: &[R], weight: &[R], inv: R, dy: &[R], dx: &mut [R]) {
    let dot = sum_slices([x, weight, dy], |[x, weight, dy]| dy * weight * x);
    let shrink = dot * inv * inv / R::from_f64(x.len() as f64);
    for (((dx, &dy), &x), &weight) in dx.iter_mut().zip(dy).zip(x).zip(weight) {
        *dx += inv * (dy * weight - x * shrink);
    }
}

/// `dx += ` the gradient of [`rms_norm`] for each row.
#[inline(always)]
pub fn rms_norm_backward<R: Real>(x: &[R], weight: &[R], inv: &[R], dy: &[R], dx: &mut [R]) {
    let width = weight.len();
    let rows = x
        .chunks(width)
        .zip(dy.chunks(width))
        .zip(dx.chunks_mut(width));
    for (((x, dy), dx), &inv) in rows.zip(inv) {
        rms_norm_dx(x, weight, inv, dy, dx);
    }
}

/// Rows whose gradients of the weight are summed together, and then added to the sum, so
/// that errors grow with the root of 64 and not of the number of rows.
pub const BLOCK_ROWS: usize = 64;

/// `dweight[c] += sum over rows of dy * x * inv` for the columns from `start`, as many as
/// `dweight` has: blocks of [`BLOCK_ROWS`] rows, both over ascending rows.
#[inline(always)]
pub fn rms_norm_dweight<R: Real>(
    x: &[R],
    inv: &[R],
    dy: &[R],
    width: usize,
    start: usize,
    dweight: &mut [R],
) {
    const COLUMNS: usize = 64;
    for (c, dweight) in dweight.chunks_mut(COLUMNS).enumerate() {
        let first = start + c * COLUMNS;
        let columns = first..first + dweight.len();
        let block = BLOCK_ROWS * width;
        let blocks = x.chunks(block).zip(dy.chunks(block));
        for ((x, dy), inv) in blocks.zip(inv.chunks(BLOCK_ROWS)) {
            let mut sums = [R::ZERO; COLUMNS];
            let rows = x.chunks(width).zip(dy.chunks(width));
            for ((x, dy), &inv) in rows.zip(inv) {
                let both = x[columns.clone()].iter().zip(&dy[columns.clone()]);
                for (sum, (&x, &dy)) in sums.iter_mut().zip(both) {
                    *sum = dy.mul_add(x * inv, *sum);
                }
            }
            for (dweight, sum) in dweight.iter_mut().zip(sums) {
                *dweight += sum;
            }
        }
    }
}

/// Rotary table of one row: `cos` and `sin` have `head_dim / 2` values.
#[derive(Clone, Copy)]
pub struct Rotation<'a, R> {
    /// Cosines.
    pub cos: &'a [R],
    /// Sines.
    pub sin: &'a [R],
}

/// Rotates one head in place: `(x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin)` on the
/// halves (Su et al., 2021, in Hugging Face's layout).
#[inline(always)]
pub fn rotate<R: Real>(x: &mut [R], at: Rotation<'_, R>) {
    let (x1, x2) = x.split_at_mut(at.cos.len());
    for (((x1, x2), &cos), &sin) in x1.iter_mut().zip(x2).zip(at.cos).zip(at.sin) {
        let (a, b) = (*x1, *x2);
        *x1 = a * cos - b * sin;
        *x2 = b * cos + a * sin;
    }
}

/// The transpose of [`rotate`].
#[inline(always)]
pub fn rotate_back<R: Real>(x: &mut [R], at: Rotation<'_, R>) {
    let (x1, x2) = x.split_at_mut(at.cos.len());
    for (((x1, x2), &cos), &sin) in x1.iter_mut().zip(x2).zip(at.cos).zip(at.sin) {
        let (a, b) = (*x1, *x2);
        *x1 = a * cos + b * sin;
        *x2 = b * cos - a * sin;
    }
}

/// Norm and rotation of one row of heads into `y` `[heads, head_dim]`.
#[inline(always)]
pub fn norm_rope_row<R: Real>(
    x: &[R],
    weight: &[R],
    eps: f64,
    at: Rotation<'_, R>,
    inv: &mut [R],
    y: &mut [R],
) {
    let width = weight.len();
    for ((x, y), inv) in x.chunks(width).zip(y.chunks_mut(width)).zip(inv) {
        *inv = inverse_rms(x, eps);
        for ((y, &x), &w) in y.iter_mut().zip(x).zip(weight) {
            *y = x * *inv * w;
        }
        rotate(y, at);
    }
}

/// Turns the gradient of a row of rotated heads back, in place; what is left is the
/// gradient of the norm's output.
#[inline(always)]
pub fn rope_backward_row<R: Real>(dy: &mut [R], head_dim: usize, at: Rotation<'_, R>) {
    for head in dy.chunks_mut(head_dim) {
        rotate_back(head, at);
    }
}

/// Replaces `dy`, the gradient of the norm's output, by the gradient of its input.
#[inline(always)]
pub fn rms_norm_backward_in_place<R: Real>(x: &[R], weight: &[R], inv: &[R], dy: &mut [R]) {
    let width = weight.len();
    for ((x, dy), &inv) in x.chunks(width).zip(dy.chunks_mut(width)).zip(inv) {
        let dot = sum_slices([x, weight, &*dy], |[x, weight, dy]| dy * weight * x);
        let shrink = dot * inv * inv / R::from_f64(width as f64);
        for ((dy, &x), &w) in dy.iter_mut().zip(x).zip(weight) {
            *dy = inv * (*dy * w - x * shrink);
        }
    }
}
