//! One row by itself: a long one whose segments several threads share, or one whose order is found along with its sums.

use super::batch::{Batch, Reduction, RowGradient};
use super::call::Call;
use super::ranking::{OneRanking, RowRanking};
use super::segment::{self, ChunkFlags, PlacedRow};
use super::totals::Totals;
use crate::kernels::row_state::RowState;
use crate::parallel::Team;
use crate::strategy::SEGMENTS;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

/// Runs a range of rows one by one on the calling thread; gives away the sums over each `len` of them.
///
/// # Safety
/// The rows are the call's, with contiguous classes, and no other thread accesses them.
#[cold]
#[inline(never)]
pub unsafe fn run_each(call: &Call, range: Range<usize>, len: usize, give: &mut dyn FnMut(Totals)) {
    let alone = Team { pool: None, threads: 1 };
    for start in range.clone().step_by(len) {
        let mut totals = Totals::ZERO;
        for index in start..range.end.min(start + len) {
            // SAFETY: the row is the call's and this thread's (# Safety).
            unsafe { run(call, &alone, 1, index, &mut totals) };
        }
        give(totals);
    }
}

/// Runs one row on `threads` threads; adds it to the totals. A function of its own, for its batch on the stack.
///
/// # Safety
/// The row is the call's, with contiguous classes, and nobody else accesses it.
#[inline(never)]
pub unsafe fn run(call: &Call, team: &Team, threads: usize, index: usize, totals: &mut Totals) {
    let all_flags = [const { [AtomicU64::new(0), AtomicU64::new(0)] }; SEGMENTS];
    let at = call.plan.shape.position(index);
    let mut batch = Batch::<1>::EMPTY;
    // SAFETY: the row is the call's, and no other thread works on it yet (# Safety).
    unsafe {
        batch.start(call, index, 1);
        super::rows::prepare(call, &mut batch, 0..1);
    }
    // SAFETY: the row is the call's (# Safety).
    let row = unsafe { PlacedRow::new(call, at) };
    let mut ranking = Mutex::new(OneRanking::EMPTY);
    if call.rankings.is_some() {
        let ranking = ranking.get_mut().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the row is the call's, and no other thread works on it yet (# Safety).
        unsafe { ranking.start(call, std::iter::once(at)) };
    }
    if let Some(reduction) = batch.rows()[0].reduction {
        let mut state = RowState::EMPTY;
        team.map(
            threads,
            call.segments,
            |segments, give| {
                for index in segments {
                    let mut part = RowState::EMPTY;
                    // SAFETY: `map` hands each segment of the row to one thread.
                    let flags = unsafe {
                        match call.rankings {
                            None => segment::reduce(call, &row, index, &reduction, None, &mut part),
                            Some(_) => {
                                reduce_ranked(call, &row, index, &reduction, &ranking, &mut part)
                            }
                        }
                    };
                    let [out_of_range, redone] = &all_flags[index];
                    out_of_range.store(flags.out_of_range, Ordering::Relaxed);
                    redone.store(flags.redone, Ordering::Relaxed);
                    give(part);
                }
            },
            |part| state.push(&part, call.l),
        );
        batch.rows()[0].state = state;
    }
    // SAFETY: the row is the call's, and all threads are done with it (`map` returned).
    unsafe {
        batch.finish(call);
        if call.rankings.is_some() {
            let ranking = ranking.get_mut().unwrap_or_else(PoisonError::into_inner);
            ranking.row(0).write(call, at, batch.lse()[0]);
        }
    }
    batch.add_row(call, 0, totals);
    let sweep = |_, gradient: &RowGradient| {
        team.map(
            threads,
            call.segments,
            |segments, give| {
                for index in segments {
                    let [out_of_range, redone] =
                        all_flags[index].each_ref().map(|bits| bits.load(Ordering::Relaxed));
                    let flags = ChunkFlags { out_of_range, redone };
                    // SAFETY: `map` hands each segment of the row to one thread.
                    unsafe { segment::gradient(call, &row, index, flags, gradient) };
                    give(());
                }
                if call.streams {
                    (call.k.lanes.fence)();
                }
            },
            |()| (),
        );
    };
    // SAFETY: the row is the call's, and all threads are done with it (`map` returned); the sweep writes all its
    // segments.
    unsafe { batch.write(call, 0, sweep) };
}

/// Adds one segment to the row's state, and the order of its logits to that of the whole row. A function of its own,
/// for its entries on the stack.
///
/// # Safety
/// As [`segment::reduce`].
#[cold]
#[inline(never)]
unsafe fn reduce_ranked(
    call: &Call,
    row: &PlacedRow,
    index: usize,
    reduction: &Reduction,
    whole: &Mutex<OneRanking>,
    part: &mut RowState,
) -> ChunkFlags {
    let lock = || whole.lock().unwrap_or_else(PoisonError::into_inner);
    let mut own = OneRanking::EMPTY;
    own.start_like(&lock());
    let mut ranking = own.row(0);
    // SAFETY: this function's own # Safety.
    let flags = unsafe { segment::reduce_ranked(call, row, index, reduction, &mut ranking, part) };
    let RowRanking { state, entries } = ranking;
    lock().row(0).merge(state, entries);
    flags
}
