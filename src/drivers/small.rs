//! Small calls, without a plan and with no option but class weights and label smoothing: one strip, or a few short rows. A
//! few rows of a strip go one by one, more of them side by side.

use super::short;
use super::totals::{Losses, Totals};
use crate::kernels::Kernels;
use crate::kernels::contiguous::short::{ShortGradient, ShortRows};
use crate::kernels::ordinary::{self, OrdinaryState};
use crate::kernels::ordinary::{FACTORS, PADDING, SMOOTHED, Smoothing, Wanted, lanes};
use crate::kernels::row_math::RowInputs;
use crate::kernels::scratch::Scratch;
use crate::kernels::strided::row::StripRow;
use crate::kernels::strided::strip::{Strip, StripGradient};
use crate::kernels::strided::tile::Tile;
use crate::math::compensated::CompensatedSum;
use crate::math::exp2::Base;
use crate::plan::Plain;
use crate::strategy::{
    self, LARGEST_WEIGHT, SHORT_FROM, SINGLE_ROWS, SMALL_ROWS, STRIP, STRIP_BYTES, TILE,
    TILE_CLASSES, exps_pitch,
};
use crate::view::{Axis, ElementType, Position, Span, View};
use std::ptr;

/// Runs a plain call, with the bits of the general way; false, with nothing written, where it has a row that
/// is not ordinary, a target out of range, or nothing to divide by.
///
/// # Safety
/// Validation has checked the call, whose memory is the caller's; the kernels are those of its dtype for logits and
/// outputs.
#[inline(always)]
pub unsafe fn run(k: &Kernels, call: &Plain) -> bool {
    let has_options = !call.class_weights.is_null() || call.label_smoothing != 0.0;
    // SAFETY: this function's own # Safety.
    unsafe {
        match call.dtype.has_f32_lanes() {
            false => run_as::<f64, false>(k, call),
            true if has_options => run_as::<f32, true>(k, call),
            true => run_as::<f32, false>(k, call),
        }
    }
}

