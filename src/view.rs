//! Operands in memory: element types, strides, and the reads and writes that are not vectorised.
//!
//! Validation (src/validate/) makes every view, and establishes the facts that the `SAFETY` comments of
//! drivers and kernels rely on: a view covers its whole shape in memory that the caller handed over for
//! this call, and every element is aligned to its type.

use crate::element::Float;

/// The type of the elements of an operand of real numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names are the documentation")]
pub enum FloatType {
    F32,
    F64,
    Bf16,
    F16,
}

/// The type of the elements of an operand of integers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names are the documentation")]
pub enum IntegerType {
    I64,
    I32,
    U32,
    U16,
    U8,
}

/// Evaluates an expression with a name bound to the Rust type of a [`FloatType`].
macro_rules! with_float {
    ($dtype:expr, $name:ident => $body:expr) => {
        match $dtype {
            $crate::view::FloatType::F32 => {
                type $name = f32;
                $body
            }
            $crate::view::FloatType::F64 => {
                type $name = f64;
                $body
            }
            $crate::view::FloatType::Bf16 => {
                type $name = half::bf16;
                $body
            }
            $crate::view::FloatType::F16 => {
                type $name = half::f16;
                $body
            }
        }
    };
}

/// Evaluates an expression with a name bound to the Rust type of an [`IntegerType`].
macro_rules! with_integer {
    ($dtype:expr, $name:ident => $body:expr) => {
        match $dtype {
            $crate::view::IntegerType::I64 => {
                type $name = i64;
                $body
            }
            $crate::view::IntegerType::I32 => {
                type $name = i32;
                $body
            }
            $crate::view::IntegerType::U32 => {
                type $name = u32;
                $body
            }
            $crate::view::IntegerType::U16 => {
                type $name = u16;
                $body
            }
            $crate::view::IntegerType::U8 => {
                type $name = u8;
                $body
            }
        }
    };
}
pub(crate) use with_integer;

/// An integer that is an element of an operand.
pub trait Integer: Copy {
    /// The value.
    fn value(self) -> i64;
}

macro_rules! integer {
    ($($type:ty),*) => {
        $(impl Integer for $type {
            #[inline(always)]
            fn value(self) -> i64 {
                self as i64
            }
        })*
    };
}
integer!(i64, i32, u32, u16, u8);

/// An element type: floats and integers have one each.
pub trait ElementType: Copy {
    /// Bytes of one element, which is also its alignment.
    fn size(self) -> usize;
}

impl ElementType for FloatType {
    #[inline(always)]
    fn size(self) -> usize {
        with_float!(self, T => size_of::<T>())
    }
}

impl ElementType for IntegerType {
    #[inline(always)]
    fn size(self) -> usize {
        with_integer!(self, T => size_of::<T>())
    }
}

impl FloatType {
    /// Whether the kernels compute in f32 lanes: true for every type but f64.
    #[inline(always)]
    pub fn has_f32_lanes(self) -> bool {
        match self {
            FloatType::F32 | FloatType::Bf16 | FloatType::F16 => true,
            FloatType::F64 => false,
        }
    }

    /// Whether loads and stores convert nothing: the type is f32 or f64.
    #[inline(always)]
    pub fn is_lane_type(self) -> bool {
        match self {
            FloatType::F32 | FloatType::F64 => true,
            FloatType::Bf16 | FloatType::F16 => false,
        }
    }

    /// Bytes of one lane.
    #[inline(always)]
    pub fn lane_size(self) -> usize {
        if self.has_f32_lanes() { 4 } else { 8 }
    }
}

/// One of the `rows·inner` distributions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Position {
    /// The index along the first axis.
    pub row: usize,
    /// The index along the inner axis.
    pub inner: usize,
}

impl Position {
    /// The position of operands without rows, such as class weights.
    pub const FIRST: Position = Position { row: 0, inner: 0 };
}

