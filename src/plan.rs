//! A validated problem as plain data: views, strides, and the scalars that all rows share.
//!
//! src/validate/ makes every plan, and the code below it relies on what validation established: each
//! view covers its shape in memory of this call, aligned to its elements; outputs overlap nothing
//! but, where `in_place` says so, the logits; every target index is in range or ignored. A plan holds
//! no threshold and no choice of algorithm: those stand in strategy.rs.

use crate::kernels::logit_transform::Transform;
use crate::strategy;
use crate::view::{Axis, FloatType, IntegerType, Position, Span, View};

/// The sizes of a problem: `rows·inner` distributions over `classes` classes.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// N
    pub rows: usize,
    /// C
    pub classes: usize,
    /// K
    pub inner: usize,
}

impl Shape {
    /// N·K
    #[inline(always)]
    pub fn distributions(&self) -> usize {
        self.rows * self.inner
    }

    /// Distribution `index` of N·K, in the order of packed memory.
    #[inline(always)]
    pub fn position(&self, index: usize) -> Position {
        if self.inner == 1 {
            Position { row: index, inner: 0 }
        } else {
            Position { row: index / self.inner, inner: index % self.inner }
        }
    }

    /// Distributions `first..first + len` as spans, each with the number of distributions before it.
    #[inline(always)]
    pub fn spans(&self, first: usize, len: usize) -> impl Iterator<Item = (usize, Span)> {
        let mut start = 0;
        std::iter::from_fn(move || {
            let at = self.position(first + start);
            let (axis, left) = if self.inner == 1 {
                (Axis::Rows, len)
            } else {
                (Axis::Inner, self.inner - at.inner)
            };
            let span = Span { first: at, axis, len: left.min(len - start) };
            let found = (start < len).then_some((start, span));
            start += span.len;
            found
        })
    }

    /// Distributions along an axis.
    #[inline(always)]
    pub fn along(&self, axis: Axis) -> usize {
        match axis {
            Axis::Rows => self.rows,
            Axis::Inner => self.inner,
        }
    }
}

/// Which way the lanes of the kernels run over the logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// Along the classes of a row, which are contiguous.
    Contiguous,
    /// Along distributions: classes are few, or not contiguous.
    Strided(Axis),
}

/// A problem over stored logits: a loss or a softmax.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// The sizes.
    pub shape: Shape,
    /// How the logits lie.
    pub layout: Layout,
    /// `[rows, classes, inner]`
    pub logits: View<FloatType>,
    /// Where the gradient, or the softmax, goes: absent in a forward of the loss.
    pub output: Option<Output>,
    /// What is computed.
    pub operation: Operation,
}

/// A plain call: without options, or with class weights and label smoothing. Validation checks it (validate/plain.rs).
#[derive(Clone, Copy, Debug)]
pub struct Plain {
    /// N
    pub rows: usize,
    /// C
    pub classes: usize,
    /// The type of logits and gradient. Options do not go with f64.
    pub dtype: FloatType,
    /// `[rows, classes]`
    pub logits: *const u8,
    /// `[rows]`
    pub targets: *const u8,
    /// The type of the targets.
    pub target_type: IntegerType,
    /// The target of ignored rows.
    pub ignore_index: i64,
    /// f32 `[classes]`, or null.
    pub class_weights: *const u8,
    /// ε
    pub label_smoothing: f64,
    /// The loss is a mean; else a sum.
    pub is_mean: bool,
    /// Where the loss goes.
    pub loss: *mut f64,
    /// Where the gradient goes: `[rows, classes]`, apart from the logits or exactly there. Null in a
    /// forward.
    pub gradient: *mut u8,
    /// What it is multiplied by.
    pub scale: f64,
}

/// A linear layer that makes the logits of a loss: `hidden · weightᵀ + bias`. They are never stored, so the plan of
/// the loss has views of no logits and of no gradient; their type is that of the lanes.
#[derive(Clone, Copy, Debug)]
pub struct Linear {
    /// D
    pub features: usize,
    /// `[rows, features]`; the features of a row are contiguous, here and below.
    pub hidden: View<FloatType>,
    /// `[classes, features]`, of the same type.
    pub weight: View<FloatType>,
    /// `[classes]`
    pub bias: Option<View<FloatType>>,
    /// Where the gradient of the hidden states goes.
    pub hidden_gradient: Option<LinearGradient>,
    /// Where that of the weight goes.
    pub weight_gradient: Option<LinearGradient>,
    /// Where that of the bias goes.
    pub bias_gradient: Option<LinearGradient>,
    /// Bytes that the call may allocate; 0 for as few as run near full speed.
    pub workspace: usize,
}

