//! Which instruction set runs, decided once; the entry points of each.
//!
//! An entry point is a plain function compiled for one instruction set. Everything it calls is
//! inlined into it; no vector crosses it; rayon stays outside.

use crate::element::Element;
use crate::kernels::contiguous::block::Chunk;
use crate::kernels::contiguous::gradient::GradientChunk;
use crate::kernels::contiguous::reduce::{CHUNK_WORDS, Sums};
use crate::kernels::contiguous::short::{ShortGradient, ShortRows};
use crate::kernels::contiguous::{convert, gradient, interleaved, reduce, short};
use crate::kernels::entropy_bonus::{self, Bonus};
use crate::kernels::logit_transform::{self, Transform};
use crate::kernels::masses;
use crate::kernels::ordinary::OrdinaryState;
use crate::kernels::product::form::{self, Form, Fused, Pairs, Single, Swapped};
#[cfg(x86_sets)]
use crate::kernels::product::form::{Dots, Paired};
use crate::kernels::product::{self, Product, pack};
use crate::kernels::ranking::Bound;
use crate::kernels::row_math::{self, OutputTerm, RowGroup, RowGroupExtras, RowOptions};
use crate::kernels::row_state::ArgMax;
use crate::kernels::softmax_gradient::{self, Pair, Tiles};
use crate::kernels::strided::gradient::TileGradient;
use crate::kernels::strided::reduce::{Masses, TileMaxima};
use crate::kernels::strided::row::StripRow;
use crate::kernels::strided::strip::{Strip, StripGradient};
use crate::kernels::strided::tile::{Tile, TileNumbers};
use crate::kernels::{
    Kernels, LaneKernels, LogitKernels, OutputKernels, PairKernels, ProductKernels, class_index,
    ordinary, strided,
};
use crate::math::compensated::{CompensatedLanes, CompensatedSum};
use crate::math::exp2::{Base, Shift};
use crate::simd::{Halves, Simd, portable};
#[cfg(x86_sets)]
use crate::simd::{PairProducts, avx2, avx512};
#[cfg(x86_sets)]
use crate::strategy;
use crate::view::{FloatType, IntegerType, Span, View};
use half::{bf16, f16};
use std::ops::Range;
use std::ptr;
use std::sync::atomic::{AtomicPtr, Ordering};

/// An instruction set that kernels exist for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    /// What the build's own target has: NEON on AArch64, SSE2 on a plain x86-64.
    Portable,
    /// AVX2 with FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
}

impl Isa {
    /// All of them, the plainest first.
    pub const ALL: [Isa; 3] = [Isa::Portable, Isa::Avx2, Isa::Avx512];

