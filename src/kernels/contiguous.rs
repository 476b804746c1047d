//! Rows whose classes are contiguous: lanes along classes.
//!
//! # Forward: one read, no maximum first
//!
//! ```text
//! initial_shift: c = integer nearest to L·max of the first 256 classes
//! for each chunk of 2048 classes:
//!     sum = Σ 2^(L·x - c)                       64 lanes, flushed to f64 every 256 classes
//!     if an exponent was out of range:          ("out_of_range": -inf, say)
//!         the same sum again, arguments clamped
//!     if sum is outside the safe range:         (a logit shift_logit above the initial_shift)
//!         c' = integer nearest to L·max of the chunk
//!         sum = Σ 2^(L·x - c')
//!     push (c or c', sum) to the row's state    in class order, f64
//! ```
//!
//! A chunk's result depends on the initial_shift and on itself alone, so chunks can be computed
//! anywhere, in any order, and redone without touching others. The target's class is left out of
//! all of it: group.rs adds it in f64, which keeps `rest = Σ over the others` as exact as it is small.
//!
//! # Gradient: a second sweep, while the row is in cache
//!
//! `P·p_c = 2^(L·x_c - c)·F`, one factor for the whole row. In place, the first sweep leaves
//! `2^(L·x - c)` where the logits were and the second only multiplies; out of place the
//! exponentials are computed again, from the same shift to the same bits, so that the
//! gradient is written once and can be streamed. Chunks that were redone keep their logits and
//! are computed relative to the shift that the row's sum ended with.
//!
//! The first sweep waits for memory, the second does not. So where rows leave the first level of
//! cache, the second sweep over one goes along with the first over the next, block by block
//! ([`sums_beside`]). See docs/design.md.
//!
//! # Tails and excluded_classes
//!
//! Lanes past the end and the target's lane are masked loads of -inf, whose exponential is 0. The
//! block with the target is skipped by the loop (`block + (block ≥ excluded)`, no branch) and done last.

use super::row_batch::{
    Batch, ExpScale, InitialShift, Job, Kind, Lane, RowGradient, RowSum, Totals,
};
use super::row_math::ROWS;
use super::row_state::{ArgMax, CompensatedSum, ExpSum, RowState};
use super::tiles::Tile;
use super::{Kernels, Sweeps};
use crate::element::Element;
use crate::math::exp2::{Base, Exp2, Shift};
use crate::math::real;
use crate::plan::{At, CHUNK, KEPT_CLASSES, Pass, Plan, SEGMENTS, Targets, Transform};
use crate::simd::{Real, Simd, TOTALS, all_lanes, first_lanes, lanes_of, up_to};
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::Range;

/// Classes that the initial_shift is taken from.
const HEAD: usize = 256;

/// Blocks summed in lanes of f32 before they are flushed: no more than 4 additions a lane. Equal terms
/// round alike, and of 8 what they lose showed (`fuzzed::equal_terms_beside_one`).
const GROUP: usize = 4;

/// Bytes that a sweep prefetches together: those after the ones that it is at. A block from each of
/// their pages in turn, since memory gives several pages at once faster than one after the other
/// (docs/performance.md).
const SPAN: usize = 4 * PAGE;
const PAGE: usize = 4096;

/// Chunks that are swept by one call at most.
const RUN: usize = 32;

/// Bytes of a cache line.
const LINE: usize = 64;

/// A chunk's sum above this is redone: exponentials that are kept for the second sweep then stay
/// shift_logit from overflow.
const SAFE_HIGH: f64 = (1u64 << 60) as f64;

/// Without a real initial_shift, a chunk's sum below this is redone too: what is flushed to 0 beside it
/// is less than 2^-125 of the row.
const SAFE_LOW: f64 = 0.5;

/// Where the second sweep gets exponentials from: they were kept; they are computed, unclamped, or
/// clamped; the latter of base e; there are none; or it is not they that are wanted but logits less
/// the lse.
const KEPT: u8 = 0;
const IN_RANGE: u8 = 1;
const CLAMPED: u8 = 2;
const BASE_E: u8 = 3;
const ABSENT: u8 = 4;
const LOGS: u8 = 5;

/// The masks of the blocks of `len` elements that cannot be loaded whole, and the number of
/// those that can.
#[derive(Clone, Copy)]
struct Blocks {
    /// Blocks with all lanes.
    whole: usize,
    /// The block with the excluded (`usize::MAX`: none of the whole ones), to be left out of a loop
    /// over the whole ones.
    excluded: usize,
    excluded_mask: u64,
    /// Lanes of the block after the last whole one, without the excluded.
    tail_mask: u64,
}

impl Blocks {
    #[inline(always)]
    fn new<S: Simd>(len: usize, excluded: Option<usize>) -> Self {
        let block = S::BLOCK;
        let whole = len / block;
        let mut blocks = Blocks {
            whole,
            excluded: usize::MAX,
            excluded_mask: 0,
            tail_mask: first_lanes(len % block),
        };
        if let Some(excluded) = excluded {
            let lane = !(1u64 << (excluded % block));
            if excluded / block < whole {
                blocks.whole -= 1;
                blocks.excluded = excluded / block;
                blocks.excluded_mask = lane & all_lanes::<S>();
            } else {
                blocks.tail_mask &= lane;
            }
        }
        blocks
    }

    /// Element at which the `i`-th block without a excluded starts.
    #[inline(always)]
    fn whole_at<S: Simd>(&self, i: usize) -> usize {
        (i + usize::from(i >= self.excluded)) * S::BLOCK
    }

    /// The masked blocks: `(first element, mask)`; an empty mask where there is none.
    #[inline(always)]
    fn masked<S: Simd>(&self) -> [(usize, u64); 2] {
        let tail = self.whole + usize::from(self.excluded != usize::MAX);
        [
            (self.excluded.wrapping_mul(S::BLOCK), self.excluded_mask),
            (tail * S::BLOCK, self.tail_mask),
        ]
    }
}

/// A chunk of a row, of the element type that the entry point is for.
#[derive(Clone, Copy, Debug)]
pub struct Chunk {
    /// The logits.
    pub x: *const u8,
    /// How many.
    pub len: usize,
    /// The one to leave out.
    pub excluded: Option<usize>,
    /// Where exponentials go, the logits' own place, and a copy of the logits in case they must
    /// be put back. Null unless they are kept.
    pub kept: *mut u8,
    /// See `kept`.
    pub backup: *mut u8,
}

/// What a sweep over a chunk adds up.
#[derive(Clone, Copy, Debug)]
pub struct Sums {
    /// Σ 2^t, t the exponents
    pub sum: f64,
    /// Σ t·2^t, if it was asked for
    pub first_moment: f64,
    /// No exponent was out of range.
    pub in_range: bool,
}

/// The largest logit of a chunk but the excluded's; NaN counts for nothing.
///
/// # Safety
/// The chunk's logits are readable, and of type `E`; the processor has what `s` stands for. The
/// same for all below.
#[inline(always)]
pub unsafe fn max<S: Simd, E: Element<S>>(s: S, chunk: &Chunk) -> f64 {
    let blocks = Blocks::new::<S>(chunk.len, chunk.excluded);
    let x = chunk.x.cast::<E>();
    let mut max = s.splat_block(S::Real::NEG_INFINITY);
    for i in 0..blocks.whole {
        let p = x.wrapping_add(blocks.whole_at::<S>(i));
        for (j, m) in max.as_mut().iter_mut().enumerate() {
            // SAFETY: a whole block of the chunk. The bound comes second: NaN loses.
            *m = unsafe { s.max(E::load(s, p.add(j * S::LANES)), *m) };
        }
    }
    for (at, mask) in blocks.masked::<S>() {
        let p = x.wrapping_add(at);
        for (j, m) in max.as_mut().iter_mut().enumerate() {
            let lanes = lanes_of::<S>(mask, j);
            if lanes == 0 {
                continue;
            }
            let p = p.wrapping_add(j * S::LANES);
            // SAFETY: the mask keeps to the chunk.
            *m = unsafe { s.max(E::load_lanes(s, p, lanes, S::Real::NEG_INFINITY), *m) };
        }
    }
    s.max_of_block(max).to_f64()
}

/// [`sum`] of one chunk after the other, until one is not in_range or its sum is not in `safe`; returns
/// how many were. A call for each would cost as much as some dozens of their classes.
///
/// # Safety
/// As [`sum`] for every chunk of `run`, whose `kept` and `backup` are null.
#[inline(always)]
pub unsafe fn sums<S: Simd<Real: Base>, E: Element<S>>(
    s: S,
    run: &Chunk,
    shift: Shift,
    safe: &Range<f64>,
    sums: &mut [f64],
) -> usize {
    for (i, sum_of) in sums.iter_mut().enumerate() {
        let start = i * CHUNK;
        let len = CHUNK.min(run.len - start);
        let x = run.x.cast::<E>().wrapping_add(start).cast();
        let chunk = Chunk { x, len, excluded: excluded_in(run.excluded, start, len), ..*run };
        // SAFETY: the caller's promise.
        let sums = unsafe {
            sum_with::<S, E, _, true, false, false, false, false>(
                s,
                &chunk,
                shift,
                &mut NotInterleaved,
            )
        };
        if !(sums.in_range && safe.contains(&sums.sum)) {
            return i;
        }
        *sum_of = sums.sum;
    }
    sums.len()
}

