//! What AVX2 and AVX-512 implement alike, but for the names and widths of registers.
//!
//! Masks differ, and so do the methods that use them: each file has its own. Rows of several
//! registers (`load_rows`, `store_rows`), `narrow_bf16` and `split` stand in both files, because
//! a list of their intrinsics would be as long as their bodies.

/// The part of an `impl Simd` in which both sets and both types of lanes differ only in names: the
/// types, moves between registers and memory, and the methods that are one intrinsic each.
///
/// Uses `Self(())` as the token.
macro_rules! x86_methods {
    (
        real: $real:ident,
        vector: $vector:ident,
        wide: $wide:ident,
        wide_vector: $wide_vector:ident,
        zero_wide: $zero_wide:ident,
        splat: $splat:ident,
        load: $load:ident,
        store: $store:ident,
        stream: $stream:ident,
        $($method:ident($($x:ident),*): $intrinsic:ident,)*
    ) => {
        type Real = $real;
        type Vector = $vector;
        type Block = [$vector; 256 / size_of::<$vector>()];
        type Rows = [$vector; 16 / size_of::<$real>()];
        type Wide = $wide;
        type Widened = [$wide_vector; 8 / size_of::<$real>()];
        type Totals = [$wide_vector; 8 * super::TOTALS / size_of::<$wide_vector>()];

        const LANES: usize = size_of::<$vector>() / size_of::<$real>();

        #[inline(always)]
        unsafe fn assume() -> Self {
            Self(())
        }
        #[inline(always)]
        fn wide(self) -> $wide {
            $wide(())
        }
        #[inline(always)]
        fn splat(self, x: $real) -> $vector {
            // SAFETY: the token proves that the processor has the features (`Simd::assume`).
            unsafe { $splat(x) }
        }
        #[inline(always)]
        fn splat_block(self, x: $real) -> Self::Block {
            [self.splat(x); 256 / size_of::<$vector>()]
        }
        #[inline(always)]
        fn splat_rows(self, x: $real) -> Self::Rows {
            [self.splat(x); 16 / size_of::<$real>()]
        }
        #[inline(always)]
        fn totals(self) -> Self::Totals {
            // SAFETY: the token proves that the processor has the features (`Simd::assume`).
            [unsafe { $zero_wide() }; 8 * super::TOTALS / size_of::<$wide_vector>()]
        }

        #[inline(always)]
        unsafe fn load(self, p: *const $real) -> $vector {
            // SAFETY: `p` is valid for reads of `LANES` values (`Simd::load`), and the token proves
            // the features.
            unsafe { $load(p) }
        }
        #[inline(always)]
        unsafe fn store(self, p: *mut $real, v: $vector) {
            // SAFETY: `p` is valid for writes of `LANES` values (`Simd::store`), and the token proves
            // the features.
            unsafe { $store(p, v) }
        }
        #[inline(always)]
        unsafe fn stream(self, p: *mut $real, v: $vector) {
            // SAFETY: `p` is valid for writes of `LANES` values and aligned to a register
            // (`Simd::stream`), and the token proves the features.
            unsafe { $stream(p, v) }
        }
        #[inline(always)]
        fn fence(self) {
            // SAFETY: every x86-64 processor has SSE, and a fence accesses no memory.
            unsafe { _mm_sfence() }
        }
        #[inline(always)]
        fn prefetch(self, p: *const u8) {
            // SAFETY: every x86-64 processor has SSE, and a prefetch never faults.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
        }
        #[inline(always)]
        fn prefetch_l2(self, p: *const u8) {
            // SAFETY: every x86-64 processor has SSE, and a prefetch never faults.
            unsafe { _mm_prefetch::<_MM_HINT_T1>(p.cast()) }
        }
        #[inline(always)]
        fn prefetch_write(self, p: *const u8) {
            // SAFETY: a prefetch never faults, and a processor without PREFETCHW takes it for a no-op.
            unsafe { _mm_prefetch::<_MM_HINT_ET0>(p.cast()) }
        }

        $(
            #[inline(always)]
            fn $method(self, $($x: $vector),*) -> $vector {
                // SAFETY: the token proves that the processor has the features (`Simd::assume`).
                unsafe { $intrinsic($($x),*) }
            }
        )*
    };
}

/// Defines `transpose`, which transposes each 16 bytes' worth of lanes of four registers of f32, 4 by 4.
macro_rules! transpose {
    ($vector:ident, $unpacklo:ident, $unpackhi:ident, $shuffle:ident) => {
        /// Transposes the lanes of four registers, 4 by 4, in each 16 bytes.
        ///
        /// # Safety
        /// The processor has the instruction set of this file.
        #[inline(always)]
        unsafe fn transpose([a, b, c, d]: [$vector; 4]) -> [$vector; 4] {
            // SAFETY: the processor has the set (# Safety).
            unsafe {
                let (ab, cd) = ($unpacklo(a, b), $unpacklo(c, d));
                let (ef, gh) = ($unpackhi(a, b), $unpackhi(c, d));
                [
                    $shuffle::<0x44>(ab, cd),
                    $shuffle::<0xEE>(ab, cd),
                    $shuffle::<0x44>(ef, gh),
                    $shuffle::<0xEE>(ef, gh),
                ]
            }
        }
    };
}

pub(super) use {transpose, x86_methods};
