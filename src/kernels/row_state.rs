//! The state of a row: what the classes seen so far add up to.
//!
//! A state is a monoid. [`RowState::EMPTY`] is its identity and [`RowState::push`] its operation, so that
//! chunks of a row, segments on several threads and blocks of a vocabulary merge in the same way. The
//! operation is associative up to rounding; to fix the bits, everyone pushes in class order.

use crate::math::compensated::CompensatedSum;
use crate::math::exp2::Shift;
use crate::math::scalar::exp2;

/// A sum of exponentials, relative to a shift.
///
/// With the exponents `t = L·(x - shift.logit) - shift.exponent`, `sum` is `Σ 2^t` and `first_moment` is
/// `Σ t·2^t`. A logit of +inf makes the sum infinite; a NaN makes it NaN.
#[derive(Clone, Copy, Debug)]
pub struct ExpSum {
    /// Where exponents are counted from.
    pub shift: Shift,
    /// Σ 2^t
    pub sum: CompensatedSum,
    /// Σ t·2^t, if it is wanted; else 0.
    pub first_moment: f64,
}

impl ExpSum {
    /// The sum over no classes.
    pub const EMPTY: ExpSum =
        ExpSum { shift: Shift::ZERO, sum: CompensatedSum::ZERO, first_moment: 0.0 };

    /// The sum over some classes.
    #[inline(always)]
    pub fn new(shift: Shift, sum: f64, first_moment: f64) -> Self {
        ExpSum { shift, sum: CompensatedSum::from(sum), first_moment }
    }

    /// Adds the exponentials of other classes; `l` is L. The sum takes the higher of the two shifts.
    #[inline(always)]
    pub fn push(&mut self, next: &ExpSum, l: f64) {
        if next.sum.is_zero() {
            return;
        }
        if self.sum.is_zero() {
            *self = *next;
            return;
        }
        if self.shift != next.shift && self.sum.is_finite() && next.sum.is_finite() {
            let above = next.shift.above(self.shift, l);
            let mut lower = *next;
            if above > 0.0 {
                (*self, lower) = (*next, *self);
            }
            lower.raise_shift(above.abs());
            self.sum.merge(lower.sum);
            self.first_moment += lower.first_moment;
            return;
        }
        // An infinity or a NaN is the same from any shift.
        self.sum.merge(next.sum);
        self.first_moment += next.first_moment;
    }

    /// Counts exponents from a shift that is `by ≥ 0` higher.
    #[inline(always)]
    fn raise_shift(&mut self, by: f64) {
        let scale = exp2(-by);
        self.first_moment =
            if scale == 0.0 { 0.0 } else { (self.first_moment - by * self.sum.value()) * scale };
        self.sum.scale(scale);
    }
}

/// What is known of a row after some of its classes.
#[derive(Clone, Copy, Debug)]
pub struct RowState {
    /// The exponentials of all classes but the excluded one.
    pub exps: ExpSum,
    /// The same exponentials with their first moment, if the entropy is wanted. The rounding of a first
    /// moment grows with the distance from the shift, so each chunk counts from its largest logit here;
    /// `exps` stays apart so that its bits do not depend on whether the entropy is wanted.
    pub moments: ExpSum,
    /// `Σ m_c·(x_c - center)`, if a mass m is spread over the classes.
    pub weighted_logits: CompensatedSum,
    /// `Σ m_c` of probability targets.
    pub mass: CompensatedSum,
    /// The largest logit as stored, if it is wanted.
    pub argmax: ArgMax,
}

impl RowState {
    /// No classes seen.
    pub const EMPTY: RowState = RowState {
        exps: ExpSum::EMPTY,
        moments: ExpSum::EMPTY,
        weighted_logits: CompensatedSum::ZERO,
        mass: CompensatedSum::ZERO,
        argmax: ArgMax::NONE,
    };

    /// Adds the classes that `next` has seen, all of which come later; `l` is L.
    #[inline(always)]
    pub fn push(&mut self, next: &RowState, l: f64) {
        self.exps.push(&next.exps, l);
        self.moments.push(&next.moments, l);
        self.weighted_logits.merge(next.weighted_logits);
        self.mass.merge(next.mass);
        self.argmax.push(next.argmax);
    }
}

/// The largest logit as stored, and the lowest class that has it. NaN is larger than every number.
#[derive(Clone, Copy, Debug)]
pub struct ArgMax {
    /// The logit.
    pub value: f64,
    /// The class, `usize::MAX` for none.
    pub class: usize,
}

impl ArgMax {
    /// No classes seen.
    pub const NONE: ArgMax = ArgMax { value: f64::NEG_INFINITY, class: usize::MAX };

