//! What a shard of a vocabulary adds to the drivers: target indices of the whole vocabulary, the states that
//! a forward leaves behind, and the results of merged states.
//!
//! A shard is a plan like any other: its forward sums a row's classes, and its backward starts from an lse.
//! The lse, the entropy and the argmax of the forward go straight to members of the states; [`write`] makes
//! the states of these, and adds the sums over the targets.

use super::call::Call;
use super::totals::Totals;
use crate::kernels::row_math::{ROWS, RowGroup, RowGroupExtras, RowInputs, RowLanes};
use crate::parallel::{Team, Work};
use crate::partial::Partial;
use crate::plan::{Loss, Shape, Shard, Target, Targets};
use crate::strategy::MERGED_ROW_ELEMENTS;
use crate::view::{Position, Span};
use std::ops::Range;

/// Turns classes of the vocabulary into classes of the shard. A row whose target is another shard's counts,
/// and excludes no class.
pub fn localise(shard: &Shard, classes: usize, excluded: &mut [f64]) {
    let (offset, classes) = (shard.offset as f64, classes as f64);
    for class in excluded {
        if *class >= 0.0 {
            let local = *class - offset;
            let is_own = local >= 0.0 && local < classes;
            *class = if is_own { local } else { RowInputs::ALL_CLASSES };
        }
    }
}

/// The state of a row.
///
/// # Safety
/// The row is one of the plan's.
unsafe fn state(shard: &Shard, at: Position) -> *mut Partial {
    // SAFETY: the states cover all rows of the plan (validation); a state starts with its first member.
    unsafe { shard.states.at(at, 0).cast() }
}

/// Writes the states of a span, which is in the rows of a group from `row` on. The row arithmetic is done,
/// and `argmax` has the largest logit's class of each row.
///
/// # Safety
/// The span is the plan's, which is the forward of a shard over stored logits; no other thread accesses its
/// states.
pub unsafe fn write(
    call: &Call,
    span: &Span,
    row: usize,
    group: &RowGroup,
    extras: &RowGroupExtras,
    argmax: &[usize; ROWS],
) {
    // SAFETY: the row is the plan's (# Safety), and its largest logit's class is one of its logits'.
    let max = |i: usize| unsafe { call.plan.logits.real(span.at(i), argmax[row + i]) };
    // SAFETY: this function's own # Safety.
    unsafe { write_with(call, span, row, group, extras, argmax, max) }
}

/// [`write`] where the largest logits are known: `max(i)` is that of row `i` of the span.
///
/// # Safety
/// The span is the plan's, which is the forward of a shard; no other thread accesses its states.
pub unsafe fn write_with(
    call: &Call,
    span: &Span,
    row: usize,
    group: &RowGroup,
    extras: &RowGroupExtras,
    argmax: &[usize; ROWS],
    max: impl Fn(usize) -> f64,
) {
    let Some((loss, shard)) = call.loss.and_then(|loss| Some((loss, loss.shard.as_ref()?))) else {
        return;
    };
    for i in 0..span.len {
        let (at, lane) = (span.at(i), row + i);
        let class = argmax[lane];
        let lse = group.results.lse[lane];
        let logit_mean =
            if lse == f64::NEG_INFINITY { 0.0 } else { lse - group.results.entropy[lane] };
        let (target_mass, target_dot) = targets(loss, shard, lane, &group.inputs, extras);
        let (max, argmax) = (max(i), (shard.offset + class) as i64);
        // SAFETY: the row is the plan's, and its state this thread's (# Safety).
        unsafe {
            *state(shard, at) = Partial { lse, target_dot, target_mass, logit_mean, max, argmax };
        }
    }
}

/// Σ m_c and Σ m_c·x_c over the classes of a row.
fn targets(
    loss: &Loss,
    shard: &Shard,
    lane: usize,
    inputs: &RowInputs,
    extras: &RowGroupExtras,
) -> (f64, f64) {
    if !inputs.is_kept(lane) {
        return (0.0, 0.0);
    }
    let x_y = inputs.x_y[lane];
    let has_own = inputs.class(lane).is_some();
    let own_mass = if loss.has_masses() { extras.factors.class_mass[lane] } else { 1.0 };
    let times = |m: f64, x: f64| if m == 0.0 { 0.0 } else { m * x };
    // Σ m_c·x_c of masses that add up to `total`, from the sum relative to a center, which excludes a class.
    let dot = |total: f64| {
        let weighted = &extras.weighted;
        let center = weighted.center[lane];
        let own = if has_own { times(own_mass, x_y - center) } else { 0.0 };
        let relative = weighted.dot[lane] + weighted.error[lane] + own;
        times(total, center) + relative
    };
    match loss.targets {
        Targets::Absent => (0.0, 0.0),
        Targets::Probabilities(_) => {
            let total = extras.weighted.mass[lane];
            (total, dot(total))
        }
        Targets::Indices(_) => {
            let own = if has_own { (1.0 - loss.label_smoothing) * own_mass } else { 0.0 };
            let (mut mass, mut sum) = (own, times(own, x_y));
            if loss.label_smoothing > 0.0 {
                let share = loss.smoothing_share;
                mass += share * shard.own_weight;
                sum += share * dot(shard.own_weight);
            }
            (mass, sum)
        }
    }
}

