//! `2^(L·x - c)`, vectorised, within 1 ulp.
//!
//! The kernels work in base 2. With `L = log2 e`, rounded to the type of the lanes, and an integer
//! shift `c`, in lanes of f32:
//!
//! ```text
//! m = fma(x, L, M - c)         M = 1.5·2^20 + 127: m is rounded to a multiple of 1/8, and its low
//!                              bits are 8·(k + 127) + j, with k + j/8 the eighth nearest to L·x - c
//! n = m - (M - c)              = k + j/8 + c, exact
//! f = fma(x, L, -n)            in [-1/16, 1/16]; one rounding, of a small number
//! T = bits(m) << 20 + step_j   = -2^(k + j/8)/C, by a sum of integers
//! h ≈ 1 - C·2^f                polynomial of degree 3
//! e = fma(T, h, -T)
//! ```
//!
//! Because the fused product is exact and `n` is a multiple of 1/8, a common offset of the logits,
//! however large, costs no accuracy: `f` carries the only error of the argument, half an ulp of
//! a number below 1/16. (Subtracting a shift that is not would round the whole exponent instead,
//! and cost `|log2 e^x|·2^-24`.)
//!
//! Eighths come from a register, by one permutation, and save three of the six steps of a polynomial for
//! |f| ≤ 1/2. But T is rounded, and so is e: were T off by up to half an ulp, e could be off by more than
//! a whole one. Hence `C = 1.00257`, a number for which all eight of `2^(j/8)/C` happen to lie within 0.024
//! ulp of an f32 (found by trying every f32 up to 1.09). What C does to T, h takes back, and powers of 2 come
//! out exact. With C above 1 the T of an x of -inf, whose bits are `step_0`, is NaN; below 1 it would be a subnormal
//! number, for which some processors stop.
//!
//! In lanes of f64 there is no table: `M = 1.5·2^52 + 1023`, |f| ≤ 1/2, `p ≈ 2^f` is a polynomial of
//! degree 11, and `e = p·2^k`, where multiplying by 2^k is exact and can be fused into a sum.
//!
//! Rows so far from 0 that an integer `c` does not fit beside their exponents are counted from one
//! of their logits instead, which is subtracted first: exactly, wherever the result is not 0.
//!
//! Results hold from `2^-125.9375` to `2^127.9375` (in f64 from `2^-1022.5` to `2^1023.5`). Below they are 0,
//! or in f32 down to `2^-126.9375` something in between; above they become infinite, at an exponent of 128
//! (1024) at the latest; on every instruction set alike. NaN goes through. To see to that takes three
//! instructions, so the kernels first try without and only check the bits of `m`, which is cheaper
//! (kernels/contiguous.rs).
//!
//! In f32, `L` is not `log2 e`: what is computed is `b^x` with `b = 2^L = e^(1 - 1.335e-8)`. The kernels
//! stay consistent in that base (`log_b Σ b^x`, see octet.rs), which moves a log-sum-exp by
//! at most 1.335e-8 times the entropy of the row, and a probability by at most
//! `1.335e-8·|ln p|`, well within the bounds promised. Where the result is a softmax, and nothing
//! rounds it further, [`Exp2::base_e`] takes what `L` lacks into `f`.

use crate::simd::{EIGHTH_SHIFT, Real, Simd};
use std::marker::PhantomData;

