//! The floating-point type of a backend: f32, whose every operation is fixed to the bit,
//! or f64, the accuracy oracle.

use bytemuck::Pod;
use half::bf16;
use std::fmt::Debug;
use std::ops::{Add, AddAssign, Div, Mul, Neg, Sub};

/// f32 or f64.
pub trait Real:
    Pod
    + Debug
    + Send
    + Sync
    + PartialOrd
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + Neg<Output = Self>
    + AddAssign
{
    /// 0.
    const ZERO: Self;
    /// 1.
    const ONE: Self;
    /// Negative infinity, the score of a masked key.
    const NEG_INFINITY: Self;

    /// Nearest value of this type.
    fn from_f64(x: f64) -> Self;
    /// Exact conversion.
    fn from_f32(x: f32) -> Self;
    /// Exact conversion.
    fn to_f64(self) -> f64;
    /// Nearest f32.
    fn to_f32(self) -> f32;
    /// `self * a + b`, rounded once.
    fn mul_add(self, a: Self, b: Self) -> Self;
    /// Correctly rounded square root.
    fn sqrt(self) -> Self;
    /// Magnitude.
    fn abs(self) -> Self;
    /// The larger one; NaN if either is.
    fn maximum(self, other: Self) -> Self;
    /// The largest of some values, NaN if there is one, minus infinity for none. Of zeros of
    /// both signs either.
    fn largest(values: &[Self]) -> Self {
        let max = |max: Self, &x: &Self| max.maximum(x);
        values.iter().fold(Self::NEG_INFINITY, max)
    }
    /// e^x; at f32 the one polynomial that every instruction set uses.
    fn exp(self) -> Self;
    /// As [`Real::exp`], to the bit, for what is at most 88, as differences from a maximum are;
    /// anything for more.
    fn exp_small(self) -> Self;
    /// Natural logarithm.
    fn ln(self) -> Self;
    /// Nearest bf16 (ties to even), denormals to zero.
    fn to_bf16(self) -> bf16;
    /// Denormals to zeros of their sign, as the bf16 products define it.
    fn flush(self) -> Self;
    /// Lower bound on the binary exponents of the non-zero values; `i32::MAX` without any.
    fn min_exponent(values: &[Self]) -> i32;

    /// Value of a bf16.
    #[inline(always)]
    fn from_bf16(x: bf16) -> Self {
        // Not `to_f32`, whose care for NaN is a branch in every loop.
        Self::from_f32(f32::from_bits(u32::from(x.to_bits()) << 16))
    }

    /// Rounded to bf16 and back.
    fn round_bf16(self) -> Self {
        Self::from_bf16(self.to_bf16())
    }
}

impl Real for f32 {
    const ZERO: Self = 0.0;
    const ONE: Self = 1.0;
    const NEG_INFINITY: Self = f32::NEG_INFINITY;

    #[inline(always)]
    fn from_f64(x: f64) -> Self {
        x as f32
    }
    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        x
    }
    #[inline(always)]
    fn to_f64(self) -> f64 {
        f64::from(self)
    }
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
    #[inline(always)]
    fn mul_add(self, a: Self, b: Self) -> Self {
        f32::mul_add(self, a, b)
    }
    #[inline(always)]
    fn sqrt(self) -> Self {
        f32::sqrt(self)
    }
    #[inline(always)]
    fn abs(self) -> Self {
        f32::abs(self)
    }
    #[inline(always)]
    fn maximum(self, other: Self) -> Self {
        if self > other || self.is_nan() {
            self
        } else {
            other
        }
    }
    // With integers in the order of the numbers, whose maximum has no order of its own, so that
    // compilers vectorise it.
    #[inline(always)]
    fn largest(values: &[Self]) -> Self {
        const INFINITY: u32 = f32::INFINITY.to_bits();
        let swapped = |bits: i32| bits ^ ((bits >> 31) & i32::MAX);
        let ordered = |x: &f32| swapped(x.to_bits() as i32);
        let magnitude = |x: &f32| x.to_bits() & !(1 << 31);
        let least = swapped(f32::NEG_INFINITY.to_bits() as i32);
        let max = values.iter().fold(least, |max, x| max.max(ordered(x)));
        let most = values.iter().fold(0, |max, x| max.max(magnitude(x)));
        if most > INFINITY {
            return f32::NAN;
        }
        f32::from_bits(swapped(max) as u32)
    }
    #[inline(always)]
    fn exp(self) -> Self {
        exp_f32(self)
    }
    #[inline(always)]
    fn exp_small(self) -> Self {
        exp_small_f32(self)
    }
    #[inline(always)]
    fn ln(self) -> Self {
        libm::log(f64::from(self)) as f32
    }

    // What is stored has quiet NaNs already, so the bits can be taken as they are.
    #[inline(always)]
    fn from_bf16(x: bf16) -> Self {
        f32::from_bits(u32::from(x.to_bits()) << 16)
    }

    #[inline(always)]
    fn to_bf16(self) -> bf16 {
        bf16::from_bits(bf16_bits(self) as u16)
    }

    // Without the detour through 16 bits, which compilers do not vectorise well.
    #[inline(always)]
    fn round_bf16(self) -> Self {
        f32::from_bits(bf16_bits(self) << 16)
    }

    #[inline(always)]
    fn flush(self) -> Self {
        if self.abs() < f32::MIN_POSITIVE {
            0.0f32.copysign(self)
        } else {
            self
        }
    }

    #[inline(always)]
    fn min_exponent(values: &[Self]) -> i32 {
        // Zero wraps to the largest integer and so never wins.
        let bits = |x: &f32| (x.to_bits() & 0x7fff_ffff).wrapping_sub(1);
        let least = values.iter().fold(u32::MAX, |least, x| least.min(bits(x)));
        if least == u32::MAX {
            i32::MAX
        } else {
            ((least + 1) >> 23) as i32 - 127
        }
    }
}

