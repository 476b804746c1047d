//! Rows side by side: lanes along rows or inner positions.
//!
//! For logits whose classes are not contiguous (`[N, C, d1..dk]`, a transposed matrix), and for
//! rows so short that lanes along classes would mostly be empty. Up to 64 positions make a *tile*.
//! Every lane keeps its own shift and sums, so nothing is ever added across lanes and a row's
//! bits do not depend on its neighbours:
//!
//! ```text
//! for each chunk of 32 classes, which stays in the L1 cache:
//!     for each register of positions:
//!         max over the classes                   first sweep
//!         shift = integer nearest to L·max, if that is above the old one
//!         sum += Σ 2^(L·x - shift)           second sweep; with what its roundings lose: so
//!                                                few terms would show every one, and so many
//!                                                one after the other would add theirs up
//! gradient: 2^(L·x - shift)·factor - bias, lane by lane
//! ```
//!
//! The target's class is left out of maximum and sums, as in contiguous.rs. Where positions lie
//! side by side in memory, in the lanes' own type, tiles are read and written where they are;
//! anything else (halves, logits to be scaled or capped, short rows, which are transposed) is
//! brought into a buffer of 32 classes first.

use super::Kernels;
use super::row_batch::{ExpScale, Kind, Totals};
use super::row_math::{Column, ROWS, RowGroup, is_far_below, job};
use super::row_state::{ArgMax, CompensatedSum};
use crate::element::Element;
use crate::math::exp2::{Base, Exp2};
use crate::math::real;
use crate::plan::{At, Layout, Plan, Run, TILE, Targets, View};
use crate::simd::{Real, Simd, WideVector, up_to};
use std::mem::MaybeUninit;
use std::ops::Range;

/// Classes of a chunk: 64 positions of them are 8 KiB of f32.
pub const CLASSES: usize = 32;

/// A number for each position of a tile.
pub type Numbers = [f64; TILE];

/// Some classes of up to 64 positions that lie side by side, in the lanes' own type.
#[derive(Clone, Copy, Debug)]
pub struct Tile {
    /// The first class of the first position.
    pub x: *mut u8,
    /// Elements from class to class.
    pub pitch: usize,
    /// Positions.
    pub lanes: usize,
    /// Which class the first is.
    pub first: usize,
    /// Classes.
    pub classes: usize,
}

/// Groups of a tile.
const OCTETS: usize = TILE / ROWS;

/// Lanes `at..at + LANES` of a column of the groups, as lanes.
///
/// # Safety
/// There are groups for the lanes; the processor has what `s` stands for. The same for all below.
#[inline(always)]
unsafe fn take<S: Simd>(
    s: S,
    groups: &[RowGroup],
    column: impl Fn(&RowGroup) -> &Column,
    at: usize,
) -> S::Vector {
    // SAFETY: the caller's promise.
    s.narrow(unsafe { take_wide(s, groups, column, at) })
}

/// # Safety
/// See [`take`].
#[inline(always)]
unsafe fn take_wide<S: Simd>(
    s: S,
    groups: &[RowGroup],
    column: impl Fn(&RowGroup) -> &Column,
    at: usize,
) -> S::Widened {
    let d = s.wide();
    let mut wide = s.widen(s.splat(S::Real::ZERO));
    for (i, v) in wide.as_mut().iter_mut().enumerate() {
        let at = at + i * <S::Wide as Simd>::LANES;
        // SAFETY: the caller's promise; a register of f64 never crosses an group.
        *v = unsafe { d.load(column(groups.get_unchecked(at / ROWS)).as_ptr().add(at % ROWS)) };
    }
    wide
}

/// # Safety
/// See [`take`].
#[inline(always)]
unsafe fn put<S: Simd>(
    s: S,
    groups: &mut [RowGroup],
    column: impl Fn(&mut RowGroup) -> &mut Column,
    at: usize,
    wide: S::Widened,
) {
    let d = s.wide();
    for (i, &v) in wide.as_ref().iter().enumerate() {
        let at = at + i * <S::Wide as Simd>::LANES;
        // SAFETY: the caller's promise; a register of f64 never crosses an group.
        unsafe {
            let column = column(groups.get_unchecked_mut(at / ROWS));
            d.store(column.as_mut_ptr().add(at % ROWS), v);
        }
    }
}

/// The excluded_classes of a register, counted from a tile's first class.
///
/// # Safety
/// See [`take`].
#[inline(always)]
unsafe fn excluded_classes<S: Simd>(
    s: S,
    groups: &[RowGroup],
    at: usize,
    tile: &Tile,
) -> S::Vector {
    let d = s.wide();
    let first = d.splat(tile.first as f64);
    // SAFETY: the caller's promise.
    let mut excluded_classes = unsafe { take_wide(s, groups, |o| &o.excluded, at) };
    excluded_classes.as_mut().iter_mut().for_each(|v| *v = d.sub(*v, first));
    s.narrow(excluded_classes)
}

/// `c` in every lane, for one of [`CLASSES`].
#[inline(always)]
fn number<S: Simd>(s: S, c: usize) -> S::Vector {
    const { assert!(S::Real::NUMBERS.len() == CLASSES) };
    debug_assert!(c < CLASSES);
    // SAFETY: a chunk has no more classes than there are numbers.
    s.splat(unsafe { *S::Real::NUMBERS.get_unchecked(c) })
}

/// A sum of a chunk's exponentials. Lanes of f64 have digits to spare; those of f32 carry along what
/// they lose: the sum starts at 2, more than any term, so that what an addition lost is exact
/// (Dekker's fast two-sum). Half as many instructions as adding them up in f64.
#[derive(Clone, Copy)]
struct Part<S: Simd> {
    s: S,
    sum: S::Vector,
    lost: S::Vector,
}

impl<S: Simd> Part<S> {
    const IS_WIDE: bool = S::LANES == <S::Wide as Simd>::LANES;
    const START: f64 = if Self::IS_WIDE { 0.0 } else { 2.0 };

    #[inline(always)]
    fn new(s: S) -> Self {
        Part { s, sum: s.splat(S::Real::from_f64(Self::START)), lost: s.splat(S::Real::ZERO) }
    }

    /// Adds a number below 2.
    #[inline(always)]
    fn add(&mut self, e: S::Vector) {
        let s = self.s;
        let sum = s.add(e, self.sum);
        if !Self::IS_WIDE {
            let error = s.sub(e, s.sub(sum, self.sum));
            self.lost = s.add(self.lost, error);
        }
        self.sum = sum;
    }

