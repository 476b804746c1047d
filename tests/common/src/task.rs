//! Cross-entropy problems with every option, in operands of any dtype and layout.
//!
//! [`Problem`](crate::Problem) is the simpler kind: contiguous, f32, fewer options.

use crate::operand::{Dtype, Operand, PlacedFactors};
use crate::random::Rng;
use crate::reference::{self, Case};
use crate::{Element, How, Reduction};
use xent::{CrossEntropy, Error, Results};

/// Operands, options and outputs of a call.
#[derive(Clone, Debug)]
pub struct Task {
    pub rows: usize,
    pub classes: usize,
    pub inner: usize,
    pub logits: Operand,
    pub targets: Option<Operand>,
    pub class_weights: Option<Operand>,
    pub row_weights: Option<Operand>,
    pub row_mask: Option<Operand>,
    pub grad_output: Option<Operand>,
    pub ignore_index: i64,
    pub label_smoothing: f64,
    pub z_loss: f64,
    pub softcap: f64,
    pub logit_scale: f64,
    pub log_probs: bool,
    pub reduction: Reduction,
    pub normalizer: f64,
    pub z_normalizer: f64,
    pub empty_is_zero: bool,
    pub grad_scale: f64,
    pub entropy_bonus: f64,
    /// Calls add gradients to the contents of `grad` and `grad_targets`.
    pub accumulate: bool,
    pub grad: Operand,
    pub grad_targets: Operand,
    pub row_losses: Operand,
    pub entropy: Operand,
    pub kl: Operand,
    /// `[rows, top_count, inner]`; its second size is the number of classes that are listed.
    pub top_log_probs: Operand,
    pub wants: Wants,
    /// The classes that sparse targets are of.
    pub target_classes: Option<Operand>,
    /// Not 0: the targets are a teacher's logits.
    pub target_scale: f64,
}

/// The optional results of a forward, other than losses and lse.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wants {
    pub entropy: bool,
    pub argmax: bool,
    pub correct: bool,
    pub kl: bool,
    /// The largest logits and their log-probabilities, if any are listed.
    pub top: bool,
    pub ranks: bool,
}

impl Wants {
    pub const ALL: Wants =
        Wants { entropy: true, argmax: true, correct: true, kl: true, top: true, ranks: true };
    pub const NONE: Wants = Wants {
        entropy: false,
        argmax: false,
        correct: false,
        kl: false,
        top: false,
        ranks: false,
    };
}

