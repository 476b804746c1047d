//! The oracle: every formula of docs/semantics.md as plain `f64` loops over dense row-major data. It
//! shares no code with the kernels, and the tests compare every kernel with it.
//!
//! Three devices make it more accurate than the kernels. It leaves the largest logit of a row out of
//! the sum, `lse = max + ln(1 + Σ others)`, so that a confident row keeps the relative accuracy of
//! `−ln p` and of `1 − p`. It carries the rounding error of each difference of logits, so that a
//! large common offset costs nothing. It compensates long sums.
//!
//! A malformed problem (wrong lengths, a target out of range, a parameter outside its domain)
//! panics. Other tests check the library's errors.

use crate::fused::fused;

/// Target operand of a [`Case`].
#[derive(Clone, Debug, PartialEq)]
pub enum Targets {
    /// No target: only `lse`, `argmax` and `entropy` are defined.
    None,
    /// Class indices, `[rows, inner]`.
    Indices(Vec<i64>),
    /// Class probabilities, `[rows, classes, inner]`; neither normalised nor checked.
    Probabilities(Vec<f64>),
}

/// How row losses become the loss.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reduction {
    /// The sum over the kept rows, divided by the normalizers.
    Mean,
    /// The sum over the kept rows.
    Sum,
    /// Row losses only; every row has its own upstream gradient.
    None,
}

/// One cross-entropy problem: operands and options.
#[derive(Clone, Debug, PartialEq)]
pub struct Case {
    /// Number of rows, N.
    pub rows: usize,
    /// Number of classes, C.
    pub classes: usize,
    /// Number of inner positions, K; the problem has N·K softmax distributions.
    pub inner: usize,
    /// Logits as stored, upcast, `[rows, classes, inner]`.
    pub logits: Vec<f64>,
    /// Targets.
    pub targets: Targets,
    /// Class weights, `[classes]`.
    pub class_weights: Option<Vec<f64>>,
    /// Row weights, `[rows, inner]`.
    pub row_weights: Option<Vec<f64>>,
    /// Row mask, `[rows, inner]`; a `false` row is ignored.
    pub row_mask: Option<Vec<bool>>,
    /// Target index that marks an ignored row; not applied to probability targets.
    pub ignore_index: i64,
    /// Label smoothing ε, in `[0, 1]`.
    pub label_smoothing: f64,
    /// Coefficient λ of the `lse²` penalty; 0 is off.
    pub z_loss: f64,
    /// Cap of `cap·tanh(x/cap)`, applied after the scale; 0 is off.
    pub softcap: f64,
    /// Factor on the logits.
    pub logit_scale: f64,
    /// Replaces the denominator of the cross-entropy part under [`Reduction::Mean`] if positive.
    pub normalizer: f64,
    /// Replaces the denominator of the z-loss part and of the entropy bonus's under [`Reduction::Mean`] if positive.
    pub z_normalizer: f64,
    /// Reduction over rows.
    pub reduction: Reduction,
    /// The logits already are log-probabilities (NLL loss).
    pub log_probs: bool,
    /// A mean over no kept rows is 0 instead of NaN.
    pub empty_is_zero: bool,
    /// Round scaled and capped logits to `f32`, as the kernels for `f32` and half inputs do.
    pub round_scaled_to_f32: bool,
    /// Upstream gradient: one element, or `[rows, inner]` with [`Reduction::None`], where a
    /// single element stands for all rows.
    pub grad_output: Vec<f64>,
    /// Further factor on the gradient.
    pub grad_scale: f64,
    /// Weight β of the entropy, which row losses have subtracted; 0 is off.
    pub entropy_bonus: f64,
}

impl Case {
    /// A case without targets, every option at its default.
    pub fn new(rows: usize, classes: usize, inner: usize, logits: Vec<f64>) -> Case {
        Case {
            rows,
            classes,
            inner,
            logits,
            targets: Targets::None,
            class_weights: None,
            row_weights: None,
            row_mask: None,
            ignore_index: -100,
            label_smoothing: 0.0,
            z_loss: 0.0,
            softcap: 0.0,
            logit_scale: 1.0,
            normalizer: 0.0,
            z_normalizer: 0.0,
            reduction: Reduction::Mean,
            log_probs: false,
            empty_is_zero: false,
            round_scaled_to_f32: false,
            grad_output: vec![1.0],
            grad_scale: 1.0,
            entropy_bonus: 0.0,
        }
    }
}

