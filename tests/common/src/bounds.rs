//! The bounds of f32 results against the oracle, and the largest errors seen.
//!
//! The bounds are those of the accuracy table in docs/semantics.md, but for p inside a gradient, where
//! the table allows 2^-23·(2 + |ln p|), roundings included. Beside those, the tests allow:
//!
//! ```text
//! lse          2e-7 of the larger of |max| and ln Σ exp(x - max), and 2^-22 absolute
//! loss         2e-7 of the largest term; of a confident row 2^-22·(1 + |ln loss|) relative
//! p inside     2^-23·(1 + |ln p|) relative from p = 1e-37 up, 1e-37 absolute below; the target's
//! a gradient   p - 1 likewise with 1 - p for p; 2^-52·|lse| more in a backward from an f64 lse
//! ```
//!
//! An error of 1 ulp in the exponentials moves ln Σ by 2^-23, however small ln Σ is. Under smoothing
//! the loss has this error once for each of its weights.
//!
//! The operations on p add f32 roundings: one for the factor or the product, and under smoothing
//! those of the subtrahend and of the difference.

use crate::reference::{self, Outcome};
use crate::{How, Pass, Problem, Reduction, Run, assert_same, isas};
use xent::Isa;

const U23: f64 = 1.0 / (1u64 << 23) as f64;
/// Half an ulp of f32.
const HALF_ULP: f64 = U23 / 2.0;
const U52: f64 = f64::EPSILON;
const TINY: f64 = f32::MIN_POSITIVE as f64;

/// The largest errors seen, in units of their bounds.
#[derive(Clone, Copy, Debug, Default)]
pub struct Worst {
    pub loss: f64,
    pub confident: f64,
    pub lse: f64,
    pub grad: f64,
    pub target: f64,
    pub backward_grad: f64,
    pub backward_target: f64,
}

impl Worst {
    pub fn add(&mut self, other: &Worst) {
        let pairs = [
            (&mut self.loss, other.loss),
            (&mut self.confident, other.confident),
            (&mut self.lse, other.lse),
            (&mut self.grad, other.grad),
            (&mut self.target, other.target),
            (&mut self.backward_grad, other.backward_grad),
            (&mut self.backward_target, other.backward_target),
        ];
        for (mine, other) in pairs {
            *mine = mine.max(other);
        }
    }
}

impl std::fmt::Display for Worst {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "loss {:.3}, confident {:.3}, lse {:.3}, gradient {:.3}, target {:.3}, \
             from lse: gradient {:.3}, target {:.3}",
            self.loss,
            self.confident,
            self.lse,
            self.grad,
            self.target,
            self.backward_grad,
            self.backward_target
        )
    }
}

/// Asserts that the two are of one kind (finite, infinite, NaN) and within `bound`; returns the error
/// in units of `bound`.
#[track_caller]
pub fn close(got: f64, want: f64, bound: f64, what: impl Fn() -> String) -> f64 {
    if want.is_nan() || got.is_nan() {
        let both = want.is_nan() && got.is_nan();
        assert!(both, "{}: {got:e} instead of {want:e}", what());
        return 0.0;
    }
    if want.is_infinite() || got.is_infinite() {
        assert!(got == want, "{}: {got:e} instead of {want:e}", what());
    }
    if got == want {
        return 0.0;
    }
    let error = (got - want).abs();
    assert!(
        error <= bound,
        "{}: {got:e} instead of {want:e}: off by {error:e}, {:.3} times the bound",
        what(),
        error / bound
    );
    error / bound
}

/// A gradient past the largest f32 is infinite.
fn to_f32_range(x: f64, slack: f64) -> f64 {
    if x.abs() - slack > f64::from(f32::MAX) { x.signum() * f64::INFINITY } else { x }
}

/// A problem, and the oracle's answer to it.
pub struct Judge<'a> {
    pub problem: &'a Problem,
    pub outcome: Outcome,
    case: reference::Case,
    log_p: Vec<f64>,
    p: Vec<f64>,
}

