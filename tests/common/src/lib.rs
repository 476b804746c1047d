//! What the integration tests share: problems, buffers with canaries around them, and calls.
//!
//! A [`Problem`] owns its operands in the dtypes they are passed in; [`Problem::case`] hands the
//! same numbers to the oracle and [`Problem::run`] to the library.

pub mod bounds;
mod fused;
pub mod layer;
pub mod operand;
pub mod random;
pub mod reference;
pub mod softmax;
pub mod split;
pub mod task;
pub mod task_bounds;
pub mod task_random;

use reference::Case;
use xent::half::{bf16, f16};
use xent::{CrossEntropy, Error, Input, Isa, Number, Output, Pool, Results};

pub use xent::Reduction;

pub const INF: f64 = f64::INFINITY;

/// All instruction sets that the processor has. The first call prints the names of the others.
pub fn isas() -> Vec<Isa> {
    static SKIPPED: std::sync::Once = std::sync::Once::new();
    let (run, skipped): (Vec<Isa>, Vec<Isa>) =
        Isa::ALL.into_iter().partition(|isa| isa.is_available());
    SKIPPED.call_once(|| {
        for isa in skipped {
            println!("SKIPPED: this processor does not have {}", isa.name());
        }
    });
    assert!(run.contains(&Isa::Portable));
    run
}

/// Whether tests run samples only: an emulator runs them (`XENT_TEST_STRIDE`).
pub fn is_sampled() -> bool {
    std::env::var_os("XENT_TEST_STRIDE").is_some()
}

/// All items; in a sample the first and every `each`-th after it.
pub fn some<I: IntoIterator>(all: I, each: usize) -> impl Iterator<Item = I::Item> {
    all.into_iter().step_by(if is_sampled() { each } else { 1 })
}

/// Elements of buffers, with two bit patterns that no computation produces.
pub trait Element: Number + PartialEq + std::fmt::Debug + 'static {
    /// Around an operand and between its rows.
    const CANARY: Self;
    /// In an output before the call.
    const POISON: Self;
    fn bits(self) -> u64;
}

macro_rules! elements {
    ($($type:ty: $canary:expr, $poison:expr, $bits:expr;)*) => {$(
        impl Element for $type {
            const CANARY: $type = $canary;
            const POISON: $type = $poison;
            fn bits(self) -> u64 {
                $bits(self)
            }
        }
    )*};
}
elements! {
    f32: f32::from_bits(0x7fc0_ca4a), f32::from_bits(0x7fc0_dead), |x: f32| x.to_bits().into();
    f64: f64::from_bits(0x7ff8_0000_00ca_4a41), f64::from_bits(0x7ff8_0000_dead_dead), f64::to_bits;
    bf16: bf16::from_bits(0x7fca), bf16::from_bits(0x7fda), |x: bf16| x.to_bits().into();
    f16: f16::from_bits(0x7eca), f16::from_bits(0x7eda), |x: f16| x.to_bits().into();
    i64: 0x00ca_4a41_0000_0000, -0x0dea_dead, |x: i64| x as u64;
    i32: 0x00ca_4a41, -0x0dea_dead, |x: i32| x as u64;
    u32: 0x00ca_4a41, 0xdead_dead, |x: u32| x.into();
    u16: 0xca4a, 0xdead, |x: u16| x.into();
    u8: 0xca, 0xde, |x: u8| x.into();
}

/// A `[rows, width]` operand at a chosen distance from a cache line's start, canaries before,
/// after and between the rows.
pub struct Guarded<T> {
    memory: Vec<T>,
    start: usize,
    rows: usize,
    width: usize,
    stride: usize,
}

/// Canaries before and after an operand: more than any register, block or cache line.
const MARGIN: usize = 96;

impl<T: Element> Guarded<T> {
    /// `stride ≥ width`; `offset` in elements from a 64-byte boundary.
    pub fn new(rows: usize, width: usize, stride: usize, offset: usize) -> Self {
        let span = rows.saturating_sub(1) * stride + width;
        let memory = vec![T::CANARY; span + 3 * MARGIN];
        let start = memory[MARGIN..].as_ptr().align_offset(64) + MARGIN + offset;
        let mut guarded = Guarded { memory, start, rows, width, stride };
        for row in 0..rows {
            guarded.row_mut(row).fill(T::POISON);
        }
        guarded
    }

