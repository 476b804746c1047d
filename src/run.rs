//! Calls from start to end: validate, compute, reduce, write the scalar results.
//!
//! Both surfaces, C and Rust, call these functions.

use crate::codes::*;
use crate::dispatch::{self, Isa};
use crate::drivers::{self, Totals, softmax_gradient};
use crate::error::Error;
use crate::parallel::Team;
use crate::plan::{Pass, Plain};
use crate::validate::cross_entropy::{Denominators, GradientRequest, Problem, Results};
use crate::validate::shards::Place;
use crate::validate::softmax::Work;
use crate::validate::{self, linear, plain, softmax};
use crate::worker::Entered;

/// Checks and computes a cross-entropy problem. A forward has `results` alone, a backward reads
/// `results.lse` and has a `request`, a fused call has both.
///
/// # Safety
/// Every operand that is not absent covers, with its strides, the shape that the problem gives it.
/// Its memory stays valid for the call. During the call nobody else writes an input or touches an
/// output.
pub(crate) unsafe fn cross_entropy(
    problem: &Problem,
    pass: Pass,
    results: &Results,
    request: Option<&GradientRequest>,
    team: &Team,
    isa: Option<Isa>,
) -> Result<(), Error> {
    let _untrapped = Entered::untrapped();
    // SAFETY: the operands cover their shapes in valid memory (# Safety).
    let valid =
        unsafe { validate::cross_entropy::validate(problem, pass, results, request, team, isa) };
    // Not by `?`, which would move it: this frame, below which all work is done, has it once.
    let Ok(valid) = &valid else { return valid.map(drop) };
    // SAFETY: `validate` made the plan and found the kernels for it; the operands stay valid for the call
    // (# Safety).
    let sums = unsafe { drivers::run(&valid.plan, &valid.kernels, team) };
    // SAFETY: the results are the caller's (# Safety), and `validate` checked them.
    unsafe { write_results(problem, results, &valid.denominators, &sums) };
    Ok(())
}

/// Reduces the sums over rows, and writes the results that have one number.
///
/// # Safety
/// The pointers are null or writable for one element; validation checked that they are aligned and that no two
/// of them overlap.
unsafe fn write_results(
    problem: &Problem,
    results: &Results,
    denominators: &Denominators,
    sums: &Totals,
) {
    let Denominators { normalizer, z_normalizer, kept } = *denominators;
    let empty = kept == 0 && problem.flags & XENT_FLAG_EMPTY_IS_ZERO != 0;
    let reduced = |sum: f64, normalizer: f64| match problem.reduction {
        XENT_MEAN if empty => 0.0,
        XENT_MEAN => sum / normalizer,
        _ => sum,
    };
    // A z-loss that is off is 0, not the 0/0 of a mean over no rows.
    let z_loss =
        if problem.z_loss == 0.0 { 0.0 } else { reduced(sums.z_loss.value(), z_normalizer) };
    // Nor is an entropy bonus.
    let entropy_bonus = if problem.entropy_bonus == 0.0 {
        0.0
    } else {
        reduced(sums.entropy_bonus.value(), z_normalizer)
    };
    // SAFETY: this function's own # Safety.
    unsafe {
        write(results.loss, reduced(sums.loss.value(), normalizer) + z_loss + entropy_bonus);
        write(results.z_loss, z_loss);
        write(results.entropy_bonus, entropy_bonus);
        write(results.normalizer, normalizer);
        write(results.z_normalizer, z_normalizer);
        write(results.kept_rows, kept);
        write(results.correct, sums.correct);
    }
}

/// Checks and computes a linear cross-entropy: see [`cross_entropy`] for what goes with which pass.
///
/// # Safety
/// The operands are as [`cross_entropy`] asks.
#[allow(clippy::too_many_arguments, reason = "each is a struct of the surfaces")]
pub(crate) unsafe fn linear(
    problem: &Problem,
    layer: &linear::Layer,
    pass: Pass,
    results: &Results,
    request: Option<&linear::Request>,
    team: &Team,
    isa: Option<Isa>,
) -> Result<(), Error> {
    let _untrapped = Entered::untrapped();
    // SAFETY: the operands cover their shapes in valid memory (# Safety).
    let valid =
        unsafe { linear::validate(problem, layer, pass, results, request, None, team, isa) };
    let Ok(valid) = &valid else { return valid.map(drop) };
    // SAFETY: `validate` made the plan and found the kernels for it; the operands stay valid for the call
    // (# Safety).
    let sums = unsafe {
        let linear::Valid { plan, linear, kernels, products, .. } = valid;
        drivers::linear::run(plan, valid.loss(), linear, kernels, products, team)?
    };
    // SAFETY: the results are the caller's (# Safety), and `validate` checked them.
    unsafe { write_results(problem, results, &valid.denominators, &sums) };
    Ok(())
}

