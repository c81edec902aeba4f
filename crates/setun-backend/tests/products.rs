//! Linear layers equal the plain definition of their products to the bit, in all numerics
//! modes, forward and backward, whatever the blocking.

mod rig;

use half::bf16;
use rig::{Rig, bits, content, content_bits, machines, numbers, randoms, scales, trits};
use setun_backend::kernels::product::{Order, int8_dot, vec_mat};
use setun_backend::{ActBuf, Backend, Isa, Limits, Real, TernaryBuf, WeightBuf, WeightData};

/// Sizes of a product.
#[derive(Clone, Copy, Debug)]
struct Sizes {
    rows: usize,
    out: usize,
    inp: usize,
    group_size: usize,
}

impl Sizes {
    fn groups(self) -> usize {
        self.inp.div_ceil(self.group_size)
    }

    fn limits(self) -> Limits {
        Limits {
            width: self.inp.max(self.out),
            head_dim: 8,
            group_size: self.group_size,
        }
    }
}

/// Operands of a linear layer as plain values.
struct Operands {
    sizes: Sizes,
    x: Vec<f32>,
    dy: Vec<f32>,
    dense: Vec<f32>,
    trits: Vec<i8>,
    scales: Vec<f32>,
    q: Vec<i8>,
    a: Vec<f32>,
}

impl Operands {
    /// Random operands times 2 to the powers `(x and dy, w)`.
    fn new(sizes: Sizes, (x_power, w_power): (i32, i32)) -> Self {
        let Sizes { rows, out, inp, .. } = sizes;
        let scaled = |stream, len, power| -> Vec<f32> {
            let values = randoms::<f32>(stream, len);
            values.into_iter().map(|x| x * 2f32.powi(power)).collect()
        };
        let int8 = numbers(12, rows * inp, 255).into_iter();
        Self {
            sizes,
            x: scaled(10, rows * inp, x_power),
            dy: scaled(11, rows * out, x_power),
            dense: scaled(13, out * inp, w_power),
            trits: trits(14, out * inp),
            scales: scales(15, out * sizes.groups()),
            q: int8.map(|n| (n as i32 - 127) as i8).collect(),
            a: scales(16, rows * sizes.groups()),
        }
    }

    /// `s * t` or, of activations, `a * q`.
    fn dequantized(&self, values: &[i8], scales: &[f32]) -> Vec<f32> {
        let Sizes {
            inp, group_size, ..
        } = self.sizes;
        let scale = |i: usize| scales[i / inp * self.sizes.groups() + i % inp / group_size];
        let values = values.iter().enumerate();
        values.map(|(i, &v)| scale(i) * f32::from(v)).collect()
    }
}

fn rounded(x: &[f32]) -> Vec<f32> {
    x.iter().map(|x| x.round_bf16()).collect()
}

fn transposed(x: &[f32], width: usize) -> Vec<f32> {
    let height = x.len() / width;
    let at = |i: usize| x[i % height * width + i / height];
    (0..x.len()).map(at).collect()
}

/// `c + a b` by the definition, with `a` `[_, depth]` and `b` `[depth, lanes]`.
fn plain(order: Order, a: &[f32], b: &[f32], depth: usize, mut c: Vec<f32>) -> Vec<f32> {
    let lanes = b.len() / depth;
    for (a, c) in a.chunks(depth).zip(c.chunks_mut(lanes)) {
        vec_mat(setun_backend::Isa::Reference, order, true, a, b, lanes, c);
    }
    c
}

/// A linear layer in one mode: its operands as an operation takes them and as its products
/// see them.
struct Mode {
    name: &'static str,
    order: Order,
    x: ActBuf<f32>,
    seen_x: Vec<f32>,
    w: WeightBuf<f32>,
    seen_w: Vec<f32>,
    /// By the definition, where it is not a product of reals.
    int8: Option<Vec<f32>>,
}

