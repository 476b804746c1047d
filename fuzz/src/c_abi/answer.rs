//! Checks the answer of a call: it has the bits of the same problem through the Rust interface, and is
//! within its bounds of the oracle's unless operands share memory.

use super::Snapshot;
use super::abi::{self, View};
use super::call::{Arguments, Entry};
use super::draw::dtype_of;
use super::model::Operand;
use common::layer::{GRADIENTS, Layer, LayerJudge, Pass, outputs};
use common::operand::{self, Dtype, Placed};
use common::split::numbers;
use common::task::{Answer, Call, Task, Wants, same_bits};
use common::task_bounds::Judge;
use common::{How, Reduction, softmax};
use xent::half::{bf16, f16};
use xent::{Isa, Linear, LinearGrads, Partial};

/// An element of an operand of integers.
pub fn integer(memory: &Snapshot, operand: &Operand, at: usize) -> i64 {
    match dtype_of(operand.view.dtype) {
        Some(Dtype::I64) => i64::from_ne_bytes(memory.read(at)),
        Some(Dtype::I32) => i32::from_ne_bytes(memory.read(at)).into(),
        Some(Dtype::U32) => u32::from_ne_bytes(memory.read(at)).into(),
        Some(Dtype::U16) => u16::from_ne_bytes(memory.read(at)).into(),
        _ => u8::from_ne_bytes(memory.read(at)).into(),
    }
}

fn real(memory: &Snapshot, dtype: Dtype, at: usize) -> f64 {
    match dtype {
        Dtype::F32 => f32::from_ne_bytes(memory.read(at)).into(),
        Dtype::F64 => f64::from_ne_bytes(memory.read(at)),
        Dtype::Bf16 => bf16::from_ne_bytes(memory.read(at)).into(),
        Dtype::F16 => f16::from_ne_bytes(memory.read(at)).into(),
        Dtype::I64 => i64::from_ne_bytes(memory.read(at)) as f64,
        Dtype::I32 => i32::from_ne_bytes(memory.read(at)).into(),
        Dtype::U32 => u32::from_ne_bytes(memory.read(at)).into(),
        Dtype::U16 => u16::from_ne_bytes(memory.read(at)).into(),
        Dtype::U8 => u8::from_ne_bytes(memory.read(at)).into(),
    }
}

/// The operands of a call, read back from memory.
struct Reader<'a> {
    operands: Vec<Operand>,
    sizes: [usize; 3],
    before: &'a Snapshot,
    after: &'a Snapshot,
}

impl Reader<'_> {
    fn find(&self, name: &str, output: bool) -> Option<&Operand> {
        self.operands.iter().find(|o| o.name == name && o.output == output && o.is_present())
    }

    fn values(&self, operand: &Operand, memory: &Snapshot) -> Vec<f64> {
        let dtype = dtype_of(operand.view.dtype).expect("checked by the model");
        operand.places(self.sizes).into_iter().map(|at| real(memory, dtype, at)).collect()
    }

    /// An operand of the tests' type, with the contents from before the call.
    fn taken(&self, operand: &Operand) -> operand::Operand {
        let sizes = operand.sizes(self.sizes);
        let is_empty = sizes.contains(&0);
        operand::Operand {
            dtype: dtype_of(operand.view.dtype).expect("checked by the model"),
            sizes,
            values: self.values(operand, self.before),
            strides: if is_empty { [0; 3] } else { operand.view.strides },
            offset: 0,
        }
    }

    fn input(&self, name: &str) -> Option<operand::Operand> {
        self.find(name, false).map(|operand| self.taken(operand))
    }

    /// The elements that the call wrote.
    fn written(&self, name: &str) -> Option<Vec<f64>> {
        self.find(name, true).map(|operand| self.values(operand, self.after))
    }
}

