//! Linear layers whose logits are never stored, against the oracle on logits in f64: losses and results, gradients,
//! ignored rows, options, bits, errors.

use common::layer::{GRADIENTS, Layer, LayerAnswer, LayerJudge, Pass, outputs};
use common::operand::{Dtype, FLOATS, Operand};
use common::random::Rng;
use common::reference::{Outcome, evaluate};
use common::split::{LayerShards, Split, shards_of_layer};
use common::{How, INF, Reduction, is_sampled, isas, some};
use xent::{CrossEntropy, Error, Input, Isa, Linear, LinearGrads, Pool};

/// A layer of packed operands whose logits are about 2, and the mean of its losses.
fn layer(dtype: Dtype, rows: usize, classes: usize, features: usize, rng: &mut Rng) -> Layer {
    let mut normals =
        |n: usize, scale: f64| (0..n).map(|_| scale * rng.normal()).collect::<Vec<f64>>();
    let hidden = normals(rows * features, 1.0);
    let weight = normals(classes * features, 2.0 / (features as f64).sqrt());
    let targets: Vec<f64> = (0..rows).map(|_| rng.below(classes) as f64).collect();
    let mut layer = Layer::new(
        Operand::packed(dtype, [rows, features, 1], &hidden),
        Operand::packed(dtype, [classes, features, 1], &weight),
        None,
        Operand::packed(Dtype::I64, [rows, 1, 1], &targets),
    );
    layer.task.reduction = Reduction::Mean;
    layer.grads[2] = Some(Operand::zeros(Dtype::F32, [1, classes, 1]));
    layer
}

/// Makes the logits anew after a change of operands.
fn remake(layer: &mut Layer) {
    layer.task.logits = outputs(&layer.hidden, &layer.weight, layer.bias.as_ref());
}

fn set_targets(layer: &mut Layer, targets: &[i64]) {
    let targets: Vec<f64> = targets.iter().map(|&y| y as f64).collect();
    layer.task.targets = Some(Operand::packed(Dtype::I64, [targets.len(), 1, 1], &targets));
}

/// A logit in f64, and the sum of the absolute values of its terms.
fn logit(layer: &Layer, row: usize, class: usize) -> (f64, f64) {
    let features = layer.features;
    let h = &layer.hidden.values[row * features..][..features];
    let w = &layer.weight.values[class * features..][..features];
    let bias = layer.bias.as_ref().map_or(0.0, |bias| bias.values[class]);
    let start = (bias, bias.abs());
    h.iter().zip(w).map(|(h, w)| h * w).fold(start, |(sum, size), x| (sum + x, size + x.abs()))
}

/// What the oracle says of logits in f64.
fn exact(layer: &Layer) -> Outcome {
    let mut case = layer.task.case();
    let classes = case.classes;
    case.logits =
        (0..case.rows * classes).map(|i| logit(layer, i / classes, i % classes).0).collect();
    evaluate(&case)
}

/// The gradients of hidden, weight and bias by the oracle.
fn gradients(layer: &Layer, outcome: &Outcome) -> [Vec<f64>; 3] {
    let (rows, classes, features) = (layer.task.rows, layer.task.classes, layer.features);
    let [mut hidden, mut weight, mut bias] =
        [rows * features, classes * features, classes].map(|n| vec![0.0; n]);
    for row in 0..rows {
        for (class, bias) in bias.iter_mut().enumerate() {
            let g = outcome.grad_logits[row * classes + class];
            *bias += g;
            for feature in 0..features {
                let (h, w) = (row * features + feature, class * features + feature);
                hidden[h] += g * layer.weight.values[w];
                weight[w] += g * layer.hidden.values[h];
            }
        }
    }
    [hidden, weight, bias]
}

fn how(isa: Isa, threads: u32) -> How<'static> {
    How { threads, ..How::on(isa) }
}

fn fused(layer: &Layer) -> LayerAnswer {
    layer.run(Pass::Fused, &how(Isa::best(), 0))
}

