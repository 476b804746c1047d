//! Losses of a linear layer: the logits are made block by block in scratch, swept there, and forgotten.
//!
//! A *block* is some rows by [`VOCABULARY_BLOCK`] classes. Rows are cut into row blocks, each of which one thread
//! takes through all classes: products make its logits, sweeps reduce them to row states, and row arithmetic makes
//! results and the coefficients of the gradient. A second pass over the same blocks makes the gradient of their
//! logits, from logits that are made again to the same bits, and multiplies it with the weight. The gradient of
//! the weight is a third pass, in which each thread takes blocks of classes through all rows.
//!
//! With a workspace, the logits of a chunk of rows stay until both gradients are made from them (`chunk.rs`), which
//! spares one product more.
//!
//! Ignored rows are left out of all products.

mod chunk;
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
use chunk::Chunk;
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

/// Where a block of logits is.
#[derive(Clone, Copy)]
struct Tile {
    /// Where class 0 of the first row is, or would be.
    zero: *mut u8,
    /// Bytes from one row to the next.
    pitch: usize,
}

// SAFETY: an address and a number. Every access through it is unsafe, and asks that no other thread accesses what is
// written.
unsafe impl Sync for Tile {}

impl Tile {
    /// Where class 0 of row `i` is, or would be.
    #[inline(always)]
    fn row(&self, i: usize) -> *mut u8 {
        self.zero.wrapping_add(i * self.pitch)
    }
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
    let threads = team.size(job.elements(kept.len()));
    let needs = job.choose_block(kept.len(), threads)?;
    let threads = needs.threads;
    (job.block_rows, job.weight_rows) = (needs.block_rows, needs.weight_rows);
    let mut records = reserve::<RowRecord>(kept.len())?;
    records.resize(kept.len(), RowRecord::EMPTY);
    let workers = Workers::new(&needs, &job)?;
    let chunk = Chunk::new(&needs, &job)?;
    let team = Team { threads, ..*team };
    // Nothing has been written yet, and nothing below can fail.

    match &chunk {
        // SAFETY: the rows are the plan's, each with a record, and no other thread is at work.
        Some(chunk) => unsafe { job.chunks(chunk, &workers, &team, &kept, &mut records) },
        None => {
            let task = |range: Range<usize>, records: &mut [RowRecord]| {
                // SAFETY: each row is in one block, and so are its record, results and gradient.
                workers.with(|worker| unsafe { job.rows(worker, &kept[range], records) });
            };
            for_rows(&team, &kept, job.block_rows, job.elements(kept.len()), &mut records, task);
        }
    }

    let mut totals = Totals::ZERO;
    for record in &records {
        totals.loss.add(record.loss);
        totals.z_loss.add(record.z_loss);
        totals.correct += u64::from(record.is_correct);
    }
    // SAFETY: the rows that no block has are the plan's, and no other thread is at work.
    unsafe { job.clear_left_out(&kept) };
    if chunk.is_none() && (linear.weight_gradient.is_some() || linear.bias_gradient.is_some()) {
        records.retain(RowRecord::has_gradient);
        let task = |classes: Range<usize>| {
            // SAFETY: each class is in one block, and so is its gradient.
            workers.with(|worker| unsafe { job.classes(worker, &records, classes) });
        };
        for_each(&team, job.blocks().len(), job.elements(kept.len()), |block| {
            task(job.block(block));
        });
    }
    Ok(totals)
}

/// Calls `task` with every index below `count`, over the threads.
fn for_each(team: &Team, count: usize, elements: usize, task: impl Fn(usize) + Sync) {
    let work = Work { len: count, elements_each: usize::MAX, elements };
    team.for_tasks(&work, |range| range.for_each(&task), |()| ());
}

/// Calls `task` with ranges of `len` rows and their records, over the threads.
fn for_rows(
    team: &Team,
    rows: &[usize],
    len: usize,
    elements: usize,
    records: &mut [RowRecord],
    task: impl Fn(Range<usize>, &mut [RowRecord]) + Sync,
) {
    assert_eq!(rows.len(), records.len());
    let shared = Shared(records.as_mut_ptr());
    for_each(team, rows.len().div_ceil(len), elements, |index| {
        let range = index * len..rows.len().min((index + 1) * len);
        let shared = &shared;
        // SAFETY: there are as many records as rows, and each range is in one task.
        let records =
            unsafe { std::slice::from_raw_parts_mut(shared.0.add(range.start), range.len()) };
        task(range, records);
    });
}

/// Sets the gradient of hidden states to 0, unless it is accumulated: that of a shard without classes.
///
/// # Safety
/// The gradient covers so many rows of the features, and no other thread accesses them.
pub unsafe fn clear_hidden_gradient(linear: &Linear, rows: usize) {
    if let Some(LinearGradient { view, accumulate: false }) = &linear.hidden_gradient {
        for row in 0..rows {
            // SAFETY: this function's own # Safety.
            unsafe { view.fill_row(Position { row, inner: 0 }, linear.features, 0.0) };
        }
    }
}

