//! The threads of a call, the calling one among them: the floating-point modes that they compute under, how
//! those that xent starts do so, and the memory that giving them work takes.

use std::alloc::{GlobalAlloc, Layout};
use std::hint::black_box;
use std::io;
use std::thread::{Builder, JoinHandle, available_parallelism};

/// Starts a thread of a pool. The thread blocks signals: a signal that the program's own threads block, and
/// await with sigwait, would otherwise be delivered to it.
pub fn spawn(thread: rayon::ThreadBuilder) -> io::Result<JoinHandle<()>> {
    let mut builder = Builder::new();
    if let Some(name) = thread.name() {
        builder = builder.name(name.to_owned());
    }
    if let Some(size) = thread.stack_size() {
        builder = builder.stack_size(size);
    }
    // The thread inherits the mask, so no signal reaches it before it could block signals itself.
    #[cfg(unix)]
    let _blocked = signals::Blocked::new();
    builder.spawn(|| thread.run())
}

#[cfg(unix)]
mod signals {
    use std::mem::MaybeUninit;
    use std::ptr;

    /// The signals that an instruction raises on its own thread. They stay open: the system kills a process
    /// whose thread blocks one of them and raises it, without running the handler that reports the crash.
    const SYNCHRONOUS: [libc::c_int; 6] =
        [libc::SIGSEGV, libc::SIGBUS, libc::SIGFPE, libc::SIGILL, libc::SIGTRAP, libc::SIGSYS];

    /// Blocks all other signals on this thread while it lives.
    pub struct Blocked {
        before: Option<libc::sigset_t>,
    }

    impl Blocked {
        pub fn new() -> Blocked {
            let mut set = MaybeUninit::uninit();
            let mut before = MaybeUninit::uninit();
            // SAFETY: `sigfillset` initialises `set` before the other calls read it; `pthread_sigmask`
            // initialises `before` if it returns 0.
            unsafe {
                libc::sigfillset(set.as_mut_ptr());
                for signal in SYNCHRONOUS {
                    libc::sigdelset(set.as_mut_ptr(), signal);
                }
                let status =
                    libc::pthread_sigmask(libc::SIG_BLOCK, set.as_ptr(), before.as_mut_ptr());
                Blocked { before: (status == 0).then(|| before.assume_init()) }
            }
        }
    }

    impl Drop for Blocked {
        fn drop(&mut self) {
            if let Some(before) = &self.before {
                // SAFETY: `before` is a mask that `pthread_sigmask` returned; the old mask may be null.
                unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, before, ptr::null_mut()) };
            }
        }
    }
}

/// The most stack, in bytes, that a call takes on the calling thread, and on each other one: 48 KiB whatever the
/// sizes, dtypes, strides and options are. A build without optimisation takes more.
///
/// For threads with little stack: coroutines, or those of a C library that gives them 128 KiB.
pub const fn stack_bytes() -> usize {
    48 * 1024
}

/// The C library's reserve of memory (src/ffi/reserve.rs) serves no request of so many bytes: a call that can do without
/// its memory, or say that there is none, asks for as many at least.
pub const UNRESERVED: usize = 16 * 1024;

/// Whether the allocator has so many bytes. Rayon aborts the process where an allocation of its own fails.
/// Without memory a call therefore gives rayon no work.
pub fn has_memory(bytes: usize) -> bool {
    // The C library's own has a reserve, which is not for this.
    #[cfg(xent_c_library)]
    let allocator = std::alloc::System;
    #[cfg(not(xent_c_library))]
    let allocator = Global;
    let Ok(layout) = Layout::from_size_align(bytes.max(1), 16) else { return false };
    // SAFETY: the layout's size is not 0, and `dealloc` gets the block and the layout of `alloc`.
    // `black_box` keeps the compiler from leaving the pair out.
    unsafe {
        let block = black_box(allocator.alloc(layout));
        if block.is_null() {
            return false;
        }
        allocator.dealloc(block, layout);
    }
    true
}

/// The allocator of the program.
#[cfg(not(xent_c_library))]
struct Global;

#[cfg(not(xent_c_library))]
// SAFETY: every method passes its arguments on to the program's allocator and returns its result.
unsafe impl GlobalAlloc for Global {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller keeps the contract of `alloc`, which is also that of the program's.
        unsafe { std::alloc::alloc(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps the contract of `dealloc`, which is also that of the program's.
        unsafe { std::alloc::dealloc(block, layout) }
    }
}

/// Whether there is memory to start a pool of so many threads, stacks excepted. 0 = one for each core.
pub fn has_memory_to_start(threads: usize) -> bool {
    const EACH: usize = 16 * 1024;
    // The system's answer to how many cores there are takes memory as well.
    if !has_memory(2 * EACH) {
        return false;
    }
    let threads = match threads {
        0 => available_parallelism().map_or(1, usize::from),
        n => n,
    };
    has_memory(threads.saturating_add(1).saturating_mul(EACH))
}

/// The memory that rayon takes for so many jobs: a block of its queue (1.5 KiB for 63 jobs), and a box for
/// each job.
pub fn job_bytes(jobs: usize) -> usize {
    jobs.saturating_mul(128).saturating_add(1600)
}

/// The floating-point modes of a call: rounding, whether subnormals are flushed to zero, and no traps. They change
/// the bits of results, so all threads of a call compute under those of the calling thread.
#[derive(Clone, Copy)]
pub struct Modes(control::Register);

impl Modes {
    /// Those of this thread, in a call or not.
    pub fn current() -> Modes {
        Modes(control::untrapped(control::get()) & control::MODES)
    }

