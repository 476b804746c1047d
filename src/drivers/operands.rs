//! The operands and results of rows that have one number each: targets, weights, lse, losses.

use super::call::{Call, Excluded};
use super::masses;
use super::shards;
use super::totals::{GroupTotals, Totals};
use crate::kernels::logit_transform::Transform;
use crate::kernels::row_math::{
    ROWS, RowFactors, RowGroup, RowInputs, RowLanes, RowResults, is_far_below,
};
use crate::kernels::row_state::ArgMax;
use crate::math::compensated::CompensatedSum;
use crate::plan::{Loss, Targets};
use crate::view::{FloatType, Span, View};
use std::ops::Range;

/// Reads targets and weights of a span into the rows of a group from `row` on. `largest` are the largest
/// logits of the span, looked at only if the call excludes them.
///
/// # Safety
/// The span is the plan's, no other thread accesses it, and `row + span.len` is at most [`ROWS`];
/// `largest`, if looked at, has a class of the plan for each row.
#[inline(always)]
pub unsafe fn read(
    call: &Call,
    span: &Span,
    row: usize,
    inputs: &mut RowInputs,
    factors: Option<&mut RowFactors>,
    largest: &[ArgMax],
) {
    let rows = row..row + span.len;
    match (call.excluded, call.loss.map(|loss| (loss, &loss.targets))) {
        (Excluded::Target, Some((loss, Targets::Indices(view)))) => {
            // SAFETY: the targets cover all rows of the plan (validation), and the span fits the group (# Safety); the
            // processor has the set of the kernels (`Call::k`).
            unsafe {
                let to = &mut inputs.excluded[rows.clone()];
                (call.k.lanes.read_classes)(view, span, loss.ignore_index, to);
            }
        }
        (Excluded::Largest, _) => {
            for (excluded, largest) in inputs.excluded[rows.clone()].iter_mut().zip(largest) {
                *excluded = largest.class as f64;
            }
        }
        (_, Some((_, Targets::Probabilities(_)))) => {
            inputs.excluded[rows.clone()].fill(RowInputs::ALL_CLASSES);
        }
        _ => inputs.excluded[rows.clone()].fill(RowInputs::IGNORED),
    }
    let Some(loss) = call.loss else { return };
    if let (Some(mask), Targets::Indices(_) | Targets::Probabilities(_)) =
        (&loss.row_mask, &loss.targets)
    {
        for i in 0..span.len {
            // SAFETY: the mask covers all rows of the plan (validation), the span's among them.
            if unsafe { mask.integer(span.at(i)) } == 0 {
                inputs.excluded[row + i] = RowInputs::IGNORED;
            }
        }
    }
    // Without them, no option needs any.
    if let Some(factors) = factors {
        // SAFETY: row weights and grad_output cover all rows of the plan (validation), the span's among
        // them.
        unsafe {
            if let Some(view) = &loss.row_weights {
                view.read_span(span, &mut factors.row_weight[rows.clone()]);
            }
            if let Some(view) =
                loss.gradient.as_ref().and_then(|gradient| gradient.grad_output.as_ref())
            {
                view.read_span(span, &mut factors.grad_output[rows.clone()]);
            }
            if call.has_masses {
                read_class_masses(call, loss, span, row, inputs, factors);
            }
        }
    }
    if let (Some(shard), Targets::Indices(_)) = (&loss.shard, &loss.targets) {
        shards::localise(shard, call.plan.shape.classes, &mut inputs.excluded[rows]);
    }
}

/// The weight or mass of each excluded class.
///
/// # Safety
/// As [`read`], which has read the excluded classes.
#[cold]
unsafe fn read_class_masses(
    call: &Call,
    loss: &Loss,
    span: &Span,
    row: usize,
    inputs: &RowInputs,
    factors: &mut RowFactors,
) {
    for i in 0..span.len {
        let Some(class) = inputs.class(row + i) else { continue };
        // SAFETY: the row is the plan's; so is the class, a target in range (validation) or the class of
        // the row's largest logit.
        factors.class_mass[row + i] = unsafe {
            match loss.targets {
                Targets::Probabilities(_) => {
                    let mut mass = 0.0;
                    masses::read(call, span.at(i), class, std::slice::from_mut(&mut mass));
                    mass
                }
                Targets::Indices(_) | Targets::Absent => loss.target_weight(class),
            }
        };
    }
}