    pub fn holding(data: &[T], width: usize, stride: usize, offset: usize) -> Self {
        let rows = data.len().checked_div(width).unwrap_or(0);
        let mut guarded = Guarded::new(rows, width, stride, offset);
        for row in 0..rows {
            let from = &data[row * width..][..width];
            guarded.row_mut(row).copy_from_slice(from);
        }
        guarded
    }

    fn row_mut(&mut self, row: usize) -> &mut [T] {
        &mut self.memory[self.start + row * self.stride..][..self.width]
    }

    pub fn row(&self, row: usize) -> &[T] {
        &self.memory[self.start + row * self.stride..][..self.width]
    }

    fn range(&self) -> std::ops::Range<usize> {
        let span = self.rows.saturating_sub(1) * self.stride + self.width;
        self.start..self.start + if self.rows == 0 { 0 } else { span }
    }

    /// Strides as an operand `[rows, classes]`.
    fn strides(&self) -> [i64; 3] {
        [self.stride as i64, 1, 0]
    }

    pub fn input(&self) -> Input<'_> {
        Input::from(&self.memory[self.range()]).strides(self.strides())
    }

    pub fn output(&mut self) -> Output<'_> {
        let (range, strides) = (self.range(), self.strides());
        Output::from(&mut self.memory[range]).strides(strides)
    }

    pub fn slice(&mut self) -> &mut [T] {
        let range = self.range();
        &mut self.memory[range]
    }

    /// Checks every canary, and returns the rows, packed.
    pub fn take(&self) -> Vec<T> {
        // From the end of each row to the start of the next.
        let mut end = 0;
        for row in 0..self.rows {
            let start = self.start + row * self.stride;
            self.assert_canaries(end..start);
            end = start + self.width;
        }
        self.assert_canaries(end..self.memory.len());
        let mut packed = Vec::with_capacity(self.rows * self.width);
        (0..self.rows).for_each(|row| packed.extend_from_slice(self.row(row)));
        packed
    }

    #[track_caller]
    fn assert_canaries(&self, range: std::ops::Range<usize>) {
        let gone = self.memory[range.clone()].iter().position(|x| x.bits() != T::CANARY.bits());
        if let Some(i) = gone.map(|i| i + range.start) {
            panic!(
                "canary {} of {} rows of {} (stride {}) is {:?}",
                i as isize - self.start as isize,
                self.rows,
                self.width,
                self.stride,
                self.memory[i],
            );
        }
    }

    /// As [`take`](Self::take); also checks that every element was written.
    pub fn take_written(&self) -> Vec<T> {
        let data = self.take();
        let missed = data.iter().position(|x| x.bits() == T::POISON.bits());
        assert_eq!(missed, None, "an element was not written");
        data
    }
}

/// Class indices, in the dtype of the operand.
#[derive(Clone, Debug)]
pub enum Indices {
    I64(Vec<i64>),
    I32(Vec<i32>),
    U32(Vec<u32>),
    U16(Vec<u16>),
    U8(Vec<u8>),
}

impl Indices {
    /// The indices in the first dtype, from `choice` on, that holds all of them.
    pub fn narrow(indices: &[i64], choice: usize) -> Indices {
        fn all<T: TryFrom<i64>>(indices: &[i64]) -> Option<Vec<T>> {
            indices.iter().map(|&y| T::try_from(y).ok()).collect()
        }
        let found = (choice..5).find_map(|dtype| match dtype {
            0 => all(indices).map(Indices::U8),
            1 => all(indices).map(Indices::U16),
            2 => all(indices).map(Indices::U32),
            3 => all(indices).map(Indices::I32),
            _ => None,
        });
        found.unwrap_or_else(|| Indices::I64(indices.to_vec()))
    }

