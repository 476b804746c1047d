//! `zero_padding`: what lies between the rows of a gradient becomes 0, and nothing else changes.

use common::{Element, is_sampled, isas};
use xent::half::{bf16, f16};
use xent::{CrossEntropy, Error, Input, Isa, Output, Pool, Reduction};

/// How a gradient is asked for.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Way {
    Fused,
    FusedInPlace,
    Backward,
    BackwardInPlace,
    Accumulated,
}

const WAYS: [Way; 5] =
    [Way::Fused, Way::FusedInPlace, Way::Backward, Way::BackwardInPlace, Way::Accumulated];

/// Elements around the matrix.
const MARGIN: usize = 64;

/// A matrix of `rows` rows of `classes` numbers, `stride` apart. Canaries fill the rest.
struct Matrix<T> {
    memory: Vec<T>,
    rows: usize,
    classes: usize,
    stride: usize,
}

impl<T: Element> Matrix<T> {
    fn new(rows: usize, classes: usize, stride: usize, number: impl Fn(usize) -> T) -> Matrix<T> {
        let mut memory = vec![T::CANARY; 2 * MARGIN + rows * stride];
        for row in 0..rows {
            for class in 0..classes {
                memory[MARGIN + row * stride + class] = number(row * classes + class);
            }
        }
        Matrix { memory, rows, classes, stride }
    }

    /// From the first element to the last.
    fn span(&self) -> std::ops::Range<usize> {
        let last = self.rows.saturating_sub(1) * self.stride + self.classes;
        MARGIN..MARGIN + if self.rows == 0 { 0 } else { last }
    }

    fn strides(&self) -> [i64; 3] {
        [self.stride as i64, 1, 0]
    }

    fn input(&self) -> Input<'_> {
        Input::from(&self.memory[self.span()]).strides(self.strides())
    }

    fn output(&mut self) -> Output<'_> {
        let (span, strides) = (self.span(), self.strides());
        Output::from(&mut self.memory[span]).strides(strides)
    }

    /// The call wrote what it writes without the option, and 0 between the rows.
    fn check(&self, plain: &Matrix<T>, what: &str) {
        let span = self.span();
        let is_between = |i: usize| span.contains(&i) && (i - MARGIN) % self.stride >= self.classes;
        for (i, (got, plain)) in self.memory.iter().zip(&plain.memory).enumerate() {
            let expected = if is_between(i) { 0 } else { plain.bits() };
            assert_eq!(
                got.bits(),
                expected,
                "{what}: element {} of the matrix",
                i as i64 - MARGIN as i64
            );
        }
    }
}

#[derive(Clone, Copy, Debug)]
struct Case {
    rows: usize,
    classes: usize,
    padding: usize,
    threads: u32,
}

fn run<T: Element>(case: Case, way: Way, isa: Isa, pool: &Pool, number: impl Fn(f32) -> T) {
    let Case { rows, classes, padding, threads } = case;
    let stride = classes + padding;
    let logit = |i: usize| number((i * 37 % 101) as f32 / 25.0 - 2.0);
    let targets: Vec<i32> =
        (0..rows).map(|i| if i % 3 == 1 { -100 } else { (i * 5 % classes) as i32 }).collect();
    let logits = Matrix::new(rows, classes, stride + 3, logit);
    let mut lse = vec![0.0; rows];
    let base = CrossEntropy::new(rows, classes).pool(pool).threads(threads).isa(isa);
    base.lse(logits.input(), &mut lse).unwrap();
    let gradient = |zero: bool| {
        let call = base.zero_padding(zero).accumulate(way == Way::Accumulated);
        let mut grad = Matrix::new(rows, classes, stride, logit);
        match way {
            Way::Fused | Way::Accumulated => {
                call.forward_backward(logits.input(), &targets, grad.output()).map(drop)
            }
            Way::FusedInPlace => call.forward_backward_in_place(grad.output(), &targets).map(drop),
            Way::Backward => call.backward(logits.input(), &targets, &lse, grad.output()),
            Way::BackwardInPlace => call.backward_in_place(grad.output(), &targets, &lse),
        }
        .unwrap();
        grad
    };
    gradient(true).check(&gradient(false), &format!("{case:?} {way:?} on {isa:?}"));
}

#[test]
fn what_lies_between_rows_becomes_zero() {
    let pool = Pool::new(2).unwrap();
    for isa in isas() {
        for way in WAYS {
            for rows in [0, 1, 2, 9, 131] {
                for classes in [1, 3, 40, 257, 2100] {
                    for padding in [0, 1, 47] {
                        if is_sampled() && classes > 257 {
                            continue;
                        }
                        let case = Case { rows, classes, padding, threads: 2 };
                        run(case, way, isa, &pool, |x| x);
                        if rows == 9 {
                            run(case, way, isa, &pool, f64::from);
                            run(case, way, isa, &pool, bf16::from_f32);
                            run(case, way, isa, &pool, f16::from_f32);
                        }
                    }
                }
            }
        }
    }
}

