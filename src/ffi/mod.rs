//! The C interface: it reads the caller's structs, calls [`run`], and returns a status.
//!
//! build.rs generates include/xent.h from this file and shards.rs. The doc comments become the comments of the
//! header and are written for a C reader.

mod guard;
mod linear;
#[cfg(xent_c_library)]
mod reserve;
mod shards;
mod status;

use crate::codes::*;
use crate::dispatch::{self, Isa};
use crate::error::Error;
use crate::parallel::Team;
use crate::plan::{Pass, Plain, Shape};
use crate::pool::Pool;
use crate::run;
use crate::validate::cross_entropy::{GradientRequest, Problem, Results};
use crate::validate::operand::Operand;
use crate::validate::plain::{
    Settings, is_packed, is_packed_rows, logit_type, may_be_weights, target_type,
};
use crate::validate::softmax::{self, Function};
use crate::worker;
use guard::{Failure, fail, guarded, last_error};
pub use status::*;
use std::ffi::{c_char, c_void};

/// A strided operand that xent reads during the call. The memory is the caller's.
///
/// Strides count elements, in the order row, class, inner. All three zero = densely packed:
/// [rows, classes, inner] in C order, [rows, inner] for an operand without a class axis (indices,
/// row weights, row mask, row losses, entropy). xent ignores the stride of an axis of size 1, and
/// strides[1] of an operand without a class axis; neither counts for "all zero". Elements may repeat
/// (stride 0 on some axis), except that the class stride of logits is not 0 beside a row stride. data ==
/// NULL = absent; an operand without elements may have any data.
///
/// Contiguous classes have a class stride of 1: rows of 50257 classes that are 50304 apart have the
/// strides {50304, 1, 0}.
///
/// So any axis of a tensor can be the class axis. Classes first, as in a transposed matrix
/// [classes, rows]: strides {1, rows, 1}. Images [N, C, H, W]: inner = H*W, packed. The last axis
/// but one of [A, B, C, D]: rows = A*B, classes = C, inner = D, packed. The causal shift of a language
/// model, logits [B, T, V] and tokens [B, T], where position t predicts token t+1: rows = B,
/// classes = V, inner = T-1; logits and gradient have the strides {T*V, 1, V}, and the targets are
/// tokens + 1 with the strides {T, 0, 1}. The gradient of each last position stays as it is.
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

/// A strided operand that xent writes. As xent_input, but no two elements may share an address.
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

/// A thread pool that the caller owns.
#[allow(non_camel_case_types, reason = "the name in C")]
pub struct xent_pool(Pool);

