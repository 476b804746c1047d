//! Invariants, for every option, dtype and layout: the instruction set, the threads, the place of a row,
//! strides, and options at their neutral values do not change a result; equivalent calls agree.

use common::operand::{Dtype, FLOATS, NO_AXIS, Operand};
use common::random::{Kind, Rng, config};
use common::reference;
use common::task::{Answer, Call, Task, Wants, assert_all_same, same_bits, same_numbers};
use common::task_bounds::{Judge, check_on};
use common::task_random::{Spec, TargetKind, tasks};
use common::{How, Reduction, isas};
use proptest::prelude::*;
use std::sync::OnceLock;
use xent::{Pool, Softmax};

fn eight() -> &'static Pool {
    static POOL: OnceLock<Pool> = OnceLock::new();
    POOL.get_or_init(|| Pool::new(8).unwrap())
}

/// The task with fixed denominators, so that a row alone has the same.
fn normalised(task: Task) -> Task {
    Task { normalizer: 7.5, z_normalizer: 3.25, ..task }
}

fn upcast(operand: &Operand) -> Operand {
    Operand { dtype: Dtype::F32, ..operand.clone() }
}

/// Asserts that a part of a batch has the bits of the batch.
fn assert_part(part: &Answer, whole: &Answer, i: usize, entries: &[usize], what: &str) {
    let at = |all: &[f64]| all.get(i).copied().into_iter().collect::<Vec<f64>>();
    same_bits(&part.lse, &at(&whole.lse), &format!("{what}: lse"));
    same_bits(&part.row_losses, &at(&whole.row_losses), &format!("{what}: row loss"));
    same_bits(&part.entropy, &at(&whole.entropy), &format!("{what}: entropy"));
    assert_eq!(part.argmax.first(), whole.argmax.get(i), "{what}: argmax");
    let grad: Vec<f64> = match whole.grad.len() {
        0 => Vec::new(),
        _ => entries.iter().map(|&at| whole.grad[at]).collect(),
    };
    same_bits(&part.grad, &grad, &format!("{what}: gradient"));
}

