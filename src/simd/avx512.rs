//! AVX-512 (F, BW, DQ, VL): 64 bytes a register, masks in registers of their own.

use super::{Doubles, EXPONENT, Halves, ONE, SQRT_HALF, Simd, TWO_52, TWO_52_AND_BIAS};
use std::arch::x86_64::*;

/// 16 lanes of f32, and proof that the processor has AVX-512 F, BW, DQ and VL.
#[derive(Clone, Copy)]
pub struct Avx512(());

/// 8 lanes of f64.
#[derive(Clone, Copy)]
pub struct Avx512Wide(());

/// A call of intrinsics, with the one reason why they may be called.
macro_rules! avx512 {
    ($e:expr) => {
        // SAFETY: the token exists, so the processor has the features (`Avx512::assume`).
        unsafe { $e }
    };
}

impl Simd for Avx512 {
    type Real = f32;
    type Vector = __m512;
    type Block = [__m512; 4];
    type Mask = __mmask16;
    type Watch = __m512i;
    type Wide = Avx512Wide;
    type Widened = [__m512d; 2];
    type Totals = [__m512d; 2];

    const LANES: usize = 16;

    #[inline(always)]
    unsafe fn assume() -> Self {
        Avx512(())
    }
    #[inline(always)]
    fn wide(self) -> Avx512Wide {
        Avx512Wide(())
    }
    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        avx512!(_mm512_set1_ps(x))
    }
    #[inline(always)]
    fn splat_block(self, x: f32) -> [__m512; 4] {
        [self.splat(x); 4]
    }
    #[inline(always)]
    fn totals(self) -> [__m512d; 2] {
        avx512!([_mm512_setzero_pd(); 2])
    }

    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> __m512 {
        // SAFETY: token; the caller's promise about `p`.
        unsafe { _mm512_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn load_lanes(self, p: *const f32, lanes: u32, fill: f32) -> __m512 {
        // SAFETY: token; a masked load touches only the lanes the caller vouches for.
        unsafe { _mm512_mask_loadu_ps(_mm512_set1_ps(fill), lanes as __mmask16, p) }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, v: __m512) {
        // SAFETY: token; the caller's promise about `p`.
        unsafe { _mm512_storeu_ps(p, v) }
    }
    #[inline(always)]
    unsafe fn store_lanes(self, p: *mut f32, lanes: u32, v: __m512) {
        // SAFETY: token; a masked store touches only the lanes the caller vouches for.
        unsafe { _mm512_mask_storeu_ps(p, lanes as __mmask16, v) }
    }
    #[inline(always)]
    unsafe fn stream(self, p: *mut f32, v: __m512) {
        // SAFETY: token; the caller's promise about `p` and its alignment.
        unsafe { _mm512_stream_ps(p, v) }
    }
    #[inline(always)]
    fn fence(self) {
        avx512!(_mm_sfence())
    }
    #[inline(always)]
    fn prefetch(self, p: *const u8) {
        avx512!(_mm_prefetch::<_MM_HINT_T0>(p.cast()))
    }
    #[inline(always)]
    fn prefetch_far(self, p: *const u8) {
        avx512!(_mm_prefetch::<_MM_HINT_T1>(p.cast()))
    }
    #[inline(always)]
    fn prefetch_write(self, p: *const u8) {
        avx512!(_mm_prefetch::<_MM_HINT_ET0>(p.cast()))
    }

    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        avx512!(_mm512_add_ps(a, b))
    }
    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        avx512!(_mm512_sub_ps(a, b))
    }
    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        avx512!(_mm512_mul_ps(a, b))
    }
    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        avx512!(_mm512_div_ps(a, b))
    }
    #[inline(always)]
    fn mul_add(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        avx512!(_mm512_fmadd_ps(a, b, c))
    }
    #[inline(always)]
    fn mul_sub_exact(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        avx512!(_mm512_fmsub_ps(a, b, c))
    }
    #[inline(always)]
    fn max(self, bound: __m512, x: __m512) -> __m512 {
        avx512!(_mm512_max_ps(bound, x))
    }
    #[inline(always)]
    fn min(self, bound: __m512, x: __m512) -> __m512 {
        avx512!(_mm512_min_ps(bound, x))
    }
    #[inline(always)]
    fn exponent_from_low_bits(self, m: __m512) -> __m512 {
        avx512!(_mm512_castsi512_ps(_mm512_slli_epi32::<23>(_mm512_castps_si512(m))))
    }

    #[inline(always)]
    fn less(self, a: __m512, b: __m512) -> __mmask16 {
        avx512!(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b))
    }
    #[inline(always)]
    fn equal(self, a: __m512, b: __m512) -> __mmask16 {
        avx512!(_mm512_cmp_ps_mask::<_CMP_EQ_OQ>(a, b))
    }
    #[inline(always)]
    fn select(self, mask: __mmask16, a: __m512, b: __m512) -> __m512 {
        avx512!(_mm512_mask_blend_ps(mask, b, a))
    }
    #[inline(always)]
    fn bits(self, mask: __mmask16) -> u32 {
        u32::from(mask)
    }

    #[inline(always)]
    fn watch_start(self) -> __m512i {
        avx512!(_mm512_setzero_si512())
    }
    #[inline(always)]
    fn watch(self, seen: __m512i, block: &[__m512; 4], expected: __m512) -> __m512i {
        avx512!({
            let [a, b, c, d] = block.map(|v| _mm512_castps_si512(v));
            // 0x7E: bits that are not the same in all three; a chain from `a` to `expected`.
            let abc = _mm512_ternarylogic_epi32::<0x7E>(a, b, c);
            let cde = _mm512_ternarylogic_epi32::<0x7E>(c, d, _mm512_castps_si512(expected));
            // 0xFE: or of all three.
            _mm512_ternarylogic_epi32::<0xFE>(seen, abc, cde)
        })
    }
    #[inline(always)]
    fn watch_end(self, seen: __m512i) -> bool {
        avx512!(_mm512_test_epi32_mask(seen, _mm512_set1_epi32(!0xFF)) == 0)
    }

    #[inline(always)]
    fn max_lane(self, v: __m512) -> f32 {
        avx512!(_mm512_reduce_max_ps(v))
    }
    #[inline(always)]
    fn widen(self, v: __m512) -> [__m512d; 2] {
        avx512!([
            _mm512_cvtps_pd(_mm512_castps512_ps256(v)),
            _mm512_cvtps_pd(_mm512_extractf32x8_ps::<1>(v)),
        ])
    }
    #[inline(always)]
    fn narrow(self, [lo, hi]: [__m512d; 2]) -> __m512 {
        avx512!({
            let lo = _mm512_castps256_ps512(_mm512_cvtpd_ps(lo));
            _mm512_insertf32x8::<1>(lo, _mm512_cvtpd_ps(hi))
        })
    }
    #[inline(always)]
    fn sum(self, [lo, hi]: [__m512d; 2]) -> f64 {
        avx512!({
            let v8 = _mm512_add_pd(lo, hi);
            let v4 = _mm256_add_pd(_mm512_castpd512_pd256(v8), _mm512_extractf64x4_pd::<1>(v8));
            super::avx2::sum4(v4)
        })
    }
}

