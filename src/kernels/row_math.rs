//! The arithmetic of rows, eight at a time, one a lane, in f64: from what their operands say and their
//! sums to losses and to the coefficients of their gradients. It knows no memory but the lanes of those
//! eight rows, and no problem but the scalars of [`RowOptions`].
//!
//! # Losses
//!
//! The kernels exclude the target y from their sums. With `rest = Σ 2^t_c` over the other classes, and t_y
//! the target's own exponent from the same shift, everything that a confident prediction needs follows
//! without cancellation:
//!
//! ```text
//! a = 2^t_y, b = rest             or, where the first is the larger, a = 1, b = rest·2^-t_y
//!
//! p_y     = a/(a + b)             1 - p_y = b/(a + b)
//! -logp_y = ln(a + b) - ln a      exact down to b = 1e-300, by the rounding error of a + b
//! lse     = (c + log2(a + b))/L   or x_y - logp_y
//! ```
//!
//! That takes one exponential, one logarithm and one division.
//!
//! Probability targets exclude the class of the largest logit instead. Their loss is
//! `M·lse - Σ m_c·x_c` with the masses m and their sum M. Label smoothing adds a loss of the same form.
//!
//! # Gradients
//!
//! The gradient of a row, `T·(p_c - [c=y]) + B·(W·p_c - w_c)`, is `P·p_c - B·w_c` with `P = T + B·W`
//! everywhere but at the excluded class, whose entry is formed here. The z-loss λ·lse² adds 2λ·lse to P.
//! For probability targets the masses are what the gradient subtracts.
//!
//! The entropy bonus -β·H adds `β·p_c·(logp_c + H)`, which differs by class: see entropy_bonus.rs.
//!
//! # Bases
//!
//! Exponentials are powers of `b = 2^L` (math/exp2.rs), and the logarithms of their sums are to base b:
//! `ln rest` is taken as `(c + log2 Σ 2^(L·x - c))/L`. In f32 lanes, that is the log-sum-exp at a
//! temperature 1.3e-8 from 1, whatever the shift c. `c/L + ln Σ 2^…` would mix the bases, and err by
//! 1.3e-8 times the distance between shift and result.

use super::logit_transform::Transform;
use crate::math::exp2::{Base, WHOLE_MAGIC, exponent};
use crate::math::real;
use crate::simd::{Doubles, Real, Simd, WideVector};

pub use crate::strategy::ROWS;

/// A number for each row of a group.
pub type RowLanes = [f64; ROWS];

/// What the operands say about a group of rows.
#[derive(Clone, Copy, Debug)]
#[repr(align(64))]
pub struct RowInputs {
    /// The class that the sums exclude: the target, or the class of the largest logit. Below 0:
    /// [`IGNORED`](Self::IGNORED) or [`ALL_CLASSES`](Self::ALL_CLASSES).
    pub excluded: RowLanes,
    /// x_y, the logit of the excluded class; -inf for none.
    pub x_y: RowLanes,
}

impl RowInputs {
    /// The row does not count.
    pub const IGNORED: f64 = -1.0;
    /// The row counts, and its sums exclude no class.
    pub const ALL_CLASSES: f64 = -2.0;
    /// Rows that do not count.
    pub const EMPTY: RowInputs =
        RowInputs { excluded: [Self::IGNORED; ROWS], x_y: [f64::NEG_INFINITY; ROWS] };

    /// The class that a row's sums exclude.
    #[inline(always)]
    pub fn class(&self, row: usize) -> Option<usize> {
        (self.excluded[row] >= 0.0).then_some(self.excluded[row] as usize)
    }

    /// Whether the row counts.
    #[inline(always)]
    pub fn is_kept(&self, row: usize) -> bool {
        self.excluded[row] != Self::IGNORED
    }
}

/// What options say about a group of rows: read only where [`RowOptions`] says that it is there.
#[derive(Clone, Copy, Debug)]
#[repr(align(64))]
pub struct RowFactors {
    /// The derivative of the cap at x_y, by which the entry is multiplied.
    pub slope: RowLanes,
    /// The weight or mass of the excluded class.
    pub class_mass: RowLanes,
    /// r, the weight of the row.
    pub row_weight: RowLanes,
    /// grad_output of the row.
    pub grad_output: RowLanes,
}

impl RowFactors {
    /// Factors of rows without options.
    pub const ONE: RowFactors = RowFactors {
        slope: [1.0; ROWS],
        class_mass: [1.0; ROWS],
        row_weight: [1.0; ROWS],
        grad_output: [1.0; ROWS],
    };
}

/// The exponential sums of a group of rows.
#[derive(Clone, Copy, Debug)]
#[repr(align(64))]
pub struct RowSums {
    /// The exponent of the shift that the exponentials are counted from.
    pub shift_exponent: RowLanes,
    /// Σ 2^t over all classes but the excluded one.
    pub sum: RowLanes,
    /// What the roundings of `sum` lost.
    pub error: RowLanes,
    /// The logit of the shift: all 0 unless `by_logit`, so that it need not be read.
    pub shift_logit: RowLanes,
    /// Some row's shift may have a logit.
    pub by_logit: bool,
}

impl RowSums {
    /// The sums over no classes.
    pub const EMPTY: RowSums = RowSums {
        shift_exponent: [0.0; ROWS],
        sum: [0.0; ROWS],
        error: [0.0; ROWS],
        shift_logit: [0.0; ROWS],
        by_logit: false,
    };

    /// Takes the logits out of the shifts.
    #[inline(always)]
    pub fn clear_shift_logits(&mut self) {
        if self.by_logit {
            (self.shift_logit, self.by_logit) = ([0.0; ROWS], false);
        }
    }
}

/// What the entropy of a group of rows needs.
#[derive(Clone, Copy, Debug)]
#[repr(align(64))]
pub struct RowMoments {
    /// The sum of the exponentials that the moment is of.
    pub sum: RowLanes,
    /// Σ t·2^t
    pub first_moment: RowLanes,
}

impl RowMoments {
    /// The moments of no classes.
    pub const EMPTY: RowMoments = RowMoments { sum: [0.0; ROWS], first_moment: [0.0; ROWS] };
}

/// What the loss of a group of rows needs where a mass is spread over the classes.
#[derive(Clone, Copy, Debug)]
#[repr(align(64))]
pub struct WeightedSums {
    /// What logits are taken relative to in `dot`.
    pub center: RowLanes,
    /// `Σ m_c·(x_c - center)` over all classes but the excluded one.
    pub dot: RowLanes,
    /// What the roundings of `dot` lost.
    pub error: RowLanes,
    /// `Σ m_c` of probability targets.
    pub mass: RowLanes,
}

impl WeightedSums {
    /// The sums over no classes.
    pub const EMPTY: WeightedSums = WeightedSums {
        center: [0.0; ROWS],
        dot: [0.0; ROWS],
        error: [0.0; ROWS],
        mass: [0.0; ROWS],
    };
}

