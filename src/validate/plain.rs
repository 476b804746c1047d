//! Calls over a few rows with two options at most, recognised and checked in a few instructions.
//!
//! The checks of a general call, and its plan, take several times as long as the arithmetic of ten classes.
//! A *plain* call has packed logits, packed class indices, no option but label smoothing and packed f32 class weights,
//! which do not go with f64, and no result but the loss and the gradient. A surface recognises it from what its caller
//! handed over; whatever is not plain, or has a fault, takes the general way, which names the fault.

use crate::codes::*;
use crate::plan::Plain;
use crate::strategy;
use crate::validate::cross_entropy::Problem;
use crate::validate::operand::Operand;
use crate::view::{ElementType, FloatType, IntegerType};

/// Whether strides say that `[rows, classes]` is packed.
#[inline(always)]
pub(crate) fn is_packed(strides: &[i64; 3], classes: usize) -> bool {
    (strides[0] == classes as i64 && strides[1] == 1) || *strides == [0; 3]
}

/// Whether strides say that `[rows]` is packed.
#[inline(always)]
pub(crate) fn is_packed_rows(strides: &[i64; 3]) -> bool {
    strides[0] == 1 || *strides == [0; 3]
}

/// Whether an operand is absent, or may be the class weights of a plain call, by its dtype and strides.
#[inline(always)]
pub(crate) fn may_be_weights(data: *const u8, dtype: u32, strides: &[i64; 3]) -> bool {
    data.is_null() || (dtype == XENT_F32 && (*strides == [0, 1, 0] || *strides == [0; 3]))
}

/// The type of logits that a plain call has.
#[inline(always)]
pub(crate) fn logit_type(dtype: u32) -> Option<FloatType> {
    match dtype {
        XENT_F32 => Some(FloatType::F32),
        XENT_F64 => Some(FloatType::F64),
        XENT_BF16 => Some(FloatType::Bf16),
        XENT_F16 => Some(FloatType::F16),
        _ => None,
    }
}

/// The type of class indices that a plain call has.
#[inline(always)]
pub(crate) fn target_type(dtype: u32) -> Option<IntegerType> {
    match dtype {
        XENT_I64 => Some(IntegerType::I64),
        XENT_I32 => Some(IntegerType::I32),
        _ => None,
    }
}

/// Whether the shape is one of a small call, and all memory is there, aligned, and as far apart as it
/// has to be.
#[inline(always)]
pub(crate) fn is_valid(call: &Plain) -> bool {
    let (rows, classes, size) = (call.rows, call.classes, call.dtype.size());
    if !strategy::is_small(rows, classes, call.dtype.lane_size(), !call.gradient.is_null()) {
        return false;
    }
    let has_options = !call.class_weights.is_null() || call.label_smoothing != 0.0;
    if has_options && call.dtype == FloatType::F64 {
        return false;
    }
    let target = if call.target_type == IntegerType::I64 { 8 } else { 4 };
    let logits = (call.logits as usize, size * rows * classes);
    let targets = (call.targets as usize, target * rows);
    let loss = (call.loss as usize, 8);
    let apart = |a: (usize, usize), b: (usize, usize)| {
        a.0.wrapping_sub(b.0) >= b.1 && b.0.wrapping_sub(a.0) >= a.1
    };
    let is_at = |of: (usize, usize), size: usize| of.0 != 0 && of.0.is_multiple_of(size);
    let mut valid = is_at(logits, size) & is_at(targets, target) & is_at(loss, 8);
    valid &= apart(loss, logits) & apart(loss, targets);
    let weights = (call.class_weights as usize, 4 * classes);
    if weights.0 != 0 {
        valid &= is_at(weights, 4) & apart(loss, weights);
    }
    if !call.gradient.is_null() {
        let gradient = (call.gradient as usize, logits.1);
        valid &= is_at(gradient, size) & call.scale.is_finite();
        valid &= (gradient == logits) | apart(gradient, logits);
        valid &= apart(gradient, targets) & apart(gradient, loss);
        valid &= weights.0 == 0 || apart(gradient, weights);
    }
    valid
}