    /// In f64.
    #[inline(always)]
    fn value(self) -> S::Widened {
        let (s, d) = (self.s, self.s.wide());
        both::<S>(s.widen(self.sum), s.widen(self.lost), |sum, lost| {
            if Self::IS_WIDE {
                return sum;
            }
            let value = d.add(d.sub(sum, d.splat(Self::START)), lost);
            // Past an infinity what was lost is inf - inf.
            d.select(d.less(sum, d.splat(f64::INFINITY)), value, sum)
        })
    }
}

/// `f` of each register of two widened ones.
#[inline(always)]
fn both<S: Simd>(
    mut a: S::Widened,
    b: S::Widened,
    f: impl Fn(WideVector<S>, WideVector<S>) -> WideVector<S>,
) -> S::Widened {
    for (a, &b) in a.as_mut().iter_mut().zip(b.as_ref()) {
        *a = f(*a, b);
    }
    a
}

/// Adds a tile's classes to the sums of its rows, their first_moment too if `first_moments`, and finds the logits
/// of their excluded_classes.
///
/// # Safety
/// The tile is readable, and there are groups for whole registers; the processor has what `s`
/// stands for. The same for all below.
#[inline(always)]
pub unsafe fn sums<S: Simd<Real: Base>>(
    s: S,
    tile: &Tile,
    groups: &mut [RowGroup],
    first_moments: bool,
) {
    let mut at = 0;
    while at < tile.lanes {
        let left = tile.lanes - at;
        // SAFETY: registers of the tile.
        unsafe {
            if !first_moments && left >= ABREAST * S::LANES {
                register_sums::<S, false, true, ABREAST>(s, tile, groups, at);
                at += ABREAST * S::LANES;
                continue;
            }
            match (first_moments, left >= S::LANES) {
                (false, true) => register_sums::<S, false, true, 1>(s, tile, groups, at),
                (false, false) => register_sums::<S, false, false, 1>(s, tile, groups, at),
                (true, _) => register_sums::<S, true, false, 1>(s, tile, groups, at),
            }
        }
        at += S::LANES;
    }
}

/// Registers that are looked through together for their largest logits: a look is a chain of
/// dependent instructions, and what follows, up to the first exponential, waits for it.
const ABREAST: usize = 4;

/// # Safety
/// As [`sums`]; `at` is the first position of `N` registers. `WHOLE`: they are whole ones.
#[inline(always)]
unsafe fn register_sums<
    S: Simd<Real: Base>,
    const MOMENT: bool,
    const WHOLE: bool,
    const N: usize,
>(
    s: S,
    tile: &Tile,
    groups: &mut [RowGroup],
    at: usize,
) {
    let lowest = s.splat(S::Real::NEG_INFINITY);
    let (mut excluded, mut x_y, mut max) = ([lowest; N], [lowest; N], [lowest; N]);
    for i in 0..N {
        // SAFETY: there are groups for whole registers.
        unsafe {
            excluded[i] = excluded_classes(s, groups, at + i * S::LANES, tile);
            if tile.first > 0 {
                x_y[i] = take(s, groups, |o| &o.x_y, at + i * S::LANES);
            }
        }
    }
    for c in 0..tile.classes {
        for i in 0..N {
            let is_excluded = s.equal(number(s, c), excluded[i]);
            // SAFETY: positions of the tile.
            let x = unsafe { logits::<S, WHOLE>(s, tile, c, at + i * S::LANES) };
            x_y[i] = s.select(is_excluded, x, x_y[i]);
            // NaN loses.
            max[i] = s.select(is_excluded, max[i], s.max(x, max[i]));
        }
    }
    for i in 0..N {
        let look = Look { at: at + i * S::LANES, excluded: excluded[i], x_y: x_y[i], max: max[i] };
        // SAFETY: the caller's promise.
        unsafe { sums_after::<S, MOMENT, WHOLE>(s, tile, groups, look) };
    }
}

/// Positions `at..at + LANES` of class `c` of a tile, -inf where there are none.
///
/// # Safety
/// As [`sums`]. `WHOLE`: there are as many.
#[inline(always)]
unsafe fn logits<S: Simd, const WHOLE: bool>(s: S, tile: &Tile, c: usize, at: usize) -> S::Vector {
    let p = tile.x.cast::<S::Real>().wrapping_add(c * tile.pitch + at);
    // SAFETY: positions of the tile.
    unsafe {
        if WHOLE {
            s.load(p)
        } else {
            s.load_lanes(p, up_to::<S>(tile.lanes - at), S::Real::NEG_INFINITY)
        }
    }
}

/// What a look at the classes of a register has found.
struct Look<S: Simd> {
    /// Its first position.
    at: usize,
    /// The excluded_classes, counted from the tile's first class.
    excluded: S::Vector,
    /// Their logits, as shift_logit as they were seen.
    x_y: S::Vector,
    /// The largest of the other logits.
    max: S::Vector,
}

