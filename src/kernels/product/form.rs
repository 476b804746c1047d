//! The forms in which products take their operands: how many numbers a step multiplies, and in which order.
//!
//! A product of bf16 goes by *pairs* of steps, of which the second comes first: `sum = a₀·b₀ + (a₁·b₁ + sum)`, each
//! multiplication and addition rounded once, with subnormal numbers as zeros. That is what the instruction of
//! AVX512_BF16 does (Intel, "64 and IA-32 Architectures Software Developer's Manual", VDPBF16PS). Sets without it do
//! the two steps one after the other, and have the same bits.

use crate::element::Element;
use crate::kernels::contiguous::convert;
use crate::kernels::scratch::Scratch;
#[cfg(x86_sets)]
use crate::simd::PairProducts;
use crate::simd::{Halves, Real, Simd, up_to};
use crate::strategy::PRODUCT_DEPTH as DEPTH;
use half::bf16;
use std::marker::PhantomData;

/// How steps lie in operands that a kernel has prepared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// One number of the lanes' type a step.
    Single,
    /// The same, with the two numbers of a pair swapped; a last one without a partner has a zero before it.
    Swapped,
    /// A pair of bf16 a step; a last number without a partner has a zero beside it.
    #[cfg_attr(not(x86_sets), allow(dead_code, reason = "x86 alone has the instruction for it"))]
    Paired,
}

impl Order {
    /// The steps that so many numbers take.
    #[inline(always)]
    pub const fn steps(self, numbers: usize) -> usize {
        match self {
            Order::Single => numbers,
            Order::Swapped => numbers.next_multiple_of(2),
            Order::Paired => numbers.div_ceil(2),
        }
    }

    /// Sets number `index` of those whose first step is at `first` to 0; `pitch` bytes lie from one step to the next.
    /// Those of [`Order::Single`] stay.
    ///
    /// # Safety
    /// There are so many numbers, and no other thread accesses this one.
    #[inline(always)]
    pub unsafe fn clear(self, first: *mut u8, index: usize, pitch: usize) {
        // SAFETY: there is the number (# Safety): an f32 at the step of its partner, which `steps` counts for a last
        // one without a partner too, or half a step.
        unsafe {
            match self {
                Order::Single => {}
                Order::Swapped => first.add((index ^ 1) * pitch).cast::<f32>().write(0.0),
                Order::Paired => {
                    first.add(index / 2 * pitch).cast::<bf16>().add(index % 2).write(bf16::ZERO);
                }
            }
        }
    }
}

/// What a kernel does with two registers of a step.
pub trait Arithmetic<S: Simd> {
    /// Adds the products of `a` and `b` to `sum`.
    ///
    /// # Safety
    /// The processor has the instructions, and the caller is inlined into a function that is compiled for them.
    unsafe fn step(s: S, a: S::Vector, b: S::Vector, sum: S::Vector) -> S::Vector;
}

/// A fused multiply-add.
pub enum Fused {}

impl<S: Simd> Arithmetic<S> for Fused {
    #[inline(always)]
    unsafe fn step(s: S, a: S::Vector, b: S::Vector, sum: S::Vector) -> S::Vector {
        s.mul_add(a, b, sum)
    }
}

/// The products of a pair of bf16.
#[cfg(x86_sets)]
pub enum Dots {}

#[cfg(x86_sets)]
impl<S: PairProducts> Arithmetic<S> for Dots {
    #[inline(always)]
    unsafe fn step(s: S, a: S::Vector, b: S::Vector, sum: S::Vector) -> S::Vector {
        // SAFETY: the processor has the instructions, and the caller is compiled for them (# Safety).
        unsafe { s.multiply_pairs(a, b, sum) }
    }
}

/// Rows that lie apart, a register of each at the same columns.
pub trait Registers<S: Simd> {
    /// How many rows there are.
    fn count(&self) -> usize;
    /// Loads the register of a row.
    ///
    /// # Safety
    /// There is the row, and it is readable at these columns.
    unsafe fn load(&self, s: S, row: usize) -> S::Vector;
}

/// Registers of rows of `E`, from a column on.
pub struct Columns<'a, E> {
    rows: &'a [*const u8],
    column: usize,
    /// The lanes that there are columns for, a bit for each.
    lanes: u32,
    elements: PhantomData<E>,
}

