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
use crate::math::exp2::{L, NEAR, Reference, nearest};
use crate::math::scalar::{exp, exp2, expm1, log1p, log2};
use crate::plan::{Dtype, Gradient, Pass, Plan, Target};

/// The reference that a row's chunks start from.
#[derive(Clone, Copy, Debug)]
pub struct Anchor {
    /// Always `Near`.
    pub reference: Reference,
    /// What logits are taken relative to in sums of logits.
    pub center: f32,
    /// The reference is that of a logit of the row. Without, it is 0.
    pub real: bool,
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

/// What the gradient's sweep over a row needs.
#[derive(Clone, Copy, Debug)]
pub struct RowGradient {
    /// For chunks whose sums were relative to the anchor.
    pub anchored: Curve,
    /// For the others: relative to the row's lse.
    pub own: Curve,
    /// B: what is subtracted, times the class weight if there are any.
    pub bias: f64,
}

/// The sweeps over one row, wherever they run: on this thread (contiguous.rs), or split
/// over several (parallel.rs).
pub trait Row {
    /// See [`contiguous::anchor`](super::contiguous::anchor).
    ///
    /// # Safety
    /// The row is one of the plan's, and no other call is at it.
    unsafe fn anchor(&self, hole: Option<usize>) -> Anchor;
    /// The sums over all classes but the hole.
    ///
    /// # Safety
    /// As above.
    unsafe fn sum(&self, hole: Option<usize>, anchor: &Anchor, dot: bool) -> Partial;
    /// Writes the gradient, but for the target's own part. After [`sum`](Self::sum) in a call
    /// that does both.
    ///
    /// # Safety
    /// As above.
    unsafe fn gradient(&self, gradient: &RowGradient);
}

/// What the sums of a row say about it.
struct Softmax {
    lse: f64,
    /// −logp_y
    nll: f64,
    /// 1 − p_y
    miss: f64,
    /// `p_c = 2^(L·x_c - log2)·share` for c ≠ y, with `log2` the sums' reference.
    share: f64,
}

impl Softmax {
    /// `x_y` is the target's logit, which the sums leave out; without a target they leave out
    /// nothing.
    #[inline(always)]
    fn new(sums: &Partial, x_y: Option<f64>) -> Self {
        let l = f64::from(L);
        let rest =
            if sums.sum == 0.0 { f64::NEG_INFINITY } else { (sums.log2 + log2(sums.sum)) / l };
        let Some(x_y) = x_y else {
            return Softmax { lse: rest, nll: f64::NAN, miss: 1.0, share: 1.0 / sums.sum };
        };
        if rest == f64::NEG_INFINITY && x_y == f64::NEG_INFINITY {
            // No probabilities at all.
            return Softmax { lse: rest, nll: f64::NAN, miss: f64::NAN, share: f64::NAN };
        }
        if rest == f64::INFINITY || x_y == f64::INFINITY {
            // +inf, or NaN beside it.
            return Softmax {
                lse: if rest.is_nan() || x_y.is_nan() { f64::NAN } else { f64::INFINITY },
                nll: f64::NAN,
                miss: f64::NAN,
                share: f64::NAN,
            };
        }
        let q = rest - x_y;
        let e = exp(-q.abs());
        let tail = log1p(e);
        let (lse, nll, miss) = if q > 0.0 {
            (rest + tail, q + tail, 1.0 / (1.0 + e))
        } else {
            (x_y + tail, tail, e / (1.0 + e))
        };
        Softmax { lse, nll, miss, share: if sums.sum == 0.0 { 0.0 } else { miss / sums.sum } }
    }