/// Everything a [`Case`] defines.
///
/// Where terms cancel, errors are relative to the two `*_scale` fields and to `grad_magnitude`. These
/// are meaningful only for finite values.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// The reduced loss; NaN with [`Reduction::None`] and without targets.
    pub loss: f64,
    /// The z-loss part of `loss`; NaN with [`Reduction::None`] and without targets.
    pub z_loss: f64,
    /// The entropy bonus's part of `loss`; NaN with [`Reduction::None`] and without targets.
    pub entropy_bonus: f64,
    /// Denominator of the cross-entropy part under a mean, whatever the reduction; NaN without
    /// targets.
    pub normalizer: f64,
    /// Denominator of the z-loss part under a mean, whatever the reduction; NaN without targets.
    pub z_normalizer: f64,
    /// Number of rows that are not ignored.
    pub kept_rows: u64,
    /// Row losses before the reduction's division, `[rows, inner]`; 0 where ignored. Empty
    /// without targets.
    pub row_losses: Vec<f64>,
    /// Log-sum-exp of the scaled and capped logits, `[rows, inner]`. Empty with `log_probs`.
    pub lse: Vec<f64>,
    /// Index of the maximum of the logits as stored, `[rows, inner]`: the lowest on ties, the
    /// first NaN if there is one.
    pub argmax: Vec<i64>,
    /// Kept rows whose `argmax` is the target index; 0 unless the targets are indices.
    pub correct: u64,
    /// Entropy of the softmax, `[rows, inner]`. Empty with `log_probs`.
    pub entropy: Vec<f64>,
    /// `Σ t'·(ln t' − logp)` for probability targets, `[rows, inner]`; 0 where ignored. Empty otherwise.
    pub kl: Vec<f64>,
    /// The sum of the absolute terms of `kl`.
    pub kl_scale: Vec<f64>,
    /// Gradient with respect to the logits, `[rows, classes, inner]`. Empty without targets.
    pub grad_logits: Vec<f64>,
    /// Gradient with respect to probability targets, `[rows, classes, inner]`. Empty otherwise.
    pub grad_targets: Vec<f64>,
    /// The largest absolute term summed into the row's loss, `[rows, inner]`. Empty without
    /// targets.
    pub loss_scale: Vec<f64>,
    /// The larger of `|max|` and `ln Σ exp(x − max)`, whose sum `lse` is, `[rows, inner]`. Empty
    /// with `log_probs`.
    pub lse_scale: Vec<f64>,
    /// Per gradient entry the largest absolute term that formed it, factors included,
    /// `[rows, classes, inner]`. `p − 1` at the target of an index without smoothing is one term:
    /// it has to be accurate by itself. Empty without targets.
    pub grad_magnitude: Vec<f64>,
}

/// Neumaier's compensated sum.
#[derive(Clone, Copy, Default)]
struct Sum {
    sum: f64,
    lost: f64,
}

impl Sum {
    fn add(&mut self, x: f64) {
        let sum = self.sum + x;
        self.lost +=
            if self.sum.abs() >= x.abs() { (self.sum - sum) + x } else { (x - sum) + self.sum };
        self.sum = sum;
    }

    fn value(self) -> f64 {
        self.minus(0.0)
    }

    /// The sum without its term `x`.
    fn minus(self, x: f64) -> f64 {
        // Past an infinity the compensation is inf − inf.
        let lost = if self.sum.is_finite() { self.lost } else { 0.0 };
        (self.sum - x) + lost
    }
}

/// The compensated sum of `terms`.
pub fn sum(terms: impl IntoIterator<Item = f64>) -> f64 {
    let mut total = Sum::default();
    for x in terms {
        total.add(x);
    }
    total.value()
}

/// `factor·x`, where a factor of 0 annihilates infinities and NaN too.
fn times(factor: f64, x: f64) -> f64 {
    if factor == 0.0 { 0.0 } else { factor * x }
}

/// `exp(a − b)`, the rounding error of the difference included.
fn exp_difference(a: f64, b: f64) -> f64 {
    let d = a - b;
    if !d.is_finite() {
        return d.exp();
    }
    let t = d - a;
    let error = (a - (d - t)) - (b + t);
    d.exp() * (1.0 + error)
}

