//! The public attention operation against plain softmax attention in f64, against finite
//! differences, and the memory that it takes.

mod counting_allocator;
mod rig;

use counting_allocator::peak_bytes;
use rig::{Rig, content, machines};
use setun_backend::attention::{AttentionShape, backward, forward};
use setun_backend::philox::Philox;
use setun_backend::{Attention, AttentionBackward, AttnBuf, Backend, Isa, Limits, Real, Segment};

/// Operands and results of one attention.
struct Tensors<R> {
    q: Vec<R>,
    k: Vec<R>,
    v: Vec<R>,
    dout: Vec<R>,
    out: Vec<R>,
    lse: Vec<R>,
    dq: Vec<R>,
    dk: Vec<R>,
    dv: Vec<R>,
}

impl<R: Real> Tensors<R> {
    /// Random operands; results full of a value that they must lose.
    fn new(shape: AttentionShape) -> Self {
        let rows = shape.batch * shape.seq;
        let query = rows * shape.num_heads * shape.head_dim;
        let key = rows * shape.num_kv_heads * shape.head_dim;
        let random = |stream, len: usize| {
            let random = Philox::new(7, stream);
            let values = (0..len as u64).map(|i| random.normal_pair(i).0);
            values.map(R::from_f64).collect::<Vec<R>>()
        };
        let stale = |len| vec![R::from_f64(99.0); len];
        Self {
            q: random(0, query),
            k: random(1, key),
            v: random(2, key),
            dout: random(3, query),
            out: stale(query),
            lse: stale(rows * shape.num_heads),
            dq: stale(query),
            dk: stale(key),
            dv: stale(key),
        }
    }

    fn forward(&mut self, shape: AttentionShape, first_key: Option<&[u32]>) {
        let Self {
            q, k, v, out, lse, ..
        } = self;
        forward(shape, q, k, v, first_key, out, lse).expect("a good shape");
    }

    #[rustfmt::skip]
    fn backward(&mut self, shape: AttentionShape, first_key: Option<&[u32]>) {
        let Self { q, k, v, dout, out, lse, dq, dk, dv } = self;
        backward(shape, q, k, v, first_key, out, lse, dout, dq, dk, dv).expect("a good shape");
    }
}

/// Softmax attention by its definition, one row at a time, everything in f64.
struct Plain {
    out: Vec<f64>,
    lse: Vec<f64>,
    dq: Vec<f64>,
    dk: Vec<f64>,
    dv: Vec<f64>,
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// `to += factor * from`
fn add_scaled(to: &mut [f64], factor: f64, from: &[f64]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to += factor * from;
    }
}

impl Plain {
    fn new<R: Real>(shape: AttentionShape, x: &Tensors<R>, first_key: Option<&[u32]>) -> Self {
        let [q, k, v, dout] = [&x.q, &x.k, &x.v, &x.dout].map(|x| to_f64(x));
        let (width, heads, kv_heads) = (shape.head_dim, shape.num_heads, shape.num_kv_heads);
        let scale = 1.0 / (width as f64).sqrt();
        let mut plain = Self {
            out: vec![0.0; q.len()],
            lse: vec![f64::NEG_INFINITY; q.len() / width],
            dq: vec![0.0; q.len()],
            dk: vec![0.0; k.len()],
            dv: vec![0.0; k.len()],
        };
        for row_head in 0..q.len() / width {
            let (row, head) = (row_head / heads, row_head % heads);
            let start = row / shape.seq * shape.seq;
            let first = start + first_key.map_or(0, |f| f[row] as usize);
            if first > row {
                continue;
            }
            let key = |j: usize| {
                let at = (j * kv_heads + head / (heads / kv_heads)) * width;
                at..at + width
            };
            let own = row_head * width..(row_head + 1) * width;
            let (q, dout) = (&q[own.clone()], &dout[own.clone()]);
            let score = |j| scale * dot(q, &k[key(j)]);
            let max = (first..=row).map(score).fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = (first..=row).map(|j| (score(j) - max).exp()).sum();
            plain.lse[row_head] = max + sum.ln();
            let p = |j| (score(j) - max).exp() / sum;
            for j in first..=row {
                add_scaled(&mut plain.out[own.clone()], p(j), &v[key(j)]);
            }
            let mean: f64 = (first..=row).map(|j| p(j) * dot(dout, &v[key(j)])).sum();
            for j in first..=row {
                let dscore = p(j) * (dot(dout, &v[key(j)]) - mean);
                add_scaled(&mut plain.dq[own.clone()], dscore * scale, &k[key(j)]);
                add_scaled(&mut plain.dk[key(j)], dscore * scale, q);
                add_scaled(&mut plain.dv[key(j)], p(j), dout);
            }
        }
        plain
    }
}

