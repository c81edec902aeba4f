//! Muon (Jordan et al., 2024): momentum whose direction is made orthogonal, for the matrices
//! of the layers. With the scale of the update matched to AdamW's (Liu et al., 2025, "Muon is
//! scalable for LLM training"), so that learning rates and decay carry over.
//!
//! With gradient `g`, momentum `m` and a matrix `[rows, cols]`:
//!
//! - `m = mu m + g`, and Nesterov's look ahead `u = g + mu m`;
//! - `x = u / |u|`, then five times `x = q x` with `q = a + b (x x^T) + c (x x^T)^2` (Newton and
//!   Schulz), which drives all singular values of `x` towards 1;
//! - `w = w - lr decay w - lr 0.2 sqrt(max(rows, cols)) x`.
//!
//! What the iteration multiplies `x` by depends on `s = x x^T` alone, and `s` becomes `q s q`. So
//! it runs on `s`, the shorter side squared, and `x` is multiplied once, by the product of the
//! five `q`. All of these are polynomials of the first `s`: symmetric, so that of each product
//! only what is on and below the diagonal is computed, in strips of rows.
//!
//! The products are the backend's, in f32, so the bits do not depend on threads; what runs
//! over single values is done here, in ascending order.

use setun_backend::{ActBuf, Backend, Buf, Category, Plan, WeightBuf, WeightData};
use setun_model::{Parameter, Parameters, is_embedding};

/// Coefficients of the iteration, tuned to be steep at zero (Jordan et al.).
const COEFFICIENTS: [f32; 3] = [3.4445, -4.7750, 2.0315];
const ITERATIONS: usize = 5;
/// Rows of a symmetric product that are computed at once: few compute less above the diagonal,
/// many read their right-hand side less often.
const STRIP: usize = 128;
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

/// Scratch of the updates, large enough for every matrix. What is square has the length of
/// the shorter side of `x`.
pub struct Muon {
    options: MuonOptions,
    x: Buf<f32>,
    next: Buf<f32>,
    squares: Squares,
    first: Vec<f32>,
    second: Vec<f32>,
}

/// Square matrices of the iteration.
#[derive(Clone, Copy)]
struct Squares {
    /// `s`, the gram matrix.
    gram: Buf<f32>,
    /// `s s`, then `q s`.
    other: Buf<f32>,
    /// `q`
    factor: Buf<f32>,
    /// The product of all `q` so far.
    all: Buf<f32>,
    /// Result of a strip of rows.
    strip: Buf<f32>,
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
        Self::with_room(plan, len, side, options)
    }

    /// Room for matrices of `len` values whose shorter side is at most `side`.
    fn with_room(plan: &mut Plan, len: usize, side: usize, options: MuonOptions) -> Self {
        let mut alloc =
            |name: &str, len: usize| plan.alloc(Category::Optimizer, format!("muon {name}"), len);
        let square = side * side;
        Self {
            options,
            x: alloc("x", len),
            next: alloc("next x", len),
            squares: Squares {
                gram: alloc("gram", square),
                other: alloc("gram product", square),
                factor: alloc("factor", square),
                all: alloc("all factors", square),
                strip: alloc("strip", STRIP.min(side) * side),
            },
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
        let (long, tall) = (p.rows.max(p.cols), p.rows > p.cols);
        if tall {
            transpose(ahead, p.cols, values);
        }
        b.write(self.x.part(0, n), if tall { values } else { ahead });
        self.orthogonalize(b, n / long, long);

        let (direction, weights) = (&mut self.first[..n], &mut self.second[..n]);
        b.read(self.x.part(0, n), direction);
        if tall {
            transpose(direction, p.rows, weights);
            direction.copy_from_slice(weights);
        }
        b.read(p.values(), weights);
        let keep = (1.0 - step.lr * step.weight_decay) as f32;
        let scale = MATCHED_RMS * (long as f64).sqrt();
        let rate = (step.lr * scale) as f32;
        for (w, &x) in weights.iter_mut().zip(&*direction) {
            *w = *w * keep - rate * x;
        }
        b.write(p.values(), weights);
    }

    /// Brings the singular values of `x` `[side, long]`, `side <= long`, near 1.
    fn orthogonalize<B: Backend<Real = f32>>(&mut self, b: &mut B, side: usize, long: usize) {
        let n = side * side;
        let of = |buf: Buf<f32>| buf.part(0, n);
        let s = Squares {
            gram: of(self.squares.gram),
            other: of(self.squares.other),
            factor: of(self.squares.factor),
            all: of(self.squares.all),
            strip: self.squares.strip,
        };
        let x = self.x.part(0, side * long);
        self.symmetric(b, (x, x), long, s.gram);
        for iteration in 0..ITERATIONS {
            self.symmetric(b, (s.gram, s.gram), side, s.other);
            self.write_factor(b, s, side);
            if iteration == 0 {
                b.copy(s.factor, s.all);
            } else {
                self.symmetric(b, (s.factor, s.all), side, s.all);
            }
            if iteration + 1 < ITERATIONS {
                self.symmetric(b, (s.factor, s.gram), side, s.other);
                self.symmetric(b, (s.other, s.factor), side, s.gram);
            }
        }
        let next = self.next.part(0, side * long);
        b.linear_dx(s.all, dense(x, side, long), next, true, false);
        std::mem::swap(&mut self.x, &mut self.next);
    }

    /// `q = a + b s + c s s`
    fn write_factor<B: Backend<Real = f32>>(&mut self, b: &mut B, s: Squares, side: usize) {
        let n = side * side;
        let (gram, squared) = (&mut self.first[..n], &mut self.second[..n]);
        b.read(s.gram, gram);
        b.read(s.other, squared);
        let [one, linear, quadratic] = COEFFICIENTS;
        for (i, (s, &g)) in squared.iter_mut().zip(&*gram).enumerate() {
            let diagonal = if i / side == i % side { one } else { 0.0 };
            *s = diagonal + linear * g + quadratic * *s;
        }
        b.write(s.factor, squared);
    }

    /// `out = left right^T` for `[side, inner]` matrices whose product is symmetric: what is on
    /// and below the diagonal is computed and written to both halves. `out` may be one of the
    /// two: it is written last.
    fn symmetric<B: Backend<Real = f32>>(
        &mut self,
        b: &mut B,
        (left, right): (Buf<f32>, Buf<f32>),
        inner: usize,
        out: Buf<f32>,
    ) {
        let side = left.len() / inner;
        let (strip, full) = (&mut self.first, &mut self.second[..side * side]);
        for start in (0..side).step_by(STRIP) {
            let end = side.min(start + STRIP);
            let rows = end - start;
            let part = self.squares.strip.part(0, rows * end);
            let x = ActBuf::Real(left.part(start * inner, rows * inner));
            b.linear(x, dense(right.part(0, end * inner), end, inner), part);
            b.read(part, &mut strip[..rows * end]);
            for c in 0..end {
                for r in start.max(c)..end {
                    full[c * side + r] = strip[(r - start) * end + c];
                }
            }
            for r in start..end {
                let row = &strip[(r - start) * end..][..=r];
                full[r * side..][..=r].copy_from_slice(row);
            }
        }
        b.write(out, full);
    }
}

