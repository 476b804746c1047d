//! AVX-512 (F, BW, DQ, VL): 64 bytes a register, masks in registers of their own.

use super::avx2::sum4;
use super::x86::{transpose, x86_methods};
use super::{
    Doubles, EXPONENT, Halves, ONE, PairProducts, Real, SQRT_HALF, Simd, TWO_52, TWO_52_AND_BIAS,
    f64_lanes,
};
use std::arch::x86_64::*;
use std::mem::transmute;

/// 16 lanes of f32, and proof that the processor has AVX-512 F, BW, DQ and VL.
#[derive(Clone, Copy)]
pub struct Avx512(());

/// 8 lanes of f64, and proof that the processor has AVX-512 F, BW, DQ and VL.
#[derive(Clone, Copy)]
pub struct Avx512Wide(());

/// Calls intrinsics that access no memory.
macro_rules! avx512 {
    ($e:expr) => {
        // SAFETY: the token proves that the processor has AVX-512 F, BW, DQ and VL (`Simd::assume`).
        unsafe { $e }
    };
}

/// The part of an `impl Simd` that f32 and f64 share, but for names, and AVX2 does not: masks and
/// the methods that use them, the range check and the sum of totals.
macro_rules! mask_methods {
    (
        real: $real:ident,
        vector: $vector:ident,
        mask: $mask:ident,
        mask_loadu: $mask_loadu:ident,
        mask_storeu: $mask_storeu:ident,
        to_integers: $to_integers:ident,
        cmp_mask: $cmp_mask:ident,
        cmp_where: $cmp_where:ident,
        mask_blend: $mask_blend:ident,
        test_mask: $test_mask:ident,
        splat_bits: $splat_bits:ident,
        reduce_max: $reduce_max:ident,
    ) => {
        type Mask = $mask;
        type RangeCheck = __m512i;
        const MASKS_LOADS: bool = true;
        const SPLITS_LOOPS: bool = false;

        #[inline(always)]
        unsafe fn load_lanes(self, p: *const $real, lanes: u32, fill: $real) -> $vector {
            // SAFETY: the load touches only lanes whose bit is set in `lanes`, which are valid for
            // reads (`Simd::load_lanes`). The token proves the features.
            unsafe { $mask_loadu(self.splat(fill), lanes as $mask, p) }
        }
        #[inline(always)]
        unsafe fn store_lanes(self, p: *mut $real, lanes: u32, v: $vector) {
            // SAFETY: the store touches only lanes whose bit is set in `lanes`, which are valid for
            // writes (`Simd::store_lanes`). The token proves the features.
            unsafe { $mask_storeu(p, lanes as $mask, v) }
        }

        #[inline(always)]
        fn less(self, a: $vector, b: $vector) -> $mask {
            avx512!($cmp_mask::<_CMP_LT_OQ>(a, b))
        }
        #[inline(always)]
        fn equal(self, a: $vector, b: $vector) -> $mask {
            avx512!($cmp_mask::<_CMP_EQ_OQ>(a, b))
        }
        #[inline(always)]
        fn not_less(self, a: $vector, b: $vector) -> $mask {
            avx512!($cmp_mask::<_CMP_NLT_UQ>(a, b))
        }
        #[inline(always)]
        fn not_less_where(self, mask: $mask, a: $vector, b: $vector) -> $mask {
            avx512!($cmp_where::<_CMP_NLT_UQ>(mask, a, b))
        }
        #[inline(always)]
        fn not_equal(self, a: $vector, b: $vector) -> $mask {
            avx512!($cmp_mask::<_CMP_NEQ_UQ>(a, b))
        }
        #[inline(always)]
        fn select(self, mask: $mask, a: $vector, b: $vector) -> $vector {
            avx512!($mask_blend(mask, b, a))
        }
        #[inline(always)]
        fn keep(self, mask: $mask, v: $vector) -> $vector {
            self.select(mask, v, self.splat(0.0))
        }
        #[inline(always)]
        fn both(self, a: $mask, b: $mask) -> $mask {
            a & b
        }
        #[inline(always)]
        fn either(self, a: $mask, b: $mask) -> $mask {
            a | b
        }
        #[inline(always)]
        fn bits(self, mask: $mask) -> u32 {
            u32::from(mask)
        }

        #[inline(always)]
        fn range_check_start(self) -> __m512i {
            avx512!(_mm512_setzero_si512())
        }
        #[inline(always)]
        fn range_check(self, seen: __m512i, block: &Self::Block, expected: $vector) -> __m512i {
            avx512!({
                let [a, b, c, d] = block.map(|v| $to_integers(v));
                // 0x7E sets the bits that are not the same in all three operands. `c` is in both
                // groups, so a bit that differs anywhere between `a` and `expected` is in one.
                let abc = _mm512_ternarylogic_epi32::<0x7E>(a, b, c);
                let cde = _mm512_ternarylogic_epi32::<0x7E>(c, d, $to_integers(expected));
                // 0xFE is the or of all three operands.
                _mm512_ternarylogic_epi32::<0xFE>(seen, abc, cde)
            })
        }
        #[inline(always)]
        fn range_check_passed(self, seen: __m512i) -> bool {
            avx512!($test_mask(seen, $splat_bits(!0 << <$real as Real>::IGNORED_BITS)) == 0)
        }

        #[inline(always)]
        fn max_lane(self, v: $vector) -> $real {
            avx512!($reduce_max(v))
        }
        #[inline(always)]
        fn sum(self, [lo, hi]: [__m512d; 2]) -> f64 {
            avx512!({
                let v8 = _mm512_add_pd(lo, hi);
                let v4 = _mm256_add_pd(_mm512_castpd512_pd256(v8), _mm512_extractf64x4_pd::<1>(v8));
                sum4(v4)
            })
        }
    };
}

