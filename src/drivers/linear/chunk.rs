//! Linear losses with a workspace: the logits of a chunk of rows are made once and stay until their gradient has been
//! multiplied with the weight and with the hidden states, three products in all.
//!
//! A chunk goes through three phases, each over all threads: blocks of classes make the logits, groups of rows turn
//! them into their gradient, and blocks of features and of classes make the two gradients.

use super::job::{Job, RowRecord, Tile, clear_hidden_gradient, for_each, for_rows};
use super::memory::{Memory, Needs, Sizes, Worker, Workers};
use crate::error::Error;
use crate::kernels::row_math::ROWS;
use crate::parallel::Team;
use crate::strategy::VOCABULARY_BLOCK;
use std::ops::Range;

/// The memory of a chunk of rows.
pub struct Chunk {
    /// Rows.
    rows: usize,
    /// All logits of the rows, or their gradient.
    logits: Memory,
    /// Bytes from one row to the next.
    pitch: usize,
    /// Sums of the gradient of the hidden states, if that has another type than the lanes.
    hidden_sums: Memory,
    /// The same of the weight, over all chunks.
    weight_sums: Memory,
    /// Sums of the gradient of the bias, in f64.
    bias_sums: Memory,
}

impl Chunk {
    /// Takes the memory of a chunk, if the call has one.
    pub fn new(needs: &Needs, sizes: &Sizes) -> Result<Option<Chunk>, Error> {
        if needs.chunk_rows == 0 {
            return Ok(None);
        }
        let [logits, hidden, weight, bias] = sizes.chunk_bytes(needs.chunk_rows);
        Ok(Some(Chunk {
            rows: needs.chunk_rows,
            logits: Memory::new(logits)?,
            pitch: logits / needs.chunk_rows,
            hidden_sums: Memory::new(hidden)?,
            weight_sums: Memory::new(weight)?,
            bias_sums: Memory::new(bias)?,
        }))
    }

    fn tile(&self) -> Tile {
        Tile { zero: self.logits.start(), pitch: self.pitch }
    }
}

/// Sums that several threads add to, each its own part.
#[derive(Clone, Copy)]
struct Sums {
    hidden: *mut u8,
    weight: *mut u8,
    bias: *mut f64,
}

// SAFETY: every access is unsafe, and asks that no other thread accesses the same part.
unsafe impl Sync for Sums {}

impl Sums {
    /// The sums of the bias of some classes.
    ///
    /// # Safety
    /// The memory holds them, and no other thread accesses them.
    unsafe fn bias<'a>(&self, classes: &Range<usize>) -> &'a mut [f64] {
        // SAFETY: the memory holds the sums of the classes, which no other thread accesses (# Safety).
        unsafe { std::slice::from_raw_parts_mut(self.bias.add(classes.start), classes.len()) }
    }
}

