//! Strips of distributions that are summed in one sweep, without a pass for the maximum.
//!
//! A lane is a distribution. Its shift is the integer nearest to the largest of its first four exponents,
//! and its classes follow in groups of four:
//!
//! ```text
//! sum += (2^t_0 + 2^t_1) + (2^t_2 + 2^t_3)     the group in the lanes' own type, the sum in f64
//! ```
//!
//! In lanes of f64, the sum keeps what it loses beside it. The sum excludes the target's class, and the exponentials are
//! kept for the gradient where there is room. With label smoothing, `Σ w_c·(x_c - center)` is added up before, class by
//! class.
//! Where the shift turns out to be a bad one, the sum is out of the range that [`ordinary`] takes, and the
//! driver computes the lane again, as a [tile](super::tile) that looks for the maximum first. Every
//! number depends on the lane's own logits alone, not on its neighbours or the length of the strip.
//!
//! [`ordinary`]: crate::kernels::ordinary

use crate::element::Element;
use crate::kernels::ordinary::{
    OrdinaryState, SMOOTHED, WORDS, lanes, load_wide, most, store_wide,
};
use crate::kernels::scratch::Scratch;
use crate::math::exp2::{Base, ByExponentInMemory, Clamped, Exp2};
use crate::math::real;
use crate::simd::{Real, Simd, up_to};
use crate::strategy::{CLASSES_AHEAD, LINE, STRIP};
use std::ops::Range;

/// Classes that are summed in the lanes' own type.
pub const GROUP: usize = 4;

/// Some classes of distributions that lie side by side, at most [`most`](crate::kernels::ordinary::most).
#[derive(Clone, Copy, Debug)]
pub struct Strip {
    /// The first of the classes of the first distribution.
    pub x: *const u8,
    /// Elements from class to class.
    pub pitch: isize,
    /// Distributions.
    pub lanes: usize,
    /// Which class the first is: a multiple of four.
    pub first: usize,
    /// Classes.
    pub classes: usize,
    /// Elements to the strip that this thread takes next, which is prefetched; 0 for none.
    pub ahead: isize,
    /// Where exponentials are kept, in the lanes' own type: null if they are not.
    pub exps: *mut u8,
    /// Lanes from class to class there.
    pub exps_pitch: usize,
    /// The distributions are smoothed, which are no more than SMOOTHED then.
    pub is_smoothed: bool,
    /// The weights of the classes: null if each is 1, or if the distributions are not smoothed.
    pub weights: *const f64,
}

impl Strip {
    /// `classes` of the strip from its class `start` on, with their weights. `sizes`: of a logit and of a lane.
    #[inline(always)]
    pub fn part(
        &self,
        start: usize,
        classes: usize,
        sizes: [usize; 2],
        weights: *const f64,
    ) -> Strip {
        let x = start as isize * self.pitch * sizes[0] as isize;
        let exps = match self.exps.is_null() {
            true => self.exps,
            false => self.exps.wrapping_add(start * self.exps_pitch * sizes[1]),
        };
        let first = self.first + start;
        Strip { x: self.x.wrapping_offset(x), first, classes, exps, weights, ..*self }
    }

    /// Where the weights are, and how far from one to the next.
    #[inline(always)]
    fn weights(&self) -> (*const f64, usize) {
        static ONE: f64 = 1.0;
        if self.weights.is_null() { (&raw const ONE, 0) } else { (self.weights, 1) }
    }
}

/// Sums up the exponentials of a strip, beginning with class 0, or adds them to the sums over the classes
/// before.
///
/// # Safety
/// The strip is readable, and has at least one class and at most [`most`](crate::kernels::ordinary::most) lanes; there is room for its
/// exponentials if they are kept, apart from the strip or exactly where it is. The excluded classes were
/// set for whole registers, and the sums over the classes before the strip's went before. The processor has
/// the set of `s`.
#[inline(always)]
pub unsafe fn sums<S: Simd<Real: Base>, E: Element<S>>(
    s: S,
    strip: &Strip,
    state: &mut OrdinaryState,
) {
    // SAFETY: this function's own # Safety; groups end with the last class, and `whole` lanes are whole registers.
    unsafe {
        if strip.first == 0 {
            shifts::<S, E>(s, strip, state);
        }
        let whole = match S::MASKS_LOADS || !S::FUSED {
            true => 0,
            false => strip.lanes / S::LANES * S::LANES,
        };
        groups::<S, E, true>(s, strip, state, 0..whole);
        groups::<S, E, false>(s, strip, state, whole..strip.lanes);
    }
}

