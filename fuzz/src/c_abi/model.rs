//! A model of include/xent.h: from the descriptors of a call it derives which codes the call may return,
//! and whether it may read the memory behind them. It is written from the header, computes in i128, and
//! shares nothing with src/validate.

use super::abi::{self, View};
use std::collections::HashSet;
use std::ops::Range;

/// Which axes an operand has.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Axes {
    Full,
    Rows,
    /// `[rows, n, inner]`
    PerRow(usize),
    Classes,
    /// `[rows, features]` and `[classes, features]`, with so many features.
    RowFeatures(usize),
    ClassFeatures(usize),
    /// So many elements.
    Elements(usize),
    One,
}

pub const FLOATS: &[u32] = &[0, 1, 2, 3];
pub const INDICES: &[u32] = &[16, 17, 18, 19, 20];
pub const INDICES_OR_FLOATS: &[u32] = &[0, 1, 2, 3, 16, 17, 18, 19, 20];
pub const LOSSES: &[u32] = &[0, 1];

/// An operand of a call.
#[derive(Clone, Copy, Debug)]
pub struct Operand {
    pub name: &'static str,
    pub view: View,
    pub axes: Axes,
    pub allowed: &'static [u32],
    pub required: bool,
    pub output: bool,
    /// An output that `replaces` may be exactly this input.
    pub replaceable: bool,
    pub replaces: bool,
    /// An output whose call writes what lies between its rows, too.
    pub fills_padding: bool,
}

/// Rows, classes, positions.
pub type Sizes = [usize; 3];

/// The outcomes that a call may have.
#[derive(Clone, Debug, Default)]
pub struct Verdict {
    /// It returns one of these.
    pub codes: Vec<i32>,
}

impl Verdict {
    fn just(code: i32) -> Verdict {
        Verdict { codes: vec![code] }
    }

    fn or(mut self, others: &[i32]) -> Verdict {
        self.codes.extend_from_slice(others);
        self
    }

    /// The descriptors are valid, or may count as valid: the call reads memory.
    pub fn touches_memory(&self) -> bool {
        self.codes.contains(&abi::OK)
    }
}

/// Bytes of an element; 1 where there is no such dtype.
pub fn size_of_dtype(dtype: u32) -> usize {
    match dtype {
        0 | 17 | 20 => 4,
        1 | 16 => 8,
        2 | 3 | 19 => 2,
        _ => 1,
    }
}

impl Operand {
    pub fn is_present(&self) -> bool {
        !self.view.data.is_null()
    }

    pub fn address(&self) -> usize {
        self.view.data as usize
    }

    pub fn sizes(&self, [rows, classes, inner]: Sizes) -> Sizes {
        match self.axes {
            Axes::Full => [rows, classes, inner],
            Axes::Rows => [rows, 1, inner],
            Axes::PerRow(count) => [rows, count, inner],
            Axes::Classes => [1, classes, 1],
            Axes::RowFeatures(features) => [rows, features, 1],
            Axes::ClassFeatures(features) => [classes, features, 1],
            Axes::Elements(count) => [1, count, 1],
            Axes::One => [1; 3],
        }
    }

    fn is_empty(&self, sizes: Sizes) -> bool {
        self.sizes(sizes).contains(&0)
    }

    /// The effective strides: those of the packed layout for all zero.
    pub fn steps(&self, sizes: Sizes) -> [i128; 3] {
        let sizes = self.sizes(sizes).map(|n| n as i128);
        let counted = |strides: [i128; 3]| {
            [0, 1, 2].map(|axis| if sizes[axis] > 1 { strides[axis] } else { 0 })
        };
        let given = counted(self.view.strides.map(i128::from));
        if given == [0; 3] {
            counted([sizes[1].saturating_mul(sizes[2]), sizes[2], 1])
        } else {
            given
        }
    }

    /// Elements from the first to the last, if strides are not negative.
    pub fn last(&self, sizes: Sizes) -> i128 {
        let steps = self.steps(sizes);
        let sizes = self.sizes(sizes);
        let span = |axis: usize| steps[axis].saturating_mul(sizes[axis] as i128 - 1);
        span(0).saturating_add(span(1)).saturating_add(span(2))
    }

