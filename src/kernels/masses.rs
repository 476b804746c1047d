//! Target probabilities, in lanes of f64.

use crate::element::Element;
use crate::math::real;
use crate::simd::{Halves, Simd, up_to};
use crate::view::FloatType;
use half::{bf16, f16};

/// Converts `len` numbers of a type to f64, exactly. Nobody asks for those of f64, which are that already.
///
/// # Safety
/// `x` is readable for `len` numbers of the type and aligned to it, and `to` writable for `len`; the processor has the
/// set of `s`.
#[inline(always)]
pub unsafe fn widen<S: Halves>(s: S, dtype: FloatType, x: *const u8, len: usize, to: *mut f64) {
    // SAFETY: this function's own # Safety.
    unsafe {
        match dtype {
            FloatType::F64 => {}
            FloatType::F32 => widen_as::<S, f32>(s, x.cast(), len, to),
            FloatType::Bf16 => widen_as::<S, bf16>(s, x.cast(), len, to),
            FloatType::F16 => widen_as::<S, f16>(s, x.cast(), len, to),
        }
    }
}

/// # Safety
/// As [`widen`].
#[inline(always)]
unsafe fn widen_as<S: Halves, E: Element<S>>(s: S, x: *const E, len: usize, to: *mut f64) {
    let (d, wide) = (s.wide(), <S::Wide as Simd>::LANES);
    for at in (0..len).step_by(S::LANES) {
        let (x, to, left) = (x.wrapping_add(at), to.wrapping_add(at), len - at);
        // SAFETY: `left` numbers from `x` on are readable and as many from `to` on writable (# Safety): a whole
        // register of them, by the comparison, or those that the masks have.
        unsafe {
            if left >= S::LANES {
                for (i, v) in s.widen(E::load(s, x)).as_ref().iter().enumerate() {
                    d.store(to.wrapping_add(i * wide), *v);
                }
                continue;
            }
            let v = s.widen(E::load_lanes(s, x, up_to::<S>(left), 0.0));
            for (i, v) in v.as_ref().iter().enumerate() {
                let lanes = up_to::<S::Wide>(left.saturating_sub(i * wide));
                d.store_lanes(to.wrapping_add(i * wide), lanes, *v);
            }
        }
    }
}

/// Replaces `len` numbers x by `e^(scale·(x - shift))·factor`: 0 for -inf, NaN for NaN. The relative error is below
/// `2^-51·(1 + |scale·(x - shift)|)`. The difference comes first: of a product with large numbers the rounding alone
/// is out of the range of exponentials.
///
/// # Safety
/// `x` is readable and writable for `len` numbers; the processor has the set of `s`.
#[inline(always)]
pub unsafe fn exps<S: Simd>(s: S, x: *mut f64, len: usize, scale: f64, shift: f64, factor: f64) {
    let d = s.wide();
    let (scale, shift, factor) = (d.splat(scale), d.splat(shift), d.splat(factor));
    for at in (0..len).step_by(<S::Wide as Simd>::LANES) {
        let (p, lanes) = (x.wrapping_add(at), up_to::<S::Wide>(len - at));
        // SAFETY: `len - at` numbers from `p` on are readable and writable (# Safety), and the mask keeps to them.
        unsafe {
            let x = d.load_lanes(p, lanes, 0.0);
            let e = real::exp(d, d.mul(d.sub(x, shift), scale));
            d.store_lanes(p, lanes, d.mul(e, factor));
        }
    }
}

/// Replaces `len` probabilities t by `t·(ln t - (x - center))`: 0 where t is 0 or below the smallest normal number, NaN
/// where it is negative.
///
/// # Safety
/// `t` is readable and writable, and `x` readable, for `len` numbers; the processor has the set of `s`.
#[inline(always)]
pub unsafe fn divergences<S: Simd>(s: S, t: *mut f64, x: *const f64, len: usize, center: f64) {
    let d = s.wide();
    let (zero, least, center) = (d.splat(0.0), d.splat(f64::MIN_POSITIVE), d.splat(center));
    for at in (0..len).step_by(<S::Wide as Simd>::LANES) {
        let (p, q, lanes) = (t.wrapping_add(at), x.wrapping_add(at), up_to::<S::Wide>(len - at));
        // SAFETY: `len - at` numbers from `p` on are readable and writable, and as many from `q` on readable
        // (# Safety); the mask keeps to them.
        unsafe {
            let (t, x) = (d.load_lanes(p, lanes, 0.0), d.load_lanes(q, lanes, 0.0));
            let (k, fraction) = real::ln_parts(d, t);
            let log = d.mul_add(k, d.splat(std::f64::consts::LN_2), fraction);
            let term = d.mul(t, d.sub(log, d.sub(x, center)));
            // What `ln_parts` makes of 0 and of numbers below 0 has no meaning.
            let term = d.select(d.less(t, least), zero, term);
            let term = d.select(d.less(t, zero), d.splat(f64::NAN), term);
            d.store_lanes(p, lanes, term);
        }
    }
}
