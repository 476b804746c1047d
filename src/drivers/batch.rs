//! Up to eight contiguous rows that go through their stages together: what their sweeps are to do, and
//! what follows from the sums. The arithmetic is row_math.rs's.

use super::call::{Call, Excluded};
use super::masses;
use super::operands;
use super::shards;
use super::totals::{GroupTotals, Totals};
use crate::kernels::contiguous::gradient::ExpScale;
use crate::kernels::entropy_bonus::Bonus;
use crate::kernels::row_math::{
    GradientAction, OutputTerm, ROWS, RowGroup, RowGroupExtras, RowInputs, RowLanes,
};
use crate::kernels::row_state::{ArgMax, RowState};
use crate::math::exp2::Shift;
use crate::math::scalar::exp2;
use crate::strategy::CHUNK;
use crate::view::Position;
use std::mem::MaybeUninit;
use std::ops::Range;

/// The shift that a row's chunks start from.
#[derive(Clone, Copy, Debug)]
pub struct InitialShift {
    /// The shift, without a logit.
    pub shift: Shift,
    /// The shift is near a logit of the row; else it is 0.
    pub is_of_row: bool,
}

impl InitialShift {
    /// The initial shift of a row that has none of its own.
    pub const NONE: InitialShift = InitialShift { shift: Shift::ZERO, is_of_row: false };
}

/// What the first sweep over a row is to do.
#[derive(Clone, Copy, Debug)]
pub struct Reduction {
    /// Exponentials are summed.
    pub sums_exps: bool,
    /// The class to exclude.
    pub excluded: Option<usize>,
    /// Where exponents are counted from.
    pub initial: InitialShift,
    /// Where the weighted sum of the logits is wanted too: what they are taken relative to.
    pub center: Option<f64>,
}

/// What the second sweep over a row needs.
#[derive(Clone, Copy, Debug)]
pub struct RowGradient {
    /// What is computed from the logits.
    pub term: OutputTerm,
    /// For chunks whose sums were relative to the initial shift.
    pub from_initial: ExpScale,
    /// For the others: relative to the row's final shift.
    pub from_final: ExpScale,
    /// What is subtracted, times the mass of the class if masses differ.
    pub bias: f64,
    /// What the difference is multiplied by: a power of 2, 1 unless lanes could not hold the terms.
    pub scale: f64,
    /// What the entropy bonus adds to each class, if the call has one.
    pub bonus: Bonus,
    /// The excluded class, whose entry is written later.
    pub excluded: Option<usize>,
    /// A row to come on this thread, prefetched during the sweep.
    pub next: Option<Position>,
}

/// What remains to be done for the gradient of a row.
#[derive(Clone, Copy, Debug)]
pub enum RowAction {
    /// Nothing.
    Nothing,
    /// The entry of the excluded class alone.
    Entry,
    /// The same value everywhere, and then the entry.
    Fill(f64),
    /// A sweep, and then the entry.
    Sweep(RowGradient),
}

/// A row with all that it gathers on its way.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    /// Which.
    pub at: Position,
    /// The class that its sums exclude.
    pub excluded: Option<usize>,
    /// What its first sweep is to do, if it has one.
    pub reduction: Option<Reduction>,
    /// What that adds up.
    pub state: RowState,
    /// What remains to be done then.
    pub action: RowAction,
    /// What the gradient held at the excluded class, if it is accumulated.
    old_entry: f64,
    /// What the gradient is to hold there, or to add.
    entry: f64,
}

/// Up to eight rows that go through their stages together: from their operands ([`start`](Self::start))
/// and what their sweeps are to do ([`prepare`](Self::prepare)) over the sums to results
/// ([`finish`](Self::finish)) and to their gradients ([`write_entry`](Self::write_entry)).
///
/// Every unsafe method asks for the same: the rows `first..first + len` of the last `start` are the call's,
/// have contiguous classes, and no other thread accesses them.
///
/// `N` is the number of rows that there is room for. A batch of a single row leaves room on the stack.
pub struct Batch<const N: usize = ROWS> {
    group: RowGroup,
    extras: RowGroupExtras,
    argmax: [usize; ROWS],
    first: usize,
    len: usize,
    rows: [MaybeUninit<Row>; N],
}

