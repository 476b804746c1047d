//! Sums over rows, which tasks hand back in order.

use crate::kernels::row_math::ROWS;
use crate::math::compensated::{CompensatedLanes, CompensatedSum};

/// Sums over rows.
#[derive(Clone, Copy, Debug)]
pub struct Totals {
    /// The cross-entropy part of the losses.
    pub loss: CompensatedSum,
    /// The z-loss part.
    pub z_loss: CompensatedSum,
    /// The entropy bonus's part.
    pub entropy_bonus: CompensatedSum,
    /// Rows whose largest logit is the target's.
    pub correct: u64,
}

impl Totals {
    /// The sums over no rows.
    pub const ZERO: Totals = Totals {
        loss: CompensatedSum::ZERO,
        z_loss: CompensatedSum::ZERO,
        entropy_bonus: CompensatedSum::ZERO,
        correct: 0,
    };

    /// Adds the sums over later rows.
    pub fn add(&mut self, next: &Totals) {
        self.loss.merge(next.loss);
        self.z_loss.merge(next.z_loss);
        self.entropy_bonus.merge(next.entropy_bonus);
        self.correct += next.correct;
    }
}

/// Sums over rows that arrive in groups of eight, or one by one.
#[derive(Clone, Copy, Debug)]
pub struct GroupTotals {
    /// The losses of rows that arrived in groups.
    pub losses: CompensatedLanes,
    /// Everything else.
    pub rest: Totals,
}

impl GroupTotals {
    /// The sums over no rows.
    pub const ZERO: GroupTotals =
        GroupTotals { losses: CompensatedLanes::ZERO, rest: Totals::ZERO };

    /// The sums over all rows.
    pub fn total(&self) -> Totals {
        let mut total = self.rest;
        total.loss.merge(self.losses.total());
        total
    }
}

/// Losses, which are added up in groups of eight rows from the first on, however they arrive.
pub struct Losses {
    group: [f64; ROWS],
    count: usize,
    totals: GroupTotals,
}

impl Losses {
    /// No losses yet.
    pub const NONE: Losses = Losses { group: [0.0; ROWS], count: 0, totals: GroupTotals::ZERO };

    /// Adds the losses of the next rows.
    pub fn add(&mut self, losses: &[f64]) {
        for &loss in losses {
            self.group[self.count] = loss;
            self.count += 1;
            if self.count == ROWS {
                self.totals.losses.add(&self.group);
                self.count = 0;
            }
        }
    }

    /// The sums over all rows.
    pub fn total(mut self) -> Totals {
        if self.count > 0 {
            self.group[self.count..].fill(0.0);
            self.totals.losses.add(&self.group);
        }
        self.totals.total()
    }
}
