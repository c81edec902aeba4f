//! Linear layers of [`Host`]: forward, and both backward products.

use super::Host;
use super::transformer::packed_shape;
use crate::cpu::RowsMut;
use crate::cpu::gemm::{Gemm, gemm};
use crate::cpu::int8::{Int8Rows, Int8Shape, TernaryRows, int8_linear};
use crate::cpu::operand::{Operand, Values};
use crate::cpu::packed::{InputRows, MAX_ROWS, PANEL, PackedPart, pack_panels, packed_linear};
use crate::kernels::product::Order;
use crate::memory::{Buf, Lease};
use crate::ops::{ActBuf, PACKED_ROWS, PackedBuf, Product, WeightBuf, WeightData};
use crate::real::Real;
use crate::topk::{Kept, Source, TopK, run};
use setun_ternary::PackedMatrix;

/// A weight matrix as products see it.
fn weights<'a, R: Real>(lease: &mut Lease<'a>, w: WeightBuf<R>, order: Order) -> Values<'a, R> {
    match w.data {
        WeightData::Dense(w) => rounded(lease.read(w), order),
        WeightData::Ternary(w) => Values::Ternary {
            trits: lease.read(w.trits),
            scales: lease.read(w.scales),
            group_size: w.group_size,
        },
        WeightData::Packed(_) => panic!("packed weights meet int8 activations only"),
    }
}

/// Activations as products see them.
fn activations<'a, R: Real>(lease: &mut Lease<'a>, x: ActBuf<R>) -> Values<'a, R> {
    match x {
        ActBuf::Real(x) => Values::Plain(lease.read(x)),
        ActBuf::Bf16(x) => Values::Bf16(lease.read(x)),
        ActBuf::Int8 {
            q,
            scales,
            group_size,
        } => Values::Int8 {
            q: lease.read(q),
            scales: lease.read(scales),
            group_size,
        },
    }
}

fn order_of<R>(x: ActBuf<R>) -> Order {
    match x {
        ActBuf::Real(_) => Order::Sequential,
        ActBuf::Bf16(_) | ActBuf::Int8 { .. } => Order::EvenOdd,
    }
}

fn rounded<R>(x: &[R], order: Order) -> Values<'_, R> {
    match order {
        Order::Sequential => Values::Plain(x),
        Order::EvenOdd => Values::Rounded(x),
    }
}