impl<const N: usize> Batch<N> {
    /// A batch of no rows. It is large: it should stay where it is, and serve one batch after the other.
    pub const EMPTY: Self = Batch {
        group: RowGroup::EMPTY,
        extras: RowGroupExtras::NONE,
        argmax: [0; ROWS],
        first: 0,
        len: 0,
        rows: [const { MaybeUninit::uninit() }; N],
    };

    /// Forgets the rows before, and reads the operands of rows `first..first + len` except for the logits;
    /// of these it looks for the largest, if that is excluded.
    ///
    /// # Safety
    /// See [`Batch`]; `len` is at most `N`, and that at most [`ROWS`].
    #[inline(always)]
    pub unsafe fn start(&mut self, call: &Call, first: usize, len: usize) {
        // SAFETY: this function's own # Safety.
        unsafe { self.lend().start(call, first, len) }
    }

    #[inline(always)]
    fn lend(&mut self) -> AnyBatch<'_> {
        let Batch { group, extras, argmax, first, len, rows } = self;
        AnyBatch { group, extras, argmax, first, len, rows }
    }

    /// Whether the exponentials of row `i` are to be summed.
    #[inline(always)]
    pub fn needs_exps(&self, call: &Call, i: usize) -> bool {
        operands::needs_exps(call, &self.group.inputs, i)
    }

    /// Reads the logits of the excluded classes of some rows, and what the gradient holds there; once for
    /// each row. Then decides what the first sweeps over these rows are to do, with the initial shifts
    /// that were found for them.
    ///
    /// # Safety
    /// See [`Batch`]; the rows are of the batch.
    #[inline(always)]
    pub unsafe fn prepare(
        &mut self,
        call: &Call,
        rows: Range<usize>,
        initial: &[InitialShift; ROWS],
    ) {
        // SAFETY: this function's own # Safety.
        unsafe { self.lend().prepare(call, rows, initial) }
    }

    /// The rows.
    #[inline(always)]
    pub fn rows(&mut self) -> &mut [Row] {
        // SAFETY: `start` wrote the first `len` rows.
        unsafe { assume_rows(&mut self.rows, self.len) }
    }

    /// The lse of each row, once the rows are finished, if it is a result or one is made of it.
    #[inline(always)]
    pub fn lse(&self) -> &RowLanes {
        &self.group.results.lse
    }

    /// Writes the results of all rows, and finds out what remains to be done.
    ///
    /// # Safety
    /// See [`Batch`].
    #[inline(always)]
    pub unsafe fn finish(&mut self, call: &Call) {
        // SAFETY: this function's own # Safety.
        unsafe { self.lend().finish(call) }
    }

    /// Adds the losses of all rows to the totals.
    #[inline(always)]
    pub fn add_to(&self, call: &Call, totals: &mut GroupTotals) {
        if let Some(loss) = call.loss.filter(|_| call.computes_losses) {
            operands::add_group(loss, &self.group, &self.argmax, totals);
        }
    }

    /// Adds the losses of row `i` alone.
    #[inline(always)]
    pub fn add_row(&self, call: &Call, i: usize, totals: &mut Totals) {
        if let Some(loss) = call.loss.filter(|_| call.computes_losses) {
            operands::add_row(loss, &self.group, &self.argmax, i, totals);
        }
    }

    /// Writes what is left to write of row `i`'s gradient; `sweep` makes its second sweep, if it has one.
    ///
    /// # Safety
    /// See [`Batch`]; `sweep` writes the row's gradient but for the entry of the excluded class.
    #[inline(always)]
    pub unsafe fn write(
        &mut self,
        call: &Call,
        i: usize,
        sweep: impl FnOnce(Position, &RowGradient),
    ) {
        let row = &self.rows()[i];
        match &row.action {
            RowAction::Nothing => return,
            RowAction::Entry => {}
            RowAction::Fill(value) => {
                if let Some(output) = &call.plan.output {
                    // SAFETY: the output covers the row (validation), this thread's alone (# Safety).
                    unsafe { output.view.fill_row(row.at, call.plan.shape.classes, *value) };
                }
            }
            RowAction::Sweep(gradient) => sweep(row.at, gradient),
        }
        // SAFETY: this function's own # Safety.
        unsafe { self.write_entry(call, i) };
    }

    /// Writes the gradient of row `i`'s excluded class, where the sweep left a value without meaning.
    ///
    /// # Safety
    /// See [`Batch`].
    #[inline(always)]
    pub unsafe fn write_entry(&mut self, call: &Call, i: usize) {
        let row = self.rows()[i];
        if let (Some(output), Some(class)) = (&call.plan.output, row.excluded) {
            let short = call.plan.logits.dtype.has_f32_lanes();
            let round = |x: f64| if short { f64::from(x as f32) } else { x };
            // As for all other classes, the entry is rounded to the lanes' type before it is added.
            let entry = round(row.entry);
            let entry = if output.accumulate { round(row.old_entry + entry) } else { entry };
            // SAFETY: the class of a row of the call, which the output covers (validation) and this thread
            // alone accesses (# Safety).
            unsafe { output.view.set_real(row.at, class, entry) };
        }
    }
}

