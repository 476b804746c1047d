//! Tasks over rayon.
//!
//! What a task is depends on the problem alone, and results are put together in the order of the tasks. So
//! the bits do not depend on how many threads there are, or on which of them was faster: only who
//! computes a task does.

use crate::strategy::{PORTIONS, THREAD_ELEMENTS, task_len};
use crate::worker::{self, Modes};
use std::mem::MaybeUninit;
use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Rows, or tiles, to be cut into tasks.
#[derive(Clone, Copy, Debug)]
pub struct Work {
    /// How many.
    pub len: usize,
    /// How many a task has: a number of the problem alone, as the order of all sums is.
    pub task_len: usize,
    /// The elements of all.
    pub elements: usize,
}

impl Work {
    /// Rows of so many elements.
    pub fn rows(len: usize, elements_each: usize) -> Work {
        let task_len = task_len(len, elements_each);
        Work { len, task_len, elements: len.saturating_mul(elements_each) }
    }
}

/// The threads that a call may use.
#[derive(Clone, Copy)]
pub struct Team<'a> {
    /// None = rayon's global pool.
    pub pool: Option<&'a rayon::ThreadPool>,
    /// 0 = as many as the pool has.
    pub threads: usize,
}

impl Team<'_> {
    /// How many threads so many elements are worth. Wakes no pool, and starts none that is not needed.
    pub fn size(&self, elements: usize) -> usize {
        let worth = elements / THREAD_ELEMENTS;
        if worth < 2 || self.threads == 1 || fork::is_child() {
            return 1;
        }
        let available = match self.pool {
            Some(pool) => pool.current_num_threads(),
            None if has_global_pool() => rayon::current_num_threads(),
            None => 1,
        };
        match self.threads {
            0 => available.min(worth),
            n => n.min(available).min(worth),
        }
    }

    /// Calls `task` on `size` threads at once, the calling one among them; on the calling thread alone where
    /// there is no memory to give other threads work. All of them compute under the floating-point modes of
    /// the calling thread.
    ///
    /// Rayon has no way to give work to a pool from outside that allocates nothing: its queue itself grows
    /// by a block for every 63 jobs, `join` and `install` included. A scope also lets the calling thread take
    /// part.
    fn run<F: Fn() + Sync>(&self, size: usize, task: &F) {
        if !worker::has_memory(worker::job_bytes(size - 1)) {
            return task();
        }
        let modes = Modes::current();
        let other = || {
            let _entered = modes.enter();
            task();
        };
        fn body<'scope>(
            scope: &rayon::Scope<'scope>,
            size: usize,
            other: &'scope (impl Fn() + Sync),
            task: &impl Fn(),
        ) {
            for _ in 1..size {
                scope.spawn(|_| other());
            }
            task();
        }
        match self.pool {
            Some(pool) => pool.in_place_scope(|scope| body(scope, size, &other, task)),
            None => rayon::in_place_scope(|scope| body(scope, size, &other, task)),
        }
    }

    /// Calls `f` with all indices below `count` on `size` threads: with ranges that follow
    /// one another, each index in one of them. `f` gives away a result for each index, in order; `each`
    /// gets all results on the calling thread, in order.
    pub fn map<T: Send>(
        &self,
        size: usize,
        count: usize,
        f: impl Fn(Range<usize>, &mut dyn FnMut(T)) + Sync,
        mut each: impl FnMut(T),
    ) {
        let size = size.min(count);
        // Where there is no memory for results out of order, one thread has them in order.
        let mut slots = Vec::new();
        if size <= 1 || slots.try_reserve_exact(count).is_err() {
            f(0..count, &mut each);
            return;
        }
        self.fill(size, &mut slots.spare_capacity_mut()[..count], f);
        // SAFETY: `fill` has written `count` slots.
        unsafe { slots.set_len(count) };
        slots.into_iter().for_each(each);
    }

    /// Writes every slot: the result of `f` for its index.
    fn fill<T: Send>(
        &self,
        size: usize,
        slots: &mut [MaybeUninit<T>],
        f: impl Fn(Range<usize>, &mut dyn FnMut(T)) + Sync,
    ) {
        let count = slots.len();
        let shared = Slots(slots.as_mut_ptr());
        let next = AtomicUsize::new(0);
        // One thread takes neighbours, since it prefetches one while it works on the other; but in
        // portions so small that threads end together.
        let portion = (count / (size * PORTIONS)).max(1);
        // `run` passes on a panic in `f`, or for want of a result: if it returns, every index was handed out, and
        // its slot written.
        self.run(size, &|| {
            let shared = &shared;
            loop {
                let start = next.fetch_add(portion, Ordering::Relaxed);
                if start >= count {
                    break;
                }
                let end = count.min(start + portion);
                let mut i = start;
                f(start..end, &mut |result| {
                    assert!(i < end, "a result too many");
                    // SAFETY: `i < end <= count`, and the counter hands out every index once.
                    unsafe { (*shared.0.add(i)).write(result) };
                    i += 1;
                });
                assert!(i == end, "a result is missing");
            }
        });
    }

    /// Calls `f` with ranges of tasks that follow one another, and the length of a task; `f` gives away a
    /// result for each task, and `each` gets all results in order.
    pub fn for_portions<T: Send>(
        &self,
        work: &Work,
        f: impl Fn(Range<usize>, usize, &mut dyn FnMut(T)) + Sync,
        each: impl FnMut(T),
    ) {
        let len = work.task_len;
        let count = work.len.div_ceil(len);
        // One task needs no other thread, and no pool started for it.
        let size = if count > 1 { self.size(work.elements) } else { 1 };
        let range = |tasks: Range<usize>| tasks.start * len..work.len.min(tasks.end * len);
        self.map(size, count, |tasks, give| f(range(tasks), len, give), each);
    }

    /// Calls `f` with every task; `each` gets the results in order.
    pub fn for_tasks<T: Send>(
        &self,
        work: &Work,
        f: impl Fn(Range<usize>) -> T + Sync,
        each: impl FnMut(T),
    ) {
        let portion = |range: Range<usize>, len: usize, give: &mut dyn FnMut(T)| {
            for start in range.clone().step_by(len) {
                give(f(start..range.end.min(start + len)));
            }
        };
        self.for_portions(work, portion, each);
    }
}

