//! Rows whose classes are contiguous, up to eight together: what their sweeps are to do, and what
//! follows from that. The arithmetic is group.rs's.

use super::Kernels;
use super::row_math::{ROWS, RowGroup, job, power_of_2};
use super::row_state::{ArgMax, CompensatedSum, RowState};
use crate::math::exp2::{Shift, nearest};
use crate::math::scalar::{exp2, log2};
use crate::plan::{At, Dtype, Pass, Plan};
use std::mem::MaybeUninit;
use std::ops::Range;

/// The shift that a row's chunks start from.
#[derive(Clone, Copy, Debug)]
pub struct InitialShift {
    /// Never shift_logit.
    pub shift: Shift,
    /// The shift is that of a logit of the row. Without, it is 0.
    pub real: bool,
}

impl InitialShift {
    /// That of a row that has none of its own.
    pub const NONE: InitialShift = InitialShift { shift: Shift::ZERO, real: false };
}

/// `P·p_c = 2^t·factor`, with the exponents t of the shift
#[derive(Clone, Copy, Debug)]
pub struct ExpScale {
    /// The shift of the exponentials.
    pub shift: Shift,
    /// What they are multiplied by.
    pub factor: f64,
}

impl ExpScale {
    /// The factor is a normal f32, shift_logit from the ends of its range, or 0, inf or NaN.
    #[inline(always)]
    pub fn is_plain(&self) -> bool {
        is_plain(self.factor)
    }

    /// Two factors that are, and a power of 2 the first, whose product is `factor`: the product
    /// with an exponential may be in range though the factor is not.
    #[inline(always)]
    pub fn split(factor: f64) -> (f64, f64) {
        if is_plain(factor) {
            return (1.0, factor);
        }
        let half = nearest(log2(factor.abs()) * 0.5).clamp(-126.0, 126.0);
        (exp2(half), factor * exp2(-half))
    }
}

#[inline(always)]
fn is_plain(factor: f64) -> bool {
    let size = factor.abs();
    let (low, high) = (power_of_2(-100), power_of_2(100));
    (low..=high).contains(&size) || size == 0.0 || !size.is_finite()
}

/// What the first sweep over a row is to do.
#[derive(Clone, Copy, Debug)]
pub struct RowSum {
    /// Exponentials are summed up.
    pub softmax: bool,
    /// The class to leave out.
    pub excluded: Option<usize>,
    /// Where exponents are counted from.
    pub initial_shift: InitialShift,
    /// Where the (weighted) sum of the logits is wanted too: what they are taken relative to.
    pub center: Option<f64>,
}

/// What the gradient's sweep computes from the logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Nothing: it is what is subtracted.
    Nothing,
    /// Exponentials.
    Exponentials,
    /// Exponentials of base e: the gradient is no gradient but a softmax.
    BaseE,
    /// Themselves, less the lse: the gradient is no gradient but a log-softmax.
    Logs,
}

impl Kind {
    /// For a plan.
    #[inline(always)]
    pub fn of(plan: &Plan) -> Kind {
        match plan.pass {
            Pass::LogSoftmax => Kind::Logs,
            Pass::Softmax if plan.is_base_e() => Kind::BaseE,
            _ if plan.has_softmax() => Kind::Exponentials,
            _ => Kind::Nothing,
        }
    }
}

/// What the gradient's sweep over a row needs.
#[derive(Clone, Copy, Debug)]
pub struct RowGradient {
    /// What is computed.
    pub kind: Kind,
    /// For chunks whose sums were relative to the initial_shift.
    pub from_initial: ExpScale,
    /// For the others: relative to the row's sums, or its lse.
    pub own: ExpScale,
    /// What is subtracted, times the mass of the class if masses differ.
    pub bias: f64,
    /// What the difference is multiplied by, a power of 2 that is 1 for all but extreme scales.
    pub scale: f64,
    /// The class whose part is written later.
    pub target: Option<usize>,
    /// A row to come on this thread, whose logits are worth fetching during the sweep.
    pub next: Option<At>,
}