/// Groups whose sums are added to those of the lanes together, where that is a loop of its own ([`Simd::SPLITS_LOOPS`]). A
/// forward of 10 classes then takes 0.93 of the time with AVX2, 0.95 with a loop for each group. With AVX-512 it gains
/// little, and takes 1.15 of the time where logits come from memory ([2, 150, 16384]).
const BATCH: usize = 4;

/// Room for the sums of so many groups of a strip.
type BatchScratch = Scratch<{ BATCH * STRIP / 2 }>;

/// Adds up all classes of some lanes of a strip.
///
/// # Safety
/// As [`sums`]; the strip has the lanes, from a multiple of LANES on, with `WHOLE` in whole registers, and the shifts were
/// chosen.
#[inline(always)]
unsafe fn groups<S: Simd<Real: Base>, E: Element<S>, const WHOLE: bool>(
    s: S,
    strip: &Strip,
    state: &mut OrdinaryState,
    of: Range<usize>,
) {
    if of.is_empty() {
        return;
    }
    let mut batch = BatchScratch::new();
    let pitch = most(size_of::<S::Real>());
    let (mut class, mut groups) = (0, 0);
    while class < strip.classes {
        let left = strip.classes - class;
        let to = lanes::<S::Real, _>(&mut batch, groups * pitch);
        // SAFETY: this function's own # Safety; groups end with the last class, and a batch has room for BATCH of them.
        unsafe {
            match left {
                _ if !S::FUSED => {
                    group::<S, E, WHOLE>(s, strip, state, class, left.min(GROUP), of.clone(), to)
                }
                1 => group::<S, E, WHOLE>(s, strip, state, class, 1, of.clone(), to),
                2 => group::<S, E, WHOLE>(s, strip, state, class, 2, of.clone(), to),
                3 => group::<S, E, WHOLE>(s, strip, state, class, 3, of.clone(), to),
                _ => group::<S, E, WHOLE>(s, strip, state, class, GROUP, of.clone(), to),
            }
        }
        (class, groups) = (class + GROUP, groups + 1);
        if groups < BATCH && class < strip.classes {
            continue;
        }
        if S::SPLITS_LOOPS {
            for at in of.clone().step_by(S::LANES) {
                // SAFETY: the strip has the lanes (# Safety), of which the groups have set the sums, in whole registers.
                unsafe {
                    let mut sums = Sums::load(s, state, at);
                    for group in 0..groups {
                        sums.add(s, s.load(lanes(&mut batch, group * pitch + at)));
                    }
                    sums.store(s, state, at);
                }
            }
        }
        groups = 0;
    }
}

/// The sums of a register of lanes.
struct Sums<S: Simd> {
    sum: S::Widened,
    /// In lanes of f64, what they have lost.
    error: S::Widened,
}

impl<S: Simd<Real: Base>> Sums<S> {
    /// Those of the lanes from `at` on.
    ///
    /// # Safety
    /// `at` is below the lanes of a strip whose shifts were chosen, a multiple of LANES. The processor has the set of `s`.
    #[inline(always)]
    unsafe fn load(s: S, state: &mut OrdinaryState, at: usize) -> Self {
        // SAFETY: the arrays have room for the lanes of a strip (`OrdinaryState`), of which registers are whole parts, and
        // `shifts` has set them (# Safety).
        unsafe {
            let sum = load_wide(s, &mut state.excluded_sum_loss, at);
            let error = match S::Real::COMPENSATES {
                true => load_wide(s, &mut state.factor, at),
                false => sum,
            };
            Sums { sum, error }
        }
    }

    /// Adds the sums of a group.
    #[inline(always)]
    fn add(&mut self, s: S, group: S::Vector) {
        let (d, group) = (s.wide(), s.widen(group));
        let parts = self.sum.as_mut().iter_mut().zip(group.as_ref()).zip(self.error.as_mut());
        for ((sum, &group), error) in parts {
            if S::Real::COMPENSATES {
                let (total, lost) = real::sum(d, *sum, group);
                (*sum, *error) = (total, d.add(*error, lost));
            } else {
                *sum = d.add(*sum, group);
            }
        }
    }

    /// Takes them back.
    ///
    /// # Safety
    /// As [`load`](Self::load).
    #[inline(always)]
    unsafe fn store(self, s: S, state: &mut OrdinaryState, at: usize) {
        // SAFETY: the arrays have room for the lanes of a strip (`OrdinaryState`), of which registers are whole parts
        // (# Safety).
        unsafe {
            store_wide(s, &mut state.excluded_sum_loss, at, self.sum);
            if S::Real::COMPENSATES {
                store_wide(s, &mut state.factor, at, self.error);
            }
        }
    }
}

