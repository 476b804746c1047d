//! exp, exp2, expm1, ln, log2, log1p and tanh in lanes of f64, for the few values of a row and for capped
//! logits.
//!
//! They consist of IEEE additions, multiplications, divisions and fused multiply-adds, so every set
//! gives the same bits. The platform's libm promises no such thing. The relative error is below
//! 1e-15.

use super::exp2::{self, Base, ByExponent, Clamped, Exp2, POWER, Shift, WHOLE_MAGIC};
use crate::simd::Doubles;
use std::f64::consts::LOG2_E;

/// ln 2 in two parts. The first has 32 significant bits, so `k·LN_2_HI` is exact for |k| < 2^20.
const LN_2_HI: f64 = f64::from_bits(0x3FE6_2E42_FEE0_0000);
const LN_2_LO: f64 = f64::from_bits(0x3DEA_39EF_3579_3C76);

/// `2/3, 2/5, …, 2/23`: the series of `2·atanh`. After these 11 terms the remainder is below 1e-18 for
/// |u| < 0.1716.
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

/// Returns `e^x`: 0 or close to the smallest normal number below -708.35, inf above 709.8, NaN for NaN.
#[inline(always)]
pub fn exp<D: Doubles>(d: D, x: D::Vector) -> D::Vector {
    Exp2::<D, ByExponent>::new(d, Shift::ZERO).value::<Clamped>(x)
}

/// Returns `2^x`: 0 below -1022.5, inf above 1023.5, NaN for NaN.
#[inline(always)]
pub fn exp2<D: Doubles>(d: D, x: D::Vector) -> D::Vector {
    let whole = nearest(d, x);
    exp2_of(d, whole, d.select(d.equal(whole, x), d.splat(0.0), d.sub(x, whole)))
}

/// Returns `2^(k + f)` as [`exp2`] does, for |f| ≤ 1/2 and a k that is an integer or infinite.
#[inline(always)]
pub fn exp2_of<D: Doubles>(d: D, k: D::Vector, f: D::Vector) -> D::Vector {
    d.apart(
        #[inline(always)]
        || {
            let (magic, bias) = (d.splat(WHOLE_MAGIC), f64::BIAS);
            let m = d.add(d.min(d.splat(bias + 1.0), d.max(d.splat(-bias), k)), magic);
            // The terms are summed in pairs, since a row waits for the latency.
            let f2 = d.mul(f, f);
            let f4 = d.mul(f2, f2);
            let pair = |i: usize| d.mul_add(f, d.splat(POWER[i + 1]), d.splat(POWER[i]));
            let low = d.mul_add(pair(3), f2, pair(1));
            let middle = d.mul_add(pair(7), f2, pair(5));
            let high = d.mul_add(d.splat(POWER[11]), f2, pair(9));
            let q = d.mul_add(d.mul_add(high, f4, middle), f4, low);
            d.mul(d.mul_add(q, f, d.splat(1.0)), d.power(m))
        },
    )
}

/// Returns `a + b` rounded, and its rounding error, which is exact whichever is larger (Knuth).
#[inline(always)]
pub fn sum<D: Doubles>(d: D, a: D::Vector, b: D::Vector) -> (D::Vector, D::Vector) {
    let sum = d.add(a, b);
    let rest = d.sub(sum, a);
    (sum, d.add(d.sub(a, d.sub(sum, rest)), d.sub(b, rest)))
}

/// Returns `a - b` rounded, and its rounding error, which is exact whichever is larger.
#[inline(always)]
pub fn difference<D: Doubles>(d: D, a: D::Vector, b: D::Vector) -> (D::Vector, D::Vector) {
    sum(d, a, d.sub(d.splat(0.0), b))
}

/// Returns `m·(x - center)` rounded, and what that has lost; 0 and 0 where m is 0.
#[inline(always)]
pub fn scaled_difference<D: Doubles>(
    d: D,
    m: D::Vector,
    x: D::Vector,
    center: D::Vector,
) -> (D::Vector, D::Vector) {
    let zero = d.splat(0.0);
    let none = d.equal(m, zero);
    let (high, low) = difference(d, x, center);
    let product = d.select(none, zero, d.mul(m, high));
    let lost = d.mul_add(m, low, d.mul_sub(m, high, product));
    (product, d.select(none, zero, lost))
}

