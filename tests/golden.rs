//! xent against PyTorch and against exact results, from tests/golden/generate.py.
//!
//! # How errors are compared
//!
//! An **error** is the distance to the exact result, in units in the last place of the largest term of
//! the result, in the dtype of PyTorch's result (docs/semantics.md: where terms cancel, errors are
//! relative to the largest). The terms are the oracle's `loss_scale`, `lse_scale`, `kl_scale` and
//! `grad_magnitude`; `p − 1` at a target is one term. A sum or mean over rows has the largest term of
//! any row.
//!
//! For each result of a case, the largest error over the elements may exceed PyTorch's largest error by
//! **one unit**. In f64 it may exceed it by two: PyTorch's small cases are often exact to the last
//! place, and the oracle's operations cost more than one unit. The test does not compare element by
//! element, since PyTorch's rounding errors happen to cancel in some. Two allowances come from the
//! accuracy table:
//!
//! - the unit of an entry of a gradient, or of a softmax, is `1 + |ln p|/4` units of its dtype: the
//!   cost of sums in base 2^f32(log2 e) (docs/design.md), and a quarter of the table's bound. Halves
//!   do not get it, since they are rounded from f32.
//! - a backward from an f64 lse may be off by a further `2⁻⁵²·|lse|·p`.
//!
//! Values below 1e-37 (1e-300 in f64) count as 0.
//!
//! Where PyTorch and the exact result **differ in kind** (one is finite, the other is not), the case
//! says why (`differs=`, explained in generate.py). xent's result must have the kind of the exact
//! result, which follows docs/semantics.md; elements that are NaN or infinite in PyTorch do not count
//! for PyTorch's largest error. A gradient over a denominator of 0 must not be finite, but may have
//! either kind.
//!
//! Every case runs on every instruction set, with classes last and, if it has inner positions, in
//! PyTorch's layout; out of place and in place; fused and from the lse of a forward.

#[path = "golden/vectors.rs"]
mod vectors;

use common::reference::{self, Outcome};
use std::collections::BTreeMap;
use vectors::*;
use xent::{CrossEntropy, Error, Isa, Reduction, Results, Softmax};

fn isas() -> Vec<Isa> {
    let (run, skipped): (Vec<Isa>, Vec<Isa>) =
        Isa::ALL.into_iter().partition(|isa| isa.is_available());
    for isa in skipped {
        println!("SKIPPED: this processor does not have {}", isa.name());
    }
    assert!(!run.is_empty());
    run
}

/// The units by which an error may exceed PyTorch's.
const LEEWAY: f64 = 1.0;

/// All failures and the largest errors of a test, for one report at its end.
#[derive(Default)]
struct Report {
    failures: Vec<String>,
    checks: usize,
    /// The largest errors of xent and of PyTorch, by result and dtype.
    worst: BTreeMap<String, (f64, f64)>,
}

impl Report {
    fn expect(&mut self, good: bool, what: impl FnOnce() -> String) {
        self.checks += 1;
        if !good {
            self.failures.push(what());
        }
    }

    fn finish(self, source: Source) {
        println!("{}: {} checks; units off at worst, xent and PyTorch:", source.0, self.checks);
        for (what, (ours, torch)) in &self.worst {
            println!("    {what}: {ours:.3}, {torch:.3}");
        }
        let shown = self.failures.iter().take(60);
        for failure in shown {
            println!("FAILED {failure}");
        }
        let failed = self.failures.len();
        assert!(failed == 0, "{}: {failed} of {} checks failed", source.0, self.checks);
    }
}

/// The expected values of one result, and their allowances.
struct Expected<'a> {
    what: &'static str,
    exact: Vec<f64>,
    torch: &'a Tensor,
    /// For each element its largest term, and the factor of its unit.
    scale: Vec<f64>,
    units: Vec<f64>,
    /// A value that is not finite may have any sign and kind.
    any_kind: bool,
}

