//! How a call goes over rows, decided once from its plan.

use crate::kernels::Kernels;
use crate::kernels::entropy_bonus;
use crate::kernels::row_math::{
    GradientOptions, LseSource, OutputTerm, RowGroup, RowGroupExtras, RowOptions,
};
use crate::math::exp2::{Base, Shift};
use crate::plan::{Loss, Operation, Pass, Plan, Rankings, Shard, Softmax};
use crate::strategy::{self, BATCHED_CLASSES, STORED_EXPS_CLASSES, Sweeps};
use crate::view::{ElementType, FloatType};
use std::ops::Range;

/// The class that the first sweep over a row excludes from its sums.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Excluded {
    /// None.
    None,
    /// The target.
    Target,
    /// The class of the largest logit: the others, small beside it, then keep their accuracy.
    Largest,
}

/// The arithmetic of a call's rows.
#[derive(Clone, Copy, Debug)]
enum Finish {
    /// That of a loss.
    Loss(RowOptions),
    /// That of a softmax.
    Softmax(OutputTerm),
}

/// A plan on its way through the drivers, with everything about it that does not differ by row.
#[derive(Clone, Copy, Debug)]
pub struct Call<'a> {
    /// The plan.
    pub plan: &'a Plan,
    /// The loss that it computes, if it is one.
    pub loss: Option<&'a Loss>,
    /// The entry points, of a set that the processor has: `Isa::kernels` handed them out (# Safety of
    /// [`new`](Self::new)).
    pub k: &'a Kernels,
    finish: Finish,
    /// L: exponentials are powers of 2^L (math/exp2.rs).
    pub l: f64,
    /// Classes of a segment, and segments of a row.
    pub segment_len: usize,
    /// See `segment_len`.
    pub segments: usize,
    /// The class that the sums exclude.
    pub excluded: Excluded,
    /// The rows start from an lse operand.
    pub from_lse: bool,
    /// Exponentials are taken: the logits are no log-probabilities.
    pub takes_exps: bool,
    /// The first sweep sums up exponentials: for the lse, or from an lse for the entropy of a bonus.
    pub sums_exps: bool,
    /// An ignored row's exponentials are summed too: its lse or entropy is a result.
    pub sums_ignored: bool,
    /// The call computes losses, and the results that go with them.
    pub computes_losses: bool,
    /// The first sweep adds up logits weighted by the masses of their classes.
    pub spreads_mass: bool,
    /// Classes have masses of their own.
    pub has_masses: bool,
    /// The shard whose states have the total masses that a gradient of probability targets needs.
    pub mass_of_shard: Option<&'a Shard>,
    /// The shard whose states have the entropies that the gradient of an entropy bonus needs.
    pub entropy_of_shard: Option<&'a Shard>,
    /// The gradient has an entropy bonus.
    pub has_bonus: bool,
    /// The largest logit of each row is looked for.
    pub wants_argmax: bool,
    /// The results that come from the order of a row's logits.
    pub rankings: Option<&'a Rankings>,
    /// The entropy of each row is wanted.
    pub wants_entropy: bool,
    /// The first sweep needs nothing of the logits but exponentials of them as they are.
    pub sums_exps_alone: bool,
    /// See [`Loss::has_ordinary_rows`].
    pub has_ordinary_rows: bool,
    /// The first sweep stores exponentials over the logits.
    pub stores_exps: bool,
    /// The second sweep counts every exponential from the row's final shift; else from the initial one,
    /// where the first sweep did.
    pub final_shift: bool,
    /// How many sweeps a row has, and whether they are interleaved.
    pub sweeps: Sweeps,
    /// The second sweep prefetches a row to come.
    pub fetches_ahead: bool,
    /// What the second sweep computes.
    pub term: OutputTerm,
    /// The classes of the logits are contiguous, those of the output are not.
    pub scatters: bool,
    /// Stores of the output bypass the caches.
    pub streams: bool,
}

impl<'a> Call<'a> {
    /// The call for a plan.
    ///
    /// # Safety
    /// As [`run`](super::run).
    #[inline(always)]
    pub unsafe fn new(plan: &'a Plan, k: &'a Kernels) -> Self {
        match &plan.operation {
            Operation::Loss(loss) => Call::of_loss(plan, k, loss),
            Operation::Softmax(softmax) => Call::of_softmax(plan, k, *softmax),
        }
    }

