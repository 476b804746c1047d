//! Which calls the safe API refuses, with which messages and in which order. A refused call writes
//! nothing.
//!
//! Slices cannot cause `Struct`, `Align`, nor outputs that overlap other than in place. tests/c tests
//! these.

use common::isas;
use xent::half::{bf16, f16};
use xent::{CrossEntropy, Error, Input, Isa, Number, Output, Reduction, Results, Softmax};

const ROWS: usize = 3;
const CLASSES: usize = 4;
const N: usize = ROWS * CLASSES;
const MARK: f64 = 1234.5;

type Call = CrossEntropy<'static>;
type Build<'a> = &'a dyn Fn(Call) -> Call;

/// All outputs of a call.
#[derive(Clone, Debug, PartialEq)]
struct Outputs {
    grad: [f32; N],
    in_place: [f32; N],
    scalars: [f64; 5],
    counts: [u64; 2],
    row_losses: [f64; ROWS],
    lse: [f64; ROWS],
    entropy: [f64; ROWS],
    argmax: [i64; ROWS],
    top_classes: [i64; 2 * ROWS],
    top_log_probs: [f64; 2 * ROWS],
    target_ranks: [i64; ROWS],
}

impl Outputs {
    const MARKED: Outputs = Outputs {
        grad: [MARK as f32; N],
        in_place: [0.5; N],
        scalars: [MARK; 5],
        counts: [77; 2],
        row_losses: [MARK; ROWS],
        lse: [MARK; ROWS],
        entropy: [MARK; ROWS],
        argmax: [77; ROWS],
        top_classes: [77; 2 * ROWS],
        top_log_probs: [MARK; 2 * ROWS],
        target_ranks: [77; ROWS],
    };
}

/// Which calls meet a fault, and which results the options allow.
#[derive(Clone, Copy)]
struct Ask {
    forward: bool,
    /// Targets are probabilities.
    soft: bool,
    log_probs: bool,
}

const INDICES: Ask = Ask { forward: true, soft: false, log_probs: false };
const GRADIENT_ONLY: Ask = Ask { forward: false, ..INDICES };

/// Makes every call that takes these targets, with every result that they allow. Each call must return
/// `expected` and leave every output as it was.
#[track_caller]
fn refused(build: Build, targets: Input<'_>, ask: Ask, expected: &Error) {
    let logits = [0.5f32; N];
    for isa in isas() {
        let call = build(CrossEntropy::new(ROWS, CLASSES)).isa(isa);
        for pass in 0..6 {
            let mut out = Outputs::MARKED;
            let Outputs {
                grad,
                in_place,
                scalars,
                counts,
                row_losses,
                lse,
                entropy,
                argmax,
                top_classes,
                top_log_probs,
                target_ranks,
            } = &mut out;
            let [loss, z_loss, normalizer, z_normalizer, entropy_bonus] = scalars;
            let [kept_rows, correct] = counts;
            let softmax = !ask.log_probs;
            let results = Results {
                loss: Some(loss),
                row_losses: Some(row_losses.into()),
                lse: softmax.then_some(lse),
                z_loss: softmax.then_some(z_loss),
                normalizer: Some(normalizer),
                z_normalizer: Some(z_normalizer),
                kept_rows: Some(kept_rows),
                argmax: Some(argmax),
                correct: (!ask.soft).then_some(correct),
                entropy: softmax.then(|| entropy.into()),
                entropy_bonus: softmax.then_some(entropy_bonus),
                top_count: 2,
                top_classes: Some(top_classes),
                top_log_probs: Some(top_log_probs.into()),
                target_ranks: (!ask.soft).then_some(target_ranks),
                ..Results::default()
            };
            let result = match pass {
                0 if !ask.forward => continue,
                5 if !ask.soft => continue,
                0 => call.forward_with(&logits, targets, results),
                1 => call.forward_backward_with(&logits, targets, grad, results),
                2 => call.forward_backward_in_place_with(in_place, targets, results),
                3 => call.backward(&logits, targets, &[1.0; ROWS], grad),
                4 => call.backward_in_place(in_place, targets, &[1.0; ROWS]),
                _ => call.backward_targets(&logits, targets, &[1.0; ROWS], grad),
            };
            assert_eq!(result.as_ref(), Err(expected), "pass {pass}");
            assert_eq!(out, Outputs::MARKED, "pass {pass}");
        }
    }
}

/// The error of a call that must fail.
#[track_caller]
fn words<T: std::fmt::Debug>(result: Result<T, Error>) -> String {
    result.unwrap_err().to_string()
}

fn param(text: &str) -> Error {
    Error::Param(text.to_string())
}

#[test]
fn memory() {
    let error = Error::Memory { bytes: 4096 };
    assert_eq!(error.to_string(), "out of memory: the call needs 4096 bytes to work in");
}

#[test]
fn targets() {
    for (targets, row, value) in
        [([0i64, 1, 4], 2, 4), ([-1, 9, 2], 0, -1), ([0, i64::MIN, 2], 1, i64::MIN)]
    {
        let expected = Error::Target { row, place: None, value, classes: CLASSES };
        refused(&|call| call, (&targets).into(), INDICES, &expected);
        let log_probs = Ask { log_probs: true, ..INDICES };
        refused(&|call| call.log_probs(true), (&targets).into(), log_probs, &expected);
        let text = format!("targets[{row}] = {value} is outside [0, 4)");
        assert_eq!(expected.to_string(), text);
    }
    // Options that make the scan read targets one by one, or that use them further.
    let expected = Error::Target { row: 1, place: None, value: 200, classes: CLASSES };
    let targets = [0u8, 200, 201];
    for build in [
        &|call: Call| call.row_mask(&[1u8, 1, 0]) as Call,
        &|call: Call| call.class_weights(&[1f32; CLASSES]),
        &|call: Call| call.row_weights(&[1f64, 0.0, 1.0]),
        &|call: Call| call.label_smoothing(1.0).z_loss(1e-4).softcap(30.0),
    ] as [Build; 4]
    {
        refused(build, (&targets).into(), INDICES, &expected);
    }
    // Not an error: xent does not read the target of a masked row.
    let mask = CrossEntropy::new(ROWS, CLASSES).row_mask(&[1u8, 0, 0]);
    mask.forward(&[0f32; N], &targets).unwrap();
}

/// No label is a class: the call reports the first row.
#[test]
fn targets_that_all_are_out_of_range() {
    let x = [0f32; 12 * 4];
    let call = CrossEntropy::new(12, 4);
    for isa in isas() {
        let call = call.isa(isa);
        assert_eq!(words(call.forward(&x, &[4u8; 12])), "targets[0] = 4 is outside [0, 4)");
        assert_eq!(words(call.forward(&x, &[9i32; 12])), "targets[0] = 9 is outside [0, 4)");
        assert_eq!(words(call.forward(&x, &[-1i32; 12])), "targets[0] = -1 is outside [0, 4)");
        assert_eq!(words(call.forward(&x, &[-1i64; 12])), "targets[0] = -1 is outside [0, 4)");
    }
}

