//! The errors of the Rust surface.

use std::fmt;

/// Why a call was refused. A refused call has written nothing.
///
/// The variants are the status codes of the C interface (`XENT_ERR_*`). If several apply, a call
/// reports the first in the order Struct, Null, Dtype, Shape, Stride, Align, Overlap, Param, Target,
/// Memory.
/// `Display` names the operand, the index and the value.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// A required operand is absent.
    Null(String),
    /// A C struct was not built from its initialiser. Only the C interface returns it.
    Struct(String),
    /// The product of the sizes overflows, there are rows without classes, an array has another shape,
    /// or a slice is too short. A slice's length is checked after the strides, on which it depends.
    Shape(String),
    /// A stride is negative or overflows, elements of an output share an address, or the class stride of
    /// the logits is 0 beside a row stride that is not.
    Stride(String),
    /// An operand cannot have its dtype.
    Dtype(String),
    /// The data of an operand is not aligned to its element size.
    Align(String),
    /// An output overlaps another operand.
    Overlap(String),
    /// A target is neither `ignore_index` nor a class.
    Target {
        /// The row, in the order of `[rows, inner]`.
        row: usize,
        /// The place in the row's list of classes, if the targets are sparse.
        place: Option<usize>,
        /// The value.
        value: i64,
        /// The number of classes.
        classes: usize,
    },
    /// An option is out of range or does not go with a layout, the problem cannot have a result that was
    /// asked for, the call would read memory without values, or the processor lacks the instruction set
    /// that was asked for.
    Param(String),
    /// Working memory could not be had.
    Memory {
        /// The bytes that were asked for.
        bytes: usize,
    },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Null(what)
            | Error::Struct(what)
            | Error::Shape(what)
            | Error::Stride(what)
            | Error::Dtype(what)
            | Error::Align(what)
            | Error::Overlap(what)
            | Error::Param(what) => f.write_str(what),
            Error::Target { row, place: None, value, classes } => {
                write!(f, "targets[{row}] = {value} is outside [0, {classes})")
            }
            Error::Target { row, place: Some(place), value, classes } => {
                write!(f, "target_classes[{row}, {place}] = {value} is outside [0, {classes})")
            }
            Error::Memory { bytes } => {
                write!(f, "out of memory: the call needs {bytes} bytes to work in")
            }
        }
    }
}

impl std::error::Error for Error {}
