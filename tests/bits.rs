//! Results have the same bits for every number of threads, pool, alignment, stride, place in the
//! batch, and instruction set.

use common::random::{KINDS, Kind, Rng, config, fill, specs};
use common::{How, Indices, Pass, Problem, Reals, Reduction, Run, assert_same, isas, some};
use proptest::prelude::*;
use std::sync::OnceLock;
use xent::half::{bf16, f16};
use xent::{CrossEntropy, Input, Isa, Output, Pool, Results};

fn eight() -> &'static Pool {
    static POOL: OnceLock<Pool> = OnceLock::new();
    POOL.get_or_init(|| Pool::new(8).unwrap())
}

/// Rows of every finite kind in turn, targets anywhere.
fn mixed(rows: usize, classes: usize, kinds: &[Kind]) -> Problem {
    let mut rng = Rng::new((rows * 31 + classes) as u64);
    let mut logits = vec![0.0; rows * classes];
    let mut targets = Vec::new();
    for (row, x) in logits.chunks_mut(classes).enumerate() {
        let y = rng.below(classes);
        fill(x, kinds[row % kinds.len()], y, &mut rng);
        targets.push(y as i64);
    }
    Problem::new(classes, &logits, &targets)
}

/// Adds smoothing, class weights and row weights, which take other paths.
fn with_options(problem: &Problem) -> Problem {
    let weights = |n: usize| (0..n).map(|i| (i % 7) as f32 / 4.0 - 0.25).collect();
    Problem {
        class_weights: Some(Reals::F32(weights(problem.classes))),
        row_weights: Some(Reals::F64(vec![0.75; problem.rows])),
        label_smoothing: 0.1,
        ..problem.clone()
    }
}

/// Fused out of place and in place, forward, backward out of place and in place.
fn all_passes(problem: &Problem, how: &How) -> [Run; 5] {
    let fused = problem.run(Pass::Fused, how);
    let lse = fused.lse.clone();
    [
        problem.run(Pass::FusedInPlace, how),
        problem.run(Pass::Forward, how),
        problem.run(Pass::Backward(&lse), how),
        problem.run(Pass::BackwardInPlace(&lse), how),
        fused,
    ]
}

fn assert_all_same(a: &[Run; 5], b: &[Run; 5], what: &str) {
    for (a, b) in a.iter().zip(b) {
        a.assert_same(b, what);
    }
}

/// Calls on 1, 2, 3 and 8 threads of the global pool and of a pool of eight; in a sample on 3 threads
/// of the pool.
fn assert_threads_do_not_matter(problem: &Problem) {
    for isa in isas() {
        let alone = How { threads: 1, ..How::on(isa) };
        let good = all_passes(problem, &alone);
        good[0].assert_same(&good[4], "in place");
        good[1].assert_same_losses(&good[4], "forward");
        assert_same(&good[2].grad, &good[3].grad, "backward in place");
        for pool in [None, Some(eight())] {
            for threads in [0, 2, 3, 8] {
                if common::is_sampled() && (pool.is_none() || threads != 3) {
                    continue;
                }
                let how = How { threads, pool, ..How::on(isa) };
                let what = format!("{} on {threads} threads", isa.name());
                assert_all_same(&all_passes(problem, &how), &good, &what);
            }
        }
    }
}

#[test]
fn threads_over_rows() {
    for (rows, classes) in some([(4000, 65), (700, 1000), (257, 2049), (20, 70_000)], 2) {
        let problem = mixed(rows, classes, &KINDS);
        assert_threads_do_not_matter(&problem);
        assert_threads_do_not_matter(&with_options(&problem));
    }
}

/// A few rows of many segments: all threads work on one row at a time.
#[test]
fn threads_over_the_classes_of_long_rows() {
    for (rows, classes) in some([(1, 300_000), (3, 200_000), (2, 131_073), (5, 65_537)], 3) {
        for kinds in [
            &[Kind::Unit, Kind::Steps, Kind::LeadingInf][..],
            &[Kind::Spike, Kind::Confident, Kind::NotFinite],
        ] {
            let problem = mixed(rows, classes, kinds);
            assert_threads_do_not_matter(&problem);
            assert_threads_do_not_matter(&with_options(&problem));
        }
    }
}

