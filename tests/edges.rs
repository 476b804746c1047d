//! The edge cases: at least one test for each line of the table in docs/semantics.md, and one for each
//! bug of other implementations that could occur here (the test has the bug's name).
//!
//! [`check`] runs forward, fused, fused in place and both backwards of f32 rows on every instruction
//! set, and compares them with the oracle, within the bounds of the accuracy table. The tests of
//! [`in_all_shapes`] and [`distillation`] run every option in every dtype and layout. Further assertions of a test hold
//! whatever the oracle says.

#[path = "edges/distillation.rs"]
mod distillation;
#[path = "edges/everywhere.rs"]
mod everywhere;
#[path = "edges/in_all_shapes.rs"]
mod in_all_shapes;

use common::bounds::{Judge, check};
use common::random::{Kind, Rng, fill};
use common::reference;
use common::{How, INF, Indices, Pass, Problem, Reals, Reduction, assert_same, isas, some};
use xent::half::{bf16, f16};
use xent::{CrossEntropy, Error, Results, Softmax};

const NAN: f32 = f32::NAN;
const LOW: f32 = f32::NEG_INFINITY;
const IGNORED: i64 = -100;

fn agree(problem: &Problem) {
    check(problem, How::on);
}

/// Makes the fused call on every instruction set.
fn every(problem: &Problem, look: impl Fn(&common::Run)) {
    for isa in isas() {
        look(&problem.run(Pass::Fused, &How::on(isa)));
    }
}

/// Rows of ordinary logits, and targets.
fn ordinary(rows: usize, classes: usize) -> (Vec<f32>, Vec<i64>) {
    let mut rng = Rng::new((rows * classes) as u64);
    let logits = rng.normals(rows * classes, 2.0);
    let targets = (0..rows).map(|_| rng.below(classes) as i64).collect();
    (logits, targets)
}

// The table of edges.

#[test]
fn no_row_counts() {
    let (logits, _) = ordinary(3, 70);
    let ignored = Problem::new(70, &logits, &[IGNORED; 3]);
    let masked = Problem { row_mask: Some(vec![0; 3]), ..Problem::new(70, &logits, &[0, 1, 2]) };
    let none = Problem::new(70, &[], &[]);
    for problem in [ignored, masked, none] {
        agree(&problem);
        every(&problem, |run| {
            assert!(run.loss.is_nan());
            assert_eq!((run.kept_rows, run.normalizer), (0, 0.0));
            assert!(run.grad.iter().all(|g| g.to_bits() == 0));
        });
        let zero = Problem { empty_is_zero: true, ..problem.clone() };
        let given = Problem { normalizer: 4.0, ..problem.clone() };
        let sum = Problem { reduction: Reduction::Sum, ..problem };
        for problem in [zero, given, sum] {
            agree(&problem);
            every(&problem, |run| {
                assert_eq!(run.loss, 0.0);
                assert!(run.grad.iter().all(|g| g.to_bits() == 0));
            });
        }
    }
}

#[test]
fn a_denominator_of_zero() {
    let with = |weights: Vec<f32>, targets: &[i64]| Problem {
        class_weights: Some(Reals::F32(weights)),
        ..Problem::new(2, &[1.0, 2.0, 1.0, 5.0][..2 * targets.len()], targets)
    };
    let nothing = with(vec![0.0, 2.0], &[0]);
    every(&nothing, |run| {
        assert!(run.loss.is_nan() && run.grad.iter().all(|g| g.is_nan()));
    });
    // EMPTY_IS_ZERO excuses only a mean over no kept rows.
    let excused = Problem { empty_is_zero: true, ..nothing };
    every(&excused, |run| assert!(run.loss.is_nan()));
    every(&with(vec![1.0, -1.0], &[0, 1]), |run| {
        assert_eq!((run.loss, run.normalizer), (INF, 0.0));
        assert!(run.grad.iter().all(|g| !g.is_finite()));
    });
    every(&with(vec![-1.0, 1.0], &[0, 1]), |run| assert_eq!(run.loss, -INF));
}

#[test]
fn zero_classes() {
    let targets = [0i32; 2];
    let refused = CrossEntropy::new(2, 0).forward(&[0f32; 0], &targets);
    assert!(matches!(refused, Err(Error::Shape(_))), "{refused:?}");
    let none = CrossEntropy::new(0, 0).forward(&[0f32; 0], &targets[..0]);
    assert!(none.unwrap().is_nan());
}

#[test]
fn minus_infinity_beside_the_target() {
    for classes in [2, 5, 65, 300, 2049] {
        for masked in [0, classes / 2, classes - 1] {
            let (mut logits, _) = ordinary(1, classes);
            logits[masked] = LOW;
            let y = usize::from(masked == 0) as i64;
            let problem = Problem::new(classes, &logits, &[y]);
            agree(&problem);
            every(&problem, |run| assert_eq!(run.grad[masked], 0.0));
        }
    }
}

#[test]
fn minus_infinity_at_the_target() {
    for classes in [2, 5, 65, 300, 2049] {
        let (mut logits, _) = ordinary(1, classes);
        logits[1] = LOW;
        let problem = Problem::new(classes, &logits, &[1]);
        agree(&problem);
        every(&problem, |run| assert_eq!((run.loss, run.grad[1]), (INF, -1.0)));
        // Under smoothing every class has mass.
        let smooth = Problem { label_smoothing: 0.5, ..Problem::new(classes, &logits, &[0]) };
        agree(&smooth);
        every(&smooth, |run| {
            assert_eq!(run.loss, INF);
            assert_eq!(run.grad[1], -0.5 / classes as f32);
        });
    }
}

#[test]
fn a_row_of_minus_infinity() {
    for classes in [1, 2, 64, 257, 2049, 4097] {
        let (mut logits, targets) = ordinary(3, classes);
        logits[classes..2 * classes].fill(LOW);
        let problem = Problem::sum(classes, &logits, &targets);
        agree(&problem);
        every(&problem, |run| {
            assert!(run.loss.is_nan() && run.row_losses[1].is_nan());
            assert_eq!(run.lse[1], -INF);
            let grad: Vec<_> = run.grad.chunks(classes).collect();
            assert!(grad[1].iter().all(|g| g.is_nan()));
            assert!(grad[0].iter().chain(grad[2]).all(|g| g.is_finite()));
        });
    }
}

/// Also pytorch#156379, TF#116933, lattice#740: one lane was wrong; a maximum dropped a NaN.
#[test]
fn nan_and_plus_infinity_in_every_lane() {
    let classes = 200;
    let (logits, targets) = ordinary(3, classes);
    let clean = Problem::sum(classes, &logits, &targets);
    for isa in isas() {
        let how = How::on(isa);
        let good = clean.run(Pass::Fused, &how);
        for at in 0..classes {
            for (bad, lse) in [(NAN, f64::NAN), (f32::INFINITY, INF)] {
                let mut problem = clean.clone();
                problem.logits[classes + at] = bad;
                for pass in [Pass::Fused, Pass::FusedInPlace] {
                    let run = problem.run(pass, &how);
                    assert_same(&run.lse[1..2], &[lse], "lse");
                    assert!(run.loss.is_nan() && run.row_losses[1].is_nan());
                    let (grad, good) = (chunks(&run.grad), chunks(&good.grad));
                    assert!(grad[1].iter().all(|g| g.is_nan()), "{bad} at {at}");
                    assert_same(grad[0], good[0], "the row before");
                    assert_same(grad[2], good[2], "the row after");
                }
                let run = problem.run(Pass::Backward(&[1.0, lse, 1.0]), &how);
                assert!(chunks(&run.grad)[1].iter().all(|g| g.is_nan()));
            }
        }
    }
    fn chunks(grad: &[f32]) -> Vec<&[f32]> {
        grad.chunks(200).collect()
    }
}

