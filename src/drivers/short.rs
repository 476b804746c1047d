//! Short contiguous rows of losses over class indices, whose logits are read once.
//!
//! A few rows at a time go through one sweep over their classes and the arithmetic of ordinary rows. Those that are not
//! ordinary are computed again as a tile ([`ordinary::again`]).

use super::batch;
use super::call::Call;
use super::ordinary::{self, WeightScratch, Weights};
use super::place::Place;
use super::strided::AGAIN_BYTES;
use super::totals::{Losses, Totals};
use crate::kernels::contiguous::block::Chunk;
use crate::kernels::contiguous::short::{ShortGradient, ShortRows};
use crate::kernels::ordinary::{OrdinaryState, SMOOTHED, WORDS, lanes, padded};
use crate::kernels::scratch::Scratch;
use crate::kernels::strided::tile::Tile;
use crate::kernels::{LogitKernels, OutputKernels};
use crate::math::exp2::Base;
use crate::plan::Loss;
use crate::strategy::{self, STRIP_BYTES, TILE, WEIGHED_CLASSES, exps_pitch};
use crate::view::{Axis, ElementType, Span};
use std::ops::Range;

/// Runs a range of rows, first to last; gives away the sums over each `len` of them.
///
/// # Safety
/// The rows are the call's, with contiguous classes; the plan is a loss that [`Call::has_ordinary_rows`] is set for, of
/// rows that [`strategy::is_short`](crate::strategy::is_short). No other thread accesses the rows.
pub unsafe fn run(
    call: &Call,
    loss: &Loss,
    range: Range<usize>,
    len: usize,
    give: &mut dyn FnMut(Totals),
) {
    let mut buffer = Scratch::<{ (STRIP_BYTES + AGAIN_BYTES) / 8 }>::new();
    let room = buffer.start().wrapping_add(STRIP_BYTES);
    if call.streams {
        // Streams begin at cache lines: their last register may reach past those that the sums have set.
        // SAFETY: the buffer is as long.
        unsafe { buffer.start().write_bytes(0, STRIP_BYTES) };
    }
    let mut state = OrdinaryState::new();
    let mut weights = WeightScratch::new();
    let classes = call.plan.shape.classes;
    let (pitch, dtype) = (exps_pitch(classes), call.plan.logits.dtype);
    let mut width = ordinary::most(loss, dtype);
    let exps = match &call.plan.output {
        Some(output) => {
            width = width.min(STRIP_BYTES / (dtype.lane_size() * pitch));
            if call.streams {
                width = width.min(strategy::streamed_rows(classes * output.view.dtype.size()));
            }
            buffer.start()
        }
        None => std::ptr::null_mut(),
    };
    for start in range.clone().step_by(len) {
        let count = len.min(range.end - start);
        let (mut losses, mut correct) = (Losses::NONE, 0);
        for (_, span) in call.plan.shape.spans(start, count) {
            let place = Place::of(&span);
            for first in (0..place.len).step_by(width) {
                let part = Part { call, loss, place: place.part(first, width), exps, pitch, room };
                // SAFETY: the rows are the call's and this thread's (# Safety), at most `width` of them.
                unsafe { part.run(&mut state, &mut weights, &mut losses, &mut correct) };
            }
        }
        give(Totals { correct, ..losses.total() });
    }
    if call.streams {
        (call.k.lanes.fence)();
    }
}

/// Adds up `w_c·(x_c - center)` of smoothed rows. The center of a row is its shift. `weights` gives those of some classes,
/// WEIGHED_CLASSES at most: null if each is 1.
///
/// # Safety
/// The rows are those of [`short::sums`](crate::kernels::contiguous::short::sums), which went before, no more than
/// SMOOTHED, in lanes of f32, of elements of `size` bytes, which the kernels are for.
#[cold]
#[inline(never)]
pub unsafe fn dots(
    k: &LogitKernels,
    rows: &ShortRows,
    size: usize,
    state: &mut OrdinaryState,
    mut weights: impl FnMut(usize, usize) -> *const f64,
) {
    // SAFETY: there are as many lanes again (`OrdinaryState`), of whole registers. The sums have set the shifts. The rows
    // have the classes, and these the weights (# Safety).
    unsafe {
        lanes::<f64, _>(&mut state.grad_output, SMOOTHED).write_bytes(0, padded(rows.rows));
        for class in (0..rows.classes).step_by(WEIGHED_CLASSES) {
            let len = WEIGHED_CLASSES.min(rows.classes - class);
            let masses = weights(class, len);
            for row in 0..rows.rows {
                let shift: f32 = *lanes(&mut state.shift, row);
                let center = f64::from(shift) * f32::INVERSE.0;
                let at = (row as isize * rows.pitch + class as isize) * size as isize;
                let chunk = Chunk::new(rows.x.wrapping_offset(at), len, None);
                *lanes::<f64, _>(&mut state.grad_output, SMOOTHED + row) +=
                    (k.dot)(&chunk, center, masses, false).value();
            }
        }
    }
}

