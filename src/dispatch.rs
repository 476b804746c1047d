//! Which instruction set runs, decided once; the entry points of each.
//!
//! An entry point is a plain function compiled for one instruction set. Everything it calls is
//! inlined into it; no vector crosses it; rayon stays outside.

use crate::element::Element;
use crate::kernels::class_index;
use crate::kernels::contiguous::{self, Chunk, GradientChunk, Sums};
use crate::kernels::row_math::{self, RowGroup};
use crate::kernels::row_state::{ArgMax, CompensatedSum};
use crate::kernels::softmax_gradient::{self, Pair, Tiles};
use crate::kernels::tiles::{self, Masses, Numbers, Tile, TileGradient};
use crate::kernels::{Kernels, Lanes, Outputs, Sweeps};
use crate::math::exp2::{Base, Shift};
use crate::plan::{Dtype, Plan, Run, Transform, View};
use crate::simd::{Simd, portable};
#[cfg(x86_sets)]
use crate::simd::{avx2, avx512};
use half::{bf16, f16};
use std::ops::Range;
use std::sync::OnceLock;

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
    pub(crate) fn lanes(self, dtype: Dtype) -> Option<&'static Lanes> {
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
    pub(crate) fn kernels(self, logits: Dtype, gradient: Dtype) -> Option<Kernels> {
        if !self.is_available() {
            return None;
        }
        match self {
            Isa::Portable => portable_entries::kernels(logits, gradient),
            #[cfg(x86_sets)]
            Isa::Avx2 => avx2_entries::kernels(logits, gradient),
            #[cfg(x86_sets)]
            Isa::Avx512 => avx512_entries::kernels(logits, gradient),
            #[cfg(not(x86_sets))]
            Isa::Avx2 | Isa::Avx512 => None,
        }
    }
}

