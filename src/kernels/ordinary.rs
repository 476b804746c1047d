//! The arithmetic of ordinary rows, in few instructions.
//!
//! A row is ordinary if its sum over the classes but the target's is neither tiny nor huge, the target's
//! exponent is not far from the shift, and both together are not small: small exponentials may have been
//! flushed to 0. A row's own numbers decide. Such a row needs none of the cases that
//! [`row_math`](super::row_math) tells apart:
//!
//! ```text
//! q = sum·2^-t_y          Σ exp(x_c - x_y) over the other classes
//! w = 1 + q               -logp_y = ln w      p_y = 1/w      1 - p_y = q/w
//! ```
//!
//! `w` is rounded; where q < 1, the logarithm gets back what the sum has lost, so that the loss of a
//! confident row keeps its relative accuracy. With `w = 2^k·m` and `u = (m - 1)/(m + 1)`, `ln m = 2·atanh u`. That and
//! the reciprocal of w take a division each: one for both, `1/(m·(m + 1))`, makes a longer chain, and rows of 10 slower.
//!
//! Label smoothing adds `share·Σ w_c·(lse - x_c)` to `keep·w_y·(-logp_y)`. With the sum of all weights W, the mass M of a
//! row, and `dot = Σ w_c·(x_c - center)`, which the sums have made beside the exponentials:
//!
//! ```text
//! Σ w_c·(lse - x_c) = W·(-logp_y + x_y - center) - dot
//! gradient of c     = M·p_c - share·w_c              M = keep·w_y + share·W
//! gradient of y     = share·(W - w_y)·p_y - (keep + share)·w_y·(1 - p_y)
//! ```
//!
//! The first cancels where the target is far below the others: rows whose loss is small beside `share·W·(-logp_y)` are
//! not ordinary.
//!
//! In lanes of f32, q is a sum of powers of `b = e^(1 - 1.335e-8)` (math/exp2.rs). Beside x_y they have to be
//! powers of e: q and 2^-t_y are multiplied by `1 + 1.335e-8·ln q`. The exponents of the sum and of 2^-t_y add up to that
//! logarithm, within 0.4. Lanes of f64 have powers of e, and carry what q and w lose to the logarithm.

use crate::kernels::row_math::ROWS;
use crate::kernels::scratch::Scratch;
use crate::math::compensated::CompensatedLanes;
use crate::math::exp2::{Base, ByExponentInMemory, Exp2};
use crate::math::real;
use crate::simd::{Doubles, Real, Simd, WideVector, up_to};
use crate::strategy::{SMALLEST_SUM, STRIP};
use std::f64::consts::LN_2;
use std::mem::MaybeUninit;

/// The sums of ordinary rows.
pub const SUMS: std::ops::Range<f64> =
    f64::from_bits((1023 - 100) << 52)..f64::from_bits((1023 + 120) << 52);

/// How far the exponent of an ordinary row's target is from the shift at most.
pub const EXPONENT: f64 = 80.0;

/// The factors of gradients that ordinary rows may have: those times `p` stay far from the ends of f32.
pub const FACTORS: std::ops::Range<f64> =
    f64::from_bits((1023 - 35) << 52)..f64::from_bits((1023 + 35) << 52);

/// How much larger `share·W·(-logp_y)` may be than the loss that it cancels to: the error of a loss grows as much.
const CANCELLATION: f64 = 8.0;

/// What the loss of a smoothed row is below at least.
const LARGEST_LOSS: f64 = f64::from_bits((1023 + 120) << 52);

/// Lanes that smoothed rows have at most: the other half of some arrays has what smoothing needs of them.
pub const SMOOTHED: usize = STRIP / 2;

/// Words of a bit for each lane.
pub const WORDS: usize = STRIP / 64;

/// An f64 for each lane.
pub type LaneScratch = Scratch<STRIP>;
/// A number in the type of the exponentials for each lane, of which there are fewer if it is f64 ([`most`]).
pub type NarrowScratch = Scratch<{ STRIP / 2 }>;

/// Lanes at most, of a type of so many bytes.
#[inline(always)]
pub fn most(lane_size: usize) -> usize {
    STRIP * size_of::<f32>() / lane_size
}

/// What is known of the rows of a strip, or of some short rows. Each is a lane, of which there are no more than
/// [`most`], in whole registers of any set.
pub struct OrdinaryState {
    /// One after the other: the excluded class of each lane, below 0 for ignored ones, which the driver sets for
    /// whole [registers](padded); the sum over the other classes; the loss, 0 for ignored lanes.
    pub excluded_sum_loss: LaneScratch,
    /// The excluded classes in the lanes' own type.
    pub class: NarrowScratch,
    /// The exponents of the shifts.
    pub shift: NarrowScratch,
    /// The logits of the excluded classes; 0 where there is none.
    pub x_y: NarrowScratch,
    /// What the loss of each lane is multiplied by, set by the driver if options ask for it; then ln Σ exp x, if it
    /// is wanted. Of smoothed rows, from lane SMOOTHED on, the weight of the excluded class, set by the driver.
    pub weight_then_lse: LaneScratch,
    /// What the gradient of each lane is multiplied by, set by the driver if options ask for it. Of smoothed rows, from
    /// lane SMOOTHED on, `Σ w_c·(x_c - center)`.
    pub grad_output: LaneScratch,
    /// What exponentials are multiplied by for the gradient. Before, in lanes of f64, what the sums have lost.
    pub factor: NarrowScratch,
    /// The gradients of the excluded classes. Of smoothed rows, from lane SMOOTHED on, what is subtracted from the
    /// gradient of a class of weight 1.
    pub entry: NarrowScratch,
    /// Bit i: lane i counts.
    pub kept: [u64; WORDS],
    /// Bit i: the loss and the lse of lane i are what the arrays say.
    pub good: [u64; WORDS],
    /// Bit i: so is its gradient.
    pub good_gradient: [u64; WORDS],
}

