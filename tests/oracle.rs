//! The oracle, `common::reference`, against finite differences, its formulas as they are written,
//! PyTorch's values, and every edge case of docs/semantics.md.

use common::reference::{
    Case, Reduction, Targets, argmax, evaluate, log_softmax, log_softmax_backward, softmax,
    softmax_backward, sum,
};
use common::{INF, some};

const NAN: f64 = f64::NAN;

/// A linear congruential generator; its upper bits are random enough for test data.
struct Rng(u64);

impl Rng {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1);
        ((self.0 >> 33) as usize) % n
    }

    fn coin(&mut self) -> bool {
        self.below(2) == 1
    }

    fn pick(&mut self, from: &[f64]) -> f64 {
        from[self.below(from.len())]
    }

    fn uniform(&mut self, low: f64, high: f64) -> f64 {
        low + (high - low) * self.below(1 << 30) as f64 / f64::from(1 << 30)
    }

    fn vec(&mut self, n: usize, low: f64, high: f64) -> Vec<f64> {
        (0..n).map(|_| self.uniform(low, high)).collect()
    }

    /// A small case with random options and at least one kept row.
    fn case(&mut self) -> Case {
        let (rows, classes, inner) = (1 + self.below(3), 1 + self.below(5), 1 + self.below(2));
        let n = rows * inner;
        let logits = self.vec(n * classes, -3.0, 3.0);
        let mut case = Case::new(rows, classes, inner, logits);
        let indices = self.coin();
        case.targets = if indices {
            Targets::Indices((0..n).map(|_| self.below(classes) as i64).collect())
        } else {
            Targets::Probabilities(self.vec(n * classes, -0.5, 1.5))
        };
        if self.coin() {
            case.class_weights = Some(self.vec(classes, 0.2, 2.0));
        }
        if self.coin() {
            case.row_weights = Some(self.vec(n, 0.2, 2.0));
        }
        if self.coin() {
            case.row_mask = Some((0..n).map(|i| i == 0 || self.coin()).collect());
        }
        if let (Targets::Indices(t), true) = (&mut case.targets, self.coin()) {
            t[n - 1] = if n > 1 { case.ignore_index } else { 0 };
        }
        case.label_smoothing = self.pick(&[0.0, 0.0, 0.1, 0.6, 1.0]);
        case.log_probs = self.below(4) == 0;
        if !case.log_probs {
            case.z_loss = self.pick(&[0.0, 1e-2, 0.5]);
            case.entropy_bonus = self.pick(&[0.0, 0.1, -2.0]);
            case.softcap = self.pick(&[0.0, 2.0, 30.0]);
            case.logit_scale = self.pick(&[1.0, 0.5, 1.75]);
        }
        case.normalizer = self.pick(&[0.0, 0.0, 3.5]);
        case.z_normalizer = self.pick(&[0.0, 0.0, 2.5]);
        case.grad_scale = self.pick(&[1.0, 0.25, -3.0]);
        let which = self.below(3);
        case.reduction = [Reduction::Mean, Reduction::Sum, Reduction::None][which];
        let upstream = if which == 2 { n } else { 1 };
        case.grad_output = self.vec(upstream, -2.0, 2.0);
        case
    }
}

fn indices(classes: usize, logits: &[f64], t: &[i64]) -> Case {
    Case {
        targets: Targets::Indices(t.to_vec()),
        ..Case::new(t.len(), classes, 1, logits.to_vec())
    }
}

fn probabilities(classes: usize, logits: &[f64], t: &[f64]) -> Case {
    Case {
        targets: Targets::Probabilities(t.to_vec()),
        ..Case::new(logits.len() / classes, classes, 1, logits.to_vec())
    }
}

/// The same bits but for the sign of zero; any NaN equals any other.
#[track_caller]
fn same(a: &[f64], b: &[f64]) {
    let equal = |(a, b): (&f64, &f64)| a == b || a.is_nan() && b.is_nan();
    assert!(a.len() == b.len() && a.iter().zip(b).all(equal), "{a:?} is not {b:?}");
}

#[track_caller]
fn close(a: &[f64], b: &[f64], relative: f64) {
    assert_eq!(a.len(), b.len());
    for (a, b) in a.iter().zip(b) {
        let bound = relative * b.abs().max(1e-290);
        assert!(a == b || (a - b).abs() <= bound, "{a:e} is not {b:e}");
    }
}

