//! LayerNorm: accuracy against a plain f64 computation on the same stored inputs, hard
//! rows, and the operation on its own against the backend's.

mod rig;

use half::bf16;
use rig::{Rig, bits, content, content_bits, machines, randoms};
use setun_backend::kernels::attention::Store;
use setun_backend::kernels::layer_norm::Statistics;
use setun_backend::layer_norm::{LayerNormError, LayerNormShape, Upstream, backward, forward};
use setun_backend::{ActBuf, Backend, LayerNorm, LayerNormBackward, Limits, Real, StoredBuf};

const EPS: f64 = 1e-5;

/// Results and gradients of a LayerNorm.
struct Results<R> {
    y: Vec<R>,
    dx: Vec<R>,
    dgamma: Vec<R>,
    dbeta: Vec<R>,
}

/// The operation on its own.
fn run<R: Real, S: Store<R>>(x: &[S], gamma: &[R], beta: &[R], dy: &[R]) -> Results<R> {
    let width = gamma.len();
    let rows = x.len() / width;
    let shape = LayerNormShape {
        batch: 1,
        seq: rows,
        width,
        eps: EPS,
    };
    let room = |n: usize| vec![R::ZERO; n];
    let (mut y, mut dx) = (room(x.len()), room(x.len()));
    let (mut dgamma, mut dbeta) = (room(width), room(width));
    let (mut center, mut rest, mut inv) = (room(rows), room(rows), room(rows));
    let keep = Statistics {
        center: &mut center[..],
        rest: &mut rest[..],
        inv: &mut inv[..],
    };
    forward(shape, x, gamma, beta, &mut y, keep).expect("a possible shape");
    let saved = Statistics {
        center: &center[..],
        rest: &rest[..],
        inv: &inv[..],
    };
    let inputs = Upstream { x, gamma, dy };
    backward(shape, inputs, saved, &mut dx, &mut dgamma, &mut dbeta).expect("a possible shape");
    Results {
        y,
        dx,
        dgamma,
        dbeta,
    }
}

/// The definition, in f64 and in the plainest order.
fn definition(x: &[f64], gamma: &[f64], beta: &[f64], dy: &[f64]) -> Results<f64> {
    let width = gamma.len();
    let n = width as f64;
    let mut all = Results {
        y: Vec::new(),
        dx: Vec::new(),
        dgamma: vec![0.0; width],
        dbeta: vec![0.0; width],
    };
    for (x, dy) in x.chunks(width).zip(dy.chunks(width)) {
        let mean = x.iter().sum::<f64>() / n;
        let variance = x.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / n;
        let inv = 1.0 / (variance + EPS).sqrt();
        let xhat: Vec<f64> = x.iter().map(|x| (x - mean) * inv).collect();
        let g: Vec<f64> = dy.iter().zip(gamma).map(|(dy, gamma)| dy * gamma).collect();
        let a = g.iter().sum::<f64>() / n;
        let b = g.iter().zip(&xhat).map(|(g, x)| g * x).sum::<f64>() / n;
        for i in 0..width {
            all.y.push(xhat[i] * gamma[i] + beta[i]);
            all.dx.push(inv * (g[i] - a - xhat[i] * b));
            all.dgamma[i] += dy[i] * xhat[i];
            all.dbeta[i] += dy[i];
        }
    }
    all
}

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

/// 2-norm of the difference over that of the exact values.
fn error(got: &[f32], exact: &[f64]) -> f64 {
    let difference = got
        .iter()
        .zip(exact)
        .map(|(&g, e)| (f64::from(g) - e).powi(2));
    let size = exact.iter().map(|e| e * e).sum::<f64>();
    (difference.sum::<f64>() / size).sqrt()
}

fn check_errors(name: &str, got: &Results<f32>, exact: &Results<f64>) {
    let pairs = [
        ("y", &got.y, &exact.y),
        ("dx", &got.dx, &exact.dx),
        ("dgamma", &got.dgamma, &exact.dgamma),
        ("dbeta", &got.dbeta, &exact.dbeta),
    ];
    for (part, got, exact) in pairs {
        let error = error(got, exact);
        assert!(error <= 1e-6, "{name}: {part} is off by {error:.2e}");
    }
}

/// Gamma, beta and dy of a test.
fn upstream(rows: usize, width: usize) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
    (
        randoms(2, width),
        randoms(3, width),
        randoms(4, rows * width),
    )
}

/// `(index, column, normal value) -> value`
type Value<'a> = &'a dyn Fn(usize, usize, f32) -> f32;