/// The logits of a register of lanes from `at` on, of the strip's class `class`; -inf where there is no lane.
///
/// # Safety
/// As [`sums`]; the strip has the class and the lane, and with `WHOLE` a register of lanes from there on.
#[inline(always)]
unsafe fn logits<S: Simd, E: Element<S>, const WHOLE: bool>(
    s: S,
    strip: &Strip,
    class: usize,
    at: usize,
) -> S::Vector {
    let p = strip.x.cast::<E>().wrapping_offset(class as isize * strip.pitch).wrapping_add(at);
    // SAFETY: the strip has the class and is readable (# Safety): a whole register of it, by `WHOLE` or the
    // comparison, or the lanes that the mask has.
    unsafe {
        if WHOLE || strip.lanes - at >= S::LANES {
            E::load(s, p)
        } else {
            E::load_lanes(s, p, up_to::<S>(strip.lanes - at), S::Real::NEG_INFINITY)
        }
    }
}

/// The shifts of a register of lanes from `at` on, from the first classes of a strip.
///
/// # Safety
/// As [`sums`]; the strip has the lane.
#[inline(always)]
unsafe fn shift<S: Simd<Real: Base>, E: Element<S>>(s: S, strip: &Strip, at: usize) -> S::Vector {
    let zero = s.splat(S::Real::ZERO);
    let (round, largest) = (s.splat(S::Real::ROUND), S::Real::from_f64(S::Real::MAX_SHIFT));
    // SAFETY: the strip has the lane (# Safety) and class 0 (# Safety of `sums`); the loop keeps to its classes.
    let max = unsafe {
        let mut max = logits::<S, E, false>(s, strip, 0, at);
        for class in 1..strip.classes.min(GROUP) {
            max = s.max(max, logits::<S, E, false>(s, strip, class, at));
        }
        max
    };
    // 0 where the exponent is too large for a shift, infinite or NaN.
    let scaled = s.mul(max, s.splat(S::Real::L));
    let size = s.max(scaled, s.sub(zero, scaled));
    let nearest = s.sub(s.add(scaled, round), round);
    s.keep(s.less(size, s.splat(largest)), nearest)
}

/// Chooses the shifts of all lanes from their first classes, and begins their sums.
///
/// # Safety
/// As [`sums`].
#[inline(always)]
unsafe fn shifts<S: Simd<Real: Base>, E: Element<S>>(
    s: S,
    strip: &Strip,
    state: &mut OrdinaryState,
) {
    let zero = s.splat(S::Real::ZERO);
    for at in (0..strip.lanes).step_by(S::LANES) {
        // SAFETY: `at` is below the strip's lanes. The arrays have room for the most lanes
        // (`OrdinaryState`), of which registers are whole parts, and the driver set the excluded classes (# Safety).
        unsafe {
            let shift = shift::<S, E>(s, strip, at);
            let excluded = s.narrow(load_wide(s, &mut state.excluded_sum_loss, at));
            s.store(lanes(&mut state.class, at), excluded);
            s.store(lanes(&mut state.shift, at), shift);
            s.store(lanes(&mut state.x_y, at), zero);
            store_wide(s, &mut state.excluded_sum_loss, at, s.widen(zero));
            if S::Real::COMPENSATES {
                store_wide(s, &mut state.factor, at, s.widen(zero));
            }
        }
    }
}