/// Reads the logits of the excluded classes as stored, before a call in place overwrites them.
///
/// # Safety
/// As [`read`], which has read the excluded classes.
pub unsafe fn read_excluded_logits(call: &Call, span: &Span, row: usize, inputs: &mut RowInputs) {
    let rows = row..row + span.len;
    let classes = &inputs.excluded[rows.clone()];
    // SAFETY: the logits cover all rows of the plan, and the classes are targets in range (validation), or
    // those of the largest logits.
    unsafe { call.plan.logits.read_classes(span, classes, &mut inputs.x_y[rows]) };
}

/// Scales and caps the logits of the excluded classes of some rows of a group. Once: a second call would
/// transform them again.
#[inline(always)]
pub fn transform_excluded(
    call: &Call,
    inputs: &mut RowInputs,
    factors: &mut RowFactors,
    rows: Range<usize>,
) {
    if let Some(with) = call.plan.transform() {
        transform_excluded_with(call, with, inputs, factors, rows);
    }
}

fn transform_excluded_with(
    call: &Call,
    with: &Transform,
    inputs: &mut RowInputs,
    factors: &mut RowFactors,
    rows: Range<usize>,
) {
    let (mut x, mut slope) = (inputs.x_y, [with.scale; ROWS]);
    transform::<ROWS>(call, with, &mut x, Some(&mut slope));
    for i in rows {
        if inputs.class(i).is_some() {
            inputs.x_y[i] = x[i];
            factors.slope[i] = if with.is_capped() { slope[i] } else { 1.0 };
        }
    }
}

/// Scales and caps at most `N` logits in f64, rounded to the lanes' type; the derivative goes to `slope`.
pub fn transform<const N: usize>(
    call: &Call,
    with: &Transform,
    x: &mut [f64],
    slope: Option<&mut [f64]>,
) {
    let kernel = call.k.lanes.transform;
    let none = std::ptr::null_mut();
    if !call.plan.logits.dtype.has_f32_lanes() {
        assert!(slope.as_ref().is_none_or(|slope| slope.len() == x.len()));
        let to = slope.map_or(none, |slope| slope.as_mut_ptr().cast());
        // SAFETY: `x` and `slope` have as many f64 lanes as the kernel is told; the processor has the set of the
        // kernels (`Call::k`).
        return unsafe { kernel(x.as_mut_ptr().cast(), x.len(), with, to) };
    }
    let (mut short, mut short_slope) = ([0.0f32; N], [0.0f32; N]);
    let len = x.len();
    for (short, x) in short[..len].iter_mut().zip(&*x) {
        *short = *x as f32;
    }
    let to = match &slope {
        Some(slope) => {
            for (short, slope) in short_slope[..len].iter_mut().zip(&**slope) {
                *short = *slope as f32;
            }
            short_slope.as_mut_ptr().cast()
        }
        None => none,
    };
    // SAFETY: both arrays have at least `len` f32 lanes, since they were sliced to `len` above; the processor has the
    // set of the kernels (`Call::k`).
    unsafe { kernel(short.as_mut_ptr().cast(), len, with, to) };
    for (x, short) in x.iter_mut().zip(short) {
        *x = f64::from(short);
    }
    for (slope, short) in slope.into_iter().flatten().zip(short_slope) {
        *slope = f64::from(short);
    }
}

/// Whether the exponentials of a row have to be summed: it counts, or its lse is a result all the same.
#[inline(always)]
pub fn needs_exps(call: &Call, inputs: &RowInputs, row: usize) -> bool {
    call.sums_exps && (inputs.is_kept(row) || call.sums_ignored)
}

/// Whether a row needs a first sweep at all.
#[inline(always)]
pub fn needs_reduction(call: &Call, inputs: &RowInputs, row: usize) -> bool {
    needs_exps(call, inputs, row)
        || call.wants_argmax
        || call.rankings.is_some()
        // The total mass of a row is part of its gradient.
        || (inputs.is_kept(row) && call.spreads_mass)
}

/// What the logits of a row that counts are taken relative to in its weighted sum, if the row's shift is
/// at the logit `start`. The logit of the excluded class is taken, unless it is too far below `others`.
#[inline(always)]
pub fn center(
    call: &Call,
    inputs: &RowInputs,
    factors: &RowFactors,
    row: usize,
    start: f64,
    others: Option<f64>,
) -> f64 {
    let x_y = inputs.x_y[row];
    if !call.takes_exps {
        0.0
    } else if inputs.class(row).is_some()
        && (!call.has_masses || factors.class_mass[row] != 0.0)
        && x_y.is_finite()
        && !others.is_some_and(|others| is_far_below(x_y, others))
    {
        x_y
    } else {
        near_largest(call, x_y, start)
    }
}

