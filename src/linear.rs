//! The Rust surface of linear layers whose logits are never stored.

use crate::codes::*;
use crate::cross_entropy::{CrossEntropy, Results};
use crate::error::Error;
use crate::operand::{Input, Output};
use crate::partial::Partial;
use crate::plan::Pass;
use crate::run;
use crate::shards::{merged_place, partials_place};
use crate::validate::cross_entropy::{Problem, Results as RawResults};
use crate::validate::linear::{Layer, Request};
use crate::validate::operand::Operand;
use crate::validate::shards::Place;

/// Where the gradients of a [`Linear`] go. A call computes no gradient that is `None`, nor its matrix product.
/// Gradients overlap no operand and no other gradient.
#[derive(Default)]
pub struct LinearGrads<'a> {
    /// `[rows, features]`: the dtype of the hidden states, or f32. Ignored rows get 0.
    pub hidden: Option<Output<'a>>,
    /// `[classes, features]`: the dtype of the weight, or f32.
    pub weight: Option<Output<'a>>,
    /// `[classes]`, any float.
    pub bias: Option<Output<'a>>,
}

/// A linear layer and the cross-entropy of its outputs: `logits = hidden · weightᵀ + bias`. xent makes the logits
/// block by block and never stores them, nor their gradient.
///
/// ```
/// use xent::{CrossEntropy, Linear, LinearGrads};
///
/// let hidden = [1.0f32, 2.0, 0.5, -1.0]; // [rows = 2, features = 2]
/// let weight = [0.1f32, 0.2, 0.3, -0.4, 0.5, 0.6]; // [classes = 3, features = 2]
/// let (mut grad_hidden, mut grad_weight) = ([0f32; 4], [0f32; 6]);
/// let grads = LinearGrads {
///     hidden: Some((&mut grad_hidden).into()),
///     weight: Some((&mut grad_weight).into()),
///     ..LinearGrads::default()
/// };
/// let loss = Linear::new(CrossEntropy::new(2, 3), 2)
///     .forward_backward(&hidden, &weight, &[2i64, 0], grads)?;
/// // The logits are (0.5, -0.5, 1.7) and (-0.15, 0.55, -0.35).
/// assert!((loss - 0.8443).abs() < 1e-4);
/// # Ok::<(), xent::Error>(())
/// ```
///
/// The options are those of the [`CrossEntropy`] that it is made of; logit scale and soft cap apply to the logits.
/// [`log_probs`](CrossEntropy::log_probs), [`accumulate`](CrossEntropy::accumulate) and
/// [`zero_padding`](CrossEntropy::zero_padding) are an [`Error::Param`], and
/// [`inner`](CrossEntropy::inner) positions other than 1 an [`Error::Shape`].
///
/// - `hidden`: f32, f64, bf16 or f16, `[rows, features]`; `weight`: the same dtype, `[classes, features]`. The strides
///   of rows and classes are free, that of the features is 1.
/// - `targets`: as for [`CrossEntropy`].
///
/// Ignored rows cost no arithmetic, unless `lse`, `argmax`, `entropy`, `top_classes` or `top_log_probs` are asked for,
/// which are results of all rows.
/// What the hidden states of ignored rows hold affects no gradient.
///
/// A call checks everything, and takes all its memory, before it writes a byte.
#[derive(Clone, Copy)]
#[must_use]
pub struct Linear<'a> {
    problem: CrossEntropy<'a>,
    layer: Layer,
}

// SAFETY: the bias is that of an `Input<'a>`, which is Send and Sync; so is the problem.
unsafe impl Send for Linear<'_> {}
// SAFETY: the bias is that of an `Input<'a>`, which is Send and Sync; so is the problem.
unsafe impl Sync for Linear<'_> {}

impl<'a> Linear<'a> {
    /// The loss of `problem` over the outputs of a layer of `features` inputs.
    pub fn new(problem: CrossEntropy<'a>, features: usize) -> Self {
        Linear { problem, layer: Layer { features, ..Layer::INIT } }
    }

    /// Any float `[classes]`. Default: none.
    pub fn bias(mut self, bias: impl Into<Input<'a>>) -> Self {
        self.layer.bias = bias.into().operand;
        self
    }

