//! LayerNorm (Ba et al., 2016), forward and backward: `y = (x - mean) * inv * gamma + beta`,
//! `inv = 1 / sqrt(variance + eps)`, over the rows of `[rows, width]`.
//!
//! The mean of a row is kept as two numbers, because one f32 near 1e4 is as coarse as a
//! spread of 1e-3. From the pivot `x[0]` the mean of `x - x[0]` gives `center`, the mean
//! rounded to one number; `rest` is what the rounding lost, the mean of `x - center`. So
//! `(x - center) - rest` loses nothing that the stored row has. (The pivot itself would
//! do, but for rows whose first value is an outlier.) Variance by the corrected two-pass
//! algorithm (Chan, Golub and LeVeque, 1983). The derivation of the gradients is in
//! `docs/layer-norm.md`.

use crate::kernels::attention::Store;
use crate::kernels::rounding::ActRows;
use crate::real::{Real, sum_lane_array};

/// Lanes of a sum (ARCHITECTURE.md, Numbers).
const LANES: usize = 16;

/// Rows whose gradients of gamma and beta are summed together. The sums of these blocks
/// are then added in ascending order, so they do not depend on threads.
pub const BLOCK_ROWS: usize = 64;

/// What the forward pass keeps of each row, `[rows]` each.
pub struct Statistics<T> {
    /// The mean, rounded to one number.
    pub center: T,
    /// The mean of `x - center`.
    pub rest: T,
    /// `1 / sqrt(variance + eps)`.
    pub inv: T,
}

/// The statistics of one row.
#[derive(Clone, Copy)]
struct Row<R> {
    center: R,
    rest: R,
    inv: R,
}

impl<R: Real> Row<R> {
    /// `(x - mean) * inv`
    #[inline(always)]
    fn normalized(self, x: R) -> R {
        ((x - self.center) - self.rest) * self.inv
    }

    #[inline(always)]
    fn measure<S: Store<R>>(x: &[S], eps: f64) -> Self {
        let n = R::from_f64(x.len() as f64);
        let pivot = x[0].load();
        let [sum, _] = shifted_sums(x, pivot);
        let center = pivot + sum / n;
        let [sum, squares] = shifted_sums(x, center);
        let rest = sum / n;
        // Not `maximum`: rounding may leave less than nothing of a tiny variance.
        let variance = (squares - sum * rest) / n;
        let variance = if variance < R::ZERO {
            R::ZERO
        } else {
            variance
        };
        Self {
            center,
            rest,
            inv: R::ONE / (variance + R::from_f64(eps)).sqrt(),
        }
    }
}

/// Sums of `x - pivot` and of its squares.
#[inline(always)]
fn shifted_sums<R: Real, S: Store<R>>(x: &[S], pivot: R) -> [R; 2] {
    let mut sum = [R::ZERO; LANES];
    let mut squares = [R::ZERO; LANES];
    let mut chunks = x.chunks_exact(LANES);
    for x in &mut chunks {
        for l in 0..LANES {
            let d = x[l].load() - pivot;
            sum[l] += d;
            squares[l] = d.mul_add(d, squares[l]);
        }
    }
    for (l, x) in chunks.remainder().iter().enumerate() {
        let d = x.load() - pivot;
        sum[l] += d;
        squares[l] = d.mul_add(d, squares[l]);
    }
    [sum_lane_array(sum), sum_lane_array(squares)]
}

/// LayerNorm of the rows of `x`: writes `y`, rounded, and the statistics. `scratch` has
/// the width of a row.
#[inline(always)]
pub fn layer_norm<R: Real, S: Store<R>>(
    x: &[S],
    (gamma, beta): (&[R], &[R]),
    eps: f64,
    keep: Statistics<&mut [R]>,
    y: &mut ActRows<'_, R>,
    scratch: &mut [R],
) {
    let width = gamma.len();
    let Statistics { center, rest, inv } = keep;
    let scratch = &mut scratch[..width];
    for (r, x) in x.chunks_exact(width).enumerate() {
        let row = Row::measure(x, eps);
        (center[r], rest[r], inv[r]) = (row.center, row.rest, row.inv);
        for (((s, x), &gamma), &beta) in scratch.iter_mut().zip(x).zip(gamma).zip(beta) {
            *s = row.normalized(x.load()).mul_add(gamma, beta);
        }
        y.write_row(r, scratch);
    }
}

/// A run of rows of [`layer_norm`] with the gradient of its result.
#[derive(Clone, Copy)]
pub struct GradientRows<'a, R, S> {
    /// `[rows, width]`, as the forward pass saw it.
    pub x: &'a [S],
    /// `[rows, width]`.
    pub dy: &'a [R],
    /// `[width]`.
    pub gamma: &'a [R],
    /// Center of each row.
    pub center: &'a [R],
    /// Rest of each row.
    pub rest: &'a [R],
    /// Reciprocal deviation of each row.
    pub inv: &'a [R],
    /// Whether `dx` is added to what is there.
    pub accumulate: bool,
}

