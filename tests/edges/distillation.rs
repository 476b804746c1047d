//! The edge cases of sparse targets, of a teacher's logits as targets, and of the divergence, in every dtype and
//! layout.

use crate::everywhere::{Got, Source, everywhere, everywhere_of, same};
use common::INF;
use common::random::Rng;
use common::reference::{self, Case, Reduction, Targets};
use std::cell::RefCell;
use xent::{CrossEntropy, Results};

const NAN: f64 = f64::NAN;
const LOW: f64 = f64::NEG_INFINITY;
const IGNORED: i64 = -100;

/// Numbers of classes: few, for lanes along rows, and many, for lanes along classes.
const WIDTHS: [usize; 2] = [5, 70];

/// Ordinary logits that every dtype holds.
fn logits(rows: usize, classes: usize) -> Case {
    let mut rng = Rng::new((rows * 1000 + classes) as u64);
    let logits = (0..rows * classes).map(|_| rng.below(64) as f64 / 8.0 - 4.0).collect();
    Case { reduction: Reduction::Sum, ..Case::new(rows, classes, 1, logits) }
}

/// Probabilities of listed classes, as many for each row.
fn listed(rows: usize, classes: &[i64], values: &[f64]) -> Source {
    assert_eq!(classes.len(), values.len());
    let (listed, values) = (Some(classes.to_vec()), values.to_vec());
    Source { listed, places: classes.len() / rows, values, scale: 0.0 }
}

/// A teacher's logits for all classes.
fn teacher(rows: usize, values: &[f64], scale: f64) -> Source {
    Source { listed: None, places: values.len() / rows, values: values.to_vec(), scale }
}

/// Ordinary logits of a teacher, of two rows.
fn ordinary_teacher(classes: usize) -> Vec<f64> {
    let mut rng = Rng::new(classes as u64);
    (0..2 * classes).map(|_| rng.below(64) as f64 / 16.0 - 2.0).collect()
}

/// The gradients of the logits, of one row.
fn gradients(got: &Got, classes: usize, row: usize) -> [&[f64]; 2] {
    [&got.grad, &got.backward].map(|grad| &grad[row * classes..][..classes])
}

/// Asserts that two problems have the same bits everywhere.
#[track_caller]
fn agree([case, other]: [&Case; 2], [source, other_source]: [&Source; 2]) {
    let all = RefCell::new(Vec::new());
    everywhere_of(case, source, |got| all.borrow_mut().push(got.clone()));
    let mut all = all.into_inner().into_iter();
    assert!(all.len() > 0);
    let all = RefCell::new(&mut all);
    everywhere_of(other, other_source, |got| {
        let want = all.borrow_mut().next().expect("as many runs");
        let what = || got.at.clone();
        assert_eq!(got.at, want.at);
        for (a, b) in [
            (&got.row_losses, &want.row_losses),
            (&got.kl, &want.kl),
            (&got.grad, &want.grad),
            (&got.backward, &want.backward),
            (&got.added, &want.added),
        ] {
            // +0 and -0 are one number.
            let unsigned = |x: &[f64]| x.iter().map(|x| x + 0.0).collect::<Vec<f64>>();
            same(&unsigned(a), &unsigned(b), what);
        }
        same(&[got.loss], &[want.loss], what);
    });
    assert!(all.into_inner().next().is_none());
}