/// Sums over rows.
#[derive(Clone, Copy, Debug)]
pub struct Totals {
    /// The cross-entropy part of the losses.
    pub loss: CompensatedSum,
    /// The z-loss part.
    pub z_loss: CompensatedSum,
    /// Rows whose largest logit is the target's.
    pub correct: u64,
}

impl Totals {
    /// Of no rows.
    pub const NONE: Totals =
        Totals { loss: CompensatedSum::NONE, z_loss: CompensatedSum::NONE, correct: 0 };

    /// Adds those of rows that come after.
    pub fn add(&mut self, next: &Totals) {
        self.loss.merge(next.loss);
        self.z_loss.merge(next.z_loss);
        self.correct += next.correct;
    }
}

/// What remains to be done for a row's gradient.
#[derive(Clone, Copy, Debug)]
pub enum Job {
    /// Nothing: none is asked for, or it is 0 and accumulated.
    Nothing,
    /// The target's own part alone.
    Target,
    /// The same value everywhere, and then the target's own part.
    Fill(f64),
    /// A sweep, and then the target's own part.
    Sweep(RowGradient),
}

/// A row with all that it gathers on its way.
#[derive(Clone, Copy, Debug)]
pub struct Lane {
    /// Which.
    pub at: At,
    /// The class that its sums leave out: the target, or the largest.
    pub excluded: Option<usize>,
    /// What its first sweep is to do, if there is one.
    pub sum: Option<RowSum>,
    /// What that adds up.
    pub partial: RowState,
    /// What remains to be done then.
    pub job: Job,
    /// What the gradient holds at the excluded before, where it is accumulated.
    old: f64,
    /// What it is to hold or add.
    entry: f64,
}

/// Up to eight rows that go through their stages together: from their operands
/// ([`start`](Self::start)) and what their sums are to be ([`aim`](Self::aim)) over these
/// ([`finish`](Self::finish)) to their gradients ([`place_target`](Self::place_target)).
pub struct Batch {
    group: RowGroup,
    first: usize,
    len: usize,
    lanes: [MaybeUninit<Lane>; ROWS],
}

impl Batch {
    /// Of no rows. Large: it is to stay where it is, one batch after the other.
    pub const EMPTY: Batch = Batch {
        group: RowGroup::EMPTY,
        first: 0,
        len: 0,
        lanes: [const { MaybeUninit::uninit() }; ROWS],
    };

    /// Reads the operands of rows `first..first + len` but the logits, and forgets those before;
    /// looks for their largest logits if those are left out.
    ///
    /// # Safety
    /// The rows are the plan's, with contiguous classes, no more than eight, and no other thread is
    /// at them. The same for all below, with the same plan.
    pub unsafe fn start(&mut self, k: &Kernels, plan: &Plan, first: usize, len: usize) {
        let mut tops = [ArgMax::NONE; ROWS];
        if plan.leaves_top_out() {
            for (i, found) in tops[..len].iter_mut().enumerate() {
                // SAFETY: the caller's promise.
                *found = unsafe { top(k, plan, plan.nth(first + i)) };
            }
        }
        (self.first, self.len) = (first, len);
        if len < ROWS {
            self.group.clear();
        }
        self.group.x_y = [f64::NEG_INFINITY; ROWS];
        for (lane, run) in plan.runs(first, len) {
            // SAFETY: the caller's promise.
            unsafe { self.group.read(k, plan, lane, &run, &tops[lane..]) };
        }
        for (i, lane) in self.lanes[..len].iter_mut().enumerate() {
            lane.write(Lane {
                at: plan.nth(first + i),
                excluded: self.group.class(i),
                sum: None,
                partial: RowState::EMPTY,
                job: Job::Nothing,
                old: 0.0,
                entry: 0.0,
            });
        }
    }

