//! The memory plan of a run and its one allocation.
//!
//! Everything that a run needs is laid out in a [`Plan`] before step 0, so out of memory
//! happens then or never, and `--dry-run` can print it. Operations receive [`Buf`]
//! handles; a [`Lease`] resolves them to slices and checks at run time that no slice that
//! is written overlaps another, so callers need no `unsafe`.

use bytemuck::Pod;
use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::marker::PhantomData;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Alignment of every buffer: a cache line, which is also the widest vector.
const ALIGN: usize = 64;
/// Bytes of a huge page.
#[cfg(target_os = "linux")]
const HUGE_PAGE: usize = 2 << 20;

/// Asks the allocator to take large blocks from the system one by one, so that freeing one
/// gives its pages back at once.
///
/// glibc otherwise raises its limit for such blocks with each one that is freed, up to
/// 32 MiB, and the heaps of threads, where text is read and tokenized, would keep what they
/// once held. To be called before large blocks are made; elsewhere it does nothing.
pub fn return_large_blocks() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        const M_MMAP_THRESHOLD: std::ffi::c_int = -3;
        const LARGE: std::ffi::c_int = 1 << 20;
        unsafe extern "C" {
            fn mallopt(param: std::ffi::c_int, value: std::ffi::c_int) -> std::ffi::c_int;
        }
        // SAFETY: mallopt(3) sets a parameter of the allocator under its own lock.
        unsafe { mallopt(M_MMAP_THRESHOLD, LARGE) };
    }
}

/// Gives memory that this process has freed back to the system.
///
/// glibc keeps freed pages in the heap of each thread that freed them. Reading and
/// tokenizing a corpus frees many times what training needs, so a run calls this once
/// between the two; elsewhere allocators return pages by themselves, and it does nothing.
pub fn release_freed() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        unsafe extern "C" {
            fn malloc_trim(pad: usize) -> std::ffi::c_int;
        }
        // SAFETY: malloc_trim(3) takes any padding and may be called at any time from any
        // thread; it touches only memory that nobody holds.
        unsafe { malloc_trim(0) };
    }
}

/// Asks for huge pages where the system gives them on request: weights and caches are read
/// at random distances, and small pages then cost as much time as their contents. A hint; a
/// system that does not take it gives small pages.
fn ask_for_huge_pages(base: NonNull<u8>, bytes: usize) {
    #[cfg(target_os = "linux")]
    {
        use std::ffi::{c_int, c_void};
        const MADV_HUGEPAGE: c_int = 14;
        unsafe extern "C" {
            fn madvise(start: *mut c_void, len: usize, advice: c_int) -> c_int;
        }
        let start = base.addr().get();
        let skip = start.next_multiple_of(HUGE_PAGE) - start;
        let whole = bytes.saturating_sub(skip) / HUGE_PAGE * HUGE_PAGE;
        if whole > 0 {
            // SAFETY: `skip + whole <= bytes`, so the pages lie in the allocation, and `start +
            // skip` is where one begins; the advice changes nothing that a program could see.
            unsafe { madvise(base.as_ptr().add(skip).cast(), whole, MADV_HUGEPAGE) };
        }
    }
    let _ = (base, bytes);
}

/// Writes to every page, on all threads: the system clears a page when it is first written, and
/// a virtual machine may have to find it first, at a tenth of the speed of memory.
fn touch(zeros: &mut [u8]) {
    const WORTH_A_THREAD: usize = 32 << 20;
    let write = |part: &mut [u8]| {
        // The last page may begin between two steps.
        for page in (0..part.len()).step_by(4096).chain([part.len() - 1]) {
            // Zero, which the compiler must not know, or it would write nothing.
            part[page] = std::hint::black_box(0);
        }
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let part = zeros.len().div_ceil(threads).max(WORTH_A_THREAD);
    std::thread::scope(|scope| {
        let mut parts = zeros.chunks_mut(part);
        let own = parts.next_back();
        parts.for_each(|part| _ = scope.spawn(|| write(part)));
        own.into_iter().for_each(write);
    });
}

/// What a buffer is for; the rows that `--dry-run` prints.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Category {
    /// Latent weights, their projection, norms.
    Parameters,
    /// Gradients of the parameters.
    Gradients,
    /// Moments of the optimizer.
    Optimizer,
    /// What the forward pass saves for the backward pass.
    Activations,
    /// Keys and values of past positions.
    KvCache,
    /// Scratch memory.
    Workspace,
}

impl Category {
    /// All categories, in the order in which they are printed.
    pub const ALL: [Self; 6] = [
        Self::Parameters,
        Self::Gradients,
        Self::Optimizer,
        Self::Activations,
        Self::KvCache,
        Self::Workspace,
    ];