/// The modes of a linear layer with these operands.
fn modes(o: &Operands, rig: &mut Rig<f32>) -> Vec<Mode> {
    let Sizes {
        out,
        inp,
        group_size,
        ..
    } = o.sizes;
    let weight = |data| WeightBuf { out, inp, data };
    let dense = weight(WeightData::Dense(rig.put(&o.dense)));
    let ternary = weight(WeightData::Ternary(TernaryBuf {
        trits: rig.put(&o.trits),
        scales: rig.put(&o.scales),
        group_size,
    }));
    let effective = o.dequantized(&o.trits, &o.scales);
    let real = ActBuf::Real(rig.put(&o.x));
    let halves: Vec<bf16> = o.x.iter().map(|x| Real::to_bf16(*x)).collect();
    let half = ActBuf::Bf16(rig.put(&halves));
    let int8 = ActBuf::Int8 {
        q: rig.put(&o.q),
        scales: rig.put(&o.a),
        group_size,
    };
    let mode = |name, order, x, seen_x: &[f32], w, seen_w: &[f32], int8| Mode {
        name,
        order,
        x,
        seen_x: seen_x.to_vec(),
        w,
        seen_w: seen_w.to_vec(),
        int8,
    };
    let (one, two) = (Order::Sequential, Order::EvenOdd);
    let half_x = rounded(&o.x);
    let int8_x = rounded(&o.dequantized(&o.q, &o.a));
    let dots = Some(int8_dots(o));
    vec![
        mode("f32 dense", one, real, &o.x, dense, &o.dense, None),
        mode("f32 ternary", one, real, &o.x, ternary, &effective, None),
        mode(
            "bf16 dense",
            two,
            half,
            &half_x,
            dense,
            &rounded(&o.dense),
            None,
        ),
        mode(
            "bf16 ternary",
            two,
            half,
            &half_x,
            ternary,
            &effective,
            None,
        ),
        mode("int8", two, int8, &int8_x, ternary, &effective, dots),
    ]
}

fn int8_dots(o: &Operands) -> Vec<f32> {
    let Sizes {
        rows,
        out,
        inp,
        group_size,
    } = o.sizes;
    let groups = o.sizes.groups();
    let dot = |i: usize| {
        let (r, n) = (i / out, i % out);
        let (q, a) = (&o.q[r * inp..][..inp], &o.a[r * groups..][..groups]);
        let (t, s) = (
            &o.trits[n * inp..][..inp],
            &o.scales[n * groups..][..groups],
        );
        int8_dot(q, a, t, s, group_size)
    };
    (0..rows * out).map(dot).collect()
}

/// Forward and both backward products of every mode against the definition.
fn check_products(sizes: Sizes, powers: (i32, i32), machines: &[(Isa, usize)]) {
    check_onto(&Operands::new(sizes, powers), powers, 1.0, machines);
}

/// As [`check_products`] with these operands, onto random sums times `scale`.
fn check_onto(o: &Operands, powers: (i32, i32), scale: f32, machines: &[(Isa, usize)]) {
    let sizes = o.sizes;
    let Sizes { rows, out, inp, .. } = sizes;
    let before: Vec<f32> = randoms(17, rows * inp + out * inp);
    let before: Vec<f32> = before.into_iter().map(|x| x * scale).collect();
    let (dx_before, dw_before) = before.split_at(rows * inp);
    let mut expected = Vec::new();
    for &(isa, threads) in machines {
        let mut rig = Rig::new();
        let modes = modes(o, &mut rig);
        let (dy, y) = (rig.put(&o.dy), rig.room(rows * out));
        let (dx, dw) = (rig.room(rows * inp), rig.room(out * inp));
        let mut host = rig.host(isa, threads, sizes.limits());
        for (m, mode) in modes.iter().enumerate() {
            if expected.len() == m {
                expected.push(definition(o, mode, dx_before, dw_before));
            }
            let sequential = mode.order == Order::Sequential;
            host.linear(mode.x, mode.w, y);
            let mut got = vec![content(&host, y)];
            host.linear_dx(dy, mode.w, dx, sequential, false);
            got.push(content(&host, dx));
            host.write(dx, dx_before);
            host.linear_dx(dy, mode.w, dx, sequential, true);
            got.push(content(&host, dx));
            host.write(dw, dw_before);
            host.linear_dw(dy, mode.x, out, inp, dw);
            got.push(content(&host, dw));
            let names = ["linear", "linear_dx", "linear_dx, accumulated", "linear_dw"];
            for ((name, got), expected) in names.iter().zip(&got).zip(&expected[m]) {
                let (got, expected) = (bits(got), bits(expected));
                let wrong = got
                    .iter()
                    .zip(&expected)
                    .position(|(got, expected)| got != expected);
                assert!(
                    wrong.is_none(),
                    "{name}, {}, {sizes:?}, 2^{powers:?}, {scale:e}, {isa:?}, {threads} threads: \
                    value {wrong:?} is {:x?}, not {:x?}",
                    mode.name,
                    wrong.map(|i| got[i]),
                    wrong.map(|i| expected[i]),
                );
            }
        }
    }
}

