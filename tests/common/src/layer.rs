//! Linear layers with the losses of their outputs, in operands of any dtype and layout, against the oracle.
//!
//! [`outputs`] makes the logits in the arithmetic that docs/semantics.md states, to the bit. The losses are then
//! those of a [`Task`] with these logits, and have its bounds. A gradient of the layer is a sum of products of the
//! gradient of the logits, each of which has the bound of [`Judge::bound_of_gradient`].

use crate::How;
use crate::fused::{fused, fused_f32};
use crate::operand::{Dtype, Operand, Placed};
use crate::task::{Answer, Task, same_bits};
use crate::task_bounds::{Judge, close_stored};
use xent::{Error, Linear, LinearGrads};

/// Operands, options and outputs of a call.
#[derive(Clone, Debug)]
pub struct Layer {
    /// The loss of the outputs, which are its logits. Its own gradients are not used.
    pub task: Task,
    pub features: usize,
    /// `[rows, features, 1]`.
    pub hidden: Operand,
    /// `[classes, features, 1]`.
    pub weight: Operand,
    /// `[1, classes, 1]`.
    pub bias: Option<Operand>,
    /// Where the gradients of hidden, weight and bias go, with what they hold before.
    pub grads: [Option<Operand>; 3],
    /// Calls add a gradient to what it holds.
    pub accumulates: [bool; 3],
    pub workspace: usize,
    /// Calls ask for the lse, a result of ignored rows too.
    pub asks_lse: bool,
}

/// Which call.
#[derive(Clone, Copy, Debug)]
pub enum Pass<'a> {
    /// Without targets.
    Evaluate,
    Forward,
    Fused,
    Backward(&'a [f64]),
}

/// The results of a call. A gradient that is not asked for is empty.
#[derive(Clone, Debug, Default)]
pub struct LayerAnswer {
    pub results: Answer,
    pub grads: [Vec<f64>; 3],
}

pub const GRADIENTS: [&str; 3] = ["hidden", "weight", "bias"];

/// The steps of a chain of products.
const CHAIN: usize = 256;

/// The outputs of a layer: chains of 256 fused multiply-adds over the features, added to the bias in their order. Those
/// of bf16 take the second feature of a pair first, and subnormal numbers for zeros.
pub fn outputs(hidden: &Operand, weight: &Operand, bias: Option<&Operand>) -> Operand {
    let ([rows, features, _], [classes, ..]) = (hidden.sizes, weight.sizes);
    let (is_wide, is_bf16) = (hidden.dtype == Dtype::F64, hidden.dtype == Dtype::Bf16);
    let output = |row: usize, class: usize| {
        let h = &hidden.values[row * features..][..features];
        let w = &weight.values[class * features..][..features];
        let chains = h.chunks(CHAIN).zip(w.chunks(CHAIN));
        if is_wide {
            let start = bias.map(|bias| bias.values[class]);
            let sums =
                chains.map(|(h, w)| h.iter().zip(w).fold(0.0, |sum, (h, w)| fused(*h, *w, sum)));
            start.into_iter().chain(sums).reduce(|sum, chain| sum + chain).unwrap_or(0.0)
        } else {
            let normal = |x: f32| {
                if is_bf16 && x.is_subnormal() { 0f32.copysign(x) } else { x }
            };
            let start = bias.map(|bias| normal(bias.values[class] as f32));
            let sums = chains.map(|(h, w)| {
                let step = |sum: f32, (h, w): (&f64, &f64)| {
                    normal(fused_f32(normal(*h as f32), normal(*w as f32), sum))
                };
                if is_bf16 {
                    let pairs = h.chunks(2).zip(w.chunks(2));
                    pairs.flat_map(|(h, w)| h.iter().zip(w).rev()).fold(0.0, step)
                } else {
                    h.iter().zip(w).fold(0.0, step)
                }
            });
            let sums = start.into_iter().chain(sums);
            f64::from(sums.reduce(|sum, chain| normal(sum + chain)).unwrap_or(0.0))
        }
    };
    let values: Vec<f64> = (0..rows * classes).map(|i| output(i / classes, i % classes)).collect();
    let dtype = if is_wide { Dtype::F64 } else { Dtype::F32 };
    Operand::packed(dtype, [rows, classes, 1], &values)
}