/// The second sweep.
///
/// # Safety
/// As [`register_sums`].
#[inline(always)]
unsafe fn sums_after<S: Simd<Real: Base>, const MOMENT: bool, const WHOLE: bool>(
    s: S,
    tile: &Tile,
    groups: &mut [RowGroup],
    Look { at, excluded, x_y, max }: Look<S>,
) {
    let d = s.wide();
    let splat = |x: f64| s.splat(S::Real::from_f64(x));
    // SAFETY: the caller's promise.
    let load = |c: usize| unsafe { logits::<S, WHOLE>(s, tile, c, at) };

    // The integer nearest to L·max, or else max itself; 0 if it is infinite.
    let zero = s.splat(S::Real::ZERO);
    let round = s.splat(S::Real::ROUND);
    let position = s.mul(max, s.splat(S::Real::L));
    let size = s.max(position, s.sub(zero, position));
    let shift_exponent = s.sub(s.add(position, round), round);
    let is_near = s.less(size, splat(S::Real::MAX_SHIFT));
    let finite = s.less(s.max(max, s.sub(zero, max)), splat(f64::INFINITY));
    let shift_exponent = s.select(is_near, shift_exponent, zero);
    let shift_logit = s.select(is_near, zero, s.select(finite, max, zero));

    let (mut shift_logit, mut shift_exponent) = (shift_logit, shift_exponent);
    let nothing = s.widen(zero);
    let (mut sum, mut lost, mut first_moment) = (nothing, nothing, nothing);
    if tile.first > 0 {
        // It replaces the old one if that is lower, or has no sum yet.
        // SAFETY: as above.
        let (old_far, old_near, old_sum) = unsafe {
            (
                take(s, groups, |o| &o.shift_logit, at),
                take(s, groups, |o| &o.shift_exponent, at),
                take_wide(s, groups, |o| &o.sum, at),
            )
        };
        let slope = d.splat(S::Real::L.to_f64());
        let (nothing, infinity) = (d.splat(0.0), d.splat(f64::INFINITY));
        let steps = both::<S>(s.widen(shift_exponent), s.widen(old_near), |a, b| d.sub(a, b));
        let jumps = both::<S>(s.widen(shift_logit), s.widen(old_far), |a, b| d.sub(a, b));
        let above = both::<S>(jumps, steps, |shift_logit, shift_exponent| {
            d.mul_add(shift_logit, slope, shift_exponent)
        });
        let rises = both::<S>(above, old_sum, |above, sum| {
            let higher = d.select(d.less(nothing, above), above, nothing);
            d.select(d.equal(sum, nothing), d.splat(1.0), higher)
        });
        // A chunk of nothing but -inf has none, and 0 may be above the old one.
        let rises = both::<S>(rises, s.widen(max), |rises, max| {
            d.select(d.less(d.splat(f64::NEG_INFINITY), max), rises, nothing)
        });
        let moved = s.less(zero, s.narrow(rises));
        (shift_logit, shift_exponent) =
            (s.select(moved, shift_logit, old_far), s.select(moved, shift_exponent, old_near));
        // SAFETY: as above.
        unsafe {
            sum = old_sum;
            lost = take_wide(s, groups, |o| &o.lost, at);
            first_moment = take_wide(s, groups, |o| &o.first_moment, at);
        }
        if s.bits(moved) != 0 {
            for (i, &by) in rises.as_ref().iter().enumerate() {
                let (old, old_moment) = (sum.as_ref()[i], first_moment.as_ref()[i]);
                let scale = real::exp2(d, d.sub(nothing, by));
                first_moment.as_mut()[i] = d.mul(d.sub(old_moment, d.mul(by, old)), scale);
                let scaled = d.mul(old, scale);
                lost.as_mut()[i] = d.mul(lost.as_ref()[i], scale);
                sum.as_mut()[i] = d.select(d.equal(old, infinity), old, scaled);
            }
        }
    }

    // No lane needs more than a clamp from below.
    let ordinary = WHOLE && s.bits(finite) == up_to::<S>(S::LANES);
    let exp = Exp2::<S, true>::lanes(s, shift_logit, shift_exponent);
    let mut part = Part::new(s);
    for c in 0..tile.classes {
        let (is_excluded, x) = (s.equal(number(s, c), excluded), load(c));
        if ordinary && !MOMENT {
            part.add(exp.value_below(x, is_excluded));
            continue;
        }
        let e = s.select(is_excluded, zero, exp.value::<true>(x));
        part.add(e);
        if MOMENT {
            let hot = s.mul(e, exp.exponent(x));
            first_moment = both::<S>(first_moment, s.widen(hot), |a, b| d.add(a, b));
        }
    }
    let part = part.value();
    for (i, &part) in part.as_ref().iter().enumerate() {
        let (new, error) = real::sum(d, sum.as_ref()[i], part);
        sum.as_mut()[i] = new;
        lost.as_mut()[i] = d.add(lost.as_ref()[i], error);
    }
    // SAFETY: as above.
    unsafe {
        put(s, groups, |o| &mut o.x_y, at, s.widen(x_y));
        put(s, groups, |o| &mut o.lost, at, lost);
        put(s, groups, |o| &mut o.shift_logit, at, s.widen(shift_logit));
        put(s, groups, |o| &mut o.shift_exponent, at, s.widen(shift_exponent));
        put(s, groups, |o| &mut o.sum, at, sum);
        if MOMENT {
            put(s, groups, |o| &mut o.first_moment, at, first_moment);
        }
    }
}