    /// Name as it is printed.
    pub fn name(self) -> &'static str {
        match self {
            Self::Parameters => "parameters",
            Self::Gradients => "gradients",
            Self::Optimizer => "optimizer",
            Self::Activations => "activations",
            Self::KvCache => "kv cache",
            Self::Workspace => "workspace",
        }
    }
}

/// A handle to `len` values of type `T` in an [`Arena`].
pub struct Buf<T> {
    offset: usize,
    len: usize,
    element: PhantomData<fn() -> T>,
}

impl<T> Clone for Buf<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Buf<T> {}

impl<T> std::fmt::Debug for Buf<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Buf({}..+{})", self.offset, self.len)
    }
}

impl<T> Buf<T> {
    /// Number of values.
    pub fn len(self) -> usize {
        self.len
    }

    /// Whether the buffer has no values.
    pub fn is_empty(self) -> bool {
        self.len == 0
    }

    /// The part of `len` values from `start`.
    ///
    /// # Panics
    /// If the part does not lie inside the buffer.
    pub fn part(self, start: usize, len: usize) -> Self {
        assert!(start + len <= self.len, "part outside of a buffer");
        Self {
            offset: self.offset + start * size_of::<T>(),
            len,
            element: PhantomData,
        }
    }
}

/// One line of a [`Plan`].
#[derive(Clone, Debug)]
pub struct PlanRow {
    /// What the buffer is for.
    pub category: Category,
    /// Name, for example `layers.0.gate [4096, 1536]`.
    pub name: String,
    /// Bytes, rounded up to the alignment.
    pub bytes: usize,
}

/// The layout of all memory of a run.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    rows: Vec<PlanRow>,
    total: usize,
}

impl Plan {
    /// An empty plan.
    pub fn new() -> Self {
        Self::default()
    }

    /// Reserves `len` values of type `T`.
    pub fn alloc<T: Pod>(
        &mut self,
        category: Category,
        name: impl Into<String>,
        len: usize,
    ) -> Buf<T> {
        let bytes = (len * size_of::<T>()).next_multiple_of(ALIGN);
        let buf = Buf {
            offset: self.total,
            len,
            element: PhantomData,
        };
        self.rows.push(PlanRow {
            category,
            name: name.into(),
            bytes,
        });
        self.total += bytes;
        buf
    }

    /// Every buffer, in order.
    pub fn rows(&self) -> &[PlanRow] {
        &self.rows
    }

    /// Bytes of one category.
    pub fn category_bytes(&self, category: Category) -> usize {
        let rows = self.rows.iter().filter(|row| row.category == category);
        rows.map(|row| row.bytes).sum()
    }

    /// Bytes in all.
    pub fn total_bytes(&self) -> usize {
        self.total
    }
}

/// The memory itself; freed when the arena and all that is shared of it are gone.
struct Memory {
    /// Where the buffers begin, at a multiple of [`ALIGN`].
    base: NonNull<u8>,
    /// Bytes from there.
    bytes: usize,
    /// What was allocated.
    start: NonNull<u8>,
    layout: Layout,
}

// SAFETY: what the pointers lead to is owned; who may read and write through it is the affair of
// `Arena` and `Shared`, which keep readers and writers apart.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    fn check<T>(&self, buf: Buf<T>) {
        let end = buf.offset + buf.len * size_of::<T>();
        assert!(end <= self.bytes, "a buffer of another plan");
        assert!(
            buf.offset.is_multiple_of(align_of::<T>()),
            "misaligned buffer"
        );
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: `start` was allocated with this layout and is freed once.
        unsafe { dealloc(self.start.as_ptr(), self.layout) }
    }
}

/// The one allocation behind a [`Plan`], zeroed and touched. It hands out slices through
/// `&mut self` ([`Arena::lease`]) or `&self` ([`Arena::read`]).
pub struct Arena {
    memory: Arc<Memory>,
    shared: Option<Loan>,
}

/// What is shared at the moment.
struct Loan {
    /// Byte ranges, ascending and apart.
    ranges: Arc<[(usize, usize)]>,
    /// False as soon as nobody reads them any more.
    live: Arc<AtomicBool>,
}

impl Loan {
    /// Whether a part of `start..end` is being read by someone else.
    fn holds(&self, start: usize, end: usize) -> bool {
        // Acquire: their reads are over before anything is written.
        if !self.live.load(Ordering::Acquire) {
            return false;
        }
        let next = self.ranges.partition_point(|range| range.1 <= start);
        self.ranges.get(next).is_some_and(|range| range.0 < end)
    }
}

/// Buffers that another thread may read while operations go on; no operation may write
/// them before this is dropped.
pub struct Shared {
    memory: Arc<Memory>,
    ranges: Arc<[(usize, usize)]>,
    live: Arc<AtomicBool>,
}