/// A batch of whatever room: what its stages have in common is compiled once.
struct AnyBatch<'a> {
    group: &'a mut RowGroup,
    extras: &'a mut RowGroupExtras,
    argmax: &'a mut [usize; ROWS],
    first: &'a mut usize,
    len: &'a mut usize,
    rows: &'a mut [MaybeUninit<Row>],
}

impl AnyBatch<'_> {
    #[inline(always)]
    fn rows(&mut self) -> &mut [Row] {
        // SAFETY: `start` wrote the first `len` rows.
        unsafe { assume_rows(self.rows, *self.len) }
    }

    /// # Safety
    /// See [`Batch::start`].
    #[inline(never)]
    unsafe fn start(&mut self, call: &Call, first: usize, len: usize) {
        let mut largest = [ArgMax::NONE; ROWS];
        if call.excluded == Excluded::Largest {
            for (i, found) in largest[..len].iter_mut().enumerate() {
                // SAFETY: the row is the call's, with contiguous classes (# Safety).
                *found = unsafe { largest_logit(call, call.plan.shape.position(first + i)) };
            }
        }
        (*self.first, *self.len) = (first, len);
        self.group.inputs.x_y = [f64::NEG_INFINITY; ROWS];
        if len < ROWS {
            self.group.inputs.excluded = [RowInputs::IGNORED; ROWS];
        }
        for (row, span) in call.plan.shape.spans(first, len) {
            // SAFETY: the rows are the call's and this thread's (# Safety); spans end with row `len`.
            unsafe {
                masses::read_teacher(call, &span);
                let (inputs, factors) = (&mut self.group.inputs, &mut self.extras.factors);
                operands::read(call, &span, row, inputs, Some(factors), &largest[row..]);
            }
        }
        for (i, row) in self.rows[..len].iter_mut().enumerate() {
            row.write(Row {
                at: call.plan.shape.position(first + i),
                excluded: self.group.inputs.class(i),
                reduction: None,
                state: RowState::EMPTY,
                action: RowAction::Nothing,
                old_entry: 0.0,
                entry: 0.0,
            });
        }
    }

    /// # Safety
    /// See [`Batch::prepare`].
    #[inline(never)]
    unsafe fn prepare(&mut self, call: &Call, rows: Range<usize>, initial: &[InitialShift; ROWS]) {
        for (row, span) in call.plan.shape.spans(*self.first + rows.start, rows.len()) {
            // SAFETY: the rows are the call's and this thread's (# Safety).
            unsafe {
                operands::read_excluded_logits(
                    call,
                    &span,
                    rows.start + row,
                    &mut self.group.inputs,
                );
            }
        }
        operands::transform_excluded(
            call,
            &mut self.group.inputs,
            &mut self.extras.factors,
            rows.clone(),
        );
        if let Some(output) = call.plan.output.as_ref().filter(|output| output.accumulate) {
            for Row { at, excluded, old_entry, .. } in &mut self.rows()[rows.clone()] {
                if let Some(class) = *excluded {
                    // SAFETY: the class of a row of the call, which the output covers (validation).
                    *old_entry = unsafe { output.view.real(*at, class) };
                }
            }
        }
        for i in rows {
            self.decide(call, i, initial[i]);
        }
    }

    #[inline(always)]
    fn decide(&mut self, call: &Call, i: usize, initial: InitialShift) {
        if !operands::needs_reduction(call, &self.group.inputs, i) {
            return;
        }
        let start = initial.shift.exponent / call.l;
        let spreads = call.spreads_mass && self.group.inputs.is_kept(i);
        let center = spreads.then(|| {
            let others = initial.is_of_row.then_some(start);
            operands::center(call, &self.group.inputs, &self.extras.factors, i, start, others)
        });
        let sums_exps = operands::needs_exps(call, &self.group.inputs, i);
        let row = &mut self.rows()[i];
        row.reduction = Some(Reduction { sums_exps, excluded: row.excluded, initial, center });
    }

    /// # Safety
    /// See [`Batch::finish`].
    #[inline(never)]
    unsafe fn finish(&mut self, call: &Call) {
        let (first, len) = (*self.first, *self.len);
        let AnyBatch { group, extras, argmax, rows, .. } = self;
        // SAFETY: `start` wrote the first `len` rows.
        let rows = unsafe { assume_rows(rows, len) };
        group.sums.clear_shift_logits();
        for (i, Row { reduction, state, .. }) in rows.iter().enumerate() {
            let center = reduction.and_then(|reduction| reduction.center);
            set_sums(call, i, state, center, group, extras);
            argmax[i] = state.argmax.class;
        }
        if call.from_lse {
            for (row, span) in call.plan.shape.spans(first, len) {
                // SAFETY: the rows are the call's and this thread's (# Safety).
                unsafe {
                    operands::read_lse(call, &span, row, group);
                    if let Some(shard) = call.mass_of_shard {
                        shards::read_masses(shard, &span, row, &mut extras.weighted.mass);
                    }
                }
            }
        }
        call.finish(std::slice::from_mut(group), Some(std::slice::from_mut(extras)));
        if let Some(loss) = call.loss.filter(|_| call.computes_losses) {
            for (row, span) in call.plan.shape.spans(first, len) {
                // SAFETY: the rows are the call's and this thread's (# Safety).
                unsafe {
                    operands::write(loss, &span, row, &group.results, argmax);
                    masses::write_divergences(call, &span, row, group);
                    shards::write(call, &span, row, group, extras, argmax);
                }
            }
        }
        if call.plan.output.is_none() {
            return;
        }
        let RowGroup { sums, coefficients, .. } = group;
        let has_bias = call.has_bias();
        for (i, row) in rows.iter_mut().enumerate() {
            row.entry = coefficients.entry[i];
            row.action = match coefficients.action(i) {
                GradientAction::Nothing => RowAction::Nothing,
                GradientAction::Entry => RowAction::Entry,
                GradientAction::Fill(value) => RowAction::Fill(value),
                GradientAction::Sweep => {
                    let shift =
                        Shift { logit: sums.shift_logit[i], exponent: sums.shift_exponent[i] };
                    let exps = ExpScale { shift, factor: coefficients.factor[i] };
                    let bias = if has_bias { coefficients.bias[i] } else { 0.0 };
                    let bonus = bonus(call, i, shift, extras);
                    RowAction::Sweep(row.gradient(call, exps, bias, coefficients.scale[i], bonus))
                }
            };
        }
    }
}

