//! The algorithms, each written once, generic over the instruction set.
//!
//! A kernel sees a block of logits, and plain numbers (class indices, which have one element a row, come
//! as a view): a [`Chunk`] of a row whose classes are
//! contiguous, or a [`Tile`] of some classes of distributions that lie side by side. The logits may lie
//! in the caller's memory or in scratch. Which problem they belong to, a kernel does not know: the
//! drivers (src/drivers/) bring blocks to kernels.
//!
//! Every function that touches elements is `#[inline(always)]` and ends up in an entry point, which
//! dispatch.rs compiles for each instruction set.

pub mod class_index;
pub mod contiguous;
pub mod entropy_bonus;
pub mod logit_transform;
pub mod masses;
pub mod ordinary;
pub mod product;
pub mod ranking;
pub mod row_math;
pub mod row_state;
pub mod scratch;
pub mod softmax_gradient;
pub mod strided;

use crate::math::compensated::{CompensatedLanes, CompensatedSum};
use crate::math::exp2::Shift;
use crate::view::{FloatType, IntegerType, Span, View};
use contiguous::block::Chunk;
use contiguous::gradient::GradientChunk;
use contiguous::reduce::{CHUNK_WORDS, Sums};
use contiguous::short::{ShortGradient, ShortRows};
use entropy_bonus::Bonus;
use logit_transform::Transform;
use ordinary::OrdinaryState;
use ranking::Bound;
use row_math::{OutputTerm, RowGroup, RowGroupExtras, RowOptions};
use row_state::ArgMax;
use std::ops::Range;
use strided::gradient::TileGradient;
use strided::reduce::{Masses, TileMaxima};
use strided::row::StripRow;
use strided::strip::{Strip, StripGradient};
use strided::tile::{Tile, TileNumbers};

/// Entry points for one type of logits on one instruction set. Each does what the function of the same
/// name in contiguous/ or strided/ does, and asks for what that function's `# Safety` asks for. The
/// processor has the set: whoever hands out the table has checked it (`Isa::kernels`).
#[derive(Debug)]
pub struct LogitKernels {
    /// See [`contiguous::reduce::max`].
    pub max: unsafe fn(&Chunk) -> f64,
    /// See [`contiguous::reduce::sum`]: right only for exponents in range.
    pub sum: unsafe fn(&Chunk, Shift) -> Sums,
    /// See [`contiguous::reduce::sums`].
    pub sums: unsafe fn(&Chunk, Shift, &Range<f64>, &mut [f64]) -> usize,
    /// See [`contiguous::reduce::sum_stored`].
    pub sum_stored: unsafe fn(&Chunk, Shift) -> Sums,
    /// See [`contiguous::reduce::sum_clamped`].
    pub sum_clamped: unsafe fn(&Chunk, Shift, bool) -> Sums,
    /// See [`contiguous::reduce::restore`].
    pub restore: unsafe fn(&Chunk),
    /// See [`contiguous::reduce::argmax`].
    pub argmax: unsafe fn(*const u8, usize) -> ArgMax,
    /// See [`contiguous::reduce::find`].
    pub find: unsafe fn(*const u8, usize, &Bound, &mut [u64; CHUNK_WORDS]),
    /// See [`contiguous::reduce::dot`].
    pub dot: unsafe fn(&Chunk, f64, *const f64, bool) -> CompensatedSum,
    /// See [`contiguous::convert::widen`].
    pub widen: unsafe fn(*const u8, usize, *mut u8),
    /// See [`contiguous::short::sums`].
    pub short_sums: unsafe fn(&ShortRows, &mut OrdinaryState),
    /// See [`strided::strip::sums`].
    pub strip_sums: unsafe fn(&Strip, &mut OrdinaryState),
    /// See [`strided::strip::dots`].
    pub strip_dots: unsafe fn(&Strip, &mut OrdinaryState),
    /// See [`strided::row::sums`].
    pub strip_row_sums: unsafe fn(&StripRow, &mut OrdinaryState),
    /// See [`strided::transpose::gather`].
    pub gather: unsafe fn(&Tile, *const u8, [isize; 2]),
}