impl Halves for Avx512 {
    type Halves = __m256i;

    #[inline(always)]
    unsafe fn load_halves(self, p: *const u16) -> __m256i {
        // SAFETY: token; the caller's promise about `p`, here and below.
        unsafe { _mm256_loadu_si256(p.cast()) }
    }
    #[inline(always)]
    unsafe fn load_half_lanes(self, p: *const u16, lanes: u32, fill: u16) -> __m256i {
        let fill = avx512!(_mm256_set1_epi16(fill as i16));
        // SAFETY: as above; a masked load touches only the lanes the caller vouches for.
        unsafe { _mm256_mask_loadu_epi16(fill, lanes as __mmask16, p.cast()) }
    }
    #[inline(always)]
    unsafe fn store_halves(self, p: *mut u16, v: __m256i) {
        // SAFETY: as above.
        unsafe { _mm256_storeu_si256(p.cast(), v) }
    }
    #[inline(always)]
    unsafe fn store_half_lanes(self, p: *mut u16, lanes: u32, v: __m256i) {
        // SAFETY: as above; a masked store touches only the lanes the caller vouches for.
        unsafe { _mm256_mask_storeu_epi16(p.cast(), lanes as __mmask16, v) }
    }
    #[inline(always)]
    unsafe fn stream_halves(self, p: *mut u16, v: __m256i) {
        // SAFETY: as above; aligned, as the caller promises.
        unsafe { _mm256_stream_si256(p.cast(), v) }
    }
    #[inline(always)]
    fn widen_bf16(self, v: __m256i) -> __m512 {
        avx512!(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(v))))
    }
    #[inline(always)]
    fn narrow_bf16(self, v: __m512) -> __m256i {
        avx512!({
            let bits = _mm512_castps_si512(v);
            // Half an ulp, less one bit if the result's last bit is 0: ties go to even.
            let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
            let half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF));
            let rounded = _mm512_add_epi32(bits, half);
            // The carry would turn some NaN into 0; they are made quiet instead.
            let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(v, v);
            let quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x0040_0000));
            let bits = _mm512_mask_mov_epi32(rounded, nan, quiet);
            _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(bits))
        })
    }
    #[inline(always)]
    fn widen_f16(self, v: __m256i) -> __m512 {
        avx512!(_mm512_cvtph_ps(v))
    }
    #[inline(always)]
    fn narrow_f16(self, v: __m512) -> __m256i {
        avx512!(_mm512_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(v))
    }
}

