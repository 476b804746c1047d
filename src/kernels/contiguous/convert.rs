//! Copies between a caller's element type and the lanes' own.

use crate::element::Element;
use crate::simd::{Real, Simd, up_to};

/// Copies `len` logits into the lanes' own type.
///
/// # Safety
/// `x` is readable for `len` elements of `E`, `to` writable for as many lanes, and they do not overlap;
/// the processor has the set of `s`.
#[inline(always)]
pub unsafe fn widen<S: Simd, E: Element<S>>(s: S, x: *const u8, len: usize, to: *mut u8) {
    let (x, to) = (x.cast::<E>(), to.cast::<S::Real>());
    for at in (0..len).step_by(S::LANES) {
        let (x, to, left) = (x.wrapping_add(at), to.wrapping_add(at), len - at);
        // Of the lanes' own type, whole loads and stores would become a call of memcpy.
        // SAFETY: `x` is readable and `to` writable for the elements that are left, a register or those that have a bit
        // in `lanes` (# Safety).
        unsafe {
            if left >= S::LANES && !E::NATIVE {
                s.store(to, E::load(s, x));
            } else {
                let lanes = up_to::<S>(left);
                s.store_lanes(to, lanes, E::load_lanes(s, x, lanes, S::Real::ZERO));
            }
        }
    }
}

/// Copies `len` numbers of the lanes' own type to an output of type `G`, rounding once.
///
/// # Safety
/// `x` is readable for `len` lanes, `to` writable for as many elements of `G`, and they do not overlap;
/// the processor has the set of `s`.
#[inline(always)]
pub unsafe fn narrow<S: Simd, G: Element<S>>(s: S, x: *const u8, len: usize, to: *mut u8) {
    let (x, to) = (x.cast::<S::Real>(), to.cast::<G>());
    for at in (0..len).step_by(S::LANES) {
        let lanes = up_to::<S>(len - at);
        // SAFETY: `lanes` has a bit for each element from `at` on below `len`, for which `x` is readable
        // and `to` writable (# Safety).
        unsafe {
            let v = s.load_lanes(x.wrapping_add(at), lanes, S::Real::ZERO);
            G::store_lanes(s, to.wrapping_add(at), lanes, v);
        }
    }
}