pub fn check(arguments: &Arguments, is_unaliased: bool, before: &Snapshot, after: &Snapshot) {
    let (operands, sizes) = (arguments.operands(), arguments.sizes());
    let reader = Reader { operands, sizes, before, after };
    if arguments.is_softmax() {
        check_softmax(arguments, &reader, is_unaliased);
    } else if arguments.has_states() {
        check_states(arguments, &reader);
    } else if arguments.is_linear() {
        check_layer(arguments, &reader, is_unaliased);
    } else {
        check_loss(arguments, &reader, is_unaliased);
    }
}

/// What a call was to clear is 0: the bytes between the rows of its gradient.
pub fn check_padding(arguments: &Arguments, after: &Snapshot) {
    let sizes = arguments.sizes();
    for grad in arguments.operands().iter().filter(|operand| operand.fills_padding) {
        let elements = Operand { fills_padding: false, ..*grad }.touched(sizes);
        for pair in elements.windows(2) {
            for at in pair[0].end..pair[1].start {
                assert_eq!(after.read(at), [0u8], "{at:#x} lies between rows");
            }
        }
    }
}

fn how(arguments: &Arguments) -> How<'static> {
    // Work of this size stays on one thread.
    How { threads: arguments.problem.threads, ..How::on(Isa::best()) }
}

fn is_same(a: &View, b: &View, reader: &Reader, name: &str) -> bool {
    let steps = |view: &View| {
        let operand = reader.find(name, false).map(|o| Operand { view: *view, ..*o });
        operand.map(|o| o.steps(reader.sizes))
    };
    a.data == b.data && a.dtype == b.dtype && steps(a) == steps(b)
}

fn check_softmax(arguments: &Arguments, reader: &Reader, is_unaliased: bool) {
    let sizes = arguments.sizes();
    if sizes.contains(&0) {
        // The comparison of all memory checks that nothing was written.
        return;
    }
    let view = |view: Option<View>| view.unwrap_or(View::ABSENT);
    let (x, grad_y, y) = (view(arguments.x), view(arguments.grad_y), view(arguments.y));
    let backward = arguments.is_softmax_backward();
    let input = reader.input("x").expect("required");
    let to = reader.find("y", true).expect("required");
    let over = is_same(&x, &y, reader, "x");
    let log = matches!(arguments.entry, Entry::LogSoftmax | Entry::LogSoftmaxBackward);
    let call = match (backward, over) {
        (false, false) => softmax::Call::Forward,
        (false, true) => softmax::Call::ForwardInPlace,
        (true, true) => softmax::Call::BackwardOver,
        (true, false) if is_same(&grad_y, &y, reader, "grad_y") => softmax::Call::BackwardInPlace,
        (true, false) => softmax::Call::Backward,
    };
    let problem = softmax::Problem {
        sizes,
        log,
        grad_y: reader.input("grad_y").unwrap_or_else(|| input.clone()),
        y: input.clone(),
        x: input,
        to: reader.taken(to),
    };
    let got = reader.written("y").expect("required");
    if is_unaliased && !backward {
        problem.judge(call, &got);
    }
    // An operand that serves as both inputs counts as two.
    same_bits(&got, &problem.run(call, &how(arguments)), "by way of the Rust interface");
}

/// The state of a row at an address.
pub fn state(memory: &Snapshot, at: usize) -> Partial {
    let real = |i: usize| f64::from_ne_bytes(memory.read(at + 8 * i));
    Partial {
        lse: real(0),
        target_dot: real(1),
        target_mass: real(2),
        logit_mean: real(3),
        max: real(4),
        argmax: i64::from_ne_bytes(memory.read(at + 40)),
    }
}

/// The stored logits; without elements a gradient needs an operand of them nevertheless.
fn logits(arguments: &Arguments, reader: &Reader) -> operand::Operand {
    let of_targets = arguments.entry == Entry::BackwardTargets;
    reader.input("logits").unwrap_or_else(|| {
        let grad = reader.find("grad", true).filter(|_| !of_targets);
        let dtype = grad.and_then(|grad| dtype_of(grad.view.dtype));
        let [rows, classes, inner] = arguments.sizes();
        // Merged states have logits elsewhere, and any number of classes.
        let classes = if arguments.entry == Entry::PartialFinish { 0 } else { classes };
        operand::Operand::zeros(dtype.unwrap_or(Dtype::F32), [rows, classes, inner])
    })
}

