//! The entropy bonus's part of the gradient, `factor·p_c·(logp_c + H)`: class by class, from numbers that
//! [`BonusFactors`](super::row_math::BonusFactors) explains.

use crate::math::exp2::{Base, ByLogit, Exp2, Shift};
use crate::simd::{Real, Simd, up_to};

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

/// The bonus of the classes whose logits are `x`; 0 for -inf.
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

/// Subtracts the bonus of `len` classes from their biases, which the gradient subtracts in turn.
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
