//! Linear layers against PyTorch and against exact results, from tests/golden/generate.py.
//!
//! # How errors are compared
//!
//! The **error** of a result is its distance to the exact result of the stored operands, over all elements (L2). The
//! **size** of an element is the sum of the absolute values of its terms: of `g_nc·W_cd` over the classes, of
//! `g_nc·H_nd` and of `g_nc` over the rows. Those of a loss are its row losses and the largest logits of its rows, from
//! which rows are made. Every result has an error of at most
//!
//! ```text
//! losses                1e-7 of the size, for f32 and halves alike; 1e-15 for f64 operands
//! gradients in f32      1e-6 of the size; 1e-14 in f64
//! gradients in halves   half an ulp of each element, and 1e-6 of the size
//! from bf16 operands    and half an ulp of each gradient of a logit that a product takes
//! ```
//!
//! and is **no worse than PyTorch's**, by F.linear and CrossEntropyLoss or by F.linear_cross_entropy: its error exceeds
//! that of PyTorch, and half an ulp of each element, by nothing in f16 and in the losses of halves. Products of bf16
//! round each gradient of a logit, by PyTorch and here: a case may be worse by as much as independent roundings make, and
//! the mean over all cases is better. In f32 and f64 either may happen to round better. There the error exceeds PyTorch's
//! by half an ulp of each size at most. For gradients the terms count
//! `1 + |ln p|/4` times, which is the cost of sums in base 2^f32(log2 e) (docs/design.md); two ulp are allowed in f64, as in
//! tests/golden.rs; and all of this counts `√n/2` times where n > 4 products are one chain, which rounds n times.
//! PyTorch adds such sums up in more lanes: its gradient of the hidden states of 300 classes is five times as accurate.
//!
//! A backward from an f64 lse may be off by a further `2⁻⁵²·|lse|·p`, and results of merged states by what the accuracy
//! table of docs/semantics.md adds. Where PyTorch's result is not finite and the exact one is (`differs=`, explained in
//! generate.py), the first rule alone applies.
//!
//! Every case runs on every instruction set, lean and with kept logits: the losses alone, all gradients, each of them
//! alone, in f32, from the lse, and with its classes in shards. Each answer is held against the oracle too, with the
//! bounds of its own logits (`LayerJudge`).

#[path = "golden/vectors.rs"]
mod vectors;

use common::layer::{GRADIENTS, Layer, LayerAnswer, LayerJudge, Pass};
use common::operand::{Dtype, Operand};
use common::random::Rng;
use common::split::{Split, shards_of_layer};
use common::{How, isas, some};
use std::collections::BTreeMap;
use vectors::*;
use xent::Reduction;

/// A workspace that keeps the logits of a chunk of rows.
const CHUNKS: usize = 64 << 20;

fn norm(x: impl IntoIterator<Item = f64>) -> f64 {
    x.into_iter().map(|x| x * x).sum::<f64>().sqrt()
}

fn finite(x: f64) -> f64 {
    if x.is_finite() { x.abs() } else { 0.0 }
}

/// What gradients and losses are made from.
#[derive(Clone, Copy, PartialEq)]
enum Basis {
    Logits,
    /// An lse, which is rounded to f64.
    Lse,
    /// Merged states, whose lse is rounded by each merge.
    States,
}

/// The errors of a dtype's gradients and losses, relative to the exact results, case by case.
type Errors = BTreeMap<(String, &'static str), Vec<f64>>;

/// A case, its layer, and the sizes of its results.
struct Golden<'a> {
    case: &'a Case,
    /// The largest logit of each row, and the size of the reduced loss.
    reach: Vec<f64>,
    loss: f64,
    /// The sizes of each gradient's elements, with and without the cost of exponentials, what an lse may move, and what
    /// products of bf16 round.
    sizes: [Vec<f64>; 3],
    rounded: [Vec<f64>; 3],
    /// What they round if the roundings are independent, in L2.
    luck: [f64; 3],
    costs: [Vec<f64>; 3],
    from_lse: [Vec<f64>; 3],
    lse: Vec<f64>,
}