impl Real for f64 {
    const ZERO: Self = 0.0;
    const ONE: Self = 1.0;
    const NEG_INFINITY: Self = f64::NEG_INFINITY;

    fn from_f64(x: f64) -> Self {
        x
    }
    fn from_f32(x: f32) -> Self {
        f64::from(x)
    }
    fn to_f64(self) -> f64 {
        self
    }
    fn to_f32(self) -> f32 {
        self as f32
    }
    fn mul_add(self, a: Self, b: Self) -> Self {
        f64::mul_add(self, a, b)
    }
    fn sqrt(self) -> Self {
        f64::sqrt(self)
    }
    fn abs(self) -> Self {
        f64::abs(self)
    }
    fn maximum(self, other: Self) -> Self {
        if self > other || self.is_nan() {
            self
        } else {
            other
        }
    }
    fn exp(self) -> Self {
        libm::exp(self)
    }
    fn exp_small(self) -> Self {
        libm::exp(self)
    }
    fn ln(self) -> Self {
        libm::log(self)
    }
    fn to_bf16(self) -> bf16 {
        (self as f32).to_bf16()
    }
    fn flush(self) -> Self {
        self
    }
    fn min_exponent(_: &[Self]) -> i32 {
        0
    }
}

/// As [`Real::min_exponent`], of values as they are stored.
#[inline(always)]
pub fn min_exponent_bf16(values: &[bf16]) -> i32 {
    let bits = |x: &bf16| (x.to_bits() & 0x7fff).wrapping_sub(1);
    let least = values.iter().fold(u16::MAX, |least, x| least.min(bits(x)));
    if least == u16::MAX {
        i32::MAX
    } else {
        i32::from((least + 1) >> 7) - 127
    }
}

/// As [`Real::to_bf16`] of a normal number or zero, in a third of the operations.
#[inline(always)]
pub(crate) fn normal_to_bf16(x: f32) -> bf16 {
    let bits = x.to_bits();
    bf16::from_bits((bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16) as u16)
}

/// The upper half of `x` rounded to bf16: ties to even, denormals to zero, NaN quiet.
#[inline(always)]
fn bf16_bits(x: f32) -> u32 {
    let bits = x.to_bits();
    let magnitude = bits & 0x7fff_ffff;
    let rounded = (bits.wrapping_add(0x7fff + (bits >> 16 & 1))) >> 16;
    let quiet_nan = bits >> 16 | 0x40;
    let kept = if magnitude > 0x7f80_0000 {
        quiet_nan
    } else {
        rounded
    };
    if magnitude < 0x0080_0000 {
        bits >> 16 & 0x8000
    } else {
        kept
    }
}

/// e^x in f32, the same operations on every instruction set: `x = n ln 2 + r`, a
/// polynomial of degree 7 in r (Taylor's coefficients; |r| <= 0.347), times 2^n.
/// Relative error below 1.3e-7. Below -87 the result is 0, so that it is never a
/// denormal; above 88.7 it is infinite.
#[inline(always)]
pub fn exp_f32(x: f32) -> f32 {
    let clamped = if x < exp::LEAST { exp::LEAST } else { x };
    let clamped = if clamped > 88.7 { 88.7 } else { clamped };
    let (p, n) = exp_parts(clamped);
    // 2^n in two factors: n = 128 alone would overflow the exponent field.
    let half = n >> 1;
    let y = p * power_of_2(half) * power_of_2(n - half);
    let y = if x < exp::LEAST { 0.0 } else { y };
    if x > 88.7 { f32::INFINITY } else { y }
}