/// Where gradients go.
struct Gradients([Option<Placed>; 3]);

impl Gradients {
    fn output(&mut self) -> LinearGrads<'_> {
        let [hidden, weight, bias] = &mut self.0;
        LinearGrads {
            hidden: hidden.as_mut().map(Placed::output),
            weight: weight.as_mut().map(Placed::output),
            bias: bias.as_mut().map(Placed::output),
        }
    }

    /// Checks what was written.
    #[track_caller]
    fn take(&self) -> [Vec<f64>; 3] {
        let take = |i: usize| self.0[i].as_ref().map_or(Vec::new(), |of| of.take(GRADIENTS[i]));
        [0, 1, 2].map(take)
    }
}

impl Layer {
    /// A layer with every option at its default and every operand packed.
    pub fn new(hidden: Operand, weight: Operand, bias: Option<Operand>, targets: Operand) -> Layer {
        let ([rows, features, _], [classes, ..]) = (hidden.sizes, weight.sizes);
        let logits = outputs(&hidden, &weight, bias.as_ref());
        let grads = [[rows, features, 1], [classes, features, 1], [1, classes, 1]];
        Layer {
            task: Task::new(logits, targets),
            features,
            grads: grads.map(|sizes| Some(Operand::zeros(hidden.dtype, sizes))),
            hidden,
            weight,
            bias,
            accumulates: [false; 3],
            workspace: 0,
            asks_lse: true,
        }
    }

    fn gradients(&self) -> Gradients {
        let place = |i: usize| {
            let grad = self.grads[i].as_ref();
            grad.map(|to| if self.accumulates[i] { to.place() } else { to.place_poisoned() })
        };
        Gradients([0, 1, 2].map(place))
    }

    /// Makes the call. Every output is poisoned before it and checked after it.
    #[track_caller]
    pub fn run(&self, pass: Pass<'_>, how: &How<'_>) -> LayerAnswer {
        self.try_run(pass, how).expect("a valid layer")
    }

    pub fn try_run(&self, pass: Pass<'_>, how: &How<'_>) -> Result<LayerAnswer, Error> {
        let task = &self.task;
        let factors = task.factors();
        let (hidden, weight) = (self.hidden.place(), self.weight.place());
        let bias = self.bias.as_ref().map(Operand::place);
        let targets = task.targets.as_ref().map(Operand::place);
        let mut grads = self.gradients();
        let mut linear = Linear::new(task.builder(task.classes, &factors, how), self.features)
            .workspace(self.workspace)
            .accumulate_hidden(self.accumulates[0])
            .accumulate_weight(self.accumulates[1])
            .accumulate_bias(self.accumulates[2]);
        if let Some(bias) = &bias {
            linear = linear.bias(bias.input());
        }
        let (h, w) = (hidden.input(), weight.input());
        let t = || targets.as_ref().expect("a call with targets").input();
        let results = match pass {
            Pass::Evaluate => {
                task.with_results(false, true, |results| linear.evaluate(h, w, results))?
            }
            Pass::Forward => task.with_results(true, self.asks_lse, |results| {
                linear.forward_with(h, w, t(), results)
            })?,
            Pass::Fused => task.with_results(true, self.asks_lse, |results| {
                linear.forward_backward_with(h, w, t(), grads.output(), results)
            })?,
            Pass::Backward(lse) => {
                linear.backward(h, w, t(), lse, grads.output())?;
                Answer::default()
            }
        };
        let inputs = [
            (Some(&hidden), "hidden"),
            (Some(&weight), "weight"),
            (bias.as_ref(), "bias"),
            (targets.as_ref(), "targets"),
            (factors.class_weights.as_ref(), "class weights"),
            (factors.row_weights.as_ref(), "row weights"),
            (factors.row_mask.as_ref(), "row mask"),
            (factors.grad_output.as_ref(), "grad_output"),
        ];
        for (input, what) in inputs {
            if let Some(input) = input {
                input.assert_untouched(what);
            }
        }
        if matches!(pass, Pass::Evaluate | Pass::Forward) {
            return Ok(LayerAnswer { results, ..LayerAnswer::default() });
        }
        Ok(LayerAnswer { results, grads: grads.take() })
    }

