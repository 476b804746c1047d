//! Fused multiply-add for builds whose target has no such instruction: `a * b + c`, rounded once.
//!
//! The platform's own `fma` is no substitute: it takes one number at a time, and that of MinGW rounds twice.
//! The method is Boldo and Melquiond, *Emulation of a FMA and correctly rounded sums: proved algorithms using
//! rounding to odd*, IEEE Transactions on Computers 57 (2008): a sum that is rounded to odd, with at least two
//! bits more than the result, and then to nearest, is as if rounded once.
//!
//! Kernels call these functions, which pass vectors through memory. Inlined, they would be most of a kernel's
//! code.

use wide::{f32x8, f64x4, u64x4};

/// `a * b + c` in lanes of f32.
#[inline(never)]
pub fn mul_add(a: f32x8, b: f32x8, c: f32x8) -> f32x8 {
    let (a, b, c) = (widen(a), widen(b), widen(c));
    // An f64 holds the product of two f32. No sum of it and an f32 is subnormal or overflows in f64, and
    // subnormal results in f32 only have fewer bits.
    narrow([odd_sum(a[0] * b[0], c[0]), odd_sum(a[1] * b[1], c[1])])
}

/// `a * b + c` in lanes of f64.
#[inline(never)]
pub fn mul_add_wide(a: f64x4, b: f64x4, c: f64x4) -> f64x4 {
    // Nothing below overflows if the operands are at most `MOST`. A product or an addend of at least `LEAST`
    // has an ulp so large that what the other loses to underflow does not change the result. NaN and infinity
    // fail the first comparison.
    const MOST: f64 = f64::from_bits((1023 + 500) << 52);
    const LEAST: f64 = f64::from_bits((1023 - 700) << 52);
    let size = a.abs() + b.abs() + c.abs();
    let product = a * b;
    let in_range =
        size.simd_lt(f64x4::splat(MOST)) & f64x4::splat(LEAST).simd_lt(product.abs() + c.abs());
    if in_range.to_bitmask() != 0b1111 {
        return one_by_one(a, b, c);
    }
    // Dekker's product: the halves of 26 bits have exact products.
    let halves = |x: f64x4| {
        let shifted = x * f64x4::splat(134_217_729.0);
        let high = shifted - (shifted - x);
        (high, x - high)
    };
    let ((a_high, a_low), (b_high, b_low)) = (halves(a), halves(b));
    let rest = ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low;
    let (low, low_error) = sum(c, rest);
    let (high, high_error) = sum(product, low);
    high + odd_sum(low_error, high_error)
}

/// `a * b + c` in lanes of f64 of any size.
#[cold]
#[inline(never)]
fn one_by_one(a: f64x4, b: f64x4, c: f64x4) -> f64x4 {
    let (a, b, c) = (a.to_array(), b.to_array(), c.to_array());
    f64x4::from(std::array::from_fn(|i| libm::fma(a[i], b[i], c[i])))
}

/// The sum, rounded to nearest, and what the rounding took from it (Knuth's TwoSum).
#[inline(always)]
fn sum(a: f64x4, b: f64x4) -> (f64x4, f64x4) {
    let sum = a + b;
    let from_b = sum - a;
    (sum, (a - (sum - from_b)) + (b - from_b))
}

/// The sum rounded to odd: if it is not exact, the one of its two neighbours whose last bit is set.
#[inline(always)]
fn odd_sum(a: f64x4, b: f64x4) -> f64x4 {
    let bits = |v: f64x4| u64x4::from(v.to_array().map(f64::to_bits));
    let (sum, error) = sum(a, b);
    // The error is NaN beside an infinity, which stays.
    let inexact = bits(f64x4::ZERO.simd_lt(error.abs()));
    // An error towards 0 has the sign that the sum has not.
    let towards_zero = (bits(sum) ^ bits(error)) >> 63;
    let odd: u64x4 = (bits(sum) - (towards_zero & inexact)) | (inexact & u64x4::splat(1));
    f64x4::from(odd.to_array().map(f64::from_bits))
}

/// The lanes in f64.
#[inline(always)]
pub fn widen(v: f32x8) -> [f64x4; 2] {
    let v = v.to_array();
    [0, 4].map(|from| f64x4::from(std::array::from_fn(|i| f64::from(v[from + i]))))
}

