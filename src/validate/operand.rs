//! The checks of operands: presence, dtype, strides, length, alignment, overlap.

use crate::codes::*;
use crate::error::Error;
use crate::plan::Shape;
use crate::view::{ElementType, FloatType, IntegerType, View};
use std::mem::MaybeUninit;

/// An unvalidated operand; absent if `data` is null.
#[derive(Clone, Copy)]
pub(crate) struct Operand {
    pub data: *mut u8,
    pub dtype: u32,
    pub strides: [i64; 3],
    /// The memory of an output holds no values before the call.
    pub is_uninit: bool,
    /// The number of elements behind `data`: the length of a slice, `usize::MAX` for a pointer.
    pub available: usize,
    /// The shape of an array, whose strides are then its own: all zero is not packed.
    #[cfg(feature = "ndarray")]
    pub array: Option<ArrayShape>,
}

/// The shape of an array, of at most three axes; of more axes their number alone.
#[cfg(feature = "ndarray")]
#[derive(Clone, Copy)]
pub(crate) struct ArrayShape {
    axes: usize,
    sizes: [usize; 3],
}

#[cfg(feature = "ndarray")]
impl ArrayShape {
    pub fn new(sizes: &[usize]) -> ArrayShape {
        let of = |axis: usize| sizes.get(axis).copied().unwrap_or(1);
        ArrayShape { axes: sizes.len(), sizes: [of(0), of(1), of(2)] }
    }
}

impl Operand {
    pub const ABSENT: Operand = Operand {
        data: std::ptr::null_mut(),
        dtype: XENT_F32,
        strides: [0; 3],
        is_uninit: false,
        available: usize::MAX,
        #[cfg(feature = "ndarray")]
        array: None,
    };

    /// The operand with strides that the caller names.
    pub fn with_strides(self, strides: [i64; 3]) -> Self {
        Operand {
            strides,
            #[cfg(feature = "ndarray")]
            array: None,
            ..self
        }
    }

    /// All strides zero stand for packed memory.
    #[inline(always)]
    pub fn may_be_packed(&self) -> bool {
        #[cfg(feature = "ndarray")]
        if self.array.is_some() {
            return false;
        }
        true
    }

    /// A packed operand of a known dtype.
    pub fn packed<T>(data: *mut T, dtype: u32) -> Self {
        Operand { data: data.cast(), dtype, ..Operand::ABSENT }
    }
}

/// Which axes an operand has.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Axes {
    /// `[rows, classes, inner]`
    Full,
    /// `[rows, inner]`
    Rows,
    /// `[rows, n, inner]`, with so many in place of the classes.
    PerRow(usize),
    /// `[classes]`
    Classes,
    /// `[rows, k, inner]`, with so many places for listed classes.
    Listed(usize),
    /// `[rows, features]`, with so many features.
    RowFeatures(usize),
    /// `[classes, features]`
    ClassFeatures(usize),
    /// So many elements, whatever the shape.
    Elements(usize),
    /// One element.
    One,
}

/// Whether a call can do without an operand.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Presence {
    Required,
    Optional,
}

impl Presence {
    pub fn required_if(required: bool) -> Presence {
        if required { Presence::Required } else { Presence::Optional }
    }
}

/// Whether a call reads or writes an operand.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Access {
    Read,
    /// It reads logits, whose classes have addresses of their own.
    ReadLogits,
    Write,
}

/// One operand of a call: the caller's description, then what [`Slot::resolve`] computes from it.
#[derive(Clone, Copy)]
pub(crate) struct Slot {
    pub name: &'static str,
    operand: Operand,
    axes: Axes,
    /// The dtypes that the operand can have.
    allowed: &'static [u32],
    presence: Presence,
    access: Access,
    /// The call writes what lies between the rows, too.
    fills_padding: bool,
    /// The strides: those of the packed layout if the caller gave none, 0 for an axis of size 1.
    strides: [i64; 3],
    /// The element farthest from the first.
    last: usize,
    /// The addresses of the first byte and of the byte after the last.
    bytes: (usize, usize),
}

/// The most operands that a call can have.
const SLOTS: usize = 25;

