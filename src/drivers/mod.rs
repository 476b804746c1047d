//! Drivers bring blocks of logits to the kernels, and rows through the row arithmetic.
//!
//! They know the plan and the memory that it describes. Each way over the logits is a driver: batches of
//! contiguous rows ([`rows`]), one long row on several threads ([`long_row`]), tiles of distributions
//! ([`strided`]), the gradient of probability targets ([`target_gradient`]) and of a softmax
//! ([`softmax_gradient`]).

mod batch;
mod call;
mod long_row;
mod operands;
mod rows;
mod segment;
pub mod softmax_gradient;
mod strided;
mod target_gradient;

use crate::kernels::Kernels;
use crate::math::compensated::CompensatedSum;
use crate::parallel::{Team, Work};
use crate::plan::{Layout, Pass, Plan};
use crate::strategy::{TASKS, TILE};
use call::Call;
use std::ops::Range;

/// Room for `N` lanes of f64, or of f32, aligned to a cache line.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Scratch<const N: usize>(std::mem::MaybeUninit<[f64; N]>);

impl<const N: usize> Scratch<N> {
    #[inline(always)]
    fn new() -> Self {
        Scratch(std::mem::MaybeUninit::uninit())
    }

    fn start(&mut self) -> *mut u8 {
        self.0.as_mut_ptr().cast()
    }
}

/// Sums over rows.
#[derive(Clone, Copy, Debug)]
pub struct Totals {
    /// The cross-entropy part of the losses.
    pub loss: CompensatedSum,
    /// The z-loss part.
    pub z_loss: CompensatedSum,
    /// Rows whose largest logit is the target's.
    pub correct: u64,
}

impl Totals {
    /// The sums over no rows.
    pub const ZERO: Totals =
        Totals { loss: CompensatedSum::ZERO, z_loss: CompensatedSum::ZERO, correct: 0 };

    /// Adds the sums over later rows.
    pub fn add(&mut self, next: &Totals) {
        self.loss.merge(next.loss);
        self.z_loss.merge(next.z_loss);
        self.correct += next.correct;
    }
}

/// Runs a plan; returns the sums over its rows.
///
/// The kernels are those that `Isa::kernels` hands out for the plan's types, so the processor has their
/// instruction set.
pub fn run(plan: &Plan, k: &Kernels, team: &Team) -> Totals {
    let mut totals = Totals::ZERO;
    let (rows, classes) = (plan.shape.distributions(), plan.shape.classes);
    let call = Call::new(plan, k);
    if let Some(loss) = call.loss
        && loss.pass == Pass::TargetGradient
    {
        // SAFETY: the rows are the plan's, and each is in one task.
        let task = |rows| unsafe { target_gradient::rows(&call, loss, rows) };
        team.for_tasks(&Work::rows(rows, classes), task, |()| ());
        return totals;
    }
    if let Layout::Strided(axis) = plan.layout {
        // SAFETY: the tiles are the plan's, and each is in one task.
        let task = |tiles| unsafe { strided::tiles(&call, axis, tiles) };
        let work = Work {
            len: strided::count(plan, axis),
            elements_each: TILE.saturating_mul(classes),
            elements: rows.saturating_mul(classes),
        };
        team.for_tasks(&work, task, |task| totals.add(&task));
        return totals;
    }
    let work = Work::rows(rows, classes);
    let threads = team.size(work.elements);
    if threads > 1 && call.segments > 1 && rows < 4 * threads && rows <= TASKS {
        // Too few rows to keep the threads busy, so all threads share each row. The sums are the same: so
        // few rows of so many classes are tasks of one row each.
        for index in 0..rows {
            let mut row = Totals::ZERO;
            // SAFETY: the row is the plan's, and only this call accesses it.
            unsafe { long_row::run(&call, team, threads, index, &mut row) };
            totals.add(&row);
        }
        return totals;
    }
    let portion = |rows: Range<usize>, len: usize, give: &mut dyn FnMut(Totals)| {
        // SAFETY: the rows are the plan's, and each is in one portion.
        unsafe { rows::run(&call, rows, len, give) };
    };
    team.for_portions(&work, portion, |task| totals.add(&task));
    totals
}
