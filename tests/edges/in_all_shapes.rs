//! The edge cases with every kind of target and every option, in f32, f64, bf16 and f16, for contiguous
//! classes (few and many), for inner positions, and for classes that are not contiguous.

use crate::everywhere::{Got, Layout, everywhere, in_dtype, same};
use common::random::Rng;
use common::reference::{Case, Reduction, Targets};
use common::{INF, isas};
use xent::half::{bf16, f16};
use xent::{CrossEntropy, Input, Output, Results, Softmax};

const NAN: f64 = f64::NAN;
const LOW: f64 = f64::NEG_INFINITY;
const IGNORED: i64 = -100;

/// Numbers of classes: few, for lanes along rows, and many, for lanes along classes.
const WIDTHS: [usize; 2] = [5, 70];

/// Ordinary logits that every dtype holds, and class indices.
fn indices(rows: usize, classes: usize) -> Case {
    let mut rng = Rng::new((rows * 1000 + classes) as u64);
    let logits = (0..rows * classes).map(|_| rng.below(64) as f64 / 8.0 - 4.0).collect();
    let targets = (0..rows).map(|_| rng.below(classes) as i64).collect();
    Case { targets: Targets::Indices(targets), ..Case::new(rows, classes, 1, logits) }
}

/// The same with probabilities, which do not add up to 1 and of which some are 0.
fn soft(rows: usize, classes: usize) -> Case {
    let mut rng = Rng::new((rows * 77 + classes) as u64);
    let t = (0..rows * classes).map(|_| rng.below(5) as f64 / 4.0 / classes as f64).collect();
    Case { targets: Targets::Probabilities(t), ..indices(rows, classes) }
}

fn both(rows: usize, classes: usize) -> [Case; 2] {
    [indices(rows, classes), soft(rows, classes)]
}

/// Adds all options that change a row's loss and gradient.
fn rich(case: Case) -> Case {
    let classes = case.classes;
    Case {
        class_weights: Some((0..classes).map(|c| c as f64 % 4.0 * 0.5 + 0.25).collect()),
        row_weights: Some((0..case.rows).map(|row| 0.5 + row as f64).collect()),
        label_smoothing: 0.125,
        z_loss: 0.01,
        softcap: 8.0,
        logit_scale: 1.5,
        grad_output: vec![-0.75],
        ..case
    }
}

fn log_probs(case: Case) -> Case {
    Case { log_probs: true, z_loss: 0.0, softcap: 0.0, logit_scale: 1.0, ..case }
}

fn is_zero(grad: &[f64]) -> bool {
    grad.iter().all(|g| *g == 0.0)
}

/// All gradients of the logits.
fn gradients(got: &Got) -> [&Vec<f64>; 2] {
    [&got.grad, &got.backward]
}

// The table of edges.

#[test]
fn ordinary_problems() {
    for classes in [1, 2, 5, 31, 32, 33, 64, 70, 300] {
        for case in both(5, classes) {
            everywhere(&case, |_| ());
            everywhere(&log_probs(rich(case.clone())), |_| ());
            for reduction in [Reduction::Mean, Reduction::Sum] {
                everywhere(&Case { reduction, ..rich(case.clone()) }, |_| ());
            }
            everywhere(
                &Case {
                    reduction: Reduction::None,
                    grad_output: vec![1.0, -2.0, 0.0, 0.5, 3.0],
                    ..rich(case)
                },
                |_| (),
            );
        }
    }
}

/// Under a mean over no rows xent judges the two parts of the loss separately.
#[test]
fn no_row_counts() {
    for classes in WIDTHS {
        for case in [both(3, classes), both(0, classes)].concat() {
            let nothing = Case { row_mask: Some(vec![false; case.rows]), ..case };
            for (z, given, z_given, empty_is_zero, loss, z_loss) in [
                (0.0, 0.0, 0.0, false, NAN, 0.0),
                (0.0, 4.0, 0.0, false, 0.0, 0.0),
                (0.5, 0.0, 0.0, false, NAN, NAN),
                (0.5, 4.0, 0.0, false, NAN, NAN),
                (0.5, 0.0, 4.0, false, NAN, 0.0),
                (0.5, 4.0, 4.0, false, 0.0, 0.0),
                (0.5, 0.0, 0.0, true, 0.0, 0.0),
                (0.0, 0.0, 0.0, true, 0.0, 0.0),
            ] {
                let case = Case {
                    z_loss: z,
                    normalizer: given,
                    z_normalizer: z_given,
                    empty_is_zero,
                    ..nothing.clone()
                };
                everywhere(&case, |got| {
                    same(&[got.loss, got.z_loss], &[loss, z_loss], || got.at.clone());
                    assert!(gradients(got).iter().all(|g| is_zero(g)), "{}", got.at);
                    assert!(is_zero(&got.grad_targets) && is_zero(&got.row_losses));
                });
                everywhere(&Case { reduction: Reduction::Sum, ..case }, |got| {
                    assert_eq!((got.loss, got.z_loss), (0.0, 0.0), "{}", got.at);
                });
            }
            everywhere(&log_probs(nothing), |got| {
                assert!(got.loss.is_nan() && is_zero(&got.grad) && is_zero(&got.grad_targets));
            });
        }
    }
    // Rows of weight 0 are kept: the mean is 0/0, also with EMPTY_IS_ZERO.
    let weightless = Case { row_weights: Some(vec![0.0; 3]), empty_is_zero: true, ..indices(3, 5) };
    everywhere(&weightless, |got| {
        assert_eq!(got.kept_rows, 3);
        assert!(got.loss.is_nan() && is_zero(&got.grad), "{}", got.at);
    });
}

/// With log-probabilities only the target's entry is divided by 0.
#[test]
fn a_denominator_of_zero() {
    for classes in WIDTHS {
        let mut weights = vec![1.0; classes];
        weights[1] = 0.0;
        let case = Case {
            targets: Targets::Indices(vec![1, 1]),
            class_weights: Some(weights),
            ..indices(2, classes)
        };
        for empty_is_zero in [false, true] {
            everywhere(&Case { empty_is_zero, ..case.clone() }, |got| {
                assert!(got.loss.is_nan() && got.normalizer == 0.0, "{}", got.at);
                for grad in gradients(got) {
                    assert!(grad.iter().all(|g| g.is_nan()), "{}", got.at);
                }
            });
            everywhere(&log_probs(Case { empty_is_zero, ..case.clone() }), |got| {
                assert!(got.loss.is_nan(), "{}", got.at);
                for (i, g) in gradients(got).into_iter().flat_map(|g| g.iter().enumerate()) {
                    let target = i % classes == 1;
                    assert!(if target { g.is_nan() } else { *g == 0.0 }, "{}: {g}", got.at);
                }
            });
        }
        // x/0, of either sign.
        for sign in [1.0, -1.0] {
            let weights = (0..classes).map(|c| if c == 0 { sign } else { -sign }).collect();
            let mut case = Case {
                targets: Targets::Indices(vec![0, 1]),
                class_weights: Some(weights),
                ..indices(2, classes)
            };
            case.logits[0] = -4.0;
            case.logits[classes + 1] = 4.0;
            everywhere(&case, |got| assert_eq!(got.loss, sign * INF, "{}", got.at));
        }
    }
    // The denominator of the z-loss is the sum of the row weights, and may be 0 alone.
    let case = Case {
        row_weights: Some(vec![1.0, -1.0]),
        class_weights: Some(vec![1.0, 2.0, 1.0, 1.0, 1.0]),
        targets: Targets::Indices(vec![0, 1]),
        z_loss: 0.1,
        ..indices(2, 5)
    };
    everywhere(&case, |got| {
        assert_eq!((got.normalizer, got.z_normalizer), (-1.0, 0.0));
        assert!(!got.z_loss.is_finite() && !got.loss.is_finite(), "{}", got.at);
    });
    everywhere(&Case { z_loss: 0.0, ..case }, |got| assert!(got.loss.is_finite(), "{}", got.at));
}

