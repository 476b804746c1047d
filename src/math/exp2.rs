//! `2^(L·x - c)`, vectorised, within 1 ulp.
//!
//! The kernels work in base 2. With `L = log2 e`, rounded to the type of the lanes, and an integer
//! reference `c` (for lanes of f32; those of f64 differ in the constants alone):
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
//! Rows so far from 0 that an integer `c` does not fit beside their exponents are counted from one
//! of their logits instead, which is subtracted first: exactly, wherever the result is not 0.
//!
//! `x` is clamped to where `k` stays in `-127..=128`. Below `2^-126.5` the result is 0, on every
//! instruction set alike; there are no subnormal steps. NaN goes through. The clamp costs two
//! instructions of thirteen, so the kernels first try without it and only watch the bits of `m`,
//! which is cheaper (kernels/contiguous.rs).
//!
//! In f32, `L` is not `log2 e`: what is computed is `b^x` with `b = 2^L = e^(1 - 1.335e-8)`. The kernels
//! stay consistent in that base (`log_b Σ b^x`, see octet.rs), which moves a log-sum-exp by
//! at most 1.335e-8 times the entropy of the row, and a probability by at most
//! `1.335e-8·|ln p|`, well within the bounds promised. Where the result is a softmax, and nothing
//! rounds it further, [`Exp2::natural`] takes what `L` lacks into `f`.

use crate::simd::{Real, Simd};

/// A type of lanes, with what `2^(L·x - c)` needs to know about it.
pub trait Base: Real {
    /// log2(e): the factor between a logit and its exponent of 2.
    const L: Self;
    /// Its ulp is 1, and its low bits are the exponent's bias.
    const MAGIC: Self;
    /// An m for an exponent in range ([`Exp2::parts`]) has these bits, but for as many of the
    /// lowest as an exponent has; any other m, NaN among them, has not.
    const WATCHED: Self;
    /// `1/L`, in two parts.
    const INVERSE: (f64, f64);
    /// `log2 e / L`: what natural logarithms are multiplied by to be in the base of the sums.
    const RATIO: f64;
    /// `RATIO - 1`
    const EXCESS: f64;
    /// k from `-BIAS` (0) to `BIAS + 1` (infinity).
    const BIAS: Self;
    /// The largest magnitude of an integer reference for which `MAGIC - c` is exact and the sum
    /// `x·L + MAGIC - c` keeps an ulp of 1, with room to spare.
    const NEAR: f64;
    /// Coefficients of `f^1, f^2, …` in `2^f` on [-1/2, 1/2].
    const POLY: &'static [Self];
}

impl Base for f32 {
    const L: f32 = std::f32::consts::LOG2_E;
    const MAGIC: f32 = 12_582_912.0 + 127.0; // 1.5·2^23
    const WATCHED: f32 = 12_582_912.0;
    const INVERSE: (f64, f64) = (0.693_147_189_813_292_7, -3.709_646_822_944_172e-17);
    const RATIO: f64 = 1.000_000_013_349_758_4;
    const EXCESS: f64 = 1.334_975_834_983_818_4e-8;
    const BIAS: f32 = 127.0;
    const NEAR: f64 = 2_097_152.0;
    // Minimax in relative error (Remez), the constant held at 1, each coefficient in turn rounded
    // to f32 and the rest fitted again. Relative error of the polynomial 5.3e-9.
    const POLY: &'static [f32] = &[
        0.693_147_24,
        0.240_226_55,
        0.055_502_724,
        0.009_617_063,
        0.001_341_815_2,
        0.000_158_215_89,
    ];
}

