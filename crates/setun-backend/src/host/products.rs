//! Linear layers of [`Host`]: forward, and both backward products.

use super::Host;
use crate::cpu::gemm::{Gemm, Panel, gemm};
use crate::cpu::int8::{Int8Rows, Int8Shape, TernaryRows, int8_linear};
use crate::kernels::product::Order;
use crate::memory::{Buf, Lease};
use crate::ops::{ActBuf, WeightBuf, WeightData};
use crate::real::Real;
use half::bf16;
use std::ops::Range;

/// A weight matrix, leased.
#[derive(Clone, Copy)]
enum Weights<'a, R> {
    Dense(&'a [R]),
    Ternary {
        trits: &'a [i8],
        scales: &'a [f32],
        group_size: usize,
    },
}

impl<'a, R: Real> Weights<'a, R> {
    fn lease(lease: &mut Lease<'a>, w: WeightBuf<R>) -> Self {
        match w.data {
            WeightData::Dense(w) => Self::Dense(lease.read(w)),
            WeightData::Ternary(w) => Self::Ternary {
                trits: lease.read(w.trits),
                scales: lease.read(w.scales),
                group_size: w.group_size,
            },
        }
    }

    /// Effective weights `columns` of row `n`, as products see them.
    fn row(
        self,
        n: usize,
        width: usize,
        columns: Range<usize>,
        order: Order,
        mut put: impl FnMut(usize, R),
    ) {
        match self {
            Self::Dense(w) => {
                let row = &w[n * width..][columns];
                match order {
                    Order::Sequential => row.iter().enumerate().for_each(|(i, &w)| put(i, w)),
                    Order::EvenOdd => {
                        row.iter()
                            .enumerate()
                            .for_each(|(i, w)| put(i, w.round_bf16()));
                    }
                }
            }
            Self::Ternary {
                trits,
                scales,
                group_size,
            } => {
                let scales = &scales[n * width.div_ceil(group_size)..];
                let trits = &trits[n * width..(n + 1) * width];
                let mut k = columns.start;
                while k < columns.end {
                    let group = k / group_size;
                    let end = columns.end.min((group + 1) * group_size);
                    let scale = scales[group];
                    for (i, &t) in trits[k..end].iter().enumerate() {
                        put(k - columns.start + i, R::from_f32(f32::from(t) * scale));
                    }
                    k = end;
                }
            }
        }
    }
}