#[test]
fn zero_rows_have_every_result() {
    let [index, probabilities] = both(0, 5);
    for case in [index, probabilities] {
        for case in [case.clone(), rich(case.clone()), log_probs(rich(case))] {
            everywhere(&case, |got| {
                assert!(got.loss.is_nan());
                assert_eq!((got.kept_rows, got.correct), (0, 0));
                assert_eq!((got.normalizer, got.z_normalizer), (0.0, 0.0));
            });
        }
    }
    everywhere(&Case::new(0, 5, 1, Vec::new()), |_| ());
    // No classes either; rows without positions; and no targets.
    for [rows, classes, inner] in [[0, 0, 1], [3, 4, 0], [0, 4, 3], [7, 0, 0]] {
        let call = CrossEntropy::new(rows, classes).inner(inner);
        let (x, mut grad) = ([0f64; 0], [0f64; 0]);
        let (mut kept_rows, mut correct) = (9, 9);
        let results = Results {
            kept_rows: Some(&mut kept_rows),
            correct: Some(&mut correct),
            lse: Some(&mut []),
            argmax: Some(&mut []),
            ..Results::default()
        };
        call.forward_backward_with(&x, &x, &mut grad, results).unwrap();
        call.forward_backward_with(&x, &[0u8; 0], &mut grad, Results::default()).unwrap();
        call.backward_targets(&x, &x, &[], &mut grad).unwrap();
        call.evaluate(&x, Results::default()).unwrap();
        assert_eq!((kept_rows, correct), (0, 0));
        let softmax = Softmax::new(rows, classes).inner(inner);
        softmax.softmax(&x, &mut grad).unwrap();
        softmax.log_softmax_backward(&x, &x, &mut grad).unwrap();
    }
}

#[test]
fn minus_infinity_beside_the_target() {
    for classes in WIDTHS {
        for masked in [0, 3, classes - 1] {
            for mut case in both(2, classes) {
                case.logits[masked] = LOW;
                match &mut case.targets {
                    Targets::Indices(y) => y[0] = if masked == 3 { 2 } else { 3 },
                    Targets::Probabilities(t) => t[masked] = 0.0,
                    Targets::None => unreachable!(),
                }
                everywhere(&case, |got| {
                    assert!(got.loss.is_finite() && got.entropy[0].is_finite(), "{}", got.at);
                    assert!(got.grad[masked] == 0.0 && got.backward[masked] == 0.0, "{}", got.at);
                });
                everywhere(&Case { softcap: 0.0, label_smoothing: 0.0, ..rich(case) }, |got| {
                    assert!(got.loss.is_finite() && got.grad[masked] == 0.0, "{}", got.at);
                });
            }
        }
    }
}

#[test]
fn minus_infinity_with_mass() {
    for classes in WIDTHS {
        let mut case = Case { reduction: Reduction::Sum, ..indices(1, classes) };
        case.logits[1] = LOW;
        case.targets = Targets::Indices(vec![1]);
        everywhere(&case, |got| {
            for grad in gradients(got) {
                assert_eq!((got.loss, grad[1]), (INF, -1.0), "{}", got.at);
            }
        });
        case.targets = Targets::Indices(vec![0]);
        everywhere(&Case { label_smoothing: 0.5, ..case.clone() }, |got| {
            let want = -0.5 / classes as f64;
            for grad in gradients(got) {
                let off = (grad[1] - want).abs();
                assert!(got.loss == INF && off <= -want * 2.0 * got.half_ulp, "{}", got.at);
            }
        });
        for (mass, loss) in [(0.25, INF), (-0.25, -INF), (0.0, 0.0)] {
            let mut t = vec![0.0; classes];
            (t[0], t[1]) = (0.5, mass);
            let targets = Targets::Probabilities(t);
            everywhere(&Case { targets, ..case.clone() }, |got| {
                assert!(if mass == 0.0 { got.loss.is_finite() } else { got.loss == loss });
                assert_eq!((got.grad[1], got.backward[1]), (-mass, -mass), "{}", got.at);
                // The expected value is `lse + inf`.
                assert_eq!(got.grad_targets[1], INF, "{}", got.at);
                assert!(got.grad_targets[0].is_finite());
            });
        }
    }
}

#[test]
fn a_row_of_minus_infinity() {
    for classes in [1, 5, 70] {
        for case in both(3, classes) {
            for mut case in [case.clone(), Case { softcap: 0.0, ..rich(case) }] {
                case.reduction = Reduction::Sum;
                case.logits[classes..2 * classes].fill(LOW);
                everywhere(&case, |got| {
                    assert!(got.loss.is_nan() && got.row_losses[1].is_nan(), "{}", got.at);
                    assert!(got.lse[1] == -INF && got.argmax[1] == 0 && got.entropy[1].is_nan());
                    for grad in gradients(got) {
                        let grad: Vec<_> = grad.chunks(classes).collect();
                        assert!(grad[1].iter().all(|g| g.is_nan()), "{}", got.at);
                        assert!(grad[0].iter().chain(grad[2]).all(|g| g.is_finite()));
                    }
                });
            }
        }
    }
}

#[test]
fn minus_infinity_everywhere_but_at_the_target() {
    for classes in [1, 2, 5, 70] {
        for x in [7.0, -1e3, 60_000.0] {
            let y = classes / 2;
            let mut logits = vec![LOW; 2 * classes];
            (logits[y], logits[classes + y]) = (x, x);
            let case = Case { logits, ..indices(2, classes) };
            let mut t = vec![0.0; 2 * classes];
            (t[y], t[classes + y]) = (1.0, 1.0);
            for targets in [Targets::Indices(vec![y as i64; 2]), Targets::Probabilities(t)] {
                let is_index = matches!(targets, Targets::Indices(_));
                everywhere(&Case { targets, ..case.clone() }, |got| {
                    assert_eq!(got.loss, 0.0, "{}", got.at);
                    assert!(is_zero(&got.grad), "{}, {x}: {:?}", got.at, got.grad);
                    // A backward knows a p of 1 to an ulp; at a target index it is more accurate.
                    if is_index {
                        assert!(is_zero(&got.backward), "{}, {x}: {:?}", got.at, got.backward);
                    }
                    assert_eq!(got.entropy, [0.0; 2], "{}", got.at);
                });
            }
        }
    }
}

/// pytorch#156379, TF#116933, lattice#740 in every layout: a maximum dropped a NaN, one lane was wrong.
#[test]
fn nan_and_plus_infinity() {
    for classes in WIDTHS {
        for case in both(3, classes) {
            for case in [case.clone(), Case { softcap: 0.0, ..rich(case) }] {
                let case = Case { reduction: Reduction::Sum, ..case };
                let clean = std::cell::RefCell::new(Vec::new());
                everywhere(&case, |got| clean.borrow_mut().push(got.clone()));
                for at in [0, 1, classes / 2, classes - 1] {
                    for (bad, lse) in [(NAN, NAN), (INF, INF)] {
                        let mut case = case.clone();
                        case.logits[classes + at] = bad;
                        // A weight or mass of 0 does not hide it.
                        if let Some(weights) = &mut case.class_weights {
                            weights[at] = 0.0;
                        }
                        let i = std::cell::Cell::new(0);
                        let same_weights = case.class_weights.is_none();
                        everywhere(&case, |got| {
                            let clean = &clean.borrow()[i.replace(i.get() + 1)];
                            let what = || got.at.clone();
                            assert!(got.loss.is_nan() && got.row_losses[1].is_nan());
                            same(&got.lse[1..2], &[lse], what);
                            assert!(got.entropy[1].is_nan() && got.argmax[1] == at as i64);
                            for (grad, clean) in gradients(got).into_iter().zip(gradients(clean)) {
                                let grad: Vec<_> = grad.chunks(classes).collect();
                                let clean: Vec<_> = clean.chunks(classes).collect();
                                assert!(grad[1].iter().all(|g| g.is_nan()), "{}", got.at);
                                if same_weights {
                                    same(grad[0], clean[0], what);
                                    same(grad[2], clean[2], what);
                                }
                            }
                        });
                    }
                }
            }
        }
    }
}

#[test]
fn nan_beside_infinity_is_nan() {
    for classes in WIDTHS {
        for [nan, inf] in [[0, 1], [1, 0], [2, classes - 1], [classes - 1, 2]] {
            for mut case in both(1, classes) {
                (case.logits[nan], case.logits[inf]) = (NAN, INF);
                everywhere(&case, |got| {
                    assert!(got.lse[0].is_nan() && got.loss.is_nan(), "{}", got.at);
                    assert_eq!(got.argmax, [nan as i64], "{}", got.at);
                });
            }
        }
    }
}

