//! The safe Rust API: slices in, descriptors out.

use crate::codes::*;
use crate::dispatch::Isa;
use crate::error::Error;
use crate::parallel::Team;
use crate::plan::Pass;
use crate::pool::Pool;
use crate::problem::{self, GradientRequest, Operand, Problem, Results as RawResults};
use std::marker::PhantomData;

mod sealed {
    pub trait Sealed {
        const DTYPE: u32;
    }
}

/// A number that an operand can hold: f32, f64, bf16, f16, i64, i32, u32, u16, u8. Which of them an operand
/// takes is checked by the call ([`Error::Dtype`]).
pub trait Number: sealed::Sealed + Copy {}

macro_rules! numbers {
    ($($type:ty => $dtype:ident),*) => {$(
        impl sealed::Sealed for $type {
            const DTYPE: u32 = $dtype;
        }
        impl Number for $type {}
    )*};
}
numbers!(half::bf16 => XENT_BF16, half::f16 => XENT_F16, f32 => XENT_F32, f64 => XENT_F64, i64 => XENT_I64, i32 => XENT_I32, u32 => XENT_U32, u16 => XENT_U16, u8 => XENT_U8);

/// An operand that is read: a slice, packed unless strides are given.
#[derive(Clone, Copy)]
pub struct Input<'a> {
    operand: Operand,
    slice: PhantomData<&'a [u8]>,
}

impl Input<'_> {
    /// Strides of rows, classes and inner positions, in elements. An operand without classes
    /// ignores the second. All zero = packed.
    pub fn strides(mut self, strides: [i64; 3]) -> Self {
        self.operand.strides = strides;
        self
    }
}

/// An operand that is written: a slice, packed unless strides are given.
pub struct Output<'a> {
    operand: Operand,
    slice: PhantomData<&'a mut [u8]>,
}

impl Output<'_> {
    /// As [`Input::strides`]; no two elements may share an address.
    pub fn strides(mut self, strides: [i64; 3]) -> Self {
        self.operand.strides = strides;
        self
    }
}

fn operand<T: Number>(data: *const T, len: usize) -> Operand {
    Operand { available: len, ..Operand::packed(data.cast_mut(), T::DTYPE) }
}

macro_rules! operands {
    ($($from:ty),*) => {$(
        impl<'a, T: Number> From<&'a $from> for Input<'a> {
            fn from(slice: &'a $from) -> Self {
                Input { operand: operand(slice.as_ptr(), slice.len()), slice: PhantomData }
            }
        }
        impl<'a, T: Number> From<&'a mut $from> for Output<'a> {
            fn from(slice: &'a mut $from) -> Self {
                let len = slice.len();
                Output { operand: operand(slice.as_mut_ptr(), len), slice: PhantomData }
            }
        }
    )*};
}
operands!([T], Vec<T>);

impl<'a, T: Number, const N: usize> From<&'a [T; N]> for Input<'a> {
    fn from(array: &'a [T; N]) -> Self {
        array.as_slice().into()
    }
}
impl<'a, T: Number, const N: usize> From<&'a mut [T; N]> for Output<'a> {
    fn from(array: &'a mut [T; N]) -> Self {
        array.as_mut_slice().into()
    }
}

/// How row losses become the loss.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Reduction {
    /// Σ of the row losses over Σ of `r·w_y`, both over kept rows.
    #[default]
    Mean,
    /// Σ of the row losses.
    Sum,
    /// None: row losses alone ([`Results::row_losses`]), and a gradient per row loss.
    None,
}

/// What a forward can hand back; `None` for what is not wanted. One pass produces all of it.
#[derive(Default)]
pub struct Results<'a> {
    /// The reduced loss; not with [`Reduction::None`].
    pub loss: Option<&'a mut f64>,
    /// f32 or f64 `[rows]`; 0 where ignored.
    pub row_losses: Option<Output<'a>>,
    /// `[rows]`, packed: ln Σ exp of the logits, of ignored rows too.
    pub lse: Option<&'a mut [f64]>,
    /// What a mean divides by, whatever the reduction.
    pub normalizer: Option<&'a mut f64>,
    /// Rows that count.
    pub kept_rows: Option<&'a mut u64>,
}

impl Results<'_> {
    fn raw(self) -> RawResults {
        fn pointer<T>(result: Option<&mut T>) -> *mut T {
            result.map_or(std::ptr::null_mut(), |to| to)
        }
        RawResults {
            loss: pointer(self.loss),
            row_losses: self.row_losses.map_or(Operand::ABSENT, |output| output.operand),
            lse: self.lse.map_or(Operand::ABSENT, |lse| Output::from(lse).operand),
            normalizer: pointer(self.normalizer),
            kept_rows: pointer(self.kept_rows),
            ..RawResults::NONE
        }
    }
}