/// Rounds `x` to the nearest integer if |x| < 2^51, and returns it unchanged if not.
#[inline(always)]
pub fn nearest<D: Doubles>(d: D, x: D::Vector) -> D::Vector {
    const BOUND: f64 = 2_251_799_813_685_248.0;
    let shift = d.splat(3.0 * BOUND);
    let zero = d.splat(0.0);
    let size = d.select(d.less(x, zero), d.sub(zero, x), x);
    d.select(d.less(size, d.splat(BOUND)), d.sub(d.add(x, shift), shift), x)
}

/// Returns `e^x - 1`; for x above 709, `e^709 - 1`.
#[inline(always)]
pub fn expm1<D: Doubles>(d: D, x: D::Vector) -> D::Vector {
    exp2::minus_one(d, d.min(d.splat(709.0), x))
}

/// Returns `(k, ln(1 + t))` with `x = 2^k·(1 + t)` and `1 + t` in [√½, √2). `x` has to be positive,
/// finite and normal.
#[inline(always)]
pub fn ln_parts<D: Doubles>(d: D, x: D::Vector) -> (D::Vector, D::Vector) {
    d.apart(
        #[inline(always)]
        || {
            let (k, m) = d.split(x);
            let t = d.sub(m, d.splat(1.0));
            // ln(1 + t) = 2·atanh(u) with u = t/(2 + t), |u| < 0.1716. The form 2u = t - u·t keeps the leading
            // term exact, so the result is good to an ulp near 1 as well.
            let u = d.div(t, d.add(d.splat(1.0), m));
            let z = d.mul(u, u);
            let z2 = d.mul(z, z);
            let z4 = d.mul(z2, z2);
            let pair = |i: usize| d.mul_add(z, d.splat(ATANH[i + 1]), d.splat(ATANH[i]));
            let low = d.mul_add(pair(2), z2, pair(0));
            let middle = d.mul_add(pair(6), z2, pair(4));
            let high = d.mul_add(d.splat(ATANH[10]), z2, pair(8));
            let q = d.mul_add(d.mul_add(high, z4, middle), z4, low);
            (k, d.sub(t, d.mul(u, d.sub(t, d.mul(z, q)))))
        },
    )
}

/// Returns `2·atanh u` for |u| < 0.1716, from four terms after the first. The relative error is below 4e-9.
#[inline(always)]
pub fn twice_atanh<D: Doubles>(d: D, u: D::Vector) -> D::Vector {
    const TERMS: usize = 4;
    d.apart(
        #[inline(always)]
        || {
            let z = d.mul(u, u);
            let mut q = d.splat(ATANH[TERMS - 1]);
            for i in (0..TERMS - 1).rev() {
                q = d.mul_add(q, z, d.splat(ATANH[i]));
            }
            let z = d.mul(z, u);
            d.mul_add(q, z, d.add(u, u))
        },
    )
}

/// Returns `(k, y)` with log2 x = k + y, k an integer and |y| ≤ 1/2, for x ≥ 0. The result is `(0, -inf)`
/// at 0 and below the smallest normal number, `(0, inf)` at inf, and `(0, NaN)` for NaN.
#[inline(always)]
pub fn log2_parts<D: Doubles>(d: D, x: D::Vector) -> (D::Vector, D::Vector) {
    let (k, y) = ln_parts(d, x);
    let (zero, y) = (d.splat(0.0), d.mul(y, d.splat(LOG2_E)));
    let finite = d.less(x, d.splat(f64::INFINITY));
    let (k, y) = (d.keep(finite, k), d.select(finite, y, x));
    let is_zero = d.less(x, d.splat(f64::MIN_POSITIVE));
    (d.select(is_zero, zero, k), d.select(is_zero, d.splat(f64::NEG_INFINITY), y))
}