/// An axis of distributions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Axis {
    /// Rows, the first axis.
    Rows,
    /// Inner positions, the third axis.
    Inner,
}

/// Distributions that are neighbours along an axis.
#[derive(Clone, Copy, Debug)]
pub struct Span {
    /// The first of the distributions.
    pub first: Position,
    /// The axis along which they are neighbours.
    pub axis: Axis,
    /// How many there are.
    pub len: usize,
}

impl Span {
    /// Distribution `i` of the span.
    #[inline(always)]
    pub fn at(&self, i: usize) -> Position {
        let Position { row, inner } = self.first;
        match self.axis {
            Axis::Rows => Position { row: row + i, inner },
            Axis::Inner => Position { row, inner: inner + i },
        }
    }
}

/// An operand in memory: element `(row, class, inner)` is
/// `row·strides[0] + class·strides[1] + inner·strides[2]` elements from `data`.
#[derive(Clone, Copy, Debug)]
pub struct View<T> {
    /// The first element.
    pub data: *mut u8,
    /// The type of the elements.
    pub dtype: T,
    /// Strides of rows, classes and inner positions, in elements.
    pub strides: [isize; 3],
}

// SAFETY: a view is an address and numbers. Every access to its memory is unsafe, and asks its caller that
// no other thread writes what is read, or accesses what is written.
unsafe impl<T: Sync> Sync for View<T> {}

impl<T: ElementType> View<T> {
    /// The address of class `class` of the row at `at`.
    ///
    /// # Safety
    /// The row and the class are within the shape that the view covers.
    #[inline(always)]
    pub unsafe fn at(&self, at: Position, class: usize) -> *mut u8 {
        let [rows, classes, inner] = self.strides;
        let offset = at.row as isize * rows + class as isize * classes + at.inner as isize * inner;
        // SAFETY: the element lies in the operand's memory (# Safety), and validation checked that
        // the offset of the last element fits an isize.
        unsafe { self.data.offset(offset * self.dtype.size() as isize) }
    }

    /// Elements from one distribution to the next along an axis.
    #[inline(always)]
    pub fn stride_along(&self, axis: Axis) -> isize {
        match axis {
            Axis::Rows => self.strides[0],
            Axis::Inner => self.strides[2],
        }
    }

    /// The address of the first distribution of a span, and the elements from one to the next.
    ///
    /// # Safety
    /// The view covers the span; its elements are of type `E`.
    #[inline(always)]
    pub unsafe fn span<E>(&self, span: &Span) -> (*mut E, isize) {
        // SAFETY: the view covers the first distribution of the span (# Safety).
        (unsafe { self.at(span.first, 0) }.cast(), self.stride_along(span.axis))
    }
}

impl View<IntegerType> {
    /// The integer of a row, of an operand without a class axis.
    ///
    /// # Safety
    /// The view covers the row.
    #[inline(always)]
    pub unsafe fn integer(&self, at: Position) -> i64 {
        // SAFETY: the view covers the row (# Safety).
        let p = unsafe { self.at(at, 0) };
        // SAFETY: validation checked that the element is an aligned `T`.
        with_integer!(self.dtype, T => unsafe { *p.cast::<T>() }.value())
    }

    /// The integer at place `class` of a row.
    ///
    /// # Safety
    /// The view covers the element.
    pub unsafe fn integer_at(&self, at: Position, class: usize) -> i64 {
        // SAFETY: the view covers the element (# Safety).
        let p = unsafe { self.at(at, class) };
        // SAFETY: validation checked that the element is an aligned `T`.
        with_integer!(self.dtype, T => unsafe { *p.cast::<T>() }.value())
    }

    /// Writes an integer at a class of a row, of an i64 operand.
    ///
    /// # Safety
    /// The view covers the element, an i64, and no other thread accesses it.
    #[inline(always)]
    pub unsafe fn set_integer(&self, at: Position, class: usize, value: i64) {
        // SAFETY: the view covers the element, an aligned i64 (validation) of this thread's (# Safety).
        unsafe { *self.at(at, class).cast::<i64>() = value };
    }