/// The softmax of one row.
struct Distribution {
    lse: f64,
    lse_scale: f64,
    entropy: f64,
    p: Vec<f64>,
    /// `1 − p`, without cancellation.
    one_minus_p: Vec<f64>,
    logp: Vec<f64>,
    /// There is no softmax: a NaN, a +inf, or nothing but −inf.
    undefined: bool,
}

impl Distribution {
    fn new(x: &[f64]) -> Distribution {
        let undefined = |lse: f64| Distribution {
            lse,
            lse_scale: lse.abs(),
            entropy: f64::NAN,
            p: vec![f64::NAN; x.len()],
            one_minus_p: vec![f64::NAN; x.len()],
            logp: vec![f64::NAN; x.len()],
            undefined: true,
        };
        if x.iter().any(|v| v.is_nan()) {
            return undefined(f64::NAN);
        }
        let top = argmax(x);
        let max = x[top];
        if max.is_infinite() {
            return undefined(max);
        }
        let e: Vec<f64> = x.iter().map(|&v| exp_difference(v, max)).collect();
        let others = sum((0..x.len()).filter(|&c| c != top).map(|c| e[c]));
        let total = 1.0 + others;
        let log_total = others.ln_1p();
        let p: Vec<f64> = e.iter().map(|e| e / total).collect();
        // For a class other than the largest, e ≤ 1 ≤ total − e: nothing cancels.
        let one_minus_p =
            (0..x.len()).map(|c| if c == top { others } else { total - e[c] } / total).collect();
        // Both terms are ≤ 0.
        let logp: Vec<f64> = x.iter().map(|v| (v - max) - log_total).collect();
        Distribution {
            lse: max + log_total,
            lse_scale: max.abs().max(log_total),
            entropy: sum((0..x.len()).map(|c| times(p[c], -logp[c]))),
            p,
            one_minus_p,
            logp,
            undefined: false,
        }
    }
}

/// The targets of listed classes as those of all classes, `[rows, classes, inner]`. Both lists are `[rows, k, inner]`;
/// places of the class `unused` are left out.
pub fn spread_targets(
    classes: &[i64],
    values: &[f64],
    [rows, all, inner]: [usize; 3],
    unused: i64,
) -> Vec<f64> {
    let mut targets = vec![0.0; rows * all * inner];
    // A row with a NaN is NaN.
    let places = classes.len().checked_div(rows * inner).unwrap_or(0);
    for (i, (&class, &value)) in classes.iter().zip(values).enumerate() {
        let (row, k) = (i / (places * inner), i % inner);
        let inside = usize::try_from(class).ok().filter(|&class| class < all);
        if let Some(class) = inside.filter(|_| class != unused) {
            targets[(row * all + class) * inner + k] += value;
            if value.is_nan() {
                (0..all).for_each(|class| targets[(row * all + class) * inner + k] = value);
            }
        }
    }
    targets
}

/// The classes of a row in the order of their logits, the largest first and a NaN before every number; of equal ones
/// the lower class first.
pub fn order(x: &[f64]) -> Vec<usize> {
    let mut classes: Vec<usize> = (0..x.len()).collect();
    classes.sort_by(|&a, &b| match (x[a].is_nan(), x[b].is_nan()) {
        (false, false) => x[b].partial_cmp(&x[a]).expect("numbers"),
        (a, b) => b.cmp(&a),
    });
    classes
}

/// The lowest index of a NaN if there is one, else of the maximum.
pub fn argmax(x: &[f64]) -> usize {
    let mut best = 0;
    for (c, &v) in x.iter().enumerate() {
        if v.is_nan() {
            return c;
        }
        if v > x[best] {
            best = c;
        }
    }
    best
}

/// The weighted, smoothed target distribution `w_c·t'_c` of one row.
struct Mass {
    /// `(1 − ε)·w_c·t_c`, with `t_c = [c = y]` for an index.
    target: Vec<f64>,
    /// `(ε/C)·w_c`.
    smoothing: Vec<f64>,
    /// `w_c·t'_c`.
    both: Vec<f64>,
    /// Whether the class has a term in the loss, even of mass 0.
    present: Vec<bool>,
    total: Sum,
}

