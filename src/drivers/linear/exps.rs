//! The gradient of hidden states in the pass that makes the losses, which spares a product.
//!
//! Over classes c other than the target y, the gradient of a row's logits is `F·2^t_c` with a factor F that is known
//! only when all classes are summed up. The pass therefore multiplies the exponentials themselves with the weight,
//! and the factor and the target's term follow at the end: `F·Σ 2^t_c·W_c + g_y·W_y`. (Rabe and Staats, "Self-attention
//! does not need O(n²) memory", 2021, do the same with values for weights.)
//!
//! Exponents are counted from the row's initial shift for as long as the sums stay in range, and then from a higher
//! one, to which what is added up so far is brought.

use super::job::{Job, RowRecord, Tile, add, clear_hidden_gradient};
use super::memory::Worker;
use crate::drivers::batch::RowGradient;
use crate::drivers::call::Excluded;
use crate::drivers::ranking::RowRanking;
use crate::drivers::segment::{self, ChunkFlags};
use crate::kernels::contiguous::block::{Chunk, excluded_in};
use crate::kernels::contiguous::gradient::ExpScale;
use crate::kernels::entropy_bonus::Bonus;
use crate::kernels::row_math::{GradientAction, OutputTerm};
use crate::kernels::row_state::ExpSum;
use crate::kernels::scratch::Scratch;
use crate::math::exp2::Shift;
use crate::math::scalar::exp2;
use crate::plan::{LinearGradient, Pass};
use crate::strategy::{CONVERTED, LARGEST_PRODUCT_SUM, SMALLEST_SUM, VOCABULARY_BLOCK};
use crate::view::Position;
use std::ops::Range;