    /// Reads the logits of the excluded_classes of some rows, and what the gradient is there; once.
    ///
    /// # Safety
    /// See [`start`](Self::start).
    pub unsafe fn read_excluded(&mut self, k: &Kernels, plan: &Plan, rows: Range<usize>) {
        for (lane, run) in plan.runs(self.first + rows.start, rows.len()) {
            // SAFETY: the caller's promise.
            unsafe { self.group.read_excluded(plan, rows.start + lane, &run) };
        }
        self.group.transform_excluded(k, plan, rows.clone());
        let Some(gradient) = plan.gradient.as_ref().filter(|gradient| gradient.accumulate) else {
            return;
        };
        for Lane { at, excluded, old, .. } in &mut self.lanes()[rows] {
            if let Some(class) = *excluded {
                // SAFETY: a class of a row of the plan.
                *old = unsafe { gradient.view.real(*at, class) };
            }
        }
    }

    /// Whether the exponentials of row `i` are to be summed up.
    #[inline(always)]
    pub fn needs_softmax(&self, plan: &Plan, i: usize) -> bool {
        self.group.needs_softmax(plan, i)
    }

    /// Decides what the first sweep over row `i` is to do, with the initial_shift that was found for it.
    /// The excluded_classes' logits were read.
    #[inline(always)]
    pub fn aim(&mut self, plan: &Plan, i: usize, initial_shift: InitialShift) {
        if !self.group.needs_sum(plan, i) {
            return;
        }
        let start = initial_shift.shift.exponent / plan.l;
        let spreads = self.group.kept[i] != 0.0 && plan.spreads_mass();
        let center =
            spreads.then(|| self.group.center(plan, i, start, initial_shift.real.then_some(start)));
        let softmax = self.group.needs_softmax(plan, i);
        let lane = &mut self.lanes()[i];
        lane.sum = Some(RowSum { softmax, excluded: lane.excluded, initial_shift, center });
    }

    /// The rows.
    #[inline(always)]
    pub fn lanes(&mut self) -> &mut [Lane] {
        self.parts().1
    }

    /// The group, and the rows.
    #[inline(always)]
    fn parts(&mut self) -> (&mut RowGroup, &mut [Lane]) {
        let first = self.lanes.as_mut_ptr().cast();
        // SAFETY: `start` wrote them.
        (&mut self.group, unsafe { std::slice::from_raw_parts_mut(first, self.len) })
    }

    /// Writes the results of all rows and finds out what remains to be done.
    ///
    /// # Safety
    /// See [`start`](Self::start).
    pub unsafe fn finish(&mut self, k: &Kernels, plan: &Plan) {
        let (first, len) = (self.first, self.len);
        let (group, lanes) = self.parts();
        for (i, Lane { sum, partial, .. }) in lanes.iter().enumerate() {
            let Shift { logit: shift_logit, exponent: shift_exponent } = partial.level.shift;
            (group.shift_logit[i], group.shift_exponent[i]) = (shift_logit, shift_exponent);
            group.sum[i] = partial.level.sum.value();
            group.spread[i] = partial.spread.sum.value();
            group.first_moment[i] = partial.spread.first_moment;
            group.dot[i] = partial.dot;
            group.mass[i] = partial.mass.value();
            group.center[i] = sum.and_then(|sum| sum.center).unwrap_or(0.0);
            group.argmax[i] = partial.top.class;
        }
        // SAFETY: the caller's promise; that about the tables (`Kernels`).
        unsafe {
            if plan.is_from_lse() {
                for (lane, run) in plan.runs(first, len) {
                    group.read_lse(plan, lane, &run);
                }
            }
            (k.lanes.finish)(std::slice::from_mut(group), plan);
            if plan.has_losses() {
                for (lane, run) in plan.runs(first, len) {
                    group.write(plan, lane, &run);
                }
            }
        }
        if plan.gradient.is_none() {
            return;
        }
        for (i, lane) in lanes.iter_mut().enumerate() {
            lane.entry = group.entry[i];
            lane.job = match group.job[i] {
                job::NOTHING => Job::Nothing,
                job::TARGET => Job::Target,
                job::FILL => Job::Fill(group.fill[i]),
                _ => Job::Sweep(lane.sweep(plan, group, i)),
            };
        }
    }

    /// Adds the losses of the batch's rows to the totals.
    #[inline(always)]
    pub fn add_to(&self, plan: &Plan, totals: &mut Totals) {
        if plan.has_losses() {
            self.group.add_to(plan, totals);
        }
    }