#[test]
fn nan_beside_infinity_is_nan() {
    for classes in [3, 300, 2500] {
        for [nan, inf] in [[0, 1], [1, 0], [2, classes - 1], [classes - 1, 2]] {
            for y in [0, 1, 2] {
                let (mut logits, _) = ordinary(1, classes);
                logits[nan] = NAN;
                logits[inf] = if nan == inf { NAN } else { f32::INFINITY };
                let problem = Problem::new(classes, &logits, &[y]);
                agree(&problem);
                every(&problem, |run| assert!(run.lse[0].is_nan()));
            }
        }
    }
}

/// A weight of 0 does not hide NaN and +inf; a row weight of 0 does.
#[test]
fn what_hides_a_nan() {
    for bad in [NAN, f32::INFINITY] {
        let logits = [1.0, 2.0, bad, 0.0, 1.0, 3.0];
        for smoothing in [0.0, 0.1, 1.0] {
            let base =
                Problem { label_smoothing: smoothing, ..Problem::sum(2, &logits, &[0, 1, 1]) };
            let weightless =
                Problem { class_weights: Some(Reals::F32(vec![1.0, 0.0])), ..base.clone() };
            every(&weightless, |run| assert!(run.row_losses[1].is_nan()));
            let hidden = Problem { row_weights: Some(Reals::F64(vec![1.0, 0.0, 1.0])), ..base };
            agree(&hidden);
            every(&hidden, |run| {
                assert_eq!(run.row_losses[1], 0.0);
                assert_eq!(run.grad[2..4], [0.0; 2]);
                assert_eq!(run.kept_rows, 3);
            });
        }
    }
}

#[test]
fn a_target_out_of_range() {
    let (logits, _) = ordinary(300, 7);
    for row in [0, 150, 299] {
        for bad in [7, 8, -1, -99, 1 << 32, i64::MAX, i64::MIN] {
            let mut targets = vec![3; 300];
            targets[row] = bad;
            let problem = Problem::new(7, &logits, &targets);
            let lse = vec![1.0; 300];
            for isa in isas() {
                for pass in [
                    Pass::Forward,
                    Pass::Fused,
                    Pass::FusedInPlace,
                    Pass::Backward(&lse),
                    Pass::BackwardInPlace(&lse),
                ] {
                    let refused = problem.try_run(pass, &How::on(isa)).unwrap_err();
                    let value = bad;
                    let classes = 7;
                    let expected = Error::Target { row, place: None, value, classes };
                    assert_eq!(refused, expected);
                }
            }
        }
    }
}

#[test]
fn confident_predictions() {
    for classes in [2, 3, 10, 65, 300, 2500] {
        for gap in [1.0, 5.0, 17.0, 34.5, 69.0, 80.0, 100.0, 300.0] {
            for offset in [0.0, 128.0, -4096.0] {
                for y in [0, classes - 1] {
                    let mut logits = vec![offset - gap; classes];
                    logits[y] = offset;
                    let problem = Problem::new(classes, &logits, &[y as i64]);
                    agree(&problem);
                    let rest = (classes as f64 - 1.0) * f64::from(-gap).exp();
                    every(&problem, |run| {
                        let relative = (run.loss / rest.ln_1p() - 1.0).abs();
                        assert!(relative < 1e-6, "{gap}: {:e}, {rest:e}", run.loss);
                    });
                }
            }
        }
    }
}

#[test]
fn certain_predictions_are_exactly_zero() {
    for classes in [1, 2, 64, 65, 257, 2049] {
        for x in [7.0, -1e4, 3e38, -3e38] {
            let mut logits = vec![LOW; classes];
            let y = classes / 2;
            logits[y] = x;
            let problem = Problem::new(classes, &logits, &[y as i64]);
            agree(&problem);
            every(&problem, |run| {
                assert_eq!((run.loss, run.lse[0]), (0.0, f64::from(x)));
                assert!(run.grad.iter().all(|&g| g == 0.0));
            });
        }
    }
}

/// Backward takes any lse: here the lse of the row together with a second shard of the vocabulary.
#[test]
fn lse_from_elsewhere() {
    let classes = 300;
    let (logits, targets) = ordinary(2, classes);
    let problem = Problem::sum(classes, &logits, &targets);
    for extra in [0.0, 0.5, 3.0, 40.0, 80.0] {
        let outcome = common::bounds::Judge::new(&problem).outcome;
        let lse: Vec<f64> = outcome.lse.iter().map(|lse| lse + extra).collect();
        for isa in isas() {
            let grad = problem.run(Pass::Backward(&lse), &How::on(isa)).grad;
            for (i, &g) in grad.iter().enumerate() {
                let row = i / classes;
                let log_p = f64::from(logits[i]) - lse[row];
                let hit = targets[row] as usize == i % classes;
                let want = if hit { log_p.exp_m1() } else { log_p.exp() };
                let bound = 2e-7 * (1.0 + log_p.abs()) * log_p.exp() + 1e-7 * want.abs() + 1e-37;
                let error = (f64::from(g) - want).abs();
                assert!(error <= bound, "{g:e} {want:e} {log_p} {extra}");
            }
        }
    }
}

/// A program linked with -ffast-math runs with subnormals off.
#[cfg(target_arch = "x86_64")]
#[test]
fn the_callers_floating_point_state() {
    use std::arch::asm;
    fn state() -> u32 {
        let mut word = 0u32;
        // SAFETY: the instruction writes the control word to a local variable.
        unsafe { asm!("stmxcsr [{}]", in(reg) &mut word, options(nostack)) };
        word
    }
    fn set(word: u32) {
        // SAFETY: the value is the control word read before, with FTZ and DAZ at most added; the test
        // restores it below.
        unsafe { asm!("ldmxcsr [{}]", in(reg) &word, options(nostack)) };
    }
    let (mut logits, targets) = ordinary(2, 300);
    logits[17] = -86.0;
    logits[317] = 1e-40;
    for scale in [1.0, 1e-36] {
        let problem = Problem { grad_scale: scale, ..Problem::sum(300, &logits, &targets) };
        for isa in isas() {
            let usual = problem.run(Pass::Fused, &How::on(isa));
            let (before, flush) = (state(), state() | 0x8040);
            set(flush);
            let flushed = problem.run(Pass::Fused, &How::on(isa));
            let after = state();
            set(before);
            // Bits 0 to 5 are the exception flags.
            assert_eq!(after & !0x3f, flush & !0x3f);
            assert!((flushed.loss - usual.loss).abs() <= 1e-15 * usual.loss);
            for (a, b) in flushed.grad.iter().zip(&usual.grad) {
                assert!((a - b).abs() <= f32::MIN_POSITIVE, "{a:e} {b:e}");
            }
        }
    }
}

