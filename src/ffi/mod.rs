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
use crate::run;
use crate::validate::cross_entropy::{GradientRequest, Problem, Results};
use crate::validate::operand::{Operand, Sizes};
use crate::validate::softmax::{self, Function};
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
/// struct_size unset, or unknown flag bits: not built from XENT_PROBLEM_INIT, XENT_RESULTS_INIT,
/// XENT_SHAPE_INIT.
pub const XENT_ERR_STRUCT: xent_status = 2;
/// rows*classes*inner overflows, or there are rows without classes.
pub const XENT_ERR_SHAPE: xent_status = 3;
/// A stride is negative, overflows, or makes elements of an output share an address: an axis of
/// an output must step over the whole span of the axes inside it.
pub const XENT_ERR_STRIDE: xent_status = 4;
/// A dtype is unknown, or not allowed for its operand or beside that of another.
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
/// Strides count elements, in the order row, class, inner. All three zero = densely packed:
/// [rows, classes, inner] in C order, [rows, inner] for an operand without a class axis (indices,
/// row weights, row mask, row losses, entropy). The stride of an axis of size 1, and strides[1] of
/// an operand without a class axis, is not looked at, for "all zero" either. Elements may repeat
/// (stride 0 on some axis). data == NULL = absent; an operand without elements may have any data.
///
/// So any axis of a tensor can be the class axis. Classes first, as in a transposed matrix
/// [classes, rows]: strides {1, rows, 1}. Images [N, C, H, W]: inner = H*W, packed. The last axis
/// but one of [A, B, C, D]: rows = A*B, classes = C, inner = D, packed.
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
/// N rows, C classes, K inner positions: N*K softmax distributions. Below, "row" means one of
/// them, and [rows, inner] is what has one element for each. z_c are the logits of a row as
/// stored, w_c the class weights, W their sum, r the row weight, e = label_smoothing:
///
///   x_c = logit_scale * z_c, then x_c = softcap * tanh(x_c / softcap) if softcap > 0
///   lse = ln sum_c exp x_c      logp_c = x_c - lse      p_c = exp logp_c
///
/// With a class index y for target:
///
///   row loss = r * ((1-e) * w_y * -logp_y  +  e/C * sum_c w_c * -logp_c  +  z_loss * lse^2)
///   d/dx_c   = r * ((1-e) * w_y * (p_c - [c=y])  +  e/C * (W * p_c - w_c)  +  2 * z_loss * lse * p_c)
///
/// With probabilities t_c for targets, t'_c = (1-e) * t_c + e/C and T = sum_c w_c * t'_c, which
/// need not be 1:
///
///   row loss = r * (sum_c w_c * t'_c * -logp_c  +  z_loss * lse^2)
///   d/dx_c   = r * (T * p_c - w_c * t'_c  +  2 * z_loss * lse * p_c)
///   d/dt_c   = r * (1-e) * w_c * -logp_c
///
/// The gradient with respect to z_c is d/dx_c times logit_scale, and times 1 - tanh^2 under a
/// softcap. With XENT_FLAG_LOG_PROBS, z_c = logp_c, and d/dlogp_c is minus the factor of -logp_c.
///
/// A row is ignored if its target index is ignore_index or its mask byte is 0: its loss is 0, its
/// gradient exactly 0, and nothing that its logits hold reaches another row. A term whose
/// factor (w_c, t'_c, 1-e, r) is 0 is 0, whatever it multiplies. A kept row in which some x_c is
/// NaN or +inf, or every one is -inf, has NaN for loss and gradient, unless its weight r is 0.
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
    /// K, the positions inside the class axis: d1*..*dk for logits [N, C, d1, .., dk]. Default 1.
    pub inner: usize,
    /// f32, f64, bf16 or f16, [rows, classes, inner]; any strides. Halves are computed with in f32:
    /// their loss is that of the widened logits, bit for bit.
    pub logits: xent_input,
    /// i64, i32, u32, u16 or u8: class indices [rows, inner]. f32, f64, bf16 or f16: probabilities
    /// [rows, classes, inner], in whatever float type the logits have; they are not checked, and
    /// need be neither normalised nor positive. Absent: only lse, argmax and entropy can be asked
    /// for, anything else is XENT_ERR_NULL.
    pub targets: xent_input,
    /// Optional, any float [classes]; negative and zero are legal.
    pub class_weights: xent_input,
    /// Optional, any float [rows, inner].
    pub row_weights: xent_input,
    /// Optional, u8 [rows, inner]; 0 = treated as ignored, whatever the target.
    pub row_mask: xent_input,
    /// The target index of rows that do not count; any value. Not applied to probability targets.
    /// Default -100.
    pub ignore_index: i64,
    /// In [0, 1]; default 0.
    pub label_smoothing: f64,
    /// Weight of lse^2, finite and >= 0; default 0.
    pub z_loss: f64,
    /// If > 0, x -> softcap*tanh(x/softcap), after logit_scale; finite and >= 0. Default 0 = off.
    pub softcap: f64,
    /// x -> logit_scale*x (1/temperature); finite and > 0. Default 1.
    pub logit_scale: f64,
    /// If > 0, what a mean divides its cross-entropy part by, instead of the sum of r*w_y (index
    /// targets) or of r (probabilities) over kept rows: for gradient accumulation, data
    /// parallelism. Default 0.
    pub normalizer: f64,
    /// If > 0, what a mean divides its z-loss part by, instead of the sum of r over kept rows.
    /// Default 0.
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
/// One pass over the logits produces all of it. The memory is the caller's. Without targets there
/// are lse, argmax and entropy.
#[repr(C)]
#[derive(Clone, Copy)]
#[allow(non_camel_case_types, reason = "the name in C")]
pub struct xent_results {
    /// Set by XENT_RESULTS_INIT; lets the struct grow.
    pub struct_size: u32,
    /// The reduced loss, z-loss included; must be NULL with XENT_NONE.
    pub loss: *mut f64,
    /// f32 or f64 [rows, inner], z-loss included; 0 where ignored. Never divided by anything.
    pub row_losses: xent_output,
    /// [rows, inner], packed: the log-sum-exp of the scaled and capped logits, of ignored rows
    /// too. NULL with XENT_FLAG_LOG_PROBS.
    pub lse: *mut f64,
    /// The z-loss part of *loss, 0 if it is off. NULL with XENT_NONE and XENT_FLAG_LOG_PROBS.
    pub z_loss: *mut f64,
    /// What XENT_MEAN divides the cross-entropy part by, whatever the reduction.
    pub normalizer: *mut f64,
    /// What XENT_MEAN divides the z-loss part by, whatever the reduction, z-loss on or off.
    pub z_normalizer: *mut f64,
    /// Rows that count.
    pub kept_rows: *mut u64,
    /// [rows, inner], packed: the predicted class, of ignored rows too. Of the logits as stored:
    /// the lowest index of a NaN if there is one, else of the maximum (0 if all are -inf).
    pub argmax: *mut i64,
    /// Kept rows whose argmax is the target index. NULL with probability targets.
    pub correct: *mut u64,
    /// f32 or f64 [rows, inner]: -sum_c p_c * logp_c, of ignored rows too. Absent with
    /// XENT_FLAG_LOG_PROBS.
    pub entropy: xent_output,
}