impl Simd for Avx512 {
    x86_methods! {
        real: f32,
        vector: __m512,
        wide: Avx512Wide,
        wide_vector: __m512d,
        zero_wide: _mm512_setzero_pd,
        splat: _mm512_set1_ps,
        load: _mm512_loadu_ps,
        store: _mm512_storeu_ps,
        stream: _mm512_stream_ps,
        add(a, b): _mm512_add_ps,
        sub(a, b): _mm512_sub_ps,
        mul(a, b): _mm512_mul_ps,
        div(a, b): _mm512_div_ps,
        mul_add(a, b, c): _mm512_fmadd_ps,
        mul_sub(a, b, c): _mm512_fmsub_ps,
        max(bound, x): _mm512_max_ps,
        min(bound, x): _mm512_min_ps,
    }
    mask_methods! {
        real: f32,
        vector: __m512,
        mask: __mmask16,
        mask_loadu: _mm512_mask_loadu_ps,
        mask_storeu: _mm512_mask_storeu_ps,
        to_integers: _mm512_castps_si512,
        cmp_mask: _mm512_cmp_ps_mask,
        cmp_where: _mm512_mask_cmp_ps_mask,
        mask_blend: _mm512_mask_blend_ps,
        test_mask: _mm512_test_epi32_mask,
        splat_bits: _mm512_set1_epi32,
        reduce_max: _mm512_reduce_max_ps,
    }

    type Exp2Table = __m512i;
    #[inline(always)]
    fn exp2_table(self, bits: &[u32; 8]) -> __m512i {
        // The register holds the table twice: the permutation uses four bits of the index.
        // SAFETY: `bits` has the 32 bytes that are loaded, and the token proves the features.
        unsafe { _mm512_broadcast_i64x4(_mm256_loadu_si256(bits.as_ptr().cast())) }
    }
    #[inline(always)]
    fn scale(self, table: __m512i, m: __m512) -> __m512 {
        avx512!({
            let m = _mm512_castps_si512(m);
            let entry = _mm512_permutexvar_epi32(m, table);
            _mm512_castsi512_ps(_mm512_add_epi32(
                _mm512_slli_epi32::<{ <f32 as Real>::EIGHTH_SHIFT }>(m),
                entry,
            ))
        })
    }

