//! Calls over a shard of a vocabulary and over merged states: their checks, and the plans made of them.
//!
//! The order of the checks is that of every call. Targets, class weights and smoothing are those of the whole
//! vocabulary, so that targets are checked against all of its classes.

use super::cross_entropy::{
    Denominators, GradientOperands, GradientRequest, Problem, ProblemSlots, ResultSlots, Results,
    TargetSlots, check_gradient_dtype, check_options, padding, reserve_teacher, scan_targets,
    total_weight,
};
use super::operand::{Axes, F64_ONLY, FLOATS, Index, Operand, Presence, Slots, TARGETS, float_of};
use super::{kernels, layout};
use crate::codes::*;
use crate::dispatch::Isa;
use crate::error::Error;
use crate::kernels::Kernels;
use crate::parallel::Team;
use crate::partial::Partial;
use crate::plan::{Loss, Operation, Pass, Plan, Probabilities, Shape, Shard, Targets};
use crate::view::{ElementType, FloatType, IntegerType, View};
use std::mem::offset_of;

/// The place of a shard in its vocabulary, and the states of its rows.
#[derive(Clone, Copy)]
pub(crate) struct Place {
    /// The first class.
    pub offset: usize,
    /// The classes of the vocabulary.
    pub total: usize,
    /// The first state; null for none.
    pub states: *mut Partial,
    /// How many states there are behind it: the length of a slice, `usize::MAX` for a pointer.
    pub available: usize,
}

/// A checked call over a shard.
pub(crate) struct ShardCall {
    pub plan: Plan,
    pub shard: Shard,
    pub kernels: Kernels,
    /// Memory that the plan refers to.
    _memory: Vec<f64>,
}

/// A checked call over merged states.
pub(crate) struct FinishCall {
    pub shape: Shape,
    pub loss: Loss,
    pub shard: Shard,
    pub denominators: Denominators,
}

/// The f64 numbers of a state.
const MEMBERS: usize = size_of::<Partial>() / size_of::<f64>();

/// Classes up to which f64 holds every index.
const MOST_CLASSES: usize = 1 << 53;

impl Place {
    /// Adds the states to the operands of a call: of a backward, which reads them, or of a forward.
    pub fn add(&self, all: &mut Slots, shape: &Shape, is_backward: bool) -> Index {
        let (axes, name) = (Place::axes(shape), Place::name(is_backward));
        match is_backward {
            true => all.input(name, self.operand(), axes, F64_ONLY, Presence::Required),
            false => all.output(name, self.operand(), axes, F64_ONLY, Presence::Required),
        }
    }

    /// What messages call the states.
    pub fn name(is_backward: bool) -> &'static str {
        if is_backward { "merged" } else { "partials" }
    }

    /// Makes a loss that of the shard; its class weights become those of the shard's classes.
    ///
    /// # Safety
    /// The class weights cover all classes, of which the shard's are some, in readable memory.
    pub unsafe fn attach(
        &self,
        all: &Slots,
        states: Index,
        shape: &Shape,
        loss: &mut Loss,
        is_backward: bool,
    ) -> Shard {
        // SAFETY: this function's own # Safety.
        let shard = unsafe { self.shard(all, states, shape, loss) };
        loss.shard = Some(shard);
        loss.lse = Some(shard.states);
        if !is_backward {
            let member = |offset: usize| shard.states.data.wrapping_add(offset);
            let entropy = member(offset_of!(Partial, logit_mean));
            loss.entropy = Some(View { data: entropy, ..shard.states });
            loss.argmax = Some(View {
                data: member(offset_of!(Partial, argmax)),
                dtype: IntegerType::I64,
                strides: shard.states.strides,
            });
        }
        shard
    }

    /// The states as an operand of numbers.
    fn operand(&self) -> Operand {
        Operand::packed(self.states, XENT_F64)
    }

    /// The axes of the states.
    fn axes(shape: &Shape) -> Axes {
        Axes::Elements(shape.rows.saturating_mul(shape.inner).saturating_mul(MEMBERS))
    }

    /// Checks that the shard lies in the vocabulary, and that sizes fit an address space and f64.
    pub fn check_vocabulary(&self, shape: &Shape) -> Result<(), Error> {
        let Place { offset, total, .. } = *self;
        let Shape { rows, classes, inner } = *shape;
        let elements = rows.checked_mul(inner).and_then(|n| {
            let states = n.checked_mul(size_of::<Partial>())?;
            Some(states.max(n.checked_mul(total)?))
        });
        if elements.is_none_or(|n| n > isize::MAX as usize / 16) {
            return Err(Error::Shape(format!(
                "rows*total_classes*inner = {rows}*{total}*{inner} overflows"
            )));
        }
        if total > MOST_CLASSES {
            return Err(Error::Shape(format!("total_classes = {total} exceeds 2^53")));
        }
        if total == 0 && rows * inner > 0 {
            return Err(Error::Shape(format!(
                "total_classes = 0, but there are {} rows",
                rows * inner
            )));
        }
        if offset.checked_add(classes).is_none_or(|end| end > total) {
            return Err(Error::Shape(format!(
                "class_offset + classes = {offset} + {classes} exceeds total_classes = {total}"
            )));
        }
        Ok(())
    }

    /// Checks that there is a state for each row.
    pub fn check_length(&self, name: &str, shape: &Shape) -> Result<(), Error> {
        let rows = shape.distributions();
        if self.available < rows {
            return Err(Error::Shape(format!(
                "{name} has {} states, but there are {rows} rows",
                self.available
            )));
        }
        Ok(())
    }

    /// The shard of a loss, which has the weights of all classes so far.
    ///
    /// # Safety
    /// The class weights cover all classes, of which the shard's are some, in readable memory.
    unsafe fn shard(&self, all: &Slots, states: Index, shape: &Shape, loss: &mut Loss) -> Shard {
        let mut shard = Shard {
            offset: self.offset,
            all_weights: loss.class_weights,
            own_weight: shape.classes as f64,
            states: states_view(all, states, shape),
        };
        if let Some(weights) = &mut loss.class_weights {
            let own = self.offset..self.offset + shape.classes;
            if loss.label_smoothing > 0.0 && matches!(loss.targets, Targets::Indices(_)) {
                // SAFETY: the weights cover all classes (# Safety).
                unsafe {
                    loss.weight_total = total_weight(weights, 0..self.total);
                    shard.own_weight = total_weight(weights, own);
                }
            }
            weights.data = offset_data(weights, self.offset);
        }
        shard
    }
}