/// The operands of a call, in the order in which they are checked.
pub(crate) struct Slots {
    slots: [MaybeUninit<Slot>; SLOTS],
    len: usize,
    /// Rows may have no classes: the call is over an empty shard.
    allows_no_classes: bool,
}

/// The place of an operand among the slots; `None` if the operand is absent.
pub(crate) type Index = Option<usize>;

/// Logits, probabilities, weights and gradients.
pub(crate) const FLOATS: &[u32] = &[XENT_F32, XENT_F64, XENT_BF16, XENT_F16];
/// Row losses and entropies.
pub(crate) const LOSSES: &[u32] = &[XENT_F32, XENT_F64];
/// Losses, denominators and lse.
pub(crate) const F64_ONLY: &[u32] = &[XENT_F64];
/// The row mask.
pub(crate) const BYTES: &[u32] = &[XENT_U8];
/// Class indices and probabilities.
pub(crate) const TARGETS: &[u32] =
    &[XENT_I64, XENT_I32, XENT_U32, XENT_U16, XENT_U8, XENT_F32, XENT_F64, XENT_BF16, XENT_F16];
/// Class indices of sparse targets.
pub(crate) const INDICES: &[u32] = &[XENT_I64, XENT_I32, XENT_U32, XENT_U16, XENT_U8];
/// Counts and predicted classes, C's `uint64_t` and `int64_t`. The surfaces fix their type.
pub(crate) const WORDS: &[u32] = &[XENT_I64];

impl Slots {
    #[inline(always)]
    pub fn new() -> Self {
        Slots { slots: [const { MaybeUninit::uninit() }; SLOTS], len: 0, allows_no_classes: false }
    }

    /// Lets rows have no classes; operands without elements may then be absent.
    pub fn allow_no_classes(&mut self) {
        self.allows_no_classes = true;
    }

    // Most of the operands that a call can have are absent. An absent one takes no slot.
    #[inline(always)]
    fn add(
        &mut self,
        name: &'static str,
        operand: Operand,
        axes: Axes,
        allowed: &'static [u32],
        presence: Presence,
        access: Access,
    ) -> Index {
        let present = !operand.data.is_null();
        if !present && presence == Presence::Optional {
            return None;
        }
        self.slots[self.len].write(Slot {
            name,
            operand,
            axes,
            allowed,
            presence,
            access,
            fills_padding: false,
            strides: [0; 3],
            last: 0,
            bytes: (0, 0),
        });
        self.len += 1;
        present.then_some(self.len - 1)
    }

    /// Adds an operand that the call reads.
    #[inline(always)]
    pub fn input(
        &mut self,
        name: &'static str,
        operand: Operand,
        axes: Axes,
        allowed: &'static [u32],
        presence: Presence,
    ) -> Index {
        self.add(name, operand, axes, allowed, presence, Access::Read)
    }

    /// Adds the logits.
    #[inline(always)]
    pub fn logits(&mut self, operand: Operand) -> Index {
        self.add("logits", operand, Axes::Full, FLOATS, Presence::Required, Access::ReadLogits)
    }

    /// Adds an operand that the call writes.
    #[inline(always)]
    pub fn output(
        &mut self,
        name: &'static str,
        operand: Operand,
        axes: Axes,
        allowed: &'static [u32],
        presence: Presence,
    ) -> Index {
        self.add(name, operand, axes, allowed, presence, Access::Write)
    }

    /// The call writes not only the output, but also what lies between its rows.
    pub fn fill_padding(&mut self, index: Index) {
        if let Some(slot) = index.and_then(|index| self.iter_mut().nth(index)) {
            slot.fills_padding = true;
        }
    }

    /// Adds an optional result of one number.
    pub fn scalar<T>(&mut self, name: &'static str, to: *mut T, allowed: &'static [u32]) {
        let operand = Operand::packed(to, allowed[0]);
        self.output(name, operand, Axes::One, allowed, Presence::Optional);
    }

    fn all(&self) -> &[Slot] {
        // SAFETY: `add` wrote the first `len` slots.
        unsafe { std::slice::from_raw_parts(self.slots.as_ptr().cast(), self.len) }
    }