/// The shape of a call of the softmax family. Start from XENT_SHAPE_INIT; set rows and classes.
///
/// Operands are [rows, classes, inner]; softmax runs over the classes, of which any strides make
/// any axis of any tensor.
#[repr(C)]
#[derive(Clone, Copy)]
#[allow(non_camel_case_types, reason = "the name in C")]
pub struct xent_shape {
    /// Set by XENT_SHAPE_INIT; lets the struct grow.
    pub struct_size: u32,
    /// 0; anything else is XENT_ERR_STRUCT.
    pub flags: u32,
    /// N
    pub rows: usize,
    /// C
    pub classes: usize,
    /// K; default 1.
    pub inner: usize,
    /// 0 = the whole pool; 1 = the calling thread alone; n = at most n. The result has the same
    /// bits whatever it is. Default 0.
    pub threads: u32,
    /// NULL, the default = rayon's global pool.
    pub pool: *const xent_pool,
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
    fn problem(&self) -> Result<Problem, Failure> {
        check_flags("problem", self.flags, FLAGS)?;
        Ok(Problem {
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
        })
    }
}

impl xent_shape {
    fn sizes(&self) -> Result<Sizes, Failure> {
        check_flags("shape", self.flags, 0)?;
        let xent_shape { rows, classes, inner, .. } = *self;
        Ok(Sizes { rows, classes, inner })
    }
}

/// The flags that a problem may have.
const FLAGS: u32 = XENT_FLAG_LOG_PROBS | XENT_FLAG_EMPTY_IS_ZERO | XENT_FLAG_ACCUMULATE;

/// Refuses flags that this version does not know.
fn check_flags(name: &str, flags: u32, known: u32) -> Result<(), Failure> {
    match flags & !known {
        0 => Ok(()),
        unknown => Err(Error::Struct(format!("{name}.flags has unknown bits {unknown:#x}")).into()),
    }
}