    /// Makes every call that the layer allows. A backward gets the lse of a forward.
    #[track_caller]
    pub fn run_all(&self, how: &How<'_>) -> Vec<(&'static str, LayerAnswer)> {
        let mut all = vec![("evaluate", self.run(Pass::Evaluate, how))];
        if self.task.targets.is_some() {
            let asking = Layer { asks_lse: true, ..self.clone() };
            let forward = asking.run(Pass::Forward, how);
            let lse = forward.results.lse.clone();
            all.push(("forward", forward));
            all.push(("fused", self.run(Pass::Fused, how)));
            all.push(("backward", self.run(Pass::Backward(&lse), how)));
        }
        all
    }
}

impl LayerAnswer {
    /// Asserts that both have the same bits.
    #[track_caller]
    pub fn assert_same(&self, other: &LayerAnswer, what: &str) {
        self.results.assert_same_losses(&other.results, what);
        for (i, name) in GRADIENTS.iter().enumerate() {
            same_bits(&self.grads[i], &other.grads[i], &format!("{what}: gradient of {name}"));
        }
    }
}

/// An entry of a gradient of the layer by the oracle, and its bound before it is stored.
#[derive(Clone, Copy, Default)]
struct Entry {
    sum: f64,
    /// What the terms may be off by together.
    bound: f64,
    /// The sum of the terms' absolute values.
    size: f64,
    terms: usize,
    /// A term is NaN or infinite by its factor from the logits; so is the sum.
    is_undefined: bool,
    /// Nothing is promised: factors leave their range, or the products of 0 and infinity.
    is_open: bool,
}

impl Entry {
    /// Adds `g·x`, where `g` may be off by `bound`.
    fn add(&mut self, g: f64, bound: f64, x: f64) {
        if !g.is_finite() {
            self.is_undefined = true;
        } else if !x.is_finite() {
            self.is_open = true;
        } else {
            self.sum += g * x;
            self.size += (g * x).abs();
            self.bound += bound * x.abs();
            self.terms += 1;
        }
    }
}

impl Layer {
    /// By how much the gradient of a logit may be off when it is multiplied with `x`: products of bf16 round it to bf16,
    /// and take subnormal numbers for zeros.
    pub fn rounding_in_product(&self, g: f64, x: f64) -> f64 {
        let least = f64::from(f32::MIN_POSITIVE);
        if self.hidden.dtype != Dtype::Bf16 {
            0.0
        } else if g.abs().min(x.abs()) < least {
            g.abs()
        } else {
            1.001 * 2f64.powi(-8) * g.abs()
        }
    }
}

/// The gradients of a layer by the oracle.
pub struct LayerJudge<'a> {
    pub layer: &'a Layer,
    pub judge: Judge<'a>,
}