/// Finds the largest logit of each row among the tile's classes.
///
/// # Safety
/// See [`sums`].
#[inline(always)]
pub unsafe fn argmax<S: Simd>(s: S, tile: &Tile, groups: &mut [RowGroup]) {
    let splat = |x: f64| s.splat(S::Real::from_f64(x));
    let none = splat(CLASSES as f64);
    for at in (0..tile.lanes).step_by(S::LANES) {
        let lanes = up_to::<S>(tile.lanes - at);
        let x = tile.x.cast::<S::Real>().wrapping_add(at);
        let (mut best, mut best_class, mut nan_class) =
            (s.splat(S::Real::NEG_INFINITY), splat(0.0), none);
        let mut class = splat(0.0);
        for c in 0..tile.classes {
            let p = x.wrapping_add(c * tile.pitch);
            // SAFETY: positions of the tile.
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
        // SAFETY: there are groups for whole registers.
        unsafe {
            put(s, groups, |o| &mut o.top, at, s.widen(value));
            put(s, groups, |o| &mut o.top_class, at, s.widen(class));
        }
    }
}

/// Masses in f64 of a tile's classes.
#[derive(Clone, Copy, Debug)]
pub struct Masses {
    /// Of each class, or of each class and position if `pitch` is not 0. Null for 1.
    pub data: *const f64,
    /// How shift_logit apart classes are then.
    pub pitch: usize,
}

impl Masses {
    /// Those of class `c` of the tile, for register `i` of f64 from position `at` on.
    ///
    /// # Safety
    /// There are masses for whole registers, or one for the class, or none.
    #[inline(always)]
    unsafe fn load<S: Simd>(&self, s: S, c: usize, at: usize, i: usize) -> WideVector<S> {
        let d = s.wide();
        let at = at + i * <S::Wide as Simd>::LANES;
        // SAFETY: the caller's promise.
        unsafe {
            match (self.data.is_null(), self.pitch) {
                (true, _) => d.splat(1.0),
                (_, 0) => d.splat(*self.data.wrapping_add(c)),
                (_, pitch) => d.load(self.data.wrapping_add(c * pitch + at)),
            }
        }
    }
}

/// What the gradient of a tile is made of, beside the columns of its groups.
#[derive(Clone, Copy, Debug)]
pub struct TileGradient {
    /// Where it goes, in the lanes' own type.
    pub g: *mut u8,
    /// Elements from class to class.
    pub pitch: usize,
    /// Add to what is there.
    pub accumulate: bool,
    /// What is computed from the logits.
    pub kind: Kind,
    /// What is subtracted, once multiplied by the bias.
    pub masses: Masses,
    /// Some row's factor is in two parts, some row's scale is not 1, some row is filled.
    pub extreme: bool,
    /// See `extreme`.
    pub scales: bool,
    /// See `extreme`.
    pub fills: bool,
    /// What the difference is multiplied by then, laid out as the tile; null for 1.
    pub slope: *const u8,
    /// No exponent is beyond that of the row's largest logit, but for the excluded's and those of rows
    /// that are filled: shifts are the rows' own, not those of an lse from elsewhere.
    pub bounded: bool,
    /// One bit for each position that is written at all.
    pub writes: u64,
}

/// Writes the gradient of a tile, or adds it to what is there.
///
/// # Safety
/// See [`sums`]; masses, slopes and the gradient are there for all classes and positions.
#[inline(always)]
pub unsafe fn gradient<S: Simd<Real: Base>>(
    s: S,
    tile: &Tile,
    groups: &[RowGroup],
    gradient: &TileGradient,
) {
    let zero = s.splat(S::Real::ZERO);
    let d = s.wide();
    let (l, inverse) = (d.splat(S::Real::L.to_f64()), d.splat(S::Real::INVERSE.0));
    for at in (0..tile.lanes).step_by(S::LANES) {
        let lanes = up_to::<S>(tile.lanes - at);
        let writes = (gradient.writes >> at) as u32 & lanes;
        if writes == 0 {
            continue;
        }
        let whole = writes == up_to::<S>(S::LANES);
        // SAFETY: there are groups for whole registers.
        let (shift_logit, shift_exponent, factor, wide_bias, entry, excluded) = unsafe {
            (
                take_wide(s, groups, |o| &o.shift_logit, at),
                take_wide(s, groups, |o| &o.shift_exponent, at),
                take_wide(s, groups, |o| &o.factor, at),
                take_wide(s, groups, |o| &o.bias, at),
                take(s, groups, |o| &o.entry, at),
                excluded_classes(s, groups, at, tile),
            )
        };
        let exp = Exp2::<S, true>::lanes(s, s.narrow(shift_logit), s.narrow(shift_exponent));
        let (after, bias) = (s.narrow(factor), s.narrow(wide_bias));
        let minus_bias = s.sub(zero, bias);
        let bounded = gradient.bounded
            && s.bits(s.equal(s.narrow(shift_logit), zero)) == up_to::<S>(S::LANES);
        for c in 0..tile.classes {
            let is_excluded = s.equal(number(s, c), excluded);
            let p = tile.x.cast::<S::Real>().wrapping_add(c * tile.pitch + at);
            let g = gradient.g.cast::<S::Real>().wrapping_add(c * gradient.pitch + at);
            // SAFETY: positions of the tile.
            let x =
                unsafe { if whole { s.load(p) } else { s.load_lanes(p, lanes, S::Real::ZERO) } };
            let mut minus = minus_bias;
            if !gradient.masses.data.is_null() {
                let mut v = wide_bias;
                for (i, v) in v.as_mut().iter_mut().enumerate() {
                    // SAFETY: the caller's promise.
                    let m = unsafe { gradient.masses.load(s, c, at, i) };
                    // Either may be infinite, beside a factor of 0.
                    let zero = d.splat(0.0);
                    let absent = d.either(d.equal(m, zero), d.equal(*v, zero));
                    *v = d.select(absent, zero, d.mul(*v, m));
                }
                minus = s.sub(zero, s.narrow(v));
            }
            let mut v = match gradient.kind {
                Kind::Exponentials => {
                    let mut e = match bounded {
                        true => exp.value_below(x, is_excluded),
                        false => exp.value::<true>(x),
                    };
                    if gradient.extreme {
                        // SAFETY: as above.
                        e = s.mul(e, unsafe { take(s, groups, |o| &o.before, at) });
                    }
                    s.mul_add(e, after, minus)
                }
                Kind::BaseE => {
                    let mut e = exp.base_e(x);
                    if gradient.extreme {
                        // SAFETY: as above.
                        e = s.mul(e, unsafe { take(s, groups, |o| &o.before, at) });
                    }
                    s.mul(e, after)
                }
                Kind::Nothing => minus,
                Kind::Logs => {
                    let above =
                        both::<S>(s.widen(x), shift_logit, |x, shift_logit| d.sub(x, shift_logit));
                    let above = both::<S>(above, shift_exponent, |x, shift_exponent| {
                        d.mul_sub_exact(x, l, shift_exponent)
                    });
                    s.narrow(both::<S>(above, factor, |x, rise| d.sub(d.mul(x, inverse), rise)))
                }
            };
            if gradient.scales {
                // SAFETY: as above.
                v = s.mul(v, unsafe { take(s, groups, |o| &o.scale, at) });
            }
            if !gradient.slope.is_null() {
                let slope = gradient.slope.cast::<S::Real>();
                // SAFETY: laid out as the tile.
                v = s.mul(v, unsafe {
                    s.load_lanes(slope.wrapping_add(c * tile.pitch + at), lanes, S::Real::ZERO)
                });
            }
            if gradient.fills {
                // SAFETY: as above.
                unsafe {
                    let sweeps = s.equal(
                        take(s, groups, |o| &o.job, at),
                        s.splat(S::Real::from_f64(job::SWEEP)),
                    );
                    v = s.select(sweeps, v, take(s, groups, |o| &o.fill, at));
                }
            }
            v = s.select(is_excluded, entry, v);
            // SAFETY: positions of the gradient.
            unsafe {
                if gradient.accumulate {
                    v = s.add(s.load_lanes(g, writes, S::Real::ZERO), v);
                }
                if whole {
                    s.store(g, v);
                } else {
                    s.store_lanes(g, writes, v);
                }
            }
        }
    }
}

/// Brings logits of type `E` into a tile: those of a position are `strides[1]` elements apart, and
/// the positions `strides[0]`.
///
/// # Safety
/// The logits are readable, the tile is writable and apart from them.
#[inline(always)]
pub unsafe fn gather<S: Simd, E: Element<S>>(
    s: S,
    tile: &Tile,
    from: *const u8,
    [step, pitch]: [isize; 2],
) {
    let (from, to) = (from.cast::<E>(), tile.x.cast::<S::Real>());
    if step == 1 {
        for c in 0..tile.classes {
            for at in (0..tile.lanes).step_by(S::LANES) {
                let lanes = up_to::<S>(tile.lanes - at);
                let p = from.wrapping_offset(c as isize * pitch).wrapping_add(at);
                // SAFETY: positions of the tile.
                unsafe {
                    let v = E::load_lanes(s, p, lanes, S::Real::ZERO);
                    s.store_lanes(to.wrapping_add(c * tile.pitch + at), lanes, v);
                }
            }
        }
        return;
    }
    let chunk = size_of::<S::Rows>() / size_of::<S::Vector>();
    let mut first = 0;
    if pitch == 1 && tile.classes >= chunk {
        first = tile.lanes - tile.lanes % S::LANES;
        let mut buffer = MaybeUninit::<[S::Real; CLASSES * TILE]>::uninit();
        let (mut rows, mut apart) = (from.cast::<S::Real>(), step);
        if !E::EXACT {
            let to = buffer.as_mut_ptr().cast::<S::Real>();
            (rows, apart) = (to, tile.classes as isize);
            // Rows without gaps are one run.
            let (count, len) =
                if step == apart { (1, first * tile.classes) } else { (first, tile.classes) };
            for row in 0..count {
                for at in (0..len).step_by(S::LANES) {
                    let lanes = up_to::<S>(len - at);
                    let p = from.wrapping_offset(row as isize * step).wrapping_add(at);
                    // SAFETY: classes of rows of the tile; the buffer has room for them.
                    unsafe {
                        let v = E::load_lanes(s, p, lanes, S::Real::ZERO);
                        s.store_lanes(to.wrapping_add(row * len + at), lanes, v);
                    }
                }
            }
        }
        for at in (0..first).step_by(S::LANES) {
            for c in (0..tile.classes).step_by(chunk) {
                // The last chunk may overlap the one before.
                let c = c.min(tile.classes - chunk);
                let p = rows.wrapping_offset(at as isize * apart).wrapping_add(c);
                // SAFETY: classes of rows of the tile.
                unsafe {
                    for (i, &v) in s.load_rows(p, apart).as_ref().iter().enumerate() {
                        s.store(to.wrapping_add((c + i) * tile.pitch + at), v);
                    }
                }
            }
        }
    }
    for lane in first..tile.lanes {
        let p = from.wrapping_offset(lane as isize * step);
        for c in 0..tile.classes {
            // SAFETY: positions of the tile.
            unsafe {
                let x = (*p.wrapping_offset(c as isize * pitch)).to_f64();
                *to.wrapping_add(c * tile.pitch + lane) = S::Real::from_f64(x);
            }
        }
    }
}

/// Takes a tile to a gradient of type `G`, as [`gather`] brings it, or adds it to that; positions
/// without a bit in `writes` are left alone.
///
/// # Safety
/// As [`gather`], with the roles exchanged.
#[inline(always)]
pub unsafe fn scatter<S: Simd, G: Element<S>>(
    s: S,
    tile: &Tile,
    to: *mut u8,
    [step, pitch]: [isize; 2],
    accumulate: bool,
    writes: u64,
) {
    let (from, to) = (tile.x.cast::<S::Real>(), to.cast::<G>());
    if step == 1 {
        for c in 0..tile.classes {
            for at in (0..tile.lanes).step_by(S::LANES) {
                let lanes = (writes >> at) as u32 & up_to::<S>(tile.lanes - at);
                let p = to.wrapping_offset(c as isize * pitch).wrapping_add(at);
                // SAFETY: positions of the tile.
                unsafe {
                    let from = from.wrapping_add(c * tile.pitch + at);
                    let mut v = s.load_lanes(from, lanes, S::Real::ZERO);
                    if accumulate {
                        v = s.add(G::load_lanes(s, p, lanes, S::Real::ZERO), v);
                    }
                    G::store_lanes(s, p, lanes, v);
                }
            }
        }
        return;
    }
    let chunk = size_of::<S::Rows>() / size_of::<S::Vector>();
    let mut first = 0;
    let all = writes.trailing_ones() as usize >= tile.lanes;
    if pitch == 1 && tile.classes >= chunk && all && !accumulate {
        first = tile.lanes - tile.lanes % S::LANES;
        let mut buffer = MaybeUninit::<[S::Real; CLASSES * TILE]>::uninit();
        let (mut rows, mut apart) = (to.cast::<S::Real>(), step);
        if !G::EXACT {
            (rows, apart) = (buffer.as_mut_ptr().cast::<S::Real>(), tile.classes as isize);
        }
        for at in (0..first).step_by(S::LANES) {
            for c in (0..tile.classes).step_by(chunk) {
                // The last chunk may overlap the one before.
                let c = c.min(tile.classes - chunk);
                let p = rows.wrapping_offset(at as isize * apart).wrapping_add(c);
                // SAFETY: classes of rows of the tile, or of the buffer, which has room for them.
                unsafe {
                    let mut v = s.load_rows(p, 0);
                    for (i, v) in v.as_mut().iter_mut().enumerate() {
                        *v = s.load(from.wrapping_add((c + i) * tile.pitch + at));
                    }
                    s.store_rows(p, apart, v);
                }
            }
        }
        if !G::EXACT {
            // Rows without gaps are one run.
            let (count, len) =
                if step == apart { (1, first * tile.classes) } else { (first, tile.classes) };
            for row in 0..count {
                for at in (0..len).step_by(S::LANES) {
                    let lanes = up_to::<S>(len - at);
                    let p = to.wrapping_offset(row as isize * step).wrapping_add(at);
                    // SAFETY: classes of rows of the gradient, which the buffer has.
                    unsafe {
                        let from = rows.wrapping_add(row * len + at);
                        G::store_lanes(s, p, lanes, s.load_lanes(from, lanes, S::Real::ZERO));
                    }
                }
            }
        }
    }
    for lane in (first..tile.lanes).filter(|lane| writes >> lane & 1 == 1) {
        let p = to.wrapping_offset(lane as isize * step);
        for c in 0..tile.classes {
            let p = p.wrapping_offset(c as isize * pitch);
            // SAFETY: positions of the tile.
            unsafe {
                let mut v = (*from.wrapping_add(c * tile.pitch + lane)).to_f64();
                if accumulate {
                    v = S::Real::from_f64((*p).to_f64() + v).to_f64();
                }
                *p = G::from_f64(v);
            }
        }
    }
}

/// Adds `Σ m·(x - center)` over the tile's classes, but for the excluded_classes; terms with m = 0 are 0.
///
/// # Safety
/// See [`sums`]; there are masses for all classes and positions.
#[inline(always)]
pub unsafe fn dots<S: Simd>(s: S, tile: &Tile, groups: &mut [RowGroup], masses: &Masses) {
    let d = s.wide();
    let zero = d.splat(0.0);
    for at in (0..tile.lanes).step_by(S::LANES) {
        let lanes = up_to::<S>(tile.lanes - at);
        // SAFETY: there are groups for whole registers.
        let (center, excluded, mut dot, mut lost) = unsafe {
            (
                take_wide(s, groups, |o| &o.center, at),
                take_wide(s, groups, |o| &o.excluded, at),
                take_wide(s, groups, |o| &o.dot, at),
                take_wide(s, groups, |o| &o.dot_lost, at),
            )
        };
        for c in 0..tile.classes {
            let class = d.splat((tile.first + c) as f64);
            let p = tile.x.cast::<S::Real>().wrapping_add(c * tile.pitch + at);
            // SAFETY: positions of the tile.
            let x = s.widen(unsafe { s.load_lanes(p, lanes, S::Real::ZERO) });
            for (i, dot) in dot.as_mut().iter_mut().enumerate() {
                // SAFETY: the caller's promise.
                let m = unsafe { masses.load(s, c, at, i) };
                let m = d.select(d.equal(class, excluded.as_ref()[i]), zero, m);
                let nothing = d.equal(m, zero);
                let (x, center) = (x.as_ref()[i], center.as_ref()[i]);
                let (height, low) = real::difference(d, x, center);
                let term = d.select(nothing, zero, d.mul(m, height));
                let low = d.mul_add(m, low, d.mul_sub_exact(m, height, term));
                let (sum, error) = real::sum(d, *dot, term);
                // What is infinite loses nothing.
                let error = d.add(error, d.select(nothing, zero, low));
                let finite = d.equal(d.mul(error, zero), zero);
                *dot = sum;
                let lost = &mut lost.as_mut()[i];
                *lost = d.add(*lost, d.select(finite, error, zero));
            }
        }
        // SAFETY: as above.
        unsafe {
            put(s, groups, |o| &mut o.dot, at, dot);
            put(s, groups, |o| &mut o.dot_lost, at, lost);
        }
    }
}

/// Room for numbers of the lanes' type for all positions of all classes of a chunk.
#[repr(align(64))]
struct Buffer(MaybeUninit<[f64; CLASSES * TILE]>);

impl Buffer {
    #[inline(always)]
    fn new() -> Self {
        Buffer(MaybeUninit::uninit())
    }

    fn start(&mut self) -> *mut u8 {
        self.0.as_mut_ptr().cast()
    }
}

/// Bytes of logits that are held from the first sweep to the second: 128 classes of f32.
const HELD: usize = 32 * 1024;

/// What does not stay where it is.
struct Buffers {
    x: MaybeUninit<[Buffer; HELD / size_of::<Buffer>()]>,
    slope: Buffer,
    g: Buffer,
    mass: MaybeUninit<[f64; CLASSES * TILE]>,
}

impl Buffers {
    /// Whether the plan's tiles are read and written where they are, with nothing beside them.
    fn are_idle(plan: &Plan, axis: usize) -> bool {
        let one = extent(plan, axis).0 == 1;
        let stays = |view: &View| (view.strides[axis] == 1 || one) && view.dtype.is_exact();
        let gradient = plan.gradient.as_ref().is_none_or(|gradient| stays(&gradient.view));
        stays(&plan.logits) && gradient && plan.transform.is_none() && !plan.has_masses()
    }
}

/// A tile's place in the problem.
#[derive(Clone, Copy)]
struct Place {
    axis: usize,
    first: At,
    lanes: usize,
}

impl Place {
    fn new(plan: &Plan, axis: usize, index: usize) -> Self {
        let (long, per) = extent(plan, axis);
        let (outer, start) = (index / per, index % per * TILE);
        let first = match axis {
            0 => At { row: start, inner: outer },
            _ => At { row: outer, inner: start },
        };
        Place { axis, first, lanes: TILE.min(long - start) }
    }

    fn at(&self, lane: usize) -> At {
        Run { first: self.first, axis: self.axis, len: TILE }.at(lane)
    }

    /// The rows of group `i`.
    fn run(&self, i: usize) -> Run {
        let len = ROWS.min(self.lanes - i * ROWS);
        Run { first: self.at(i * ROWS), axis: self.axis, len }
    }
}

/// Positions along the axis, and the tiles that they make.
fn extent(plan: &Plan, axis: usize) -> (usize, usize) {
    let long = if axis == 0 { plan.rows } else { plan.inner };
    (long, long.div_ceil(TILE).max(1))
}

/// Tiles of the plan.
pub fn count(plan: &Plan) -> usize {
    match plan.layout {
        Layout::Positions { axis } => {
            let (long, per) = extent(plan, axis);
            plan.distributions().checked_div(long).unwrap_or(0) * per
        }
        Layout::Classes => 0,
    }
}

/// What the sweeps over tiles work with.
struct Work<'a> {
    k: &'a Kernels,
    plan: &'a Plan,
    place: Place,
    /// None where they [are idle](Buffers::are_idle).
    buffers: Option<&'a mut Buffers>,
}