fn to_f64<R: Real>(x: &[R]) -> Vec<f64> {
    x.iter().map(|x| x.to_f64()).collect()
}

/// Asserts that the difference is below `bound` relative to `expected`, in the 2-norm and
/// in the largest magnitude. A typical value below 0.05 counts as 0.05: a row that sees
/// one key has zero `dq`, and only rounding is left of it.
fn assert_close<R: Real>(what: &str, got: &[R], expected: &[f64], bound: f64) {
    const FLOOR: f64 = 0.05;
    assert_eq!(got.len(), expected.len());
    let (mut squares, mut norm) = (0.0f64, 0.0f64);
    let (mut largest, mut scale) = (0.0f64, FLOOR);
    for (i, (got, &expected)) in got.iter().zip(expected).enumerate() {
        let got = got.to_f64();
        if expected.is_infinite() {
            assert_eq!(got, expected, "{what}[{i}]");
            continue;
        }
        assert!(got.is_finite(), "{what}[{i}] is {got}");
        norm += expected * expected;
        squares += (got - expected).powi(2);
        largest = largest.max((got - expected).abs());
        scale = scale.max(expected.abs());
    }
    let norm = norm.max(FLOOR * FLOOR * got.len() as f64);
    let (two, max) = ((squares / norm).sqrt(), largest / scale);
    assert!(two < bound, "{what}: relative error {two} in the 2-norm");
    assert!(
        max < bound,
        "{what}: an error of {max} of the largest value"
    );
}

/// Forward and backward of `R` against [`Plain`].
fn check<R: Real>(shape: AttentionShape, first_key: Option<&[u32]>, bound: f64) {
    let mut x = Tensors::<R>::new(shape);
    x.forward(shape, first_key);
    x.backward(shape, first_key);
    let plain = Plain::new(shape, &x, first_key);
    let what = |name: &str| format!("{name} of {shape:?}");
    assert_close(&what("out"), &x.out, &plain.out, bound);
    assert_close(&what("lse"), &x.lse, &plain.lse, bound);
    assert_close(&what("dq"), &x.dq, &plain.dq, bound);
    assert_close(&what("dk"), &x.dk, &plain.dk, bound);
    assert_close(&what("dv"), &x.dv, &plain.dv, bound);
}

/// `[batch, heads, kv heads, seq, head_dim, tile]`
fn shape(sizes: [usize; 6]) -> AttentionShape {
    let [batch, num_heads, num_kv_heads, seq, head_dim, tile] = sizes;
    AttentionShape {
        batch,
        num_heads,
        num_kv_heads,
        seq,
        head_dim,
        tile,
    }
}

#[test]
fn forward_equals_plain_softmax_attention() {
    let shape = shape([1, 1, 1, 256, 64, 64]);
    let mut x = Tensors::<f32>::new(shape);
    x.forward(shape, None);
    let plain = Plain::new(shape, &x, None);
    assert_close("out", &x.out, &plain.out, 1e-4);
    assert_close("lse", &x.lse, &plain.lse, 1e-4);
}

#[test]
fn backward_equals_the_plain_backward() {
    check::<f32>(shape([2, 4, 4, 256, 64, 64]), None, 1e-4);
}

#[test]
fn grouped_heads_and_lengths_beside_the_tile_in_both_directions() {
    for sizes in [
        [1, 2, 1, 1, 4, 16],
        [1, 4, 2, 17, 8, 16],
        [2, 6, 2, 63, 10, 64],
        [1, 3, 3, 65, 7, 64],
        [2, 8, 2, 101, 16, 32],
        [1, 4, 1, 130, 33, 48],
        [3, 5, 5, 40, 1, 7],
    ] {
        check::<f32>(shape(sizes), None, 1e-4);
        check::<f64>(shape(sizes), None, 1e-12);
    }
}

#[test]
fn masked_keys_in_both_directions() {
    let shape = shape([2, 4, 2, 75, 12, 16]);
    let random = Philox::new(3, 0);
    let row = |i: usize| (i % shape.seq) as u32;
    let rows = 0..shape.batch * shape.seq;
    let windows: [Vec<u32>; 4] = [
        // A sliding window of 5: from row 20 on the first tile is wholly masked.
        rows.clone().map(|i| row(i).saturating_sub(4)).collect(),
        // The row itself only: every tile but its last is masked.
        rows.clone().map(row).collect(),
        // Anything from every key to nothing at all.
        rows.clone()
            .map(|i| random.block(i as u64)[0] % (row(i) + 2))
            .collect(),
        // Nothing for anybody, also when the first key lies beyond the sequence.
        rows.map(|i| row(i) + 1 + 40 * (i % 3) as u32).collect(),
    ];
    for window in &windows {
        check::<f32>(shape, Some(window), 1e-4);
        check::<f64>(shape, Some(window), 1e-12);
    }
}

