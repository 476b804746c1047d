//! The vectors of the `wide` crate, which use the vector unit of the build's target: NEON on AArch64,
//! SSE2 on a plain x86-64, scalars elsewhere. A target without fused multiply-add computes it in software.

use super::{
    Doubles, EXPONENT, Halves, ONE, Real, SQRT_HALF, Simd, TOTALS, TWO_52, TWO_52_AND_BIAS,
    f64_lanes, fused, read_lanes, write_lanes,
};
use wide::{f32x8, f64x4, u32x8, u64x4};

/// The name of this set in `xent_isa` and `XENT_ISA`.
pub const NAME: &str =
    if cfg!(all(target_arch = "aarch64", target_feature = "neon")) { "neon" } else { "portable" };

/// Whether the vectors' own `mul_add` rounds once in this build.
const FUSED: bool =
    cfg!(any(all(target_arch = "aarch64", target_feature = "neon"), target_feature = "fma"));

/// 8 lanes of f32. The token proves nothing, since these vectors run on every processor.
#[derive(Clone, Copy)]
pub struct Portable;

/// 4 lanes of f64. The token proves nothing, since these vectors run on every processor.
#[derive(Clone, Copy)]
pub struct PortableWide;

/// [`Simd::apart`]. Targets without fused multiply-add have no instructions for the conversions of halves and
/// for looking up tables either.
#[inline(always)]
fn apart<R>(f: impl FnOnce() -> R) -> R {
    #[inline(never)]
    fn out_of_line<R>(f: impl FnOnce() -> R) -> R {
        f()
    }
    if FUSED { f() } else { out_of_line(f) }
}

/// Looks up the entries of a table that the lowest three bits of each number select.
#[inline(always)]
fn look_up(table: [u32; 8], at: [u32; 8]) -> [u32; 8] {
    #[cfg(all(target_arch = "aarch64", target_feature = "neon", target_endian = "little"))]
    {
        use std::arch::aarch64::*;
        // SAFETY: the build has NEON (the `cfg` above). Each transmutation is between arrays of 32 bytes
        // of integers, for which all bits are valid.
        unsafe {
            let table: uint8x16x2_t = std::mem::transmute(table);
            let at: [uint32x4_t; 2] = std::mem::transmute(at);
            // The four bytes of entry j begin at byte 4·j.
            std::mem::transmute(at.map(|at| {
                let first = vshlq_n_u32::<2>(vandq_u32(at, vdupq_n_u32(7)));
                let bytes = vmlaq_n_u32(vdupq_n_u32(0x0302_0100), first, 0x0101_0101);
                vqtbl2q_u8(table, vreinterpretq_u8_u32(bytes))
            }))
        }
    }
    #[cfg(not(all(target_arch = "aarch64", target_feature = "neon", target_endian = "little")))]
    at.map(|at| table[at as usize % 8])
}

