//! The Rust surface of cross-entropy: it turns operands into descriptors and calls [`run`].

use crate::codes::*;
use crate::dispatch::Isa;
use crate::error::Error;
use crate::operand::{Input, Output};
use crate::parallel::Team;
use crate::plan::Pass;
use crate::pool::PoolRef;
use crate::run;
use crate::validate::cross_entropy::{GradientRequest, Problem, Results as RawResults};
use crate::validate::operand::Operand;
use crate::validate::plain;
use std::marker::PhantomData;

/// How the loss is formed from the row losses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Reduction {
    /// Each part of the loss divided by its denominator, a sum over kept rows: the cross-entropy
    /// part by Σ `r·w_y` (Σ `r` with probability targets), the z-loss part by Σ `r`.
    #[default]
    Mean,
    /// Σ of the row losses.
    Sum,
    /// No reduced loss: [`Results::row_losses`] alone. The gradient is that of each row's own loss.
    None,
}

/// The results of a forward. A call does not compute a result that is `None`. One pass over the
/// logits computes all of them.
///
/// ```
/// use xent::{CrossEntropy, Results};
///
/// let logits = [0.1f32, 0.2, 0.3, 0.4, 0.4, 0.3, 0.2, 0.1];
/// let (mut loss, mut correct) = (0.0, 0);
/// let (mut row_losses, mut argmax) = ([0f32; 2], [0; 2]);
/// let results = Results {
///     loss: Some(&mut loss),
///     row_losses: Some((&mut row_losses).into()),
///     argmax: Some(&mut argmax),
///     correct: Some(&mut correct),
///     ..Results::default()
/// };
/// CrossEntropy::new(2, 4).forward_with(&logits, &[0i64, 0], results)?;
/// assert!((loss - (1.5425 + 1.2425) / 2.0).abs() < 1e-4);
/// assert_eq!((argmax, correct), ([3, 0], 1));
/// # Ok::<(), xent::Error>(())
/// ```
#[derive(Default)]
pub struct Results<'a> {
    /// The reduced loss, z-loss and entropy bonus included; not with [`Reduction::None`].
    pub loss: Option<&'a mut f64>,
    /// f32 or f64 `[rows, inner]`, z-loss and entropy bonus included; 0 where ignored. Never divided by
    /// anything.
    pub row_losses: Option<Output<'a>>,
    /// `[rows, inner]`, packed: ln Σ exp of the scaled and capped logits, of ignored rows too. Not
    /// with [`log_probs`](CrossEntropy::log_probs).
    pub lse: Option<&'a mut [f64]>,
    /// The z-loss part of `loss`, 0 if z-loss is off. Not with [`Reduction::None`] and
    /// [`log_probs`](CrossEntropy::log_probs).
    pub z_loss: Option<&'a mut f64>,
    /// The denominator of a mean's cross-entropy part, whatever the reduction.
    pub normalizer: Option<&'a mut f64>,
    /// The denominator of a mean's z-loss part and entropy bonus, whatever the reduction, these on or off.
    pub z_normalizer: Option<&'a mut f64>,
    /// The number of rows that are not ignored.
    pub kept_rows: Option<&'a mut u64>,
    /// `[rows, inner]`, packed: the predicted class, of ignored rows too. It is the lowest index of a
    /// NaN among the logits as stored, else of their maximum (0 if all are −inf).
    pub argmax: Option<&'a mut [i64]>,
    /// The number of kept rows whose argmax is the target index; index targets only.
    pub correct: Option<&'a mut u64>,
    /// f32 or f64 `[rows, inner]`: −Σ `p_c·logp_c`, of ignored rows too. Not with
    /// [`log_probs`](CrossEntropy::log_probs).
    pub entropy: Option<Output<'a>>,
    /// f32 or f64 `[rows, inner]`: the divergence Σ `t'_c·(ln t'_c − logp_c)`, without weights; 0 where
    /// ignored, NaN where a `t'_c` is negative. Probability targets only.
    pub kl: Option<Output<'a>>,
    /// The entropy bonus's part of `loss`, 0 if there is none. Not with [`Reduction::None`] and
    /// [`log_probs`](CrossEntropy::log_probs).
    pub entropy_bonus: Option<&'a mut f64>,
    /// `[rows, top_count, inner]`, packed: the classes of the largest logits as stored, the largest
    /// first, of ignored rows too. Of equal logits the lower class comes first; a NaN comes before
    /// every number. With a `top_count` of 0 it is an [`Error::Param`].
    ///
    /// ```
    /// # use xent::{CrossEntropy, Results};
    /// let (mut top_classes, mut top_log_probs) = ([0; 2], [0f32; 2]);
    /// let mut target_ranks = [0; 1];
    /// let results = Results {
    ///     top_count: 2,
    ///     top_classes: Some(&mut top_classes),
    ///     top_log_probs: Some((&mut top_log_probs).into()),
    ///     target_ranks: Some(&mut target_ranks),
    ///     ..Results::default()
    /// };
    /// CrossEntropy::new(1, 4).forward_with(&[0.1f32, 0.4, 0.3, 0.2], &[3i64], results)?;
    /// assert_eq!((top_classes, target_ranks), ([1, 2], [2]));
    /// assert!((top_log_probs[0] + 1.2425).abs() < 1e-4);
    /// # Ok::<(), xent::Error>(())
    /// ```
    pub top_classes: Option<&'a mut [i64]>,
    /// f32 or f64 `[rows, top_count, inner]`: `logp_c` of the same classes, `x_c − lse` of the scaled
    /// and capped logits; with [`log_probs`](CrossEntropy::log_probs) the log-probabilities as they
    /// are stored. With a `top_count` of 0 it is an [`Error::Param`].
    pub top_log_probs: Option<Output<'a>>,
    /// The number of classes listed for each row, at most 64 and at most `classes`. Default: 0.
    pub top_count: usize,
    /// `[rows, inner]`, packed: the place of the target among all logits as stored, in the order of
    /// `top_classes`, from 0 on; −1 for ignored rows. Index targets only.
    pub target_ranks: Option<&'a mut [i64]>,
}