    fn iter(&self) -> std::slice::Iter<'_, Slot> {
        self.all().iter()
    }

    fn iter_mut(&mut self) -> std::slice::IterMut<'_, Slot> {
        // SAFETY: `add` wrote the first `len` slots, and `self` is borrowed for writing.
        unsafe { std::slice::from_raw_parts_mut(self.slots.as_mut_ptr().cast(), self.len) }
            .iter_mut()
    }

    /// The view of an operand of floats; `None` if it is absent, or of integers.
    pub fn floats(&self, index: Index) -> Option<View<FloatType>> {
        let slot = &self.all()[index?];
        match dtype_of(slot.operand.dtype)? {
            Dtype::Float(dtype) => Some(slot.view(dtype)),
            Dtype::Integer(_) => None,
        }
    }

    /// The view of an operand of integers; `None` if it is absent, or of floats.
    pub fn integers(&self, index: Index) -> Option<View<IntegerType>> {
        let slot = &self.all()[index?];
        match dtype_of(slot.operand.dtype)? {
            Dtype::Integer(dtype) => Some(slot.view(dtype)),
            Dtype::Float(_) => None,
        }
    }

    /// Checks that every required operand is present, then that every operand has a dtype that it
    /// can have. A call without rows may leave out any operand.
    pub fn check_types(&self, shape: &Shape) -> Result<(), Error> {
        for slot in self.iter() {
            let needless = self.allows_no_classes && slot.is_empty(shape);
            let required = slot.presence == Presence::Required && !needless;
            let absent = required && slot.operand.data.is_null();
            if absent && shape.rows > 0 && shape.inner > 0 {
                return Err(Error::Null(format!("{} is NULL", slot.name)));
            }
        }
        for slot in self.iter() {
            if !slot.allowed.contains(&slot.operand.dtype) {
                let names: Vec<String> =
                    slot.allowed.iter().map(|&code| dtype_name(code)).collect();
                return Err(Error::Dtype(format!(
                    "{}.dtype is {}; it can be {}",
                    slot.name,
                    dtype_name(slot.operand.dtype),
                    names.join(", ")
                )));
            }
        }
        Ok(())
    }

    /// Checks that no operand without values is read; `accumulate` says whether gradients are.
    pub fn check_initialised(&self, accumulate: bool) -> Result<(), Error> {
        for slot in self.iter().filter(|slot| slot.operand.is_uninit) {
            let read = match slot.access {
                Access::Read | Access::ReadLogits => "in place",
                Access::Write if accumulate && slot.name.starts_with("grad_") => "accumulating",
                Access::Write => continue,
            };
            return Err(uninitialised(slot.name, read));
        }
        Ok(())
    }

    /// Checks that an output without values is not accumulated.
    pub fn check_output_initialised(&self, index: Index, accumulate: bool) -> Result<(), Error> {
        let Some(slot) = index.map(|index| &self.all()[index]) else { return Ok(()) };
        if accumulate && slot.operand.is_uninit {
            return Err(uninitialised(slot.name, "accumulating"));
        }
        Ok(())
    }

    /// Checks sizes, strides, lengths, alignment and overlap, in this order.
    ///
    /// `in_place(output, other)` says whether `output` may be exactly `other`, and if not, how the
    /// message names the fault. Returns whether an output replaces an input.
    pub fn check_memory(
        &mut self,
        shape: &Shape,
        in_place: impl Fn(&Slot, &Slot) -> Result<(), &'static str>,
    ) -> Result<bool, Error> {
        let Shape { rows, classes, inner } = *shape;
        let elements = rows.checked_mul(classes).and_then(|n| n.checked_mul(inner));
        // Elements have at most 8 bytes. The factor of 16 keeps every sum of offsets below in range.
        if elements.is_none_or(|n| n > isize::MAX as usize / 16)
            || [rows, classes, inner].iter().any(|&n| n > isize::MAX as usize / 16)
            || rows.checked_mul(inner).is_none_or(|n| n > isize::MAX as usize / 16)
        {
            return Err(Error::Shape(format!(
                "rows*classes*inner = {rows}*{classes}*{inner} overflows"
            )));
        }
        for slot in self.iter() {
            let Axes::Listed(places) = slot.axes else { continue };
            let elements = rows.checked_mul(places).and_then(|n| n.checked_mul(inner));
            if elements.is_none_or(|n| n > isize::MAX as usize / 16) {
                return Err(Error::Shape(format!(
                    "rows*target_count*inner = {rows}*{places}*{inner} overflows"
                )));
            }
        }
        if classes == 0 && rows * inner > 0 && !self.allows_no_classes {
            return Err(Error::Shape(format!("classes = 0, but there are {} rows", rows * inner)));
        }
        #[cfg(feature = "ndarray")]
        for slot in self.iter() {
            slot.check_array(shape)?;
        }
        for slot in self.iter_mut() {
            // The pointer of an operand without elements may be anything.
            if !slot.is_empty(shape) {
                slot.resolve(shape)?;
            }
        }
        for slot in self.iter().filter(|slot| !slot.is_empty(shape)) {
            if slot.last >= slot.operand.available {
                return Err(Error::Shape(format!(
                    "{} has {} elements, but its shape and strides reach element {}",
                    slot.name, slot.operand.available, slot.last
                )));
            }
        }
        for slot in self.iter().filter(|slot| !slot.is_empty(shape)) {
            let size = slot.element_size();
            if slot.bytes.0 % size != 0 {
                return Err(Error::Align(format!(
                    "{}.data is not aligned to its elements of {size} bytes",
                    slot.name
                )));
            }
        }
        let mut replaces = false;
        for (i, output) in self.iter().enumerate().filter(|(_, slot)| slot.is_output()) {
            for (j, other) in self.iter().enumerate() {
                // Each pair of outputs is compared once.
                if i == j
                    || (other.is_output() && j < i)
                    || output.is_empty(shape)
                    || other.is_empty(shape)
                    || !output.overlaps(other, shape)
                {
                    continue;
                }
                let how = if output.is_same(other) {
                    in_place(output, other)
                } else if output.fills_padding {
                    Err("with its padding overlaps")
                } else {
                    Err("overlaps")
                };
                match how {
                    Ok(()) => replaces = true,
                    Err(how) => {
                        return Err(Error::Overlap(format!(
                            "{} {how} {}",
                            output.name, other.name
                        )));
                    }
                }
            }
        }
        Ok(replaces)
    }
}

