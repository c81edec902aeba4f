//! Latent weights to trits and scales, and what lies between the two.

use super::{GRAIN, Host, blend_row, rows_of};
use crate::cpu::RowsMut;
use crate::kernels::project::project_rows;
use crate::memory::Buf;
use crate::ops::{ProjectError, ProjectStats, TernaryBuf};
use crate::real::Real;
use setun_ternary::ScaleRule;

impl<R: Real> Host<R> {
    pub(super) fn project_op(
        &mut self,
        latent: Buf<R>,
        cols: usize,
        rule: ScaleRule,
        to: TernaryBuf,
    ) -> Result<ProjectStats, ProjectError> {
        let mut lease = self.arena.lease();
        let latent = lease.read(latent);
        let groups = cols.div_ceil(to.group_size);
        let trits = RowsMut::new(lease.write(to.trits), cols);
        let scales = RowsMut::new(lease.write(to.scales), groups);
        // The first error in row order, whichever thread meets one first.
        let result = std::sync::Mutex::new((ProjectStats::default(), None::<ProjectError>));
        let rows = latent.len() / cols;
        self.pool
            .by_rows(rows, GRAIN, (trits, scales), |rows, (trits, scales)| {
                let part = rows_of(latent, &rows, cols);
                let one = project_rows(part, cols, to.group_size, rule, trits, scales);
                let mut all = result.lock().expect("no panic while the lock is held");
                match one {
                    Ok(stats) => {
                        all.0.zeros += stats.zeros;
                        all.0.flips += stats.flips;
                    }
                    Err(e) => {
                        let e = ProjectError {
                            row: rows.start + e.row,
                            ..e
                        };
                        all.1 = Some(all.1.filter(|first| first.row < e.row).unwrap_or(e));
                    }
                }
            });
        match result
            .into_inner()
            .expect("no panic while the lock is held")
        {
            (_, Some(error)) => Err(error),
            (stats, None) => Ok(stats),
        }
    }

    pub(super) fn blend_op(
        &mut self,
        latent: Buf<R>,
        cols: usize,
        ternary: TernaryBuf,
        share: f64,
        to: Buf<R>,
    ) {
        let groups = cols.div_ceil(ternary.group_size);
        let mut lease = self.arena.lease();
        let latent = lease.read(latent);
        let (trits, scales) = (lease.read(ternary.trits), lease.read(ternary.scales));
        let to = RowsMut::new(lease.write(to), cols);
        let share = R::from_f64(share);
        self.pool
            .by_rows(latent.len() / cols, GRAIN, to, |rows, to| {
                for (row, to) in rows.zip(to.chunks_mut(cols)) {
                    let (latent, trits) = (&latent[row * cols..], &trits[row * cols..]);
                    let scales = &scales[row * groups..][..groups];
                    let (latent, trits) = (&latent[..cols], &trits[..cols]);
                    let group_size = ternary.group_size;
                    blend_row(self.isa, latent, trits, scales, group_size, share, to);
                }
            });
    }
}
