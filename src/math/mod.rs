//! Exponentials and logarithms: one generic body each, in terms of [`Simd`](crate::simd::Simd)
//! for the elements, in plain f64 for the few values a row needs.
//!
//! Everything is built from additions, multiplications and fused multiply-adds, never from the
//! platform's libm, so that the bits do not depend on where it runs.

pub mod compensated;
#[cfg(test)]
mod double_double;
pub mod exp2;
pub mod real;
pub mod scalar;
