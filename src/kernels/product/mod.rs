//! Products of matrices in blocks: logits from hidden states and weights, and gradients of both.
//!
//! One operand is *packed*: its columns lie in panels as wide as the registers that a kernel keeps sums in
//! ([`pack`]). The other is read where it lies, one element at a time for all columns of a panel.
//!
//! **One element of a product is one chain** of fused multiply-adds over at most [`DEPTH`] numbers, in the order of
//! the steps that their [`form`] makes of them; longer products add up chains in order. How the matrices are cut into blocks, panels and threads
//! therefore changes no bit, and neither does the instruction set, if it has fused multiply-add.

pub mod form;
pub mod pack;

use crate::element::Element;
use crate::simd::{Real, Simd, up_to};
pub use crate::strategy::PRODUCT_DEPTH as DEPTH;
use form::Arithmetic;

/// Rows of a product whose sums are in registers together. With 4 registers of AVX-512 abreast they take 24 of 32,
/// with 2 of AVX2 12 of 16.
pub const ROWS: usize = 6;

/// Registers of a panel.
#[inline(always)]
const fn abreast<S: Simd>() -> usize {
    if size_of::<S::Vector>() == 64 { 4 } else { 2 }
}

/// Columns of a panel.
#[inline(always)]
pub const fn panel<S: Simd>() -> usize {
    abreast::<S>() * S::LANES
}

/// The operand of a product that is not packed.
#[derive(Clone, Copy, Debug)]
pub enum Left<'a> {
    /// Rows, each of which has its elements side by side.
    Rows(&'a [*const u8]),
    /// Columns: the rows' elements of one step lie side by side from `first` on, those of the next step `pitch`
    /// elements further.
    Columns {
        /// The first row's element of the first step.
        first: *const u8,
        /// Elements from one step to the next.
        pitch: usize,
        /// How many rows there are.
        rows: usize,
    },
}

/// A product of at most [`DEPTH`] steps, each of which multiplies what its [form](form::Form) puts into a lane.
#[derive(Clone, Copy, Debug)]
pub struct Product<'a> {
    /// The first operand, in the lanes' type.
    pub left: Left<'a>,
    /// The second, packed: a panel after the other, and in each the columns of a step after those of the step
    /// before.
    pub packed: *const u8,
    /// Steps: columns of the first operand, rows of the second.
    pub depth: usize,
    /// Columns of the second operand.
    pub columns: usize,
    /// Where each row of the product goes, in the lanes' type.
    pub out: &'a [*mut u8],
    /// The product is added to what is there; else it replaces it.
    pub adds: bool,
}

/// How a kernel finds the elements of some rows of the first operand.
trait Elements<S: Simd, const M: usize>: Copy {
    /// The element of row `i` at a step.
    ///
    /// # Safety
    /// The row has the element, and it is readable; that of a column is aligned.
    unsafe fn at(self, step: usize, i: usize) -> S::Real;
}

#[derive(Clone, Copy)]
struct RowElements<R, const M: usize>([*const R; M]);

impl<S: Simd, const M: usize> Elements<S, M> for RowElements<S::Real, M> {
    #[inline(always)]
    unsafe fn at(self, step: usize, i: usize) -> S::Real {
        // SAFETY: the row has a readable element at this step (# Safety). A caller's pairs may have any alignment.
        unsafe { self.0[i].add(step).read_unaligned() }
    }
}

#[derive(Clone, Copy)]
struct ColumnElements<R>(*const R, usize);

impl<S: Simd, const M: usize> Elements<S, M> for ColumnElements<S::Real> {
    #[inline(always)]
    unsafe fn at(self, step: usize, i: usize) -> S::Real {
        // SAFETY: the row has a readable element at this step, aligned to its type (# Safety).
        unsafe { *self.0.add(step * self.1 + i) }
    }
}

/// Computes a product.
///
/// # Safety
/// The rows of `left` have `depth` readable elements of the lanes' type, the packed panels as many columns for
/// each step; `out` has an address for each row, with room for `columns` elements that no other thread accesses.
/// The packed operand, `out` and the columns of `left` are aligned to the lanes' type. [`Arithmetic::step`] applies.
#[inline(always)]
pub unsafe fn multiply<S: Simd, A: Arithmetic<S>>(s: S, product: &Product) {
    if abreast::<S>() == 4 {
        // SAFETY: this function's own # Safety.
        unsafe { panels::<S, A, 4>(s, product) }
    } else {
        // SAFETY: this function's own # Safety.
        unsafe { panels::<S, A, 2>(s, product) }
    }
}

