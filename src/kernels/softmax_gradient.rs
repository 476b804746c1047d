//! The gradients of softmax and log-softmax with respect to their input, from their output y and the
//! gradient g with respect to it.
//!
//! ```text
//! softmax        y·(g - Σ g·y)
//! log-softmax    g - e^y·Σ g
//! ```
//!
//! Sums and differences are taken in f64 and rounded once. Both sums run over the classes of a row in
//! order: 16 lanes at a time where classes are contiguous, else one after the other.

use super::strided::tile::{Tile, TileNumbers};
use crate::math::exp2::{Base, ByExponent, Exp2, Shift};
use crate::math::real;
use crate::simd::{Real, Simd, up_to};

/// Some classes of a row of y and g, and where the result goes, all in the lanes' own type.
#[derive(Clone, Copy, Debug)]
pub struct Pair {
    /// y
    pub y: *const u8,
    /// g
    pub g: *const u8,
    /// Where the result goes.
    pub to: *mut u8,
    /// How many classes.
    pub len: usize,
    /// y is the logarithm of a softmax.
    pub log: bool,
}

/// `Σ g` or `Σ g·y` over some classes of a row.
///
/// # Safety
/// y and g are readable for `len` lanes; the processor has the set of `s`.
#[inline(always)]
pub unsafe fn products<S: Simd>(s: S, pair: &Pair) -> f64 {
    let d = s.wide();
    let (y, g) = (pair.y.cast::<S::Real>(), pair.g.cast::<S::Real>());
    let mut totals = s.totals();
    for (i, at) in (0..pair.len).step_by(S::LANES).enumerate() {
        let lanes = up_to::<S>(pair.len - at);
        let zero = S::Real::ZERO;
        // SAFETY: `lanes` has a bit for each class from `at` on below `len`, for which both are readable
        // (# Safety).
        let (y, g) = unsafe {
            (
                s.load_lanes(y.wrapping_add(at), lanes, zero),
                s.load_lanes(g.wrapping_add(at), lanes, zero),
            )
        };
        let mut terms = s.widen(g);
        if !pair.log {
            for (g, &y) in terms.as_mut().iter_mut().zip(s.widen(y).as_ref()) {
                *g = d.mul(*g, y);
            }
        }
        s.add_wide(&mut totals, i, terms);
    }
    s.sum(totals)
}

/// Writes the result of some classes of a row, given the sum over the whole row.
///
/// # Safety
/// As [`products`]; `to` is writable for `len` lanes, and apart from y and g or exactly one of them.
#[inline(always)]
pub unsafe fn combine<S: Simd<Real: Base>>(s: S, pair: &Pair, sum: f64) {
    let exp = Exp2::<S, ByExponent>::new(s, Shift::ZERO);
    let (y, g) = (pair.y.cast::<S::Real>(), pair.g.cast::<S::Real>());
    let mut sums = s.widen(s.splat(S::Real::ZERO));
    sums.as_mut().iter_mut().for_each(|v| *v = s.wide().splat(sum));
    let errors = s.widen(s.splat(S::Real::ZERO));
    for at in (0..pair.len).step_by(S::LANES) {
        let lanes = up_to::<S>(pair.len - at);
        let zero = S::Real::ZERO;
        // SAFETY: `lanes` has a bit for each class from `at` on below `len`, for which y and g are
        // readable and `to` is writable (# Safety).
        unsafe {
            let y = s.load_lanes(y.wrapping_add(at), lanes, zero);
            let g = s.load_lanes(g.wrapping_add(at), lanes, zero);
            let v = result::<S>(s, &exp, y, g, [sums, errors], pair.log);
            s.store_lanes(pair.to.cast::<S::Real>().wrapping_add(at), lanes, v);
        }
    }
}

/// The formula at the head of this file, for a register of y and g.
#[inline(always)]
fn result<S: Simd<Real: Base>>(
    s: S,
    exp: &Exp2<S, ByExponent>,
    y: S::Vector,
    g: S::Vector,
    [sum, error]: [S::Widened; 2],
    log: bool,
) -> S::Vector {
    let d = s.wide();
    let p = if log { exp.base_e(y) } else { y };
    let mut v = s.widen(g);
    let sums = sum.as_ref().iter().zip(error.as_ref());
    for ((v, &p), (&sum, &error)) in v.as_mut().iter_mut().zip(s.widen(p).as_ref()).zip(sums) {
        // The error of an infinite sum is NaN.
        let error = d.keep(d.equal(error, error), error);
        *v = if log {
            d.sub(d.sub(*v, d.mul(p, sum)), d.mul(p, error))
        } else {
            d.mul(p, d.sub(d.sub(*v, sum), error))
        };
    }
    s.narrow(v)
}