/// A cross-entropy problem. Start from XENT_PROBLEM_INIT, which carries the defaults; set rows,
/// classes, logits and targets, then any options. xent reads the struct and keeps nothing of it.
///
/// N rows, C classes, K inner positions: N*K softmax distributions. Below, "row" means one of
/// them; an operand [rows, inner] has one element for each. z_c are the logits of a row as
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
/// With either, entropy_bonus = b rewards the entropy H = -sum_c p_c * logp_c: the row loss has
/// -r * b * H more, and d/dx_c has r * b * p_c * (logp_c + H) more.
///
/// The gradient with respect to z_c is d/dx_c times logit_scale, and times 1 - tanh^2 under a
/// softcap. With XENT_FLAG_LOG_PROBS, z_c = logp_c, and d/dlogp_c is minus the factor of -logp_c.
///
/// A row is ignored if its target index is ignore_index or its mask byte is 0. An ignored row has a
/// loss of 0 and a gradient of exactly 0, and its logits affect no other row. A row that is not
/// ignored is kept. A term whose factor (w_c, t'_c, 1-e, r) is 0 is 0, whatever it multiplies. A
/// kept row in which some x_c is NaN or +inf, or every x_c is -inf, has a loss and gradient of NaN,
/// unless its weight r is 0.
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
    /// f32, f64, bf16 or f16, [rows, classes, inner]; any strides. xent widens halves to f32: their
    /// loss is that of the widened logits, bit for bit.
    pub logits: xent_input,
    /// i64, i32, u32, u16 or u8: class indices [rows, inner]. f32, f64, bf16 or f16: probabilities
    /// [rows, classes, inner], whatever float type the logits have. xent does not check
    /// probabilities; they need be neither normalised nor positive. Without targets a call can ask
    /// for lse, argmax and entropy; any other result is XENT_ERR_NULL.
    pub targets: xent_input,
    /// Optional, any float [classes]; negative and zero are legal.
    pub class_weights: xent_input,
    /// Optional, any float [rows, inner].
    pub row_weights: xent_input,
    /// Optional, u8 [rows, inner]; 0 = treated as ignored, whatever the target.
    pub row_mask: xent_input,
    /// The target index of ignored rows; any value. It does not apply to probability targets.
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
    /// If > 0, the denominator of a mean's cross-entropy part, instead of the sum of r*w_y (index
    /// targets) or of r (probabilities) over kept rows: for gradient accumulation and data
    /// parallelism. Default 0.
    pub normalizer: f64,
    /// If > 0, the denominator of a mean's z-loss part and entropy bonus, instead of the sum of r over
    /// kept rows. Default 0.
    pub z_normalizer: f64,
    /// Default XENT_MEAN.
    pub reduction: xent_reduction,
    /// 0 = the whole pool; 1 = the calling thread alone; n = at most n. The number changes no bit of
    /// the result. Default 0.
    pub threads: u32,
    /// NULL, the default = rayon's global pool.
    pub pool: *const xent_pool,
    /// Sparse targets: i64, i32, u32, u16 or u8, [rows, target_count, inner]; strides: row, place, inner. The
    /// targets are then the probabilities of these classes, floats of the same shape. The probability of
    /// a class that is not listed is 0; those of a class that is listed twice add up. A place that holds
    /// ignore_index is unused; any other index outside [0, classes) is XENT_ERR_TARGET. Default absent.
    pub target_classes: xent_input,
    /// Places in each row's list, at least 1 with target_classes and 0 without; default 0.
    pub target_count: usize,
    /// If > 0, the targets are a teacher's logits, and t = softmax(target_scale * targets), over all classes or
    /// over those listed. xent forms t as it goes and keeps 16 bytes a row (XENT_ERR_MEMORY). A row of
    /// the teacher with NaN or +inf, or of nothing but -inf, makes the loss and the gradient of its row
    /// NaN. No gradient goes to the teacher. Finite and >= 0; default 0: the targets are probabilities.
    pub target_scale: f64,
    /// Weight b of the entropy H = -sum p_c * logp_c, which is subtracted: finite, of either sign.
    /// Default 0 = off.
    pub entropy_bonus: f64,
}

/// The results of a forward. A member that is NULL or absent, the default, is not computed. One pass
/// over the logits computes all of them. The memory is the caller's. Without targets a call can ask
/// for lse, argmax, entropy, top_classes and top_log_probs.
#[repr(C)]
#[derive(Clone, Copy)]
#[allow(non_camel_case_types, reason = "the name in C")]
pub struct xent_results {
    /// Set by XENT_RESULTS_INIT; lets the struct grow.
    pub struct_size: u32,
    /// The reduced loss, z-loss and entropy bonus included; must be NULL with XENT_NONE.
    pub loss: *mut f64,
    /// f32 or f64 [rows, inner], z-loss and entropy bonus included; 0 where ignored. Never divided by
    /// anything.
    pub row_losses: xent_output,
    /// [rows, inner], packed: the log-sum-exp of the scaled and capped logits, of ignored rows
    /// too. NULL with XENT_FLAG_LOG_PROBS.
    pub lse: *mut f64,
    /// The z-loss part of *loss, 0 if z-loss is off. NULL with XENT_NONE and XENT_FLAG_LOG_PROBS.
    pub z_loss: *mut f64,
    /// The denominator of XENT_MEAN's cross-entropy part, whatever the reduction.
    pub normalizer: *mut f64,
    /// The denominator of XENT_MEAN's z-loss part and entropy bonus, whatever the reduction, these on or
    /// off.
    pub z_normalizer: *mut f64,
    /// The number of rows that are not ignored.
    pub kept_rows: *mut u64,
    /// [rows, inner], packed: the predicted class, of ignored rows too. It is the lowest index of a
    /// NaN among the logits as stored, else of their maximum (0 if all are -inf).
    pub argmax: *mut i64,
    /// The number of kept rows whose argmax is the target index. NULL with probability targets.
    pub correct: *mut u64,
    /// f32 or f64 [rows, inner]: -sum_c p_c * logp_c, of ignored rows too. Absent with
    /// XENT_FLAG_LOG_PROBS.
    pub entropy: xent_output,
    /// f32 or f64 [rows, inner]: the divergence sum_c t'_c * (ln t'_c - logp_c), without weights; 0 where
    /// ignored, NaN where a t'_c is negative. Absent with class indices.
    pub kl: xent_output,
    /// The part -entropy_bonus * H of *loss, 0 if there is none. NULL with XENT_NONE and
    /// XENT_FLAG_LOG_PROBS.
    pub entropy_bonus: *mut f64,
    /// [rows, top_count, inner], packed: the classes of the largest logits as stored, the largest
    /// first, of ignored rows too. Of equal logits the lower class comes first; a NaN comes before
    /// every number. XENT_ERR_PARAM with top_count = 0.
    pub top_classes: *mut i64,
    /// f32 or f64 [rows, top_count, inner]: logp_c of the same classes, x_c - lse of the scaled and
    /// capped logits; with XENT_FLAG_LOG_PROBS the log-probabilities as they are stored.
    /// XENT_ERR_PARAM with top_count = 0.
    pub top_log_probs: xent_output,
    /// The number of classes listed for each row, at most 64 and at most classes. Default 0.
    pub top_count: usize,
    /// [rows, inner], packed: the place of the target among all logits as stored, in the order of
    /// top_classes, from 0 on; -1 for ignored rows. XENT_ERR_PARAM with probability targets.
    pub target_ranks: *mut i64,
}