/// `y`, `dx`, `dx_before + dx` and `dw_before + dw` by the definition.
fn definition(o: &Operands, mode: &Mode, dx_before: &[f32], dw_before: &[f32]) -> [Vec<f32>; 4] {
    let Sizes { rows, out, inp, .. } = o.sizes;
    let order = mode.order;
    let dy = match order {
        Order::Sequential => o.dy.clone(),
        Order::EvenOdd => rounded(&o.dy),
    };
    let y = || {
        let w_t = transposed(&mode.seen_w, inp);
        plain(order, &mode.seen_x, &w_t, inp, vec![0.0; rows * out])
    };
    let dx = |before: Vec<f32>| plain(order, &dy, &mode.seen_w, out, before);
    [
        mode.int8.clone().unwrap_or_else(y),
        dx(vec![0.0; rows * inp]),
        dx(dx_before.to_vec()),
        plain(
            order,
            &transposed(&dy, out),
            &mode.seen_x,
            rows,
            dw_before.to_vec(),
        ),
    ]
}

#[test]
fn products_equal_their_definition_at_every_width() {
    let counts = [(1, 1), (1, 17), (2, 5), (5, 2), (17, 17)];
    let group_sizes = [16, 32, 128, 300];
    let widths = (1..=70).chain([127, 128, 129, 200, 300, 513]);
    for inp in widths {
        for (i, (rows, out)) in counts.into_iter().enumerate() {
            // All group sizes where they differ; else one after the other.
            let all = if inp > 100 { 4 } else { 1 };
            for group in 0..all {
                let group_size = group_sizes[(inp + i + group) % 4];
                let sizes = Sizes {
                    rows,
                    out,
                    inp,
                    group_size,
                };
                check_products(sizes, (0, 0), &machines());
            }
        }
    }
}

#[test]
fn products_equal_their_definition_at_the_edge_of_the_range() {
    // Products near and far below the smallest normal number, and operands near it.
    for powers in [(-50, -62), (-58, -58), (-70, -60), (-125, 0), (0, -126)] {
        for inp in [1, 2, 31, 32, 33, 64, 65, 127, 300] {
            let sizes = Sizes {
                rows: 7,
                out: 19,
                inp,
                group_size: 32,
            };
            check_products(sizes, powers, &machines());
        }
    }
}

/// Sums that are denormal, or may become it by what is added, where products cannot be.
#[test]
fn products_equal_their_definition_onto_tiny_sums() {
    let sizes = Sizes {
        rows: 7,
        out: 19,
        inp: 65,
        group_size: 32,
    };
    for powers in [(0, 0), (-30, -30), (-50, -45)] {
        let mut o = Operands::new(sizes, powers);
        // Rows and columns to which nothing is added.
        o.dy[..2 * sizes.out].fill(0.0);
        o.dy.iter_mut().step_by(3).for_each(|x| *x = 0.0);
        for power in [-90, -102, -103, -104, -115, -126, -135] {
            let scale = 2f32.powi(power + 60) * 2f32.powi(-60);
            check_onto(&o, powers, scale, &machines());
        }
    }
}

