//! Strips of distributions: losses over class indices whose logits are read once.
//!
//! A strip goes through one sweep over its classes and the arithmetic of ordinary rows. Lanes that are not
//! ordinary are computed again as a tile ([`ordinary::again`]).

use super::call::Call;
use super::ordinary::{self, WeightScratch, Weights};
use super::place::Place;
use super::strided::AGAIN_BYTES;
use super::totals::{GroupTotals, Totals};
use crate::kernels::OutputKernels;
use crate::kernels::ordinary::{OrdinaryState, WORDS, padded};
use crate::kernels::row_math::ROWS;
use crate::kernels::scratch::Scratch;
use crate::kernels::strided::strip::{self, Strip, StripGradient};
use crate::kernels::strided::tile::Tile;
use crate::plan::Loss;
use crate::strategy::{self, HEAP_STRIP_BYTES, STRIP_BYTES, TILE, TILE_CLASSES, WEIGHED_CLASSES};
use crate::view::{Axis, ElementType, Span};
use std::ops::Range;

/// What goes through the sweeps of a strip's classes.
struct Strips<'a> {
    call: &'a Call<'a>,
    loss: &'a Loss,
    /// Distributions of a strip.
    width: usize,
    /// Classes that are in the buffer together, if any are: all of them, or a multiple of four.
    chunk: usize,
    /// Logits are brought into the buffer, since distributions do not lie side by side.
    gathers: bool,
    /// Gradients are brought from the buffer to where they go.
    scatters: bool,
    /// The buffer keeps the exponentials of all classes for the gradient.
    keeps: bool,
    /// The distributions are smoothed.
    is_smoothed: bool,
    /// Classes whose weights smoothing reads at a time: all of a chunk if there are none.
    weighed: usize,
    /// Room for the classes of a chunk, of `width` distributions.
    buffer: *mut u8,
    /// Room of [`AGAIN_BYTES`] for lanes that are computed again.
    room: *mut u8,
}

/// Runs a range of a plan's tiles as strips; returns the sums over their rows.
///
/// # Safety
/// The plan is a loss that [`Call::has_ordinary_rows`] is set for. The tiles are the call's, by [`Place::count`]; no
/// other thread accesses their distributions.
pub unsafe fn strips(call: &Call, loss: &Loss, axis: Axis, range: Range<usize>) -> Totals {
    let mut stack = Scratch::<{ (STRIP_BYTES + AGAIN_BYTES) / 8 }>::new();
    let mut heap = Vec::<Scratch<8>>::new();
    let room = stack.start().wrapping_add(STRIP_BYTES);
    let mut strips = Strips::new(call, loss, axis, stack.start(), STRIP_BYTES, room);
    let elements = range.len().saturating_mul(TILE * call.plan.shape.classes);
    let lane_bytes = call.plan.shape.classes * call.plan.logits.dtype.lane_size();
    // Where there is no such memory, exponentials are computed twice.
    if call.plan.output.is_some()
        && !(strips.gathers || strips.scatters)
        && strategy::keeps_on_heap(lane_bytes, elements)
        && heap.try_reserve_exact(HEAP_STRIP_BYTES / size_of::<Scratch<8>>()).is_ok()
    {
        let buffer = heap.as_mut_ptr().cast();
        strips = Strips::new(call, loss, axis, buffer, HEAP_STRIP_BYTES, room);
    }
    let mut state = OrdinaryState::new();
    let mut weights = WeightScratch::new();
    let mut totals = GroupTotals::ZERO;
    let mut index = range.start;
    while index < range.end {
        let (place, tiles) = Place::run(&call.plan.shape, axis, index, range.end);
        for start in (0..place.len).step_by(strips.width) {
            let part = place.part(start, strips.width);
            let next = (start + strips.width < place.len).then_some(strips.width);
            // SAFETY: `Place::run` gives tiles of the call and `part` at most `width` of their distributions, which no
            // other thread accesses (# Safety).
            unsafe { strips.run(&mut state, &mut weights, part, next, &mut totals) };
        }
        index += tiles;
    }
    if call.streams {
        (call.k.lanes.fence)();
    }
    totals.total()
}

