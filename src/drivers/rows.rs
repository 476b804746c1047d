//! Contiguous rows, batch by batch on one thread.

use super::batch::{Batch, InitialShift, Row, RowAction};
use super::call::Call;
use super::place::Place;
use super::ranking;
use super::segment::{self, ChunkFlags, PendingRow, PlacedRow};
use super::totals::{GroupTotals, Totals};
use crate::kernels::row_math::{ROWS, RowLanes};
use crate::kernels::row_state::RowState;
use crate::strategy::{self, BATCHED_CLASSES, SEGMENTS};
use crate::view::ElementType;
use std::ops::Range;

/// A batch with what its first sweeps learned for the second.
struct Stage {
    batch: Batch,
    /// By row of a batch of rows of one segment, or by segment of a single row. Rows of a larger batch that have
    /// several segments have one sweep each, and nobody reads their flags.
    flags: [ChunkFlags; SEGMENTS],
}

impl Stage {
    const EMPTY: Stage =
        Stage { batch: Batch::EMPTY, flags: [ChunkFlags { out_of_range: 0, redone: 0 }; SEGMENTS] };

    /// Writes what is left to write of row `i`'s gradient.
    ///
    /// # Safety
    /// The row is the call's, and no other thread accesses it.
    unsafe fn write(&mut self, call: &Call, i: usize) {
        let Stage { batch, flags } = self;
        // SAFETY: the row is the call's, and this thread's alone (# Safety); the sweep writes all its segments.
        unsafe {
            batch.write(call, i, |at, gradient| {
                let row = PlacedRow::new(call, at);
                for (index, flags) in flags[i..][..call.segments].iter().enumerate() {
                    segment::gradient(call, &row, index, *flags, gradient);
                }
            });
        }
    }
}

/// Chooses the initial shifts of some rows of a batch, and decides what their first sweeps are to do.
///
/// # Safety
/// As [`Batch::prepare`].
#[inline(never)]
pub unsafe fn prepare<const N: usize>(call: &Call, batch: &mut Batch<N>, rows: Range<usize>) {
    let mut initial = [InitialShift::NONE; ROWS];
    for i in rows.clone() {
        if batch.needs_exps(call, i) {
            let Row { at, excluded, .. } = batch.rows()[i];
            // SAFETY: the row is the call's, with contiguous classes (# Safety).
            initial[i] =
                unsafe { segment::choose_initial_shift(call, &PlacedRow::new(call, at), excluded) };
        }
    }
    // SAFETY: this function's own # Safety.
    unsafe { batch.prepare(call, rows, &initial) };
}

/// Runs a range of rows, first to last; gives away the sums over each `len` of them.
///
/// If the call's sweeps are interleaved, the second sweep over a row goes along with the first over the
/// same row of the next batch.
///
/// # Safety
/// The rows are the call's, with contiguous classes, and no other thread accesses them.
pub unsafe fn run(call: &Call, range: Range<usize>, len: usize, give: &mut dyn FnMut(Totals)) {
    // SAFETY: this function's own # Safety.
    unsafe {
        if call.interleaves() {
            run_interleaved(call, range, len, give);
        } else {
            run_batches(call, range, len, give, None);
        }
    }
}

/// A function of its own, for the second stage: the stack frame of the other calls stays small.
///
/// # Safety
/// As [`run`].
#[inline(never)]
unsafe fn run_interleaved(
    call: &Call,
    range: Range<usize>,
    len: usize,
    give: &mut dyn FnMut(Totals),
) {
    let mut other = Stage::EMPTY;
    // SAFETY: this function's own # Safety.
    unsafe { run_batches(call, range, len, give, Some(&mut other)) }
}

