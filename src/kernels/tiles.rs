//! Rows side by side: lanes along rows or inner positions.
//!
//! For logits whose classes are not contiguous (`[N, C, d1..dk]`, a transposed matrix), and for
//! rows so short that lanes along classes would mostly be empty. Up to 64 positions make a *tile*.
//! Every lane keeps its own reference and sums, so nothing is ever added across lanes and a row's
//! bits do not depend on its neighbours:
//!
//! ```text
//! for each chunk of 32 classes, which stays in the L1 cache:
//!     for each register of positions:
//!         max over the classes                   first sweep
//!         reference = integer nearest to L·max, if that is above the old one
//!         sum += Σ 2^(L·x - reference)           second sweep; in f64: so few terms would show
//!                                                every rounding, and so many one after the
//!                                                other would add theirs up
//! gradient: 2^(L·x - reference)·factor - bias, lane by lane
//! ```
//!
//! The target's class is left out of maximum and sums, as in contiguous.rs. Where positions lie
//! side by side in memory, in the lanes' own type, tiles are read and written where they are;
//! anything else (halves, logits to be scaled or capped, short rows, which are transposed) is
//! brought into a buffer of 32 classes first.

use super::Kernels;
use super::online::{Exact, Level, Partial, Top};
use super::row::{Anchor, Batch, Job, Kind, LANES_OF_ENDS, Lane, Row, Totals, is_far_below};
use crate::element::Element;
use crate::math::exp2::{Base, Exp2, Reference};
use crate::math::real;
use crate::plan::{At, Layout, Plan, TILE, Targets};
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
    /// Classes.
    pub classes: usize,
}

/// What is known of the rows of a tile so far; see [`Partial`].
#[derive(Clone, Copy, Debug)]
#[repr(align(64))]
pub struct TileSums {
    /// The class to leave out, counted from the chunk's first; any other number for none.
    pub hole: Numbers,
    /// References.
    pub far: Numbers,
    /// See `far`.
    pub near: Numbers,
    /// Σ 2^t, and what its roundings lost.
    pub sum: Numbers,
    /// See `sum`.
    pub lost: Numbers,
    /// Σ t·2^t
    pub heat: Numbers,
    /// Whether it is wanted.
    pub heats: bool,
    /// The largest logit of the chunk, and its class counted from the chunk's first.
    pub top: Numbers,
    /// See `top`.
    pub top_class: Numbers,
}

/// Lanes `at..at + LANES` of numbers in f64, as lanes.
///
/// # Safety
/// `at + S::LANES ≤ TILE`; the processor has what `s` stands for. The same for all below.
#[inline(always)]
unsafe fn take<S: Simd>(s: S, from: &Numbers, at: usize) -> S::Vector {
    // SAFETY: the caller's promise.
    s.narrow(unsafe { take_wide(s, from, at) })
}

/// # Safety
/// See [`take`].
#[inline(always)]
unsafe fn take_wide<S: Simd>(s: S, from: &Numbers, at: usize) -> S::Widened {
    let d = s.wide();
    let mut wide = s.widen(s.splat(S::Real::ZERO));
    for (i, v) in wide.as_mut().iter_mut().enumerate() {
        // SAFETY: the caller's promise.
        *v = unsafe { d.load(from.as_ptr().add(at + i * <S::Wide as Simd>::LANES)) };
    }
    wide
}