/// A type of lanes, with what `2^(L·x - c)` needs to know about it.
pub trait Base: Real {
    /// log2(e): the factor between a logit and its exponent of 2.
    const L: Self;
    /// Whether exponents are rounded to eighths, and what is between them comes from a table.
    const HAS_TABLE: bool;
    /// Its ulp is 1, or 1/8 with steps, and its low bits are the exponent's bias.
    const MAGIC: Self;
    /// An m for an exponent in range ([`Power::m`]) has these bits, but for the lowest 11; any other m,
    /// NaN among them, has not.
    const IN_RANGE: Self;
    /// The least m for an exponent whose power is not 0.
    const FIRST: Self;
    /// The largest m for an exponent whose power is finite.
    const LAST: Self;
    /// Adding and subtracting it rounds a number up to [`MAX_SHIFT`](Self::MAX_SHIFT) to an integer.
    const ROUND: Self;
    /// `1/L`, in two parts.
    const INVERSE: (f64, f64);
    /// `log2 e / L`: what natural logarithms are multiplied by to be in the base of the sums.
    const RATIO: f64;
    /// `RATIO - 1`
    const EXCESS: f64;
    /// Exponents from `-BIAS` on.
    const BIAS: Self;
    /// The largest magnitude of an integer shift for which `MAGIC - c` is exact and the sum
    /// `x·L + MAGIC - c` keeps the ulp of `MAGIC`, with room to spare: what [`Exp2::base_e`] adds to f,
    /// in proportion to x, must not take it out of the polynomial's range.
    const MAX_SHIFT: f64;
    /// Coefficients of `f^0, f^1, f^2, …` in `2^f` on [-1/2, 1/2], or with steps in `1 - C·2^f` on
    /// [-1/16, 1/16].
    const POLY: &'static [Self];
}

impl Base for f32 {
    const L: f32 = std::f32::consts::LOG2_E;
    const HAS_TABLE: bool = true;
    const MAGIC: f32 = 1_572_864.0 + 127.0; // 1.5·2^20
    const IN_RANGE: f32 = 1_572_864.0;
    const FIRST: f32 = 1_572_864.0 + 0.125;
    const LAST: f32 = 1_572_864.0 + 254.875;
    const ROUND: f32 = 12_582_912.0; // 1.5·2^23
    const INVERSE: (f64, f64) = (0.693_147_189_813_292_7, -3.709_646_822_944_172e-17);
    const RATIO: f64 = 1.000_000_013_349_758_4;
    const EXCESS: f64 = 1.334_975_834_983_818_4e-8;
    const BIAS: f32 = 127.0;
    const MAX_SHIFT: f64 = 65_536.0;
    // Minimax in relative error (Lawson's iteration), then varied by a few ulps each for the least
    // error of the whole over all arguments. Relative error of the polynomial 1.9e-8.
    const POLY: &'static [f32] = &[-0.002_567_589_3, -0.694_926_9, -0.240_881_01, -0.055_642_266];
}

/// `2^(j/8)/C`, `C = 1.002_567_606_75`: each off by 0.024 ulp at most.
const EIGHTHS: [f32; 8] = [
    0.997_438_97,
    1.087_714_9,
    1.186_161_5,
    1.293_518_3,
    1.410_591_7,
    1.538_261_2,
    1.677_485_7,
    1.829_311_1,
];

/// What takes an eighth that has been shifted to below an exponent ([`Simd::scale`]) to minus that step.
const TABLE_BITS: [u32; 8] = {
    let (mut bits, mut j) = ([0; 8], 0);
    while j < 8 {
        let eighth = 1f32.to_bits() + ((j as u32) << EIGHTH_SHIFT);
        bits[j] = (-EIGHTHS[j]).to_bits().wrapping_sub(eighth);
        j += 1;
    }
    bits
};

impl Base for f64 {
    const L: f64 = std::f64::consts::LOG2_E;
    const HAS_TABLE: bool = false;
    const MAGIC: f64 = 6_755_399_441_055_744.0 + 1023.0; // 1.5·2^52
    const IN_RANGE: f64 = 6_755_399_441_055_744.0;
    const FIRST: f64 = 6_755_399_441_055_744.0 + 1.0;
    const LAST: f64 = 6_755_399_441_055_744.0 + 2046.0;
    const ROUND: f64 = 6_755_399_441_055_744.0;
    const INVERSE: (f64, f64) = (std::f64::consts::LN_2, 3.297_022_075_642_333e-17);
    const RATIO: f64 = 1.0;
    const EXCESS: f64 = 1.410_920_060_305_223_7e-17;
    const BIAS: f64 = 1023.0;
    const MAX_SHIFT: f64 = 562_949_953_421_312.0;
    // `(2^f - 1)/f` interpolated at 11 Chebyshev nodes, in 60 digits. Relative error of the
    // polynomial, with its coefficients rounded, 2.0e-17.
    const POLY: &'static [f64] = &[
        1.0,
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

/// Where exponents are counted from: `2^(L·(x - logit) - exponent)`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Shift {
    /// A logit, for rows whose exponents are out of reach of an integer; else 0.
    pub logit: f64,
    /// An integer, 0 if `logit` is not.
    pub exponent: f64,
}

