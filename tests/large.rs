//! More elements than 32 bits can count: by strides over sparse memory, and in tests that run only by
//! name, real elements.
//!
//! ```sh
//! cargo test --release --test large -- --ignored
//! ```

use common::isas;
use common::operand::Dtype;
use rayon::prelude::*;
use xent::half::{bf16, f16};
use xent::{CrossEntropy, Input, Isa, Number, Output, Results, Softmax};

/// Zeros. The system provides a page when it is written.
struct Sparse<T> {
    start: *mut T,
    len: usize,
}

impl<T: Number> Sparse<T> {
    /// `None` if the system has no such address space.
    #[cfg(unix)]
    fn new(len: usize) -> Option<Sparse<T>> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let bytes = len * size_of::<T>();
        // SAFETY: the call asks for a new mapping at an address of the system's choice.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), bytes, protection, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            println!("SKIPPED: no address space for {bytes} bytes");
            return None;
        }
        Some(Sparse { start: start.cast(), len })
    }
    #[cfg(not(unix))]
    fn new(_: usize) -> Option<Sparse<T>> {
        println!("SKIPPED: maps memory with mmap");
        None
    }

    fn all(&mut self) -> &mut [T] {
        // SAFETY: the mapping holds `len` numbers, 0 until written, and `self` is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.len) }
    }
}

impl<T> Drop for Sparse<T> {
    fn drop(&mut self) {
        #[cfg(unix)]
        // SAFETY: `new` made the mapping with this length; no slice of it outlives `self`.
        unsafe {
            libc::munmap(self.start.cast(), self.len * size_of::<T>());
        }
    }
}

/// A dtype of logits.
trait Float: Number + PartialEq + std::fmt::Debug + Send + Sync {
    fn of(x: f64) -> Self;
    fn real(self) -> f64;
}
macro_rules! floats {
    ($($type:ident: $of:expr, $real:expr;)*) => {$(
        impl Float for $type {
            fn of(x: f64) -> $type {
                $of(x)
            }
            fn real(self) -> f64 {
                $real(self)
            }
        }
    )*};
}
floats! {
    f32: |x| x as f32, f64::from;
    f64: |x| x, |x| x;
    bf16: bf16::from_f64, f64::from;
    f16: f16::from_f64, f64::from;
}

/// Strides of rows, classes and positions past 2^31 and 2^32 elements. Truncated to 32 bits, each would
/// lead to other elements of the same operand, which are 0.
const FAR: [i64; 3] = [(1 << 31) + 7, (1 << 32) + 5, (1 << 33) - 1];

