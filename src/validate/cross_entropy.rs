//! Cross-entropy problems as they are handed in, their checks, and the plans made of them.

use super::operand::{
    Axes, BYTES, F64_ONLY, FLOATS, INDICES, Index, LOSSES, Operand, Presence, Slots, TARGETS,
    WORDS, dtype_name, float_of,
};
use super::{kernels, layout};
use crate::codes::*;
use crate::dispatch::Isa;
use crate::error::Error;
use crate::kernels::Kernels;
use crate::kernels::logit_transform::Transform;
use crate::kernels::ranking::MOST_TOP;
use crate::math::compensated::CompensatedSum;
use crate::parallel::{Team, Work};
use crate::plan::{
    GradientFactors, Layout, Listed, Loss, Operation, Output, Pass, Plan, Probabilities, Rankings,
    Shape, Target, Targets, Teacher,
};
use crate::strategy::{self, TARGET_SCAN_ELEMENTS};
use crate::view::{Axis, ElementType, FloatType, Position, View};
use std::ops::Range;

/// An unvalidated problem; the fields are those of `xent_problem`.
#[derive(Clone, Copy)]
pub(crate) struct Problem {
    pub flags: u32,
    pub rows: usize,
    pub classes: usize,
    pub inner: usize,
    pub logits: Operand,
    pub targets: Operand,
    pub class_weights: Operand,
    pub row_weights: Operand,
    pub row_mask: Operand,
    pub ignore_index: i64,
    pub label_smoothing: f64,
    pub z_loss: f64,
    pub softcap: f64,
    pub logit_scale: f64,
    pub normalizer: f64,
    pub z_normalizer: f64,
    pub reduction: u32,
    pub threads: u32,
    pub target_classes: Operand,
    pub target_count: usize,
    pub target_scale: f64,
    pub entropy_bonus: f64,
}

impl Problem {
    /// The targets are probabilities of listed classes.
    #[inline(always)]
    pub fn is_sparse(&self) -> bool {
        !self.target_classes.data.is_null()
    }

    /// The defaults of `XENT_PROBLEM_INIT`.
    pub const INIT: Problem = Problem {
        flags: 0,
        rows: 0,
        classes: 0,
        inner: 1,
        logits: Operand::ABSENT,
        targets: Operand::ABSENT,
        class_weights: Operand::ABSENT,
        row_weights: Operand::ABSENT,
        row_mask: Operand::ABSENT,
        ignore_index: -100,
        label_smoothing: 0.0,
        z_loss: 0.0,
        softcap: 0.0,
        logit_scale: 1.0,
        normalizer: 0.0,
        z_normalizer: 0.0,
        reduction: XENT_MEAN,
        threads: 0,
        target_classes: Operand::ABSENT,
        target_count: 0,
        target_scale: 0.0,
        entropy_bonus: 0.0,
    };
}

/// Where a call writes its results; the fields are those of `xent_results`.
#[derive(Clone, Copy)]
pub(crate) struct Results {
    pub loss: *mut f64,
    pub row_losses: Operand,
    pub lse: Operand,
    pub z_loss: *mut f64,
    pub normalizer: *mut f64,
    pub z_normalizer: *mut f64,
    pub kept_rows: *mut u64,
    pub argmax: Operand,
    pub correct: *mut u64,
    pub entropy: Operand,
    pub kl: Operand,
    pub entropy_bonus: *mut f64,
    pub top_classes: Operand,
    pub top_log_probs: Operand,
    pub top_count: usize,
    pub target_ranks: Operand,
}

impl Results {
    pub const NONE: Results = Results {
        loss: std::ptr::null_mut(),
        row_losses: Operand::ABSENT,
        lse: Operand::ABSENT,
        z_loss: std::ptr::null_mut(),
        normalizer: std::ptr::null_mut(),
        z_normalizer: std::ptr::null_mut(),
        kept_rows: std::ptr::null_mut(),
        argmax: Operand::ABSENT,
        correct: std::ptr::null_mut(),
        entropy: Operand::ABSENT,
        kl: Operand::ABSENT,
        entropy_bonus: std::ptr::null_mut(),
        top_classes: Operand::ABSENT,
        top_log_probs: Operand::ABSENT,
        top_count: 0,
        target_ranks: Operand::ABSENT,
    };

