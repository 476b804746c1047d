//! The element types of logits and gradients, as lanes of f32 see them.

use crate::simd::Simd;

/// A float that is loaded into lanes of f32 and stored from them.
///
/// bf16 and f16 widen exactly; a store rounds once, to nearest even, and keeps NaN a NaN.
pub trait Element: Copy + 'static {
    /// It is the lanes' own type: loads and stores convert nothing.
    const EXACT: bool = false;

    /// As [`Simd::load`].
    ///
    /// # Safety
    /// As there.
    unsafe fn load<S: Simd>(s: S, p: *const Self) -> S::Vector;
    /// As [`Simd::load_lanes`].
    ///
    /// # Safety
    /// As there.
    unsafe fn load_lanes<S: Simd>(s: S, p: *const Self, lanes: u32, fill: f32) -> S::Vector;
    /// As [`Simd::store`].
    ///
    /// # Safety
    /// As there.
    unsafe fn store<S: Simd>(s: S, p: *mut Self, v: S::Vector);
    /// As [`Simd::store_lanes`].
    ///
    /// # Safety
    /// As there.
    unsafe fn store_lanes<S: Simd>(s: S, p: *mut Self, lanes: u32, v: S::Vector);
    /// As [`Simd::stream`]; `p` is aligned to the `LANES` elements that are written.
    ///
    /// # Safety
    /// As there.
    unsafe fn stream<S: Simd>(s: S, p: *mut Self, v: S::Vector);
    /// The value, exactly.
    fn to_f64(self) -> f64;
}

impl Element for f32 {
    const EXACT: bool = true;

    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const f32) -> S::Vector {
        // SAFETY: the caller's promise, here and below.
        unsafe { s.load(p) }
    }
    #[inline(always)]
    unsafe fn load_lanes<S: Simd>(s: S, p: *const f32, lanes: u32, fill: f32) -> S::Vector {
        // SAFETY: as above.
        unsafe { s.load_lanes(p, lanes, fill) }
    }
    #[inline(always)]
    unsafe fn store<S: Simd>(s: S, p: *mut f32, v: S::Vector) {
        // SAFETY: as above.
        unsafe { s.store(p, v) }
    }
    #[inline(always)]
    unsafe fn store_lanes<S: Simd>(s: S, p: *mut f32, lanes: u32, v: S::Vector) {
        // SAFETY: as above.
        unsafe { s.store_lanes(p, lanes, v) }
    }
    #[inline(always)]
    unsafe fn stream<S: Simd>(s: S, p: *mut f32, v: S::Vector) {
        // SAFETY: as above.
        unsafe { s.stream(p, v) }
    }
    #[inline(always)]
    fn to_f64(self) -> f64 {
        f64::from(self)
    }
}

/// The two halves differ in their conversions alone.
macro_rules! half {
    ($type:ty, $widen:ident, $narrow:ident) => {
        impl Element for $type {
            #[inline(always)]
            unsafe fn load<S: Simd>(s: S, p: *const $type) -> S::Vector {
                // SAFETY: the caller's promise, here and below.
                s.$widen(unsafe { s.load_halves(p.cast()) })
            }
            #[inline(always)]
            unsafe fn load_lanes<S: Simd>(
                s: S,
                p: *const $type,
                lanes: u32,
                fill: f32,
            ) -> S::Vector {
                let fill = <$type>::from_f32(fill).to_bits();
                // SAFETY: as above.
                s.$widen(unsafe { s.load_half_lanes(p.cast(), lanes, fill) })
            }
            #[inline(always)]
            unsafe fn store<S: Simd>(s: S, p: *mut $type, v: S::Vector) {
                // SAFETY: as above.
                unsafe { s.store_halves(p.cast(), s.$narrow(v)) }
            }
            #[inline(always)]
            unsafe fn store_lanes<S: Simd>(s: S, p: *mut $type, lanes: u32, v: S::Vector) {
                // SAFETY: as above.
                unsafe { s.store_half_lanes(p.cast(), lanes, s.$narrow(v)) }
            }
            #[inline(always)]
            unsafe fn stream<S: Simd>(s: S, p: *mut $type, v: S::Vector) {
                // SAFETY: as above.
                unsafe { s.stream_halves(p.cast(), s.$narrow(v)) }
            }
            #[inline(always)]
            fn to_f64(self) -> f64 {
                self.to_f64()
            }
        }
    };
}
half!(half::bf16, widen_bf16, narrow_bf16);
half!(half::f16, widen_f16, narrow_f16);
