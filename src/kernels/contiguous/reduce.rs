//! Reductions over a chunk: exponential sums, maximum, argmax, and sums weighted by masses.

use super::block::{Blocks, Chunk, Interleaved, NoInterleaved, excluded_in};
use crate::element::Element;
use crate::kernels::ranking::Bound;
use crate::kernels::row_state::ArgMax;
use crate::math::compensated::CompensatedSum;
use crate::math::exp2::{
    Base, ByExponent, ByLogit, Clamped, Clamping, Exp2, Shift, ShiftKind, Unclamped,
};
use crate::math::real;
use crate::simd::{ONES, Real, Simd, TOTALS, WideVector, all_lanes, lanes_of, up_to, v_len};
use crate::strategy::{BLOCKS_A_FLUSH, CHUNK, LINE, PAGE, PREFETCH_SPAN};
use std::marker::PhantomData;
use std::ops::Range;

/// Logits whose bits are in one word.
pub const WORD: usize = u64::BITS as usize;
/// Words with a bit for each logit of a chunk.
pub const CHUNK_WORDS: usize = CHUNK / WORD;

/// What a sum over a chunk finds.
#[derive(Clone, Copy, Debug)]
pub struct Sums {
    /// Σ 2^t, t the exponents.
    pub sum: f64,
    /// Σ t·2^t, if it was asked for.
    pub first_moment: f64,
    /// No exponent was out of range. If one was, the sums mean nothing.
    pub in_range: bool,
}

/// The compile-time choices of a sum.
pub trait SumMode {
    /// Which shifts it takes.
    type Shift: ShiftKind;
    /// Whether it is right for exponents out of range.
    type Clamping: Clamping;
    /// One of many chunks: prefetches go to the second level of cache. What is being read does not
    /// leave them room in a first level of 32 KiB.
    const LONG: bool = false;
    /// Exponentials are stored over the logits, which are backed up.
    const STORES: bool = false;
    /// The first moment is summed too.
    const MOMENT: bool = false;
}

/// A chunk by itself.
pub struct Single;
/// One of many chunks.
pub struct Long;
/// A chunk by itself, whose exponentials are stored.
pub struct Storing;
/// One of many chunks, whose exponentials are stored.
pub struct LongStoring;
/// A chunk with exponents out of range.
pub struct OutOfRange;
/// A chunk with exponents out of range, whose exponentials are stored.
pub struct OutOfRangeStoring;
/// A chunk whose first moment is wanted.
pub struct Moment;
/// A chunk that is counted from a logit.
pub struct FromLogit;

impl SumMode for Single {
    type Shift = ByExponent;
    type Clamping = Unclamped;
}
impl SumMode for Long {
    type Shift = ByExponent;
    type Clamping = Unclamped;
    const LONG: bool = true;
}
impl SumMode for Storing {
    type Shift = ByExponent;
    type Clamping = Unclamped;
    const STORES: bool = true;
}
impl SumMode for LongStoring {
    type Shift = ByExponent;
    type Clamping = Unclamped;
    const LONG: bool = true;
    const STORES: bool = true;
}
impl SumMode for OutOfRange {
    type Shift = ByExponent;
    type Clamping = Clamped;
}
impl SumMode for OutOfRangeStoring {
    type Shift = ByExponent;
    type Clamping = Clamped;
    const STORES: bool = true;
}
impl SumMode for Moment {
    type Shift = ByExponent;
    type Clamping = Clamped;
    const MOMENT: bool = true;
}
impl SumMode for FromLogit {
    type Shift = ByLogit;
    type Clamping = Clamped;
    const MOMENT: bool = true;
}

/// The largest logit of a chunk without its excluded class; a NaN counts for nothing.
///
/// # Safety
/// The chunk's logits are readable elements of `E`; the processor has the set of `s`.
#[inline(always)]
pub unsafe fn max<S: Simd, E: Element<S>>(s: S, chunk: &Chunk) -> f64 {
    let blocks = Blocks::new::<S>(chunk.len, chunk.excluded);
    let x = chunk.x.cast::<E>();
    let mut max = s.splat_block(S::Real::NEG_INFINITY);
    for i in 0..blocks.whole {
        let p = x.wrapping_add(blocks.whole_at::<S>(i));
        for (j, m) in max.as_mut().iter_mut().enumerate() {
            // The bound comes second, so that a NaN loses.
            // SAFETY: a whole block lies within the chunk (`Blocks::new`), which is readable (# Safety).
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
            // SAFETY: the mask has bits for classes of the chunk alone (`Blocks::masked`), which are
            // readable (# Safety).
            *m = unsafe { s.max(E::load_lanes(s, p, lanes, S::Real::NEG_INFINITY), *m) };
        }
    }
    s.max_of_block(max).to_f64()
}

