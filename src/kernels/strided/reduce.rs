//! Reductions over a tile: exponential sums, argmax, and sums weighted by masses.

use super::tile::{
    Partial, Registers, Tile, TileNumbers, Whole, by_logit, number, put, put_shift_logits,
    shift_logits, take, take_wide, zip_wide,
};
use crate::kernels::row_math::{RowGroup, RowGroupExtras};
use crate::math::exp2::{Base, ByExponent, ByLogit, Clamped, Exp2, Unclamped};
use crate::math::real;
use crate::simd::{Real, Simd, WideVector, up_to};
use crate::strategy::{REGISTERS_ABREAST as ABREAST, TILE, TILE_CLASSES};

/// The sum of a chunk's exponentials. f64 lanes have digits to spare. f32 lanes carry the rounding error:
/// the sum starts at 2, more than any term, so that the error of an addition is exact (Dekker's fast
/// two-sum). That takes half as many instructions as adding up in f64.
#[derive(Clone, Copy)]
struct PartialSum<S: Simd> {
    s: S,
    sum: S::Vector,
    error: S::Vector,
}

impl<S: Simd> PartialSum<S> {
    const IS_WIDE: bool = S::LANES == <S::Wide as Simd>::LANES;
    const START: f64 = if Self::IS_WIDE { 0.0 } else { 2.0 };

    #[inline(always)]
    fn new(s: S) -> Self {
        PartialSum {
            s,
            sum: s.splat(S::Real::from_f64(Self::START)),
            error: s.splat(S::Real::ZERO),
        }
    }

    /// Adds a number below 2.
    #[inline(always)]
    fn add(&mut self, e: S::Vector) {
        let s = self.s;
        let sum = s.add(e, self.sum);
        if !Self::IS_WIDE {
            let error = s.sub(e, s.sub(sum, self.sum));
            self.error = s.add(self.error, error);
        }
        self.sum = sum;
    }

    /// The sum in f64.
    #[inline(always)]
    fn value(self) -> S::Widened {
        let (s, d) = (self.s, self.s.wide());
        zip_wide::<S>(s.widen(self.sum), s.widen(self.error), |sum, error| {
            if Self::IS_WIDE {
                return sum;
            }
            let value = d.add(d.sub(sum, d.splat(Self::START)), error);
            // The error of an infinite sum is inf - inf.
            d.select(d.less(sum, d.splat(f64::INFINITY)), value, sum)
        })
    }
}

/// The excluded classes of a register's rows, counted from a tile's first class.
///
/// # Safety
/// There are groups for the whole register; the processor has the set of `s`.
#[inline(always)]
pub unsafe fn excluded<S: Simd>(s: S, groups: &[RowGroup], at: usize, tile: &Tile) -> S::Vector {
    let d = s.wide();
    let first = d.splat(tile.first as f64);
    // SAFETY: there are groups for the register (# Safety).
    let mut classes = unsafe { take_wide(s, groups, |group| &group.inputs.excluded, at) };
    classes.as_mut().iter_mut().for_each(|v| *v = d.sub(*v, first));
    s.narrow(classes)
}

/// What [`sums`] adds up for a register of rows.
trait SumKind {
    /// The first moment is summed too.
    const MOMENT: bool;
}

struct Sum;
struct Moment;

impl SumKind for Sum {
    const MOMENT: bool = false;
}
impl SumKind for Moment {
    const MOMENT: bool = true;
}

