//! exp2, log2 and ln(1 + x) of one f64, for code that is rare or outside of any kernel.
//!
//! They consist of IEEE additions, multiplications and divisions that are not contracted, so the bits
//! are the same on every machine. The platform's libm promises no such thing. The relative error of exp2
//! is below 4.5e-16, those of log2 and ln(1 + x) below 6e-16.

use std::f64::consts::{LN_2, LOG2_E};

/// 1/k! for k = 2, 3, …: the Taylor series of exp.
const INVERSE_FACTORIALS: [f64; 13] = [
    1.0 / 2.0,
    1.0 / 6.0,
    1.0 / 24.0,
    1.0 / 120.0,
    1.0 / 720.0,
    1.0 / 5_040.0,
    1.0 / 40_320.0,
    1.0 / 362_880.0,
    1.0 / 3_628_800.0,
    1.0 / 39_916_800.0,
    1.0 / 479_001_600.0,
    1.0 / 6_227_020_800.0,
    1.0 / 87_178_291_200.0,
];

/// Returns `c[0] + c[1]·x + c[2]·x² + c[3]·x³`, summed in pairs, since a row waits for the latency.
#[inline(always)]
fn cubic(c: [f64; 4], x: f64, x2: f64) -> f64 {
    (c[0] + c[1] * x) + (c[2] + c[3] * x) * x2
}

/// Returns `e^r - 1` for |r| ≤ 0.35. The remainder after 14 terms is below 4e-18·|r|.
#[inline(always)]
fn expm1_small(r: f64) -> f64 {
    const C: [f64; 13] = INVERSE_FACTORIALS;
    let r2 = r * r;
    let r4 = r2 * r2;
    let low = cubic([C[0], C[1], C[2], C[3]], r, r2);
    let middle = cubic([C[4], C[5], C[6], C[7]], r, r2);
    let high = cubic([C[8], C[9], C[10], C[11]], r, r2) + C[12] * r4;
    r + r2 * ((low + middle * r4) + high * (r4 * r4))
}

/// Returns `2^k` for an integer `k` in -1022..=1023.
#[inline(always)]
fn pow2(k: f64) -> f64 {
    // The low bits of k + 1.5·2^52 + 1023 are the biased exponent. The shift drops the others.
    f64::from_bits((k + (6_755_399_441_055_744.0 + 1023.0)).to_bits() << 52)
}

/// Returns `2^x`: 0 below -1021 (no subnormal results), inf above 1023, NaN for NaN.
#[inline(always)]
pub fn exp2(x: f64) -> f64 {
    if x < -1021.0 {
        return 0.0;
    }
    if x > 1023.0 {
        return f64::INFINITY;
    }
    let k = super::exp2::nearest(x);
    let half = super::exp2::nearest(k * 0.5);
    (1.0 + expm1_small((x - k) * LN_2)) * pow2(half) * pow2(k - half)
}

/// Returns `(k, ln(1 + t))` with `x = 2^k·(1 + t)` and `1 + t` in [√½, √2). `x` has to be positive,
/// finite and normal.
#[inline(always)]
fn ln_parts(x: f64) -> (f64, f64) {
    const SQRT_HALF: u64 = std::f64::consts::FRAC_1_SQRT_2.to_bits();
    // Subtracting the bits of √½ leaves k in the exponent field.
    let shifted = x.to_bits().wrapping_sub(SQRT_HALF);
    let k = (shifted as i64) >> 52;
    let t = f64::from_bits(x.to_bits().wrapping_sub((k as u64) << 52)) - 1.0;
    // ln(1 + t) = 2·atanh(u) with u = t/(2 + t), |u| < 0.1716. The form 2u = t - u·t keeps the leading
    // term exact, so the result is good to an ulp near 1 as well.
    let u = t / (2.0 + t);
    let z = u * u;
    let z2 = z * z;
    let z4 = z2 * z2;
    let low = cubic([2.0 / 3.0, 2.0 / 5.0, 2.0 / 7.0, 2.0 / 9.0], z, z2);
    let middle = cubic([2.0 / 11.0, 2.0 / 13.0, 2.0 / 15.0, 2.0 / 17.0], z, z2);
    let high = (2.0 / 19.0 + 2.0 / 21.0 * z) + 2.0 / 23.0 * z2;
    let q = (low + middle * z4) + high * (z4 * z4);
    (k as f64, t - u * (t - z * q))
}