/// Adds up `w_c·(x_c - center)` of smoothed lanes, beginning with class 0, or adds them to the sums over the classes before.
/// The center of a lane is its shift.
///
/// # Safety
/// As [`sums`], which follows: it may replace the logits. Of all parts of a strip but the first, it went before on the
/// first.
#[inline(always)]
pub unsafe fn dots<S: Simd<Real: Base>, E: Element<S>>(
    s: S,
    strip: &Strip,
    state: &mut OrdinaryState,
) {
    if S::Real::COMPENSATES {
        // Smoothed rows have lanes of f32 (`Loss::has_ordinary_rows`).
        return;
    }
    let d = s.wide();
    let (weights, step) = strip.weights();
    for at in (0..strip.lanes).step_by(S::LANES) {
        // SAFETY: `at` is below the strip's lanes, at most SMOOTHED (`Strip`): there is room for as many again in the
        // arrays (`OrdinaryState`). Where this is not the first part of the strip, `sums` has set the shifts, and this
        // function the dots over the classes before (# Safety). The strip has the classes, and each a weight.
        unsafe {
            let (shift, mut dot) = match strip.first {
                0 => (shift::<S, E>(s, strip, at), s.widen(s.splat(S::Real::ZERO))),
                _ => (
                    s.load(lanes(&mut state.shift, at)),
                    load_wide(s, &mut state.grad_output, SMOOTHED + at),
                ),
            };
            let mut center = s.widen(shift);
            for center in center.as_mut() {
                *center = d.mul(*center, d.splat(S::Real::INVERSE.0));
            }
            for class in 0..strip.classes {
                let weight = d.splat(*weights.wrapping_add(class * step));
                let x = s.widen(logits::<S, E, false>(s, strip, class, at));
                for (i, dot) in dot.as_mut().iter_mut().enumerate() {
                    let distance = d.sub(x.as_ref()[i], center.as_ref()[i]);
                    *dot = d.add(*dot, d.mul(weight, distance));
                }
            }
            store_wide(s, &mut state.grad_output, SMOOTHED + at, dot);
        }
    }
}

/// Adds up `count` classes of the strip from `class` on, a group or less, of some lanes; stores the sums at `to` if they are
/// to be added to those of the lanes later ([`Simd::SPLITS_LOOPS`]).
///
/// # Safety
/// As [`groups`]; the strip has the classes, and `to` has room for all lanes of a strip.
#[inline(always)]
unsafe fn group<S: Simd<Real: Base>, E: Element<S>, const WHOLE: bool>(
    s: S,
    strip: &Strip,
    state: &mut OrdinaryState,
    class: usize,
    count: usize,
    of: Range<usize>,
    to: *mut S::Real,
) {
    let splat = |x: f64| s.splat(S::Real::from_f64(x));
    let zero = s.splat(S::Real::ZERO);
    let first = splat((strip.first + class) as isize as f64);
    let x = strip.x.cast::<E>().wrapping_offset(class as isize * strip.pitch);
    for at in of.step_by(S::LANES) {
        let mut x_of = [zero; GROUP];
        for (j, x_of) in x_of[..count].iter_mut().enumerate() {
            // SAFETY: the strip has the classes (# Safety), and `at` is below its lanes.
            *x_of = unsafe { logits::<S, E, WHOLE>(s, strip, class + j, at) };
            if strip.ahead != 0 && (at * size_of::<E>()).is_multiple_of(LINE) {
                let p = x.wrapping_offset(j as isize * strip.pitch).wrapping_add(at);
                s.prefetch(p.wrapping_offset(strip.ahead).cast());
            }
        }
        // SAFETY: the arrays have room for the most lanes (`OrdinaryState`), of which registers are whole parts, and
        // `shifts` has set those of the strip's lanes (# Safety).
        let (excluded, shift, mut x_y) = unsafe {
            (
                s.load(lanes(&mut state.class, at)),
                s.load(lanes(&mut state.shift, at)),
                s.load(lanes(&mut state.x_y, at)),
            )
        };
        let exp = Exp2::<S, ByExponentInMemory>::lanes(s, zero, shift);
        let mut e = [zero; GROUP];
        for (j, e) in e[..count].iter_mut().enumerate() {
            let is_other = s.not_equal(s.add(first, splat(j as f64)), excluded);
            x_y = s.select(is_other, x_y, x_of[j]);
            *e = exp.value_where::<Clamped>(x_of[j], is_other);
            if !strip.exps.is_null() {
                let exps_at = (class + j) * strip.exps_pitch + at;
                // SAFETY: there is room for whole registers of all classes (# Safety).
                unsafe { s.store(strip.exps.cast::<S::Real>().wrapping_add(exps_at), *e) };
            }
        }
        let group = sum_of_group(s, &e[..count]);
        // SAFETY: there is room for the sums of the group (# Safety), and the arrays have room for the most lanes
        // (`OrdinaryState`), of which registers are whole parts.
        unsafe {
            if S::SPLITS_LOOPS {
                s.store(to.wrapping_add(at), group);
            } else {
                let mut sums = Sums::load(s, state, at);
                sums.add(s, group);
                sums.store(s, state, at);
            }
            s.store(lanes(&mut state.x_y, at), x_y);
        }
    }
}

