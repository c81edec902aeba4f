//! Gradient norm and AdamW.

use crate::ops::AdamW;
use crate::real::{Real, sum_slices};
use half::bf16;

/// Values whose squares are summed together; chunks are then added in ascending order,
/// so the norm does not depend on the number of threads.
pub const NORM_CHUNK: usize = 4096;

/// Sum of squares of a chunk, in f64.
#[inline(always)]
pub fn sum_squares<R: Real>(x: &[R]) -> f64 {
    sum_slices([x], |[x]| x.to_f64() * x.to_f64())
}

/// The scalars of an update, computed once.
#[derive(Clone, Copy)]
pub struct AdamWScalars<R> {
    grad_scale: R,
    keep: R,
    beta1: R,
    beta2: R,
    take1: R,
    take2: R,
    root_bias2: R,
    step_size: R,
    eps: R,
    /// Of the random bits of this update.
    seed: u32,
}

impl<R: Real> AdamWScalars<R> {
    /// Bias corrections and factors of update `op.step`.
    pub fn new(op: &AdamW<R>) -> Self {
        let steps = op.step as f64;
        let bias1 = 1.0 - libm::pow(op.beta1, steps);
        let bias2 = 1.0 - libm::pow(op.beta2, steps);
        Self {
            grad_scale: R::from_f64(op.grad_scale),
            keep: R::from_f64(1.0 - op.lr * op.weight_decay),
            beta1: R::from_f64(op.beta1),
            beta2: R::from_f64(op.beta2),
            take1: R::from_f64(1.0 - op.beta1),
            take2: R::from_f64(1.0 - op.beta2),
            root_bias2: R::from_f64(bias2.sqrt()),
            step_size: R::from_f64(op.lr / bias1),
            eps: R::from_f64(op.eps),
            seed: hash(op.step as u32),
        }
    }
}

impl<R: Real> AdamWScalars<R> {
    /// `w *= 1 - lr wd; m = b1 m + (1 - b1) g; v = b2 v + (1 - b2) g^2;
    /// w -= lr / bias1 * m / (sqrt(v) / sqrt(bias2) + eps)`.
    #[inline(always)]
    fn update(&self, w: &mut R, g: R, m: &mut R, v: &mut R) {
        let g = g * self.grad_scale;
        *m = self.beta1 * *m + self.take1 * g;
        *v = self.beta2 * *v + self.take2 * (g * g);
        let denominator = v.sqrt() / self.root_bias2 + self.eps;
        *w = *w * self.keep - self.step_size * (*m / denominator);
    }
}

/// One update of a run of values.
#[inline(always)]
pub fn adamw<R: Real>(s: AdamWScalars<R>, w: &mut [R], g: &[R], m: &mut [R], v: &mut [R]) {
    for (((w, &g), m), v) in w.iter_mut().zip(g).zip(m).zip(v) {
        s.update(w, g, m, v);
    }
}

/// As [`adamw`] with moments of bf16, which are rounded by chance: `first` is the index of
/// the first value in its parameter.
#[inline(always)]
pub fn adamw_bf16<R: Real>(
    s: AdamWScalars<R>,
    first: usize,
    w: &mut [R],
    g: &[R],
    m: &mut [bf16],
    v: &mut [bf16],
) {
    let moments = m.iter_mut().zip(v);
    for (i, ((w, &g), (m, v))) in w.iter_mut().zip(g).zip(moments).enumerate() {
        let (mut exact_m, mut exact_v) = (R::from_bf16(*m), R::from_bf16(*v));
        s.update(w, g, &mut exact_m, &mut exact_v);
        let random = hash((first + i) as u32 ^ s.seed);
        *m = round_by_chance(exact_m.to_f32(), random & 0xffff);
        *v = round_by_chance(exact_v.to_f32(), random >> 16);
    }
}

/// Random bits of a counter (Wellons, 2018, "lowbias32").
#[inline(always)]
pub const fn hash(x: u32) -> u32 {
    let x = (x ^ (x >> 16)).wrapping_mul(0x7feb_352d);
    let x = (x ^ (x >> 15)).wrapping_mul(0x846c_a68b);
    x ^ (x >> 16)
}