impl Expected<'_> {
    /// The error of element `i` in units; tiny values count as 0.
    fn error(&self, i: usize, got: f64, slack: f64) -> f64 {
        let tiny = if matches!(self.torch, Tensor::F64(_)) { 1e-300 } else { 1e-37 };
        let exact = self.exact[i];
        let off = ((got - exact).abs() - slack - tiny * self.scale[i].max(1.0)).max(0.0);
        off / (self.torch.ulp(exact.abs().max(self.scale[i])) * self.units[i])
    }

    /// `slack` is a further absolute error that an element may have.
    fn check(&self, report: &mut Report, at: &str, got: &[f64], slack: impl Fn(usize) -> f64) {
        let torch = self.torch.to_f64();
        assert_eq!((got.len(), torch.len()), (self.exact.len(), self.exact.len()));
        let kind = |x: f64| if x.is_finite() { 0.0 } else { x };
        let same = |x: f64, y: f64| kind(x) == kind(y) || x.is_nan() && y.is_nan();
        let (mut ours, mut theirs, mut worst) = (0f64, 0f64, 0);
        for (i, &exact) in self.exact.iter().enumerate() {
            let good =
                same(got[i], exact) || self.any_kind && !exact.is_finite() && !got[i].is_finite();
            report.expect(good, || {
                format!("{at}: {}[{i}] is {:e}, not {exact:e}", self.what, got[i])
            });
            if good && exact.is_finite() {
                let error = self.error(i, got[i], slack(i));
                if error > ours {
                    (ours, worst) = (error, i);
                }
            }
            if exact.is_finite() && torch[i].is_finite() {
                theirs = theirs.max(self.error(i, torch[i], 0.0));
            }
        }
        report.expect(ours <= theirs + LEEWAY, || {
            format!(
                "{at}: {}[{worst}] is {:e}, not {:e}: {ours:.3} units off; of PyTorch's at worst {theirs:.3}",
                self.what, got[worst], self.exact[worst]
            )
        });
        let dtype = match self.torch {
            Tensor::F64(_) => "f64",
            Tensor::F32(_) => "f32",
            Tensor::Bf16(_) => "bf16",
            _ => "f16",
        };
        let entry = report.worst.entry(format!("{} in {dtype}", self.what)).or_default();
        *entry = (entry.0.max(ours), entry.1.max(theirs));
    }
}

/// The factor of the unit of an exponential of `log_p`.
fn units_of_exponential(like: &Tensor, log_p: f64) -> f64 {
    let wide = matches!(like, Tensor::F32(_) | Tensor::F64(_));
    if wide && log_p.is_finite() { 1.0 + log_p.abs() / 4.0 } else { 1.0 }
}

/// A cross-entropy case with its operands in one layout.
struct Problem<'a> {
    case: &'a Case,
    dims: [usize; 3],
    /// Exchange classes and inner positions on the way in and out.
    exchange: bool,
    logits: Tensor,
    targets: Option<Tensor>,
    target_classes: Option<Tensor>,
    mask: Option<Vec<u8>>,
}

/// The results of one call, in the layout of the case.
#[derive(Default)]
struct Got {
    loss: f64,
    z_loss: f64,
    entropy_bonus: f64,
    normalizer: f64,
    z_normalizer: f64,
    kept_rows: u64,
    correct: u64,
    rows: Vec<f64>,
    lse: Vec<f64>,
    entropy: Vec<f64>,
    kl: Vec<f64>,
    argmax: Vec<i64>,
    grad: Vec<f64>,
}