impl<'a> LayerJudge<'a> {
    pub fn new(layer: &'a Layer) -> LayerJudge<'a> {
        LayerJudge { layer, judge: Judge::new(&layer.task) }
    }

    /// The judge of gradients and losses from merged states.
    pub fn of_shards(layer: &'a Layer) -> LayerJudge<'a> {
        LayerJudge { layer, judge: Judge::of_shards(&layer.task) }
    }

    /// Checks the gradients that a call has written; `lse` is the input of a backward.
    #[track_caller]
    pub fn gradients(&self, grads: &[Vec<f64>; 3], lse: Option<&[f64]>) {
        let Layer { task, features, .. } = self.layer;
        let (classes, features) = (task.classes, *features);
        let mut entries =
            [task.rows * features, classes * features, classes].map(|n| vec![Entry::default(); n]);
        let [hidden, weight, bias] = &mut entries;
        for row in 0..task.rows {
            if !self.judge.is_kept(row) || self.judge.row_weight(row) == 0.0 {
                continue;
            }
            let of_row = self.judge.gradient_of_row(row, lse);
            let leaves_range = self.judge.factors_leave_range(row);
            for (class, bias) in bias.iter_mut().enumerate() {
                let g = self.judge.out.grad_logits[row * classes + class];
                let bound = self.judge.bound_of_gradient(&of_row, class);
                let is_open = leaves_range || self.exceeds(g.abs() + bound);
                let add = |entry: &mut Entry, bound: f64, x: f64| {
                    entry.is_open |= is_open;
                    entry.add(g, bound, x);
                };
                let of_product = |x| bound + self.layer.rounding_in_product(g, x);
                for feature in 0..features {
                    let (h, w) = (row * features + feature, class * features + feature);
                    let (x_w, x_h) = (self.layer.weight.values[w], self.layer.hidden.values[h]);
                    add(&mut hidden[h], of_product(x_w), x_w);
                    add(&mut weight[w], of_product(x_h), x_h);
                }
                add(bias, bound, 1.0);
            }
        }
        for (i, entries) in entries.iter().enumerate() {
            self.check(i, entries, &grads[i]);
        }
    }

    /// The number leaves the range of the lanes, or nearly does.
    fn exceeds(&self, x: f64) -> bool {
        let most = if self.is_wide() { 1e300 } else { 1e37 };
        x.is_finite() && x > most
    }

    fn is_wide(&self) -> bool {
        self.layer.hidden.dtype == Dtype::F64
    }

    /// Checks one of the gradients.
    #[track_caller]
    fn check(&self, i: usize, entries: &[Entry], grad: &[f64]) {
        let Some(to) = &self.layer.grads[i] else {
            return assert!(grad.is_empty());
        };
        assert_eq!(grad.len(), entries.len());
        // Half an ulp of the lanes, and their smallest normal number.
        let (unit, least) = match self.is_wide() || i == 2 {
            true => (2f64.powi(-53), 1e-300),
            false => (2f64.powi(-24), 1e-37),
        };
        for (j, entry) in entries.iter().enumerate() {
            let before = if self.layer.accumulates[i] { to.values[j] } else { 0.0 };
            let what = || format!("gradient of {}, element {j}", GRADIENTS[i]);
            let got = grad[j];
            if entry.is_open || self.exceeds(entry.size + entry.bound) {
                continue;
            }
            if entry.terms == 0 && !entry.is_undefined {
                assert!(got == before, "{}: {got:e} though nothing reaches it", what());
                continue;
            }
            if entry.is_undefined {
                assert!(!got.is_finite(), "{}: {got:e}", what());
                continue;
            }
            let sum = before + entry.sum;
            let roundings = (entry.terms.min(CHAIN) + entry.terms / CHAIN + 4) as f64;
            let mut bound =
                entry.bound + roundings * (unit * entry.size + f64::min(least, entry.size));
            if self.layer.accumulates[i] {
                bound += roundings * unit * before.abs();
            }
            bound += 1.02 * to.dtype.half_ulp(sum.abs() + bound);
            close_stored(to.dtype, got, sum, bound, what);
        }
    }

    /// Checks the answers of [`Layer::run_all`].
    #[track_caller]
    pub fn check_answers(&self, answers: &[(&'static str, LayerAnswer)]) {
        let forward = answers.iter().find(|(call, _)| *call == "forward");
        for (call, answer) in answers {
            match *call {
                "fused" => {
                    self.judge.losses(&answer.results);
                    self.gradients(&answer.grads, None);
                }
                "backward" => {
                    let lse = forward.map(|(_, forward)| forward.results.lse.as_slice());
                    self.gradients(&answer.grads, lse);
                }
                _ => {
                    self.judge.losses(&answer.results);
                }
            }
        }
    }
}
