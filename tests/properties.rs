//! Random problems against the oracle, on every instruction set, and invariants between calls.

use common::bounds::{Judge, Worst, check};
use common::random::{Kind, Rng, Spec, config, specs};
use common::{Pass, Problem, Reals, Reduction, is_sampled, isas};
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::sync::Mutex;
use xent::Isa;

#[test]
fn random_problems_agree_with_the_oracle() {
    let worst = Mutex::new(BTreeMap::<Isa, Worst>::new());
    let mut runner = proptest::test_runner::TestRunner::new(config(1500));
    let outcome = runner.run(&specs(), |spec| {
        for (isa, seen) in check(&spec.problem(), |isa| spec.how(isa)) {
            worst.lock().unwrap().entry(isa).or_default().add(&seen);
        }
        Ok(())
    });
    for (isa, worst) in worst.into_inner().unwrap() {
        println!("{}, errors in units of the bounds: {worst}", isa.name());
    }
    if let Err(error) = outcome {
        panic!("{error}");
    }
}

/// The problem without options that only scale or hide a gradient.
fn plain(spec: Spec) -> Spec {
    Spec {
        ignore: common::random::Ignore::Nothing,
        class_weights: 0,
        row_weights: 0,
        mask: false,
        smoothing: 0.0,
        normalizer: 0.0,
        grad_output: 0,
        grad_scale: 1.0,
        accumulate: false,
        short_row_losses: false,
        ..spec
    }
}

proptest! {
    #![proptest_config(config(250))]

    /// Promise 1: a row depends on itself, C and the options alone.
    #[test]
    fn single_rows_have_the_bits_of_the_batch(spec in specs()) {
        let problem = Problem { normalizer: 3.0, ..spec.problem() };
        for isa in isas() {
            let how = spec.how(isa);
            let whole = problem.run(Pass::Fused, &how);
            let backward = problem.run(Pass::Backward(&whole.lse), &how);
            for row in 0..problem.rows {
                let single = problem.single(row);
                let range = row * problem.classes..(row + 1) * problem.classes;
                let alone = single.run(Pass::Fused, &common::How::on(isa));
                common::assert_same(&alone.lse, &whole.lse[row..=row], "lse");
                common::assert_same(&alone.row_losses, &whole.row_losses[row..=row], "row loss");
                common::assert_same(&alone.grad, &whole.grad[range.clone()], "gradient");
                let alone = single.run(Pass::Backward(&alone.lse), &common::How::on(isa));
                common::assert_same(&alone.grad, &backward.grad[range], "backward");
            }
        }
    }

    /// An option at its neutral value gives the bits of the call without it.
    #[test]
    fn neutral_options_change_no_bit(spec in specs()) {
        let without = Spec { accumulate: false, ..plain(spec) };
        let problem = without.problem();
        let (rows, classes) = (problem.rows, problem.classes);
        let mut neutral = vec![
            ("class weights", Problem {
                class_weights: Some(Reals::F32(vec![1.0; classes])),
                ..problem.clone()
            }),
            ("f64 class weights", Problem {
                class_weights: Some(Reals::F64(vec![1.0; classes])),
                ..problem.clone()
            }),
            ("row weights", Problem {
                row_weights: Some(Reals::F32(vec![1.0; rows])),
                ..problem.clone()
            }),
            ("mask", Problem { row_mask: Some(vec![1; rows]), ..problem.clone() }),
            ("normalizer", Problem { normalizer: rows as f64, ..problem.clone() }),
        ];
        let upstream = if problem.reduction == Reduction::None { rows } else { 1 };
        neutral.push(("grad_output", Problem {
            grad_output: Some(Reals::F64(vec![1.0; upstream])),
            ..problem.clone()
        }));
        for isa in isas() {
            let how = without.how(isa);
            let base = problem.run(Pass::Fused, &how);
            for (what, problem) in &neutral {
                problem.run(Pass::Fused, &how).assert_same(&base, what);
            }
            let into_zeros = Problem {
                accumulate: Some(vec![0.0; rows * classes]),
                ..problem.clone()
            };
            let grad = into_zeros.run(Pass::Fused, &how).grad;
            // 0 + -0 is 0.
            prop_assert!(grad.iter().zip(&base.grad).all(|(a, b)| a == b || (a.is_nan() && b.is_nan())));
        }
    }

    /// Weights of 1 equal no weights, to rounding, also under smoothing.
    #[test]
    fn neutral_weights_under_smoothing(spec in specs()) {
        let spec = Spec { smoothing: 0.1, ..plain(spec) };
        let problem = spec.problem();
        let weighted = Problem {
            class_weights: Some(Reals::F32(vec![1.0; problem.classes])),
            ..problem.clone()
        };
        for isa in isas() {
            let how = spec.how(isa);
            let base = problem.run(Pass::Fused, &how);
            weighted.run(Pass::Fused, &how).assert_same(&base, "weights of 1");
        }
    }

    /// Accumulating twice doubles the gradient, to the rounding of one addition.
    #[test]
    fn accumulating_twice_is_twice(spec in specs()) {
        let spec = Spec { accumulate: false, ..spec };
        let problem = spec.problem();
        for isa in isas() {
            let how = spec.how(isa);
            let once = problem.run(Pass::Fused, &how).grad;
            let again = Problem { accumulate: Some(once.clone()), ..problem.clone() };
            for (twice, once) in again.run(Pass::Fused, &how).grad.iter().zip(&once) {
                // A multiplication and an addition may be fused.
                let close = (twice - 2.0 * once).abs() <= once.abs() * 2.0 * f32::EPSILON;
                prop_assert!(close || !once.is_finite() || (2.0 * once).is_infinite(), "{twice} {once}");
            }
        }
    }

    /// The gradient of a row sums to 0, within the errors of its entries.
    #[test]
    fn gradient_rows_sum_to_zero(spec in specs()) {
        let spec = Spec {
            accumulate: false,
            kind: if spec.kind == Kind::AllInf || spec.kind == Kind::NotFinite { Kind::Unit } else { spec.kind },
            ..spec
        };
        let problem = spec.problem();
        for isa in isas() {
            let grad = problem.run(Pass::Fused, &spec.how(isa)).grad;
            for (row, grad) in grad.chunks(problem.classes).enumerate() {
                let sum: f64 = grad.iter().map(|&g| f64::from(g)).sum();
                let size: f64 = grad.iter().map(|&g| f64::from(g.abs())).sum();
                // Small entries have the rounding errors of the larger terms that cancelled in them.
                let smoothed = problem.label_smoothing * problem.grad_scale.abs() * 64.0;
                let bound = 1e-6 * (size + smoothed) + problem.classes as f64 * 1e-37 * size.max(1.0);
                prop_assert!(sum.abs() <= bound || !size.is_finite(), "row {row}: {sum:e} of {size:e}");
            }
        }
    }

    /// A common offset that the inputs can hold exactly changes nothing.
    #[test]
    fn a_common_offset_costs_nothing(seed in any::<u64>(), classes in 1usize..3000, sign in prop::bool::ANY) {
        let mut rng = Rng::new(seed);
        // Multiples of 2^-9 are exact after 1e4 is added.
        let logits: Vec<f32> = (0..classes).map(|_| rng.below(8192) as f32 / 512.0 - 8.0).collect();
        let offset = if sign { 1e4 } else { -1e4 };
        let shifted: Vec<f32> = logits.iter().map(|x| x + offset).collect();
        let y = [rng.below(classes) as i64];
        for smoothing in [0.0, 0.1] {
            let with = |logits: &[f32]| Problem {
                label_smoothing: smoothing,
                ..Problem::sum(classes, logits, &y)
            };
            let (a, b) = (with(&logits), with(&shifted));
            for isa in isas() {
                let how = common::How::on(isa);
                let (a, b) = (a.run(Pass::Fused, &how), b.run(Pass::Fused, &how));
                let exact = a.lse[0] + f64::from(offset);
                prop_assert!((b.lse[0] - exact).abs() <= 3e-7 * (1.0 + (classes as f64).ln()));
                prop_assert!((a.loss - b.loss).abs() <= 3e-7 * a.loss.abs().max(1.0));
                for (a, b) in a.grad.iter().zip(&b.grad) {
                    prop_assert!((a - b).abs() <= 3e-6 * a.abs() + 1e-9, "{a} {b}");
                }
            }
        }
    }
}

