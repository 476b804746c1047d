//! What the Rust surface has beside slices: other threads, pools of the program, pointers, memory without
//! values, arrays.

use std::mem::MaybeUninit;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use xent::{
    CrossEntropy, Error, Input, Linear, LinearGrads, Output, Partial, Pool, PoolRef, Reduction,
    Results, Softmax,
};

const ROWS: usize = 3;
const CLASSES: usize = 4;
const LOGITS: [f32; 12] = [0.1, 0.2, 0.3, 0.4, 0.0, 0.0, 0.0, 2.0, -1.0, 0.5, 1.5, 0.25];
const TARGETS: [u8; 3] = [0, 3, 1];

/// The loss and the gradient of [`LOGITS`].
fn expected() -> (f64, [f32; 12]) {
    let mut grad = [0.0; 12];
    let call = CrossEntropy::new(ROWS, CLASSES);
    (call.forward_backward(&LOGITS, &TARGETS, &mut grad).unwrap(), grad)
}

/// Fails to compile if one of the types is not what a program with threads needs.
#[test]
fn types_cross_threads() {
    fn are_send_and_sync<T: Send + Sync>() {}
    are_send_and_sync::<CrossEntropy<'static>>();
    are_send_and_sync::<Softmax<'static>>();
    are_send_and_sync::<Linear<'static>>();
    are_send_and_sync::<LinearGrads<'static>>();
    are_send_and_sync::<Partial>();
    are_send_and_sync::<Input<'static>>();
    are_send_and_sync::<Output<'static>>();
    are_send_and_sync::<Results<'static>>();
    are_send_and_sync::<Reduction>();
    are_send_and_sync::<Pool>();
    are_send_and_sync::<PoolRef<'static>>();
    are_send_and_sync::<Error>();

    let weights = [1f32, 2.0, 3.0, 4.0];
    let call = CrossEntropy::new(ROWS, CLASSES).class_weights(&weights);
    let logits = Input::from(&LOGITS);
    let here = call.forward(logits, &TARGETS).unwrap();
    std::thread::scope(|scope| {
        let borrowed = scope.spawn(|| call.forward(logits, &TARGETS).unwrap());
        let moved = scope.spawn(move || call.forward(logits, &TARGETS).unwrap());
        assert_eq!([borrowed.join().unwrap(), moved.join().unwrap()], [here; 2]);
    });
}

/// A call on a pool of the program gives work to that pool: it is not done before the pool's threads, which
/// are busy with something else, have taken part.
#[test]
fn pools_of_the_program_do_the_work() {
    let threads = Arc::new(rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap());
    let logits = vec![0.5f32; 64 * 4096];
    let targets = [1u8; 64];
    let call = CrossEntropy::new(64, 4096);
    // The global pool is ready, should a call take that one.
    let expected = call.forward(&logits, &targets);
    let softmax = Softmax::new(64, 4096);
    let pool = Pool::from(Arc::clone(&threads));
    for (by, pool) in [("borrowed", PoolRef::from(&*threads)), ("shared", PoolRef::from(&pool))] {
        let busy = Arc::new(Mutex::new(()));
        let held = busy.lock().unwrap();
        for _ in 0..2 {
            let busy = Arc::clone(&busy);
            threads.spawn(move || drop(busy.lock()));
        }
        std::thread::scope(|scope| {
            let loss = scope.spawn(|| call.pool(pool).forward(&logits, &targets));
            let other = scope.spawn(|| {
                let mut y = logits.clone();
                softmax.pool(pool).softmax_in_place(&mut y)
            });
            std::thread::sleep(Duration::from_millis(300));
            assert!(!loss.is_finished() && !other.is_finished(), "{by}: done by other threads");
            drop(held);
            assert_eq!(loss.join().unwrap(), expected, "{by}");
            assert_eq!(other.join().unwrap(), Ok(()), "{by}");
        });
    }
    // The pool goes on without xent's share of it.
    drop(pool);
    assert_eq!(threads.install(|| 7), 7);
}