    pub fn input(&self) -> Input<'_> {
        match self {
            Indices::I64(y) => y.into(),
            Indices::I32(y) => y.into(),
            Indices::U32(y) => y.into(),
            Indices::U16(y) => y.into(),
            Indices::U8(y) => y.into(),
        }
    }

    pub fn to_i64(&self) -> Vec<i64> {
        match self {
            Indices::I64(y) => y.clone(),
            Indices::I32(y) => y.iter().map(|&y| y.into()).collect(),
            Indices::U32(y) => y.iter().map(|&y| y.into()).collect(),
            Indices::U16(y) => y.iter().map(|&y| y.into()).collect(),
            Indices::U8(y) => y.iter().map(|&y| y.into()).collect(),
        }
    }

    fn row(&self, row: usize) -> Indices {
        match self {
            Indices::I64(y) => Indices::I64(vec![y[row]]),
            Indices::I32(y) => Indices::I32(vec![y[row]]),
            Indices::U32(y) => Indices::U32(vec![y[row]]),
            Indices::U16(y) => Indices::U16(vec![y[row]]),
            Indices::U8(y) => Indices::U8(vec![y[row]]),
        }
    }
}

/// Weights, in the dtype of the operand.
#[derive(Clone, Debug)]
pub enum Reals {
    F32(Vec<f32>),
    F64(Vec<f64>),
}

impl Reals {
    pub fn input(&self) -> Input<'_> {
        match self {
            Reals::F32(x) => x.into(),
            Reals::F64(x) => x.into(),
        }
    }

    pub fn to_f64(&self) -> Vec<f64> {
        match self {
            Reals::F32(x) => x.iter().map(|&x| x.into()).collect(),
            Reals::F64(x) => x.clone(),
        }
    }

    fn row(&self, row: usize) -> Reals {
        match self {
            Reals::F32(x) => Reals::F32(vec![x[row]]),
            Reals::F64(x) => Reals::F64(vec![x[row]]),
        }
    }
}

/// Operands and options of one call.
#[derive(Clone, Debug)]
pub struct Problem {
    pub rows: usize,
    pub classes: usize,
    pub logits: Vec<f32>,
    pub targets: Indices,
    pub class_weights: Option<Reals>,
    pub row_weights: Option<Reals>,
    pub row_mask: Option<Vec<u8>>,
    pub ignore_index: i64,
    pub label_smoothing: f64,
    pub reduction: Reduction,
    pub normalizer: f64,
    pub empty_is_zero: bool,
    pub grad_output: Option<Reals>,
    pub grad_scale: f64,
    /// The contents of the output that the gradient is added to.
    pub accumulate: Option<Vec<f32>>,
    /// Row losses in f32 instead of f64.
    pub short_row_losses: bool,
}

impl Problem {
    /// Every option at its default.
    pub fn new(classes: usize, logits: &[f32], targets: &[i64]) -> Problem {
        assert_eq!(logits.len(), classes * targets.len());
        Problem {
            rows: targets.len(),
            classes,
            logits: logits.to_vec(),
            targets: Indices::I64(targets.to_vec()),
            class_weights: None,
            row_weights: None,
            row_mask: None,
            ignore_index: -100,
            label_smoothing: 0.0,
            reduction: Reduction::Mean,
            normalizer: 0.0,
            empty_is_zero: false,
            grad_output: None,
            grad_scale: 1.0,
            accumulate: None,
            short_row_losses: false,
        }
    }

    /// [`new`](Self::new) with the sum as reduction.
    pub fn sum(classes: usize, logits: &[f32], targets: &[i64]) -> Problem {
        Problem { reduction: Reduction::Sum, ..Problem::new(classes, logits, targets) }
    }

    pub fn weights(&self) -> Option<Vec<f64>> {
        self.class_weights.as_ref().map(Reals::to_f64)
    }

