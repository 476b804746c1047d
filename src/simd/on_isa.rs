//! How unit tests run a generic function on every instruction set.

use crate::dispatch::Isa;

/// Returns the instruction sets that the processor has, and prints those that it does not.
pub fn available() -> Vec<Isa> {
    let (available, skipped): (Vec<_>, Vec<_>) =
        Isa::ALL.into_iter().partition(|isa| isa.is_available());
    for isa in skipped {
        println!("SKIPPED: this processor does not have {}", isa.name());
    }
    available
}

/// Defines functions that evaluate an expression on one instruction set.
///
/// `fn name(x: X) -> R = |s| e;` defines `fn name(isa: Isa, x: X) -> R`. The expression `e` is compiled
/// for each set, with the features of the set; `s` is the token for lanes of f32, and `s.wide()` that for
/// lanes of f64. Functions that `e` calls have to be `#[inline(always)]` to be compiled with the features.
///
/// The defined function panics if the processor does not have the set.
macro_rules! on_isa {
    () => {};
    ($(#[$meta:meta])* fn $($rest:tt)*) => {
        $crate::simd::on_isa::on_isa! { @ [] [$(#[$meta])*] $($rest)* }
    };
    ($(#[$meta:meta])* unsafe fn $($rest:tt)*) => {
        $crate::simd::on_isa::on_isa! { @ [unsafe] [$(#[$meta])*] $($rest)* }
    };
    (
        @ [$($unsafe:ident)?] [$($meta:tt)*]
        $name:ident $(<$generic:ident: $bound:ident>)? ($($x:ident: $type:ty),* $(,)?) -> $result:ty
            = |$s:ident| $body:expr;
        $($rest:tt)*
    ) => {
        $($meta)*
        $($unsafe)? fn $name $(<$generic: $bound>)? (
            isa: $crate::dispatch::Isa,
            $($x: $type),*
        ) -> $result {
            use $crate::dispatch::Isa;
            #[allow(unused_imports, reason = "an expression for the portable set alone may call no method of it")]
            use $crate::simd::Simd;
            use $crate::simd::portable::Portable;

            #[cfg(x86_sets)]
            #[target_feature(enable = "avx2,fma,f16c")]
            $($unsafe)? fn avx2 $(<$generic: $bound>)? ($($x: $type),*) -> $result {
                // SAFETY: this function is compiled for the features, so its caller has found that
                // the processor has them.
                let $s = unsafe { $crate::simd::avx2::Avx2::assume() };
                $body
            }
            #[cfg(x86_sets)]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
            $($unsafe)? fn avx512 $(<$generic: $bound>)? ($($x: $type),*) -> $result {
                // SAFETY: this function is compiled for the features, so its caller has found that
                // the processor has them.
                let $s = unsafe { $crate::simd::avx512::Avx512::assume() };
                $body
            }

            assert!(isa.is_available(), "{}", isa.name());
            match isa {
                Isa::Portable => {
                    let $s = Portable;
                    $body
                }
                // SAFETY: the processor has the set (the assertion above). The arguments are those of
                // this function, so they are valid if it is unsafe (# Safety).
                #[cfg(x86_sets)]
                Isa::Avx2 => unsafe { avx2 $(::<$generic>)? ($($x),*) },
                // SAFETY: the processor has the set (the assertion above). The arguments are those of
                // this function, so they are valid if it is unsafe (# Safety).
                #[cfg(x86_sets)]
                Isa::Avx512 => unsafe { avx512 $(::<$generic>)? ($($x),*) },
                #[cfg(not(x86_sets))]
                Isa::Avx2 | Isa::Avx512 => unreachable!("no processor of this build has them"),
            }
        }
        $crate::simd::on_isa::on_isa! { $($rest)* }
    };
}
pub(crate) use on_isa;