// Logits that leave the exponent range of one shift.

/// The first classes, from which the initial shift is chosen, are -inf. Later classes must keep their
/// probabilities.
#[test]
fn small_probabilities_survive_a_missing_initial_shift() {
    for level in [-30.0, -36.0, -41.0, -41.5, -44.0, 30.0, 41.0, 44.0] {
        for depth in [20.0, 47.0, 60.0, 80.0] {
            let mut logits = vec![LOW; 600];
            logits[256..].fill(level - depth);
            logits[300] = level;
            logits[301] = level - 1.0;
            for y in [300, 301, 599] {
                agree(&Problem::new(600, &logits, &[y]));
            }
        }
    }
}

/// The same where one of the first 256 classes is far above or below the others.
#[test]
fn small_probabilities_survive_a_far_head() {
    for head in [-2e6, -1e9, 1e-3] {
        for level in [-30.0f32, -41.0, 41.0] {
            let mut logits = vec![level - 47.0; 600];
            logits[..256].fill(head);
            logits[300] = level;
            agree(&Problem::new(600, &logits, &[300]));
            agree(&Problem::new(600, &logits, &[599]));
        }
    }
}

/// Equal logits have equal probabilities in every place.
#[test]
fn constant_rows_at_any_height() {
    for classes in [2, 10, 300, 2500] {
        for height in [4.5e4, 4.6e4, 1e6, 1e7, 1e9, 1e12, 1e20, 1e30, 3e38] {
            for x in [height, -height] {
                let problem = Problem::new(classes, &vec![x; classes], &[1]);
                let judge = Judge::new(&problem);
                for isa in isas() {
                    // Except in the backward: its lse cannot hold ln C next to such logits.
                    let run = problem.run(Pass::Fused, &How::on(isa));
                    judge.losses(&run);
                    judge.gradient(&run.grad, None);
                }
            }
        }
    }
}

/// One logit is as far above or below the others as f32 allows: its probability is 1 or 0, and no result
/// is NaN.
#[test]
fn logits_as_far_apart_as_they_go() {
    for classes in [2, 10, 97, 300, 2500] {
        for (one, others) in [(3e38, 0.0), (3e38, -3e38), (1e30, -1e30), (1e9, 1.0), (2e6, -2e6)] {
            let mut logits = vec![others; classes];
            logits[1] = one;
            for y in [0, 1] {
                let problem = Problem::new(classes, &logits, &[y]);
                let judge = Judge::new(&problem);
                for isa in isas() {
                    let run = problem.run(Pass::Fused, &How::on(isa));
                    judge.losses(&run);
                    judge.gradient(&run.grad, None);
                }
            }
        }
    }
}

/// The first classes are padding: -inf, with a weight of 0.
#[test]
fn smoothing_beside_a_weightless_low_head() {
    for (low, level) in [(-1e4, 0.3), (-1e9, 0.3), (LOW, 0.3), (LOW, 1e4)] {
        for padding in [1, 256, 300] {
            let classes = 1000;
            let mut rng = Rng::new(9);
            let mut logits: Vec<f32> = rng.normals(classes, 0.001);
            logits.iter_mut().for_each(|x| *x += level);
            logits[..padding].fill(low);
            let mut weights = vec![1.0; classes];
            weights[..padding].fill(0.0);
            for smoothing in [0.1, 1.0] {
                agree(&Problem {
                    class_weights: Some(Reals::F32(weights.clone())),
                    label_smoothing: smoothing,
                    ..Problem::new(classes, &logits, &[999])
                });
            }
        }
    }
}

#[test]
fn smoothing_at_the_ends_of_f32() {
    for x in [1e30f32, 1e38, 3e38] {
        for classes in [3, 300] {
            let logits: Vec<f32> = (0..classes).map(|c| if c % 2 == 0 { x } else { -x }).collect();
            agree(&Problem { label_smoothing: 0.1, ..Problem::new(classes, &logits, &[0]) });
        }
    }
}

/// Weights of both signs whose terms cancel.
#[test]
fn smoothing_with_signed_weights() {
    for classes in [10, 1000, 20_000] {
        let mut rng = Rng::new(classes as u64);
        let logits = rng.normals(3 * classes, 1.0);
        let weights: Vec<f32> = (0..classes).map(|c| if c % 2 == 0 { 1.0 } else { -1.0 }).collect();
        for smoothing in [0.1, 1.0] {
            let problem = Problem {
                class_weights: Some(Reals::F32(weights.clone())),
                label_smoothing: smoothing,
                ..Problem::sum(classes, &logits, &[0, 2, 4])
            };
            agree(&problem);
            let want = Judge::new(&problem).outcome;
            every(&problem, |run| {
                for row in 0..3 {
                    let error = (run.row_losses[row] - want.row_losses[row]).abs();
                    let units = error / want.loss_scale[row] / 2e-7;
                    assert!(
                        units <= 1.0,
                        "C = {classes}, {smoothing}: {units:.2} times 2e-7 of the largest term"
                    );
                }
            });
        }
    }
}

/// Half of the probability is at one class, half is spread over very many. There the base of the
/// exponentials, which is off by 1.3e-8, has its largest effect.
#[test]
fn one_class_against_very_many() {
    let classes = 1_000_000;
    for share in some([0.1f64, 0.5, 0.9], 3) {
        let mut logits = vec![0.3; classes];
        logits[500_000] = 0.3 + (classes as f64 * share / (1.0 - share)).ln() as f32;
        for y in some([0, 500_000], 2) {
            let problem = Problem::new(classes, &logits, &[y]);
            let judge = Judge::new(&problem);
            for isa in isas() {
                let run = problem.run(Pass::Fused, &How::on(isa));
                judge.losses(&run);
                let worst = judge.gradient(&run.grad, None);
                println!("{}, share {share}, target {y}: {worst}", isa.name());
            }
        }
    }
}

// Bugs that other implementations had.

/// pytorch#108345, ORT#32299, flash-attn#714, Paddle#30590: `row*stride` in 32 bits.
#[test]
fn strides_beyond_32_bits() {
    let (rows, classes, stride) = (3usize, 5, (1usize << 31) + 7);
    let len = (rows - 1) * stride + classes;
    let layout = std::alloc::Layout::array::<f32>(len).unwrap();
    // SAFETY: the size of the layout is not 0. The system provides a page when it is touched.
    let memory = unsafe { std::alloc::alloc_zeroed(layout) };
    if memory.is_null() {
        println!("SKIPPED: no address space for {} bytes", layout.size());
        return;
    }
    // SAFETY: the allocation holds `len` zeros, and nothing else refers to it.
    let x = unsafe { std::slice::from_raw_parts_mut(memory.cast::<f32>(), len) };
    let (logits, targets) = ordinary(rows, classes);
    let packed = Problem::sum(classes, &logits, &targets);
    for isa in isas() {
        let good = packed.run(Pass::Fused, &How::on(isa));
        for row in 0..rows {
            x[row * stride..][..classes].copy_from_slice(&logits[row * classes..][..classes]);
        }
        let mut lse = [0.0; 3];
        packed
            .builder()
            .isa(isa)
            .forward_backward_in_place_with(
                xent::Output::from(&mut *x).strides([stride as i64, 1, 0]),
                &targets,
                Results { lse: Some(&mut lse), ..Results::default() },
            )
            .unwrap();
        assert_same(&lse, &good.lse, "lse");
        for row in 0..rows {
            let here = &x[row * stride..][..classes];
            assert_same(here, &good.grad[row * classes..][..classes], "gradient");
        }
    }
    // SAFETY: `alloc_zeroed` returned the pointer for this layout; the slice is not used again.
    unsafe { std::alloc::dealloc(memory, layout) };
}