/// Targets over inner positions are counted in the order of memory, `row·inner + position`.
#[test]
fn targets_over_inner_positions() {
    let call = CrossEntropy::new(2, 4).inner(3);
    let x = [0f32; 24];
    let mut y = [0i32; 6];
    y[4] = -7;
    let expected = "targets[4] = -7 is outside [0, 4)";
    assert_eq!(words(call.forward(&x, &y)), expected);
    // In any layout.
    let mut y = [0i64; 64];
    y[16 + 4] = -7;
    assert_eq!(words(call.forward(&x, Input::from(&y).strides([16, 0, 4]))), expected);
    // Contiguous within a row, with a gap between rows that may hold anything.
    let y = [0, 1, 2, -7, -7, 3, 0, 1];
    let mut kept = 0;
    let results = Results { kept_rows: Some(&mut kept), ..Results::default() };
    call.forward_with(&x, Input::from(&y).strides([5, 0, 1]), results).unwrap();
    assert_eq!(kept, 6);
    let y = [0, 1, 2, 3, 3, 3, 0, -7];
    let expected = "targets[5] = -7 is outside [0, 4)";
    assert_eq!(words(call.forward(&x, Input::from(&y).strides([5, 0, 1]))), expected);
    // Rows have a stride of 1, positions have not; and the reverse.
    let y = [0, 0, 1, 2, 3, 0, 0, -7];
    assert_eq!(words(call.forward(&x, Input::from(&y).strides([3, 0, 2]))), expected);
    assert_eq!(words(call.forward(&x, Input::from(&y).strides([1, 0, 3]))), expected);
    // One position per row.
    let expected = "targets[1] = -7 is outside [0, 4)";
    let call = CrossEntropy::new(2, 4);
    assert_eq!(words(call.forward(&x[..8], Input::from(&y).strides([7, 0, 0]))), expected);
}

#[test]
fn options() {
    let indices = [0i32, 1, 2];
    let soft = [0.25f64; N];
    let both = |build: Build, ask: Ask, expected: &str| {
        let expected = param(expected);
        refused(build, (&indices).into(), ask, &expected);
        refused(build, (&soft).into(), Ask { soft: true, ..ask }, &expected);
    };
    for (epsilon, text) in [(1.5, "1.5"), (-0.1, "-0.1"), (f64::NAN, "NaN"), (f64::INFINITY, "inf")]
    {
        let expected = format!("label_smoothing = {text} is outside [0, 1]");
        both(&|call| call.label_smoothing(epsilon), INDICES, &expected);
    }
    type Setter = fn(Call, f64) -> Call;
    let setters: [(&str, Setter); 4] = [
        ("z_loss", |call, x| call.z_loss(x)),
        ("softcap", |call, x| call.softcap(x)),
        ("normalizer", |call, x| call.normalizer(x)),
        ("z_normalizer", |call, x| call.z_normalizer(x)),
    ];
    for (name, set) in setters {
        for (value, text) in [(-1.0, "-1"), (f64::NAN, "NaN"), (f64::INFINITY, "inf")] {
            let expected = format!("{name} = {text} is not a finite number >= 0");
            both(&|call| set(call, value), INDICES, &expected);
        }
    }
    let infinity = f64::INFINITY;
    for (scale, text) in [(0.0, "0"), (-2.0, "-2"), (f64::NAN, "NaN"), (infinity, "inf")] {
        let expected = format!("logit_scale = {text} is not a finite number > 0");
        both(&|call| call.logit_scale(scale), INDICES, &expected);
    }
    for (scale, text) in [(f64::NAN, "NaN"), (infinity, "inf"), (-infinity, "-inf")] {
        let expected = format!("grad_scale = {text} is not finite");
        both(&|call| call.grad_scale(scale), GRADIENT_ONLY, &expected);
    }
    for (bonus, text) in [(f64::NAN, "NaN"), (infinity, "inf"), (-infinity, "-inf")] {
        let expected = format!("entropy_bonus = {text} is not finite");
        both(&|call| call.entropy_bonus(bonus), INDICES, &expected);
    }
    // Both ends of the allowed range.
    let call = CrossEntropy::new(ROWS, CLASSES);
    for epsilon in [0.0, -0.0, 1.0] {
        call.label_smoothing(epsilon).forward(&[0f32; N], &indices).unwrap();
    }
    for scale in [f64::MIN_POSITIVE, 5e-324, f64::MAX] {
        call.logit_scale(scale).softcap(scale).forward(&[0f32; N], &indices).unwrap();
        call.z_loss(scale).normalizer(scale).forward(&[0f32; N], &indices).unwrap();
    }
}

/// Reduction none has no reduced loss.
#[test]
fn reduction_none() {
    let call = CrossEntropy::new(ROWS, CLASSES).reduction(Reduction::None);
    let (logits, targets) = ([0f32; N], [0i32, 1, 2]);
    let text = "reduction none has no reduced loss; ask for row_losses";
    assert_eq!(words(call.forward(&logits, &targets)), text);
    let mut z_loss = MARK;
    let results = Results { z_loss: Some(&mut z_loss), ..Results::default() };
    assert_eq!(words(call.forward_with(&logits, &targets, results)), text);
    let mut bonus = MARK;
    let results = Results { entropy_bonus: Some(&mut bonus), ..Results::default() };
    assert_eq!(words(call.forward_with(&logits, &targets, results)), text);
    assert_eq!([z_loss, bonus], [MARK; 2]);
    let mut grad = [MARK as f32; N];
    let both = call.forward_backward(&logits, &targets, &mut grad);
    assert_eq!(both, Err(param(text)));
    assert_eq!(grad, [MARK as f32; N]);
    let mut losses = [MARK; ROWS];
    let results = Results { row_losses: Some((&mut losses).into()), ..Results::default() };
    call.forward_backward_with(&logits, &targets, &mut grad, results).unwrap();
    call.backward(&logits, &targets, &[1.0; ROWS], &mut grad).unwrap();
    assert!(!losses.contains(&MARK) && !grad.contains(&(MARK as f32)));
}