/// `(e0 + e1) + (e2 + e3)`, or as much of it as there is.
#[inline(always)]
fn sum_of_group<S: Simd>(s: S, e: &[S::Vector]) -> S::Vector {
    match *e {
        [a] => a,
        [a, b] => s.add(a, b),
        [a, b, c] => s.add(s.add(a, b), c),
        [a, b, c, d, ..] => s.add(s.add(a, b), s.add(c, d)),
        [] => s.splat(S::Real::ZERO),
    }
}

/// Where the gradient of a strip goes.
#[derive(Clone, Copy, Debug)]
pub struct StripGradient {
    /// The first class of the first distribution.
    pub g: *mut u8,
    /// Elements from class to class.
    pub pitch: isize,
    /// The gradient is added to what the memory holds.
    pub accumulate: bool,
    /// Stores bypass the caches.
    pub stream: bool,
    /// There is room for whole registers, and the exponentials are kept.
    pub padded: bool,
    /// The memory is far, and so are logits that are read again ([`is_far`](crate::strategy::is_far)).
    pub is_far: bool,
    /// Bit i: lane i is written.
    pub writes: [u64; WORDS],
}

/// Which lanes a sweep writes, and from what.
trait Writing {
    /// All of them, in whole registers, and none is ignored.
    const WHOLE: bool;
    /// Exponentials are known to be kept.
    const KEPT: bool;
    /// The distributions are smoothed.
    const SMOOTHED: bool = false;
}

/// Some lanes.
struct Masked;
/// All lanes, from logits.
struct Whole;
/// All lanes, from exponentials.
struct WholeKept;
/// Of smoothed distributions.
struct Smoothed<W>(W);

impl Writing for Masked {
    const WHOLE: bool = false;
    const KEPT: bool = false;
}
impl Writing for Whole {
    const WHOLE: bool = true;
    const KEPT: bool = false;
}
impl Writing for WholeKept {
    const WHOLE: bool = true;
    const KEPT: bool = true;
}
impl<W: Writing> Writing for Smoothed<W> {
    const WHOLE: bool = W::WHOLE;
    const KEPT: bool = W::KEPT;
    const SMOOTHED: bool = true;
}

/// Writes the gradient of a strip: the exponentials, kept or computed again, times the factors, and the
/// entries.
///
/// # Safety
/// As [`sums`], which went before, as did the arithmetic of the rows; the gradient is writable for all
/// classes and lanes, and exactly the strip, or its exponentials, or apart from them.
#[inline(always)]
pub unsafe fn gradient<S: Simd<Real: Base>, E: Element<S>, G: Element<S>>(
    s: S,
    strip: &Strip,
    state: &mut OrdinaryState,
    to: &StripGradient,
) {
    let whole = (to.padded || strip.lanes.is_multiple_of(S::LANES)) && !to.accumulate;
    let all = |bits: &[u64; WORDS]| {
        let mut all = true;
        for (word, &bits) in bits.iter().enumerate() {
            let lanes = strip.lanes.saturating_sub(word * 64).min(64);
            all &= lanes == 0 || bits | !(!0 >> (64 - lanes)) == !0;
        }
        all
    };
    let unit = S::LANES * size_of::<G>();
    let aligned = (to.g as usize).is_multiple_of(unit)
        && (to.pitch as usize).wrapping_mul(size_of::<G>()).is_multiple_of(unit);
    let stream = to.stream && aligned;
    let whole = whole && all(&to.writes) && all(&state.kept);
    // SAFETY: this function's own # Safety. `WholeKept` is for strips of whole registers, as `whole` says, whose
    // exponentials are kept, and `Whole` for strips whose logits are whole registers too; `aligned` says whether
    // streams are.
    unsafe {
        if strip.is_smoothed && !S::Real::COMPENSATES {
            if whole && !strip.exps.is_null() && S::FUSED {
                sweep::<S, E, G, Smoothed<WholeKept>>(s, strip, state, to, stream);
            } else {
                sweep::<S, E, G, Smoothed<Masked>>(s, strip, state, to, false);
            }
        } else if whole && !strip.exps.is_null() && S::FUSED {
            sweep::<S, E, G, WholeKept>(s, strip, state, to, stream);
        } else if whole && S::FUSED && strip.lanes.is_multiple_of(S::LANES) {
            sweep::<S, E, G, Whole>(s, strip, state, to, stream);
        } else {
            sweep::<S, E, G, Masked>(s, strip, state, to, false);
        }
    }
}

