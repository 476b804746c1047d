//! `2^(L·x - c)` in vectors, within 1 ulp.
//!
//! The kernels work in base 2. `L` is `log2 e`, rounded to the type of the lanes, and the shift `c`
//! is an integer. Lanes compute:
//!
//! ```text
//! m = fma(x, L, M - c)         M = 1.5·2^20 + 127 (f64: 1.5·2^49 + 1023), so m is rounded to a multiple
//!                              of 1/8. Its low bits are 8·(k + 127) + j (f64: 8·(k + 1023) + j), with
//!                              k + j/8 the eighth nearest to L·x - c
//! n = m - (M - c)              = k + j/8 + c, exact
//! f = fma(x, L, -n)            in [-1/16, 1/16]; one rounding, of a small number
//! f = fma(x, LOW, f)           f64 only: LOW is what L lacks of log2 e
//! T = bits(m) << 20 + entry_j  = -2^(k + j/8)/C, by an addition of integers (f64: << 49)
//! h ≈ 1 - C·2^f                polynomial of degree 3 (f64: 7)
//! e = fma(T, h, -T)
//! ```
//!
//! The fused product is exact and `n` is a multiple of 1/8, so an offset that all logits share costs
//! no accuracy, however large it is. `f` carries the only error of the argument, half an ulp of a number
//! below 1/16 for each of its roundings. (Subtracting a shift that is no multiple of 1/8 would round the
//! whole exponent instead, and cost `|log2 e^x|·2^-24`.)
//!
//! One permutation of a register looks up `2^(j/8)/C` (with AVX2, two look up the halves of an f64). It
//! saves three of the six steps of a polynomial for |f| ≤ 1/2, and four of the eleven in f64. Both T and e
//! are rounded: if T were off by half an ulp, e could be off by more than a whole one. With `C = 1.00257`,
//! all eight of `2^(j/8)/C` lie within 0.024 ulp of an f32; with `C = 1.00112` within 0.031 ulp of an f64.
//! A search over every f32 up to 1.09 found the first number, one over multiples of 2^-41 the second. T is
//! divided by C and `1 - h` multiplied by it, so powers of 2 come out exact. For x = -inf, T has the bits
//! `entry_0`. They are a NaN because C is above 1; with C below 1 they would be a subnormal number, which
//! stalls some processors.
//!
//! If the logits of a row are so far from 0 that an integer `c` does not fit beside their exponents, the
//! shift is one of these logits. It is subtracted first, which is exact wherever the result is not 0.
//!
//! The bound of 1 ulp holds for results from `2^-125.9375` to `2^127.9375` (f64: from `2^-1021.9375` to
//! `2^1023.9375`). Below that range results are 0; those down to `2^-126.9375` (f64: `2^-1022.9375`) are 0
//! or close to the smallest normal number. Above it they become infinite, at an exponent of 128 (f64: 1024)
//! at the latest.
//! All sets have the same range. NaN stays NaN. Clamping to the range takes three instructions, so the
//! kernels first run without it and check the bits of `m`, which is cheaper
//! ([`Simd::range_check`], [`Base::IN_RANGE`]).
//!
//! In f32, `L` is not `log2 e` itself, so the functions compute `b^x` with `b = 2^L = e^(1 - 1.335e-8)`.
//! The kernels use that base throughout (`log_b Σ b^x`, see kernels/row_math.rs). This moves a log-sum-exp
//! by at most 1.335e-8·H, where H is the entropy of the row, and the logarithm of a probability p by at most
//! `1.335e-8·|ln p + H|`, well within the promised bounds. [`Exp2::base_e`] adds to `f` the part that `L`
//! lacks. It serves softmax outputs, which no later step rounds. In f64 the relative error of powers of such a
//! base, 1.4e-17·|x|, would exceed half an ulp from |x| = 8 on, so all powers are powers of e.

use crate::simd::{Doubles, Real, Simd, WideVector};
use std::marker::PhantomData;

