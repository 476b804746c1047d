//! Softmax, log-softmax and their gradients: random shapes, dtypes and layouts against the oracle, on
//! every instruction set, and the invariants of their results.

use common::operand::{Dtype, FLOATS, NO_AXIS, Operand, any_axis_if};
use common::random::{KINDS, Kind, Rng, config, fill_wide};
use common::reference;
use common::softmax::{Call, Problem};
use common::task::same_bits;
use common::{How, isas};
use proptest::prelude::*;
use std::sync::OnceLock;
use xent::{Pool, Softmax};

fn eight() -> &'static Pool {
    static POOL: OnceLock<Pool> = OnceLock::new();
    POOL.get_or_init(|| Pool::new(8).unwrap())
}

/// The numbers from which a problem is generated.
#[derive(Clone, Debug)]
struct Spec {
    seed: u64,
    rows: usize,
    classes: usize,
    inner: usize,
    dtype: Dtype,
    kind: Kind,
    packed: bool,
    log: bool,
}

fn specs(elements: usize) -> impl Strategy<Value = Spec> {
    let classes = prop_oneof![
        8 => 1usize..=40,
        6 => prop::sample::select(vec![32, 33, 63, 64, 65, 97, 128, 255, 257, 512, 513, 1000]),
        4 => prop::sample::select(vec![2047, 2048, 2049, 4096, 4097]),
        4 => 34usize..2000,
        1 => prop::sample::select(vec![65_537, 70_000]),
    ];
    (
        any::<u64>(),
        prop_oneof![3 => 1usize..=12, 2 => 13usize..=140],
        classes,
        prop_oneof![4 => Just(1usize), 2 => 2usize..=9, 1 => 10usize..=140],
        prop::sample::select(&FLOATS[..]),
        prop_oneof![3 => Just(Kind::Mixed), 4 => prop::sample::select(&KINDS[..])],
        any::<bool>(),
        any::<bool>(),
    )
        .prop_map(move |(seed, rows, classes, inner, dtype, kind, packed, log)| {
            let inner = inner.min((elements / classes).max(1));
            let rows = rows.min((elements / (classes * inner)).max(1));
            Spec { seed, rows, classes, inner, dtype, kind, packed, log }
        })
}

impl Spec {
    fn problem(&self) -> Problem {
        let rng = &mut Rng::new(self.seed);
        let sizes @ [rows, classes, inner] = [self.rows, self.classes, self.inner];
        let (mut x, mut row) = (vec![0.0; rows * classes * inner], vec![0.0; classes]);
        for i in 0..rows * inner {
            fill_wide(&mut row, self.kind, rng.below(classes), rng);
            for (class, value) in row.iter().enumerate() {
                x[(i / inner * classes + class) * inner + i % inner] = *value;
            }
        }
        let x = Operand::packed(self.dtype, sizes, &x);
        let forward = if self.log { reference::log_softmax } else { reference::softmax };
        let y = Operand::packed(self.dtype, sizes, &forward(&x.values, rows, classes, inner));
        let grad_y: Vec<f64> = x.values.iter().map(|_| rng.normal()).collect();
        let grad_y = Operand::packed(self.dtype, sizes, &grad_y);
        let to = Operand::zeros(self.dtype, sizes);
        // Only x may have elements that repeat: a call in place could not replace them.
        let repeats = any_axis_if(rng.one_in(4));
        let mut lay_out = |operand: Operand, repeats| {
            if self.packed { operand } else { operand.laid_out(rng, repeats) }
        };
        let (x, y, grad_y) = (lay_out(x, repeats), lay_out(y, NO_AXIS), lay_out(grad_y, NO_AXIS));
        Problem { sizes, log: self.log, x, y, grad_y, to: lay_out(to, NO_AXIS) }
    }
}

#[test]
fn random_problems_agree_with_the_oracle() {
    let mut worst = [[0f64; 4]; 2];
    let seen = std::cell::RefCell::new(&mut worst);
    let mut runner = proptest::test_runner::TestRunner::new(config(700));
    let outcome = runner.run(&specs(10_000), |spec| {
        let problem = spec.problem();
        for isa in isas() {
            for (call, got) in problem.run_all(&How::on(isa)) {
                let error = problem.judge(call, &got);
                let backward = !matches!(call, Call::Forward | Call::ForwardInPlace);
                let wide = usize::from(spec.dtype == Dtype::F64);
                let slot =
                    &mut seen.borrow_mut()[wide][2 * usize::from(spec.log) + usize::from(backward)];
                *slot = slot.max(error);
            }
        }
        Ok(())
    });
    for (lanes, worst) in ["f32", "f64"].iter().zip(worst) {
        println!(
            "{lanes}, in units of the bounds: softmax {:.3}, backward {:.3}, \
             log-softmax {:.3}, backward {:.3}",
            worst[0], worst[1], worst[2], worst[3]
        );
    }
    if let Err(error) = outcome {
        panic!("{error}");
    }
}