/// Reads the total masses of a span from its states, which a gradient of probability targets needs.
///
/// # Safety
/// The span is the plan's, and `row + span.len` is at most [`ROWS`].
pub unsafe fn read_masses(shard: &Shard, span: &Span, row: usize, to: &mut RowLanes) {
    for (i, to) in to[row..][..span.len].iter_mut().enumerate() {
        // SAFETY: the row is the plan's (# Safety), and nobody writes its state during a backward.
        *to = unsafe { (*state(shard, span.at(i))).target_mass };
    }
}

/// Reads the entropies of a span from its states, which the gradient of an entropy bonus needs.
///
/// # Safety
/// The span is the plan's, as long as `to`.
pub unsafe fn read_entropies(shard: &Shard, span: &Span, to: &mut [f64]) {
    for (i, to) in to.iter_mut().enumerate() {
        // SAFETY: the row is the plan's (# Safety), and nobody writes its state during a backward.
        *to = entropy(&unsafe { *state(shard, span.at(i)) });
    }
}

/// The entropy of a row of merged states. No entropy is negative; NaN stays.
fn entropy(state: &Partial) -> f64 {
    let Partial { lse, logit_mean, .. } = *state;
    let entropy = if lse.is_finite() { lse - logit_mean } else { f64::NAN };
    if entropy < 0.0 { 0.0 } else { entropy }
}

/// Sets the states of all rows to those of no classes.
///
/// # Safety
/// The states cover the shape, and no other thread accesses them.
pub unsafe fn clear(shape: &Shape, shard: &Shard) {
    for index in 0..shape.distributions() {
        // SAFETY: the row is the shape's, and its state this thread's (# Safety).
        unsafe { *state(shard, shape.position(index)) = Partial::EMPTY };
    }
}

/// Computes the results of merged states; returns the sums over the rows. Of `loss`, the targets are read
/// where they are indices.
///
/// # Safety
/// Validation has made the loss for this shape. Its operands stay valid for the call.
pub unsafe fn finish(shape: &Shape, loss: &Loss, shard: &Shard, team: &Team) -> Totals {
    let mut totals = Totals::ZERO;
    let task = |rows: Range<usize>| {
        let mut totals = Totals::ZERO;
        for index in rows {
            // SAFETY: `Work::rows` counts the distributions of the shape, and `for_tasks` gives each to one task.
            unsafe { finish_row(loss, shard, shape.position(index), &mut totals) };
        }
        totals
    };
    let work = Work::rows(shape.distributions(), MERGED_ROW_ELEMENTS);
    team.for_tasks(&work, task, |task| totals.add(&task));
    totals
}

/// # Safety
/// As [`finish`]; the row is the shape's, and no other thread accesses it.
unsafe fn finish_row(loss: &Loss, shard: &Shard, at: Position, totals: &mut Totals) {
    // SAFETY: the states, the targets and the row weights cover all rows (validation).
    let (state, target, r) = unsafe { (*state(shard, at), loss.target(at), loss.row_weight(at)) };
    let Partial { lse, target_dot, target_mass, argmax, .. } = state;
    let is_kept = matches!(target, Target::Class(_) | Target::Distribution);
    let (mut cross_entropy, mut z_loss, mut bonus) = (0.0, 0.0, 0.0);
    if is_kept && r != 0.0 {
        // A row with a NaN or +inf, or of nothing but -inf, has no probabilities, whatever its masses.
        cross_entropy =
            if lse.is_finite() { r * (target_mass * lse - target_dot) } else { f64::NAN };
        if loss.z_loss != 0.0 {
            z_loss = r * (loss.z_loss * (lse * lse));
        }
        if loss.has_bonus() {
            bonus = r * (-loss.entropy_bonus * entropy(&state));
        }
    }
    totals.loss.add(cross_entropy);
    if loss.z_loss != 0.0 {
        totals.z_loss.add(z_loss);
    }
    totals.entropy_bonus.add(bonus);
    if let Target::Class(y) = target
        && argmax == y as i64
    {
        totals.correct += 1;
    }
    // SAFETY: the results cover all rows (validation), and this thread alone accesses the row's (# Safety).
    unsafe {
        if let Some(view) = &loss.lse {
            view.set_real(at, 0, lse);
        }
        if let Some(view) = &loss.row_losses {
            view.set_real(at, 0, cross_entropy + z_loss + bonus);
        }
        if let Some(view) = &loss.entropy {
            view.set_real(at, 0, entropy(&state));
        }
        if let Some(view) = &loss.argmax {
            let span = Span { first: at, axis: crate::view::Axis::Rows, len: 1 };
            view.write_span(&span, &[argmax as usize]);
        }
    }
}
