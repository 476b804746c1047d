//! bf16 and f16: xent computes in f32 and rounds once.
//!
//! Every call must have the bits of the same call on the widened logits in f32, which other tests
//! compare with the oracle.

use common::random::{KINDS, Kind, Rng, config, fill, specs};
use common::reference::{self, Outcome};
use common::{Element, Guarded, How, Indices, Pass, Problem, Reals, Reduction, Run};
use common::{assert_same, is_sampled, isas, some};
use proptest::prelude::*;
use std::sync::OnceLock;
use xent::half::{bf16, f16};
use xent::{CrossEntropy, Error, Input, Isa, Number, Output, Pool, Results};

/// A half type, with its constants from the crate `half`.
trait Half: Element + Into<f64> {
    const NAME: &'static str;
    /// The relative error of a rounding, and the absolute error near 0.
    const RELATIVE: f64;
    const ABSOLUTE: f64;
    fn narrow(x: f32) -> Self;
    fn widen(self) -> f32;
}

macro_rules! halves {
    ($($type:ident: $digits:expr, $least:expr;)*) => {$(
        impl Half for $type {
            const NAME: &'static str = stringify!($type);
            const RELATIVE: f64 = 1.0 / (1u64 << $digits) as f64;
            const ABSOLUTE: f64 = $least / 2.0;
            fn narrow(x: f32) -> $type {
                $type::from_f32(x)
            }
            fn widen(self) -> f32 {
                self.to_f32()
            }
        }
    )*};
}
halves! {
    bf16: 8, f32::MIN_POSITIVE as f64 / 128.0;
    f16: 11, 1.0 / (1 << 24) as f64;
}

fn narrow<H: Half>(x: &[f32]) -> Vec<H> {
    x.iter().map(|&x| H::narrow(x)).collect()
}

fn widen<H: Half>(x: &[H]) -> Vec<f32> {
    x.iter().map(|&x| x.widen()).collect()
}