#[test]
fn a_row_that_sees_nothing_is_zero_and_gives_zero() {
    let shape = shape([1, 2, 1, 40, 6, 16]);
    let blind = 33;
    let mut first_key = vec![0u32; shape.seq];
    first_key[blind] = blind as u32 + 1;
    let mut x = Tensors::<f32>::new(shape);
    x.forward(shape, Some(&first_key));
    x.backward(shape, Some(&first_key));
    let width = shape.num_heads * shape.head_dim;
    let own = blind * width..(blind + 1) * width;
    assert!(x.out[own.clone()].iter().all(|&x| x == 0.0));
    assert!(x.dq[own.clone()].iter().all(|&x| x == 0.0));
    assert_eq!(x.lse[2 * blind..2 * blind + 2], [f32::NEG_INFINITY; 2]);
    // Its dout reaches no key: another one leaves every gradient as it is.
    let (dk, dv) = (x.dk.clone(), x.dv.clone());
    x.dout[own].fill(1e3);
    x.backward(shape, Some(&first_key));
    assert_eq!((dk, dv), (x.dk.clone(), x.dv.clone()));
    assert!(x.dk.iter().chain(&x.dv).all(|x| x.is_finite()));
}

/// `sum(dout * out)` with element `i` of operand q, k or v moved by `step`.
fn moved_loss(
    shape: AttentionShape,
    x: &mut Tensors<f64>,
    operand: usize,
    i: usize,
    step: f64,
) -> f64 {
    let select = |x: &mut Tensors<f64>, value: Option<f64>| {
        let element = &mut [&mut x.q, &mut x.k, &mut x.v][operand][i];
        std::mem::replace(element, value.unwrap_or(*element + step))
    };
    let old = select(x, None);
    x.forward(shape, None);
    select(x, Some(old));
    dot(&x.dout, &x.out)
}

#[test]
fn gradients_equal_central_differences() {
    const STEP: f64 = 1e-5;
    let shape = shape([1, 1, 1, 64, 32, 16]);
    let mut x = Tensors::<f64>::new(shape);
    x.forward(shape, None);
    x.backward(shape, None);
    let gradients = [x.dq.clone(), x.dk.clone(), x.dv.clone()];
    let random = Philox::new(11, 0);
    let len = gradients[0].len();
    let ten = |stream: u64| (0..10).map(move |i| random.block(stream + i)[0] as usize % len);
    let mut elements: Vec<(usize, usize)> = (0..len).map(|i| (2, i)).collect();
    elements.extend(ten(0).map(|i| (0, i)));
    elements.extend(ten(100).map(|i| (1, i)));
    for (operand, i) in elements {
        let up = moved_loss(shape, &mut x, operand, i, STEP);
        let down = moved_loss(shape, &mut x, operand, i, -STEP);
        let (expected, got) = ((up - down) / (2.0 * STEP), gradients[operand][i]);
        // The floor is the rounding of the two losses over the step.
        let bound = 1e-5 * expected.abs() + 1e-9;
        assert!(
            (got - expected).abs() < bound,
            "element {i} of gradient {operand}: {got}, by differences {expected}"
        );
    }
}

#[test]
fn the_tile_changes_results_by_rounding_only() {
    let run = |tile| {
        let shape = shape([1, 4, 2, 150, 24, tile]);
        let mut x = Tensors::<f32>::new(shape);
        x.forward(shape, None);
        x.backward(shape, None);
        [x.out, x.lse, x.dq, x.dk, x.dv]
    };
    let expected = run(64).map(|x| to_f64(&x));
    for tile in [1, 3, 16, 32, 100, 128, 150, 4096] {
        for (i, (got, expected)) in run(tile).iter().zip(&expected).enumerate() {
            assert_close(&format!("result {i}, tile {tile}"), got, expected, 1e-5);
        }
    }
}