    /// Bytes that a call may allocate. 0, the default: as few as run near full speed, for f32 at most 2 MiB a
    /// thread, and `features` KiB a thread more where a gradient of 16 bits needs sums in f32, beside 150 bytes a
    /// row. With less memory than all threads need, fewer work; less than one needs is an [`Error::Param`].
    ///
    /// With enough beside that for the logits of 64 rows or more, up to 256 at a time, a call that would make them
    /// again, for the gradient of the weight for example, keeps them: three matrix products in place of four. Where the
    /// gradient of the weight has 16 bits, it then needs 4 bytes for each of its elements too.
    pub fn workspace(mut self, bytes: usize) -> Self {
        self.layer.workspace = bytes;
        self
    }

    /// Calls add the gradient of the hidden states to what the output holds.
    pub fn accumulate_hidden(self, on: bool) -> Self {
        self.flag(XENT_LINEAR_ACCUMULATE_HIDDEN, on)
    }

    /// Calls add the gradient of the weight to what the output holds.
    pub fn accumulate_weight(self, on: bool) -> Self {
        self.flag(XENT_LINEAR_ACCUMULATE_WEIGHT, on)
    }

    /// Calls add the gradient of the bias to what the output holds.
    pub fn accumulate_bias(self, on: bool) -> Self {
        self.flag(XENT_LINEAR_ACCUMULATE_BIAS, on)
    }

    fn flag(mut self, bit: u32, on: bool) -> Self {
        self.layer.flags = if on { self.layer.flags | bit } else { self.layer.flags & !bit };
        self
    }

