//! Losses of a linear layer: the logits are made block by block in scratch, swept there, and forgotten.
//!
//! A *block* is some rows by [`VOCABULARY_BLOCK`] classes. Rows are cut into row blocks, each of which one thread
//! takes through all classes: products make its logits, sweeps reduce them to row states, and row arithmetic makes
//! results and the coefficients of the gradient. A second pass over the same blocks makes the gradient of their
//! logits, from logits that are made again to the same bits, and multiplies it with the weight. The gradient of
//! the weight is a third pass, in which each thread takes blocks of classes through all rows.
//!
//! Ignored rows are left out of all products.

mod exps;
mod memory;
mod rows;

use super::call::{Call, Excluded};
use super::segment::{self, ChunkFlags, PlacedRow};
use super::totals::Totals;
use crate::drivers::batch::RowGradient;
use crate::error::Error;
use crate::kernels::contiguous::gradient::ExpScale;
use crate::kernels::product::{DEPTH, Left, Product};
use crate::kernels::row_math::GradientAction;
use crate::kernels::{Kernels, ProductKernels};
use crate::parallel::{Team, Work};
use crate::plan::{Linear, LinearGradient, Loss, Plan, Target};
use crate::strategy::{self, VOCABULARY_BLOCK, VOCABULARY_PITCH};
use crate::view::{ElementType, FloatType, Position, View};
use memory::{Worker, Workers, reserve};
use std::ops::Range;

/// A linear loss on its way through the passes.
struct Job<'a> {
    call: Call<'a>,
    loss: &'a Loss,
    linear: &'a Linear,
    k: &'a ProductKernels,
    /// Bytes of a lane.
    lane: usize,
    /// Rows of a row block at most.
    block_rows: usize,
    /// Rows that the gradient of the weight takes at a time.
    weight_rows: usize,
}

/// What the passes over the gradient need to know of a row, and what is added up over the rows.
#[derive(Clone, Copy)]
struct RowRecord {
    row: usize,
    loss: f64,
    z_loss: f64,
    is_correct: bool,
    /// The class whose entry of the gradient is `entry`.
    excluded: Option<usize>,
    entry: f64,
    action: GradientAction,
    exps: ExpScale,
    bias: f64,
    scale: f64,
}

impl RowRecord {
    const EMPTY: RowRecord = RowRecord {
        row: 0,
        loss: 0.0,
        z_loss: 0.0,
        is_correct: false,
        excluded: None,
        entry: 0.0,
        action: GradientAction::Nothing,
        exps: ExpScale { shift: crate::math::exp2::Shift::ZERO, factor: 0.0 },
        bias: 0.0,
        scale: 1.0,
    };

    /// The gradient of the row's logits is not 0 throughout.
    fn has_gradient(&self) -> bool {
        match self.action {
            GradientAction::Nothing => false,
            GradientAction::Entry => self.entry != 0.0,
            GradientAction::Fill(value) => value != 0.0 || self.entry != 0.0,
            GradientAction::Sweep => true,
        }
    }
}

/// Memory that several threads write, each its own part.
struct Shared<T>(*mut T);

// SAFETY: every access is unsafe, and asks that no other thread accesses the same element.
unsafe impl<T: Send> Sync for Shared<T> {}

