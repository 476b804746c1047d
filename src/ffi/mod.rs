//! The C interface: descriptors, status, guard. No arithmetic.
//!
//! build.rs generates include/xent.h from this file: its doc comments are that header's, and
//! are written for a C reader.

mod guard;

use crate::codes::*;
use crate::dispatch;
use crate::error::Error;
use crate::parallel::Team;
use crate::plan::Pass;
use crate::pool::Pool;
use crate::problem::{self, GradientRequest, Operand, Problem, Results};
use guard::{Failure, fail, guarded, last_error};
use std::ffi::{c_char, c_void};

/// 0 = ok. Codes are append-only; a retired one stays listed. Where several apply to one call,
/// the first in the order STRUCT, NULL, DTYPE, SHAPE, STRIDE, ALIGN, OVERLAP, PARAM, TARGET is
/// reported. A call that returns anything but XENT_OK or XENT_ERR_PANIC has written nothing but
/// this thread's xent_last_error.
#[allow(non_camel_case_types, reason = "the name in C")]
pub type xent_status = i32;

/// Done.
pub const XENT_OK: xent_status = 0;
/// A required pointer is NULL.
pub const XENT_ERR_NULL: xent_status = 1;
/// struct_size unset, or unknown flag bits: not built from XENT_PROBLEM_INIT, XENT_RESULTS_INIT.
pub const XENT_ERR_STRUCT: xent_status = 2;
/// A size is out of range, or rows*classes*inner overflows.
pub const XENT_ERR_SHAPE: xent_status = 3;
/// A stride is negative, overflows, or makes elements of an output share an address: an axis of
/// an output must step over the whole span of the axes inside it.
pub const XENT_ERR_STRIDE: xent_status = 4;
/// A dtype is unknown or not allowed for its operand.
pub const XENT_ERR_DTYPE: xent_status = 5;
/// Data is not aligned to its element size.
pub const XENT_ERR_ALIGN: xent_status = 6;
/// An output may overlap another operand other than as exactly in place. Judged by byte span,
/// except that column blocks of one matrix (equal row strides, disjoint within a row) are seen
/// to be apart.
pub const XENT_ERR_OVERLAP: xent_status = 7;
/// A target index is neither ignore_index nor in [0, classes).
pub const XENT_ERR_TARGET: xent_status = 8;
/// label_smoothing outside [0, 1]; a negative or infinite normalizer, softcap or z_loss;
/// logit_scale not > 0; a NaN; a result that this problem cannot have; an XENT_ISA that does not
/// name an available instruction set.
pub const XENT_ERR_PARAM: xent_status = 9;
/// An internal bug, caught at the boundary; never expected. Outputs may be half-written.
pub const XENT_ERR_PANIC: xent_status = 10;

/// A strided operand that is read; memory of the caller's, which xent never keeps.
///
/// Strides count elements, in the order row, class, inner. All three zero = densely packed. The
/// stride of an axis of size 1, and strides[1] of an operand without a class axis (indices, row
/// weights, row mask, row losses), is not looked at, for "all zero" either. Elements may repeat
/// (stride 0 on some axis). data == NULL = absent; an operand without elements may have any data.
#[repr(C)]
#[derive(Clone, Copy)]
#[allow(non_camel_case_types, reason = "the name in C")]
pub struct xent_input {
    /// The first element, aligned to the element size.
    pub data: *const c_void,
    /// XENT_F32 ...
    pub dtype: xent_dtype,
    /// Row, class, inner; in elements.
    pub strides: [i64; 3],
}

/// A strided operand that is written. As xent_input, but no two elements may share an address.
#[repr(C)]
#[derive(Clone, Copy)]
#[allow(non_camel_case_types, reason = "the name in C")]
pub struct xent_output {
    /// The first element, aligned to the element size.
    pub data: *mut c_void,
    /// XENT_F32 ...
    pub dtype: xent_dtype,
    /// Row, class, inner; in elements.
    pub strides: [i64; 3],
}

/// A thread pool of the caller's own.
#[allow(non_camel_case_types, reason = "the name in C")]
pub struct xent_pool(Pool);