/// The fault of an operand without values that a call would read.
fn uninitialised(name: &str, read: &str) -> Error {
    Error::Param(format!("{name} is not initialised, and a call {read} reads it"))
}

/// The type of the elements of an operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Dtype {
    Float(FloatType),
    Integer(IntegerType),
}

impl Dtype {
    /// Bytes of one element, which is also its alignment.
    fn size(self) -> usize {
        match self {
            Dtype::Float(dtype) => dtype.size(),
            Dtype::Integer(dtype) => dtype.size(),
        }
    }
}

/// The type that a code of the C surface names, if it names one.
pub(crate) fn dtype_of(code: u32) -> Option<Dtype> {
    Some(match code {
        XENT_F32 => Dtype::Float(FloatType::F32),
        XENT_F64 => Dtype::Float(FloatType::F64),
        XENT_BF16 => Dtype::Float(FloatType::Bf16),
        XENT_F16 => Dtype::Float(FloatType::F16),
        XENT_I64 => Dtype::Integer(IntegerType::I64),
        XENT_I32 => Dtype::Integer(IntegerType::I32),
        XENT_U8 => Dtype::Integer(IntegerType::U8),
        XENT_U16 => Dtype::Integer(IntegerType::U16),
        XENT_U32 => Dtype::Integer(IntegerType::U32),
        _ => return None,
    })
}

/// The float type that a code names, if it names one.
pub(crate) fn float_of(code: u32) -> Option<FloatType> {
    match dtype_of(code)? {
        Dtype::Float(dtype) => Some(dtype),
        Dtype::Integer(_) => None,
    }
}

/// The name of a code in C, without the prefix.
pub(crate) fn dtype_name(code: u32) -> String {
    match dtype_of(code) {
        Some(Dtype::Float(dtype)) => format!("{dtype:?}").to_uppercase(),
        Some(Dtype::Integer(dtype)) => format!("{dtype:?}").to_uppercase(),
        None => format!("dtype {code}"),
    }
}