/// Checks all calls on all sets, and that they have the same bits, on any number of threads.
#[track_caller]
fn check_all(layer: &Layer, what: &str) {
    // The logits by which the calls are judged are those of f64, but for the roundings of their chains.
    let classes = layer.task.classes;
    let unit = if layer.hidden.dtype == Dtype::F64 { 2f64.powi(-53) } else { 2f64.powi(-24) };
    // Products of bf16 take subnormal numbers for zeros: factors, products and sums.
    let largest = |of: &Operand| of.values.iter().fold(1.0, |max: f64, x| max.max(x.abs()));
    let flushed = match layer.hidden.dtype {
        Dtype::Bf16 => 2f64.powi(-125) * largest(&layer.hidden).max(largest(&layer.weight)),
        _ => 0.0,
    };
    for (i, &x) in layer.task.logits.values.iter().enumerate() {
        let (want, size) = logit(layer, i / classes, i % classes);
        let steps = (layer.features + 2) as f64;
        let is_near = (x - want).abs() <= steps * (unit * size + flushed);
        assert!(
            is_near || x == want || !want.is_finite() || want.abs() > 3e38,
            "{what}: {x} {want}"
        );
    }
    let judge = LayerJudge::new(layer);
    let mut first: Option<Vec<(&str, LayerAnswer)>> = None;
    for isa in isas() {
        for threads in [0, 1] {
            let answers = layer.run_all(&how(isa, threads));
            let Some(first) = &first else {
                judge.check_answers(&answers);
                first = Some(answers);
                continue;
            };
            for ((call, answer), (_, first)) in answers.iter().zip(first) {
                answer.assert_same(
                    first,
                    &format!("{what}: {call} on {}, threads {threads}", isa.name()),
                );
            }
        }
    }
}

/// Shapes around the edges of blocks, panels and registers.
const SHAPES: [[usize; 3]; 9] = [
    [1, 1, 1],
    [1, 2, 3],
    [5, 7, 4],
    [7, 300, 33],
    [24, 256, 64],
    [33, 257, 65],
    [70, 513, 257],
    [600, 40, 16],
    [3, 1000, 300],
];

#[test]
fn shapes() {
    let mut rng = Rng::new(1);
    for dtype in FLOATS {
        for [rows, classes, features] in some(SHAPES, 4) {
            let mut layer = layer(dtype, rows, classes, features, &mut rng);
            check_all(&layer, &format!("{dtype:?} {rows}x{classes}x{features}"));
            layer.workspace = CHUNKS;
            check_all(&layer, &format!("{dtype:?} {rows}x{classes}x{features} in chunks"));
        }
    }
}

/// A workspace that keeps the logits of a chunk of rows.
const CHUNKS: usize = 64 << 20;