impl Job<'_> {
    /// Whether the pass that makes the losses makes the gradient of the hidden states too: the gradient of the logits
    /// has one factor for all classes but the target, and there is a place for sums that are not the gradient yet.
    pub fn multiplies_exps(&self) -> bool {
        let loss = self.loss;
        let has_place = self
            .linear
            .hidden_gradient
            .is_some_and(|hidden| !(self.is_direct(&hidden) && hidden.accumulate));
        has_place
            && loss.pass == Pass::ForwardBackward
            && self.call.excluded == Excluded::Target
            && loss.label_smoothing == 0.0
            && loss.transform.is_none()
            && !loss.has_bonus()
    }

    /// Takes a block of logits, in the tile, into the states of the rows, and adds their exponentials times the weight
    /// to the rows' sums.
    ///
    /// # Safety
    /// The tile holds these classes of the rows, which are the plan's; no other thread accesses them or their gradient.
    pub unsafe fn multiply_exps(
        &self,
        worker: &mut Worker,
        tile: &Tile,
        rows: &[usize],
        classes: Range<usize>,
    ) {
        let Some(gradient) = &self.linear.hidden_gradient else { return };
        for (i, &row) in rows.iter().enumerate() {
            // SAFETY: the tile holds the classes of the row, and no other thread accesses them or the row's gradient
            // (# Safety).
            unsafe { self.exps(worker, tile, i, row, classes.clone(), gradient) };
        }
        self.tile_rows(worker, tile, classes.start, 0..rows.len());
        let sums = worker.sums.start();
        self.place_out(worker, gradient, sums, rows.iter().copied());
        let adds = classes.start > 0;
        // The targets' entries follow at the end.
        let (features, entries) = (0..self.linear.features, std::iter::repeat_n(None, rows.len()));
        // SAFETY: the tile holds the rows and classes (# Safety); `place_out` has found a place for each row.
        unsafe { self.multiply_weight(worker, classes, features, entries, adds) };
    }

    /// Replaces the logits of row `i` by their exponentials, and adds them to the row's state; brings the row's sums to
    /// a higher shift if they need one.
    ///
    /// # Safety
    /// The tile holds these classes of the row; no other thread accesses them or its gradient.
    unsafe fn exps(
        &self,
        worker: &mut Worker,
        tile: &Tile,
        i: usize,
        row: usize,
        classes: Range<usize>,
        gradient: &LinearGradient,
    ) {
        let call = &self.call;
        let place = self.placed(tile, i, row);
        let start = place.g.wrapping_add(classes.start * self.lane);
        if classes.start == 0 {
            // SAFETY: the tile holds the row's first classes (# Safety).
            worker.reductions[i] = unsafe { self.decide(worker, i, &place) };
            worker.shifts[i] = worker.reductions[i].map_or(Shift::ZERO, |of| of.initial.shift);
        }
        let Some(reduction) = worker.reductions[i] else {
            // SAFETY: the tile holds the classes, this thread's alone (# Safety).
            return unsafe { self.fill(start, classes.len(), 0.0) };
        };
        let shift = worker.shifts[i];
        let mut ranking = RowRanking::of(call, &mut worker.rankings, &mut worker.entries, i);
        let state = &mut worker.states[i];
        let excluded = excluded_in(reduction.excluded, classes.start, classes.len());
        let mut backup = Scratch::<VOCABULARY_BLOCK>::new();
        let mut stored = false;
        if call.sums_exps_alone && !shift.is_by_logit() {
            let mut chunk = Chunk::new(start, classes.len(), excluded);
            (chunk.stored, chunk.backup) = (start, backup.start());
            // SAFETY: the tile holds the classes, this thread's alone (# Safety), and the backup has room for a
            // vocabulary block. The shift has no logit, by the comparison, and the processor has the set of the kernels
            // (`Call::k`).
            let sums = unsafe { (call.k.native.sum_stored)(&chunk, shift) };
            let least = if reduction.initial.is_of_row { 0.0 } else { SMALLEST_SUM };
            stored = sums.in_range && (least..LARGEST_PRODUCT_SUM).contains(&sums.sum);
            if stored {
                state.exps.push(&ExpSum::new(shift, sums.sum, 0.0), call.l);
            } else {
                // SAFETY: `sum_stored` above has filled the backup of this chunk, of the same memory.
                unsafe { (call.k.native.restore)(&chunk) };
            }
        }
        if !stored {
            let is_first = state.exps.sum.is_zero();
            // SAFETY: the tile holds the classes, this thread's alone (# Safety).
            unsafe {
                let (classes, ranking) = (classes.clone(), ranking.as_mut());
                segment::reduce_classes(call, &place, classes, &reduction, None, ranking, state);
            }
            let higher = state.exps.shift;
            if is_first && !state.exps.sum.is_zero() {
                // Nothing is added up yet that another shift, higher or lower, would change.
                worker.shifts[i] = higher;
            } else if higher.above(shift, call.l) > 0.0 {
                worker.shifts[i] = higher;
                if classes.start > 0 {
                    let scale = exp2(-higher.above(shift, call.l));
                    // SAFETY: `multiply_exps` has begun the row's sums with the classes before; they are this thread's
                    // (# Safety).
                    unsafe { self.scale_sums(worker, gradient, i, row, scale) };
                }
            }
            let gradient = RowGradient {
                term: OutputTerm::Exponentials,
                from_initial: ExpScale { shift: worker.shifts[i], factor: 1.0 },
                from_final: ExpScale { shift: worker.shifts[i], factor: 1.0 },
                bias: 0.0,
                scale: 1.0,
                bonus: Bonus::NONE,
                excluded: reduction.excluded,
                next: None,
            };
            let flags = ChunkFlags::default();
            // SAFETY: the tile holds the classes, this thread's alone (# Safety).
            unsafe { segment::gradient_classes(call, &place, classes, flags, &gradient) };
        }
        if let Some(excluded) = excluded {
            // SAFETY: the tile holds the class, one of these, this thread's alone (# Safety).
            unsafe { self.fill(start.wrapping_add(excluded * self.lane), 1, 0.0) };
        }
    }

    /// Multiplies the sums of row `i` by a number.
    ///
    /// # Safety
    /// The row has sums, and they are this thread's alone.
    #[cold]
    unsafe fn scale_sums(
        &self,
        worker: &Worker,
        gradient: &LinearGradient,
        i: usize,
        row: usize,
        scale: f64,
    ) {
        let sums = self.sums_of(worker, gradient, i, row);
        for feature in 0..self.linear.features {
            // SAFETY: the row has a sum for each feature (# Safety).
            unsafe {
                let sum = self.lane_at(sums, feature);
                self.fill(sums.wrapping_add(feature * self.lane), 1, sum * scale);
            }
        }
    }

    /// Where the sums of row `i` of a row block are: see [`place_out`](Self::place_out).
    fn sums_of(&self, worker: &Worker, gradient: &LinearGradient, i: usize, row: usize) -> *mut u8 {
        if self.is_direct(gradient) {
            Self::features_of(&gradient.view, row, 0)
        } else {
            worker.sums.start().wrapping_add(i * self.linear.features * self.lane)
        }
    }

    /// Makes the gradient of the hidden states from the sums of exponentials.
    ///
    /// # Safety
    /// The records are those of the block's rows, whose sums [`multiply_exps`](Self::multiply_exps) has completed; no
    /// other thread accesses the rows' gradient.
    pub unsafe fn finish_exps(&self, worker: &Worker, records: &[RowRecord]) {
        let Some(gradient) = &self.linear.hidden_gradient else { return };
        let features = self.linear.features;
        for (i, record) in records.iter().enumerate() {
            if !record.has_gradient() {
                // SAFETY: the row is this thread's (# Safety).
                unsafe { clear_hidden_gradient(self.linear, record.row) };
                continue;
            }
            let sums = self.sums_of(worker, gradient, i, record.row);
            let factor = match record.action {
                GradientAction::Sweep => {
                    let ExpScale { shift, factor } = record.exps;
                    let below = worker.shifts[i].above(shift, self.call.l);
                    let factor = if below == 0.0 { factor } else { factor * exp2(below) };
                    factor * record.scale
                }
                GradientAction::Fill(value) => value,
                GradientAction::Entry | GradientAction::Nothing => 0.0,
            };
            let at = Position { row: record.row, inner: 0 };
            for first in (0..features).step_by(CONVERTED) {
                let len = CONVERTED.min(features - first);
                let mut weight = [0.0; CONVERTED];
                if let Some(class) = record.excluded {
                    let class = Position { row: class, inner: 0 };
                    // SAFETY: the weight covers the class, a target in range, and the features (validation).
                    unsafe { self.linear.weight.read_row(class, first, &mut weight[..len]) };
                }
                for (feature, w) in (first..).zip(&weight[..len]) {
                    // SAFETY: `multiply_exps` has left a sum for each feature (# Safety).
                    let sum = unsafe { self.lane_at(sums, feature) };
                    let of_sums = if factor == 0.0 { 0.0 } else { sum * factor };
                    // SAFETY: the gradient covers the row (validation), this thread's alone (# Safety).
                    unsafe { add(gradient, at, feature, of_sums + record.entry * w) };
                }
            }
        }
    }
}
