//! Thread pools that callers own.

use crate::parallel::fork;

/// A rayon thread pool, for callers who keep xent's threads apart from rayon's global pool.
///
/// Any number of threads may run calls on one pool at once. The calling thread takes part in its
/// call: a call on a pool of n threads uses at most n threads, the calling one included.
#[derive(Debug)]
pub struct Pool(rayon::ThreadPool);

impl Pool {
    /// Starts a pool of `threads` threads. 0 means one for each core.
    pub fn new(threads: usize) -> Result<Self, PoolError> {
        fork::watch();
        rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(|i| format!("xent-{i}"))
            .build()
            .map(Pool)
            .map_err(PoolError)
    }

    pub(crate) fn rayon(&self) -> &rayon::ThreadPool {
        &self.0
    }
}

/// The threads of a pool could not be started.
#[derive(Debug)]
pub struct PoolError(rayon::ThreadPoolBuildError);

impl std::fmt::Display for PoolError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "cannot start the threads of a pool: {}", self.0)
    }
}

impl std::error::Error for PoolError {}