/// Stamps the entry points for one instruction set. Each makes its token itself, from the features
/// that it is compiled for.
macro_rules! entries {
    ($module:ident, [$($feature:tt),*], $short:ty, $long:ty) => {
        mod $module {
            use super::*;

            /// The processor has all the features that the entry points are compiled for.
            pub fn detected() -> bool {
                true $(&& std::arch::is_x86_feature_detected!($feature))*
            }

            $(#[target_feature(enable = $feature)])*
            unsafe fn max<S: Simd<Real: Base>, E: Element<S>>(chunk: &Chunk) -> f64 {
                // SAFETY: this function's own features; the caller's promise (`Kernels`).
                unsafe { contiguous::max::<S, E>(S::assume(), chunk) }
            }
            $(#[target_feature(enable = $feature)])*
            unsafe fn sum<S: Simd<Real: Base>, E: Element<S>>(chunk: &Chunk, c: Shift) -> Sums {
                // SAFETY: this function's own features; the caller's promise (`Kernels`).
                unsafe { contiguous::sum::<S, E, false, false, false, false>(S::assume(), chunk, c) }
            }
            $(#[target_feature(enable = $feature)])*
            unsafe fn sums<S: Simd<Real: Base>, E: Element<S>>(
                run: &Chunk,
                c: Shift,
                safe: &Range<f64>,
                sums: &mut [f64],
            ) -> usize {
                // SAFETY: this function's own features; the caller's promise (`Kernels`).
                unsafe { contiguous::sums::<S, E>(S::assume(), run, c, safe, sums) }
            }
            $(#[target_feature(enable = $feature)])*
            unsafe fn sum_kept<S: Simd<Real: Base>, E: Element<S>>(chunk: &Chunk, c: Shift) -> Sums {
                // SAFETY: this function's own features; the caller's promise (`Kernels`).
                unsafe { contiguous::sum_kept::<S, E>(S::assume(), chunk, c) }
            }
            $(#[target_feature(enable = $feature)])*
            unsafe fn clamped<S: Simd<Real: Base>, E: Element<S>>(chunk: &Chunk, c: Shift, first_moment: bool) -> Sums {
                // SAFETY: this function's own features; the caller's promise (`Kernels`).
                unsafe { contiguous::clamped::<S, E>(S::assume(), chunk, c, first_moment) }
            }
            $(#[target_feature(enable = $feature)])*
            unsafe fn restore<S: Simd<Real: Base>, E: Element<S>>(chunk: &Chunk) {
                // SAFETY: this function's own features; the caller's promise (`Kernels`).
                unsafe { contiguous::restore::<S, E>(S::assume(), chunk) }
            }
            $(#[target_feature(enable = $feature)])*
            unsafe fn argmax<S: Simd<Real: Base>, E: Element<S>>(x: *const u8, len: usize) -> ArgMax {
                // SAFETY: this function's own features; the caller's promise (`Kernels`).
                unsafe { contiguous::argmax::<S, E>(S::assume(), x, len) }
            }
            $(#[target_feature(enable = $feature)])*
            unsafe fn dot<S: Simd<Real: Base>, E: Element<S>>(chunk: &Chunk, center: f64, mass: *const f64) -> f64 {
                // SAFETY: this function's own features; the caller's promise (`Kernels`).
                unsafe { contiguous::dot::<S, E>(S::assume(), chunk, center, mass) }
            }
            $(#[target_feature(enable = $feature)])*
            unsafe fn widen<S: Simd<Real: Base>, E: Element<S>>(x: *const u8, len: usize, to: *mut u8) {
                // SAFETY: this function's own features; the caller's promise (`Kernels`).
                unsafe { contiguous::widen::<S, E>(S::assume(), x, len, to) }
            }
            $(#[target_feature(enable = $feature)])*
            unsafe fn gather<S: Simd<Real: Base>, E: Element<S>>(tile: &Tile, from: *const u8, strides: [isize; 2]) {
                // SAFETY: this function's own features; the caller's promise (`Kernels`).
                unsafe { tiles::gather::<S, E>(S::assume(), tile, from, strides) }
            }
            $(#[target_feature(enable = $feature)])*
            unsafe fn gradient<S: Simd<Real: Base>, E: Element<S>, G: Element<S>>(chunk: &GradientChunk) {
                // SAFETY: this function's own features; the caller's promise (`Kernels`).
                unsafe { contiguous::gradient::<S, E, G>(S::assume(), chunk) }
            }
            $(#[target_feature(enable = $feature)])*
            unsafe fn sums_beside<S: Simd<Real: Base>, E: Element<S>, G: Element<S>>(
                run: &Chunk,
                c: Shift,
                safe: &Range<f64>,
                other: &GradientChunk,
                sums: &mut [f64],
            ) -> (usize, Sums) {
                // SAFETY: this function's own features; the caller's promise (`Kernels`).
                unsafe { contiguous::sums_beside::<S, E, G>(S::assume(), run, c, safe, other, sums) }
            }
            $(#[target_feature(enable = $feature)])*
            unsafe fn narrow<S: Simd<Real: Base>, G: Element<S>>(x: *const u8, len: usize, to: *mut u8) {
                // SAFETY: this function's own features; the caller's promise (`Kernels`).
                unsafe { contiguous::narrow::<S, G>(S::assume(), x, len, to) }
            }
            $(#[target_feature(enable = $feature)])*
            unsafe fn scatter<S: Simd<Real: Base>, G: Element<S>>(tile: &Tile, to: *mut u8, strides: [isize; 2], accumulate: bool, writes: u64) {
                // SAFETY: this function's own features; the caller's promise (`Kernels`).
                unsafe { tiles::scatter::<S, G>(S::assume(), tile, to, strides, accumulate, writes) }
            }
            $(#[target_feature(enable = $feature)])*
            unsafe fn finish<S: Simd<Real: Base>>(groups: &mut [RowGroup], plan: &Plan) {
                // SAFETY: this function's own features; the caller's promise (`Kernels`).
                unsafe { row_math::finish::<S>(S::assume(), groups, plan) }
            }
            $(#[target_feature(enable = $feature)])*
            unsafe fn count(view: &View, first: usize, len: usize, ignore: i64, classes: usize) -> Option<u64> {
                // SAFETY: the caller's promise (`Kernels`).
                unsafe { class_index::count(view, first, len, ignore, classes) }
            }
            $(#[target_feature(enable = $feature)])*
            unsafe fn excluded_classes(view: &View, run: &Run, ignore: i64, group: &mut RowGroup, lane: usize) {
                // SAFETY: the caller's promise (`Kernels`).
                unsafe { class_index::excluded_classes(view, run, ignore, group, lane) }
            }
            $(#[target_feature(enable = $feature)])*
            unsafe fn transform<S: Simd<Real: Base>>(x: *mut u8, len: usize, with: &Transform, slope: *mut u8) {
                // SAFETY: this function's own features; the caller's promise (`Kernels`).
                unsafe { contiguous::transform::<S>(S::assume(), x, len, with, slope) }
            }
            $(#[target_feature(enable = $feature)])*
            unsafe fn total<S: Simd<Real: Base>>(x: *const f64, len: usize) -> CompensatedSum {
                // SAFETY: this function's own features; the caller's promise (`Kernels`).
                unsafe { contiguous::total::<S>(S::assume(), x, len) }
            }
            $(#[target_feature(enable = $feature)])*
            unsafe fn tile_sums<S: Simd<Real: Base>>(tile: &Tile, groups: &mut [RowGroup], first_moments: bool) {
                // SAFETY: this function's own features; the caller's promise (`Kernels`).
                unsafe { tiles::sums::<S>(S::assume(), tile, groups, first_moments) }
            }
            $(#[target_feature(enable = $feature)])*
            unsafe fn tile_argmax<S: Simd<Real: Base>>(tile: &Tile, groups: &mut [RowGroup]) {
                // SAFETY: this function's own features; the caller's promise (`Kernels`).
                unsafe { tiles::argmax::<S>(S::assume(), tile, groups) }
            }
            $(#[target_feature(enable = $feature)])*
            unsafe fn tile_dots<S: Simd<Real: Base>>(tile: &Tile, groups: &mut [RowGroup], masses: &Masses) {
                // SAFETY: this function's own features; the caller's promise (`Kernels`).
                unsafe { tiles::dots::<S>(S::assume(), tile, groups, masses) }
            }
            $(#[target_feature(enable = $feature)])*
            unsafe fn tile_gradient<S: Simd<Real: Base>>(tile: &Tile, groups: &[RowGroup], gradient: &TileGradient) {
                // SAFETY: this function's own features; the caller's promise (`Kernels`).
                unsafe { tiles::gradient::<S>(S::assume(), tile, groups, gradient) }
            }
            $(#[target_feature(enable = $feature)])*
            unsafe fn products<S: Simd<Real: Base>>(pair: &Pair) -> f64 {
                // SAFETY: this function's own features; the caller's promise (`Kernels`).
                unsafe { softmax_gradient::products::<S>(S::assume(), pair) }
            }
            $(#[target_feature(enable = $feature)])*
            unsafe fn combine<S: Simd<Real: Base>>(pair: &Pair, sum: f64) {
                // SAFETY: this function's own features; the caller's promise (`Kernels`).
                unsafe { softmax_gradient::combine::<S>(S::assume(), pair, sum) }
            }
            $(#[target_feature(enable = $feature)])*
            unsafe fn tile_products<S: Simd<Real: Base>>(tiles: &Tiles, sums: &mut [Numbers; 2]) {
                // SAFETY: this function's own features; the caller's promise (`Kernels`).
                unsafe { softmax_gradient::tile_products::<S>(S::assume(), tiles, sums) }
            }
            $(#[target_feature(enable = $feature)])*
            unsafe fn tile_combine<S: Simd<Real: Base>>(tiles: &Tiles, sums: &[Numbers; 2]) {
                // SAFETY: this function's own features; the caller's promise (`Kernels`).
                unsafe { softmax_gradient::tile_combine::<S>(S::assume(), tiles, sums) }
            }

            const fn sweeps<S: Simd<Real: Base>, E: Element<S>>() -> Sweeps {
                Sweeps {
                    max: max::<S, E>,
                    sum: sum::<S, E>,
                    sums: sums::<S, E>,
                    sum_kept: sum_kept::<S, E>,
                    clamped: clamped::<S, E>,
                    restore: restore::<S, E>,
                    argmax: argmax::<S, E>,
                    dot: dot::<S, E>,
                    widen: widen::<S, E>,
                    gather: gather::<S, E>,
                }
            }

            const fn outputs<S: Simd<Real: Base>, E: Element<S>, G: Element<S>>() -> Outputs {
                Outputs {
                    gradient: gradient::<S, E, G>,
                    sums_beside: sums_beside::<S, E, G>,
                    narrow: narrow::<S, G>,
                    scatter: scatter::<S, G>,
                }
            }

            const fn lanes<S: Simd<Real: Base>>() -> Lanes {
                Lanes {
                    finish: finish::<S>,
                    count,
                    excluded_classes,
                    transform: transform::<S>,
                    total: total::<S>,
                    sums: tile_sums::<S>,
                    argmax: tile_argmax::<S>,
                    dots: tile_dots::<S>,
                    gradient: tile_gradient::<S>,
                    products: products::<S>,
                    combine: combine::<S>,
                    tile_products: tile_products::<S>,
                    tile_combine: tile_combine::<S>,
                    fence,
                }
            }

            fn fence() {
                // SAFETY: a fence needs none of the features.
                unsafe { <$short>::assume() }.fence();
            }

            /// The tables for logits `E` and gradients `G`, and lanes `S` for both.
            const fn table<
                S: Simd<Real: Base> + 'static,
                E: Element<S>,
                G: Element<S>,
                R: Element<S>,
            >() -> Kernels {
                Kernels {
                    stored: const { &sweeps::<S, E>() },
                    staged: const { &sweeps::<S, R>() },
                    direct: const { &outputs::<S, E, G>() },
                    converted: const { &outputs::<S, R, G>() },
                    gathered: const { &outputs::<S, E, R>() },
                    widened: const { &outputs::<S, R, R>() },
                    lanes: const { &lanes::<S>() },
                }
            }

            /// See [`Isa::lanes`].
            #[cfg(test)]
            pub fn lanes_for(dtype: Dtype) -> &'static Lanes {
                match dtype {
                    Dtype::F64 => const { &lanes::<$long>() },
                    _ => const { &lanes::<$short>() },
                }
            }

            /// The entry points for logits and gradients of these types, if they go together.
            pub fn kernels(logits: Dtype, gradient: Dtype) -> Option<Kernels> {
                Some(match (logits, gradient) {
                    (Dtype::F32, Dtype::F32) => const { table::<$short, f32, f32, f32>() },
                    (Dtype::F64, Dtype::F64) => const { table::<$long, f64, f64, f64>() },
                    (Dtype::Bf16, Dtype::Bf16) => const { table::<$short, bf16, bf16, f32>() },
                    (Dtype::Bf16, Dtype::F32) => const { table::<$short, bf16, f32, f32>() },
                    (Dtype::F16, Dtype::F16) => const { table::<$short, f16, f16, f32>() },
                    (Dtype::F16, Dtype::F32) => const { table::<$short, f16, f32, f32>() },
                    _ => return None,
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

/// The instruction set in use: the best there is, or the one that a non-empty `XENT_ISA` names; the reason
/// if it names none, or one that this processor does not have. Decided once.
pub(crate) fn selected() -> Result<Isa, &'static str> {
    static SELECTED: OnceLock<Result<Isa, String>> = OnceLock::new();
    let choice = SELECTED.get_or_init(|| match std::env::var_os("XENT_ISA") {
        None => Ok(Isa::best()),
        Some(value) if value.is_empty() => Ok(Isa::best()),
        Some(value) => named(&value.to_string_lossy()),
    });
    choice.as_ref().copied().map_err(String::as_str)
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
            for dtype in [Dtype::F32, Dtype::F64] {
                let Some(k) = isa.lanes(dtype) else { continue };
                for len in [0, 1, 2, 7, 15, 16, 17, 31, 48, 100, 1000] {
                    // SAFETY: within the terms; the processor has the set, since it has kernels.
                    let total = unsafe { (k.total)(terms.as_ptr(), len) }.value();
                    let mut want = CompensatedSum::NONE;
                    terms[..len].iter().for_each(|&x| want.add(x));
                    assert_eq!(total, want.value(), "{len} on {}", isa.name());
                }
            }
        }
    }
}