/// Options and results that do not go with log-probabilities.
#[test]
fn log_probs() {
    let indices = [0i32, 1, 2];
    let soft = [0.25f64; N];
    let text = |name: &str| format!("{name} does not go with log-probabilities (LOG_PROBS)");
    for (name, build) in [
        ("z_loss", &|call: Call| call.log_probs(true).z_loss(1e-4) as Call),
        ("entropy_bonus", &|call: Call| call.log_probs(true).entropy_bonus(-0.1) as Call),
        ("softcap", &|call: Call| call.log_probs(true).softcap(30.0)),
        ("logit_scale", &|call: Call| call.log_probs(true).logit_scale(0.5)),
    ] as [(&str, Build); 4]
    {
        let ask = Ask { log_probs: true, ..INDICES };
        refused(build, (&indices).into(), ask, &param(&text(name)));
        refused(build, (&soft).into(), Ask { soft: true, ..ask }, &param(&text(name)));
    }
    let call = CrossEntropy::new(ROWS, CLASSES).log_probs(true);
    let x = [-1f32; N];
    let (mut z_loss, mut lse, mut entropy) = (MARK, [MARK; ROWS], [MARK; ROWS]);
    let results = Results { z_loss: Some(&mut z_loss), ..Results::default() };
    assert_eq!(call.forward_with(&x, &indices, results), Err(param(&text("z_loss"))));
    let results = Results { entropy_bonus: Some(&mut z_loss), ..Results::default() };
    assert_eq!(call.forward_with(&x, &indices, results), Err(param(&text("entropy_bonus"))));
    let results = Results { lse: Some(&mut lse), ..Results::default() };
    assert_eq!(call.forward_with(&x, &indices, results), Err(param(&text("lse"))));
    assert_eq!(call.lse(&x, &mut lse), Err(param(&text("lse"))));
    let results = Results { entropy: Some((&mut entropy).into()), ..Results::default() };
    assert_eq!(call.evaluate(&x, results), Err(param(&text("entropy"))));
    assert_eq!((z_loss, lse, entropy), (MARK, [MARK; ROWS], [MARK; ROWS]));
    // The remaining results are allowed; a backward reads no lse.
    let (mut grad, mut argmax, mut correct) = ([MARK as f32; N], [77; ROWS], 77);
    call.logit_scale(0.5).logit_scale(1.0).forward(&x, &indices).unwrap();
    let results =
        Results { argmax: Some(&mut argmax), correct: Some(&mut correct), ..Results::default() };
    call.forward_with(&x, &indices, results).unwrap();
    assert_eq!((argmax, correct), ([0; ROWS], 1));
    call.backward(&x, &indices, &[], &mut grad).unwrap();
    call.backward_targets(&x, &soft, &[], &mut grad).unwrap();
}

/// Results that a kind of target cannot have.
#[test]
fn results_and_targets() {
    let x = [0.5f32; N];
    let call = CrossEntropy::new(ROWS, CLASSES);
    let (soft, indices) = ([0.25f32; N], [0u16; ROWS]);
    let mut correct = 77;
    let results = Results { correct: Some(&mut correct), ..Results::default() };
    let text = "correct needs targets that are class indices";
    assert_eq!(call.forward_with(&x, &soft, results), Err(param(text)));
    let mut grad = [MARK as f32; N];
    let results = Results { correct: Some(&mut correct), ..Results::default() };
    assert_eq!(call.forward_backward_with(&x, &soft, &mut grad, results), Err(param(text)));
    let text = "grad_targets needs targets that are probabilities";
    assert_eq!(call.backward_targets(&x, &indices, &[1.0; ROWS], &mut grad), Err(param(text)));
    assert_eq!(
        call.log_probs(true).backward_targets(&x, &indices, &[], &mut grad),
        Err(param(text))
    );
    assert_eq!((correct, grad), (77, [MARK as f32; N]));
}

/// Without targets a call can ask for lse, argmax and entropy alone.
#[test]
fn evaluators() {
    let call = CrossEntropy::new(ROWS, CLASSES);
    let x = [0.5f32; N];
    let mut out = Outputs::MARKED;
    let [loss, z_loss, normalizer, z_normalizer, entropy_bonus] = &mut out.scalars;
    let [kept_rows, correct] = &mut out.counts;
    for results in [
        Results { loss: Some(loss), ..Results::default() },
        Results { z_loss: Some(z_loss), ..Results::default() },
        Results { row_losses: Some((&mut out.row_losses).into()), ..Results::default() },
        Results { normalizer: Some(normalizer), ..Results::default() },
        Results { z_normalizer: Some(z_normalizer), ..Results::default() },
        Results { kept_rows: Some(kept_rows), ..Results::default() },
        Results { correct: Some(correct), ..Results::default() },
        Results { entropy_bonus: Some(entropy_bonus), ..Results::default() },
    ] {
        let expected = Error::Null("targets is NULL".to_string());
        assert_eq!(call.evaluate(&x, results), Err(expected));
    }
    assert_eq!(out, Outputs::MARKED);
    let results = Results {
        lse: Some(&mut out.lse),
        argmax: Some(&mut out.argmax),
        entropy: Some((&mut out.entropy).into()),
        ..Results::default()
    };
    call.evaluate(&x, results).unwrap();
    assert_eq!(out.argmax, [0; ROWS]);
    assert!(!out.lse.contains(&MARK) && !out.entropy.contains(&MARK));
    // Also with reduction none.
    call.reduction(Reduction::None).lse(&x, &mut out.lse).unwrap();
}

#[test]
fn instruction_sets() {
    for isa in Isa::ALL {
        let call = CrossEntropy::new(1, 2).isa(isa);
        let result = call.forward(&[0f32; 2], &[0u8]);
        let mut y = [MARK; 2];
        let softmax = Softmax::new(1, 2).isa(isa).softmax(&[0f64; 2], &mut y);
        if isa.is_available() {
            result.unwrap();
            softmax.unwrap();
        } else {
            let expected = param(&format!("this processor does not have {}", isa.name()));
            assert_eq!(result, Err(expected.clone()));
            assert_eq!(softmax, Err(expected));
        }
    }
}