/// Below this loss a row is confident: the bound is relative to the loss itself.
const CONFIDENT: f64 = 0.1;

impl<'a> Judge<'a> {
    pub fn new(problem: &'a Problem) -> Judge<'a> {
        let case = problem.case();
        let (rows, classes) = (case.rows, case.classes);
        Judge {
            problem,
            outcome: reference::evaluate(&case),
            log_p: reference::log_softmax(&case.logits, rows, classes, 1),
            p: reference::softmax(&case.logits, rows, classes, 1),
            case,
        }
    }

    fn bound_of_row_loss(&self, row: usize) -> f64 {
        let loss = self.outcome.row_losses[row];
        let scale = self.outcome.loss_scale[row];
        let rounding =
            if self.problem.short_row_losses { HALF_ULP * loss.abs() + TINY } else { 0.0 };
        let bound = if self.is_confident(row) {
            let y = self.problem.targets.to_i64()[row] as usize;
            let nll = -self.log_p[row * self.problem.classes + y];
            let log = if nll > 0.0 { nll.ln().abs() } else { 0.0 };
            (2.0 * U23 * (1.0 + log) * loss.abs()).max(2e-7 * scale)
        } else {
            2e-7 * scale.max(self.root_of_squares(row))
        };
        bound + self.share_of_lse(row) + rounding + 1e-300
    }

    fn spread(&self, row: usize) -> f64 {
        let r = self.case.row_weights.as_ref().map_or(1.0, |r| r[row]);
        r * self.problem.label_smoothing / self.problem.classes as f64
    }

    /// Under smoothing all weights multiply one lse, and therefore its error.
    fn share_of_lse(&self, row: usize) -> f64 {
        let total: f64 = match &self.case.class_weights {
            Some(weights) => weights.iter().sum(),
            None => self.problem.classes as f64,
        };
        (self.spread(row) * total).abs() * U23
    }

    /// The root of the sum of squares of the smoothing terms, each of which is rounded to f32. It
    /// exceeds the largest term only where weights of both signs cancel.
    fn root_of_squares(&self, row: usize) -> f64 {
        let Some(weights) = self.case.class_weights.as_ref().filter(|_| self.spread(row) != 0.0)
        else {
            return 0.0;
        };
        let log_p = &self.log_p[row * weights.len()..][..weights.len()];
        let terms = weights.iter().zip(log_p).filter(|(w, _)| **w != 0.0);
        let squares: f64 = terms.map(|(w, log_p)| (w * log_p).powi(2)).sum();
        self.spread(row) * squares.sqrt()
    }

    fn is_confident(&self, row: usize) -> bool {
        let y = self.problem.targets.to_i64()[row];
        let inside = (0..self.problem.classes as i64).contains(&y);
        inside
            && self.problem.label_smoothing == 0.0
            && -self.log_p[row * self.problem.classes + y as usize] < CONFIDENT
    }

    /// Checks the results of a forward.
    #[track_caller]
    pub fn losses(&self, run: &Run) -> Worst {
        let mut worst = Worst::default();
        let want = &self.outcome;
        assert_eq!(run.kept_rows, want.kept_rows, "kept rows");
        close(run.normalizer, want.normalizer, 1e-12 * want.normalizer.abs(), || {
            "normalizer".to_string()
        });
        let mut total = 0.0;
        for row in 0..self.problem.rows {
            // An error of 1 ulp in the exponentials moves ln Σ by 2^-23. Three additions to 1 that
            // round the same way move it by half as much again.
            let bound = 2e-7 * want.lse_scale[row] + 2.0 * U23;
            let error = close(run.lse[row], want.lse[row], bound, || format!("lse[{row}]"));
            worst.lse = worst.lse.max(error);

            let bound = self.bound_of_row_loss(row);
            let loss = if self.problem.short_row_losses {
                to_f32_range(want.row_losses[row], bound)
            } else {
                want.row_losses[row]
            };
            let error = close(run.row_losses[row], loss, bound, || format!("row_losses[{row}]"));
            if !self.problem.short_row_losses {
                if self.is_confident(row) {
                    worst.confident = worst.confident.max(error);
                } else {
                    worst.loss = worst.loss.max(error);
                }
            }
            total += bound;
        }
        if self.problem.reduction != Reduction::None {
            let divisor = match self.problem.reduction {
                Reduction::Mean => want.normalizer.abs(),
                _ => 1.0,
            };
            close(run.loss, want.loss, total / divisor, || "loss".to_string());
        }
        worst
    }

    /// Checks a gradient; `lse` is the input of a backward.
    #[track_caller]
    pub fn gradient(&self, grad: &[f32], lse: Option<&[f64]>) -> Worst {
        let mut worst = Worst::default();
        let problem = self.problem;
        let classes = problem.classes;
        let targets = problem.targets.to_i64();
        let weights = problem.weights();
        let w = |c: usize| weights.as_ref().map_or(1.0, |w| w[c]);
        let weight_total: f64 = (0..classes).map(w).sum();
        let smoothing = problem.label_smoothing;
        let normalizer = match problem.reduction {
            Reduction::Mean => self.outcome.normalizer,
            _ => 1.0,
        };
        for row in 0..problem.rows {
            let upstream = match self.case.grad_output.as_slice() {
                [one] => *one,
                rows => rows[row],
            };
            let r = self.case.row_weights.as_ref().map_or(1.0, |r| r[row]);
            let kept = self.case.row_mask.as_ref().is_none_or(|mask| mask[row])
                && targets[row] != problem.ignore_index;
            let scale = upstream * problem.grad_scale * r / normalizer;
            let range = row * classes..(row + 1) * classes;
            let old = problem.accumulate.as_ref().map(|old| &old[range.clone()]);
            let got = &grad[range.clone()];
            if !kept || r == 0.0 {
                for c in 0..classes {
                    let want = old.map_or(0.0, |old| old[c]);
                    assert!(got[c] == want, "gradient of ignored row {row}: {}", got[c]);
                }
                continue;
            }
            if normalizer == 0.0 {
                // x/0 or 0/0, times a factor that may be 0.
                assert!(got.iter().all(|g| !g.is_finite()), "row {row} over 0");
                continue;
            }
            let y = targets[row] as usize;
            let target_mass = scale * (1.0 - smoothing) * w(y);
            let spread = scale * smoothing / classes as f64;
            let total = target_mass + spread * weight_total;
            let terms = target_mass.abs() + (spread * weight_total).abs();
            let from_lse = lse.map_or(0.0, |lse| U52 * lse[row].abs());
            for c in 0..classes {
                let at = range.start + c;
                let (p, log_p) = (self.p[at], self.log_p[at]);
                let want = self.outcome.grad_logits[at];
                let mut bound = if c == y {
                    // q and 1 - q share their error.
                    let one_minus_p = -log_p.exp_m1();
                    let q = p.min(one_minus_p);
                    let inside = q * U23 * (1.0 + q.ln().abs()) + p * from_lse;
                    let inside = if q == 0.0 { p * from_lse } else { inside };
                    terms * (inside + U52) + HALF_ULP * want.abs()
                } else {
                    let log = if p == 0.0 { 0.0 } else { log_p.abs() };
                    let inside = p * (U23 * (1.0 + log) + from_lse) + 1e-37;
                    let subtrahend = (spread * w(c)).abs();
                    let roundings = if weights.is_some() { 3.0 } else { 1.0 };
                    let difference = if spread == 0.0 { 0.0 } else { want.abs() };
                    total.abs() * (inside + HALF_ULP * p)
                        + terms * p * 4.0 * U52
                        + HALF_ULP * (roundings * subtrahend + difference)
                };
                bound += TINY;
                let what = || {
                    format!(
                        "gradient of row {row}, class {c} (target {y}, p {p:e}, lse {:?})",
                        lse.map(|l| l[row])
                    )
                };
                let error = match old {
                    None => close(f64::from(got[c]), to_f32_range(want, bound), bound, what),
                    Some(old) => {
                        let old = f64::from(old[c]);
                        let sum = old + want;
                        bound += HALF_ULP * sum.abs();
                        close(f64::from(got[c]), to_f32_range(sum, bound), bound, what)
                    }
                };
                // The allowances for underflow and for the addition say nothing about the arithmetic.
                if old.is_some() || want.abs() < 1e3 * (TINY + 1e-37 * total.abs()) {
                    continue;
                }
                let slot = match (lse.is_some(), c == y) {
                    (false, false) => &mut worst.grad,
                    (false, true) => &mut worst.target,
                    (true, false) => &mut worst.backward_grad,
                    (true, true) => &mut worst.backward_target,
                };
                *slot = slot.max(error);
            }
        }
        worst
    }

    /// The largest errors of p as stored, without any allowance for its roundings, under the sum reduction.
    pub fn strict(&self, grad: &[f32]) -> Strict {
        let problem = self.problem;
        assert!(problem.reduction == Reduction::Sum && problem.label_smoothing == 0.0);
        let targets = problem.targets.to_i64();
        let mut strict = Strict::default();
        for (row, &y) in targets.iter().enumerate() {
            for c in 0..problem.classes {
                let at = row * problem.classes + c;
                let target_mass = y == c as i64;
                let (q, log) = if target_mass {
                    let one_minus_p = -self.log_p[at].exp_m1();
                    (one_minus_p, one_minus_p.ln())
                } else {
                    (self.p[at], self.log_p[at])
                };
                if q < 1e-37 {
                    continue;
                }
                let error = (f64::from(grad[at]).abs() - q).abs() / (q * U23);
                let unit = 2.0 + log.abs();
                let slot = if target_mass { &mut strict.target } else { &mut strict.other };
                *slot = slot.max(error / unit);
                if !target_mass && q > 0.5 {
                    strict.near_one = strict.near_one.max(error / unit);
                    strict.near_one_ulps = strict.near_one_ulps.max(error);
                }
            }
        }
        strict
    }
}

/// Errors of a probability in units of its bound, `2^-23·(2 + |ln p|)`.
#[derive(Clone, Copy, Debug, Default)]
pub struct Strict {
    pub other: f64,
    pub target: f64,
    /// Of classes with p > 1/2 that are not the target.
    pub near_one: f64,
    /// The error of those classes in units of 2^-23.
    pub near_one_ulps: f64,
}

impl std::fmt::Display for Strict {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "p over 2^-23(2 + |ln p|) {:.3}, where p > 1/2 {:.3} ({:.3}·2^-23), 1 - p of the target {:.3}",
            self.other, self.near_one, self.near_one_ulps, self.target
        )
    }
}

/// Runs every pass of a problem on every instruction set, and compares each result with the oracle and
/// with the other passes.
#[track_caller]
pub fn check<'a>(problem: &Problem, how: impl Fn(Isa) -> How<'a>) -> Vec<(Isa, Worst)> {
    let judge = Judge::new(problem);
    let mut all = Vec::new();
    for isa in isas() {
        let how = how(isa);
        let forward = problem.run(Pass::Forward, &how);
        let mut worst = judge.losses(&forward);

        let fused = problem.run(Pass::Fused, &how);
        fused.assert_same_losses(&forward, "forward and fused");
        worst.add(&judge.gradient(&fused.grad, None));

        let lse = &forward.lse;
        let backward = problem.run(Pass::Backward(lse), &how);
        worst.add(&judge.gradient(&backward.grad, Some(lse)));

        if problem.accumulate.is_none() {
            let in_place = problem.run(Pass::FusedInPlace, &how);
            in_place.assert_same(&fused, "in place and out of place");
            let in_place = problem.run(Pass::BackwardInPlace(lse), &how);
            assert_same(&in_place.grad, &backward.grad, "backward in place");
        }
        all.push((isa, worst));
    }
    all
}