    /// The results include one that does not exist without targets.
    pub fn needs_targets(&self) -> bool {
        !(self.loss.is_null()
            && self.row_losses.data.is_null()
            && self.z_loss.is_null()
            && self.normalizer.is_null()
            && self.z_normalizer.is_null()
            && self.kept_rows.is_null()
            && self.correct.is_null()
            && self.kl.data.is_null()
            && self.entropy_bonus.is_null()
            && self.target_ranks.data.is_null())
    }

    /// One of the results comes from the order of a row's logits: its name.
    pub fn ranked(&self) -> Option<&'static str> {
        let all = [
            ("top_classes", &self.top_classes),
            ("top_log_probs", &self.top_log_probs),
            ("target_ranks", &self.target_ranks),
        ];
        all.into_iter().find(|(_, of)| !of.data.is_null()).map(|(name, _)| name)
    }
}

/// The gradient that a call asks for.
#[derive(Clone, Copy)]
pub(crate) struct GradientRequest {
    /// The gradient of what follows; absent = 1.
    pub output: Operand,
    /// A further factor.
    pub scale: f64,
    /// Where the gradient goes: grad_logits or grad_targets.
    pub gradient: Operand,
}

/// What the checks established.
pub(crate) struct Valid {
    pub plan: Plan,
    pub kernels: Kernels,
    pub denominators: Denominators,
    /// Memory that the plan refers to.
    _memory: Vec<f64>,
}

/// Where the operands of a problem are among the slots, but for its logits.
pub(super) struct ProblemSlots {
    targets: TargetSlots,
    class_weights: Index,
    row_weights: Index,
    row_mask: Index,
}

/// Where the targets are among the slots.
#[derive(Clone, Copy)]
pub(super) struct TargetSlots {
    pub targets: Index,
    classes: Index,
}

impl TargetSlots {
    /// No targets.
    pub const ABSENT: TargetSlots = TargetSlots { targets: None, classes: None };
}

impl ProblemSlots {
    /// Adds the operands; `is_complete` says that the call needs targets.
    #[inline(always)]
    pub fn add(all: &mut Slots, problem: &Problem, is_complete: bool) -> ProblemSlots {
        let targets = ProblemSlots::add_targets(all, problem, is_complete);
        ProblemSlots::add_others(all, problem, targets, Axes::Classes)
    }

    /// Adds the targets.
    #[inline(always)]
    pub fn add_targets(all: &mut Slots, problem: &Problem, is_complete: bool) -> TargetSlots {
        if problem.is_sparse() {
            return ProblemSlots::add_sparse_targets(all, problem, is_complete);
        }
        // `check_types` refuses an unknown dtype, whatever its axes.
        let has_indices = float_of(problem.targets.dtype).is_none();
        let axes = if has_indices { Axes::Rows } else { Axes::Full };
        let presence = Presence::required_if(is_complete);
        let targets = all.input("targets", problem.targets, axes, TARGETS, presence);
        TargetSlots { targets, ..TargetSlots::ABSENT }
    }

    #[cold]
    fn add_sparse_targets(all: &mut Slots, problem: &Problem, is_complete: bool) -> TargetSlots {
        if problem.targets.data.is_null() && !is_complete {
            return TargetSlots::ABSENT;
        }
        let axes = Axes::Listed(problem.target_count);
        let required = Presence::Required;
        TargetSlots {
            targets: all.input("targets", problem.targets, axes, FLOATS, required),
            classes: all.input("target_classes", problem.target_classes, axes, INDICES, required),
        }
    }

    /// Adds the other operands; class weights have the axes `of_classes`.
    #[inline(always)]
    pub fn add_others(
        all: &mut Slots,
        problem: &Problem,
        targets: TargetSlots,
        of_classes: Axes,
    ) -> ProblemSlots {
        use Presence::Optional;
        let (class_weights, row_weights) = (problem.class_weights, problem.row_weights);
        ProblemSlots {
            targets,
            class_weights: all.input("class_weights", class_weights, of_classes, FLOATS, Optional),
            row_weights: all.input("row_weights", row_weights, Axes::Rows, FLOATS, Optional),
            row_mask: all.input("row_mask", problem.row_mask, Axes::Rows, BYTES, Optional),
        }
    }

