//! A small pool of threads that share the tasks of one operation.
//!
//! Waiting threads spin for at most 50 microseconds and then park: these run on shared
//! machines. Which thread runs a task never shows in a result; a task's outputs are its
//! own. Nothing is allocated after [`Pool::new`].

use std::cell::{Cell, UnsafeCell};
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long a thread spins before it parks.
const SPIN: Duration = Duration::from_micros(50);

/// A task body: `(task, worker)`.
type Body<'a> = dyn Fn(usize, usize) + Sync + 'a;

/// The threads.
///
/// Only one thread at a time runs jobs, so a pool is not `Sync`, and a task that starts another
/// job on the pool that runs it panics.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    is_running: Cell<bool>,
}

/// Says that a job runs for as long as it lives.
struct Running<'a>(&'a Cell<bool>);

impl<'a> Running<'a> {
    fn start(is_running: &'a Cell<bool>) -> Self {
        assert!(
            !is_running.replace(true),
            "a task cannot start a job on its own pool"
        );
        Self(is_running)
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.set(false);
    }
}

struct Shared {
    /// Rises by two for each job; odd means that the pool is closing.
    generation: AtomicUsize,
    next_task: AtomicUsize,
    /// Workers that have not finished the current job.
    busy: AtomicUsize,
    panicked: AtomicBool,
    /// Written by [`Pool::run`] while no worker is busy, read by workers while they are.
    job: UnsafeCell<Option<Job>>,
    /// Workers that are parked, or about to be. Waking costs a system call, which takes
    /// longer than many a job, so it is left out where nobody sleeps.
    sleeping: AtomicUsize,
    /// Whether [`Pool::run`] is parked, or about to be.
    waiting: AtomicBool,
    /// Held while going to sleep and while waking, so that neither misses the other.
    park: Mutex<()>,
    wake: Condvar,
    done: Condvar,
}

// SAFETY: all but `job` is `Sync`. `job` is written by the one thread that runs jobs, before
// the release of `generation` that workers acquire, and not again before they have let go
// of `busy`, which that thread acquires.
unsafe impl Sync for Shared {}

#[derive(Clone, Copy)]
struct Job {
    body: *const Body<'static>,
    tasks: usize,
}

// SAFETY: the pointer is to a `Sync` closure that `Pool::run` keeps alive until every
// worker has finished with it.
unsafe impl Send for Job {}

impl Pool {
    /// A pool of `threads` threads, the calling one included.
    pub fn new(threads: usize) -> Self {
        let shared = Arc::new(Shared {
            generation: AtomicUsize::new(0),
            next_task: AtomicUsize::new(0),
            busy: AtomicUsize::new(0),
            panicked: AtomicBool::new(false),
            job: UnsafeCell::new(None),
            sleeping: AtomicUsize::new(0),
            waiting: AtomicBool::new(false),
            park: Mutex::new(()),
            wake: Condvar::new(),
            done: Condvar::new(),
        });
        let spawn = |worker| {
            let shared = Arc::clone(&shared);
            std::thread::Builder::new()
                .name(format!("setun-{worker}"))
                .spawn(move || shared.work(worker))
                .expect("the system to start a thread")
        };
        let workers = (1..threads.max(1)).map(spawn).collect();
        Self {
            shared,
            workers,
            is_running: Cell::new(false),
        }
    }

    /// Number of threads.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Runs `body(task, worker)` for every task; `worker < threads()` is different for
    /// tasks that run at the same time.
    ///
    /// # Panics
    /// If a task panics, or runs a job on this pool.
    pub fn run(&self, tasks: usize, body: &Body<'_>) {
        if self.workers.is_empty() || tasks <= 1 {
            (0..tasks).for_each(|task| body(task, 0));
            return;
        }
        let running = Running::start(&self.is_running);
        let shared = &*self.shared;
        let body: *const Body<'_> = body;
        // SAFETY: only the lifetime changes. `finish` below waits until no worker uses
        // the closure any more, also when this thread's own tasks panic.
        let body = unsafe { std::mem::transmute::<*const Body<'_>, *const Body<'static>>(body) };
        let job = Job { body, tasks };
        // SAFETY: the last job is finished (`running` has looked), so no worker reads.
        unsafe { *shared.job.get() = Some(job) };
        shared.next_task.store(0, Ordering::Relaxed);
        shared.busy.store(self.workers.len(), Ordering::Relaxed);
        shared.generation.fetch_add(2, Ordering::SeqCst);
        shared.rouse();
        shared.drain(job, 0);
        shared.finish();
        drop(running);
        if shared.panicked.swap(false, Ordering::Relaxed) {
            panic!("a task of the thread pool panicked");
        }
    }

