//! Eight rows, one a lane, in f64: from their operands and sums to losses and to the factors of
//! their gradients.
//!
//! With `rest = Σ 2^t_c` over the classes other than the target y, kept apart by the kernels, and
//! t_y the target's own exponent from the same shift, everything that a confident prediction
//! needs follows without cancellation:
//!
//! ```text
//! a = 2^t_y, b = rest             or, where the first is the larger, a = 1, b = rest·2^-t_y
//!
//! p_y     = a/(a + b)             1 - p_y = b/(a + b)
//! -logp_y = ln(a + b) - ln a      exact down to b = 1e-300, by what a + b lost
//! lse     = (c + log2(a + b))/L   or x_y - logp_y
//! ```
//!
//! That is one exponential, one logarithm and one division for everything.
//!
//! The gradient of a row, `T·(p_c - [c=y]) + B·(W·p_c - w_c)`, is `P·p_c - B·w_c` with
//! `P = T + B·W` everywhere but at the target, which is formed here. With λ·lse² on top, P has
//! 2λ·lse more. Probability targets leave nothing out: their loss is `T·lse - Σ m_c·x_c`, m being
//! the mass and T its sum, and m is what the gradient subtracts.
//!
//! Exponentials are in base `b = 2^L` (math/exp2.rs), and so are their sums' logarithms:
//! `ln rest` is taken as `(c + log2 Σ 2^(L·x - c))/L`. That is the log-sum-exp at a temperature
//! 1.3e-8 from 1 whatever the shift c was; to take `c/L + ln Σ 2^…` would be
//! to mix bases and be off by 1.3e-8 times the distance between shift and result.

use super::Kernels;
use super::row_batch::Totals;
use super::row_state::ArgMax;
use crate::math::exp2::Base;
use crate::math::real;
use crate::plan::{Gradient, Pass, Plan, Run, Targets, View};
use crate::simd::{Doubles, Real, Simd, WideVector};
use std::ops::Range;

/// Rows of an group.
pub const ROWS: usize = 8;

/// A number for each.
pub type Column = [f64; ROWS];

/// What is known of eight rows. [`read`](RowGroup::read) fills in what their operands say, the
/// kernels what their sums are, and [`finish`] the rest; columns that a problem has no use for are
/// left as they are.
#[derive(Clone, Copy, Debug)]
#[repr(align(64))]
pub struct RowGroup {
    /// 1 for rows that count, else 0.
    pub kept: Column,
    /// The class that the sums leave out, the target or the largest; -1 for none.
    pub excluded: Column,
    /// Its logit, -inf for none; what its gradient is multiplied by under a cap, its weight or
    /// mass.
    pub x_y: Column,
    /// See `x_y`.
    pub slope: Column,
    /// See `x_y`.
    pub w_y: Column,
    /// r, the weights of rows that have any.
    pub r: Column,
    /// grad_output of rows that have one each.
    pub output: Column,

    /// Where exponents are counted from: the shifts of the sums, and then of the gradient.
    pub shift_logit: Column,
    /// See `shift_logit`.
    pub shift_exponent: Column,
    /// Σ 2^t, what its roundings lost, and Σ t·2^t.
    pub sum: Column,
    /// See `sum`.
    pub lost: Column,
    /// See `sum`.
    pub first_moment: Column,
    /// The sum that the first_moment is of.
    pub spread: Column,
    /// What logits are taken relative to in `dot`, `Σ m_c·(x_c - center)` without the excluded, and what
    /// the roundings of that lost; and Σ m_c.
    pub center: Column,
    /// See `center`.
    pub dot: Column,
    /// See `center`.
    pub dot_lost: Column,
    /// See `center`.
    pub mass: Column,
    /// The largest logit of the classes seen last, and which it is.
    pub top: Column,
    /// See `top`.
    pub top_class: Column,
    /// The largest of all.
    pub argmax: [usize; ROWS],

    /// ln Σ exp x: a result of forward, an operand of backward.
    pub lse: Column,
    /// The cross-entropy and the z-loss part.
    pub loss: Column,
    /// See `loss`.
    pub z_loss: Column,
    /// −Σ p·ln p
    pub entropy: Column,

    /// What remains to be done for the gradient: one of the constants of [`job`].
    pub job: Column,
    /// The value to fill the row with.
    pub fill: Column,
    /// What the gradient is at the excluded.
    pub entry: Column,
    /// What 2^t is multiplied by: a power of 2 that is 1 but for extreme factors (`ExpScale::split`), and
    /// the rest. Or what lse is above the shift, where the output is no gradient but a
    /// log-softmax.
    pub before: Column,
    /// See `before`.
    pub factor: Column,
    /// What is subtracted from that, times the mass of the class if masses differ.
    pub bias: Column,
    /// What the difference is multiplied by, a power of 2 that is 1 for all but extreme scales.
    pub scale: Column,
    /// Some factor is extreme, and some scale is not 1.
    pub extreme: bool,
    /// See `extreme`.
    pub scales: bool,
}

/// What remains to be done for a row's gradient.
pub mod job {
    /// Nothing: none is asked for, or it is 0 and accumulated.
    pub const NOTHING: f64 = 0.0;
    /// The target's own part alone.
    pub const TARGET: f64 = 1.0;
    /// The same value everywhere, and then the target's own part.
    pub const FILL: f64 = 2.0;
    /// A sweep, and then the target's own part.
    pub const SWEEP: f64 = 3.0;
}

impl RowGroup {
    /// Of no rows.
    pub const EMPTY: RowGroup = RowGroup {
        kept: [0.0; ROWS],
        excluded: [-1.0; ROWS],
        x_y: [f64::NEG_INFINITY; ROWS],
        slope: [1.0; ROWS],
        w_y: [1.0; ROWS],
        r: [0.0; ROWS],
        output: [0.0; ROWS],
        shift_logit: [0.0; ROWS],
        shift_exponent: [0.0; ROWS],
        sum: [0.0; ROWS],
        lost: [0.0; ROWS],
        first_moment: [0.0; ROWS],
        spread: [0.0; ROWS],
        center: [0.0; ROWS],
        dot: [0.0; ROWS],
        dot_lost: [0.0; ROWS],
        mass: [0.0; ROWS],
        top: [0.0; ROWS],
        top_class: [0.0; ROWS],
        argmax: [0; ROWS],
        lse: [0.0; ROWS],
        loss: [0.0; ROWS],
        z_loss: [0.0; ROWS],
        entropy: [0.0; ROWS],
        job: [0.0; ROWS],
        fill: [0.0; ROWS],
        entry: [0.0; ROWS],
        before: [1.0; ROWS],
        factor: [0.0; ROWS],
        bias: [0.0; ROWS],
        scale: [1.0; ROWS],
        extreme: false,
        scales: false,
    };

    /// Forgets the rows.
    #[inline(always)]
    pub fn clear(&mut self) {
        self.kept = [0.0; ROWS];
        self.excluded = [-1.0; ROWS];
        self.x_y = [f64::NEG_INFINITY; ROWS];
    }