/// `[2, 3, 2]` with a huge stride along one axis or all, by every call, against the same numbers with
/// small strides in the same order of axes.
fn by_strides<T: Float>(isa: Isa) {
    let [rows, classes, inner] = [2usize, 3, 2];
    let values: Vec<T> = (0..12).map(|i| T::of(f64::from(i * 5 % 12) * 0.25 - 1.0)).collect();
    let soft = values.iter().map(|x| T::of(x.real().abs() / 4.0)).collect::<Vec<T>>();
    let y = [2i32, 0, 1, 2];
    let call = CrossEntropy::new(rows, classes).inner(inner).isa(isa);
    let softmax = Softmax::new(rows, classes).inner(inner).isa(isa);
    for far in FAR {
        for axes in [[true, false, false], [false, true, false], [false, false, true], [true; 3]] {
            let scale = if axes == [true; 3] { [1, 4, 12] } else { [1; 3] };
            let near = [6i64, 2, 1];
            let strides: [i64; 3] =
                std::array::from_fn(|axis| if axes[axis] { far * scale[axis] } else { near[axis] });
            let place = |i: usize| {
                let at = [i / 6, i / 2 % 3, i % 2];
                (0..3).map(|axis| at[axis] * strides[axis] as usize).sum::<usize>()
            };
            let len = place(11) + 1;
            assert!(len > 1 << 31);
            let Some(mut memory) = Sparse::<T>::new(len) else { return };
            let put = |memory: &mut Sparse<T>, from: &[T]| {
                let all = memory.all();
                (0..12).for_each(|i| all[place(i)] = from[i]);
            };
            let get = |memory: &mut Sparse<T>| -> Vec<T> {
                let all = memory.all();
                (0..12).map(|i| all[place(i)]).collect()
            };
            let close: [i64; 3] = match axes {
                [true, true, true] => [1, 2, 6],
                [false, true, false] => [2, 4, 1],
                [false, false, true] => [3, 1, 6],
                _ => [6, 2, 1],
            };
            let spot = |i: usize| {
                let at = [i / 6, i / 2 % 3, i % 2];
                (0..3).map(|axis| at[axis] * close[axis] as usize).sum::<usize>()
            };
            let mut packed = vec![T::of(0.0); 12];
            let what = format!("{strides:?}, {}", isa.name());
            let same = |memory: &mut Sparse<T>, packed: &[T], call: &str| {
                let far = get(memory);
                let near: Vec<T> = (0..12).map(|i| packed[spot(i)]).collect();
                assert_eq!(far, near, "{call}, {what}");
            };
            let fill = |packed: &mut [T], from: &[T]| {
                (0..12).for_each(|i| packed[spot(i)] = from[i]);
            };

            // Fused in place, then from the lse, then as targets and as their gradient.
            put(&mut memory, &values);
            fill(&mut packed, &values);
            let mut lse = [[0.0; 4]; 2];
            let [near_lse, far_lse] = &mut lse;
            let loss = call.forward(Input::from(memory.all() as &[T]).strides(strides), &y);
            assert_eq!(loss, call.forward(Input::from(&packed).strides(close), &y), "{what}");
            call.forward_backward_in_place_with(
                Output::from(&mut packed).strides(close),
                &y,
                Results { lse: Some(near_lse), ..Results::default() },
            )
            .unwrap();
            call.forward_backward_in_place_with(
                Output::from(memory.all()).strides(strides),
                &y,
                Results { lse: Some(far_lse), ..Results::default() },
            )
            .unwrap();
            assert_eq!(near_lse, far_lse, "{what}");
            same(&mut memory, &packed, "fused");
            assert!(packed.iter().any(|x| x.real() != 0.0));
            put(&mut memory, &values);
            fill(&mut packed, &values);
            call.backward_in_place(Output::from(memory.all()).strides(strides), &y, far_lse)
                .unwrap();
            call.backward_in_place(Output::from(&mut packed).strides(close), &y, near_lse).unwrap();
            same(&mut memory, &packed, "backward");
            put(&mut memory, &soft);
            fill(&mut packed, &soft);
            let near_by = Input::from(&values);
            let loss = call.forward(near_by, Input::from(memory.all() as &[T]).strides(strides));
            let near_loss = call.forward(near_by, Input::from(&packed).strides(close));
            assert_eq!(loss, near_loss, "{what}");
            let gradient = Output::from(memory.all()).strides(strides);
            call.backward_targets(near_by, Input::from(&soft), far_lse, gradient).unwrap();
            let gradient = Output::from(&mut packed).strides(close);
            call.backward_targets(near_by, Input::from(&soft), near_lse, gradient).unwrap();
            same(&mut memory, &packed, "backward_targets");
            put(&mut memory, &values);
            fill(&mut packed, &values);
            softmax.softmax_in_place(Output::from(memory.all()).strides(strides)).unwrap();
            softmax.softmax_in_place(Output::from(&mut packed).strides(close)).unwrap();
            same(&mut memory, &packed, "softmax");
        }
    }
}

/// pytorch#108345: strides past 2^32 elements along each axis, in each dtype.
#[test]
fn pytorch_108345_more_than_2_32_elements_by_strides() {
    for isa in isas() {
        by_strides::<f32>(isa);
        by_strides::<bf16>(isa);
        by_strides::<f16>(isa);
        by_strides::<f64>(isa);
    }
}