    /// What `xent_isa` and `XENT_ISA` call it.
    pub fn name(self) -> &'static str {
        match self {
            Isa::Portable => portable::NAME,
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
        }
    }

    /// The processor has it.
    pub fn is_available(self) -> bool {
        match self {
            Isa::Portable => portable_entries::detected(),
            #[cfg(x86_sets)]
            Isa::Avx2 => avx2_entries::detected(),
            #[cfg(x86_sets)]
            Isa::Avx512 => avx512_entries::detected(),
            #[cfg(not(x86_sets))]
            Isa::Avx2 | Isa::Avx512 => false,
        }
    }

    /// The best that the processor has.
    pub fn best() -> Isa {
        let available = Isa::ALL.into_iter().filter(|isa| isa.is_available());
        available.max().unwrap_or(Isa::Portable)
    }

    /// The entry points that see nothing of a type but its lanes. Unit tests that take them from
    /// `kernels` have all the others compiled as well, which is three quarters of the library.
    #[cfg(test)]
    pub(crate) fn lanes(self, dtype: FloatType) -> Option<&'static LaneKernels> {
        if !self.is_available() {
            return None;
        }
        match self {
            Isa::Portable => Some(portable_entries::lanes_for(dtype)),
            #[cfg(x86_sets)]
            Isa::Avx2 => Some(avx2_entries::lanes_for(dtype)),
            #[cfg(x86_sets)]
            Isa::Avx512 => Some(avx512_entries::lanes_for(dtype)),
            #[cfg(not(x86_sets))]
            Isa::Avx2 | Isa::Avx512 => None,
        }
    }

    /// Its entry points for logits and gradients of these types, if the processor has it: having
    /// them is the proof that they may run. None for types that do not go together, too.
    pub(crate) fn kernels(self, logits: FloatType, output: FloatType) -> Option<Kernels> {
        if !self.is_available() {
            return None;
        }
        match self {
            Isa::Portable => portable_entries::kernels(logits, output),
            #[cfg(x86_sets)]
            Isa::Avx2 => avx2_entries::kernels(logits, output),
            #[cfg(x86_sets)]
            Isa::Avx512 => avx512_entries::kernels(logits, output),
            #[cfg(not(x86_sets))]
            Isa::Avx2 | Isa::Avx512 => None,
        }
    }

    /// Its entry points for products of operands of a type, if the processor has it: see
    /// [`kernels`](Isa::kernels).
    pub(crate) fn product_kernels(self, dtype: FloatType) -> Option<&'static ProductKernels> {
        if !self.is_available() {
            return None;
        }
        match self {
            Isa::Portable => Some(portable_entries::product_kernels(dtype)),
            #[cfg(x86_sets)]
            Isa::Avx2 => Some(avx2_entries::product_kernels(dtype)),
            #[cfg(x86_sets)]
            Isa::Avx512 => {
                let pairs = (dtype == FloatType::Bf16).then(avx512_pairs::product_kernels);
                pairs.flatten().or_else(|| Some(avx512_entries::product_kernels(dtype)))
            }
            #[cfg(not(x86_sets))]
            Isa::Avx2 | Isa::Avx512 => None,
        }
    }
}