    /// Reads targets and weights of a run of rows, which go from lane `lane` on; and the class that
    /// their sums leave out: that of the target, or of `tops`, the largest, where there is none:
    /// what is small beside it then keeps its accuracy. `tops` is looked at if the plan
    /// [leaves them out](Plan::leaves_top_out) alone.
    ///
    /// # Safety
    /// The rows are the plan's, and no other thread is at them; `tops` are classes.
    #[inline(always)]
    pub unsafe fn read(
        &mut self,
        k: &Kernels,
        plan: &Plan,
        lane: usize,
        run: &Run,
        tops: &[ArgMax],
    ) {
        let lanes = lane..lane + run.len;
        match &plan.targets {
            // SAFETY: rows of the view; about the tables (`Kernels`).
            Targets::Indices(view) => unsafe {
                (k.lanes.excluded_classes)(view, run, plan.ignore_index, self, lane);
            },
            targets => {
                let leaves_top_out = plan.leaves_top_out();
                let has_mass = matches!(targets, Targets::Probabilities(_));
                let counts = has_mass || leaves_top_out;
                self.kept[lanes.clone()].fill(if counts { 1.0 } else { 0.0 });
                if leaves_top_out {
                    for (excluded, top) in self.excluded[lanes.clone()].iter_mut().zip(tops) {
                        *excluded = top.class as f64;
                    }
                }
            }
        }
        if let (Some(mask), true) = (&plan.row_mask, plan.has_targets()) {
            for i in 0..run.len {
                // SAFETY: a row of the mask.
                if unsafe { mask.integer(run.at(i)) } == 0 {
                    (self.kept[lane + i], self.excluded[lane + i]) = (0.0, -1.0);
                }
            }
        }
        // SAFETY: rows of the plan.
        unsafe {
            if let Some(view) = &plan.row_weights {
                view.column(run, &mut self.r[lanes.clone()]);
            }
            if let Some(view) = plan.gradient.as_ref().and_then(|gradient| gradient.output.as_ref())
            {
                view.column(run, &mut self.output[lanes.clone()]);
            }
            if plan.has_masses() {
                self.weigh(plan, lane, run);
            }
        }
    }

    /// Reads the logits of the excluded_classes as stored, which a call in place overwrites. The rows were
    /// read.
    ///
    /// # Safety
    /// As [`read`](Self::read).
    pub unsafe fn read_excluded(&mut self, plan: &Plan, lane: usize, run: &Run) {
        let lanes = lane..lane + run.len;
        // SAFETY: rows of the plan; a target's class is in range (problem.rs), and so is the
        // largest.
        unsafe { plan.logits.pick(run, &self.excluded[lanes.clone()], &mut self.x_y[lanes]) };
    }

    /// The weight or mass of each excluded.
    ///
    /// # Safety
    /// As [`read`](Self::read).
    #[cold]
    unsafe fn weigh(&mut self, plan: &Plan, lane: usize, run: &Run) {
        for i in 0..run.len {
            let Some(class) = self.class(lane + i) else { continue };
            // SAFETY: the caller's promise.
            self.w_y[lane + i] = unsafe {
                match plan.targets {
                    Targets::Probabilities(_) => {
                        let mut mass = 0.0;
                        plan.mass(run.at(i), class, std::slice::from_mut(&mut mass));
                        mass
                    }
                    _ => plan.class_weight(class),
                }
            };
        }
    }

    /// Scales and caps the logits of the excluded_classes of some rows, once.
    pub fn transform_excluded(&mut self, k: &Kernels, plan: &Plan, rows: Range<usize>) {
        let Some(with) = &plan.transform else { return };
        let (mut x, mut slope) = (self.x_y, [with.scale; ROWS]);
        if plan.logits.dtype.has_short_lanes() {
            let (mut short, mut short_slope) = (x.map(|x| x as f32), slope.map(|x| x as f32));
            // SAFETY: eight elements each.
            unsafe {
                let (x, slope) = (short.as_mut_ptr(), short_slope.as_mut_ptr());
                (k.lanes.transform)(x.cast(), ROWS, with, slope.cast());
            }
            (x, slope) = (short.map(f64::from), short_slope.map(f64::from));
        } else {
            // SAFETY: eight elements each.
            unsafe {
                let (x, slope) = (x.as_mut_ptr(), slope.as_mut_ptr());
                (k.lanes.transform)(x.cast(), ROWS, with, slope.cast());
            }
        }
        for i in rows {
            if self.class(i).is_some() {
                self.x_y[i] = x[i];
                self.slope[i] = if with.cap > 0.0 { slope[i] } else { 1.0 };
            }
        }
    }

    /// The class that a row's sums leave out.
    #[inline(always)]
    pub fn class(&self, row: usize) -> Option<usize> {
        (self.excluded[row] >= 0.0).then_some(self.excluded[row] as usize)
    }

    /// Whether a row's exponentials have to be summed up: it counts, or its lse is wanted all the
    /// same.
    #[inline(always)]
    pub fn needs_softmax(&self, plan: &Plan, row: usize) -> bool {
        let wanted = self.kept[row] != 0.0 || plan.lse.is_some() || plan.entropy.is_some();
        !plan.is_from_lse() && plan.has_softmax() && wanted
    }

    /// Whether its first sweep is needed at all.
    #[inline(always)]
    pub fn needs_sum(&self, plan: &Plan, row: usize) -> bool {
        self.needs_softmax(plan, row)
            || plan.wants_argmax()
            // The total of a row's mass is part of its gradient.
            || (self.kept[row] != 0.0 && plan.spreads_mass() && plan.pass != Pass::Targets)
    }

    /// What the logits of a row that counts are taken relative to in [`dot`](RowGroup::dot), for a
    /// first shift that is at `start`; `far_from` is what the logit of the excluded may be too shift_logit
    /// below.
    #[inline(always)]
    pub fn center(&self, plan: &Plan, row: usize, start: f64, far_from: Option<f64>) -> f64 {
        let x_y = self.x_y[row];
        if plan.log_probs {
            0.0
        } else if self.class(row).is_some()
            && (self.w_y[row] != 0.0 || !plan.has_masses())
            && x_y.is_finite()
            && !far_from.is_some_and(|others| is_far_below(x_y, others))
        {
            x_y
        } else {
            start
        }
    }

    /// Reads the lse that a backward starts from, of rows that count.
    ///
    /// # Safety
    /// As [`read`](Self::read).
    pub unsafe fn read_lse(&mut self, plan: &Plan, lane: usize, run: &Run) {
        let Some(view) = &plan.lse else { return };
        let lanes = lane..lane + run.len;
        // SAFETY: the caller's promise.
        unsafe { view.column(run, &mut self.lse[lanes.clone()]) };
        for (lse, kept) in self.lse[lanes.clone()].iter_mut().zip(&self.kept[lanes]) {
            *lse = if *kept == 0.0 { 0.0 } else { *lse };
        }
    }

    /// Adds the losses of all rows to the totals.
    #[inline(always)]
    pub fn add_to(&self, plan: &Plan, totals: &mut Totals) {
        // Losses of f32 have too few digits for the roundings of a sum to show.
        if plan.logits.dtype.has_short_lanes() {
            totals.loss.add(tree(&self.loss));
        } else {
            self.loss.iter().for_each(|&loss| totals.loss.add(loss));
        }
        for row in 0..ROWS {
            self.add_rest(plan, row, totals);
        }
    }

