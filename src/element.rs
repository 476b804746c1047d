//! The element types of logits and gradients: how lanes load and store them.

use crate::simd::{Halves, Real, Simd};

/// A float that is loaded into lanes of f32 or f64 and stored from them.
///
/// bf16 and f16 widen to f32 exactly. A store rounds once, to nearest even; NaN stays NaN.
pub trait Float: Copy + 'static {
    /// The type of the lanes.
    type Real: Real;
    /// Whether this is the type of the lanes, so that loads and stores convert nothing.
    const NATIVE: bool = false;

    /// Converts exactly.
    fn to_f64(self) -> f64;
    /// Rounds to the type of the lanes, and then to this type.
    fn from_f64(x: f64) -> Self;
}

/// Loads and stores of a [`Float`] with the lanes of one instruction set.
pub trait Element<S: Simd>: Float<Real = S::Real> {
    /// Loads as [`Simd::load`] does.
    ///
    /// # Safety
    /// `p` is aligned to its type and valid for reads of `LANES` elements.
    unsafe fn load(s: S, p: *const Self) -> S::Vector;
    /// Loads as [`Simd::load_lanes`] does.
    ///
    /// # Safety
    /// `p` is aligned to its type. For every set bit `i` below `LANES`, `p + i` is valid for reads.
    unsafe fn load_lanes(s: S, p: *const Self, lanes: u32, fill: S::Real) -> S::Vector;
    /// Stores as [`Simd::store`] does.
    ///
    /// # Safety
    /// `p` is aligned to its type and valid for writes of `LANES` elements.
    unsafe fn store(s: S, p: *mut Self, v: S::Vector);
    /// Stores as [`Simd::store_lanes`] does.
    ///
    /// # Safety
    /// `p` is aligned to its type. For every set bit `i` below `LANES`, `p + i` is valid for writes.
    unsafe fn store_lanes(s: S, p: *mut Self, lanes: u32, v: S::Vector);
    /// Stores as [`Simd::stream`] does.
    ///
    /// # Safety
    /// `p` is valid for writes of `LANES` elements and aligned to the size of all of them.
    unsafe fn stream(s: S, p: *mut Self, v: S::Vector);
}

/// Implements [`Element`] for a type of lanes.
macro_rules! native {
    ($type:ident) => {
        impl Float for $type {
            type Real = $type;
            const NATIVE: bool = true;

            #[inline(always)]
            fn to_f64(self) -> f64 {
                f64::from(self)
            }
            #[inline(always)]
            fn from_f64(x: f64) -> Self {
                x as $type
            }
        }

        impl<S: Simd<Real = $type>> Element<S> for $type {
            #[inline(always)]
            unsafe fn load(s: S, p: *const $type) -> S::Vector {
                // SAFETY: `p` is aligned and valid for reads of `LANES` elements (`Element::load`).
                unsafe { s.load(p) }
            }
            #[inline(always)]
            unsafe fn load_lanes(s: S, p: *const $type, lanes: u32, fill: $type) -> S::Vector {
                // SAFETY: `p` is aligned and valid for reads of the set lanes (`Element::load_lanes`).
                unsafe { s.load_lanes(p, lanes, fill) }
            }
            #[inline(always)]
            unsafe fn store(s: S, p: *mut $type, v: S::Vector) {
                // SAFETY: `p` is aligned and valid for writes of `LANES` elements (`Element::store`).
                unsafe { s.store(p, v) }
            }
            #[inline(always)]
            unsafe fn store_lanes(s: S, p: *mut $type, lanes: u32, v: S::Vector) {
                // SAFETY: `p` is aligned and valid for writes of the set lanes (`Element::store_lanes`).
                unsafe { s.store_lanes(p, lanes, v) }
            }
            #[inline(always)]
            unsafe fn stream(s: S, p: *mut $type, v: S::Vector) {
                // SAFETY: `p` is valid for writes of `LANES` elements and aligned to all of them (`Element::stream`).
                unsafe { s.stream(p, v) }
            }
        }
    };
}
native!(f32);
native!(f64);