/// A gradient of a linear layer: of the operand's type, or f32.
#[derive(Clone, Copy, Debug)]
pub struct LinearGradient {
    /// Where it goes.
    pub view: View<FloatType>,
    /// It is added to what the memory holds.
    pub accumulate: bool,
}

/// What a plan computes.
#[derive(Clone, Copy, Debug)]
#[allow(clippy::large_enum_variant, reason = "a plan stays on the stack: calls allocate nothing")]
pub enum Operation {
    /// Cross-entropy or its gradient.
    Loss(Loss),
    /// A softmax.
    Softmax(Softmax),
}

/// Which softmax.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Softmax {
    /// `p_c`
    Probabilities,
    /// `ln p_c`
    LogProbabilities,
}

/// An output of the logits' shape.
#[derive(Clone, Copy, Debug)]
pub struct Output {
    /// Where it goes.
    pub view: View<FloatType>,
    /// The output replaces the logits.
    pub in_place: bool,
    /// The output is added to what the memory holds.
    pub accumulate: bool,
    /// Stores bypass the caches.
    pub stream: bool,
    /// Elements between the classes of a row and the next row that are set to 0.
    pub padding: usize,
}

/// Which call of the loss.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    /// Losses, lse and statistics.
    Forward,
    /// The gradient of the logits, from lse.
    Backward,
    /// Losses and the gradient of the logits.
    ForwardBackward,
    /// The gradient of probability targets, from lse.
    TargetGradient,
}

/// The operands and options of a cross-entropy.
#[derive(Clone, Copy, Debug)]
pub struct Loss {
    /// Which call.
    pub pass: Pass,
    /// What the rows are to predict.
    pub targets: Targets,
    /// `[classes]`
    pub class_weights: Option<View<FloatType>>,
    /// Σ of the class weights; the number of classes without them.
    pub weight_total: f64,
    /// `[rows, inner]`
    pub row_weights: Option<View<FloatType>>,
    /// u8 `[rows, inner]`; 0 = ignored.
    pub row_mask: Option<View<IntegerType>>,
    /// The target index that marks a row as ignored.
    pub ignore_index: i64,
    /// ε
    pub label_smoothing: f64,
    /// ε/C
    pub smoothing_share: f64,
    /// λ
    pub z_loss: f64,
    /// β; 0 where neither losses nor a gradient of the logits are computed.
    pub entropy_bonus: f64,
    /// None where it would change nothing.
    pub transform: Option<Transform>,
    /// The logits are log-probabilities.
    pub log_probs: bool,
    /// f64 `[rows, inner]`: an input of a backward, an output of a forward.
    pub lse: Option<View<FloatType>>,
    /// Output: f32 or f64 `[rows, inner]`.
    pub row_losses: Option<View<FloatType>>,
    /// Output: i64 `[rows, inner]`.
    pub argmax: Option<View<IntegerType>>,
    /// Output: f32 or f64 `[rows, inner]`.
    pub entropy: Option<View<FloatType>>,
    /// Output: f32 or f64 `[rows, inner]`.
    pub kl: Option<View<FloatType>>,
    /// The number of rows whose largest logit is the target's is wanted.
    pub counts_correct: bool,
    /// The results that come from the order of a row's logits, if one is wanted.
    pub rankings: Option<Rankings>,
    /// What the gradient is multiplied by; absent in a forward.
    pub gradient: Option<GradientFactors>,
    /// The plan's classes are a shard of a larger vocabulary.
    pub shard: Option<Shard>,
}

/// The results that come from the order of a row's logits as stored.
#[derive(Clone, Copy, Debug)]
pub struct Rankings {
    /// How many classes of each row are listed; 0 if none are.
    pub top_count: usize,
    /// Output: i64 `[rows, top_count, inner]`.
    pub top_classes: Option<View<IntegerType>>,
    /// Output: f32 or f64 `[rows, top_count, inner]`.
    pub top_log_probs: Option<View<FloatType>>,
    /// Output: i64 `[rows, inner]`.
    pub target_ranks: Option<View<IntegerType>>,
}