impl Shared {
    /// A shared buffer, or a part of one.
    ///
    /// # Panics
    /// For a buffer that is not shared.
    pub fn read<T: Pod>(&self, buf: Buf<T>) -> &[T] {
        self.memory.check(buf);
        let (start, end) = (buf.offset, buf.offset + buf.len * size_of::<T>());
        let at = self.ranges.partition_point(|range| range.1 <= start);
        let inside = self
            .ranges
            .get(at)
            .is_some_and(|r| r.0 <= start && end <= r.1);
        assert!(inside || buf.is_empty(), "the buffer is not shared");
        // SAFETY: in bounds and aligned (`check`), initialised. The range is shared: while
        // `self` exists, `live` is true, and no lease hands it out for writing.
        unsafe { std::slice::from_raw_parts(self.memory.base.as_ptr().add(start).cast(), buf.len) }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // Release: all reads are before it.
        self.live.store(false, Ordering::Release);
    }
}

/// The bytes of a buffer, whatever its values are: what [`Arena::share`] takes.
#[derive(Clone, Copy, Debug)]
pub struct Extent {
    start: usize,
    end: usize,
}

impl<T> From<Buf<T>> for Extent {
    fn from(buf: Buf<T>) -> Self {
        Self {
            start: buf.offset,
            end: buf.offset + buf.len * size_of::<T>(),
        }
    }
}

impl Arena {
    /// Allocates what `plan` asks for and touches every page, so that a lack of memory
    /// shows now and not in the middle of a run.
    pub fn new(plan: &Plan) -> Self {
        let bytes = plan.total.max(ALIGN);
        // Aligned here and not by the allocator: what it aligns it also fills with zeros,
        // though large blocks come from the system as zeros.
        let layout = Layout::from_size_align(bytes + ALIGN, 1).expect("a plan below isize::MAX");
        // SAFETY: the layout has a non-zero size.
        let start = unsafe { alloc_zeroed(layout) };
        let Some(start) = NonNull::new(start) else {
            handle_alloc_error(layout)
        };
        let address = start.addr().get();
        // SAFETY: less than ALIGN bytes further, which the layout has beside `bytes`.
        let base = unsafe { start.add(address.next_multiple_of(ALIGN) - address) };
        ask_for_huge_pages(base, bytes);
        // SAFETY: `bytes` zeros inside the allocation, which nobody else has yet.
        touch(unsafe { std::slice::from_raw_parts_mut(base.as_ptr(), bytes) });
        Self {
            memory: Arc::new(Memory {
                base,
                bytes,
                start,
                layout,
            }),
            shared: None,
        }
    }

    /// Lets another thread read the buffers `extents` while operations go on that do not
    /// write them.
    ///
    /// # Panics
    /// For buffers of another plan, and while something is shared already.
    pub fn share(&mut self, extents: &[Extent]) -> Shared {
        let live = |loan: &Loan| loan.live.load(Ordering::Acquire);
        let busy = self.shared.as_ref().is_some_and(live);
        assert!(!busy, "something is shared already");
        let mut ranges: Vec<(usize, usize)> = extents
            .iter()
            .filter(|extent| extent.start < extent.end)
            .map(|extent| (extent.start, extent.end))
            .collect();
        ranges.sort_unstable();
        let apart = ranges.windows(2).all(|pair| pair[0].1 <= pair[1].0);
        let inside = ranges
            .last()
            .is_none_or(|range| range.1 <= self.memory.bytes);
        assert!(apart && inside, "buffers that overlap, or of another plan");
        let ranges: Arc<[(usize, usize)]> = ranges.into();
        let live = Arc::new(AtomicBool::new(true));
        self.shared = Some(Loan {
            ranges: Arc::clone(&ranges),
            live: Arc::clone(&live),
        });
        Shared {
            memory: Arc::clone(&self.memory),
            ranges,
            live,
        }
    }

    /// Starts a lease: slices for one operation.
    pub fn lease(&mut self) -> Lease<'_> {
        Lease {
            arena: self,
            taken: [(0, 0, false); Lease::MAX],
            count: 0,
        }
    }

    /// A buffer to read from.
    pub fn read<T: Pod>(&self, buf: Buf<T>) -> &[T] {
        self.memory.check(buf);
        let base = self.memory.base.as_ptr();
        // SAFETY: `check` proved that the range lies in the allocation and is aligned;
        // the memory is initialised (zeroed) and any bits are a valid `Pod`. `&self`
        // keeps writers away for the lifetime of the slice: a `Shared` only reads.
        unsafe { std::slice::from_raw_parts(base.add(buf.offset).cast(), buf.len) }
    }
}

/// The slices of one operation. Written slices overlap no other slice of the lease;
/// this is checked, so the interface is safe.
pub struct Lease<'a> {
    arena: &'a mut Arena,
    /// Byte ranges handed out: (start, end, written).
    taken: [(usize, usize, bool); Lease::MAX],
    count: usize,
}

