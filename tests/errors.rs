//! What the safe API refuses, with what words; and that a refused call writes nothing.
//!
//! `Null`, `Struct` and `Align` cannot come from slices; tests/c provokes them.

mod common;

use common::isas;
use xent::{CrossEntropy, Error, Input, Isa, Output, Reduction, Results};

const ROWS: usize = 3;
const CLASSES: usize = 4;
const MARK: f64 = 1234.5;

type Build<'a> = &'a dyn Fn(CrossEntropy<'static>) -> CrossEntropy<'static>;

/// Calls every pass with the options and strides; all must be refused with `expected`, leaving
/// every output as it was. `gradient_only`: a forward does not look at what is wrong.
#[track_caller]
fn refused(build: Build, targets: Input<'_>, gradient_only: bool, expected: &Error) {
    let logits = [0.5f32; ROWS * CLASSES];
    for isa in isas() {
        let call = build(CrossEntropy::new(ROWS, CLASSES)).isa(isa);
        let mut grad = [MARK as f32; ROWS * CLASSES];
        let mut in_place = logits;
        let (mut loss, mut normalizer, mut kept_rows) = (MARK, MARK, 77);
        let (mut row_losses, mut lse) = ([MARK; ROWS], [MARK; ROWS]);
        for pass in 0..5 {
            let results = Results {
                loss: Some(&mut loss),
                row_losses: Some((&mut row_losses).into()),
                lse: Some(&mut lse),
                normalizer: Some(&mut normalizer),
                kept_rows: Some(&mut kept_rows),
                ..Results::default()
            };
            let result = match pass {
                0 if gradient_only => continue,
                0 => call.forward_with(&logits, targets, results),
                1 => call.forward_backward_with(&logits, targets, &mut grad, results),
                2 => call.forward_backward_in_place_with(&mut in_place, targets, results),
                3 => call.backward(&logits, targets, &[1.0; ROWS], &mut grad),
                _ => call.backward_in_place(&mut in_place, targets, &[1.0; ROWS]),
            };
            assert_eq!(result.as_ref(), Err(expected), "pass {pass}");
        }
        assert_eq!((grad, in_place), ([MARK as f32; ROWS * CLASSES], logits));
        assert_eq!((loss, normalizer, kept_rows), (MARK, MARK, 77));
        assert_eq!((row_losses, lse), ([MARK; ROWS], [MARK; ROWS]));
    }
}

/// A call that must be refused; the words.
#[track_caller]
fn words<T: std::fmt::Debug>(result: Result<T, Error>) -> String {
    result.unwrap_err().to_string()
}

#[test]
fn targets() {
    for (targets, row, value) in
        [([0i64, 1, 4], 2, 4), ([-1, 9, 2], 0, -1), ([0, i64::MIN, 2], 1, i64::MIN)]
    {
        let expected = Error::Target { row, value, classes: CLASSES };
        refused(&|call| call, (&targets).into(), false, &expected);
        let text = format!("targets[{row}] = {value} is outside [0, 4)");
        assert_eq!(expected.to_string(), text);
    }
    // Every option that has the targets read one by one.
    let expected = Error::Target { row: 1, value: 200, classes: CLASSES };
    let targets = [0u8, 200, 201];
    for build in [
        &|call: CrossEntropy<'static>| call.row_mask(&[1u8, 1, 0]) as CrossEntropy<'static>,
        &|call: CrossEntropy<'static>| call.class_weights(&[1f32; CLASSES]),
        &|call: CrossEntropy<'static>| call.row_weights(&[1f64, 0.0, 1.0]),
    ] as [Build; 3]
    {
        refused(build, (&targets).into(), false, &expected);
    }
    // Not an error: never looked at.
    let mask = CrossEntropy::new(ROWS, CLASSES).row_mask(&[1u8, 0, 0]);
    mask.forward(&[0f32; ROWS * CLASSES], &targets).unwrap();
}

#[test]
fn options() {
    let targets = [0i32, 1, 2];
    let param = |text: &str| Error::Param(text.to_string());
    for (epsilon, text) in [(1.5, "1.5"), (-0.1, "-0.1"), (f64::NAN, "NaN"), (f64::INFINITY, "inf")]
    {
        let expected = param(&format!("label_smoothing = {text} is outside [0, 1]"));
        let build = &|call: CrossEntropy<'static>| call.label_smoothing(epsilon);
        refused(build, (&targets).into(), false, &expected);
    }
    for (normalizer, text) in [(-1.0, "-1"), (f64::NAN, "NaN"), (f64::INFINITY, "inf")] {
        let expected = param(&format!("normalizer = {text} is not a finite number >= 0"));
        let build = &|call: CrossEntropy<'static>| call.normalizer(normalizer);
        refused(build, (&targets).into(), false, &expected);
    }
    for (scale, text) in [(f64::NAN, "NaN"), (f64::INFINITY, "inf"), (f64::NEG_INFINITY, "-inf")] {
        let expected = param(&format!("grad_scale = {text} is not finite"));
        let build = &|call: CrossEntropy<'static>| call.grad_scale(scale);
        refused(build, (&targets).into(), true, &expected);
    }
    // Unless it is NONE that is asked for.
    let call = CrossEntropy::new(ROWS, CLASSES).reduction(Reduction::None);
    let logits = [0f32; ROWS * CLASSES];
    let text = "reduction none has no reduced loss; ask for row_losses";
    assert_eq!(words(call.forward(&logits, &targets)), text);
    let mut grad = [MARK as f32; ROWS * CLASSES];
    let both = call.forward_backward(&logits, &targets, &mut grad);
    assert_eq!(both, Err(param(text)));
    assert_eq!(grad, [MARK as f32; ROWS * CLASSES]);
    call.backward(&logits, &targets, &[1.0; ROWS], &mut grad).unwrap();
}

#[test]
fn instruction_sets() {
    for isa in Isa::ALL {
        let call = CrossEntropy::new(1, 2).isa(isa);
        let result = call.forward(&[0f32; 2], &[0u8]);
        if isa.is_available() {
            result.unwrap();
        } else {
            let text = format!("this processor does not have {}", isa.name());
            assert_eq!(result, Err(Error::Param(text)));
        }
    }
}

#[test]
fn dtypes() {
    let call = CrossEntropy::new(ROWS, CLASSES);
    let x = [0f32; ROWS * CLASSES];
    let y = [0i32; ROWS];
    let dtype = |result: Result<f64, Error>, text: &str| {
        assert_eq!(result, Err(Error::Dtype(text.to_string())));
    };
    dtype(
        call.forward(&[0i32; ROWS * CLASSES], &y),
        "logits.dtype is I32; it can be F32, BF16, F16",
    );
    dtype(
        call.forward(&x, &[0f32; ROWS]),
        "targets.dtype is F32; it can be I64, I32, U32, U16, U8",
    );
    dtype(
        call.class_weights(&[1i64; CLASSES]).forward(&x, &y),
        "class_weights.dtype is I64; it can be F32, F64, BF16, F16",
    );
    dtype(
        call.row_weights(&[1u8; ROWS]).forward(&x, &y),
        "row_weights.dtype is U8; it can be F32, F64, BF16, F16",
    );
    dtype(call.row_mask(&[1i32; ROWS]).forward(&x, &y), "row_mask.dtype is I32; it can be U8");
    let mut grad = [7i32; ROWS * CLASSES];
    dtype(
        call.forward_backward(&x, &y, &mut grad),
        "grad_logits.dtype is I32; it can be F32, BF16, F16",
    );
    assert_eq!(grad, [7; ROWS * CLASSES]);
    let mut grad = [MARK as f32; ROWS * CLASSES];
    dtype(
        call.grad_output(&[1u16]).forward_backward(&x, &y, &mut grad),
        "grad_output.dtype is U16; it can be F32, F64, BF16, F16",
    );
    let mut losses = [7i32; ROWS];
    let results = Results { row_losses: Some((&mut losses).into()), ..Results::default() };
    assert_eq!(
        words(call.forward_with(&x, &y, results)),
        "row_losses.dtype is I32; it can be F32, F64"
    );
    assert_eq!((losses, grad), ([7; ROWS], [MARK as f32; ROWS * CLASSES]));
}

#[test]
fn shapes() {
    let call = CrossEntropy::new(ROWS, CLASSES);
    let x = [0f32; ROWS * CLASSES];
    let y = [0i32; ROWS];
    let short = |name: &str, len: usize, last: usize| {
        let text =
            format!("{name} has {len} elements, but its shape and strides reach element {last}");
        Err(Error::Shape(text))
    };
    assert_eq!(call.forward(&x[1..], &y), short("logits", 11, 11));
    assert_eq!(call.forward(&x[..0], &y), short("logits", 0, 11));
    assert_eq!(call.forward(&x, &y[1..]), short("targets", 2, 2));
    assert_eq!(call.class_weights(&[1f32; 3]).forward(&x, &y), short("class_weights", 3, 3));
    assert_eq!(call.row_weights(&[1f64; 2]).forward(&x, &y), short("row_weights", 2, 2));
    assert_eq!(call.row_mask(&[1u8; 2]).forward(&x, &y), short("row_mask", 2, 2));
    assert_eq!(call.forward(Input::from(&x).strides([5, 1, 0]), &y), short("logits", 12, 13));
    let mut grad = [MARK as f32; ROWS * CLASSES];
    assert_eq!(call.forward_backward(&x, &y, &mut grad[1..]), short("grad_logits", 11, 11));
    let per_row = call.reduction(Reduction::None).grad_output(&[1f32; 2]);
    assert_eq!(
        per_row.backward(&x, &y, &[1.0; ROWS], &mut grad),
        short("grad_output", 2, 2).map(|_: f64| ())
    );
    assert_eq!(call.backward(&x, &y, &[1.0; 2], &mut grad), short("lse", 2, 2).map(|_: f64| ()));
    assert_eq!(call.lse(&x, &mut [0.0; 2]), short("lse", 2, 2).map(|_: f64| ()));
    assert_eq!(grad, [MARK as f32; ROWS * CLASSES]);
    let mut losses = [MARK; 2];
    let results = Results { row_losses: Some((&mut losses).into()), ..Results::default() };
    assert_eq!(call.forward_with(&x, &y, results), short("row_losses", 2, 2).map(|_: f64| ()));
    assert_eq!(losses, [MARK; 2]);

    let mut argmax = [7; 2];
    let results = Results { argmax: Some(&mut argmax), ..Results::default() };
    assert_eq!(call.forward_with(&x, &y, results), short("argmax", 2, 2).map(|_: f64| ()));
    assert_eq!(argmax, [7; 2]);

    assert_eq!(words(CrossEntropy::new(3, 0).forward(&x, &y)), "classes = 0, but there are 3 rows");
    for [rows, classes] in [
        [usize::MAX, 2],
        [2, usize::MAX],
        [1 << 32, 1 << 32],
        [(1 << 31) + 1, 1 << 33],
        [0, usize::MAX],
    ] {
        let refused = CrossEntropy::new(rows, classes).forward(&x, &y);
        let text = format!("rows*classes*inner = {rows}*{classes}*1 overflows");
        assert_eq!(refused, Err(Error::Shape(text)));
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
    stride(
        call.forward(logits([i64::MAX, 1, 0]), &y),
        &format!("logits.strides[0] = {} reaches past the address space", i64::MAX),
    );
    stride(
        call.forward(logits([8, 2, 0]), &y),
        "logits.strides[1] = 2; this version takes contiguous classes",
    );
    stride(
        call.forward(&x, Input::from(&y).strides([-1, 0, 0])),
        "targets.strides[0] = -1 is negative",
    );
    let mut grad = [MARK as f32; 64];
    stride(
        call.forward_backward(&x, &y, Output::from(&mut grad).strides([3, 1, 0])),
        "grad_logits.strides[0] = 3 makes elements of an output share an address: it must be at least 4",
    );
    // In place the rows would overwrite one another's logits.
    stride(
        call.forward_backward_in_place(Output::from(&mut grad).strides([2, 1, 0]), &y),
        "grad_logits.strides[0] = 2 makes elements of an output share an address: it must be at least 4",
    );
    let mut losses = [MARK; ROWS];
    let results = Results {
        row_losses: Some(Output::from(&mut losses).strides([0, 7, 7])),
        ..Results::default()
    };
    call.forward_with(&x, &y, results).unwrap();
    // Inputs may share: here all rows are one.
    call.forward(logits([0, 1, 0]), &y).unwrap();
    assert_eq!(grad, [MARK as f32; 64]);
}

/// The one overlap that safe Rust can ask for.
#[test]
fn overlaps() {
    let call = CrossEntropy::new(ROWS, CLASSES).accumulate(true);
    let y = [0i32; ROWS];
    let mut x = [0.5f32; ROWS * CLASSES];
    let expected =
        Error::Overlap("grad_logits cannot be accumulated in place of logits".to_string());
    assert_eq!(call.forward_backward_in_place(&mut x, &y), Err(expected.clone()));
    assert_eq!(call.backward_in_place(&mut x, &y, &[1.0; ROWS]), Err(expected));
    assert_eq!(x, [0.5; ROWS * CLASSES]);
}

/// Of several errors the one that is checked first is reported.
#[test]
fn order() {
    let x = [0f32; ROWS * CLASSES];
    let bad = [9i32; ROWS];
    let call = CrossEntropy::new(ROWS, CLASSES);
    let twice = call.label_smoothing(2.0);
    assert!(matches!(twice.forward(&x, &bad), Err(Error::Param(_))));
    let strided = Input::from(&x).strides([-1, 1, 0]);
    assert!(matches!(twice.forward(strided, &bad), Err(Error::Stride(_))));
    assert!(matches!(CrossEntropy::new(3, 0).forward(strided, &bad), Err(Error::Shape(_))));
    assert!(matches!(CrossEntropy::new(3, 0).forward(strided, &x), Err(Error::Dtype(_))));
}