/// A block of the classes of a vocabulary. Target indices are those of the whole; so is C in ε/C, and so are
/// the class weights that [`Loss::weight_total`] adds up.
#[derive(Clone, Copy, Debug)]
pub struct Shard {
    /// The first class of the shard.
    pub offset: usize,
    /// The weights of all classes of the vocabulary; [`Loss::class_weights`] are those of the shard.
    pub all_weights: Option<View<FloatType>>,
    /// Σ of the weights of the shard's classes; their number without weights.
    pub own_weight: f64,
    /// `[rows, inner]`, f64: the first member of each row's [`Partial`](crate::partial::Partial), which a
    /// forward writes and a backward reads.
    pub states: View<FloatType>,
}

/// What the rows are to predict.
#[derive(Clone, Copy, Debug)]
pub enum Targets {
    /// Nothing.
    Absent,
    /// Class indices, `[rows, inner]`.
    Indices(View<IntegerType>),
    /// Probabilities of all classes, or of some.
    Probabilities(Probabilities),
}

/// Probability targets.
#[derive(Clone, Copy, Debug)]
pub struct Probabilities {
    /// `[rows, classes, inner]`, or `[rows, k, inner]` where classes are listed: the probabilities, or
    /// the logits of a teacher.
    pub values: View<FloatType>,
    /// The classes that the values are of; `None` for all.
    pub listed: Option<Listed>,
    /// The values are logits, whose softmax is the target.
    pub teacher: Option<Teacher>,
}

/// The classes of sparse targets.
#[derive(Clone, Copy, Debug)]
pub struct Listed {
    /// `[rows, k, inner]`, indices of the whole vocabulary. A place that holds [`Loss::ignore_index`] is
    /// unused.
    pub classes: View<IntegerType>,
    /// k
    pub count: usize,
}

/// A teacher whose softmax is the target.
#[derive(Clone, Copy, Debug)]
pub struct Teacher {
    /// What its logits are multiplied by.
    pub scale: f64,
    /// f64 `[rows, 2, inner]`, in memory of the call: the shift of a row's exponentials, and the factor that
    /// makes them probabilities. The driver that reads a row's operands writes them; the factor is NaN where
    /// there is no softmax.
    pub softmax: View<FloatType>,
}

/// What the gradient of every row is multiplied by.
#[derive(Clone, Copy, Debug)]
pub struct GradientFactors {
    /// grad_output of each row, under reduction none.
    pub grad_output: Option<View<FloatType>>,
    /// The factor that all rows share: grad_output, grad_scale and the mean's denominator.
    pub scale: f64,
    /// The factor of the z-loss part, which has a denominator of its own.
    pub z_scale: f64,
}

/// The target of one row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// The problem has no targets.
    Absent,
    /// ignore_index or the mask excludes the row.
    Ignored,
    /// A class.
    Class(usize),
    /// A distribution.
    Distribution,
}

impl Plan {
    /// The loss that the plan computes, if it is one.
    #[inline(always)]
    pub fn loss(&self) -> Option<&Loss> {
        match &self.operation {
            Operation::Loss(loss) => Some(loss),
            Operation::Softmax(_) => None,
        }
    }

    /// What happens to the logits before the softmax.
    #[inline(always)]
    pub fn transform(&self) -> Option<&Transform> {
        self.loss().and_then(|loss| loss.transform.as_ref())
    }
}

impl Loss {
    /// The targets are class indices.
    #[inline(always)]
    pub fn has_indices(&self) -> bool {
        matches!(self.targets, Targets::Indices(_))
    }

    /// The targets are probabilities, of all classes or of some.
    #[inline(always)]
    pub fn has_probabilities(&self) -> bool {
        matches!(self.targets, Targets::Probabilities(_))
    }

    /// The rows start from a known lse.
    #[inline(always)]
    pub fn is_from_lse(&self) -> bool {
        matches!(self.pass, Pass::Backward | Pass::TargetGradient)
    }

    /// The call computes losses, and the results that go with them.
    #[inline(always)]
    pub fn computes_losses(&self) -> bool {
        matches!(self.pass, Pass::Forward | Pass::ForwardBackward)
    }

    /// The loss is a sum over all classes, so that the first sweep adds up their logits too.
    #[inline(always)]
    pub fn spreads_mass(&self) -> bool {
        match self.targets {
            Targets::Absent => false,
            Targets::Indices(_) => self.spreads_smoothing() && self.pass != Pass::Backward,
            // The states of a shard have the total mass.
            Targets::Probabilities(_) => self.pass != Pass::Backward || self.shard.is_none(),
        }
    }