proptest! {
    #![proptest_config(config(400))]

    #[test]
    fn instruction_sets_agree(spec in specs(10_000)) {
        let problem = spec.problem();
        let mut good: Option<Vec<(Call, Vec<f64>)>> = None;
        for isa in common::isas() {
            let all = problem.run_all(&How::on(isa));
            match &good {
                Some(good) => for ((call, a), (_, b)) in all.iter().zip(good) {
                    same_bits(a, b, &format!("{call:?}"));
                },
                None => good = Some(all),
            }
        }
    }

    /// Calls in place and out of place have the same bits if their layouts agree.
    #[test]
    fn in_place_is_out_of_place(spec in specs(10_000)) {
        let problem = Spec { packed: true, ..spec }.problem();
        for isa in isas() {
            let all = problem.run_all(&How::on(isa));
            same_bits(&all[1].1, &all[0].1, "forward");
            same_bits(&all[3].1, &all[2].1, "backward in place");
            same_bits(&all[4].1, &all[2].1, "backward over y");
        }
    }

    #[test]
    fn strides_do_not_matter(spec in specs(10_000)) {
        let problem = spec.problem();
        let relaid = problem.relaid(&mut Rng::new(spec.seed ^ 1));
        for isa in isas() {
            for call in problem.calls() {
                let how = How::on(isa);
                same_bits(&problem.run(call, &how), &relaid.run(call, &how), &format!("{call:?}"));
            }
        }
    }

    #[test]
    fn rows_do_not_depend_on_others(spec in specs(3_000)) {
        let problem = spec.problem();
        let [rows, classes, inner] = problem.sizes;
        let some = |i: &usize| rows * inner <= 24 || [0, 1, 7, 63].contains(&(i % 64));
        for isa in isas() {
            let how = How::on(isa);
            let whole = problem.run_all(&how);
            for i in (0..rows * inner).filter(some) {
                let (row, k) = (i / inner, i % inner);
                let alone = problem.single(row, k);
                for (call, whole) in &whole {
                    let entries = (0..classes).map(|c| whole[(row * classes + c) * inner + k]);
                    let entries: Vec<f64> = entries.collect();
                    same_bits(&alone.run(*call, &how), &entries, &format!("{call:?}"));
                }
            }
        }
    }

    /// The logarithm of a softmax is the log-softmax, for probabilities that are normal numbers.
    #[test]
    fn log_of_softmax_is_log_softmax(spec in specs(10_000)) {
        let softmax = Spec { log: false, ..spec.clone() }.problem();
        let log = Problem { log: true, ..Spec { log: false, ..spec.clone() }.problem() };
        let dtype = spec.dtype;
        let (unit, least) = if dtype == Dtype::F64 { (1e-14, 1e-290) } else { (4e-7, 1e-36) };
        for isa in isas() {
            let y = softmax.run(Call::Forward, &How::on(isa));
            let log_y = log.run(Call::Forward, &How::on(isa));
            for (y, log_y) in y.iter().zip(&log_y) {
                let least = if dtype == Dtype::F16 { 1e-4 } else { least };
                if *y < least {
                    prop_assert!(*log_y < least.ln() * 0.99, "{y:e} {log_y:e}");
                    continue;
                }
                let rounding = match dtype.is_half() {
                    true => 1.1 * (dtype.half_ulp(*y) / y + dtype.half_ulp(*log_y)),
                    false => 0.0,
                };
                let bound = unit * (1.0 + log_y.abs()) + rounding;
                let nan = y.is_nan() && log_y.is_nan();
                prop_assert!(nan || (y.ln() - log_y).abs() <= bound, "{y:e} {log_y:e}");
            }
        }
    }

    /// The results of halves are those of the widened problem, rounded once.
    #[test]
    fn halves_are_the_widened_problem(spec in specs(10_000)) {
        let dtype = if spec.dtype == Dtype::F16 { Dtype::F16 } else { Dtype::Bf16 };
        let half = Spec { dtype, ..spec }.problem();
        let widen = |operand: &Operand| Operand { dtype: Dtype::F32, ..operand.clone() };
        let wide = Problem {
            x: widen(&half.x),
            y: widen(&half.y),
            grad_y: widen(&half.grad_y),
            to: widen(&half.to),
            ..half
        };
        for isa in isas() {
            for call in half.calls() {
                let how = How::on(isa);
                let rounded = wide.run(call, &how).into_iter().map(|x| dtype.round(x));
                let rounded: Vec<f64> = rounded.collect();
                same_bits(&half.run(call, &how), &rounded, &format!("{call:?}"));
            }
        }
    }
}