/// What the gradients of `evaluate` are gradients of.
fn objective(case: &Case) -> f64 {
    let out = evaluate(case);
    let weighted = match case.reduction {
        Reduction::None => sum((0..out.row_losses.len())
            .map(|i| out.row_losses[i] * case.grad_output[i % case.grad_output.len()])),
        _ => out.loss * case.grad_output[0],
    };
    weighted * case.grad_scale
}

#[track_caller]
fn check_difference(case: &Case, gradient: f64, nudge: impl Fn(&mut Case, f64)) {
    let h = 1e-4;
    let at = |by: f64| {
        let mut case = case.clone();
        nudge(&mut case, by);
        objective(&case)
    };
    // Fourth order: the truncation stays below the rounding.
    let slope = (8.0 * (at(h) - at(-h)) - (at(2.0 * h) - at(-2.0 * h))) / (12.0 * h);
    assert!(
        (slope - gradient).abs() <= 1e-8 * gradient.abs().max(1.0),
        "{slope} by differences, {gradient} for {case:?}"
    );
}

#[test]
fn gradients_are_finite_differences() {
    let mut rng = Rng(1);
    // Plain f64: in an emulator a few show that.
    for _ in some(0..3000, 16) {
        let case = rng.case();
        let out = evaluate(&case);
        for (j, &g) in out.grad_logits.iter().enumerate() {
            check_difference(&case, g, |case, by| case.logits[j] += by);
            let tolerance = 1e-12 * g.abs();
            assert!(g.abs() <= 4.0 * out.grad_magnitude[j] + tolerance);
        }
        for (j, &g) in out.grad_targets.iter().enumerate() {
            check_difference(&case, g, |case, by| match &mut case.targets {
                Targets::Probabilities(t) => t[j] += by,
                _ => unreachable!(),
            });
        }
    }
}

/// The formulas for index targets, transcribed without regard to accuracy.
#[test]
fn index_formulas_as_written() {
    let mut rng = Rng(2);
    for _ in 0..2000 {
        let case = rng.case();
        let Targets::Indices(t) = &case.targets else {
            continue;
        };
        let out = evaluate(&case);
        let classes = case.classes;
        let eps = case.label_smoothing;
        let weight_sum: f64 = (0..classes).map(|c| case.class_weight(c)).sum();
        let (mut ce, mut z, mut bonus, mut d, mut dz, mut kept) = (0.0, 0.0, 0.0, 0.0, 0.0, 0);
        for i in (0..t.len()).filter(|&i| case.is_kept(i)) {
            let at = |c: usize| case.at(i / case.inner, c, i % case.inner);
            let x: Vec<f64> = (0..classes)
                .map(|c| case.logits[at(c)] * case.logit_scale)
                .map(|x| match case.softcap {
                    0.0 => x,
                    cap => cap * (x / cap).tanh(),
                })
                .collect();
            let lse = match case.log_probs {
                true => 0.0,
                false => x.iter().map(|x| x.exp()).sum::<f64>().ln(),
            };
            let y = t[i] as usize;
            let (r, w) = (case.row_weight(i), |c| case.class_weight(c));
            let spread: f64 = (0..classes).map(|c| w(c) * (lse - x[c])).sum();
            let row = r * ((1.0 - eps) * w(y) * (lse - x[y]) + eps / classes as f64 * spread);
            let row_z = r * case.z_loss * lse * lse;
            let entropy: f64 = x.iter().map(|x| (x - lse).exp() * (lse - x)).sum();
            let row_bonus = -r * case.entropy_bonus * entropy;
            assert!((out.row_losses[i] - (row + row_z + row_bonus)).abs() < 1e-12);
            ce += row;
            z += row_z;
            bonus += row_bonus;
            d += r * w(y);
            dz += r;
            kept += 1;
            if case.reduction != Reduction::None || case.log_probs {
                continue;
            }
            for (c, x) in x.iter().enumerate() {
                let p = (x - lse).exp();
                let is_target = f64::from(c == y);
                let mut g = (1.0 - eps) * w(y) * (p - is_target)
                    + eps / classes as f64 * (weight_sum * p - w(c))
                    + 2.0 * case.z_loss * lse * p
                    + case.entropy_bonus * p * (x - lse + entropy);
                if case.softcap > 0.0 {
                    g *= 1.0 - (x / case.softcap).powi(2);
                }
                g *= r * case.logit_scale * case.grad_output[i] * case.grad_scale;
                assert!((out.grad_logits[at(c)] - g).abs() < 1e-12);
            }
        }
        let or = |given: f64, usual: f64| if given > 0.0 { given } else { usual };
        let (d, dz) = (or(case.normalizer, d), or(case.z_normalizer, dz));
        close(&[out.normalizer, out.z_normalizer], &[d, dz], 1e-14);
        assert_eq!(out.kept_rows, kept);
        let expected = match case.reduction {
            Reduction::Mean => [ce / d + (z + bonus) / dz, z / dz, bonus / dz],
            Reduction::Sum => [ce + z + bonus, z, bonus],
            Reduction::None => [NAN; 3],
        };
        if case.reduction == Reduction::None {
            same(&[out.loss, out.z_loss, out.entropy_bonus], &expected);
        } else {
            assert!((out.loss - expected[0]).abs() < 1e-11);
            assert!((out.z_loss - expected[1]).abs() < 1e-11);
            assert!((out.entropy_bonus - expected[2]).abs() < 1e-11);
        }
    }
}

