//! Drivers bring blocks of logits to the kernels, and rows through the row arithmetic.
//!
//! They know the plan and the memory that it describes. Each way over the logits is a driver: batches of
//! contiguous rows ([`rows`]), short ones ([`short`]), one row by itself ([`long_row`]), strips and tiles of
//! distributions ([`strips`], [`strided`]), small calls ([`small`]), the gradient of probability targets
//! ([`target_gradient`]) and of a softmax ([`softmax_gradient`]). [`shards`] has what a shard of a vocabulary adds to
//! these ways.

mod batch;
mod call;
pub mod linear;
mod long_row;
mod masses;
mod operands;
mod ordinary;
mod padding;
mod place;
mod ranking;
mod rows;
mod segment;
pub mod shards;
mod short;
pub mod small;
pub mod softmax_gradient;
mod strided;
mod strips;
mod target_gradient;
mod totals;

use crate::kernels::Kernels;
use crate::parallel::{Team, Work};
use crate::plan::{Layout, Pass, Plan};
use crate::strategy::{self, TILE};
use call::Call;
use place::Place;
use std::ops::Range;
pub use totals::Totals;

/// Runs a plan; returns the sums over its rows.
///
/// # Safety
/// Validation has made the plan, whose operands stay valid for the call; `Isa::kernels` has handed out the
/// kernels for the plan's types.
pub unsafe fn run(plan: &Plan, k: &Kernels, team: &Team) -> Totals {
    let mut totals = Totals::ZERO;
    let (rows, classes) = (plan.shape.distributions(), plan.shape.classes);
    // SAFETY: this function's own # Safety.
    let call = unsafe { Call::new(plan, k) };
    if let Some(loss) = call.loss
        && loss.pass == Pass::TargetGradient
    {
        // SAFETY: the rows are the plan's, and each is in one task.
        let task = |rows| unsafe { target_gradient::rows(&call, loss, rows) };
        team.for_tasks(&Work::rows(rows, classes), task, |()| ());
        return totals;
    }
    if let Layout::Strided(axis) = plan.layout {
        // SAFETY: the tiles are the plan's, and each is in one task. Only rows of one inner position have a
        // padding, and each tile is then of TILE of them.
        let task = |tiles: Range<usize>| unsafe {
            let totals = match call.loss {
                Some(loss) if call.has_ordinary_rows => {
                    strips::strips(&call, loss, axis, tiles.clone())
                }
                _ => strided::tiles(&call, axis, tiles.clone()),
            };
            padding::clear(plan, tiles.start * TILE..rows.min(tiles.end * TILE));
            totals
        };
        let len = Place::count(&plan.shape, axis);
        let task_len = match call.has_ordinary_rows {
            true => strategy::strip_task_len(len, classes),
            false => strategy::task_len(len, TILE.saturating_mul(classes)),
        };
        let work = Work { len, task_len, elements: rows.saturating_mul(classes) };
        team.for_tasks(&work, task, |task| totals.add(&task));
        return totals;
    }
    let work = Work::rows(rows, classes);
    let threads = team.size(work.elements);
    if call.segments > 1 && strategy::shares_rows(rows, threads) {
        // Too few rows to keep the threads busy, so all threads share each row. The sums are the same: so
        // few rows of so many classes are tasks of one row each.
        for index in 0..rows {
            let mut row = Totals::ZERO;
            // SAFETY: the row is the plan's, and only this call accesses it.
            unsafe {
                long_row::run(&call, team, threads, index, &mut row);
                padding::clear(plan, index..index + 1);
            }
            totals.add(&row);
        }
        return totals;
    }
    let portion = |rows: Range<usize>, len: usize, give: &mut dyn FnMut(Totals)| {
        // SAFETY: the rows are the plan's, and each is in one portion.
        unsafe {
            if let Some(loss) = call.loss.filter(|_| call.has_short_rows()) {
                short::run(&call, loss, rows.clone(), len, give);
            } else if call.rankings.is_some() && !call.ranks_batches() {
                long_row::run_each(&call, rows.clone(), len, give);
            } else {
                rows::run(&call, rows.clone(), len, give);
            }
            padding::clear(plan, rows);
        }
    };
    team.for_portions(&work, portion, |task| totals.add(&task));
    totals
}