/// A cross-entropy problem. Start from XENT_PROBLEM_INIT, which carries the defaults; set rows,
/// classes, logits and targets, and what else is wanted. xent reads it and keeps nothing of it.
///
/// N rows, C classes, K inner positions (1 in this version). x_c are the logits of a row, y its
/// target, w_c the class weights, W their sum, r the row weight, e = label_smoothing:
///
///   lse = ln sum_c exp x_c      logp_c = x_c - lse      p_c = exp logp_c
///   row loss = r * ((1-e) * w_y * -logp_y  +  e/C * sum_c w_c * -logp_c)
///   gradient = r * ((1-e) * w_y * (p_c - [c=y])  +  e/C * (W * p_c - w_c))
///
/// A row is ignored if its target is ignore_index or its mask byte is 0: its loss is 0, its
/// gradient exactly 0, and nothing that its logits hold reaches another row. A term whose
/// factor is 0 is 0, whatever it multiplies. A kept row that holds NaN or +inf, or nothing but
/// -inf, has NaN for loss and gradient, unless its weight r is 0.
#[repr(C)]
#[derive(Clone, Copy)]
#[allow(non_camel_case_types, reason = "the name in C")]
pub struct xent_problem {
    /// Set by XENT_PROBLEM_INIT; lets the struct grow.
    pub struct_size: u32,
    /// XENT_FLAG_* or'ed; default 0.
    pub flags: u32,
    /// N
    pub rows: usize,
    /// C
    pub classes: usize,
    /// K; default 1, and 1 is all that this version takes (XENT_ERR_SHAPE).
    pub inner: usize,
    /// f32, bf16 or f16, [rows, classes], classes contiguous, any row stride. f64 and other class
    /// strides are not in this version (XENT_ERR_DTYPE, XENT_ERR_STRIDE). Halves are computed with
    /// in f32: their loss is that of the widened logits, bit for bit.
    pub logits: xent_input,
    /// i64, i32, u32, u16 or u8 class indices [rows]. Absent: only lse can be asked for,
    /// anything else is XENT_ERR_NULL.
    pub targets: xent_input,
    /// Optional, any float [classes]; negative and zero are legal.
    pub class_weights: xent_input,
    /// Optional, any float [rows].
    pub row_weights: xent_input,
    /// Optional, u8 [rows]; 0 = treated as ignored, whatever the target.
    pub row_mask: xent_input,
    /// The target of rows that do not count; any value. Default -100.
    pub ignore_index: i64,
    /// In [0, 1]; default 0.
    pub label_smoothing: f64,
    /// Weight of lse^2. Not in this version: 0, the default.
    pub z_loss: f64,
    /// x -> cap*tanh(x/cap). Not in this version: 0, the default.
    pub softcap: f64,
    /// x -> scale*x. Not in this version: 1, the default.
    pub logit_scale: f64,
    /// If > 0, what a mean divides by instead of the sum of r*w_y. Default 0.
    pub normalizer: f64,
    /// As normalizer, for z_loss. Not in this version: 0, the default.
    pub z_normalizer: f64,
    /// Default XENT_MEAN.
    pub reduction: xent_reduction,
    /// 0 = the whole pool; 1 = the calling thread alone; n = at most n. The result has the same
    /// bits whatever it is. Default 0.
    pub threads: u32,
    /// NULL, the default = rayon's global pool.
    pub pool: *const xent_pool,
}

/// Everything that a forward can hand back; NULL or absent, the default, for what is not wanted.
/// One pass over the logits produces all of it. The memory is the caller's.
#[repr(C)]
#[derive(Clone, Copy)]
#[allow(non_camel_case_types, reason = "the name in C")]
pub struct xent_results {
    /// Set by XENT_RESULTS_INIT; lets the struct grow.
    pub struct_size: u32,
    /// The reduced loss; must be NULL with XENT_NONE.
    pub loss: *mut f64,
    /// f32 or f64 [rows]; 0 where ignored. Never divided by anything.
    pub row_losses: xent_output,
    /// [rows], packed: the log-sum-exp of the logits, of ignored rows too.
    pub lse: *mut f64,
    /// Not in this version: NULL, as for all members marked so.
    pub z_loss: *mut f64,
    /// What XENT_MEAN divides by, whatever the reduction.
    pub normalizer: *mut f64,
    /// Not in this version.
    pub z_normalizer: *mut f64,
    /// Rows that count.
    pub kept_rows: *mut u64,
    /// Not in this version.
    pub argmax: *mut i64,
    /// Not in this version.
    pub correct: *mut u64,
    /// Not in this version.
    pub entropy: xent_output,
}

