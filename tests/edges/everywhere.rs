//! Runs one problem in every dtype and layout, on every instruction set, by every call that it allows,
//! and compares the results with the oracle and with each other.
//!
//! The bounds are loose: they tell right from wrong. tests/properties.rs and tests/golden.rs measure
//! accuracy. Kinds (0, infinite, NaN) are exact: where the oracle has no term at all, a result must be
//! 0.

use common::operand::{Dtype, Operand};
use common::reference::{self, Case, Outcome, Reduction, Targets};
use common::task::Task;
use common::{is_sampled, isas};
use std::fmt::Debug;
use xent::half::{bf16, f16};
use xent::{CrossEntropy, Input, Isa, Number, Output, Results};

/// A dtype of logits.
pub trait Float: Number + PartialEq + Debug {
    const NAME: &'static str;
    /// Kernels compute in f64.
    const WIDE: bool;
    /// Half an ulp of 1, and the smallest positive number.
    const HALF_ULP: f64;
    const LEAST: f64;
    fn of(x: f64) -> Self;
    fn get(self) -> f64;
}

macro_rules! floats {
    ($($type:ident, $wide:expr, $digits:expr, $least:expr, $of:expr, $get:expr;)*) => {$(
        impl Float for $type {
            const NAME: &'static str = stringify!($type);
            const WIDE: bool = $wide;
            const HALF_ULP: f64 = 1.0 / (1u64 << $digits) as f64;
            const LEAST: f64 = $least;
            fn of(x: f64) -> $type {
                $of(x)
            }
            fn get(self) -> f64 {
                $get(self)
            }
        }
    )*};
}
floats! {
    f32, false, 24, 1.5e-45, |x| x as f32, f64::from;
    f64, true, 53, 5e-324, |x| x, |x| x;
    bf16, false, 8, 1e-40, |x| bf16::from_f32(x as f32), bf16::to_f64;
    f16, false, 11, 6e-8, |x| f16::from_f32(x as f32), f16::to_f64;
}

/// The layout of the rows of a case.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Layout {
    /// One after the other, classes contiguous.
    Rows,
    /// The rows are the inner positions of one row: `[1, C, N]`.
    Positions,
    /// Gaps of two elements between classes, and of a few between rows.
    Spread,
}

impl Layout {
    pub const ALL: [Layout; 3] = [Layout::Rows, Layout::Positions, Layout::Spread];

    /// The numbers of rows and of inner positions.
    pub fn shape(self, rows: usize) -> [usize; 2] {
        if self == Layout::Positions { [1, rows] } else { [rows, 1] }
    }

    fn steps(self, rows: usize, classes: usize) -> [usize; 2] {
        match self {
            Layout::Rows => [classes, 1],
            Layout::Positions => [1, rows],
            Layout::Spread => [3 * classes + 5, 3],
        }
    }

    pub fn strides(self, rows: usize, classes: usize) -> [i64; 3] {
        let [row, class] = self.steps(rows, classes).map(|step| step as i64);
        if self == Layout::Positions { [0, class, row] } else { [row, class, 0] }
    }

    /// `[rows, classes]` in this layout, with `between` in the gaps.
    pub fn spread<T: Copy>(self, packed: &[T], classes: usize, between: T) -> Vec<T> {
        if packed.is_empty() {
            return Vec::new();
        }
        let rows = packed.len() / classes;
        let [row, class] = self.steps(rows, classes);
        let mut memory = vec![between; (rows - 1) * row + (classes - 1) * class + 1];
        for (i, x) in packed.iter().enumerate() {
            memory[i / classes * row + i % classes * class] = *x;
        }
        memory
    }

    /// The reverse; also checks the gaps.
    #[track_caller]
    pub fn packed<T: Copy + PartialEq + Debug>(
        self,
        memory: &[T],
        [rows, classes]: [usize; 2],
        between: T,
    ) -> Vec<T> {
        let [row, class] = self.steps(rows, classes);
        let mut rest = memory.to_vec();
        let mut packed = Vec::new();
        for i in 0..rows * classes {
            packed.push(std::mem::replace(
                &mut rest[i / classes * row + i % classes * class],
                between,
            ));
        }
        assert!(rest.iter().all(|x| *x == between), "written between elements: {rest:?}");
        packed
    }
}

