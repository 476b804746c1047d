//! Tiles of distributions: logits whose classes are few, or not contiguous.

use super::call::{Call, Excluded};
use super::masses;
use super::operands;
use super::place::Place;
use super::ranking;
use super::shards;
use super::totals::{GroupTotals, Totals};
use crate::kernels::contiguous::gradient::split_factor;
use crate::kernels::row_math::{ROWS, RowGroup, RowGroupExtras, RowInputs, RowLanes, is_far_below};
use crate::kernels::row_state::ArgMax;
use crate::kernels::scratch::Scratch;
use crate::kernels::strided::gradient::TileGradient;
use crate::kernels::strided::reduce::{Masses, TileMaxima};
use crate::kernels::strided::tile::{GROUPS, Tile};
use crate::math::compensated::CompensatedSum;
use crate::plan::{Loss, Targets};
use crate::strategy::{STRIP_BYTES, TILE, TILE_CLASSES};
use crate::view::{Axis, FloatType, Position};
use std::mem::MaybeUninit;
use std::ops::Range;

/// Distributions that [`again`] computes at most: few, for a strip's numbers are on the stack too.
pub const AGAIN: usize = 16;

/// Bytes of their buffer: a chunk of f32.
pub const AGAIN_BYTES: usize = AGAIN * TILE_CLASSES * size_of::<f32>();

/// Distributions of a dtype whose chunk fits that buffer.
pub fn again_len(dtype: FloatType) -> usize {
    AGAIN_BYTES / (TILE_CLASSES * dtype.lane_size())
}

/// Copies of what cannot stay where it is: logits, which gradients replace, their slopes, and masses.
#[derive(Clone, Copy)]
struct Buffers {
    x: *mut u8,
    slope: *mut u8,
    mass: *mut f64,
    /// Distributions of a tile at most, and from class to class.
    width: usize,
    /// Classes of logits that there is room for, at least those of a chunk.
    classes: usize,
}

impl Buffers {
    /// Buffers in [`TILE_BYTES`] bytes. The more a distribution needs, the fewer a tile has.
    fn new(call: &Call, start: *mut u8) -> Self {
        let lane = call.plan.logits.dtype.lane_size();
        let by_row = call.has_masses && call.loss.is_some_and(Loss::has_probabilities);
        let slope = if call.plan.transform().is_some() { TILE_CLASSES * lane } else { 0 };
        let mass = if by_row { TILE_CLASSES * size_of::<f64>() } else { 0 };
        let mut width = TILE;
        while width * (TILE_CLASSES * lane + slope + mass) > STRIP_BYTES {
            width /= 2;
        }
        // Masses of the classes alone are there once for all distributions.
        let masses = if by_row { width * mass } else { TILE_BYTES - STRIP_BYTES };
        let slopes = start.wrapping_add(masses);
        let x = slopes.wrapping_add(width * slope);
        let left = TILE_BYTES - masses - width * slope;
        Buffers { x, slope: slopes, mass: start.cast(), width, classes: left / (width * lane) }
    }
}

/// Bytes of a tile's buffers: those of a strip, and a mass for each class.
const TILE_BYTES: usize = STRIP_BYTES + TILE_CLASSES * size_of::<f64>();

/// Whether all tiles of a call are read and written in place, with nothing beside them.
fn needs_no_buffers(call: &Call, axis: Axis) -> bool {
    // Every tile has one distribution, or the strides decide.
    let len = call.plan.shape.along(axis).min(2);
    let place = Place { axis, first: Position::FIRST, len };
    let output = call.plan.output.as_ref().is_none_or(|output| place.is_in_place(&output.view));
    let logits = place.is_in_place(&call.plan.logits);
    logits && output && call.plan.transform().is_none() && !call.has_masses
}

/// What options need of the rows of a tile.
struct TileExtras<'a> {
    groups: &'a mut [RowGroupExtras],
    argmax: &'a mut [[usize; ROWS]],
    largest: &'a mut [[ArgMax; ROWS]],
}