/// The numbers of a problem that a plain call leaves at their defaults, but for label smoothing.
pub(crate) struct Settings {
    pub flags: u32,
    pub inner: usize,
    pub label_smoothing: f64,
    pub z_loss: f64,
    pub softcap: f64,
    pub logit_scale: f64,
    pub normalizers: [f64; 2],
    pub reduction: u32,
    pub target_count: usize,
    pub target_scale: f64,
    pub entropy_bonus: f64,
}

impl Settings {
    /// Whether they are those of a plain call.
    #[inline(always)]
    pub fn are_plain(&self) -> bool {
        (self.flags == 0)
            & (self.inner == 1)
            & (0.0..=1.0).contains(&self.label_smoothing)
            & (self.z_loss == 0.0)
            & (self.entropy_bonus == 0.0)
            & (self.softcap == 0.0)
            & (self.logit_scale == 1.0)
            & (self.normalizers == [0.0; 2])
            & (self.target_count == 0)
            & (self.target_scale == 0.0)
            & matches!(self.reduction, XENT_MEAN | XENT_SUM)
    }
}

/// The plain call that a problem is, if it is one. The problem has neither logits nor targets yet; of results there is
/// the loss alone. A gradient has the operand of what follows, a factor, and where it goes.
#[inline(always)]
pub(crate) fn recognise(
    problem: &Problem,
    logits: &Operand,
    targets: &Operand,
    loss: *mut f64,
    gradient: Option<(&Operand, f64, &Operand)>,
) -> Option<Plain> {
    // All of them are named: an option to come does not compile until this function knows it.
    let Problem {
        flags,
        rows,
        classes,
        inner,
        logits: _,
        targets: _,
        class_weights,
        row_weights,
        row_mask,
        ignore_index,
        label_smoothing,
        z_loss,
        softcap,
        logit_scale,
        normalizer,
        z_normalizer,
        reduction,
        threads: _,
        target_classes,
        target_count,
        target_scale,
        entropy_bonus,
    } = problem;
    let (rows, classes, reduction) = (*rows, *classes, *reduction);
    let (dtype, target_type) = (logit_type(logits.dtype)?, target_type(targets.dtype)?);
    let absent = |operand: &Operand| operand.data.is_null();
    let is_readable = |operand: &Operand, count: usize| {
        operand.may_be_packed() & !operand.is_uninit & (operand.available >= count)
    };
    let settings = Settings {
        flags: *flags,
        inner: *inner,
        label_smoothing: *label_smoothing,
        z_loss: *z_loss,
        softcap: *softcap,
        logit_scale: *logit_scale,
        normalizers: [*normalizer, *z_normalizer],
        reduction,
        target_count: *target_count,
        target_scale: *target_scale,
        entropy_bonus: *entropy_bonus,
    };
    let plain = settings.are_plain()
        & may_be_weights(class_weights.data, class_weights.dtype, &class_weights.strides)
        & absent(row_weights)
        & absent(row_mask)
        & absent(target_classes)
        & is_packed(&logits.strides, classes)
        & is_packed_rows(&targets.strides)
        & is_readable(logits, rows.saturating_mul(classes))
        & is_readable(targets, rows)
        & (absent(class_weights) || is_readable(class_weights, classes));
    let (mut to, mut scale) = (std::ptr::null_mut(), 1.0);
    if let Some((output, by, gradient)) = gradient {
        let is_plain = absent(output)
            & (gradient.dtype == logits.dtype)
            & is_packed(&gradient.strides, classes)
            & gradient.may_be_packed()
            & (gradient.available >= rows.saturating_mul(classes))
            & !absent(gradient);
        if !is_plain {
            return None;
        }
        (to, scale) = (gradient.data, by);
    }
    plain.then_some(Plain {
        rows,
        classes,
        dtype,
        logits: logits.data,
        targets: targets.data,
        target_type,
        ignore_index: *ignore_index,
        class_weights: class_weights.data,
        label_smoothing: *label_smoothing,
        is_mean: reduction == XENT_MEAN,
        loss,
        gradient: to,
        scale,
    })
}