impl<'a> Golden<'a> {
    fn new(case: &'a Case, layer: &Layer) -> Golden<'a> {
        let LayerJudge { judge, .. } = LayerJudge::new(layer);
        let (out, task, features) = (&judge.out, &layer.task, layer.features);
        let (rows, classes) = (task.rows, task.classes);
        let largest = |row: &[f64]| row.iter().fold(0.0, |m: f64, &x| m.max(finite(x)));
        let reach: Vec<f64> = task.logits.values.chunks(classes).map(largest).collect();
        let kept = (0..rows).filter(|&row| judge.is_kept(row));
        let total: f64 = kept.map(|row| reach[row].max(finite(out.row_losses[row]))).sum();
        let mean = task.reduction == Reduction::Mean;
        let normalizer = if mean { out.normalizer.abs() } else { 1.0 };
        let is_half = layer.hidden.dtype.is_half();
        let mut luck = [0.0; 3];
        let zeros = || [rows * features, classes * features, classes].map(|len| vec![0.0; len]);
        let [mut sizes, mut costs, mut from_lse, mut rounded] =
            [zeros(), zeros(), zeros(), zeros()];
        for row in (0..rows).filter(|&row| judge.is_kept(row)) {
            let of_row = judge.gradient_of_row(row, None);
            for class in 0..classes {
                let at = row * classes + class;
                let g = finite(out.grad_logits[at]);
                let cost = if is_half { 1.0 } else { 1.0 + finite(judge.nll(at)) / 4.0 };
                let p = (-judge.nll(at)).exp();
                let moved = finite(of_row.scale() * judge.slope(at) * p * out.lse[row]);
                let mut add = |i: usize, j: usize, x: f64| {
                    sizes[i][j] += g * finite(x);
                    costs[i][j] += g * finite(x) * cost;
                    from_lse[i][j] += f64::EPSILON * moved * finite(x);
                    if i < 2 {
                        let rounding = layer.rounding_in_product(g, x) * finite(x);
                        rounded[i][j] += rounding;
                        luck[i] += rounding * rounding;
                    }
                };
                for feature in 0..features {
                    let (h, w) = (row * features + feature, class * features + feature);
                    add(0, h, layer.weight.values[w]);
                    add(1, w, layer.hidden.values[h]);
                }
                add(2, class, 1.0);
            }
        }
        let luck = luck.map(f64::sqrt);
        let (loss, lse) = (total / normalizer, out.lse.clone());
        Golden { case, reach, loss, sizes, rounded, luck, costs, from_lse, lse }
    }

    /// Checks the results of a call.
    fn check(
        &self,
        answer: &LayerAnswer,
        basis: Basis,
        layer: &Layer,
        what: &str,
        errors: &mut Errors,
    ) {
        let at = format!("{}, {what}", self.case.name);
        let loss = answer.results.loss;
        for (key, got, sizes) in [
            ("loss", loss.as_slice(), &[self.loss][..]),
            ("rows", &answer.results.row_losses, &self.reach),
            ("lse", &answer.results.lse, &self.reach),
        ] {
            self.losses(key, got, sizes, basis, layer, &at, errors);
        }
        for (i, name) in GRADIENTS.iter().enumerate() {
            if answer.grads[i].is_empty() {
                continue;
            }
            let key = format!("grad_{name}");
            let roundings = match basis {
                Basis::Logits => 0.0,
                Basis::Lse => 1.0,
                Basis::States => 4.0,
            };
            let slack = roundings * norm(self.from_lse[i].iter().copied());
            self.gradient(&key, i, &answer.grads[i], slack, layer, &at, errors);
        }
    }

    /// Exact results that are the same in kind, and the distance to them.
    fn distance(&self, key: &str, got: &[f64], at: &str) -> Option<(Vec<f64>, f64)> {
        let exact = self.case.find(key)?.to_f64();
        assert_eq!(got.len(), exact.len(), "{at}: {key}");
        for (i, (&got, &exact)) in got.iter().zip(&exact).enumerate() {
            let same = got.is_finite() && exact.is_finite()
                || got == exact
                || got.is_nan() && exact.is_nan();
            assert!(same, "{at}: {key}[{i}] is {got:e}, not {exact:e}");
        }
        Some((exact.clone(), distance(got, &exact)))
    }

    /// PyTorch's distance to the exact result, if its result is finite where that is.
    fn distance_of_torch(&self, key: &str, exact: &[f64]) -> Option<f64> {
        let torch = self.case.find(&format!("torch_{key}"))?.to_f64();
        let is_finite = torch.iter().zip(exact).all(|(t, e)| t.is_finite() || !e.is_finite());
        is_finite.then(|| distance(&torch, exact))
    }

    #[allow(clippy::too_many_arguments, reason = "a result, and what it is held against")]
    fn losses(
        &self,
        key: &str,
        got: &[f64],
        sizes: &[f64],
        basis: Basis,
        layer: &Layer,
        at: &str,
        errors: &mut Errors,
    ) {
        if got.is_empty() {
            return;
        }
        let Some((exact, error)) = self.distance(key, got, at) else { return };
        let wide = layer.hidden.dtype == Dtype::F64;
        let sizes = || exact.iter().zip(sizes).map(|(x, &size)| finite(*x).max(size));
        // 2^-50·(|M·lse| + Σ |m·x|) of a row, for masses that add up to 1.
        let of_states = if basis == Basis::States { 2f64.powi(-49) * norm(sizes()) } else { 0.0 };
        let error = (error - of_states).max(0.0);
        let bound = if wide { 1e-15 } else { 1e-7 } * norm(sizes());
        assert!(error <= bound, "{at}: {key} is off by {error:e}, not {bound:e}");
        if let Some(torch) = self.distance_of_torch(key, &exact) {
            let like = self.case.tensor(&format!("torch_{key}"));
            let unit = norm(sizes().map(|size| like.ulp(size)));
            let half = layer.hidden.dtype.is_half();
            let worst = if half { torch.max(unit / 2.0) } else { torch + unit / 2.0 };
            assert!(
                error <= worst * 1.001,
                "{at}: {key} is off by {error:e}, PyTorch's by {torch:e}"
            );
        }
        if key == "loss" && exact[0].is_finite() && exact[0] != 0.0 {
            let entry = errors.entry((format!("{:?}", layer.hidden.dtype), "loss")).or_default();
            entry.push(error / exact[0].abs());
        }
    }

    #[allow(clippy::too_many_arguments, reason = "a result, and what it is held against")]
    fn gradient(
        &self,
        key: &str,
        i: usize,
        got: &[f64],
        slack: f64,
        layer: &Layer,
        at: &str,
        errors: &mut Errors,
    ) {
        let Some((exact, error)) = self.distance(key, got, at) else { return };
        let stored = layer.grads[i].as_ref().expect("a gradient").dtype;
        let error = (error - slack).max(0.0);
        let half_ulps = || norm(exact.iter().map(|&x| stored.half_ulp(finite(x))));
        let of_size = if layer.hidden.dtype == Dtype::F64 { 1e-14 } else { 1e-6 };
        let mut bound =
            of_size * norm(self.sizes[i].iter().copied()) + norm(self.rounded[i].iter().copied());
        if stored.is_half() {
            bound += half_ulps();
        }
        assert!(error <= bound, "{at}: {key} is off by {error:e}, not {bound:e}");
        if stored != layer.hidden.dtype {
            return;
        }
        if let Some(torch) = self.distance_of_torch(key, &exact) {
            let chain = [layer.task.classes, layer.task.rows, 1][i].min(256) as f64;
            let units =
                if stored == Dtype::F64 { 4.0 } else { 1.0 } * (chain.sqrt() / 2.0).max(1.0);
            let more = norm(self.costs[i].iter().map(|&size| units * stored.half_ulp(size)));
            let half = torch.max(half_ulps()) + self.luck[i];
            let worst = if stored.is_half() { half } else { torch + more };
            assert!(
                error <= worst * 1.001,
                "{at}: {key} is off by {error:e}, PyTorch's by {torch:e}"
            );
            if i < 2 && norm(exact.iter().copied()) > 0.0 {
                let size = norm(exact.iter().map(|&x| finite(x)));
                for (of, error) in [("beside PyTorch", error), ("by PyTorch", torch)] {
                    errors.entry((format!("{stored:?}"), of)).or_default().push(error / size);
                }
            }
        }
        let size = norm(exact.iter().map(|&x| finite(x)));
        if size > 0.0 {
            let name = if i == 2 { "bias" } else { "hidden and weight" };
            errors.entry((format!("{stored:?}"), name)).or_default().push(error / size);
        }
    }
}

fn distance(got: &[f64], exact: &[f64]) -> f64 {
    norm(got.iter().zip(exact).filter(|(_, e)| e.is_finite()).map(|(got, exact)| got - exact))
}

#[test]
fn linear_layers() {
    let mut errors = Errors::new();
    for case in load(LINEAR) {
        let layer = case.layer();
        let golden = Golden::new(&case, &layer);
        for isa in isas() {
            for workspace in [0, CHUNKS] {
                let how = How::on(isa);
                let what = |call: &str| format!("{call}, {}, workspace {workspace}", isa.name());
                let layer = Layer { workspace, ..layer.clone() };
                let answers = layer.run_all(&how);
                LayerJudge::new(&layer).check_answers(&answers);
                for (call, answer) in &answers {
                    let basis = if *call == "backward" { Basis::Lse } else { Basis::Logits };
                    golden.check(answer, basis, &layer, &what(call), &mut errors);
                }
                let from_exact = layer.run(Pass::Backward(&golden.lse), &how);
                golden.check(&from_exact, Basis::Lse, &layer, &what("backward"), &mut errors);
                for (i, name) in GRADIENTS.iter().enumerate() {
                    let mut alone = Layer { asks_lse: false, ..layer.clone() };
                    (0..3).filter(|j| *j != i).for_each(|j| alone.grads[j] = None);
                    let answer = alone.run(Pass::Fused, &how);
                    golden.check(&answer, Basis::Logits, &alone, &what(name), &mut errors);
                }
                if layer.hidden.dtype.is_half() {
                    let wide = |grad: &Operand| Operand::zeros(Dtype::F32, grad.sizes);
                    let grads = layer.grads.each_ref().map(|grad| grad.as_ref().map(wide));
                    let wide = Layer { grads, ..layer.clone() };
                    let answer = wide.run(Pass::Fused, &how);
                    golden.check(&answer, Basis::Logits, &wide, &what("into f32"), &mut errors);
                }
            }
        }
    }
    // Over all cases, whatever the terms: relative to the results, root mean square.
    let mean = |errors: &[f64]| norm(errors.iter().copied()) / (errors.len() as f64).sqrt();
    for dtype in ["Bf16", "F16"].map(String::from) {
        let [ours, theirs] =
            ["beside PyTorch", "by PyTorch"].map(|of| mean(&errors[&(dtype.clone(), of)]));
        assert!(ours < theirs, "{dtype}: gradients are off by {ours:e}, PyTorch's by {theirs:e}");
    }
    for ((dtype, what), errors) in &errors {
        let mean = mean(errors);
        println!("{dtype} {what}: {mean:.2e} over {} calls", errors.len());
        let bound = match (dtype.as_str(), *what) {
            (_, "by PyTorch") => f64::INFINITY,
            // Terms of a few rows and classes cancel.
            ("Bf16", "hidden and weight" | "beside PyTorch") => 3.5e-3,
            ("F64", "loss") => 1e-15,
            (_, "loss") => 1e-7,
            ("F64", _) => 1e-14,
            ("Bf16", _) => 2.5e-3,
            ("F16", _) => 3e-4,
            _ => 1e-6,
        };
        assert!(mean <= bound, "{dtype}: {what} is off by {mean:e}");
    }
}

/// The classes of a layer in shards, some of them empty: losses and gradients have the bounds of the whole.
#[test]
fn shards() {
    let mut errors = Errors::new();
    for case in some(load(LINEAR), 3) {
        let mut layer = case.layer();
        // The parts of the hidden states' gradient are added up here.
        if let Some(hidden) = layer.grads[0].as_mut().filter(|grad| grad.dtype.is_half()) {
            hidden.dtype = Dtype::F32;
        }
        let golden = Golden::new(&case, &layer);
        let classes = layer.task.classes;
        for cuts in [vec![], vec![classes / 3], vec![0, classes / 2, classes / 2, classes - 1]] {
            let split = Split::at(&layer.task, cuts.clone(), &mut Rng::new(classes as u64));
            for isa in isas() {
                let rng = &mut Rng::new(cuts.len() as u64);
                let shards = shards_of_layer(&layer, &split, rng, &How::on(isa));
                shards.check(&layer, &split);
                let answer = LayerAnswer { results: shards.answer, grads: shards.grads };
                let what = format!("cut at {cuts:?}, {}", isa.name());
                golden.check(&answer, Basis::States, &layer, &what, &mut errors);
            }
        }
    }
}
