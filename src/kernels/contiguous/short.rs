//! Short rows of contiguous classes, each summed in one sweep without a pass for the maximum.
//!
//! Lanes run along the classes of one row after the other. The shift of a row is the integer nearest to the largest of
//! its first [`SHORT_HEAD`] exponents:
//!
//! ```text
//! sum = Σ 2^(L·x - c)      a block of lanes, widened to f64 every four blocks
//! ```
//!
//! The sum excludes the target's class, by a comparison in every register: a block of its own for that class, as longer
//! rows have, costs more than these comparisons. The exponentials are kept for the gradient where there is room. What
//! follows for the rows is the arithmetic of ordinary rows, of which each is a lane. Where the shift turns out to be a
//! bad one, the sum is out of the range that it takes, and the driver computes the row again. Every number depends on
//! the row's own logits alone.

use crate::element::Element;
use crate::kernels::ordinary::{
    OrdinaryState, SMOOTHED, WORDS, lanes, load_wide, store_wide, weights,
};
use crate::kernels::scratch::Scratch;
use crate::math::exp2::{Base, ByExponentInMemory, Clamped, Clamping, Exp2, Shift, Unclamped};
use crate::simd::{Real, Simd, lanes_of, up_to};
use crate::strategy::{BLOCKS_A_FLUSH, LINE, PAGE, SHORT_HEAD};
use std::mem::MaybeUninit;
use std::ops::Range;

/// Bytes that a sweep prefetches ahead: rows to come.
const AHEAD: usize = 2 * PAGE;

/// Some rows, one after the other.
#[derive(Clone, Copy, Debug)]
pub struct ShortRows {
    /// The first class of the first row.
    pub x: *const u8,
    /// Elements from row to row.
    pub pitch: isize,
    /// Rows.
    pub rows: usize,
    /// Classes of a row, at least [`SHORT_HEAD`].
    pub classes: usize,
    /// Where exponentials are kept, in the lanes' own type: null if they are not.
    pub exps: *mut u8,
    /// Lanes from row to row there: [`exps_pitch`](crate::strategy::exps_pitch).
    pub exps_pitch: usize,
}

impl ShortRows {
    /// The logits of a row.
    #[inline(always)]
    fn logits<E>(&self, row: usize) -> *const E {
        self.x.cast::<E>().wrapping_offset(row as isize * self.pitch)
    }

    /// The exponentials of a row.
    #[inline(always)]
    fn exps<R>(&self, row: usize) -> *mut R {
        self.exps.cast::<R>().wrapping_add(row * self.exps_pitch)
    }
}

/// Lanes of a block at most: of f32, on every set.
const BLOCK: usize = 64;

/// The numbers of a register of lanes of a block, from `lane` on.
#[inline(always)]
fn numbers<S: Simd<Real: Base>>(s: S, lane: usize) -> S::Vector {
    debug_assert!(lane + S::LANES <= BLOCK);
    const { assert!(S::Real::NUMBERS.len() == BLOCK) };
    // SAFETY: there are BLOCK numbers, and those from `lane` on are lanes of a block, which has no more.
    unsafe { s.load(S::Real::NUMBERS.as_ptr().wrapping_add(lane)) }
}

/// Where a row's excluded class is, counted from class `at`, in every lane; below 0 or past the block if it is
/// elsewhere.
#[inline(always)]
fn excluded_from<S: Simd>(s: S, class: f64, at: usize) -> S::Vector {
    s.splat(S::Real::from_f64(class - at as isize as f64))
}

/// Sums up the exponentials of rows.
///
/// # Safety
/// The rows are readable elements of `E`, at most [`most`](crate::kernels::ordinary::most); there is room for
/// their exponentials, by `exps_pitch`, if they are kept, apart from the rows. The excluded classes were set for whole registers, to classes of the rows where they
/// are not below 0. The processor has the set of `s`.
#[inline(always)]
pub unsafe fn sums<S: Simd<Real: Base>, E: Element<S>>(
    s: S,
    rows: &ShortRows,
    state: &mut OrdinaryState,
) {
    // SAFETY: this function's own # Safety; `shifts` goes before the sums.
    unsafe {
        shifts::<S, E>(s, rows, state);
        // Where one row has exponents out of range, as masked logits have, so have others: they are not tried.
        let done = if S::FUSED { sum_rows::<S, E, Unclamped>(s, rows, state, 0) } else { 0 };
        sum_rows::<S, E, Clamped>(s, rows, state, done);
    }
}

