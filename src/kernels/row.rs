//! What happens to one row, from its sums to its loss and the factors of its gradient, in f64.
//!
//! With `rest = Σ exp x_c` over the classes other than the target y, kept apart by the kernels,
//! everything that a confident prediction needs follows from one number without cancellation:
//!
//! ```text
//! q        = ln rest - x_y
//! -logp_y  = ln(1 + e^q)                the loss, exact down to e^q = 1e-300
//! 1 - p_y  = e^q/(1 + e^q)
//! lse      = x_y + ln(1 + e^q)          (or ln rest + ln(1 + e^-q))
//! ```
//!
//! The gradient of a row, `T·(p_c - [c=y]) + B·(W·p_c - w_c)`, is `P·p_c - B·w_c` with
//! `P = T + B·W` everywhere but at the target, which is formed here.
//!
//! With λ·lse² on top, P has 2λ·lse more. Probability targets leave nothing out: their loss is
//! `T·lse - Σ m_c·x_c`, m being the mass and T its sum, and m is what the gradient subtracts.
//!
//! Exponentials are in base `b = 2^L` (math/exp2.rs), and so are their sums' logarithms:
//! `ln rest` is taken as `(c + log2 Σ 2^(L·x - c))/L`. That is the log-sum-exp at a temperature
//! 1.3e-8 from 1 whatever the reference c was; to take `c/L + ln Σ 2^…` would be
//! to mix bases and be off by 1.3e-8 times the distance between reference and result.

use super::Kernels;
use super::online::{Partial, Top};
use crate::math::exp2::{Base, Reference, nearest};
use crate::math::real;
use crate::math::scalar::{exp2, log2};
use crate::plan::{At, Dtype, Pass, Plan, Target, Targets, View};
use crate::simd::{Real, Simd};
use std::mem::MaybeUninit;

/// The reference that a row's chunks start from.
#[derive(Clone, Copy, Debug)]
pub struct Anchor {
    /// Never far.
    pub reference: Reference,
    /// The reference is that of a logit of the row. Without, it is 0.
    pub real: bool,
}

impl Anchor {
    /// That of a row that has none of its own.
    pub const NONE: Anchor = Anchor { reference: Reference::ZERO, real: false };
}

/// `P·p_c = 2^t·factor`, with the exponents t of the reference
#[derive(Clone, Copy, Debug)]
pub struct Curve {
    /// The reference of the exponentials.
    pub reference: Reference,
    /// What they are multiplied by.
    pub factor: f64,
}

impl Curve {
    /// No curve at all.
    pub const NONE: Curve = Curve { reference: Reference::ZERO, factor: 0.0 };

    #[inline(always)]
    fn times(self, factor: f64) -> Self {
        Curve { factor: self.factor * factor, ..self }
    }

    /// The factor is a normal f32, far from the ends of its range, or 0, inf or NaN.
    #[inline(always)]
    pub fn is_plain(&self) -> bool {
        let size = self.factor.abs();
        let (low, high) = (exp2_const(-100), exp2_const(100));
        (low..=high).contains(&size) || size == 0.0 || !size.is_finite()
    }

    /// Two factors that are, and a power of 2 the first, whose product is `factor`: the product
    /// with an exponential may be in range though the factor is not.
    #[inline(always)]
    pub fn split(&self) -> (f64, f64) {
        if self.is_plain() {
            return (1.0, self.factor);
        }
        let half = nearest(log2(self.factor.abs()) * 0.5).clamp(-126.0, 126.0);
        (exp2(half), self.factor * exp2(-half))
    }
}

/// `2^k`
const fn exp2_const(k: i64) -> f64 {
    f64::from_bits(((k + 1023) as u64) << 52)
}

/// What the first sweep over a row is to do.
#[derive(Clone, Copy, Debug)]
pub struct RowSum {
    /// Exponentials are summed up.
    pub softmax: bool,
    /// The class to leave out.
    pub hole: Option<usize>,
    /// Where exponents are counted from.
    pub anchor: Anchor,
    /// Where the (weighted) sum of the logits is wanted too: what they are taken relative to.
    pub center: Option<f64>,
}

/// What the gradient's sweep computes from the logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Nothing: it is what is subtracted.
    Nothing,
    /// Exponentials.
    Exponentials,
    /// Themselves, less the lse: the gradient is no gradient but a log-softmax.
    Logs,
}

/// What the gradient's sweep over a row needs.
#[derive(Clone, Copy, Debug)]
pub struct RowGradient {
    /// What is computed.
    pub kind: Kind,
    /// For chunks whose sums were relative to the anchor.
    pub anchored: Curve,
    /// For the others: relative to the row's sums, or its lse.
    pub own: Curve,
    /// What is subtracted, times the mass of the class if masses differ.
    pub bias: f64,
    /// What the difference is multiplied by, a power of 2 that is 1 for all but monstrous scales.
    pub scale: f64,
    /// The class whose part is written later.
    pub target: Option<usize>,
    /// A row to come on this thread, whose logits are worth fetching during the sweep.
    pub next: Option<At>,
}

/// Rows whose ends are computed together.
pub const LANES_OF_ENDS: usize = 8;

/// Numbers of eight rows, one a lane.
pub type Eight = [f64; LANES_OF_ENDS];

/// What the sums of eight rows say about them.
#[derive(Clone, Copy, Debug)]
#[repr(align(64))]
pub struct Ends {
    /// The reference and the sum of [`Partial::level`].
    pub far: Eight,
    /// See `far`.
    pub near: Eight,
    /// See `far`.
    pub sum: Eight,
    /// The sum and the heat of [`Partial::spread`].
    pub spread: Eight,
    /// See `spread`.
    pub heat: Eight,
    /// The logit that the sums leave out, -inf if they leave out none.
    pub x_y: Eight,
    /// ln Σ exp x: an input of [`from_lse`].
    pub lse: Eight,
    /// An integer close to lse, in units of log2 and from `far` on, and what lse is above it, in its
    /// own: lse itself is rounded.
    pub base: Eight,
    /// See `base`.
    pub rise: Eight,
    /// −logp_y
    pub nll: Eight,
    /// p_y and 1 − p_y, each to its own relative accuracy.
    pub hit: Eight,
    /// See `hit`.
    pub miss: Eight,
    /// What to multiply 2^t by for probabilities.
    pub share: Eight,
    /// −Σ p·ln p
    pub entropy: Eight,
}

