//! AVX-512 (F, BW, DQ, VL): 64 bytes a register, masks in registers of their own.

use super::{
    Doubles, EIGHTH_SHIFT, EXPONENT, Halves, IGNORED_BITS, ONE, SQRT_HALF, Simd, TWO_52,
    TWO_52_AND_BIAS,
};
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

/// What differs between the two types of lanes in nothing but the names of the intrinsics; what
/// differs in more is each one's own.
macro_rules! simd {
    (
        token: $token:ident,
        real: $real:ident,
        vector: $vector:ident,
        mask: $mask:ident,
        parts: $parts:literal,
        lanes: $lanes:literal,
        set1: $set1:ident,
        loadu: $loadu:ident,
        mask_loadu: $mask_loadu:ident,
        storeu: $storeu:ident,
        mask_storeu: $mask_storeu:ident,
        stream: $stream:ident,
        add: $add:ident,
        sub: $sub:ident,
        mul: $mul:ident,
        div: $div:ident,
        fmadd: $fmadd:ident,
        fmsub: $fmsub:ident,
        max: $max:ident,
        min: $min:ident,
        cast_si512: $cast_si512:ident,
        cmp_mask: $cmp_mask:ident,
        mask_blend: $mask_blend:ident,
        test_mask: $test_mask:ident,
        set1_bits: $set1_bits:ident,
        reduce_max: $reduce_max:ident,
        $($own:tt)*
    ) => {
        impl Simd for $token {
            type Real = $real;
            type Vector = $vector;
            type Block = [$vector; 4];
            type Mask = $mask;
            type RangeCheck = __m512i;
            type Rows = [$vector; 16 / size_of::<$real>()];
            type Wide = Avx512Wide;
            type Widened = [__m512d; $parts];
            type Totals = [__m512d; 2];

            const LANES: usize = $lanes;

            #[inline(always)]
            unsafe fn assume() -> Self {
                $token(())
            }
            #[inline(always)]
            fn wide(self) -> Avx512Wide {
                Avx512Wide(())
            }
            #[inline(always)]
            fn splat(self, x: $real) -> $vector {
                avx512!($set1(x))
            }
            #[inline(always)]
            fn splat_block(self, x: $real) -> [$vector; 4] {
                [self.splat(x); 4]
            }
            #[inline(always)]
            fn totals(self) -> [__m512d; 2] {
                avx512!([_mm512_setzero_pd(); 2])
            }

            #[inline(always)]
            unsafe fn load(self, p: *const $real) -> $vector {
                // SAFETY: token; the caller's promise about `p`.
                unsafe { $loadu(p) }
            }
            #[inline(always)]
            unsafe fn load_lanes(self, p: *const $real, lanes: u32, fill: $real) -> $vector {
                // SAFETY: token; a masked load touches only the lanes the caller vouches for.
                unsafe { $mask_loadu($set1(fill), lanes as $mask, p) }
            }
            #[inline(always)]
            unsafe fn store(self, p: *mut $real, v: $vector) {
                // SAFETY: token; the caller's promise about `p`.
                unsafe { $storeu(p, v) }
            }
            #[inline(always)]
            unsafe fn store_lanes(self, p: *mut $real, lanes: u32, v: $vector) {
                // SAFETY: token; a masked store touches only the lanes the caller vouches for.
                unsafe { $mask_storeu(p, lanes as $mask, v) }
            }
            #[inline(always)]
            unsafe fn stream(self, p: *mut $real, v: $vector) {
                // SAFETY: token; the caller's promise about `p` and its alignment.
                unsafe { $stream(p, v) }
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
            fn prefetch_l2(self, p: *const u8) {
                avx512!(_mm_prefetch::<_MM_HINT_T1>(p.cast()))
            }
            #[inline(always)]
            fn prefetch_write(self, p: *const u8) {
                avx512!(_mm_prefetch::<_MM_HINT_ET0>(p.cast()))
            }

            #[inline(always)]
            fn add(self, a: $vector, b: $vector) -> $vector {
                avx512!($add(a, b))
            }
            #[inline(always)]
            fn sub(self, a: $vector, b: $vector) -> $vector {
                avx512!($sub(a, b))
            }
            #[inline(always)]
            fn mul(self, a: $vector, b: $vector) -> $vector {
                avx512!($mul(a, b))
            }
            #[inline(always)]
            fn div(self, a: $vector, b: $vector) -> $vector {
                avx512!($div(a, b))
            }
            #[inline(always)]
            fn mul_add(self, a: $vector, b: $vector, c: $vector) -> $vector {
                avx512!($fmadd(a, b, c))
            }
            #[inline(always)]
            fn mul_sub_exact(self, a: $vector, b: $vector, c: $vector) -> $vector {
                avx512!($fmsub(a, b, c))
            }
            #[inline(always)]
            fn max(self, bound: $vector, x: $vector) -> $vector {
                avx512!($max(bound, x))
            }
            #[inline(always)]
            fn min(self, bound: $vector, x: $vector) -> $vector {
                avx512!($min(bound, x))
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
            fn select(self, mask: $mask, a: $vector, b: $vector) -> $vector {
                avx512!($mask_blend(mask, b, a))
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
            fn range_check(self, seen: __m512i, block: &[$vector; 4], expected: $vector) -> __m512i {
                avx512!({
                    let [a, b, c, d] = block.map(|v| $cast_si512(v));
                    // 0x7E: bits that are not the same in all three; a chain from `a` to `expected`.
                    let abc = _mm512_ternarylogic_epi32::<0x7E>(a, b, c);
                    let cde = _mm512_ternarylogic_epi32::<0x7E>(c, d, $cast_si512(expected));
                    // 0xFE: or of all three.
                    _mm512_ternarylogic_epi32::<0xFE>(seen, abc, cde)
                })
            }
            #[inline(always)]
            fn range_check_passed(self, seen: __m512i) -> bool {
                avx512!($test_mask(seen, $set1_bits(!0 << IGNORED_BITS)) == 0)
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
                    super::avx2::sum4(v4)
                })
            }
            $($own)*
        }
    };
}

simd! {
    token: Avx512,
    real: f32,
    vector: __m512,
    mask: __mmask16,
    parts: 2,
    lanes: 16,
    set1: _mm512_set1_ps,
    loadu: _mm512_loadu_ps,
    mask_loadu: _mm512_mask_loadu_ps,
    storeu: _mm512_storeu_ps,
    mask_storeu: _mm512_mask_storeu_ps,
    stream: _mm512_stream_ps,
    add: _mm512_add_ps,
    sub: _mm512_sub_ps,
    mul: _mm512_mul_ps,
    div: _mm512_div_ps,
    fmadd: _mm512_fmadd_ps,
    fmsub: _mm512_fmsub_ps,
    max: _mm512_max_ps,
    min: _mm512_min_ps,
    cast_si512: _mm512_castps_si512,
    cmp_mask: _mm512_cmp_ps_mask,
    mask_blend: _mm512_mask_blend_ps,
    test_mask: _mm512_test_epi32_mask,
    set1_bits: _mm512_set1_epi32,
    reduce_max: _mm512_reduce_max_ps,

    type Exp2Table = __m512i;
    #[inline(always)]
    fn exp2_table(self, bits: &[u32; 8]) -> __m512i {
        // Twice, since the permutation counts to 16.
        // SAFETY: token; `bits` has as many bytes.
        unsafe { _mm512_broadcast_i64x4(_mm256_loadu_si256(bits.as_ptr().cast())) }
    }
    #[inline(always)]
    fn scale(self, table: __m512i, m: __m512) -> __m512 {
        avx512!({
            let m = _mm512_castps_si512(m);
            let entry = _mm512_permutexvar_epi32(m, table);
            _mm512_castsi512_ps(_mm512_add_epi32(_mm512_slli_epi32::<EIGHTH_SHIFT>(m), entry))
        })
    }

    #[inline(always)]
    unsafe fn load_rows(self, p: *const f32, step: isize) -> [__m512; 4] {
        // SAFETY: token; the caller's promise about `p`.
        unsafe {
            let row = |i: isize| _mm_loadu_ps(p.wrapping_offset(i * step));
            // Four rows a register, each in a quarter of its own.
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
        // SAFETY: token; the caller's promise about `p`.
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

/// Transposes each quarter of four registers, 4 by 4.
///
/// # Safety
/// The processor has AVX-512 F.
#[inline(always)]
unsafe fn transpose([a, b, c, d]: [__m512; 4]) -> [__m512; 4] {
    // SAFETY: AVX-512 F, as the caller promises.
    unsafe {
        let (ab, cd) = (_mm512_unpacklo_ps(a, b), _mm512_unpacklo_ps(c, d));
        let (ef, gh) = (_mm512_unpackhi_ps(a, b), _mm512_unpackhi_ps(c, d));
        [
            _mm512_shuffle_ps::<0x44>(ab, cd),
            _mm512_shuffle_ps::<0xEE>(ab, cd),
            _mm512_shuffle_ps::<0x44>(ef, gh),
            _mm512_shuffle_ps::<0xEE>(ef, gh),
        ]
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

simd! {
    token: Avx512Wide,
    real: f64,
    vector: __m512d,
    mask: __mmask8,
    parts: 1,
    lanes: 8,
    set1: _mm512_set1_pd,
    loadu: _mm512_loadu_pd,
    mask_loadu: _mm512_mask_loadu_pd,
    storeu: _mm512_storeu_pd,
    mask_storeu: _mm512_mask_storeu_pd,
    stream: _mm512_stream_pd,
    add: _mm512_add_pd,
    sub: _mm512_sub_pd,
    mul: _mm512_mul_pd,
    div: _mm512_div_pd,
    fmadd: _mm512_fmadd_pd,
    fmsub: _mm512_fmsub_pd,
    max: _mm512_max_pd,
    min: _mm512_min_pd,
    cast_si512: _mm512_castpd_si512,
    cmp_mask: _mm512_cmp_pd_mask,
    mask_blend: _mm512_mask_blend_pd,
    test_mask: _mm512_test_epi64_mask,
    set1_bits: _mm512_set1_epi64,
    reduce_max: _mm512_reduce_max_pd,

    type Exp2Table = ();
    #[inline(always)]
    fn exp2_table(self, _: &[u32; 8]) {}
    #[inline(always)]
    fn scale(self, (): (), m: __m512d) -> __m512d {
        avx512!(_mm512_castsi512_pd(_mm512_slli_epi64::<52>(_mm512_castpd_si512(m))))
    }

    #[inline(always)]
    unsafe fn load_rows(self, p: *const f64, step: isize) -> [__m512d; 2] {
        // SAFETY: token; the caller's promise about `p`.
        unsafe {
            let row = |i: isize| _mm_loadu_pd(p.wrapping_offset(i * step));
            // Every other row, in quarters.
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
        // SAFETY: token; the caller's promise about `p`.
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
    #[inline(always)]
    fn widen(self, v: __m512d) -> [__m512d; 1] {
        [v]
    }
    #[inline(always)]
    fn narrow(self, [v]: [__m512d; 1]) -> __m512d {
        v
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