    /// The same problem for the oracle.
    pub fn case(&self) -> Case {
        let logits = self.logits.iter().map(|&x| x.into()).collect();
        Case {
            targets: reference::Targets::Indices(self.targets.to_i64()),
            class_weights: self.weights(),
            row_weights: self.row_weights.as_ref().map(Reals::to_f64),
            row_mask: self
                .row_mask
                .as_ref()
                .map(|mask| mask.iter().map(|&byte| byte != 0).collect()),
            ignore_index: self.ignore_index,
            label_smoothing: self.label_smoothing,
            normalizer: self.normalizer,
            reduction: match self.reduction {
                Reduction::Mean => reference::Reduction::Mean,
                Reduction::Sum => reference::Reduction::Sum,
                Reduction::None => reference::Reduction::None,
            },
            empty_is_zero: self.empty_is_zero,
            grad_output: self.grad_output.as_ref().map_or(vec![1.0], Reals::to_f64),
            grad_scale: self.grad_scale,
            ..Case::new(self.rows, self.classes, 1, logits)
        }
    }

    /// Row `row` as a problem of its own.
    pub fn single(&self, row: usize) -> Problem {
        let range = row * self.classes..(row + 1) * self.classes;
        let by_row = self.reduction == Reduction::None;
        Problem {
            rows: 1,
            logits: self.logits[range.clone()].to_vec(),
            targets: self.targets.row(row),
            row_weights: self.row_weights.as_ref().map(|r| r.row(row)),
            row_mask: self.row_mask.as_ref().map(|mask| vec![mask[row]]),
            grad_output: match &self.grad_output {
                Some(grad) if by_row => Some(grad.row(row)),
                grad => grad.clone(),
            },
            accumulate: self.accumulate.as_ref().map(|old| old[range].to_vec()),
            ..self.clone()
        }
    }

    pub fn builder(&self) -> CrossEntropy<'_> {
        let mut call = CrossEntropy::new(self.rows, self.classes)
            .ignore_index(self.ignore_index)
            .label_smoothing(self.label_smoothing)
            .reduction(self.reduction)
            .normalizer(self.normalizer)
            .empty_is_zero(self.empty_is_zero)
            .accumulate(self.accumulate.is_some())
            .grad_scale(self.grad_scale);
        if let Some(weights) = &self.class_weights {
            call = call.class_weights(weights.input());
        }
        if let Some(weights) = &self.row_weights {
            call = call.row_weights(weights.input());
        }
        if let Some(mask) = &self.row_mask {
            call = call.row_mask(mask);
        }
        if let Some(grad) = &self.grad_output {
            call = call.grad_output(grad.input());
        }
        call
    }

    /// Runs the pass. Every output is poisoned before the call and checked after it.
    pub fn run(&self, pass: Pass<'_>, how: &How<'_>) -> Run {
        self.try_run(pass, how).expect("a valid problem")
    }

    pub fn try_run(&self, pass: Pass<'_>, how: &How<'_>) -> Result<Run, Error> {
        let (rows, classes) = (self.rows, self.classes);
        let mut call = self.builder().isa(how.isa).threads(how.threads);
        if let Some(pool) = how.pool {
            call = call.pool(pool);
        }
        let stride = classes + how.padding;
        let mut logits = Guarded::holding(&self.logits, classes, stride, how.offset);
        let grad_stride = classes + how.grad_padding;
        let mut grad = match &self.accumulate {
            Some(old) => Guarded::holding(old, classes, grad_stride, how.grad_offset),
            None => Guarded::new(rows, classes, grad_stride, how.grad_offset),
        };
        let targets = self.targets.input();

        // Row losses go to every second element, which tests their stride.
        let mut losses32 = Guarded::<f32>::new(rows, 1, 2, 0);
        let mut losses64 = Guarded::<f64>::new(rows, 1, 2, 0);
        let mut lse_out = Guarded::<f64>::new(1, rows, rows, 0);
        let (mut loss, mut normalizer, mut kept_rows) = (f64::POISON, f64::POISON, u64::MAX);
        let results = Results {
            loss: (self.reduction != Reduction::None).then_some(&mut loss),
            row_losses: Some(if self.short_row_losses {
                losses32.output()
            } else {
                losses64.output()
            }),
            lse: Some(lse_out.slice()),
            normalizer: Some(&mut normalizer),
            kept_rows: Some(&mut kept_rows),
            ..Results::default()
        };
        match pass {
            Pass::Forward => call.forward_with(logits.input(), targets, results)?,
            Pass::Fused => {
                call.forward_backward_with(logits.input(), targets, grad.output(), results)?;
            }
            Pass::FusedInPlace => {
                call.forward_backward_in_place_with(logits.output(), targets, results)?;
            }
            Pass::Backward(lse) => call.backward(logits.input(), targets, lse, grad.output())?,
            Pass::BackwardInPlace(lse) => {
                call.backward_in_place(logits.output(), targets, lse)?;
            }
        }

        let forward = !matches!(pass, Pass::Backward(_) | Pass::BackwardInPlace(_));
        let mut run = Run { loss, normalizer, kept_rows, ..Run::default() };
        if forward {
            assert_ne!(kept_rows, u64::MAX);
            assert_ne!(normalizer.bits(), f64::POISON.bits());
            run.lse = lse_out.take_written();
            run.row_losses = if self.short_row_losses {
                let losses = losses32.take_written();
                losses.into_iter().map(f64::from).collect()
            } else {
                losses64.take_written()
            };
        }
        let left = logits.take();
        match pass {
            Pass::FusedInPlace | Pass::BackwardInPlace(_) => run.grad = left,
            _ => {
                // Only the calls in place may change an input byte.
                assert_same(&left, &self.logits, "logits");
                let written = grad.take();
                match pass {
                    Pass::Forward => {}
                    _ if self.accumulate.is_some() => run.grad = written,
                    _ => run.grad = grad.take_written(),
                }
            }
        }
        Ok(run)
    }
}

