//! The checks that every call passes before a byte is written.
//!
//! The surfaces (ffi, cross_entropy.rs, softmax.rs) hand over descriptors: addresses, dtypes,
//! strides and options. [`cross_entropy::validate`], [`softmax::validate`] and [`shards`] check them and
//! return a plan and the kernels that carry it out. All check in the order of the status codes:
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
pub(crate) mod linear;
pub(crate) mod operand;
pub(crate) mod plain;
pub(crate) mod shards;
pub(crate) mod softmax;

use crate::dispatch::{self, Isa};
use crate::error::Error;
use crate::kernels::Kernels;
use crate::plan::{Layout, Shape};
use crate::strategy;
use crate::view::{Axis, FloatType, View};

/// The kernels for logits and outputs of these dtypes on `isa`, or on the selected instruction
/// set if it is `None`.
fn kernels(
    isa: Option<Isa>,
    logits: Option<FloatType>,
    output: Option<FloatType>,
) -> Result<Kernels, Error> {
    let isa = match isa {
        Some(isa) => isa,
        None => dispatch::selected().map_err(|why| Error::Param(why.to_string()))?,
    };
    let kernels = logits.zip(output).and_then(|(logits, output)| isa.kernels(logits, output));
    kernels.ok_or_else(|| Error::Param(format!("this processor does not have {}", isa.name())))
}

/// Which way the lanes run over operands of this shape; all of them share it. `has_ordinary_rows`: see
/// [`Loss::has_ordinary_rows`](crate::plan::Loss::has_ordinary_rows).
fn layout(
    shape: &Shape,
    logits: &View<FloatType>,
    others: &[Option<View<FloatType>>],
    has_ordinary_rows: bool,
) -> Layout {
    let contiguous = |view: &View<FloatType>| shape.classes <= 1 || view.strides[1] == 1;
    let all = contiguous(logits) && others.iter().flatten().all(contiguous);
    if all && !strategy::is_narrow(shape.classes, logits.dtype.lane_size(), has_ordinary_rows) {
        return Layout::Contiguous;
    }
    let inner = shape.inner > 1 && (shape.rows == 1 || logits.strides[2] <= logits.strides[0]);
    Layout::Strided(if inner { Axis::Inner } else { Axis::Rows })
}