/// More than 64 segments of the usual length, and more classes than exponentials are stored in place
/// for. The gradients are large enough to be streamed.
#[test]
fn threads_over_the_longest_rows() {
    for classes in some([5_000_000, 8_500_000], 2) {
        let problem = mixed(1, classes, &[Kind::Unit]);
        let mut all = Vec::new();
        for isa in isas() {
            let mut good: Option<Run> = None;
            for threads in [1, 8] {
                let how =
                    How { threads, pool: Some(eight()), offset: 3, grad_offset: 5, ..How::on(isa) };
                for pass in [Pass::Fused, Pass::FusedInPlace] {
                    let run = problem.run(pass, &how);
                    match &good {
                        Some(good) => run.assert_same(good, isa.name()),
                        None => good = Some(run),
                    }
                }
            }
            all.extend(good);
        }
        for run in &all {
            run.assert_same(&all[0], "instruction sets");
        }
    }
}

/// Streamed gradients have the bits of gradients that are not streamed, at every alignment.
#[test]
fn streamed_gradients() {
    let (rows, classes) = (70, 60_013);
    let problem = mixed(rows, classes, &[Kind::Unit, Kind::Broad, Kind::Steps]);
    assert!(rows * classes * 4 >= 16 << 20);
    for isa in isas() {
        let good = problem.run(Pass::FusedInPlace, &How::on(isa));
        for grad_offset in some([1, 0, 7, 15], 4) {
            let how = How { grad_offset, grad_padding: grad_offset * 3, ..How::on(isa) };
            problem.run(Pass::Fused, &how).assert_same(&good, "streamed");
        }
    }
}

/// So do those of short rows. Each row begins at another place in a cache line, and targets lie before,
/// at and after the beginning of the first whole line.
#[test]
fn streamed_gradients_of_short_rows() {
    let (rows, classes) = (16 << 10, 259);
    let mut problem = mixed(rows, classes, &[Kind::Unit]);
    problem.targets = Indices::I64((0..rows).map(|row| (row % 37) as i64).collect());
    assert!(rows * classes * 4 >= 16 << 20);
    for isa in isas() {
        let good = problem.run(Pass::FusedInPlace, &How::on(isa));
        for grad_offset in some([0, 1], 2) {
            let how = How { grad_offset, ..How::on(isa) };
            problem.run(Pass::Fused, &how).assert_same(&good, "streamed");
        }
    }
}

/// All 16 places of an f32 in a cache line, of the logits and of the gradient.
#[test]
fn alignments() {
    for classes in [1, 3, 16, 63, 64, 65, 130, 1000, 2049, 4100] {
        let problem = mixed(5, classes, &[Kind::Unit, Kind::Steps, Kind::Spike]);
        for problem in [with_options(&problem), problem] {
            for isa in isas() {
                let good = all_passes(&problem, &How::on(isa));
                for offset in some(0..16, 5) {
                    let moved = [
                        How { offset, ..How::on(isa) },
                        How { grad_offset: offset, ..How::on(isa) },
                        How {
                            offset,
                            grad_offset: 15 - offset,
                            padding: offset,
                            grad_padding: 17,
                            ..How::on(isa)
                        },
                    ];
                    for how in moved {
                        let what = format!("{how:?}");
                        assert_all_same(&all_passes(&problem, &how), &good, &what);
                    }
                }
            }
        }
    }
}