impl Slot {
    fn view<T>(&self, dtype: T) -> View<T> {
        View { data: self.operand.data, dtype, strides: self.strides.map(|stride| stride as isize) }
    }

    fn is_output(&self) -> bool {
        self.access == Access::Write
    }

    /// Bytes of one element.
    fn element_size(&self) -> usize {
        // `check_types` refuses unknown dtypes before any size is asked for.
        dtype_of(self.operand.dtype).map_or(1, Dtype::size)
    }

    /// The sizes along rows, classes and inner positions; 1 for an axis that the operand lacks.
    fn sizes(&self, shape: &Shape) -> [usize; 3] {
        match self.axes {
            Axes::Full => [shape.rows, shape.classes, shape.inner],
            Axes::Rows => [shape.rows, 1, shape.inner],
            Axes::PerRow(count) => [shape.rows, count, shape.inner],
            Axes::Classes => [1, shape.classes, 1],
            Axes::Listed(places) => [shape.rows, places, shape.inner],
            Axes::RowFeatures(features) => [shape.rows, features, 1],
            Axes::ClassFeatures(features) => [shape.classes, features, 1],
            Axes::Elements(len) => [1, len, 1],
            Axes::One => [1, 1, 1],
        }
    }

    /// The operand has no elements.
    fn is_empty(&self, shape: &Shape) -> bool {
        self.sizes(shape).contains(&0)
    }

    /// Checks that an array has the shape of the operand.
    #[cfg(feature = "ndarray")]
    fn check_array(&self, shape: &Shape) -> Result<(), Error> {
        let Some(array) = self.operand.array else { return Ok(()) };
        let [rows, classes, inner] = [shape.rows, shape.classes, shape.inner];
        let all = [rows, classes, inner];
        let (list, places);
        // Without the axis of inner positions if there is but one.
        let (full, short): (&[usize], &[usize]) = match self.axes {
            Axes::Full => (&all, &all[..2]),
            Axes::Rows => (&[rows, inner], &[rows]),
            Axes::PerRow(count) => {
                list = [rows, count, inner];
                (&list, &list[..2])
            }
            Axes::Classes => (&[classes], &[classes]),
            Axes::Listed(count) => {
                places = [rows, count, inner];
                (&places, &places[..2])
            }
            Axes::RowFeatures(features) => (&[rows, features], &[rows, features]),
            Axes::ClassFeatures(features) => (&[classes, features], &[classes, features]),
            Axes::Elements(len) => {
                list = [len, 1, 1];
                (&list[..1], &list[..1])
            }
            Axes::One => (&[1], &[]),
        };
        let got = &array.sizes[..array.axes.min(3)];
        let is_short = got == short && (inner == 1 || self.axes == Axes::One);
        if array.axes <= 3 && (got == full || is_short) {
            return Ok(());
        }
        let got = if array.axes <= 3 { format!("{got:?}") } else { format!("{} axes", array.axes) };
        let expected = if inner == 1 && !short.is_empty() { short } else { full };
        Err(Error::Shape(format!("{} has the shape {got}, not {expected:?}", self.name)))
    }

    /// Checks the strides, and computes the fields that follow from them.
    fn resolve(&mut self, shape: &Shape) -> Result<(), Error> {
        let sizes = self.sizes(shape);
        let given =
            std::array::from_fn(
                |axis| {
                    if sizes[axis] > 1 { self.operand.strides[axis] } else { 0 }
                },
            );
        self.strides = if given == [0; 3] && self.operand.may_be_packed() {
            // `check_memory` checked that the product of all sizes fits an i64.
            let packed = [(sizes[1] * sizes[2]) as i64, sizes[2] as i64, 1];
            std::array::from_fn(|axis| if sizes[axis] > 1 { packed[axis] } else { 0 })
        } else {
            given
        };
        let stride_error = |axis: usize, why: &str| {
            Error::Stride(format!("{}.strides[{axis}] = {} {why}", self.name, self.strides[axis]))
        };
        if matches!(self.axes, Axes::RowFeatures(_) | Axes::ClassFeatures(_))
            && sizes[1] > 1
            && self.strides[1] != 1
        {
            return Err(stride_error(1, "is not 1: the features of a row must be contiguous"));
        }
        let size = self.element_size() as i64;
        let mut last = 0i64;
        for (axis, &axis_size) in sizes.iter().enumerate() {
            if self.strides[axis] < 0 {
                return Err(stride_error(axis, "is negative"));
            }
            let span = self.strides[axis].checked_mul(axis_size as i64 - 1);
            last = span
                .and_then(|span| last.checked_add(span))
                .filter(|last| *last < i64::MAX / size)
                .ok_or_else(|| stride_error(axis, "reaches past the address space"))?;
        }
        let start = self.operand.data as usize;
        let bytes = (last + 1) as usize * size as usize;
        let end = start
            .checked_add(bytes)
            .ok_or_else(|| stride_error(0, "reaches past the address space"))?;
        self.bytes = (start, end);
        match self.access {
            Access::Read => {}
            Access::ReadLogits => self.check_class_stride(&sizes)?,
            Access::Write => {
                self.check_class_stride(&sizes)?;
                self.check_disjoint(&sizes)?;
            }
        }
        self.last = last as usize;
        Ok(())
    }