/// Rows that are summed up to their lanes before any is summed over them, where that is a loop of its own
/// ([`Simd::SPLITS_LOOPS`]). Rows of 100 then take 0.8 of the time, of 1000 0.95.
const TOGETHER: usize = 8;

/// The sums of the lanes of a row.
struct LaneSums<S: Simd> {
    /// Of the blocks since the last flush.
    sum: S::Block,
    /// Of those before.
    totals: S::Totals,
}

/// Sums up the exponentials of the rows from `start` on. Without clamping, it stops at rows of which one has exponents out
/// of range. Returns where it ended; the rows before have their sums.
///
/// # Safety
/// As [`sums`]; [`shifts`] went before.
#[inline(always)]
unsafe fn sum_rows<S: Simd<Real: Base>, E: Element<S>, C: Clamping>(
    s: S,
    rows: &ShortRows,
    state: &mut OrdinaryState,
    mut start: usize,
) -> usize {
    // Where exponentials are not kept, every block has them in the same place: the stores cost less than a copy of the
    // code without them would take.
    let mut unkept = Scratch::<{ BLOCK / 2 }>::new();
    let (exps, exps_pitch, step) = match rows.exps.is_null() {
        true => (unkept.start().cast(), 0, 0),
        false => (rows.exps.cast::<S::Real>(), rows.exps_pitch, 1),
    };
    let mut of_rows = [const { MaybeUninit::<LaneSums<S>>::uninit() }; TOGETHER];
    let together = if S::SPLITS_LOOPS { TOGETHER } else { 1 };
    while start < rows.rows {
        let of_rows = &mut of_rows[..together.min(rows.rows - start)];
        let mut is_right = true;
        for (i, of_row) in of_rows.iter_mut().enumerate() {
            let exps = exps.wrapping_add((start + i) * exps_pitch);
            // SAFETY: this function's own # Safety; there is room for the blocks of a row, or for one (`unkept`).
            is_right &=
                unsafe { sum_lanes::<S, E, C>(s, rows, state, start + i, exps, step, of_row) };
        }
        for (i, of_row) in of_rows.iter_mut().enumerate() {
            // SAFETY: `sum_lanes` has just set the sums of the lanes. The row is one of those (# Safety).
            unsafe {
                let LaneSums { sum, totals } = of_row.assume_init_mut();
                s.add_block(totals, sum);
                let sum = s.sum(*totals);
                *lanes(&mut state.excluded_sum_loss, start + i) = sum;
                // At the ends of the checked range, the sum is NaN although no logit is (math/exp2.rs).
                is_right &= C::CLAMPS || !sum.is_nan();
            }
        }
        if !is_right {
            break;
        }
        start += of_rows.len();
    }
    start
}

/// Chooses the shifts of all rows, and reads the logits of their excluded classes.
///
/// # Safety
/// As [`sums`].
#[inline(always)]
unsafe fn shifts<S: Simd<Real: Base>, E: Element<S>>(
    s: S,
    rows: &ShortRows,
    state: &mut OrdinaryState,
) {
    let zero = s.splat(S::Real::ZERO);
    let (round, largest) = (s.splat(S::Real::ROUND), S::Real::from_f64(S::Real::MAX_SHIFT));
    for at in (0..rows.rows).step_by(S::LANES) {
        // SAFETY: `at` is below the rows, at most `most` (# Safety). The arrays have room for the most lanes
        // (`OrdinaryState`), of which registers are whole parts, and the driver set the excluded classes (# Safety). A
        // row has SHORT_HEAD classes at least (`ShortRows`), and its excluded class, if it is not below 0 (# Safety).
        unsafe {
            let excluded = s.narrow(load_wide(s, &mut state.excluded_sum_loss, at));
            s.store(lanes(&mut state.class, at), excluded);
            s.store(lanes(&mut state.shift, at), zero);
            s.store(lanes(&mut state.x_y, at), zero);
            for row in at..rows.rows.min(at + S::LANES) {
                let x = rows.logits::<E>(row);
                let mut max = s.splat(S::Real::NEG_INFINITY);
                for class in (0..SHORT_HEAD).step_by(S::LANES) {
                    // The logits are the bound, so that a NaN among them loses.
                    max = s.max(E::load(s, x.wrapping_add(class)), max);
                }
                *lanes(&mut state.shift, row) = s.max_lane(max);
                let class: f64 = *lanes(&mut state.excluded_sum_loss, row);
                if class >= 0.0 {
                    let class = class.to_int_unchecked::<isize>();
                    let x_y = (*x.wrapping_offset(class)).to_f64();
                    *lanes(&mut state.x_y, row) = S::Real::from_f64(x_y);
                }
            }
            // 0 where the exponent is too large for a shift, or infinite.
            let scaled = s.mul(s.load(lanes(&mut state.shift, at)), s.splat(S::Real::L));
            let size = s.max(scaled, s.sub(zero, scaled));
            let nearest = s.sub(s.add(scaled, round), round);
            let shift = s.keep(s.less(size, s.splat(largest)), nearest);
            s.store(lanes(&mut state.shift, at), shift);
            // The arithmetic of the rows reads whole registers.
            store_wide(s, &mut state.excluded_sum_loss, at, s.widen(zero));
            if S::Real::COMPENSATES {
                store_wide(s, &mut state.factor, at, s.widen(zero));
            }
        }
    }
}