/// What the entropy bonus of a group of rows needs, and what its gradient is then made of
/// ([`entropy_bonus::finish`](super::entropy_bonus::finish)).
#[derive(Clone, Copy, Debug)]
#[repr(align(64))]
pub struct BonusLanes {
    /// The lse in two parts: its distance from the shift in units of log2, and what it is above that.
    pub lse_exponent: RowLanes,
    /// See `lse_exponent`.
    pub lse_rest: RowLanes,
    /// −logp_y
    pub nll: RowLanes,
}

impl BonusLanes {
    /// The numbers of rows without a bonus.
    pub const NONE: BonusLanes =
        BonusLanes { lse_exponent: [0.0; ROWS], lse_rest: [0.0; ROWS], nll: [0.0; ROWS] };

    /// Where the shift's exponent goes: the sweeps form the bonus of class c as `e^(x - shift)·(t·slope + level)`,
    /// with the exponents t counted from the same shift. It has the logit of the sums' shift.
    #[inline(always)]
    pub fn exponent(&self) -> &RowLanes {
        &self.lse_exponent
    }

    /// Where the slope goes.
    #[inline(always)]
    pub fn slope(&self) -> &RowLanes {
        &self.lse_rest
    }

    /// Where the level goes.
    #[inline(always)]
    pub fn level(&self) -> &RowLanes {
        &self.nll
    }
}

/// The results of a group of rows; those that are not asked for are not written.
#[derive(Clone, Copy, Debug)]
#[repr(align(64))]
pub struct RowResults {
    /// The cross-entropy part of the loss.
    pub loss: RowLanes,
    /// ln Σ exp x: an operand of a backward.
    pub lse: RowLanes,
    /// The z-loss part of the loss.
    pub z_loss: RowLanes,
    /// −Σ p·ln p: an operand of a backward from the merged states of shards.
    pub entropy: RowLanes,
    /// The entropy bonus's part of the loss.
    pub entropy_bonus: RowLanes,
}

impl RowResults {
    /// Results of no rows.
    pub const EMPTY: RowResults = RowResults {
        loss: [0.0; ROWS],
        lse: [0.0; ROWS],
        z_loss: [0.0; ROWS],
        entropy: [0.0; ROWS],
        entropy_bonus: [0.0; ROWS],
    };
}

/// What the second sweep over a row computes from its logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OutputTerm {
    /// Nothing: the output is what is subtracted.
    None,
    /// Exponentials in the base of the sums.
    Exponentials,
    /// Exponentials of base e: the output is a softmax, not a gradient.
    BaseE,
    /// The logits less the lse: the output is a log-softmax.
    LogSoftmax,
}

/// What remains to be done for the gradient of a row.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum GradientAction {
    /// Nothing: the gradient is 0 and accumulated.
    Nothing,
    /// Write the entry of the excluded class alone.
    Entry,
    /// Write this value to every class, and then the entry.
    Fill(f64),
    /// Sweep over the classes, and then write the entry.
    Sweep,
}

/// What the gradients of a group of rows are made of:
/// `(2^t·first_factor·factor - bias·m_c)·scale` for class c, and `entry` for the excluded class.
#[derive(Clone, Copy, Debug)]
#[repr(align(64))]
pub struct Coefficients {
    /// What 2^t is multiplied by. For a log-softmax: what lse is above the shift.
    pub factor: RowLanes,
    /// The gradient of the excluded class.
    pub entry: RowLanes,
    /// What is subtracted, times the mass of the class if masses differ: read only if
    /// [`GradientOptions::has_bias`].
    pub bias: RowLanes,
    /// A power of 2 that is 1 but where f32 or f64 could not hold the terms of the difference: read only
    /// if `has_scale`.
    pub scale: RowLanes,
    /// Bit i: row i gets a gradient at all.
    pub writes: u8,
    /// Bit i: row i is swept.
    pub sweeps: u8,
    /// Bit i: every class of row i gets the same value.
    pub fills: u8,
    /// Bit i: that value is NaN rather than 0.
    pub fills_nan: u8,
    /// Some scale is not 1.
    pub has_scale: bool,
    /// Some factor is so large or small that it is applied in two steps.
    pub has_extreme_factor: bool,
}

impl Coefficients {
    /// The coefficients of no rows.
    pub const EMPTY: Coefficients = Coefficients {
        factor: [0.0; ROWS],
        entry: [0.0; ROWS],
        bias: [0.0; ROWS],
        scale: [1.0; ROWS],
        writes: 0,
        sweeps: 0,
        fills: 0,
        fills_nan: 0,
        has_scale: false,
        has_extreme_factor: false,
    };

    /// What remains to be done for a row.
    #[inline(always)]
    pub fn action(&self, row: usize) -> GradientAction {
        let is_set = |mask: u8| mask >> row & 1 == 1;
        if !is_set(self.writes) {
            GradientAction::Nothing
        } else if is_set(self.sweeps) {
            GradientAction::Sweep
        } else if is_set(self.fills) {
            GradientAction::Fill(if is_set(self.fills_nan) { f64::NAN } else { 0.0 })
        } else {
            GradientAction::Entry
        }
    }
}

/// Where the lse of a row comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LseSource {
    /// The exponential sums.
    Sums,
    /// An operand.
    Operand,
    /// The logits are log-probabilities, whose lse is 0.
    LogProbs,
}

/// The scalars that the arithmetic of every row depends on.
#[derive(Clone, Copy, Debug)]
pub struct RowOptions {
    /// Where the lse comes from.
    pub lse: LseSource,
    /// Targets are class indices; else they are probabilities, or absent.
    pub has_indices: bool,
    /// A mass is spread over the classes: [`WeightedSums`] are there.
    pub spreads_mass: bool,
    /// [`RowFactors::class_mass`] is there.
    pub has_class_masses: bool,
    /// [`RowFactors::row_weight`] is there.
    pub has_row_weights: bool,
    /// ε
    pub label_smoothing: f64,
    /// ε/C
    pub smoothing_share: f64,
    /// Σ of the class weights; the number of classes without them.
    pub weight_total: f64,
    /// λ
    pub z_loss: f64,
    /// β: if it is not 0, [`RowMoments`] are there, or the entropy is an operand.
    pub entropy_bonus: f64,
    /// What happened to the logits; with a cap, [`RowFactors::slope`] is there.
    pub transform: Option<Transform>,
    /// Losses are wanted.
    pub wants_losses: bool,
    /// The lse is wanted.
    pub wants_lse: bool,
    /// The entropy is wanted: [`RowMoments`] are there.
    pub wants_entropy: bool,
    /// The gradient, if it is wanted.
    pub gradient: Option<GradientOptions>,
}

/// The scalars that the gradient of every row depends on.
#[derive(Clone, Copy, Debug)]
pub struct GradientOptions {
    /// The factor of the cross-entropy part.
    pub scale: f64,
    /// The factor of the z-loss part.
    pub z_scale: f64,
    /// [`RowFactors::grad_output`] is there.
    pub has_grad_output: bool,
    /// Something is subtracted: the targets are probabilities, or there is label smoothing.
    pub has_bias: bool,
    /// The rows whose gradient is written even if it is 0: all, or none where it is accumulated.
    pub overwritten: u8,
}

