//! The gradient of the loss with respect to probability targets: `r·(1-ε)·w_c·(lse - x_c)` times
//! the scale of the reduction, in f64, rounded once.

use super::Kernels;
use crate::plan::{At, Plan, Target, View};
use std::ops::Range;

/// Classes that are worked on together.
const CLASSES: usize = 256;

/// Writes the gradients of a range of rows.
///
/// # Safety
/// They are the plan's, and no other thread is at them; the processor has what `k` was made for.
pub unsafe fn rows(k: &Kernels, plan: &Plan, range: Range<usize>) {
    for index in range {
        // SAFETY: the caller's promise.
        unsafe { row(k, plan, plan.nth(index)) };
    }
}

/// # Safety
/// See [`rows`].
unsafe fn row(k: &Kernels, plan: &Plan, at: At) {
    let Some(gradient) = &plan.gradient else { return };
    // SAFETY: a row of the plan; so below.
    let (target, r) = unsafe { (plan.target(at), plan.row_weight(at)) };
    let factor = if target == Target::Mass && r != 0.0 {
        let output = match &gradient.output {
            // SAFETY: see above.
            Some(view) => unsafe { view.real(at, 0) },
            None => 1.0,
        };
        gradient.scale * output * r * (1.0 - plan.label_smoothing)
    } else {
        0.0
    };
    if factor == 0.0 && gradient.accumulate {
        return;
    }
    let lse = match &plan.lse {
        // SAFETY: see above.
        Some(view) => unsafe { view.real(at, 0) },
        None => 0.0,
    };
    let (mut values, mut weights) = ([0.0; CLASSES], [1.0; CLASSES]);
    for class in (0..plan.classes).step_by(CLASSES) {
        let len = CLASSES.min(plan.classes - class);
        let (values, weights) = (&mut values[..len], &mut weights[..len]);
        // SAFETY: see above.
        unsafe {
            logits(k, plan, at, class, values);
            if let Some(view) = &plan.class_weights {
                view.reals(At { row: 0, inner: 0 }, class, weights);
            }
        }
        for (x, w) in values.iter_mut().zip(weights) {
            let factor = factor * *w;
            *x = match factor {
                0.0 => 0.0,
                _ if !lse.is_finite() => f64::NAN,
                _ => factor * (lse - *x),
            };
        }
        // SAFETY: see above.
        unsafe { write(&gradient.view, at, class, values, gradient.accumulate) };
    }
}

/// Logits of a row, scaled and capped.
///
/// # Safety
/// See [`rows`]; the row has the classes.
unsafe fn logits(k: &Kernels, plan: &Plan, at: At, class: usize, to: &mut [f64]) {
    // SAFETY: the caller's promise.
    unsafe { plan.logits.reals(at, class, to) };
    let Some(with) = &plan.transform else { return };
    let none = std::ptr::null_mut();
    if !plan.logits.dtype.has_short_lanes() {
        // SAFETY: as many as there are.
        return unsafe { (k.lanes.transform)(to.as_mut_ptr().cast(), to.len(), with, none) };
    }
    let mut short = [0.0f32; CLASSES];
    for (short, x) in short.iter_mut().zip(&*to) {
        *short = *x as f32;
    }
    // SAFETY: no more than there are.
    unsafe { (k.lanes.transform)(short.as_mut_ptr().cast(), to.len(), with, none) };
    for (x, short) in to.iter_mut().zip(short) {
        *x = f64::from(short);
    }
}

/// # Safety
/// The view has the row and the classes, and no other thread is there.
unsafe fn write(view: &View, at: At, class: usize, values: &[f64], accumulate: bool) {
    for (i, &value) in values.iter().enumerate() {
        // SAFETY: the caller's promise.
        unsafe {
            let old = if accumulate { view.real(at, class + i) } else { 0.0 };
            view.set_real(at, class + i, if accumulate { old + value } else { value });
        }
    }
}
