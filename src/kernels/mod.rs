//! The algorithms, each written once, generic over the instruction set.
//!
//! What touches elements is `#[inline(always)]` and ends up in an entry point that dispatch.rs
//! stamps for each set: a chunk of a row, a tile of rows, what follows from the sums of eight. What drives them
//! (`rows`, `tiles`) is plain code that calls them through tables.

pub mod class_index;
pub mod contiguous;
pub mod row_batch;
pub mod row_math;
pub mod row_state;
pub mod softmax_gradient;
pub mod target_gradient;
pub mod tiles;

use crate::math::exp2::Shift;
use crate::plan::{Plan, Run, View};
use contiguous::{Chunk, GradientChunk, Sums};
use row_math::RowGroup;
use row_state::{ArgMax, CompensatedSum};
use std::ops::Range;
use tiles::{Masses, Numbers, Tile, TileGradient};

/// Entry points for one element type on one instruction set. Each does what the function of the
/// same name in contiguous.rs or tiles.rs does, asks for what that asks for, and for a processor
/// that has the set, which whoever hands out the table has made sure of.
#[derive(Debug)]
pub struct Sweeps {
    /// See [`contiguous::max`].
    pub max: unsafe fn(&Chunk) -> f64,
    /// See [`contiguous::sum`]: unclamped.
    pub sum: unsafe fn(&Chunk, Shift) -> Sums,
    /// See [`contiguous::sums`].
    pub sums: unsafe fn(&Chunk, Shift, &Range<f64>, &mut [f64]) -> usize,
    /// As `sum`, keeping the exponentials.
    pub sum_kept: unsafe fn(&Chunk, Shift) -> Sums,
    /// See [`contiguous::clamped`].
    pub clamped: unsafe fn(&Chunk, Shift, bool) -> Sums,
    /// See [`contiguous::restore`].
    pub restore: unsafe fn(&Chunk),
    /// See [`contiguous::argmax`].
    pub argmax: unsafe fn(*const u8, usize) -> ArgMax,
    /// See [`contiguous::dot`].
    pub dot: unsafe fn(&Chunk, f64, *const f64) -> f64,
    /// See [`contiguous::widen`].
    pub widen: unsafe fn(*const u8, usize, *mut u8),
    /// See [`tiles::gather`].
    pub gather: unsafe fn(&Tile, *const u8, [isize; 2]),
}

/// Entry points for one type of lanes on one instruction set, of functions that see nothing else.
#[derive(Debug)]
pub struct Lanes {
    /// See [`group::finish`].
    pub finish: unsafe fn(&mut [RowGroup], &Plan),
    /// See [`class_index::count`].
    pub count: unsafe fn(&View, usize, usize, i64, usize) -> Option<u64>,
    /// See [`class_index::excluded_classes`].
    pub excluded_classes: unsafe fn(&View, &Run, i64, &mut RowGroup, usize),
    /// See [`contiguous::transform`].
    pub transform: unsafe fn(*mut u8, usize, &crate::plan::Transform, *mut u8),
    /// See [`contiguous::total`].
    pub total: unsafe fn(*const f64, usize) -> CompensatedSum,
    /// See [`tiles::sums`].
    pub sums: unsafe fn(&Tile, &mut [RowGroup], bool),
    /// See [`tiles::argmax`].
    pub argmax: unsafe fn(&Tile, &mut [RowGroup]),
    /// See [`tiles::dots`].
    pub dots: unsafe fn(&Tile, &mut [RowGroup], &Masses),
    /// See [`tiles::gradient`].
    pub gradient: unsafe fn(&Tile, &[RowGroup], &TileGradient),
    /// See [`softmax_gradient::products`].
    pub products: unsafe fn(&softmax_gradient::Pair) -> f64,
    /// See [`softmax_gradient::combine`].
    pub combine: unsafe fn(&softmax_gradient::Pair, f64),
    /// See [`softmax_gradient::tile_products`].
    pub tile_products: unsafe fn(&softmax_gradient::Tiles, &mut [Numbers; 2]),
    /// See [`softmax_gradient::tile_combine`].
    pub tile_combine: unsafe fn(&softmax_gradient::Tiles, &[Numbers; 2]),
    /// See [`Simd::fence`](crate::simd::Simd::fence).
    pub fence: fn(),
}

/// [`contiguous::sums_beside`]
pub type SumsBeside =
    unsafe fn(&Chunk, Shift, &Range<f64>, &GradientChunk, &mut [f64]) -> (usize, Sums);

/// Entry points for one type of gradients and one type of what it is computed from.
#[derive(Debug)]
pub struct Outputs {
    /// See [`contiguous::gradient`].
    pub gradient: unsafe fn(&GradientChunk),
    /// See [`contiguous::sums_beside`].
    pub sums_beside: SumsBeside,
    /// See [`contiguous::narrow`].
    pub narrow: unsafe fn(*const u8, usize, *mut u8),
    /// See [`tiles::scatter`].
    pub scatter: unsafe fn(&Tile, *mut u8, [isize; 2], bool, u64),
}

/// Everything that a call needs of one instruction set.
#[derive(Clone, Copy, Debug)]
pub struct Kernels {
    /// Over the logits as stored.
    pub stored: &'static Sweeps,
    /// Over logits in the lanes' own type.
    pub staged: &'static Sweeps,
    /// Gradients from logits as stored.
    pub direct: &'static Outputs,
    /// Gradients from logits in the lanes' own type.
    pub converted: &'static Outputs,
    /// Gradients in the lanes' own type, from logits as stored.
    pub gathered: &'static Outputs,
    /// Both in the lanes' own type.
    pub widened: &'static Outputs,
    /// The rest.
    pub lanes: &'static Lanes,
}
