//! What each class of a row weighs in its loss: class weights, target probabilities, and both.
//!
//! Probabilities come in three kinds: of all classes, of some that are listed, and as the logits of a teacher, of all
//! classes or of those listed. The driver that reads a row's operands prepares the softmax of its teacher, in two numbers;
//! each sweep then forms the probabilities again, some classes at a time, and nobody stores them.

use super::call::Call;
use super::operands;
use crate::kernels::row_math::RowGroup;
use crate::math::compensated::CompensatedSum;
use crate::math::scalar::exp2;
use crate::plan::{Listed, Loss, Probabilities, Shard, Targets, Teacher};
use crate::strategy::CONVERTED;
use crate::view::{FloatType, Position, Span, View};
use std::f64::consts::LOG2_E;

/// Writes the masses of the classes from `class` on: `w_c·t'_c` for probability targets; otherwise `w_c`, over which
/// label smoothing spreads ε/C. Those of a softmax are 1.
///
/// # Safety
/// The row, and the classes `class..class + to.len()`, are the plan's.
pub unsafe fn read(call: &Call, at: Position, class: usize, to: &mut [f64]) {
    let Some(loss) = call.loss else { return to.fill(1.0) };
    let Targets::Probabilities(targets) = &loss.targets else {
        // SAFETY: this function's own # Safety.
        if !unsafe { read_class_weights(call, class, to) } {
            to.fill(1.0);
        }
        return;
    };
    // SAFETY: the row and the classes are the plan's (# Safety).
    unsafe { probabilities(call, loss, targets, at, class, to) };
    if let Some(weights) = &loss.class_weights {
        // SAFETY: class weights cover all classes of the plan (validation).
        unsafe { weigh(call, weights, class, to) };
    }
}

/// Reads the classes of a row from `class` on: by a kernel if they are side by side.
///
/// # Safety
/// The view covers the row and the classes `class..class + to.len()`.
unsafe fn read_row(
    call: &Call,
    view: &View<FloatType>,
    at: Position,
    class: usize,
    to: &mut [f64],
) {
    // SAFETY: the view covers the classes (# Safety), whose elements are of its type and aligned (validation). The
    // processor has the set of the kernels (`Call::k`).
    unsafe {
        if view.strides[1] == 1 && view.dtype.has_f32_lanes() && !to.is_empty() {
            let x = view.at(at, class);
            (call.k.lanes.widen_masses)(view.dtype, x.cast_const(), to.len(), to.as_mut_ptr());
        } else {
            view.read_row(at, class, to);
        }
    }
}

/// Multiplies masses by the weights of the classes from `class` on; a weight of 0 makes 0.
///
/// A function of its own, for its buffer, which is short: below every caller, the stack is at its deepest.
///
/// # Safety
/// The weights cover the classes.
#[inline(never)]
unsafe fn weigh(call: &Call, weights: &View<FloatType>, class: usize, to: &mut [f64]) {
    const LEN: usize = 64;
    let mut buffer = [0.0; LEN];
    for (i, to) in to.chunks_mut(LEN).enumerate() {
        let w = &mut buffer[..to.len()];
        // SAFETY: the weights cover the classes (# Safety).
        unsafe { read_row(call, weights, Position::FIRST, class + i * LEN, w) };
        for (to, w) in to.iter_mut().zip(w) {
            *to = if *w == 0.0 { 0.0 } else { *to * *w };
        }
    }
}

/// Writes `t'_c` of the classes from `class` on.
///
/// # Safety
/// As [`read`]; `targets` are those of the call's loss.
unsafe fn probabilities(
    call: &Call,
    loss: &Loss,
    targets: &Probabilities,
    at: Position,
    class: usize,
    to: &mut [f64],
) {
    let (keep, spread) = (1.0 - loss.label_smoothing, loss.smoothing_share);
    if keep == 0.0 {
        return to.fill(spread);
    }
    match &targets.listed {
        // A teacher without a softmax leaves no class a probability.
        // SAFETY: the row is the plan's (# Safety), so `read_teacher` has written its numbers.
        Some(_) if unsafe { has_no_softmax(targets, at) } => to.fill(f64::NAN),
        Some(listed) => {
            to.fill(0.0);
            // SAFETY: the row is the plan's (# Safety).
            unsafe { add_listed(call, loss, targets, listed, at, class, to) };
        }
        None => {
            // SAFETY: the targets cover all rows and classes of the plan (validation).
            unsafe { read_row(call, &targets.values, at, class, to) };
            if let Some(teacher) = &targets.teacher {
                // SAFETY: the row is the plan's (# Safety).
                unsafe { soften(call, teacher, at, to) };
            }
        }
    }
    if loss.label_smoothing != 0.0 {
        to.iter_mut().for_each(|t| *t = *t * keep + spread);
    }
}

