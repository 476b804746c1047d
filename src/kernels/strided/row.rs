//! A single row of a strip, with lanes along its contiguous classes: the bits that it would have beside
//! others.
//!
//! The exponentials of a strip's lane do not depend on where they are computed. They are formed a register
//! of classes at a time, and added in the order of [`strip::sums`](super::strip::sums).

use super::strip::GROUP;
use crate::element::Element;
use crate::kernels::ordinary::{OrdinaryState, SMOOTHED, lanes, store_wide, weights};
use crate::math::compensated::CompensatedSum;
use crate::math::exp2::{Base, ByExponent, Clamped, Exp2, Shift};
use crate::simd::{Real, Simd, up_to};

/// A row of contiguous classes, which is a lane of a strip.
#[derive(Clone, Copy, Debug)]
pub struct StripRow {
    /// The first class.
    pub x: *const u8,
    /// Classes, at least two.
    pub classes: usize,
    /// Which lane it is.
    pub lane: usize,
    /// The class that its sum excludes; below 0 for an ignored row.
    pub excluded: f64,
    /// Where its exponentials are kept, in the lanes' own type.
    pub exps: *mut u8,
    /// It is smoothed.
    pub is_smoothed: bool,
    /// The weights of its classes if it is: null if each is 1.
    pub weights: *const f64,
}

impl StripRow {
    /// The weight of a class.
    ///
    /// # Safety
    /// The row is smoothed, and has the class.
    #[inline(always)]
    unsafe fn weight(&self, class: usize) -> f64 {
        // SAFETY: every class of the row has a weight (`StripRow`).
        if self.weights.is_null() { 1.0 } else { unsafe { *self.weights.wrapping_add(class) } }
    }
}

/// Sums up the exponentials of a row. Sets the state of its lane, and of the lanes after it that a register from there on
/// has: they get the same numbers, for the arithmetic of the rows, which reads whole registers. It would wait for numbers
/// that are stored one by one.
///
/// # Safety
/// The row is readable; there is room for its exponentials in whole registers, apart from the row. The excluded class is one
/// of the row's if it is not below 0. The lane is one of a strip, which has room for a register from there on. The
/// processor has the set of `s`.
#[inline(always)]
pub unsafe fn sums<S: Simd<Real: Base>, E: Element<S>>(
    s: S,
    row: &StripRow,
    state: &mut OrdinaryState,
) {
    let (x, exps) = (row.x.cast::<E>(), row.exps.cast::<S::Real>());
    let classes = row.classes;
    // SAFETY: class `c` of the row is readable (# Safety).
    let logit = |c: usize| S::Real::from_f64(unsafe { (*x.wrapping_add(c)).to_f64() });
    let mut max = logit(0);
    for c in 1..classes.min(GROUP) {
        let x = logit(c);
        max = if max > x { max } else { x };
    }
    // 0 where the exponent is too large for a shift, infinite or NaN.
    let shift = {
        let scaled = max.times(S::Real::L);
        let nearest = scaled.plus(S::Real::ROUND).minus(S::Real::ROUND);
        if scaled.to_f64().abs() < S::Real::MAX_SHIFT { nearest } else { S::Real::ZERO }
    };
    // Smoothed rows have lanes of f32 (`Loss::has_ordinary_rows`).
    let is_smoothed = row.is_smoothed && !S::Real::COMPENSATES;
    if is_smoothed {
        let (center, mut dot) = (shift.to_f64() * S::Real::INVERSE.0, 0.0);
        for c in 0..classes {
            // SAFETY: the loop keeps to the classes of the row, which is smoothed by the comparison above.
            dot += unsafe { row.weight(c) } * (logit(c).to_f64() - center);
        }
        // SAFETY: its lane is one of a strip (# Safety), which has no more than SMOOTHED if it is smoothed (`Strip`); the
        // array has as many again (`OrdinaryState`).
        unsafe { *lanes(&mut state.grad_output, SMOOTHED + row.lane) = dot };
    }
    let exp = Exp2::<S, ByExponent>::new(s, Shift { logit: 0.0, exponent: shift.to_f64() });
    for at in (0..classes).step_by(S::LANES) {
        let lanes = up_to::<S>(classes - at);
        // SAFETY: the mask has bits for classes of the row alone, and there is room for whole registers
        // (# Safety).
        unsafe {
            let x = E::load_lanes(s, x.wrapping_add(at), lanes, S::Real::NEG_INFINITY);
            s.store(exps.wrapping_add(at), exp.value::<Clamped>(x));
        }
    }
    // SAFETY: the excluded class is one of the row's if it is not below 0, and the arrays have room for a register from the
    // lane on (# Safety); the loop above has set the exponentials of all classes in whole registers.
    unsafe {
        let excluded = row.excluded;
        let mut x_y = S::Real::ZERO;
        if excluded >= 0.0 {
            x_y = logit(excluded as usize);
            *exps.wrapping_add(excluded as usize) = S::Real::ZERO;
        }
        let (mut sum, mut exact) = (0.0, CompensatedSum::ZERO);
        let mut add = |group: S::Real| match S::Real::COMPENSATES {
            true => exact.add(group.to_f64()),
            false => sum += group.to_f64(),
        };
        let whole = classes - classes % GROUP;
        for c in (0..whole).step_by(GROUP) {
            let e = |j: usize| *exps.wrapping_add(c + j);
            add(e(0).plus(e(1)).plus(e(2).plus(e(3))));
        }
        if whole < classes {
            let e = |j: usize| {
                if whole + j < classes { *exps.wrapping_add(whole + j) } else { S::Real::ZERO }
            };
            add(e(0).plus(e(1)).plus(e(2)));
        }
        let wide = |x: f64| {
            let mut v = s.widen(s.splat(S::Real::ZERO));
            v.as_mut().iter_mut().for_each(|v| *v = s.wide().splat(x));
            v
        };
        if S::Real::COMPENSATES {
            let lost;
            (sum, lost) = exact.parts();
            store_wide(s, &mut state.factor, row.lane, wide(lost));
        }
        store_wide(s, &mut state.excluded_sum_loss, row.lane, wide(sum));
        s.store(lanes(&mut state.class, row.lane), s.splat(S::Real::from_f64(excluded)));
        s.store(lanes(&mut state.shift, row.lane), s.splat(shift));
        s.store(lanes(&mut state.x_y, row.lane), s.splat(x_y));
    }
}

