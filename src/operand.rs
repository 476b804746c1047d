//! The operands of the Rust surface: slices, memory behind pointers, and, with the feature `ndarray`,
//! arrays.

use crate::codes::*;
use crate::validate::operand::Operand;
use std::marker::PhantomData;
use std::mem::MaybeUninit;

mod sealed {
    pub trait Sealed {
        const DTYPE: u32;
    }
}

/// An element of an operand: f32, f64, bf16, f16, i64, i32, u32, u16 or u8. The call checks that the
/// operand can have this type ([`Error::Dtype`](crate::Error::Dtype)).
pub trait Number: sealed::Sealed + Copy {}

macro_rules! numbers {
    ($($type:ty => $dtype:ident),*) => {$(
        impl sealed::Sealed for $type {
            const DTYPE: u32 = $dtype;
        }
        impl Number for $type {}
    )*};
}
numbers!(half::bf16 => XENT_BF16, half::f16 => XENT_F16, f32 => XENT_F32, f64 => XENT_F64,
    i64 => XENT_I64, i32 => XENT_I32, u32 => XENT_U32, u16 => XENT_U16, u8 => XENT_U8);

/// An operand that a call reads: a slice, packed unless [`strides`](Self::strides) are given; memory
/// [behind a pointer](Self::from_raw); or, with the feature `ndarray`, an array or a view of one.
#[derive(Clone, Copy)]
pub struct Input<'a> {
    pub(crate) operand: Operand,
    memory: PhantomData<&'a [u8]>,
}

// SAFETY: an `Input` is a shared borrow of numbers, which any thread may read. Whoever made it of a pointer
// vouched for that (`from_raw`).
unsafe impl Send for Input<'_> {}
// SAFETY: an `Input` is a shared borrow of numbers, which any thread may read. Whoever made it of a pointer
// vouched for that (`from_raw`).
unsafe impl Sync for Input<'_> {}

impl Input<'_> {
    /// Strides of rows, classes and inner positions, in elements. An operand without a class axis
    /// ignores the second. All zero = packed. Elements may repeat: a stride may be 0, except that the
    /// class stride of logits is not 0 beside a row stride that is not
    /// ([`Error::Stride`](crate::Error::Stride)).
    ///
    /// With strides any axis can be the class axis. Here the classes come first:
    ///
    /// ```
    /// use xent::{CrossEntropy, Input};
    ///
    /// let columns = [0.1f32, 2.0, 0.2, 0.0, 0.3, 0.0, 0.4, 0.0]; // [classes = 4, rows = 2]
    /// let logits = Input::from(&columns).strides([1, 2, 1]);
    /// let loss = CrossEntropy::new(2, 4).forward(logits, &[0i32, 0])?;
    /// assert!((loss - (1.5425 + 0.3408) / 2.0).abs() < 1e-4);
    /// # Ok::<(), xent::Error>(())
    /// ```
    pub fn strides(mut self, strides: [i64; 3]) -> Self {
        self.operand = self.operand.with_strides(strides);
        self
    }

    /// Memory behind a pointer to the first element, for tensors of another library. The strides are
    /// those of [`strides`](Self::strides); all zero = packed. A null pointer makes an absent operand.
    ///
    /// ```
    /// # use xent::{CrossEntropy, Input};
    /// let logits = [0.1f32, 0.2, 0.3, 9.0, 0.3, 0.2, 0.1, 9.0]; // 3 classes, padded to 4
    /// // SAFETY: the rows of a call of 2 rows and 3 classes lie in `logits`, which outlives the call.
    /// let rows = unsafe { Input::from_raw(logits.as_ptr(), [4, 1, 0]) };
    /// CrossEntropy::new(2, 3).forward(rows, &[0u8, 2])?;
    /// # Ok::<(), xent::Error>(())
    /// ```
    ///
    /// # Safety
    /// In each call that gets the operand, while `'a` lasts:
    ///
    /// - Every element that the call's shape and the strides reach from `data` is an initialised `T`
    ///   within one allocation. The call checks the alignment, and that offsets fit the address space.
    /// - Nobody writes the elements, except the call itself through an output that is exactly in place.
    /// - Any thread may read the elements.
    pub unsafe fn from_raw<T: Number>(data: *const T, strides: [i64; 3]) -> Self {
        let operand = Operand { strides, ..Operand::packed(data.cast_mut(), T::DTYPE) };
        Input { operand, memory: PhantomData }
    }
}

/// An operand that a call writes: a slice, packed unless [`strides`](Self::strides) are given; memory
/// [behind a pointer](Self::from_raw); or, with the feature `ndarray`, an array or a mutable view of one.
///
/// The slice may be of `MaybeUninit`, so that nobody fills memory that the call overwrites. After a call
/// that returns `Ok` every element that the shape and the strides reach is initialised. A call that would
/// read such memory, in place or to accumulate, is an [`Error::Param`](crate::Error::Param).
///
/// ```
/// # use xent::CrossEntropy;
/// let logits = [0.1f32, 0.2, 0.3, 0.4];
/// let mut grad = Vec::<f32>::with_capacity(4);
/// CrossEntropy::new(1, 4).forward_backward(&logits, &[0u8], &mut grad.spare_capacity_mut()[..4])?;
/// // SAFETY: the call has written all 4 elements.
/// unsafe { grad.set_len(4) };
/// assert!((grad[0] + 0.7862).abs() < 1e-4);
/// # Ok::<(), xent::Error>(())
/// ```
pub struct Output<'a> {
    pub(crate) operand: Operand,
    memory: PhantomData<&'a mut [u8]>,
}

