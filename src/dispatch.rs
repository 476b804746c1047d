//! Which instruction set runs, decided once; the entry points of each.
//!
//! An entry point is a plain function compiled for one instruction set. Everything it calls is
//! inlined into it; no vector crosses it; rayon stays outside.

use crate::kernels::Kernels;
use crate::kernels::contiguous::{self, Chunk};
use crate::kernels::online::Partial;
use crate::kernels::row::{Anchor, RowGradient, RowSum};
use crate::plan::Plan;
use crate::simd::Simd;
use crate::simd::portable::{self, Portable};
use std::ops::Range;
use std::sync::OnceLock;

/// An instruction set that kernels exist for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    /// What the build's own target has: NEON on AArch64, SSE2 on a plain x86-64.
    Portable,
    /// AVX2 with FMA.
    Avx2,
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
}

impl Isa {
    /// All of them, the plainest first.
    pub const ALL: [Isa; 3] = [Isa::Portable, Isa::Avx2, Isa::Avx512];

    /// What `xent_isa` and `XENT_ISA` call it.
    pub fn name(self) -> &'static str {
        match self {
            Isa::Portable => portable::NAME,
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
        }
    }

    /// The processor has it.
    pub fn is_available(self) -> bool {
        self.kernels().is_some()
    }

    /// The best that the processor has.
    pub fn best() -> Isa {
        let available = Isa::ALL.into_iter().filter(|isa| isa.is_available());
        available.max().unwrap_or(Isa::Portable)
    }

    /// Its entry points, if the processor has it: having them is the proof that they may run.
    pub(crate) fn kernels(self) -> Option<&'static Kernels> {
        match self {
            Isa::Portable => Some(&portable_entries::KERNELS),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => avx2_entries::detected().then_some(&avx2_entries::KERNELS),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => avx512_entries::detected().then_some(&avx512_entries::KERNELS),
            #[cfg(not(target_arch = "x86_64"))]
            Isa::Avx2 | Isa::Avx512 => None,
        }
    }
}

/// Stamps the entry points for one instruction set.
macro_rules! entries {
    ($module:ident, [$($feature:tt),*], $token:expr) => {
        mod $module {
            use super::*;

            /// The processor has all the features that the entry points are compiled for.
            #[allow(dead_code, reason = "the portable set asks for nothing")]
            pub fn detected() -> bool {
                true $(&& std::arch::is_x86_feature_detected!($feature))*
            }

            $(#[target_feature(enable = $feature)])*
            unsafe fn rows(plan: &Plan, range: Range<usize>) -> f64 {
                // SAFETY: this function's own features; the caller's promise (`Kernels`).
                unsafe { contiguous::rows(&KERNELS, plan, range) }
            }
            $(#[target_feature(enable = $feature)])*
            unsafe fn anchor(plan: &Plan, row: usize, hole: Option<usize>) -> Anchor {
                // SAFETY: as above.
                unsafe { contiguous::anchor($token, plan, row, hole) }
            }
            $(#[target_feature(enable = $feature)])*
            unsafe fn sum_segment(
                plan: &Plan,
                row: usize,
                segment: usize,
                sum: &RowSum,
            ) -> (Partial, u64) {
                // SAFETY: as above.
                unsafe { contiguous::sum_segment($token, &KERNELS, plan, row, segment, sum) }
            }
            $(#[target_feature(enable = $feature)])*
            unsafe fn redo(chunk: &Chunk, sum: f64) -> (f64, f64) {
                // SAFETY: as above.
                unsafe { contiguous::redo($token, chunk, sum) }
            }
            $(#[target_feature(enable = $feature)])*
            unsafe fn gradient_segment(
                plan: &Plan,
                row: usize,
                segment: usize,
                redone: u64,
                gradient: &RowGradient,
            ) {
                // SAFETY: as above.
                unsafe {
                    contiguous::gradient_segment($token, plan, row, segment, redone, gradient)
                }
            }

            fn fence() {
                // SAFETY: a fence is in every x86-64's set; elsewhere the token needs no proof.
                #[allow(unused_unsafe, reason = "the portable token needs no proof")]
                unsafe { $token }.fence();
            }

            pub static KERNELS: Kernels = Kernels { rows, anchor, sum_segment, redo, gradient_segment, fence };
        }
    };
}

entries!(portable_entries, [], Portable);
#[cfg(target_arch = "x86_64")]
entries!(avx2_entries, ["avx2", "fma"], crate::simd::avx2::Avx2::assume());
#[cfg(target_arch = "x86_64")]
entries!(
    avx512_entries,
    ["avx512f", "avx512bw", "avx512dq", "avx512vl"],
    crate::simd::avx512::Avx512::assume()
);

/// The instruction set in use: the best there is, or the one that a non-empty `XENT_ISA` names; the reason
/// if it names none, or one that this processor does not have. Decided once.
pub(crate) fn selected() -> Result<Isa, &'static str> {
    static SELECTED: OnceLock<Result<Isa, String>> = OnceLock::new();
    let choice = SELECTED.get_or_init(|| match std::env::var_os("XENT_ISA") {
        None => Ok(Isa::best()),
        Some(value) if value.is_empty() => Ok(Isa::best()),
        Some(value) => named(&value.to_string_lossy()),
    });
    choice.as_ref().copied().map_err(String::as_str)
}

/// The available instruction set of that name, or what is wrong with it.
fn named(name: &str) -> Result<Isa, String> {
    let list = |isas: Vec<Isa>| isas.iter().map(|i| i.name()).collect::<Vec<_>>().join(", ");
    match Isa::ALL.into_iter().find(|isa| isa.name() == name) {
        Some(isa) if isa.is_available() => Ok(isa),
        Some(_) => Err(format!(
            "XENT_ISA={name} is not available on this processor, which has: {}",
            list(Isa::ALL.into_iter().filter(|i| i.is_available()).collect())
        )),
        None => Err(format!(
            "XENT_ISA={name} names no instruction set; there are: {}",
            list(Isa::ALL.to_vec())
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_understood_or_refused() {
        assert_eq!(named(portable::NAME), Ok(Isa::Portable));
        for isa in Isa::ALL {
            assert_eq!(named(isa.name()).is_ok(), isa.is_available());
        }
        assert!(named("avx9000").unwrap_err().contains("names no instruction set"));
        assert!(named("").is_err());
    }
}
