//! Bugs of other implementations that concern no edge case: splitting, threads, and tests that checked
//! nothing. docs/verification.md lists all of them, with the test that keeps each out.

use common::bounds::{Judge, check};
use common::random::Rng;
use common::{How, Pass, Problem, Reals, assert_same, isas};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;
use xent::{CrossEntropy, Pool, Results, Softmax};

/// Classes of a segment, the unit in which rows are split over threads (docs/design.md).
const SEGMENT: usize = 32 * 2048;

/// Megatron#737, #7452, CCE#59: a vocabulary was split, and smoothed by the number of classes of a
/// part; a part was shorter than the others, or padded. Here rows are split over threads into three
/// segments and a shorter fourth that ends in padding.
#[test]
fn megatron_737_smoothing_over_split_rows() {
    let (classes, padding) = (3 * SEGMENT + 1003, 500);
    let mut rng = Rng::new(737);
    let mut logits = rng.normals(2 * classes, 1.0);
    for row in logits.chunks_mut(classes) {
        row[classes - padding..].fill(f32::NEG_INFINITY);
    }
    let mut weights = vec![1.0; classes];
    weights[classes - padding..].fill(0.0);
    let problem = Problem {
        class_weights: Some(Reals::F32(weights)),
        label_smoothing: 0.3,
        // The target is in the first segment, or in the short one.
        ..Problem::sum(classes, &logits, &[7, 3 * SEGMENT as i64 + 11])
    };
    let pools = [2, 3, 8].map(|threads| Pool::new(threads).unwrap());
    for pool in &pools {
        let split = |isa| How { pool: Some(pool), ..How::on(isa) };
        for isa in isas() {
            let whole = problem.run(Pass::Fused, &How { threads: 1, ..How::on(isa) });
            problem.run(Pass::Fused, &split(isa)).assert_same(&whole, "split");
        }
    }
    check(&problem, |isa| How { pool: Some(&pools[1]), ..How::on(isa) });
}

/// The same split made by the caller: each part of the vocabulary is a call, and the caller merges
/// their lse. One part is shorter, one is padded with −inf.
#[test]
fn megatron_7452_merged_shards() {
    let (classes, y) = (300usize, 290usize);
    let logits = Rng::new(59).normals(classes, 3.0);
    for isa in isas() {
        let how = How::on(isa);
        let whole = Problem::sum(classes, &logits, &[y as i64]).run(Pass::Fused, &how);
        for padded in [44, 128] {
            let mut last = logits[256..].to_vec();
            last.resize(padded, f32::NEG_INFINITY);
            let shards = [&logits[..128], &logits[128..256], &last[..]];
            let parts = shards.map(|shard| {
                let mut lse = [0.0];
                CrossEntropy::new(1, shard.len()).isa(isa).lse(shard, &mut lse).unwrap();
                lse[0]
            });
            let top = parts.into_iter().fold(f64::NEG_INFINITY, f64::max);
            let lse = top + parts.map(|part| (part - top).exp()).iter().sum::<f64>().ln();
            assert!((lse - whole.lse[0]).abs() < 1e-6, "{lse} {}", whole.lse[0]);
            // The target is in the last part, whose gradient must be that of the whole row.
            let mut grad = vec![7f32; padded];
            let target = [(y - 256) as i32];
            CrossEntropy::new(1, padded)
                .isa(isa)
                .backward(&last[..], &target, &[lse], &mut grad)
                .unwrap();
            for (c, (got, want)) in grad.iter().zip(&whole.grad[256..]).enumerate() {
                assert!((got - want).abs() <= 1e-6 * want.abs() + 1e-9, "{c}: {got} {want}");
            }
            assert!(grad[44..].iter().all(|g| *g == 0.0), "{:?}", &grad[44..]);
        }
    }
}

/// Arraymancer#485: sharing made small problems slower. While no thread of the pool is free, a call
/// that shares its work waits; a small call does not share its work.
#[test]
fn arraymancer_485_small_problems_stay_on_their_thread() {
    let (release, released) = mpsc::channel::<()>();
    let (done, waiting) = mpsc::channel();
    // Two threads: a call does not use a pool of one.
    rayon::ThreadPoolBuilder::new().num_threads(2).build_global().unwrap();
    let released = Arc::new(Mutex::new(released));
    for _ in 0..2 {
        let released = Arc::clone(&released);
        rayon::spawn(move || {
            // Blocks until the sender is dropped.
            let _ = released.lock().unwrap().recv();
        });
    }
    std::thread::spawn(move || {
        for [rows, classes] in [[1, 131_071], [130, 1000], [13_100, 10], [4000, 32]] {
            let (mut x, y) = (vec![0.5f32; rows * classes], vec![0u8; rows]);
            let call = CrossEntropy::new(rows, classes);
            call.forward_backward_in_place(&mut x, &y).unwrap();
            let mut lse = vec![0.0; rows];
            let results = Results { lse: Some(&mut lse), ..Results::default() };
            call.forward_with(&x, &y, results).unwrap();
            call.backward_in_place(&mut x, &y, &lse).unwrap();
            // The same logits as the positions of one row.
            let call = CrossEntropy::new(1, classes).inner(rows);
            call.forward_backward_in_place(&mut x, &y).unwrap();
            Softmax::new(rows, classes).softmax_in_place(&mut x).unwrap();
        }
        done.send(()).unwrap();
    });
    let outcome = waiting.recv_timeout(Duration::from_secs(60));
    drop(release);
    outcome.expect("a small call waits for a thread");
}

/// Liger `allclose` without `assert`, TE#2476: a test checked nothing. The judge of most tests here
/// must refuse a result with a small error in any place.
#[test]
fn liger_allclose_the_judge_refuses() {
    fn passes<R>(judgement: impl FnOnce() -> R) -> bool {
        catch_unwind(AssertUnwindSafe(judgement)).is_ok()
    }
    let classes = 70;
    let logits = Rng::new(2476).normals(3 * classes, 2.0);
    let problem = Problem::sum(classes, &logits, &[3, 0, 69]);
    let judge = Judge::new(&problem);
    let off = 1.0 + 1e-5;
    for isa in isas() {
        let run = problem.run(Pass::Fused, &How::on(isa));
        assert!(passes(|| judge.losses(&run)) && passes(|| judge.gradient(&run.grad, None)));
        for row in 0..3 {
            let mut wrong = run.clone();
            wrong.row_losses[row] *= off;
            assert!(!passes(|| judge.losses(&wrong)), "the loss of row {row}");
            let mut wrong = run.clone();
            wrong.lse[row] *= off;
            assert!(!passes(|| judge.losses(&wrong)), "the lse of row {row}");
        }
        let wrong = common::Run { loss: run.loss * off, ..run.clone() };
        assert!(!passes(|| judge.losses(&wrong)), "the loss");
        for i in 0..run.grad.len() {
            for value in [run.grad[i] * off as f32, f32::NAN] {
                let mut wrong = run.grad.clone();
                wrong[i] = value;
                assert!(!passes(|| judge.gradient(&wrong, None)), "entry {i} of the gradient");
            }
        }
        let next = f64::from_bits(run.loss.to_bits() + 1);
        assert!(!passes(|| assert_same(&[next], &[run.loss], "loss")), "another bit");
    }
}