/// Sums up the lanes of the exponentials of one row, and stores those of block `i` at `exps + i·step·BLOCK`. Sums that do
/// not clamp are right if this returns true and they are not NaN; the row, if it is ordinary, then has the bits of one that
/// does.
///
/// # Safety
/// As [`sums`]; [`shifts`] went before, and there is room for the blocks.
#[inline(always)]
unsafe fn sum_lanes<S: Simd<Real: Base>, E: Element<S>, C: Clamping>(
    s: S,
    rows: &ShortRows,
    state: &mut OrdinaryState,
    row: usize,
    exps: *mut S::Real,
    step: usize,
    to: &mut MaybeUninit<LaneSums<S>>,
) -> bool {
    let (x, classes) = (rows.logits::<E>(row), rows.classes);
    // SAFETY: the row is one of those (# Safety), and `shifts` has set its lane.
    let [shift, class] = unsafe {
        [&mut state.shift, &mut state.class].map(|of| (*lanes::<S::Real, _>(of, row)).to_f64())
    };
    let exp = Exp2::<S, ByExponentInMemory>::new(s, Shift { logit: 0.0, exponent: shift });
    let zero = S::Real::ZERO;
    let none = || LaneSums { sum: s.splat_block(zero), totals: s.totals() };
    // Where rows go one by one, a copy of the sums stays in registers.
    let (to, mut copy) = (to.write(none()), none());
    let LaneSums { sum, totals } = if S::SPLITS_LOOPS { &mut *to } else { &mut copy };
    let (mut seen, in_range) = (s.range_check_start(), s.splat(S::Real::IN_RANGE));
    let whole = classes / S::BLOCK;
    for i in 0..whole {
        let at = i * S::BLOCK;
        let excluded = excluded_from(s, class, at);
        let (x, exps) = (x.wrapping_add(at), exps.wrapping_add(at * step));
        for line in (0..S::BLOCK * size_of::<E>()).step_by(LINE) {
            s.prefetch(x.cast::<u8>().wrapping_add(AHEAD + line));
        }
        let mut exponents = s.splat_block(zero);
        for (j, sum) in sum.as_mut().iter_mut().enumerate() {
            // SAFETY: a whole block of classes of the row, which is readable (# Safety).
            let x = unsafe { E::load(s, x.add(j * S::LANES)) };
            let is_other = s.not_equal(numbers(s, j * S::LANES), excluded);
            let e = if C::CLAMPS {
                exp.value_where::<C>(x, is_other)
            } else {
                let power = exp.power::<C>(x);
                exponents.as_mut()[j] = power.m;
                s.keep(is_other, exp.value_of::<C>(power))
            };
            // SAFETY: there is room for the block (# Safety).
            unsafe { s.store(exps.add(j * S::LANES), e) };
            *sum = s.add(*sum, e);
        }
        if !C::CLAMPS {
            seen = s.range_check(seen, &exponents, in_range);
        }
        if (i + 1).is_multiple_of(BLOCKS_A_FLUSH) {
            s.add_block(totals, sum);
            *sum = s.splat_block(zero);
        }
    }
    let at = whole * S::BLOCK;
    let (excluded, held) = (excluded_from(s, class, at), (1 << (classes - at)) - 1);
    let (x, exps) = (x.wrapping_add(at), exps.wrapping_add(at * step));
    for (j, sum) in sum.as_mut().iter_mut().enumerate() {
        let held = lanes_of::<S>(held, j);
        if held == 0 {
            break;
        }
        let x = x.wrapping_add(j * S::LANES);
        // SAFETY: the mask has bits for classes of the row alone, which is readable (# Safety), and a whole register is
        // loaded where it has all of them; there is room for the block (# Safety).
        unsafe {
            let x = match S::MASKS_LOADS || held != up_to::<S>(S::LANES) {
                true => E::load_lanes(s, x, held, S::Real::NEG_INFINITY),
                false => E::load(s, x),
            };
            let is_other = s.not_equal(numbers(s, j * S::LANES), excluded);
            let e = exp.value_where::<Clamped>(x, is_other);
            s.store(exps.wrapping_add(j * S::LANES), e);
            *sum = s.add(*sum, e);
        }
    }
    if !S::SPLITS_LOOPS {
        *to = copy;
    }
    C::CLAMPS || s.range_check_passed(seen)
}