impl Mass {
    fn new(case: &Case, row: usize, k: usize) -> Mass {
        let classes = case.classes;
        let eps = case.label_smoothing;
        let mut mass = Mass {
            target: vec![0.0; classes],
            smoothing: vec![0.0; classes],
            both: vec![0.0; classes],
            present: vec![false; classes],
            total: Sum::default(),
        };
        for c in 0..classes {
            let w = case.class_weight(c);
            let t = match &case.targets {
                Targets::None => unreachable!("no mass without targets"),
                Targets::Indices(t) => f64::from(t[row * case.inner + k] == c as i64),
                Targets::Probabilities(t) => t[case.at(row, c, k)],
            };
            let target = times(1.0 - eps, t);
            let smoothing = eps / classes as f64;
            mass.target[c] = times(w, target);
            mass.smoothing[c] = times(w, smoothing);
            mass.both[c] = times(w, target + smoothing);
            mass.present[c] = match case.targets {
                // A class of weight 0 has no smoothing term.
                Targets::Indices(_) => t != 0.0 || (eps != 0.0 && w != 0.0),
                _ => true,
            };
            if mass.both[c] != 0.0 {
                mass.total.add(mass.both[c]);
            }
        }
        mass
    }
}

/// The largest absolute value.
fn largest(terms: &[f64]) -> f64 {
    terms.iter().fold(0.0, |m, x| m.max(x.abs()))
}

impl Case {
    /// The index of an element of `[rows, classes, inner]`.
    pub fn at(&self, row: usize, class: usize, k: usize) -> usize {
        (row * self.classes + class) * self.inner + k
    }

    /// The weight of a class.
    pub fn class_weight(&self, class: usize) -> f64 {
        self.class_weights.as_ref().map_or(1.0, |w| w[class])
    }

    /// The weight of row `i` of `[rows, inner]`.
    pub fn row_weight(&self, i: usize) -> f64 {
        self.row_weights.as_ref().map_or(1.0, |r| r[i])
    }

    /// Whether row `i` of `[rows, inner]` is neither masked nor ignored.
    pub fn is_kept(&self, i: usize) -> bool {
        let masked = self.row_mask.as_ref().is_some_and(|m| !m[i]);
        let ignored = match &self.targets {
            Targets::Indices(t) => t[i] == self.ignore_index,
            _ => false,
        };
        !masked && !ignored
    }

    fn check(&self) {
        let rows = self.rows * self.inner;
        let elements = rows * self.classes;
        assert!(rows == 0 || self.classes > 0, "zero classes");
        assert_eq!(self.logits.len(), elements, "logits");
        if let Some(w) = &self.class_weights {
            assert_eq!(w.len(), self.classes, "class_weights");
        }
        if let Some(r) = &self.row_weights {
            assert_eq!(r.len(), rows, "row_weights");
        }
        if let Some(m) = &self.row_mask {
            assert_eq!(m.len(), rows, "row_mask");
        }
        match &self.targets {
            Targets::None => {}
            Targets::Indices(t) => {
                assert_eq!(t.len(), rows, "targets");
                for (i, &y) in t.iter().enumerate() {
                    let inside = usize::try_from(y).is_ok_and(|y| y < self.classes);
                    assert!(inside || !self.is_kept(i), "targets[{i}] = {y}");
                }
            }
            Targets::Probabilities(t) => assert_eq!(t.len(), elements, "targets"),
        }
        let per_row = self.reduction == Reduction::None && self.grad_output.len() == rows;
        assert!(self.grad_output.len() == 1 || per_row, "grad_output");
        assert!((0.0..=1.0).contains(&self.label_smoothing));
        for x in [self.z_loss, self.softcap, self.normalizer, self.z_normalizer] {
            assert!(x >= 0.0 && x.is_finite());
        }
        assert!(self.logit_scale > 0.0 && self.logit_scale.is_finite());
        assert!(self.grad_scale.is_finite() && self.entropy_bonus.is_finite());
        if self.log_probs {
            let neutral = self.z_loss == 0.0 && self.softcap == 0.0 && self.logit_scale == 1.0;
            assert!(neutral && self.entropy_bonus == 0.0, "an option that log_probs excludes");
        }
    }