/// # Safety
/// As [`gradient`]; the strip and the gradient are what `W` says, and the gradient is aligned for streams.
#[inline(always)]
unsafe fn sweep<S: Simd<Real: Base>, E: Element<S>, G: Element<S>, W: Writing>(
    s: S,
    strip: &Strip,
    state: &mut OrdinaryState,
    to: &StripGradient,
    stream: bool,
) {
    let zero = s.splat(S::Real::ZERO);
    let mut number = s.splat(S::Real::from_f64(strip.first as f64));
    let (weights, step) = strip.weights();
    let rereads = !W::KEPT && strip.exps.is_null() && to.g.cast_const() != strip.x;
    for class in 0..strip.classes {
        let weight = match W::SMOOTHED {
            // SAFETY: every class of a smoothed strip has a weight (`Strip`).
            true => s.splat(S::Real::from_f64(unsafe { *weights.wrapping_add(class * step) })),
            false => zero,
        };
        let x = strip.x.cast::<E>().wrapping_offset(class as isize * strip.pitch);
        let exps = strip.exps.cast::<S::Real>().wrapping_add(class * strip.exps_pitch);
        let g = to.g.cast::<G>().wrapping_offset(class as isize * to.pitch);
        let fetches = to.is_far && class + CLASSES_AHEAD < strip.classes;
        for at in (0..strip.lanes).step_by(S::LANES) {
            if fetches && at.is_multiple_of(LINE / size_of::<S::Real>()) {
                // The same lanes of a class to come. What is narrower than a lane has some lines twice.
                let next = CLASSES_AHEAD as isize;
                if !stream {
                    s.prefetch_write(g.wrapping_offset(next * to.pitch).wrapping_add(at).cast());
                }
                if rereads {
                    s.prefetch(x.wrapping_offset(next * strip.pitch).wrapping_add(at).cast());
                }
            }
            let lanes_left = up_to::<S>(strip.lanes - at);
            // SAFETY: the arrays have room for the most lanes (`OrdinaryState`), of which registers are whole parts, and
            // `sums` and the arithmetic of the rows have set those of the strip's lanes (# Safety).
            let (excluded, factor, entry) = unsafe {
                (
                    s.load(lanes(&mut state.class, at)),
                    s.load(lanes(&mut state.factor, at)),
                    s.load(lanes(&mut state.entry, at)),
                )
            };
            let is_other = s.not_equal(number, excluded);
            let e = if !W::KEPT && (W::WHOLE || strip.exps.is_null()) {
                let x = x.wrapping_add(at);
                // SAFETY: a whole register by `W`, or lanes that the mask has, of the strip, which has the class;
                // `sums` has set the shifts (# Safety).
                let (x, shift) = unsafe {
                    let x = match W::WHOLE {
                        true => E::load(s, x),
                        false => E::load_lanes(s, x, lanes_left, S::Real::ZERO),
                    };
                    (x, s.load(lanes(&mut state.shift, at)))
                };
                Exp2::<S, ByExponentInMemory>::lanes(s, zero, shift)
                    .value_where::<Clamped>(x, is_other)
            } else {
                // SAFETY: exponentials are kept, by the comparison or `W::KEPT`: `sums` has stored whole registers of
                // them (# Safety).
                unsafe { s.load(exps.wrapping_add(at)) }
            };
            let v = if W::SMOOTHED {
                // SAFETY: the arithmetic of the rows has set the lanes of smoothed distributions, no more than SMOOTHED
                // (# Safety).
                let bias = unsafe { s.load(lanes(&mut state.entry, SMOOTHED + at)) };
                s.mul_sub(e, factor, s.mul(bias, weight))
            } else {
                s.mul_add(e, factor, zero)
            };
            let v = s.select(is_other, v, entry);
            let g = g.wrapping_add(at);
            // SAFETY: the gradient is writable for the strip's lanes (# Safety), and the mask has bits for
            // these alone, of which each word has 64; streams are aligned (`gradient`).
            unsafe {
                if W::WHOLE && stream {
                    G::stream(s, g, v);
                } else if W::WHOLE {
                    G::store(s, g, v);
                } else {
                    // The logits of an ignored lane may be anything.
                    let mut v = s.select(s.less(excluded, zero), zero, v);
                    let word = to.writes.get_unchecked(at / 64);
                    let writes = (word >> (at % 64)) as u32 & lanes_left;
                    if to.accumulate {
                        v = s.add(G::load_lanes(s, g, writes, S::Real::ZERO), v);
                    }
                    G::store_lanes(s, g, writes, v);
                }
            }
        }
        number = s.add(number, s.splat(S::Real::from_f64(1.0)));
    }
}
