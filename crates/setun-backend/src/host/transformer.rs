//! The operations of [`Host`]: leases, a split over threads, a kernel.

use super::scratch::Scratch;
use super::*;
use crate::cache::{CacheBuf, CacheStore, CachedAttention};
use crate::cpu::multiversion;
use crate::cpu::packed::{self, PackedShape};
use crate::kernels::norm::Rotation;
use crate::memory::{Extent, Lease, Shared};
use crate::ops::*;
use crate::real::sum_lanes;
use crate::topk::{Kept, TopK};
use bytemuck::Pod;
use setun_ternary::{PackedMatrix, ScaleRule};

impl<R: Real> Backend for Host<R> {
    type Real = R;
    type Shared = Shared;

    fn threads(&self) -> usize {
        self.pool.threads()
    }

    fn read<T: Pod>(&self, buf: Buf<T>, out: &mut [T]) {
        out.copy_from_slice(self.arena.read(buf));
    }

    fn write<T: Pod>(&mut self, buf: Buf<T>, values: &[T]) {
        self.arena.lease().write(buf).copy_from_slice(values);
    }

    fn share(&mut self, extents: &[Extent]) -> Shared {
        self.arena.share(extents)
    }

    fn zero<T: Pod>(&mut self, buf: Buf<T>) {
        self.arena.lease().write(buf).fill(T::zeroed());
    }

    fn copy(&mut self, from: Buf<R>, to: Buf<R>) {
        let mut lease = self.arena.lease();
        lease.write(to).copy_from_slice(lease.read(from));
    }

    fn add(&mut self, from: Buf<R>, to: Buf<R>) {
        let mut lease = self.arena.lease();
        let (from, to) = (lease.read(from), RowsMut::new(lease.write(to), 1));
        self.pool.by_rows(from.len(), RUN, to, |rows, to| {
            add_run(self.isa, &from[rows], to)
        });
    }

    fn lerp(&mut self, from: Buf<R>, share: f64, to: Buf<R>) {
        let share = R::from_f64(share);
        let mut lease = self.arena.lease();
        let (from, to) = (lease.read(from), RowsMut::new(lease.write(to), 1));
        self.pool.by_rows(from.len(), RUN, to, |rows, to| {
            lerp_run(self.isa, &from[rows], share, to)
        });
    }

    fn dropout(&mut self, op: Dropout<R>) {
        let chances = elementwise::Chances::new(op.share, op.seed);
        let mut lease = self.arena.lease();
        let x = RowsMut::new(lease.write(op.x), 1);
        self.pool.by_rows(op.x.len(), RUN, x, |rows, x| {
            let first = op.first.wrapping_add(rows.start as u32);
            dropout_run(self.isa, chances, first, x);
        });
    }

    fn project(
        &mut self,
        latent: Buf<R>,
        cols: usize,
        rule: ScaleRule,
        to: TernaryBuf,
    ) -> Result<ProjectStats, ProjectError> {
        self.project_op(latent, cols, rule, to)
    }

    fn packed_len(out: usize, inp: usize, group_size: usize) -> usize {
        packed_shape(out, inp, group_size).bytes()
    }

    fn write_packed(&mut self, to: PackedBuf, rows: (usize, usize), matrix: &PackedMatrix) {
        self.write_packed_op(to, rows, matrix);
    }

    fn embedding(&mut self, ids: Buf<u32>, weight: WeightBuf<R>, y: Buf<R>) {
        let width = weight.inp;
        let mut lease = self.arena.lease();
        let ids = lease.read(ids);
        let y = RowsMut::new(lease.write(y), width);
        let grain = grain(&self.pool, ids.len(), width);
        match weight.data {
            WeightData::Dense(w) => {
                let w = lease.read(w);
                self.pool.by_rows(ids.len(), grain, y, |rows, y| {
                    for (y, &id) in y.chunks_mut(width).zip(&ids[rows]) {
                        y.copy_from_slice(&w[id as usize * width..][..width]);
                    }
                });
            }
            WeightData::Ternary(w) => {
                let groups = width.div_ceil(w.group_size);
                let (trits, scales) = (lease.read(w.trits), lease.read(w.scales));
                self.pool.by_rows(ids.len(), grain, y, |rows, y| {
                    for (y, &id) in y.chunks_mut(width).zip(&ids[rows]) {
                        let trits = &trits[id as usize * width..][..width];
                        let scales = &scales[id as usize * groups..][..groups];
                        dequantize_row(self.isa, trits, scales, w.group_size, y);
                    }
                });
            }
            WeightData::Packed(w) => {
                let shape = packed_shape(weight.out, width, w.group_size);
                let bytes = lease.read(w.bytes);
                self.pool.by_rows(ids.len(), grain, y, |rows, y| {
                    for (y, &id) in y.chunks_mut(width).zip(&ids[rows]) {
                        packed::dequantize_row(shape, bytes, id as usize, y);
                    }
                });
            }
        }
    }

