//! A tile as the kernels see it, and the registers of its rows.

use crate::kernels::row_math::{ROWS, RowGroup, RowLanes};
use crate::simd::{Real, Simd, WideVector, up_to};
use crate::strategy::{TILE, TILE_CLASSES};

/// A number for each distribution of a tile.
pub type TileNumbers = [f64; TILE];

/// Groups of rows in a tile.
pub const GROUPS: usize = TILE / ROWS;

/// At most [`TILE_CLASSES`] classes of at most [`TILE`] distributions that lie side by side, in the lanes'
/// own type.
#[derive(Clone, Copy, Debug)]
pub struct Tile {
    /// The first class of the first distribution.
    pub x: *mut u8,
    /// Elements from class to class.
    pub pitch: usize,
    /// Distributions.
    pub lanes: usize,
    /// Which class the first is.
    pub first: usize,
    /// Classes.
    pub classes: usize,
}

impl Tile {
    /// Distributions `at..at + LANES` of class `c`, -inf where there are none.
    ///
    /// # Safety
    /// The tile is readable and has class `c`; with `W::WHOLE`, `at + LANES` distributions. The processor
    /// has the set of `s`.
    #[inline(always)]
    pub unsafe fn logits<S: Simd, W: Registers>(&self, s: S, c: usize, at: usize) -> S::Vector {
        let p = self.x.cast::<S::Real>().wrapping_add(c * self.pitch + at);
        // SAFETY: a whole register lies within the tile with `W::WHOLE` (# Safety); the mask has bits for
        // distributions of the tile alone.
        unsafe {
            if W::WHOLE {
                s.load(p)
            } else {
                s.load_lanes(p, up_to::<S>(self.lanes - at), S::Real::NEG_INFINITY)
            }
        }
    }
}

/// Whether a register of a tile has a distribution in every lane.
pub trait Registers {
    /// It has.
    const WHOLE: bool;
}

/// Every lane has a distribution.
pub struct Whole;
/// Some lanes may have none.
pub struct Partial;

impl Registers for Whole {
    const WHOLE: bool = true;
}
impl Registers for Partial {
    const WHOLE: bool = false;
}

/// Rows `at..at + LANES` of one number per row, out of the groups that `lanes_of` takes it from.
///
/// # Safety
/// There are groups for the whole register; the processor has the set of `s`.
#[inline(always)]
pub unsafe fn take<S: Simd, T>(
    s: S,
    groups: &[T],
    lanes_of: impl Fn(&T) -> &RowLanes,
    at: usize,
) -> S::Vector {
    // SAFETY: there are groups for the register (# Safety).
    s.narrow(unsafe { take_wide(s, groups, lanes_of, at) })
}

/// As [`take`], in f64.
///
/// # Safety
/// As [`take`].
#[inline(always)]
pub unsafe fn take_wide<S: Simd, T>(
    s: S,
    groups: &[T],
    lanes_of: impl Fn(&T) -> &RowLanes,
    at: usize,
) -> S::Widened {
    let d = s.wide();
    let mut wide = s.widen(s.splat(S::Real::ZERO));
    for (i, v) in wide.as_mut().iter_mut().enumerate() {
        let at = at + i * <S::Wide as Simd>::LANES;
        // SAFETY: there is a group for row `at` (# Safety), and a register of f64 never crosses groups,
        // since its lanes divide ROWS and `at` is a multiple of them.
        *v = unsafe { d.load(lanes_of(groups.get_unchecked(at / ROWS)).as_ptr().add(at % ROWS)) };
    }
    wide
}

/// Puts back what [`take_wide`] takes.
///
/// # Safety
/// As [`take`].
#[inline(always)]
pub unsafe fn put<S: Simd, T>(
    s: S,
    groups: &mut [T],
    lanes_of: impl Fn(&mut T) -> &mut RowLanes,
    at: usize,
    wide: S::Widened,
) {
    let d = s.wide();
    for (i, &v) in wide.as_ref().iter().enumerate() {
        let at = at + i * <S::Wide as Simd>::LANES;
        // SAFETY: there is a group for row `at` (# Safety), and a register of f64 never crosses groups,
        // since its lanes divide ROWS and `at` is a multiple of them.
        unsafe {
            let lanes = lanes_of(groups.get_unchecked_mut(at / ROWS));
            d.store(lanes.as_mut_ptr().add(at % ROWS), v);
        }
    }
}

/// Whether a group of a register's rows has a shift with a logit.
///
/// # Safety
/// As [`take`].
#[inline(always)]
pub unsafe fn by_logit<S: Simd>(groups: &[RowGroup], at: usize) -> bool {
    // SAFETY: there are groups for the register (# Safety).
    groups_of::<S>(at).any(|group| unsafe { groups.get_unchecked(group) }.sums.by_logit)
}

/// The logits of the shifts of a register's rows, 0 unless a group [has one](by_logit).
///
/// # Safety
/// As [`take`].
#[inline(always)]
pub unsafe fn shift_logits<S: Simd>(s: S, groups: &[RowGroup], at: usize) -> S::Widened {
    // SAFETY: there are groups for the register (# Safety).
    unsafe {
        if by_logit::<S>(groups, at) {
            take_wide(s, groups, |group| &group.sums.shift_logit, at)
        } else {
            s.widen(s.splat(S::Real::ZERO))
        }
    }
}

/// Puts back what [`shift_logits`] takes.
///
/// # Safety
/// As [`take`].
#[inline(always)]
pub unsafe fn put_shift_logits<S: Simd>(s: S, groups: &mut [RowGroup], at: usize, v: S::Vector) {
    // SAFETY: there are groups for the register (# Safety).
    unsafe {
        put(s, groups, |group| &mut group.sums.shift_logit, at, s.widen(v));
        for group in groups_of::<S>(at) {
            groups.get_unchecked_mut(group).sums.by_logit = true;
        }
    }
}

/// The groups of a register's rows.
#[inline(always)]
fn groups_of<S: Simd>(at: usize) -> std::ops::Range<usize> {
    at / ROWS..(at + S::LANES).div_ceil(ROWS)
}

/// `c` in every lane.
///
/// # Safety
/// `c` is below TILE_CLASSES.
#[inline(always)]
pub unsafe fn number<S: Simd>(s: S, c: usize) -> S::Vector {
    const { assert!(S::Real::NUMBERS.len() >= TILE_CLASSES) };
    // SAFETY: there are TILE_CLASSES numbers at least, and `c` is below (# Safety).
    s.splat(unsafe { *S::Real::NUMBERS.get_unchecked(c) })
}

/// `f` of each pair of registers of two widened ones.
#[inline(always)]
pub fn zip_wide<S: Simd>(
    mut a: S::Widened,
    b: S::Widened,
    f: impl Fn(WideVector<S>, WideVector<S>) -> WideVector<S>,
) -> S::Widened {
    for (a, &b) in a.as_mut().iter_mut().zip(b.as_ref()) {
        *a = f(*a, b);
    }
    a
}