    /// The targets are there, and class indices.
    #[inline(always)]
    pub fn are_indices(&self, problem: &Problem) -> bool {
        self.targets.targets.is_some() && float_of(problem.targets.dtype).is_none()
    }

    /// The loss of a problem of so many classes whose operands are checked, without results and gradient.
    #[inline(always)]
    pub fn loss(&self, all: &Slots, problem: &Problem, pass: Pass, classes: usize) -> Loss {
        let TargetSlots { targets, classes: of_listed } = self.targets;
        let indices = all.integers(targets).map(Targets::Indices);
        let probabilities = || {
            all.floats(targets).map(|values| {
                let list = |classes| Listed { classes, count: problem.target_count };
                let teacher = (problem.target_scale > 0.0)
                    .then_some(Teacher { scale: problem.target_scale, softmax: View::NOTHING });
                let listed = all.integers(of_listed).map(list);
                Targets::Probabilities(Probabilities { values, listed, teacher })
            })
        };
        let transforms = problem.logit_scale != 1.0 || problem.softcap > 0.0;
        let targets = indices.or_else(probabilities).unwrap_or(Targets::Absent);
        let has_bonus = !matches!(targets, Targets::Absent) && pass != Pass::TargetGradient;
        Loss {
            pass,
            targets,
            class_weights: all.floats(self.class_weights),
            weight_total: classes as f64,
            row_weights: all.floats(self.row_weights),
            row_mask: all.integers(self.row_mask),
            ignore_index: problem.ignore_index,
            label_smoothing: problem.label_smoothing,
            smoothing_share: problem.label_smoothing / classes as f64,
            z_loss: problem.z_loss,
            entropy_bonus: if has_bonus { problem.entropy_bonus } else { 0.0 },
            transform: transforms
                .then_some(Transform { scale: problem.logit_scale, cap: problem.softcap }),
            log_probs: problem.flags & XENT_FLAG_LOG_PROBS != 0,
            lse: None,
            row_losses: None,
            argmax: None,
            entropy: None,
            kl: None,
            counts_correct: false,
            rankings: None,
            gradient: None,
            shard: None,
        }
    }
}

/// Where the results that have a number for each row are among the slots.
pub(super) struct ResultSlots {
    lse: Index,
    row_losses: Index,
    argmax: Index,
    entropy: Index,
    kl: Index,
    top_classes: Index,
    top_log_probs: Index,
    target_ranks: Index,
}

impl ResultSlots {
    /// Adds the results.
    #[inline(always)]
    pub fn add(
        all: &mut Slots,
        results: &Results,
        pass: Pass,
        log_probs: bool,
        classes: usize,
    ) -> ResultSlots {
        use Presence::{Optional, Required};
        let lse = match pass {
            Pass::Backward | Pass::TargetGradient if log_probs => None,
            Pass::Backward | Pass::TargetGradient => {
                all.input("lse", results.lse, Axes::Rows, F64_ONLY, Required)
            }
            _ => all.output("lse", results.lse, Axes::Rows, F64_ONLY, Optional),
        };
        all.scalar("loss", results.loss, F64_ONLY);
        let row_losses = all.output("row_losses", results.row_losses, Axes::Rows, LOSSES, Optional);
        all.scalar("z_loss", results.z_loss, F64_ONLY);
        all.scalar("normalizer", results.normalizer, F64_ONLY);
        all.scalar("z_normalizer", results.z_normalizer, F64_ONLY);
        all.scalar("kept_rows", results.kept_rows, WORDS);
        let argmax = all.output("argmax", results.argmax, Axes::Rows, WORDS, Optional);
        all.scalar("correct", results.correct, WORDS);
        let entropy = all.output("entropy", results.entropy, Axes::Rows, LOSSES, Optional);
        let kl = all.output("kl", results.kl, Axes::Rows, LOSSES, Optional);
        all.scalar("entropy_bonus", results.entropy_bonus, F64_ONLY);
        // `check_options` refuses a count above the classes; until then, sizes stay those of the problem.
        let top = Axes::PerRow(results.top_count.min(classes));
        let top_classes = all.output("top_classes", results.top_classes, top, WORDS, Optional);
        let top_log_probs =
            all.output("top_log_probs", results.top_log_probs, top, LOSSES, Optional);
        let target_ranks =
            all.output("target_ranks", results.target_ranks, Axes::Rows, WORDS, Optional);
        ResultSlots {
            lse,
            row_losses,
            argmax,
            entropy,
            kl,
            top_classes,
            top_log_probs,
            target_ranks,
        }
    }

