//! Operands of any dtype in any layout, with canaries between and around the elements.

use crate::Element;
use crate::random::Rng;
use xent::half::{bf16, f16};
use xent::{CrossEntropy, Input, Output};

/// The dtype of an operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    F32,
    F64,
    Bf16,
    F16,
    I64,
    I32,
    U32,
    U16,
    U8,
}

pub const FLOATS: [Dtype; 4] = [Dtype::F32, Dtype::F64, Dtype::Bf16, Dtype::F16];
pub const INTEGERS: [Dtype; 5] = [Dtype::U8, Dtype::U16, Dtype::U32, Dtype::I32, Dtype::I64];

impl Dtype {
    pub fn is_float(self) -> bool {
        FLOATS.contains(&self)
    }

    pub fn is_half(self) -> bool {
        matches!(self, Dtype::Bf16 | Dtype::F16)
    }

    /// The number, rounded to the dtype.
    pub fn round(self, x: f64) -> f64 {
        match self {
            Dtype::F32 => f64::from(x as f32),
            Dtype::Bf16 => bf16::from_f32(x as f32).to_f64(),
            Dtype::F16 => f16::from_f32(x as f32).to_f64(),
            _ => x,
        }
    }

    pub fn largest(self) -> f64 {
        match self {
            Dtype::F32 => f32::MAX.into(),
            Dtype::Bf16 => bf16::MAX.into(),
            Dtype::F16 => f16::MAX.into(),
            _ => f64::MAX,
        }
    }

    /// Half the distance between neighbouring numbers at `x`.
    pub fn half_ulp(self, x: f64) -> f64 {
        let (digits, least) = match self {
            Dtype::F32 => (24, -126),
            Dtype::Bf16 => (8, -126),
            Dtype::F16 => (11, -14),
            _ => (53, -1022),
        };
        let exponent = if x == 0.0 { least } else { (x.abs().log2().floor() as i32).max(least) };
        if self == Dtype::F64 {
            return 2f64.powi(-53) * x.abs() + f64::from_bits(1);
        }
        2f64.powi(exponent - digits)
    }
}

/// Elements that tests convert to f64 and back without loss.
trait Cell: Element {
    fn of(x: f64) -> Self;
    fn real(self) -> f64;
}

macro_rules! cells {
    ($($type:ident: $of:expr, $real:expr;)*) => {$(
        impl Cell for $type {
            fn of(x: f64) -> $type {
                $of(x)
            }
            fn real(self) -> f64 {
                $real(self)
            }
        }
    )*};
}
cells! {
    f32: |x: f64| x as f32, f64::from;
    f64: |x: f64| x, |x: f64| x;
    bf16: |x: f64| bf16::from_f32(x as f32), f64::from;
    f16: |x: f64| f16::from_f32(x as f32), f64::from;
    i64: |x: f64| x as i64, |x: i64| x as f64;
    i32: |x: f64| x as i32, f64::from;
    u32: |x: f64| x as u32, f64::from;
    u16: |x: f64| x as u16, f64::from;
    u8: |x: f64| x as u8, f64::from;
}

/// Axes along which elements of an input may share an address.
pub const NO_AXIS: &[usize] = &[];
/// Those of logits, whose class stride is not 0.
pub const AXES_OF_LOGITS: &[usize] = &[0, 2];
pub const ANY_AXIS: &[usize] = &[0, 1, 2];

/// [`ANY_AXIS`] if elements may repeat.
pub fn any_axis_if(may_repeat: bool) -> &'static [usize] {
    if may_repeat { ANY_AXIS } else { NO_AXIS }
}

/// An operand: its elements, row-major `[rows, classes, inner]`, as numbers that its dtype holds, and
/// their layout.
#[derive(Clone, Debug)]
pub struct Operand {
    pub dtype: Dtype,
    /// 1 for an axis that the operand lacks.
    pub sizes: [usize; 3],
    pub values: Vec<f64>,
    /// The strides that the call gets.
    pub strides: [i64; 3],
    /// Elements from a 64-byte boundary.
    pub offset: usize,
}