/// Defines functions that are compiled for the features in brackets. Each calls a kernel, all of which is
/// inlined into it.
macro_rules! entry_points {
    ([$($feature:tt),*] ) => {};
    ([$($feature:tt),*] fn $name:ident[$($generics:tt)*]($($arg:ident: $type:ty),*) -> $result:ty
        { $call:expr } $($rest:tt)*) => {
        $(#[target_feature(enable = $feature)])*
        unsafe fn $name<$($generics)*>($($arg: $type),*) -> $result {
            // SAFETY: the processor has the set (`LogitKernels`), whose features this function is compiled
            // for, so it may make the token; the tables ask the caller for what the kernel asks for.
            unsafe { $call }
        }
        entry_points! { [$($feature),*] $($rest)* }
    };
}

/// Defines a module with the entry points of one instruction set, and the tables of them.
macro_rules! entries {
    ($module:ident, [$($feature:tt),*], $short:ty, $long:ty) => {
        mod $module {
            use super::*;

            /// Whether the processor has all the features that the entry points are compiled for.
            pub fn detected() -> bool {
                true $(&& std::arch::is_x86_feature_detected!($feature))*
            }

            entry_points! {
                [$($feature),*]
                fn max[S: Simd<Real: Base>, E: Element<S>](chunk: &Chunk) -> f64 {
                    reduce::max::<S, E>(S::assume(), chunk)
                }
                fn sum[S: Simd<Real: Base>, E: Element<S>](chunk: &Chunk, shift: Shift) -> Sums {
                    reduce::sum::<S, E>(S::assume(), chunk, shift)
                }
                fn sums[S: Simd<Real: Base>, E: Element<S>](chunks: &Chunk, shift: Shift, safe: &Range<f64>, sums: &mut [f64]) -> usize {
                    reduce::sums::<S, E>(S::assume(), chunks, shift, safe, sums)
                }
                fn sum_stored[S: Simd<Real: Base>, E: Element<S>](chunk: &Chunk, shift: Shift) -> Sums {
                    reduce::sum_stored::<S, E>(S::assume(), chunk, shift)
                }
                fn sum_clamped[S: Simd<Real: Base>, E: Element<S>](chunk: &Chunk, shift: Shift, moment: bool) -> Sums {
                    reduce::sum_clamped::<S, E>(S::assume(), chunk, shift, moment)
                }
                fn restore[S: Simd<Real: Base>, E: Element<S>](chunk: &Chunk) -> () {
                    reduce::restore::<S, E>(S::assume(), chunk)
                }
                fn argmax[S: Simd<Real: Base>, E: Element<S>](x: *const u8, len: usize) -> ArgMax {
                    reduce::argmax::<S, E>(S::assume(), x, len)
                }
                fn find[S: Simd<Real: Base>, E: Element<S>](x: *const u8, len: usize, bound: &Bound, found: &mut [u64; CHUNK_WORDS]) -> () {
                    reduce::find::<S, E>(S::assume(), x, len, bound, found)
                }
                fn dot[S: Simd<Real: Base>, E: Element<S>](
                    chunk: &Chunk, center: f64, mass: *const f64, exact: bool
                ) -> CompensatedSum {
                    reduce::dot::<S, E>(S::assume(), chunk, center, mass, exact)
                }
                fn widen[S: Simd<Real: Base>, E: Element<S>](x: *const u8, len: usize, to: *mut u8) -> () {
                    convert::widen::<S, E>(S::assume(), x, len, to)
                }
                fn gather[S: Simd<Real: Base>, E: Element<S>](tile: &Tile, from: *const u8, strides: [isize; 2]) -> () {
                    strided::transpose::gather::<S, E>(S::assume(), tile, from, strides)
                }
                fn short_sums[S: Simd<Real: Base>, E: Element<S>](rows: &ShortRows, state: &mut OrdinaryState) -> () {
                    short::sums::<S, E>(S::assume(), rows, state)
                }
                fn short_gradient[S: Simd<Real: Base>, G: Element<S>](rows: &ShortRows, state: &mut OrdinaryState, to: &ShortGradient) -> () {
                    short::gradient::<S, G>(S::assume(), rows, state, to)
                }
                fn strip_sums[S: Simd<Real: Base>, E: Element<S>](strip: &Strip, state: &mut OrdinaryState) -> () {
                    strided::strip::sums::<S, E>(S::assume(), strip, state)
                }
                fn strip_dots[S: Simd<Real: Base>, E: Element<S>](strip: &Strip, state: &mut OrdinaryState) -> () {
                    strided::strip::dots::<S, E>(S::assume(), strip, state)
                }
                fn strip_row_sums[S: Simd<Real: Base>, E: Element<S>](row: &StripRow, state: &mut OrdinaryState) -> () {
                    strided::row::sums::<S, E>(S::assume(), row, state)
                }
                fn strip_row_gradient[S: Simd<Real: Base>, G: Element<S>](row: &StripRow, state: &mut OrdinaryState, to: *mut u8) -> () {
                    strided::row::gradient::<S, G>(S::assume(), row, state, to)
                }
                fn strip_gradient[S: Simd<Real: Base>, E: Element<S>, G: Element<S>](strip: &Strip, state: &mut OrdinaryState, to: &StripGradient) -> () {
                    strided::strip::gradient::<S, E, G>(S::assume(), strip, state, to)
                }
                fn finish_ordinary[S: Simd<Real: Base>](count: usize, state: &mut OrdinaryState, wanted: &ordinary::Wanted) -> () {
                    ordinary::finish::<S>(S::assume(), count, state, wanted)
                }
                fn add_losses[](losses: *const f64, groups: usize, totals: &mut CompensatedLanes) -> () {
                    ordinary::add_losses(<$long>::assume(), losses, groups, totals)
                }
                fn write_gradient[S: Simd<Real: Base>, E: Element<S>, G: Element<S>](chunk: &GradientChunk) -> () {
                    gradient::gradient::<S, E, G>(S::assume(), chunk)
                }
                fn sums_and_gradient[S: Simd<Real: Base>, E: Element<S>, G: Element<S>](chunks: &Chunk, shift: Shift, safe: &Range<f64>, pending: &GradientChunk, sums: &mut [f64]) -> (usize, Sums) {
                    interleaved::sums_and_gradient::<S, E, G>(S::assume(), chunks, shift, safe, pending, sums)
                }
                fn narrow[S: Simd<Real: Base>, G: Element<S>](x: *const u8, len: usize, to: *mut u8) -> () {
                    convert::narrow::<S, G>(S::assume(), x, len, to)
                }
                fn scatter[S: Simd<Real: Base>, G: Element<S>](tile: &Tile, to: *mut u8, strides: [isize; 2], accumulate: bool, writes: u64) -> () {
                    strided::transpose::scatter::<S, G>(S::assume(), tile, to, strides, accumulate, writes)
                }
                fn finish_loss[S: Simd<Real: Base>](groups: &mut [RowGroup], extras: Option<&mut [RowGroupExtras]>, options: &RowOptions) -> () {
                    row_math::finish_loss::<S>(S::assume(), groups, extras, options)
                }
                fn finish_softmax[S: Simd<Real: Base>](groups: &mut [RowGroup], term: OutputTerm) -> () {
                    row_math::finish_softmax::<S>(S::assume(), groups, term)
                }
                fn count_kept[](view: &View<IntegerType>, first: usize, len: usize, ignore: i64, classes: usize) -> Option<u64> {
                    class_index::count_kept(view, first, len, ignore, classes)
                }
                fn read_classes[](view: &View<IntegerType>, span: &Span, ignore: i64, to: &mut [f64]) -> () {
                    class_index::read_classes(view, span, ignore, to)
                }
                fn transform[S: Simd<Real: Base>](x: *mut u8, len: usize, with: &Transform, slope: *mut u8) -> () {
                    logit_transform::transform::<S>(S::assume(), x, len, with, slope)
                }
                fn subtract_bonus[S: Simd<Real: Base>](x: *const u8, len: usize, bonus: &Bonus, biases: *mut u8) -> () {
                    entropy_bonus::subtract::<S>(S::assume(), x, len, bonus, biases)
                }
                fn compensated_total[S: Simd<Real: Base>](x: *const f64, len: usize) -> CompensatedSum {
                    reduce::compensated_total::<S>(S::assume(), x, len)
                }
                fn widen_masses[](dtype: FloatType, x: *const u8, len: usize, to: *mut f64) -> () {
                    masses::widen(<$short>::assume(), dtype, x, len, to)
                }
                fn exps[S: Simd<Real: Base>](x: *mut f64, len: usize, scale: f64, shift: f64, factor: f64) -> () {
                    masses::exps::<S>(S::assume(), x, len, scale, shift, factor)
                }
                fn divergences[S: Simd<Real: Base>](t: *mut f64, x: *const f64, len: usize, center: f64) -> () {
                    masses::divergences::<S>(S::assume(), t, x, len, center)
                }
                fn tile_sums[S: Simd<Real: Base>](tile: &Tile, groups: &mut [RowGroup], moments: Option<&mut [RowGroupExtras]>) -> () {
                    strided::reduce::sums::<S>(S::assume(), tile, groups, moments)
                }
                fn tile_argmax[S: Simd<Real: Base>](tile: &Tile, maxima: &mut TileMaxima) -> () {
                    strided::reduce::argmax::<S>(S::assume(), tile, maxima)
                }
                fn tile_dots[S: Simd<Real: Base>](tile: &Tile, groups: &[RowGroup], extras: &mut [RowGroupExtras], masses: &Masses) -> () {
                    strided::reduce::dots::<S>(S::assume(), tile, groups, extras, masses)
                }
                fn tile_gradient[S: Simd<Real: Base>](tile: &Tile, gradient: &TileGradient) -> () {
                    strided::gradient::gradient::<S>(S::assume(), tile, gradient)
                }
                fn products[S: Simd<Real: Base>](pair: &Pair) -> f64 {
                    softmax_gradient::products::<S>(S::assume(), pair)
                }
                fn combine[S: Simd<Real: Base>](pair: &Pair, sum: f64) -> () {
                    softmax_gradient::combine::<S>(S::assume(), pair, sum)
                }
                fn tile_products[S: Simd<Real: Base>](tiles: &Tiles, sums: &mut [TileNumbers; 2]) -> () {
                    softmax_gradient::tile_products::<S>(S::assume(), tiles, sums)
                }
                fn multiply[S: Simd<Real: Base>](product: &Product) -> () {
                    product::multiply::<S, Fused>(S::assume(), product)
                }
                fn add_scaled[S: Simd<Real: Base>, E: Element<S>](x: *const u8, len: usize, factor: f64, to: *mut u8) -> () {
                    product::add_scaled::<S, E>(S::assume(), x, len, factor, to)
                }
                fn add_columns[S: Simd<Real: Base>](rows: &[*const u8], columns: usize, sums: &mut [f64]) -> () {
                    product::add_columns::<S>(S::assume(), rows, columns, sums)
                }
                fn pack_rows[S: Simd<Real: Base>, F: Form<S>](rows: &[*const u8], columns: usize, to: *mut u8) -> () {
                    pack::rows::<S, F>(S::assume(), rows, columns, to)
                }
                fn pack_columns[S: Simd<Real: Base>, F: Form<S>](rows: &[*const u8], depth: usize, to: *mut u8) -> () {
                    pack::columns::<S, F>(S::assume(), rows, depth, to)
                }
                fn stage[S: Simd<Real: Base>, F: Form<S>](from: *const u8, len: usize, to: *mut u8) -> () {
                    F::stage(S::assume(), from.cast(), len, to.cast())
                }
                fn stage_row[S: Halves, F: Pairs<S>](from: *const u8, len: usize, to: *mut u8) -> () {
                    form::stage_row::<S, F>(S::assume(), from, len, to)
                }
                fn stage_columns[S: Halves, F: Pairs<S>](rows: &[*const u8], columns: usize, to: *mut u8, pitch: usize) -> () {
                    form::stage_columns::<S, F>(S::assume(), rows, columns, to, pitch)
                }
                fn tile_combine[S: Simd<Real: Base>](tiles: &Tiles, sums: &[TileNumbers; 2]) -> () {
                    softmax_gradient::tile_combine::<S>(S::assume(), tiles, sums)
                }
            }

            const fn logit_kernels<S: Simd<Real: Base>, E: Element<S>>() -> LogitKernels {
                LogitKernels {
                    max: max::<S, E>,
                    sum: sum::<S, E>,
                    sums: sums::<S, E>,
                    sum_stored: sum_stored::<S, E>,
                    sum_clamped: sum_clamped::<S, E>,
                    restore: restore::<S, E>,
                    argmax: argmax::<S, E>,
                    find: find::<S, E>,
                    dot: dot::<S, E>,
                    widen: widen::<S, E>,
                    short_sums: short_sums::<S, E>,
                    strip_sums: strip_sums::<S, E>,
                    strip_dots: strip_dots::<S, E>,
                    strip_row_sums: strip_row_sums::<S, E>,
                    gather: gather::<S, E>,
                }
            }

            const fn output_kernels<S: Simd<Real: Base>, E: Element<S>, G: Element<S>>()
            -> OutputKernels {
                OutputKernels {
                    gradient: write_gradient::<S, E, G>,
                    sums_and_gradient: if S::FUSED {
                        Some(sums_and_gradient::<S, E, G>)
                    } else {
                        None
                    },
                    narrow: narrow::<S, G>,
                    short_gradient: short_gradient::<S, G>,
                    strip_gradient: strip_gradient::<S, E, G>,
                    strip_row_gradient: strip_row_gradient::<S, G>,
                    scatter: scatter::<S, G>,
                }
            }

            const fn lane_kernels<S: Simd<Real: Base>>() -> LaneKernels {
                LaneKernels {
                    finish_loss: finish_loss::<S>,
                    finish_softmax: finish_softmax::<S>,
                    finish_ordinary: finish_ordinary::<S>,
                    add_losses,
                    count_kept,
                    read_classes,
                    transform: transform::<S>,
                    subtract_bonus: subtract_bonus::<S>,
                    compensated_total: compensated_total::<S>,
                    widen_masses,
                    exps: exps::<S>,
                    divergences: divergences::<S>,
                    tile_sums: tile_sums::<S>,
                    tile_argmax: tile_argmax::<S>,
                    tile_dots: tile_dots::<S>,
                    tile_gradient: tile_gradient::<S>,
                    products: products::<S>,
                    combine: combine::<S>,
                    tile_products: tile_products::<S>,
                    tile_combine: tile_combine::<S>,
                    fence,
                }
            }

            fn fence() {
                // SAFETY: `kernels` hands out the table with this function only if the processor has the set, and the
                // function uses no vector.
                unsafe { <$short>::assume() }.fence();
            }

            /// The tables for logits of `E` and outputs of `G`, with lanes of `R`.
            const fn table<
                S: Simd<Real: Base> + 'static,
                E: Element<S>,
                G: Element<S>,
                R: Element<S>,
            >() -> Kernels {
                Kernels {
                    native: const { &logit_kernels::<S, E>() },
                    converted: const { &logit_kernels::<S, R>() },
                    native_to_output: const { &output_kernels::<S, E, G>() },
                    converted_to_output: const { &output_kernels::<S, R, G>() },
                    native_to_lanes: const { &output_kernels::<S, E, R>() },
                    converted_to_lanes: const { &output_kernels::<S, R, R>() },
                    lanes: const { &lane_kernels::<S>() },
                }
            }

            /// The table for products of operands of a form, made by `multiply`.
            pub const fn product_table<S: Simd<Real: Base> + 'static, F: Form<S>>(
                multiply: unsafe fn(&Product),
            ) -> ProductKernels {
                ProductKernels {
                    panel: product::panel::<S>(),
                    order: F::ORDER,
                    multiply,
                    add_columns: add_columns::<S>,
                    pack_rows: pack_rows::<S, F>,
                    pack_columns: pack_columns::<S, F>,
                    stage: stage::<S, F>,
                    narrow: narrow::<S, F::Element>,
                    pairs: None,
                }
            }

            /// The same for a form of pairs.
            pub const fn pair_table<S: Halves<Real: Base> + 'static, F: Pairs<S>>(
                multiply: unsafe fn(&Product),
            ) -> ProductKernels {
                let pairs = PairKernels {
                    stage_row: stage_row::<S, F>,
                    stage_columns: stage_columns::<S, F>,
                    add_scaled: add_scaled::<S, bf16>,
                };
                ProductKernels { pairs: Some(pairs), ..product_table::<S, F>(multiply) }
            }

            /// The entry points for products of operands of this type.
            pub fn product_kernels(dtype: FloatType) -> &'static ProductKernels {
                match dtype {
                    FloatType::F32 => const { &product_table::<$short, Single<f32>>(multiply::<$short>) },
                    FloatType::F64 => const { &product_table::<$long, Single<f64>>(multiply::<$long>) },
                    FloatType::Bf16 => const { &pair_table::<$short, Swapped>(multiply::<$short>) },
                    FloatType::F16 => const { &product_table::<$short, Single<f16>>(multiply::<$short>) },
                }
            }

            /// See [`Isa::lanes`].
            #[cfg(test)]
            pub fn lanes_for(dtype: FloatType) -> &'static LaneKernels {
                if dtype.has_f32_lanes() {
                    const { &lane_kernels::<$short>() }
                } else {
                    const { &lane_kernels::<$long>() }
                }
            }

            /// The entry points for logits and outputs of these types, if they go together.
            pub fn kernels(logits: FloatType, output: FloatType) -> Option<Kernels> {
                use FloatType::{Bf16, F16, F32, F64};
                Some(match (logits, output) {
                    (F32, F32) => const { table::<$short, f32, f32, f32>() },
                    (F64, F64) => const { table::<$long, f64, f64, f64>() },
                    (Bf16, Bf16) => const { table::<$short, bf16, bf16, f32>() },
                    (Bf16, F32) => const { table::<$short, bf16, f32, f32>() },
                    (F16, F16) => const { table::<$short, f16, f16, f32>() },
                    (F16, F32) => const { table::<$short, f16, f32, f32>() },
                    (F32, F64 | Bf16 | F16)
                    | (F64, F32 | Bf16 | F16)
                    | (Bf16, F64 | F16)
                    | (F16, F64 | Bf16) => return None,
                })
            }
        }
    };
}

