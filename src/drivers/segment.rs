//! One segment of a contiguous row, chunk by chunk: the unit that threads share one row in.

use super::batch::{InitialShift, Reduction, RowGradient};
use super::call::Call;
use super::masses;
use super::ranking::RowRanking;
use crate::kernels::LogitKernels;
use crate::kernels::contiguous::block::{Chunk, excluded_in};
use crate::kernels::contiguous::gradient::{Bias, GradientChunk, Source};
use crate::kernels::contiguous::reduce::Sums;
use crate::kernels::entropy_bonus::Bonus;
use crate::kernels::logit_transform::Transform;
use crate::kernels::row_math::OutputTerm;
use crate::kernels::row_state::{ArgMax, ExpSum, RowState};
use crate::kernels::scratch::Scratch;
use crate::kernels::strided::tile::Tile;
use crate::math::compensated::CompensatedSum;
use crate::math::exp2::Shift;
use crate::plan::Targets;
use crate::strategy::{CHUNK, CHUNKS_A_CALL, CONVERTED, HEAD, LARGEST_SUM, SEGMENTS, SMALLEST_SUM};
use crate::view::{ElementType, Position, View};
use std::ops::Range;

/// What the first sweep learned about the chunks of a segment, for the second.
#[derive(Clone, Copy, Debug, Default)]
pub struct ChunkFlags {
    /// Bit i: chunk i has, or may have, exponents out of range: its exponentials are clamped.
    pub out_of_range: u64,
    /// Bit i: chunk i was redone with a shift of its own.
    pub redone: u64,
}

impl ChunkFlags {
    #[inline(always)]
    fn is_out_of_range(self, chunk: usize) -> bool {
        self.out_of_range >> (chunk % SEGMENTS) & 1 == 1
    }

    #[inline(always)]
    fn is_redone(self, chunk: usize) -> bool {
        self.redone >> (chunk % SEGMENTS) & 1 == 1
    }
}

/// A row of contiguous classes, and where they lie: in the caller's memory, or in a buffer that holds some
/// of them.
#[derive(Clone, Copy, Debug)]
pub struct PlacedRow {
    /// Which row, for the operands that have a number for each of its classes.
    pub at: Position,
    /// Where the logit of class 0 is, or would be if the memory held it.
    pub x: *const u8,
    /// The same of the output; null if the call has none.
    pub g: *mut u8,
}

// SAFETY: the addresses are numbers. Every access through them is unsafe, and asks its caller that no other
// thread writes what is read, or accesses what is written.
unsafe impl Sync for PlacedRow {}

impl PlacedRow {
    /// A row of the caller's memory.
    ///
    /// # Safety
    /// The row is the call's.
    #[inline(always)]
    pub unsafe fn new(call: &Call, at: Position) -> PlacedRow {
        // SAFETY: the logits and the output cover class 0 of the row (validation; # Safety).
        unsafe {
            let x = call.plan.logits.at(at, 0);
            let output = call.plan.output.as_ref();
            PlacedRow {
                at,
                x,
                g: output.map_or(std::ptr::null_mut(), |output| output.view.at(at, 0)),
            }
        }
    }
}

/// A row whose gradient is yet to be written, and the flags of its chunks in the segment at hand.
#[derive(Clone, Copy)]
pub struct PendingRow<'a> {
    /// Which.
    pub row: PlacedRow,
    /// The flags of its chunks.
    pub flags: ChunkFlags,
    /// What its second sweep needs.
    pub gradient: &'a RowGradient,
}

/// The `len` classes from `class` on of a row; exponentials are not stored.
#[inline(always)]
fn chunk_at(
    call: &Call,
    row: &PlacedRow,
    class: usize,
    len: usize,
    excluded: Option<usize>,
) -> Chunk {
    let x = row.x.wrapping_add(class * call.plan.logits.dtype.size());
    Chunk::new(x, len, excluded_in(excluded, class, len))
}

/// Brings a chunk into a buffer in the lanes' type, scaled and capped: it then refers to this copy. Slopes go to
/// `slope`, unless that is null.
///
/// # Safety
/// The chunk is the call's, and the buffers have room for it. The processor has the set of the kernels.
unsafe fn transform(call: &Call, with: &Transform, chunk: &mut Chunk, to: *mut u8, slope: *mut u8) {
    // SAFETY: this function's own # Safety.
    unsafe {
        (call.k.native.widen)(chunk.x, chunk.len, to);
        (call.k.lanes.transform)(to, chunk.len, with, slope);
    }
    chunk.x = to;
}