/// The part of an `impl Simd` in which f32 and f64 differ only in names.
macro_rules! simd {
    ($token:ident, $real:ty, $vector:ident, $bits:ident, $lanes:expr, $fused:path) => {
        type Real = $real;
        type Vector = $vector;
        type Block = [$vector; 8];
        type Mask = $vector;
        type RangeCheck = $bits;
        type Rows = [$vector; 16 / size_of::<$real>()];
        type Wide = PortableWide;
        type Totals = [f64x4; TOTALS / 4];

        const LANES: usize = $lanes;

        #[inline(always)]
        unsafe fn assume() -> Self {
            $token
        }
        #[inline(always)]
        fn wide(self) -> PortableWide {
            PortableWide
        }
        #[inline(always)]
        fn splat(self, x: $real) -> $vector {
            $vector::splat(x)
        }
        #[inline(always)]
        fn splat_block(self, x: $real) -> [$vector; 8] {
            [$vector::splat(x); 8]
        }
        #[inline(always)]
        fn splat_rows(self, x: $real) -> Self::Rows {
            [$vector::splat(x); 16 / size_of::<$real>()]
        }
        #[inline(always)]
        fn totals(self) -> [f64x4; TOTALS / 4] {
            [f64x4::ZERO; TOTALS / 4]
        }

        #[inline(always)]
        unsafe fn load(self, p: *const $real) -> $vector {
            // SAFETY: `p` is valid for reads of `LANES` values (`Simd::load`), and the read needs no
            // alignment.
            $vector::from(unsafe { p.cast::<[$real; $lanes]>().read_unaligned() })
        }
        #[inline(always)]
        unsafe fn load_lanes(self, p: *const $real, lanes: u32, fill: $real) -> $vector {
            // SAFETY: `p` is aligned and valid for reads of the set lanes (`Simd::load_lanes`).
            $vector::from(unsafe { read_lanes::<_, $lanes>(p, lanes, fill) })
        }
        #[inline(always)]
        unsafe fn store(self, p: *mut $real, v: $vector) {
            // SAFETY: `p` is valid for writes of `LANES` values (`Simd::store`), and the write needs no
            // alignment.
            unsafe { p.cast::<[$real; $lanes]>().write_unaligned(v.to_array()) }
        }
        #[inline(always)]
        unsafe fn store_lanes(self, p: *mut $real, lanes: u32, v: $vector) {
            // SAFETY: `p` is aligned and valid for writes of the set lanes (`Simd::store_lanes`).
            unsafe { write_lanes::<_, $lanes>(p, lanes, v.to_array()) }
        }
        #[inline(always)]
        unsafe fn load_rows(self, p: *const $real, step: isize) -> Self::Rows {
            std::array::from_fn(|i| {
                $vector::from(std::array::from_fn(|lane| {
                    // SAFETY: element `i` lies in the first 16 bytes of row `lane`, which are valid for
                    // reads; `p` and with it every row is aligned (`Simd::load_rows`).
                    unsafe { *p.wrapping_offset(lane as isize * step).wrapping_add(i) }
                }))
            })
        }
        #[inline(always)]
        unsafe fn store_rows(self, p: *mut $real, step: isize, v: Self::Rows) {
            for (i, v) in v.into_iter().enumerate() {
                for (lane, x) in v.to_array().into_iter().enumerate() {
                    // SAFETY: element `i` lies in the first 16 bytes of row `lane`, which are valid for
                    // writes; `p` and with it every row is aligned (`Simd::store_rows`).
                    unsafe { *p.wrapping_offset(lane as isize * step).wrapping_add(i) = x };
                }
            }
        }
        #[inline(always)]
        unsafe fn stream(self, p: *mut $real, v: $vector) {
            // SAFETY: `p` is valid for writes of `LANES` values (`Simd::stream`).
            unsafe { self.store(p, v) }
        }
        #[inline(always)]
        fn fence(self) {}
        #[inline(always)]
        fn prefetch(self, _: *const u8) {}
        #[inline(always)]
        fn prefetch_l2(self, _: *const u8) {}
        #[inline(always)]
        fn prefetch_write(self, _: *const u8) {}

        #[inline(always)]
        fn add(self, a: $vector, b: $vector) -> $vector {
            a + b
        }
        #[inline(always)]
        fn sub(self, a: $vector, b: $vector) -> $vector {
            a - b
        }
        #[inline(always)]
        fn mul(self, a: $vector, b: $vector) -> $vector {
            a * b
        }
        #[inline(always)]
        fn div(self, a: $vector, b: $vector) -> $vector {
            a / b
        }
        #[inline(always)]
        fn mul_add(self, a: $vector, b: $vector, c: $vector) -> $vector {
            if FUSED { a.mul_add(b, c) } else { $fused(a, b, c) }
        }
        #[inline(always)]
        fn mul_sub(self, a: $vector, b: $vector, c: $vector) -> $vector {
            if FUSED { a.mul_sub(b, c) } else { $fused(a, b, -c) }
        }
        const FUSED: bool = FUSED;

        #[inline(always)]
        fn apart<R>(self, f: impl FnOnce() -> R) -> R {
            apart(f)
        }
        #[inline(always)]
        fn max(self, bound: $vector, x: $vector) -> $vector {
            x.simd_lt(bound).bitselect(bound, x)
        }
        #[inline(always)]
        fn min(self, bound: $vector, x: $vector) -> $vector {
            bound.simd_lt(x).bitselect(bound, x)
        }
        #[inline(always)]
        fn less(self, a: $vector, b: $vector) -> $vector {
            a.simd_lt(b)
        }
        #[inline(always)]
        fn equal(self, a: $vector, b: $vector) -> $vector {
            a.simd_eq(b)
        }
        #[inline(always)]
        fn not_less(self, a: $vector, b: $vector) -> $vector {
            let zero = self.splat(0.0);
            zero.simd_eq(zero) ^ a.simd_lt(b)
        }
        #[inline(always)]
        fn not_equal(self, a: $vector, b: $vector) -> $vector {
            let zero = self.splat(0.0);
            zero.simd_eq(zero) ^ a.simd_eq(b)
        }
        #[inline(always)]
        fn select(self, mask: $vector, a: $vector, b: $vector) -> $vector {
            mask.bitselect(a, b)
        }
        #[inline(always)]
        fn keep(self, mask: $vector, v: $vector) -> $vector {
            mask & v
        }
        #[inline(always)]
        fn both(self, a: $vector, b: $vector) -> $vector {
            a & b
        }
        #[inline(always)]
        fn either(self, a: $vector, b: $vector) -> $vector {
            a | b
        }
        #[inline(always)]
        fn bits(self, mask: $vector) -> u32 {
            mask.to_bitmask()
        }

        #[inline(always)]
        fn range_check_start(self) -> $bits {
            $bits::ZERO
        }
        #[inline(always)]
        fn range_check(self, mut seen: $bits, block: &[$vector; 8], expected: $vector) -> $bits {
            let bits = |v: $vector| $bits::from(v.to_array().map(<$real>::to_bits));
            for v in block {
                seen |= bits(*v) ^ bits(expected);
            }
            seen
        }
        #[inline(always)]
        fn range_check_passed(self, seen: $bits) -> bool {
            seen.to_array().into_iter().all(|bits| bits >> <$real as Real>::IGNORED_BITS == 0)
        }

        #[inline(always)]
        fn max_lane(self, v: $vector) -> $real {
            v.to_array().into_iter().fold(<$real>::NEG_INFINITY, <$real>::max)
        }
        #[inline(always)]
        fn sum(self, t: [f64x4; TOTALS / 4]) -> f64 {
            let v = ((t[0] + t[2]) + (t[1] + t[3])).to_array();
            (v[0] + v[2]) + (v[1] + v[3])
        }
    };
}

