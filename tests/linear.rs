//! Linear layers whose logits are never stored, against the oracle on logits in f64: losses and results, gradients,
//! ignored rows, options, bits, errors.

use common::operand::{Dtype, FLOATS, Operand, Placed, PlacedFactors};
use common::random::Rng;
use common::reference::{Case, Outcome, Targets, evaluate};
use common::{INF, Reduction, is_sampled, isas, some};
use xent::{CrossEntropy, Error, Input, Isa, Linear, LinearGrads, Partial, Pool, Results};

/// A layer and a loss.
#[derive(Clone)]
struct Layer {
    features: usize,
    hidden: Operand,
    weight: Operand,
    bias: Option<Operand>,
    targets: Operand,
    class_weights: Option<Operand>,
    row_weights: Option<Operand>,
    row_mask: Option<Operand>,
    grad_output: Option<Operand>,
    /// The options, without logits.
    case: Case,
    /// The dtypes of the gradients of hidden and weight.
    grads: [Dtype; 2],
    /// What the gradients hold before, and that they are added to it.
    accumulates: [bool; 3],
    workspace: usize,
}

/// What a call gives.
#[derive(Clone, Debug, PartialEq)]
struct Answer {
    loss: f64,
    numbers: Vec<(&'static str, Vec<f64>)>,
}

#[derive(Clone, Copy, PartialEq)]
enum Pass {
    Forward,
    Backward,
    Fused,
}

impl Layer {
    fn new(dtype: Dtype, rows: usize, classes: usize, features: usize, rng: &mut Rng) -> Layer {
        let normals = |n: usize, rng: &mut Rng| (0..n).map(|_| rng.normal()).collect::<Vec<_>>();
        let scale = (features as f64).sqrt();
        let hidden = normals(rows * features, rng);
        let weight: Vec<f64> =
            normals(classes * features, rng).iter().map(|x| 2.0 * x / scale).collect();
        let targets: Vec<f64> = (0..rows).map(|_| rng.below(classes) as f64).collect();
        let mut case = Case::new(rows, classes, 1, Vec::new());
        case.targets = Targets::Indices(targets.iter().map(|&y| y as i64).collect());
        Layer {
            features,
            hidden: Operand::packed(dtype, [rows, features, 1], &hidden),
            weight: Operand::packed(dtype, [classes, features, 1], &weight),
            bias: None,
            targets: Operand::packed(Dtype::I64, [rows, 1, 1], &targets),
            class_weights: None,
            row_weights: None,
            row_mask: None,
            grad_output: None,
            case,
            grads: [dtype; 2],
            accumulates: [false; 3],
            workspace: 0,
        }
    }

    fn dtype(&self) -> Dtype {
        self.hidden.dtype
    }

    fn sizes(&self) -> [usize; 3] {
        [self.case.rows, self.case.classes, self.features]
    }

    fn set_targets(&mut self, targets: Vec<i64>) {
        let values: Vec<f64> = targets.iter().map(|&y| y as f64).collect();
        self.targets = Operand::packed(Dtype::I64, [targets.len(), 1, 1], &values);
        self.case.targets = Targets::Indices(targets);
    }

    fn reduction(&self) -> Reduction {
        match self.case.reduction {
            common::reference::Reduction::Mean => Reduction::Mean,
            common::reference::Reduction::Sum => Reduction::Sum,
            common::reference::Reduction::None => Reduction::None,
        }
    }

    /// What the oracle says of logits in f64.
    fn outcome(&self) -> Outcome {
        let [rows, classes, features] = self.sizes();
        let mut case = self.case.clone();
        case.logits = Vec::with_capacity(rows * classes);
        for row in 0..rows {
            for class in 0..classes {
                let h = &self.hidden.values[row * features..][..features];
                let w = &self.weight.values[class * features..][..features];
                let dot: f64 = h.iter().zip(w).map(|(h, w)| h * w).sum();
                case.logits.push(dot + self.bias.as_ref().map_or(0.0, |bias| bias.values[class]));
            }
        }
        evaluate(&case)
    }