/// The logit `start`, or that of the excluded class if it is the largest of the row and `start` is too far below it: from
/// there, terms of positive masses do not cancel.
#[inline(always)]
pub fn near_largest(call: &Call, excluded: f64, start: f64) -> f64 {
    let is_largest = call.excluded == Excluded::Largest && excluded.is_finite();
    if is_largest && is_far_below(start, excluded) { excluded } else { start }
}

/// Reads the lse operand of rows that count; 0 for others. Of the states of a shard, reads their entropies if an
/// entropy bonus needs them.
///
/// # Safety
/// As [`read`], which has read the excluded classes.
pub unsafe fn read_lse(call: &Call, span: &Span, row: usize, group: &mut RowGroup) {
    let RowGroup { inputs, results, .. } = group;
    let Some(view) = call.loss.and_then(|loss| loss.lse.as_ref()) else { return };
    let rows = row..row + span.len;
    // SAFETY: the lse covers all rows of the plan (validation), the span's among them (# Safety).
    unsafe { view.read_span(span, &mut results.lse[rows.clone()]) };
    for i in rows.clone() {
        if !inputs.is_kept(i) {
            results.lse[i] = 0.0;
        }
    }
    if let Some(shard) = call.entropy_of_shard {
        // SAFETY: the span is the plan's, and fits the group (# Safety).
        unsafe { shards::read_entropies(shard, span, &mut results.entropy[rows]) };
    }
}

/// Adds the losses of all rows of a group to the totals; the losses of rows that do not count are 0.
#[inline(always)]
pub fn add_group(loss: &Loss, group: &RowGroup, argmax: &[usize; ROWS], totals: &mut GroupTotals) {
    totals.losses.add(&group.results.loss);
    if loss.z_loss != 0.0 {
        add_part(&mut totals.rest.z_loss, &group.results.z_loss);
    }
    if loss.has_bonus() {
        add_part(&mut totals.rest.entropy_bonus, &group.results.entropy_bonus);
    }
    if loss.counts_correct {
        (0..ROWS).for_each(|row| count_correct(group, argmax, row, &mut totals.rest));
    }
}

/// Adds a part of the losses of a group.
#[inline(never)]
fn add_part(total: &mut CompensatedSum, part: &RowLanes) {
    part.iter().for_each(|&loss| total.add(loss));
}

/// Adds the losses of one row.
#[inline(always)]
pub fn add_row(
    loss: &Loss,
    group: &RowGroup,
    argmax: &[usize; ROWS],
    row: usize,
    totals: &mut Totals,
) {
    totals.loss.add(group.results.loss[row]);
    if loss.z_loss != 0.0 {
        totals.z_loss.add(group.results.z_loss[row]);
    }
    if loss.has_bonus() {
        totals.entropy_bonus.add(group.results.entropy_bonus[row]);
    }
    if loss.counts_correct {
        count_correct(group, argmax, row, totals);
    }
}

/// Counts a row whose largest logit is the target's.
#[inline(always)]
fn count_correct(group: &RowGroup, argmax: &[usize; ROWS], row: usize, totals: &mut Totals) {
    if group.inputs.class(row) == Some(argmax[row]) {
        totals.correct += 1;
    }
}

/// Writes the results of a span, which is in the rows of a group from `row` on.
///
/// # Safety
/// As [`read`].
pub unsafe fn write(
    loss: &Loss,
    span: &Span,
    row: usize,
    results: &RowResults,
    argmax: &[usize; ROWS],
) {
    let rows = row..row + span.len;
    let place = |view: &Option<View<FloatType>>, values: &RowLanes| {
        if let Some(view) = view {
            // SAFETY: the result covers all rows of the plan (validation), and this thread alone accesses
            // the span's (# Safety).
            unsafe { view.write_span(span, &values[rows.clone()]) };
        }
    };
    place(&loss.lse, &results.lse);
    if loss.row_losses.is_some() {
        let z_loss = |i: usize| if loss.z_loss == 0.0 { 0.0 } else { results.z_loss[i] };
        let bonus = |i: usize| if loss.has_bonus() { results.entropy_bonus[i] } else { 0.0 };
        let all = |i: usize| results.loss[i] + z_loss(i) + bonus(i);
        place(&loss.row_losses, &std::array::from_fn(all));
    }
    place(&loss.entropy, &results.entropy);
    if let Some(view) = &loss.argmax {
        // SAFETY: the result covers all rows of the plan and is of i64 (validation); this thread alone
        // accesses the span's (# Safety).
        unsafe { view.write_span(span, &argmax[rows.clone()]) };
    }
}
