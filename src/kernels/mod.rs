//! The algorithms, each written once, generic over the instruction set.
//!
//! Everything here is `#[inline(always)]` and ends up in an entry point that dispatch.rs stamps
//! for each set.

pub mod contiguous;
pub mod online;
pub mod row;
