//! Calls of softmax and log-softmax, forward and backward, as they are handed in, and their checks.

use super::operand::{Axes, FLOATS, Operand, Presence, Sizes, Slots, dtype_name, dtype_of};
use super::{kernels, layout};
use crate::dispatch::Isa;
use crate::error::Error;
use crate::kernels::Kernels;
use crate::kernels::softmax_gradient::Backward;
use crate::math::exp2::Base;
use crate::plan::{Gradient, Pass, Plan, Targets};

/// Which of the four functions a call computes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Function {
    LogSoftmax,
    LogSoftmaxBackward,
    Softmax,
    SoftmaxBackward,
}

impl Function {
    fn is_backward(self) -> bool {
        match self {
            Function::LogSoftmax | Function::Softmax => false,
            Function::LogSoftmaxBackward | Function::SoftmaxBackward => true,
        }
    }
}

/// An unvalidated call.
#[derive(Clone, Copy)]
pub(crate) struct Problem {
    pub function: Function,
    pub sizes: Sizes,
    /// x, or y in a backward.
    pub input: Operand,
    /// grad_y; absent in a forward.
    pub grad: Operand,
    /// y, or grad_x in a backward.
    pub output: Operand,
}

/// What the checks established.
pub(crate) struct Valid {
    pub work: Work,
    pub kernels: Kernels,
}

/// The validated call.
#[allow(clippy::large_enum_variant, reason = "a call has one, on the stack; a box would allocate")]
pub(crate) enum Work {
    Forward(Plan),
    Backward(Backward),
}

/// Checks a call; `None` if it has no rows.
pub(crate) fn validate(problem: &Problem, isa: Option<Isa>) -> Result<Option<Valid>, Error> {
    let Problem { function, ref sizes, input, grad, output } = *problem;
    let is_backward = function.is_backward();
    let mut slots = Slots::new();
    let names = if is_backward { ["y", "grad_x"] } else { ["x", "y"] };
    let x = slots.input(names[0], input, Axes::Full, FLOATS, Presence::Required);
    let g = is_backward
        .then(|| slots.input("grad_y", grad, Axes::Full, FLOATS, Presence::Required))
        .flatten();
    let y = slots.output(names[1], output, Axes::Full, FLOATS, Presence::Required);
    slots.check_types(sizes)?;
    for (name, operand) in [("grad_y", &grad), (names[1], &output)] {
        let used = name != "grad_y" || is_backward;
        if used && operand.dtype != input.dtype {
            return Err(Error::Dtype(format!(
                "{name}.dtype is {}, but {}.dtype is {}",
                dtype_name(operand.dtype),
                names[0],
                dtype_name(input.dtype)
            )));
        }
    }
    let in_place = slots.check_memory(sizes, |_, _| Ok(()))?;
    let dtype = dtype_of(input.dtype);
    let kernels = kernels(isa, dtype, dtype)?;
    let (Some(x), Some(y)) = (slots.view(x), slots.view(y)) else {
        // Only without rows may a required operand be absent.
        return Ok(None);
    };
    if sizes.rows * sizes.inner == 0 {
        return Ok(None);
    }
    let g = slots.view(g);
    let layout = layout(sizes, &x, &[Some(y), g]);
    let work = match g {
        Some(g) => Work::Backward(Backward {
            sizes: [sizes.rows, sizes.classes, sizes.inner],
            layout,
            log: function == Function::LogSoftmaxBackward,
            y: x,
            g,
            to: y,
        }),
        None => Work::Forward(Plan {
            pass: if function == Function::Softmax { Pass::Softmax } else { Pass::LogSoftmax },
            rows: sizes.rows,
            classes: sizes.classes,
            inner: sizes.inner,
            layout,
            logits: x,
            targets: Targets::Absent,
            class_weights: None,
            weight_total: 0.0,
            row_weights: None,
            row_mask: None,
            ignore_index: 0,
            label_smoothing: 0.0,
            z_loss: 0.0,
            transform: None,
            log_probs: false,
            l: if x.dtype.has_short_lanes() { f64::from(f32::L) } else { f64::L },
            row_losses: None,
            lse: None,
            argmax: None,
            correct: false,
            entropy: None,
            gradient: Some(Gradient {
                view: y,
                in_place,
                accumulate: false,
                stream: false,
                output: None,
                scale: 1.0,
                z_scale: 0.0,
            }),
        }),
    };
    Ok(Some(Valid { work, kernels }))
}