    /// Splits `rows` rows into runs of at most `grain` and calls `body(rows, part)` with
    /// the part of `out` that belongs to them.
    pub fn by_rows<O: RowParts>(
        &self,
        rows: usize,
        grain: usize,
        out: O,
        body: impl Fn(Range<usize>, O::Part) + Sync,
    ) {
        self.by_rows_worker(rows, grain, out, |rows, part, _| body(rows, part));
    }

    /// As [`Pool::by_rows`], with the worker's number for its scratch memory.
    pub fn by_rows_worker<O: RowParts>(
        &self,
        rows: usize,
        grain: usize,
        out: O,
        body: impl Fn(Range<usize>, O::Part, usize) + Sync,
    ) {
        let grain = grain.max(1);
        self.run(rows.div_ceil(grain), &|task, worker| {
            let rows = task * grain..rows.min((task + 1) * grain);
            // SAFETY: tasks have disjoint rows, and each runs once.
            let part = unsafe { out.part(rows.clone()) };
            body(rows, part, worker);
        });
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.generation.fetch_add(1, Ordering::SeqCst);
        self.shared.rouse();
        for worker in self.workers.drain(..) {
            let _ = worker.join();
        }
    }
}

impl Shared {
    /// Wakes the workers that sleep, behind a new generation. One that is about to sleep
    /// has counted itself before it looks at the generation for the last time: in the one
    /// order of those four accesses, either it sees the new generation or it is seen here.
    fn rouse(&self) {
        if self.sleeping.load(Ordering::SeqCst) > 0 {
            let _park = self.park.lock();
            self.wake.notify_all();
        }
    }

    fn work(&self, worker: usize) {
        let mut seen = 0;
        while let Some((generation, job)) = self.next_job(seen) {
            seen = generation;
            self.drain(job, worker);
            let last = self.busy.fetch_sub(1, Ordering::SeqCst) == 1;
            if last && self.waiting.load(Ordering::SeqCst) {
                let _park = self.park.lock();
                self.done.notify_all();
            }
        }
    }

    /// Waits for a job newer than `seen`; none when the pool closes.
    fn next_job(&self, seen: usize) -> Option<(usize, Job)> {
        let start = Instant::now();
        while self.generation.load(Ordering::Acquire) == seen && start.elapsed() < SPIN {
            std::hint::spin_loop();
        }
        if self.generation.load(Ordering::Acquire) == seen {
            let mut park = self.park.lock().ok()?;
            self.sleeping.fetch_add(1, Ordering::SeqCst);
            while self.generation.load(Ordering::SeqCst) == seen {
                park = self.wake.wait(park).ok()?;
            }
            self.sleeping.fetch_sub(1, Ordering::SeqCst);
        }
        let generation = self.generation.load(Ordering::Acquire);
        if generation % 2 == 1 {
            return None;
        }
        // SAFETY: this worker is busy with the new job, so `Pool::run` does not write.
        let job = unsafe { *self.job.get() };
        Some((generation, job?))
    }

    fn drain(&self, job: Job, worker: usize) {
        // SAFETY: `Pool::run` keeps the closure alive until `busy` is zero, and `busy`
        // falls only after this function has returned.
        let body = unsafe { &*job.body };
        loop {
            let task = self.next_task.fetch_add(1, Ordering::Relaxed);
            if task >= job.tasks {
                return;
            }
            let run = std::panic::AssertUnwindSafe(|| body(task, worker));
            if std::panic::catch_unwind(run).is_err() {
                self.panicked.store(true, Ordering::Relaxed);
            }
        }
    }

    /// Waits until no worker is busy.
    fn finish(&self) {
        let start = Instant::now();
        while self.busy.load(Ordering::Acquire) > 0 && start.elapsed() < SPIN {
            std::hint::spin_loop();
        }
        if self.busy.load(Ordering::Acquire) == 0 {
            return;
        }
        let mut park = self.park.lock().expect("no panic while the lock is held");
        // As in `rouse`: the last worker sees this, or is seen to be done.
        self.waiting.store(true, Ordering::SeqCst);
        while self.busy.load(Ordering::SeqCst) > 0 {
            park = self
                .done
                .wait(park)
                .expect("no panic while the lock is held");
        }
        self.waiting.store(false, Ordering::SeqCst);
    }
}