impl Job<'_> {
    /// The work of a product over so many rows, in elements of logits.
    fn elements(&self, rows: usize) -> usize {
        let macs = rows.saturating_mul(self.call.plan.shape.classes);
        macs.saturating_mul(self.linear.features) / strategy::MACS_OF_AN_ELEMENT
    }

    /// The classes of a block.
    fn block(&self, index: usize) -> Range<usize> {
        let start = index * VOCABULARY_BLOCK;
        start..self.call.plan.shape.classes.min(start + VOCABULARY_BLOCK)
    }

    /// The blocks of classes.
    fn blocks(&self) -> impl ExactSizeIterator<Item = Range<usize>> {
        (0..self.call.plan.shape.classes.div_ceil(VOCABULARY_BLOCK)).map(|index| self.block(index))
    }

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

    /// The worker's tile, which holds the classes from `class` on.
    #[inline(always)]
    fn tile(&self, worker: &Worker, class: usize) -> Tile {
        let zero = worker.tile.start().wrapping_sub(class * self.lane);
        Tile { zero, pitch: VOCABULARY_PITCH * self.lane }
    }

    /// Computes a block of logits: `rows` by the weight's rows that `class` names. The first column is class `first`
    /// of the tile.
    ///
    /// # Safety
    /// The rows and the `classes` classes are the plan's, no more than the tile has room for; no other thread accesses
    /// it.
    #[allow(clippy::too_many_arguments, reason = "where to, and the two sides of a product")]
    unsafe fn logits(
        &self,
        worker: &mut Worker,
        tile: &Tile,
        first: usize,
        rows: impl ExactSizeIterator<Item = usize> + Clone,
        classes: usize,
        class: impl Fn(usize) -> usize,
    ) {
        let features = self.linear.features;
        worker.out.clear();
        worker.out.extend((0..rows.len()).map(|i| tile.row(i).wrapping_add(first * self.lane)));
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

    /// Row `i` of a tile.
    #[inline(always)]
    fn placed(&self, tile: &Tile, i: usize, row: usize) -> PlacedRow {
        PlacedRow { at: Position { row, inner: 0 }, x: tile.row(i), g: tile.row(i) }
    }

    /// Turns a block of logits into their gradient, in place.
    ///
    /// # Safety
    /// The tile holds the logits of the records' rows and of these classes.
    unsafe fn gradient(&self, tile: &Tile, records: &[RowRecord], classes: Range<usize>) {
        for (i, record) in records.iter().enumerate() {
            let place = self.placed(tile, i, record.row);
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

    /// Multiplies the gradient of a block of logits with rows of a matrix, for these features: with those of the weight,
    /// one for each class, if `left` has a tile's rows, or with hidden states, one for each row of the tile, if it has
    /// its columns. The rows of the product are at `worker.out`, each for all features.
    ///
    /// # Safety
    /// `packed` finds the features of a row, for each of the `depth` steps, at most [`DEPTH`]; `out` has room for a row
    /// for each of `left`'s.
    unsafe fn multiply_gradient(
        &self,
        worker: &mut Worker,
        left: Left,
        depth: usize,
        features: Range<usize>,
        packed: impl Fn(usize, usize) -> *const u8,
        adds: bool,
    ) {
        for feature in features.clone().step_by(VOCABULARY_BLOCK) {
            let columns = VOCABULARY_BLOCK.min(features.end - feature);
            worker.packed_rows.clear();
            worker.packed_rows.extend((0..depth).map(|i| packed(i, feature)));
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

    /// Sets `worker.left_rows` to rows of a tile, from class `first` on.
    fn tile_rows(
        &self,
        worker: &mut Worker,
        tile: &Tile,
        first: usize,
        rows: impl Iterator<Item = usize>,
    ) {
        let start = first * self.lane;
        worker.left_rows.clear();
        worker.left_rows.extend(rows.map(|i| tile.row(i).wrapping_add(start).cast_const()));
    }

    /// Multiplies rows of a tile, which `worker.left_rows` names, with the weight of these classes: see
    /// [`multiply_gradient`](Self::multiply_gradient).
    ///
    /// # Safety
    /// The tile's rows hold the classes; `out` has room for a row for each.
    unsafe fn multiply_weight(
        &self,
        worker: &mut Worker,
        classes: Range<usize>,
        features: Range<usize>,
        adds: bool,
    ) {
        let rows = std::mem::take(&mut worker.left_rows);
        let (left, weight) = (Left::Rows(&rows), &self.linear.weight);
        let packed = |i: usize, feature: usize| {
            Self::features_of(weight, classes.start + i, feature).cast_const()
        };
        // SAFETY: this function's own # Safety; the weight covers the classes (validation).
        unsafe { self.multiply_gradient(worker, left, classes.len(), features, packed, adds) };
        worker.left_rows = rows;
    }

    /// Multiplies the columns of a tile, which holds these classes, with the hidden states of the records' rows, in
    /// chains of [`DEPTH`] rows: see [`multiply_gradient`](Self::multiply_gradient). Rows without a gradient take part
    /// as zeros, whatever their hidden states hold.
    ///
    /// # Safety
    /// The tile has the records' rows and the classes; `out` has room for a row for each class.
    unsafe fn multiply_hidden(
        &self,
        worker: &mut Worker,
        tile: &Tile,
        records: &[RowRecord],
        classes: Range<usize>,
        mut adds: bool,
    ) {
        let (hidden, zeros) = (&self.linear.hidden, worker.zeros.start().cast_const());
        for first in (0..records.len()).step_by(DEPTH) {
            let steps = &records[first..records.len().min(first + DEPTH)];
            let left = Left::Columns {
                first: tile.row(first).wrapping_add(classes.start * self.lane),
                pitch: tile.pitch / self.lane,
                rows: classes.len(),
            };
            let packed = |i: usize, feature: usize| match steps[i].has_gradient() {
                true => Self::features_of(hidden, steps[i].row, feature).cast_const(),
                false => zeros,
            };
            let features = 0..self.linear.features;
            // SAFETY: the tile has the steps' rows, and the hidden states cover them (validation); there are zeros for
            // a vocabulary block of columns.
            unsafe { self.multiply_gradient(worker, left, steps.len(), features, packed, adds) };
            adds = true;
        }
    }

    /// Where the rows of a gradient are added up: in its own memory, or in the worker's buffer if that has another
    /// type than the lanes.
    fn is_direct(&self, gradient: &LinearGradient) -> bool {
        gradient.view.dtype == self.call.plan.logits.dtype
    }

    /// Sets `worker.out` to the rows of a gradient, or of its sums.
    fn place_out(
        &self,
        worker: &mut Worker,
        gradient: &LinearGradient,
        sums: *mut u8,
        rows: impl Iterator<Item = usize>,
    ) {
        let pitch = self.linear.features * self.lane;
        worker.out.clear();
        if self.is_direct(gradient) {
            worker.out.extend(rows.map(|row| Self::features_of(&gradient.view, row, 0)));
        } else {
            worker.out.extend(rows.enumerate().map(|(i, _)| sums.wrapping_add(i * pitch)));
        }
    }

    /// Rounds the sums of some features of rows to the type of their gradient, unless they are in its own memory.
    ///
    /// # Safety
    /// The memory at `sums` holds the sums of the rows, and no other thread accesses these features of the gradient.
    unsafe fn round_out(
        &self,
        gradient: &LinearGradient,
        sums: *const u8,
        rows: impl Iterator<Item = usize>,
        features: Range<usize>,
    ) {
        if self.is_direct(gradient) {
            return;
        }
        for (i, row) in rows.enumerate() {
            let from = sums.wrapping_add(i * self.linear.features * self.lane);
            if gradient.view.dtype == self.linear.hidden.dtype && !gradient.accumulate {
                let from = from.wrapping_add(features.start * self.lane);
                let to = Self::features_of(&gradient.view, row, features.start);
                // SAFETY: the sums are there (# Safety), and the gradient covers the row (validation), this
                // thread's alone; the processor has the set of the kernels.
                unsafe { (self.k.narrow)(from, features.len(), to) };
                continue;
            }
            for feature in features.clone() {
                // SAFETY: the sums are there (# Safety).
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
        let mut adds = false;
        let tile = self.tile(worker, classes.start);
        for records in records.chunks(self.weight_rows) {
            let rows = records.iter().map(|record| record.row);
            // SAFETY: the rows and classes are the plan's, no more than the tile has room for.
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
        // SAFETY: the sums are those of all records; the classes are this thread's (# Safety).
        unsafe { self.finish_classes(classes, sums, &bias, adds) };
    }

    /// Adds what the records' rows contribute to the gradients of the weight and the bias of some classes. Without
    /// `adds`, sums begin.
    ///
    /// # Safety
    /// The tile has the gradient of the records' rows and of the classes, for whose sums there is room at `sums` and in
    /// `bias`; no other thread accesses them.
    #[allow(clippy::too_many_arguments, reason = "a block, and where its two sums go")]
    unsafe fn add_classes(
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
            // SAFETY: the tile has the rows and classes (# Safety); the processor has the set of the kernels.
            unsafe { (self.k.add_columns)(&worker.left_rows, classes.len(), bias) };
        }
        if let Some(weight) = &self.linear.weight_gradient {
            self.place_out(worker, weight, sums, classes.clone());
            let adds = adds || (self.is_direct(weight) && weight.accumulate);
            // SAFETY: this function's own # Safety.
            unsafe { self.multiply_hidden(worker, tile, records, classes, adds) };
        }
    }

    /// Writes the gradients of the weight and the bias of some classes, once their sums are complete; `has_sums` says
    /// whether there were any rows.
    ///
    /// # Safety
    /// The sums are as [`add_classes`](Self::add_classes) left them; no other thread accesses the classes' gradients.
    unsafe fn finish_classes(
        &self,
        classes: Range<usize>,
        sums: *const u8,
        bias: &[f64],
        has_sums: bool,
    ) {
        let features = self.linear.features;
        if let Some(weight) = &self.linear.weight_gradient {
            if has_sums {
                // SAFETY: the sums are complete (# Safety), and the classes are this thread's.
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
