//! Blocks of rows, or segments of one long row, over rayon.
//!
//! What is cut where depends on the problem alone, and results are put together in the order of
//! the rows or classes, in f64. So the bits do not depend on how many threads there are or on
//! which of them was faster; only who computes a block does.

use crate::kernels::Kernels;
use crate::kernels::contiguous::{self, Marks};
use crate::kernels::row_batch::{Batch, Job, Totals};
use crate::kernels::row_math::ROWS;
use crate::kernels::row_state::RowState;
use crate::kernels::{target_gradient, tiles};
use crate::plan::{Layout, Pass, Plan, SEGMENTS, TILE};
use std::mem::MaybeUninit;
use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// Blocks that a range of rows is cut into at most: enough that 64 threads are evenly loaded.
const BLOCKS: usize = 256;

/// Elements below which a block is not worth its while: short rows go through their stages in
/// batches.
const BLOCK_WORK: usize = 8 * 1024;

/// Portions of the blocks that each thread takes, about.
const PORTIONS: usize = 16;

/// Elements that are worth a thread: below twice this, everything stays on the calling thread.
/// Waking a worker costs 2 µs at best and near 20 on average, so that two threads break even
/// with one at 128,000 elements (docs/performance.md).
const WORTH_A_THREAD: usize = 64 * 1024;

/// The threads that a call may use.
#[derive(Clone, Copy)]
pub struct Team<'a> {
    /// None = rayon's global pool.
    pub pool: Option<&'a rayon::ThreadPool>,
    /// 0 = as many as the pool has.
    pub threads: usize,
}

impl Team<'_> {
    /// How many threads `elements` of work are worth; does not wake, or even start, a pool that
    /// is not needed.
    fn size(&self, elements: usize) -> usize {
        let worth = elements / WORTH_A_THREAD;
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

    /// Calls `task` on `size` threads at once, the calling one among them.
    fn run<F: Fn() + Sync>(&self, size: usize, task: &F) {
        fn body<'scope, F: Fn() + Sync>(
            scope: &rayon::Scope<'scope>,
            size: usize,
            task: &'scope F,
        ) {
            for _ in 1..size {
                scope.spawn(|_| task());
            }
            task();
        }
        match self.pool {
            Some(pool) => pool.in_place_scope(|scope| body(scope, size, task)),
            None => rayon::in_place_scope(|scope| body(scope, size, task)),
        }
    }

    /// `f` of all indices below `count ≤ BLOCKS`, each once, on `size` threads: of some that follow
    /// one another at a time, for each of which it gives a result away, in order. `each` gets all
    /// of them on the calling thread, in order.
    fn map<T: Send>(
        &self,
        size: usize,
        count: usize,
        f: impl Fn(Range<usize>, &mut dyn FnMut(T)) + Sync,
        mut each: impl FnMut(T),
    ) {
        assert!(count <= BLOCKS);
        let size = size.min(count);
        if size <= 1 {
            f(0..count, &mut each);
            return;
        }
        let mut slots = [const { MaybeUninit::<T>::uninit() }; BLOCKS];
        let shared = Slots(slots.as_mut_ptr());
        let next = AtomicUsize::new(0);
        // Neighbours go to one thread, which fetches the one while it works on the other; but in
        // portions small enough that threads end together.
        let portion = (count / (size * PORTIONS)).max(1);
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
                    // SAFETY: `i < count ≤ BLOCKS`, and the counter gives every index out once.
                    unsafe { (*shared.0.add(i)).write(result) };
                    i += 1;
                });
                assert!(i == end, "a result is missing");
            }
        });
        for slot in &slots[..count] {
            // SAFETY: `run` returned, so every index below `count` was given out and written
            // (a panic in `f`, or for want of a result, would have been passed on by `run`).
            each(unsafe { slot.assume_init_read() });
        }
    }
}

/// Whether there is a pool to fall into: the one that the caller runs in, or rayon's global one,
/// which is started here, lest rayon panic where the system refuses its threads.
fn has_global_pool() -> bool {
    static STARTED: OnceLock<bool> = OnceLock::new();
    rayon::current_thread_index().is_some()
        || *STARTED.get_or_init(|| match rayon::ThreadPoolBuilder::new().build_global() {
            Ok(()) => true,
            // Somebody else started it; only a failure to start threads has a source.
            Err(error) => std::error::Error::source(&error).is_none(),
        })
}