impl Results<'_> {
    /// Where the loss goes, if no other result is asked for.
    #[inline(always)]
    fn loss_alone(&mut self) -> Option<*mut f64> {
        // All of them are named: a result to come does not compile until this function knows it.
        match self {
            Results {
                loss: Some(loss),
                row_losses: None,
                lse: None,
                z_loss: None,
                normalizer: None,
                z_normalizer: None,
                kept_rows: None,
                argmax: None,
                correct: None,
                entropy: None,
                kl: None,
                entropy_bonus: None,
                top_classes: None,
                top_log_probs: None,
                top_count: 0,
                target_ranks: None,
            } => Some(*loss),
            _ => None,
        }
    }

    pub(crate) fn raw(self) -> RawResults {
        fn pointer<T>(result: Option<&mut T>) -> *mut T {
            result.map_or(std::ptr::null_mut(), |to| to)
        }
        fn operand(output: Option<Output>) -> Operand {
            output.map_or(Operand::ABSENT, |output| output.operand)
        }
        RawResults {
            loss: pointer(self.loss),
            row_losses: operand(self.row_losses),
            lse: operand(self.lse.map(Output::from)),
            z_loss: pointer(self.z_loss),
            normalizer: pointer(self.normalizer),
            z_normalizer: pointer(self.z_normalizer),
            kept_rows: pointer(self.kept_rows),
            argmax: operand(self.argmax.map(Output::from)),
            correct: pointer(self.correct),
            entropy: operand(self.entropy),
            kl: operand(self.kl),
            entropy_bonus: pointer(self.entropy_bonus),
            top_classes: operand(self.top_classes.map(Output::from)),
            top_log_probs: operand(self.top_log_probs),
            top_count: self.top_count,
            target_ranks: operand(self.target_ranks.map(Output::from)),
        }
    }
}