#[test]
fn dtypes() {
    let call = CrossEntropy::new(ROWS, CLASSES);
    let x = [0f32; N];
    let y = [0i32; ROWS];
    const FLOATS: &str = "it can be F32, F64, BF16, F16";
    #[track_caller]
    fn dtype<T: std::fmt::Debug + PartialEq>(result: Result<T, Error>, text: &str) {
        assert_eq!(result, Err(Error::Dtype(text.to_string())));
    }
    dtype(call.forward(&[0i32; N], &y), &format!("logits.dtype is I32; {FLOATS}"));
    dtype(call.lse(&[0u8; N], &mut [0.0; ROWS]), &format!("logits.dtype is U8; {FLOATS}"));
    dtype(
        call.class_weights(&[1i64; CLASSES]).forward(&x, &y),
        &format!("class_weights.dtype is I64; {FLOATS}"),
    );
    dtype(
        call.row_weights(&[1u8; ROWS]).forward(&x, &y),
        &format!("row_weights.dtype is U8; {FLOATS}"),
    );
    dtype(call.row_mask(&[1i32; ROWS]).forward(&x, &y), "row_mask.dtype is I32; it can be U8");
    dtype(call.row_mask(&[1f32; ROWS]).forward(&x, &y), "row_mask.dtype is F32; it can be U8");
    let mut grad = [7i32; N];
    let text = format!("grad_logits.dtype is I32; {FLOATS}");
    dtype(call.forward_backward(&x, &y, &mut grad), &text);
    dtype(call.backward(&x, &y, &[1.0; ROWS], &mut grad), &text);
    let text = format!("grad_targets.dtype is I32; {FLOATS}");
    dtype(call.backward_targets(&x, &x, &[1.0; ROWS], &mut grad), &text);
    assert_eq!(grad, [7; N]);
    let mut grad = [MARK as f32; N];
    dtype(
        call.grad_output(&[1u16]).forward_backward(&x, &y, &mut grad),
        &format!("grad_output.dtype is U16; {FLOATS}"),
    );
    let mut short = [7i32; ROWS];
    let results = Results { row_losses: Some((&mut short).into()), ..Results::default() };
    dtype(call.forward_with(&x, &y, results), "row_losses.dtype is I32; it can be F32, F64");
    let results = Results { entropy: Some((&mut short).into()), ..Results::default() };
    dtype(call.evaluate(&x, results), "entropy.dtype is I32; it can be F32, F64");
    assert_eq!((short, grad), ([7; ROWS], [MARK as f32; N]));
    // Results that are sums have at least f32.
    let mut halves = [bf16::from_f32(7.0); ROWS];
    let results = Results { row_losses: Some((&mut halves).into()), ..Results::default() };
    dtype(call.forward_with(&x, &y, results), "row_losses.dtype is BF16; it can be F32, F64");
    let results = Results { entropy: Some((&mut halves).into()), ..Results::default() };
    dtype(call.evaluate(&x, results), "entropy.dtype is BF16; it can be F32, F64");
    assert_eq!(halves, [bf16::from_f32(7.0); ROWS]);
}

/// The gradient of the logits has their dtype, or f32 for halves; that of the targets has any float.
#[test]
fn dtypes_of_gradients() {
    fn pair<L: Number, G: Number + PartialEq + std::fmt::Debug>(
        logit: L,
        mark: G,
        refused: Option<&str>,
    ) {
        let (x, soft, mut grad) = ([logit; N], [logit; N], [mark; N]);
        let call = CrossEntropy::new(ROWS, CLASSES);
        let results = [
            call.forward_backward(&x, &[0u8; ROWS], &mut grad).map(|_| ()),
            call.backward(&x, &[0u8; ROWS], &[1.0; ROWS], &mut grad),
        ];
        for result in results {
            assert_eq!(result, refused.map_or(Ok(()), |text| Err(Error::Dtype(text.to_string()))));
        }
        assert_eq!(grad == [mark; N], refused.is_some());
        call.backward_targets(&x, &soft, &[2.0; ROWS], &mut grad).unwrap();
        assert_ne!(grad, [mark; N]);
    }
    let text = |g: &str, x: &str, or: &str| {
        format!("grad_logits.dtype is {g}; for logits of {x} it can be that{or}")
    };
    let (b, h) = (bf16::from_f32(0.5), f16::from_f32(0.5));
    pair(0.5f32, 7f32, None);
    pair(0.5f32, 7f64, Some(&text("F64", "F32", "")));
    pair(0.5f32, bf16::from_f32(7.0), Some(&text("BF16", "F32", "")));
    pair(0.5f32, f16::from_f32(7.0), Some(&text("F16", "F32", "")));
    pair(0.5f64, 7f64, None);
    pair(0.5f64, 7f32, Some(&text("F32", "F64", "")));
    pair(0.5f64, bf16::from_f32(7.0), Some(&text("BF16", "F64", "")));
    pair(b, bf16::from_f32(7.0), None);
    pair(b, 7f32, None);
    pair(b, f16::from_f32(7.0), Some(&text("F16", "BF16", ", or F32")));
    pair(b, 7f64, Some(&text("F64", "BF16", ", or F32")));
    pair(h, f16::from_f32(7.0), None);
    pair(h, 7f32, None);
    pair(h, bf16::from_f32(7.0), Some(&text("BF16", "F16", ", or F32")));
    pair(h, 7f64, Some(&text("F64", "F16", ", or F32")));
}

/// Targets may have every dtype; the other inputs any float.
#[test]
fn dtypes_that_go_together() {
    let x = [0.5f32; N];
    let call = CrossEntropy::new(ROWS, CLASSES);
    let (b, h) = ([bf16::from_f32(0.5); N], [f16::from_f32(0.5); N]);
    let mut losses = Vec::new();
    let indices: [Input; 5] = [
        (&[1i64; ROWS]).into(),
        (&[1i32; ROWS]).into(),
        (&[1u32; ROWS]).into(),
        (&[1u16; ROWS]).into(),
        (&[1u8; ROWS]).into(),
    ];
    losses.extend(indices.map(|y| call.forward(&x, y).unwrap()));
    let halves = [0.5f64; N];
    let probabilities: [Input; 4] = [(&x).into(), (&halves).into(), (&b).into(), (&h).into()];
    losses.extend(probabilities.map(|t| call.forward(&x, t).unwrap() / 2.0));
    let weights: [Input; 4] = [(&x).into(), (&halves).into(), (&b).into(), (&h).into()];
    for w in weights {
        let call = CrossEntropy::new(ROWS, CLASSES).class_weights(w).row_weights(w).grad_output(w);
        let mut grad = [0f32; N];
        losses.push(call.forward_backward(&x, &[1u8; ROWS], &mut grad).unwrap());
    }
    assert!(losses.iter().all(|loss| (loss - 4f64.ln()).abs() < 1e-6), "{losses:?}");
}

fn short(name: &str, len: usize, last: usize) -> Error {
    let text = format!("{name} has {len} elements, but its shape and strides reach element {last}");
    Error::Shape(text)
}