/// Returns log2 x: -inf at 0 and for subnormal numbers, inf at inf, NaN for NaN and below 0.
#[inline(always)]
pub fn log2(x: f64) -> f64 {
    match edge(x) {
        Some(y) => y,
        None => {
            let (k, y) = ln_parts(x);
            k + y * LOG2_E
        }
    }
}

/// Returns `ln(1 + x)` for x in [0, 1].
#[inline(always)]
pub fn ln_1p(x: f64) -> f64 {
    let u = 1.0 + x;
    let (k, y) = ln_parts(u);
    // What the rounding of u lost, relative to u.
    let lost = (x - (u - 1.0)) / u;
    k * LN_2 + (y + lost)
}

/// Returns the logarithm if [`ln_parts`] does not apply to x. Subnormal numbers count as 0.
#[inline(always)]
fn edge(x: f64) -> Option<f64> {
    if (f64::MIN_POSITIVE..f64::INFINITY).contains(&x) {
        None
    } else if x.abs() < f64::MIN_POSITIVE {
        Some(f64::NEG_INFINITY)
    } else if x == f64::INFINITY {
        Some(x)
    } else {
        Some(f64::NAN)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::math::double_double::Dd;
    use std::f64::consts::{FRAC_1_SQRT_2, SQRT_2};

    /// The largest relative distance from the standard library over a geometric sequence of arguments, with
    /// both signs if `signed`.
    fn worst(f: fn(f64) -> f64, g: fn(f64) -> f64, lo: f64, hi: f64, signed: bool) -> f64 {
        let mut worst = 0.0f64;
        let mut x = lo;
        while x < hi {
            for x in [x, -x].into_iter().take(1 + usize::from(signed)) {
                let (a, b) = (f(x), g(x));
                worst = worst.max((a - b).abs() / b.abs().max(f64::MIN_POSITIVE));
            }
            x *= 1.000_37;
        }
        worst
    }

    #[test]
    fn agree_with_the_standard_library() {
        assert!(worst(exp2, f64::exp2, 1e-20, 1020.0, true) < 4.5e-16);
        assert!(worst(log2, f64::log2, 1e-300, 1e300, false) < 6.0e-16);
        assert!(worst(ln_1p, f64::ln_1p, 1e-300, 1.0, false) < 6.0e-16);
    }

    /// Checks the logarithm at both ends of its range, where the last terms of the series are largest.
    /// Roundings of some 1e-16 go both ways and cancel in the mean of many. The remaining mean error, 4e-19,
    /// is mostly that of the coefficients. The last term is 5e-19 there.
    #[test]
    fn every_term_of_the_logarithm_counts() {
        const SAMPLES: u32 = 1 << 14;
        let (mut sum, mut worst) = (0.0, 0.0f64);
        for (lo, hi) in [(FRAC_1_SQRT_2, 0.71), (1.41, SQRT_2)] {
            for i in 0..SAMPLES {
                let x = lo + (hi - lo) * f64::from(i) / f64::from(SAMPLES);
                let exact = Dd::log2(x) * Dd::LN_2;
                let (k, y) = ln_parts(x);
                assert_eq!(k, 0.0, "{x}");
                let error = ((y - exact.hi) - exact.lo) / exact.hi;
                sum += error;
                worst = worst.max(error.abs());
            }
        }
        let mean = sum / f64::from(2 * SAMPLES);
        assert!(worst < 1.6e-16 && mean.abs() < 8e-19, "at worst {worst:e}, {mean:e} on average");
    }

    #[test]
    fn edges() {
        assert_eq!(exp2(f64::NEG_INFINITY), 0.0);
        assert_eq!(exp2(f64::INFINITY), f64::INFINITY);
        assert!(exp2(f64::NAN).is_nan());
        assert_eq!(exp2(10.0), 1024.0);
        assert_eq!(exp2(1023.0), 2f64.powi(1023));
        assert_eq!(exp2(-1021.0), 2f64.powi(-1021));
        assert_eq!(log2(0.0), f64::NEG_INFINITY);
        assert_eq!(log2(f64::INFINITY), f64::INFINITY);
        assert!(log2(-1.0).is_nan() && log2(f64::NAN).is_nan());
        assert_eq!(log2(1024.0), 10.0);
        assert_eq!((ln_1p(0.0), ln_1p(1.0)), (0.0, LN_2));
    }
}