#[test]
fn threads_do_not_matter() {
    proptest!(config(16), |(spec in specs(300_000))| {
        let spec = Spec { rows: (200_000 / (spec.classes * spec.inner)).max(1), ..spec };
        let problem = spec.problem();
        for isa in isas() {
            let on = |threads, pool| How { threads, pool, ..How::on(isa) };
            let good = problem.run_all(&on(1, None));
            for (threads, pool) in [(2, None), (3, Some(eight())), (8, Some(eight()))] {
                let all = problem.run_all(&on(threads, pool));
                for ((call, a), (_, b)) in all.iter().zip(&good) {
                    same_bits(a, b, &format!("{call:?} on {threads} threads of {}", isa.name()));
                }
            }
        }
    });
}

/// A common offset does not change a log-softmax.
#[test]
fn log_softmax_under_an_offset() {
    let sizes = [1, 96, 2];
    for dtype in [Dtype::F32, Dtype::F64] {
        for offset in [0.0, 1e4, -3e5, 3.2e12, 1.5e21] {
            let operand = |x: f64| Operand::packed(dtype, sizes, &[x; 192]);
            let problem = Problem {
                sizes,
                log: true,
                x: operand(offset),
                y: operand(-(96f64.ln())),
                grad_y: operand(1.0),
                to: operand(0.0),
            };
            for isa in isas() {
                for call in [Call::Forward, Call::ForwardInPlace] {
                    problem.judge(call, &problem.run(call, &How::on(isa)));
                }
            }
        }
    }
}

/// An f32 softmax is as accurate far below the largest logit as near it, with lanes along classes and
/// along rows, for logits near 0 and far from it: the base is e, not 2 to its rounded logarithm.
#[test]
fn softmax_far_below_the_largest() {
    for (classes, offset) in [(2048, 0.0), (40, 0.0), (2048, 1e5), (3, -3e4), (3000, 2e6)] {
        // Differences that f32 can hold after the offset is added.
        let x: Vec<f32> = (0..classes)
            .map(|class| offset - 0.25 * ((class * 97 % classes * 340) / classes) as f32)
            .collect();
        let wide: Vec<f64> = x.iter().map(|&x| x.into()).collect();
        let exact = reference::softmax(&wide, 1, classes, 1);
        for isa in isas() {
            let call = Softmax::new(1, classes).isa(isa);
            let (mut apart, mut in_place) = (vec![0f32; classes], x.clone());
            call.softmax(&x, &mut apart).unwrap();
            call.softmax_in_place(&mut in_place).unwrap();
            for (class, (&got, &exact)) in apart.iter().zip(&exact).enumerate() {
                let ulp = f64::from(f32::from_bits((exact as f32).to_bits() + 1) - exact as f32);
                let off = (f64::from(got) - exact).abs() / ulp;
                let what = format!("class {class} of {classes} from {offset} on {isa:?}");
                assert!(off <= 2.0, "{what}: {off} ulp");
                assert_eq!(got.to_bits(), in_place[class].to_bits(), "{what}");
            }
        }
    }
}

/// Chunks of doubles whose shifts are too large for an integer are merged correctly.
#[test]
fn softmax_of_chunks_far_from_zero() {
    let (classes, half) = (4096, 2048);
    let x: Vec<f64> = (0..classes).map(|c| if c < half { 1e16 - 10.0 } else { 1e16 }).collect();
    let exact = [-10f64, 0.0].map(|t| t.exp() / (half as f64 * (1.0 + (-10f64).exp())));
    for isa in isas() {
        let mut y = vec![0f64; classes];
        Softmax::new(1, classes).isa(isa).softmax(&x, &mut y).unwrap();
        for (c, &got) in y.iter().enumerate() {
            let want = exact[c / half];
            assert!((got - want).abs() <= 1e-14 * want, "class {c} on {isa:?}: {got}, not {want}");
        }
    }
}

/// Rows of contiguous classes with several inner positions, by every call.
#[test]
fn contiguous_classes_at_inner_positions() {
    let sizes @ [rows, classes, inner] = [4, 200, 3];
    let strides = [(inner * classes) as i64, 1, classes as i64];
    for dtype in [Dtype::F32, Dtype::F64] {
        for log in [false, true] {
            let operand =
                |values: &[f64]| Operand { strides, ..Operand::packed(dtype, sizes, values) };
            let numbers = |step: usize| -> Vec<f64> {
                (0..rows * classes * inner).map(|i| (i * step % 61) as f64 / 16.0 - 2.0).collect()
            };
            let x = operand(&numbers(7));
            let forward = if log { reference::log_softmax } else { reference::softmax };
            let y = operand(&forward(&x.values, rows, classes, inner));
            let (grad_y, to) = (operand(&numbers(11)), operand(&numbers(0)));
            let problem = Problem { sizes, log, x, y, grad_y, to };
            for isa in isas() {
                for (call, got) in problem.run_all(&How::on(isa)) {
                    problem.judge(call, &got);
                }
            }
        }
    }
}