/// `values` `[out, inp]` as a weight of products.
fn dense(values: Buf<f32>, out: usize, inp: usize) -> WeightBuf<f32> {
    WeightBuf {
        out,
        inp,
        data: WeightData::Dense(values),
    }
}

/// Writes `from` `[rows, cols]` to `to` as `[cols, rows]`.
fn transpose(from: &[f32], cols: usize, to: &mut [f32]) {
    /// Rows and columns of a block, which stays in the first level of the cache.
    const SIDE: usize = 16;
    let rows = from.len() / cols;
    for r in (0..rows).step_by(SIDE) {
        for c in (0..cols).step_by(SIDE) {
            for c in c..cols.min(c + SIDE) {
                for r in r..rows.min(r + SIDE) {
                    to[c * rows + r] = from[r * cols + c];
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use setun_backend::philox::Philox;
    use setun_backend::{Host, HostWorkspace, Isa, Limits};
    use setun_model::Form;

    const OPTIONS: MuonOptions = MuonOptions {
        momentum: 0.9,
        adamw_share: 1.0,
    };

    fn host(plan: &mut Plan, width: usize, threads: usize) -> Host<f32> {
        let limits = Limits {
            width,
            head_dim: 8,
            group_size: 8,
        };
        let workspace = HostWorkspace::reserve(plan, threads, limits);
        Host::new(plan, workspace, Isa::detect())
    }

    /// What the iteration makes of `x` `[rows, cols]`, `rows <= cols`.
    fn orthogonal(x: &[f32], rows: usize, threads: usize) -> Vec<f32> {
        let (mut plan, cols) = (Plan::new(), x.len() / rows);
        let mut muon = Muon::with_room(&mut plan, x.len(), rows, OPTIONS);
        let mut host = host(&mut plan, cols, threads);
        host.write(muon.x, x);
        muon.orthogonalize(&mut host, rows, cols);
        let mut out = vec![0.0f32; x.len()];
        host.read(muon.x, &mut out);
        out
    }

    /// The iteration as the paper has it, in f64: every time through `x`.
    fn literal(x: &[f32], rows: usize) -> Vec<f64> {
        let cols = x.len() / rows;
        let mut x: Vec<f64> = x.iter().map(|&x| x.into()).collect();
        let product = |left: &[f64], right: &[f64]| -> Vec<f64> {
            let cols = right.len() / rows;
            (0..rows * cols)
                .map(|e| {
                    let (i, j) = (e / cols, e % cols);
                    let terms = (0..rows).map(|k| left[i * rows + k] * right[k * cols + j]);
                    terms.sum()
                })
                .collect()
        };
        let [one, linear, quadratic] = COEFFICIENTS.map(f64::from);
        for _ in 0..ITERATIONS {
            let gram: Vec<f64> = (0..rows * rows)
                .map(|e| {
                    let (i, j) = (e / rows, e % rows);
                    (0..cols).map(|k| x[i * cols + k] * x[j * cols + k]).sum()
                })
                .collect();
            let mut factor = product(&gram, &gram);
            for (e, s) in factor.iter_mut().enumerate() {
                let diagonal = if e / rows == e % rows { one } else { 0.0 };
                *s = diagonal + linear * gram[e] + quadratic * *s;
            }
            x = product(&factor, &x);
        }
        x
    }

    /// Random `[rows, cols]` of norm 1, whose row `i` is `decay^i` as long as the first.
    fn random(rows: usize, cols: usize, decay: f64) -> Vec<f32> {
        let random = Philox::new(3, 0);
        let x: Vec<f64> = (0..rows * cols)
            .map(|e| random.normal_pair(e as u64).0 * decay.powi((e / cols) as i32))
            .collect();
        let norm = x.iter().map(|x| x * x).sum::<f64>().sqrt();
        x.iter().map(|x| (x / norm) as f32).collect()
    }

    #[test]
    fn the_iteration_on_the_gram_matrix_is_the_iteration_on_the_matrix() {
        let shapes = [
            (6, 40, 1.0),
            (12, 12, 1.0),
            (150, 170, 1.0),
            (130, 260, 0.9),
            (9, 9, 0.1),
        ];
        for (rows, cols, decay) in shapes {
            let x = random(rows, cols, decay);
            let (got, wanted) = (orthogonal(&x, rows, 1), literal(&x, rows));
            let off = |(&got, wanted): (&f32, &f64)| (f64::from(got) - wanted).powi(2);
            let error = got.iter().zip(&wanted).map(off).sum::<f64>().sqrt();
            let norm = wanted.iter().map(|x| x * x).sum::<f64>().sqrt();
            assert!(error < 1e-3 * norm, "{rows} x {cols}: {error} of {norm}");
            // Rows of one length, fewer than columns by far: singular values near 1.
            if cols >= 6 * rows {
                let rms = norm / (rows as f64).sqrt();
                assert!((0.8..1.2).contains(&rms), "{rows} x {cols}: {rms}");
            }
            let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&got), bits(&orthogonal(&x, rows, 3)));
        }
    }

    /// Weights `[rows, cols]` that are zero, after one update with gradient and momentum.
    fn updated(gradient: &[f32], momentum: &[f32], rows: usize) -> Vec<f32> {
        let (mut plan, cols) = (Plan::new(), gradient.len() / rows);
        let mut alloc = |name: &str| plan.alloc(Category::Optimizer, name, rows * cols);
        let [weights, gradients, momenta] = ["w", "g", "m"].map(&mut alloc);
        let p = Parameter {
            name: "model.layers.0.mlp.up_proj.weight".to_owned(),
            rows,
            cols,
            is_matrix: true,
            latent: Some(weights),
            grad: Some(gradients),
            ternary: None,
            packed: None,
            blend: None,
            form: Form::Latent,
            frozen: false,
        };
        let mut muon = Muon::with_room(&mut plan, rows * cols, rows.min(cols), OPTIONS);
        let mut host = host(&mut plan, rows.max(cols), 1);
        host.write(gradients, gradient);
        host.write(momenta, momentum);
        let step = MuonStep {
            lr: 0.01,
            weight_decay: 0.1,
            grad_scale: 0.5,
        };
        muon.update(&mut host, &p, momenta, step);
        let mut out = vec![0.0; rows * cols];
        host.read(weights, &mut out);
        out
    }

    #[test]
    fn a_tall_matrix_is_updated_as_its_transpose() {
        let (rows, cols) = (20, 33);
        let turn = |x: &[f32]| {
            let mut turned = vec![0.0; x.len()];
            transpose(x, cols, &mut turned);
            turned
        };
        let (g, m) = (random(rows, cols, 0.9), random(rows, cols, 1.1));
        let wide = updated(&g, &m, rows);
        assert_eq!(turn(&wide), updated(&turn(&g), &turn(&m), cols));
        // Along `u = g + mu m` of `m = mu m + g`, whose singular values have become about 1.
        let mu = OPTIONS.momentum as f32;
        let u = g
            .iter()
            .zip(&m)
            .map(|(g, m)| 0.5 * g + mu * (mu * m + 0.5 * g));
        let along: f32 = u.zip(&wide).map(|(u, w)| u * w).sum();
        assert!(along < 0.0, "{along}");
    }

    #[test]
    fn a_transposed_transpose_is_the_matrix() {
        for (rows, cols) in [(1, 5), (17, 33), (32, 16)] {
            let values: Vec<f32> = (0..rows * cols).map(|i| i as f32).collect();
            let (mut there, mut back) = (vec![0.0; values.len()], vec![0.0; values.len()]);
            transpose(&values, cols, &mut there);
            assert_eq!(there[rows - 1], values[(rows - 1) * cols]);
            transpose(&there, rows, &mut back);
            assert_eq!(values, back);
        }
    }
}
