//! The CPU: instruction sets, threads and blocked products.

#[cfg(target_arch = "x86_64")]
pub(crate) mod amx;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx2_packed;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
#[cfg(target_arch = "x86_64")]
mod avx512_packed;
#[cfg(target_arch = "x86_64")]
pub(crate) mod bf16;
pub mod gemm;
pub mod int8;
pub(crate) mod isa;
#[cfg(target_arch = "x86_64")]
pub(crate) mod lanes;
pub mod operand;
pub mod packed;
pub mod peak;
pub mod pool;
pub(crate) mod widen;

pub use isa::Isa;
pub(crate) use isa::multiversion;
pub use pool::{Pool, RowParts, RowsMut};

/// Asks the memory for the cache line of `values[at]`, which will be read soon. Nothing
/// happens where there is no such value.
#[inline(always)]
pub(crate) fn prefetch<T>(values: &[T], at: usize) {
    let Some(value) = values.get(at) else { return };
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a hint for an address inside a slice; SSE is in the baseline of x86-64.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(value).cast()) };
    }
    let _ = value;
}

/// As [`prefetch`], into the second-level cache only: for what is used when so much else has been
/// that the first level would have lost it.
#[inline(always)]
pub(crate) fn prefetch_early<T>(values: &[T], at: usize) {
    if let Some(value) = values.get(at) {
        prefetch_early_at(value);
    }
}

/// As [`prefetch_early`], of the line of an address, whatever is there.
#[inline(always)]
pub(crate) fn prefetch_early_at<T>(address: *const T) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        // SAFETY: a hint, which reads nothing; SSE is in the baseline of x86-64.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(address.cast()) };
    }
    let _ = address;
}
