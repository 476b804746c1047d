//! The oracle, `common::reference`, against exact results that share no code with it: those of
//! tests/golden/generate.py.

#[path = "golden/vectors.rs"]
mod vectors;

use common::reference::{self, Reduction};
use vectors::*;

/// The bound, relative to the largest term. Exact results are rounded to f64, and the oracle computes in
/// f64.
const BOUND: f64 = 2e-15;

/// Asserts that both are of one kind and within BOUND of `scale`; returns the error in units of it.
#[track_caller]
fn agree(case: &Case, what: &str, got: &[f64], want: &[f64], scale: impl Fn(usize) -> f64) -> f64 {
    assert_eq!(got.len(), want.len(), "{}: {what}", case.name);
    let mut worst = 0f64;
    for (i, (&got, &want)) in got.iter().zip(want).enumerate() {
        if got == want || got.is_nan() && want.is_nan() {
            continue;
        }
        let error = (got - want).abs() / scale(i).abs().max(want.abs());
        assert!(error <= BOUND, "{}: {what}[{i}] is {got:e}, not {want:e}", case.name);
        worst = worst.max(error / BOUND);
    }
    worst
}

fn cross_entropy(case: &Case) -> f64 {
    let out = reference::evaluate(&case.problem());
    let largest = |terms: &[f64]| terms.iter().fold(0.0, |m: f64, x| m.max(x.abs()));
    let mut worst = 0f64;
    let mut check = |key: &str, got: &[f64], scale: &dyn Fn(usize) -> f64| {
        if let Some(want) = case.find(key) {
            worst = worst.max(agree(case, key, got, &want.to_f64(), scale));
        }
    };
    let mean = if case.reduction() == Reduction::Mean { out.normalizer } else { 1.0 };
    check("loss", &[out.loss], &|_| largest(&out.loss_scale) / mean);
    check("rows", &out.row_losses, &|i| out.loss_scale[i]);
    check("lse", &out.lse, &|i| out.lse_scale[i]);
    check("entropy", &out.entropy, &|i| out.lse_scale[i]);
    // An error of t moves t·ln t by as much, whatever ln t is.
    check("kl", &out.kl, &|i| 1.0 + out.kl_scale[i]);
    check("grad", &out.grad_logits, &|i| out.grad_magnitude[i]);
    check("grad_targets", &out.grad_targets, &|_| 0.0);
    if let Some(argmax) = case.find("argmax") {
        assert_eq!(out.argmax, argmax.to_i64(), "{}", case.name);
    }
    worst
}

fn every(source: Source) {
    let worst = load(source).iter().map(cross_entropy).fold(0.0, f64::max);
    println!("{}: at worst {worst:.2} of the bound", source.0);
}

/// The oracle's outputs are rounded once each, which moves losses and gradients by as much as the logits are long.
fn linear(case: &Case) -> f64 {
    let [hidden, weight] = ["hidden", "weight"].map(|key| case.tensor(key).to_f64());
    let bias = case.find("bias").map(Tensor::to_f64);
    let features = case.number("features", 0.0) as usize;
    let logits = reference::outputs(&hidden, &weight, bias.as_deref(), features);
    let longest = logits.iter().filter(|x| x.is_finite()).fold(1.0, |m: f64, x| m.max(x.abs()));
    let out = reference::evaluate(&case.problem_of(logits));
    let grads = reference::gradients_of_layer(&out.grad_logits, &hidden, &weight, features);
    // The sizes of all terms instead of the terms.
    let sizes: [Vec<f64>; 3] = [&out.grad_magnitude, &hidden, &weight]
        .map(|x| x.iter().map(|x| if x.is_finite() { x.abs() } else { 0.0 }).collect());
    let sizes = reference::gradients_of_layer(&sizes[0], &sizes[1], &sizes[2], features);
    let mean = if case.reduction() == Reduction::Mean { out.normalizer } else { 1.0 };
    let total: f64 = out.loss_scale.iter().filter(|x| x.is_finite()).sum();
    let mut worst = 0f64;
    let mut check = |key: &str, got: &[f64], scale: &dyn Fn(usize) -> f64| {
        if let Some(want) = case.find(key) {
            worst = worst.max(agree(case, key, got, &want.to_f64(), |i| longest * scale(i)));
        }
    };
    check("loss", &[out.loss], &|_| total / mean);
    check("rows", &out.row_losses, &|i| out.loss_scale[i]);
    check("lse", &out.lse, &|i| out.lse_scale[i]);
    check("entropy", &out.entropy, &|i| out.lse_scale[i]);
    for (i, key) in ["grad_hidden", "grad_weight", "grad_bias"].into_iter().enumerate() {
        check(key, &grads[i], &|j| sizes[i][j]);
    }
    if let Some(argmax) = case.find("argmax") {
        assert_eq!(out.argmax, argmax.to_i64(), "{}", case.name);
    }
    worst
}

#[test]
fn linear_layers() {
    let worst = load(LINEAR).iter().map(linear).fold(0.0, f64::max);
    println!("{}: at worst {worst:.2} of the bound", LINEAR.0);
}

#[test]
fn index_targets() {
    every(INDEX);
}

#[test]
fn probability_targets() {
    every(SOFT);
}

#[test]
fn log_probabilities() {
    every(NLL);
}

#[test]
fn composed() {
    every(COMPOSED);
}

#[test]
fn entropy_bonus() {
    every(BONUS);
}

#[test]
fn distillation() {
    every(DISTILLATION);
}

#[test]
fn introductions() {
    every(INTRO);
}

#[test]
fn softmax_and_log_softmax() {
    for case in load(SOFTMAX) {
        let [rows, classes, inner] = case.dims();
        let softmax = case.text("call") == Some("softmax");
        let y = match softmax {
            true => reference::softmax(&case.tensor("x").to_f64(), rows, classes, inner),
            false => reference::log_softmax(&case.tensor("x").to_f64(), rows, classes, inner),
        };
        agree(&case, "y", &y, &case.tensor("y").to_f64(), |_| 0.0);
        if let Some(grad_y) = case.find("grad_y") {
            let (y, grad_y) = (case.tensor("torch_y").to_f64(), grad_y.to_f64());
            let grad = match softmax {
                true => reference::softmax_backward(&y, &grad_y, rows, classes, inner),
                false => reference::log_softmax_backward(&y, &grad_y, rows, classes, inner),
            };
            // The terms that cancel are at most the largest gradient times the number of classes.
            let largest = grad_y.iter().fold(0.0, |m: f64, g| m.max(g.abs())) * classes as f64;
            agree(&case, "grad", &grad, &case.tensor("grad").to_f64(), |_| largest);
        }
    }
}
