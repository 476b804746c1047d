//! Which instruction set runs, decided once; the entry points of each.
//!
//! An entry point is a plain function compiled for one instruction set. Everything it calls is
//! inlined into it; no vector crosses it; rayon stays outside.

use crate::element::Element;
use crate::kernels::Kernels;
use crate::kernels::contiguous::{self, Chunk, Marks, Rare, Sums};
use crate::kernels::online::Partial;
use crate::kernels::row::{Anchor, RowGradient, RowSum};
use crate::math::exp2::Reference;
use crate::plan::{Dtype, Plan};
use crate::simd::Simd;
use crate::simd::portable::{self, Portable};
use half::{bf16, f16};
use std::ops::Range;
use std::sync::OnceLock;

/// An instruction set that kernels exist for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    /// What the build's own target has: NEON on AArch64, SSE2 on a plain x86-64.
    Portable,
    /// AVX2 with FMA and F16C.
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
        match self {
            Isa::Portable => portable_entries::detected(),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => avx2_entries::detected(),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => avx512_entries::detected(),
            #[cfg(not(target_arch = "x86_64"))]
            Isa::Avx2 | Isa::Avx512 => false,
        }
    }

    /// The best that the processor has.
    pub fn best() -> Isa {
        let available = Isa::ALL.into_iter().filter(|isa| isa.is_available());
        available.max().unwrap_or(Isa::Portable)
    }

    /// Its entry points for logits and gradients of these types, if the processor has it: having
    /// them is the proof that they may run. None for types that do not go together, too.
    pub(crate) fn kernels(self, logits: Dtype, gradient: Dtype) -> Option<&'static Kernels> {
        if !self.is_available() {
            return None;
        }
        match self {
            Isa::Portable => portable_entries::kernels(logits, gradient),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => avx2_entries::kernels(logits, gradient),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => avx512_entries::kernels(logits, gradient),
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
            pub fn detected() -> bool {
                true $(&& std::arch::is_x86_feature_detected!($feature))*
            }

            $(#[target_feature(enable = $feature)])*
            unsafe fn rows(kernels: &Kernels, plan: &Plan, range: Range<usize>) -> f64 {
                // SAFETY: this function's own features; the caller's promise (`Kernels`).
                unsafe { contiguous::rows(kernels, plan, range) }
            }
            $(#[target_feature(enable = $feature)])*
            unsafe fn anchor<E: Element>(plan: &Plan, row: usize, hole: Option<usize>) -> Anchor {
                // SAFETY: as above.
                unsafe { contiguous::anchor::<_, E>($token, plan, row, hole) }
            }
            $(#[target_feature(enable = $feature)])*
            unsafe fn sum_segment<E: Element>(
                plan: &Plan,
                row: usize,
                segment: usize,
                sum: &RowSum,
            ) -> (Partial, Marks) {
                let rare = const { &Rare { restore: restore::<E>, clamped: clamped::<E>, redo: redo::<E> } };
                // SAFETY: as above.
                unsafe { contiguous::sum_segment($token, rare, plan, row, segment, sum) }
            }
            $(#[target_feature(enable = $feature)])*
            unsafe fn restore<E: Element>(chunk: &Chunk<E>) {
                // SAFETY: as above.
                unsafe { chunk.restore($token) }
            }
            $(#[target_feature(enable = $feature)])*
            unsafe fn clamped<E: Element>(chunk: &Chunk<E>, c: Reference, dot: u8) -> Sums {
                // SAFETY: as above.
                unsafe { chunk.clamped($token, c, dot) }
            }
            $(#[target_feature(enable = $feature)])*
            unsafe fn redo<E: Element>(chunk: &Chunk<E>, sum: f64) -> (f64, f64) {
                // SAFETY: as above.
                unsafe { chunk.redo($token, sum) }
            }
            $(#[target_feature(enable = $feature)])*
            unsafe fn gradient_segment<E: Element, G: Element>(
                plan: &Plan,
                row: usize,
                segment: usize,
                marks: Marks,
                gradient: &RowGradient,
            ) {
                // SAFETY: as above.
                unsafe {
                    contiguous::gradient_segment::<_, E, G>(
                        $token, plan, row, segment, marks, gradient,
                    )
                }
            }

            fn fence() {
                // SAFETY: a fence is in every x86-64's set; elsewhere the token needs no proof.
                #[allow(unused_unsafe, reason = "the portable token needs no proof")]
                unsafe { $token }.fence();
            }

            const fn table<E: Element, G: Element>() -> Kernels {
                Kernels {
                    rows,
                    anchor: anchor::<E>,
                    sum_segment: sum_segment::<E>,
                    gradient_segment: gradient_segment::<E, G>,
                    fence,
                }
            }

            /// The entry points for logits and gradients of these types, if they go together.
            pub fn kernels(logits: Dtype, gradient: Dtype) -> Option<&'static Kernels> {
                Some(match (logits, gradient) {
                    (Dtype::F32, Dtype::F32) => const { &table::<f32, f32>() },
                    (Dtype::Bf16, Dtype::Bf16) => const { &table::<bf16, bf16>() },
                    (Dtype::Bf16, Dtype::F32) => const { &table::<bf16, f32>() },
                    (Dtype::F16, Dtype::F16) => const { &table::<f16, f16>() },
                    (Dtype::F16, Dtype::F32) => const { &table::<f16, f32>() },
                    _ => return None,
                })
            }
        }
    };
}

entries!(portable_entries, [], Portable);
#[cfg(target_arch = "x86_64")]
entries!(avx2_entries, ["avx2", "fma", "f16c"], crate::simd::avx2::Avx2::assume());
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