impl Shift {
    /// Exponents are counted from 0.
    pub const ZERO: Shift = Shift { logit: 0.0, exponent: 0.0 };

    /// The shift nearest to the logit `x`, which is finite.
    #[inline(always)]
    pub fn at<R: Base>(x: R) -> Self {
        let x = x.to_f64();
        let c = nearest(x * R::L.to_f64());
        if c.abs() <= R::MAX_SHIFT {
            Shift { logit: 0.0, exponent: c }
        } else {
            Shift { logit: x, exponent: 0.0 }
        }
    }

    /// Whether a logit has to be subtracted.
    #[inline(always)]
    pub fn is_by_logit(self) -> bool {
        self.logit != 0.0
    }

    /// How far it is above another, in units of log2.
    #[inline(always)]
    pub fn above(self, other: Shift, l: f64) -> f64 {
        (self.exponent - other.exponent) + (self.logit - other.logit) * l
    }
}

/// `x` rounded to the nearest integer, if |x| < 2^51.
#[inline(always)]
pub fn nearest(x: f64) -> f64 {
    const SHIFT: f64 = 6_755_399_441_055_744.0; // 1.5·2^52
    if x.abs() < 2_251_799_813_685_248.0 { (x + SHIFT) - SHIFT } else { x }
}

/// Which shifts an [`Exp2`] is compiled for.
pub trait ShiftKind: Copy {
    /// `shift.logit` is subtracted from each logit first.
    const BY_LOGIT: bool;
}

/// `shift.logit` is 0: the shift is an integer exponent.
#[derive(Clone, Copy)]
pub struct ByExponent;

/// `shift.logit` may be any number.
#[derive(Clone, Copy)]
pub struct ByLogit;

impl ShiftKind for ByExponent {
    const BY_LOGIT: bool = false;
}

impl ShiftKind for ByLogit {
    const BY_LOGIT: bool = true;
}

/// Whether an exponential is right for exponents out of range.
pub trait Clamping {
    /// Three more instructions make it right for every x.
    const CLAMPS: bool;
}

/// Right for every x.
pub struct Clamped;

/// Right for exponents in range; the caller checks the bits of [`Power::m`].
pub struct Unclamped;

impl Clamping for Clamped {
    const CLAMPS: bool = true;
}

impl Clamping for Unclamped {
    const CLAMPS: bool = false;
}

/// The constants of `x -> 2^(L·(x - logit) - exponent)`, in registers.
#[derive(Clone, Copy)]
pub struct Exp2<S: Simd, K: ShiftKind> {
    s: S,
    kind: PhantomData<K>,
    origin: S::Real,
    logit: S::Vector,
    slope: S::Vector,
    minus_magic: S::Vector,
    table: S::Exp2Table,
}

/// `2^(L·x - c)`, before it is put together.
#[derive(Clone, Copy)]
pub struct Power<S: Simd> {
    /// 2^f, or with steps what `C·2^f` is below 1
    p: S::Vector,
    /// 2^k, or with steps `-2^(k + j/8)/C`: the difference of a product and it is exact on every set
    scale: S::Vector,
    /// Its low bits are k, with the bias, and j: [`Base::IN_RANGE`].
    pub m: S::Vector,
}

impl<S: Simd<Real: Base>, K: ShiftKind> Exp2<S, K> {
    /// For one shift of the kind `K`.
    #[inline(always)]
    pub fn new(s: S, shift: Shift) -> Self {
        let exponent = shift.exponent;
        let splat = |x: f64| s.splat(S::Real::from_f64(x));
        let origin = if K::BY_LOGIT { shift.logit } else { exponent / S::Real::L.to_f64() };
        Exp2 {
            s,
            kind: PhantomData,
            origin: S::Real::from_f64(origin),
            logit: splat(shift.logit),
            slope: s.splat(S::Real::L),
            minus_magic: splat(exponent - S::Real::MAGIC.to_f64()),
            table: s.exp2_table(&TABLE_BITS),
        }
    }

