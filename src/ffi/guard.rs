//! Turns errors and panics into a status and into the calling thread's last message.

use super::status::*;
use crate::error::Error;
use std::cell::UnsafeCell;
use std::ffi::c_char;
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

/// Bytes of a message at most, with the zero that ends it. Longer ones are cut off.
const MESSAGE: usize = 512;

thread_local! {
    /// The last message. It needs no memory, and no destructor, which a thread would need memory to register.
    static LAST_ERROR: UnsafeCell<[u8; MESSAGE]> = const { UnsafeCell::new([0; MESSAGE]) };
}

/// Runs the body of an entry point. A panic becomes XENT_ERR_PANIC.
pub fn guarded(body: impl FnOnce() -> Result<(), Failure>) -> xent_status {
    #[cfg(xent_c_library)]
    silence();
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

/// Keeps panics from printing, which no call does: the message of XENT_ERR_PANIC says what one would have printed. The C
/// library has a standard library of its own, so that the program's other Rust code prints as before.
///
/// Whoever comes first sets the hook, and nobody waits for it: a child may be forked meanwhile.
#[cfg(xent_c_library)]
#[inline(always)]
fn silence() {
    use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
    static SILENT: AtomicBool = AtomicBool::new(false);
    if !SILENT.load(Relaxed) && !SILENT.swap(true, Relaxed) {
        // Boxing what has no size takes no memory.
        std::panic::set_hook(Box::new(|_| {}));
    }
}

/// Makes a failure this thread's last.
pub fn fail(failure: &Failure) {
    let mut end = failure.message.len().min(MESSAGE - 1);
    while !failure.message.is_char_boundary(end) {
        end -= 1;
    }
    let text = &failure.message[..end];
    LAST_ERROR.with(|last| {
        // SAFETY: the message is this thread's, and nobody refers to it here: `last_error` gives a pointer away.
        let last = unsafe { &mut *last.get() };
        for (to, byte) in last.iter_mut().zip(text.bytes().chain([0])) {
            *to = byte;
        }
        // A zero inside, from an operand's name in Rust, would end the message.
        last[..text.len()].iter_mut().filter(|byte| **byte == 0).for_each(|byte| *byte = b' ');
    });
}

/// This thread's last message.
pub fn last_error() -> *const c_char {
    LAST_ERROR.with(|last| last.get().cast::<c_char>().cast_const())
}