/// Of log-probabilities only those with mass are read for the loss, and all for an argmax.
#[test]
fn log_probabilities_without_mass_may_be_anything() {
    for classes in WIDTHS {
        for bad in [NAN, INF, LOW] {
            for case in both(2, classes) {
                let mut case = log_probs(case);
                case.logits[3] = bad;
                match &mut case.targets {
                    Targets::Indices(y) => y[0] = 2,
                    Targets::Probabilities(t) => t[3] = 0.0,
                    Targets::None => unreachable!(),
                }
                everywhere(&case, |got| {
                    assert!(got.loss.is_finite(), "{}: {}", got.at, got.loss);
                    assert!(got.grad.iter().all(|g| g.is_finite()), "{}", got.at);
                    assert_eq!(got.argmax[0] == 3, bad != LOW, "{}", got.at);
                });
                // A class of weight 0 has no mass.
                let mut weights = vec![1.0; classes];
                weights[3] = 0.0;
                if let Targets::Indices(y) = &mut case.targets {
                    y[1] = 3;
                }
                let weighted =
                    Case { class_weights: Some(weights), label_smoothing: 0.25, ..case.clone() };
                everywhere(&weighted, |got| assert!(got.loss.is_finite(), "{}", got.at));
                // With mass the NaN shows.
                everywhere(&Case { label_smoothing: 0.25, ..case }, |got| {
                    assert!(!got.loss.is_finite(), "{}: {}", got.at, got.loss);
                    assert!(got.grad.iter().all(|g| g.is_finite()), "{}", got.at);
                });
            }
        }
    }
}

#[test]
fn a_row_weight_of_zero_hides_its_row() {
    for classes in WIDTHS {
        for case in both(3, classes) {
            for bad in [NAN, INF, LOW] {
                for weight in [0.0, -0.0] {
                    let mut case = Case {
                        row_weights: Some(vec![1.0, weight, 2.0]),
                        z_loss: 0.1,
                        label_smoothing: 0.25,
                        ..case.clone()
                    };
                    case.logits[classes + 1..2 * classes].fill(bad);
                    everywhere(&case, |got| {
                        assert!(got.loss.is_finite() && got.row_losses[1] == 0.0, "{}", got.at);
                        assert_eq!((got.kept_rows, got.z_normalizer), (3, 3.0));
                        for grad in gradients(got) {
                            assert!(is_zero(&grad[classes..2 * classes]), "{}", got.at);
                        }
                        assert!(got.added[classes..2 * classes].iter().all(|g| *g == 0.25));
                    });
                    everywhere(&log_probs(case), |got| assert!(got.loss.is_finite()));
                }
            }
        }
    }
}

/// pytorch#11551 in every layout. The statistics of an ignored row are still reported.
#[test]
fn ignored_rows() {
    for classes in WIDTHS {
        for by_mask in [false, true] {
            for bad in [NAN, INF, LOW, 2.0] {
                for mut case in both(4, classes) {
                    case.logits[classes..2 * classes].fill(bad);
                    case.logits[classes] = 3.0;
                    match &mut case.targets {
                        // The target of the ignored row would be its argmax.
                        Targets::Indices(y) => y[1] = if by_mask { 0 } else { IGNORED },
                        Targets::Probabilities(t) => t[classes..2 * classes].fill(NAN),
                        Targets::None => unreachable!(),
                    }
                    if by_mask || matches!(case.targets, Targets::Probabilities(_)) {
                        case.row_mask = Some(vec![true, false, true, true]);
                    }
                    let smooth = Case { label_smoothing: 0.25, z_loss: 0.1, ..case.clone() };
                    for case in [case.clone(), smooth, log_probs(case)] {
                        everywhere(&case, |got| {
                            assert!(got.loss.is_finite() && got.row_losses[1] == 0.0, "{}", got.at);
                            assert_eq!(got.kept_rows, 3);
                            for grad in gradients(got) {
                                assert!(is_zero(&grad[classes..2 * classes]), "{}", got.at);
                            }
                            let left = &got.added[classes..2 * classes];
                            assert!(left.iter().all(|g| *g == 0.25), "{}", got.at);
                            if !got.grad_targets.is_empty() {
                                assert!(is_zero(&got.grad_targets[classes..2 * classes]));
                            }
                            let top = if bad.is_nan() || bad == INF { 1 } else { 0 };
                            assert_eq!(got.argmax[1], top, "{}", got.at);
                            if let [_, lse, ..] = got.lse[..] {
                                assert_eq!(lse.is_finite(), bad == LOW || bad == 2.0);
                                assert_eq!(got.entropy[1].is_finite(), lse.is_finite());
                            }
                        });
                    }
                }
            }
        }
    }
}

/// Infinities become ±cap, with a gradient of 0; NaN stays.
#[test]
fn infinities_under_a_cap() {
    for classes in WIDTHS {
        for case in both(2, classes) {
            let mut case = Case { softcap: 3.0, logit_scale: 2.0, ..case };
            (case.logits[1], case.logits[3]) = (INF, LOW);
            for case in [case.clone(), rich(case.clone())] {
                everywhere(&case, |got| {
                    assert!(got.loss.is_finite() && got.lse[0].is_finite(), "{}", got.at);
                    assert!(got.lse[0] > case.softcap && got.entropy[0].is_finite());
                    for grad in gradients(got) {
                        assert!(grad[1] == 0.0 && grad[3] == 0.0, "{}: {grad:?}", got.at);
                        assert!(grad.iter().all(|g| g.is_finite()));
                    }
                    assert_eq!(got.argmax[0], 1);
                });
            }
            // An infinity at the target, and a row of infinities alone.
            if let Targets::Indices(y) = &mut case.targets {
                y[0] = 1;
            }
            everywhere(&case, |got| assert!(got.loss.is_finite() && got.grad[1] == 0.0));
            case.logits[..classes].fill(LOW);
            everywhere(&case, |got| {
                let lse = (classes as f64).ln() - 3.0;
                assert!((got.lse[0] - lse).abs() < 1e-6, "{}: {}", got.at, got.lse[0]);
                assert!(is_zero(&got.grad[..classes]), "{}", got.at);
            });
            case.logits[2] = NAN;
            everywhere(&case, |got| {
                assert!(got.lse[0].is_nan() && got.loss.is_nan(), "{}", got.at);
                assert!(got.grad[..classes].iter().all(|g| g.is_nan()), "{}", got.at);
            });
        }
    }
}

/// unsloth-zoo#593, CCE#48, TRL#5691, Fast-LLM#228: the formula of the cap, its order with the scale, or
/// their gradient was wrong. This test has the formulas written out.
#[test]
fn unsloth_593_scale_then_cap() {
    for (scale, cap) in [(0.5, 0.0), (1.0, 2.0), (0.25, 5.0), (3.0, 0.5), (1.0, 30.0)] {
        for classes in WIDTHS {
            let case = Case { logit_scale: scale, softcap: cap, ..indices(1, classes) };
            let Targets::Indices(y) = &case.targets else { unreachable!() };
            let y = y[0] as usize;
            let x: Vec<f64> = case.logits.iter().map(|x| x * scale).collect();
            let capped = |x: f64| if cap == 0.0 { x } else { cap * (x / cap).tanh() };
            let total: f64 = x.iter().map(|&x| capped(x).exp()).sum();
            everywhere(&case, |got| {
                assert!((got.lse[0] - total.ln()).abs() < 1e-5, "{}", got.at);
                assert!((got.loss - (total.ln() - capped(x[y]))).abs() < 1e-5, "{}", got.at);
                for (c, &x) in x.iter().enumerate() {
                    let p = capped(x).exp() / total - f64::from(c == y);
                    let slope = if cap == 0.0 { 1.0 } else { (x / cap).cosh().powi(-2) };
                    let want = p * slope * scale;
                    let off = (got.grad[c] - want).abs();
                    assert!(off < 1e-5 + 2.0 * got.half_ulp * want.abs(), "{}", got.at);
                }
            });
        }
    }
}