    fn embedding_backward(&mut self, ids: Buf<u32>, dy: Buf<R>, dweight: Buf<R>) {
        let width = dy.len() / ids.len();
        let mut lease = self.arena.lease();
        let (ids, dy) = (lease.read(ids), lease.read(dy));
        let rows = dweight.len() / width;
        let dweight = RowsMut::new(lease.write(dweight), width);
        let grain = rows.div_ceil(self.pool.threads());
        self.pool.by_rows(rows, grain, dweight, |rows, dw| {
            embedding_backward_rows(self.isa, ids, dy, width, rows.start, dw);
        });
    }

    fn rms_norm(&mut self, norm: RmsNorm<R>, y: ActBuf<R>) {
        let width = norm.width;
        let mut lease = self.arena.lease();
        let (x, weight) = (lease.read(norm.x), lease.read(norm.weight));
        let inv = RowsMut::new(lease.write(norm.inv), 1);
        let y = ActParts::lease(&mut lease, y, width);
        let scratch = Scratch::lease(&mut lease, &self.workspace);
        let rows = x.len() / width;
        let grain = grain(&self.pool, rows, width);
        self.pool
            .by_rows_worker(rows, grain, (inv, y), |rows, (inv, mut y), worker| {
                let scratch = &mut scratch.of(worker)[..width];
                let x = rows_of(x, &rows, width);
                rms_norm_rows(self.isa, x, weight, norm.eps, inv, &mut y, scratch);
            });
    }

    fn rms_norm_backward(&mut self, norm: RmsNorm<R>, dy: Buf<R>, dx: Buf<R>, dweight: Buf<R>) {
        let width = norm.width;
        let mut lease = self.arena.lease();
        let (x, weight) = (lease.read(norm.x), lease.read(norm.weight));
        let (inv, dy) = (lease.read(norm.inv), lease.read(dy));
        let (dx, dweight) = (lease.write(dx), lease.write(dweight));
        // A chunk of rows at a time: the second pass finds them in the cache.
        // Whole blocks of the sums.
        let chunk_rows = (NORM_VALUES / width)
            .next_multiple_of(norm::BLOCK_ROWS)
            .max(norm::BLOCK_ROWS);
        let chunk = chunk_rows * width;
        let rows = x.chunks(chunk).zip(dy.chunks(chunk));
        let kept = dx.chunks_mut(chunk).zip(inv.chunks(chunk_rows));
        for ((x, dy), (dx, inv)) in rows.zip(kept) {
            let dx = RowsMut::new(dx, width);
            self.pool.by_rows(inv.len(), GRAIN, dx, |rows, dx| {
                let (x, dy) = (rows_of(x, &rows, width), rows_of(dy, &rows, width));
                rms_norm_backward_rows(self.isa, x, weight, &inv[rows], dy, dx);
            });
            let dweight = RowsMut::new(&mut *dweight, 1);
            self.pool.by_rows(width, 64, dweight, |columns, dw| {
                rms_norm_dweight_columns(self.isa, x, inv, dy, width, columns.start, dw);
            });
        }
    }

    fn layer_norm(&mut self, op: LayerNorm<R>, y: ActBuf<R>) {
        self.layer_norm_op(op, y);
    }

    fn layer_norm_backward(&mut self, op: LayerNormBackward<R>) {
        self.layer_norm_backward_op(op);
    }

    fn norm_rope(&mut self, op: NormRope<R>, y: AttnBuf<R>) {
        let width = op.heads * op.norm.width;
        let mut lease = self.arena.lease();
        let tables = Rotations::lease(&mut lease, &op);
        let (x, weight) = (lease.read(op.norm.x), lease.read(op.norm.weight));
        let inv = RowsMut::new(lease.write(op.norm.inv), op.heads);
        let y = ActParts::lease(&mut lease, y.into(), width);
        let scratch = Scratch::lease(&mut lease, &self.workspace);
        let rows = x.len() / width;
        self.pool.by_rows_worker(
            rows,
            grain(&self.pool, rows, width),
            (inv, y),
            |rows, (inv, y), worker| {
                let scratch = &mut scratch.of(worker)[..width];
                let x = rows_of(x, &rows, width);
                let part = NormRopeRows {
                    first: rows.start,
                    x,
                    weight,
                    eps: op.norm.eps,
                };
                norm_rope_rows(self.isa, part, tables, inv, y, scratch);
            },
        );
    }

