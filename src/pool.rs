//! Thread pools that callers own.

use crate::parallel::fork;
use crate::worker;
use std::mem;
use std::thread::JoinHandle;

/// A rayon thread pool, for callers who keep xent's threads apart from rayon's global pool.
///
/// Any number of threads may run calls on one pool at once. The calling thread takes part in its
/// call: a call on a pool of n threads uses at most n threads, the calling one included.
///
/// The threads block signals, save those that an instruction raises on its own thread (SIGSEGV and its
/// like). Dropping the pool waits until they have ended.
///
/// A process that was forked off one that used xent's threads starts none: there a call on any pool does
/// its work on the calling thread.
#[derive(Debug)]
pub struct Pool {
    /// None in a forked process.
    pool: Option<rayon::ThreadPool>,
    threads: Vec<JoinHandle<()>>,
}

impl Pool {
    /// Starts a pool of `threads` threads. 0 means one for each core.
    pub fn new(threads: usize) -> Result<Self, PoolError> {
        if fork::is_child() {
            return Ok(Pool { pool: None, threads: Vec::new() });
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
            Ok(pool) => Ok(Pool { pool: Some(pool), threads: handles }),
            Err(error) => {
                // Rayon has told those that were started to end.
                join(handles);
                Err(PoolError(Why::Threads(error)))
            }
        }
    }

    /// The pool of threads; None in a forked process, where no call uses one.
    pub(crate) fn rayon(&self) -> Option<&rayon::ThreadPool> {
        self.pool.as_ref()
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let threads = mem::take(&mut self.threads);
        if fork::is_child() {
            // The threads are not in this process, and may have held the pool's locks at the fork: dropping
            // the pool could wait for them forever.
            mem::forget((self.pool.take(), threads));
            return;
        }
        // Rayon tells the threads to end. Their code may be unloaded once they have.
        drop(self.pool.take());
        join(threads);
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

impl PoolError {
    /// Whether memory was short, so that even a message may find none.
    #[cfg(all(feature = "capi", not(test)))]
    pub(crate) fn is_out_of_memory(&self) -> bool {
        matches!(self.0, Why::Memory)
    }
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