/// Entry points for one type of lanes on one instruction set, of functions that see no element type. What
/// [`LogitKernels`] says of safety holds for them too.
#[derive(Debug)]
pub struct LaneKernels {
    /// See [`row_math::finish_loss`].
    pub finish_loss: unsafe fn(&mut [RowGroup], Option<&mut [RowGroupExtras]>, &RowOptions),
    /// See [`row_math::finish_softmax`].
    pub finish_softmax: unsafe fn(&mut [RowGroup], OutputTerm),
    /// See [`ordinary::finish`].
    pub finish_ordinary: unsafe fn(usize, &mut OrdinaryState, &ordinary::Wanted),
    /// See [`ordinary::add_losses`].
    pub add_losses: unsafe fn(*const f64, usize, &mut CompensatedLanes),
    /// See [`class_index::count_kept`].
    pub count_kept: unsafe fn(&View<IntegerType>, usize, usize, i64, usize) -> Option<u64>,
    /// See [`class_index::read_classes`].
    pub read_classes: unsafe fn(&View<IntegerType>, &Span, i64, &mut [f64]),
    /// See [`logit_transform::transform`].
    pub transform: unsafe fn(*mut u8, usize, &Transform, *mut u8),
    /// See [`entropy_bonus::subtract`].
    pub subtract_bonus: unsafe fn(*const u8, usize, &Bonus, *mut u8),
    /// See [`contiguous::reduce::compensated_total`].
    pub compensated_total: unsafe fn(*const f64, usize) -> CompensatedSum,
    /// See [`masses::widen`].
    pub widen_masses: unsafe fn(FloatType, *const u8, usize, *mut f64),
    /// See [`masses::exps`].
    pub exps: unsafe fn(*mut f64, usize, f64, f64, f64),
    /// See [`masses::divergences`].
    pub divergences: unsafe fn(*mut f64, *const f64, usize, f64),
    /// See [`strided::reduce::sums`].
    pub tile_sums: unsafe fn(&Tile, &mut [RowGroup], Option<&mut [RowGroupExtras]>),
    /// See [`strided::reduce::argmax`].
    pub tile_argmax: unsafe fn(&Tile, &mut TileMaxima),
    /// See [`strided::reduce::dots`].
    pub tile_dots: unsafe fn(&Tile, &[RowGroup], &mut [RowGroupExtras], &Masses),
    /// See [`strided::gradient::gradient`].
    pub tile_gradient: unsafe fn(&Tile, &TileGradient),
    /// See [`softmax_gradient::products`].
    pub products: unsafe fn(&softmax_gradient::Pair) -> f64,
    /// See [`softmax_gradient::combine`].
    pub combine: unsafe fn(&softmax_gradient::Pair, f64),
    /// See [`softmax_gradient::tile_products`].
    pub tile_products: unsafe fn(&softmax_gradient::Tiles, &mut [TileNumbers; 2]),
    /// See [`softmax_gradient::tile_combine`].
    pub tile_combine: unsafe fn(&softmax_gradient::Tiles, &[TileNumbers; 2]),
    /// See [`Simd::fence`](crate::simd::Simd::fence).
    pub fence: fn(),
}

/// See [`contiguous::interleaved::sums_and_gradient`].
pub type SumsAndGradient =
    unsafe fn(&Chunk, Shift, &Range<f64>, &GradientChunk, &mut [f64]) -> (usize, Sums);

/// Entry points for one type of logits and one type of outputs. What [`LogitKernels`] says of safety holds
/// for them too.
#[derive(Debug)]
pub struct OutputKernels {
    /// See [`contiguous::gradient::gradient`].
    pub gradient: unsafe fn(&GradientChunk),
    /// See [`contiguous::interleaved::sums_and_gradient`]. None on a set without fused multiply-add, where arithmetic takes
    /// so long that no sweep waits for memory.
    pub sums_and_gradient: Option<SumsAndGradient>,
    /// See [`contiguous::convert::narrow`].
    pub narrow: unsafe fn(*const u8, usize, *mut u8),
    /// See [`contiguous::short::gradient`].
    pub short_gradient: unsafe fn(&ShortRows, &mut OrdinaryState, &ShortGradient),
    /// See [`strided::strip::gradient`].
    pub strip_gradient: unsafe fn(&Strip, &mut OrdinaryState, &StripGradient),
    /// See [`strided::row::gradient`].
    pub strip_row_gradient: unsafe fn(&StripRow, &mut OrdinaryState, *mut u8),
    /// See [`strided::transpose::scatter`].
    pub scatter: unsafe fn(&Tile, *mut u8, [isize; 2], bool, u64),
}

/// Everything that a call needs of one instruction set. *Native* logits are of the caller's type,
/// *converted* logits of the lanes' own.
#[derive(Clone, Copy, Debug)]
pub struct Kernels {
    /// Over native logits.
    pub native: &'static LogitKernels,
    /// Over converted logits.
    pub converted: &'static LogitKernels,
    /// From native logits to outputs of the caller's type.
    pub native_to_output: &'static OutputKernels,
    /// From converted logits to outputs of the caller's type.
    pub converted_to_output: &'static OutputKernels,
    /// From native logits to outputs of the lanes' type.
    pub native_to_lanes: &'static OutputKernels,
    /// From converted logits to outputs of the lanes' type.
    pub converted_to_lanes: &'static OutputKernels,
    /// Everything that sees no element type.
    pub lanes: &'static LaneKernels,
}

/// Entry points for one type of the operands of a linear layer on one instruction set. Each does what the function
/// of the same name in product/ does. What [`LogitKernels`] says of safety holds for them too.
#[derive(Clone, Copy, Debug)]
pub struct ProductKernels {
    /// Columns of a panel: see [`product::panel`].
    pub panel: usize,
    /// How the steps of a product lie.
    pub order: product::form::Order,
    /// See [`product::multiply`].
    pub multiply: unsafe fn(&product::Product),
    /// See [`product::add_columns`].
    pub add_columns: unsafe fn(&[*const u8], usize, &mut [f64]),
    /// See [`product::pack::rows`].
    pub pack_rows: unsafe fn(&[*const u8], usize, *mut u8),
    /// See [`product::pack::columns`].
    pub pack_columns: unsafe fn(&[*const u8], usize, *mut u8),
    /// See [`product::form::Form::stage`].
    pub stage: unsafe fn(*const u8, usize, *mut u8),
    /// See [`contiguous::convert::narrow`].
    pub narrow: unsafe fn(*const u8, usize, *mut u8),
    /// What products of [pairs](product::form::Pairs) need beside.
    pub pairs: Option<PairKernels>,
}

/// Entry points for what products of pairs round, and what is multiplied apart for that. What [`LogitKernels`] says of safety holds
/// for them too.
#[derive(Clone, Copy, Debug)]
pub struct PairKernels {
    /// See [`product::form::stage_row`].
    pub stage_row: unsafe fn(*const u8, usize, *mut u8),
    /// See [`product::form::stage_columns`].
    pub stage_columns: unsafe fn(&[*const u8], usize, *mut u8, usize),
    /// See [`product::add_scaled`].
    pub add_scaled: unsafe fn(*const u8, usize, f64, *mut u8),
}