impl<'a> Lease<'a> {
    /// Slices that one operation may hold.
    const MAX: usize = 24;

    fn take<T>(&mut self, buf: Buf<T>, write: bool) {
        self.arena.memory.check(buf);
        let range = (buf.offset, buf.offset + buf.len * size_of::<T>());
        if write && let Some(loan) = &self.arena.shared {
            assert!(
                !loan.holds(range.0, range.1),
                "an operation writes what another thread reads"
            );
        }
        for &(start, end, written) in &self.taken[..self.count] {
            let apart = range.1 <= start || end <= range.0;
            assert!(
                apart || !(write || written),
                "an operation's buffers overlap"
            );
        }
        assert!(self.count < Self::MAX, "too many buffers in one operation");
        self.taken[self.count] = (range.0, range.1, write);
        self.count += 1;
    }

    /// A slice to read.
    ///
    /// # Panics
    /// If it overlaps a slice that this lease writes.
    pub fn read<T: Pod>(&mut self, buf: Buf<T>) -> &'a [T] {
        self.take(buf, false);
        // SAFETY: in bounds and aligned (`check`), initialised; `take` proved that no
        // `&mut` slice of this lease overlaps it, and the lease holds the arena.
        unsafe {
            let start = self.arena.memory.base.as_ptr().add(buf.offset).cast();
            std::slice::from_raw_parts(start, buf.len)
        }
    }

    /// A slice to write.
    ///
    /// # Panics
    /// If it overlaps any other slice of this lease.
    pub fn write<T: Pod>(&mut self, buf: Buf<T>) -> &'a mut [T] {
        self.take(buf, true);
        // SAFETY: as in `read`; `take` proved that no other slice of this lease overlaps,
        // and that no other thread reads it.
        unsafe {
            let start = self.arena.memory.base.as_ptr().add(buf.offset).cast();
            std::slice::from_raw_parts_mut(start, buf.len)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_apart_aligned_and_zeroed() {
        let mut plan = Plan::new();
        let a: Buf<f32> = plan.alloc(Category::Parameters, "a", 5);
        let b: Buf<i8> = plan.alloc(Category::Workspace, "b", 3);
        assert_eq!(plan.total_bytes(), 128);
        assert_eq!(plan.category_bytes(Category::Workspace), 64);
        let mut arena = Arena::new(&plan);
        let mut lease = arena.lease();
        lease.write(a).fill(1.0);
        assert_eq!(lease.read(b), [0; 3]);
        assert_eq!(arena.read(a.part(1, 2)), [1.0; 2]);
    }

    #[test]
    fn what_is_shared_is_read_and_not_written() {
        let mut plan = Plan::new();
        let a: Buf<f32> = plan.alloc(Category::Parameters, "a", 32);
        let b: Buf<f32> = plan.alloc(Category::Parameters, "b", 32);
        let c: Buf<i8> = plan.alloc(Category::Parameters, "c", 64);
        let mut arena = Arena::new(&plan);
        arena.lease().write(a).fill(2.0);
        arena.lease().write(c).fill(7);
        let shared = arena.share(&[c.into(), a.into()]);
        let reader = std::thread::spawn(move || {
            assert!(std::panic::catch_unwind(|| shared.read(b).len()).is_err());
            let sum: f32 = shared.read(a.part(8, 16)).iter().sum();
            (sum, shared.read(c)[63], shared)
        });
        arena.lease().write(b).fill(3.0);
        let (sum, last, shared) = reader.join().unwrap();
        assert_eq!((sum, last), (32.0, 7));
        let refused = |arena: &mut Arena, buf: Buf<f32>| {
            let write = std::panic::AssertUnwindSafe(|| arena.lease().write(buf).fill(0.0));
            std::panic::catch_unwind(write).is_err()
        };
        assert!(refused(&mut arena, a.part(31, 1)));
        assert!(!refused(&mut arena, b));
        assert_eq!(arena.read(a)[0], 2.0);
        drop(shared);
        assert!(!refused(&mut arena, a));
    }

    #[test]
    fn overlapping_writes_are_refused() {
        let mut plan = Plan::new();
        let a: Buf<f32> = plan.alloc(Category::Parameters, "a", 8);
        let overlap = |second: Buf<f32>| {
            std::panic::catch_unwind(move || {
                let mut plan = Plan::new();
                let _: Buf<f32> = plan.alloc(Category::Parameters, "a", 8);
                let mut arena = Arena::new(&plan);
                let mut lease = arena.lease();
                lease.read(a.part(0, 4));
                lease.write(second);
            })
            .is_err()
        };
        assert!(overlap(a.part(3, 2)));
        assert!(!overlap(a.part(4, 4)));
    }
}