impl Simd for Avx512Wide {
    type Real = f64;
    type Vector = __m512d;
    type Block = [__m512d; 4];
    type Mask = __mmask8;
    type Watch = __m512i;
    type Wide = Avx512Wide;
    type Widened = [__m512d; 1];
    type Totals = [__m512d; 2];

    const LANES: usize = 8;

    #[inline(always)]
    unsafe fn assume() -> Self {
        Avx512Wide(())
    }
    #[inline(always)]
    fn wide(self) -> Avx512Wide {
        Avx512Wide(())
    }
    #[inline(always)]
    fn splat(self, x: f64) -> __m512d {
        avx512!(_mm512_set1_pd(x))
    }
    #[inline(always)]
    fn splat_block(self, x: f64) -> [__m512d; 4] {
        [self.splat(x); 4]
    }
    #[inline(always)]
    fn totals(self) -> [__m512d; 2] {
        avx512!([_mm512_setzero_pd(); 2])
    }

    #[inline(always)]
    unsafe fn load(self, p: *const f64) -> __m512d {
        // SAFETY: token; the caller's promise about `p`.
        unsafe { _mm512_loadu_pd(p) }
    }
    #[inline(always)]
    unsafe fn load_lanes(self, p: *const f64, lanes: u32, fill: f64) -> __m512d {
        // SAFETY: token; a masked load touches only the lanes the caller vouches for.
        unsafe { _mm512_mask_loadu_pd(_mm512_set1_pd(fill), lanes as __mmask8, p) }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f64, v: __m512d) {
        // SAFETY: token; the caller's promise about `p`.
        unsafe { _mm512_storeu_pd(p, v) }
    }
    #[inline(always)]
    unsafe fn store_lanes(self, p: *mut f64, lanes: u32, v: __m512d) {
        // SAFETY: token; a masked store touches only the lanes the caller vouches for.
        unsafe { _mm512_mask_storeu_pd(p, lanes as __mmask8, v) }
    }
    #[inline(always)]
    unsafe fn stream(self, p: *mut f64, v: __m512d) {
        // SAFETY: token; the caller's promise about `p` and its alignment.
        unsafe { _mm512_stream_pd(p, v) }
    }
    #[inline(always)]
    fn fence(self) {
        avx512!(_mm_sfence())
    }
    #[inline(always)]
    fn prefetch(self, p: *const u8) {
        avx512!(_mm_prefetch::<_MM_HINT_T0>(p.cast()))
    }
    #[inline(always)]
    fn prefetch_far(self, p: *const u8) {
        avx512!(_mm_prefetch::<_MM_HINT_T1>(p.cast()))
    }
    #[inline(always)]
    fn prefetch_write(self, p: *const u8) {
        avx512!(_mm_prefetch::<_MM_HINT_ET0>(p.cast()))
    }