/// The constants of `2^(L·x - c)` for a type of lanes.
pub trait Base: Real {
    /// log2(e), rounded: the factor between a logit and its exponent of 2.
    const L: Self;
    /// The factor is `L + LOW`: 0, or what L lacks of log2(e).
    const LOW: Self;
    /// A number whose ulp is 1/8 and whose low bits are the bias of the exponent.
    const MAGIC: Self;
    /// C, by which the powers of the table are divided.
    const DIVISOR: f64;
    /// The table for [`Simd::scale`]. Entry j is the difference, as integers, between the bits of
    /// `-2^(j/8)/C` and those of the shifted m, whose eighths lie below its exponent.
    const TABLE: &'static [Self::Bits; 8];
    /// The bits that every [`Power::m`] of an exponent in range has, except for the lowest
    /// [`IGNORED_BITS`](Real::IGNORED_BITS). Any other m, NaN included, has other bits.
    const IN_RANGE: Self;
    /// The smallest m of an exponent whose power is not 0.
    const FIRST: Self;
    /// The largest m of an exponent whose power is finite.
    const LAST: Self;
    /// Adding and then subtracting this number rounds a number of magnitude up to
    /// [`MAX_SHIFT`](Self::MAX_SHIFT) to an integer.
    const ROUND: Self;
    /// `1/(L + LOW)` as the sum of two numbers.
    const INVERSE: (f64, f64);
    /// `log2 e / (L + LOW)`: the factor from a natural logarithm to one in the base of the sums.
    const RATIO: f64;
    /// `RATIO - 1`
    const EXCESS: f64;
    /// The bias of the exponent.
    const BIAS: Self;
    /// The largest magnitude of an integer shift. Up to it, `MAGIC - c` is exact and `x·L + MAGIC - c`
    /// keeps the ulp of `MAGIC`. It leaves room for the term that [`Exp2::base_e`] adds to f,
    /// which is proportional to x, so that f stays in the range of the polynomial.
    const MAX_SHIFT: f64;
    /// The coefficients of `f^0, f^1, f^2, …` in `1 - C·2^f` on [-1/16, 1/16].
    const POLY: &'static [Self];
}

/// The [`Base::TABLE`] for powers of 2^(1/8) divided by C.
macro_rules! table {
    ($type:ident, $eighths:expr) => {{
        let (eighths, mut j): ([$type; 8], usize) = ($eighths, 0);
        let mut bits = [0; 8];
        while j < 8 {
            let shifted =
                $type::to_bits(1.0) + ((j as <$type as Real>::Bits) << $type::EIGHTH_SHIFT);
            bits[j] = (-eighths[j]).to_bits().wrapping_sub(shifted);
            j += 1;
        }
        bits
    }};
}

impl Base for f32 {
    const L: f32 = std::f32::consts::LOG2_E;
    const LOW: f32 = 0.0;
    const DIVISOR: f64 = 1.002_567_606_75;
    // `2^(j/8)/C`. Each is off by 0.024 ulp at most.
    const TABLE: &'static [u32; 8] = &table!(
        f32,
        [
            0.997_438_97, 1.087_714_9, 1.186_161_5, 1.293_518_3, 1.410_591_7, 1.538_261_2,
            1.677_485_7, 1.829_311_1,
        ]
    );
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
    // Minimax in relative error (Lawson's iteration). Each coefficient was then varied by a few ulps
    // for the least error of `e` over all arguments. The relative error of the polynomial is 1.9e-8.
    const POLY: &'static [f32] = &[-0.002_567_589_3, -0.694_926_9, -0.240_881_01, -0.055_642_266];
}

impl Base for f64 {
    const L: f64 = std::f64::consts::LOG2_E;
    const LOW: f64 = 2.035_527_374_093_103_3e-17;
    const DIVISOR: f64 = 1.001_122_053_512_062_8;
    // `2^(j/8)/C`. Each is off by 0.031 ulp at most.
    const TABLE: &'static [u64; 8] = &table!(
        f64,
        [
            0.998_879_204_080_934_4,
            1.089_285_496_048_777,
            1.187_874_256_521_302_3,
            1.295_386_062_170_474,
            1.412_628_517_583_700_1,
            1.540_482_321_808_484_9,
            1.679_907_883_966_282_7,
            1.831_952_537_630_561_7,
        ]
    );
    const MAGIC: f64 = 844_424_930_131_968.0 + 1023.0; // 1.5·2^49
    const IN_RANGE: f64 = 844_424_930_131_968.0;
    const FIRST: f64 = 844_424_930_131_968.0 + 0.125;
    const LAST: f64 = 844_424_930_131_968.0 + 2046.875;
    const ROUND: f64 = 6_755_399_441_055_744.0;
    const INVERSE: (f64, f64) = (std::f64::consts::LN_2, 2.319_046_813_846_299_6e-17);
    const RATIO: f64 = 1.0;
    const EXCESS: f64 = 0.0;
    const BIAS: f64 = 1023.0;
    const MAX_SHIFT: f64 = 35_184_372_088_832.0;
    // `(2^f - 1)/f` interpolated at 7 Chebyshev nodes, in 60 digits, times -C. With rounded coefficients,
    // the error of the polynomial is 5.0e-18.
    const POLY: &'static [f64] = &[
        -0.001_122_053_512_062_848_3,
        -0.693_924_928_788_269_1,
        -0.240_496_053_954_933_4,
        -0.055_566_387_244_883_525,
        -0.009_628_921_145_508_191,
        -0.001_334_851_909_857_010_2,
        -0.000_154_217_184_184_159_2,
        -1.527_054_475_073_544e-5,
    ];
}