/// Some rows that go through the sweeps together.
struct Part<'a> {
    call: &'a Call<'a>,
    loss: &'a Loss,
    place: Place,
    /// Where exponentials are kept, for `place.len` rows; null if the call has no gradient.
    exps: *mut u8,
    /// Lanes from row to row there.
    pitch: usize,
    /// Room of AGAIN_BYTES for rows that are computed again.
    room: *mut u8,
}

impl Part<'_> {
    /// # Safety
    /// The rows are the call's, and no other thread accesses them.
    unsafe fn run(
        &self,
        state: &mut OrdinaryState,
        weights: &mut WeightScratch,
        losses: &mut Losses,
        correct: &mut u64,
    ) {
        let Part { call, loss, place, .. } = *self;
        let span = place.span(0, place.len);
        let wanted = ordinary::wanted(call, loss);
        let mut weights = Weights::new(weights);
        // SAFETY: the rows are the call's and this thread's (# Safety), whose logits the view covers (validation).
        // `read_operands` sets the excluded classes before they are left out, and `finish_ordinary` follows the sums.
        // The processor has the set of the kernels (`Call::k`). Nothing is written over the logits before `write`.
        unsafe {
            ordinary::read_operands(call, loss, state, &span, &wanted);
            let rows = self.rows();
            (call.k.native.short_sums)(&rows, state);
            if wanted.smoothing.is_some() {
                let size = call.plan.logits.dtype.size();
                let read = |class, len| weights.read(call, class, len);
                dots(call.k.native, &rows, size, state, read);
            }
            (call.k.lanes.finish_ordinary)(place.len, state, &wanted);
            ordinary::check_scale(loss, weights.are_usual, state);
            let others = call.wants_entropy || call.rankings.is_some();
            if call.wants_argmax && !others {
                *correct += self.find_largest(state);
            }
            *correct += ordinary::again(call, loss, state, place, others, self.room);
            losses.add(ordinary::values(&mut state.excluded_sum_loss, place.len));
            ordinary::write_results(loss, state, &span);
            if call.plan.output.is_some() {
                self.write(state, &rows, &mut weights);
            }
        }
    }

    /// # Safety
    /// As [`run`](Self::run).
    unsafe fn rows(&self) -> ShortRows {
        let view = &self.call.plan.logits;
        ShortRows {
            // SAFETY: the logits cover class 0 of the rows (validation), which are the call's (# Safety).
            x: unsafe { view.at(self.place.first, 0) }.cast_const(),
            pitch: self.place.strides(view)[0],
            rows: self.place.len,
            classes: self.call.plan.shape.classes,
            exps: self.exps,
            exps_pitch: self.pitch,
        }
    }

    /// Looks for the largest logit of each row; returns how many are those of the targets.
    ///
    /// # Safety
    /// As [`run`](Self::run); the excluded classes were set.
    #[cold]
    #[inline(never)]
    unsafe fn find_largest(&self, state: &mut OrdinaryState) -> u64 {
        let mut correct = 0;
        for i in 0..self.place.len {
            let at = self.place.at(i);
            // SAFETY: the row is the call's, with contiguous classes, and this thread's (# Safety). `short_sums` has
            // set the class of its lane. The result covers all rows (validation).
            unsafe {
                let largest = batch::largest_logit(self.call, at).class;
                let class = ordinary::number(self.call, &mut state.class, i);
                correct += u64::from(class == largest as f64);
                if let Some(view) = &self.loss.argmax {
                    view.write_span(&Span { first: at, axis: Axis::Rows, len: 1 }, &[largest]);
                }
            }
        }
        if self.loss.counts_correct { correct } else { 0 }
    }

    /// Writes the gradient of the rows.
    ///
    /// # Safety
    /// As [`run`](Self::run); the rows are finished, and those that are not ordinary have their gradients.
    unsafe fn write(&self, state: &mut OrdinaryState, rows: &ShortRows, weights: &mut Weights) {
        let call = self.call;
        let Some(output) = &call.plan.output else { return };
        let is_smoothed = self.loss.spreads_smoothing();
        // SAFETY: the arithmetic of the rows has set the lanes; gradients that are not ordinary were written
        // (# Safety).
        let writes = unsafe { ordinary::unwritten(call, state, rows.rows, is_smoothed) };
        let view = &output.view;
        let strides = self.place.strides(view);
        if !call.scatters {
            // SAFETY: the output covers the rows (validation), with contiguous classes, and this thread alone accesses
            // them (# Safety). `short_sums` has kept the exponentials apart from them. The processor has the set of the
            // kernels (`Call::k`).
            unsafe {
                let to = ShortGradient {
                    g: view.at(self.place.first, 0),
                    pitch: strides[0],
                    accumulate: output.accumulate,
                    stream: call.streams,
                    writes,
                    classes: 0..rows.classes,
                    is_smoothed,
                    weights: std::ptr::null(),
                };
                self.gradient(call.k.native_to_output, rows, state, to, weights);
            }
            return;
        }
        // SAFETY: as above, but that the gradient replaces the exponentials, and goes to the output from there.
        unsafe { self.scatter(state, rows, writes, strides, weights) };
    }

    /// Writes the gradient of all classes, those whose weights smoothing needs together.
    ///
    /// # Safety
    /// As [`write`](Self::write), with the kernels for the types of the rows and of the gradient.
    #[inline(always)]
    unsafe fn gradient(
        &self,
        k: &OutputKernels,
        rows: &ShortRows,
        state: &mut OrdinaryState,
        mut to: ShortGradient,
        weights: &mut Weights,
    ) {
        if !(to.is_smoothed && self.call.has_masses) {
            // SAFETY: this function's own # Safety.
            return unsafe { (k.short_gradient)(rows, state, &to) };
        }
        for class in (0..rows.classes).step_by(WEIGHED_CLASSES) {
            let len = WEIGHED_CLASSES.min(rows.classes - class);
            to.classes = class..class + len;
            // SAFETY: this function's own # Safety; the classes are the call's.
            unsafe {
                to.weights = weights.read(self.call, class, len);
                (k.short_gradient)(rows, state, &to);
            }
        }
    }

    /// Writes the gradient of rows whose classes are apart in the output.
    ///
    /// # Safety
    /// As [`write`](Self::write), for rows that have a bit in `writes`.
    #[cold]
    #[inline(never)]
    unsafe fn scatter(
        &self,
        state: &mut OrdinaryState,
        rows: &ShortRows,
        writes: [u64; WORDS],
        strides: [isize; 2],
        weights: &mut Weights,
    ) {
        let call = self.call;
        let Some(output) = &call.plan.output else { return };
        let to = ShortGradient {
            g: rows.exps,
            pitch: rows.exps_pitch as isize,
            accumulate: false,
            stream: false,
            writes,
            classes: 0..rows.classes,
            is_smoothed: self.loss.spreads_smoothing(),
            weights: std::ptr::null(),
        };
        // SAFETY: the buffer has room for all rows (`run`). The processor has the set of the kernels (`Call::k`).
        unsafe { self.gradient(call.k.native_to_lanes, rows, state, to, weights) };
        let lane_size = call.plan.logits.dtype.lane_size();
        for row in (0..rows.rows).filter(|row| writes[row / 64] >> (row % 64) & 1 == 1) {
            for class in (0..rows.classes).step_by(TILE) {
                // Of one row, classes lie side by side as the distributions of a tile do.
                let tile = Tile {
                    x: rows.exps.wrapping_add((row * rows.exps_pitch + class) * lane_size),
                    pitch: rows.exps_pitch,
                    lanes: TILE.min(rows.classes - class),
                    first: 0,
                    classes: 1,
                };
                // SAFETY: the output covers the classes of the row (validation), this thread's alone (# Safety); the
                // tile is in the buffer. The processor has the set of the kernels (`Call::k`).
                unsafe {
                    (call.k.converted_to_output.scatter)(
                        &tile,
                        output.view.at(self.place.at(row), class),
                        [strides[1], strides[0]],
                        output.accumulate,
                        !0,
                    );
                }
            }
        }
    }
}