impl Operand {
    /// A packed operand of these numbers, rounded to the dtype.
    pub fn packed(dtype: Dtype, sizes: [usize; 3], values: &[f64]) -> Operand {
        assert_eq!(values.len(), sizes.iter().product::<usize>());
        let values = values.iter().map(|&x| dtype.round(x)).collect();
        Operand { dtype, sizes, values, strides: [0; 3], offset: 0 }
    }

    /// A packed operand of zeros, for an output.
    pub fn zeros(dtype: Dtype, sizes: [usize; 3]) -> Operand {
        Operand::packed(dtype, sizes, &vec![0.0; sizes.iter().product()])
    }

    /// The effective strides: 0 for an axis of size 1, and those of the packed layout for all zero.
    pub fn steps(&self) -> [usize; 3] {
        let [rows, classes, inner] = self.sizes;
        let masked = |strides: [usize; 3]| {
            [0, 1, 2].map(|axis| if self.sizes[axis] > 1 { strides[axis] } else { 0 })
        };
        let given = masked([0, 1, 2].map(|axis| usize::try_from(self.strides[axis]).unwrap_or(0)));
        assert!([0, 1, 2].iter().all(|&axis| self.strides[axis] >= 0 || self.sizes[axis] <= 1));
        if given == [0; 3] && rows > 0 { masked([classes * inner, inner, 1]) } else { given }
    }

    /// No two elements share an address.
    pub fn is_apart(&self) -> bool {
        let steps = self.steps();
        (0..3).all(|axis| self.sizes[axis] <= 1 || steps[axis] > 0)
    }

    /// Classes are contiguous.
    pub fn has_contiguous_classes(&self) -> bool {
        self.sizes[1] <= 1 || self.steps()[1] == 1
    }

    /// The offset of each element from the first.
    fn places(&self) -> Vec<usize> {
        let [rows, classes, inner] = self.sizes;
        let [by_row, by_class, by_inner] = self.steps();
        let mut places = Vec::with_capacity(self.values.len());
        for row in 0..rows {
            for class in 0..classes {
                places.extend((0..inner).map(|k| row * by_row + class * by_class + k * by_inner));
            }
        }
        places
    }

    /// Places the operand in memory with its elements: an input, or an output to accumulate into.
    pub fn place(&self) -> Placed {
        self.placed(true)
    }

    /// Places the operand in memory, poisoned: an output.
    pub fn place_poisoned(&self) -> Placed {
        self.placed(false)
    }

    fn placed(&self, hold: bool) -> Placed {
        fn cells<T: Cell>(
            operand: &Operand,
            places: &[usize],
            span: usize,
            hold: bool,
        ) -> (Vec<T>, usize) {
            let mut memory = vec![T::CANARY; span + 3 * crate::MARGIN];
            let base = memory[crate::MARGIN..].as_ptr().align_offset(64) + crate::MARGIN;
            let start = base + operand.offset;
            for (&place, &value) in places.iter().zip(&operand.values) {
                memory[start + place] = if hold { T::of(value) } else { T::POISON };
            }
            (memory, start)
        }
        let places = self.places();
        let span = places.iter().max().map_or(0, |last| last + 1);
        macro_rules! memory {
            ($($dtype:ident),*) => {
                match self.dtype {
                    $(Dtype::$dtype => {
                        let (memory, start) = cells(self, &places, span, hold);
                        (Memory::$dtype(memory), start)
                    })*
                }
            };
        }
        let (memory, start) = memory!(F32, F64, Bf16, F16, I64, I32, U32, U16, U8);
        let range = start..start + span;
        let strides = self.strides;
        Placed { before: memory.clone(), memory, range, places, strides, hold }
    }

    /// The elements of row `row` and position `k`.
    pub fn row(&self, row: usize, k: usize) -> Vec<f64> {
        let [_, classes, inner] = self.sizes;
        (0..classes).map(|class| self.values[(row * classes + class) * inner + k]).collect()
    }

    /// Row `row` at position `k` as an operand of its own; a copy if the operand lacks these axes.
    pub fn single(&self, row: usize, k: usize) -> Operand {
        let row = if self.sizes[0] > 1 { row } else { 0 };
        let k = if self.sizes[2] > 1 { k } else { 0 };
        let [_, by_class, _] = self.steps();
        Operand {
            sizes: [1, self.sizes[1], 1],
            values: self.row(row, k),
            // Classes stay contiguous or not.
            strides: [0, if by_class == 0 { 2 } else { by_class as i64 }, 0],
            ..self.clone()
        }
    }