impl Ends {
    const EMPTY: Ends = Ends {
        far: [0.0; LANES_OF_ENDS],
        near: [0.0; LANES_OF_ENDS],
        sum: [1.0; LANES_OF_ENDS],
        spread: [1.0; LANES_OF_ENDS],
        heat: [0.0; LANES_OF_ENDS],
        x_y: [0.0; LANES_OF_ENDS],
        lse: [0.0; LANES_OF_ENDS],
        base: [0.0; LANES_OF_ENDS],
        rise: [0.0; LANES_OF_ENDS],
        nll: [0.0; LANES_OF_ENDS],
        hit: [0.0; LANES_OF_ENDS],
        miss: [0.0; LANES_OF_ENDS],
        share: [0.0; LANES_OF_ENDS],
        entropy: [0.0; LANES_OF_ENDS],
    };
}

/// Fills in what follows from the sums: see the head of this file.
#[inline(always)]
pub fn ends<S: Simd>(s: S, ends: &mut Ends, l: f64) {
    let d = s.wide();
    let lanes = <S::Wide as Simd>::LANES;
    let (zero, one, infinity) = (d.splat(0.0), d.splat(1.0), d.splat(f64::INFINITY));
    let (minus_infinity, slope) = (d.splat(f64::NEG_INFINITY), d.splat(l));
    for at in (0..LANES_OF_ENDS).step_by(lanes) {
        // SAFETY: whole registers of eight lanes.
        let load = |from: &Eight| unsafe { d.load(from.as_ptr().add(at)) };
        let (far, near, sum, x_y) =
            (load(&ends.far), load(&ends.near), load(&ends.sum), load(&ends.x_y));
        let (k, height) = real::log2_parts(d, sum);
        // `ln Σ` over the classes that were summed up. Two integers have an exact sum, whatever the
        // reference was.
        let base = d.add(near, k);
        let rest = d.add(far, d.div(d.add(base, height), slope));
        // Reference and logit are exact in units of log2, so the difference is taken there: at a
        // height of 1e30 nothing else tells two logits from one.
        let below = d.mul_sub_exact(d.sub(far, x_y), slope, d.sub(zero, base));
        let q = d.div(d.add(below, height), slope);
        let above = d.less(zero, q);
        let size = d.select(above, q, d.sub(zero, q));
        let e = real::exp(d, d.sub(zero, size));
        let (tail, inverse) = real::log1p(d, e);
        let mut lse = d.add(d.select(above, rest, x_y), tail);
        let rise = d.select(above, height, d.sub(zero, below));
        let rise = d.add(d.div(rise, slope), tail);
        let nll = d.add(d.select(above, q, zero), tail);
        let lesser = d.mul(e, inverse);
        let (hit, miss) = (d.select(above, lesser, inverse), d.select(above, inverse, lesser));
        let share = d.select(d.equal(sum, zero), zero, d.div(miss, sum));
        // Nothing but −inf; and +inf, unless there is a NaN.
        let nothing = d.select(d.equal(x_y, minus_infinity), minus_infinity, lse);
        lse = d.select(d.equal(rest, minus_infinity), nothing, lse);
        let not_nan = |x| d.select(d.equal(x, x), one, x);
        let infinite = |lse, x, other| {
            d.select(d.equal(x, infinity), d.add(d.mul(not_nan(other), zero), x), lse)
        };
        lse = infinite(lse, rest, x_y);
        lse = infinite(lse, x_y, rest);

        // That of the choice between the class left out and the others, and of the others among
        // themselves; no term is negative.
        let (spread, heat) = (load(&ends.spread), load(&ends.heat));
        let among = d.sub(real::log2(d, spread), d.div(heat, spread));
        let others = d.add(d.select(above, tail, d.sub(tail, q)), d.div(among, slope));
        let others = d.select(d.less(zero, miss), d.mul(miss, others), zero);
        let own = d.select(d.less(zero, hit), d.mul(hit, nll), zero);
        let entropy = d.add(own, others);
        // SAFETY: as above.
        let store = |to: &mut Eight, v| unsafe { d.store(to.as_mut_ptr().add(at), v) };
        store(&mut ends.lse, lse);
        store(&mut ends.base, base);
        store(&mut ends.rise, rise);
        store(&mut ends.nll, nll);
        store(&mut ends.hit, hit);
        store(&mut ends.miss, miss);
        store(&mut ends.share, share);
        store(&mut ends.entropy, entropy);
    }
}

/// The same from an lse that was computed elsewhere, with a reference close to it.
#[inline(always)]
pub fn from_lse<S: Simd<Real: Base>>(s: S, ends: &mut Ends, l: f64) {
    for i in 0..LANES_OF_ENDS {
        let lse = ends.lse[i];
        let near = nearest(lse * l);
        let is_near = near.abs() <= S::Real::NEAR;
        ends.near[i] = if is_near { near } else { 0.0 };
        // Of what is not finite nothing comes; it need not be far.
        let far = S::Real::from_f64(lse).to_f64();
        ends.far[i] = if is_near || !far.is_finite() { 0.0 } else { far };
    }
    let d = s.wide();
    let lanes = <S::Wide as Simd>::LANES;
    let zero = d.splat(0.0);
    for at in (0..LANES_OF_ENDS).step_by(lanes) {
        // SAFETY: whole registers of eight lanes.
        let load = |from: &Eight| unsafe { d.load(from.as_ptr().add(at)) };
        let (far, near, lse, x_y) =
            (load(&ends.far), load(&ends.near), load(&ends.lse), load(&ends.x_y));
        let below = d.mul_sub_exact(d.sub(far, lse), d.splat(l), d.sub(zero, near));
        let share = real::exp(d, d.mul(below, d.splat(std::f64::consts::LN_2)));
        let nll = d.sub(lse, x_y);
        let hit = real::exp(d, d.sub(x_y, lse));
        let miss = d.sub(zero, real::expm1(d, d.sub(x_y, lse)));
        // SAFETY: as above.
        let store = |to: &mut Eight, v| unsafe { d.store(to.as_mut_ptr().add(at), v) };
        store(&mut ends.nll, nll);
        store(&mut ends.hit, hit);
        store(&mut ends.miss, miss);
        store(&mut ends.share, share);
    }
}