/// The shape of a call of softmax or log-softmax. Start from XENT_SHAPE_INIT; set rows and classes.
///
/// Operands are [rows, classes, inner]. Softmax runs over the classes; with strides, any axis of any
/// tensor can be the class axis.
#[repr(C)]
#[derive(Clone, Copy)]
#[allow(non_camel_case_types, reason = "the name in C")]
pub struct xent_shape {
    /// Set by XENT_SHAPE_INIT; lets the struct grow.
    pub struct_size: u32,
    /// 0; any other value is XENT_ERR_STRUCT.
    pub flags: u32,
    /// N
    pub rows: usize,
    /// C
    pub classes: usize,
    /// K; default 1.
    pub inner: usize,
    /// 0 = the whole pool; 1 = the calling thread alone; n = at most n. The number changes no bit of
    /// the result. Default 0.
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
            target_classes: self.target_classes.operand(),
            target_count: self.target_count,
            target_scale: self.target_scale,
            entropy_bonus: self.entropy_bonus,
        })
    }
}

impl xent_shape {
    fn shape(&self) -> Result<Shape, Failure> {
        check_flags("shape", self.flags, 0)?;
        let xent_shape { rows, classes, inner, .. } = *self;
        Ok(Shape { rows, classes, inner })
    }
}

/// The flags that a problem may have.
const FLAGS: u32 =
    XENT_FLAG_LOG_PROBS | XENT_FLAG_EMPTY_IS_ZERO | XENT_FLAG_ACCUMULATE | XENT_FLAG_ZERO_PADDING;

/// Refuses flags that this version does not know.
fn check_flags(name: &str, flags: u32, known: u32) -> Result<(), Failure> {
    match flags & !known {
        0 => Ok(()),
        unknown => Err(Error::Struct(format!("{name}.flags has unknown bits {unknown:#x}")).into()),
    }
}

/// The threads that a call may use.
///
/// # Safety
/// `pool` is NULL or a pool that lives for `'a`.
unsafe fn team<'a>(pool: *const xent_pool, threads: u32) -> Team<'a> {
    Team {
        // SAFETY: `pool` is NULL or a live pool (# Safety).
        pool: unsafe { pool.as_ref() }.and_then(|pool| pool.0.rayon()),
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
            kl: self.kl.operand(),
            entropy_bonus: self.entropy_bonus,
            top_classes: Operand::packed(self.top_classes, XENT_I64),
            top_log_probs: self.top_log_probs.operand(),
            top_count: self.top_count,
            target_ranks: Operand::packed(self.target_ranks, XENT_I64),
        }
    }
}

/// A struct whose first member is its size in bytes, as the caller's header knew it.
///
/// # Safety
/// The type is plain data for which zero bytes are a value. Its first member is `struct_size`, a
/// u32. [`Self::FIRST_SIZE`] is its size in the first release.
unsafe trait Sized32: Copy {
    const NAME: &'static str;
    const FIRST_SIZE: usize;

