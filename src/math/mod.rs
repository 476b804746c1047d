//! Exponentials and logarithms: generic functions over [`Simd`](crate::simd::Simd) for elements and
//! rows, and plain f64 for rare values.
//!
//! They consist of additions, multiplications, divisions and fused multiply-adds and never call the
//! platform's libm, so the bits do not depend on the platform.

pub mod compensated;
#[cfg(test)]
pub mod double_double;
pub mod exp2;
pub mod real;
pub mod scalar;
