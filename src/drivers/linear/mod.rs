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
mod job;
mod memory;
mod rows;
mod weight;

use super::call::Call;
use super::ranking;
use super::totals::Totals;
use crate::error::Error;
use crate::kernels::{Kernels, ProductKernels};
use crate::parallel::Team;
use crate::plan::{Linear, Loss, Plan, Target};
use crate::view::{ElementType, Position};
use chunk::Chunk;
use job::{Job, RowRecord, clear_hidden_gradient, for_each, for_rows};
use memory::{Worker, Workers, reserve};
use std::ops::Range;

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
    // SAFETY: validation has made the plan, and `Isa::kernels` has handed out the kernels (# Safety).
    let call = unsafe { Call::of_blocks(plan, kernels, loss) };
    let lane = plan.logits.dtype.size();
    let mut job = Job { call, loss, linear, k: products, lane, block_rows: 0, weight_rows: 0 };

    let mut kept = reserve::<usize>(plan.shape.rows)?;
    // SAFETY: the rows are the plan's (# Safety).
    kept.extend((0..plan.shape.rows).filter(|&row| unsafe { job.computes(row) }));
    let threads = team.size(job.elements(kept.len()));
    let sizes = job.sizes(kept.len());
    let needs = sizes.needs(threads)?;
    let threads = needs.threads;
    (job.block_rows, job.weight_rows) = (needs.block_rows, needs.weight_rows);
    let mut records = reserve::<RowRecord>(kept.len())?;
    records.resize(kept.len(), RowRecord::EMPTY);
    let workers = Workers::new(&needs, &sizes)?;
    let chunk = Chunk::new(&needs, &sizes)?;
    let team = Team { threads, ..*team };
    // Nothing has been written yet, and nothing below can fail.

    match &chunk {
        // SAFETY: `kept` are rows of the plan, and `records` was made as long. No task has begun, and the gradients are
        // the call's alone (validation refuses outputs that overlap).
        Some(chunk) => unsafe { job.chunks(chunk, &workers, &team, &kept, &mut records) },
        None => {
            let task = |range: Range<usize>, records: &mut [RowRecord]| {
                // SAFETY: `kept` are rows of the plan. `for_rows` gives each block of at most `block_rows`, and its
                // records, to one task.
                workers.with(|worker| unsafe { job.rows(worker, &kept[range], records) });
            };
            for_rows(&team, &kept, job.block_rows, job.elements(kept.len()), &mut records, task);
        }
    }

    let mut totals = Totals::ZERO;
    for record in &records {
        totals.loss.add(record.loss);
        totals.z_loss.add(record.z_loss);
        totals.entropy_bonus.add(record.entropy_bonus);
        totals.correct += u64::from(record.is_correct);
    }
    // SAFETY: `kept` are rows of the plan in their order, so those between them are too. The tasks have ended.
    unsafe { job.clear_left_out(&kept) };
    if chunk.is_none() && (linear.weight_gradient.is_some() || linear.bias_gradient.is_some()) {
        records.retain(RowRecord::has_gradient);
        let task = |classes: Range<usize>| {
            // SAFETY: `retain` has left the records that have a gradient, of all rows. `for_each` gives each block of
            // classes to one task.
            workers.with(|worker| unsafe { job.classes(worker, &records, classes) });
        };
        for_each(&team, job.blocks().len(), job.elements(kept.len()), |block| {
            task(job.block(block));
        });
    }
    Ok(totals)
}

/// Writes the gradient of the hidden states of a shard without classes: 0, unless it is accumulated.
///
/// # Safety
/// The gradient covers so many rows, and no other thread accesses them.
pub unsafe fn clear(linear: &Linear, rows: usize) {
    for row in 0..rows {
        // SAFETY: the gradient covers the row, one of so many, which no other thread accesses (# Safety).
        unsafe { clear_hidden_gradient(linear, row) };
    }
}