/// Softmax cross-entropy: the shape and the options. The calls take the data.
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
/// The operands have N rows, C classes and K [`inner`](Self::inner) positions, and any strides:
///
/// - `logits`: f32, f64, bf16 or f16, `[rows, classes, inner]`. xent widens halves to f32.
/// - `targets`: class indices, i64, i32, u32, u16 or u8, `[rows, inner]`; or probabilities, f32,
///   f64, bf16 or f16, whatever the logits are, `[rows, classes, inner]`. xent does not check
///   probabilities, nor assume that they add up to 1.
/// - `grad`: the dtype of the logits, or f32 for halves, `[rows, classes, inner]`.
///
/// ```
/// # use xent::CrossEntropy;
/// let logits = [0.1f64, 0.2, 0.3, 0.4];
/// let probabilities = [0.7f32, 0.1, 0.1, 0.1];
/// let loss = CrossEntropy::new(1, 4).forward(&logits, &probabilities)?;
/// assert!((loss - 1.4825).abs() < 1e-4);
/// # Ok::<(), xent::Error>(())
/// ```
///
/// The letters w, r, ε and λ below are those of the formulas in docs/semantics.md. Rows are *kept*
/// unless their target index is [`ignore_index`](Self::ignore_index) or their byte of
/// [`row_mask`](Self::row_mask) is 0.
///
/// A call checks everything before it writes a byte: a call that returns an [`Error`] has written
/// nothing.
#[derive(Clone, Copy)]
#[must_use]
pub struct CrossEntropy<'a> {
    pub(crate) problem: Problem,
    pub(crate) grad_output: Operand,
    pub(crate) grad_scale: f64,
    pool: Option<PoolRef<'a>>,
    pub(crate) isa: Option<Isa>,
    slices: PhantomData<&'a [u8]>,
}

// SAFETY: the operands are those of an `Input<'a>` each, which is Send and Sync; so are the other fields.
unsafe impl Send for CrossEntropy<'_> {}
// SAFETY: the operands are those of an `Input<'a>` each, which is Send and Sync; so are the other fields.
unsafe impl Sync for CrossEntropy<'_> {}

impl<'a> CrossEntropy<'a> {
    /// `rows` rows of `classes` classes; every option at its default.
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

    /// K inner positions: logits are `[rows, classes, inner]`, operands without a class axis are
    /// `[rows, inner]`, and there are rows·inner distributions. Default: 1.
    ///
    /// For logits `[N, C, d1, .., dk]`, as in segmentation, K = d1·..·dk.
    ///
    /// ```
    /// # use xent::CrossEntropy;
    /// let logits = [0.1f32, 2.0, 0.2, 0.0, 0.3, 0.0, 0.4, 0.0]; // [rows = 1, classes = 4, inner = 2]
    /// let loss = CrossEntropy::new(1, 4).inner(2).forward(&logits, &[0u8, 0])?;
    /// assert!((loss - (1.5425 + 0.3408) / 2.0).abs() < 1e-4);
    /// # Ok::<(), xent::Error>(())
    /// ```
    pub fn inner(mut self, positions: usize) -> Self {
        self.problem.inner = positions;
        self
    }

    /// w: any float `[classes]`. Negative and zero are legal. Default: 1.
    pub fn class_weights(mut self, weights: impl Into<Input<'a>>) -> Self {
        self.problem.class_weights = weights.into().operand;
        self
    }

    /// r: any float `[rows, inner]`. Default: 1.
    pub fn row_weights(mut self, weights: impl Into<Input<'a>>) -> Self {
        self.problem.row_weights = weights.into().operand;
        self
    }

    /// u8 `[rows, inner]`; a row whose byte is 0 is ignored.
    pub fn row_mask(mut self, mask: impl Into<Input<'a>>) -> Self {
        self.problem.row_mask = mask.into().operand;
        self
    }

