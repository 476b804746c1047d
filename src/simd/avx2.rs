//! AVX2 with FMA and F16C: 32 bytes a register, masks in registers of all-ones and all-zero lanes.

use super::x86::{transpose, x86_methods};
use super::{
    Doubles, EXPONENT, Halves, ONE, Real, SQRT_HALF, Simd, TWO_52, TWO_52_AND_BIAS, f64_lanes,
    write_lanes,
};
use std::arch::asm;
use std::arch::x86_64::*;

/// 8 lanes of f32, and proof that the processor has AVX2, FMA and F16C.
#[derive(Clone, Copy)]
pub struct Avx2(());

/// 4 lanes of f64, and proof that the processor has AVX2, FMA and F16C.
#[derive(Clone, Copy)]
pub struct Avx2Wide(());

/// Calls intrinsics that access no memory.
macro_rules! avx2 {
    ($e:expr) => {
        // SAFETY: the token proves that the processor has AVX2, FMA and F16C (`Simd::assume`).
        unsafe { $e }
    };
}

impl Avx2 {
    /// Returns a mask with lane `i` set if bit `i` of `lanes` is.
    #[inline(always)]
    fn mask(self, lanes: u32) -> __m256i {
        avx2!({
            let bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
            let set = _mm256_and_si256(_mm256_set1_epi32(lanes as i32), bit);
            _mm256_cmpeq_epi32(set, bit)
        })
    }

    /// Returns a mask of 32-bit lanes with lane `i` set if bit `2i` of [`pairs`] is.
    #[inline(always)]
    fn pair_mask(self, pairs: u32) -> __m128i {
        avx2!({
            let bit = _mm_setr_epi32(1, 4, 16, 64);
            _mm_cmpeq_epi32(_mm_and_si128(_mm_set1_epi32(pairs as i32), bit), bit)
        })
    }
}

impl Avx2Wide {
    /// Returns a mask with lane `i` set if bit `i` of `lanes` is.
    #[inline(always)]
    fn mask(self, lanes: u32) -> __m256i {
        avx2!({
            let bit = _mm256_setr_epi64x(1, 2, 4, 8);
            let set = _mm256_and_si256(_mm256_set1_epi64x(i64::from(lanes)), bit);
            _mm256_cmpeq_epi64(set, bit)
        })
    }
}

/// Splits 8 lanes into pairs and single lanes. Bit `2i` of the first result is set if the lanes `2i`
/// and `2i + 1` both are; the second has the lanes that are set and in no pair.
#[inline(always)]
fn pairs(lanes: u32) -> (u32, u32) {
    let pairs = lanes & lanes >> 1 & 0x55;
    (pairs, lanes & 0xFF & !(pairs | pairs << 1))
}

/// `(v0 + v2) + (v1 + v3)`: the last additions of [`Simd::sum`].
///
/// # Safety
/// The processor has AVX.
#[inline(always)]
pub unsafe fn sum4(v: __m256d) -> f64 {
    // SAFETY: the processor has AVX (# Safety).
    unsafe {
        let v2 = _mm_add_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd::<1>(v));
        _mm_cvtsd_f64(_mm_add_sd(v2, _mm_unpackhi_pd(v2, v2)))
    }
}