/// The lanes in f32, rounded to nearest.
#[inline(always)]
pub fn narrow(v: [f64x4; 2]) -> f32x8 {
    let v = v.map(f64x4::to_array);
    f32x8::from(std::array::from_fn(|i| v[i / 4][i % 4] as f32))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rayon::prelude::*;

    /// Numbers of which many are hostile: few bits set, many bits set, zeros, subnormals, infinities, NaN.
    struct Numbers(u64);

    impl Numbers {
        fn next(&mut self) -> u64 {
            // SplitMix64.
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let x = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            x ^ (x >> 31)
        }

        /// A number with so many bits of fraction and exponent, whose exponents are near one another in most
        /// turns.
        fn bits(&mut self, turn: u64, fraction: u32, exponent: u32) -> u64 {
            let (x, y) = (self.next(), self.next());
            let all = (1 << exponent) - 1;
            let bias = all / 2;
            let e = match turn % 6 {
                0 => y,
                1 => bias - 16 + y % 32,
                // The product is subnormal, or nearly.
                2 => bias / 2 - 32 + y % 64,
                3 => y % 64,
                4 => all - y % 64,
                _ => bias - u64::from(fraction) + y % (2 * u64::from(fraction)),
            };
            let m = match y >> 60 {
                0..6 => x,
                6..8 => x & 0xf | (x >> 4 & 0xf) << (fraction - 4),
                8..10 => !(x & 0xf),
                10..12 => 1 << (x % u64::from(fraction)),
                12..14 => 0,
                _ => x & !0 << (fraction / 2),
            };
            (x >> 63) << (fraction + exponent) | (e & all) << fraction | m & ((1 << fraction) - 1)
        }
    }

    macro_rules! against {
        ($name:ident, $real:ident, $lanes:expr, $fraction:expr, $exponent:expr, $fused:expr) => {
            /// Compares random and hostile operands with an exact `fma`.
            fn $name(exact: fn($real, $real, $real) -> $real) {
                let turns = if std::env::var_os("XENT_TEST_STRIDE").is_some() { 16 } else { 256 };
                (0..turns).into_par_iter().for_each(|seed| {
                    let mut numbers = Numbers(seed << 32);
                    for turn in 0..1024 {
                        let mut draw = || {
                            std::array::from_fn::<_, $lanes, _>(|_| {
                                $real::from_bits(numbers.bits(turn, $fraction, $exponent) as _)
                            })
                        };
                        let (a, b, mut c) = (draw(), draw(), draw());
                        for i in 0..$lanes {
                            match turn / 8 % 4 {
                                // The sum cancels, or loses all but a sticky bit of one side.
                                0 => c[i] = -(a[i] * b[i]),
                                1 => c[i] = (a[i] * b[i]) * (1u64 << (i * 16 % 60)) as $real,
                                _ => {}
                            }
                        }
                        let got = ($fused)(a.into(), b.into(), c.into()).to_array();
                        for (i, got) in got.into_iter().enumerate() {
                            let good = exact(a[i], b[i], c[i]);
                            assert!(
                                got.to_bits() == good.to_bits() || got.is_nan() && good.is_nan(),
                                "{:e} * {:e} + {:e} = {good:e}, not {got:e}",
                                a[i],
                                b[i],
                                c[i],
                            );
                        }
                    }
                });
            }
        };
    }
    against!(f32_agrees_with, f32, 8, 23, 8, mul_add);
    against!(f64_agrees_with, f64, 4, 52, 11, mul_add_wide);

    /// On a processor with the instruction: the emulation has its bits.
    #[test]
    fn as_the_instruction() {
        #[cfg(target_arch = "x86_64")]
        {
            #[target_feature(enable = "fma")]
            fn f32_fma(a: f32, b: f32, c: f32) -> f32 {
                a.mul_add(b, c)
            }
            #[target_feature(enable = "fma")]
            fn f64_fma(a: f64, b: f64, c: f64) -> f64 {
                a.mul_add(b, c)
            }
            if is_x86_feature_detected!("fma") {
                // SAFETY: the processor has the instruction, by the detection above.
                f32_agrees_with(|a, b, c| unsafe { f32_fma(a, b, c) });
                // SAFETY: the processor has the instruction, by the detection above.
                f64_agrees_with(|a, b, c| unsafe { f64_fma(a, b, c) });
                return;
            }
        }
        #[cfg(any(target_feature = "fma", target_arch = "aarch64"))]
        {
            f32_agrees_with(f32::mul_add);
            return f64_agrees_with(f64::mul_add);
        }
        #[cfg(not(any(target_feature = "fma", target_arch = "aarch64")))]
        println!("SKIPPED: this processor has no fused multiply-add");
    }

    /// On every processor: the integer arithmetic of the crate libm.
    #[test]
    fn as_integers() {
        f64_agrees_with(libm::fma);
    }

    /// The roundings that two steps get wrong: just beside halfway, for a normal and a subnormal f32, and in f64.
    #[test]
    fn beside_halfway() {
        let two = |e: i32| 2f64.powi(e);
        let single = |a: f64, b: f64, c: f64| {
            let [a, b, c] = [a, b, c].map(|x| f32x8::splat(x as f32));
            f64::from(mul_add(a, b, c).to_array()[0])
        };
        // 1 + 2^-24 is halfway, and 2^-60 lies beyond an f64.
        let above = 1.0 + two(-23);
        assert_eq!(single(two(-30), two(-30), above), above);
        assert_eq!(single(two(-12) + two(-35), two(-12), 1.0), above);
        assert_eq!(single(two(-12) - two(-36), two(-12), 1.0), 1.0);
        // 2^-150 is half of the smallest f32.
        assert_eq!(single(two(-75) + two(-98), two(-75), two(-127)), two(-127) + two(-149));
        assert_eq!(single(two(-75) - two(-99), two(-75), two(-127)), two(-127));
        let double =
            |a, b, c| mul_add_wide(f64x4::splat(a), f64x4::splat(b), f64x4::splat(c)).to_array()[0];
        assert_eq!(double(two(-26) + two(-78), two(-27), 1.0), 1.0 + two(-52));
        assert_eq!(double(two(-26) - two(-79), two(-27), 1.0), 1.0);
        // Here the product loses its low half to underflow.
        assert_eq!(double(two(-537) + two(-589), two(-538), two(-1030)), two(-1030) + two(-1074));
        assert_eq!(double(two(-537) - two(-590), two(-538), two(-1030)), two(-1030));
    }
}
