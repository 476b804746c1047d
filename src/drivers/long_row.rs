//! One long row, its segments shared by several threads.

use super::batch::{Batch, RowGradient};
use super::call::Call;
use super::segment::{self, ChunkFlags, PlacedRow};
use super::totals::Totals;
use crate::kernels::row_state::RowState;
use crate::parallel::Team;
use crate::strategy::SEGMENTS;
use std::sync::atomic::{AtomicU64, Ordering};

/// Runs one row on `threads` threads; adds it to the totals. A function of its own, for its batch on the stack.
///
/// # Safety
/// The row is the call's, with contiguous classes, and nobody else accesses it.
#[inline(never)]
pub unsafe fn run(call: &Call, team: &Team, threads: usize, index: usize, totals: &mut Totals) {
    let all_flags = [const { [AtomicU64::new(0), AtomicU64::new(0)] }; SEGMENTS];
    let at = call.plan.shape.position(index);
    let mut batch = Batch::EMPTY;
    // SAFETY: the row is the call's, and no other thread works on it yet (# Safety).
    unsafe {
        batch.start(call, index, 1);
        super::rows::prepare(call, &mut batch, 0..1);
    }
    // SAFETY: the row is the call's (# Safety).
    let row = unsafe { PlacedRow::new(call, at) };
    if let Some(reduction) = batch.rows()[0].reduction {
        let mut state = RowState::EMPTY;
        team.map(
            threads,
            call.segments,
            |segments, give| {
                for index in segments {
                    let mut part = RowState::EMPTY;
                    // SAFETY: `map` hands each segment of the row to one thread.
                    let flags =
                        unsafe { segment::reduce(call, &row, index, &reduction, None, &mut part) };
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
    unsafe { batch.finish(call) };
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
