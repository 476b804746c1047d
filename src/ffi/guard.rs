//! Turns errors and panics into a status and into the calling thread's last message.

use super::*;
use std::cell::{Cell, RefCell};
use std::ffi::{CStr, CString};
use std::panic::{AssertUnwindSafe, catch_unwind};

/// A status other than XENT_OK, and its message.
pub struct Failure {
    /// XENT_ERR_*
    pub status: xent_status,
    /// The text that xent_last_error returns.
    pub message: String,
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let status = match &error {
            Error::Null(_) => XENT_ERR_NULL,
            Error::Struct(_) => XENT_ERR_STRUCT,
            Error::Shape(_) => XENT_ERR_SHAPE,
            Error::Stride(_) => XENT_ERR_STRIDE,
            Error::Dtype(_) => XENT_ERR_DTYPE,
            Error::Align(_) => XENT_ERR_ALIGN,
            Error::Overlap(_) => XENT_ERR_OVERLAP,
            Error::Target { .. } => XENT_ERR_TARGET,
            Error::Param(_) => XENT_ERR_PARAM,
            Error::Memory { .. } => XENT_ERR_MEMORY,
        };
        Failure { status, message: error.to_string() }
    }
}

thread_local! {
    static LAST_ERROR: RefCell<CString> = RefCell::default();
    /// The last message instead, if it was set without memory. It has no destructor, which a thread would
    /// need memory to register.
    static LAST_STATIC: Cell<Option<&'static CStr>> = const { Cell::new(None) };
}

/// Runs the body of an entry point. A panic becomes XENT_ERR_PANIC.
pub fn guarded(body: impl FnOnce() -> Result<(), Failure>) -> xent_status {
    let failure = match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(())) => return XENT_OK,
        Ok(Err(failure)) => failure,
        Err(panic) => {
            let what = panic
                .downcast_ref::<&str>()
                .map(|what| what.to_string())
                .or_else(|| panic.downcast_ref::<String>().cloned())
                .unwrap_or_default();
            Failure { status: XENT_ERR_PANIC, message: format!("internal error: {what}") }
        }
    };
    fail(&failure);
    failure.status
}

/// Makes a failure this thread's last.
pub fn fail(failure: &Failure) {
    let message = CString::new(failure.message.replace('\0', " ")).unwrap_or_default();
    // A thread that is ending may have dropped its message already.
    let _ = LAST_ERROR.try_with(|last| last.replace(message));
    LAST_STATIC.set(None);
}

/// Makes a message this thread's last, without allocating.
pub fn fail_without_memory(message: &'static CStr) {
    LAST_STATIC.set(Some(message));
}

/// This thread's last message.
pub fn last_error() -> *const c_char {
    if let Some(message) = LAST_STATIC.get() {
        return message.as_ptr();
    }
    LAST_ERROR.try_with(|last| last.borrow().as_ptr()).unwrap_or(c"".as_ptr())
}