/// As [`exp_f32`] for `x <= 88`, to the bit: then `n` is between -126 and 127, and neither one
/// factor `2^n` nor the product leaves the normal numbers. Two thirds of the operations.
#[inline(always)]
pub fn exp_small_f32(x: f32) -> f32 {
    let clamped = if x < exp::LEAST { exp::LEAST } else { x };
    let (p, n) = exp_parts(clamped);
    let y = p * power_of_2(n);
    if x < exp::LEAST { 0.0 } else { y }
}

/// Constants of e^x in f32.
pub(crate) mod exp {
    /// Adding it leaves the nearest integer in the low bits of the sum.
    pub(crate) const ROUND: f32 = 12_582_912.0;
    /// ln 2 in two parts, the first of few bits, so that its products with small integers are
    /// exact.
    pub(crate) const LN_2: [f32; 2] = [0.693_359_4, -2.121_944_4e-4];
    /// Factors of r^7 to r^0.
    pub(crate) const TERMS: [f32; 8] = [
        1.0 / 5040.0,
        1.0 / 720.0,
        1.0 / 120.0,
        1.0 / 24.0,
        1.0 / 6.0,
        0.5,
        1.0,
        1.0,
    ];
    /// Below, the result is 0.
    pub(crate) const LEAST: f32 = -87.0;
}

/// `e^r` and `n` with `x = n ln 2 + r`, for `x` from -87 to 88.7.
#[inline(always)]
fn exp_parts(x: f32) -> (f32, i32) {
    let shifted = f32::mul_add(x, std::f32::consts::LOG2_E, exp::ROUND);
    let n = shifted - exp::ROUND;
    let r = f32::mul_add(n, -exp::LN_2[0], x);
    let r = f32::mul_add(n, -exp::LN_2[1], r);
    let [first, rest @ ..] = exp::TERMS;
    let p = rest
        .into_iter()
        .fold(first, |p, term| f32::mul_add(p, r, term));
    let n = shifted.to_bits().wrapping_sub(exp::ROUND.to_bits()) as i32;
    (p, n)
}

/// `2^n` for the exponents of normal numbers.
#[inline(always)]
fn power_of_2(n: i32) -> f32 {
    f32::from_bits((n.wrapping_add(127) as u32) << 23)
}

/// Sum in the fixed order (ARCHITECTURE.md, Numbers): 16 lanes by index mod 16, then one tree.
#[inline(always)]
pub fn sum_lanes<R: Real>(values: impl ExactSizeIterator<Item = R>) -> R {
    let mut lanes = [R::ZERO; 16];
    for (i, x) in values.enumerate() {
        lanes[i % 16] += x;
    }
    tree(lanes)
}

/// `sum of f(i)` for `i < n` in the same order as [`sum_lanes`], in a form that compilers
/// vectorise.
#[inline(always)]
pub fn sum_indexed<R: Real>(n: usize, f: impl Fn(usize) -> R) -> R {
    let mut lanes = [R::ZERO; 16];
    let whole = n / 16 * 16;
    let mut i = 0;
    while i < whole {
        for (l, lane) in lanes.iter_mut().enumerate() {
            *lane += f(i + l);
        }
        i += 16;
    }
    for (l, lane) in lanes.iter_mut().enumerate().take(n - whole) {
        *lane += f(whole + l);
    }
    tree(lanes)
}

/// `sum of f` over the elements of slices of equal length, in the same order as
/// [`sum_lanes`]: sixteen at a time, so that no check of bounds stands in the inner loop.
///
/// # Panics
/// If a slice is shorter than the first.
#[inline(always)]
pub fn sum_slices<T: Copy, R: Real, const N: usize>(
    slices: [&[T]; N],
    f: impl Fn([T; N]) -> R,
) -> R {
    let n = slices[0].len();
    let slices = slices.map(|slice| &slice[..n]);
    let mut lanes = [R::ZERO; 16];
    for c in 0..n / 16 {
        let parts: [&[T; 16]; N] = slices.map(|slice| {
            let part = &slice[16 * c..16 * c + 16];
            part.try_into().expect("sixteen values")
        });
        for (l, lane) in lanes.iter_mut().enumerate() {
            *lane += f(parts.map(|part| part[l]));
        }
    }
    let whole = n / 16 * 16;
    for (l, lane) in lanes.iter_mut().enumerate().take(n - whole) {
        *lane += f(slices.map(|slice| slice[whole + l]));
    }
    tree(lanes)
}