/// Draws every option.
fn with_options(mut layer: Layer, rng: &mut Rng) -> Layer {
    let (rows, classes, features) = (layer.task.rows, layer.task.classes, layer.features);
    let task = &mut layer.task;
    let float = |rng: &mut Rng| FLOATS[rng.below(4)];
    let drawn = |sizes: [usize; 3], rng: &mut Rng, draw: fn(&mut Rng) -> f64| {
        let dtype = float(rng);
        let values: Vec<f64> = (0..sizes.iter().product::<usize>()).map(|_| draw(rng)).collect();
        Operand::packed(dtype, sizes, &values)
    };
    if rng.one_in(2) {
        layer.bias = Some(drawn([1, classes, 1], rng, Rng::normal));
    }
    if rng.one_in(2) {
        let places = if rng.one_in(2) { 1 + rng.below(5) } else { classes };
        let mut targets = drawn([rows, places, 1], rng, |rng| rng.uniform(0.0, 2.0));
        let dtype = targets.dtype;
        if rng.one_in(2) {
            task.target_scale = 4.0;
        } else {
            targets.values.iter_mut().for_each(|t| *t = dtype.round(*t / places as f64));
        }
        if places != classes || classes < 6 {
            let mut class = || if rng.one_in(5) { -100.0 } else { rng.below(classes) as f64 };
            let listed: Vec<f64> = (0..rows * places).map(|_| class()).collect();
            task.target_classes = Some(Operand::packed(Dtype::I32, [rows, places, 1], &listed));
        }
        task.targets = Some(targets);
    } else if rng.one_in(2) {
        let targets = task.targets.as_mut().expect("targets");
        for target in targets.values.iter_mut().filter(|_| rng.one_in(3)) {
            *target = -100.0;
        }
    }
    if rng.one_in(3) {
        task.class_weights = Some(drawn([1, classes, 1], rng, |rng| rng.uniform(0.0, 2.0)));
    }
    if rng.one_in(3) {
        task.row_weights = Some(drawn([rows, 1, 1], rng, |rng| rng.uniform(0.0, 2.0)));
    }
    if rng.one_in(3) {
        let mask: Vec<f64> = (0..rows).map(|_| f64::from(u8::from(!rng.one_in(4)))).collect();
        task.row_mask = Some(Operand::packed(Dtype::U8, [rows, 1, 1], &mask));
    }
    task.label_smoothing = if rng.one_in(3) { rng.uniform(0.0, 1.0) } else { 0.0 };
    task.z_loss = if rng.one_in(3) { rng.uniform(0.0, 0.1) } else { 0.0 };
    task.entropy_bonus = if rng.one_in(3) { rng.uniform(-0.5, 0.5) } else { 0.0 };
    task.softcap = if rng.one_in(3) { rng.uniform(1.0, 5.0) } else { 0.0 };
    task.logit_scale = if rng.one_in(3) { rng.uniform(0.5, 2.0) } else { 1.0 };
    task.grad_scale = if rng.one_in(3) { 3.0 } else { 1.0 };
    task.reduction = [Reduction::Mean, Reduction::Sum, Reduction::None][rng.below(3)];
    if rng.one_in(2) {
        let count = if task.reduction == Reduction::None { rows } else { 1 };
        task.grad_output = Some(drawn([count, 1, 1], rng, |rng| rng.uniform(-1.0, 1.0)));
    }
    for (operand, count) in [(&mut layer.hidden, rows), (&mut layer.weight, classes)] {
        if rng.one_in(3) && count > 1 {
            operand.strides = [(features + 1 + rng.below(5)) as i64, 1, 0];
        }
    }
    // What the gradients hold before is a multiple of 1/8, which every dtype has.
    let own = layer.hidden.dtype;
    let strides = [layer.hidden.strides, layer.weight.strides, [0; 3]];
    let sizes = [[rows, features, 1], [classes, features, 1], [1, classes, 1]];
    for i in 0..3 {
        let dtype = if i == 2 || rng.one_in(2) { Dtype::F32 } else { own };
        let held: Vec<f64> =
            (0..sizes[i].iter().product()).map(|i| (i % 7) as f64 / 8.0 - 0.25).collect();
        let grad = Operand { strides: strides[i], ..Operand::packed(dtype, sizes[i], &held) };
        layer.grads[i] = Some(grad);
    }
    layer.accumulates = [rng.one_in(3), rng.one_in(3), rng.one_in(3)];
    layer.workspace = if rng.one_in(3) { CHUNKS } else { 0 };
    remake(&mut layer);
    layer
}

#[test]
fn options() {
    let mut rng = Rng::new(2);
    for round in 0..if is_sampled() { 8 } else { 60 } {
        let dtype = FLOATS[round % 4];
        let (rows, classes) = (1 + rng.below(60), 1 + rng.below(600));
        let features = 1 + rng.below(80);
        let layer = layer(dtype, rows, classes, features, &mut rng);
        check_all(
            &with_options(layer, &mut rng),
            &format!("round {round}, {dtype:?} {rows}x{classes}x{features}"),
        );
    }
}