    /// For a shift a lane.
    #[inline(always)]
    pub fn lanes(s: S, logit: S::Vector, exponent: S::Vector) -> Self {
        Exp2 {
            s,
            kind: PhantomData,
            origin: S::Real::ZERO,
            logit,
            slope: s.splat(S::Real::L),
            minus_magic: s.sub(exponent, s.splat(S::Real::MAGIC)),
            table: s.exp2_table(&TABLE_BITS),
        }
    }

    /// `(f, m)`; where `C` clamps no m is above the range, and f takes what is.
    #[inline(always)]
    fn reduce<C: Clamping>(&self, x: S::Vector) -> (S::Vector, S::Vector) {
        let s = self.s;
        let mut m = s.mul_sub_exact(x, self.slope, self.minus_magic);
        if C::CLAMPS {
            m = s.min(s.splat(S::Real::LAST), m);
        }
        let n = s.add(m, self.minus_magic);
        (s.mul_sub_exact(x, self.slope, n), m)
    }

    /// The polynomial without its constant, divided by f.
    #[inline(always)]
    fn quotient(&self, f: S::Vector) -> S::Vector {
        let s = self.s;
        let (last, others) = S::Real::POLY[1..].split_last().expect("a polynomial");
        let mut q = s.splat(*last);
        for &c in others.iter().rev() {
            q = s.mul_add(q, f, s.splat(c));
        }
        q
    }

    #[inline(always)]
    fn assemble(&self, f: S::Vector, m: S::Vector) -> Power<S> {
        let s = self.s;
        let (q, constant) = (self.quotient(f), S::Real::POLY[0]);
        let p = if S::Real::HAS_TABLE {
            s.mul_add(q, f, s.splat(constant))
        } else {
            // A second rounding here would cost the portable set its 1 ulp.
            s.mul_sub_exact(q, f, s.splat(S::Real::from_f64(-constant.to_f64())))
        };
        Power { p, scale: s.scale(self.table, m), m }
    }

    /// `2^(L·(x - logit) - exponent)`. Unless `C` clamps, no more than its m counts where that is out of range.
    #[inline(always)]
    pub fn power<C: Clamping>(&self, x: S::Vector) -> Power<S> {
        let (f, m) = self.reduce::<C>(self.shifted(x));
        self.assemble(f, m)
    }

    #[inline(always)]
    fn shifted(&self, x: S::Vector) -> S::Vector {
        if K::BY_LOGIT { self.s.sub(x, self.logit) } else { x }
    }

    #[inline(always)]
    fn assembled(&self, Power { p, scale, .. }: Power<S>) -> S::Vector {
        let s = self.s;
        if S::Real::HAS_TABLE { s.mul_sub_exact(scale, p, scale) } else { s.mul(p, scale) }
    }

    /// The value of a power; unless `C` clamps, of one that is in range.
    #[inline(always)]
    pub fn value_of<C: Clamping>(&self, power: Power<S>) -> S::Vector {
        let (s, e) = (self.s, self.assembled(power));
        if C::CLAMPS { s.select(self.is_zero(power.m), s.splat(S::Real::ZERO), e) } else { e }
    }

    #[inline(always)]
    fn is_zero(&self, m: S::Vector) -> S::Mask {
        self.s.less(m, self.s.splat(S::Real::FIRST))
    }

    /// Adds the value of a power; unless `C` clamps, of one that is in range.
    #[inline(always)]
    pub fn add<C: Clamping>(&self, power: Power<S>, to: S::Vector) -> S::Vector {
        let s = self.s;
        if C::CLAMPS || S::Real::HAS_TABLE {
            s.add(self.value_of::<C>(power), to)
        } else {
            s.mul_add(power.p, power.scale, to)
        }
    }

    /// `2^(L·x - c)`: relative error at most 1 ulp against `b^x·2^-c`, in the range given above. Unless
    /// `C` clamps, for x whose m is in range.
    #[inline(always)]
    pub fn value<C: Clamping>(&self, x: S::Vector) -> S::Vector {
        self.value_of::<C>(self.power::<C>(x))
    }