    /// Sets them on this thread until the result is dropped.
    pub fn enter(self) -> Entered {
        Entered::with(|before| before & !control::MODES | self.0)
    }
}

/// Restores the thread's own modes, and its exception flags, when dropped.
pub struct Entered {
    before: control::Register,
    flags: control::Flags,
}

impl Entered {
    /// Keeps floating-point exceptions from trapping on this thread, in whose calls they mean nothing: lanes
    /// without a logit compute with whatever they hold, and kernels try sums that may overflow.
    #[inline(always)]
    pub fn untrapped() -> Entered {
        Entered::with(control::untrapped)
    }

    /// Takes subnormal numbers for zeros on this thread, operands and results alike.
    #[inline(always)]
    pub fn flushing() -> Entered {
        Entered::with(control::flushing)
    }

    #[inline(always)]
    fn with(inside: impl Fn(control::Register) -> control::Register) -> Entered {
        let (before, flags) = (control::get(), control::flags());
        let inside = inside(before);
        if inside != before {
            control::set(inside);
        }
        Entered { before, flags }
    }
}

impl Drop for Entered {
    #[inline(always)]
    fn drop(&mut self) {
        if control::get() != self.before {
            control::set(self.before);
        }
        control::set_flags(self.flags);
    }
}

#[cfg(target_arch = "x86_64")]
mod control {
    //! MXCSR, which has the exception flags too.
    use std::arch::asm;

    pub type Register = u32;

    /// There are none beside.
    #[derive(Clone, Copy)]
    pub struct Flags;

    /// Exceptions that do not trap.
    const MASKS: Register = 0x1f80;

    /// Flush to zero, rounding control, denormals are zeros, masks.
    pub const MODES: Register = 0x8000 | 0x6000 | 0x40 | MASKS;

    #[inline(always)]
    pub fn untrapped(value: Register) -> Register {
        value | MASKS
    }

    /// With flush to zero, and denormals are zeros.
    #[inline(always)]
    pub fn flushing(value: Register) -> Register {
        value | 0x8000 | 0x40
    }

    #[inline(always)]
    pub fn flags() -> Flags {
        Flags
    }

    #[inline(always)]
    pub fn set_flags(_: Flags) {}

    #[inline(always)]
    pub fn get() -> Register {
        let mut value: Register = 0;
        // SAFETY: the instruction stores four bytes, at `value`.
        unsafe {
            asm!("stmxcsr [{}]", in(reg) &raw mut value, options(nostack, preserves_flags));
        }
        value
    }

    #[inline(always)]
    pub fn set(value: Register) {
        // SAFETY: `value` came from `get`, at most with the modes of another thread and with masks, so no
        // reserved bit is set. The kernels compute under whatever modes the calling thread has.
        unsafe {
            asm!("ldmxcsr [{}]", in(reg) &raw const value, options(nostack, preserves_flags));
        }
    }
}

#[cfg(target_arch = "aarch64")]
mod control {
    //! FPCR, and the exception flags in FPSR.
    use std::arch::asm;

    pub type Register = u64;
    pub type Flags = u64;

    pub const MODES: Register = !0;

    /// Without the bits that enable traps: IOE, DZE, OFE, UFE, IXE, IDE.
    #[inline(always)]
    pub fn untrapped(value: Register) -> Register {
        value & !0x9f00
    }

    /// With FZ.
    #[inline(always)]
    pub fn flushing(value: Register) -> Register {
        value | 1 << 24
    }

    #[inline(always)]
    pub fn flags() -> Flags {
        let value: Flags;
        // SAFETY: the instruction reads a register that every thread may read.
        unsafe { asm!("mrs {}, fpsr", out(reg) value, options(nostack, preserves_flags)) };
        value
    }

    #[inline(always)]
    pub fn set_flags(value: Flags) {
        // SAFETY: `value` came from `flags` on this thread.
        unsafe { asm!("msr fpsr, {}", in(reg) value, options(nostack, preserves_flags)) };
    }

    #[inline(always)]
    pub fn get() -> Register {
        let value: Register;
        // SAFETY: the instruction reads a register that every thread may read.
        unsafe { asm!("mrs {}, fpcr", out(reg) value, options(nostack, preserves_flags)) };
        value
    }

    #[inline(always)]
    pub fn set(value: Register) {
        // SAFETY: `value` came from `get`, at most with the modes of another thread. The kernels compute
        // under whatever modes the calling thread has.
        unsafe { asm!("msr fpcr, {}", in(reg) value, options(nostack, preserves_flags)) };
    }
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
mod control {
    //! Other processors: the threads keep their own modes.
    pub type Register = u32;

    /// There are none beside.
    #[derive(Clone, Copy)]
    pub struct Flags;

    pub const MODES: Register = 0;

    pub fn untrapped(value: Register) -> Register {
        value
    }

    pub fn flushing(value: Register) -> Register {
        value
    }

    pub fn flags() -> Flags {
        Flags
    }

    pub fn set_flags(_: Flags) {}

    pub fn get() -> Register {
        0
    }

    pub fn set(_: Register) {}
}
