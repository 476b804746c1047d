//! Every split of rows, and every number of threads, gives the same bits.

use crate::bytes::Bytes;
use crate::draw::{self, Limits};
use crate::source;
use arbitrary::{Arbitrary, Result, Unstructured};
use common::operand::Operand;
use common::random::Rng;
use common::task::{Answer, Call, Task, assert_all_same, same_bits};
use common::{How, Reduction, isas};
use std::fmt;
use std::sync::OnceLock;
use xent::{Isa, Pool};

/// A problem, and a way to take it apart.
pub struct Input {
    task: Task,
    isa: Isa,
    threads: u32,
    way: Way,
    /// Where the rows are cut.
    cuts: Vec<usize>,
    order: Vec<usize>,
    /// The seed of the parts' layouts.
    seed: u64,
}

/// The way to take the rows apart.
#[derive(Clone, Copy, Debug)]
enum Way {
    Parts,
    Shuffled,
    RowAlone,
    PositionAlone,
}

/// Calls use threads from 2·64k logits on, and rows of more than 64k classes have several segments.
const LARGE: usize = 200_000;

const LIMITS: Limits = Limits { usual: 500, many: 5000 };

impl<'a> Arbitrary<'a> for Input {
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        let data = u.bytes(u.len())?;
        let bytes = &mut Bytes::new(data);
        let large = bytes.one_in(32);
        let isas = isas();
        let isa = isas[isas.len() - 1 - bytes.below(isas.len())];
        let threads = bytes.pick(&[2, 3, 8, 0]);
        let way = bytes.pick(&[Way::Parts, Way::Shuffled, Way::RowAlone, Way::PositionAlone]);
        let seed = bytes.byte().into();
        let cuts: Vec<usize> = (0..1 + bytes.below(4)).map(|_| bytes.byte().into()).collect();
        let mut task = draw::task(bytes, LIMITS);
        if large {
            task = enlarged(&task);
        }
        let rows = task.rows;
        let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut % (rows + 1)).collect();
        cuts.sort_unstable();
        let mut order: Vec<usize> = (0..rows).collect();
        let rng = &mut Rng::new(seed);
        (1..rows).for_each(|i| order.swap(i, rng.below(i + 1)));
        Ok(Input { task, isa, threads, way, cuts, order, seed })
    }
}

impl fmt::Debug for Input {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Input { isa, threads, way, cuts, seed, .. } = self;
        let isa = isa.name();
        writeln!(f, "// {isa} on {threads} threads, {way:?}, cut at {cuts:?}, seed {seed}")?;
        source::task(f, &self.task)
    }
}

fn eight() -> &'static Pool {
    static POOL: OnceLock<Pool> = OnceLock::new();
    POOL.get_or_init(|| Pool::new(8).expect("a pool"))
}

/// The same kind of problem with enough rows for threads; a problem of a single row gets more classes
/// instead.
fn enlarged(task: &Task) -> Task {
    if task.rows == 0 {
        return task.clone();
    }
    let stretches = task.rows == 1 && task.inner == 1;
    let times = (LARGE / task.logits.values.len().max(1)).max(1);
    let rows: Vec<usize> = (0..task.rows * times).map(|row| row % task.rows).collect();
    if stretches && task.class_weights.is_none() && !task.has_probabilities() {
        let classes = task.classes * times;
        let stretched = |operand: &Operand| {
            let sizes = [1, classes, 1];
            Operand {
                sizes,
                ..Operand::packed(operand.dtype, sizes, &operand.values.repeat(times))
            }
        };
        return Task {
            classes,
            logits: stretched(&task.logits),
            grad: stretched(&task.grad),
            grad_targets: stretched(&task.grad_targets),
            ..task.clone()
        };
    }
    picked(task, &rows, &mut Rng::new(1))
}

