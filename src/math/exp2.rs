//! `2^(L·x - c)`, vectorised, within 1 ulp.
//!
//! The kernels work in base 2. With `L = f32(log2 e)` and an integer reference `c`:
//!
//! ```text
//! m = fma(x, L, M - c)    M = 1.5·2^23 + 127: m is rounded to an integer, and its low bits are
//!                         k + 127, with k the integer nearest to L·x - c
//! n = m - (M - c)         = k + c, exact
//! f = fma(x, L, -n)       in [-1/2, 1/2]; one rounding, of a small number
//! s = bits(m) << 23       = 2^k; 0 for k = -127, inf for k = 128
//! p ≈ 2^f                 polynomial of degree 6
//! e = p·s
//! ```
//!
//! Because the fused product is exact and `n` is an integer, a common offset of the logits,
//! however large, costs no accuracy: `f` carries the only error of the argument, half an ulp of
//! a number below 1/2. (Subtracting a reference that is not an integer would round the whole
//! exponent instead, and cost `|log2 e^x|·2^-24`.) And because multiplication by `s` is exact,
//! it can be fused into the sum.
//!
//! `x` is first clamped to where `k` stays in `-127..=128`. Below `2^-126.5` the result is 0, on
//! every instruction set alike; there are no subnormal steps. NaN goes through.
//!
//! `L` is not `log2 e`: what is computed is `b^x` with `b = 2^L = e^(1 - 1.335e-8)`. The kernels
//! stay consistent in that base (`log_b Σ b^x`, see row.rs), which moves a log-sum-exp by
//! at most 1.335e-8 times the entropy of the row, and a probability by at most
//! `1.335e-8·|ln p|`, well within the bounds promised.

use crate::simd::Simd;

/// log2(e), rounded to f32: the factor between a logit and its exponent of 2.
pub const L: f32 = std::f32::consts::LOG2_E;

/// 1.5·2^23, whose ulp is 1, plus the exponent bias.
const MAGIC: f32 = 12_582_912.0 + 127.0;

/// The largest magnitude of an integer reference for which `MAGIC - c` is exact and the sum
/// `x·L + MAGIC - c` keeps an ulp of 1, with room to spare.
pub const NEAR: f64 = 2_097_152.0;

/// Coefficients of `f^1 … f^6` in `2^f` on [-1/2, 1/2]: minimax in relative error (Remez), the
/// constant held at 1, each coefficient in turn rounded to f32 and the rest fitted again.
/// Relative error of the polynomial 5.3e-9.
const POLY: [f32; 6] = [
    0.693_147_24,
    0.240_226_55,
    0.055_502_724,
    0.009_617_063,
    0.001_341_815_2,
    0.000_158_215_89,
];

/// Where exponents are counted from.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Reference {
    /// An integer in units of log2, at most [`NEAR`] in magnitude.
    Near(f32),
    /// A logit, subtracted before anything else: for rows so far from 0 that an integer in
    /// units of log2 does not fit. The difference is exact wherever the result is not 0.
    Far(f32),
}

impl Reference {
    /// The reference nearest to the logit `x`, which is finite.
    #[inline(always)]
    pub fn at(x: f32) -> Self {
        let c = nearest(f64::from(x) * f64::from(L));
        if c.abs() <= NEAR {
            Reference::Near(c as f32)
        } else {
            Reference::Far(x)
        }
    }

    /// The reference in units of log2, exactly.
    #[inline(always)]
    pub fn log2(self) -> f64 {
        match self {
            Reference::Near(c) => f64::from(c),
            Reference::Far(x) => f64::from(x) * f64::from(L),
        }
    }
}

/// `x` rounded to the nearest integer, if |x| < 2^51.
#[inline(always)]
pub fn nearest(x: f64) -> f64 {
    const SHIFT: f64 = 6_755_399_441_055_744.0; // 1.5·2^52
    if x.abs() < 2_251_799_813_685_248.0 {
        (x + SHIFT) - SHIFT
    } else {
        x
    }
}

/// The constants of `x -> 2^(L·x - c)` for one reference, in registers.
#[derive(Clone, Copy)]
pub struct Exp2<S: Simd, const FAR: bool> {
    s: S,
    far: S::Vector,
    low: S::Vector,
    high: S::Vector,
    slope: S::Vector,
    magic: S::Vector,
}

impl<S: Simd, const FAR: bool> Exp2<S, FAR> {
    /// For `Reference::Far` if and only if `FAR`.
    #[inline(always)]
    pub fn new(s: S, reference: Reference) -> Self {
        let (c, far) = match reference {
            Reference::Near(c) => (c, 0.0),
            Reference::Far(x) => (0.0, x),
        };
        Exp2 {
            s,
            far: s.splat(far),
            low: s.splat((c - 127.0) / L),
            high: s.splat((c + 128.0) / L),
            slope: s.splat(L),
            magic: s.splat(MAGIC - c),
        }
    }

    /// `(p, 2^k)` with `2^(L·x - c) = p·2^k`, p in [0.7, 1.42].
    #[inline(always)]
    pub fn parts(&self, x: S::Vector) -> (S::Vector, S::Vector) {
        let s = self.s;
        let x = if FAR { s.sub(x, self.far) } else { x };
        let x = s.min(self.high, s.max(self.low, x));
        let m = s.mul_add(x, self.slope, self.magic);
        let n = s.sub(m, self.magic);
        let f = s.mul_sub_exact(x, self.slope, n);
        let mut p = s.splat(POLY[5]);
        for c in [POLY[4], POLY[3], POLY[2], POLY[1], POLY[0], 1.0] {
            p = s.mul_add(p, f, s.splat(c));
        }
        (p, s.exponent_from_low_bits(m))
    }

    /// `2^(L·x - c)`: relative error at most 1 ulp of f32 against `b^x·2^-c` (see above),
    /// for results from `2^-126` up; 0 below `2^-126.5`; inf above `2^127.5`.
    #[inline(always)]
    pub fn value(&self, x: S::Vector) -> S::Vector {
        let (p, scale) = self.parts(x);
        self.s.mul(p, scale)
    }
}