/// The problem over these logits.
fn task(arguments: &Arguments, reader: &Reader, logits: operand::Operand) -> Task {
    let p = &arguments.problem;
    let [rows, classes, inner] = arguments.sizes();
    let by_row = [rows, 1, inner];
    let of_targets = arguments.entry == Entry::BackwardTargets;
    let result = |name: &str| match reader.find(name, true) {
        Some(operand) => reader.taken(operand),
        None => operand::Operand::zeros(Dtype::F64, by_row),
    };
    let grad = reader.find("grad", true);
    let gradient_of = |wanted: bool, dtype: Dtype| match grad {
        Some(grad) if wanted => reader.taken(grad),
        _ => operand::Operand::zeros(dtype, logits.sizes),
    };
    let asked = |name: &str| reader.find(name, true).is_some();
    let top_count = match arguments.wanted() {
        Some(wanted) if asked("top_classes") => wanted.top_count,
        _ => 0,
    };
    // Merged states have these elsewhere, and without targets nothing is scaled.
    let has_targets = reader.find("targets", false).is_some() || rows * inner == 0;
    let is_read = has_targets && arguments.entry != Entry::PartialFinish;
    let target_scale = if is_read { p.target_scale } else { 0.0 };
    let target_classes = reader.input("target_classes");
    let no_targets = (rows * inner == 0 && !of_targets).then(|| match &target_classes {
        // A call without rows needs no targets, and counts as one with class indices.
        None if target_scale == 0.0 => operand::Operand::zeros(Dtype::I64, by_row),
        None => operand::Operand::zeros(Dtype::F32, [rows, classes, inner]),
        Some(listed) => operand::Operand::zeros(Dtype::F32, listed.sizes),
    });
    Task {
        rows,
        classes,
        inner,
        targets: reader.input("targets").or(no_targets),
        class_weights: reader.input("class_weights"),
        row_weights: reader.input("row_weights"),
        row_mask: reader.input("row_mask"),
        grad_output: reader.input("grad_output"),
        ignore_index: p.ignore_index,
        label_smoothing: p.label_smoothing,
        z_loss: p.z_loss,
        entropy_bonus: p.entropy_bonus,
        softcap: p.softcap,
        logit_scale: p.logit_scale,
        log_probs: p.flags & abi::LOG_PROBS != 0,
        reduction: [Reduction::Mean, Reduction::Sum, Reduction::None][p.reduction as usize],
        normalizer: p.normalizer,
        z_normalizer: p.z_normalizer,
        empty_is_zero: p.flags & abi::EMPTY_IS_ZERO != 0,
        // An entry point without a gradient lacks this argument.
        grad_scale: if arguments.has_gradient() { arguments.grad_scale } else { 1.0 },
        accumulate: p.flags & abi::ACCUMULATE != 0,
        grad: gradient_of(!of_targets, logits.dtype),
        grad_targets: gradient_of(of_targets, Dtype::F64),
        row_losses: result("row_losses"),
        entropy: result("entropy"),
        top_log_probs: match reader.find("top_log_probs", true) {
            Some(operand) => reader.taken(operand),
            None => operand::Operand::zeros(Dtype::F64, [rows, top_count, inner]),
        },
        wants: Wants {
            entropy: asked("entropy"),
            argmax: asked("argmax"),
            correct: asked("correct"),
            kl: asked("kl"),
            top: asked("top_classes") || asked("top_log_probs"),
            ranks: asked("target_ranks"),
        },
        kl: result("kl"),
        target_classes,
        target_scale,
        logits,
    }
}