impl Job<'_> {
    /// Whether a row takes part in products: it counts, or a result of rows that do not is wanted.
    ///
    /// # Safety
    /// The row is the plan's.
    unsafe fn computes(&self, row: usize) -> bool {
        let loss = self.loss;
        let all = loss.computes_losses()
            && (loss.wants_lse()
                || loss.entropy.is_some()
                || loss.argmax.is_some()
                || loss.rankings.is_some_and(|rankings| rankings.top_count > 0));
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
                ranking::write_ignored(&self.call, at);
                clear_hidden_gradient(self.linear, row);
            }
        }
    }

    /// Computes the results of some rows, their records, and the gradient of their hidden states.
    ///
    /// # Safety
    /// The rows are the plan's, at most `block_rows`, each with a record; no other thread accesses them.
    pub unsafe fn rows(&self, worker: &mut Worker, rows: &[usize], records: &mut [RowRecord]) {
        let multiplies_exps = self.multiplies_exps();
        // SAFETY: the rows are the plan's, at most `block_rows`, and this thread's (# Safety). A worker's tile has room
        // for a block of so many (`Worker::new`); `logits` makes a block before it is reduced, and all blocks are
        // before `finish`.
        unsafe {
            self.start(worker, rows, None);
            if self.call.from_lse {
                self.read_lse(worker, rows);
            }
            if self.call.sums_exps {
                for classes in self.blocks() {
                    let (first, tile) = (classes.start, self.tile(worker, classes.start));
                    let class = |i: usize| first + i;
                    self.logits(worker, &tile, first, rows.iter().copied(), classes.len(), class);
                    if multiplies_exps {
                        self.multiply_exps(worker, &tile, rows, classes);
                        continue;
                    }
                    for (i, &row) in rows.iter().enumerate() {
                        self.reduce(worker, &tile, i, row, classes.clone());
                    }
                }
            }
            self.finish(worker, rows, records);
            if multiplies_exps {
                self.finish_exps(worker, records);
            } else if self.linear.hidden_gradient.is_some() {
                self.hidden_gradient(worker, records);
            }
        }
    }

    /// Computes the gradient of the hidden states of a row block.
    ///
    /// # Safety
    /// The records are those of the block's rows; no other thread accesses the rows' gradient.
    unsafe fn hidden_gradient(&self, worker: &mut Worker, records: &mut [RowRecord]) {
        let Some(gradient) = &self.linear.hidden_gradient else { return };
        for record in records.iter().filter(|record| !record.has_gradient()) {
            // SAFETY: the row is this thread's (# Safety).
            unsafe { clear_hidden_gradient(self.linear, record.row) };
        }
        // Those that have a gradient come first. The passes to come take records in any order that depends on the
        // problem alone.
        let records = match records.iter().all(RowRecord::has_gradient) {
            true => records,
            false => {
                records.sort_unstable_by_key(|record| (!record.has_gradient(), record.row));
                let count = records.partition_point(RowRecord::has_gradient);
                &mut records[..count]
            }
        };
        if records.is_empty() {
            return;
        }
        let mut adds = self.is_direct(gradient) && gradient.accumulate;
        let sums = worker.sums.start();
        for classes in self.blocks() {
            let (first, tile) = (classes.start, self.tile(worker, classes.start));
            let rows = records.iter().map(|record| record.row);
            // SAFETY: the records' rows are the plan's (# Safety), and so are the classes of `blocks`. A worker's tile has
            // room for `block_rows` rows of a block (`Worker::new`); `place_out` has found a place for each row.
            unsafe {
                self.logits(worker, &tile, first, rows.clone(), classes.len(), |i| first + i);
                self.gradient(&tile, records, classes.clone());
                self.tile_rows(worker, &tile, first, 0..records.len());
                self.place_out(worker, gradient, sums, rows);
                let entries = records.iter().map(|record| record.entry_in(&classes));
                let features = 0..self.linear.features;
                self.multiply_weight(worker, classes.clone(), features, entries, adds);
            }
            adds = true;
        }
        let rows = records.iter().map(|record| record.row);
        // SAFETY: the loop above has added all classes to the sums; the rows are this thread's (# Safety).
        unsafe { self.round_out(gradient, sums, rows, 0..self.linear.features) };
    }
}
