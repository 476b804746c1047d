//! The entropy bonus -β·H of a row's loss, and its part of the gradient, `β·p_c·(logp_c + H)`.
//!
//! Row by row, [`finish`] adds to what the row arithmetic has found. Few calls have a bonus, and so it has one number
//! for a lane. Class by class, the sweeps then form `e^(x - shift)·(t·slope + level)`, with the exponents t counted
//! from the same shift, the integer nearest to the lse: `logp_c + H` keeps its digits under any offset of a row.

use super::row_math::{
    GradientOptions, ROWS, RowGroup, RowGroupExtras, RowInputs, RowOptions, power_of_2,
};
use crate::math::exp2::{Base, ByLogit, Exp2, Shift, nearest};
use crate::math::scalar::exp2;
use crate::simd::{Real, Simd, up_to};
use std::f64::consts::LOG2_E;

/// What the bonus of a row is made of.
#[derive(Clone, Copy, Debug)]
pub struct Bonus {
    /// The shift of the exponents t.
    pub shift: Shift,
    /// The bonus of class c is `e^(x - shift)·(t·slope + level)`.
    pub slope: f64,
    /// See `slope`.
    pub level: f64,
}

impl Bonus {
    /// The bonus of a row without one.
    pub const NONE: Bonus = Bonus { shift: Shift::ZERO, slope: 0.0, level: 0.0 };
}

/// Adds the bonus of groups of rows to their results and coefficients, for lanes of f32 or of f64.
#[inline(never)]
pub fn finish(
    groups: &mut [RowGroup],
    extras: &mut [RowGroupExtras],
    options: &RowOptions,
    has_f32_lanes: bool,
) {
    for index in 0..groups.len() * ROWS {
        let (group, extras) = (&mut groups[index / ROWS], &mut extras[index / ROWS]);
        add(group, extras, index % ROWS, options, has_f32_lanes);
    }
}

/// Adds the bonus of a row.
#[inline(never)]
fn add(
    group: &mut RowGroup,
    extras: &mut RowGroupExtras,
    row: usize,
    options: &RowOptions,
    has_f32_lanes: bool,
) {
    let r = if options.has_row_weights { extras.factors.row_weight[row] } else { 1.0 };
    let is_idle = group.inputs.excluded[row] == RowInputs::IGNORED || r == 0.0;
    let entropy = group.results.entropy[row];
    group.results.entropy_bonus[row] =
        if is_idle { 0.0 } else { r * (-options.entropy_bonus * entropy) };
    if let (Some(gradient), false) = (&options.gradient, is_idle) {
        let factor = gradient.z_scale * r * options.entropy_bonus;
        add_gradient(group, extras, row, factor, options, gradient, has_f32_lanes);
    }
}

