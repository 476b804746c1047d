//! Softmax and log-softmax, forward and backward: what is handed in, and its validation.

use crate::dispatch;
use crate::dispatch::Isa;
use crate::error::Error;
use crate::kernels::softmax_gradient::{self as kernels, Backward};
use crate::math::exp2::Base;
use crate::parallel::{self, Team, for_blocks};
use crate::plan::{Gradient, Layout, Pass, Plan, TILE, Targets};
use crate::problem::{Axes, FLOATS, Operand, Sizes, Slots, dtype_name, dtype_of, layout};

/// Which of the four.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Function {
    LogSoftmax,
    LogSoftmaxBackward,
    Softmax,
    SoftmaxBackward,
}

/// Checks and computes: `input` is x, or y in a backward; `grad` is grad_y, absent in a forward;
/// `output` is y, or grad_x.
///
/// # Safety
/// As [`problem::run`](crate::problem::run).
pub(crate) unsafe fn run(
    function: Function,
    sizes: &Sizes,
    input: Operand,
    grad: Operand,
    output: Operand,
    team: &Team,
    isa: Option<Isa>,
) -> Result<(), Error> {
    parallel::fork::watch();
    let is_backward = matches!(function, Function::LogSoftmaxBackward | Function::SoftmaxBackward);
    let mut slots = Slots::new();
    let names = if is_backward { ["y", "grad_x"] } else { ["x", "y"] };
    let x = slots.input(names[0], input, Axes::Full, FLOATS, true);
    let g = is_backward.then(|| slots.input("grad_y", grad, Axes::Full, FLOATS, true)).flatten();
    let y = slots.output(names[1], output, Axes::Full, FLOATS, true);
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
    let isa = match isa {
        Some(isa) => isa,
        None => dispatch::selected().map_err(|why| Error::Param(why.to_string()))?,
    };
    let Some(k) = dtype_of(input.dtype).and_then(|dtype| isa.kernels(dtype, dtype)) else {
        return Err(Error::Param(format!("this processor does not have {}", isa.name())));
    };
    let (Some(x), Some(y)) = (slots.view(x), slots.view(y)) else {
        // There are no rows.
        return Ok(());
    };
    if sizes.rows * sizes.inner == 0 {
        return Ok(());
    }
    let g = slots.view(g);
    let layout = layout(sizes, &x, &[Some(y), g]);
    if let Some(g) = g {
        let sizes = [sizes.rows, sizes.classes, sizes.inner];
        let log = function == Function::LogSoftmaxBackward;
        let backward = Backward { sizes, layout, log, y: x, g, to: y };
        let positions = if layout == Layout::Classes { 1 } else { TILE };
        for_blocks(
            team,
            kernels::count(&backward),
            [positions.saturating_mul(sizes[1]), sizes.iter().product()],
            // SAFETY: blocks of the problem, each in one thread's hands; the kernels were handed
            // out by `Isa::kernels`.
            |range| unsafe { kernels::run(&k, &backward, range) },
            |()| (),
        );
        return Ok(());
    }
    let plan = Plan {
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
    };
    parallel::run(&plan, &k, team);
    Ok(())
}