impl OrdinaryState {
    /// Nothing is known yet.
    #[inline(always)]
    pub fn new() -> Self {
        // Made one by one: the compiler fills copies of what holds nothing.
        OrdinaryState {
            class: NarrowScratch::new(),
            shift: NarrowScratch::new(),
            x_y: NarrowScratch::new(),
            excluded_sum_loss: LaneScratch::new(),
            weight_then_lse: LaneScratch::new(),
            grad_output: LaneScratch::new(),
            factor: NarrowScratch::new(),
            entry: NarrowScratch::new(),
            kept: [0; WORDS],
            good: [0; WORDS],
            good_gradient: [0; WORDS],
        }
    }
}

/// The lanes of the widest register of any set.
pub const PADDING: usize = 16;

/// Lanes in whole registers of any set.
#[inline(always)]
pub fn padded(lanes: usize) -> usize {
    lanes.next_multiple_of(PADDING)
}

/// The place of lane `at`.
#[inline(always)]
pub fn lanes<T, const N: usize>(of: &mut Scratch<N>, at: usize) -> *mut T {
    debug_assert!((at + 1) * size_of::<T>() <= N * size_of::<f64>());
    of.start().cast::<T>().wrapping_add(at)
}

/// The f64 of a register of lanes from `at` on.
///
/// # Safety
/// They were set, and the array has room for the register. The processor has the set of `s`.
#[inline(always)]
pub unsafe fn load_wide<S: Simd, const N: usize>(
    s: S,
    of: &mut Scratch<N>,
    at: usize,
) -> S::Widened {
    let d = s.wide();
    let mut v = s.widen(s.splat(S::Real::ZERO));
    for (i, v) in v.as_mut().iter_mut().enumerate() {
        // SAFETY: lanes of the register, which were set (# Safety).
        *v = unsafe { d.load(lanes(of, at + i * <S::Wide as Simd>::LANES)) };
    }
    v
}

/// Sets what [`load_wide`] loads.
///
/// # Safety
/// As [`load_wide`], but for what was set.
#[inline(always)]
pub unsafe fn store_wide<S: Simd, const N: usize>(
    s: S,
    of: &mut Scratch<N>,
    at: usize,
    v: S::Widened,
) {
    for (i, &v) in v.as_ref().iter().enumerate() {
        // SAFETY: lanes of the register (# Safety).
        unsafe { s.wide().store(lanes(of, at + i * <S::Wide as Simd>::LANES), v) };
    }
}

/// The weights of a register of classes from class `at` on, of which `left` have one, in the lanes' own type: 1 if there
/// are none.
///
/// # Safety
/// `weights` is null, or readable for those classes. The processor has the set of `s`.
#[inline(always)]
pub unsafe fn weights<S: Simd>(s: S, weights: *const f64, at: usize, left: usize) -> S::Vector {
    if weights.is_null() {
        return s.splat(S::Real::from_f64(1.0));
    }
    let wide = <S::Wide as Simd>::LANES;
    let mut v = s.widen(s.splat(S::Real::ZERO));
    for (i, v) in v.as_mut().iter_mut().enumerate() {
        let held = up_to::<S::Wide>(left.saturating_sub(i * wide));
        // SAFETY: the mask has bits for classes that have a weight (# Safety).
        *v = unsafe { s.wide().load_lanes(weights.wrapping_add(at + i * wide), held, 0.0) };
    }
    s.narrow(v)
}

/// What is wanted of the rows.
#[derive(Clone, Copy, Debug)]
pub struct Wanted {
    /// [`OrdinaryState::weight_then_lse`] is there.
    pub has_weights: bool,
    /// [`OrdinaryState::grad_output`] is there.
    pub has_grad_output: bool,
    /// The lse, of ignored rows too.
    pub lse: bool,
    /// The gradient, multiplied by this.
    pub gradient: Option<f64>,
    /// The rows are smoothed; weights and grad_output are then there.
    pub smoothing: Option<Smoothing>,
}

/// Label smoothing.
#[derive(Clone, Copy, Debug)]
pub struct Smoothing {
    /// 1 - ε
    pub keep: f64,
    /// ε/C
    pub share: f64,
    /// W
    pub total: f64,
}

/// What label smoothing makes of a row.
struct Smoothed<S: Simd> {
    /// The loss, before the row's weight.
    loss: WideVector<S>,
    /// It is that.
    holds: <S::Wide as Simd>::Mask,
    /// M
    mass: WideVector<S>,
    /// The gradient of the excluded class.
    entry: WideVector<S>,
}

impl Smoothing {
    /// From the numbers of a row, `x_y - center`, the dot and the weight of the excluded class.
    #[inline(always)]
    fn smooth<S: Simd>(
        &self,
        s: S,
        row: &Row<WideVector<S>>,
        distance: WideVector<S>,
        dot: WideVector<S>,
        own: WideVector<S>,
    ) -> Smoothed<S> {
        let d = s.wide();
        let (share, total) = (d.splat(self.share), d.splat(self.total));
        let kept = d.mul(d.splat(self.keep), own);
        let spread = d.mul(share, d.mul_sub(total, d.add(row.nll, distance), dot));
        let loss = d.mul_add(kept, row.nll, spread);
        let cancelled = d.mul(d.mul(share, total), row.nll);
        let cancelled = d.max(cancelled, d.sub(d.splat(0.0), cancelled));
        let holds = d.both(
            d.less(cancelled, d.mul(d.splat(CANCELLATION), loss)),
            d.less(loss, d.splat(LARGEST_LOSS)),
        );
        let rest = d.mul(share, d.sub(total, own));
        let entry = d.mul_sub(d.mul_add(share, own, kept), row.others, rest);
        let entry = d.mul(d.sub(d.splat(0.0), entry), row.inverse);
        Smoothed { loss, holds, mass: d.mul_add(share, total, kept), entry }
    }
}

