//! The C interface of linear layers whose logits are never stored. build.rs generates a part of include/xent.h from
//! this file.

use super::guard::{Failure, guarded};
use super::shards::{place, xent_partial};
use super::{
    Sized32, check_flags, null, read_structs, xent_input, xent_output, xent_problem, xent_results,
    xent_status,
};
use crate::codes::*;
use crate::parallel::Team;
use crate::plan::Pass;
use crate::run;
use crate::validate::cross_entropy::{Problem, Results};
use crate::validate::linear::{Layer, Request};
use crate::validate::operand::Operand;

/// A linear layer that makes the logits of a problem: logits = hidden * weight^T + bias. xent makes them block by
/// block and never stores them. Start from XENT_LINEAR_INIT; set features, hidden and weight.
///
/// The problem beside it has no logits and an inner of 1 (else XENT_ERR_SHAPE). It may have every kind of targets,
/// or none for an evaluation, and every option; logit_scale and softcap apply to the product. Its flags LOG_PROBS,
/// ACCUMULATE and ZERO_PADDING are XENT_ERR_PARAM.
///
/// An element of a product is a sum of chains of 256 fused multiply-adds in f32 (f64 for f64 operands), in the
/// order of the features, classes or rows. So its bits do not depend on threads, nor on whether the
/// processor has AVX2 or AVX-512.
#[repr(C)]
#[derive(Clone, Copy)]
#[allow(non_camel_case_types, reason = "the name in C")]
pub struct xent_linear {
    /// Set by XENT_LINEAR_INIT; lets the struct grow.
    pub struct_size: u32,
    /// XENT_LINEAR_ACCUMULATE_* or'ed; default 0. Forward and gradients that are absent ignore them.
    pub flags: u32,
    /// D
    pub features: usize,
    /// f32, f64, bf16 or f16, [rows, features]; strides: row, feature. The feature stride must be 1
    /// (XENT_ERR_STRIDE); all zero = packed. xent does not look at the third.
    pub hidden: xent_input,
    /// [classes, features], of the dtype of hidden (else XENT_ERR_DTYPE); strides: class, feature, as for hidden.
    pub weight: xent_input,
    /// Optional, any float [classes].
    pub bias: xent_input,
    /// Bytes that the call may allocate. 0, the default: as few as run near full speed, for f32 at most 2 MiB a
    /// thread, and features KiB a thread more where a gradient of 16 bits needs sums in f32, beside 150 bytes a row.
    /// With less memory than all threads need, fewer work; less than one needs is XENT_ERR_PARAM, whose message
    /// names the least. With enough beside that for the logits of 64 rows or more, up to 256 at a time, a call that
    /// would make them again, for the gradient of the weight for example, keeps them: three matrix products in place
    /// of four. Where grads.weight has 16 bits, it then needs 4 bytes for each of its elements too.
    pub workspace: usize,
}

/// Where the gradients of a linear layer go. Start from XENT_LINEAR_GRADS_INIT. One that is absent is not computed,
/// nor is its product. Gradients overlap no operand and no other gradient.
#[repr(C)]
#[derive(Clone, Copy)]
#[allow(non_camel_case_types, reason = "the name in C")]
pub struct xent_linear_grads {
    /// Set by XENT_LINEAR_GRADS_INIT; lets the struct grow.
    pub struct_size: u32,
    /// [rows, features]: the dtype of hidden, or f32, rounded once; strides: row, feature (1). Ignored rows get 0,
    /// or stay as they are with XENT_LINEAR_ACCUMULATE_HIDDEN.
    pub hidden: xent_output,
    /// [classes, features]: the dtype of weight, or f32; strides: class, feature (1).
    pub weight: xent_output,
    /// [classes], any float.
    pub bias: xent_output,
}

// SAFETY: the struct is repr(C) and begins with `struct_size: u32`. It consists of numbers and pointers,
// which may be 0. The first release had this size.
unsafe impl Sized32 for xent_linear {
    const NAME: &'static str = "linear";
    const FIRST_SIZE: usize = 144;
}

// SAFETY: the struct is repr(C) and begins with `struct_size: u32`. It consists of numbers and pointers,
// which may be 0. The first release had this size.
unsafe impl Sized32 for xent_linear_grads {
    const NAME: &'static str = "linear_grads";
    const FIRST_SIZE: usize = 128;
}