/// A logit so far below others that their distances from it would lose digits.
#[inline(always)]
pub fn is_far_below(x: f64, others: f64) -> bool {
    x < others - 64.0
}

/// `a·b`, but 0 if `a` is.
#[inline(always)]
fn times(a: f64, b: f64) -> f64 {
    if a == 0.0 { 0.0 } else { a * b }
}

/// Sums over rows.
#[derive(Clone, Copy, Debug, Default)]
pub struct Totals {
    /// The cross-entropy part of the losses.
    pub loss: f64,
    /// The z-loss part.
    pub z_loss: f64,
    /// Rows whose largest logit is the target's.
    pub correct: u64,
}

impl Totals {
    /// Adds those of rows that come after.
    pub fn add(&mut self, next: &Totals) {
        self.loss += next.loss;
        self.z_loss += next.z_loss;
        self.correct += next.correct;
    }
}

/// One row on its way: from its operands ([`read`](Self::read)) over its sums
/// ([`finish`](Self::finish)) to its gradient ([`place_target`](Self::place_target)).
#[derive(Clone, Copy, Debug)]
pub struct Row {
    /// Which.
    pub at: At,
    /// The class that sums leave out: the target, or the largest.
    pub hole: Option<usize>,
    /// It counts.
    kept: bool,
    /// The logit of that class, what its gradient is multiplied by, its weight or mass, and r.
    x_y: f64,
    slope: f64,
    w_y: f64,
    r: f64,
    /// What the gradient holds at the target before the sweep, where it is accumulated.
    old: f64,
    /// What it is to hold or add.
    pub entry: f64,
}

/// What remains to be done for a row's gradient.
#[derive(Clone, Copy, Debug)]
pub enum Job {
    /// Nothing: none is asked for, or it is 0 and accumulated.
    Nothing,
    /// The target's own part alone.
    Target,
    /// The same value everywhere, and then the target's own part.
    Fill(f64),
    /// A sweep, and then the target's own part.
    Sweep(RowGradient),
}

impl Row {
    /// None: it does not count.
    const NONE: Row = Row {
        at: At { row: 0, inner: 0 },
        hole: None,
        kept: false,
        x_y: f64::NEG_INFINITY,
        slope: 1.0,
        w_y: 1.0,
        r: 0.0,
        old: 0.0,
        entry: 0.0,
    };

    /// [`read`](Self::read), of a row whose classes are contiguous; looks for its largest logit if
    /// that is needed.
    ///
    /// # Safety
    /// See [`read`](Self::read).
    #[inline(always)]
    pub unsafe fn start(k: &Kernels, plan: &Plan, at: At) -> Self {
        // SAFETY: the caller's promise.
        unsafe {
            let class = if plan.leaves_top_out() { top(k, plan, at).class } else { 0 };
            Row::read(k, plan, at, class)
        }
    }

    /// Reads the row's target and weights, and the logit that its sums leave out, which a call in
    /// place overwrites. That is the target's, or `top`, the largest, where there is no such class:
    /// what is small beside it then keeps its accuracy.
    ///
    /// # Safety
    /// The row is one of the plan's, and no other thread is at it; `top` is a class. The same for
    /// all below, with the same plan.
    #[inline(always)]
    pub unsafe fn read(k: &Kernels, plan: &Plan, at: At, top: usize) -> Self {
        let mut row = Row { at, ..Row::NONE };
        // SAFETY: a row of the plan; so for every access below, which is to this row of the views.
        match unsafe { plan.target(at) } {
            Target::Class(y) => {
                row.hole = Some(y);
                // SAFETY: a target's class is in range (problem.rs).
                row.w_y = unsafe { plan.class_weight(y) };
            }
            Target::Mass if plan.leaves_top_out() => {
                // SAFETY: see above.
                unsafe { plan.mass(at, top, std::slice::from_mut(&mut row.w_y)) };
                row.hole = Some(top);
            }
            Target::Mass => {}
            Target::Absent if plan.leaves_top_out() => row.hole = Some(top),
            Target::Absent | Target::Ignored => return row,
        }
        row.kept = true;
        // SAFETY: see above.
        row.r = unsafe { plan.row_weight(at) };
        if let Some(y) = row.hole {
            // SAFETY: see above.
            unsafe { row.read_hole(k, plan, y) };
        }
        row
    }

    /// # Safety
    /// See [`read`](Self::read); `y` is a class.
    #[inline(always)]
    unsafe fn read_hole(&mut self, k: &Kernels, plan: &Plan, y: usize) {
        // SAFETY: a class of a row of the plan.
        self.x_y = unsafe { plan.logits.real(self.at, y) };
        if plan.transform.is_some() {
            // SAFETY: as above.
            unsafe { self.transform_hole(k, plan) };
        }
        if let Some(gradient) = &plan.gradient
            && gradient.accumulate
        {
            // SAFETY: as above.
            self.old = unsafe { gradient.view.real(self.at, y) };
        }
    }

    /// # Safety
    /// See [`read`](Self::read).
    #[cold]
    unsafe fn transform_hole(&mut self, k: &Kernels, plan: &Plan) {
        let Some(with) = &plan.transform else { return };
        // One number of the lanes' type, which is as long as a logit or longer.
        let (mut x, mut slope) = ([self.x_y, 0.0], [with.scale, 0.0]);
        if plan.logits.dtype.has_short_lanes() {
            let (mut short, mut short_slope) = (self.x_y as f32, with.scale as f32);
            // SAFETY: one element each.
            unsafe {
                let (x, slope) = (&raw mut short, &raw mut short_slope);
                (k.lanes.transform)(x.cast(), 1, with, slope.cast());
            }
            (x[0], slope[0]) = (f64::from(short), f64::from(short_slope));
        } else {
            // SAFETY: one element each.
            unsafe {
                let (x, slope) = (x.as_mut_ptr(), slope.as_mut_ptr());
                (k.lanes.transform)(x.cast(), 1, with, slope.cast());
            }
        }
        self.x_y = x[0];
        if with.cap > 0.0 {
            self.slope = slope[0];
        }
    }