// SAFETY: an `Output` is an exclusive borrow of numbers, which any one thread may access. Whoever made it of
// a pointer vouched for that (`from_raw`).
unsafe impl Send for Output<'_> {}
// SAFETY: a shared `Output` gives no access to its memory.
unsafe impl Sync for Output<'_> {}

impl Output<'_> {
    /// As [`Input::strides`]; no two elements may share an address.
    pub fn strides(mut self, strides: [i64; 3]) -> Self {
        self.operand = self.operand.with_strides(strides);
        self
    }

    /// Memory behind a pointer to the first element, as [`Input::from_raw`]; no two elements may share
    /// an address.
    ///
    /// # Safety
    /// In the call that gets the operand, while `'a` lasts:
    ///
    /// - Every element that the call's shape and the strides reach from `data` lies within one
    ///   allocation, where a `T` may be written. With
    ///   [`zero_padding`](crate::CrossEntropy::zero_padding) that holds for what lies between rows too.
    ///   The elements are initialised if the call works in place or accumulates. The call checks the
    ///   alignment, and that offsets fit the address space.
    /// - Nobody else accesses the elements.
    /// - Any thread may access the elements.
    pub unsafe fn from_raw<T: Number>(data: *mut T, strides: [i64; 3]) -> Self {
        let operand = Operand { strides, ..Operand::packed(data, T::DTYPE) };
        Output { operand, memory: PhantomData }
    }
}

fn operand<T: Number>(data: *const T, len: usize) -> Operand {
    Operand { available: len, ..Operand::packed(data.cast_mut(), T::DTYPE) }
}

macro_rules! operands {
    ($($from:ty),*) => {$(
        impl<'a, T: Number> From<&'a $from> for Input<'a> {
            fn from(slice: &'a $from) -> Self {
                Input { operand: operand(slice.as_ptr(), slice.len()), memory: PhantomData }
            }
        }
        impl<'a, T: Number> From<&'a mut $from> for Output<'a> {
            fn from(slice: &'a mut $from) -> Self {
                let len = slice.len();
                Output { operand: operand(slice.as_mut_ptr(), len), memory: PhantomData }
            }
        }
    )*};
}
operands!([T], Vec<T>);

impl<'a, T: Number, const N: usize> From<&'a [T; N]> for Input<'a> {
    fn from(array: &'a [T; N]) -> Self {
        array.as_slice().into()
    }
}
impl<'a, T: Number, const N: usize> From<&'a mut [T; N]> for Output<'a> {
    fn from(array: &'a mut [T; N]) -> Self {
        array.as_mut_slice().into()
    }
}

impl<'a, T: Number> From<&'a mut [MaybeUninit<T>]> for Output<'a> {
    fn from(slice: &'a mut [MaybeUninit<T>]) -> Self {
        let operand = operand(slice.as_mut_ptr().cast::<T>(), slice.len());
        Output { operand: Operand { is_uninit: true, ..operand }, memory: PhantomData }
    }
}
impl<'a, T: Number, const N: usize> From<&'a mut [MaybeUninit<T>; N]> for Output<'a> {
    fn from(array: &'a mut [MaybeUninit<T>; N]) -> Self {
        array.as_mut_slice().into()
    }
}

#[cfg(feature = "ndarray")]
mod arrays {
    use super::{Input, Number, Output, operand};
    use crate::validate::operand::{ArrayShape, Operand};
    use ndarray::{ArrayBase, ArrayView, ArrayViewMut, Data, DataMut, Dimension};
    use std::marker::PhantomData;

    /// The operand whose elements are those of an array.
    fn described<T: Number>(data: *const T, sizes: &[usize], strides: &[isize]) -> Operand {
        let last = |&size: &usize| size.saturating_sub(1);
        // A negative stride is refused, whatever it reaches.
        let reach = |(size, &stride): (&usize, &isize)| last(size) * stride.unsigned_abs();
        let available = if sizes.contains(&0) {
            0
        } else {
            1 + sizes.iter().zip(strides).map(reach).sum::<usize>()
        };
        let array = ArrayShape::new(sizes);
        let stride = |axis: usize| strides.get(axis).map_or(0, |&stride| stride as i64);
        let strides = match sizes.len() {
            // The one axis is that of rows, or of classes.
            1 => [stride(0), stride(0), 0],
            // The second axis is that of classes, or of inner positions.
            2 => [stride(0), stride(1), stride(1)],
            _ => [stride(0), stride(1), stride(2)],
        };
        Operand { strides, array: Some(array), ..operand(data, available) }
    }

    impl<'a, T: Number, S: Data<Elem = T>, D: Dimension> From<&'a ArrayBase<S, D>> for Input<'a> {
        fn from(array: &'a ArrayBase<S, D>) -> Self {
            let operand = described(array.as_ptr(), array.shape(), array.strides());
            Input { operand, memory: PhantomData }
        }
    }

    impl<'a, T: Number, D: Dimension> From<ArrayView<'a, T, D>> for Input<'a> {
        fn from(array: ArrayView<'a, T, D>) -> Self {
            let operand = described(array.as_ptr(), array.shape(), array.strides());
            Input { operand, memory: PhantomData }
        }
    }

    impl<'a, T: Number + 'a, S: DataMut<Elem = T>, D: Dimension> From<&'a mut ArrayBase<S, D>>
        for Output<'a>
    {
        fn from(array: &'a mut ArrayBase<S, D>) -> Self {
            array.view_mut().into()
        }
    }

    impl<'a, T: Number, D: Dimension> From<ArrayViewMut<'a, T, D>> for Output<'a> {
        fn from(mut array: ArrayViewMut<'a, T, D>) -> Self {
            let data = array.as_mut_ptr();
            let operand = described(data, array.shape(), array.strides());
            Output { operand, memory: PhantomData }
        }
    }
}