    /// The call for a loss whose logits are made block by block, in the lanes' type: no sweep finds anything that
    /// an earlier one has left.
    ///
    /// # Safety
    /// As [`new`](Self::new).
    pub unsafe fn of_blocks(plan: &'a Plan, k: &'a Kernels, loss: &'a Loss) -> Self {
        let mut call = Call::of_loss(plan, k, loss);
        (call.stores_exps, call.final_shift, call.has_ordinary_rows) = (false, true, false);
        // The order of the logits is found along with the sums, in every block.
        call.sums_exps_alone &= call.rankings.is_none();
        if call.from_lse && call.excluded == Excluded::Largest {
            // To look for it would take another product.
            call.excluded = Excluded::None;
        }
        call
    }

    #[inline(always)]
    fn of_softmax(plan: &'a Plan, k: &'a Kernels, softmax: Softmax) -> Self {
        let term = match softmax {
            Softmax::LogProbabilities => OutputTerm::LogSoftmax,
            // In f32, 88 below the largest logit, the two bases differ by 10 ulp; in f64 by a few. Halves
            // are those of f32, rounded.
            Softmax::Probabilities if plan.logits.dtype.has_f32_lanes() => OutputTerm::BaseE,
            Softmax::Probabilities => OutputTerm::Exponentials,
        };
        let shape = Common::new(plan);
        Call {
            plan,
            loss: None,
            k,
            finish: Finish::Softmax(term),
            l: shape.l,
            segment_len: shape.segment_len,
            segments: shape.segments,
            excluded: Excluded::Largest,
            from_lse: false,
            takes_exps: true,
            sums_exps: true,
            sums_ignored: false,
            computes_losses: false,
            spreads_mass: false,
            has_masses: false,
            mass_of_shard: None,
            entropy_of_shard: None,
            has_bonus: false,
            wants_argmax: false,
            rankings: None,
            wants_entropy: false,
            sums_exps_alone: true,
            has_ordinary_rows: false,
            stores_exps: shape.may_store_exps && term == OutputTerm::Exponentials,
            final_shift: shape.is_huge,
            sweeps: Sweeps::Two,
            fetches_ahead: shape.fetches_ahead,
            term,
            scatters: shape.scatters,
            streams: shape.streams,
        }
    }

    /// A function of its own: else the caller's frame, below which all work is done, has the call twice.
    #[inline(never)]
    fn of_loss(plan: &'a Plan, k: &'a Kernels, loss: &'a Loss) -> Self {
        let (wants_argmax, wants_entropy) = (loss.wants_argmax(), loss.wants_entropy());
        let (has_bonus, from_lse) = (loss.has_bonus(), loss.is_from_lse());
        let rankings = loss.rankings.as_ref();
        let sums_exps_alone = loss.transform.is_none()
            && !wants_entropy
            && !loss.log_probs
            && !wants_argmax
            && (rankings.is_none() || ranks_batches(plan, loss));
        let fused = loss.pass == Pass::ForwardBackward;
        let shape = Common::new(plan);
        let interleaves = fused
            && loss.has_indices()
            && sums_exps_alone
            && loss.label_smoothing == 0.0
            && !shape.scatters
            && strategy::interleaves(shape.row_bytes);
        let excludes_largest =
            loss.has_probabilities() && loss.pass != Pass::TargetGradient && !loss.log_probs;
        Call {
            plan,
            loss: Some(loss),
            k,
            finish: Finish::Loss(row_options(plan, loss)),
            l: shape.l,
            segment_len: shape.segment_len,
            segments: shape.segments,
            excluded: if loss.has_indices() {
                Excluded::Target
            } else if excludes_largest {
                Excluded::Largest
            } else {
                Excluded::None
            },
            from_lse,
            takes_exps: !loss.log_probs,
            sums_exps: !loss.log_probs && (!from_lse || wants_entropy),
            sums_ignored: !from_lse && (loss.wants_lse() || loss.entropy.is_some()),
            computes_losses: loss.computes_losses(),
            spreads_mass: loss.spreads_mass(),
            has_masses: loss.has_masses(),
            mass_of_shard: loss
                .shard
                .as_ref()
                .filter(|_| loss.has_probabilities() && loss.pass == Pass::Backward),
            entropy_of_shard: loss.shard.as_ref().filter(|_| has_bonus && loss.has_entropies()),
            has_bonus,
            wants_argmax,
            rankings,
            wants_entropy,
            sums_exps_alone,
            has_ordinary_rows: loss.has_ordinary_rows(plan.shape.classes, plan.logits.dtype),
            // Nothing else may need the logits again.
            stores_exps: shape.may_store_exps
                && fused
                && !(rankings.is_some() && ranks_batches(plan, loss))
                && loss.transform.is_none()
                && !has_bonus
                && !loss.has_probabilities(),
            final_shift: shape.is_huge || loss.pass == Pass::Backward,
            sweeps: match (plan.output.is_some(), interleaves) {
                (false, _) => Sweeps::One,
                (true, false) => Sweeps::Two,
                (true, true) => Sweeps::Interleaved,
            },
            fetches_ahead: shape.fetches_ahead,
            term: if loss.log_probs { OutputTerm::None } else { OutputTerm::Exponentials },
            scatters: shape.scatters,
            streams: shape.streams,
        }
    }