/// A group of rows on its way through the row arithmetic.
#[derive(Clone, Copy, Debug)]
pub struct RowGroup {
    /// What the operands say.
    pub inputs: RowInputs,
    /// The exponential sums. From an lse operand, the shift of the gradient is written here; for a
    /// log-softmax, the shift is moved.
    pub sums: RowSums,
    /// The results; the lse is read where it is an operand.
    pub results: RowResults,
    /// The coefficients of the gradient.
    pub coefficients: Coefficients,
}

impl RowGroup {
    /// A group of rows that do not count.
    pub const EMPTY: RowGroup = RowGroup {
        inputs: RowInputs::EMPTY,
        sums: RowSums::EMPTY,
        results: RowResults::EMPTY,
        coefficients: Coefficients::EMPTY,
    };
}

/// What options need of a group of rows. A call without these options has none.
#[derive(Clone, Copy, Debug)]
pub struct RowGroupExtras {
    /// What options say.
    pub factors: RowFactors,
    /// What the entropy needs.
    pub moments: RowMoments,
    /// What spread masses need.
    pub weighted: WeightedSums,
    /// What the entropy bonus needs.
    pub bonus: BonusLanes,
}

impl RowGroupExtras {
    /// What rows without options have.
    pub const NONE: RowGroupExtras = RowGroupExtras {
        factors: RowFactors::ONE,
        moments: RowMoments::EMPTY,
        weighted: WeightedSums::EMPTY,
        bonus: BonusLanes::NONE,
    };
}

/// Whether a logit is so far below others that their distances from it would lose digits.
#[inline(always)]
pub fn is_far_below(x: f64, others: f64) -> bool {
    x < others - 64.0
}

/// What the sums of some rows say about their softmax.
#[derive(Clone, Copy)]
struct Softmax<V> {
    /// ln Σ exp x
    lse: V,
    /// The lse in two parts, since it is rounded: its distance from the shift in units of log2, and
    /// `lse_rest`, what it is above that, in its own unit.
    lse_exponent: V,
    /// See `lse_exponent`.
    lse_rest: V,
    /// −logp_y
    nll: V,
    /// p_y and 1 − p_y, each to its own relative accuracy.
    p_target: V,
    /// See `p_target`.
    one_minus_p: V,
    /// The factor that makes 2^t a probability, if t is counted from the shift.
    inverse_sum: V,
    /// See `inverse_sum`.
    shift_logit: V,
    /// See `inverse_sum`.
    shift_exponent: V,
}

/// The lanes of a group that one register holds.
struct Lanes<'a, S: Simd> {
    s: S,
    group: &'a RowGroup,
    extras: &'a RowGroupExtras,
    /// The first row of the register.
    at: usize,
}