/// 1.5·2^52 and the bias of the exponent: a number whose ulp is 1.
pub const WHOLE_MAGIC: f64 = 6_755_399_441_055_744.0 + 1023.0;

/// The coefficients of `f^0, f^1, f^2, …` in `2^f` on [-1/2, 1/2]: `(2^f - 1)/f` interpolated at 11 Chebyshev
/// nodes, in 60 digits. With rounded coefficients, the relative error of the polynomial is 2.0e-17.
pub const POWER: [f64; 12] = [
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

/// The shift of a row's exponents: `2^(L·(x - logit) - exponent)`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Shift {
    /// A logit of the row if [`Base::MAX_SHIFT`] does not reach its exponent, else 0.
    pub logit: f64,
    /// An integer; 0 if `logit` is not 0.
    pub exponent: f64,
}

impl Shift {
    /// No shift.
    pub const ZERO: Shift = Shift { logit: 0.0, exponent: 0.0 };

    /// Returns the shift nearest to the finite logit `x`.
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

    /// Returns whether the shift subtracts a logit.
    #[inline(always)]
    pub fn is_by_logit(self) -> bool {
        self.logit != 0.0
    }

    /// Returns how far this shift is above another, as an exponent of 2.
    #[inline(always)]
    pub fn above(self, other: Shift, l: f64) -> f64 {
        (self.exponent - other.exponent) + (self.logit - other.logit) * l
    }
}

/// Rounds `x` to the nearest integer if |x| < 2^51, and returns it unchanged if not.
#[inline(always)]
pub fn nearest(x: f64) -> f64 {
    const SHIFT: f64 = 6_755_399_441_055_744.0; // 1.5·2^52
    if x.abs() < 2_251_799_813_685_248.0 { (x + SHIFT) - SHIFT } else { x }
}

/// The kind of shift that an [`Exp2`] is compiled for.
pub trait ShiftKind: Copy {
    /// Whether `shift.logit` is subtracted from each logit first.
    const BY_LOGIT: bool;
    /// Whether the constants of the polynomial are operands in memory ([`Simd::constant`]).
    const IN_MEMORY: bool = false;
}

/// `shift.logit` is 0: the shift is an integer exponent.
#[derive(Clone, Copy)]
pub struct ByExponent;

/// As [`ByExponent`], in a loop that leaves few registers to constants. Other loops are slower with it.
#[derive(Clone, Copy)]
pub struct ByExponentInMemory;

/// `shift.logit` may be any number.
#[derive(Clone, Copy)]
pub struct ByLogit;

impl ShiftKind for ByExponent {
    const BY_LOGIT: bool = false;
}

impl ShiftKind for ByExponentInMemory {
    const BY_LOGIT: bool = false;
    const IN_MEMORY: bool = true;
}

impl ShiftKind for ByLogit {
    const BY_LOGIT: bool = true;
}

/// How an exponential treats exponents out of range.
pub trait Clamping {
    /// Whether three more instructions clamp the result to the range.
    const CLAMPS: bool;
}

/// The result is right for every x.
pub struct Clamped;

/// The result is right only for exponents in range. The caller checks the bits of [`Power::m`].
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
    /// MAGIC - exponent
    magic: S::Vector,
    table: S::Exp2Table,
}

/// `2^(L·x - c)` as factors.
#[derive(Clone, Copy)]
pub struct Power<S: Simd> {
    /// `1 - C·2^f`
    p: S::Vector,
    /// `-2^(k + j/8)/C`. The sign lets [`Simd::mul_sub`] compute the power.
    scale: S::Vector,
    /// `L·x - c + MAGIC`, rounded. Its low bits are k plus the bias, and j; the others show whether the
    /// exponent is in range ([`Base::IN_RANGE`]), unless it was clamped.
    pub m: S::Vector,
}

impl<S: Simd<Real: Base>, K: ShiftKind> Exp2<S, K> {
    /// Sets every lane to a constant, as `K` says.
    #[inline(always)]
    fn splat<T: Simd>(s: T, x: T::Real) -> T::Vector {
        if K::IN_MEMORY { s.constant(x) } else { s.splat(x) }
    }

    #[inline(always)]
    fn constant(&self, x: S::Real) -> S::Vector {
        Self::splat(self.s, x)
    }

