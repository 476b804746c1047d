//! Sums over rows, which tasks hand back in order.

use crate::math::compensated::CompensatedSum;

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
    /// The sums over no rows.
    pub const ZERO: Totals =
        Totals { loss: CompensatedSum::ZERO, z_loss: CompensatedSum::ZERO, correct: 0 };

    /// Adds the sums over later rows.
    pub fn add(&mut self, next: &Totals) {
        self.loss.merge(next.loss);
        self.z_loss.merge(next.z_loss);
        self.correct += next.correct;
    }
}