impl<'a> Strips<'a> {
    fn new(
        call: &'a Call<'a>,
        loss: &'a Loss,
        axis: Axis,
        buffer: *mut u8,
        bytes: usize,
        room: *mut u8,
    ) -> Self {
        let (plan, along) = (call.plan, call.plan.shape.along(axis));
        let classes = plan.shape.classes;
        let lane = plan.logits.dtype.lane_size();
        let apart = |stride: isize| along > 1 && stride != 1;
        let gathers = apart(plan.logits.stride_along(axis));
        let scatters = plan.output.is_some_and(|output| apart(output.view.stride_along(axis)));
        let moves = gathers || scatters;
        let most = ordinary::most(loss, plan.logits.dtype);
        let fitting = (bytes / (classes * lane)).min(most) / padded(1) * padded(1);
        let holds = (moves || plan.output.is_some()) && fitting >= if moves { 1 } else { TILE };
        let (width, chunk) = match (holds, moves) {
            (true, _) => (fitting, classes),
            (false, true) => (TILE, bytes / (TILE * lane) / strip::GROUP * strip::GROUP),
            (false, false) => (most, classes),
        };
        let keeps = plan.output.is_some() && holds;
        let is_smoothed = loss.spreads_smoothing();
        let weighed = if is_smoothed && call.has_masses { WEIGHED_CLASSES } else { chunk };
        Strips {
            call,
            loss,
            width,
            chunk,
            gathers,
            scatters,
            keeps,
            is_smoothed,
            weighed,
            buffer,
            room,
        }
    }

    /// Runs a strip; adds its losses to the totals. `next`: how many distributions from here the next one
    /// begins, if there is one.
    ///
    /// # Safety
    /// The place is the call's, at most `width` long, and no other thread accesses its distributions.
    unsafe fn run(
        &self,
        state: &mut OrdinaryState,
        weights: &mut WeightScratch,
        place: Place,
        next: Option<usize>,
        totals: &mut GroupTotals,
    ) {
        let (call, loss) = (self.call, self.loss);
        let span = place.span(0, place.len);
        let wanted = ordinary::wanted(call, loss);
        let mut weights = Weights::new(weights);
        // SAFETY: the distributions are the call's and this thread's (# Safety), the classes the call's.
        // `read_operands` sets the excluded classes before they are left out, and the sums are complete before
        // `finish_ordinary`. The processor has the set of the kernels (`Call::k`).
        unsafe {
            ordinary::read_operands(call, loss, state, &span, &wanted);
            for first in (0..call.plan.shape.classes).step_by(self.chunk) {
                let strip = self.strip(place, first, next, true);
                let k = if self.gathers { call.k.converted } else { call.k.native };
                if !self.is_smoothed {
                    (k.strip_sums)(&strip, state);
                    continue;
                }
                for start in (0..strip.classes).step_by(self.weighed) {
                    let part = self.part(&strip, start, &mut weights);
                    (k.strip_dots)(&part, state);
                    (k.strip_sums)(&part, state);
                }
            }
            (call.k.lanes.finish_ordinary)(place.len, state, &wanted);
        }
        ordinary::check_scale(loss, weights.are_usual, state);
        // SAFETY: the distributions are the call's and this thread's (# Safety); `finish_ordinary` above has finished
        // their sums. No gradient is written before `write`.
        unsafe {
            let others = call.wants_argmax || call.wants_entropy || call.rankings.is_some();
            totals.rest.correct += ordinary::again(call, loss, state, place, others, self.room);
            self.hand_out(state, &span, totals);
            if call.plan.output.is_some() {
                self.write(state, place, &mut weights);
            }
        }
    }

    /// Some classes of a strip from its class `start` on, with their weights.
    ///
    /// # Safety
    /// As [`run`](Self::run); the strip is of the call, and has the class.
    #[inline(always)]
    unsafe fn part(&self, strip: &Strip, start: usize, weights: &mut Weights) -> Strip {
        let len = self.weighed.min(strip.classes - start);
        let weights = match self.call.has_masses {
            // SAFETY: the classes are the call's (# Safety), and no more than WEIGHED_CLASSES (`Strips::new`).
            true => unsafe { weights.read(self.call, strip.first + start, len) },
            false => std::ptr::null(),
        };
        let dtype = self.call.plan.logits.dtype;
        let size = if self.gathers { dtype.lane_size() } else { dtype.size() };
        strip.part(start, len, [size, dtype.lane_size()], weights)
    }