    /// Writes an integer for each distribution of a span, of an i64 operand without a class axis.
    ///
    /// # Safety
    /// The view covers the span, its elements are i64, and no other thread accesses them.
    pub unsafe fn write_span(&self, span: &Span, from: &[usize]) {
        // SAFETY: the view covers the span (# Safety).
        let (p, step) = unsafe { self.span::<i64>(span) };
        for (i, &x) in from[..span.len].iter().enumerate() {
            // SAFETY: distribution `i` of the span is an aligned i64 of this thread's (# Safety).
            unsafe { *p.wrapping_offset(i as isize * step) = x as i64 };
        }
    }
}

impl FloatType {
    /// Element `i` of some that lie side by side.
    ///
    /// # Safety
    /// There are more than `i` aligned elements of the type at `from`.
    #[inline(always)]
    pub unsafe fn read(self, from: *const u8, i: usize) -> f64 {
        // SAFETY: element `i` is an aligned `T` (# Safety).
        with_float!(self, T => Float::to_f64(unsafe { *from.cast::<T>().add(i) }))
    }
}

impl View<FloatType> {
    /// A view without elements.
    pub const NOTHING: View<FloatType> =
        View { data: std::ptr::null_mut(), dtype: FloatType::F32, strides: [0; 3] };

    /// The number at a class of a row.
    ///
    /// # Safety
    /// The view covers the element.
    #[inline(always)]
    pub unsafe fn real(&self, at: Position, class: usize) -> f64 {
        // SAFETY: the view covers the element (# Safety).
        let p = unsafe { self.at(at, class) };
        // SAFETY: validation checked that the element is an aligned `T`.
        with_float!(self.dtype, T => Float::to_f64(unsafe { *p.cast::<T>() }))
    }

    /// Writes a number, rounded to the lanes' type and then to the element type.
    ///
    /// # Safety
    /// The view covers the element, and no other thread accesses it.
    #[inline(always)]
    pub unsafe fn set_real(&self, at: Position, class: usize, value: f64) {
        // SAFETY: the view covers the element (# Safety).
        let p = unsafe { self.at(at, class) };
        // SAFETY: validation checked that the element is an aligned `T`; it is this thread's (# Safety).
        with_float!(self.dtype, T => unsafe { *p.cast::<T>() = Float::from_f64(value) });
    }

    /// Reads a number for each distribution of a span of at most eight, of an operand without a class axis.
    ///
    /// # Safety
    /// The view covers the span.
    pub unsafe fn read_span(&self, span: &Span, to: &mut [f64]) {
        debug_assert!(span.len <= 8);
        // SAFETY: the view covers class 0 of each distribution (# Safety).
        unsafe { self.read_classes(span, &[0.0; 8], to) }
    }

    /// Reads one class of each distribution of a span of at most eight; a class below 0 leaves what
    /// `to` holds.
    ///
    /// # Safety
    /// The view covers the span and those classes.
    pub unsafe fn read_classes(&self, span: &Span, classes: &[f64], to: &mut [f64]) {
        /// # Safety
        /// As [`View::read_classes`], with elements of `T`.
        #[inline(always)]
        unsafe fn read<T: Float>(
            view: &View<FloatType>,
            span: &Span,
            classes: &[f64],
            to: &mut [f64],
        ) {
            // SAFETY: the view covers the span (# Safety of `read_classes`).
            let (p, step) = unsafe { view.span::<T>(span) };
            for (i, (to, &class)) in to[..span.len].iter_mut().zip(classes).enumerate() {
                if class >= 0.0 {
                    let offset = i as isize * step + class as isize * view.strides[1];
                    // SAFETY: the view covers the class of distribution `i` (# Safety of
                    // `read_classes`), an aligned `T` (validation).
                    *to = unsafe { *p.wrapping_offset(offset) }.to_f64();
                }
            }
        }
        // SAFETY: the elements are of `T`, by the dtype; the rest is this function's # Safety.
        with_float!(self.dtype, T => unsafe { read::<T>(self, span, classes, to) })
    }