impl xent_input {
    fn operand(&self) -> Operand {
        Operand {
            data: self.data.cast_mut().cast(),
            dtype: self.dtype,
            strides: self.strides,
            ..Operand::ABSENT
        }
    }
}

impl xent_output {
    fn operand(&self) -> Operand {
        Operand {
            data: self.data.cast(),
            dtype: self.dtype,
            strides: self.strides,
            ..Operand::ABSENT
        }
    }
}

impl xent_problem {
    fn problem(&self) -> Problem {
        Problem {
            flags: self.flags,
            rows: self.rows,
            classes: self.classes,
            inner: self.inner,
            logits: self.logits.operand(),
            targets: self.targets.operand(),
            class_weights: self.class_weights.operand(),
            row_weights: self.row_weights.operand(),
            row_mask: self.row_mask.operand(),
            ignore_index: self.ignore_index,
            label_smoothing: self.label_smoothing,
            z_loss: self.z_loss,
            softcap: self.softcap,
            logit_scale: self.logit_scale,
            normalizer: self.normalizer,
            z_normalizer: self.z_normalizer,
            reduction: self.reduction,
            threads: self.threads,
        }
    }

    /// # Safety
    /// `pool` is NULL or a live pool.
    unsafe fn team(&self) -> Team<'_> {
        Team {
            // SAFETY: the caller's promise.
            pool: unsafe { self.pool.as_ref() }.map(|pool| pool.0.rayon()),
            threads: self.threads as usize,
        }
    }
}

impl xent_results {
    fn results(&self) -> Results {
        Results {
            loss: self.loss,
            row_losses: self.row_losses.operand(),
            lse: Operand::packed(self.lse, XENT_F64),
            z_loss: self.z_loss,
            normalizer: self.normalizer,
            z_normalizer: self.z_normalizer,
            kept_rows: self.kept_rows,
            argmax: Operand::packed(self.argmax, XENT_I64),
            correct: self.correct,
            entropy: self.entropy.operand(),
        }
    }
}

/// A struct whose first member is its size in bytes, as the caller's header knew it.
///
/// # Safety
/// All of it is plain data for which zero bytes are a value, `struct_size` comes first, and
/// [`Self::FIRST_SIZE`] is its size in the first release.
unsafe trait Sized32: Copy {
    const NAME: &'static str;
    const FIRST_SIZE: usize;

    /// A copy of what the caller has, if anything. Members that it is too old for are 0: their default, or
    /// one that `problem` takes for it.
    ///
    /// # Safety
    /// `from` is NULL or valid for reads of as many bytes as its first four say.
    unsafe fn read(from: *const Self) -> Result<Option<Self>, Failure> {
        if from.is_null() {
            return Ok(None);
        }
        // SAFETY: it has at least a size.
        let size = unsafe { from.cast::<u32>().read_unaligned() } as usize;
        let own = size_of::<Self>();
        if size < Self::FIRST_SIZE {
            return Err(Error::Struct(format!(
                "{0}.struct_size = {size} is less than {1}: start from XENT_{2}_INIT",
                Self::NAME,
                Self::FIRST_SIZE,
                Self::NAME.to_uppercase()
            ))
            .into());
        }
        for at in own..size {
            // SAFETY: within `size` bytes.
            if unsafe { *from.cast::<u8>().add(at) } != 0 {
                return Err(Error::Struct(format!(
                    "{}.struct_size = {size} exceeds this version's {own}, and byte {at} is not 0",
                    Self::NAME
                ))
                .into());
            }
        }
        // SAFETY: zero bytes are a value; the copy stays within both structs.
        unsafe {
            let mut copy = std::mem::zeroed::<Self>();
            let to = (&raw mut copy).cast::<u8>();
            to.copy_from_nonoverlapping(from.cast(), size.min(own));
            Ok(Some(copy))
        }
    }
}

