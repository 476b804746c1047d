//! AVX-512 (F, BW, DQ, VL): 16 lanes a register, masks in registers of their own.

use super::Simd;
use std::arch::x86_64::*;

/// Proof that the processor has AVX-512 F, BW, DQ and VL.
#[derive(Clone, Copy)]
pub struct Avx512(());

impl Avx512 {
    /// # Safety
    /// The processor has AVX-512 F, BW, DQ and VL, and so does the calling entry point.
    #[inline(always)]
    pub unsafe fn assume() -> Self {
        Avx512(())
    }
}

/// A call of intrinsics, with the one reason why they may be called.
macro_rules! avx512 {
    ($e:expr) => {
        // SAFETY: the token exists, so the processor has the features (`Avx512::assume`).
        unsafe { $e }
    };
}

impl Simd for Avx512 {
    type Vector = __m512;
    type Block = [__m512; 4];
    type Totals = [__m512d; 2];

    const LANES: usize = 16;

    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        avx512!(_mm512_set1_ps(x))
    }
    #[inline(always)]
    fn splat_block(self, x: f32) -> [__m512; 4] {
        [self.splat(x); 4]
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
    fn zero_where_zero(self, w: __m512, v: __m512) -> __m512 {
        avx512!({
            let nonzero = _mm512_cmp_ps_mask::<_CMP_NEQ_UQ>(w, _mm512_setzero_ps());
            _mm512_maskz_mov_ps(nonzero, v)
        })
    }
    #[inline(always)]
    fn exponent_from_low_bits(self, m: __m512) -> __m512 {
        avx512!(_mm512_castsi512_ps(_mm512_slli_epi32::<23>(_mm512_castps_si512(m))))
    }

    #[inline(always)]
    fn max_lane(self, [a, b, c, d]: [__m512; 4]) -> f32 {
        avx512!({
            let m = _mm512_max_ps(_mm512_max_ps(a, b), _mm512_max_ps(c, d));
            _mm512_reduce_max_ps(m)
        })
    }
    #[inline(always)]
    fn totals(self) -> [__m512d; 2] {
        avx512!([_mm512_setzero_pd(); 2])
    }
    #[inline(always)]
    fn add_block(self, [lo, hi]: [__m512d; 2], [a, b, c, d]: [__m512; 4]) -> [__m512d; 2] {
        avx512!({
            let v = _mm512_add_ps(_mm512_add_ps(a, b), _mm512_add_ps(c, d));
            let v_lo = _mm512_cvtps_pd(_mm512_castps512_ps256(v));
            let v_hi = _mm512_cvtps_pd(_mm512_extractf32x8_ps::<1>(v));
            [_mm512_add_pd(lo, v_lo), _mm512_add_pd(hi, v_hi)]
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