    /// Sparse targets: `count` classes a row, class indices of any integer type `[rows, count, inner]`. The targets of
    /// the calls are then the probabilities of these classes, floats of the same shape. The probability
    /// of a class that is not listed is 0; those of a class that is listed twice add up. A place that
    /// holds [`ignore_index`](Self::ignore_index) is unused; any other index outside of the classes is an
    /// [`Error::Target`].
    ///
    /// ```
    /// # use xent::CrossEntropy;
    /// let classes = [3u16, 0]; // of four
    /// let probabilities = [0.75f32, 0.25];
    /// let call = CrossEntropy::new(1, 4).target_classes(&classes, 2);
    /// let loss = call.forward(&[0.1f32, 0.2, 0.3, 0.4], &probabilities)?;
    /// assert!((loss - (0.75 * 1.2425 + 0.25 * 1.5425)).abs() < 1e-4);
    /// # Ok::<(), xent::Error>(())
    /// ```
    pub fn target_classes(mut self, classes: impl Into<Input<'a>>, count: usize) -> Self {
        self.problem.target_classes = classes.into().operand;
        self.problem.target_count = count;
        self
    }

    /// If > 0, the targets are a teacher's logits, and t = softmax(scale·targets), over all classes or over
    /// those [listed](Self::target_classes). A call forms t as it goes and allocates 16 bytes a row
    /// ([`Error::Memory`]). No gradient goes to the teacher. Default: 0, the targets are probabilities.
    ///
    /// ```
    /// # use xent::CrossEntropy;
    /// let teacher = [1.0f32, 1.0, 1.0, -f32::INFINITY];
    /// let call = CrossEntropy::new(1, 4).target_scale(0.5);
    /// let loss = call.forward(&[0.1f32, 0.2, 0.3, 0.4], &teacher)?;
    /// assert!((loss - (1.5425 + 1.4425 + 1.3425) / 3.0).abs() < 1e-4);
    /// # Ok::<(), xent::Error>(())
    /// ```
    pub fn target_scale(mut self, scale: f64) -> Self {
        self.problem.target_scale = scale;
        self
    }

    /// The target index of ignored rows; any integer. It does not apply to probability targets, except
    /// that it marks unused places of [`target_classes`](Self::target_classes). Default: −100.
    pub fn ignore_index(mut self, index: i64) -> Self {
        self.problem.ignore_index = index;
        self
    }

    /// ε in [0, 1]: the target distribution is (1−ε)·targets + ε/C. Default: 0.
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

    /// λ ≥ 0: the weight of `λ·lse²`, which each row's loss includes. The term keeps lse near 0.
    /// Default: 0.
    ///
    /// ```
    /// # use xent::{CrossEntropy, Results};
    /// let (mut loss, mut z_loss) = (0.0, 0.0);
    /// let results =
    ///     Results { loss: Some(&mut loss), z_loss: Some(&mut z_loss), ..Results::default() };
    /// let call = CrossEntropy::new(1, 4).z_loss(1e-2);
    /// call.forward_with(&[0.1f32, 0.2, 0.3, 0.4], &[0i32], results)?;
    /// assert!((z_loss - 1e-2 * 1.6425 * 1.6425).abs() < 1e-5); // lse = 1.6425
    /// assert!((loss - 1.5425 - z_loss).abs() < 1e-4);
    /// # Ok::<(), xent::Error>(())
    /// ```
    pub fn z_loss(mut self, weight: f64) -> Self {
        self.problem.z_loss = weight;
        self
    }