impl<'a> Problem<'a> {
    fn new(case: &'a Case, exchange: bool) -> Problem<'a> {
        let dims @ [rows, classes, inner] = case.dims();
        let laid_out = |tensor: &Tensor, sizes: [usize; 3]| {
            if exchange { tensor.exchanged(sizes) } else { tensor.clone() }
        };
        let of_targets = case.target_sizes();
        let targets = |tensor: &Tensor| {
            laid_out(tensor, if tensor.is_float() { of_targets } else { [rows, 1, inner] })
        };
        Problem {
            case,
            dims: if exchange { [rows * inner, classes, 1] } else { dims },
            exchange,
            logits: laid_out(case.tensor("logits"), dims),
            targets: case.find("targets").map(targets),
            target_classes: case.find("target_classes").map(|listed| laid_out(listed, of_targets)),
            mask: case.mask(),
        }
    }

    fn call(&self, isa: Isa) -> CrossEntropy<'_> {
        let case = self.case;
        let [rows, classes, inner] = self.dims;
        let mut call = CrossEntropy::new(rows, classes)
            .inner(inner)
            .isa(isa)
            .ignore_index(case.ignore_index())
            .label_smoothing(case.number("eps", 0.0))
            .z_loss(case.number("z", 0.0))
            .entropy_bonus(case.number("beta", 0.0))
            .softcap(case.number("cap", 0.0))
            .logit_scale(case.number("scale", 1.0))
            .normalizer(case.number("normalizer", 0.0))
            .z_normalizer(case.number("z_normalizer", 0.0))
            .target_scale(case.number("target_scale", 0.0))
            .log_probs(case.log_probs())
            .reduction(match case.reduction() {
                reference::Reduction::Mean => Reduction::Mean,
                reference::Reduction::Sum => Reduction::Sum,
                reference::Reduction::None => Reduction::None,
            });
        if let Some(weights) = case.find("weights") {
            call = call.class_weights(weights.input());
        }
        if let Some(weights) = case.find("row_weights") {
            call = call.row_weights(weights.input());
        }
        if let Some(mask) = &self.mask {
            call = call.row_mask(mask);
        }
        if let Some(listed) = &self.target_classes {
            call = call.target_classes(listed.input(), case.target_sizes()[1]);
        }
        if let Some(upstream) = case.find("upstream") {
            call = call.grad_output(upstream.input());
        }
        call
    }

    fn has_loss(&self) -> bool {
        self.targets.is_some() && self.case.reduction() != reference::Reduction::None
    }

    fn has_softmax(&self) -> bool {
        !self.case.log_probs()
    }