    fn norm_rope_backward(&mut self, op: NormRope<R>, dy: Buf<R>, dweight: Buf<R>) {
        let (width, head_dim) = (op.heads * op.norm.width, op.norm.width);
        let mut lease = self.arena.lease();
        let tables = Rotations::lease(&mut lease, &op);
        let (x, weight) = (lease.read(op.norm.x), lease.read(op.norm.weight));
        let inv = lease.read(op.norm.inv);
        let rows = x.len() / width;
        let dy = lease.write(dy);
        self.pool
            .by_rows(rows, GRAIN, RowsMut::new(&mut *dy, width), |rows, dy| {
                rope_backward_rows(self.isa, rows.start, width, head_dim, tables, dy);
            });
        let dw = RowsMut::new(lease.write(dweight), 1);
        let turned = &*dy;
        self.pool.by_rows(head_dim, 16, dw, |columns, dw| {
            rms_norm_dweight_columns(self.isa, x, inv, turned, head_dim, columns.start, dw);
        });
        self.pool
            .by_rows(rows, GRAIN, RowsMut::new(dy, width), |rows, dy| {
                let inv = rows_of(inv, &rows, op.heads);
                let x = rows_of(x, &rows, width);
                rms_norm_backward_in_place_rows(self.isa, x, weight, inv, dy);
            });
    }

    fn round_activation(&mut self, x: Buf<R>, width: usize, y: ActBuf<R>) {
        let mut lease = self.arena.lease();
        let x = lease.read(x);
        let y = ActParts::lease(&mut lease, y, width);
        let rows = x.len() / width;
        let grain = grain(&self.pool, rows, width);
        self.pool.by_rows(rows, grain, y, |rows, mut y| {
            round_rows(self.isa, rows_of(x, &rows, width), width, &mut y);
        });
    }

    fn round_attention(&mut self, x: Buf<R>, y: AttnBuf<R>) {
        let mut lease = self.arena.lease();
        let x = lease.read(x);
        match y {
            AttnBuf::Real(y) => lease.write(y).copy_from_slice(x),
            AttnBuf::Bf16(y) => {
                let y = RowsMut::new(lease.write(y), 1);
                self.pool.by_rows(x.len(), RUN, y, |rows, y| {
                    round_bf16_run(self.isa, &x[rows], y);
                });
            }
        }
    }

    fn linear(&mut self, x: ActBuf<R>, w: WeightBuf<R>, y: Buf<R>) {
        self.linear_op(x, w, y);
    }

    fn linears(&mut self, x: ActBuf<R>, products: &[Product<R>]) {
        self.linears_op(x, products);
    }

    fn linear_topk(
        &mut self,
        x: ActBuf<R>,
        w: WeightBuf<R>,
        logits: Buf<R>,
        wanted: TopK<'_>,
        kept: &mut Kept,
    ) {
        self.linear_topk_op(x, w, logits, wanted, kept);
    }

    fn linear_dx(
        &mut self,
        dy: Buf<R>,
        w: WeightBuf<R>,
        dx: Buf<R>,
        numerics_f32: bool,
        accumulate: bool,
    ) {
        self.linear_dx_op(dy, w, dx, numerics_f32, accumulate);
    }

    fn linear_dw(&mut self, dy: Buf<R>, x: ActBuf<R>, out: usize, inp: usize, dw: Buf<R>) {
        self.linear_dw_op(dy, x, out, inp, dw);
    }

    fn attention(&mut self, op: Attention<'_, R>) {
        self.attention_op(op);
    }

    fn cache_store(&mut self, op: CacheStore<'_, R>) {
        self.cache_store_op(op);
    }

    fn cache_move(&mut self, cache: CacheBuf, moves: &[(u32, u32)]) {
        self.cache_move_op(cache, moves);
    }

    fn cached_attention(&mut self, op: CachedAttention<'_, R>) {
        self.cached_attention_op(op);
    }

    fn attention_backward(&mut self, op: AttentionBackward<'_, R>) {
        self.attention_backward_op(op);
    }

    fn swiglu(&mut self, gate: Buf<R>, up: Buf<R>, width: usize, y: ActBuf<R>) {
        let mut lease = self.arena.lease();
        let (gate, up) = (lease.read(gate), lease.read(up));
        let y = ActParts::lease(&mut lease, y, width);
        let scratch = Scratch::lease(&mut lease, &self.workspace);
        let rows = gate.len() / width;
        let grain = grain(&self.pool, rows, width);
        self.pool
            .by_rows_worker(rows, grain, y, |rows, mut y, worker| {
                let scratch = &mut scratch.of(worker)[..width];
                let (gate, up) = (rows_of(gate, &rows, width), rows_of(up, &rows, width));
                swiglu_rows(self.isa, gate, up, &mut y, scratch);
            });
    }

