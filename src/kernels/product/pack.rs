//! Operands of products packed in panels.

use super::form::{Columns, Form};
use super::{DEPTH, panel};
use crate::kernels::scratch::Scratch;
use crate::simd::Simd;

/// Elements from one row to the next in the buffer of [`columns`]: rows whose distance is a power of 2 would share
/// a few sets of the cache.
const PITCH: usize = DEPTH + 16;
/// The most lanes of a register of f32.
const MOST_LANES: usize = 16;

/// Packs rows of a matrix whose columns are the columns of a panel: the rows make the steps.
///
/// # Safety
/// Each row has `columns` readable elements; `to` has room for whole panels of the steps that the rows make.
#[inline(always)]
pub unsafe fn rows<S: Simd, F: Form<S>>(s: S, rows: &[*const u8], columns: usize, to: *mut u8) {
    let width = panel::<S>();
    let mut to = to.cast::<S::Real>();
    for column in (0..columns).step_by(width) {
        for step in 0..F::ORDER.steps(rows.len()) {
            for lane in (0..width).step_by(S::LANES) {
                let registers = Columns::<F::Element>::new::<S>(rows, column + lane, columns);
                // SAFETY: each row has the columns that are left, and `to` room for the step (# Safety).
                unsafe { s.store(to.add(lane), F::join(s, step, &registers)) };
            }
            to = to.wrapping_add(width);
        }
    }
}

/// Packs rows of a matrix as the columns of a panel: the elements of a row make the steps.
///
/// # Safety
/// Each row has `depth` readable elements, at most [`DEPTH`]; `to` has room for whole panels of the steps that they
/// make.
#[inline(always)]
pub unsafe fn columns<S: Simd, F: Form<S>>(s: S, rows: &[*const u8], depth: usize, to: *mut u8) {
    const { assert!(S::LANES <= MOST_LANES && S::LANES * size_of::<S::Real>() <= 64) };
    let width = panel::<S>();
    // As many bytes as LANES rows of PITCH elements have on the widest set.
    let mut buffer = Scratch::<{ PITCH * MOST_LANES / 2 }>::new();
    let buffer = buffer.start().cast::<S::Real>();
    let steps = F::ORDER.steps(depth);
    // Numbers in the 16 bytes of a row that are transposed at a time.
    let group = 16 / size_of::<F::Element>();
    let panels = rows.len().div_ceil(width);
    for first in (0..panels * width).step_by(S::LANES) {
        let to = to.cast::<S::Real>().wrapping_add(first / width * steps * width + first % width);
        // Rows at equal distances are read where they lie, if whole groups of elements are.
        let direct = match rows.get(first..first + S::LANES) {
            Some(some) if F::DIRECT && depth.is_multiple_of(group) => {
                equal_distances::<S>(some).zip(some.first())
            }
            _ => None,
        };
        if let Some((pitch, start)) = direct {
            // SAFETY: `equal_distances` found the rows `pitch` lanes apart, and each has `depth` elements (# Safety),
            // which come in whole groups, by the comparison; `to` has room for the steps (# Safety).
            unsafe { transpose(s, start.cast(), pitch, steps, to) };
            continue;
        }
        for lane in 0..S::LANES {
            // A column that no row fills is another's: nobody reads its sums.
            if let Some(row) = rows.get(first + lane).or(rows.first()) {
                // SAFETY: the row has `depth` elements (# Safety). The buffer has LANES rows of PITCH elements, room for
                // `depth` in whole registers, since PITCH exceeds DEPTH by a register.
                unsafe { F::stage(s, row.cast(), depth, buffer.add(lane * PITCH)) };
            }
        }
        // SAFETY: the loop above has filled rows of the buffer that are PITCH apart and reach past the steps by a
        // register; `to` has room for the steps (# Safety).
        unsafe { transpose(s, buffer, PITCH as isize, steps, to) };
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
/// The rows are `pitch` lanes apart; each has `steps` readable lanes, rounded up to groups of 16 bytes. `to` has room
/// for the steps.
#[inline(always)]
unsafe fn transpose<S: Simd>(
    s: S,
    from: *const S::Real,
    pitch: isize,
    steps: usize,
    to: *mut S::Real,
) {
    let (width, group) = (panel::<S>(), 16 / size_of::<S::Real>());
    for step in (0..steps).step_by(group) {
        // SAFETY: each row has a group of elements from `step` on (# Safety).
        let some = unsafe { s.load_rows(from.add(step), pitch) };
        for (i, &x) in some.as_ref().iter().enumerate() {
            if step + i < steps {
                // SAFETY: `to` has room for the step (# Safety).
                unsafe { s.store(to.add((step + i) * width), x) };
            }
        }
    }
}