#[test]
fn gradient_rows_sum_to_zero() {
    let mut rng = Rng(3);
    for _ in 0..500 {
        let case = Case { log_probs: false, softcap: 0.0, z_loss: 0.0, ..rng.case() };
        let out = evaluate(&case);
        for row in 0..case.rows {
            for k in 0..case.inner {
                let at = |c| case.at(row, c, k);
                let total = sum((0..case.classes).map(|c| out.grad_logits[at(c)]));
                assert!(total.abs() < 1e-13);
            }
        }
    }
}

#[test]
fn one_hot_is_index_and_smoothing_is_smoothed_probabilities() {
    let mut rng = Rng(4);
    for _ in 0..500 {
        let index = Case { class_weights: None, ..rng.case() };
        let Targets::Indices(t) = &index.targets else {
            continue;
        };
        let (classes, inner) = (index.classes, index.inner);
        let eps = index.label_smoothing;
        let mask: Vec<bool> = (0..t.len()).map(|i| index.is_kept(i)).collect();
        let mut hot = vec![0.0; index.logits.len()];
        for i in (0..t.len()).filter(|&i| mask[i]) {
            hot[index.at(i / inner, t[i] as usize, i % inner)] = 1.0;
        }
        let smooth = hot.iter().map(|t| (1.0 - eps) * t + eps / classes as f64).collect();
        let one_hot =
            Case { targets: Targets::Probabilities(hot), row_mask: Some(mask), ..index.clone() };
        let smoothed = Case {
            targets: Targets::Probabilities(smooth),
            label_smoothing: 0.0,
            ..one_hot.clone()
        };
        let expected = evaluate(&index);
        for out in [evaluate(&one_hot), evaluate(&smoothed)] {
            if index.reduction != Reduction::None {
                close(&[out.loss], &[expected.loss], 1e-14);
            }
            close(&out.row_losses, &expected.row_losses, 1e-14);
            for (a, b) in out.grad_logits.iter().zip(&expected.grad_logits) {
                assert!((a - b).abs() <= 1e-14);
            }
        }
    }
}