impl<'a, E> Columns<'a, E> {
    /// The columns from `column` on that there are of `columns`.
    #[inline(always)]
    pub fn new<S: Simd>(rows: &'a [*const u8], column: usize, columns: usize) -> Self {
        let lanes = up_to::<S>(columns.saturating_sub(column));
        Columns { rows, column, lanes, elements: PhantomData }
    }
}

impl<S: Simd, E: Element<S>> Registers<S> for Columns<'_, E> {
    #[inline(always)]
    fn count(&self) -> usize {
        self.rows.len()
    }

    #[inline(always)]
    unsafe fn load(&self, s: S, row: usize) -> S::Vector {
        // SAFETY: there is the row, readable at the columns from `column` on that have a bit (# Safety).
        unsafe {
            let from = (*self.rows.as_ptr().add(row)).cast::<E>().wrapping_add(self.column);
            if self.lanes == up_to::<S>(S::LANES) {
                E::load(s, from)
            } else {
                E::load_lanes(s, from, self.lanes, S::Real::ZERO)
            }
        }
    }
}

/// How a caller's numbers become the steps of a product.
pub trait Form<S: Simd> {
    /// The caller's numbers.
    type Element: Element<S>;
    /// How steps lie.
    const ORDER: Order;
    /// The numbers of a row may be read where they lie, if they are whole steps.
    const DIRECT: bool;

    /// Prepares `len` numbers of a row: steps side by side.
    ///
    /// # Safety
    /// `from` has `len` readable numbers; `to` has room for as many lanes, rounded up to whole registers. They do not
    /// overlap.
    unsafe fn stage(s: S, from: *const Self::Element, len: usize, to: *mut S::Real);

    /// Prepares a register of a step whose numbers are in different rows.
    ///
    /// # Safety
    /// [`Registers::load`] applies to every row; the step is one of those that the rows make.
    unsafe fn join(s: S, step: usize, rows: &impl Registers<S>) -> S::Vector;
}

/// One number a step.
pub struct Single<E>(PhantomData<E>);

impl<S: Simd, E: Element<S>> Form<S> for Single<E> {
    type Element = E;
    const ORDER: Order = Order::Single;
    const DIRECT: bool = E::NATIVE;

    #[inline(always)]
    unsafe fn stage(s: S, from: *const E, len: usize, to: *mut S::Real) {
        // SAFETY: `from` has `len` readable numbers, and `to` room for as many lanes, apart from them (# Safety).
        unsafe { convert::widen::<S, E>(s, from.cast(), len, to.cast()) }
    }

    #[inline(always)]
    unsafe fn join(s: S, step: usize, rows: &impl Registers<S>) -> S::Vector {
        // SAFETY: each row is a step (# Safety).
        unsafe { rows.load(s, step) }
    }
}

/// Pairs of bf16 in two steps.
pub enum Swapped {}

impl<S: Halves> Form<S> for Swapped {
    type Element = bf16;
    const ORDER: Order = Order::Swapped;
    const DIRECT: bool = false;

    #[inline(always)]
    unsafe fn stage(s: S, from: *const bf16, len: usize, to: *mut f32) {
        // SAFETY: `from` has the numbers, and `to` room for as many lanes in whole registers (# Safety): for the zero
        // that follows an odd number of them, too.
        unsafe {
            convert::widen::<S, bf16>(s, from.cast(), len, to.cast());
            if len % 2 == 1 {
                to.add(len).write(0.0);
            }
        }
        for pair in 0..len.div_ceil(2) {
            let pair = to.cast::<u64>().wrapping_add(pair);
            // SAFETY: `widen` above has written both numbers of the pair, or a number and then the zero beside it.
            unsafe { pair.write_unaligned(pair.read_unaligned().rotate_left(32)) };
        }
    }

    #[inline(always)]
    unsafe fn join(s: S, step: usize, rows: &impl Registers<S>) -> S::Vector {
        let row = step ^ 1;
        // SAFETY: `row` is below the number of rows, by the comparison, and rows are readable at these columns
        // (# Safety).
        if row < rows.count() { unsafe { rows.load(s, row) } } else { s.splat(0.0) }
    }
}

/// Pairs of bf16 in one step.
#[cfg(x86_sets)]
pub enum Paired {}