/// # Safety
/// See [`take`].
#[inline(always)]
unsafe fn put<S: Simd>(s: S, to: &mut Numbers, at: usize, wide: S::Widened) {
    let d = s.wide();
    for (i, &v) in wide.as_ref().iter().enumerate() {
        // SAFETY: the caller's promise.
        unsafe { d.store(to.as_mut_ptr().add(at + i * <S::Wide as Simd>::LANES), v) };
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

/// Adds a tile's classes to the sums of its rows.
///
/// # Safety
/// The tile is readable; the processor has what `s` stands for. The same for all below.
#[inline(always)]
pub unsafe fn sums<S: Simd<Real: Base>>(s: S, tile: &Tile, state: &mut TileSums) {
    for at in (0..tile.lanes).step_by(S::LANES) {
        // SAFETY: a register of the tile.
        unsafe {
            if state.heats {
                register_sums::<S, true>(s, tile, state, at);
            } else {
                register_sums::<S, false>(s, tile, state, at);
            }
        }
    }
}

/// # Safety
/// As [`sums`]; `at` is the first position of a register.
#[inline(always)]
unsafe fn register_sums<S: Simd<Real: Base>, const HEAT: bool>(
    s: S,
    tile: &Tile,
    state: &mut TileSums,
    at: usize,
) {
    let d = s.wide();
    let splat = |x: f64| s.splat(S::Real::from_f64(x));
    let lanes = up_to::<S>(tile.lanes - at);
    let whole = lanes == up_to::<S>(S::LANES);
    let x = tile.x.cast::<S::Real>().wrapping_add(at);
    let lowest = S::Real::NEG_INFINITY;
    let load = |class: usize| {
        let p = x.wrapping_add(class * tile.pitch);
        // SAFETY: positions of the tile.
        unsafe { if whole { s.load(p) } else { s.load_lanes(p, lanes, lowest) } }
    };
    // SAFETY: a tile has room for whole registers.
    let (hole, old_far, old_near) =
        unsafe { (take(s, &state.hole, at), take(s, &state.far, at), take(s, &state.near, at)) };

    let one = splat(1.0);
    let mut class = s.splat(S::Real::ZERO);
    let mut max = s.splat(lowest);
    for c in 0..tile.classes {
        let x = s.select(s.equal(class, hole), s.splat(lowest), load(c));
        // NaN loses.
        max = s.max(x, max);
        class = s.add(class, one);
    }

    // The integer nearest to L·max, or else max itself; 0 if it is infinite.
    let zero = s.splat(S::Real::ZERO);
    let magic = splat(S::Real::MAGIC.to_f64());
    let position = s.mul(max, s.splat(S::Real::L));
    let size = s.max(position, s.sub(zero, position));
    let near = s.sub(s.add(position, magic), magic);
    let is_near = s.less(size, splat(S::Real::NEAR));
    let finite = s.less(s.max(max, s.sub(zero, max)), splat(f64::INFINITY));
    let near = s.select(is_near, near, zero);
    let far = s.select(is_near, zero, s.select(finite, max, zero));

    // It replaces the old one if that is lower, or has no sum yet.
    // SAFETY: as above.
    let (old_sum, old_heat) =
        unsafe { (take_wide(s, &state.sum, at), take_wide(s, &state.heat, at)) };
    let slope = d.splat(S::Real::L.to_f64());
    let (nothing, infinity) = (d.splat(0.0), d.splat(f64::INFINITY));
    let steps = both::<S>(s.widen(near), s.widen(old_near), |a, b| d.sub(a, b));
    let jumps = both::<S>(s.widen(far), s.widen(old_far), |a, b| d.sub(a, b));
    let above = both::<S>(jumps, steps, |far, near| d.mul_add(far, slope, near));
    let rises = both::<S>(above, old_sum, |above, sum| {
        let higher = d.select(d.less(nothing, above), above, nothing);
        d.select(d.equal(sum, nothing), d.splat(1.0), higher)
    });
    // A chunk of nothing but -inf has none, and 0 may be above the old one.
    let rises = both::<S>(rises, s.widen(max), |rises, max| {
        d.select(d.less(d.splat(f64::NEG_INFINITY), max), rises, nothing)
    });
    let moved = s.less(zero, s.narrow(rises));
    let (far, near) = (s.select(moved, far, old_far), s.select(moved, near, old_near));
    // SAFETY: as above.
    let mut lost = unsafe { take_wide(s, &state.lost, at) };
    let (mut sum, mut heat) = (old_sum, old_heat);
    if s.bits(moved) != 0 {
        for (i, &by) in rises.as_ref().iter().enumerate() {
            let (old, old_heat) = (sum.as_ref()[i], heat.as_ref()[i]);
            let scale = real::exp(d, d.mul(by, d.splat(-std::f64::consts::LN_2)));
            heat.as_mut()[i] = d.mul(d.sub(old_heat, d.mul(by, old)), scale);
            let scaled = d.mul(old, scale);
            lost.as_mut()[i] = d.mul(lost.as_ref()[i], scale);
            sum.as_mut()[i] = d.select(d.equal(old, infinity), old, scaled);
        }
    }

    let exp = Exp2::<S, true>::lanes(s, far, near);
    let mut class = s.splat(S::Real::ZERO);
    let mut part = s.widen(zero);
    for c in 0..tile.classes {
        let x = load(c);
        let e = s.select(s.equal(class, hole), zero, exp.value::<true>(x));
        part = both::<S>(part, s.widen(e), |a, b| d.add(a, b));
        if HEAT {
            let hot = s.mul(e, exp.exponent(x));
            heat = both::<S>(heat, s.widen(hot), |a, b| d.add(a, b));
        }
        class = s.add(class, one);
    }
    for (i, &part) in part.as_ref().iter().enumerate() {
        // Both errors of the sum, whichever term is the larger.
        let old = sum.as_ref()[i];
        let new = d.add(old, part);
        let added = d.sub(new, old);
        let error = d.add(d.sub(old, d.sub(new, added)), d.sub(part, added));
        sum.as_mut()[i] = new;
        lost.as_mut()[i] = d.add(lost.as_ref()[i], error);
    }
    // SAFETY: as above.
    unsafe {
        put(s, &mut state.lost, at, lost);
        put(s, &mut state.far, at, s.widen(far));
        put(s, &mut state.near, at, s.widen(near));
        put(s, &mut state.sum, at, sum);
        if HEAT {
            put(s, &mut state.heat, at, heat);
        }
    }
}

/// Finds the largest logit of each row among the tile's classes.
///
/// # Safety
/// See [`sums`].
#[inline(always)]
pub unsafe fn argmax<S: Simd>(s: S, tile: &Tile, state: &mut TileSums) {
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
        // SAFETY: a tile has room for whole registers.
        unsafe {
            put(s, &mut state.top, at, s.widen(value));
            put(s, &mut state.top_class, at, s.widen(class));
        }
    }
}

/// What the gradient of a tile is made of.
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
    /// References.
    pub far: Numbers,
    /// See `far`.
    pub near: Numbers,
    /// What 2^t is multiplied by, in two factors; with [`Kind::Logs`] the second is what lse is above
    /// the reference.
    pub before: Numbers,
    /// See `before`.
    pub after: Numbers,
    /// What is subtracted, times the mass.
    pub bias: Numbers,
    /// Masses in f64: of each class, or of each class and position if `mass_pitch` is not 0, then
    /// so many apart from class to class. Null for 1.
    pub mass: *const f64,
    /// See `mass`.
    pub mass_pitch: usize,
    /// What the difference is multiplied by, if any is not 1.
    pub scale: Numbers,
    /// See `scale`.
    pub scales: bool,
    /// What it is multiplied by then, laid out as the tile; null for 1.
    pub slope: *const u8,
    /// The class with a value of its own, as [`TileSums::hole`], and that value.
    pub hole: Numbers,
    /// See `hole`.
    pub entry: Numbers,
    /// Not 0 where the same value is written for all classes, but the hole's.
    pub fills: Numbers,
    /// That value.
    pub fill: Numbers,
    /// One bit for each position that is written at all.
    pub writes: u64,
}