/// Values from PyTorch 2.15.
#[test]
fn pytorch_golden_values() {
    let loss = evaluate(&indices(4, &[0.1, 0.2, 0.3, 0.4], &[0])).loss;
    close(&[loss], &[1.5425355294551628], 1e-15);

    let x = [[0.5, -1.25, 2.0, 0.0], [3.0, 1.0, -2.0, 0.5], [-0.75, 0.25, 1.5, 1.0]].concat();
    let plain = indices(4, &x, &[2, -100, 1]);
    let out = evaluate(&plain);
    close(&[out.loss], &[1.1384314136465783], 1e-14);
    let grad = [
        [0.07984677501605413, 0.013875288966340205, -0.14215158110880782, 0.048429517126413524],
        [0.0; 4],
        [0.026370445218159413, -0.42831769795510255, 0.25019581811706043, 0.1517514346198827],
    ];
    close(&out.grad_logits, &grad.concat(), 1e-14);

    let weighted = Case {
        class_weights: Some(vec![0.5, 2.0, 0.0, -1.5]),
        label_smoothing: 0.1,
        ..plain.clone()
    };
    let out = evaluate(&weighted);
    close(&[out.loss], &[1.8500260785617093], 1e-14);
    let rows = [0.11461246531509156, 0.0, 3.585439691808327];
    close(&out.row_losses, &rows, 1e-14);
    let grad = [
        [-0.004253830624598648, -0.024653117775841497, 0.008946210472279802, 0.01996073792816034],
        [0.0; 4],
        [0.041876062523140925, -0.7941797987680622, 0.4566073680636353, 0.2956963681812859],
    ];
    close(&out.grad_logits, &grad.concat(), 1e-13);

    let soft = [[0.1, 0.2, 0.3, 0.4], [0.0, 1.0, 0.0, 0.0], [0.5, 0.5, -0.25, 1.0]];
    let out =
        evaluate(&Case { targets: Targets::Probabilities(soft.concat()), ..weighted.clone() });
    close(&[out.loss], &[1.6973232838968384], 1e-14);
    let grad = [
        [-0.025022096834510645, -0.13768418785753161, -0.026242217385354122, 0.18894850207739636],
        [0.49277345021679003, -0.5494131351966086, 0.0033483561692800668, 0.053291328810538656],
        [-0.08268272602908792, -0.32622430693931964, -0.03335944241560808, 0.44226647538401564],
    ];
    close(&out.grad_logits, &grad.concat(), 1e-13);

    let out = evaluate(&Case { log_probs: true, label_smoothing: 0.0, ..weighted });
    same(&[out.loss], &[-0.25]);
    let grad = [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0];
    same(&out.grad_logits, &grad);
    assert!(out.lse.is_empty() && out.entropy.is_empty());

    let p = [0.15969355003210822, 0.027750577932680404, 0.7156968377823844, 0.09685903425282705];
    let logp =
        [-1.8344986126036624, -3.5844986126036624, -0.33449861260366254, -2.3344986126036624];
    close(&softmax(&x[..4], 1, 4, 1), &p, 1e-15);
    close(&log_softmax(&x[..4], 1, 4, 1), &logp, 1e-15);
}

#[test]
fn no_kept_row() {
    let none = Case { z_loss: 0.1, ..indices(2, &[1.0, NAN, INF, 2.0], &[-100, -100]) };
    let loss = |case: Case| {
        let out = evaluate(&case);
        same(&out.grad_logits, &[0.0; 4]);
        same(&out.row_losses, &[0.0; 2]);
        assert_eq!(out.kept_rows, 0);
        [out.loss, out.z_loss]
    };
    same(&loss(none.clone()), &[NAN, NAN]);
    let zero = Case { empty_is_zero: true, ..none.clone() };
    same(&loss(zero), &[0.0, 0.0]);
    // The parts are judged apart.
    let given = Case { normalizer: 2.0, ..none.clone() };
    same(&loss(given.clone()), &[NAN, NAN]);
    same(&loss(Case { z_loss: 0.0, ..given.clone() }), &[0.0, 0.0]);
    same(&loss(Case { z_normalizer: 2.0, ..given }), &[0.0, 0.0]);
    same(&loss(Case { z_normalizer: 2.0, ..none.clone() }), &[NAN, 0.0]);
    same(&loss(Case { reduction: Reduction::Sum, ..none }), &[0.0, 0.0]);

    // Zero rows, with and without classes.
    for classes in [0, 3] {
        let out = evaluate(&indices(classes, &[], &[]));
        same(&[out.loss, out.normalizer], &[NAN, 0.0]);
    }
}

#[test]
fn zero_denominator() {
    let zero = Case { class_weights: Some(vec![0.0, 2.0]), ..indices(2, &[-1.0, -2.0], &[0]) };
    let out = evaluate(&zero);
    same(&[out.loss], &[NAN]);
    same(&out.grad_logits, &[NAN, NAN]);
    let out = evaluate(&Case { log_probs: true, ..zero.clone() });
    same(&[out.loss], &[NAN]);
    same(&out.grad_logits, &[NAN, 0.0]);
    // Only a mean without kept rows is excused.
    let excused = Case { empty_is_zero: true, ..zero };
    same(&[evaluate(&excused).loss], &[NAN]);

    let opposite =
        Case { class_weights: Some(vec![1.0, -1.0]), ..indices(2, &[1.0, 2.0, 1.0, 5.0], &[0, 1]) };
    same(&[evaluate(&opposite).loss], &[INF]);
}

#[test]
#[should_panic(expected = "zero classes")]
fn zero_classes() {
    evaluate(&Case::new(1, 0, 1, Vec::new()));
}