entries!(portable_entries, [], portable::Portable, portable::PortableWide);
#[cfg(x86_sets)]
entries!(avx2_entries, ["avx2", "fma", "f16c"], avx2::Avx2, avx2::Avx2Wide);
#[cfg(x86_sets)]
entries!(
    avx512_entries,
    ["avx512f", "avx512bw", "avx512dq", "avx512vl"],
    avx512::Avx512,
    avx512::Avx512Wide
);

/// Products of bf16 by pairs, on processors that have AVX-512 with AVX512_BF16.
#[cfg(x86_sets)]
mod avx512_pairs {
    use super::*;

    entry_points! {
        ["avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512bf16"]
        fn multiply_pairs[S: PairProducts](product: &Product) -> () {
            product::multiply::<S, Dots>(S::assume(), product)
        }
    }

    /// The entry points, if the processor has the instruction beside the set and is faster with it.
    pub fn product_kernels() -> Option<&'static ProductKernels> {
        let detected = std::arch::is_x86_feature_detected!("avx512bf16");
        (detected && strategy::multiplies_pairs()).then_some(
            const {
                use avx512::Avx512;
                &avx512_entries::pair_table::<Avx512, Paired>(multiply_pairs::<Avx512>)
            },
        )
    }
}

/// The instruction set in use: the best there is, or the one that a non-empty `XENT_ISA` names; the reason
/// if it names none, or one that this processor does not have. Decided once, without a lock or a `Once`: a
/// process that is forked during the decision makes its own.
pub(crate) fn selected() -> Result<Isa, &'static str> {
    type Choice = Result<Isa, String>;
    static SETS: [Choice; 3] = [Ok(Isa::Portable), Ok(Isa::Avx2), Ok(Isa::Avx512)];
    /// Null, or one of SETS, or a refusal that is never freed.
    static SELECTED: AtomicPtr<Choice> = AtomicPtr::new(ptr::null_mut());

    let mut choice = SELECTED.load(Ordering::Acquire).cast_const();
    if choice.is_null() {
        choice = match std::env::var_os("XENT_ISA") {
            Some(value) if !value.is_empty() => named(&value.to_string_lossy()),
            _ => Ok(Isa::best()),
        }
        .map_or_else(|why| &*Box::leak(Box::new(Err(why))), |isa| &SETS[isa as usize]);
        let (success, failure) = (Ordering::AcqRel, Ordering::Acquire);
        let null = ptr::null_mut();
        // Of several threads that decide at once, the first one's choice stands.
        if let Err(first) = SELECTED.compare_exchange(null, choice.cast_mut(), success, failure) {
            choice = first;
        }
    }
    // SAFETY: `choice` is not null. It points to an element of SETS or to a leaked box, which live forever, and
    // nobody writes to either.
    unsafe { &*choice }.as_ref().copied().map_err(String::as_str)
}