/// The first member of the states, `[rows, inner]`.
fn states_view(all: &Slots, states: Index, shape: &Shape) -> View<FloatType> {
    View {
        strides: [(MEMBERS * shape.inner) as isize, 0, MEMBERS as isize],
        ..all.floats(states).unwrap_or(View { dtype: FloatType::F64, ..View::NOTHING })
    }
}

/// The address of class `class` of an operand of one row, which may be the one after the last.
fn offset_data(view: &View<FloatType>, class: usize) -> *mut u8 {
    let offset = class as isize * view.strides[1] * view.dtype.size() as isize;
    view.data.wrapping_offset(offset)
}

/// Refuses what the states of shards cannot have.
pub(super) fn check_partial(problem: &Problem, results: &Results) -> Result<(), Error> {
    let param = |what: &str| Err(Error::Param(what.to_string()));
    if problem.flags & XENT_FLAG_LOG_PROBS != 0 {
        return param("log-probabilities (LOG_PROBS) have no partial states");
    }
    if problem.target_scale > 0.0 && !problem.is_sparse() {
        return param(
            "target_scale makes probabilities of all classes, which a shard does not have; list the classes",
        );
    }
    let kl = (!results.kl.data.is_null()).then_some("kl");
    if let Some(name) = kl.or(results.ranked()) {
        return Err(Error::Param(format!("{name} does not come from merged states")));
    }
    Ok(())
}