impl Job<'_> {
    /// Computes the rows chunk by chunk: results, records and gradients.
    ///
    /// # Safety
    /// The rows are the plan's, each with a record; no other thread accesses them, nor the gradients.
    pub unsafe fn chunks(
        &self,
        chunk: &Chunk,
        workers: &Workers,
        team: &Team,
        rows: &[usize],
        records: &mut [RowRecord],
    ) {
        let classes = self.call.plan.shape.classes;
        let sums = Sums {
            hidden: chunk.hidden_sums.start(),
            weight: chunk.weight_sums.start(),
            bias: chunk.bias_sums.start().cast(),
        };
        let has_bias = self.linear.bias_gradient.is_some();
        if has_bias {
            // SAFETY: `Sizes::chunk_bytes` counts a sum for each class if there is a gradient of the bias. No task has
            // begun.
            unsafe { sums.bias.write_bytes(0, classes) };
        }
        let tile = chunk.tile();
        let mut adds = false;
        for (rows, records) in rows.chunks(chunk.rows).zip(records.chunks_mut(chunk.rows)) {
            let elements = self.elements(rows.len());
            for_each(team, self.blocks().len(), elements, |block| {
                let classes = self.block(block);
                let class = |i: usize| classes.start + i;
                let rows = rows.iter().copied();
                // SAFETY: `Sizes::chunk_bytes` counts all classes of a chunk's rows, which are the plan's (# Safety).
                // A worker has room to prepare them (`Sizes::left_bytes`). `for_each` gives each block of classes to one
                // task.
                workers.with(|worker| unsafe {
                    self.logits(worker, &tile, classes.start, rows, classes.len(), class);
                });
            });
            for_rows(team, rows, ROWS, elements, records, |range, records| {
                let tile = Tile { zero: tile.row(range.start), ..tile };
                // SAFETY: the tasks above have made the logits of all classes, of rows that are the plan's (# Safety).
                // `for_rows` gives each group to one task.
                workers.with(|worker| unsafe {
                    self.group(worker, &tile, &rows[range], records);
                });
            });
            let records = &*records;
            let features = match self.linear.hidden_gradient {
                Some(_) => self.linear.features.div_ceil(VOCABULARY_BLOCK),
                None => 0,
            };
            let blocks = match self.linear.weight_gradient.is_some() || has_bias {
                true => self.blocks().len(),
                false => 0,
            };
            for_each(team, features + blocks, elements, |index| {
                let sums = &sums;
                // SAFETY: `group` has left the gradient of all classes, of every row of the chunk, and
                // `Sizes::chunk_bytes` counts the sums. `for_each` gives each block of features, and each block of
                // classes, to one task.
                workers.with(|worker| unsafe {
                    if index < features {
                        let first = index * VOCABULARY_BLOCK;
                        let some = first..self.linear.features.min(first + VOCABULARY_BLOCK);
                        self.features(worker, &tile, records, some, sums.hidden);
                    } else {
                        let classes = self.block(index - features);
                        let row_bytes = self.linear.features * self.lane;
                        let own = sums.weight.wrapping_add(classes.start * row_bytes);
                        let bias: &mut [f64] = match has_bias {
                            true => sums.bias(&classes),
                            false => &mut [],
                        };
                        self.add_classes(worker, &tile, records, classes, own, bias, adds);
                    }
                });
            });
            adds = true;
        }
        for classes in self.blocks() {
            let own = sums.weight.wrapping_add(classes.start * self.linear.features * self.lane);
            // SAFETY: the loop above has added all rows to the sums, and its tasks have ended; the gradients are this
            // call's alone (# Safety).
            unsafe {
                let bias: &[f64] = if has_bias { sums.bias(&classes) } else { &[] };
                self.finish_classes(classes, own, bias, adds);
            }
        }
    }

    /// Turns all logits of a group of rows into their gradient, and computes the results and records of the rows.
    ///
    /// # Safety
    /// The tile has all logits of the rows, which are the plan's; no other thread accesses them.
    unsafe fn group(
        &self,
        worker: &mut Worker,
        tile: &Tile,
        rows: &[usize],
        records: &mut [RowRecord],
    ) {
        // SAFETY: the tile has all logits of the rows, which are the plan's and this thread's (# Safety). The loops end
        // before what they reduce is finished, and the gradient is made of records that `finish` has made.
        unsafe {
            self.start(worker, rows, Some(tile));
            if self.call.from_lse {
                self.read_lse(worker, rows);
            }
            if self.call.sums_exps {
                for classes in self.blocks() {
                    for (i, &row) in rows.iter().enumerate() {
                        self.reduce(worker, tile, i, row, classes.clone());
                    }
                }
            }
            self.finish(worker, rows, records);
            for classes in self.blocks() {
                self.gradient(tile, records, classes);
            }
            for record in records.iter().filter(|record| !record.has_gradient()) {
                clear_hidden_gradient(self.linear, record.row);
            }
        }
    }

    /// Computes some features of the gradient of the hidden states of a chunk.
    ///
    /// # Safety
    /// The tile has the gradient of the records' rows for all classes; `sums` has room for their sums, if the gradient
    /// has another type than the lanes. No other thread accesses these features.
    unsafe fn features(
        &self,
        worker: &mut Worker,
        tile: &Tile,
        records: &[RowRecord],
        features: Range<usize>,
        sums: *mut u8,
    ) {
        let Some(gradient) = &self.linear.hidden_gradient else { return };
        let with = |i: &usize| records[*i].has_gradient();
        let rows = (0..records.len()).filter(with);
        let mut adds = self.is_direct(gradient) && gradient.accumulate;
        for classes in self.blocks() {
            self.tile_rows(worker, tile, classes.start, rows.clone());
            self.place_out(worker, gradient, sums, rows.clone().map(|i| records[i].row));
            // SAFETY: the tile has the rows and classes (# Safety); `place_out` has found a place for each row.
            unsafe {
                let entries = rows.clone().map(|i| records[i].entry_in(&classes));
                self.multiply_weight(worker, classes.clone(), features.clone(), entries, adds);
            }
            adds = true;
        }
        let rows = rows.map(|i| records[i].row);
        // SAFETY: the loop above has added all classes to the sums; the features are this thread's (# Safety).
        unsafe { self.round_out(gradient, sums, rows, features) };
    }
}