/// Computes the losses of some rows, and the coefficients of their gradients; finds out which lanes are ordinary.
///
/// # Safety
/// The sums of a [strip](crate::kernels::strided::strip::sums), of [short
/// rows](crate::kernels::contiguous::short::sums) or of a [row](crate::kernels::strided::row::sums) of a strip have set
/// the state for `count` lanes, and the driver what is [wanted](Wanted). The processor has the set of `s`.
#[inline(always)]
pub unsafe fn finish<S: Simd<Real: Base>>(
    s: S,
    count: usize,
    state: &mut OrdinaryState,
    wanted: &Wanted,
) {
    // SAFETY: this function's own # Safety.
    unsafe {
        match wanted.smoothing {
            // Smoothed rows have lanes of f32 (`Loss::has_ordinary_rows`).
            Some(_) if !S::Real::COMPENSATES => finish_as::<S, true>(s, count, state, wanted),
            _ => finish_as::<S, false>(s, count, state, wanted),
        }
    }
}

/// Registers of lanes whose rows are begun before they are finished: the halves of the arithmetic are loops of their own, for
/// the reason that [`Simd::SPLITS_LOOPS`] gives, but on every set. With AVX2, forwards of 10 classes on an inner axis take
/// 0.9 of the time of one loop; with AVX-512 they take as long.
const BLOCK: usize = 4;

/// What is known of the rows of a register of lanes before their divisions.
struct Begun<S: Simd> {
    /// 1, or 0 for rows without a class of their own.
    own: S::Widened,
    /// w
    total: S::Widened,
    /// What w has lost, where that matters.
    lost: S::Widened,
    /// q
    others: S::Widened,
    /// `2^-t_y`, beside x_y a power of e. Set if a gradient is wanted.
    unit: S::Widened,
    /// The sum over all classes, in lanes of f64. Set if the lse is wanted.
    sum: S::Widened,
    /// Bit i: lane i counts.
    kept: u32,
    /// Bit i: lane i is ordinary, but for its smoothing.
    good: u32,
}

/// # Safety
/// As [`finish`]; `IS_SMOOTHED`: the rows are.
#[inline(always)]
unsafe fn finish_as<S: Simd<Real: Base>, const IS_SMOOTHED: bool>(
    s: S,
    count: usize,
    state: &mut OrdinaryState,
    wanted: &Wanted,
) {
    (state.kept, state.good, state.good_gradient) = Default::default();
    let mut block = [const { MaybeUninit::<Begun<S>>::uninit() }; BLOCK];
    for start in (0..count).step_by(BLOCK * S::LANES) {
        let registers = (count - start).div_ceil(S::LANES).min(BLOCK);
        for (i, begun) in block[..registers].iter_mut().enumerate() {
            // SAFETY: this function's own # Safety; the register begins below `count`.
            begun.write(unsafe { begin(s, start + i * S::LANES, state, wanted) });
        }
        for (i, begun) in block[..registers].iter().enumerate() {
            let at = start + i * S::LANES;
            // SAFETY: this function's own # Safety; the register begins below `count`, and was begun just now.
            unsafe { end::<S, IS_SMOOTHED>(s, at, state, wanted, begun.assume_init_ref()) };
        }
    }
}

/// Begins the rows of a register of lanes from `at` on.
///
/// # Safety
/// As [`finish`]; the register begins below `count`.
#[inline(always)]
unsafe fn begin<S: Simd<Real: Base>>(
    s: S,
    at: usize,
    state: &mut OrdinaryState,
    wanted: &Wanted,
) -> Begun<S> {
    let d = s.wide();
    let (zero, one) = (s.splat(S::Real::ZERO), s.splat(S::Real::from_f64(1.0)));
    let splat = |x: f64| d.splat(x);
    // SAFETY: the arrays have room for the most lanes (`OrdinaryState`), of which registers are whole parts, and the sums
    // have set those of `count` lanes (# Safety of `finish`), over f64 with what they have lost.
    let (class, shift, x_y, sum, lost) = unsafe {
        (
            s.load(lanes(&mut state.class, at)),
            s.load(lanes(&mut state.shift, at)),
            s.load(lanes(&mut state.x_y, at)),
            load_wide(s, &mut state.excluded_sum_loss, at),
            match S::Real::COMPENSATES {
                true => load_wide(s, &mut state.factor, at),
                false => s.widen(zero),
            },
        )
    };
    let ignored = s.less(class, zero);
    let own = s.widen(s.select(ignored, zero, one));
    let exp = Exp2::<S, ByExponentInMemory>::lanes(s, zero, s.sub(zero, shift));
    let (unit, m) = exp.wide_value(s.sub(zero, x_y));
    let exponent = s.sub(m, s.splat(S::Real::MAGIC));
    let size = s.max(exponent, s.sub(zero, exponent));
    let near = s.bits(s.less(size, s.splat(S::Real::from_f64(EXPONENT))));
    let exponent = s.widen(s.select(ignored, zero, exponent));
    let ignored = s.bits(ignored);

    let kept = !ignored & up_to::<S>(S::LANES);
    let mut begun: Begun<S> =
        Begun { own, total: own, lost: own, others: own, unit: own, sum: own, kept, good: 0 };
    for i in 0..own.as_ref().len() {
        let (sum, lost, own) = (sum.as_ref()[i], lost.as_ref()[i], own.as_ref()[i]);
        let unit = d.select(d.less(splat(0.0), own), unit.as_ref()[i], splat(1.0));
        let (row, unit_of_e) = match S::Real::COMPENSATES {
            true => (begin_wide_row::<S>(s, [sum, lost], unit, own), unit),
            false => {
                let (k, _) = d.split(sum);
                let by = d.mul(d.add(k, exponent.as_ref()[i]), splat(S::Real::EXCESS * LN_2));
                (begin_row::<S>(s, sum, unit, by, own), d.mul_add(unit, by, unit))
            }
        };
        let within = d.both(d.less(splat(SUMS.start), sum), d.less(sum, splat(SUMS.end)));
        let is_large = d.less(d.mul(splat(SMALLEST_SUM), unit), row.total);
        begun.good |= d.bits(d.both(within, is_large)) << (i * <S::Wide as Simd>::LANES);
        begun.total.as_mut()[i] = row.total;
        begun.lost.as_mut()[i] = row.lost;
        begun.others.as_mut()[i] = row.others;
        if wanted.gradient.is_some() {
            begun.unit.as_mut()[i] = unit_of_e;
        }
        if S::Real::COMPENSATES && wanted.lse {
            begun.sum.as_mut()[i] = d.add(sum, d.add(lost, d.div(own, unit)));
        }
    }
    begun.good &= near | ignored;
    begun
}