/// Implements [`Element`] for a 16-bit float. The two types differ only in the conversions.
macro_rules! half {
    ($type:ty, $widen:ident, $narrow:ident) => {
        impl Float for $type {
            type Real = f32;

            #[inline(always)]
            fn to_f64(self) -> f64 {
                self.to_f64()
            }
            #[inline(always)]
            fn from_f64(x: f64) -> Self {
                <$type>::from_f32(x as f32)
            }
        }

        impl<S: Halves> Element<S> for $type {
            #[inline(always)]
            unsafe fn load(s: S, p: *const $type) -> S::Vector {
                // SAFETY: `p` is aligned and valid for reads of `LANES` elements (`Element::load`).
                s.$widen(unsafe { s.load_halves(p.cast()) })
            }
            #[inline(always)]
            unsafe fn load_lanes(s: S, p: *const $type, lanes: u32, fill: f32) -> S::Vector {
                let fill = <$type>::from_f32(fill).to_bits();
                // SAFETY: `p` is aligned and valid for reads of the set lanes (`Element::load_lanes`).
                s.$widen(unsafe { s.load_half_lanes(p.cast(), lanes, fill) })
            }
            #[inline(always)]
            unsafe fn store(s: S, p: *mut $type, v: S::Vector) {
                // SAFETY: `p` is aligned and valid for writes of `LANES` elements (`Element::store`).
                unsafe { s.store_halves(p.cast(), s.$narrow(v)) }
            }
            #[inline(always)]
            unsafe fn store_lanes(s: S, p: *mut $type, lanes: u32, v: S::Vector) {
                // SAFETY: `p` is aligned and valid for writes of the set lanes (`Element::store_lanes`).
                unsafe { s.store_half_lanes(p.cast(), lanes, s.$narrow(v)) }
            }
            #[inline(always)]
            unsafe fn stream(s: S, p: *mut $type, v: S::Vector) {
                // SAFETY: `p` is valid for writes of `LANES` elements and aligned to all of them (`Element::stream`).
                unsafe { s.stream_halves(p.cast(), s.$narrow(v)) }
            }
        }
    };
}
half!(half::bf16, widen_bf16, narrow_bf16);
half!(half::f16, widen_f16, narrow_f16);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dispatch::Isa;
    use crate::sample::blocks;
    use crate::simd::on_isa::{available, on_isa};
    use crate::simd::portable::Portable;
    use half::{bf16, f16};
    use rayon::prelude::*;

    /// The values that one call converts: whole registers on every set.
    const N: usize = 64;
    /// The most lanes of a register.
    const WIDEST: usize = 16;

    /// Values aligned to a register of every set.
    #[repr(align(64))]
    struct Aligned<E>([E; N]);

    /// A type that all sets of f32 lanes can load and store.
    #[cfg(x86_sets)]
    trait Everywhere:
        Float<Real = f32>
        + Element<Portable>
        + Element<crate::simd::avx2::Avx2>
        + Element<crate::simd::avx512::Avx512>
    {
    }
    /// A type that all sets of f32 lanes can load and store.
    #[cfg(not(x86_sets))]
    trait Everywhere: Float<Real = f32> + Element<Portable> {}
    impl Everywhere for bf16 {}
    impl Everywhere for f16 {}

    on_isa! {
        /// The lanes of a register.
        fn lanes_of() -> usize = |s| width(s);
        fn widen<E: Half>(x: &[E; N]) -> [f32; N] = |s| {
            let mut wide = [0.0; N];
            for at in (0..N).step_by(width(s)) {
                // SAFETY: a register's width divides N, so one from `at` on lies within both arrays.
                unsafe { s.store(wide.as_mut_ptr().add(at), E::load(s, x.as_ptr().add(at))) };
            }
            wide
        };
        fn narrow<E: Half>(x: &[f32; N]) -> [E; N] = |s| {
            let mut short = [E::from_f32(0.0); N];
            for at in (0..N).step_by(width(s)) {
                // SAFETY: a register's width divides N, so one from `at` on lies within both arrays.
                unsafe { E::store(s, short.as_mut_ptr().add(at), s.load(x.as_ptr().add(at))) };
            }
            short
        };
        fn stream<E: Half>(to: &mut Aligned<E>, x: &[f32; N]) -> () = |s| {
            for at in (0..N).step_by(width(s)) {
                // SAFETY: a register's width divides N, so one from `at` on lies within both arrays,
                // and `Aligned` aligns it.
                unsafe { E::stream(s, to.0.as_mut_ptr().add(at), s.load(x.as_ptr().add(at))) };
            }
            s.fence();
        };
        /// # Safety
        /// The list of [`Simd::load_lanes`] applies.
        unsafe fn load_lanes<E: Half>(p: *const E, lanes: u32, fill: f32) -> [f32; WIDEST] = |s| {
            let mut wide = [0.0; WIDEST];
            // SAFETY: `p` is aligned and valid for reads of `lanes` (# Safety), and no register is wider
            // than the array.
            unsafe { s.store(wide.as_mut_ptr(), E::load_lanes(s, p, lanes, fill)) };
            wide
        };
        /// # Safety
        /// The list of [`Simd::store_lanes`] applies.
        unsafe fn store_lanes<E: Half>(p: *mut E, lanes: u32, x: &[f32; WIDEST]) -> () = |s| {
            // SAFETY: `p` is aligned and valid for writes of `lanes` (# Safety), and no register is wider
            // than the array.
            unsafe { E::store_lanes(s, p, lanes, s.load(x.as_ptr())) };
        };
    }

    #[inline(always)]
    fn width<S: Simd>(_: S) -> usize {
        S::LANES
    }

    /// A 16-bit float, converted by the crate `half` and by the definition of its bits.
    trait Half: Everywhere + std::fmt::Debug + Send + Sync {
        const DIGITS: u32;
        fn from_bits(bits: u16) -> Self;
        fn bits(self) -> u16;
        fn to_f32(self) -> f32;
        fn from_f32(x: f32) -> Self;
        fn is_nan(self) -> bool;

        /// The value of a finite number, by the definition of its bits.
        fn value(self) -> f64 {
            let stored = Self::DIGITS - 1;
            let bits = u32::from(self.bits());
            let (exponent, fraction) = (bits << 17 >> (17 + stored), bits & ((1 << stored) - 1));
            // The exponent has 15 - stored bits. An exponent field of 0 means that of 1 without the leading
            // 1 of the fraction.
            let bias = (1 << (14 - stored)) - 1;
            let leading = if exponent == 0 { 0 } else { 1 << stored };
            let scale = exponent.max(1) as i32 - bias - stored as i32;
            let size = f64::from(leading + fraction) * 2f64.powi(scale);
            if bits >> 15 == 1 { -size } else { size }
        }
    }

    macro_rules! implement {
        ($type:ty, $digits:expr) => {
            impl Half for $type {
                const DIGITS: u32 = $digits;
                fn from_bits(bits: u16) -> Self {
                    <$type>::from_bits(bits)
                }
                fn bits(self) -> u16 {
                    self.to_bits()
                }
                fn to_f32(self) -> f32 {
                    self.to_f32()
                }
                fn from_f32(x: f32) -> Self {
                    <$type>::from_f32(x)
                }
                fn is_nan(self) -> bool {
                    self.is_nan()
                }
            }
        };
    }
    implement!(bf16, 8);
    implement!(f16, 11);

    /// Defines a test of each function for each type.
    macro_rules! both {
        ($($name:ident),*) => {
            mod in_bf16 {
                $(#[test] fn $name() { super::$name::<super::bf16>() })*
            }
            mod in_f16 {
                $(#[test] fn $name() { super::$name::<super::f16>() })*
            }
        };
    }
    both!(widening, narrowing, borders, nan, lanes, streaming, protected_memory);

    /// All 65,536 halves.
    fn widening<E: Half>() {
        for isa in available() {
            for start in (0..1u32 << 16).step_by(N) {
                let x: [E; N] = std::array::from_fn(|i| E::from_bits((start + i as u32) as u16));
                let wide = widen(isa, &x);
                for (x, wide) in x.into_iter().zip(wide) {
                    let what = || format!("{x:?} on {}", isa.name());
                    if x.is_nan() {
                        assert!(wide.is_nan(), "{}", what());
                        continue;
                    }
                    assert_eq!(wide.to_bits(), x.to_f32().to_bits(), "{}", what());
                    if wide.is_finite() {
                        assert_eq!(f64::from(wide), x.value(), "{}", what());
                        assert_eq!(x.to_f64(), x.value(), "{}", what());
                    }
                }
            }
        }
    }

    /// Checks floats in the order of their bits. Rounding is monotone: if the first and the last become
    /// the same half, so do all between them.
    #[track_caller]
    fn assert_narrow_in_order<E: Half>(sets: &[Isa], x: &[f32; N]) {
        let [first, last] = [x[0], x[N - 1]].map(|x| E::from_f32(x));
        let is_number = !x[0].is_nan() && !x[N - 1].is_nan();
        if is_number && first.bits() == last.bits() {
            assert_narrow_to::<E>(sets, x, &[first; N]);
        } else {
            assert_narrow::<E>(sets, x);
        }
    }

    #[track_caller]
    fn assert_narrow<E: Half>(sets: &[Isa], x: &[f32; N]) {
        assert_narrow_to::<E>(sets, x, &x.map(E::from_f32));
    }

    #[track_caller]
    fn assert_narrow_to<E: Half>(sets: &[Isa], x: &[f32; N], want: &[E; N]) {
        for &isa in sets {
            let got = narrow::<E>(isa, x);
            let same =
                |i: usize| (got[i].bits() == want[i].bits()) | (x[i].is_nan() & got[i].is_nan());
            // The fold has no branches, since it sees billions of values.
            if (0..N).fold(true, |all, i| all & same(i)) {
                continue;
            }
            let i = (0..N).find(|&i| !same(i)).expect("one is not the same");
            panic!(
                "{:e} ({:#010x}) on {}: {:?} instead of {:?}",
                x[i],
                x[i].to_bits(),
                isa.name(),
                got[i],
                want[i]
            );
        }
    }

    /// All 2^32 floats.
    fn narrowing<E: Half>() {
        let sets = available();
        (0..1u32 << 16).into_par_iter().for_each(|high| {
            for low in blocks(0..1 << 16, N, high) {
                let mut x = [0.0; N];
                for (i, x) in x.iter_mut().enumerate() {
                    *x = f32::from_bits(high << 16 | low | i as u32);
                }
                assert_narrow_in_order::<E>(&sets, &x);
            }
        });
    }

    /// Checks the borders of rounding without the crate `half`. A number halfway between two neighbours
    /// rounds to the even one, one beside it to the nearer. Halfway past the largest number, infinity begins.
    fn borders<E: Half>() {
        let infinity = E::from_f32(f32::INFINITY).bits();
        let sets = available();
        for low in 0..infinity {
            let below = E::from_bits(low).value();
            let step = if low + 1 == infinity {
                below - E::from_bits(low - 1).value()
            } else {
                E::from_bits(low + 1).value() - below
            };
            let middle = (below + step / 2.0) as f32;
            assert_eq!(f64::from(middle), below + step / 2.0);
            let even = low + low % 2;
            let (x, want) = ([middle.next_down(), middle, middle.next_up()], [low, even, low + 1]);
            for (sign, flag) in [(1.0, 0), (-1.0, 0x8000)] {
                let all: [f32; N] = std::array::from_fn(|i| sign * x[i % 3]);
                for &isa in &sets {
                    let got = narrow::<E>(isa, &all).map(E::bits);
                    let want: [u16; N] = std::array::from_fn(|i| want[i % 3] | flag);
                    assert_eq!(got, want, "{:e} on {}", sign * middle, isa.name());
                }
            }
        }
    }

    /// NaN stays NaN, even if rounding its bits would carry past all ones.
    fn nan<E: Half>() {
        let nan = [0x7F80_0001, 0x7FBF_FFFF, 0x7FC0_0000, 0x7FFF_7FFF, 0x7FFF_8000, 0x7FFF_FFFF];
        let x = std::array::from_fn(|i| f32::from_bits(nan[i % 6] | (i as u32 / 6 % 2) << 31));
        assert_narrow::<E>(&available(), &x);
    }

    /// Checks every prefix, every suffix and every single lane: the values loaded, the fill, the values
    /// stored, and the memory left alone.
    fn lanes<E: Half>() {
        let values: [E; WIDEST] = std::array::from_fn(|i| E::from_f32(1.5 + i as f32));
        let wide = values.map(E::to_f32);
        let untouched = E::from_f32(-7.0);
        for isa in available() {
            let width = lanes_of(isa);
            let full = (1u32 << width) - 1;
            let prefixes = (0..=width).map(|n| (1u32 << n) - 1);
            let masks = prefixes.flat_map(|mask| [mask, full & !mask, mask ^ mask >> 1]);
            for mask in masks {
                let is_set = |i: usize| mask >> i & 1 == 1;
                for fill in [0.0, f32::NEG_INFINITY] {
                    // SAFETY: the array has an element for every lane.
                    let got = unsafe { load_lanes(isa, values.as_ptr(), mask, fill) };
                    for i in 0..width {
                        let want = if is_set(i) { wide[i] } else { fill };
                        assert_eq!(got[i], want, "{mask:#b} on {}", isa.name());
                    }
                }
                let mut memory = [untouched; WIDEST];
                // SAFETY: the array has an element for every lane.
                unsafe { store_lanes(isa, memory.as_mut_ptr(), mask, &wide) };
                for (i, got) in memory.into_iter().enumerate() {
                    let want = if is_set(i) { values[i] } else { untouched };
                    assert_eq!(got.bits(), want.bits(), "{mask:#b} on {}", isa.name());
                }
            }
        }
    }

    fn streaming<E: Half>() {
        let x: [f32; N] = std::array::from_fn(|i| (i as f32 - 31.5) * 1.001);
        for isa in available() {
            let mut to = Aligned([E::from_bits(0); N]);
            stream(isa, &mut to, &x);
            assert_eq!(to.0.map(E::bits), x.map(|x| E::from_f32(x).bits()), "{}", isa.name());
        }
    }

    /// Needs pages that no access may touch.
    #[cfg(not(unix))]
    fn protected_memory<E: Half>() {
        println!("skipped: protects pages with mmap");
    }

    /// Loads and stores lanes at the end of a page before a protected one, and at the start of a page after
    /// one.
    #[cfg(unix)]
    fn protected_memory<E: Half>() {
        // SAFETY: `sysconf` accesses no memory of this program.
        let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) } as usize;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: the mapping is three new pages, and the middle one is within it.
        let start = unsafe {
            let start = libc::mmap(std::ptr::null_mut(), 3 * page, libc::PROT_NONE, flags, -1, 0);
            assert_ne!(start, libc::MAP_FAILED);
            let middle = start.byte_add(page);
            assert_eq!(libc::mprotect(middle, page, libc::PROT_READ | libc::PROT_WRITE), 0);
            middle.cast::<E>()
        };
        let end = start.wrapping_byte_add(page);
        let x: [f32; WIDEST] = std::array::from_fn(|i| 2.0 + i as f32);
        for isa in available() {
            let width = lanes_of(isa);
            for n in 0..=width {
                let first = (1u32 << n) - 1;
                let last = first << (width - n);
                for (p, mask) in
                    [(end.wrapping_sub(n), first), (start.wrapping_sub(width - n), last)]
                {
                    // SAFETY: the set lanes of the mask are aligned elements of the middle page.
                    let got = unsafe {
                        store_lanes(isa, p, mask, &x);
                        load_lanes(isa, p, mask, 0.0)
                    };
                    for i in 0..width {
                        let want = if mask >> i & 1 == 1 { x[i] } else { 0.0 };
                        assert_eq!(got[i], want, "{mask:#b} on {}", isa.name());
                    }
                }
            }
        }
        // SAFETY: these are the three pages mapped above, and no reference to them is left.
        assert_eq!(unsafe { libc::munmap(start.wrapping_byte_sub(page).cast(), 3 * page) }, 0);
    }
}