impl Base for f64 {
    const L: f64 = std::f64::consts::LOG2_E;
    const MAGIC: f64 = 6_755_399_441_055_744.0 + 1023.0; // 1.5·2^52
    const WATCHED: f64 = 6_755_399_441_055_744.0;
    const INVERSE: (f64, f64) = (std::f64::consts::LN_2, 3.297_022_075_642_333e-17);
    const RATIO: f64 = 1.0;
    const EXCESS: f64 = 1.410_920_060_305_223_7e-17;
    const BIAS: f64 = 1023.0;
    const NEAR: f64 = 562_949_953_421_312.0;
    // `(2^f - 1)/f` interpolated at 11 Chebyshev nodes, in 60 digits. Relative error of the
    // polynomial, with its coefficients rounded, 2.0e-17.
    const POLY: &'static [f64] = &[
        std::f64::consts::LN_2,
        0.240_226_506_959_100_97,
        0.055_504_108_664_821_6,
        0.009_618_129_107_606_888,
        0.001_333_355_814_641_693_6,
        0.000_154_035_304_417_360_5,
        1.525_273_382_983_612e-5,
        1.321_544_258_792_169e-6,
        1.017_806_244_584_577_4e-7,
        7.072_585_949_269_223e-9,
        4.454_960_598_186_508_6e-10,
    ];
}

/// Where exponents are counted from: `2^(L·(x - far) - near)`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Reference {
    /// A logit, for rows whose exponents are out of reach of an integer; else 0.
    pub far: f64,
    /// An integer, 0 if `far` is not.
    pub near: f64,
}

impl Reference {
    /// Exponents are counted from 0.
    pub const ZERO: Reference = Reference { far: 0.0, near: 0.0 };

    /// The reference nearest to the logit `x`, which is finite.
    #[inline(always)]
    pub fn at<R: Base>(x: R) -> Self {
        let x = x.to_f64();
        let c = nearest(x * R::L.to_f64());
        if c.abs() <= R::NEAR {
            Reference { far: 0.0, near: c }
        } else {
            Reference { far: x, near: 0.0 }
        }
    }

    /// Whether a logit has to be subtracted.
    #[inline(always)]
    pub fn is_far(self) -> bool {
        self.far != 0.0
    }

    /// How far it is above another, in units of log2.
    #[inline(always)]
    pub fn above(self, other: Reference, l: f64) -> f64 {
        (self.near - other.near) + (self.far - other.far) * l
    }
}

/// `x` rounded to the nearest integer, if |x| < 2^51.
#[inline(always)]
pub fn nearest(x: f64) -> f64 {
    const SHIFT: f64 = 6_755_399_441_055_744.0; // 1.5·2^52
    if x.abs() < 2_251_799_813_685_248.0 { (x + SHIFT) - SHIFT } else { x }
}

/// The constants of `x -> 2^(L·(x - far) - near)`, in registers.
#[derive(Clone, Copy)]
pub struct Exp2<S: Simd, const FAR: bool> {
    s: S,
    origin: S::Real,
    far: S::Vector,
    low: S::Vector,
    high: S::Vector,
    slope: S::Vector,
    minus_magic: S::Vector,
}

impl<S: Simd<Real: Base>, const FAR: bool> Exp2<S, FAR> {
    /// For one reference. Unless `FAR`, one that is not.
    #[inline(always)]
    pub fn new(s: S, reference: Reference) -> Self {
        let (l, bias) = (S::Real::L.to_f64(), S::Real::BIAS.to_f64());
        let near = reference.near;
        let splat = |x: f64| s.splat(S::Real::from_f64(x));
        Exp2 {
            s,
            origin: S::Real::from_f64(if FAR { reference.far } else { near / l }),
            far: splat(reference.far),
            low: splat((near - bias) / l),
            high: splat((near + (bias + 1.0)) / l),
            slope: s.splat(S::Real::L),
            minus_magic: splat(near - S::Real::MAGIC.to_f64()),
        }
    }

    /// For a reference a lane.
    #[inline(always)]
    pub fn lanes(s: S, far: S::Vector, near: S::Vector) -> Self {
        let (l, bias) = (S::Real::L.to_f64(), S::Real::BIAS.to_f64());
        let splat = |x: f64| s.splat(S::Real::from_f64(x));
        let inverse = splat(1.0 / l);
        Exp2 {
            s,
            origin: S::Real::ZERO,
            far,
            low: s.mul(s.sub(near, splat(bias)), inverse),
            high: s.mul(s.add(near, splat(bias + 1.0)), inverse),
            slope: s.splat(S::Real::L),
            minus_magic: s.sub(near, s.splat(S::Real::MAGIC)),
        }
    }