    /// Makes a call with every result that the problem can have.
    fn with_results(
        &self,
        call: impl FnOnce(Results<'_>) -> Result<(), Error>,
    ) -> Result<Got, Error> {
        let rows = self.dims[0] * self.dims[2];
        let index = self.targets.as_ref().is_some_and(|targets| !targets.is_float());
        let has_targets = self.targets.is_some();
        let has_kl = has_targets && !index;
        let mut got = Got {
            rows: vec![f64::MAX; if has_targets { rows } else { 0 }],
            lse: vec![f64::MAX; if self.has_softmax() { rows } else { 0 }],
            entropy: vec![f64::MAX; if self.has_softmax() { rows } else { 0 }],
            kl: vec![f64::MAX; if has_kl { rows } else { 0 }],
            argmax: vec![-1; rows],
            ..Got::default()
        };
        call(Results {
            loss: self.has_loss().then_some(&mut got.loss),
            z_loss: (self.has_loss() && self.has_softmax()).then_some(&mut got.z_loss),
            entropy_bonus: (self.has_loss() && self.has_softmax())
                .then_some(&mut got.entropy_bonus),
            normalizer: has_targets.then_some(&mut got.normalizer),
            z_normalizer: has_targets.then_some(&mut got.z_normalizer),
            kept_rows: has_targets.then_some(&mut got.kept_rows),
            correct: index.then_some(&mut got.correct),
            row_losses: has_targets.then(|| (&mut got.rows).into()),
            lse: self.has_softmax().then_some(&mut got.lse),
            entropy: self.has_softmax().then(|| (&mut got.entropy).into()),
            kl: has_kl.then(|| (&mut got.kl).into()),
            argmax: Some(&mut got.argmax),
            ..Results::default()
        })?;
        Ok(got)
    }

    /// The gradient in the layout of the case.
    fn gradient(&self, grad: &Tensor) -> Vec<f64> {
        let [rows, classes, inner] = self.case.dims();
        if self.exchange { grad.exchanged([rows, inner, classes]) } else { grad.clone() }.to_f64()
    }

    fn forward(&self, isa: Isa) -> Result<Got, Error> {
        self.with_results(|results| match &self.targets {
            Some(targets) => {
                self.call(isa).forward_with(self.logits.input(), targets.input(), results)
            }
            None => self.call(isa).evaluate(self.logits.input(), results),
        })
    }

    fn fused(&self, isa: Isa, targets: &Tensor) -> Result<Got, Error> {
        let mut grad = self.logits.poisoned();
        let got = self.with_results(|results| {
            let (logits, grad) = (self.logits.input(), grad.output());
            self.call(isa).forward_backward_with(logits, targets.input(), grad, results)
        })?;
        Ok(Got { grad: self.gradient(&grad), ..got })
    }

    fn fused_in_place(&self, isa: Isa, targets: &Tensor) -> Result<Got, Error> {
        let mut grad = self.logits.clone();
        let got = self.with_results(|results| {
            let call = self.call(isa);
            call.forward_backward_in_place_with(grad.output(), targets.input(), results)
        })?;
        Ok(Got { grad: self.gradient(&grad), ..got })
    }

    fn backward(&self, isa: Isa, targets: &Tensor, lse: &[f64]) -> Result<Vec<f64>, Error> {
        let mut grad = self.logits.poisoned();
        let call = self.call(isa);
        call.backward(self.logits.input(), targets.input(), lse, grad.output())?;
        Ok(self.gradient(&grad))
    }

    fn backward_in_place(
        &self,
        isa: Isa,
        targets: &Tensor,
        lse: &[f64],
    ) -> Result<Vec<f64>, Error> {
        let mut grad = self.logits.clone();
        self.call(isa).backward_in_place(grad.output(), targets.input(), lse)?;
        Ok(self.gradient(&grad))
    }

    fn backward_targets(&self, isa: Isa, targets: &Tensor, lse: &[f64]) -> Result<Vec<f64>, Error> {
        let mut grad = self.case.tensor("torch_grad_targets").poisoned();
        let call = self.call(isa);
        call.backward_targets(self.logits.input(), targets.input(), lse, grad.output())?;
        Ok(self.gradient(&grad))
    }
}

/// A case, the oracle's scales, and the expected values of each result.
struct Judge<'a> {
    case: &'a Case,
    out: Outcome,
    expected: BTreeMap<&'static str, Expected<'a>>,
    /// For each logit the derivative of its gradient by lse.
    by_lse: Vec<f64>,
}