    /// Checks that the class stride was not forgotten. Strides of {row, 0, 0}, which C makes of {row},
    /// would give each row one logit for all classes, and a loss of ln C.
    fn check_class_stride(&self, sizes: &[usize; 3]) -> Result<(), Error> {
        let [row, class, inner] = self.strides;
        if sizes[1] <= 1 || class != 0 || row == 0 {
            return Ok(());
        }
        let (of, inner) = match inner.max(1) {
            _ if sizes[2] <= 1 => ("if a row's classes are contiguous", [1, 0]),
            inner => {
                ("if the classes lie around packed positions", [inner * sizes[2] as i64, inner])
            }
        };
        Err(Error::Stride(format!(
            "{}.strides[1] = 0, the class stride, puts {} classes at one address: {of}, write {{{row}, {}, {}}}",
            self.name, sizes[1], inner[0], inner[1]
        )))
    }

    /// Checks that no two elements of an output share an address. In the order of their strides,
    /// every axis must step over the whole span of the axes before it.
    fn check_disjoint(&self, sizes: &[usize; 3]) -> Result<(), Error> {
        let mut axes = [0usize, 1, 2];
        axes.sort_unstable_by_key(|&axis| self.strides[axis]);
        let mut covered = 1i64;
        for axis in axes {
            if sizes[axis] == 1 {
                continue;
            }
            if self.strides[axis] < covered {
                return Err(Error::Stride(format!(
                    "{}.strides[{axis}] = {} makes elements of an output share an address: it must be at least {covered}",
                    self.name, self.strides[axis]
                )));
            }
            covered += self.strides[axis] * (sizes[axis] as i64 - 1);
        }
        Ok(())
    }

    /// Whether the two operands have the same address, dtype and strides.
    fn is_same(&self, other: &Slot) -> bool {
        self.operand.data == other.operand.data
            && self.operand.dtype == other.operand.dtype
            && self.strides == other.strides
    }

    /// Whether the two operands may touch the same byte.
    fn overlaps(&self, other: &Slot, shape: &Shape) -> bool {
        let ((a, a_end), (b, b_end)) = (self.bytes, other.bytes);
        if a >= b_end || b >= a_end {
            return false;
        }
        if self.fills_padding || other.fills_padding {
            return true;
        }
        // Column blocks of one matrix have the same distance between rows and are disjoint within
        // each row.
        let pitch = |slot: &Slot| {
            let size = slot.element_size() as i64;
            let rows = slot.sizes(shape)[0];
            (slot.strides[0] * size, (slot.strides[0] * (rows as i64 - 1) * size) as usize, rows)
        };
        let ((pitch_a, rows_a, n), (pitch_b, rows_b, m)) = (pitch(self), pitch(other));
        if pitch_a != pitch_b || pitch_a <= 0 || n < 2 || m < 2 {
            return true;
        }
        let pitch = pitch_a as usize;
        let (width_a, width_b) = (a_end - a - rows_a, b_end - b - rows_b);
        let offset = if b >= a { (b - a) % pitch } else { (pitch - (a - b) % pitch) % pitch };
        !(width_a <= offset && offset + width_b <= pitch)
    }
}