/// Chooses the shift that a row's chunks start from: near the largest of its first logits.
///
/// # Safety
/// The first [`HEAD`] classes of the row are readable.
pub unsafe fn choose_initial_shift(
    call: &Call,
    row: &PlacedRow,
    excluded: Option<usize>,
) -> InitialShift {
    let mut head = chunk_at(call, row, 0, call.plan.shape.classes.min(HEAD), excluded);
    // SAFETY: the chunk is readable (# Safety), the buffer has room for HEAD lanes, and the processor has the set of
    // the kernels (`Call::k`).
    let max = unsafe {
        if let Some(with) = call.plan.transform() {
            let mut x = Scratch::<HEAD>::new();
            (call.k.native.widen)(head.x, head.len, x.start());
            (call.k.lanes.transform)(x.start(), head.len, with, std::ptr::null_mut());
            head.x = x.start();
            (call.k.converted.max)(&head)
        } else {
            (call.k.native.max)(&head)
        }
    };
    let shift = call.shift_at(max);
    if max.is_finite() && !shift.is_by_logit() {
        InitialShift { shift, is_of_row: true }
    } else {
        InitialShift::NONE
    }
}

/// Adds one segment of a row to its state; returns the flags of the segment's chunks. The same segment of
/// a pending row's gradient is written on the way, if there is one.
///
/// # Safety
/// The segment is one of the call's, whose classes are contiguous; no other thread accesses this segment
/// of this row, nor of the pending row.
#[inline(always)]
pub unsafe fn reduce(
    call: &Call,
    row: &PlacedRow,
    segment: usize,
    reduction: &Reduction,
    pending: Option<PendingRow>,
    state: &mut RowState,
) -> ChunkFlags {
    let classes = call.segment(segment);
    // SAFETY: the classes are those of the segment, of both rows (# Safety).
    unsafe { reduce_classes(call, row, classes, reduction, pending, None, state) }
}

/// [`reduce`] where the order of the logits is wanted too.
///
/// # Safety
/// As [`reduce`].
#[inline(always)]
pub unsafe fn reduce_ranked(
    call: &Call,
    row: &PlacedRow,
    segment: usize,
    reduction: &Reduction,
    ranking: &mut RowRanking,
    state: &mut RowState,
) -> ChunkFlags {
    // SAFETY: the classes are those of the segment (# Safety).
    unsafe { reduce_general(call, row, call.segment(segment), reduction, Some(ranking), state) }
}

/// [`reduce`] for some classes, no more than a segment has. Their order goes to `ranking`, if it is wanted.
///
/// # Safety
/// The classes of the row are readable, and writable where exponentials are stored; no other thread accesses
/// them, nor those of the pending row.
#[inline(always)]
pub unsafe fn reduce_classes(
    call: &Call,
    row: &PlacedRow,
    classes: Range<usize>,
    reduction: &Reduction,
    pending: Option<PendingRow>,
    ranking: Option<&mut RowRanking>,
    state: &mut RowState,
) -> ChunkFlags {
    let Range { start, end } = classes;
    if !(call.sums_exps_alone && reduction.sums_exps && reduction.center.is_none()) {
        if let Some(PendingRow { row, flags, gradient: of }) = pending {
            // SAFETY: the classes of the pending row are this thread's (# Safety).
            unsafe { gradient_classes(call, &row, classes.clone(), flags, of) };
        }
        // SAFETY: this function's own # Safety.
        return unsafe { reduce_general(call, row, classes, reduction, ranking, state) };
    }
    if end - start <= CHUNK && pending.is_none() && !call.stores_exps {
        // A row of one chunk, whose exponents are in range as a rule. If they are not, it is done again below.
        let shift = reduction.initial.shift;
        let chunk = chunk_at(call, row, start, end - start, reduction.excluded);
        // SAFETY: the classes are readable (# Safety); the shift has no logit (`InitialShift`), and the processor has
        // the set of the kernels (`Call::k`).
        let sums = unsafe { (call.k.native.sum)(&chunk, shift) };
        if sums.in_range && safe_sums(&reduction.initial).contains(&sums.sum) {
            state.exps.push(&ExpSum::new(shift, sums.sum, 0.0), call.l);
            return ChunkFlags::default();
        }
    }
    // SAFETY: this function's own # Safety.
    unsafe { reduce_exps(call, row, classes, reduction, pending, state) }
}

/// The sums of a chunk that can be relied on. If the initial shift is not of the row, a sum of 0 does not
/// tell how small the exponentials are.
#[inline(always)]
fn safe_sums(initial: &InitialShift) -> Range<f64> {
    if initial.is_of_row { 0.0..LARGEST_SUM } else { SMALLEST_SUM..LARGEST_SUM }
}

