//! A fixed set of problems: every option with every dtype and layout. The problems have the same bits on
//! every platform: numbers come from integers alone, since libms differ.

use common::Reduction;
use common::operand::{Dtype, FLOATS, INTEGERS, Operand};
use common::random::Rng;
use common::task::Task;

/// The logits' dtype and that of their gradient.
pub const PAIRS: [(&str, Dtype, Dtype); 6] = [
    ("f32", Dtype::F32, Dtype::F32),
    ("f64", Dtype::F64, Dtype::F64),
    ("bf16", Dtype::Bf16, Dtype::Bf16),
    ("bf16-f32", Dtype::Bf16, Dtype::F32),
    ("f16", Dtype::F16, Dtype::F16),
    ("f16-f32", Dtype::F16, Dtype::F32),
];

/// How logits and gradient layout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// `[rows, classes]`, classes contiguous.
    Packed,
    /// `[rows, classes, inner]`.
    Inner,
    /// `[classes, rows]`.
    Transposed,
    /// Gaps between all elements.
    Apart,
    /// Logits packed, the gradient transposed.
    Crossed,
}

pub const LAYOUTS: [(&str, Layout); 5] = [
    ("packed", Layout::Packed),
    ("inner", Layout::Inner),
    ("transposed", Layout::Transposed),
    ("apart", Layout::Apart),
    ("crossed", Layout::Crossed),
];

impl Layout {
    pub fn strides(self, [rows, classes, inner]: [usize; 3]) -> [i64; 3] {
        let [rows, classes, inner] = [rows as i64, classes as i64, inner as i64];
        match self {
            Layout::Packed | Layout::Crossed => [classes * inner, 1, classes],
            Layout::Inner => [classes * inner, inner, 1],
            Layout::Transposed => [inner, rows * inner, 1],
            Layout::Apart => [(classes * inner + 1) * 3, 3 * inner, 3],
        }
    }

    pub fn lay_out(self, operand: &mut Operand) {
        operand.strides = self.strides(operand.sizes);
    }
}

/// An option, or several together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice {
    Plain,
    /// One `grad_output` per row.
    Rows,
    /// Class and row weights, a mask, ignored rows.
    Weights,
    Smoothing,
    SmoothingAndWeights,
    ZLoss,
    Scale,
    Softcap,
    ScaleAndSoftcap,
    Normalizers,
    /// A factor for which the gradient splits its exponentials.
    Tiny,
    Accumulate,
    LogProbs,
    LogProbsAndSmoothing,
    Soft,
    SoftAndAll,
    SoftLogProbs,
    /// Infinities and NaN.
    Edges,
    EdgesAndSmoothing,
    SoftEdges,
}

pub const CHOICES: [(&str, Choice); 20] = [
    ("plain", Choice::Plain),
    ("rows", Choice::Rows),
    ("weights", Choice::Weights),
    ("smoothing", Choice::Smoothing),
    ("smoothing-weights", Choice::SmoothingAndWeights),
    ("z-loss", Choice::ZLoss),
    ("scale", Choice::Scale),
    ("softcap", Choice::Softcap),
    ("scale-softcap", Choice::ScaleAndSoftcap),
    ("normalizers", Choice::Normalizers),
    ("tiny", Choice::Tiny),
    ("accumulate", Choice::Accumulate),
    ("log-probs", Choice::LogProbs),
    ("log-probs-smoothing", Choice::LogProbsAndSmoothing),
    ("soft", Choice::Soft),
    ("soft-all", Choice::SoftAndAll),
    ("soft-log-probs", Choice::SoftLogProbs),
    ("edges", Choice::Edges),
    ("edges-smoothing", Choice::EdgesAndSmoothing),
    ("soft-edges", Choice::SoftEdges),
];

impl Choice {
    fn is_soft(self) -> bool {
        use Choice::*;
        matches!(self, Soft | SoftAndAll | SoftLogProbs | SoftEdges)
    }

    fn has_edges(self) -> bool {
        use Choice::*;
        matches!(self, Edges | EdgesAndSmoothing | SoftEdges)
    }
}

/// The significant bits of a number.
fn digits(dtype: Dtype) -> i32 {
    match dtype {
        Dtype::F32 => 24,
        Dtype::Bf16 => 8,
        Dtype::F16 => 11,
        _ => 53,
    }
}