/// A logit that its scale takes past f32 is infinite; an f64 logit is not.
#[test]
fn scales_that_overflow() {
    for classes in WIDTHS {
        for case in both(2, classes) {
            let mut case = Case { logit_scale: 1e30, reduction: Reduction::Sum, ..case };
            case.logits.iter_mut().for_each(|x| *x *= 1e-30);
            case.logits[classes..].iter_mut().for_each(|x| *x *= 1e-3);
            case.logits[1] = 1e10;
            in_dtype::<f32>(&case, |got| {
                assert!(got.lse[0] == INF && got.row_losses[0].is_nan(), "{}", got.at);
                assert!(got.row_losses[1].is_finite());
                assert!(got.grad[..classes].iter().all(|g| g.is_nan()), "{}", got.at);
                assert_eq!(got.argmax[0], 1);
            });
            in_dtype::<bf16>(&case, |got| assert_eq!(got.lse[0], INF, "{}", got.at));
            in_dtype::<f64>(&case, |got| assert_eq!(got.lse[0], 1e40, "{}", got.at));
            // A logit that overflows to -inf has probability 0.
            case.logits[1] = -1e10;
            match &mut case.targets {
                Targets::Indices(y) => y[0] = 0,
                Targets::Probabilities(t) => t[1] = 0.0,
                Targets::None => unreachable!(),
            }
            in_dtype::<f32>(&case, |got| {
                assert!(got.loss.is_finite() && got.grad[1] == 0.0, "{}", got.at);
            });
            // Under a cap no logit overflows.
            let capped = Case { softcap: 5.0, ..case };
            in_dtype::<f32>(&capped, |got| {
                assert!(got.lse[0].is_finite() && got.grad[1] == 0.0, "{}", got.at);
            });
            in_dtype::<f64>(&capped, |got| assert!(got.grad[1] == 0.0, "{}", got.at));
        }
    }
}

/// Loss, gradient and entropy with an offset and without, in f64 and f32. Multiples of 1/8 with the
/// offset fit an f32, but no half.
fn same_beside(case: &Case, wide: bool) {
    for offset in [4096.0, -4096.0, 1e6] {
        let all = std::cell::RefCell::new(Vec::new());
        let mut shifted = case.clone();
        shifted.logits.iter_mut().for_each(|x| *x += offset);
        for case in [case, &shifted] {
            let keep = |got: &Got| all.borrow_mut().push(got.clone());
            if wide { in_dtype::<f64>(case, keep) } else { in_dtype::<f32>(case, keep) }
        }
        let all = all.into_inner();
        let (plain, shifted) = all.split_at(all.len() / 2);
        let unit = if wide { 1e-14 } else { 3e-7 };
        for (a, b) in plain.iter().zip(shifted) {
            let close = |a: &[f64], b: &[f64], what: &str| {
                for (a, b) in a.iter().zip(b) {
                    let off = (a - b).abs();
                    assert!(off <= unit * (1.0 + a.abs()), "{what} + {offset}: {a:e} and {b:e}");
                }
            };
            close(&[a.loss], &[b.loss], &format!("loss, {}", a.at));
            close(&a.row_losses, &b.row_losses, &format!("row losses, {}", a.at));
            close(&a.grad, &b.grad, &format!("gradient, {}", a.at));
            // The bound of an entropy grows with lse.
            let unit = unit * 5.0 * (1.0 + offset.abs());
            for (a, b) in a.entropy.iter().zip(&b.entropy) {
                assert!((a - b).abs() <= unit, "{a} {b}");
            }
        }
    }
}

/// pytorch#11752, #38839, mlx#4169 in every layout: an offset dropped the log of the sum.
#[test]
fn common_offsets() {
    for classes in WIDTHS {
        same_beside(&indices(3, classes), true);
        same_beside(&indices(3, classes), false);
        same_beside(&soft(3, classes), false);
    }
}

#[test]
fn common_offsets_beside_probabilities_in_f64() {
    for classes in WIDTHS {
        same_beside(&soft(3, classes), true);
    }
}

/// Losses down to 1e-30, and `p_y − 1` of the fused call, keep their relative accuracy.
#[test]
fn confident_predictions() {
    for classes in [2, 5, 70] {
        for gap in [16.0, 40.0, 64.0] {
            let y = classes - 1;
            let mut logits = vec![-gap; 2 * classes];
            (logits[y], logits[classes + y]) = (0.0, 0.0);
            let case = Case {
                targets: Targets::Indices(vec![y as i64; 2]),
                reduction: Reduction::Sum,
                logits,
                ..indices(2, classes)
            };
            let rest = (classes - 1) as f64 * (-gap).exp();
            everywhere(&case, |got| {
                let unit = if got.wide { 1e-13 } else { 2e-5 };
                let off = (got.row_losses[0] / rest.ln_1p() - 1.0).abs();
                assert!(off < unit, "{}: {:e}", got.at, got.row_losses[0]);
                let miss = rest / (1.0 + rest);
                let least = if got.at.starts_with("f16") { 6e-8 } else { 0.0 };
                let off = (got.grad[y] + miss).abs();
                assert!(off <= (unit + 2.0 * got.half_ulp) * miss + least, "{}", got.at);
            });
        }
    }
}

/// Backward takes any lse: here the lse of a row with more classes than this shard.
#[test]
fn lse_from_elsewhere() {
    for classes in WIDTHS {
        let case = Case { reduction: Reduction::Sum, ..indices(2, classes) };
        let Targets::Indices(y) = &case.targets else { unreachable!() };
        let whole = common::reference::evaluate(&case);
        for extra in [0.0, 0.5, 40.0, 600.0] {
            let lse: Vec<f64> = whole.lse.iter().map(|lse| lse + extra).collect();
            let log_p = |i: usize| case.logits[i] - lse[i / classes];
            let check = |got: Vec<f64>, unit: f64| {
                for (i, g) in got.into_iter().enumerate() {
                    let hit = y[i / classes] == (i % classes) as i64;
                    let want = if hit { log_p(i).exp_m1() } else { log_p(i).exp() };
                    let bound = unit * (1.0 + log_p(i).abs()) * want.abs() + 1e-37;
                    assert!((g - want).abs() <= bound, "{g:e} {want:e}, {extra}");
                }
            };
            for layout in Layout::ALL {
                let [rows, inner] = layout.shape(2);
                let strides = layout.strides(2, classes);
                for isa in isas() {
                    let call = CrossEntropy::new(rows, classes)
                        .inner(inner)
                        .isa(isa)
                        .reduction(xent::Reduction::Sum);
                    let mut x = layout.spread(&case.logits, classes, 5.0);
                    let to = Output::from(&mut x).strides(strides);
                    call.backward_in_place(to, y, &lse).unwrap();
                    check(layout.packed(&x, [2, classes], 5.0), 1e-14);
                    let short: Vec<f32> = case.logits.iter().map(|&x| x as f32).collect();
                    let mut x = layout.spread(&short, classes, 5.0);
                    let to = Output::from(&mut x).strides(strides);
                    call.backward_in_place(to, y, &lse).unwrap();
                    let grad = layout.packed(&x, [2, classes], 5.0);
                    check(grad.into_iter().map(f64::from).collect(), 3e-7);
                }
            }
        }
    }
}

/// A gradient past the range of its dtype is infinite.
fn past_the_range(case: &Case) {
    let with = |grad_scale| Case { grad_scale, reduction: Reduction::Sum, ..case.clone() };
    let overflows = |got: &Got| {
        assert!(got.grad.iter().any(|g| g.is_infinite()), "{}", got.at);
        assert!(got.grad.iter().all(|g| !g.is_nan()), "{}", got.at);
    };
    in_dtype::<f16>(&with(1e8), overflows);
    in_dtype::<f32>(&with(1e40), overflows);
    in_dtype::<bf16>(&with(-1e40), overflows);
    // A gradient below the range is 0 or the smallest number.
    in_dtype::<f16>(&with(1e-9), |got| assert!(got.grad.iter().all(|g| g.abs() < 1e-7)));
    in_dtype::<f32>(&with(1e-44), |got| assert!(got.grad.iter().all(|g| g.abs() < 1e-43)));
}

#[test]
fn gradients_past_their_range() {
    WIDTHS.into_iter().for_each(|classes| past_the_range(&indices(2, classes)));
}

/// If both terms are past the range, the result has the sign of their difference.
#[test]
fn masses_past_their_range() {
    WIDTHS.into_iter().for_each(|classes| past_the_range(&soft(2, classes)));
}

