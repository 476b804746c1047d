//! Class indices, of any integer type: counted where they are checked, and laid out for an group.
//!
//! Plain loops that the compiler vectorises, which is why they are entry points too: on 65536 rows
//! of 10 classes, a target costs as much as a logit.

use super::row_math::{ROWS, RowGroup};
use crate::plan::{Dtype, Run, View};

/// An integer type that targets have.
trait Index: Copy {
    /// Its value.
    fn value(self) -> i64;
}

macro_rules! index {
    ($($type:ty),*) => {
        $(impl Index for $type {
            #[inline(always)]
            fn value(self) -> i64 {
                self as i64
            }
        })*
    };
}
index!(i64, i32, u32, u16, u8);

/// Calls a function for the type of a view's integers.
macro_rules! of_type {
    ($dtype:expr, $function:ident($($argument:expr),*)) => {
        match $dtype {
            Dtype::I64 => $function::<i64>($($argument),*),
            Dtype::I32 => $function::<i32>($($argument),*),
            Dtype::U32 => $function::<u32>($($argument),*),
            Dtype::U16 => $function::<u16>($($argument),*),
            _ => $function::<u8>($($argument),*),
        }
    };
}

/// The number of targets from the `first` on that are not `ignore`; None if one is outside
/// `0..classes`.
///
/// # Safety
/// The view's integers `first..first + len` are one after the other.
#[inline(always)]
pub unsafe fn count(
    view: &View,
    first: usize,
    len: usize,
    ignore: i64,
    classes: usize,
) -> Option<u64> {
    // SAFETY: the caller's promise; the dtype says what is there.
    unsafe { of_type!(view.dtype, count_of(view, first, len, ignore, classes)) }
}

/// # Safety
/// As [`count`], of integers of `T`.
#[inline(always)]
unsafe fn count_of<T: Index>(
    view: &View,
    first: usize,
    len: usize,
    ignore: i64,
    classes: usize,
) -> Option<u64> {
    // SAFETY: the caller's promise; aligned (problem.rs).
    let targets = unsafe { std::slice::from_raw_parts(view.data.cast::<T>().add(first), len) };
    // Branchless. No count of classes is beyond i64.
    let (mut kept, mut bad, limit) = (0, false, classes as i64);
    for target in targets {
        let y = target.value();
        let keep = y != ignore;
        kept += u64::from(keep);
        bad |= keep & ((y < 0) | (y >= limit));
    }
    (!bad).then_some(kept)
}

/// Which rows of a run count, and their classes: see [`RowGroup::kept`] and [`RowGroup::excluded`].
///
/// # Safety
/// The view covers the rows, which go from lane `lane` on and end with the eighth.
#[inline(always)]
pub unsafe fn excluded_classes(
    view: &View,
    run: &Run,
    ignore: i64,
    group: &mut RowGroup,
    lane: usize,
) {
    // SAFETY: the caller's promise; the dtype says what is there.
    unsafe { of_type!(view.dtype, excluded_of(view, run, ignore, group, lane)) }
}

/// # Safety
/// As [`excluded_classes`], of integers of `T`.
#[inline(always)]
unsafe fn excluded_of<T: Index>(
    view: &View,
    run: &Run,
    ignore: i64,
    group: &mut RowGroup,
    lane: usize,
) {
    // SAFETY: the caller's promise.
    let (p, step) = unsafe { view.run::<T>(run) };
    let mut row = |i: usize, step: isize| {
        // SAFETY: a row of the view, aligned (problem.rs), in one of the group's lanes.
        unsafe {
            let target = *p.wrapping_offset(i as isize * step);
            let (kept, excluded) = excluded(target.value(), ignore);
            *group.kept.as_mut_ptr().add(lane + i) = kept;
            *group.excluded.as_mut_ptr().add(lane + i) = excluded;
        }
    };
    // Of constants, so that it becomes vectors.
    if step == 1 && run.len == ROWS {
        (0..ROWS).for_each(|i| row(i, 1));
    } else {
        (0..run.len).for_each(|i| row(i, step));
    }
}

#[inline(always)]
fn excluded(target: i64, ignore: i64) -> (f64, f64) {
    if target == ignore { (0.0, -1.0) } else { (1.0, target as f64) }
}