    /// `(f, m)`: |f| ≤ 1/2, and k in the low bits of m.
    #[inline(always)]
    fn reduce(&self, x: S::Vector) -> (S::Vector, S::Vector) {
        let s = self.s;
        let m = s.mul_sub_exact(x, self.slope, self.minus_magic);
        let n = s.add(m, self.minus_magic);
        (s.mul_sub_exact(x, self.slope, n), m)
    }

    /// `(q, f, m)`: `2^f = 1 + q·f`, and as [`reduce`](Self::reduce).
    #[inline(always)]
    fn unclamped(&self, x: S::Vector) -> (S::Vector, S::Vector, S::Vector) {
        let (f, m) = self.reduce(x);
        (self.polynomial(f), f, m)
    }

    /// `(2^f - 1)/f`
    #[inline(always)]
    fn polynomial(&self, f: S::Vector) -> S::Vector {
        let s = self.s;
        let (last, others) = S::Real::POLY.split_last().expect("a polynomial");
        let mut q = s.splat(*last);
        for &c in others.iter().rev() {
            q = s.mul_add(q, f, s.splat(c));
        }
        q
    }

    #[inline(always)]
    fn clamp(&self, x: S::Vector) -> S::Vector {
        let s = self.s;
        s.min(self.high, s.max(self.low, x))
    }

    /// `(p, m)` with `2^(L·x - c) = p·2^k`, p in [0.7, 1.42] and k in the low bits of m. Unless
    /// `CLAMP`, only for x whose k is in range: m tells, by [`Base::WATCHED`].
    #[inline(always)]
    pub fn parts<const CLAMP: bool>(&self, x: S::Vector) -> (S::Vector, S::Vector) {
        let s = self.s;
        let x = if FAR { s.sub(x, self.far) } else { x };
        let (q, f, m) = self.unclamped(if CLAMP { self.clamp(x) } else { x });
        // A second rounding here would cost the portable set its 1 ulp.
        (s.mul_sub_exact(q, f, s.splat(S::Real::from_f64(-1.0))), m)
    }

    /// [`parts`](Self::parts) of an x that is in range or below it, or NaN, for a reference whose far
    /// is 0; where `not`, of one whose exponential is 0, whatever x is.
    #[inline(always)]
    pub fn parts_below(&self, x: S::Vector, not: S::Mask) -> (S::Vector, S::Vector) {
        let s = self.s;
        let (q, f, m) = self.unclamped(s.select(not, self.low, s.max(self.low, x)));
        (s.mul_sub_exact(q, f, s.splat(S::Real::from_f64(-1.0))), m)
    }

    /// A logit whose exponent is close to 0. Not for a reference a lane.
    #[inline(always)]
    pub fn origin(&self) -> S::Real {
        self.origin
    }

    /// `L·(x - far) - near`, x clamped: the exponent of [`value`](Self::value).
    #[inline(always)]
    pub fn exponent(&self, x: S::Vector) -> S::Vector {
        let s = self.s;
        let near = s.add(self.minus_magic, s.splat(S::Real::MAGIC));
        let x = if FAR { s.sub(x, self.far) } else { x };
        s.mul_sub_exact(self.clamp(x), self.slope, near)
    }

    /// `2^k` for the m of [`parts`](Self::parts).
    #[inline(always)]
    pub fn scale(&self, m: S::Vector) -> S::Vector {
        self.s.exponent_from_low_bits(m)
    }

    /// `2^(L·x - c)`: relative error at most 1 ulp against `b^x·2^-c` (see above), for results
    /// from the smallest normal up; 0 below half of it (`2^-126.5` in f32); inf above `2^127.5`
    /// (f32). Without `CLAMP`, see [`parts`](Self::parts).
    #[inline(always)]
    pub fn value<const CLAMP: bool>(&self, x: S::Vector) -> S::Vector {
        let (p, m) = self.parts::<CLAMP>(x);
        self.s.mul(p, self.scale(m))
    }