/// Asserts that losses and gradients of one class are exactly 0; with `from_lse` also those of
/// `backward`.
fn nothing_to_learn(case: &Case, from_lse: bool) {
    for reduction in [Reduction::Mean, Reduction::Sum] {
        everywhere(&Case { reduction, ..case.clone() }, |got| {
            assert_eq!((got.loss, got.z_loss), (0.0, 0.0), "{}", got.at);
            assert!(is_zero(&got.row_losses) && is_zero(&got.entropy), "{}", got.at);
            let grad = if from_lse { &got.backward } else { &got.grad };
            assert!(is_zero(grad), "{}, {:?}: {grad:?}", got.at, case.targets);
            assert_eq!(got.argmax, [0; 3]);
        });
    }
}

#[test]
fn one_class_smoothed() {
    for label_smoothing in [0.125, 0.1, 0.9] {
        let case = Case { z_loss: 0.0, ..rich(indices(3, 1)) };
        let weighted = Case { label_smoothing, ..case };
        let unweighted = Case { class_weights: None, ..weighted.clone() };
        for case in [weighted, unweighted] {
            nothing_to_learn(&case, false);
            nothing_to_learn(&case, true);
        }
    }
}

#[test]
fn one_class_of_probability_from_its_lse() {
    for case in [soft(3, 1), Case { z_loss: 0.0, ..rich(soft(3, 1)) }] {
        nothing_to_learn(&case, true);
    }
}

/// With one class loss and gradient are 0, whatever the options, except for z-loss.
#[test]
fn one_class() {
    for case in both(3, 1) {
        let weighted = Case { z_loss: 0.0, label_smoothing: 0.0, ..rich(case.clone()) };
        let smoothed = Case { label_smoothing: 0.125, ..case.clone() };
        let only_smoothed = Case { label_smoothing: 1.0, ..case.clone() };
        for case in [&case, &weighted, &only_smoothed] {
            nothing_to_learn(case, false);
            if matches!(case.targets, Targets::Indices(_)) {
                nothing_to_learn(case, true);
            } else {
                nothing_to_learn(&smoothed, false);
            }
        }
        // λ·lse² and its gradient 2λ·lse, p being 1.
        let case = Case { z_loss: 0.5, reduction: Reduction::Sum, ..case };
        everywhere(&case, |got| {
            let z: f64 = case.logits.iter().map(|x| 0.5 * x * x).sum();
            assert!((got.loss - z).abs() < 1e-12 && got.loss == got.z_loss, "{}", got.at);
            for (g, x) in got.grad.iter().zip(&case.logits) {
                assert!((g - x).abs() <= 4.0 * got.half_ulp * x.abs(), "{}: {g} {x}", got.at);
            }
        });
        everywhere(&log_probs(case), |_| ());
    }
    let correct = indices(3, 1);
    everywhere(&correct, |got| assert_eq!(got.correct, 3));
}

/// λ·lse² has its own denominator. OLMo-core#702: a z-loss that is off has no effect.
#[test]
fn z_loss_and_its_denominator() {
    for classes in WIDTHS {
        for case in both(3, classes) {
            let case = Case {
                z_loss: 0.25,
                row_weights: Some(vec![1.0, 2.0, 0.5]),
                class_weights: Some((0..classes).map(|c| (c % 3 + 1) as f64).collect()),
                ..case
            };
            for [normalizer, z_normalizer] in [[0.0, 0.0], [8.0, 0.0], [0.0, 8.0], [16.0, 2.0]] {
                everywhere(&Case { normalizer, z_normalizer, ..case.clone() }, |got| {
                    let r = [1.0, 2.0, 0.5];
                    let z: f64 = got.lse.iter().zip(r).map(|(lse, r)| 0.25 * r * lse * lse).sum();
                    let below = if z_normalizer > 0.0 { z_normalizer } else { 3.5 };
                    assert!((got.z_loss - z / below).abs() < 1e-12 * z, "{}", got.at);
                    let above = if normalizer > 0.0 { normalizer } else { got.normalizer };
                    assert_eq!((got.normalizer, got.z_normalizer), (above, below), "{}", got.at);
                    let rest: f64 = got.row_losses.iter().sum::<f64>() - z;
                    let want = rest / above + z / below;
                    assert!((got.loss - want).abs() < 1e-12 * want.abs().max(1.0), "{}", got.at);
                });
            }
            let off = Case { z_loss: 0.0, ..case.clone() };
            everywhere(&off, |got| {
                assert_eq!(got.z_loss, 0.0, "{}", got.at);
                let sum: f64 = got.row_losses.iter().sum();
                assert!((got.loss - sum / got.normalizer).abs() < 1e-13 * sum.abs());
            });
            // A row with an infinite lse² has an infinite loss, unless a factor is 0.
            let mut far = Case { z_loss: 1.0, reduction: Reduction::Sum, ..case };
            far.logits[..classes].iter_mut().for_each(|x| *x -= 1e200);
            in_dtype::<f64>(&far, |got| assert_eq!(got.row_losses[0], INF, "{}", got.at));
            far.z_loss = 0.0;
            in_dtype::<f64>(&far, |got| assert!(got.row_losses[0].is_finite(), "{}", got.at));
        }
    }
}

/// argmax: the first NaN, else the largest logit as stored, the lowest class on ties, 0 if all are -inf.
#[test]
fn argmax() {
    let rows: &[(&[(usize, f64)], i64)] = &[
        (&[(3, NAN), (4, NAN), (0, INF)], 3),
        (&[(4, NAN), (1, INF)], 4),
        (&[(2, INF), (3, INF)], 2),
        (&[(1, 9.0), (4, 9.0)], 1),
        (&[(0, -4.5)], 1),
    ];
    for classes in WIDTHS {
        for &(set, want) in rows {
            for case in [indices(2, classes), log_probs(indices(2, classes))] {
                let mut case = Case { reduction: Reduction::Sum, ..case };
                for logits in case.logits.chunks_mut(classes) {
                    logits.fill(-4.0);
                    set.iter().for_each(|&(class, x)| logits[class] = x);
                }
                case.targets = Targets::Indices(vec![want, 0]);
                everywhere(&case, |got| {
                    assert_eq!(got.argmax, [want; 2], "{}", got.at);
                    assert_eq!(got.correct, 1, "{}", got.at);
                });
                // Also in the last row and at the last class.
                let last = classes - 1;
                case.logits[classes..].fill(-8.0);
                case.logits[classes + last] = 0.5;
                everywhere(&case, |got| assert_eq!(got.argmax[1], last as i64, "{}", got.at));
            }
        }
        // Zeros of both signs are equal, in either order. A row of −inf has argmax 0.
        for (low, zeros, want) in
            [(-1.0, [-0.0, 0.0], 2), (-1.0, [0.0, -0.0], 2), (LOW, [LOW; 2], 0)]
        {
            let mut case = Case::new(1, classes, 1, vec![low; classes]);
            (case.logits[2], case.logits[4]) = (zeros[0], zeros[1]);
            everywhere(&case, |got| assert_eq!(got.argmax, [want], "{}", got.at));
        }
        // argmax ignores the cap, above which all logits are equal.
        let mut case = Case { softcap: 0.5, logit_scale: 100.0, ..indices(1, classes) };
        case.logits.fill(300.0);
        case.logits[classes - 2] = 400.0;
        case.targets = Targets::Indices(vec![classes as i64 - 2]);
        everywhere(&case, |got| {
            assert_eq!((got.argmax[0], got.correct), (classes as i64 - 2, 1), "{}", got.at);
        });
    }
}

/// Entropy: `0·(−inf)` is 0; at most ln C; NaN without a softmax.
#[test]
fn entropy() {
    for classes in WIDTHS {
        let with = |x: &[f64]| {
            let mut logits = vec![LOW; classes];
            logits[..x.len()].copy_from_slice(x);
            Case::new(1, classes, 1, logits)
        };
        let all = vec![2.5; classes];
        let logits: [(&[f64], f64); 7] = [
            (&[1.0], 0.0),
            (&[1.0, 1.0], 2f64.ln()),
            (&[LOW, 3.0, LOW, 3.0], 2f64.ln()),
            (&all, (classes as f64).ln()),
            (&[], NAN),
            (&[1.0, NAN], NAN),
            (&[1.0, INF], NAN),
        ];
        for (x, want) in logits {
            everywhere(&with(x), |got| {
                let unit = if got.wide { 1e-14 } else { 1e-6 };
                let good = (got.entropy[0] - want).abs() <= unit || want.is_nan();
                assert!(good && got.entropy[0].is_nan() == want.is_nan(), "{}", got.at);
            });
        }
    }
}