/// Finishes the rows of a register of lanes from `at` on.
///
/// # Safety
/// As [`finish`]; the register begins below `count`, and was [begun](begin).
#[inline(always)]
unsafe fn end<S: Simd<Real: Base>, const IS_SMOOTHED: bool>(
    s: S,
    at: usize,
    state: &mut OrdinaryState,
    wanted: &Wanted,
    begun: &Begun<S>,
) {
    let d = s.wide();
    let splat = |x: f64| d.splat(x);
    let own = begun.own;
    let (mut holds, mut fits) = (0, 0);
    let (mut loss, mut lse, mut factor, mut entry, mut bias) = (own, own, own, own, own);
    // SAFETY: the arrays have room for the most lanes (`OrdinaryState`), of which registers are whole parts, and the sums
    // have set those of `count` lanes (# Safety of `finish`).
    let (x_y, shift) =
        unsafe { (s.load(lanes(&mut state.x_y, at)), s.load(lanes(&mut state.shift, at))) };
    let (x_y, shift) = (s.widen(x_y), s.widen(shift));
    for i in 0..own.as_ref().len() {
        let own = own.as_ref()[i];
        let (total, lost) = (begun.total.as_ref()[i], begun.lost.as_ref()[i]);
        let kept = d.less(splat(0.0), own);
        let bits = |mask| d.bits(mask) << (i * <S::Wide as Simd>::LANES);
        let row = Row {
            nll: match S::Real::COMPENSATES {
                true => wide_nll(d, total, lost),
                false => nll(d, total, lost),
            },
            inverse: d.div(splat(1.0), total),
            others: begun.others.as_ref()[i],
        };
        let at = at + i * <S::Wide as Simd>::LANES;
        let center = d.mul(shift.as_ref()[i], splat(S::Real::INVERSE.0));
        let smoothing = if IS_SMOOTHED { wanted.smoothing } else { None };
        let smoothed = smoothing.map(|smoothing| {
            // SAFETY: the sums have set the dots of whole registers, and the driver the weights; smoothed rows are
            // no more than SMOOTHED (# Safety of `finish`).
            let (dot, own) = unsafe {
                (
                    d.load(lanes(&mut state.grad_output, SMOOTHED + at)),
                    d.load(lanes(&mut state.weight_then_lse, SMOOTHED + at)),
                )
            };
            smoothing.smooth(s, &row, d.sub(x_y.as_ref()[i], center), dot, own)
        });
        let mut of_row = row.nll;
        if let Some(smoothed) = &smoothed {
            of_row = smoothed.loss;
            let ignored = d.not_less(splat(0.0), own);
            holds |= bits(d.either(smoothed.holds, ignored));
        }
        loss.as_mut()[i] = d.keep(kept, of_row);
        if wanted.has_weights {
            // SAFETY: the driver has set the weights of whole registers (# Safety of `finish`).
            let weight = unsafe { d.load(lanes(&mut state.weight_then_lse, at)) };
            loss.as_mut()[i] = d.mul(weight, loss.as_ref()[i]);
        }
        if wanted.lse {
            lse.as_mut()[i] = d.add(d.select(kept, x_y.as_ref()[i], center), row.nll);
            if S::Real::COMPENSATES {
                // Where the others prevail, that sum may cancel.
                let by_shift = real::ln_scaled(d, shift.as_ref()[i], begun.sum.as_ref()[i]);
                let prevails = d.less(row.others, own);
                lse.as_mut()[i] = d.select(prevails, lse.as_ref()[i], by_shift);
            }
        }
        if let Some(scale) = wanted.gradient {
            let mut scale = splat(scale);
            let usual = |x| {
                let size = d.max(x, d.sub(splat(0.0), x));
                d.both(d.less(splat(FACTORS.start), size), d.less(size, splat(FACTORS.end)))
            };
            if wanted.has_grad_output {
                // SAFETY: the driver has set the factors of whole registers (# Safety of `finish`).
                scale = d.mul(scale, unsafe { d.load(lanes(&mut state.grad_output, at)) });
                let mut fit = d.either(usual(scale), d.equal(scale, splat(0.0)));
                if let Some(smoothed) = &smoothed {
                    fit = d.both(fit, usual(smoothed.mass));
                }
                fits |= bits(fit);
            }
            let by = d.mul(scale, row.inverse);
            let mut of_others = d.mul(begun.unit.as_ref()[i], by);
            let mut of_own = d.sub(splat(0.0), d.mul(row.others, by));
            if let (Some(smoothed), Some(smoothing)) = (&smoothed, &smoothing) {
                of_others = d.mul(of_others, smoothed.mass);
                of_own = d.mul(scale, smoothed.entry);
                bias.as_mut()[i] = d.keep(kept, d.mul(scale, splat(smoothing.share)));
            }
            factor.as_mut()[i] = d.keep(kept, of_others);
            entry.as_mut()[i] = d.keep(kept, of_own);
        }
    }
    // SAFETY: the arrays have room for the most lanes (`OrdinaryState`), of which registers are whole parts, and `at` is
    // below `count`, which is no more (# Safety of `finish`).
    unsafe {
        store_wide(s, &mut state.excluded_sum_loss, at, loss);
        if wanted.lse {
            store_wide(s, &mut state.weight_then_lse, at, lse);
        }
        if wanted.gradient.is_some() {
            s.store(lanes(&mut state.factor, at), s.narrow(factor));
            s.store(lanes(&mut state.entry, at), s.narrow(entry));
            if IS_SMOOTHED {
                s.store(lanes(&mut state.entry, SMOOTHED + at), s.narrow(bias));
            }
        }
    }
    let good = if IS_SMOOTHED { begun.good & holds } else { begun.good };
    let good_gradient = if wanted.has_grad_output { good & fits } else { good };
    for (word, bits) in [
        (&mut state.kept, begun.kept),
        (&mut state.good, good),
        (&mut state.good_gradient, good_gradient),
    ] {
        // SAFETY: `at` is below `count`, at most `most` (# Safety of `finish`), and WORDS words have 64 lanes each.
        unsafe { *word.get_unchecked_mut(at / 64) |= u64::from(bits) << (at % 64) };
    }
}

