//! Vocabularies in shards: a [`Task`] or a [`Layer`] whose classes are cut, its states, and what is made of them.

use crate::layer::{Layer, LayerJudge};
use crate::operand::{Dtype, Operand};
use crate::random::Rng;
use crate::reference;
use crate::task::{Answer, Task, same_bits};
use crate::{How, Reduction};
use std::ops::Range;
use xent::{CrossEntropy, Linear, LinearGrads, Partial, Results};

const INF: f64 = f64::INFINITY;

/// The numbers of a state, NaN by one pattern.
pub fn numbers(states: &[Partial]) -> Vec<f64> {
    let of =
        |s: &Partial| [s.lse, s.target_dot, s.target_mass, s.logit_mean, s.max, s.argmax as f64];
    states.iter().flat_map(of).collect()
}

/// A task whose classes are cut into shards, some of them empty; each has a layout of its own.
pub struct Split {
    pub task: Task,
    pub shards: Vec<Shard>,
}

pub struct Shard {
    pub classes: Range<usize>,
    pub logits: Operand,
    /// Probabilities of the shard's classes.
    pub targets: Option<Operand>,
    pub grad: Operand,
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
    pub fn new(task: &Task, seed: u64) -> Split {
        let mut rng = Rng::new(seed);
        let count = 1 + rng.below(5);
        let cuts: Vec<usize> = (1..count).map(|_| rng.below(task.classes + 1)).collect();
        Split::at(task, cuts, &mut rng)
    }

    /// Shards that end at these classes.
    pub fn at(task: &Task, mut cuts: Vec<usize>, rng: &mut Rng) -> Split {
        cuts.extend([0, task.classes]);
        cuts.sort_unstable();
        let shard = |cut: &[usize]| {
            let classes = cut[0]..cut[1];
            // Classes of half of the shards stay side by side.
            let own = rng.one_in(2);
            let mut layout =
                |operand: &Operand| columns(operand, &classes, own.then_some(&mut *rng));
            Shard {
                logits: layout(&task.logits),
                targets: task
                    .targets
                    .as_ref()
                    .filter(|t| t.dtype.is_float() && task.target_classes.is_none())
                    .map(&mut layout),
                grad: layout(&task.grad),
                classes,
            }
        };
        Split { task: task.clone(), shards: cuts.windows(2).map(shard).collect() }
    }

    /// Calls with a builder that has the task's options, for a number of classes.
    fn call<T>(&self, classes: usize, how: &How, f: impl FnOnce(CrossEntropy) -> T) -> T {
        let factors = self.task.factors();
        f(self.task.builder(classes, &factors, how))
    }

    /// The targets that the call over a shard gets.
    fn targets<'a>(&'a self, shard: &'a Shard) -> Option<&'a Operand> {
        shard.targets.as_ref().or(self.task.targets.as_ref())
    }