    /// A copy of the caller's struct; `None` for NULL. Members that the caller's header did not know
    /// are 0, their default.
    ///
    /// # Safety
    /// `from` is NULL or valid for reads of as many bytes as its `struct_size` says, and of 4.
    unsafe fn read(from: *const Self) -> Result<Option<Self>, Failure> {
        if from.is_null() {
            return Ok(None);
        }
        // SAFETY: `from` is not NULL, so its first four bytes are readable (# Safety).
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
            // SAFETY: `at < size`, and `size` bytes are readable (# Safety).
            if unsafe { *from.cast::<u8>().add(at) } != 0 {
                return Err(Error::Struct(format!(
                    "{}.struct_size = {size} exceeds this version's {own}, and byte {at} is not 0",
                    Self::NAME
                ))
                .into());
            }
        }
        // SAFETY: zero bytes are a value of the type (# Safety of the trait). The copy is no longer
        // than the caller's struct, of which `size` bytes are readable, nor than `copy`.
        unsafe {
            let mut copy = std::mem::zeroed::<Self>();
            let to = (&raw mut copy).cast::<u8>();
            to.copy_from_nonoverlapping(from.cast(), size.min(own));
            Ok(Some(copy))
        }
    }
}

// SAFETY: the struct is repr(C) and begins with `struct_size: u32`. It consists of numbers and pointers,
// which may be 0. The first release had this size.
unsafe impl Sized32 for xent_problem {
    const NAME: &'static str = "problem";
    const FIRST_SIZE: usize = 304;
}

// SAFETY: the struct is repr(C) and begins with `struct_size: u32`. It consists of numbers and pointers,
// which may be 0. The first release had this size.
unsafe impl Sized32 for xent_results {
    const NAME: &'static str = "results";
    const FIRST_SIZE: usize = 152;
}

// SAFETY: the struct is repr(C) and begins with `struct_size: u32`. It consists of numbers and a pointer,
// which may be 0. The first release had this size.
unsafe impl Sized32 for xent_shape {
    const NAME: &'static str = "shape";
    const FIRST_SIZE: usize = 48;
}

/// Reads the structs of a call. The faults of a struct are reported before pointers that are NULL,
/// except for that of the problem itself.
///
/// # Safety
/// Both pointers are as [`Sized32::read`] asks; the pool of the problem is NULL, or lives for `'a`.
unsafe fn structs<'a>(
    problem: *const xent_problem,
    results: *const xent_results,
) -> Result<(Team<'a>, Problem, Option<Results>), Failure> {
    // SAFETY: both pointers are as `read` asks (# Safety).
    let (problem, results) = unsafe { (xent_problem::read(problem)?, xent_results::read(results)) };
    let problem = problem.ok_or_else(|| null("problem"))?;
    let checked = problem.problem()?;
    // SAFETY: the pool is NULL, or lives for `'a` (# Safety).
    let team = unsafe { team(problem.pool, problem.threads) };
    Ok((team, checked, results?.map(|results| results.results())))
}

/// [`structs`] into places of the caller, whose frame, below which all work is done, then has each of them once. Returns
/// whether there are results.
///
/// # Safety
/// As [`structs`].
#[inline(never)]
unsafe fn read_structs<'a>(
    problem: *const xent_problem,
    results: *const xent_results,
    to: &mut (Problem, Results),
) -> Result<(Team<'a>, bool), Failure> {
    // SAFETY: this function's own # Safety.
    let (team, checked, results) = unsafe { structs(problem, results)? };
    to.0 = checked;
    let has_results = results.is_some();
    to.1 = results.unwrap_or(Results::NONE);
    Ok((team, has_results))
}

fn null(name: &str) -> Failure {
    Error::Null(format!("{name} is NULL")).into()
}

/// The operand behind a pointer that must not be NULL.
///
/// # Safety
/// `operand` is NULL, or valid for reads for `'a`.
unsafe fn required<'a, T>(operand: *const T, name: &str) -> Result<&'a T, Failure> {
    // SAFETY: `operand` is NULL or valid for reads (# Safety).
    unsafe { operand.as_ref() }.ok_or_else(|| null(name))
}