/// A row alone, and as the first, a middle and the last row of a batch.
#[test]
fn rows_do_not_depend_on_their_place() {
    for classes in some([1, 2, 10, 65, 300, 2049, 5000, 70_000], 2) {
        for kind in KINDS {
            let other = mixed(3, classes, &[Kind::Unit, Kind::Broad, Kind::Huge]);
            let row = mixed(1, classes, &[kind]);
            for isa in isas() {
                let how = How::on(isa);
                let sum = |problem: Problem| Problem { reduction: Reduction::Sum, ..problem };
                let good = all_passes(&sum(row.clone()), &how);
                for place in 0..3 {
                    let mut batch = sum(other.clone());
                    let range = place * classes..(place + 1) * classes;
                    batch.logits[range.clone()].copy_from_slice(&row.logits);
                    let mut targets = batch.targets.to_i64();
                    targets[place] = row.targets.to_i64()[0];
                    batch.targets = common::Indices::I64(targets);
                    for (good, run) in good.iter().zip(all_passes(&batch, &how)) {
                        let part = |all: &[f64]| all.get(place).copied().into_iter().collect();
                        let (lse, losses): (Vec<f64>, Vec<f64>) =
                            (part(&run.lse), part(&run.row_losses));
                        assert_same(&lse, &good.lse, "lse");
                        assert_same(&losses, &good.row_losses, "row loss");
                        if !run.grad.is_empty() {
                            assert_same(&run.grad[range.clone()], &good.grad, "gradient");
                        }
                    }
                }
            }
        }
    }
}

/// The same call twice, and on one pool from two threads at once (pytorch#17350, #71367:
/// different losses from run to run).
#[test]
fn pytorch_17350_run_to_run() {
    let problem = mixed(300, 1000, &KINDS[..8]);
    for isa in isas() {
        let how = How { pool: Some(eight()), ..How::on(isa) };
        let good = problem.run(Pass::Fused, &how);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    for _ in 0..10 {
                        problem.run(Pass::Fused, &how).assert_same(&good, "again");
                    }
                });
            }
        });
    }
}

/// Arraymancer#485, dfdx#764: calls from inside a pool's own threads.
#[test]
fn dfdx_764_nested_pools() {
    let problem = mixed(300, 1000, &KINDS[..8]);
    let how = How::on(Isa::best());
    let good = problem.run(Pass::Fused, &how);
    let outer = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
    outer.install(|| {
        rayon::join(
            || problem.run(Pass::Fused, &how).assert_same(&good, "nested"),
            || {
                let pool = Some(eight());
                let how = How { pool, ..how };
                problem.run(Pass::Fused, &how).assert_same(&good, "nested");
            },
        )
    });
}

proptest! {
    #![proptest_config(config(600))]

    #[test]
    fn instruction_sets_agree(spec in specs()) {
        let sets: Vec<Isa> = isas();
        let problem = spec.problem();
        let problems = [problem.clone(), Problem { accumulate: None, ..problem }];
        for problem in problems {
            let mut good: Option<[Run; 5]> = None;
            for &isa in &sets {
                let how = spec.how(isa);
                let runs = if problem.accumulate.is_some() {
                    let run = problem.run(Pass::Fused, &how);
                    let backward = problem.run(Pass::Backward(&run.lse), &how);
                    [run.clone(), run.clone(), run.clone(), run, backward]
                } else {
                    all_passes(&problem, &how)
                };
                match &good {
                    Some(good) => assert_all_same(&runs, good, isa.name()),
                    None => good = Some(runs),
                }
            }
        }
    }
}

/// The sets also agree on calls without targets, and all calls agree on the lse.
#[test]
fn lse_alone() {
    for classes in [1, 2, 65, 300, 2049, 70_000] {
        let problem = mixed(13, classes, &KINDS);
        let mut good: Option<Vec<f64>> = None;
        for isa in isas() {
            let mut lse = vec![0.0; 13];
            let call = problem.builder().isa(isa);
            call.lse(&problem.logits, &mut lse).unwrap();
            let oracle = common::reference::evaluate(&problem.case());
            for (row, &got) in lse.iter().enumerate() {
                let bound = 2e-7 * oracle.lse_scale[row] + 2f64.powi(-23);
                common::bounds::close(got, oracle.lse[row], bound, || format!("lse[{row}]"));
            }
            match &good {
                Some(good) => assert_same(&lse, good, isa.name()),
                None => good = Some(lse),
            }
        }
    }
}