    #[inline(always)]
    unsafe fn load_rows(self, p: *const f32, step: isize) -> [__m512; 4] {
        // SAFETY: the first 16 bytes of each of `LANES` rows are valid for reads
        // (`Simd::load_rows`), and the token proves the features.
        unsafe {
            let row = |i: isize| _mm_loadu_ps(p.wrapping_offset(i * step));
            // Register i holds the rows i, i + 4, i + 8 and i + 12, one in each quarter.
            let mut v = [_mm512_setzero_ps(); 4];
            for (i, v) in (0..).zip(&mut v) {
                *v = _mm512_castps128_ps512(row(i));
                *v = _mm512_insertf32x4::<1>(*v, row(i + 4));
                *v = _mm512_insertf32x4::<2>(*v, row(i + 8));
                *v = _mm512_insertf32x4::<3>(*v, row(i + 12));
            }
            transpose(v)
        }
    }
    #[inline(always)]
    unsafe fn store_rows(self, p: *mut f32, step: isize, v: [__m512; 4]) {
        // SAFETY: the first 16 bytes of each of `LANES` rows are valid for writes
        // (`Simd::store_rows`), and the token proves the features.
        unsafe {
            for (i, v) in (0..).zip(transpose(v)) {
                let row = |i: isize| p.wrapping_offset(i * step);
                _mm_storeu_ps(row(i), _mm512_castps512_ps128(v));
                _mm_storeu_ps(row(i + 4), _mm512_extractf32x4_ps::<1>(v));
                _mm_storeu_ps(row(i + 8), _mm512_extractf32x4_ps::<2>(v));
                _mm_storeu_ps(row(i + 12), _mm512_extractf32x4_ps::<3>(v));
            }
        }
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
}

transpose!(__m512, _mm512_unpacklo_ps, _mm512_unpackhi_ps, _mm512_shuffle_ps);

impl Halves for Avx512 {
    type Halves = __m256i;

    #[inline(always)]
    unsafe fn load_halves(self, p: *const u16) -> __m256i {
        // SAFETY: `p` is valid for reads of 16 halves (`Halves::load_halves`), and the token proves
        // the features.
        unsafe { _mm256_loadu_si256(p.cast()) }
    }
    #[inline(always)]
    unsafe fn load_half_lanes(self, p: *const u16, lanes: u32, fill: u16) -> __m256i {
        let fill = avx512!(_mm256_set1_epi16(fill as i16));
        // SAFETY: the load touches only lanes whose bit is set in `lanes`, which are valid for reads
        // (`Halves::load_half_lanes`). The token proves the features.
        unsafe { _mm256_mask_loadu_epi16(fill, lanes as __mmask16, p.cast()) }
    }
    #[inline(always)]
    unsafe fn store_halves(self, p: *mut u16, v: __m256i) {
        // SAFETY: `p` is valid for writes of 16 halves (`Halves::store_halves`), and the token proves
        // the features.
        unsafe { _mm256_storeu_si256(p.cast(), v) }
    }
    #[inline(always)]
    unsafe fn store_half_lanes(self, p: *mut u16, lanes: u32, v: __m256i) {
        // SAFETY: the store touches only lanes whose bit is set in `lanes`, which are valid for writes
        // (`Halves::store_half_lanes`). The token proves the features.
        unsafe { _mm256_mask_storeu_epi16(p.cast(), lanes as __mmask16, v) }
    }
    #[inline(always)]
    unsafe fn stream_halves(self, p: *mut u16, v: __m256i) {
        // SAFETY: `p` is valid for writes of 16 halves and aligned to 32 bytes
        // (`Halves::stream_halves`). The token proves the features.
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
            // Adds half an ulp, less one bit if the last bit of the result is 0: ties go to even.
            let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
            let half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF));
            let rounded = _mm512_add_epi32(bits, half);
            // The carry would turn some NaN into 0, so a NaN is made quiet instead.
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

impl PairProducts for Avx512 {
    #[inline(always)]
    fn join_pairs(self, first: __m512, second: __m512) -> __m512 {
        avx512!({
            let first = _mm512_srli_epi32::<16>(_mm512_castps_si512(first));
            _mm512_castsi512_ps(_mm512_or_si512(first, _mm512_castps_si512(second)))
        })
    }
    #[inline(always)]
    unsafe fn multiply_pairs(self, a: __m512, b: __m512, sum: __m512) -> __m512 {
        // SAFETY: the processor has the instruction (# Safety). The types have the same size, and any bits are
        // pairs of bf16.
        unsafe {
            _mm512_dpbf16_ps(
                sum,
                transmute::<__m512, __m512bh>(a),
                transmute::<__m512, __m512bh>(b),
            )
        }
    }
}

impl Simd for Avx512Wide {
    x86_methods! {
        real: f64,
        vector: __m512d,
        wide: Avx512Wide,
        wide_vector: __m512d,
        zero_wide: _mm512_setzero_pd,
        splat: _mm512_set1_pd,
        load: _mm512_loadu_pd,
        store: _mm512_storeu_pd,
        stream: _mm512_stream_pd,
        add(a, b): _mm512_add_pd,
        sub(a, b): _mm512_sub_pd,
        mul(a, b): _mm512_mul_pd,
        div(a, b): _mm512_div_pd,
        mul_add(a, b, c): _mm512_fmadd_pd,
        mul_sub(a, b, c): _mm512_fmsub_pd,
        max(bound, x): _mm512_max_pd,
        min(bound, x): _mm512_min_pd,
    }
    mask_methods! {
        real: f64,
        vector: __m512d,
        mask: __mmask8,
        mask_loadu: _mm512_mask_loadu_pd,
        mask_storeu: _mm512_mask_storeu_pd,
        to_integers: _mm512_castpd_si512,
        cmp_mask: _mm512_cmp_pd_mask,
        cmp_where: _mm512_mask_cmp_pd_mask,
        mask_blend: _mm512_mask_blend_pd,
        test_mask: _mm512_test_epi64_mask,
        splat_bits: _mm512_set1_epi64,
        reduce_max: _mm512_reduce_max_pd,
    }
    f64_lanes!(__m512d);