/// Asks for a block of the span after the one that the block at `p` is in: another for each. In `LONG`
/// sweeps no further than the second level of cache: with what is being read, it does not fit a first
/// level of 32 KiB. (Of halves, which wait for arithmetic, it does no harm there.)
#[inline(always)]
fn prefetch<S: Simd, E: Element<S>, const LONG: bool>(s: S, p: *const E) {
    let block = S::BLOCK * size_of::<E>();
    let at = p.addr() % SPAN;
    let (pages, i) = (SPAN / PAGE, at / block);
    let next =
        p.cast::<u8>().wrapping_add(SPAN + i % pages * PAGE + i / pages * block).wrapping_sub(at);
    for line in 0..block / LINE {
        let line = next.wrapping_add(line * LINE);
        if LONG && size_of::<E>() > 2 { s.prefetch_l2(line) } else { s.prefetch(line) }
    }
}

/// Work that a sweep does on the way, a block for each of its own.
trait Interleaved {
    /// The next block, if there is one.
    fn step(&mut self);
}

/// None.
struct NotInterleaved;

impl Interleaved for NotInterleaved {
    #[inline(always)]
    fn step(&mut self) {}
}

/// The sums over a chunk without its excluded. Unless `CLAMP`, they are right only if they turn out to
/// be in_range, and then they are those with `CLAMP`, bit for bit.
///
/// # Safety
/// See [`max`]; with `KEEP`, `kept` and `backup` are writable over the chunk.
#[inline(always)]
pub unsafe fn sum<
    S: Simd<Real: Base>,
    E: Element<S>,
    const BY_LOGIT: bool,
    const CLAMP: bool,
    const KEEP: bool,
    const MOMENT: bool,
>(
    s: S,
    chunk: &Chunk,
    shift: Shift,
) -> Sums {
    // SAFETY: the caller's promise.
    unsafe {
        sum_with::<S, E, _, false, BY_LOGIT, CLAMP, KEEP, MOMENT>(
            s,
            chunk,
            shift,
            &mut NotInterleaved,
        )
    }
}

/// As [`sum`], with other work on the way.
///
/// # Safety
/// As there.
#[inline(always)]
unsafe fn sum_with<
    S: Simd<Real: Base>,
    E: Element<S>,
    M: Interleaved,
    const LONG: bool,
    const BY_LOGIT: bool,
    const CLAMP: bool,
    const KEEP: bool,
    const MOMENT: bool,
>(
    s: S,
    chunk: &Chunk,
    shift: Shift,
    interleaved: &mut M,
) -> Sums {
    let exp = Exp2::<S, BY_LOGIT>::new(s, shift);
    let blocks = Blocks::new::<S>(chunk.len, chunk.excluded);
    let (x, kept, backup) = (chunk.x.cast::<E>(), chunk.kept.cast::<E>(), chunk.backup.cast::<E>());
    let (mut totals, mut first_moments) = (s.totals(), s.totals());
    let (mut seen, watched) = (s.watch_start(), s.splat(S::Real::WATCHED));
    let zero = S::Real::ZERO;

    let mut i = 0;
    while i < blocks.whole {
        let end = (i + GROUP).min(blocks.whole);
        let (mut sum, mut first_moment) = (s.splat_block(zero), s.splat_block(zero));
        while i < end {
            let at = blocks.whole_at::<S>(i);
            let p = x.wrapping_add(at);
            prefetch::<S, E, LONG>(s, p);
            let mut exponents = s.splat_block(zero);
            for (j, acc) in sum.as_mut().iter_mut().enumerate() {
                // SAFETY: a whole block of the chunk.
                let x = unsafe { E::load(s, p.add(j * S::LANES)) };
                let power = exp.power::<CLAMP>(x);
                exponents.as_mut()[j] = power.m;
                *acc = exp.add::<CLAMP>(power, *acc);
                let e = exp.value_of::<CLAMP>(power);
                if KEEP {
                    // SAFETY: writable over the chunk.
                    unsafe {
                        E::store(s, backup.add(at + j * S::LANES), x);
                        E::store(s, kept.add(at + j * S::LANES), e);
                    }
                }
                if MOMENT {
                    let h = &mut first_moment.as_mut()[j];
                    *h = s.mul_add(e, exp.exponent(x), *h);
                }
            }
            if !CLAMP {
                seen = s.watch(seen, &exponents, watched);
            }
            interleaved.step();
            i += 1;
        }
        s.add_block(&mut totals, &sum);
        if MOMENT {
            s.add_block(&mut first_moments, &first_moment);
        }
    }

    for (at, mask) in blocks.masked::<S>() {
        if mask == 0 {
            continue;
        }
        let p = x.wrapping_add(at);
        let mut exponents = s.splat_block(S::Real::WATCHED);
        let (mut sum, mut first_moment) = (s.splat_block(zero), s.splat_block(zero));
        for (j, acc) in sum.as_mut().iter_mut().enumerate() {
            let lanes = lanes_of::<S>(mask, j);
            if lanes == 0 {
                continue;
            }
            let p = p.wrapping_add(j * S::LANES);
            // SAFETY: the mask keeps to the chunk.
            let x = unsafe { E::load_lanes(s, p, lanes, S::Real::NEG_INFINITY) };
            *acc = exp.value::<true>(x);
            if !CLAMP {
                // The lanes that are left out must not look out_of_range.
                // SAFETY: as above.
                let x = unsafe { E::load_lanes(s, p, lanes, exp.origin()) };
                exponents.as_mut()[j] = exp.power::<false>(x).m;
            }
            if KEEP {
                let at = at + j * S::LANES;
                // SAFETY: writable over the chunk, which the mask keeps to.
                unsafe {
                    E::store_lanes(s, backup.wrapping_add(at), lanes, x);
                    E::store_lanes(s, kept.wrapping_add(at), lanes, *acc);
                }
            }
            if MOMENT {
                first_moment.as_mut()[j] = s.mul(*acc, exp.exponent(x));
            }
        }
        if !CLAMP {
            seen = s.watch(seen, &exponents, watched);
        }
        s.add_block(&mut totals, &sum);
        if MOMENT {
            s.add_block(&mut first_moments, &first_moment);
        }
    }
    let sum = s.sum(totals);
    Sums {
        sum,
        first_moment: if MOMENT { s.sum(first_moments) } else { 0.0 },
        // At the ends of what is watched, the sum is NaN where no logit is (math/exp2.rs).
        in_range: CLAMP || s.watch_end(seen) && !sum.is_nan(),
    }
}

/// As [`sum`], keeping the exponentials where the logits were. Halves could not hold them.
///
/// # Safety
/// As [`sum`]; logits are of the lanes' own type.
#[inline(always)]
pub unsafe fn sum_kept<S: Simd<Real: Base>, E: Element<S>>(
    s: S,
    chunk: &Chunk,
    shift: Shift,
) -> Sums {
    // SAFETY: the caller's promise.
    unsafe {
        if E::EXACT {
            sum::<S, E, false, false, true, false>(s, chunk, shift)
        } else {
            sum::<S, E, false, false, false, false>(s, chunk, shift)
        }
    }
}

/// [`sums`], and the gradient of as many chunks of another row on the way: as [`sum_kept`] with
/// exponentials that were kept in both, or else as [`sum`] with exponentials that are computed in
/// both. The one works from memory while the other works from the cache; side by side, neither
/// waits. Returns the sums of the last chunk too: past those counted, what is to be done about it is
/// left to the caller. The gradient is written in any case.
///
/// # Safety
/// As [`sum`] for every chunk of `run`, but that `kept` goes as shift_logit as the run does; and as [`gradient`]; the
/// gradient's source is `Kept` or `InRange`, and it is plain and shift_exponent.
#[inline(always)]
pub unsafe fn sums_beside<S: Simd<Real: Base>, E: Element<S>, G: Element<S>>(
    s: S,
    run: &Chunk,
    shift: Shift,
    safe: &Range<f64>,
    other: &GradientChunk,
    sums: &mut [f64],
) -> (usize, Sums) {
    // SAFETY: the caller's promise.
    unsafe {
        if E::EXACT && other.source == Source::Kept {
            both::<S, E, G, KEPT, true>(s, run, shift, safe, other, sums)
        } else {
            both::<S, E, G, IN_RANGE, false>(s, run, shift, safe, other, sums)
        }
    }
}

/// # Safety
/// As [`sums_beside`].
#[inline(always)]
unsafe fn both<
    S: Simd<Real: Base>,
    E: Element<S>,
    G: Element<S>,
    const SOURCE: u8,
    const KEEP: bool,
>(
    s: S,
    run: &Chunk,
    shift: Shift,
    safe: &Range<f64>,
    other: &GradientChunk,
    sums: &mut [f64],
) -> (usize, Sums) {
    let sweep = Sweep::<S, SOURCE, false>::new(s, other);
    // SAFETY: the caller's promise.
    let mut interleaved =
        unsafe { Run::<S, E, G, SOURCE, false>::new(&sweep, other, Edges::of::<S, G>(s, other)) };
    interleaved.head();
    let (mut count, mut last) = (0, Sums { sum: 0.0, first_moment: 0.0, in_range: true });
    for sum_of in sums {
        let start = count * CHUNK;
        let len = CHUNK.min(run.len - start);
        let x = run.x.cast::<E>().wrapping_add(start).cast();
        let kept = run.kept.cast::<E>().wrapping_add(start).cast();
        let chunk = Chunk { x, len, excluded: excluded_in(run.excluded, start, len), kept, ..*run };
        // SAFETY: the caller's promise.
        last = unsafe {
            sum_with::<S, E, _, true, false, false, KEEP, false>(s, &chunk, shift, &mut interleaved)
        };
        if !(last.in_range && safe.contains(&last.sum)) {
            break;
        }
        *sum_of = last.sum;
        count += 1;
    }
    interleaved.finish();
    (count, last)
}

