//! Thread pools that callers own.

use crate::parallel::fork;
use crate::worker;
use std::mem;
use std::sync::Arc;
use std::thread::JoinHandle;

/// A rayon thread pool, for callers who keep xent's threads apart from rayon's global pool: one of xent's
/// own, or one that the program has.
///
/// Any number of threads may run calls on one pool at once. The calling thread takes part in its
/// call: a call on a pool of n threads uses at most n threads, the calling one included.
///
/// The threads of a pool from [`Pool::new`] block signals, save those that an instruction raises on its own
/// thread (SIGSEGV and its like). Dropping the pool waits until they have ended.
///
/// A program that has a pool shares it: `Pool::from(Arc<rayon::ThreadPool>)`. Its threads keep their signal
/// masks, and end when the last `Arc` is gone. In a call they too compute under the calling thread's rounding
/// mode and flushing of subnormals.
///
/// ```
/// # use std::sync::Arc;
/// # use xent::{CrossEntropy, Pool};
/// # let (logits, targets) = ([0.1f32, 0.2, 0.3, 0.4], [0u8]);
/// let threads = Arc::new(rayon::ThreadPoolBuilder::new().num_threads(2).build()?);
/// CrossEntropy::new(1, 4).pool(&*threads).forward(&logits, &targets)?; // borrowed for a call
/// let pool = Pool::from(threads); // or shared
/// CrossEntropy::new(1, 4).pool(&pool).forward(&logits, &targets)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// A process that was forked off one that used xent's threads starts none: there a call on any pool does
/// its work on the calling thread.
#[derive(Debug)]
pub struct Pool(Kind);

#[derive(Debug)]
enum Kind {
    /// Threads that xent has started.
    Own {
        pool: rayon::ThreadPool,
        threads: Vec<JoinHandle<()>>,
    },
    Shared(Arc<rayon::ThreadPool>),
    /// In a forked process, or in the middle of a drop.
    None,
}

/// The pool that a call runs on, for its time: from a `&Pool` or a `&rayon::ThreadPool`.
///
/// A borrowed `rayon::ThreadPool` must have its threads in this process: xent recognises a fork since its own
/// first use of threads, and since a [`Pool`] was made, but not one before.
#[derive(Clone, Copy, Debug)]
pub struct PoolRef<'a>(Option<&'a rayon::ThreadPool>);

impl<'a> PoolRef<'a> {
    /// The pool of threads; None in a forked process, where no call uses one.
    pub(crate) fn rayon(self) -> Option<&'a rayon::ThreadPool> {
        self.0
    }
}

impl<'a> From<&'a Pool> for PoolRef<'a> {
    fn from(pool: &'a Pool) -> Self {
        PoolRef(pool.rayon())
    }
}

impl<'a> From<&'a rayon::ThreadPool> for PoolRef<'a> {
    fn from(pool: &'a rayon::ThreadPool) -> Self {
        PoolRef(Some(pool))
    }
}

impl From<Arc<rayon::ThreadPool>> for Pool {
    fn from(pool: Arc<rayon::ThreadPool>) -> Self {
        // Makes this process the owner of the threads, so that its children leave them alone.
        if fork::is_child() {
            mem::forget(pool);
            return Pool(Kind::None);
        }
        Pool(Kind::Shared(pool))
    }
}

impl Pool {
    /// Starts a pool of `threads` threads. 0 means one for each core.
    pub fn new(threads: usize) -> Result<Self, PoolError> {
        if fork::is_child() {
            return Ok(Pool(Kind::None));
        }
        if !worker::has_memory_to_start(threads) {
            return Err(PoolError(Why::Memory));
        }
        let mut handles = Vec::new();
        let built = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(|i| format!("xent-{i}"))
            .spawn_handler(|thread| {
                handles.push(worker::spawn(thread)?);
                Ok(())
            })
            .build();
        match built {
            Ok(pool) => Ok(Pool(Kind::Own { pool, threads: handles })),
            Err(error) => {
                // Rayon has told those that were started to end.
                join(handles);
                Err(PoolError(Why::Threads(error)))
            }
        }
    }

    /// The pool of threads; None in a forked process, where no call uses one.
    pub(crate) fn rayon(&self) -> Option<&rayon::ThreadPool> {
        match &self.0 {
            Kind::Own { pool, .. } => Some(pool),
            Kind::Shared(pool) => Some(pool),
            Kind::None => None,
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let kind = mem::replace(&mut self.0, Kind::None);
        if fork::is_child() {
            // The threads are not in this process, and may have held the pool's locks at the fork: dropping
            // the pool could wait for them forever.
            mem::forget(kind);
            return;
        }
        if let Kind::Own { pool, threads } = kind {
            // Rayon tells the threads to end. Their code may be unloaded once they have.
            drop(pool);
            join(threads);
        }
    }
}

/// Waits until threads have ended.
fn join(threads: Vec<JoinHandle<()>>) {
    for thread in threads {
        // Rayon's threads pass panics of their jobs on to the caller, and end without one.
        let _ = thread.join();
    }
}

/// The threads of a pool could not be started.
#[derive(Debug)]
pub struct PoolError(Why);

#[derive(Debug)]
enum Why {
    Threads(rayon::ThreadPoolBuildError),
    Memory,
}

impl std::fmt::Display for PoolError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("cannot start the threads of a pool: ")?;
        match &self.0 {
            Why::Threads(error) => error.fmt(f),
            Why::Memory => f.write_str("out of memory"),
        }
    }
}

impl std::error::Error for PoolError {}
