//! Double-double arithmetic with some 30 digits, by which tests judge f64.
//!
//! A number is the unevaluated sum of two f64. Sums and products carry their rounding errors along
//! (Knuth, Dekker). Functions are Taylor series. The formulas are not those of the functions under test,
//! except that both split off a power of 2.

use std::f64::consts;
use std::ops::{Add, Div, Mul, Sub};

/// `hi + lo`, `|lo|` at most half an ulp of `hi`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dd {
    pub hi: f64,
    pub lo: f64,
}

impl Dd {
    pub const LN_2: Dd = Dd { hi: consts::LN_2, lo: 2.319_046_813_846_299_6e-17 };

    pub fn from(x: f64) -> Dd {
        Dd { hi: x, lo: 0.0 }
    }

    /// Returns `a + b`, exactly.
    pub fn sum(a: f64, b: f64) -> Dd {
        let hi = a + b;
        let t = hi - a;
        Dd { hi, lo: (a - (hi - t)) + (b - t) }
    }

    /// Returns `a·b`, exactly.
    pub fn product(a: f64, b: f64) -> Dd {
        let hi = a * b;
        Dd { hi, lo: a.mul_add(b, -hi) }
    }

    /// Returns `self·2^k`, which has to be far from overflow and underflow.
    pub fn scaled(self, k: i32) -> Dd {
        let scale = 2f64.powi(k);
        Dd { hi: self.hi * scale, lo: self.lo * scale }
    }

    /// Returns `(k, r)` with `self = k·unit + r`, k an integer and r small.
    fn reduced(self, unit: Dd) -> (i32, Dd) {
        let k = (self.hi / unit.hi).round();
        (k as i32, self - unit * Dd::from(k))
    }

    /// Returns `e^self - 1` of a small number.
    fn expm1_small(self) -> Dd {
        let one = Dd::from(1.0);
        let series = |s, n| one + self * s / Dd::from(f64::from(n));
        self * (2..=30).rev().fold(one, series)
    }

    /// Returns `(m, k)` with `e^self = m·2^k` and m in [0.7, 1.42].
    pub fn exp(self) -> (Dd, i32) {
        let (k, r) = self.reduced(Dd::LN_2);
        (Dd::from(1.0) + r.expm1_small(), k)
    }

    /// Returns `(m, k)` with `2^self = m·2^k` and m in [0.7, 1.42].
    pub fn exp2(self) -> (Dd, i32) {
        let (k, r) = self.reduced(Dd::from(1.0));
        (Dd::from(1.0) + (r * Dd::LN_2).expm1_small(), k)
    }

    /// Returns `e^self - 1` of a number up to 709.
    pub fn expm1(self) -> Dd {
        let (k, r) = self.reduced(Dd::LN_2);
        if k == 0 {
            return r.expm1_small();
        }
        // Far below 0, 2^k would underflow.
        let k = k.max(-200);
        (Dd::from(1.0) + r.expm1_small()).scaled(k) - Dd::from(1.0)
    }

    /// Returns `2·atanh(self)` of a number up to 1/3.
    fn twice_atanh(self) -> Dd {
        let z = self * self;
        let series = |s, n: i32| z * s + Dd::from(1.0) / Dd::from(f64::from(2 * n + 1));
        let one = (0..=36).rev().fold(Dd::from(0.0), series);
        (self + self) * one
    }

    /// Returns `ln(1 + x)` for x in [0, 1].
    pub fn ln_1p(x: f64) -> Dd {
        (Dd::from(x) / Dd::sum(2.0, x)).twice_atanh()
    }

    /// Returns log2 of a positive normal number.
    pub fn log2(x: f64) -> Dd {
        let mut k = ((x.to_bits() >> 52) as i32) - 1023;
        let mut m = f64::from_bits(x.to_bits() & (u64::MAX >> 12) | 1023 << 52);
        if m > consts::SQRT_2 {
            (m, k) = (m / 2.0, k + 1);
        }
        let ln = (Dd::sum(m, -1.0) / Dd::sum(m, 1.0)).twice_atanh();
        ln / Dd::LN_2 + Dd::from(k.into())
    }