impl Work<'_> {
    fn buffers(&mut self) -> &mut Buffers {
        self.buffers.as_mut().expect("buffers where tiles do not stay where they are")
    }

    /// Bytes of a class in the buffers.
    fn pitch(&self) -> usize {
        TILE * if self.plan.logits.dtype.has_short_lanes() { 4 } else { 8 }
    }

    /// Whether there is room for all classes side by side, and for what belongs to them; and use.
    fn holds(&self) -> bool {
        let alone = self.plan.transform.is_some() || self.plan.gradient.is_none();
        self.plan.classes <= if alone { CLASSES } else { HELD / self.pitch() }
    }

    /// The tile's classes from `first` on, as stored but in the lanes' own type; `seen`: and in the
    /// buffer already, if they go there.
    ///
    /// # Safety
    /// The plan has the tile and the classes; so for all below.
    unsafe fn stored(&mut self, first: usize, seen: bool) -> Tile {
        let (plan, lanes) = (self.plan, self.place.lanes);
        let classes = CLASSES.min(plan.classes - first);
        let view = &plan.logits;
        let strides = [view.strides[self.place.axis], view.strides[1]];
        // SAFETY: the caller's promise.
        let from = unsafe { view.at(self.place.first, first) };
        if (strides[0] == 1 || lanes == 1) && plan.transform.is_none() && view.dtype.is_exact() {
            return Tile { x: from, pitch: strides[1] as usize, lanes, first, classes };
        }
        let at = if self.holds() { first * self.pitch() } else { 0 };
        let x = self.buffers().x.as_mut_ptr().cast::<u8>().wrapping_add(at);
        let tile = Tile { x, pitch: TILE, lanes, first, classes };
        if !seen {
            // SAFETY: as above; the buffer has room for a chunk of a tile, or for all that it holds.
            unsafe { (self.k.stored.gather)(&tile, from, strides) };
        }
        tile
    }

    /// Scales and caps a tile, with the slopes beside it.
    ///
    /// # Safety
    /// The tile is in the buffer.
    unsafe fn transform(&mut self, tile: &Tile) {
        let Some(with) = &self.plan.transform else { return };
        for c in 0..tile.classes {
            let at = c * self.pitch();
            // SAFETY: both buffers have room for a chunk of a tile.
            unsafe {
                let (x, slope) = (tile.x.add(at), self.buffers().slope.start().add(at));
                (self.k.lanes.transform)(x, tile.lanes, with, slope);
            }
        }
    }

    /// Masses of a tile, and adds up those of probability targets.
    ///
    /// # Safety
    /// See [`stored`](Self::stored).
    unsafe fn masses(&mut self, tile: &Tile, total: Option<&mut [CompensatedSum; TILE]>) -> Masses {
        if !self.plan.has_masses() {
            return Masses { data: std::ptr::null(), pitch: 0 };
        }
        let to = self.buffers().mass.as_mut_ptr().cast::<f64>();
        let mut row = [0.0; CLASSES];
        let row = &mut row[..tile.classes];
        match &self.plan.targets {
            Targets::Probabilities(_) => {
                let mut none = [CompensatedSum::NONE; TILE];
                let total = total.unwrap_or(&mut none);
                // Lanes that no position has are read with the others.
                // SAFETY: within the buffer, here and below.
                unsafe { to.write_bytes(0, tile.classes * TILE) };
                for (lane, total) in total[..tile.lanes].iter_mut().enumerate() {
                    // SAFETY: the caller's promise.
                    unsafe { self.plan.mass(self.place.at(lane), tile.first, row) };
                    for (c, &m) in row.iter().enumerate() {
                        // SAFETY: see above.
                        unsafe { to.add(c * TILE + lane).write(m) };
                        total.add(m);
                    }
                }
                Masses { data: to, pitch: TILE }
            }
            _ => {
                // SAFETY: the caller's promise; the buffer is longer.
                unsafe {
                    self.plan.mass(self.place.first, tile.first, row);
                    to.copy_from_nonoverlapping(row.as_ptr(), row.len());
                }
                Masses { data: to, pitch: 0 }
            }
        }
    }

    /// The largest logits of the rows.
    ///
    /// # Safety
    /// See [`stored`](Self::stored).
    unsafe fn tops(&mut self, groups: &mut [RowGroup], tops: &mut [ArgMax; TILE]) {
        for first in (0..self.plan.classes).step_by(CLASSES) {
            // SAFETY: the caller's promise.
            unsafe {
                let tile = self.stored(first, false);
                (self.k.lanes.argmax)(&tile, groups);
            }
            for (lane, top) in tops[..self.place.lanes].iter_mut().enumerate() {
                let group = &groups[lane / ROWS];
                let class = first + group.top_class[lane % ROWS] as usize;
                top.push(ArgMax { value: group.top[lane % ROWS], class });
            }
        }
        for (lane, top) in tops[..self.place.lanes].iter().enumerate() {
            groups[lane / ROWS].argmax[lane % ROWS] = top.class;
        }
    }

    /// The first sweep: adds up what the rows need.
    ///
    /// # Safety
    /// See [`stored`](Self::stored).
    unsafe fn sum(&mut self, groups: &mut [RowGroup], softmax: bool) {
        let plan = self.plan;
        let mut dots = None;
        if plan.spreads_mass() {
            dots = Some(Dots::start(plan, groups, self.place.lanes));
        }
        for first in (0..plan.classes).step_by(CLASSES) {
            // SAFETY: the caller's promise.
            unsafe {
                let tile = self.stored(first, false);
                self.transform(&tile);
                if softmax {
                    (self.k.lanes.sums)(&tile, groups, plan.entropy.is_some());
                }
                if let Some(dots) = &mut dots {
                    if first == 0 && !plan.log_probs {
                        dots.center(plan, groups);
                    }
                    let masses = self.masses(&tile, Some(&mut dots.mass));
                    (self.k.lanes.dots)(&tile, groups, &masses);
                }
            }
        }
        if let Some(dots) = dots {
            for (lane, mass) in dots.mass[..self.place.lanes].iter().enumerate() {
                groups[lane / ROWS].mass[lane % ROWS] = mass.value();
            }
        }
    }

    /// The second sweep: writes the gradients. `seen`: the first one went before, and what it left in
    /// the buffers is still there where they hold all classes.
    ///
    /// # Safety
    /// See [`stored`](Self::stored).
    unsafe fn write(&mut self, groups: &mut [RowGroup], seen: bool) {
        let plan = self.plan;
        let Some(output) = &plan.gradient else { return };
        let mut gradient = TileGradient {
            g: std::ptr::null_mut(),
            pitch: 0,
            accumulate: output.accumulate,
            kind: Kind::of(plan),
            masses: Masses { data: std::ptr::null(), pitch: 0 },
            extreme: false,
            scales: false,
            fills: false,
            slope: std::ptr::null(),
            bounded: !plan.is_from_lse(),
            writes: 0,
        };
        let lanes = self.place.lanes;
        let used = lanes.div_ceil(ROWS);
        for (i, group) in groups[..used].iter_mut().enumerate() {
            gradient.scales |= group.scales;
            gradient.fills |= group.job != [job::SWEEP; ROWS];
            for (lane, &job) in group.job.iter().enumerate() {
                gradient.writes |= u64::from(job != job::NOTHING) << (i * ROWS + lane);
            }
            if group.extreme {
                gradient.extreme = true;
                for (before, factor) in group.before.iter_mut().zip(&mut group.factor) {
                    (*before, *factor) = ExpScale::split(*factor);
                }
            }
        }
        gradient.writes &= !0 >> (TILE - lanes);
        if gradient.writes == 0 {
            return;
        }
        let seen = seen && self.holds();
        let view = &output.view;
        let strides = [view.strides[self.place.axis], view.strides[1]];
        let direct = (strides[0] == 1 || lanes == 1) && view.dtype.is_exact();
        if plan.transform.as_ref().is_some_and(|with| with.cap > 0.0) {
            gradient.slope = self.buffers().slope.start();
        }
        for first in (0..plan.classes).step_by(CLASSES) {
            // SAFETY: the caller's promise.
            unsafe {
                let tile = self.stored(first, seen);
                if !seen {
                    self.transform(&tile);
                }
                gradient.masses = self.masses(&tile, None);
                let to = view.at(self.place.first, first);
                if direct {
                    (gradient.g, gradient.pitch) = (to, strides[1] as usize);
                    (self.k.lanes.gradient)(&tile, groups, &gradient);
                    continue;
                }
                gradient.accumulate = false;
                (gradient.g, gradient.pitch) = (self.buffers().g.start(), TILE);
                (self.k.lanes.gradient)(&tile, groups, &gradient);
                let from = Tile { x: gradient.g, pitch: TILE, ..tile };
                let accumulate = output.accumulate;
                (self.k.converted.scatter)(&from, to, strides, accumulate, gradient.writes);
            }
        }
    }
}