/// Where the gradient of rows goes.
#[derive(Clone, Debug)]
pub struct ShortGradient {
    /// The first class of the first row.
    pub g: *mut u8,
    /// Elements from row to row.
    pub pitch: isize,
    /// The gradient is added to what the memory holds.
    pub accumulate: bool,
    /// Stores bypass the caches.
    pub stream: bool,
    /// Bit i: row i is written.
    pub writes: [u64; WORDS],
    /// The classes that are written.
    pub classes: Range<usize>,
    /// The rows are smoothed.
    pub is_smoothed: bool,
    /// The weights of the classes that are written if the rows are smoothed: null if each is 1.
    pub weights: *const f64,
}

/// Writes the gradient of rows: the exponentials that [`sums`] has kept, times the factors, and the entries.
///
/// # Safety
/// As [`sums`], which went before, as did the arithmetic of the rows; the gradient is writable for all classes of the
/// rows that are written, exactly where the exponentials are or apart from them. If it is streamed, the room for the
/// exponentials was set as a whole before.
#[inline(always)]
pub unsafe fn gradient<S: Simd<Real: Base>, G: Element<S>>(
    s: S,
    rows: &ShortRows,
    state: &mut OrdinaryState,
    to: &ShortGradient,
) {
    // SAFETY: this function's own # Safety.
    unsafe {
        // Smoothed rows have lanes of f32 (`Loss::has_ordinary_rows`).
        if to.is_smoothed && !S::Real::COMPENSATES {
            gradient_as::<S, G, true>(s, rows, state, to);
        } else {
            gradient_as::<S, G, false>(s, rows, state, to);
        }
    }
}

/// # Safety
/// As [`gradient`]; `IS_SMOOTHED`: the rows are. If not, all classes are written.
#[inline(always)]
unsafe fn gradient_as<S: Simd<Real: Base>, G: Element<S>, const IS_SMOOTHED: bool>(
    s: S,
    rows: &ShortRows,
    state: &mut OrdinaryState,
    to: &ShortGradient,
) {
    let (start, end) = match IS_SMOOTHED {
        true => (to.classes.start, to.classes.end),
        false => (0, rows.classes),
    };
    for row in 0..rows.rows {
        // SAFETY: the row is one of those (# Safety of `sums`), and WORDS words have 64 rows each.
        if unsafe { to.writes.get_unchecked(row / 64) } >> (row % 64) & 1 == 0 {
            continue;
        }
        // SAFETY: the row is one of those (# Safety); `sums` and the arithmetic of the rows have set its lane.
        let [class, factor, entry] = unsafe {
            [&mut state.class, &mut state.factor, &mut state.entry]
                .map(|of| *lanes::<S::Real, _>(of, row))
        };
        let bias = match IS_SMOOTHED {
            // SAFETY: smoothed rows are no more than SMOOTHED (# Safety), and have their biases as the other numbers.
            true => unsafe { *lanes::<S::Real, _>(&mut state.entry, SMOOTHED + row) },
            false => S::Real::ZERO,
        };
        let (class, is_kept) = (class.to_f64(), class.to_f64() >= 0.0);
        let row = GradientRow::<S, G> {
            exps: rows.exps::<S::Real>(row).cast_const(),
            g: to.g.cast::<G>().wrapping_offset(row as isize * to.pitch),
            class,
            // The logits of an ignored row may be anything.
            is_kept,
            factor: s.splat(factor),
            entry: s.splat(entry),
            bias: s.splat(bias),
            weights: to.weights,
            start,
            end,
        };
        // SAFETY: the gradient of the row is writable, and `sums` has kept its exponentials (# Safety). The class is
        // one of the row's if it is not below 0 (# Safety of `sums`).
        unsafe {
            if to.accumulate {
                row.part::<true, true, IS_SMOOTHED>(s, start, end);
            } else if !IS_SMOOTHED && to.stream && is_kept && S::FUSED {
                row.stream(s, end);
            } else {
                row.part::<false, false, IS_SMOOTHED>(s, start, end);
                if is_kept {
                    let class = class.to_int_unchecked::<isize>();
                    if !IS_SMOOTHED || (start as isize..end as isize).contains(&class) {
                        *row.g.wrapping_offset(class) = G::from_f64(entry.to_f64());
                    }
                }
            }
        }
    }
}