/// Adds a tile's classes to the exponential sums of its rows, and to their first moments if there are
/// any, and finds the logits of their excluded classes.
///
/// # Safety
/// The tile is readable, and has at most TILE_CLASSES classes; there are groups for whole registers of its
/// distributions, and as many moments, if there are any; the processor has the set of `s`.
#[inline(always)]
pub unsafe fn sums<S: Simd<Real: Base>>(
    s: S,
    tile: &Tile,
    groups: &mut [RowGroup],
    moments: Option<&mut [RowGroupExtras]>,
) {
    let wants_moments = moments.is_some();
    let moments = moments.unwrap_or_default();
    let mut at = 0;
    while at < tile.lanes {
        let left = tile.lanes - at;
        // SAFETY: the registers from `at` on have distributions of the tile, all lanes of them where
        // `Whole` says so; the rest is this function's # Safety.
        unsafe {
            if !wants_moments && left >= ABREAST * S::LANES {
                register_sums::<S, Sum, Whole, ABREAST>(s, tile, groups, moments, at);
                at += ABREAST * S::LANES;
                continue;
            }
            if wants_moments {
                register_sums::<S, Moment, Partial, 1>(s, tile, groups, moments, at);
            } else {
                register_sums::<S, Sum, Partial, 1>(s, tile, groups, moments, at);
            }
        }
        at += S::LANES;
    }
}

/// # Safety
/// As [`sums`]; `at` is the first distribution of `N` registers, which are whole with `W::WHOLE`; there
/// are moments if `K::MOMENT`.
#[inline(always)]
unsafe fn register_sums<S: Simd<Real: Base>, K: SumKind, W: Registers, const N: usize>(
    s: S,
    tile: &Tile,
    groups: &mut [RowGroup],
    moments: &mut [RowGroupExtras],
    at: usize,
) {
    let lowest = s.splat(S::Real::NEG_INFINITY);
    let (mut class, mut x_y, mut max) = ([lowest; N], [lowest; N], [lowest; N]);
    for i in 0..N {
        // SAFETY: there are groups for whole registers (# Safety of `sums`).
        unsafe {
            class[i] = excluded(s, groups, at + i * S::LANES, tile);
            if tile.first > 0 {
                x_y[i] = take(s, groups, |group| &group.inputs.x_y, at + i * S::LANES);
            }
        }
    }
    for c in 0..tile.classes {
        for i in 0..N {
            // SAFETY: `c` is a class of the tile, which has at most TILE_CLASSES (# Safety).
            let is_excluded = s.equal(unsafe { number(s, c) }, class[i]);
            // SAFETY: the register is in the tile, and whole with `W::WHOLE` (# Safety).
            let x = unsafe { tile.logits::<S, W>(s, c, at + i * S::LANES) };
            x_y[i] = s.select(is_excluded, x, x_y[i]);
            // A NaN loses.
            max[i] = s.select(is_excluded, max[i], s.max(x, max[i]));
        }
    }
    for i in 0..N {
        let scan = MaxScan { at: at + i * S::LANES, excluded: class[i], x_y: x_y[i], max: max[i] };
        // SAFETY: this function's own # Safety, for register `i`.
        unsafe { sums_after::<S, K, W>(s, tile, groups, moments, scan) };
    }
}

/// What a scan over the classes of a register has found.
struct MaxScan<S: Simd> {
    /// The first distribution of the register.
    at: usize,
    /// The excluded classes, counted from the tile's first class.
    excluded: S::Vector,
    /// Their logits, if they were seen.
    x_y: S::Vector,
    /// The largest of the other logits.
    max: S::Vector,
}