    /// Runs the row arithmetic over groups of rows; `extras` are there, one for each group, if an option
    /// needs them.
    #[inline(always)]
    pub fn finish(&self, groups: &mut [RowGroup], extras: Option<&mut [RowGroupExtras]>) {
        let mut extras = extras.map(|extras| &mut extras[..groups.len()]);
        // SAFETY: there are as many extras as groups, or none; the processor has the set of the kernels, which
        // `Isa::kernels` handed out (`new`).
        unsafe {
            match &self.finish {
                Finish::Loss(options) => {
                    if options.lse == LseSource::Operand && options.wants_entropy {
                        self.finish_beside_lse(groups, extras.as_deref_mut(), options);
                    } else {
                        (self.k.lanes.finish_loss)(groups, extras.as_deref_mut(), options);
                    }
                    if let (true, Some(extras)) = (options.entropy_bonus != 0.0, extras) {
                        let has_f32_lanes = self.plan.logits.dtype.has_f32_lanes();
                        entropy_bonus::finish(groups, extras, options, has_f32_lanes);
                    }
                }
                Finish::Softmax(term) => (self.k.lanes.finish_softmax)(groups, *term),
            }
        }
    }

    /// The row arithmetic from a known lse, where the entropy is wanted too: that is of the row's own sums, whatever lse
    /// the gradient is from. A function of its own, since every caller's frame would have the options twice.
    ///
    /// # Safety
    /// There are as many extras as groups, or none.
    #[cold]
    #[inline(never)]
    unsafe fn finish_beside_lse(
        &self,
        groups: &mut [RowGroup],
        mut extras: Option<&mut [RowGroupExtras]>,
        options: &RowOptions,
    ) {
        let mut once = RowOptions { lse: LseSource::Sums, gradient: None, ..*options };
        // SAFETY: this function's own # Safety; the processor has the set of the kernels, which `Isa::kernels` handed
        // out (`new`).
        unsafe {
            (self.k.lanes.finish_loss)(groups, extras.as_deref_mut(), &once);
            once = RowOptions { wants_entropy: false, ..*options };
            (self.k.lanes.finish_loss)(groups, extras, &once);
        }
    }

    /// Whether something is subtracted from the gradient's exponentials.
    #[inline(always)]
    pub fn has_bias(&self) -> bool {
        match &self.finish {
            Finish::Loss(options) => options.gradient.is_some_and(|gradient| gradient.has_bias),
            Finish::Softmax(_) => false,
        }
    }

    /// Whether the first sweep over a row may be interleaved with the second over the one before.
    #[inline(always)]
    pub fn interleaves(&self) -> bool {
        self.sweeps == Sweeps::Interleaved
    }

    /// Whether the order of contiguous logits is found after the sums of a batch, whose rows are still in the cache; else
    /// along with the sums of each row.
    #[inline(always)]
    pub fn ranks_batches(&self) -> bool {
        self.loss.is_some_and(|loss| ranks_batches(self.plan, loss))
    }