/// Confident rows keep their relative accuracy: the row arithmetic is that of stored logits.
#[test]
fn confident_rows() {
    let (rows, classes, features) = (4, 700, 2);
    let mut layer = layer(Dtype::F32, rows, classes, features, &mut Rng::new(3));
    // The logits are exact: -64 for all classes but the target, whose logit is 0.
    layer.hidden = Operand::packed(Dtype::F32, [rows, features, 1], &[8.0, 0.0].repeat(rows));
    layer.weight.values = [-8.0, 1.0].repeat(classes);
    let targets = [0, 255, 256, 699];
    for target in targets {
        layer.weight.values[target as usize * features] = 0.0;
    }
    set_targets(&mut layer, &targets);
    let want = exact(&layer);
    for isa in isas() {
        let answer = layer.run(Pass::Fused, &how(isa, 0));
        for (&got, &want) in answer.results.row_losses.iter().zip(&want.row_losses) {
            assert!((got / want - 1.0).abs() < 1e-6, "{got} is not {want} on {}", isa.name());
        }
    }
}

/// What ignored rows hold affects no other row, no gradient, and their own gradient is 0.
#[test]
fn ignored_rows_affect_nothing() {
    let (rows, classes, features) = (40, 300, 20);
    let mut rng = Rng::new(4);
    for dtype in FLOATS {
        let mut layer = layer(dtype, rows, classes, features, &mut rng);
        let targets = layer.task.targets.as_mut().expect("targets");
        targets.values.iter_mut().step_by(3).for_each(|target| *target = -100.0);
        layer.workspace = if dtype.is_half() { CHUNKS } else { 0 };
        let clean = fused(&layer);
        for row in (0..rows).step_by(3) {
            layer.hidden.values[row * features..][..features].fill(f64::NAN);
        }
        let poisoned = fused(&layer);
        assert_eq!(clean.grads, poisoned.grads, "{dtype:?}");
        let (clean, results) = (&clean.results, &poisoned.results);
        assert_eq!(clean.loss, results.loss, "{dtype:?}");
        assert_eq!(clean.row_losses, results.row_losses, "{dtype:?}");
        let counts = |of: &common::task::Answer| (of.kept_rows, of.correct, of.normalizer);
        assert_eq!(counts(clean), counts(results), "{dtype:?}");
        for row in (0..rows).step_by(3) {
            assert!(poisoned.grads[0][row * features..][..features].iter().all(|&g| g == 0.0));
        }
    }
}

/// Infinities and NaN in the operands give what stored logits would give.
#[test]
fn extreme_operands() {
    let mut rng = Rng::new(5);
    for value in [INF, -INF, f64::NAN, 1e30] {
        let mut layer = layer(Dtype::F32, 6, 300, 8, &mut rng);
        layer.hidden.values[2 * 8] = value;
        // All logits of row 2 are ±inf or NaN, and that is what its results are.
        remake(&mut layer);
        check_all(&layer, &format!("{value}"));
    }
}

/// Products of bf16 take subnormal numbers for zeros on every set, in operands and in sums: the bits are the same, and
/// normal numbers have lost nothing.
#[test]
fn subnormal_numbers() {
    let mut rng = Rng::new(11);
    for exponent in [-63, -64, -66, -70, -130] {
        let mut layer = layer(Dtype::Bf16, 9, 300, 37, &mut rng);
        for x in layer.hidden.values.iter_mut().chain(&mut layer.weight.values) {
            *x = Dtype::Bf16.round(*x * 2f64.powi(exponent));
        }
        remake(&mut layer);
        check_all(&layer, &format!("2^{exponent}"));
        // 128 · 2^-126 is far more than what is lost.
        let got = fused(&layer).grads;
        let want = gradients(&layer, &exact(&layer));
        for (got, want) in got[..2].iter().flatten().zip(want[..2].iter().flatten()) {
            assert!(
                (got - want).abs() <= 2f64.powi(-119) + 0.02 * want.abs(),
                "{got} is not {want}"
            );
        }
    }
}