/// Writes the gradient of a row.
///
/// # Safety
/// As [`sums`], which went before, as did the arithmetic of the rows; the gradient is writable for all
/// classes, and the row or apart from it.
#[inline(always)]
pub unsafe fn gradient<S: Simd<Real: Base>, G: Element<S>>(
    s: S,
    row: &StripRow,
    state: &mut OrdinaryState,
    to: *mut u8,
) {
    let (g, exps) = (to.cast::<G>(), row.exps.cast::<S::Real>());
    let zero = s.splat(S::Real::ZERO);
    // Smoothed rows have lanes of f32 (`Loss::has_ordinary_rows`).
    let is_smoothed = row.is_smoothed && !S::Real::COMPENSATES;
    // SAFETY: `sums` and the arithmetic of the rows have set the lane, which is one of the strip, and all classes have
    // weights if it is smoothed. The gradient is writable for the classes of the row, its excluded one among them, and the
    // mask has bits for these alone; `sums` has set the exponentials in whole registers.
    unsafe {
        let excluded = row.excluded;
        let factor = s.splat(*lanes(&mut state.factor, row.lane));
        let bias = match is_smoothed {
            true => s.splat(*lanes(&mut state.entry, SMOOTHED + row.lane)),
            false => zero,
        };
        for at in (0..row.classes).step_by(S::LANES) {
            let e = s.load(exps.wrapping_add(at));
            let left = row.classes - at;
            // The logits of an ignored row may be anything.
            let v = if excluded < 0.0 {
                zero
            } else if is_smoothed {
                s.mul_sub(e, factor, s.mul(bias, weights(s, row.weights, at, left)))
            } else {
                s.mul_add(e, factor, zero)
            };
            let lanes = up_to::<S>(left);
            G::store_lanes(s, g.wrapping_add(at), lanes, v);
        }
        if excluded >= 0.0 {
            let entry: S::Real = *lanes(&mut state.entry, row.lane);
            *g.wrapping_add(excluded as usize) = G::from_f64(entry.to_f64());
        }
    }
}