// SAFETY: repr(C), numbers and pointers.
unsafe impl Sized32 for xent_problem {
    const NAME: &'static str = "problem";
    const FIRST_SIZE: usize = 304;
}

// SAFETY: repr(C), numbers and pointers.
unsafe impl Sized32 for xent_results {
    const NAME: &'static str = "results";
    const FIRST_SIZE: usize = 152;
}

/// The structs of a call. Faults of a struct come before pointers that are NULL, but for the
/// problem's own.
///
/// # Safety
/// As [`Sized32::read`].
unsafe fn structs(
    problem: *const xent_problem,
    results: *const xent_results,
) -> Result<(xent_problem, Problem, Option<Results>), Failure> {
    // SAFETY: the caller's promise.
    let (problem, results) = unsafe { (xent_problem::read(problem)?, xent_results::read(results)) };
    let problem = problem.ok_or_else(|| null("problem"))?;
    let checked = problem.problem();
    checked.check_flags()?;
    Ok((problem, checked, results?.map(|results| results.results())))
}

fn null(name: &str) -> Failure {
    Error::Null(format!("{name} is NULL")).into()
}

/// The gradient that a call asks for.
///
/// # Safety
/// Both are NULL or valid for reads.
unsafe fn request(
    grad_output: *const xent_input,
    grad_scale: f64,
    grad_logits: *const xent_output,
) -> Result<GradientRequest, Failure> {
    // SAFETY: the caller's promise.
    let (output, logits) = unsafe { (grad_output.as_ref(), grad_logits.as_ref()) };
    Ok(GradientRequest {
        output: output.map_or(Operand::ABSENT, xent_input::operand),
        scale: grad_scale,
        logits: logits.ok_or_else(|| null("grad_logits"))?.operand(),
    })
}

/// The loss and what else `results` asks for. Reads the logits from memory once.
///
/// problem, results: not NULL. Thread-safe. On failure nothing is written.
///
/// Every operand that is present covers the problem's shape; no other thread writes the inputs
/// or touches the outputs during the call.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xent_forward(
    problem: *const xent_problem,
    results: *const xent_results,
) -> xent_status {
    // SAFETY: the caller's promise.
    guarded(|| unsafe {
        let (problem, checked, results) = structs(problem, results)?;
        let results = results.ok_or_else(|| null("results"))?;
        let team = problem.team();
        problem::run(&checked, Pass::Forward, &results, None, &team, None)?;
        Ok(())
    })
}

/// The gradient of the loss with respect to the logits, recomputed from lse.
///
/// problem, lse, grad_logits: not NULL. lse: double [rows], packed, of a forward over the same logits or of the caller's own making.
/// grad_output: the gradient of what follows, NULL = 1; any float, one element, or [rows] with
/// XENT_NONE. grad_scale: finite, multiplies on top (loss scaling, 1/accumulation steps).
/// grad_logits: [rows, classes], the dtype of the logits, or f32 for halves, rounded once, to
/// nearest even; it may be exactly the logits (same data, dtype and
/// strides), which are then overwritten (not with XENT_FLAG_ACCUMULATE: XENT_ERR_OVERLAP).
/// Ignored rows get 0, or stay as they are with XENT_FLAG_ACCUMULATE. Thread-safe. On failure
/// nothing is written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xent_backward(
    problem: *const xent_problem,
    lse: *const f64,
    grad_output: *const xent_input,
    grad_scale: f64,
    grad_logits: *const xent_output,
) -> xent_status {
    // SAFETY: the caller's promise.
    guarded(|| unsafe {
        let (problem, checked, _) = structs(problem, std::ptr::null())?;
        let request = request(grad_output, grad_scale, grad_logits)?;
        let results = Results { lse: Operand::packed(lse.cast_mut(), XENT_F64), ..Results::NONE };
        let team = problem.team();
        problem::run(&checked, Pass::Backward, &results, Some(&request), &team, None)?;
        Ok(())
    })
}