impl<R: Real> Host<R> {
    pub(super) fn linear_op(&mut self, x: ActBuf<R>, w: WeightBuf<R>, y: Buf<R>) {
        if let WeightData::Packed(packed) = w.data {
            return self.packed_linear_op(x, (w.out, w.inp), packed, y);
        }
        let rows = y.len() / w.out;
        let order = order_of(x);
        let mut lease = self.arena.lease();
        let weights = weights(&mut lease, w, order);
        let acts = activations(&mut lease, x);
        let y = lease.write(y);
        // Weights that are not ternary yet meet int8 activations as `bf16(a * q)`.
        if let (
            Values::Int8 {
                q,
                scales,
                group_size,
            },
            Values::Ternary {
                trits,
                scales: s,
                group_size: same,
            },
        ) = (acts, weights)
        {
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
        let shape = Gemm {
            rows,
            cols: w.out,
            depth: w.inp,
            order,
        };
        let a = Operand {
            values: acts,
            width: w.inp,
            depth_in_rows: false,
        };
        let b = Operand {
            values: weights,
            width: w.inp,
            depth_in_rows: false,
        };
        let scratch = lease.write(self.workspace.real);
        gemm(&self.pool, self.isa, shape, a, b, y, scratch);
    }

    fn packed_linear_op(
        &mut self,
        x: ActBuf<R>,
        (out, inp): (usize, usize),
        w: PackedBuf,
        y: Buf<R>,
    ) {
        let ActBuf::Int8 {
            q,
            scales,
            group_size,
        } = x
        else {
            panic!("packed weights meet int8 activations only")
        };
        assert_eq!(
            group_size, w.group_size,
            "activations and weights share their groups"
        );
        let mut lease = self.arena.lease();
        let (q, scales) = (lease.read(q), lease.read(scales));
        let (bytes, y) = (lease.read(w.bytes), lease.write(y));
        let scratch = lease.write(self.workspace.int8);
        let x = Int8Rows { q, scales };
        let shape = packed_shape(out, inp, group_size);
        let mut part = [PackedPart {
            shape,
            weights: bytes,
            y,
        }];
        packed_linear(&self.pool, self.isa, x, &mut part, scratch);
    }

    /// Packed matrices in one go, others one after the other.
    pub(super) fn linears_op(&mut self, x: ActBuf<R>, products: &[Product<R>]) {
        let packed = |p: &Product<R>| match p.weight.data {
            WeightData::Packed(packed) => Some(packed),
            WeightData::Dense(_) | WeightData::Ternary(_) => None,
        };
        let matrices: Vec<PackedBuf> = products.iter().filter_map(packed).collect();
        let ActBuf::Int8 {
            q,
            scales,
            group_size,
        } = x
        else {
            return self.linear_one_by_one(x, products);
        };
        if matrices.len() < products.len() || matrices.iter().any(|m| m.group_size != group_size) {
            return self.linear_one_by_one(x, products);
        }
        let mut lease = self.arena.lease();
        let x = Int8Rows {
            q: lease.read(q),
            scales: lease.read(scales),
        };
        let parts = products.iter().zip(&matrices);
        let mut parts: Vec<PackedPart<'_, R>> = parts
            .map(|(product, matrix)| PackedPart {
                shape: packed_shape(product.weight.out, product.weight.inp, group_size),
                weights: lease.read(matrix.bytes),
                y: lease.write(product.y),
            })
            .collect();
        let scratch = lease.write(self.workspace.int8);
        packed_linear(&self.pool, self.isa, x, &mut parts, scratch);
    }

    fn linear_one_by_one(&mut self, x: ActBuf<R>, products: &[Product<R>]) {
        for product in products {
            self.linear_op(x, product.weight, product.y);
        }
    }

    pub(super) fn linear_topk_op(
        &mut self,
        x: ActBuf<R>,
        w: WeightBuf<R>,
        logits: Buf<R>,
        wanted: TopK<'_>,
        kept: &mut Kept,
    ) {
        let rows = logits.len() / w.out;
        if let (WeightData::Packed(packed), ActBuf::Int8 { q, scales, .. }) = (w.data, x)
            && rows <= MAX_ROWS
        {
            let mut lease = self.arena.lease();
            let (q, scales) = (lease.read(q), lease.read(scales));
            let weights = lease.read(packed.bytes);
            let scratch = lease.write(self.workspace.int8);
            let shape = packed_shape(w.out, w.inp, packed.group_size);
            let x = Int8Rows { q, scales };
            let inputs = InputRows::pack(&self.pool, self.isa, shape, (0, rows), x, scratch);
            let source = Source::Head {
                weights,
                inputs: &inputs,
            };
            run(&self.pool, self.isa, (rows, w.out), source, wanted, kept);
            return;
        }
        self.linear_op(x, w, logits);
        let logits: Vec<f32> = self.arena.read(logits).iter().map(|x| x.to_f32()).collect();
        let source = Source::Logits(&logits);
        run(&self.pool, self.isa, (rows, w.out), source, wanted, kept);
    }

    pub(super) fn write_packed_op(
        &mut self,
        to: PackedBuf,
        (first_row, out): (usize, usize),
        matrix: &PackedMatrix,
    ) {
        const { assert!(PACKED_ROWS.is_multiple_of(PANEL)) };
        let whole = packed_shape(out, matrix.cols, matrix.group_size);
        assert_eq!(to.bytes.len(), whole.bytes());
        let end = first_row + matrix.rows;
        assert!(first_row.is_multiple_of(PACKED_ROWS) && end <= out);
        assert!(end == out || end.is_multiple_of(PACKED_ROWS));
        let rows = packed_shape(matrix.rows, matrix.cols, matrix.group_size);
        let mut lease = self.arena.lease();
        let bytes = &mut lease.write(to.bytes)[first_row / PANEL * whole.panel_bytes()..];
        let panels = RowsMut::new(&mut bytes[..rows.bytes()], rows.panel_bytes());
        // Less is laid out before another thread is awake.
        const WORTH_A_THREAD: usize = 256 << 10;
        let grain = WORTH_A_THREAD / rows.panel_bytes();
        self.pool
            .by_rows(rows.panels(), grain, panels, |panels, to| {
                pack_panels(rows, &matrix.trits, &matrix.scales, panels.start, to);
            });
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
        let order = if numerics_f32 {
            Order::Sequential
        } else {
            Order::EvenOdd
        };
        let mut lease = self.arena.lease();
        let weights = weights(&mut lease, w, order);
        let dy = rounded(lease.read(dy), order);
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
        let a = Operand {
            values: dy,
            width: w.out,
            depth_in_rows: false,
        };
        let b = Operand {
            values: weights,
            width: w.inp,
            depth_in_rows: true,
        };
        let scratch = lease.write(self.workspace.real);
        gemm(&self.pool, self.isa, shape, a, b, dx, scratch);
    }

    pub(super) fn linear_dw_op(
        &mut self,
        dy: Buf<R>,
        x: ActBuf<R>,
        out: usize,
        inp: usize,
        dw: Buf<R>,
    ) {
        let order = order_of(x);
        let depth = dy.len() / out;
        let mut lease = self.arena.lease();
        let acts = activations(&mut lease, x);
        let dy = rounded(lease.read(dy), order);
        let dw = lease.write(dw);
        let shape = Gemm {
            rows: out,
            cols: inp,
            depth,
            order,
        };
        let a = Operand {
            values: dy,
            width: out,
            depth_in_rows: true,
        };
        let b = Operand {
            values: acts,
            width: inp,
            depth_in_rows: true,
        };
        let scratch = lease.write(self.workspace.real);
        gemm(&self.pool, self.isa, shape, a, b, dw, scratch);
    }
}
