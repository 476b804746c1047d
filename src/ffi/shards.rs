//! The C interface of vocabularies in shards.

use super::guard::{Failure, guarded};
use super::*;
use crate::partial::Partial;
use crate::validate::shards::Place;

/// What is known of a row after the classes of one shard of a vocabulary, or of several: plain data of
/// 48 bytes, without pointers, that processes and machines can exchange. Start from XENT_PARTIAL_INIT.
///
/// x_c are the logits after scale and cap. m_c is the mass that the row's targets put on class c: w_c *
/// t'_c with probabilities, (1-e) * w_y * [c=y] + e/C * w_c with an index y, where C and w are those of the
/// whole vocabulary.
#[repr(C)]
#[derive(Clone, Copy)]
#[allow(non_camel_case_types, reason = "the name in C")]
pub struct xent_partial {
    /// ln sum_c exp x_c; -inf for no classes.
    pub lse: f64,
    /// sum_c m_c * x_c, without the terms whose mass is 0; 0 in ignored rows.
    pub target_dot: f64,
    /// sum_c m_c; 0 in ignored rows.
    pub target_mass: f64,
    /// sum_c p_c * x_c under the softmax over these classes; 0 if lse is -inf.
    pub logit_mean: f64,
    /// The largest logit as stored. NaN is larger than every number; -inf for no classes.
    pub max: f64,
    /// The class of max in the whole vocabulary, the lowest on ties; -1 for no classes.
    pub argmax: i64,
}

const _: () = assert!(size_of::<xent_partial>() == size_of::<Partial>());

/// The place of states that a call writes or reads.
pub(super) fn place(offset: usize, total: usize, states: *mut xent_partial) -> Place {
    Place { offset, total, states: states.cast(), available: usize::MAX }
}

/// Computes the state of each row over one shard of a vocabulary: over the classes class_offset ..
/// class_offset + problem.classes of total_classes. Reads the logits from memory once.
///
/// problem describes the shard: logits, and probability targets, are its columns, [rows, classes, inner].
/// classes may be 0; logits and such targets may then be NULL, and the states are XENT_PARTIAL_INIT. Index
/// targets and class_weights are those of the whole vocabulary, and so is the C of label smoothing's e/C.
/// Without targets the states have what lse, argmax and entropy need.
/// partials: not NULL, [rows, inner], packed; it overlaps no operand.
/// A shard that exceeds total_classes is XENT_ERR_SHAPE, XENT_FLAG_LOG_PROBS is XENT_ERR_PARAM.
/// Thread-safe. A call that fails writes nothing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xent_partial_forward(
    problem: *const xent_problem,
    class_offset: usize,
    total_classes: usize,
    partials: *mut xent_partial,
) -> xent_status {
    // SAFETY: the pointers are NULL or valid, and the operands cover their shapes: the header asks
    // the caller for that.
    guarded(|| unsafe {
        let mut call = (Problem::INIT, Results::NONE);
        let (team, _) = read_structs(problem, std::ptr::null(), &mut call)?;
        let place = place(class_offset, total_classes, partials);
        run::partial(&call.0, &place, None, &team, None)?;
        Ok(())
    })
}

/// Merges `count` states of some shards into as many states of other shards, each into the one at its
/// place.
///
/// Commutative to the bit, and associative up to rounding; max and argmax are associative exactly.
/// XENT_PARTIAL_INIT, on either side, changes no bit. So any order and any tree of merges serves, such as that
/// of an MPI_Op. The arrays are the same or do not overlap. The call cannot fail.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xent_partial_merge(
    into: *mut xent_partial,
    from: *const xent_partial,
    count: usize,
) {
    for i in 0..count {
        // SAFETY: both arrays have `count` states, of the same layout as Partial: the header asks the caller
        // for the first.
        unsafe {
            let other = *from.cast::<Partial>().add(i);
            (*into.cast::<Partial>().add(i)).merge(&other);
        }
    }
}

/// Computes the results that `results` asks for from the merged states of all shards.
///
/// Of problem it reads rows, inner, the options, and index targets, class_weights and row operands as the
/// other calls do. It looks at neither logits nor the values of probability targets, whose part the states
/// have: the problem of any shard serves.
/// problem, merged, results: not NULL. merged: [rows, inner], packed. The states do not know the order of the
/// logits: top_classes, top_log_probs and target_ranks are XENT_ERR_PARAM. Thread-safe. A call that fails
/// writes nothing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xent_partial_finish(
    problem: *const xent_problem,
    total_classes: usize,
    merged: *const xent_partial,
    results: *const xent_results,
) -> xent_status {
    // SAFETY: the pointers are NULL or valid, and the operands cover their shapes: the header asks
    // the caller for that.
    guarded(|| unsafe {
        let mut call = (Problem::INIT, Results::NONE);
        let (team, has_results) = read_structs(problem, results, &mut call)?;
        if !has_results {
            return Err(null("results"));
        }
        let place = place(0, total_classes, merged.cast_mut());
        run::partial_finish(&call.0, &place, &call.1, &team, None)?;
        Ok(())
    })
}

/// Computes the gradient of the loss with respect to the logits of one shard, from the merged states of all
/// shards.
///
/// problem, class_offset and total_classes are those of xent_partial_forward, with targets; merged is not
/// NULL, [rows, inner], packed. grad_output, grad_scale and grad_logits are those of xent_backward; without
/// classes grad_logits may have data == NULL. Thread-safe. A call that fails writes nothing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xent_partial_backward(
    problem: *const xent_problem,
    class_offset: usize,
    total_classes: usize,
    merged: *const xent_partial,
    grad_output: *const xent_input,
    grad_scale: f64,
    grad_logits: *const xent_output,
) -> xent_status {
    // SAFETY: the pointers are NULL or valid, and the operands cover their shapes: the header asks
    // the caller for that.
    guarded(|| unsafe {
        let mut call = (Problem::INIT, Results::NONE);
        let (team, _) = read_structs(problem, std::ptr::null(), &mut call)?;
        let request: Result<_, Failure> =
            request(grad_output, grad_scale, grad_logits, "grad_logits");
        let place = place(class_offset, total_classes, merged.cast_mut());
        run::partial(&call.0, &place, Some(&request?), &team, None)?;
        Ok(())
    })
}