/// What the rows of a tile need to sum up products with masses.
struct Dots {
    lanes: usize,
    mass: [CompensatedSum; TILE],
    /// Rows whose center is not the logit of their excluded but has yet to be found.
    pending: [bool; TILE],
}

impl Dots {
    #[cold]
    fn start(plan: &Plan, groups: &mut [RowGroup], lanes: usize) -> Self {
        let mut pending = [false; TILE];
        for (lane, pending) in pending[..lanes].iter_mut().enumerate() {
            let (group, i) = (&mut groups[lane / ROWS], lane % ROWS);
            group.center[i] = group.center(plan, i, 0.0, None);
            *pending = group.class(i).is_none() || group.center[i] != group.x_y[i];
        }
        Dots { lanes, mass: [CompensatedSum::NONE; TILE], pending }
    }

    /// Moves centers to where the first classes are.
    #[cold]
    fn center(&self, plan: &Plan, groups: &mut [RowGroup]) {
        for (lane, pending) in self.pending[..self.lanes].iter().enumerate() {
            let (group, i) = (&mut groups[lane / ROWS], lane % ROWS);
            let start = group.shift_logit[i] + group.shift_exponent[i] / plan.l;
            let others = group.sum[i] != 0.0;
            if *pending || others && is_far_below(group.center[i], start) {
                group.center[i] = start;
            }
        }
    }
}

