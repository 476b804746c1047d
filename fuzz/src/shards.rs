//! Any split of a vocabulary, and any order of merging, against the oracle on the whole.

use crate::bytes::Bytes;
use crate::draw::{self, Limits};
use crate::source;
use arbitrary::{Arbitrary, Result, Unstructured};
use common::layer::Layer;
use common::operand::Dtype;
use common::random::Rng;
use common::split::{self, LayerShards, Split, check_states, merge, shards_of_layer};
use common::task::{Answer, Task, Wants};
use common::task_bounds::Judge;
use common::{How, isas};
use std::fmt;
use xent::Partial;

/// A problem or a layer, where its classes are cut, and the order of merging.
pub struct Input {
    whole: Whole,
    cuts: Vec<usize>,
    threads: u32,
    /// The seed of the shards' layouts and of the tree of merges.
    seed: u64,
}

enum Whole {
    Task(Box<Task>),
    Layer(Box<Layer>),
}

const LIMITS: Limits = Limits { usual: 400, many: 6000 };

/// Every result that a kind of targets has.
const EVERYTHING: Wants = Wants { top: false, ranks: false, kl: false, ..Wants::ALL };

impl<'a> Arbitrary<'a> for Input {
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        let data = u.bytes(u.len())?;
        let bytes = &mut Bytes::new(data);
        let is_layer = bytes.one_in(3);
        let threads = 1 + bytes.below(3) as u32;
        let seed = u64::from(bytes.byte());
        let cuts: Vec<usize> = (0..bytes.below(5)).map(|_| bytes.word()).collect();
        let mut whole = if is_layer {
            let mut layer = draw::layer(bytes);
            layer.accumulates[0] = false;
            // The parts of a gradient are added up, and rounded as little as there is a type for.
            if let Some(grad) = &mut layer.grads[0] {
                let is_wide = layer.hidden.dtype == Dtype::F64;
                grad.dtype = if is_wide { Dtype::F64 } else { Dtype::F32 };
            }
            layer.workspace = if bytes.flag() { 64 << 20 } else { 0 };
            layer.task.wants = EVERYTHING;
            Whole::Layer(Box::new(layer))
        } else {
            let task = draw::task(bytes, LIMITS);
            Whole::Task(Box::new(Task { log_probs: false, wants: EVERYTHING, ..task }))
        };
        let task = match &mut whole {
            Whole::Task(task) => task,
            Whole::Layer(layer) => &mut layer.task,
        };
        if task.target_classes.is_none() {
            // A shard does not have a teacher's logits of all classes.
            task.target_scale = 0.0;
        }
        let classes = task.classes;
        let cuts = cuts.into_iter().map(|cut| cut % (classes + 1)).collect();
        Ok(Input { whole, cuts, threads, seed })
    }
}

impl Whole {
    fn task(&self) -> &Task {
        match self {
            Whole::Task(task) => task,
            Whole::Layer(layer) => &layer.task,
        }
    }
}

impl fmt::Debug for Input {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Input { cuts, threads, seed, .. } = self;
        writeln!(f, "// cut at {cuts:?}, {threads} threads, seed {seed}")?;
        match &self.whole {
            Whole::Task(task) => source::task(f, task),
            Whole::Layer(layer) => source::layer(f, layer),
        }
    }
}

impl Input {
    /// States, results and gradients are within the bounds of the whole's, and all sets give the same bits.
    pub fn check(&self) {
        let mut rng = Rng::new(self.seed);
        let split = Split::at(self.whole.task(), self.cuts.clone(), &mut rng);
        match &self.whole {
            Whole::Task(task) => self.check_task(task, &split),
            Whole::Layer(layer) => self.check_layer(layer, &split),
        }
    }

    fn check_task(&self, task: &Task, split: &Split) {
        let judge = Judge::of_shards(task);
        let mut others: Option<(Vec<Vec<f64>>, Answer)> = None;
        for isa in isas() {
            let how = How { threads: self.threads, ..How::on(isa) };
            let partials = split.partials(&how);
            for (shard, states) in split.shards.iter().zip(&partials) {
                check_states(split, shard, states);
            }
            let states = partials.iter().map(|states| split::numbers(states)).collect();
            let merged: Vec<Partial> = merge(partials, &mut Rng::new(self.seed));
            let mut answer = split.finish(&merged, &how);
            judge.losses(&answer);
            if task.targets.is_some() {
                answer.grad = split.gradient(&merged, &how);
                let old = task.accumulate.then_some(task.grad.values.as_slice());
                judge.gradient(&answer.grad, task.grad.dtype, old, Some(&answer.lse));
            }
            let own = (states, answer);
            match &others {
                None => others = Some(own),
                Some(others) => split::assert_same(&own, others, isa.name()),
            }
        }
    }

    fn check_layer(&self, layer: &Layer, split: &Split) {
        if layer.task.targets.is_none() {
            return;
        }
        let mut others: Option<LayerShards> = None;
        for isa in isas() {
            let how = How { threads: self.threads, ..How::on(isa) };
            let own = shards_of_layer(layer, split, &mut Rng::new(self.seed), &how);
            own.check(layer, split);
            match &others {
                None => others = Some(own),
                Some(others) => own.assert_same(others, isa.name()),
            }
        }
    }
}