#[test]
fn minus_infinity_at_a_listed_class() {
    for classes in WIDTHS {
        let mut case = logits(2, classes);
        case.logits[1] = LOW;
        let source = listed(2, &[1, 3, 0, 2], &[0.5, 0.25, 0.5, 0.5]);
        everywhere_of(&case, &source, |got| {
            assert_eq!([got.loss, got.row_losses[0], got.kl[0]], [INF; 3], "{}", got.at);
            assert!(got.row_losses[1].is_finite() && got.kl[1].is_finite(), "{}", got.at);
            for grad in gradients(got, classes, 0) {
                assert_eq!(grad[1], -0.5, "{}", got.at);
            }
        });
        // A probability of 0 makes no term, and so does one of a class that is not listed.
        for classes_of in [[1, 3, 0, 2], [4, 3, 0, 2]] {
            let source = listed(2, &classes_of, &[0.0, 0.25, 0.5, 0.5]);
            everywhere_of(&case, &source, |got| {
                assert!(got.loss.is_finite() && got.kl[0].is_finite(), "{}", got.at);
                for grad in gradients(got, classes, 0) {
                    assert_eq!(grad[1], 0.0, "{}", got.at);
                }
            });
        }
        // Under smoothing every class has mass.
        let source = listed(2, &[4, 3, 0, 2], &[0.5, 0.25, 0.5, 0.5]);
        everywhere_of(&Case { label_smoothing: 0.125, ..case }, &source, |got| {
            assert_eq!([got.loss, got.kl[0]], [INF; 2], "{}", got.at);
        });
    }
}

#[test]
fn minus_infinity_at_a_class_of_a_teacher() {
    for classes in WIDTHS {
        let mut case = logits(2, classes);
        case.logits[1] = LOW;
        let mut y = ordinary_teacher(classes);
        everywhere_of(&case, &teacher(2, &y, 1.0), |got| {
            assert_eq!([got.row_losses[0], got.kl[0]], [INF; 2], "{}", got.at);
        });
        // Neither teacher nor student takes the class.
        y[1] = LOW;
        everywhere_of(&case, &teacher(2, &y, 1.0), |got| {
            assert!(got.loss.is_finite() && got.kl[0].is_finite(), "{}", got.at);
            for grad in gradients(got, classes, 0) {
                assert_eq!(grad[1], 0.0, "{}", got.at);
            }
        });
    }
}

#[test]
fn a_nan_logit_of_a_kept_row() {
    for classes in WIDTHS {
        for (at, bad) in [(1, NAN), (1, INF), (4, NAN), (4, INF)] {
            let mut case = logits(2, classes);
            case.logits[at] = bad;
            let sources = [
                listed(2, &[1, 3, 0, 2], &[0.5, 0.25, 0.5, 0.5]),
                listed(2, &[IGNORED, IGNORED, 0, 2], &[0.5, 0.25, 0.5, 0.5]),
                teacher(2, &ordinary_teacher(classes), 0.5),
            ];
            for source in sources {
                everywhere_of(&case, &source, |got| {
                    assert!(got.loss.is_nan() && got.kl[0].is_nan(), "{}", got.at);
                    assert!(got.row_losses[1].is_finite() && got.kl[1].is_finite(), "{}", got.at);
                    for grad in gradients(got, classes, 0) {
                        assert!(grad.iter().all(|g| g.is_nan()), "{}", got.at);
                    }
                });
                let weights = Some(vec![0.0, 1.0]);
                everywhere_of(&Case { row_weights: weights, ..case.clone() }, &source, |got| {
                    assert!(got.loss.is_finite() && got.kl[0].is_nan(), "{}", got.at);
                });
                let mask = Some(vec![false, true]);
                everywhere_of(&Case { row_mask: mask, ..case.clone() }, &source, |got| {
                    assert!(got.loss.is_finite() && got.kl[0] == 0.0, "{}", got.at);
                });
            }
        }
    }
}

#[test]
fn a_list_without_a_used_place() {
    for classes in WIDTHS {
        let case = logits(2, classes);
        for scale in [0.0, 2.0] {
            let list = listed(2, &[IGNORED, IGNORED, 0, 2], &[NAN, INF, 0.5, 0.5]);
            let source = Source { scale, ..list };
            everywhere_of(&case, &source, |got| {
                assert_eq!([got.row_losses[0], got.kl[0]], [0.0; 2], "{}", got.at);
                for grad in gradients(got, classes, 0) {
                    assert!(grad.iter().all(|&g| g == 0.0), "{}", got.at);
                }
                assert_eq!(got.kept_rows, 2, "{}", got.at);
            });
            // What does not come from targets stays.
            let case = Case { z_loss: 0.5, entropy_bonus: 0.25, ..case.clone() };
            everywhere_of(&case, &source, |got| assert!(got.row_losses[0] != 0.0, "{}", got.at));
            let case = Case { label_smoothing: 0.125, ..case };
            everywhere_of(&case, &source, |got| assert!(got.kl[0] != 0.0, "{}", got.at));
        }
    }
}