/// Who works on a call.
///
/// # Safety
/// `pool` is NULL or a live pool.
unsafe fn team<'a>(pool: *const xent_pool, threads: u32) -> Team<'a> {
    Team {
        // SAFETY: the caller's promise.
        pool: unsafe { pool.as_ref() }.map(|pool| pool.0.rayon()),
        threads: threads as usize,
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

    /// A copy of what the caller has, if anything. Members that it is too old for are 0: their
    /// default, or one that `problem` takes for it.
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

// SAFETY: repr(C), numbers and a pointer.
unsafe impl Sized32 for xent_shape {
    const NAME: &'static str = "shape";
    const FIRST_SIZE: usize = 48;
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
    let checked = problem.problem()?;
    Ok((problem, checked, results?.map(|results| results.results())))
}

fn null(name: &str) -> Failure {
    Error::Null(format!("{name} is NULL")).into()
}

/// What a pointer to a required operand leads to.
///
/// # Safety
/// NULL or valid for reads.
unsafe fn required<'a, T>(operand: *const T, name: &str) -> Result<&'a T, Failure> {
    // SAFETY: the caller's promise.
    unsafe { operand.as_ref() }.ok_or_else(|| null(name))
}

/// The gradient that a call asks for, called `name` in C.
///
/// # Safety
/// Both are NULL or valid for reads.
unsafe fn request(
    grad_output: *const xent_input,
    grad_scale: f64,
    grad: *const xent_output,
    name: &str,
) -> Result<GradientRequest, Failure> {
    // SAFETY: the caller's promise.
    let (output, grad) = unsafe { (grad_output.as_ref(), required(grad, name)?) };
    Ok(GradientRequest {
        output: output.map_or(Operand::ABSENT, xent_input::operand),
        scale: grad_scale,
        gradient: grad.operand(),
    })
}

/// The loss and what else `results` asks for. Reads the logits from memory once.
///
/// problem, results: not NULL. Without targets it is an evaluation: lse, argmax, entropy.
/// Thread-safe. On failure nothing is written.
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
        let team = team(problem.pool, problem.threads);
        run::cross_entropy(&checked, Pass::Forward, &results, None, &team, None)?;
        Ok(())
    })
}

/// The gradient of the loss with respect to the logits, recomputed from lse.
///
/// problem, lse, grad_logits: not NULL. lse: double [rows, inner], packed, of a forward over the
/// same logits and options or of the caller's own making; with XENT_FLAG_LOG_PROBS it is not
/// looked at and may be NULL.
/// grad_output: the gradient of what follows, NULL = 1; any float, one element, or [rows, inner]
/// with XENT_NONE. grad_scale: finite, multiplies on top (loss scaling, 1/accumulation steps).
/// grad_logits: [rows, classes, inner], the dtype of the logits, or f32 for halves, rounded once,
/// to nearest even; any strides that keep its elements apart. It may be exactly the logits (same
/// data, dtype and strides), which are then overwritten (not with XENT_FLAG_ACCUMULATE:
/// XENT_ERR_OVERLAP). Ignored rows get 0, or stay as they are with XENT_FLAG_ACCUMULATE.
/// Thread-safe. On failure nothing is written.
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
        let grad = request(grad_output, grad_scale, grad_logits, "grad_logits");
        from_lse(Pass::Backward, problem, lse, grad)
    })
}

/// The gradient of the loss with respect to probability targets, recomputed from lse:
/// r * (1-e) * w_c * (lse - x_c), times what the reduction, grad_output and grad_scale multiply
/// with; for distillation, where targets are a model's as well. With XENT_FLAG_LOG_PROBS lse - x_c
/// is -logp_c.
///
/// As xent_backward but for grad_targets: not NULL, [rows, classes, inner], any float dtype, any
/// strides that keep its elements apart; it overlaps no other operand. A factor of 0 (r, 1-e, w_c)
/// makes 0, whatever it multiplies. The targets' values are not read. Targets that are class
/// indices have no gradient: XENT_ERR_PARAM. Thread-safe. On failure nothing is written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xent_backward_targets(
    problem: *const xent_problem,
    lse: *const f64,
    grad_output: *const xent_input,
    grad_scale: f64,
    grad_targets: *const xent_output,
) -> xent_status {
    // SAFETY: the caller's promise.
    guarded(|| unsafe {
        let grad = request(grad_output, grad_scale, grad_targets, "grad_targets");
        from_lse(Pass::Targets, problem, lse, grad)
    })
}