    /// The logit as the softmax sees it, and its derivative by the stored one.
    pub fn scaled(&self, stored: f64) -> (f64, f64) {
        let x = self.logit_scale * stored;
        let (x, slope) = if self.softcap > 0.0 {
            let u = x / self.softcap;
            // 1 − tanh² as sech²; cosh may overflow, to a slope of 0.
            let slope = self.logit_scale / (u.cosh() * u.cosh());
            (self.softcap * u.tanh(), slope)
        } else {
            (x, self.logit_scale)
        };
        if self.round_scaled_to_f32 { (f64::from(x as f32), slope) } else { (x, slope) }
    }
}

/// Computes everything that `case` defines.
///
/// # Panics
///
/// If the case is malformed.
pub fn evaluate(case: &Case) -> Outcome {
    case.check();
    let rows = case.rows * case.inner;
    let with_targets = case.targets != Targets::None;
    let elements = if with_targets { case.logits.len() } else { 0 };
    let mut out = Outcome {
        loss: f64::NAN,
        z_loss: f64::NAN,
        entropy_bonus: f64::NAN,
        normalizer: f64::NAN,
        z_normalizer: f64::NAN,
        kept_rows: 0,
        row_losses: Vec::new(),
        lse: Vec::new(),
        argmax: Vec::new(),
        correct: 0,
        entropy: Vec::new(),
        kl: Vec::new(),
        kl_scale: Vec::new(),
        grad_logits: vec![0.0; elements],
        grad_targets: match case.targets {
            Targets::Probabilities(_) => vec![0.0; elements],
            _ => Vec::new(),
        },
        loss_scale: Vec::new(),
        lse_scale: Vec::new(),
        grad_magnitude: vec![0.0; elements],
    };

    // The gradient of a mean needs the denominators before the first row.
    let mut normalizer = Sum::default();
    let mut z_normalizer = Sum::default();
    for i in (0..rows).filter(|&i| case.is_kept(i)) {
        let r = case.row_weight(i);
        out.kept_rows += 1;
        z_normalizer.add(r);
        normalizer.add(match &case.targets {
            Targets::Indices(t) => {
                let w = case.class_weight(t[i] as usize);
                if r == 0.0 { 0.0 } else { times(w, r) }
            }
            _ => r,
        });
    }
    if with_targets {
        let given = |x: f64, usual: Sum| if x > 0.0 { x } else { usual.value() };
        out.normalizer = given(case.normalizer, normalizer);
        out.z_normalizer = given(case.z_normalizer, z_normalizer);
    }

    let mut ce_total = Sum::default();
    let mut z_total = Sum::default();
    let mut bonus_total = Sum::default();
    for row in 0..case.rows {
        for k in 0..case.inner {
            let [ce, z, bonus] = evaluate_row(case, row, k, &mut out);
            ce_total.add(ce);
            z_total.add(z);
            bonus_total.add(bonus);
        }
    }

    let empty = out.kept_rows == 0 && case.empty_is_zero;
    let mean = |total: f64, denominator: f64| if empty { 0.0 } else { total / denominator };
    // A part that is off is 0, not 0/0.
    let part = |weight: f64, total: Sum| {
        if weight == 0.0 { 0.0 } else { mean(total.value(), out.z_normalizer) }
    };
    let [ce, z, bonus] = match case.reduction {
        Reduction::Mean => [
            mean(ce_total.value(), out.normalizer),
            part(case.z_loss, z_total),
            part(case.entropy_bonus, bonus_total),
        ],
        Reduction::Sum => [ce_total, z_total, bonus_total].map(Sum::value),
        Reduction::None => [f64::NAN; 3],
    };
    if with_targets {
        out.loss = ce + z + bonus;
        out.z_loss = z;
        out.entropy_bonus = bonus;
    }
    out
}