#[test]
fn a_value_of_an_unused_place_reaches_nothing() {
    for classes in WIDTHS {
        let case = logits(2, classes);
        for scale in [0.0, 0.5] {
            let [a, b] = [[NAN, INF], [0.25, 0.0]].map(|[x, y]| {
                let list = listed(2, &[1, IGNORED, 3, IGNORED, 0, 2], &[0.5, x, 0.5, y, 0.25, 1.0]);
                Source { scale, ..list }
            });
            agree([&case; 2], [&a, &b]);
        }
    }
}

#[test]
fn a_class_that_is_listed_twice() {
    for classes in WIDTHS {
        let mut case = logits(2, classes);
        let once = listed(2, &[2, 3], &[1.0, 1.0]);
        let often = listed(2, &[2, 2, 2, 2, 3, 3, 3, 3], &[0.25; 8]);
        agree([&case; 2], [&once, &often]);
        // +a and -a are no mass, whatever the logit.
        case.logits[1] = LOW;
        let nothing = listed(2, &[1, 2, 1, 3, 3, 3], &[0.75, 1.0, -0.75, 0.5, 0.25, 0.25]);
        agree([&case; 2], [&once, &nothing]);
        everywhere_of(&case, &nothing, |got| assert!(got.loss.is_finite(), "{}", got.at));
    }
}

#[test]
fn a_teacher_without_a_softmax() {
    for classes in WIDTHS {
        let case = logits(2, classes);
        for bad in [NAN, INF, LOW] {
            let mut y = ordinary_teacher(classes);
            if bad == LOW {
                y[..classes].fill(LOW);
            } else {
                y[3] = bad;
            }
            let list = [0, 1, 1, 3, 2, 0, 1, 2];
            let values: Vec<f64> = [&y[..4], &y[classes..][..4]].concat();
            let sources = [
                teacher(2, &y, 0.5),
                Source { scale: 0.5, ..listed(2, &list, &values) },
                // An unused place does not save the row.
                Source { scale: 0.5, ..listed(2, &[IGNORED, 1, 1, 3, 2, 0, 1, 2], &values) },
            ];
            for source in sources {
                for case in
                    [case.clone(), Case { z_loss: 0.5, label_smoothing: 0.125, ..case.clone() }]
                {
                    everywhere_of(&case, &source, |got| {
                        let of_row = [got.loss, got.row_losses[0], got.kl[0]];
                        assert!(of_row.iter().all(|x| x.is_nan()), "{}: {of_row:?}", got.at);
                        let others = [got.row_losses[1], got.kl[1]];
                        assert!(others.iter().all(|x| x.is_finite()), "{}", got.at);
                        for grad in gradients(got, classes, 0) {
                            assert!(grad.iter().all(|g| g.is_nan()), "{}: {grad:?}", got.at);
                        }
                        for grad in gradients(got, classes, 1) {
                            assert!(grad.iter().all(|g| g.is_finite()), "{}", got.at);
                        }
                    });
                }
                // A factor of 0 hides it from the gradient.
                everywhere_of(&Case { grad_scale: 0.0, ..case.clone() }, &source, |got| {
                    assert!(got.loss.is_nan() && got.kl[0].is_nan(), "{}", got.at);
                    assert!(got.grad.iter().chain(&got.backward).all(|&g| g == 0.0), "{}", got.at);
                });
                // A row weight of 0 hides it from the loss too.
                let weights = Some(vec![0.0, 1.0]);
                everywhere_of(&Case { row_weights: weights, ..case.clone() }, &source, |got| {
                    assert!(got.loss.is_finite() && got.kl[0].is_nan(), "{}", got.at);
                    for grad in gradients(got, classes, 0) {
                        assert!(grad.iter().all(|&g| g == 0.0), "{}", got.at);
                    }
                });
            }
        }
    }
}