/// pytorch#194802, ORT#27568, #28004: `weight[-100]` was gathered before the test for ignored rows.
/// xent looks nothing up for an ignored row.
#[test]
fn pytorch_194802_weights_of_ignored_targets() {
    let (logits, _) = ordinary(4, 5);
    for ignore_index in [-100, i64::MIN, i64::MAX, 5, 1 << 33] {
        agree(&Problem {
            class_weights: Some(Reals::F32(vec![0.5, 1.0, 2.0, 0.0, 4.0])),
            ignore_index,
            label_smoothing: 0.1,
            ..Problem::new(5, &logits, &[ignore_index, 2, ignore_index, 4])
        });
    }
}

/// pytorch#32049, #39769, TF#8484, candle: labels out of range gave garbage on some paths.
#[test]
fn pytorch_32049_labels_of_every_dtype_are_checked() {
    let logits = [0f32; 10];
    let call = CrossEntropy::new(2, 5);
    let message = |result: Result<f64, Error>| result.unwrap_err().to_string();
    let bad = |value: i64| format!("targets[1] = {value} is outside [0, 5)");
    assert_eq!(message(call.forward(&logits, &[4u8, 255])), bad(255));
    assert_eq!(message(call.forward(&logits, &[4u16, 5])), bad(5));
    assert_eq!(message(call.forward(&logits, &[4u32, u32::MAX])), bad(4_294_967_295));
    assert_eq!(message(call.forward(&logits, &[4i32, -1])), bad(-1));
    // A row weight of 0 does not excuse a bad target.
    let weightless = call.row_weights(&[1f32, 0.0]);
    assert_eq!(message(weightless.forward(&logits, &[4i64, -1])), bad(-1));
    // -100 as an unsigned number of a narrower type is an ordinary label.
    assert_eq!(message(call.forward(&logits, &[4u8, 156])), bad(156));
}

/// pytorch#15508: ignore_index outside [0, C), and inside, where the class stays in the softmax.
#[test]
fn pytorch_15508_any_ignore_index() {
    let (logits, _) = ordinary(3, 4);
    for ignore_index in [0, 3, 4, 255, -1, -100] {
        let problem = Problem { ignore_index, ..Problem::new(4, &logits, &[1, ignore_index, 2]) };
        agree(&problem);
        every(&problem, |run| assert_eq!(run.kept_rows, 2));
    }
}

/// pytorch#73205, #91383, #69339, #72056: weight × smoothing × ignored rows.
#[test]
fn pytorch_73205_ignored_rows_stay_out_of_smoothing() {
    let (logits, _) = ordinary(4, 6);
    let kept: Vec<f32> = [&logits[..6], &logits[18..]].concat();
    for reduction in [Reduction::Mean, Reduction::Sum] {
        let weighted = Problem {
            class_weights: Some(Reals::F32(vec![0.2, 1.5, 0.0, 3.0, 1.0, -0.5])),
            label_smoothing: 0.3,
            reduction,
            ..Problem::new(6, &logits, &[1, IGNORED, IGNORED, 3])
        };
        agree(&weighted);
        let without = Problem {
            rows: 2,
            logits: kept.clone(),
            targets: Indices::I64(vec![1, 3]),
            ..weighted.clone()
        };
        for isa in isas() {
            let a = weighted.run(Pass::Fused, &How::on(isa));
            let b = without.run(Pass::Fused, &How::on(isa));
            assert_same(&[a.loss], &[b.loss], "loss");
            assert_same(&a.grad[..6], &b.grad[..6], "gradient");
            assert_eq!(a.grad[6..18], [0.0; 12]);
        }
    }
}

/// TE#2476, torch-mlir#3585, burn#5568, ggml: the mean is over the kept rows.
#[test]
fn te_2476_the_mean_is_over_kept_rows() {
    let logits = [0.0; 8];
    let problem = Problem::new(2, &logits, &[0, IGNORED, IGNORED, 1]);
    every(&problem, |run| {
        assert!((run.loss - 2f64.ln()).abs() < 1e-7);
        assert_eq!((run.normalizer, run.kept_rows), (2.0, 2));
        assert_eq!(run.grad[..4], [-0.25, 0.25, 0.0, 0.0]);
    });
    let weighted = Problem {
        class_weights: Some(Reals::F64(vec![3.0, 1.0])),
        row_weights: Some(Reals::F64(vec![2.0, 9.0, 9.0, 4.0])),
        ..problem
    };
    agree(&weighted);
    every(&weighted, |run| assert_eq!(run.normalizer, 10.0));
}

/// The sums of weights that a mean divides by are compensated, over any number of rows and blocks
/// of rows: plain sums are off by 10 ulp after 800 rows.
#[test]
fn the_mean_over_many_weighted_rows_is_within_an_ulp() {
    for rows in [800, 20_000] {
        let classes = 5;
        let mut rng = Rng::new(rows as u64);
        let mut reals = |len: usize, low: f64, high: f64| -> Vec<f64> {
            (0..len).map(|_| rng.uniform(low, high)).collect()
        };
        let logits = reals(rows * classes, -4.0, 4.0);
        let (class_weights, row_weights) = (reals(classes, 0.1, 2.0), reals(rows, 0.1, 2.0));
        let targets: Vec<i64> = (0..rows as i64).map(|row| row * row % classes as i64).collect();
        let want = reference::evaluate(&reference::Case {
            targets: reference::Targets::Indices(targets.clone()),
            class_weights: Some(class_weights.clone()),
            row_weights: Some(row_weights.clone()),
            z_loss: 0.5,
            ..reference::Case::new(rows, classes, 1, logits.clone())
        });
        for isa in isas() {
            let (mut loss, mut z_loss, mut normalizer, mut z_normalizer) = (0.0, 0.0, 0.0, 0.0);
            let results = Results {
                loss: Some(&mut loss),
                z_loss: Some(&mut z_loss),
                normalizer: Some(&mut normalizer),
                z_normalizer: Some(&mut z_normalizer),
                ..Results::default()
            };
            CrossEntropy::new(rows, classes)
                .class_weights(&class_weights)
                .row_weights(&row_weights)
                .z_loss(0.5)
                .isa(isa)
                .forward_with(&logits, &targets, results)
                .unwrap();
            for (name, got, want) in [
                ("normalizer", normalizer, want.normalizer),
                ("z_normalizer", z_normalizer, want.z_normalizer),
                ("loss", loss, want.loss),
                ("z_loss", z_loss, want.z_loss),
            ] {
                let ulps = got.to_bits().abs_diff(want.to_bits());
                assert!(ulps <= 1, "{name} of {rows} rows on {}: {ulps} ulp", isa.name());
            }
        }
    }
}

