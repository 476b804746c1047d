//! Checks calls against the oracle before they are timed.
//!
//! Only the benches that time calls include this file: the oracle is a crate of the tests, and
//! `benches/counted` depends on xent alone.

use crate::common::aligned::Aligned;
use crate::common::call::{CAP, Call, Layout, Operands, SCALE, SMOOTHING, Shape, Z_LOSS};
use crate::common::scalar::Scalar;
use ::common::reference::{self, Case, Targets};
use xent::Isa;

/// The largest number of logits that the oracle gets. Its loops take 50 ns for each. Of a larger problem
/// it gets the first rows.
const ELEMENTS: usize = 1 << 17;

/// Ends the bench unless this call agrees with the oracle on `isa`.
pub fn check<T: Scalar>(shape: Shape, call: Call, isa: Isa) {
    let operands = Operands::<T>::new(sample(shape), call);
    let shape = operands.shape;
    let mut x = Aligned::new(&operands.original);
    let mut grad = Aligned::filled(shape.elements(), T::default());
    let got = operands.run(call, isa, 0, &mut x, &mut grad);
    let array = if call.overwrites() { &x } else { &grad };

    let dense = |x: &[T]| -> Vec<f64> {
        let x: Vec<f64> = x.iter().map(|x| x.exact()).collect();
        if shape.layout == Layout::ClassesFirst { transposed(&x, shape.rows) } else { x }
    };
    let (logits, probabilities) = (dense(&operands.original), dense(&operands.probabilities));
    let (scalar, gradient, magnitude) = if call.is_softmax() {
        let gradient = softmax(call, &logits, &probabilities, shape);
        let largest = gradient.iter().fold(0f64, |m, g| m.max(g.abs()));
        let magnitude = gradient.iter().map(|g| g.abs() + 0.01 * largest).collect();
        (0.0, gradient, magnitude)
    } else {
        cross_entropy::<T>(call, &operands, logits, probabilities)
    };

    let name = format!("{} {} {shape} on {}", T::NAME, call.name(), isa.name());
    // A loss is an f64 whatever the dtype of the logits.
    let exact = if size_of::<T>() == 8 { 1e-13 } else { 1e-6 };
    assert!(
        (got - scalar).abs() <= exact * scalar.abs().max(1.0),
        "{name}: {got} instead of {scalar}"
    );
    if matches!(call, Call::Forward | Call::SoftForward | Call::Evaluate) {
        return;
    }
    // A few roundings of the largest term of an entry, of its exponential and of the dtype. A wrong
    // kernel is wrong by far more; the tests have tighter bounds.
    let array = dense(array);
    assert_eq!((array.len(), magnitude.len()), (gradient.len(), gradient.len()));
    for (i, (&got, &want)) in array.iter().zip(&gradient).enumerate() {
        let bound = 4.0 * T::EPSILON.max(exact) * magnitude[i] + T::TINY;
        assert!((got - want).abs() <= bound, "{name}: element {i} is {got:e} instead of {want:e}");
    }
}

/// The shape with fewer rows or positions, if it is too large for the oracle; never fewer classes.
fn sample(shape: Shape) -> Shape {
    let positions = (ELEMENTS / shape.classes).max(1);
    let inner = shape.inner.min(positions);
    Shape { rows: shape.rows.min((positions / inner).max(1)), inner, ..shape }
}

fn transposed(x: &[f64], rows: usize) -> Vec<f64> {
    let classes = x.len() / rows.max(1);
    (0..x.len()).map(|i| x[i % classes * rows + i / classes]).collect()
}

fn softmax(call: Call, x: &[f64], grad_y: &[f64], shape: Shape) -> Vec<f64> {
    let (rows, classes, inner) = (shape.rows, shape.classes, shape.inner);
    match call {
        Call::Softmax => reference::softmax(x, rows, classes, inner),
        Call::LogSoftmax => reference::log_softmax(x, rows, classes, inner),
        Call::SoftmaxBackward => reference::softmax_backward(x, grad_y, rows, classes, inner),
        _ => reference::log_softmax_backward(x, grad_y, rows, classes, inner),
    }
}

fn cross_entropy<T: Scalar>(
    call: Call,
    operands: &Operands<T>,
    logits: Vec<f64>,
    probabilities: Vec<f64>,
) -> (f64, Vec<f64>, Vec<f64>) {
    let shape = operands.shape;
    let mut case = Case::new(shape.rows, shape.classes, shape.inner, logits);
    case.round_scaled_to_f32 = size_of::<T>() != 8;
    case.targets = match call {
        Call::Evaluate => Targets::None,
        call if call.is_soft() => Targets::Probabilities(probabilities),
        _ => Targets::Indices(operands.targets.iter().map(|&t| i64::from(t)).collect()),
    };
    if call == Call::Smoothed {
        (case.label_smoothing, case.z_loss) = (SMOOTHING, Z_LOSS);
    }
    if call == Call::Capped {
        (case.softcap, case.logit_scale) = (CAP, SCALE);
    }
    let outcome = reference::evaluate(&case);
    let sum = |x: &[f64]| x.iter().sum::<f64>();
    match call {
        Call::Backward => {
            // The lse comes from a forward. The gradient of a confident target has its whole error.
            let mut magnitude = outcome.grad_magnitude;
            for (position, &target) in operands.targets.iter().enumerate() {
                let (row, at) = (position / shape.inner, position % shape.inner);
                let entry = (row * shape.classes + target as usize) * shape.inner + at;
                magnitude[entry] = 1.0 / shape.positions() as f64;
            }
            (0.0, outcome.grad_logits, magnitude)
        }
        Call::TargetGradient => {
            let magnitude = outcome.grad_targets.iter().map(|g| g.abs()).collect();
            (0.0, outcome.grad_targets, magnitude)
        }
        Call::Evaluate => {
            let argmax = outcome.argmax.iter().sum::<i64>() as f64;
            (sum(&outcome.lse) + sum(&outcome.entropy) + argmax, Vec::new(), Vec::new())
        }
        _ => (outcome.loss, outcome.grad_logits, outcome.grad_magnitude),
    }
}