impl xent_linear {
    fn layer(&self) -> Result<Layer, Failure> {
        let known = XENT_LINEAR_ACCUMULATE_HIDDEN
            | XENT_LINEAR_ACCUMULATE_WEIGHT
            | XENT_LINEAR_ACCUMULATE_BIAS;
        check_flags("linear", self.flags, known)?;
        Ok(Layer {
            flags: self.flags,
            features: self.features,
            hidden: self.hidden.operand(),
            weight: self.weight.operand(),
            bias: self.bias.operand(),
            workspace: self.workspace,
        })
    }
}

/// The structs of a linear call, checked as far as each tells by itself.
struct Call {
    structs: (Problem, Results),
    layer: Layer,
    grads: Option<xent_linear_grads>,
}

impl Call {
    const INIT: Call =
        Call { structs: (Problem::INIT, Results::NONE), layer: Layer::INIT, grads: None };
}

/// Reads the structs of a call into places of the caller, as [`read_structs`] does. The faults of a struct are reported
/// before pointers that are NULL.
///
/// # Safety
/// The pointers, and the pool, are as [`structs`] asks.
#[inline(never)]
unsafe fn read<'a>(
    problem: *const xent_problem,
    linear: *const xent_linear,
    results: *const xent_results,
    grads: *const xent_linear_grads,
    to: &mut Call,
) -> Result<(Team<'a>, bool), Failure> {
    // SAFETY: the pointers and the pool are as `structs` asks (# Safety).
    let (read, linear, grads) = unsafe {
        let read = read_structs(problem, results, &mut to.structs)?;
        (read, xent_linear::read(linear), xent_linear_grads::read(grads))
    };
    let (linear, grads) = (linear?, grads?);
    to.layer = linear.ok_or_else(|| null("linear"))?.layer()?;
    to.grads = grads;
    Ok(read)
}

/// The gradients that a call asks for.
///
/// # Safety
/// `grad_output` is NULL or valid for reads.
unsafe fn request(
    grad_output: *const xent_input,
    grad_scale: f64,
    grads: &Option<xent_linear_grads>,
) -> Result<Request, Failure> {
    // SAFETY: `grad_output` is NULL or valid for reads (# Safety).
    let output = unsafe { grad_output.as_ref() };
    let grads = grads.as_ref().ok_or_else(|| null("grads"))?;
    Ok(Request {
        output: output.map_or(Operand::ABSENT, xent_input::operand),
        scale: grad_scale,
        hidden: grads.hidden.operand(),
        weight: grads.weight.operand(),
        bias: grads.bias.operand(),
    })
}

/// Computes the loss of a linear layer's logits, and the other results that `results` asks for.
///
/// problem, linear, results: not NULL. Ignored rows cost no arithmetic, unless lse, argmax, entropy, top_classes or
/// top_log_probs are asked for, which are results of all rows. Thread-safe. A call that fails writes nothing;
/// XENT_ERR_MEMORY: the working memory could not be had.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xent_linear_forward(
    problem: *const xent_problem,
    linear: *const xent_linear,
    results: *const xent_results,
) -> xent_status {
    // SAFETY: the pointers are NULL or valid, and the operands cover their shapes: the header asks
    // the caller for that.
    guarded(|| unsafe {
        let mut call = Call::INIT;
        let (team, has_results) = read(problem, linear, results, std::ptr::null(), &mut call)?;
        if !has_results {
            return Err(null("results"));
        }
        let Call { structs: (problem, results), layer, .. } = &call;
        run::linear(problem, layer, Pass::Forward, results, None, &team, None)?;
        Ok(())
    })
}

