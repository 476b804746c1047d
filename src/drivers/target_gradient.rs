//! The gradient of the loss with respect to probability targets: `r·(1-ε)·w_c·(lse - x_c)` times the
//! reduction's factor, in f64, rounded once.

use super::call::Call;
use super::operands;
use crate::plan::{Loss, Output, Target};
use crate::strategy::CONVERTED as CLASSES;
use crate::view::Position;
use std::ops::Range;

/// Writes the gradients of a range of rows.
///
/// # Safety
/// The rows are the call's, which computes this gradient, and no other thread accesses them.
pub unsafe fn rows(call: &Call, loss: &Loss, range: Range<usize>) {
    let Some(output) = &call.plan.output else { return };
    for index in range {
        // SAFETY: the row is the call's, and this thread's (# Safety).
        unsafe { row(call, loss, output, call.plan.shape.position(index)) };
    }
}

/// # Safety
/// As [`rows`].
unsafe fn row(call: &Call, loss: &Loss, output: &Output, at: Position) {
    // SAFETY: the row is the call's (# Safety).
    let (target, r) = unsafe { (loss.target(at), loss.row_weight(at)) };
    let factor = match &loss.gradient {
        Some(gradient) if target == Target::Distribution && r != 0.0 => {
            let grad_output = match &gradient.grad_output {
                // SAFETY: grad_output covers all rows of the plan (validation).
                Some(view) => unsafe { view.real(at, 0) },
                None => 1.0,
            };
            gradient.scale * grad_output * r * (1.0 - loss.label_smoothing)
        }
        _ => 0.0,
    };
    if factor == 0.0 && output.accumulate {
        return;
    }
    let lse = match &loss.lse {
        // SAFETY: the lse covers all rows of the plan (validation).
        Some(view) => unsafe { view.real(at, 0) },
        None => 0.0,
    };
    let (mut values, mut weights) = ([0.0; CLASSES], [1.0; CLASSES]);
    let classes = call.plan.shape.classes;
    for class in (0..classes).step_by(CLASSES) {
        let len = CLASSES.min(classes - class);
        let (values, weights) = (&mut values[..len], &mut weights[..len]);
        // SAFETY: logits and class weights cover the classes of the row (validation).
        unsafe {
            call.plan.logits.read_row(at, class, values);
            if let Some(view) = &loss.class_weights {
                view.read_row(Position::FIRST, class, weights);
            }
        }
        if let Some(with) = &loss.transform {
            operands::transform::<CLASSES>(call, with, values, None);
        }
        for (x, w) in values.iter_mut().zip(weights) {
            let factor = factor * *w;
            *x = match factor {
                0.0 => 0.0,
                _ if !lse.is_finite() => f64::NAN,
                _ => factor * (lse - *x),
            };
        }
        for (i, &value) in values.iter().enumerate() {
            // SAFETY: the output covers the class of the row (validation), this thread's (# Safety).
            unsafe {
                let old = if output.accumulate { output.view.real(at, class + i) } else { 0.0 };
                let new = if output.accumulate { old + value } else { value };
                output.view.set_real(at, class + i, new);
            }
        }
    }
}
