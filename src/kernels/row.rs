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
//! Exponentials are in base `b = 2^L` (math/exp2.rs), and so are their sums' logarithms:
//! `ln rest` is taken as `(c + log2 Σ 2^(L·x - c))/L`. That is the log-sum-exp at a temperature
//! 1.3e-8 from 1 whatever the reference c was; to take `c/L + ln Σ 2^…` would be
//! to mix bases and be off by 1.3e-8 times the distance between reference and result.

use super::online::Partial;
use crate::math::exp2::{L, Reference, nearest};
use crate::math::scalar::{exp, exp2, expm1, log1p, log2};
use crate::plan::{Dtype, Pass, Plan, Target};

/// The reference that a row's chunks start from.
#[derive(Clone, Copy, Debug)]
pub struct Anchor {
    /// Always `Near`.
    pub reference: Reference,
    /// The reference is that of a logit of the row. Without, it is 0.
    pub real: bool,
}

impl Anchor {
    /// That of a row that has none of its own.
    pub const NONE: Anchor = Anchor { reference: Reference::Near(0.0), real: false };
}

/// `P·p_c = 2^(L·x_c - reference)·factor`
#[derive(Clone, Copy, Debug)]
pub struct Curve {
    /// The reference of the exponentials.
    pub reference: Reference,
    /// What they are multiplied by.
    pub factor: f64,
}

impl Curve {
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
    pub fn split(&self) -> (f32, f32) {
        if self.is_plain() {
            return (1.0, self.factor as f32);
        }
        let half = nearest(log2(self.factor.abs()) * 0.5).clamp(-126.0, 126.0);
        (exp2(half) as f32, (self.factor * exp2(-half)) as f32)
    }
}

/// `2^k`
const fn exp2_const(k: i64) -> f64 {
    f64::from_bits(((k + 1023) as u64) << 52)
}

/// What the first sweep over a row is to do.
#[derive(Clone, Copy, Debug)]
pub struct RowSum {
    /// The class to leave out: the target.
    pub hole: Option<usize>,
    /// Where exponents are counted from.
    pub anchor: Anchor,
    /// Where the (weighted) sum of the logits is wanted too: what they are taken relative to.
    pub center: Option<f64>,
}

/// What the gradient's sweep over a row needs.
#[derive(Clone, Copy, Debug)]
pub struct RowGradient {
    /// For chunks whose sums were relative to the anchor.
    pub anchored: Curve,
    /// For the others: relative to the row's sums, or its lse.
    pub own: Curve,
    /// B: what is subtracted, times the class weight if there are any.
    pub bias: f64,
    /// The class whose part is written later.
    pub target: usize,
    /// A row to come on this thread, whose logits are worth fetching during the sweep.
    pub next: Option<usize>,
}

/// What the sums of a row say about it.
struct Softmax {
    lse: f64,
    /// −logp_y
    nll: f64,
    /// 1 − p_y
    miss: f64,
    /// The probabilities of the classes other than y, relative to the anchor and to a reference
    /// close to the lse.
    anchored: Curve,
    own: Curve,
}

impl Softmax {
    /// Of a row that has no probabilities: NaN, +inf, or nothing but −inf.
    #[inline(always)]
    fn undefined(lse: f64) -> Self {
        let none = Curve { reference: Reference::Near(0.0), factor: f64::NAN };
        Softmax { lse, nll: f64::NAN, miss: f64::NAN, anchored: none, own: none }
    }

    /// `x_y` is the target's logit, which the sums leave out; without a target they leave out
    /// nothing.
    #[inline(always)]
    fn new(sums: &Partial, x_y: Option<f64>, anchor: Reference) -> Self {
        let l = f64::from(L);
        let empty = sums.sum == 0.0;
        let height = log2(sums.sum);
        let rest = if empty { f64::NEG_INFINITY } else { (sums.log2 + height) / l };
        let Some(x_y) = x_y else {
            return Softmax::undefined(rest);
        };
        if rest == f64::NEG_INFINITY && x_y == f64::NEG_INFINITY {
            return Softmax::undefined(rest);
        }
        if rest == f64::INFINITY || x_y == f64::INFINITY {
            let nan = rest.is_nan() || x_y.is_nan();
            return Softmax::undefined(if nan { f64::NAN } else { f64::INFINITY });
        }
        // Reference and logit are exact in units of log2, so the difference is taken there: at a
        // height of 1e30 nothing else tells two logits from one.
        let q = if empty || x_y == f64::NEG_INFINITY {
            rest - x_y
        } else {
            ((sums.log2 - x_y * l) + height) / l
        };
        let e = exp(-q.abs());
        let (tail, inverse) = log1p(e);
        let (lse, nll, miss) = if q > 0.0 {
            (rest + tail, q + tail, inverse)
        } else {
            (x_y + tail, tail, e * inverse)
        };
        let share = if empty { 0.0 } else { miss / sums.sum };
        let own = Curve { reference: Reference::from_log2(sums.log2), factor: share };
        let mut anchored = Curve { reference: anchor, factor: share };
        if anchor.log2() != sums.log2 && share != 0.0 {
            anchored.factor *= exp2(anchor.log2() - sums.log2);
        }
        Softmax { lse, nll, miss, anchored, own }
    }

