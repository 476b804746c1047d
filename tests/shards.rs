//! Vocabularies in shards: any split, any order of merging, against the whole call and the oracle.

use common::operand::{Dtype, Operand};
use common::random::{Rng, config};
use common::split::{Shard, Split, assert_same, bits, check_states, merge};
use common::task::{Task, Wants, same_bits};
use common::task_bounds::{Judge, Worst};
use common::task_random::{Spec, tasks};
use common::{How, isas};
use proptest::prelude::*;
use xent::{CrossEntropy, Error, Input, Isa, Output, Partial, Pool, Results};

const INF: f64 = f64::INFINITY;
const NAN: f64 = f64::NAN;

/// Every result that merged states give.
const EVERYTHING: Wants = Wants { top: false, ranks: false, kl: false, ..Wants::ALL };

/// Any split, any order and any tree of merges is within the bounds of the whole.
/// The task of a spec, without what shards refuse: log-probabilities, and a teacher's logits of all classes.
fn task_for_shards(spec: &Spec) -> Task {
    let target_scale = if spec.places > 0 { spec.target_scale } else { 0.0 };
    Task { log_probs: false, ..Spec { target_scale, ..spec.clone() }.task() }
}

#[test]
fn random_splits_agree_with_the_oracle() {
    let worst = std::sync::Mutex::new(Worst::default());
    let mut runner = proptest::test_runner::TestRunner::new(config(400));
    let outcome = runner.run(&(tasks(5_000), any::<u64>()), |(spec, seed)| {
        let mut task = task_for_shards(&spec);
        task.wants = EVERYTHING;
        let judge = Judge::of_shards(&task);
        let split = Split::new(&task, seed);
        for isa in isas() {
            let how = spec.how(isa);
            let partials = split.partials(&how);
            for (shard, states) in split.shards.iter().zip(&partials) {
                check_states(&split, shard, states);
            }
            let merged = merge(partials, &mut Rng::new(seed));
            let answer = split.finish(&merged, &how);
            let mut seen = judge.losses(&answer);
            if task.targets.is_some() {
                let grad = split.gradient(&merged, &how);
                let old = task.accumulate.then_some(task.grad.values.as_slice());
                seen.add(&judge.gradient(&grad, task.grad.dtype, old, Some(&answer.lse)));
            }
            worst.lock().unwrap().add(&seen);
        }
        Ok(())
    });
    println!("errors in units of the bounds: {}", worst.into_inner().unwrap());
    if let Err(error) = outcome {
        panic!("{error}");
    }
}

proptest! {
    #![proptest_config(config(120))]

    /// The bits of a given split are the same on every set with fused multiply-add.
    #[test]
    fn instruction_sets_with_fma_agree(spec in tasks(4_000), seed in any::<u64>()) {
        let task = task_for_shards(&spec);
        let split = Split::new(&task, seed);
        let isas = isas();
        let first = isas.first().map(|&isa| bits(&split, &spec.how(isa)));
        for &isa in isas.iter().skip(1) {
            assert_same(&bits(&split, &spec.how(isa)), first.as_ref().unwrap(), isa.name());
        }
    }

    /// The state and the gradient of a row do not depend on the rows around it.
    #[test]
    fn rows_do_not_depend_on_others(spec in tasks(2_000), seed in any::<u64>()) {
        let task = Task { normalizer: 3.0, z_normalizer: 3.0, ..task_for_shards(&spec) };
        let split = Split::new(&task, seed);
        let how = spec.how(Isa::Portable);
        let (all, answer) = bits(&split, &how);
        for i in 0..task.positions() {
            let (row, k) = (i / task.inner, i % task.inner);
            let single = |operand: &Operand| operand.single(row, k);
            let shard = |shard: &Shard| Shard {
                classes: shard.classes.clone(),
                logits: if shard.classes.is_empty() {
                    Operand::zeros(task.logits.dtype, [1, 0, 1])
                } else {
                    single(&shard.logits)
                },
                targets: shard.targets.as_ref().map(|targets| match shard.classes.len() {
                    0 => Operand::zeros(targets.dtype, [1, 0, 1]),
                    _ => single(targets),
                }),
                grad: if shard.classes.is_empty() {
                    Operand::zeros(task.grad.dtype, [1, 0, 1])
                } else {
                    single(&shard.grad)
                },
            };
            let alone = Split { task: task.single(row, k), shards: split.shards.iter().map(shard).collect() };
            let (own, own_answer) = bits(&alone, &how);
            for (own, all) in own.iter().zip(&all) {
                same_bits(own, &all[6 * i..][..6], "state");
            }
            same_bits(&own_answer.lse, &answer.lse[i..=i], "lse");
            let grad = |class: usize| answer.grad[(row * task.classes + class) * task.inner + k];
            if task.targets.is_some() {
                same_bits(&own_answer.grad, &(0..task.classes).map(grad).collect::<Vec<_>>(), "gradient");
                same_bits(&own_answer.row_losses, &answer.row_losses[i..=i], "row loss");
            }
        }
    }
}