/// Computes the gradients of a linear layer from the f64 lse of a forward: for losses whose factors depend on the
/// row losses, such as those of reinforcement learning.
///
/// problem, linear, lse, grads: not NULL. lse: [rows], packed. grad_output, grad_scale: as in xent_backward.
/// Otherwise as xent_linear_forward_backward.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xent_linear_backward(
    problem: *const xent_problem,
    linear: *const xent_linear,
    lse: *const f64,
    grad_output: *const xent_input,
    grad_scale: f64,
    grads: *const xent_linear_grads,
) -> xent_status {
    // SAFETY: the pointers are NULL or valid, and the operands cover their shapes: the header asks
    // the caller for that.
    guarded(|| unsafe {
        let mut call = Call::INIT;
        let (team, _) = read(problem, linear, std::ptr::null(), grads, &mut call)?;
        call.structs.1.lse = Operand::packed(lse.cast_mut(), XENT_F64);
        let request = request(grad_output, grad_scale, &call.grads)?;
        let Call { structs: (problem, results), layer, .. } = &call;
        run::linear(problem, layer, Pass::Backward, results, Some(&request), &team, None)?;
        Ok(())
    })
}

/// Computes the loss, the other results and the gradients of a linear layer together.
///
/// problem, linear, grads: not NULL; results may be NULL. grad_output: the gradient of what follows the loss, NULL =
/// 1; any float, one element, or [rows] with XENT_NONE. grad_scale: a further factor, finite. Ignored rows cost no
/// arithmetic, as in xent_linear_forward, and what their hidden states hold affects no gradient. Thread-safe. A
/// call that fails writes nothing; XENT_ERR_MEMORY: the working memory could not be had.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xent_linear_forward_backward(
    problem: *const xent_problem,
    linear: *const xent_linear,
    grad_output: *const xent_input,
    grad_scale: f64,
    results: *const xent_results,
    grads: *const xent_linear_grads,
) -> xent_status {
    // SAFETY: the pointers are NULL or valid, and the operands cover their shapes: the header asks
    // the caller for that.
    guarded(|| unsafe {
        let mut call = Call::INIT;
        let (team, _) = read(problem, linear, results, grads, &mut call)?;
        let request = request(grad_output, grad_scale, &call.grads)?;
        let Call { structs: (problem, results), layer, .. } = &call;
        let pass = Pass::ForwardBackward;
        run::linear(problem, layer, pass, results, Some(&request), &team, None)?;
        Ok(())
    })
}

/// Computes the state of each row over one shard of a vocabulary, as xent_partial_forward does, where a linear layer
/// makes the logits: weight and bias are those of the shard's classes.
///
/// problem, linear, partials: not NULL. Otherwise as xent_partial_forward and xent_linear_forward. States are results of
/// all rows. Thread-safe. A call that fails writes nothing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xent_linear_partial_forward(
    problem: *const xent_problem,
    linear: *const xent_linear,
    class_offset: usize,
    total_classes: usize,
    partials: *mut xent_partial,
) -> xent_status {
    // SAFETY: the pointers are NULL or valid, and the operands cover their shapes: the header asks
    // the caller for that.
    guarded(|| unsafe {
        let mut call = Call::INIT;
        let (team, _) = read(problem, linear, std::ptr::null(), std::ptr::null(), &mut call)?;
        let place = place(class_offset, total_classes, partials);
        run::linear_partial(&call.structs.0, &call.layer, &place, None, &team, None)?;
        Ok(())
    })
}

/// Computes what one shard contributes to the gradients of a linear layer, from the merged states of all shards. The
/// gradients of weight and bias are those of the shard's classes. That of the hidden states is a part: the sum of all
/// shards' parts is the gradient.
///
/// problem, linear, class_offset and total_classes are those of xent_linear_partial_forward, with targets; merged and
/// grads are not NULL. Otherwise as xent_partial_backward and xent_linear_backward. Thread-safe. A call that fails writes
/// nothing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xent_linear_partial_backward(
    problem: *const xent_problem,
    linear: *const xent_linear,
    class_offset: usize,
    total_classes: usize,
    merged: *const xent_partial,
    grad_output: *const xent_input,
    grad_scale: f64,
    grads: *const xent_linear_grads,
) -> xent_status {
    // SAFETY: the pointers are NULL or valid, and the operands cover their shapes: the header asks
    // the caller for that.
    guarded(|| unsafe {
        let mut call = Call::INIT;
        let (team, _) = read(problem, linear, std::ptr::null(), grads, &mut call)?;
        let request = request(grad_output, grad_scale, &call.grads)?;
        let place = place(class_offset, total_classes, merged.cast_mut());
        run::linear_partial(&call.structs.0, &call.layer, &place, Some(&request), &team, None)?;
        Ok(())
    })
}
