//! Operands between pages without access: no call touches memory before the first element or after the
//! last, even with a partly filled register.
#![cfg(unix)]

use common::is_sampled;
use xent::half::{bf16, f16};
use xent::{
    CrossEntropy, Input, Isa, Linear, LinearGrads, Number, Output, Reduction, Results, Softmax,
};

/// A multiple of the page size of every system.
const PAGE: usize = 1 << 16;

/// Numbers that begin directly after such a page, or end directly before one.
struct Fenced<T> {
    map: *mut libc::c_void,
    bytes: usize,
    start: *mut T,
    len: usize,
}

impl<T: Number> Fenced<T> {
    fn new(values: &[T], at_end: bool) -> Fenced<T> {
        let size = size_of_val(values);
        let room = size.next_multiple_of(PAGE);
        let bytes = room + 2 * PAGE;
        let (kind, none) = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, libc::PROT_NONE);
        // SAFETY: mmap returned a new mapping. Everything between its first and its last page becomes
        // accessible. The values fit there, and are aligned, since their size is a multiple of their
        // alignment.
        unsafe {
            let map = libc::mmap(std::ptr::null_mut(), bytes, none, kind, -1, 0);
            assert!(map != libc::MAP_FAILED, "no address space for {bytes} bytes");
            let open = map.cast::<u8>().add(PAGE);
            let access = libc::PROT_READ | libc::PROT_WRITE;
            assert!(libc::mprotect(open.cast(), room, access) == 0, "mprotect");
            let start = open.add(if at_end { room - size } else { 0 }).cast::<T>();
            start.copy_from_nonoverlapping(values.as_ptr(), values.len());
            Fenced { map, bytes, start, len: values.len() }
        }
    }

    fn get(&self) -> &[T] {
        // SAFETY: `new` wrote the `len` values at this address.
        unsafe { std::slice::from_raw_parts(self.start, self.len) }
    }

    fn get_mut(&mut self) -> &mut [T] {
        // SAFETY: `new` wrote the `len` values at this address, and `self` is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.len) }
    }
}

impl<T> Drop for Fenced<T> {
    fn drop(&mut self) {
        // SAFETY: `new` made the mapping with this length; no borrow of it outlives `self`.
        unsafe {
            libc::munmap(self.map, self.bytes);
        }
    }
}

/// `[rows, classes, inner]`: full and partly filled registers, full and partly filled tiles, chunks, and
/// interleaved rows.
const SIZES: [[usize; 3]; 19] = [
    [1, 1, 1],
    [1, 5, 1],
    [3, 10, 1],
    [13, 31, 1],
    [16, 31, 1],
    [64, 13, 1],
    [35, 33, 1],
    [67, 16, 1],
    [9, 64, 1],
    [2, 130, 1],
    [5, 203, 1],
    [3, 2049, 1],
    [5, 4032, 1],
    [10, 8200, 1],
    [1, 5, 3],
    [2, 40, 17],
    [1, 33, 61],
    [3, 4, 67],
    [2, 300, 2],
];

fn calls<T: Number>(of: fn(f64) -> T, isa: Isa) {
    let (first, step) = if is_sampled() { (1, 3) } else { (0, 1) };
    for [rows, classes, inner] in SIZES.into_iter().skip(first).step_by(step) {
        let numbers =
            |n: usize| -> Vec<T> { (0..n).map(|i| of((i * 7 % 23) as f64 / 8.0 - 1.0)).collect() };
        let (n, positions) = (rows * classes * inner, rows * inner);
        let gap = 3;
        let labels: Vec<i32> = (0..positions).map(|i| (i * 5 % classes) as i32).collect();
        // Packed, classes first, and with gaps between the rows.
        let transposed = [inner as i64, positions as i64, 1];
        let apart = [(classes * inner + gap) as i64, inner as i64, 1];
        for (at_end, strides) in
            [(true, [0; 3]), (false, [0; 3]), (true, transposed), (true, apart)]
        {
            let n = if strides == apart { n + (rows - 1) * gap } else { n };
            let fence = |values: &[T]| Fenced::new(values, at_end);
            let mut grad = fence(&numbers(n));
            let (y, p) = (Fenced::new(&labels, at_end), fence(&numbers(n)));
            let mut entropy = Fenced::new(&vec![0f64; positions], at_end);
            let mut argmax = Fenced::new(&vec![0i64; positions], at_end);
            for (softcap, bonus) in [(0.0, 0.0), (4.0, 0.0), (0.0, 0.5), (4.0, 0.5)] {
                let mut x = fence(&numbers(n));
                let call = CrossEntropy::new(rows, classes).inner(inner).isa(isa).softcap(softcap);
                let call = call.entropy_bonus(bonus).reduction(Reduction::Sum).threads(1);
                let from = |x: &Fenced<T>| call.forward(input(x, strides), y.get()).unwrap();
                let loss = from(&x);
                let fused = call
                    .forward_backward(input(&x, strides), y.get(), output(&mut grad, strides))
                    .unwrap();
                assert_eq!(loss, fused, "{rows} {classes} {inner} on {}", isa.name());
                let results = Results {
                    entropy: Some(entropy.get_mut().into()),
                    argmax: Some(argmax.get_mut()),
                    ..Results::default()
                };
                call.forward_with(input(&x, strides), input(&p, strides), results).unwrap();
                call.forward_backward(
                    input(&x, strides),
                    input(&p, strides),
                    output(&mut grad, strides),
                )
                .unwrap();
                let fused =
                    call.forward_backward_in_place(output(&mut x, strides), y.get()).unwrap();
                assert_eq!(loss, fused, "{rows} {classes} {inner} in place on {}", isa.name());
            }
            let weights = fence(&numbers(classes));
            for (smoothing, weighs) in [(0.1, false), (0.1, true), (0.0, true)] {
                let mut x = fence(&numbers(n));
                let mut call = CrossEntropy::new(rows, classes).inner(inner).isa(isa).threads(1);
                call = call.label_smoothing(smoothing).reduction(Reduction::Sum);
                if weighs {
                    call = call.class_weights(weights.get());
                }
                let loss = call.forward(input(&x, strides), y.get()).unwrap();
                for accumulate in [false, true] {
                    let (x, call) = (input(&x, strides), call.accumulate(accumulate));
                    let fused = call.forward_backward(x, y.get(), output(&mut grad, strides));
                    assert_eq!(loss, fused.unwrap(), "{rows} {classes} {inner} on {}", isa.name());
                }
                let fused =
                    call.forward_backward_in_place(output(&mut x, strides), y.get()).unwrap();
                assert_eq!(loss, fused, "{rows} {classes} {inner} in place on {}", isa.name());
            }
            let mut x = fence(&numbers(n));
            let call = Softmax::new(rows, classes).inner(inner).isa(isa).threads(1);
            call.softmax(input(&x, strides), output(&mut grad, strides)).unwrap();
            call.log_softmax_in_place(output(&mut x, strides)).unwrap();
            call.softmax_backward(
                input(&p, strides),
                input(&x, strides),
                output(&mut grad, strides),
            )
            .unwrap();
        }
    }
}