/// Tiles `range` of the plan; returns the sums over their rows.
///
/// # Safety
/// `range` is within [`count`]; no other thread is in these tiles.
pub unsafe fn tiles(k: &Kernels, plan: &Plan, range: Range<usize>) -> Totals {
    let Layout::Positions { axis } = plan.layout else { return Totals::NONE };
    // SAFETY: the caller's promise.
    unsafe {
        if Buffers::are_idle(plan, axis) {
            tiles_with(k, plan, axis, range, None)
        } else {
            buffered_tiles(k, plan, axis, range)
        }
    }
}

/// Apart, for its buffers: a frame of 64 KiB is probed page by page wherever it is set up.
///
/// # Safety
/// As [`tiles`].
#[inline(never)]
unsafe fn buffered_tiles(k: &Kernels, plan: &Plan, axis: usize, range: Range<usize>) -> Totals {
    let (slope, g) = (Buffer::new(), Buffer::new());
    let (x, mass) = (MaybeUninit::uninit(), MaybeUninit::uninit());
    let mut buffers = Buffers { x, slope, g, mass };
    // SAFETY: the caller's promise.
    unsafe { tiles_with(k, plan, axis, range, Some(&mut buffers)) }
}

/// # Safety
/// As [`tiles`].
unsafe fn tiles_with(
    k: &Kernels,
    plan: &Plan,
    axis: usize,
    range: Range<usize>,
    buffers: Option<&mut Buffers>,
) -> Totals {
    let mut totals = Totals::NONE;
    let mut work = Work { k, plan, place: Place::new(plan, axis, range.start), buffers };
    let mut groups = [const { MaybeUninit::<RowGroup>::uninit() }; OCTETS];
    let (long, _) = extent(plan, axis);
    let count = register_octets(TILE.min(long));
    for group in &mut groups[..count] {
        // One by one: the C library sets more than 2 KiB at once by an instruction that is slow to start.
        // SAFETY: numbers and flags of nothing but zeros are what they are.
        let group = unsafe {
            group.as_mut_ptr().write_bytes(0, 1);
            group.assume_init_mut()
        };
        group.clear();
    }
    // SAFETY: as many were written just now.
    let groups: &mut [RowGroup] =
        unsafe { std::slice::from_raw_parts_mut(groups.as_mut_ptr().cast(), count) };
    for index in range {
        work.place = Place::new(plan, axis, index);
        // SAFETY: the caller's promise.
        unsafe { tile(&mut work, groups, &mut totals) };
    }
    totals
}