    /// Some classes of a strip: in place, or in the buffer, where `fills` brings them.
    ///
    /// # Safety
    /// As [`run`](Self::run); `first` is a class of the call.
    unsafe fn strip(&self, place: Place, first: usize, next: Option<usize>, fills: bool) -> Strip {
        let view = &self.call.plan.logits;
        let classes = self.chunk.min(self.call.plan.shape.classes - first);
        // SAFETY: the logits cover the classes (validation) of the strip's first distribution, which is the call's
        // (# Safety).
        let from = unsafe { view.at(place.first, first) };
        let strides = place.strides(view);
        let pitch = padded(place.len);
        let exps = if self.keeps { self.buffer } else { std::ptr::null_mut() };
        if !self.gathers {
            let ahead = next.map_or(0, |next| next as isize);
            let (x, lanes) = (from.cast_const(), place.len);
            return Strip {
                x,
                pitch: strides[1],
                lanes,
                first,
                classes,
                ahead,
                exps,
                exps_pitch: pitch,
                is_smoothed: self.is_smoothed,
                weights: std::ptr::null(),
            };
        }
        if fills {
            for (tile, _, offset) in self.pieces(place, pitch, first, classes, strides) {
                let offset = offset * view.dtype.size() as isize;
                // SAFETY: the logits cover the classes (validation) of the distributions (# Safety). The buffer has
                // room for the classes of a chunk, of `width` distributions (`Strips::new`). The processor has the set
                // of the kernels (`Call::k`).
                unsafe {
                    (self.call.k.native.gather)(&tile, from.wrapping_offset(offset), strides);
                }
            }
        }
        Strip {
            x: self.buffer.cast_const(),
            pitch: pitch as isize,
            lanes: place.len,
            first,
            classes,
            ahead: 0,
            exps,
            exps_pitch: pitch,
            is_smoothed: self.is_smoothed,
            weights: std::ptr::null(),
        }
    }

    /// A chunk of a strip in the buffer, cut into tiles to be transposed: each with its first lane, and with the
    /// elements from the chunk to the tile in an operand of these strides.
    fn pieces(
        &self,
        place: Place,
        pitch: usize,
        first: usize,
        classes: usize,
        strides: [isize; 2],
    ) -> impl Iterator<Item = (Tile, usize, isize)> {
        let (buffer, lane_size) = (self.buffer, self.call.plan.logits.dtype.lane_size());
        (0..classes).step_by(TILE_CLASSES).flat_map(move |class| {
            (0..place.len).step_by(TILE).map(move |lane| {
                let tile = Tile {
                    x: buffer.wrapping_add((class * pitch + lane) * lane_size),
                    pitch,
                    lanes: TILE.min(place.len - lane),
                    first: first + class,
                    classes: TILE_CLASSES.min(classes - class),
                };
                (tile, lane, lane as isize * strides[0] + class as isize * strides[1])
            })
        })
    }

    /// Writes the results of a strip, and adds its losses to the totals.
    ///
    /// # Safety
    /// As [`run`](Self::run); the losses are complete.
    #[inline(always)]
    unsafe fn hand_out(&self, state: &mut OrdinaryState, span: &Span, totals: &mut GroupTotals) {
        let groups = span.len.div_ceil(ROWS);
        // SAFETY: `run` has called `finish_ordinary` and `again`, which set the losses of the span (# Safety). The
        // array has room for the most lanes (`OrdinaryState`), a multiple of ROWS, and a strip has no more
        // (`Strips::new`). The processor has the set of the kernels (`Call::k`).
        unsafe {
            let losses = state.excluded_sum_loss.start().cast::<f64>();
            for lane in span.len..groups * ROWS {
                losses.add(lane).write(0.0);
            }
            (self.call.k.lanes.add_losses)(losses, groups, &mut totals.losses);
        }
        // SAFETY: `run` has called `finish_ordinary` and `again`, which set the losses of the span, and the lse if it
        // is wanted (# Safety); this thread alone accesses the results (# Safety).
        unsafe { ordinary::write_results(self.loss, state, span) };
    }