/// The available instruction set of that name, or what is wrong with it.
fn named(name: &str) -> Result<Isa, String> {
    let list = |isas: Vec<Isa>| isas.iter().map(|i| i.name()).collect::<Vec<_>>().join(", ");
    match Isa::ALL.into_iter().find(|isa| isa.name() == name) {
        Some(isa) if isa.is_available() => Ok(isa),
        Some(_) => Err(format!(
            "XENT_ISA={name} is not available on this processor, which has: {}",
            list(Isa::ALL.into_iter().filter(|i| i.is_available()).collect())
        )),
        None => Err(format!(
            "XENT_ISA={name} names no instruction set; there are: {}",
            list(Isa::ALL.to_vec())
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_understood_or_refused() {
        assert_eq!(named(portable::NAME), Ok(Isa::Portable));
        for isa in Isa::ALL {
            assert_eq!(named(isa.name()).is_ok(), isa.is_available());
        }
        assert!(named("avx9000").unwrap_err().contains("names no instruction set"));
        assert!(named("").is_err());
    }

    /// Sums that carry along what they lose: the same bits on every set, wherever lanes end.
    #[test]
    fn totals() {
        let terms: Vec<f64> = (0..1000).map(|i| 1e16 * f64::from(i / 16 % 3 - 1) + 0.25).collect();
        for isa in Isa::ALL {
            for dtype in [FloatType::F32, FloatType::F64] {
                let Some(k) = isa.lanes(dtype) else { continue };
                for len in [0, 1, 2, 7, 15, 16, 17, 31, 48, 100, 1000] {
                    // SAFETY: within the terms; the processor has the set, since it has kernels.
                    let total = unsafe { (k.compensated_total)(terms.as_ptr(), len) }.value();
                    let mut want = CompensatedSum::ZERO;
                    terms[..len].iter().for_each(|&x| want.add(x));
                    assert_eq!(total, want.value(), "{len} on {}", isa.name());
                }
            }
        }
    }
}
