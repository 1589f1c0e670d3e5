//! Threads for regions of microseconds: what generation of text consists of.
//!
//! A *region* is one call of [`run`] or [`for_each`]: its shares are cut statically among the calling thread and
//! workers that persist between regions; a thread that is done with its part helps those that are not. A region is announced by one store to a word that all workers watch, and
//! ends when the last of them has counted itself out; with nothing to do that costs a few hundred nanoseconds, where
//! rayon takes ten microseconds. A waiting thread spins for some fifty hints, then yields, and a worker that has
//! waited long sleeps: without the early yield, two threads that the system leaves on one core would each wait for
//! a slice of its time.
//!
//! As many threads take part as the current rayon pool has, so that one setting holds for the whole process. A
//! region inside a region, and one started while another thread's is running, runs on its calling thread alone; so
//! nothing can wait for itself. Which thread runs a share must not matter to its result.

use std::any::Any;
use std::cell::{Cell, UnsafeCell};
use std::hint::spin_loop;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, Mutex, PoisonError, TryLockError};
use std::thread::{self, JoinHandle};

use crate::isa;

#[cfg(test)]
mod tests;

/// Threads that a region started here may use: those of the current rayon pool, or one inside a region.
pub fn threads() -> usize {
    if INSIDE.get() { 1 } else { rayon::current_num_threads().clamp(1, MOST_THREADS) }
}

/// Calls `task(i)` once for every `i` below `shares`, neighbouring shares on the same thread. Returns when all are
/// done. If shares panic, one of the panics goes on in the caller.
pub fn run(shares: usize, task: impl Fn(usize) + Sync) {
    POOL.run(threads(), shares, &task);
}

/// Calls `task` once for every item, neighbours on the same thread. Returns when all are done, as [`run`].
///
/// ```
/// let (x, mut y) = ([1, 2, 3], [0; 3]);
/// let mut rows: Vec<_> = x.iter().zip(&mut y).collect();
/// quant_kernels::pool::for_each(&mut rows, |(x, y)| **y = *x * *x);
/// assert_eq!(y, [1, 4, 9]);
/// ```
pub fn for_each<T: Send>(items: &mut [T], task: impl Fn(&mut T) + Sync) {
    POOL.for_each(threads(), items, task);
}

/// The part of `0..len` that falls to `share` of `shares`, with cuts at multiples of `unit`. The parts are
/// disjoint and cover the range in order; they differ by one unit at most.
pub fn part(len: usize, unit: usize, share: usize, shares: usize) -> Range<usize> {
    let units = len.div_ceil(unit);
    let (each, more) = (units / shares, units % shares);
    let cut = |share: usize| ((share * each + share.min(more)) * unit).min(len);
    cut(share)..cut(share + 1)
}

