//! The running state of a row: what its classes so far add up to.

use crate::math::exp2::Reference;
use crate::math::scalar::exp2;

/// A sum of exponentials, relative to a reference.
///
/// `sum` is `Σ 2^t` and `heat` is `Σ t·2^t`, with `t = L·(x - far) - near` for the far and near of
/// the reference. A logit of +inf makes the sum infinite, a NaN makes it NaN.
#[derive(Clone, Copy, Debug)]
pub struct Level {
    /// Where exponents are counted from.
    pub reference: Reference,
    /// Σ 2^t
    pub sum: f64,
    /// Σ t·2^t, where it is wanted.
    pub heat: f64,
}

impl Level {
    /// Of nothing.
    pub const EMPTY: Level = Level { reference: Reference::ZERO, sum: 0.0, heat: 0.0 };

    /// Adds other exponentials. Not associative to the last bit: the order of pushes is part of the
    /// result, and everyone pushes in class order.
    #[inline(always)]
    pub fn push(&mut self, next: &Level, l: f64) {
        if next.sum == 0.0 {
            return;
        }
        if self.sum == 0.0 || self.reference == next.reference {
            self.reference = next.reference;
            self.sum += next.sum;
            self.heat += next.heat;
            return;
        }
        if !(self.sum.is_finite() && next.sum.is_finite()) {
            // There is nothing to weigh against each other: infinite, or NaN.
            self.sum += next.sum;
            return;
        }
        let above = next.reference.above(self.reference, l);
        if above > 0.0 {
            let (sum, heat) = moved(self.sum, self.heat, above);
            self.reference = next.reference;
            self.sum = sum + next.sum;
            self.heat = heat + next.heat;
        } else {
            let (sum, heat) = moved(next.sum, next.heat, -above);
            self.sum += sum;
            self.heat += heat;
        }
    }
}

/// What is known of a row whose classes were seen in part.
#[derive(Clone, Copy, Debug)]
pub struct Partial {
    /// The exponentials.
    pub level: Level,
    /// The same with their heat, if the entropy is wanted: each chunk relative to its largest
    /// logit, for the heat's rounding grows with the distance from the reference. They are apart
    /// so that nothing else depends on whether it is wanted.
    pub spread: Level,
    /// `Σ m_c·(x_c - center)` where a mass m is spread over the classes.
    pub dot: f64,
    /// `Σ m_c` of probability targets.
    pub mass: Exact,
    /// The largest logit as stored and its class, if they are wanted.
    pub top: Top,
}

impl Partial {
    /// No classes seen.
    pub const EMPTY: Partial = Partial {
        level: Level::EMPTY,
        spread: Level::EMPTY,
        dot: 0.0,
        mass: Exact::NONE,
        top: Top::NONE,
    };

    /// Adds the classes that `next` has seen, all of which come after.
    #[inline(always)]
    pub fn push(&mut self, next: &Partial, l: f64) {
        self.level.push(&next.level, l);
        self.spread.push(&next.spread, l);
        self.dot += next.dot;
        self.mass.merge(next.mass);
        self.top.push(next.top);
    }
}

/// `sum` and `heat` relative to a reference that is `by ≥ 0` higher.
#[inline(always)]
fn moved(sum: f64, heat: f64, by: f64) -> (f64, f64) {
    let scale = exp2(-by);
    if scale == 0.0 { (0.0, 0.0) } else { (sum * scale, (heat - by * sum) * scale) }
}

/// The largest logit as stored, and the lowest class that has it. NaN is larger than all.
#[derive(Clone, Copy, Debug)]
pub struct Top {
    /// The logit.
    pub value: f64,
    /// The class, `usize::MAX` for none.
    pub class: usize,
}

impl Top {
    /// No classes seen.
    pub const NONE: Top = Top { value: f64::NEG_INFINITY, class: usize::MAX };

    /// Adds classes that come after.
    #[inline(always)]
    pub fn push(&mut self, next: Top) {
        let first = self.class == usize::MAX;
        if first || (!self.value.is_nan() && (next.value > self.value || next.value.is_nan())) {
            *self = next;
        }
    }
}

/// A sum that carries along what its roundings lost (Neumaier's): masses multiply whole losses and
/// gradients, and there may be a million of them.
#[derive(Clone, Copy, Debug)]
pub struct Exact {
    sum: f64,
    lost: f64,
}

impl Exact {
    /// Of nothing.
    pub const NONE: Exact = Exact { sum: 0.0, lost: 0.0 };

    /// One more term.
    #[inline(always)]
    pub fn add(&mut self, x: f64) {
        let sum = self.sum + x;
        let (large, small) = if self.sum.abs() >= x.abs() { (self.sum, x) } else { (x, self.sum) };
        self.lost += (large - sum) + small;
        self.sum = sum;
    }

    /// The terms of another sum.
    #[inline(always)]
    pub fn merge(&mut self, other: Exact) {
        self.add(other.sum);
        self.lost += other.lost;
    }

    /// The sum.
    #[inline(always)]
    pub fn value(self) -> f64 {
        // Past an infinity the loss is inf - inf.
        if self.sum.is_finite() { self.sum + self.lost } else { self.sum }
    }
}