proptest! {
    #![proptest_config(config(400))]

    /// Promise 2.
    #[test]
    fn instruction_sets_agree(spec in tasks(8_000)) {
        let task = spec.task();
        let mut good: Option<Vec<(&str, Answer)>> = None;
        for isa in common::isas() {
            let all = task.run_all(&spec.how(isa));
            match &good {
                Some(good) => assert_all_same(&all, good, isa.name()),
                None => good = Some(all),
            }
        }
    }

    /// Promise 1: strides do not change a bit, as long as classes stay contiguous or not.
    #[test]
    fn strides_do_not_matter(spec in tasks(6_000)) {
        let task = spec.task();
        let relaid = task.relaid(&mut Rng::new(spec.seed ^ 1));
        // In place the gradient has the strides of the logits; repeated logits cannot be replaced.
        let common = |all: Vec<(&'static str, Answer)>| -> Vec<(&'static str, Answer)> {
            let keep = task.logits.is_apart();
            all.into_iter().filter(|(name, _)| keep || !name.contains("in place")).collect()
        };
        for isa in isas() {
            let how = spec.how(isa);
            let [all, mut relaid] = [&task, &relaid].map(|task| common(task.run_all(&how)));
            for ((_, answer), (_, relaid)) in all.iter().zip(&mut relaid) {
                // Sums over rows run along rows or inner positions, whichever has the smaller stride.
                let size: f64 = answer.row_losses.iter().map(|loss| loss.abs()).sum();
                for (mine, other) in
                    [(answer.loss, &mut relaid.loss), (answer.z_loss, &mut relaid.z_loss)]
                {
                    if let (Some(mine), Some(other)) = (mine, other) {
                        let close = mine == *other || (mine - *other).abs() <= 1e-12 * (size + mine.abs());
                        assert!(close || !mine.is_finite(), "{mine:e} {other:e}");
                        *other = mine;
                    }
                }
            }
            assert_all_same(&all, &relaid, isa.name());
        }
    }

    /// Promise 1: a row alone has the bits that it has in a batch, in any place.
    #[test]
    fn rows_do_not_depend_on_others(spec in tasks(3_000)) {
        let task = normalised(spec.task());
        let (classes, inner) = (task.classes, task.inner);
        let positions = task.positions();
        // All rows if they are few; else the ends of tiles of 64, and some others.
        let some = |i: &usize| {
            positions <= 24 || [0, 1, 7, 8, 63].contains(&(i % 64)) || *i + 2 > positions
        };
        for isa in isas() {
            let whole = task.run_all(&spec.how(isa));
            for i in (0..positions).filter(some) {
                let (row, k) = (i / inner, i % inner);
                let single = task.single(row, k);
                let alone = single.run_all(&How::on(isa));
                let entries: Vec<usize> =
                    (0..classes).map(|class| (row * classes + class) * inner + k).collect();
                for (name, part) in &alone {
                    // A single row of repeated logits can be replaced.
                    let Some((_, whole)) = whole.iter().find(|(other, _)| other == name) else {
                        assert!(name.contains("in place"));
                        continue;
                    };
                    assert_part(part, whole, i, &entries, &format!("{}, {name}", isa.name()));
                }
            }
        }
    }

    /// The other results that a call asks for do not change a bit.
    #[test]
    fn other_results_do_not_matter(spec in tasks(6_000)) {
        let all = Task { wants: Wants::ALL, ..spec.task() };
        let bare = Task { wants: Wants::NONE, ..all.clone() };
        for isa in isas() {
            let (mut all, bare) = (all.run_all(&spec.how(isa)), bare.run_all(&spec.how(isa)));
            for (_, answer) in &mut all {
                (answer.entropy, answer.argmax, answer.correct) = (Vec::new(), Vec::new(), None);
                answer.kl.clear();
                (answer.top_classes, answer.top_log_probs) = (Vec::new(), Vec::new());
                answer.target_ranks = Vec::new();
            }
            assert_all_same(&all, &bare, isa.name());
        }
    }

    /// An option at its neutral value gives the bits of the call without it.
    #[test]
    fn neutral_options_change_no_bit(spec in tasks(6_000)) {
        let spec = Spec {
            class_weights: None, row_weights: None, grad_output: None, mask: false, normalizer: 0.0,
            z_normalizer: 0.0, ..spec
        };
        let task = spec.task();
        let (rows, classes, inner) = (task.rows, task.classes, task.inner);
        let ones = |dtype, sizes: [usize; 3]| {
            Some(Operand::packed(dtype, sizes, &vec![1.0; sizes.iter().product()]))
        };
        let dtype = FLOATS[spec.target_dtype % 4];
        let each = task.reduction == Reduction::None;
        let mut neutral = vec![
            ("row weights", Task { row_weights: ones(dtype, [rows, 1, inner]), ..task.clone() }),
            ("mask", Task { row_mask: ones(Dtype::U8, [rows, 1, inner]), ..task.clone() }),
            ("grad_output", Task {
                grad_output: ones(dtype, if each { [rows, 1, inner] } else { [1; 3] }),
                ..task.clone()
            }),
            ("empty_is_zero", Task { empty_is_zero: !task.empty_is_zero, ..task.clone() }),
            ("class weights", Task { class_weights: ones(dtype, [1, classes, 1]), ..task.clone() }),
        ];
        if let Some(kept) = Some(Judge::new(&task).out.kept_rows).filter(|&kept| kept > 0) {
            let kept = kept as f64;
            neutral.push(("normalizers", Task {
                normalizer: kept, z_normalizer: kept, ..task.clone()
            }));
        } else {
            // No row is kept: the flag EMPTY_IS_ZERO is not neutral.
            neutral.remove(3);
        }
        for isa in isas() {
            let how = spec.how(isa);
            let base = task.run_all(&how);
            for (what, neutral) in &neutral {
                for ((name, answer), (_, base)) in neutral.run_all(&how).iter().zip(&base) {
                    let what = format!("{what}, {}, {name}", isa.name());
                    answer.assert_same_losses(base, &what);
                    same_numbers(&answer.grad, &base.grad, &what);
                }
            }
        }
    }

    /// The results of bf16 and f16 are those of the widened problem, rounded once.
    #[test]
    fn halves_are_the_widened_problem(spec in tasks(6_000)) {
        let dtype = if spec.dtype == Dtype::F16 { Dtype::F16 } else { Dtype::Bf16 };
        let task = Spec { dtype, ..spec.clone() }.task();
        // Accumulation rounds the sum, not the gradient.
        let task = Task { accumulate: false, ..task };
        let wide = Task { logits: upcast(&task.logits), grad: upcast(&task.grad), ..task.clone() };
        for isa in isas() {
            let how = spec.how(isa);
            for ((name, half), (_, wide)) in task.run_all(&how).iter().zip(wide.run_all(&how)) {
                let what = format!("{name}, {}", isa.name());
                half.assert_same_losses(&wide, &what);
                let dtype = match *name {
                    "targets" => task.grad_targets.dtype,
                    name if name.contains("in place") => task.logits.dtype,
                    _ => task.grad.dtype,
                };
                let rounded: Vec<f64> = wide.grad.iter().map(|&g| dtype.round(g)).collect();
                same_bits(&half.grad, &rounded, &what);
            }
        }
    }

    /// Accumulating twice doubles the gradient, to the rounding of one addition.
    #[test]
    fn accumulating_twice_is_twice(spec in tasks(6_000)) {
        let task = Task { accumulate: false, ..spec.task() };
        prop_assume!(task.targets.is_some());
        let half_ulps = if task.grad.dtype == Dtype::F64 { 2.1 } else { 3.1 };
        for isa in isas() {
            let how = spec.how(isa);
            let lse = task.run(Call::Forward, &how).lse;
            for call in [Call::Fused, Call::Backward(&lse), Call::Targets(&lse)] {
                let of_targets = matches!(call, Call::Targets(_));
                if of_targets && !task.has_target_gradient() {
                    continue;
                }
                let once = task.run(call, &how).grad;
                let mut again = Task { accumulate: true, ..task.clone() };
                let grad = if of_targets { &mut again.grad_targets } else { &mut again.grad };
                grad.values.clone_from(&once);
                let dtype = grad.dtype;
                for (twice, once) in again.run(call, &how).grad.iter().zip(&once) {
                    // A multiplication and an addition may be fused.
                    let bound = half_ulps * dtype.half_ulp(2.0 * once);
                    let close = (twice - 2.0 * once).abs() <= bound;
                    let past = !once.is_finite() || 2.0 * once.abs() >= dtype.largest();
                    prop_assert!(close || past, "{twice:e} {once:e} {call:?}");
                }
            }
        }
    }

    /// A row of the gradient sums to the part of z-loss, 2λ·lse: all else cancels.
    #[test]
    fn gradient_rows_sum_to_zero(spec in tasks(6_000)) {
        let finite = !matches!(spec.kind, Kind::AllInf | Kind::NotFinite | Kind::Mixed);
        let spec = Spec {
            kind: if finite { spec.kind } else { Kind::Broad },
            target_kind: if spec.target_kind == TargetKind::Nothing { TargetKind::Signed } else { spec.target_kind },
            long_grad: true,
            softcap: 0.0,
            log_probs: false,
            accumulate: false,
            normalizer: 7.5,
            z_normalizer: 3.25,
            ..spec
        };
        let task = spec.task();
        let judge = Judge::new(&task);
        let (classes, inner) = (task.classes, task.inner);
        let unit = if task.logits.dtype == Dtype::F64 { 1e-13 } else { 2e-6 };
        for isa in isas() {
            let how = spec.how(isa);
            let grad = task.run(Call::Fused, &how).grad;
            for i in 0..task.positions() {
                let entries = (0..classes).map(|c| (i / inner * classes + c) * inner + i % inner);
                let row: Vec<f64> = entries.map(|at| grad[at]).collect();
                let sum: f64 = row.iter().sum();
                let size: f64 = row.iter().map(|g| g.abs()).sum();
                let (cancels, z) = judge.gradient_sums(i);
                // Each exponential below 1e-37 may be lost.
                let lost = classes as f64 * 1e-37 * cancels.max(1.0);
                let bound = unit * (size + cancels + z.abs()) + lost;
                let off = (sum - z).abs();
                prop_assert!(
                    off <= bound || !size.is_finite() || !bound.is_finite(),
                    "row {i} on {}: {sum:e}, not {z:e}, of {size:e}: {:.3}", isa.name(), off / bound
                );
            }
        }
    }

    /// Index targets, the same as one-hot probabilities, and smoothed probabilities: the oracle has one
    /// result, and the kernels agree with it each way.
    #[test]
    fn indices_are_probabilities(spec in tasks(6_000)) {
        let spec = Spec {
            target_kind: TargetKind::Indices,
            // Means have different denominators, and ignore_index does not apply to probabilities.
            reduction: if spec.reduction == Reduction::Mean { Reduction::Sum } else { spec.reduction },
            ignore: common::random::Ignore::Nothing,
            mask: false,
            ..spec
        };
        let task = Task { ignore_index: -100, ..spec.task() };
        let (rows, classes, inner) = (task.rows, task.classes, task.inner);
        let eps = task.label_smoothing;
        let indices = &task.targets.as_ref().unwrap().values;
        let soft = |eps: f64| {
            let mut t = vec![eps / classes as f64; rows * classes * inner];
            for (i, &y) in indices.iter().enumerate() {
                t[(i / inner * classes + y as usize) * inner + i % inner] += 1.0 - eps;
            }
            let targets = Operand::packed(Dtype::F64, [rows, classes, inner], &t);
            Some(targets.laid_out(&mut Rng::new(spec.seed), NO_AXIS))
        };
        let one_hot = Task { targets: soft(0.0), ..task.clone() };
        let smoothed = Task { targets: soft(eps), label_smoothing: 0.0, ..task.clone() };
        let judge = Judge::new(&task);
        for other in [&one_hot, &smoothed] {
            let judged = Judge::new(other);
            let scales = &judge.out.loss_scale;
            for (i, scale) in scales.iter().enumerate() {
                let (a, b) = (judge.out.row_losses[i], judged.out.row_losses[i]);
                let close = (a - b).abs() <= 1e-13 * scale * classes as f64;
                // With log-probabilities only an index target leaves other classes unread.
                let unread = task.log_probs && eps == 0.0;
                prop_assert!(close || a == b || a.is_nan() && b.is_nan() || unread, "{a:e} {b:e}");
            }
            for isa in isas() {
                check_on(&judged, &spec.how(isa));
            }
        }
    }

    /// Cross-entropy equals NLL of log-softmax.
    #[test]
    fn cross_entropy_is_nll_of_log_softmax(spec in tasks(6_000)) {
        let spec = Spec {
            z_loss: 0.0,
            entropy_bonus: 0.0,
            softcap: 0.0,
            scale: 1.0,
            log_probs: false,
            accumulate: false,
            target_kind: if spec.target_kind == TargetKind::Nothing { TargetKind::Normalised } else { spec.target_kind },
            dtype: if spec.dtype == Dtype::F64 { Dtype::F64 } else { Dtype::F32 },
            ..spec
        };
        let whole = spec.task();
        let judge = Judge::new(&whole);
        for isa in isas() {
            let how = spec.how(isa);
            let mut log_p = whole.logits.clone().laid_out(&mut Rng::new(spec.seed), NO_AXIS);
            let x = whole.logits.place();
            let mut y = log_p.place_poisoned();
            let call = Softmax::new(whole.rows, whole.classes).inner(whole.inner).isa(isa);
            call.log_softmax(x.input(), y.output()).unwrap();
            log_p.values = y.take("log-softmax");
            let nll = Task { logits: log_p, log_probs: true, ..whole.clone() };
            // The log-softmax as stored, rounded.
            check_on(&Judge::new(&nll), &how);
            let losses = nll.run(Call::Forward, &how).row_losses;
            for (i, loss) in losses.iter().enumerate() {
                // NLL does not see a NaN that it does not read.
                let want = judge.out.row_losses[i];
                if want.is_finite() && loss.is_finite() {
                    let bound = judge.bound_after_log_softmax(i);
                    let off = (loss - want).abs();
                    prop_assert!(off <= bound, "{loss:e}, not {want:e}: {:.3}", off / bound);
                }
            }
        }
    }
}