    /// Logits are counted from the one that is left out.
    #[inline(always)]
    pub fn is_center(&self, center: f64) -> bool {
        self.hole.is_some() && center == self.x_y
    }

    /// Whether the row's exponentials have to be summed up: it counts, or its lse is wanted all
    /// the same.
    #[inline(always)]
    pub fn needs_softmax(&self, plan: &Plan) -> bool {
        let from_lse = matches!(plan.pass, Pass::Backward | Pass::Targets);
        let wanted = self.kept || plan.lse.is_some() || plan.entropy.is_some();
        !from_lse && plan.has_softmax() && wanted
    }

    /// Whether the first sweep is needed at all.
    #[inline(always)]
    pub fn needs_sum(&self, plan: &Plan) -> bool {
        self.needs_softmax(plan)
            || plan.wants_argmax()
            // The total of a row's mass is part of its gradient.
            || (self.kept && self.has_mass(plan) && plan.pass != Pass::Targets)
    }

    /// A mass is spread over the row's classes.
    #[inline(always)]
    fn has_mass(&self, plan: &Plan) -> bool {
        match plan.targets {
            Targets::Absent => false,
            Targets::Indices(_) => plan.label_smoothing > 0.0 && plan.pass != Pass::Backward,
            Targets::Probabilities(_) => true,
        }
    }

    /// What the first sweep is to do.
    #[inline(always)]
    pub fn sum(&self, plan: &Plan, anchor: Anchor) -> RowSum {
        let center = (self.kept && self.has_mass(plan)).then(|| {
            let start = anchor.reference.near / plan.l;
            if plan.log_probs {
                0.0
            } else if self.hole.is_some()
                && self.w_y != 0.0
                && self.x_y.is_finite()
                && !(anchor.real && is_far_below(self.x_y, start))
            {
                self.x_y
            } else {
                start
            }
        });
        RowSum { softmax: self.needs_softmax(plan), hole: self.hole, anchor, center }
    }

    /// Writes the row's results; returns what to do about the gradient. `i` is its lane in `ends`.
    ///
    /// # Safety
    /// See [`read`](Self::read).
    #[inline(always)]
    pub unsafe fn finish(
        &mut self,
        plan: &Plan,
        ends: &Ends,
        i: usize,
        sum: &RowSum,
        sums: &Partial,
        totals: &mut Totals,
    ) -> Job {
        let from_lse = matches!(plan.pass, Pass::Backward | Pass::Targets);
        let mut softmax = Softmax {
            lse: ends.lse[i],
            base: Reference { far: ends.far[i], near: ends.base[i] },
            rise: ends.rise[i],
            nll: ends.nll[i],
            hit: ends.hit[i],
            miss: ends.miss[i],
            own: Curve {
                reference: Reference { far: ends.far[i], near: ends.near[i] },
                factor: ends.share[i],
            },
            anchored: Curve::NONE,
        };
        if !plan.has_softmax() {
            // Their lse is 0.
            softmax = Softmax {
                lse: 0.0,
                base: Reference::ZERO,
                rise: 0.0,
                nll: -self.x_y,
                hit: 0.0,
                miss: 0.0,
                ..softmax
            };
        }
        softmax.anchored = softmax.own;
        if !from_lse && sum.anchor.reference != softmax.own.reference {
            let below = softmax.own.reference.above(sum.anchor.reference, plan.l);
            softmax.anchored.reference = sum.anchor.reference;
            softmax.anchored.factor = times(softmax.own.factor, exp2(-below));
        }
        if let Pass::Softmax | Pass::LogSoftmax = plan.pass {
            return self.distribution(plan, &softmax);
        }
        if !from_lse {
            // SAFETY: see above.
            unsafe { self.write(plan, &softmax, ends.entropy[i], sum, sums, totals) };
        }
        // SAFETY: see above.
        unsafe { self.job(plan, &softmax, sums.mass.value()) }
    }

    /// # Safety
    /// See [`read`](Self::read).
    #[inline(always)]
    unsafe fn write(
        &self,
        plan: &Plan,
        softmax: &Softmax,
        entropy: f64,
        sum: &RowSum,
        sums: &Partial,
        totals: &mut Totals,
    ) {
        let (loss, z_loss) = self.loss(plan, softmax, sum, sums);
        totals.loss += loss;
        totals.z_loss += z_loss;
        if self.kept && plan.correct && self.hole == Some(sums.top.class) {
            totals.correct += 1;
        }
        let place = |view: &Option<View>, value: f64| {
            if let Some(view) = view {
                // SAFETY: a row of the view.
                unsafe { view.set_real(self.at, 0, value) };
            }
        };
        place(&plan.lse, softmax.lse);
        place(&plan.row_losses, loss + z_loss);
        place(&plan.entropy, if softmax.lse.is_finite() { entropy } else { f64::NAN });
        if let Some(view) = &plan.argmax {
            // SAFETY: a row of the view, which is of i64.
            unsafe { *view.at(self.at, 0).cast::<i64>() = sums.top.class as i64 };
        }
    }

    /// The cross-entropy and the z-loss part.
    #[inline(always)]
    fn loss(&self, plan: &Plan, softmax: &Softmax, sum: &RowSum, sums: &Partial) -> (f64, f64) {
        if !self.kept || self.r == 0.0 {
            return (0.0, 0.0);
        }
        let z_loss = self.r * times(plan.z_loss, softmax.lse * softmax.lse);
        // A row of NaN, +inf or nothing but −inf has no probabilities, whatever its weights.
        if !softmax.lse.is_finite() {
            return (f64::NAN, z_loss);
        }
        let mut loss = 0.0;
        if let Some(center) = sum.center {
            // Σ m_c·(lse − x_c), as M·(lse − center) − Σ m_c·(x_c − center).
            let height = if self.is_center(center) {
                softmax.nll
            } else {
                // For lse itself is rounded.
                let Reference { far, near } = softmax.base;
                softmax.rise + (far - center).mul_add(plan.l, near) / plan.l
            };
            let own = if self.hole.is_some() { times(self.w_y, self.x_y - center) } else { 0.0 };
            let dot = sums.dot + own;
            loss = if plan.has_indices() {
                let spread = plan.label_smoothing / plan.classes as f64;
                spread * (times(plan.weight_total, height) - dot)
            } else {
                times(sums.mass.value(), height) - dot
            };
        }
        if plan.has_indices() {
            loss += times((1.0 - plan.label_smoothing) * self.w_y, softmax.nll);
        }
        (self.r * loss, z_loss)
    }

