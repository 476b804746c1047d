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
//! `x` is clamped to where `k` stays in `-127..=128`. Below `2^-126.5` the result is 0, on every
//! instruction set alike; there are no subnormal steps. NaN goes through. The clamp costs two
//! instructions of thirteen, so the kernels first try without it and only watch the bits of `m`,
//! which is cheaper (kernels/contiguous.rs).
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

/// An m for a k in `-127..=128` ([`Exp2::parts`]) has these bits, but for the lowest 8; any other
/// m, NaN among them, has not.
pub const WATCHED: f32 = 12_582_912.0;

/// The largest magnitude of an integer reference for which `MAGIC - c` is exact and the sum
/// `x·L + MAGIC - c` keeps an ulp of 1, with room to spare.
pub const NEAR: f64 = 2_097_152.0;

/// Coefficients of `f^1 … f^6` in `2^f` on [-1/2, 1/2]: minimax in relative error (Remez), the
/// constant held at 1, each coefficient in turn rounded to f32 and the rest fitted again.
/// Relative error of the polynomial 5.3e-9.
const POLY: [f32; 6] =
    [0.693_147_24, 0.240_226_55, 0.055_502_724, 0.009_617_063, 0.001_341_815_2, 0.000_158_215_89];

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
        if c.abs() <= NEAR { Reference::Near(c as f32) } else { Reference::Far(x) }
    }

    /// The reference at `log2`, an integer or what [`log2`](Self::log2) gave for another reference,
    /// or near it; 0 for what is not finite.
    #[inline(always)]
    pub fn from_log2(log2: f64) -> Self {
        if log2.abs() <= NEAR {
            Reference::Near(log2 as f32)
        } else if log2.is_finite() {
            let x = log2 / f64::from(L);
            Reference::Far(x.clamp(f64::from(f32::MIN), f64::from(f32::MAX)) as f32)
        } else {
            Reference::Near(0.0)
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
    if x.abs() < 2_251_799_813_685_248.0 { (x + SHIFT) - SHIFT } else { x }
}

/// The constants of `x -> 2^(L·x - c)` for one reference, in registers.
#[derive(Clone, Copy)]
pub struct Exp2<S: Simd, const FAR: bool> {
    s: S,
    origin: f32,
    far: S::Vector,
    low: S::Vector,
    high: S::Vector,
    slope: S::Vector,
    minus_magic: S::Vector,
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
            origin: if FAR { far } else { c / L },
            far: s.splat(far),
            low: s.splat((c - 127.0) / L),
            high: s.splat((c + 128.0) / L),
            slope: s.splat(L),
            minus_magic: s.splat(c - MAGIC),
        }
    }

    /// The core of [`parts`](Self::parts).
    #[inline(always)]
    fn unclamped(&self, x: S::Vector) -> (S::Vector, S::Vector) {
        let s = self.s;
        let m = s.mul_sub_exact(x, self.slope, self.minus_magic);
        let n = s.add(m, self.minus_magic);
        let f = s.mul_sub_exact(x, self.slope, n);
        let mut p = s.splat(POLY[5]);
        for c in [POLY[4], POLY[3], POLY[2], POLY[1], POLY[0]] {
            p = s.mul_add(p, f, s.splat(c));
        }
        // 1 + p·f; a second rounding here would cost the portable set its 1 ulp.
        (s.mul_sub_exact(p, f, s.splat(-1.0)), m)
    }

    /// `(p, m)` with `2^(L·x - c) = p·2^k`, p in [0.7, 1.42] and k in the low bits of m. Unless
    /// `CLAMP`, only for x whose k is in `-127..=128`: m tells, by [`WATCHED`].
    #[inline(always)]
    pub fn parts<const CLAMP: bool>(&self, x: S::Vector) -> (S::Vector, S::Vector) {
        let s = self.s;
        let x = if FAR { s.sub(x, self.far) } else { x };
        self.unclamped(if CLAMP { s.min(self.high, s.max(self.low, x)) } else { x })
    }

    /// A logit whose exponent is close to 0.
    #[inline(always)]
    pub fn origin(&self) -> f32 {
        self.origin
    }

    /// `2^k` for the m of [`parts`](Self::parts).
    #[inline(always)]
    pub fn scale(&self, m: S::Vector) -> S::Vector {
        self.s.exponent_from_low_bits(m)
    }

    /// `2^(L·x - c)`: relative error at most 1 ulp of f32 against `b^x·2^-c` (see above),
    /// for results from `2^-126` up; 0 below `2^-126.5`; inf above `2^127.5`.
    /// Without `CLAMP`, see [`parts`](Self::parts).
    #[inline(always)]
    pub fn value<const CLAMP: bool>(&self, x: S::Vector) -> S::Vector {
        let (p, m) = self.parts::<CLAMP>(x);
        self.s.mul(p, self.scale(m))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dispatch::Isa;
    use crate::math::scalar;
    use crate::simd::portable::Portable;
    use rayon::prelude::*;

    /// `2^(L·x - c)` of 64 values at once, per instruction set.
    macro_rules! stamp {
        ($name:ident, $token:expr $(, $feature:tt)*) => {
            $(#[target_feature(enable = $feature)])*
            unsafe fn $name(reference: Reference, x: &[f32; 64]) -> [f32; 64] {
                fn all<S: Simd>(s: S, reference: Reference, x: &[f32; 64]) -> [f32; 64] {
                    let mut out = [0.0; 64];
                    for at in (0..64).step_by(S::LANES) {
                        // SAFETY: within the arrays.
                        unsafe {
                            let x = s.load(x.as_ptr().add(at));
                            let e = match reference {
                                Reference::Near(_) => Exp2::<S, false>::new(s, reference).value::<true>(x),
                                Reference::Far(_) => Exp2::<S, true>::new(s, reference).value::<true>(x),
                            };
                            s.store(out.as_mut_ptr().add(at), e);
                        }
                    }
                    out
                }
                // SAFETY: this function's own features.
                #[allow(unused_unsafe, reason = "the portable token needs no proof")]
                all(unsafe { $token }, reference, x)
            }
        };
    }
    stamp!(portable, Portable);
    #[cfg(target_arch = "x86_64")]
    stamp!(avx2, crate::simd::avx2::Avx2::assume(), "avx2", "fma");
    #[cfg(target_arch = "x86_64")]
    stamp!(
        avx512,
        crate::simd::avx512::Avx512::assume(),
        "avx512f",
        "avx512bw",
        "avx512dq",
        "avx512vl"
    );

    type Values = unsafe fn(Reference, &[f32; 64]) -> [f32; 64];

    fn available() -> Vec<(Isa, Values)> {
        let all: [(Isa, Values); 3] = [
            (Isa::Portable, portable),
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx2, avx2),
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx512, avx512),
        ];
        all.into_iter()
            .filter(|(isa, _)| {
                if !isa.is_available() {
                    println!("skipped: this processor does not have {}", isa.name());
                }
                isa.is_available()
            })
            .collect()
    }

    /// What a result has to be.
    #[derive(Clone, Copy, PartialEq)]
    enum Class {
        Nan,
        Infinite,
        Zero,
        /// Zero or close to the smallest normal.
        Edge,
        One,
        /// Within 1 ulp.
        Close,
    }

    fn class(t: f64) -> Class {
        match t {
            t if t.is_nan() => Class::Nan,
            t if t >= 127.5 => Class::Infinite,
            t if t < -126.5 => Class::Zero,
            t if t < -126.0 => Class::Edge,
            t if t.abs() < 1e-9 => Class::One,
            _ => Class::Close,
        }
    }

    /// Checks 64 results of ascending or descending arguments on each set; raises `worst` to the
    /// largest error in ulps.
    fn check(reference: Reference, x: &[f32; 64], sets: &[[f32; 64]], worst: &mut [f64]) {
        let exponent = |x: f32| f64::from(x) * f64::from(L) - reference.log2();
        let (first, last) = (class(exponent(x[0])), class(exponent(x[63])));
        if first == last && first != Class::Close {
            let all = |right: fn(f32) -> bool| sets.iter().flatten().all(|&e| right(e));
            assert!(
                match first {
                    Class::Nan => all(f32::is_nan),
                    Class::Infinite => all(|e| e == f32::INFINITY),
                    Class::Zero => all(|e| e == 0.0),
                    Class::Edge => all(|e| (0.0..=2.0 * f32::MIN_POSITIVE).contains(&e)),
                    Class::One => all(|e| e == 1.0),
                    Class::Close => unreachable!(),
                },
                "{x:?}: {sets:?}"
            );
            return;
        }
        for (lane, &x) in x.iter().enumerate() {
            let t = exponent(x);
            if class(t) != Class::Close {
                // A block that straddles a border: the neighbours show that the border is right.
                assert!(sets.iter().all(|e| e[lane] >= 0.0 || e[lane].is_nan()), "2^{t}");
                continue;
            }
            let exact = scalar::exp2(t);
            let ulp = f64::from_bits((exact.to_bits() & (0x7FF << 52)) - (23 << 52));
            for (e, worst) in sets.iter().zip(worst.iter_mut()) {
                *worst = worst.max((f64::from(e[lane]) - exact).abs() / ulp);
            }
        }
    }

    /// All 2^32 arguments, on every instruction set, and the same bits on those with FMA.
    #[test]
    fn exhaustive() {
        let sets = available();
        let fused = sets.iter().position(|(isa, _)| *isa != Isa::Portable);
        let reference = Reference::Near(0.0);
        let worst = (0..1u32 << 16)
            .into_par_iter()
            .map(|high| {
                let mut worst = vec![0.0f64; sets.len()];
                for low in (0..1u32 << 16).step_by(64) {
                    let x: [f32; 64] =
                        std::array::from_fn(|i| f32::from_bits(high << 16 | low | i as u32));
                    let mut results = [[0.0; 64]; 3];
                    for ((_, values), e) in sets.iter().zip(&mut results) {
                        // SAFETY: available.
                        *e = unsafe { values(reference, &x) };
                    }
                    let results = &results[..sets.len()];
                    if let Some(fused) = fused {
                        let bits = |e: &[f32; 64]| e.map(f32::to_bits);
                        let first = bits(&results[fused]);
                        assert!(results[fused..].iter().all(|e| bits(e) == first), "{x:?}");
                    }
                    check(reference, &x, results, &mut worst);
                }
                worst
            })
            .reduce(
                || vec![0.0; sets.len()],
                |a, b| a.iter().zip(&b).map(|(a, b)| a.max(*b)).collect(),
            );
        for ((isa, _), worst) in sets.iter().zip(&worst) {
            println!("{isa:?}: at most {worst:.4} ulp");
            assert!(*worst <= 1.0);
        }
    }

    /// References far from 0 keep the accuracy.
    #[test]
    fn references() {
        for at in [-1.4e6f32, -1e4, -0.3, 7.0, 1e4, 1.45e6, 1e7, -3e30, 3e38] {
            let reference = Reference::at(at);
            let step = (at.abs() * f32::EPSILON).max(0.01);
            for (isa, values) in available() {
                let mut worst = [0.0];
                for k in 0..200 {
                    let x = std::array::from_fn(|i| at - step * (k * 64 + i) as f32);
                    // SAFETY: available.
                    let e = unsafe { values(reference, &x) };
                    check(reference, &x, &[e], &mut worst);
                }
                assert!(worst[0] <= 1.0, "{isa:?} at {at}: {} ulp", worst[0]);
            }
        }
    }
}