/// Appends the row's results to `out`, writes its gradients, and returns the parts of its loss: cross-entropy, z-loss and
/// entropy bonus.
fn evaluate_row(case: &Case, row: usize, k: usize, out: &mut Outcome) -> [f64; 3] {
    let i = row * case.inner + k;
    let kept = case.is_kept(i);
    let stored: Vec<f64> = (0..case.classes).map(|c| case.logits[case.at(row, c, k)]).collect();
    let best = argmax(&stored);
    out.argmax.push(best as i64);
    if let Targets::Indices(t) = &case.targets {
        out.correct += u64::from(kept && t[i] == best as i64);
    }

    let (x, slope): (Vec<f64>, Vec<f64>) = stored.iter().map(|&v| case.scaled(v)).unzip();
    let softmax = (!case.log_probs).then(|| Distribution::new(&x));
    if let Some(d) = &softmax {
        out.lse.push(d.lse);
        out.lse_scale.push(d.lse_scale);
        out.entropy.push(d.entropy);
    }

    if case.targets == Targets::None {
        return [0.0; 3];
    }
    let logp = softmax.as_ref().map_or(&stored, |d| &d.logp);
    let undefined = softmax.as_ref().is_some_and(|d| d.undefined);
    if let Targets::Probabilities(_) = &case.targets {
        let (kl, scale) = if kept { divergence(case, row, k, logp) } else { (0.0, 0.0) };
        out.kl.push(if kept && undefined { f64::NAN } else { kl });
        out.kl_scale.push(scale);
    }
    let r = case.row_weight(i);
    if !kept || r == 0.0 {
        out.row_losses.push(0.0);
        out.loss_scale.push(0.0);
        return [0.0; 3];
    }

    // Loss.
    let mass = Mass::new(case, row, k);
    let (lse, lse_scale) = softmax.as_ref().map_or((0.0, 0.0), |d| (d.lse, d.lse_scale));
    let terms: Vec<f64> = (0..case.classes).map(|c| times(mass.both[c], -logp[c])).collect();
    let ce = if undefined { f64::NAN } else { r * sum(terms.iter().copied()) };
    let z = times(r * case.z_loss, lse * lse);
    let entropy = softmax.as_ref().map_or(0.0, |d| d.entropy);
    let bonus = times(r * case.entropy_bonus, -entropy);
    out.row_losses.push(ce + z + bonus);
    let z_scale = times(r * case.z_loss, lse * lse_scale);
    // The rounding of the result bounds the accuracy of any sum of terms.
    out.loss_scale.push(largest(&[r * largest(&terms), z_scale, bonus, ce + z + bonus]));

    // Gradients.
    let upstream = match case.grad_output.as_slice() {
        [g] => *g,
        g => g[i],
    } * case.grad_scale
        * r;
    let (normalizer, z_normalizer) = match case.reduction {
        Reduction::Mean => (out.normalizer, out.z_normalizer),
        _ => (1.0, 1.0),
    };
    // A factor of 0 hides the NaN of a target, not that of a logit. The division comes last: 0/0 is the NaN of an empty
    // weight.
    let part = |x: f64| {
        if undefined { x * upstream / normalizer } else { times(upstream, x) / normalizer }
    };
    let z_part = |x: f64| {
        if case.z_loss == 0.0 { 0.0 } else { x * upstream / z_normalizer }
    };
    let index = matches!(case.targets, Targets::Indices(_));
    let total = mass.total.value();
    let total_scale = largest(&mass.both).max(total.abs());
    for c in 0..case.classes {
        let at = case.at(row, c, k);
        let (m, target, smoothing) = (mass.both[c], mass.target[c], mass.smoothing[c]);
        if let Some(d) = &softmax {
            // T·p − m = (T − m)·p − m·(1 − p): the right side does not cancel where p is near 1.
            let ce = mass.total.minus(m) * d.p[c] - m * d.one_minus_p[c];
            let z = 2.0 * case.z_loss * d.p[c];
            let bonus = |x: f64| {
                if case.entropy_bonus == 0.0 {
                    return 0.0;
                }
                case.entropy_bonus * times(d.p[c], x) * upstream / z_normalizer
            };
            let of_bonus = bonus(d.logp[c] + entropy);
            out.grad_logits[at] = (part(ce) + z_part(z * lse) + of_bonus) * slope[c];
            let ce_scale = if index && case.label_smoothing == 0.0 {
                part(ce)
            } else {
                part(largest(&[total_scale * d.p[c], target, smoothing]))
            };
            out.grad_magnitude[at] =
                largest(&[ce_scale, z_part(z * lse_scale), bonus(d.logp[c]), bonus(entropy)])
                    * slope[c];
        } else if mass.present[c] {
            out.grad_logits[at] = part(-m);
            out.grad_magnitude[at] = part(largest(&[target, smoothing])).abs();
        }
        if !index {
            let factor = times(case.class_weight(c), 1.0 - case.label_smoothing);
            out.grad_targets[at] = times(factor, part(-logp[c]));
        }
    }
    [ce, z, bonus]
}