/// Adds the bonus of a row that counts to the coefficients of its gradient.
#[inline(always)]
fn add_gradient(
    group: &mut RowGroup,
    extras: &mut RowGroupExtras,
    row: usize,
    factor: f64,
    options: &RowOptions,
    gradient: &GradientOptions,
    has_f32_lanes: bool,
) {
    let (inverse, excess, limit) = match has_f32_lanes {
        true => (f32::INVERSE.0, f32::EXCESS, 100),
        false => (f64::INVERSE.0, f64::EXCESS, 1000),
    };
    let (entropy, bonus) = (group.results.entropy[row], &mut extras.bonus);
    let (lse_exponent, lse_rest, nll) =
        (bonus.lse_exponent[row], bonus.lse_rest[row], bonus.nll[row]);
    let mut factor = factor;
    if gradient.has_grad_output {
        factor *= extras.factors.grad_output[row];
    }
    // What the entry is multiplied by: of what the others are multiplied by, a cap's part differs by class.
    let mut slope = 1.0;
    match &options.transform {
        Some(with) if with.is_capped() => slope = extras.factors.slope[row],
        Some(with) => factor *= with.scale,
        None => {}
    }
    let to = &mut group.coefficients;
    let bit = 1 << row;
    if to.fills_nan & bit != 0 {
        return;
    }
    // A factor of 0, of a row that is swept all the same, makes a bonus of 0.
    let entropy = if factor == 0.0 { 0.0 } else { entropy };
    if factor != 0.0 {
        to.writes |= bit;
        if !(factor.is_finite() && entropy.is_finite()) {
            // The bonus has no value in any class.
            to.entry[row] = f64::NAN;
            to.sweeps &= !bit;
            (to.fills, to.fills_nan) = (to.fills | bit, to.fills_nan | bit);
            return;
        }
        to.sweeps |= bit;
        to.fills &= !bit;
        let p_target = exp2(-nll * LOG2_E);
        if p_target != 0.0 {
            to.entry[row] += slope * (factor * (p_target * (entropy - nll)));
        }
        if factor.abs() >= power_of_2(limit) && to.scale[row] == 1.0 {
            // Lanes may be unable to hold terms whose difference they can hold.
            let down = power_of_2(-limit);
            to.scale[row] = power_of_2(limit);
            to.factor[row] *= down;
            to.bias[row] *= down;
            (to.has_scale, to.has_extreme_factor) = (true, true);
        }
    }
    // Counted from where logits have an exact distance to.
    let whole = nearest(lse_exponent);
    let above = (lse_exponent - whole) * inverse + lse_rest;
    let exponent = group.sums.shift_exponent[row] + whole;
    // The sweeps take powers of e, and the lse is in the base of the sums (row_math.rs): a shift of n is
    // `n·inverse` there, and less by `n·inverse·excess` for powers of e.
    let from_shift = above + exponent * (inverse * excess);
    // Near 0, unless the lse is that of the excluded class alone. Then no exponential is left to be scaled.
    let power = exp2((-from_shift * LOG2_E).min(64.0));
    let factor = factor / to.scale[row] * power;
    bonus.lse_exponent[row] = exponent;
    bonus.lse_rest[row] = factor * inverse;
    bonus.nll[row] = factor * (entropy - above);
}

/// The bonus of the classes whose logits are `x`.
#[inline(always)]
pub fn term<S: Simd<Real: Base>>(
    s: S,
    exp: &Exp2<S, ByLogit>,
    x: S::Vector,
    slope: S::Vector,
    level: S::Vector,
) -> S::Vector {
    // An exponent is finite, and so a power of 0 makes a bonus of 0.
    s.mul(exp.base_e(x), s.mul_add(exp.exponent(x), slope, level))
}

/// Makes the biases of `len` classes less by their bonus: the gradient subtracts biases.
///
/// # Safety
/// `x` is readable, and `biases` readable and writable, for `len` lanes; the processor has the set of `s`.
#[inline(always)]
pub unsafe fn subtract<S: Simd<Real: Base>>(
    s: S,
    x: *const u8,
    len: usize,
    bonus: &Bonus,
    biases: *mut u8,
) {
    let (x, biases) = (x.cast::<S::Real>(), biases.cast::<S::Real>());
    let exp = Exp2::<S, ByLogit>::new(s, bonus.shift);
    let splat = |x: f64| s.splat(S::Real::from_f64(x));
    let (slope, level) = (splat(bonus.slope), splat(bonus.level));
    for at in (0..len).step_by(S::LANES) {
        let lanes = up_to::<S>(len - at);
        // SAFETY: `lanes` has a bit for each of the classes from `at` on that both are there for (# Safety).
        unsafe {
            let x = s.load_lanes(x.wrapping_add(at), lanes, S::Real::ZERO);
            let bias = s.load_lanes(biases.wrapping_add(at), lanes, S::Real::ZERO);
            let bias = s.sub(bias, term(s, &exp, x, slope, level));
            s.store_lanes(biases.wrapping_add(at), lanes, bias);
        }
    }
}