#[test]
fn shapes() {
    let call = CrossEntropy::new(ROWS, CLASSES);
    let x = [0f32; N];
    let y = [0i32; ROWS];
    assert_eq!(call.forward(&x[1..], &y), Err(short("logits", 11, 11)));
    assert_eq!(call.forward(&x[..0], &y), Err(short("logits", 0, 11)));
    assert_eq!(call.forward(&x, &y[1..]), Err(short("targets", 2, 2)));
    assert_eq!(call.forward(&x, &x[1..]), Err(short("targets", 11, 11)));
    assert_eq!(call.class_weights(&[1f32; 3]).forward(&x, &y), Err(short("class_weights", 3, 3)));
    assert_eq!(call.row_weights(&[1f64; 2]).forward(&x, &y), Err(short("row_weights", 2, 2)));
    assert_eq!(call.row_mask(&[1u8; 2]).forward(&x, &y), Err(short("row_mask", 2, 2)));
    let strided = Input::from(&x).strides([5, 1, 0]);
    assert_eq!(call.forward(strided, &y), Err(short("logits", 12, 13)));
    let mut grad = [MARK as f32; N];
    assert_eq!(call.forward_backward(&x, &y, &mut grad[1..]), Err(short("grad_logits", 11, 11)));
    assert_eq!(
        call.grad_output(&[0f32; 0]).backward(&x, &y, &[1.0; ROWS], &mut grad),
        Err(short("grad_output", 0, 0))
    );
    let per_row = call.reduction(Reduction::None).grad_output(&[1f32; 2]);
    assert_eq!(per_row.backward(&x, &y, &[1.0; ROWS], &mut grad), Err(short("grad_output", 2, 2)));
    assert_eq!(call.backward(&x, &y, &[1.0; 2], &mut grad), Err(short("lse", 2, 2)));
    assert_eq!(call.backward(&x, &y, &[], &mut grad), Err(short("lse", 0, 2)));
    let soft = [0.25f64; N];
    assert_eq!(call.backward_targets(&x, &soft, &[1.0; 2], &mut grad), Err(short("lse", 2, 2)));
    let into = call.backward_targets(&x, &soft, &[1.0; ROWS], &mut grad[1..]);
    assert_eq!(into, Err(short("grad_targets", 11, 11)));
    assert_eq!(call.lse(&x, &mut [0.0; 2]), Err(short("lse", 2, 2)));
    assert_eq!(grad, [MARK as f32; N]);
    let mut losses = [MARK; 2];
    let results = Results { row_losses: Some((&mut losses).into()), ..Results::default() };
    assert_eq!(call.forward_with(&x, &y, results), Err(short("row_losses", 2, 2)));
    let results = Results { entropy: Some((&mut losses).into()), ..Results::default() };
    assert_eq!(call.evaluate(&x, results), Err(short("entropy", 2, 2)));
    assert_eq!(losses, [MARK; 2]);
    let mut argmax = [7; 2];
    let results = Results { argmax: Some(&mut argmax), ..Results::default() };
    assert_eq!(call.forward_with(&x, &y, results), Err(short("argmax", 2, 2)));
    assert_eq!(argmax, [7; 2]);

    assert_eq!(words(CrossEntropy::new(3, 0).forward(&x, &y)), "classes = 0, but there are 3 rows");
    let inner = CrossEntropy::new(3, 0).inner(5);
    assert_eq!(words(inner.forward(&x, &y)), "classes = 0, but there are 15 rows");
    for [rows, classes, inner] in [
        [usize::MAX, 2, 1],
        [2, usize::MAX, 1],
        [1 << 32, 1 << 32, 1],
        [(1 << 31) + 1, 1 << 33, 1],
        [0, usize::MAX, 1],
        [1, 1, usize::MAX],
        [1 << 22, 1 << 22, 1 << 22],
        [1 << 40, 0, 1 << 40],
        [0, 1, usize::MAX],
    ] {
        let refused = CrossEntropy::new(rows, classes).inner(inner).forward(&x, &y);
        let text = format!("rows*classes*inner = {rows}*{classes}*{inner} overflows");
        assert_eq!(refused, Err(Error::Shape(text)));
    }
    // One element less is accepted.
    let most = isize::MAX as usize / 16;
    assert_eq!(CrossEntropy::new(most, 1).forward(&x, &y), Err(short("logits", N, most - 1)));
    CrossEntropy::new(0, most).forward(&x, &y).unwrap();
    let text = format!("classes = 0, but there are {most} rows");
    assert_eq!(CrossEntropy::new(most, 0).forward(&x, &y), Err(Error::Shape(text)));
}

/// Slices too short for inner positions, and for strides.
#[test]
fn shapes_with_inner_positions() {
    // [2, 3, 5], its rows 10.
    let call = CrossEntropy::new(2, 3).inner(5);
    let x = [0f32; 64];
    let y = [0u32; 64];
    assert_eq!(call.forward(&x[..29], &y), Err(short("logits", 29, 29)));
    assert_eq!(call.forward(&x[..30], &y[..9]), Err(short("targets", 9, 9)));
    assert_eq!(call.forward(&x[..30], &x[..29]), Err(short("targets", 29, 29)));
    call.forward(&x[..30], &y[..10]).unwrap();
    call.forward(&x[..30], &x[..30]).unwrap();
    // Classes last: row 15, class 1, position 3.
    let last = |len: usize| Input::from(&x[..len]).strides([15, 1, 3]);
    assert_eq!(call.forward(last(29), &y), Err(short("logits", 29, 29)));
    call.forward(last(30), &y).unwrap();
    // xent ignores the stride of an axis of size 1, and the class stride of operands without classes.
    let one = CrossEntropy::new(1, 3);
    one.forward(Input::from(&x[..3]).strides([-5, 1, i64::MIN]), &y[..1]).unwrap();
    let strided = |len: usize| Input::from(&y[..len]).strides([5, i64::MIN, 1]);
    call.forward(&x, strided(10)).unwrap();
    assert_eq!(call.forward(&x, strided(9)), Err(short("targets", 9, 9)));
    assert_eq!(call.row_weights(&[1f32; 9]).forward(&x, &y), Err(short("row_weights", 9, 9)));
    let weights = [1f32; 9];
    let wide = Input::from(&weights).strides([0, 4, 0]);
    call.class_weights(wide).forward(&x, &y).unwrap();
    let wide = Input::from(&weights[..8]).strides([0, 4, 0]);
    assert_eq!(call.class_weights(wide).forward(&x, &y), Err(short("class_weights", 8, 8)));
    let mut lse = [MARK; 10];
    assert_eq!(call.lse(&x, &mut lse[..9]), Err(short("lse", 9, 9)));
    assert_eq!(lse, [MARK; 10]);
    let mut grad = [MARK as f32; 40];
    let to = Output::from(&mut grad[..38]).strides([20, 1, 4]);
    assert_eq!(call.backward(&x, &y, &lse, to), Err(short("grad_logits", 38, 38)));
    let mut losses = [MARK; 19];
    let row_losses = Some(Output::from(&mut losses[..18]).strides([10, 0, 2]));
    let results = Results { row_losses, ..Results::default() };
    assert_eq!(call.forward_with(&x, &y, results), Err(short("row_losses", 18, 18)));
    assert_eq!((grad, losses), ([MARK as f32; 40], [MARK; 19]));
    // No rows, and no positions.
    for [rows, classes, inner] in [[0, 3, 5], [2, 3, 0], [0, 0, 5], [2, 0, 0], [0, 0, 0]] {
        let none = CrossEntropy::new(rows, classes).inner(inner);
        assert!(none.forward(&x[..0], &y[..0]).unwrap().is_nan());
    }
}