/// Activations, leased.
#[derive(Clone, Copy)]
enum Acts<'a, R> {
    Real(&'a [R]),
    Bf16(&'a [bf16]),
    Int8 {
        q: &'a [i8],
        scales: &'a [f32],
        group_size: usize,
    },
}

impl<'a, R: Real> Acts<'a, R> {
    fn lease(lease: &mut Lease<'a>, x: ActBuf<R>) -> Self {
        match x {
            ActBuf::Real(x) => Self::Real(lease.read(x)),
            ActBuf::Bf16(x) => Self::Bf16(lease.read(x)),
            ActBuf::Int8 {
                q,
                scales,
                group_size,
            } => Self::Int8 {
                q: lease.read(q),
                scales: lease.read(scales),
                group_size,
            },
        }
    }

    fn order(self) -> Order {
        match self {
            Self::Real(_) => Order::Sequential,
            Self::Bf16(_) | Self::Int8 { .. } => Order::EvenOdd,
        }
    }

    /// Values `columns` of row `r` as products see them; of int8, `bf16(a * q)`.
    fn row(self, r: usize, width: usize, columns: Range<usize>, mut put: impl FnMut(usize, R)) {
        let at = r * width + columns.start..r * width + columns.end;
        match self {
            Self::Real(x) => x[at].iter().enumerate().for_each(|(i, &x)| put(i, x)),
            Self::Bf16(x) => {
                x[at]
                    .iter()
                    .enumerate()
                    .for_each(|(i, &x)| put(i, R::from_bf16(x)));
            }
            Self::Int8 {
                q,
                scales,
                group_size,
            } => {
                let scales = &scales[r * width.div_ceil(group_size)..];
                for (i, &q) in q[at].iter().enumerate() {
                    let a = scales[(columns.start + i) / group_size];
                    put(i, R::from_f32((a * f32::from(q)).round_bf16()));
                }
            }
        }
    }
}

fn order_of(numerics_f32: bool) -> Order {
    if numerics_f32 {
        Order::Sequential
    } else {
        Order::EvenOdd
    }
}

fn rounded<R: Real>(order: Order, x: R) -> R {
    match order {
        Order::Sequential => x,
        Order::EvenOdd => x.round_bf16(),
    }
}

impl<R: Real> Host<R> {
    pub(super) fn linear_op(&mut self, x: ActBuf<R>, w: WeightBuf<R>, y: Buf<R>) {
        let rows = y.len() / w.out;
        let mut lease = self.arena.lease();
        let weights = Weights::lease(&mut lease, w);
        let acts = Acts::lease(&mut lease, x);
        let y = lease.write(y);
        if let Acts::Int8 {
            q,
            scales,
            group_size,
        } = acts
        {
            let Weights::Ternary {
                trits,
                scales: s,
                group_size: same,
            } = weights
            else {
                panic!("int8 numerics need ternary weights");
            };
            assert_eq!(
                group_size, same,
                "activations and weights share their groups"
            );
            let shape = Int8Shape {
                rows,
                out: w.out,
                width: w.inp,
                group_size,
            };
            let scratch = lease.write(self.workspace.int8);
            let weights = TernaryRows { trits, scales: s };
            let x = Int8Rows { q, scales };
            int8_linear(&self.pool, self.isa, shape, x, weights, y, scratch);
            return;
        }
        y.fill(R::ZERO);
        let order = acts.order();
        let shape = Gemm {
            rows,
            cols: w.out,
            depth: w.inp,
            order,
        };
        let pack_a = |rows: Range<usize>, depths: Range<usize>, panel: Panel<'_, R>| {
            let lanes = panel.lanes;
            for (lane, r) in rows.enumerate() {
                let values = &mut *panel.values;
                acts.row(r, w.inp, depths.clone(), |k, x| {
                    values[k * lanes + lane] = x
                });
            }
        };
        let pack_b = |cols: Range<usize>, depths: Range<usize>, panel: Panel<'_, R>| {
            let lanes = panel.lanes;
            for (lane, n) in cols.enumerate() {
                let values = &mut *panel.values;
                let put = |k: usize, x| values[k * lanes + lane] = x;
                weights.row(n, w.inp, depths.clone(), order, put);
            }
        };
        let scratch = lease.write(self.workspace.real);
        gemm(&self.pool, self.isa, shape, pack_a, pack_b, y, scratch);
    }

    pub(super) fn linear_dx_op(
        &mut self,
        dy: Buf<R>,
        w: WeightBuf<R>,
        dx: Buf<R>,
        numerics_f32: bool,
        accumulate: bool,
    ) {
        let rows = dy.len() / w.out;
        let order = order_of(numerics_f32);
        let mut lease = self.arena.lease();
        let weights = Weights::lease(&mut lease, w);
        let dy = lease.read(dy);
        let dx = lease.write(dx);
        if !accumulate {
            dx.fill(R::ZERO);
        }
        let shape = Gemm {
            rows,
            cols: w.inp,
            depth: w.out,
            order,
        };
        let pack_a = |rows: Range<usize>, depths: Range<usize>, mut panel: Panel<'_, R>| {
            for (lane, r) in rows.enumerate() {
                let row = &dy[r * w.out..][depths.clone()];
                panel.put_lane(lane, row.iter().map(|&x| rounded(order, x)));
            }
        };
        let pack_b = |cols: Range<usize>, depths: Range<usize>, panel: Panel<'_, R>| {
            for (row, n) in panel.values.chunks_exact_mut(panel.lanes).zip(depths) {
                weights.row(n, w.inp, cols.clone(), order, |j, x| row[j] = x);
            }
        };
        let scratch = lease.write(self.workspace.real);
        gemm(&self.pool, self.isa, shape, pack_a, pack_b, dx, scratch);
    }

    pub(super) fn linear_dw_op(
        &mut self,
        dy: Buf<R>,
        x: ActBuf<R>,
        out: usize,
        inp: usize,
        dw: Buf<R>,
    ) {
        let mut lease = self.arena.lease();
        let acts = Acts::lease(&mut lease, x);
        let dy = lease.read(dy);
        let dw = lease.write(dw);
        let order = acts.order();
        let shape = Gemm {
            rows: out,
            cols: inp,
            depth: dy.len() / out,
            order,
        };
        let pack_a = |rows: Range<usize>, depths: Range<usize>, mut panel: Panel<'_, R>| {
            for (k, r) in depths.enumerate() {
                let row = &dy[r * out..][rows.clone()];
                panel.put_depth(k, row.iter().map(|&x| rounded(order, x)));
            }
        };
        let pack_b = |cols: Range<usize>, depths: Range<usize>, panel: Panel<'_, R>| {
            for (row, r) in panel.values.chunks_exact_mut(panel.lanes).zip(depths) {
                acts.row(r, inp, cols.clone(), |j, x| row[j] = x);
            }
        };
        let scratch = lease.write(self.workspace.real);
        gemm(&self.pool, self.isa, shape, pack_a, pack_b, dw, scratch);
    }
}
