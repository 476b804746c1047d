//! Calls of softmax and log-softmax, forward and backward, as they are handed in, and their checks.

use super::operand::{Axes, FLOATS, Operand, Presence, Slots, dtype_name, float_of};
use super::{kernels, layout};
use crate::dispatch::Isa;
use crate::drivers::softmax_gradient::SoftmaxGradient;
use crate::error::Error;
use crate::kernels::Kernels;
use crate::plan::{Operation, Output, Plan, Shape, Softmax};

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
    pub shape: Shape,
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
    Backward(SoftmaxGradient),
}

/// Checks a call; `None` if it has no rows.
pub(crate) fn validate(problem: &Problem, isa: Option<Isa>) -> Result<Option<Valid>, Error> {
    let Problem { function, shape, input, grad, output } = *problem;
    let is_backward = function.is_backward();
    let mut slots = Slots::new();
    let names = if is_backward { ["y", "grad_x"] } else { ["x", "y"] };
    let x = slots.input(names[0], input, Axes::Full, FLOATS, Presence::Required);
    let g = is_backward
        .then(|| slots.input("grad_y", grad, Axes::Full, FLOATS, Presence::Required))
        .flatten();
    let y = slots.output(names[1], output, Axes::Full, FLOATS, Presence::Required);
    slots.check_types(&shape)?;
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
    let in_place = slots.check_memory(&shape, |_, _| Ok(()))?;
    slots.check_initialised(false)?;
    let dtype = float_of(input.dtype);
    let kernels = kernels(isa, dtype, dtype)?;
    let (Some(x), Some(y)) = (slots.floats(x), slots.floats(y)) else {
        // Only without rows may a required operand be absent.
        return Ok(None);
    };
    if shape.distributions() == 0 {
        return Ok(None);
    }
    let g = slots.floats(g);
    let layout = layout(&shape, &x, &[Some(y), g], false);
    let forward = |softmax| {
        let output = Output { view: y, in_place, accumulate: false, stream: false, padding: 0 };
        let operation = Operation::Softmax(softmax);
        Work::Forward(Plan { shape, layout, logits: x, output: Some(output), operation })
    };
    let backward =
        |log| g.map(|g| Work::Backward(SoftmaxGradient { shape, layout, log, y: x, g, to: y }));
    let work = match function {
        Function::Softmax => Some(forward(Softmax::Probabilities)),
        Function::LogSoftmax => Some(forward(Softmax::LogProbabilities)),
        Function::SoftmaxBackward => backward(false),
        Function::LogSoftmaxBackward => backward(true),
    };
    Ok(work.map(|work| Valid { work, kernels }))
}