/// Logit `i`: it has 8 significant bits, as many as a bf16.
fn logit(i: usize) -> bf16 {
    let x = (i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    bf16::from_f32((x >> 56) as f32 / 16.0 - 8.0)
}

fn real_logits(len: usize) -> Vec<bf16> {
    let mut logits = vec![bf16::ZERO; len];
    logits.par_chunks_mut(1 << 16).enumerate().for_each(|(chunk, logits)| {
        logits.iter_mut().enumerate().for_each(|(i, x)| *x = logit(chunk << 16 | i));
    });
    logits
}

/// The log-sum-exp of logits `from..from + classes`, from the number of occurrences of each value.
fn exact_lse(from: usize, classes: usize) -> f64 {
    let mut counts = vec![0u64; 1 << 16];
    (from..from + classes).for_each(|i| counts[usize::from(logit(i).to_bits())] += 1);
    let mut terms: Vec<f64> = (0..1u32 << 16)
        .zip(counts)
        .filter(|(_, count)| *count > 0)
        .map(|(bits, count)| count as f64 * f64::from(bf16::from_bits(bits as u16)).exp())
        .collect();
    terms.sort_by(f64::total_cmp);
    terms.iter().sum::<f64>().ln()
}

/// The sum of a row's gradient, exact for these logits.
#[track_caller]
fn check_row(grad: &[bf16], from: usize, y: usize, lse: f64, scale: f64) {
    let step = (grad.len() / 100_000).max(1);
    for c in (0..grad.len()).step_by(step).chain([0, y, grad.len() - 1]) {
        let p = (f64::from(logit(from + c)) - lse).exp();
        let want = scale * (p - f64::from(u8::from(c == y)));
        let got = f64::from(grad[c]);
        let bound = Dtype::Bf16.half_ulp(want) * 1.01 + 1e-5 * want.abs();
        assert!((got - want).abs() <= bound, "class {c} of the row at {from}: {got:e}, {want:e}");
    }
}

/// 2^31 + 2^28 real elements in many rows, in place.
#[test]
#[ignore = "4.5 GiB; run by name"]
fn more_than_2_31_real_elements_in_rows() {
    let classes = 32_768;
    let rows = ((1usize << 31) + (1 << 28)) / classes;
    let mut logits = real_logits(rows * classes);
    let targets: Vec<u16> = (0..rows).map(|row| (row * 31 % classes) as u16).collect();
    let mut losses = vec![0f64; rows];
    let mut loss = 0.0;
    let results = Results {
        loss: Some(&mut loss),
        row_losses: Some((&mut losses).into()),
        ..Results::default()
    };
    CrossEntropy::new(rows, classes)
        .grad_scale(rows as f64)
        .forward_backward_in_place_with(&mut logits, &targets, results)
        .unwrap();
    assert!((loss - losses.iter().sum::<f64>() / rows as f64).abs() < 1e-10 * loss);
    // The first and last rows, the rows around 2^31 elements, and some between.
    let middle = (1 << 31) / classes;
    let sampled = (0..rows).step_by(997).chain([middle - 1, middle, middle + 1, rows - 1]);
    for row in sampled {
        let (from, y) = (row * classes, usize::from(targets[row]));
        let lse = exact_lse(from, classes);
        let want = lse - f64::from(logit(from + y));
        assert!((losses[row] - want).abs() <= 2e-7 * (lse.abs() + 8.0), "row {row}");
        check_row(&logits[from..][..classes], from, y, lse, 1.0);
    }
}

/// 2^31 + 2^16 classes of one row, the target past 2^31.
#[test]
#[ignore = "4 GiB; run by name"]
fn more_than_2_31_real_classes_of_one_row() {
    let classes = (1usize << 31) + (1 << 16);
    let y = classes - 3;
    let mut logits = real_logits(classes);
    let (mut loss, mut lse, mut argmax) = (0.0, [0.0], [0]);
    let results = Results {
        loss: Some(&mut loss),
        lse: Some(&mut lse),
        argmax: Some(&mut argmax),
        ..Results::default()
    };
    // A gradient of 2^-20 per element would be too small to tell rows apart.
    CrossEntropy::new(1, classes)
        .grad_scale(1e9)
        .forward_backward_in_place_with(&mut logits, &[y as i64], results)
        .unwrap();
    let exact = exact_lse(0, classes);
    assert!((lse[0] - exact).abs() <= 2e-7 * exact, "{} {exact}", lse[0]);
    let want = exact - f64::from(logit(y));
    assert!((loss - want).abs() <= 2e-7 * exact, "{loss} {want}");
    let first = (0..classes).find(|&i| logit(i) == bf16::from_f32(255.0 / 16.0 - 8.0)).unwrap();
    assert_eq!(argmax[0], first as i64);
    check_row(&logits, 0, y, exact, 1e9);
}
