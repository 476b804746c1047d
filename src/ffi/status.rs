//! The status codes of the C interface.

/// 0 = ok. New versions add codes and remove none. If several apply to one call, it returns the
/// first in the order STRUCT, NULL, DTYPE, SHAPE, STRIDE, ALIGN, OVERLAP, PARAM, TARGET, MEMORY. A call
/// that returns anything but XENT_OK or XENT_ERR_PANIC has written nothing but this thread's
/// xent_last_error.
#[allow(non_camel_case_types, reason = "the name in C")]
pub type xent_status = i32;

/// Done.
pub const XENT_OK: xent_status = 0;
/// A required pointer is NULL.
pub const XENT_ERR_NULL: xent_status = 1;
/// struct_size unset, or unknown flag bits: not built from XENT_PROBLEM_INIT, XENT_RESULTS_INIT,
/// XENT_SHAPE_INIT.
pub const XENT_ERR_STRUCT: xent_status = 2;
/// rows*classes*inner overflows, or there are rows without classes.
pub const XENT_ERR_SHAPE: xent_status = 3;
/// A stride is negative, overflows, or makes elements of an output share an address: an axis of
/// an output must step over the whole span of the axes inside it. Or the class stride of the logits or
/// of an output is 0 beside a row stride that is not: {row, 0, 0} is what C makes of {row}.
pub const XENT_ERR_STRIDE: xent_status = 4;
/// A dtype is unknown, or not allowed for its operand or beside that of another.
pub const XENT_ERR_DTYPE: xent_status = 5;
/// Data is not aligned to its element size.
pub const XENT_ERR_ALIGN: xent_status = 6;
/// An output may overlap another operand, and is not exactly in place. xent compares byte spans,
/// but accepts column blocks of one matrix: equal row strides, disjoint within each row.
pub const XENT_ERR_OVERLAP: xent_status = 7;
/// A target index is neither ignore_index nor in [0, classes).
pub const XENT_ERR_TARGET: xent_status = 8;
/// label_smoothing outside [0, 1]; a negative or infinite normalizer, softcap or z_loss;
/// logit_scale not > 0; an infinite entropy_bonus; an option that is NaN; a result that this problem cannot have; a
/// flag that does not go with the layout of the gradient; an XENT_ISA that names no available instruction set.
pub const XENT_ERR_PARAM: xent_status = 9;
/// An internal bug, caught at the boundary; never expected. Outputs may be half-written.
pub const XENT_ERR_PANIC: xent_status = 10;
/// Working memory could not be had. A call whose threads alone need memory does the work on the
/// calling thread instead.
pub const XENT_ERR_MEMORY: xent_status = 11;