    /// Adds the losses of one.
    #[inline(always)]
    pub fn add_row(&self, plan: &Plan, row: usize, totals: &mut Totals) {
        totals.loss.add(self.loss[row]);
        self.add_rest(plan, row, totals);
    }

    #[inline(always)]
    fn add_rest(&self, plan: &Plan, row: usize, totals: &mut Totals) {
        if plan.z_loss != 0.0 {
            totals.z_loss.add(self.z_loss[row]);
        }
        if plan.correct && self.kept[row] != 0.0 && self.class(row) == Some(self.argmax[row]) {
            totals.correct += 1;
        }
    }

    /// Writes the results of a run of rows, which are from lane `lane` on.
    ///
    /// # Safety
    /// As [`read`](Self::read).
    pub unsafe fn write(&self, plan: &Plan, lane: usize, run: &Run) {
        let lanes = lane..lane + run.len;
        let place = |view: &Option<View>, values: &Column| {
            if let Some(view) = view {
                // SAFETY: rows of the view.
                unsafe { view.set_column(run, &values[lanes.clone()]) };
            }
        };
        place(&plan.lse, &self.lse);
        if plan.row_losses.is_some() {
            let both = std::array::from_fn(|i| self.loss[i] + self.z_loss[i]);
            place(&plan.row_losses, &both);
        }
        place(&plan.entropy, &self.entropy);
        if let Some(view) = &plan.argmax {
            for (i, &class) in self.argmax[lanes].iter().enumerate() {
                // SAFETY: a row of the view, which is of i64.
                unsafe { *view.at(run.at(i), 0).cast::<i64>() = class as i64 };
            }
        }
    }
}

/// Their sum, halves first.
fn tree(x: &Column) -> f64 {
    ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]))
}

/// A logit so shift_logit below others that their distances from it would lose digits.
#[inline(always)]
pub fn is_far_below(x: f64, others: f64) -> bool {
    x < others - 64.0
}

/// What the sums of some rows say about them.
#[derive(Clone, Copy)]
pub struct Softmax<V> {
    /// ln Σ exp x
    pub lse: V,
    /// lse in two parts, for it is rounded: what it is above the shift, in units of log2, and
    /// what it is above that, in its own.
    pub height: V,
    /// See `height`.
    pub rise: V,
    /// −logp_y
    pub nll: V,
    /// p_y and 1 − p_y, each to its own relative accuracy.
    pub hit: V,
    /// See `hit`.
    pub miss: V,
    /// What to multiply 2^t by for probabilities, t being counted from `shift_logit` and `shift_exponent`.
    pub share: V,
    /// See `share`.
    pub shift_logit: V,
    /// See `share`.
    pub shift_exponent: V,
}

/// Columns of an group, as shift_logit as one register goes.
#[derive(Clone, Copy)]
struct Rows<'a, S: Simd> {
    s: S,
    group: &'a RowGroup,
    at: usize,
}