    /// `2^(log2 e·(x - far) - near)`, clamped, within 1 ulp as [`value`](Self::value) is: of e where
    /// that is of b, for one fused product more.
    #[inline(always)]
    pub fn natural(&self, x: S::Vector) -> S::Vector {
        let s = self.s;
        let x = self.clamp(if FAR { s.sub(x, self.far) } else { x });
        let (f, m) = self.reduce(x);
        let lacking = S::Real::L.to_f64() * S::Real::EXCESS;
        let f = s.mul_add(x, s.splat(S::Real::from_f64(lacking)), f);
        let p = s.mul_sub_exact(self.polynomial(f), f, s.splat(S::Real::from_f64(-1.0)));
        s.mul(p, self.scale(m))
    }

    /// `2^(L·x) - 1`, to a few ulp near 0 as well; for a reference of 0 and x up to 709.
    #[inline(always)]
    pub fn minus_one(&self, x: S::Vector) -> S::Vector {
        let s = self.s;
        let (q, f, m) = self.unclamped(self.clamp(x));
        let scale = self.scale(m);
        // `2^k - 1` is exact, or far larger than what it loses.
        s.mul_add(s.mul(q, f), scale, s.sub(scale, s.splat(S::Real::from_f64(1.0))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dispatch::Isa;
    use crate::math::double_double::Dd;
    use crate::math::scalar;
    use crate::sample::blocks;
    use crate::simd::portable::{Portable, PortableWide};
    use rayon::prelude::*;

    /// What is computed.
    #[derive(Clone, Copy, Debug, PartialEq)]
    pub enum What {
        /// [`Exp2::value`] for one reference.
        Value,
        /// The same for a reference a lane, all of them this.
        Lanes,
        /// [`Exp2::natural`]
        Natural,
        /// [`Exp2::minus_one`]
        MinusOne,
        /// [`Exp2::exponent`]
        Exponent,
    }

    /// Results of 64 values at once, per instruction set.
    macro_rules! stamp {
        ($name:ident, $real:ty, $token:ty $(, $feature:tt)*) => {
            $(#[target_feature(enable = $feature)])*
            pub unsafe fn $name(what: What, reference: Reference, x: &[$real; 64]) -> [$real; 64] {
                // SAFETY: this function's own features.
                all(unsafe { <$token>::assume() }, what, reference, x)
            }
        };
    }
    stamp!(portable, f32, Portable);
    stamp!(portable_wide, f64, PortableWide);
    #[cfg(target_arch = "x86_64")]
    mod x86 {
        use super::*;
        use crate::simd::avx2::{Avx2, Avx2Wide};
        use crate::simd::avx512::{Avx512, Avx512Wide};

        stamp!(avx2, f32, Avx2, "avx2", "fma");
        stamp!(avx2_wide, f64, Avx2Wide, "avx2", "fma");
        stamp!(avx512, f32, Avx512, "avx512f", "avx512bw", "avx512dq", "avx512vl");
        stamp!(avx512_wide, f64, Avx512Wide, "avx512f", "avx512bw", "avx512dq", "avx512vl");
    }

    #[inline(always)]
    fn all<S: Simd<Real: Base>>(
        s: S,
        what: What,
        reference: Reference,
        x: &[S::Real; 64],
    ) -> [S::Real; 64] {
        #[inline(always)]
        fn some<S: Simd<Real: Base>, const FAR: bool>(
            s: S,
            what: What,
            reference: Reference,
            x: &[S::Real; 64],
        ) -> [S::Real; 64] {
            let mut out = [S::Real::ZERO; 64];
            let splat = |x: f64| s.splat(S::Real::from_f64(x));
            let exp2 = match what {
                What::Lanes => {
                    Exp2::<S, FAR>::lanes(s, splat(reference.far), splat(reference.near))
                }
                _ => Exp2::<S, FAR>::new(s, reference),
            };
            for at in (0..64).step_by(S::LANES) {
                // SAFETY: within the arrays.
                unsafe {
                    let x = s.load(x.as_ptr().add(at));
                    let e = match what {
                        What::Value | What::Lanes => exp2.value::<true>(x),
                        What::Natural => exp2.natural(x),
                        What::MinusOne => exp2.minus_one(x),
                        What::Exponent => exp2.exponent(x),
                    };
                    s.store(out.as_mut_ptr().add(at), e);
                }
            }
            out
        }
        if reference.is_far() {
            some::<S, true>(s, what, reference, x)
        } else {
            some::<S, false>(s, what, reference, x)
        }
    }

    type Values<R> = unsafe fn(What, Reference, &[R; 64]) -> [R; 64];

    fn only_available<R, const N: usize>(all: [(Isa, Values<R>); N]) -> Vec<(Isa, Values<R>)> {
        all.into_iter()
            .filter(|(isa, _)| {
                if !isa.is_available() {
                    println!("SKIPPED: this processor does not have {}", isa.name());
                }
                isa.is_available()
            })
            .collect()
    }

    fn available() -> Vec<(Isa, Values<f32>)> {
        only_available([
            (Isa::Portable, portable as Values<f32>),
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx2, x86::avx2),
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx512, x86::avx512),
        ])
    }

    fn available_wide() -> Vec<(Isa, Values<f64>)> {
        only_available([
            (Isa::Portable, portable_wide as Values<f64>),
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx2, x86::avx2_wide),
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx512, x86::avx512_wide),
        ])
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
        let l = f64::from(f32::L);
        let exponent = |x: f32| (f64::from(x) - reference.far) * l - reference.near;
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
        // The bits of further sets that fuse are those of the first.
        let judged = fused.map_or(sets.len(), |first| first + 1);
        let reference = Reference::ZERO;
        let worst = (0..1u32 << 16)
            .into_par_iter()
            .map(|high| {
                let mut worst = vec![0.0f64; judged];
                for low in blocks(0..1 << 16, 64, high) {
                    let x: [f32; 64] =
                        std::array::from_fn(|i| f32::from_bits(high << 16 | low | i as u32));
                    let mut results = [[0.0; 64]; 3];
                    for ((_, values), e) in sets.iter().zip(&mut results) {
                        // SAFETY: available.
                        *e = unsafe { values(What::Value, reference, &x) };
                    }
                    let results = &results[..sets.len()];
                    if let Some(fused) = fused {
                        let bits = |e: &[f32; 64]| e.map(f32::to_bits);
                        let first = bits(&results[fused]);
                        assert!(results[fused..].iter().all(|e| bits(e) == first), "{x:?}");
                    }
                    check(reference, &x, &results[..judged], &mut worst);
                }
                worst
            })
            .reduce(
                || vec![0.0; judged],
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
            let reference = Reference::at::<f32>(at);
            let step = (at.abs() * f32::EPSILON).max(0.01);
            for (isa, values) in available() {
                let mut worst = [0.0];
                for k in 0..200 {
                    let x = std::array::from_fn(|i| at - step * (k * 64 + i) as f32);
                    // SAFETY: available.
                    let e = unsafe { values(What::Value, reference, &x) };
                    check(reference, &x, &[e], &mut worst);
                }
                assert!(worst[0] <= 1.0, "{isa:?} at {at}: {} ulp", worst[0]);
            }
        }
    }