/// The part of an `impl Simd` that f32 and f64 share, but for names, and AVX-512 does not: masks and
/// the methods that use them, the range check and the sum of totals.
macro_rules! mask_methods {
    (
        real: $real:ident,
        vector: $vector:ident,
        maskload: $maskload:ident,
        maskstore: $maskstore:ident,
        from_integers: $from_integers:ident,
        to_integers: $to_integers:ident,
        blendv: $blendv:ident,
        cmp: $cmp:ident,
        movemask: $movemask:ident,
        xor: $xor:ident,
        and: $and:ident,
        splat_bits: $splat_bits:ident,
    ) => {
        type Mask = $vector;
        type RangeCheck = __m256i;

        #[inline(always)]
        unsafe fn load_lanes(self, p: *const $real, lanes: u32, fill: $real) -> $vector {
            let mask = self.mask(lanes);
            // SAFETY: the load touches only the lanes of `mask`, whose bits are set in `lanes` and
            // which are valid for reads (`Simd::load_lanes`). The token proves the features.
            unsafe { $blendv(self.splat(fill), $maskload(p, mask), $from_integers(mask)) }
        }
        #[inline(always)]
        unsafe fn store_lanes(self, p: *mut $real, lanes: u32, v: $vector) {
            let mask = self.mask(lanes);
            // SAFETY: the store touches only the lanes of `mask`, whose bits are set in `lanes` and
            // which are valid for writes (`Simd::store_lanes`). The token proves the features.
            unsafe { $maskstore(p, mask, v) }
        }

        #[inline(always)]
        fn less(self, a: $vector, b: $vector) -> $vector {
            avx2!($cmp::<_CMP_LT_OQ>(a, b))
        }
        #[inline(always)]
        fn equal(self, a: $vector, b: $vector) -> $vector {
            avx2!($cmp::<_CMP_EQ_OQ>(a, b))
        }
        #[inline(always)]
        fn not_less(self, a: $vector, b: $vector) -> $vector {
            avx2!($cmp::<_CMP_NLT_UQ>(a, b))
        }
        #[inline(always)]
        fn not_equal(self, a: $vector, b: $vector) -> $vector {
            avx2!($cmp::<_CMP_NEQ_UQ>(a, b))
        }
        #[inline(always)]
        fn select(self, mask: $vector, a: $vector, b: $vector) -> $vector {
            avx2!($blendv(b, a, mask))
        }
        #[inline(always)]
        fn keep(self, mask: $vector, v: $vector) -> $vector {
            avx2!($and(mask, v))
        }
        #[inline(always)]
        fn constant(self, x: $real) -> $vector {
            #[inline]
            #[target_feature(enable = "avx2")]
            fn opaque(mut x: $vector) -> $vector {
                // SAFETY: the text is a comment: no instruction runs, and `x` stays as it is.
                unsafe {
                    asm!("/* {0} */", inout(ymm_reg) x, options(pure, nomem, nostack, preserves_flags))
                };
                x
            }
            avx2!(opaque(self.splat(x)))
        }
        #[inline(always)]
        fn bits(self, mask: $vector) -> u32 {
            let mut bits = avx2!($movemask(mask) as u32);
            // The compiler is not told where they come from: it would join masks in vectors, in more instructions.
            // SAFETY: the text is a comment: no instruction runs, and `bits` stays as it is.
            unsafe {
                asm!("/* {0:e} */", inout(reg) bits, options(pure, nomem, nostack, preserves_flags))
            };
            bits
        }

        #[inline(always)]
        fn range_check_start(self) -> __m256i {
            avx2!(_mm256_setzero_si256())
        }
        #[inline(always)]
        fn range_check(self, mut seen: __m256i, block: &Self::Block, expected: $vector) -> __m256i {
            avx2!({
                for v in block {
                    let differs = $to_integers($xor(*v, expected));
                    seen = _mm256_or_si256(seen, differs);
                }
                seen
            })
        }
        #[inline(always)]
        fn range_check_passed(self, seen: __m256i) -> bool {
            avx2!(_mm256_testz_si256(seen, $splat_bits(!0 << <$real as Real>::IGNORED_BITS)) == 1)
        }

        #[inline(always)]
        fn sum(self, t: [__m256d; 4]) -> f64 {
            avx2!({
                let lo = _mm256_add_pd(t[0], t[2]);
                let hi = _mm256_add_pd(t[1], t[3]);
                sum4(_mm256_add_pd(lo, hi))
            })
        }
    };
}

impl Simd for Avx2 {
    x86_methods! {
        real: f32,
        vector: __m256,
        wide: Avx2Wide,
        wide_vector: __m256d,
        zero_wide: _mm256_setzero_pd,
        splat: _mm256_set1_ps,
        load: _mm256_loadu_ps,
        store: _mm256_storeu_ps,
        stream: _mm256_stream_ps,
        add(a, b): _mm256_add_ps,
        sub(a, b): _mm256_sub_ps,
        mul(a, b): _mm256_mul_ps,
        div(a, b): _mm256_div_ps,
        mul_add(a, b, c): _mm256_fmadd_ps,
        mul_sub(a, b, c): _mm256_fmsub_ps,
        max(bound, x): _mm256_max_ps,
        min(bound, x): _mm256_min_ps,
        both(a, b): _mm256_and_ps,
        either(a, b): _mm256_or_ps,
    }
    mask_methods! {
        real: f32,
        vector: __m256,
        maskload: _mm256_maskload_ps,
        maskstore: _mm256_maskstore_ps,
        from_integers: _mm256_castsi256_ps,
        to_integers: _mm256_castps_si256,
        blendv: _mm256_blendv_ps,
        cmp: _mm256_cmp_ps,
        movemask: _mm256_movemask_ps,
        xor: _mm256_xor_ps,
        and: _mm256_and_ps,
        splat_bits: _mm256_set1_epi32,
    }

