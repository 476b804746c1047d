//! Products whose factors may leave the range of f64 on the way, though the end does not: a scale
//! of 1e300 over a denominator of 1e200, say. For what is rare; the digits are those of f64.

/// `part·2^exponent`. A part is 0, not finite, or of a size in [1, 2); the first two have an
/// exponent of 0.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scaled {
    part: f64,
    exponent: i64,
}

impl Scaled {
    /// The number itself.
    pub fn of(x: f64) -> Scaled {
        if x == 0.0 || !x.is_finite() {
            return Scaled { part: x, exponent: 0 };
        }
        // A subnormal number has no exponent of its own.
        let (x, up) = if x.is_normal() { (x, 0) } else { (x * power_of_2(64), 64) };
        let biased = (x.to_bits() >> 52 & 0x7ff) as i64;
        let part = f64::from_bits(x.to_bits() & !(0x7ff << 52) | 1023 << 52);
        Scaled { part, exponent: biased - 1023 - up }
    }

    fn new(part: f64, exponent: i64) -> Scaled {
        let part = Scaled::of(part);
        if part.is_ordinary() {
            Scaled { exponent: part.exponent + exponent, ..part }
        } else {
            part
        }
    }

    fn is_ordinary(self) -> bool {
        self.part != 0.0 && self.part.is_finite()
    }

    /// `self·x`
    #[must_use]
    pub fn times(self, x: f64) -> Scaled {
        let x = Scaled::of(x);
        Scaled::new(self.part * x.part, self.exponent + x.exponent)
    }

    /// `self/x`
    #[must_use]
    pub fn over(self, x: f64) -> Scaled {
        let x = Scaled::of(x);
        Scaled::new(self.part / x.part, self.exponent - x.exponent)
    }

    /// `self + other`
    #[must_use]
    pub fn plus(self, other: Scaled) -> Scaled {
        if !(self.is_ordinary() && other.is_ordinary()) {
            return match (self.part == 0.0, other.part == 0.0) {
                (true, false) => other,
                (false, true) => self,
                _ => Scaled::of(self.part + other.part),
            };
        }
        let top = self.exponent.max(other.exponent);
        Scaled::new(self.down(top) + other.down(top), top)
    }

    /// `self/2^by` in the range of f64.
    pub fn down(self, by: i64) -> f64 {
        // Beyond is beyond; one power of two has too short a range.
        let exponent = if self.is_ordinary() { (self.exponent - by).clamp(-1200, 1200) } else { 0 };
        let half = exponent / 2;
        self.part * power_of_2(half) * power_of_2(exponent - half)
    }

    /// `self·2^by`
    #[must_use]
    pub fn up(self, by: i64) -> Scaled {
        Scaled::new(self.part, self.exponent + by)
    }

    /// The number in the range of f64.
    pub fn to_f64(self) -> f64 {
        self.down(0)
    }

    /// Whether it is NaN or infinite, as a number that it was made of is.
    pub fn is_finite(self) -> bool {
        self.part.is_finite()
    }

    /// Whether it is 0.
    pub fn is_zero(self) -> bool {
        self.part == 0.0
    }

    /// The power of two that is next below; None for 0 and what is not finite.
    pub fn exponent(self) -> Option<i64> {
        self.is_ordinary().then_some(self.exponent)
    }

    /// 0, or so near to 1 that a few such factors make none that is out of f64's range.
    pub fn is_moderate(self) -> bool {
        self.part == 0.0 || self.part.is_finite() && (-200..200).contains(&self.exponent)
    }
}

/// `2^k`, for k in -1022..=1023.
fn power_of_2(k: i64) -> f64 {
    f64::from_bits(((k + 1023) as u64) << 52)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NUMBERS: [f64; 12] = [
        1.0,
        -1.5,
        3.0,
        0.1,
        f64::MAX,
        f64::MIN,
        f64::MIN_POSITIVE,
        5e-324,
        -7e-310,
        1e300,
        -1e-300,
        0.0,
    ];

    #[test]
    fn there_and_back() {
        for x in NUMBERS.into_iter().chain([f64::INFINITY, f64::NEG_INFINITY]) {
            assert_eq!(Scaled::of(x).to_f64(), x);
        }
        assert!(Scaled::of(f64::NAN).to_f64().is_nan());
    }

    #[test]
    fn as_f64_within_its_range() {
        for a in NUMBERS {
            for b in NUMBERS {
                let x = Scaled::of(a);
                for (got, want) in [
                    (x.times(b).to_f64(), a * b),
                    (x.over(b).to_f64(), a / b),
                    (x.plus(Scaled::of(b)).to_f64(), a + b),
                ] {
                    // Subnormal results are rounded twice.
                    let bound = if want.abs() < f64::MIN_POSITIVE { 5e-324 } else { 0.0 };
                    let is_close = got == want || (got - want).abs() <= bound;
                    assert!(is_close || got.is_nan() && want.is_nan(), "{a:e} {b:e}: {got:e}");
                }
            }
        }
    }

    #[test]
    fn beyond_it() {
        let huge = NUMBERS[4];
        let x = Scaled::of(huge).times(huge).times(huge);
        assert_eq!(x.to_f64(), f64::INFINITY);
        assert_eq!(x.over(huge).over(huge).to_f64(), huge);
        assert_eq!(x.plus(Scaled::of(-1.0)), x);
        assert_eq!(x.plus(x.times(-1.0)).to_f64(), 0.0);
        let tiny = Scaled::of(5e-324).times(5e-324);
        assert_eq!((tiny.to_f64(), tiny.is_zero()), (0.0, false));
        assert_eq!(tiny.over(5e-324).to_f64(), 5e-324);
        assert_eq!(tiny.exponent(), Some(-2148));
        assert_eq!(tiny.down(-2148), 1.0);
        assert!(!Scaled::of(1.0).over(0.0).is_finite());
    }
}