/// The tree over 16 lanes, for loops that keep several sums.
#[inline(always)]
pub fn sum_lane_array<R: Real>(lanes: [R; 16]) -> R {
    tree(lanes)
}

#[inline(always)]
fn tree<R: Real>(lanes: [R; 16]) -> R {
    // Written out, compilers see four additions of vectors.
    let eight: [R; 8] = std::array::from_fn(|i| lanes[i] + lanes[i + 8]);
    let four: [R; 4] = std::array::from_fn(|i| eight[i] + eight[i + 4]);
    let two: [R; 2] = std::array::from_fn(|i| four[i] + four[i + 2]);
    two[0] + two[1]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_of_some_values() {
        let inf = f32::INFINITY;
        for (values, expected) in [
            (&[][..], -inf),
            (&[-inf, -inf], -inf),
            (&[-3.5, -0.25, -1e-40, -2.0], -1e-40),
            (&[-1.0, 7.0, 6.5], 7.0),
            (&[2.0, inf, -inf], inf),
        ] {
            assert_eq!(f32::largest(values), expected, "{values:?}");
        }
        for nan in [f32::NAN, -f32::NAN] {
            for at in 0..3 {
                let mut values = [inf, -inf, 1.0];
                values[at] = nan;
                assert!(f32::largest(&values).is_nan(), "{values:?}");
            }
        }
    }

    #[test]
    fn exp_is_accurate_over_its_range() {
        let mut worst = 0.0f64;
        for i in -870_000..=887_000 {
            let x = i as f32 * 1e-4;
            let exact = f64::from(x).exp();
            worst = worst.max((f64::from(exp_f32(x)) - exact).abs() / exact);
        }
        assert!(worst < 1.3e-7, "relative error {worst}");
        assert_eq!(exp_f32(0.0), 1.0);
        assert_eq!(exp_f32(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp_f32(-87.5), 0.0);
        assert_eq!(exp_f32(100.0), f32::INFINITY);
        assert!(exp_f32(f32::NAN).is_nan());
    }

    #[test]
    fn exp_of_what_is_small_has_the_same_bits() {
        let same = |x: f32| exp_small_f32(x).to_bits() == exp_f32(x).to_bits();
        // Every 100th number of either sign up to 88, and the edges.
        let magnitudes = (0..=88.0f32.to_bits()).step_by(100).map(f32::from_bits);
        for x in magnitudes.flat_map(|x| [x, -x]) {
            assert!(same(x), "{x}");
        }
        let edges = [
            88.0,
            -87.0,
            (-87.0f32).next_down(),
            -1e9,
            f32::MIN,
            f32::NEG_INFINITY,
        ];
        for x in edges {
            assert!(same(x), "{x}");
        }
        assert!(exp_small_f32(f32::NAN).is_nan());
    }

    #[test]
    fn bf16_rounding_equals_the_half_crate_on_normal_values() {
        for i in 0..100_000u32 {
            let x = f32::from_bits(i.wrapping_mul(42_949) ^ 0x3f80_0000);
            if x.is_normal() {
                assert_eq!(x.to_bf16(), bf16::from_f32(x), "{x}");
            }
        }
        assert_eq!(Real::to_bf16(1e-40f32).to_f32(), 0.0);
        assert!(Real::to_bf16(f32::NAN).is_nan());
        assert_eq!(Real::to_bf16(f32::MAX).to_f32(), f32::INFINITY);
    }

    #[test]
    fn min_exponent_ignores_zeros() {
        assert_eq!(f32::min_exponent(&[0.0, 3.0, -0.3, 0.0]), -2);
        assert_eq!(f32::min_exponent(&[0.0, -0.0]), i32::MAX);
        let stored = [0.0, 3.0, -0.3, -0.0].map(bf16::from_f32);
        assert_eq!(min_exponent_bf16(&stored), -2);
        assert_eq!(min_exponent_bf16(&stored[..1]), i32::MAX);
    }

    #[test]
    fn the_sums_agree_bit_for_bit() {
        for n in 0..100 {
            let x: Vec<f32> = (0..n).map(|i| (i as f32 * 0.37).sin()).collect();
            let a = sum_lanes(x.iter().copied());
            let b = sum_indexed(n, |i| x[i]);
            let c = sum_slices([&x], |[x]| x);
            assert_eq!([a, b].map(f32::to_bits), [c; 2].map(f32::to_bits));
        }
    }
}