/// Asserts that these rows of a fused call, out of place and in place, have the bits that they have
/// alone.
fn fused_alone_and_together(
    problem: &Problem,
    threads: u32,
    rows: impl Iterator<Item = usize> + Clone,
) {
    let classes = problem.classes;
    for isa in isas() {
        let how = How { threads, ..How::on(isa) };
        for pass in [Pass::Fused, Pass::FusedInPlace] {
            let whole = problem.run(pass, &how);
            for row in rows.clone() {
                let alone = problem.single(row).run(pass, &how);
                let range = row * classes..(row + 1) * classes;
                assert_same(&alone.lse, &whole.lse[row..=row], "lse");
                assert_same(&alone.row_losses, &whole.row_losses[row..=row], "row loss");
                assert_same(&alone.grad, &whole.grad[range], "gradient");
            }
        }
    }
}

/// Interleaved rows of which one or both have chunks that are swept again: masked logits, and a logit
/// far above all before it, in each chunk in turn, and behind a masked one.
#[test]
fn pairs_with_chunks_that_are_swept_again() {
    let (rows, classes, chunk) = (40, 5 * 2048 + 100, 2048);
    let mut problem = Problem { normalizer: 3.0, ..mixed(rows, classes, &[Kind::Unit]) };
    for (row, x) in problem.logits.chunks_mut(classes).enumerate() {
        let at = |chunks: usize| (chunks % 6 * chunk + row * 7 % 100).min(classes - 1);
        if row % 3 != 0 {
            x[at(row)] = f32::NEG_INFINITY;
        }
        if row % 4 > 1 {
            x[at(row / 3)] = 60.0;
        }
    }
    fused_alone_and_together(&problem, 1, 0..rows);
}

/// More rows than blocks. Within a block the gradient sweep over a row is interleaved with the first
/// sweep over the next row. A single row has no next row.
#[test]
fn rows_in_pairs() {
    let (rows, classes) = (if common::is_sampled() { 136 } else { 520 }, 16_400);
    let problem = Problem { normalizer: 3.0, ..mixed(rows, classes, &KINDS) };
    fused_alone_and_together(&problem, 0, (0..9).chain(rows - 9..rows));
}

/// Losses of forward and of the fused call, at the numbers of classes up to which rows are swept in
/// batches, and above.
#[test]
fn batches_to_their_last_class() {
    for classes in [1279, 1280, 1281] {
        let problem = mixed(24, classes, &KINDS);
        for isa in isas() {
            let fused = problem.run(Pass::Fused, &How::on(isa));
            let forward = problem.run(Pass::Forward, &How::on(isa));
            forward.assert_same_losses(&fused, &format!("{classes} on {}", isa.name()));
        }
    }
}

/// Blocks of whole batches: of the longest rows that are summed eight together, and of longer rows,
/// which forward still takes eight at a time.
#[test]
fn losses_of_blocks_of_long_rows() {
    for classes in some([1280, 1281], 2) {
        let problem = mixed(2100, classes, &[Kind::Unit, Kind::Broad]);
        for isa in isas() {
            let fused = problem.run(Pass::Fused, &How::on(isa));
            problem.run(Pass::Forward, &How::on(isa)).assert_same_losses(&fused, isa.name());
        }
        // Row losses that cancel: a sum over eight rows at once must keep what a sum row by row keeps.
        let weight = |row: usize| [1e20, -1e20, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0][row % 8];
        let problem = Problem {
            row_weights: Some(Reals::F64((0..2104).map(weight).collect())),
            ..Problem::sum(classes, &vec![0.5; 2104 * classes], &[1; 2104])
        };
        let how = How::on(Isa::best());
        let fused = problem.run(Pass::Fused, &how);
        problem.run(Pass::Forward, &how).assert_same_losses(&fused, "losses that cancel");
    }
}

/// A thread takes several blocks at a time; each has fewer rows than a batch.
#[test]
fn portions_of_blocks() {
    let problem = mixed(520, 2049, &[Kind::Unit, Kind::Broad]);
    let how = |threads| How { threads, pool: Some(eight()), ..How::on(Isa::best()) };
    for pass in [Pass::Fused, Pass::Forward] {
        let good = problem.run(pass, &how(1));
        problem.run(pass, &how(2)).assert_same(&good, "two threads");
    }
}