/// Adds groups of eight losses to their sums, as [`CompensatedLanes::add`] does one by one.
///
/// # Safety
/// There are so many groups, one after the other. The processor has the set of `s`.
#[inline(always)]
pub unsafe fn add_losses<S: Doubles>(
    s: S,
    losses: *const f64,
    groups: usize,
    totals: &mut CompensatedLanes,
) {
    let [sums, errors] = totals.parts();
    let registers = ROWS / S::LANES;
    let (mut sum, mut error) = ([s.splat(0.0); ROWS], [s.splat(0.0); ROWS]);
    // SAFETY: each of the groups has ROWS losses (# Safety), as the totals have lanes, of which registers are whole
    // parts.
    unsafe {
        for i in 0..registers {
            sum[i] = s.load(&raw const sums[i * S::LANES]);
            error[i] = s.load(&raw const errors[i * S::LANES]);
        }
        for group in 0..groups {
            for i in 0..registers {
                let x = s.load(losses.add(group * ROWS + i * S::LANES));
                let (total, lost) = real::sum(s, sum[i], x);
                (sum[i], error[i]) = (total, s.add(error[i], lost));
            }
        }
        for i in 0..registers {
            s.store(&raw mut sums[i * S::LANES], sum[i]);
            s.store(&raw mut errors[i * S::LANES], error[i]);
        }
    }
}

/// The numbers of some rows.
struct Row<V> {
    /// `-logp_y`
    nll: V,
    /// `1/w`
    inverse: V,
    /// q
    others: V,
}

/// The numbers of some rows before their divisions.
struct BegunRow<V> {
    /// w
    total: V,
    /// What w has lost, where that matters.
    lost: V,
    /// q
    others: V,
}

/// From the sum over the other classes, `2^-t_y`, what makes a power of e of q, less 1, and `own`: 1, or 0 for rows without
/// a class of their own.
#[inline(always)]
fn begin_row<S: Simd<Real: Base>>(
    s: S,
    sum: WideVector<S>,
    unit: WideVector<S>,
    by: WideVector<S>,
    own: WideVector<S>,
) -> BegunRow<WideVector<S>> {
    let d = s.wide();
    let q = d.mul(sum, unit);
    let q = d.mul_add(q, by, q);
    let total = d.add(own, q);
    let lost = d.keep(d.less(q, own), d.sub(q, d.sub(total, own)));
    BegunRow { total, lost, others: q }
}

/// The same for lanes of f64, from a sum and what it has lost.
#[inline(always)]
fn begin_wide_row<S: Simd<Real: Base>>(
    s: S,
    [sum, lost]: [WideVector<S>; 2],
    unit: WideVector<S>,
    own: WideVector<S>,
) -> BegunRow<WideVector<S>> {
    let d = s.wide();
    let q = d.mul(sum, unit);
    let low = d.mul_add(lost, unit, d.mul_sub(sum, unit, q));
    let (rounded, lost) = real::sum(d, own, q);
    let lost = d.add(lost, low);
    let total = d.add(rounded, lost);
    BegunRow { total, lost: d.sub(lost, d.sub(total, rounded)), others: d.add(q, low) }
}

/// `ln w`, from w and what it has lost. The relative error is below 2e-8.
#[inline(always)]
fn nll<D: Doubles>(d: D, total: D::Vector, lost: D::Vector) -> D::Vector {
    let (k, m) = d.split(total);
    let u = d.div(d.sub(m, d.splat(1.0)), d.add(m, d.splat(1.0)));
    d.mul_add(k, d.splat(LN_2), d.add(real::twice_atanh(d, u), lost))
}

