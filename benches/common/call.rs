//! Every call of the library by name, on one kind of operands.

use super::aligned::Aligned;
use super::scalar::{Scalar, logits, targets};
use std::hint::black_box;
use xent::{CrossEntropy, Input, Isa, Output, Results, Softmax};

/// Where the classes of a row lie.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Layout {
    /// Contiguous: `[rows, classes]`.
    Contiguous,
    /// `[rows, classes, inner]`, as the logits of images are.
    Inner,
    /// `[classes, rows]`: the transpose of a matrix.
    ClassesFirst,
}

impl Layout {
    /// All of them.
    pub const ALL: [Layout; 3] = [Layout::Contiguous, Layout::Inner, Layout::ClassesFirst];

    /// As benches print it.
    pub fn name(self) -> &'static str {
        match self {
            Layout::Contiguous => "contiguous",
            Layout::Inner => "inner",
            Layout::ClassesFirst => "classes-first",
        }
    }
}

/// The extent of a problem.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Shape {
    pub layout: Layout,
    pub rows: usize,
    pub classes: usize,
    pub inner: usize,
}

impl Shape {
    /// Contiguous rows.
    pub fn rows(rows: usize, classes: usize) -> Shape {
        Shape { layout: Layout::Contiguous, rows, classes, inner: 1 }
    }

    /// `[rows, classes, inner]`.
    pub fn inner(rows: usize, classes: usize, inner: usize) -> Shape {
        Shape { layout: Layout::Inner, rows, classes, inner }
    }

    /// About `elements` logits of so many classes, at least one row.
    pub fn about(layout: Layout, classes: usize, elements: usize) -> Shape {
        let rows = (elements / classes).max(1);
        match layout {
            // Two rows, so that the step from one to the next is part of it.
            Layout::Inner => Shape { layout, rows: 2, classes, inner: rows.div_ceil(2) },
            _ => Shape { layout, rows, classes, inner: 1 },
        }
    }

    /// Softmax distributions.
    pub fn positions(&self) -> usize {
        self.rows * self.inner
    }

    /// Logits.
    pub fn elements(&self) -> usize {
        self.positions() * self.classes
    }

    fn strides(&self) -> [i64; 3] {
        match self.layout {
            Layout::ClassesFirst => [1, self.rows as i64, 1],
            _ => [0; 3],
        }
    }
}

impl std::fmt::Display for Shape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.layout {
            Layout::Contiguous => write!(f, "{}x{}", self.rows, self.classes),
            Layout::Inner => write!(f, "{}x{}x{}", self.rows, self.classes, self.inner),
            Layout::ClassesFirst => write!(f, "T{}x{}", self.rows, self.classes),
        }
    }
}

/// A call.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Call {
    /// The loss.
    Forward,
    /// The gradient from lse.
    Backward,
    /// Loss and gradient, out of place.
    Both,
    /// Loss and gradient over the logits.
    InPlace,
    /// Loss and gradient over the logits, label smoothing and z-loss on.
    Smoothed,
    /// Loss and gradient, softcap and scale on.
    Capped,
    /// The loss of probability targets.
    SoftForward,
    /// Loss and gradient of probability targets.
    SoftBoth,
    /// The gradient with respect to probability targets.
    TargetGradient,
    /// lse, argmax and entropy.
    Evaluate,
    /// softmax.
    Softmax,
    /// Its gradient.
    SoftmaxBackward,
    /// log-softmax.
    LogSoftmax,
    /// Its gradient.
    LogSoftmaxBackward,
}

impl Call {
    /// All of them.
    pub const ALL: [Call; 14] = [
        Call::Forward,
        Call::Backward,
        Call::Both,
        Call::InPlace,
        Call::Smoothed,
        Call::Capped,
        Call::SoftForward,
        Call::SoftBoth,
        Call::TargetGradient,
        Call::Evaluate,
        Call::Softmax,
        Call::SoftmaxBackward,
        Call::LogSoftmax,
        Call::LogSoftmaxBackward,
    ];

    /// As benches print it.
    pub fn name(self) -> &'static str {
        match self {
            Call::Forward => "forward",
            Call::Backward => "backward",
            Call::Both => "both",
            Call::InPlace => "in-place",
            Call::Smoothed => "in-place-smoothed",
            Call::Capped => "both-capped",
            Call::SoftForward => "soft-forward",
            Call::SoftBoth => "soft-both",
            Call::TargetGradient => "target-gradient",
            Call::Evaluate => "evaluate",
            Call::Softmax => "softmax",
            Call::SoftmaxBackward => "softmax-backward",
            Call::LogSoftmax => "log-softmax",
            Call::LogSoftmaxBackward => "log-softmax-backward",
        }
    }

    /// The call overwrites the logits.
    pub fn overwrites(self) -> bool {
        matches!(self, Call::InPlace | Call::Smoothed)
    }

    /// It reads probability targets.
    pub fn is_soft(self) -> bool {
        matches!(self, Call::SoftForward | Call::SoftBoth | Call::TargetGradient)
    }

    /// The call is softmax, log-softmax, or the gradient through one of them.
    pub fn is_softmax(self) -> bool {
        use Call::{LogSoftmax, LogSoftmaxBackward, Softmax, SoftmaxBackward};
        matches!(self, LogSoftmax | LogSoftmaxBackward | Softmax | SoftmaxBackward)
    }
}