/// [`reduce`] where nothing is wanted but exponential sums of logits as they are. A function of its own, for its
/// buffer, as [`reduce_general`] is.
///
/// # Safety
/// As [`reduce_classes`].
#[inline(never)]
unsafe fn reduce_exps(
    call: &Call,
    row: &PlacedRow,
    classes: Range<usize>,
    reduction: &Reduction,
    pending: Option<PendingRow>,
    state: &mut RowState,
) -> ChunkFlags {
    let shift = reduction.initial.shift;
    let stores = call.stores_exps && reduction.excluded.is_some();
    let mut backup = Scratch::<CHUNK>::new();
    let (mut flags, safe) = (ChunkFlags::default(), safe_sums(&reduction.initial));
    // Many chunks go to one call of a kernel, up to one that is not ordinary.
    let many_at_once = !stores && pending.is_none();
    let (mut done, mut stopped) = (0, usize::MAX);
    // Chunks of the pending row that are written, and the sums of a chunk beside them that is not done.
    let (mut written, mut tried) = (0, None);
    for (i, class) in classes.clone().step_by(CHUNK).enumerate() {
        if i < done {
            continue;
        }
        let chunks_left = (classes.end - class).div_ceil(CHUNK).min(CHUNKS_A_CALL);
        if many_at_once && i != stopped && !flags.is_out_of_range(i) {
            let mut sums = [0.0; CHUNKS_A_CALL];
            let chunks = chunk_at(call, row, class, classes.end - class, reduction.excluded);
            let sums = &mut sums[..chunks_left];
            // SAFETY: the chunks are readable (# Safety), the shift has no logit (`InitialShift`), and the processor
            // has the set of the kernels (`Call::k`).
            let count = unsafe { (call.k.native.sums)(&chunks, shift, &safe, sums) };
            for &sum in &sums[..count] {
                state.exps.push(&ExpSum::new(shift, sum, 0.0), call.l);
            }
            done = i + count;
            stopped = done;
            if count > 0 {
                continue;
            }
        }
        if let Some(PendingRow { row: theirs, flags: seen, gradient }) = pending
            && i >= written
        {
            // As many chunks as are ordinary in both rows, or a single one.
            let ordinary =
                |chunk: &usize| !(seen.is_out_of_range(*chunk) || seen.is_redone(*chunk));
            let count = if flags.is_out_of_range(i) {
                0
            } else {
                (i..i + chunks_left).take_while(ordinary).count()
            };
            let len = (count.max(1) * CHUNK).min(classes.end - class);
            written = i + count.max(1);
            // SAFETY: the classes are this thread's, those of the pending row too (# Safety).
            let chunk = unsafe { gradient_chunk(call, &theirs, i, class, len, seen, gradient) };
            let interleaved = call.k.native_to_output.sums_and_gradient.filter(|_| count > 0);
            match (chunk, interleaved) {
                (Some(chunk), Some(sums_and_gradient)) if chunk.can_interleave(stores) => {
                    let mut chunks = chunk_at(call, row, class, len, reduction.excluded);
                    if stores {
                        (chunks.stored, chunks.backup) = (chunks.x.cast_mut(), backup.start());
                    }
                    let mut sums = [0.0; CHUNKS_A_CALL];
                    let sums = &mut sums[..count];
                    // SAFETY: the chunks are readable, and writable where exponentials are stored, since the output is
                    // the logits (`Call::stores_exps`); the backup has room for CHUNK lanes. The gradient's chunk can
                    // be interleaved, and is the pending row's, this thread's alone (# Safety). The processor has the
                    // set of the kernels (`Call::k`).
                    let (good, last) =
                        unsafe { sums_and_gradient(&chunks, shift, &safe, &chunk, sums) };
                    for &sum in &sums[..good] {
                        state.exps.push(&ExpSum::new(shift, sum, 0.0), call.l);
                    }
                    done = i + good;
                    tried = (good < count).then_some(last);
                    if good > 0 {
                        continue;
                    }
                }
                // SAFETY: the chunk is the pending row's, this thread's alone (# Safety), and neither biases
                // nor slopes differ by class where rows are interleaved (`Call`).
                (Some(chunk), _) => unsafe { (call.k.native_to_output.gradient)(&chunk) },
                (None, _) => {}
            }
        }
        let len = CHUNK.min(classes.end - class);
        let mut chunk = chunk_at(call, row, class, len, reduction.excluded);
        if stores {
            (chunk.stored, chunk.backup) = (chunk.x.cast_mut(), backup.start());
        }
        // SAFETY: the chunk is readable, and writable where exponentials are stored, since the output is the logits
        // (`Call::stores_exps`); the backup has room for CHUNK lanes.
        let exps = unsafe {
            sum_chunk(call, call.k.native, chunk, i, &reduction.initial, tried.take(), &mut flags)
        };
        state.exps.push(&exps, call.l);
    }
    flags
}