    /// The gradients of hidden, weight and bias by the oracle, without what they held.
    fn gradients(&self, outcome: &Outcome) -> [Vec<f64>; 3] {
        self.gradients_of(outcome, |x| x)
    }

    /// By how much each element of the gradients may be off because products of bf16 round the gradient of the logits
    /// to bf16.
    fn roundings(&self, outcome: &Outcome) -> [Vec<f64>; 3] {
        let half_ulp = if self.dtype() == Dtype::Bf16 { 1.01 * 2f64.powi(-8) } else { 0.0 };
        let [mut hidden, mut weight, mut bias] = self.gradients_of(outcome, f64::abs);
        hidden.iter_mut().chain(&mut weight).for_each(|x| *x *= half_ulp);
        bias.fill(0.0);
        [hidden, weight, bias]
    }

    /// The gradients, with a function of each factor in place of the factor.
    fn gradients_of(&self, outcome: &Outcome, of: fn(f64) -> f64) -> [Vec<f64>; 3] {
        let [rows, classes, features] = self.sizes();
        let mut hidden = vec![0.0; rows * features];
        let mut weight = vec![0.0; classes * features];
        let mut bias = vec![0.0; classes];
        for row in 0..rows {
            for (class, bias) in bias.iter_mut().enumerate() {
                let g = outcome.grad_logits[row * classes + class];
                // An ignored row affects nothing, whatever it holds.
                if g == 0.0 {
                    continue;
                }
                let g = of(g);
                *bias += g;
                for feature in 0..features {
                    let (h, w) = (row * features + feature, class * features + feature);
                    hidden[h] += g * of(self.weight.values[w]);
                    weight[w] += g * of(self.hidden.values[h]);
                }
            }
        }
        [hidden, weight, bias]
    }

    fn factors(&self) -> PlacedFactors {
        PlacedFactors::new([
            &self.class_weights,
            &self.row_weights,
            &self.row_mask,
            &self.grad_output,
        ])
    }