    /// 1 ulp of powers of e itself, as far down as they are normal numbers, and the same bits on the
    /// sets that fuse.
    #[test]
    fn natural() {
        for at in [-1.4e6f32, -1e4, -0.3, 0.0, 7.0, 1e4, 1.45e6, 1e7, -3e30] {
            let reference = Reference::at::<f32>(at);
            let step = (at.abs() * f32::EPSILON).max(1e-3);
            let (mut worst, mut fused) = (0f64, None);
            for (isa, values) in available() {
                let mut all = Vec::new();
                for k in 0..2000 {
                    let x: [f32; 64] = std::array::from_fn(|i| at - step * (k * 64 + i) as f32);
                    // SAFETY: available.
                    let e = unsafe { values(What::Natural, reference, &x) };
                    for (x, e) in x.into_iter().zip(e) {
                        let log2_e = Dd { hi: f64::L, lo: f64::L * f64::EXCESS };
                        let t = log2_e * Dd::from(f64::from(x) - reference.far)
                            - Dd::from(reference.near);
                        if t.hi < -125.0 {
                            assert!(f64::from(e) <= 2f64.powi(-124), "{x} from {at}: {e}");
                            continue;
                        }
                        let exact = scalar::exp2(t.hi);
                        let ulp = f64::from_bits((exact.to_bits() & (0x7FF << 52)) - (23 << 52));
                        worst = worst.max((f64::from(e) - exact).abs() / ulp);
                    }
                    all.push(e.map(f32::to_bits));
                }
                assert!(worst <= 1.0, "{isa:?} at {at}: {worst} ulp");
                if isa != Isa::Portable {
                    let first = &*fused.get_or_insert_with(|| all.clone());
                    assert!(*first == all, "{isa:?} at {at}");
                }
            }
        }
    }