/// A hidden state, weight or bias of the layer, or one of zeros.
fn of_layer(arguments: &Arguments, reader: &Reader, name: &str) -> operand::Operand {
    let [rows, classes, _] = arguments.sizes();
    let sizes = [if name == "hidden" { rows } else { classes }, arguments.linear.features, 1];
    let dtype = dtype_of(arguments.linear.hidden.dtype).expect("checked by the model");
    reader.input(name).unwrap_or_else(|| operand::Operand::zeros(dtype, sizes))
}

/// Where the gradients of the layer go, with what they hold.
fn grads_of_layer(reader: &Reader) -> [Option<operand::Operand>; 3] {
    GRADIENTS.map(|name| {
        reader.find(&format!("grads.{name}"), true).map(|operand| reader.taken(operand))
    })
}

fn check_layer(arguments: &Arguments, reader: &Reader, is_unaliased: bool) {
    let (hidden, weight) =
        (of_layer(arguments, reader, "hidden"), of_layer(arguments, reader, "weight"));
    let bias = reader.input("bias");
    let features = arguments.linear.features;
    let logits = match features {
        // There are no rows.
        0 => operand::Operand::zeros(Dtype::F32, arguments.sizes()),
        _ => outputs(&hidden, &weight, bias.as_ref()),
    };
    let layer = Layer {
        task: task(arguments, reader, logits),
        features,
        hidden,
        weight,
        bias,
        grads: grads_of_layer(reader),
        accumulates: [1, 2, 4].map(|bit| arguments.linear.flags & bit != 0),
        workspace: arguments.linear.workspace,
        asks_lse: reader.find("lse", true).is_some(),
    };
    let lse = reader.input("lse").map_or(Vec::new(), |lse| lse.values);
    let pass = match arguments.entry {
        Entry::LinearForward if layer.task.targets.is_none() => Pass::Evaluate,
        Entry::LinearForward => Pass::Forward,
        Entry::LinearBackward => Pass::Backward(&lse),
        _ => Pass::Fused,
    };
    if layer.task.targets.is_none() && !matches!(pass, Pass::Evaluate) {
        return;
    }
    let want = layer.run(pass, &how(arguments));
    if is_unaliased && sums_are_finite(&layer.task) {
        let judge = LayerJudge::new(&layer);
        if !matches!(pass, Pass::Backward(_)) {
            judge.judge.losses(&want.results);
        }
        if matches!(pass, Pass::Fused) {
            judge.gradients(&want.grads, None);
        }
    }
    compare(reader, &want.results);
    compare_grads(reader, &want.grads);
}

fn compare_grads(reader: &Reader, want: &[Vec<f64>; 3]) {
    for (name, want) in GRADIENTS.iter().zip(want) {
        let name = format!("grads.{name}");
        if let Some(got) = reader.written(&name) {
            same_bits(&got, want, &name);
        }
    }
}