/// pytorch#70348, aiter#5165, NeMo Automodel#3796: all rows ignored, NaN in the gradients.
#[test]
fn pytorch_70348_all_ignored_has_no_gradient() {
    let problem = Problem {
        accumulate: Some(vec![0.25; 6]),
        ..Problem::new(3, &[NAN, 1.0, 2.0, 3.0, 4.0, 5.0], &[IGNORED; 2])
    };
    agree(&problem);
    every(&problem, |run| assert_eq!(run.grad, [0.25; 6]));
}

/// pytorch#11551: NaN or -inf in an ignored row reached the gradient.
#[test]
fn pytorch_11551_ignored_rows_reach_nothing() {
    for classes in [3, 300, 2500] {
        for bad in [NAN, LOW, f32::INFINITY] {
            let (mut logits, mut targets) = ordinary(3, classes);
            logits[classes..2 * classes].fill(bad);
            targets[1] = IGNORED;
            for smoothing in [0.0, 0.1] {
                let problem = Problem {
                    label_smoothing: smoothing,
                    ..Problem::new(classes, &logits, &targets)
                };
                agree(&problem);
                every(&problem, |run| {
                    assert!(run.loss.is_finite() && run.row_losses[1] == 0.0);
                    assert!(run.grad[classes..2 * classes].iter().all(|&g| g == 0.0));
                    // The lse of an ignored row is still reported.
                    assert_same(&run.lse[1..2], &[f64::from(bad)], "lse");
                });
            }
        }
    }
}

/// optax#896, #1762, TRL#7263: 0·(−inf) is 0.
#[test]
fn optax_896_nothing_times_infinity() {
    for classes in [4, 70, 2100] {
        let (mut logits, _) = ordinary(1, classes);
        logits[1] = LOW;
        logits[classes - 1] = LOW;
        let mut weights = vec![1.5; classes];
        weights[1] = 0.0;
        weights[classes - 1] = -0.0;
        for smoothing in [0.0, 0.1, 1.0] {
            let problem = Problem {
                class_weights: Some(Reals::F32(weights.clone())),
                label_smoothing: smoothing,
                ..Problem::sum(classes, &logits, &[0])
            };
            agree(&problem);
            every(&problem, |run| assert!(run.loss.is_finite()));
            // Also at the target.
            let at_target = Problem { targets: Indices::I64(vec![1]), ..problem };
            agree(&at_target);
            every(&at_target, |run| assert!(run.loss.is_finite()));
        }
        // 1 − ε = 0: the target has no mass of its own.
        logits[1] = 0.0;
        logits[classes - 1] = 0.0;
        agree(&Problem { label_smoothing: 1.0, ..Problem::sum(classes, &logits, &[0]) });
        // r = 0.
        logits.fill(LOW);
        let problem = Problem {
            row_weights: Some(Reals::F32(vec![0.0])),
            ..Problem::sum(classes, &logits, &[0])
        };
        agree(&problem);
        every(&problem, |run| assert_eq!(run.loss, 0.0));
    }
}

/// flash-attn#1930, tf-onnx#1248, Liger: a leading block of -inf, and `−inf − −inf`.
#[test]
fn flash_attn_1930_leading_blocks() {
    for classes in [65, 257, 2049, 4097, 70_000] {
        for length in [1, 63, 64, 255, 256, 512, 2048, 4096, 65_536] {
            if length >= classes {
                continue;
            }
            for low in [LOW, -1e9] {
                let (mut logits, _) = ordinary(1, classes);
                logits[..length].fill(low);
                agree(&Problem::new(classes, &logits, &[classes as i64 - 1]));
                if classes < 5000 {
                    logits.iter_mut().for_each(|x| *x -= 100.0);
                    agree(&Problem::new(classes, &logits, &[classes as i64 - 1]));
                    // The target is one of them.
                    agree(&Problem::new(classes, &logits, &[0]));
                }
            }
        }
    }
}

/// pytorch#11752, #38839, mlx#4169: a large common offset dropped the log of the sum.
#[test]
fn pytorch_11752_large_offsets() {
    for offset in [1e4f32, -1e4, 1e6, -1e6] {
        let mut rng = Rng::new(3);
        // Multiples of 1/16 are exact after 1e6 is added.
        let logits: Vec<f32> = (0..1000).map(|_| rng.below(200) as f32 / 16.0).collect();
        let shifted: Vec<f32> = logits.iter().map(|x| x + offset).collect();
        let (a, b) = (Problem::new(1000, &logits, &[5]), Problem::new(1000, &shifted, &[5]));
        agree(&b);
        for isa in isas() {
            let (a, b) = (a.run(Pass::Fused, &How::on(isa)), b.run(Pass::Fused, &How::on(isa)));
            assert!((a.loss - b.loss).abs() < 3e-7 * a.loss);
        }
    }
}

/// pytorch#55657, executorch#20089, tract#2586, #85791: long sums stick.
#[test]
fn pytorch_55657_long_sums() {
    let classes = 1 << 20;
    let problem = Problem::new(classes, &vec![0.1; classes], &[0]);
    every(&problem, |run| {
        let exact = (classes as f64).ln();
        assert!((run.loss - exact).abs() < 1e-7 * exact, "{}", run.loss);
    });
    // Many rows: an f32 sum stops growing at 2^24 losses of this size.
    let rows = 300_000;
    let problem = Problem::sum(2, &vec![0.0; 2 * rows], &vec![1; rows]);
    every(&problem, |run| {
        let exact = rows as f64 * 2f64.ln();
        assert!((run.loss - exact).abs() < 1e-7 * exact);
    });
}

/// Liger#678, #1298, #421: with reduction none every row has its own upstream gradient.
#[test]
fn liger_678_a_gradient_per_row() {
    let (logits, targets) = ordinary(5, 9);
    let upstream = vec![1.0, -2.0, 0.0, 0.5, 3.0];
    let problem = Problem {
        reduction: Reduction::None,
        grad_output: Some(Reals::F64(upstream.clone())),
        ..Problem::new(9, &logits, &targets)
    };
    agree(&problem);
    let sum = Problem::sum(9, &logits, &targets);
    for isa in isas() {
        let rows = problem.run(Pass::Fused, &How::on(isa)).grad;
        let plain = sum.run(Pass::Fused, &How::on(isa)).grad;
        for (i, (g, p)) in rows.iter().zip(&plain).enumerate() {
            let want = p * upstream[i / 9] as f32;
            assert!((g - want).abs() <= want.abs() * 2e-7);
        }
    }
}

/// TE#2139, ROCm TE#623: gradient scales other than 1.
#[test]
fn te_2139_gradient_scales() {
    let (logits, targets) = ordinary(5, 300);
    for scale in [0.0, -1.0, 0.1, 1e-30, 1e-38, 1e-45, 1e30, 1e37, 3e38, 65536.0] {
        for smoothing in [0.0, 0.1] {
            agree(&Problem {
                grad_scale: scale,
                label_smoothing: smoothing,
                ..Problem::new(300, &logits, &targets)
            });
            agree(&Problem {
                grad_output: Some(Reals::F64(vec![scale])),
                grad_scale: 0.5,
                label_smoothing: smoothing,
                ..Problem::new(300, &logits, &targets)
            });
        }
    }
}