#[test]
fn errors_stay_below_a_millionth_on_hard_rows() {
    let normal = |i: usize, z: f32| z + (i % 3) as f32;
    let kinds: [(&str, Value<'_>); 5] = [
        ("normal", &|i, _, z| normal(i, z)),
        ("mean 1e4, spread 1e-3", &|_, _, z| 1e4 + 1e-3 * z),
        ("mean -1e4, spread 1", &|_, _, z| -1e4 + z),
        ("the first value is an outlier", &|_, c, z| {
            if c == 0 { 1e4 } else { z }
        }),
        ("mean 1e-4, spread 1e-6", &|_, _, z| 1e-4 + 1e-6 * z),
    ];
    for (name, value) in kinds {
        for (rows, width) in [(130, 257), (70, 1024), (65, 4096)] {
            let z = randoms::<f32>(1, rows * width);
            let each = z.iter().enumerate();
            let x: Vec<f32> = each.map(|(i, &z)| value(i, i % width, z)).collect();
            let (gamma, beta, dy) = upstream(rows, width);
            let got = run(&x, &gamma, &beta, &dy);
            let exact = definition(&wide(&x), &wide(&gamma), &wide(&beta), &wide(&dy));
            check_errors(&format!("{name}, {rows} x {width}"), &got, &exact);
        }
    }
}

#[test]
fn bf16_input_is_read_as_it_is() {
    let (rows, width) = (70, 300);
    let values = randoms::<f32>(1, rows * width);
    let x: Vec<bf16> = values.iter().map(|&z| bf16::from_f32(100.0 + z)).collect();
    let real: Vec<f32> = x.iter().map(|x| x.to_f32()).collect();
    let (gamma, beta, dy) = upstream(rows, width);
    let got = run(&x, &gamma, &beta, &dy);
    let exact = definition(&wide(&real), &wide(&gamma), &wide(&beta), &wide(&dy));
    check_errors("bf16", &got, &exact);
    let same = run(&real, &gamma, &beta, &dy);
    assert_eq!(bits(&got.y), bits(&same.y));
    assert_eq!(bits(&got.dx), bits(&same.dx));
}

#[test]
fn constant_rows_give_beta_and_a_finite_gradient() {
    for value in [0.0f32, 0.1, -1e4, 3e38, 1e-40] {
        let width = 100;
        let (gamma, beta, dy) = upstream(3, width);
        let x = vec![value; 3 * width];
        let got = run(&x, &gamma, &beta, &dy);
        for y in got.y.chunks(width) {
            assert_eq!(bits(y), bits(&beta), "rows of {value}");
        }
        let exact = definition(&wide(&x), &wide(&gamma), &wide(&beta), &wide(&dy));
        assert!(error(&got.dx, &exact.dx) <= 1e-6, "rows of {value}");
        assert!(got.dgamma.iter().all(|&d| d == 0.0));
    }
}

#[test]
fn the_backend_gives_the_same_bits_on_every_machine() {
    // One row, a whole block of rows and its neighbours.
    for (rows, width) in [(1, 1), (63, 17), (64, 16), (65, 70), (300, 129)] {
        let x = randoms::<f32>(1, rows * width);
        let (gamma, beta, dy) = upstream(rows, width);
        let alone = run(&x, &gamma, &beta, &dy);
        for (isa, threads) in machines() {
            let mut rig = Rig::new();
            let op = LayerNorm {
                x: StoredBuf::Real(rig.put(&x)),
                gamma: rig.put(&gamma),
                beta: rig.put(&beta),
                center: rig.room(rows),
                rest: rig.room(rows),
                inv: rig.room(rows),
                width,
                eps: EPS,
            };
            let y = rig.room(rows * width);
            let gradients = LayerNormBackward {
                forward: op,
                dy: rig.put(&dy),
                dx: rig.put(&vec![f32::NAN; rows * width]),
                accumulate: false,
                dgamma: rig.room(width),
                dbeta: rig.room(width),
                partial: rig.room(LayerNormBackward::<f32>::partial_len(rows, width)),
            };
            let limits = Limits {
                width,
                head_dim: 1,
                group_size: 16,
            };
            let mut host = rig.host(isa, threads, limits);
            host.layer_norm(op, ActBuf::Real(y));
            host.layer_norm_backward(gradients);
            let name = format!("{rows} x {width}, {isa:?}, {threads} threads");
            assert_eq!(content_bits(&host, y), bits(&alone.y), "{name}");
            for (buf, expected) in [
                (gradients.dx, &alone.dx),
                (gradients.dgamma, &alone.dgamma),
                (gradients.dbeta, &alone.dbeta),
            ] {
                assert_eq!(content_bits(&host, buf), bits(expected), "{name}");
            }
            let once = content::<f32, f32>(&host, gradients.dx);
            host.layer_norm_backward(LayerNormBackward {
                accumulate: true,
                ..gradients
            });
            let twice = content::<f32, f32>(&host, gradients.dx);
            assert!(once.iter().zip(&twice).all(|(a, b)| a + a == *b), "{name}");
        }
    }
}

#[test]
fn wrong_arguments_are_named() {
    let shape = LayerNormShape {
        batch: 1,
        seq: 2,
        width: 3,
        eps: EPS,
    };
    let (mut y, mut stats) = ([0.0f32; 6], [[0.0f32; 2]; 3]);
    let [center, rest, inv] = &mut stats;
    let mut call = |shape, x: &[f32]| {
        let keep = Statistics {
            center: &mut center[..],
            rest: &mut rest[..],
            inv: &mut inv[..],
        };
        forward(shape, x, &[1.0; 3], &[0.0; 3], &mut y, keep)
    };
    let short = call(shape, &[0.0; 5]).expect_err("a value is missing");
    assert_eq!(
        short.to_string(),
        "layer norm: x has 5 values, but [batch, seq, width] needs 6"
    );
    let no_eps = LayerNormShape { eps: 0.0, ..shape };
    assert_eq!(call(no_eps, &[0.0; 6]), Err(LayerNormError::Eps(0.0)));
    let empty = LayerNormShape { seq: 0, ..shape };
    assert!(matches!(
        call(empty, &[]),
        Err(LayerNormError::Shape { seq: 0, .. })
    ));
}
