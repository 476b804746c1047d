//! Sums that keep track of their rounding errors.

/// A compensated sum (Neumaier 1974): it carries the error of every addition, since a problem may add up
/// millions of equal terms, whose errors would add up too.
#[derive(Clone, Copy, Debug)]
pub struct CompensatedSum {
    sum: f64,
    /// The sum of the rounding errors of `sum`.
    error: f64,
}

impl CompensatedSum {
    /// The sum of no terms.
    pub const ZERO: CompensatedSum = CompensatedSum { sum: 0.0, error: 0.0 };

    /// The sum of partial sums that were formed side by side, with the error of each.
    pub fn of_lanes(sums: &[f64], errors: &[f64]) -> CompensatedSum {
        let mut all = CompensatedSum::ZERO;
        sums.iter().zip(errors).for_each(|(&sum, &error)| all.merge(CompensatedSum { sum, error }));
        all
    }

    /// Adds a term.
    #[inline(always)]
    pub fn add(&mut self, x: f64) {
        let sum = self.sum + x;
        let (large, small) = if self.sum.abs() >= x.abs() { (self.sum, x) } else { (x, self.sum) };
        self.error += (large - sum) + small;
        self.sum = sum;
    }

    /// Adds the terms of another sum.
    #[inline(always)]
    pub fn merge(&mut self, other: CompensatedSum) {
        self.add(other.sum);
        self.error += other.error;
    }

    /// Multiplies the sum by a number.
    #[inline(always)]
    pub fn scale(&mut self, by: f64) {
        self.sum *= by;
        self.error *= by;
    }

    /// The rounded sum, and what it has lost.
    #[inline(always)]
    pub fn parts(self) -> (f64, f64) {
        (self.sum, self.error)
    }

    /// Whether the sum is neither infinite nor NaN.
    #[inline(always)]
    pub fn is_finite(self) -> bool {
        self.sum.is_finite()
    }

    /// Whether the rounded sum is 0.
    #[inline(always)]
    pub fn is_zero(self) -> bool {
        self.sum == 0.0
    }

    /// The sum.
    #[inline(always)]
    pub fn value(self) -> f64 {
        // The error of an infinite sum is NaN: inf - inf.
        if self.sum.is_finite() { self.sum + self.error } else { self.sum }
    }
}

/// Eight compensated sums side by side, each of which takes a term at a time.
#[derive(Clone, Copy, Debug)]
#[repr(align(64))]
pub struct CompensatedLanes {
    sums: [f64; 8],
    /// What the roundings of `sums` lost.
    errors: [f64; 8],
}

impl CompensatedLanes {
    /// The sums of no terms.
    pub const ZERO: CompensatedLanes = CompensatedLanes { sums: [0.0; 8], errors: [0.0; 8] };

    /// The sums, and what their roundings lost.
    #[inline(always)]
    pub fn parts(&mut self) -> [&mut [f64; 8]; 2] {
        [&mut self.sums, &mut self.errors]
    }

    /// Adds a term to each (Knuth's two-sum, which asks not which of the two is larger).
    ///
    /// A function of its own: the compiler uses vectors here, and not in all places that this would be inlined into.
    #[inline(never)]
    pub fn add(&mut self, x: &[f64; 8]) {
        for ((sum, error), &x) in self.sums.iter_mut().zip(&mut self.errors).zip(x) {
            let total = *sum + x;
            let added = total - *sum;
            *error += (*sum - (total - added)) + (x - added);
            *sum = total;
        }
    }

    /// The sum of all.
    pub fn total(&self) -> CompensatedSum {
        CompensatedSum::of_lanes(&self.sums, &self.errors)
    }
}

impl From<f64> for CompensatedSum {
    #[inline(always)]
    fn from(sum: f64) -> Self {
        CompensatedSum { sum, error: 0.0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INF: f64 = f64::INFINITY;
    const NAN: f64 = f64::NAN;

    /// Neither the number of terms nor cancellation costs accuracy; infinities stay.
    #[test]
    fn sums_are_exact() {
        for n in [1usize, 10, 1000, 1_000_000] {
            let mut parts = [CompensatedSum::ZERO; 7];
            (0..n).for_each(|i| parts[i * 7 / n].add(0.1));
            let mut sum = CompensatedSum::ZERO;
            parts.into_iter().for_each(|part| sum.merge(part));
            let want = 0.1 * n as f64;
            assert!((sum.value() - want).abs() <= f64::EPSILON * want, "{n}: {}", sum.value());
        }
        let sum = |terms: &[f64]| {
            let mut sum = CompensatedSum::ZERO;
            terms.iter().for_each(|&x| sum.add(x));
            sum.value()
        };
        assert_eq!(sum(&[1.0, 1e100, 1.0, -1e100]), 2.0);
        assert_eq!(sum(&[1e100, 1.0, -1e100, 0.25, -1.0]), 0.25);
        assert_eq!(sum(&[]), 0.0);
        assert_eq!(sum(&[1.0, INF, 2.0]), INF);
        assert_eq!(sum(&[-INF, 5.0]), -INF);
        assert!(sum(&[INF, -INF]).is_nan() && sum(&[1.0, NAN, 2.0]).is_nan());
        let mut infinite = CompensatedSum::ZERO;
        infinite.add(INF);
        let mut total = CompensatedSum::ZERO;
        total.add(1.0);
        total.merge(infinite);
        assert_eq!(total.value(), INF);
    }
}