/// [`reduce`] where more is wanted than exponential sums, or the logits are not taken as they are.
///
/// # Safety
/// As [`reduce_classes`].
#[inline(never)]
unsafe fn reduce_general(
    call: &Call,
    row: &PlacedRow,
    classes: Range<usize>,
    reduction: &Reduction,
    mut ranking: Option<&mut RowRanking>,
    state: &mut RowState,
) -> ChunkFlags {
    let stores = call.stores_exps && reduction.excluded.is_some();
    let mut transformed = Scratch::<CHUNK>::new();
    // First for the masses of a chunk, then for the logits that its exponentials are stored over.
    let mut room = Scratch::<CHUNK>::new();
    let mut flags = ChunkFlags::default();
    for (i, class) in classes.clone().step_by(CHUNK).enumerate() {
        let len = CHUNK.min(classes.end - class);
        let mut chunk = chunk_at(call, row, class, len, reduction.excluded);
        let mut kernels = call.k.native;
        let mut seen = RowState::EMPTY;
        // The largest logit that sums do not exclude, if it is known. A NaN is the largest of all, but not here.
        let mut largest = None;
        if call.wants_argmax {
            // SAFETY: the chunk is readable (# Safety); the processor has the set of the kernels (`Call::k`).
            seen.argmax = unsafe { (kernels.argmax)(chunk.x, len) };
            let ArgMax { value, class: at } = seen.argmax;
            let is_it = !value.is_nan() && chunk.excluded != Some(at);
            largest = (is_it && call.plan.transform().is_none()).then_some(value);
            seen.argmax.class += class;
        }
        if let Some(ranking) = &mut ranking {
            // SAFETY: the chunk is readable (# Safety), and at most CHUNK long.
            unsafe { ranking.add(call, chunk.x, class, len) };
        }
        if let Some(with) = call.plan.transform() {
            // SAFETY: the chunk is the call's, and at most CHUNK long, as is the buffer.
            unsafe { transform(call, with, &mut chunk, transformed.start(), std::ptr::null_mut()) };
            kernels = call.k.converted;
        }
        if let Some(center) = reduction.center {
            let (at, masses) = (row.at, room.start().cast());
            let of = Weighted { at, class, chunk: &chunk, kernels, center, masses };
            // SAFETY: `kernels` are those that read the chunk: as it lies in the row (# Safety), or its copy. It
            // has the classes of the row from `class` on. There is room for CHUNK masses.
            (seen.weighted_logits, seen.mass) = unsafe { weighted_sum(call, &of) };
        }
        if reduction.sums_exps {
            if call.wants_entropy {
                // SAFETY: `kernels` are those that read the chunk: as it lies in the row (# Safety), or its copy.
                seen.moments = unsafe { sum_from_max(call, kernels, &chunk, largest) };
            }
            if stores {
                (chunk.stored, chunk.backup) = (chunk.x.cast_mut(), room.start());
            }
            // SAFETY: `kernels` are those that read the chunk: as it lies in the row (# Safety), or its copy. It is
            // writable where exponentials are stored, since the output is the logits (`Call::stores_exps`); the backup
            // has room for CHUNK lanes.
            seen.exps =
                unsafe { sum_chunk(call, kernels, chunk, i, &reduction.initial, None, &mut flags) };
        }
        state.push(&seen, call.l);
    }
    flags
}

/// The exponential sum of chunk `i` of a segment, relative to the initial shift, or to a shift of its own
/// if that is out of reach; sets the chunk's flags. `tried`: a sum relative to the initial shift that was
/// found already.
///
/// # Safety
/// The chunk is readable by the kernels, whose set the processor has; where exponentials are stored, it is
/// writable, and its backup holds a chunk.
#[inline(always)]
unsafe fn sum_chunk(
    call: &Call,
    kernels: &LogitKernels,
    mut chunk: Chunk,
    i: usize,
    initial: &InitialShift,
    tried: Option<Sums>,
    flags: &mut ChunkFlags,
) -> ExpSum {
    let shift = initial.shift;
    let mut sums = None;
    if !flags.is_out_of_range(i) {
        // SAFETY: this function's own # Safety; the shift has no logit (`InitialShift`).
        let tried = tried.unwrap_or_else(|| unsafe {
            if chunk.stored.is_null() {
                (kernels.sum)(&chunk, shift)
            } else {
                (kernels.sum_stored)(&chunk, shift)
            }
        });
        if tried.in_range {
            sums = Some(tried);
        } else {
            // Where one class is masked, others are: the rest of the segment is not tried.
            flags.out_of_range |= !0 << (i % SEGMENTS);
            // SAFETY: the sum that was tried has stored into this chunk, if it stores.
            unsafe { (kernels.restore)(&chunk) };
        }
    }
    let sums = match sums {
        Some(sums) => sums,
        // SAFETY: this function's own # Safety.
        None => unsafe { (kernels.sum_clamped)(&chunk, shift, false) },
    };
    if safe_sums(initial).contains(&sums.sum) {
        return ExpSum::new(shift, sums.sum, 0.0);
    }
    flags.redone |= 1 << (i % SEGMENTS);
    // SAFETY: the last sum has stored into this chunk, if it stores.
    unsafe { (kernels.restore)(&chunk) };
    chunk.stored = std::ptr::null_mut();
    if sums.sum.is_nan() {
        // There is a NaN, which a maximum does not see.
        return ExpSum::new(Shift::ZERO, sums.sum, 0.0);
    }
    // SAFETY: the chunk is readable by the kernels (# Safety), and stores nothing now.
    unsafe { sum_from_max(call, kernels, &chunk, None) }
}

