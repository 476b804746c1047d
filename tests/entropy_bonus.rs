//! The entropy bonus where rows are not ordinary. Random problems have it too (tests/properties.rs and others).

use common::operand::{Dtype, FLOATS, Operand};
use common::task::{Answer, Call, Task};
use common::task_bounds::check;
use common::{How, INF, Reduction, isas};

/// Rows, classes and positions of tiles, of contiguous rows, and of rows of several chunks.
const SIZES: [[usize; 3]; 4] = [[9, 7, 1], [9, 300, 1], [3, 70, 3], [9, 4500, 1]];

/// Which rows are what, by row and position.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Row {
    Equal,
    HalfAbsent,
    Dominant,
    Late,
    High,
    Low,
    Nan,
    Infinite,
    Absent,
}

const ROWS: [Row; 9] = [
    Row::Equal,
    Row::HalfAbsent,
    Row::Nan,
    Row::Dominant,
    Row::Late,
    Row::High,
    Row::Infinite,
    Row::Low,
    Row::Absent,
];

impl Row {
    /// The logit of a class. The first class is the target, and the first and the last have all the mass of
    /// probability targets.
    fn logit(self, class: usize, classes: usize) -> f64 {
        let ordinary = (class * 7 % 16) as f64 / 4.0 - 2.0;
        match self {
            Row::Equal => 1.5,
            Row::HalfAbsent if class % 2 == 1 && class + 1 < classes => -INF,
            Row::Dominant if class == 1 => 42.0,
            // Far above the logits that a shift is chosen from.
            Row::Late => 28.25 * f64::from(u8::from(class == classes * 3 / 4)),
            // Neighbours in bf16.
            Row::High => 32768.0 - 256.0 * (class % 3) as f64,
            Row::Low => -32768.0 + 128.0 * (class % 2) as f64,
            Row::Nan if class == classes / 2 => f64::NAN,
            Row::Infinite if class == classes - 2 => INF,
            Row::Absent => -INF,
            _ => ordinary,
        }
    }
}

/// The rows of a shape, with index or probability targets.
fn task(dtype: Dtype, sizes: [usize; 3], probabilities: bool) -> Task {
    let [rows, classes, inner] = sizes;
    let full = |f: &dyn Fn(usize, usize) -> f64| -> Vec<f64> {
        let place = |i: usize| (i / (classes * inner) * inner + i % inner, i / inner % classes);
        let all = (0..rows * classes * inner).map(place);
        all.map(|(row, class)| f(row, class)).collect()
    };
    let logits = full(&|row, class| ROWS[row].logit(class, classes));
    let targets = if probabilities {
        let t = |class: usize| f64::from(u8::from(class == 0 || class == classes - 1)) * 0.625;
        Operand::packed(Dtype::F32, sizes, &full(&|_, class| t(class)))
    } else {
        Operand::packed(Dtype::I64, [rows, 1, inner], &vec![0.0; rows * inner])
    };
    Task::new(Operand::packed(dtype, sizes, &logits), targets)
}

/// The gradient of a row.
fn row_of(answer: &Answer, sizes: [usize; 3], row: usize) -> Vec<f64> {
    let [_, classes, inner] = sizes;
    let at = |class: usize| (row / inner * classes + class) * inner + row % inner;
    (0..classes).map(|class| answer.grad[at(class)]).collect()
}

/// Every edge by the oracle, in every call.
#[test]
fn edges() {
    for sizes in SIZES {
        for dtype in FLOATS {
            for probabilities in [false, true] {
                for entropy_bonus in [0.5, -2.0] {
                    let base = task(dtype, sizes, probabilities);
                    check(&Task { entropy_bonus, ..base.clone() }, How::on);
                    let reduction = Reduction::Mean;
                    let weights =
                        Operand::packed(Dtype::F32, [1, sizes[1], 1], &vec![0.5; sizes[1]]);
                    let (class_weights, label_smoothing) = (Some(weights), 0.1);
                    let task =
                        Task { entropy_bonus, reduction, class_weights, label_smoothing, ..base };
                    check(&Task { softcap: 30.0, logit_scale: 0.5, ..task }, How::on);
                }
            }
        }
    }
}

/// The bonus alone: where the entropy is largest the gradient is 0, a class without probability has a gradient of
/// exactly 0, and a row without a softmax reaches no other.
#[test]
fn alone() {
    for sizes in SIZES {
        for dtype in FLOATS {
            let classes = sizes[1];
            let weights = Operand::packed(Dtype::F32, [1, classes, 1], &vec![0.0; classes]);
            let class_weights = Some(weights);
            let task = Task { entropy_bonus: 1.0, class_weights, ..task(dtype, sizes, false) };
            for isa in isas() {
                let how = How::on(isa);
                let fused = task.run(Call::Fused, &how);
                let backward = task.run(Call::Backward(&fused.lse), &how);
                for (i, kind) in ROWS.into_iter().enumerate() {
                    let undefined = matches!(kind, Row::Nan | Row::Infinite | Row::Absent);
                    for answer in [&fused, &backward] {
                        let row = row_of(answer, sizes, i);
                        let what = format!("{kind:?} of {classes} in {dtype:?} on {}", isa.name());
                        assert!(row.iter().all(|g| g.is_nan() == undefined), "{what}: {row:?}");
                        let size = row.iter().fold(0.0, |m: f64, g| m.max(g.abs()));
                        match kind {
                            Row::Equal => assert!(size <= 1e-6, "{what}: {size:e}"),
                            Row::HalfAbsent => {
                                let absent = (0..classes)
                                    .filter(|&class| kind.logit(class, classes) == -INF)
                                    .all(|class| row[class] == 0.0);
                                assert!(absent && size > 1e-6, "{what}: {row:?}");
                            }
                            _ => {}
                        }
                    }
                    assert_eq!(fused.row_losses[i].is_nan(), undefined, "{kind:?}");
                }
            }
        }
    }
}