/// Gives row `i` of a group, whose sums have no logits in their shifts yet, the sums of its state.
#[inline(always)]
pub fn set_sums(
    call: &Call,
    i: usize,
    state: &RowState,
    center: Option<f64>,
    group: &mut RowGroup,
    extras: &mut RowGroupExtras,
) {
    let Shift { logit, exponent } = state.exps.shift;
    if logit != 0.0 {
        (group.sums.shift_logit[i], group.sums.by_logit) = (logit, true);
    }
    group.sums.shift_exponent[i] = exponent;
    group.sums.sum[i] = state.exps.sum.value();
    if call.wants_entropy {
        extras.moments.sum[i] = state.moments.sum.value();
        extras.moments.first_moment[i] = state.moments.first_moment;
    }
    if call.spreads_mass {
        let (dot, lost) = state.weighted_logits.parts();
        extras.weighted.dot[i] = dot;
        // The error of an infinite sum is NaN.
        extras.weighted.error[i] = if dot.is_finite() { lost } else { 0.0 };
        extras.weighted.mass[i] = state.mass.value();
        extras.weighted.center[i] = center.unwrap_or(0.0);
    }
}

/// The bonus of row `i` of a group, whose shift is `shift`.
#[inline(always)]
pub fn bonus(call: &Call, i: usize, shift: Shift, extras: &RowGroupExtras) -> Bonus {
    if !call.has_bonus {
        return Bonus::NONE;
    }
    let of = &extras.bonus;
    let shift = Shift { exponent: of.exponent()[i], ..shift };
    Bonus { shift, slope: of.slope()[i], level: of.level()[i] }
}