/// `[rows, classes, features]`.
const LAYERS: [[usize; 3]; 7] =
    [[1, 1, 1], [3, 5, 7], [7, 300, 33], [13, 67, 260], [25, 16, 64], [70, 257, 17], [5, 32, 33]];

fn layers<T: Number>(of: fn(f64) -> T, isa: Isa) {
    for [rows, classes, features] in LAYERS {
        let numbers =
            |n: usize| -> Vec<T> { (0..n).map(|i| of((i * 7 % 23) as f64 / 8.0 - 1.0)).collect() };
        for at_end in [true, false] {
            let fence = |values: &[T]| Fenced::new(values, at_end);
            let (h, w) = (fence(&numbers(rows * features)), fence(&numbers(classes * features)));
            let (mut dh, mut dw) =
                (fence(&numbers(rows * features)), fence(&numbers(classes * features)));
            let (b, mut db) = (fence(&numbers(classes)), fence(&numbers(classes)));
            let labels: Vec<i32> = (0..rows).map(|i| (i * 5 % classes) as i32).collect();
            let (y, p) = (Fenced::new(&labels, at_end), fence(&numbers(rows * classes)));
            for softcap in [0.0, 4.0] {
                let call = CrossEntropy::new(rows, classes).isa(isa).softcap(softcap).threads(1);
                let layer = Linear::new(call, features).bias(b.get());
                macro_rules! grads {
                    () => {
                        LinearGrads {
                            hidden: Some(dh.get_mut().into()),
                            weight: Some(dw.get_mut().into()),
                            bias: Some(db.get_mut().into()),
                        }
                    };
                }
                layer.forward_backward(h.get(), w.get(), y.get(), grads!()).unwrap();
                layer.forward_backward(h.get(), w.get(), p.get(), grads!()).unwrap();
                let mut lse = Fenced::new(&vec![0f64; rows], at_end);
                let results = Results { lse: Some(lse.get_mut()), ..Results::default() };
                layer.evaluate(h.get(), w.get(), results).unwrap();
                layer.backward(h.get(), w.get(), y.get(), lse.get(), grads!()).unwrap();
            }
        }
    }
}

fn input<T: Number>(of: &Fenced<T>, strides: [i64; 3]) -> Input<'_> {
    Input::from(of.get()).strides(strides)
}

fn output<T: Number>(of: &mut Fenced<T>, strides: [i64; 3]) -> Output<'_> {
    Output::from(of.get_mut()).strides(strides)
}

/// Short rows and strips whose gradient is written around the caches, of more than 16 MiB.
#[test]
fn nothing_past_a_streamed_gradient_is_touched() {
    for [rows, classes, inner] in [[1045, 4029, 1], [2, 21, 100_003]] {
        let (n, positions) = (rows * classes * inner, rows * inner);
        let numbers: Vec<f32> = (0..n).map(|i| (i * 7 % 23) as f32 / 8.0 - 1.0).collect();
        let labels: Vec<i32> = (0..positions).map(|i| (i * 5 % classes) as i32).collect();
        for at_end in [true, false] {
            let (x, y) = (Fenced::new(&numbers, at_end), Fenced::new(&labels, at_end));
            let mut grad = Fenced::new(&numbers, at_end);
            for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
                let call = CrossEntropy::new(rows, classes).inner(inner).isa(isa).threads(1);
                let loss = call.forward(x.get(), y.get()).unwrap();
                let fused = call.forward_backward(x.get(), y.get(), grad.get_mut()).unwrap();
                assert_eq!(loss, fused, "{rows} {classes} {inner} on {}", isa.name());
                let sum: f64 = grad.get().iter().map(|g| f64::from(*g)).sum();
                assert!(sum.abs() < 1e-5, "{sum} on {}", isa.name());
            }
        }
    }
}

#[test]
fn nothing_past_an_operand_is_touched() {
    for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
        calls::<f32>(|x| x as f32, isa);
        calls::<f64>(|x| x, isa);
        calls::<bf16>(bf16::from_f64, isa);
        calls::<f16>(f16::from_f64, isa);
        layers::<f32>(|x| x as f32, isa);
        layers::<f64>(|x| x, isa);
        layers::<bf16>(bf16::from_f64, isa);
        layers::<f16>(f16::from_f64, isa);
    }
}