/// Checks and computes the states of a shard's rows, or, with a request, the gradient of its logits from
/// merged states.
///
/// # Safety
/// The operands are as [`cross_entropy`] asks; class weights cover all classes of the vocabulary. The states
/// are [rows, inner], packed, and are written without a request and read with one.
pub(crate) unsafe fn partial(
    problem: &Problem,
    place: &Place,
    request: Option<&GradientRequest>,
    team: &Team,
    isa: Option<Isa>,
) -> Result<(), Error> {
    let _untrapped = Entered::untrapped();
    // SAFETY: the operands cover their shapes in valid memory (# Safety).
    let call = unsafe { validate::shards::shard(problem, place, request, team, isa) };
    let Ok(call) = &call else { return call.map(drop) };
    // SAFETY: validation made the plan and found the kernels for it; the operands stay valid for the call
    // (# Safety).
    unsafe {
        if call.plan.shape.classes > 0 {
            drivers::run(&call.plan, &call.kernels, team);
        } else if request.is_none() {
            drivers::shards::clear(&call.plan.shape, &call.shard);
        }
    }
    Ok(())
}

/// Checks and computes the states of a shard's rows whose logits a linear layer makes, or, with a request, the gradients
/// of the layer from merged states.
///
/// # Safety
/// The operands are as [`partial`] asks.
pub(crate) unsafe fn linear_partial(
    problem: &Problem,
    layer: &linear::Layer,
    place: &Place,
    request: Option<&linear::Request>,
    team: &Team,
    isa: Option<Isa>,
) -> Result<(), Error> {
    let _untrapped = Entered::untrapped();
    let pass = if request.is_some() { Pass::Backward } else { Pass::Forward };
    let (results, shard) = (&Results::NONE, Some(place));
    // SAFETY: the operands cover their shapes in valid memory (# Safety).
    let valid =
        unsafe { linear::validate(problem, layer, pass, results, request, shard, team, isa) };
    let Ok(valid) = &valid else { return valid.map(drop) };
    let (loss, linear::Valid { plan, linear, kernels, products, .. }) = (valid.loss(), valid);
    // SAFETY: `validate` made the plan and found the kernels for it; the operands stay valid for the call
    // (# Safety).
    unsafe {
        match &loss.shard {
            Some(shard) if plan.shape.classes == 0 => match request {
                None => drivers::shards::clear(&plan.shape, shard),
                Some(_) => drivers::linear::clear(linear, plan.shape.rows),
            },
            _ => {
                drivers::linear::run(plan, loss, linear, kernels, products, team)?;
            }
        }
    }
    Ok(())
}

/// Checks merged states and computes results from them.
///
/// # Safety
/// The states, the results, and of the problem all operands but logits and probabilities, are as
/// [`cross_entropy`] asks.
pub(crate) unsafe fn partial_finish(
    problem: &Problem,
    place: &Place,
    results: &Results,
    team: &Team,
    isa: Option<Isa>,
) -> Result<(), Error> {
    let _untrapped = Entered::untrapped();
    // SAFETY: the operands cover their shapes in valid memory (# Safety).
    let call = unsafe { validate::shards::finish(problem, place, results, team, isa) };
    let Ok(call) = &call else { return call.map(drop) };
    // SAFETY: validation made the loss for this shape; the operands stay valid for the call, and it checked
    // that scalar results are aligned and apart (# Safety).
    unsafe {
        let sums = drivers::shards::finish(&call.shape, &call.loss, &call.shard, team);
        write_results(problem, results, &call.denominators, &sums);
    }
    Ok(())
}

/// Computes a plain call; false, with nothing written, if the general way has to.
///
/// # Safety
/// The operands are packed, and as [`cross_entropy`] asks.
#[inline(always)]
pub(crate) unsafe fn plain(call: &Plain, isa: Option<Isa>) -> bool {
    let _untrapped = Entered::untrapped();
    let isa = isa.map_or_else(dispatch::selected, Ok);
    let kernels = isa.ok().and_then(|isa| isa.kernels(call.dtype, call.dtype));
    match kernels {
        // SAFETY: the call is valid, and its operands are in memory that stays valid for the call (# Safety).
        Some(kernels) if plain::is_valid(call) => unsafe { drivers::small::run(&kernels, call) },
        _ => false,
    }
}

/// Checks and computes softmax, log-softmax, or the gradient through one of them.
///
/// # Safety
/// The operands are as [`cross_entropy`] asks.
pub(crate) unsafe fn softmax(
    problem: &softmax::Problem,
    team: &Team,
    isa: Option<Isa>,
) -> Result<(), Error> {
    let _untrapped = Entered::untrapped();
    let Some(valid) = softmax::validate(problem, isa)? else {
        return Ok(());
    };
    match valid.work {
        // SAFETY: `validate` made the plan and found the kernels for it; the operands stay valid for the call
        // (# Safety).
        Work::Forward(plan) => unsafe {
            drivers::run(&plan, &valid.kernels, team);
        },
        // SAFETY: `validate` made the problem and found the kernels for it; the operands stay valid for the
        // call (# Safety).
        Work::Backward(problem) => unsafe {
            softmax_gradient::run(&problem, &valid.kernels, team);
        },
    }
    Ok(())
}

/// # Safety
/// `to` is null, or aligned and valid for a write.
unsafe fn write<T>(to: *mut T, value: T) {
    if !to.is_null() {
        // SAFETY: `to` is not null, so it is aligned and valid for a write (# Safety).
        unsafe { *to = value }
    }
}