/// Factors below the range of f32, with exponentials as far above their shift.
#[test]
fn factors_below_the_range() {
    let (mut logits, targets) = ordinary(2, 300);
    for above in [25.0, 40.0] {
        (logits[280], logits[580]) = (above, above + 0.5);
        for grad_scale in [1e-30, -1e-36] {
            for label_smoothing in [0.0, 0.1] {
                agree(&Problem {
                    grad_scale,
                    label_smoothing,
                    ..Problem::sum(300, &logits, &targets)
                });
            }
        }
    }
}

/// Factors above the range of f32, with probabilities that bring the gradient back into range.
#[test]
fn factors_above_the_range() {
    for classes in [3, 40, 200] {
        let mut logits = vec![-40.0; 9 * classes];
        for row in logits.chunks_mut(classes) {
            (row[0], row[1]) = (0.0, -30.0);
        }
        for grad_scale in [1e40, -1e42] {
            let problem = Problem { grad_scale, ..Problem::sum(classes, &logits, &[0; 9]) };
            agree(&problem);
            every(&problem, |run| {
                assert!(run.grad.iter().all(|g| g.is_finite() && *g != 0.0));
            });
        }
    }
}

/// A factor within f32, with an exponential whose product with it is near the end of the range.
#[test]
fn factors_at_the_top_of_the_range() {
    let (mut logits, targets) = (vec![0.0; 600], [3, 5]);
    (logits[280], logits[580]) = (12.0, 12.0);
    for grad_scale in [2.8e38, -2.8e38] {
        let problem = Problem { grad_scale, ..Problem::sum(300, &logits, &targets) };
        agree(&problem);
        every(&problem, |run| assert!(run.grad[280].is_finite() && run.grad[280].abs() > 2.7e38));
    }
}

/// A gradient past the range of f32, next to one that an exponential brings back into range.
#[test]
fn factors_far_above_the_range() {
    for classes in [3, 40, 200] {
        let mut logits = vec![-83.0; 9 * classes];
        logits.chunks_mut(classes).for_each(|row| row[0] = 0.0);
        for grad_scale in [1e70, -1e70] {
            let problem = Problem { grad_scale, ..Problem::sum(classes, &logits, &[2; 9]) };
            every(&problem, |run| {
                for row in run.grad.chunks(classes) {
                    let (top, low) = (f64::from(row[0]), f64::from(row[1]));
                    let want = grad_scale * (-83f64).exp();
                    assert_eq!(top, grad_scale.signum() * INF);
                    assert!((low - want).abs() < 1e-5 * want.abs(), "{low}, not {want}");
                }
            });
        }
    }
}

/// Factors below the range, with an lse far below the logits, as an lse of other classes may be.
#[test]
fn factors_below_the_range_from_an_lse() {
    for classes in [3, 40, 200] {
        let mut logits = vec![0f32; 9 * classes];
        logits.chunks_mut(classes).for_each(|row| row[1] = 1.0);
        for grad_scale in [1e-42, -1e-42] {
            for isa in isas() {
                let call = CrossEntropy::new(9, classes).isa(isa).reduction(Reduction::Sum);
                let mut grad = vec![7f32; 9 * classes];
                let call = call.grad_scale(grad_scale);
                call.backward(&logits, &[0; 9], &[-40.0; 9], &mut grad).unwrap();
                for (i, (&got, &x)) in grad.iter().zip(&logits).enumerate() {
                    let (got, want) = (f64::from(got), grad_scale * (f64::from(x) + 40.0).exp());
                    let good = (got - want).abs() <= 1e-5 * want.abs();
                    assert!(good, "{i} of {classes} classes on {isa:?}: {got}, not {want}");
                }
            }
        }
    }
}

/// An lse so far below the logits that probabilities are past the range of f32.
#[test]
fn an_lse_below_the_range() {
    for classes in [3, 40, 200] {
        for below in [-89.5, -100.0, -300.0] {
            for isa in isas() {
                let call = CrossEntropy::new(9, classes).isa(isa).reduction(Reduction::Sum);
                let mut grad = vec![7f32; 9 * classes];
                let logits = vec![0f32; 9 * classes];
                call.backward(&logits, &[0; 9], &[below; 9], &mut grad).unwrap();
                assert!(grad.iter().all(|&g| g == f32::INFINITY), "{below} on {isa:?}: {grad:?}");
            }
        }
    }
}

/// Rows that fill all registers of a tile, with all logits far below 0.
#[test]
fn whole_tiles_far_below_zero() {
    for classes in [5, 40] {
        let logits: Vec<f32> =
            (0..64 * classes).map(|i| -3e6 - 0.5 * (i * 7 % 13) as f32).collect();
        let targets: Vec<i64> = (0..64).map(|row| row % 5).collect();
        agree(&Problem::sum(classes, &logits, &targets));
        // Classes first: tiles are read in place.
        let across: Vec<f32> =
            (0..classes * 64).map(|i| logits[i % 64 * classes + i / 64]).collect();
        for isa in isas() {
            let call = |rows| CrossEntropy::new(rows, classes).isa(isa).reduction(Reduction::Sum);
            let (mut grad, mut grad_across) = (vec![7f32; 64 * classes], vec![7f32; 64 * classes]);
            let loss = call(64).forward_backward(&logits, &targets, &mut grad).unwrap();
            let positions = call(1).inner(64);
            let other = positions.forward_backward(&across, &targets, &mut grad_across).unwrap();
            assert_eq!(loss, other, "{isa:?}");
            assert!((0..64 * classes).all(|i| grad_across[i] == grad[i % 64 * classes + i / 64]));
        }
    }
}

/// Accumulation leaves the gradient of an ignored row alone: even -0 stays -0.
#[test]
fn accumulated_gradients_of_ignored_rows() {
    fn look<T: common::Element>(isa: xent::Isa, zero: T, some: T) {
        for [rows, inner] in [[1, 83], [83, 1]] {
            let logits = vec![some; 3 * 83];
            let targets: Vec<i64> = (0..83).map(|i| if i % 3 == 0 { 1 } else { IGNORED }).collect();
            let mut grad = vec![zero; 3 * 83];
            let call = CrossEntropy::new(rows, 3).inner(inner).isa(isa).accumulate(true);
            call.forward_backward(&logits, &targets, &mut grad).unwrap();
            for (i, g) in grad.iter().enumerate() {
                let position = if rows == 1 { i % 83 } else { i / 3 };
                let as_it_was = g.bits() == zero.bits();
                assert_eq!(as_it_was, position % 3 != 0, "{i} is {g:?} on {isa:?}");
            }
        }
    }
    for isa in isas() {
        look::<f32>(isa, -0.0, 1.0);
        look::<f64>(isa, -0.0, 1.0);
        look(isa, bf16::NEG_ZERO, bf16::ONE);
        look(isa, f16::NEG_ZERO, f16::ONE);
    }
}