#[test]
fn minus_infinity() {
    // Beside the target: probability 0 and nothing else.
    let x = [1.0, -INF, 2.0];
    let out = evaluate(&indices(3, &x, &[0]));
    let two = evaluate(&indices(2, &[1.0, 2.0], &[0]));
    same(&[out.loss, out.lse[0]], &[two.loss, two.lse[0]]);
    same(&out.entropy, &two.entropy);
    same(&out.grad_logits[1..2], &[0.0]);

    // At the target.
    let out = evaluate(&indices(3, &x, &[1]));
    same(&[out.loss], &[INF]);
    same(&out.grad_logits[1..2], &[-1.0]);
    assert!(out.grad_logits[0].is_finite());

    // Under smoothing.
    let smooth = Case { label_smoothing: 0.3, ..indices(3, &x, &[0]) };
    let out = evaluate(&smooth);
    same(&[out.loss], &[INF]);
    close(&out.grad_logits[1..2], &[-0.1], 1e-15);

    // Where the factor is 0.
    let weightless = Case { class_weights: Some(vec![1.0, 0.0, 1.0]), ..smooth };
    assert!(evaluate(&weightless).loss.is_finite());
    let soft = probabilities(3, &x, &[0.25, 0.0, 0.75]);
    let out = evaluate(&soft);
    assert!(out.loss.is_finite());
    same(&out.grad_logits[1..2], &[0.0]);
    same(&out.grad_targets[1..2], &[INF]);
    let only_smoothing =
        Case { label_smoothing: 1.0, ..probabilities(2, &[0.0, 0.0], &[NAN, INF]) };
    close(&[evaluate(&only_smoothing).loss], &[std::f64::consts::LN_2], 1e-15);

    // Under a cap it is an ordinary logit without slope.
    let capped = Case { softcap: 3.0, ..indices(3, &x, &[1]) };
    let out = evaluate(&capped);
    assert!(out.loss.is_finite());
    same(&out.grad_logits[1..2], &[0.0]);

    // A whole row, between two others.
    let x = [1.0, 2.0, -INF, -INF, 3.0, 1.0];
    let out = evaluate(&Case { reduction: Reduction::Sum, ..indices(2, &x, &[0, 0, 1]) });
    same(&[out.loss, out.row_losses[1]], &[NAN, NAN]);
    same(&out.lse[1..2], &[-INF]);
    same(&out.grad_logits[2..4], &[NAN, NAN]);
    assert_eq!(out.argmax, [1, 0, 0]);
    for j in [0, 1, 4, 5] {
        assert!(out.grad_logits[j].is_finite());
    }
}

#[test]
fn nan_and_plus_infinity() {
    let x = [1.0, 2.0, INF, 0.0, NAN, INF, 0.0, 1.0];
    let case = Case { reduction: Reduction::None, ..indices(2, &x, &[0, 1, 1, 1]) };
    let out = evaluate(&case);
    same(&out.row_losses[1..3], &[NAN, NAN]);
    same(&out.grad_logits[2..6], &[NAN; 4]);
    same(&out.lse[1..3], &[INF, NAN]);
    same(&out.entropy[1..3], &[NAN, NAN]);
    assert_eq!(out.argmax, [1, 0, 0, 1]);
    let alone = evaluate(&indices(2, &x[..2], &[0]));
    same(&out.row_losses[..1], &[alone.loss]);
    same(&out.grad_logits[..2], &alone.grad_logits);

    // A mass of 0 does not hide them, a row weight of 0 and ignoring do.
    let weightless = Case { class_weights: Some(vec![1.0, 0.0]), ..case.clone() };
    same(&evaluate(&weightless).row_losses[1..3], &[NAN, NAN]);
    let row_weights = Case { row_weights: Some(vec![1.0, 0.0, 0.0, 1.0]), ..case.clone() };
    let masked = Case { row_mask: Some(vec![true, false, false, true]), ..case.clone() };
    let ignored = indices(2, &x, &[0, -100, -100, 1]);
    for (hidden, kept) in [(row_weights, 4), (masked, 2), (ignored, 2)] {
        for reduction in [Reduction::Mean, Reduction::Sum, Reduction::None] {
            let out = evaluate(&Case { reduction, ..hidden.clone() });
            same(&out.row_losses[1..3], &[0.0, 0.0]);
            same(&out.grad_logits[2..6], &[0.0; 4]);
            same(&out.lse[1..3], &[INF, NAN]);
            assert_eq!(out.kept_rows, kept);
            assert_eq!(out.loss.is_finite(), reduction != Reduction::None);
            let upstream = if reduction == Reduction::Mean { 0.5 } else { 1.0 };
            let expected: Vec<f64> = alone.grad_logits.iter().map(|g| g * upstream).collect();
            same(&out.grad_logits[..2], &expected);
        }
    }

    // A cap makes +inf finite; rounding to f32 makes a large logit infinite.
    let capped = Case { softcap: 5.0, ..indices(2, &[INF, 0.0], &[0]) };
    close(&[evaluate(&capped).loss], &[(-5.0f64).exp().ln_1p()], 1e-14);
    let large =
        Case { logit_scale: 2.0, round_scaled_to_f32: true, ..indices(2, &[3e38, 0.0], &[0]) };
    let out = evaluate(&large);
    same(&[out.loss, out.lse[0]], &[NAN, INF]);
    let wide = Case { round_scaled_to_f32: false, ..large };
    same(&[evaluate(&wide).loss], &[0.0]);
}