    /// A builder that has the options, for a number of classes.
    fn call<'a>(&self, classes: usize, factors: &'a PlacedFactors) -> CrossEntropy<'a> {
        let case = &self.case;
        let call = CrossEntropy::new(self.sizes()[0], classes)
            .ignore_index(case.ignore_index)
            .label_smoothing(case.label_smoothing)
            .z_loss(case.z_loss)
            .softcap(case.softcap)
            .logit_scale(case.logit_scale)
            .grad_scale(case.grad_scale)
            .reduction(self.reduction());
        factors.of(call)
    }

    fn run(&self, pass: Pass, isa: Isa, threads: u32) -> Answer {
        self.try_run(pass, isa, threads, None).expect("a valid call")
    }

    fn try_run(
        &self,
        pass: Pass,
        isa: Isa,
        threads: u32,
        pool: Option<&Pool>,
    ) -> Result<Answer, Error> {
        let [rows, classes, features] = self.sizes();
        let place = |operand: &Option<Operand>| operand.as_ref().map(Operand::place);
        let (hidden, weight) = (self.hidden.place(), self.weight.place());
        let (bias, targets) = (place(&self.bias), self.targets.place());
        let factors = self.factors();
        let case = &self.case;
        let mut call = self.call(classes, &factors).isa(isa).threads(threads);
        if let Some(pool) = pool {
            call = call.pool(pool);
        }
        let mut linear = Linear::new(call, features)
            .workspace(self.workspace)
            .accumulate_hidden(self.accumulates[0])
            .accumulate_weight(self.accumulates[1])
            .accumulate_bias(self.accumulates[2]);
        if let Some(bias) = &bias {
            linear = linear.bias(bias.input());
        }
        let held = self.held();
        let mut out: Vec<Placed> = held
            .iter()
            .zip(self.accumulates)
            .map(|(held, adds)| if adds { held.place() } else { held.place_poisoned() })
            .collect();
        let [grad_hidden, grad_weight, grad_bias] = &mut out[..] else { unreachable!() };
        let grads = LinearGrads {
            hidden: Some(grad_hidden.output()),
            weight: Some(grad_weight.output()),
            bias: Some(grad_bias.output()),
        };
        let mut loss = f64::NAN;
        let mut correct = 0;
        let has_loss = case.reduction != common::reference::Reduction::None;
        let has_indices = matches!(case.targets, Targets::Indices(_));
        let mut row_losses = vec![0f64; rows];
        let (mut lse, mut entropy) = (vec![0f64; rows], vec![0f64; rows]);
        let mut argmax = vec![0i64; rows];
        let (mut kept, mut normalizer) = (0, 0.0);
        let results = Results {
            loss: has_loss.then_some(&mut loss),
            row_losses: Some((&mut row_losses).into()),
            lse: Some(&mut lse),
            entropy: Some((&mut entropy).into()),
            argmax: Some(&mut argmax),
            correct: has_indices.then_some(&mut correct),
            kept_rows: Some(&mut kept),
            normalizer: Some(&mut normalizer),
            ..Results::default()
        };
        let (h, w, t) = (hidden.input(), weight.input(), targets.input());
        match pass {
            Pass::Forward => linear.forward_with(h, w, t, results)?,
            Pass::Fused => linear.forward_backward_with(h, w, t, grads, results)?,
            Pass::Backward => {
                linear.forward_with(h, w, t, results)?;
                linear.backward(h, w, t, &lse, grads)?;
            }
        }
        for input in [&hidden, &weight, &targets] {
            input.assert_untouched("an input");
        }
        let mut numbers = vec![
            ("row losses", row_losses),
            ("lse", lse),
            ("entropy", entropy),
            ("argmax", argmax.iter().map(|&class| class as f64).collect()),
            ("counts", vec![kept as f64, correct as f64, normalizer]),
        ];
        if pass != Pass::Forward {
            for (name, out) in ["hidden", "weight", "bias"].into_iter().zip(&out) {
                numbers.push((name, out.take(name)));
            }
        }
        Ok(Answer { loss, numbers })
    }

    /// What the gradients hold before a call that accumulates.
    fn held(&self) -> [Operand; 3] {
        let [rows, classes, features] = self.sizes();
        let of = |dtype, sizes: [usize; 3], strides: [i64; 3]| {
            let values: Vec<f64> =
                (0..sizes.iter().product::<usize>()).map(|i| (i % 7) as f64 / 8.0 - 0.25).collect();
            Operand { strides, ..Operand::packed(dtype, sizes, &values) }
        };
        [
            of(self.grads[0], [rows, features, 1], self.hidden.strides),
            of(self.grads[1], [classes, features, 1], self.weight.strides),
            of(Dtype::F32, [1, classes, 1], [0; 3]),
        ]
    }

    /// Checks a call against the oracle.
    fn check(&self, pass: Pass, isa: Isa, what: &str) -> Answer {
        let what = format!("{what} on {}", isa.name());
        let answer = self.run(pass, isa, 0);
        let outcome = self.outcome();
        // Logits are sums of products of about 1, rounded in the lanes' type as far as they are from 0.
        let far =
            outcome.lse_scale.iter().filter(|x| x.is_finite()).fold(1.0, |a: f64, &x| a.max(x));
        let lanes = far * if self.dtype() == Dtype::F64 { 1e-14 } else { 4e-6 };
        let numbers =
            |name: &str| &answer.numbers.iter().find(|(n, _)| *n == name).expect("a result").1;
        let close = |got: f64, want: f64, bound: f64, name: &str| {
            assert!(
                got == want || (got - want).abs() <= bound || (got.is_nan() && want.is_nan()),
                "{what}: {name} is {got}, not {want}"
            );
        };
        if self.case.reduction != common::reference::Reduction::None {
            close(answer.loss, outcome.loss, lanes * (1.0 + outcome.loss.abs()), "loss");
        }
        for (name, want) in [
            ("row losses", &outcome.row_losses),
            ("lse", &outcome.lse),
            ("entropy", &outcome.entropy),
        ] {
            for (i, (&got, &want)) in numbers(name).iter().zip(want).enumerate() {
                close(got, want, 4.0 * lanes * (1.0 + want.abs()), &format!("{name}[{i}]"));
            }
        }
        let counts = numbers("counts");
        assert_eq!(counts[0], outcome.kept_rows as f64, "{what}: kept rows");
        close(counts[2], outcome.normalizer, 1e-12 * outcome.normalizer.abs(), "normalizer");
        if pass == Pass::Forward {
            return answer;
        }
        let held = self.held();
        let roundings = self.roundings(&outcome);
        for (i, (name, want)) in
            ["hidden", "weight", "bias"].into_iter().zip(self.gradients(&outcome)).enumerate()
        {
            let out = held[i].dtype;
            let mut error = 0.0;
            let mut size = 0.0;
            let mut rounding: f64 = 0.0;
            for (j, (&got, &gradient)) in numbers(name).iter().zip(&want).enumerate() {
                let want = gradient + if self.accumulates[i] { held[i].values[j] } else { 0.0 };
                if want.is_nan() || got.is_nan() {
                    assert!(
                        want.is_nan() && got.is_nan(),
                        "{what}: {name}[{j}] is {got}, not {want}"
                    );
                    continue;
                }
                let e = (got - want).abs() - 1.01 * out.half_ulp(want) - roundings[i][j];
                error += e.max(0.0).powi(2);
                size += gradient.powi(2);
                rounding = rounding.max(want.abs());
            }
            let bound = lanes * (1.0 + size.sqrt()) + 1e-6 * lanes * rounding;
            assert!(
                error.sqrt() <= bound,
                "{what}: {name} is off by {} of {}",
                error.sqrt(),
                size.sqrt()
            );
        }
        answer
    }

    /// Checks all passes on all sets, and that they have the same bits, on any number of threads.
    fn check_all(&self, what: &str) {
        for pass in [Pass::Forward, Pass::Backward, Pass::Fused] {
            let answers: Vec<(Isa, Answer)> =
                isas().into_iter().map(|isa| (isa, self.check(pass, isa, what))).collect();
            for (isa, answer) in &answers {
                let first = &answers[0];
                same(answer, &first.1, &format!("{what}: {} and {}", isa.name(), first.0.name()));
                same(&self.run(pass, *isa, 1), answer, &format!("{what}: threads"));
            }
        }
    }
}