/// The exponential sum of a chunk without its excluded class, if its exponents are in range.
///
/// # Safety
/// As [`max`]; the shift has no logit.
#[inline(always)]
pub unsafe fn sum<S: Simd<Real: Base>, E: Element<S>>(s: S, chunk: &Chunk, shift: Shift) -> Sums {
    // SAFETY: the logits are readable (# Safety), and `Single` stores nothing.
    unsafe { sum_as::<S, E, Single, _>(s, chunk, shift, &mut NoInterleaved) }
}

/// [`sum`] of one chunk of `CHUNK` classes after the other, until one is out of range or its sum is not
/// in `safe`; returns how many came before. A call for each would cost as much as some dozens of classes.
///
/// # Safety
/// As [`sum`] for the classes of `chunks`, which has `sums.len()` chunks.
#[inline(always)]
pub unsafe fn sums<S: Simd<Real: Base>, E: Element<S>>(
    s: S,
    chunks: &Chunk,
    shift: Shift,
    safe: &Range<f64>,
    sums: &mut [f64],
) -> usize {
    for (i, sum_of) in sums.iter_mut().enumerate() {
        let start = i * CHUNK;
        let len = CHUNK.min(chunks.len - start);
        let x = chunks.x.cast::<E>().wrapping_add(start).cast();
        let chunk = Chunk { x, len, excluded: excluded_in(chunks.excluded, start, len), ..*chunks };
        // SAFETY: classes `start..start + len` are among those of `chunks`, which are readable
        // (# Safety), and `Long` stores nothing.
        let sums = unsafe { sum_as::<S, E, Long, _>(s, &chunk, shift, &mut NoInterleaved) };
        if !(sums.in_range && safe.contains(&sums.sum)) {
            return i;
        }
        *sum_of = sums.sum;
    }
    sums.len()
}

/// As [`sum`], and stores the exponentials over the logits if the lanes' type is that of the logits: no
/// narrower type could hold them.
///
/// # Safety
/// As [`sum`]; `chunk.stored` and `chunk.backup` are writable for `chunk.len` elements of `E`, and
/// `chunk.stored` is `chunk.x` or apart from it.
#[inline(always)]
pub unsafe fn sum_stored<S: Simd<Real: Base>, E: Element<S>>(
    s: S,
    chunk: &Chunk,
    shift: Shift,
) -> Sums {
    // SAFETY: the logits are readable, and what `Storing` writes is writable (# Safety).
    unsafe {
        if E::NATIVE {
            sum_as::<S, E, Storing, _>(s, chunk, shift, &mut NoInterleaved)
        } else {
            sum_as::<S, E, Single, _>(s, chunk, shift, &mut NoInterleaved)
        }
    }
}

/// The exponential sum of a chunk with exponents out of range, or with a shift of its own; with `moment`,
/// the first moment too. Exponentials are stored if `chunk.stored` is not null.
///
/// # Safety
/// As [`max`]; as [`sum_stored`] if `chunk.stored` is not null, and then the shift has no logit and no
/// moment is wanted.
#[inline(always)]
pub unsafe fn sum_clamped<S: Simd<Real: Base>, E: Element<S>>(
    s: S,
    chunk: &Chunk,
    shift: Shift,
    moment: bool,
) -> Sums {
    // SAFETY: the logits are readable, and where exponentials are stored both places are writable
    // (# Safety).
    unsafe {
        match (shift.is_by_logit(), moment, E::NATIVE && !chunk.stored.is_null()) {
            (false, _, true) => {
                sum_as::<S, E, OutOfRangeStoring, _>(s, chunk, shift, &mut NoInterleaved)
            }
            (false, false, false) => {
                sum_as::<S, E, OutOfRange, _>(s, chunk, shift, &mut NoInterleaved)
            }
            (false, true, false) => sum_as::<S, E, Moment, _>(s, chunk, shift, &mut NoInterleaved),
            (true, _, _) => sum_as::<S, E, FromLogit, _>(s, chunk, shift, &mut NoInterleaved),
        }
    }
}