thread_local! {
    /// Set on workers, and on a thread that leads a region.
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

static POOL: LazyLock<Pool> = LazyLock::new(|| Pool::new(Patience { spins: 50, yields: 1000 }));

/// What fits the lower bits of [`Shared::region`].
const THREAD_BITS: u32 = 12;
const MOST_THREADS: usize = (1 << THREAD_BITS) - 1;

/// How long a worker waits before it sleeps. 1,000 yields take about 0.3 ms when nothing else wants the core: longer
/// than what lies between two regions while a text is generated.
#[derive(Clone, Copy)]
struct Patience {
    spins: u32,
    yields: u32,
}

/// A set of workers, which grows as regions ask for more.
struct Pool {
    shared: Arc<Shared>,
    /// Held by the thread that leads a region.
    workers: Mutex<Vec<JoinHandle<()>>>,
    patience: Patience,
}

/// A cache line, or two that are fetched together, of its own.
#[repr(align(128))]
struct Line<T>(T);

/// What workers and leader share.
struct Shared {
    /// Number of the last region announced in the upper bits, its threads in the lower [`THREAD_BITS`]. A worker
    /// takes part if its index is below that number; it cannot miss a region that it is part of, since that region
    /// does not end without it.
    region: Line<AtomicU64>,
    /// Workers that have yet to finish their part of the region.
    pending: Line<AtomicUsize>,
    /// Workers that sleep or are about to.
    sleeping: Line<AtomicUsize>,
    /// The region's task; see [`Shared::work`] for who may look at it when.
    task: UnsafeCell<Option<Task>>,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    quit: AtomicBool,
}

/// A task, which takes the index of its thread, without its lifetime.
#[derive(Clone, Copy)]
struct Task(*const (dyn Fn(usize) + Sync));

// SAFETY: a task is a shared reference to something `Sync`, for as long as it may be called.
unsafe impl Send for Task {}
// SAFETY: `task` is written only by the leader, between regions, when no worker reads it (see `work` and `lead`).
unsafe impl Sync for Shared {}

impl Pool {
    fn new(patience: Patience) -> Pool {
        let shared = Shared {
            region: Line(AtomicU64::new(0)),
            pending: Line(AtomicUsize::new(0)),
            sleeping: Line(AtomicUsize::new(0)),
            task: UnsafeCell::new(None),
            panic: Mutex::new(None),
            quit: AtomicBool::new(false),
        };
        Pool { shared: Arc::new(shared), workers: Mutex::new(Vec::new()), patience }
    }

    fn run(&self, threads: usize, shares: usize, task: &(impl Fn(usize) + Sync)) {
        let workers = match self.workers.try_lock() {
            _ if threads < 2 || shares < 2 || INSIDE.get() => None,
            Ok(workers) => Some(workers),
            // A panic in a region has left nothing undone.
            Err(TryLockError::Poisoned(workers)) => Some(workers.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        };
        let Some(mut workers) = workers else {
            return (0..shares).for_each(task);
        };
        let threads = self.grow(&mut workers, threads.min(shares));
        let cap = isa::scoped_cap();
        if threads == shares {
            return self.shared.lead(&workers[..threads - 1], &|i| isa::with_scoped_cap(cap, || task(i)));
        }
        let parts = Parts::new(shares, threads);
        let work = |thread| isa::with_scoped_cap(cap, || parts.of(thread).for_each(task));
        self.shared.lead(&workers[..threads - 1], &work);
    }

    fn for_each<T: Send>(&self, threads: usize, items: &mut [T], task: impl Fn(&mut T) + Sync) {
        struct Items<T>(*mut T);
        // SAFETY: threads take different items out of it, which may go to other threads.
        unsafe impl<T: Send> Sync for Items<T> {}
        impl<T> Items<T> {
            fn at(&self, i: usize) -> *mut T {
                self.0.wrapping_add(i)
            }
        }
        let len = items.len();
        let items = Items(items.as_mut_ptr());
        self.run(threads, len, &|i: usize| {
            // SAFETY: `run` calls with every `i < len` once, so this is an item of the slice, borrowed once.
            task(unsafe { &mut *items.at(i) });
        });
    }

    /// Starts workers until `threads` can take part, and says how many can: fewer where the system has no more.
    fn grow(&self, workers: &mut Vec<JoinHandle<()>>, threads: usize) -> usize {
        while workers.len() + 1 < threads {
            let (shared, patience, index) = (self.shared.clone(), self.patience, workers.len() + 1);
            let seen = shared.region.0.load(Ordering::Relaxed);
            let builder = thread::Builder::new().name(format!("quant-{index}"));
            match builder.spawn(move || shared.work(index, seen, patience)) {
                Ok(worker) => workers.push(worker),
                Err(_) => return workers.len() + 1,
            }
        }
        threads
    }
}

/// What is left of each thread's part of a region.
struct Parts(Vec<Line<(AtomicUsize, usize)>>);

impl Parts {
    fn new(shares: usize, threads: usize) -> Parts {
        let part = |thread| {
            let Range { start, end } = part(shares, 1, thread, threads);
            Line((AtomicUsize::new(start), end))
        };
        Parts((0..threads).map(part).collect())
    }

    /// The shares that `thread` runs: those of its own part, then what others have not begun. Its own line stays in
    /// its cache, so until it helps, taking a share costs a few nanoseconds.
    fn of(&self, thread: usize) -> impl Iterator<Item = usize> {
        let others = (thread..self.0.len()).chain(0..thread);
        others.flat_map(|other| {
            let Line((next, end)) = &self.0[other];
            // Shares carry no data: what they read and write is ordered by the region's begin and end.
            std::iter::from_fn(|| Some(next.fetch_add(1, Ordering::Relaxed)).filter(|share| share < end))
        })
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.quit.store(true, Ordering::SeqCst);
        let workers = self.workers.get_mut().unwrap_or_else(PoisonError::into_inner);
        for worker in workers.drain(..) {
            worker.thread().unpark();
            // A worker catches the panics of its tasks.
            let _ = worker.join();
        }
    }
}

impl Shared {
    /// A region of `workers` and the calling thread, which is number 0.
    fn lead(&self, workers: &[JoinHandle<()>], task: &(dyn Fn(usize) + Sync)) {
        // SAFETY: only the lifetime is erased. Workers call the task before they count themselves out of `pending`,
        // and this function does not return, nor unwind, before all have.
        let erased = Task(unsafe { std::mem::transmute::<_, *const (dyn Fn(usize) + Sync)>(task) });
        // SAFETY: no region is running (the caller holds the lock of the workers), so no worker looks at the task.
        unsafe { *self.task.get() = Some(erased) };
        self.pending.0.store(workers.len(), Ordering::Relaxed);
        let number = self.region.0.load(Ordering::Relaxed) >> THREAD_BITS;
        let region = number.wrapping_add(1) << THREAD_BITS | (workers.len() + 1) as u64;
        // Publishes task and count. Either this store is seen by a worker that goes to sleep, or the worker is seen
        // here: both sides write first and then look, in one order of all such steps.
        self.region.0.store(region, Ordering::SeqCst);
        if self.sleeping.0.load(Ordering::SeqCst) > 0 {
            workers.iter().for_each(|worker| worker.thread().unpark());
        }
        INSIDE.set(true);
        let own = catch_unwind(AssertUnwindSafe(|| task(0)));
        INSIDE.set(false);
        let mut waited = 0;
        while self.pending.0.load(Ordering::Acquire) > 0 {
            wait(&mut waited, 50);
        }
        let other = self.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(panic) = own.err().or(other) {
            resume_unwind(panic);
        }
    }

    /// The life of worker `index`, started after region `seen`.
    fn work(&self, index: usize, mut seen: u64, patience: Patience) {
        INSIDE.set(true);
        while let Some(region) = self.next(seen, patience) {
            seen = region;
            let threads = (region & MOST_THREADS as u64) as usize;
            if index >= threads {
                continue;
            }
            // SAFETY: this worker is part of the region it has seen, which lasts until it counts itself out below.
            // The task was written before the region was announced, and is not written again before the region ends.
            let task = unsafe { &*(*self.task.get()).expect("set before the region was announced").0 };
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| task(index))) {
                *self.panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(panic);
            }
            self.pending.0.fetch_sub(1, Ordering::Release);
        }
    }

    /// Waits for a region after `seen`, or for the end.
    fn next(&self, seen: u64, patience: Patience) -> Option<u64> {
        let changed = || {
            let region = self.region.0.load(Ordering::SeqCst);
            (region != seen).then_some(region)
        };
        let mut waited = 0;
        while waited < patience.spins + patience.yields {
            if let Some(region) = changed() {
                return Some(region);
            }
            wait(&mut waited, patience.spins);
        }
        self.sleeping.0.fetch_add(1, Ordering::SeqCst);
        let region = loop {
            if self.quit.load(Ordering::SeqCst) {
                break None;
            }
            if let Some(region) = changed() {
                break Some(region);
            }
            thread::park();
        };
        self.sleeping.0.fetch_sub(1, Ordering::SeqCst);
        region
    }
}

/// One step of waiting: a hint to the processor at first, then a word to the system.
#[inline]
fn wait(waited: &mut u32, spins: u32) {
    if *waited < spins {
        spin_loop();
    } else {
        thread::yield_now();
    }
    *waited = waited.saturating_add(1);
}