/// Threads that share each row, and streamed stores.
#[test]
fn long_rows() {
    let pool = Pool::new(3).unwrap();
    for way in WAYS {
        for threads in [1, 3] {
            let case = Case { rows: 2, classes: 300_001, padding: 63, threads };
            run(case, way, Isa::best(), &pool, |x| x);
        }
    }
    let case = Case { rows: 40, classes: 50_257, padding: 47, threads: 0 };
    run(case, Way::Fused, Isa::best(), &pool, |x| x);
}

#[test]
fn calls_without_a_gradient_of_the_logits_ignore_it() {
    let call = CrossEntropy::new(2, 3).zero_padding(true);
    let (x, soft) = ([0.5f32; 8], [0.25f32; 8]);
    let padded = |x| Input::from(x).strides([5, 1, 0]);
    assert_eq!(
        call.forward(padded(&x), &[0u8, 2]),
        CrossEntropy::new(2, 3).forward(padded(&x), &[0u8, 2])
    );
    // grad_targets has padding of its own, which stays.
    let mut grad = [7f32; 8];
    let to = Output::from(&mut grad).strides([5, 1, 0]);
    call.backward_targets(padded(&x), padded(&soft), &[0.0; 2], to).unwrap();
    assert_eq!(grad[3..5], [7.0; 2]);
    // Any layout serves calls to which the option does not apply.
    CrossEntropy::new(2, 2).inner(2).zero_padding(true).forward(&x, &[0u8; 4]).unwrap();
}

/// Only rows of contiguous classes have a padding.
#[test]
fn layouts_without_padding_are_refused() {
    let (x, mut grad) = ([0.5f32; 12], [7f32; 12]);
    let text = |inner: usize, class: i64| {
        Err(Error::Param(format!(
            "ZERO_PADDING needs rows of contiguous classes: inner = {inner} and grad_logits.strides[1] = {class} must be 1"
        )))
    };
    let inner = CrossEntropy::new(2, 3).inner(2).zero_padding(true);
    assert_eq!(inner.forward_backward(&x, &[0u8; 4], &mut grad), text(2, 2));
    let call = CrossEntropy::new(2, 3).zero_padding(true);
    let to = Output::from(&mut grad).strides([1, 2, 0]);
    assert_eq!(call.forward_backward(&x, &[0u8; 2], to), text(1, 2));
    let to = Output::from(&mut grad).strides([1, 3, 0]);
    assert_eq!(call.backward(&x, &[0u8; 2], &[0.0; 2], to).map(|()| 0.0), text(1, 3));
    assert_eq!(grad, [7.0; 12]);
    // One class has no stride, and no row has no layout.
    let to = Output::from(&mut grad).strides([5, 9, 0]);
    CrossEntropy::new(2, 1).zero_padding(true).forward_backward(&x, &[0u8; 2], to).unwrap();
    assert_eq!(grad, [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 7.0, 7.0, 7.0, 7.0, 7.0, 7.0]);
    let none = CrossEntropy::new(0, 3).inner(2).zero_padding(true);
    none.reduction(Reduction::Sum).forward_backward(&x[..0], &[0u8; 0], &mut grad[..0]).unwrap();
}

/// Columns beside the gradient are apart from it, unless its padding is cleared.
#[test]
fn padding_counts_for_overlaps() {
    let call = CrossEntropy::new(3, 4);
    let mut matrix = [0.5f32; 30];
    let start = matrix.as_mut_ptr();
    // SAFETY: the slices share no element that a call accesses; those that would are refused.
    let (logits, grad) = unsafe {
        let logits = std::slice::from_raw_parts(start.add(4), 24);
        (logits, std::slice::from_raw_parts_mut(start, 24))
    };
    let columns = Input::from(logits).strides([10, 1, 0]);
    let to = Output::from(&mut *grad).strides([10, 1, 0]);
    call.forward_backward(columns, &[0u8; 3], to).unwrap();
    let before = grad.to_vec();
    let to = Output::from(&mut *grad).strides([10, 1, 0]);
    let result = call.zero_padding(true).forward_backward(columns, &[0u8; 3], to);
    let text = "grad_logits with its padding overlaps logits";
    assert_eq!(result, Err(Error::Overlap(text.to_string())));
    assert_eq!(grad, before);
}