    /// # Safety
    /// See [`read`](Self::read).
    #[inline(always)]
    unsafe fn job(&mut self, plan: &Plan, softmax: &Softmax, mass: f64) -> Job {
        let Some(gradient) = &plan.gradient else {
            return Job::Nothing;
        };
        if !self.kept || self.r == 0.0 {
            return self.constant(plan, 0.0);
        }
        let (mut scale, mut z_scale) = (gradient.scale, gradient.z_scale);
        if let Some(view) = &gradient.output {
            // SAFETY: see above.
            let output = unsafe { view.real(self.at, 0) };
            scale *= output;
            z_scale *= output;
        }
        let smoothing = plan.label_smoothing;
        // The target's own mass, what masses are multiplied by, and all but the target's own.
        let (mut hit, mut bias, mut others) = if plan.has_indices() {
            let hit = scale * self.r * (1.0 - smoothing) * self.w_y;
            // Without smoothing there is none, whatever the scale.
            let bias = times(smoothing / plan.classes as f64, scale * self.r);
            (hit, bias, bias * plan.weight_total)
        } else {
            let bias = scale * self.r;
            (0.0, bias, times(bias, mass))
        };
        if !softmax.lse.is_finite() {
            self.entry = f64::NAN;
            return Job::Fill(f64::NAN);
        }
        if plan.z_loss != 0.0 {
            others += z_scale * self.r * 2.0 * plan.z_loss * softmax.lse;
        }
        if let Some(with) = &plan.transform
            && with.cap == 0.0
        {
            (hit, bias, others) = (hit * with.scale, bias * with.scale, others * with.scale);
        }
        if !plan.has_softmax() {
            self.entry = -(hit + times(bias, self.w_y));
            if bias == 0.0 {
                // Only the target's own is anything else than 0.
                return match self.entry {
                    0.0 => self.constant(plan, 0.0),
                    _ if gradient.accumulate => Job::Target,
                    _ => Job::Fill(0.0),
                };
            }
            return Job::Sweep(self.sweep(Kind::Nothing, Curve::NONE, Curve::NONE, bias));
        }
        let total = hit + others;
        if total.is_nan() {
            self.entry = f64::NAN;
            return Job::Fill(f64::NAN);
        }
        if hit == 0.0 && bias == 0.0 && total == 0.0 {
            return self.constant(plan, 0.0);
        }
        // `total·p_y - hit - own`, such that nothing cancels that needs not.
        let own = times(bias, self.w_y);
        let entry = if plan.has_indices() {
            hit * -softmax.miss + (others * softmax.hit - own)
        } else if softmax.hit < softmax.miss || total.is_infinite() {
            total * softmax.hit - own
        } else {
            (total - own) - total * softmax.miss
        };
        self.entry = self.slope * entry;
        // Terms that lanes cannot hold may have a difference that they can.
        let limit = if plan.logits.dtype.has_short_lanes() { 100 } else { 1000 };
        let scale = if total.abs() < exp2_const(limit) && bias.abs() < exp2_const(limit) {
            1.0
        } else {
            exp2_const(limit)
        };
        let (total, bias) = (total / scale, bias / scale);
        let (anchored, own) = (softmax.anchored.times(total), softmax.own.times(total));
        Job::Sweep(RowGradient { scale, ..self.sweep(Kind::Exponentials, anchored, own, bias) })
    }

    #[inline(always)]
    fn sweep(&self, kind: Kind, anchored: Curve, own: Curve, bias: f64) -> RowGradient {
        RowGradient { kind, anchored, own, bias, scale: 1.0, target: self.hole, next: None }
    }

    /// The softmax itself, or its logarithm.
    fn distribution(&mut self, plan: &Plan, softmax: &Softmax) -> Job {
        if !softmax.lse.is_finite() {
            self.entry = f64::NAN;
            return Job::Fill(f64::NAN);
        }
        if plan.pass == Pass::Softmax {
            self.entry = softmax.hit;
            return Job::Sweep(self.sweep(Kind::Exponentials, softmax.anchored, softmax.own, 0.0));
        }
        self.entry = -softmax.nll;
        // Counted from where logits have an exact distance to.
        let lse = Curve { reference: softmax.base, factor: softmax.rise };
        Job::Sweep(self.sweep(Kind::Logs, lse, lse, 0.0))
    }

    #[inline(always)]
    fn constant(&self, plan: &Plan, value: f64) -> Job {
        match &plan.gradient {
            Some(gradient) if !gradient.accumulate => Job::Fill(value),
            _ => Job::Nothing,
        }
    }

    /// Writes the target's own part of the gradient, where the sweep left something of no meaning.
    ///
    /// # Safety
    /// See [`read`](Self::read).
    #[inline(always)]
    pub unsafe fn place_target(&self, plan: &Plan) {
        if let (Some(gradient), Some(y)) = (&plan.gradient, self.hole) {
            let round = |x: f64| {
                if plan.logits.dtype.has_short_lanes() { f64::from(x as f32) } else { x }
            };
            // Rounded to the lanes' type like all others, and only then added.
            let entry = round(self.entry);
            let entry = if gradient.accumulate { round(self.old + entry) } else { entry };
            // SAFETY: see above; y is in range.
            unsafe { gradient.view.set_real(self.at, y, entry) };
        }
    }