impl<'a> Judge<'a> {
    fn new(case: &'a Case) -> Judge<'a> {
        let problem = case.problem();
        let out = reference::evaluate(&problem);
        let [rows, classes, inner] = case.dims();
        let largest = |terms: &[f64]| terms.iter().fold(0.0, |m: f64, x| m.max(x.abs()));
        let mean = case.reduction() == reference::Reduction::Mean;
        let normalizer = if mean { out.normalizer.abs() } else { 1.0 };

        // The softmax: ln p, and the derivatives by lse.
        let transformed: Vec<f64> = problem
            .logits
            .iter()
            .map(|x| {
                let x = x * problem.logit_scale;
                let cap = problem.softcap;
                if cap > 0.0 { cap * (x / cap).tanh() } else { x }
            })
            .collect();
        let log_p = if case.log_probs() {
            vec![0.0; transformed.len()]
        } else {
            reference::log_softmax(&transformed, rows, classes, inner)
        };
        let weight = problem.class_weights.as_ref().map_or(1.0, |w| largest(w));
        let by_lse = (0..log_p.len())
            .map(|j| {
                let i = j / (classes * inner) * inner + j % inner;
                let upstream = match problem.grad_output.as_slice() {
                    [one] => *one,
                    rows => rows[i],
                };
                let r = problem.row_weights.as_ref().map_or(1.0, |r| r[i]);
                let mass: f64 = match &problem.targets {
                    reference::Targets::Probabilities(t) => {
                        let first = j / (classes * inner) * classes * inner + j % inner;
                        (0..classes).map(|c| t[first + c * inner].abs()).sum::<f64>() + 1.0
                    }
                    _ => 1.0,
                };
                // z-loss: 2λ·p·lse depends on lse as well.
                let z = 2.0 * problem.z_loss * (1.0 + out.lse.get(i).map_or(0.0, |lse| lse.abs()));
                // The entropy bonus: β·p·(ln p + H).
                let entropy = out.entropy.get(i).copied().unwrap_or(0.0);
                let log = if log_p[j].is_finite() { log_p[j].abs() } else { 0.0 };
                let bonus = problem.entropy_bonus.abs() * (1.0 + log + entropy);
                let part = (weight * mass / normalizer + z + bonus) * problem.logit_scale;
                (upstream * r).abs() * part * log_p[j].exp()
            })
            .collect();

        let gradient = |like: &Tensor| {
            let units = log_p.iter().map(|&log_p| units_of_exponential(like, log_p));
            units.collect::<Vec<f64>>()
        };
        let mut expected = BTreeMap::new();
        let mut add = |what: &'static str, scale: Vec<f64>, by_exponential: bool| {
            if let (Some(torch), Some(exact)) =
                (case.find(&format!("torch_{what}")), case.find(what))
            {
                let any_kind = case.text("differs") == Some("zero-denominator");
                let units = if by_exponential { gradient(torch) } else { vec![1.0; torch.len()] };
                let exact = exact.to_f64();
                expected.insert(what, Expected { what, exact, torch, scale, units, any_kind });
            }
        };
        let finite = |terms: &[f64]| -> Vec<f64> {
            terms.iter().map(|x| if x.is_finite() { x.abs() } else { 0.0 }).collect()
        };
        let total = largest(&finite(&out.loss_scale)) / normalizer;
        add("loss", finite(&[total]), false);
        add("rows", finite(&out.loss_scale), false);
        add("lse", finite(&out.lse_scale), false);
        add("entropy", finite(&out.lse_scale), false);
        // An error of t moves t·ln t by as much, whatever ln t is.
        let with_targets: Vec<f64> = finite(&out.kl_scale).iter().map(|x| 1.0 + x).collect();
        add("kl", with_targets, false);
        add("grad", finite(&out.grad_magnitude), true);
        add("grad_targets", vec![0.0; out.grad_targets.len()], false);
        Judge { case, out, expected, by_lse }
    }

    fn check(
        &self,
        report: &mut Report,
        at: &str,
        what: &str,
        got: &[f64],
        slack: impl Fn(usize) -> f64,
    ) {
        if let Some(expected) = self.expected.get(what) {
            expected.check(report, at, got, slack);
        }
    }

    fn losses(&self, report: &mut Report, at: &str, got: &Got) {
        if self.expected.contains_key("loss") {
            self.check(report, at, "loss", &[got.loss], |_| 0.0);
        }
        self.check(report, at, "rows", &got.rows, |_| 0.0);
        // An error of one unit in the exponentials moves ln Σ by 2^-23 in f32.
        let f64_logits = matches!(self.case.tensor("logits"), Tensor::F64(_));
        let unit = if f64_logits { f64::EPSILON } else { f64::from(f32::EPSILON) };
        self.check(report, at, "lse", &got.lse, |_| unit);
        self.check(report, at, "entropy", &got.entropy, |_| unit);
        // Its logp has the error of lse.
        self.check(report, at, "kl", &got.kl, |_| unit);
        if let Some(argmax) = self.case.find("argmax") {
            report.expect(got.argmax == argmax.to_i64(), || {
                format!("{at}: argmax is {:?}, not {:?}", got.argmax, argmax.to_i64())
            });
        }
        if self.case.find("targets").is_none() {
            return;
        }
        let want = &self.out;
        report.expect(got.kept_rows == want.kept_rows, || {
            format!("{at}: {} kept rows, not {}", got.kept_rows, want.kept_rows)
        });
        report.expect(got.correct == want.correct, || {
            format!("{at}: {} correct, not {}", got.correct, want.correct)
        });
        for (what, got, want) in [
            ("normalizer", got.normalizer, want.normalizer),
            ("z_normalizer", got.z_normalizer, want.z_normalizer),
        ] {
            report.expect((got - want).abs() <= 1e-12 * want.abs(), || {
                format!("{at}: {what} is {got:e}, not {want:e}")
            });
        }
        if self.expected.contains_key("loss") && !self.case.log_probs() {
            let all = got;
            let (got, want) = (all.z_loss, want.z_loss);
            // λ·lse² of a row: lse may be off by 2e-7 of its larger term.
            let lse = self.out.lse_scale.iter().fold(0.0, |m: f64, x| m.max(x.abs()));
            let bound = 1e-6 * self.case.number("z", 0.0) * lse.max(1.0).powi(2);
            let rows = self.out.lse.len() as f64;
            let good = got == want
                || got.is_nan() && want.is_nan()
                || (got - want).abs() <= bound * rows + 1e-6 * want.abs();
            report.expect(good, || format!("{at}: z_loss is {got:e}, not {want:e}"));
            let (got, want) = (all.entropy_bonus, self.out.entropy_bonus);
            let beta = self.case.number("beta", 0.0).abs();
            let good = got == want
                || got.is_nan() && want.is_nan()
                || (got - want).abs() <= 1e-6 * beta * (1.0 + lse) * rows;
            report.expect(good, || format!("{at}: entropy_bonus is {got:e}, not {want:e}"));
        }
    }
}