#[test]
fn strides() {
    let call = CrossEntropy::new(ROWS, CLASSES);
    let x = [0f32; 64];
    let y = [0i32; ROWS];
    let stride = |result: Result<f64, Error>, text: &str| {
        assert_eq!(result, Err(Error::Stride(text.to_string())));
    };
    let logits = |strides| Input::from(&x).strides(strides);
    stride(call.forward(logits([-4, 1, 0]), &y), "logits.strides[0] = -4 is negative");
    stride(call.forward(logits([4, -1, 0]), &y), "logits.strides[1] = -1 is negative");
    let inner = CrossEntropy::new(ROWS, CLASSES).inner(2);
    stride(inner.forward(logits([8, 2, -1]), &y), "logits.strides[2] = -1 is negative");
    for (strides, axis) in [([i64::MAX, 1, 0], 0), ([4, i64::MAX / 3 + 1, 0], 1)] {
        stride(
            call.forward(logits(strides), &y),
            &format!("logits.strides[{axis}] = {} reaches past the address space", strides[axis]),
        );
    }
    // Each offset is in range, but not their sum, or its number of bytes.
    for strides in [[i64::MAX / 2, i64::MAX / 3, 0], [i64::MAX / 8, 1, 0]] {
        let result = call.forward(logits(strides), &y);
        assert!(matches!(result, Err(Error::Stride(_))), "{result:?}");
    }
    // The last byte that a signed offset reaches, and one element more.
    let far = CrossEntropy::new(2, 1);
    let most = i64::MAX / 4;
    let text = format!("logits.strides[0] = {most} reaches past the address space");
    stride(far.forward(logits([most, 0, 0]), &[0; 2]), &text);
    let result = far.forward(logits([most - 1, 0, 0]), &[0; 2]);
    assert_eq!(result, Err(short("logits", 64, (most - 1) as usize)));
    // Classes may have any distance.
    call.forward(logits([8, 2, 0]), &y).unwrap();
    call.forward(logits([1, 3, 0]), &y).unwrap();
    stride(
        call.forward(&x, Input::from(&y).strides([-1, 0, 0])),
        "targets.strides[0] = -1 is negative",
    );
    stride(
        call.forward(&x, Input::from(&x).strides([4, -1, 0])),
        "targets.strides[1] = -1 is negative",
    );
    stride(
        call.class_weights(Input::from(&[1f32; 4]).strides([0, -1, 0])).forward(&x, &y),
        "class_weights.strides[1] = -1 is negative",
    );
    // Elements of inputs may share an address (all strides 0 means packed).
    call.forward(logits([0, 1, 0]), &y).unwrap();
    call.forward(&x, Input::from(&x).strides([1, 0, 0])).unwrap();
}

/// What C makes of a class stride that was forgotten: every class of a row at one address. It gave a
/// loss of ln C.
#[test]
fn class_stride_of_zero() {
    let call = CrossEntropy::new(ROWS, CLASSES);
    let (x, y) = ([0f32; 64], [0i32; 2 * ROWS]);
    let mut grad = [MARK as f32; 64];
    let text = |name: &str, of: &str, write: &str| {
        format!(
            "{name}.strides[1] = 0, the class stride, puts {CLASSES} classes at one address: {of}, write {{{write}}}"
        )
    };
    let contiguous = "if a row's classes are contiguous";
    let logits = |strides| Input::from(&x).strides(strides);
    let forgotten = text("logits", contiguous, "9, 1, 0");
    assert_eq!(words(call.forward(logits([9, 0, 0]), &y)), forgotten);
    assert_eq!(words(call.forward_backward(logits([9, 0, 0]), &y, &mut grad)), forgotten);
    assert_eq!(words(call.backward(logits([9, 0, 0]), &y, &[0.0; ROWS], &mut grad)), forgotten);
    assert_eq!(words(call.lse(logits([9, 0, 0]), &mut [0.0; ROWS])), forgotten);
    assert_eq!(words(call.log_probs(true).forward(logits([9, 0, 0]), &y)), forgotten);
    let to = Output::from(&mut grad).strides([9, 0, 0]);
    let forgotten = text("grad_logits", contiguous, "9, 1, 0");
    assert_eq!(words(call.forward_backward(&x, &y, to)), forgotten);
    let to = Output::from(&mut grad).strides([9, 0, 0]);
    let result = call.backward_targets(&x, &x, &[0.0; ROWS], to);
    assert_eq!(words(result), text("grad_targets", contiguous, "9, 1, 0"));
    let to = Output::from(&mut grad).strides([9, 0, 0]);
    // In place both have the stride, and the logits come first.
    let forgotten = text("logits", contiguous, "9, 1, 0");
    assert_eq!(words(call.forward_backward_in_place(to, &y)), forgotten);

    // Inner positions lie inside the classes, in their own stride or in that of packed memory.
    let inner = call.inner(2);
    let packed = "if the classes lie around packed positions";
    let expected = text("logits", packed, "20, 2, 1");
    assert_eq!(words(inner.forward(logits([20, 0, 1]), &y)), expected);
    assert_eq!(words(inner.forward(logits([20, 0, 0]), &y)), expected);
    let expected = text("logits", packed, "20, 6, 3");
    assert_eq!(words(inner.forward(logits([20, 0, 3]), &y)), expected);

    let output = |name: &str| text(name, contiguous, "9, 1, 0");
    let softmax = Softmax::new(ROWS, CLASSES);
    let to = Output::from(&mut grad).strides([9, 0, 0]);
    assert_eq!(words(softmax.softmax(&x, to)), output("y"));
    let to = Output::from(&mut grad).strides([9, 0, 0]);
    assert_eq!(words(softmax.softmax_backward(&x, &x, to)), output("grad_x"));
    assert_eq!(grad, [MARK as f32; 64]);

    // Other inputs may repeat classes: a gradient that is the same for each, say.
    softmax.softmax_backward(&x, Input::from(&x).strides([1, 0, 0]), &mut grad[..32]).unwrap();
    call.forward(&x, Input::from(&x).strides([1, 0, 0])).unwrap();
    call.class_weights(Input::from(&[1f32]).strides([0, 0, 0])).forward(&x, &y).unwrap_err();
    // One row at every position, one class, one row, and no row: no stride was forgotten.
    inner.forward(logits([0, 0, 1]), &y).unwrap();
    CrossEntropy::new(ROWS, 1).forward(logits([9, 0, 0]), &y).unwrap();
    CrossEntropy::new(1, CLASSES).forward(logits([9, 0, 0]), &y).unwrap();
    CrossEntropy::new(0, CLASSES).forward(logits([9, 0, 0]), &y).unwrap();
}