    /// Writes the same value over the row's gradient.
    ///
    /// # Safety
    /// See [`read`](Self::read).
    pub unsafe fn fill(&self, plan: &Plan, value: f64) {
        /// # Safety
        /// `p` is the first of `len` elements that are this thread's alone.
        unsafe fn fill<T: Copy>(p: *mut u8, len: usize, value: T) {
            // SAFETY: the caller's promise.
            unsafe { std::slice::from_raw_parts_mut(p.cast::<T>(), len) }.fill(value);
        }
        let Some(gradient) = &plan.gradient else { return };
        let (view, short) = (&gradient.view, value as f32);
        // SAFETY: a row of the gradient, and this thread's alone.
        unsafe {
            if plan.scatters() {
                (0..plan.classes).for_each(|class| view.set_real(self.at, class, value));
                return;
            }
            let p = view.at(self.at, 0);
            match view.dtype {
                Dtype::F64 => fill(p, plan.classes, value),
                Dtype::Bf16 => fill(p, plan.classes, half::bf16::from_f32(short)),
                Dtype::F16 => fill(p, plan.classes, half::f16::from_f32(short)),
                _ => fill(p, plan.classes, short),
            }
        }
    }
}

/// What the sums of a row say about it.
struct Softmax {
    lse: f64,
    /// What lse is `rise` above.
    base: Reference,
    rise: f64,
    nll: f64,
    hit: f64,
    miss: f64,
    /// Probabilities relative to the anchor, and to the reference that the sums ended with.
    anchored: Curve,
    own: Curve,
}

/// A row with all that it gathers on its way.
#[derive(Clone, Copy, Debug)]
pub struct Lane {
    /// The row.
    pub row: Row,
    /// What its first sweep is to do.
    pub sum: RowSum,
    /// What that adds up.
    pub partial: Partial,
    /// What remains to be done then.
    pub job: Job,
}

/// Up to eight rows that go through their stages together.
pub struct Batch {
    len: usize,
    lanes: [MaybeUninit<Lane>; LANES_OF_ENDS],
}

impl Batch {
    /// No rows.
    // A constant would be copied, and cost as much as what it leaves open.
    #[inline(always)]
    pub fn new() -> Self {
        Batch { len: 0, lanes: [const { MaybeUninit::uninit() }; LANES_OF_ENDS] }
    }

    /// One more; no more than eight.
    #[inline(always)]
    pub fn push(&mut self, row: Row, sum: RowSum) {
        let lane = Lane { row, sum, partial: Partial::EMPTY, job: Job::Nothing };
        self.lanes[self.len].write(lane);
        self.len += 1;
    }

    /// The rows.
    #[inline(always)]
    pub fn lanes(&mut self) -> &mut [Lane] {
        let first = self.lanes.as_mut_ptr().cast();
        // SAFETY: `push` wrote them.
        unsafe { std::slice::from_raw_parts_mut(first, self.len) }
    }

    /// Writes the results of all rows and finds out what remains to be done.
    ///
    /// # Safety
    /// The rows are the plan's, and no other thread is at them.
    pub unsafe fn finish(&mut self, k: &Kernels, plan: &Plan, totals: &mut Totals) {
        let mut ends = Ends::EMPTY;
        for (i, Lane { row, partial, .. }) in self.lanes().iter().enumerate() {
            ends.x_y[i] = row.x_y;
            ends.far[i] = partial.level.reference.far;
            ends.near[i] = partial.level.reference.near;
            ends.sum[i] = partial.level.sum.value();
            ends.spread[i] = partial.spread.sum.value();
            ends.heat[i] = partial.spread.heat;
        }
        if plan.has_softmax() {
            if let Pass::Backward | Pass::Targets = plan.pass {
                for (i, Lane { row, .. }) in self.lanes().iter().enumerate() {
                    if let (true, Some(lse)) = (row.kept, &plan.lse) {
                        // SAFETY: a row of the view.
                        ends.lse[i] = unsafe { lse.real(row.at, 0) };
                    }
                }
                // SAFETY: the caller's promise about the tables (`Kernels`).
                unsafe { (k.lanes.from_lse)(&mut ends, plan.l) };
            } else {
                // SAFETY: as above.
                unsafe { (k.lanes.ends)(&mut ends, plan.l) };
            }
        }
        for (i, Lane { row, sum, partial, job }) in self.lanes().iter_mut().enumerate() {
            // SAFETY: the caller's promise.
            *job = unsafe { row.finish(plan, &ends, i, sum, partial, totals) };
        }
    }
}