    type Exp2Table = __m256i;
    #[inline(always)]
    fn exp2_table(self, bits: &[u32; 8]) -> __m256i {
        // SAFETY: `bits` has the 32 bytes of a register, and the token proves the features.
        unsafe { _mm256_loadu_si256(bits.as_ptr().cast()) }
    }
    #[inline(always)]
    fn scale(self, table: __m256i, m: __m256) -> __m256 {
        avx2!({
            let m = _mm256_castps_si256(m);
            let entry = _mm256_permutevar8x32_epi32(table, m);
            const SHIFT: i32 = <f32 as Real>::EIGHTH_SHIFT as i32;
            _mm256_castsi256_ps(_mm256_add_epi32(_mm256_slli_epi32::<SHIFT>(m), entry))
        })
    }

    #[inline(always)]
    unsafe fn load_rows(self, p: *const f32, step: isize) -> [__m256; 4] {
        // SAFETY: the first 16 bytes of each of `LANES` rows are valid for reads
        // (`Simd::load_rows`), and the token proves the features.
        unsafe {
            let row = |i: isize| _mm_loadu_ps(p.wrapping_offset(i * step));
            // Register i holds the rows i and i + 4, one in each half.
            let mut v = [_mm256_setzero_ps(); 4];
            for (i, v) in (0..).zip(&mut v) {
                *v = _mm256_insertf128_ps::<1>(_mm256_castps128_ps256(row(i)), row(i + 4));
            }
            transpose(v)
        }
    }
    #[inline(always)]
    unsafe fn store_rows(self, p: *mut f32, step: isize, v: [__m256; 4]) {
        // SAFETY: the first 16 bytes of each of `LANES` rows are valid for writes
        // (`Simd::store_rows`), and the token proves the features.
        unsafe {
            for (i, v) in (0..).zip(transpose(v)) {
                _mm_storeu_ps(p.wrapping_offset(i * step), _mm256_castps256_ps128(v));
                _mm_storeu_ps(p.wrapping_offset((i + 4) * step), _mm256_extractf128_ps::<1>(v));
            }
        }
    }
    #[inline(always)]
    fn widen(self, v: __m256) -> [__m256d; 2] {
        avx2!([
            _mm256_cvtps_pd(_mm256_castps256_ps128(v)),
            _mm256_cvtps_pd(_mm256_extractf128_ps::<1>(v)),
        ])
    }
    #[inline(always)]
    fn narrow(self, [lo, hi]: [__m256d; 2]) -> __m256 {
        avx2!(_mm256_set_m128(_mm256_cvtpd_ps(hi), _mm256_cvtpd_ps(lo)))
    }
    #[inline(always)]
    fn max_lane(self, v: __m256) -> f32 {
        avx2!({
            let v4 = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let v2 = _mm_max_ps(v4, _mm_movehl_ps(v4, v4));
            _mm_cvtss_f32(_mm_max_ss(v2, _mm_shuffle_ps::<1>(v2, v2)))
        })
    }
}

transpose!(__m256, _mm256_unpacklo_ps, _mm256_unpackhi_ps, _mm256_shuffle_ps);

impl Halves for Avx2 {
    type Halves = __m128i;

