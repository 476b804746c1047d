//! The codes of dtypes, reductions and flags. Both surfaces use the numbers of the C interface.
//!
//! build.rs copies the codes and their comments into include/xent.h.

/// The type of the elements of an operand.
#[allow(non_camel_case_types, reason = "the name in C")]
pub type xent_dtype = u32;

/// float
pub const XENT_F32: xent_dtype = 0;
/// double
pub const XENT_F64: xent_dtype = 1;
/// bfloat16
pub const XENT_BF16: xent_dtype = 2;
/// IEEE half
pub const XENT_F16: xent_dtype = 3;
/// int64_t
pub const XENT_I64: xent_dtype = 16;
/// int32_t
pub const XENT_I32: xent_dtype = 17;
/// uint8_t
pub const XENT_U8: xent_dtype = 18;
/// uint16_t
pub const XENT_U16: xent_dtype = 19;
/// uint32_t
pub const XENT_U32: xent_dtype = 20;

/// How the loss is formed from the row losses.
#[allow(non_camel_case_types, reason = "the name in C")]
pub type xent_reduction = u32;

/// Each part of the loss divided by its denominator, a sum over kept rows: the cross-entropy part by
/// the sum of r*w_y (of r with probability targets), the z-loss part and the entropy bonus by the sum of r.
pub const XENT_MEAN: xent_reduction = 0;
/// The sum of the row losses.
pub const XENT_SUM: xent_reduction = 1;
/// No reduced loss. The gradient is that of each row's own loss.
pub const XENT_NONE: xent_reduction = 2;

/// The logits are log-probabilities, logp_c in the formulas (NLLLoss). xent takes no lse, and the
/// gradient is with respect to logp. xent reads only classes with a target mass, or all classes if
/// argmax is asked for. The options logit_scale, softcap, z_loss and entropy_bonus and the results lse,
/// entropy, z_loss and entropy_bonus are XENT_ERR_PARAM.
pub const XENT_FLAG_LOG_PROBS: u32 = 0x1;
/// A mean over no kept rows is 0 instead of NaN.
pub const XENT_FLAG_EMPTY_IS_ZERO: u32 = 0x2;
/// xent adds the gradient to grad_logits or grad_targets instead of overwriting it. Not in place.
pub const XENT_FLAG_ACCUMULATE: u32 = 0x4;
/// For padded vocabularies: where the row stride of grad_logits exceeds classes, xent sets the elements
/// between the classes of a row and the next row to 0, those of ignored rows and with
/// XENT_FLAG_ACCUMULATE too. Memory after the last row's classes stays as it is: to clear the last row's
/// padding is the caller's part. The elements between count as written, so that no other operand may lie
/// there. It needs inner = 1 and a class stride of 1, else XENT_ERR_PARAM. Calls without grad_logits
/// ignore it.
pub const XENT_FLAG_ZERO_PADDING: u32 = 0x8;

/// xent adds the gradient of the hidden states to what grads.hidden holds, instead of overwriting it.
pub const XENT_LINEAR_ACCUMULATE_HIDDEN: u32 = 0x1;
/// The same of grads.weight.
pub const XENT_LINEAR_ACCUMULATE_WEIGHT: u32 = 0x2;
/// The same of grads.bias.
pub const XENT_LINEAR_ACCUMULATE_BIAS: u32 = 0x4;