    /// Gives a loss its results.
    #[inline(always)]
    pub fn set(&self, all: &Slots, results: &Results, loss: &mut Loss) {
        loss.lse = all.floats(self.lse);
        loss.row_losses = all.floats(self.row_losses);
        loss.argmax = all.integers(self.argmax);
        loss.entropy = all.floats(self.entropy);
        loss.kl = all.floats(self.kl);
        loss.counts_correct = !results.correct.is_null();
        loss.rankings = results.ranked().map(|_| {
            let lists = self.top_classes.is_some() || self.top_log_probs.is_some();
            Rankings {
                top_count: if lists { results.top_count } else { 0 },
                top_classes: all.integers(self.top_classes),
                top_log_probs: all.floats(self.top_log_probs),
                target_ranks: all.integers(self.target_ranks),
            }
        });
    }
}

/// What a mean is divided by.
#[derive(Clone, Copy)]
pub(crate) struct Denominators {
    /// That of the cross-entropy part.
    pub normalizer: f64,
    /// That of the z-loss part and of the entropy bonus's.
    pub z_normalizer: f64,
    /// Rows that are not ignored.
    pub kept: u64,
}

/// Checks all targets, finds the denominators of a mean, and adds up the class weights if the loss needs them.
///
/// # Safety
/// The loss's views cover the shape in readable memory.
#[inline(always)]
pub(super) unsafe fn scan(
    kernels: &Kernels,
    shape: &Shape,
    loss: &mut Loss,
    problem: &Problem,
    team: &Team,
) -> Result<Denominators, Error> {
    // SAFETY: this function's own # Safety.
    let scan = unsafe { scan_targets(kernels, shape, loss, team)? };
    if let Some(weights) = loss.class_weights.filter(|_| loss.spreads_smoothing()) {
        // SAFETY: class weights cover all classes (# Safety).
        loss.weight_total = unsafe { total_weight(&weights, 0..shape.classes) };
    }
    Ok(scan.denominators(problem))
}

/// Σ of the weights of some classes.
///
/// # Safety
/// The view covers the classes in readable memory.
pub(super) unsafe fn total_weight(weights: &View<FloatType>, classes: Range<usize>) -> f64 {
    let mut total = CompensatedSum::ZERO;
    for class in classes {
        // SAFETY: the view covers the class (# Safety).
        total.add(unsafe { weights.real(Position::FIRST, class) });
    }
    total.value()
}

/// What the gradient of every row is multiplied by.
///
/// # Safety
/// Without reduction none, `grad_output` has one readable element.
#[inline(always)]
pub(super) unsafe fn gradient_factors(
    problem: &Problem,
    grad_output: Option<View<FloatType>>,
    scale: f64,
    denominators: &Denominators,
) -> GradientFactors {
    let (by_row, is_mean) = (problem.reduction == XENT_NONE, problem.reduction == XENT_MEAN);
    let mut scale = scale;
    if let (Some(view), false) = (&grad_output, by_row) {
        // SAFETY: grad_output has one element (# Safety).
        scale *= unsafe { view.real(Position::FIRST, 0) };
    }
    let Denominators { normalizer, z_normalizer, .. } = denominators;
    GradientFactors {
        grad_output: grad_output.filter(|_| by_row),
        scale: if is_mean { scale / normalizer } else { scale },
        z_scale: if is_mean { scale / z_normalizer } else { scale },
    }
}

/// The operands that a gradient of logits is made with, once they are checked.
pub(super) struct GradientOperands {
    /// Where the gradient goes.
    pub view: View<FloatType>,
    /// It replaces the logits.
    pub in_place: bool,
    /// See [`padding`].
    pub padding: usize,
    /// The gradient of what follows.
    pub grad_output: Option<View<FloatType>>,
}