    /// Adds classes that come later.
    #[inline(always)]
    pub fn push(&mut self, next: ArgMax) {
        let first = self.class == usize::MAX;
        if first || (!self.value.is_nan() && (next.value > self.value || next.value.is_nan())) {
            *self = next;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::f64::consts::LOG2_E;

    const INF: f64 = f64::INFINITY;
    const NAN: f64 = f64::NAN;

    /// What a sweep over a part of a row finds: the classes from `first` on, the first moment relative to
    /// a shift of its own.
    fn seen(x: &[f64], first: usize, shift: Shift, moments: Shift) -> RowState {
        let mut part = RowState::EMPTY;
        part.exps.shift = shift;
        part.moments.shift = moments;
        for (i, &x) in x.iter().enumerate() {
            for exps in [&mut part.exps, &mut part.moments] {
                let Shift { logit: shift_logit, exponent: shift_exponent } = exps.shift;
                let t = (x - shift_logit).mul_add(LOG2_E, -shift_exponent);
                let e = t.exp2();
                exps.sum.add(e);
                exps.first_moment += if e == 0.0 { 0.0 } else { t * e };
            }
            let mass = 0.25 + (first + i) as f64;
            part.mass.add(mass);
            part.weighted_logits.add(if x.is_finite() { mass * x } else { 0.0 });
            part.argmax.push(ArgMax { value: x, class: first + i });
        }
        part
    }

    /// Log-sum-exp and entropy.
    fn ends(exps: &ExpSum) -> [f64; 2] {
        let sum = exps.sum.value();
        let log = sum.log2();
        let lse = exps.shift.logit + (exps.shift.exponent + log) / LOG2_E;
        [lse, (log - exps.first_moment / sum) / LOG2_E]
    }

    fn exact_ends(x: &[f64]) -> [f64; 2] {
        let max = x.iter().copied().fold(-INF, f64::max);
        let e = x.iter().map(|x| (x - max).exp());
        let total: f64 = e.clone().sum();
        let entropy = e.zip(x).map(|(e, x)| {
            let p = e / total;
            if p == 0.0 { 0.0 } else { p * (total.ln() - (x - max)) }
        });
        [max + total.ln(), entropy.sum()]
    }

    fn argmax(x: &[f64]) -> usize {
        let nan = x.iter().position(|x| x.is_nan());
        let max = x.iter().copied().fold(-INF, f64::max);
        nan.or_else(|| x.iter().position(|&x| x == max)).expect("a class")
    }

    /// Calls with every way to cut `n` classes into parts that are not empty.
    fn every_split(n: usize, mut look: impl FnMut(&[std::ops::Range<usize>])) {
        for cuts in 0..1u32 << (n - 1) {
            let mut parts = Vec::new();
            let mut start = 0;
            for end in 1..=n {
                if end == n || cuts >> (end - 1) & 1 == 1 {
                    parts.push(start..end);
                    start = end;
                }
            }
            look(&parts);
        }
    }

    /// Wherever a row is cut and whatever its parts are relative to, it is the same row.
    #[test]
    fn any_split_is_the_same_row() {
        let rows: [&[f64]; 9] = [
            &[0.3, -1.0, 2.5, 0.0, 1.25, -3.0, 0.5, 0.5],
            &[1e4, 1e4 + 1.0, 1e4 - 2.0, 1e4, 1e4 - 0.5, 1e4 + 1.0, 1e4, 1e4],
            &[-20.0, 30.0, -50.0, 29.0, 0.0, -20.0, 31.0, 10.0],
            &[-INF, -INF, 1.0, -INF, 2.0, -INF, -INF, 0.0],
            &[5.0, -INF, -INF, -INF, -INF, -INF, -INF, -INF],
            // One part is nothing beside the other, either way round.
            &[-800.0, -801.0, 0.0, 1.0, 700.0, 700.0, -800.0, 699.0],
            &[700.0, 700.0, 0.0, 1.0, -800.0, -801.0, -1e5, -1e9],
            // Far.
            &[1e17, 1e17, 1e17 - 64.0, 1e17, 1e17 + 16.0, 1e17, 3.0, -1e17],
            &[-1e300, -1e300, -1e300, -1e300, -2e300, -1e300, -1e300, -1e300],
        ];
        for x in rows {
            let [lse, entropy] = exact_ends(x);
            let whole = seen(x, 0, Shift::ZERO, Shift::ZERO);
            let finite = x.iter().filter(|x| x.is_finite());
            let size: f64 = finite.map(|x| whole.mass.value() * x.abs()).sum();
            every_split(x.len(), |parts| {
                for turn in 0..6 {
                    let mut row = RowState::EMPTY;
                    for (i, range) in parts.iter().enumerate() {
                        let part = &x[range.clone()];
                        let max = part.iter().copied().fold(-INF, f64::max);
                        let top = if max == -INF { Shift::ZERO } else { Shift::at::<f64>(max) };
                        let mut shift = top;
                        // A part may be counted from beside its largest logit as well.
                        if !shift.is_by_logit() && (turn + i) % 3 > 0 {
                            shift.exponent += [9.0, -40.0][(turn + i) % 3 - 1];
                        }
                        row.push(&seen(part, range.start, shift, top), LOG2_E);
                    }
                    let what = || format!("{x:?} as {parts:?}: {row:?}, not {lse}, {entropy}");
                    for exps in [&row.exps, &row.moments] {
                        let got = ends(exps);
                        assert!((got[0] - lse).abs() <= 4e-16 * lse.abs() + 1e-14, "{}", what());
                        assert!((got[1] - entropy).abs() <= 2e-13, "{}", what());
                    }
                    assert_eq!(row.mass.value(), whole.mass.value());
                    assert!(
                        (row.weighted_logits.value() - whole.weighted_logits.value()).abs()
                            <= 1e-15 * size,
                        "{}",
                        what()
                    );
                    assert_eq!(row.argmax.class, argmax(x), "{}", what());
                }
            });
        }
    }

    /// Parts that add up to nothing leave no trace, their shift included.
    #[test]
    fn nothing_is_nothing() {
        let x = [1.0, 2.0];
        let shift_exponent = Shift { logit: 0.0, exponent: 3.0 };
        let part = seen(&x, 1, shift_exponent, shift_exponent);
        for shift in [Shift::ZERO, Shift { logit: 1e17, exponent: 0.0 }] {
            let nothing = seen(&[-INF], 0, shift, shift);
            for order in [[&nothing, &part], [&part, &nothing]] {
                let mut row = RowState::EMPTY;
                order.into_iter().for_each(|next| row.push(next, LOG2_E));
                for exps in [row.exps, row.moments] {
                    assert_eq!(exps.shift, shift_exponent);
                    assert_eq!(exps.sum.value(), part.exps.sum.value());
                    assert_eq!(exps.first_moment, part.exps.first_moment);
                }
                assert_eq!(row.argmax.class, 2);
            }
        }
    }

    /// NaN over +inf over all that is finite, in any order and from any shift.
    #[test]
    fn infinities_and_nan() {
        let sums = [0.0, 1.5, 1e-300, INF, NAN];
        let shifts = [
            Shift::ZERO,
            Shift { logit: 0.0, exponent: 900.0 },
            Shift { logit: -1e200, exponent: 0.0 },
        ];
        let part = |i: usize| ExpSum::new(shifts[i / 5], sums[i % 5], sums[i % 5]);
        for i in 0..15 {
            for j in 0..15 {
                for k in 0..15 {
                    let mut row = ExpSum::EMPTY;
                    [i, j, k].into_iter().for_each(|i| row.push(&part(i), LOG2_E));
                    let all = [i, j, k].map(|i| sums[i % 5]);
                    let good = if all.iter().any(|s| s.is_nan()) {
                        row.sum.value().is_nan()
                    } else if all.contains(&INF) {
                        row.sum.value() == INF
                    } else {
                        row.sum.is_finite()
                            && (row.sum.value() > 0.0) == all.iter().any(|&s| s > 0.0)
                    };
                    assert!(good, "{all:?}: {row:?}");
                }
            }
        }
    }

    /// The first NaN; without, the lowest class of the largest; zeros of both signs are equal.
    #[test]
    fn top() {
        let values = [-INF, -1.0, -0.0, 0.0, 7.0, INF, NAN];
        let n = values.len();
        for pick in 0..n.pow(4) {
            let x: [f64; 4] = std::array::from_fn(|i| values[pick / n.pow(i as u32) % n]);
            every_split(4, |parts| {
                let mut row = ArgMax::NONE;
                for range in parts {
                    let mut part = ArgMax::NONE;
                    for class in range.clone() {
                        part.push(ArgMax { value: x[class], class });
                    }
                    row.push(part);
                }
                assert_eq!(row.class, argmax(&x), "{x:?} as {parts:?}");
                let value = x[row.class];
                assert!(row.value == value || row.value.is_nan() && value.is_nan());
            });
        }
        // Nothing is no class, not even before one of -inf.
        let mut row = ArgMax::NONE;
        row.push(ArgMax::NONE);
        assert_eq!(row.class, usize::MAX);
        row.push(ArgMax { value: -INF, class: 4 });
        row.push(ArgMax::NONE);
        row.push(ArgMax { value: -INF, class: 5 });
        assert_eq!(row.class, 4);
    }
}