    /// The states of a shard.
    pub fn partial(&self, shard: &Shard, how: &How) -> Vec<Partial> {
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

    pub fn partials(&self, how: &How) -> Vec<Vec<Partial>> {
        self.shards.iter().map(|shard| self.partial(shard, how)).collect()
    }

    /// Results of merged states.
    pub fn finish(&self, merged: &[Partial], how: &How) -> Answer {
        let task = &self.task;
        let (positions, has_targets) = (task.positions(), task.targets.is_some());
        let reduces = has_targets && task.reduction != Reduction::None;
        let mut row_losses = task.row_losses.place_poisoned();
        let mut entropy = task.entropy.place_poisoned();
        let (mut lse, mut argmax) = (vec![0.25; positions], vec![-9; positions]);
        let [mut loss, mut z_loss, mut normalizer, mut z_normalizer, mut entropy_bonus] = [7.0; 5];
        let (mut kept, mut correct) = (9, 9);
        let has_indices = task.has_indices();
        let results = Results {
            loss: reduces.then_some(&mut loss),
            row_losses: has_targets.then(|| row_losses.output()),
            lse: Some(&mut lse),
            z_loss: reduces.then_some(&mut z_loss),
            entropy_bonus: reduces.then_some(&mut entropy_bonus),
            normalizer: has_targets.then_some(&mut normalizer),
            z_normalizer: has_targets.then_some(&mut z_normalizer),
            kept_rows: has_targets.then_some(&mut kept),
            argmax: Some(&mut argmax),
            correct: has_indices.then_some(&mut correct),
            entropy: Some(entropy.output()),
            ..Results::default()
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
            entropy_bonus: reduces.then_some(entropy_bonus),
            normalizer: has_targets.then_some(normalizer),
            z_normalizer: has_targets.then_some(z_normalizer),
            kept_rows: has_targets.then_some(kept),
            correct: has_indices.then_some(correct),
            row_losses: if has_targets { row_losses.take("row losses") } else { Vec::new() },
            lse,
            entropy: entropy.take("entropy"),
            argmax,
            ..Answer::default()
        }
    }

    /// The gradient of all shards, put together.
    pub fn gradient(&self, merged: &[Partial], how: &How) -> Vec<f64> {
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
pub fn merge(mut all: Vec<Vec<Partial>>, rng: &mut Rng) -> Vec<Partial> {
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

/// Compares the states of a shard with the oracle's.
#[track_caller]
pub fn check_states(split: &Split, shard: &Shard, got: &[Partial]) {
    let task = &split.task;
    let wide = task.logits.dtype == Dtype::F64;
    let (unit, entropy) = if wide { (1e-14, 1e-13) } else { (2e-7, 1e-6) };
    // A capped logit of f32 may be rounded another way than the oracle's.
    let of_x = if task.softcap > 0.0 && !wide { 1.2e-7 } else { 1e-14 };
    // That may be by the least number there is.
    let least = if of_x > 1e-14 { f64::from(f32::from_bits(1)) } else { 0.0 };
    let want = reference::states(&task.case(), shard.classes.clone());
    assert_eq!(got.len(), want.len());
    for (i, (got, want)) in got.iter().zip(&want).enumerate() {
        let what = || format!("state {i} of {:?}: {got:?}, not {want:?}", shard.classes);
        let close = |got: f64, want: f64, bound: f64| {
            let near = (got - want).abs() <= bound;
            assert!(near || got == want || got.is_nan() && want.is_nan(), "{}", what());
        };
        assert_eq!(got.argmax, want.argmax, "{}", what());
        close(got.max, want.max, 0.0);
        close(got.target_mass, want.target_mass, 1e-13 * want.mass_scale);
        let size = want.reach.max(want.lse.abs());
        let moved = of_x * want.reach;
        close(got.lse, want.lse, unit * size + 2.4e-7 * (unit / 2e-7) + moved);
        if want.lse.is_nan() || want.lse == INF {
            continue; // The row is NaN, whatever else is known of it.
        }
        // A center of any logit is subtracted and added again.
        let dot = want.dot_scale + want.mass_scale * want.reach;
        close(got.target_dot, want.target_dot, of_x * dot + least * want.mass_scale + 1e-300);
        let mean = entropy * (1.0 + want.lse.abs()) + unit * size + moved;
        close(got.logit_mean, want.logit_mean, mean);
    }
}

/// The bits of everything that follows from a split.
pub fn bits(split: &Split, how: &How) -> (Vec<Vec<f64>>, Answer) {
    let partials = split.partials(how);
    let all = partials.iter().map(|states| numbers(states)).collect();
    let merged = merge(partials, &mut Rng::new(1));
    let mut answer = split.finish(&merged, how);
    if split.task.targets.is_some() {
        answer.grad = split.gradient(&merged, how);
    }
    (all, answer)
}

#[track_caller]
pub fn assert_same(a: &(Vec<Vec<f64>>, Answer), b: &(Vec<Vec<f64>>, Answer), what: &str) {
    for (a, b) in a.0.iter().zip(&b.0) {
        same_bits(a, b, &format!("{what}: states"));
    }
    a.1.assert_same(&b.1, what);
}

/// The states of a layer's shards, the results of the merged states, and the gradients. That of the hidden states is the
/// sum of the shards' parts.
pub struct LayerShards {
    pub states: Vec<Vec<Partial>>,
    pub answer: Answer,
    pub grads: [Vec<f64>; 3],
}

impl LayerShards {
    /// Asserts that both have the same bits.
    #[track_caller]
    pub fn assert_same(&self, other: &LayerShards, what: &str) {
        for (a, b) in self.states.iter().zip(&other.states) {
            same_bits(&numbers(a), &numbers(b), &format!("{what}: states"));
        }
        self.answer.assert_same_losses(&other.answer, what);
        for (a, b) in self.grads.iter().zip(&other.grads) {
            same_bits(a, b, &format!("{what}: a gradient"));
        }
    }

    /// Asserts that states, results and gradients are within the bounds of the whole.
    #[track_caller]
    pub fn check(&self, layer: &Layer, split: &Split) {
        for (shard, states) in split.shards.iter().zip(&self.states) {
            check_states(split, shard, states);
        }
        let judge = LayerJudge::of_shards(layer);
        judge.judge.losses(&self.answer);
        if layer.task.targets.is_some() {
            judge.gradients(&self.grads, Some(&self.answer.lse));
        }
    }
}

/// Calls over the shards of a layer. `split` is that of its task, whose logits these calls do not look at; `rng` chooses
/// the order of merging. The hidden states' gradients do not accumulate, since their parts are added up.
pub fn shards_of_layer(layer: &Layer, split: &Split, rng: &mut Rng, how: &How) -> LayerShards {
    assert!(!layer.accumulates[0]);
    let task = &layer.task;
    let factors = task.factors();
    let hidden = layer.hidden.place();
    let call = |shard: &Shard, f: &mut dyn FnMut(Linear<'_>, &Operand)| {
        let own = &shard.classes;
        let width = layer.features;
        let rows = own.start * width..own.end * width;
        let weight = Operand {
            sizes: [own.len(), width, 1],
            values: layer.weight.values[rows].to_vec(),
            ..layer.weight.clone()
        };
        let bias = layer.bias.as_ref().map(|bias| columns(bias, own, None).place());
        let mut linear = Linear::new(task.builder(own.len(), &factors, how), width)
            .workspace(layer.workspace)
            .accumulate_weight(layer.accumulates[1])
            .accumulate_bias(layer.accumulates[2]);
        if let Some(bias) = &bias {
            linear = linear.bias(bias.input());
        }
        f(linear, &weight);
        bias.iter().for_each(|bias| bias.assert_untouched("bias"));
    };
    let mut states = Vec::new();
    for shard in &split.shards {
        let mut partials = vec![Partial { lse: 7.5, argmax: 77, ..Partial::EMPTY }; task.rows];
        let (offset, total) = (shard.classes.start, task.classes);
        let targets = split.targets(shard).map(Operand::place);
        call(shard, &mut |linear, weight| {
            let weight = weight.place();
            let (h, w) = (hidden.input(), weight.input());
            let targets = targets.as_ref().expect("targets").input();
            linear
                .partial_forward(h, w, targets, offset, total, &mut partials)
                .expect("a valid shard");
            weight.assert_untouched("weight");
        });
        states.push(partials);
    }
    let merged = merge(states.clone(), rng);
    let answer = split.finish(&merged, how);
    let mut grads = [Vec::new(), Vec::new(), Vec::new()];
    if layer.grads[0].is_some() {
        grads[0] = vec![0.0; layer.hidden.values.len()];
    }
    for shard in &split.shards {
        let own = shard.classes.clone();
        let width = layer.features;
        let part = |grad: &Option<Operand>, from: Range<usize>, sizes: [usize; 3]| {
            let grad = grad.as_ref();
            let own = |grad: &Operand| Operand {
                sizes,
                values: grad.values[from].to_vec(),
                ..grad.clone()
            };
            grad.map(own)
        };
        let operands = [
            layer.grads[0].clone(),
            part(&layer.grads[1], own.start * width..own.end * width, [own.len(), width, 1]),
            part(&layer.grads[2], own.clone(), [1, own.len(), 1]),
        ];
        let mut placed = [0, 1, 2].map(|i| {
            let grad: Option<&Operand> = operands[i].as_ref();
            grad.map(|to| if layer.accumulates[i] { to.place() } else { to.place_poisoned() })
        });
        let targets = split.targets(shard).expect("targets").place();
        call(shard, &mut |linear, weight| {
            let weight = weight.place();
            let [hidden_to, weight_to, bias_to] = &mut placed;
            let to = LinearGrads {
                hidden: hidden_to.as_mut().map(|to| to.output()),
                weight: weight_to.as_mut().map(|to| to.output()),
                bias: bias_to.as_mut().map(|to| to.output()),
            };
            let (h, w, t) = (hidden.input(), weight.input(), targets.input());
            let (offset, total) = (own.start, task.classes);
            linear.partial_backward(h, w, t, offset, total, &merged, to).expect("a valid shard");
        });
        for (i, placed) in placed.iter().enumerate() {
            let Some(placed) = placed else { continue };
            let part = placed.take("a gradient of a shard");
            match i {
                0 => grads[0].iter_mut().zip(part).for_each(|(sum, part)| *sum += part),
                _ => grads[i].extend(part),
            }
        }
    }
    hidden.assert_untouched("hidden");
    LayerShards { states, answer, grads }
}
