//! Class indices of any integer type: counted where validation checks them, and read into lanes of f64.
//!
//! The loops are plain Rust that the compiler vectorises for the entry point's instruction set: on 65536
//! rows of 10 classes, a target costs as much as a logit.

use super::row_math::{ROWS, RowInputs};
use crate::view::{Integer, IntegerType, Span, View, with_integer};

/// The number of targets from the `first` on that are not `ignore`; None if one of those is outside
/// `0..classes`.
///
/// # Safety
/// The view covers its integers `first..first + len`, which lie side by side.
#[inline(always)]
pub unsafe fn count_kept(
    view: &View<IntegerType>,
    first: usize,
    len: usize,
    ignore: i64,
    classes: usize,
) -> Option<u64> {
    // SAFETY: the integers are of `T`, by the dtype, and side by side (# Safety).
    with_integer!(view.dtype, T => unsafe { count_of::<T>(view, first, len, ignore, classes) })
}

/// # Safety
/// As [`count_kept`], of integers of `T`.
#[inline(always)]
unsafe fn count_of<T: Integer>(
    view: &View<IntegerType>,
    first: usize,
    len: usize,
    ignore: i64,
    classes: usize,
) -> Option<u64> {
    // SAFETY: the integers lie side by side (# Safety), in the view's memory and aligned (validation).
    let targets = unsafe { std::slice::from_raw_parts(view.data.cast::<T>().add(first), len) };
    // Branchless. No number of classes exceeds i64.
    let (mut kept, mut bad, limit) = (0, false, classes as i64);
    for target in targets {
        let y = target.value();
        let keep = y != ignore;
        kept += u64::from(keep);
        bad |= keep & ((y < 0) | (y >= limit));
    }
    (!bad).then_some(kept)
}

/// Reads the targets of a span: see [`RowInputs::excluded`].
///
/// # Safety
/// The view covers the span, and `to` has room for it.
#[inline(always)]
pub unsafe fn read_classes(view: &View<IntegerType>, span: &Span, ignore: i64, to: &mut [f64]) {
    // SAFETY: the integers are of `T`, by the dtype; the view covers the span, for which there is room
    // (# Safety).
    with_integer!(view.dtype, T => unsafe { read_of::<T>(view, span, ignore, to) })
}

/// # Safety
/// As [`read_classes`], of integers of `T`.
#[inline(always)]
unsafe fn read_of<T: Integer>(view: &View<IntegerType>, span: &Span, ignore: i64, to: &mut [f64]) {
    // SAFETY: the view covers the span (# Safety of `read_classes`).
    let (p, step) = unsafe { view.span::<T>(span) };
    let mut read = |i: usize, step: isize| {
        // SAFETY: target `i` of the span is in the view's memory and aligned (validation), and has room
        // (# Safety of `read_classes`).
        unsafe {
            let target = (*p.wrapping_offset(i as isize * step)).value();
            // Nobody reads what becomes of a negative target. The compiler converts unsigned integers in vectors on every
            // set, signed ones one by one on AVX2.
            let class = target as u64 as f64;
            let class = if target == ignore { RowInputs::IGNORED } else { class };
            *to.as_mut_ptr().add(i) = class;
        }
    };
    // A stride, and for a group of rows a length, that the compiler knows: it vectorises these loops.
    if step != 1 {
        (0..span.len).for_each(|i| read(i, step));
    } else if span.len == ROWS {
        (0..ROWS).for_each(|i| read(i, 1));
    } else {
        (0..span.len).for_each(|i| read(i, 1));
    }
}