/// `other`: where the batch before stays until its gradient is written, if sweeps are interleaved.
///
/// # Safety
/// As [`run`].
unsafe fn run_batches(
    call: &Call,
    range: Range<usize>,
    len: usize,
    give: &mut dyn FnMut(Totals),
    other: Option<&mut Stage>,
) {
    let classes = call.plan.shape.classes;
    let row_bytes = classes * call.plan.logits.dtype.size();
    let size = strategy::batch_len(classes, row_bytes, call.sweeps, ROWS);
    let prefetched = strategy::prefetched_rows(row_bytes, ROWS);
    // Every call has these rows in the same batches, whoever works on them, with a gradient or without.
    let by_batch = classes <= BATCHED_CLASSES && len.is_multiple_of(ROWS);
    let (mut totals, mut left) = (GroupTotals::ZERO, len);
    let mut own = Stage::EMPTY;
    // Both live as long as this call from here on, so that they can change places.
    let (mut stage, mut other) = (&mut own, other.map(|other| &mut *other));
    for start in range.clone().step_by(size) {
        let count = size.min(range.end - start);
        // The first batch has none before it.
        let mut before = other.as_deref_mut().filter(|_| start > range.start);
        // SAFETY: the rows are the call's and this thread's (# Safety).
        unsafe { stage.batch.start(call, start, count) };
        for i in 0..count {
            if i.is_multiple_of(prefetched) {
                // SAFETY: the rows are of the batch, the call's and this thread's (# Safety).
                unsafe { prepare(call, &mut stage.batch, i..count.min(i + prefetched)) };
            }
            // SAFETY: the rows of both batches are the call's and this thread's (# Safety).
            unsafe { reduce(call, stage, i, before.as_deref_mut()) };
        }
        // SAFETY: the rows are the call's and this thread's (# Safety).
        unsafe {
            stage.batch.finish(call);
            if call.rankings.is_some() {
                rank(call, start, count, stage.batch.lse());
            }
        }
        if by_batch {
            stage.batch.add_to(call, &mut totals);
            left -= count;
        } else {
            for i in 0..count {
                stage.batch.add_row(call, i, &mut totals.rest);
                left -= 1;
                if left == 0 && i + 1 < count {
                    give(std::mem::replace(&mut totals, GroupTotals::ZERO).total());
                    left = len;
                }
            }
        }
        if left == 0 {
            give(std::mem::replace(&mut totals, GroupTotals::ZERO).total());
            left = len;
        }
        if call.plan.output.is_none() {
            continue;
        }
        if let Some(before) = before {
            for i in 0..before.batch.rows().len() {
                // SAFETY: the row is the call's and this thread's (# Safety).
                unsafe { before.write(call, i) };
            }
        }
        if let Some(other) = &mut other {
            std::mem::swap(&mut stage, other);
            continue;
        }
        // Backwards: the row that was summed last is the one that the cache still has all of.
        for i in (0..count).rev() {
            let next = start + i + size;
            if let RowAction::Sweep(gradient) = &mut stage.batch.rows()[i].action
                && next < call.plan.shape.distributions()
                && call.fetches_ahead
            {
                gradient.next = Some(call.plan.shape.position(next));
            }
            // SAFETY: the row is the call's and this thread's (# Safety).
            unsafe { stage.write(call, i) };
        }
    }
    if let Some(last) = other.filter(|_| !range.is_empty()) {
        for i in 0..last.batch.rows().len() {
            // SAFETY: the row is the call's and this thread's (# Safety).
            unsafe { last.write(call, i) };
        }
    }
    if left < len {
        give(totals.total());
    }
    if call.streams {
        (call.k.lanes.fence)();
    }
}

/// Writes the results that come from the order of the logits, of a batch of rows with these lse.
///
/// # Safety
/// The rows are the call's, and no other thread accesses them; their logits are as stored.
#[cold]
#[inline(never)]
unsafe fn rank(call: &Call, first: usize, len: usize, lse: &RowLanes) {
    for (row, span) in call.plan.shape.spans(first, len) {
        // SAFETY: this function's own # Safety.
        unsafe { ranking::rank(call, &Place::of(&span), &lse[row..]) };
    }
}

/// The first sweep over row `i` of a batch, and the second over the same row of the batch before.
///
/// # Safety
/// The rows of both batches are the call's, and no other thread accesses them.
#[inline(always)]
unsafe fn reduce(call: &Call, stage: &mut Stage, i: usize, mut before: Option<&mut Stage>) {
    let Stage { batch, flags } = stage;
    let Row { at, reduction, state, .. } = &mut batch.rows()[i];
    let Some(reduction) = reduction else { return };
    // SAFETY: the row is the call's (# Safety).
    let row = unsafe { PlacedRow::new(call, *at) };
    for index in 0..call.segments {
        let place = if call.segments == 1 { i } else { index };
        let pending = before.as_mut().and_then(|before| {
            let Row { at, action, .. } = &before.batch.rows()[i];
            let RowAction::Sweep(gradient) = action else { return None };
            Some((*at, *gradient, before.flags[place]))
        });
        let pending = pending.as_ref().map(|(at, gradient, flags)| PendingRow {
            // SAFETY: the row is the call's (# Safety).
            row: unsafe { PlacedRow::new(call, *at) },
            flags: *flags,
            gradient,
        });
        // Segments are summed apart, as they are by several threads; a row of one segment is its own.
        let mut part = RowState::EMPTY;
        let into = if call.segments == 1 { &mut *state } else { &mut part };
        // SAFETY: the segment of rows of the call, this thread's alone (# Safety).
        flags[place] = unsafe { segment::reduce(call, &row, index, reduction, pending, into) };
        if call.segments > 1 {
            state.push(&part, call.l);
        }
    }
    if let Some(Stage { batch, .. }) = before
        && let action = &mut batch.rows()[i].action
        && let RowAction::Sweep(_) = action
    {
        *action = RowAction::Nothing;
        // SAFETY: the row is the call's and this thread's (# Safety).
        unsafe { batch.write_entry(call, i) };
    }
}