/// Returns log2 x for x ≥ 0: -inf at 0 and below the smallest normal number, inf at inf, NaN for NaN.
#[inline(always)]
pub fn log2<D: Doubles>(d: D, x: D::Vector) -> D::Vector {
    let (k, y) = log2_parts(d, x);
    d.add(k, y)
}

/// Returns `ln x` for an x that is positive, finite and normal.
#[inline(always)]
pub fn ln<D: Doubles>(d: D, x: D::Vector) -> D::Vector {
    ln_scaled(d, d.splat(0.0), x)
}

/// Returns `ln(2^k·x)` for an integer k, and an x that is positive, finite and normal.
#[inline(always)]
pub fn ln_scaled<D: Doubles>(d: D, k: D::Vector, x: D::Vector) -> D::Vector {
    let (of_x, y) = ln_parts(d, x);
    let k = d.add(k, of_x);
    d.mul_add(k, d.splat(LN_2_HI), d.mul_add(k, d.splat(LN_2_LO), y))
}

/// Returns `(ln(1 + x), 1/(1 + x))` for x in [0, 1], accurate down to the smallest x.
#[inline(always)]
pub fn log1p<D: Doubles>(d: D, x: D::Vector) -> (D::Vector, D::Vector) {
    let one = d.splat(1.0);
    let w = d.add(one, x);
    let inverse = d.div(one, w);
    let ln = ln(d, w);
    // w is rounded. ln w is corrected by the lost part of x times the derivative 1/w.
    let lost = d.sub(x, d.sub(w, one));
    (d.mul_add(lost, inverse, ln), inverse)
}

