//! The algorithms, each written once, generic over the instruction set.
//!
//! Everything here is `#[inline(always)]` and ends up in an entry point that dispatch.rs stamps
//! for each set. Entry points call one another, through their table; nothing else is called.

pub mod contiguous;
pub mod online;
pub mod row;

use crate::plan::Plan;
use contiguous::Marks;
use online::Partial;
use row::{Anchor, RowGradient, RowSum};
use std::ops::Range;

/// The entry points of one instruction set for one pair of element types, stamped by dispatch.rs. Each does what the function of
/// the same name in contiguous.rs does, asks for what that asks for, and for a processor that has
/// the set, which whoever hands out the table has made sure of.
#[derive(Debug)]
pub struct Kernels {
    /// See [`contiguous::rows`].
    pub rows: unsafe fn(&Kernels, &Plan, Range<usize>) -> f64,
    /// See [`contiguous::anchor`].
    pub anchor: unsafe fn(&Plan, usize, Option<usize>) -> Anchor,
    /// See [`contiguous::sum_segment`].
    pub sum_segment: unsafe fn(&Plan, usize, usize, &RowSum) -> (Partial, Marks),
    /// See [`contiguous::gradient_segment`].
    pub gradient_segment: unsafe fn(&Plan, usize, usize, Marks, &RowGradient),
    /// See [`Simd::fence`](crate::simd::Simd::fence).
    pub fence: fn(),
}
