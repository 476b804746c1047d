//! Random problems with every combination of options, dtypes and layouts, against the oracle, on every
//! instruction set.

use common::operand::{Dtype, FLOATS, Operand};
use common::random::{Rng, config};
use common::task::{Call, Task};
use common::task_bounds::{Worst, check};
use common::task_random::tasks;
use common::{How, is_sampled, isas};
use std::collections::BTreeMap;
use std::sync::Mutex;
use xent::{CrossEntropy, Isa, Reduction};

#[test]
fn random_problems_agree_with_the_oracle() {
    let worst = Mutex::new(BTreeMap::<(Isa, bool), Worst>::new());
    let mut runner = proptest::test_runner::TestRunner::new(config(1500));
    let outcome = runner.run(&tasks(12_000), |spec| {
        let task = spec.task();
        let wide = task.logits.dtype == Dtype::F64;
        for (isa, seen) in check(&task, |isa| spec.how(isa)) {
            worst.lock().unwrap().entry((isa, wide)).or_default().add(&seen);
        }
        Ok(())
    });
    for ((isa, wide), worst) in worst.into_inner().unwrap() {
        let lanes = if wide { "f64" } else { "f32" };
        println!("{} in {lanes}, errors in units of the bounds: {worst}", isa.name());
    }
    if let Err(error) = outcome {
        panic!("{error}");
    }
}

// Faults that random problems found.

/// Constant rows of `x`, `[1, classes, 2]`.
fn constant(dtype: Dtype, classes: usize, x: f64, targets: Operand) -> Task {
    let logits = Operand::packed(dtype, [1, classes, 2], &vec![x; 2 * classes]);
    Task::new(logits, targets)
}

fn agree(task: &Task) {
    check(task, How::on);
}

/// Inner positions, and 32 classes of which only the target, or none, has a finite logit.
#[test]
fn chunks_without_a_logit_of_their_own() {
    for dtype in FLOATS {
        for x in [-9000.0, -100.0, 9000.0] {
            for classes in [33, 65, 97] {
                for y in [0.0, 31.0, classes as f64 - 1.0] {
                    let targets = Operand::packed(Dtype::I64, [1, 1, 2], &[y; 2]);
                    let task = constant(dtype, classes, x, targets);
                    agree(&task);
                    for masked in [0..32, 32..classes, 32..64] {
                        let mut task = task.clone();
                        let masked = 2 * masked.start..2 * masked.end.min(classes);
                        task.logits.values[masked].fill(f64::NEG_INFINITY);
                        agree(&task);
                    }
                }
            }
        }
    }
}

/// A common offset does not change an f64 loss, also where the largest logit has no mass.
#[test]
fn f64_losses_under_an_offset() {
    for offset in [0.0, 1e4, -3e5, 1e8] {
        let mut targets = vec![0.0; 50];
        targets[20..24].fill(0.25);
        let soft = Operand::packed(Dtype::F64, [1, 25, 2], &targets);
        let task = constant(Dtype::F64, 25, offset, soft);
        let index = Operand::packed(Dtype::I64, [1, 1, 2], &[3.0; 2]);
        let mut weights = vec![1.0; 25];
        weights[3] = 0.0;
        let smoothed = Task {
            label_smoothing: 0.25,
            class_weights: Some(Operand::packed(Dtype::F32, [1, 25, 1], &weights)),
            ..constant(Dtype::F64, 25, offset, index)
        };
        // All classes have a probability of 1/25.
        for (task, mass) in [(task, [0.5, 0.5]), (smoothed, [0.24, 0.24])] {
            for isa in isas() {
                let answer = task.run(Call::Forward, &How::on(isa));
                for (got, mass) in answer.row_losses.iter().zip(mass) {
                    let want = mass * 25f64.ln();
                    let error = (got - want).abs() / want;
                    assert!(error <= 1e-14, "{got:e}, not {want:e}: {error:e} at {offset:e}");
                }
            }
        }
    }
}

/// The sum of many masses in f64.
#[test]
fn f64_totals_of_many_classes() {
    // In an emulator the last problem is smaller.
    for classes in [513, 4000, if is_sampled() { 20_000 } else { 200_000 }] {
        let mass = vec![1.0 / classes as f64; 2 * classes];
        let soft = Operand::packed(Dtype::F64, [1, classes, 2], &mass);
        agree(&constant(Dtype::F64, classes, 0.5, soft));
        let index = Operand::packed(Dtype::I64, [1, 1, 2], &[3.0; 2]);
        agree(&Task {
            label_smoothing: 0.5,
            class_weights: Some(Operand::packed(Dtype::F64, [1, classes, 1], &vec![0.1; classes])),
            ..constant(Dtype::F64, classes, 0.5, index)
        });
    }
}

/// More smoothed rows than go together, and more classes than have their weights at hand.
#[test]
fn smoothing_over_many_rows_and_classes() {
    let mut rng = Rng::new(21);
    for (many, classes) in
        [(130, 5), (130, 79), (130, 80), (3, 257), (3, 1000), (2, 4032), (2, 4033)]
    {
        for sizes in [[many, classes, 1], [1, classes, many]] {
            for dtype in [Dtype::F32, Dtype::Bf16] {
                let logits: Vec<f64> =
                    (0..many * classes).map(|_| dtype.round(rng.uniform(-6.0, 6.0))).collect();
                let targets: Vec<f64> = (0..many).map(|_| rng.below(classes) as f64).collect();
                let targets = Operand::packed(Dtype::I64, [sizes[0], 1, sizes[2]], &targets);
                let weights: Vec<f64> =
                    (0..classes).map(|_| f64::from(rng.uniform(0.0, 2.0) as f32)).collect();
                for weighed in [None, Some(Dtype::F32), Some(Dtype::F64)] {
                    let weights =
                        weighed.map(|dtype| Operand::packed(dtype, [1, classes, 1], &weights));
                    let logits = Operand::packed(dtype, sizes, &logits);
                    let task = Task::new(logits, targets.clone());
                    agree(&Task { label_smoothing: 0.2, class_weights: weights, ..task });
                }
            }
        }
    }
}