/// The largest number of classes for which exponentials are stored in place, and the next.
#[test]
fn exponentials_kept_to_the_last_class() {
    for classes in some([1 << 23, (1 << 23) + 1], 2) {
        let logits: Vec<f32> = (0..classes).map(|i| (i % 1021) as f32 / 512.0).collect();
        let problem = Problem::new(classes, &logits, &[classes as i64 / 3]);
        let how = How { threads: 1, ..How::on(Isa::best()) };
        let good = problem.run(Pass::Fused, &how);
        problem.run(Pass::FusedInPlace, &how).assert_same(&good, "in place");
    }
}

/// More than 32 chunks in a segment, of which a late one has exponents out of range.
#[test]
fn late_chunks_out_of_range() {
    let classes = 5_000_000;
    for class in some([35 * 2048 + 7, 38 * 2048], 2) {
        let mut logits: Vec<f32> = (0..classes).map(|i| (i % 1021) as f32 / 512.0).collect();
        logits[class] = f32::NEG_INFINITY;
        logits[class + 1] = -500.0;
        let problem = Problem::new(classes, &logits, &[3]);
        let how = How { threads: 1, ..How::on(Isa::best()) };
        let good = problem.run(Pass::FusedInPlace, &how);
        assert_eq!(good.grad[class..class + 2], [0.0; 2]);
        problem.run(Pass::Fused, &how).assert_same(&good, "out of place");
    }
}

/// Some of the interleaved rows are ignored: they store no exponentials in place.
#[test]
fn ignored_rows_in_pairs() {
    let (rows, classes) = (24, 9000);
    let mut problem = Problem { normalizer: 3.0, ..mixed(rows, classes, &KINDS) };
    let ignored = |row: usize| [1, 3, 8, 9, 10, 17, 23].contains(&row);
    let target = |row: usize| if ignored(row) { -100 } else { (row * 371) as i64 };
    problem.targets = Indices::I64((0..rows).map(target).collect());
    fused_alone_and_together(&problem, 1, 0..rows);
}

/// Some of the interleaved rows have a factor outside the range of f32, or at its end. The same gradient
/// is also accumulated.
#[test]
fn pairs_with_any_factor() {
    let (rows, classes) = (16, 9000);
    let weights = [1.0, 1e-36, 1e36, 2.0, 1e-42, 1.0, 3e-30, 1e34].repeat(2);
    let weighted = Problem {
        row_weights: Some(Reals::F64(weights)),
        ..mixed(rows, classes, &[Kind::Unit, Kind::Broad])
    };
    let weighted = Problem { normalizer: 3.0, ..weighted };
    fused_alone_and_together(&weighted, 1, 0..rows);
    let old: Vec<f32> = (0..rows * classes).map(|i| (i % 89) as f32 / 64.0).collect();
    for isa in isas() {
        let how = How { threads: 1, ..How::on(isa) };
        let gradient = weighted.run(Pass::Fused, &how).grad;
        let adding = Problem { accumulate: Some(old.clone()), ..weighted.clone() };
        let sum: Vec<f32> = gradient.iter().zip(&old).map(|(g, old)| g + old).collect();
        let added = adding.run(Pass::Fused, &how).grad;
        // The target's class is an exception: it is added before it is rounded.
        for (row, (added, sum)) in added.chunks(classes).zip(sum.chunks(classes)).enumerate() {
            let y = weighted.targets.to_i64()[row] as usize;
            assert_same(&added[..y], &sum[..y], "before the target");
            assert_same(&added[y + 1..], &sum[y + 1..], "after the target");
        }
    }
}