/// The second pass: chooses the shifts and adds up.
///
/// # Safety
/// As [`register_sums`].
#[inline(always)]
unsafe fn sums_after<S: Simd<Real: Base>, K: SumKind, W: Registers>(
    s: S,
    tile: &Tile,
    groups: &mut [RowGroup],
    moments: &mut [RowGroupExtras],
    MaxScan { at, excluded, x_y, max }: MaxScan<S>,
) {
    let d = s.wide();
    let splat = |x: f64| s.splat(S::Real::from_f64(x));
    // SAFETY: the register is in the tile, and whole with `W::WHOLE` (# Safety).
    let load = |c: usize| unsafe { tile.logits::<S, W>(s, c, at) };

    // The integer nearest to L·max, or else max itself; 0 if it is infinite.
    let zero = s.splat(S::Real::ZERO);
    let round = s.splat(S::Real::ROUND);
    let scaled = s.mul(max, s.splat(S::Real::L));
    let size = s.max(scaled, s.sub(zero, scaled));
    let exponent = s.sub(s.add(scaled, round), round);
    let is_near = s.less(size, splat(S::Real::MAX_SHIFT));
    let finite = s.less(s.max(max, s.sub(zero, max)), splat(f64::INFINITY));
    let exponent = s.keep(is_near, exponent);
    let logit = s.select(is_near, zero, s.keep(finite, max));

    let (mut logit, mut exponent) = (logit, exponent);
    let nothing = s.widen(zero);
    let (mut sum, mut error, mut moment) = (nothing, nothing, nothing);
    let mut had_logits = false;
    if tile.first > 0 {
        // The new shift replaces the old one if that is lower, or has no sum yet.
        // SAFETY: there are groups for whole registers (# Safety of `sums`).
        let (old_logit, old_exponent, old_sum) = unsafe {
            had_logits = by_logit::<S>(groups, at);
            (
                s.narrow(shift_logits(s, groups, at)),
                take(s, groups, |group| &group.sums.shift_exponent, at),
                take_wide(s, groups, |group| &group.sums.sum, at),
            )
        };
        let l = d.splat(S::Real::L.to_f64());
        let (nothing, infinity) = (d.splat(0.0), d.splat(f64::INFINITY));
        let exponents = zip_wide::<S>(s.widen(exponent), s.widen(old_exponent), |a, b| d.sub(a, b));
        let logits = zip_wide::<S>(s.widen(logit), s.widen(old_logit), |a, b| d.sub(a, b));
        let above =
            zip_wide::<S>(logits, exponents, |logit, exponent| d.mul_add(logit, l, exponent));
        let rises = zip_wide::<S>(above, old_sum, |above, sum| {
            let higher = d.select(d.less(nothing, above), above, nothing);
            d.select(d.equal(sum, nothing), d.splat(1.0), higher)
        });
        // A chunk of nothing but -inf has no shift, and 0 may be above the old one.
        let rises = zip_wide::<S>(rises, s.widen(max), |rises, max| {
            d.select(d.less(d.splat(f64::NEG_INFINITY), max), rises, nothing)
        });
        let moved = s.less(zero, s.narrow(rises));
        (logit, exponent) =
            (s.select(moved, logit, old_logit), s.select(moved, exponent, old_exponent));
        sum = old_sum;
        // SAFETY: there are groups for whole registers, and moments if `K::MOMENT` (# Safety).
        unsafe {
            error = take_wide(s, groups, |group| &group.sums.error, at);
            if K::MOMENT {
                moment = take_wide(s, moments, |extras| &extras.moments.first_moment, at);
            }
        }
        if s.bits(moved) != 0 {
            for (i, &by) in rises.as_ref().iter().enumerate() {
                let (old, old_moment) = (sum.as_ref()[i], moment.as_ref()[i]);
                let scale = real::exp2(d, d.sub(nothing, by));
                if K::MOMENT {
                    // Where nothing is left of a sum, the distance may be infinite.
                    let gone = d.both(d.equal(scale, nothing), d.less(old, infinity));
                    let moved = d.mul(d.sub(old_moment, d.mul(by, old)), scale);
                    moment.as_mut()[i] = d.select(gone, nothing, moved);
                }
                let scaled = d.mul(old, scale);
                error.as_mut()[i] = d.mul(error.as_ref()[i], scale);
                sum.as_mut()[i] = d.select(d.equal(old, infinity), old, scaled);
            }
        }
    }

    let all = up_to::<S>(S::LANES);
    let by_exponent = s.bits(s.equal(logit, zero)) == all;
    let mut part = PartialSum::new(s);
    if W::WHOLE && !K::MOMENT && by_exponent && s.bits(finite) == all {
        // No lane needs more than a clamp from below.
        let exp = Exp2::<S, ByExponent>::lanes(s, logit, exponent);
        for c in 0..tile.classes {
            // SAFETY: `c` is a class of the tile, which has at most TILE_CLASSES (# Safety).
            let is_other = s.not_equal(unsafe { number(s, c) }, excluded);
            part.add(exp.value_where::<Unclamped>(load(c), is_other));
        }
    } else {
        let exp = Exp2::<S, ByLogit>::lanes(s, logit, exponent);
        for c in 0..tile.classes {
            // SAFETY: `c` is a class of the tile, which has at most TILE_CLASSES (# Safety).
            let (is_excluded, x) = (s.equal(unsafe { number(s, c) }, excluded), load(c));
            let e = s.select(is_excluded, zero, exp.value::<Clamped>(x));
            part.add(e);
            if K::MOMENT {
                let term = s.mul(e, exp.exponent(x));
                moment = zip_wide::<S>(moment, s.widen(term), |a, b| d.add(a, b));
            }
        }
    }
    let part = part.value();
    for (i, &part) in part.as_ref().iter().enumerate() {
        let (new, lost) = real::sum(d, sum.as_ref()[i], part);
        sum.as_mut()[i] = new;
        error.as_mut()[i] = d.add(error.as_ref()[i], lost);
    }
    // SAFETY: there are groups for whole registers, and moments if `K::MOMENT` (# Safety).
    unsafe {
        put(s, groups, |group| &mut group.inputs.x_y, at, s.widen(x_y));
        put(s, groups, |group| &mut group.sums.error, at, error);
        put(s, groups, |group| &mut group.sums.shift_exponent, at, s.widen(exponent));
        if had_logits || !by_exponent {
            put_shift_logits(s, groups, at, logit);
        }
        put(s, groups, |group| &mut group.sums.sum, at, sum);
        if K::MOMENT {
            put(s, moments, |extras| &mut extras.moments.first_moment, at, moment);
        }
    }
}

