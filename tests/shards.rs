//! Vocabularies in shards: any split, any order of merging, against the whole call and the oracle.

use common::operand::{Dtype, Operand};
use common::random::{Rng, config};
use common::task::{Answer, Call, Task, same_bits};
use common::task_bounds::{Judge, Worst};
use common::task_random::tasks;
use common::{How, Reduction, fused_isas, isas};
use proptest::prelude::*;
use std::ops::Range;
use xent::{CrossEntropy, Error, Input, Isa, Partial, Pool, Results};

/// The numbers of a state, NaN by one pattern.
fn numbers(states: &[Partial]) -> Vec<f64> {
    let of =
        |s: &Partial| [s.lse, s.target_dot, s.target_mass, s.logit_mean, s.max, s.argmax as f64];
    states.iter().flat_map(of).collect()
}

/// A task whose classes are cut into shards, some of them empty; each has a layout of its own.
struct Split {
    task: Task,
    shards: Vec<Shard>,
}

struct Shard {
    classes: Range<usize>,
    logits: Operand,
    /// Probabilities of the shard's classes.
    targets: Option<Operand>,
    grad: Operand,
}

/// The elements of some classes, in a layout of their own.
fn columns(operand: &Operand, classes: &Range<usize>, layout: Option<&mut Rng>) -> Operand {
    let [rows, all, inner] = operand.sizes;
    let mut values = Vec::new();
    for row in 0..rows {
        let at = |class: usize| (row * all + class) * inner;
        values.extend_from_slice(&operand.values[at(classes.start)..at(classes.end)]);
    }
    let own = Operand::packed(operand.dtype, [rows, classes.len(), inner], &values);
    match layout {
        Some(rng) if !classes.is_empty() => own.laid_out(rng, &[]),
        _ => own,
    }
}

impl Split {
    fn new(task: &Task, seed: u64) -> Split {
        let mut rng = Rng::new(seed);
        let count = 1 + rng.below(5);
        let mut cuts: Vec<usize> = (1..count).map(|_| rng.below(task.classes + 1)).collect();
        cuts.extend([0, task.classes]);
        cuts.sort_unstable();
        let shard = |cut: &[usize]| {
            let classes = cut[0]..cut[1];
            // Classes of half of the shards stay side by side.
            let own = rng.one_in(2);
            let mut layout =
                |operand: &Operand| columns(operand, &classes, own.then_some(&mut rng));
            Shard {
                logits: layout(&task.logits),
                targets: task.targets.as_ref().filter(|t| t.dtype.is_float()).map(&mut layout),
                grad: layout(&task.grad),
                classes,
            }
        };
        Split { task: task.clone(), shards: cuts.windows(2).map(shard).collect() }
    }

    /// Calls with a builder that has the task's options, for a number of classes.
    fn call<T>(&self, classes: usize, how: &How, f: impl FnOnce(CrossEntropy) -> T) -> T {
        let task = &self.task;
        let place = |operand: &Option<Operand>| operand.as_ref().map(Operand::place);
        let class_weights = place(&task.class_weights);
        let row_weights = place(&task.row_weights);
        let row_mask = place(&task.row_mask);
        let grad_output = place(&task.grad_output);
        let mut call = CrossEntropy::new(task.rows, classes)
            .inner(task.inner)
            .ignore_index(task.ignore_index)
            .label_smoothing(task.label_smoothing)
            .z_loss(task.z_loss)
            .softcap(task.softcap)
            .logit_scale(task.logit_scale)
            .reduction(task.reduction)
            .normalizer(task.normalizer)
            .z_normalizer(task.z_normalizer)
            .empty_is_zero(task.empty_is_zero)
            .accumulate(task.accumulate)
            .grad_scale(task.grad_scale)
            .isa(how.isa)
            .threads(how.threads);
        if let Some(pool) = how.pool {
            call = call.pool(pool);
        }
        if let Some(weights) = &class_weights {
            call = call.class_weights(weights.input());
        }
        if let Some(weights) = &row_weights {
            call = call.row_weights(weights.input());
        }
        if let Some(mask) = &row_mask {
            call = call.row_mask(mask.input());
        }
        if let Some(grad) = &grad_output {
            call = call.grad_output(grad.input());
        }
        f(call)
    }

    /// The targets that the call over a shard gets.
    fn targets<'a>(&'a self, shard: &'a Shard) -> Option<&'a Operand> {
        shard.targets.as_ref().or(self.task.targets.as_ref())
    }

    /// The states of a shard.
    fn partial(&self, shard: &Shard, how: &How) -> Vec<Partial> {
        let nonsense = Partial { lse: 7.5, argmax: 77, max: 3.0, ..Partial::EMPTY };
        let mut partials = vec![nonsense; self.task.positions()];
        let logits = shard.logits.place();
        let targets = self.targets(shard).map(Operand::place);
        let (offset, total) = (shard.classes.start, self.task.classes);
        self.call(shard.classes.len(), how, |call| match &targets {
            Some(targets) => {
                let targets = targets.input();
                call.partial_forward(logits.input(), targets, offset, total, &mut partials)
            }
            None => call.partial_evaluate(logits.input(), offset, total, &mut partials),
        })
        .unwrap();
        logits.assert_untouched("logits");
        partials
    }

