//! The gradients of softmax and log-softmax with respect to their input, from their output y and
//! the gradient g of what follows.
//!
//! ```text
//! softmax        y·(g - Σ g·y)
//! log-softmax    g - e^y·Σ g
//! ```
//!
//! Sums and differences are taken in f64 and rounded once. Both sums run over the classes of a row
//! in order, 16 lanes at a time where classes are contiguous, else one after the other.

use super::Kernels;
use super::tiles::{CLASSES, Numbers, Tile};
use crate::math::exp2::{Base, Exp2, Shift};
use crate::math::real;
use crate::plan::{At, CHUNK, Layout, TILE, View};
use crate::simd::{Real, Simd, up_to};
use std::mem::MaybeUninit;
use std::ops::Range;

/// A validated problem of this kind.
#[derive(Clone, Copy, Debug)]
pub struct Backward {
    /// N, C, K
    pub sizes: [usize; 3],
    /// How the operands lie.
    pub layout: Layout,
    /// y is the logarithm of a softmax.
    pub log: bool,
    /// The output of the forward.
    pub y: View,
    /// The gradient with respect to it.
    pub g: View,
    /// Where the gradient goes: apart from both, or exactly one of them.
    pub to: View,
}

// SAFETY: addresses and numbers; threads write disjoint rows (parallel.rs).
unsafe impl Sync for Backward {}

/// Numbers of y, g and their result, all in the lanes' own type.
#[derive(Clone, Copy, Debug)]
pub struct Pair {
    /// y
    pub y: *const u8,
    /// g
    pub g: *const u8,
    /// Where the result goes.
    pub to: *mut u8,
    /// How many.
    pub len: usize,
    /// y is the logarithm of a softmax.
    pub log: bool,
}