    /// Writes the gradient of a strip.
    ///
    /// # Safety
    /// As [`run`](Self::run); the strip is finished.
    unsafe fn write(&self, state: &mut OrdinaryState, place: Place, weights: &mut Weights) {
        let call = self.call;
        let Some(output) = &call.plan.output else { return };
        let view = &output.view;
        // SAFETY: the strip is finished (# Safety): `finish_ordinary` has set the coefficients of its lanes, and
        // `again` has written the gradients of those that are not ordinary.
        let writes = unsafe { ordinary::unwritten(call, state, place.len, self.is_smoothed) };
        let strides = place.strides(view);
        let lane_size = call.plan.logits.dtype.lane_size();
        for first in (0..call.plan.shape.classes).step_by(self.chunk) {
            // SAFETY: the classes are the call's, and the output covers them (validation), this thread's alone
            // (# Safety). The strip is finished (# Safety), with the exponentials of all classes in the buffer if it
            // keeps them; else the buffer has room for a chunk (`Strips::new`). The processor has the set of the
            // kernels (`Call::k`).
            unsafe {
                let strip = self.strip(place, first, None, !self.keeps);
                let to = view.at(place.first, first);
                if !self.scatters {
                    let k = if self.gathers {
                        call.k.converted_to_output
                    } else {
                        call.k.native_to_output
                    };
                    let shape = &call.plan.shape;
                    let bytes = shape.distributions() * shape.classes * view.dtype.size();
                    let strip_bytes = strip.lanes * strip.classes * lane_size;
                    let gradient = StripGradient {
                        g: to,
                        pitch: strides[1],
                        accumulate: output.accumulate,
                        stream: call.streams,
                        padded: false,
                        is_far: strategy::is_far(output.in_place, bytes, strip_bytes),
                        writes,
                    };
                    self.gradient(k, &strip, state, gradient, view.dtype.size(), weights);
                    continue;
                }
                let k =
                    if self.gathers { call.k.converted_to_lanes } else { call.k.native_to_lanes };
                let pitch = strip.exps_pitch;
                let gradient = StripGradient {
                    g: self.buffer,
                    pitch: pitch as isize,
                    accumulate: false,
                    stream: false,
                    padded: self.keeps,
                    is_far: false,
                    writes: [!0; WORDS],
                };
                self.gradient(k, &strip, state, gradient, lane_size, weights);
                for (tile, lane, offset) in self.pieces(place, pitch, first, strip.classes, strides)
                {
                    let to = to.wrapping_offset(offset * view.dtype.size() as isize);
                    let writes = writes[lane / TILE];
                    (call.k.converted_to_output.scatter)(
                        &tile,
                        to,
                        strides,
                        output.accumulate,
                        writes,
                    );
                }
            }
        }
    }

    /// Writes the gradient of some classes of a strip.
    ///
    /// # Safety
    /// As [`write`](Self::write); the strip is of the call, and the kernels are those for its type and the gradient's.
    #[inline(always)]
    unsafe fn gradient(
        &self,
        k: &OutputKernels,
        strip: &Strip,
        state: &mut OrdinaryState,
        to: StripGradient,
        size: usize,
        weights: &mut Weights,
    ) {
        if !self.is_smoothed {
            // SAFETY: this function's own # Safety.
            return unsafe { (k.strip_gradient)(strip, state, &to) };
        }
        for start in (0..strip.classes).step_by(self.weighed) {
            let g = to.g.wrapping_offset(start as isize * to.pitch * size as isize);
            // SAFETY: this function's own # Safety; the class is one of the strip's.
            unsafe {
                let part = self.part(strip, start, weights);
                (k.strip_gradient)(&part, state, &StripGradient { g, ..to });
            }
        }
    }
}