/// The sums over a chunk without its excluded class, with other work on the way. A sum that does not
/// clamp is right only if it turns out to be in range, and then has the bits of one that does.
///
/// # Safety
/// As [`max`]; unless `M::Shift` is [`ByLogit`], the shift has no logit; with `M::STORES`,
/// `chunk.stored` and `chunk.backup` are writable for `chunk.len` elements of `E`.
#[inline(always)]
pub unsafe fn sum_as<S: Simd<Real: Base>, E: Element<S>, M: SumMode, I: Interleaved>(
    s: S,
    chunk: &Chunk,
    shift: Shift,
    interleaved: &mut I,
) -> Sums {
    let exp = Exp2::<S, M::Shift>::new(s, shift);
    let blocks = Blocks::new::<S>(chunk.len, chunk.excluded);
    let x = chunk.x.cast::<E>();
    let (stored, backup) = (chunk.stored.cast::<E>(), chunk.backup.cast::<E>());
    let (mut totals, mut moments) = (s.totals(), s.totals());
    let (mut seen, in_range) = (s.range_check_start(), s.splat(S::Real::IN_RANGE));
    let zero = S::Real::ZERO;

    let mut i = 0;
    while i < blocks.whole {
        let end = (i + BLOCKS_A_FLUSH).min(blocks.whole);
        let (mut sum, mut moment) = (s.splat_block(zero), s.splat_block(zero));
        while i < end {
            let at = blocks.whole_at::<S>(i);
            let p = x.wrapping_add(at);
            prefetch::<S, E, M>(s, p);
            let mut exponents = s.splat_block(zero);
            for (j, acc) in sum.as_mut().iter_mut().enumerate() {
                // SAFETY: a whole block lies within the chunk (`Blocks::new`), which is readable
                // (# Safety).
                let x = unsafe { E::load(s, p.add(j * S::LANES)) };
                let power = exp.power::<M::Clamping>(x);
                exponents.as_mut()[j] = power.m;
                *acc = exp.add::<M::Clamping>(power, *acc);
                let e = exp.value_of::<M::Clamping>(power);
                if M::STORES {
                    // SAFETY: a whole block lies within the chunk (`Blocks::new`), for which both are
                    // writable (# Safety).
                    unsafe {
                        E::store(s, backup.add(at + j * S::LANES), x);
                        E::store(s, stored.add(at + j * S::LANES), e);
                    }
                }
                if M::MOMENT {
                    let h = &mut moment.as_mut()[j];
                    *h = s.mul_add(e, exp.exponent(x), *h);
                }
            }
            if !M::Clamping::CLAMPS {
                seen = s.range_check(seen, &exponents, in_range);
            }
            interleaved.step();
            i += 1;
        }
        s.add_block(&mut totals, &sum);
        if M::MOMENT {
            s.add_block(&mut moments, &moment);
        }
    }

    for (at, mask) in blocks.masked::<S>() {
        if mask == 0 {
            continue;
        }
        let p = x.wrapping_add(at);
        let mut exponents = s.splat_block(S::Real::IN_RANGE);
        let (mut sum, mut moment) = (s.splat_block(zero), s.splat_block(zero));
        for (j, acc) in sum.as_mut().iter_mut().enumerate() {
            let lanes = lanes_of::<S>(mask, j);
            if lanes == 0 {
                continue;
            }
            let p = p.wrapping_add(j * S::LANES);
            // SAFETY: the mask has bits for classes of the chunk alone (`Blocks::masked`), which are
            // readable (# Safety).
            let x = unsafe { E::load_lanes(s, p, lanes, S::Real::NEG_INFINITY) };
            *acc = exp.value::<Clamped>(x);
            if !M::Clamping::CLAMPS {
                // Lanes without a class must not look out of range.
                // SAFETY: the same lanes as those of the load above.
                let x = unsafe { E::load_lanes(s, p, lanes, exp.origin()) };
                exponents.as_mut()[j] = exp.power::<Unclamped>(x).m;
            }
            if M::STORES {
                let at = at.wrapping_add(j * S::LANES);
                // SAFETY: the mask has bits for classes of the chunk alone, for which both are writable
                // (# Safety).
                unsafe {
                    E::store_lanes(s, backup.wrapping_add(at), lanes, x);
                    E::store_lanes(s, stored.wrapping_add(at), lanes, *acc);
                }
            }
            if M::MOMENT {
                moment.as_mut()[j] = s.mul(*acc, exp.exponent(x));
            }
        }
        if !M::Clamping::CLAMPS {
            seen = s.range_check(seen, &exponents, in_range);
        }
        s.add_block(&mut totals, &sum);
        if M::MOMENT {
            s.add_block(&mut moments, &moment);
        }
    }
    let sum = s.sum(totals);
    Sums {
        sum,
        first_moment: if M::MOMENT { s.sum(moments) } else { 0.0 },
        // At the ends of the checked range, the sum is NaN although no logit is (math/exp2.rs).
        in_range: M::Clamping::CLAMPS || s.range_check_passed(seen) && !sum.is_nan(),
    }
}

