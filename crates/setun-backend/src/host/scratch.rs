//! Memory that a task uses on the way.

use super::HostWorkspace;
use crate::cpu::{RowParts, RowsMut};
use crate::memory::Lease;
use crate::real::Real;

/// The scratch memory of all workers.
pub(super) struct Scratch<'a, R> {
    rows: RowsMut<'a, R>,
}

impl<'a, R: Real> Scratch<'a, R> {
    pub(super) fn lease(lease: &mut Lease<'a>, workspace: &HostWorkspace<R>) -> Self {
        Self {
            rows: RowsMut::new(lease.write(workspace.real), workspace.real_len),
        }
    }

    /// The scratch of one worker.
    #[allow(clippy::mut_from_ref)]
    pub(super) fn of(&self, worker: usize) -> &mut [R] {
        // SAFETY: a worker runs one task at a time, and a task asks once.
        unsafe { self.rows.part(worker..worker + 1) }
    }
}