fn cross_entropy(case: &Case, isas: &[Isa], report: &mut Report) {
    let judge = Judge::new(case);
    let none = |_| 0.0;
    let last = case.dims()[2] == 1;
    for &exchange in if last { &[false][..] } else { &[false, true] } {
        let problem = Problem::new(case, exchange);
        for &isa in isas {
            let place = format!(
                "{}, {}, {}",
                case.name,
                isa.name(),
                if last || exchange { "classes last" } else { "native" }
            );
            let at = |call: &str| format!("{place}, {call}");
            // A call that fails counts as one failure.
            macro_rules! run {
                ($call:expr, $result:expr) => {{
                    let result = $result;
                    let error = result.as_ref().err().map(ToString::to_string);
                    report.expect(error.is_none(), || {
                        format!("{}: {}", at($call), error.unwrap_or_default())
                    });
                    result.ok()
                }};
            }
            let forward = run!("forward", problem.forward(isa));
            if let Some(got) = &forward {
                judge.losses(report, &at("forward"), got);
            }
            let Some(targets) = &problem.targets else { continue };
            if let Some(got) = run!("fused", problem.fused(isa, targets)) {
                judge.losses(report, &at("fused"), &got);
                judge.check(report, &at("fused"), "grad", &got.grad, none);
            }
            if let Some(got) = run!("fused in place", problem.fused_in_place(isa, targets)) {
                judge.losses(report, &at("fused in place"), &got);
                judge.check(report, &at("fused in place"), "grad", &got.grad, none);
            }
            // From the exact lse if it is known: a check must not depend on an earlier call.
            let lse = &judge.out.lse;
            let inner = case.dims()[2];
            let width = case.dims()[1] * inner;
            let slack = |j: usize| {
                let lse = lse.get(j / width * inner + j % inner).map_or(0.0, |lse| lse.abs());
                if lse.is_finite() { f64::EPSILON * lse * judge.by_lse[j] } else { 0.0 }
            };
            if let Some(grad) = run!("backward", problem.backward(isa, targets, lse)) {
                judge.check(report, &at("backward"), "grad", &grad, slack);
            }
            let in_place = problem.backward_in_place(isa, targets, lse);
            if let Some(grad) = run!("backward in place", in_place) {
                judge.check(report, &at("backward in place"), "grad", &grad, slack);
            }
            if targets.is_float() && !case.distils() {
                let grad = problem.backward_targets(isa, targets, lse);
                if let Some(grad) = run!("backward of targets", grad) {
                    // lse − x, of an lse that is rounded to f64.
                    let at = at("backward of targets");
                    let scale = |j: usize| {
                        let row = j / width * inner + j % inner;
                        let exact = judge.expected["grad_targets"].exact[j];
                        match lse.get(row) {
                            Some(lse) if lse.is_finite() && exact.is_finite() => {
                                let factor = judge.by_targets(j);
                                // x after scaling, rounded to the lanes' type.
                                let x = if judge.rounds_logits() && factor > 0.0 {
                                    f64::from(f32::EPSILON) * (lse.abs() + exact.abs() / factor)
                                } else {
                                    0.0
                                };
                                (f64::EPSILON * (1.0 + lse.abs()) + x) * factor
                            }
                            _ => 0.0,
                        }
                    };
                    judge.check(report, &at, "grad_targets", &grad, scale);
                }
            }
        }
    }
}