#[cfg(x86_sets)]
impl<S: PairProducts> Form<S> for Paired {
    type Element = bf16;
    const ORDER: Order = Order::Paired;
    const DIRECT: bool = true;

    #[inline(always)]
    unsafe fn stage(s: S, from: *const bf16, len: usize, to: *mut f32) {
        let (from, to) = (from.cast::<u16>(), to.cast::<u16>());
        // Masked loads, or the loop would become a call of memcpy.
        for at in (0..len).step_by(S::LANES) {
            let lanes = up_to::<S>(len - at);
            // SAFETY: `lanes` has bits for numbers from `at` on below `len`, which `from` has; `to` has room for twice
            // as many (# Safety).
            unsafe {
                s.store_half_lanes(to.add(at), lanes, s.load_half_lanes(from.add(at), lanes, 0))
            };
        }
        if len % 2 == 1 {
            // SAFETY: `to` has room for twice `len` numbers (# Safety), and `len` is odd, so 1 at least.
            unsafe { to.add(len).write(0) };
        }
    }

    #[inline(always)]
    unsafe fn join(s: S, step: usize, rows: &impl Registers<S>) -> S::Vector {
        let row = 2 * step;
        // SAFETY: the step has a first row (# Safety), and a second by the comparison.
        unsafe {
            let first = rows.load(s, row);
            let second = if row + 1 < rows.count() { rows.load(s, row + 1) } else { s.splat(0.0) };
            s.join_pairs(first, second)
        }
    }
}

/// A form of pairs: a first operand that is in lanes is rounded to bf16 before it is multiplied, and subnormal numbers
/// are zeros.
pub trait Pairs<S: Halves>: Form<S, Element = bf16> {}

impl<S: Halves> Pairs<S> for Swapped {}

#[cfg(x86_sets)]
impl<S: PairProducts> Pairs<S> for Paired {}

/// Rounds `len` lanes of a row, and prepares them as steps side by side.
///
/// # Safety
/// `from` has `len` readable lanes, at most [`DEPTH`]; `to` has room for as many, rounded up to whole registers. They do
/// not overlap.
#[inline(always)]
pub unsafe fn stage_row<S: Halves, F: Pairs<S>>(s: S, from: *const u8, len: usize, to: *mut u8) {
    let mut short = Scratch::<DEPTH>::new();
    let short = short.start().cast::<bf16>();
    // SAFETY: `from` has the lanes, at most DEPTH, and `to` room for them (# Safety); the scratch has room for DEPTH
    // numbers.
    unsafe {
        convert::narrow::<S, bf16>(s, from, len, short.cast());
        F::stage(s, short, len, to.cast());
    }
}

/// Rounds lanes of rows, and prepares their columns: a row for each step, `pitch` lanes apart.
///
/// # Safety
/// Each of `rows` has `columns` readable lanes; `to` has room for the steps. They do not overlap.
#[inline(always)]
pub unsafe fn stage_columns<S: Halves, F: Pairs<S>>(
    s: S,
    rows: &[*const u8],
    columns: usize,
    to: *mut u8,
    pitch: usize,
) {
    for step in 0..F::ORDER.steps(rows.len()) {
        let to = to.cast::<f32>().wrapping_add(step * pitch);
        for column in (0..columns).step_by(S::LANES) {
            let registers = Rounded(Columns::new::<S>(rows, column, columns));
            let lanes = registers.0.lanes;
            // SAFETY: each row has the columns that are left, for which `lanes` has bits, and `to` room for the steps
            // that the rows make (# Safety), this one among them.
            unsafe {
                let joined = F::join(s, step, &registers);
                if lanes == up_to::<S>(S::LANES) {
                    s.store(to.wrapping_add(column), joined);
                } else {
                    s.store_lanes(to.wrapping_add(column), lanes, joined);
                }
            };
        }
    }
}

/// Registers of lanes, rounded to bf16.
struct Rounded<'a>(Columns<'a, f32>);

impl<S: Halves> Registers<S> for Rounded<'_> {
    #[inline(always)]
    fn count(&self) -> usize {
        self.0.rows.len()
    }

    #[inline(always)]
    unsafe fn load(&self, s: S, row: usize) -> S::Vector {
        // SAFETY: there is the row, readable at these columns (# Safety).
        s.widen_bf16(s.narrow_bf16(unsafe { self.0.load(s, row) }))
    }
}