    /// β: each row's loss includes `−β·H`, with the entropy `H = −Σ p_c·logp_c`. A positive weight rewards
    /// rows that are not certain, as PPO and GRPO do, and a negative one rewards certainty. Default: 0.
    ///
    /// ```
    /// # use xent::{CrossEntropy, Results};
    /// let (mut loss, mut bonus) = (0.0, 0.0);
    /// let results =
    ///     Results { loss: Some(&mut loss), entropy_bonus: Some(&mut bonus), ..Results::default() };
    /// let call = CrossEntropy::new(1, 4).entropy_bonus(0.01);
    /// call.forward_with(&[0.1f32, 0.2, 0.3, 0.4], &[0i32], results)?;
    /// assert!((bonus + 0.01 * 1.3801).abs() < 1e-6); // H = 1.3801
    /// assert!((loss - 1.5425 - bonus).abs() < 1e-4);
    /// # Ok::<(), xent::Error>(())
    /// ```
    pub fn entropy_bonus(mut self, weight: f64) -> Self {
        self.problem.entropy_bonus = weight;
        self
    }

    /// `x → cap·tanh(x/cap)` if > 0, after [`logit_scale`](Self::logit_scale): logits stay within
    /// ±cap. Default: 0, off.
    ///
    /// ```
    /// # use xent::CrossEntropy;
    /// let loss = CrossEntropy::new(1, 2).softcap(30.0).forward(&[-1e6f32, 1e6], &[0i32])?;
    /// assert!((loss - 60.0).abs() < 1e-5);
    /// # Ok::<(), xent::Error>(())
    /// ```
    pub fn softcap(mut self, cap: f64) -> Self {
        self.problem.softcap = cap;
        self
    }

    /// `x → scale·x` before the softcap; > 0. The scale is 1/temperature. Default: 1.
    ///
    /// ```
    /// # use xent::CrossEntropy;
    /// let call = CrossEntropy::new(1, 4);
    /// let half = call.logit_scale(0.5).forward(&[0.2f32, 0.4, 0.6, 0.8], &[0i32])?;
    /// assert!((half - call.forward(&[0.1f32, 0.2, 0.3, 0.4], &[0i32])?).abs() < 1e-6);
    /// # Ok::<(), xent::Error>(())
    /// ```
    pub fn logit_scale(mut self, scale: f64) -> Self {
        self.problem.logit_scale = scale;
        self
    }

    /// The logits are log-probabilities (PyTorch's `NLLLoss`). xent takes no lse, and the gradient is
    /// with respect to the log-probabilities. xent reads only classes with a target mass, or all
    /// classes if an argmax is asked for.
    ///
    /// The options scale, cap, z-loss and entropy bonus and the results lse, entropy, z-loss and entropy
    /// bonus are then an [`Error::Param`].
    ///
    /// ```
    /// # use xent::CrossEntropy;
    /// let loss = CrossEntropy::new(1, 3).log_probs(true).forward(&[0.1f32, 0.2, 0.3], &[2i32])?;
    /// assert!((loss + 0.3).abs() < 1e-6);
    /// # Ok::<(), xent::Error>(())
    /// ```
    pub fn log_probs(self, on: bool) -> Self {
        self.flag(XENT_FLAG_LOG_PROBS, on)
    }

    /// If > 0, the denominator of a mean's cross-entropy part, instead of Σ `r·w_y` (Σ `r` with
    /// probability targets): for gradient accumulation and data parallel training. Default: 0.
    pub fn normalizer(mut self, normalizer: f64) -> Self {
        self.problem.normalizer = normalizer;
        self
    }

    /// If > 0, the denominator of a mean's z-loss part and entropy bonus, instead of Σ `r`. Default: 0.
    pub fn z_normalizer(mut self, normalizer: f64) -> Self {
        self.problem.z_normalizer = normalizer;
        self
    }

    /// A mean over no kept rows is 0 instead of NaN.
    pub fn empty_is_zero(self, on: bool) -> Self {
        self.flag(XENT_FLAG_EMPTY_IS_ZERO, on)
    }

    /// Calls add the gradient to the contents of the output. Not in place.
    pub fn accumulate(self, on: bool) -> Self {
        self.flag(XENT_FLAG_ACCUMULATE, on)
    }