/// The same for lanes of f64: the relative error is below 4e-16, beside that of the sum.
#[inline(always)]
fn wide_nll<D: Doubles>(d: D, total: D::Vector, lost: D::Vector) -> D::Vector {
    d.mul_add(lost, d.div(d.splat(1.0), total), real::ln(d, total))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::math::double_double::Dd;
    use crate::simd::on_isa::{available, on_isa};

    const COUNT: usize = 16;

    /// Some lanes, and what the arithmetic makes of them.
    #[derive(Clone, Copy, Debug)]
    struct Lanes {
        class: [f64; COUNT],
        shift: [f64; COUNT],
        x_y: [f64; COUNT],
        sum: [f64; COUNT],
        lost: [f64; COUNT],
        dot: [f64; COUNT],
        own: [f64; COUNT],
        smoothing: Option<Smoothing>,
    }

    impl Lanes {
        const NONE: Lanes = Lanes {
            class: [0.0; COUNT],
            shift: [0.0; COUNT],
            x_y: [0.0; COUNT],
            sum: [0.0; COUNT],
            lost: [0.0; COUNT],
            dot: [0.0; COUNT],
            own: [1.0; COUNT],
            smoothing: None,
        };

        /// Numbers all over the domain, with logits that `round` gives.
        fn spread(step: u32, round: fn(f64) -> f64) -> Lanes {
            let mut of = Lanes::NONE;
            for lane in 0..COUNT {
                let n = f64::from(step * COUNT as u32 + lane as u32);
                let part = |by: f64| (n * by).fract();
                of.shift[lane] = (part(0.754_877_666) * 2000.0 - 1000.0).round();
                let t = (part(0.569_840_29) * 2.0 - 1.0) * 79.0 * f64::from(step % 5) / 4.0;
                of.x_y[lane] = round((of.shift[lane] + t) / std::f64::consts::LOG2_E);
                of.sum[lane] =
                    (part(0.324_717_957) * 160.0 - 80.0).exp2() * (1.0 + part(0.618_033_988));
            }
            of
        }
    }

    #[derive(Clone, Copy, Debug)]
    struct Finished {
        loss: [f64; COUNT],
        lse: [f64; COUNT],
        factor: [f64; COUNT],
        entry: [f64; COUNT],
        bias: [f64; COUNT],
        good: u64,
    }

    on_isa! {
        /// In lanes of f32.
        fn finished(of: &Lanes) -> Finished = |s| all(s, of);
        /// In lanes of f64.
        fn wide_finished(of: &Lanes) -> Finished = |s| all(s.wide(), of);
    }

    /// A logit of an f32.
    fn narrow(x: f64) -> f64 {
        f64::from(x as f32)
    }

    #[inline(always)]
    fn all<S: Simd<Real: Base>>(s: S, of: &Lanes) -> Finished {
        let mut state = OrdinaryState::new();
        let wanted = Wanted {
            has_weights: of.smoothing.is_some(),
            has_grad_output: of.smoothing.is_some(),
            lse: true,
            gradient: Some(1.0),
            smoothing: of.smoothing,
        };
        // SAFETY: the lanes are set for whole registers of any set; what is read is set by `finish`. The processor has
        // the set of `s` (`on_isa`).
        unsafe {
            let put = |to: &mut NarrowScratch, at: usize, of: &[f64; COUNT]| {
                lanes::<S::Real, _>(to, at)
                    .cast::<[S::Real; COUNT]>()
                    .write(of.map(S::Real::from_f64));
            };
            let take = |from: &mut NarrowScratch, at: usize| {
                lanes::<S::Real, _>(from, at).cast::<[S::Real; COUNT]>().read().map(S::Real::to_f64)
            };
            put(&mut state.class, 0, &of.class);
            put(&mut state.shift, 0, &of.shift);
            put(&mut state.x_y, 0, &of.x_y);
            put(&mut state.factor, 0, &of.lost);
            lanes::<[f64; COUNT], _>(&mut state.excluded_sum_loss, 0).write(of.sum);
            lanes::<[f64; COUNT], _>(&mut state.weight_then_lse, 0).write([1.0; COUNT]);
            lanes::<f64, _>(&mut state.weight_then_lse, SMOOTHED)
                .cast::<[f64; COUNT]>()
                .write(of.own);
            lanes::<[f64; COUNT], _>(&mut state.grad_output, 0).write([1.0; COUNT]);
            lanes::<f64, _>(&mut state.grad_output, SMOOTHED).cast::<[f64; COUNT]>().write(of.dot);
            let bias_at = if S::Real::COMPENSATES { COUNT } else { SMOOTHED };
            put(&mut state.entry, bias_at, &[0.0; COUNT]);
            finish(s, COUNT, &mut state, &wanted);
            Finished {
                loss: lanes::<[f64; COUNT], _>(&mut state.excluded_sum_loss, 0).read(),
                lse: lanes::<[f64; COUNT], _>(&mut state.weight_then_lse, 0).read(),
                factor: take(&mut state.factor, 0),
                entry: take(&mut state.entry, 0),
                bias: take(&mut state.entry, bias_at),
                good: state.good[0],
            }
        }
    }

    /// Sums and targets all over the domain, against exact results in powers of e. The errors leave most of
    /// the bounds to the sum, which is a result of f32 arithmetic.
    #[test]
    fn ordinary_rows_are_accurate() {
        let mut worst = [0f64; 4];
        for step in 0..4000u32 {
            let mut of = Lanes::spread(step, narrow);
            if step % 9 == 0 {
                of.class = [-1.0; COUNT];
            }
            for isa in available() {
                let got = finished(isa, &of);
                for lane in 0..COUNT {
                    let ignored = of.class[lane] < 0.0;
                    let shift = Dd::from(of.shift[lane]);
                    let l = Dd::from(f64::from(f32::L));
                    let t = Dd::from(of.x_y[lane]) * l - shift;
                    let total = of.sum[lane] + if ignored { 0.0 } else { t.hi.exp2() };
                    let good = (t.hi.abs() < EXPONENT || ignored) && total > SMALLEST_SUM;
                    assert!(got.good >> lane & 1 == u64::from(good), "{total:e}, {t:?}");
                    if got.good >> lane & 1 == 0 {
                        continue;
                    }
                    // In powers of b = e^(1/ratio): the logarithm of q to base b is that of the true q.
                    let log2_q = Dd::log2(of.sum[lane]) - if ignored { Dd::from(0.0) } else { t };
                    let ln_q = log2_q * Dd::from(f32::INVERSE.0);
                    let (m, k) = ln_q.exp();
                    let q = m.scaled(k);
                    let w = if ignored { q } else { q + Dd::from(1.0) };
                    let ln_w = match q.hi {
                        q if q < 1.0 => Dd::ln_1p(q),
                        _ => Dd::log2(w.hi) * Dd::LN_2,
                    };
                    let lse = if ignored {
                        shift * Dd::from(f32::INVERSE.0) + ln_q
                    } else {
                        Dd::from(of.x_y[lane]) + ln_w
                    };
                    worst[1] = worst[1].max(
                        (lse.hi - got.lse[lane]).abs() / (1.0 + lse.hi.abs() * 2f64.powi(-26)),
                    );
                    if ignored {
                        assert_eq!(
                            (got.loss[lane], got.factor[lane], got.entry[lane]),
                            (0.0, 0.0, 0.0)
                        );
                        continue;
                    }
                    worst[0] = worst[0].max((got.loss[lane] / ln_w.hi - 1.0).abs());
                    let one_minus_p = (q / w).hi;
                    if one_minus_p < 1e-37 {
                        continue;
                    }
                    worst[2] = worst[2].max((-got.entry[lane] / one_minus_p - 1.0).abs());
                    // p of a class is its power of b, beside x_y one of e.
                    let unit = (Dd::from(0.0) - t * Dd::from(f32::INVERSE.0)).exp();
                    let factor = unit.0.scaled(unit.1) / w;
                    worst[3] = worst[3].max((got.factor[lane] / factor.hi - 1.0).abs());
                }
            }
        }
        println!(
            "loss {:.2e} lse {:.2e} entry {:.2e} factor {:.2e}",
            worst[0], worst[1], worst[2], worst[3]
        );
        // What is stored in f32 is rounded to it.
        let f32_ulp = 2f64.powi(-24);
        assert!(worst[0] < 2e-8 && worst[1] < 3e-8, "{worst:?}");
        assert!(worst[2] < f32_ulp + 2e-8 && worst[3] < f32_ulp + 1.5e-6, "{worst:?}");
    }

    /// The same in lanes of f64: errors of a few roundings, whatever the sums have lost.
    #[test]
    fn ordinary_rows_of_f64_are_accurate() {
        let mut worst = [0f64; 4];
        for step in 0..4000u32 {
            let mut of = Lanes::spread(step, |x| x);
            if step % 9 == 0 {
                of.class = [-1.0; COUNT];
            }
            for (lane, sum) in of.sum.iter().enumerate() {
                of.lost[lane] = sum * f64::EPSILON * (f64::from(step % 7) - 3.0);
            }
            for isa in available() {
                let got = wide_finished(isa, &of);
                for lane in 0..COUNT {
                    let x_y = Dd::from(of.x_y[lane]);
                    let t = Dd { hi: f64::L, lo: f64::LOW } * x_y - Dd::from(of.shift[lane]);
                    let ignored = of.class[lane] < 0.0;
                    let total = of.sum[lane] + if ignored { 0.0 } else { t.hi.exp2() };
                    let good = (t.hi.abs() < EXPONENT || ignored) && total > SMALLEST_SUM;
                    assert!(got.good >> lane & 1 == u64::from(good), "{t:?}");
                    if !good {
                        continue;
                    }
                    let inverse = Dd { hi: f64::INVERSE.0, lo: f64::INVERSE.1 };
                    let unit = ((Dd::from(0.0) - t) * inverse).exp();
                    let unit = unit.0.scaled(unit.1);
                    let sum = Dd::sum(of.sum[lane], of.lost[lane]);
                    let off = |got: f64, want: Dd| want.error(got).abs();
                    let of_lse =
                        |lse: Dd| (lse - Dd::from(got.lse[lane])).hi.abs() / lse.hi.abs().max(1.0);
                    if ignored {
                        let log2 = Dd::from(of.shift[lane]) + Dd::log2(sum.hi);
                        worst[1] = worst[1].max(of_lse(log2 * inverse + Dd::from(sum.lo / sum.hi)));
                        continue;
                    }
                    let ln_q = (Dd::log2(sum.hi) - t) * inverse;
                    let (m, k) = ln_q.exp();
                    let q = m.scaled(k) * Dd::from(1.0 + sum.lo / sum.hi);
                    let w = q + Dd::from(1.0);
                    let ln_w = match q.hi {
                        x if x < 1.0 => Dd::ln_1p(x) + Dd::from(q.lo / w.hi),
                        _ => Dd::log2(w.hi) * Dd::LN_2 + Dd::from(w.lo / w.hi),
                    };
                    let lse = Dd::from(of.x_y[lane]) + ln_w;
                    worst[0] = worst[0].max(off(got.loss[lane], ln_w));
                    worst[1] = worst[1].max(of_lse(lse));
                    worst[2] = worst[2].max(off(-got.entry[lane], q / w));
                    worst[3] = worst[3].max(off(got.factor[lane], unit / w));
                }
            }
        }
        println!(
            "loss {:.2e} lse {:.2e} entry {:.2e} factor {:.2e}",
            worst[0], worst[1], worst[2], worst[3]
        );
        assert!(worst[0] < 4e-16 && worst[1] < 8e-16, "{worst:?}");
        assert!(worst[2] < 5e-16 && worst[3] < 5e-16, "{worst:?}");
    }

    /// The same for smoothed rows. The error of a loss has grown by as much as its terms cancel, that of an entry is
    /// relative to its larger term.
    #[test]
    fn smoothed_rows_are_accurate() {
        let mut worst = [0f64; 3];
        let mut seen = [0; 2];
        for step in 0..4000u32 {
            let mut of = Lanes::spread(step, narrow);
            let plain = finished(available()[0], &of);
            let epsilon = [0.1, 0.4, 1.0][step as usize % 3];
            let smoothing = Smoothing { keep: 1.0 - epsilon, share: epsilon / 50.0, total: 40.0 };
            of.smoothing = Some(smoothing);
            let center = |lane: usize| of.shift[lane] * f32::INVERSE.0;
            let mut spread = [0.0; COUNT];
            for (lane, spread) in spread.iter_mut().enumerate() {
                let part = (f64::from(step * COUNT as u32 + lane as u32) * 0.445_041_868).fract();
                of.own[lane] = 2.0 * part;
                *spread = 40.0 * 20f64.powf(part * 4.0 - 2.0);
                let top = plain.loss[lane] + (of.x_y[lane] - center(lane));
                of.dot[lane] = 40.0 * top - *spread;
            }
            for isa in available() {
                let got = finished(isa, &of);
                for (lane, spread) in spread.iter().enumerate() {
                    let (nll, own) = (plain.loss[lane], of.own[lane]);
                    let target = smoothing.keep * own;
                    let want = target * nll + smoothing.share * spread;
                    let cancelled = smoothing.share * 40.0 * nll;
                    if plain.good >> lane & 1 == 0 {
                        assert_eq!(got.good >> lane & 1, 0);
                        continue;
                    }
                    if cancelled > 0.99 * CANCELLATION * want {
                        let holds = cancelled < 1.01 * CANCELLATION * want;
                        assert!(holds || got.good >> lane & 1 == 0, "{cancelled} {want}");
                        seen[1] += 1;
                        continue;
                    }
                    seen[0] += 1;
                    assert_eq!(got.good >> lane & 1, 1, "{cancelled} {want}");
                    let distance = of.x_y[lane] - center(lane);
                    let rounded = 40.0 * (nll + distance.abs()) * f64::EPSILON * 8.0;
                    let off = ((got.loss[lane] - want).abs() - smoothing.share * rounded).max(0.0);
                    worst[0] = worst[0].max(off / want);
                    let (p, one_minus_p) = ((-nll).exp(), -(-nll).exp_m1());
                    let up = smoothing.share * (40.0 - own) * p;
                    let down = (target + smoothing.share * own) * one_minus_p;
                    if down > 1e-37 && up > 1e-37 {
                        let off = (got.entry[lane] - (up - down)).abs();
                        worst[1] = worst[1].max(off / up.max(down));
                    }
                    assert_eq!(got.bias[lane], narrow(smoothing.share));
                    let mass = target + smoothing.share * 40.0;
                    if plain.factor[lane] > 1e-37 {
                        let ratio = got.factor[lane] / plain.factor[lane];
                        worst[2] = worst[2].max((ratio / mass - 1.0).abs());
                    }
                }
            }
        }
        println!("loss {:.2e} entry {:.2e} factor {:.2e}", worst[0], worst[1], worst[2]);
        assert!(seen[0] > 10_000 && seen[1] > 1000, "{seen:?}");
        let f32_ulp = 2f64.powi(-24);
        assert!(worst[0] < 1e-12 && worst[1] < f32_ulp + 2e-8, "{worst:?}");
        assert!(worst[2] < 2.1 * f32_ulp, "{worst:?}");
    }

    /// Lanes out of the domain say so.
    #[test]
    fn other_rows_are_told_apart() {
        let lanes = Lanes {
            class: [1.0; COUNT],
            shift: [3.0; COUNT],
            x_y: [2.0; COUNT],
            sum: [5.0; COUNT],
            ..Lanes::NONE
        };
        let bad: [fn(&mut Lanes, usize); 10] = [
            |of, i| (of.sum[i], of.x_y[i]) = (0.25, 0.0),
            |of, i| of.sum[i] = 0.0,
            |of, i| of.sum[i] = SUMS.start / 2.0,
            |of, i| of.sum[i] = SUMS.end,
            |of, i| of.sum[i] = f64::INFINITY,
            |of, i| of.sum[i] = f64::NAN,
            |of, i| of.x_y[i] = f64::NAN,
            |of, i| of.x_y[i] = f64::INFINITY,
            |of, i| of.x_y[i] = f64::NEG_INFINITY,
            |of, i| of.x_y[i] = 60.0,
        ];
        for isa in available() {
            assert_eq!(finished(isa, &lanes).good, 0xFFFF);
            for spoil in bad {
                for lane in 0..COUNT {
                    let mut lanes = lanes;
                    spoil(&mut lanes, lane);
                    assert_eq!(finished(isa, &lanes).good, 0xFFFF & !(1 << lane), "{lanes:?}");
                }
            }
            let smoothing = Some(Smoothing { keep: 0.9, share: 0.01, total: 10.0 });
            let smoothed = Lanes { smoothing, ..lanes };
            assert_eq!(finished(isa, &smoothed).good, 0xFFFF);
            for dot in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 1e50, -1e50] {
                for lane in 0..COUNT {
                    let mut lanes = smoothed;
                    lanes.dot[lane] = dot;
                    assert_eq!(finished(isa, &lanes).good, 0xFFFF & !(1 << lane), "{lanes:?}");
                }
            }
        }
    }
}