#[test]
fn operands_behind_pointers() {
    let (loss, grad) = expected();
    let call = CrossEntropy::new(ROWS, CLASSES);
    let mut padded = [9f32; 24];
    for (i, &x) in LOGITS.iter().enumerate() {
        padded[i / 4 * 8 + i % 4] = x;
    }
    let strides = [8, 1, 0];
    let mut to = [0f32; 12];
    let mut far = [0i32; 7];
    (far[0], far[3], far[6]) = (0, 3, 1);
    // SAFETY: three rows of four elements, 8 apart, lie in `padded`; three targets, 3 apart, in `far`; twelve
    // packed elements in `to`.
    let (logits, targets, output) = unsafe {
        (
            Input::from_raw(padded.as_ptr(), strides),
            Input::from_raw(far.as_ptr(), [3, 0, 0]),
            Output::from_raw(to.as_mut_ptr(), [0; 3]),
        )
    };
    assert_eq!(call.forward_backward(logits, targets, output), Ok(loss));
    assert_eq!(to, grad);
    // SAFETY: the rows lie in `padded`, which nothing else accesses.
    let in_place = unsafe { Output::from_raw(padded.as_mut_ptr(), strides) };
    assert_eq!(call.forward_backward_in_place(in_place, &TARGETS), Ok(loss));
    assert_eq!(padded[8..12], grad[4..8]);
    assert_eq!(padded[4..8], [9.0; 4]);

    // SAFETY: a null pointer has no elements.
    let none = unsafe { Input::from_raw(std::ptr::null::<f32>(), [0; 3]) };
    assert_eq!(call.forward(none, &TARGETS), Err(Error::Null("logits is NULL".to_string())));
    assert_eq!(call.class_weights(none).forward(&LOGITS, &TARGETS), Ok(loss));
    let odd = padded.as_ptr().cast::<u8>().wrapping_add(1).cast::<f32>();
    // SAFETY: a call refuses the operand before it reads an element.
    let odd = unsafe { Input::from_raw(odd, strides) };
    assert!(matches!(call.forward(odd, &TARGETS), Err(Error::Align(_))));
}

#[test]
fn outputs_without_values() {
    let (loss, expected) = expected();
    let call = CrossEntropy::new(ROWS, CLASSES);
    let mut grad = [const { MaybeUninit::<f32>::uninit() }; 12];
    let mut row_losses = [const { MaybeUninit::<f64>::uninit() }; ROWS];
    let mut total = 0.0;
    let results = Results {
        loss: Some(&mut total),
        row_losses: Some((&mut row_losses).into()),
        ..Results::default()
    };
    call.forward_backward_with(&LOGITS, &TARGETS, &mut grad, results).unwrap();
    assert_eq!(total, loss);
    // SAFETY: the call has written all elements.
    let sum: f64 = row_losses.iter().map(|loss| unsafe { loss.assume_init() }).sum();
    assert!((sum / 3.0 - loss).abs() < 1e-12);
    // SAFETY: the call has written all elements.
    assert_eq!(grad.map(|g| unsafe { g.assume_init() }), expected);

    // A vector that grows by what a call writes.
    let mut y = Vec::<f32>::with_capacity(12);
    let spare = &mut y.spare_capacity_mut()[..12];
    Softmax::new(ROWS, CLASSES).softmax(&LOGITS, spare).unwrap();
    // SAFETY: the call has written all 12 elements.
    unsafe { y.set_len(12) };
    assert!((y.iter().sum::<f32>() - 3.0).abs() < 1e-5);

    // No call reads such memory.
    fn fresh() -> [MaybeUninit<f32>; 12] {
        [const { MaybeUninit::uninit() }; 12]
    }
    let refused = |what: &str| Err(Error::Param(what.to_string()));
    let logits = "logits is not initialised, and a call in place reads it";
    let result = call.forward_backward_in_place(&mut fresh(), &TARGETS);
    assert_eq!(result.map(drop), refused(logits));
    let result = call.backward_in_place(&mut fresh(), &TARGETS, &[0.0; ROWS]);
    assert_eq!(result, refused(logits));
    let adds = call.accumulate(true);
    let result = adds.forward_backward(&LOGITS, &TARGETS, &mut fresh());
    let text = "grad_logits is not initialised, and a call accumulating reads it";
    assert_eq!(result.map(drop), refused(text));
    let result = adds.backward_targets(&LOGITS, &[0.25f32; 12], &[0.0; ROWS], &mut fresh());
    assert_eq!(result, refused(&text.replace("logits", "targets")));
    // Row losses are never added to.
    let results = Results { row_losses: Some((&mut row_losses).into()), ..Results::default() };
    adds.forward_backward_with(&LOGITS, &TARGETS, &mut [0f32; 12], results).unwrap();
    let softmax = Softmax::new(ROWS, CLASSES);
    let result = softmax.softmax_in_place(&mut fresh());
    assert_eq!(result, refused(&logits.replace("logits", "x")));
    let result = softmax.log_softmax_in_place(&mut fresh());
    assert_eq!(result, refused(&logits.replace("logits", "x")));
    let result = softmax.softmax_backward_in_place(&LOGITS, &mut fresh());
    assert_eq!(result, refused(&logits.replace("logits", "grad_y")));
    let result = softmax.log_softmax_backward_in_place(&LOGITS, &mut fresh());
    assert_eq!(result, refused(&logits.replace("logits", "grad_y")));
    let result = softmax.softmax_backward_over(&mut fresh(), &LOGITS);
    assert_eq!(result, refused(&logits.replace("logits", "y")));
    let result = softmax.log_softmax_backward_over(&mut fresh(), &LOGITS);
    assert_eq!(result, refused(&logits.replace("logits", "y")));
}

