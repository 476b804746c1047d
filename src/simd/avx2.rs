//! AVX2 with FMA and F16C: 32 bytes a register.

use super::{
    Doubles, EIGHTH_SHIFT, EXPONENT, Halves, IGNORED_BITS, ONE, SQRT_HALF, Simd, TWO_52,
    TWO_52_AND_BIAS, write_lanes,
};
use std::arch::x86_64::*;

/// 8 lanes of f32, and proof that the processor has AVX2, FMA and F16C.
#[derive(Clone, Copy)]
pub struct Avx2(());

/// 4 lanes of f64.
#[derive(Clone, Copy)]
pub struct Avx2Wide(());

/// A call of intrinsics, with the one reason why they may be called.
macro_rules! avx2 {
    ($e:expr) => {
        // SAFETY: the token exists, so the processor has the features (`Avx2::assume`).
        unsafe { $e }
    };
}

impl Avx2 {
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

impl Avx2 {
    /// Lanes of 32 bits, for the [`pairs`] of 8 lanes of 16 bits.
    #[inline(always)]
    fn pair_mask(self, pairs: u32) -> __m128i {
        avx2!({
            let bit = _mm_setr_epi32(1, 4, 16, 64);
            _mm_cmpeq_epi32(_mm_and_si128(_mm_set1_epi32(pairs as i32), bit), bit)
        })
    }
}

/// Of 8 lanes, the pairs `2i` and `2i + 1` that are both set, as bit `2i`; and the lanes that are in
/// none.
#[inline(always)]
fn pairs(lanes: u32) -> (u32, u32) {
    let pairs = lanes & lanes >> 1 & 0x55;
    (pairs, lanes & 0xFF & !(pairs | pairs << 1))
}

impl Avx2Wide {
    /// The low 4 bits of `lanes`, likewise.
    #[inline(always)]
    fn mask(self, lanes: u32) -> __m256i {
        avx2!({
            let bit = _mm256_setr_epi64x(1, 2, 4, 8);
            let set = _mm256_and_si256(_mm256_set1_epi64x(i64::from(lanes)), bit);
            _mm256_cmpeq_epi64(set, bit)
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

/// What differs between the two types of lanes in nothing but the names of the intrinsics; what
/// differs in more is each one's own.
macro_rules! simd {
    (
        token: $token:ident,
        real: $real:ident,
        vector: $vector:ident,
        parts: $parts:literal,
        lanes: $lanes:literal,
        set1: $set1:ident,
        loadu: $loadu:ident,
        maskload: $maskload:ident,
        blendv: $blendv:ident,
        castsi256: $castsi256:ident,
        storeu: $storeu:ident,
        maskstore: $maskstore:ident,
        stream: $stream:ident,
        add: $add:ident,
        sub: $sub:ident,
        mul: $mul:ident,
        div: $div:ident,
        fmadd: $fmadd:ident,
        fmsub: $fmsub:ident,
        max: $max:ident,
        min: $min:ident,
        cast_si256: $cast_si256:ident,
        cmp: $cmp:ident,
        movemask: $movemask:ident,
        xor: $xor:ident,
        and: $and:ident,
        or: $or:ident,
        set1_bits: $set1_bits:ident,
        $($own:tt)*
    ) => {
        impl Simd for $token {
            type Real = $real;
            type Vector = $vector;
            type Block = [$vector; 8];
            type Mask = $vector;
            type RangeCheck = __m256i;
            type Rows = [$vector; 16 / size_of::<$real>()];
            type Wide = Avx2Wide;
            type Widened = [__m256d; $parts];
            type Totals = [__m256d; 4];

            const LANES: usize = $lanes;

            #[inline(always)]
            unsafe fn assume() -> Self {
                $token(())
            }
            #[inline(always)]
            fn wide(self) -> Avx2Wide {
                Avx2Wide(())
            }
            #[inline(always)]
            fn splat(self, x: $real) -> $vector {
                avx2!($set1(x))
            }
            #[inline(always)]
            fn splat_block(self, x: $real) -> [$vector; 8] {
                [self.splat(x); 8]
            }
            #[inline(always)]
            fn totals(self) -> [__m256d; 4] {
                avx2!([_mm256_setzero_pd(); 4])
            }

            #[inline(always)]
            unsafe fn load(self, p: *const $real) -> $vector {
                // SAFETY: token; the caller's promise about `p`.
                unsafe { $loadu(p) }
            }
            #[inline(always)]
            unsafe fn load_lanes(self, p: *const $real, lanes: u32, fill: $real) -> $vector {
                let mask = self.mask(lanes);
                // SAFETY: token; a masked load touches only the lanes the caller vouches for.
                unsafe {
                    let v = $maskload(p, mask);
                    $blendv($set1(fill), v, $castsi256(mask))
                }
            }
            #[inline(always)]
            unsafe fn store(self, p: *mut $real, v: $vector) {
                // SAFETY: token; the caller's promise about `p`.
                unsafe { $storeu(p, v) }
            }
            #[inline(always)]
            unsafe fn store_lanes(self, p: *mut $real, lanes: u32, v: $vector) {
                let mask = self.mask(lanes);
                // SAFETY: token; a masked store touches only the lanes the caller vouches for.
                unsafe { $maskstore(p, mask, v) }
            }
            #[inline(always)]
            unsafe fn stream(self, p: *mut $real, v: $vector) {
                // SAFETY: token; the caller's promise about `p` and its alignment.
                unsafe { $stream(p, v) }
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
            fn prefetch_l2(self, p: *const u8) {
                avx2!(_mm_prefetch::<_MM_HINT_T1>(p.cast()))
            }
            #[inline(always)]
            fn prefetch_write(self, p: *const u8) {
                avx2!(_mm_prefetch::<_MM_HINT_ET0>(p.cast()))
            }

            #[inline(always)]
            fn add(self, a: $vector, b: $vector) -> $vector {
                avx2!($add(a, b))
            }
            #[inline(always)]
            fn sub(self, a: $vector, b: $vector) -> $vector {
                avx2!($sub(a, b))
            }
            #[inline(always)]
            fn mul(self, a: $vector, b: $vector) -> $vector {
                avx2!($mul(a, b))
            }
            #[inline(always)]
            fn div(self, a: $vector, b: $vector) -> $vector {
                avx2!($div(a, b))
            }
            #[inline(always)]
            fn mul_add(self, a: $vector, b: $vector, c: $vector) -> $vector {
                avx2!($fmadd(a, b, c))
            }
            #[inline(always)]
            fn mul_sub_exact(self, a: $vector, b: $vector, c: $vector) -> $vector {
                avx2!($fmsub(a, b, c))
            }
            #[inline(always)]
            fn max(self, bound: $vector, x: $vector) -> $vector {
                avx2!($max(bound, x))
            }
            #[inline(always)]
            fn min(self, bound: $vector, x: $vector) -> $vector {
                avx2!($min(bound, x))
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
            fn select(self, mask: $vector, a: $vector, b: $vector) -> $vector {
                avx2!($blendv(b, a, mask))
            }
            #[inline(always)]
            fn both(self, a: $vector, b: $vector) -> $vector {
                avx2!($and(a, b))
            }
            #[inline(always)]
            fn either(self, a: $vector, b: $vector) -> $vector {
                avx2!($or(a, b))
            }
            #[inline(always)]
            fn bits(self, mask: $vector) -> u32 {
                avx2!($movemask(mask) as u32)
            }

            #[inline(always)]
            fn range_check_start(self) -> __m256i {
                avx2!(_mm256_setzero_si256())
            }
            #[inline(always)]
            fn range_check(self, mut seen: __m256i, block: &[$vector; 8], expected: $vector) -> __m256i {
                avx2!({
                    for v in block {
                        let differs = $cast_si256($xor(*v, expected));
                        seen = _mm256_or_si256(seen, differs);
                    }
                    seen
                })
            }
            #[inline(always)]
            fn range_check_passed(self, seen: __m256i) -> bool {
                avx2!(_mm256_testz_si256(seen, $set1_bits(!0 << IGNORED_BITS)) == 1)
            }

            #[inline(always)]
            fn sum(self, t: [__m256d; 4]) -> f64 {
                avx2!({
                    let lo = _mm256_add_pd(t[0], t[2]);
                    let hi = _mm256_add_pd(t[1], t[3]);
                    sum4(_mm256_add_pd(lo, hi))
                })
            }
            $($own)*
        }
    };
}

simd! {
    token: Avx2,
    real: f32,
    vector: __m256,
    parts: 2,
    lanes: 8,
    set1: _mm256_set1_ps,
    loadu: _mm256_loadu_ps,
    maskload: _mm256_maskload_ps,
    blendv: _mm256_blendv_ps,
    castsi256: _mm256_castsi256_ps,
    storeu: _mm256_storeu_ps,
    maskstore: _mm256_maskstore_ps,
    stream: _mm256_stream_ps,
    add: _mm256_add_ps,
    sub: _mm256_sub_ps,
    mul: _mm256_mul_ps,
    div: _mm256_div_ps,
    fmadd: _mm256_fmadd_ps,
    fmsub: _mm256_fmsub_ps,
    max: _mm256_max_ps,
    min: _mm256_min_ps,
    cast_si256: _mm256_castps_si256,
    cmp: _mm256_cmp_ps,
    movemask: _mm256_movemask_ps,
    xor: _mm256_xor_ps,
    and: _mm256_and_ps,
    or: _mm256_or_ps,
    set1_bits: _mm256_set1_epi32,

    type Exp2Table = __m256i;
    #[inline(always)]
    fn exp2_table(self, bits: &[u32; 8]) -> __m256i {
        // SAFETY: token; `bits` has as many bytes.
        unsafe { _mm256_loadu_si256(bits.as_ptr().cast()) }
    }
    #[inline(always)]
    fn scale(self, table: __m256i, m: __m256) -> __m256 {
        avx2!({
            let m = _mm256_castps_si256(m);
            let entry = _mm256_permutevar8x32_epi32(table, m);
            const SHIFT: i32 = EIGHTH_SHIFT as i32;
            _mm256_castsi256_ps(_mm256_add_epi32(_mm256_slli_epi32::<SHIFT>(m), entry))
        })
    }

    #[inline(always)]
    unsafe fn load_rows(self, p: *const f32, step: isize) -> [__m256; 4] {
        // SAFETY: token; the caller's promise about `p`.
        unsafe {
            let row = |i: isize| _mm_loadu_ps(p.wrapping_offset(i * step));
            // Two rows a register, each in a half of its own.
            let mut v = [_mm256_setzero_ps(); 4];
            for (i, v) in (0..).zip(&mut v) {
                *v = _mm256_insertf128_ps::<1>(_mm256_castps128_ps256(row(i)), row(i + 4));
            }
            transpose(v)
        }
    }
    #[inline(always)]
    unsafe fn store_rows(self, p: *mut f32, step: isize, v: [__m256; 4]) {
        // SAFETY: token; the caller's promise about `p`.
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

/// Transposes each half of four registers, 4 by 4.
///
/// # Safety
/// The processor has AVX.
#[inline(always)]
unsafe fn transpose([a, b, c, d]: [__m256; 4]) -> [__m256; 4] {
    // SAFETY: AVX, as the caller promises.
    unsafe {
        let (ab, cd) = (_mm256_unpacklo_ps(a, b), _mm256_unpacklo_ps(c, d));
        let (ef, gh) = (_mm256_unpackhi_ps(a, b), _mm256_unpackhi_ps(c, d));
        [
            _mm256_shuffle_ps::<0x44>(ab, cd),
            _mm256_shuffle_ps::<0xEE>(ab, cd),
            _mm256_shuffle_ps::<0x44>(ef, gh),
            _mm256_shuffle_ps::<0xEE>(ef, gh),
        ]
    }
}

impl Halves for Avx2 {
    type Halves = __m128i;

    #[inline(always)]
    unsafe fn load_halves(self, p: *const u16) -> __m128i {
        // SAFETY: token; the caller's promise about `p`, here and below.
        unsafe { _mm_loadu_si128(p.cast()) }
    }
    #[inline(always)]
    unsafe fn load_half_lanes(self, p: *const u16, lanes: u32, fill: u16) -> __m128i {
        if lanes & 0xFF == 0xFF {
            // SAFETY: as above.
            return unsafe { self.load_halves(p) };
        }
        // There is no masked load of 16 bits: pairs, and then what has none, of which there is
        // little where lanes are a head, a tail or all but a hole.
        let (pairs, mut rest) = pairs(lanes);
        // SAFETY: as above, for lanes of pairs; the token exists (`Avx2::assume`).
        let mut v = unsafe {
            let mask = self.pair_mask(pairs);
            let read = _mm_maskload_epi32(p.cast(), mask);
            _mm_blendv_epi8(_mm_set1_epi16(fill as i16), read, mask)
        };
        while rest != 0 {
            let i = rest.trailing_zeros();
            // SAFETY: as above.
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
        // SAFETY: as above.
        unsafe { _mm_storeu_si128(p.cast(), v) }
    }
    #[inline(always)]
    unsafe fn store_half_lanes(self, p: *mut u16, lanes: u32, v: __m128i) {
        if lanes & 0xFF == 0xFF {
            // SAFETY: as above.
            return unsafe { self.store_halves(p, v) };
        }
        let (pairs, rest) = pairs(lanes);
        // SAFETY: as above, for lanes of pairs; the token exists (`Avx2::assume`).
        unsafe { _mm_maskstore_epi32(p.cast(), self.pair_mask(pairs), v) };
        if rest != 0 {
            let mut halves = [0u16; 8];
            // SAFETY: 8 halves.
            unsafe { self.store_halves(halves.as_mut_ptr(), v) };
            // SAFETY: as above.
            unsafe { write_lanes(p, rest, halves) }
        }
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
}

simd! {
    token: Avx2Wide,
    real: f64,
    vector: __m256d,
    parts: 1,
    lanes: 4,
    set1: _mm256_set1_pd,
    loadu: _mm256_loadu_pd,
    maskload: _mm256_maskload_pd,
    blendv: _mm256_blendv_pd,
    castsi256: _mm256_castsi256_pd,
    storeu: _mm256_storeu_pd,
    maskstore: _mm256_maskstore_pd,
    stream: _mm256_stream_pd,
    add: _mm256_add_pd,
    sub: _mm256_sub_pd,
    mul: _mm256_mul_pd,
    div: _mm256_div_pd,
    fmadd: _mm256_fmadd_pd,
    fmsub: _mm256_fmsub_pd,
    max: _mm256_max_pd,
    min: _mm256_min_pd,
    cast_si256: _mm256_castpd_si256,
    cmp: _mm256_cmp_pd,
    movemask: _mm256_movemask_pd,
    xor: _mm256_xor_pd,
    and: _mm256_and_pd,
    or: _mm256_or_pd,
    set1_bits: _mm256_set1_epi64x,

    type Exp2Table = ();
    #[inline(always)]
    fn exp2_table(self, _: &[u32; 8]) {}
    #[inline(always)]
    fn scale(self, (): (), m: __m256d) -> __m256d {
        avx2!(_mm256_castsi256_pd(_mm256_slli_epi64::<52>(_mm256_castpd_si256(m))))
    }

    #[inline(always)]
    unsafe fn load_rows(self, p: *const f64, step: isize) -> [__m256d; 2] {
        // SAFETY: token; the caller's promise about `p`.
        unsafe {
            let row = |i: isize| _mm_loadu_pd(p.wrapping_offset(i * step));
            // Every other row, in halves.
            let mut v = [_mm256_setzero_pd(); 2];
            for (i, v) in (0..).zip(&mut v) {
                *v = _mm256_insertf128_pd::<1>(_mm256_castpd128_pd256(row(i)), row(i + 2));
            }
            [_mm256_unpacklo_pd(v[0], v[1]), _mm256_unpackhi_pd(v[0], v[1])]
        }
    }
    #[inline(always)]
    unsafe fn store_rows(self, p: *mut f64, step: isize, [a, b]: [__m256d; 2]) {
        // SAFETY: token; the caller's promise about `p`.
        unsafe {
            let rows = [_mm256_unpacklo_pd(a, b), _mm256_unpackhi_pd(a, b)];
            for (i, v) in (0..).zip(rows) {
                _mm_storeu_pd(p.wrapping_offset(i * step), _mm256_castpd256_pd128(v));
                _mm_storeu_pd(p.wrapping_offset((i + 2) * step), _mm256_extractf128_pd::<1>(v));
            }
        }
    }
    #[inline(always)]
    fn widen(self, v: __m256d) -> [__m256d; 1] {
        [v]
    }
    #[inline(always)]
    fn narrow(self, [v]: [__m256d; 1]) -> __m256d {
        v
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
    fn split(self, x: __m256d) -> (__m256d, __m256d) {
        avx2!({
            let one = _mm256_set1_epi64x(ONE as i64);
            let bits = _mm256_castpd_si256(x);
            // The bias keeps it positive; k is then in the exponent's place.
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