/// Asserts the same bits.
fn same(a: &Answer, b: &Answer, what: &str) {
    assert_eq!(a.loss.to_bits(), b.loss.to_bits(), "{what}: loss {} and {}", a.loss, b.loss);
    for ((name, a), (_, b)) in a.numbers.iter().zip(&b.numbers) {
        for (i, (a, b)) in a.iter().zip(b).enumerate() {
            assert_eq!(a.to_bits(), b.to_bits(), "{what}: {name}[{i}] {a} and {b}");
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
            let mut layer = Layer::new(dtype, rows, classes, features, &mut rng);
            layer.check_all(&format!("{dtype:?} {rows}x{classes}x{features}"));
            layer.workspace = CHUNKS;
            layer.check_all(&format!("{dtype:?} {rows}x{classes}x{features} in chunks"));
        }
    }
}

/// A workspace that keeps the logits of a chunk of rows.
const CHUNKS: usize = 64 << 20;

/// Draws every option.
fn with_options(mut layer: Layer, rng: &mut Rng) -> Layer {
    let [rows, classes, features] = layer.sizes();
    let float = |rng: &mut Rng| FLOATS[rng.below(4)];
    if rng.one_in(2) {
        let bias: Vec<f64> = (0..classes).map(|_| rng.normal()).collect();
        layer.bias = Some(Operand::packed(float(rng), [1, classes, 1], &bias));
    }
    if rng.one_in(3) {
        let t: Vec<f64> =
            (0..rows * classes).map(|_| rng.uniform(0.0, 2.0 / classes as f64)).collect();
        layer.targets = Operand::packed(float(rng), [rows, classes, 1], &t);
        layer.case.targets = Targets::Probabilities(layer.targets.values.clone());
    } else {
        let ignored = rng.one_in(2);
        let targets = (0..rows)
            .map(|_| if ignored && rng.one_in(3) { -100 } else { rng.below(classes) as i64 });
        layer.set_targets(targets.collect());
    }
    if rng.one_in(3) {
        let w: Vec<f64> = (0..classes).map(|_| rng.uniform(0.0, 2.0)).collect();
        let w = Operand::packed(float(rng), [1, classes, 1], &w);
        layer.case.class_weights = Some(w.values.clone());
        layer.class_weights = Some(w);
    }
    if rng.one_in(3) {
        let r: Vec<f64> = (0..rows).map(|_| rng.uniform(0.0, 2.0)).collect();
        let r = Operand::packed(float(rng), [rows, 1, 1], &r);
        layer.case.row_weights = Some(r.values.clone());
        layer.row_weights = Some(r);
    }
    if rng.one_in(3) {
        let mask: Vec<f64> = (0..rows).map(|_| f64::from(u8::from(!rng.one_in(4)))).collect();
        layer.case.row_mask = Some(mask.iter().map(|&m| m != 0.0).collect());
        layer.row_mask = Some(Operand::packed(Dtype::U8, [rows, 1, 1], &mask));
    }
    let case = &mut layer.case;
    case.label_smoothing = if rng.one_in(3) { rng.uniform(0.0, 1.0) } else { 0.0 };
    case.z_loss = if rng.one_in(3) { rng.uniform(0.0, 0.1) } else { 0.0 };
    case.softcap = if rng.one_in(3) { rng.uniform(1.0, 5.0) } else { 0.0 };
    case.logit_scale = if rng.one_in(3) { rng.uniform(0.5, 2.0) } else { 1.0 };
    case.grad_scale = if rng.one_in(3) { 3.0 } else { 1.0 };
    case.reduction = match rng.below(3) {
        0 => common::reference::Reduction::Mean,
        1 => common::reference::Reduction::Sum,
        _ => common::reference::Reduction::None,
    };
    if rng.one_in(2) {
        let by_row = case.reduction == common::reference::Reduction::None;
        let count = if by_row { rows } else { 1 };
        let g: Vec<f64> = (0..count).map(|_| rng.uniform(-1.0, 1.0)).collect();
        let g = Operand::packed(float(rng), [count, 1, 1], &g);
        case.grad_output = g.values.clone();
        layer.grad_output = Some(g);
    }
    for (operand, count) in [(&mut layer.hidden, rows), (&mut layer.weight, classes)] {
        if rng.one_in(3) && count > 1 {
            operand.strides = [(features + 1 + rng.below(5)) as i64, 1, 0];
        }
    }
    for grad in &mut layer.grads {
        if rng.one_in(2) {
            *grad = Dtype::F32;
        }
    }
    layer.accumulates = [rng.one_in(3), rng.one_in(3), rng.one_in(3)];
    layer.workspace = if rng.one_in(3) { CHUNKS } else { 0 };
    layer
}