    /// Label smoothing spreads a mass over the classes of index targets.
    #[inline(always)]
    pub fn spreads_smoothing(&self) -> bool {
        self.label_smoothing > 0.0 && self.has_indices()
    }

    /// Rows may be ordinary, and are summed in strips or as short rows: a loss over class indices without options that
    /// change the logits or need the lse, smoothed in lanes of f32 alone. Which results are wanted makes no difference.
    #[inline(always)]
    pub fn has_ordinary_rows(&self, classes: usize, dtype: FloatType) -> bool {
        self.has_indices()
            && self.computes_losses()
            && self.transform.is_none()
            && !self.log_probs
            && self.z_loss == 0.0
            && !self.has_bonus()
            && self.shard.is_none()
            && (dtype.has_f32_lanes() || self.label_smoothing == 0.0)
            && strategy::has_ordinary_rows(classes)
    }

    /// Each class of a row has a mass of its own: a class weight, or a target probability.
    #[inline(always)]
    pub fn has_masses(&self) -> bool {
        self.class_weights.is_some() || self.has_probabilities()
    }

    /// The lse of each row is a result, or a result is made of it.
    #[inline(always)]
    pub fn wants_lse(&self) -> bool {
        let of_top = |rankings: &Rankings| rankings.top_log_probs.is_some();
        let of_others = self.kl.is_some() || self.rankings.as_ref().is_some_and(of_top);
        self.lse.is_some() || of_others
    }

    /// The largest logit is looked for.
    #[inline(always)]
    pub fn wants_argmax(&self) -> bool {
        self.pass != Pass::Backward && (self.argmax.is_some() || self.counts_correct)
    }

    /// The loss, or the gradient of the logits, includes an entropy bonus.
    #[inline(always)]
    pub fn has_bonus(&self) -> bool {
        self.entropy_bonus != 0.0
    }

    /// A backward from the merged states of shards, which have the entropies that a bonus needs.
    #[inline(always)]
    pub fn has_entropies(&self) -> bool {
        self.pass == Pass::Backward && self.shard.is_some()
    }

    /// The first sweep adds up what the entropy is made of.
    #[inline(always)]
    pub fn wants_entropy(&self) -> bool {
        self.entropy.is_some() || (self.has_bonus() && !self.has_entropies())
    }

    /// The target of a row.
    ///
    /// # Safety
    /// The row is one of the plan's.
    #[inline(always)]
    pub unsafe fn target(&self, at: Position) -> Target {
        if let Targets::Absent = self.targets {
            return Target::Absent;
        }
        // SAFETY: the mask and the targets cover all rows of the plan (validation), `at` among them
        // (# Safety).
        unsafe {
            if let Some(mask) = &self.row_mask
                && mask.integer(at) == 0
            {
                return Target::Ignored;
            }
            match &self.targets {
                Targets::Indices(indices) => match indices.integer(at) {
                    y if y == self.ignore_index => Target::Ignored,
                    y => Target::Class(y as usize),
                },
                Targets::Absent | Targets::Probabilities(_) => Target::Distribution,
            }
        }
    }

    /// r, the weight of a row.
    ///
    /// # Safety
    /// The row is one of the plan's.
    #[inline(always)]
    pub unsafe fn row_weight(&self, at: Position) -> f64 {
        match &self.row_weights {
            // SAFETY: row weights cover all rows of the plan (validation).
            Some(view) => unsafe { view.real(at, 0) },
            None => 1.0,
        }
    }

    /// w_c, the weight of a class.
    ///
    /// # Safety
    /// The class is one of the plan's.
    #[inline(always)]
    pub unsafe fn class_weight(&self, class: usize) -> f64 {
        match &self.class_weights {
            // SAFETY: class weights cover all classes of the plan (validation).
            Some(view) => unsafe { view.real(Position::FIRST, class) },
            None => 1.0,
        }
    }

    /// The weight of the class of a target index.
    ///
    /// # Safety
    /// The class is one of the vocabulary's.
    #[inline(always)]
    pub unsafe fn target_weight(&self, class: usize) -> f64 {
        match &self.shard {
            // SAFETY: these weights cover all classes of the vocabulary (validation).
            Some(Shard { all_weights: Some(view), .. }) => unsafe {
                view.real(Position::FIRST, class)
            },
            // SAFETY: without a shard the vocabulary is the plan's classes; a shard without weights has none
            // here either.
            _ => unsafe { self.class_weight(class) },
        }
    }
}
