//! Every call of a valid linear layer on every instruction set, against the oracle.

use crate::bytes::Bytes;
use crate::draw;
use crate::source;
use arbitrary::{Arbitrary, Result, Unstructured};
use common::layer::{Layer, LayerAnswer, LayerJudge, Pass};
use common::task::same_bits;
use common::{How, Reduction, isas};
use std::fmt;
use xent::{Error, Isa};

/// A layer, its number of threads, and a row to compute alone.
pub struct Input {
    layer: Layer,
    threads: u32,
    memory: Memory,
    row: usize,
}

/// How much memory the calls get.
#[derive(Clone, Copy, Debug)]
enum Memory {
    Usual,
    /// The logits of a chunk of rows are kept.
    Kept,
    /// So much more than the least.
    Little(usize),
}

impl<'a> Arbitrary<'a> for Input {
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        let data = u.bytes(u.len())?;
        let bytes = &mut Bytes::new(data);
        let threads = 1 + bytes.below(3) as u32;
        let memory = match bytes.below(5) {
            0 | 1 => Memory::Usual,
            2 | 3 => Memory::Kept,
            _ => Memory::Little(bytes.pick(&[0, 1000, 100_000, 300_000])),
        };
        let row = bytes.word();
        Ok(Input { layer: draw::layer(bytes), threads, memory, row })
    }
}

impl fmt::Debug for Input {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "// {} threads, {:?}, row {}", self.threads, self.memory, self.row)?;
        source::layer(f, &self.with_memory())
    }
}

/// The least workspace of every call, which their refusals name. It depends on the rows that take part, and on how
/// threads divide them.
fn least(layer: &Layer, threads: u32) -> usize {
    let lse = vec![0.0; layer.task.rows];
    let of = |pass: Pass<'_>, asks_lse: bool, threads: u32| {
        let too_little = Layer { workspace: 1, asks_lse, ..layer.clone() };
        match too_little.try_run(pass, &How { threads, ..How::on(Isa::best()) }) {
            Err(Error::Param(message)) => {
                let numbers = message.split_whitespace().filter_map(|word| word.parse().ok());
                numbers.max().expect("the message names the least")
            }
            other => panic!("a byte of workspace gives {:?}", other.err()),
        }
    };
    let all = [1, threads].map(|threads| {
        let fused = [true, false].map(|asks| of(Pass::Fused, asks, threads));
        let others = [of(Pass::Evaluate, true, threads), of(Pass::Backward(&lse), true, threads)];
        fused.into_iter().chain(others).fold(0, usize::max)
    });
    all[0].max(all[1])
}

impl Input {
    fn with_memory(&self) -> Layer {
        let workspace = match self.memory {
            Memory::Kept => 64 << 20,
            Memory::Little(more) if self.layer.task.targets.is_some() => {
                more + least(&self.layer, self.threads)
            }
            _ => 0,
        };
        Layer { workspace, ..self.layer.clone() }
    }

    /// Every result and gradient of a call is within its bound of the oracle's, the call writes nothing else, and all
    /// sets give the same bits. So do one thread, and a row alone.
    pub fn check(&self) {
        let layer = self.with_memory();
        let judge = LayerJudge::new(&layer);
        let mut others: Option<Vec<(&str, LayerAnswer)>> = None;
        for isa in isas() {
            let how = How { threads: self.threads, ..How::on(isa) };
            let answers = layer.run_all(&how);
            judge.check_answers(&answers);
            match &others {
                None => others = Some(answers),
                Some(others) => assert_all_same(&answers, others, isa.name()),
            }
        }
        let how = How { threads: 1, ..How::on(Isa::best()) };
        let answers = others.expect("a set");
        if self.threads > 1 {
            assert_all_same(&layer.run_all(&how), &answers, "one thread");
        }
        if layer.task.rows > 0 {
            row_alone(&layer, self.row % layer.task.rows, &answers, &how);
        }
    }
}

fn assert_all_same(a: &[(&str, LayerAnswer)], b: &[(&str, LayerAnswer)], what: &str) {
    assert_eq!(a.len(), b.len(), "{what}");
    for ((name, a), (_, b)) in a.iter().zip(b) {
        a.assert_same(b, &format!("{what}, {name}"));
    }
}

/// A row alone has the losses and the gradient of its hidden state that it has among others, whatever memory there is.
fn row_alone(layer: &Layer, row: usize, answers: &[(&str, LayerAnswer)], how: &How<'_>) {
    let whole = |call: &str| answers.iter().find(|(name, _)| *name == call).map(|(_, a)| a);
    let grads = [layer.grads[0].as_ref().map(|grad| grad.single(row, 0)), None, None];
    let alone = Layer {
        task: layer.task.single(row, 0),
        hidden: layer.hidden.single(row, 0),
        grads,
        workspace: 0,
        ..layer.clone()
    };
    let features = row * layer.features..(row + 1) * layer.features;
    for (call, own) in alone.run_all(how) {
        let Some(all) = whole(call) else { continue };
        let at = |values: &[f64]| values.get(row).map_or(Vec::new(), |x| vec![*x]);
        let (results, all_results) = (&own.results, &all.results);
        let what = |name: &str| format!("row {row} alone, {call}: {name}");
        same_bits(&results.lse, &at(&all_results.lse), &what("lse"));
        same_bits(&results.row_losses, &at(&all_results.row_losses), &what("row loss"));
        same_bits(&results.entropy, &at(&all_results.entropy), &what("entropy"));
        let top = row * layer.task.top_count()..(row + 1) * layer.task.top_count();
        let listed = all_results.top_log_probs.get(top.clone()).unwrap_or_default();
        same_bits(&results.top_log_probs, listed, &what("top log-probabilities"));
        assert_eq!(
            results.top_classes,
            all_results.top_classes.get(top).unwrap_or_default(),
            "{}",
            what("top classes")
        );
        let rank = all_results.target_ranks.get(row..=row).unwrap_or_default();
        assert_eq!(results.target_ranks, rank, "{}", what("target rank"));
        // The denominator of a mean depends on all rows.
        if layer.task.reduction != Reduction::Mean
            && layer.workspace == 0
            && layer.grads[0].is_some()
        {
            let all = all.grads[0].get(features.clone()).unwrap_or_default();
            same_bits(&own.grads[0], all, &what("gradient"));
        }
    }
}