/// The largest logit of a row.
///
/// # Safety
/// See [`Row::read`].
pub unsafe fn top(k: &Kernels, plan: &Plan, at: At) -> Top {
    let mut top = Top::NONE;
    for class in (0..plan.classes).step_by(crate::plan::CHUNK) {
        let len = crate::plan::CHUNK.min(plan.classes - class);
        // SAFETY: within the row, whose classes are contiguous.
        let mut next = unsafe { (k.stored.argmax)(plan.logits.at(at, class), len) };
        next.class += class;
        top.push(next);
    }
    top
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dispatch::Isa;

    const INF: f64 = f64::INFINITY;
    const NAN: f64 = f64::NAN;

    /// Lanes of f32, and of f64; both with the base that they work in.
    const LANES: [(Dtype, f64); 2] = [(Dtype::F32, f32::L as f64), (Dtype::F64, f64::L)];

    /// The numbers of one row.
    #[derive(Clone, Copy, Debug)]
    struct One {
        far: f64,
        near: f64,
        sum: f64,
        spread: f64,
        heat: f64,
        x_y: f64,
        lse: f64,
        base: f64,
        rise: f64,
        nll: f64,
        hit: f64,
        miss: f64,
        share: f64,
        entropy: f64,
    }

    impl One {
        const EMPTY: One = One {
            far: 0.0,
            near: 0.0,
            sum: 1.0,
            spread: 1.0,
            heat: 0.0,
            x_y: 0.0,
            lse: 0.0,
            base: 0.0,
            rise: 0.0,
            nll: 0.0,
            hit: 0.0,
            miss: 0.0,
            share: 0.0,
            entropy: 0.0,
        };

        fn fields(&self) -> [f64; 13] {
            let One { far, near, sum, spread, heat, x_y, .. } = *self;
            let One { lse, rise, nll, hit, miss, share, entropy, .. } = *self;
            [far, near, sum, spread, heat, x_y, lse, rise, nll, hit, miss, share, entropy]
        }
    }

    /// The rows on every set, in every lane, for one type of lanes; the sets that fuse have the
    /// same bits, and no lane looks at another.
    fn run(dtype: Dtype, l: f64, rows: &[One], from_lse: bool) -> Vec<(Isa, Vec<One>)> {
        let mut all: Vec<(Isa, Vec<One>)> = Vec::new();
        for isa in Isa::ALL {
            let Some(k) = isa.kernels(dtype, dtype) else {
                println!("SKIPPED: this processor does not have {}", isa.name());
                continue;
            };
            let mut results = vec![One::EMPTY; rows.len()];
            for turn in 0..LANES_OF_ENDS {
                for start in (0..rows.len()).step_by(LANES_OF_ENDS) {
                    let at = |lane: usize| start + (lane + turn) % LANES_OF_ENDS;
                    let mut ends = Ends::EMPTY;
                    for lane in 0..LANES_OF_ENDS {
                        let row = rows.get(at(lane)).unwrap_or(&One::EMPTY);
                        (ends.far[lane], ends.near[lane]) = (row.far, row.near);
                        (ends.spread[lane], ends.heat[lane]) = (row.spread, row.heat);
                        ends.sum[lane] = row.sum;
                        (ends.x_y[lane], ends.lse[lane]) = (row.x_y, row.lse);
                    }
                    // SAFETY: handed out for a set that is there.
                    unsafe {
                        if from_lse {
                            (k.lanes.from_lse)(&mut ends, l);
                        } else {
                            (k.lanes.ends)(&mut ends, l);
                        }
                    }
                    for lane in 0..LANES_OF_ENDS {
                        let Some(result) = results.get_mut(at(lane)) else { continue };
                        let got = One {
                            far: ends.far[lane],
                            near: ends.near[lane],
                            sum: ends.sum[lane],
                            spread: ends.spread[lane],
                            heat: ends.heat[lane],
                            x_y: ends.x_y[lane],
                            lse: ends.lse[lane],
                            base: ends.base[lane],
                            rise: ends.rise[lane],
                            nll: ends.nll[lane],
                            hit: ends.hit[lane],
                            miss: ends.miss[lane],
                            share: ends.share[lane],
                            entropy: ends.entropy[lane],
                        };
                        let bits = |one: &One| one.fields().map(f64::to_bits);
                        assert!(turn == 0 || bits(result) == bits(&got), "lane {lane}: {got:?}");
                        *result = got;
                    }
                }
            }
            if let Some((other, good)) = all.iter().find(|(isa, _)| *isa != Isa::Portable) {
                for (a, b) in results.iter().zip(good) {
                    let same = a.fields().map(f64::to_bits) == b.fields().map(f64::to_bits);
                    assert!(same, "{a:?} on {isa:?}, {b:?} on {other:?}");
                }
            }
            all.push((isa, results));
        }
        all
    }

    #[track_caller]
    fn close(got: f64, want: f64, bound: f64, what: &str, row: &One) {
        let good = got == want || (got - want).abs() <= bound || got.is_nan() && want.is_nan();
        assert!(good, "{what} is {got:e}, not {want:e} (by {bound:e}): {row:?}");
    }

    /// The formulas at the head of this file, with the standard library's functions.
    #[test]
    fn ends_by_the_formulas() {
        // The exponent of a sum whose fraction is taken from √½ to √2.
        let near_log2 = |x: f64| (x.log2() + 1e-15).round();
        for (dtype, l) in LANES {
            let mut rows = Vec::new();
            for near in [0.0, 3.0, -40.0, 1e3, -1e6] {
                for sum in [1e-300, 1e-30, 0.1, 1.0, 1.5, 1e4, 1e18, 1e300] {
                    let rest = (near + f64::log2(sum)) / l;
                    for q in [-680.0, -75.0, -36.0, -1.0, -1e-3, 0.0, 1e-9, 0.7, 20.0, 80.0, 690.0]
                    {
                        rows.push(One { near, sum, x_y: rest - q, ..One::EMPTY });
                    }
                }
            }
            for far in [1e30, -3e38, 5e17] {
                for d in [0.0, 1.0, -1.0] {
                    let x_y = far * (1.0 + d * f64::EPSILON);
                    rows.push(One { far, sum: 2.5, x_y, ..One::EMPTY });
                }
            }
            for (isa, results) in run(dtype, l, &rows, false) {
                for row in &results {
                    let height = row.sum.log2();
                    let rest = row.far + (row.near + height) / l;
                    let q = ((row.far - row.x_y).mul_add(l, row.near) + height) / l;
                    let (lse, nll) = if q > 0.0 {
                        (rest + (-q).exp().ln_1p(), q + (-q).exp().ln_1p())
                    } else {
                        (row.x_y + q.exp().ln_1p(), q.exp().ln_1p())
                    };
                    // Both terms of q are rounded, and so is what e^q makes of that.
                    let slip = 3e-16 * (row.near.abs() + height.abs() + q.abs()) + 2e-15;
                    let what = isa.name();
                    close(row.lse, lse, slip + 1e-15 * lse.abs(), what, row);
                    // To the last digits where lse itself is rounded far more: from an integer.
                    assert!(
                        row.base == row.base.round() && row.base - row.near == near_log2(row.sum)
                    );
                    let fraction = height - near_log2(row.sum);
                    let rise = if q > 0.0 {
                        fraction / l + (-q).exp().ln_1p()
                    } else {
                        nll - (row.far - row.x_y).mul_add(l, row.base) / l
                    };
                    close(row.rise, rise, slip + 1e-15 * rise.abs(), what, row);
                    close(row.nll, nll, (slip + 2e-15) * nll, what, row);
                    let (hit, miss) = (1.0 / (1.0 + q.exp()), 1.0 / (1.0 + (-q).exp()));
                    close(row.hit, hit, (slip + 2e-15) * hit, what, row);
                    close(row.miss, miss, (slip + 2e-15) * miss, what, row);
                    close(row.share, miss / row.sum, (slip + 3e-15) * miss / row.sum, what, row);
                }
            }
        }
    }

    /// Whole rows, with one class left out or none, against sums over all classes.
    #[test]
    fn entropy_by_definition() {
        let rows: [&[f64]; 8] = [
            &[0.0, 0.0, 0.0, 0.0],
            &[1.0, -2.0, 3.5, 0.25],
            &[40.0, 0.0, 1.0, -3.0],
            &[0.0, 40.0, 39.0, 39.5],
            &[-5.0, -INF, -6.0, -INF],
            &[-INF, 3.0, 2.0, -INF],
            &[1e3, 1e3 + 1.0, 1e3 - 0.5, 1e3],
            &[30.0, -650.0, 29.0, 0.0],
        ];
        for (dtype, l) in LANES {
            let bound = if dtype == Dtype::F32 { 1e-6 } else { 1e-13 };
            let (mut all, mut want) = (Vec::new(), Vec::new());
            for x in rows {
                let max = x.iter().copied().fold(-INF, f64::max);
                let total: f64 = x.iter().map(|x| (x - max).exp()).sum();
                let lse = max + total.ln();
                let entropy: f64 = x.iter().map(|x| times((x - lse).exp(), lse - x)).sum();
                for hole in [None, Some(0)] {
                    for shift in [0.0, 7.0, -11.0] {
                        let near = nearest(max * l) + shift;
                        let mut row = One { near, sum: 0.0, spread: 0.0, x_y: -INF, ..One::EMPTY };
                        for (c, x) in x.iter().enumerate() {
                            if hole == Some(c) {
                                row.x_y = *x;
                                continue;
                            }
                            let t = x.mul_add(l, -near);
                            row.sum += t.exp2();
                            // From another reference than the sum.
                            let t = x.mul_add(l, -nearest(max * l));
                            row.spread += t.exp2();
                            row.heat += times(t.exp2(), t);
                        }
                        all.push(row);
                        want.push((lse, entropy));
                    }
                }
            }
            for (isa, results) in run(dtype, l, &all, false) {
                for (row, (lse, entropy)) in results.iter().zip(&want) {
                    close(row.lse, *lse, bound * (1.0 + lse.abs()), isa.name(), row);
                    close(row.entropy, *entropy, bound * (1.0 + lse.abs()), isa.name(), row);
                }
            }
        }
    }

    /// What is not finite: NaN over +inf, and −inf for no classes at all.
    #[test]
    fn ends_of_ends() {
        for (dtype, l) in LANES {
            let values = [-INF, -3.0, INF, NAN];
            let mut rows = Vec::new();
            for sum in [0.0, 2.0, INF, NAN] {
                for x_y in values {
                    for near in [0.0, 5.0] {
                        rows.push(One { sum, x_y, near, ..One::EMPTY });
                    }
                }
            }
            for (isa, results) in run(dtype, l, &rows, false) {
                for row in &results {
                    let what = isa.name();
                    let rest = (row.near + row.sum.log2()) / l;
                    let lse = match (rest, row.x_y) {
                        (rest, x_y) if rest.is_nan() || x_y.is_nan() => NAN,
                        (rest, x_y) if rest == INF || x_y == INF => INF,
                        (f64::NEG_INFINITY, x_y) => x_y,
                        (rest, f64::NEG_INFINITY) => rest,
                        (rest, x_y) => rest.max(x_y) + (-(rest - x_y).abs()).exp().ln_1p(),
                    };
                    close(row.lse, lse, 1e-14, what, row);
                    if row.sum == 0.0 && row.x_y == -3.0 {
                        // Certain, exactly.
                        assert_eq!((row.lse, row.nll, row.entropy), (-3.0, 0.0, 0.0), "{row:?}");
                        assert_eq!((row.hit, row.miss, row.share), (1.0, 0.0, 0.0), "{row:?}");
                    }
                    if row.sum == 2.0 && row.x_y == -INF {
                        assert_eq!((row.nll, row.hit, row.miss), (INF, 0.0, 1.0), "{row:?}");
                        assert_eq!(row.share, 0.5, "{row:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn from_lse_by_the_formulas() {
        for (dtype, l) in LANES {
            let mut rows = Vec::new();
            for lse in [0.0, 0.3, -7.25, 88.0, -700.0, 1e4, -1.45e6, 1.46e6, 1e9, -3.9e14, 1e17] {
                for below in [0.0, 1e-12, 1e-3, 0.5, 3.0, 40.0, 90.0, 650.0, INF] {
                    rows.push(One { lse, x_y: lse - below, ..One::EMPTY });
                }
                // An lse that is none of this row's: p above 1.
                rows.push(One { lse, x_y: lse + 2.0, ..One::EMPTY });
            }
            for (isa, results) in run(dtype, l, &rows, true) {
                for row in &results {
                    let what = isa.name();
                    let log_p = row.x_y - row.lse;
                    assert_eq!(row.nll, -log_p, "{row:?}");
                    let slip = 2e-15 + 2e-17 * log_p.abs();
                    let hit = log_p.exp();
                    close(row.hit, hit, slip * hit, what, row);
                    close(row.miss, -log_p.exp_m1(), slip * log_p.exp_m1().abs(), what, row);
                    // A reference that the lanes hold, an integer or far, near the lse.
                    let is_held = dtype == Dtype::F64 || f64::from(row.far as f32) == row.far;
                    assert!(is_held && (row.far == 0.0 || row.near == 0.0), "{row:?}");
                    assert!(row.near == row.near.round(), "{row:?}");
                    let t = (row.far - row.lse).mul_add(l, row.near);
                    let step = if dtype == Dtype::F32 { 6e-8 * row.lse.abs() } else { 0.0 };
                    assert!(t.abs() <= 0.5001 + if row.far == 0.0 { 0.0 } else { step * l });
                    let share = if t < -1022.5 { 0.0 } else { t.exp2() };
                    close(row.share, share, (2e-15 + 3e-16 * t.abs()) * share, what, row);
                }
            }
            // Nothing comes of an lse that is not finite, least of all a reference.
            let rows = [INF, -INF, NAN].map(|lse| One { lse, ..One::EMPTY });
            for (_, results) in run(dtype, l, &rows, true) {
                for row in results {
                    assert_eq!((row.far, row.near), (0.0, 0.0));
                }
            }
        }
    }
}