    fn swiglu_backward(&mut self, dy: Buf<R>, gate: Buf<R>, up: Buf<R>) {
        let mut lease = self.arena.lease();
        let dy = lease.read(dy);
        let gate = RowsMut::new(lease.write(gate), 1);
        let up = RowsMut::new(lease.write(up), 1);
        self.pool
            .by_rows(dy.len(), RUN, (gate, up), |rows, (gate, up)| {
                swiglu_backward_run(self.isa, &dy[rows], gate, up);
            });
    }

    fn cross_entropy(&mut self, op: CrossEntropy<R>) {
        let vocab = op.logits.len() / op.targets.len();
        let mut lease = self.arena.lease();
        let targets = lease.read(op.targets);
        let logits = RowsMut::new(lease.write(op.logits), vocab);
        let losses = RowsMut::new(lease.write(op.losses), 1);
        let z_loss = R::from_f64(op.z_loss);
        let scale = op.gradient_scale.map(R::from_f64);
        let gradient = scale.map(|scale| loss::RowGradient { scale, z_loss });
        let softcap = R::from_f64(op.softcap);
        self.pool.by_rows(
            targets.len(),
            4,
            (logits, losses),
            |rows, (logits, losses)| {
                let each = logits.chunks_mut(vocab).zip(losses).zip(&targets[rows]);
                for ((logits, loss), &target) in each {
                    let target = target as usize;
                    *loss = if softcap > R::ZERO {
                        capped_cross_entropy_row(self.isa, logits, target, gradient, softcap)
                    } else {
                        cross_entropy_row(self.isa, logits, target, gradient)
                    };
                }
            },
        );
    }

    fn distill(&mut self, op: Distillation<R>) {
        let student = op.student;
        let vocab = student.logits.len() / student.targets.len();
        let mut lease = self.arena.lease();
        let targets = lease.read(student.targets);
        let logits = RowsMut::new(lease.write(student.logits), vocab);
        let teacher = RowsMut::new(lease.write(op.teacher), vocab);
        let losses = RowsMut::new(lease.write(student.losses), 1);
        let divergences = RowsMut::new(lease.write(op.divergences), 1);
        let scale = student.gradient_scale.map(R::from_f64);
        let mix = loss::Mix {
            weight: R::from_f64(op.weight),
            temperature: R::from_f64(op.temperature),
        };
        let out = ((logits, teacher), (losses, divergences));
        self.pool.by_rows(targets.len(), 4, out, |rows, parts| {
            let ((logits, teacher), (losses, divergences)) = parts;
            let rows_of_logits = logits.chunks_mut(vocab).zip(teacher.chunks_mut(vocab));
            let results = losses.iter_mut().zip(divergences);
            let each = rows_of_logits.zip(results).zip(&targets[rows]);
            for (((logits, teacher), (loss, divergence)), &target) in each {
                (*loss, *divergence) =
                    distill_row(self.isa, logits, teacher, target as usize, mix, scale);
            }
        });
    }

    fn blend(&mut self, latent: Buf<R>, cols: usize, ternary: TernaryBuf, share: f64, to: Buf<R>) {
        self.blend_op(latent, cols, ternary, share, to);
    }

    fn sum_squares(&mut self, x: Buf<R>) -> f64 {
        let x = self.arena.read(x);
        // Partial sums of up to `BATCH` chunks, then added in order: any number of
        // threads gives the same sum, and nothing is allocated.
        const BATCH: usize = 256;
        let mut total = 0.0;
        for x in x.chunks(BATCH * optimizer::NORM_CHUNK) {
            let mut sums = [0.0f64; BATCH];
            let chunks = x.len().div_ceil(optimizer::NORM_CHUNK);
            self.pool
                .by_rows(chunks, 8, RowsMut::new(&mut sums, 1), |rows, sums| {
                    for (i, sum) in rows.zip(sums) {
                        let start = i * optimizer::NORM_CHUNK;
                        let end = x.len().min(start + optimizer::NORM_CHUNK);
                        *sum = sum_squares_chunk(self.isa, &x[start..end]);
                    }
                });
            total += sum_lanes(sums[..chunks].iter().copied());
        }
        total
    }