/// The problem of those rows, in another layout; classes stay contiguous or not.
fn picked(task: &Task, rows: &[usize], rng: &mut Rng) -> Task {
    let mut pick = |operand: &Operand| {
        let [own, classes, inner] = operand.sizes;
        if own != task.rows || task.rows == 0 {
            return operand.clone();
        }
        let size = classes * inner;
        let values: Vec<f64> = rows
            .iter()
            .flat_map(|row| &operand.values[row * size..(row + 1) * size])
            .copied()
            .collect();
        let sizes = [rows.len(), classes, inner];
        let contiguous = operand.has_contiguous_classes();
        // Any layout of the right kind: relaid draws another one.
        let gap = if contiguous { 1 } else { 2 * inner.max(1) };
        let strides = if contiguous {
            [size as i64, 1, classes as i64]
        } else {
            [(gap * classes) as i64, gap as i64, 1]
        };
        let operand = Operand { sizes, values, strides, ..operand.clone() };
        if rows.is_empty() { operand } else { operand.relaid(rng) }
    };
    let logits = pick(&task.logits);
    let (grad, grad_targets) = (pick(&task.grad), pick(&task.grad_targets));
    let [row_losses, entropy, kl] = [&task.row_losses, &task.entropy, &task.kl].map(&mut pick);
    let top_log_probs = pick(&task.top_log_probs);
    let mut maybe = |operand: &Option<Operand>, by_row: bool| {
        operand.as_ref().map(|operand| if by_row { pick(operand) } else { operand.clone() })
    };
    Task {
        rows: rows.len(),
        logits,
        grad,
        grad_targets,
        row_losses,
        entropy,
        kl,
        target_classes: maybe(&task.target_classes, true),
        top_log_probs,
        targets: maybe(&task.targets, true),
        row_weights: maybe(&task.row_weights, true),
        row_mask: maybe(&task.row_mask, true),
        grad_output: maybe(&task.grad_output, task.reduction == Reduction::None),
        ..task.clone()
    }
}

impl Input {
    /// Threads change no bit. Rows in parts, in another order and alone have the bits that they have
    /// together.
    pub fn check(&self) {
        let how = How { threads: 1, ..How::on(self.isa) };
        let on_threads = How { threads: self.threads, pool: Some(eight()), ..how };
        if self.task.logits.values.len() > LARGE / 2 {
            // Long calls are made as few times as possible.
            let calls = [Call::Evaluate, Call::Forward, Call::Fused];
            let calls = if self.task.targets.is_some() { &calls[1..] } else { &calls[..1] };
            for call in calls {
                let alone = self.task.run(*call, &how);
                self.task.run(*call, &on_threads).assert_same(&alone, "on threads");
            }
            return;
        }
        let whole = self.task.run_all(&how);
        assert_all_same(&self.task.run_all(&on_threads), &whole, "on threads");
        if self.task.rows == 0 {
            return;
        }
        let task = self.with_its_normalizers(&whole);
        let whole = task.run_all(&how);
        let rng = &mut Rng::new(self.seed);
        let row = self.order[0];
        match self.way {
            Way::Parts => {
                let mut start = 0;
                for end in self.cuts.iter().copied().chain([task.rows]) {
                    let rows: Vec<usize> = (start..end).collect();
                    compare(&task, &whole, &rows, rng, &how, "a part");
                    start = end;
                }
            }
            Way::Shuffled => compare(&task, &whole, &self.order, rng, &how, "another order"),
            Way::RowAlone => compare(&task, &whole, &[row], rng, &how, "a row alone"),
            Way::PositionAlone => {
                let k = row % task.inner;
                let alone = task.single(row, k).run_all(&how);
                compare_at(&task, &whole, &alone, &[(row, k)], "one position alone");
            }
        }
    }