/// Without targets, mask, weights and the options of the loss have no effect.
#[test]
fn evaluators() {
    for classes in WIDTHS {
        let plain = Case { targets: Targets::None, ..indices(4, classes) };
        let full = Case { targets: Targets::None, ..rich(plain.clone()) };
        let full = Case { softcap: 0.0, logit_scale: 1.0, ..full };
        let masked = Case { row_mask: Some(vec![false; 4]), ..full };
        let all = std::cell::RefCell::new(Vec::<Got>::new());
        everywhere(&plain, |got| all.borrow_mut().push(got.clone()));
        let i = std::cell::Cell::new(0);
        everywhere(&masked, |got| {
            let plain = &all.borrow()[i.replace(i.get() + 1)];
            same(&got.lse, &plain.lse, || got.at.clone());
            same(&got.entropy, &plain.entropy, || got.at.clone());
            assert_eq!(got.argmax, plain.argmax);
        });
        everywhere(&Case { softcap: 2.0, logit_scale: 0.5, ..plain }, |_| ());
    }
}

/// One row, `[C]`; and one row with positions, `[C, d]`.
#[test]
fn unbatched() {
    for classes in [1, 5, 32, 33, 70, 2500] {
        for rows in [1, 2] {
            for case in both(rows, classes) {
                everywhere(&case, |_| ());
                everywhere(&rich(case), |_| ());
            }
        }
    }
}

/// Target masses of any sign and sum, and none.
#[test]
fn probabilities_of_any_kind() {
    for classes in WIDTHS {
        let case = Case { reduction: Reduction::Sum, ..soft(2, classes) };
        let with =
            |t: f64| Case { targets: Targets::Probabilities(vec![t; 2 * classes]), ..case.clone() };
        everywhere(&with(0.0), |got| {
            assert!(got.loss == 0.0 && is_zero(&got.grad) && is_zero(&got.backward));
        });
        everywhere(&with(-0.5), |_| ());
        everywhere(&with(40.0), |_| ());
        // One positive, one negative: T = 0, and the gradient is -w·t'.
        let mut t = vec![0.0; 2 * classes];
        (t[0], t[1], t[classes], t[classes + 1]) = (0.5, -0.5, 1e-3, 1e3);
        let case = Case { targets: Targets::Probabilities(t), ..case.clone() };
        everywhere(&case, |got| {
            assert!(got.grad[2] == 0.0 && got.grad[0] == -0.5 && got.grad[1] == 0.5, "{}", got.at);
        });
        // ε = 1: the targets have a factor of 0, and may have any value.
        for bad in [NAN, INF] {
            everywhere(&Case { label_smoothing: 1.0, ..with(bad) }, |got| {
                assert!(got.loss.is_finite() && is_zero(&got.grad_targets), "{}", got.at);
                assert!(got.grad.iter().all(|g| g.is_finite()), "{}", got.at);
            });
            everywhere(&Case { label_smoothing: 1.0, ..log_probs(with(bad)) }, |got| {
                assert!(got.loss.is_finite() && is_zero(&got.grad_targets), "{}", got.at);
            });
            // So may the target of a class of weight 0.
            let mut case = case.clone();
            let mut weights = vec![1.0; classes];
            weights[2] = 0.0;
            let Targets::Probabilities(t) = &mut case.targets else { unreachable!() };
            t[2] = bad;
            let weighted = Case { class_weights: Some(weights), ..case.clone() };
            everywhere(&weighted, |got| {
                assert!(got.loss.is_finite() && got.grad_targets[2] == 0.0, "{}", got.at);
            });
            if bad.is_nan() {
                everywhere(&case, |got| assert!(got.loss.is_nan(), "{}", got.at));
            }
        }
        // ignore_index does not apply to probabilities.
        let case = Case { ignore_index: 0, ..soft(2, classes) };
        everywhere(&case, |got| assert_eq!(got.kept_rows, 2));
    }
}

/// Automodel#2428: the gradient assumed that targets add up to 1.
#[test]
fn automodel_2428_targets_of_any_total() {
    for classes in WIDTHS {
        for total in [0.25, 3.0, -1.0] {
            let mut t = vec![0.0; classes];
            (t[0], t[1]) = (total * 0.75, total * 0.25);
            let case = Case { targets: Targets::Probabilities(t.clone()), ..soft(1, classes) };
            let p = common::reference::softmax(&case.logits, 1, classes, 1);
            everywhere(&case, |got| {
                for grad in gradients(got) {
                    for c in 0..classes {
                        let want = total * p[c] - t[c];
                        let off = (grad[c] - want).abs();
                        assert!(off < 1e-6 + 2.0 * got.half_ulp * want.abs(), "{}", got.at);
                    }
                }
            });
        }
    }
}

/// optax#896, #1762, TRL#7263: 0·(−inf) is 0, for every factor and in every layout.
#[test]
fn optax_896_nothing_times_infinity() {
    for classes in WIDTHS {
        for mut case in both(2, classes) {
            case.reduction = Reduction::Sum;
            case.logits[3] = LOW;
            case.logits[classes + 3] = LOW;
            let mut weights = vec![1.5; classes];
            weights[3] = 0.0;
            if let Targets::Indices(y) = &mut case.targets {
                // Also at the target.
                *y = vec![0, 3];
            }
            for label_smoothing in [0.0, 0.25, 1.0] {
                let weighted =
                    Case { label_smoothing, class_weights: Some(weights.clone()), ..case.clone() };
                everywhere(&weighted, |got| {
                    assert!(got.loss.is_finite(), "{}: {}", got.at, got.loss);
                    assert!(got.grad[3] == 0.0 && got.backward[3] == 0.0, "{}", got.at);
                    assert!(got.grad_targets.iter().all(|g| g.is_finite()), "{}", got.at);
                });
                everywhere(&log_probs(weighted), |got| {
                    assert!(got.loss.is_finite(), "{}: {}", got.at, got.loss);
                    assert!(got.grad_targets.iter().all(|g| g.is_finite()), "{}", got.at);
                });
            }
        }
        // λ = 0 with an lse of −inf, in an ignored row.
        let mut case = Case { row_weights: Some(vec![0.0, 1.0]), ..indices(2, classes) };
        case.logits[..classes].fill(LOW);
        everywhere(&Case { z_loss: 1.0, ..case }, |got| assert!(got.loss.is_finite()));
    }
}

/// The gradient of a class of probability 0 that is no target is +0, whatever the sign of its factors.
#[test]
fn no_probability_no_sign() {
    for classes in [5, 70, 300] {
        for mut case in both(2, classes) {
            case.logits[3] = LOW;
            match &mut case.targets {
                Targets::Indices(y) => y[0] = 1,
                Targets::Probabilities(t) => t[3] = 0.0,
                Targets::None => unreachable!(),
            }
            for grad_output in [0.75, -0.75] {
                let case = Case { grad_output: vec![grad_output], ..case.clone() };
                let look = |got: &Got| {
                    let bits = gradients(got).map(|grad| grad[3].to_bits());
                    assert_eq!(bits, [0, 0], "{} times {grad_output}", got.at);
                };
                everywhere(&case, look);
                everywhere(&Case { z_loss: 0.5, ..case.clone() }, look);
                everywhere(&log_probs(case), look);
            }
        }
    }
}