    /// Draws another layout. Classes stay contiguous or not; no element repeats.
    pub fn relaid(&self, rng: &mut Rng) -> Operand {
        loop {
            let operand = self.clone().laid_out(rng, NO_AXIS);
            if operand.has_contiguous_classes() == self.has_contiguous_classes() {
                return operand;
            }
        }
    }

    /// Draws a layout: any order of axes, any distance between elements. Elements along one of the
    /// `repeatable` axes may share an address, which changes the values.
    pub fn laid_out(mut self, rng: &mut Rng, repeatable: &[usize]) -> Operand {
        let mut order = [0, 1, 2];
        match rng.below(6) {
            // Callers mostly have classes last or first.
            0 | 1 => order = [0, 2, 1],
            2 => order = [1, 0, 2],
            3 => {}
            _ => {
                for i in [2, 1] {
                    order.swap(i, rng.below(i + 1));
                }
            }
        }
        let mut next = if rng.one_in(5) { 2 + rng.below(2) } else { 1 };
        for axis in order.into_iter().rev() {
            if self.sizes[axis] > 1 {
                self.strides[axis] = next as i64;
                next = next * self.sizes[axis] + if rng.one_in(3) { 1 + rng.below(70) } else { 0 };
            } else {
                // The stride of an axis of size 1 is ignored.
                self.strides[axis] = [0, 1, -5, i64::MAX][rng.below(4)];
            }
        }
        self.offset = rng.below(17);
        if !repeatable.is_empty() && rng.one_in(6) {
            let axis = rng.below(3);
            let others = (0..3).any(|other| other != axis && self.sizes[other] > 1);
            if repeatable.contains(&axis) && self.sizes[axis] > 1 && others {
                self.strides[axis] = 0;
                self.repeat(axis);
            }
        }
        self
    }

    /// Gives all elements along `axis` the value of the first.
    fn repeat(&mut self, axis: usize) {
        let [_, classes, inner] = self.sizes;
        for i in 0..self.values.len() {
            let mut at = [i / (classes * inner), i / inner % classes, i % inner];
            at[axis] = 0;
            self.values[i] = self.values[(at[0] * classes + at[1]) * inner + at[2]];
        }
    }
}

#[derive(Clone)]
enum Memory {
    F32(Vec<f32>),
    F64(Vec<f64>),
    Bf16(Vec<bf16>),
    F16(Vec<f16>),
    I64(Vec<i64>),
    I32(Vec<i32>),
    U32(Vec<u32>),
    U16(Vec<u16>),
    U8(Vec<u8>),
}

macro_rules! with {
    ($memory:expr, $cells:ident => $result:expr) => {
        match $memory {
            Memory::F32($cells) => $result,
            Memory::F64($cells) => $result,
            Memory::Bf16($cells) => $result,
            Memory::F16($cells) => $result,
            Memory::I64($cells) => $result,
            Memory::I32($cells) => $result,
            Memory::U32($cells) => $result,
            Memory::U16($cells) => $result,
            Memory::U8($cells) => $result,
        }
    };
}

/// An operand in memory.
pub struct Placed {
    memory: Memory,
    before: Memory,
    /// The number of elements from the first to the last.
    range: std::ops::Range<usize>,
    places: Vec<usize>,
    strides: [i64; 3],
    hold: bool,
}