/// Prefetches one block of the span after the one that holds the block at `p`: another block for each
/// `p`. Halves, which wait for arithmetic, go to the first level of cache in long sweeps too.
#[inline(always)]
fn prefetch<S: Simd, E: Element<S>, M: SumMode>(s: S, p: *const E) {
    let block = S::BLOCK * size_of::<E>();
    let at = p.addr() % PREFETCH_SPAN;
    let (pages, i) = (PREFETCH_SPAN / PAGE, at / block);
    let next = p
        .cast::<u8>()
        .wrapping_add(PREFETCH_SPAN + i % pages * PAGE + i / pages * block)
        .wrapping_sub(at);
    for line in 0..block / LINE {
        let line = next.wrapping_add(line * LINE);
        if M::LONG && size_of::<E>() > 2 { s.prefetch_l2(line) } else { s.prefetch(line) }
    }
}

/// Puts back the logits that [`sum_stored`] or [`sum_clamped`] has stored exponentials over, if they
/// stored any.
///
/// # Safety
/// One of the two ran on this chunk before; `chunk.stored` is writable and `chunk.backup` readable for
/// `chunk.len` elements of `E`, or `chunk.stored` is null; the processor has the set of `s`.
#[inline(always)]
pub unsafe fn restore<S: Simd, E: Element<S>>(s: S, chunk: &Chunk) {
    if chunk.stored.is_null() {
        return;
    }
    let (stored, backup) = (chunk.stored.cast::<E>(), chunk.backup.cast::<E>());
    let blocks = Blocks::new::<S>(chunk.len, chunk.excluded);
    let whole = (0..blocks.whole).map(|i| (blocks.whole_at::<S>(i), all_lanes::<S>()));
    // The excluded class was neither backed up nor overwritten.
    for (at, mask) in whole.chain(blocks.masked::<S>()) {
        for j in 0..S::BLOCK / S::LANES {
            let lanes = lanes_of::<S>(mask, j);
            if lanes == 0 {
                continue;
            }
            let at = at.wrapping_add(j * S::LANES);
            // SAFETY: the masks have bits for classes of the chunk alone (`Blocks`), which the sum backed
            // up (# Safety).
            unsafe {
                let x = E::load_lanes(s, backup.wrapping_add(at), lanes, S::Real::ZERO);
                E::store_lanes(s, stored.wrapping_add(at), lanes, x);
            }
        }
    }
}