/// A row whose gradient is written.
struct GradientRow<S: Simd, G> {
    exps: *const S::Real,
    g: *mut G,
    /// The excluded class, below 0 for an ignored row.
    class: f64,
    is_kept: bool,
    factor: S::Vector,
    entry: S::Vector,
    bias: S::Vector,
    weights: *const f64,
    /// The classes that are written.
    start: usize,
    end: usize,
}

impl<S: Simd<Real: Base>, G: Element<S>> GradientRow<S, G> {
    /// The gradient of a register of classes from `at` on; that of the excluded class with `ENTRY` alone.
    ///
    /// # Safety
    /// As [`gradient`]; class `at` is one of those that are written.
    #[inline(always)]
    unsafe fn value<const ENTRY: bool, const SMOOTHED: bool>(&self, s: S, at: usize) -> S::Vector {
        let zero = s.splat(S::Real::ZERO);
        // SAFETY: there is room for a register that begins at any class of the row (`exps_pitch`; # Safety of `sums`),
        // and what follows the row's registers is set if the row is streamed (# Safety of `gradient`).
        let e = unsafe { s.load(self.exps.wrapping_add(at)) };
        let v = if !self.is_kept {
            zero
        } else if SMOOTHED {
            let (first, left) = (at - self.start, self.end - at);
            // SAFETY: the classes that are written have a weight each (`ShortGradient`), and `at` is one of them
            // (# Safety).
            let weights = unsafe { weights(s, self.weights, first, left) };
            s.mul_sub(e, self.factor, s.mul(self.bias, weights))
        } else {
            s.mul_add(e, self.factor, zero)
        };
        if !ENTRY {
            return v;
        }
        let is_entry = s.equal(numbers(s, 0), excluded_from(s, self.class, at));
        s.select(is_entry, self.entry, v)
    }

    /// Writes the classes from `start` to `end`, or adds to them.
    ///
    /// # Safety
    /// As [`gradient`]; the classes are among those that are written.
    #[inline(always)]
    unsafe fn part<const ENTRY: bool, const ADD: bool, const SMOOTHED: bool>(
        &self,
        s: S,
        start: usize,
        end: usize,
    ) {
        let mut at = start;
        while at < end {
            let g = self.g.wrapping_add(at);
            // SAFETY: the gradient is writable for the classes below `end` (# Safety): a whole register of them, by the
            // comparison, or those that have a bit in the mask.
            unsafe {
                let v = self.value::<ENTRY, SMOOTHED>(s, at);
                if !ADD && end - at >= S::LANES {
                    G::store(s, g, v);
                } else {
                    let held = up_to::<S>(end - at);
                    let v = match ADD {
                        true => s.add(G::load_lanes(s, g, held, S::Real::ZERO), v),
                        false => v,
                    };
                    G::store_lanes(s, g, held, v);
                }
            }
            at += S::LANES;
        }
    }

    /// Writes a whole row, which is not smoothed, past the caches, but for the parts of cache lines at its ends.
    ///
    /// # Safety
    /// As [`gradient`].
    #[inline(always)]
    unsafe fn stream(&self, s: S, classes: usize) {
        let mut at = self.g.align_offset(LINE).min(classes);
        // SAFETY: this function's own # Safety; a register that is streamed lies within the row, and begins at a
        // multiple of its size from the start of a line.
        unsafe {
            self.part::<true, false, false>(s, 0, at);
            while classes - at >= S::LANES {
                G::stream(s, self.g.wrapping_add(at), self.value::<true, false>(s, at));
                at += S::LANES;
            }
            self.part::<true, false, false>(s, at, classes);
        }
    }
}