/// One of the two neighbouring bf16: with a uniform `random` below 2^16 the mean is `x`.
/// Denormals become zero; NaN stays.
#[inline(always)]
fn round_by_chance(x: f32, random: u32) -> bf16 {
    let bits = x.to_bits();
    let magnitude = bits & 0x7fff_ffff;
    let random = if magnitude < 0x7f80_0000 { random } else { 0 };
    let rounded = bits.wrapping_add(random) >> 16;
    let quiet_nan = bits >> 16 | 0x40;
    let kept = if magnitude > 0x7f80_0000 {
        quiet_nan
    } else {
        rounded
    };
    let kept = if magnitude < 0x0080_0000 {
        bits >> 16 & 0x8000
    } else {
        kept
    };
    bf16::from_bits(kept as u16)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{Category, Plan};
    use crate::ops::StoredBuf;

    #[test]
    fn rounding_by_chance_is_right_on_average() {
        for x in [1.0f32, 1.001, -0.3, 3.0e-20, 1.0 + 1.0 / 512.0] {
            let (mut sum, n) = (0.0f64, 1 << 16);
            for random in 0..n {
                let y = round_by_chance(x, random).to_f32();
                let spacing = (x.abs() / 128.0).max(f32::MIN_POSITIVE);
                assert!((y - x).abs() < spacing, "{x} became {y}");
                sum += f64::from(y);
            }
            let mean = sum / f64::from(n);
            assert!((mean / f64::from(x) - 1.0).abs() < 1e-6, "{x}: mean {mean}");
        }
        assert!(round_by_chance(f32::NAN, 0xffff).is_nan());
        assert_eq!(round_by_chance(f32::INFINITY, 0xffff), bf16::INFINITY);
        assert_eq!(round_by_chance(1e-40, 0xffff), bf16::ZERO);
    }

    #[test]
    fn moments_of_bf16_follow_those_of_f32() {
        const N: usize = 4096;
        let none = Plan::new().alloc::<f32>(Category::Optimizer, "nothing", 0);
        let mut op = AdamW {
            weight: none,
            grad: none,
            m: StoredBuf::Real(none),
            v: StoredBuf::Real(none),
            grad_scale: 1.0,
            lr: 1e-3,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.1,
            step: 0,
        };
        let (mut w, mut m, mut v) = (vec![0.5f32; N], vec![0.0f32; N], vec![0.0f32; N]);
        let (mut w16, mut m16) = (w.clone(), vec![bf16::ZERO; N]);
        let mut v16 = m16.clone();
        // Large gradients, then small ones: the second moment must fall by itself.
        for step in 1..=2000u64 {
            op.step = step;
            let size = if step < 100 { 1.0 } else { 1e-2 };
            let g = |i: usize| hash(i as u32 ^ (step as u32) << 16) as f32 / u32::MAX as f32 - 0.4;
            let g: Vec<f32> = (0..N).map(|i| size * g(i)).collect();
            let s = AdamWScalars::new(&op);
            adamw(s, &mut w, &g, &mut m, &mut v);
            adamw_bf16(s, 0, &mut w16, &g, &mut m16, &mut v16);
        }
        let sum = |x: &[f32]| x.iter().map(|&x| f64::from(x)).sum::<f64>();
        let wide = |x: &[bf16]| x.iter().map(|x| x.to_f32()).collect::<Vec<f32>>();
        assert!((sum(&wide(&v16)) / sum(&v) - 1.0).abs() < 0.01);
        assert!((sum(&wide(&m16)) / sum(&m) - 1.0).abs() < 0.01);
        let moved = |w: &[f32]| w.iter().map(|&w| f64::from(w) - 0.5).collect::<Vec<f64>>();
        let (a, b) = (moved(&w), moved(&w16));
        let difference: f64 = a.iter().zip(&b).map(|(a, b)| (a - b) * (a - b)).sum();
        let size: f64 = a.iter().map(|a| a * a).sum();
        assert!((difference / size).sqrt() < 0.02);
    }
}