/// The sums of a chunk that is not in_range, or whose first_moment is wanted, or that is relative to a
/// shift of its own.
///
/// # Safety
/// As [`sum`].
#[inline(always)]
pub unsafe fn clamped<S: Simd<Real: Base>, E: Element<S>>(
    s: S,
    chunk: &Chunk,
    shift: Shift,
    first_moment: bool,
) -> Sums {
    // SAFETY: the caller's promise.
    unsafe {
        match (shift.is_by_logit(), first_moment, E::EXACT && !chunk.kept.is_null()) {
            // What is kept is shift_exponent, and nothing else is asked of it.
            (false, _, true) => sum::<S, E, false, true, true, false>(s, chunk, shift),
            (false, false, false) => sum::<S, E, false, true, false, false>(s, chunk, shift),
            (false, true, false) => sum::<S, E, false, true, false, true>(s, chunk, shift),
            (true, _, _) => sum::<S, E, true, true, false, true>(s, chunk, shift),
        }
    }
}

/// Puts the logits back that exponentials were written over, if they were.
///
/// # Safety
/// As [`sum`], which ran before.
#[inline(always)]
pub unsafe fn restore<S: Simd, E: Element<S>>(s: S, chunk: &Chunk) {
    if chunk.kept.is_null() {
        return;
    }
    let (kept, backup) = (chunk.kept.cast::<E>(), chunk.backup.cast::<E>());
    let blocks = Blocks::new::<S>(chunk.len, chunk.excluded);
    let whole = (0..blocks.whole).map(|i| (blocks.whole_at::<S>(i), all_lanes::<S>()));
    // The excluded was neither backed up nor overwritten.
    for (at, mask) in whole.chain(blocks.masked::<S>()) {
        for j in 0..S::BLOCK / S::LANES {
            let lanes = lanes_of::<S>(mask, j);
            if lanes == 0 {
                continue;
            }
            let at = at.wrapping_add(j * S::LANES);
            // SAFETY: the mask keeps to elements of the chunk that `sum` backed up.
            unsafe {
                let x = E::load_lanes(s, backup.wrapping_add(at), lanes, S::Real::ZERO);
                E::store_lanes(s, kept.wrapping_add(at), lanes, x);
            }
        }
    }
}

/// The largest of `len` logits and where it is: see [`ArgMax`].
///
/// # Safety
/// See [`max`].
#[inline(always)]
pub unsafe fn argmax<S: Simd, E: Element<S>>(s: S, x: *const u8, len: usize) -> ArgMax {
    let chunk =
        Chunk { x, len, excluded: None, kept: std::ptr::null_mut(), backup: std::ptr::null_mut() };
    // SAFETY: the caller's promise.
    let max = unsafe { max::<S, E>(s, &chunk) };
    // The first that is it, or is NaN.
    let (x, wanted) = (x.cast::<E>(), s.splat(S::Real::from_f64(max)));
    let mut first = None;
    for at in (0..len).step_by(S::LANES) {
        let lanes = up_to::<S>(len - at);
        // SAFETY: the mask keeps to the logits.
        let v = unsafe { E::load_lanes(s, x.wrapping_add(at), lanes, S::Real::NEG_INFINITY) };
        let (found, ordered) = (s.bits(s.equal(v, wanted)), s.bits(s.equal(v, v)));
        let nan = !ordered & lanes;
        if nan != 0 {
            return ArgMax { value: f64::NAN, class: at + nan.trailing_zeros() as usize };
        }
        if first.is_none() && found & lanes != 0 {
            first = Some(at + (found & lanes).trailing_zeros() as usize);
        }
    }
    ArgMax { value: max, class: first.unwrap_or(0) }
}

/// `Σ m·(x - center)` over a chunk without its excluded, in f64, in which terms with m = 0 are 0;
/// every m is 1 if there are none.
///
/// # Safety
/// See [`max`]; `mass` is null, or has a number for each logit.
#[inline(always)]
pub unsafe fn dot<S: Simd, E: Element<S>>(
    s: S,
    chunk: &Chunk,
    center: f64,
    mass: *const f64,
) -> f64 {
    // SAFETY: the caller's promise.
    unsafe {
        if mass.is_null() {
            dot_with::<S, E, true>(s, chunk, center, mass)
        } else {
            dot_with::<S, E, false>(s, chunk, center, mass)
        }
    }
}

/// # Safety
/// As [`dot`]. `EVEN`: all masses are 1.
#[inline(always)]
unsafe fn dot_with<S: Simd, E: Element<S>, const EVEN: bool>(
    s: S,
    chunk: &Chunk,
    center: f64,
    mass: *const f64,
) -> f64 {
    let d = s.wide();
    let wide = <S::Wide as Simd>::LANES;
    let (center, zero) = (d.splat(center), d.splat(0.0));
    let x = chunk.x.cast::<E>();
    let mut totals = s.totals();
    let blocks = Blocks::new::<S>(chunk.len, chunk.excluded);
    let term = |m, x| d.select(d.equal(m, zero), zero, d.mul(m, d.sub(x, center)));
    for i in 0..blocks.whole {
        for j in 0..S::BLOCK / S::LANES {
            let at = blocks.whole_at::<S>(i) + j * S::LANES;
            // SAFETY: a whole block of the chunk.
            let mut terms = s.widen(unsafe { E::load(s, x.add(at)) });
            for (register, x) in terms.as_mut().iter_mut().enumerate() {
                *x = if EVEN {
                    d.sub(*x, center)
                } else {
                    // SAFETY: as many as logits (`dot`).
                    term(unsafe { d.load(mass.add(at + register * wide)) }, *x)
                };
            }
            s.add_wide(&mut totals, j, terms);
        }
    }
    for (at, mask) in blocks.masked::<S>() {
        for j in 0..S::BLOCK / S::LANES {
            let lanes = lanes_of::<S>(mask, j);
            if lanes == 0 {
                continue;
            }
            let at = at.wrapping_add(j * S::LANES);
            // SAFETY: the mask keeps to the chunk.
            let x = unsafe { E::load_lanes(s, x.wrapping_add(at), lanes, S::Real::ZERO) };
            let mut terms = s.widen(x);
            for (i, x) in terms.as_mut().iter_mut().enumerate() {
                let lanes = lanes >> (i * wide) & ((1 << wide) - 1);
                let from = if EVEN { ONES.as_ptr() } else { mass.wrapping_add(at + i * wide) };
                // SAFETY: as many as logits; and `ONES` has enough of the lanes of a register of f64.
                *x = term(unsafe { d.load_lanes(from, lanes, 0.0) }, *x);
            }
            s.add_wide(&mut totals, j, terms);
        }
    }
    s.sum(totals)
}

/// The sum of numbers, and what its roundings lost: in sixteen lanes, on every set.
///
/// # Safety
/// `x` is readable over `len` numbers; the processor has what `s` stands for.
#[inline(always)]
pub unsafe fn total<S: Simd>(s: S, x: *const f64, len: usize) -> CompensatedSum {
    let d = s.wide();
    let wide = <S::Wide as Simd>::LANES;
    let (mut sums, mut lost) = (s.totals(), s.totals());
    for start in (0..len).step_by(TOTALS) {
        for (i, (sum, lost)) in sums.as_mut().iter_mut().zip(lost.as_mut()).enumerate() {
            let at = start + i * wide;
            let p = x.wrapping_add(at);
            let left = len.saturating_sub(at);
            // SAFETY: the mask keeps to the numbers.
            let x = unsafe {
                if left >= wide { d.load(p) } else { d.load_lanes(p, up_to::<S::Wide>(left), 0.0) }
            };
            let (total, error) = real::sum(d, *sum, x);
            (*sum, *lost) = (total, d.add(*lost, error));
        }
    }
    let lanes = |totals: &S::Totals| {
        let mut lanes = [0.0; TOTALS];
        for (i, &total) in totals.as_ref().iter().enumerate() {
            // SAFETY: the totals have as many lanes.
            unsafe { d.store(lanes[i * wide..].as_mut_ptr(), total) };
        }
        lanes
    };
    CompensatedSum::of(&lanes(&sums), &lanes(&lost))
}

/// Masses where there are none.
static ONES: [f64; 16] = [1.0; 16];

/// Copies logits into the lanes' own type.
///
/// # Safety
/// See [`max`]; `to` is writable over as many of the lanes' type, and apart.
#[inline(always)]
pub unsafe fn widen<S: Simd, E: Element<S>>(s: S, x: *const u8, len: usize, to: *mut u8) {
    let (x, to) = (x.cast::<E>(), to.cast::<S::Real>());
    for at in (0..len).step_by(S::LANES) {
        let lanes = up_to::<S>(len - at);
        // SAFETY: the mask keeps to the logits.
        unsafe {
            let v = E::load_lanes(s, x.wrapping_add(at), lanes, S::Real::ZERO);
            s.store_lanes(to.wrapping_add(at), lanes, v);
        }
    }
}