    /// Fixes the denominators of a mean, which depend on all rows.
    fn with_its_normalizers(&self, whole: &[(&str, Answer)]) -> Task {
        let mut task = self.task.clone();
        let Some((_, forward)) = whole.iter().find(|(call, _)| *call == "forward") else {
            return task;
        };
        if task.reduction == Reduction::Mean {
            let given = |x: Option<f64>| x.filter(|&x| x > 0.0 && x.is_finite()).unwrap_or(1.0);
            task.normalizer = given(forward.normalizer);
            task.z_normalizer = given(forward.z_normalizer);
        }
        task
    }
}

fn compare(
    task: &Task,
    whole: &[(&str, Answer)],
    rows: &[usize],
    rng: &mut Rng,
    how: &How<'_>,
    what: &str,
) {
    let part = picked(task, rows, rng);
    let answers = part.run_all(how);
    let at: Vec<(usize, usize)> =
        rows.iter().flat_map(|&row| (0..task.inner).map(move |k| (row, k))).collect();
    compare_at(task, whole, &answers, &at, what);
}

/// The rows of a part, in its order, against those of the whole.
fn compare_at(
    task: &Task,
    whole: &[(&str, Answer)],
    part: &[(&str, Answer)],
    at: &[(usize, usize)],
    what: &str,
) {
    let (classes, inner) = (task.classes, task.inner);
    for (call, part) in part {
        // A part may allow a call in place that the whole does not.
        let Some((_, whole)) = whole.iter().find(|(name, _)| name == call) else { continue };
        let rows = |values: &[f64]| -> Vec<f64> {
            let find = |&(row, k): &(usize, usize)| values[row * inner + k];
            if values.is_empty() { Vec::new() } else { at.iter().map(find).collect() }
        };
        let name = |result: &str| format!("{what}, {call}: {result}");
        same_bits(&part.lse, &rows(&whole.lse), &name("lse"));
        same_bits(&part.row_losses, &rows(&whole.row_losses), &name("row losses"));
        same_bits(&part.entropy, &rows(&whole.entropy), &name("entropy"));
        let argmax: Vec<f64> = whole.argmax.iter().map(|&class| class as f64).collect();
        let part_argmax: Vec<f64> = part.argmax.iter().map(|&class| class as f64).collect();
        same_bits(&part_argmax, &rows(&argmax), &name("argmax"));
        let reals = |of: &[i64]| of.iter().map(|&x| x as f64).collect::<Vec<f64>>();
        let ranks = rows(&reals(&whole.target_ranks));
        same_bits(&reals(&part.target_ranks), &ranks, &name("target ranks"));
        // Lists of classes, of rows in the order of the part.
        let top = task.top_count();
        let own_inner = if at.len() == 1 { 1 } else { inner };
        let listed = |values: &[f64]| -> Vec<f64> {
            let mut lists = vec![0.0; if values.is_empty() { 0 } else { at.len() * top }];
            for i in 0..lists.len() {
                let (own_row, j, own_k) =
                    (i / (top * own_inner), i / own_inner % top, i % own_inner);
                let (row, k) = at[own_row * own_inner + own_k];
                lists[i] = values[(row * top + j) * inner + k];
            }
            lists
        };
        let classes_of = listed(&reals(&whole.top_classes));
        same_bits(&reals(&part.top_classes), &classes_of, &name("top classes"));
        same_bits(&part.top_log_probs, &listed(&whole.top_log_probs), &name("top log-probs"));
        if whole.grad.is_empty() {
            continue;
        }
        // One position alone is a problem of one position.
        let positions = if at.len() == 1 { 1 } else { inner };
        for (i, &(row, k)) in at.iter().enumerate() {
            let entries = |values: &[f64], row: usize, k: usize, inner: usize| -> Vec<f64> {
                (0..classes).map(|class| values[(row * classes + class) * inner + k]).collect()
            };
            let (own_row, own_k) = (i / positions, i % positions);
            let want = entries(&whole.grad, row, k, inner);
            same_bits(&entries(&part.grad, own_row, own_k, positions), &want, &name("gradient"));
        }
    }
}
