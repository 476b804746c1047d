//! Faults that the fuzz targets found.

use common::layer::{Layer, LayerAnswer, LayerJudge};
use common::operand::{Dtype, FLOATS, Operand};
use common::random::{Rng, config};
use common::split::{Split, shards_of_layer};
use common::task::{Answer, Task, assert_all_same, same_bits};
use common::task_bounds::{Judge, check_answers};
use common::task_random::tasks;
use common::{How, isas};
use xent::{CrossEntropy, Pool, Reduction, Results};

/// The slope of a cap under a scale past f32 was infinite, and turned a gradient of 0 into NaN.
#[test]
fn certain_class_under_a_steep_cap() {
    for isa in isas() {
        for classes in [1, 2, 200] {
            let mut logits = vec![f32::NEG_INFINITY; classes];
            logits[0] = 0.0;
            let mut grad = vec![7.0f32; classes];
            let call = CrossEntropy::new(1, classes).softcap(30.0).logit_scale(f64::MAX).isa(isa);
            call.forward_backward(&logits, &[0i32], &mut grad).unwrap();
            if classes == 1 {
                assert_eq!(grad, [0.0], "{isa:?}");
            }
            // A class of probability 0 is at the cap, where the slope is 0.
            assert!(grad[1..].iter().all(|g| *g == 0.0), "{isa:?}: {grad:?}");
        }
    }
}

/// A mean over a denominator of 0 is NaN, except for a class of weight 0, which has no term.
#[test]
fn weightless_classes_beside_no_denominator() {
    for isa in isas() {
        for classes in [3, 200] {
            let mut weights = vec![0.0f32; classes];
            weights[0] = 1.25;
            let logits = vec![-1.0f32; classes];
            let mut grad = vec![7.0f32; classes];
            CrossEntropy::new(1, classes)
                .log_probs(true)
                .label_smoothing(0.3)
                .class_weights(&weights)
                .isa(isa)
                .forward_backward(&logits, &[1i32], &mut grad)
                .unwrap();
            assert!(grad[0].is_infinite() || grad[0].is_nan(), "{isa:?}: {grad:?}");
            assert!(grad[2..].iter().all(|g| *g == 0.0), "{isa:?}: {grad:?}");
        }
    }
}

/// Smoothing sums all classes before it divides by their number. A sum beyond f64 is infinite, as
/// semantics.md says, not NaN; the gradient is unaffected.
#[test]
fn lowest_numbers_for_a_mask_under_smoothing() {
    for isa in isas() {
        for classes in [3, 200] {
            let mut logits = vec![f64::MIN; classes];
            logits[0] = 0.0;
            for (log_probs, own) in [(false, 0.1), (true, -0.9)] {
                let mut grad = vec![7.0; classes];
                let call = CrossEntropy::new(1, classes).log_probs(log_probs).isa(isa);
                let sure = call.clone().forward(&logits, &[0i32]).unwrap();
                assert_eq!(sure, 0.0, "{isa:?}");
                let smooth = call.label_smoothing(0.1);
                let loss = smooth.forward_backward(&logits, &[0i32], &mut grad).unwrap();
                assert_eq!(loss, f64::INFINITY, "{isa:?}");
                let each = 0.1 / classes as f64;
                assert!((grad[0] - (own - each)).abs() < 1e-15, "{isa:?}: {}", grad[0]);
                assert!(grad[1..].iter().all(|g| (g + each).abs() < 1e-17), "{isa:?}: {grad:?}");
            }
        }
    }
}

/// An infinite mass makes its row NaN or infinite (semantics.md leaves open which), and no other row.
#[test]
fn infinite_masses_stay_in_their_row() {
    for isa in isas() {
        for classes in [3, 200] {
            let logits = vec![0.5f32; 2 * classes];
            let mut targets = vec![1.0 / classes as f32; 2 * classes];
            targets[classes + 1] = f32::NEG_INFINITY;
            let mut grad = vec![7.0f32; 2 * classes];
            let mut row_losses = [7.0f64; 2];
            let results =
                Results { row_losses: Some((&mut row_losses).into()), ..Results::default() };
            CrossEntropy::new(2, classes)
                .isa(isa)
                .reduction(Reduction::Sum)
                .forward_backward_with(&logits, &targets, &mut grad, results)
                .unwrap();
            assert!((row_losses[0] - (classes as f64).ln()).abs() < 1e-6, "{isa:?}");
            assert!(!row_losses[1].is_finite(), "{isa:?}: {row_losses:?}");
            let (first, second) = grad.split_at(classes);
            assert!(first.iter().all(|g| g.abs() < 1e-6), "{isa:?}: {first:?}");
            assert!(second.iter().all(|g| !g.is_finite()), "{isa:?}: {second:?}");
        }
    }
}