/// The bits do not depend on the pool, nor on how little a workspace is; too little is refused, and names the least.
#[test]
fn workspaces() {
    let mut layer = layer(Dtype::F32, 1500, 600, 40, &mut Rng::new(6));
    let want = fused(&layer);
    let pool = Pool::new(3).expect("a pool");
    let in_pool = layer.run(Pass::Fused, &How { pool: Some(&pool), ..how(Isa::best(), 0) });
    in_pool.assert_same(&want, "a pool of three");
    layer.workspace = 1000;
    let Err(Error::Param(message)) = layer.try_run(Pass::Fused, &how(Isa::best(), 0)) else {
        panic!("too little was accepted")
    };
    let least: usize = message
        .split_whitespace()
        .filter_map(|word| word.parse().ok())
        .find(|&n| n > 1000)
        .expect("the message names the least");
    layer.workspace = least;
    fused(&layer).assert_same(&want, "the least workspace");
    // Too little for a chunk, and enough for one that is not the whole.
    layer.workspace = least + 100_000;
    let alone = layer.run(Pass::Fused, &how(Isa::best(), 1));
    alone.assert_same(&want, "a workspace without a chunk");
    layer.workspace = least + 70 * 4 * 640;
    // Chunks of about 70 rows.
    let judge = LayerJudge::new(&layer);
    judge.check_answers(&[("fused", fused(&layer))]);
    layer.workspace = least - 1;
    assert!(layer.try_run(Pass::Fused, &how(Isa::best(), 1)).is_err());
}

#[test]
fn no_rows() {
    let none: [f32; 0] = [];
    let weight = [1f32; 6];
    let mut grad_weight = [9f32; 6];
    let grads = LinearGrads { weight: Some((&mut grad_weight).into()), ..LinearGrads::default() };
    let call = Linear::new(CrossEntropy::new(0, 3).empty_is_zero(true), 2);
    let no_targets: [i64; 0] = [];
    assert_eq!(call.forward_backward(&none, &weight, &no_targets, grads), Ok(0.0));
    assert_eq!(grad_weight, [0.0; 6]);
}

#[test]
fn errors() {
    let (hidden, weight, targets) = ([1f32; 4], [1f32; 6], [0i64, 2]);
    let call = || CrossEntropy::new(2, 3);
    let forward = |linear: Linear| linear.forward(&hidden, &weight, &targets);
    let refused = |result: Result<f64, Error>, want: &str| {
        let message = result.expect_err(want).to_string();
        assert!(message.contains(want), "{message:?} does not say {want:?}");
    };
    refused(forward(Linear::new(call().inner(2), 2)), "inner = 2");
    refused(forward(Linear::new(call(), 0)), "features = 0");
    refused(forward(Linear::new(call(), 3)), "hidden has 4 elements");
    refused(forward(Linear::new(call(), usize::MAX / 4)), "overflows");
    refused(forward(Linear::new(call().log_probs(true), 2)), "LOG_PROBS");
    refused(forward(Linear::new(call().accumulate(true), 2)), "ACCUMULATE");
    refused(forward(Linear::new(call().label_smoothing(2.0), 2)), "label_smoothing");
    let linear = Linear::new(call(), 2);
    refused(linear.forward(&hidden, &[1f64; 6], &targets), "weight.dtype is F64");
    refused(linear.forward(&[1i32; 4], &weight, &targets), "hidden.dtype is I32");
    let columns = Input::from(&hidden).strides([1, 2, 0]);
    refused(linear.forward(columns, &weight, &targets), "hidden.strides[1] = 2");
    refused(linear.forward(&hidden, &weight, &[0i64, 3]), "targets[1] = 3");
    let mut grad = [xent::half::bf16::ZERO; 4];
    let grads = LinearGrads { hidden: Some((&mut grad).into()), ..LinearGrads::default() };
    refused(
        linear.forward_backward(&hidden, &weight, &targets, grads),
        "grads.hidden.dtype is BF16",
    );
    let mut unwritten = [std::mem::MaybeUninit::<f32>::uninit(); 6];
    let grads = LinearGrads { weight: Some((&mut unwritten).into()), ..LinearGrads::default() };
    let adds = linear.accumulate_weight(true);
    refused(
        adds.forward_backward(&hidden, &weight, &targets, grads),
        "grads.weight is not initialised",
    );
}