/// Whether there is a pool to fall into: the one that the caller runs in, or rayon's global one. That is
/// started here, since rayon would panic where the system refuses its threads.
fn has_global_pool() -> bool {
    static STARTED: OnceLock<bool> = OnceLock::new();
    if rayon::current_thread_index().is_some() {
        return true;
    }
    if STARTED.get().is_none() && !worker::has_memory_to_start(0) {
        return false;
    }
    *STARTED.get_or_init(|| {
        // The global pool's threads live as long as the process: nobody joins them.
        let builder = rayon::ThreadPoolBuilder::new();
        match builder.spawn_handler(|thread| worker::spawn(thread).map(drop)).build_global() {
            Ok(()) => true,
            // Somebody else has started it; only a failure to start threads has a source.
            Err(error) => std::error::Error::source(&error).is_none(),
        }
    })
}

/// Slots that several threads write, each its own.
struct Slots<T>(*mut MaybeUninit<T>);

// SAFETY: `Team::map` writes no slot twice, and reads none before all threads are done.
unsafe impl<T: Send> Sync for Slots<T> {}

/// Threads do not survive a fork; a child that waited for them would wait forever.
///
/// A process becomes the owner of xent's threads before it starts any. Its children, however they were made
/// and whatever it was doing at the time, do all work on the calling thread: they start no thread, and take no
/// lock and wait for no `Once` that another thread may have held at the fork.
pub mod fork {
    #[cfg(unix)]
    use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};

    /// The process that owns the threads; 0 = there are none yet.
    #[cfg(unix)]
    static OWNER: AtomicI32 = AtomicI32::new(0);

    /// Whether `pthread_atfork` saw that this process is a child of the owner. The process id alone would not
    /// do: a grandchild may get the id of an owner that has ended.
    #[cfg(unix)]
    static CHILD: AtomicBool = AtomicBool::new(false);

    #[cfg(unix)]
    extern "C" fn mark_child() {
        CHILD.store(true, Ordering::Relaxed);
    }

    /// Whether this process descends from the owner. Makes it the owner if there is none. `pthread_atfork` does
    /// not see `_Fork` and `clone`; the process id shows them.
    #[cfg(unix)]
    pub fn is_child() -> bool {
        if CHILD.load(Ordering::Relaxed) {
            return true;
        }
        // SAFETY: getpid has no preconditions.
        let this = unsafe { libc::getpid() };
        match OWNER.compare_exchange(0, this, Ordering::Relaxed, Ordering::Relaxed) {
            Ok(_) => {
                // SAFETY: `mark_child` does nothing but store to an atomic, which the child of a process
                // with threads may do.
                unsafe { libc::pthread_atfork(None, None, Some(mark_child)) };
                false
            }
            Err(owner) => owner != this,
        }
    }

    /// There is no fork.
    #[cfg(not(unix))]
    pub fn is_child() -> bool {
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rayon::{ThreadPool, ThreadPoolBuilder};
    use std::collections::HashSet;
    use std::sync::{Arc, Condvar, Mutex};
    use std::thread::{self, ThreadId};
    use std::time::Duration;

    /// Elements of a row: enough that each row is a task.
    const WORK: usize = 8 * 1024;
    /// Rows that are worth a thread.
    const ROWS_WORTH: usize = THREAD_ELEMENTS / WORK;
    /// Threads of the pools.
    const SIZE: usize = 4;

    /// Where the threads of a pool are held.
    #[derive(Default)]
    struct Held {
        at: Mutex<Places>,
        changed: Condvar,
    }

    #[derive(Default)]
    struct Places {
        in_call: HashSet<ThreadId>,
        /// Threads of the pool among those.
        of_pool: usize,
        elsewhere: usize,
    }

    impl Held {
        /// Holds a thread until all of the pool's are: false if some never came. What is counted are
        /// waits, so that a process may be stopped meanwhile for longer than all of them.
        fn wait(&self, enter: impl FnOnce(&mut Places)) -> bool {
            let mut places = self.at.lock().unwrap();
            enter(&mut places);
            self.changed.notify_all();
            for _ in 0..600 {
                if places.of_pool + places.elsewhere >= SIZE {
                    return true;
                }
                places = self.changed.wait_timeout(places, Duration::from_millis(100)).unwrap().0;
            }
            false
        }
    }

    /// How many threads work for a call of `rows` rows that may use `threads` of the pool; without
    /// `by_name`, of the one that it is called in.
    ///
    /// Whoever comes to work for it is held. Meanwhile each thread of the pool is given something else
    /// to do. That is queued after all that the call has for other threads: who does it was not asked
    /// by the call, or found nothing left to do. So once each thread is at the one or the other, nobody
    /// else will come.
    fn threads_of_call(pool: &ThreadPool, by_name: bool, threads: usize, rows: usize) -> usize {
        let held = Arc::new(Held::default());
        let caller = thread::current().id();
        let f = |_: Range<usize>| {
            let id = thread::current().id();
            if held.at.lock().unwrap().in_call.contains(&id) {
                return;
            }
            if id == caller {
                for _ in 0..SIZE {
                    let held = Arc::clone(&held);
                    pool.spawn(move || {
                        held.wait(|places| places.elsewhere += 1);
                    });
                }
            }
            let all = held.wait(|places| {
                places.in_call.insert(id);
                places.of_pool += usize::from(pool.current_thread_index().is_some());
            });
            assert!(all, "the caller does no work, or a thread does nothing");
        };
        let team = Team { pool: by_name.then_some(pool), threads };
        team.for_tasks(&Work::rows(rows, WORK), f, |()| ());
        held.at.lock().unwrap().in_call.len()
    }

    /// From outside of the pool, and from one of its threads.
    #[track_caller]
    fn assert_uses(expected: usize, threads: usize, rows: usize) {
        let pool = ThreadPoolBuilder::new().num_threads(SIZE).build().unwrap();
        let what = format!("{rows} rows on {threads} threads");
        assert_eq!(threads_of_call(&pool, true, threads, rows), expected, "{what}, from outside");
        for by_name in [false, true] {
            let used = pool.install(|| threads_of_call(&pool, by_name, threads, rows));
            assert_eq!(used, expected, "{what}, from within, by name: {by_name}");
        }
    }

    #[test]
    fn calls_use_the_threads_that_they_may() {
        let rows = 2 * SIZE * ROWS_WORTH;
        for threads in 1..=SIZE {
            assert_uses(threads, threads, rows);
        }
        // As many as there are.
        assert_uses(SIZE, 0, rows);
        assert_uses(SIZE, SIZE + 1, rows);
        assert_uses(SIZE, 100, rows);
    }

    #[test]
    fn calls_use_the_threads_that_their_work_is_worth() {
        for threads in [0, SIZE, 100] {
            assert_uses(1, threads, 2 * ROWS_WORTH - 1);
            assert_uses(2, threads, 2 * ROWS_WORTH);
            assert_uses(2, threads, 3 * ROWS_WORTH - 1);
            assert_uses(3, threads, 3 * ROWS_WORTH);
        }
        assert_uses(2, 2, 3 * ROWS_WORTH);
    }
}