    fn adamw(&mut self, op: AdamW<R>) {
        let mut lease = self.arena.lease();
        let grad = lease.read(op.grad);
        let weight = RowsMut::new(lease.write(op.weight), 1);
        let scalars = optimizer::AdamWScalars::new(&op);
        match (op.m, op.v) {
            (StoredBuf::Real(m), StoredBuf::Real(v)) => {
                let m = RowsMut::new(lease.write(m), 1);
                let out = (weight, (m, RowsMut::new(lease.write(v), 1)));
                self.pool
                    .by_rows(grad.len(), RUN, out, |rows, (w, (m, v))| {
                        adamw_run(self.isa, scalars, w, &grad[rows], m, v);
                    });
            }
            (StoredBuf::Bf16(m), StoredBuf::Bf16(v)) => {
                let m = RowsMut::new(lease.write(m), 1);
                let out = (weight, (m, RowsMut::new(lease.write(v), 1)));
                self.pool
                    .by_rows(grad.len(), RUN, out, |rows, (w, (m, v))| {
                        let (first, g) = (rows.start, &grad[rows]);
                        adamw_bf16_run(self.isa, scalars, first, w, g, m, v);
                    });
            }
            _ => panic!("both moments must be stored alike"),
        }
    }
}

/// Values of a norm whose gradients are taken before the next ones are read: 2 MiB of f32,
/// which a shared cache holds and beside which a barrier costs nothing.
const NORM_VALUES: usize = 1 << 19;

pub(super) fn packed_shape(out: usize, width: usize, group_size: usize) -> PackedShape {
    PackedShape {
        out,
        width,
        group_size,
    }
}

/// Values of a task in operations without rows.
const RUN: usize = 16 * 1024;

impl<R> From<AttnBuf<R>> for ActBuf<R> {
    fn from(x: AttnBuf<R>) -> Self {
        match x {
            AttnBuf::Real(x) => Self::Real(x),
            AttnBuf::Bf16(x) => Self::Bf16(x),
        }
    }
}

/// RoPE tables and the positions of the rows.
#[derive(Clone, Copy)]
pub(super) struct Rotations<'a, R> {
    cos: &'a [R],
    sin: &'a [R],
    positions: &'a [u32],
    half: usize,
}

impl<'a, R: Real> Rotations<'a, R> {
    fn lease(lease: &mut Lease<'a>, op: &NormRope<R>) -> Self {
        Self {
            cos: lease.read(op.cos),
            sin: lease.read(op.sin),
            positions: lease.read(op.positions),
            half: op.norm.width / 2,
        }
    }

    fn of(&self, row: usize) -> Rotation<'a, R> {
        let at = self.positions[row] as usize * self.half;
        Rotation {
            cos: &self.cos[at..at + self.half],
            sin: &self.sin[at..at + self.half],
        }
    }
}

pub(super) struct NormRopeRows<'a, R> {
    first: usize,
    x: &'a [R],
    weight: &'a [R],
    eps: f64,
}

multiversion! {
    /// Norm and rotation of a run of rows.
    fn norm_rope_rows[R: Real][R](
        part: NormRopeRows<'_, R>,
        tables: Rotations<'_, R>,
        inv: &mut [R],
        y: ActRows<'_, R>,
        scratch: &mut [R],
    ) = norm_rope_rows_kernel;
}

multiversion! {
    /// Turns the gradients of a run of rows back.
    fn rope_backward_rows[R: Real][R](
        first: usize,
        width: usize,
        head_dim: usize,
        tables: Rotations<'_, R>,
        dy: &mut [R],
    ) = rope_backward_rows_kernel;
}

#[inline(always)]
fn rope_backward_rows_kernel<R: Real>(
    first: usize,
    width: usize,
    head_dim: usize,
    tables: Rotations<'_, R>,
    dy: &mut [R],
) {
    for (i, dy) in dy.chunks_mut(width).enumerate() {
        norm::rope_backward_row(dy, head_dim, tables.of(first + i));
    }
}

#[inline(always)]
fn norm_rope_rows_kernel<R: Real>(
    part: NormRopeRows<'_, R>,
    tables: Rotations<'_, R>,
    inv: &mut [R],
    mut y: ActRows<'_, R>,
    scratch: &mut [R],
) {
    let heads = scratch.len() / part.weight.len();
    let rows = part.x.chunks(scratch.len()).zip(inv.chunks_mut(heads));
    for (i, (x, inv)) in rows.enumerate() {
        let at = tables.of(part.first + i);
        norm::norm_rope_row(x, part.weight, part.eps, at, inv, scratch);
        y.write_row(i, scratch);
    }
}