    /// The bytes from the first element to the last, if strides are not negative. The end is before the
    /// start if the operand passes the end of the address space.
    pub fn span(&self, sizes: Sizes) -> Range<usize> {
        let bytes = (self.last(sizes) as usize + 1) * size_of_dtype(self.view.dtype);
        self.address()..self.address().wrapping_add(bytes)
    }

    /// The bytes that a call may access, given valid strides.
    pub fn touched(&self, sizes: Sizes) -> Vec<Range<usize>> {
        if self.is_empty(sizes) {
            return Vec::new();
        }
        if self.fills_padding {
            return vec![self.span(sizes)];
        }
        let element = size_of_dtype(self.view.dtype);
        self.places(sizes).into_iter().map(|at| at..at + element).collect()
    }

    /// The address of each element, row-major, given valid strides.
    pub fn places(&self, sizes: Sizes) -> Vec<usize> {
        if self.is_empty(sizes) {
            return Vec::new();
        }
        let steps = self.steps(sizes).map(|step| step as usize * size_of_dtype(self.view.dtype));
        let [rows, classes, inner] = self.sizes(sizes);
        let mut places = Vec::with_capacity(rows * classes * inner);
        for row in 0..rows {
            for class in 0..classes {
                for k in 0..inner {
                    let offset = row * steps[0] + class * steps[1] + k * steps[2];
                    places.push(self.address() + offset);
                }
            }
        }
        places
    }

    /// No stride is negative, no element lies past the address space, no two elements of an output share
    /// an address, the class stride of logits is not 0 beside a row stride, and features are contiguous.
    fn has_good_strides(&self, sizes: Sizes) -> bool {
        let steps = self.steps(sizes);
        let element = size_of_dtype(self.view.dtype) as i128;
        let last = self.last(sizes);
        if steps.iter().any(|&step| step < 0)
            || last >= i128::from(i64::MAX) / element
            || self.address() as i128 + (last + 1) * element > usize::MAX as i128
        {
            return false;
        }
        let of_features = matches!(self.axes, Axes::RowFeatures(_) | Axes::ClassFeatures(_));
        if of_features && self.sizes(sizes)[1] > 1 && steps[1] != 1 {
            return false;
        }
        if !self.output {
            let forgotten = self.sizes(sizes)[1] > 1 && steps[1] == 0 && steps[0] != 0;
            return !(self.name == "logits" && forgotten);
        }
        // An axis must step over the whole span of the axes inside it.
        let mut axes: Vec<(i128, usize)> = steps.into_iter().zip(self.sizes(sizes)).collect();
        axes.retain(|&(_, n)| n > 1);
        axes.sort_unstable();
        let mut covered = 1;
        axes.into_iter().all(|(step, n)| {
            let apart = step >= covered;
            covered += step * (n as i128 - 1);
            apart
        })
    }
}

/// The overlap of two operands.
#[derive(PartialEq, Eq, Debug)]
enum Meeting {
    Apart,
    /// Their spans meet, but they share no byte.
    Interleaved,
    Exact,
    Shared,
}

/// With more elements no call is made, and sets of addresses are not compared.
pub const MOST: usize = 1 << 14;

fn meeting(a: &Operand, b: &Operand, sizes: Sizes) -> Meeting {
    let (spans, count) = ([a.span(sizes), b.span(sizes)], |operand: &Operand| {
        operand.sizes(sizes).iter().fold(1usize, |n, &size| n.saturating_mul(size))
    });
    if spans[0].end <= spans[1].start || spans[1].end <= spans[0].start {
        return Meeting::Apart;
    }
    if a.address() == b.address()
        && a.view.dtype == b.view.dtype
        && a.steps(sizes) == b.steps(sizes)
    {
        return Meeting::Exact;
    }
    if count(a) > MOST || count(b) > MOST {
        // Not computed: either is possible.
        return Meeting::Interleaved;
    }
    let bytes = |operand: &Operand| {
        operand.touched(sizes).into_iter().flatten().collect::<HashSet<usize>>()
    };
    let (mine, others) = (bytes(a), bytes(b));
    if mine.is_disjoint(&others) { Meeting::Interleaved } else { Meeting::Shared }
}