#[test]
fn ignored_rows_keep_their_statistics() {
    let x = [0.0, 3.0, 1.0, 2.0];
    let all = evaluate(&indices(2, &x, &[1, 0]));
    let one = evaluate(&Case { ignore_index: 0, ..indices(2, &x, &[1, 0]) });
    same(&one.lse, &all.lse);
    same(&one.entropy, &all.entropy);
    assert_eq!(one.argmax, [1, 1]);
    assert_eq!((one.kept_rows, one.correct), (1, 1));
    // Class 0 still takes part in the softmax.
    same(&[one.loss], &all.row_losses[..1]);
    same(&one.grad_logits[2..], &[0.0, 0.0]);
    // Probability targets know no ignore_index.
    let soft = Case { ignore_index: 0, ..probabilities(2, &x, &[0.0, 1.0, 1.0, 0.0]) };
    assert_eq!(evaluate(&soft).kept_rows, 2);
    // A masked row may hold any target, and a NaN upstream gradient stays out of it.
    let masked = evaluate(&Case {
        row_mask: Some(vec![true, false]),
        reduction: Reduction::None,
        grad_output: vec![1.0, NAN],
        ..indices(2, &x, &[1, 77])
    });
    same(&masked.grad_logits[2..], &[0.0, 0.0]);
}

#[test]
#[should_panic(expected = "targets[1] = 2")]
fn target_out_of_range() {
    evaluate(&indices(2, &[0.0; 4], &[0, 2]));
}

#[test]
fn argmax_rules() {
    assert_eq!(argmax(&[1.0, 3.0, 3.0]), 1);
    assert_eq!(argmax(&[-0.0, 0.0]), 0);
    assert_eq!(argmax(&[-INF, -INF]), 0);
    assert_eq!(argmax(&[INF, 1.0, NAN, NAN]), 2);
    // Over the logits as stored: a cap may tie what differs.
    let capped = evaluate(&Case { softcap: 1.0, ..Case::new(1, 2, 1, vec![100.0, 200.0]) });
    assert_eq!(capped.argmax, [1]);
    assert!(capped.loss.is_nan() && capped.row_losses.is_empty());
    assert!(capped.grad_logits.is_empty());
}

#[test]
fn a_common_offset_changes_nothing() {
    let mut rng = Rng(5);
    for offset in [1e4, -1e4] {
        // Multiples of 2⁻²⁰: the offset is exact.
        let x: Vec<f64> = (0..64).map(|_| rng.below(1 << 24) as f64 / f64::from(1 << 20)).collect();
        let shifted: Vec<f64> = x.iter().map(|x| x + offset).collect();
        let smooth =
            |x: &[f64]| evaluate(&Case { label_smoothing: 0.1, ..indices(16, x, &[3, 0, 15, 8]) });
        let (a, b) = (smooth(&x), smooth(&shifted));
        same(&a.row_losses, &b.row_losses);
        same(&a.grad_logits, &b.grad_logits);
    }
}