    /// References of f64, near and far, up to the ends of each; each with a distance between two
    /// logits beside it that f64 can tell apart.
    fn references_of_doubles() -> Vec<(f64, Reference)> {
        let near = f64::NEAR / f64::L;
        [0.0, 0.3, -1e3, 7e5, -1e10, near, -near, near * 1.01, -4e15, 1e16, -3e200, 1e308]
            .into_iter()
            .map(|at: f64| (at, Reference::at::<f64>(at)))
            .collect()
    }

    /// Logits with exponents from below the least to above the largest, densely and evenly, at
    /// the borders, and a few far away.
    fn logits_around(at: f64, reference: Reference) -> Vec<[f64; 64]> {
        let ulp = f64::from_bits(at.abs().to_bits() + 1) - at.abs();
        let mut x = Vec::new();
        let center = if reference.is_far() { reference.far } else { reference.near / f64::L };
        for i in -24_000..24_000 {
            x.push(center + f64::from(i) * (1100.0 / 24_000.0 / f64::L));
        }
        for border in [-1022.5, -1022.0, -0.5, 0.0, 0.5, 1023.0, 1023.5] {
            for i in -200..200 {
                x.push(center + border / f64::L + f64::from(i) * ulp.max(1e-16 * f64::from(i * i)));
            }
        }
        for i in 0..1000 {
            let tiny = (f64::from(i) * -0.7).exp2();
            x.extend([center + tiny, center - tiny]);
        }
        x.extend([1e3, 1e17, 1e300].into_iter().flat_map(|d| [at + d, at - d]));
        x.extend([f64::MAX, f64::MIN, f64::INFINITY, f64::NEG_INFINITY, f64::NAN, -0.0]);
        x.resize(x.len().next_multiple_of(64), at);
        x.chunks(64).map(|x| x.try_into().unwrap()).collect()
    }

    /// `L·(x - far) - near` with the digits of double-double, None if it overflows or is NaN.
    fn exact_exponent(x: f64, reference: Reference) -> Option<Dd> {
        let d = Dd::sum(x, -reference.far);
        if !d.hi.is_finite() || d.hi.abs() > 1e290 {
            return None;
        }
        let t = Dd::product(d.hi, f64::L) - Dd::from(reference.near);
        Some(t + Dd::product(d.lo, f64::L))
    }