/// A number that the dtype holds, of either sign, smaller than `2^exponent`.
fn number(rng: &mut Rng, dtype: Dtype, exponent: i32) -> f64 {
    let digits = digits(dtype);
    let mantissa = (rng.bits() >> (64 - digits)) as f64 * power(exponent - digits);
    if rng.one_in(2) { -mantissa } else { mantissa }
}

/// `2^exponent`, in the range of normal numbers.
fn power(exponent: i32) -> f64 {
    f64::from_bits(((1023 + exponent) as u64) << 52)
}

/// One row of logits. Its distribution depends on its number.
fn fill(row: &mut [f64], kind: usize, y: usize, dtype: Dtype, edges: bool, rng: &mut Rng) {
    let classes = row.len();
    let wide = kind % 7 == 1;
    row.iter_mut().for_each(|x| *x = number(rng, dtype, if wide { 6 } else { 2 }));
    match kind % 7 {
        // A common offset, and steps that the dtype can hold there.
        2 => {
            let step = power(13 - digits(dtype) + 1);
            let steps = (4.0 / step).max(2.0) as usize;
            row.iter_mut().for_each(|x| *x = 8192.0 + step * rng.below(steps) as f64);
        }
        3 => row[rng.below(classes)] = 1024.0,
        // Later logits are far above, or below, the first ones.
        4 => {
            let (up, every) = (rng.one_in(2), [16, 64, 300][rng.below(3)]);
            for (class, x) in row.iter_mut().enumerate() {
                *x = 24.0 * (class / every) as f64 * if up { 1.0 } else { -1.0 };
            }
        }
        5 => row[y] = 40.0,
        6 if dtype != Dtype::F16 => row.iter_mut().for_each(|x| *x *= power(60)),
        _ => {}
    }
    if edges {
        match kind % 5 {
            0 => row[..classes / 2].fill(f64::NEG_INFINITY),
            1 => row.iter_mut().step_by(3).for_each(|x| *x = f64::NEG_INFINITY),
            2 => row[rng.below(classes)] = f64::NAN,
            3 => row[rng.below(classes)] = f64::INFINITY,
            _ => row.fill(f64::NEG_INFINITY),
        }
    }
}

/// Multiples of 1/8 up to 3, as every dtype holds them.
fn eighths(rng: &mut Rng, dtype: Dtype, sizes: [usize; 3]) -> Operand {
    let n = sizes.iter().product();
    let values: Vec<f64> = (0..n).map(|_| rng.below(25) as f64 / 8.0).collect();
    Operand::packed(dtype, sizes, &values)
}