/// [`multiply`] with `V` registers abreast.
///
/// # Safety
/// As [`multiply`].
#[inline(always)]
unsafe fn panels<S: Simd, A: Arithmetic<S>, const V: usize>(s: S, product: &Product) {
    let Product { left, packed, depth, columns, out, .. } = *product;
    let rows = match left {
        Left::Rows(rows) => rows.len(),
        Left::Columns { rows, .. } => rows,
    };
    let mut column = 0;
    while column < columns {
        let packed = packed.cast::<S::Real>().wrapping_add(column * depth);
        let mut row = 0;
        while row < rows {
            // SAFETY: `row` is below the number of rows, each with its place in `out` (# Safety).
            unsafe {
                match rows - row {
                    1 => some_rows::<S, A, 1, V>(s, product, packed, row, column, out),
                    2 => some_rows::<S, A, 2, V>(s, product, packed, row, column, out),
                    3 => some_rows::<S, A, 3, V>(s, product, packed, row, column, out),
                    4 => some_rows::<S, A, 4, V>(s, product, packed, row, column, out),
                    5 => some_rows::<S, A, 5, V>(s, product, packed, row, column, out),
                    _ => some_rows::<S, A, ROWS, V>(s, product, packed, row, column, out),
                }
            }
            row += ROWS;
        }
        column += V * S::LANES;
    }
}

/// `M` rows of one panel.
///
/// # Safety
/// As [`multiply`]; the product has the rows `row..row + M`, and `packed` is its panel from `column` on.
#[inline(always)]
unsafe fn some_rows<S: Simd, A: Arithmetic<S>, const M: usize, const V: usize>(
    s: S,
    product: &Product,
    packed: *const S::Real,
    row: usize,
    column: usize,
    out: &[*mut u8],
) {
    let mut to = [std::ptr::null_mut::<S::Real>(); M];
    for (i, to) in to.iter_mut().enumerate() {
        // SAFETY: `out` has an address for each row (# Safety).
        let start = unsafe { *out.as_ptr().add(row + i) };
        *to = start.cast::<S::Real>().wrapping_add(column);
    }
    let columns = product.columns - column;
    let (depth, adds) = (product.depth, product.adds);
    match product.left {
        Left::Rows(rows) => {
            let mut left = [std::ptr::null::<S::Real>(); M];
            for (i, left) in left.iter_mut().enumerate() {
                // SAFETY: there are the rows `row..row + M` (# Safety).
                *left = unsafe { *rows.as_ptr().add(row + i) }.cast();
            }
            // SAFETY: the rows from `row` on have `depth` elements, the panel has as many steps, and each of `to` has
            // room from `column` on (# Safety).
            unsafe {
                chains::<S, A, _, M, V>(s, RowElements(left), packed, depth, &to, columns, adds)
            }
        }
        Left::Columns { first, pitch, .. } => {
            let left = ColumnElements(first.cast::<S::Real>().wrapping_add(row), pitch);
            // SAFETY: the columns have elements of the rows from `row` on for `depth` steps, aligned to their type, the
            // panel has as many steps, and each of `to` has room from `column` on (# Safety).
            unsafe { chains::<S, A, _, M, V>(s, left, packed, depth, &to, columns, adds) }
        }
    }
}