/// Copies numbers of the lanes' own type to where they go, rounded if need be.
///
/// # Safety
/// See [`max`]; `to`, of type `G`, is writable over as many.
#[inline(always)]
pub unsafe fn narrow<S: Simd, G: Element<S>>(s: S, x: *const u8, len: usize, to: *mut u8) {
    let (x, to) = (x.cast::<S::Real>(), to.cast::<G>());
    for at in (0..len).step_by(S::LANES) {
        let lanes = up_to::<S>(len - at);
        // SAFETY: the mask keeps to the numbers.
        unsafe {
            let v = s.load_lanes(x.wrapping_add(at), lanes, S::Real::ZERO);
            G::store_lanes(s, to.wrapping_add(at), lanes, v);
        }
    }
}

/// Scales and caps `len` logits where they are; the derivative goes to `slope` unless that is null
/// or there is no cap.
///
/// # Safety
/// `x` and `slope` are writable over `len` of the lanes' type.
#[inline(always)]
pub unsafe fn transform<S: Simd>(
    s: S,
    x: *mut u8,
    len: usize,
    transform: &Transform,
    slope: *mut u8,
) {
    let d = s.wide();
    let (x, slope) = (x.cast::<S::Real>(), slope.cast::<S::Real>());
    let capped = transform.cap > 0.0;
    let (scale, cap) = (d.splat(transform.scale), d.splat(transform.cap));
    for at in (0..len).step_by(S::LANES) {
        let lanes = up_to::<S>(len - at);
        // SAFETY: the mask keeps to the logits.
        let v = unsafe { s.load_lanes(x.wrapping_add(at), lanes, S::Real::ZERO) };
        let (mut values, mut slopes) = (s.widen(v), s.widen(v));
        for (v, d_v) in values.as_mut().iter_mut().zip(slopes.as_mut()) {
            let scaled = d.mul(*v, scale);
            if capped {
                let (tanh, derivative) = real::tanh(d, d.div(scaled, cap));
                *v = d.mul(cap, tanh);
                // Never infinite: a probability of 0 has a gradient of 0.
                let most = S::Real::MAX.to_f64();
                let steep = d.max(d.splat(-most), d.mul(scale, derivative));
                *d_v = d.min(d.splat(most), steep);
            } else {
                *v = scaled;
            }
        }
        // SAFETY: as above.
        unsafe {
            s.store_lanes(x.wrapping_add(at), lanes, s.narrow(values));
            if capped && !slope.is_null() {
                s.store_lanes(slope.wrapping_add(at), lanes, s.narrow(slopes));
            }
        }
    }
}

/// What the second sweep subtracts.
#[derive(Clone, Copy, Debug)]
pub enum Bias {
    /// The same of every class; nothing is +0, which leaves every bit as it is.
    Uniform(f64),
    /// One number of the lanes' type for each class.
    Each(*const u8),
}

/// Where it gets exponentials from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// They are where the logits were.
    Kept,
    /// Logits that are known to be in_range.
    InRange,
    /// Logits.
    Logits,
    /// Logits, whose exponentials are to be of base e.
    BaseE,
    /// There are none: the gradient is what is subtracted.
    Absent,
    /// Logits, and no exponentials at all: their distance from the shift, less the factor.
    Logs,
}

/// A chunk in the second sweep.
#[derive(Clone, Copy, Debug)]
pub struct GradientChunk {
    /// The logits, or exponentials in their place.
    pub x: *const u8,
    /// How many.
    pub len: usize,
    /// Where the gradient goes.
    pub g: *mut u8,
    /// The one that is written later.
    pub excluded: Option<usize>,
    /// The logits of a row to come, to be fetched on the way; null for none.
    pub next: *const u8,
    /// What is computed from x.
    pub source: Source,
    /// The shift of the exponentials, and what they are multiplied by.
    pub scale_of_exps: ExpScale,
    /// What is subtracted then.
    pub bias: Bias,
    /// What the difference is multiplied by.
    pub scale: f64,
    /// And by that, in the lanes' type; null for 1.
    pub slope: *const u8,
    /// Add to what is there.
    pub accumulate: bool,
    /// Write around the caches.
    pub stream: bool,
}

/// Writes `(2^(L·(x - shift_logit) - shift_exponent)·factor - bias)·scale·slope` to `g`, with log2 e for L if so wanted.
///
/// # Safety
/// The logits, of type `E`, and what bias and slope point to are readable; `g`, of type `G`, is
/// writable over the chunk and apart from the logits or exactly them.
#[inline(always)]
pub unsafe fn gradient<S: Simd<Real: Base>, E: Element<S>, G: Element<S>>(
    s: S,
    chunk: &GradientChunk,
) {
    let edges = Edges::of::<S, G>(s, chunk);
    macro_rules! sweep {
        ($source:expr, $rich:expr) => {{
            let sweep = Sweep::<S, { $source }, $rich>::new(s, chunk);
            // SAFETY: the caller's promise.
            unsafe { Run::<S, E, G, { $source }, $rich>::new(&sweep, chunk, edges) }.whole()
        }};
    }
    let plain = chunk.is_plain();
    let shift_logit = chunk.scale_of_exps.shift.is_by_logit();
    match chunk.source {
        Source::Kept if plain && E::EXACT => sweep!(KEPT, false),
        Source::Kept if E::EXACT => sweep!(KEPT, true),
        Source::InRange if plain => sweep!(IN_RANGE, false),
        Source::Absent => sweep!(ABSENT, true),
        Source::Logs => sweep!(LOGS, false),
        Source::BaseE if plain && !shift_logit => sweep!(BASE_E, false),
        Source::BaseE => sweep!(BASE_E, true),
        _ if plain && !shift_logit => sweep!(CLAMPED, false),
        _ => sweep!(CLAMPED, true),
    }
}

/// The arithmetic of the second sweep. `RICH`: the shift may be shift_logit, the factor is split in two,
/// each class may have a bias and a slope of its own.
#[derive(Clone, Copy)]
struct Sweep<S: Simd, const SOURCE: u8, const RICH: bool> {
    s: S,
    // One of the two is used, if any.
    shift_exponent: Exp2<S, false>,
    shift_logit: Exp2<S, true>,
    before: S::Vector,
    after: S::Vector,
    bias: S::Vector,
    scale: S::Vector,
    biases: *const S::Real,
    slopes: *const S::Real,
    /// Of logarithms: the shift, what lse is above it, negative, L and its inverse.
    log: [f64; 5],
}

impl<S: Simd<Real: Base>, const SOURCE: u8, const RICH: bool> Sweep<S, SOURCE, RICH> {
    #[inline(always)]
    fn new(s: S, chunk: &GradientChunk) -> Self {
        let (scale_of_exps, l) = (&chunk.scale_of_exps, S::Real::L.to_f64());
        let (before, after) =
            if RICH { ExpScale::split(scale_of_exps.factor) } else { (1.0, scale_of_exps.factor) };
        let (bias, biases) = match chunk.bias {
            Bias::Uniform(bias) => (bias, std::ptr::null()),
            Bias::Each(biases) => (0.0, biases.cast()),
        };
        Sweep {
            s,
            shift_exponent: Exp2::new(s, scale_of_exps.shift),
            shift_logit: Exp2::new(s, scale_of_exps.shift),
            before: s.splat(S::Real::from_f64(before)),
            after: s.splat(S::Real::from_f64(after)),
            // 0 and not -0, which would leave -0 where nothing is taken times a negative factor.
            bias: s.splat(S::Real::from_f64(0.0 - bias)),
            scale: s.splat(S::Real::from_f64(chunk.scale)),
            biases,
            slopes: chunk.slope.cast(),
            log: [
                scale_of_exps.shift.logit,
                scale_of_exps.shift.exponent,
                -scale_of_exps.factor,
                l,
                1.0 / l,
            ],
        }
    }

    /// The gradient of class `at` of the chunk and those after it, where the logits, or the
    /// exponentials kept in their place, are `x`.
    ///
    /// # Safety
    /// Class `at + i` is one of the chunk's for every bit i of `lanes`.
    #[inline(always)]
    unsafe fn value(&self, x: S::Vector, at: usize, lanes: u32) -> S::Vector {
        let s = self.s;
        let e = match SOURCE {
            KEPT => x,
            IN_RANGE => self.shift_exponent.value::<false>(x),
            CLAMPED if RICH => self.shift_logit.value::<true>(x),
            CLAMPED => self.shift_exponent.value::<true>(x),
            BASE_E if RICH => self.shift_logit.base_e(x),
            BASE_E => self.shift_exponent.base_e(x),
            ABSENT => s.splat(S::Real::ZERO),
            _ => {
                let (d, mut wide) = (s.wide(), s.widen(x));
                let [shift_logit, shift_exponent, rise, l, inverse] = self.log.map(|x| d.splat(x));
                for x in wide.as_mut() {
                    let above = d.mul_sub_exact(d.sub(*x, shift_logit), l, shift_exponent);
                    *x = d.mul_add(above, inverse, rise);
                }
                return s.narrow(wide);
            }
        };
        if !RICH {
            return s.mul_add(e, self.after, self.bias);
        }
        let zero = S::Real::ZERO;
        let bias = if self.biases.is_null() {
            self.bias
        } else {
            // SAFETY: as many as logits; the mask keeps to them.
            let bias = unsafe { s.load_lanes(self.biases.wrapping_add(at), lanes, zero) };
            s.sub(s.splat(zero), bias)
        };
        let e = if SOURCE == ABSENT { e } else { s.mul(e, self.before) };
        let v = if SOURCE == ABSENT { bias } else { s.mul_add(e, self.after, bias) };
        let v = s.mul(v, self.scale);
        if self.slopes.is_null() {
            return v;
        }
        // SAFETY: as above.
        s.mul(v, unsafe { s.load_lanes(self.slopes.wrapping_add(at), lanes, zero) })
    }