/// Equal terms round the same way: 346 of them and one far larger, in f32 lanes. Terms of e^-16.6 and
/// e^-12.4 are the worst for three additions to 1.
#[test]
fn equal_terms_beside_one() {
    for isa in isas() {
        for classes in [384, 1000, 3000, 6000] {
            for low in [-7.0f32, -6.9, -7.3, -8.1, -9.75, -12.396, -16.63] {
                let mut logits = vec![low; classes];
                logits[0] = 0.0;
                logits[248] = -5.375;
                logits[classes - 1] = -13.5;
                let mut lse = [0.0];
                CrossEntropy::new(1, classes).isa(isa).lse(&logits, &mut lse).unwrap();
                let want = logits.iter().map(|&x| f64::from(x).exp()).sum::<f64>().ln();
                let bound = 2e-7 * want + 2f64.powi(-22);
                let off = (lse[0] - want).abs();
                assert!(off <= bound, "{isa:?} {classes} {low}: {} not {want}, by {off:e}", lse[0]);
            }
        }
    }
}

/// Makes every call on every set. Everything except the gradients of the rows `beyond`, whose values are
/// not promised, agrees with the oracle. All of it has the same bits on all sets and in any batch.
#[track_caller]
fn agree_but_for(beyond: &[bool], task: &Task) {
    let judge = Judge::new(task);
    let found: Vec<bool> = (0..task.positions()).map(|i| judge.factors_leave_range(i)).collect();
    assert_eq!(found, beyond);
    let mut others: Option<Vec<(&str, Answer)>> = None;
    for isa in isas() {
        let answers = task.run_all(&How::on(isa));
        check_answers(&judge, &answers);
        for i in 0..task.rows {
            let own = i * task.classes..(i + 1) * task.classes;
            let alone = task.single(i, 0).run_all(&How::on(isa));
            for ((call, whole), (_, alone)) in answers.iter().zip(alone) {
                let whole = whole.grad.get(own.clone()).unwrap_or(&[]);
                same_bits(whole, &alone.grad, &format!("row {i} alone, {call}"));
            }
        }
        match &others {
            None => others = Some(answers),
            Some(others) => assert_all_same(&answers, others, isa.name()),
        }
    }
}

/// The problem packed, and with classes that are not contiguous.
fn in_two_layouts(logits: &Operand) -> [Operand; 2] {
    let [rows, ..] = logits.sizes;
    [logits.clone(), Operand { strides: [1, rows as i64, 0], ..logits.clone() }]
}

/// A row with an lse of 1e305, and an ordinary row.
fn one_far_out(classes: usize) -> Operand {
    let mut values = vec![f64::NEG_INFINITY; 2 * classes];
    (values[0], values[1], values[3]) = (1e305, 1e305, -1e305);
    for (class, x) in values[classes..].iter_mut().enumerate() {
        *x = (class % 7) as f64;
    }
    Operand::packed(Dtype::F64, [2, classes, 1], &values)
}

/// The slope of the z-loss is beyond f64. Classes of probability 0 are NaN in that row; the next row is
/// unaffected.
#[test]
fn penalty_beyond_f64() {
    for classes in [4, 20, 200, 3000] {
        let logits = one_far_out(classes);
        let mut one_hot = vec![0.0; 2 * classes];
        (one_hot[3], one_hot[classes + 1]) = (1.0, 1.0);
        for logits in in_two_layouts(&logits) {
            for targets in [
                Operand::packed(Dtype::I64, [2, 1, 1], &[3.0, 1.0]),
                Operand::packed(Dtype::F32, [2, classes, 1], &one_hot),
            ] {
                let task = Task { z_loss: 2.0, ..Task::new(logits.clone(), targets) };
                // 4e305, and 4e335.
                agree_but_for(&[false, false], &task);
                agree_but_for(&[true, false], &Task { grad_scale: 1e30, ..task });
            }
        }
    }
}