    /// 1 ulp against double-double, and the ends; the same bits on the sets that fuse.
    #[test]
    fn doubles() {
        let sets = available_wide();
        let mut worst = vec![0f64; sets.len()];
        for (at, reference) in references_of_doubles() {
            for x in logits_around(at, reference) {
                let mut fused = None;
                for ((isa, values), worst) in sets.iter().zip(&mut worst) {
                    // SAFETY: available.
                    let got = unsafe { values(What::Value, reference, &x) };
                    for (&x, e) in x.iter().zip(got) {
                        let what = || format!("{x:e} from {reference:?} on {}: {e:e}", isa.name());
                        let Some(t) = exact_exponent(x, reference) else {
                            let up = x - reference.far;
                            let good = match up {
                                _ if up.is_nan() => e.is_nan(),
                                _ if up > 0.0 => e == f64::INFINITY,
                                _ => e == 0.0,
                            };
                            assert!(good, "{}", what());
                            continue;
                        };
                        // On the border itself either side is right.
                        let border = |at: f64| (t.hi - at).abs() < 1e-9;
                        match t.hi {
                            _ if border(1023.5) => assert!(e > 1e308, "{}", what()),
                            t if t > 1023.5 => assert_eq!(e, f64::INFINITY, "{}", what()),
                            t if t < -1022.0 => {
                                let zero = t < -1022.5 && !border(-1022.5);
                                let low = (0.0..=2.0 * f64::MIN_POSITIVE).contains(&e);
                                assert!(low, "{}", what());
                                assert!(e == 0.0 || !zero, "{}", what());
                            }
                            _ => {
                                let (m, k) = t.exp2();
                                // Where 2^k would be subnormal, both sides get a few more.
                                let (up, ulp) = ((-k).min(1000), f64::EPSILON);
                                let e = e * 2f64.powi(up) * 2f64.powi(-k - up);
                                let ulp = if m.hi < 1.0 { ulp / 2.0 } else { ulp };
                                let off = ((e - m.hi) - m.lo).abs() / ulp;
                                *worst = worst.max(off);
                                assert!(off <= 1.0, "{}: {off} ulp", what());
                            }
                        }
                    }
                    if *isa != Isa::Portable {
                        let bits = got.map(f64::to_bits);
                        assert!(*fused.get_or_insert(bits) == bits, "{x:?} on {}", isa.name());
                    }
                }
            }
        }
        for ((isa, _), worst) in sets.iter().zip(worst) {
            println!("{isa:?}: at most {worst:.4} ulp");
        }
    }

    /// The exponent is rounded once, or where there is no fused step of f64 twice.
    #[test]
    fn exponents_of_doubles() {
        for (at, reference) in references_of_doubles() {
            for x in logits_around(at, reference) {
                for (isa, values) in available_wide() {
                    // SAFETY: available.
                    let got = unsafe { values(What::Exponent, reference, &x) };
                    for (&x, got) in x.iter().zip(got) {
                        match exact_exponent(x, reference) {
                            Some(t) if t.hi.abs() < 1000.0 => {
                                let off = ((got - t.hi) - t.lo).abs();
                                let what = isa.name();
                                assert!(
                                    off <= t.hi.abs() * 1.2e-16,
                                    "{x:e}, {reference:?}: {what}"
                                );
                            }
                            // Clamped, but still out of range.
                            Some(t) if t.hi.abs() > 1025.0 => {
                                assert!(got.abs() > 1022.4 && got.signum() == t.hi.signum());
                            }
                            _ => assert!(x.is_nan() == got.is_nan() || !got.is_finite()),
                        }
                    }
                }
            }
        }
    }

    /// A reference a lane: within 1 ulp of one for all, and the same at the ends.
    fn lanes_agree<R: Base>(
        sets: Vec<(Isa, Values<R>)>,
        reference: Reference,
        x: &[R; 64],
        [epsilon, least]: [f64; 2],
    ) {
        for (isa, values) in sets {
            // SAFETY: available.
            let [one, each] =
                [What::Value, What::Lanes].map(|what| unsafe { values(what, reference, x) });
            for ((x, one), each) in x.iter().zip(one).zip(each) {
                let (a, b) = (one.to_f64(), each.to_f64());
                let both_nan = a.is_nan() && b.is_nan();
                // Half an ulp of the larger is no more than 1 of either.
                let close = (a - b).abs() <= epsilon * a.min(b) && a.is_finite();
                // Below the smallest normal number it is 0 or close to that.
                let edge = a.max(b) <= 2.0 * least && a >= 0.0 && b >= 0.0;
                let good = both_nan || a == b || close || edge;
                assert!(good, "{x:?} from {reference:?} on {}: {a:e} and {b:e}", isa.name());
            }
        }
    }