/// # Safety
/// As [`run`], with lanes of `R`; `HAS_OPTIONS`: the call has class weights, or label smoothing.
unsafe fn run_as<R: Base, const HAS_OPTIONS: bool>(k: &Kernels, call: &Plain) -> bool {
    let (size, lane_size) = (call.dtype.size(), const { size_of::<R>() });
    let Plain { rows, classes, .. } = *call;
    let mut state = OrdinaryState::new();
    let mut buffer = Scratch::<{ STRIP_BYTES / 8 }>::new();
    let targets =
        View { data: call.targets.cast_mut(), dtype: call.target_type, strides: [1, 0, 0] };
    let span = Span { first: Position::FIRST, axis: Axis::Rows, len: rows };
    let (padded, padded_row) = (ordinary::padded(rows), ordinary::padded(classes));
    let is_short = strategy::is_short(classes, lane_size);
    let one_by_one = rows <= SINGLE_ROWS;
    const { assert!(SMALL_ROWS + PADDING <= STRIP) };
    // SAFETY: the array has room for STRIP lanes (`LaneScratch`): for the rows of a small call, SMALL_ROWS at most
    // (validation), and PADDING more, by the assertion. f64 of any bits may be in it, and `read_classes` writes them before
    // they are read. The targets are packed (validation); the processor has the set of the kernels (# Safety).
    let kept = unsafe {
        let excluded = state.excluded_sum_loss.start().cast::<f64>();
        excluded.add(rows).cast::<[f64; PADDING]>().write([RowInputs::IGNORED; PADDING]);
        let excluded = std::slice::from_raw_parts_mut(excluded, rows);
        (k.lanes.read_classes)(&targets, &span, call.ignore_index, excluded);
        (k.lanes.count_kept)(&targets, 0, rows, call.ignore_index, classes)
    };
    let Some(kept @ 1..) = kept else { return false };
    let mut excluded = [0.0; SINGLE_ROWS];
    if one_by_one {
        // SAFETY: `read_classes` has set the classes of the rows, of which there are SINGLE_ROWS at most here.
        let of_rows = unsafe { super::ordinary::values(&mut state.excluded_sum_loss, rows) };
        excluded[..rows].copy_from_slice(of_rows);
    }
    let mut normalizer = kept as f64;
    let has_gradient = !call.gradient.is_null();
    let mut room = Scratch::<SHORT_FROM>::new();
    let (mut smoothing, mut weights) = (None, ptr::null());
    if HAS_OPTIONS {
        // SAFETY: `count_kept` found the excluded classes in range, which are set; the weights are those of the call's
        // classes (validation).
        let options = unsafe { read_options(call, &mut state, &mut room) };
        let Some(options) = options else { return false };
        if !call.class_weights.is_null() {
            normalizer = options.normalizer;
        }
        (smoothing, weights) = (options.smoothing, options.weights);
    }
    let is_smoothed = smoothing.is_some();
    // A division by 1 takes its time, too.
    let mean = |x: f64| if call.is_mean && normalizer != 1.0 { x / normalizer } else { x };
    let scale = mean(call.scale);
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
        exps: if has_gradient { exps } else { ptr::null_mut() },
        exps_pitch: padded,
        is_smoothed,
        weights,
    };
    let short = ShortRows {
        x: call.logits,
        pitch: classes as isize,
        rows,
        classes,
        exps: strip.exps,
        exps_pitch: exps_pitch(classes),
    };
    // The parts of the strip that are gathered at a time: the first row, and the first class.
    let pieces = || {
        let of_rows = |first| (0..classes).step_by(TILE_CLASSES).map(move |class| (first, class));
        (0..rows).step_by(TILE).flat_map(of_rows)
    };
    let tile = |(row, class): (usize, usize)| Tile {
        x: exps.wrapping_add((class * padded + row) * lane_size),
        pitch: padded,
        lanes: TILE.min(rows - row),
        first: class,
        classes: TILE_CLASSES.min(classes - class),
    };
    let element = |(row, class): (usize, usize)| (row * classes + class) * size;
    let row = |index: usize| StripRow {
        x: call.logits.wrapping_add(index * classes * size),
        classes,
        lane: index,
        excluded: excluded[index],
        exps: exps.wrapping_add(index * padded_row * lane_size),
        is_smoothed,
        weights,
    };
    let strides = [classes as isize, 1];
    let wanted = Wanted {
        has_weights: HAS_OPTIONS,
        has_grad_output: HAS_OPTIONS,
        lse: false,
        gradient: has_gradient.then_some(scale),
        smoothing,
    };
    // SAFETY: the logits cover all classes of the rows (validation), and the buffer has room for the exponentials of
    // all rows, in whole registers or by `exps_pitch` (`strategy::is_small`; validation). `count_kept` above found the
    // excluded classes in range. Single rows are the first SINGLE_ROWS lanes, from each of which on the arrays have room for
    // a register (`OrdinaryState`). The processor has the set of the kernels (# Safety).
    unsafe {
        if is_short {
            (k.native.short_sums)(&short, &mut state);
            if is_smoothed {
                // `read_options` leaves class weights to the general way.
                short::dots(k.native, &short, size, &mut state, |_, _| ptr::null());
            }
        } else if one_by_one {
            for index in 0..rows {
                (k.native.strip_row_sums)(&row(index), &mut state);
            }
        } else {
            for piece in pieces() {
                let x = call.logits.wrapping_add(element(piece));
                (k.native.gather)(&tile(piece), x, strides);
            }
            if is_smoothed {
                (k.converted.strip_dots)(&strip, &mut state);
            }
            (k.converted.strip_sums)(&strip, &mut state);
        }
        (k.lanes.finish_ordinary)(rows, &mut state, &wanted);
    }
    let needed = if has_gradient { &state.good_gradient } else { &state.good };
    for (word, first) in (0..rows).step_by(TILE).enumerate() {
        let lanes = !0 >> (TILE - TILE.min(rows - first));
        if state.kept[word] & !needed[word] & lanes != 0 {
            return false;
        }
    }

    // SAFETY: `finish_ordinary` above has set the losses of the rows.
    let losses = unsafe { super::ordinary::values(&mut state.excluded_sum_loss, rows) };
    let loss = if rows == 1 {
        losses[0]
    } else {
        // In the tasks of the general way, of which so few narrow rows are one (`strategy::is_small`).
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
        *call.loss = mean(loss);
        if has_gradient && is_short {
            let (accumulate, stream, writes) = (false, false, [!0; ordinary::WORDS]);
            let to = ShortGradient {
                g: call.gradient,
                pitch: classes as isize,
                accumulate,
                stream,
                writes,
                classes: 0..classes,
                is_smoothed,
                weights,
            };
            (k.native_to_output.short_gradient)(&short, &mut state, &to);
        } else if has_gradient && one_by_one {
            for index in 0..rows {
                let to = call.gradient.wrapping_add(index * classes * size);
                (k.native_to_output.strip_row_gradient)(&row(index), &mut state, to);
            }
        } else if has_gradient {
            let (g, pitch, writes) = (exps, padded as isize, [!0; ordinary::WORDS]);
            let (accumulate, stream, padded, is_far) = (false, false, true, false);
            let to = StripGradient { g, pitch, accumulate, stream, padded, is_far, writes };
            (k.converted_to_lanes.strip_gradient)(&strip, &mut state, &to);
            for piece in pieces() {
                let to = call.gradient.wrapping_add(element(piece));
                (k.converted_to_output.scatter)(&tile(piece), to, strides, false, !0);
            }
        }
    }
    true
}

