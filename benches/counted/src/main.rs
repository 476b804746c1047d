//! Instructions, counted by callgrind, that single calls execute on one thread with AVX2. Counts do
//! not depend on the load of the machine; `cargo xtask counted` compares them with `counted.txt`.
//!
//! callgrind counts inside of [`xent_counted_call`] and writes a file whenever it returns. The names
//! of the calls, with what their counts are to be divided by, go to standard output in that order.

#[path = "../../common/mod.rs"]
mod common;

use common::aligned::Aligned;
use common::call::{Call, Layout, Operands, Shape};
use common::scalar::Scalar;
use std::hint::black_box;
use xent::half::{bf16, f16};
use xent::{CrossEntropy, Isa, Linear, LinearGrads};

/// The function that callgrind counts in. `cargo xtask counted` gives callgrind its name.
#[unsafe(no_mangle)]
#[inline(never)]
fn xent_counted_call(call: &mut dyn FnMut()) {
    call();
    black_box(());
}

/// Counts one call, with a name and a number of elements that its instructions are shared by.
fn count<T: Scalar>(shape: Shape, call: Call, elements: usize) {
    let operands = Operands::<T>::new(shape, call);
    let mut x = Aligned::new(&operands.original);
    let mut grad = Aligned::filled(shape.elements(), T::default());
    // The first call of a process does more than later ones, and is not counted.
    operands.run(call, Isa::Avx2, 1, &mut x, &mut grad);
    x.copy_from_slice(&operands.original);
    xent_counted_call(&mut || {
        operands.run(call, Isa::Avx2, 1, &mut x, &mut grad);
    });
    println!("{elements} {} {shape} {}", T::NAME, call.name());
}

fn each<T: Scalar>() {
    for (rows, classes) in [(6400, 10), (2000, 32), (64, 1000), (2, 50_257)] {
        let shape = Shape::rows(rows, classes);
        for call in [Call::Forward, Call::Backward, Call::Both, Call::InPlace] {
            count::<T>(shape, call, shape.elements());
        }
    }
    let image = Shape::inner(2, 21, 2048);
    for call in [Call::Forward, Call::Backward, Call::Both, Call::InPlace] {
        count::<T>(image, call, image.elements());
    }
    let columns = Shape { layout: Layout::ClassesFirst, ..Shape::rows(512, 128) };
    for call in [Call::Forward, Call::Both] {
        count::<T>(columns, call, columns.elements());
    }
}

/// Counts the calls of a linear layer, by the logit that is not stored.
fn count_linear<T: Scalar>() {
    let (rows, classes, features) = (96, 1000, 256);
    let value = |i: usize| T::of((i * 37 % 64) as f64 / 64.0 - 0.5);
    let hidden: Vec<T> = (0..rows * features).map(value).collect();
    let weight: Vec<T> = (0..classes * features).map(value).collect();
    let targets: Vec<i32> = (0..rows).map(|row| (row * 7 % classes) as i32).collect();
    let (mut grad_hidden, mut grad_weight) = (hidden.clone(), weight.clone());
    let call = CrossEntropy::new(rows, classes).isa(Isa::Avx2).threads(1);
    let linear = Linear::new(call, features);
    let mut forward = || {
        linear.forward(&hidden, &weight, &targets).expect("a valid call");
    };
    forward();
    xent_counted_call(&mut forward);
    println!("{} {} linear {rows}x{features}x{classes} forward", rows * classes, T::NAME);
    let mut both = || {
        let grads = LinearGrads {
            hidden: Some((&mut grad_hidden).into()),
            weight: Some((&mut grad_weight).into()),
            ..LinearGrads::default()
        };
        linear.forward_backward(&hidden, &weight, &targets, grads).expect("a valid call");
    };
    xent_counted_call(&mut both);
    println!("{} {} linear {rows}x{features}x{classes} both", rows * classes, T::NAME);
}

fn main() {
    if !Isa::Avx2.is_available() {
        println!("skipped: no AVX2");
        return;
    }
    each::<f32>();
    each::<f64>();
    each::<bf16>();
    each::<f16>();
    count_linear::<f32>();
    count_linear::<f64>();
    count_linear::<bf16>();
    let shape = Shape::rows(64, 1000);
    for call in Call::ALL.into_iter().skip(4) {
        count::<f32>(shape, call, shape.elements());
    }
    // By the call: what there is before and after the rows.
    for call in [Call::Forward, Call::Both] {
        count::<f32>(Shape::rows(1, 10), call, 1);
    }
}