    /// The classes of `range`, a register after the other.
    ///
    /// # Safety
    /// As [`gradient`]; they are in the chunk.
    #[inline(always)]
    unsafe fn part<E: Element<S>, G: Element<S>>(
        &self,
        chunk: &GradientChunk,
        range: Range<usize>,
    ) {
        let (s, zero) = (self.s, S::Real::ZERO);
        let (x, g) = (chunk.x.cast::<E>(), chunk.g.cast::<G>());
        for at in range.clone().step_by(S::LANES) {
            let lanes = up_to::<S>(range.end - at);
            // SAFETY: the mask keeps to the chunk.
            unsafe {
                let x = E::load_lanes(s, x.wrapping_add(at), lanes, zero);
                let mut v = self.value(x, at, lanes);
                if chunk.accumulate {
                    v = s.add(G::load_lanes(s, g.wrapping_add(at), lanes, zero), v);
                }
                G::store_lanes(s, g.wrapping_add(at), lanes, v);
            }
        }
    }
}

/// Where the blocks of a chunk start, and what is not streamed.
#[derive(Clone, Copy)]
struct Edges {
    /// The first class of the first block.
    head: usize,
    /// The first class of the block that is not streamed; past every chunk if all are.
    cached: usize,
}

impl Edges {
    /// Of a chunk whose gradient is of type `G`. Streamed writes are whole cache lines. Those that
    /// are not, at both ends, and the block with the target, which is written once more, go through
    /// the cache; they are asked for here, for a write that waits for its line holds up all behind it.
    #[inline(always)]
    fn of<S: Simd, G>(s: S, chunk: &GradientChunk) -> Edges {
        let (g, len) = (chunk.g.cast::<G>(), chunk.len);
        let mut edges = Edges { head: 0, cached: usize::MAX / 2 };
        if chunk.stream || len > CHUNK {
            // Where many are written, no register is to be split between two lines, and in place
            // none that is read. (What is not aligned to its type is never aligned to them.)
            edges.head = g.align_offset(LINE).min(len).min(S::BLOCK - 1);
        }
        if chunk.stream {
            let ask = |classes: Range<usize>| {
                for class in classes.step_by(LINE / size_of::<G>()) {
                    s.prefetch_write(g.wrapping_add(class).cast());
                }
            };
            let block_of = |class: usize| class - (class - edges.head) % S::BLOCK;
            ask(block_of(len)..len);
            if let Some(y) = chunk.excluded.filter(|&y| y >= edges.head) {
                edges.cached = block_of(y);
                ask(edges.cached..edges.cached + S::BLOCK);
            }
        }
        edges
    }
}

/// A second sweep on its way, block by block.
struct Run<'a, S: Simd, E, G, const SOURCE: u8, const RICH: bool> {
    sweep: &'a Sweep<S, SOURCE, RICH>,
    chunk: &'a GradientChunk,
    /// The first class of the next block.
    at: usize,
    /// The block of the row to come that is asked for next, if one is.
    next: *const E,
    /// What it is taken further by, if it is one.
    step: usize,
    /// See [`Edges`].
    cached: usize,
    types: PhantomData<G>,
}

impl<'a, S, E, G, const SOURCE: u8, const RICH: bool> Run<'a, S, E, G, SOURCE, RICH>
where
    S: Simd<Real: Base>,
    E: Element<S>,
    G: Element<S>,
{
    /// Nothing is written yet.
    ///
    /// # Safety
    /// As [`gradient`], until it is done.
    #[inline(always)]
    unsafe fn new(
        sweep: &'a Sweep<S, SOURCE, RICH>,
        chunk: &'a GradientChunk,
        edges: Edges,
    ) -> Self {
        let Edges { head, cached } = edges;
        let next = chunk.next.cast::<E>();
        // Never null again on the way, or always: a loop that knew would be compiled twice.
        let (next, step) =
            if next.is_null() { (next, 0) } else { (next.wrapping_add(head), S::BLOCK) };
        Run { sweep, chunk, at: head, next, step, cached, types: PhantomData }
    }

    /// Writes what comes before the first block.
    #[inline(always)]
    fn head(&self) {
        // SAFETY: a part of the chunk; `new`'s caller promised the rest.
        unsafe { self.sweep.part::<E, G>(self.chunk, 0..self.at) };
    }

    /// Writes all that is left after the head. Nothing is added to what is there.
    #[inline(always)]
    fn finish(mut self) {
        while self.at < self.end() {
            self.step();
        }
        // SAFETY: see `head`.
        unsafe { self.sweep.part::<E, G>(self.chunk, self.at..self.chunk.len) };
    }

    /// Writes all. Both ends go through the same code, of which there is much.
    #[inline(always)]
    fn whole(mut self) {
        let (mut start, mut end) = (0, self.at);
        loop {
            // SAFETY: see `head`.
            unsafe { self.sweep.part::<E, G>(self.chunk, start..end) };
            if end == self.chunk.len {
                return;
            }
            if RICH || self.chunk.accumulate {
                self.registers();
            } else {
                self.blocks();
            }
            (start, end) = (self.at, self.chunk.len);
        }
    }

    /// Where the last block ends.
    #[inline(always)]
    fn end(&self) -> usize {
        self.chunk.len - (self.chunk.len - self.at) % S::BLOCK
    }

    /// Writes all blocks, and adds nothing to them.
    #[inline(always)]
    fn blocks(&mut self) {
        let end = self.end();
        while self.at < end {
            // Decided for as many as possible: it would cost as much for each register as some of
            // its arithmetic.
            if self.streams() {
                let cached = if self.at < self.cached { self.cached } else { end };
                while self.at < end.min(cached) {
                    self.block(true);
                }
            } else {
                let some = if self.chunk.stream { self.at + S::BLOCK } else { end };
                while self.at < some {
                    self.block(false);
                }
            }
        }
    }

    /// Writes all blocks, or adds to them, one register after the other: what is rich, or added, has
    /// more to do for each, and there is much of its code.
    #[inline(always)]
    fn registers(&mut self) {
        let end = self.end();
        while self.at < end {
            if self.at % S::BLOCK < S::LANES {
                self.fetch();
            }
            let stream = self.chunk.stream && self.at.wrapping_sub(self.cached) >= S::BLOCK;
            // SAFETY: of a block of the chunk.
            unsafe { self.register::<true>(self.at, stream) };
            self.at += S::LANES;
        }
    }

    /// The block is to be written around the caches.
    #[inline(always)]
    fn streams(&self) -> bool {
        self.chunk.stream && self.at != self.cached
    }

    /// Writes a block of which there is all, and adds nothing to it.
    #[inline(always)]
    fn block(&mut self, stream: bool) {
        self.fetch();
        for j in (0..S::BLOCK).step_by(S::LANES) {
            // SAFETY: of a block of the chunk.
            unsafe { self.register::<false>(self.at + j, stream) };
        }
        self.at += S::BLOCK;
    }

    /// Writes a register of which there is all; `ADDS`: or adds it, where that is wanted.
    ///
    /// # Safety
    /// It is in the chunk, and one of a block if it is streamed.
    #[inline(always)]
    unsafe fn register<const ADDS: bool>(&self, at: usize, stream: bool) {
        let (s, chunk) = (self.sweep.s, self.chunk);
        let (x, to) = (chunk.x.cast::<E>(), chunk.g.cast::<G>().wrapping_add(at));
        // SAFETY: the caller's promise, and that of `new`'s; blocks are aligned where they are streamed to.
        unsafe {
            let mut v = self.sweep.value(E::load(s, x.add(at)), at, up_to::<S>(S::LANES));
            if ADDS && chunk.accumulate {
                v = s.add(G::load(s, to), v);
            }
            if stream { G::stream(s, to, v) } else { G::store(s, to, v) }
        }
    }

    /// Asks for a block of the row to come.
    #[inline(always)]
    fn fetch(&mut self) {
        if !self.next.is_null() {
            for line in 0..S::BLOCK * size_of::<E>() / LINE {
                self.sweep.s.prefetch_l2(self.next.cast::<u8>().wrapping_add(line * LINE));
            }
        }
        self.next = self.next.wrapping_add(self.step);
    }
}

impl<S, E, G, const SOURCE: u8, const RICH: bool> Interleaved for Run<'_, S, E, G, SOURCE, RICH>
where
    S: Simd<Real: Base>,
    E: Element<S>,
    G: Element<S>,
{
    #[inline(always)]
    fn step(&mut self) {
        if self.at < self.end() {
            if self.streams() {
                self.block(true);
            } else {
                self.block(false);
            }
        }
    }
}

/// The chunk of `len` classes from `class` on of the row at `at`, but for what is kept.
///
/// # Safety
/// The plan has the row and the classes.
#[inline(always)]
unsafe fn chunk_at(
    plan: &Plan,
    at: At,
    class: usize,
    len: usize,
    excluded: Option<usize>,
) -> Chunk {
    Chunk {
        // SAFETY: the caller's promise.
        x: unsafe { plan.logits.at(at, class) },
        len,
        excluded: excluded_in(excluded, class, len),
        kept: std::ptr::null_mut(),
        backup: std::ptr::null_mut(),
    }
}

