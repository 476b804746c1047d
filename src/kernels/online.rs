//! The running state of a row's sum of exponentials.

use crate::math::scalar::exp2;

/// `sum·2^log2` is the sum of `2^(L·x)` over the classes seen so far, `dot` the sum of
/// `w_c·(x_c - center)` where smoothing asks for it.
///
/// A logit of +inf is `log2 = inf, sum = 1`; NaN lives in `sum`; nothing seen is `sum = 0`.
#[derive(Clone, Copy, Debug)]
pub struct Partial {
    /// The reference, in units of log2.
    pub log2: f64,
    /// The sum, relative to the reference.
    pub sum: f64,
    /// The weighted sum of logits.
    pub dot: f64,
}

impl Partial {
    /// No classes seen.
    pub const EMPTY: Partial = Partial { log2: f64::NEG_INFINITY, sum: 0.0, dot: 0.0 };

    /// Adds the classes that `next` has seen. Not associative to the last bit: the order of
    /// pushes is part of the result, and everyone pushes in class order.
    #[inline(always)]
    pub fn push(&mut self, next: Partial) {
        self.dot += next.dot;
        if next.sum == 0.0 {
            return;
        }
        if self.sum == 0.0 || self.log2 == next.log2 {
            self.log2 = next.log2;
            self.sum += next.sum;
        } else if self.log2 < next.log2 {
            self.sum = self.sum * exp2(self.log2 - next.log2) + next.sum;
            self.log2 = next.log2;
        } else {
            self.sum += next.sum * exp2(next.log2 - self.log2);
        }
    }
}