impl GradientOperands {
    /// The output of the plan, and what every gradient is multiplied by.
    ///
    /// # Safety
    /// As [`gradient_factors`].
    #[inline(always)]
    pub unsafe fn output(
        self,
        problem: &Problem,
        request: &GradientRequest,
        shape: &Shape,
        layout: Layout,
        denominators: &Denominators,
    ) -> (Output, GradientFactors) {
        let GradientOperands { view, in_place, padding, grad_output } = self;
        let accumulate = problem.flags & XENT_FLAG_ACCUMULATE != 0;
        let bytes = shape.distributions() * shape.classes * view.dtype.size();
        let step = match layout {
            Layout::Contiguous => view.strides[1],
            Layout::Strided(axis) => view.stride_along(axis),
        };
        let stream = strategy::streams(in_place, accumulate, step == 1, bytes);
        // SAFETY: this function's own # Safety.
        let factors =
            unsafe { gradient_factors(problem, grad_output, request.scale, denominators) };
        (Output { view, in_place, accumulate, stream, padding }, factors)
    }
}

/// Checks a problem, scans its targets, and makes the plan.
///
/// # Safety
/// The operands are as [`run::cross_entropy`](crate::run::cross_entropy) asks.
pub(crate) unsafe fn validate(
    problem: &Problem,
    pass: Pass,
    results: &Results,
    request: Option<&GradientRequest>,
    team: &Team,
    isa: Option<Isa>,
) -> Result<Valid, Error> {
    use Presence::{Optional, Required};
    let accumulate = problem.flags & XENT_FLAG_ACCUMULATE != 0;
    let zeroes_padding =
        problem.flags & XENT_FLAG_ZERO_PADDING != 0 && pass != Pass::TargetGradient;
    let by_row = problem.reduction == XENT_NONE;
    let log_probs = problem.flags & XENT_FLAG_LOG_PROBS != 0;
    let shape = Shape { rows: problem.rows, classes: problem.classes, inner: problem.inner };

    // The order of the operands is the order in which messages name them: inputs come first.
    let mut slots = Slots::new();
    let all = &mut slots;
    let logits = all.logits(problem.logits);
    let of_problem = ProblemSlots::add(all, problem, request.is_some() || results.needs_targets());
    let (mut grad_output, mut gradient) = (None, None);
    if let Some(request) = request {
        let axes = if by_row { Axes::Rows } else { Axes::One };
        grad_output = all.input("grad_output", request.output, axes, FLOATS, Optional);
        let name = if pass == Pass::TargetGradient { "grad_targets" } else { "grad_logits" };
        gradient = all.output(name, request.gradient, Axes::Full, FLOATS, Required);
        if zeroes_padding {
            all.fill_padding(gradient);
        }
    }
    let of_results = ResultSlots::add(all, results, pass, log_probs, shape.classes);

    all.check_types(&shape)?;
    let logits_dtype = problem.logits.dtype;
    let grad_dtype = match request {
        Some(request) if pass != Pass::TargetGradient => request.gradient.dtype,
        // The gradient of the targets may have any float dtype.
        _ => logits_dtype,
    };
    check_gradient_dtype(grad_dtype, logits_dtype)?;
    let in_place =
        all.check_memory(&shape, |output, other| match (output.name, other.name, accumulate) {
            ("grad_logits", "logits", false) => Ok(()),
            ("grad_logits", "logits", true) => Err("cannot be accumulated in place of"),
            _ => Err("overlaps"),
        })?;
    all.check_initialised(accumulate)?;
    let scale = request.map(|request| request.scale);
    check_options(problem, pass, results, scale, of_problem.are_indices(problem))?;
    let padding = match all.floats(gradient) {
        Some(gradient) if zeroes_padding => padding(&shape, &gradient)?,
        _ => 0,
    };
    let kernels = kernels(isa, float_of(logits_dtype), float_of(grad_dtype))?;

    // A call without rows may leave out the logits, and reads no view.
    let logits = all.floats(logits).unwrap_or(View::NOTHING);
    let mut loss = of_problem.loss(all, problem, pass, shape.classes);
    of_results.set(all, results, &mut loss);
    // SAFETY: `check_memory` checked that the views cover the problem's shape in the caller's memory,
    // which is valid for the call (# Safety).
    let denominators = unsafe { scan(&kernels, &shape, &mut loss, problem, team)? };
    let layout = layout(&shape, &logits, &[], loss.has_ordinary_rows(shape.classes, logits.dtype));
    let mut output = None;
    if let Some((request, view)) = request.zip(all.floats(gradient)) {
        let to = GradientOperands { view, in_place, padding, grad_output: all.floats(grad_output) };
        // SAFETY: `check_memory` checked that grad_output has an element for each row under reduction none,
        // and one otherwise.
        let (to, factors) = unsafe { to.output(problem, request, &shape, layout, &denominators) };
        (output, loss.gradient) = (Some(to), Some(factors));
    }
    let _memory = reserve_teacher(&shape, &mut loss)?;
    let plan = Plan { shape, layout, logits, output, operation: Operation::Loss(loss) };
    Ok(Valid { plan, kernels, denominators, _memory })
}