impl<S: Simd<Real: Base>> Rows<'_, S> {
    #[inline(always)]
    fn get(&self, column: &Column) -> WideVector<S> {
        // SAFETY: `at` is the first of a register of the eight.
        unsafe { self.s.wide().load(column.as_ptr().add(self.at)) }
    }

    /// See the head of this file. Sums are 0, or 1/2 and more, as shifts are chosen.
    #[inline(always)]
    fn by_sums(&self) -> Softmax<WideVector<S>> {
        let Rows { s, group, .. } = *self;
        let d = s.wide();
        let splat = |x: f64| d.splat(x);
        let (zero, one, infinity) = (splat(0.0), splat(1.0), splat(f64::INFINITY));
        let negative = |x| d.sub(zero, x);
        let (shift_logit, shift_exponent, x_y) =
            (self.get(&group.shift_logit), self.get(&group.shift_exponent), self.get(&group.x_y));
        // Past an infinity what was lost is inf - inf.
        let sum = self.get(&group.sum);
        let finite = d.less(sum, infinity);
        let sum = d.select(finite, d.add(sum, self.get(&group.lost)), sum);

        // Shift and logit are exact in units of log2, so their difference is taken there: at a
        // height of 1e30 nothing else tells two logits from one.
        let slope = splat(S::Real::L.to_f64());
        let t = d.mul_sub_exact(d.sub(x_y, shift_logit), slope, shift_exponent);
        // Beside nothing, anything leads.
        let (height, fraction) = d.split(sum);
        let nothing = d.equal(sum, zero);
        let leads = d.either(d.less(height, t), nothing);
        // The integer part is exact, and so is what is left but for one rounding.
        let whole = real::nearest(d, t);
        let part = d.mul_sub_exact(d.sub(x_y, shift_logit), slope, d.add(shift_exponent, whole));
        let part = d.select(d.equal(whole, t), zero, part);
        // What is small beside x_y is so by a power of e, not of b: a confident row's loss is shift_logit
        // below 1. The exponent of rest is enough of its logarithm for that.
        // (Past 2^-2000 nothing is left.)
        let above = d.min(splat(2000.0), d.sub(t, height));
        let more = d.mul_add(splat(S::Real::EXCESS), above, part);
        let e = real::exp2_of(
            d,
            d.select(leads, d.sub(height, whole), whole),
            d.select(leads, negative(more), part),
        );
        let (a, b) = (d.select(leads, one, e), d.select(leads, d.mul(fraction, e), sum));
        let b = d.select(nothing, sum, b);
        let (total, error) = real::sum(d, a, b);
        let inverse = d.div(one, total);
        let (k, y) = real::ln_parts(d, total);
        // In the base of the sums.
        let y = d.mul(d.mul_add(error, inverse, y), splat(S::Real::RATIO));

        let (high_part, low_part) = (splat(S::Real::INVERSE.0), splat(S::Real::INVERSE.1));
        let scaled = |x, y| d.mul_sub_exact(x, high_part, negative(d.mul_add(x, low_part, y)));
        let steps = d.select(leads, k, d.sub(k, whole));
        let beside = d.select(leads, y, d.sub(y, d.mul(part, high_part)));
        let nll = scaled(steps, beside);
        // Infinities have no second part.
        let nll = d.select(d.equal(steps, infinity), steps, nll);
        let lse = d.select(
            leads,
            d.add(x_y, nll),
            d.add(shift_logit, scaled(d.add(shift_exponent, k), y)),
        );
        // A NaN is so for all, the same NaN on all sets; +inf unless there is one.
        let size = d.select(d.less(x_y, zero), negative(x_y), x_y);
        let infinite = d.either(d.equal(sum, infinity), d.equal(x_y, infinity));
        let lse = d.select(infinite, d.add(sum, size), lse);
        let numbers = d.both(d.equal(lse, lse), d.equal(sum, sum));
        let lse = d.select(numbers, lse, splat(f64::NAN));

        let unit = d.scale((), d.sub(splat(f64::MAGIC), height));
        let share = d.mul(d.select(leads, d.mul(e, unit), one), inverse);
        let hit = d.mul(a, inverse);
        Softmax {
            lse,
            height: d.select(leads, t, k),
            rise: d.select(leads, nll, y),
            nll,
            hit,
            // Beside a hit of 0 it is exactly 1.
            miss: d.select(leads, d.mul(b, inverse), d.sub(one, hit)),
            share: d.select(nothing, zero, share),
            shift_logit,
            shift_exponent,
        }
    }

    /// What the shares of [`by_sums`](Self::by_sums) are multiplied by where exponentials are powers of e
    /// from their shift on: shares are from x_y on, or from the exponent of the sum where x_y
    /// leads.
    #[inline(always)]
    fn base_e_factor(&self) -> WideVector<S> {
        let Rows { s, group, .. } = *self;
        let d = s.wide();
        let splat = |x: f64| d.splat(x);
        let (shift_exponent, x_y) = (self.get(&group.shift_exponent), self.get(&group.x_y));
        let above = d.sub(x_y, self.get(&group.shift_logit));
        let t = d.mul_sub_exact(above, splat(S::Real::L.to_f64()), shift_exponent);
        let (height, _) = d.split(d.add(self.get(&group.sum), self.get(&group.lost)));
        let level = d.mul(d.add(shift_exponent, height), splat(S::Real::INVERSE.0));
        let level = d.select(d.less(height, t), level, above);
        real::exp(d, d.mul(level, splat(-S::Real::EXCESS)))
    }

    /// The same from an lse that was computed elsewhere, with a shift close to it.
    #[inline(always)]
    fn by_lse(&self) -> Softmax<WideVector<S>> {
        let Rows { s, group, .. } = *self;
        let d = s.wide();
        let splat = |x: f64| d.splat(x);
        let (zero, slope) = (splat(0.0), splat(S::Real::L.to_f64()));
        let negative = |x| d.sub(zero, x);
        let (lse, x_y) = (self.get(&group.lse), self.get(&group.x_y));
        let shift_exponent = real::nearest(d, d.mul(lse, slope));
        let size = d.select(d.less(shift_exponent, zero), negative(shift_exponent), shift_exponent);
        let is_near = d.less(size, splat(S::Real::MAX_SHIFT + 0.5));
        // Of what is not finite nothing comes; it need not be shift_logit.
        let rounded = round(s, lse);
        let is_held = d.less(
            d.select(d.less(rounded, zero), negative(rounded), rounded),
            splat(f64::INFINITY),
        );
        let shift_logit = d.select(is_near, zero, d.select(is_held, rounded, zero));
        let shift_exponent = d.select(is_near, shift_exponent, zero);
        let below = d.mul_sub_exact(d.sub(shift_logit, lse), slope, negative(shift_exponent));
        let log_p = d.sub(x_y, lse);
        Softmax {
            lse,
            height: zero,
            rise: zero,
            nll: d.sub(lse, x_y),
            hit: real::exp(d, log_p),
            miss: negative(real::expm1(d, log_p)),
            share: real::exp2(d, below),
            shift_logit,
            shift_exponent,
        }
    }

    /// Of log-probabilities, whose lse is 0.
    #[inline(always)]
    fn of_logs(&self) -> Softmax<WideVector<S>> {
        let zero = self.s.wide().splat(0.0);
        let nll = self.s.wide().sub(zero, self.get(&self.group.x_y));
        Softmax {
            lse: zero,
            height: zero,
            rise: zero,
            nll,
            hit: zero,
            miss: zero,
            share: zero,
            shift_logit: zero,
            shift_exponent: zero,
        }
    }

    /// −Σ p·ln p: that of the choice between the class left out and the others, and of the others
    /// among themselves; no term is negative.
    #[inline(always)]
    fn entropy(&self, of: &Softmax<WideVector<S>>) -> WideVector<S> {
        let Rows { s, group, .. } = *self;
        let d = s.wide();
        let splat = |x: f64| d.splat(x);
        let (zero, inverse) = (splat(0.0), splat(S::Real::INVERSE.0));
        let (spread, first_moment) = (self.get(&group.spread), self.get(&group.first_moment));
        let among = d.mul(d.sub(real::log2(d, spread), d.div(first_moment, spread)), inverse);
        // −ln(1 − p_y), from p_y where that is the less.
        let (x_y, shift_logit, shift_exponent) =
            (self.get(&group.x_y), of.shift_logit, of.shift_exponent);
        let t =
            d.mul_sub_exact(d.sub(x_y, shift_logit), splat(S::Real::L.to_f64()), shift_exponent);
        let sum = d.add(self.get(&group.sum), self.get(&group.lost));
        let q = d.mul(d.sub(real::log2(d, sum), t), inverse);
        let (tail, _) = real::log1p(d, d.min(splat(1.0), d.div(of.hit, of.miss)));
        let away = d.select(d.less(of.hit, of.miss), tail, d.sub(of.nll, q));
        let others = d.select(d.less(zero, of.miss), d.mul(of.miss, d.add(away, among)), zero);
        let own = d.select(d.less(zero, of.hit), d.mul(of.hit, of.nll), zero);
        let finite = d.equal(d.mul(of.lse, zero), zero);
        d.select(finite, d.add(own, others), splat(f64::NAN))
    }
}

/// f64 rounded to the lanes' type.
#[inline(always)]
fn round<S: Simd>(s: S, v: WideVector<S>) -> WideVector<S> {
    let mut wide = s.widen(s.splat(S::Real::ZERO));
    wide.as_mut()[0] = v;
    s.widen(s.narrow(wide)).as_ref()[0]
}

/// Fills in what follows from the sums, or from lse: losses, and what the gradient is made of.
///
/// # Safety
/// The processor has what `s` stands for.
#[inline(always)]
pub unsafe fn finish<S: Simd<Real: Base>>(s: S, groups: &mut [RowGroup], plan: &Plan) {
    for group in groups {
        finish_one(s, group, plan);
    }
}