/// An axis of an output must step over the whole span of the axes inside it.
#[test]
fn strides_of_outputs() {
    let call = CrossEntropy::new(ROWS, CLASSES);
    let (x, y, soft) = ([0f32; 64], [0i32; 2 * ROWS], [0.25f32; 64]);
    let mut grad = [MARK as f32; 64];
    let text = |axis: usize, stride: i64, least: i64| {
        format!(
            "grad_logits.strides[{axis}] = {stride} makes elements of an output share an address: it must be at least {least}"
        )
    };
    for (strides, axis, least) in [
        ([3, 1, 0], 0, 4),
        ([1, 2, 0], 1, 3),
        ([0, 1, 0], 0, 1),
        ([1, 1, 0], 1, 3),
        ([6, 2, 0], 0, 7),
    ] {
        let expected = Err(Error::Stride(text(axis, strides[axis], least)));
        let to = Output::from(&mut grad).strides(strides);
        assert_eq!(call.forward_backward(&x, &y, to).map(|_| ()), expected);
        let to = Output::from(&mut grad).strides(strides);
        assert_eq!(call.backward(&x, &y, &[1.0; ROWS], to), expected);
        // In place the rows would overwrite one another's logits.
        let to = Output::from(&mut grad).strides(strides);
        assert_eq!(call.forward_backward_in_place(to, &y).map(|_| ()), expected);
        let to = Output::from(&mut grad).strides(strides);
        let targets = call.backward_targets(&x, &soft, &[1.0; ROWS], to);
        assert_eq!(words(targets), text(axis, strides[axis], least).replace("logits", "targets"));
    }
    let inner = CrossEntropy::new(ROWS, CLASSES).inner(2);
    for (strides, axis, least) in [([8, 2, 0], 2, 1), ([4, 1, 3], 2, 4), ([7, 1, 4], 0, 8)] {
        let to = Output::from(&mut grad).strides(strides);
        let result = inner.forward_backward(&x, &y, to).map(|_| ());
        let why = text(axis, strides[axis], least);
        assert_eq!(result, Err(Error::Stride(why)));
    }
    let mut losses = [MARK; 4 * ROWS];
    for name in ["row_losses", "entropy"] {
        let output = Some(Output::from(&mut losses).strides([1, 0, 1]));
        let results = match name {
            "row_losses" => Results { row_losses: output, ..Results::default() },
            _ => Results { entropy: output, ..Results::default() },
        };
        let why = words(inner.forward_with(&x, &y, results));
        assert!(why.starts_with(name) && why.contains("share an address"), "{why}");
    }
    assert_eq!((grad, losses), ([MARK as f32; 64], [MARK; 4 * ROWS]));
    // Any strides that step over the inner span are accepted, in any order of the axes.
    for strides in [[8, 2, 1], [8, 1, 4], [1, 3, 12], [2, 6, 1], [20, 5, 2]] {
        let to = Output::from(&mut grad).strides(strides);
        inner.forward_backward(&x, &y, to).unwrap();
    }
    let results = Results {
        row_losses: Some(Output::from(&mut losses).strides([1, 7, 3])),
        ..Results::default()
    };
    inner.forward_with(&x, &y, results).unwrap();
}

/// The one invalid overlap that safe Rust can ask for.
#[test]
fn overlaps() {
    let call = CrossEntropy::new(ROWS, CLASSES).accumulate(true);
    let y = [0i32; ROWS];
    let expected =
        Error::Overlap("grad_logits cannot be accumulated in place of logits".to_string());
    for strides in [[0, 0, 0], [4, 1, 0], [1, 3, 0]] {
        let mut x = [0.5f32; N];
        let to = Output::from(&mut x).strides(strides);
        assert_eq!(call.forward_backward_in_place(to, &y), Err(expected.clone()));
        let to = Output::from(&mut x).strides(strides);
        assert_eq!(call.backward_in_place(to, &y, &[1.0; ROWS]), Err(expected.clone()));
        assert_eq!(x, [0.5; N]);
    }
    // Without elements no overlap is an error.
    let none = CrossEntropy::new(0, CLASSES).accumulate(true);
    none.backward_in_place(&mut [0f32; 0], &y[..0], &[]).unwrap();
}

/// Every combination of the faults that a call can have: the call reports the first in the order of the
/// codes.
#[test]
fn order() {
    for faults in 1u32..64 {
        let fault = |bit: u32| faults >> bit & 1 == 1;
        let [dtype, shape, stride, overlap, option, target] =
            std::array::from_fn(|bit| fault(bit as u32));
        let (bytes, words) = ([1u8; ROWS], [1i32; ROWS]);
        let mut x = [0.5f32; N];
        let result = CrossEntropy::new(ROWS, if shape { 0 } else { CLASSES })
            .row_mask(if dtype { Input::from(&words) } else { Input::from(&bytes) })
            .accumulate(overlap)
            .label_smoothing(if option { 2.0 } else { 0.0 })
            .forward_backward_in_place(
                Output::from(&mut x).strides([if stride { -4 } else { 4 }, 1, 0]),
                &[0i64, if target { 4 } else { 0 }, 0],
            );
        let error = result.unwrap_err();
        let at = match error {
            Error::Dtype(_) => 0,
            Error::Shape(_) => 1,
            Error::Stride(_) => 2,
            Error::Overlap(_) => 3,
            Error::Param(_) => 4,
            Error::Target { .. } => 5,
            _ => 6,
        };
        assert_eq!(at, faults.trailing_zeros(), "{faults:#b}: {error}");
        assert_eq!(x, [0.5; N]);
    }
    // A missing operand comes first; the length of a slice comes after its strides.
    let call = CrossEntropy::new(ROWS, CLASSES).label_smoothing(2.0);
    let mut loss = MARK;
    let results = Results { loss: Some(&mut loss), ..Results::default() };
    assert!(matches!(call.evaluate(&[0i32; 1], results), Err(Error::Null(_))));
    let negative = Input::from(&[0f32; 1]).strides([-4, 1, 0]);
    assert!(matches!(call.forward(negative, &[9u8; ROWS]), Err(Error::Stride(_))));
    assert!(matches!(call.forward(&[0f32; 1], &[9u8; ROWS]), Err(Error::Shape(_))));
    assert_eq!(loss, MARK);
}

