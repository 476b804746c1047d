//! Linear layers whose outputs are the logits of a cross-entropy: their checks, and the plans made of them.

use super::cross_entropy::{
    Denominators, Problem, ProblemSlots, ResultSlots, Results, check_options, gradient_factors,
    reserve_teacher, scan,
};
use super::kernels;
use super::operand::{Axes, FLOATS, Index, Operand, Presence, Slots, dtype_name, float_of};
use super::shards::{Place, check_partial};
use crate::codes::*;
use crate::dispatch::{self, Isa};
use crate::error::Error;
use crate::kernels::{Kernels, ProductKernels};
use crate::parallel::Team;
use crate::plan::{Layout, Linear, LinearGradient, Loss, Operation, Output, Pass, Plan, Shape};
use crate::view::{FloatType, View};

/// An unvalidated layer; the fields are those of `xent_linear`.
#[derive(Clone, Copy)]
pub(crate) struct Layer {
    pub flags: u32,
    pub features: usize,
    pub hidden: Operand,
    pub weight: Operand,
    pub bias: Operand,
    pub workspace: usize,
}

impl Layer {
    /// The defaults of `XENT_LINEAR_INIT`.
    pub const INIT: Layer = Layer {
        flags: 0,
        features: 0,
        hidden: Operand::ABSENT,
        weight: Operand::ABSENT,
        bias: Operand::ABSENT,
        workspace: 0,
    };
}

/// The gradients that a call asks for.
#[derive(Clone, Copy)]
pub(crate) struct Request {
    /// The gradient of what follows; absent = 1.
    pub output: Operand,
    /// A further factor.
    pub scale: f64,
    /// Where the gradients go; an absent one is not computed.
    pub hidden: Operand,
    pub weight: Operand,
    pub bias: Operand,
}

/// What the checks established.
pub(crate) struct Valid {
    pub plan: Plan,
    pub linear: Linear,
    pub kernels: Kernels,
    pub products: &'static ProductKernels,
    pub denominators: Denominators,
    /// Memory that the loss refers to.
    _memory: Vec<f64>,
}

impl Valid {
    /// The loss that the plan is of.
    pub fn loss(&self) -> &Loss {
        self.plan.loss().expect("a linear layer has a loss")
    }
}