/// The same, with threads that share a row.
#[test]
fn penalty_beyond_f64_on_threads() {
    let targets = Operand::packed(Dtype::I64, [2, 1, 1], &[3.0, 1.0]);
    let task = Task::new(one_far_out(150_000), targets);
    let task = Task { z_loss: 2.0, grad_scale: 1e30, ..task };
    let pool = Pool::new(3).unwrap();
    for isa in isas() {
        let alone = How { threads: 1, ..How::on(isa) };
        let all = task.run_all(&How { threads: 3, pool: Some(&pool), ..alone });
        assert_all_same(&all, &task.run_all(&alone), isa.name());
    }
}

/// Factors in the range of f64, but far beyond f32 lanes, where a sum was `inf - inf`.
#[test]
fn factors_beyond_f32() {
    for dtype in FLOATS {
        for classes in [3, 20, 200] {
            let mut values: Vec<f64> = (0..4 * classes).map(|i| (i % 5) as f64).collect();
            values[1] = f64::NEG_INFINITY;
            let logits = Operand::packed(dtype, [4, classes, 1], &values);
            let mask = Operand::packed(Dtype::U8, [4, 1, 1], &[1.0, 1.0, 0.0, 1.0]);
            let targets = Operand::packed(Dtype::I64, [4, 1, 1], &[0.0, 2.0, 1.0, 1.0]);
            let upstream = Operand::packed(Dtype::F64, [4, 1, 1], &[1e300, 0.5, 1e300, -2.0]);
            for logits in in_two_layouts(&logits) {
                let task = Task {
                    row_mask: Some(mask.clone()),
                    label_smoothing: 0.5,
                    grad: Operand::zeros(dtype, [4, classes, 1]),
                    ..Task::new(logits, targets.clone())
                };
                let wide = dtype == Dtype::F64;
                let each = Task {
                    reduction: Reduction::None,
                    grad_output: Some(upstream.clone()),
                    ..task.clone()
                };
                agree_but_for(&[!wide, false, !wide, false], &each);
                let over_little = Task { reduction: Reduction::Mean, normalizer: 1e-10, ..task };
                agree_but_for(&[true; 4], &Task { grad_scale: 1e300, ..over_little.clone() });
                agree_but_for(&[false; 4], &Task { grad_scale: 1e30, ..over_little });
            }
        }
    }
}

/// Factors up to the limit leave all results accurate.
#[test]
fn factors_up_to_the_limits() {
    for dtype in FLOATS {
        let wide = dtype == Dtype::F64;
        for classes in [3, 20, 200] {
            let values: Vec<f64> = (0..2 * classes).map(|i| (i % 5) as f64).collect();
            let logits = Operand::packed(dtype, [2, classes, 1], &values);
            let targets = Operand::packed(Dtype::I64, [2, 1, 1], &[0.0, 2.0]);
            for logits in in_two_layouts(&logits) {
                let task = Task { label_smoothing: 0.3, ..Task::new(logits, targets.clone()) };
                let capped = Task { softcap: 2.0, ..task.clone() };
                let [most, most_capped] = if wide { [1e306; 2] } else { [1e59, 1e36] };
                agree_but_for(&[false; 2], &Task { grad_scale: most, ..task.clone() });
                agree_but_for(&[false; 2], &Task { grad_scale: most_capped, ..capped.clone() });
                let [least, least_capped] = if wide { [1e-289; 2] } else { [1e-289, 1e-36] };
                for (task, least, ends) in [(task, least, wide), (capped, least_capped, true)] {
                    let upstream = Some(Operand::packed(Dtype::F64, [1; 3], &[1e30]));
                    let task = Task { grad_scale: least, grad_output: upstream, ..task };
                    agree_but_for(&[false; 2], &task);
                    // Values below the range of f32 count as 0.
                    agree_but_for(&[ends; 2], &Task { grad_scale: least * 1e-2, ..task });
                }
            }
        }
    }
}