/// A task without options over logits and targets from a generator.
fn plain(dtype: Dtype, rows: usize, classes: usize, probabilities: bool) -> Task {
    let mut rng = Rng::new((rows * classes) as u64);
    let logits: Vec<f64> = (0..rows * classes).map(|_| 3.0 * rng.normal()).collect();
    let targets = if probabilities {
        let t: Vec<f64> = (0..rows * classes).map(|_| rng.uniform(0.0, 1e-3)).collect();
        Operand::packed(Dtype::F32, [rows, classes, 1], &t)
    } else {
        let y: Vec<f64> = (0..rows).map(|_| rng.below(classes) as f64).collect();
        Operand::packed(Dtype::I32, [rows, 1, 1], &y)
    };
    Task::new(Operand::packed(dtype, [rows, classes, 1], &logits), targets)
}

/// Threads over rows, over the segments of long rows, and over merged states change no bit.
#[test]
fn threads_do_not_matter() {
    let pool = Pool::new(4).unwrap();
    for (rows, classes, probabilities, smoothing) in [
        (3, 200_000, false, 0.0),
        (2, 200_000, false, 0.1),
        (3, 150_000, true, 0.0),
        (3_000, 90, false, 0.1),
        (30_000, 5, false, 0.0),
    ] {
        let task = Task {
            label_smoothing: smoothing,
            z_loss: 1e-3,
            entropy_bonus: 0.2,
            ..plain(Dtype::F32, rows, classes, probabilities)
        };
        let split = Split::new(&task, 5);
        for isa in isas() {
            let one = bits(&split, &How { threads: 1, ..How::on(isa) });
            for threads in [2, 3, 0] {
                let how = How { threads, pool: Some(&pool), ..How::on(isa) };
                assert_same(&bits(&split, &how), &one, &format!("{threads} threads"));
            }
        }
    }
}

/// The results of rows of f64 logits cut after `cut` classes: lse, entropy, row loss, argmax, gradient.
fn of_cut(x: &[f64], y: i64, cut: usize, smoothing: f64, isa: Isa) -> [Vec<f64>; 2] {
    let n = x.len();
    let call = |classes: usize| CrossEntropy::new(1, classes).label_smoothing(smoothing).isa(isa);
    let mut merged = [Partial::EMPTY];
    for classes in [cut..n, 0..cut] {
        let mut partials = [Partial::EMPTY];
        let logits = &x[classes.clone()];
        call(classes.len()).partial_forward(logits, &[y], classes.start, n, &mut partials).unwrap();
        Partial::merge_all(&mut merged, &partials);
    }
    let (mut lse, mut entropy, mut loss, mut argmax) = ([0.0], [0.0], [0.0], [0]);
    let results = Results {
        lse: Some(&mut lse),
        entropy: Some((&mut entropy).into()),
        row_losses: Some((&mut loss).into()),
        argmax: Some(&mut argmax),
        ..Results::default()
    };
    call(n).partial_finish(&[y], n, &merged, results).unwrap();
    let mut grad = vec![7.0; n];
    for classes in [cut..n, 0..cut] {
        let (logits, to) = (&x[classes.clone()], &mut grad[classes.clone()]);
        call(classes.len()).partial_backward(logits, &[y], classes.start, n, &merged, to).unwrap();
    }
    [vec![lse[0], entropy[0], loss[0], argmax[0] as f64], grad]
}

/// The same of the whole row.
fn of_whole(x: &[f64], y: i64, smoothing: f64, isa: Isa) -> [Vec<f64>; 2] {
    let call = CrossEntropy::new(1, x.len()).label_smoothing(smoothing).isa(isa);
    let (mut lse, mut entropy, mut loss, mut argmax) = ([0.0], [0.0], [0.0], [0]);
    let results = Results {
        lse: Some(&mut lse),
        entropy: Some((&mut entropy).into()),
        row_losses: Some((&mut loss).into()),
        argmax: Some(&mut argmax),
        ..Results::default()
    };
    let mut grad = vec![7.0; x.len()];
    call.forward_backward_with(x, &[y], &mut grad, results).unwrap();
    [vec![lse[0], entropy[0], loss[0], argmax[0] as f64], grad]
}