/// Runs a linear loss; returns the sums over its rows, or an error before anything is written.
///
/// # Safety
/// Validation has made the plan and the layer, whose operands stay valid for the call; `Isa::kernels` has handed out
/// the kernels for lanes of the operands' type, and `Isa::product_kernels` those for the operands.
pub unsafe fn run(
    plan: &Plan,
    loss: &Loss,
    linear: &Linear,
    kernels: &Kernels,
    products: &ProductKernels,
    team: &Team,
) -> Result<Totals, Error> {
    // SAFETY: this function's own # Safety.
    let call = unsafe { Call::of_blocks(plan, kernels, loss) };
    let lane = plan.logits.dtype.size();
    let mut job = Job { call, loss, linear, k: products, lane, block_rows: 0, weight_rows: 0 };

    let mut kept = reserve::<usize>(plan.shape.rows)?;
    // SAFETY: the rows are the plan's (# Safety).
    kept.extend((0..plan.shape.rows).filter(|&row| unsafe { job.computes(row) }));
    let macs = kept.len().saturating_mul(plan.shape.classes).saturating_mul(linear.features);
    let elements = macs / strategy::MACS_OF_AN_ELEMENT;
    let threads = team.size(elements);
    let needs = job.choose_block(kept.len(), threads)?;
    let threads = needs.threads;
    (job.block_rows, job.weight_rows) = (needs.block_rows, needs.weight_rows);
    let mut records = reserve::<RowRecord>(kept.len())?;
    records.resize(kept.len(), RowRecord::EMPTY);
    let workers = Workers::new(&needs, &job)?;
    let team = Team { threads, ..*team };
    // Nothing has been written yet, and nothing below can fail.

    let blocks = kept.len().div_ceil(job.block_rows);
    let work = Work { len: blocks, elements_each: usize::MAX, elements };
    let shared = Shared(records.as_mut_ptr());
    let task = |range: Range<usize>| {
        let shared = &shared;
        workers.with(|worker| {
            for block in range {
                let start = block * job.block_rows;
                let rows = &kept[start..kept.len().min(start + job.block_rows)];
                // SAFETY: each row is in one block, and so are its record, results and gradient; there are as
                // many records as rows.
                unsafe {
                    let records = std::slice::from_raw_parts_mut(shared.0.add(start), rows.len());
                    job.rows(worker, rows, records);
                }
            }
        });
    };
    team.for_tasks(&work, task, |()| ());

    let mut totals = Totals::ZERO;
    for record in &records {
        totals.loss.add(record.loss);
        totals.z_loss.add(record.z_loss);
        totals.correct += u64::from(record.is_correct);
    }
    // SAFETY: the rows that no block has are the plan's, and no other thread is at work.
    unsafe { job.clear_left_out(&kept) };
    if linear.weight_gradient.is_some() || linear.bias_gradient.is_some() {
        records.retain(RowRecord::has_gradient);
        let blocks = plan.shape.classes.div_ceil(VOCABULARY_BLOCK);
        let work = Work { len: blocks, elements_each: usize::MAX, elements };
        let task = |range: Range<usize>| {
            workers.with(|worker| {
                for block in range {
                    let start = block * VOCABULARY_BLOCK;
                    let classes = start..plan.shape.classes.min(start + VOCABULARY_BLOCK);
                    // SAFETY: each class is in one block, and so is its gradient.
                    unsafe { job.classes(worker, &records, classes) };
                }
            });
        };
        team.for_tasks(&work, task, |()| ());
    }
    Ok(totals)
}