/// The exponential sum of a chunk with its first moment, relative to the chunk's largest logit, which is looked for
/// unless it is known.
///
/// # Safety
/// The chunk is readable by the kernels, whose set the processor has; nothing is stored.
#[cold]
unsafe fn sum_from_max(
    call: &Call,
    kernels: &LogitKernels,
    chunk: &Chunk,
    known: Option<f64>,
) -> ExpSum {
    // SAFETY: the chunk is readable (# Safety).
    let max = known.unwrap_or_else(|| unsafe { (kernels.max)(chunk) });
    if max == f64::INFINITY {
        return ExpSum::new(Shift::ZERO, max, 0.0);
    }
    // A NaN counts for nothing in a maximum, but not in the sum.
    let shift = if max.is_finite() { call.shift_at(max) } else { Shift::ZERO };
    // SAFETY: the chunk is readable (# Safety).
    let sums = unsafe { (kernels.sum_clamped)(chunk, shift, true) };
    ExpSum::new(shift, sums.sum, sums.first_moment)
}

/// A chunk whose logits are added up, weighted by the masses of their classes.
struct Weighted<'a> {
    /// The row, and the first class of the chunk.
    at: Position,
    class: usize,
    chunk: &'a Chunk,
    /// The kernels that read the chunk.
    kernels: &'a LogitKernels,
    /// What the logits are taken relative to.
    center: f64,
    /// Room for the masses of the chunk.
    masses: *mut f64,
}

/// `Σ m·(x - center)` over a chunk, and `Σ m` of probability targets.
///
/// # Safety
/// The chunk has the classes of the row from `class` on, at most CHUNK, and is readable by the kernels,
/// whose set the processor has. `masses` has room for as many, where their values do not matter.
unsafe fn weighted_sum(call: &Call, of: &Weighted) -> (CompensatedSum, CompensatedSum) {
    let Weighted { at, class, chunk, kernels, center, masses } = *of;
    let has_indices = call.loss.is_some_and(|loss| matches!(loss.targets, Targets::Indices(_)));
    if has_indices && !call.has_masses {
        // SAFETY: the chunk is readable (# Safety); without masses, none are read.
        let dot = unsafe { (kernels.dot)(chunk, center, std::ptr::null(), false) };
        return (dot, CompensatedSum::ZERO);
    }
    // SAFETY: the row and the classes are the call's, at most a chunk (# Safety).
    if let Some(blocks) = unsafe { masses::listed_blocks(call, at, class, chunk.len) } {
        // SAFETY: this function's own # Safety.
        return unsafe { weighted_sum_of_blocks(call, of, blocks) };
    }
    // SAFETY: there is room for the masses (# Safety), and zeros are values of f64.
    let masses = unsafe {
        masses.write_bytes(0, chunk.len);
        std::slice::from_raw_parts_mut(masses, chunk.len)
    };
    // SAFETY: the row and the classes are the call's (# Safety).
    unsafe { masses::read(call, at, class, masses) };
    // Sums without weights are not exact, since a forward of wide rows would take 1.6 times as long. Sums over class
    // weights are not either: weights of 1 change no bit.
    // SAFETY: the chunk is readable (# Safety), and has a mass for each logit.
    let dot = unsafe { (kernels.dot)(chunk, center, masses.as_ptr(), !has_indices) };
    if has_indices {
        // The plan has the sum of the class weights.
        return (dot, CompensatedSum::ZERO);
    }
    // SAFETY: `masses` has as many numbers as the kernel is told; the processor has the set of the kernels (`Call::k`).
    (dot, unsafe { (call.k.lanes.compensated_total)(masses.as_ptr(), masses.len()) })
}