/// The first `len` rows.
///
/// # Safety
/// They were written.
#[inline(always)]
unsafe fn assume_rows(rows: &mut [MaybeUninit<Row>], len: usize) -> &mut [Row] {
    // SAFETY: the first `len` places hold rows (# Safety).
    unsafe { std::slice::from_raw_parts_mut(rows[..len].as_mut_ptr().cast(), len) }
}

impl Row {
    /// The second sweep, if `exps` is relative to the row's final shift.
    #[inline(always)]
    fn gradient(
        &self,
        call: &Call,
        exps: ExpScale,
        bias: f64,
        scale: f64,
        bonus: Bonus,
    ) -> RowGradient {
        RowGradient {
            term: call.term,
            from_initial: from_initial(call, &self.reduction, exps),
            from_final: exps,
            bias,
            scale,
            bonus,
            excluded: self.excluded,
            next: None,
        }
    }
}

/// The scale of a row's exponentials relative to its initial shift, if it has one; `exps` is that relative to its
/// final shift.
#[inline(always)]
pub fn from_initial(call: &Call, reduction: &Option<Reduction>, exps: ExpScale) -> ExpScale {
    let ExpScale { shift, factor } = exps;
    match reduction {
        Some(Reduction { initial, sums_exps: true, .. })
            if !call.from_lse
                && matches!(call.term, OutputTerm::Exponentials | OutputTerm::BaseE)
                && initial.shift != shift =>
        {
            let below = shift.above(initial.shift, call.l);
            // A factor of 0 stays 0 from whatever shift.
            let factor = if factor == 0.0 { factor } else { factor * exp2(-below) };
            ExpScale { shift: initial.shift, factor }
        }
        _ => exps,
    }
}

/// The largest logit of a row.
///
/// # Safety
/// The row is the call's, and its classes are contiguous.
pub unsafe fn largest_logit(call: &Call, at: Position) -> ArgMax {
    let mut largest = ArgMax::NONE;
    let classes = call.plan.shape.classes;
    for class in (0..classes).step_by(CHUNK) {
        let len = CHUNK.min(classes - class);
        // SAFETY: the logits cover the classes of the row (validation), which are contiguous (# Safety); the processor
        // has the set of the kernels (`Call::k`).
        let mut next = unsafe { (call.k.native.argmax)(call.plan.logits.at(at, class), len) };
        next.class += class;
        largest.push(next);
    }
    largest
}
