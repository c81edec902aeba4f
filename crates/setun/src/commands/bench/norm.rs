//! `setun bench layer-norm`: what memory should limit, with errors against f64.

use super::machine::memory_limit;
use super::{Bench, Figure, Limit, Unit, uniform};
use setun_backend::{
    ActBuf, Backend, Buf, Category, Host, HostWorkspace, LayerNorm, LayerNormBackward, Limits,
    Plan, Real, RmsNorm, StoredBuf,
};

/// Both norms at every width.
pub(super) fn run(bench: &Bench, rows: usize, widths: &[usize]) -> Vec<Figure> {
    let limit = memory_limit(bench);
    let each = widths.iter();
    each.flat_map(|&width| measure(bench, rows, width, limit))
        .collect()
}

/// Every second row has mean 1e4 and spread 1e-3.
fn inputs(rows: usize, width: usize) -> Vec<f32> {
    let mut x = uniform(1, rows * width);
    for row in x.chunks_mut(width).step_by(2) {
        row.iter_mut().for_each(|x| *x = 1e4 + 1e-3 * *x);
    }
    x
}

/// Both norms over the same rows.
struct Norms<R: Real> {
    host: Host<R>,
    y: Buf<R>,
    layer: LayerNormBackward<R>,
    rms: RmsNorm<R>,
}

/// Gradients of a norm.
struct Gradients {
    dx: Vec<f64>,
    dgamma: Vec<f64>,
}

impl<R: Real> Norms<R> {
    fn new(bench: &Bench, rows: usize, width: usize) -> Self {
        let n = rows * width;
        let mut plan = Plan::new();
        let mut real = |n| plan.alloc::<R>(Category::Activations, "values", n);
        let (x, y, dy, dx) = (real(n), real(n), real(n), real(n));
        let forward = LayerNorm {
            x: StoredBuf::Real(x),
            gamma: real(width),
            beta: real(width),
            center: real(rows),
            rest: real(rows),
            inv: real(rows),
            width,
            eps: 1e-5,
        };
        let layer = LayerNormBackward {
            forward,
            dy,
            dx,
            accumulate: false,
            dgamma: real(width),
            dbeta: real(width),
            partial: real(LayerNormBackward::<R>::partial_len(rows, width)),
        };
        let rms = RmsNorm {
            x,
            weight: forward.gamma,
            inv: real(rows),
            width,
            eps: 1e-6,
        };
        let limits = Limits {
            width,
            head_dim: 1,
            group_size: 128,
        };
        let workspace = HostWorkspace::reserve(&mut plan, bench.threads, limits);
        let mut host = Host::new(&plan, workspace, bench.isa);
        let given = [
            (x, inputs(rows, width)),
            (dy, uniform(2, n)),
            (forward.gamma, uniform(3, width)),
        ];
        for (to, values) in given {
            let values: Vec<R> = values.into_iter().map(R::from_f32).collect();
            host.write(to, &values);
        }
        Self {
            host,
            y,
            layer,
            rms,
        }
    }

    fn layer_backward(&mut self) {
        self.host.layer_norm_backward(self.layer);
    }

    fn rms_backward(&mut self) {
        let LayerNormBackward { dy, dx, dgamma, .. } = self.layer;
        self.host.rms_norm_backward(self.rms, dy, dx, dgamma);
    }

    /// Gradients of LayerNorm and of RMSNorm.
    fn gradients(&mut self) -> [Gradients; 2] {
        self.host
            .layer_norm(self.layer.forward, ActBuf::Real(self.y));
        self.host.rms_norm(self.rms, ActBuf::Real(self.y));
        [Self::layer_backward, Self::rms_backward].map(|backward| {
            self.host.zero(self.layer.dx);
            self.host.zero(self.layer.dgamma);
            backward(self);
            Gradients {
                dx: self.values(self.layer.dx),
                dgamma: self.values(self.layer.dgamma),
            }
        })
    }

    fn values(&self, buf: Buf<R>) -> Vec<f64> {
        let mut values = vec![R::ZERO; buf.len()];
        self.host.read(buf, &mut values);
        values.into_iter().map(R::to_f64).collect()
    }
}

/// 2-norm of the difference over that of the exact values.
fn error(got: &[f64], exact: &[f64]) -> f64 {
    let both = got.iter().zip(exact);
    let difference: f64 = both.map(|(g, e)| (g - e) * (g - e)).sum();
    let size: f64 = exact.iter().map(|e| e * e).sum();
    (difference / size).sqrt()
}

fn measure(bench: &Bench, rows: usize, width: usize, limit: Limit) -> [Figure; 4] {
    let exact = Norms::<f64>::new(bench, rows, width).gradients();
    let mut norms = Norms::<f32>::new(bench, rows, width);
    let got = norms.gradients();
    let errors = |i: usize| {
        vec![
            ("dx_error", error(&got[i].dx, &exact[i].dx)),
            ("dgamma_error", error(&got[i].dgamma, &exact[i].dgamma)),
        ]
    };
    // Bytes a value: what is read and written, once.
    let figure = |name, bytes: usize, seconds, facts| Figure {
        name: format!("{name}, {rows} x {width}"),
        seconds,
        work: (rows * width * bytes) as f64,
        unit: Unit::Bytes,
        limit: Some(limit),
        facts,
    };
    let (layer, rms, y) = (norms.layer.forward, norms.rms, ActBuf::Real(norms.y));
    let layer_forward = bench.median(|| norms.host.layer_norm(layer, y));
    let layer_backward = bench.median(|| norms.layer_backward());
    let rms_forward = bench.median(|| norms.host.rms_norm(rms, y));
    let rms_backward = bench.median(|| norms.rms_backward());
    [
        figure("layer norm forward", 8, layer_forward, Vec::new()),
        figure("layer norm backward", 12, layer_backward, errors(0)),
        figure("rms norm forward", 8, rms_forward, Vec::new()),
        // It adds to dx, which is read as well.
        figure("rms norm backward", 16, rms_backward, errors(1)),
    ]
}
