//! The same attention on a unit for bf16 (AMX, dots of AVX-512): operands go from their stored
//! form straight into the tiles of the unit, without becoming numbers of 32 bits on the way.
//!
//! Each function says whether it has done the work: not without a unit, where numbers are not
//! stored as bf16, or where sizes do not suit.

#[cfg(target_arch = "x86_64")]
mod softmax;
#[cfg(target_arch = "x86_64")]
mod x86;

use super::backward::{Keys, QueryGradients, Saved};
use super::{Store, View};
use crate::ops::Segment;
use crate::real::Real;

/// [`forward_block`](super::forward_block).
#[inline(always)]
pub(super) fn forward<R: Real, S: Store<R>>(
    view: &View<'_, S>,
    segment: Segment,
    head: usize,
    rows: (usize, usize),
    put: &mut impl FnMut(usize, &[R], R),
    scratch: &mut [R],
) -> bool {
    #[cfg(target_arch = "x86_64")]
    if let Some(view) = x86::suited::<R, S>(view) {
        let mut put = |row: usize, out: &[f32], lse: f32| {
            put(row, bytemuck::cast_slice(out), R::from_f32(lse));
        };
        let scratch = bytemuck::cast_slice_mut(scratch);
        x86::forward(view, segment, head, rows, &mut put, scratch);
        return true;
    }
    let _ = (view, segment, head, rows, put, scratch);
    false
}

/// The sums of [`dkdv_tile`](super::dkdv_tile), unscaled, of all tiles of the keys, and of `dq`.
#[inline(always)]
pub(super) fn add_gradients<R: Real, S: Store<R>>(
    view: &View<'_, S>,
    saved: Saved<'_, R>,
    keys: Keys,
    dq: &mut Option<&mut dyn QueryGradients<R>>,
    scratch: &mut [R],
    (dk, dv): (&mut [R], &mut [R]),
) -> bool {
    #[cfg(target_arch = "x86_64")]
    if let Some(view) = x86::suited::<R, S>(view) {
        let saved = Saved {
            lse: bytemuck::cast_slice(saved.lse),
            dout: bytemuck::cast_slice(saved.dout),
            delta: bytemuck::cast_slice(saved.delta),
        };
        let mut dq = dq.as_mut().map(|dq| InF32(&mut **dq));
        let dq = dq.as_mut().map(|dq| dq as &mut dyn QueryGradients<f32>);
        let scratch = bytemuck::cast_slice_mut(scratch);
        let sums = (bytemuck::cast_slice_mut(dk), bytemuck::cast_slice_mut(dv));
        x86::add_gradients(view, saved, keys, dq, scratch, sums);
        return true;
    }
    let _ = (view, saved, keys, dq, scratch, dk, dv);
    false
}

/// Gradients that are f32, whatever they are called.
#[cfg(target_arch = "x86_64")]
struct InF32<'a, 'b, R>(&'a mut (dyn QueryGradients<R> + 'b));

#[cfg(target_arch = "x86_64")]
impl<R: Real> QueryGradients<f32> for InF32<'_, '_, R> {
    fn of(&mut self, row: usize, head: usize) -> &mut [f32] {
        bytemuck::cast_slice_mut(self.0.of(row, head))
    }
}