/// `dx` of a block of rows, and the block's share of `dgamma` and `dbeta` into `partial`
/// `[2, width]`, `=`. `scratch` has twice the width of a row.
///
/// Each row is read once: the normalized row and `dy * gamma` rest in `scratch` while
/// their sums are taken.
#[inline(always)]
pub fn layer_norm_backward<R: Real, S: Store<R>>(
    rows: GradientRows<'_, R, S>,
    dx: &mut [R],
    partial: &mut [R],
    scratch: &mut [R],
) {
    let width = rows.gamma.len();
    let (xhat, scratch) = scratch.split_at_mut(width);
    let g = &mut scratch[..width];
    partial.fill(R::ZERO);
    let (dgamma, dbeta) = partial.split_at_mut(width);
    let each = rows.x.chunks_exact(width).zip(rows.dy.chunks_exact(width));
    for (r, ((x, dy), dx)) in each.zip(dx.chunks_exact_mut(width)).enumerate() {
        let row = Row {
            center: rows.center[r],
            rest: rows.rest[r],
            inv: rows.inv[r],
        };
        let inputs = Inputs {
            x,
            dy,
            gamma: rows.gamma,
        };
        let [a, b] = row_sums(row, inputs, (xhat, g), (dgamma, dbeta));
        let values = dx.iter_mut().zip(&*g).zip(&*xhat);
        if rows.accumulate {
            for ((dx, &g), &xhat) in values {
                *dx += (g - a - xhat * b) * row.inv;
            }
        } else {
            for ((dx, &g), &xhat) in values {
                *dx = (g - a - xhat * b) * row.inv;
            }
        }
    }
}

/// What one row of the backward pass reads; all of the same length.
struct Inputs<'a, R, S> {
    x: &'a [S],
    dy: &'a [R],
    gamma: &'a [R],
}

/// Means of `g = dy * gamma` and of `g * xhat`; writes both rows and adds to the sums of
/// `dgamma` and `dbeta`.
#[inline(always)]
fn row_sums<R: Real, S: Store<R>>(
    row: Row<R>,
    inputs: Inputs<'_, R, S>,
    (xhat, g): (&mut [R], &mut [R]),
    (dgamma, dbeta): (&mut [R], &mut [R]),
) -> [R; 2] {
    let n = inputs.gamma.len();
    let mut sums = [[R::ZERO; LANES]; 2];
    let whole = n / LANES * LANES;
    // Once with a length that is known when the code is compiled.
    for start in (0..whole).step_by(LANES) {
        let out = [&mut *xhat, &mut *g, &mut *dgamma, &mut *dbeta];
        add_lanes(row, &inputs, (start, LANES), &mut sums, out);
    }
    if whole < n {
        let out = [xhat, g, dgamma, dbeta];
        add_lanes(row, &inputs, (whole, n - whole), &mut sums, out);
    }
    let n = R::from_f64(n as f64);
    sums.map(|lanes| sum_lane_array(lanes) / n)
}

/// `used` values from `start` on, through local arrays: compilers need not ask whether the
/// slices overlap. Fewer than sixteen are filled up with zeros, which add nothing.
#[inline(always)]
fn add_lanes<R: Real, S: Store<R>>(
    row: Row<R>,
    inputs: &Inputs<'_, R, S>,
    (start, used): (usize, usize),
    sums: &mut [[R; LANES]; 2],
    [xhat, g, dgamma, dbeta]: [&mut [R]; 4],
) {
    let at = start..start + used;
    let lanes = |from: &[R]| {
        let mut lanes = [R::ZERO; LANES];
        lanes[..used].copy_from_slice(&from[at.clone()]);
        lanes
    };
    let mut x = [row.center; LANES];
    for (to, x) in x.iter_mut().zip(&inputs.x[at.clone()]) {
        *to = x.load();
    }
    let (dy, gamma) = (lanes(inputs.dy), lanes(inputs.gamma));
    let (mut dgamma_l, mut dbeta_l) = (lanes(dgamma), lanes(dbeta));
    let [mut xhat_l, mut g_l] = [[R::ZERO; LANES]; 2];
    for l in 0..LANES {
        xhat_l[l] = row.normalized(x[l]);
        g_l[l] = dy[l] * gamma[l];
    }
    for l in 0..LANES {
        sums[0][l] += g_l[l];
        sums[1][l] = g_l[l].mul_add(xhat_l[l], sums[1][l]);
        dgamma_l[l] = dy[l].mul_add(xhat_l[l], dgamma_l[l]);
        dbeta_l[l] += dy[l];
    }
    for (to, lanes) in [
        (xhat, xhat_l),
        (g, g_l),
        (dgamma, dgamma_l),
        (dbeta, dbeta_l),
    ] {
        to[at.clone()].copy_from_slice(&lanes[..used]);
    }
}

/// `sum += ` the blocks' shares, in ascending order: columns `start..` of part `which` (0
/// for gamma, 1 for beta) of `partial` `[blocks, 2, width]`.
#[inline(always)]
pub fn add_blocks<R: Real>(partial: &[R], width: usize, which: usize, start: usize, sum: &mut [R]) {
    let mut total = [R::ZERO; 64];
    for (at, sum) in sum.chunks_mut(64).enumerate() {
        let total = &mut total[..sum.len()];
        total.fill(R::ZERO);
        let first = which * width + start + at * 64;
        for block in partial.chunks_exact(2 * width) {
            for (total, &x) in total.iter_mut().zip(&block[first..]) {
                *total += x;
            }
        }
        for (sum, &total) in sum.iter_mut().zip(&*total) {
            *sum += total;
        }
    }
}