/// Where the probabilities of a case come from.
#[derive(Clone, Debug)]
pub struct Source {
    /// The classes of the targets, `[rows, places]`; `None` if those are of all classes.
    pub listed: Option<Vec<i64>>,
    pub places: usize,
    /// `[rows, places]`
    pub values: Vec<f64>,
    /// Not 0: the values are a teacher's logits.
    pub scale: f64,
}

impl Source {
    /// The probabilities of all classes.
    fn targets(&self, case: &Case) -> Targets {
        let [of_logits, of_targets] =
            [case.classes, self.places].map(|width| [case.rows, width, 1]);
        let listed = self.listed.as_ref().map(|listed| {
            let listed: Vec<f64> = listed.iter().map(|&class| class as f64).collect();
            Operand::packed(Dtype::I64, of_targets, &listed)
        });
        let logits = Operand::packed(Dtype::F64, of_logits, &case.logits);
        let task = Task {
            target_classes: listed,
            target_scale: self.scale,
            ignore_index: case.ignore_index,
            ..Task::new(logits, Operand::packed(Dtype::F64, of_targets, &self.values))
        };
        task.case().targets
    }
}

/// The results of the calls; empty or NaN if they have no such result.
#[derive(Clone, Debug, Default)]
pub struct Got {
    pub at: String,
    pub wide: bool,
    pub half_ulp: f64,
    pub loss: f64,
    pub z_loss: f64,
    pub entropy_bonus: f64,
    pub normalizer: f64,
    pub z_normalizer: f64,
    pub kept_rows: u64,
    pub correct: u64,
    pub row_losses: Vec<f64>,
    pub lse: Vec<f64>,
    pub entropy: Vec<f64>,
    pub kl: Vec<f64>,
    pub argmax: Vec<i64>,
    /// `[rows, top]`
    pub top_classes: Vec<i64>,
    pub top_log_probs: Vec<f64>,
    pub target_ranks: Vec<i64>,
    /// Gradients: of the fused call, from the forward's lse, and accumulated onto 1/4.
    pub grad: Vec<f64>,
    pub backward: Vec<f64>,
    pub added: Vec<f64>,
    pub grad_targets: Vec<f64>,
}

/// The contents of gaps; no result has this value.
const BETWEEN: f64 = 160.0;
/// The contents of the output that gradients are added to.
const OLD: f64 = 0.25;
const NAN: f64 = f64::NAN;

struct Problem<'a, T> {
    case: &'a Case,
    layout: Layout,
    isa: Isa,
    logits: Vec<T>,
    soft: Option<Vec<f64>>,
    source: Option<&'a Source>,
    listed: Option<Vec<i64>>,
    mask: Option<Vec<u8>>,
}