    #[test]
    fn a_reference_a_lane() {
        for (at, reference) in references_of_doubles() {
            for x in logits_around(at, reference) {
                lanes_agree(available_wide(), reference, &x, [f64::EPSILON, f64::MIN_POSITIVE]);
            }
        }
        let ends = [f64::from(f32::EPSILON), f64::from(f32::MIN_POSITIVE)];
        for at in [0.0, -0.3f32, -1e4, 1.4e6, -1.45e6, 1.5e6, -1e7, 3e30, -3e38] {
            let reference = Reference::at::<f32>(at);
            let center = if reference.is_far() { reference.far } else { reference.near / f64::L };
            let ulp = f64::from(at.abs() * f32::EPSILON);
            for block in -60..60 {
                let logit = |i: i32| center + f64::from(block * 64 + i) * ulp.max(0.026);
                let mut x: [f32; 64] = std::array::from_fn(|i| logit(i as i32) as f32);
                if block == 0 {
                    x[..6].copy_from_slice(&[f32::MAX, f32::MIN, 0.0, -0.0, 1e-40, f32::NAN]);
                    x[6..8].copy_from_slice(&[f32::INFINITY, f32::NEG_INFINITY]);
                }
                lanes_agree(available(), reference, &x, ends);
            }
        }
    }

    /// `2^(L·x) - 1`: a relative error of 3·2^-53 down to the smallest x, and -1 far below.
    #[test]
    fn minus_one() {
        let mut x: Vec<f64> = (1..3000).map(|i| f64::from(i) * (709.0 / 3000.0)).collect();
        x.extend((0..9000).map(|i| 700.0 * (f64::from(i) * -0.075).exp()));
        x.extend((1..3000).map(|i| f64::from(i) / 3000.0));
        let mut x: Vec<f64> = x.into_iter().flat_map(|x| [x, -x]).collect();
        x.resize(x.len().next_multiple_of(64), 0.0);
        let sets = available_wide();
        let mut worst = vec![0f64; sets.len()];
        for x in x.chunks(64) {
            let x: &[f64; 64] = x.try_into().unwrap();
            let want: [Dd; 64] = x.map(|x| (Dd::product(x, f64::L) * Dd::LN_2).expm1());
            let mut fused = None;
            for ((isa, values), worst) in sets.iter().zip(&mut worst) {
                // SAFETY: available.
                let got = unsafe { values(What::MinusOne, Reference::ZERO, x) };
                for ((x, got), want) in x.iter().zip(got).zip(want) {
                    if (got - want.hi).abs() <= 1e-323 {
                        continue;
                    }
                    let units = want.error(got) / (f64::EPSILON / 2.0);
                    *worst = worst.max(units);
                    assert!(units <= 3.0, "{x:e} on {}: {got:e}, {want:?}", isa.name());
                }
                if *isa != Isa::Portable {
                    let bits = got.map(f64::to_bits);
                    assert!(*fused.get_or_insert(bits) == bits, "{x:?} on {}", isa.name());
                }
            }
        }
        for ((isa, values), worst) in sets.iter().zip(worst) {
            println!("{isa:?}: at most {worst:.4} times 2^-53");
            let mut x = [0.0; 64];
            x[..4].copy_from_slice(&[f64::NEG_INFINITY, f64::MIN, -800.0, f64::NAN]);
            // SAFETY: available.
            let got = unsafe { values(What::MinusOne, Reference::ZERO, &x) };
            assert!(got[..3] == [-1.0; 3] && got[3].is_nan() && got[4..] == [0.0; 60], "{got:?}");
        }
    }
}