/// pytorch#108345, ORT#32299, flash-attn#714, Paddle#30590: products of strides were 32 bits wide. Here
/// they are those of classes, positions, targets, probabilities, masks and gradients.
#[test]
fn pytorch_108345_strides_beyond_32_bits() {
    const FAR: usize = (1 << 31) + 3;
    /// Zeros. The system provides a page when it is touched.
    fn sparse<T: Copy>(len: usize, look: impl FnOnce(&mut [T])) {
        let layout = std::alloc::Layout::array::<T>(len).unwrap();
        // SAFETY: the size of the layout is not 0.
        let memory = unsafe { std::alloc::alloc_zeroed(layout) };
        if memory.is_null() {
            println!("SKIPPED: no address space for {} bytes", layout.size());
            return;
        }
        // SAFETY: the allocation holds `len` zeros, and `self` is borrowed mutably.
        look(unsafe { std::slice::from_raw_parts_mut(memory.cast::<T>(), len) });
        // SAFETY: `alloc_zeroed` returned the pointer for this layout; no slice outlives `self`.
        unsafe { std::alloc::dealloc(memory, layout) };
    }
    let x = [0.5f32, -1.0, 2.0, 0.25, 1.5, -0.75];
    let (y, soft) = ([2u8, 1], [0.5f32, 0.25, 0.25, 0.0, 0.5, 0.5]);
    for isa in isas() {
        let call = CrossEntropy::new(2, 3).isa(isa);
        let mut packed = [0f32; 6];
        let loss = call.forward_backward(&x, &y, &mut packed).unwrap();
        // Rows and classes far apart; in place.
        for strides in [[FAR, 1], [1, FAR], [FAR, 3]] {
            let at = |i: usize| i / 3 * strides[0] + i % 3 * strides[1];
            let strides = [strides[0] as i64, strides[1] as i64, 0];
            sparse::<f32>(at(5) + 1, |memory| {
                (0..6).for_each(|i| memory[at(i)] = x[i]);
                let to = Output::from(&mut *memory).strides(strides);
                let far = call.forward_backward_in_place(to, &y).unwrap();
                assert!((far - loss).abs() < 1e-6, "{far} {loss}");
                for i in 0..6 {
                    assert!((memory[at(i)] - packed[i]).abs() < 1e-6, "{strides:?}, {i}");
                }
            });
        }
        // Inner positions of one row far apart.
        sparse::<f32>(2 * 3 + FAR, |memory| {
            let inner = CrossEntropy::new(1, 3).inner(2).isa(isa);
            let at = |i: usize| i / 3 * FAR + i % 3 * 2;
            (0..6).for_each(|i| memory[at(i)] = x[i]);
            let to = Output::from(&mut *memory).strides([0, 2, FAR as i64]);
            let far = inner.forward_backward_in_place(to, &y).unwrap();
            assert!((far - loss).abs() < 1e-6, "{far} {loss}");
            assert!((memory[FAR + 4] - packed[5]).abs() < 1e-6);
        });
        // Targets, mask and row weights far apart, with elements of one byte and more.
        sparse::<u8>(2 * FAR, |memory| {
            (memory[0], memory[2 * FAR - 1]) = (2, 1);
            let targets = Input::from(&*memory).strides([2 * FAR as i64 - 1, 0, 0]);
            assert_eq!(call.forward(&x, targets).unwrap(), loss);
            let masked = call.row_mask(targets).forward(&x, &y).unwrap();
            assert_eq!(masked, loss);
        });
        sparse::<f32>(FAR + 6, |memory| {
            let plain = call.forward(&x, &soft).unwrap();
            let mut grad = [0f32; 6];
            call.backward_targets(&x, &soft, &[1.0, 2.0], &mut grad).unwrap();
            (0..6).for_each(|i| memory[i / 3 * FAR + i % 3] = soft[i]);
            let strides = [FAR as i64, 1, 0];
            let targets = Input::from(&*memory).strides(strides);
            assert_eq!(call.forward(&x, targets).unwrap(), plain);
            let to = Output::from(&mut *memory).strides(strides);
            call.backward_targets(&x, &soft, &[1.0, 2.0], to).unwrap();
            assert_eq!(memory[FAR..FAR + 3], grad[3..]);
            // Softmax.
            let (mut near, softmax) = ([0f32; 6], Softmax::new(2, 3).isa(isa));
            softmax.softmax(&x, &mut near).unwrap();
            softmax.softmax(&x, Output::from(&mut *memory).strides(strides)).unwrap();
            assert_eq!(memory[FAR..FAR + 3], near[3..]);
        });
    }
}

/// TE#2734, unsloth#10713, pytorch#139740: strided input was read as packed. Here both readings are
/// possible: `[N, C, d]` and its transpose `[N, d, C]` hold the same numbers.
#[test]
fn pytorch_139740_positions_are_not_rows() {
    for classes in WIDTHS {
        let (rows, inner) = (3, 4);
        let case = indices(rows * inner, classes);
        let Targets::Indices(y) = &case.targets else { unreachable!() };
        let x: Vec<f32> = case.logits.iter().map(|&x| x as f32).collect();
        // The same logits with inner positions innermost.
        let mut transposed = vec![0f32; x.len()];
        let at = |i: usize| {
            let (row, position, class) = (i / classes / inner, i / classes % inner, i % classes);
            (row * classes + class) * inner + position
        };
        (0..x.len()).for_each(|i| transposed[at(i)] = x[i]);
        for isa in isas() {
            let call = CrossEntropy::new(rows, classes).inner(inner).isa(isa);
            let (mut last, mut first) = (vec![0f32; x.len()], vec![0f32; x.len()]);
            let strides = [(inner * classes) as i64, 1, classes as i64];
            let (from, to) = (Input::from(&x).strides(strides), Output::from(&mut last));
            let a = call.forward_backward(from, y, to.strides(strides)).unwrap();
            let b = call.forward_backward(&transposed, y, &mut first).unwrap();
            // Logits in one layout, the gradient in the other.
            let mut mixed = vec![0f32; x.len()];
            let c = call.forward_backward(from, y, &mut mixed).unwrap();
            let flat = CrossEntropy::new(rows * inner, classes).isa(isa).forward(&x, y).unwrap();
            for loss in [b, c, flat] {
                assert!((a - loss).abs() < 1e-6 * a, "{a} {loss}");
            }
            for i in 0..x.len() {
                let [a, b, c] = [last[i], first[at(i)], mixed[at(i)]];
                assert!((a - b).abs() < 1e-6 && (a - c).abs() < 1e-6, "{i}: {a} {b} {c}");
            }
        }
    }
}

/// transformers#34191, Automodel#3803, #3836: a mean of means, here with a z-loss.
#[test]
fn transformers_34191_accumulated_micro_batches() {
    let classes = 40;
    let (x, y) = (indices(6, classes).logits, [3i64, IGNORED, 7, 9, IGNORED, IGNORED]);
    for isa in isas() {
        let call = |rows: usize| CrossEntropy::new(rows, classes).isa(isa).z_loss(0.1);
        let (mut whole, mut parts) = (vec![0f64; x.len()], vec![0f64; x.len()]);
        let (mut normalizer, mut z_normalizer, mut loss) = (0.0, 0.0, 0.0);
        let results = Results {
            loss: Some(&mut loss),
            normalizer: Some(&mut normalizer),
            z_normalizer: Some(&mut z_normalizer),
            ..Results::default()
        };
        call(6).forward_backward_with(&x, &y, &mut whole, results).unwrap();
        assert_eq!((normalizer, z_normalizer), (3.0, 3.0));
        let mut sum = 0.0;
        for range in [0..2, 2..4, 4..6] {
            let cells = range.start * classes..range.end * classes;
            let part = call(2).normalizer(normalizer).z_normalizer(z_normalizer);
            sum += part.forward_backward(&x[cells.clone()], &y[range], &mut parts[cells]).unwrap();
        }
        assert!((sum - loss).abs() < 1e-14 * loss);
        same(&whole, &parts, || isa.name().to_string());
    }
}

/// Liger#678, #1298, #421 in every layout: with reduction none each row has its own upstream gradient,
/// also for the gradient of the targets.
#[test]
fn liger_678_a_gradient_per_row() {
    for classes in WIDTHS {
        for case in both(4, classes) {
            let upstream = vec![1.0, -2.0, 0.0, 0.5];
            let grad_output = upstream.clone();
            let case = Case { reduction: Reduction::None, grad_output, z_loss: 0.1, ..case };
            let plain = Case { reduction: Reduction::Sum, grad_output: vec![1.0], ..case.clone() };
            let all = std::cell::RefCell::new(Vec::<Got>::new());
            everywhere(&plain, |got| all.borrow_mut().push(got.clone()));
            let i = std::cell::Cell::new(0);
            everywhere(&case, |got| {
                let plain = &all.borrow()[i.replace(i.get() + 1)];
                let close = |a: &[f64], b: &[f64]| {
                    for (i, (a, b)) in a.iter().zip(b).enumerate() {
                        let want = b * upstream[i / classes];
                        let bound = 5.0 * got.half_ulp * want.abs() + 1e-7;
                        assert!((a - want).abs() <= bound, "{}: {a} {want}", got.at);
                    }
                };
                close(&got.grad, &plain.grad);
                close(&got.grad_targets, &plain.grad_targets);
                same(&got.row_losses, &plain.row_losses, || got.at.clone());
            });
        }
    }
}