/// The problem of these sizes. `turn` selects the dtypes of targets and weights.
pub fn task(
    (_, dtype, grad): (&str, Dtype, Dtype),
    layout: Layout,
    choice: Choice,
    sizes: [usize; 3],
    turn: usize,
) -> Task {
    let [rows, classes, inner] = sizes;
    let (positions, by_row) = (rows * inner, [rows, 1, inner]);
    let rng = &mut Rng::new((choice as usize * 1009 + turn * 31 + rows * 7 + classes) as u64);
    let chosen: Vec<usize> = (0..positions).map(|_| rng.below(classes)).collect();
    let place = |i: usize, class: usize| (i / inner * classes + class) * inner + i % inner;

    let (mut logits, mut row) = (vec![0.0; positions * classes], vec![0.0; classes]);
    for (i, &y) in chosen.iter().enumerate() {
        fill(&mut row, i + turn, y, dtype, choice.has_edges(), rng);
        row.iter().enumerate().for_each(|(class, &x)| logits[place(i, class)] = x);
    }
    let mut logits = Operand::packed(dtype, sizes, &logits);
    layout.lay_out(&mut logits);

    let ignored = choice == Choice::Weights;
    let targets = if choice.is_soft() {
        let mut targets = eighths(rng, FLOATS[turn % 4], sizes);
        // Most of the mass at one class; some rows have no mass.
        chosen.iter().enumerate().for_each(|(i, &y)| targets.values[place(i, y)] += 8.0);
        targets.values.iter_mut().step_by(3).for_each(|t| *t = 0.0);
        targets
    } else {
        let index = |(i, &y): (usize, &usize)| if ignored && i % 5 == 3 { 0.0 } else { y as f64 };
        let values: Vec<f64> = chosen.iter().enumerate().map(index).collect();
        let holds = |dtype: &&Dtype| match dtype {
            Dtype::U8 => classes <= 256,
            Dtype::U16 => classes <= 65_536,
            _ => true,
        };
        let dtype = INTEGERS[turn % 5..].iter().find(holds).unwrap_or(&Dtype::I64);
        Operand::packed(*dtype, by_row, &values)
    };

    let mut task = Task::new(logits, targets);
    task.grad = Operand::zeros(grad, sizes);
    if layout == Layout::Crossed { Layout::Transposed } else { layout }.lay_out(&mut task.grad);
    task.grad_targets = Operand::zeros(FLOATS[(turn + 1) % 4], sizes);
    task.reduction = Reduction::Mean;
    let weights = |task: &mut Task, rng: &mut Rng| {
        task.class_weights = Some(eighths(rng, FLOATS[(turn + 2) % 4], [1, classes, 1]));
        task.row_weights = Some(eighths(rng, FLOATS[(turn + 3) % 4], by_row));
    };
    match choice {
        Choice::Plain | Choice::Soft => {}
        Choice::Rows => {
            task.reduction = Reduction::None;
            task.grad_output = Some(eighths(rng, FLOATS[turn % 4], by_row));
        }
        Choice::Weights => {
            weights(&mut task, rng);
            let mask: Vec<f64> = (0..positions).map(|i| [255.0, 1.0, 0.0][i % 7 % 3]).collect();
            task.row_mask = Some(Operand::packed(Dtype::U8, by_row, &mask));
            task.ignore_index = 0;
        }
        Choice::Smoothing => task.label_smoothing = 0.1,
        Choice::SmoothingAndWeights => {
            task.label_smoothing = 0.3;
            weights(&mut task, rng);
        }
        Choice::ZLoss => task.z_loss = 1e-3,
        Choice::Scale => task.logit_scale = 0.7,
        Choice::Softcap => task.softcap = 5.0,
        Choice::ScaleAndSoftcap => (task.logit_scale, task.softcap) = (3.0, 30.0),
        Choice::Normalizers => {
            (task.normalizer, task.z_normalizer, task.z_loss) = (7.5, 3.25, 0.03);
            task.grad_output = Some(Operand::packed(Dtype::F64, [1; 3], &[1.1]));
            task.grad_scale = -0.3;
        }
        Choice::Tiny => (task.grad_scale, task.reduction) = (power(-110), Reduction::Sum),
        Choice::Accumulate => {
            task.accumulate = true;
            let old = |operand: &mut Operand, rng: &mut Rng| {
                let dtype = operand.dtype;
                operand.values.iter_mut().for_each(|x| *x = number(rng, dtype, -4));
            };
            old(&mut task.grad, rng);
        }
        Choice::LogProbs | Choice::SoftLogProbs => task.log_probs = true,
        Choice::LogProbsAndSmoothing => {
            (task.log_probs, task.label_smoothing) = (true, 0.1);
            weights(&mut task, rng);
        }
        Choice::SoftAndAll => {
            weights(&mut task, rng);
            (task.label_smoothing, task.z_loss) = (0.1, 1e-3);
            (task.logit_scale, task.softcap) = (0.7, 30.0);
        }
        Choice::Edges | Choice::SoftEdges => task.reduction = Reduction::None,
        Choice::EdgesAndSmoothing => {
            (task.label_smoothing, task.reduction) = (0.1, Reduction::None);
        }
    }
    task
}

/// Sizes for a layout: around those of registers, blocks, tiles, the first classes that give the initial
/// shift, and chunks.
pub fn sizes(layout: Layout) -> &'static [[usize; 3]] {
    match layout {
        Layout::Packed | Layout::Crossed => &[
            [9, 1, 1],
            [67, 2, 1],
            [21, 10, 1],
            [10, 32, 1],
            [9, 33, 1],
            [9, 65, 1],
            [7, 300, 1],
            [7, 1000, 1],
            [7, 2113, 1],
        ],
        _ => &[
            [3, 1, 5],
            [2, 2, 67],
            [3, 10, 7],
            [1, 32, 64],
            [2, 33, 9],
            [1, 65, 13],
            [1, 300, 7],
            [1, 1000, 3],
            [1, 2113, 3],
        ],
    }
}