/// Checks a call over a shard and makes its plan: a forward, or with a request a backward.
///
/// # Safety
/// The operands are as [`run::partial`](crate::run::partial) asks.
pub(crate) unsafe fn shard(
    problem: &Problem,
    place: &Place,
    request: Option<&GradientRequest>,
    team: &Team,
    isa: Option<Isa>,
) -> Result<ShardCall, Error> {
    use Presence::{Optional, Required};
    let pass = if request.is_some() { Pass::Backward } else { Pass::Forward };
    let accumulate = problem.flags & XENT_FLAG_ACCUMULATE != 0;
    let zeroes_padding = problem.flags & XENT_FLAG_ZERO_PADDING != 0;
    let by_row = problem.reduction == XENT_NONE;
    let shape = Shape { rows: problem.rows, classes: problem.classes, inner: problem.inner };

    let mut slots = Slots::new();
    let all = &mut slots;
    all.allow_no_classes();
    let logits = all.logits(problem.logits);
    let targets = ProblemSlots::add_targets(all, problem, request.is_some());
    let of_problem = ProblemSlots::add_others(all, problem, targets, Axes::Elements(place.total));
    let (mut grad_output, mut gradient) = (None, None);
    if let Some(request) = request {
        let axes = if by_row { Axes::Rows } else { Axes::One };
        grad_output = all.input("grad_output", request.output, axes, FLOATS, Optional);
        gradient = all.output("grad_logits", request.gradient, Axes::Full, FLOATS, Required);
        if zeroes_padding {
            all.fill_padding(gradient);
        }
    }
    let is_backward = request.is_some();
    let states = place.add(all, &shape, is_backward);

    all.check_types(&shape)?;
    let logits_dtype = problem.logits.dtype;
    let grad_dtype = request.map_or(logits_dtype, |request| request.gradient.dtype);
    check_gradient_dtype(grad_dtype, logits_dtype)?;
    place.check_vocabulary(&shape)?;
    let in_place =
        all.check_memory(&shape, |output, other| match (output.name, other.name, accumulate) {
            ("grad_logits", "logits", false) => Ok(()),
            ("grad_logits", "logits", true) => Err("cannot be accumulated in place of"),
            _ => Err("overlaps"),
        })?;
    place.check_length(Place::name(is_backward), &shape)?;
    all.check_initialised(accumulate)?;
    let scale = request.map(|request| request.scale);
    check_options(problem, pass, &Results::NONE, scale, of_problem.are_indices(problem))?;
    check_partial(problem, &Results::NONE)?;
    let padding = match all.floats(gradient) {
        Some(gradient) if zeroes_padding => padding(&shape, &gradient)?,
        _ => 0,
    };
    let kernels = kernels(isa, float_of(logits_dtype), float_of(grad_dtype))?;

    let mut loss = of_problem.loss(all, problem, pass, place.total);
    let whole = Shape { classes: place.total, ..shape };
    // SAFETY: `check_memory` checked that the views cover the problem's shape, and class weights all classes
    // of the vocabulary, in the caller's memory, which is valid for the call (# Safety).
    let scan = unsafe { scan_targets(&kernels, &whole, &loss, team)? };
    // SAFETY: `check_memory` checked that class weights cover all classes of the vocabulary, and
    // `check_vocabulary` that the shard's are among them.
    let shard = unsafe { place.attach(all, states, &shape, &mut loss, is_backward) };
    let logits = all.floats(logits).unwrap_or(View::NOTHING);
    let layout = layout(&shape, &logits, &[], false);
    let mut output = None;
    if let Some((request, view)) = request.zip(all.floats(gradient)) {
        let to = GradientOperands { view, in_place, padding, grad_output: all.floats(grad_output) };
        let denominators = scan.denominators(problem);
        // SAFETY: `check_memory` checked that grad_output has an element for each row under reduction none,
        // and one otherwise.
        let (to, factors) = unsafe { to.output(problem, request, &shape, layout, &denominators) };
        (output, loss.gradient) = (Some(to), Some(factors));
    }
    let _memory = reserve_teacher(&shape, &mut loss)?;
    let plan = Plan { shape, layout, logits, output, operation: Operation::Loss(loss) };
    Ok(ShardCall { plan, shard, kernels, _memory })
}

/// Checks a call that makes results of merged states. It looks at neither logits nor probabilities.
///
/// # Safety
/// The operands are as [`run::partial_finish`](crate::run::partial_finish) asks.
pub(crate) unsafe fn finish(
    problem: &Problem,
    place: &Place,
    results: &Results,
    team: &Team,
    isa: Option<Isa>,
) -> Result<FinishCall, Error> {
    let has_indices = float_of(problem.targets.dtype).is_none();
    // The one axis of classes is that of the class weights.
    let shape = Shape { rows: problem.rows, classes: place.total, inner: problem.inner };
    let mut slots = Slots::new();
    let all = &mut slots;
    all.allow_no_classes();
    let presence = Presence::required_if(results.needs_targets());
    // Those of a shard without classes may be absent.
    let has_probabilities = problem.is_sparse()
        || !has_indices && (!problem.targets.data.is_null() || problem.classes == 0);
    let mut targets = TargetSlots::ABSENT;
    if !has_probabilities {
        targets.targets = all.input("targets", problem.targets, Axes::Rows, TARGETS, presence);
    }
    let of_problem = ProblemSlots::add_others(all, problem, targets, Axes::Elements(place.total));
    let states = Place::axes(&shape);
    let states = all.input("merged", place.operand(), states, F64_ONLY, Presence::Required);
    let of_results = ResultSlots::add(all, results, Pass::Forward, false, place.total);

    all.check_types(&shape)?;
    place.check_vocabulary(&Shape { classes: 0, ..shape })?;
    all.check_memory(&shape, |_, _| Err("overlaps"))?;
    place.check_length("merged", &shape)?;
    all.check_initialised(false)?;
    check_options(problem, Pass::Forward, results, None, of_problem.are_indices(problem))?;
    check_partial(problem, results)?;
    let kernels = kernels(isa, Some(FloatType::F32), Some(FloatType::F32))?;

    let mut loss = of_problem.loss(all, problem, Pass::Forward, place.total);
    if has_probabilities {
        let (values, listed, teacher) = (View::NOTHING, None, None);
        loss.targets = Targets::Probabilities(Probabilities { values, listed, teacher });
        loss.entropy_bonus = problem.entropy_bonus;
    }
    // SAFETY: `check_memory` checked that the views cover the shape in the caller's memory, which is valid
    // for the call (# Safety); probabilities are not looked at.
    let scan = unsafe { scan_targets(&kernels, &shape, &loss, team)? };
    let shard = Shard {
        offset: 0,
        all_weights: None,
        own_weight: 0.0,
        states: states_view(all, states, &shape),
    };
    of_results.set(all, results, &mut loss);
    let denominators = scan.denominators(problem);
    Ok(FinishCall { shape, loss, shard, denominators })
}
