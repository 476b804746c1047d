//! AVX2 with FMA and F16C: 8 lanes a register.

use super::{Simd, read_lanes, write_lanes};
use std::arch::x86_64::*;

/// Proof that the processor has AVX2, FMA and F16C.
#[derive(Clone, Copy)]
pub struct Avx2(());

/// A call of intrinsics, with the one reason why they may be called.
macro_rules! avx2 {
    ($e:expr) => {
        // SAFETY: the token exists, so the processor has the features (`Avx2::assume`).
        unsafe { $e }
    };
}

impl Avx2 {
    /// # Safety
    /// The processor has AVX2, FMA and F16C, and so does the calling entry point.
    #[inline(always)]
    pub unsafe fn assume() -> Self {
        Avx2(())
    }

    /// The lower and the upper lanes.
    #[inline(always)]
    fn to_f64(self, v: __m256) -> [__m256d; 2] {
        avx2!([
            _mm256_cvtps_pd(_mm256_castps256_ps128(v)),
            _mm256_cvtps_pd(_mm256_extractf128_ps::<1>(v)),
        ])
    }

    /// The low 8 bits of `lanes` as a vector of all-ones or all-zero lanes.
    #[inline(always)]
    fn mask(self, lanes: u32) -> __m256i {
        avx2!({
            let bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
            let set = _mm256_and_si256(_mm256_set1_epi32(lanes as i32), bit);
            _mm256_cmpeq_epi32(set, bit)
        })
    }
}

/// `(v0 + v2) + (v1 + v3)`: the end of the tree of [`Simd::sum`].
///
/// # Safety
/// The processor has AVX.
#[inline(always)]
pub unsafe fn sum4(v: __m256d) -> f64 {
    // SAFETY: AVX, as the caller promises.
    unsafe {
        let v2 = _mm_add_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd::<1>(v));
        _mm_cvtsd_f64(_mm_add_sd(v2, _mm_unpackhi_pd(v2, v2)))
    }
}

impl Simd for Avx2 {
    type Vector = __m256;
    type Block = [__m256; 8];
    type Totals = [__m256d; 4];
    type Halves = __m128i;
    type Watch = __m256i;

    const LANES: usize = 8;