impl Judge<'_> {
    /// Logits are scaled or capped, and then rounded to f32.
    fn rounds_logits(&self) -> bool {
        let transformed =
            self.case.number("scale", 1.0) != 1.0 || self.case.number("cap", 0.0) != 0.0;
        transformed && !matches!(self.case.tensor("logits"), Tensor::F64(_))
    }

    /// The factor of `lse − x` in the gradient of a target.
    fn by_targets(&self, j: usize) -> f64 {
        let problem = self.case.problem();
        let [_, classes, inner] = self.case.dims();
        let row = j / (classes * inner) * inner + j % inner;
        let class = j / inner % classes;
        let upstream = match problem.grad_output.as_slice() {
            [one] => *one,
            rows => rows[row],
        };
        let mean = problem.reduction == reference::Reduction::Mean;
        let r = problem.row_weights.as_ref().map_or(1.0, |r| r[row]);
        let w = problem.class_weights.as_ref().map_or(1.0, |w| w[class]);
        (upstream * r * w).abs() / if mean { self.out.normalizer.abs() } else { 1.0 }
    }
}

fn every(source: Source) {
    let (isas, mut report) = (isas(), Report::default());
    for case in load(source) {
        cross_entropy(&case, &isas, &mut report);
    }
    report.finish(source);
}

#[test]
fn index_targets() {
    every(INDEX);
}

#[test]
fn probability_targets() {
    every(SOFT);
}

#[test]
fn log_probabilities() {
    every(NLL);
}

#[test]
fn composed() {
    every(COMPOSED);
}

#[test]
fn entropy_bonus() {
    every(BONUS);
}

#[test]
fn distillation() {
    every(DISTILLATION);
}

#[test]
fn introductions() {
    every(INTRO);
}

/// Softmax or log-softmax of one case in one layout.
struct SoftmaxCall<'a> {
    call: Softmax<'a>,
    log: bool,
}

impl SoftmaxCall<'_> {
    fn forward(&self, x: &Tensor) -> Result<Tensor, Error> {
        let mut y = x.poisoned();
        let call = if self.log { Softmax::log_softmax } else { Softmax::softmax };
        call(&self.call, x.input(), y.output())?;
        Ok(y)
    }

    fn forward_in_place(&self, x: &Tensor) -> Result<Tensor, Error> {
        let mut y = x.clone();
        if self.log {
            self.call.log_softmax_in_place(y.output())?;
        } else {
            self.call.softmax_in_place(y.output())?;
        }
        Ok(y)
    }

    fn backward(&self, y: &Tensor, grad_y: &Tensor) -> Result<Tensor, Error> {
        let mut grad = y.poisoned();
        let call = if self.log { Softmax::log_softmax_backward } else { Softmax::softmax_backward };
        call(&self.call, y.input(), grad_y.input(), grad.output())?;
        Ok(grad)
    }

    fn backward_in_place(&self, y: &Tensor, grad_y: &Tensor) -> Result<Tensor, Error> {
        let mut grad = grad_y.clone();
        if self.log {
            self.call.log_softmax_backward_in_place(y.input(), grad.output())?;
        } else {
            self.call.softmax_backward_in_place(y.input(), grad.output())?;
        }
        Ok(grad)
    }

    fn backward_over(&self, y: &Tensor, grad_y: &Tensor) -> Result<Tensor, Error> {
        let mut grad = y.clone();
        if self.log {
            self.call.log_softmax_backward_over(grad.output(), grad_y.input())?;
        } else {
            self.call.softmax_backward_over(grad.output(), grad_y.input())?;
        }
        Ok(grad)
    }
}