/// Both in one go, reading the logits from memory once.
///
/// problem, grad_logits: not NULL; results may be. The rest as in xent_forward and xent_backward. On failure nothing is
/// written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xent_forward_backward(
    problem: *const xent_problem,
    grad_output: *const xent_input,
    grad_scale: f64,
    results: *const xent_results,
    grad_logits: *const xent_output,
) -> xent_status {
    // SAFETY: the caller's promise.
    guarded(|| unsafe {
        let (problem, checked, results) = structs(problem, results)?;
        let results = results.unwrap_or(Results::NONE);
        let request = request(grad_output, grad_scale, grad_logits)?;
        let team = problem.team();
        let pass = Pass::ForwardBackward;
        problem::run(&checked, pass, &results, Some(&request), &team, None)?;
        Ok(())
    })
}

/// "XENT_ERR_TARGET" for XENT_ERR_TARGET, and so on; "XENT_ERR_UNKNOWN" for a code of no
/// meaning. Static; never NULL.
#[unsafe(no_mangle)]
pub extern "C" fn xent_status_name(status: xent_status) -> *const c_char {
    let name = match status {
        XENT_OK => c"XENT_OK",
        XENT_ERR_NULL => c"XENT_ERR_NULL",
        XENT_ERR_STRUCT => c"XENT_ERR_STRUCT",
        XENT_ERR_SHAPE => c"XENT_ERR_SHAPE",
        XENT_ERR_STRIDE => c"XENT_ERR_STRIDE",
        XENT_ERR_DTYPE => c"XENT_ERR_DTYPE",
        XENT_ERR_ALIGN => c"XENT_ERR_ALIGN",
        XENT_ERR_OVERLAP => c"XENT_ERR_OVERLAP",
        XENT_ERR_TARGET => c"XENT_ERR_TARGET",
        XENT_ERR_PARAM => c"XENT_ERR_PARAM",
        XENT_ERR_PANIC => c"XENT_ERR_PANIC",
        _ => c"XENT_ERR_UNKNOWN",
    };
    name.as_ptr()
}

/// This thread's last failure in words, e.g. "targets[17] = 50257 is outside [0, 50257)"; "" if
/// there was none. Like errno: a success leaves it as it was. Valid until this thread's next
/// failure; never NULL.
#[unsafe(no_mangle)]
pub extern "C" fn xent_last_error() -> *const c_char {
    last_error()
}

/// Starts a pool of that many threads; 0 = one for each core. NULL on failure; see
/// xent_last_error. The caller owns it and gives it to xent_pool_free.
#[unsafe(no_mangle)]
pub extern "C" fn xent_pool_new(threads: u32) -> *mut xent_pool {
    let mut made = std::ptr::null_mut();
    guarded(|| {
        let pool = Pool::new(threads as usize)
            .map_err(|error| Failure { status: XENT_ERR_PARAM, message: error.to_string() })?;
        made = Box::into_raw(Box::new(xent_pool(pool)));
        Ok(())
    });
    made
}

/// Ends a pool that xent_pool_new made, once; its threads end soon after. No call may be running
/// on it. NULL is a no-op.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xent_pool_free(pool: *mut xent_pool) {
    if !pool.is_null() {
        guarded(|| {
            // SAFETY: made by `Box::into_raw` in xent_pool_new, and not freed before.
            let pool = unsafe { Box::from_raw(pool) };
            if crate::parallel::fork::is_child() {
                // Its threads are not in this process, and may have held its locks at the fork.
                std::mem::forget(pool);
            }
            Ok(())
        });
    }
}

/// The kernels in use: "avx512", "avx2", "neon" or "portable". The environment variable XENT_ISA
/// (if not empty) lowers the choice; if it names none that this processor has, every call fails with
/// XENT_ERR_PARAM, and this is "none". Static; never NULL.
#[unsafe(no_mangle)]
pub extern "C" fn xent_isa() -> *const c_char {
    let name = match dispatch::selected() {
        Ok(isa) => match isa.name() {
            "avx512" => c"avx512",
            "avx2" => c"avx2",
            "neon" => c"neon",
            _ => c"portable",
        },
        Err(why) => {
            fail(&Failure { status: XENT_ERR_PARAM, message: why.to_string() });
            c"none"
        }
    };
    name.as_ptr()
}

/// The version, "0.1.0". Static; never NULL.
#[unsafe(no_mangle)]
pub extern "C" fn xent_version() -> *const c_char {
    const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), "\0");
    VERSION.as_ptr().cast()
}