/// Options that [`Call::Smoothed`] and [`Call::Capped`] set.
pub const SMOOTHING: f64 = 0.1;
pub const Z_LOSS: f64 = 1e-4;
pub const CAP: f64 = 30.0;
pub const SCALE: f64 = 0.5;

/// The inputs of a call other than the logits, and the original logits.
pub struct Operands<T> {
    pub shape: Shape,
    pub original: Aligned<T>,
    pub targets: Vec<i32>,
    /// Class probabilities, or `grad_y` of a softmax or log-softmax, if the call reads them.
    pub probabilities: Vec<T>,
    pub lse: Vec<f64>,
}

impl<T: Scalar> Operands<T> {
    /// Logits from the fixed seed, for this call.
    pub fn new(shape: Shape, call: Call) -> Self {
        let original = Aligned::new(&logits::<T>(shape.elements()));
        let needs = call.is_soft() || call.is_softmax();
        let probabilities = if needs {
            // Not normalised and not equal, with a sum of about 1.
            let scale = 2.0 / shape.classes as f64;
            (0..shape.elements()).map(|i| T::of((i * 31 % 64) as f64 / 64.0 * scale)).collect()
        } else {
            Vec::new()
        };
        let mut operands = Operands {
            shape,
            original,
            targets: targets(shape.positions(), shape.classes),
            probabilities,
            lse: vec![0.0; shape.positions()],
        };
        if matches!(call, Call::Backward | Call::TargetGradient) {
            let mut lse = std::mem::take(&mut operands.lse);
            let ce = CrossEntropy::new(shape.rows, shape.classes).inner(shape.inner);
            ce.lse(operands.input(&operands.original), &mut lse).expect("a valid problem");
            operands.lse = lse;
        }
        operands
    }

    fn input<'a>(&self, x: &'a [T]) -> Input<'a> {
        Input::from(x).strides(self.shape.strides())
    }

    fn output<'a>(&self, x: &'a mut [T]) -> Output<'a> {
        Output::from(x).strides(self.shape.strides())
    }

    /// Makes one call, on `threads` threads (0 = all), and returns its scalar result.
    pub fn run(&self, call: Call, isa: Isa, threads: u32, x: &mut [T], grad: &mut [T]) -> f64 {
        let shape = &self.shape;
        let ce = CrossEntropy::new(shape.rows, shape.classes)
            .inner(shape.inner)
            .threads(threads)
            .isa(isa);
        let softmax =
            Softmax::new(shape.rows, shape.classes).inner(shape.inner).threads(threads).isa(isa);
        let probabilities = self.input(&self.probabilities);
        let targets = &self.targets;
        let outcome = match call {
            Call::Forward => ce.forward(self.input(x), targets),
            Call::Backward => {
                ce.backward(self.input(x), targets, &self.lse, self.output(grad)).map(|()| 0.0)
            }
            Call::Both => ce.forward_backward(self.input(x), targets, self.output(grad)),
            Call::InPlace => ce.forward_backward_in_place(self.output(x), targets),
            Call::Smoothed => ce
                .label_smoothing(SMOOTHING)
                .z_loss(Z_LOSS)
                .forward_backward_in_place(self.output(x), targets),
            Call::Capped => ce.softcap(CAP).logit_scale(SCALE).forward_backward(
                self.input(x),
                targets,
                self.output(grad),
            ),
            Call::SoftForward => ce.forward(self.input(x), probabilities),
            Call::SoftBoth => ce.forward_backward(self.input(x), probabilities, self.output(grad)),
            Call::TargetGradient => ce
                .backward_targets(self.input(x), probabilities, &self.lse, self.output(grad))
                .map(|()| 0.0),
            Call::Evaluate => {
                let positions = shape.positions();
                let (mut lse, mut argmax) = (vec![0.0; positions], vec![0; positions]);
                let mut entropy = vec![0f64; positions];
                let results = Results {
                    lse: Some(&mut lse),
                    argmax: Some(&mut argmax),
                    entropy: Some((&mut entropy).into()),
                    ..Results::default()
                };
                let sum = |x: &[f64]| x.iter().sum::<f64>();
                ce.evaluate(self.input(x), results)
                    .map(|()| sum(&lse) + sum(&entropy) + argmax.iter().sum::<i64>() as f64)
            }
            Call::Softmax => softmax.softmax(self.input(x), self.output(grad)).map(|()| 0.0),
            Call::LogSoftmax => softmax.log_softmax(self.input(x), self.output(grad)).map(|()| 0.0),
            // Any y serves; the logits stand for it.
            Call::SoftmaxBackward => softmax
                .softmax_backward(self.input(x), probabilities, self.output(grad))
                .map(|()| 0.0),
            Call::LogSoftmaxBackward => softmax
                .log_softmax_backward(self.input(x), probabilities, self.output(grad))
                .map(|()| 0.0),
        };
        black_box(outcome.expect("a valid problem"))
    }
}