/// The divergence of a row, and the sum of its absolute terms.
fn divergence(case: &Case, row: usize, k: usize, logp: &[f64]) -> (f64, f64) {
    let Targets::Probabilities(t) = &case.targets else { return (0.0, 0.0) };
    let eps = case.label_smoothing;
    let (mut kl, mut scale) = (Sum::default(), 0.0);
    for (c, &logp) in logp.iter().enumerate() {
        let t = times(1.0 - eps, t[case.at(row, c, k)]) + eps / case.classes as f64;
        if t != 0.0 {
            kl.add(t * (t.ln() - logp));
            scale += (t * t.ln()).abs() + (t * logp).abs();
        }
    }
    (kl.value(), scale)
}

/// The outputs of a linear layer, `Σ_d h_nd·w_cd + b_c`, `[rows, classes]`: hidden is `[rows, features]`, weight
/// `[classes, features]`, bias `[classes]`.
pub fn outputs(hidden: &[f64], weight: &[f64], bias: Option<&[f64]>, features: usize) -> Vec<f64> {
    let mut outputs = Vec::new();
    for h in hidden.chunks(features) {
        for (c, w) in weight.chunks(features).enumerate() {
            let mut total = Sum::default();
            for (&h, &w) in h.iter().zip(w) {
                total.add(h * w);
                if (h * w).is_finite() {
                    total.add(fused(h, w, -(h * w)));
                }
            }
            total.add(bias.map_or(0.0, |bias| bias[c]));
            outputs.push(total.value());
        }
    }
    outputs
}

/// The gradients of hidden, weight and bias from the gradient of a layer's outputs. Where that is 0, so is the term.
pub fn gradients_of_layer(
    grad: &[f64],
    hidden: &[f64],
    weight: &[f64],
    features: usize,
) -> [Vec<f64>; 3] {
    let classes = weight.len() / features;
    let rows = hidden.len() / features;
    let g = |row: usize, class: usize| grad[row * classes + class];
    let entry = |i: usize| (i / features, i % features);
    let of_hidden = |i: usize| {
        let (row, d) = entry(i);
        sum((0..classes).map(|class| times(g(row, class), weight[class * features + d])))
    };
    let of_weight = |i: usize| {
        let (class, d) = entry(i);
        sum((0..rows).map(|row| times(g(row, class), hidden[row * features + d])))
    };
    [
        (0..hidden.len()).map(of_hidden).collect(),
        (0..weight.len()).map(of_weight).collect(),
        (0..classes).map(|class| sum((0..rows).map(|row| g(row, class)))).collect(),
    ]
}

/// What is known of a row after the classes of one shard.
#[derive(Clone, Debug, PartialEq)]
pub struct State {
    /// `ln Σ exp x_c`; −inf for no classes.
    pub lse: f64,
    /// `Σ m_c·x_c`, the terms of mass 0 left out.
    pub target_dot: f64,
    /// `Σ m_c`.
    pub target_mass: f64,
    /// `Σ p_c·x_c` under the softmax over these classes; 0 if their lse is −inf.
    pub logit_mean: f64,
    /// The largest logit as stored, or the first NaN; −inf for no classes.
    pub max: f64,
    /// Its class, −1 for no classes.
    pub argmax: i64,
    /// `Σ |m_c·x_c|` over finite logits.
    pub dot_scale: f64,
    /// `Σ |m_c|`.
    pub mass_scale: f64,
    /// The largest `|x_c|` of a finite logit.
    pub reach: f64,
}