/// The same for `N` groups.
struct ExtrasOf<const N: usize> {
    groups: [RowGroupExtras; N],
    argmax: [[usize; ROWS]; N],
    largest: [[ArgMax; ROWS]; N],
}

impl<const N: usize> ExtrasOf<N> {
    const NONE: Self = ExtrasOf {
        groups: [RowGroupExtras::NONE; N],
        argmax: [[0; ROWS]; N],
        largest: [[ArgMax::NONE; ROWS]; N],
    };

    fn lend(&mut self) -> TileExtras<'_> {
        let ExtrasOf { groups, argmax, largest } = self;
        TileExtras { groups, argmax, largest }
    }
}

impl TileExtras<'_> {
    /// Whether a call needs them.
    fn are_needed(call: &Call) -> bool {
        call.excluded == Excluded::Largest
            || call.wants_argmax
            || call.wants_entropy
            || call.has_bonus
            || call.spreads_mass
            || call.has_masses
            || call.loss.is_some_and(|loss| {
                let grad_output = loss.gradient.as_ref().and_then(|of| of.grad_output.as_ref());
                loss.transform.is_some() || loss.row_weights.is_some() || grad_output.is_some()
            })
    }
}

/// What the sweeps over tiles work with. On the plain path they touch eight numbers of a row's group, and
/// some bits.
struct Sweeper<'a> {
    call: &'a Call<'a>,
    place: Place,
    /// None where tiles [need none](needs_no_buffers).
    buffers: Option<Buffers>,
    groups: &'a mut [RowGroup],
    /// None where [no option needs them](TileExtras::are_needed).
    extras: Option<TileExtras<'a>>,
}

/// Runs a range of a plan's tiles; returns the sums over their rows.
///
/// # Safety
/// The tiles are the call's, by [`Place::count`]; no other thread accesses their distributions.
pub unsafe fn tiles(call: &Call, axis: Axis, range: Range<usize>) -> Totals {
    // SAFETY: this function's own # Safety.
    unsafe {
        if TileExtras::are_needed(call) {
            tiles_with_extras(call, axis, range)
        } else {
            tiles_in_place_or_not(call, axis, range, None)
        }
    }
}

/// A function of its own, for its extras: the stack frame of the plain path stays small.
///
/// # Safety
/// As [`tiles`].
#[inline(never)]
unsafe fn tiles_with_extras(call: &Call, axis: Axis, range: Range<usize>) -> Totals {
    // Those of a few distributions are a few kilobytes less to fill.
    let count = register_groups(TILE.min(call.plan.shape.along(axis)));
    let mut groups = [const { MaybeUninit::<RowGroupExtras>::uninit() }; GROUPS];
    let mut argmax = [const { MaybeUninit::<[usize; ROWS]>::uninit() }; GROUPS];
    let mut largest = [const { MaybeUninit::<[ArgMax; ROWS]>::uninit() }; GROUPS];
    let extras = TileExtras {
        groups: fill(&mut groups, count, RowGroupExtras::NONE),
        argmax: fill(&mut argmax, count, [0; ROWS]),
        largest: fill(&mut largest, count, [ArgMax::NONE; ROWS]),
    };
    // SAFETY: this function's own # Safety.
    unsafe { tiles_in_place_or_not(call, axis, range, Some(extras)) }
}

/// # Safety
/// As [`tiles`]; there are extras if the call needs them.
#[inline(always)]
unsafe fn tiles_in_place_or_not(
    call: &Call,
    axis: Axis,
    range: Range<usize>,
    extras: Option<TileExtras>,
) -> Totals {
    // SAFETY: this function's own # Safety.
    unsafe {
        if needs_no_buffers(call, axis) {
            tiles_with(call, axis, range, None, extras)
        } else {
            tiles_with_buffers(call, axis, range, extras)
        }
    }
}