/// The gradient that a call asks for, called `name` in C.
///
/// # Safety
/// Both pointers are NULL or valid for reads.
unsafe fn request(
    grad_output: *const xent_input,
    grad_scale: f64,
    grad: *const xent_output,
    name: &str,
) -> Result<GradientRequest, Failure> {
    // SAFETY: both pointers are NULL or valid for reads (# Safety).
    let (output, grad) = unsafe { (grad_output.as_ref(), required(grad, name)?) };
    Ok(GradientRequest {
        output: output.map_or(Operand::ABSENT, xent_input::operand),
        scale: grad_scale,
        gradient: grad.operand(),
    })
}

/// The plain call that a caller's structs are, if they are those of one; they are read where they are.
///
/// # Safety
/// The pointers are NULL or valid for reads, and the structs are as [`structs`] asks.
#[inline(always)]
unsafe fn plain(
    problem: *const xent_problem,
    results: *const xent_results,
    gradient: Option<(*const xent_input, f64, *const xent_output)>,
) -> Option<Plain> {
    let knows_all = |size: u32, own: usize| size as usize == own;
    // SAFETY: the pointers are NULL or valid for reads (# Safety). A struct of another version, which may be
    // shorter, is not read beyond its size.
    let (problem, results) = unsafe {
        if problem.is_null()
            || results.is_null()
            || !problem.is_aligned()
            || !results.is_aligned()
            || !knows_all(problem.cast::<u32>().read(), size_of::<xent_problem>())
            || !knows_all(results.cast::<u32>().read(), size_of::<xent_results>())
        {
            return None;
        }
        (&*problem, &*results)
    };
    // All of them are named: an option to come does not compile until this function knows it.
    let xent_problem {
        struct_size: _,
        flags,
        rows,
        classes,
        inner,
        logits,
        targets,
        class_weights,
        row_weights,
        row_mask,
        ignore_index,
        label_smoothing,
        z_loss,
        softcap,
        logit_scale,
        normalizer,
        z_normalizer,
        reduction,
        threads: _,
        pool: _,
        target_classes,
        target_count,
        target_scale,
        entropy_bonus,
    } = *problem;
    let xent_results {
        struct_size: _,
        loss,
        row_losses,
        lse,
        z_loss: z_part,
        normalizer: n,
        z_normalizer: z,
        kept_rows,
        argmax,
        correct,
        entropy,
        kl,
        entropy_bonus: bonus_part,
        top_classes,
        top_log_probs,
        top_count,
        target_ranks,
    } = *results;
    let (dtype, target_type) = (logit_type(logits.dtype)?, target_type(targets.dtype)?);
    let normalizers = [normalizer, z_normalizer];
    let settings = Settings {
        flags,
        inner,
        label_smoothing,
        z_loss,
        softcap,
        logit_scale,
        normalizers,
        reduction,
        target_count,
        target_scale,
        entropy_bonus,
    };
    let is_plain = settings.are_plain()
        & may_be_weights(class_weights.data.cast(), class_weights.dtype, &class_weights.strides)
        & row_weights.data.is_null()
        & row_mask.data.is_null()
        & row_losses.data.is_null()
        & entropy.data.is_null()
        & kl.data.is_null()
        & target_classes.data.is_null()
        & lse.is_null()
        & z_part.is_null()
        & bonus_part.is_null()
        & n.is_null()
        & z.is_null()
        & kept_rows.is_null()
        & argmax.is_null()
        & correct.is_null()
        & top_classes.is_null()
        & top_log_probs.data.is_null()
        & (top_count == 0)
        & target_ranks.is_null()
        & is_packed(&logits.strides, classes)
        & is_packed_rows(&targets.strides);
    if !is_plain {
        return None;
    }
    let (mut to, mut scale) = (std::ptr::null_mut(), 1.0);
    if let Some((grad_output, grad_scale, grad)) = gradient {
        // SAFETY: the pointer is NULL or valid for reads (# Safety).
        let grad = unsafe { grad.as_ref() }?;
        if !grad_output.is_null()
            || grad.data.is_null()
            || grad.dtype != logits.dtype
            || !is_packed(&grad.strides, classes)
        {
            return None;
        }
        (to, scale) = (grad.data.cast(), grad_scale);
    }
    Some(Plain {
        rows,
        classes,
        dtype,
        logits: logits.data.cast(),
        targets: targets.data.cast(),
        target_type,
        ignore_index,
        class_weights: class_weights.data.cast(),
        label_smoothing,
        is_mean: reduction == XENT_MEAN,
        loss,
        gradient: to,
        scale,
    })
}