/// Rows of more than one segment are swept one by one, even if several fit the cache. The chunks of one
/// row that need a second sweep must not be mistaken for those of the next.
#[test]
fn long_rows_of_halves() {
    let (rows, classes) = (4, 66_000);
    let mut logits: Vec<bf16> =
        (0..rows * classes).map(|i| bf16::from_f32((i % 97) as f32 / 32.0)).collect();
    for row in [0, 2] {
        for class in [65_900, 30_000 + row, 17] {
            logits[row * classes + class] = bf16::from_f32(-1e4);
        }
    }
    let targets = [5, 7, 65_800, 40_000];
    for isa in isas() {
        let call = |rows| CrossEntropy::new(rows, classes).isa(isa).reduction(Reduction::Sum);
        let mut whole = vec![bf16::ZERO; rows * classes];
        call(rows).threads(1).forward_backward(&logits, &targets, &mut whole).unwrap();
        for row in 0..rows {
            let range = row * classes..(row + 1) * classes;
            let mut alone = vec![bf16::ZERO; classes];
            let logits = &logits[range.clone()];
            call(1).threads(1).forward_backward(logits, &targets[row..=row], &mut alone).unwrap();
            assert!(alone == whole[range], "row {row} on {}", isa.name());
        }
    }
}

/// Batches of eight distributions that continue from the inner positions of one row to those of the
/// next; the number of positions does not divide eight.
#[test]
fn batches_over_inner_positions() {
    let (rows, inner) = (7, 3);
    for classes in [200, 1500] {
        let weights: Vec<f64> = (0..rows * inner).map(|i| 0.5 + i as f64).collect();
        let row_weights = Some(Reals::F64(weights.clone()));
        let problem = Problem { row_weights, ..mixed(rows * inner, classes, &KINDS) };
        let strides = [(inner * classes) as i64, 1, classes as i64];
        for isa in isas() {
            let flat = problem.run(Pass::Fused, &How::on(isa));
            let mut grad = vec![0f32; problem.logits.len()];
            let (mut losses, mut lse) = ([0f64; 21], [0f64; 21]);
            let results = Results {
                row_losses: Some(Output::from(&mut losses)),
                lse: Some(&mut lse),
                ..Results::default()
            };
            let logits = Input::from(&problem.logits).strides(strides);
            let to = Output::from(&mut grad).strides(strides);
            let call = CrossEntropy::new(rows, classes).inner(inner).isa(isa);
            let call = call.row_weights(&weights);
            call.forward_backward_with(logits, problem.targets.input(), to, results).unwrap();
            assert_same(&lse, &flat.lse, "lse");
            assert_same(&losses, &flat.row_losses, "row losses");
            assert_same(&grad, &flat.grad, "gradient");
        }
    }
}

/// The gradient of a long row without contiguous classes is not interleaved with the sum of the next
/// row: only contiguous gradients are.
#[test]
fn long_rows_of_scattered_gradients() {
    let (rows, classes) = (17, 8200);
    let problem = mixed(rows, classes, &[Kind::Unit, Kind::Steps]);
    for isa in isas() {
        let good = problem.run(Pass::Fused, &How::on(isa));
        let mut apart = vec![7f32; 2 * rows * classes];
        let to = Output::from(&mut apart).strides([2 * classes as i64, 2, 0]);
        let call = CrossEntropy::new(rows, classes).isa(isa).threads(1);
        call.forward_backward(&problem.logits, problem.targets.input(), to).unwrap();
        let grad: Vec<f32> = apart.iter().copied().step_by(2).collect();
        assert_same(&grad, &good.grad, isa.name());
        assert!(apart.iter().skip(1).step_by(2).all(|&x| x == 7.0), "{}", isa.name());
    }
}

/// Nor is a gradient that subtracts a mass of each class, though the next row is ignored and needs
/// exponentials alone.
#[test]
fn long_rows_with_smoothing_before_ignored_ones() {
    let (rows, classes) = (16, 8200);
    let mut problem = Problem {
        normalizer: 3.0,
        class_weights: Some(Reals::F32((0..classes).map(|i| (i % 7) as f32 / 4.0).collect())),
        label_smoothing: 0.1,
        ..mixed(rows, classes, &[Kind::Unit])
    };
    let target = |row: usize| if row < 8 { (row * 371) as i64 } else { -100 };
    problem.targets = Indices::I64((0..rows).map(target).collect());
    fused_alone_and_together(&problem, 1, 0..rows);
}