#[test]
fn products_equal_their_definition_beyond_every_block() {
    // The last one also beyond what the memory of one thread holds in panels.
    let all = [
        (390, 67, 259, 2),
        (67, 259, 390, 2),
        (5, 390, 1030, 2),
        (1400, 700, 33, 1),
    ];
    for (rows, out, inp, threads) in all {
        let isas = Isa::available().into_iter();
        let machines: Vec<_> = isas.map(|isa| (isa, threads)).collect();
        let sizes = Sizes {
            rows,
            out,
            inp,
            group_size: 128,
        };
        check_products(sizes, (0, 0), &machines);
    }
}

#[test]
fn the_largest_int8_sums_are_exact() {
    // Every product is 127: sums that a narrow integer does not hold.
    for (inp, group_size) in [
        (255, 300),
        (257, 300),
        (300, 300),
        (1025, 1024),
        (2000, 2000),
    ] {
        let sizes = Sizes {
            rows: 5,
            out: 17,
            inp,
            group_size,
        };
        for sign in [1i8, -1] {
            let mut o = Operands::new(sizes, (0, 0));
            o.q.fill(127);
            o.trits.fill(sign);
            let expected = int8_dots(&o);
            let groups = (0..inp)
                .step_by(group_size)
                .map(|start| inp.min(start + group_size) - start);
            let terms = groups.zip(o.a.iter().zip(&o.scales));
            let first: f64 = terms
                .map(|(n, (a, s))| f64::from(a * s) * (127 * n) as f64)
                .sum();
            let first = first * f64::from(sign);
            assert!((f64::from(expected[0]) - first).abs() < 1e-6 * first.abs());
            for (isa, threads) in machines() {
                let mut rig = Rig::new();
                let mode = modes(&o, &mut rig).pop().expect("int8 is the last mode");
                let y = rig.room(sizes.rows * sizes.out);
                let mut host = rig.host(isa, threads, sizes.limits());
                host.linear(mode.x, mode.w, y);
                assert_eq!(
                    content_bits(&host, y),
                    bits(&expected),
                    "{sizes:?}, {isa:?}"
                );
            }
        }
    }
}

#[test]
fn a_row_of_a_product_does_not_depend_on_its_neighbours() {
    for (isa, threads) in machines() {
        for (rows, out, inp) in [(17, 33, 70), (130, 5, 129)] {
            let sizes = Sizes {
                rows,
                out,
                inp,
                group_size: 32,
            };
            let o = Operands::new(sizes, (0, 0));
            let mut rig = Rig::new();
            let modes = modes(&o, &mut rig);
            let dy = rig.put(&o.dy);
            let (y, single_y) = (rig.room(rows * out), rig.room(rows * out));
            let (dx, single_dx) = (rig.room(rows * inp), rig.room(rows * inp));
            let mut host = rig.host(isa, threads, sizes.limits());
            for mode in modes {
                let sequential = mode.order == Order::Sequential;
                host.linear(mode.x, mode.w, y);
                host.linear_dx(dy, mode.w, dx, sequential, false);
                for r in 0..rows {
                    let (x, y) = (mode.x.rows(r, 1, inp), single_y.part(r * out, out));
                    host.linear(x, mode.w, y);
                    let (dy, dx) = (dy.part(r * out, out), single_dx.part(r * inp, inp));
                    host.linear_dx(dy, mode.w, dx, sequential, false);
                }
                assert_eq!(
                    content_bits(&host, y),
                    content_bits(&host, single_y),
                    "{}",
                    mode.name
                );
                assert_eq!(
                    content_bits(&host, dx),
                    content_bits(&host, single_dx),
                    "{}",
                    mode.name
                );
            }
        }
    }
}