#[test]
fn options() {
    let mut rng = Rng::new(2);
    for round in 0..if is_sampled() { 8 } else { 60 } {
        let dtype = FLOATS[round % 4];
        let (rows, classes) = (1 + rng.below(60), 1 + rng.below(600));
        let features = 1 + rng.below(80);
        let layer = Layer::new(dtype, rows, classes, features, &mut rng);
        with_options(layer, &mut rng)
            .check_all(&format!("round {round}, {dtype:?} {rows}x{classes}x{features}"));
    }
}

/// Confident rows keep their relative accuracy: the row arithmetic is that of stored logits.
#[test]
fn confident_rows() {
    let (rows, classes, features) = (4, 700, 2);
    let mut rng = Rng::new(3);
    let mut layer = Layer::new(Dtype::F32, rows, classes, features, &mut rng);
    // The logits are exact: -64 for all classes but the target, whose logit is 0.
    layer.hidden = Operand::packed(Dtype::F32, [rows, features, 1], &[8.0, 0.0].repeat(rows));
    layer.weight.values = [-8.0, 1.0].repeat(classes);
    let targets = vec![0, 255, 256, 699];
    for &target in &targets {
        layer.weight.values[target as usize * features] = 0.0;
    }
    layer.set_targets(targets);
    let want = layer.outcome();
    for isa in isas() {
        let answer = layer.run(Pass::Fused, isa, 0);
        let (_, losses) = &answer.numbers[0];
        for (&got, &want) in losses.iter().zip(&want.row_losses) {
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
        let mut layer = Layer::new(dtype, rows, classes, features, &mut rng);
        let Targets::Indices(mut targets) = layer.case.targets.clone() else { unreachable!() };
        (0..rows).step_by(3).for_each(|row| targets[row] = -100);
        layer.set_targets(targets);
        layer.workspace = if dtype.is_half() { CHUNKS } else { 0 };
        let clean = layer.run(Pass::Fused, Isa::best(), 0);
        for row in (0..rows).step_by(3) {
            layer.hidden.values[row * features..][..features].fill(f64::NAN);
        }
        let poisoned = layer.run(Pass::Fused, Isa::best(), 0);
        assert_eq!(clean.loss, poisoned.loss);
        for ((name, a), (_, b)) in clean.numbers.iter().zip(&poisoned.numbers) {
            if ["row losses", "hidden", "weight", "bias", "counts"].contains(name) {
                assert_eq!(a, b, "{name}, {dtype:?}");
            }
        }
        let (_, hidden) = &poisoned.numbers[5];
        for row in (0..rows).step_by(3) {
            assert!(hidden[row * features..][..features].iter().all(|&g| g == 0.0));
        }
    }
}

/// Infinities and NaN in the operands give what stored logits would give.
#[test]
fn extreme_operands() {
    let mut rng = Rng::new(5);
    for value in [INF, -INF, f64::NAN, 1e30] {
        let mut layer = Layer::new(Dtype::F32, 6, 300, 8, &mut rng);
        layer.hidden.values[2 * 8] = value;
        // All logits of row 2 are ±inf or NaN, and that is what its results are.
        let answer = layer.run(Pass::Fused, Isa::best(), 0);
        let outcome = layer.outcome();
        for (&got, &want) in answer.numbers[0].1.iter().zip(&outcome.row_losses) {
            assert!(
                (got.is_nan() && want.is_nan()) || (got - want).abs() <= 1e-5 * want.abs().max(1.0),
                "{got} is not {want} with {value}"
            );
        }
    }
}

/// Products of bf16 take subnormal numbers for zeros on every set, in operands and in sums: the bits are the same, and
/// normal numbers have lost nothing.
#[test]
fn subnormal_numbers() {
    let mut rng = Rng::new(11);
    for exponent in [-63, -64, -66, -70, -130] {
        let mut layer = Layer::new(Dtype::Bf16, 9, 300, 37, &mut rng);
        for x in layer.hidden.values.iter_mut().chain(&mut layer.weight.values) {
            *x = Dtype::Bf16.round(*x * 2f64.powi(exponent));
        }
        let outcome = layer.outcome();
        let want = layer.gradients(&outcome);
        let answers: Vec<Answer> =
            isas().into_iter().map(|isa| layer.run(Pass::Fused, isa, 0)).collect();
        for answer in &answers {
            same(answer, &answers[0], &format!("2^{exponent}"));
        }
        // 128 · 2^-126 is far more than what is lost.
        for (name, want) in ["hidden", "weight"].into_iter().zip(&want) {
            let got = &answers[0].numbers.iter().find(|(n, _)| *n == name).expect("a gradient").1;
            for (got, want) in got.iter().zip(want) {
                assert!(
                    (got - want).abs() <= 2f64.powi(-119) + 0.02 * want.abs(),
                    "{got} is not {want}"
                );
            }
        }
    }
}

/// The bits do not depend on the pool, nor on how little a workspace is; too little is refused, and names the least.
#[test]
fn workspaces() {
    let mut rng = Rng::new(6);
    let mut layer = Layer::new(Dtype::F32, 1500, 600, 40, &mut rng);
    let want = layer.run(Pass::Fused, Isa::best(), 0);
    let pool = Pool::new(3).expect("a pool");
    let in_pool = layer.try_run(Pass::Fused, Isa::best(), 0, Some(&pool)).expect("a valid call");
    same(&in_pool, &want, "a pool of three");
    layer.workspace = 1000;
    let Err(Error::Param(message)) = layer.try_run(Pass::Fused, Isa::best(), 0, None) else {
        panic!("too little was accepted")
    };
    let least: usize = message
        .split_whitespace()
        .filter_map(|word| word.parse().ok())
        .find(|&n| n > 1000)
        .expect("the message names the least");
    layer.workspace = least;
    same(&layer.run(Pass::Fused, Isa::best(), 0), &want, "the least workspace");
    // Too little for a chunk, and enough for one that is not the whole.
    layer.workspace = least + 100_000;
    same(&layer.run(Pass::Fused, Isa::best(), 1), &want, "a workspace without a chunk");
    layer.workspace = least + 70 * 4 * 640;
    layer.check(Pass::Fused, Isa::best(), "chunks of about 70 rows");
    layer.workspace = least - 1;
    assert!(layer.try_run(Pass::Fused, Isa::best(), 1, None).is_err());
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
                let mut layer = Layer::new(dtype, rows, classes, features, &mut rng);
                let bias: Vec<f64> = (0..classes)
                    .map(|class| if class < 256 { head } else { step * (class / 256) as f64 })
                    .collect();
                layer.bias = Some(Operand::packed(Dtype::F32, [1, classes, 1], &bias));
                layer.set_targets((0..rows).map(|row| (1199 - 130 * row) as i64).collect());
                layer.check_all(&format!("{dtype:?}, steps of {step}, {head} first"));
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
        let layer = Layer::new(dtype, rows, classes, features, &mut rng);
        let outcome = layer.outcome();
        let want = layer.gradients(&outcome);
        let answer = layer.run(Pass::Fused, Isa::best(), 0);
        let error = (answer.loss / outcome.loss - 1.0).abs();
        assert!(error <= 1e-7, "{dtype:?}: the loss is off by {error}");
        for (name, want) in ["hidden", "weight", "bias"].into_iter().zip(&want) {
            let got = &answer.numbers.iter().find(|(n, _)| *n == name).expect("a gradient").1;
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
        let layer = Layer::new(dtype, rows, classes, features, &mut rng);
        let mut layer = with_options(layer, &mut rng);
        // The parts of a gradient are summed in f64 here.
        layer.grads = [if dtype == Dtype::F64 { dtype } else { Dtype::F32 }; 2];
        layer.accumulates = [false; 3];
        layer.hidden.strides = [0; 3];
        layer.weight.strides = [0; 3];
        let cuts = [0, rng.below(classes + 1), rng.below(classes + 1), classes];
        let mut cuts = cuts.to_vec();
        cuts.sort_unstable();
        for isa in isas() {
            layer.check_shards(&cuts, isa, &format!("round {round}, {dtype:?} cut at {cuts:?}"));
        }
    }
}

impl Layer {
    /// Some classes of an operand whose axis `axis` has the classes.
    fn own(operand: &Operand, axis: usize, classes: &std::ops::Range<usize>) -> Operand {
        let [rows, width, _] = operand.sizes;
        let values: Vec<f64> = match axis {
            0 => operand.values[classes.start * width..classes.end * width].to_vec(),
            _ => (0..rows)
                .flat_map(|row| &operand.values[row * width..][classes.clone()])
                .copied()
                .collect(),
        };
        let sizes = if axis == 0 { [classes.len(), width, 1] } else { [rows, classes.len(), 1] };
        Operand { strides: [0; 3], ..Operand::packed(operand.dtype, sizes, &values) }
    }

    fn check_shards(&self, cuts: &[usize], isa: Isa, what: &str) {
        let what = &format!("{what} on {}", isa.name());
        let [rows, classes, features] = self.sizes();
        let (hidden, case) = (self.hidden.place(), &self.case);
        let factors = self.factors();
        let has_probabilities = matches!(case.targets, Targets::Probabilities(_));
        let mut merged = vec![Partial::EMPTY; rows];
        let mut parts = vec![0.0; rows * features];
        let mut grads: [Vec<f64>; 2] = [Vec::new(), Vec::new()];
        let whole = self.targets.place();
        for backward in [false, true] {
            for cut in cuts.windows(2) {
                let own = cut[0]..cut[1];
                let call = self.call(own.len(), &factors).isa(isa);
                let weight = Layer::own(&self.weight, 0, &own).place();
                let bias = self.bias.as_ref().map(|bias| Layer::own(bias, 1, &own).place());
                let targets = match has_probabilities {
                    true => Layer::own(&self.targets, 1, &own).place(),
                    false => self.targets.place(),
                };
                let mut linear = Linear::new(call, features);
                if let Some(bias) = &bias {
                    linear = linear.bias(bias.input());
                }
                let (h, w, t) = (hidden.input(), weight.input(), targets.input());
                if !backward {
                    let mut partials = vec![Partial::EMPTY; rows];
                    linear.partial_forward(h, w, t, own.start, classes, &mut partials).expect(what);
                    Partial::merge_all(&mut merged, &partials);
                    continue;
                }
                let of = |sizes| Operand::zeros(self.grads[0], sizes).place_poisoned();
                let (mut dh, mut dw) = (of([rows, features, 1]), of([own.len(), features, 1]));
                let mut db = Operand::zeros(Dtype::F64, [1, own.len(), 1]).place_poisoned();
                let to = LinearGrads {
                    hidden: Some(dh.output()),
                    weight: Some(dw.output()),
                    bias: Some(db.output()),
                };
                linear.partial_backward(h, w, t, own.start, classes, &merged, to).expect(what);
                let part = dh.take(what);
                parts.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
                grads[0].extend(dw.take(what));
                grads[1].extend(db.take(what));
            }
        }
        let outcome = self.outcome();
        let bound = if self.dtype() == Dtype::F64 { 1e-13 } else { 2e-5 };
        let mut row_losses = vec![0f64; rows];
        let results = Results { row_losses: Some((&mut row_losses).into()), ..Results::default() };
        let mut call = CrossEntropy::new(rows, classes)
            .ignore_index(case.ignore_index)
            .z_loss(case.z_loss)
            .label_smoothing(case.label_smoothing)
            .reduction(Reduction::None);
        if let Some(weights) = &factors.row_weights {
            call = call.row_weights(weights.input());
        }
        if let Some(mask) = &factors.row_mask {
            call = call.row_mask(mask.input());
        }
        call.partial_finish(whole.input(), classes, &merged, results).expect(what);
        for (got, want) in row_losses.iter().zip(&outcome.row_losses) {
            assert!(
                (got - want).abs() <= bound * (1.0 + want.abs()),
                "{what}: {got} is not {want}"
            );
        }
        let gradients = self.gradients(&outcome).into_iter().zip(self.roundings(&outcome));
        let got = [("hidden", &parts), ("weight", &grads[0]), ("bias", &grads[1])];
        for ((name, got), (want, roundings)) in got.into_iter().zip(gradients) {
            let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
            let errors = got.iter().zip(&want).map(|(a, b)| (a - b).abs());
            let error = norm(&mut errors.zip(&roundings).map(|(e, r)| (e - r).max(0.0)));
            let size = norm(&mut want.iter().copied());
            assert!(error <= bound * (1.0 + size), "{what}: {name} is off by {error} of {size}");
        }
    }
}