/// Slots that several threads write, each to its own.
struct Slots<T>(*mut MaybeUninit<T>);

// SAFETY: `Team::map` writes no slot twice and reads none before all threads are done.
unsafe impl<T: Send> Sync for Slots<T> {}

/// Rows, or tiles, of a block: of the problem alone, as the order of all sums is. Whole groups of rows
/// where there are enough.
fn block_len(rows: usize, work: usize) -> usize {
    let len = rows.div_ceil(BLOCKS).max(BLOCK_WORK / work.max(1)).max(1);
    if len < ROWS { len } else { len.next_multiple_of(ROWS) }
}

/// `f` of blocks of rows, or tiles, that follow one another, the first `len` of them and so on, over
/// the team; it gives a result away for each block, and `each` gets them all in their order. `work`
/// is the number of elements that a row stands for, `elements` that of all.
fn for_portions<T: Send>(
    team: &Team,
    rows: usize,
    [work, elements]: [usize; 2],
    f: impl Fn(Range<usize>, usize, &mut dyn FnMut(T)) + Sync,
    each: impl FnMut(T),
) {
    let len = block_len(rows, work);
    let count = rows.div_ceil(len);
    // One block needs no team, and no pool started for it.
    let size = if count > 1 { team.size(elements) } else { 1 };
    let rows = |blocks: Range<usize>| blocks.start * len..rows.min(blocks.end * len);
    team.map(size, count, |blocks, give| f(rows(blocks), len, give), each);
}

/// `f` of every block of rows, or tiles, over the team, and the results in their order to `each`.
/// `work` and `elements` as above.
pub fn for_blocks<T: Send>(
    team: &Team,
    rows: usize,
    work: [usize; 2],
    f: impl Fn(Range<usize>) -> T + Sync,
    each: impl FnMut(T),
) {
    let portion = |rows: Range<usize>, len: usize, give: &mut dyn FnMut(T)| {
        for start in rows.clone().step_by(len) {
            give(f(start..rows.end.min(start + len)));
        }
    };
    for_portions(team, rows, work, portion, each);
}

/// Runs the plan; returns the sums over its rows.
pub fn run(plan: &Plan, k: &Kernels, team: &Team) -> Totals {
    let mut totals = Totals::NONE;
    let rows = plan.distributions();
    let elements = rows.saturating_mul(plan.classes);
    if plan.pass == Pass::Targets {
        // SAFETY: rows of the plan, each in one block; here and below the kernels were handed out
        // by `Isa::kernels`, so the processor has their instruction set.
        let block = |rows| unsafe { target_gradient::rows(k, plan, rows) };
        for_blocks(team, rows, [plan.classes, elements], block, |()| ());
        return totals;
    }
    if let Layout::Positions { .. } = plan.layout {
        // SAFETY: tiles of the plan, each in one block.
        let block = |range| unsafe { tiles::tiles(k, plan, range) };
        let work = TILE.saturating_mul(plan.classes);
        for_blocks(team, tiles::count(plan), [work, elements], block, |block| totals.add(&block));
        return totals;
    }
    let size = team.size(elements);
    if size > 1 && plan.segments() > 1 && rows < 4 * size && rows <= BLOCKS {
        // Too few rows to keep the team busy: it takes each together. The sums are the same.
        // The blocks are, too: so few rows of so many classes are blocks of one.
        for index in 0..rows {
            let mut row = Totals::NONE;
            // SAFETY: a row of the plan, and only this call is at it.
            unsafe { split_row(plan, k, team, size, index, &mut row) };
            totals.add(&row);
        }
        return totals;
    }
    let portion = |rows: Range<usize>, len: usize, give: &mut dyn FnMut(Totals)| {
        // SAFETY: rows of the plan, each in one portion.
        unsafe { contiguous::rows(k, plan, rows, len, give) };
    };
    for_portions(team, rows, [plan.classes, elements], portion, |block| totals.add(&block));
    totals
}