/// Infinities, NaN, ignored rows, targets of another shard, and a dominant class, wherever the cut is.
#[test]
fn edges_are_those_of_the_whole() {
    let rows: [&[f64]; 10] = [
        &[0.5, -1.0, 2.0, 0.0],
        &[-INF, -INF, 1.0, 2.0],
        &[1.0, -INF, -INF, -INF],
        &[-INF; 4],
        &[0.0, NAN, 1.0, -INF],
        &[0.0, INF, 1.0, NAN],
        &[INF, 0.0, 0.0, INF],
        &[3.0, 3.0, 3.0, 3.0],
        &[0.0, 900.0, 1.0, -900.0],
        &[1e4, 1e4 + 1.0, 1e4 - 2.0, 1e4],
    ];
    for isa in isas() {
        for (x, y, smoothing) in rows.iter().flat_map(|x| {
            [-100, 0, 1, 2, 3].into_iter().flat_map(move |y| [0.0, 0.2].map(|s| (*x, y, s)))
        }) {
            let whole = of_whole(x, y, smoothing, isa);
            for cut in 0..=4 {
                let split = of_cut(x, y, cut, smoothing, isa);
                for (a, b) in split.iter().flatten().zip(whole.iter().flatten()) {
                    let size =
                        x.iter().filter(|x| x.is_finite()).fold(1.0, |m: f64, x| m.max(x.abs()));
                    let near = (a - b).abs() <= 1e-15 * size * 8.0;
                    let what = format!("{x:?}, target {y}, cut {cut}: {split:?}, not {whole:?}");
                    assert!(near || a == b || a.is_nan() && b.is_nan(), "{what}");
                }
            }
        }
    }
}

/// The loss of a confident row keeps an absolute accuracy of 2^-50·|lse|, and its gradient a relative one down
/// to 2^-52·|lse|.
#[test]
fn confident_rows() {
    for isa in isas() {
        for offset in [0.0, 100.0, -1e4] {
            for gap in [5.0f64, 20.0, 30.0, 50.0] {
                let x = [offset - gap, offset, offset - gap - 1.0, offset - gap - 2.0];
                let exact = ((-gap).exp() * (1.0 + (-1f64).exp() + (-2f64).exp())).ln_1p();
                let lse = offset + exact;
                for cut in 0..=4 {
                    let [results, grad] = of_cut(&x, 1, cut, 0.0, isa);
                    let bound = 2f64.powi(-50) * lse.abs() + 1e-14 * exact;
                    assert!((results[2] - exact).abs() <= bound, "{x:?}, cut {cut}: {results:?}");
                    let minus = -(-exact).exp_m1();
                    let bound = 2f64.powi(-52) * (1.0 + lse.abs()) + 1e-14 * minus;
                    assert!((grad[1] + minus).abs() <= bound, "{x:?}, cut {cut}: {grad:?}");
                }
            }
        }
    }
}

/// In place, into padded rows, and accumulated.
#[test]
fn gradients_in_place_and_into_padding() {
    let x = [0.1f32, 0.2, 0.3, 9.0, 0.4, 0.3, 0.2, 9.0]; // the second shard of 5 classes: 3 of them
    let merged = {
        let mut merged = [Partial::EMPTY; 2];
        let columns = Input::from(&x).strides([4, 1, 0]);
        CrossEntropy::new(2, 3).partial_forward(columns, &[4i32, 0], 2, 5, &mut merged).unwrap();
        let mut others = [Partial::EMPTY; 2];
        CrossEntropy::new(2, 2).partial_forward(&[0f32; 4], &[4i32, 0], 0, 5, &mut others).unwrap();
        Partial::merge_all(&mut merged, &others);
        merged
    };
    let call = CrossEntropy::new(2, 3).zero_padding(true);
    let mut grad = [0.5f32; 6];
    let columns = Input::from(&x).strides([4, 1, 0]);
    call.partial_backward(columns, &[4i32, 0], 2, 5, &merged, &mut grad).unwrap();
    let mut place = x;
    let in_place = Output::from(&mut place).strides([4, 1, 0]);
    call.partial_backward_in_place(in_place, &[4i32, 0], 2, 5, &merged).unwrap();
    assert_eq!(place[..3], grad[..3]);
    assert_eq!(place[4..7], grad[3..]);
    assert_eq!([place[3], place[7]], [0.0, 9.0]);
    // All gradients of a row add up to 0; the other shard has those of the first two classes.
    assert!(grad[0] > 0.0 && grad[2] < 0.0 && grad[3..].iter().all(|g| *g > 0.0), "{grad:?}");
    let mut twice = grad;
    let accumulating = call.accumulate(true);
    accumulating.partial_backward(columns, &[4i32, 0], 2, 5, &merged, &mut twice).unwrap();
    assert!(twice.iter().zip(grad).all(|(twice, once)| (twice - 2.0 * once).abs() < 1e-7));
}