    /// From an lse that was computed elsewhere.
    #[inline(always)]
    fn from_lse(lse: f64, x_y: f64) -> Self {
        Softmax { lse, nll: lse - x_y, miss: -expm1(x_y - lse), share: 0.0 }
    }
}

/// `a·b`, but 0 if `a` is.
#[inline(always)]
fn times(a: f64, b: f64) -> f64 {
    if a == 0.0 { 0.0 } else { a * b }
}

/// Does what the plan asks for to one row, and returns its loss.
///
/// # Safety
/// `index < plan.rows`, `row` is that row, and no other thread is at it.
#[inline(always)]
pub unsafe fn process<R: Row>(plan: &Plan, index: usize, row: &R) -> f64 {
    // SAFETY: a row of the plan; so for every access below, which is to this row of the views.
    let target = unsafe { plan.target(index) };
    let class = match target {
        Target::Class(y) => Some(y),
        Target::Absent | Target::Ignored => None,
    };
    let forward = plan.pass != Pass::Backward;
    let wants_lse = forward && plan.lse.is_some();
    if class.is_none() && !wants_lse {
        // SAFETY: see above.
        unsafe {
            write_loss(plan, index, 0.0);
            if let Some(gradient) = &plan.gradient
                && !gradient.accumulate
            {
                fill(plan, gradient, index, 0.0);
            }
        }
        return 0.0;
    }

    // In place, the logit and the output's old value go before they are needed.
    // SAFETY: see above; a target's class is in range (problem.rs).
    let (x_y, w_y, r) = unsafe {
        match class {
            Some(y) => (
                Some(f64::from(*plan.logits.row::<f32>(index).add(y))),
                plan.class_weight(y),
                plan.row_weight(index),
            ),
            None => (None, 1.0, 0.0),
        }
    };
    let smoothing = plan.label_smoothing;
    let spread = smoothing / plan.classes as f64;

    let mut loss = 0.0;
    let (softmax, anchored) = if forward {
        let smooths = class.is_some() && smoothing > 0.0;
        // SAFETY: see above.
        let (anchor, sums) = unsafe {
            let anchor = row.anchor(class);
            (anchor, row.sum(class, &anchor, smooths))
        };
        let softmax = Softmax::new(&sums, x_y);
        if let Some(x_y) = x_y
            && r != 0.0
        {
            loss = times((1.0 - smoothing) * w_y, softmax.nll);
            if smooths {
                let center = f64::from(anchor.center);
                let dot = sums.dot + times(w_y, x_y - center);
                loss += spread * (times(plan.weight_total, softmax.lse - center) - dot);
            }
            // A row of NaN, +inf or nothing but −inf has no probabilities, whatever its weights.
            loss = if softmax.lse.is_finite() { r * loss } else { f64::NAN };
        }
        // SAFETY: see above.
        unsafe {
            if let Some(lse) = &plan.lse {
                *lse.row::<f64>(index) = softmax.lse;
            }
            write_loss(plan, index, loss);
        }
        let reference = anchor.reference;
        let share = softmax.share * exp2(reference.log2() - sums.log2);
        let share = if softmax.share == 0.0 { 0.0 } else { share };
        (softmax, Curve { reference, factor: share })
    } else {
        // SAFETY: see above; backward has an lse.
        let lse = match &plan.lse {
            Some(lse) => unsafe { *lse.row::<f64>(index) },
            None => f64::NAN,
        };
        let softmax = Softmax::from_lse(lse, x_y.unwrap_or(f64::NAN));
        let reference = Reference::Near(0.0);
        (softmax, Curve { reference, factor: 0.0 })
    };

    let Some(gradient) = &plan.gradient else {
        return loss;
    };
    let Some(y) = class else {
        if !gradient.accumulate {
            // SAFETY: see above.
            unsafe { fill(plan, gradient, index, 0.0) };
        }
        return loss;
    };
    let upstream = match &gradient.output {
        // SAFETY: see above.
        Some(view) => gradient.scale * unsafe { view.real(index, 0) },
        None => gradient.scale,
    };
    let hit = upstream * r * (1.0 - smoothing) * w_y;
    let bias = upstream * r * spread;
    let total = hit + bias * plan.weight_total;
    let constant = if r == 0.0 {
        Some(0.0)
    } else if !softmax.lse.is_finite() || total.is_nan() {
        Some(f32::NAN)
    } else if hit == 0.0 && bias == 0.0 {
        Some(0.0)
    } else {
        None
    };
    if let Some(value) = constant {
        if value != 0.0 || !gradient.accumulate {
            // SAFETY: see above.
            unsafe { fill(plan, gradient, index, value) };
        }
        return loss;
    }
    let entry = hit * -softmax.miss + bias * (plan.weight_total * (1.0 - softmax.miss) - w_y);
    // SAFETY: see above; y is in range.
    let (at, old) = unsafe {
        let at = gradient.view.row::<f32>(index).add(y);
        (at, if gradient.accumulate { *at } else { 0.0 })
    };
    let job = RowGradient {
        anchored: Curve { reference: anchored.reference, factor: total * anchored.factor },
        own: own_curve(softmax.lse, total),
        bias,
    };
    // SAFETY: see above. The sweep leaves something of no meaning at the target.
    unsafe {
        row.gradient(&job);
        *at = if gradient.accumulate { old + entry as f32 } else { entry as f32 };
    }
    loss
}

/// `total·exp(x - lse)` as a curve whose factor is close to `total`.
#[inline(always)]
fn own_curve(lse: f64, total: f64) -> Curve {
    let log2 = lse * f64::from(L);
    let c = nearest(log2);
    if c.abs() <= NEAR {
        Curve { reference: Reference::Near(c as f32), factor: total * exp2(c - log2) }
    } else {
        let far = lse.clamp(f64::from(f32::MIN), f64::from(f32::MAX)) as f32;
        Curve { reference: Reference::Far(far), factor: total * exp(f64::from(far) - lse) }
    }
}

/// # Safety
/// As [`process`].
#[inline(always)]
unsafe fn write_loss(plan: &Plan, index: usize, loss: f64) {
    if let Some(view) = &plan.row_losses {
        // SAFETY: a row of the view; the dtype says what is there.
        unsafe {
            match view.dtype {
                Dtype::F64 => *view.row::<f64>(index) = loss,
                _ => *view.row::<f32>(index) = loss as f32,
            }
        }
    }
}

/// # Safety
/// As [`process`].
#[inline(always)]
unsafe fn fill(plan: &Plan, gradient: &Gradient, index: usize, value: f32) {
    // SAFETY: a row of the gradient is `classes` long, and this thread's alone.
    let row =
        unsafe { std::slice::from_raw_parts_mut(gradient.view.row::<f32>(index), plan.classes) };
    row.fill(value);
}