/// The largest of `len` logits and its class, as [`ArgMax`] orders them.
///
/// # Safety
/// `x` is readable for `len` elements of `E`; the processor has the set of `s`.
#[inline(always)]
pub unsafe fn argmax<S: Simd, E: Element<S>>(s: S, x: *const u8, len: usize) -> ArgMax {
    // SAFETY: `len` readable elements (# Safety).
    let max = unsafe { max::<S, E>(s, &Chunk::new(x, len, None)) };
    // The first logit that equals the maximum, or is NaN.
    let (x, wanted) = (x.cast::<E>(), s.splat(S::Real::from_f64(max)));
    let mut first = None;
    for at in (0..len).step_by(S::LANES) {
        let lanes = up_to::<S>(len - at);
        // SAFETY: `lanes` has a bit for each class from `at` on below `len` (# Safety).
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

/// Sets a bit of `found` for each of `len` logits that is within a bound, bit `i` of word 0 for logit `i`; the words up
/// to the last logit's are written.
///
/// # Safety
/// `x` is readable for `len` elements of `E`; the processor has the set of `s`.
#[inline(always)]
pub unsafe fn find<S: Simd, E: Element<S>>(
    s: S,
    x: *const u8,
    len: usize,
    bound: &Bound,
    found: &mut [u64; CHUNK_WORDS],
) {
    let x = x.cast::<E>();
    let value = s.splat(S::Real::from_f64(bound.value));
    let refused = if bound.strictly { !0 } else { 0 };
    for (word, found) in found.iter_mut().enumerate().take(len.div_ceil(WORD)) {
        let start = word * WORD;
        let mut bits = 0;
        for lane in (0..WORD.min(len - start)).step_by(S::LANES) {
            let at = start + lane;
            let (p, left) = (x.wrapping_add(at), len - at);
            let lanes = up_to::<S>(left);
            // SAFETY: the logits from `at` on below `len` are readable: a register of them, or those that have a bit in
            // `lanes` (# Safety).
            let v = unsafe {
                match left >= S::LANES {
                    true => E::load(s, p),
                    false => E::load_lanes(s, p, lanes, S::Real::ZERO),
                }
            };
            let equal = s.bits(s.equal(v, value)) & refused;
            bits |= u64::from(s.bits(s.not_less(v, value)) & !equal & lanes) << lane;
        }
        *found = bits;
    }
}

/// `Σ m·(x - center)` over a chunk without its excluded class, in f64; a term with m = 0 is 0. Every mass
/// is 1 if `mass` is null. If there are masses and the sum is to be `exact`, that of lanes of f64 has what all roundings have
/// lost.
///
/// # Safety
/// As [`max`]; `mass` is null, or readable for a number per logit.
#[inline(always)]
pub unsafe fn dot<S: Simd, E: Element<S>>(
    s: S,
    chunk: &Chunk,
    center: f64,
    mass: *const f64,
    exact: bool,
) -> CompensatedSum {
    // SAFETY: the chunk is readable, and so is a mass per logit if there are masses (# Safety).
    unsafe {
        if mass.is_null() {
            dot_of::<S, E, EqualMasses>(s, chunk, center, mass)
        } else if S::Real::COMPENSATES && exact {
            dot_of::<S, E, ExactMasses>(s, chunk, center, mass)
        } else {
            dot_of::<S, E, OwnMasses>(s, chunk, center, mass)
        }
    }
}

/// Which masses a [`dot`] is compiled for.
trait Masses {
    /// Every mass is 1, and none is read.
    const EQUAL: bool;
    /// Whether the sum keeps what roundings have lost.
    const EXACT: bool = false;
}

struct EqualMasses;
struct OwnMasses;
struct ExactMasses;

impl Masses for EqualMasses {
    const EQUAL: bool = true;
}
impl Masses for OwnMasses {
    const EQUAL: bool = false;
}
impl Masses for ExactMasses {
    const EQUAL: bool = false;
    const EXACT: bool = true;
}

/// # Safety
/// As [`dot`]; `mass` is not null unless `M::EQUAL`.
#[inline(always)]
unsafe fn dot_of<S: Simd, E: Element<S>, M: Masses>(
    s: S,
    chunk: &Chunk,
    center: f64,
    mass: *const f64,
) -> CompensatedSum {
    let d = s.wide();
    let wide = <S::Wide as Simd>::LANES;
    let center = d.splat(center);
    let x = chunk.x.cast::<E>();
    let (totals, errors) = (s.totals(), s.totals());
    let mut sums = DotSums::<S, M> { s, masses: PhantomData, totals, errors };
    let blocks = Blocks::new::<S>(chunk.len, chunk.excluded);
    for i in 0..blocks.whole {
        for j in 0..S::BLOCK / S::LANES {
            let at = blocks.whole_at::<S>(i) + j * S::LANES;
            // SAFETY: a whole block lies within the chunk (`Blocks::new`), which is readable (# Safety).
            let x = s.widen(unsafe { E::load(s, x.add(at)) });
            for (i, &x) in x.as_ref().iter().enumerate() {
                let m = match M::EQUAL {
                    true => None,
                    // SAFETY: the classes of a whole block have a mass each (# Safety).
                    false => Some(unsafe { d.load(mass.add(at + i * wide)) }),
                };
                sums.add(j * v_len::<S>() + i, m, x, center);
            }
        }
    }
    for (at, mask) in blocks.masked::<S>() {
        for j in 0..S::BLOCK / S::LANES {
            let lanes = lanes_of::<S>(mask, j);
            if lanes == 0 {
                continue;
            }
            let at = at.wrapping_add(j * S::LANES);
            // SAFETY: the mask has bits for classes of the chunk alone (`Blocks::masked`), which are
            // readable (# Safety).
            let x = unsafe { E::load_lanes(s, x.wrapping_add(at), lanes, S::Real::ZERO) };
            for (i, &x) in s.widen(x).as_ref().iter().enumerate() {
                let lanes = lanes >> (i * wide) & ((1 << wide) - 1);
                let from = if M::EQUAL { ONES.as_ptr() } else { mass.wrapping_add(at + i * wide) };
                // SAFETY: the lanes are classes of the chunk, which have a mass each (# Safety); no
                // register of f64 has more lanes than `ONES`.
                let m = unsafe { d.load_lanes(from, lanes, 0.0) };
                sums.add(j * v_len::<S>() + i, Some(m), x, center);
            }
        }
    }
    if M::EXACT {
        of_totals(s, &sums.totals, &sums.errors)
    } else {
        CompensatedSum::from(s.sum(sums.totals))
    }
}

/// The sums of a [`dot`].
struct DotSums<S: Simd, M: Masses> {
    s: S,
    masses: PhantomData<M>,
    totals: S::Totals,
    /// What the roundings of `totals` and of their terms have lost, if the sum is exact.
    errors: S::Totals,
}

impl<S: Simd, M: Masses> DotSums<S, M> {
    /// Adds a register of `m·(x - center)`, the `i`-th of a block; m is 1 if there is none.
    #[inline(always)]
    fn add(&mut self, i: usize, m: Option<WideVector<S>>, x: WideVector<S>, center: WideVector<S>) {
        let d = self.s.wide();
        let (totals, errors) = (self.totals.as_mut(), self.errors.as_mut());
        let i = i % totals.len();
        let Some(m) = m else {
            totals[i] = d.add(totals[i], d.sub(x, center));
            return;
        };
        let (term, low) = real::scaled_difference(d, m, x, center);
        let (total, lost) = real::sum(d, totals[i], term);
        totals[i] = total;
        if M::EXACT {
            errors[i] = d.add(errors[i], d.add(lost, low));
        }
    }
}

/// The compensated sum of `len` numbers, in sixteen lanes on every set.
///
/// # Safety
/// `x` is readable for `len` numbers; the processor has the set of `s`.
#[inline(always)]
pub unsafe fn compensated_total<S: Simd>(s: S, x: *const f64, len: usize) -> CompensatedSum {
    let d = s.wide();
    let wide = <S::Wide as Simd>::LANES;
    let (mut sums, mut errors) = (s.totals(), s.totals());
    for start in (0..len).step_by(TOTALS) {
        for (i, (sum, lost)) in sums.as_mut().iter_mut().zip(errors.as_mut()).enumerate() {
            let at = start + i * wide;
            let p = x.wrapping_add(at);
            let left = len.saturating_sub(at);
            // SAFETY: `left` numbers from `p` on are readable (# Safety), and the mask keeps to them.
            let x = unsafe {
                if left >= wide { d.load(p) } else { d.load_lanes(p, up_to::<S::Wide>(left), 0.0) }
            };
            let (total, error) = real::sum(d, *sum, x);
            (*sum, *lost) = (total, d.add(*lost, error));
        }
    }
    of_totals(s, &sums, &errors)
}

/// The sum of totals, with what each has lost.
#[inline(always)]
fn of_totals<S: Simd>(s: S, sums: &S::Totals, errors: &S::Totals) -> CompensatedSum {
    let mut lanes = [[0.0; TOTALS]; 2];
    for (lanes, totals) in lanes.iter_mut().zip([sums, errors]) {
        for (i, &total) in totals.as_ref().iter().enumerate() {
            let at = i * <S::Wide as Simd>::LANES;
            // SAFETY: the registers of the totals have TOTALS lanes together, as many as the array.
            unsafe { s.wide().store(lanes[at..].as_mut_ptr(), total) };
        }
    }
    CompensatedSum::of_lanes(&lanes[0], &lanes[1])
}