/// Products with a power of 2 and differences are exact here.
#[test]
fn an_offset_of_a_teacher_changes_no_bit() {
    for classes in WIDTHS {
        let case = logits(2, classes);
        let y = ordinary_teacher(classes);
        for (offset, scale) in [(1e4, 1.0), (-1e4, 1.0), (1e4, 2.0), (-1e4, 0.5)] {
            let moved: Vec<f64> = y.iter().map(|y| y + offset).collect();
            agree([&case; 2], [&teacher(2, &y, scale), &teacher(2, &moved, scale)]);
            let list = [0, 1, 1, 3, 2, 0, IGNORED, 2];
            let of_list = |y: &[f64]| Source { scale, ..listed(2, &list, &y[..8]) };
            agree([&case; 2], [&of_list(&y), &of_list(&moved)]);
        }
    }
}

#[test]
fn a_teacher_of_one_class() {
    everywhere_of(&logits(2, 1), &teacher(2, &[3.5, -1e300], 2.0), |got| {
        assert_eq!([got.loss, got.kl[0], got.kl[1]], [0.0; 3], "{}", got.at);
        assert!(got.grad.iter().all(|&g| g == 0.0), "{}", got.at);
    });
    for classes in WIDTHS {
        let case = logits(2, classes);
        let certain = listed(2, &[2, 3], &[1.0, 1.0]);
        let source = Source { scale: 0.75, ..listed(2, &[2, 3], &[1e6, -7.0]) };
        agree([&case; 2], [&certain, &source]);
        // A class beside which the others have no probability.
        let source = Source {
            scale: 1.0,
            ..listed(2, &[0, 2, 4, 4, 1, 3], &[LOW, 1.0, -1e4, LOW, -1e4, 0.0])
        };
        agree([&case; 2], [&certain, &source]);
    }
}

#[test]
fn the_divergence_of_equal_distributions() {
    for classes in [1, 5, 70, 300] {
        let case = logits(3, classes);
        let close = |got: &Got| {
            for (row, kl) in got.kl.iter().enumerate() {
                let bound = if got.wide { 1e-14 } else { 1e-6 };
                assert!(kl.abs() <= bound, "{}: kl[{row}] = {kl:e}", got.at);
            }
        };
        everywhere_of(&case, &teacher(3, &case.logits, 1.0), close);
        let t = reference::softmax(&case.logits, 3, classes, 1);
        everywhere(&Case { targets: Targets::Probabilities(t), ..case.clone() }, close);
        let equal = Case { logits: vec![1.5; 3 * classes], ..case };
        let smooth = Case { label_smoothing: 1.0, ..equal };
        everywhere_of(&smooth, &teacher(3, &vec![0.0; 3 * classes], 1.0), close);
    }
}

#[test]
fn the_divergence_of_a_negative_probability() {
    for classes in WIDTHS {
        let case = logits(2, classes);
        let source = listed(2, &[1, 3, 0, 2], &[-0.25, 1.25, 0.5, 0.5]);
        everywhere_of(&case, &source, |got| {
            assert!(got.kl[0].is_nan() && got.kl[1].is_finite(), "{}", got.at);
            assert!(got.loss.is_finite(), "{}", got.at);
        });
        let mut t = vec![0.0; 2 * classes];
        (t[classes - 1], t[1]) = (-0.25, 1.25);
        everywhere(&Case { targets: Targets::Probabilities(t), ..case }, |got| {
            assert!(got.kl[0].is_nan() && got.kl[1] == 0.0, "{}", got.at);
            assert!(got.loss.is_finite(), "{}", got.at);
        });
    }
}