/// The largest logits of a tile's distributions, and their classes.
#[derive(Clone, Copy, Debug)]
#[repr(align(64))]
pub struct TileMaxima {
    /// The logit; NaN if there is one.
    pub value: TileNumbers,
    /// The class, counted from the tile's first.
    pub class: TileNumbers,
}

impl TileMaxima {
    /// The maxima of no classes.
    pub const EMPTY: TileMaxima = TileMaxima { value: [0.0; TILE], class: [0.0; TILE] };
}

/// Finds the largest logit of each distribution among the tile's classes.
///
/// # Safety
/// The tile is readable, and has at most TILE_CLASSES classes and TILE distributions; the processor has the set of `s`.
#[inline(always)]
pub unsafe fn argmax<S: Simd>(s: S, tile: &Tile, maxima: &mut TileMaxima) {
    let splat = |x: f64| s.splat(S::Real::from_f64(x));
    let none = splat(TILE_CLASSES as f64);
    for at in (0..tile.lanes).step_by(S::LANES) {
        let lanes = up_to::<S>(tile.lanes - at);
        let x = tile.x.cast::<S::Real>().wrapping_add(at);
        let (mut best, mut best_class, mut nan_class) =
            (s.splat(S::Real::NEG_INFINITY), splat(0.0), none);
        let mut class = splat(0.0);
        for c in 0..tile.classes {
            let p = x.wrapping_add(c * tile.pitch);
            // SAFETY: the mask has bits for distributions of the tile alone, which is readable (# Safety).
            let x = unsafe { s.load_lanes(p, lanes, S::Real::ZERO) };
            let better = s.less(best, x);
            best = s.select(better, x, best);
            best_class = s.select(better, class, best_class);
            nan_class = s.select(s.equal(x, x), nan_class, s.min(class, nan_class));
            class = s.add(class, splat(1.0));
        }
        let ordered = s.equal(nan_class, none);
        let value = s.select(ordered, best, splat(f64::NAN));
        let class = s.select(ordered, best_class, nan_class);
        for (to, from) in [(&mut maxima.value, value), (&mut maxima.class, class)] {
            for (i, &v) in s.widen(from).as_ref().iter().enumerate() {
                let at = at + i * <S::Wide as Simd>::LANES;
                // SAFETY: `at` is below TILE, a multiple of the lanes of every register.
                unsafe { s.wide().store(to.as_mut_ptr().add(at), v) };
            }
        }
    }
}

