//! The system's allocator with counters, for tests of what a call allocates.
#![allow(dead_code)] // A test binary uses one of the two measures.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::atomic::{AtomicUsize, Ordering};

struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Allocations of all threads since the start.
static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    /// Bytes that this thread has allocated and not freed.
    static LIVE: Cell<isize> = const { Cell::new(0) };
    /// The largest value of `LIVE` since it was last reset.
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

impl Counting {
    /// Notes that `change` bytes came or went. Nothing here allocates: the cells need no
    /// lazy initialisation and no destructor.
    fn note(change: isize) {
        LIVE.with(|live| {
            live.set(live.get() + change);
            PEAK.with(|peak| peak.set(peak.get().max(live.get())));
        });
        if change > 0 {
            ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        }
    }
}

// SAFETY: every call is handed on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        Self::note(layout.size() as isize);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        Self::note(layout.size() as isize);
        // SAFETY: the caller's promise.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, start: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // Old and new block may exist side by side.
        Self::note(size as isize);
        Self::note(-(layout.size() as isize));
        // SAFETY: the caller's promise.
        unsafe { System.realloc(start, layout, size) }
    }

    unsafe fn dealloc(&self, start: *mut u8, layout: Layout) {
        Self::note(-(layout.size() as isize));
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(start, layout) }
    }
}

/// The most bytes that this thread held during `call` beyond what it held before.
pub fn peak_bytes(call: impl FnOnce()) -> usize {
    let before = LIVE.get();
    PEAK.set(before);
    call();
    usize::try_from(PEAK.get() - before).expect("a peak is never below its start")
}

/// Allocations of all threads during `call`.
pub fn allocations(call: impl FnOnce()) -> usize {
    let before = ALLOCATIONS.load(Ordering::Relaxed);
    call();
    ALLOCATIONS.load(Ordering::Relaxed) - before
}