impl Placed {
    pub fn input(&self) -> Input<'_> {
        let range = self.range.clone();
        with!(&self.memory, cells => Input::from(&cells[range])).strides(self.strides)
    }

    pub fn output(&mut self) -> Output<'_> {
        let (range, strides) = (self.range.clone(), self.strides);
        with!(&mut self.memory, cells => Output::from(&mut cells[range])).strides(strides)
    }

    /// A packed operand of f64 as a slice.
    pub fn doubles(&mut self) -> &mut [f64] {
        let range = self.range.clone();
        match &mut self.memory {
            Memory::F64(cells) => &mut cells[range],
            _ => unreachable!("not f64"),
        }
    }

    /// A packed operand of i64 as a slice.
    pub fn integers(&mut self) -> &mut [i64] {
        let range = self.range.clone();
        match &mut self.memory {
            Memory::I64(cells) => &mut cells[range],
            _ => unreachable!("not i64"),
        }
    }

    /// Asserts that the call wrote nothing to an input.
    #[track_caller]
    pub fn assert_untouched(&self, what: &str) {
        self.assert_same_but(|_| false, what);
    }

    #[track_caller]
    fn assert_same_but(&self, may_change: impl Fn(usize) -> bool, what: &str) {
        fn differ<T: Element>((now, before): (&T, &T)) -> u64 {
            now.bits() ^ before.bits()
        }
        fn check<T: Element>(
            now: &[T],
            before: &[T],
            may_change: impl Fn(usize) -> bool,
            what: impl Fn(usize, u64) -> String,
        ) {
            // One comparison of sums, not a branch for each of billions of elements.
            if now.iter().zip(before).fold(0, |seen, pair| seen | differ(pair)) == 0 {
                return;
            }
            for (i, pair) in now.iter().zip(before).enumerate() {
                assert!(differ(pair) == 0 || may_change(i), "{}", what(i, pair.0.bits()));
            }
        }
        let start = self.range.start;
        let what = |i: usize, now: u64| {
            format!("{what}: {now:#x} was written at {}", i as isize - start as isize)
        };
        macro_rules! check {
            ($($dtype:ident),*) => {
                match (&self.memory, &self.before) {
                    $((Memory::$dtype(now), Memory::$dtype(before)) => {
                        check(now, before, may_change, what)
                    })*
                    _ => unreachable!("a copy has its dtype"),
                }
            };
        }
        check!(F32, F64, Bf16, F16, I64, I32, U32, U16, U8);
    }

    /// Checks the canaries around and between the elements of an output, and returns the elements.
    /// Also checks that each poisoned element was written.
    #[track_caller]
    pub fn take(&self, what: &str) -> Vec<f64> {
        let mut inside = vec![false; self.range.len()];
        self.places.iter().for_each(|&place| inside[place] = true);
        let start = self.range.start;
        self.assert_same_but(|i| i >= start && inside.get(i - start) == Some(&true), what);
        fn elements<T: Cell>(cells: &[T], places: &[usize], hold: bool, what: &str) -> Vec<f64> {
            let read = |&place: &usize| {
                let x = cells[place];
                assert!(hold || x.bits() != T::POISON.bits(), "{what}: {place} was not written");
                x.real()
            };
            places.iter().map(read).collect()
        }
        with!(&self.memory, cells => elements(&cells[start..], &self.places, self.hold, what))
    }
}

/// What the losses of rows are multiplied by, placed in memory.
pub struct PlacedFactors {
    pub class_weights: Option<Placed>,
    pub row_weights: Option<Placed>,
    pub row_mask: Option<Placed>,
    pub grad_output: Option<Placed>,
    pub target_classes: Option<Placed>,
    /// Places of the target classes.
    places: usize,
}

impl PlacedFactors {
    /// Places the operands that there are, in the order of the fields.
    pub fn new(operands: [&Option<Operand>; 5]) -> PlacedFactors {
        let places = operands[4].as_ref().map_or(0, |operand| operand.sizes[1]);
        let [class_weights, row_weights, row_mask, grad_output, target_classes] =
            operands.map(|operand| operand.as_ref().map(Operand::place));
        PlacedFactors { class_weights, row_weights, row_mask, grad_output, target_classes, places }
    }

    /// The call with these operands.
    pub fn of<'a>(&'a self, mut call: CrossEntropy<'a>) -> CrossEntropy<'a> {
        if let Some(weights) = &self.class_weights {
            call = call.class_weights(weights.input());
        }
        if let Some(weights) = &self.row_weights {
            call = call.row_weights(weights.input());
        }
        if let Some(mask) = &self.row_mask {
            call = call.row_mask(mask.input());
        }
        if let Some(grad_output) = &self.grad_output {
            call = call.grad_output(grad_output.input());
        }
        if let Some(classes) = &self.target_classes {
            call = call.target_classes(classes.input(), self.places);
        }
        call
    }
}