/// Column blocks of one matrix: equal row strides, disjoint within each row.
fn are_columns(a: &Operand, b: &Operand, sizes: Sizes) -> bool {
    let pitch =
        |operand: &Operand| operand.steps(sizes)[0] * size_of_dtype(operand.view.dtype) as i128;
    let rows = |operand: &Operand| operand.sizes(sizes)[0];
    if a.fills_padding || b.fills_padding {
        return false;
    }
    if pitch(a) != pitch(b) || pitch(a) <= 0 || rows(a) < 2 || rows(b) < 2 {
        return false;
    }
    let width = |operand: &Operand| {
        operand.span(sizes).len() as i128 - pitch(a) * (rows(operand) as i128 - 1)
    };
    let offset = (b.address() as i128 - a.address() as i128).rem_euclid(pitch(a));
    width(a) <= offset && offset + width(b) <= pitch(a)
}

/// What the entry point asks of dtypes and sizes beside what all of them ask.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// Dtypes that must agree do.
    pub dtypes_agree: bool,
    /// A size is refused.
    pub bad_shape: bool,
    /// A size may be refused.
    pub odd_shape: bool,
    /// Rows may have no classes; operands without elements may then be absent.
    pub allows_no_classes: bool,
}

/// The checks from NULL to OVERLAP. Ok has the codes that are possible in addition to those of later checks.
pub fn operands(operands: &[Operand], sizes: Sizes, rules: Rules) -> Result<Vec<i32>, Verdict> {
    let Rules { dtypes_agree, bad_shape, odd_shape, allows_no_classes } = rules;
    let [rows, classes, inner] = sizes;
    let mut also = Vec::new();
    let has_rows = rows > 0 && inner > 0;
    let is_needed = |o: &Operand| o.required && !(allows_no_classes && o.is_empty(sizes));
    if has_rows && operands.iter().any(|o| is_needed(o) && !o.is_present()) {
        return Err(Verdict::just(abi::NULL));
    }
    let bad_dtype = |o: &Operand| !o.allowed.contains(&o.view.dtype);
    if operands.iter().any(|o| o.is_present() && bad_dtype(o)) {
        return Err(Verdict::just(abi::DTYPE));
    }
    if operands.iter().any(|o| o.required && !o.is_present()) {
        // The header leaves open whether the dtype of an absent operand counts.
        if operands.iter().any(|o| o.required && bad_dtype(o)) || !dtypes_agree {
            also.push(abi::DTYPE);
        }
    } else if !dtypes_agree {
        return Err(Verdict::just(abi::DTYPE));
    }
    let most = (isize::MAX as u128) / 16;
    let [n, c, k] = sizes.map(|size| size as u128);
    let product = n.checked_mul(c).and_then(|product| product.checked_mul(k));
    let too_large = product.is_none_or(|product| product > most)
        || n.checked_mul(k).is_none_or(|product| product > most)
        || [n, c, k].iter().any(|&size| size > most);
    if too_large || bad_shape || (classes == 0 && has_rows && !allows_no_classes) {
        return Err(Verdict::just(abi::SHAPE).or(&also));
    }
    if n * c > most || c * k > most || odd_shape {
        // With the third size 0; whether that overflows is a matter of order.
        also.push(abi::SHAPE);
    }
    let present: Vec<&Operand> =
        operands.iter().filter(|o| o.is_present() && !o.is_empty(sizes)).collect();
    if present.iter().any(|o| !o.has_good_strides(sizes)) {
        return Err(Verdict::just(abi::STRIDE).or(&also));
    }
    if present.iter().any(|o| o.address() % size_of_dtype(o.view.dtype) != 0) {
        return Err(Verdict::just(abi::ALIGN).or(&also));
    }
    let mut interleaved = false;
    for (i, output) in present.iter().enumerate().filter(|(_, o)| o.output) {
        for (j, other) in present.iter().enumerate() {
            if i == j || (other.output && j < i) {
                continue;
            }
            match meeting(output, other, sizes) {
                Meeting::Apart => {}
                Meeting::Interleaved => interleaved |= !are_columns(output, other, sizes),
                Meeting::Exact if other.replaceable && output.replaces => {}
                _ => return Err(Verdict::just(abi::OVERLAP).or(&also)),
            }
        }
    }
    if interleaved {
        also.push(abi::OVERLAP);
    }
    Ok(also)
}