/// [`weighted_sum`] where sparse targets list classes in a few blocks. A function of its own, for the frame of the
/// other.
///
/// # Safety
/// As [`weighted_sum`]; `blocks` are those of [`masses::listed_blocks`].
#[inline(never)]
unsafe fn weighted_sum_of_blocks(
    call: &Call,
    of: &Weighted,
    blocks: u64,
) -> (CompensatedSum, CompensatedSum) {
    let Weighted { at, class, chunk, kernels, center, masses } = *of;
    // SAFETY: there is room for as many numbers as the chunk has classes (# Safety), and zeros are values of f64.
    let weights = unsafe {
        masses.write_bytes(0, chunk.len);
        std::slice::from_raw_parts_mut(masses, chunk.len)
    };
    // SAFETY: the classes are the call's (# Safety).
    let is_weighted = unsafe { masses::read_class_weights(call, class, weights) };
    let (mut dot, mut mass) = (CompensatedSum::ZERO, CompensatedSum::ZERO);
    let (share, dtype) = (masses::unlisted(call), call.plan.logits.dtype);
    // What lanes of f64 read are masses, for an exact sum: the bits are those of dense targets.
    let reads_masses = !dtype.has_f32_lanes();
    if reads_masses {
        weights.iter_mut().for_each(|w| *w = if is_weighted { share * *w } else { share });
    }
    if share != 0.0 {
        // SAFETY: the chunk is readable (# Safety); there is a number for each logit, or none is read. The processor has
        // the set of the kernels (`Call::k`).
        unsafe {
            if reads_masses || is_weighted {
                dot = (kernels.dot)(chunk, center, weights.as_ptr(), true);
                mass = (call.k.lanes.compensated_total)(weights.as_ptr(), weights.len());
            } else {
                dot = (kernels.dot)(chunk, center, std::ptr::null(), false);
                mass.add(chunk.len as f64);
            }
        }
        if !reads_masses {
            dot.scale(share);
            mass.scale(share);
        }
    }
    // A chunk that was scaled and capped is a copy in the lanes' type.
    let size = if call.plan.transform().is_some() { dtype.lane_size() } else { dtype.size() };
    let mut masses = [0.0; masses::BLOCK];
    for block in (0..u64::BITS as usize).filter(|block| blocks >> block & 1 == 1) {
        let start = block * masses::BLOCK;
        let len = masses::BLOCK.min(chunk.len - start);
        let (masses, weights) = (&mut masses[..len], &weights[start..start + len]);
        let excluded = excluded_in(chunk.excluded, start, len);
        let part = Chunk::new(chunk.x.wrapping_add(start * size), len, excluded);
        // SAFETY: the row and the classes are the call's (# Safety). The part of the chunk is readable, and has a mass for
        // each logit; the processor has the set of the kernels (`Call::k`).
        unsafe {
            masses::read(call, at, class + start, masses);
            for (m, of_class) in masses.iter_mut().zip(weights) {
                *m -= match (reads_masses, is_weighted) {
                    (true, _) => *of_class,
                    (false, true) => share * of_class,
                    (false, false) => share,
                };
            }
            dot.merge((kernels.dot)(&part, center, masses.as_ptr(), true));
            mass.merge((call.k.lanes.compensated_total)(masses.as_ptr(), len));
        }
    }
    (dot, mass)
}

/// Writes the gradient of one segment of a row, but for the entry of the excluded class; `flags` as
/// [`reduce`] returned them. The caller fences streamed stores: a fence here, for every row, would wait
/// for memory every time.
///
/// # Safety
/// As [`reduce`]; the call has an output.
pub unsafe fn gradient(
    call: &Call,
    row: &PlacedRow,
    segment: usize,
    flags: ChunkFlags,
    gradient: &RowGradient,
) {
    // SAFETY: the classes are those of the segment (# Safety).
    unsafe { gradient_classes(call, row, call.segment(segment), flags, gradient) }
}

/// [`gradient`] for some classes, no more than a segment has.
///
/// # Safety
/// The classes of the row are readable and those of its output writable; no other thread accesses them.
pub unsafe fn gradient_classes(
    call: &Call,
    row: &PlacedRow,
    classes: Range<usize>,
    flags: ChunkFlags,
    gradient: &RowGradient,
) {
    let per_class = call.plan.transform().is_some()
        || call.has_bonus
        || (gradient.bias != 0.0 && call.has_masses);
    for (i, class) in classes.clone().step_by(CHUNK).enumerate() {
        let len = CHUNK.min(classes.end - class);
        // SAFETY: this function's own # Safety.
        let chunk = unsafe { gradient_chunk(call, row, i, class, len, flags, gradient) };
        let Some(chunk) = chunk else { return };
        if per_class || call.scatters {
            // SAFETY: the chunk has the classes of the row from `class` on, this thread's alone (# Safety).
            unsafe {
                gradient_of_blocks(call, row.at, class, chunk, gradient.bias, &gradient.bonus)
            };
        } else {
            // SAFETY: the chunk is readable and writable, and this thread's alone (# Safety); the processor has the set
            // of the kernels (`Call::k`).
            unsafe { (call.k.native_to_output.gradient)(&chunk) };
        }
    }
}