/// Which call.
#[derive(Clone, Copy, Debug)]
pub enum Call<'a> {
    /// Without targets.
    Evaluate,
    Forward,
    Fused,
    FusedInPlace,
    Backward(&'a [f64]),
    BackwardInPlace(&'a [f64]),
    Targets(&'a [f64]),
}

/// The results of a call, `None` or empty if it has no such result.
#[derive(Clone, Debug, Default)]
pub struct Answer {
    pub loss: Option<f64>,
    pub z_loss: Option<f64>,
    pub entropy_bonus: Option<f64>,
    pub normalizer: Option<f64>,
    pub z_normalizer: Option<f64>,
    pub kept_rows: Option<u64>,
    pub correct: Option<u64>,
    pub row_losses: Vec<f64>,
    pub lse: Vec<f64>,
    pub entropy: Vec<f64>,
    pub argmax: Vec<i64>,
    pub kl: Vec<f64>,
    /// `[rows, top_count, inner]`.
    pub top_classes: Vec<i64>,
    pub top_log_probs: Vec<f64>,
    pub target_ranks: Vec<i64>,
    /// The gradient of the logits, or of the targets.
    pub grad: Vec<f64>,
}

/// Asserts that both have the same bits; any NaN equals any other, and +0 equals -0.
#[track_caller]
pub fn same_numbers(a: &[f64], b: &[f64], what: &str) {
    let unsigned = |x: &[f64]| x.iter().map(|x| x + 0.0).collect::<Vec<f64>>();
    same_bits(&unsigned(a), &unsigned(b), what);
}

/// Asserts that both have the same bits; any NaN equals any other.
#[track_caller]
pub fn same_bits(a: &[f64], b: &[f64], what: &str) {
    assert_eq!(a.len(), b.len(), "{what}");
    // One comparison of sums, not a branch for each of billions of elements.
    if a.iter().zip(b).fold(0, |seen, (x, y)| seen | (x.to_bits() ^ y.to_bits())) == 0 {
        return;
    }
    for (i, (x, y)) in a.iter().zip(b).enumerate() {
        let same = x.to_bits() == y.to_bits() || x.is_nan() && y.is_nan();
        assert!(same, "{what}: element {i} is {x:e} and {y:e}");
    }
}

impl Answer {
    /// Asserts that the results of a forward have the same bits.
    #[track_caller]
    pub fn assert_same_losses(&self, other: &Answer, what: &str) {
        let numbers = |a: &Answer| {
            [a.loss, a.z_loss, a.entropy_bonus, a.normalizer, a.z_normalizer]
                .map(|x| x.unwrap_or(-1.0))
        };
        same_bits(&self.lse, &other.lse, &format!("{what}: lse"));
        same_bits(&self.row_losses, &other.row_losses, &format!("{what}: row losses"));
        same_bits(&self.entropy, &other.entropy, &format!("{what}: entropy"));
        same_bits(&self.kl, &other.kl, &format!("{what}: kl"));
        same_bits(&numbers(self), &numbers(other), &format!("{what}: loss"));
        assert_eq!(self.argmax, other.argmax, "{what}: argmax");
        assert_eq!(self.top_classes, other.top_classes, "{what}: top classes");
        let what_top = format!("{what}: top log-probabilities");
        same_bits(&self.top_log_probs, &other.top_log_probs, &what_top);
        assert_eq!(self.target_ranks, other.target_ranks, "{what}: target ranks");
        let counts = |a: &Answer| (a.kept_rows, a.correct);
        assert_eq!(counts(self), counts(other), "{what}: kept and correct rows");
    }

    /// Asserts that all results have the same bits.
    #[track_caller]
    pub fn assert_same(&self, other: &Answer, what: &str) {
        self.assert_same_losses(other, what);
        same_bits(&self.grad, &other.grad, &format!("{what}: gradient"));
    }
}

/// Asserts that two lists of answers have the same bits.
#[track_caller]
pub fn assert_all_same(a: &[(&str, Answer)], b: &[(&str, Answer)], what: &str) {
    assert_eq!(a.len(), b.len(), "{what}");
    for ((name, a), (_, b)) in a.iter().zip(b) {
        a.assert_same(b, &format!("{what}, {name}"));
    }
}

impl Task {
    /// A task with every option at its default and every operand packed.
    pub fn new(logits: Operand, targets: Operand) -> Task {
        let sizes @ [rows, classes, inner] = logits.sizes;
        let by_row = [rows, 1, inner];
        Task {
            rows,
            classes,
            inner,
            grad: Operand::zeros(logits.dtype, sizes),
            grad_targets: Operand::zeros(Dtype::F64, sizes),
            row_losses: Operand::zeros(Dtype::F64, by_row),
            entropy: Operand::zeros(Dtype::F64, by_row),
            kl: Operand::zeros(Dtype::F64, by_row),
            top_log_probs: Operand::zeros(Dtype::F64, [rows, classes.min(2), inner]),
            logits,
            targets: Some(targets),
            class_weights: None,
            row_weights: None,
            row_mask: None,
            grad_output: None,
            ignore_index: -100,
            label_smoothing: 0.0,
            z_loss: 0.0,
            softcap: 0.0,
            logit_scale: 1.0,
            log_probs: false,
            reduction: Reduction::Sum,
            normalizer: 0.0,
            z_normalizer: 0.0,
            empty_is_zero: false,
            grad_scale: 1.0,
            entropy_bonus: 0.0,
            accumulate: false,
            wants: Wants::ALL,
            target_classes: None,
            target_scale: 0.0,
        }
    }

    pub fn positions(&self) -> usize {
        self.rows * self.inner
    }

    /// The classes that are listed for each row.
    pub fn top_count(&self) -> usize {
        self.top_log_probs.sizes[1]
    }

    pub fn has_indices(&self) -> bool {
        self.targets.as_ref().is_some_and(|targets| !targets.dtype.is_float())
    }

    pub fn has_probabilities(&self) -> bool {
        self.targets.as_ref().is_some_and(|targets| targets.dtype.is_float())
    }

    /// Whether the targets have a gradient of their own.
    pub fn has_target_gradient(&self) -> bool {
        self.has_probabilities() && self.target_classes.is_none() && self.target_scale == 0.0
    }

    /// The targets as probabilities of all classes.
    fn probabilities(&self, targets: &Operand) -> Vec<f64> {
        let mut values = targets.values.clone();
        let listed = self
            .target_classes
            .as_ref()
            .map(|operand| operand.values.iter().map(|&class| class as i64).collect::<Vec<i64>>());
        if self.target_scale > 0.0 {
            // Unused places have no part in the softmax.
            let of_place = |i: usize, x: f64| {
                let is_used = listed.as_ref().is_none_or(|listed| listed[i] != self.ignore_index);
                if is_used { self.target_scale * x } else { f64::NEG_INFINITY }
            };
            let scaled: Vec<f64> = (0..).zip(&values).map(|(i, &x)| of_place(i, x)).collect();
            values = reference::softmax(&scaled, self.rows, targets.sizes[1], self.inner);
        }
        match &listed {
            Some(listed) => {
                let sizes = [self.rows, self.classes, self.inner];
                reference::spread_targets(listed, &values, sizes, self.ignore_index)
            }
            None => values,
        }
    }

    /// Whether the gradient may replace the logits.
    pub fn fits_in_place(&self) -> bool {
        self.targets.is_some() && !self.accumulate && self.logits.is_apart()
    }

    /// The call in place, the call into `grad` and the forward go over the logits in the same layout.
    pub fn has_one_layout(&self) -> bool {
        let narrow = if self.logits.dtype == Dtype::F64 { 64 } else { 128 };
        self.classes <= narrow
            || self.logits.has_contiguous_classes() == self.grad.has_contiguous_classes()
            || !self.logits.has_contiguous_classes()
    }

    /// The same problem for the oracle.
    pub fn case(&self) -> Case {
        let values = |operand: &Option<Operand>| operand.as_ref().map(|o| o.values.clone());
        let integers = |targets: &Operand| targets.values.iter().map(|&y| y as i64).collect();
        let transforms = self.logit_scale != 1.0 || self.softcap != 0.0;
        Case {
            targets: match &self.targets {
                None => reference::Targets::None,
                Some(targets) if targets.dtype.is_float() => {
                    reference::Targets::Probabilities(self.probabilities(targets))
                }
                Some(targets) => reference::Targets::Indices(integers(targets)),
            },
            class_weights: values(&self.class_weights),
            row_weights: values(&self.row_weights),
            row_mask: values(&self.row_mask)
                .map(|mask| mask.iter().map(|&byte| byte != 0.0).collect()),
            ignore_index: self.ignore_index,
            label_smoothing: self.label_smoothing,
            z_loss: self.z_loss,
            softcap: self.softcap,
            logit_scale: self.logit_scale,
            normalizer: self.normalizer,
            z_normalizer: self.z_normalizer,
            reduction: match self.reduction {
                Reduction::Mean => reference::Reduction::Mean,
                Reduction::Sum => reference::Reduction::Sum,
                Reduction::None => reference::Reduction::None,
            },
            log_probs: self.log_probs,
            empty_is_zero: self.empty_is_zero,
            round_scaled_to_f32: transforms && self.logits.dtype != Dtype::F64,
            grad_output: values(&self.grad_output).unwrap_or(vec![1.0]),
            grad_scale: self.grad_scale,
            entropy_bonus: self.entropy_bonus,
            ..Case::new(self.rows, self.classes, self.inner, self.logits.values.clone())
        }
    }

    /// Row `row` at position `k` as a problem of its own, in the same layout.
    pub fn single(&self, row: usize, k: usize) -> Task {
        let single = |operand: &Option<Operand>| operand.as_ref().map(|o| o.single(row, k));
        Task {
            rows: 1,
            inner: 1,
            logits: self.logits.single(row, k),
            targets: single(&self.targets),
            row_weights: single(&self.row_weights),
            row_mask: single(&self.row_mask),
            grad_output: single(&self.grad_output),
            grad: self.grad.single(row, k),
            grad_targets: self.grad_targets.single(row, k),
            row_losses: self.row_losses.single(row, k),
            entropy: self.entropy.single(row, k),
            kl: self.kl.single(row, k),
            target_classes: single(&self.target_classes),
            top_log_probs: self.top_log_probs.single(row, k),
            ..self.clone()
        }
    }

    /// The same problem in another layout. Classes stay contiguous or not.
    pub fn relaid(&self, rng: &mut Rng) -> Task {
        let mut relay = |operand: &Option<Operand>| operand.as_ref().map(|o| o.relaid(rng));
        Task {
            targets: relay(&self.targets),
            class_weights: relay(&self.class_weights),
            row_weights: relay(&self.row_weights),
            row_mask: relay(&self.row_mask),
            grad_output: relay(&self.grad_output),
            target_classes: relay(&self.target_classes),
            logits: self.logits.relaid(rng),
            grad: self.grad.relaid(rng),
            grad_targets: self.grad_targets.relaid(rng),
            row_losses: self.row_losses.relaid(rng),
            entropy: self.entropy.relaid(rng),
            kl: self.kl.relaid(rng),
            top_log_probs: self.top_log_probs.relaid(rng),
            ..self.clone()
        }
    }

    /// Makes every call that the problem allows. A backward gets the lse of the forward.
    #[track_caller]
    pub fn run_all(&self, how: &How<'_>) -> Vec<(&'static str, Answer)> {
        let mut all = vec![("evaluate", self.run(Call::Evaluate, how))];
        if self.targets.is_none() {
            return all;
        }
        let forward = self.run(Call::Forward, how);
        let lse = forward.lse.clone();
        all.push(("forward", forward));
        all.push(("fused", self.run(Call::Fused, how)));
        all.push(("backward", self.run(Call::Backward(&lse), how)));
        if self.fits_in_place() {
            all.push(("fused in place", self.run(Call::FusedInPlace, how)));
            all.push(("backward in place", self.run(Call::BackwardInPlace(&lse), how)));
        }
        if self.has_target_gradient() {
            all.push(("targets", self.run(Call::Targets(&lse), how)));
        }
        all
    }

    /// The operands that losses are multiplied by, placed in memory.
    pub fn factors(&self) -> PlacedFactors {
        PlacedFactors::new([
            &self.class_weights,
            &self.row_weights,
            &self.row_mask,
            &self.grad_output,
            &self.target_classes,
        ])
    }

    /// A builder that has the options, for a number of classes.
    pub fn builder<'a>(
        &self,
        classes: usize,
        factors: &'a PlacedFactors,
        how: &How<'a>,
    ) -> CrossEntropy<'a> {
        let mut builder = CrossEntropy::new(self.rows, classes)
            .inner(self.inner)
            .ignore_index(self.ignore_index)
            .label_smoothing(self.label_smoothing)
            .z_loss(self.z_loss)
            .softcap(self.softcap)
            .logit_scale(self.logit_scale)
            .log_probs(self.log_probs)
            .reduction(self.reduction)
            .normalizer(self.normalizer)
            .z_normalizer(self.z_normalizer)
            .empty_is_zero(self.empty_is_zero)
            .accumulate(self.accumulate)
            .grad_scale(self.grad_scale)
            .target_scale(self.target_scale)
            .entropy_bonus(self.entropy_bonus)
            .isa(how.isa)
            .threads(how.threads);
        if let Some(pool) = how.pool {
            builder = builder.pool(pool);
        }
        factors.of(builder)
    }

    /// Makes the call. Every output is poisoned before it and checked after it.
    #[track_caller]
    pub fn run(&self, call: Call<'_>, how: &How<'_>) -> Answer {
        self.try_run(call, how).expect("a valid problem")
    }

    pub fn try_run(&self, call: Call<'_>, how: &How<'_>) -> Result<Answer, Error> {
        let factors = self.factors();
        let targets = self.targets.as_ref().map(Operand::place);
        let mut logits = self.logits.place();
        let output = |operand: &Operand| {
            if self.accumulate { operand.place() } else { operand.place_poisoned() }
        };
        let mut grad = match call {
            Call::Targets(_) => output(&self.grad_targets),
            _ => output(&self.grad),
        };

        let builder = self.builder(self.classes, &factors, how);

        let target = targets.as_ref().map(|targets| targets.input());
        let target = || target.expect("a call with targets");
        let with_results = |call: &mut dyn FnMut(Results<'_>) -> Result<(), Error>| {
            self.with_results(true, !self.log_probs, call)
        };
        let mut answer = match call {
            Call::Evaluate => self.with_results(false, !self.log_probs, |results| {
                builder.evaluate(logits.input(), results)
            })?,
            Call::Forward => with_results(&mut |results| {
                builder.forward_with(logits.input(), target(), results)
            })?,
            Call::Fused => with_results(&mut |results| {
                let (logits, grad) = (logits.input(), grad.output());
                builder.forward_backward_with(logits, target(), grad, results)
            })?,
            Call::FusedInPlace => with_results(&mut |results| {
                builder.forward_backward_in_place_with(logits.output(), target(), results)
            })?,
            Call::Backward(lse) => {
                builder.backward(logits.input(), target(), lse, grad.output())?;
                Answer::default()
            }
            Call::BackwardInPlace(lse) => {
                builder.backward_in_place(logits.output(), target(), lse)?;
                Answer::default()
            }
            Call::Targets(lse) => {
                builder.backward_targets(logits.input(), target(), lse, grad.output())?;
                Answer::default()
            }
        };

        let inputs = [
            (&factors.class_weights, "class weights"),
            (&factors.row_weights, "row weights"),
            (&factors.row_mask, "row mask"),
            (&factors.grad_output, "grad_output"),
            (&factors.target_classes, "target classes"),
            (&targets, "targets"),
        ];
        for (input, what) in inputs {
            if let Some(input) = input {
                input.assert_untouched(what);
            }
        }
        match call {
            Call::FusedInPlace | Call::BackwardInPlace(_) => answer.grad = logits.take("in place"),
            _ => logits.assert_untouched("logits"),
        }
        if matches!(call, Call::Fused | Call::Backward(_) | Call::Targets(_)) {
            answer.grad = grad.take("gradient");
        } else {
            grad.assert_untouched("a gradient that is not asked for");
        }
        Ok(answer)
    }

    /// Makes a call with every result that the task wants, and lse if it is asked for. Every result is poisoned before
    /// the call and checked after it.
    #[track_caller]
    pub fn with_results(
        &self,
        has_targets: bool,
        has_lse: bool,
        call: impl FnOnce(Results<'_>) -> Result<(), Error>,
    ) -> Result<Answer, Error> {
        let (positions, reduces) = (self.positions(), self.reduction != Reduction::None);
        let wants = Wants {
            entropy: self.wants.entropy && !self.log_probs,
            argmax: self.wants.argmax,
            correct: self.wants.correct && has_targets && self.has_indices(),
            kl: self.wants.kl && has_targets && self.has_probabilities(),
            top: self.wants.top && self.top_count() > 0,
            ranks: self.wants.ranks && has_targets && self.has_indices(),
        };
        let top_count = if wants.top { self.top_count() } else { 0 };
        let mut row_losses = self.row_losses.place_poisoned();
        let mut entropy = self.entropy.place_poisoned();
        let mut kl = self.kl.place_poisoned();
        let by_row = |dtype| Operand::zeros(dtype, [1, positions, 1]);
        let mut lse_out = by_row(Dtype::F64).place_poisoned();
        let mut argmax = by_row(Dtype::I64).place_poisoned();
        let mut target_ranks = by_row(Dtype::I64).place_poisoned();
        let mut top_log_probs = self.top_log_probs.place_poisoned();
        let top = Operand::zeros(Dtype::I64, [1, positions * top_count, 1]);
        let mut top_classes = top.place_poisoned();
        let mut scalars = [f64::POISON; 5];
        let (mut kept_rows, mut correct) = (u64::MAX, u64::MAX);
        let [loss, z_loss, normalizer, z_normalizer, entropy_bonus] = &mut scalars;
        // The z-loss and the entropy bonus.
        let has_parts = has_targets && reduces && !self.log_probs;
        call(Results {
            loss: (has_targets && reduces).then_some(loss),
            z_loss: has_parts.then_some(z_loss),
            entropy_bonus: has_parts.then_some(entropy_bonus),
            normalizer: has_targets.then_some(normalizer),
            z_normalizer: has_targets.then_some(z_normalizer),
            kept_rows: has_targets.then_some(&mut kept_rows),
            correct: wants.correct.then_some(&mut correct),
            row_losses: has_targets.then(|| row_losses.output()),
            lse: has_lse.then(|| lse_out.doubles()),
            entropy: wants.entropy.then(|| entropy.output()),
            argmax: wants.argmax.then(|| argmax.integers()),
            kl: wants.kl.then(|| kl.output()),
            top_classes: wants.top.then(|| top_classes.integers()),
            top_log_probs: wants.top.then(|| top_log_probs.output()),
            top_count,
            target_ranks: wants.ranks.then(|| target_ranks.integers()),
        })?;
        let written = |i: usize, asked: bool| {
            assert!(!asked || scalars[i].to_bits() != f64::POISON.to_bits(), "scalar {i}");
            asked.then_some(scalars[i])
        };
        let mut answer = Answer {
            loss: written(0, has_targets && reduces),
            z_loss: written(1, has_parts),
            entropy_bonus: written(4, has_parts),
            normalizer: written(2, has_targets),
            z_normalizer: written(3, has_targets),
            kept_rows: has_targets.then_some(kept_rows),
            correct: wants.correct.then_some(correct),
            ..Answer::default()
        };
        if has_targets {
            answer.row_losses = row_losses.take("row losses");
        }
        if has_lse {
            answer.lse = lse_out.take("lse");
        }
        if wants.entropy {
            answer.entropy = entropy.take("entropy");
        }
        if wants.kl {
            answer.kl = kl.take("kl");
        }
        if wants.argmax {
            answer.argmax = argmax.take("argmax").iter().map(|&class| class as i64).collect();
        }
        if wants.top {
            let classes = top_classes.take("top classes");
            answer.top_classes = classes.iter().map(|&class| class as i64).collect();
            answer.top_log_probs = top_log_probs.take("top log-probabilities");
        }
        if wants.ranks {
            let ranks = target_ranks.take("target ranks");
            answer.target_ranks = ranks.iter().map(|&rank| rank as i64).collect();
        }
        Ok(answer)
    }
}