/// The elements between the classes of a row of a gradient and the next row.
pub(super) fn padding(shape: &Shape, gradient: &View<FloatType>) -> Result<usize, Error> {
    let [row, class, _] = gradient.strides;
    if shape.distributions() == 0 {
        return Ok(0);
    }
    if shape.inner > 1 || (shape.classes > 1 && class != 1) {
        return Err(Error::Param(format!(
            "ZERO_PADDING needs rows of contiguous classes: inner = {} and grad_logits.strides[1] = {class} must be 1",
            shape.inner
        )));
    }
    // `check_memory` checked that rows do not overlap.
    Ok(if shape.rows > 1 { row as usize - shape.classes } else { 0 })
}

/// The gradient of the logits has their dtype; that of halves may also be f32.
pub(super) fn check_gradient_dtype(gradient: u32, logits: u32) -> Result<(), Error> {
    let is_half = matches!(logits, XENT_BF16 | XENT_F16);
    if gradient == logits || (is_half && gradient == XENT_F32) {
        return Ok(());
    }
    let or = if is_half { ", or F32" } else { "" };
    Err(Error::Dtype(format!(
        "grad_logits.dtype is {}; for logits of {} it can be that{or}",
        dtype_name(gradient),
        dtype_name(logits)
    )))
}

/// Checks that the options are in range and that the problem has the results that are asked for.
pub(super) fn check_options(
    problem: &Problem,
    pass: Pass,
    results: &Results,
    scale: Option<f64>,
    has_indices: bool,
) -> Result<(), Error> {
    let param = |what: String| Err(Error::Param(what));
    if !(0.0..=1.0).contains(&problem.label_smoothing) {
        return param(format!("label_smoothing = {} is outside [0, 1]", problem.label_smoothing));
    }
    for (name, value) in [
        ("z_loss", problem.z_loss),
        ("softcap", problem.softcap),
        ("normalizer", problem.normalizer),
        ("z_normalizer", problem.z_normalizer),
    ] {
        if !(value >= 0.0 && value.is_finite()) {
            return param(format!("{name} = {value} is not a finite number >= 0"));
        }
    }
    if !(problem.logit_scale > 0.0 && problem.logit_scale.is_finite()) {
        return param(format!("logit_scale = {} is not a finite number > 0", problem.logit_scale));
    }
    if !problem.entropy_bonus.is_finite() {
        return param(format!("entropy_bonus = {} is not finite", problem.entropy_bonus));
    }
    if let Some(scale) = scale
        && !scale.is_finite()
    {
        return param(format!("grad_scale = {scale} is not finite"));
    }
    match problem.reduction {
        XENT_MEAN | XENT_SUM => {}
        XENT_NONE
            if results.loss.is_null()
                && results.z_loss.is_null()
                && results.entropy_bonus.is_null() => {}
        XENT_NONE => {
            return param("reduction none has no reduced loss; ask for row_losses".to_string());
        }
        other => return param(format!("reduction = {other} is none of mean, sum, none")),
    }
    if problem.flags & XENT_FLAG_LOG_PROBS != 0 {
        let is_forward = !matches!(pass, Pass::Backward | Pass::TargetGradient);
        for (name, asked) in [
            ("z_loss", problem.z_loss != 0.0 || !results.z_loss.is_null()),
            ("softcap", problem.softcap != 0.0),
            ("logit_scale", problem.logit_scale != 1.0),
            ("lse", is_forward && !results.lse.data.is_null()),
            ("entropy", !results.entropy.data.is_null()),
            ("entropy_bonus", problem.entropy_bonus != 0.0 || !results.entropy_bonus.is_null()),
        ] {
            if asked {
                return param(format!("{name} does not go with log-probabilities (LOG_PROBS)"));
            }
        }
    }
    if !results.correct.is_null() && !has_indices && problem.rows * problem.inner > 0 {
        return param("correct needs targets that are class indices".to_string());
    }
    check_rankings(problem, results, has_indices)?;
    if pass == Pass::TargetGradient && has_indices {
        return param("grad_targets needs targets that are probabilities".to_string());
    }
    check_target_options(problem, pass, results, has_indices)
}