/// Returns `(tanh u, 1 - tanh² u)`. The second is computed as `s·(2 - s)` with `s = 1 - tanh |u|` from a
/// formula of its own, so nothing cancels. It is 0 from |u| = 350 on.
#[inline(always)]
pub fn tanh<D: Doubles>(d: D, u: D::Vector) -> (D::Vector, D::Vector) {
    d.apart(
        #[inline(always)]
        || {
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
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dispatch::Isa;
    use crate::kernels::logit_transform::Transform;
    use crate::math::double_double::Dd;
    use crate::sample::blocks;
    use crate::simd::on_isa::{available, on_isa};
    use crate::view::FloatType;
    use rayon::prelude::*;

    #[derive(Clone, Copy, Debug, PartialEq)]
    enum Function {
        Exp,
        Exp2,
        Expm1,
        Log2,
        Log1p,
        Tanh,
    }
    use Function::*;

    type Block = [f64; 32];

    on_isa! {
        /// The results of 32 values. Functions with one result return 0 as the second.
        fn values(function: Function, x: &Block) -> [Block; 2] = |s| all(s.wide(), function, x);
    }

    #[inline(always)]
    fn all<D: Doubles>(d: D, function: Function, x: &Block) -> [Block; 2] {
        let mut out = [[0.0; 32]; 2];
        for at in (0..x.len()).step_by(D::LANES) {
            // SAFETY: `LANES` divides 32, so a register from `at` on lies within the array.
            let x = unsafe { d.load(x.as_ptr().add(at)) };
            let none = d.splat(0.0);
            let (first, second) = match function {
                Exp => (exp(d, x), none),
                Exp2 => (exp2(d, x), nearest(d, x)),
                Expm1 => (expm1(d, x), none),
                Log2 => (log2(d, x), none),
                Log1p => log1p(d, x),
                Tanh => tanh(d, x),
            };
            // SAFETY: `LANES` divides 32, so a register from `at` on lies within each array.
            unsafe {
                d.store(out[0].as_mut_ptr().add(at), first);
                d.store(out[1].as_mut_ptr().add(at), second);
            }
        }
        out
    }

    /// The results of a function on every set. All give the same bits.
    fn run(function: Function, x: &[f64]) -> Vec<(Isa, Vec<[f64; 2]>)> {
        let mut all: Vec<(Isa, Vec<[f64; 2]>)> = Vec::new();
        for isa in available() {
            let mut results = Vec::new();
            for x in x.chunks(32) {
                let mut block = [0.5; 32];
                block[..x.len()].copy_from_slice(x);
                let [first, second] = values(isa, function, &block);
                results.extend((0..x.len()).map(|i| [first[i], second[i]]));
            }
            if let Some((other, good)) = all.first() {
                for (i, (a, b)) in results.iter().zip(good).enumerate() {
                    let same = a.map(f64::to_bits) == b.map(f64::to_bits);
                    assert!(same, "{function:?}({:e}): {a:?} on {isa:?}, {b:?} on {other:?}", x[i]);
                }
            }
            all.push((isa, results));
        }
        all
    }

    /// Numbers from `low` to `high`: half of them evenly spread, half of them evenly over the binades.
    fn spread(low: f64, high: f64) -> Vec<f64> {
        const N: u32 = 6000;
        let even = (0..=N).map(|i| low + (high - low) * f64::from(i) / f64::from(N));
        let (a, b) = (low.max(1e-300).ln(), high.ln());
        let binades = (0..=N).map(|i| (a + (b - a) * f64::from(i) / f64::from(N)).exp());
        even.chain(binades).map(|x| x.clamp(low, high)).collect()
    }

    fn both_signs(x: Vec<f64>) -> Vec<f64> {
        x.iter().flat_map(|&x| [x, -x]).collect()
    }

    /// Every result is within the relative error `bound` of `want`, or within two of the smallest
    /// subnormal numbers.
    fn judge(
        function: Function,
        x: &[f64],
        want: impl Fn(f64) -> [Dd; 2],
        bound: impl Fn(f64) -> f64,
    ) {
        let want: Vec<[Dd; 2]> = x.iter().map(|&x| want(x)).collect();
        for (isa, results) in run(function, x) {
            let mut worst = 0f64;
            for ((&x, got), want) in x.iter().zip(results).zip(&want) {
                for (got, want) in got.into_iter().zip(want) {
                    if got == want.hi || (got - want.hi).abs() <= 1e-323 {
                        continue;
                    }
                    let units = want.error(got) / bound(x);
                    worst = worst.max(units);
                    assert!(
                        units <= 1.0,
                        "{function:?}({x:e}) on {}: {got:e} instead of {:e}, {units:.2} of its bound",
                        isa.name(),
                        want.hi
                    );
                }
            }
            println!("{function:?} on {}: {worst:.3} of its bound", isa.name());
        }
    }

    const NONE: Dd = Dd { hi: 0.0, lo: 0.0 };

    #[test]
    fn exponentials() {
        let bound = |_| 1e-15;
        let exp = |x: f64| {
            let (m, k) = Dd::from(x).exp();
            [m.scaled(k), NONE]
        };
        let mut x = both_signs(spread(0.0, 700.0));
        x.extend(spread(700.0, 709.4));
        judge(Exp, &x, exp, bound);
        // An f64 cannot hold the low half of the expected value.
        let low: Vec<f64> = spread(700.0, 708.35).into_iter().map(|x| -x).collect();
        judge(Exp, &low, exp, |x| bound(x) + 2f64.powi(-52));
        // The second result is the nearest integer.
        let exp2 = |x: f64| {
            let (m, k) = Dd::from(x).exp2();
            [m.scaled(k), Dd::from(x.round_ties_even())]
        };
        let x = both_signs(spread(0.0, 1021.9));
        judge(Exp2, &x, exp2, |_| 2.3e-16);
        let expm1 = |x| [Dd::from(x).expm1(), NONE];
        let mut x = both_signs(spread(0.0, 700.0));
        x.extend(spread(700.0, 709.0));
        judge(Expm1, &x, expm1, bound);
    }

    #[test]
    fn logarithms() {
        let bound = |_| 1e-15;
        let log2 = |x| [Dd::log2(x), NONE];
        judge(Log2, &spread(f64::MIN_POSITIVE, f64::MAX / 4.0), log2, bound);
        judge(Log2, &spread(0.4, 2.5), log2, bound);
        // Near 1 the logarithm is small, and accurate relative to itself.
        let close: Vec<f64> = both_signs(spread(0.0, 1e-3)).into_iter().map(|x| 1.0 + x).collect();
        judge(Log2, &close, log2, bound);
        let powers: Vec<f64> = (-1022..=1023).map(|k| 2f64.powi(k)).collect();
        for (_, results) in run(Log2, &powers) {
            assert!(results.iter().zip(-1022..).all(|(r, k)| r[0] == f64::from(k)));
        }
        let log1p = |x| [Dd::ln_1p(x), Dd::from(1.0) / Dd::sum(1.0, x)];
        judge(Log1p, &spread(0.0, 1.0), log1p, bound);
    }

    #[test]
    fn hyperbolic_tangent() {
        let want = |x: f64| {
            let (t, slope) = Dd::tanh(x.abs());
            [if x < 0.0 { NONE - t } else { t }, slope]
        };
        let bound = |_| 1e-15;
        judge(Tanh, &both_signs(spread(0.0, 349.9)), want, bound);
        judge(Tanh, &both_signs(spread(0.0, 1.0)), want, bound);
    }

    #[test]
    fn edges() {
        const INF: f64 = f64::INFINITY;
        const NAN: f64 = f64::NAN;
        const LEAST: f64 = 5e-324;
        const HIGHEST: f64 = f64::MIN_POSITIVE - LEAST;
        let check = |function, cases: &[(f64, f64, f64)]| {
            let x: Vec<f64> = cases.iter().map(|case| case.0).collect();
            for (isa, results) in run(function, &x) {
                for (&(x, first, second), got) in cases.iter().zip(results) {
                    for (got, want) in got.into_iter().zip([first, second]) {
                        let same = got == want || got.is_nan() && want.is_nan();
                        assert!(same, "{function:?}({x:e}) on {}: {got:e}, {want:e}", isa.name());
                    }
                }
            }
        };
        let alone = |function, cases: &[(f64, f64)]| {
            check(function, &cases.iter().map(|&(x, y)| (x, y, 0.0)).collect::<Vec<_>>());
        };
        alone(
            Exp,
            &[
                (0.0, 1.0),
                (-0.0, 1.0),
                (LEAST, 1.0),
                (-LEAST, 1.0),
                (HIGHEST, 1.0),
                (-HIGHEST, 1.0),
                (-709.1, 0.0),
                (-1e5, 0.0),
                (-1e300, 0.0),
                (f64::MIN, 0.0),
                (-INF, 0.0),
                (710.0, INF),
                (1e5, INF),
                (f64::MAX, INF),
                (INF, INF),
                (NAN, NAN),
                (-NAN, NAN),
            ],
        );
        let most = run(Expm1, &[709.0])[0].1[0][0];
        alone(
            Expm1,
            &[
                (0.0, 0.0),
                (-0.0, 0.0),
                (-40.0, -1.0),
                (-800.0, -1.0),
                (f64::MIN, -1.0),
                (-INF, -1.0),
                (NAN, NAN),
            ],
        );
        for (isa, results) in run(Expm1, &[LEAST, -LEAST, HIGHEST, -HIGHEST, 709.0, 710.0, INF]) {
            let got: Vec<f64> = results.iter().map(|r| r[0]).collect();
            let off = |i: usize, x: f64| (got[i] - x).abs() <= LEAST;
            let good = off(0, LEAST) && off(1, -LEAST) && off(2, HIGHEST) && off(3, -HIGHEST);
            assert!(good, "{isa:?}: {got:?}");
            assert!(got[4] == got[5] && got[4] == got[6] && (got[4] / most - 1.0).abs() < 1e-14);
        }
        check(
            Exp2,
            &[
                (0.0, 1.0, 0.0),
                (-0.0, 1.0, 0.0),
                (1023.0, 8.98846567431158e307, 1023.0),
                (1024.0, INF, 1024.0),
                (1e300, INF, 1e300),
                (INF, INF, INF),
                (-1022.0, f64::MIN_POSITIVE, -1022.0),
                (-1023.0, 0.0, -1023.0),
                (-1e300, 0.0, -1e300),
                (-INF, 0.0, -INF),
                (NAN, NAN, NAN),
                (-NAN, NAN, NAN),
            ],
        );
        alone(
            Log2,
            &[
                (0.0, -INF),
                (-0.0, -INF),
                (LEAST, -INF),
                (HIGHEST, -INF),
                (f64::MIN_POSITIVE, -1022.0),
                (1.0, 0.0),
                (f64::MAX, 1024.0),
                (INF, INF),
                (NAN, NAN),
                (-NAN, NAN),
            ],
        );
        check(
            Log1p,
            &[
                (0.0, 0.0, 1.0),
                (-0.0, 0.0, 1.0),
                (LEAST, LEAST, 1.0),
                (HIGHEST, HIGHEST, 1.0),
                (f64::MIN_POSITIVE, f64::MIN_POSITIVE, 1.0),
                (1e-300, 1e-300, 1.0),
                (NAN, NAN, NAN),
            ],
        );
        check(
            Tanh,
            &[
                (350.0, 1.0, 0.0),
                (-350.0, -1.0, 0.0),
                (1e300, 1.0, 0.0),
                (f64::MIN, -1.0, 0.0),
                (INF, 1.0, 0.0),
                (-INF, -1.0, 0.0),
                (NAN, NAN, NAN),
                (-NAN, NAN, NAN),
            ],
        );
        for (isa, results) in run(Tanh, &[0.0, -0.0, LEAST, -LEAST, HIGHEST]) {
            assert_eq!(results[0][0].to_bits(), 0, "{isa:?}");
            assert_eq!(results[1][0].to_bits(), 1 << 63, "{isa:?}");
            let off = |i: usize, x: f64| (results[i][0] - x).abs() <= LEAST && results[i][1] == 1.0;
            assert!(off(2, LEAST) && off(3, -LEAST) && off(4, HIGHEST), "{isa:?}: {results:?}");
        }
    }

    /// Caps all 2^32 logits of f32 at 1 through the kernel. The value is within 0.501 ulp, and so is the
    /// slope where it is a normal number. All sets give the same bits.
    ///
    /// From 2^-13 to 53 the expected values come from the standard library's tanh and cosh. Their own
    /// errors are a few ulp of f64, or 2^-27 of an ulp of f32; some are checked against double-double.
    /// Elsewhere the results are known: below, `x - x³/3` rounds to x and `1 - x²` to 1; above,
    /// `1 - 2e^-106` rounds to 1 and `4e^-106` to 0. The results of -x are compared with those of x.
    ///
    /// The portable set computes fused steps in software. It runs one block in 16 of the arguments whose
    /// results follow from others: those of -x, since after |x| only a selection sees the sign, and those
    /// outside of that range.
    #[test]
    fn softcap_exhaustive() {
        const N: usize = 1 << 10;
        type Results = [[f32; N]; 2];
        const NAN: u32 = 0x7f80_0001;
        let (small, large) = (2f32.powi(-13).to_bits(), 53f32.to_bits());
        assert!([small, large].iter().all(|bits| bits.is_multiple_of(N as u32)));
        let sets: Vec<(Isa, &crate::kernels::LaneKernels)> =
            available().into_iter().map(|isa| (isa, isa.lanes(FloatType::F32).unwrap())).collect();
        let capped = |set: usize, first: u32, [x, slope]: &mut Results| {
            for (i, x) in x.iter_mut().enumerate() {
                *x = f32::from_bits(first + i as u32);
            }
            slope.fill(7.0);
            let with = Transform { scale: 1.0, cap: 1.0 };
            // SAFETY: `Isa::lanes` returns only tables of sets that the processor has, and both arrays have
            // N elements.
            unsafe {
                let (x, slope) = (x.as_mut_ptr().cast(), slope.as_mut_ptr().cast());
                (sets[set].1.transform)(x, N, &with, slope);
            }
        };
        // The bits in which two results differ; `sign` is the expected difference of the values.
        let differ = |a: &Results, b: &Results, sign: u32| {
            let bits = |a: &[f32; N], b: &[f32; N], sign| {
                let pairs = a.iter().zip(b);
                pairs.fold(0, |seen, (a, b)| seen | (a.to_bits() ^ b.to_bits() ^ sign))
            };
            bits(&a[0], &b[0], sign) | bits(&a[1], &b[1], 0)
        };
        let ulp = |x: f64| {
            let exponent = (x.to_bits() >> 52 & 0x7ff).max(1023 - 126);
            f64::from_bits((exponent - 23) << 52)
        };
        let judge = |first: u32, [values, slopes]: &Results| {
            let mut worst = [0.0f64; 2];
            for (i, (&value, &slope)) in values.iter().zip(slopes).enumerate() {
                let x = f64::from(f32::from_bits(first + i as u32));
                let cosh = x.cosh();
                let want = [x.tanh(), 1.0 / (cosh * cosh)];
                if i == 123 {
                    let exact = Dd::tanh(x);
                    assert!(exact.0.error(want[0]) < 1e-15 && exact.1.error(want[1]) < 3e-15);
                }
                let ulps = want.map(ulp);
                for (which, got) in [value, slope].into_iter().enumerate() {
                    let off = (f64::from(got) - want[which]).abs();
                    worst[which] = worst[which].max(off / ulps[which]);
                }
            }
            worst
        };
        let none = || vec![[[0.0f32; N]; 2]; sets.len() + 1];
        let worst = blocks(0..1 << 31, N, 0)
            .par_bridge()
            .map_init(none, |results, first| {
                let [negative, all @ ..] = &mut results[..] else { unreachable!() };
                let last = first + (N as u32 - 1);
                let is_known = last < small || first >= large;
                let is_sampled = (first / N as u32).is_multiple_of(16) || last >= NAN;
                for (set, positive) in all.iter_mut().enumerate() {
                    let is_whole = is_sampled || sets[set].0 != Isa::Portable;
                    if is_known && !is_whole {
                        continue;
                    }
                    let place = || format!("from {first:#x} on {:?}", sets[set].0);
                    // Whether all results are NaN, except that of the infinity before the first NaN.
                    let is_nan = |y: &Results, infinity: f32| {
                        (0..N).all(|i| {
                            if first + i as u32 >= NAN {
                                y[0][i].is_nan() && y[1][i].is_nan()
                            } else {
                                (y[0][i], y[1][i]) == (infinity, 0.0)
                            }
                        })
                    };
                    capped(set, first, positive);
                    if last >= NAN {
                        assert!(is_nan(positive, 1.0), "{}", place());
                    } else if is_known {
                        let pairs = positive[0].iter().zip(&positive[1]).zip(first..);
                        let off = pairs.fold(0, |seen, ((value, slope), x)| {
                            let one = 1f32.to_bits();
                            let want = if last < small { [x, one] } else { [one, 0] };
                            seen | value.to_bits() ^ want[0] | slope.to_bits() ^ want[1]
                        });
                        assert_eq!(off, 0, "{}", place());
                    }
                    if is_whole {
                        capped(set, first | 1 << 31, negative);
                        let is_odd = if last >= NAN {
                            is_nan(negative, -1.0)
                        } else {
                            differ(positive, negative, 1 << 31) == 0
                        };
                        assert!(is_odd, "-x {}", place());
                    }
                }
                if is_known {
                    return [0.0; 2];
                }
                for other in &all[1..] {
                    assert_eq!(differ(other, &all[0], 0), 0, "from {first:#x}");
                }
                judge(first, &all[0])
            })
            .reduce(|| [0.0; 2], |a, b| [a[0].max(b[0]), a[1].max(b[1])]);
        let [value, slope] = worst;
        println!("value at most {value:.6} ulp, slope {slope:.6}");
        assert!(value <= 0.501 && slope <= 0.501);
    }
}