#[test]
fn ignored_rows() {
    for classes in WIDTHS {
        let mask = Some(vec![false, true]);
        let case = Case { row_mask: mask, ..logits(2, classes) };
        let mut y = ordinary_teacher(classes);
        y[..classes].fill(NAN);
        let sources = [
            teacher(2, &y, 0.5),
            // Nobody looks at the classes either.
            listed(2, &[-1, i64::MAX, 1, 2], &[NAN, 1.0, 0.5, 0.5]),
            Source { scale: 0.5, ..listed(2, &[classes as i64, i64::MIN, 1, 2], &[NAN; 4]) },
        ];
        for (i, source) in sources.iter().enumerate() {
            everywhere_of(&case, source, |got| {
                assert_eq!(got.kept_rows, 1, "{}", got.at);
                assert_eq!([got.row_losses[0], got.kl[0]], [0.0; 2], "{}", got.at);
                assert!(got.loss.is_nan() == (i == 2), "{}", got.at);
                for grad in gradients(got, classes, 0) {
                    assert!(grad.iter().all(|&g| g == 0.0), "{}", got.at);
                }
                let untouched = &got.added[..classes];
                assert!(untouched.iter().all(|&g| g == 0.25), "{}: {untouched:?}", got.at);
            });
        }
    }
}

#[test]
fn smoothing_of_one_looks_at_no_target() {
    for classes in WIDTHS {
        let case = Case { label_smoothing: 1.0, ..logits(2, classes) };
        let plain = teacher(2, &vec![1.0; 2 * classes], 1.0);
        let sources = [
            teacher(2, &vec![NAN; 2 * classes], 1.0),
            teacher(2, &vec![LOW; 2 * classes], 1.0),
            listed(2, &[1, 3, 0, 2], &[NAN, INF, 0.5, -1.0]),
            Source { scale: 2.0, ..listed(2, &[IGNORED, IGNORED, 0, 2], &[NAN; 4]) },
        ];
        for source in &sources {
            everywhere_of(&case, source, |got| assert!(got.loss.is_finite(), "{}", got.at));
            agree([&case; 2], [&plain, source]);
        }
    }
}

#[test]
fn zero_rows() {
    for (listed, places) in [(None, 5), (Some(Vec::new()), 3)] {
        for scale in [0.0, 0.5] {
            let source = Source { listed: listed.clone(), places, values: Vec::new(), scale };
            everywhere_of(&logits(0, 5), &source, |got| {
                assert_eq!((got.loss, got.kept_rows), (0.0, 0), "{}", got.at);
            });
        }
    }
    // Rows without positions, and no classes.
    for [rows, classes, inner] in [[3, 4, 0], [0, 0, 1], [0, 4, 3]] {
        let none = [0i64; 0];
        let x = [0f32; 0];
        let call = CrossEntropy::new(rows, classes).inner(inner).target_classes(&none, 7);
        let (mut kl, mut grad) = ([0f64; 0], [0f32; 0]);
        let results = Results { kl: Some((&mut kl).into()), ..Results::default() };
        call.forward_backward_with(&x, &x, &mut grad, results).unwrap();
        call.target_scale(1.0).backward(&x, &x, &[], &mut grad).unwrap();
    }
}

/// The product of such a logit and a scale is rounded by more than the range of exponentials.
#[test]
fn a_teacher_far_from_zero() {
    for classes in WIDTHS {
        let case = logits(2, classes);
        for far in [1e18f64, 3e38, 1e300, -1e30] {
            for scale in [0.7, 1.0 / 3.0] {
                // Zeros are far below a positive number, and its double is far below a negative one.
                let rest = far.min(0.0) * 2.0;
                let mut y = vec![rest; 2 * classes];
                (y[1], y[classes + 2], y[classes + 3]) = (far, far, far);
                let halves = listed(2, &[1, 1, 2, 3], &[0.5; 4]);
                agree([&case; 2], [&halves, &teacher(2, &y, scale)]);
                let values = [far, rest, rest, far, rest, far];
                let of_list = listed(2, &[1, 2, 3, 3, 4, 2], &values);
                agree([&case; 2], [&halves, &Source { scale, ..of_list }]);
            }
            // Out of the range of f64 there is no softmax.
            let source = teacher(2, &vec![far; 2 * classes], 1e308 / far.abs() * 1e3);
            everywhere_of(&case, &source, |got| assert!(got.loss.is_nan(), "{}", got.at));
        }
    }
}
