//! The bits of a fixed set of problems equal those of the committed table `tests/golden/hashes.txt`.
//! There is one table for all instruction sets and for every later version. Whoever changes a bit on
//! purpose rewrites the table:
//!
//! ```sh
//! XENT_WRITE_HASHES=1 cargo test --test hashes golden
//! ```

#[path = "hashes/problems.rs"]
mod problems;

use common::operand::{Dtype, FLOATS, Operand};
use common::random::Rng;
use common::task::{Answer, Call, Task, assert_all_same, same_bits};
use common::{How, Reduction, is_sampled, isas, some};
use problems::{CHOICES, Choice, LAYOUTS, Layout, PAIRS, sizes, task};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::OnceLock;
use xent::{Isa, Pool, Softmax};

fn eight() -> &'static Pool {
    static POOL: OnceLock<Pool> = OnceLock::new();
    POOL.get_or_init(|| Pool::new(8).unwrap())
}

/// FNV-1a over bits; any NaN equals any other.
#[derive(Clone, Copy)]
struct Hash(u64);

impl Hash {
    const EMPTY: Hash = Hash(0xcbf2_9ce4_8422_2325);

    fn integer(&mut self, x: u64) {
        for byte in x.to_le_bytes() {
            self.0 = (self.0 ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }

    fn number(&mut self, x: f64) {
        self.integer(if x.is_nan() { f64::NAN.to_bits() & (u64::MAX >> 1) } else { x.to_bits() });
    }

    fn numbers(&mut self, all: &[f64]) {
        self.integer(all.len() as u64);
        all.iter().for_each(|&x| self.number(x));
    }

    fn answer(&mut self, answer: &Answer) {
        for scalar in [answer.loss, answer.z_loss, answer.normalizer, answer.z_normalizer] {
            self.number(scalar.unwrap_or(-1.0));
        }
        for count in [answer.kept_rows, answer.correct] {
            self.integer(count.unwrap_or(u64::MAX));
        }
        answer.argmax.iter().for_each(|&class| self.integer(class as u64));
        for all in [&answer.row_losses, &answer.lse, &answer.entropy, &answer.grad] {
            self.numbers(all);
        }
    }

    /// The hash folded to 32 bits, for a table that people can read.
    fn folded(self) -> u32 {
        (self.0 ^ (self.0 >> 32)) as u32
    }
}

/// A hash for each call of each group of problems.
type Table = BTreeMap<String, Vec<(&'static str, u32)>>;

/// The column of a call: a call in place shares it with the call out of place.
fn column(call: &str) -> &'static str {
    match call {
        "evaluate" | "forward" => "forward",
        "fused" | "fused in place" => "fused",
        "targets" => "targets",
        _ => "backward",
    }
}

/// The entries of a group: one hash for each kind of call.
fn group(tasks: impl Iterator<Item = Task>, how: &How) -> Vec<(&'static str, u32)> {
    let mut hashes: Vec<(&'static str, Hash)> = Vec::new();
    for task in tasks {
        for (call, answer) in task.run_all(how) {
            let call = column(call);
            let known = hashes.iter().position(|(name, _)| *name == call);
            let at = known.unwrap_or_else(|| {
                hashes.push((call, Hash::EMPTY));
                hashes.len() - 1
            });
            hashes[at].1.answer(&answer);
        }
    }
    hashes.into_iter().map(|(call, hash)| (call, hash.folded())).collect()
}

fn cross_entropy(isa: Isa, pair: (&'static str, Dtype, Dtype)) -> Table {
    let how = How { threads: 1, ..How::on(isa) };
    let mut table = Table::new();
    // Halves are computed in f32. In a sample each pair of half types takes a third of the groups, and a
    // different third from the pair before it.
    let each = if is_sampled() && pair.1.is_half() { 3 } else { 1 };
    let first = PAIRS.iter().position(|other| *other == pair).map_or(0, |at| at % each);
    let groups =
        LAYOUTS.iter().flat_map(|layout| CHOICES.iter().map(move |choice| (layout, choice)));
    for (&(layout_name, layout), &(choice_name, choice)) in groups.skip(first).step_by(each) {
        let all = sizes(layout).iter().enumerate();
        let tasks = all.map(|(turn, &sizes)| task(pair, layout, choice, sizes, turn));
        table.insert(format!("{} {layout_name} {choice_name}", pair.0), group(tasks, &how));
    }
    // Rows of more than one segment; in place their exponentials are stored in place.
    for (name, choice) in
        [("plain", Choice::Plain), ("smoothing", Choice::Smoothing), ("soft", Choice::Soft)]
    {
        let tasks = [70_001, 131_100].into_iter().enumerate();
        let tasks = tasks
            .map(|(turn, classes)| task(pair, Layout::Packed, choice, [1, classes, 1], 3 + turn));
        table.insert(format!("{} long {name}", pair.0), group(tasks, &how));
    }
    if !pair.1.is_half() {
        for (name, choice) in [("plain", Choice::Plain), ("softcap", Choice::Softcap)] {
            let tasks =
                [Layout::Packed, Layout::Transposed].map(|layout| spread(pair, layout, choice));
            table.insert(format!("{} spread {name}", pair.0), group(tasks.into_iter(), &how));
        }
    }
    table
}

/// Exponentials of arguments from the whole range: the gradient of a row whose largest logit is 0
/// consists of them. The arguments are spaced evenly by their bits, so that each binade has as many.
fn spread(pair: (&'static str, Dtype, Dtype), layout: Layout, choice: Choice) -> Task {
    let sizes @ [rows, classes, _] = [48, 1024, 1];
    let mut task = task(pair, layout, choice, sizes, 0);
    let n = (rows * classes) as u64;
    let wide = pair.1 == Dtype::F64;
    let range = if wide { 708f64.to_bits() } else { 90f32.to_bits().into() };
    for (i, x) in task.logits.values.iter_mut().enumerate() {
        let bits = range / n * i as u64;
        let size = if wide { f64::from_bits(bits) } else { f32::from_bits(bits as u32).into() };
        *x = if i % classes == 0 { 0.0 } else { -size };
    }
    if let Some(targets) = &mut task.targets {
        targets.values.fill(0.0);
    }
    task
}

/// Forward and backward, out of place and in place.
fn softmax_calls(dtype: Dtype, layout: Layout, log: bool, turn: usize, isa: Isa) -> [Vec<f64>; 4] {
    let sizes = sizes(layout)[turn];
    let [rows, classes, inner] = sizes;
    let pair = ("", dtype, dtype);
    let x = task(pair, layout, Choice::Edges, sizes, turn).logits;
    let grad_y = task(pair, layout, Choice::Rows, sizes, turn + 1).logits;
    let call = Softmax::new(rows, classes).inner(inner).isa(isa).threads(1);
    let mut out = Operand::zeros(dtype, sizes);
    out.strides = x.strides;

    let mut y = out.place_poisoned();
    let forward = if log { Softmax::log_softmax } else { Softmax::softmax };
    forward(&call, x.place().input(), y.output()).unwrap();
    let y = y.take("y");
    let mut over = x.place();
    let forward = if log { Softmax::log_softmax_in_place } else { Softmax::softmax_in_place };
    forward(&call, over.output()).unwrap();

    let stored = Operand { values: y.clone(), ..out.clone() };
    let mut grad = out.place_poisoned();
    let backward = if log { Softmax::log_softmax_backward } else { Softmax::softmax_backward };
    backward(&call, stored.place().input(), grad_y.place().input(), grad.output()).unwrap();
    let mut grad_over = grad_y.place();
    let backward = if log {
        Softmax::log_softmax_backward_in_place
    } else {
        Softmax::softmax_backward_in_place
    };
    backward(&call, stored.place().input(), grad_over.output()).unwrap();
    [y, over.take("in place"), grad.take("gradient"), grad_over.take("gradient in place")]
}

fn softmax(isa: Isa) -> Table {
    let mut table = Table::new();
    const NAMES: [&str; 4] = ["forward", "in place", "backward", "backward in place"];
    for dtype in FLOATS {
        for (layout_name, layout) in LAYOUTS {
            for (log, name) in [(false, "softmax"), (true, "log-softmax")] {
                let mut hashes = NAMES.map(|name| (name, Hash::EMPTY));
                for turn in 0..sizes(layout).len() {
                    let results = softmax_calls(dtype, layout, log, turn, isa);
                    for ((_, hash), result) in hashes.iter_mut().zip(&results) {
                        hash.numbers(result);
                    }
                }
                let dtype = format!("{dtype:?}").to_lowercase();
                let hashes = hashes.map(|(name, hash)| (name, hash.folded()));
                table.insert(format!("{dtype} {layout_name} {name}"), hashes.to_vec());
            }
        }
    }
    table
}

/// The part of the table that `XENT_HASHES` names: a pair of dtypes, or `softmax`. A caller that runs this
/// test many times (`cargo xtask mutants`) can run one part each time.
fn part() -> Option<String> {
    std::env::var("XENT_HASHES").ok()
}

/// All groups. Each dtype has a thread of its own, since an emulator is slow.
fn table(isa: Isa) -> Table {
    let part = part();
    let is_in = |name: &str| part.as_ref().is_none_or(|part| part == name);
    std::thread::scope(|scope| {
        let pairs = PAIRS.into_iter().filter(|pair| is_in(pair.0));
        let mut parts: Vec<_> =
            pairs.map(|pair| scope.spawn(move || cross_entropy(isa, pair))).collect();
        if is_in("softmax") {
            parts.push(scope.spawn(move || softmax(isa)));
        }
        parts.into_iter().flat_map(|part| part.join().expect("no problem fails")).collect()
    })
}

/// The text of a table: one line per group, `call=hash` separated by commas.
fn written(table: &Table) -> String {
    let mut text = String::from(
        "# Written by `XENT_WRITE_HASHES=1 cargo test --test hashes golden`: see tests/hashes.rs.\n",
    );
    for (name, hashes) in table {
        let hashes: Vec<String> =
            hashes.iter().map(|(call, hash)| format!("{call}={hash:08x}")).collect();
        writeln!(text, "{name}: {}", hashes.join(", ")).unwrap();
    }
    text
}

/// The names and contents of the lines that differ.
fn difference(got: &str, want: &str) -> String {
    let lines = |text: &str| -> BTreeMap<String, String> {
        let lines = text.lines().filter_map(|line| line.split_once(": "));
        lines.map(|(name, hashes)| (name.to_string(), hashes.to_string())).collect()
    };
    let (got, want) = (lines(got), lines(want));
    let mut text = String::new();
    for name in got.keys().chain(want.keys().filter(|name| !got.contains_key(*name))) {
        let none = String::from("nothing");
        let [a, b] = [&got, &want].map(|all| all.get(name).unwrap_or(&none));
        if a != b {
            write!(text, "\n{name}\n  gives    {a}\n  expected {b}").unwrap();
        }
    }
    text
}

/// Promise 2, over time and over processors: every set has these bits.
#[test]
fn golden() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/hashes.txt");
    let tables: Vec<(Isa, String)> =
        isas().into_iter().map(|isa| (isa, written(&table(isa)))).collect();
    let (first, good) = &tables[0];
    for (isa, text) in &tables {
        let difference = difference(text, good);
        assert!(text == good, "{} is not {}:{difference}", isa.name(), first.name());
    }
    if std::env::var_os("XENT_WRITE_HASHES").is_some() {
        std::fs::write(path, good).unwrap();
        println!("{path} is written");
    } else {
        let mut committed = std::fs::read_to_string(path).unwrap_or_default();
        if part().is_some() || is_sampled() {
            let names: Vec<&str> =
                good.lines().filter_map(|line| line.split(": ").next()).collect();
            assert!(names.len() > 1, "XENT_HASHES names no part of the table");
            let lines = committed.lines();
            let lines = lines
                .filter(|line| line.split(": ").next().is_some_and(|name| names.contains(&name)));
            committed = lines.map(|line| format!("{line}\n")).collect();
        }
        let difference = difference(good, &committed);
        assert!(*good == committed, "other bits than those that are committed:{difference}");
    }
    let names: Vec<&str> = tables.iter().map(|(isa, _)| isa.name()).collect();
    println!("{} groups on {}", good.lines().count() - 1, names.join(", "));
}

/// A change of one bit in any place changes the hash.
#[test]
fn hashes_see_every_bit() {
    let sample = Answer {
        loss: Some(1.5),
        row_losses: vec![0.5, 1.0],
        lse: vec![2.0],
        argmax: vec![3],
        grad: vec![0.25; 3],
        ..Answer::default()
    };
    let hash = |answer: &Answer| {
        let mut hash = Hash::EMPTY;
        hash.answer(answer);
        hash.folded()
    };
    let next = |x: f64| f64::from_bits(x.to_bits() + 1);
    let mut others = vec![sample.clone(); 7];
    others[0].loss = Some(next(1.5));
    others[1].row_losses[1] = next(1.0);
    others[2].lse[0] = next(2.0);
    others[3].argmax[0] = 4;
    others[4].grad[2] = -0.25;
    others[5].kept_rows = Some(0);
    others[6].lse.push(0.0);
    for (i, other) in others.iter().enumerate() {
        assert_ne!(hash(other), hash(&sample), "{i}");
    }
}

/// Gives every operand its own sequence of places in a cache line.
fn moved(task: &Task, byte: usize) -> Task {
    let size = |dtype: Dtype| match dtype {
        Dtype::F64 | Dtype::I64 => 8,
        Dtype::F32 | Dtype::I32 | Dtype::U32 => 4,
        Dtype::U8 => 1,
        _ => 2,
    };
    let mut task = task.clone();
    // Elements are aligned: a dtype of more bytes repeats its fewer places.
    let mut at = byte;
    let mut place = |operand: &mut Operand| {
        operand.offset = at % (64 / size(operand.dtype));
        at = at * 5 + 3;
    };
    place(&mut task.logits);
    place(&mut task.grad);
    place(&mut task.grad_targets);
    place(&mut task.row_losses);
    place(&mut task.entropy);
    for operand in [
        &mut task.targets,
        &mut task.class_weights,
        &mut task.row_weights,
        &mut task.row_mask,
        &mut task.grad_output,
    ]
    .into_iter()
    .flatten()
    {
        place(operand);
    }
    task
}

/// Every place in a cache line at which an operand can start, for every dtype and option.
#[test]
fn all_byte_offsets() {
    for pair in PAIRS {
        for (layout_name, layout) in LAYOUTS {
            let sizes = match layout {
                Layout::Packed | Layout::Crossed => [[3, 10, 1], [3, 83, 1]],
                _ => [[1, 10, 3], [1, 83, 3]],
            };
            for (turn, (choice_name, choice)) in CHOICES.into_iter().enumerate() {
                // Few and more classes, and the instruction sets, take turns.
                let task = task(pair, layout, choice, sizes[turn % 2], turn);
                for isa in isas() {
                    let good = task.run_all(&How::on(isa));
                    // A sample has one place, a different one each time.
                    let some = |byte: &usize| !is_sampled() || *byte == 1 + turn * 13 % 63;
                    for byte in (1..64).filter(some) {
                        let (name, isa_name) = (pair.0, isa.name());
                        let what =
                            format!("{name} {layout_name} {choice_name} {isa_name} at {byte}");
                        let all = moved(&task, byte).run_all(&How::on(isa));
                        assert_all_same(&all, &good, &what);
                    }
                }
            }
        }
    }
}

/// The rows of an operand in another order.
fn pick(answer: &Answer, order: &[usize], [rows, classes, inner]: [usize; 3]) -> [Vec<f64>; 4] {
    let by_row = |all: &[f64]| -> Vec<f64> {
        let row = |&row: &usize| all[row * inner..(row + 1) * inner].to_vec();
        if all.is_empty() { Vec::new() } else { order.iter().flat_map(row).collect() }
    };
    let size = classes * inner;
    let row = |&row: &usize| answer.grad[row * size..(row + 1) * size].to_vec();
    assert!(answer.grad.is_empty() || answer.grad.len() == rows * size);
    let grad =
        if answer.grad.is_empty() { Vec::new() } else { order.iter().flat_map(row).collect() };
    [by_row(&answer.row_losses), by_row(&answer.lse), by_row(&answer.entropy), grad]
}

fn shuffled(operand: &Operand, order: &[usize]) -> Operand {
    let [rows, classes, inner] = operand.sizes;
    let size = classes * inner;
    if rows == 1 {
        return operand.clone();
    }
    let row = |&row: &usize| operand.values[row * size..(row + 1) * size].to_vec();
    Operand { values: order.iter().flat_map(row).collect(), ..operand.clone() }
}

/// A batch in another order gives the same rows in that order, with every option.
#[test]
fn shuffled_batches() {
    let rng = &mut Rng::new(77);
    let mut place = 0;
    for pair in PAIRS {
        for (layout_name, layout) in LAYOUTS {
            let all = match layout {
                Layout::Packed | Layout::Crossed => [[70, 7, 1], [19, 100, 1], [5, 2100, 1]],
                _ => [[35, 7, 2], [9, 100, 3], [3, 2100, 2]],
            };
            for (turn, (choice_name, choice)) in CHOICES.into_iter().enumerate() {
                // A prime step, so that each pair and layout has different options.
                place += 1;
                if is_sampled() && place % 37 != 0 {
                    continue;
                }
                let sizes = all[turn % 3];
                // A fixed denominator: the sum of weights in another order may round differently.
                let mut task = task(pair, layout, choice, sizes, turn);
                (task.normalizer, task.z_normalizer) = (7.5, 3.25);
                let mut order: Vec<usize> = (0..sizes[0]).collect();
                for i in (1..order.len()).rev() {
                    order.swap(i, rng.below(i + 1));
                }
                let shuffle = |operand: &Operand| shuffled(operand, &order);
                let other = Task {
                    logits: shuffle(&task.logits),
                    targets: task.targets.as_ref().map(shuffle),
                    row_weights: task.row_weights.as_ref().map(shuffle),
                    row_mask: task.row_mask.as_ref().map(shuffle),
                    grad_output: task.grad_output.as_ref().map(shuffle),
                    grad: shuffle(&task.grad),
                    grad_targets: shuffle(&task.grad_targets),
                    ..task.clone()
                };
                let same: Vec<usize> = (0..sizes[0]).collect();
                for isa in isas() {
                    let how = How::on(isa);
                    let (all, others) = (task.run_all(&how), other.run_all(&how));
                    for ((call, answer), (_, other)) in all.iter().zip(&others) {
                        let name = pair.0;
                        let what = format!("{name} {layout_name} {choice_name} {call}");
                        let good = pick(answer, &order, sizes);
                        for (a, b) in pick(other, &same, sizes).iter().zip(&good) {
                            same_bits(a, b, &what);
                        }
                    }
                }
            }
        }
    }
}

/// 1, 2, 3 and 8 threads with every option, dtype and layout, in calls large enough for threads.
#[test]
fn thread_counts() {
    let isa = Isa::best();
    for pair in [PAIRS[0], PAIRS[1], PAIRS[3]] {
        for (layout_name, layout) in [LAYOUTS[0], LAYOUTS[1], LAYOUTS[2]] {
            for (turn, (choice_name, choice)) in CHOICES.into_iter().enumerate() {
                if is_sampled() && turn % 16 != 0 {
                    continue;
                }
                // Threads share rows; of packed logits also the segments of one row.
                let sizes = match (layout, turn % 3) {
                    (Layout::Packed, 0) => [1, 140_000, 1],
                    (Layout::Packed, 1) => [14_000, 10, 1],
                    (Layout::Packed, _) => [140, 1000, 1],
                    (_, 0) => [2, 100, 700],
                    (_, 1) => [40, 10, 350],
                    (_, _) => [7, 1000, 20],
                };
                let mut task = task(pair, layout, choice, sizes, turn);
                if task.reduction == Reduction::None && turn % 2 == 0 {
                    task.reduction = Reduction::Sum;
                    task.grad_output = None;
                }
                let pool = Some(eight());
                let forward = task.run(Call::Forward, &How { threads: 1, ..How::on(isa) });
                let calls = [Call::Forward, Call::Fused, Call::Backward(&forward.lse)];
                for call in calls {
                    let good = task.run(call, &How { threads: 1, ..How::on(isa) });
                    for threads in some([3, 2, 8], 3) {
                        let answer = task.run(call, &How { threads, pool, ..How::on(isa) });
                        let name = pair.0;
                        let what =
                            format!("{name} {layout_name} {choice_name} on {threads} threads");
                        answer.assert_same(&good, &what);
                    }
                }
            }
        }
    }
}