/// Masses in f64 of a tile's classes.
#[derive(Clone, Copy, Debug)]
pub struct Masses {
    /// Of each class, or of each class and distribution if `pitch` is not 0. Null for 1.
    pub data: *const f64,
    /// Numbers from class to class, if distributions have masses of their own.
    pub pitch: usize,
}

impl Masses {
    /// Every mass is 1.
    pub const ONE: Masses = Masses { data: std::ptr::null(), pitch: 0 };

    /// The masses of class `c` of the tile, for register `i` of f64 from distribution `at` on.
    ///
    /// # Safety
    /// There are masses for class `c` and whole registers, or one for the class, or none.
    #[inline(always)]
    pub unsafe fn load<S: Simd>(&self, s: S, c: usize, at: usize, i: usize) -> WideVector<S> {
        let d = s.wide();
        let at = at + i * <S::Wide as Simd>::LANES;
        // SAFETY: the masses that are read are those that there are (# Safety).
        unsafe {
            match (self.data.is_null(), self.pitch) {
                (true, _) => d.splat(1.0),
                (_, 0) => d.splat(*self.data.wrapping_add(c)),
                (_, pitch) => d.load(self.data.wrapping_add(c * pitch + at)),
            }
        }
    }
}

/// Adds `Σ m·(x - center)` over the tile's classes, but for the excluded ones; a term with m = 0 is 0.
///
/// # Safety
/// As [`sums`]; there are as many extras as groups, and masses for all classes and whole registers of
/// distributions.
#[inline(always)]
pub unsafe fn dots<S: Simd>(
    s: S,
    tile: &Tile,
    groups: &[RowGroup],
    extras: &mut [RowGroupExtras],
    masses: &Masses,
) {
    let d = s.wide();
    let zero = d.splat(0.0);
    for at in (0..tile.lanes).step_by(S::LANES) {
        let lanes = up_to::<S>(tile.lanes - at);
        // SAFETY: there are groups for whole registers (# Safety).
        let (center, excluded, mut dot, mut errors) = unsafe {
            (
                take_wide(s, extras, |extras| &extras.weighted.center, at),
                take_wide(s, groups, |group| &group.inputs.excluded, at),
                take_wide(s, extras, |extras| &extras.weighted.dot, at),
                take_wide(s, extras, |extras| &extras.weighted.error, at),
            )
        };
        for c in 0..tile.classes {
            let class = d.splat((tile.first + c) as f64);
            let p = tile.x.cast::<S::Real>().wrapping_add(c * tile.pitch + at);
            // SAFETY: the mask has bits for distributions of the tile alone, which is readable (# Safety).
            let x = s.widen(unsafe { s.load_lanes(p, lanes, S::Real::ZERO) });
            for (i, dot) in dot.as_mut().iter_mut().enumerate() {
                // SAFETY: there are masses for class `c` and whole registers (# Safety).
                let m = unsafe { masses.load(s, c, at, i) };
                let m = d.select(d.equal(class, excluded.as_ref()[i]), zero, m);
                let (x, center) = (x.as_ref()[i], center.as_ref()[i]);
                let (term, low) = real::scaled_difference(d, m, x, center);
                let (sum, error) = real::sum(d, *dot, term);
                // An infinite term has no error.
                let error = d.add(error, low);
                let finite = d.equal(d.mul(error, zero), zero);
                *dot = sum;
                let lost = &mut errors.as_mut()[i];
                *lost = d.add(*lost, d.keep(finite, error));
            }
        }
        // SAFETY: there are groups for whole registers (# Safety).
        unsafe {
            put(s, extras, |extras| &mut extras.weighted.dot, at, dot);
            put(s, extras, |extras| &mut extras.weighted.error, at, errors);
        }
    }
}