    /// Whether contiguous rows are short ones, which are summed in one sweep.
    #[inline(always)]
    pub fn has_short_rows(&self) -> bool {
        self.has_ordinary_rows
            && strategy::is_short(self.plan.shape.classes, self.plan.logits.dtype.lane_size())
    }

    /// The classes of a segment.
    #[inline(always)]
    pub fn segment(&self, index: usize) -> Range<usize> {
        let start = index * self.segment_len;
        start..(start + self.segment_len).min(self.plan.shape.classes)
    }

    /// The shift whose exponential of `x` is nearest to 1; `x` is finite, or the shift has no meaning.
    #[inline(always)]
    pub fn shift_at(&self, x: f64) -> Shift {
        if self.plan.logits.dtype.has_f32_lanes() { Shift::at(x as f32) } else { Shift::at(x) }
    }
}

/// What a loss and a softmax derive in the same way.
struct Common {
    l: f64,
    segment_len: usize,
    segments: usize,
    row_bytes: usize,
    may_store_exps: bool,
    is_huge: bool,
    fetches_ahead: bool,
    scatters: bool,
    streams: bool,
}

impl Common {
    #[inline(always)]
    fn new(plan: &Plan) -> Self {
        let (classes, dtype) = (plan.shape.classes, plan.logits.dtype);
        let row_bytes = classes * dtype.size();
        // Past this many classes a segment has more chunks than flags.
        let is_huge = classes > STORED_EXPS_CLASSES;
        let segment_len = strategy::segment_len(classes);
        Common {
            l: log2_e(dtype),
            segment_len,
            segments: strategy::segments(classes),
            row_bytes,
            // A narrower type could not hold the exponentials.
            may_store_exps: plan.output.is_some_and(|output| output.in_place)
                && dtype.is_lane_type()
                && !is_huge,
            is_huge,
            fetches_ahead: strategy::fetches_ahead(row_bytes),
            scatters: plan.output.is_some_and(|output| output.view.strides[1] != 1),
            streams: plan.output.is_some_and(|output| output.stream),
        }
    }
}

/// See [`Call::ranks_batches`].
#[inline(always)]
fn ranks_batches(plan: &Plan, loss: &Loss) -> bool {
    let classes = plan.shape.classes;
    classes <= BATCHED_CLASSES
        || (strategy::is_short(classes, plan.logits.dtype.lane_size())
            && loss.has_ordinary_rows(classes, plan.logits.dtype))
}

/// log2 e as the lanes of a dtype have it.
#[inline(always)]
fn log2_e(dtype: FloatType) -> f64 {
    if dtype.has_f32_lanes() { f64::from(f32::L) } else { f64::L }
}

/// The scalars of a loss that the row arithmetic depends on.
#[inline(always)]
fn row_options(plan: &Plan, loss: &Loss) -> RowOptions {
    let accumulates = plan.output.is_some_and(|output| output.accumulate);
    RowOptions {
        lse: if loss.log_probs {
            LseSource::LogProbs
        } else if loss.is_from_lse() {
            LseSource::Operand
        } else {
            LseSource::Sums
        },
        has_indices: loss.has_indices(),
        spreads_mass: loss.spreads_mass(),
        has_class_masses: loss.has_masses(),
        has_row_weights: loss.row_weights.is_some(),
        label_smoothing: loss.label_smoothing,
        smoothing_share: loss.smoothing_share,
        weight_total: loss.weight_total,
        z_loss: loss.z_loss,
        entropy_bonus: loss.entropy_bonus,
        transform: loss.transform,
        wants_losses: loss.computes_losses(),
        wants_lse: loss.computes_losses() && loss.wants_lse(),
        wants_entropy: loss.wants_entropy(),
        gradient: loss.gradient.as_ref().map(|gradient| GradientOptions {
            scale: gradient.scale,
            z_scale: gradient.z_scale,
            has_grad_output: gradient.grad_output.is_some(),
            has_bias: !loss.has_indices() || loss.label_smoothing > 0.0,
            overwritten: if accumulates { 0 } else { !0 },
        }),
    }
}
