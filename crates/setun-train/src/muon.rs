//! Muon (Jordan et al., 2024): momentum whose direction is made orthogonal, for the matrices
//! of the layers. With the scale of the update matched to AdamW's (Liu et al., 2025, "Muon is
//! scalable for LLM training"), so that learning rates and decay carry over.
//!
//! With gradient `g`, momentum `m` and a matrix `[rows, cols]`:
//!
//! - `m = mu m + g`, and Nesterov's look ahead `u = g + mu m`;
//! - `x = u / |u|`, then five times `x = a x + b (x x^T) x + c (x x^T)^2 x` (Newton and
//!   Schulz), which drives all singular values of `x` towards 1;
//! - `w = w - lr decay w - lr 0.2 sqrt(max(rows, cols)) x`.
//!
//! The products are the backend's, in f32, so the bits do not depend on threads; what runs
//! over single values is done here, in ascending order.

use setun_backend::{ActBuf, Backend, Buf, Category, Plan, WeightBuf, WeightData};
use setun_model::{Parameter, Parameters, is_embedding};

/// Coefficients of the iteration, tuned to be steep at zero (Jordan et al.).
const COEFFICIENTS: [f32; 3] = [3.4445, -4.7750, 2.0315];
const ITERATIONS: usize = 5;
/// Root mean square of an update of AdamW, which that of Muon is made to match.
const MATCHED_RMS: f64 = 0.2;
/// Added to the norm, so that a gradient of zero stays one.
const EPS: f64 = 1e-7;

/// Constants of Muon.
#[derive(Clone, Copy, Debug)]
pub struct MuonOptions {
    /// Decay of the momentum.
    pub momentum: f64,
    /// Learning rate of what AdamW updates beside it, as a share of Muon's.
    pub adamw_share: f64,
}

/// Scratch of the updates, large enough for every matrix.
pub struct Muon {
    options: MuonOptions,
    x: Buf<f32>,
    next: Buf<f32>,
    gram: Buf<f32>,
    square: Buf<f32>,
    first: Vec<f32>,
    second: Vec<f32>,
}

/// What differs from update to update.
#[derive(Clone, Copy, Debug)]
pub struct MuonStep {
    /// Learning rate.
    pub lr: f64,
    /// Decoupled decay.
    pub weight_decay: f64,
    /// Factor on the gradient: the clipping.
    pub grad_scale: f64,
}

/// Whether Muon updates this parameter: a matrix of a layer.
pub fn is_updated<R>(p: &Parameter<R>) -> bool {
    p.is_matrix && !p.frozen && !is_embedding(&p.name)
}

impl Muon {
    /// Reserves its scratch memory.
    pub fn reserve(plan: &mut Plan, parameters: &Parameters<f32>, options: MuonOptions) -> Self {
        let matrices = || parameters.list.iter().filter(|p| is_updated(p));
        let len = matrices().map(Parameter::numel).max().unwrap_or(0);
        let side = matrices().map(|p| p.rows.min(p.cols)).max().unwrap_or(0);
        let mut alloc =
            |name: &str, len: usize| plan.alloc(Category::Optimizer, format!("muon {name}"), len);
        Self {
            options,
            x: alloc("x", len),
            next: alloc("next x", len),
            gram: alloc("gram", side * side),
            square: alloc("gram squared", side * side),
            first: vec![0.0; len],
            second: vec![0.0; len],
        }
    }

    /// Its constants.
    pub fn options(&self) -> MuonOptions {
        self.options
    }

    /// One update of `p`, whose momentum is `momentum`.
    pub fn update<B: Backend<Real = f32>>(
        &mut self,
        b: &mut B,
        p: &Parameter<f32>,
        momentum: Buf<f32>,
        step: MuonStep,
    ) {
        let n = p.numel();
        let (ahead, values) = (&mut self.first[..n], &mut self.second[..n]);
        b.read(p.gradient(), ahead);
        b.read(momentum, values);
        let mu = self.options.momentum as f32;
        for (g, m) in ahead.iter_mut().zip(&mut *values) {
            *g *= step.grad_scale as f32;
            *m = mu * *m + *g;
            *g += mu * *m;
        }
        b.write(momentum, values);
        let squares = ahead.iter().map(|&g| f64::from(g) * f64::from(g));
        let inverse = (1.0 / (squares.sum::<f64>().sqrt() + EPS)) as f32;
        ahead.iter_mut().for_each(|g| *g *= inverse);
        b.write(self.x.part(0, n), ahead);
        self.orthogonalize(b, p.rows, p.cols);

        let (direction, weights) = (&mut self.first[..n], &mut self.second[..n]);
        b.read(self.x.part(0, n), direction);
        b.read(p.values(), weights);
        let keep = (1.0 - step.lr * step.weight_decay) as f32;
        let scale = MATCHED_RMS * (p.rows.max(p.cols) as f64).sqrt();
        let rate = (step.lr * scale) as f32;
        for (w, &x) in weights.iter_mut().zip(&*direction) {
            *w = *w * keep - rate * x;
        }
        b.write(p.values(), weights);
    }