/// Checks the options of sparse targets and of teachers, and that the targets have a divergence.
fn check_target_options(
    problem: &Problem,
    pass: Pass,
    results: &Results,
    has_indices: bool,
) -> Result<(), Error> {
    let param = |what: String| Err(Error::Param(what));
    let (count, scale) = (problem.target_count, problem.target_scale);
    let has_rows = problem.rows * problem.inner > 0;
    match (problem.is_sparse(), count) {
        (true, 0) => {
            return param("target_count = 0, but target_classes is given".to_string());
        }
        (false, 1..) if has_rows => {
            return param(format!("target_count = {count}, but target_classes is NULL"));
        }
        _ => {}
    }
    if !(scale >= 0.0 && scale.is_finite()) {
        return param(format!("target_scale = {scale} is not a finite number >= 0"));
    }
    if scale > 0.0 && has_indices {
        return param(format!(
            "target_scale = {scale} needs targets that are the logits of a teacher, not class indices"
        ));
    }
    if pass == Pass::TargetGradient && (problem.is_sparse() || scale > 0.0) {
        return param(
            "grad_targets needs probabilities of all classes, neither sparse nor of a teacher"
                .to_string(),
        );
    }
    if !results.kl.data.is_null() && has_indices && has_rows {
        return param("kl needs targets that are probabilities".to_string());
    }
    Ok(())
}

/// Checks the results that come from the order of a row's logits.
fn check_rankings(problem: &Problem, results: &Results, has_indices: bool) -> Result<(), Error> {
    let param = |what: String| Err(Error::Param(what));
    let Results { top_classes, top_log_probs, top_count, target_ranks, .. } = results;
    let has_rows = problem.rows * problem.inner > 0;
    let lists = [("top_classes", top_classes), ("top_log_probs", top_log_probs)];
    if let Some((name, _)) = lists.iter().find(|(_, of)| !of.data.is_null()) {
        if *top_count == 0 {
            return param(format!("{name} is given, but top_count = 0"));
        }
        if *top_count > MOST_TOP {
            return param(format!("top_count = {top_count} exceeds {MOST_TOP}"));
        }
        if *top_count > problem.classes && has_rows {
            return param(format!("top_count = {top_count} exceeds classes = {}", problem.classes));
        }
    }
    if !target_ranks.data.is_null() && !has_indices && has_rows {
        return param("target_ranks needs targets that are class indices".to_string());
    }
    Ok(())
}

/// What the targets and the weights of some rows contribute to the denominators of a mean.
#[derive(Clone, Copy)]
pub(super) struct Scan {
    /// Rows that are not ignored.
    kept: u64,
    /// Σ r·w_y over kept rows for class indices, Σ r for probabilities.
    weight: CompensatedSum,
    /// Σ r over kept rows.
    row_weight: CompensatedSum,
}

impl Scan {
    const NONE: Scan =
        Scan { kept: 0, weight: CompensatedSum::ZERO, row_weight: CompensatedSum::ZERO };

    /// What a mean is divided by.
    pub fn denominators(&self, problem: &Problem) -> Denominators {
        let given = |x: f64, usual: CompensatedSum| if x > 0.0 { x } else { usual.value() };
        Denominators {
            normalizer: given(problem.normalizer, self.weight),
            z_normalizer: given(problem.z_normalizer, self.row_weight),
            kept: self.kept,
        }
    }

    /// `kept` rows of weight 1.
    fn unweighted(kept: u64) -> Scan {
        let mut scan = Scan { kept, ..Scan::NONE };
        scan.weight.add(kept as f64);
        scan.row_weight.add(kept as f64);
        scan
    }

    /// The rows of another block.
    fn merge(&mut self, other: &Scan) {
        self.kept += other.kept;
        self.weight.merge(other.weight);
        self.row_weight.merge(other.row_weight);
    }
}