    /// For padded vocabularies: where the row stride of `grad` exceeds the classes, calls set the
    /// elements between the classes of a row and the next row to 0, those of ignored rows and with
    /// [`accumulate`](Self::accumulate) too. What follows the last row's classes stays as it is. The
    /// option needs one inner position and a class stride of 1, else it is an [`Error::Param`]. Calls
    /// without a gradient of the logits ignore it.
    ///
    /// ```
    /// # use xent::{CrossEntropy, Output};
    /// let mut logits = [0.1f32, 0.2, 0.3, 9.0, 0.3, 0.2, 0.1, 9.0]; // 3 classes, padded to 4
    /// let in_place = Output::from(&mut logits).strides([4, 1, 0]);
    /// CrossEntropy::new(2, 3).zero_padding(true).forward_backward_in_place(in_place, &[0u8, 2])?;
    /// assert_eq!([logits[3], logits[7]], [0.0, 9.0]);
    /// # Ok::<(), xent::Error>(())
    /// ```
    pub fn zero_padding(self, on: bool) -> Self {
        self.flag(XENT_FLAG_ZERO_PADDING, on)
    }

    fn flag(mut self, bit: u32, on: bool) -> Self {
        self.problem.flags = if on { self.problem.flags | bit } else { self.problem.flags & !bit };
        self
    }

    /// The gradient of what follows the loss: any float, one element, or `[rows, inner]` with
    /// [`Reduction::None`]. Default: 1.
    pub fn grad_output(mut self, grad: impl Into<Input<'a>>) -> Self {
        self.grad_output = grad.into().operand;
        self
    }

    /// A further factor of the gradient, finite: loss scaling, 1/accumulation steps. Default: 1.
    pub fn grad_scale(mut self, scale: f64) -> Self {
        self.grad_scale = scale;
        self
    }

    /// 0 = the whole pool, 1 = the calling thread alone, n = at most n. The number changes no bit of
    /// the result. Default: 0.
    pub fn threads(mut self, threads: u32) -> Self {
        self.problem.threads = threads;
        self
    }

    /// The pool to run on: a [`Pool`](crate::Pool) or a `rayon::ThreadPool`. Default: rayon's global
    /// pool.
    pub fn pool(mut self, pool: impl Into<PoolRef<'a>>) -> Self {
        self.pool = Some(pool.into());
        self
    }

    /// Forces an instruction set, for tests and benches. A set that the processor lacks is an
    /// [`Error::Param`].
    #[doc(hidden)]
    pub fn isa(mut self, isa: Isa) -> Self {
        self.isa = Some(isa);
        self
    }

    /// Computes the loss.
    pub fn forward<'b, 'c>(
        &self,
        logits: impl Into<Input<'b>>,
        targets: impl Into<Input<'c>>,
    ) -> Result<f64, Error> {
        let mut loss = 0.0;
        let results = Results { loss: Some(&mut loss), ..Results::default() };
        self.forward_with(logits, targets, results)?;
        Ok(loss)
    }

    /// Computes the results that `results` asks for.
    pub fn forward_with<'b, 'c>(
        &self,
        logits: impl Into<Input<'b>>,
        targets: impl Into<Input<'c>>,
        results: Results<'_>,
    ) -> Result<(), Error> {
        let (logits, targets) = (logits.into().operand, targets.into().operand);
        self.run(Pass::Forward, logits, targets, results, None)
    }