/// `out`, `lse`, `dq`, `dk` and `dv` of the backend for the operands of `x`, in numerics
/// f32 or with queries, keys and values rounded to bf16.
fn on_host(
    shape: AttentionShape,
    x: &Tensors<f32>,
    half: bool,
    (isa, threads): (Isa, usize),
) -> [Vec<f32>; 5] {
    let mut rig = Rig::new();
    let real = [&x.q, &x.k, &x.v].map(|x| rig.put(x));
    let mut store = |x: &[f32]| match half {
        false => AttnBuf::Real(rig.room(x.len())),
        true => AttnBuf::Bf16(rig.room(x.len())),
    };
    let stored = [store(&x.q), store(&x.k), store(&x.v)];
    let segments: Vec<Segment> = (0..shape.batch)
        .map(|b| Segment::own(b * shape.seq, shape.seq))
        .collect();
    let forward = Attention {
        q: stored[0],
        k: stored[1],
        v: stored[2],
        out: rig.put(&x.out),
        lse: rig.put(&x.lse),
        segments: &segments,
        blocks: None,
        num_heads: shape.num_heads,
        num_kv_heads: shape.num_kv_heads,
        head_dim: shape.head_dim,
    };
    let backward = AttentionBackward {
        forward,
        dout: rig.put(&x.dout),
        delta: rig.room(x.lse.len()),
        dq: rig.put(&x.dq),
        dk: rig.put(&x.dk),
        dv: rig.put(&x.dv),
    };
    let limits = Limits {
        width: shape.head_dim,
        head_dim: shape.head_dim,
        group_size: 32,
    };
    let mut host = rig.host(isa, threads, limits);
    for (from, to) in real.into_iter().zip(stored) {
        host.round_attention(from, to);
    }
    host.attention(forward);
    host.attention_backward(backward);
    let gradients = [backward.dq, backward.dk, backward.dv];
    let [dq, dk, dv] = gradients.map(|d| content(&host, d));
    [
        content(&host, forward.out),
        content(&host, forward.lse),
        dq,
        dk,
        dv,
    ]
}

#[test]
fn the_backend_gives_the_same_bits() {
    // The backend's tile is 64.
    let shape = shape([2, 4, 2, 150, 18, 64]);
    let stale = Tensors::<f32>::new(shape);
    let mut x = Tensors::<f32>::new(shape);
    x.forward(shape, None);
    x.backward(shape, None);
    let expected = [x.out, x.lse, x.dq, x.dk, x.dv].map(|x| rig::bits(&x));
    for machine in machines() {
        let got = on_host(shape, &stale, false, machine).map(|x| rig::bits(&x));
        assert!(got == expected, "{machine:?}");
    }
}

#[test]
fn bf16_differs_by_its_rounding() {
    let shape = shape([1, 4, 2, 150, 34, 64]);
    let mut x = Tensors::<f32>::new(shape);
    // What the operands are once stored; then only p, ds and dout are rounded further.
    for operand in [&mut x.q, &mut x.k, &mut x.v] {
        operand.iter_mut().for_each(|x| *x = x.round_bf16());
    }
    let plain = Plain::new(shape, &x, None);
    let got = on_host(shape, &x, true, (Isa::detect(), 1));
    let expected = [plain.out, plain.lse, plain.dq, plain.dk, plain.dv];
    for (i, (got, expected)) in got.iter().zip(&expected).enumerate() {
        // bf16 rounds by at most 2^-9.
        assert_close(&format!("result {i}"), got, expected, 1.0 / 128.0);
    }
}

/// Bytes of one matrix of scores in f32.
fn score_bytes(shape: AttentionShape) -> usize {
    shape.seq * shape.seq * size_of::<f32>()
}

#[test]
fn forward_never_holds_the_scores() {
    let shape = shape([2, 8, 8, 4096, 64, 128]);
    let mut x = Tensors::<f32>::new(shape);
    let peak = peak_bytes(|| x.forward(shape, None));
    let bound = score_bytes(shape) / 20;
    assert!(peak < bound, "{peak} bytes, at most {bound} allowed");
    // The measure sees allocations, and the call computed something.
    assert!(peak > 0 && x.out.iter().all(|&x| x.is_finite() && x != 99.0));
}

#[test]
fn backward_never_holds_the_scores() {
    let shape = shape([1, 1, 1, 4096, 64, 128]);
    let mut x = Tensors::<f32>::new(shape);
    x.forward(shape, None);
    let peak = peak_bytes(|| x.backward(shape, None));
    let bound = score_bytes(shape) / 5;
    assert!(peak < bound, "{peak} bytes, at most {bound} allowed");
    let all = x.dq.iter().chain(&x.dk).chain(&x.dv);
    assert!(peak > 0 && all.clone().all(|&x| x.is_finite() && x != 99.0));
}

#[test]
fn the_counter_sees_a_matrix_of_scores() {
    let n = 1024;
    let peak = peak_bytes(|| drop(std::hint::black_box(vec![0.0f32; n * n])));
    assert_eq!(peak, n * n * size_of::<f32>());
}