/// The state of each row, `[rows, inner]`, after some of the classes of `case`.
///
/// # Panics
///
/// If the case is malformed.
pub fn states(case: &Case, classes: std::ops::Range<usize>) -> Vec<State> {
    case.check();
    let state = |i: usize| {
        let (row, k) = (i / case.inner, i % case.inner);
        let stored: Vec<f64> = classes.clone().map(|c| case.logits[case.at(row, c, k)]).collect();
        let x: Vec<f64> = stored.iter().map(|&v| case.scaled(v).0).collect();
        let mut mass = vec![0.0; x.len()];
        if case.targets != Targets::None && case.is_kept(i) {
            mass.copy_from_slice(&Mass::new(case, row, k).both[classes.clone()]);
        }
        let products = || mass.iter().zip(&x).map(|(&m, &x)| times(m, x));
        let softmax = Distribution::new(&x);
        let mean = sum(softmax.p.iter().zip(&x).map(|(&p, &x)| times(p, x)));
        let best = argmax(&stored);
        State {
            lse: softmax.lse,
            target_dot: sum(products()),
            target_mass: sum(mass.iter().copied()),
            logit_mean: if softmax.lse == f64::NEG_INFINITY { 0.0 } else { mean },
            max: stored[best],
            argmax: (classes.start + best) as i64,
            dot_scale: products().filter(|x| x.is_finite()).map(f64::abs).sum(),
            mass_scale: mass.iter().map(|m| m.abs()).sum(),
            reach: x.iter().filter(|x| x.is_finite()).fold(0.0, |m, x| m.max(x.abs())),
        }
    };
    let nothing = State {
        lse: f64::NEG_INFINITY,
        target_dot: 0.0,
        target_mass: 0.0,
        logit_mean: 0.0,
        max: f64::NEG_INFINITY,
        argmax: -1,
        dot_scale: 0.0,
        mass_scale: 0.0,
        reach: 0.0,
    };
    let of = |i| if classes.is_empty() { nothing.clone() } else { state(i) };
    (0..case.rows * case.inner).map(of).collect()
}

/// Applies `f` to every row of `x`, `[rows, classes, inner]`; its second argument holds the same
/// row of `y`.
fn map_rows(
    x: &[f64],
    y: &[f64],
    [rows, classes, inner]: [usize; 3],
    f: impl Fn(&[f64], &[f64]) -> Vec<f64>,
) -> Vec<f64> {
    assert_eq!(x.len(), rows * classes * inner);
    assert_eq!(y.len(), x.len());
    let mut out = vec![0.0; x.len()];
    if classes == 0 {
        return out;
    }
    for row in 0..rows {
        for k in 0..inner {
            let at = |c: usize| (row * classes + c) * inner + k;
            let gather = |v: &[f64]| (0..classes).map(|c| v[at(c)]).collect::<Vec<f64>>();
            for (c, v) in f(&gather(x), &gather(y)).into_iter().enumerate() {
                out[at(c)] = v;
            }
        }
    }
    out
}

/// Softmax over the classes of `x`, `[rows, classes, inner]`.
pub fn softmax(x: &[f64], rows: usize, classes: usize, inner: usize) -> Vec<f64> {
    map_rows(x, x, [rows, classes, inner], |x, _| Distribution::new(x).p)
}

/// Log-softmax over the classes of `x`, `[rows, classes, inner]`.
pub fn log_softmax(x: &[f64], rows: usize, classes: usize, inner: usize) -> Vec<f64> {
    map_rows(x, x, [rows, classes, inner], |x, _| Distribution::new(x).logp)
}

/// Gradient of [`softmax`] given its result `y`: `y·(grad_y − Σ y·grad_y)`.
pub fn softmax_backward(
    y: &[f64],
    grad_y: &[f64],
    rows: usize,
    classes: usize,
    inner: usize,
) -> Vec<f64> {
    map_rows(y, grad_y, [rows, classes, inner], |y, g| {
        let dot = sum(y.iter().zip(g).map(|(y, g)| y * g));
        y.iter().zip(g).map(|(y, g)| y * (g - dot)).collect()
    })
}

/// Gradient of [`log_softmax`] given its result `y`: `grad_y − exp(y)·Σ grad_y`.
pub fn log_softmax_backward(
    y: &[f64],
    grad_y: &[f64],
    rows: usize,
    classes: usize,
    inner: usize,
) -> Vec<f64> {
    map_rows(y, grad_y, [rows, classes, inner], |y, g| {
        let total = sum(g.iter().copied());
        y.iter().zip(g).map(|(y, g)| g - y.exp() * total).collect()
    })
}