/// Softmax cross-entropy with index targets: the shape and the options. The calls take the data.
///
/// ```
/// use xent::CrossEntropy;
///
/// let mut logits = vec![0.1f32, 0.2, 0.3, 0.4, 0.4, 0.3, 0.2, 0.1];
/// let targets = [0i32, 3];
/// let loss = CrossEntropy::new(2, 4)
///     .label_smoothing(0.1)
///     .forward_backward_in_place(&mut logits, &targets)?;
/// assert!((loss - 1.5275).abs() < 1e-4);
/// # Ok::<(), xent::Error>(())
/// ```
///
/// Formulas and edges are those of the crate documentation. Everything is checked before a byte
/// is written: a call that returns an [`Error`] has written nothing.
#[derive(Clone, Copy)]
#[must_use]
pub struct CrossEntropy<'a> {
    problem: Problem,
    grad_output: Operand,
    grad_scale: f64,
    pool: Option<&'a Pool>,
    isa: Option<Isa>,
    slices: PhantomData<&'a [u8]>,
}

impl<'a> CrossEntropy<'a> {
    /// `rows` distributions over `classes` classes; every option at its default.
    pub fn new(rows: usize, classes: usize) -> Self {
        CrossEntropy {
            problem: Problem { rows, classes, ..Problem::INIT },
            grad_output: Operand::ABSENT,
            grad_scale: 1.0,
            pool: None,
            isa: None,
            slices: PhantomData,
        }
    }

    /// w: any float `[classes]`. Negative and zero are legal. Default: 1.
    pub fn class_weights(mut self, weights: impl Into<Input<'a>>) -> Self {
        self.problem.class_weights = weights.into().operand;
        self
    }

    /// r: any float `[rows]`. Default: 1.
    pub fn row_weights(mut self, weights: impl Into<Input<'a>>) -> Self {
        self.problem.row_weights = weights.into().operand;
        self
    }

    /// u8 `[rows]`; a row whose byte is 0 is ignored.
    pub fn row_mask(mut self, mask: impl Into<Input<'a>>) -> Self {
        self.problem.row_mask = mask.into().operand;
        self
    }

    /// The target of rows that do not count; any integer. Default: −100.
    pub fn ignore_index(mut self, index: i64) -> Self {
        self.problem.ignore_index = index;
        self
    }

    /// ε in [0, 1]: the target distribution is (1−ε)·one-hot + ε/C. Default: 0.
    pub fn label_smoothing(mut self, epsilon: f64) -> Self {
        self.problem.label_smoothing = epsilon;
        self
    }

    /// Default: mean.
    pub fn reduction(mut self, reduction: Reduction) -> Self {
        self.problem.reduction = match reduction {
            Reduction::Mean => XENT_MEAN,
            Reduction::Sum => XENT_SUM,
            Reduction::None => XENT_NONE,
        };
        self
    }

    /// If > 0, what a mean divides by instead of the sum of its weights: for gradient
    /// accumulation and data parallel training. Default: 0.
    pub fn normalizer(mut self, normalizer: f64) -> Self {
        self.problem.normalizer = normalizer;
        self
    }

    /// A mean over no kept rows is 0 instead of NaN.
    pub fn empty_is_zero(self, on: bool) -> Self {
        self.flag(XENT_FLAG_EMPTY_IS_ZERO, on)
    }

    /// Gradients are added to what is there. Not in place.
    pub fn accumulate(self, on: bool) -> Self {
        self.flag(XENT_FLAG_ACCUMULATE, on)
    }

    fn flag(mut self, bit: u32, on: bool) -> Self {
        self.problem.flags = if on { self.problem.flags | bit } else { self.problem.flags & !bit };
        self
    }

    /// The gradient of whatever follows: any float, one element, or `[rows]` with
    /// [`Reduction::None`]. Default: 1.
    pub fn grad_output(mut self, grad: impl Into<Input<'a>>) -> Self {
        self.grad_output = grad.into().operand;
        self
    }

    /// A finite factor on top: loss scaling, 1/accumulation steps. Default: 1.
    pub fn grad_scale(mut self, scale: f64) -> Self {
        self.grad_scale = scale;
        self
    }

    /// 0 = the whole pool, 1 = the calling thread alone, n = at most n. The bits do not depend on
    /// it. Default: 0.
    pub fn threads(mut self, threads: u32) -> Self {
        self.problem.threads = threads;
        self
    }

    /// The pool to run on. Default: rayon's global pool.
    pub fn pool(mut self, pool: &'a Pool) -> Self {
        self.pool = Some(pool);
        self
    }

    /// Forces an instruction set, for tests and benches; one that the processor does not have is
    /// an [`Error::Param`].
    #[doc(hidden)]
    pub fn isa(mut self, isa: Isa) -> Self {
        self.isa = Some(isa);
        self
    }