    fn partials(&self, how: &How) -> Vec<Vec<Partial>> {
        self.shards.iter().map(|shard| self.partial(shard, how)).collect()
    }

    /// Results of merged states.
    fn finish(&self, merged: &[Partial], how: &How) -> Answer {
        let task = &self.task;
        let (positions, has_targets) = (task.positions(), task.targets.is_some());
        let reduces = has_targets && task.reduction != Reduction::None;
        let mut row_losses = task.row_losses.place_poisoned();
        let mut entropy = task.entropy.place_poisoned();
        let (mut lse, mut argmax) = (vec![0.25; positions], vec![-9; positions]);
        let [mut loss, mut z_loss, mut normalizer, mut z_normalizer] = [7.0; 4];
        let (mut kept, mut correct) = (9, 9);
        let has_indices = task.has_indices();
        let results = Results {
            loss: reduces.then_some(&mut loss),
            row_losses: has_targets.then(|| row_losses.output()),
            lse: Some(&mut lse),
            z_loss: reduces.then_some(&mut z_loss),
            normalizer: has_targets.then_some(&mut normalizer),
            z_normalizer: has_targets.then_some(&mut z_normalizer),
            kept_rows: has_targets.then_some(&mut kept),
            argmax: Some(&mut argmax),
            correct: has_indices.then_some(&mut correct),
            entropy: Some(entropy.output()),
        };
        // Probabilities of any shard serve.
        let shard = self.shards.last().unwrap();
        let targets = self.targets(shard).map(Operand::place);
        self.call(shard.classes.len(), how, |call| match &targets {
            Some(targets) => call.partial_finish(targets.input(), task.classes, merged, results),
            None => call.partial_finish_evaluate(task.classes, merged, results),
        })
        .unwrap();
        Answer {
            loss: reduces.then_some(loss),
            z_loss: reduces.then_some(z_loss),
            normalizer: has_targets.then_some(normalizer),
            z_normalizer: has_targets.then_some(z_normalizer),
            kept_rows: has_targets.then_some(kept),
            correct: has_indices.then_some(correct),
            row_losses: if has_targets { row_losses.take("row losses") } else { Vec::new() },
            lse,
            entropy: entropy.take("entropy"),
            argmax,
            grad: Vec::new(),
        }
    }

    /// The gradient of all shards, put together.
    fn gradient(&self, merged: &[Partial], how: &How) -> Vec<f64> {
        let task = &self.task;
        let mut whole = vec![f64::NAN; task.positions() * task.classes];
        for shard in &self.shards {
            let (logits, classes) = (shard.logits.place(), &shard.classes);
            let targets = self.targets(shard).expect("targets").place();
            let mut grad =
                if task.accumulate { shard.grad.place() } else { shard.grad.place_poisoned() };
            self.call(classes.len(), how, |call| {
                let (offset, total) = (classes.start, task.classes);
                let (logits, grad) = (logits.input(), grad.output());
                call.partial_backward(logits, targets.input(), offset, total, merged, grad)
            })
            .unwrap();
            logits.assert_untouched("logits");
            let grad = grad.take("gradient");
            for (i, x) in grad.into_iter().enumerate() {
                let [_, own, inner] = shard.logits.sizes;
                let (row, class) = (i / (own * inner), classes.start + i / inner % own);
                whole[(row * task.classes + class) * inner + i % inner] = x;
            }
        }
        whole
    }
}

/// Merges the states of shards in random order by a random tree, empty states among them.
fn merge(mut all: Vec<Vec<Partial>>, rng: &mut Rng) -> Vec<Partial> {
    let positions = all[0].len();
    if rng.one_in(3) {
        all.push(vec![Partial::EMPTY; positions]);
    }
    while all.len() > 1 {
        let from = all.swap_remove(rng.below(all.len()));
        let into = rng.below(all.len());
        Partial::merge_all(&mut all[into], &from);
    }
    all.remove(0)
}

/// Any split, any order and any tree of merges is within the bounds of the whole.
#[test]
fn random_splits_agree_with_the_oracle() {
    let worst = std::sync::Mutex::new(Worst::default());
    let mut runner = proptest::test_runner::TestRunner::new(config(400));
    let outcome = runner.run(&(tasks(5_000), any::<u64>()), |(spec, seed)| {
        let mut task = spec.task();
        if task.log_probs {
            task.log_probs = false;
        }
        let judge = Judge::of_shards(&task);
        let split = Split::new(&task, seed);
        for isa in isas() {
            let how = spec.how(isa);
            let merged = merge(split.partials(&how), &mut Rng::new(seed));
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