    /// The same of an x that is in range or below it, or NaN; 0 where `not`, whatever x is.
    #[inline(always)]
    pub fn value_below(&self, x: S::Vector, not: S::Mask) -> S::Vector {
        let (s, power) = (self.s, self.power::<Unclamped>(x));
        let zero = s.either(not, self.is_zero(power.m));
        s.select(zero, s.splat(S::Real::ZERO), self.assembled(power))
    }

    /// A logit whose exponent is close to 0. Not for a shift a lane.
    #[inline(always)]
    pub fn origin(&self) -> S::Real {
        self.origin
    }

    /// `L·(x - logit) - exponent`, the exponent of [`value`](Self::value): finite, though beyond the range where x
    /// is, unless x is NaN.
    #[inline(always)]
    pub fn exponent(&self, x: S::Vector) -> S::Vector {
        let s = self.s;
        let exponent = s.add(self.minus_magic, s.splat(S::Real::MAGIC));
        let t = s.mul_sub_exact(self.shifted(x), self.slope, exponent);
        let bias = S::Real::BIAS.to_f64();
        let [low, high] = [-bias, bias + 1.0].map(|t| s.splat(S::Real::from_f64(t)));
        s.min(high, s.max(low, t))
    }

    /// `2^(log2 e·(x - logit) - exponent)`, clamped, within 1 ulp as [`value`](Self::value) is: of e where
    /// that is of b, for one fused product more.
    #[inline(always)]
    pub fn base_e(&self, x: S::Vector) -> S::Vector {
        let s = self.s;
        let x = self.shifted(x);
        let (f, m) = self.reduce::<Clamped>(x);
        let lacking = S::Real::L.to_f64() * S::Real::EXCESS;
        let f = s.mul_add(x, s.splat(S::Real::from_f64(lacking)), f);
        self.value_of::<Clamped>(self.assemble(f, m))
    }
}