    /// Writes a number for each distribution of a span, of an operand without a class axis.
    ///
    /// # Safety
    /// The view covers the span, and no other thread accesses it.
    pub unsafe fn write_span(&self, span: &Span, from: &[f64]) {
        /// # Safety
        /// As [`View::write_span`], with elements of `T`.
        #[inline(always)]
        unsafe fn write<T: Float>(view: &View<FloatType>, span: &Span, from: &[f64]) {
            // SAFETY: the view covers the span (# Safety of `write_span`).
            let (p, step) = unsafe { view.span::<T>(span) };
            for (i, &x) in from[..span.len].iter().enumerate() {
                // SAFETY: distribution `i` of the span is an aligned `T` (validation) of this
                // thread's (# Safety of `write_span`).
                unsafe { *p.wrapping_offset(i as isize * step) = T::from_f64(x) };
            }
        }
        // SAFETY: the elements are of `T`, by the dtype; the rest is this function's # Safety.
        with_float!(self.dtype, T => unsafe { write::<T>(self, span, from) })
    }

    /// Reads the classes of a row from `class` on.
    ///
    /// # Safety
    /// The view covers the row and the classes `class..class + to.len()`.
    pub unsafe fn read_row(&self, at: Position, class: usize, to: &mut [f64]) {
        /// # Safety
        /// `p` is the first of `to.len()` readable elements of `T`, `stride` apart.
        unsafe fn copy<T: Float>(p: *const u8, stride: isize, to: &mut [f64]) {
            let p = p.cast::<T>();
            if stride == 1 {
                // SAFETY: `to.len()` readable elements side by side (# Safety).
                let from = unsafe { std::slice::from_raw_parts(p, to.len()) };
                for (to, from) in to.iter_mut().zip(from) {
                    *to = from.to_f64();
                }
                return;
            }
            for (i, to) in to.iter_mut().enumerate() {
                // SAFETY: element `i < to.len()` is readable (# Safety).
                *to = unsafe { (*p.offset(i as isize * stride)).to_f64() };
            }
        }
        if to.is_empty() {
            return;
        }
        // SAFETY: the view covers class `class`, since `to` is not empty (# Safety).
        let p = unsafe { self.at(at, class) };
        // SAFETY: the elements are of `T`, by the dtype, and aligned (validation); the view covers
        // `to.len()` of them (# Safety).
        with_float!(self.dtype, T => unsafe { copy::<T>(p, self.strides[1], to) })
    }

    /// Writes the same value to the first `classes` classes of a row.
    ///
    /// # Safety
    /// The view covers the row and the classes, and no other thread accesses them.
    pub unsafe fn fill_row(&self, at: Position, classes: usize, value: f64) {
        /// # Safety
        /// `p` is the first of `len` elements of `T` that are this thread's alone.
        unsafe fn fill<T: Float>(p: *mut u8, len: usize, value: f64) {
            // SAFETY: `len` elements that no other thread accesses (# Safety).
            let row = unsafe { std::slice::from_raw_parts_mut(p.cast::<T>(), len) };
            row.fill(T::from_f64(value));
        }
        if self.strides[1] != 1 {
            for class in 0..classes {
                // SAFETY: a class of the row, which is this thread's (# Safety).
                unsafe { self.set_real(at, class, value) };
            }
            return;
        }
        // SAFETY: the view covers the row (# Safety).
        let p = unsafe { self.at(at, 0) };
        // SAFETY: the classes are side by side (stride 1), of `T` by the dtype, and this thread's
        // (# Safety).
        with_float!(self.dtype, T => unsafe { fill::<T>(p, classes, value) })
    }
}