/// Where the row's excluded is in the chunk of `len` classes from `class` on, if it is there.
#[inline(always)]
fn excluded_in(excluded: Option<usize>, class: usize, len: usize) -> Option<usize> {
    excluded.and_then(|y| y.checked_sub(class)).filter(|&y| y < len)
}

/// Room for a chunk of numbers of the lanes' type.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Buffer<const N: usize>(MaybeUninit<[f64; N]>);

impl<const N: usize> Buffer<N> {
    #[inline(always)]
    fn new() -> Self {
        Buffer(MaybeUninit::uninit())
    }

    fn start(&mut self) -> *mut u8 {
        self.0.as_mut_ptr().cast()
    }
}

/// A chunk of logits, scaled and capped.
struct Staged {
    x: Buffer<CHUNK>,
    slope: Buffer<CHUNK>,
}

impl Staged {
    /// Fills in; `chunk` is then of the lanes' type.
    ///
    /// # Safety
    /// The chunk is one of the plan's.
    unsafe fn fill(&mut self, k: &Kernels, with: &Transform, chunk: &mut Chunk, slope: bool) {
        let slope = if slope { self.slope.start() } else { std::ptr::null_mut() };
        // SAFETY: the caller's promise; the buffers hold a chunk.
        unsafe {
            (k.stored.widen)(chunk.x, chunk.len, self.x.start());
            (k.lanes.transform)(self.x.start(), chunk.len, with, slope);
        }
        chunk.x = self.x.start();
    }
}

/// The shift that the row's chunks start from.
///
/// # Safety
/// The row is one of the plan's; the same for all below.
pub unsafe fn initial_shift(
    k: &Kernels,
    plan: &Plan,
    at: At,
    excluded: Option<usize>,
) -> InitialShift {
    // SAFETY: within the row.
    let mut head = unsafe { chunk_at(plan, at, 0, plan.classes.min(HEAD), excluded) };
    // SAFETY: as above.
    let max = unsafe {
        if let Some(with) = &plan.transform {
            let mut staged = Buffer::<HEAD>::new();
            (k.stored.widen)(head.x, head.len, staged.start());
            (k.lanes.transform)(staged.start(), head.len, with, std::ptr::null_mut());
            head.x = staged.start();
            (k.staged.max)(&head)
        } else {
            (k.stored.max)(&head)
        }
    };
    let shift = plan.shift_at(max);
    if max.is_finite() && !shift.is_by_logit() {
        InitialShift { shift, real: true }
    } else {
        InitialShift::NONE
    }
}

/// Adds one segment of a row to its sums; returns what its chunks needed.
///
/// # Safety
/// As [`initial_shift`]; `segment < plan.segments()`; no other thread is in this segment of this row.
pub unsafe fn sum_segment(
    k: &Kernels,
    plan: &Plan,
    at: At,
    segment: usize,
    sum: &RowSum,
    partial: &mut RowState,
) -> Marks {
    // SAFETY: the caller's promise.
    unsafe { sum_segment_beside(k, plan, at, segment, sum, None, partial) }
}

/// As [`sum_segment`], with the same segment of another row's gradient on the way.
///
/// # Safety
/// As there, and as [`gradient_segment`] for that row.
#[inline(always)]
unsafe fn sum_segment_beside(
    k: &Kernels,
    plan: &Plan,
    at: At,
    segment: usize,
    sum: &RowSum,
    other: Option<Other>,
    partial: &mut RowState,
) -> Marks {
    let start = segment * plan.segment_len();
    let end = (start + plan.segment_len()).min(plan.classes);
    if !(plan.is_plain() && sum.softmax && sum.center.is_none()) {
        if let Some(Other { at, marks, gradient }) = other {
            // SAFETY: the caller's promise.
            unsafe { gradient_segment(k, plan, at, segment, marks, gradient) };
        }
        // SAFETY: the caller's promise.
        return unsafe { sum_chunks::<false>(k, plan, at, start..end, sum, None, partial) };
    }
    if end - start <= CHUNK && other.is_none() && !plan.keeps() {
        // The usual short row. What is not usual is done again.
        let shift = sum.initial_shift.shift;
        // SAFETY: within the row.
        let sums =
            unsafe { (k.stored.sum)(&chunk_at(plan, at, start, end - start, sum.excluded), shift) };
        if sums.in_range && safe(&sum.initial_shift).contains(&sums.sum) {
            partial.level.push(&ExpSum::of(shift, sums.sum, 0.0), plan.l);
            return Marks::default();
        }
    }
    // SAFETY: the caller's promise.
    unsafe { sum_chunks::<true>(k, plan, at, start..end, sum, other, partial) }
}

/// Sums that can be relied on. Without a real initial_shift there is no telling what 0 means.
#[inline(always)]
fn safe(initial_shift: &InitialShift) -> Range<f64> {
    if initial_shift.real { 0.0..SAFE_HIGH } else { SAFE_LOW..SAFE_HIGH }
}

/// A row whose gradient is yet to be written, and what its chunks of a segment need.
#[derive(Clone, Copy)]
struct Other<'a> {
    at: At,
    marks: Marks,
    gradient: &'a RowGradient,
}

/// # Safety
/// As [`sum_segment`]. `PLAIN`: nothing is to be done but sum up exponentials of logits as stored.
unsafe fn sum_chunks<const PLAIN: bool>(
    k: &Kernels,
    plan: &Plan,
    at: At,
    classes: Range<usize>,
    sum: &RowSum,
    other: Option<Other>,
    partial: &mut RowState,
) -> Marks {
    let initial_shift = sum.initial_shift;
    let keep = plan.keeps() && sum.excluded.is_some();
    let mut backup = Buffer::<CHUNK>::new();
    let mut staged = Staged { x: Buffer::new(), slope: Buffer::new() };
    let (mut marks, safe) = (Marks::default(), safe(&initial_shift));
    let runs = PLAIN && !keep && other.is_none();
    let (mut done, mut stopped) = (0, usize::MAX);
    // Chunks of the other row that are written; a chunk that was summed up beside them, but is not done.
    let (mut written, mut tried) = (0, None);
    for (i, class) in classes.clone().step_by(CHUNK).enumerate() {
        if i < done {
            continue;
        }
        if runs && i != stopped && !marks.is_out_of_range(i) {
            let mut sums = [0.0; RUN];
            let left = (classes.end - class).div_ceil(CHUNK).min(RUN);
            // SAFETY: within the row.
            let run = unsafe { chunk_at(plan, at, class, classes.end - class, sum.excluded) };
            let sums = &mut sums[..left];
            // SAFETY: as above.
            let count = unsafe { (k.stored.sums)(&run, initial_shift.shift, &safe, sums) };
            for &sum in &sums[..count] {
                partial.level.push(&ExpSum::of(initial_shift.shift, sum, 0.0), plan.l);
            }
            done = i + count;
            stopped = done;
            if count > 0 {
                continue;
            }
        }
        if PLAIN
            && let Some(Other { at: theirs, marks: seen, gradient }) = other
            && i >= written
        {
            // A run of chunks of which nothing is known in either row, or a single one.
            let left = (classes.end - class).div_ceil(CHUNK).min(RUN);
            let plain = |chunk: &usize| !(seen.is_out_of_range(*chunk) || seen.is_redone(*chunk));
            let count =
                if marks.is_out_of_range(i) { 0 } else { (i..i + left).take_while(plain).count() };
            let len = (count.max(1) * CHUNK).min(classes.end - class);
            written = i + count.max(1);
            // SAFETY: the caller's promise, here and below.
            let chunk = unsafe { gradient_chunk(plan, theirs, i, class, len, seen, gradient) };
            match chunk {
                Some(chunk) if count > 0 && chunk.goes_beside(keep) => {
                    // SAFETY: within the row, as below.
                    let mut run = unsafe { chunk_at(plan, at, class, len, sum.excluded) };
                    if keep {
                        (run.kept, run.backup) = (run.x.cast_mut(), backup.start());
                    }
                    let (initial_shift, mut sums) = (initial_shift.shift, [0.0; RUN]);
                    let sums = &mut sums[..count];
                    // SAFETY: see above.
                    let (good, last) =
                        unsafe { (k.direct.sums_beside)(&run, initial_shift, &safe, &chunk, sums) };
                    for &sum in &sums[..good] {
                        partial.level.push(&ExpSum::of(initial_shift, sum, 0.0), plan.l);
                    }
                    done = i + good;
                    tried = (good < count).then_some(last);
                    if good > 0 {
                        continue;
                    }
                }
                // SAFETY: see above; nothing is mixed.
                Some(chunk) => unsafe { (k.direct.gradient)(&chunk) },
                None => {}
            }
        }
        let len = CHUNK.min(classes.end - class);
        // SAFETY: for all calls below: within the row; `keep` says that the gradient replaces
        // these logits, and the backup is a chunk long.
        let mut chunk = unsafe { chunk_at(plan, at, class, len, sum.excluded) };
        let mut sweeps = k.stored;
        let mut seen = RowState::EMPTY;
        if !PLAIN {
            if plan.wants_argmax() {
                // SAFETY: see above.
                seen.top = unsafe { (sweeps.argmax)(chunk.x, len) };
                seen.top.class += class;
            }
            if let Some(with) = &plan.transform {
                // SAFETY: see above.
                unsafe { staged.fill(k, with, &mut chunk, false) };
                sweeps = k.staged;
            }
            if let Some(center) = sum.center {
                // SAFETY: see above.
                (seen.dot, seen.mass) = unsafe { dots(k, sweeps, plan, at, class, &chunk, center) };
            }
            if plan.entropy.is_some() && sum.softmax {
                // SAFETY: see above.
                seen.spread = unsafe { relative_to_max(sweeps, plan, &chunk) };
            }
        }
        if !sum.softmax {
            partial.push(&seen, plan.l);
            continue;
        }
        if keep {
            chunk.kept = chunk.x.cast_mut();
            chunk.backup = backup.start();
        }
        let mut sums = None;
        if !marks.is_out_of_range(i) {
            // SAFETY: see above.
            let tried = tried.take().unwrap_or_else(|| unsafe {
                if keep {
                    (sweeps.sum_kept)(&chunk, initial_shift.shift)
                } else {
                    (sweeps.sum)(&chunk, initial_shift.shift)
                }
            });
            if tried.in_range {
                sums = Some(tried);
            } else {
                // Where one is masked, others are: the rest of the segment is not tried.
                marks.out_of_range |= !0 << (i % 64);
                // SAFETY: see above.
                unsafe { (sweeps.restore)(&chunk) };
            }
        }
        let sums = match sums {
            Some(sums) => sums,
            // SAFETY: see above.
            None => unsafe { (sweeps.clamped)(&chunk, initial_shift.shift, false) },
        };
        seen.level = if safe.contains(&sums.sum) {
            ExpSum::of(initial_shift.shift, sums.sum, 0.0)
        } else {
            marks.redone |= 1 << (i % 64);
            // SAFETY: see above.
            unsafe {
                (sweeps.restore)(&chunk);
                chunk.kept = std::ptr::null_mut();
                if sums.sum.is_nan() {
                    // There is a NaN, and a maximum does not see it.
                    ExpSum::of(Shift::ZERO, sums.sum, 0.0)
                } else {
                    relative_to_max(sweeps, plan, &chunk)
                }
            }
        };
        partial.push(&seen, plan.l);
    }
    marks
}