/// `Σ g` or `Σ g·y` over some classes of a row.
///
/// # Safety
/// y and g are readable; the processor has what `s` stands for. The same for all below.
#[inline(always)]
pub unsafe fn products<S: Simd>(s: S, pair: &Pair) -> f64 {
    let d = s.wide();
    let (y, g) = (pair.y.cast::<S::Real>(), pair.g.cast::<S::Real>());
    let mut totals = s.totals();
    for (i, at) in (0..pair.len).step_by(S::LANES).enumerate() {
        let lanes = up_to::<S>(pair.len - at);
        // SAFETY: the mask keeps to the operands.
        let (y, g) = unsafe {
            let zero = S::Real::ZERO;
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

/// Writes the result of the classes of a row, given the row's sum.
///
/// # Safety
/// See [`products`]; `to` is writable, and apart from y and g or exactly one of them.
#[inline(always)]
pub unsafe fn combine<S: Simd<Real: Base>>(s: S, pair: &Pair, sum: f64) {
    let exp = Exp2::<S, false>::new(s, Shift::ZERO);
    let (y, g) = (pair.y.cast::<S::Real>(), pair.g.cast::<S::Real>());
    let mut sums = s.widen(s.splat(S::Real::ZERO));
    sums.as_mut().iter_mut().for_each(|v| *v = s.wide().splat(sum));
    let lost = s.widen(s.splat(S::Real::ZERO));
    for at in (0..pair.len).step_by(S::LANES) {
        let lanes = up_to::<S>(pair.len - at);
        let zero = S::Real::ZERO;
        // SAFETY: the mask keeps to the operands.
        unsafe {
            let y = s.load_lanes(y.wrapping_add(at), lanes, zero);
            let g = s.load_lanes(g.wrapping_add(at), lanes, zero);
            let v = result::<S>(s, &exp, y, g, [sums, lost], pair.log);
            s.store_lanes(pair.to.cast::<S::Real>().wrapping_add(at), lanes, v);
        }
    }
}

#[inline(always)]
fn result<S: Simd<Real: Base>>(
    s: S,
    exp: &Exp2<S, false>,
    y: S::Vector,
    g: S::Vector,
    [sum, lost]: [S::Widened; 2],
    log: bool,
) -> S::Vector {
    let d = s.wide();
    let p = if log { exp.base_e(y) } else { y };
    let mut v = s.widen(g);
    let sums = sum.as_ref().iter().zip(lost.as_ref());
    for ((v, &p), (&sum, &lost)) in v.as_mut().iter_mut().zip(s.widen(p).as_ref()).zip(sums) {
        // What is infinite loses nothing.
        let lost = d.select(d.equal(lost, lost), lost, d.splat(0.0));
        *v = if log {
            d.sub(d.sub(*v, d.mul(p, sum)), d.mul(p, lost))
        } else {
            d.mul(p, d.sub(d.sub(*v, sum), lost))
        };
    }
    s.narrow(v)
}

/// A tile of each operand.
#[derive(Clone, Copy, Debug)]
pub struct Tiles {
    /// y; its positions and classes are those of all three.
    pub y: Tile,
    /// g
    pub g: Tile,
    /// Where the result goes.
    pub to: Tile,
    /// y is the logarithm of a softmax.
    pub log: bool,
}

/// Adds `Σ g` or `Σ g·y` over some classes to the sums of each position.
///
/// # Safety
/// See [`products`], of tiles.
#[inline(always)]
pub unsafe fn tile_products<S: Simd>(s: S, tiles: &Tiles, sums: &mut [Numbers; 2]) {
    let d = s.wide();
    let Tiles { y, g, .. } = tiles;
    for at in (0..y.lanes).step_by(S::LANES) {
        let lanes = up_to::<S>(y.lanes - at);
        let (mut sum, mut lost) =
            (s.widen(s.splat(S::Real::ZERO)), s.widen(s.splat(S::Real::ZERO)));
        let wide = <S::Wide as Simd>::LANES;
        for (i, (v, lost)) in sum.as_mut().iter_mut().zip(lost.as_mut()).enumerate() {
            // SAFETY: there are sums for whole registers.
            unsafe {
                *v = d.load(sums[0].as_ptr().add(at + i * wide));
                *lost = d.load(sums[1].as_ptr().add(at + i * wide));
            }
        }
        for c in 0..y.classes {
            let load = |tile: &Tile| {
                let p = tile.x.cast::<S::Real>().wrapping_add(c * tile.pitch + at);
                // SAFETY: positions of the tile.
                s.widen(unsafe { s.load_lanes(p, lanes, S::Real::ZERO) })
            };
            let (y, g) = (load(y), load(g));
            for (i, (v, lost)) in sum.as_mut().iter_mut().zip(lost.as_mut()).enumerate() {
                let (g, y) = (g.as_ref()[i], y.as_ref()[i]);
                let term = if tiles.log { g } else { d.mul(g, y) };
                let (next, mut error) = real::sum(d, *v, term);
                if !tiles.log {
                    error = d.add(error, d.mul_sub_exact(g, y, term));
                }
                *v = next;
                *lost = d.add(*lost, error);
            }
        }
        for (i, (&v, &lost)) in sum.as_ref().iter().zip(lost.as_ref()).enumerate() {
            // SAFETY: as above.
            unsafe {
                d.store(sums[0].as_mut_ptr().add(at + i * wide), v);
                d.store(sums[1].as_mut_ptr().add(at + i * wide), lost);
            }
        }
    }
}

/// Writes the result of a tile, given the sums of its positions.
///
/// # Safety
/// See [`combine`], of tiles.
#[inline(always)]
pub unsafe fn tile_combine<S: Simd<Real: Base>>(s: S, tiles: &Tiles, sums: &[Numbers; 2]) {
    let exp = Exp2::<S, false>::new(s, Shift::ZERO);
    for at in (0..tiles.y.lanes).step_by(S::LANES) {
        let lanes = up_to::<S>(tiles.y.lanes - at);
        let (mut sum, mut lost) =
            (s.widen(s.splat(S::Real::ZERO)), s.widen(s.splat(S::Real::ZERO)));
        for (i, (v, lost)) in sum.as_mut().iter_mut().zip(lost.as_mut()).enumerate() {
            let wide = <S::Wide as Simd>::LANES;
            // SAFETY: there are sums for whole registers.
            unsafe {
                *v = s.wide().load(sums[0].as_ptr().add(at + i * wide));
                *lost = s.wide().load(sums[1].as_ptr().add(at + i * wide));
            }
        }
        for c in 0..tiles.y.classes {
            let place = |tile: &Tile| tile.x.cast::<S::Real>().wrapping_add(c * tile.pitch + at);
            // SAFETY: positions of the tiles.
            unsafe {
                let y = s.load_lanes(place(&tiles.y), lanes, S::Real::ZERO);
                let g = s.load_lanes(place(&tiles.g), lanes, S::Real::ZERO);
                let v = result::<S>(s, &exp, y, g, [sum, lost], tiles.log);
                s.store_lanes(place(&tiles.to), lanes, v);
            }
        }
    }
}

/// Room for a chunk of numbers of the lanes' type.
#[repr(align(64))]
struct Buffer(MaybeUninit<[f64; CHUNK]>);

impl Buffer {
    #[inline(always)]
    fn new() -> Self {
        Buffer(MaybeUninit::uninit())
    }

    fn start(&mut self) -> *mut u8 {
        self.0.as_mut_ptr().cast()
    }
}

/// Blocks of work: rows, or tiles of them.
pub fn count(backward: &Backward) -> usize {
    let [rows, _, inner] = backward.sizes;
    match backward.layout {
        Layout::Classes => rows * inner,
        Layout::Positions { axis: 0 } => inner * rows.div_ceil(TILE),
        Layout::Positions { .. } => rows * inner.div_ceil(TILE),
    }
}

/// Does a range of the blocks of [`count`].
///
/// # Safety
/// The range is one of them; no other thread is in these rows.
pub unsafe fn run(k: &Kernels, backward: &Backward, range: Range<usize>) {
    let [rows, _, inner] = backward.sizes;
    for index in range {
        match backward.layout {
            Layout::Classes => {
                let at = At { row: index / inner, inner: index % inner };
                // SAFETY: the caller's promise.
                unsafe { row(k, backward, at) };
            }
            Layout::Positions { axis } => {
                let long = if axis == 0 { rows } else { inner };
                let (outer, start) =
                    (index / long.div_ceil(TILE), index % long.div_ceil(TILE) * TILE);
                let first = match axis {
                    0 => At { row: start, inner: outer },
                    _ => At { row: outer, inner: start },
                };
                // SAFETY: the caller's promise.
                unsafe { tile(k, backward, axis, first, TILE.min(long - start)) };
            }
        }
    }
}

/// # Safety
/// As [`run`]; classes are contiguous.
unsafe fn row(k: &Kernels, backward: &Backward, at: At) {
    let Backward { y, g, to, log, .. } = backward;
    let classes = backward.sizes[1];
    let (mut y_buffer, mut g_buffer) = (Buffer::new(), Buffer::new());
    let exact = y.dtype.is_exact();
    let mut pair = |class: usize| {
        let len = CHUNK.min(classes - class);
        // SAFETY: classes of a row of the operands; buffers hold a chunk.
        unsafe {
            let mut pair = Pair {
                y: y.at(at, class),
                g: g.at(at, class),
                to: to.at(at, class),
                len,
                log: *log,
            };
            if !exact {
                (k.stored.widen)(pair.y, len, y_buffer.start());
                (k.stored.widen)(pair.g, len, g_buffer.start());
                (pair.y, pair.g) = (y_buffer.start(), g_buffer.start());
                pair.to = g_buffer.start();
            }
            pair
        }
    };
    let mut sum = 0.0;
    for class in (0..classes).step_by(CHUNK) {
        // SAFETY: the pair is readable.
        sum += unsafe { (k.lanes.products)(&pair(class)) };
    }
    for class in (0..classes).step_by(CHUNK) {
        let pair = pair(class);
        // SAFETY: the pair is readable, and what it is written to is the row, or a buffer.
        unsafe {
            (k.lanes.combine)(&pair, sum);
            if !exact {
                (k.converted.narrow)(pair.to, pair.len, to.at(at, class));
            }
        }
    }
}

/// # Safety
/// As [`run`], for `lanes` positions along `axis` from `first` on.
unsafe fn tile(k: &Kernels, backward: &Backward, axis: usize, first: At, lanes: usize) {
    let Backward { y, g, to, log, .. } = backward;
    let classes = backward.sizes[1];
    let (mut y_buffer, mut g_buffer, mut to_buffer) = (Buffer::new(), Buffer::new(), Buffer::new());
    let direct = |view: &View| view.dtype.is_exact() && (view.strides[axis] == 1 || lanes == 1);
    let bring = |view: &View, class: usize, buffer: *mut u8| {
        let classes = CLASSES.min(classes - class);
        // SAFETY: positions of the operand.
        let from = unsafe { view.at(first, class) };
        let tile = Tile { x: buffer, pitch: TILE, lanes, first: class, classes };
        if direct(view) {
            return Tile { x: from, pitch: view.strides[1] as usize, ..tile };
        }
        let strides = [view.strides[axis], view.strides[1]];
        // SAFETY: as above; a buffer has room for a tile.
        unsafe { (k.stored.gather)(&tile, from, strides) };
        tile
    };
    let mut tiles = |class: usize| {
        let y = bring(y, class, y_buffer.start());
        let g = bring(g, class, g_buffer.start());
        let to = if direct(to) {
            // SAFETY: positions of the output.
            Tile { x: unsafe { to.at(first, class) }, pitch: to.strides[1] as usize, ..y }
        } else {
            Tile { x: to_buffer.start(), pitch: TILE, ..y }
        };
        Tiles { y, g, to, log: *log }
    };
    let mut sums = [[0.0; TILE]; 2];
    for class in (0..classes).step_by(CLASSES) {
        // SAFETY: the tiles are readable.
        unsafe { (k.lanes.tile_products)(&tiles(class), &mut sums) };
    }
    for class in (0..classes).step_by(CLASSES) {
        let tiles = tiles(class);
        // SAFETY: the tiles are readable, and what they are written to is the output, or a buffer.
        unsafe {
            (k.lanes.tile_combine)(&tiles, &sums);
            if !direct(to) {
                let strides = [to.strides[axis], to.strides[1]];
                (k.converted.scatter)(&tiles.to, to.at(first, class), strides, false, !0);
            }
        }
    }
}
