//! The bounds of a [`Task`]'s results against the oracle: bounds.rs for every option and dtype.
//!
//! The bounds are those of the accuracy table in docs/semantics.md, but for p inside a gradient, where
//! the table allows 2^-23·(2 + |ln p|), roundings included, and the tests count these apart. For f64 logits 1e-14 replaces
//! 2e-7, and 2⁻²³ shrinks in the same proportion.
//!
//! ```text
//! lse            2e-7 of the larger of |max| and lse − max, and 2^-22 absolute
//! loss           2e-7 of the largest term; of a confident row 2^-22·(1 + |ln loss|) relative; 2^-23
//!                times the mass that multiplies lse
//!                from states of shards: 2^-50·(|M·lse| + Σ |m_c·x_c|) more, M = Σ m_c
//! z-loss         the error of lse, times 2λ·|lse|
//! entropy bonus  that of the entropy, times |β|; in a gradient 2^-22·(1 + |ln p| + H)·p, the error of p by lse and cap,
//!                and from states of shards that of the entropy
//! entropy        1e-6·(1 + |lse|)
//! log-probs      the error of lse
//! p inside       2^-23·(1 + |ln p|) relative, 1e-37 absolute; 2^-52·|lse| more from an lse; and a
//! a gradient     rounding for each product and difference
//! gradients of   2^-52·|lse| and the error of that lse, before the factor of lse − x
//! targets
//! halves         0.51 ulp more
//! ```

use crate::How;
use crate::bounds::close;
use crate::operand::Dtype;
use crate::reference::{self, Case, Outcome};
use crate::task::{Answer, Task};
use std::cell::OnceCell;
use std::collections::BTreeMap;
use xent::Isa;

/// The accuracy of the lanes that a dtype computes in.
#[derive(Clone, Copy)]
struct Units {
    /// The relative error of a sum.
    sum: f64,
    /// The relative error of an exponential.
    exp: f64,
    /// The rounding of a product or a difference.
    half: f64,
    entropy: f64,
    /// Smaller probabilities count as 0.
    p: f64,
    least: f64,
}

impl Units {
    fn of(logits: Dtype) -> Units {
        if logits == Dtype::F64 {
            Units {
                sum: 1e-14,
                exp: 6e-15,
                // Factors are products of f64 and are rounded too.
                half: 2f64.powi(-50),
                entropy: 1e-13,
                p: 1e-300,
                least: 1e-300,
            }
        } else {
            Units {
                sum: 2e-7,
                exp: 2f64.powi(-23),
                half: 2f64.powi(-24),
                entropy: 1e-6,
                p: 1e-37,
                least: f64::from(f32::MIN_POSITIVE),
            }
        }
    }
}

/// The largest errors seen, in units of their bounds.
#[derive(Clone, Debug, Default)]
pub struct Worst(BTreeMap<&'static str, f64>);

impl Worst {
    fn see(&mut self, what: &'static str, error: f64) {
        let worst = self.0.entry(what).or_default();
        *worst = worst.max(error);
    }

    pub fn add(&mut self, other: &Worst) {
        other.0.iter().for_each(|(what, &error)| self.see(what, error));
    }
}

impl std::fmt::Display for Worst {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let all: Vec<String> = self.0.iter().map(|(what, e)| format!("{what} {e:.3}")).collect();
        write!(f, "{}", all.join(", "))
    }
}

/// Below this loss a row is confident: the bound is relative to the loss itself.
const CONFIDENT: f64 = 0.1;

/// The number to which `dtype` may round `x`, given an error of `bound`.
fn stored(dtype: Dtype, x: f64, bound: f64) -> f64 {
    if x.abs() - bound > dtype.largest() { x.signum() * f64::INFINITY } else { x }
}

/// As [`close`], for a number that may be just past the range of its dtype.
#[track_caller]
pub fn close_stored(
    dtype: Dtype,
    got: f64,
    want: f64,
    bound: f64,
    what: impl Fn() -> String,
) -> f64 {
    if got.is_infinite() && want * got.signum() + bound >= dtype.largest() {
        return 0.0;
    }
    close(got, stored(dtype, want, bound), bound, what)
}

fn largest(terms: impl IntoIterator<Item = f64>) -> f64 {
    terms.into_iter().fold(0.0, |m: f64, x| m.max(x.abs()))
}

/// What the gradient of a row is made of: the factors of its two parts, the masses of its classes, and what an entry
/// may be off by.
pub struct RowGradient {
    row: usize,
    pub factors: [f64; 2],
    mass: Vec<f64>,
    total_scale: f64,
    z: f64,
    z_error: f64,
    /// What multiplies p·(ln p + H), and the error of H.
    bonus: f64,
    entropy: f64,
    entropy_error: f64,
    from_lse: f64,
}

impl RowGradient {
    /// The size of what multiplies p.
    pub fn scale(&self) -> f64 {
        (self.factors[0] * self.total_scale).abs() + self.z
    }
}

