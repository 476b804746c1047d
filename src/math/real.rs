//! exp, expm1, log2, log1p and tanh in lanes of f64, for what a row needs once and for capped
//! logits.
//!
//! Built from IEEE additions, multiplications, divisions and fused multiply-adds alone, so the
//! bits are the same on every set that fuses; the platform's libm promises no such thing. Relative
//! error below 1e-15 throughout, for the exponential functions 1.4e-17·|x| more.

use super::exp2::{Exp2, Reference};
use crate::simd::Doubles;
use std::f64::consts::LOG2_E;

/// ln 2 in two parts: the first has 32 significant bits, so `k·LN_2_HI` is exact for |k| < 2^20.
const LN_2_HI: f64 = f64::from_bits(0x3FE6_2E42_FEE0_0000);
const LN_2_LO: f64 = f64::from_bits(0x3DEA_39EF_3579_3C76);

/// `2/3, 2/5, …, 2/23`: atanh's series, which 11 terms end below 1e-18 for |u| < 0.1716.
const ATANH: [f64; 11] = [
    2.0 / 3.0,
    2.0 / 5.0,
    2.0 / 7.0,
    2.0 / 9.0,
    2.0 / 11.0,
    2.0 / 13.0,
    2.0 / 15.0,
    2.0 / 17.0,
    2.0 / 19.0,
    2.0 / 21.0,
    2.0 / 23.0,
];

/// `e^x`; 0 below -709.1, inf above 710, NaN for NaN.
#[inline(always)]
pub fn exp<D: Doubles>(d: D, x: D::Vector) -> D::Vector {
    Exp2::<D, false>::new(d, Reference::ZERO).value::<true>(x)
}

/// `e^x - 1`, for x above 709 that of 709.
#[inline(always)]
pub fn expm1<D: Doubles>(d: D, x: D::Vector) -> D::Vector {
    Exp2::<D, false>::new(d, Reference::ZERO).minus_one(d.min(d.splat(709.0), x))
}

/// `x = 2^k·(1 + t)` with `1 + t` in [√½, √2); returns `(k, ln(1 + t))`. `x` is positive, finite
/// and normal.
#[inline(always)]
fn ln_parts<D: Doubles>(d: D, x: D::Vector) -> (D::Vector, D::Vector) {
    let (k, m) = d.split(x);
    let t = d.sub(m, d.splat(1.0));
    // ln(1 + t) = 2·atanh(u) with u = t/(2 + t), |u| < 0.1716; 2u = t - u·t keeps the leading
    // term exact, so that the result is good to an ulp near 1 as well.
    let u = d.div(t, d.add(d.splat(2.0), t));
    let z = d.mul(u, u);
    let z2 = d.mul(z, z);
    let z4 = d.mul(z2, z2);
    let pair = |i: usize| d.mul_add(z, d.splat(ATANH[i + 1]), d.splat(ATANH[i]));
    let low = d.mul_add(pair(2), z2, pair(0));
    let middle = d.mul_add(pair(6), z2, pair(4));
    let high = d.mul_add(d.splat(ATANH[10]), z2, pair(8));
    let q = d.mul_add(d.mul_add(high, z4, middle), z4, low);
    (k, d.sub(t, d.mul(u, d.sub(t, d.mul(z, q)))))
}

/// log2 x for x ≥ 0: -inf at 0 and below the smallest normal, inf at inf, NaN for NaN.
#[inline(always)]
pub fn log2<D: Doubles>(d: D, x: D::Vector) -> D::Vector {
    let (k, y) = ln_parts(d, x);
    let log = d.mul_add(y, d.splat(LOG2_E), k);
    let log = d.select(d.less(x, d.splat(f64::INFINITY)), log, x);
    d.select(d.less(x, d.splat(f64::MIN_POSITIVE)), d.splat(f64::NEG_INFINITY), log)
}

/// `(ln(1 + x), 1/(1 + x))` for x in [0, 1], accurate down to the smallest x.
#[inline(always)]
pub fn log1p<D: Doubles>(d: D, x: D::Vector) -> (D::Vector, D::Vector) {
    let one = d.splat(1.0);
    let w = d.add(one, x);
    let inverse = d.div(one, w);
    let (k, y) = ln_parts(d, w);
    let ln = d.mul_add(k, d.splat(LN_2_HI), d.mul_add(k, d.splat(LN_2_LO), y));
    // w rounds; the part of x that it lost, relative to w, is the derivative's correction.
    let lost = d.sub(x, d.sub(w, one));
    (d.mul_add(lost, inverse, ln), inverse)
}

/// `(tanh u, 1 - tanh² u)`, the second without cancellation: with `s = 1 - tanh |u|` it is
/// `s·(2 - s)`, and s has a formula of its own. 0 for it from |u| = 350 on.
#[inline(always)]
pub fn tanh<D: Doubles>(d: D, u: D::Vector) -> (D::Vector, D::Vector) {
    let zero = d.splat(0.0);
    let negative = d.less(u, zero);
    let size = d.select(negative, d.sub(zero, u), u);
    let bounded = d.min(d.splat(350.0), size);
    let e = expm1(d, d.add(bounded, bounded));
    let inverse = d.div(d.splat(1.0), d.add(e, d.splat(2.0)));
    let t = d.mul(e, inverse);
    let t = d.select(negative, d.sub(zero, t), t);
    // -0 stays -0.
    let t = d.select(d.equal(u, zero), u, t);
    let s = d.add(inverse, inverse);
    let slope = d.mul(s, d.sub(d.splat(2.0), s));
    (t, d.select(d.less(d.splat(349.9), size), zero, slope))
}