#[inline(always)]
fn finish_one<S: Simd<Real: Base>>(s: S, group: &mut RowGroup, plan: &Plan) {
    let d = s.wide();
    (group.extreme, group.scales) = (false, false);
    for at in (0..ROWS).step_by(<S::Wide as Simd>::LANES) {
        let rows = Rows { s, group, at };
        let softmax = if !plan.has_softmax() {
            rows.of_logs()
        } else if plan.is_from_lse() {
            rows.by_lse()
        } else {
            rows.by_sums()
        };
        let splat = |x: f64| d.splat(x);
        let (zero, one, nan) = (splat(0.0), splat(1.0), splat(f64::NAN));
        let kept = rows.get(&group.kept);
        let weighted = plan.row_weights.is_some();
        let r = if weighted { rows.get(&group.r) } else { one };
        let idle = d.either(d.equal(kept, zero), d.equal(r, zero));
        let finite = d.equal(d.mul(softmax.lse, zero), zero);
        let terms = Terms { rows, softmax, r, idle, finite };
        let family = matches!(plan.pass, Pass::Softmax | Pass::LogSoftmax);
        let losses = plan.has_losses().then(|| terms.losses(plan));
        let entropy = plan.entropy.is_some().then(|| rows.entropy(&softmax));
        let gradient = plan.gradient.as_ref().map(|gradient| {
            if !family {
                return terms.gradients(plan, gradient);
            }
            // A row of NaN has none, whatever it is asked for.
            let (factor, shift_exponent, entry) = match plan.pass {
                Pass::Softmax if plan.is_base_e() => (
                    d.mul(softmax.share, rows.base_e_factor()),
                    softmax.shift_exponent,
                    softmax.hit,
                ),
                Pass::Softmax => (softmax.share, softmax.shift_exponent, softmax.hit),
                // Counted from where logits have an exact distance to.
                _ => {
                    let whole = real::nearest(d, softmax.height);
                    let rest = d.sub(softmax.height, whole);
                    let rise = d.mul_add(rest, splat(S::Real::INVERSE.0), softmax.rise);
                    (rise, d.add(softmax.shift_exponent, whole), d.sub(zero, softmax.nll))
                }
            };
            RowGradients {
                job: d.select(finite, splat(job::SWEEP), splat(job::FILL)),
                fill: nan,
                entry: d.select(finite, entry, nan),
                shift_logit: softmax.shift_logit,
                shift_exponent,
                factor,
                bias: zero,
                scale: one,
            }
        });
        let put = |column: &mut Column, v: WideVector<S>| {
            // SAFETY: `at` is the first of a register of the eight.
            unsafe { d.store(column.as_mut_ptr().add(at), v) }
        };
        put(&mut group.lse, softmax.lse);
        if let Some((loss, z_loss)) = losses {
            put(&mut group.loss, loss);
            put(&mut group.z_loss, z_loss);
        }
        if let Some(entropy) = entropy {
            put(&mut group.entropy, entropy);
        }
        let Some(gradient) = gradient else { continue };
        put(&mut group.job, gradient.job);
        put(&mut group.fill, gradient.fill);
        put(&mut group.entry, gradient.entry);
        put(&mut group.shift_logit, gradient.shift_logit);
        put(&mut group.shift_exponent, gradient.shift_exponent);
        put(&mut group.factor, gradient.factor);
        put(&mut group.bias, gradient.bias);
        put(&mut group.scale, gradient.scale);
        put(&mut group.before, one);
        // In the middle of f32's range, or nothing that a product could hurt.
        let factor = gradient.factor;
        let size = d.select(d.less(factor, zero), d.sub(zero, factor), factor);
        let low = d.both(d.less(zero, size), d.less(size, splat(power_of_2(-100))));
        let high = d.both(d.less(splat(power_of_2(100)), size), d.equal(d.mul(size, zero), zero));
        group.extreme |= d.bits(d.either(low, high)) != 0 && plan.pass != Pass::LogSoftmax;
        group.scales |= d.bits(d.equal(gradient.scale, one)) != lanes_of::<S>();
    }
}

/// All bits of a register of f64.
const fn lanes_of<S: Simd>() -> u32 {
    (1 << <S::Wide as Simd>::LANES) - 1
}

/// `2^k`
pub const fn power_of_2(k: i64) -> f64 {
    f64::from_bits(((k + 1023) as u64) << 52)
}

/// What losses and gradients of a register of rows are made of.
struct Terms<'a, S: Simd> {
    rows: Rows<'a, S>,
    softmax: Softmax<WideVector<S>>,
    r: WideVector<S>,
    /// Rows that do not count, or with a weight of 0.
    idle: <S::Wide as Simd>::Mask,
    /// Rows whose lse is. A row of NaN, +inf or nothing but −inf has no probabilities, whatever its
    /// weights.
    finite: <S::Wide as Simd>::Mask,
}

/// See the columns of [`RowGroup`].
struct RowGradients<V> {
    job: V,
    fill: V,
    entry: V,
    shift_logit: V,
    shift_exponent: V,
    factor: V,
    bias: V,
    scale: V,
}