/// What class weights and label smoothing make of a small call.
struct Options {
    /// Σ w_y, which a mean is divided by.
    normalizer: f64,
    smoothing: Option<Smoothing>,
    /// The weights of all classes if there is smoothing: null if each is 1.
    weights: *const f64,
}

/// Sets what options say of the rows of a small call. `None` where the general way has to run it.
///
/// # Safety
/// The call is as [`run`] asks, and its excluded classes are set, to classes in range where they are not below 0.
#[inline(never)]
unsafe fn read_options(
    call: &Plain,
    state: &mut OrdinaryState,
    room: &mut Scratch<SHORT_FROM>,
) -> Option<Options> {
    let Plain { rows, classes, .. } = *call;
    let padded = ordinary::padded(rows);
    let given = call.class_weights.cast::<f32>();
    let is_smoothed = call.label_smoothing != 0.0;
    let keeps = is_smoothed && !given.is_null();
    if keeps && strategy::is_short(classes, size_of::<f32>()) {
        return None;
    }
    let mut normalizer = CompensatedSum::ZERO;
    // SAFETY: arrays have room for the most lanes (`OrdinaryState`), which are twice as many as a small call has rows
    // (`strategy::SMALL_ROWS`); the excluded classes are set, in range (# Safety). The weights cover all classes (validation).
    unsafe {
        let excluded = lanes::<f64, _>(&mut state.excluded_sum_loss, 0);
        let weight = lanes::<f64, _>(&mut state.weight_then_lse, 0);
        let own = lanes::<f64, _>(&mut state.weight_then_lse, SMOOTHED);
        let grad_output = lanes::<f64, _>(&mut state.grad_output, 0);
        let dot = lanes::<f64, _>(&mut state.grad_output, SMOOTHED);
        for lane in 0..padded {
            let class = *excluded.add(lane);
            let mut w = 1.0;
            if class >= 0.0 && !given.is_null() {
                w = f64::from(*given.add(class as usize));
                normalizer.add(w);
            }
            let (of_row, of_class) = if is_smoothed { (1.0, w) } else { (w, 1.0) };
            *weight.add(lane) = of_row;
            *grad_output.add(lane) = of_row;
            *own.add(lane) = of_class;
            // The arithmetic of the rows reads whole registers, of which the sums set the lanes that are rows.
            *dot.add(lane) = 0.0;
        }
    }
    let normalizer = normalizer.value();
    if call.is_mean && !given.is_null() && !(normalizer > 0.0 && normalizer.is_finite()) {
        return None;
    }
    if !is_smoothed {
        return Some(Options { normalizer, smoothing: None, weights: ptr::null() });
    }
    let (mut total, mut weights) = (classes as f64, ptr::null());
    if keeps {
        let mut sum = CompensatedSum::ZERO;
        let to = room.start().cast::<f64>();
        for class in 0..classes {
            // SAFETY: the weights cover all classes (validation).
            let w = f64::from(unsafe { *given.add(class) });
            if w.is_nan() || w.abs() >= LARGEST_WEIGHT {
                return None;
            }
            sum.add(w);
            // SAFETY: a small call has fewer than SHORT_FROM classes unless they are short (`strategy::is_small`;
            // validation), which the comparison above has excluded.
            unsafe { *to.add(class) = w };
        }
        (total, weights) = (sum.value(), to.cast_const());
    }
    let share = call.label_smoothing / classes as f64;
    let smoothing = Some(Smoothing { keep: 1.0 - call.label_smoothing, share, total });
    Some(Options { normalizer, smoothing, weights })
}