impl<S: Simd<Real: Base>> Lanes<'_, S> {
    #[inline(always)]
    fn get(&self, lanes: &RowLanes) -> WideVector<S> {
        // SAFETY: `at` is a multiple of the register's lanes below ROWS (`finish_loss`,
        // `finish_softmax`), whose number divides ROWS.
        unsafe { self.s.wide().load(lanes.as_ptr().add(self.at)) }
    }

    #[inline(always)]
    fn shift_logit(&self) -> WideVector<S> {
        let sums = &self.group.sums;
        if sums.by_logit { self.get(&sums.shift_logit) } else { self.s.wide().splat(0.0) }
    }

    /// The sum with its rounding error.
    #[inline(always)]
    fn total(&self) -> WideVector<S> {
        let sums = &self.group.sums;
        self.s.wide().add(self.get(&sums.sum), self.get(&sums.error))
    }

    /// From exponential sums: see the head of this file. Sums are 0, or at least 1/2, as shifts are
    /// chosen.
    #[inline(always)]
    fn by_sums(&self) -> Softmax<WideVector<S>> {
        let (s, group) = (self.s, self.group);
        let d = s.wide();
        let splat = |x: f64| d.splat(x);
        let (zero, one, infinity) = (splat(0.0), splat(1.0), splat(f64::INFINITY));
        let negative = |x| d.sub(zero, x);
        let (shift_logit, shift_exponent) =
            (self.shift_logit(), self.get(&group.sums.shift_exponent));
        let x_y = self.get(&group.inputs.x_y);
        // The error of an infinite sum is inf - inf.
        let sum = self.get(&group.sums.sum);
        let finite = d.less(sum, infinity);
        let sum = d.select(finite, d.add(sum, self.get(&group.sums.error)), sum);

        // Shift and logit are exact in units of log2, so their difference is taken there: at an offset
        // of 1e30 nothing else tells two logits apart.
        let from_shift = d.sub(x_y, shift_logit);
        let t = exponent(s, from_shift, shift_exponent);
        // If the other classes sum to zero, the target dominates.
        let (of_sum, fraction) = d.split(sum);
        let alone = d.equal(sum, zero);
        let dominates = d.either(d.less(of_sum, t), alone);
        // The integer part is exact, and what is left has one rounding.
        let whole = real::nearest(d, t);
        let part = exponent(s, from_shift, d.add(shift_exponent, whole));
        let part = d.select(d.equal(whole, t), zero, part);
        // Beside a dominating x_y, the others are small by a power of e, not of b: the loss of a
        // confident row is far below 1. The exponent of `rest` is enough of its logarithm for that.
        // (Past 2^-2000 nothing is left.)
        let above = d.min(splat(2000.0), d.sub(t, of_sum));
        let corrected = d.mul_add(splat(S::Real::EXCESS), above, part);
        let e = real::exp2_of(
            d,
            d.select(dominates, d.sub(of_sum, whole), whole),
            d.select(dominates, negative(corrected), part),
        );
        let (a, b) = (d.select(dominates, one, e), d.select(dominates, d.mul(fraction, e), sum));
        let b = d.select(alone, sum, b);
        let (total, error) = real::sum(d, a, b);
        let inverse = d.div(one, total);
        let (k, y) = real::ln_parts(d, total);
        // In the base of the sums.
        let y = d.mul(d.mul_add(error, inverse, y), splat(S::Real::RATIO));

        let (high_part, low_part) = (splat(S::Real::INVERSE.0), splat(S::Real::INVERSE.1));
        let scaled = |x, y| d.mul_sub(x, high_part, negative(d.mul_add(x, low_part, y)));
        let steps = d.select(dominates, k, d.sub(k, whole));
        let beside = d.select(dominates, y, d.sub(y, d.mul(part, high_part)));
        let nll = scaled(steps, beside);
        // An infinity has no second part.
        let nll = d.select(d.equal(steps, infinity), steps, nll);
        let from_shift = d.add(shift_logit, scaled(d.add(shift_exponent, k), y));
        let lse = d.select(dominates, d.add(x_y, nll), from_shift);
        // A NaN makes the row NaN, the same NaN on all sets; without one, an infinity makes lse +inf.
        let size = d.select(d.less(x_y, zero), negative(x_y), x_y);
        let infinite = d.either(d.equal(sum, infinity), d.equal(x_y, infinity));
        let lse = d.select(infinite, d.add(sum, size), lse);
        let numbers = d.both(d.equal(lse, lse), d.equal(sum, sum));
        let lse = d.select(numbers, lse, splat(f64::NAN));

        let unit = d.power(d.sub(splat(WHOLE_MAGIC), of_sum));
        let inverse_sum = d.mul(d.select(dominates, d.mul(e, unit), one), inverse);
        let p_target = d.mul(a, inverse);
        Softmax {
            lse,
            lse_exponent: d.select(dominates, t, k),
            lse_rest: d.select(dominates, nll, y),
            nll,
            p_target,
            // If p_y is 0, this is exactly 1.
            one_minus_p: d.select(dominates, d.mul(b, inverse), d.sub(one, p_target)),
            inverse_sum: d.select(alone, zero, inverse_sum),
            shift_logit,
            shift_exponent,
        }
    }

    /// What [`inverse_sum`](Softmax::inverse_sum) is multiplied by if the exponentials are powers of e
    /// from their shift on: `inverse_sum` counts from x_y on, or from the exponent of the sum, if x_y
    /// dominates.
    #[inline(always)]
    fn base_e_factor(&self) -> WideVector<S> {
        let (s, group) = (self.s, self.group);
        let d = s.wide();
        let splat = |x: f64| d.splat(x);
        let (shift_exponent, x_y) =
            (self.get(&group.sums.shift_exponent), self.get(&group.inputs.x_y));
        let above = d.sub(x_y, self.shift_logit());
        let t = exponent(s, above, shift_exponent);
        let (of_sum, _) = d.split(self.total());
        let level = d.mul(d.add(shift_exponent, of_sum), splat(S::Real::INVERSE.0));
        let level = d.select(d.less(of_sum, t), level, above);
        real::exp(d, d.mul(level, splat(-S::Real::EXCESS)))
    }

    /// From an lse operand, with a shift close to it.
    #[inline(always)]
    fn by_lse(&self) -> Softmax<WideVector<S>> {
        let (s, group) = (self.s, self.group);
        let d = s.wide();
        let splat = |x: f64| d.splat(x);
        let zero = splat(0.0);
        let negative = |x| d.sub(zero, x);
        let (lse, x_y) = (self.get(&group.results.lse), self.get(&group.inputs.x_y));
        let nearest = real::nearest(d, d.mul(lse, splat(S::Real::L.to_f64())));
        let size = d.select(d.less(nearest, zero), negative(nearest), nearest);
        let by_exponent = d.less(size, splat(S::Real::MAX_SHIFT + 0.5));
        // A row whose lse is not finite has no exponentials; its shift may be 0.
        let rounded = round(s, lse);
        let is_held = d.less(
            d.select(d.less(rounded, zero), negative(rounded), rounded),
            splat(f64::INFINITY),
        );
        let shift_logit = d.select(by_exponent, zero, d.keep(is_held, rounded));
        let shift_exponent = d.keep(by_exponent, nearest);
        let below = exponent(s, d.sub(shift_logit, lse), negative(shift_exponent));
        let log_p = d.sub(x_y, lse);
        Softmax {
            lse,
            lse_exponent: negative(below),
            lse_rest: zero,
            nll: d.sub(lse, x_y),
            p_target: real::exp(d, log_p),
            one_minus_p: negative(real::expm1(d, log_p)),
            inverse_sum: real::exp2(d, below),
            shift_logit,
            shift_exponent,
        }
    }

    /// From log-probabilities, whose lse is 0.
    #[inline(always)]
    fn by_log_probs(&self) -> Softmax<WideVector<S>> {
        let zero = self.s.wide().splat(0.0);
        let nll = self.s.wide().sub(zero, self.get(&self.group.inputs.x_y));
        Softmax {
            lse: zero,
            lse_exponent: zero,
            lse_rest: zero,
            nll,
            p_target: zero,
            one_minus_p: zero,
            inverse_sum: zero,
            shift_logit: zero,
            shift_exponent: zero,
        }
    }

    /// −Σ p·ln p: the entropy of the choice between the excluded class and the others, plus that of the
    /// others among themselves. No term is negative.
    #[inline(always)]
    fn entropy(&self, of: &Softmax<WideVector<S>>) -> WideVector<S> {
        let Lanes { s, group, extras, .. } = *self;
        let d = s.wide();
        let splat = |x: f64| d.splat(x);
        let (zero, inverse) = (splat(0.0), splat(S::Real::INVERSE.0));
        let (sum, moment) = (self.get(&extras.moments.sum), self.get(&extras.moments.first_moment));
        let among = d.mul(d.sub(real::log2(d, sum), d.div(moment, sum)), inverse);
        // −ln(1 − p_y), from p_y if that is the smaller.
        let x_y = self.get(&group.inputs.x_y);
        let t = exponent(s, d.sub(x_y, of.shift_logit), of.shift_exponent);
        let q = d.mul(d.sub(real::log2(d, self.total()), t), inverse);
        let (tail, _) = real::log1p(d, d.min(splat(1.0), d.div(of.p_target, of.one_minus_p)));
        let away = d.select(d.less(of.p_target, of.one_minus_p), tail, d.sub(of.nll, q));
        let others = d.mul(of.one_minus_p, d.add(away, among));
        let others = d.keep(d.less(zero, of.one_minus_p), others);
        let own = d.mul(of.p_target, of.nll);
        let own = d.keep(d.less(zero, of.p_target), own);
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

/// Computes the results of groups of rows of a loss, and the coefficients of their gradients. `extras` are
/// there, one for each group, if an option needs them.
///
/// # Safety
/// There are as many extras as groups, or none. The processor has the set of `s`.
#[inline(always)]
pub unsafe fn finish_loss<S: Simd<Real: Base>>(
    s: S,
    groups: &mut [RowGroup],
    mut extras: Option<&mut [RowGroupExtras]>,
    options: &RowOptions,
) {
    for (i, group) in groups.iter_mut().enumerate() {
        // SAFETY: there is one for each group (# Safety).
        let extras = extras.as_mut().map(|extras| unsafe { extras.get_unchecked_mut(i) });
        finish_loss_of(s, group, extras, options);
    }
}

static NO_EXTRAS: RowGroupExtras = RowGroupExtras::NONE;

#[inline(always)]
fn finish_loss_of<S: Simd<Real: Base>>(
    s: S,
    group: &mut RowGroup,
    mut extras: Option<&mut RowGroupExtras>,
    options: &RowOptions,
) {
    let d = s.wide();
    let splat = |x: f64| d.splat(x);
    if options.gradient.is_some() {
        group.coefficients.clear();
    }
    let mut by_logit = false;
    for at in (0..ROWS).step_by(<S::Wide as Simd>::LANES) {
        let lanes =
            Lanes { s, group: &*group, extras: extras.as_deref().unwrap_or(&NO_EXTRAS), at };
        let softmax = match options.lse {
            LseSource::Sums => lanes.by_sums(),
            LseSource::Operand => lanes.by_lse(),
            LseSource::LogProbs => lanes.by_log_probs(),
        };
        let (zero, one) = (splat(0.0), splat(1.0));
        let r =
            if options.has_row_weights { lanes.get(&lanes.extras.factors.row_weight) } else { one };
        let ignored = d.equal(lanes.get(&group.inputs.excluded), splat(RowInputs::IGNORED));
        let idle = d.either(ignored, d.equal(r, zero));
        let finite = d.equal(d.mul(softmax.lse, zero), zero);
        let terms = Terms { lanes, softmax, r, idle, finite };
        let losses = options.wants_losses.then(|| terms.losses(options));
        let entropy = options.wants_entropy.then(|| terms.lanes.entropy(&softmax));
        let gradient = options.gradient.as_ref().map(|gradient| terms.gradient(options, gradient));

        if options.wants_lse {
            put(s, &mut group.results.lse, at, softmax.lse);
        }
        if let Some((loss, z_loss)) = losses {
            put(s, &mut group.results.loss, at, loss);
            if options.z_loss != 0.0 {
                put(s, &mut group.results.z_loss, at, z_loss);
            }
        }
        if let Some(entropy) = entropy {
            put(s, &mut group.results.entropy, at, entropy);
        }
        if let (true, Some(extras)) = (options.entropy_bonus != 0.0, &mut extras) {
            put(s, &mut extras.bonus.lse_exponent, at, softmax.lse_exponent);
            put(s, &mut extras.bonus.lse_rest, at, softmax.lse_rest);
            put(s, &mut extras.bonus.nll, at, softmax.nll);
        }
        let (Some(gradient), Some(with)) = (gradient, &options.gradient) else { continue };
        if options.lse == LseSource::Operand {
            put(s, &mut group.sums.shift_exponent, at, softmax.shift_exponent);
            put(s, &mut group.sums.shift_logit, at, softmax.shift_logit);
            by_logit |= d.bits(d.equal(softmax.shift_logit, zero)) != all_lanes::<S>();
        }
        group.coefficients.put(s, at, &gradient, with.has_bias);
    }
    if options.lse == LseSource::Operand && options.gradient.is_some() {
        group.sums.by_logit = by_logit;
    }
}

/// Computes the coefficients of groups of rows of a softmax, or of a log-softmax: its output is formed as a
/// gradient is.
///
/// # Safety
/// The processor has the set of `s`.
#[inline(always)]
pub unsafe fn finish_softmax<S: Simd<Real: Base>>(s: S, groups: &mut [RowGroup], term: OutputTerm) {
    for group in groups {
        finish_softmax_of(s, group, term);
    }
}

#[inline(always)]
fn finish_softmax_of<S: Simd<Real: Base>>(s: S, group: &mut RowGroup, term: OutputTerm) {
    let d = s.wide();
    let splat = |x: f64| d.splat(x);
    group.coefficients.clear();
    for at in (0..ROWS).step_by(<S::Wide as Simd>::LANES) {
        let lanes = Lanes { s, group: &*group, extras: &NO_EXTRAS, at };
        let softmax = lanes.by_sums();
        let (zero, one, nan) = (splat(0.0), splat(1.0), splat(f64::NAN));
        let (factor, shift_exponent, entry) = match term {
            OutputTerm::BaseE => (
                d.mul(softmax.inverse_sum, lanes.base_e_factor()),
                softmax.shift_exponent,
                softmax.p_target,
            ),
            OutputTerm::LogSoftmax => {
                // Counted from where logits have an exact distance to.
                let whole = real::nearest(d, softmax.lse_exponent);
                let rest = d.sub(softmax.lse_exponent, whole);
                let above = d.mul_add(rest, splat(S::Real::INVERSE.0), softmax.lse_rest);
                (above, d.add(softmax.shift_exponent, whole), d.sub(zero, softmax.nll))
            }
            OutputTerm::Exponentials | OutputTerm::None => {
                (softmax.inverse_sum, softmax.shift_exponent, softmax.p_target)
            }
        };
        // A row with a NaN or an infinity has no softmax.
        let finite = d.equal(d.mul(softmax.lse, zero), zero);
        let sweeps = d.bits(finite);
        let gradient = RowGradient {
            entry: d.select(finite, entry, nan),
            factor,
            bias: zero,
            scale: one,
            writes: all_lanes::<S>(),
            sweeps,
            fills: all_lanes::<S>() & !sweeps,
            fills_nan: all_lanes::<S>() & !sweeps,
        };
        put(s, &mut group.sums.shift_exponent, at, shift_exponent);
        group.coefficients.put(s, at, &gradient, false);
    }
    // What a log-softmax has for a factor is a term, which nothing scales.
    group.coefficients.has_extreme_factor &= term != OutputTerm::LogSoftmax;
}

/// Stores a register of rows.
#[inline(always)]
fn put<S: Simd>(s: S, lanes: &mut RowLanes, at: usize, v: WideVector<S>) {
    debug_assert!(at + <S::Wide as Simd>::LANES <= ROWS);
    // SAFETY: the callers step over the ROWS lanes in registers, whose lanes divide ROWS.
    unsafe { s.wide().store(lanes.as_mut_ptr().add(at), v) }
}

/// All bits of a register of f64.
const fn all_lanes<S: Simd>() -> u32 {
    (1 << <S::Wide as Simd>::LANES) - 1
}

/// `2^k`
pub const fn power_of_2(k: i64) -> f64 {
    f64::from_bits(((k + 1023) as u64) << 52)
}

impl Coefficients {
    /// Forgets the rows before.
    #[inline(always)]
    fn clear(&mut self) {
        if self.has_scale {
            self.scale = [1.0; ROWS];
        }
        (self.writes, self.sweeps, self.fills, self.fills_nan) = (0, 0, 0, 0);
        (self.has_scale, self.has_extreme_factor) = (false, false);
    }

    /// Stores a register of rows.
    #[inline(always)]
    fn put<S: Simd>(&mut self, s: S, at: usize, of: &RowGradient<WideVector<S>>, has_bias: bool) {
        let d = s.wide();
        let splat = |x: f64| d.splat(x);
        put(s, &mut self.entry, at, of.entry);
        put(s, &mut self.factor, at, of.factor);
        if has_bias {
            put(s, &mut self.bias, at, of.bias);
        }
        self.writes |= (of.writes << at) as u8;
        self.sweeps |= (of.sweeps << at) as u8;
        self.fills |= (of.fills << at) as u8;
        self.fills_nan |= (of.fills_nan << at) as u8;
        if d.bits(d.equal(of.scale, splat(1.0))) != all_lanes::<S>() {
            put(s, &mut self.scale, at, of.scale);
            self.has_scale = true;
        }
        // In the middle of f32's range, or nothing that a product could hurt.
        let (factor, zero) = (of.factor, splat(0.0));
        let size = d.select(d.less(factor, zero), d.sub(zero, factor), factor);
        let low = d.both(d.less(zero, size), d.less(size, splat(power_of_2(-100))));
        let high = d.both(d.less(splat(power_of_2(100)), size), d.equal(d.mul(size, zero), zero));
        self.has_extreme_factor |= d.bits(d.either(low, high)) != 0;
    }
}

/// What the losses and gradients of a register of rows are made of.
struct Terms<'a, S: Simd> {
    lanes: Lanes<'a, S>,
    softmax: Softmax<WideVector<S>>,
    r: WideVector<S>,
    /// Rows that do not count, or whose weight is 0.
    idle: <S::Wide as Simd>::Mask,
    /// Rows whose lse is finite. A row with a NaN or +inf, or of nothing but −inf, has no probabilities,
    /// whatever its weights.
    finite: <S::Wide as Simd>::Mask,
}

