//! What can be wrong with a call.

use std::fmt;

/// Why a call was refused. Nothing was written.
///
/// The variants are those of the C interface's status codes (`XENT_ERR_*`); where several apply,
/// the first in the order Struct, Null, Dtype, Shape, Stride, Align, Overlap, Param, Target is
/// reported. `Display` names the operand, the index and the value.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// A required operand is absent.
    Null(String),
    /// A C struct that was not built from its initialiser; cannot come from Rust.
    Struct(String),
    /// A size is out of range, the product of the sizes overflows, or a slice is too short (which
    /// depends on the strides, and so comes after them).
    Shape(String),
    /// A stride is negative or overflows, or elements of an output share an address.
    Stride(String),
    /// The operand cannot have this dtype.
    Dtype(String),
    /// Data is not aligned to its elements.
    Align(String),
    /// An output overlaps another operand.
    Overlap(String),
    /// A target is neither `ignore_index` nor a class.
    Target {
        /// Its row.
        row: usize,
        /// What it is.
        value: i64,
        /// The number of classes.
        classes: usize,
    },
    /// An option is out of range, or a result was asked for that this problem cannot have.
    Param(String),
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
            Error::Target { row, value, classes } => {
                write!(f, "targets[{row}] = {value} is outside [0, {classes})")
            }
        }
    }
}

impl std::error::Error for Error {}