impl Simd for Portable {
    simd!(Portable, f32, f32x8, u32x8, 8, fused::mul_add);
    type Widened = [f64x4; 2];
    type Exp2Table = [u32; 8];

    #[inline(always)]
    fn exp2_table(self, bits: &[u32; 8]) -> [u32; 8] {
        *bits
    }
    #[inline(always)]
    fn scale(self, table: [u32; 8], m: f32x8) -> f32x8 {
        apart(|| {
            let m = m.to_array().map(f32::to_bits);
            let entries = look_up(table, m);
            let bits = |i: usize| (m[i] << <f32 as Real>::EIGHTH_SHIFT).wrapping_add(entries[i]);
            f32x8::from(std::array::from_fn(|i| f32::from_bits(bits(i))))
        })
    }

    #[inline(always)]
    fn widen(self, v: f32x8) -> [f64x4; 2] {
        fused::widen(v)
    }
    #[inline(always)]
    fn narrow(self, v: [f64x4; 2]) -> f32x8 {
        fused::narrow(v)
    }
}

impl Halves for Portable {
    type Halves = [u16; 8];

    #[inline(always)]
    unsafe fn load_halves(self, p: *const u16) -> [u16; 8] {
        // SAFETY: `p` is valid for reads of 8 halves (`Halves::load_halves`).
        unsafe { p.cast::<[u16; 8]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn load_half_lanes(self, p: *const u16, lanes: u32, fill: u16) -> [u16; 8] {
        // SAFETY: `p` is aligned and valid for reads of the set lanes (`Halves::load_half_lanes`).
        unsafe { read_lanes(p, lanes, fill) }
    }
    #[inline(always)]
    unsafe fn store_halves(self, p: *mut u16, v: [u16; 8]) {
        // SAFETY: `p` is valid for writes of 8 halves (`Halves::store_halves`).
        unsafe { p.cast::<[u16; 8]>().write_unaligned(v) }
    }
    #[inline(always)]
    unsafe fn store_half_lanes(self, p: *mut u16, lanes: u32, values: [u16; 8]) {
        // SAFETY: `p` is aligned and valid for writes of the set lanes (`Halves::store_half_lanes`).
        unsafe { write_lanes(p, lanes, values) }
    }
    #[inline(always)]
    unsafe fn stream_halves(self, p: *mut u16, v: [u16; 8]) {
        // SAFETY: `p` is valid for writes of 8 halves (`Halves::stream_halves`).
        unsafe { self.store_halves(p, v) }
    }
    #[inline(always)]
    fn widen_bf16(self, v: [u16; 8]) -> f32x8 {
        f32x8::from(v.map(|bits| half::bf16::from_bits(bits).to_f32()))
    }
    #[inline(always)]
    fn narrow_bf16(self, v: f32x8) -> [u16; 8] {
        apart(|| v.to_array().map(|x| half::bf16::from_f32(x).to_bits()))
    }
    #[inline(always)]
    fn widen_f16(self, v: [u16; 8]) -> f32x8 {
        apart(|| f32x8::from(v.map(|bits| half::f16::from_bits(bits).to_f32())))
    }
    #[inline(always)]
    fn narrow_f16(self, v: f32x8) -> [u16; 8] {
        apart(|| v.to_array().map(|x| half::f16::from_f32(x).to_bits()))
    }
}

impl Simd for PortableWide {
    simd!(PortableWide, f64, f64x4, u64x4, 4, fused::mul_add_wide);
    type Widened = [f64x4; 1];
    f64_lanes!(f64x4);

    type Exp2Table = [u64; 8];
    #[inline(always)]
    fn exp2_table(self, bits: &[u64; 8]) -> [u64; 8] {
        *bits
    }
    #[inline(always)]
    fn scale(self, table: [u64; 8], m: f64x4) -> f64x4 {
        f64x4::from(m.to_array().map(|m| {
            let m = m.to_bits();
            let shifted = m << <f64 as Real>::EIGHTH_SHIFT;
            f64::from_bits(shifted.wrapping_add(table[(m & 7) as usize]))
        }))
    }
}

impl Doubles for PortableWide {
    #[inline(always)]
    fn power(self, m: f64x4) -> f64x4 {
        f64x4::from(m.to_array().map(|m| f64::from_bits(m.to_bits() << 52)))
    }
    #[inline(always)]
    fn split(self, x: f64x4) -> (f64x4, f64x4) {
        let bits = x.to_array().map(f64::to_bits);
        // The bias keeps `above` positive; its exponent field is k plus the bias.
        let above = bits.map(|bits| bits.wrapping_sub(SQRT_HALF.wrapping_sub(ONE)));
        let k = above.map(|a| f64::from_bits(a >> 52 | TWO_52) - TWO_52_AND_BIAS);
        let m = std::array::from_fn(|i| {
            f64::from_bits(bits[i].wrapping_sub(above[i] & EXPONENT).wrapping_add(ONE))
        });
        (f64x4::from(k), f64x4::from(m))
    }
}
