//! Problems as Rust source: `cargo fuzz fmt` prints a test that lacks a name.

use common::Reduction;
use common::layer::Layer;
use common::operand::Operand;
use common::task::{Task, Wants};
use std::fmt::{Formatter, Result};

/// A number as an expression.
pub fn number(x: f64) -> String {
    match x {
        _ if x.is_nan() => "f64::NAN".to_string(),
        f64::INFINITY => "f64::INFINITY".to_string(),
        f64::NEG_INFINITY => "f64::NEG_INFINITY".to_string(),
        _ => format!("{x:?}"),
    }
}

/// A list of numbers as an expression; a repeated number is written once.
pub fn numbers(values: &[f64]) -> String {
    let mut runs: Vec<(f64, usize)> = Vec::new();
    for &x in values {
        match runs.last_mut() {
            Some((last, n)) if last.to_bits() == x.to_bits() => *n += 1,
            _ => runs.push((x, 1)),
        }
    }
    match runs.as_slice() {
        [] => "vec![]".to_string(),
        [(x, n)] => format!("vec![{}; {n}]", number(*x)),
        runs if 3 * runs.len() < values.len() => {
            let runs: Vec<String> =
                runs.iter().map(|(x, n)| format!("vec![{}; {n}]", number(*x))).collect();
            format!("[{}].concat()", runs.join(", "))
        }
        _ => {
            let all: Vec<String> = values.iter().map(|&x| number(x)).collect();
            format!("vec![{}]", all.join(", "))
        }
    }
}

fn operand(operand: &Operand) -> String {
    format!(
        "Operand {{ dtype: Dtype::{:?}, sizes: {:?}, strides: {:?}, offset: {}, values: {} }}",
        operand.dtype,
        operand.sizes,
        operand.strides,
        operand.offset,
        numbers(&operand.values)
    )
}

/// A test of the problem: `fn name() { .. }`.
pub fn task(f: &mut Formatter<'_>, task: &Task) -> Result {
    let Task { rows, classes, inner, .. } = *task;
    writeln!(f, "#[test]\nfn name_it() {{")?;
    writeln!(f, "    // {rows} rows, {classes} classes, {inner} positions")?;
    writeln!(f, "    let logits = {};", operand(&task.logits))?;
    writeln!(f, "    let targets = {};", targets(task))?;
    writeln!(f, "    agree(&Task {{")?;
    fields(f, task)?;
    for (name, output) in [("grad", &task.grad), ("grad_targets", &task.grad_targets)] {
        writeln!(f, "        {name}: {},", operand(output))?;
    }
    writeln!(f, "        ..Task::new(logits, targets)\n    }});\n}}")
}

/// The fields that differ from those of a new task, without logits and their gradients.
fn fields(f: &mut Formatter<'_>, task: &Task) -> Result {
    if task.targets.is_none() {
        writeln!(f, "        targets: None,")?;
    }
    for (name, value) in [
        ("class_weights", &task.class_weights),
        ("row_weights", &task.row_weights),
        ("target_classes", &task.target_classes),
        ("row_mask", &task.row_mask),
        ("grad_output", &task.grad_output),
    ] {
        if let Some(value) = value {
            writeln!(f, "        {name}: Some({}),", operand(value))?;
        }
    }
    if task.ignore_index != -100 {
        writeln!(f, "        ignore_index: {},", task.ignore_index)?;
    }
    for (name, value, default) in [
        ("label_smoothing", task.label_smoothing, 0.0),
        ("z_loss", task.z_loss, 0.0),
        ("target_scale", task.target_scale, 0.0),
        ("softcap", task.softcap, 0.0),
        ("logit_scale", task.logit_scale, 1.0),
        ("normalizer", task.normalizer, 0.0),
        ("z_normalizer", task.z_normalizer, 0.0),
        ("grad_scale", task.grad_scale, 1.0),
        ("entropy_bonus", task.entropy_bonus, 0.0),
    ] {
        if value != default {
            writeln!(f, "        {name}: {},", number(value))?;
        }
    }
    for (name, value) in [
        ("log_probs", task.log_probs),
        ("empty_is_zero", task.empty_is_zero),
        ("accumulate", task.accumulate),
    ] {
        if value {
            writeln!(f, "        {name}: true,")?;
        }
    }
    if task.reduction != Reduction::Sum {
        writeln!(f, "        reduction: Reduction::{:?},", task.reduction)?;
    }
    for (name, output) in [
        ("row_losses", &task.row_losses),
        ("entropy", &task.entropy),
        ("kl", &task.kl),
        ("top_log_probs", &task.top_log_probs),
    ] {
        writeln!(f, "        {name}: {},", operand(output))?;
    }
    let wants = task.wants;
    if wants != Wants::ALL {
        writeln!(f, "        wants: {wants:?},")?;
    }
    Ok(())
}

/// A test of a layer: `fn name() { .. }`.
pub fn layer(f: &mut Formatter<'_>, layer: &Layer) -> Result {
    let task = &layer.task;
    writeln!(f, "#[test]\nfn name_it() {{")?;
    writeln!(
        f,
        "    // {} rows, {} classes, {} features",
        task.rows, task.classes, layer.features
    )?;
    let maybe = |of: &Option<Operand>| match of {
        Some(of) => format!("Some({})", operand(of)),
        None => "None".to_string(),
    };
    writeln!(f, "    let hidden = {};", operand(&layer.hidden))?;
    writeln!(f, "    let weight = {};", operand(&layer.weight))?;
    writeln!(f, "    let bias = {};", maybe(&layer.bias))?;
    writeln!(f, "    let targets = {};", targets(task))?;
    writeln!(f, "    let layer = Layer::new(hidden, weight, bias, targets);")?;
    writeln!(f, "    let task = Task {{")?;
    fields(f, task)?;
    writeln!(f, "        ..layer.task.clone()\n    }};")?;
    let [hidden, weight, bias] = layer.grads.each_ref().map(maybe);
    writeln!(f, "    let grads = [{hidden}, {weight}, {bias}];")?;
    let (accumulates, workspace, asks_lse) = (layer.accumulates, layer.workspace, layer.asks_lse);
    writeln!(f, "    let layer = Layer {{ task, grads, workspace: {workspace}, ..layer }};")?;
    writeln!(f, "    let (accumulates, asks_lse) = ({accumulates:?}, {asks_lse});")?;
    writeln!(f, "    agree_on_layer(&Layer {{ accumulates, asks_lse, ..layer }});\n}}")
}

/// The targets; code that follows removes those that a problem does not have.
fn targets(task: &Task) -> String {
    match &task.targets {
        Some(targets) => operand(targets),
        None => format!("Operand::zeros(Dtype::U8, [{}, 1, {}])", task.rows, task.inner),
    }
}