/// Logits that rise from block to block, or are -inf in the first, move the shift of rows whose sums are multiplied
/// already.
#[test]
fn rising_logits() {
    let (rows, classes, features) = (9, 1200, 12);
    let mut rng = Rng::new(7);
    for dtype in [Dtype::F32, Dtype::F64, Dtype::Bf16] {
        for step in some([20.0, 45.0, 130.0, 3000.0, 1e5], 3) {
            for head in [0.0, -INF] {
                let mut layer = layer(dtype, rows, classes, features, &mut rng);
                let bias: Vec<f64> = (0..classes)
                    .map(|class| if class < 256 { head } else { step * (class / 256) as f64 })
                    .collect();
                layer.bias = Some(Operand::packed(Dtype::F32, [1, classes, 1], &bias));
                set_targets(&mut layer, &[0, 1, 2, 3, 4, 5, 6, 7, 8].map(|row| 1199 - 130 * row));
                remake(&mut layer);
                check_all(&layer, &format!("{dtype:?}, steps of {step}, {head} first"));
            }
        }
    }
}

/// The bounds of docs/performance.md at the sizes of a language model: the loss within 1e-7 of the exact loss of the
/// stored operands, gradients in f32 within 1e-6 and in bf16 within 2.5e-3 in relative L2.
#[test]
fn accuracy() {
    let (rows, classes, features) = if is_sampled() { (16, 600, 768) } else { (96, 3000, 768) };
    let mut rng = Rng::new(8);
    for (dtype, bound) in
        [(Dtype::F32, 1e-6), (Dtype::Bf16, 2.5e-3), (Dtype::F16, 3e-4), (Dtype::F64, 1e-14)]
    {
        let layer = layer(dtype, rows, classes, features, &mut rng);
        let outcome = exact(&layer);
        let want = gradients(&layer, &outcome);
        let answer = fused(&layer);
        let error = (answer.results.loss.expect("a loss") / outcome.loss - 1.0).abs();
        assert!(error <= 1e-7, "{dtype:?}: the loss is off by {error}");
        for ((name, got), want) in GRADIENTS.into_iter().zip(&answer.grads).zip(&want) {
            let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
            let error = norm(&mut got.iter().zip(want).map(|(a, b)| a - b))
                / norm(&mut want.iter().copied());
            // The bias's gradient is f32.
            let bound = if name == "bias" { 1e-6 } else { bound };
            assert!(error <= bound, "{dtype:?}: the gradient of {name} is off by {error}");
            println!("{dtype:?} {name}: {error:.2e}");
        }
    }
}

/// The classes of a layer as shards: the losses and gradients are those of the oracle, the hidden states' as the sum of
/// all parts.
#[test]
fn shards() {
    let mut rng = Rng::new(9);
    for round in 0..if is_sampled() { 4 } else { 24 } {
        let dtype = FLOATS[round % 4];
        let (rows, classes, features) = (1 + rng.below(40), 2 + rng.below(700), 1 + rng.below(40));
        let layer = layer(dtype, rows, classes, features, &mut rng);
        let mut layer = with_options(layer, &mut rng);
        if layer.task.target_classes.is_none() {
            // A shard does not have a teacher's logits of all classes.
            layer.task.target_scale = 0.0;
        }
        // The parts of a gradient are summed in f64 here.
        for grad in layer.grads.iter_mut().flatten() {
            grad.dtype = if dtype == Dtype::F64 { dtype } else { Dtype::F32 };
        }
        layer.accumulates[0] = false;
        let cuts = vec![rng.below(classes + 1), rng.below(classes + 1)];
        let split = Split::at(&layer.task, cuts, &mut rng);
        let mut first: Option<LayerShards> = None;
        for isa in isas() {
            let shards = shards_of_layer(&layer, &split, &mut Rng::new(1), &how(isa, 0));
            match &first {
                Some(first) => {
                    shards.assert_same(first, &format!("round {round} on {}", isa.name()));
                }
                None => {
                    shards.check(&layer, &split);
                    first = Some(shards);
                }
            }
        }
    }
}