impl<S: Simd<Real = f64>> Exp2<S, ByExponent> {
    /// `2^(L·x) - 1`, to a few ulp near 0 as well; for a shift of 0 and x up to 709.
    #[inline(always)]
    pub fn minus_one(&self, x: S::Vector) -> S::Vector {
        let s = self.s;
        let (f, m) = self.reduce::<Unclamped>(s.max(s.splat(-f64::BIAS / f64::L), x));
        let scale = s.scale(self.table, m);
        // `2^k - 1` is exact, or far larger than what it loses.
        s.mul_add(s.mul(self.quotient(f), f), scale, s.sub(scale, s.splat(1.0)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dispatch::Isa;
    use crate::math::double_double::Dd;
    use crate::math::scalar;
    use crate::sample::{blocks, some_of};
    use crate::simd::portable::{Portable, PortableWide};
    use rayon::prelude::*;

    /// What is computed.
    #[derive(Clone, Copy, Debug, PartialEq)]
    pub enum What {
        /// [`Exp2::value`] for one shift.
        Value,
        /// The same for a shift a lane, all of them this.
        Lanes,
        /// [`Exp2::base_e`]
        BaseE,
        /// [`Exp2::minus_one`]
        MinusOne,
        /// [`Exp2::exponent`]
        Exponent,
    }

    /// Results of 64 values at once, per instruction set.
    macro_rules! stamp {
        ($name:ident, $real:ty, $token:ty, $all:ident $(, $feature:tt)*) => {
            $(#[target_feature(enable = $feature)])*
            pub unsafe fn $name(what: What, shift: Shift, x: &[$real; 64]) -> [$real; 64] {
                // SAFETY: this function's own features.
                $all(unsafe { <$token>::assume() }, what, shift, x)
            }
        };
    }
    stamp!(portable, f32, Portable, all);
    stamp!(portable_wide, f64, PortableWide, doubles);
    #[cfg(x86_sets)]
    mod x86 {
        use super::*;
        use crate::simd::avx2::{Avx2, Avx2Wide};
        use crate::simd::avx512::{Avx512, Avx512Wide};

        stamp!(avx2, f32, Avx2, all, "avx2", "fma");
        stamp!(avx2_wide, f64, Avx2Wide, doubles, "avx2", "fma");
        stamp!(avx512, f32, Avx512, all, "avx512f", "avx512bw", "avx512dq", "avx512vl");
        stamp!(
            avx512_wide,
            f64,
            Avx512Wide,
            doubles,
            "avx512f",
            "avx512bw",
            "avx512dq",
            "avx512vl"
        );
    }

    #[inline(always)]
    fn all<S: Simd<Real: Base>>(
        s: S,
        what: What,
        shift: Shift,
        x: &[S::Real; 64],
    ) -> [S::Real; 64] {
        #[inline(always)]
        fn some<S: Simd<Real: Base>, K: ShiftKind>(
            s: S,
            what: What,
            shift: Shift,
            x: &[S::Real; 64],
        ) -> [S::Real; 64] {
            let mut out = [S::Real::ZERO; 64];
            let splat = |x: f64| s.splat(S::Real::from_f64(x));
            let exp2 = match what {
                What::Lanes => Exp2::<S, K>::lanes(s, splat(shift.logit), splat(shift.exponent)),
                _ => Exp2::<S, K>::new(s, shift),
            };
            for at in (0..64).step_by(S::LANES) {
                // SAFETY: within the arrays.
                unsafe {
                    let x = s.load(x.as_ptr().add(at));
                    let e = match what {
                        What::Value | What::Lanes => exp2.value::<Clamped>(x),
                        What::BaseE => exp2.base_e(x),
                        What::MinusOne => unreachable!("of lanes of f64 alone"),
                        What::Exponent => exp2.exponent(x),
                    };
                    s.store(out.as_mut_ptr().add(at), e);
                }
            }
            out
        }
        if shift.is_by_logit() {
            some::<S, ByLogit>(s, what, shift, x)
        } else {
            some::<S, ByExponent>(s, what, shift, x)
        }
    }

    #[inline(always)]
    fn doubles<S: Simd<Real = f64>>(s: S, what: What, shift: Shift, x: &[f64; 64]) -> [f64; 64] {
        if what != What::MinusOne {
            return all(s, what, shift, x);
        }
        let (exp2, mut out) = (Exp2::<S, ByExponent>::new(s, shift), [0.0; 64]);
        for at in (0..64).step_by(S::LANES) {
            // SAFETY: within the arrays.
            unsafe {
                let e = exp2.minus_one(s.load(x.as_ptr().add(at)));
                s.store(out.as_mut_ptr().add(at), e);
            }
        }
        out
    }

    type Values<R> = unsafe fn(What, Shift, &[R; 64]) -> [R; 64];

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
            #[cfg(x86_sets)]
            (Isa::Avx2, x86::avx2),
            #[cfg(x86_sets)]
            (Isa::Avx512, x86::avx512),
        ])
    }

    fn available_wide() -> Vec<(Isa, Values<f64>)> {
        only_available([
            (Isa::Portable, portable_wide as Values<f64>),
            #[cfg(x86_sets)]
            (Isa::Avx2, x86::avx2_wide),
            #[cfg(x86_sets)]
            (Isa::Avx512, x86::avx512_wide),
        ])
    }

    /// What a result has to be.
    #[derive(Clone, Copy, PartialEq)]
    enum Class {
        Nan,
        Infinite,
        /// Infinite or close to the largest number.
        Huge,
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
            t if t >= 128.0 => Class::Infinite,
            t if t > 127.9375 => Class::Huge,
            t if t < -126.9375 => Class::Zero,
            t if t < -125.9375 => Class::Edge,
            t if t.abs() < 1e-9 => Class::One,
            _ => Class::Close,
        }
    }

