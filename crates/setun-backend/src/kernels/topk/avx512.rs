//! A tile of logits in registers of AVX-512.

use super::{Best, RUN, TileSum};
use crate::cpu::lanes::{Largest, W, exp_small, load, sum_of_lanes};
use std::arch::x86_64::*;

/// [`Best::add`] and [`TileSum::of`] of whole runs, to the bit: one pass finds the maximum and the
/// runs with something to keep, another adds up.
#[target_feature(enable = "avx512f,avx512dq")]
pub(crate) fn look_at(first: usize, runs: &[[f32; RUN]], best: &mut Best) -> TileSum {
    let mut largest = Largest::none();
    for (run, values) in runs.iter().enumerate() {
        let threshold = best.threshold;
        let least = _mm512_set1_ps(threshold.unwrap_or_default());
        let mut above = 0;
        for (i, values) in values.as_chunks::<W>().0.iter().enumerate() {
            let values = load(values);
            largest.add(values);
            let mask = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(values, least);
            above |= u64::from(mask) << (i * W);
        }
        if threshold.is_none() {
            above = u64::MAX;
        }
        if above != 0 {
            best.take(first + run * RUN, values, above);
        }
    }
    let max = largest.get();
    let mut sums = _mm512_setzero_ps();
    for values in runs.as_flattened().as_chunks::<W>().0 {
        let less = _mm512_sub_ps(load(values), _mm512_set1_ps(max));
        sums = _mm512_add_ps(sums, exp_small(less));
    }
    let sum = sum_of_lanes(sums);
    TileSum { max, sum }
}
