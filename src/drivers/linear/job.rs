//! What the passes over a linear layer share: the layer on its way, where blocks of logits are, and the products that
//! make logits and gradients.

use super::memory::{Sizes, Worker};
use crate::drivers::batch::RowGradient;
use crate::drivers::call::Call;
use crate::drivers::segment::{self, ChunkFlags, PlacedRow};
use crate::kernels::ProductKernels;
use crate::kernels::contiguous::gradient::ExpScale;
use crate::kernels::entropy_bonus::Bonus;
use crate::kernels::product::form::Order;
use crate::kernels::product::{DEPTH, Left, Product};
use crate::kernels::row_math::GradientAction;
use crate::math::exp2::Shift;
use crate::parallel::{Team, Work};
use crate::plan::{Linear, LinearGradient, Loss};
use crate::strategy::{self, VOCABULARY_BLOCK, VOCABULARY_PITCH};
use crate::view::{ElementType, FloatType, Position, View};
use crate::worker::Entered;
use std::ops::Range;

/// A linear loss on its way through the passes.
pub struct Job<'a> {
    /// What does not differ by row.
    pub call: Call<'a>,
    /// The loss.
    pub loss: &'a Loss,
    /// The layer.
    pub linear: &'a Linear,
    /// The entry points of products, of a set that the processor has: `Isa::product_kernels` handed them out (# Safety
    /// of [`run`](super::run)).
    pub k: &'a ProductKernels,
    /// Bytes of a lane.
    pub lane: usize,
    /// Rows of a row block at most.
    pub block_rows: usize,
    /// Rows that the gradient of the weight takes at a time.
    pub weight_rows: usize,
}

/// Where a block of logits is.
#[derive(Clone, Copy)]
pub struct Tile {
    /// Where class 0 of the first row is, or would be.
    pub zero: *mut u8,
    /// Bytes from one row to the next.
    pub pitch: usize,
}

// SAFETY: an address and a number. Every access through it is unsafe, and asks that no other thread accesses what is
// written.
unsafe impl Sync for Tile {}

impl Tile {
    /// Where class 0 of row `i` is, or would be.
    #[inline(always)]
    pub fn row(&self, i: usize) -> *mut u8 {
        self.zero.wrapping_add(i * self.pitch)
    }
}

/// What the passes over the gradient need to know of a row, and what is added up over the rows.
#[derive(Clone, Copy)]
pub struct RowRecord {
    /// Which.
    pub row: usize,
    /// Its loss, but for the z-loss and the entropy bonus.
    pub loss: f64,
    /// Its z-loss.
    pub z_loss: f64,
    /// The entropy bonus's part of its loss.
    pub entropy_bonus: f64,
    /// Its largest logit is the target's.
    pub is_correct: bool,
    /// The class whose entry of the gradient is `entry`.
    pub excluded: Option<usize>,
    /// See `excluded`.
    pub entry: f64,
    /// What the gradient of its logits is.
    pub action: GradientAction,
    /// What its exponentials are counted from and multiplied by.
    pub exps: ExpScale,
    /// What is subtracted from the products.
    pub bias: f64,
    /// What the differences are multiplied by.
    pub scale: f64,
    /// What the entropy bonus adds to each class, if the call has one.
    pub bonus: Bonus,
}

impl RowRecord {
    /// Of no row.
    pub const EMPTY: RowRecord = RowRecord {
        row: 0,
        loss: 0.0,
        z_loss: 0.0,
        entropy_bonus: 0.0,
        is_correct: false,
        excluded: None,
        entry: 0.0,
        action: GradientAction::Nothing,
        exps: ExpScale { shift: Shift::ZERO, factor: 0.0 },
        bias: 0.0,
        scale: 1.0,
        bonus: Bonus::NONE,
    };

    /// The gradient of the row's logits is not 0 throughout.
    pub fn has_gradient(&self) -> bool {
        match self.action {
            GradientAction::Nothing => false,
            GradientAction::Entry => self.entry != 0.0,
            GradientAction::Fill(value) => value != 0.0 || self.entry != 0.0,
            GradientAction::Sweep => true,
        }
    }

    /// The class whose entry is `entry`, and that, if it is one of `classes` and the row has a gradient.
    pub fn entry_in(&self, classes: &Range<usize>) -> Option<(usize, f64)> {
        let class = self.excluded.filter(|class| classes.contains(class) && self.has_gradient());
        class.map(|class| (class, self.entry))
    }
}