    #[inline(always)]
    fn splat(self, x: f32) -> __m256 {
        avx2!(_mm256_set1_ps(x))
    }
    #[inline(always)]
    fn splat_block(self, x: f32) -> [__m256; 8] {
        [self.splat(x); 8]
    }

    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> __m256 {
        // SAFETY: token; the caller's promise about `p`.
        unsafe { _mm256_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn load_lanes(self, p: *const f32, lanes: u32, fill: f32) -> __m256 {
        let mask = self.mask(lanes);
        // SAFETY: token; a masked load touches only the lanes the caller vouches for.
        unsafe {
            let v = _mm256_maskload_ps(p, mask);
            _mm256_blendv_ps(_mm256_set1_ps(fill), v, _mm256_castsi256_ps(mask))
        }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, v: __m256) {
        // SAFETY: token; the caller's promise about `p`.
        unsafe { _mm256_storeu_ps(p, v) }
    }
    #[inline(always)]
    unsafe fn store_lanes(self, p: *mut f32, lanes: u32, v: __m256) {
        let mask = self.mask(lanes);
        // SAFETY: token; a masked store touches only the lanes the caller vouches for.
        unsafe { _mm256_maskstore_ps(p, mask, v) }
    }
    #[inline(always)]
    unsafe fn stream(self, p: *mut f32, v: __m256) {
        // SAFETY: token; the caller's promise about `p` and its alignment.
        unsafe { _mm256_stream_ps(p, v) }
    }
    #[inline(always)]
    unsafe fn load_halves(self, p: *const u16) -> __m128i {
        // SAFETY: token; the caller's promise about `p`, here and below.
        unsafe { _mm_loadu_si128(p.cast()) }
    }
    #[inline(always)]
    unsafe fn load_half_lanes(self, p: *const u16, lanes: u32, fill: u16) -> __m128i {
        // There is no masked load of 16 bits.
        // SAFETY: as above.
        let halves = unsafe { read_lanes(p, lanes, fill) };
        // SAFETY: 8 halves.
        unsafe { self.load_halves(halves.as_ptr()) }
    }
    #[inline(always)]
    unsafe fn store_halves(self, p: *mut u16, v: __m128i) {
        // SAFETY: as above.
        unsafe { _mm_storeu_si128(p.cast(), v) }
    }
    #[inline(always)]
    unsafe fn store_half_lanes(self, p: *mut u16, lanes: u32, v: __m128i) {
        let mut halves = [0u16; 8];
        // SAFETY: 8 halves.
        unsafe { self.store_halves(halves.as_mut_ptr(), v) };
        // SAFETY: as above.
        unsafe { write_lanes(p, lanes, halves) }
    }
    #[inline(always)]
    unsafe fn stream_halves(self, p: *mut u16, v: __m128i) {
        // SAFETY: as above; aligned, as the caller promises.
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
            // Half an ulp, less one bit if the result's last bit is 0: ties go to even.
            let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
            let half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF));
            let rounded = _mm256_add_epi32(bits, half);
            // The carry would turn some NaN into 0; they are made quiet instead.
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
    #[inline(always)]
    fn fence(self) {
        avx2!(_mm_sfence())
    }
    #[inline(always)]
    fn prefetch(self, p: *const u8) {
        avx2!(_mm_prefetch::<_MM_HINT_T0>(p.cast()))
    }
    #[inline(always)]
    fn prefetch_far(self, p: *const u8) {
        avx2!(_mm_prefetch::<_MM_HINT_T1>(p.cast()))
    }
    #[inline(always)]
    fn prefetch_write(self, p: *const u8) {
        avx2!(_mm_prefetch::<_MM_HINT_ET0>(p.cast()))
    }

    #[inline(always)]
    fn add(self, a: __m256, b: __m256) -> __m256 {
        avx2!(_mm256_add_ps(a, b))
    }
    #[inline(always)]
    fn sub(self, a: __m256, b: __m256) -> __m256 {
        avx2!(_mm256_sub_ps(a, b))
    }
    #[inline(always)]
    fn mul(self, a: __m256, b: __m256) -> __m256 {
        avx2!(_mm256_mul_ps(a, b))
    }
    #[inline(always)]
    fn mul_add(self, a: __m256, b: __m256, c: __m256) -> __m256 {
        avx2!(_mm256_fmadd_ps(a, b, c))
    }
    #[inline(always)]
    fn mul_sub_exact(self, a: __m256, b: __m256, c: __m256) -> __m256 {
        avx2!(_mm256_fmsub_ps(a, b, c))
    }
    #[inline(always)]
    fn max(self, bound: __m256, x: __m256) -> __m256 {
        avx2!(_mm256_max_ps(bound, x))
    }
    #[inline(always)]
    fn min(self, bound: __m256, x: __m256) -> __m256 {
        avx2!(_mm256_min_ps(bound, x))
    }
    #[inline(always)]
    fn exponent_from_low_bits(self, m: __m256) -> __m256 {
        avx2!(_mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_castps_si256(m))))
    }

    #[inline(always)]
    fn watch_start(self) -> __m256i {
        avx2!(_mm256_setzero_si256())
    }
    #[inline(always)]
    fn watch(self, mut seen: __m256i, block: &[__m256; 8], expected: __m256) -> __m256i {
        avx2!({
            for v in block {
                seen = _mm256_or_si256(seen, _mm256_castps_si256(_mm256_xor_ps(*v, expected)));
            }
            seen
        })
    }
    #[inline(always)]
    fn watch_end(self, seen: __m256i) -> bool {
        avx2!(_mm256_testz_si256(seen, _mm256_set1_epi32(!0xFF)) == 1)
    }

    #[inline(always)]
    fn max_lane(self, b: [__m256; 8]) -> f32 {
        avx2!({
            let lo = _mm256_max_ps(_mm256_max_ps(b[0], b[1]), _mm256_max_ps(b[2], b[3]));
            let hi = _mm256_max_ps(_mm256_max_ps(b[4], b[5]), _mm256_max_ps(b[6], b[7]));
            let v8 = _mm256_max_ps(lo, hi);
            let v4 = _mm_max_ps(_mm256_castps256_ps128(v8), _mm256_extractf128_ps::<1>(v8));
            let v2 = _mm_max_ps(v4, _mm_movehl_ps(v4, v4));
            _mm_cvtss_f32(_mm_max_ss(v2, _mm_shuffle_ps::<1>(v2, v2)))
        })
    }
    #[inline(always)]
    fn totals(self) -> [__m256d; 4] {
        avx2!([_mm256_setzero_pd(); 4])
    }
    #[inline(always)]
    fn add_block(self, t: [__m256d; 4], b: [__m256; 8]) -> [__m256d; 4] {
        avx2!({
            // Registers 0 and 1 hold lanes 0..16, 2 and 3 lanes 16..32, and so on.
            let lo = _mm256_add_ps(_mm256_add_ps(b[0], b[2]), _mm256_add_ps(b[4], b[6]));
            let hi = _mm256_add_ps(_mm256_add_ps(b[1], b[3]), _mm256_add_ps(b[5], b[7]));
            let [l0, l1] = self.to_f64(lo);
            let [h0, h1] = self.to_f64(hi);
            [
                _mm256_add_pd(t[0], l0),
                _mm256_add_pd(t[1], l1),
                _mm256_add_pd(t[2], h0),
                _mm256_add_pd(t[3], h1),
            ]
        })
    }
    #[inline(always)]
    fn add_centered(self, totals: &mut [__m256d; 4], i: usize, x: __m256, center: f64) {
        avx2!({
            let center = _mm256_set1_pd(center);
            // Even registers hold the first 8 of 16 lanes.
            for (total, x) in totals[i % 2 * 2..].iter_mut().zip(self.to_f64(x)) {
                *total = _mm256_add_pd(*total, _mm256_sub_pd(x, center));
            }
        })
    }
    #[inline(always)]
    fn add_weighted(self, totals: &mut [__m256d; 4], i: usize, x: __m256, center: f64, w: __m256) {
        avx2!({
            let center = _mm256_set1_pd(center);
            let lanes = self.to_f64(x).into_iter().zip(self.to_f64(w));
            for (total, (x, w)) in totals[i % 2 * 2..].iter_mut().zip(lanes) {
                let nonzero = _mm256_cmp_pd::<_CMP_NEQ_UQ>(w, _mm256_setzero_pd());
                let term = _mm256_mul_pd(w, _mm256_sub_pd(x, center));
                *total = _mm256_add_pd(*total, _mm256_and_pd(nonzero, term));
            }
        })
    }
    #[inline(always)]
    fn sum(self, t: [__m256d; 4]) -> f64 {
        avx2!({
            let lo = _mm256_add_pd(t[0], t[2]);
            let hi = _mm256_add_pd(t[1], t[3]);
            sum4(_mm256_add_pd(lo, hi))
        })
    }
}