/// `Σ m·(x - center)` over a chunk, and `Σ m` of probability targets.
///
/// # Safety
/// As [`sum_segment`].
unsafe fn dots(
    k: &Kernels,
    sweeps: &Sweeps,
    plan: &Plan,
    at: At,
    class: usize,
    chunk: &Chunk,
    center: f64,
) -> (f64, CompensatedSum) {
    let spreads_evenly =
        matches!(plan.targets, Targets::Indices(_)) && plan.class_weights.is_none();
    if spreads_evenly {
        // SAFETY: the caller's promise.
        let dot = unsafe { (sweeps.dot)(chunk, center, std::ptr::null()) };
        return (dot, CompensatedSum::NONE);
    }
    let mut masses = [0.0; CHUNK];
    let masses = &mut masses[..chunk.len];
    // SAFETY: the caller's promise.
    unsafe { plan.mass(at, class, masses) };
    // SAFETY: the caller's promise; there are as many masses as logits.
    let dot = unsafe { (sweeps.dot)(chunk, center, masses.as_ptr()) };
    if matches!(plan.targets, Targets::Indices(_)) {
        // The sum of class weights is the plan's.
        return (dot, CompensatedSum::NONE);
    }
    // SAFETY: all of the masses; that about the tables (`Kernels`).
    (dot, unsafe { (k.lanes.total)(masses.as_ptr(), masses.len()) })
}

/// The exponentials' sum, and its first_moment, relative to a shift of the chunk's own.
///
/// # Safety
/// As [`sum_segment`]; nothing is kept.
#[cold]
unsafe fn relative_to_max(sweeps: &Sweeps, plan: &Plan, chunk: &Chunk) -> ExpSum {
    // SAFETY: readable, as the caller promises; so below.
    let max = unsafe { (sweeps.max)(chunk) };
    if max == f64::INFINITY {
        return ExpSum::of(Shift::ZERO, max, 0.0);
    }
    // NaN counts for nothing in a maximum, but not in the sum.
    let own = if max.is_finite() { plan.shift_at(max) } else { Shift::ZERO };
    // SAFETY: see above.
    let sums = unsafe { (sweeps.clamped)(chunk, own, true) };
    ExpSum::of(own, sums.sum, sums.first_moment)
}

/// Which chunks of a segment need more than the plain sweep.
#[derive(Clone, Copy, Debug, Default)]
pub struct Marks {
    /// Bit i: chunk i has exponents out of range, or may have, and is clamped.
    pub out_of_range: u64,
    /// Bit i: chunk i has a shift of its own.
    pub redone: u64,
}

impl Marks {
    #[inline(always)]
    fn is_out_of_range(self, chunk: usize) -> bool {
        self.out_of_range >> (chunk % 64) & 1 == 1
    }

    #[inline(always)]
    fn is_redone(self, chunk: usize) -> bool {
        self.redone >> (chunk % 64) & 1 == 1
    }
}

/// Writes the gradient of one segment of a row, but for the target's own part; `marks` as
/// [`sum_segment`] returned them. Streamed writes are left for the caller to fence: doing it here,
/// for every row, would wait for memory every time.
///
/// # Safety
/// As [`sum_segment`]; the plan has a gradient.
pub unsafe fn gradient_segment(
    k: &Kernels,
    plan: &Plan,
    at: At,
    segment: usize,
    marks: Marks,
    row: &RowGradient,
) {
    let start = segment * plan.segment_len();
    let end = (start + plan.segment_len()).min(plan.classes);
    for (i, class) in (start..end).step_by(CHUNK).enumerate() {
        let len = CHUNK.min(end - class);
        // SAFETY: the caller's promise, here and below.
        let chunk = unsafe { gradient_chunk(plan, at, i, class, len, marks, row) };
        let Some(chunk) = chunk else { return };
        if plan.is_mixed(row.bias) || plan.scatters() {
            // SAFETY: see above.
            unsafe { gradient_mixed(k, plan, at, class, chunk, row.bias) };
        } else {
            // SAFETY: see above.
            unsafe { (k.direct.gradient)(&chunk) };
        }
    }
}

impl GradientChunk {
    /// One factor will do, and one bias.
    #[inline(always)]
    fn is_plain(&self) -> bool {
        let uniform = matches!(self.bias, Bias::Uniform(_)) && self.slope.is_null();
        uniform && self.scale_of_exps.is_plain() && self.scale == 1.0
    }

    /// [`sums_beside`] takes it, where it keeps exponentials or does not.
    #[inline(always)]
    fn goes_beside(&self, keep: bool) -> bool {
        let source = if keep { Source::Kept } else { Source::InRange };
        let plain = self.is_plain() && !self.scale_of_exps.shift.is_by_logit();
        self.source == source && plain && !self.accumulate
    }
}

/// The gradient's chunk of `len` classes from `class` on, the `i`-th of its segment; None if the
/// plan has none.
///
/// # Safety
/// As [`gradient_segment`].
#[inline(always)]
unsafe fn gradient_chunk(
    plan: &Plan,
    at: At,
    i: usize,
    class: usize,
    len: usize,
    marks: Marks,
    row: &RowGradient,
) -> Option<GradientChunk> {
    let output = plan.gradient.as_ref()?;
    let own = plan.pass == Pass::Backward || plan.classes > KEPT_CLASSES || marks.is_redone(i);
    // SAFETY: within the row; problem.rs made sure that the gradient overlaps the logits only by
    // being exactly them.
    let (x, g) = unsafe { (plan.logits.at(at, class), output.view.at(at, class)) };
    Some(GradientChunk {
        x,
        len,
        g,
        excluded: excluded_in(row.target, class, len),
        // Never read, only prefetched.
        next: row.next.map_or(std::ptr::null(), |next| {
            // SAFETY: a class of a row of the plan.
            unsafe { plan.logits.at(next, class) }
        }),
        source: match row.kind {
            Kind::Nothing => Source::Absent,
            Kind::Logs => Source::Logs,
            Kind::BaseE => Source::BaseE,
            Kind::Exponentials if own => Source::Logits,
            Kind::Exponentials if plan.keeps() => Source::Kept,
            Kind::Exponentials if !marks.is_out_of_range(i) => Source::InRange,
            Kind::Exponentials => Source::Logits,
        },
        scale_of_exps: if own { row.own } else { row.from_initial },
        bias: Bias::Uniform(row.bias),
        scale: row.scale,
        slope: std::ptr::null(),
        accumulate: output.accumulate,
        stream: output.stream,
    })
}