/// Memory that several threads write, each its own part.
struct Shared<T>(*mut T);

// SAFETY: every access is unsafe, and asks that no other thread accesses the same element.
unsafe impl<T: Send> Sync for Shared<T> {}

/// Calls `task` with every index below `count`, over the threads.
pub fn for_each(team: &Team, count: usize, elements: usize, task: impl Fn(usize) + Sync) {
    let work = Work { len: count, task_len: strategy::task_len(count, usize::MAX), elements };
    team.for_tasks(&work, |range| range.for_each(&task), |()| ());
}

/// Calls `task` with ranges of `len` rows and their records, over the threads.
pub fn for_rows(
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
        // SAFETY: there are as many records as rows (asserted above), and `for_each` gives each range to one task.
        let records =
            unsafe { std::slice::from_raw_parts_mut(shared.0.add(range.start), range.len()) };
        task(range, records);
    });
}

impl Job<'_> {
    /// The work of a product over so many rows, in elements of logits.
    pub fn elements(&self, rows: usize) -> usize {
        let macs = rows.saturating_mul(self.call.plan.shape.classes);
        macs.saturating_mul(self.linear.features) / strategy::MACS_OF_AN_ELEMENT
    }

    /// The sizes that decide about memory.
    pub fn sizes(&self, rows: usize) -> Sizes {
        let sums = |gradient: &Option<LinearGradient>| {
            gradient.as_ref().is_some_and(|gradient| !self.is_direct(gradient))
        };
        let linear = self.linear;
        Sizes {
            rows,
            classes: self.call.plan.shape.classes,
            features: linear.features,
            lane: self.lane,
            widens: !linear.hidden.dtype.is_lane_type(),
            record: size_of::<RowRecord>(),
            has_hidden_sums: sums(&linear.hidden_gradient),
            has_weight_sums: sums(&linear.weight_gradient),
            has_weight: linear.weight_gradient.is_some(),
            has_bias: linear.bias_gradient.is_some(),
            makes_logits_again: self.makes_logits_again(),
            top_count: self.call.rankings.map(|rankings| rankings.top_count),
            workspace: linear.workspace,
        }
    }

    /// Without a workspace the call would make the same logits more than once: for losses, unless it starts from an lse
    /// and needs no entropies for a bonus; for the gradient of the hidden states, unless exponentials are multiplied;
    /// and for those of weight and bias.
    fn makes_logits_again(&self) -> bool {
        let Linear { hidden_gradient, weight_gradient, bias_gradient, .. } = self.linear;
        let for_losses = self.call.sums_exps;
        let for_hidden = hidden_gradient.is_some() && !self.multiplies_exps();
        let for_weight = weight_gradient.is_some() || bias_gradient.is_some();
        [for_losses, for_hidden, for_weight].into_iter().filter(|&makes| makes).count() > 1
    }

    /// The classes of a block.
    pub fn block(&self, index: usize) -> Range<usize> {
        let start = index * VOCABULARY_BLOCK;
        start..self.call.plan.shape.classes.min(start + VOCABULARY_BLOCK)
    }

    /// The blocks of classes.
    pub fn blocks(&self) -> impl ExactSizeIterator<Item = Range<usize>> {
        (0..self.call.plan.shape.classes.div_ceil(VOCABULARY_BLOCK)).map(|index| self.block(index))
    }

    /// The features of a row of a matrix that is not packed, from `feature` on.
    #[inline(always)]
    pub fn features_of(view: &View<FloatType>, row: usize, feature: usize) -> *mut u8 {
        let offset = row as isize * view.strides[0] + feature as isize;
        view.data.wrapping_offset(offset * view.dtype.size() as isize)
    }

    /// The worker's tile, which holds the classes from `class` on.
    #[inline(always)]
    pub fn tile(&self, worker: &Worker, class: usize) -> Tile {
        let zero = worker.tile.start().wrapping_sub(class * self.lane);
        Tile { zero, pitch: VOCABULARY_PITCH * self.lane }
    }

    /// Computes a block of logits: `rows` by the weight's rows that `class` names. The first column is class `first`
    /// of the tile.
    ///
    /// # Safety
    /// The rows and the `classes` classes are the plan's, no more than the tile has room for, nor rows than the worker
    /// has room to prepare, nor classes than a vocabulary block has. No other thread accesses the tile.
    #[allow(clippy::too_many_arguments, reason = "where to, and the two sides of a product")]
    pub unsafe fn logits(
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
            // SAFETY: the classes are the plan's, and the tile has room for the rows (# Safety), which `worker.out`
            // names.
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
            // SAFETY: the weight covers the classes, which are the plan's (# Safety), and the features (validation).
            // The buffer has room for a vocabulary block of DEPTH steps (`Worker::new`); the processor has the set of
            // the kernels (`Job::k`).
            unsafe { (self.k.pack_columns)(&worker.packed_rows, depth, worker.pack.start()) };
            // SAFETY: the rows are the plan's, and no more than the buffer has room for (# Safety); so many features
            // are left.
            unsafe { self.hidden_rows(worker, rows.clone(), feature, depth) };
            let product = Product {
                left: Left::Rows(&worker.left_rows),
                packed: worker.pack.start(),
                depth: self.k.order.steps(depth),
                columns: classes,
                out: &worker.out,
                adds: has_bias || feature > 0,
            };
            // SAFETY: `pack_columns` and `hidden_rows` above made the operands, and the tile has room for the rows and
            // classes, aligned to the lanes' type (# Safety).
            unsafe { self.multiply(&product) };
        }
    }

    /// Computes a product.
    ///
    /// # Safety
    /// [`product::multiply`](crate::kernels::product::multiply) lists it.
    unsafe fn multiply(&self, product: &Product) {
        let _flushing = self.k.pairs.map(|_| Entered::flushing());
        // SAFETY: this function's own # Safety; the processor has the set of the kernels (`Job::k`).
        unsafe { (self.k.multiply)(product) };
    }

    /// Sets the logits of a block to the bias of their classes.
    ///
    /// # Safety
    /// As [`logits`](Self::logits), which has set `worker.out`.
    pub unsafe fn start_from_bias(
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
            // SAFETY: the tile has room for both rows (# Safety), which are a pitch apart, no less than the classes take.
            unsafe { std::ptr::copy_nonoverlapping(*first, *row, classes * self.lane) };
        }
    }

    /// Finds the hidden states of some rows as steps of a product: where they lie, or in the worker's buffer.
    ///
    /// # Safety
    /// The rows are the plan's, no more than the buffer has room for; it has `depth` features from `feature` on.
    pub unsafe fn hidden_rows(
        &self,
        worker: &mut Worker,
        rows: impl Iterator<Item = usize>,
        feature: usize,
        depth: usize,
    ) {
        let hidden = &self.linear.hidden;
        let are_steps = match self.k.order {
            Order::Single => hidden.dtype.is_lane_type(),
            Order::Swapped => false,
            Order::Paired => depth.is_multiple_of(2),
        };
        worker.left_rows.clear();
        for (i, row) in rows.enumerate() {
            let from = Self::features_of(hidden, row, feature);
            if are_steps {
                worker.left_rows.push(from);
            } else {
                let to = self.left_row(worker, i);
                // SAFETY: the hidden states cover the row and the features (validation; # Safety), and the buffer has
                // room for them (# Safety); the processor has the set of the kernels (`Job::k`).
                unsafe { (self.k.stage)(from, depth, to) };
                worker.left_rows.push(to);
            }
        }
    }

    /// Row `i` of the worker's buffer for the first operand of a product, with room for DEPTH lanes.
    fn left_row(&self, worker: &Worker, i: usize) -> *mut u8 {
        worker.left.start().wrapping_add(i * DEPTH * self.lane)
    }

    /// Row `i` of a tile.
    #[inline(always)]
    pub fn placed(&self, tile: &Tile, i: usize, row: usize) -> PlacedRow {
        PlacedRow { at: Position { row, inner: 0 }, x: tile.row(i), g: tile.row(i) }
    }

    /// Turns a block of logits into their gradient, in place.
    ///
    /// # Safety
    /// The tile holds the logits of the records' rows and of these classes; no other thread accesses them.
    pub unsafe fn gradient(&self, tile: &Tile, records: &[RowRecord], classes: Range<usize>) {
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
                        bonus: record.bonus,
                        excluded: record.excluded,
                        next: None,
                    };
                    // SAFETY: the tile holds the classes of the row, this thread's alone (# Safety).
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
                    // SAFETY: the tile holds the classes of the row, this thread's alone (# Safety).
                    unsafe { self.fill(tile, classes.len(), value) };
                }
                // SAFETY: the tile holds the classes of the row, this thread's alone (# Safety).
                GradientAction::Entry | GradientAction::Nothing => unsafe {
                    self.fill(tile, classes.len(), 0.0);
                },
            }
            if let Some(class) = record.excluded.filter(|class| classes.contains(class)) {
                // SAFETY: the tile holds the class of the row, one of these classes, this thread's alone (# Safety).
                unsafe { self.fill(place.g.wrapping_add(class * self.lane), 1, record.entry) };
            }
        }
    }

    /// Sets some lanes to a number.
    ///
    /// # Safety
    /// `to` has room for `len` lanes, this thread's alone.
    #[inline(always)]
    pub unsafe fn fill(&self, to: *mut u8, len: usize, value: f64) {
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
    /// `packed` finds the features of a row, for each of the `depth` steps, at most [`DEPTH`]. `left` has an element for
    /// each of them, and `out` room for a row for each of `left`'s.
    pub unsafe fn multiply_gradient(
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
            // SAFETY: `packed` finds the features of each row (# Safety), and the buffer has room for DEPTH steps of a
            // vocabulary block of columns (`Worker::new`); the processor has the set of the kernels (`Job::k`).
            unsafe { (self.k.pack_rows)(&worker.packed_rows, columns, worker.pack.start()) };
            let (out, depth) = (&worker.shifted, self.k.order.steps(depth));
            let product = Product { left, packed: worker.pack.start(), depth, columns, out, adds };
            // SAFETY: `left` has elements for the steps, and `out` a row for each of its rows (# Safety); `pack_rows`
            // above packed the second operand.
            unsafe { self.multiply(&product) };
        }
    }

    /// Sets `worker.left_rows` to rows of a tile, from class `first` on.
    pub fn tile_rows(
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
    /// [`multiply_gradient`](Self::multiply_gradient). `entries` has an item for each row: its
    /// [entry](RowRecord::entry_in), which dominates the row. Where products round it to bf16, it is multiplied apart.
    ///
    /// # Safety
    /// The tile's rows hold the classes, a block's, and `entries` name these alone; `out` has room for a row for each.
    pub unsafe fn multiply_weight(
        &self,
        worker: &mut Worker,
        classes: Range<usize>,
        features: Range<usize>,
        entries: impl Iterator<Item = Option<(usize, f64)>> + Clone,
        adds: bool,
    ) {
        let mut rows = std::mem::take(&mut worker.left_rows);
        if let Some(pairs) = &self.k.pairs {
            for ((i, row), entry) in rows.iter_mut().enumerate().zip(entries.clone()) {
                let to = self.left_row(worker, i);
                // SAFETY: the row holds the classes (# Safety), a block's and so no more than DEPTH, the entry's among
                // them. The buffer has room for as many rows as a block or a chunk has (`Sizes::left_bytes`); the processor has the set of the kernels (`Job::k`).
                unsafe {
                    (pairs.stage_row)(*row, classes.len(), to);
                    if let Some((class, _)) = entry {
                        self.k.order.clear(to, class - classes.start, self.lane);
                    }
                }
                *row = to;
            }
        }
        let (left, weight) = (Left::Rows(&rows), &self.linear.weight);
        let packed = |i: usize, feature: usize| {
            Self::features_of(weight, classes.start + i, feature).cast_const()
        };
        // SAFETY: the rows hold the classes, or were prepared above, and `out` has room for a row for each (# Safety);
        // the weight covers the classes and the features (validation).
        unsafe {
            self.multiply_gradient(worker, left, classes.len(), features.clone(), packed, adds);
        }
        worker.left_rows = rows;
        let Some(pairs) = &self.k.pairs else { return };
        for (out, entry) in worker.out.iter().zip(entries) {
            if let Some((class, entry)) = entry {
                let from = Self::features_of(weight, class, features.start);
                let to = out.wrapping_add(features.start * self.lane);
                // SAFETY: the weight covers the class, one of these, and the features (validation), and the row has
                // room for them (# Safety); the processor has the set of the kernels (`Job::k`).
                unsafe { (pairs.add_scaled)(from, features.len(), entry, to) };
            }
        }
    }

    /// Multiplies the columns of a tile, which holds these classes, with the hidden states of the records' rows, in
    /// chains of [`DEPTH`] rows, with the rows' entries apart as [`multiply_weight`](Self::multiply_weight) has them:
    /// see [`multiply_gradient`](Self::multiply_gradient). Rows without a gradient take part as zeros, whatever their
    /// hidden states hold.
    ///
    /// # Safety
    /// The tile has the records' rows and the classes; `out` has room for a row for each class.
    pub unsafe fn multiply_hidden(
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
            let left = if let Some(pairs) = &self.k.pairs {
                self.tile_rows(worker, tile, classes.start, first..first + steps.len());
                let to = worker.left.start();
                // SAFETY: the tile has the steps' rows and the classes (# Safety), and the buffer has room for DEPTH
                // steps of a block (`Sizes::left_bytes`), with the partner of a last one, since DEPTH is even; the
                // processor has the set of the kernels (`Job::k`).
                unsafe {
                    (pairs.stage_columns)(&worker.left_rows, classes.len(), to, VOCABULARY_PITCH);
                    for (i, record) in steps.iter().enumerate() {
                        if let Some((class, _)) = record.entry_in(&classes) {
                            let column = to.wrapping_add((class - classes.start) * self.lane);
                            self.k.order.clear(column, i, VOCABULARY_PITCH * self.lane);
                        }
                    }
                }
                Left::Columns { first: to, pitch: VOCABULARY_PITCH, rows: classes.len() }
            } else {
                let first = tile.row(first).wrapping_add(classes.start * self.lane);
                Left::Columns { first, pitch: tile.pitch / self.lane, rows: classes.len() }
            };
            let packed = |i: usize, feature: usize| match steps[i].has_gradient() {
                true => Self::features_of(hidden, steps[i].row, feature).cast_const(),
                false => zeros,
            };
            let features = 0..self.linear.features;
            // SAFETY: the tile has the steps' rows and the classes, and `out` room for a row for each class (# Safety).
            // The hidden states cover the rows (validation), and there are zeros for a vocabulary block of columns
            // (`Worker::new`).
            unsafe { self.multiply_gradient(worker, left, steps.len(), features, packed, adds) };
            adds = true;
            let Some(pairs) = &self.k.pairs else { continue };
            for record in steps {
                if let Some((class, entry)) = record.entry_in(&classes) {
                    let from = Self::features_of(hidden, record.row, 0);
                    let to = worker.out[class - classes.start];
                    // SAFETY: the hidden states cover the row and the features (validation), and `out` has room for a
                    // row for each class (# Safety); the processor has the set of the kernels (`Job::k`).
                    unsafe { (pairs.add_scaled)(from, self.linear.features, entry, to) };
                }
            }
        }
    }

    /// Where the rows of a gradient are added up: in its own memory, or in the worker's buffer if that has another
    /// type than the lanes.
    pub fn is_direct(&self, gradient: &LinearGradient) -> bool {
        gradient.view.dtype == self.call.plan.logits.dtype
    }

    /// Sets `worker.out` to the rows of a gradient, or of its sums.
    pub fn place_out(
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
    pub unsafe fn round_out(
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
                // SAFETY: the sums are there (# Safety), and the gradient covers the row (validation), this thread's
                // alone (# Safety); the processor has the set of the kernels (`Job::k`).
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
    pub unsafe fn lane_at(&self, from: *const u8, i: usize) -> f64 {
        // SAFETY: lanes of the type that has their size (# Safety).
        unsafe {
            if self.lane == size_of::<f32>() {
                f64::from(*from.cast::<f32>().add(i))
            } else {
                *from.cast::<f64>().add(i)
            }
        }
    }
}

/// Writes an element of a gradient, or adds to it.
///
/// # Safety
/// The gradient covers the element, and no other thread accesses it.
#[inline(always)]
pub unsafe fn add(gradient: &LinearGradient, at: Position, index: usize, value: f64) {
    let LinearGradient { view, accumulate } = gradient;
    // SAFETY: the gradient covers the element, which no other thread accesses (# Safety).
    unsafe {
        let value = if *accumulate { view.real(at, index) + value } else { value };
        view.set_real(at, index, value);
    }
}

/// Sets the gradient of a row's hidden state to 0, unless it is accumulated.
///
/// # Safety
/// The row is the plan's, and no other thread accesses it.
pub unsafe fn clear_hidden_gradient(linear: &Linear, row: usize) {
    if let Some(LinearGradient { view, accumulate: false }) = &linear.hidden_gradient {
        // SAFETY: the gradient covers the row (validation), which is this thread's alone (# Safety).
        unsafe { view.fill_row(Position { row, inner: 0 }, linear.features, 0.0) };
    }
}