    /// Brings the singular values of `x` `[rows, cols]` near 1. All five iterations go
    /// through the smaller of `x x^T` and `x^T x`, to which a polynomial is applied first.
    fn orthogonalize<B: Backend<Real = f32>>(&mut self, b: &mut B, rows: usize, cols: usize) {
        let (n, side) = (rows * cols, rows.min(cols));
        let (gram, square) = (
            self.gram.part(0, side * side),
            self.square.part(0, side * side),
        );
        let matrix = |values: Buf<f32>, out: usize, inp: usize| WeightBuf {
            out,
            inp,
            data: WeightData::Dense(values),
        };
        for _ in 0..ITERATIONS {
            let (x, next) = (self.x.part(0, n), self.next.part(0, n));
            if rows <= cols {
                b.linear(ActBuf::Real(x), matrix(x, rows, cols), gram);
            } else {
                b.zero(gram);
                b.linear_dw(x, ActBuf::Real(x), cols, cols, gram);
            }
            // The gram matrix is symmetric to the last bit: both halves are the same sums.
            b.linear(ActBuf::Real(gram), matrix(gram, side, side), square);
            let (first, second) = (
                &mut self.first[..side * side],
                &mut self.second[..side * side],
            );
            b.read(gram, first);
            b.read(square, second);
            let [one, linear, quadratic] = COEFFICIENTS;
            for (i, (g, &s)) in first.iter_mut().zip(&*second).enumerate() {
                let diagonal = if i / side == i % side { one } else { 0.0 };
                *g = diagonal + linear * *g + quadratic * s;
            }
            b.write(gram, first);
            if rows <= cols {
                b.linear_dx(gram, matrix(x, rows, cols), next, true, false);
            } else {
                b.linear(ActBuf::Real(x), matrix(gram, cols, cols), next);
            }
            std::mem::swap(&mut self.x, &mut self.next);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use setun_backend::philox::Philox;
    use setun_backend::{Host, HostWorkspace, Isa, Limits};

    /// `x x^T` or `x^T x`, the smaller one, of what the iteration makes of random values.
    fn gram(rows: usize, cols: usize, threads: usize) -> (Vec<f32>, Vec<f32>) {
        let mut plan = Plan::new();
        let (n, side) = (rows * cols, rows.min(cols));
        let mut alloc = |len| plan.alloc(Category::Workspace, "", len);
        let mut muon = Muon {
            options: MuonOptions {
                momentum: 0.9,
                adamw_share: 1.0,
            },
            x: alloc(n),
            next: alloc(n),
            gram: alloc(side * side),
            square: alloc(side * side),
            first: vec![0.0; n],
            second: vec![0.0; n],
        };
        let limits = Limits {
            width: rows.max(cols),
            head_dim: 8,
            group_size: 8,
        };
        let workspace = HostWorkspace::reserve(&mut plan, threads, limits);
        let mut host = Host::<f32>::new(&plan, workspace, Isa::detect());
        let random = Philox::new(3, 0);
        let values: Vec<f32> = (0..n as u64)
            .map(|i| (random.normal_pair(i).0 / (n as f64).sqrt()) as f32)
            .collect();
        host.write(muon.x, &values);
        muon.orthogonalize(&mut host, rows, cols);
        let mut x = vec![0.0f32; n];
        host.read(muon.x, &mut x);
        let at = |i: usize, k: usize| match rows <= cols {
            true => x[i * cols + k],
            false => x[k * cols + i],
        };
        let dot = |i: usize, j: usize| (0..rows.max(cols)).map(|k| at(i, k) * at(j, k)).sum();
        let gram = (0..side * side).map(|e| dot(e / side, e % side));
        (gram.collect(), x)
    }

    #[test]
    fn singular_values_come_near_one_in_both_shapes() {
        for (rows, cols) in [(6, 40), (40, 6), (12, 12)] {
            let (gram, x) = gram(rows, cols, 1);
            let side = rows.min(cols);
            // The squares of the singular values lie on the diagonal, and in their mean.
            let trace = (0..side).map(|i| gram[i * side + i]).sum::<f32>() / side as f32;
            assert!((0.5..1.5).contains(&trace), "{rows} x {cols}: {trace}");
            assert_eq!(
                gram_bits(&x),
                gram_bits(&super::tests::gram(rows, cols, 3).1)
            );
        }
        // Far from square, they are all within the iteration's band around 1.
        let (gram, _) = gram(6, 40, 1);
        for (e, value) in gram.iter().enumerate() {
            let wanted = if e / 6 == e % 6 {
                0.45..1.6
            } else {
                -0.35..0.35
            };
            assert!(wanted.contains(value), "{e}: {value}");
        }
    }

    fn gram_bits(x: &[f32]) -> Vec<u32> {
        x.iter().map(|x| x.to_bits()).collect()
    }
}