/// One row, its segments spread over `size` threads; adds it to the totals.
///
/// # Safety
/// `index < plan.distributions()`, and no other thread is at that row.
unsafe fn split_row(
    plan: &Plan,
    k: &Kernels,
    team: &Team,
    size: usize,
    index: usize,
    totals: &mut Totals,
) {
    let marks = [const { [AtomicU64::new(0), AtomicU64::new(0)] }; SEGMENTS];
    let segments = plan.segments();
    let at = plan.nth(index);
    let mut batch = Batch::EMPTY;
    // SAFETY: the caller's promise, here and below; a segment is in one thread's hands.
    unsafe {
        batch.start(k, plan, index, 1);
        contiguous::aim(k, plan, &mut batch, 0..1);
    }
    if let Some(sum) = batch.lanes()[0].sum {
        let mut total = RowState::EMPTY;
        team.map(
            size,
            segments,
            |segments, give| {
                for segment in segments {
                    let mut partial = RowState::EMPTY;
                    // SAFETY: as above.
                    let again = unsafe {
                        contiguous::sum_segment(k, plan, at, segment, &sum, &mut partial)
                    };
                    let [out_of_range, redone] = &marks[segment];
                    out_of_range.store(again.out_of_range, Ordering::Relaxed);
                    redone.store(again.redone, Ordering::Relaxed);
                    give(partial);
                }
            },
            |partial| total.push(&partial, plan.l),
        );
        batch.lanes()[0].partial = total;
    }
    // SAFETY: as above.
    unsafe { batch.finish(k, plan) };
    batch.add_row(plan, 0, totals);
    let lane = &batch.lanes()[0];
    match &lane.job {
        Job::Nothing => return,
        Job::Target => {}
        // SAFETY: as above.
        Job::Fill(value) => unsafe { lane.fill(plan, *value) },
        Job::Sweep(gradient) => {
            team.map(
                size,
                segments,
                |segments, give| {
                    for segment in segments {
                        let [out_of_range, redone] =
                            marks[segment].each_ref().map(|bits| bits.load(Ordering::Relaxed));
                        let again = Marks { out_of_range, redone };
                        // SAFETY: as above.
                        unsafe {
                            contiguous::gradient_segment(k, plan, at, segment, again, gradient);
                        }
                        give(());
                    }
                    if plan.streams() {
                        (k.lanes.fence)();
                    }
                },
                |()| (),
            );
        }
    }
    // SAFETY: as above.
    unsafe { batch.place_target(plan, 0) };
}

/// Rayon's workers do not survive a fork; waiting for them would never end.
pub mod fork {
    use std::sync::Once;
    use std::sync::atomic::{AtomicBool, Ordering};

    static CHILD: AtomicBool = AtomicBool::new(false);

    #[cfg(unix)]
    extern "C" fn mark_child() {
        CHILD.store(true, Ordering::Relaxed);
    }

    /// Has a later fork noticed. Called before anything that could start a pool.
    pub fn watch() {
        static WATCH: Once = Once::new();
        WATCH.call_once(|| {
            #[cfg(unix)]
            // SAFETY: `mark_child` does nothing but store to an atomic, which is allowed in the
            // child of a process with threads.
            unsafe {
                libc::pthread_atfork(None, None, Some(mark_child));
            }
        });
    }

    /// This process was forked off one that used xent: there are no workers, and a call does
    /// its work on the calling thread.
    pub fn is_child() -> bool {
        CHILD.load(Ordering::Relaxed)
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

    /// Elements of a row: enough that each is a block.
    const WORK: usize = BLOCK_WORK;
    /// Rows that are worth a thread.
    const ROWS_WORTH: usize = WORTH_A_THREAD / WORK;
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
        for_blocks(&team, rows, [WORK, rows * WORK], f, |()| ());
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

    /// Sums over rows are added up by these, so that the bits are too.
    #[test]
    fn blocks_depend_on_rows_and_their_work() {
        for (rows, work, expected) in [
            (1, 1 << 40, 1),
            (BLOCKS, BLOCK_WORK, 1),
            // One a row would be too many.
            (BLOCKS + 1, BLOCK_WORK, 2),
            (2 * BLOCKS, 100_000, 2),
            (2 * BLOCKS + 1, 100_000, 3),
            (7 * BLOCKS, 100_000, 7),
            // Enough work, in whole groups where there are enough rows.
            (10, 1171, 6),
            (10, 1170, 7),
            (10, 1024, 8),
            (10, 900, 16),
            (100_000, 10, 824),
            (7 * BLOCKS + 1, 100_000, 8),
            (8 * BLOCKS + 1, 100_000, 16),
            (1_000_000, 10, 3912),
            (3, 0, BLOCK_WORK),
        ] {
            let len = block_len(rows, work);
            assert_eq!(len, expected, "{rows} rows of {work}");
            assert!(rows <= BLOCKS * len, "{rows} rows of {work}");
        }
    }
}