impl<T: Float> Problem<'_, T> {
    fn strides(&self) -> [i64; 3] {
        self.layout.strides(self.case.rows, self.case.classes)
    }

    fn strides_of_targets(&self) -> [i64; 3] {
        let places = self.source.map_or(self.case.classes, |source| source.places);
        self.layout.strides(self.case.rows, places)
    }

    fn call(&self) -> CrossEntropy<'_> {
        let case = self.case;
        let [rows, inner] = self.layout.shape(case.rows);
        let mut call = CrossEntropy::new(rows, case.classes)
            .inner(inner)
            .isa(self.isa)
            .ignore_index(case.ignore_index)
            .label_smoothing(case.label_smoothing)
            .z_loss(case.z_loss)
            .entropy_bonus(case.entropy_bonus)
            .softcap(case.softcap)
            .logit_scale(case.logit_scale)
            .normalizer(case.normalizer)
            .z_normalizer(case.z_normalizer)
            .log_probs(case.log_probs)
            .empty_is_zero(case.empty_is_zero)
            .grad_output(&case.grad_output)
            .grad_scale(case.grad_scale)
            .reduction(match case.reduction {
                Reduction::Mean => xent::Reduction::Mean,
                Reduction::Sum => xent::Reduction::Sum,
                Reduction::None => xent::Reduction::None,
            });
        if let Some(weights) = &case.class_weights {
            call = call.class_weights(weights);
        }
        if let Some(weights) = &case.row_weights {
            call = call.row_weights(weights);
        }
        if let Some(mask) = &self.mask {
            call = call.row_mask(mask);
        }
        if let Some(source) = self.source {
            call = call.target_scale(source.scale);
        }
        if let (Some(source), Some(listed)) = (self.source, &self.listed) {
            let listed = Input::from(listed).strides(self.strides_of_targets());
            call = call.target_classes(listed, source.places);
        }
        call
    }

    fn logits(&self) -> Input<'_> {
        Input::from(&self.logits).strides(self.strides())
    }

    fn targets(&self) -> Option<Input<'_>> {
        match &self.case.targets {
            Targets::None => None,
            Targets::Indices(y) => Some(y.into()),
            Targets::Probabilities(_) => {
                let soft = self.soft.as_ref().expect("laid out");
                Some(Input::from(soft).strides(self.strides_of_targets()))
            }
        }
    }

    /// Makes a call with every result that the problem allows.
    fn with_results(&self, call: impl FnOnce(Results<'_>)) -> Got {
        let case = self.case;
        let has_targets = case.targets != Targets::None;
        let index = matches!(case.targets, Targets::Indices(_));
        let reduced = has_targets && case.reduction != Reduction::None;
        let softmax = !case.log_probs;
        let top = top_count(case);
        let mut got = Got {
            at: format!("{} {:?} on {}", T::NAME, self.layout, self.isa.name()),
            wide: T::WIDE,
            half_ulp: T::HALF_ULP,
            loss: f64::NAN,
            z_loss: f64::NAN,
            row_losses: vec![BETWEEN; if has_targets { case.rows } else { 0 }],
            lse: vec![BETWEEN; if softmax { case.rows } else { 0 }],
            entropy: vec![BETWEEN; if softmax { case.rows } else { 0 }],
            kl: vec![BETWEEN; if has_targets && !index { case.rows } else { 0 }],
            argmax: vec![-7; case.rows],
            top_classes: vec![-7; case.rows * top],
            top_log_probs: vec![BETWEEN; case.rows * top],
            target_ranks: vec![-7; if index { case.rows } else { 0 }],
            ..Got::default()
        };
        call(Results {
            loss: reduced.then_some(&mut got.loss),
            z_loss: (reduced && softmax).then_some(&mut got.z_loss),
            entropy_bonus: (reduced && softmax).then_some(&mut got.entropy_bonus),
            normalizer: has_targets.then_some(&mut got.normalizer),
            z_normalizer: has_targets.then_some(&mut got.z_normalizer),
            kept_rows: has_targets.then_some(&mut got.kept_rows),
            correct: index.then_some(&mut got.correct),
            row_losses: has_targets.then(|| (&mut got.row_losses).into()),
            lse: softmax.then_some(&mut got.lse),
            entropy: softmax.then(|| (&mut got.entropy).into()),
            kl: (has_targets && !index).then(|| (&mut got.kl).into()),
            argmax: Some(&mut got.argmax),
            top_count: top,
            top_classes: (top > 0).then_some(&mut got.top_classes),
            top_log_probs: (top > 0).then(|| (&mut got.top_log_probs).into()),
            target_ranks: index.then_some(&mut got.target_ranks),
        });
        if self.layout == Layout::Positions {
            // [top, rows]
            let rows = case.rows;
            let at = |i: usize| i % top.max(1) * rows + i / top.max(1);
            got.top_classes = (0..rows * top).map(|i| got.top_classes[at(i)]).collect();
            got.top_log_probs = (0..rows * top).map(|i| got.top_log_probs[at(i)]).collect();
        }
        got
    }

    /// The gradient that a call writes to an output of `old`.
    fn gradient<G: Float>(&self, old: f64, call: impl FnOnce(Output<'_>)) -> Vec<f64> {
        let Case { rows, classes, .. } = *self.case;
        let (between, old) = (G::of(BETWEEN), vec![G::of(old); rows * classes]);
        let mut memory = self.layout.spread(&old, classes, between);
        call(Output::from(&mut memory).strides(self.strides()));
        let grad = self.layout.packed(&memory, [rows, classes], between);
        grad.into_iter().map(G::get).collect()
    }

    fn in_place(&self, call: impl FnOnce(Output<'_>)) -> Vec<f64> {
        let mut memory = self.logits.clone();
        call(Output::from(&mut memory).strides(self.strides()));
        let shape = [self.case.rows, self.case.classes];
        let grad = self.layout.packed(&memory, shape, T::of(BETWEEN));
        grad.into_iter().map(T::get).collect()
    }

    fn run(&self) -> Got {
        let call = self.call();
        let Some(targets) = self.targets() else {
            return self.with_results(|results| call.evaluate(self.logits(), results).unwrap());
        };
        let mut got = self.with_results(|results| {
            call.forward_with(self.logits(), targets, results).unwrap();
        });
        let at = got.at.clone();
        let fused = |call: CrossEntropy, old| {
            let mut results = Got::default();
            let grad = self.gradient::<T>(old, |to| {
                results = self.with_results(|results| {
                    call.forward_backward_with(self.logits(), targets, to, results).unwrap();
                });
            });
            (grad, results)
        };
        let (grad, results) = fused(call, BETWEEN);
        results.assert_same_results(&got);
        got.grad = grad;
        got.added = fused(call.accumulate(true), OLD).0;
        let mut results = Got::default();
        let in_place = self.in_place(|to| {
            results = self.with_results(|results| {
                call.forward_backward_in_place_with(to, targets, results).unwrap();
            });
        });
        results.assert_same_results(&got);
        same(&in_place, &got.grad, || format!("in place, {at}"));

        got.backward = self.gradient::<T>(BETWEEN, |to| {
            call.backward(self.logits(), targets, &got.lse, to).unwrap();
        });
        let in_place = self.in_place(|to| call.backward_in_place(to, targets, &got.lse).unwrap());
        same(&in_place, &got.backward, || format!("backward in place, {at}"));
        if self.soft.is_some() && self.source.is_none() {
            got.grad_targets = self.gradient::<f64>(BETWEEN, |to| {
                call.backward_targets(self.logits(), targets, &got.lse, to).unwrap();
            });
        }
        // No call may change an input.
        let shape = [self.case.rows, self.case.classes];
        let logits = self.layout.packed(&self.logits, shape, T::of(BETWEEN));
        let logits: Vec<f64> = logits.into_iter().map(T::get).collect();
        same(&logits, &self.case.logits, || format!("logits, {at}"));
        got
    }
}

/// Asserts that the numbers are equal; any NaN equals any other.
#[track_caller]
pub fn same(a: &[f64], b: &[f64], what: impl Fn() -> String) {
    assert_eq!(a.len(), b.len(), "{}", what());
    for (i, (a, b)) in a.iter().zip(b).enumerate() {
        let equal = a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan();
        assert!(equal, "{}: element {i} is {a:e} and {b:e}", what());
    }
}

impl Got {
    /// Asserts that forward and the fused call give the same bits.
    #[track_caller]
    fn assert_same_results(&self, other: &Got) {
        let what = || format!("forward and fused, {}", other.at);
        let numbers = |got: &Got| [got.loss, got.z_loss, got.normalizer, got.z_normalizer];
        same(&numbers(self), &numbers(other), what);
        same(&self.row_losses, &other.row_losses, what);
        same(&self.lse, &other.lse, what);
        same(&self.entropy, &other.entropy, what);
        same(&self.kl, &other.kl, what);
        assert_eq!((self.kept_rows, self.correct), (other.kept_rows, other.correct), "{}", what());
        assert_eq!(self.argmax, other.argmax, "{}", what());
        assert_eq!(self.top_classes, other.top_classes, "{}", what());
        same(&self.top_log_probs, &other.top_log_probs, what);
        assert_eq!(self.target_ranks, other.target_ranks, "{}", what());
    }

    #[track_caller]
    fn close(&self, what: &str, got: f64, want: f64, bound: f64) {
        let kind = |x: f64| if x.is_finite() { 0.0 } else { x };
        let same = kind(got) == kind(want) || got.is_nan() && want.is_nan();
        let off = if want.is_finite() { (got - want).abs() } else { 0.0 };
        let good = same && (got == want || off <= bound || !want.is_finite());
        assert!(good, "{}: {what} is {got:e}, not {want:e} (by {bound:e})", self.at);
    }

    /// Checks the largest logits, their log-probabilities, and the ranks of targets.
    #[track_caller]
    fn judge_rankings(&self, case: &Case, want: &Outcome, unit: f64) {
        let (top, classes) = (top_count(case), case.classes);
        for row in 0..case.rows {
            let logits = &case.logits[row * classes..][..classes];
            let order = reference::order(logits);
            let lse = want.lse.get(row).unwrap_or(&0.0);
            let scale = 1.0 + want.lse_scale.get(row).unwrap_or(&0.0);
            for (i, &class) in order[..top].iter().enumerate() {
                let at = row * top + i;
                let name = format!("top_log_probs[{row}][{i}]");
                assert_eq!(self.top_classes[at], class as i64, "{}: {name}", self.at);
                let (x, _) = case.scaled(logits[class]);
                let bound = unit * (scale + x.abs());
                self.close(&name, self.top_log_probs[at], x - lse, bound);
            }
            if let Targets::Indices(y) = &case.targets {
                let ignored = y[row] == case.ignore_index
                    || case.row_mask.as_ref().is_some_and(|mask| !mask[row]);
                let place = order.iter().position(|&class| class as i64 == y[row]);
                let rank = if ignored { -1 } else { place.expect("a class") as i64 };
                assert_eq!(self.target_ranks[row], rank, "{}: target_ranks[{row}]", self.at);
            }
        }
    }

    #[track_caller]
    fn judge(&self, case: &Case, want: &Outcome, to_dtype: impl Fn(f64) -> f64, least: f64) {
        let unit = if self.wide { 1e-13 } else { 1e-6 };
        assert_eq!(self.argmax, want.argmax, "{}: argmax", self.at);
        for (row, &lse) in self.lse.iter().enumerate() {
            let scale = 1.0 + want.lse_scale[row];
            self.close(&format!("lse[{row}]"), lse, want.lse[row], unit * scale);
            let entropy = self.entropy[row];
            self.close(&format!("entropy[{row}]"), entropy, want.entropy[row], unit * scale);
        }
        for (row, &kl) in self.kl.iter().enumerate() {
            // The lse is rounded.
            let lse = want.lse.get(row).map_or(0.0, |lse| lse.abs());
            let bound = 20.0 * unit * (1.0 + want.kl_scale[row]) + 4.0 * f64::EPSILON * lse;
            self.close(&format!("kl[{row}]"), kl, want.kl[row], bound);
        }
        self.judge_rankings(case, want, unit);
        if case.targets == Targets::None {
            return;
        }
        let index = matches!(case.targets, Targets::Indices(_));
        assert_eq!((self.kept_rows, self.correct), (want.kept_rows, want.correct), "{}", self.at);
        let exact = |x: f64| 1e-13 * x.abs();
        self.close("normalizer", self.normalizer, want.normalizer, exact(want.normalizer));
        self.close("z_normalizer", self.z_normalizer, want.z_normalizer, exact(want.z_normalizer));
        // The excluded class has a relative accuracy, a sum over all classes an absolute one.
        let absolute = if index && case.label_smoothing == 0.0 { 0.0 } else { unit };
        let mut total = 0.0;
        for (row, &loss) in self.row_losses.iter().enumerate() {
            let bound = 20.0 * unit * want.loss_scale[row] + absolute;
            let bound = if want.loss_scale[row] == 0.0 { 0.0 } else { bound };
            self.close(&format!("row_losses[{row}]"), loss, want.row_losses[row], bound);
            total += bound;
        }
        if case.reduction != Reduction::None {
            let mean = case.reduction == Reduction::Mean;
            let divisor =
                if mean { want.normalizer.abs().min(want.z_normalizer.abs()) } else { 1.0 };
            self.close("loss", self.loss, want.loss, total / divisor);
            if !case.log_probs {
                self.close("z_loss", self.z_loss, want.z_loss, total / divisor);
                let (got, want) = (self.entropy_bonus, want.entropy_bonus);
                self.close("entropy_bonus", got, want, total / divisor);
            }
        }
        if case.reduction == Reduction::Mean && want.normalizer == 0.0 && want.kept_rows > 0 {
            // Over a denominator of 0 a result that is not finite may have either kind.
            return;
        }
        let gradients = [("gradient", &self.grad), ("backward", &self.backward)];
        for i in 0..self.grad.len() {
            let row = i / case.classes;
            let (exact, size) = (want.grad_logits[i], want.grad_magnitude[i].abs());
            let slip = case.grad_scale.abs() * if index { 1.0 } else { 10.0 } * 1e-37;
            for (name, grad) in gradients {
                let lse = want.lse.get(row).map_or(0.0, |lse| lse.abs());
                let from_lse = if name == "backward" { 2e-15 * lse * size.max(1.0) } else { 0.0 };
                let bound = if size == 0.0 {
                    0.0
                } else {
                    20.0 * unit * size + from_lse + 2.0 * self.half_ulp * exact.abs() + least + slip
                };
                let what = format!("{name} of row {row}, class {}", i % case.classes);
                self.close(&what, grad[i], to_dtype(exact), bound);
                if name == "gradient" {
                    let sum = OLD + exact;
                    let bound =
                        if size == 0.0 { 0.0 } else { bound + self.half_ulp * sum.abs() * 2.0 };
                    self.close(&format!("added {what}"), self.added[i], to_dtype(sum), bound);
                }
            }
        }
        for (i, (&got, &exact)) in self.grad_targets.iter().zip(&want.grad_targets).enumerate() {
            let lse = want.lse.get(i / case.classes).map_or(0.0, |lse| lse.abs());
            let bound = unit * (exact.abs() + (1.0 + lse) * case.grad_scale.abs());
            let bound = if exact == 0.0 { 0.0 } else { bound };
            self.close(&format!("grad_targets[{i}]"), got, exact, bound);
        }
    }
}

/// The classes that are listed for each row of a case: as many as may be.
fn top_count(case: &Case) -> usize {
    case.classes.min(64)
}

/// Runs a case in one dtype: every layout, every instruction set.
#[track_caller]
pub fn in_dtype<T: Float>(case: &Case, look: impl Fn(&Got)) {
    in_layouts::<T>(case, None, &look);
}

/// Compiled once for each dtype, not for each use.
#[track_caller]
fn in_layouts<T: Float>(case: &Case, source: Option<&Source>, look: &dyn Fn(&Got)) {
    let mut case = case.clone();
    if let Some(source) = source {
        case.targets = source.targets(&case);
    }
    assert_eq!(case.inner, 1, "positions are a layout here");
    case.logits.iter_mut().for_each(|x| *x = T::of(*x).get());
    case.round_scaled_to_f32 = !T::WIDE;
    let want = reference::evaluate(&case);
    let logits: Vec<T> = case.logits.iter().map(|&x| T::of(x)).collect();
    for layout in Layout::ALL {
        let mut other: Option<Got> = None;
        for isa in isas() {
            let problem = Problem {
                case: &case,
                layout,
                isa,
                logits: layout.spread(&logits, case.classes, T::of(BETWEEN)),
                soft: match (source, &case.targets) {
                    (Some(source), _) => Some(layout.spread(&source.values, source.places, NAN)),
                    (None, Targets::Probabilities(t)) => Some(layout.spread(t, case.classes, NAN)),
                    _ => None,
                },
                source,
                listed: source.and_then(|source| {
                    let listed = source.listed.as_ref()?;
                    Some(layout.spread(listed, source.places, i64::MAX))
                }),
                mask: case.row_mask.as_ref().map(|mask| mask.iter().map(|&m| m.into()).collect()),
            };
            let got = problem.run();
            got.judge(&case, &want, |x| T::of(x).get(), T::LEAST);
            look(&got);
            if let Some(other) = &other {
                other.assert_same_results(&got);
                same(&other.grad, &got.grad, || format!("gradient, {}", got.at));
                same(&other.backward, &got.backward, || format!("backward, {}", got.at));
            }
            other = Some(got);
        }
    }
}

/// Runs a case in every dtype.
#[track_caller]
pub fn everywhere(case: &Case, look: impl Fn(&Got)) {
    everywhere_from(case, None, &look);
}

/// The same with the targets of a list or a teacher.
#[track_caller]
pub fn everywhere_of(case: &Case, source: &Source, look: impl Fn(&Got)) {
    everywhere_from(case, Some(source), &look);
}

#[track_caller]
fn everywhere_from(case: &Case, source: Option<&Source>, look: &dyn Fn(&Got)) {
    type Run = fn(&Case, Option<&Source>, &dyn Fn(&Got));
    let runs: [Run; 4] =
        [in_layouts::<f32>, in_layouts::<f64>, in_layouts::<bf16>, in_layouts::<f16>];
    if is_sampled() {
        // One with lanes of its own type and one half, the same in all of a test, which may compare its
        // calls: by the length of its name, which is its thread's.
        let name = std::thread::current().name().map_or(0, str::len);
        runs[name % 2](case, source, look);
        runs[2 + name / 2 % 2](case, source, look);
        return;
    }
    for run in runs {
        run(case, source, look);
    }
}