/// Writes the gradient of a tile, or adds it to what is there.
///
/// # Safety
/// See [`sums`]; masses, slopes and the gradient are there for all classes and positions.
#[inline(always)]
pub unsafe fn gradient<S: Simd<Real: Base>>(s: S, tile: &Tile, gradient: &TileGradient) {
    let zero = s.splat(S::Real::ZERO);
    let one = s.splat(S::Real::from_f64(1.0));
    let d = s.wide();
    let (l, inverse) = (d.splat(S::Real::L.to_f64()), d.splat(1.0 / S::Real::L.to_f64()));
    for at in (0..tile.lanes).step_by(S::LANES) {
        let lanes = up_to::<S>(tile.lanes - at);
        let writes = (gradient.writes >> at) as u32 & lanes;
        if writes == 0 {
            continue;
        }
        let whole = writes == up_to::<S>(S::LANES);
        // SAFETY: a tile has room for whole registers.
        let number = |from: &Numbers| unsafe { take(s, from, at) };
        let exp = Exp2::<S, true>::lanes(s, number(&gradient.far), number(&gradient.near));
        let (before, after) = (number(&gradient.before), number(&gradient.after));
        let (hole, entry) = (number(&gradient.hole), number(&gradient.entry));
        let fills = s.equal(number(&gradient.fills), zero);
        let fill = number(&gradient.fill);
        // SAFETY: as above.
        let wide = |from: &Numbers| unsafe { take_wide(s, from, at) };
        let bias = wide(&gradient.bias);
        let (wide_far, wide_near, rise) =
            (wide(&gradient.far), wide(&gradient.near), wide(&gradient.after));
        let even = s.narrow(bias);
        let mut class = zero;
        for c in 0..tile.classes {
            let p = tile.x.cast::<S::Real>().wrapping_add(c * tile.pitch + at);
            let g = gradient.g.cast::<S::Real>().wrapping_add(c * gradient.pitch + at);
            // SAFETY: positions of the tile.
            let x =
                unsafe { if whole { s.load(p) } else { s.load_lanes(p, lanes, S::Real::ZERO) } };
            let bias = if gradient.mass.is_null() {
                even
            } else {
                let mut v = bias;
                let mass = gradient.mass.wrapping_add(if gradient.mass_pitch == 0 {
                    c
                } else {
                    c * gradient.mass_pitch + at
                });
                for (i, v) in v.as_mut().iter_mut().enumerate() {
                    let step = i * <S::Wide as Simd>::LANES;
                    // SAFETY: there are masses for whole registers, or one for the class.
                    let m = unsafe {
                        if gradient.mass_pitch == 0 {
                            d.splat(*mass)
                        } else {
                            d.load(mass.wrapping_add(step))
                        }
                    };
                    let product = d.mul(*v, m);
                    *v = d.select(d.equal(m, d.splat(0.0)), m, product);
                }
                s.narrow(v)
            };
            let mut v = match gradient.kind {
                Kind::Exponentials => {
                    let e = s.mul(exp.value::<true>(x), before);
                    s.mul_add(e, after, s.sub(zero, bias))
                }
                Kind::Nothing => s.sub(zero, bias),
                Kind::Logs => {
                    let above = both::<S>(s.widen(x), wide_far, |x, far| d.sub(x, far));
                    let above = both::<S>(above, wide_near, |x, near| d.mul_sub_exact(x, l, near));
                    s.narrow(both::<S>(above, rise, |x, rise| d.sub(d.mul(x, inverse), rise)))
                }
            };
            if gradient.scales {
                v = s.mul(v, number(&gradient.scale));
            }
            if !gradient.slope.is_null() {
                let slope = gradient.slope.cast::<S::Real>();
                // SAFETY: laid out as the tile.
                v = s.mul(v, unsafe {
                    s.load_lanes(slope.wrapping_add(c * tile.pitch + at), lanes, S::Real::ZERO)
                });
            }
            v = s.select(fills, v, fill);
            v = s.select(s.equal(class, hole), entry, v);
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
            class = s.add(class, one);
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
    for lane in 0..tile.lanes {
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
    for lane in (0..tile.lanes).filter(|lane| writes >> lane & 1 == 1) {
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

/// What [`dots`] adds up, a number for each position.
#[derive(Debug)]
pub struct TileDots<'a> {
    /// What logits are taken relative to.
    pub center: &'a Numbers,
    /// As [`TileSums::hole`].
    pub hole: &'a Numbers,
    /// As [`TileGradient::mass`].
    pub mass: *const f64,
    /// See `mass`.
    pub mass_pitch: usize,
    /// Σ m·(x - center), of all classes but the hole.
    pub dot: &'a mut Numbers,
}

/// Adds `Σ m·(x - center)` over the tile's classes; terms with m = 0 are 0.
///
/// # Safety
/// See [`sums`]; there are masses for all classes and positions.
#[inline(always)]
pub unsafe fn dots<S: Simd>(s: S, tile: &Tile, dots: &mut TileDots) {
    let d = s.wide();
    let zero = d.splat(0.0);
    for at in (0..tile.lanes).step_by(S::LANES) {
        let lanes = up_to::<S>(tile.lanes - at);
        // SAFETY: a tile has room for whole registers.
        let (center, hole, mut dot) = unsafe {
            (take_wide(s, dots.center, at), take_wide(s, dots.hole, at), take_wide(s, dots.dot, at))
        };
        // Added up for the chunk first: so many terms one after the other would add up their errors.
        let mut part = s.widen(s.splat(S::Real::ZERO));
        for c in 0..tile.classes {
            let class = d.splat(c as f64);
            let p = tile.x.cast::<S::Real>().wrapping_add(c * tile.pitch + at);
            // SAFETY: positions of the tile.
            let x = s.widen(unsafe { s.load_lanes(p, lanes, S::Real::ZERO) });
            for (i, part) in part.as_mut().iter_mut().enumerate() {
                let step = at + i * <S::Wide as Simd>::LANES;
                // SAFETY: there are masses for whole registers, or one for the class, or none.
                let m = unsafe {
                    match (dots.mass.is_null(), dots.mass_pitch) {
                        (true, _) => d.splat(1.0),
                        (_, 0) => d.splat(*dots.mass.wrapping_add(c)),
                        (_, pitch) => d.load(dots.mass.wrapping_add(c * pitch + step)),
                    }
                };
                let m = d.select(d.equal(class, hole.as_ref()[i]), zero, m);
                let term = d.mul(m, d.sub(x.as_ref()[i], center.as_ref()[i]));
                *part = d.add(*part, d.select(d.equal(m, zero), zero, term));
            }
        }
        dot = both::<S>(dot, part, |dot, part| d.add(dot, part));
        // SAFETY: as above.
        unsafe { put(s, dots.dot, at, dot) };
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
        let At { row, inner } = self.first;
        match self.axis {
            0 => At { row: row + lane, inner },
            _ => At { row, inner: inner + lane },
        }
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

/// What the two sweeps over a tile work with.
struct Work<'a> {
    k: &'a Kernels,
    plan: &'a Plan,
    place: Place,
    x: Buffer,
    slope: Buffer,
    g: Buffer,
    mass: MaybeUninit<[f64; CLASSES * TILE]>,
}

impl Work<'_> {
    /// The tile's classes from `class` on, as stored but in the lanes' own type.
    ///
    /// # Safety
    /// The plan has the tile and the classes; so for all below.
    unsafe fn stored(&mut self, class: usize, classes: usize) -> Tile {
        let (plan, lanes) = (self.plan, self.place.lanes);
        let view = &plan.logits;
        let strides = [view.strides[self.place.axis], view.strides[1]];
        // SAFETY: the caller's promise.
        let from = unsafe { view.at(self.place.first, class) };
        if (strides[0] == 1 || lanes == 1) && plan.transform.is_none() && view.dtype.is_exact() {
            return Tile { x: from, pitch: strides[1] as usize, lanes, classes };
        }
        let tile = Tile { x: self.x.start(), pitch: TILE, lanes, classes };
        // SAFETY: as above; the buffer has room for a chunk of a tile.
        unsafe { (self.k.stored.gather)(&tile, from, strides) };
        tile
    }

    /// Scales and caps a tile; whether there are slopes.
    ///
    /// # Safety
    /// The tile is in the buffer.
    unsafe fn transform(&mut self, tile: &Tile) -> bool {
        let Some(with) = &self.plan.transform else { return false };
        let size = if self.plan.logits.dtype.has_short_lanes() { 4 } else { 8 };
        for c in 0..tile.classes {
            let at = c * TILE * size;
            // SAFETY: both buffers have room for a chunk of a tile.
            unsafe {
                let (x, slope) = (tile.x.add(at), self.slope.start().add(at));
                (self.k.lanes.transform)(x, tile.lanes, with, slope);
            }
        }
        with.cap > 0.0
    }

    /// Masses of the chunk and the distance between classes, and adds up those of probability
    /// targets; null if all are 1.
    ///
    /// # Safety
    /// See [`stored`](Self::stored).
    unsafe fn masses(
        &mut self,
        class: usize,
        classes: usize,
        total: Option<&mut [Exact; TILE]>,
    ) -> (*const f64, usize) {
        let to = self.mass.as_mut_ptr().cast::<f64>();
        let mut row = [0.0; CLASSES];
        let row = &mut row[..classes];
        match (&self.plan.targets, &self.plan.class_weights) {
            (Targets::Probabilities(_), _) => {
                let mut none = [Exact::NONE; TILE];
                let total = total.unwrap_or(&mut none);
                // Lanes that no position has are read with the others.
                // SAFETY: within the buffer, here and below.
                unsafe { to.write_bytes(0, classes * TILE) };
                for (lane, total) in total[..self.place.lanes].iter_mut().enumerate() {
                    // SAFETY: the caller's promise.
                    unsafe { self.plan.mass(self.place.at(lane), class, row) };
                    for (c, &m) in row.iter().enumerate() {
                        // SAFETY: see above.
                        unsafe { to.add(c * TILE + lane).write(m) };
                        total.add(m);
                    }
                }
                (to, TILE)
            }
            (_, Some(_)) => {
                // SAFETY: the caller's promise; the buffer is longer.
                unsafe {
                    self.plan.mass(self.place.first, class, row);
                    to.copy_from_nonoverlapping(row.as_ptr(), classes);
                }
                (to, 0)
            }
            _ => (std::ptr::null(), 0),
        }
    }
}

/// Tiles `range` of the plan; returns the sums over their rows.
///
/// # Safety
/// `range` is within [`count`]; no other thread is in these tiles.
pub unsafe fn tiles(k: &Kernels, plan: &Plan, range: Range<usize>) -> Totals {
    let mut totals = Totals::default();
    if let Layout::Positions { axis } = plan.layout {
        for index in range {
            let place = Place::new(plan, axis, index);
            // SAFETY: the caller's promise.
            unsafe { tile(k, plan, place, &mut totals) };
        }
    }
    totals
}

/// The holes of rows, counted from `class`; -1 for those before.
fn holes(holes: &[Option<usize>; TILE], class: usize) -> Numbers {
    holes.map(|hole| match hole.and_then(|y| y.checked_sub(class)) {
        Some(y) if y < CLASSES => y as f64,
        _ => -1.0,
    })
}

/// # Safety
/// As [`tiles`].
unsafe fn tile(k: &Kernels, plan: &Plan, place: Place, totals: &mut Totals) {
    let lanes = place.lanes;
    let mut work = Work {
        k,
        plan,
        place,
        x: Buffer::new(),
        slope: Buffer::new(),
        g: Buffer::new(),
        mass: MaybeUninit::uninit(),
    };
    let mut state = TileSums {
        hole: [-1.0; TILE],
        far: [0.0; TILE],
        near: [0.0; TILE],
        sum: [0.0; TILE],
        lost: [0.0; TILE],
        heat: [0.0; TILE],
        heats: plan.entropy.is_some(),
        top: [f64::NEG_INFINITY; TILE],
        top_class: [0.0; TILE],
    };
    let chunk = |class: usize| CLASSES.min(plan.classes - class);
    let mut tops = [Top::NONE; TILE];
    if plan.leaves_top_out() || plan.wants_argmax() {
        for class in (0..plan.classes).step_by(CLASSES) {
            // SAFETY: the caller's promise.
            unsafe {
                let tile = work.stored(class, chunk(class));
                (k.lanes.argmax)(&tile, &mut state);
            }
            for (lane, top) in tops[..lanes].iter_mut().enumerate() {
                let found = class + state.top_class[lane] as usize;
                top.push(Top { value: state.top[lane], class: found });
            }
        }
    }

    let mut batches: [Batch; TILE / LANES_OF_ENDS] = std::array::from_fn(|_| Batch::new());
    let mut targets = [None; TILE];
    let mut center = [0.0; TILE];
    // Rows whose center is not that logit but has yet to be found.
    let mut adrift = [false; TILE];
    let (mut softmax, mut spread, mut sum) = (false, false, false);
    for lane in 0..lanes {
        let at = place.at(lane);
        // SAFETY: a row of the plan, and this thread's alone.
        let row = unsafe { Row::read(k, plan, at, tops[lane].class) };
        let todo = row.sum(plan, Anchor::NONE);
        targets[lane] = row.hole;
        center[lane] = todo.center.unwrap_or(0.0);
        adrift[lane] = todo.center.is_some() && !row.is_center(center[lane]);
        softmax |= todo.softmax;
        spread |= todo.center.is_some();
        sum |= row.needs_sum(plan);
        batches[lane / LANES_OF_ENDS].push(row, todo);
    }

    let mut dot = [0.0; TILE];
    let mut mass = [Exact::NONE; TILE];
    let mut staged = None;
    if sum {
        for class in (0..plan.classes).step_by(CLASSES) {
            let classes = chunk(class);
            state.hole = holes(&targets, class);
            // SAFETY: the caller's promise.
            unsafe {
                let tile = work.stored(class, classes);
                let capped = work.transform(&tile);
                staged = Some((tile, capped));
                if softmax {
                    (k.lanes.sums)(&tile, &mut state);
                }
                if spread {
                    if class == 0 && !plan.log_probs {
                        for lane in 0..lanes {
                            let start = state.far[lane] + state.near[lane] / plan.l;
                            if adrift[lane] || is_far_below(center[lane], start) {
                                center[lane] = start;
                            }
                        }
                    }
                    let (masses, mass_pitch) = work.masses(class, classes, Some(&mut mass));
                    let mut dots = TileDots {
                        center: &center,
                        hole: &state.hole,
                        mass: masses,
                        mass_pitch,
                        dot: &mut dot,
                    };
                    (k.lanes.dots)(&tile, &mut dots);
                }
            }
        }
    }

    for (b, batch) in batches[..lanes.div_ceil(LANES_OF_ENDS)].iter_mut().enumerate() {
        for (i, row) in batch.lanes().iter_mut().enumerate() {
            let lane = b * LANES_OF_ENDS + i;
            let reference = Reference { far: state.far[lane], near: state.near[lane] };
            // Tiles are relative to their largest logits, as heat has to be.
            let sum = state.sum[lane];
            // Past an infinity what was lost is inf - inf.
            let sum = if sum.is_finite() { sum + state.lost[lane] } else { sum };
            let level = Level::of(reference, sum, state.heat[lane]);
            row.partial =
                Partial { level, spread: level, dot: dot[lane], mass: mass[lane], top: tops[lane] };
            row.sum.anchor.reference = reference;
            row.sum.center = row.sum.center.map(|_| center[lane]);
        }
        // SAFETY: rows of the plan, and this thread's alone.
        unsafe { batch.finish(k, plan, totals) };
    }

    let Some(output) = &plan.gradient else { return };
    let mut gradient = TileGradient::empty(output.accumulate);
    for (b, batch) in batches[..lanes.div_ceil(LANES_OF_ENDS)].iter_mut().enumerate() {
        for (i, Lane { row, job, .. }) in batch.lanes().iter().enumerate() {
            gradient.place(b * LANES_OF_ENDS + i, row, *job);
        }
    }
    if gradient.writes == 0 {
        return;
    }
    let view = &output.view;
    let strides = [view.strides[place.axis], view.strides[1]];
    let direct = (strides[0] == 1 || lanes == 1) && view.dtype.is_exact();
    for class in (0..plan.classes).step_by(CLASSES) {
        let classes = chunk(class);
        // SAFETY: the caller's promise.
        unsafe {
            let (tile, capped) = match staged {
                Some(staged) if plan.classes <= CLASSES => staged,
                _ => {
                    let tile = work.stored(class, classes);
                    (tile, work.transform(&tile))
                }
            };
            gradient.slope = if capped { work.slope.start() } else { std::ptr::null() };
            gradient.hole = holes(&targets, class);
            (gradient.mass, gradient.mass_pitch) = work.masses(class, classes, None);
            let to = view.at(place.first, class);
            if direct {
                (gradient.g, gradient.pitch) = (to, strides[1] as usize);
                (k.lanes.gradient)(&tile, &gradient);
                continue;
            }
            gradient.accumulate = false;
            (gradient.g, gradient.pitch) = (work.g.start(), TILE);
            (k.lanes.gradient)(&tile, &gradient);
            let from = Tile { x: gradient.g, pitch: TILE, lanes, classes };
            (k.converted.scatter)(&from, to, strides, output.accumulate, gradient.writes);
        }
    }
}

impl TileGradient {
    fn empty(accumulate: bool) -> Self {
        TileGradient {
            g: std::ptr::null_mut(),
            pitch: 0,
            accumulate,
            kind: Kind::Nothing,
            far: [0.0; TILE],
            near: [0.0; TILE],
            before: [1.0; TILE],
            after: [0.0; TILE],
            bias: [0.0; TILE],
            mass: std::ptr::null(),
            mass_pitch: 0,
            scale: [1.0; TILE],
            scales: false,
            slope: std::ptr::null(),
            hole: [-1.0; TILE],
            entry: [0.0; TILE],
            fills: [0.0; TILE],
            fill: [0.0; TILE],
            writes: 0,
        }
    }

    /// What is to be done for the row of one lane.
    fn place(&mut self, lane: usize, row: &Row, job: Job) {
        self.entry[lane] = row.entry;
        self.writes |= 1 << lane;
        match job {
            Job::Nothing => self.writes &= !(1 << lane),
            Job::Target => self.fills[lane] = 1.0,
            Job::Fill(value) => (self.fills[lane], self.fill[lane]) = (1.0, value),
            Job::Sweep(sweep) => {
                // The same for all rows of a problem.
                self.kind = sweep.kind;
                self.far[lane] = sweep.own.reference.far;
                self.near[lane] = sweep.own.reference.near;
                (self.before[lane], self.after[lane]) = match sweep.kind {
                    Kind::Exponentials => sweep.own.split(),
                    _ => (1.0, sweep.own.factor),
                };
                self.bias[lane] = sweep.bias;
                self.scale[lane] = sweep.scale;
                self.scales |= sweep.scale != 1.0;
            }
        }
    }
}