/// Softmax and log-softmax: the same checks, with the names of their operands.
#[test]
fn softmax() {
    let softmax = Softmax::new(ROWS, CLASSES);
    let (x, other) = ([0.5f32; N], [0.5f64; N]);
    let mut y = [MARK as f32; N];
    let mut wide = [MARK; N];
    let mut halves = [bf16::from_f32(7.0); N];
    const FLOATS: &str = "it can be F32, F64, BF16, F16";
    let dtype = |result: Result<(), Error>, text: &str| {
        assert_eq!(result, Err(Error::Dtype(text.to_string())));
    };
    dtype(softmax.softmax(&[0i32; N], &mut y), &format!("x.dtype is I32; {FLOATS}"));
    dtype(softmax.log_softmax(&x, &mut [0u16; N]), &format!("y.dtype is U16; {FLOATS}"));
    dtype(softmax.softmax_in_place(&mut [0u8; N]), &format!("x.dtype is U8; {FLOATS}"));
    dtype(softmax.softmax(&x, &mut wide), "y.dtype is F64, but x.dtype is F32");
    dtype(softmax.softmax(&x, &mut halves), "y.dtype is BF16, but x.dtype is F32");
    dtype(softmax.log_softmax(&halves, &mut y), "y.dtype is F32, but x.dtype is BF16");
    dtype(softmax.softmax_backward(&x, &other, &mut y), "grad_y.dtype is F64, but y.dtype is F32");
    dtype(
        softmax.log_softmax_backward(&other, &other, &mut y),
        "grad_x.dtype is F32, but y.dtype is F64",
    );
    dtype(
        softmax.softmax_backward(&x, &[0i64; N], &mut y),
        &format!("grad_y.dtype is I64; {FLOATS}"),
    );
    dtype(
        softmax.softmax_backward_in_place(&x, &mut wide),
        "grad_y.dtype is F64, but y.dtype is F32",
    );

    assert_eq!(softmax.softmax(&x[1..], &mut y), Err(short("x", 11, 11)));
    assert_eq!(softmax.softmax(&x, &mut y[1..]), Err(short("y", 11, 11)));
    assert_eq!(softmax.log_softmax_backward(&x[1..], &x, &mut y), Err(short("y", 11, 11)));
    assert_eq!(softmax.log_softmax_backward(&x, &x[1..], &mut y), Err(short("grad_y", 11, 11)));
    assert_eq!(softmax.softmax_backward(&x, &x, &mut y[1..]), Err(short("grad_x", 11, 11)));
    let inner = Softmax::new(2, 3).inner(5);
    assert_eq!(inner.softmax(&x, &mut y), Err(short("x", 12, 29)));
    assert_eq!(
        words(Softmax::new(2, 0).inner(3).softmax(&x, &mut y)),
        "classes = 0, but there are 6 rows"
    );
    let text = format!("rows*classes*inner = 2*{}*3 overflows", usize::MAX);
    assert_eq!(Softmax::new(2, usize::MAX).inner(3).softmax(&x, &mut y), Err(Error::Shape(text)));

    let stride = |result: Result<(), Error>, text: &str| {
        assert_eq!(result, Err(Error::Stride(text.to_string())));
    };
    let strided = |strides| Input::from(&x).strides(strides);
    stride(softmax.softmax(strided([4, -1, 0]), &mut y), "x.strides[1] = -1 is negative");
    stride(
        softmax.softmax_backward(&x, strided([-4, 1, 0]), &mut y),
        "grad_y.strides[0] = -4 is negative",
    );
    let shared = "makes elements of an output share an address: it must be at least";
    let to = Output::from(&mut y).strides([3, 1, 0]);
    stride(softmax.log_softmax(&x, to), &format!("y.strides[0] = 3 {shared} 4"));
    let to = Output::from(&mut y).strides([0, 1, 0]);
    stride(softmax.softmax_in_place(to), &format!("y.strides[0] = 0 {shared} 1"));
    let to = Output::from(&mut y).strides([4, 0, 0]);
    let text = "grad_x.strides[1] = 0, the class stride, puts 4 classes at one address: if a row's classes are contiguous, write {4, 1, 0}";
    stride(softmax.softmax_backward(&x, &x, to), text);
    assert_eq!((y, wide, halves), { ([MARK as f32; N], [MARK; N], [bf16::from_f32(7.0); N]) });

    // In place of each input, and without elements.
    softmax.softmax_in_place(&mut y).unwrap();
    softmax.log_softmax_in_place(Output::from(&mut y).strides([1, 3, 0])).unwrap();
    softmax.softmax_backward_over(&mut y, &x).unwrap();
    softmax.log_softmax_backward_in_place(&x, &mut y).unwrap();
    softmax.log_softmax_backward_over(&mut y, &x).unwrap();
    Softmax::new(0, 0).softmax(&x[..0], &mut y[..0]).unwrap();
    Softmax::new(3, 0).inner(0).softmax_backward(&x[..0], &x[..0], &mut y[..0]).unwrap();
}

/// Lists of classes: more than there are, than can be, or none.
#[test]
fn rankings() {
    let logits = [0.5f32; N];
    let call = CrossEntropy::new(ROWS, CLASSES);
    let (mut classes, mut log_probs) = ([77; N], [MARK; N]);
    for (count, text) in [
        (0, "top_classes is given, but top_count = 0".to_string()),
        (CLASSES + 1, format!("top_count = {} exceeds classes = {CLASSES}", CLASSES + 1)),
        (65, "top_count = 65 exceeds 64".to_string()),
        (usize::MAX, format!("top_count = {} exceeds 64", usize::MAX)),
    ] {
        let results = Results {
            top_count: count,
            top_classes: Some(&mut classes),
            top_log_probs: Some((&mut log_probs).into()),
            ..Results::default()
        };
        assert_eq!(call.evaluate(&logits, results), Err(Error::Param(text)));
    }
    // A slice that is too short for the list.
    let results =
        Results { top_count: 2, top_classes: Some(&mut classes[..2]), ..Results::default() };
    assert!(matches!(call.evaluate(&logits, results), Err(Error::Shape(_))));
    assert_eq!((classes, log_probs), ([77; N], [MARK; N]));

    let mut ranks = [77; ROWS];
    let mut asking = |targets: Input| {
        let results = Results { target_ranks: Some(&mut ranks), ..Results::default() };
        call.forward_with(&logits, targets, results)
    };
    let needs = param("target_ranks needs targets that are class indices");
    assert_eq!(asking((&[0.25f32; N]).into()), Err(needs));
    assert_eq!(ranks, [77; ROWS]);
    let results = Results { target_ranks: Some(&mut ranks), ..Results::default() };
    assert_eq!(call.evaluate(&logits, results), Err(Error::Null("targets is NULL".to_string())));
}