/// Losses that cancel leave the other losses of the sum.
#[test]
fn sums_of_losses_that_cancel() {
    for classes in [3, 200] {
        let logits = vec![0f64; 3 * classes];
        let loss = (classes as f64).ln();
        for weights in [[1.0, -1e20, 1e20], [-1e20, 1.0, 1e20], [1e20, 1.0, -1e20]] {
            for isa in isas() {
                let call = CrossEntropy::new(3, classes).isa(isa).reduction(Reduction::Sum);
                let got = call.row_weights(&weights).forward(&logits, &[0, 1, 2]).unwrap();
                assert!((got - loss).abs() < 1e-14 * loss, "{weights:?} on {isa:?}: {got}");
            }
        }
    }
}

/// The gradient of a log-probability without target mass is 0 under any scale.
#[test]
fn log_probabilities_under_an_infinite_scale() {
    for classes in [3, 200] {
        let logits = vec![-2f32; classes];
        for isa in isas() {
            let mut grad = vec![7f32; classes];
            let call = CrossEntropy::new(1, classes).isa(isa).log_probs(true);
            call.grad_output(&[f64::INFINITY]).forward_backward(&logits, &[1], &mut grad).unwrap();
            let want = |c: usize| if c == 1 { f32::NEG_INFINITY } else { 0.0 };
            assert!(grad.iter().enumerate().all(|(c, &g)| g == want(c)), "{isa:?}: {grad:?}");
        }
    }
}

/// Eight ignored rows before some that are kept; the call asks for the argmax of all of them.
#[test]
fn rows_that_count_after_some_that_do_not() {
    for classes in [5, 40, 200] {
        let (logits, _) = ordinary(16, classes);
        let mut targets = [2i64; 16];
        targets[..8].fill(IGNORED);
        for isa in isas() {
            let call = |rows| CrossEntropy::new(rows, classes).isa(isa);
            let mut argmax = [7i64; 16];
            let mut loss = 7.0;
            let results =
                Results { loss: Some(&mut loss), argmax: Some(&mut argmax), ..Results::default() };
            call(16).forward_with(&logits, &targets, results).unwrap();
            let alone = call(8).forward(&logits[8 * classes..], &targets[8..]).unwrap();
            assert_eq!(loss, alone, "{classes} classes on {}", isa.name());
            for (row, &found) in logits.chunks(classes).zip(&argmax) {
                assert!(row.iter().all(|&x| x <= row[found as usize]));
            }
        }
    }
}

/// Without smoothing, the weight of a class that is no target has no effect, in rows too long for a tile.
#[test]
fn infinite_weights_of_other_classes() {
    for isa in isas() {
        for (classes, softcap) in [(3, 0.0), (3, 8.0), (300, 0.0), (300, 8.0)] {
            let logits: Vec<f32> = (0..2 * classes).map(|i| (i % 7) as f32 / 2.0).collect();
            let mut weights = vec![1.5f32; classes];
            let fused = |weights: &[f32]| {
                let call = CrossEntropy::new(2, classes).isa(isa).softcap(softcap);
                let mut grad = vec![7.0f32; 2 * classes];
                let call = call.class_weights(weights);
                let loss = call.forward_backward(&logits, &[0, 2], &mut grad).unwrap();
                (loss, grad)
            };
            let good = fused(&weights);
            weights[1] = f32::INFINITY;
            assert_eq!(fused(&weights), good, "{isa:?}, {classes} classes under {softcap}");
        }
    }
}

/// Liger#1251, unsloth#5002, Megatron#1594, ms-swift#10130, ggml#1521: a call overwrote logits that the
/// caller still needed. `Problem::run` checks every input byte after every call; this test does it by
/// hand.
#[test]
fn liger_1251_logits_survive() {
    let (logits, targets) = ordinary(7, 2500);
    for isa in isas() {
        let (x, mut grad) = (logits.clone(), vec![0f32; logits.len()]);
        let call = CrossEntropy::new(7, 2500).isa(isa);
        call.forward(&x, &targets).unwrap();
        call.forward_backward(&x, &targets, &mut grad).unwrap();
        call.backward(&x, &targets, &[1.0; 7], &mut grad).unwrap();
        assert_eq!(x, logits);
    }
}

/// TE#2734, unsloth#10713, pytorch#139740: strided input was read as packed.
#[test]
fn te_2734_strides_everywhere() {
    let (logits, targets) = ordinary(6, 65);
    let packed = Problem {
        row_weights: Some(Reals::F32(vec![1.0, 2.0, 0.5, 0.0, 3.0, 1.0])),
        row_mask: Some(vec![1, 1, 0, 1, 1, 1]),
        class_weights: Some(Reals::F32((0..65).map(|c| c as f32 / 32.0).collect())),
        label_smoothing: 0.1,
        ..Problem::new(65, &logits, &targets)
    };
    // Each element is followed by one that is not part of the operand.
    fn spread<T: Copy>(from: &[T], between: T) -> Vec<T> {
        from.iter().flat_map(|&x| [x, between]).collect()
    }
    let Some(Reals::F32(class_weights)) = &packed.class_weights else { unreachable!() };
    let class_weights = spread(class_weights, NAN);
    let row_weights = spread(&[1.0f32, 2.0, 0.5, 0.0, 3.0, 1.0], NAN);
    let row_mask = spread(&[1u8, 1, 0, 1, 1, 1], 0);
    let spread_targets = spread(&targets, 1000);
    for isa in isas() {
        let good = packed.run(Pass::Fused, &How::on(isa));
        let mut grad = vec![7f32; 6 * 80];
        let mut padded = vec![NAN; 6 * 70];
        for row in 0..6 {
            padded[row * 70..][..65].copy_from_slice(&logits[row * 65..][..65]);
        }
        let loss = CrossEntropy::new(6, 65)
            .isa(isa)
            .label_smoothing(0.1)
            .class_weights(xent::Input::from(&class_weights).strides([0, 2, 0]))
            .row_weights(xent::Input::from(&row_weights).strides([2, 0, 0]))
            .row_mask(xent::Input::from(&row_mask).strides([2, 0, 0]))
            .forward_backward(
                xent::Input::from(&padded).strides([70, 1, 1]),
                xent::Input::from(&spread_targets).strides([2, 0, 0]),
                xent::Output::from(&mut grad).strides([80, 1, 1]),
            )
            .unwrap();
        assert_same(&[loss], &[good.loss], "loss");
        for row in 0..6 {
            let here = &grad[row * 80..][..80];
            assert_same(&here[..65], &good.grad[row * 65..][..65], "gradient");
            assert_eq!(here[65..], [7.0; 15]);
        }
    }
}

/// transformers#34191, Automodel#3803, #3836: the mean of means under gradient accumulation.
#[test]
fn transformers_34191_accumulated_micro_batches() {
    let classes = 50;
    let (logits, _) = ordinary(6, classes);
    let targets = [3, IGNORED, 7, 9, IGNORED, IGNORED];
    let whole = Problem::new(classes, &logits, &targets);
    for isa in isas() {
        let how = How::on(isa);
        let good = whole.run(Pass::Fused, &how);
        let (mut loss, mut grad) = (0.0, Vec::new());
        // 2 + 4 rows with 1 + 2 kept.
        for rows in [0..2, 2..6] {
            let part = Problem {
                normalizer: good.normalizer,
                ..Problem::new(
                    classes,
                    &logits[rows.start * classes..rows.end * classes],
                    &targets[rows],
                )
            };
            let run = part.run(Pass::Fused, &how);
            loss += run.loss;
            grad.extend(run.grad);
        }
        assert!((loss - good.loss).abs() < 1e-14);
        assert_same(&grad, &good.grad, "gradient");
    }
}

