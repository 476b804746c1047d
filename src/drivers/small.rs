//! Small calls, without a plan: one strip, or a few short rows. A few rows of a strip go one by one, more of them side
//! by side.

use super::totals::{Losses, Totals};
use crate::kernels::Kernels;
use crate::kernels::contiguous::short::{ShortGradient, ShortRows};
use crate::kernels::ordinary::{self, OrdinaryState};
use crate::kernels::ordinary::{FACTORS, Wanted};
use crate::kernels::row_math::RowInputs;
use crate::kernels::scratch::Scratch;
use crate::kernels::strided::row::StripRow;
use crate::kernels::strided::strip::{Strip, StripGradient};
use crate::kernels::strided::tile::Tile;
use crate::plan::Plain;
use crate::strategy::{self, SINGLE_ROWS, SMALL_LANES, TILE, TILE_CLASSES, exps_pitch};
use crate::view::{Axis, Position, Span, View};

/// Runs a plain call, with the bits of the general way; false, with nothing written, where it has a row that
/// is not ordinary, a target out of range, or nothing to divide by.
///
/// # Safety
/// Validation has checked the call, whose memory is the caller's; the kernels are those of f32 logits
/// and outputs.
pub unsafe fn run(k: &Kernels, call: &Plain) -> bool {
    let Plain { rows, classes, .. } = *call;
    let mut state = OrdinaryState::new();
    let mut buffer = Scratch::<{ SMALL_LANES / 2 }>::new();
    let targets =
        View { data: call.targets.cast_mut(), dtype: call.target_type, strides: [1, 0, 0] };
    let span = Span { first: Position::FIRST, axis: Axis::Rows, len: rows };
    let (padded, padded_row) = (ordinary::padded(rows), ordinary::padded(classes));
    let is_short = strategy::is_short(classes);
    let one_by_one = rows <= SINGLE_ROWS;
    // SAFETY: the array has room for STRIP lanes (`OrdinaryState`), and a small call has no more than SMALL_ROWS rows
    // (validation). f64 of any bits may be in it, and `read_classes` writes them before they are read. The targets are
    // packed (validation); the processor has the set of the kernels (# Safety).
    let kept = unsafe {
        let excluded = state.excluded_sum_loss.start().cast::<f64>();
        for lane in rows..padded {
            excluded.add(lane).write(RowInputs::IGNORED);
        }
        let excluded = std::slice::from_raw_parts_mut(excluded, rows);
        (k.lanes.read_classes)(&targets, &span, call.ignore_index, excluded);
        (k.lanes.count_kept)(&targets, 0, rows, call.ignore_index, classes)
    };
    let Some(kept @ 1..) = kept else { return false };
    let kept = kept as f64;
    let has_gradient = !call.gradient.is_null();
    let scale = if call.is_mean { call.scale / kept } else { call.scale };
    if has_gradient && scale != 0.0 && !FACTORS.contains(&scale.abs()) {
        return false;
    }

    let exps = buffer.start();
    let strip = Strip {
        x: exps,
        pitch: padded as isize,
        lanes: rows,
        first: 0,
        classes,
        ahead: 0,
        exps: if has_gradient { exps } else { std::ptr::null_mut() },
        exps_pitch: padded,
    };
    let short = ShortRows {
        x: call.logits,
        pitch: classes as isize,
        rows,
        classes,
        exps: strip.exps,
        exps_pitch: exps_pitch(classes),
    };
    let pieces = || (0..classes).step_by(TILE_CLASSES);
    let tile = |first: usize| Tile {
        x: exps.wrapping_add(first * padded * 4),
        pitch: padded,
        lanes: rows,
        first,
        classes: TILE_CLASSES.min(classes - first),
    };
    let row = |lane: usize| StripRow {
        x: call.logits.wrapping_add(lane * classes * 4),
        classes,
        lane,
        exps: exps.wrapping_add(lane * padded_row * 4),
    };
    let strides = [classes as isize, 1];
    let wanted = Wanted {
        has_weights: false,
        has_grad_output: false,
        lse: false,
        gradient: has_gradient.then_some(scale),
    };
    // SAFETY: the logits cover all classes of the rows (validation), and the buffer has room for the exponentials of
    // all rows, in whole registers or by `exps_pitch` (`strategy::is_small`; validation). `count_kept` above found the
    // excluded classes in range. The processor has the set of the kernels (# Safety).
    unsafe {
        if is_short {
            (k.native.short_sums)(&short, &mut state);
        } else if one_by_one {
            // The arithmetic of the rows reads whole registers.
            for of in [&mut state.class, &mut state.shift, &mut state.x_y] {
                of.start().write_bytes(0, padded * size_of::<f32>());
            }
            let sum = state.excluded_sum_loss.start().cast::<f64>();
            sum.add(rows).write_bytes(0, padded - rows);
            for lane in 0..rows {
                (k.native.strip_row_sums)(&row(lane), &mut state);
            }
        } else {
            for first in pieces() {
                (k.native.gather)(&tile(first), call.logits.wrapping_add(first * 4), strides);
            }
            (k.native.strip_sums)(&strip, &mut state);
        }
        (k.lanes.finish_ordinary)(rows, &mut state, &wanted);
    }
    let needed = if has_gradient { state.good_gradient[0] } else { state.good[0] };
    if state.kept[0] & !needed & (!0 >> (TILE - rows)) != 0 {
        return false;
    }

    // SAFETY: `finish_ordinary` above has set the losses of the rows.
    let losses = unsafe { super::ordinary::values(&mut state.excluded_sum_loss, rows) };
    let loss = if rows == 1 {
        losses[0]
    } else {
        // In the tasks of the general way, of which a strip is one.
        let len = if is_short { strategy::task_len(rows, classes) } else { rows };
        let mut totals = Totals::ZERO;
        for losses in losses.chunks(len) {
            let mut task = Losses::NONE;
            task.add(losses);
            totals.add(&task.total());
        }
        totals.loss.value()
    };
    // SAFETY: the loss is a place of the caller's, and the gradient covers all classes of the rows (validation), apart
    // from the buffer, which is this function's. The sweep above has kept all exponentials there, and `finish_ordinary`
    // has set the coefficients. The processor has the set of the kernels (# Safety).
    unsafe {
        *call.loss = if call.is_mean { loss / kept } else { loss };
        if has_gradient && is_short {
            let (accumulate, stream, writes) = (false, false, [!0; ordinary::WORDS]);
            let to = ShortGradient {
                g: call.gradient,
                pitch: classes as isize,
                accumulate,
                stream,
                writes,
            };
            (k.native_to_output.short_gradient)(&short, &mut state, &to);
        } else if has_gradient && one_by_one {
            for lane in 0..rows {
                let to = call.gradient.wrapping_add(lane * classes * 4);
                (k.native_to_output.strip_row_gradient)(&row(lane), &mut state, to);
            }
        } else if has_gradient {
            let (g, pitch, writes) = (exps, padded as isize, [!0; ordinary::WORDS]);
            let (accumulate, stream, padded) = (false, false, true);
            let to = StripGradient { g, pitch, accumulate, stream, padded, writes };
            (k.native_to_output.strip_gradient)(&strip, &mut state, &to);
            for first in pieces() {
                let to = call.gradient.wrapping_add(first * 4);
                (k.native_to_output.scatter)(&tile(first), to, strides, false, !0);
            }
        }
    }
    true
}