    /// From an lse that was computed elsewhere.
    #[inline(always)]
    fn from_lse(lse: f64, x_y: f64) -> Self {
        let log2 = nearest(lse * f64::from(L));
        let reference = Reference::from_log2(log2);
        let factor = match reference {
            Reference::Near(_) => exp2(log2 - lse * f64::from(L)),
            Reference::Far(x) => exp(f64::from(x) - lse),
        };
        let own = Curve { reference, factor };
        Softmax { lse, nll: lse - x_y, miss: -expm1(x_y - lse), anchored: own, own }
    }
}

/// `a·b`, but 0 if `a` is.
#[inline(always)]
fn times(a: f64, b: f64) -> f64 {
    if a == 0.0 { 0.0 } else { a * b }
}

/// One row on its way: from its operands ([`read`](Self::read)) over its sums
/// ([`finish`](Self::finish)) to its gradient ([`place_target`](Self::place_target)). Whoever
/// drives it runs the sweeps between: contiguous.rs for a batch of rows, parallel.rs for one row
/// over several threads.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    index: usize,
    class: Option<usize>,
    /// The target's logit and weight, and r.
    x_y: f64,
    w_y: f64,
    r: f64,
    /// What the gradient holds at the target before the sweep, where it is accumulated.
    old: f64,
    /// What it is to hold or add.
    entry: f64,
}

/// What remains to be done for a row's gradient.
#[derive(Clone, Copy, Debug)]
pub enum Job {
    /// Nothing: none is asked for, or it is 0 and accumulated.
    Nothing,
    /// The same value everywhere.
    Fill(f32),
    /// A sweep, and then [`Row::place_target`].
    Sweep(RowGradient),
}

impl Row {
    /// Reads the row's target and weights, and its target's logit, which a call in place
    /// overwrites.
    ///
    /// # Safety
    /// `index < plan.rows`, and no other thread is at that row. The same for all below, with the
    /// same plan.
    #[inline(always)]
    pub unsafe fn read(plan: &Plan, index: usize) -> Self {
        // SAFETY: a row of the plan; so for every access below, which is to this row of the views.
        let class = match unsafe { plan.target(index) } {
            Target::Class(y) => Some(y),
            Target::Absent | Target::Ignored => None,
        };
        let mut row = Row { index, class, x_y: 0.0, w_y: 1.0, r: 0.0, old: 0.0, entry: 0.0 };
        if let Some(y) = class {
            // SAFETY: see above; a target's class is in range (problem.rs).
            unsafe {
                row.x_y = plan.logits.real(index, y);
                row.w_y = plan.class_weight(y);
                row.r = plan.row_weight(index);
                if let Some(gradient) = &plan.gradient
                    && gradient.accumulate
                {
                    row.old = gradient.view.real(index, y);
                }
            }
        }
        row
    }

    /// The class that sums leave out.
    #[inline(always)]
    pub fn hole(&self) -> Option<usize> {
        self.class
    }

    /// Whether the row has to be summed up: it counts, or its lse is wanted all the same.
    #[inline(always)]
    pub fn needs_sum(&self, plan: &Plan) -> bool {
        plan.pass != Pass::Backward && (self.class.is_some() || plan.lse.is_some())
    }

    /// What the first sweep is to do.
    #[inline(always)]
    pub fn sum(&self, plan: &Plan, anchor: Anchor) -> RowSum {
        let smooths = self.class.is_some() && plan.label_smoothing > 0.0;
        let center = smooths.then(|| {
            // The target's own logit, unless it may be one that masks the class.
            if self.w_y != 0.0 && self.x_y.is_finite() {
                self.x_y
            } else {
                anchor.reference.log2() / f64::from(L)
            }
        });
        RowSum { hole: self.class, anchor, center }
    }

