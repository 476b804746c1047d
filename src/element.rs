//! The element types of logits and gradients, as lanes see them.

use crate::simd::{Halves, Real, Simd};

/// A float that is loaded into lanes of f32 or f64 and stored from them.
///
/// bf16 and f16 widen to f32 exactly; a store rounds once, to nearest even, and keeps NaN a NaN.
pub trait Float: Copy + 'static {
    /// What the lanes hold.
    type Real: Real;
    /// It is the lanes' own type: loads and stores convert nothing.
    const NATIVE: bool = false;

    /// The value, exactly.
    fn to_f64(self) -> f64;
    /// Rounded to the lanes' type, and then to this one.
    fn from_f64(x: f64) -> Self;
}

/// How a [`Float`] gets into the lanes of one instruction set.
pub trait Element<S: Simd>: Float<Real = S::Real> {
    /// As [`Simd::load`].
    ///
    /// # Safety
    /// As there.
    unsafe fn load(s: S, p: *const Self) -> S::Vector;
    /// As [`Simd::load_lanes`].
    ///
    /// # Safety
    /// As there.
    unsafe fn load_lanes(s: S, p: *const Self, lanes: u32, fill: S::Real) -> S::Vector;
    /// As [`Simd::store`].
    ///
    /// # Safety
    /// As there.
    unsafe fn store(s: S, p: *mut Self, v: S::Vector);
    /// As [`Simd::store_lanes`].
    ///
    /// # Safety
    /// As there.
    unsafe fn store_lanes(s: S, p: *mut Self, lanes: u32, v: S::Vector);
    /// As [`Simd::stream`]; `p` is aligned to the `LANES` elements that are written.
    ///
    /// # Safety
    /// As there.
    unsafe fn stream(s: S, p: *mut Self, v: S::Vector);
}

/// The lanes' own types.
macro_rules! exact {
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
                // SAFETY: the caller's promise, here and below.
                unsafe { s.load(p) }
            }
            #[inline(always)]
            unsafe fn load_lanes(s: S, p: *const $type, lanes: u32, fill: $type) -> S::Vector {
                // SAFETY: as above.
                unsafe { s.load_lanes(p, lanes, fill) }
            }
            #[inline(always)]
            unsafe fn store(s: S, p: *mut $type, v: S::Vector) {
                // SAFETY: as above.
                unsafe { s.store(p, v) }
            }
            #[inline(always)]
            unsafe fn store_lanes(s: S, p: *mut $type, lanes: u32, v: S::Vector) {
                // SAFETY: as above.
                unsafe { s.store_lanes(p, lanes, v) }
            }
            #[inline(always)]
            unsafe fn stream(s: S, p: *mut $type, v: S::Vector) {
                // SAFETY: as above.
                unsafe { s.stream(p, v) }
            }
        }
    };
}
exact!(f32);
exact!(f64);