#[cfg(feature = "ndarray")]
mod arrays {
    use super::*;
    use ndarray::{Array, Array1, Array2, Array3, ArrayView2, Axis, arr0, arr1, s};
    use xent::Number;
    use xent::half::{bf16, f16};

    fn logits() -> Array2<f32> {
        Array2::from_shape_vec((ROWS, CLASSES), LOGITS.to_vec()).unwrap()
    }

    fn every_layout<T: Number + PartialEq + std::fmt::Debug>(number: impl Fn(f32) -> T) {
        let call = CrossEntropy::new(ROWS, CLASSES);
        let rows = logits().mapv(&number);
        let packed: Vec<T> = rows.iter().copied().collect();
        let mut grad = vec![number(0.0); 12];
        let loss = call.forward_backward(&packed, &TARGETS, &mut grad).unwrap();
        let columns = Array2::from_shape_fn((CLASSES, ROWS), |(class, row)| rows[[row, class]]);
        let mut wide = Array2::from_elem((2 * ROWS, CLASSES + 3), number(9.0));
        wide.slice_mut(s![..;2, 1..5]).assign(&rows);
        for (name, view) in [
            ("row by row", rows.view()),
            ("classes first", columns.t()),
            ("a block", wide.slice(s![..;2, 1..5])),
        ] {
            assert_eq!(call.forward(view, &arr1(&TARGETS)), Ok(loss), "{name}");
            let mut to = Array2::from_elem((CLASSES, ROWS), number(9.0)).reversed_axes();
            assert_eq!(call.forward_backward(view, &TARGETS, &mut to), Ok(loss), "{name}");
            assert_eq!(to.iter().copied().collect::<Vec<T>>(), grad, "{name}");
        }
        let mut in_place = wide.slice_mut(s![..;2, 1..5]);
        let result = call.forward_backward_in_place(in_place.view_mut(), &TARGETS);
        assert_eq!(result, Ok(loss));
        assert_eq!(in_place.iter().copied().collect::<Vec<T>>(), grad);
        assert_eq!(wide[[0, 0]], number(9.0));
        assert_eq!(wide[[1, 1]], number(9.0));
    }

    #[test]
    fn of_every_float_and_layout() {
        every_layout(|x| x);
        every_layout(f64::from);
        every_layout(bf16::from_f32);
        every_layout(f16::from_f32);
    }

    #[test]
    fn with_inner_positions() {
        let images =
            Array3::from_shape_fn((2, CLASSES, 5), |(n, c, k)| (n * 7 + c * 5 + k) as f32 / 9.0);
        let targets = Array2::from_shape_fn((2, 5), |(n, k)| ((n + k) % CLASSES) as i64);
        let weights = targets.mapv(|y| y as f64 / 2.0 + 0.5);
        let packed = (images.as_slice().unwrap(), targets.as_slice().unwrap());
        let call = CrossEntropy::new(2, CLASSES).inner(5);
        let of_slices = call.row_weights(weights.as_slice().unwrap());
        let loss = of_slices.forward(packed.0, packed.1);
        // The same elements, stored the other way round.
        let mut turned = Array::zeros((5, CLASSES, 2));
        turned.assign(&images.view().reversed_axes());
        let (turned, columns) = (turned.view().reversed_axes(), targets.t().to_owned());
        assert_eq!(call.row_weights(&weights).forward(turned, columns.t()), loss);
        // One position needs no axis, nor do its rows.
        let flat = CrossEntropy::new(2, CLASSES);
        let first = (images.slice(s![.., .., ..1]), targets.slice(s![.., ..1]));
        let expected = flat.forward(images.index_axis(Axis(2), 0), targets.column(0));
        assert_eq!(flat.forward(first.0, first.1), expected);
    }

