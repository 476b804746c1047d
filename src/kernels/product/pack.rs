//! Operands of products packed in panels, in the lanes' type.

use super::{DEPTH, panel};
use crate::element::Element;
use crate::kernels::scratch::Scratch;
use crate::simd::{Real, Simd, up_to};

/// Elements from one row to the next in the buffer of [`columns`]: rows whose distance is a power of 2 would share
/// a few sets of the cache.
const PITCH: usize = DEPTH + 16;
/// The most lanes of a register of f32.
const MOST_LANES: usize = 16;

/// Packs rows of a matrix whose columns are the columns of a panel: each row is a step.
///
/// # Safety
/// Each row has `columns` readable elements of `E`; `to` has room for whole panels of `rows.len()` steps.
#[inline(always)]
pub unsafe fn rows<S: Simd, E: Element<S>>(s: S, rows: &[*const u8], columns: usize, to: *mut u8) {
    let width = panel::<S>();
    let mut to = to.cast::<S::Real>();
    let mut column = 0;
    while column < columns {
        let whole = columns - column >= width;
        for row in rows {
            let from = row.cast::<E>().wrapping_add(column);
            let mut lane = 0;
            while lane < width {
                let from = from.wrapping_add(lane);
                // SAFETY: the row has the columns that are left, from `from` on (# Safety).
                let x = unsafe {
                    if whole {
                        E::load(s, from)
                    } else {
                        let lanes = up_to::<S>((columns - column).saturating_sub(lane));
                        E::load_lanes(s, from, lanes, S::Real::ZERO)
                    }
                };
                // SAFETY: `to` has room for the step (# Safety).
                unsafe { s.store(to.add(lane), x) };
                lane += S::LANES;
            }
            to = to.wrapping_add(width);
        }
        column += width;
    }
}

/// Packs rows of a matrix as the columns of a panel: each element of a row is a step.
///
/// # Safety
/// Each row has `depth` readable elements of `E`, at most [`DEPTH`]; `to` has room for whole panels of as many steps.
#[inline(always)]
pub unsafe fn columns<S: Simd, E: Element<S>>(s: S, rows: &[*const u8], depth: usize, to: *mut u8) {
    const { assert!(S::LANES <= MOST_LANES && S::LANES * size_of::<S::Real>() <= 64) };
    let width = panel::<S>();
    // As many bytes as LANES rows of PITCH elements have on the widest set.
    let mut buffer = Scratch::<{ PITCH * MOST_LANES / 2 }>::new();
    let buffer = buffer.start().cast::<S::Real>();
    let group = 16 / size_of::<S::Real>();
    let panels = rows.len().div_ceil(width);
    for first in (0..panels * width).step_by(S::LANES) {
        let to = to.cast::<S::Real>().wrapping_add(first / width * depth * width + first % width);
        // Rows at equal distances are read where they lie, if whole groups of elements are.
        let direct = match rows.get(first..first + S::LANES) {
            Some(some) if E::NATIVE && depth.is_multiple_of(group) => {
                equal_distances::<S>(some).zip(some.first())
            }
            _ => None,
        };
        if let Some((pitch, start)) = direct {
            // SAFETY: the rows are `pitch` apart, and each has `depth` elements of the lanes' type (# Safety), which
            // come in whole groups; `to` has room for them.
            unsafe { transpose(s, start.cast(), pitch, depth, to) };
            continue;
        }
        for lane in 0..S::LANES {
            // A column that no row fills is another's: nobody reads its sums.
            if let Some(row) = rows.get(first + lane).or(rows.first()) {
                // SAFETY: the row has `depth` elements (# Safety). The buffer has LANES rows of PITCH elements, room for
                // `depth` in whole registers, since PITCH exceeds DEPTH by a register.
                unsafe { widen::<S, E>(s, row.cast(), depth, buffer.add(lane * PITCH)) };
            }
        }
        // SAFETY: the rows of the buffer are PITCH apart and reach past `depth` by a register; `to` has room for the
        // steps (# Safety).
        unsafe { transpose(s, buffer, PITCH as isize, depth, to) };
    }
}

/// The distance of rows in elements of the lanes' type, if all have the same.
#[inline(always)]
fn equal_distances<S: Simd>(rows: &[*const u8]) -> Option<isize> {
    let size = size_of::<S::Real>() as isize;
    let distance = |i: usize| (rows[i] as isize).wrapping_sub(rows[i - 1] as isize);
    for i in 2..rows.len() {
        if distance(i) != distance(1) {
            return None;
        }
    }
    (distance(1) % size == 0).then_some(distance(1) / size)
}

/// Turns LANES rows into steps of a panel.
///
/// # Safety
/// The rows are `pitch` elements apart; each has `depth` readable elements, rounded up to groups of 16 bytes. `to` has
/// room for the steps.
#[inline(always)]
unsafe fn transpose<S: Simd>(
    s: S,
    from: *const S::Real,
    pitch: isize,
    depth: usize,
    to: *mut S::Real,
) {
    let (width, group) = (panel::<S>(), 16 / size_of::<S::Real>());
    for step in (0..depth).step_by(group) {
        // SAFETY: each row has a group of elements from `step` on (# Safety).
        let some = unsafe { s.load_rows(from.add(step), pitch) };
        for (i, &x) in some.as_ref().iter().enumerate() {
            if step + i < depth {
                // SAFETY: `to` has room for the step (# Safety).
                unsafe { s.store(to.add((step + i) * width), x) };
            }
        }
    }
}

/// Converts `len` elements to the lanes' type; the last register is written whole.
///
/// # Safety
/// `from` has `len` readable elements, `to` room for `len` rounded up to whole registers.
#[inline(always)]
unsafe fn widen<S: Simd, E: Element<S>>(s: S, from: *const E, len: usize, to: *mut S::Real) {
    let mut i = 0;
    while i < len {
        // SAFETY: the elements that are left, and room for a register (# Safety).
        unsafe {
            let from = from.add(i);
            let x = if len - i >= S::LANES {
                E::load(s, from)
            } else {
                E::load_lanes(s, from, up_to::<S>(len - i), S::Real::ZERO)
            };
            s.store(to.add(i), x);
        }
        i += S::LANES;
    }
}