/// Which call.
#[derive(Clone, Copy, Debug)]
pub enum Pass<'a> {
    Forward,
    Fused,
    FusedInPlace,
    Backward(&'a [f64]),
    BackwardInPlace(&'a [f64]),
}

/// How a call is made. Nothing in it may change a result.
#[derive(Clone, Copy, Debug)]
pub struct How<'a> {
    pub isa: Isa,
    pub threads: u32,
    pub pool: Option<&'a Pool>,
    /// Elements between the rows of the logits and of the gradient, and of each from a 64-byte
    /// boundary.
    pub padding: usize,
    pub offset: usize,
    pub grad_padding: usize,
    pub grad_offset: usize,
}

impl How<'_> {
    pub fn on(isa: Isa) -> How<'static> {
        How { isa, threads: 0, pool: None, padding: 0, offset: 0, grad_padding: 0, grad_offset: 0 }
    }
}

/// The results of a call; empty or meaningless if the pass does not produce them.
#[derive(Clone, Debug, Default)]
pub struct Run {
    pub loss: f64,
    pub normalizer: f64,
    pub kept_rows: u64,
    pub row_losses: Vec<f64>,
    pub lse: Vec<f64>,
    pub grad: Vec<f32>,
}

impl Run {
    /// Asserts that all results have the same bits.
    #[track_caller]
    pub fn assert_same(&self, other: &Run, what: &str) {
        self.assert_same_losses(other, what);
        assert_same(&self.grad, &other.grad, &format!("{what}: gradient"));
    }

    /// Asserts that the results of a forward have the same bits.
    #[track_caller]
    pub fn assert_same_losses(&self, other: &Run, what: &str) {
        let pair = |run: &Run| [run.loss, run.normalizer];
        assert_same(&pair(self), &pair(other), &format!("{what}: loss"));
        assert_eq!(self.kept_rows, other.kept_rows, "{what}");
        assert_same(&self.lse, &other.lse, &format!("{what}: lse"));
        let losses = format!("{what}: row losses");
        assert_same(&self.row_losses, &other.row_losses, &losses);
    }
}

/// Asserts that both have the same bits; any NaN equals any other.
#[track_caller]
pub fn assert_same<T: Element + Into<f64>>(a: &[T], b: &[T], what: &str) {
    assert_eq!(a.len(), b.len(), "{what}");
    // One comparison of sums, not a branch for each of billions of elements.
    if a.iter().zip(b).fold(0, |seen, (x, y)| seen | (x.bits() ^ y.bits())) == 0 {
        return;
    }
    for (i, (&x, &y)) in a.iter().zip(b).enumerate() {
        let both_nan = x.into().is_nan() && y.into().is_nan();
        assert!(x.bits() == y.bits() || both_nan, "{what}: element {i} is {x:?} and {y:?}");
    }
}