/// keras#15015: class ids that a half cannot hold exactly, also with classes that are not contiguous.
#[test]
fn keras_15015_large_class_ids() {
    let classes = 5000;
    let targets = Targets::Indices(vec![2049, 4097, 4999]);
    let case = Case { targets, ..indices(3, classes) };
    in_dtype::<bf16>(&case, |_| ());
    in_dtype::<f16>(&case, |_| ());
}

/// pytorch#55657, executorch#20089, tract#2586, pytorch#158310: long sums of halves stuck. Here they are
/// sums of probabilities, and of classes that are not contiguous.
#[test]
fn pytorch_158310_long_sums() {
    let classes = 10_000;
    let logits = vec![3.0; 2 * classes];
    let t = vec![1.0 / classes as f64; 2 * classes];
    let case = Case {
        targets: Targets::Probabilities(t),
        reduction: Reduction::Sum,
        ..Case::new(2, classes, 1, logits)
    };
    let want = (classes as f64).ln();
    let right = |got: &Got| {
        let unit = if got.wide { 1e-12 } else { 1e-6 };
        assert!((got.loss - 2.0 * want).abs() < unit * 20.0, "{}: {}", got.at, got.loss);
        assert!((got.lse[1] - 3.0 - want).abs() < unit * 20.0 && got.argmax == [0, 0]);
        assert!((got.entropy[1] - want).abs() < unit * 20.0, "{}", got.at);
    };
    in_dtype::<bf16>(&case, right);
    in_dtype::<f64>(&case, right);
}

/// flash-attn#1930, tf-onnx#1248, Liger: a leading block of −inf, in all layouts and kinds.
#[test]
fn flash_attn_1930_leading_blocks() {
    for (classes, length) in [(20, 16), (70, 64), (300, 256), (2100, 2048)] {
        for mut case in both(2, classes) {
            for row in 0..2 {
                case.logits[row * classes..][..length].fill(LOW);
                match &mut case.targets {
                    Targets::Indices(y) => y[row] = classes as i64 - 1,
                    Targets::Probabilities(t) => t[row * classes..][..length].fill(0.0),
                    Targets::None => unreachable!(),
                }
            }
            everywhere(&case, |got| {
                assert!(got.loss.is_finite() && got.entropy[1].is_finite(), "{}", got.at);
                assert!(is_zero(&got.grad[..length]), "{}", got.at);
            });
        }
    }
}

/// llm.c: the first maximum was −10000, and losses of −ln p that underflowed became inf.
#[test]
fn llm_c_low_rows_and_unlikely_targets() {
    for classes in WIDTHS {
        for case in both(2, classes) {
            let mut low = case.clone();
            low.logits.iter_mut().for_each(|x| *x = (*x - 20.0) * 2000.0);
            everywhere(&low, |got| assert!(got.loss.is_finite(), "{}", got.at));
            let mut steep = case;
            steep
                .logits
                .iter_mut()
                .enumerate()
                .for_each(|(i, x)| *x = -32.0 * (i % classes) as f64);
            everywhere(&steep, |got| assert!(got.loss.is_finite(), "{}", got.at));
        }
    }
}

/// Softmax and log-softmax: a NaN, a +inf or nothing but −inf makes a row NaN; any other −inf becomes 0
/// or stays −inf; backwards start from the stored output.
#[test]
fn softmax_and_log_softmax() {
    for classes in WIDTHS {
        let x = indices(6, classes);
        let mut x: Vec<f64> = x.logits;
        for (row, set) in [(1, NAN), (2, INF), (4, LOW)] {
            x[row * classes + 2] = set;
        }
        x[3 * classes..4 * classes].fill(LOW);
        let want = [
            common::reference::softmax(&x, 6, classes, 1),
            common::reference::log_softmax(&x, 6, classes, 1),
        ];
        for layout in Layout::ALL {
            let [rows, inner] = layout.shape(6);
            let strides = layout.strides(6, classes);
            for isa in isas() {
                let softmax = Softmax::new(rows, classes).inner(inner).isa(isa);
                let from = layout.spread(&x, classes, 5.0);
                let check = |which: usize, y: &[f64], unit: f64| {
                    for (i, (got, want)) in y.iter().zip(&want[which]).enumerate() {
                        let row = i / classes;
                        let off = (got - want).abs() <= unit * want.abs().max(unit);
                        let good = got == want || off || got.is_nan() && want.is_nan();
                        let what = format!("{layout:?} on {}: {got:e}, not {want:e}", isa.name());
                        assert!(good && got.is_nan() == (1..4).contains(&row), "{what}");
                    }
                    let low = y[4 * classes + 2];
                    assert_eq!(low, [0.0, LOW][which]);
                };
                let mut y = from.clone();
                let mut short: Vec<f32> = from.iter().map(|&x| x as f32).collect();
                let to = Output::from(&mut y).strides(strides);
                softmax.softmax(Input::from(&from).strides(strides), to).unwrap();
                check(0, &layout.packed(&y, [6, classes], 5.0), 1e-14);
                softmax.softmax_in_place(Output::from(&mut short).strides(strides)).unwrap();
                let wide = |short: &[f32]| -> Vec<f64> {
                    let packed = layout.packed(short, [6, classes], 5.0);
                    packed.into_iter().map(f64::from).collect()
                };
                check(0, &wide(&short), 2e-6);
                short = from.iter().map(|&x| x as f32).collect();
                softmax.log_softmax_in_place(Output::from(&mut short).strides(strides)).unwrap();
                check(1, &wide(&short), 2e-6);
                let mut log = from.clone();
                softmax.log_softmax_in_place(Output::from(&mut log).strides(strides)).unwrap();
                check(1, &layout.packed(&log, [6, classes], 5.0), 1e-14);

                // The gradient of Σ y is 0 in rows with a softmax.
                let grad = layout.spread(&vec![1.0; 6 * classes], classes, 5.0);
                for (y, is_log) in [(&y, false), (&log, true)] {
                    let (mut to, at) = (grad.clone(), Input::from(y).strides(strides));
                    let into = Output::from(&mut to).strides(strides);
                    if is_log {
                        softmax.log_softmax_backward_in_place(at, into).unwrap();
                    } else {
                        softmax.softmax_backward_in_place(at, into).unwrap();
                    }
                    let to = layout.packed(&to, [6, classes], 5.0);
                    let y = layout.packed(y, [6, classes], 5.0);
                    let ones = vec![1.0; 6 * classes];
                    let want = if is_log {
                        common::reference::log_softmax_backward(&y, &ones, 6, classes, 1)
                    } else {
                        common::reference::softmax_backward(&y, &ones, 6, classes, 1)
                    };
                    for (i, (got, want)) in to.iter().zip(&want).enumerate() {
                        let good = (got - want).abs() < 1e-12 * classes as f64;
                        let good = good || got.is_nan() && want.is_nan();
                        assert!(good, "{layout:?} on {}, {i}: {got:e} {want:e}", isa.name());
                    }
                }
            }
        }
    }
}

/// The order of classes: rows that rise, where each class displaces one of the largest so far, that fall, and that have
/// many ties or NaN; targets at the ends and within.
#[test]
fn orders() {
    let rows: [fn(usize, usize) -> f64; 6] = [
        |class, _| class as f64 / 8.0,
        |class, classes| (classes - class) as f64 / 8.0,
        |_, _| 1.5,
        |class, _| [0.0, -0.0, LOW, -1.0][class % 4],
        |class, _| [2.0, INF, 1.0][class % 3],
        |class, classes| if class % 3 == 2 || 2 * class > classes { NAN } else { class as f64 },
    ];
    for classes in [5, 70, 1400, 4200] {
        for row in rows {
            let mut case = Case { reduction: Reduction::Sum, ..indices(4, classes) };
            let all = (0..4 * classes).map(|i| row(i % classes, classes));
            case.logits = all.collect();
            let last = classes as i64 - 1;
            case.targets = Targets::Indices(vec![0, last / 2, last, last - 1]);
            everywhere(&case, |_| ());
        }
    }
}
