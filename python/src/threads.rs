//! The threads that calls run on: as many as PyTorch uses, from one pool.

use crate::tensor::torch;
use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use std::sync::{Arc, Mutex, PoisonError};
use xent::Pool;

/// Elements below which xent keeps a call on the calling thread, whatever pool it is given.
const ALONE: usize = 2 * 65536;

/// Elements below which a call keeps the GIL: it takes some microseconds, of which letting go of it is a part, and other
/// threads get it every five milliseconds.
const BRIEF: usize = 4096;

/// Runs a call over so many elements, without the GIL unless it is brief.
pub fn compute<T: Send>(py: Python<'_>, elements: usize, call: impl FnOnce() -> T + Send) -> T {
    if elements < BRIEF { call() } else { py.detach(call) }
}

/// The pool, and the number of its threads. It grows when PyTorch is told to use more threads.
static POOL: Mutex<Option<(usize, Arc<Pool>)>> = Mutex::new(None);

/// The threads of a call.
pub struct Threads {
    /// The most that the call may use.
    pub count: u32,
    /// Where they come from; without a pool the calling thread does the work.
    pub pool: Option<Arc<Pool>>,
}

/// The threads for a call over so many elements: `torch.get_num_threads()`.
///
/// The caller holds the GIL while this function holds the lock, so that a fork from Python never finds it taken. In a
/// child of a fork xent does the work of any pool on the calling thread.
pub fn threads(py: Python<'_>, elements: usize) -> PyResult<Threads> {
    let alone = Threads { count: 1, pool: None };
    if elements < ALONE {
        return Ok(alone);
    }
    let count = torch(py)?.get_num_threads.call0(py)?.extract::<u32>(py)?;
    if count <= 1 {
        return Ok(alone);
    }
    let mut current = POOL.lock().unwrap_or_else(PoisonError::into_inner);
    let pool = match &*current {
        Some((size, pool)) if *size >= count as usize => Arc::clone(pool),
        _ => {
            let new = Pool::new(count as usize)
                .map_err(|error| PyRuntimeError::new_err(error.to_string()))?;
            let new = Arc::new(new);
            *current = Some((count as usize, Arc::clone(&new)));
            new
        }
    };
    Ok(Threads { count, pool: Some(pool) })
}