/// Outputs that can be split by rows, so that each task gets its own part.
///
/// # Safety
/// Parts of disjoint row ranges must not overlap.
pub unsafe trait RowParts: Sync {
    /// The outputs of a run of rows.
    type Part;

    /// The part of `rows`.
    ///
    /// # Safety
    /// No two parts that are alive may share a row.
    unsafe fn part(&self, rows: Range<usize>) -> Self::Part;
}

/// Rows of `width` values each.
pub struct RowsMut<'a, T> {
    start: *mut T,
    len: usize,
    width: usize,
    borrow: PhantomData<&'a mut [T]>,
}

impl<'a, T> RowsMut<'a, T> {
    /// Splits `values` into rows of `width`.
    pub fn new(values: &'a mut [T], width: usize) -> Self {
        let (start, len) = (values.as_mut_ptr(), values.len());
        Self {
            start,
            len,
            width,
            borrow: PhantomData,
        }
    }
}

// SAFETY: shared access reaches elements only through `part`, whose contract keeps the
// parts disjoint.
unsafe impl<T: Send> Sync for RowsMut<'_, T> {}

// SAFETY: row `r` is the elements `r * width..(r + 1) * width`.
unsafe impl<'a, T: Send> RowParts for RowsMut<'a, T> {
    type Part = &'a mut [T];

    unsafe fn part(&self, rows: Range<usize>) -> &'a mut [T] {
        let (start, end) = (
            rows.start * self.width,
            (rows.end * self.width).min(self.len),
        );
        assert!(start <= end && end <= self.len);
        // SAFETY: in bounds by the assertion; the caller keeps the parts disjoint.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(start), end - start) }
    }
}

// SAFETY: no memory at all.
unsafe impl RowParts for () {
    type Part = ();

    unsafe fn part(&self, _: Range<usize>) {}
}

// SAFETY: each member keeps its own rows disjoint.
unsafe impl<A: RowParts, B: RowParts> RowParts for (A, B) {
    type Part = (A::Part, B::Part);

    unsafe fn part(&self, rows: Range<usize>) -> Self::Part {
        // SAFETY: the caller's promise holds for each member.
        unsafe { (self.0.part(rows.clone()), self.1.part(rows)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once() {
        for threads in [1, 2, 5] {
            let pool = Pool::new(threads);
            for tasks in [0, 1, 2, 3, 100] {
                let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                pool.run(tasks, &|task, worker| {
                    assert!(worker < threads);
                    counts[task].fetch_add(1, Ordering::Relaxed);
                });
                assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1));
            }
        }
    }

    #[test]
    #[should_panic(expected = "a task of the thread pool panicked")]
    fn a_task_cannot_start_a_job_on_its_own_pool() {
        thread_local!(static POOL: Pool = Pool::new(2));
        // Each of the two threads takes one task; on the other one the pool is another.
        let both = std::sync::Barrier::new(2);
        POOL.with(|pool| {
            pool.run(2, &|_, worker| {
                both.wait();
                if worker == 0 {
                    POOL.with(|same| same.run(2, &|_, _| {}));
                }
            });
        });
    }

    #[test]
    fn rows_are_split_without_overlap() {
        let pool = Pool::new(3);
        let mut a = vec![0u32; 7 * 3];
        let mut b = vec![0u32; 7];
        let out = (RowsMut::new(&mut a, 3), RowsMut::new(&mut b, 1));
        pool.by_rows(7, 2, out, |rows, (a, b)| {
            for (i, row) in rows.enumerate() {
                a[i * 3..(i + 1) * 3].fill(row as u32);
                b[i] += row as u32;
            }
        });
        assert_eq!(b, [0, 1, 2, 3, 4, 5, 6]);
        assert!(a.chunks(3).zip(&b).all(|(a, b)| a == [*b; 3]));
    }

    #[test]
    fn a_panic_in_a_task_reaches_the_caller_and_the_pool_lives_on() {
        let pool = Pool::new(2);
        let run = std::panic::AssertUnwindSafe(|| pool.run(8, &|task, _| assert!(task != 5)));
        assert!(std::panic::catch_unwind(run).is_err());
        pool.run(4, &|_, _| {});
    }
}