/// Checks all targets and adds up the weights of the rows, over the team. Of several targets that are out
/// of range the error names the first.
///
/// # Safety
/// The loss's views cover the shape in readable memory.
pub(super) unsafe fn scan_targets(
    k: &Kernels,
    shape: &Shape,
    loss: &Loss,
    team: &Team,
) -> Result<Scan, Error> {
    let mut scan = Scan::NONE;
    let mut bad = None;
    if !matches!(loss.targets, Targets::Absent) {
        team.for_tasks(
            &Work::rows(shape.distributions(), TARGET_SCAN_ELEMENTS),
            // SAFETY: the rows of a task are the problem's, and the views cover them (# Safety).
            |rows| unsafe { scan_rows(k, shape, loss, rows) },
            |task| match task {
                Ok(task) => scan.merge(&task),
                Err(error) => bad = bad.take().or(Some(error)),
            },
        );
    }
    match bad {
        None => Ok(scan),
        Some(error) => Err(error),
    }
}

/// Checks the targets of a range of rows and adds up the weights of the rows.
///
/// # Safety
/// As [`scan_targets`]; the rows are the problem's.
unsafe fn scan_rows(
    k: &Kernels,
    shape: &Shape,
    loss: &Loss,
    rows: Range<usize>,
) -> Result<Scan, Error> {
    let unweighted =
        loss.row_mask.is_none() && loss.row_weights.is_none() && loss.class_weights.is_none();
    if let Targets::Indices(targets) = &loss.targets
        && unweighted
        && (if shape.inner == 1 {
            targets.strides[0] == 1
        } else {
            targets.stride_along(Axis::Inner) == 1
                && (shape.rows == 1 || targets.strides[0] == shape.inner as isize)
        })
    {
        // SAFETY: the targets of the rows lie side by side, by the strides just looked at; the processor has
        // the set of the kernels.
        let kept = unsafe {
            (k.lanes.count_kept)(targets, rows.start, rows.len(), loss.ignore_index, shape.classes)
        };
        // `None` if a target is out of range: the loop below finds it.
        if let Some(kept) = kept {
            return Ok(Scan::unweighted(kept));
        }
    }
    let mut scan = Scan::NONE;
    for row in rows {
        let at = shape.position(row);
        // SAFETY: the row is the problem's (# Safety), and the class is checked before its weight is read.
        unsafe {
            let weight = match loss.target(at) {
                Target::Class(y) if y >= shape.classes => {
                    let (place, value) = (None, y as i64);
                    return Err(Error::Target { row, place, value, classes: shape.classes });
                }
                Target::Class(y) => loss.class_weight(y),
                Target::Distribution => {
                    check_listed(loss, row, at, shape.classes)?;
                    1.0
                }
                Target::Absent | Target::Ignored => continue,
            };
            let r = loss.row_weight(at);
            scan.kept += 1;
            scan.row_weight.add(r);
            scan.weight.add(if r == 0.0 { 0.0 } else { r * weight });
        }
    }
    Ok(scan)
}

/// Checks the classes of a row of sparse targets.
///
/// # Safety
/// The row is the problem's, which the views cover.
unsafe fn check_listed(loss: &Loss, row: usize, at: Position, classes: usize) -> Result<(), Error> {
    let Targets::Probabilities(Probabilities { listed: Some(listed), .. }) = &loss.targets else {
        return Ok(());
    };
    for place in 0..listed.count {
        // SAFETY: the lists cover the row and its places (# Safety).
        let value = unsafe { listed.classes.integer_at(at, place) };
        let is_class = usize::try_from(value).is_ok_and(|class| class < classes);
        if !is_class && value != loss.ignore_index {
            return Err(Error::Target { row, place: Some(place), value, classes });
        }
    }
    Ok(())
}

/// Reserves memory for what the rows of a teacher need, if the loss has a teacher, which then refers to it.
pub(super) fn reserve_teacher(shape: &Shape, loss: &mut Loss) -> Result<Vec<f64>, Error> {
    let mut memory = Vec::<f64>::new();
    if let Targets::Probabilities(Probabilities { teacher: Some(teacher), .. }) = &mut loss.targets
    {
        let numbers = 2 * shape.distributions();
        let bytes = numbers * size_of::<f64>();
        memory.try_reserve_exact(numbers).map_err(|_| Error::Memory { bytes })?;
        let strides = [2 * shape.inner as isize, 1, 2];
        teacher.softmax = View { data: memory.as_mut_ptr().cast(), dtype: FloatType::F64, strides };
    }
    Ok(memory)
}