    #[inline(always)]
    fn add(self, a: __m512d, b: __m512d) -> __m512d {
        avx512!(_mm512_add_pd(a, b))
    }
    #[inline(always)]
    fn sub(self, a: __m512d, b: __m512d) -> __m512d {
        avx512!(_mm512_sub_pd(a, b))
    }
    #[inline(always)]
    fn mul(self, a: __m512d, b: __m512d) -> __m512d {
        avx512!(_mm512_mul_pd(a, b))
    }
    #[inline(always)]
    fn div(self, a: __m512d, b: __m512d) -> __m512d {
        avx512!(_mm512_div_pd(a, b))
    }
    #[inline(always)]
    fn mul_add(self, a: __m512d, b: __m512d, c: __m512d) -> __m512d {
        avx512!(_mm512_fmadd_pd(a, b, c))
    }
    #[inline(always)]
    fn mul_sub_exact(self, a: __m512d, b: __m512d, c: __m512d) -> __m512d {
        avx512!(_mm512_fmsub_pd(a, b, c))
    }
    #[inline(always)]
    fn max(self, bound: __m512d, x: __m512d) -> __m512d {
        avx512!(_mm512_max_pd(bound, x))
    }
    #[inline(always)]
    fn min(self, bound: __m512d, x: __m512d) -> __m512d {
        avx512!(_mm512_min_pd(bound, x))
    }
    #[inline(always)]
    fn exponent_from_low_bits(self, m: __m512d) -> __m512d {
        avx512!(_mm512_castsi512_pd(_mm512_slli_epi64::<52>(_mm512_castpd_si512(m))))
    }

    #[inline(always)]
    fn less(self, a: __m512d, b: __m512d) -> __mmask8 {
        avx512!(_mm512_cmp_pd_mask::<_CMP_LT_OQ>(a, b))
    }
    #[inline(always)]
    fn equal(self, a: __m512d, b: __m512d) -> __mmask8 {
        avx512!(_mm512_cmp_pd_mask::<_CMP_EQ_OQ>(a, b))
    }
    #[inline(always)]
    fn select(self, mask: __mmask8, a: __m512d, b: __m512d) -> __m512d {
        avx512!(_mm512_mask_blend_pd(mask, b, a))
    }
    #[inline(always)]
    fn bits(self, mask: __mmask8) -> u32 {
        u32::from(mask)
    }

    #[inline(always)]
    fn watch_start(self) -> __m512i {
        avx512!(_mm512_setzero_si512())
    }
    #[inline(always)]
    fn watch(self, seen: __m512i, block: &[__m512d; 4], expected: __m512d) -> __m512i {
        avx512!({
            let [a, b, c, d] = block.map(|v| _mm512_castpd_si512(v));
            // 0x7E: bits that are not the same in all three; a chain from `a` to `expected`.
            let abc = _mm512_ternarylogic_epi32::<0x7E>(a, b, c);
            let cde = _mm512_ternarylogic_epi32::<0x7E>(c, d, _mm512_castpd_si512(expected));
            // 0xFE: or of all three.
            _mm512_ternarylogic_epi32::<0xFE>(seen, abc, cde)
        })
    }
    #[inline(always)]
    fn watch_end(self, seen: __m512i) -> bool {
        avx512!(_mm512_test_epi64_mask(seen, _mm512_set1_epi64(!0x7FF)) == 0)
    }

    #[inline(always)]
    fn max_lane(self, v: __m512d) -> f64 {
        avx512!(_mm512_reduce_max_pd(v))
    }
    #[inline(always)]
    fn widen(self, v: __m512d) -> [__m512d; 1] {
        [v]
    }
    #[inline(always)]
    fn narrow(self, [v]: [__m512d; 1]) -> __m512d {
        v
    }
    #[inline(always)]
    fn sum(self, [lo, hi]: [__m512d; 2]) -> f64 {
        avx512!({
            let v8 = _mm512_add_pd(lo, hi);
            let v4 = _mm256_add_pd(_mm512_castpd512_pd256(v8), _mm512_extractf64x4_pd::<1>(v8));
            super::avx2::sum4(v4)
        })
    }
}

impl Doubles for Avx512Wide {
    #[inline(always)]
    fn split(self, x: __m512d) -> (__m512d, __m512d) {
        avx512!({
            let one = _mm512_set1_epi64(ONE as i64);
            let bits = _mm512_castpd_si512(x);
            // The bias keeps it positive; k is then in the exponent's place.
            let above =
                _mm512_sub_epi64(bits, _mm512_set1_epi64(SQRT_HALF.wrapping_sub(ONE) as i64));
            let whole = _mm512_and_si512(above, _mm512_set1_epi64(EXPONENT as i64));
            let m = _mm512_add_epi64(_mm512_sub_epi64(bits, whole), one);
            let k =
                _mm512_or_si512(_mm512_srli_epi64::<52>(above), _mm512_set1_epi64(TWO_52 as i64));
            let k = _mm512_sub_pd(_mm512_castsi512_pd(k), _mm512_set1_pd(TWO_52_AND_BIAS));
            (k, _mm512_castsi512_pd(m))
        })
    }
}