/// A gradient from the lse of a forward.
///
/// # Safety
/// As [`xent_backward`].
unsafe fn from_lse(
    pass: Pass,
    problem: *const xent_problem,
    lse: *const f64,
    request: Result<GradientRequest, Failure>,
) -> Result<(), Failure> {
    // SAFETY: the caller's promise.
    unsafe {
        let (problem, checked, _) = structs(problem, std::ptr::null())?;
        let results = Results { lse: Operand::packed(lse.cast_mut(), XENT_F64), ..Results::NONE };
        let team = team(problem.pool, problem.threads);
        run::cross_entropy(&checked, pass, &results, Some(&request?), &team, None)?;
    }
    Ok(())
}

/// Both in one go, reading the logits from memory once.
///
/// problem, grad_logits: not NULL; results may be. The rest as in xent_forward and xent_backward.
/// Thread-safe. On failure nothing is written.
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
        let request = request(grad_output, grad_scale, grad_logits, "grad_logits")?;
        let team = team(problem.pool, problem.threads);
        let pass = Pass::ForwardBackward;
        run::cross_entropy(&checked, pass, &results, Some(&request), &team, None)?;
        Ok(())
    })
}

/// Log-softmax over the classes: y_c = x_c - ln sum_c exp x_c.
///
/// shape, x, y: not NULL. x, y: f32, f64, bf16 or f16, both of one dtype (XENT_ERR_DTYPE), [rows,
/// classes, inner], any strides. y may be exactly x (same data and strides), and overlaps it in no
/// other way. Halves are computed with in f32 and rounded once. A row that holds NaN or +inf, or
/// nothing but -inf, becomes NaN; another -inf stays one. Thread-safe. On failure nothing is
/// written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xent_log_softmax(
    shape: *const xent_shape,
    x: *const xent_input,
    y: *const xent_output,
) -> xent_status {
    // SAFETY: the caller's promise.
    guarded(|| unsafe { softmax_family(Function::LogSoftmax, shape, x, None, y) })
}

/// The gradient through xent_log_softmax: grad_x_c = grad_y_c - exp(y_c) * sum_c grad_y_c.
///
/// shape, y, grad_y, grad_x: not NULL. y: what xent_log_softmax wrote; grad_y: the gradient with
/// respect to it. All three of one dtype, as in xent_log_softmax. grad_x may be exactly y or
/// exactly grad_y, and overlaps them in no other way. Thread-safe. On failure nothing is written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xent_log_softmax_backward(
    shape: *const xent_shape,
    y: *const xent_input,
    grad_y: *const xent_input,
    grad_x: *const xent_output,
) -> xent_status {
    // SAFETY: the caller's promise.
    guarded(|| unsafe {
        softmax_family(Function::LogSoftmaxBackward, shape, y, Some(grad_y), grad_x)
    })
}

/// Softmax over the classes: y_c = exp x_c / sum_c exp x_c.
///
/// All else as xent_log_softmax, but that -inf becomes 0.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xent_softmax(
    shape: *const xent_shape,
    x: *const xent_input,
    y: *const xent_output,
) -> xent_status {
    // SAFETY: the caller's promise.
    guarded(|| unsafe { softmax_family(Function::Softmax, shape, x, None, y) })
}

/// The gradient through xent_softmax: grad_x_c = y_c * (grad_y_c - sum_c y_c * grad_y_c).
///
/// All else as xent_log_softmax_backward; y: what xent_softmax wrote.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xent_softmax_backward(
    shape: *const xent_shape,
    y: *const xent_input,
    grad_y: *const xent_input,
    grad_x: *const xent_output,
) -> xent_status {
    // SAFETY: the caller's promise.
    guarded(|| unsafe { softmax_family(Function::SoftmaxBackward, shape, y, Some(grad_y), grad_x) })
}

/// One call of the softmax family; `grad` is None in a forward.
///
/// # Safety
/// As [`Sized32::read`] for the shape; the operands' pointers are NULL or valid for reads, and
/// the operands as `run::softmax` asks.
unsafe fn softmax_family(
    function: Function,
    shape: *const xent_shape,
    input: *const xent_input,
    grad: Option<*const xent_input>,
    output: *const xent_output,
) -> Result<(), Failure> {
    let (input_name, output_name) = if grad.is_some() { ("y", "grad_x") } else { ("x", "y") };
    // SAFETY: the caller's promise.
    unsafe {
        let caller = xent_shape::read(shape)?.ok_or_else(|| null("shape"))?;
        let sizes = caller.sizes()?;
        let input = required(input, input_name)?.operand();
        let grad = match grad {
            Some(grad) => required(grad, "grad_y")?.operand(),
            None => Operand::ABSENT,
        };
        let output = required(output, output_name)?.operand();
        let team = team(caller.pool, caller.threads);
        run::softmax(&softmax::Problem { function, sizes, input, grad, output }, &team, None)?;
    }
    Ok(())
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
