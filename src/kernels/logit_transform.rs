//! What happens to logits before the softmax: a scale, then a soft cap.

use crate::math::exp2::Base;
use crate::math::real;
use crate::simd::{Real, Simd, up_to};

/// `x -> scale·x`, then `x -> cap·tanh(x/cap)` unless cap is 0, rounded to the lanes' type.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Transform {
    /// logit_scale
    pub scale: f64,
    /// softcap
    pub cap: f64,
}

impl Transform {
    /// Whether there is a cap, so that the derivative differs by logit.
    #[inline(always)]
    pub fn is_capped(&self) -> bool {
        self.cap > 0.0
    }
}

/// Transforms `len` logits where they lie. The derivative goes to `slope`, unless `slope` is null or there
/// is no cap.
///
/// # Safety
/// `x` is readable and writable for `len` lanes, and `slope`, if not null, writable for as many; the
/// processor has the set of `s`.
#[inline(always)]
pub unsafe fn transform<S: Simd<Real: Base>>(
    s: S,
    x: *mut u8,
    len: usize,
    transform: &Transform,
    slope: *mut u8,
) {
    let d = s.wide();
    let (x, slope) = (x.cast::<S::Real>(), slope.cast::<S::Real>());
    let capped = transform.is_capped();
    let (scale, cap) = (d.splat(transform.scale), d.splat(transform.cap));
    for at in (0..len).step_by(S::LANES) {
        let lanes = up_to::<S>(len - at);
        // SAFETY: `lanes` has a bit for each of the logits from `at` on that `x` is readable for
        // (# Safety).
        let v = unsafe { s.load_lanes(x.wrapping_add(at), lanes, S::Real::ZERO) };
        let (mut values, mut slopes) = (s.widen(v), s.widen(v));
        for (v, d_v) in values.as_mut().iter_mut().zip(slopes.as_mut()) {
            let scaled = d.mul(*v, scale);
            if capped {
                let (tanh, derivative) = real::tanh(d, d.div(scaled, cap));
                *v = d.mul(cap, tanh);
                // A finite slope keeps the gradient of a probability of 0 at 0.
                let most = S::Real::MAX.to_f64();
                let steep = d.max(d.splat(-most), d.mul(scale, derivative));
                *d_v = d.min(d.splat(most), steep);
            } else {
                *v = scaled;
            }
        }
        // SAFETY: `lanes` keeps to the `len` lanes that both are writable for (# Safety).
        unsafe {
            s.store_lanes(x.wrapping_add(at), lanes, s.narrow(values));
            if capped && !slope.is_null() {
                s.store_lanes(slope.wrapping_add(at), lanes, s.narrow(slopes));
            }
        }
    }
}