/// The calls over a shard, and over merged states. Their bits are those of the Rust interface, which the target
/// `shards` holds against the oracle: here the other shards are not known.
fn check_states(arguments: &Arguments, reader: &Reader) {
    let p = &arguments.problem;
    let [rows, classes, inner] = reader.sizes;
    let (offset, total) = (arguments.class_offset, arguments.total_classes);
    let find = |output: bool| {
        let name = if output { "partials" } else { "merged" };
        reader.find(name, output).map_or(0, |states| states.address())
    };
    let states = |memory: &Snapshot, output: bool| -> Vec<Partial> {
        let from = find(output);
        (0..rows * inner).map(|i| state(memory, from + 8 * abi::MEMBERS * i)).collect()
    };
    let merged = if arguments.writes_states() { vec![] } else { states(reader.before, false) };
    let task = task(arguments, reader, logits(arguments, reader));
    let factors = task.factors();
    let how = how(arguments);
    let call = task.builder(p.classes, &factors, &how);
    // Probabilities of no classes may be absent.
    let absent = (classes == 0 || rows * inner == 0).then(|| {
        let dtype = dtype_of(p.targets.dtype).expect("checked by the model");
        let dense = if dtype.is_float() { classes } else { 1 };
        let width = task.target_classes.as_ref().map_or(dense, |listed| listed.sizes[1]);
        operand::Operand::zeros(dtype, [rows, width, inner])
    });
    let targets = task.targets.clone();
    let complete = targets.clone().or(absent.filter(|o| o.dtype.is_float() || rows * inner == 0));
    let (targets, complete) =
        (targets.map(|targets| targets.place()), complete.map(|targets| targets.place()));
    let mut partials = vec![Partial::EMPTY; rows * inner];
    match arguments.entry {
        Entry::PartialForward => {
            let logits = task.logits.place();
            match &targets {
                Some(targets) => call.partial_forward(
                    logits.input(),
                    targets.input(),
                    offset,
                    total,
                    &mut partials,
                ),
                None => call.partial_evaluate(logits.input(), offset, total, &mut partials),
            }
            .expect("the C call was valid");
        }
        Entry::PartialFinish => {
            let unread = arguments.leaves_targets_unread();
            let some = operand::Operand::zeros(Dtype::F32, [1; 3]).place();
            let targets = if unread { Some(&some) } else { targets.as_ref() };
            let want = task.with_results(targets.is_some(), true, |results| match targets {
                Some(targets) => call.partial_finish(targets.input(), total, &merged, results),
                None => call.partial_finish_evaluate(total, &merged, results),
            });
            return compare(reader, &want.expect("the C call was valid"));
        }
        Entry::PartialBackward => {
            let Some(targets) = &complete else { return };
            let grad = match reader.find("grad", true) {
                Some(grad) => reader.taken(grad),
                None => task.grad.clone(),
            };
            let in_place =
                arguments.grad.is_some_and(|grad| is_same(&grad, &p.logits, reader, "logits"));
            let (mut logits, mut to) = (task.logits.place(), grad.place());
            let to = match in_place {
                true => {
                    let targets = targets.input();
                    let states = &merged;
                    call.partial_backward_in_place(logits.output(), targets, offset, total, states)
                        .map(|()| logits)
                }
                false => call
                    .partial_backward(
                        logits.input(),
                        targets.input(),
                        offset,
                        total,
                        &merged,
                        to.output(),
                    )
                    .map(|()| to),
            };
            let want = to.expect("the C call was valid").take("gradient");
            if let Some(got) = reader.written("grad") {
                same_bits(&got, &want, "grad");
            }
            return;
        }
        _ => {
            let Some(targets) = &complete else { return };
            let hidden = of_layer(arguments, reader, "hidden").place();
            let weight = of_layer(arguments, reader, "weight").place();
            let bias = reader.input("bias").map(|bias| bias.place());
            let adds = |bit: u32| arguments.linear.flags & bit != 0;
            let mut linear = Linear::new(call, arguments.linear.features)
                .workspace(arguments.linear.workspace)
                .accumulate_hidden(adds(1))
                .accumulate_weight(adds(2))
                .accumulate_bias(adds(4));
            if let Some(bias) = &bias {
                linear = linear.bias(bias.input());
            }
            let (h, w, t) = (hidden.input(), weight.input(), targets.input());
            if arguments.writes_states() {
                linear
                    .partial_forward(h, w, t, offset, total, &mut partials)
                    .expect("the C call was valid");
            } else {
                let mut placed = grads_of_layer(reader).map(|grad| grad.map(|grad| grad.place()));
                let [hidden_to, weight_to, bias_to] = &mut placed;
                let to = LinearGrads {
                    hidden: hidden_to.as_mut().map(Placed::output),
                    weight: weight_to.as_mut().map(Placed::output),
                    bias: bias_to.as_mut().map(Placed::output),
                };
                linear
                    .partial_backward(h, w, t, offset, total, &merged, to)
                    .expect("the C call was valid");
                let take = |placed: &Option<Placed>| {
                    placed.as_ref().map_or(Vec::new(), |placed| placed.take("a gradient"))
                };
                return compare_grads(reader, &placed.each_ref().map(take));
            }
        }
    }
    let got = states(reader.after, true);
    same_bits(&numbers(&got), &numbers(&partials), "states");
}