/// Groups that hold `lanes` positions in whole registers, of 16 lanes at most.
fn register_octets(lanes: usize) -> usize {
    lanes.next_multiple_of(16) / ROWS
}

/// # Safety
/// As [`tiles`]; there are groups for the tile.
unsafe fn tile(work: &mut Work, groups: &mut [RowGroup], totals: &mut Totals) {
    let (k, plan, place) = (work.k, work.plan, work.place);
    let groups = &mut groups[..register_octets(place.lanes)];
    let mut tops = MaybeUninit::<[ArgMax; TILE]>::uninit();
    let mut found: &[ArgMax] = &[ArgMax::NONE; ROWS];
    if plan.leaves_top_out() || plan.wants_argmax() {
        let tops = tops.write([ArgMax::NONE; TILE]);
        // SAFETY: the caller's promise.
        unsafe { work.tops(groups, tops) };
        found = tops;
    }
    let used = place.lanes.div_ceil(ROWS);
    // What the first sweep finds by the way is read only where it is needed before.
    let reads_excluded = plan.spreads_mass()
        || plan.transform.is_some()
        || plan.is_from_lse()
        || !plan.has_softmax();
    let (mut softmax, mut sum) = (false, false);
    for (i, group) in groups[..used].iter_mut().enumerate() {
        let run = place.run(i);
        if run.len < ROWS {
            group.clear();
        }
        let tops = &found[if found.len() == TILE { i * ROWS } else { 0 }..];
        // SAFETY: rows of the plan, and this thread's alone.
        unsafe {
            group.read(k, plan, 0, &run, tops);
            if reads_excluded {
                group.x_y = [f64::NEG_INFINITY; ROWS];
                group.read_excluded(plan, 0, &run);
                group.transform_excluded(k, plan, 0..ROWS);
            }
        }
        if plan.spreads_mass() {
            (group.dot, group.dot_lost) = ([0.0; ROWS], [0.0; ROWS]);
        }
        if !softmax || !sum {
            softmax |= (0..run.len).any(|row| group.needs_softmax(plan, row));
            sum |= (0..run.len).any(|row| group.needs_sum(plan, row));
        }
    }
    if sum {
        // SAFETY: the caller's promise.
        unsafe { work.sum(groups, softmax) };
    }
    for (i, group) in groups[..used].iter_mut().enumerate() {
        if plan.entropy.is_some() {
            for i in 0..ROWS {
                group.spread[i] = group.sum[i] + group.lost[i];
            }
        }
        if plan.is_from_lse() {
            // SAFETY: rows of the plan, and this thread's alone.
            unsafe { group.read_lse(plan, 0, &place.run(i)) };
        }
    }
    // SAFETY: about the tables (`Kernels`).
    unsafe { (k.lanes.finish)(&mut groups[..used], plan) };
    if plan.has_losses() {
        for (i, group) in groups[..used].iter().enumerate() {
            group.add_to(plan, totals);
            // SAFETY: rows of the plan, and this thread's alone.
            unsafe { group.write(plan, 0, &place.run(i)) };
        }
    }
    // SAFETY: the caller's promise.
    unsafe { work.write(groups, sum) };
}