    /// The loss. `logits`: f32, bf16 or f16 `[rows, classes]`, classes contiguous, any row stride ≥ classes.
    /// `targets`: i64, i32, u32, u16 or u8 `[rows]`.
    pub fn forward<'b>(
        &self,
        logits: impl Into<Input<'b>>,
        targets: impl Into<Input<'b>>,
    ) -> Result<f64, Error> {
        let mut loss = 0.0;
        let results = Results { loss: Some(&mut loss), ..Results::default() };
        self.forward_with(logits, targets, results)?;
        Ok(loss)
    }

    /// As [`forward`](Self::forward), with results of choice.
    pub fn forward_with<'b>(
        &self,
        logits: impl Into<Input<'b>>,
        targets: impl Into<Input<'b>>,
        results: Results<'_>,
    ) -> Result<(), Error> {
        let (logits, targets) = (logits.into().operand, targets.into().operand);
        self.run(Pass::Forward, logits, targets, results.raw(), None)
    }

    /// ln Σ exp of every row, without targets.
    pub fn lse<'b>(&self, logits: impl Into<Input<'b>>, lse: &mut [f64]) -> Result<(), Error> {
        let results = Results { lse: Some(lse), ..Results::default() };
        self.run(Pass::Forward, logits.into().operand, Operand::ABSENT, results.raw(), None)
    }

    /// The gradient of the loss with respect to the logits, from `lse` (f64 `[rows]`) of a
    /// forward or of the caller's own. `grad`: f32 or the dtype of the logits, `[rows, classes]`.
    pub fn backward<'b, 'c>(
        &self,
        logits: impl Into<Input<'b>>,
        targets: impl Into<Input<'b>>,
        lse: &[f64],
        grad: impl Into<Output<'c>>,
    ) -> Result<(), Error> {
        let (logits, targets) = (logits.into().operand, targets.into().operand);
        let results = RawResults { lse: Input::from(lse).operand, ..RawResults::NONE };
        self.run(Pass::Backward, logits, targets, results, Some(grad.into().operand))
    }

    /// As [`backward`](Self::backward); the gradient replaces the logits.
    pub fn backward_in_place<'b>(
        &self,
        logits: impl Into<Output<'b>>,
        targets: impl Into<Input<'b>>,
        lse: &[f64],
    ) -> Result<(), Error> {
        let (logits, targets) = (logits.into().operand, targets.into().operand);
        let results = RawResults { lse: Input::from(lse).operand, ..RawResults::NONE };
        self.run(Pass::Backward, logits, targets, results, Some(logits))
    }

    /// The loss and its gradient, reading the logits from memory once.
    pub fn forward_backward<'b, 'c>(
        &self,
        logits: impl Into<Input<'b>>,
        targets: impl Into<Input<'b>>,
        grad: impl Into<Output<'c>>,
    ) -> Result<f64, Error> {
        let mut loss = 0.0;
        let results = Results { loss: Some(&mut loss), ..Results::default() };
        self.forward_backward_with(logits, targets, grad, results)?;
        Ok(loss)
    }

    /// As [`forward_backward`](Self::forward_backward), with results of choice.
    pub fn forward_backward_with<'b, 'c>(
        &self,
        logits: impl Into<Input<'b>>,
        targets: impl Into<Input<'b>>,
        grad: impl Into<Output<'c>>,
        results: Results<'_>,
    ) -> Result<(), Error> {
        let (logits, targets) = (logits.into().operand, targets.into().operand);
        let grad = grad.into().operand;
        self.run(Pass::ForwardBackward, logits, targets, results.raw(), Some(grad))
    }

    /// As [`forward_backward`](Self::forward_backward); the gradient replaces the logits, and
    /// nothing else is written to memory.
    pub fn forward_backward_in_place<'b, 'c>(
        &self,
        logits: impl Into<Output<'b>>,
        targets: impl Into<Input<'c>>,
    ) -> Result<f64, Error> {
        let mut loss = 0.0;
        let results = Results { loss: Some(&mut loss), ..Results::default() };
        self.forward_backward_in_place_with(logits, targets, results)?;
        Ok(loss)
    }

    /// As [`forward_backward_in_place`](Self::forward_backward_in_place), with results of choice.
    pub fn forward_backward_in_place_with<'b, 'c>(
        &self,
        logits: impl Into<Output<'b>>,
        targets: impl Into<Input<'c>>,
        results: Results<'_>,
    ) -> Result<(), Error> {
        let (logits, targets) = (logits.into().operand, targets.into().operand);
        self.run(Pass::ForwardBackward, logits, targets, results.raw(), Some(logits))
    }

    fn run(
        &self,
        pass: Pass,
        logits: Operand,
        targets: Operand,
        results: RawResults,
        grad: Option<Operand>,
    ) -> Result<(), Error> {
        let problem = Problem { logits, targets, ..self.problem };
        let request = grad.map(|logits| GradientRequest {
            output: self.grad_output,
            scale: self.grad_scale,
            logits,
        });
        let team =
            Team { pool: self.pool.map(Pool::rayon), threads: self.problem.threads as usize };
        // SAFETY: every operand is a slice borrowed for this call, for writing if it is an
        // output, and `available` is its length, which `run` checks shapes and strides against.
        unsafe { problem::run(&problem, pass, &results, request.as_ref(), &team, self.isa) }
    }
}