/// Adds the probabilities of the listed classes that are among those from `class` on.
///
/// # Safety
/// As [`probabilities`].
unsafe fn add_listed(
    call: &Call,
    loss: &Loss,
    targets: &Probabilities,
    listed: &Listed,
    at: Position,
    class: usize,
    to: &mut [f64],
) {
    let first = first_class(loss, class);
    for place in 0..listed.count {
        // SAFETY: the lists cover all rows and places (validation).
        let listed = unsafe { listed.classes.integer_at(at, place) };
        if listed == loss.ignore_index {
            continue;
        }
        if let Some(to) =
            usize::try_from(listed.wrapping_sub(first)).ok().and_then(|i| to.get_mut(i))
        {
            // SAFETY: the targets cover all rows and places (validation).
            let mut value = unsafe { targets.values.real(at, place) };
            if let Some(teacher) = &targets.teacher {
                // SAFETY: the row is the plan's (# Safety).
                unsafe { soften(call, teacher, at, std::slice::from_mut(&mut value)) };
            }
            *to += value;
        }
    }
}

/// Classes of a block in which [`listed_blocks`] looks for listed ones.
pub const BLOCK: usize = 64;

/// The blocks of a chunk in which sparse targets list a class, a bit each. The masses of the other blocks are those of
/// classes that are [`unlisted`]. `None` for other targets, or if blocks with a listed class are many.
///
/// # Safety
/// The row and the classes `class..class + len` are the plan's; `len` is at most a chunk.
pub unsafe fn listed_blocks(call: &Call, at: Position, class: usize, len: usize) -> Option<u64> {
    const MOST: u32 = 8;
    let loss = call.loss?;
    let Targets::Probabilities(targets) = &loss.targets else { return None };
    let listed = targets.listed.as_ref()?;
    let first = first_class(loss, class);
    let mut blocks = 0u64;
    for place in 0..listed.count {
        // SAFETY: the lists cover all rows and places (validation).
        let listed = unsafe { listed.classes.integer_at(at, place) };
        let at = usize::try_from(listed.wrapping_sub(first)).ok().filter(|&at| at < len);
        if let Some(at) = at.filter(|_| listed != loss.ignore_index) {
            blocks |= 1 << (at / BLOCK);
        }
    }
    // A teacher without a softmax leaves no class a mass.
    // SAFETY: the row is the plan's (# Safety), so `read_teacher` has written its numbers.
    let is_nan = unsafe { has_no_softmax(targets, at) };
    (blocks.count_ones() <= MOST && !is_nan).then_some(blocks)
}

/// What label smoothing leaves to a class that sparse targets do not list: its mass, if there are no class weights.
pub fn unlisted(call: &Call) -> f64 {
    call.loss.map_or(0.0, |loss| loss.smoothing_share)
}

/// Writes the weights of the classes from `class` on; false if all weigh 1, and nothing is written.
///
/// # Safety
/// As [`read`].
pub unsafe fn read_class_weights(call: &Call, class: usize, to: &mut [f64]) -> bool {
    let weights = call.loss.and_then(|loss| loss.class_weights.as_ref());
    // SAFETY: class weights cover all classes of the plan (validation).
    weights
        .inspect(|weights| unsafe { read_row(call, weights, Position::FIRST, class, to) })
        .is_some()
}

/// The index in the vocabulary of a class of the plan.
fn first_class(loss: &Loss, class: usize) -> i64 {
    (loss.shard.as_ref().map_or(0, |shard: &Shard| shard.offset) + class) as i64
}