/// Computes the loss and the other results that `results` asks for. Reads the logits from memory
/// once.
///
/// problem, results: not NULL. Without targets the call can compute lse, argmax, entropy,
/// top_classes and top_log_probs.
/// Thread-safe. A call that fails writes nothing.
///
/// Every operand that is present covers the problem's shape. During the call no other thread writes
/// an input or touches an output.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xent_forward(
    problem: *const xent_problem,
    results: *const xent_results,
) -> xent_status {
    // SAFETY: the pointers are NULL or valid, and the operands cover their shapes: the header asks
    // the caller for that.
    guarded(|| unsafe {
        if let Some(call) = plain(problem, results, None)
            && run::plain(&call, None)
        {
            return Ok(());
        }
        let mut call = (Problem::INIT, Results::NONE);
        let (team, has_results) = read_structs(problem, results, &mut call)?;
        if !has_results {
            return Err(null("results"));
        }
        run::cross_entropy(&call.0, Pass::Forward, &call.1, None, &team, None)?;
        Ok(())
    })
}

/// Computes the gradient of the loss with respect to the logits, from lse.
///
/// problem, lse, grad_logits: not NULL. lse: double [rows, inner], packed, from a forward over the
/// same logits and options or from elsewhere; with XENT_FLAG_LOG_PROBS xent ignores it, and it may be
/// NULL.
/// grad_output: the gradient of what follows the loss, NULL = 1; any float, one element, or [rows,
/// inner] with XENT_NONE. grad_scale: a further factor, finite (loss scaling, 1/accumulation steps).
/// grad_logits: [rows, classes, inner], the dtype of the logits, or f32 for halves, rounded once,
/// to nearest even; any strides that keep its elements apart. It may be exactly the logits (same
/// data, dtype and strides), which the gradient then overwrites (with XENT_FLAG_ACCUMULATE that is
/// XENT_ERR_OVERLAP). Ignored rows get 0, or stay as they are with XENT_FLAG_ACCUMULATE. xent writes
/// between rows only with XENT_FLAG_ZERO_PADDING.
/// Thread-safe. A call that fails writes nothing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xent_backward(
    problem: *const xent_problem,
    lse: *const f64,
    grad_output: *const xent_input,
    grad_scale: f64,
    grad_logits: *const xent_output,
) -> xent_status {
    // SAFETY: the pointers are NULL or valid, and the operands cover their shapes: the header asks
    // the caller for that.
    guarded(|| unsafe {
        let grad = request(grad_output, grad_scale, grad_logits, "grad_logits");
        from_lse(Pass::Backward, problem, lse, grad)
    })
}

/// Computes the gradient of the loss with respect to probability targets, from lse: r * (1-e) * w_c *
/// (lse - x_c), times the factors of the reduction, grad_output and grad_scale. For distillation,
/// where a model computes the targets too. With XENT_FLAG_LOG_PROBS, -logp_c takes the place of
/// lse - x_c.
///
/// As xent_backward, except for grad_targets: not NULL, [rows, classes, inner], any float dtype, any
/// strides that keep its elements apart; it overlaps no other operand. A factor of 0 (r, 1-e, w_c)
/// makes 0, whatever it multiplies. xent does not read the values of the targets. Class indices have
/// no gradient: XENT_ERR_PARAM. Thread-safe. A call that fails writes nothing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xent_backward_targets(
    problem: *const xent_problem,
    lse: *const f64,
    grad_output: *const xent_input,
    grad_scale: f64,
    grad_targets: *const xent_output,
) -> xent_status {
    // SAFETY: the pointers are NULL or valid, and the operands cover their shapes: the header asks
    // the caller for that.
    guarded(|| unsafe {
        let grad = request(grad_output, grad_scale, grad_targets, "grad_targets");
        from_lse(Pass::TargetGradient, problem, lse, grad)
    })
}

/// Computes a gradient from the lse of a forward.
///
/// # Safety
/// `problem` is as [`structs`] asks; the operands are as [`run::cross_entropy`] asks.
unsafe fn from_lse(
    pass: Pass,
    problem: *const xent_problem,
    lse: *const f64,
    request: Result<GradientRequest, Failure>,
) -> Result<(), Failure> {
    // SAFETY: the pointers and the operands are as the two functions ask (# Safety).
    unsafe {
        let mut call = (Problem::INIT, Results::NONE);
        let (team, _) = read_structs(problem, std::ptr::null(), &mut call)?;
        call.1.lse = Operand::packed(lse.cast_mut(), XENT_F64);
        run::cross_entropy(&call.0, pass, &call.1, Some(&request?), &team, None)?;
    }
    Ok(())
}