fn check_loss(arguments: &Arguments, reader: &Reader, is_unaliased: bool) {
    let p = &arguments.problem;
    let task = task(arguments, reader, logits(arguments, reader));
    let lse = reader.input("lse").map_or(Vec::new(), |lse| lse.values);
    let in_place = arguments.grad.is_some_and(|grad| is_same(&grad, &p.logits, reader, "logits"));
    let call = match (arguments.entry, in_place) {
        (Entry::Forward, _) if task.targets.is_none() => Call::Evaluate,
        (Entry::Forward, _) => Call::Forward,
        (Entry::ForwardBackward, false) => Call::Fused,
        (Entry::ForwardBackward, true) => Call::FusedInPlace,
        (Entry::Backward, false) => Call::Backward(&lse),
        (Entry::Backward, true) => Call::BackwardInPlace(&lse),
        _ => Call::Targets(&lse),
    };
    if task.targets.is_none() && !matches!(call, Call::Evaluate) {
        // Without targets: the comparison of all memory checks that nothing was written.
        return;
    }
    let want = task.run(call, &how(arguments));
    if is_unaliased {
        let judge = Judge::new(&task);
        let has_losses =
            !matches!(call, Call::Backward(_) | Call::BackwardInPlace(_) | Call::Targets(_));
        if has_losses && sums_are_finite(&task) {
            judge.losses(&want);
        }
        let old = task.accumulate.then_some(task.grad.values.as_slice());
        match call {
            Call::Fused => drop(judge.gradient(&want.grad, task.grad.dtype, old, None)),
            Call::FusedInPlace => {
                judge.gradient(&want.grad, task.logits.dtype, None, None);
            }
            _ => {}
        }
    }
    compare(reader, &want);
}

/// Whether every sum over classes is within f64. Beyond, docs/semantics.md promises nothing of a loss
/// with mass on all classes.
fn sums_are_finite(task: &Task) -> bool {
    let spreads = task.label_smoothing > 0.0 || task.has_probabilities();
    let far = |x: &f64| {
        let x = (x * task.logit_scale).abs();
        let x = if task.softcap > 0.0 { x.min(task.softcap) } else { x };
        x.is_finite() && x > 1e303
    };
    !(spreads && task.logits.dtype == Dtype::F64 && task.logits.values.iter().any(far))
}

/// Asserts that the results that the call asked for have the bits of this answer.
fn compare(reader: &Reader, want: &Answer) {
    let same = |name: &str, want: &[f64]| {
        if let Some(got) = reader.written(name) {
            same_bits(&got, want, name);
        }
    };
    same("lse", &want.lse);
    same("row_losses", &want.row_losses);
    same("entropy", &want.entropy);
    same("kl", &want.kl);
    let argmax: Vec<f64> = want.argmax.iter().map(|&class| class as f64).collect();
    same("argmax", &argmax);
    let reals = |classes: &[i64]| classes.iter().map(|&class| class as f64).collect::<Vec<f64>>();
    same("top_classes", &reals(&want.top_classes));
    same("top_log_probs", &want.top_log_probs);
    same("target_ranks", &reals(&want.target_ranks));
    same("grad", &want.grad);
    let reals = [
        ("loss", want.loss),
        ("z_loss", want.z_loss),
        ("entropy_bonus", want.entropy_bonus),
        ("normalizer", want.normalizer),
        ("z_normalizer", want.z_normalizer),
        ("kept_rows", want.kept_rows.map(|n| n as f64)),
        // `correct` without targets is allowed only without rows, and is 0.
        ("correct", Some(want.correct.unwrap_or(0) as f64)),
    ];
    for (name, want) in reals {
        same(name, want.as_slice());
    }
}
