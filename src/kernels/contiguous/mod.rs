//! Rows whose classes are contiguous: lanes run along classes.
//!
//! [`short`] is for short rows of ordinary losses. Of all others, the drivers (src/drivers/segment.rs, rows.rs) put
//! these kernels together as follows.
//!
//! # The first sweep reads a row once, without looking for its maximum first
//!
//! ```text
//! initial shift: c = integer nearest to L·max of the first 256 classes
//! for each chunk of 2048 classes:
//!     sum = Σ 2^(L·x - c)                       64 lanes, widened to f64 every 256 classes
//!     if an exponent was out of range:          (-inf, for instance)
//!         the same sum again, arguments clamped
//!     if sum is outside the safe range:         (a logit far above the initial shift)
//!         c' = integer nearest to L·max of the chunk
//!         sum = Σ 2^(L·x - c')
//!     push (c or c', sum) to the row's state    in class order, f64
//! ```
//!
//! A chunk's result depends on the initial shift and on the chunk alone. So chunks can be computed
//! anywhere, in any order, and redone without touching others. Every sum excludes the target's class:
//! row_math.rs adds it in f64, which keeps `rest = Σ over the other classes` as exact as it is small.
//!
//! # The second sweep writes the gradient while the row is in cache
//!
//! `P·p_c = 2^(L·x_c - c)·F`, one factor for the whole row. In place, the first sweep stores
//! `2^(L·x - c)` over the logits, and the second only multiplies. Out of place, the second sweep computes
//! the exponentials again, from the same shift to the same bits, so that the gradient is written once and
//! its stores can bypass the caches. Chunks that were redone keep their logits, and the second sweep
//! computes them relative to the shift that the row's sum ended with.
//!
//! The first sweep waits for memory, the second does not. So where rows leave the first level of cache,
//! the second sweep over one row goes along with the first over the next, block by block
//! ([`interleaved`]; docs/design.md).
//!
//! # Tails and excluded classes
//!
//! Lanes past the end, and the lane of an excluded class, are masked loads of -inf, whose exponential is
//! 0. The loop skips the block with the excluded class (`block + (block ≥ excluded)`, no branch), which
//! is done last.

pub mod block;
pub mod convert;
pub mod gradient;
pub mod interleaved;
pub mod reduce;
pub mod short;
