//! Products and sums that are rounded once. The C library of MinGW, which `mul_add` calls there, rounds both.

#[cfg(not(windows))]
pub fn fused(x: f64, factor: f64, addend: f64) -> f64 {
    x.mul_add(factor, addend)
}

#[cfg(windows)]
pub use libm::fma as fused;

#[cfg(not(windows))]
pub fn fused_f32(x: f32, factor: f32, addend: f32) -> f32 {
    x.mul_add(factor, addend)
}

#[cfg(windows)]
pub use libm::fmaf as fused_f32;