/// Random problems do not reach the limits of the factors.
#[test]
fn ordinary_factors_stay_in_range() {
    let mut runner = proptest::test_runner::TestRunner::new(config(1500));
    let outcome = runner.run(&tasks(600), |spec| {
        let task = spec.task();
        let judge = Judge::new(&task);
        for i in 0..task.positions() {
            proptest::prop_assert!(!judge.factors_leave_range(i), "row {i} of {task:?}");
        }
        Ok(())
    });
    if let Err(error) = outcome {
        panic!("{error}");
    }
}

/// The first logits of a row chose its shift. Where all of them were -inf, small exponentials of the others
/// were flushed to 0 beside a shift of 0, and their classes had no gradient.
#[test]
fn heads_that_say_nothing() {
    for isa in isas() {
        for classes in [8, 10, 100, 200, 300] {
            let mut logits = vec![f32::NEG_INFINITY; classes];
            (logits[4], logits[5], logits[6], logits[7]) = (-40.0, -39.0, -100.0, -41.0);
            let mut grad = vec![7.0f32; classes];
            let call = CrossEntropy::new(1, classes).reduction(Reduction::Sum).isa(isa);
            call.forward_backward(&logits, &[4i32], &mut grad).unwrap();
            let sum: f64 = logits.iter().map(|&x| f64::from(x).exp()).sum();
            for (c, (&x, &got)) in logits.iter().zip(&grad).enumerate() {
                let want = f64::from(x).exp() / sum - f64::from(u8::from(c == 4));
                let error = (f64::from(got) - want).abs();
                assert!(error <= 1e-5 * want.abs(), "{isa:?}: {got:e} for {want:e} at {c}");
            }
        }
    }
}

/// Makes every call of a layer on every set, against the oracle; the sets have the same bits.
#[track_caller]
fn agree_on_layer(layer: &Layer) {
    let judge = LayerJudge::new(layer);
    let mut others: Option<Vec<(&str, LayerAnswer)>> = None;
    for isa in isas() {
        let answers = layer.run_all(&How { threads: 1, ..How::on(isa) });
        judge.check_answers(&answers);
        match &others {
            None => others = Some(answers),
            Some(others) => {
                for ((call, a), (_, b)) in answers.iter().zip(others) {
                    a.assert_same(b, &format!("{call} on {}", isa.name()));
                }
            }
        }
    }
}

/// A packed layer of random operands with f32 logits of about 2 and gradients of the same dtype.
fn layer(dtype: Dtype, rows: usize, classes: usize, features: usize) -> Layer {
    let mut rng = Rng::new((rows * classes + features) as u64);
    let mut normals =
        |n: usize, scale: f64| -> Vec<f64> { (0..n).map(|_| scale * rng.normal()).collect() };
    let hidden = normals(rows * features, 1.0);
    let weight = normals(classes * features, 2.0 / (features as f64).sqrt());
    let targets: Vec<f64> = (0..rows).map(|row| (row * 7 % classes) as f64).collect();
    Layer::new(
        Operand::packed(dtype, [rows, features, 1], &hidden),
        Operand::packed(dtype, [classes, features, 1], &weight),
        None,
        Operand::packed(Dtype::I32, [rows, 1, 1], &targets),
    )
}

/// A row in which one class has all of the probability, far above 0 or below: the exponentials of the others were
/// counted from 0 in the gradient, where they overflow.
#[test]
fn gradients_of_certain_rows_far_from_zero() {
    for dtype in [Dtype::F32, Dtype::F64, Dtype::Bf16] {
        for far in [-1e6, -3e5, -4.5e4, -1e4, -2e3, -150.0, 150.0, 2e3, 1e4, 4.5e4, 3e5, 1e6] {
            let (rows, classes, features) = (3, 300, 2);
            let mut layer = layer(dtype, rows, classes, features);
            // The logits of the second row are multiples of `far`, those of the last class the largest.
            let step = |class: usize| 1.0 + class as f64 / 512.0;
            layer.hidden.values[features..][..features].copy_from_slice(&[dtype.round(far), 0.0]);
            for class in 0..classes {
                layer.weight.values[class * features] = dtype.round(step(class));
            }
            let target = if far > 0.0 { classes - 1 } else { 0 };
            let [mut probabilities, mut targets] = [vec![0.0; rows * classes], vec![5.0; rows]];
            (0..rows).for_each(|row| probabilities[row * classes + target] = 0.5);
            targets[1] = target as f64;
            let probabilities = Operand::packed(Dtype::F32, [rows, classes, 1], &probabilities);
            let targets = Operand::packed(Dtype::I64, [rows, 1, 1], &targets);
            for (targets, label_smoothing) in
                [(&targets, 0.0), (&targets, 0.1), (&probabilities, 0.0), (&probabilities, 0.2)]
            {
                for workspace in [0, 64 << 20] {
                    let new = Layer::new(
                        layer.hidden.clone(),
                        layer.weight.clone(),
                        None,
                        targets.clone(),
                    );
                    let task = Task { label_smoothing, ..new.task.clone() };
                    agree_on_layer(&Layer { task, workspace, ..new });
                }
            }
        }
    }
}