/// Makes a test for each half type.
macro_rules! both {
    ($($(#[$doc:meta])* $name:ident)*) => {
        mod in_bf16 {
            $($(#[$doc])* #[test] fn $name() { super::$name::<super::bf16>() })*
        }
        mod in_f16 {
            $($(#[$doc])* #[test] fn $name() { super::$name::<super::f16>() })*
        }
    };
}
both! {
    seams
    threads
    streamed_gradients
    alignments
    weights_and_grad_output_in_halves
    random_problems
    liger_1329_confident_rows
    keras_15015_class_ids_past_the_exact_integers
    pytorch_85791_long_sums_neither_stick_nor_overflow
    te_3193_the_loss_is_not_a_half
    refusals
}

fn three() -> &'static Pool {
    static POOL: OnceLock<Pool> = OnceLock::new();
    POOL.get_or_init(|| Pool::new(3).unwrap())
}

/// A problem in halves and its upcast.
struct Case<H> {
    logits: Vec<H>,
    /// The contents of the output that the gradient is added to.
    old: Option<Vec<H>>,
    /// Class weights, row weights and grad_output, if they are halves.
    operands: [Option<Vec<H>>; 3],
    upcast: Problem,
}

/// The results of one call: losses unless it is a backward, and a gradient in one of two types.
#[derive(Clone)]
struct Answer<H> {
    name: &'static str,
    from_lse: bool,
    losses: Option<Run>,
    grad: Vec<H>,
    grad32: Vec<f32>,
}

impl<H: Half> Case<H> {
    /// The problem with logits rounded to halves.
    fn of(problem: &Problem) -> Case<H> {
        let logits = narrow::<H>(&problem.logits);
        let old = problem.accumulate.as_ref().map(|old| narrow::<H>(old));
        let upcast = Problem {
            logits: widen(&logits),
            accumulate: old.as_ref().map(|old| widen(old)),
            ..problem.clone()
        };
        Case { logits, old, operands: [None, None, None], upcast }
    }

    /// Rounds weights and grad_output too.
    fn with_operands_in_halves(mut self) -> Case<H> {
        let problem = &mut self.upcast;
        let all = [&mut problem.class_weights, &mut problem.row_weights, &mut problem.grad_output];
        for (half, operand) in self.operands.iter_mut().zip(all) {
            if let Some(operand) = operand {
                let values: Vec<f32> = operand.to_f64().into_iter().map(|x| x as f32).collect();
                let rounded = narrow::<H>(&values);
                *operand = Reals::F32(widen(&rounded));
                *half = Some(rounded);
            }
        }
        self
    }

    fn builder(&self) -> CrossEntropy<'_> {
        let mut call = self.upcast.builder();
        let [class_weights, row_weights, grad_output] = &self.operands;
        if let Some(weights) = class_weights {
            call = call.class_weights(weights);
        }
        if let Some(weights) = row_weights {
            call = call.row_weights(weights);
        }
        if let Some(grad) = grad_output {
            call = call.grad_output(grad);
        }
        call
    }

    /// Makes one call; a forward has an empty gradient. In place `G` is `H`.
    fn run<G: Element>(&self, pass: Pass, old: Option<&[G]>, how: &How) -> (Run, Vec<G>, Vec<H>) {
        let (rows, classes) = (self.upcast.rows, self.upcast.classes);
        let mut call = self.builder().isa(how.isa).threads(how.threads);
        if let Some(pool) = how.pool {
            call = call.pool(pool);
        }
        let mut logits = Guarded::holding(&self.logits, classes, classes + how.padding, how.offset);
        let stride = classes + how.grad_padding;
        let mut grad = match old {
            Some(old) => Guarded::holding(old, classes, stride, how.grad_offset),
            None => Guarded::new(rows, classes, stride, how.grad_offset),
        };
        let mut row_losses = Guarded::<f64>::new(rows, 1, 1, 0);
        let mut lse_out = Guarded::<f64>::new(1, rows, rows, 0);
        let (mut loss, mut normalizer, mut kept_rows) = (f64::POISON, f64::POISON, u64::MAX);
        let results = Results {
            loss: (self.upcast.reduction != Reduction::None).then_some(&mut loss),
            row_losses: Some(row_losses.output()),
            lse: Some(lse_out.slice()),
            normalizer: Some(&mut normalizer),
            kept_rows: Some(&mut kept_rows),
            ..Results::default()
        };
        let targets = self.upcast.targets.input();
        match pass {
            Pass::Forward => call.forward_with(logits.input(), targets, results),
            Pass::Fused => {
                call.forward_backward_with(logits.input(), targets, grad.output(), results)
            }
            Pass::FusedInPlace => {
                call.forward_backward_in_place_with(logits.output(), targets, results)
            }
            Pass::Backward(lse) => call.backward(logits.input(), targets, lse, grad.output()),
            Pass::BackwardInPlace(lse) => call.backward_in_place(logits.output(), targets, lse),
        }
        .expect("a valid problem");

        let mut run = Run { loss, normalizer, kept_rows, ..Run::default() };
        if !matches!(pass, Pass::Backward(_) | Pass::BackwardInPlace(_)) {
            run.lse = lse_out.take_written();
            run.row_losses = row_losses.take_written();
        }
        let left = logits.take();
        if matches!(pass, Pass::FusedInPlace | Pass::BackwardInPlace(_)) {
            return (run, Vec::new(), left);
        }
        assert_same(&left, &self.logits, "logits");
        let grad = match pass {
            Pass::Forward => Vec::new(),
            _ if old.is_some() => grad.take(),
            _ => grad.take_written(),
        };
        (run, grad, Vec::new())
    }

    /// Makes every call: forward, fused and backward, with gradients of either type and in place.
    fn answers(&self, how: &How) -> Vec<Answer<H>> {
        let old = self.old.as_deref();
        let old32 = self.upcast.accumulate.as_deref();
        let (forward, ..) = self.run::<H>(Pass::Forward, None, how);
        let lse = forward.lse.clone();
        let mut all = vec![Answer {
            name: "forward",
            from_lse: false,
            losses: Some(forward),
            grad: Vec::new(),
            grad32: Vec::new(),
        }];
        for (from_lse, pass, in_place) in [
            (false, Pass::Fused, Pass::FusedInPlace),
            (true, Pass::Backward(&lse), Pass::BackwardInPlace(&lse)),
        ] {
            let mut add = |name, run, grad, grad32| {
                let losses = (!from_lse).then_some(run);
                all.push(Answer { name, from_lse, losses, grad, grad32 });
            };
            let (run, grad, _) = self.run(pass, old, how);
            add("gradient in halves", run, grad, Vec::new());
            let (run, grad, _) = self.run(pass, old32, how);
            add("gradient in f32", run, Vec::new(), grad);
            if old.is_none() {
                let (run, _, grad) = self.run::<H>(in_place, None, how);
                add("in place", run, grad, Vec::new());
            }
        }
        all
    }

    /// Asserts that losses and f32 gradients are those of the upcast problem, and that gradients in
    /// halves are the same, rounded.
    #[track_caller]
    fn assert_upcast(&self, answers: &[Answer<H>], how: &How, what: &str) {
        let fused = self.upcast.run(Pass::Fused, how);
        let backward = self.upcast.run(Pass::Backward(&fused.lse), how);
        for answer in answers {
            let what = format!("{what}, {}", answer.name);
            if let Some(losses) = &answer.losses {
                losses.assert_same_losses(&fused, &what);
            }
            let grad = if answer.from_lse { &backward.grad } else { &fused.grad };
            if !answer.grad.is_empty() {
                assert_same(&answer.grad, &narrow::<H>(grad), &what);
            }
            if !answer.grad32.is_empty() {
                assert_same(&answer.grad32, grad, &what);
            }
        }
    }

    /// Compares with the upcast problem on every set, between 1, 2 and 3 threads and between the sets.
    #[track_caller]
    fn check(&self, how: impl Fn(Isa) -> How<'static>) {
        let mut other: Option<Vec<Answer<H>>> = None;
        for isa in isas() {
            let what = format!("{} on {}", H::NAME, isa.name());
            let alone = How { threads: 1, ..how(isa) };
            let good = self.answers(&alone);
            self.assert_upcast(&good, &alone, &what);
            for threads in [2, 3] {
                let how = How { threads, pool: Some(three()), ..alone };
                assert_all_same(&self.answers(&how), &good, &format!("{what}, {threads} threads"));
            }
            match &other {
                Some(other) => assert_all_same(&good, other, &what),
                None => other = Some(good),
            }
        }
    }
}

#[track_caller]
fn assert_all_same<H: Half>(a: &[Answer<H>], b: &[Answer<H>], what: &str) {
    assert_eq!(a.len(), b.len(), "{what}");
    for (a, b) in a.iter().zip(b) {
        let what = format!("{what}, {}", a.name);
        if let (Some(a), Some(b)) = (&a.losses, &b.losses) {
            a.assert_same_losses(b, &what);
        }
        assert_same(&a.grad, &b.grad, &what);
        assert_same(&a.grad32, &b.grad32, &what);
    }
}

/// Rows of every kind in turn, targets anywhere.
fn mixed(rows: usize, classes: usize, kinds: &[Kind]) -> Problem {
    let mut rng = Rng::new((rows * 37 + classes) as u64);
    let mut logits = vec![0.0; rows * classes];
    let mut targets = Vec::new();
    for (row, x) in logits.chunks_mut(classes).enumerate() {
        let y = rng.below(classes);
        fill(x, kinds[row % kinds.len()], y, &mut rng);
        targets.push(y as i64);
    }
    Problem::new(classes, &logits, &targets)
}

/// The problem without options, with smoothing, with weights and ignored rows, with all of them and one
/// grad_output per row, and with an accumulated gradient.
fn variants(problem: &Problem) -> [Problem; 5] {
    let weights = |n: usize| (0..n).map(|i| (i % 7) as f32 / 4.0 - 0.25).collect();
    let mut targets = problem.targets.to_i64();
    targets.iter_mut().skip(3).step_by(5).for_each(|y| *y = -100);
    let smoothed = Problem { label_smoothing: 0.1, ..problem.clone() };
    let weighted = Problem {
        targets: Indices::I64(targets),
        class_weights: Some(Reals::F32(weights(problem.classes))),
        row_weights: Some(Reals::F64(vec![0.75; problem.rows])),
        row_mask: Some((0..problem.rows).map(|row| u8::from(row % 7 != 2)).collect()),
        grad_output: Some(Reals::F32(vec![1.5])),
        grad_scale: -0.3,
        ..problem.clone()
    };
    let all = Problem {
        label_smoothing: 0.1,
        reduction: Reduction::None,
        grad_output: Some(Reals::F64((0..problem.rows).map(|i| 1.1 - 0.3 * i as f64).collect())),
        ..weighted.clone()
    };
    let old = Rng::new(7).normals(problem.logits.len(), 0.1);
    let added = Problem { accumulate: Some(old), reduction: Reduction::Sum, ..weighted.clone() };
    [problem.clone(), smoothed, weighted, all, added]
}

/// Loss, row losses and lse have the bits of the upcast problem; the gradient is rounded once.
fn seams<H: Half>() {
    for classes in some([1, 2, 10, 63, 64, 65, 255, 256, 257, 1000, 2049, 4097, 70_000], 5) {
        let rows = if classes <= 300 { 2 * KINDS.len() } else { KINDS.len() };
        for problem in variants(&mixed(rows, classes, &KINDS)) {
            Case::<H>::of(&problem).check(How::on);
        }
    }
}

/// Rows over threads, and a few long rows of which all threads work on one at a time.
fn threads<H: Half>() {
    for (rows, classes) in
        some([(4000, 65), (700, 1000), (257, 2049), (3, 200_000), (1, 131_073)], 5)
    {
        let variants = variants(&mixed(rows, classes, &KINDS[..9]));
        for problem in some([&variants[0], &variants[3], &variants[4]], 3) {
            Case::<H>::of(problem).check(How::on);
        }
    }
}

/// Streamed gradients have the bits of gradients that are not streamed, at every alignment.
fn streamed_gradients<H: Half>() {
    // In an emulator no gradient is streamed.
    if is_sampled() {
        return;
    }
    let (rows, classes) = (140, 60_013);
    assert!(rows * classes * size_of::<H>() >= 16 << 20);
    let case = Case::<H>::of(&mixed(rows, classes, &[Kind::Unit, Kind::Broad, Kind::Steps]));
    for isa in isas() {
        let (good, _, in_place) = case.run::<H>(Pass::FusedInPlace, None, &How::on(isa));
        let upcast = case.upcast.run(Pass::FusedInPlace, &How::on(isa));
        assert_same(&in_place, &narrow::<H>(&upcast.grad), "in place");
        for grad_offset in [0, 1, 17, 31] {
            let how = How { grad_offset, grad_padding: grad_offset * 3, ..How::on(isa) };
            let (run, grad, _) = case.run::<H>(Pass::Fused, None, &how);
            run.assert_same_losses(&good, "streamed");
            assert_same(&grad, &in_place, "streamed");
        }
        let how = How { offset: 9, grad_offset: 5, grad_padding: 1, ..How::on(isa) };
        let (_, grad, _) = case.run::<f32>(Pass::Fused, None, &how);
        assert_same(&grad, &upcast.grad, "streamed in f32");
    }
}

/// All 32 places of a half in a cache line, of the logits and of the gradient.
fn alignments<H: Half>() {
    for classes in [1, 3, 31, 64, 65, 130, 1000, 2049, 4100] {
        let problem = mixed(5, classes, &[Kind::Unit, Kind::Steps, Kind::Spike]);
        for problem in [&problem, &variants(&problem)[3]] {
            let case = Case::<H>::of(problem);
            for isa in isas() {
                let good = case.answers(&How::on(isa));
                for offset in some(0..32, 9) {
                    let moved = [
                        How { offset, ..How::on(isa) },
                        How { grad_offset: offset, ..How::on(isa) },
                        How {
                            offset,
                            grad_offset: 31 - offset,
                            padding: offset,
                            grad_padding: 17,
                            ..How::on(isa)
                        },
                    ];
                    for how in moved {
                        assert_all_same(&case.answers(&how), &good, &format!("{how:?}"));
                    }
                }
            }
        }
    }
}

/// With logits in halves and in f32.
fn weights_and_grad_output_in_halves<H: Half>() {
    for classes in [2, 65, 1000, 4097] {
        for problem in &variants(&mixed(26, classes, &KINDS))[2..] {
            let case = Case::<H>::of(problem).with_operands_in_halves();
            case.check(How::on);
            for isa in isas() {
                let good = case.upcast.run(Pass::Fused, &How::on(isa));
                let mut grad = match &case.upcast.accumulate {
                    Some(old) => old.clone(),
                    None => vec![f32::POISON; case.logits.len()],
                };
                let mut lse = vec![f64::POISON; problem.rows];
                let results = Results { lse: Some(&mut lse), ..Results::default() };
                case.builder()
                    .isa(isa)
                    .forward_backward_with(
                        &case.upcast.logits,
                        case.upcast.targets.input(),
                        &mut grad,
                        results,
                    )
                    .unwrap();
                assert_same(&grad, &good.grad, isa.name());
                assert_same(&lse, &good.lse, isa.name());
            }
        }
    }
}

fn random_problems<H: Half>() {
    proptest!(config(300), |(spec in specs())| {
        let problem = Problem { short_row_losses: false, ..spec.problem() };
        Case::<H>::of(&problem).check(|isa| spec.how(isa));
    });
}

/// The results of every set under the sum reduction, and the oracle's.
fn judged<H: Half>(case: &Case<H>, mut see: impl FnMut(Isa, &Run, &[H], &Outcome)) {
    let oracle = reference::evaluate(&case.upcast.case());
    for isa in isas() {
        let (run, grad, _) = case.run::<H>(Pass::Fused, None, &How::on(isa));
        see(isa, &run, &grad, &oracle);
        let (again, _, grad) = case.run::<H>(Pass::FusedInPlace, None, &How::on(isa));
        see(isa, &again, &grad, &oracle);
    }
}

/// Liger#1329, #1341: where p rounds to 1, a p - 1 formed after the rounding is 0, and the row is never
/// learnt. xent forms it before the rounding.
fn liger_1329_confident_rows<H: Half>() {
    const MARGINS: [f64; 6] = [9.0, 12.0, 14.0, 20.0, 40.0, 80.0];
    let mut rng = Rng::new(1329);
    for classes in [2, 10, 65, 1000, 32_000] {
        let mut logits: Vec<f32> = rng.normals(MARGINS.len() * classes, 1.0);
        let targets: Vec<i64> = MARGINS.iter().map(|_| rng.below(classes) as i64).collect();
        for ((x, &y), margin) in logits.chunks_mut(classes).zip(&targets).zip(MARGINS) {
            let others = x.iter().enumerate().filter(|(c, _)| *c as i64 != y);
            let rest: f64 = others.map(|(_, &x)| f64::from(x).exp()).sum();
            x[y as usize] = (rest.ln() + margin) as f32;
        }
        let case = Case::<H>::of(&Problem::sum(classes, &logits, &targets));
        judged(&case, |isa, run, grad, oracle| {
            for (row, &y) in targets.iter().enumerate() {
                let at = row * classes + y as usize;
                let want = oracle.grad_logits[at];
                assert!(want < 0.0 && H::narrow((1.0 + want) as f32).widen() == 1.0, "no trap");
                let got: f64 = grad[at].into();
                // A little more than the rounding of p - 1.
                let bound = (1.02 * H::RELATIVE * want.abs()).max(1.001 * H::ABSOLUTE);
                let what = format!("{classes} classes, row {row} on {}", isa.name());
                assert!((got - want).abs() <= bound, "{what}: {got:e} instead of {want:e}");
                assert!(got < 0.0 || want.abs() <= H::ABSOLUTE, "{what}: {want:e} is lost");
                let (loss, exact) = (run.row_losses[row], oracle.row_losses[row]);
                assert!((loss - exact).abs() <= 1e-5 * exact, "{what}: {loss:e} not {exact:e}");
            }
        });
    }
}

/// keras#15015: class ids were converted to the logits' type. f16 holds every integer to 2048 and none
/// past 65504; bf16 holds every integer to 256.
fn keras_15015_class_ids_past_the_exact_integers<H: Half>() {
    for (classes, ids) in [
        (256, vec![0i64, 129, 255]),
        (5000, vec![257, 2047, 2049, 2051, 4095, 4097, 4999]),
        (70_000, vec![2049, 65_503, 65_505, 65_519, 65_521, 69_999]),
    ] {
        let logits = Rng::new(15015).normals(ids.len() * classes, 2.0);
        for choice in some(0..5, 3) {
            let targets = Indices::narrow(&ids, choice);
            let problem = Problem { targets, ..Problem::sum(classes, &logits, &ids) };
            judged(&Case::<H>::of(&problem), |isa, run, grad, oracle| {
                for (row, &y) in ids.iter().enumerate() {
                    let (got, want) = (run.row_losses[row], oracle.row_losses[row]);
                    let what = format!("class {y} of {classes} on {}", isa.name());
                    assert!((got - want).abs() <= 1e-6 * want, "{what}: {got} instead of {want}");
                    let grad = grad[row * classes..][..classes].iter();
                    let below: Vec<_> = grad.enumerate().filter(|(_, g)| g.widen() < 0.0).collect();
                    assert!(matches!(below[..], [(c, _)] if c as i64 == y), "{what}: {below:?}");
                }
            });
        }
    }
}

/// pytorch#55657, #85791, #158310, executorch#20089, tract#2586: sums in halves, over classes or rows,
/// stuck at 256 or 2048 and overflowed at 65504.
fn pytorch_85791_long_sums_neither_stick_nor_overflow<H: Half>() {
    let (classes, level) = (70_000, 3.0);
    let logits = vec![level as f32; 3 * classes];
    let case = Case::<H>::of(&Problem::sum(classes, &logits, &[0, 4096, 69_999]));
    judged(&case, |isa, run, _, _| {
        for (lse, loss) in run.lse.iter().zip(&run.row_losses) {
            let want = (classes as f64).ln();
            assert!((lse - level - want).abs() < 1e-6, "{lse} on {}", isa.name());
            assert!((loss - want).abs() < 1e-6, "{loss} on {}", isa.name());
        }
    });

    let rows = 100_000;
    let case = Case::<H>::of(&Problem::sum(2, &vec![0.5; 2 * rows], &vec![1; rows]));
    judged(&case, |isa, run, _, _| {
        let want = 2f64.ln() * rows as f64;
        assert!((run.loss - want).abs() < 1e-6 * want, "{} on {}", run.loss, isa.name());
        assert_eq!((run.kept_rows, run.normalizer), (rows as u64, rows as f64));
    });
}

/// TE#3193, Modalities#464: the loss was rounded to the type of the logits.
fn te_3193_the_loss_is_not_a_half<H: Half>() {
    let case = Case::<H>::of(&mixed(100, 1000, &[Kind::Unit]));
    judged(&case, |isa, run, _, oracle| {
        assert!((run.loss - oracle.loss).abs() < 3e-7 * oracle.loss, "on {}", isa.name());
        let halves = run.row_losses.iter().filter(|&&x| x == H::narrow(x as f32).into());
        assert!(halves.count() < 10, "on {}", isa.name());
    });
}

/// Pairs of types that do not go together, and types that an operand cannot have: the message names the
/// operand, and the call writes nothing.
fn refusals<H: Half>() {
    /// The gradient of the logits, by every call that computes it.
    #[track_caller]
    fn refused<L: Number, G: Element>(logits: &[L; 6], grad: G, words: &[&str]) {
        for isa in isas() {
            let call = CrossEntropy::new(2, 3).isa(isa);
            let (mut out, mut loss) = ([grad; 6], 1234.5);
            let results = Results { loss: Some(&mut loss), ..Results::default() };
            let to = Output::from(&mut out);
            let errors = [
                call.forward_backward_with(logits, &[0i32, 2], to, results).unwrap_err(),
                call.backward(logits, &[0i32, 2], &[1.0; 2], &mut out).unwrap_err(),
            ];
            for error in errors {
                assert!(matches!(error, Error::Dtype(_)), "{error:?}");
                for word in words {
                    assert!(error.to_string().contains(word), "{error} without {word}");
                }
            }
            assert!(out.iter().all(|x| x.bits() == grad.bits()) && loss == 1234.5);
        }
    }
    let half = [H::narrow(0.5); 6];
    let name = H::NAME.to_uppercase();
    if H::NAME == bf16::NAME {
        refused(&half, f16::POISON, &["grad_logits", "F16", &name]);
    } else {
        refused(&half, bf16::POISON, &["grad_logits", "BF16", &name]);
    }
    refused(&[0.5f32; 6], H::POISON, &["grad_logits", "F32", &name]);
    refused(&half, f64::POISON, &["grad_logits", "F64"]);
    refused(&[0.5f64; 6], H::POISON, &["grad_logits", "F64", &name]);
    refused(&[0.5f64; 6], f32::POISON, &["grad_logits", "F64", "F32"]);
    refused(&[16_000u16; 6], f32::POISON, &["logits", "U16"]);

    // Losses and entropies have at least f32.
    let call = CrossEntropy::new(2, 3);
    for name in ["row_losses", "entropy"] {
        let mut sums = [H::POISON; 2];
        let output = Some(Output::from(&mut sums));
        let results = match name {
            "row_losses" => Results { row_losses: output, ..Results::default() },
            _ => Results { entropy: output, ..Results::default() },
        };
        let error = call.forward_with(&half, Input::from(&[0i32, 2]), results).unwrap_err();
        assert!(matches!(&error, Error::Dtype(what) if what.contains(name)), "{error}");
        assert!(sums.iter().all(|x| x.bits() == H::POISON.bits()));
    }
}