/// A task, and the oracle's answer to it.
pub struct Judge<'a> {
    pub task: &'a Task,
    pub out: Outcome,
    case: Case,
    /// `−ln p`, or `−logp` as given.
    nll: Vec<f64>,
    /// The result of [`Judge::find_moved`] for each row.
    moved: Vec<f64>,
    units: Units,
    /// Losses are computed from the merged states of shards.
    from_states: bool,
    /// The result of [`reference::order`] for each row, once one is needed.
    orders: OnceCell<Vec<Vec<usize>>>,
}

impl<'a> Judge<'a> {
    /// The judge of results from merged states.
    pub fn of_shards(task: &'a Task) -> Judge<'a> {
        Judge { from_states: true, ..Judge::new(task) }
    }

    pub fn new(task: &'a Task) -> Judge<'a> {
        let case = task.case();
        // Under the sum reduction the gradient of the targets is lse − x, after scale and cap.
        let plain = Case {
            targets: reference::Targets::Probabilities(vec![0.0; case.logits.len()]),
            softcap: case.softcap,
            logit_scale: case.logit_scale,
            round_scaled_to_f32: case.round_scaled_to_f32,
            log_probs: case.log_probs,
            reduction: reference::Reduction::Sum,
            ..Case::new(case.rows, case.classes, case.inner, case.logits.clone())
        };
        let mut judge = Judge {
            task,
            out: reference::evaluate(&case),
            nll: reference::evaluate(&plain).grad_targets,
            moved: Vec::new(),
            units: Units::of(task.logits.dtype),
            from_states: false,
            orders: OnceCell::new(),
            case,
        };
        judge.moved = (0..task.positions()).map(|i| judge.find_moved(i)).collect();
        judge
    }

    fn moved(&self, i: usize) -> f64 {
        self.moved[i]
    }

    fn at(&self, i: usize, class: usize) -> usize {
        let inner = self.task.inner;
        (i / inner * self.task.classes + class) * inner + i % inner
    }

    pub fn is_kept(&self, i: usize) -> bool {
        let masked = self.case.row_mask.as_ref().is_some_and(|mask| !mask[i]);
        !masked && self.target(i) != Some(self.task.ignore_index)
    }

    /// The target index of a row.
    fn target(&self, i: usize) -> Option<i64> {
        match &self.case.targets {
            reference::Targets::Indices(y) => Some(y[i]),
            _ => None,
        }
    }

    fn class_weight(&self, class: usize) -> f64 {
        self.case.class_weights.as_ref().map_or(1.0, |w| w[class])
    }

    pub fn row_weight(&self, i: usize) -> f64 {
        self.case.row_weights.as_ref().map_or(1.0, |r| r[i])
    }

    fn upstream(&self, i: usize) -> f64 {
        match self.case.grad_output.as_slice() {
            [one] => *one,
            rows => rows[i],
        }
    }

    /// `w_c·t'_c` of a row.
    fn mass(&self, i: usize) -> Vec<f64> {
        let (eps, classes) = (self.case.label_smoothing, self.task.classes);
        let one = |class: usize| {
            let t = match &self.case.targets {
                reference::Targets::Indices(y) => f64::from(y[i] == class as i64),
                reference::Targets::Probabilities(t) => t[self.at(i, class)],
                reference::Targets::None => 0.0,
            };
            let t = if eps == 1.0 { 0.0 } else { (1.0 - eps) * t };
            let w = self.class_weight(class);
            if w == 0.0 { 0.0 } else { w * (t + eps / classes as f64) }
        };
        (0..classes).map(one).collect()
    }

    /// `t'_c` of a row with probability targets.
    fn probabilities(&self, i: usize) -> Vec<f64> {
        let (eps, classes) = (self.case.label_smoothing, self.task.classes);
        let reference::Targets::Probabilities(t) = &self.case.targets else { return Vec::new() };
        let one = |class: usize| {
            let t = if eps == 1.0 { 0.0 } else { (1.0 - eps) * t[self.at(i, class)] };
            t + eps / classes as f64
        };
        (0..classes).map(one).collect()
    }

    /// The relative error of a teacher's probability.
    fn slip_of_teacher(&self, i: usize, class: usize) -> f64 {
        let reference::Targets::Probabilities(t) = &self.case.targets else { return 0.0 };
        let t = t[self.at(i, class)];
        let has_error = self.task.target_scale > 0.0 && t > 0.0;
        if has_error { 2.0 * f64::EPSILON * (1.0 + t.ln().abs()) } else { 0.0 }
    }

    /// The row predicts its target with confidence, and its loss has no further term.
    fn is_confident(&self, i: usize) -> bool {
        let inside = |y: &i64| (0..self.task.classes as i64).contains(y);
        !self.task.log_probs
            && self.case.label_smoothing == 0.0
            && self
                .target(i)
                .filter(inside)
                .is_some_and(|y| self.nll[self.at(i, y as usize)] < CONFIDENT)
    }

    fn bound_of_lse(&self, i: usize) -> f64 {
        match self.out.lse_scale.get(i) {
            // Three additions to a largest term of 1 may round the same way, by half an ulp each.
            Some(scale) => self.units.sum * scale + 2.0 * self.units.exp + self.moved(i),
            None => 0.0,
        }
    }

    /// The bound of capped logits against the oracle's: two roundings of either. In f32 these are
    /// roundings of f64, before the one rounding to f32, which may go either way from a midpoint.
    fn find_moved(&self, i: usize) -> f64 {
        let (cap, scale) = (self.case.softcap, self.case.logit_scale);
        if cap == 0.0 {
            return 0.0;
        }
        if self.task.logits.dtype == Dtype::F64 {
            return 4.0 * f64::EPSILON * cap.min(scale * self.reach(i));
        }
        let between = |class: usize| {
            let x = cap * (scale * self.case.logits[self.at(i, class)] / cap).tanh();
            // A quotient by a cap of 1e300 is subnormal.
            let off = 4.0 * f64::EPSILON * x.abs() + cap * f64::from_bits(2);
            f64::from((x + off) as f32) - f64::from((x - off) as f32)
        };
        // Past the range of f32 the difference of neighbours is NaN.
        largest((0..self.task.classes).map(between))
    }

    /// The largest logit as stored, whatever its sign.
    fn reach(&self, i: usize) -> f64 {
        largest((0..self.task.classes).map(|class| self.case.logits[self.at(i, class)]))
    }

    /// The error of a result that is computed from an f64 lse; the lse of f64 logits has an error too.
    fn through(&self, lse: Option<&f64>) -> f64 {
        let own = if self.task.logits.dtype == Dtype::F64 { 2.0 } else { 1.0 };
        let off =
            lse.filter(|lse| lse.is_finite()).map_or(0.0, |lse| own * f64::EPSILON * lse.abs());
        // For a huge lse, whose neighbours are further apart than classes, the error is a factor.
        off.min(700.0).exp_m1()
    }

    fn bound_of_z_loss(&self, i: usize) -> f64 {
        if self.case.z_loss == 0.0 || !self.is_kept(i) {
            return 0.0;
        }
        let lse = self.out.lse[i];
        let size = self.row_weight(i).abs() * self.case.z_loss;
        if size == 0.0 || !lse.is_finite() {
            return 0.0;
        }
        size * (2.0 * lse.abs() * self.bound_of_lse(i) + self.units.sum * lse * lse)
    }

    fn bound_of_bonus(&self, i: usize) -> f64 {
        let size = (self.row_weight(i) * self.case.entropy_bonus).abs();
        match self.out.lse.get(i) {
            Some(lse) if size != 0.0 && self.is_kept(i) && lse.is_finite() => {
                size * self.units.entropy * (1.0 + lse.abs())
            }
            _ => 0.0,
        }
    }

    /// What a loss loses more if it is the difference of mass·lse and a sum of mass·logit.
    fn bound_of_states(&self, i: usize) -> f64 {
        let lse = match self.out.lse.get(i) {
            Some(lse) if self.from_states && lse.is_finite() => *lse,
            _ => return 0.0,
        };
        let mass = self.mass(i);
        let total: f64 = mass.iter().sum();
        let product = |(class, &m): (usize, &f64)| {
            let x = lse - self.nll[self.at(i, class)];
            if m == 0.0 || !x.is_finite() { 0.0 } else { (m * x).abs() }
        };
        let products: f64 = mass.iter().enumerate().map(product).sum();
        self.row_weight(i).abs() * 4.0 * f64::EPSILON * ((total * lse).abs() + products)
    }

    fn bound_of_cross_entropy(&self, i: usize) -> f64 {
        let r = self.row_weight(i).abs();
        if !self.is_kept(i) || r == 0.0 {
            return 0.0;
        }
        self.bound_of_states(i) + self.bound_of_own_cross_entropy(i)
    }

    fn bound_of_own_cross_entropy(&self, i: usize) -> f64 {
        let r = self.row_weight(i).abs();
        let mass = self.mass(i);
        let term = |class: usize| match mass[class] {
            0.0 => 0.0,
            m => m * self.nll[self.at(i, class)],
        };
        if let (true, Some(y)) = (self.is_confident(i), self.target(i)) {
            let nll = self.nll[self.at(i, y as usize)];
            let log = if nll > 0.0 { nll.ln().abs() } else { 0.0 };
            let relative = 2.0 * self.units.exp * (1.0 + log) + 2.0 * self.moved(i);
            return r * term(y as usize).abs() * relative + 1e-300;
        }
        let terms: Vec<f64> = (0..mass.len()).map(term).collect();
        let total: f64 = mass.iter().sum();
        let spreads = self.target(i).is_none() || self.case.label_smoothing > 0.0;
        let one_lse = self.units.exp + self.through(self.out.lse.get(i));
        let share = if spreads && !self.task.log_probs { total.abs() * one_lse } else { 0.0 };
        let share = share + 2.0 * self.moved(i) * mass.iter().map(|m| m.abs()).sum::<f64>();
        // The rounding of each term shows where many terms of both signs cancel.
        let squares = terms.iter().map(|x| x * x).sum::<f64>().sqrt();
        let sum: f64 = terms.iter().sum();
        let slip = |(class, term): (usize, &f64)| (term * self.slip_of_teacher(i, class)).abs();
        let slips: f64 = terms.iter().enumerate().map(slip).filter(|slip| slip.is_finite()).sum();
        r * (self.units.sum * largest([largest(terms.iter().copied()), sum, squares]) + share)
            + r * slips
            + 1e-300
    }

    /// The bound of a loss that is computed from a log-softmax stored in the lanes' type.
    pub fn bound_after_log_softmax(&self, i: usize) -> f64 {
        let r = self.row_weight(i).abs();
        if !self.is_kept(i) || r == 0.0 {
            return 0.0;
        }
        let mass = self.mass(i);
        let through = self.through(self.out.lse.get(i));
        let off = |class: usize| {
            let nll = self.nll[self.at(i, class)];
            let m = mass[class].abs();
            if m == 0.0 { 0.0 } else { m * (self.units.sum * nll.abs() + self.units.exp + through) }
        };
        let terms: f64 = (0..mass.len()).map(off).sum();
        let loss = self.task.row_losses.dtype.half_ulp(self.out.row_losses[i]);
        r * 2.0 * terms + 2.0 * self.bound_of_cross_entropy(i) + loss
    }

    /// The sum of the absolute terms of a row's gradient, an entropy that is off among them, and the part of z-loss.
    pub fn gradient_sums(&self, i: usize) -> (f64, f64) {
        if !self.is_kept(i) || self.row_weight(i) == 0.0 {
            return (0.0, 0.0);
        }
        let [factor, z_factor] = self.factors(i);
        let scale = self.case.logit_scale;
        let mass: f64 = self.mass(i).iter().map(|m| m.abs()).sum();
        let z = match self.case.z_loss {
            0.0 => 0.0,
            z_loss => 2.0 * z_loss * self.out.lse[i] * z_factor * scale,
        };
        let bonus = self.case.entropy_bonus * z_factor * scale;
        let entropy = 1.0 + self.out.lse[i].abs() + self.out.entropy[i];
        let bonus = if bonus == 0.0 { 0.0 } else { (bonus * entropy).abs() };
        ((factor * mass * scale).abs() + bonus, z)
    }

    /// Checks the classes of the largest logits, their log-probabilities, and the ranks of targets.
    #[track_caller]
    fn rankings(&self, answer: &Answer, worst: &mut Worst) {
        let Answer { top_classes, top_log_probs, target_ranks, .. } = answer;
        let (top_count, inner) = (self.task.top_count(), self.task.inner);
        if top_classes.is_empty() && target_ranks.is_empty() {
            return;
        }
        for i in 0..self.task.positions() {
            let logits = self.task.logits.row(i / inner, i % inner);
            let order = self.orders.get_or_init(|| {
                let row = |i| reference::order(&self.task.logits.row(i / inner, i % inner));
                (0..self.task.positions()).map(row).collect()
            });
            let order = &order[i];
            if let Some(&got) = target_ranks.get(i) {
                let place = |y| order.iter().position(|&class| class as i64 == y);
                let target = self.target(i).filter(|_| self.is_kept(i));
                let rank = target.map_or(-1, |y| place(y).expect("a class") as i64);
                assert_eq!(got, rank, "target_ranks[{i}]");
            }
            if top_classes.is_empty() {
                continue;
            }
            for (j, &class) in order[..top_count].iter().enumerate() {
                let at = (i / inner * top_count + j) * inner + i % inner;
                assert_eq!(top_classes[at], class as i64, "top_classes[{at}]");
                let (x, _) = self.case.scaled(logits[class]);
                let want = x - self.out.lse.get(i).unwrap_or(&0.0);
                let dtype = self.task.top_log_probs.dtype;
                // A capped logit may be that of its neighbour.
                let bound = self.bound_of_lse(i) + self.moved(i) + 2.0 * f64::EPSILON * x.abs();
                let bound = bound + 1.01 * dtype.half_ulp(want);
                let what = || format!("top_log_probs[{at}]");
                let error = close_stored(dtype, top_log_probs[at], want, bound, what);
                worst.see("top", error);
            }
        }
    }

    /// Checks the results of a forward.
    #[track_caller]
    pub fn losses(&self, answer: &Answer) -> Worst {
        let mut worst = Worst::default();
        let want = &self.out;
        let positions = self.task.positions();
        for (i, &got) in answer.lse.iter().enumerate() {
            let error = close(got, want.lse[i], self.bound_of_lse(i), || format!("lse[{i}]"));
            worst.see("lse", error);
        }
        if !answer.argmax.is_empty() || positions == 0 {
            assert!(answer.argmax == want.argmax || !self.task.wants.argmax, "argmax");
        }
        self.rankings(answer, &mut worst);
        for (i, &got) in answer.entropy.iter().enumerate() {
            let dtype = self.task.entropy.dtype;
            let entropy = want.entropy[i];
            let bound = self.units.entropy * (1.0 + want.lse[i].abs()) + dtype.half_ulp(entropy);
            let error = close(got, entropy, bound, || format!("entropy[{i}]"));
            worst.see("entropy", error);
        }
        for (i, &got) in answer.kl.iter().enumerate() {
            let dtype = self.task.kl.dtype;
            let (kl, scale) = (want.kl[i], want.kl_scale[i]);
            let moved = if self.task.log_probs { 0.0 } else { self.bound_of_lse(i) };
            // Weights have no part in it, but the sum of the targets does.
            let mass: f64 = self.probabilities(i).iter().map(|t| t.abs()).sum();
            let bound = self.units.sum * scale + 2.0 * mass * moved + dtype.half_ulp(kl) + 1e-300;
            let error = close_stored(dtype, got, kl, bound, || format!("kl[{i}]"));
            worst.see("kl", error);
        }
        let Some(kept_rows) = answer.kept_rows else { return worst };
        assert_eq!(kept_rows, want.kept_rows, "kept rows");
        if let Some(correct) = answer.correct {
            assert_eq!(correct, want.correct, "correct rows");
        }
        for (got, want, what) in [
            (answer.normalizer, want.normalizer, "normalizer"),
            (answer.z_normalizer, want.z_normalizer, "z_normalizer"),
        ] {
            close(got.expect(what), want, 1e-12 * want.abs(), || what.to_string());
        }
        let (mut totals, mut sizes) = ([0.0; 3], 0.0);
        for (i, &got) in answer.row_losses.iter().enumerate() {
            let dtype = self.task.row_losses.dtype;
            let parts =
                [self.bound_of_cross_entropy(i), self.bound_of_z_loss(i), self.bound_of_bonus(i)];
            let loss = want.row_losses[i];
            let own = parts[0] + parts[1] + parts[2];
            let bound = own + 4.0 * f64::EPSILON * (loss.abs() + self.bonus_of(i));
            let rounding = if dtype == Dtype::F32 { dtype.half_ulp(loss) * 1.01 } else { 0.0 };
            let what = || format!("row_losses[{i}] (target {:?})", self.target(i));
            let error = close_stored(dtype, got, loss, bound + rounding, what);
            worst.see(if self.is_confident(i) { "confident" } else { "loss" }, error);
            totals[0] += parts[0];
            totals[1] += parts[1];
            totals[2] += parts[2];
            sizes += if loss.is_finite() { loss.abs() + self.bonus_of(i) } else { 0.0 };
        }
        let rounding = sizes * 1e-15 * positions as f64;
        let divisors = match self.case.reduction {
            reference::Reduction::Mean => [want.normalizer.abs(), want.z_normalizer.abs()],
            _ => [1.0, 1.0],
        };
        let z_bound = match self.case.z_loss {
            0.0 => 0.0,
            _ => (totals[1] + rounding) / divisors[1],
        };
        let bonus_bound = match self.case.entropy_bonus {
            0.0 => 0.0,
            _ => (totals[2] + rounding) / divisors[1],
        };
        if let Some(bonus) = answer.entropy_bonus {
            let what = || "entropy_bonus".to_string();
            let error = close_stored(Dtype::F64, bonus, want.entropy_bonus, bonus_bound, what);
            worst.see("bonus", error);
        }
        if let Some(z_loss) = answer.z_loss {
            // Without a softmax the loss is NaN, and its z-loss part may be NaN or λ·∞².
            let undefined = want.loss.is_nan() && !want.z_loss.is_finite() && z_loss.is_nan();
            if !undefined {
                let what = || "z_loss".to_string();
                worst.see("z-loss", close_stored(Dtype::F64, z_loss, want.z_loss, z_bound, what));
            }
        }
        if let Some(loss) = answer.loss {
            let bound = (totals[0] + rounding) / divisors[0] + z_bound + bonus_bound;
            let parts = want.loss.abs() + want.z_loss.abs() + want.entropy_bonus.abs();
            let bound = bound + 1e-14 * parts;
            // A loss just within the range of f64 may be rounded past it.
            let what = || "loss".to_string();
            worst.see("reduced", close_stored(Dtype::F64, loss, want.loss, bound, what));
        }
        worst
    }

    /// The factors of the two parts of a row's gradient.
    fn factors(&self, i: usize) -> [f64; 2] {
        let upstream = self.upstream(i) * self.case.grad_scale * self.row_weight(i);
        match self.case.reduction {
            reference::Reduction::Mean => {
                [upstream / self.out.normalizer, upstream / self.out.z_normalizer]
            }
            _ => [upstream, upstream],
        }
    }

    /// Whether the factors of a row's gradient leave the range in which docs/semantics.md promises
    /// values ("Factors out of range"). A row without a softmax is NaN whatever its factors.
    pub fn factors_leave_range(&self, i: usize) -> bool {
        let case = &self.case;
        let lse = self.out.lse.get(i).copied().unwrap_or(0.0);
        if !lse.is_finite() {
            return false;
        }
        // In powers of ten: the range, and the factor that would bring back an underflowed product.
        let [lowest, highest, back] = match (self.task.logits.dtype, case.softcap > 0.0) {
            (Dtype::F64, _) => [-290.0, 307.0, 23.0],
            (_, false) => [-290.0, 60.0, 23.0],
            (_, true) => [-37.0, 37.0, 7.0],
        };
        let power = |x: f64| if x == 0.0 || !x.is_finite() { 0.0 } else { x.abs().log10() };
        let mean = case.reduction == reference::Reduction::Mean;
        let divided = |by: f64| if mean { -power(by) } else { 0.0 };
        let shared = [self.upstream(i), case.grad_scale, self.row_weight(i), case.logit_scale];
        let leave = |own: &[f64], denominator: f64| {
            let powers = shared.iter().chain(own).map(|&x| power(x));
            let [down, up] = powers
                .chain([divided(denominator)])
                .fold([0.0; 2], |[down, up], x: f64| [down + x.min(0.0), up + x.max(0.0)]);
            let lost = down < lowest && up > back && down + up > self.units.least.log10();
            up > highest || lost
        };
        let mass = self.mass(i);
        let mass = largest([largest(mass.iter().copied()), mass.iter().sum()]);
        leave(&[mass], self.out.normalizer)
            || case.z_loss != 0.0 && leave(&[2.0, case.z_loss, lse], self.out.z_normalizer)
            || case.entropy_bonus != 0.0 && leave(&[case.entropy_bonus], self.out.z_normalizer)
    }

    /// Checks a gradient of the logits, stored as `dtype`; `lse` is the input of a backward.
    #[track_caller]
    pub fn gradient(
        &self,
        grad: &[f64],
        dtype: Dtype,
        old: Option<&[f64]>,
        lse: Option<&[f64]>,
    ) -> Worst {
        let mut worst = Worst::default();
        let (task, half) = (self.task, self.units.half);
        for i in 0..task.positions() {
            let (kept, r) = (self.is_kept(i), self.row_weight(i));
            let row = self.gradient_of_row(i, lse);
            let leaves_range = self.factors_leave_range(i);
            let target = self.target(i);
            for class in 0..task.classes {
                let at = self.at(i, class);
                let what = || {
                    format!(
                        "gradient of row {i}, class {class} (target {target:?}, -ln p {:e}, lse {:?})",
                        self.nll[at],
                        lse.map(|lse| lse.get(i))
                    )
                };
                let before = old.map_or(0.0, |old| old[at]);
                if !kept || r == 0.0 {
                    assert!(grad[at] == before, "{}: {:e} though ignored", what(), grad[at]);
                    continue;
                }
                if leaves_range {
                    continue;
                }
                let want = self.out.grad_logits[at];
                if !want.is_finite() && !grad[at].is_finite() {
                    let over_zero = row.factors.iter().any(|factor| !factor.is_finite());
                    assert!(over_zero || grad[at].is_nan(), "{}: {:e}", what(), grad[at]);
                    continue;
                }
                let mut bound = self.bound_of_gradient(&row, class);
                if old.is_some() {
                    bound += half * (before.abs() + 2.0 * want.abs());
                }
                let sum = before + want;
                if dtype.is_half() {
                    bound += 1.02 * dtype.half_ulp(sum.abs() + bound);
                }
                let error = close_stored(dtype, grad[at], sum, bound, what);
                if want.abs() < 1e3 * self.units.least.max(self.units.p * self.unsloped(at)) {
                    continue;
                }
                let is_target = target == Some(class as i64);
                worst.see(
                    match (lse.is_some(), is_target) {
                        _ if old.is_some() || dtype.is_half() => "rounded gradient",
                        (false, false) => "gradient",
                        (false, true) => "target",
                        (true, false) => "backward",
                        (true, true) => "backward target",
                    },
                    error,
                );
            }
        }
        worst
    }

    /// What the gradient of a row is made of; `lse` is the input of a backward.
    pub fn gradient_of_row(&self, i: usize, lse: Option<&[f64]>) -> RowGradient {
        let case = &self.case;
        let factors @ [_, z_factor] = self.factors(i);
        let mass = self.mass(i);
        let total: f64 = mass.iter().sum();
        let own_lse = self.out.lse.get(i).copied().unwrap_or(0.0);
        let (z, z_error) = if case.z_loss == 0.0 || !self.is_kept(i) {
            (0.0, 0.0)
        } else {
            let z = (2.0 * case.z_loss * z_factor).abs();
            let half = self.units.half;
            (z * own_lse.abs(), z * (self.bound_of_lse(i) + half * own_lse.abs()))
        };
        let from_lse = match lse {
            // Next to a huge lse only the order of magnitude remains.
            Some(lse) if !self.task.log_probs => self.through(lse.get(i)).min(60.0).exp_m1(),
            _ => 0.0,
        };
        let total_scale = largest(mass.iter().copied()).max(total.abs());
        let (mut bonus, mut entropy, mut entropy_error) = (0.0, 0.0, 0.0);
        if case.entropy_bonus != 0.0 && self.is_kept(i) && own_lse.is_finite() {
            bonus = (case.entropy_bonus * z_factor).abs();
            entropy = self.out.entropy[i];
            if self.from_states {
                entropy_error = self.units.entropy * (1.0 + own_lse.abs());
            }
        }
        RowGradient {
            row: i,
            factors,
            mass,
            total_scale,
            z,
            z_error,
            bonus,
            entropy,
            entropy_error,
            from_lse,
        }
    }

    /// The bound of an entry of the gradient of the logits, before it is added to anything or rounded to a half.
    pub fn bound_of_gradient(&self, row: &RowGradient, class: usize) -> f64 {
        let Units { exp, half, .. } = self.units;
        let (task, case) = (self.task, &self.case);
        let RowGradient { row: i, factors: [factor, _], z, z_error, from_lse, .. } = *row;
        let moved = self.moved(i);
        let at = self.at(i, class);
        let want = self.out.grad_logits[at];
        let slope = self.slope(at);
        let unsloped = self.unsloped(at);
        // The excluded class has its own accuracy.
        let is_target = self.target(i) == Some(class as i64);
        let m = (factor * row.mass[class]).abs();
        let mut bound = if !task.log_probs {
            let nll = self.nll[at];
            let p = (-nll).exp();
            let log = if p == 0.0 { 0.0 } else { nll };
            let one_minus_p = -(-nll).exp_m1();
            let q = p.min(one_minus_p);
            let unit = |log: f64| exp * (1.0 + log) + 2.0 * moved;
            let of_q = if q == 0.0 { 0.0 } else { q * unit(q.ln().abs()) };
            let confident = of_q + p * from_lse + f64::EPSILON * q;
            let usual = p * (unit(log) + from_lse) + self.units.p;
            let scale = row.scale();
            let lse_inside = z_error * p + self.bound_of_gradient_of_bonus(row, p, log);
            if is_target && case.label_smoothing == 0.0 {
                m * confident + z * usual + lse_inside + 2.0 * half * unsloped
            } else if is_target {
                scale * (confident + 4.0 * f64::EPSILON * p)
                    + lse_inside
                    + half * (2.0 * unsloped + m)
            } else {
                scale * (usual + half * p) + lse_inside + half * (3.0 * m + 2.0 * unsloped)
            }
        } else {
            half * 3.0 * m
        };
        if task.target_scale > 0.0 {
            // The probabilities of a teacher are small as well.
            bound += factor.abs() * self.units.p + m * self.slip_of_teacher(i, class);
        }
        if case.softcap > 0.0 {
            // The slope is e^(-2u) of a rounded u. It and the product are rounded, and the
            // product may underflow.
            let u = (case.logit_scale * case.logits[at] / case.softcap).abs().min(400.0);
            bound = bound * slope + (2.0 * half + 8.0 * u * f64::EPSILON) * want.abs();
            bound += row.scale() * self.units.least;
        } else {
            bound *= slope;
        }
        bound + self.units.least
    }

    /// The bound of the entropy bonus's part of an entry, for a class of probability p.
    fn bound_of_gradient_of_bonus(&self, row: &RowGradient, p: f64, log: f64) -> f64 {
        let RowGradient { row: i, bonus, entropy, entropy_error, from_lse, .. } = *row;
        if bonus == 0.0 {
            return 0.0;
        }
        let Units { exp, half, p: least, .. } = self.units;
        let size = 1.0 + log + entropy;
        // A capped logit moves p, its logarithm and the entropy.
        let moved = (2.0 * self.moved(i) + from_lse) * size;
        let own = (2.0 * exp + half) * size + moved + entropy_error;
        bonus * (p * own + 100.0 * least)
    }

    /// The entropy bonus's part of a row's loss, without its sign.
    fn bonus_of(&self, i: usize) -> f64 {
        if self.case.entropy_bonus == 0.0 || !self.is_kept(i) || !self.out.entropy[i].is_finite() {
            return 0.0;
        }
        (self.row_weight(i) * self.case.entropy_bonus * self.out.entropy[i]).abs()
    }

    /// An entry of the gradient of the logits, without the slope of scale and cap.
    fn unsloped(&self, at: usize) -> f64 {
        let slope = self.slope(at);
        if slope == 0.0 { 0.0 } else { self.out.grad_logits[at].abs() / slope }
    }

    /// `−ln p` of a class at a place of `[rows, classes, inner]`.
    pub fn nll(&self, at: usize) -> f64 {
        self.nll[at]
    }

    /// The derivative of a scaled and capped logit by the stored one.
    pub fn slope(&self, at: usize) -> f64 {
        let (scale, cap) = (self.case.logit_scale, self.case.softcap);
        if cap == 0.0 {
            return scale;
        }
        let u = (scale * self.case.logits[at] / cap).cosh();
        scale / (u * u)
    }

    /// Checks a gradient of the targets.
    #[track_caller]
    pub fn gradient_of_targets(&self, grad: &[f64], old: Option<&[f64]>) -> Worst {
        let mut worst = Worst::default();
        let dtype = self.task.grad_targets.dtype;
        for i in 0..self.task.positions() {
            let ignored = !self.is_kept(i) || self.row_weight(i) == 0.0;
            let lse = self.out.lse.get(i).copied().unwrap_or(0.0);
            let factor = self.factors(i)[0] * (1.0 - self.case.label_smoothing);
            let leaves_range = self.factors_leave_range(i);
            for class in 0..self.task.classes {
                let at = self.at(i, class);
                let before = old.map_or(0.0, |old| old[at]);
                let what = || format!("gradient of target {class} of row {i}");
                if ignored {
                    assert!(grad[at] == before, "{}: {:e} though ignored", what(), grad[at]);
                    continue;
                }
                if leaves_range {
                    continue;
                }
                let want = self.out.grad_targets[at];
                if !self.factors(i)[0].is_finite() {
                    // Over a denominator of 0: 0/0, x/0, or 0 where a factor is 0.
                    let got = grad[at];
                    assert!(!got.is_finite() || got == want + before, "{}: {got:e}", what());
                    continue;
                }
                // A grad_output of 0 may annihilate the other factors, or not.
                if factor == 0.0 && want.is_nan() && grad[at] == before {
                    continue;
                }
                let w = self.class_weight(class);
                let inside = f64::EPSILON * (1.0 + lse.abs()) + self.bound_of_lse(i);
                let inside = if self.task.log_probs { 0.0 } else { inside };
                let sum = before + want;
                let mut bound = if want.is_finite() { (factor * w).abs() * inside } else { 0.0 };
                bound += 4.0 * f64::EPSILON * (want.abs() + before.abs());
                if dtype != Dtype::F64 {
                    bound += 1.02 * dtype.half_ulp(sum.abs() + bound);
                }
                worst.see("targets", close_stored(dtype, grad[at], sum, bound, what));
            }
        }
        worst
    }
}

/// Makes every call of a task on one instruction set, and compares each result with the oracle and,
/// where bits are promised, with the other calls.
#[track_caller]
pub fn check_on(judge: &Judge, how: &How<'_>) -> Worst {
    check_answers(judge, &judge.task.run_all(how))
}

/// As [`check_on`], given the answers of [`Task::run_all`].
#[track_caller]
pub fn check_answers(judge: &Judge, answers: &[(&'static str, Answer)]) -> Worst {
    let task = judge.task;
    let find = |call: &str| answers.iter().find(|(name, _)| *name == call).map(|(_, a)| a);
    let get = |call: &str| find(call).unwrap_or_else(|| panic!("{call} was not called"));
    let mut worst = judge.losses(get("evaluate"));
    if task.targets.is_none() {
        return worst;
    }
    let forward = get("forward");
    worst.add(&judge.losses(forward));

    let old = task.accumulate.then_some(task.grad.values.as_slice());
    let dtype = task.grad.dtype;
    let fused = get("fused");
    worst.add(&judge.losses(fused));
    worst.add(&judge.gradient(&fused.grad, dtype, old, None));
    let one_layout = task.has_one_layout();
    if one_layout {
        fused.assert_same_losses(forward, "forward and fused");
    }

    let lse = &forward.lse;
    let backward = get("backward");
    worst.add(&judge.gradient(&backward.grad, dtype, old, Some(lse)));

    if task.fits_in_place() {
        let dtype = task.logits.dtype;
        let in_place = get("fused in place");
        in_place.assert_same_losses(forward, "forward and in place");
        worst.add(&judge.gradient(&in_place.grad, dtype, None, None));
        let from_lse = get("backward in place");
        worst.add(&judge.gradient(&from_lse.grad, dtype, None, Some(lse)));
        if one_layout && dtype == task.grad.dtype {
            crate::task::same_bits(&in_place.grad, &fused.grad, "in place and out of place");
            crate::task::same_bits(&from_lse.grad, &backward.grad, "backward in place");
        }
    }
    if task.has_target_gradient() {
        let old = task.accumulate.then_some(task.grad_targets.values.as_slice());
        worst.add(&judge.gradient_of_targets(&get("targets").grad, old));
    }
    worst
}

/// Calls [`check_on`] for every instruction set.
#[track_caller]
pub fn check<'a>(task: &Task, how: impl Fn(Isa) -> How<'a>) -> Vec<(Isa, Worst)> {
    let judge = Judge::new(task);
    crate::isas().into_iter().map(|isa| (isa, check_on(&judge, &how(isa)))).collect()
}
