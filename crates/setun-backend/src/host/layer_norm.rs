//! LayerNorm of [`Host`].

use super::scratch::Scratch;
use super::{ActParts, GRAIN, Host, rows_of};
use crate::cpu::{Isa, Pool, RowsMut};
use crate::kernels::attention::Store;
use crate::kernels::layer_norm::{BLOCK_ROWS, GradientRows, Statistics};
use crate::layer_norm::{backward_block, forward_all, sum_blocks};
use crate::memory::{Buf, Lease};
use crate::ops::{ActBuf, LayerNorm, LayerNormBackward, StoredBuf};
use crate::real::Real;

/// Columns of a task of the second stage.
const COLUMNS: usize = 256;

impl<R: Real> Host<R> {
    pub(super) fn layer_norm_op(&mut self, op: LayerNorm<R>, y: ActBuf<R>) {
        let mut lease = self.arena.lease();
        let affine = (lease.read(op.gamma), lease.read(op.beta));
        let [center, rest, inv] =
            [op.center, op.rest, op.inv].map(|buf| RowsMut::new(lease.write(buf), 1));
        let y = ActParts::lease(&mut lease, y, op.width);
        let out = ((center, (rest, inv)), y);
        let scratch = Scratch::lease(&mut lease, &self.workspace);
        let run = Run {
            pool: &self.pool,
            isa: self.isa,
            scratch,
        };
        match op.x {
            StoredBuf::Real(x) => run.forward(lease.read(x), affine, op.eps, out),
            StoredBuf::Bf16(x) => run.forward(lease.read(x), affine, op.eps, out),
        }
    }

    pub(super) fn layer_norm_backward_op(&mut self, op: LayerNormBackward<R>) {
        let mut lease = self.arena.lease();
        let scratch = Scratch::lease(&mut lease, &self.workspace);
        let run = Run {
            pool: &self.pool,
            isa: self.isa,
            scratch,
        };
        match op.forward.x {
            StoredBuf::Real(x) => run.backward(&mut lease, x, op),
            StoredBuf::Bf16(x) => run.backward(&mut lease, x, op),
        }
    }
}

/// Statistics of rows, as tasks split them.
type Kept<'a, R> = (RowsMut<'a, R>, (RowsMut<'a, R>, RowsMut<'a, R>));

/// What both passes run with.
struct Run<'a, 'b, R: Real> {
    pool: &'b Pool,
    isa: Isa,
    scratch: Scratch<'a, R>,
}

impl<'a, R: Real> Run<'a, '_, R> {
    fn forward<S: Store<R>>(
        &self,
        x: &[S],
        affine: (&[R], &[R]),
        eps: f64,
        out: (Kept<'_, R>, ActParts<'_, R>),
    ) {
        let width = affine.0.len();
        let rows = x.len() / width;
        let (isa, all) = (self.isa, &self.scratch);
        self.pool
            .by_rows_worker(rows, GRAIN, out, |rows, (kept, mut y), worker| {
                let (center, (rest, inv)) = kept;
                let keep = Statistics { center, rest, inv };
                let x = rows_of(x, &rows, width);
                let scratch = &mut all.of(worker)[..width];
                forward_all(isa, x, affine, eps, keep, &mut y, scratch);
            });
    }

    fn backward<S: Store<R>>(&self, lease: &mut Lease<'a>, x: Buf<S>, op: LayerNormBackward<R>) {
        let (forward, width) = (op.forward, op.forward.width);
        let x = lease.read(x);
        let rows = x.len() / width;
        let all = GradientRows {
            x,
            dy: lease.read(op.dy),
            gamma: lease.read(forward.gamma),
            center: lease.read(forward.center),
            rest: lease.read(forward.rest),
            inv: lease.read(forward.inv),
            accumulate: op.accumulate,
        };
        let blocks = rows.div_ceil(BLOCK_ROWS);
        let partial = &mut lease.write(op.partial)[..blocks * 2 * width];
        let sums = RowsMut::new(&mut *partial, 2 * width);
        let dx = RowsMut::new(lease.write(op.dx), BLOCK_ROWS * width);
        let (isa, scratch) = (self.isa, &self.scratch);
        self.pool
            .by_rows_worker(blocks, 1, (dx, sums), |block, (dx, sums), worker| {
                let first = block.start * BLOCK_ROWS;
                let rows = first..rows.min(first + BLOCK_ROWS);
                let part = GradientRows {
                    x: rows_of(all.x, &rows, width),
                    dy: rows_of(all.dy, &rows, width),
                    center: &all.center[rows.clone()],
                    rest: &all.rest[rows.clone()],
                    inv: &all.inv[rows],
                    ..all
                };
                backward_block(isa, part, dx, sums, scratch.of(worker));
            });
        let partial = &*partial;
        for (which, sum) in [op.dgamma, op.dbeta].into_iter().enumerate() {
            let sum = RowsMut::new(lease.write(sum), 1);
            self.pool.by_rows(width, COLUMNS, sum, |columns, sum| {
                sum_blocks(isa, partial, width, which, columns.start, sum);
            });
        }
    }
}