/// The two halves differ in their conversions alone.
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
                // SAFETY: the caller's promise, here and below.
                s.$widen(unsafe { s.load_halves(p.cast()) })
            }
            #[inline(always)]
            unsafe fn load_lanes(s: S, p: *const $type, lanes: u32, fill: f32) -> S::Vector {
                let fill = <$type>::from_f32(fill).to_bits();
                // SAFETY: as above.
                s.$widen(unsafe { s.load_half_lanes(p.cast(), lanes, fill) })
            }
            #[inline(always)]
            unsafe fn store(s: S, p: *mut $type, v: S::Vector) {
                // SAFETY: as above.
                unsafe { s.store_halves(p.cast(), s.$narrow(v)) }
            }
            #[inline(always)]
            unsafe fn store_lanes(s: S, p: *mut $type, lanes: u32, v: S::Vector) {
                // SAFETY: as above.
                unsafe { s.store_half_lanes(p.cast(), lanes, s.$narrow(v)) }
            }
            #[inline(always)]
            unsafe fn stream(s: S, p: *mut $type, v: S::Vector) {
                // SAFETY: as above.
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
    use crate::simd::portable::Portable;
    use half::{bf16, f16};
    use rayon::prelude::*;

    /// Values that are converted in one go, of whole registers on every set.
    const N: usize = 64;
    /// The most lanes of a register.
    const WIDEST: usize = 16;

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

    /// How one set loads and stores one type.
    struct Set<E> {
        isa: Isa,
        lanes: usize,
        widen: unsafe fn(&[E; N]) -> [f32; N],
        narrow: unsafe fn(&[f32; N]) -> [E; N],
        stream: unsafe fn(*mut E, &[f32; N]),
        load_lanes: unsafe fn(*const E, u32, f32) -> [f32; WIDEST],
        store_lanes: unsafe fn(*mut E, u32, &[f32; WIDEST]),
    }

    #[inline(always)]
    fn widen<S: Halves, E: Element<S>>(s: S, x: &[E; N]) -> [f32; N] {
        let mut wide = [0.0; N];
        for at in (0..N).step_by(S::LANES) {
            // SAFETY: within the arrays.
            unsafe { s.store(wide.as_mut_ptr().add(at), E::load(s, x.as_ptr().add(at))) };
        }
        wide
    }

    #[inline(always)]
    fn narrow<S: Halves, E: Element<S>>(s: S, x: &[f32; N]) -> [E; N] {
        // SAFETY: floats have no invalid bits.
        let mut short: [E; N] = unsafe { std::mem::zeroed() };
        for at in (0..N).step_by(S::LANES) {
            // SAFETY: within the arrays.
            unsafe { E::store(s, short.as_mut_ptr().add(at), s.load(x.as_ptr().add(at))) };
        }
        short
    }

    /// # Safety
    /// `p` is valid for writes of `N` elements and aligned to a cache line.
    #[inline(always)]
    unsafe fn stream<S: Halves, E: Element<S>>(s: S, p: *mut E, x: &[f32; N]) {
        for at in (0..N).step_by(S::LANES) {
            // SAFETY: the caller's promise; within the array.
            unsafe { E::stream(s, p.add(at), s.load(x.as_ptr().add(at))) };
        }
        s.fence();
    }

    /// # Safety
    /// As [`Simd::load_lanes`].
    #[inline(always)]
    unsafe fn load_lanes<S: Halves, E: Element<S>>(
        s: S,
        p: *const E,
        lanes: u32,
        fill: f32,
    ) -> [f32; WIDEST] {
        let mut wide = [0.0; WIDEST];
        // SAFETY: the caller's promise; no register is wider than the array.
        unsafe { s.store(wide.as_mut_ptr(), E::load_lanes(s, p, lanes, fill)) };
        wide
    }

    /// # Safety
    /// As [`Simd::store_lanes`].
    #[inline(always)]
    unsafe fn store_lanes<S: Halves, E: Element<S>>(
        s: S,
        p: *mut E,
        lanes: u32,
        x: &[f32; WIDEST],
    ) {
        // SAFETY: the caller's promise; no register is wider than the array.
        unsafe { E::store_lanes(s, p, lanes, s.load(x.as_ptr())) };
    }

    macro_rules! stamp {
        ($name:ident, $isa:expr, $lanes:expr, $token:expr $(, $feature:tt)*) => {
            #[allow(unused_unsafe, reason = "the portable token needs no proof")]
            mod $name {
                use super::*;

                $(#[target_feature(enable = $feature)])*
                unsafe fn widen<E: Everywhere>(x: &[E; N]) -> [f32; N] {
                    // SAFETY: this function's own features, here and below.
                    super::widen(unsafe { $token }, x)
                }
                $(#[target_feature(enable = $feature)])*
                unsafe fn narrow<E: Everywhere>(x: &[f32; N]) -> [E; N] {
                    // SAFETY: as above.
                    super::narrow(unsafe { $token }, x)
                }
                $(#[target_feature(enable = $feature)])*
                unsafe fn stream<E: Everywhere>(p: *mut E, x: &[f32; N]) {
                    // SAFETY: as above; the caller's promise.
                    unsafe { super::stream($token, p, x) }
                }
                $(#[target_feature(enable = $feature)])*
                unsafe fn load_lanes<E: Everywhere>(
                    p: *const E,
                    lanes: u32,
                    fill: f32,
                ) -> [f32; WIDEST] {
                    // SAFETY: as above.
                    unsafe { super::load_lanes($token, p, lanes, fill) }
                }
                $(#[target_feature(enable = $feature)])*
                unsafe fn store_lanes<E: Everywhere>(p: *mut E, lanes: u32, x: &[f32; WIDEST]) {
                    // SAFETY: as above.
                    unsafe { super::store_lanes($token, p, lanes, x) }
                }

                pub fn set<E: Everywhere>() -> Set<E> {
                    Set { isa: $isa, lanes: $lanes, widen, narrow, stream, load_lanes, store_lanes }
                }
            }
        };
    }
    stamp!(portable, Isa::Portable, Portable::LANES, Portable);
    #[cfg(x86_sets)]
    stamp!(avx2, Isa::Avx2, 8, crate::simd::avx2::Avx2::assume(), "avx2", "fma", "f16c");
    #[cfg(x86_sets)]
    stamp!(
        avx512,
        Isa::Avx512,
        16,
        crate::simd::avx512::Avx512::assume(),
        "avx512f",
        "avx512bw",
        "avx512dq",
        "avx512vl"
    );

    /// The sets of this machine; the others are named.
    fn sets<E: Everywhere>() -> Vec<Set<E>> {
        let all = [
            portable::set(),
            #[cfg(x86_sets)]
            avx2::set(),
            #[cfg(x86_sets)]
            avx512::set(),
        ];
        all.into_iter()
            .filter(|set| {
                if !set.isa.is_available() {
                    println!("skipped: this processor does not have {}", set.isa.name());
                }
                set.isa.is_available()
            })
            .collect()
    }

    /// What the crate `half` says of a type, and what arithmetic does.
    trait Half: Everywhere + std::fmt::Debug + Send + Sync {
        const DIGITS: u32;
        fn from_bits(bits: u16) -> Self;
        fn bits(self) -> u16;
        fn to_f32(self) -> f32;
        fn from_f32(x: f32) -> Self;
        fn is_nan(self) -> bool;

        /// The value of a finite one, by its definition.
        fn value(self) -> f64 {
            let stored = Self::DIGITS - 1;
            let bits = u32::from(self.bits());
            let (exponent, fraction) = (bits << 17 >> (17 + stored), bits & ((1 << stored) - 1));
            // The exponent has 15 - stored bits; 0 stands for what 1 does, without the leading 1.
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

    /// One test for each type.
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
        for set in sets::<E>() {
            for start in (0..1u32 << 16).step_by(N) {
                let x: [E; N] = std::array::from_fn(|i| E::from_bits((start + i as u32) as u16));
                // SAFETY: available.
                let wide = unsafe { (set.widen)(&x) };
                for (x, wide) in x.into_iter().zip(wide) {
                    let what = || format!("{x:?} on {}", set.isa.name());
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

    /// Floats in the order of their bits. Rounding is monotone: where the ends become one half, so
    /// does everything between them.
    #[track_caller]
    fn assert_narrow_in_order<E: Half>(sets: &[Set<E>], x: &[f32; N]) {
        let [first, last] = [x[0], x[N - 1]].map(|x| E::from_f32(x));
        let is_number = !x[0].is_nan() && !x[N - 1].is_nan();
        if is_number && first.bits() == last.bits() {
            assert_narrow_to(sets, x, &[first; N]);
        } else {
            assert_narrow(sets, x);
        }
    }

    #[track_caller]
    fn assert_narrow<E: Half>(sets: &[Set<E>], x: &[f32; N]) {
        assert_narrow_to(sets, x, &x.map(E::from_f32));
    }

    #[track_caller]
    fn assert_narrow_to<E: Half>(sets: &[Set<E>], x: &[f32; N], want: &[E; N]) {
        for set in sets {
            // SAFETY: available.
            let got = unsafe { (set.narrow)(x) };
            let same =
                |i: usize| (got[i].bits() == want[i].bits()) | (x[i].is_nan() & got[i].is_nan());
            // Without a branch for each: there are billions.
            if (0..N).fold(true, |all, i| all & same(i)) {
                continue;
            }
            let i = (0..N).find(|&i| !same(i)).expect("one is not the same");
            panic!(
                "{:e} ({:#010x}) on {}: {:?} instead of {:?}",
                x[i],
                x[i].to_bits(),
                set.isa.name(),
                got[i],
                want[i]
            );
        }
    }

    /// All 2^32 floats.
    fn narrowing<E: Half>() {
        let sets = sets::<E>();
        (0..1u32 << 16).into_par_iter().for_each(|high| {
            for low in blocks(0..1 << 16, N, high) {
                let mut x = [0.0; N];
                for (i, x) in x.iter_mut().enumerate() {
                    *x = f32::from_bits(high << 16 | low | i as u32);
                }
                assert_narrow_in_order(&sets, &x);
            }
        });
    }

    /// Without the crate `half`: halfway between two neighbours it is the even one, beside that
    /// the nearer; halfway past the largest begins infinity.
    fn borders<E: Half>() {
        let infinity = E::from_f32(f32::INFINITY).bits();
        let sets = sets::<E>();
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
                for set in &sets {
                    // SAFETY: available.
                    let got = unsafe { (set.narrow)(&all) }.map(E::bits);
                    let want: [u16; N] = std::array::from_fn(|i| want[i % 3] | flag);
                    assert_eq!(got, want, "{:e} on {}", sign * middle, set.isa.name());
                }
            }
        }
    }

    /// NaN stays NaN, those too whose bits a rounding would carry past all ones.
    fn nan<E: Half>() {
        let nan = [0x7F80_0001, 0x7FBF_FFFF, 0x7FC0_0000, 0x7FFF_7FFF, 0x7FFF_8000, 0x7FFF_FFFF];
        let x = std::array::from_fn(|i| f32::from_bits(nan[i % 6] | (i as u32 / 6 % 2) << 31));
        assert_narrow(&sets::<E>(), &x);
    }

    /// Every prefix, suffix and single lane: what is loaded, what is filled in, what is written
    /// and what is left alone.
    fn lanes<E: Half>() {
        let values: [E; WIDEST] = std::array::from_fn(|i| E::from_f32(1.5 + i as f32));
        let wide = values.map(E::to_f32);
        let kept = E::from_f32(-7.0);
        for set in sets::<E>() {
            let full = (1u32 << set.lanes) - 1;
            let prefixes = (0..=set.lanes).map(|n| (1u32 << n) - 1);
            let masks = prefixes.flat_map(|mask| [mask, full & !mask, mask ^ mask >> 1]);
            for mask in masks {
                let is_set = |i: usize| mask >> i & 1 == 1;
                for fill in [0.0, f32::NEG_INFINITY] {
                    // SAFETY: available; the array has all lanes.
                    let got = unsafe { (set.load_lanes)(values.as_ptr(), mask, fill) };
                    for i in 0..set.lanes {
                        let want = if is_set(i) { wide[i] } else { fill };
                        assert_eq!(got[i], want, "{mask:#b} on {}", set.isa.name());
                    }
                }
                let mut memory = [kept; WIDEST];
                // SAFETY: as above.
                unsafe { (set.store_lanes)(memory.as_mut_ptr(), mask, &wide) };
                for (i, got) in memory.into_iter().enumerate() {
                    let want = if is_set(i) { values[i] } else { kept };
                    assert_eq!(got.bits(), want.bits(), "{mask:#b} on {}", set.isa.name());
                }
            }
        }
    }

    fn streaming<E: Half>() {
        #[repr(align(64))]
        struct Aligned<E>([E; N]);
        let x: [f32; N] = std::array::from_fn(|i| (i as f32 - 31.5) * 1.001);
        for set in sets::<E>() {
            let mut to = Aligned([E::from_bits(0); N]);
            // SAFETY: available; aligned, and N long.
            unsafe { (set.stream)(to.0.as_mut_ptr(), &x) };
            assert_eq!(to.0.map(E::bits), x.map(|x| E::from_f32(x).bits()), "{}", set.isa.name());
        }
    }

    /// Lanes at the end of a page before one that must not be touched.
    #[cfg(not(unix))]
    fn protected_memory<E: Half>() {
        println!("skipped: protects pages with mmap");
    }

    /// Lanes at the end of a page before one that must not be touched, and at the start of one
    /// behind such a page.
    #[cfg(unix)]
    fn protected_memory<E: Half>() {
        // SAFETY: asks for a number.
        let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) } as usize;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: three fresh pages, of which the outer two are then shut.
        let start = unsafe {
            let start = libc::mmap(std::ptr::null_mut(), 3 * page, libc::PROT_NONE, flags, -1, 0);
            assert_ne!(start, libc::MAP_FAILED);
            let middle = start.byte_add(page);
            assert_eq!(libc::mprotect(middle, page, libc::PROT_READ | libc::PROT_WRITE), 0);
            middle.cast::<E>()
        };
        let end = start.wrapping_byte_add(page);
        let x: [f32; WIDEST] = std::array::from_fn(|i| 2.0 + i as f32);
        for set in sets::<E>() {
            for n in 0..=set.lanes {
                let first = (1u32 << n) - 1;
                let last = first << (set.lanes - n);
                for (p, mask) in
                    [(end.wrapping_sub(n), first), (start.wrapping_sub(set.lanes - n), last)]
                {
                    // SAFETY: available; the lanes of the mask are in the page.
                    let got = unsafe {
                        (set.store_lanes)(p, mask, &x);
                        (set.load_lanes)(p, mask, 0.0)
                    };
                    for i in 0..set.lanes {
                        let want = if mask >> i & 1 == 1 { x[i] } else { 0.0 };
                        assert_eq!(got[i], want, "{mask:#b} on {}", set.isa.name());
                    }
                }
            }
        }
        // SAFETY: the pages from above, which nothing points to any more.
        assert_eq!(unsafe { libc::munmap(start.wrapping_byte_sub(page).cast(), 3 * page) }, 0);
    }
}