/// The largest errors over many rows of the shapes where the bounds are tightest. `--nocapture` prints them.
#[test]
fn worst_errors_stay_within_the_bounds() {
    let shapes: [(usize, usize, &str); 7] = [
        (2, 60_000, "C = 2"),
        (3, 30_000, "C = 3"),
        (5, 20_000, "C = 5"),
        (10, 10_000, "C = 10"),
        (100, 600, "C = 100"),
        (4097, 20, "C = 4097"),
        (70_000, 2, "C = 70000"),
    ];
    for isa in isas() {
        for (classes, rows, name) in shapes {
            let rows = if is_sampled() { rows.div_ceil(8) } else { rows };
            let mut rng = Rng::new(classes as u64);
            let mut logits = Vec::with_capacity(rows * classes);
            let mut targets = Vec::with_capacity(rows);
            for row in 0..rows {
                let y = rng.below(classes);
                let deviation = [0.05, 1.0, 3.0, 10.0][row % 4];
                let offset = [0.0, 0.0, 37.7, -1e4][rng.below(4)];
                let start = logits.len();
                logits.extend((0..classes).map(|_| (rng.normal() * deviation + offset) as f32));
                // A class with most of the probability, which may be the target.
                if rng.one_in(2) {
                    let top = if rng.one_in(2) { y } else { rng.below(classes) };
                    let gap = (classes as f64).ln() + rng.uniform(-2.0, 25.0);
                    logits[start + top] = (gap + offset) as f32;
                }
                targets.push(y as i64);
            }
            let problem = Problem::sum(classes, &logits, &targets);
            let judge = Judge::new(&problem);
            let how = common::How::on(isa);
            let fused = problem.run(Pass::Fused, &how);
            let mut worst = judge.losses(&fused);
            worst.add(&judge.gradient(&fused.grad, None));
            let backward = problem.run(Pass::Backward(&fused.lse), &how);
            worst.add(&judge.gradient(&backward.grad, Some(&fused.lse)));
            println!("{}, {name}, in units of the bounds: {worst}", isa.name());
            let (fused, backward) = (judge.strict(&fused.grad), judge.strict(&backward.grad));
            println!("  fused: {fused}\n  from lse: p {:.3}", backward.other);
            // The errors include those of factor and product.
            assert!(fused.other <= 1.0 && fused.target <= 1.0 && backward.other <= 1.0);
        }
    }
}