/// A chunk whose logits are scaled and capped first, in which what is subtracted differs by class,
/// or whose gradient's classes are not contiguous.
///
/// Apart, for its buffers: a frame of 80 KiB is probed page by page wherever it is set up.
///
/// # Safety
/// As [`gradient_segment`].
#[inline(never)]
unsafe fn gradient_mixed(
    k: &Kernels,
    plan: &Plan,
    at: At,
    class: usize,
    mut chunk: GradientChunk,
    bias: f64,
) {
    let mut biases = Buffer::<CHUNK>::new();
    if bias != 0.0 && plan.has_masses() {
        let mut masses = [0.0; CHUNK];
        let masses = &mut masses[..chunk.len];
        // SAFETY: the caller's promise.
        unsafe { plan.mass(at, class, masses) };
        let short = plan.logits.dtype.has_short_lanes();
        let to = biases.start();
        for (i, &m) in masses.iter().enumerate() {
            let bias = if m == 0.0 { 0.0 } else { bias * m };
            // SAFETY: the buffer holds a chunk of either type.
            unsafe {
                if short {
                    to.cast::<f32>().add(i).write(bias as f32);
                } else {
                    to.cast::<f64>().add(i).write(bias);
                }
            }
        }
        chunk.bias = Bias::Each(to);
    }
    let mut staged = Staged { x: Buffer::new(), slope: Buffer::new() };
    if let Some(with) = &plan.transform {
        let mut logits = Chunk {
            x: chunk.x,
            len: chunk.len,
            excluded: None,
            kept: std::ptr::null_mut(),
            backup: std::ptr::null_mut(),
        };
        // SAFETY: the caller's promise.
        unsafe { staged.fill(k, with, &mut logits, true) };
        chunk.x = logits.x;
        chunk.next = std::ptr::null();
        if with.cap > 0.0 {
            chunk.slope = staged.slope.start();
        }
    }
    let from_lanes = plan.transform.is_some();
    if !plan.scatters() {
        let outputs = if from_lanes { k.converted } else { k.direct };
        // SAFETY: the caller's promise; what is staged is of the lanes' type.
        return unsafe { (outputs.gradient)(&chunk) };
    }
    let mut lanes = Buffer::<CHUNK>::new();
    let (g, accumulate) = (chunk.g, chunk.accumulate);
    (chunk.g, chunk.accumulate) = (lanes.start(), false);
    let outputs = if from_lanes { k.widened } else { k.gathered };
    let stride = plan.gradient.as_ref().map_or(1, |gradient| gradient.view.strides[1]);
    let tile = Tile { x: chunk.g, pitch: 1, lanes: 1, first: 0, classes: chunk.len };
    // SAFETY: the caller's promise; the buffer holds a chunk, which is then one position of a tile.
    unsafe {
        (outputs.gradient)(&chunk);
        (k.converted.scatter)(&tile, g, [0, stride], accumulate, 1);
    }
}

/// Rows that go through each stage together: what one row waits for (reductions, logarithms) is
/// hidden behind the others' work.
const BATCH: usize = ROWS;

/// Classes up to which a batch stays in the L1 cache between its sweeps.
const BATCHED_CLASSES: usize = 1280;

/// Bytes of logits of a batch that stays in the second level beside another: 0.92 of the time of single
/// rows at 8192 classes, 0.96 at 16000, no difference from 32000 on.
const PAIRED: usize = 512 * 1024;

/// Rows that go through the first sweep and the second, together or one by one.
struct Stage {
    batch: Batch,
    /// By row of a batch, or by segment of a single row: written by the first sweep, for the second.
    marks: [Marks; SEGMENTS],
}

impl Stage {
    const EMPTY: Stage =
        Stage { batch: Batch::EMPTY, marks: [Marks { out_of_range: 0, redone: 0 }; SEGMENTS] };

    /// Writes what is left to write of row `i`'s gradient.
    ///
    /// # Safety
    /// The row is one of the plan's, and no other thread is at it.
    unsafe fn write(&mut self, k: &Kernels, plan: &Plan, i: usize) {
        let Stage { batch, marks } = self;
        let lane = &mut batch.lanes()[i];
        match &lane.job {
            Job::Nothing => return,
            Job::Target => {}
            // SAFETY: the caller's promise, here and below.
            Job::Fill(value) => unsafe { lane.fill(plan, *value) },
            Job::Sweep(gradient) => {
                for (segment, marks) in marks[i..][..plan.segments()].iter().enumerate() {
                    // SAFETY: see above.
                    unsafe { gradient_segment(k, plan, lane.at, segment, *marks, gradient) };
                }
            }
        }
        // SAFETY: see above.
        unsafe { batch.place_target(plan, i) };
    }
}

/// Finds the initial_shifts of some of a batch's rows, and decides what their first sweeps are to do.
///
/// # Safety
/// As [`Batch::start`].
pub unsafe fn aim(k: &Kernels, plan: &Plan, batch: &mut Batch, rows: Range<usize>) {
    let mut initial_shifts = [InitialShift::NONE; BATCH];
    for i in rows.clone() {
        if batch.needs_softmax(plan, i) {
            let Lane { at, excluded, .. } = batch.lanes()[i];
            // SAFETY: the caller's promise.
            initial_shifts[i] = unsafe { initial_shift(k, plan, at, excluded) };
        }
    }
    // SAFETY: the caller's promise.
    unsafe { batch.read_excluded(k, plan, rows.clone()) };
    for i in rows {
        batch.aim(plan, i, initial_shifts[i]);
    }
}

/// Rows of a batch that are aimed together: those that the sums before have asked for.
fn group_size(plan: &Plan) -> usize {
    (SPAN / (plan.classes * plan.logits.size()).max(1)).clamp(1, BATCH)
}

/// Rows of a batch: as many as stay in the cache between their sweeps, where there are two.
fn batch_size(plan: &Plan) -> usize {
    if plan.gradient.is_none() || plan.classes <= BATCHED_CLASSES {
        BATCH
    } else if plan.segments() == 1 && plan.pairs_rows() {
        (PAIRED / (plan.classes * plan.logits.size())).clamp(1, BATCH)
    } else {
        1
    }
}

/// A range of rows, start to end; gives away the sums over each `len` of them.
///
/// Where the gradient's sweep over a row is simple enough, it is done beside the first sweep over
/// the next: see [`sums_beside`].
///
/// # Safety
/// As [`initial_shift`] for every row of the range; no other thread is in these rows.
pub unsafe fn rows(
    k: &Kernels,
    plan: &Plan,
    range: Range<usize>,
    len: usize,
    give: &mut dyn FnMut(Totals),
) {
    let short = plan.classes <= BATCHED_CLASSES;
    let (size, group) = (batch_size(plan), group_size(plan));
    // Where every call has these rows in one batch, whoever works on them, and the gradient or not.
    let by_batch = short && len.is_multiple_of(BATCH);
    let segments = plan.segments();
    let (mut totals, mut left) = (Totals::NONE, len);
    let mut stage = Stage::EMPTY;
    let mut before: Option<Stage> = None;
    for start in range.clone().step_by(size) {
        let count = size.min(range.end - start);
        // SAFETY: rows of the plan, and this thread's alone; so below.
        unsafe {
            stage.batch.start(k, plan, start, count);
        }
        let marks = &mut stage.marks;
        for i in 0..count {
            if i.is_multiple_of(group) {
                // SAFETY: see above.
                unsafe { aim(k, plan, &mut stage.batch, i..count.min(i + group)) };
            }
            let Lane { at, sum, partial, .. } = &mut stage.batch.lanes()[i];
            if let Some(sum) = sum {
                for segment in 0..segments {
                    let mark = if segments == 1 { i } else { segment };
                    let other = before.as_mut().and_then(|before| {
                        let Lane { at, job, .. } = &before.batch.lanes()[i];
                        let Job::Sweep(gradient) = job else { return None };
                        Some((*at, *gradient, before.marks[mark]))
                    });
                    let other = other.as_ref().map(|(at, gradient, marks)| Other {
                        at: *at,
                        marks: *marks,
                        gradient,
                    });
                    // Segments are summed up apart, as they are by a team; a row of one is its own.
                    let mut part = RowState::EMPTY;
                    let into = if segments == 1 { &mut *partial } else { &mut part };
                    // SAFETY: see above.
                    marks[mark] =
                        unsafe { sum_segment_beside(k, plan, *at, segment, sum, other, into) };
                    if segments > 1 {
                        partial.push(&part, plan.l);
                    }
                }
                if let Some(Stage { batch, .. }) = &mut before
                    && let job = &mut batch.lanes()[i].job
                    && let Job::Sweep(_) = job
                {
                    *job = Job::Nothing;
                    // SAFETY: see above.
                    unsafe { batch.place_target(plan, i) };
                }
            }
        }
        // SAFETY: see above.
        unsafe { stage.batch.finish(k, plan) };
        if by_batch {
            stage.batch.add_to(plan, &mut totals);
            left -= count;
        } else {
            for i in 0..count {
                stage.batch.add_row(plan, i, &mut totals);
                left -= 1;
                if left == 0 && i + 1 < count {
                    give(std::mem::replace(&mut totals, Totals::NONE));
                    left = len;
                }
            }
        }
        if left == 0 {
            give(std::mem::replace(&mut totals, Totals::NONE));
            left = len;
        }
        if plan.gradient.is_none() {
            continue;
        }
        if let Some(before) = &mut before {
            for i in 0..before.batch.lanes().len() {
                // SAFETY: see above.
                unsafe { before.write(k, plan, i) };
            }
        }
        if plan.pairs_rows() {
            std::mem::swap(&mut stage, before.get_or_insert(Stage::EMPTY));
            continue;
        }
        // Backwards: the row that was summed last is the one that the cache still has all of.
        for i in (0..count).rev() {
            let next = start + i + size;
            if let Job::Sweep(gradient) = &mut stage.batch.lanes()[i].job
                && next < plan.distributions()
                && plan.fetches_ahead()
            {
                gradient.next = Some(plan.nth(next));
            }
            // SAFETY: see above.
            unsafe { stage.write(k, plan, i) };
        }
    }
    if let Some(mut before) = before {
        for i in 0..before.batch.lanes().len() {
            // SAFETY: see above.
            unsafe { before.write(k, plan, i) };
        }
    }
    if left < len {
        give(totals);
    }
    if plan.streams() {
        (k.lanes.fence)();
    }
}