/// A tile of each operand.
#[derive(Clone, Copy, Debug)]
pub struct Tiles {
    /// y; its distributions and classes are those of all three.
    pub y: Tile,
    /// g
    pub g: Tile,
    /// Where the result goes.
    pub to: Tile,
    /// y is the logarithm of a softmax.
    pub log: bool,
}

/// A register of f64 sums from distribution `at` on, with their errors.
///
/// # Safety
/// `at` is a multiple of the register's lanes below TILE; the processor has the set of `s`.
#[inline(always)]
unsafe fn sums_at<S: Simd>(s: S, sums: &[TileNumbers; 2], at: usize) -> [S::Widened; 2] {
    let mut both = [s.widen(s.splat(S::Real::ZERO)); 2];
    for (both, sums) in both.iter_mut().zip(sums) {
        for (i, v) in both.as_mut().iter_mut().enumerate() {
            let at = at + i * <S::Wide as Simd>::LANES;
            // SAFETY: a register at `at` lies within the TILE numbers (# Safety).
            *v = unsafe { s.wide().load(sums.as_ptr().add(at)) };
        }
    }
    both
}

/// Adds `Σ g` or `Σ g·y` over some classes to the compensated sum of each distribution.
///
/// # Safety
/// The tiles of y and g are readable, with at most TILE distributions; the processor has the set of `s`.
#[inline(always)]
pub unsafe fn tile_products<S: Simd>(s: S, tiles: &Tiles, sums: &mut [TileNumbers; 2]) {
    let d = s.wide();
    let wide = <S::Wide as Simd>::LANES;
    let Tiles { y, g, .. } = tiles;
    for at in (0..y.lanes).step_by(S::LANES) {
        let lanes = up_to::<S>(y.lanes - at);
        // SAFETY: `at` is a multiple of S::LANES below the tile's distributions, at most TILE.
        let [mut sum, mut errors] = unsafe { sums_at(s, sums, at) };
        for c in 0..y.classes {
            let load = |tile: &Tile| {
                let p = tile.x.cast::<S::Real>().wrapping_add(c * tile.pitch + at);
                // SAFETY: `lanes` has bits for distributions of the tile alone, which is readable
                // (# Safety).
                s.widen(unsafe { s.load_lanes(p, lanes, S::Real::ZERO) })
            };
            let (y, g) = (load(y), load(g));
            for (i, (v, lost)) in sum.as_mut().iter_mut().zip(errors.as_mut()).enumerate() {
                let (g, y) = (g.as_ref()[i], y.as_ref()[i]);
                let term = if tiles.log { g } else { d.mul(g, y) };
                let (next, mut error) = real::sum(d, *v, term);
                if !tiles.log {
                    error = d.add(error, d.mul_sub(g, y, term));
                }
                *v = next;
                *lost = d.add(*lost, error);
            }
        }
        for (i, (&v, &error)) in sum.as_ref().iter().zip(errors.as_ref()).enumerate() {
            // SAFETY: a register at `at` lies within the TILE numbers, as for `sums_at`.
            unsafe {
                d.store(sums[0].as_mut_ptr().add(at + i * wide), v);
                d.store(sums[1].as_mut_ptr().add(at + i * wide), error);
            }
        }
    }
}

/// Writes the result of a tile, given the sums of its distributions.
///
/// # Safety
/// The tiles of y and g are readable, that of the result is writable, and apart from them or exactly one
/// of them; they have at most TILE distributions; the processor has the set of `s`.
#[inline(always)]
pub unsafe fn tile_combine<S: Simd<Real: Base>>(s: S, tiles: &Tiles, sums: &[TileNumbers; 2]) {
    let exp = Exp2::<S, ByExponent>::new(s, Shift::ZERO);
    for at in (0..tiles.y.lanes).step_by(S::LANES) {
        let lanes = up_to::<S>(tiles.y.lanes - at);
        // SAFETY: `at` is a multiple of S::LANES below the tile's distributions, at most TILE.
        let both = unsafe { sums_at(s, sums, at) };
        for c in 0..tiles.y.classes {
            let place = |tile: &Tile| tile.x.cast::<S::Real>().wrapping_add(c * tile.pitch + at);
            // SAFETY: `lanes` has bits for distributions of the tiles alone, which are readable and
            // writable (# Safety).
            unsafe {
                let y = s.load_lanes(place(&tiles.y), lanes, S::Real::ZERO);
                let g = s.load_lanes(place(&tiles.g), lanes, S::Real::ZERO);
                let v = result::<S>(s, &exp, y, g, both, tiles.log);
                s.store_lanes(place(&tiles.to), lanes, v);
            }
        }
    }
}