/// A register of [`Coefficients`].
struct RowGradient<V> {
    entry: V,
    factor: V,
    bias: V,
    scale: V,
    writes: u32,
    sweeps: u32,
    fills: u32,
    fills_nan: u32,
}

impl<S: Simd<Real: Base>> Terms<'_, S> {
    /// `a·b`, but 0 if `a` is 0.
    #[inline(always)]
    fn times(&self, a: WideVector<S>, b: WideVector<S>) -> WideVector<S> {
        let d = self.lanes.s.wide();
        d.select(d.equal(a, d.splat(0.0)), d.splat(0.0), d.mul(a, b))
    }

    /// The weight or mass of the excluded class.
    #[inline(always)]
    fn class_mass(&self, options: &RowOptions) -> WideVector<S> {
        if options.has_class_masses {
            self.lanes.get(&self.lanes.extras.factors.class_mass)
        } else {
            self.lanes.s.wide().splat(1.0)
        }
    }

    /// The cross-entropy part of the loss, and the z-loss part.
    #[inline(always)]
    fn losses(&self, options: &RowOptions) -> (WideVector<S>, WideVector<S>) {
        let Terms { lanes, softmax, r, idle, finite } = self;
        let Lanes { s, group, extras, .. } = *lanes;
        let d = s.wide();
        let splat = |x: f64| d.splat(x);
        let zero = splat(0.0);
        let mut loss = zero;
        if options.spreads_mass {
            // Σ m_c·(lse − x_c), as M·(lse − center) − Σ m_c·(x_c − center), since lse itself is rounded.
            let weighted = &extras.weighted;
            let (center, x_y) = (lanes.get(&weighted.center), lanes.get(&group.inputs.x_y));
            let from_shift = d.sub(center, softmax.shift_logit);
            let below = exponent(s, from_shift, softmax.shift_exponent);
            let above = d.sub(softmax.lse_exponent, below);
            let distance = d.mul_add(above, splat(S::Real::INVERSE.0), softmax.lse_rest);
            let excludes = d.less(splat(-0.5), lanes.get(&group.inputs.excluded));
            let is_center = d.both(excludes, d.equal(center, x_y));
            let distance = d.select(is_center, softmax.nll, distance);
            let class_mass = self.class_mass(options);
            let (own, low) = real::scaled_difference(d, class_mass, x_y, center);
            let (dot, lost) = real::sum(d, lanes.get(&weighted.dot), d.keep(excludes, own));
            let mut error = lanes.get(&weighted.error);
            if S::Real::COMPENSATES {
                let lost = d.keep(excludes, d.add(lost, low));
                // An infinity has lost nothing.
                error = d.add(error, d.keep(d.equal(d.mul(lost, zero), zero), lost));
            }
            // The product is rounded with the difference, unless it is 0·inf.
            let less = |mass, distance| {
                let none = d.equal(mass, zero);
                let difference = d.mul_sub(mass, distance, dot);
                d.sub(d.select(none, d.sub(zero, dot), difference), error)
            };
            loss = if options.has_indices {
                d.mul(splat(options.smoothing_share), less(splat(options.weight_total), distance))
            } else {
                less(lanes.get(&weighted.mass), distance)
            };
        }
        if options.has_indices {
            let keep = splat(1.0 - options.label_smoothing);
            let weight = d.mul(keep, self.class_mass(options));
            let own = d.mul_sub(weight, softmax.nll, d.sub(zero, loss));
            loss = d.select(d.equal(weight, zero), loss, own);
        }
        let loss = d.select(*finite, d.mul(*r, loss), splat(f64::NAN));
        let mut z_loss = zero;
        if options.z_loss != 0.0 {
            let square = d.mul(softmax.lse, softmax.lse);
            z_loss = d.mul(*r, d.mul(splat(options.z_loss), square));
        }
        (d.select(*idle, zero, loss), d.select(*idle, zero, z_loss))
    }

    /// What the gradient is made of.
    #[inline(always)]
    fn gradient(
        &self,
        options: &RowOptions,
        gradient: &GradientOptions,
    ) -> RowGradient<WideVector<S>> {
        let Terms { lanes, softmax, r, idle, finite } = self;
        let Lanes { s, extras, .. } = *lanes;
        let d = s.wide();
        let splat = |x: f64| d.splat(x);
        let (zero, one, nan) = (splat(0.0), splat(1.0), splat(f64::NAN));
        let (mut scale, mut z_scale) = (splat(gradient.scale), splat(gradient.z_scale));
        if gradient.has_grad_output {
            let grad_output = lanes.get(&extras.factors.grad_output);
            (scale, z_scale) = (d.mul(scale, grad_output), d.mul(z_scale, grad_output));
        }
        let class_mass = self.class_mass(options);
        // The factor of the target's own mass (T), of the masses (B), and of all but the target's (P - T).
        let scaled = d.mul(scale, *r);
        let (mut target, mut bias, mut others) = if options.has_indices {
            let keep = splat(1.0 - options.label_smoothing);
            let target = d.mul(d.mul(scaled, keep), class_mass);
            // Without smoothing the bias is 0, whatever the scale.
            let bias = self.times(splat(options.smoothing_share), scaled);
            (target, bias, d.mul(bias, splat(options.weight_total)))
        } else {
            (zero, scaled, self.times(scaled, lanes.get(&extras.weighted.mass)))
        };
        if options.z_loss != 0.0 {
            let by = d.mul(d.mul(z_scale, *r), d.mul(splat(2.0 * options.z_loss), softmax.lse));
            others = d.add(others, by);
        }
        if let Some(with) = &options.transform
            && !with.is_capped()
        {
            let by = splat(with.scale);
            (target, bias, others) = (d.mul(target, by), d.mul(bias, by), d.mul(others, by));
        }
        // `total·p_y - target - own`, so arranged that only what has to cancel does. A mass of 0 subtracts
        // nothing under any factor, as in the sweeps over the other classes.
        let own = d.select(d.equal(class_mass, zero), zero, self.times(bias, class_mass));
        let total = d.add(target, others);
        // `quiet` rows need no sweep, `zero` ones no entry either.
        let (entry, good, quiet, empty);
        if options.lse == LseSource::LogProbs {
            entry = d.sub(zero, d.add(target, own));
            good = *finite;
            quiet = d.bits(d.equal(bias, zero));
            empty = d.bits(d.equal(entry, zero));
        } else {
            let is_zero = |x| d.equal(x, zero);
            let none = d.both(d.both(is_zero(target), is_zero(bias)), is_zero(total));
            let value = if options.has_indices {
                let rest = d.sub(d.mul(others, softmax.p_target), own);
                d.add(d.mul(target, d.sub(zero, softmax.one_minus_p)), rest)
            } else {
                let low = d.sub(d.mul(total, softmax.p_target), own);
                let high = d.sub(d.sub(total, own), d.mul(total, softmax.one_minus_p));
                let size = d.select(d.less(total, zero), d.sub(zero, total), total);
                let is_low = d.less(softmax.p_target, softmax.one_minus_p);
                d.select(d.either(is_low, d.equal(size, splat(f64::INFINITY))), low, high)
            };
            let value = if options.transform.is_some_and(|with| with.is_capped()) {
                d.mul(lanes.get(&extras.factors.slope), value)
            } else {
                value
            };
            entry = d.select(none, zero, value);
            good = d.both(*finite, d.equal(total, total));
            quiet = d.bits(none);
            empty = quiet;
        }
        // Lanes may be unable to hold terms whose difference they can hold.
        let limit = if size_of::<S::Real>() == 8 { 1000 } else { 100 };
        let small = |x| {
            let size = d.select(d.less(x, zero), d.sub(zero, x), x);
            d.less(size, splat(power_of_2(limit)))
        };
        let fits = d.both(small(total), small(bias));
        let down = d.select(fits, one, splat(power_of_2(-limit)));
        let entry = d.select(good, entry, nan);
        let active = all_lanes::<S>() & !d.bits(*idle);
        let good_rows = d.bits(good);
        let nan_rows = active & !good_rows;
        let overwritten = u32::from(gradient.overwritten) & all_lanes::<S>();
        let sweeps = active & good_rows & !quiet;
        let writes = overwritten | nan_rows | active & (!quiet | !empty);
        RowGradient {
            entry: d.select(*idle, zero, entry),
            factor: d.mul(softmax.inverse_sum, d.mul(total, down)),
            bias: d.mul(bias, down),
            scale: d.select(fits, one, splat(power_of_2(limit))),
            writes,
            sweeps,
            fills: overwritten & !sweeps | nan_rows,
            fills_nan: nan_rows,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dispatch::Isa;
    use crate::math::exp2::nearest;
    use crate::simd::on_isa::{available, on_isa};
    use crate::view::FloatType;

    const INF: f64 = f64::INFINITY;
    const NAN: f64 = f64::NAN;

    /// Lanes of f32, and of f64; both with [`Base::L`] and [`Base::LOW`].
    const LANES: [(FloatType, [f64; 2]); 2] =
        [(FloatType::F32, [f32::L as f64, f32::LOW as f64]), (FloatType::F64, [f64::L, f64::LOW])];

    /// See [`exponent`].
    fn exponent_of(x: f64, [l, low]: [f64; 2], by: f64) -> f64 {
        let t = x.mul_add(l, -by);
        if low == 0.0 { t } else { x.mul_add(low, t) }
    }

    /// The numbers of one row.
    #[derive(Clone, Copy, Debug)]
    struct One {
        shift_logit: f64,
        shift_exponent: f64,
        sum: f64,
        moment_sum: f64,
        first_moment: f64,
        x_y: f64,
        lse: f64,
        lse_exponent: f64,
        lse_rest: f64,
        nll: f64,
        p_target: f64,
        one_minus_p: f64,
        inverse_sum: f64,
        entropy: f64,
    }

    impl One {
        const EMPTY: One = One {
            shift_logit: 0.0,
            shift_exponent: 0.0,
            sum: 1.0,
            moment_sum: 1.0,
            first_moment: 0.0,
            x_y: 0.0,
            lse: 0.0,
            lse_exponent: 0.0,
            lse_rest: 0.0,
            nll: 0.0,
            p_target: 0.0,
            one_minus_p: 0.0,
            inverse_sum: 0.0,
            entropy: 0.0,
        };

        fn fields(&self) -> [f64; 13] {
            let One { shift_logit, shift_exponent, sum, moment_sum, first_moment, x_y, .. } = *self;
            let One { lse, lse_rest, nll, p_target, one_minus_p, inverse_sum, entropy, .. } = *self;
            [
                shift_logit, shift_exponent, sum, moment_sum, first_moment, x_y, lse, lse_rest,
                nll, p_target, one_minus_p, inverse_sum, entropy,
            ]
        }
    }

    /// Puts a row into a lane of a group.
    fn set(group: &mut RowGroup, moments: &mut RowMoments, lane: usize, row: &One) {
        group.sums.by_logit |= row.shift_logit != 0.0;
        group.sums.shift_logit[lane] = row.shift_logit;
        group.sums.shift_exponent[lane] = row.shift_exponent;
        group.sums.sum[lane] = row.sum;
        group.inputs.x_y[lane] = row.x_y;
        group.results.lse[lane] = row.lse;
        (moments.sum[lane], moments.first_moment[lane]) = (row.moment_sum, row.first_moment);
    }

    /// What follows from the numbers of eight rows, by lane.
    #[inline(always)]
    fn judge<S: Simd<Real: Base>>(
        s: S,
        group: &RowGroup,
        moments: &RowMoments,
        from_lse: bool,
    ) -> [[f64; 10]; ROWS] {
        let mut results = [[0.0; 10]; ROWS];
        let wide = <S::Wide as Simd>::LANES;
        let extras = &RowGroupExtras { moments: *moments, ..RowGroupExtras::NONE };
        for at in (0..ROWS).step_by(wide) {
            let lanes = Lanes { s, group, extras, at };
            let got = if from_lse { lanes.by_lse() } else { lanes.by_sums() };
            let entropy = if from_lse { got.lse } else { lanes.entropy(&got) };
            let all = [
                got.shift_logit,
                got.shift_exponent,
                got.lse,
                got.lse_exponent,
                got.lse_rest,
                got.nll,
                got.p_target,
                got.one_minus_p,
                got.inverse_sum,
                entropy,
            ];
            for (field, v) in all.into_iter().enumerate() {
                let mut column = [0.0; ROWS];
                // SAFETY: a register of f64 has at most ROWS lanes, as many as the array.
                unsafe { s.wide().store(column.as_mut_ptr(), v) };
                for (lane, x) in column[..wide].iter().enumerate() {
                    results[at + lane][field] = *x;
                }
            }
        }
        results
    }

    on_isa! {
        /// As [`judge`], with lanes of the type that `dtype` has.
        fn judge_lanes(
            dtype: FloatType,
            group: &RowGroup,
            moments: &RowMoments,
            from_lse: bool,
        ) -> [[f64; 10]; ROWS] = |s| if dtype.has_f32_lanes() {
            judge(s, group, moments, from_lse)
        } else {
            judge(s.wide(), group, moments, from_lse)
        };
    }

    /// The rows on every set, in every lane, for one type of lanes. All sets have the same bits,
    /// and no lane looks at another.
    fn run(dtype: FloatType, rows: &[One], from_lse: bool) -> Vec<(Isa, Vec<One>)> {
        let mut all: Vec<(Isa, Vec<One>)> = Vec::new();
        for isa in available() {
            let mut results = vec![One::EMPTY; rows.len()];
            for turn in 0..ROWS {
                for start in (0..rows.len()).step_by(ROWS) {
                    let at = |lane: usize| start + (lane + turn) % ROWS;
                    let (mut group, mut moments) = (RowGroup::EMPTY, RowMoments::EMPTY);
                    for lane in 0..ROWS {
                        let row = rows.get(at(lane)).unwrap_or(&One::EMPTY);
                        set(&mut group, &mut moments, lane, row);
                    }
                    let judged = judge_lanes(isa, dtype, &group, &moments, from_lse);
                    for (lane, judged) in judged.into_iter().enumerate() {
                        let Some(result) = results.get_mut(at(lane)) else { continue };
                        let [
                            shift_logit,
                            shift_exponent,
                            lse,
                            lse_exponent,
                            lse_rest,
                            nll,
                            p_target,
                            one_minus_p,
                            inverse_sum,
                            entropy,
                        ] = judged;
                        let row = rows[at(lane)];
                        let got = One {
                            shift_logit,
                            shift_exponent,
                            lse,
                            lse_exponent,
                            lse_rest,
                            nll,
                            p_target,
                            one_minus_p,
                            inverse_sum,
                            entropy,
                            ..row
                        };
                        let bits = |one: &One| one.fields().map(f64::to_bits);
                        assert!(turn == 0 || bits(result) == bits(&got), "lane {lane}: {got:?}");
                        *result = got;
                    }
                }
            }
            if let Some((other, good)) = all.first() {
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
        for (dtype, slope) in LANES {
            let l = slope[0];
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
                    let lse_exponent = row.sum.log2();
                    let rest = row.shift_logit + (row.shift_exponent + lse_exponent) / l;
                    let above = exponent_of(row.shift_logit - row.x_y, slope, -row.shift_exponent);
                    let q = (above + lse_exponent) / l;
                    let (lse, nll) = if q > 0.0 {
                        (rest + (-q).exp().ln_1p(), q + (-q).exp().ln_1p())
                    } else {
                        (row.x_y + q.exp().ln_1p(), q.exp().ln_1p())
                    };
                    // Both terms of q are rounded, and so is what e^q makes of that.
                    let slip =
                        3e-16 * (row.shift_exponent.abs() + lse_exponent.abs() + q.abs()) + 2e-15;
                    // Of powers of b that are taken for powers of e, and of rest by its exponent.
                    let base = if dtype == FloatType::F32 { 2e-8 } else { 0.0 };
                    let powers = slip + base * (1.0 + q.abs());
                    let what = isa.name();
                    close(row.lse, lse, slip + base + 1e-15 * lse.abs(), what, row);
                    // To the last digits, where lse itself is rounded far more: from an `lse_exponent` that
                    // is close.
                    let t = exponent_of(row.x_y - row.shift_logit, slope, row.shift_exponent);
                    let lse_rest = if q > 0.0 {
                        (lse_exponent - row.lse_exponent) / l + (-q).exp().ln_1p()
                    } else {
                        (t - row.lse_exponent) / l + nll
                    };
                    assert!(lse_rest.abs() < 1.1, "{row:?}");
                    close(row.lse_rest, lse_rest, slip + base + 1e-15, what, row);
                    close(row.nll, nll, (slip + 2e-15 + base) * nll, what, row);
                    let (p_target, one_minus_p) = (1.0 / (1.0 + q.exp()), 1.0 / (1.0 + (-q).exp()));
                    close(row.p_target, p_target, (powers + 2e-15) * p_target, what, row);
                    close(
                        row.one_minus_p,
                        one_minus_p,
                        (slip + 2e-15 + base) * one_minus_p,
                        what,
                        row,
                    );
                    let inverse_sum = one_minus_p / row.sum;
                    close(
                        row.inverse_sum,
                        inverse_sum,
                        (slip + 3e-15 + base) * inverse_sum,
                        what,
                        row,
                    );
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
        for (dtype, slope) in LANES {
            let l = slope[0];
            let bound = if dtype == FloatType::F32 { 1e-6 } else { 1e-13 };
            let (mut all, mut want) = (Vec::new(), Vec::new());
            for x in rows {
                let max = x.iter().copied().fold(-INF, f64::max);
                let total: f64 = x.iter().map(|x| (x - max).exp()).sum();
                let lse = max + total.ln();
                let entropy: f64 = x.iter().map(|x| times((x - lse).exp(), lse - x)).sum();
                for excluded in [None, Some(0)] {
                    for shift in [0.0, 7.0, -11.0] {
                        let shift_exponent = nearest(max * l) + shift;
                        let mut row = One {
                            shift_exponent,
                            sum: 0.0,
                            moment_sum: 0.0,
                            x_y: -INF,
                            ..One::EMPTY
                        };
                        for (c, x) in x.iter().enumerate() {
                            if excluded == Some(c) {
                                row.x_y = *x;
                                continue;
                            }
                            let t = exponent_of(*x, slope, shift_exponent);
                            row.sum += t.exp2();
                            // From another shift than the sum.
                            let t = exponent_of(*x, slope, nearest(max * l));
                            row.moment_sum += t.exp2();
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
        for (dtype, slope) in LANES {
            let l = slope[0];
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
                    let base = if dtype == FloatType::F32 { 1.34e-8 } else { 0.0 };
                    close(row.lse, lse, base + 1e-14, what, row);
                    if row.sum == 0.0 && row.x_y == -3.0 {
                        // Certain, exactly.
                        assert_eq!((row.lse, row.nll, row.entropy), (-3.0, 0.0, 0.0), "{row:?}");
                        assert_eq!(
                            (row.p_target, row.one_minus_p, row.inverse_sum),
                            (1.0, 0.0, 0.0),
                            "{row:?}"
                        );
                    }
                    if row.sum == 2.0 && row.x_y == -INF {
                        assert_eq!(
                            (row.nll, row.p_target, row.one_minus_p),
                            (INF, 0.0, 1.0),
                            "{row:?}"
                        );
                        assert_eq!(row.inverse_sum, 0.5, "{row:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn from_lse_by_the_formulas() {
        for (dtype, slope) in LANES {
            let l = slope[0];
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
                    let p_target = log_p.exp();
                    close(row.p_target, p_target, slip * p_target, what, row);
                    close(row.one_minus_p, -log_p.exp_m1(), slip * log_p.exp_m1().abs(), what, row);
                    // A shift that the lanes hold: an integer, or a logit near the lse.
                    let is_held = dtype == FloatType::F64
                        || f64::from(row.shift_logit as f32) == row.shift_logit;
                    assert!(
                        is_held && (row.shift_logit == 0.0 || row.shift_exponent == 0.0),
                        "{row:?}"
                    );
                    assert!(row.shift_exponent == row.shift_exponent.round(), "{row:?}");
                    let t = exponent_of(row.shift_logit - row.lse, slope, -row.shift_exponent);
                    let step = if dtype == FloatType::F32 { 6e-8 * row.lse.abs() } else { 0.0 };
                    assert!(
                        t.abs() <= 0.5001 + if row.shift_logit == 0.0 { 0.0 } else { step * l }
                    );
                    let inverse_sum = if t < -1022.5 { 0.0 } else { t.exp2() };
                    close(
                        row.inverse_sum,
                        inverse_sum,
                        (2e-15 + 3e-16 * t.abs()) * inverse_sum,
                        what,
                        row,
                    );
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