/// The chains of `M` rows and the columns of a panel, all in registers.
///
/// # Safety
/// `left` has `M` rows of `depth` elements, the panel at `packed` as many steps; each of `to` has room for
/// `columns`, or for a panel if that is less.
#[inline(always)]
unsafe fn chains<S: Simd, A: Arithmetic<S>, L: Elements<S, M>, const M: usize, const V: usize>(
    s: S,
    left: L,
    packed: *const S::Real,
    depth: usize,
    to: &[*mut S::Real; M],
    columns: usize,
    adds: bool,
) {
    let whole = columns >= V * S::LANES;
    let zero = s.splat(S::Real::ZERO);
    let mut sums = [[zero; V]; M];
    for to in to {
        for j in 0..V {
            s.prefetch_write(to.wrapping_add(j * S::LANES).cast());
        }
    }
    for step in 0..depth {
        let mut b = [zero; V];
        for (j, b) in b.iter_mut().enumerate() {
            // SAFETY: the panel has the step, of V registers (# Safety).
            *b = unsafe { s.load(packed.add((step * V + j) * S::LANES)) };
        }
        for (i, sums) in sums.iter_mut().enumerate() {
            // SAFETY: row `i < M` has the step (# Safety).
            let a = s.splat(unsafe { left.at(step, i) });
            for (sum, &b) in sums.iter_mut().zip(&b) {
                // SAFETY: [`Arithmetic::step`] applies to the caller ([`multiply`]).
                *sum = unsafe { A::step(s, a, b, *sum) };
            }
        }
    }
    for (to, sums) in to.iter().zip(&sums) {
        for (j, &sum) in sums.iter().enumerate() {
            let to = to.wrapping_add(j * S::LANES);
            if whole {
                // SAFETY: a panel or more is left of the columns, by the comparison, and the row has room for it
                // (# Safety).
                unsafe { s.store(to, if adds { s.add(s.load(to), sum) } else { sum }) };
            } else {
                let lanes = up_to::<S>(columns.saturating_sub(j * S::LANES));
                // SAFETY: the row has room for the lanes, of the columns that are left (# Safety).
                unsafe {
                    let sum =
                        if adds { s.add(s.load_lanes(to, lanes, S::Real::ZERO), sum) } else { sum };
                    s.store_lanes(to, lanes, sum);
                }
            }
        }
    }
}

/// Adds `len` elements times a factor to a row of a product.
///
/// # Safety
/// `x` is readable for `len` elements of `E`, and `to` has as many of the lanes' type that no other thread accesses. Both
/// are aligned.
#[inline(always)]
pub unsafe fn add_scaled<S: Simd, E: Element<S>>(
    s: S,
    x: *const u8,
    len: usize,
    factor: f64,
    to: *mut u8,
) {
    let factor = s.splat(S::Real::from_f64(factor));
    let (x, to) = (x.cast::<E>(), to.cast::<S::Real>());
    for at in (0..len).step_by(S::LANES) {
        let lanes = up_to::<S>(len - at);
        let zero = S::Real::ZERO;
        let to = to.wrapping_add(at);
        // SAFETY: `lanes` has a bit for each element from `at` on below `len`, for which `x` is readable and `to`
        // writable (# Safety).
        unsafe {
            let x = E::load_lanes(s, x.wrapping_add(at), lanes, zero);
            s.store_lanes(to, lanes, s.mul_add(x, factor, s.load_lanes(to, lanes, zero)));
        }
    }
}

/// Adds the columns of a block of rows to `columns` sums in f64: the gradient of a bias.
///
/// # Safety
/// Each row has `columns` readable elements of the lanes' type, and `sums` as many f64.
#[inline(always)]
pub unsafe fn add_columns<S: Simd>(s: S, rows: &[*const u8], columns: usize, sums: &mut [f64]) {
    let wide = s.wide();
    let step = <S::Wide as Simd>::LANES;
    let mut column = 0;
    while column < columns {
        let lanes = up_to::<S>(columns - column);
        let mut totals = s.widen(s.splat(S::Real::ZERO));
        for row in rows {
            let x = row.cast::<S::Real>().wrapping_add(column);
            // SAFETY: the row has the lanes, of the columns that are left (# Safety).
            let x = s.widen(unsafe { s.load_lanes(x, lanes, S::Real::ZERO) });
            for (total, &x) in totals.as_mut().iter_mut().zip(x.as_ref()) {
                *total = wide.add(*total, x);
            }
        }
        for (i, &total) in totals.as_ref().iter().enumerate() {
            let at = column + i * step;
            let lanes = up_to::<S::Wide>(columns.saturating_sub(at));
            let to = sums.as_mut_ptr().wrapping_add(at);
            // SAFETY: there is a sum for each of the columns that are left (# Safety).
            unsafe {
                wide.store_lanes(to, lanes, wide.add(wide.load_lanes(to, lanes, 0.0), total))
            };
        }
        column += S::LANES;
    }
}