/// The same for probability targets, before rows that the mask ignores.
#[test]
fn long_rows_of_probabilities_before_masked_ones() {
    let (rows, classes) = (16, 8200);
    let logits = mixed(rows, classes, &[Kind::Unit]).logits;
    let masses: Vec<f32> = (0..rows * classes).map(|i| (i % 13) as f32 / 8192.0).collect();
    let mask: Vec<u8> = (0..rows).map(|row| (row < 8).into()).collect();
    for isa in isas() {
        let fused = |range: std::ops::Range<usize>| {
            let all = range.start * classes..range.end * classes;
            let (mut grad, mut lse) = (vec![7f32; all.len()], vec![7f64; range.len()]);
            let results = Results { lse: Some(&mut lse), ..Results::default() };
            let call = CrossEntropy::new(range.len(), classes).isa(isa).threads(1);
            let call = call.reduction(Reduction::Sum).row_mask(&mask[range]);
            let (logits, masses) = (&logits[all.clone()], &masses[all]);
            call.forward_backward_with(logits, masses, &mut grad, results).unwrap();
            (grad, lse)
        };
        let (grad, lse) = fused(0..rows);
        for row in 0..rows {
            let (alone, alone_lse) = fused(row..row + 1);
            assert_same(&alone, &grad[row * classes..][..classes], "gradient");
            assert_same(&alone_lse, &lse[row..=row], "lse");
        }
    }
}

/// The loss of one problem in two layouts of memory, `[rows, inner, classes]` and
/// `[inner, rows, classes]`: lanes run along rows in the one and along inner positions in the other, so
/// that the losses of the rows are added in other orders.
#[test]
fn the_layout_of_narrow_rows_does_not_show_in_the_loss() {
    let (rows, inner, classes) = (3, 21, 5);
    let mut rng = Rng::new(7);
    for turn in 0..50 {
        let x: Vec<bf16> =
            (0..rows * inner * classes).map(|_| bf16::from_f64(rng.uniform(-3.0, 3.0))).collect();
        let mut crossed = x.clone();
        for row in 0..rows {
            for k in 0..inner {
                for c in 0..classes {
                    crossed[(k * rows + row) * classes + c] = x[(row * inner + k) * classes + c];
                }
            }
        }
        let targets: Vec<i64> = (0..rows * inner).map(|_| rng.below(classes) as i64).collect();
        for isa in isas() {
            for smoothing in [0.0, 0.1] {
                let loss = |x: &[bf16], strides| {
                    let x = Input::from(x).strides(strides);
                    let call = CrossEntropy::new(rows, classes).inner(inner);
                    call.label_smoothing(smoothing).isa(isa).forward(x, &targets).unwrap()
                };
                let (inner, rows, classes) = (inner as i64, rows as i64, classes as i64);
                let packed = loss(&x, [inner * classes, 1, classes]);
                let crossed = loss(&crossed, [classes, 1, rows * classes]);
                let same = packed.to_bits() == crossed.to_bits();
                assert!(same, "turn {turn}: {packed:e}, {crossed:e} on {}", isa.name());
            }
        }
    }
}

/// Compares a small call, in every form, with one that is general for it has one more result.
macro_rules! agree {
    ($call:expr, $x:expr, $y:expr, $narrow:expr, $fill:expr, $what:expr) => {{
        let (call, x, y, narrow, what) = (&$call, $x, $y, &$narrow, &$what);
        let (mut want, mut kept, mut want_grad) = (0.0, 0, vec![$fill; x.len()]);
        let all =
            Results { loss: Some(&mut want), kept_rows: Some(&mut kept), ..Results::default() };
        call.forward_backward_with(x, y, &mut want_grad, all).unwrap();
        let (mut grad, mut in_place) = (vec![$fill; x.len()], x.clone());
        let losses = [
            call.forward(x, y).unwrap(),
            call.forward(x, narrow).unwrap(),
            call.forward_backward(x, y, &mut grad).unwrap(),
            call.forward_backward_in_place(&mut in_place, narrow).unwrap(),
        ];
        for loss in losses {
            assert_eq!(loss.to_bits(), want.to_bits(), "{what}: {loss} for {want}");
        }
        for grad in [grad, in_place] {
            for (i, (a, b)) in grad.iter().zip(&want_grad).enumerate() {
                assert_eq!(a.to_bits(), b.to_bits(), "{what}: {a} for {b} at {i}");
            }
        }
    }};
}