/// A function of its own, for its buffers: their frame is probed page by page wherever it is set up.
///
/// # Safety
/// As [`tiles`]; there are extras if the call needs them.
#[inline(never)]
unsafe fn tiles_with_buffers(
    call: &Call,
    axis: Axis,
    range: Range<usize>,
    extras: Option<TileExtras>,
) -> Totals {
    let mut room = Scratch::<{ TILE_BYTES / 8 }>::new();
    let buffers = Buffers::new(call, room.start());
    // SAFETY: this function's own # Safety; the buffers live as long as the call.
    unsafe { tiles_with(call, axis, range, Some(buffers), extras) }
}

/// # Safety
/// As [`tiles`]; there are buffers and options where the call needs them.
unsafe fn tiles_with(
    call: &Call,
    axis: Axis,
    range: Range<usize>,
    buffers: Option<Buffers>,
    extras: Option<TileExtras>,
) -> Totals {
    let mut totals = GroupTotals::ZERO;
    let width = buffers.map_or(TILE, |buffers| buffers.width);
    let count = register_groups(width.min(call.plan.shape.along(axis)));
    let mut groups = [const { MaybeUninit::<RowGroup>::uninit() }; GROUPS];
    let groups = fill(&mut groups, count, RowGroup::EMPTY);
    let place = Place::new(&call.plan.shape, axis, range.start);
    let mut sweeper = Sweeper { call, place, buffers, groups, extras };
    for index in range {
        let tile = Place::new(&call.plan.shape, axis, index);
        for start in (0..tile.len).step_by(width) {
            sweeper.place = tile.part(start, width);
            // SAFETY: the tile is the call's, and no other thread accesses it (# Safety).
            unsafe { sweeper.run(&mut totals) };
        }
    }
    totals.total()
}

/// What [`again`] finds out about the distributions of a place.
pub struct Again<'a> {
    /// The losses of some.
    pub loss: &'a mut [f64],
    /// The lse of the same.
    pub lse: &'a mut [f64],
    /// Of all, if it is asked for.
    pub entropy: [f64; AGAIN],
    /// Likewise.
    pub argmax: [usize; AGAIN],
}

/// Computes some distributions of a place, at most [`again_len`] long, as a tile: the losses and lse of those with
/// a bit in `losses`, the gradients of those with a bit in `gradients`, and of all of them what a strip does
/// not find out.
///
/// # Safety
/// The place is the call's, a loss over class indices without a transform. No other thread accesses its
/// distributions. `buffer` has [`AGAIN_BYTES`] bytes.
#[cold]
#[inline(never)]
pub unsafe fn again(
    call: &Call,
    place: Place,
    losses: u64,
    gradients: u64,
    buffer: *mut u8,
    to: &mut Again,
) {
    let mut masses = [0.0; TILE_CLASSES];
    let mut extras = ExtrasOf::<{ AGAIN / ROWS }>::NONE;
    let mut groups = [RowGroup::EMPTY; AGAIN / ROWS];
    let buffers = Buffers {
        x: buffer,
        slope: std::ptr::null_mut(),
        mass: masses.as_mut_ptr(),
        width: again_len(call.plan.logits.dtype),
        classes: TILE_CLASSES,
    };
    let mut sweeper = Sweeper {
        call,
        place,
        buffers: Some(buffers),
        groups: &mut groups,
        extras: TileExtras::are_needed(call).then(|| extras.lend()),
    };
    // SAFETY: this function's own # Safety; the sums are complete before the rows are finished, and these
    // before the gradient is written, which is when the logits are no longer needed.
    unsafe {
        if call.wants_argmax {
            sweeper.find_largest();
        }
        let computes = losses | gradients != 0 || call.wants_entropy;
        let mut reduced = false;
        if computes {
            let (exps, reduces) = sweeper.read_operands(place.len.div_ceil(ROWS));
            if reduces {
                sweeper.reduce(exps);
            }
            sweeper.finish(place.len.div_ceil(ROWS));
            reduced = reduces;
        }
        for lane in (0..place.len).filter(|lane| losses >> lane & 1 == 1) {
            let results = &sweeper.groups[lane / ROWS].results;
            (to.loss[lane], to.lse[lane]) = (results.loss[lane % ROWS], results.lse[lane % ROWS]);
        }
        if call.rankings.is_some() {
            ranking::rank(call, &place, to.lse);
        }
        if computes {
            sweeper.write(reduced, gradients);
        }
    }
    for lane in 0..place.len {
        let (group, row) = (lane / ROWS, lane % ROWS);
        let results = &groups[group].results;
        (to.entropy[lane], to.argmax[lane]) = (results.entropy[row], extras.argmax[group][row]);
    }
}

