//! Gradients of rows whose factors leave the range of f64, or may do so on the way: a `grad_scale` of
//! 1e300 over a denominator of 1e200, a z-loss beside an lse of 1e305. The entries need not leave it,
//! and a class without probability has none of a factor, however large.
//!
//! The factors get an exponent of their own, of which lanes take what they hold.

use super::octet::{Octet, job};
use crate::math::scaled::Scaled;
use crate::plan::Plan;

impl Octet {
    /// Makes the gradient of row `i` anew, of which `parts` are p_y, 1 - p_y and what 2^t is multiplied
    /// by for probabilities: of factors whose product may be out of range though a term is not.
    #[cold]
    #[inline(never)]
    pub fn carry(&mut self, plan: &Plan, i: usize, [hit_p, miss_p, share]: [f64; 3]) {
        let Some(gradient) = &plan.gradient else { return };
        let r = if plan.row_weights.is_some() { self.r[i] } else { 1.0 };
        let output = if gradient.output.is_some() { self.output[i] } else { 1.0 };
        let w_y = if plan.has_masses() { self.w_y[i] } else { 1.0 };
        let rest = plan.transform.map_or(1.0, |with| with.rest);
        let [scale, z_scale] = gradient.whole.map(|scale| scale.times(output).times(r).times(rest));
        let nothing = Scaled::of(0.0);
        let unless_0 = |x: Scaled, factor: f64| match factor {
            0.0 => nothing,
            factor => x.times(factor),
        };
        let smoothing = plan.label_smoothing;
        let (hit, bias, mut others) = if plan.has_indices() {
            let bias = unless_0(scale, smoothing / plan.classes as f64);
            (scale.times(1.0 - smoothing).times(w_y), bias, bias.times(plan.weight_total))
        } else {
            let total = if scale.is_zero() { nothing } else { scale.times(self.mass[i]) };
            (nothing, scale, total)
        };
        if plan.z_loss != 0.0 {
            let by = if plan.has_softmax() { self.lse[i] } else { 0.0 };
            others = others.plus(z_scale.times(2.0).times(plan.z_loss).times(by));
        }
        let (own, total) = (unless_0(bias, w_y), hit.plus(others));
        let all = [hit, bias, others, own, total];
        if all.iter().any(|term| !term.is_finite()) {
            // Of an infinite operand, or over 0: as it is.
            return;
        }
        let none = hit.is_zero() && bias.is_zero() && total.is_zero();
        let top = |of: &[Scaled]| of.iter().filter_map(|term| term.exponent()).max().unwrap_or(0);
        // At the hole, and last by the power of two.
        let height = top(&all);
        let [hit, _, others, own, whole] = all.map(|term| term.down(height));
        let entry = if !plan.has_softmax() {
            -(hit + own)
        } else if plan.has_indices() {
            hit * -miss_p + (others * hit_p - own)
        } else if hit_p < miss_p {
            whole * hit_p - own
        } else {
            (whole - own) - whole * miss_p
        };
        let slope =
            if plan.transform.is_some_and(|with| with.cap > 0.0) { self.slope[i] } else { 1.0 };
        self.entry[i] = Scaled::of(entry).times(slope).up(height).to_f64();
        // Elsewhere lanes have to hold what is subtracted and its scale, whose range they share out.
        let most = if plan.logits.dtype.has_short_lanes() { 126 } else { 1020 };
        let height = top(&[bias, total]);
        let scale = height.clamp(-most, most);
        let by = scale + (height - scale - most).max(0);
        self.factor[i] = share * total.down(by);
        self.bias[i] = bias.down(by);
        self.scale[i] = Scaled::of(1.0).up(scale).to_f64();
        (self.extreme, self.scales) = (true, true);
        self.fill[i] = 0.0;
        let fresh = !gradient.accumulate;
        let constant = if fresh { job::FILL } else { job::NOTHING };
        let alone = if fresh { job::FILL } else { job::TARGET };
        self.job[i] = match (plan.has_softmax(), none, bias.is_zero()) {
            (true, true, _) => constant,
            (false, _, true) if self.entry[i] == 0.0 => constant,
            (false, _, true) => alone,
            _ => job::SWEEP,
        };
    }
}