/// The expected results of a softmax case.
fn expect_softmax(case: &Case) -> (Expected<'_>, Option<Expected<'_>>) {
    let log = case.text("call") == Some("log_softmax");
    let [_, classes, inner] = case.dims();
    let (torch, exact) = (case.tensor("torch_y"), case.tensor("y").to_f64());
    let units = exact.iter().map(|&y| if log { 1.0 } else { units_of_exponential(torch, y.ln()) });
    let forward = Expected {
        what: if log { "log_softmax" } else { "softmax" },
        units: units.collect(),
        scale: vec![0.0; exact.len()],
        torch,
        exact,
        any_kind: false,
    };
    let backward = case.find("grad_y").map(|grad_y| {
        let (y, g) = (case.tensor("torch_y").to_f64(), grad_y.to_f64());
        let exact = case.tensor("grad").to_f64();
        // y·(g − Σ y·g) or g − exp(y)·Σ g: the terms of the difference and of the sum.
        let scale = (0..y.len()).map(|j| {
            let first = j / (classes * inner) * classes * inner + j % inner;
            let row = (0..classes).map(|c| first + c * inner);
            let terms = row.map(|j| if log { g[j].abs() } else { (y[j] * g[j]).abs() });
            let largest = terms.fold(0.0, f64::max);
            let scale = if log {
                g[j].abs().max(y[j].exp() * largest)
            } else {
                y[j] * largest.max(g[j].abs())
            };
            if scale.is_finite() { scale } else { 0.0 }
        });
        let torch = case.tensor("torch_grad");
        Expected {
            what: if log { "log_softmax_backward" } else { "softmax_backward" },
            scale: scale.collect(),
            units: (0..exact.len())
                .map(|j| if log { units_of_exponential(torch, y[j]) } else { 1.0 })
                .collect(),
            torch,
            exact,
            any_kind: false,
        }
    });
    (forward, backward)
}

#[test]
fn softmax_and_log_softmax() {
    let (isas, mut report) = (isas(), Report::default());
    for case in load(SOFTMAX) {
        let (forward, backward) = expect_softmax(&case);
        let dims @ [rows, classes, inner] = case.dims();
        for &exchange in if inner == 1 { &[false][..] } else { &[false, true] } {
            let to = |key| {
                let tensor = case.find(key)?;
                Some(if exchange { tensor.exchanged(dims) } else { tensor.clone() })
            };
            let (x, y, grad_y) = (to("x").unwrap(), to("torch_y").unwrap(), to("grad_y"));
            for &isa in &isas {
                let call = if exchange {
                    Softmax::new(rows * inner, classes)
                } else {
                    Softmax::new(rows, classes).inner(inner)
                };
                let softmax = SoftmaxCall {
                    call: call.isa(isa),
                    log: case.text("call") == Some("log_softmax"),
                };
                let layout = if exchange || inner == 1 { "classes last" } else { "native" };
                let mut check = |call, expected: &Expected, result: Result<Tensor, Error>| {
                    let at = format!("{}, {}, {layout}, {call}", case.name, isa.name());
                    let error = result.as_ref().err().map(ToString::to_string);
                    report
                        .expect(error.is_none(), || format!("{at}: {}", error.unwrap_or_default()));
                    if let Ok(tensor) = result {
                        let back = [rows, inner, classes];
                        let got = if exchange { tensor.exchanged(back) } else { tensor };
                        expected.check(&mut report, &at, &got.to_f64(), |_| 0.0);
                    }
                };
                check("forward", &forward, softmax.forward(&x));
                check("forward in place", &forward, softmax.forward_in_place(&x));
                if let (Some(backward), Some(grad_y)) = (&backward, &grad_y) {
                    check("backward", backward, softmax.backward(&y, grad_y));
                    check("backward in place", backward, softmax.backward_in_place(&y, grad_y));
                    check("backward over y", backward, softmax.backward_over(&y, grad_y));
                }
            }
        }
    }
    report.finish(SOFTMAX);
}