impl<S: Simd<Real: Base>> Terms<'_, S> {
    /// `a·b`, but 0 if `a` is.
    #[inline(always)]
    fn times(&self, a: WideVector<S>, b: WideVector<S>) -> WideVector<S> {
        let d = self.rows.s.wide();
        d.select(d.equal(a, d.splat(0.0)), d.splat(0.0), d.mul(a, b))
    }

    /// The weight or mass of the excluded.
    #[inline(always)]
    fn w_y(&self, plan: &Plan) -> WideVector<S> {
        let Rows { s, group, .. } = self.rows;
        if plan.has_masses() { self.rows.get(&group.w_y) } else { s.wide().splat(1.0) }
    }

    /// The cross-entropy and the z-loss part.
    #[inline(always)]
    fn losses(&self, plan: &Plan) -> (WideVector<S>, WideVector<S>) {
        let Terms { rows, softmax, r, idle, finite } = self;
        let Rows { s, group, .. } = *rows;
        let d = s.wide();
        let splat = |x: f64| d.splat(x);
        let zero = splat(0.0);
        let mut loss = zero;
        if plan.spreads_mass() {
            // Σ m_c·(lse − x_c), as M·(lse − center) − Σ m_c·(x_c − center); lse itself is rounded.
            let (center, x_y) = (rows.get(&group.center), rows.get(&group.x_y));
            let slope = splat(S::Real::L.to_f64());
            let above =
                d.mul_sub_exact(d.sub(center, softmax.shift_logit), slope, softmax.shift_exponent);
            let above = d.sub(softmax.height, above);
            let height = d.mul_add(above, splat(S::Real::INVERSE.0), softmax.rise);
            let has_excluded = d.less(splat(-0.5), rows.get(&group.excluded));
            let is_center = d.both(has_excluded, d.equal(center, x_y));
            let height = d.select(is_center, softmax.nll, height);
            let own = self.times(self.w_y(plan), d.sub(x_y, center));
            let dot = d.add(rows.get(&group.dot), d.select(has_excluded, own, zero));
            let lost = rows.get(&group.dot_lost);
            // The product is rounded with the difference, unless it is 0·inf.
            let less = |mass, height| {
                let nothing = d.equal(mass, zero);
                let difference = d.mul_sub_exact(mass, height, dot);
                d.sub(d.select(nothing, d.sub(zero, dot), difference), lost)
            };
            loss = if plan.has_indices() {
                let spread = splat(plan.label_smoothing / plan.classes as f64);
                d.mul(spread, less(splat(plan.weight_total), height))
            } else {
                less(rows.get(&group.mass), height)
            };
        }
        if plan.has_indices() {
            let weight = d.mul(splat(1.0 - plan.label_smoothing), self.w_y(plan));
            let own = d.mul_sub_exact(weight, softmax.nll, d.sub(zero, loss));
            loss = d.select(d.equal(weight, zero), loss, own);
        }
        let loss = d.select(*finite, d.mul(*r, loss), splat(f64::NAN));
        let mut z_loss = zero;
        if plan.z_loss != 0.0 {
            let square = d.mul(softmax.lse, softmax.lse);
            z_loss = d.mul(*r, d.mul(splat(plan.z_loss), square));
        }
        (d.select(*idle, zero, loss), d.select(*idle, zero, z_loss))
    }

    /// What the gradient is made of.
    #[inline(always)]
    fn gradients(&self, plan: &Plan, gradient: &Gradient) -> RowGradients<WideVector<S>> {
        let Terms { rows, softmax, r, idle, finite } = self;
        let Rows { s, group, .. } = *rows;
        let d = s.wide();
        let splat = |x: f64| d.splat(x);
        let (zero, one, nan) = (splat(0.0), splat(1.0), splat(f64::NAN));
        let (mut scale, mut z_scale) = (splat(gradient.scale), splat(gradient.z_scale));
        if gradient.output.is_some() {
            let output = rows.get(&group.output);
            (scale, z_scale) = (d.mul(scale, output), d.mul(z_scale, output));
        }
        let w_y = self.w_y(plan);
        let smoothing = plan.label_smoothing;
        // The target's own mass, what masses are multiplied by, and all but the target's own.
        let scaled = d.mul(scale, *r);
        let (mut hit, mut bias, mut others) = if plan.has_indices() {
            let hit = d.mul(d.mul(scaled, splat(1.0 - smoothing)), w_y);
            // Without smoothing there is none, whatever the scale.
            let bias = self.times(splat(smoothing / plan.classes as f64), scaled);
            (hit, bias, d.mul(bias, splat(plan.weight_total)))
        } else {
            (zero, scaled, self.times(scaled, rows.get(&group.mass)))
        };
        if plan.z_loss != 0.0 {
            let by = d.mul(d.mul(z_scale, *r), d.mul(splat(2.0 * plan.z_loss), softmax.lse));
            others = d.add(others, by);
        }
        if let Some(with) = &plan.transform
            && with.cap == 0.0
        {
            let by = splat(with.scale);
            (hit, bias, others) = (d.mul(hit, by), d.mul(bias, by), d.mul(others, by));
        }
        // By arithmetic: a branch would be hoisted to where there may be no gradient at all, and
        // decide nothing there, by memory that nobody wrote.
        let fresh = f64::from(u8::from(!gradient.accumulate));
        let constant = splat(job::NOTHING + fresh * (job::FILL - job::NOTHING));
        // `total·p_y - hit - own`, such that nothing cancels that needs not.
        // No mass is none under any factor, as in the sweeps over the other classes.
        let own = d.select(d.equal(w_y, zero), zero, self.times(bias, w_y));
        let total = d.add(hit, others);
        let (work, entry, good);
        if plan.has_softmax() {
            let nothing = |x| d.equal(x, zero);
            let none = d.both(d.both(nothing(hit), nothing(bias)), nothing(total));
            let value = if plan.has_indices() {
                let rest = d.sub(d.mul(others, softmax.hit), own);
                d.add(d.mul(hit, d.sub(zero, softmax.miss)), rest)
            } else {
                let low = d.sub(d.mul(total, softmax.hit), own);
                let high = d.sub(d.sub(total, own), d.mul(total, softmax.miss));
                let size = d.select(d.less(total, zero), d.sub(zero, total), total);
                let is_low = d.less(softmax.hit, softmax.miss);
                d.select(d.either(is_low, d.equal(size, splat(f64::INFINITY))), low, high)
            };
            let value = if plan.transform.is_some_and(|with| with.cap > 0.0) {
                d.mul(rows.get(&group.slope), value)
            } else {
                value
            };
            entry = d.select(none, zero, value);
            work = d.select(none, constant, splat(job::SWEEP));
            good = d.both(*finite, d.equal(total, total));
        } else {
            entry = d.sub(zero, d.add(hit, own));
            // Without a bias only the target's own is anything else than 0.
            let alone = job::TARGET + fresh * (job::FILL - job::TARGET);
            let single = d.select(d.equal(entry, zero), constant, splat(alone));
            work = d.select(d.equal(bias, zero), single, splat(job::SWEEP));
            good = *finite;
        }
        // Terms that lanes cannot hold may have a difference that they can.
        let limit = if plan.logits.dtype.has_short_lanes() { 100 } else { 1000 };
        let small = |x| {
            let size = d.select(d.less(x, zero), d.sub(zero, x), x);
            d.less(size, splat(power_of_2(limit)))
        };
        let fits = d.both(small(total), small(bias));
        let down = d.select(fits, one, splat(power_of_2(-limit)));
        let fill = d.select(good, zero, nan);
        let work = d.select(good, work, splat(job::FILL));
        let entry = d.select(good, entry, nan);
        RowGradients {
            job: d.select(*idle, constant, work),
            fill: d.select(*idle, zero, fill),
            entry: d.select(*idle, zero, entry),
            shift_logit: softmax.shift_logit,
            shift_exponent: softmax.shift_exponent,
            factor: d.mul(softmax.share, d.mul(total, down)),
            bias: d.mul(bias, down),
            scale: d.select(fits, one, splat(power_of_2(limit))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dispatch::Isa;
    use crate::math::exp2::nearest;
    use crate::plan::Dtype;
    use crate::simd::portable::{Portable, PortableWide};

    const INF: f64 = f64::INFINITY;
    const NAN: f64 = f64::NAN;

    /// Lanes of f32, and of f64; both with the base that they work in.
    const LANES: [(Dtype, f64); 2] = [(Dtype::F32, f32::L as f64), (Dtype::F64, f64::L)];

    /// The numbers of one row.
    #[derive(Clone, Copy, Debug)]
    struct One {
        shift_logit: f64,
        shift_exponent: f64,
        sum: f64,
        spread: f64,
        first_moment: f64,
        x_y: f64,
        lse: f64,
        height: f64,
        rise: f64,
        nll: f64,
        hit: f64,
        miss: f64,
        share: f64,
        entropy: f64,
    }

    impl One {
        const EMPTY: One = One {
            shift_logit: 0.0,
            shift_exponent: 0.0,
            sum: 1.0,
            spread: 1.0,
            first_moment: 0.0,
            x_y: 0.0,
            lse: 0.0,
            height: 0.0,
            rise: 0.0,
            nll: 0.0,
            hit: 0.0,
            miss: 0.0,
            share: 0.0,
            entropy: 0.0,
        };

        fn fields(&self) -> [f64; 13] {
            let One { shift_logit, shift_exponent, sum, spread, first_moment, x_y, .. } = *self;
            let One { lse, rise, nll, hit, miss, share, entropy, .. } = *self;
            [
                shift_logit,
                shift_exponent,
                sum,
                spread,
                first_moment,
                x_y,
                lse,
                rise,
                nll,
                hit,
                miss,
                share,
                entropy,
            ]
        }
    }

    /// What follows from the columns of an group, by lane.
    #[inline(always)]
    fn judge<S: Simd<Real: Base>>(s: S, group: &RowGroup, from_lse: bool) -> [[f64; 10]; ROWS] {
        let mut results = [[0.0; 10]; ROWS];
        let wide = <S::Wide as Simd>::LANES;
        for at in (0..ROWS).step_by(wide) {
            let rows = Rows { s, group, at };
            let got = if from_lse { rows.by_lse() } else { rows.by_sums() };
            let entropy = if from_lse { got.lse } else { rows.entropy(&got) };
            let Softmax { lse, height, rise, nll, hit, miss, share, shift_logit, shift_exponent } =
                got;
            let all =
                [shift_logit, shift_exponent, lse, height, rise, nll, hit, miss, share, entropy];
            for (field, v) in all.into_iter().enumerate() {
                let mut column = [0.0; ROWS];
                // SAFETY: no register is longer.
                unsafe { s.wide().store(column.as_mut_ptr(), v) };
                for (lane, x) in column[..wide].iter().enumerate() {
                    results[at + lane][field] = *x;
                }
            }
        }
        results
    }

    macro_rules! stamp {
        ($name:ident, $token:ty $(, $feature:tt)*) => {
            $(#[target_feature(enable = $feature)])*
            unsafe fn $name(group: &RowGroup, from_lse: bool) -> [[f64; 10]; ROWS] {
                // SAFETY: this function's own features.
                judge(unsafe { <$token>::assume() }, group, from_lse)
            }
        };
    }
    stamp!(portable, Portable);
    stamp!(portable_wide, PortableWide);
    #[cfg(x86_sets)]
    mod x86 {
        use super::*;
        use crate::simd::avx2::{Avx2, Avx2Wide};
        use crate::simd::avx512::{Avx512, Avx512Wide};

        stamp!(avx2, Avx2, "avx2", "fma");
        stamp!(avx2_wide, Avx2Wide, "avx2", "fma");
        stamp!(avx512, Avx512, "avx512f", "avx512bw", "avx512dq", "avx512vl");
        stamp!(avx512_wide, Avx512Wide, "avx512f", "avx512bw", "avx512dq", "avx512vl");
        pub const ALL: [(Isa, [Judge; 2]); 2] =
            [(Isa::Avx2, [avx2, avx2_wide]), (Isa::Avx512, [avx512, avx512_wide])];
    }
    #[cfg(not(x86_sets))]
    mod x86 {
        pub const ALL: [(super::Isa, [super::Judge; 2]); 0] = [];
    }
    type Judge = unsafe fn(&RowGroup, bool) -> [[f64; 10]; ROWS];

    /// The rows on every set, in every lane, for one type of lanes; the sets that fuse have the
    /// same bits, and no lane looks at another.
    fn run(dtype: Dtype, rows: &[One], from_lse: bool) -> Vec<(Isa, Vec<One>)> {
        let mut all: Vec<(Isa, Vec<One>)> = Vec::new();
        let sets = [(Isa::Portable, [portable as Judge, portable_wide])];
        for (isa, judges) in sets.into_iter().chain(x86::ALL) {
            if !isa.is_available() {
                println!("SKIPPED: this processor does not have {}", isa.name());
                continue;
            }
            let judge = judges[usize::from(dtype == Dtype::F64)];
            let mut results = vec![One::EMPTY; rows.len()];
            for turn in 0..ROWS {
                for start in (0..rows.len()).step_by(ROWS) {
                    let at = |lane: usize| start + (lane + turn) % ROWS;
                    let mut group = RowGroup::EMPTY;
                    for lane in 0..ROWS {
                        let row = rows.get(at(lane)).unwrap_or(&One::EMPTY);
                        (group.shift_logit[lane], group.shift_exponent[lane]) =
                            (row.shift_logit, row.shift_exponent);
                        (group.spread[lane], group.first_moment[lane]) =
                            (row.spread, row.first_moment);
                        group.sum[lane] = row.sum;
                        (group.x_y[lane], group.lse[lane]) = (row.x_y, row.lse);
                    }
                    // SAFETY: available.
                    let judged = unsafe { judge(&group, from_lse) };
                    for (lane, judged) in judged.into_iter().enumerate() {
                        let Some(result) = results.get_mut(at(lane)) else { continue };
                        let [
                            shift_logit,
                            shift_exponent,
                            lse,
                            height,
                            rise,
                            nll,
                            hit,
                            miss,
                            share,
                            entropy,
                        ] = judged;
                        let row = rows[at(lane)];
                        let got = One {
                            shift_logit,
                            shift_exponent,
                            lse,
                            height,
                            rise,
                            nll,
                            hit,
                            miss,
                            share,
                            entropy,
                            ..row
                        };
                        let bits = |one: &One| one.fields().map(f64::to_bits);
                        assert!(turn == 0 || bits(result) == bits(&got), "lane {lane}: {got:?}");
                        *result = got;
                    }
                }
            }
            if let Some((other, good)) = all.iter().find(|(isa, _)| *isa != Isa::Portable) {
                for (a, b) in results.iter().zip(good) {
                    let bits = |x: f64| if x.is_nan() { 0 } else { x.to_bits() };
                    let same = a.fields().map(bits) == b.fields().map(bits);
                    assert!(same, "{a:?} on {isa:?}, {b:?} on {other:?}");
                }
            }
            all.push((isa, results));
        }
        all
    }

    fn times(a: f64, b: f64) -> f64 {
        if a == 0.0 { 0.0 } else { a * b }
    }

    #[track_caller]
    fn close(got: f64, want: f64, bound: f64, what: &str, row: &One) {
        let good = got == want || (got - want).abs() <= bound || got.is_nan() && want.is_nan();
        assert!(good, "{what} is {got:e}, not {want:e} (by {bound:e}): {row:?}");
    }

    /// The formulas at the head of this file, with the standard library's functions.
    #[test]
    fn ends_by_the_formulas() {
        for (dtype, l) in LANES {
            let mut rows = Vec::new();
            for shift_exponent in [0.0, 3.0, -40.0, 1e3, -1e6] {
                for sum in [0.5, 0.7, 1.0, 1.5, 1e4, 1e18, 1e300] {
                    let rest = (shift_exponent + f64::log2(sum)) / l;
                    for q in [-680.0, -75.0, -36.0, -1.0, -1e-3, 0.0, 1e-9, 0.7, 20.0, 80.0, 690.0]
                    {
                        rows.push(One { shift_exponent, sum, x_y: rest - q, ..One::EMPTY });
                    }
                }
            }
            for shift_logit in [1e30, -3e38, 5e17] {
                for d in [0.0, 1.0, -1.0] {
                    let x_y = shift_logit * (1.0 + d * f64::EPSILON);
                    rows.push(One { shift_logit, sum: 2.5, x_y, ..One::EMPTY });
                }
            }
            for (isa, results) in run(dtype, &rows, false) {
                for row in &results {
                    let height = row.sum.log2();
                    let rest = row.shift_logit + (row.shift_exponent + height) / l;
                    let q =
                        ((row.shift_logit - row.x_y).mul_add(l, row.shift_exponent) + height) / l;
                    let (lse, nll) = if q > 0.0 {
                        (rest + (-q).exp().ln_1p(), q + (-q).exp().ln_1p())
                    } else {
                        (row.x_y + q.exp().ln_1p(), q.exp().ln_1p())
                    };
                    // Both terms of q are rounded, and so is what e^q makes of that.
                    let slip = 3e-16 * (row.shift_exponent.abs() + height.abs() + q.abs()) + 2e-15;
                    // Of powers of b that are taken for powers of e, and of rest by its exponent.
                    let base = if dtype == Dtype::F32 { 2e-8 } else { 0.0 };
                    let powers = slip + base * (1.0 + q.abs());
                    let what = isa.name();
                    close(row.lse, lse, slip + base + 1e-15 * lse.abs(), what, row);
                    // To the last digits where lse itself is rounded shift_logit more: from a height that
                    // is close.
                    let t = (row.x_y - row.shift_logit).mul_add(l, -row.shift_exponent);
                    let rise = if q > 0.0 {
                        (height - row.height) / l + (-q).exp().ln_1p()
                    } else {
                        (t - row.height) / l + nll
                    };
                    assert!(rise.abs() < 1.1, "{row:?}");
                    close(row.rise, rise, slip + base + 1e-15, what, row);
                    close(row.nll, nll, (slip + 2e-15 + base) * nll, what, row);
                    let (hit, miss) = (1.0 / (1.0 + q.exp()), 1.0 / (1.0 + (-q).exp()));
                    close(row.hit, hit, (powers + 2e-15) * hit, what, row);
                    close(row.miss, miss, (slip + 2e-15 + base) * miss, what, row);
                    let share = miss / row.sum;
                    close(row.share, share, (slip + 3e-15 + base) * share, what, row);
                }
            }
        }
    }

    /// Whole rows, with one class left out or none, against sums over all classes.
    #[test]
    fn entropy_by_definition() {
        let rows: [&[f64]; 8] = [
            &[0.0, 0.0, 0.0, 0.0],
            &[1.0, -2.0, 3.5, 0.25],
            &[40.0, 0.0, 1.0, -3.0],
            &[0.0, 40.0, 39.0, 39.5],
            &[-5.0, -INF, -6.0, -INF],
            &[-INF, 3.0, 2.0, -INF],
            &[1e3, 1e3 + 1.0, 1e3 - 0.5, 1e3],
            &[30.0, -650.0, 29.0, 0.0],
        ];
        for (dtype, l) in LANES {
            let bound = if dtype == Dtype::F32 { 1e-6 } else { 1e-13 };
            let (mut all, mut want) = (Vec::new(), Vec::new());
            for x in rows {
                let max = x.iter().copied().fold(-INF, f64::max);
                let total: f64 = x.iter().map(|x| (x - max).exp()).sum();
                let lse = max + total.ln();
                let entropy: f64 = x.iter().map(|x| times((x - lse).exp(), lse - x)).sum();
                for excluded in [None, Some(0)] {
                    for shift in [0.0, 7.0, -11.0] {
                        let shift_exponent = nearest(max * l) + shift;
                        let mut row =
                            One { shift_exponent, sum: 0.0, spread: 0.0, x_y: -INF, ..One::EMPTY };
                        for (c, x) in x.iter().enumerate() {
                            if excluded == Some(c) {
                                row.x_y = *x;
                                continue;
                            }
                            let t = x.mul_add(l, -shift_exponent);
                            row.sum += t.exp2();
                            // From another shift than the sum.
                            let t = x.mul_add(l, -nearest(max * l));
                            row.spread += t.exp2();
                            row.first_moment += times(t.exp2(), t);
                        }
                        all.push(row);
                        want.push((lse, entropy));
                    }
                }
            }
            for (isa, results) in run(dtype, &all, false) {
                for (row, (lse, entropy)) in results.iter().zip(&want) {
                    close(row.lse, *lse, bound * (1.0 + lse.abs()), isa.name(), row);
                    close(row.entropy, *entropy, bound * (1.0 + lse.abs()), isa.name(), row);
                }
            }
        }
    }

    /// What is not finite: NaN over +inf, and −inf for no classes at all.
    #[test]
    fn ends_of_ends() {
        for (dtype, l) in LANES {
            let values = [-INF, -3.0, INF, NAN];
            let mut rows = Vec::new();
            for sum in [0.0, 2.0, INF, NAN] {
                for x_y in values {
                    for shift_exponent in [0.0, 5.0] {
                        rows.push(One { sum, x_y, shift_exponent, ..One::EMPTY });
                    }
                }
            }
            for (isa, results) in run(dtype, &rows, false) {
                for row in &results {
                    let what = isa.name();
                    let rest = (row.shift_exponent + row.sum.log2()) / l;
                    let lse = match (rest, row.x_y) {
                        (rest, x_y) if rest.is_nan() || x_y.is_nan() => NAN,
                        (rest, x_y) if rest == INF || x_y == INF => INF,
                        (f64::NEG_INFINITY, x_y) => x_y,
                        (rest, f64::NEG_INFINITY) => rest,
                        (rest, x_y) => rest.max(x_y) + (-(rest - x_y).abs()).exp().ln_1p(),
                    };
                    let base = if dtype == Dtype::F32 { 1.34e-8 } else { 0.0 };
                    close(row.lse, lse, base + 1e-14, what, row);
                    if row.sum == 0.0 && row.x_y == -3.0 {
                        // Certain, exactly.
                        assert_eq!((row.lse, row.nll, row.entropy), (-3.0, 0.0, 0.0), "{row:?}");
                        assert_eq!((row.hit, row.miss, row.share), (1.0, 0.0, 0.0), "{row:?}");
                    }
                    if row.sum == 2.0 && row.x_y == -INF {
                        assert_eq!((row.nll, row.hit, row.miss), (INF, 0.0, 1.0), "{row:?}");
                        assert_eq!(row.share, 0.5, "{row:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn from_lse_by_the_formulas() {
        for (dtype, l) in LANES {
            let mut rows = Vec::new();
            for lse in [0.0, 0.3, -7.25, 88.0, -700.0, 1e4, -4.54e4, 4.55e4, 1e9, -3.9e14, 1e17] {
                for below in [0.0, 1e-12, 1e-3, 0.5, 3.0, 40.0, 90.0, 650.0, INF] {
                    rows.push(One { lse, x_y: lse - below, ..One::EMPTY });
                }
                // An lse that is none of this row's: p above 1.
                rows.push(One { lse, x_y: lse + 2.0, ..One::EMPTY });
            }
            for (isa, results) in run(dtype, &rows, true) {
                for row in &results {
                    let what = isa.name();
                    let log_p = row.x_y - row.lse;
                    assert_eq!(row.nll, -log_p, "{row:?}");
                    let slip = 2e-15 + 2e-17 * log_p.abs();
                    let hit = log_p.exp();
                    close(row.hit, hit, slip * hit, what, row);
                    close(row.miss, -log_p.exp_m1(), slip * log_p.exp_m1().abs(), what, row);
                    // A shift that the lanes hold, an integer or shift_logit, shift_exponent the lse.
                    let is_held =
                        dtype == Dtype::F64 || f64::from(row.shift_logit as f32) == row.shift_logit;
                    assert!(
                        is_held && (row.shift_logit == 0.0 || row.shift_exponent == 0.0),
                        "{row:?}"
                    );
                    assert!(row.shift_exponent == row.shift_exponent.round(), "{row:?}");
                    let t = (row.shift_logit - row.lse).mul_add(l, row.shift_exponent);
                    let step = if dtype == Dtype::F32 { 6e-8 * row.lse.abs() } else { 0.0 };
                    assert!(
                        t.abs() <= 0.5001 + if row.shift_logit == 0.0 { 0.0 } else { step * l }
                    );
                    let share = if t < -1022.5 { 0.0 } else { t.exp2() };
                    close(row.share, share, (2e-15 + 3e-16 * t.abs()) * share, what, row);
                }
            }
            // Nothing comes of an lse that is not finite, least of all a shift.
            let rows = [INF, -INF, NAN].map(|lse| One { lse, ..One::EMPTY });
            for (_, results) in run(dtype, &rows, true) {
                for row in results {
                    assert_eq!((row.shift_logit, row.shift_exponent), (0.0, 0.0));
                }
            }
        }
    }
}
