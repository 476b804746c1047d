//! Writes inputs, and xent's results for them on each instruction set, as raw files.
//! `peers/python/accuracy.py` compares them with PyTorch's. `cargo xtask accuracy` runs both; this bench
//! alone is `cargo bench --bench accuracy -- --directory DIR`.

mod common;

use common::scalar::{Scalar, logits, targets};
use std::path::Path;
use xent::half::{bf16, f16};
use xent::{CrossEntropy, Isa, Reduction, Results, Softmax};

/// Rows and classes.
const SHAPES: [(usize, usize); 4] = [(1000, 10), (100, 1000), (4, 32_000), (2, 128_256)];

/// Factors on logits of standard deviation 2: the logits of a trainer, and wider ones, with
/// probabilities down to the range of f32 and many confident rows.
const SPREADS: [(&str, f64); 2] = [("normal", 1.0), ("spread", 6.0)];

fn main() {
    let mut arguments = std::env::args().skip_while(|argument| argument != "--directory").skip(1);
    let Some(directory) = arguments.next() else {
        println!("accuracy: run by `cargo xtask accuracy`");
        return;
    };
    let directory = Path::new(&directory);
    each::<f32>(directory);
    each::<f64>(directory);
    each::<bf16>(directory);
    each::<f16>(directory);
}

fn each<T: Scalar>(directory: &Path) {
    for (spread, factor) in SPREADS {
        for (rows, classes) in SHAPES {
            let x: Vec<T> = logits::<f64>(rows * classes)
                .iter()
                // Further digits, which f64 holds.
                .map(|&x| T::of(factor * x * (1.0 + 1e-9 * x)))
                .collect();
            let name = format!("{}.{spread}.{rows}x{classes}", T::NAME);
            write(directory, &name, "x", &x);
            let targets = targets(rows, classes);
            for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
                let what = |what: &str| format!("{}.{what}", isa.name());
                let ce = CrossEntropy::new(rows, classes).reduction(Reduction::None).isa(isa);
                let mut grad = vec![T::default(); rows * classes];
                let (mut losses, mut lse) = (vec![0f64; rows], vec![0f64; rows]);
                let results = Results {
                    row_losses: Some((&mut losses).into()),
                    lse: Some(&mut lse),
                    ..Results::default()
                };
                ce.forward_backward_with(&x, &targets, &mut grad, results).expect("valid");
                write(directory, &name, &what("loss"), &losses);
                write(directory, &name, &what("lse"), &lse);
                write(directory, &name, &what("gradient"), &grad);
                ce.backward(&x, &targets, &lse, &mut grad).expect("valid");
                write(directory, &name, &what("backward"), &grad);
            }
        }
    }
    exponentials::<T>(directory);
}

/// A row whose first logit is 0 and whose other exponentials are too small to change a sum of 1: its
/// softmax consists of the exponentials.
fn exponentials<T: Scalar>(directory: &Path) {
    let (rows, classes) = (64, 2048);
    let lowest = if T::of(1e-30).exact() == 0.0 { -9.0 } else { -80.0 };
    let x: Vec<T> = (0..rows * classes)
        .map(|i| if i % classes == 0 { 0.0 } else { lowest * (0.25 + 0.75 * fraction(i)) })
        .map(T::of)
        .collect();
    let name = format!("{}.low.{rows}x{classes}", T::NAME);
    write(directory, &name, "x", &x);
    for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
        let mut y = vec![T::default(); x.len()];
        Softmax::new(rows, classes).isa(isa).softmax(&x, &mut y).expect("valid");
        write(directory, &name, &format!("{}.softmax", isa.name()), &y);
    }
}

/// Evenly spread numbers in [0, 1): multiples of the golden ratio.
fn fraction(i: usize) -> f64 {
    (i as f64 * 0.618_033_988_749_894_9).fract()
}

/// The bytes of the elements, in the machine's order.
fn write<T: Copy>(directory: &Path, name: &str, what: &str, elements: &[T]) {
    // SAFETY: floats have no padding, so every byte of the slice is initialised; bytes need no alignment.
    let bytes = unsafe {
        std::slice::from_raw_parts(elements.as_ptr().cast::<u8>(), size_of_val(elements))
    };
    std::fs::write(directory.join(format!("{name}.{what}")), bytes)
        .expect("a directory to write to");
}