/// Writes a chunk of the gradient as [`gradient_general`] does, but for sparse targets that list classes in a few
/// blocks: the same value is subtracted for all others, and nothing else makes them general.
///
/// # Safety
/// As [`gradient_general`].
unsafe fn gradient_of_blocks(
    call: &Call,
    at: Position,
    class: usize,
    chunk: GradientChunk,
    bias: f64,
    bonus: &Bonus,
) {
    let is_plain = call.plan.transform().is_none() && !call.scatters && !call.has_bonus;
    let unlisted = masses::unlisted(call);
    // With class weights, what label smoothing leaves is a mass of each class's own.
    let is_even = unlisted == 0.0 || call.loss.is_none_or(|loss| loss.class_weights.is_none());
    let blocks = match is_plain && is_even {
        // SAFETY: the row and the classes are the call's, at most a chunk (# Safety).
        true => unsafe { masses::listed_blocks(call, at, class, chunk.len) },
        false => None,
    };
    let Some(blocks) = blocks else {
        // SAFETY: this function's own # Safety.
        return unsafe { gradient_general(call, at, class, chunk, bias, bonus) };
    };
    let mut start = 0;
    while start < chunk.len {
        let left = blocks >> (start / masses::BLOCK);
        // Up to the next block of the other kind.
        let lists = left & 1 == 1;
        let count = if lists { left.trailing_ones() } else { left.trailing_zeros() } as usize;
        let len = (count * masses::BLOCK).min(chunk.len - start);
        let mut part = part_of(call, &chunk, start, len);
        // SAFETY: the part is the chunk's (# Safety). Its values in memory are all of the caller's types, and this
        // thread's alone; the processor has the set of the kernels (`Call::k`).
        unsafe {
            if lists {
                gradient_general(call, at, class + start, part, bias, bonus);
            } else {
                part.bias = Bias::Uniform(bias * unlisted);
                (call.k.native_to_output.gradient)(&part);
            }
        }
        start += len;
    }
}

/// `len` classes of a chunk of the gradient from `start` on.
#[inline(always)]
fn part_of(call: &Call, chunk: &GradientChunk, start: usize, len: usize) -> GradientChunk {
    let x_size = call.plan.logits.dtype.size();
    // Bytes from class to class.
    let step = call
        .plan
        .output
        .as_ref()
        .map_or(0, |output| output.view.strides[1] * output.view.dtype.size() as isize);
    GradientChunk {
        x: chunk.x.wrapping_add(start * x_size),
        len,
        excluded: excluded_in(chunk.excluded, start, len),
        next: match chunk.next.is_null() {
            true => chunk.next,
            false => chunk.next.wrapping_add(start * x_size),
        },
        g: chunk.g.wrapping_offset(start as isize * step),
        ..*chunk
    }
}

/// The gradient's chunk of `len` classes from `class` on, the `i`-th of its segment; None if the call has
/// no output.
///
/// # Safety
/// As [`gradient_classes`].
#[inline(always)]
unsafe fn gradient_chunk(
    call: &Call,
    row: &PlacedRow,
    i: usize,
    class: usize,
    len: usize,
    flags: ChunkFlags,
    gradient: &RowGradient,
) -> Option<GradientChunk> {
    let output = call.plan.output.as_ref()?;
    let from_final = call.final_shift || flags.is_redone(i);
    let Chunk { x, excluded, .. } = chunk_at(call, row, class, len, gradient.excluded);
    let View { dtype, strides: [_, step, _], .. } = output.view;
    Some(GradientChunk {
        x,
        len,
        g: row.g.wrapping_offset(class as isize * step * dtype.size() as isize),
        excluded,
        next: gradient.next.map_or(std::ptr::null(), |next| {
            // SAFETY: the logits cover class `class` of every row of the call. The address is prefetched,
            // never read.
            unsafe { call.plan.logits.at(next, class) }
        }),
        source: match gradient.term {
            OutputTerm::None => Source::None,
            OutputTerm::LogSoftmax => Source::LogSoftmax,
            OutputTerm::BaseE => Source::BaseE,
            OutputTerm::Exponentials if from_final => Source::Logits,
            OutputTerm::Exponentials if call.stores_exps => Source::Stored,
            OutputTerm::Exponentials if !flags.is_out_of_range(i) => Source::InRange,
            OutputTerm::Exponentials => Source::Logits,
        },
        exps: if from_final { gradient.from_final } else { gradient.from_initial },
        bias: Bias::Uniform(gradient.bias),
        scale: gradient.scale,
        slope: std::ptr::null(),
        accumulate: output.accumulate,
        stream: output.stream,
    })
}

/// Bytes of each buffer that [`gradient_general`] has: a chunk of f32, or half of one of f64.
const PIECE_BYTES: usize = CHUNK * size_of::<f32>();