/// A call that asks for no more than the loss and the gradient goes through fewer checks, and its rows
/// another way. One that asks for the number of rows too does not.
#[test]
fn small_calls_have_the_bits_of_general_ones() {
    let narrow = (1..=17)
        .flat_map(|rows| [2, 3, 4, 5, 7, 8, 10, 16, 17, 33, 79, 80, 128].map(|c| (rows, c)));
    let short = [1, 2, 4, 9, 16]
        .into_iter()
        .flat_map(|rows| [300, 1000, 1984, 2033, 4032].map(|c| (rows, c)));
    // Of several tiles, and at the ends of what is small.
    let many = [31, 32, 63, 64, 65, 100, 127, 128, 129]
        .into_iter()
        .flat_map(|rows| [2, 10, 16, 31, 32, 42, 64, 80, 100, 200].map(|c| (rows, c)));
    let shapes = narrow.chain(short).chain(many).chain([(1, 4033), (109, 601)]);
    // All rows ordinary, of which each has to be its own; and some that are not, for which the call is left to the general
    // way.
    let others = |rows: usize| [&KINDS[..], &[Kind::Unit, Kind::Confident]][rows % 2];
    let others = |of: (usize, usize)| (of.0 <= 17).then(|| (of, others(of.0)));
    let shapes = shapes.flat_map(|of| [Some((of, &[Kind::Unit][..])), others(of)]).flatten();
    for ((rows, classes), kinds) in shapes {
        let mut problem = mixed(rows, classes, kinds);
        let weights: Vec<f32> = (0..classes).map(|c| 0.25 * (1 + c % 9) as f32).collect();
        let options = [(0.0, false), (0.1, false), (0.0, true), (0.1, true)];
        for (ignored, (smoothing, weighted)) in
            [false, true].into_iter().flat_map(|ignored| options.map(|options| (ignored, options)))
        {
            if ignored && let Indices::I64(targets) = &mut problem.targets {
                targets[rows / 2] = -100;
            }
            let (x, Indices::I64(y)) = (&problem.logits, &problem.targets) else {
                unreachable!("i64 targets");
            };
            let narrow: Vec<i32> = y.iter().map(|&y| y as i32).collect();
            // With digits that no f32 has.
            let wide: Vec<f64> = x.iter().map(|&x| f64::from(x) * (1.0 + 1e-9)).collect();
            let wide = &wide;
            let halves = &x.iter().map(|&x| bf16::from_f32(x)).collect::<Vec<_>>();
            let f16s = &x.iter().map(|&x| f16::from_f32(x)).collect::<Vec<_>>();
            for isa in isas() {
                for reduction in [xent::Reduction::Mean, xent::Reduction::Sum] {
                    let mut call = CrossEntropy::new(rows, classes)
                        .reduction(reduction)
                        .isa(isa)
                        .label_smoothing(smoothing)
                        .grad_scale(0.5);
                    if weighted {
                        call = call.class_weights(&weights);
                    }
                    let what = format!(
                        "{rows}x{classes} on {}, ignored: {ignored}, smoothing {smoothing}, weights: {weighted}",
                        isa.name()
                    );
                    agree!(call, x, y, narrow, 7f32, what);
                    if let xent::Reduction::Mean = reduction {
                        agree!(call, wide, y, narrow, 7f64, what);
                        agree!(call, halves, y, narrow, bf16::ONE, what);
                        agree!(call, f16s, y, narrow, f16::ONE, what);
                    }
                }
            }
        }
    }
}
