//! The Rust surface of vocabularies in shards.

use crate::cross_entropy::{CrossEntropy, Results};
use crate::error::Error;
use crate::operand::{Input, Output};
use crate::partial::Partial;
use crate::run;
use crate::validate::cross_entropy::Problem;
use crate::validate::operand::Operand;
use crate::validate::shards::Place;

/// # Shards of a vocabulary
///
/// A vocabulary may lie in shards: in blocks of one matrix, or with threads, processes or machines. Each
/// holds the columns of some consecutive classes. Their number is the call's [`classes`](Self::new), and may
/// be 0. What is known of a row after one shard is its [`Partial`]. Merged over all shards, the states give
/// the results and the gradient of the whole.
///
/// 1. [`partial_forward`](Self::partial_forward) over each shard;
/// 2. [`Partial::merge_all`] of the shards' states, in any order;
/// 3. [`partial_finish`](Self::partial_finish) for the loss and the other results;
/// 4. [`partial_backward`](Self::partial_backward) over each shard, for the gradient of its columns.
///
/// Target indices and class weights are those of the whole vocabulary of `total_classes`, and so is the C of
/// label smoothing. Probability targets are those of the shard's classes.
/// [`log_probs`](Self::log_probs) has no states, and no state knows the order of the logits, which
/// [`top_classes`](Results::top_classes), [`top_log_probs`](Results::top_log_probs) and
/// [`target_ranks`](Results::target_ranks) come from: [`Error::Param`].
///
/// ```
/// use xent::{CrossEntropy, Input, Partial, Results};
///
/// let logits = [0.1f32, 0.2, 0.3, 0.4, 0.4, 0.3, 0.2, 0.1]; // [rows = 2, classes = 4]
/// let targets = [0i32, 3];
/// // The shards are the first class, and the other three.
/// let shards = [(0, 1), (1, 3)];
/// let columns = |offset: usize| Input::from(&logits[offset..]).strides([4, 1, 0]);
///
/// let mut merged = [Partial::EMPTY; 2];
/// for (offset, classes) in shards {
///     let mut partials = [Partial::EMPTY; 2];
///     let shard = CrossEntropy::new(2, classes);
///     shard.partial_forward(columns(offset), &targets, offset, 4, &mut partials)?;
///     Partial::merge_all(&mut merged, &partials);
/// }
/// let mut loss = 0.0;
/// let results = Results { loss: Some(&mut loss), ..Results::default() };
/// CrossEntropy::new(2, 4).partial_finish(&targets, 4, &merged, results)?;
/// assert!((loss - 1.5425).abs() < 1e-4);
///
/// let mut grad = [0f32; 6]; // of the second shard's columns
/// let shard = CrossEntropy::new(2, 3);
/// shard.partial_backward(columns(1), &targets, 1, 4, &merged, &mut grad)?;
/// assert!((grad[5] + 0.3931).abs() < 1e-4); // its target is the last class
/// # Ok::<(), xent::Error>(())
/// ```
impl CrossEntropy<'_> {
    /// Computes the state of each row over the classes of one shard, from `class_offset` on, of a vocabulary
    /// of `total_classes`. `partials`: `[rows, inner]`. Reads the logits from memory once.
    pub fn partial_forward<'b, 'c>(
        &self,
        logits: impl Into<Input<'b>>,
        targets: impl Into<Input<'c>>,
        class_offset: usize,
        total_classes: usize,
        partials: &mut [Partial],
    ) -> Result<(), Error> {
        let (logits, targets) = (logits.into().operand, targets.into().operand);
        let place = partials_place(class_offset, total_classes, partials);
        self.partial(logits, targets, &place, None)
    }

    /// As [`partial_forward`](Self::partial_forward), without targets: for lse, argmax and entropy.
    pub fn partial_evaluate<'b>(
        &self,
        logits: impl Into<Input<'b>>,
        class_offset: usize,
        total_classes: usize,
        partials: &mut [Partial],
    ) -> Result<(), Error> {
        let place = partials_place(class_offset, total_classes, partials);
        self.partial(logits.into().operand, Operand::ABSENT, &place, None)
    }

    /// Computes the results that `results` asks for from the merged states of all shards. Of the targets it
    /// reads indices alone; of probabilities the states have all that is needed, and those of any shard
    /// serve.
    pub fn partial_finish<'b>(
        &self,
        targets: impl Into<Input<'b>>,
        total_classes: usize,
        merged: &[Partial],
        results: Results<'_>,
    ) -> Result<(), Error> {
        self.finish(targets.into().operand, total_classes, merged, results)
    }

    /// As [`partial_finish`](Self::partial_finish), without targets: lse, argmax and entropy.
    pub fn partial_finish_evaluate(
        &self,
        total_classes: usize,
        merged: &[Partial],
        results: Results<'_>,
    ) -> Result<(), Error> {
        self.finish(Operand::ABSENT, total_classes, merged, results)
    }

    /// Computes the gradient of the loss with respect to the logits of one shard from the merged states of
    /// all shards. The place of the shard is that of [`partial_forward`](Self::partial_forward); the gradient
    /// is that of [`backward`](Self::backward).
    pub fn partial_backward<'b, 'c, 'd>(
        &self,
        logits: impl Into<Input<'b>>,
        targets: impl Into<Input<'c>>,
        class_offset: usize,
        total_classes: usize,
        merged: &[Partial],
        grad: impl Into<Output<'d>>,
    ) -> Result<(), Error> {
        let (logits, targets) = (logits.into().operand, targets.into().operand);
        let place = merged_place(class_offset, total_classes, merged);
        self.partial(logits, targets, &place, Some(grad.into().operand))
    }

    /// As [`partial_backward`](Self::partial_backward); the gradient replaces the logits.
    pub fn partial_backward_in_place<'b, 'c>(
        &self,
        logits: impl Into<Output<'b>>,
        targets: impl Into<Input<'c>>,
        class_offset: usize,
        total_classes: usize,
        merged: &[Partial],
    ) -> Result<(), Error> {
        let (logits, targets) = (logits.into().operand, targets.into().operand);
        let place = merged_place(class_offset, total_classes, merged);
        self.partial(logits, targets, &place, Some(logits))
    }

    fn partial(
        &self,
        logits: Operand,
        targets: Operand,
        place: &Place,
        grad: Option<Operand>,
    ) -> Result<(), Error> {
        let problem = Problem { logits, targets, ..self.problem };
        let request = grad.map(|gradient| self.request(gradient));
        // SAFETY: every operand is memory that the call borrows, mutably if it is an output; the states are
        // written only without a gradient, by the callers that borrow them mutably. Validation refuses shapes
        // and strides that reach past the end of a slice or an array; whoever made an operand of a pointer
        // vouched for its elements. Validation also refuses to read what is not initialised.
        unsafe { run::partial(&problem, place, request.as_ref(), &self.team(), self.isa) }
    }

    fn finish(
        &self,
        targets: Operand,
        total_classes: usize,
        merged: &[Partial],
        results: Results<'_>,
    ) -> Result<(), Error> {
        let problem = Problem { targets, ..self.problem };
        let place = merged_place(0, total_classes, merged);
        let results = results.raw();
        // SAFETY: the operands are memory that the call borrows, the results mutably. Validation refuses
        // shapes and strides that reach past the end of a slice or an array, and whoever made an operand of
        // a pointer vouched for its elements.
        unsafe { run::partial_finish(&problem, &place, &results, &self.team(), self.isa) }
    }
}

/// The place of merged states, which the call only reads.
pub(crate) fn merged_place(offset: usize, total: usize, merged: &[Partial]) -> Place {
    Place { offset, total, states: merged.as_ptr().cast_mut(), available: merged.len() }
}

/// The place of states that a call writes.
pub(crate) fn partials_place(offset: usize, total: usize, partials: &mut [Partial]) -> Place {
    Place { offset, total, states: partials.as_mut_ptr(), available: partials.len() }
}