/// pytorch#156379, TF#116933, lattice#740: a spike in every position, on every set.
#[test]
fn pytorch_156379_every_lane_counts() {
    for classes in [130, 2100] {
        let step = if classes > 1000 { 37 } else { 1 };
        for at in (0..classes).step_by(step) {
            for spike in [5.0, 30.0, 50.0] {
                let mut logits = vec![0.0; classes];
                logits[at] = spike;
                let y = (at + 1) % classes;
                let problem = Problem::new(classes, &logits, &[y as i64]);
                let rest = (classes as f64 - 1.0) * (-f64::from(spike)).exp();
                every(&problem, |run| {
                    let lse = f64::from(spike) + rest.ln_1p();
                    assert!((run.lse[0] - lse).abs() < 2e-7 * lse, "{at} of {classes}");
                    let p = 1.0 / (1.0 + rest);
                    assert!((f64::from(run.grad[at]) - p).abs() < 3e-7, "{at}");
                });
            }
        }
    }
}

/// llm.c: `maxval = -10000`, and a loss of −ln p that underflowed to inf.
#[test]
fn llm_c_low_rows_and_unlikely_targets() {
    let low: Vec<f32> = (0..100).map(|c| -20_000.0 - c as f32).collect();
    agree(&Problem::new(100, &low, &[3]));
    let unlikely: Vec<f32> = (0..100).map(|c| -30.0 * c as f32).collect();
    let problem = Problem::new(100, &unlikely, &[99]);
    agree(&problem);
    every(&problem, |run| assert!((run.loss - 2970.0).abs() < 1e-3));
}

/// keras#15015: class ids that a half cannot hold, in the narrowest dtype that holds them.
#[test]
fn keras_15015_large_class_ids() {
    let classes = 65_536;
    let mut rng = Rng::new(1);
    let mut logits = vec![0.0; 3 * classes];
    let targets = [2049, 40_001, 65_535];
    for (row, &y) in logits.chunks_mut(classes).zip(&targets) {
        fill(row, Kind::Unit, y as usize, &mut rng);
    }
    agree(&Problem {
        targets: Indices::narrow(&targets, 1),
        ..Problem::new(classes, &logits, &targets)
    });
}

/// The excluded class, that of the largest logit, may have no mass. Then it has no part in a sum beyond
/// f64, as any other class without mass.
#[test]
fn largest_class_without_mass_under_a_scale_past_f64() {
    for isa in isas() {
        // The excluded class dominates the others, or does not.
        for first in [0.5f32, 5.0] {
            for grad_scale in [1e200, -1e200] {
                let mut grad = [7f32; 3];
                CrossEntropy::new(1, 3)
                    .reduction(xent::Reduction::Sum)
                    .grad_scale(grad_scale)
                    .grad_output(&[1e200f64])
                    .isa(isa)
                    .forward_backward(&[first, 0.5, 0.5], &[0f32, 1.0, 0.0], &mut grad)
                    .unwrap();
                let want = f32::INFINITY.copysign(grad_scale as f32);
                assert_eq!((grad[0], grad[2]), (want, want), "{isa:?}: {grad:?}");
            }
        }
    }
}

/// A target far above a class that is far above the others. The probabilities of the others underflow;
/// the first of them have a shift of their own.
#[test]
fn nothing_left_of_classes_below_a_far_one() {
    let classes = 6000;
    let mut logits = vec![88.72284f32; classes];
    (logits[5000], logits[5500]) = (2e6, 1e8);
    let problem = Problem::sum(classes, &logits, &[5500]);
    agree(&problem);
    every(&problem, |run| assert!(run.grad.iter().all(|&g| g == 0.0)));
}

/// Sums over many equal terms of f64, each of which rounds alike, are as exact as those of a few.
#[test]
fn inner_sums_of_f64() {
    const CLASSES: usize = 30_001;
    let (others, target) = (0.3, 0.9);
    let mut logits = vec![others; CLASSES * 8];
    for position in 0..8 {
        logits[(position + 1) * 8 + position] = target;
    }
    let targets: Vec<i64> = (1..9).collect();
    let want = ((CLASSES - 1) as f64 * f64::exp(others - target)).ln_1p();
    for isa in isas() {
        let call = CrossEntropy::new(1, CLASSES).inner(8).isa(isa);
        let mut losses = [0.0f64; 8];
        let results = Results { row_losses: Some((&mut losses).into()), ..Results::default() };
        call.forward_with(&logits, &targets, results).unwrap();
        for loss in losses {
            assert!((loss / want - 1.0).abs() < 4e-16, "{loss:e} for {want:e} on {}", isa.name());
        }
    }
}

/// What probability targets spread over many classes of f64 adds up terms that round alike, too.
#[test]
fn spread_masses_of_f64() {
    const CLASSES: usize = 30_001;
    const MASS: f64 = 0.3;
    let each = (CLASSES / 2) as f64;
    let mut targets = vec![MASS; CLASSES];
    targets[0] = 0.0;
    for step in 0..20 {
        let below = [30.1, 60.0 + 7.3 * f64::from(step)];
        let mut logits: Vec<f64> = (0..CLASSES).map(|class| -below[class % 2]).collect();
        logits[0] = 0.0;
        let lse = (each * f64::exp(-below[0])).ln_1p();
        let want = MASS * (each * (below[0] + below[1]) + (2.0 * each) * lse);
        for isa in isas() {
            let call = CrossEntropy::new(1, CLASSES).isa(isa);
            let mut losses = [0.0f64];
            let results = Results { row_losses: Some((&mut losses).into()), ..Results::default() };
            call.forward_with(&logits, &targets, results).unwrap();
            let [loss] = losses;
            assert!((loss / want - 1.0).abs() < 4e-16, "{loss:e} for {want:e} on {}", isa.name());
        }
    }
}

/// A log-softmax of f64 logits is as exact beside an offset that all of them share: L, the rounded log2 e, would
/// be off by 1.4e-17 of it.
#[test]
fn log_softmax_of_f64_beside_an_offset() {
    const OFFSET: f64 = 131_072.0;
    for (classes, inner) in [(5, 1), (300, 1), (5000, 1), (7, 20), (1100, 3)] {
        let logits: Vec<f64> = (0..classes * inner).map(|i| (i * 37 % 97) as f64 / 8.0).collect();
        let far: Vec<f64> = logits.iter().map(|x| x + OFFSET).collect();
        for isa in isas() {
            let call = Softmax::new(1, classes).inner(inner).isa(isa);
            let [mut near, mut beside] = [(); 2].map(|()| vec![0f64; logits.len()]);
            call.log_softmax(&logits, &mut near).unwrap();
            call.log_softmax(&far, &mut beside).unwrap();
            for (a, b) in near.into_iter().zip(beside) {
                let what = isa.name();
                assert!(
                    (a - b).abs() <= 4e-15 * a.abs(),
                    "{classes}x{inner} on {what}: {a:e}, {b:e}"
                );
            }
        }
    }
}