/// Computes the loss, the other results and the gradient together. Reads the logits from memory once.
///
/// problem, grad_logits: not NULL; results may be NULL. Otherwise as xent_forward and xent_backward.
/// Thread-safe. A call that fails writes nothing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xent_forward_backward(
    problem: *const xent_problem,
    grad_output: *const xent_input,
    grad_scale: f64,
    results: *const xent_results,
    grad_logits: *const xent_output,
) -> xent_status {
    // SAFETY: the pointers are NULL or valid, and the operands cover their shapes: the header asks
    // the caller for that.
    guarded(|| unsafe {
        if let Some(call) = plain(problem, results, Some((grad_output, grad_scale, grad_logits)))
            && run::plain(&call, None)
        {
            return Ok(());
        }
        let mut call = (Problem::INIT, Results::NONE);
        let (team, _) = read_structs(problem, results, &mut call)?;
        let request = request(grad_output, grad_scale, grad_logits, "grad_logits")?;
        let pass = Pass::ForwardBackward;
        run::cross_entropy(&call.0, pass, &call.1, Some(&request), &team, None)?;
        Ok(())
    })
}

/// Log-softmax over the classes: y_c = x_c - ln sum_c exp x_c.
///
/// shape, xs, ys: not NULL. xs is x, and ys is y: f32, f64, bf16 or f16, both of one dtype
/// (XENT_ERR_DTYPE), [rows, classes, inner], any strides. y may be exactly x (same data and strides),
/// and overlaps it in no other way. xent widens halves to f32 and rounds the result once. A row that
/// holds NaN or +inf, or nothing but -inf, becomes NaN; any other -inf stays -inf. Thread-safe. A call
/// that fails writes nothing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xent_log_softmax(
    shape: *const xent_shape,
    xs: *const xent_input,
    ys: *const xent_output,
) -> xent_status {
    // SAFETY: the pointers are NULL or valid, and the operands cover their shapes: the header asks
    // the caller for that.
    guarded(|| unsafe { softmax_call(Function::LogSoftmax, shape, xs, None, ys) })
}

/// The gradient through xent_log_softmax: grad_x_c = grad_y_c - exp(y_c) * sum_c grad_y_c.
///
/// shape, ys, grad_y, grad_x: not NULL. ys is y, the output of xent_log_softmax; grad_y: the gradient
/// with respect to it. All three of one dtype, as in xent_log_softmax. grad_x may be exactly y or
/// exactly grad_y, and overlaps them in no other way. Thread-safe. A call that fails writes nothing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xent_log_softmax_backward(
    shape: *const xent_shape,
    ys: *const xent_input,
    grad_y: *const xent_input,
    grad_x: *const xent_output,
) -> xent_status {
    // SAFETY: the pointers are NULL or valid, and the operands cover their shapes: the header asks
    // the caller for that.
    guarded(|| unsafe {
        softmax_call(Function::LogSoftmaxBackward, shape, ys, Some(grad_y), grad_x)
    })
}

/// Softmax over the classes: y_c = exp x_c / sum_c exp x_c.
///
/// Otherwise as xent_log_softmax, except that -inf becomes 0.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xent_softmax(
    shape: *const xent_shape,
    xs: *const xent_input,
    ys: *const xent_output,
) -> xent_status {
    // SAFETY: the pointers are NULL or valid, and the operands cover their shapes: the header asks
    // the caller for that.
    guarded(|| unsafe { softmax_call(Function::Softmax, shape, xs, None, ys) })
}

/// The gradient through xent_softmax: grad_x_c = y_c * (grad_y_c - sum_c y_c * grad_y_c).
///
/// Otherwise as xent_log_softmax_backward; ys is the output of xent_softmax.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xent_softmax_backward(
    shape: *const xent_shape,
    ys: *const xent_input,
    grad_y: *const xent_input,
    grad_x: *const xent_output,
) -> xent_status {
    // SAFETY: the pointers are NULL or valid, and the operands cover their shapes: the header asks
    // the caller for that.
    guarded(|| unsafe { softmax_call(Function::SoftmaxBackward, shape, ys, Some(grad_y), grad_x) })
}