    /// Adds the losses of row `i` alone.
    #[inline(always)]
    pub fn add_row(&self, plan: &Plan, i: usize, totals: &mut Totals) {
        if plan.has_losses() {
            self.group.add_row(plan, i, totals);
        }
    }

    /// Writes the target's own part of row `i`'s gradient, where the sweep left something of no
    /// meaning.
    ///
    /// # Safety
    /// See [`start`](Self::start).
    #[inline(always)]
    pub unsafe fn place_target(&mut self, plan: &Plan, i: usize) {
        let lane = self.lanes()[i];
        if let (Some(gradient), Some(class)) = (&plan.gradient, lane.excluded) {
            let round = |x: f64| {
                if plan.logits.dtype.has_short_lanes() { f64::from(x as f32) } else { x }
            };
            // Rounded to the lanes' type like all others, and only then added.
            let entry = round(lane.entry);
            let entry = if gradient.accumulate { round(lane.old + entry) } else { entry };
            // SAFETY: a class of a row of the plan.
            unsafe { gradient.view.set_real(lane.at, class, entry) };
        }
    }
}

impl Lane {
    /// The second sweep.
    #[inline(always)]
    fn sweep(&self, plan: &Plan, group: &RowGroup, i: usize) -> RowGradient {
        let kind = Kind::of(plan);
        let shift = Shift { logit: group.shift_logit[i], exponent: group.shift_exponent[i] };
        let own = ExpScale { shift, factor: group.factor[i] };
        let mut from_initial = own;
        if let Some(RowSum { initial_shift, softmax: true, .. }) = self.sum
            && matches!(kind, Kind::Exponentials | Kind::BaseE)
            && initial_shift.shift != shift
        {
            let below = shift.above(initial_shift.shift, plan.l);
            // Where nothing is left, nothing is, from whatever shift.
            let factor = if own.factor == 0.0 { own.factor } else { own.factor * exp2(-below) };
            from_initial = ExpScale { shift: initial_shift.shift, factor };
        }
        RowGradient {
            kind,
            from_initial,
            own,
            bias: group.bias[i],
            scale: group.scale[i],
            target: self.excluded,
            next: None,
        }
    }

    /// Writes the same value over the row's gradient.
    ///
    /// # Safety
    /// See [`Batch::start`].
    pub unsafe fn fill(&self, plan: &Plan, value: f64) {
        /// # Safety
        /// `p` is the first of `len` elements that are this thread's alone.
        unsafe fn fill<T: Copy>(p: *mut u8, len: usize, value: T) {
            // SAFETY: the caller's promise.
            unsafe { std::slice::from_raw_parts_mut(p.cast::<T>(), len) }.fill(value);
        }
        let Some(gradient) = &plan.gradient else { return };
        let (view, short) = (&gradient.view, value as f32);
        // SAFETY: a row of the gradient, and this thread's alone.
        unsafe {
            if plan.scatters() {
                (0..plan.classes).for_each(|class| view.set_real(self.at, class, value));
                return;
            }
            let p = view.at(self.at, 0);
            match view.dtype {
                Dtype::F64 => fill(p, plan.classes, value),
                Dtype::Bf16 => fill(p, plan.classes, half::bf16::from_f32(short)),
                Dtype::F16 => fill(p, plan.classes, half::f16::from_f32(short)),
                _ => fill(p, plan.classes, short),
            }
        }
    }
}

/// The largest logit of a row.
///
/// # Safety
/// See [`Batch::start`].
pub unsafe fn top(k: &Kernels, plan: &Plan, at: At) -> ArgMax {
    let mut top = ArgMax::NONE;
    for class in (0..plan.classes).step_by(crate::plan::CHUNK) {
        let len = crate::plan::CHUNK.min(plan.classes - class);
        // SAFETY: within the row, whose classes are contiguous.
        let mut next = unsafe { (k.stored.argmax)(plan.logits.at(at, class), len) };
        next.class += class;
        top.push(next);
    }
    top
}
