//! The gradients of weight and bias: blocks of classes, each through all rows.

use super::job::{Job, RowRecord, Tile, add};
use super::memory::Worker;
use crate::strategy::VOCABULARY_BLOCK;
use crate::view::Position;
use std::ops::Range;

impl Job<'_> {
    /// Computes the gradients of the weight and the bias of some classes.
    ///
    /// # Safety
    /// The records are all of the rows that have a gradient; no other thread accesses these classes' gradients.
    pub unsafe fn classes(
        &self,
        worker: &mut Worker,
        records: &[RowRecord],
        classes: Range<usize>,
    ) {
        let mut bias = [0.0; VOCABULARY_BLOCK];
        let mut adds = false;
        let tile = self.tile(worker, classes.start);
        for records in records.chunks(self.weight_rows) {
            let rows = records.iter().map(|record| record.row);
            // SAFETY: the records are of rows of the plan (# Safety), and the classes are a block's. A worker's tile has
            // room for `weight_rows` rows of a block, and its sums for the gradient of one (`Worker::new`).
            unsafe {
                self.logits(worker, &tile, classes.start, rows, classes.len(), |i| {
                    classes.start + i
                });
                self.gradient(&tile, records, classes.clone());
                let sums = worker.sums.start();
                self.add_classes(worker, &tile, records, classes.clone(), sums, &mut bias, adds);
            }
            adds = true;
        }
        let sums = worker.sums.start();
        // SAFETY: the loop above has added all records; the classes are this thread's (# Safety).
        unsafe { self.finish_classes(classes, sums, &bias, adds) };
    }

    /// Adds what the records' rows contribute to the gradients of the weight and the bias of some classes. Without
    /// `adds`, sums begin.
    ///
    /// # Safety
    /// The tile has the gradient of the records' rows and of the classes, for whose sums there is room at `sums` and in
    /// `bias`; no other thread accesses them.
    #[allow(clippy::too_many_arguments, reason = "a block, and where its two sums go")]
    pub unsafe fn add_classes(
        &self,
        worker: &mut Worker,
        tile: &Tile,
        records: &[RowRecord],
        classes: Range<usize>,
        sums: *mut u8,
        bias: &mut [f64],
        adds: bool,
    ) {
        if self.linear.bias_gradient.is_some() {
            self.tile_rows(worker, tile, classes.start, 0..records.len());
            // SAFETY: the tile has the rows and classes, and `bias` a sum for each class (# Safety); the processor has
            // the set of the kernels (`Job::k`).
            unsafe { (self.k.add_columns)(&worker.left_rows, classes.len(), bias) };
        }
        if let Some(weight) = &self.linear.weight_gradient {
            self.place_out(worker, weight, sums, classes.clone());
            let adds = adds || (self.is_direct(weight) && weight.accumulate);
            // SAFETY: the tile has the records' rows and the classes, for whose sums there is room (# Safety):
            // `place_out` has named it.
            unsafe { self.multiply_hidden(worker, tile, records, classes, adds) };
        }
    }

    /// Writes the gradients of the weight and the bias of some classes, once their sums are complete; `has_sums` says
    /// whether there were any rows.
    ///
    /// # Safety
    /// The sums are as [`add_classes`](Self::add_classes) left them; no other thread accesses the classes' gradients.
    pub unsafe fn finish_classes(
        &self,
        classes: Range<usize>,
        sums: *const u8,
        bias: &[f64],
        has_sums: bool,
    ) {
        let features = self.linear.features;
        if let Some(weight) = &self.linear.weight_gradient {
            if has_sums {
                // SAFETY: the sums are complete, and the classes are this thread's (# Safety).
                unsafe { self.round_out(weight, sums, classes.clone(), 0..features) };
            } else if !weight.accumulate {
                for class in classes.clone() {
                    let at = Position { row: class, inner: 0 };
                    // SAFETY: the gradient covers the class (validation), this thread's alone (# Safety).
                    unsafe { weight.view.fill_row(at, features, 0.0) };
                }
            }
        }
        if let Some(gradient) = &self.linear.bias_gradient {
            for (class, &sum) in classes.zip(bias) {
                // SAFETY: the gradient covers the class (validation), this thread's alone (# Safety).
                unsafe { add(gradient, Position::FIRST, class, sum) };
            }
        }
    }
}