/// The last shard of the largest vocabulary: its targets take all bits of an f64.
#[test]
fn the_largest_vocabulary() {
    let (rows, total) = (9, 1usize << 53);
    let mut rng = Rng::new(53);
    let x: Vec<f32> = (0..rows * 8).map(|_| rng.uniform(-3.0, 3.0) as f32).collect();
    let near: Vec<i64> = (0..rows as i64).map(|row| row * 5 % 8).collect();
    let far: Vec<i64> = near.iter().map(|y| total as i64 - 8 + y).collect();
    for isa in isas() {
        let call = CrossEntropy::new(rows, 8).isa(isa);
        let run = |y: &[i64], offset, total| {
            let mut states = vec![Partial::EMPTY; rows];
            call.partial_forward(&x, y, offset, total, &mut states).unwrap();
            let (mut loss, mut grad) = (0.0, vec![0f32; x.len()]);
            let results = Results { loss: Some(&mut loss), ..Results::default() };
            call.partial_finish(y, total, &states, results).unwrap();
            call.partial_backward(&x, y, offset, total, &states, &mut grad).unwrap();
            (loss, grad)
        };
        assert_eq!(run(&far, total - 8, total), run(&near, 0, 8), "{}", isa.name());
    }
}

/// What only the Rust surface can get wrong; tests/c/shards.c has the rest.
#[test]
fn refused_slices() {
    let (x, y) = ([0f32; 6], [0i32, 1]);
    let mut partials = [Partial { lse: 7.0, ..Partial::EMPTY }; 2];
    let call = CrossEntropy::new(2, 3);
    let error = call.partial_forward(&x, &y, 0, 3, &mut partials[..1]).unwrap_err();
    assert_eq!(error, Error::Shape("partials has 1 states, but there are 2 rows".to_string()));
    let error = call.partial_forward(&x[..5], &y, 0, 3, &mut partials).unwrap_err();
    assert!(matches!(error, Error::Shape(what) if what.contains("logits has 5 elements")));
    let error = call.partial_forward(&x, &y, 1, 3, &mut partials).unwrap_err();
    assert!(matches!(error, Error::Shape(what) if what.contains("class_offset + classes = 1 + 3")));
    assert_eq!(partials.map(|state| state.lse), [7.0; 2]);
    let mut grad = [7f32; 6];
    let error = call.partial_backward(&x, &y, 0, 3, &partials[..1], &mut grad).unwrap_err();
    assert_eq!(error, Error::Shape("merged has 1 states, but there are 2 rows".to_string()));
    assert_eq!(grad, [7.0; 6]);
    let mut uninit = [const { std::mem::MaybeUninit::<f32>::uninit() }; 6];
    let adding = call.accumulate(true);
    let error = adding.partial_backward(&x, &y, 0, 3, &partials, &mut uninit).unwrap_err();
    assert!(matches!(error, Error::Param(what) if what.contains("not initialised")));
    let weights = [1f32; 3];
    let weighted = call.class_weights(&weights);
    let error = weighted.partial_forward(&x, &y, 0, 4, &mut partials).unwrap_err();
    assert!(matches!(error, Error::Shape(what) if what.contains("class_weights has 3 elements")));
    let mut loss = 7.0;
    let results = Results { loss: Some(&mut loss), ..Results::default() };
    let error = call.partial_finish(&y, 3, &partials[..1], results).unwrap_err();
    assert!(matches!(error, Error::Shape(what) if what.starts_with("merged has 1 states")));
    let results = Results { loss: Some(&mut loss), ..Results::default() };
    let error = call.partial_finish_evaluate(3, &partials, results).unwrap_err();
    assert_eq!(error, Error::Null("targets is NULL".to_string()));
    assert_eq!(loss, 7.0);
}

/// No rows: nothing is read or written, and a mean is NaN.
#[test]
fn no_rows() {
    let call = CrossEntropy::new(0, 3);
    let (x, y): ([f32; 0], [i32; 0]) = ([], []);
    call.partial_forward(&x, &y, 0, 3, &mut []).unwrap();
    call.partial_backward(&x, &y, 0, 3, &[], &mut [0f32; 0]).unwrap();
    let mut loss = 7.0;
    let results = Results { loss: Some(&mut loss), ..Results::default() };
    call.partial_finish(&y, 3, &[], results).unwrap();
    assert!(loss.is_nan());
}