#[test]
fn confident_rows_keep_their_accuracy() {
    for gap in [1.0, 10.0, 34.5, 40.0, 69.25, 300.0] {
        for offset in [0.0, 1024.0, -1024.0] {
            let x = [offset, offset - gap, offset - gap, offset - gap];
            let rest = 3.0 * f64::exp(-gap);
            let out = evaluate(&indices(4, &x, &[0]));
            close(&[out.loss], &[rest.ln_1p()], 1e-15);
            let (p, other) = (-rest / (1.0 + rest), rest / 3.0 / (1.0 + rest));
            close(&out.grad_logits, &[p, other, other, other], 1e-15);
            close(&out.grad_magnitude, &[-p, other, other, other], 1e-15);
            let soft = evaluate(&probabilities(4, &x, &[1.0, 0.0, 0.0, 0.0]));
            same(&[soft.loss], &[out.loss]);
            same(&soft.grad_logits, &out.grad_logits);
        }
    }
    assert!(evaluate(&indices(2, &[69.25, 0.0], &[0])).loss < 1e-30);
    for x in [&[7.0][..], &[7.0, -INF, -INF]] {
        let out = evaluate(&indices(x.len(), x, &[0]));
        same(&[out.loss], &[0.0]);
        same(&out.grad_logits, &vec![0.0; x.len()]);
        same(&out.entropy, &[0.0]);
    }
}

#[test]
fn sums_are_compensated() {
    same(&[sum([1.0, 1e100, 1.0, -1e100])], &[2.0]);
    same(&[sum([1.0, INF, 1.0]), sum([INF, -INF])], &[INF, NAN]);
    // Off by more than 1e-12 when simply added up.
    let n = 1 << 20;
    let out = evaluate(&indices(n, &vec![0.1; n], &[0]));
    close(&[out.loss], &[(n as f64).ln()], 1e-15);
}

#[test]
fn scales_of_cancelling_terms() {
    // Loss terms of both signs.
    let case = Case { reduction: Reduction::Sum, ..probabilities(2, &[0.0, 0.0], &[3.0, -3.0]) };
    let out = evaluate(&case);
    same(&[out.loss], &[0.0]);
    close(&out.loss_scale, &[3.0 * std::f64::consts::LN_2], 1e-15);
    close(&out.grad_magnitude, &[3.0, 3.0], 1e-15);
    // p − t under smoothing: what cancels is T·p with the target's mass.
    let smooth = Case { label_smoothing: 0.1, ..indices(2, &[f64::ln(19.0), 0.0], &[0]) };
    let out = evaluate(&smooth);
    assert!(out.grad_logits[0].abs() < 1e-15);
    close(&out.grad_magnitude, &[0.95, 0.05], 1e-14);
}

#[test]
fn softmax_and_log_softmax() {
    let mut rng = Rng(6);
    let dims @ [rows, classes, inner] = [2, 4, 3];
    let n: usize = dims.iter().product();
    let (x, g) = (rng.vec(n, -3.0, 3.0), rng.vec(n, -1.0, 1.0));
    let y = softmax(&x, rows, classes, inner);
    let log_y = log_softmax(&x, rows, classes, inner);
    let dot = |y: &[f64]| sum(y.iter().zip(&g).map(|(y, g)| y * g));
    let grad = softmax_backward(&y, &g, rows, classes, inner);
    let log_grad = log_softmax_backward(&log_y, &g, rows, classes, inner);
    for j in 0..n {
        assert!((y[j].ln() - log_y[j]).abs() < 1e-14);
        let at = |h: f64| {
            let mut x = x.clone();
            x[j] += h;
            let (y, log_y) =
                (softmax(&x, rows, classes, inner), log_softmax(&x, rows, classes, inner));
            [dot(&y), dot(&log_y)]
        };
        let (up, down) = (at(1e-5), at(-1e-5));
        assert!(((up[0] - down[0]) / 2e-5 - grad[j]).abs() < 1e-8);
        assert!(((up[1] - down[1]) / 2e-5 - log_grad[j]).abs() < 1e-8);
    }
    for x in [[INF, 1.0], [NAN, 1.0], [-INF, -INF]] {
        same(&softmax(&x, 1, 2, 1), &[NAN, NAN]);
        same(&log_softmax(&x, 1, 2, 1), &[NAN, NAN]);
    }
    same(&softmax(&[-INF, 1.0], 1, 2, 1), &[0.0, 1.0]);
    same(&log_softmax(&[-INF, 1.0], 1, 2, 1), &[-INF, 0.0]);
    assert!(softmax(&[], 3, 0, 2).is_empty());
}