    /// Computes the loss.
    pub fn forward<'b, 'c, 'd>(
        &self,
        hidden: impl Into<Input<'b>>,
        weight: impl Into<Input<'c>>,
        targets: impl Into<Input<'d>>,
    ) -> Result<f64, Error> {
        let mut loss = 0.0;
        let results = Results { loss: Some(&mut loss), ..Results::default() };
        self.forward_with(hidden, weight, targets, results)?;
        Ok(loss)
    }

    /// Computes the results that `results` asks for.
    pub fn forward_with<'b, 'c, 'd>(
        &self,
        hidden: impl Into<Input<'b>>,
        weight: impl Into<Input<'c>>,
        targets: impl Into<Input<'d>>,
        results: Results<'_>,
    ) -> Result<(), Error> {
        let operands = [hidden.into(), weight.into(), targets.into()].map(|of| of.operand);
        self.run(Pass::Forward, operands, &results.raw(), None)
    }

    /// Computes results without targets: [`lse`](Results::lse), [`argmax`](Results::argmax),
    /// [`entropy`](Results::entropy), [`top_classes`](Results::top_classes),
    /// [`top_log_probs`](Results::top_log_probs). Any other result is an [`Error::Null`].
    pub fn evaluate<'b, 'c>(
        &self,
        hidden: impl Into<Input<'b>>,
        weight: impl Into<Input<'c>>,
        results: Results<'_>,
    ) -> Result<(), Error> {
        let operands = [hidden.into().operand, weight.into().operand, Operand::ABSENT];
        self.run(Pass::Forward, operands, &results.raw(), None)
    }

    /// Computes the gradients from `lse` (`[rows]`) of a forward: for losses whose factors depend on the row losses.
    pub fn backward<'b, 'c, 'd>(
        &self,
        hidden: impl Into<Input<'b>>,
        weight: impl Into<Input<'c>>,
        targets: impl Into<Input<'d>>,
        lse: &[f64],
        grads: LinearGrads<'_>,
    ) -> Result<(), Error> {
        let operands = [hidden.into(), weight.into(), targets.into()].map(|of| of.operand);
        let results = RawResults { lse: Input::from(lse).operand, ..RawResults::NONE };
        self.run(Pass::Backward, operands, &results, Some(grads))
    }

    /// Computes the loss and the gradients that `grads` asks for.
    pub fn forward_backward<'b, 'c, 'd>(
        &self,
        hidden: impl Into<Input<'b>>,
        weight: impl Into<Input<'c>>,
        targets: impl Into<Input<'d>>,
        grads: LinearGrads<'_>,
    ) -> Result<f64, Error> {
        let mut loss = 0.0;
        let results = Results { loss: Some(&mut loss), ..Results::default() };
        self.forward_backward_with(hidden, weight, targets, grads, results)?;
        Ok(loss)
    }

    /// Computes the gradients and the results that are asked for.
    pub fn forward_backward_with<'b, 'c, 'd>(
        &self,
        hidden: impl Into<Input<'b>>,
        weight: impl Into<Input<'c>>,
        targets: impl Into<Input<'d>>,
        grads: LinearGrads<'_>,
        results: Results<'_>,
    ) -> Result<(), Error> {
        let operands = [hidden.into(), weight.into(), targets.into()].map(|of| of.operand);
        self.run(Pass::ForwardBackward, operands, &results.raw(), Some(grads))
    }

    /// Computes the state of each row over one shard of a vocabulary, as
    /// [`CrossEntropy::partial_forward`] does: weight and bias are those of the shard's classes. The loss and the other
    /// results of merged states come from [`CrossEntropy::partial_finish`].
    pub fn partial_forward<'b, 'c, 'd>(
        &self,
        hidden: impl Into<Input<'b>>,
        weight: impl Into<Input<'c>>,
        targets: impl Into<Input<'d>>,
        class_offset: usize,
        total_classes: usize,
        partials: &mut [Partial],
    ) -> Result<(), Error> {
        let operands = [hidden.into(), weight.into(), targets.into()].map(|of| of.operand);
        let place = partials_place(class_offset, total_classes, partials);
        self.partial(operands, &place, None)
    }

    /// Computes what one shard contributes to the gradients, from the merged states of all shards. The gradients of
    /// weight and bias are those of the shard's classes. That of the hidden states is a part: the sum of all shards'
    /// parts is the gradient.
    #[allow(
        clippy::too_many_arguments,
        reason = "the operands, the shard's place, and where the gradients go"
    )]
    pub fn partial_backward<'b, 'c, 'd>(
        &self,
        hidden: impl Into<Input<'b>>,
        weight: impl Into<Input<'c>>,
        targets: impl Into<Input<'d>>,
        class_offset: usize,
        total_classes: usize,
        merged: &[Partial],
        grads: LinearGrads<'_>,
    ) -> Result<(), Error> {
        let operands = [hidden.into(), weight.into(), targets.into()].map(|of| of.operand);
        let place = merged_place(class_offset, total_classes, merged);
        self.partial(operands, &place, Some(grads))
    }

    fn partial(
        &self,
        [hidden, weight, targets]: [Operand; 3],
        place: &Place,
        grads: Option<LinearGrads>,
    ) -> Result<(), Error> {
        let problem = Problem { targets, ..self.problem.problem };
        let layer = Layer { hidden, weight, ..self.layer };
        let request = grads.map(|grads| self.request(grads));
        let (team, isa) = (self.problem.team(), self.problem.isa);
        // SAFETY: every operand is memory that the call borrows, mutably if it is an output; the states are written only
        // without gradients, by `partial_forward`, which borrows them mutably. Validation refuses shapes and strides that
        // reach past the end of a slice or an array; whoever made an operand of a pointer vouched for its elements.
        // Validation also refuses to read what is not initialised.
        unsafe { run::linear_partial(&problem, &layer, place, request.as_ref(), &team, isa) }
    }

    /// What the gradients are multiplied by, and where they go.
    fn request(&self, grads: LinearGrads) -> Request {
        let to = |output: Option<Output>| output.map_or(Operand::ABSENT, |output| output.operand);
        Request {
            output: self.problem.grad_output,
            scale: self.problem.grad_scale,
            hidden: to(grads.hidden),
            weight: to(grads.weight),
            bias: to(grads.bias),
        }
    }

    fn run(
        &self,
        pass: Pass,
        [hidden, weight, targets]: [Operand; 3],
        results: &RawResults,
        grads: Option<LinearGrads>,
    ) -> Result<(), Error> {
        let problem = Problem { targets, ..self.problem.problem };
        let layer = Layer { hidden, weight, ..self.layer };
        let request = grads.map(|grads| self.request(grads));
        let (team, isa) = (self.problem.team(), self.problem.isa);
        // SAFETY: every operand is memory that the call borrows, mutably if it is an output. Validation
        // refuses shapes and strides that reach past the `available` elements of a slice or an array;
        // whoever made an operand of a pointer vouched for its elements. Validation also refuses to read
        // what is not initialised.
        unsafe { run::linear(&problem, &layer, pass, results, request.as_ref(), &team, isa) }
    }
}