    /// Checks 64 results of ascending or descending arguments on each set; raises `worst` to the
    /// largest error in ulps.
    fn check(shift: Shift, x: &[f32; 64], sets: &[[f32; 64]], worst: &mut [f64]) {
        let l = f64::from(f32::L);
        let exponent = |x: f32| (f64::from(x) - shift.logit) * l - shift.exponent;
        let (first, last) = (class(exponent(x[0])), class(exponent(x[63])));
        if first == last && first != Class::Close {
            let all = |right: fn(f32) -> bool| sets.iter().flatten().all(|&e| right(e));
            assert!(
                match first {
                    Class::Nan => all(f32::is_nan),
                    Class::Infinite => all(|e| e == f32::INFINITY),
                    Class::Huge => all(|e| e > 0.95 * f32::MAX),
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
        let shift = Shift::ZERO;
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
                        *e = unsafe { values(What::Value, shift, &x) };
                    }
                    let results = &results[..sets.len()];
                    if let Some(fused) = fused {
                        let bits = |e: &[f32; 64]| e.map(f32::to_bits);
                        let first = bits(&results[fused]);
                        assert!(results[fused..].iter().all(|e| bits(e) == first), "{x:?}");
                    }
                    check(shift, &x, &results[..judged], &mut worst);
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

    /// Shifts far from 0 keep the accuracy.
    #[test]
    fn shifts() {
        for at in [-4.5e4f32, -1e4, -0.3, 7.0, 1e4, 4.5e4, 4.55e4, 1e7, -3e30, 3e38] {
            let shift = Shift::at::<f32>(at);
            let step = (at.abs() * f32::EPSILON).max(0.01);
            for (isa, values) in available() {
                let mut worst = [0.0];
                for k in 0..200 {
                    let x = std::array::from_fn(|i| at - step * (k * 64 + i) as f32);
                    // SAFETY: available.
                    let e = unsafe { values(What::Value, shift, &x) };
                    check(shift, &x, &[e], &mut worst);
                }
                assert!(worst[0] <= 1.0, "{isa:?} at {at}: {} ulp", worst[0]);
            }
        }
    }

    /// 1 ulp of powers of e itself, as far down as they are normal numbers, and the same bits on the
    /// sets that fuse.
    #[test]
    fn base_e() {
        for at in [-4.5e4f32, -1e4, -0.3, 0.0, 7.0, 1e4, 4.5e4, 4.55e4, 1e7, -3e30] {
            let shift = Shift::at::<f32>(at);
            let step = (at.abs() * f32::EPSILON).max(1e-3);
            let (mut worst, mut fused) = (0f64, None);
            for (isa, values) in available() {
                let mut all = Vec::new();
                for k in 0..2000 {
                    let x: [f32; 64] = std::array::from_fn(|i| at - step * (k * 64 + i) as f32);
                    // SAFETY: available.
                    let e = unsafe { values(What::BaseE, shift, &x) };
                    for (x, e) in x.into_iter().zip(e) {
                        let log2_e = Dd { hi: f64::L, lo: f64::L * f64::EXCESS };
                        let t = log2_e * Dd::from(f64::from(x) - shift.logit)
                            - Dd::from(shift.exponent);
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

    /// Shifts of f64, near and far, up to the ends of each; each with a distance between two
    /// logits beside it that f64 can tell apart.
    fn references_of_doubles() -> Vec<(f64, Shift)> {
        let near = f64::MAX_SHIFT / f64::L;
        [0.0, 0.3, -1e3, 7e5, -1e10, near, -near, near * 1.01, -4e15, 1e16, -3e200, 1e308]
            .into_iter()
            .map(|at: f64| (at, Shift::at::<f64>(at)))
            .collect()
    }

    /// Logits with exponents from below the least to above the largest, densely and evenly, at
    /// the borders, and a few far away.
    fn logits_around(at: f64, shift: Shift) -> Vec<[f64; 64]> {
        let ulp = f64::from_bits(at.abs().to_bits() + 1) - at.abs();
        let mut x = Vec::new();
        let center = if shift.is_by_logit() { shift.logit } else { shift.exponent / f64::L };
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

    /// `L·(x - logit) - exponent` with the digits of double-double, None if it overflows or is NaN.
    fn exact_exponent(x: f64, shift: Shift) -> Option<Dd> {
        let d = Dd::sum(x, -shift.logit);
        if !d.hi.is_finite() || d.hi.abs() > 1e290 {
            return None;
        }
        let t = Dd::product(d.hi, f64::L) - Dd::from(shift.exponent);
        Some(t + Dd::product(d.lo, f64::L))
    }

    /// 1 ulp against double-double, and the ends; the same bits on the sets that fuse.
    #[test]
    fn exact_doubles() {
        let sets = available_wide();
        let mut worst = vec![0f64; sets.len()];
        for (at, shift) in references_of_doubles() {
            for x in some_of(logits_around(at, shift)) {
                let mut fused = None;
                for ((isa, values), worst) in sets.iter().zip(&mut worst) {
                    // SAFETY: available.
                    let got = unsafe { values(What::Value, shift, &x) };
                    for (&x, e) in x.iter().zip(got) {
                        let what = || format!("{x:e} from {shift:?} on {}: {e:e}", isa.name());
                        let Some(t) = exact_exponent(x, shift) else {
                            let up = x - shift.logit;
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
                            t if t > 1023.5 && t < 1024.0 || border(1023.5) || border(1024.0) => {
                                assert!(e > 1e308, "{}", what());
                            }
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
        for (at, shift) in references_of_doubles() {
            for x in logits_around(at, shift) {
                for (isa, values) in available_wide() {
                    // SAFETY: available.
                    let got = unsafe { values(What::Exponent, shift, &x) };
                    for (&x, got) in x.iter().zip(got) {
                        match exact_exponent(x, shift) {
                            Some(t) if t.hi.abs() < 1000.0 => {
                                let off = ((got - t.hi) - t.lo).abs();
                                let what = isa.name();
                                assert!(off <= t.hi.abs() * 1.2e-16, "{x:e}, {shift:?}: {what}");
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

    /// A shift a lane: within 1 ulp of one for all, and the same at the ends.
    fn lanes_agree<R: Base>(
        sets: Vec<(Isa, Values<R>)>,
        shift: Shift,
        x: &[R; 64],
        [epsilon, least]: [f64; 2],
    ) {
        for (isa, values) in sets {
            // SAFETY: available.
            let [one, each] =
                [What::Value, What::Lanes].map(|what| unsafe { values(what, shift, x) });
            for ((x, one), each) in x.iter().zip(one).zip(each) {
                let (a, b) = (one.to_f64(), each.to_f64());
                let both_nan = a.is_nan() && b.is_nan();
                // Half an ulp of the larger is no more than 1 of either.
                let close = (a - b).abs() <= epsilon * a.min(b) && a.is_finite();
                // Below the smallest normal number it is 0 or close to that.
                let edge = a.max(b) <= 2.0 * least && a >= 0.0 && b >= 0.0;
                let good = both_nan || a == b || close || edge;
                assert!(good, "{x:?} from {shift:?} on {}: {a:e} and {b:e}", isa.name());
            }
        }
    }

    #[test]
    fn a_reference_a_lane() {
        for (at, shift) in references_of_doubles() {
            for x in logits_around(at, shift) {
                lanes_agree(available_wide(), shift, &x, [f64::EPSILON, f64::MIN_POSITIVE]);
            }
        }
        let ends = [f64::from(f32::EPSILON), f64::from(f32::MIN_POSITIVE)];
        for at in [0.0, -0.3f32, -1e4, 4.5e4, -4.53e4, 4.55e4, -1e7, 3e30, -3e38] {
            let shift = Shift::at::<f32>(at);
            let center = if shift.is_by_logit() { shift.logit } else { shift.exponent / f64::L };
            let ulp = f64::from(at.abs() * f32::EPSILON);
            for block in -60..60 {
                let logit = |i: i32| center + f64::from(block * 64 + i) * ulp.max(0.026);
                let mut x: [f32; 64] = std::array::from_fn(|i| logit(i as i32) as f32);
                if block == 0 {
                    x[..6].copy_from_slice(&[f32::MAX, f32::MIN, 0.0, -0.0, 1e-40, f32::NAN]);
                    x[6..8].copy_from_slice(&[f32::INFINITY, f32::NEG_INFINITY]);
                }
                lanes_agree(available(), shift, &x, ends);
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
                let got = unsafe { values(What::MinusOne, Shift::ZERO, x) };
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
            let got = unsafe { values(What::MinusOne, Shift::ZERO, &x) };
            assert!(got[..3] == [-1.0; 3] && got[3].is_nan() && got[4..] == [0.0; 60], "{got:?}");
        }
    }
}
