//! The checks that every call passes before a byte is written.
//!
//! The surfaces (ffi, cross_entropy.rs, softmax.rs) hand over descriptors: addresses, dtypes,
//! strides and options. [`cross_entropy::validate`] and [`softmax::validate`] check them and return
//! a plan and the kernels that carry it out. Both check in the order of the status codes:
//!
//! 1. A required operand is absent: [`Error::Null`].
//! 2. An operand has a dtype that it cannot have: [`Error::Dtype`].
//! 3. The sizes overflow or leave rows without classes: [`Error::Shape`]. Then the strides,
//!    operand by operand: [`Error::Stride`]. Then slices that are too short: [`Error::Shape`].
//! 4. An operand is not aligned to its elements: [`Error::Align`].
//! 5. An output overlaps another operand: [`Error::Overlap`].
//! 6. An option is out of range, or the processor lacks the instruction set: [`Error::Param`].
//! 7. A target is neither a class nor `ignore_index`: [`Error::Target`].
//!
//! [`Error::Struct`] comes before all of them, and the C surface reports it.

pub(crate) mod cross_entropy;
pub(crate) mod operand;
pub(crate) mod softmax;

use crate::dispatch::{self, Isa};
use crate::error::Error;
use crate::kernels::Kernels;
use crate::plan::{Dtype, Layout, View};
use operand::Sizes;

/// The kernels for logits and gradients of these dtypes on `isa`, or on the selected instruction
/// set if it is `None`.
fn kernels(
    isa: Option<Isa>,
    logits: Option<Dtype>,
    gradient: Option<Dtype>,
) -> Result<Kernels, Error> {
    let isa = match isa {
        Some(isa) => isa,
        None => dispatch::selected().map_err(|why| Error::Param(why.to_string()))?,
    };
    let kernels = logits.zip(gradient).and_then(|(logits, gradient)| isa.kernels(logits, gradient));
    kernels.ok_or_else(|| Error::Param(format!("this processor does not have {}", isa.name())))
}

/// Up to this many bytes of classes, in the lanes' type, lanes run along rows even where classes
/// are contiguous: the work that a row needs once is then done for many rows at once. The limit is
/// 128 classes, or 64 of f64. Near it both ways cost the same (docs/performance.md).
const NARROW: usize = 512;

/// How the kernels go over operands `[rows, classes, inner]` of those strides.
fn layout(sizes: &Sizes, logits: &View, others: &[Option<View>]) -> Layout {
    let contiguous = |view: &View| sizes.classes <= 1 || view.strides[1] == 1;
    let all = contiguous(logits) && others.iter().flatten().all(contiguous);
    let lane = if logits.dtype.has_short_lanes() { 4 } else { 8 };
    if all && sizes.classes > NARROW / lane {
        return Layout::Classes;
    }
    let inner = sizes.inner > 1 && (sizes.rows == 1 || logits.strides[2] <= logits.strides[0]);
    Layout::Positions { axis: if inner { 2 } else { 0 } }
}