    /// Takes one shift of the kind `K` for all lanes.
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
            slope: Self::splat(s, S::Real::L),
            magic: splat(S::Real::MAGIC.to_f64() - exponent),
            table: s.exp2_table(S::Real::TABLE),
        }
    }

    /// Takes a shift for each lane.
    #[inline(always)]
    pub fn lanes(s: S, logit: S::Vector, exponent: S::Vector) -> Self {
        Exp2 {
            s,
            kind: PhantomData,
            origin: S::Real::ZERO,
            logit,
            slope: Self::splat(s, S::Real::L),
            magic: s.sub(Self::splat(s, S::Real::MAGIC), exponent),
            table: s.exp2_table(S::Real::TABLE),
        }
    }

    /// Returns `(f, m)`. If `C` clamps, m does not exceed [`Base::LAST`], which it is for an x of NaN, and f holds the excess.
    #[inline(always)]
    fn reduce<C: Clamping>(&self, x: S::Vector) -> (S::Vector, S::Vector) {
        let s = self.s;
        let mut m = s.mul_add(x, self.slope, self.magic);
        if C::CLAMPS {
            m = s.min(m, self.constant(S::Real::LAST));
        }
        let n = s.sub(m, self.magic);
        (self.add_low(x, s.mul_sub(x, self.slope, n)), m)
    }

    /// Adds to an exponent what L lacks of its slope.
    #[inline(always)]
    fn add_low(&self, x: S::Vector, t: S::Vector) -> S::Vector {
        if S::Real::LOW == S::Real::ZERO {
            t
        } else {
            self.s.mul_add(x, self.constant(S::Real::LOW), t)
        }
    }

    /// Returns the polynomial without its constant term, divided by f.
    #[inline(always)]
    fn quotient(&self, f: S::Vector) -> S::Vector {
        let s = self.s;
        let (last, others) = S::Real::POLY[1..].split_last().expect("a polynomial");
        let mut q = self.constant(*last);
        for &c in others.iter().rev() {
            q = s.mul_add(q, f, self.constant(c));
        }
        q
    }

    /// Returns the factors for a reduced argument.
    #[inline(always)]
    fn factors(&self, f: S::Vector, m: S::Vector) -> Power<S> {
        let s = self.s;
        let (q, constant) = (self.quotient(f), S::Real::POLY[0]);
        let p = s.mul_add(q, f, self.constant(constant));
        Power { p, scale: s.scale(self.table, m), m }
    }

    /// Returns `2^(L·(x - logit) - exponent)` as factors. Unless `C` clamps, only m is meaningful in lanes
    /// where it is out of range.
    #[inline(always)]
    pub fn power<C: Clamping>(&self, x: S::Vector) -> Power<S> {
        self.s.apart(
            #[inline(always)]
            || {
                let (f, m) = self.reduce::<C>(self.shifted(x));
                self.factors(f, m)
            },
        )
    }

    /// Returns `x - logit`.
    #[inline(always)]
    fn shifted(&self, x: S::Vector) -> S::Vector {
        if K::BY_LOGIT { self.s.sub(x, self.logit) } else { x }
    }

    /// Returns the product of the factors, for an m in range.
    #[inline(always)]
    fn product(&self, Power { p, scale, .. }: Power<S>) -> S::Vector {
        let s = self.s;
        s.mul_sub(scale, p, scale)
    }

    /// Returns the value of a power. Unless `C` clamps, its m has to be in range.
    #[inline(always)]
    pub fn value_of<C: Clamping>(&self, power: Power<S>) -> S::Vector {
        let (s, e) = (self.s, self.product(power));
        if C::CLAMPS { s.keep(s.not_less(power.m, self.constant(S::Real::FIRST)), e) } else { e }
    }

    /// Adds the value of a power to `to`. Unless `C` clamps, its m has to be in range.
    #[inline(always)]
    pub fn add<C: Clamping>(&self, power: Power<S>, to: S::Vector) -> S::Vector {
        self.s.add(self.value_of::<C>(power), to)
    }

    /// Returns `2^(L·x - c)`, within 1 ulp of `b^x·2^-c` (f64: `e^x·2^-c`) in the range that the documentation of
    /// this module states. Unless `C` clamps, m has to be in range.
    #[inline(always)]
    pub fn value<C: Clamping>(&self, x: S::Vector) -> S::Vector {
        self.value_of::<C>(self.power::<C>(x))
    }

    /// Returns the clamped [`value`](Self::value) in lanes where `mask` is set, and 0 in the others, whatever x
    /// is. Unless `C` clamps, an x in a lane that is set is NaN or not above the range.
    #[inline(always)]
    pub fn value_where<C: Clamping>(&self, x: S::Vector, mask: S::Mask) -> S::Vector {
        let (s, power) = (self.s, self.power::<C>(x));
        let held = s.not_less_where(mask, power.m, self.constant(S::Real::FIRST));
        s.keep(held, self.product(power))
    }

    /// Returns `2^(L·(x - logit) - exponent)` in f64, and m, which has to be in range. The relative error in
    /// lanes of f32 is 4e-9, a third of it that of [`POWER`], which is cut to degree 4.
    #[inline(always)]
    pub fn wide_value(&self, x: S::Vector) -> (S::Widened, S::Vector) {
        self.s.apart(
            #[inline(always)]
            || {
                let (s, d) = (self.s, self.s.wide());
                let (f, m) = self.reduce::<Unclamped>(self.shifted(x));
                if S::Real::COMPENSATES {
                    return (s.widen(self.product(self.factors(f, m))), m);
                }
                const DEGREE: usize = 4;
                let (f, mut value) = (s.widen(f), s.widen(s.scale(self.table, m)));
                for (value, &f) in value.as_mut().iter_mut().zip(f.as_ref()) {
                    let mut q = Self::splat(d, POWER[DEGREE]);
                    for i in (1..DEGREE).rev() {
                        q = d.mul_add(q, f, Self::splat(d, POWER[i]));
                    }
                    let power = d.mul_add(q, f, d.splat(1.0));
                    *value = d.mul(d.mul(*value, d.splat(-S::Real::DIVISOR)), power);
                }
                (value, m)
            },
        )
    }

    /// Returns a logit whose exponent is close to 0. It has no meaning after [`lanes`](Self::lanes).
    #[inline(always)]
    pub fn origin(&self) -> S::Real {
        self.origin
    }

    /// Returns `L·(x - logit) - exponent`, the exponent of [`value`](Self::value). It is finite unless x is
    /// NaN, and out of range where x is.
    #[inline(always)]
    pub fn exponent(&self, x: S::Vector) -> S::Vector {
        self.s.apart(
            #[inline(always)]
            || {
                let s = self.s;
                let exponent = s.sub(s.splat(S::Real::MAGIC), self.magic);
                let x = self.shifted(x);
                let t = self.add_low(x, s.mul_sub(x, self.slope, exponent));
                let bias = S::Real::BIAS.to_f64();
                let [low, high] = [-bias, bias + 1.0].map(|t| s.splat(S::Real::from_f64(t)));
                s.min(high, s.max(low, t))
            },
        )
    }

    /// Returns `2^(log2 e·(x - logit) - exponent)`, clamped. It is within 1 ulp of a power of e, as
    /// [`value`](Self::value) is of a power of b, and takes one more fused product.
    #[inline(always)]
    pub fn base_e(&self, x: S::Vector) -> S::Vector {
        self.s.apart(
            #[inline(always)]
            || {
                let s = self.s;
                let x = self.shifted(x);
                let (mut f, m) = self.reduce::<Clamped>(x);
                let lacking = S::Real::L.to_f64() * S::Real::EXCESS;
                if lacking != 0.0 {
                    f = s.mul_add(x, s.splat(S::Real::from_f64(lacking)), f);
                }
                self.value_of::<Clamped>(self.factors(f, m))
            },
        )
    }
}

