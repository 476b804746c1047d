//! What is known of a row after some classes of its vocabulary, as plain data that travels.
//!
//! [`RowState`](crate::kernels::row_state::RowState) is the state on the way through one call: shifts, sums
//! and their rounding errors. A [`Partial`] is what remains of it at the end of a shard, in six numbers.

use crate::math::scalar::{exp2, ln_1p};
use std::f64::consts::LOG2_E;

/// What is known of a row after the classes of one shard of a vocabulary, or of several.
///
/// It is plain data of 48 bytes without pointers, the same as `xent_partial` in C, so that processes and
/// machines can exchange it. x are the logits after scale and cap, m the masses that the row's targets put on
/// the classes: `w_c·t'_c` for probabilities, `(1−ε)·w_y·[c = y] + (ε/C)·w_c` for an index y. C and w are
/// those of the whole vocabulary.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Partial {
    /// `ln Σ exp x_c`; −inf for no classes.
    pub lse: f64,
    /// `Σ m_c·x_c`, without the terms whose mass is 0; 0 in ignored rows.
    pub target_dot: f64,
    /// `Σ m_c`; 0 in ignored rows.
    pub target_mass: f64,
    /// `Σ p_c·x_c` under the softmax over these classes; 0 if their lse is −inf.
    pub logit_mean: f64,
    /// The largest logit as stored. NaN is larger than every number; −inf for no classes.
    pub max: f64,
    /// The class of `max` in the whole vocabulary, the lowest on ties; −1 for no classes.
    pub argmax: i64,
}

const _: () = assert!(size_of::<Partial>() == 48 && align_of::<Partial>() == 8);

impl Default for Partial {
    fn default() -> Self {
        Partial::EMPTY
    }
}

impl Partial {
    /// The state of no classes, the identity of [`merge`](Self::merge).
    pub const EMPTY: Partial = Partial {
        lse: f64::NEG_INFINITY,
        target_dot: 0.0,
        target_mass: 0.0,
        logit_mean: 0.0,
        max: f64::NEG_INFINITY,
        argmax: -1,
    };

    /// Adds the classes of `other`, which are others than those of `self`.
    ///
    /// The operation is commutative to the bit and associative up to rounding; `max` and `argmax` are
    /// associative exactly. [`EMPTY`](Self::EMPTY) changes no bit.
    ///
    /// ```
    /// use xent::Partial;
    ///
    /// let (a, b) = (Partial { lse: 0.0, ..Partial::EMPTY }, Partial { lse: 0.0, ..Partial::EMPTY });
    /// let mut both = a;
    /// both.merge(&b);
    /// assert!((both.lse - 2f64.ln()).abs() < 1e-15);
    /// ```
    pub fn merge(&mut self, other: &Partial) {
        if other.is_empty() {
            return;
        }
        if self.is_empty() {
            *self = *other;
            return;
        }
        let (lse, logit_mean) = merge_softmax(self, other);
        let of_max = if self.leads(other) { &*self } else { other };
        *self = Partial {
            lse,
            target_dot: self.target_dot + other.target_dot,
            target_mass: self.target_mass + other.target_mass,
            logit_mean,
            max: of_max.max,
            argmax: of_max.argmax,
        };
    }

    /// Merges each state of `from` into the one of `into` at its place.
    ///
    /// # Panics
    /// If the slices have different lengths.
    pub fn merge_all(into: &mut [Partial], from: &[Partial]) {
        assert_eq!(into.len(), from.len(), "as many states into as from");
        into.iter_mut().zip(from).for_each(|(into, from)| into.merge(from));
    }

    /// Every member has the bits of [`EMPTY`](Self::EMPTY).
    fn is_empty(&self) -> bool {
        let Partial { lse, target_dot, target_mass, logit_mean, max, argmax } = *self;
        let nothing = f64::NEG_INFINITY;
        let zeros = [target_dot, target_mass, logit_mean].map(f64::to_bits);
        lse == nothing && max == nothing && argmax == -1 && zeros == [0; 3]
    }

    /// Whether the largest logit of both is that of `self`.
    fn leads(&self, other: &Partial) -> bool {
        let same = self.max == other.max || self.max.is_nan() && other.max.is_nan();
        if (self.argmax < 0) != (other.argmax < 0) {
            other.argmax < 0
        } else if !same {
            self.max.is_nan() || self.max > other.max
        } else if self.argmax != other.argmax {
            self.argmax < other.argmax
        } else {
            // Only zeros and NaN have several bit patterns.
            self.max.to_bits() <= other.max.to_bits()
        }
    }
}