impl Job<'_> {
    /// Whether a row takes part in products: it counts, or a result of rows that do not is wanted.
    ///
    /// # Safety
    /// The row is the plan's.
    unsafe fn computes(&self, row: usize) -> bool {
        let loss = self.loss;
        let all = loss.computes_losses()
            && (loss.lse.is_some() || loss.entropy.is_some() || loss.argmax.is_some());
        // SAFETY: the row is the plan's (# Safety).
        all || unsafe { loss.target(Position { row, inner: 0 }) } != Target::Ignored
    }

    /// Writes what ignored rows get that were left out: losses and gradients of 0.
    ///
    /// # Safety
    /// The rows between those of `kept` are the plan's, and no other thread accesses them.
    unsafe fn clear_left_out(&self, kept: &[usize]) {
        let rows = self.call.plan.shape.rows;
        if kept.len() == rows {
            return;
        }
        let mut kept = kept.iter().copied().peekable();
        for row in 0..rows {
            if kept.next_if_eq(&row).is_some() {
                continue;
            }
            let at = Position { row, inner: 0 };
            // SAFETY: the results cover the row (validation), which no other thread accesses (# Safety).
            unsafe {
                if let (Some(view), true) = (&self.loss.row_losses, self.loss.computes_losses()) {
                    view.set_real(at, 0, 0.0);
                }
                self.clear_hidden_gradient(row);
            }
        }
    }

    /// Sets the gradient of a row's hidden state to 0, unless it is accumulated.
    ///
    /// # Safety
    /// The row is the plan's, and no other thread accesses it.
    unsafe fn clear_hidden_gradient(&self, row: usize) {
        if let Some(LinearGradient { view, accumulate: false }) = &self.linear.hidden_gradient {
            // SAFETY: the gradient covers the row (validation), which is this thread's alone (# Safety).
            unsafe { view.fill_row(Position { row, inner: 0 }, self.linear.features, 0.0) };
        }
    }

    /// The features of a row of a matrix that is not packed, from `feature` on.
    #[inline(always)]
    fn features_of(view: &View<FloatType>, row: usize, feature: usize) -> *mut u8 {
        let offset = row as isize * view.strides[0] + feature as isize;
        view.data.wrapping_offset(offset * view.dtype.size() as isize)
    }

    /// Computes a block of logits into the worker's tile: `rows` by the weight's rows that `class` names.
    ///
    /// # Safety
    /// The rows and the `classes` classes are the plan's, no more than the tile has room for.
    unsafe fn logits(
        &self,
        worker: &mut Worker,
        rows: impl ExactSizeIterator<Item = usize> + Clone,
        classes: usize,
        class: impl Fn(usize) -> usize,
    ) {
        let count = rows.len();
        let features = self.linear.features;
        let pitch = VOCABULARY_PITCH * self.lane;
        let tile = worker.tile.start();
        worker.out.clear();
        worker.out.extend((0..count).map(|i| tile.wrapping_add(i * pitch)));
        let has_bias = self.linear.bias.is_some() || features == 0;
        if has_bias {
            // SAFETY: the classes are the plan's, and the tile has room for the rows (# Safety).
            unsafe { self.start_from_bias(worker, classes, &class) };
        }
        for feature in (0..features).step_by(DEPTH) {
            let depth = DEPTH.min(features - feature);
            worker.packed_rows.clear();
            worker.packed_rows.extend(
                (0..classes).map(|i| {
                    Self::features_of(&self.linear.weight, class(i), feature).cast_const()
                }),
            );
            // SAFETY: the weight covers its rows and features (validation), and the buffer has room for a
            // vocabulary block of DEPTH steps; the processor has the set of the kernels.
            unsafe { (self.k.pack_columns)(&worker.packed_rows, depth, worker.pack.start()) };
            // SAFETY: the rows are the plan's (# Safety).
            unsafe { self.hidden_rows(worker, rows.clone(), feature, depth) };
            let product = Product {
                left: Left::Rows(&worker.left_rows),
                packed: worker.pack.start(),
                depth,
                columns: classes,
                out: &worker.out,
                adds: has_bias || feature > 0,
            };
            // SAFETY: the operands were made just now, and the tile has room for the rows and classes (# Safety);
            // the processor has the set of the kernels.
            unsafe { (self.k.multiply)(&product) };
        }
    }

    /// Sets the logits of a block to the bias of their classes.
    ///
    /// # Safety
    /// As [`logits`](Self::logits), which has set `worker.out`.
    unsafe fn start_from_bias(
        &self,
        worker: &mut Worker,
        classes: usize,
        class: &impl Fn(usize) -> usize,
    ) {
        let short = self.lane == size_of::<f32>();
        let Some((first, others)) = worker.out.split_first() else { return };
        for i in 0..classes {
            let bias = match &self.linear.bias {
                // SAFETY: the bias covers all classes (validation), this one among them (# Safety).
                Some(bias) => unsafe { bias.real(Position::FIRST, class(i)) },
                None => 0.0,
            };
            // SAFETY: the tile has room for the row's classes, of the lanes' type (# Safety).
            unsafe {
                if short {
                    first.cast::<f32>().add(i).write(bias as f32);
                } else {
                    first.cast::<f64>().add(i).write(bias);
                }
            }
        }
        for row in others {
            // SAFETY: two rows of the tile, which do not overlap.
            unsafe { std::ptr::copy_nonoverlapping(*first, *row, classes * self.lane) };
        }
    }

    /// Finds the hidden states of some rows in the lanes' type: where they lie, or in the worker's buffer.
    ///
    /// # Safety
    /// The rows are the plan's, no more than the buffer has room for; it has `depth` features from `feature` on.
    unsafe fn hidden_rows(
        &self,
        worker: &mut Worker,
        rows: impl Iterator<Item = usize>,
        feature: usize,
        depth: usize,
    ) {
        let hidden = &self.linear.hidden;
        let pitch = DEPTH * self.lane;
        worker.left_rows.clear();
        for (i, row) in rows.enumerate() {
            let from = Self::features_of(hidden, row, feature);
            if hidden.dtype.is_lane_type() {
                worker.left_rows.push(from);
            } else {
                let to = worker.left.start().wrapping_add(i * pitch);
                // SAFETY: the hidden states cover the row and the features (validation; # Safety), and the buffer
                // has room for them; the processor has the set of the kernels.
                unsafe { (self.k.widen)(from, depth, to) };
                worker.left_rows.push(to);
            }
        }
    }

    /// Row `i` of the worker's tile, which holds the classes from `class` on.
    #[inline(always)]
    fn placed(&self, worker: &Worker, i: usize, row: usize, class: usize) -> PlacedRow {
        let start = worker.tile.start().wrapping_add(i * VOCABULARY_PITCH * self.lane);
        let zero = start.wrapping_sub(class * self.lane);
        PlacedRow { at: Position { row, inner: 0 }, x: zero, g: zero }
    }

    /// Turns a block of logits into their gradient, in place.
    ///
    /// # Safety
    /// The tile holds the logits of the records' rows and of these classes.
    unsafe fn gradient(&self, worker: &Worker, records: &[RowRecord], classes: Range<usize>) {
        for (i, record) in records.iter().enumerate() {
            let place = self.placed(worker, i, record.row, classes.start);
            let tile = place.g.wrapping_add(classes.start * self.lane);
            match record.action {
                GradientAction::Sweep => {
                    let gradient = RowGradient {
                        term: self.call.term,
                        from_initial: record.exps,
                        from_final: record.exps,
                        bias: record.bias,
                        scale: record.scale,
                        excluded: record.excluded,
                        next: None,
                    };
                    // SAFETY: the tile holds the classes of the row (# Safety), this thread's alone.
                    unsafe {
                        segment::gradient_classes(
                            &self.call,
                            &place,
                            classes.clone(),
                            ChunkFlags::default(),
                            &gradient,
                        );
                    }
                }
                GradientAction::Fill(value) => {
                    // SAFETY: the tile holds the classes of the row (# Safety), this thread's alone.
                    unsafe { self.fill(tile, classes.len(), value) };
                }
                // SAFETY: as before.
                GradientAction::Entry | GradientAction::Nothing => unsafe {
                    self.fill(tile, classes.len(), 0.0);
                },
            }
            if let Some(class) = record.excluded.filter(|class| classes.contains(class)) {
                // SAFETY: the tile holds the class of the row, this thread's alone.
                unsafe { self.fill(place.g.wrapping_add(class * self.lane), 1, record.entry) };
            }
        }
    }

    /// Sets some lanes to a number.
    ///
    /// # Safety
    /// `to` has room for `len` lanes, this thread's alone.
    #[inline(always)]
    unsafe fn fill(&self, to: *mut u8, len: usize, value: f64) {
        // SAFETY: room for `len` lanes of the type that has their size (# Safety).
        unsafe {
            if self.lane == size_of::<f32>() {
                std::slice::from_raw_parts_mut(to.cast::<f32>(), len).fill(value as f32);
            } else {
                std::slice::from_raw_parts_mut(to.cast::<f64>(), len).fill(value);
            }
        }
    }

    /// Multiplies the gradient of a block of logits, in the tile, with rows of a matrix: with those of the weight,
    /// one for each class, if `left` has the tile's rows, or with hidden states, one for each row of the tile, if it
    /// has its columns. The rows of the product are at `worker.out`, each for all features.
    ///
    /// # Safety
    /// `packed(i)` is a row of `from`, for each of the `depth` steps; `out` has room for a row for each of `left`'s.
    unsafe fn multiply_gradient(
        &self,
        worker: &mut Worker,
        left: Left,
        depth: usize,
        from: &View<FloatType>,
        packed: impl Fn(usize) -> usize,
        adds: bool,
    ) {
        let features = self.linear.features;
        for feature in (0..features).step_by(VOCABULARY_BLOCK) {
            let columns = VOCABULARY_BLOCK.min(features - feature);
            worker.packed_rows.clear();
            worker.packed_rows.extend(
                (0..depth).map(|i| Self::features_of(from, packed(i), feature).cast_const()),
            );
            worker.shifted.clear();
            worker
                .shifted
                .extend(worker.out.iter().map(|out| out.wrapping_add(feature * self.lane)));
            // SAFETY: the matrix covers its rows and features (validation), and the buffer has room for DEPTH steps
            // of as many columns; the processor has the set of the kernels.
            unsafe { (self.k.pack_rows)(&worker.packed_rows, columns, worker.pack.start()) };
            let out = &worker.shifted;
            let product = Product { left, packed: worker.pack.start(), depth, columns, out, adds };
            // SAFETY: `left` and `out` have a row for each other (# Safety); the second operand was packed just
            // now. The processor has the set of the kernels.
            unsafe { (self.k.multiply)(&product) };
        }
    }

    /// Sets `worker.left_rows` to the first rows of the tile.
    fn tile_rows(&self, worker: &mut Worker, count: usize) {
        let (tile, pitch) = (worker.tile.start(), VOCABULARY_PITCH * self.lane);
        worker.left_rows.clear();
        worker.left_rows.extend((0..count).map(|i| tile.wrapping_add(i * pitch).cast_const()));
    }

    /// [`multiply_gradient`](Self::multiply_gradient) with the rows of the tile for `left`, which `worker.left_rows`
    /// names.
    ///
    /// # Safety
    /// As there.
    unsafe fn multiply_weight(
        &self,
        worker: &mut Worker,
        depth: usize,
        from: &View<FloatType>,
        packed: impl Fn(usize) -> usize,
        adds: bool,
    ) {
        let rows = std::mem::take(&mut worker.left_rows);
        // SAFETY: this function's own # Safety.
        unsafe { self.multiply_gradient(worker, Left::Rows(&rows), depth, from, packed, adds) };
        worker.left_rows = rows;
    }

    /// Where the rows of a gradient are added up: in its own memory, or in the worker's buffer if that has another
    /// type than the lanes.
    fn is_direct(&self, gradient: &LinearGradient) -> bool {
        gradient.view.dtype == self.call.plan.logits.dtype
    }

    /// Sets `worker.out` to the rows of a gradient.
    fn place_out(
        &self,
        worker: &mut Worker,
        gradient: &LinearGradient,
        rows: impl Iterator<Item = usize>,
    ) {
        let start = worker.sums.start();
        let pitch = self.linear.features * self.lane;
        worker.out.clear();
        if self.is_direct(gradient) {
            worker.out.extend(rows.map(|row| Self::features_of(&gradient.view, row, 0)));
        } else {
            worker.out.extend(rows.enumerate().map(|(i, _)| start.wrapping_add(i * pitch)));
        }
    }

    /// Rounds rows of sums in the worker's buffer to the type of their gradient.
    ///
    /// # Safety
    /// The buffer holds the sums of the rows, and no other thread accesses these rows of the gradient.
    unsafe fn round_out(
        &self,
        worker: &Worker,
        gradient: &LinearGradient,
        rows: impl Iterator<Item = usize>,
    ) {
        if self.is_direct(gradient) {
            return;
        }
        let features = self.linear.features;
        for (i, row) in rows.enumerate() {
            let from = worker.sums.start().wrapping_add(i * features * self.lane);
            if gradient.view.dtype == self.linear.hidden.dtype && !gradient.accumulate {
                let to = Self::features_of(&gradient.view, row, 0);
                // SAFETY: the buffer holds the row's sums, and the gradient covers the row (validation), this
                // thread's alone (# Safety); the processor has the set of the kernels.
                unsafe { (self.k.narrow)(from, features, to) };
                continue;
            }
            for feature in 0..features {
                // SAFETY: the buffer holds the row's sums.
                let sum = unsafe { self.lane_at(from, feature) };
                // SAFETY: the gradient covers the row (validation), this thread's alone (# Safety).
                unsafe { add(gradient, Position { row, inner: 0 }, feature, sum) };
            }
        }
    }

    /// # Safety
    /// There are more than `i` lanes at `from`.
    #[inline(always)]
    unsafe fn lane_at(&self, from: *const u8, i: usize) -> f64 {
        // SAFETY: lanes of the type that has their size (# Safety).
        unsafe {
            if self.lane == size_of::<f32>() {
                f64::from(*from.cast::<f32>().add(i))
            } else {
                *from.cast::<f64>().add(i)
            }
        }
    }

    /// Computes the gradients of the weight and the bias of some classes.
    ///
    /// # Safety
    /// The records are all of the rows that have a gradient; no other thread accesses these classes' gradients.
    unsafe fn classes(&self, worker: &mut Worker, records: &[RowRecord], classes: Range<usize>) {
        let mut bias = [0.0; VOCABULARY_BLOCK];
        let mut adds = self
            .linear
            .weight_gradient
            .is_some_and(|weight| self.is_direct(&weight) && weight.accumulate);
        for records in records.chunks(self.weight_rows) {
            let rows = records.iter().map(|record| record.row);
            // SAFETY: the rows and classes are the plan's, no more than the tile has room for.
            unsafe {
                self.logits(worker, rows, classes.len(), |i| classes.start + i);
                self.gradient(worker, records, classes.clone());
            }
            if self.linear.bias_gradient.is_some() {
                self.tile_rows(worker, records.len());
                // SAFETY: the tile holds the rows and classes; the processor has the set of the kernels.
                unsafe { (self.k.add_columns)(&worker.left_rows, classes.len(), &mut bias) };
            }
            let Some(weight) = &self.linear.weight_gradient else { continue };
            for first in (0..records.len()).step_by(DEPTH) {
                let steps = &records[first..records.len().min(first + DEPTH)];
                let left = Left::Columns {
                    first: worker.tile.start().wrapping_add(first * VOCABULARY_PITCH * self.lane),
                    pitch: VOCABULARY_PITCH,
                    rows: classes.len(),
                };
                self.place_out(worker, weight, classes.clone());
                // SAFETY: the tile holds the rows and classes, and the rows are the plan's.
                unsafe {
                    self.multiply_gradient(
                        worker,
                        left,
                        steps.len(),
                        &self.linear.hidden,
                        |i| steps[i].row,
                        adds,
                    );
                }
                adds = true;
            }
        }
        if let Some(weight) = &self.linear.weight_gradient {
            if adds {
                // SAFETY: the buffer holds the sums, if they are not direct; the classes are this thread's.
                unsafe { self.round_out(worker, weight, classes.clone()) };
            } else if !weight.accumulate {
                for class in classes.clone() {
                    let at = Position { row: class, inner: 0 };
                    // SAFETY: the gradient covers the class (validation), this thread's alone (# Safety).
                    unsafe { weight.view.fill_row(at, self.linear.features, 0.0) };
                }
            }
        }
        if let Some(gradient) = &self.linear.bias_gradient {
            for (class, &sum) in classes.zip(&bias) {
                // SAFETY: the gradient covers the class (validation), this thread's alone (# Safety).
                unsafe { add(gradient, Position::FIRST, class, sum) };
            }
        }
    }
}

/// Writes an element of a gradient, or adds to it.
///
/// # Safety
/// The gradient covers the element, and no other thread accesses it.
#[inline(always)]
unsafe fn add(gradient: &LinearGradient, at: Position, index: usize, value: f64) {
    let LinearGradient { view, accumulate } = gradient;
    // SAFETY: this function's own # Safety.
    unsafe {
        let value = if *accumulate { view.real(at, index) + value } else { value };
        view.set_real(at, index, value);
    }
}