    type Exp2Table = __m512i;
    #[inline(always)]
    fn exp2_table(self, bits: &[u64; 8]) -> __m512i {
        // SAFETY: `bits` has the 64 bytes of a register, and the token proves the features.
        unsafe { _mm512_loadu_si512(bits.as_ptr().cast()) }
    }
    #[inline(always)]
    fn scale(self, table: __m512i, m: __m512d) -> __m512d {
        avx512!({
            let m = _mm512_castpd_si512(m);
            let entry = _mm512_permutexvar_epi64(m, table);
            const SHIFT: u32 = <f64 as Real>::EIGHTH_SHIFT;
            _mm512_castsi512_pd(_mm512_add_epi64(_mm512_slli_epi64::<SHIFT>(m), entry))
        })
    }

    #[inline(always)]
    unsafe fn load_rows(self, p: *const f64, step: isize) -> [__m512d; 2] {
        // SAFETY: the first 16 bytes of each of `LANES` rows are valid for reads
        // (`Simd::load_rows`), and the token proves the features.
        unsafe {
            let row = |i: isize| _mm_loadu_pd(p.wrapping_offset(i * step));
            // Register i holds the rows i, i + 2, i + 4 and i + 6, one in each quarter.
            let mut v = [_mm512_setzero_pd(); 2];
            for (i, v) in (0..).zip(&mut v) {
                *v = _mm512_castpd128_pd512(row(i));
                *v = _mm512_insertf64x2::<1>(*v, row(i + 2));
                *v = _mm512_insertf64x2::<2>(*v, row(i + 4));
                *v = _mm512_insertf64x2::<3>(*v, row(i + 6));
            }
            [_mm512_unpacklo_pd(v[0], v[1]), _mm512_unpackhi_pd(v[0], v[1])]
        }
    }
    #[inline(always)]
    unsafe fn store_rows(self, p: *mut f64, step: isize, [a, b]: [__m512d; 2]) {
        // SAFETY: the first 16 bytes of each of `LANES` rows are valid for writes
        // (`Simd::store_rows`), and the token proves the features.
        unsafe {
            let rows = [_mm512_unpacklo_pd(a, b), _mm512_unpackhi_pd(a, b)];
            for (i, v) in (0..).zip(rows) {
                let row = |i: isize| p.wrapping_offset(i * step);
                _mm_storeu_pd(row(i), _mm512_castpd512_pd128(v));
                _mm_storeu_pd(row(i + 2), _mm512_extractf64x2_pd::<1>(v));
                _mm_storeu_pd(row(i + 4), _mm512_extractf64x2_pd::<2>(v));
                _mm_storeu_pd(row(i + 6), _mm512_extractf64x2_pd::<3>(v));
            }
        }
    }
}

impl Doubles for Avx512Wide {
    #[inline(always)]
    fn power(self, m: __m512d) -> __m512d {
        avx512!(_mm512_castsi512_pd(_mm512_slli_epi64::<52>(_mm512_castpd_si512(m))))
    }
    #[inline(always)]
    fn split(self, x: __m512d) -> (__m512d, __m512d) {
        avx512!({
            let one = _mm512_set1_epi64(ONE as i64);
            let bits = _mm512_castpd_si512(x);
            // The bias keeps `above` positive; its exponent field is k plus the bias.
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