    #[inline(always)]
    unsafe fn load_halves(self, p: *const u16) -> __m128i {
        // SAFETY: `p` is valid for reads of 8 halves (`Halves::load_halves`), and the token proves the
        // features.
        unsafe { _mm_loadu_si128(p.cast()) }
    }
    #[inline(always)]
    unsafe fn load_half_lanes(self, p: *const u16, lanes: u32, fill: u16) -> __m128i {
        if lanes & 0xFF == 0xFF {
            // SAFETY: all 8 bits are set, so `p` is valid for reads of 8 halves
            // (`Halves::load_half_lanes`).
            return unsafe { self.load_halves(p) };
        }
        // AVX2 has no masked load of 16 bits. Pairs are loaded as 32 bits, then the single lanes one
        // by one: they are few where the lanes are a head, a tail or all but one class.
        let (pairs, mut rest) = pairs(lanes);
        // SAFETY: the load touches only pairs of lanes whose bits are set in `lanes`, which are valid
        // for reads (`Halves::load_half_lanes`). The token proves the features.
        let mut v = unsafe {
            let mask = self.pair_mask(pairs);
            let read = _mm_maskload_epi32(p.cast(), mask);
            _mm_blendv_epi8(_mm_set1_epi16(fill as i16), read, mask)
        };
        while rest != 0 {
            let i = rest.trailing_zeros();
            // SAFETY: `i` is a set bit of `lanes`, so `p + i` is aligned and valid for a read
            // (`Halves::load_half_lanes`).
            let half = unsafe { *p.add(i as usize) };
            v = avx2!({
                let lane = _mm_setr_epi16(0, 1, 2, 3, 4, 5, 6, 7);
                let mask = _mm_cmpeq_epi16(lane, _mm_set1_epi16(i as i16));
                _mm_blendv_epi8(v, _mm_set1_epi16(half as i16), mask)
            });
            rest &= rest - 1;
        }
        v
    }
    #[inline(always)]
    unsafe fn store_halves(self, p: *mut u16, v: __m128i) {
        // SAFETY: `p` is valid for writes of 8 halves (`Halves::store_halves`), and the token proves
        // the features.
        unsafe { _mm_storeu_si128(p.cast(), v) }
    }
    #[inline(always)]
    unsafe fn store_half_lanes(self, p: *mut u16, lanes: u32, v: __m128i) {
        if lanes & 0xFF == 0xFF {
            // SAFETY: all 8 bits are set, so `p` is valid for writes of 8 halves
            // (`Halves::store_half_lanes`).
            return unsafe { self.store_halves(p, v) };
        }
        let (pairs, rest) = pairs(lanes);
        // SAFETY: the store touches only pairs of lanes whose bits are set in `lanes`, which are valid
        // for writes (`Halves::store_half_lanes`). The token proves the features.
        unsafe { _mm_maskstore_epi32(p.cast(), self.pair_mask(pairs), v) };
        if rest != 0 {
            let mut halves = [0u16; 8];
            // SAFETY: `halves` has 8 elements.
            unsafe { self.store_halves(halves.as_mut_ptr(), v) };
            // SAFETY: the bits of `rest` are set in `lanes`, so `p` is aligned and valid for writes of
            // these lanes (`Halves::store_half_lanes`).
            unsafe { write_lanes(p, rest, halves) }
        }
    }
    #[inline(always)]
    unsafe fn stream_halves(self, p: *mut u16, v: __m128i) {
        // SAFETY: `p` is valid for writes of 8 halves and aligned to 16 bytes
        // (`Halves::stream_halves`). The token proves the features.
        unsafe { _mm_stream_si128(p.cast(), v) }
    }
    #[inline(always)]
    fn widen_bf16(self, v: __m128i) -> __m256 {
        avx2!(_mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(v))))
    }
    #[inline(always)]
    fn narrow_bf16(self, v: __m256) -> __m128i {
        avx2!({
            let bits = _mm256_castps_si256(v);
            // Adds half an ulp, less one bit if the last bit of the result is 0: ties go to even.
            let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
            let half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF));
            let rounded = _mm256_add_epi32(bits, half);
            // The carry would turn some NaN into 0, so a NaN is made quiet instead.
            let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(v, v));
            let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x0040_0000));
            let bits = _mm256_srli_epi32::<16>(_mm256_blendv_epi8(rounded, quiet, nan));
            _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256::<1>(bits))
        })
    }
    #[inline(always)]
    fn widen_f16(self, v: __m128i) -> __m256 {
        avx2!(_mm256_cvtph_ps(v))
    }
    #[inline(always)]
    fn narrow_f16(self, v: __m256) -> __m128i {
        avx2!(_mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v))
    }
}

impl Simd for Avx2Wide {
    x86_methods! {
        real: f64,
        vector: __m256d,
        wide: Avx2Wide,
        wide_vector: __m256d,
        zero_wide: _mm256_setzero_pd,
        splat: _mm256_set1_pd,
        load: _mm256_loadu_pd,
        store: _mm256_storeu_pd,
        stream: _mm256_stream_pd,
        add(a, b): _mm256_add_pd,
        sub(a, b): _mm256_sub_pd,
        mul(a, b): _mm256_mul_pd,
        div(a, b): _mm256_div_pd,
        mul_add(a, b, c): _mm256_fmadd_pd,
        mul_sub(a, b, c): _mm256_fmsub_pd,
        max(bound, x): _mm256_max_pd,
        min(bound, x): _mm256_min_pd,
        both(a, b): _mm256_and_pd,
        either(a, b): _mm256_or_pd,
    }
    mask_methods! {
        real: f64,
        vector: __m256d,
        maskload: _mm256_maskload_pd,
        maskstore: _mm256_maskstore_pd,
        from_integers: _mm256_castsi256_pd,
        to_integers: _mm256_castpd_si256,
        blendv: _mm256_blendv_pd,
        cmp: _mm256_cmp_pd,
        movemask: _mm256_movemask_pd,
        xor: _mm256_xor_pd,
        and: _mm256_and_pd,
        splat_bits: _mm256_set1_epi64x,
    }
    f64_lanes!(__m256d);

