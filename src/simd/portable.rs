//! The vectors of the `wide` crate: whatever the build's own target has. NEON on AArch64, SSE2
//! on a plain x86-64, scalars elsewhere.

use super::{Simd, read_lanes, write_lanes};
use wide::{f32x8, u32x8};

/// The name of this set among the supported ones.
pub const NAME: &str =
    if cfg!(all(target_arch = "aarch64", target_feature = "neon")) { "neon" } else { "portable" };

/// Whether `f32x8::mul_add` rounds once in this build.
const FUSED: bool =
    cfg!(any(all(target_arch = "aarch64", target_feature = "neon"), target_feature = "fma"));

/// Needs no proof: these vectors run everywhere.
#[derive(Clone, Copy)]
pub struct Portable;

impl Simd for Portable {
    type Vector = f32x8;
    type Block = [f32x8; 8];
    type Totals = [f64; 16];
    type Halves = [u16; 8];
    type Watch = u32x8;

    const LANES: usize = 8;

    #[inline(always)]
    fn splat(self, x: f32) -> f32x8 {
        f32x8::splat(x)
    }
    #[inline(always)]
    fn splat_block(self, x: f32) -> [f32x8; 8] {
        [f32x8::splat(x); 8]
    }

    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> f32x8 {
        // SAFETY: the caller's promise about `p`; an array of f32 read unaligned.
        f32x8::from(unsafe { p.cast::<[f32; 8]>().read_unaligned() })
    }
    #[inline(always)]
    unsafe fn load_lanes(self, p: *const f32, lanes: u32, fill: f32) -> f32x8 {
        // SAFETY: the caller's promise.
        f32x8::from(unsafe { read_lanes(p, lanes, fill) })
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, v: f32x8) {
        // SAFETY: the caller's promise about `p`; an array of f32 written unaligned.
        unsafe { p.cast::<[f32; 8]>().write_unaligned(v.to_array()) }
    }
    #[inline(always)]
    unsafe fn store_lanes(self, p: *mut f32, lanes: u32, v: f32x8) {
        // SAFETY: the caller's promise.
        unsafe { write_lanes(p, lanes, v.to_array()) }
    }
    #[inline(always)]
    unsafe fn stream(self, p: *mut f32, v: f32x8) {
        // SAFETY: the caller's promise about `p`.
        unsafe { self.store(p, v) }
    }
    #[inline(always)]
    unsafe fn load_halves(self, p: *const u16) -> [u16; 8] {
        // SAFETY: the caller's promise about `p`.
        unsafe { p.cast::<[u16; 8]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn load_half_lanes(self, p: *const u16, lanes: u32, fill: u16) -> [u16; 8] {
        // SAFETY: the caller's promise.
        unsafe { read_lanes(p, lanes, fill) }
    }
    #[inline(always)]
    unsafe fn store_halves(self, p: *mut u16, v: [u16; 8]) {
        // SAFETY: the caller's promise about `p`.
        unsafe { p.cast::<[u16; 8]>().write_unaligned(v) }
    }
    #[inline(always)]
    unsafe fn store_half_lanes(self, p: *mut u16, lanes: u32, values: [u16; 8]) {
        // SAFETY: the caller's promise.
        unsafe { write_lanes(p, lanes, values) }
    }
    #[inline(always)]
    unsafe fn stream_halves(self, p: *mut u16, v: [u16; 8]) {
        // SAFETY: the caller's promise about `p`.
        unsafe { self.store_halves(p, v) }
    }
    #[inline(always)]
    fn widen_bf16(self, v: [u16; 8]) -> f32x8 {
        f32x8::from(v.map(|bits| half::bf16::from_bits(bits).to_f32()))
    }
    #[inline(always)]
    fn narrow_bf16(self, v: f32x8) -> [u16; 8] {
        v.to_array().map(|x| half::bf16::from_f32(x).to_bits())
    }
    #[inline(always)]
    fn widen_f16(self, v: [u16; 8]) -> f32x8 {
        f32x8::from(v.map(|bits| half::f16::from_bits(bits).to_f32()))
    }
    #[inline(always)]
    fn narrow_f16(self, v: f32x8) -> [u16; 8] {
        v.to_array().map(|x| half::f16::from_f32(x).to_bits())
    }
    #[inline(always)]
    fn fence(self) {}
    #[inline(always)]
    fn prefetch(self, _: *const u8) {}
    #[inline(always)]
    fn prefetch_far(self, _: *const u8) {}
    #[inline(always)]
    fn prefetch_write(self, _: *const u8) {}

    #[inline(always)]
    fn add(self, a: f32x8, b: f32x8) -> f32x8 {
        a + b
    }
    #[inline(always)]
    fn sub(self, a: f32x8, b: f32x8) -> f32x8 {
        a - b
    }
    #[inline(always)]
    fn mul(self, a: f32x8, b: f32x8) -> f32x8 {
        a * b
    }
    #[inline(always)]
    fn mul_add(self, a: f32x8, b: f32x8, c: f32x8) -> f32x8 {
        a.mul_add(b, c)
    }
    #[inline(always)]
    fn mul_sub_exact(self, a: f32x8, b: f32x8, c: f32x8) -> f32x8 {
        if FUSED {
            return a.mul_sub(b, c);
        }
        // The product of two f32 fits an f64, so only the difference is rounded: first to f64,
        // then to f32.
        let (a, b, c) = (a.to_array(), b.to_array(), c.to_array());
        f32x8::from(std::array::from_fn(|i| {
            (f64::from(a[i]) * f64::from(b[i]) - f64::from(c[i])) as f32
        }))
    }
    #[inline(always)]
    fn max(self, bound: f32x8, x: f32x8) -> f32x8 {
        bound.simd_gt(x).bitselect(bound, x)
    }
    #[inline(always)]
    fn min(self, bound: f32x8, x: f32x8) -> f32x8 {
        x.simd_gt(bound).bitselect(bound, x)
    }
    #[inline(always)]
    fn exponent_from_low_bits(self, m: f32x8) -> f32x8 {
        let bits = u32x8::from(m.to_array().map(f32::to_bits)) << 23u32;
        f32x8::from(bits.to_array().map(f32::from_bits))
    }

    #[inline(always)]
    fn watch_start(self) -> u32x8 {
        u32x8::ZERO
    }
    #[inline(always)]
    fn watch(self, mut seen: u32x8, block: &[f32x8; 8], expected: f32x8) -> u32x8 {
        let bits = |v: f32x8| u32x8::from(v.to_array().map(f32::to_bits));
        for v in block {
            seen |= bits(*v) ^ bits(expected);
        }
        seen
    }
    #[inline(always)]
    fn watch_end(self, seen: u32x8) -> bool {
        seen.to_array().into_iter().all(|bits| bits <= 0xFF)
    }

    #[inline(always)]
    fn max_lane(self, b: [f32x8; 8]) -> f32 {
        let pairs = |a, b| Portable.max(a, b);
        let v = pairs(
            pairs(pairs(b[0], b[1]), pairs(b[2], b[3])),
            pairs(pairs(b[4], b[5]), pairs(b[6], b[7])),
        );
        v.to_array().into_iter().fold(f32::NEG_INFINITY, f32::max)
    }
    #[inline(always)]
    fn totals(self) -> [f64; 16] {
        [0.0; 16]
    }
    #[inline(always)]
    fn add_block(self, t: [f64; 16], b: [f32x8; 8]) -> [f64; 16] {
        // Registers 0 and 1 hold lanes 0..16, 2 and 3 lanes 16..32, and so on.
        let lo = ((b[0] + b[2]) + (b[4] + b[6])).to_array();
        let hi = ((b[1] + b[3]) + (b[5] + b[7])).to_array();
        std::array::from_fn(|i| t[i] + f64::from(if i < 8 { lo[i] } else { hi[i - 8] }))
    }
    #[inline(always)]
    fn add_centered(self, totals: &mut [f64; 16], i: usize, x: f32x8, center: f64) {
        // Even registers hold the first 8 of 16 lanes.
        for (total, x) in totals[i % 2 * 8..].iter_mut().zip(x.to_array()) {
            *total += f64::from(x) - center;
        }
    }
    #[inline(always)]
    fn add_weighted(self, totals: &mut [f64; 16], i: usize, x: f32x8, center: f64, w: f32x8) {
        let lanes = x.to_array().into_iter().zip(w.to_array());
        for (total, (x, w)) in totals[i % 2 * 8..].iter_mut().zip(lanes) {
            *total += if w == 0.0 { 0.0 } else { f64::from(w) * (f64::from(x) - center) };
        }
    }
    #[inline(always)]
    fn sum(self, t: [f64; 16]) -> f64 {
        let v8: [f64; 8] = std::array::from_fn(|i| t[i] + t[i + 8]);
        let v4: [f64; 4] = std::array::from_fn(|i| v8[i] + v8[i + 4]);
        (v4[0] + v4[2]) + (v4[1] + v4[3])
    }
}