/// Returns `(L + LOW)·x - by` in f64: the exponent of a logit from that of a shift.
#[inline(always)]
pub fn exponent<S: Simd<Real: Base>>(s: S, x: WideVector<S>, by: WideVector<S>) -> WideVector<S> {
    let d = s.wide();
    let t = d.mul_sub(x, d.splat(S::Real::L.to_f64()), by);
    match S::Real::LOW.to_f64() {
        0.0 => t,
        low => d.mul_add(x, d.splat(low), t),
    }
}

/// Returns `e^x - 1` for x up to 709, within a few ulp near 0 as well.
#[inline(always)]
pub fn minus_one<D: Doubles>(d: D, x: D::Vector) -> D::Vector {
    d.apart(
        #[inline(always)]
        || {
            let (slope, magic) = (d.splat(f64::L), d.splat(WHOLE_MAGIC));
            let x = d.max(d.splat(-f64::BIAS / f64::L), x);
            let m = d.mul_add(x, slope, magic);
            let f = d.mul_add(x, slope, d.sub(magic, m));
            let f = d.mul_add(x, d.splat(f64::LOW), f);
            let (mut q, scale) = (d.splat(POWER[11]), d.power(m));
            for i in (1..11).rev() {
                q = d.mul_add(q, f, d.splat(POWER[i]));
            }
            // `2^k - 1` is exact, or far larger than its rounding error.
            d.mul_add(d.mul(q, f), scale, d.sub(scale, d.splat(1.0)))
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dispatch::Isa;
    use crate::math::double_double::Dd;
    use crate::math::scalar;
    use crate::sample::{blocks, some_of};
    use crate::simd::on_isa::{available, on_isa};
    use rayon::prelude::*;

    /// A function of [`Exp2`].
    #[derive(Clone, Copy, Debug, PartialEq)]
    enum Function {
        /// [`Exp2::value`] with one shift.
        Value,
        /// [`Exp2::value`] with a shift for each lane, all of them the same.
        Lanes,
        /// [`Exp2::base_e`]
        BaseE,
        /// [`Exp2::exponent`]
        Exponent,
    }

    on_isa! {
        /// 64 results in lanes of f32.
        fn values(function: Function, shift: Shift, x: &[f32; 64]) -> [f32; 64] =
            |s| all(s, function, shift, x);
        /// 64 results in lanes of f64.
        fn wide_values(function: Function, shift: Shift, x: &[f64; 64]) -> [f64; 64] =
            |s| all(s.wide(), function, shift, x);
        /// 64 results of [`Exp2::minus_one`].
        fn values_minus_one(x: &[f64; 64]) -> [f64; 64] = |s| all_minus_one(s.wide(), x);
    }

    #[inline(always)]
    fn all<S: Simd<Real: Base>>(
        s: S,
        function: Function,
        shift: Shift,
        x: &[S::Real; 64],
    ) -> [S::Real; 64] {
        #[inline(always)]
        fn shifted<S: Simd<Real: Base>, K: ShiftKind>(
            s: S,
            function: Function,
            shift: Shift,
            x: &[S::Real; 64],
        ) -> [S::Real; 64] {
            let splat = |x: f64| s.splat(S::Real::from_f64(x));
            let exp2 = match function {
                Function::Lanes => {
                    Exp2::<S, K>::lanes(s, splat(shift.logit), splat(shift.exponent))
                }
                Function::Value | Function::BaseE | Function::Exponent => {
                    Exp2::<S, K>::new(s, shift)
                }
            };
            each_register(s, x, |x| match function {
                Function::Value | Function::Lanes => exp2.value::<Clamped>(x),
                Function::BaseE => exp2.base_e(x),
                Function::Exponent => exp2.exponent(x),
            })
        }
        if shift.is_by_logit() {
            shifted::<S, ByLogit>(s, function, shift, x)
        } else {
            shifted::<S, ByExponent>(s, function, shift, x)
        }
    }

    #[inline(always)]
    fn all_minus_one<D: Doubles>(d: D, x: &[f64; 64]) -> [f64; 64] {
        each_register(d, x, |x| super::minus_one(d, x))
    }

    #[inline(always)]
    fn each_register<S: Simd>(
        s: S,
        x: &[S::Real; 64],
        f: impl Fn(S::Vector) -> S::Vector,
    ) -> [S::Real; 64] {
        let mut out = [S::Real::ZERO; 64];
        for at in (0..64).step_by(S::LANES) {
            // SAFETY: `LANES` divides 64, so a register from `at` on lies within both arrays.
            unsafe { s.store(out.as_mut_ptr().add(at), f(s.load(x.as_ptr().add(at)))) };
        }
        out
    }

    /// The kind of result that an exponent has to give.
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

    /// Checks the 64 results of ascending or descending arguments on each set, and raises `worst` to the
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
                // The block straddles a border. Its neighbours show that the border is right.
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

    /// All 2^32 arguments on every instruction set. All give the same bits.
    #[test]
    fn exhaustive() {
        let sets = available();
        let shift = Shift::ZERO;
        let worst = (0..1u32 << 16)
            .into_par_iter()
            .map(|high| {
                let mut worst = [0.0f64];
                for low in blocks(0..1 << 16, 64, high) {
                    let x: [f32; 64] =
                        std::array::from_fn(|i| f32::from_bits(high << 16 | low | i as u32));
                    let mut results = [[0.0; 64]; 3];
                    for (&isa, e) in sets.iter().zip(&mut results) {
                        *e = values(isa, Function::Value, shift, &x);
                    }
                    let results = &results[..sets.len()];
                    let bits = |e: &[f32; 64]| e.map(f32::to_bits);
                    let first = bits(&results[0]);
                    assert!(results.iter().all(|e| bits(e) == first), "{x:?}");
                    check(shift, &x, &results[..1], &mut worst);
                }
                worst
            })
            .reduce(|| [0.0], |[a], [b]| [a.max(b)]);
        println!("at most {:.4} ulp", worst[0]);
        assert!(worst[0] <= 1.0);
    }

    /// A shift far from 0 keeps the accuracy.
    #[test]
    fn shifts() {
        for at in [-4.5e4f32, -1e4, -0.3, 7.0, 1e4, 4.5e4, 4.55e4, 1e7, -3e30, 3e38] {
            let shift = Shift::at::<f32>(at);
            let step = (at.abs() * f32::EPSILON).max(0.01);
            for isa in available() {
                let mut worst = [0.0];
                for k in 0..200 {
                    let x = std::array::from_fn(|i| at - step * (k * 64 + i) as f32);
                    let e = values(isa, Function::Value, shift, &x);
                    check(shift, &x, &[e], &mut worst);
                }
                assert!(worst[0] <= 1.0, "{isa:?} at {at}: {} ulp", worst[0]);
            }
        }
    }

    /// Results are within 1 ulp of powers of e wherever these are normal numbers. All sets give the same
    /// bits.
    #[test]
    fn base_e() {
        for at in [-4.5e4f32, -1e4, -0.3, 0.0, 7.0, 1e4, 4.5e4, 4.55e4, 1e7, -3e30] {
            let shift = Shift::at::<f32>(at);
            let step = (at.abs() * f32::EPSILON).max(1e-3);
            let (mut worst, mut other) = (0f64, None);
            for isa in available() {
                let mut all = Vec::new();
                for k in 0..2000 {
                    let x: [f32; 64] = std::array::from_fn(|i| at - step * (k * 64 + i) as f32);
                    let e = values(isa, Function::BaseE, shift, &x);
                    for (x, e) in x.into_iter().zip(e) {
                        let log2_e = Dd { hi: f64::L, lo: f64::LOW };
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
                let first = &*other.get_or_insert_with(|| all.clone());
                assert!(*first == all, "{isa:?} at {at}");
            }
        }
    }

    /// Shifts of f64 by an integer and by a logit, up to the limits of each, with the logits that they
    /// are for.
    fn shifts_of_doubles() -> Vec<(f64, Shift)> {
        let last = f64::MAX_SHIFT / f64::L;
        [0.0, 0.3, -1e3, 7e5, -1e10, last, -last, last * 1.01, -4e15, 1e16, -3e200, 1e308]
            .into_iter()
            .map(|at: f64| (at, Shift::at::<f64>(at)))
            .collect()
    }

    /// Logits with exponents from below the least to above the largest: evenly spaced, dense at the
    /// borders, and a few far away.
    fn logits_around(at: f64, shift: Shift) -> Vec<[f64; 64]> {
        let ulp = f64::from_bits(at.abs().to_bits() + 1) - at.abs();
        let mut x = Vec::new();
        let center = if shift.is_by_logit() { shift.logit } else { shift.exponent / f64::L };
        for i in -24_000..24_000 {
            x.push(center + f64::from(i) * (1100.0 / 24_000.0 / f64::L));
        }
        for border in [-1022.9375, -1021.9375, -0.5, -0.0625, 0.0, 0.0625, 1023.9375, 1024.0] {
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

    /// `log2 e·(x - logit) - exponent` in double-double; None if it overflows or is NaN.
    fn exact_exponent(x: f64, shift: Shift) -> Option<Dd> {
        let d = Dd::sum(x, -shift.logit);
        if !d.hi.is_finite() || d.hi.abs() > 1e290 {
            return None;
        }
        Some(d * Dd { hi: f64::L, lo: f64::LOW } - Dd::from(shift.exponent))
    }

    /// Results are within 1 ulp of double-double, and right at the ends of the range. All sets give
    /// the same bits.
    #[test]
    fn exact_doubles() {
        let sets = available();
        let mut worst = vec![0f64; sets.len()];
        for (at, shift) in shifts_of_doubles() {
            for x in some_of(logits_around(at, shift)) {
                let mut other = None;
                for (&isa, worst) in sets.iter().zip(&mut worst) {
                    let got = wide_values(isa, Function::Value, shift, &x);
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
                        // On a border, the results of both sides are right.
                        let border = |at: f64| (t.hi - at).abs() < 1e-9;
                        match t.hi {
                            t if t > 1024.0 && !border(1024.0) => {
                                assert_eq!(e, f64::INFINITY, "{}", what());
                            }
                            t if t > 1023.9375 || border(1023.9375) => {
                                assert!(e > 0.95 * f64::MAX, "{}", what());
                            }
                            t if t < -1021.9375 => {
                                let zero = t < -1022.9375 && !border(-1022.9375);
                                let low = (0.0..=2.0 * f64::MIN_POSITIVE).contains(&e);
                                assert!(low, "{}", what());
                                assert!(e == 0.0 || !zero, "{}", what());
                            }
                            _ => {
                                let (m, k) = t.exp2();
                                // Scaling in two steps keeps both factors normal numbers.
                                let (up, ulp) = ((-k).clamp(-1000, 1000), f64::EPSILON);
                                let e = e * 2f64.powi(up) * 2f64.powi(-k - up);
                                let ulp = if m.hi < 1.0 { ulp / 2.0 } else { ulp };
                                let off = ((e - m.hi) - m.lo).abs() / ulp;
                                *worst = worst.max(off);
                                assert!(off <= 1.0, "{}: {off} ulp", what());
                            }
                        }
                    }
                    let bits = got.map(f64::to_bits);
                    assert!(*other.get_or_insert(bits) == bits, "{x:?} on {}", isa.name());
                }
            }
        }
        for (isa, worst) in sets.iter().zip(worst) {
            println!("{isa:?}: at most {worst:.4} ulp");
        }
    }

    /// The exponent is rounded twice.
    #[test]
    fn exponents_of_doubles() {
        for (at, shift) in shifts_of_doubles() {
            for x in logits_around(at, shift) {
                for isa in available() {
                    let got = wide_values(isa, Function::Exponent, shift, &x);
                    for (&x, got) in x.iter().zip(got) {
                        match exact_exponent(x, shift) {
                            Some(t) if t.hi.abs() < 1000.0 => {
                                let off = ((got - t.hi) - t.lo).abs();
                                let what = isa.name();
                                assert!(off <= t.hi.abs() * 2.3e-16, "{x:e}, {shift:?}: {what}");
                            }
                            // The exponent is clamped, but still out of range.
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

    /// A shift for each lane gives results within 1 ulp of one shift for all, and the same at the ends.
    fn lanes_agree<R: Base>(
        values: fn(Isa, Function, Shift, &[R; 64]) -> [R; 64],
        shift: Shift,
        x: &[R; 64],
        [epsilon, least]: [f64; 2],
    ) {
        for isa in available() {
            let [one, each] =
                [Function::Value, Function::Lanes].map(|function| values(isa, function, shift, x));
            for ((x, one), each) in x.iter().zip(one).zip(each) {
                let (a, b) = (one.to_f64(), each.to_f64());
                let both_nan = a.is_nan() && b.is_nan();
                // Half an ulp of the larger is at most 1 ulp of either.
                let close = (a - b).abs() <= epsilon * a.min(b) && a.is_finite();
                // Below the smallest normal number, a result is 0 or close to that number.
                let edge = a.max(b) <= 2.0 * least && a >= 0.0 && b >= 0.0;
                let good = both_nan || a == b || close || edge;
                assert!(good, "{x:?} from {shift:?} on {}: {a:e} and {b:e}", isa.name());
            }
        }
    }

    #[test]
    fn a_shift_for_each_lane() {
        for (at, shift) in shifts_of_doubles() {
            for x in logits_around(at, shift) {
                lanes_agree(wide_values, shift, &x, [f64::EPSILON, f64::MIN_POSITIVE]);
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
                lanes_agree(values, shift, &x, ends);
            }
        }
    }

    /// The relative error of `2^(L·x) - 1` is at most 3·2^-53 down to the smallest x. Far below 0 the
    /// result is -1.
    #[test]
    fn minus_one() {
        let mut x: Vec<f64> = (1..3000).map(|i| f64::from(i) * (709.0 / 3000.0)).collect();
        x.extend((0..9000).map(|i| 700.0 * (f64::from(i) * -0.075).exp()));
        x.extend((1..3000).map(|i| f64::from(i) / 3000.0));
        let mut x: Vec<f64> = x.into_iter().flat_map(|x| [x, -x]).collect();
        x.resize(x.len().next_multiple_of(64), 0.0);
        let sets = available();
        let mut worst = vec![0f64; sets.len()];
        for x in x.chunks(64) {
            let x: &[f64; 64] = x.try_into().unwrap();
            let want: [Dd; 64] = x.map(|x| Dd::from(x).expm1());
            let mut other = None;
            for (&isa, worst) in sets.iter().zip(&mut worst) {
                let got = values_minus_one(isa, x);
                for ((x, got), want) in x.iter().zip(got).zip(want) {
                    if (got - want.hi).abs() <= 1e-323 {
                        continue;
                    }
                    let units = want.error(got) / (f64::EPSILON / 2.0);
                    *worst = worst.max(units);
                    assert!(units <= 3.0, "{x:e} on {}: {got:e}, {want:?}", isa.name());
                }
                let bits = got.map(f64::to_bits);
                assert!(*other.get_or_insert(bits) == bits, "{x:?} on {}", isa.name());
            }
        }
        for (isa, worst) in sets.into_iter().zip(worst) {
            println!("{isa:?}: at most {worst:.4} times 2^-53");
            let mut x = [0.0; 64];
            x[..4].copy_from_slice(&[f64::NEG_INFINITY, f64::MIN, -800.0, f64::NAN]);
            let got = values_minus_one(isa, &x);
            assert!(got[..3] == [-1.0; 3] && got[3].is_nan() && got[4..] == [0.0; 60], "{got:?}");
        }
    }
}