/// Turns logits of a teacher's row into its probabilities.
///
/// # Safety
/// The row is the plan's, and [`read_teacher`] has read it.
unsafe fn soften(call: &Call, teacher: &Teacher, at: Position, x: &mut [f64]) {
    // SAFETY: the memory covers all rows (`reserve_teacher` of validation), and `read_teacher` has written this one's
    // numbers (# Safety). The kernel replaces the numbers of `x`; the processor has its set (`Call::k`).
    unsafe {
        let (shift, factor) = (teacher.softmax.real(at, 0), teacher.softmax.real(at, 1));
        (call.k.lanes.exps)(x.as_mut_ptr(), x.len(), teacher.scale, shift, factor);
    }
}

/// Whether the targets of a row are a teacher's logits that have no softmax.
///
/// # Safety
/// The row is the plan's, and [`read_teacher`] has read it.
unsafe fn has_no_softmax(targets: &Probabilities, at: Position) -> bool {
    // SAFETY: the memory covers all rows (`reserve_teacher` of validation), and `read_teacher` has written this one's
    // numbers (# Safety).
    targets.teacher.is_some_and(|teacher| unsafe { teacher.softmax.real(at, 1) }.is_nan())
}

/// Prepares the softmax of the teacher's logits of some rows, if there is a teacher.
///
/// # Safety
/// The span is the plan's, and no other thread works on its rows.
pub unsafe fn read_teacher(call: &Call, span: &Span) {
    let Some(Targets::Probabilities(targets)) = call.loss.map(|loss| &loss.targets) else { return };
    let (Some(loss), Some(teacher)) = (call.loss, &targets.teacher) else { return };
    for i in 0..span.len {
        // SAFETY: the row is the plan's, and this thread's (# Safety); the memory covers all rows (`reserve_teacher` of
        // validation).
        unsafe {
            let (shift, sum) = exp_sum(call, loss, targets, teacher, span.at(i));
            let factor = match sum {
                // Every place of the list is unused.
                None => 0.0,
                Some(sum) if sum > 0.0 && sum < f64::INFINITY => 1.0 / sum,
                Some(_) => f64::NAN,
            };
            teacher.softmax.set_real(span.at(i), 0, shift);
            teacher.softmax.set_real(span.at(i), 1, factor);
        }
    }
}

/// The largest of the teacher's logits of a row, all or those listed, and the sum of the exponentials of their scaled
/// differences from it; no sum of no logits, and one that is not finite where there is no softmax.
///
/// # Safety
/// The row is the plan's.
unsafe fn exp_sum(
    call: &Call,
    loss: &Loss,
    targets: &Probabilities,
    teacher: &Teacher,
    at: Position,
) -> (f64, Option<f64>) {
    let len = targets.listed.as_ref().map_or(call.plan.shape.classes, |listed| listed.count);
    let mut buffer = [0.0; CONVERTED];
    let (mut shift, mut sum, mut used) = (0.0, CompensatedSum::ZERO, len);
    for start in (0..len).step_by(CONVERTED) {
        let values = &mut buffer[..CONVERTED.min(len - start)];
        // SAFETY: the targets cover the row and its classes or places (validation).
        unsafe { targets.values.read_row(at, start, values) };
        if let Some(listed) = &targets.listed {
            for (i, value) in values.iter_mut().enumerate() {
                // SAFETY: the list covers the row and its places (validation).
                if unsafe { listed.classes.integer_at(at, start + i) } == loss.ignore_index {
                    (*value, used) = (f64::NEG_INFINITY, used - 1);
                }
            }
        }
        // Lane by lane, as a register takes them.
        let mut lanes = [f64::NEG_INFINITY; 8];
        for values in values.chunks(lanes.len()) {
            for (max, &x) in lanes.iter_mut().zip(values) {
                *max = if x > *max { x } else { *max };
            }
        }
        let largest = lanes.into_iter().fold(f64::NEG_INFINITY, f64::max);
        // An infinity shows in the sum.
        if largest.is_finite() && (largest > shift || sum.is_zero()) {
            if !sum.is_zero() {
                sum.scale(exp2(teacher.scale * (shift - largest) * LOG2_E));
            }
            shift = largest;
        }
        // SAFETY: the kernels replace and add up the numbers of the buffer; the processor has their set (`Call::k`).
        unsafe {
            (call.k.lanes.exps)(values.as_mut_ptr(), values.len(), teacher.scale, shift, 1.0);
            sum.merge((call.k.lanes.compensated_total)(values.as_ptr(), values.len()));
        }
    }
    // An infinity of the scale alone does not show in the sum.
    let sum = if (teacher.scale * shift).is_finite() { sum.value() } else { f64::NAN };
    (shift, (used > 0).then_some(sum))
}