/// All logits of a row are far below 0, where exponents are counted from a logit: the sums of a hidden state's gradient
/// were counted from 0 and vanished, and the gradient was NaN.
#[test]
fn gradients_of_low_rows() {
    for dtype in [Dtype::F32, Dtype::F64, Dtype::Bf16] {
        for low in [-1e3, -1e5, -3e5, -2e6, -1e8] {
            for classes in [40, 300, 700] {
                let features = 3;
                let mut layer = layer(dtype, 4, classes, features);
                // The logits are those of two features and a bias.
                layer.hidden.values.chunks_mut(features).for_each(|h| h[2] = 1.0);
                let bias: Vec<f64> = (0..classes).map(|_| low).collect();
                layer.bias = Some(Operand::packed(Dtype::F32, [1, classes, 1], &bias));
                let Layer { hidden, weight, bias, .. } = layer;
                let targets = layer.task.targets.expect("indices");
                agree_on_layer(&Layer::new(hidden, weight, bias, targets));
            }
        }
    }
}

/// Logits of a layer that underflow to zeros of both signs: the sign of the largest one, in the state of a shard, depended
/// on the instruction set.
#[test]
fn states_of_zeros_of_both_signs() {
    for classes in [3, 17, 40, 300] {
        let mut layer = layer(Dtype::F32, 5, classes, 1);
        layer.hidden.values.fill(f64::from(1e-30f32));
        for (class, w) in layer.weight.values.iter_mut().enumerate() {
            *w = f64::from(if class % 5 == 2 { 1e-30f32 } else { -1e-30 });
        }
        let Layer { hidden, weight, task, .. } = layer;
        let layer = Layer::new(hidden, weight, None, task.targets.expect("indices"));
        let split = Split::at(&layer.task, vec![classes / 2], &mut Rng::new(1));
        let all = isas()
            .into_iter()
            .map(|isa| (isa, shards_of_layer(&layer, &split, &mut Rng::new(1), &How::on(isa))));
        let all: Vec<_> = all.collect();
        for (isa, shards) in &all {
            shards.assert_same(&all[0].1, isa.name());
        }
    }
}

/// The gradient of the hidden states alone, with kept logits: half-precision hidden states of a chunk of 256 rows were
/// widened into room for 168, past the end of an allocation.
#[test]
fn kept_logits_of_more_rows_than_a_block() {
    for dtype in [Dtype::Bf16, Dtype::F16] {
        for rows in [40, 257, 300, 500] {
            let mut layer = layer(dtype, rows, 15, 4);
            let [hidden, ..] = layer.grads.clone();
            let workspace = 64 << 20;
            // Without smoothing the logits would be made once anyhow, and not be kept.
            layer.task.label_smoothing = 0.1;
            agree_on_layer(&Layer { grads: [hidden, None, None], workspace, ..layer });
        }
    }
}

/// Zeros before classes at the end of f64: the entropy of rows that are computed again was NaN, as their distance from
/// those classes, in powers of 2, is infinite.
#[test]
fn entropy_beside_the_end_of_f64() {
    for classes in [70, 304] {
        let operand = |dtype, sizes: [usize; 3], values: Vec<f64>| Operand {
            dtype,
            sizes,
            strides: [0; 3],
            offset: 0,
            values,
        };
        let mut values = vec![0.0; classes];
        values[33..48].fill(f64::MAX);
        let logits = operand(Dtype::F64, [1, classes, 1], values);
        let targets = operand(Dtype::U8, [1; 3], vec![64.0]);
        agree_but_for(&[false], &Task::new(logits, targets));
    }
}