/// Writes a chunk of the gradient whose logits are scaled and capped first, whose biases differ by class, or have a
/// bonus, or whose classes are not contiguous in the output.
///
/// A function of its own, for its buffers: a frame of 24 KiB is probed page by page wherever it is set up.
///
/// # Safety
/// The chunk has the classes of the row at `at` from `class` on, at most CHUNK, and no other thread
/// accesses them.
#[inline(never)]
unsafe fn gradient_general(
    call: &Call,
    at: Position,
    class: usize,
    chunk: GradientChunk,
    bias: f64,
    bonus: &Bonus,
) {
    let mut biases = Scratch::<{ PIECE_BYTES / 8 }>::new();
    let mut lanes = Scratch::<{ PIECE_BYTES / 8 }>::new();
    let mut slope = Scratch::<{ PIECE_BYTES / 8 }>::new();
    let lane_size = call.plan.logits.dtype.lane_size();
    let Some(output) = &call.plan.output else { return };
    let piece = PIECE_BYTES / lane_size;
    for start in (0..chunk.len).step_by(piece) {
        let len = piece.min(chunk.len - start);
        let mut part = part_of(call, &chunk, start, len);
        let has_biases = bias != 0.0 && (call.has_masses || call.has_bonus);
        if has_biases {
            // SAFETY: the classes are the row's (# Safety), and the buffer has room for a piece.
            unsafe { scale_masses(call, at, class + start, len, bias, biases.start()) };
            part.bias = Bias::PerClass(biases.start());
        }
        let transformed = call.plan.transform();
        if let Some(with) = transformed {
            let mut logits = Chunk::new(part.x, len, None);
            let slopes = slope.start();
            // SAFETY: the piece is the call's (# Safety), and the buffers have room for it.
            unsafe { transform(call, with, &mut logits, lanes.start(), slopes) };
            (part.x, part.next) = (logits.x, std::ptr::null());
            if with.is_capped() {
                part.slope = slopes;
            }
        }
        if call.has_bonus {
            let mut x = part.x;
            if transformed.is_none() && !call.plan.logits.dtype.is_lane_type() {
                x = lanes.start();
                // SAFETY: the piece is readable (# Safety), and the buffer has room for it; the processor has the set
                // of the kernels (`Call::k`).
                unsafe { (call.k.native.widen)(part.x, len, lanes.start()) };
            }
            if !has_biases {
                // SAFETY: the buffer has room for the piece.
                unsafe { biases.start().write_bytes(0, len * lane_size) };
            }
            // SAFETY: `x` has the logits of the piece in the lanes' type, and the buffer has a bias for each, which
            // `scale_masses` or `write_bytes` above has written; the processor has the set of the kernels (`Call::k`).
            unsafe { (call.k.lanes.subtract_bonus)(x, len, bonus, biases.start()) };
            part.bias = Bias::PerClass(biases.start());
        }
        let from_lanes = transformed.is_some();
        if !call.scatters {
            let k = if from_lanes { call.k.converted_to_output } else { call.k.native_to_output };
            // SAFETY: the piece is readable and writable (validation), this thread's alone (# Safety), and in the
            // lanes' type if it was transformed; the processor has the set of the kernels (`Call::k`).
            unsafe { (k.gradient)(&part) };
            continue;
        }
        let (g, accumulate) = (part.g, part.accumulate);
        // In place of the transformed logits, or where these would be.
        (part.g, part.accumulate) = (lanes.start(), false);
        let k = if from_lanes { call.k.converted_to_lanes } else { call.k.native_to_lanes };
        let tile = Tile { x: part.g, pitch: 1, lanes: 1, first: 0, classes: len };
        // SAFETY: the buffer has room for the piece, and is then one distribution of a tile; the output covers the
        // classes by its stride (validation), this thread's alone (# Safety). The processor has the set of the kernels
        // (`Call::k`).
        unsafe {
            (k.gradient)(&part);
            (call.k.converted_to_output.scatter)(
                &tile,
                g,
                [0, output.view.strides[1]],
                accumulate,
                1,
            );
        }
    }
}

/// Writes `bias` times the masses of `len` classes, in the lanes' type.
///
/// # Safety
/// The classes are those of the row at `at` from `class` on, and `to` has room for as many lanes.
unsafe fn scale_masses(
    call: &Call,
    at: Position,
    class: usize,
    len: usize,
    bias: f64,
    to: *mut u8,
) {
    let short = call.plan.logits.dtype.has_f32_lanes();
    let mut masses = [0.0; CONVERTED];
    for start in (0..len).step_by(CONVERTED) {
        let masses = &mut masses[..CONVERTED.min(len - start)];
        // SAFETY: the row and the classes are the call's (# Safety).
        unsafe { masses::read(call, at, class + start, masses) };
        for (i, &m) in masses.iter().enumerate() {
            let bias = if m == 0.0 { 0.0 } else { bias * m };
            // SAFETY: the buffer has room for `len` lanes of either type (# Safety).
            unsafe {
                if short {
                    to.cast::<f32>().add(start + i).write(bias as f32);
                } else {
                    to.cast::<f64>().add(start + i).write(bias);
                }
            }
        }
    }
}