/// The lse and the mean logit of the classes of both.
fn merge_softmax(a: &Partial, b: &Partial) -> (f64, f64) {
    if a.lse.is_nan() || b.lse.is_nan() {
        return (f64::NAN, f64::NAN);
    }
    let (high, low) = if a.lse >= b.lse { (a, b) } else { (b, a) };
    if high.lse == f64::INFINITY {
        return (f64::INFINITY, f64::NAN);
    }
    if low.lse == f64::NEG_INFINITY {
        return (high.lse, high.logit_mean);
    }
    // Both are finite. A difference beyond f64 is -inf, whose exponential is 0.
    let ratio = exp2((low.lse - high.lse) * LOG2_E);
    if ratio == 0.0 {
        return (high.lse, high.logit_mean);
    }
    let (high_share, low_share) = (1.0 / (1.0 + ratio), ratio / (1.0 + ratio));
    let mean = high.logit_mean * high_share + low.logit_mean * low_share;
    (high.lse + ln_1p(ratio), mean)
}

#[cfg(test)]
mod tests {
    use super::*;

    const INF: f64 = f64::INFINITY;
    const NAN: f64 = f64::NAN;

    fn bits(p: &Partial) -> [u64; 6] {
        let Partial { lse, target_dot, target_mass, logit_mean, max, argmax } = *p;
        let [a, b, c, d, e] = [lse, target_dot, target_mass, logit_mean, max]
            .map(|x| if x.is_nan() { 1 } else { x.to_bits() });
        [a, b, c, d, e, argmax as u64]
    }

    fn merged(a: &Partial, b: &Partial) -> Partial {
        let mut both = *a;
        both.merge(b);
        both
    }

    fn states() -> Vec<Partial> {
        let mut states = vec![Partial::EMPTY];
        for (i, lse) in [-INF, -745.0, -1.0, -0.0, 0.0, 1e-9, 3.0, 800.0, 1e300, INF, NAN]
            .into_iter()
            .enumerate()
        {
            for (j, max) in [-INF, -0.0, 0.0, 2.5, INF, NAN].into_iter().enumerate() {
                let argmax = [0, 7, 3, -1][(i + j) % 4];
                let logit_mean = if lse == -INF { 0.0 } else { lse - 0.1 * j as f64 };
                let target_dot = [0.0, -0.0, 1.5, -INF][j % 4];
                states.push(Partial {
                    lse,
                    target_dot,
                    target_mass: j as f64,
                    logit_mean,
                    max,
                    argmax,
                });
            }
        }
        states
    }

    #[test]
    fn merging_commutes_and_nothing_changes_no_bit() {
        for a in states() {
            assert_eq!(bits(&merged(&a, &Partial::EMPTY)), bits(&a), "{a:?}");
            assert_eq!(bits(&merged(&Partial::EMPTY, &a)), bits(&a), "{a:?}");
            for b in states() {
                assert_eq!(bits(&merged(&a, &b)), bits(&merged(&b, &a)), "{a:?} and {b:?}");
            }
        }
    }

    /// NaN over +inf over numbers; the largest logit and its class in whatever order.
    #[test]
    fn merging_is_associative() {
        let states = states();
        for (i, a) in states.iter().enumerate() {
            for b in &states[i % 7..] {
                for c in states.iter().skip(i % 5).step_by(5) {
                    let left = merged(&merged(a, b), c);
                    let right = merged(a, &merged(b, c));
                    let what = || format!("{a:?}, {b:?}, {c:?}: {left:?} and {right:?}");
                    assert_eq!(left.argmax, right.argmax, "{}", what());
                    assert!(
                        left.max.to_bits() == right.max.to_bits()
                            || left.max.is_nan() && right.max.is_nan()
                    );
                    for (x, y) in [(left.lse, right.lse), (left.logit_mean, right.logit_mean)] {
                        let near = (x - y).abs() <= 1e-15 * (1.0 + x.abs().max(y.abs()));
                        assert!(near || x == y || x.is_nan() && y.is_nan(), "{}", what());
                    }
                }
            }
        }
    }

    #[test]
    fn merging_by_the_formulas() {
        for (x, y) in [(0.0, 0.0), (1.0, -2.0), (1e4, 1e4 - 30.0), (-3.0, 700.0)] {
            let of = |lse: f64, mean: f64| Partial { lse, logit_mean: mean, ..Partial::EMPTY };
            let both = merged(&of(x, x), &of(y, y));
            let lse = f64::max(x, y) + (-f64::abs(x - y)).exp().ln_1p();
            let share = 1.0 / (1.0 + (y - x).exp());
            let mean = share * x + (1.0 - share) * y;
            assert!((both.lse - lse).abs() <= 4e-16 * lse.abs() + 1e-15, "{x}, {y}: {both:?}");
            assert!(
                (both.logit_mean - mean).abs() <= 4e-15 * (1.0 + mean.abs()),
                "{x}, {y}: {both:?}"
            );
        }
    }
}