/// Makes a call of softmax or log-softmax; `grad` is `None` in a forward.
///
/// # Safety
/// `shape` is as [`Sized32::read`] asks. The pointers to operands are NULL or valid for reads, and
/// the operands are as [`run::softmax`] asks.
unsafe fn softmax_call(
    function: Function,
    shape: *const xent_shape,
    input: *const xent_input,
    grad: Option<*const xent_input>,
    output: *const xent_output,
) -> Result<(), Failure> {
    let (input_name, output_name) = if grad.is_some() { ("y", "grad_x") } else { ("x", "y") };
    // SAFETY: the pointers and the operands are as the functions ask (# Safety).
    unsafe {
        let caller = xent_shape::read(shape)?.ok_or_else(|| null("shape"))?;
        let shape = caller.shape()?;
        let input = required(input, input_name)?.operand();
        let grad = match grad {
            Some(grad) => required(grad, "grad_y")?.operand(),
            None => Operand::ABSENT,
        };
        let output = required(output, output_name)?.operand();
        let team = team(caller.pool, caller.threads);
        run::softmax(&softmax::Problem { function, shape, input, grad, output }, &team, None)?;
    }
    Ok(())
}

/// The name of a status: "XENT_ERR_TARGET" for XENT_ERR_TARGET; "XENT_ERR_UNKNOWN" for a number that
/// is no status. Static; never NULL.
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
        XENT_ERR_MEMORY => c"XENT_ERR_MEMORY",
        _ => c"XENT_ERR_UNKNOWN",
    };
    name.as_ptr()
}

/// The message of this thread's last failure, e.g. "targets[17] = 50257 is outside [0, 50257)"; ""
/// if there was none. As with errno, a success does not change it. Valid until this thread's next
/// failure; never NULL.
#[unsafe(no_mangle)]
pub extern "C" fn xent_last_error() -> *const c_char {
    last_error()
}

/// Starts a pool of `threads` threads; 0 = one for each core. NULL on failure; see xent_last_error.
/// The caller owns the pool and ends it with xent_pool_free.
///
/// The threads block signals, save those that an instruction raises on its own thread. In a call they
/// take over the calling thread's rounding mode and flushing of subnormals. A call that finds no
/// memory to give threads work does the work on the calling thread alone. So does every call in a
/// process that was forked off one that used threads; a pool that it makes has none.
#[unsafe(no_mangle)]
pub extern "C" fn xent_pool_new(threads: u32) -> *mut xent_pool {
    let mut made = std::ptr::null_mut();
    guarded(|| {
        let pool = Pool::new(threads as usize)
            .map_err(|error| Failure { status: XENT_ERR_MEMORY, message: error.to_string() })?;
        made = Box::into_raw(Box::new(xent_pool(pool)));
        Ok(())
    });
    made
}

/// Ends a pool of xent_pool_new. Its threads have ended when the call returns, so that a plugin which
/// contains xent, and whose calls all named a pool or threads = 1, can be unloaded. No call may be
/// running on the pool, and no pool may be freed twice. NULL is a no-op.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xent_pool_free(pool: *mut xent_pool) {
    if !pool.is_null() {
        guarded(|| {
            // SAFETY: `Box::into_raw` in xent_pool_new made the pointer, and the caller frees it
            // once (the header asks for that).
            drop(unsafe { Box::from_raw(pool) });
            Ok(())
        });
    }
}

/// The most stack that a call takes, in bytes: on the calling thread, and on each thread of a pool. At most
/// 48 KiB, whatever the sizes, dtypes, strides and options are. For threads with little stack, as
/// coroutines and musl's threads are.
#[unsafe(no_mangle)]
pub extern "C" fn xent_stack_bytes() -> usize {
    worker::stack_bytes()
}

/// The instruction set in use: "avx512", "avx2", "neon" or "portable". A non-empty environment
/// variable XENT_ISA lowers the choice. If it names no set that this processor has, every call fails
/// with XENT_ERR_PARAM, and this function returns "none". Static; never NULL.
#[unsafe(no_mangle)]
pub extern "C" fn xent_isa() -> *const c_char {
    let name = match dispatch::selected() {
        Ok(Isa::Avx512) => c"avx512",
        Ok(Isa::Avx2) => c"avx2",
        // On AArch64 the portable kernels compile to NEON.
        Ok(Isa::Portable) if Isa::Portable.name() == "neon" => c"neon",
        Ok(Isa::Portable) => c"portable",
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
