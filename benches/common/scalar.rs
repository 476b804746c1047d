//! The dtypes of logits, and inputs in them.

use xent::Number;
use xent::half::{bf16, f16};

/// A dtype of logits.
pub trait Scalar: Number + Default + PartialEq + std::fmt::Debug + Send + Sync + 'static {
    /// As benches print it.
    const NAME: &'static str;
    /// The distance from 1 to the next number.
    const EPSILON: f64;
    /// The smallest number above 0.
    const TINY: f64;
    /// Rounded.
    fn of(x: f64) -> Self;
    /// Exact.
    fn exact(self) -> f64;
}

macro_rules! scalars {
    ($($type:ty, $name:literal, $digits:literal, $tiny:expr, |$x:ident| $of:expr, |$y:ident| $exact:expr;)*) => {$(
        impl Scalar for $type {
            const NAME: &'static str = $name;
            const EPSILON: f64 = 1.0 / (1u64 << $digits) as f64;
            const TINY: f64 = $tiny;
            fn of($x: f64) -> Self {
                $of
            }
            fn exact(self) -> f64 {
                let $y = self;
                $exact
            }
        }
    )*};
}
scalars! {
    f32, "f32", 23, 1e-44, |x| x as f32, |y| f64::from(y);
    f64, "f64", 52, 5e-324, |x| x, |y| y;
    bf16, "bf16", 7, 1e-40, |x| bf16::from_f64(x), |y| y.to_f64();
    f16, "f16", 10, 6e-8, |x| f16::from_f64(x), |y| y.to_f64();
}

/// Logits like a trainer's: normal, of standard deviation 2, from a fixed seed.
pub fn logits<T: Scalar>(n: usize) -> Vec<T> {
    let mut state = 0x9E37_79B9_7F4A_7C15u64;
    let mut uniform = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 24) as f32
    };
    // Sums of four uniforms are near enough to normal, and cheap.
    let mut normal = || (uniform() + uniform() + uniform() + uniform() - 2.0) * 3.46;
    (0..n).map(|_| T::of(f64::from(normal()))).collect()
}

/// Targets spread over all classes.
pub fn targets(rows: usize, classes: usize) -> Vec<i32> {
    (0..rows).map(|row| (row * 7919 % classes) as i32).collect()
}