    /// Returns `(tanh u, 1 - tanh² u)` for u in [0, 350].
    pub fn tanh(u: f64) -> (Dd, Dd) {
        let one = Dd::from(1.0);
        let e = Dd::from(2.0 * u).expm1();
        let (exp, above) = (e + one, e + one + one);
        (e / above, Dd::from(4.0) / above * (exp / above))
    }

    /// Returns the relative error of `x` as an approximation of `self`.
    pub fn error(self, x: f64) -> f64 {
        let off = ((x - self.hi) - self.lo).abs();
        if off == 0.0 { 0.0 } else { off / self.hi.abs() }
    }
}

impl Add for Dd {
    type Output = Dd;
    fn add(self, other: Dd) -> Dd {
        let (hi, lo) = (Dd::sum(self.hi, other.hi), Dd::sum(self.lo, other.lo));
        let sum = Dd::sum(hi.hi, hi.lo + lo.hi);
        Dd::sum(sum.hi, sum.lo + lo.lo)
    }
}

impl Sub for Dd {
    type Output = Dd;
    fn sub(self, other: Dd) -> Dd {
        self + Dd { hi: -other.hi, lo: -other.lo }
    }
}

impl Mul for Dd {
    type Output = Dd;
    fn mul(self, other: Dd) -> Dd {
        let p = Dd::product(self.hi, other.hi);
        Dd::sum(p.hi, p.lo + (self.hi * other.lo + self.lo * other.hi))
    }
}

impl Div for Dd {
    type Output = Dd;
    fn div(self, other: Dd) -> Dd {
        let first = self.hi / other.hi;
        let rest = self - other * Dd::from(first);
        let second = rest.hi / other.hi;
        let rest = rest - other * Dd::from(second);
        Dd::sum(first, second) + Dd::from(rest.hi / other.hi)
    }
}

/// Compares double-double with constants, with identities that the series do not use, and with the
/// standard library.
#[test]
fn double_double() {
    let near = |a: Dd, b: Dd, what: &str| {
        let off = (a - b).hi.abs() / b.hi.abs();
        assert!(off < 1e-30, "{what}: {a:?} {b:?}");
    };
    let e = Dd { hi: consts::E, lo: 1.445_646_891_729_250_2e-16 };
    let (m, k) = Dd::from(1.0).exp();
    near(m.scaled(k), e, "e");
    near(Dd::ln_1p(1.0), Dd::LN_2, "ln 2");
    let log2_e = Dd { hi: consts::LOG2_E, lo: 2.035_527_374_093_103_3e-17 };
    near(Dd::from(1.0) / Dd::LN_2, log2_e, "log2 e");
    let one = Dd::from(1.0);
    for i in 1..200 {
        let x = f64::from(i) / 200.0;
        let (m, k) = Dd::ln_1p(x).exp();
        near(m.scaled(k), Dd::sum(1.0, x), "exp of ln");
        let (m, k) = Dd::log2(x).exp2();
        near(m.scaled(k), Dd::from(x), "exp2 of log2");
        let (t, slope) = Dd::tanh(5.0 * x);
        near(t * t + slope, one, "tanh² + sech²");
        let double = (t + t) / (one + t * t);
        near(Dd::tanh(10.0 * x).0, double, "tanh of twice that");
        let close = |a: Dd, b: f64| assert!(a.error(b) < 1e-15, "{a:?} {b:e}");
        for x in [x * 700.0, x * -700.0, x * 1e-9] {
            let (m, k) = Dd::from(x).exp();
            close(m, x.exp() / 2f64.powi(k));
            close(Dd::from(x).expm1(), x.exp_m1());
        }
        close(Dd::ln_1p(x * 1e-9), (x * 1e-9).ln_1p());
        close(Dd::log2(1.0 + x), (1.0 + x).log2());
        close(Dd::tanh(x).0, x.tanh());
    }
}
