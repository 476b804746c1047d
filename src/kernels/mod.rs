//! The algorithms, each written once, generic over the instruction set.
//!
//! What touches elements is `#[inline(always)]` and ends up in an entry point that dispatch.rs
//! stamps for each set: a chunk of a row, a tile of rows, what follows from the sums of eight. What drives them
//! (`rows`, `tiles`) is plain code that calls them through tables.

pub mod contiguous;
pub mod family;
pub mod octet;
pub mod online;
pub mod row;
pub mod soft;
pub mod targets;
pub mod tiles;

use crate::math::exp2::Reference;
use crate::plan::{Plan, Run, View};
use contiguous::{Chunk, GradientChunk, Sums};
use octet::Octet;
use online::{Exact, Top};
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
    pub sum: unsafe fn(&Chunk, Reference) -> Sums,
    /// See [`contiguous::sums`].
    pub sums: unsafe fn(&Chunk, Reference, &Range<f64>, &mut [f64]) -> usize,
    /// As `sum`, keeping the exponentials.
    pub sum_kept: unsafe fn(&Chunk, Reference) -> Sums,
    /// See [`contiguous::clamped`].
    pub clamped: unsafe fn(&Chunk, Reference, bool) -> Sums,
    /// See [`contiguous::restore`].
    pub restore: unsafe fn(&Chunk),
    /// See [`contiguous::argmax`].
    pub argmax: unsafe fn(*const u8, usize) -> Top,
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
    /// See [`octet::finish`].
    pub finish: unsafe fn(&mut [Octet], &Plan),
    /// See [`targets::count`].
    pub count: unsafe fn(&View, usize, usize, i64, usize) -> Option<u64>,
    /// See [`targets::holes`].
    pub holes: unsafe fn(&View, &Run, i64, &mut Octet, usize),
    /// See [`contiguous::transform`].
    pub transform: unsafe fn(*mut u8, usize, &crate::plan::Transform, *mut u8),
    /// See [`contiguous::total`].
    pub total: unsafe fn(*const f64, usize) -> Exact,
    /// See [`tiles::sums`].
    pub sums: unsafe fn(&Tile, &mut [Octet], bool),
    /// See [`tiles::argmax`].
    pub argmax: unsafe fn(&Tile, &mut [Octet]),
    /// See [`tiles::dots`].
    pub dots: unsafe fn(&Tile, &mut [Octet], &Masses),
    /// See [`tiles::gradient`].
    pub gradient: unsafe fn(&Tile, &[Octet], &TileGradient),
    /// See [`family::products`].
    pub products: unsafe fn(&family::Pair) -> f64,
    /// See [`family::combine`].
    pub combine: unsafe fn(&family::Pair, f64),
    /// See [`family::tile_products`].
    pub tile_products: unsafe fn(&family::Tiles, &mut [Numbers; 2]),
    /// See [`family::tile_combine`].
    pub tile_combine: unsafe fn(&family::Tiles, &[Numbers; 2]),
    /// See [`Simd::fence`](crate::simd::Simd::fence).
    pub fence: fn(),
}

/// [`contiguous::sums_beside`]
pub type SumsBeside =
    unsafe fn(&Chunk, Reference, &Range<f64>, &GradientChunk, &mut [f64]) -> (usize, Sums);

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