/// A backward takes the probabilities from the lse that it is given, and the entropy from the logits.
#[test]
fn another_lse() {
    for sizes in SIZES {
        let [rows, classes, inner] = sizes;
        let weights = Operand::packed(Dtype::F32, [1, classes, 1], &vec![0.0; classes]);
        let class_weights = Some(weights);
        let task = Task { entropy_bonus: 0.5, class_weights, ..task(Dtype::F64, sizes, false) };
        for isa in isas() {
            let how = How::on(isa);
            let forward = task.run(Call::Forward, &how);
            let lse: Vec<f64> = forward.lse.iter().map(|lse| lse + 0.75).collect();
            let backward = task.run(Call::Backward(&lse), &how);
            // Whatever lse a row without an entropy is given.
            let finite: Vec<f64> =
                lse.iter().map(|lse| if lse.is_finite() { *lse } else { 3.0 }).collect();
            let backward_of_finite = task.run(Call::Backward(&finite), &how);
            for i in 0..rows * inner {
                if !forward.entropy[i].is_finite() {
                    let row = row_of(&backward_of_finite, sizes, i);
                    assert!(row.iter().all(|g| g.is_nan()), "{:?}: {row:?}", ROWS[i]);
                    continue;
                }
                for (class, got) in row_of(&backward, sizes, i).into_iter().enumerate() {
                    let log_p = ROWS[i].logit(class, classes) - lse[i];
                    let p = log_p.exp();
                    let want = if p == 0.0 { 0.0 } else { 0.5 * p * (log_p + forward.entropy[i]) };
                    let off = (got - want).abs();
                    assert!(off <= 1e-11 * p, "row {i}, class {class}: {got:e}, not {want:e}");
                }
            }
        }
    }
}

/// A factor that f32 cannot hold, before a probability that makes the product one that it can hold.
#[test]
fn large_factors() {
    let grad_scale = 1e42;
    for sizes in [[1, 5, 1], [1, 300, 1]] {
        let classes = sizes[1];
        let mut logits = vec![-50.0; classes];
        (logits[0], logits[1], logits[2]) = (0.0, 1.0, -46.0);
        let log_total = logits.iter().map(|x: &f64| x.exp()).sum::<f64>().ln();
        let entropy: f64 = logits.iter().map(|x| (x - log_total).exp() * (log_total - x)).sum();
        let weights = Operand::packed(Dtype::F32, [1, classes, 1], &vec![0.0; classes]);
        let targets = Operand::packed(Dtype::I64, [1, 1, 1], &[0.0]);
        let task = Task {
            entropy_bonus: 0.5,
            grad_scale,
            class_weights: Some(weights),
            ..Task::new(Operand::packed(Dtype::F32, sizes, &logits), targets)
        };
        for isa in isas() {
            let grad = task.run(Call::Fused, &How::on(isa)).grad;
            for (class, x) in logits.iter().enumerate().skip(2) {
                let log_p = x - log_total;
                let want = 0.5 * grad_scale * log_p.exp() * (log_p + entropy);
                let off = (grad[class] - want).abs() / want.abs();
                assert!(off <= 1e-6, "class {class} of {classes}: {:e}, not {want:e}", grad[class]);
            }
        }
    }
}

/// A bonus whose factor underflows to 0 leaves the gradient of the rest.
#[test]
fn vanishing_factors() {
    for sizes in SIZES {
        let [rows, _, inner] = sizes;
        let weights = Operand::packed(Dtype::F64, [rows, 1, inner], &vec![0.5; rows * inner]);
        let row_weights = Some(weights);
        let mut base = Task { row_weights, ..task(Dtype::F32, sizes, false) };
        base.logits.values.iter_mut().filter(|x| !x.is_finite()).for_each(|x| *x = 0.25);
        check(&Task { entropy_bonus: 5e-324, ..base }, How::on);
    }
}

/// Of ignored rows comes nothing, and without targets there is no bonus.
#[test]
fn no_rows() {
    for sizes in SIZES {
        let [rows, _, inner] = sizes;
        let ignored = Operand::packed(Dtype::I64, [rows, 1, inner], &vec![-100.0; rows * inner]);
        let base = Task { entropy_bonus: 2.0, ..task(Dtype::F32, sizes, false) };
        for reduction in [Reduction::Mean, Reduction::Sum] {
            for empty_is_zero in [false, true] {
                let targets = Some(ignored.clone());
                let task = Task { targets, reduction, empty_is_zero, ..base.clone() };
                check(&task, How::on);
                for isa in isas() {
                    let answer = task.run(Call::Fused, &How::on(isa));
                    let is_nan = reduction == Reduction::Mean && !empty_is_zero;
                    let bonus = answer.entropy_bonus.expect("a result");
                    assert!(bonus == 0.0 || is_nan && bonus.is_nan(), "{bonus}");
                    assert!(answer.grad.iter().all(|&g| g == 0.0));
                }
            }
        }
        let without = Task { entropy_bonus: 0.0, targets: None, ..base.clone() };
        let with = Task { targets: None, ..base };
        for isa in isas() {
            let how = How::on(isa);
            let [a, b] = [&with, &without].map(|task| task.run(Call::Evaluate, &how));
            a.assert_same(&b, "without targets");
        }
    }
}