/// Writes the divergences of a span from their targets, if they are wanted. The row arithmetic has left the lse of the
/// rows in `group` from `row` on; nothing has replaced their logits yet.
///
/// # Safety
/// The span is the plan's, whose logits are stored; no other thread accesses its results.
pub unsafe fn write_divergences(call: &Call, span: &Span, row: usize, group: &RowGroup) {
    let Some((loss, to)) = call.loss.and_then(|loss| Some((loss, loss.kl.as_ref()?))) else {
        return;
    };
    for i in 0..span.len {
        let lse = if call.takes_exps { group.results.lse[row + i] } else { 0.0 };
        // SAFETY: the row is the plan's, whose logits and results cover it (validation); the result is this
        // thread's (# Safety).
        unsafe {
            let kl = if group.inputs.is_kept(row + i) {
                stored_divergence(call, loss, span.at(i), lse)
            } else {
                0.0
            };
            to.set_real(span.at(i), 0, kl);
        }
    }
}

/// The divergence of a row whose logits are stored.
///
/// # Safety
/// The row is the plan's.
unsafe fn stored_divergence(call: &Call, loss: &Loss, at: Position, lse: f64) -> f64 {
    let mut logits = [0.0; CONVERTED];
    let mut sums = Divergence::ZERO;
    let classes = call.plan.shape.classes;
    for class in (0..classes).step_by(CONVERTED) {
        let x = &mut logits[..CONVERTED.min(classes - class)];
        // SAFETY: the logits cover the row and its classes (validation).
        unsafe {
            call.plan.logits.read_row(at, class, x);
            sums.add(call, loss, at, class, x, lse);
        }
    }
    sums.value(lse, lse)
}

/// The sums that the divergence of a row from its targets consists of, relative to a center c.
#[derive(Clone, Copy, Debug)]
pub struct Divergence {
    /// `Σ t'·(ln t' - (x - c))`
    terms: CompensatedSum,
    /// `Σ t'`
    mass: CompensatedSum,
}

impl Divergence {
    /// The sums over no classes.
    pub const ZERO: Divergence =
        Divergence { terms: CompensatedSum::ZERO, mass: CompensatedSum::ZERO };

    /// Adds the classes from `class` on, whose logits as stored are `x`, at most [`CONVERTED`]; replaces those.
    ///
    /// # Safety
    /// The row and the classes are the plan's, whose loss has probability targets.
    pub unsafe fn add(
        &mut self,
        call: &Call,
        loss: &Loss,
        at: Position,
        class: usize,
        x: &mut [f64],
        center: f64,
    ) {
        let Targets::Probabilities(targets) = &loss.targets else { return };
        if let Some(with) = &loss.transform {
            operands::transform::<CONVERTED>(call, with, x, None);
        }
        let mut t = [0.0; CONVERTED];
        let t = &mut t[..x.len()];
        let k = call.k.lanes;
        // SAFETY: the row and the classes are the plan's (# Safety). The kernels see as many numbers as there are, in both
        // arrays; the processor has their set (`Call::k`).
        unsafe {
            probabilities(call, loss, targets, at, class, t);
            self.mass.merge((k.compensated_total)(t.as_ptr(), t.len()));
            (k.divergences)(t.as_mut_ptr(), x.as_ptr(), t.len(), center);
            self.terms.merge((k.compensated_total)(t.as_ptr(), t.len()));
        }
    }

    /// `Σ t'·(ln t' - (x - lse))`, NaN where there is no softmax.
    pub fn value(&self, lse: f64, center: f64) -> f64 {
        if !lse.is_finite() {
            return f64::NAN;
        }
        let mass = if lse == center { 0.0 } else { self.mass.value() * (lse - center) };
        self.terms.value() + mass
    }
}
