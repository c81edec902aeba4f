//! The same attention on a unit for bf16 (AMX, dots of AVX-512): operands go from their stored
//! form straight into the tiles of the unit, without becoming numbers of 32 bits on the way.
//!
//! Each function says whether it has done the work: not without a unit, where numbers are not
//! stored as bf16, or where sizes do not suit.

#[cfg(target_arch = "x86_64")]
mod keys;
#[cfg(target_arch = "x86_64")]
mod softmax;
#[cfg(target_arch = "x86_64")]
mod x86;

use super::backward::{Keys, QueryGradients, Saved};
use super::{Store, View};
use crate::cache::CachedSegment;
use crate::kernels::cache::CachedView;
use crate::ops::Segment;
use crate::real::Real;
use std::ops::Range;

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
        let mut put = |row: usize, _: usize, out: &[f32], lse: f32| {
            put(row, bytemuck::cast_slice(out), R::from_f32(lse));
        };
        let scratch = bytemuck::cast_slice_mut(scratch);
        let heads = head..head + 1;
        let from = (view, keys::Source::Rows(view));
        x86::forward(from, segment, heads, rows, &mut put, scratch);
        return true;
    }
    let _ = (view, segment, head, rows, put, scratch);
    false
}

/// Rows of a chain that [`forward_cached`] takes for so many heads, where there is a unit.
pub(crate) fn cached_rows<R: Real, S: Store<R>>(
    view: &CachedView<'_, S>,
    heads: usize,
) -> Option<usize> {
    #[cfg(target_arch = "x86_64")]
    return x86::cached_rows::<R, S>(view, heads);
    #[cfg(not(target_arch = "x86_64"))]
    {
        let _ = (view, heads);
        None
    }
}

/// [`cached_block`](crate::kernels::cache::cached_block) of rows of a chain.
#[inline(always)]
pub(crate) fn forward_cached<R: Real, S: Store<R>>(
    view: &CachedView<'_, S>,
    segment: &CachedSegment<'_>,
    heads: Range<usize>,
    rows: (usize, usize),
    put: &mut impl FnMut(usize, usize, &[R]),
    scratch: &mut [R],
) -> bool {
    #[cfg(target_arch = "x86_64")]
    if cached_rows::<R, S>(view, heads.len()).is_some_and(|most| rows.1 - rows.0 <= most) {
        let mut put = |row: usize, head: usize, out: &[f32]| {
            put(row, head, bytemuck::cast_slice(out));
        };
        let scratch = bytemuck::cast_slice_mut(scratch);
        return x86::forward_cached(view, segment, heads, rows, &mut put, scratch);
    }
    let _ = (view, segment, heads, rows, put, scratch);
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