/// Checks a problem and its layer, scans the targets, and makes the plan; `shard` is the place of the problem's
/// classes in their vocabulary, if they are some of it.
///
/// # Safety
/// The operands are as [`run::linear`](crate::run::linear) asks.
#[allow(clippy::too_many_arguments, reason = "each is a struct of the surfaces")]
pub(crate) unsafe fn validate(
    problem: &Problem,
    layer: &Layer,
    pass: Pass,
    results: &Results,
    request: Option<&Request>,
    shard: Option<&Place>,
    team: &Team,
    isa: Option<Isa>,
) -> Result<Valid, Error> {
    use Presence::{Optional, Required};
    let shape = Shape { rows: problem.rows, classes: problem.classes, inner: problem.inner };
    let features = layer.features;
    let mut slots = Slots::new();
    let all = &mut slots;
    let of_rows = Axes::RowFeatures(features);
    let of_classes = Axes::ClassFeatures(features);
    let hidden = all.input("hidden", layer.hidden, of_rows, FLOATS, Required);
    let weight = all.input("weight", layer.weight, of_classes, FLOATS, Required);
    let bias = all.input("bias", layer.bias, Axes::Classes, FLOATS, Optional);
    let is_complete = request.is_some() || results.needs_targets();
    let of_problem = match shard {
        None => ProblemSlots::add(all, problem, is_complete),
        Some(place) => {
            all.allow_no_classes();
            let targets = ProblemSlots::add_targets(all, problem, is_complete);
            ProblemSlots::add_others(all, problem, targets, Axes::Elements(place.total))
        }
    };
    let mut grad_output = None;
    let mut gradients: [Index; 3] = [None; 3];
    if let Some(request) = request {
        let axes = if problem.reduction == XENT_NONE { Axes::Rows } else { Axes::One };
        grad_output = all.input("grad_output", request.output, axes, FLOATS, Optional);
        gradients = [
            all.output("grads.hidden", request.hidden, of_rows, FLOATS, Optional),
            all.output("grads.weight", request.weight, of_classes, FLOATS, Optional),
            all.output("grads.bias", request.bias, Axes::Classes, FLOATS, Optional),
        ];
    }
    let states = shard.and_then(|place| place.add(all, &shape, request.is_some()));
    let of_results = match shard {
        None => Some(ResultSlots::add(all, results, pass, false, shape.classes)),
        Some(_) => None,
    };

    all.check_types(&shape)?;
    let dtype = layer.hidden.dtype;
    if layer.weight.dtype != dtype {
        return Err(Error::Dtype(format!(
            "weight.dtype is {}; beside hidden states of {} it can be that",
            dtype_name(layer.weight.dtype),
            dtype_name(dtype)
        )));
    }
    for (name, operand, index) in [
        ("hidden", request.map(|request| request.hidden), gradients[0]),
        ("weight", request.map(|request| request.weight), gradients[1]),
    ] {
        if let (Some(operand), Some(_)) = (operand, index)
            && operand.dtype != dtype
            && operand.dtype != XENT_F32
        {
            return Err(Error::Dtype(format!(
                "grads.{name}.dtype is {}; for operands of {} it can be that, or F32",
                dtype_name(operand.dtype),
                dtype_name(dtype)
            )));
        }
    }
    check_shape(problem, &shape, features)?;
    if let Some(place) = shard {
        place.check_vocabulary(&shape)?;
    }
    all.check_memory(&shape, |_, _| Err("overlaps"))?;
    if let Some(place) = shard {
        place.check_length(Place::name(request.is_some()), &shape)?;
    }
    for (index, flag) in gradients.into_iter().zip(ACCUMULATES) {
        all.check_output_initialised(index, layer.flags & flag != 0)?;
    }
    let scale = request.map(|request| request.scale);
    check_options(problem, pass, results, scale, of_problem.are_indices(problem))?;
    if shard.is_some() {
        check_partial(problem, results)?;
    }
    for (name, flag) in [
        ("LOG_PROBS", XENT_FLAG_LOG_PROBS),
        ("ACCUMULATE", XENT_FLAG_ACCUMULATE),
        ("ZERO_PADDING", XENT_FLAG_ZERO_PADDING),
    ] {
        if problem.flags & flag != 0 {
            return Err(Error::Param(format!("{name} does not go with a linear layer")));
        }
    }
    let element = float_of(dtype);
    let lanes =
        element.map(|dtype| if dtype.has_f32_lanes() { FloatType::F32 } else { FloatType::F64 });
    let kernels = kernels(isa, lanes, lanes)?;
    let isa =
        isa.map_or_else(dispatch::selected, Ok).map_err(|why| Error::Param(why.to_string()))?;
    let products = element
        .and_then(|dtype| isa.product_kernels(dtype))
        .ok_or_else(|| Error::Param(format!("this processor does not have {}", isa.name())))?;
    let dtype = lanes.unwrap_or(FloatType::F32);

    let whole = Shape { classes: shard.map_or(shape.classes, |place| place.total), ..shape };
    let mut loss = of_problem.loss(all, problem, pass, whole.classes);
    if let Some(of_results) = of_results {
        of_results.set(all, results, &mut loss);
    }
    // SAFETY: `check_memory` checked that the views cover the problem's shape, and class weights all classes of the
    // vocabulary, in the caller's memory, which is valid for the call (# Safety).
    let denominators = unsafe { scan(&kernels, &whole, &mut loss, problem, team)? };
    if let Some(place) = shard {
        // SAFETY: `check_memory` checked that the views cover the problem's shape, and `check_vocabulary` that the
        // shard's classes are among those of the vocabulary.
        unsafe { place.attach(all, states, &shape, &mut loss, request.is_some()) };
    }
    // The logits and their gradient are never stored.
    let logits = View { data: std::ptr::null_mut(), dtype, strides: [0, 1, 0] };
    let mut output = None;
    if let Some(request) = request {
        output = Some(Output {
            view: logits,
            in_place: false,
            accumulate: false,
            stream: false,
            padding: 0,
        });
        let grad_output = all.floats(grad_output);
        // SAFETY: without reduction none, `check_memory` has checked that grad_output has one element.
        loss.gradient =
            Some(unsafe { gradient_factors(problem, grad_output, request.scale, &denominators) });
    }
    let nothing = View { dtype: element.unwrap_or(dtype), strides: [0; 3], ..logits };
    let gradient = |index: usize| {
        let accumulate = layer.flags & ACCUMULATES[index] != 0;
        all.floats(gradients[index]).map(|view| LinearGradient { view, accumulate })
    };
    let linear = Linear {
        features,
        // A call without rows may leave them out, and reads no view.
        hidden: all.floats(hidden).unwrap_or(nothing),
        weight: all.floats(weight).unwrap_or(nothing),
        bias: all.floats(bias),
        hidden_gradient: gradient(0),
        weight_gradient: gradient(1),
        bias_gradient: gradient(2),
        workspace: layer.workspace,
    };
    let _memory = reserve_teacher(&shape, &mut loss)?;
    let operation = Operation::Loss(loss);
    let plan = Plan { shape, layout: Layout::Contiguous, logits, output, operation };
    Ok(Valid { plan, linear, kernels, products, denominators, _memory })
}

/// The flags that accumulate the gradients, in their order.
const ACCUMULATES: [u32; 3] =
    [XENT_LINEAR_ACCUMULATE_HIDDEN, XENT_LINEAR_ACCUMULATE_WEIGHT, XENT_LINEAR_ACCUMULATE_BIAS];

/// Checks what only linear layers ask of the sizes.
fn check_shape(problem: &Problem, shape: &Shape, features: usize) -> Result<(), Error> {
    let fault = |what: String| Err(Error::Shape(what));
    if !problem.logits.data.is_null() {
        return fault("logits is given, but a linear layer makes the logits".to_string());
    }
    if shape.inner != 1 {
        return fault(format!("inner = {}; with a linear layer it must be 1", shape.inner));
    }
    for (name, count) in [("rows", shape.rows), ("classes", shape.classes)] {
        if count.checked_mul(features).is_none_or(|n| n > isize::MAX as usize / 16) {
            return fault(format!("{name}*features = {count}*{features} overflows"));
        }
    }
    if features == 0 && shape.rows > 0 {
        return fault(format!("features = 0, but there are {} rows", shape.rows));
    }
    Ok(())
}