    /// Writes the row's lse and loss, given its sums if it [needs](Self::needs_sum) them; returns
    /// the loss and what to do about the gradient.
    ///
    /// # Safety
    /// See [`read`](Self::read).
    #[inline(always)]
    pub unsafe fn finish(&mut self, plan: &Plan, sums: Option<(&RowSum, &Partial)>) -> (f64, Job) {
        let Some((sum, sums)) = sums else {
            if plan.pass != Pass::Backward || self.class.is_none() {
                // SAFETY: see above.
                unsafe { self.write_loss(plan, 0.0) };
                return (0.0, self.constant(plan, 0.0));
            }
            let lse = match &plan.lse {
                // SAFETY: see above.
                Some(lse) => unsafe { *lse.row::<f64>(self.index) },
                None => f64::NAN,
            };
            let softmax = Softmax::from_lse(lse, self.x_y);
            // SAFETY: see above.
            return (0.0, unsafe { self.job(plan, &softmax) });
        };
        let softmax = Softmax::new(sums, self.class.map(|_| self.x_y), sum.anchor.reference);
        let loss = self.loss(plan, &softmax, sum, sums);
        // SAFETY: see above.
        unsafe {
            if let Some(lse) = &plan.lse {
                *lse.row::<f64>(self.index) = softmax.lse;
            }
            self.write_loss(plan, loss);
            (loss, self.job(plan, &softmax))
        }
    }

    #[inline(always)]
    fn loss(&self, plan: &Plan, softmax: &Softmax, sum: &RowSum, sums: &Partial) -> f64 {
        if self.class.is_none() || self.r == 0.0 {
            return 0.0;
        }
        // A row of NaN, +inf or nothing but −inf has no probabilities, whatever its weights.
        if !softmax.lse.is_finite() {
            return f64::NAN;
        }
        let mut loss = times((1.0 - plan.label_smoothing) * self.w_y, softmax.nll);
        if let Some(center) = sum.center {
            // Σ w_c·(lse − x_c), as W·(lse − center) − Σ w_c·(x_c − center).
            let height = if center == self.x_y { softmax.nll } else { softmax.lse - center };
            let dot = sums.dot + times(self.w_y, self.x_y - center);
            let spread = plan.label_smoothing / plan.classes as f64;
            loss += spread * (times(plan.weight_total, height) - dot);
        }
        self.r * loss
    }

    /// # Safety
    /// See [`read`](Self::read).
    #[inline(always)]
    unsafe fn job(&mut self, plan: &Plan, softmax: &Softmax) -> Job {
        let Some(gradient) = &plan.gradient else {
            return Job::Nothing;
        };
        let Some(target) = self.class.filter(|_| self.r != 0.0) else {
            return self.constant(plan, 0.0);
        };
        let upstream = match &gradient.output {
            // SAFETY: see above.
            Some(view) => gradient.scale * unsafe { view.real(self.index, 0) },
            None => gradient.scale,
        };
        let smoothing = plan.label_smoothing;
        let hit = upstream * self.r * (1.0 - smoothing) * self.w_y;
        let bias = upstream * self.r * (smoothing / plan.classes as f64);
        let total = hit + bias * plan.weight_total;
        if !softmax.lse.is_finite() || total.is_nan() {
            return Job::Fill(f32::NAN);
        }
        if hit == 0.0 && bias == 0.0 {
            return self.constant(plan, 0.0);
        }
        self.entry =
            hit * -softmax.miss + bias * (plan.weight_total * (1.0 - softmax.miss) - self.w_y);
        Job::Sweep(RowGradient {
            anchored: softmax.anchored.times(total),
            own: softmax.own.times(total),
            bias: bias * plan.weight_unit,
            target,
            next: None,
        })
    }

    #[inline(always)]
    fn constant(&self, plan: &Plan, value: f32) -> Job {
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
        if let (Some(gradient), Some(y)) = (&plan.gradient, self.class) {
            // Rounded to f32 like all others, and only then added.
            let entry = f64::from(self.entry as f32);
            let entry =
                if gradient.accumulate { f64::from((self.old + entry) as f32) } else { entry };
            // SAFETY: see above; y is in range.
            unsafe { gradient.view.set_real(self.index, y, entry) };
        }
    }

    /// Writes the same value over the row's gradient.
    ///
    /// # Safety
    /// See [`read`](Self::read).
    #[inline(always)]
    pub unsafe fn fill(&self, plan: &Plan, value: f32) {
        if let Some(gradient) = &plan.gradient {
            let half = match gradient.view.dtype {
                Dtype::Bf16 => half::bf16::from_f32(value).to_bits(),
                _ => half::f16::from_f32(value).to_bits(),
            };
            // SAFETY: a row of the gradient is `classes` long, and this thread's alone.
            unsafe {
                match gradient.view.dtype {
                    Dtype::Bf16 | Dtype::F16 => {
                        let start = gradient.view.row::<u16>(self.index);
                        std::slice::from_raw_parts_mut(start, plan.classes).fill(half);
                    }
                    _ => {
                        let start = gradient.view.row::<f32>(self.index);
                        std::slice::from_raw_parts_mut(start, plan.classes).fill(value);
                    }
                }
            }
        }
    }

    /// # Safety
    /// See [`read`](Self::read).
    #[inline(always)]
    unsafe fn write_loss(&self, plan: &Plan, loss: f64) {
        if let Some(view) = &plan.row_losses {
            // SAFETY: a row of the view.
            unsafe { view.set_real(self.index, 0, loss) };
        }
    }
}