/// Logits far below the others come first, and the largest logit's class has no mass.
#[test]
fn f64_losses_beside_far_logits() {
    for sizes @ [rows, classes, inner] in [[2, 300, 1], [1, 300, 2], [2, 3000, 1]] {
        let class_of = |i: usize| i / inner % classes;
        let x = |i: usize| if class_of(i) < 64 { -1e9 } else { (i % 7) as f64 / 3.0 };
        let logits: Vec<f64> = (0..rows * classes * inner).map(x).collect();
        let mass = |i: usize| f64::from(class_of(i) >= 64 && logits[i] < 2.0) / 100.0;
        let mass: Vec<f64> = (0..logits.len()).map(mass).collect();
        let soft = Operand::packed(Dtype::F64, sizes, &mass);
        agree(&Task::new(Operand::packed(Dtype::F64, sizes, &logits), soft));
    }
}

/// One class has most of the probability, and lies far above the first logits of the row.
#[test]
fn entropy_far_above_the_first_logits() {
    for dtype in FLOATS {
        for (low, top) in [(-28.987, 0.013), (-40.0, 0.25), (-9.0, 1.0)] {
            for contiguous in [true, false] {
                let mut logits = vec![low; 2 * 511];
                logits[540..542].fill(top);
                let sizes = if contiguous { [2, 511, 1] } else { [1, 511, 2] };
                if contiguous {
                    logits.fill(low);
                    (logits[270], logits[511 + 270]) = (top, top);
                }
                let logits = Operand::packed(dtype, sizes, &logits);
                let by_row = [sizes[0], 1, sizes[2]];
                let targets = Operand::packed(Dtype::I64, by_row, &[7.0, 270.0]);
                agree(&Task::new(logits, targets));
            }
        }
    }
}

/// A confident row whose lse is next to 0: its z-loss is as small as its `p − 1`.
#[test]
fn confident_rows_under_z_loss() {
    for dtype in FLOATS {
        for gap in [20.0, 34.0, 36.5, 60.0] {
            for sizes in [[1, 3, 2], [2, 70, 1]] {
                let [rows, classes, inner] = sizes;
                let mut logits = vec![-gap; rows * classes * inner];
                (logits[0], logits[if inner == 2 { 1 } else { classes }]) = (0.0, 0.0);
                let logits = Operand::packed(dtype, sizes, &logits);
                let targets = Operand::packed(Dtype::U8, [rows, 1, inner], &[0.0, 0.0]);
                for z_loss in [0.1, 2.0] {
                    let task = Task { z_loss, ..Task::new(logits.clone(), targets.clone()) };
                    agree(&task);
                    // The bound is tighter than the error of lse: both terms are known exactly.
                    let rest = (classes - 1) as f64 * (-gap).exp();
                    let want = (2.0 * z_loss - 1.0) * rest;
                    let unit =
                        if dtype == Dtype::F64 { 1e-14 } else { 1e-6 } * (1.0 + 2.0 * z_loss);
                    // The formula leaves out terms of the second order in the sum of the other classes.
                    let unit =
                        unit + 1.02 * dtype.half_ulp(want) / rest + (2.0 + 3.0 * z_loss) * rest;
                    for isa in isas() {
                        let grad = task.run(Call::Fused, &How::on(isa)).grad;
                        let off = (grad[0] - want).abs() / rest;
                        assert!(off <= unit, "{:e}, not {want:e}: {off:e} of {rest:e}", grad[0]);
                    }
                }
            }
        }
    }
}

/// Smoothing with a target far below the other classes, in f64: the terms must not cancel.
#[test]
fn f64_smoothing_around_a_low_target() {
    for (sizes, y) in [([2, 97, 1], 0), ([1, 97, 2], 40), ([2, 4000, 1], 3999), ([1, 4000, 2], 7)] {
        let [rows, classes, inner] = sizes;
        for low in [-1e3, -1e6] {
            let mut logits = Rng::new(5).normals(rows * classes * inner, 1.0);
            for i in 0..rows * inner {
                logits[(i / inner * classes + y) * inner + i % inner] = low;
            }
            let logits: Vec<f64> = logits.into_iter().map(f64::from).collect();
            let logits = Operand::packed(Dtype::F64, sizes, &logits);
            let targets = Operand::packed(Dtype::I64, [rows, 1, inner], &[y as f64; 2]);
            agree(&Task { label_smoothing: 1.0, ..Task::new(logits, targets) });
        }
    }
}

/// A class without mass has a correct gradient though the gradients of the others overflow.
#[test]
fn no_mass_under_an_infinite_scale() {
    for classes in [3, 40, 200] {
        let (mut logits, mut targets) = (vec![0.5f32; classes], vec![0f32; classes]);
        (logits[1], targets[1]) = (0.75, 1.0);
        for isa in isas() {
            let mut grad = vec![0f32; classes];
            let call = CrossEntropy::new(1, classes).isa(isa).reduction(Reduction::Sum);
            let call = call.grad_scale(1e200).grad_output(&[1e200f64]);
            call.forward_backward(&logits, &targets, &mut grad).unwrap();
            for (class, &g) in grad.iter().enumerate().filter(|(class, _)| *class != 1) {
                assert_eq!(g, f32::INFINITY, "class {class} of {classes} on {}", isa.name());
            }
        }
    }
}