    /// Strides of zero repeat elements; they do not stand for packed memory.
    #[test]
    fn that_are_broadcast() {
        let call = CrossEntropy::new(ROWS, CLASSES);
        let same = [0.5f32; 12];
        let one = arr0(0.5f32);
        let loss = call.forward(&same, &TARGETS);
        assert_eq!(call.forward(one.broadcast((ROWS, CLASSES)).unwrap(), &TARGETS), loss);
        let row = arr1(&LOGITS[..4]);
        let repeated = [&LOGITS[..4]; 3].concat();
        let loss = call.forward(&repeated, &TARGETS);
        assert_eq!(call.forward(row.broadcast((ROWS, CLASSES)).unwrap(), &TARGETS), loss);
        let weight = arr0(2f32);
        let expected = call.class_weights(&[2f32; 4]).forward(&LOGITS, &TARGETS);
        let weights = weight.broadcast(CLASSES).unwrap();
        assert_eq!(call.class_weights(weights).forward(&LOGITS, &TARGETS), expected);
        // The class stride alone is the one that nobody means.
        let column = arr1(&LOGITS[..3]).insert_axis(Axis(1));
        let result = call.forward(column.broadcast((ROWS, CLASSES)).unwrap(), &TARGETS);
        assert!(matches!(result, Err(Error::Stride(_))), "{result:?}");
    }

    #[test]
    fn of_other_shapes_are_refused() {
        let call = CrossEntropy::new(ROWS, CLASSES);
        let shape = |result: Result<f64, Error>, text: &str| {
            assert_eq!(result, Err(Error::Shape(text.to_string())));
        };
        let x = logits();
        shape(call.forward(x.t(), &TARGETS), "logits has the shape [4, 3], not [3, 4]");
        shape(
            call.forward(&x.flatten().to_owned(), &TARGETS),
            "logits has the shape [12], not [3, 4]",
        );
        let larger = Array2::<f32>::zeros((ROWS + 1, CLASSES));
        shape(call.forward(&larger, &TARGETS), "logits has the shape [4, 4], not [3, 4]");
        shape(call.inner(2).forward(&x, &TARGETS), "logits has the shape [3, 4], not [3, 4, 2]");
        shape(call.forward(&x, &arr1(&[0u8; 4])), "targets has the shape [4], not [3]");
        let deep = Array::<f32, _>::zeros((ROWS, CLASSES, 1, 1));
        shape(call.forward(&deep, &TARGETS), "logits has the shape 4 axes, not [3, 4]");
        let weights = Array1::<f64>::ones(ROWS);
        shape(
            call.class_weights(&weights).forward(&x, &TARGETS),
            "class_weights has the shape [3], not [4]",
        );
        let mut grad = Array2::<f32>::zeros((CLASSES, ROWS));
        let result = call.forward_backward(&x, &TARGETS, &mut grad);
        shape(result, "grad_logits has the shape [4, 3], not [3, 4]");
        // A view that runs backwards.
        let result = call.forward(x.slice(s![..;-1, ..]), &TARGETS);
        let text = "logits.strides[0] = -4 is negative".to_string();
        assert_eq!(result, Err(Error::Stride(text)));
        // An array has the strides that the caller names, if he does.
        let view: ArrayView2<f32> = x.view();
        let (loss, _) = expected();
        assert_eq!(call.forward(Input::from(view).strides([4, 1, 0]), &TARGETS), Ok(loss));
        let result = call.forward(Input::from(view).strides([5, 1, 0]), &TARGETS);
        assert!(matches!(result, Err(Error::Shape(_))), "{result:?}");
        let none = Array2::<f32>::zeros((0, CLASSES));
        CrossEntropy::new(0, CLASSES).forward(&none, &arr1::<u8>(&[])).unwrap();
        // One number, as an array of no axes or of one.
        for result in [
            call.grad_output(&arr0(2f32)).forward_backward(
                &x,
                &TARGETS,
                &mut Array2::zeros((3, 4)) as &mut Array2<f32>,
            ),
            call.grad_output(&arr1(&[2f32])).forward_backward(
                &x,
                &TARGETS,
                &mut Array2::zeros((3, 4)) as &mut Array2<f32>,
            ),
        ] {
            assert_eq!(result, Ok(loss));
        }
    }
}