    /// The lower halves of the entries, and the upper ones: no instruction looks up one of eight numbers of 64 bits.
    type Exp2Table = [__m256i; 2];
    #[inline(always)]
    fn exp2_table(self, bits: &[u64; 8]) -> [__m256i; 2] {
        let halves = [bits.map(|bits| bits as u32), bits.map(|bits| (bits >> 32) as u32)];
        // SAFETY: each half has the 32 bytes of a register, and the token proves the features.
        halves.map(|half| unsafe { _mm256_loadu_si256(half.as_ptr().cast()) })
    }
    #[inline(always)]
    fn scale(self, [lower, upper]: [__m256i; 2], m: __m256d) -> __m256d {
        avx2!({
            const SHIFT: i32 = <f64 as Real>::EIGHTH_SHIFT as i32;
            let twice = _mm256_castps_si256(_mm256_moveldup_ps(_mm256_castpd_ps(m)));
            let m = _mm256_castpd_si256(m);
            let lower = _mm256_permutevar8x32_epi32(lower, m);
            let upper = _mm256_permutevar8x32_epi32(upper, twice);
            let entry = _mm256_blend_epi32::<0xAA>(lower, upper);
            _mm256_castsi256_pd(_mm256_add_epi64(_mm256_slli_epi64::<SHIFT>(m), entry))
        })
    }

    #[inline(always)]
    unsafe fn load_rows(self, p: *const f64, step: isize) -> [__m256d; 2] {
        // SAFETY: the first 16 bytes of each of `LANES` rows are valid for reads
        // (`Simd::load_rows`), and the token proves the features.
        unsafe {
            let row = |i: isize| _mm_loadu_pd(p.wrapping_offset(i * step));
            // Register i holds the rows i and i + 2, one in each half.
            let mut v = [_mm256_setzero_pd(); 2];
            for (i, v) in (0..).zip(&mut v) {
                *v = _mm256_insertf128_pd::<1>(_mm256_castpd128_pd256(row(i)), row(i + 2));
            }
            [_mm256_unpacklo_pd(v[0], v[1]), _mm256_unpackhi_pd(v[0], v[1])]
        }
    }
    #[inline(always)]
    unsafe fn store_rows(self, p: *mut f64, step: isize, [a, b]: [__m256d; 2]) {
        // SAFETY: the first 16 bytes of each of `LANES` rows are valid for writes
        // (`Simd::store_rows`), and the token proves the features.
        unsafe {
            let rows = [_mm256_unpacklo_pd(a, b), _mm256_unpackhi_pd(a, b)];
            for (i, v) in (0..).zip(rows) {
                _mm_storeu_pd(p.wrapping_offset(i * step), _mm256_castpd256_pd128(v));
                _mm_storeu_pd(p.wrapping_offset((i + 2) * step), _mm256_extractf128_pd::<1>(v));
            }
        }
    }
    #[inline(always)]
    fn max_lane(self, v: __m256d) -> f64 {
        avx2!({
            let v2 = _mm_max_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd::<1>(v));
            _mm_cvtsd_f64(_mm_max_sd(v2, _mm_unpackhi_pd(v2, v2)))
        })
    }
}

impl Doubles for Avx2Wide {
    #[inline(always)]
    fn power(self, m: __m256d) -> __m256d {
        avx2!(_mm256_castsi256_pd(_mm256_slli_epi64::<52>(_mm256_castpd_si256(m))))
    }
    #[inline(always)]
    fn split(self, x: __m256d) -> (__m256d, __m256d) {
        avx2!({
            let one = _mm256_set1_epi64x(ONE as i64);
            let bits = _mm256_castpd_si256(x);
            // The bias keeps `above` positive; its exponent field is k plus the bias.
            let above =
                _mm256_sub_epi64(bits, _mm256_set1_epi64x(SQRT_HALF.wrapping_sub(ONE) as i64));
            let whole = _mm256_and_si256(above, _mm256_set1_epi64x(EXPONENT as i64));
            let m = _mm256_add_epi64(_mm256_sub_epi64(bits, whole), one);
            let k =
                _mm256_or_si256(_mm256_srli_epi64::<52>(above), _mm256_set1_epi64x(TWO_52 as i64));
            let k = _mm256_sub_pd(_mm256_castsi256_pd(k), _mm256_set1_pd(TWO_52_AND_BIAS));
            (k, _mm256_castsi256_pd(m))
        })
    }
}