    /// Computes results without targets: [`lse`](Results::lse), [`argmax`](Results::argmax),
    /// [`entropy`](Results::entropy), [`top_classes`](Results::top_classes),
    /// [`top_log_probs`](Results::top_log_probs). Any other result is an [`Error::Null`].
    ///
    /// ```
    /// # use xent::{CrossEntropy, Results};
    /// let (mut argmax, mut entropy) = ([0; 1], [0f64; 1]);
    /// let results = Results {
    ///     argmax: Some(&mut argmax),
    ///     entropy: Some((&mut entropy).into()),
    ///     ..Results::default()
    /// };
    /// CrossEntropy::new(1, 4).evaluate(&[7f32, 7.0, 7.0, 7.0], results)?;
    /// assert_eq!(argmax, [0]);
    /// assert!((entropy[0] - 4f64.ln()).abs() < 1e-6);
    /// # Ok::<(), xent::Error>(())
    /// ```
    pub fn evaluate<'b>(
        &self,
        logits: impl Into<Input<'b>>,
        results: Results<'_>,
    ) -> Result<(), Error> {
        self.run(Pass::Forward, logits.into().operand, Operand::ABSENT, results, None)
    }

    /// Computes ln Σ exp of every row, `[rows, inner]`, without targets.
    pub fn lse<'b>(&self, logits: impl Into<Input<'b>>, lse: &mut [f64]) -> Result<(), Error> {
        self.evaluate(logits, Results { lse: Some(lse), ..Results::default() })
    }

    /// Computes the gradient of the loss with respect to the logits, from `lse` (`[rows, inner]`) of
    /// a forward or from elsewhere. With [`log_probs`](Self::log_probs) xent ignores `lse`, and it may
    /// be empty.
    pub fn backward<'b, 'c, 'd>(
        &self,
        logits: impl Into<Input<'b>>,
        targets: impl Into<Input<'c>>,
        lse: &[f64],
        grad: impl Into<Output<'d>>,
    ) -> Result<(), Error> {
        let (logits, targets) = (logits.into().operand, targets.into().operand);
        self.gradient(Pass::Backward, logits, targets, lse, grad.into().operand)
    }

    /// As [`backward`](Self::backward); the gradient replaces the logits.
    pub fn backward_in_place<'b, 'c>(
        &self,
        logits: impl Into<Output<'b>>,
        targets: impl Into<Input<'c>>,
        lse: &[f64],
    ) -> Result<(), Error> {
        let (logits, targets) = (logits.into().operand, targets.into().operand);
        self.gradient(Pass::Backward, logits, targets, lse, logits)
    }

    /// Computes the gradient of the loss with respect to probability targets, from `lse` as in
    /// [`backward`](Self::backward): `r·(1−ε)·w_c·(lse − x_c)` times the factors of the reduction,
    /// [`grad_output`](Self::grad_output) and [`grad_scale`](Self::grad_scale). For distillation,
    /// where a model computes the targets too.
    ///
    /// `grad_targets`: f32, f64, bf16 or f16 `[rows, classes, inner]`; it overlaps no other operand.
    /// A factor of 0 makes 0, whatever it multiplies. Ignored rows get 0, or stay as they are when
    /// accumulating. Index targets have no gradient: [`Error::Param`].
    ///
    /// ```
    /// # use xent::CrossEntropy;
    /// let (logits, targets) = ([0.1f32, 0.2, 0.3, 0.4], [0.25f32; 4]);
    /// let (mut lse, mut grad_targets) = ([0.0; 1], [0f32; 4]);
    /// let call = CrossEntropy::new(1, 4);
    /// call.lse(&logits, &mut lse)?;
    /// call.backward_targets(&logits, &targets, &lse, &mut grad_targets)?;
    /// assert!((grad_targets[0] - 1.5425).abs() < 1e-4); // −ln p_0
    /// # Ok::<(), xent::Error>(())
    /// ```
    pub fn backward_targets<'b, 'c, 'd>(
        &self,
        logits: impl Into<Input<'b>>,
        targets: impl Into<Input<'c>>,
        lse: &[f64],
        grad_targets: impl Into<Output<'d>>,
    ) -> Result<(), Error> {
        let (logits, targets) = (logits.into().operand, targets.into().operand);
        self.gradient(Pass::TargetGradient, logits, targets, lse, grad_targets.into().operand)
    }

    /// Computes the loss and its gradient. Reads the logits from memory once.
    pub fn forward_backward<'b, 'c, 'd>(
        &self,
        logits: impl Into<Input<'b>>,
        targets: impl Into<Input<'c>>,
        grad: impl Into<Output<'d>>,
    ) -> Result<f64, Error> {
        let mut loss = 0.0;
        let results = Results { loss: Some(&mut loss), ..Results::default() };
        self.forward_backward_with(logits, targets, grad, results)?;
        Ok(loss)
    }

    /// Computes the gradient, and the results that `results` asks for. Reads the logits from memory
    /// once.
    pub fn forward_backward_with<'b, 'c, 'd>(
        &self,
        logits: impl Into<Input<'b>>,
        targets: impl Into<Input<'c>>,
        grad: impl Into<Output<'d>>,
        results: Results<'_>,
    ) -> Result<(), Error> {
        let (logits, targets) = (logits.into().operand, targets.into().operand);
        let grad = grad.into().operand;
        self.run(Pass::ForwardBackward, logits, targets, results, Some(grad))
    }

    /// As [`forward_backward`](Self::forward_backward); the gradient replaces the logits.
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

    /// As [`forward_backward_with`](Self::forward_backward_with); the gradient replaces the logits.
    pub fn forward_backward_in_place_with<'b, 'c>(
        &self,
        logits: impl Into<Output<'b>>,
        targets: impl Into<Input<'c>>,
        results: Results<'_>,
    ) -> Result<(), Error> {
        let (logits, targets) = (logits.into().operand, targets.into().operand);
        self.run(Pass::ForwardBackward, logits, targets, results, Some(logits))
    }

    fn gradient(
        &self,
        pass: Pass,
        logits: Operand,
        targets: Operand,
        lse: &[f64],
        grad: Operand,
    ) -> Result<(), Error> {
        let results = RawResults { lse: Input::from(lse).operand, ..RawResults::NONE };
        self.run_raw(pass, logits, targets, &results, Some(grad))
    }

    fn run(
        &self,
        pass: Pass,
        logits: Operand,
        targets: Operand,
        results: Results<'_>,
        grad: Option<Operand>,
    ) -> Result<(), Error> {
        let mut results = results;
        if let Some(loss) = results.loss_alone()
            && self.run_plain(&logits, &targets, loss, grad.as_ref())
        {
            return Ok(());
        }
        self.run_raw(pass, logits, targets, &results.raw(), grad)
    }

    /// Computes a plain call; false, with nothing written, if it is none, or if the general way has to compute it.
    #[inline(always)]
    fn run_plain(
        &self,
        logits: &Operand,
        targets: &Operand,
        loss: *mut f64,
        grad: Option<&Operand>,
    ) -> bool {
        let grad = grad.map(|grad| (&self.grad_output, self.grad_scale, grad));
        let Some(plain) = plain::recognise(&self.problem, logits, targets, loss, grad) else {
            return false;
        };
        // SAFETY: every operand is memory that the call borrows, mutably if it is an output, and has as many
        // elements as a plain call (`recognise`); whoever made an operand of a pointer vouched for its elements.
        unsafe { run::plain(&plain, self.isa) }
    }

    fn run_raw(
        &self,
        pass: Pass,
        logits: Operand,
        targets: Operand,
        results: &RawResults,
        grad: Option<Operand>,
    ) -> Result<(), Error> {
        let problem = Problem { logits, targets, ..self.problem };
        let request = grad.map(|gradient| self.request(gradient));
        let team = self.team();
        // SAFETY: every operand is memory that the call borrows, mutably if it is an output. Validation
        // refuses shapes and strides that reach past the `available` elements of a slice or an array;
        // whoever made an operand of a pointer vouched for its elements. Validation also refuses to read
        // what is not initialised.
        unsafe { run::cross_entropy(&problem, pass, results, request.as_ref(), &team, self.isa) }
    }

    /// What a gradient is multiplied by, and where it goes.
    pub(crate) fn request(&self, gradient: Operand) -> GradientRequest {
        GradientRequest { output: self.grad_output, scale: self.grad_scale, gradient }
    }

    /// The threads that a call may use.
    pub(crate) fn team(&self) -> Team<'a> {
        Team { pool: self.pool.and_then(PoolRef::rayon), threads: self.problem.threads as usize }
    }
}
