//! SwiGLU, embedding rows and sums.

use crate::kernels::optimizer::hash;
use crate::kernels::rounding::ActRows;
use crate::real::Real;

/// `1 / (1 + e^-x)`.
#[inline(always)]
fn sigmoid<R: Real>(x: R) -> R {
    R::ONE / (R::ONE + (-x).exp())
}

/// `y = silu(gate) * up` (Shazeer, 2020), rounded row by row. `scratch` has a row's width.
#[inline(always)]
pub fn swiglu<R: Real>(gate: &[R], up: &[R], y: &mut ActRows<'_, R>, scratch: &mut [R]) {
    let width = scratch.len();
    for (row, (gate, up)) in gate.chunks(width).zip(up.chunks(width)).enumerate() {
        for ((s, &g), &u) in scratch.iter_mut().zip(gate).zip(up) {
            *s = g * sigmoid(g) * u;
        }
        y.write_row(row, scratch);
    }
}

/// Replaces `gate` and `up` by their gradients.
#[inline(always)]
pub fn swiglu_backward<R: Real>(dy: &[R], gate: &mut [R], up: &mut [R]) {
    for ((&dy, gate), up) in dy.iter().zip(gate).zip(up) {
        let (g, u) = (*gate, *up);
        let s = sigmoid(g);
        *up = dy * (g * s);
        *gate = dy * u * (s * (R::ONE + g * (R::ONE - s)));
    }
}

/// `y += x`.
#[inline(always)]
pub fn add<R: Real>(x: &[R], y: &mut [R]) {
    for (y, &x) in y.iter_mut().zip(x) {
        *y += x;
    }
}

/// `y += share * (x - y)`.
#[inline(always)]
pub fn lerp<R: Real>(x: &[R], share: R, y: &mut [R]) {
    for (y, &x) in y.iter_mut().zip(x) {
        *y = share.mul_add(x - *y, *y);
    }
}

/// What decides on [`dropout`], computed once.
#[derive(Clone, Copy)]
pub struct Chances<R> {
    /// Values whose random bits are below are left out.
    threshold: u32,
    /// Factor on the others.
    scale: R,
    seed: [u32; 2],
}

impl<R: Real> Chances<R> {
    /// Of a share below 1.
    pub fn new(share: f64, seed: [u32; 2]) -> Self {
        Self {
            threshold: (share * 4_294_967_296.0) as u32,
            scale: R::from_f64(1.0 / (1.0 - share)),
            seed,
        }
    }
}

/// Zeroes values by chance and scales the others; `first` is the number of the first one.
#[inline(always)]
pub fn dropout<R: Real>(chances: Chances<R>, first: u32, x: &mut [R]) {
    for (number, x) in (0u32..).zip(x) {
        let number = first.wrapping_add(number);
        // Hashed twice: one hash of `number ^ seed` would meet the same bits in another order
        // under every seed.
        let bits = hash(hash(number ^ chances.seed[0]) ^ chances.seed[1]);
        *x = if bits < chances.threshold {
            R::ZERO
        } else {
            *x * chances.scale
        };
    }
}

/// A row of a ternary matrix as real numbers: `s * t`, exact.
#[inline(always)]
pub fn dequantize_row<R: Real>(trits: &[i8], scales: &[f32], group_size: usize, y: &mut [R]) {
    let groups = y.chunks_mut(group_size).zip(trits.chunks(group_size));
    for ((y, trits), &scale) in groups.zip(scales) {
        for (y, &t) in y.iter_mut().zip(trits) {
            *y = R::from_f32(f32::from(t) * scale);
        }
    }
}

/// `y = (1 - share) * latent + share * s * t` of one row.
#[inline(always)]
pub fn blend_row<R: Real>(
    latent: &[R],
    trits: &[i8],
    scales: &[f32],
    group_size: usize,
    share: R,
    y: &mut [R],
) {
    dequantize_row(trits, scales, group_size, y);
    for (y, &w) in y.iter_mut().zip(latent) {
        *y = share.mul_add(*y - w, w);
    }
}

/// Adds `dy[r]` to row `ids[r]` of the rows of `dweight`, which begin at row `start` of
/// the matrix; other ids are somebody else's.
#[inline(always)]
pub fn embedding_backward<R: Real>(
    ids: &[u32],
    dy: &[R],
    width: usize,
    start: usize,
    dweight: &mut [R],
) {
    let rows = dweight.len() / width;
    for (&id, dy) in ids.iter().zip(dy.chunks(width)) {
        let row = (id as usize).wrapping_sub(start);
        if row < rows {
            add(dy, &mut dweight[row * width..(row + 1) * width]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dropout_leaves_out_a_share_and_keeps_the_mean() {
        let drop = |share: f64, seed: [u32; 2], first: u32, n: usize| {
            let mut x = vec![1.0f64; n];
            dropout(Chances::new(share, seed), first, &mut x);
            x
        };
        let n = 100_000;
        for share in [0.0, 0.1, 0.5, 0.9] {
            let x = drop(share, [7, 9], 0, n);
            let kept = 1.0 / (1.0 - share);
            assert!(x.iter().all(|&x| x == 0.0 || x == kept));
            let gone = x.iter().filter(|&&x| x == 0.0).count() as f64 / n as f64;
            // Five standard errors.
            let tolerance = 5.0 * (share * (1.0 - share) / n as f64).sqrt();
            assert!((gone - share).abs() <= tolerance, "{share}: {gone}");
        }
        // Split anywhere, the same values go; under another seed others do, independently.
        let whole = drop(0.5, [1, 2], 10, 1000);
        assert_eq!(drop(0.5, [1, 2], 310, 700), whole[300..]);
        for seed in [[1, 3], [2, 2]] {
            let other = drop(0.5, seed, 10, 1000);
            let same = whole.iter().zip(&other).filter(|(a, b)| a == b).count();
            assert!(same.abs_diff(500) < 80, "{seed:?}: {same}");
        }
    }

    #[test]
    fn a_blend_goes_from_the_latents_to_their_projection() {
        let (latent, trits, scales) = ([0.5f32, -3.0, 0.25], [1, -1, 0], [2.0, 4.0]);
        let mut y = [f32::NAN; 3];
        blend_row(&latent, &trits, &scales, 2, 0.0, &mut y);
        assert_eq!(y, latent);
        blend_row(&latent, &trits, &scales, 2, 1.0, &mut y);
        assert_eq!(y, [2.0, -2.0, 0.0]);
        blend_row(&latent, &trits, &scales, 2, 0.25, &mut y);
        assert_eq!(y, [0.875, -2.75, 0.1875]);
    }
}