/// Groups that hold `lanes` distributions in whole registers, of at most 16 lanes.
fn register_groups(lanes: usize) -> usize {
    lanes.next_multiple_of(16) / ROWS
}

/// The first `count` of some places, filled with a value.
fn fill<T: Copy>(places: &mut [MaybeUninit<T>; GROUPS], count: usize, value: T) -> &mut [T] {
    places[..count].iter_mut().for_each(|place| {
        place.write(value);
    });
    // SAFETY: the loop above has written the first `count` places.
    unsafe { std::slice::from_raw_parts_mut(places.as_mut_ptr().cast(), count) }
}

/// Every unsafe method asks that the place is a tile of the call, whose distributions no other thread
/// accesses, with buffers and options where the call needs them.
impl Sweeper<'_> {
    /// Runs the tile; adds its losses to the totals.
    ///
    /// # Safety
    /// See above.
    unsafe fn run(&mut self, totals: &mut GroupTotals) {
        let call = self.call;
        let used = self.place.len.div_ceil(ROWS);
        if call.excluded == Excluded::Largest || call.wants_argmax {
            // SAFETY: this function's own # Safety.
            unsafe { self.find_largest() };
        }
        // SAFETY: this function's own # Safety.
        let (exps, reduces) = unsafe { self.read_operands(used) };
        if reduces {
            // SAFETY: this function's own # Safety.
            unsafe { self.reduce(exps) };
        }
        // SAFETY: this function's own # Safety; the sums are complete, then the rows are finished.
        unsafe {
            self.finish(used);
            self.hand_out(used, totals);
            if call.rankings.is_some() {
                for (i, group) in self.groups[..used].iter().enumerate() {
                    let place = self.place.part(i * ROWS, ROWS);
                    ranking::rank(call, &place, &group.results.lse);
                }
            }
            self.write(reduces, !0);
        }
    }

    /// Reads the operands of the first `used` groups; returns whether exponentials are to be summed, and
    /// whether there is a first sweep at all.
    ///
    /// # Safety
    /// See above.
    unsafe fn read_operands(&mut self, used: usize) -> (bool, bool) {
        let (call, place) = (self.call, self.place);
        // The first sweep finds the excluded logits by the way, unless they are needed before.
        let reads_excluded = call.spreads_mass
            || call.plan.transform().is_some()
            || call.from_lse
            || !call.takes_exps;
        let (mut exps, mut reduces) = (false, false);
        // Those of lanes without a distribution too: a register may span two groups.
        for group in &mut self.groups[..register_groups(place.len)] {
            group.sums.clear_shift_logits();
        }
        for i in 0..used {
            let span = place.span(i * ROWS, ROWS);
            let inputs = &mut self.groups[i].inputs;
            if span.len < ROWS {
                *inputs = RowInputs::EMPTY;
            }
            let (mut factors, mut largest) = (None, &[][..]);
            if let Some(extras) = &mut self.extras {
                let group = &mut extras.groups[i];
                (group.weighted.dot, group.weighted.error) = ([0.0; ROWS], [0.0; ROWS]);
                factors = Some(&mut group.factors);
                largest = &extras.largest[i][..];
            }
            // SAFETY: the distributions are the call's and this thread's (# Safety).
            unsafe {
                masses::read_teacher(call, &span);
                operands::read(call, &span, 0, inputs, factors.as_deref_mut(), largest);
                if reads_excluded {
                    inputs.x_y = [f64::NEG_INFINITY; ROWS];
                    operands::read_excluded_logits(call, &span, 0, inputs);
                }
            }
            if let Some(factors) = factors {
                operands::transform_excluded(call, inputs, factors, 0..ROWS);
            }
            if !exps || !reduces {
                exps |= (0..span.len).any(|row| operands::needs_exps(call, inputs, row));
                reduces |= (0..span.len).any(|row| operands::needs_reduction(call, inputs, row));
            }
        }
        (exps, reduces)
    }

    fn buffers(&self) -> Buffers {
        self.buffers.expect("buffers where tiles do not stay where they are")
    }

    /// Bytes of a class in the buffers.
    fn pitch(&self) -> usize {
        self.buffers().width * self.call.plan.logits.dtype.lane_size()
    }

    /// Whether the buffer holds all classes side by side from the first sweep to the second.
    fn holds(&self) -> bool {
        let Some(buffers) = self.buffers else { return false };
        let alone = self.call.plan.transform().is_some() || self.call.plan.output.is_none();
        let most = if alone { TILE_CLASSES } else { buffers.classes };
        self.call.plan.shape.classes <= most
    }

    /// Whether tiles are read where they are.
    fn stays(&self) -> bool {
        let plan = self.call.plan;
        self.place.is_in_place(&plan.logits) && plan.transform().is_none()
    }

    /// The tile's classes from `first` on, as stored but in the lanes' own type. `seen`: the first sweep
    /// has brought them into the buffer, if they go there.
    ///
    /// # Safety
    /// See above; `first` is a class of the call.
    unsafe fn tile(&mut self, first: usize, seen: bool) -> Tile {
        let (call, place) = (self.call, self.place);
        let (view, lanes) = (&call.plan.logits, place.len);
        let classes = TILE_CLASSES.min(call.plan.shape.classes - first);
        let strides = place.strides(view);
        // SAFETY: the logits cover the class of the tile's first distribution (validation).
        let from = unsafe { view.at(place.first, first) };
        if self.stays() {
            return Tile { x: from, pitch: strides[1] as usize, lanes, first, classes };
        }
        let at = if self.holds() { first * self.pitch() } else { 0 };
        let x = self.buffers().x.wrapping_add(at);
        let tile = Tile { x, pitch: self.buffers().width, lanes, first, classes };
        if !seen {
            // SAFETY: the logits cover the tile (validation); the buffer has room for a chunk, or for all classes if it
            // holds them (`Buffers::new`). The processor has the set of the kernels (`Call::k`).
            unsafe { (call.k.native.gather)(&tile, from, strides) };
        }
        tile
    }

    /// Scales and caps a tile, with the slopes beside it.
    ///
    /// # Safety
    /// See above; the tile is in the buffer.
    unsafe fn transform(&mut self, tile: &Tile) {
        let Some(with) = self.call.plan.transform() else { return };
        for c in 0..tile.classes {
            let at = c * self.pitch();
            // SAFETY: the tile is in the buffer (# Safety), and both buffers have room for a chunk of a tile
            // (`Buffers::new`). The processor has the set of the kernels (`Call::k`).
            unsafe {
                let (x, slope) = (tile.x.add(at), self.buffers().slope.add(at));
                (self.call.k.lanes.transform)(x, tile.lanes, with, slope);
            }
        }
    }

    /// The masses of a tile; adds up those of probability targets.
    ///
    /// # Safety
    /// See above; the tile has classes of the call.
    unsafe fn masses(&mut self, tile: &Tile, total: Option<&mut [CompensatedSum; TILE]>) -> Masses {
        let (call, place) = (self.call, self.place);
        if !call.has_masses {
            return Masses::ONE;
        }
        let Buffers { mass: to, width, .. } = self.buffers();
        let mut row = [0.0; TILE_CLASSES];
        let row = &mut row[..tile.classes];
        match call.loss.map(|loss| &loss.targets) {
            Some(Targets::Probabilities(_)) => {
                let mut none = [CompensatedSum::ZERO; TILE];
                let total = total.unwrap_or(&mut none);
                // Lanes without a distribution are read with the others.
                // SAFETY: the buffer has room for `width` masses of each class of a chunk, where they differ by row
                // (`Buffers::new`).
                unsafe { to.write_bytes(0, tile.classes * width) };
                for (lane, total) in total[..tile.lanes].iter_mut().enumerate() {
                    // SAFETY: the distribution and the classes are the call's (# Safety).
                    unsafe { masses::read(call, place.at(lane), tile.first, row) };
                    for (c, &m) in row.iter().enumerate() {
                        // SAFETY: `c` is below the tile's classes, by `row`, and `lane` below its lanes, at most
                        // `width` (`tiles_with`, `again`): the buffer has room for their masses (`Buffers::new`).
                        unsafe { to.add(c * width + lane).write(m) };
                        total.add(m);
                    }
                }
                Masses { data: to, pitch: width }
            }
            Some(Targets::Indices(_) | Targets::Absent) | None => {
                // SAFETY: the distribution and the classes are the call's (# Safety); the buffer has room for a mass of
                // each class of a chunk (`Buffers::new`).
                unsafe {
                    masses::read(call, place.first, tile.first, row);
                    to.copy_from_nonoverlapping(row.as_ptr(), row.len());
                }
                Masses { data: to, pitch: 0 }
            }
        }
    }

    /// Finds the largest logits of the rows.
    ///
    /// # Safety
    /// See above.
    unsafe fn find_largest(&mut self) {
        let call = self.call;
        let mut maxima = TileMaxima::EMPTY;
        if let Some(extras) = &mut self.extras {
            extras.largest.fill([ArgMax::NONE; ROWS]);
        }
        for first in (0..call.plan.shape.classes).step_by(TILE_CLASSES) {
            // SAFETY: `step_by` gives classes of the call; the processor has the set of the kernels (`Call::k`).
            unsafe {
                let tile = self.tile(first, false);
                (call.k.lanes.tile_argmax)(&tile, &mut maxima);
            }
            let Some(extras) = &mut self.extras else { continue };
            let largest = &mut extras.largest.as_flattened_mut()[..self.place.len];
            for (lane, largest) in largest.iter_mut().enumerate() {
                let class = first + maxima.class[lane] as usize;
                largest.push(ArgMax { value: maxima.value[lane], class });
            }
        }
        if let Some(TileExtras { largest, argmax, .. }) = &mut self.extras {
            for (argmax, largest) in argmax.iter_mut().zip(largest.iter()) {
                *argmax = largest.map(|largest| largest.class);
            }
        }
    }

    /// The first sweep: adds up what the rows need.
    ///
    /// # Safety
    /// See above; the operands were read.
    unsafe fn reduce(&mut self, exps: bool) {
        let call = self.call;
        let groups = register_groups(self.place.len);
        let mut centers = None;
        if call.spreads_mass {
            centers = self.start_centers();
        }
        for first in (0..call.plan.shape.classes).step_by(TILE_CLASSES) {
            // SAFETY: `step_by` gives classes of the call. There are groups for whole registers of the tile
            // (`register_groups`), and the processor has the set of the kernels (`Call::k`).
            unsafe {
                let tile = self.tile(first, false);
                self.transform(&tile);
                if exps {
                    let moments = self
                        .extras
                        .as_mut()
                        .filter(|_| call.wants_entropy)
                        .map(|extras| &mut extras.groups[..groups]);
                    (call.k.lanes.tile_sums)(&tile, &mut self.groups[..groups], moments);
                }
                if let Some(centers) = &mut centers {
                    if first == 0 && call.takes_exps {
                        self.move_centers(centers);
                    }
                    let masses = self.masses(&tile, Some(&mut centers.mass));
                    if let Some(extras) = &mut self.extras {
                        let extras = &mut extras.groups[..groups];
                        (call.k.lanes.tile_dots)(&tile, &self.groups[..groups], extras, &masses);
                    }
                }
            }
        }
        if let (Some(centers), Some(extras)) = (centers, &mut self.extras) {
            for (lane, mass) in centers.mass[..self.place.len].iter().enumerate() {
                extras.groups[lane / ROWS].weighted.mass[lane % ROWS] = mass.value();
            }
        }
    }

    /// Chooses what the logits of each row are taken relative to, as far as the operands tell.
    #[cold]
    fn start_centers(&mut self) -> Option<Centers> {
        let extras = self.extras.as_mut()?;
        let (mut pending, mut excluded) = ([false; TILE], [f64::NEG_INFINITY; TILE]);
        for (lane, pending) in pending[..self.place.len].iter_mut().enumerate() {
            let (group, i) = (lane / ROWS, lane % ROWS);
            let (inputs, extras) = (&self.groups[group].inputs, &mut extras.groups[group]);
            let center = operands::center(self.call, inputs, &extras.factors, i, 0.0, None);
            extras.weighted.center[i] = center;
            excluded[lane] = inputs.x_y[i];
            // Where the others lie is not known yet, unless it is the logit of the excluded class that has a mass.
            let has_own = !self.call.has_masses || extras.factors.class_mass[i] != 0.0;
            *pending = inputs.class(i).is_none() || center != inputs.x_y[i] || !has_own;
        }
        Some(Centers { mass: [CompensatedSum::ZERO; TILE], pending, excluded })
    }

    /// Moves centers to where the first classes are.
    #[cold]
    fn move_centers(&mut self, centers: &Centers) {
        let Some(extras) = &mut self.extras else { return };
        for (lane, pending) in centers.pending[..self.place.len].iter().enumerate() {
            let (group, i) = (lane / ROWS, lane % ROWS);
            let sums = &self.groups[group].sums;
            let start = sums.shift_logit[i] + sums.shift_exponent[i] / self.call.l;
            let others = sums.sum[i] != 0.0;
            let center = &mut extras.groups[group].weighted.center[i];
            if *pending || others && is_far_below(*center, start) {
                *center = operands::near_largest(self.call, centers.excluded[lane], start);
            }
        }
    }

    /// Runs the row arithmetic over the first `used` groups.
    ///
    /// # Safety
    /// See above; the sums are complete.
    unsafe fn finish(&mut self, used: usize) {
        let (call, place) = (self.call, self.place);
        let groups = &mut self.groups[..used];
        if call.from_lse {
            for (i, group) in groups.iter_mut().enumerate() {
                let span = place.span(i * ROWS, ROWS);
                // SAFETY: the distributions are the call's and this thread's (# Safety).
                unsafe {
                    operands::read_lse(call, &span, 0, group);
                    if let (Some(shard), Some(extras)) = (call.mass_of_shard, &mut self.extras) {
                        shards::read_masses(shard, &span, 0, &mut extras.groups[i].weighted.mass);
                    }
                }
            }
        }
        if let Some(extras) = self.extras.as_mut().filter(|_| call.wants_entropy) {
            for (group, extras) in groups.iter().zip(extras.groups.iter_mut()) {
                for row in 0..ROWS {
                    extras.moments.sum[row] = group.sums.sum[row] + group.sums.error[row];
                }
            }
        }
        call.finish(groups, self.extras.as_mut().map(|extras| &mut extras.groups[..]));
    }

    /// Writes the results of the first `used` groups, and adds their losses to the totals.
    ///
    /// # Safety
    /// See above; the rows are finished.
    unsafe fn hand_out(&mut self, used: usize, totals: &mut GroupTotals) {
        let (call, place) = (self.call, self.place);
        let Some(loss) = call.loss.filter(|_| call.computes_losses) else { return };
        for (i, group) in self.groups[..used].iter().enumerate() {
            let argmax = self.extras.as_ref().map_or(&[0; ROWS], |extras| &extras.argmax[i]);
            operands::add_group(loss, group, argmax, totals);
            let span = place.span(i * ROWS, ROWS);
            // SAFETY: the distributions are the call's and this thread's (# Safety).
            unsafe {
                operands::write(loss, &span, 0, &group.results, argmax);
                masses::write_divergences(call, &span, 0, group);
                if let Some(extras) = &self.extras {
                    shards::write(call, &span, 0, group, &extras.groups[i], argmax);
                }
            }
        }
    }

    /// The second sweep: writes the gradients of rows with a bit in `chosen`. `reduced`: the first sweep went
    /// before, and its copies are still in the buffer, if that holds all classes.
    ///
    /// # Safety
    /// See above; the rows are finished.
    unsafe fn write(&mut self, reduced: bool, chosen: u64) {
        let call = self.call;
        let Some(output) = &call.plan.output else { return };
        let lanes = self.place.len;
        let used = lanes.div_ceil(ROWS);
        let (mut writes, mut has_scale, mut fills, mut extreme) = (0, false, false, false);
        for (i, group) in self.groups[..used].iter().enumerate() {
            let group = &group.coefficients;
            writes |= u64::from(group.writes) << (i * ROWS);
            has_scale |= group.has_scale;
            fills |= group.sweeps != !0;
            extreme |= group.has_extreme_factor;
        }
        writes &= chosen & !0 >> (TILE - lanes);
        if writes == 0 {
            return;
        }
        let first_factors = extreme.then(|| self.split_factors());
        let seen = reduced && self.holds();
        let view = &output.view;
        let strides = self.place.strides(view);
        let in_place = self.place.is_in_place(view);
        let slope = match call.plan.transform() {
            Some(with) if with.is_capped() => self.buffers().slope.cast_const(),
            _ => std::ptr::null(),
        };
        for first in (0..call.plan.shape.classes).step_by(TILE_CLASSES) {
            // SAFETY: `step_by` gives classes of the call, and the output covers them (validation), this thread's alone
            // (# Safety). There are groups and extras for whole registers (`tiles_with`, `again`), masses (`masses`) and
            // slopes (`transform`) of the tile's classes, and room for a chunk in the buffer (`Buffers::new`). The
            // processor has the set of the kernels (`Call::k`).
            unsafe {
                let tile = self.tile(first, seen);
                if !seen {
                    self.transform(&tile);
                }
                let masses = self.masses(&tile, None);
                let to = view.at(self.place.first, first);
                let (g, pitch) = match in_place {
                    true => (to, strides[1] as usize),
                    // Beside logits that stay where they are, the buffer is free.
                    false if self.stays() => (self.buffers().x, self.buffers().width),
                    false => (tile.x, tile.pitch),
                };
                (call.k.lanes.tile_gradient)(
                    &tile,
                    &TileGradient {
                        g,
                        pitch,
                        accumulate: output.accumulate && in_place,
                        term: call.term,
                        groups: self.groups,
                        has_bias: call.has_bias(),
                        masses,
                        bonus: self
                            .extras
                            .as_ref()
                            .filter(|_| call.has_bonus)
                            .map(|extras| &*extras.groups),
                        first_factors: first_factors.as_ref().map(|first| &first[..]),
                        has_scale,
                        fills,
                        slope,
                        bounded: !call.from_lse,
                        writes,
                    },
                );
                if !in_place {
                    let from = Tile { x: g, pitch, ..tile };
                    (call.k.converted_to_output.scatter)(
                        &from,
                        to,
                        strides,
                        output.accumulate,
                        writes,
                    );
                }
            }
        }
    }

    /// Splits extreme factors in two; returns the first ones.
    #[cold]
    fn split_factors(&mut self) -> [RowLanes; GROUPS] {
        let mut first = [[1.0; ROWS]; GROUPS];
        let used = self.place.len.div_ceil(ROWS);
        for (first, group) in first.iter_mut().zip(&mut self.groups[..used]) {
            let group = &mut group.coefficients;
            if group.has_extreme_factor {
                for (first, factor) in first.iter_mut().zip(&mut group.factor) {
                    (*first, *factor) = split_factor(*factor);
                }
            }
        }
        first
    }
}

/// What the rows of a tile need to sum up products with masses.
struct Centers {
    mass: [CompensatedSum; TILE],
    /// Rows whose center is not the logit of their excluded class, and is yet to be found.
    pending: [bool; TILE],
    /// The logits of the excluded classes, which the groups have again only after the last chunk.
    excluded: [f64; TILE],
}