/// Tasks large enough for several threads, with every option.
#[test]
fn threads_do_not_matter() {
    proptest!(config(20), |(spec in tasks(400_000))| {
        let spec = Spec { rows: (200_000 / (spec.classes * spec.inner)).max(1), ..spec };
        let task = spec.task();
        for isa in isas() {
            let on = |threads, pool| How { threads, pool, ..How::on(isa) };
            let good = task.run_all(&on(1, None));
            for (threads, pool) in [(2, None), (3, Some(eight())), (8, Some(eight()))] {
                let what = format!("{} on {threads} threads", isa.name());
                assert_all_same(&task.run_all(&on(threads, pool)), &good, &what);
            }
        }
    });
}

/// The oracle agrees with itself: cross-entropy equals NLL of log-softmax.
#[test]
fn oracle_agrees_with_itself() {
    let x: Vec<f64> = (0..40).map(|i| f64::from(i % 7) - 3.0).collect();
    let log_p = reference::log_softmax(&x, 2, 10, 2);
    let case = |logits: &[f64]| reference::Case {
        targets: reference::Targets::Indices(vec![0, 3, 9, 5]),
        label_smoothing: 0.2,
        ..reference::Case::new(2, 10, 2, logits.to_vec())
    };
    let whole = reference::evaluate(&case(&x));
    let nll = reference::evaluate(&reference::Case { log_probs: true, ..case(&log_p) });
    assert!((whole.loss - nll.loss).abs() < 1e-14);
}
