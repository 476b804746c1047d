//! Problems as they are handed in, and the one place that validates them.
//!
//! A [`Problem`] is descriptors: addresses, dtypes, strides, options. It comes from C (ffi) or
//! from slices (cross_entropy.rs). [`run`] checks all of it, in the order that the status codes
//! promise, before a byte is written; makes a [`Plan`] and has it run; and reduces.

use crate::codes::*;
use crate::dispatch::{self, Isa};
use crate::error::Error;
use crate::kernels::Kernels;
use crate::kernels::row_state::CompensatedSum;
use crate::math::exp2::Base;
use crate::parallel::{self, Team, for_blocks};
use crate::plan::{self, At, Dtype, Layout, Pass, Plan, Target, Targets, Transform, View};
use std::mem::MaybeUninit;
use std::ops::Range;

/// An unvalidated operand; absent if `data` is null.
#[derive(Clone, Copy)]
pub(crate) struct Operand {
    pub data: *mut u8,
    pub dtype: u32,
    pub strides: [i64; 3],
    /// How many elements there are behind `data`, where that is known.
    pub available: usize,
}

impl Operand {
    pub const ABSENT: Operand = Operand {
        data: std::ptr::null_mut(),
        dtype: XENT_F32,
        strides: [0; 3],
        available: usize::MAX,
    };

    /// A packed operand of a known dtype.
    pub fn packed<T>(data: *mut T, dtype: u32) -> Self {
        Operand { data: data.cast(), dtype, ..Operand::ABSENT }
    }
}

/// An unvalidated problem; the fields are those of `xent_problem`.
#[derive(Clone, Copy)]
pub(crate) struct Problem {
    pub flags: u32,
    pub rows: usize,
    pub classes: usize,
    pub inner: usize,
    pub logits: Operand,
    pub targets: Operand,
    pub class_weights: Operand,
    pub row_weights: Operand,
    pub row_mask: Operand,
    pub ignore_index: i64,
    pub label_smoothing: f64,
    pub z_loss: f64,
    pub softcap: f64,
    pub logit_scale: f64,
    pub normalizer: f64,
    pub z_normalizer: f64,
    pub reduction: u32,
    pub threads: u32,
}

impl Problem {
    /// The defaults of `XENT_PROBLEM_INIT`.
    pub const INIT: Problem = Problem {
        flags: 0,
        rows: 0,
        classes: 0,
        inner: 1,
        logits: Operand::ABSENT,
        targets: Operand::ABSENT,
        class_weights: Operand::ABSENT,
        row_weights: Operand::ABSENT,
        row_mask: Operand::ABSENT,
        ignore_index: -100,
        label_smoothing: 0.0,
        z_loss: 0.0,
        softcap: 0.0,
        logit_scale: 1.0,
        normalizer: 0.0,
        z_normalizer: 0.0,
        reduction: XENT_MEAN,
        threads: 0,
    };
}

/// Where results go; the fields are those of `xent_results`. Scalars have one element.
#[derive(Clone, Copy)]
pub(crate) struct Results {
    pub loss: *mut f64,
    pub row_losses: Operand,
    pub lse: Operand,
    pub z_loss: *mut f64,
    pub normalizer: *mut f64,
    pub z_normalizer: *mut f64,
    pub kept_rows: *mut u64,
    pub argmax: Operand,
    pub correct: *mut u64,
    pub entropy: Operand,
}

impl Results {
    pub const NONE: Results = Results {
        loss: std::ptr::null_mut(),
        row_losses: Operand::ABSENT,
        lse: Operand::ABSENT,
        z_loss: std::ptr::null_mut(),
        normalizer: std::ptr::null_mut(),
        z_normalizer: std::ptr::null_mut(),
        kept_rows: std::ptr::null_mut(),
        argmax: Operand::ABSENT,
        correct: std::ptr::null_mut(),
        entropy: Operand::ABSENT,
    };

    /// Something is asked for that does not exist without targets.
    fn needs_targets(&self) -> bool {
        !(self.loss.is_null()
            && self.row_losses.data.is_null()
            && self.z_loss.is_null()
            && self.normalizer.is_null()
            && self.z_normalizer.is_null()
            && self.kept_rows.is_null()
            && self.correct.is_null())
    }
}

/// The gradient that is asked for.
#[derive(Clone, Copy)]
pub(crate) struct GradientRequest {
    /// Absent = 1.
    pub output: Operand,
    pub scale: f64,
    pub logits: Operand,
}

/// Which axes an operand has.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Axes {
    /// `[rows, classes, inner]`
    Full,
    /// `[rows, inner]`
    Rows,
    /// `[classes]`
    Classes,
    /// One element.
    One,
}

/// One operand on its way through validation.
#[derive(Clone, Copy)]
pub(crate) struct Slot {
    name: &'static str,
    operand: Operand,
    axes: Axes,
    allowed: &'static [u32],
    required: bool,
    output: bool,
    /// The strides, packed ones filled in and those of axes of size 1 set to 0.
    strides: [i64; 3],
    /// The element farthest from the first.
    last: usize,
    /// Addresses of the first byte and of the one after the last.
    bytes: (usize, usize),
}

/// The most operands that a call can have.
const SLOTS: usize = 18;

/// The operands of a call, in the order in which they are checked.
pub(crate) struct Slots {
    slots: [MaybeUninit<Slot>; SLOTS],
    len: usize,
}

/// An operand that was pushed, if it is present.
pub(crate) type Index = Option<usize>;

pub(crate) const FLOATS: &[u32] = &[XENT_F32, XENT_F64, XENT_BF16, XENT_F16];
const LOSSES: &[u32] = &[XENT_F32, XENT_F64];
const F64_ONLY: &[u32] = &[XENT_F64];
const BYTES: &[u32] = &[XENT_U8];
const TARGETS: &[u32] =
    &[XENT_I64, XENT_I32, XENT_U32, XENT_U16, XENT_U8, XENT_F32, XENT_F64, XENT_BF16, XENT_F16];
/// Results of C's `uint64_t` and `int64_t`; their type is known.
const WORDS: &[u32] = &[XENT_I64];

impl Slots {
    #[inline(always)]
    pub fn new() -> Self {
        Slots { slots: [const { MaybeUninit::uninit() }; SLOTS], len: 0 }
    }

    // What is absent costs next to nothing: a call has two dozen operands, and few are there.
    #[inline(always)]
    fn add(
        &mut self,
        name: &'static str,
        operand: Operand,
        axes: Axes,
        allowed: &'static [u32],
        [required, output]: [bool; 2],
    ) -> Index {
        let present = !operand.data.is_null();
        if !present && !required {
            return None;
        }
        self.slots[self.len].write(Slot {
            name,
            operand,
            axes,
            allowed,
            required,
            output,
            strides: [0; 3],
            last: 0,
            bytes: (0, 0),
        });
        self.len += 1;
        present.then_some(self.len - 1)
    }

    #[inline(always)]
    pub fn input(
        &mut self,
        name: &'static str,
        operand: Operand,
        axes: Axes,
        allowed: &'static [u32],
        required: bool,
    ) -> Index {
        self.add(name, operand, axes, allowed, [required, false])
    }

    #[inline(always)]
    pub fn output(
        &mut self,
        name: &'static str,
        operand: Operand,
        axes: Axes,
        allowed: &'static [u32],
        required: bool,
    ) -> Index {
        self.add(name, operand, axes, allowed, [required, true])
    }

    /// A result of one number.
    fn scalar<T>(&mut self, name: &'static str, to: *mut T, allowed: &'static [u32]) {
        self.output(name, Operand::packed(to, allowed[0]), Axes::One, allowed, false);
    }

    fn all(&self) -> &[Slot] {
        // SAFETY: `add` wrote as many.
        unsafe { std::slice::from_raw_parts(self.slots.as_ptr().cast(), self.len) }
    }

    fn iter(&self) -> std::slice::Iter<'_, Slot> {
        self.all().iter()
    }

    fn iter_mut(&mut self) -> std::slice::IterMut<'_, Slot> {
        // SAFETY: `add` wrote as many.
        unsafe { std::slice::from_raw_parts_mut(self.slots.as_mut_ptr().cast(), self.len) }
            .iter_mut()
    }

    /// The view of an operand that was pushed, if it is present.
    pub fn view(&self, index: Index) -> Option<View> {
        let slot = &self.all()[index?];
        Some(View {
            data: slot.operand.data,
            dtype: dtype_of(slot.operand.dtype)?,
            strides: slot.strides.map(|stride| stride as isize),
        })
    }

    /// Nothing that is required is missing, and everything has a dtype that it can have.
    pub fn check_types(&self, sizes: &Sizes) -> Result<(), Error> {
        for slot in self.iter() {
            if slot.required && slot.operand.data.is_null() && sizes.rows > 0 && sizes.inner > 0 {
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

    /// Sizes, strides, alignment, and what overlaps; `in_place` says whether an output may be
    /// exactly that input. Returns whether one is.
    pub fn check_memory(
        &mut self,
        sizes: &Sizes,
        in_place: impl Fn(&Slot, &Slot) -> Result<(), &'static str>,
    ) -> Result<bool, Error> {
        let Sizes { rows, classes, inner } = *sizes;
        let elements = rows.checked_mul(classes).and_then(|n| n.checked_mul(inner));
        // 16 bytes an element leaves room for every sum of offsets below.
        if elements.is_none_or(|n| n > isize::MAX as usize / 16)
            || [rows, classes, inner].iter().any(|&n| n > isize::MAX as usize / 16)
            || rows.checked_mul(inner).is_none_or(|n| n > isize::MAX as usize / 16)
        {
            return Err(Error::Shape(format!(
                "rows*classes*inner = {rows}*{classes}*{inner} overflows"
            )));
        }
        if classes == 0 && rows * inner > 0 {
            return Err(Error::Shape(format!("classes = 0, but there are {} rows", rows * inner)));
        }
        for slot in self.iter_mut() {
            // What has no elements is never looked at, wherever it points.
            if !slot.is_empty(sizes) {
                slot.resolve(sizes)?;
            }
        }
        for slot in self.iter().filter(|slot| !slot.is_empty(sizes)) {
            if slot.last >= slot.operand.available {
                return Err(Error::Shape(format!(
                    "{} has {} elements, but its shape and strides reach element {}",
                    slot.name, slot.operand.available, slot.last
                )));
            }
        }
        for slot in self.iter().filter(|slot| !slot.is_empty(sizes)) {
            let size = dtype_of(slot.operand.dtype).map_or(1, Dtype::size);
            if slot.bytes.0 % size != 0 {
                return Err(Error::Align(format!(
                    "{}.data is not aligned to its elements of {size} bytes",
                    slot.name
                )));
            }
        }
        let mut replaces = false;
        for (i, output) in self.iter().enumerate().filter(|(_, slot)| slot.output) {
            for (j, other) in self.iter().enumerate() {
                // Two outputs are compared once.
                if i == j
                    || (other.output && j < i)
                    || output.is_empty(sizes)
                    || other.is_empty(sizes)
                    || !output.overlaps(other, sizes)
                {
                    continue;
                }
                let how =
                    if same(output, other) { in_place(output, other) } else { Err("overlaps") };
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

/// The sizes of a problem, or of the operands of the softmax family.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sizes {
    pub rows: usize,
    pub classes: usize,
    pub inner: usize,
}

pub(crate) fn dtype_of(code: u32) -> Option<Dtype> {
    Some(match code {
        XENT_F32 => Dtype::F32,
        XENT_F64 => Dtype::F64,
        XENT_BF16 => Dtype::Bf16,
        XENT_F16 => Dtype::F16,
        XENT_I64 => Dtype::I64,
        XENT_I32 => Dtype::I32,
        XENT_U8 => Dtype::U8,
        XENT_U16 => Dtype::U16,
        XENT_U32 => Dtype::U32,
        _ => return None,
    })
}

/// Its name in C, without the prefix.
pub(crate) fn dtype_name(code: u32) -> String {
    match dtype_of(code) {
        Some(dtype) => format!("{dtype:?}").to_uppercase(),
        None => format!("dtype {code}"),
    }
}

impl Slot {
    /// Sizes along rows, classes and inner positions; 1 for an axis it does not have.
    fn sizes(&self, sizes: &Sizes) -> [usize; 3] {
        match self.axes {
            Axes::Full => [sizes.rows, sizes.classes, sizes.inner],
            Axes::Rows => [sizes.rows, 1, sizes.inner],
            Axes::Classes => [1, sizes.classes, 1],
            Axes::One => [1, 1, 1],
        }
    }

    /// Nothing of it is ever looked at.
    fn is_empty(&self, sizes: &Sizes) -> bool {
        self.sizes(sizes).contains(&0)
    }

    /// Fills in strides and the byte span.
    fn resolve(&mut self, sizes: &Sizes) -> Result<(), Error> {
        let sizes = self.sizes(sizes);
        let given =
            std::array::from_fn(
                |axis| {
                    if sizes[axis] > 1 { self.operand.strides[axis] } else { 0 }
                },
            );
        self.strides = if given == [0; 3] {
            // The product of all sizes fits an i64 (validate).
            let packed = [(sizes[1] * sizes[2]) as i64, sizes[2] as i64, 1];
            std::array::from_fn(|axis| if sizes[axis] > 1 { packed[axis] } else { 0 })
        } else {
            given
        };
        let stride_error = |axis: usize, why: &str| {
            Error::Stride(format!("{}.strides[{axis}] = {} {why}", self.name, self.strides[axis]))
        };
        let size = dtype_of(self.operand.dtype).map_or(1, Dtype::size) as i64;
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
        if self.output {
            self.check_disjoint(&sizes)?;
        }
        self.last = last as usize;
        Ok(())
    }

    /// No two elements of an output share an address: from the inside out, every axis steps over
    /// all of the axes inside it.
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

    /// Whether the two may touch the same byte.
    fn overlaps(&self, other: &Slot, sizes: &Sizes) -> bool {
        let ((a, a_end), (b, b_end)) = (self.bytes, other.bytes);
        if a >= b_end || b >= a_end {
            return false;
        }
        // Column blocks of one matrix: the same distance between rows, apart within a row.
        let pitch = |slot: &Slot| {
            let size = dtype_of(slot.operand.dtype).map_or(1, Dtype::size) as i64;
            let rows = slot.sizes(sizes)[0];
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

/// Everything that the checks established.
struct Valid {
    plan: Plan,
    kernels: Kernels,
    /// What a mean divides by: the cross-entropy part, and the z-loss part.
    normalizer: f64,
    z_normalizer: f64,
    kept: u64,
}

/// Whether a slot's view is exactly another's.
fn same(a: &Slot, b: &Slot) -> bool {
    a.operand.data == b.operand.data && a.operand.dtype == b.operand.dtype && a.strides == b.strides
}

/// Bytes of the lanes' type up to which lanes run along rows, though classes are contiguous: what is
/// done once a row is done for many at once then. 128 classes, or 64 of f64; about there both ways
/// cost the same (docs/performance.md).
const NARROW: usize = 512;

/// How the kernels go over operands `[rows, classes, inner]` of those strides.
pub(crate) fn layout(sizes: &Sizes, logits: &View, others: &[Option<View>]) -> Layout {
    let contiguous = |view: &View| sizes.classes <= 1 || view.strides[1] == 1;
    let all = contiguous(logits) && others.iter().flatten().all(contiguous);
    let lane = if logits.dtype.has_short_lanes() { 4 } else { 8 };
    if all && sizes.classes > NARROW / lane {
        return Layout::Classes;
    }
    let inner = sizes.inner > 1 && (sizes.rows == 1 || logits.strides[2] <= logits.strides[0]);
    Layout::Positions { axis: if inner { 2 } else { 0 } }
}

fn validate(
    problem: &Problem,
    pass: Pass,
    results: &Results,
    request: Option<&GradientRequest>,
    team: &Team,
    isa: Option<Isa>,
) -> Result<Valid, Error> {
    let accumulate = problem.flags & XENT_FLAG_ACCUMULATE != 0;
    let by_row = problem.reduction == XENT_NONE;
    let log_probs = problem.flags & XENT_FLAG_LOG_PROBS != 0;
    let has_indices = !FLOATS.contains(&problem.targets.dtype);
    let sizes = Sizes { rows: problem.rows, classes: problem.classes, inner: problem.inner };

    // The operands, inputs first.
    let mut slots = Slots::new();
    let all = &mut slots;
    let needs_targets = request.is_some() || results.needs_targets();
    let logits = all.input("logits", problem.logits, Axes::Full, FLOATS, true);
    let axes = if has_indices { Axes::Rows } else { Axes::Full };
    let targets = all.input("targets", problem.targets, axes, TARGETS, needs_targets);
    let class_weights =
        all.input("class_weights", problem.class_weights, Axes::Classes, FLOATS, false);
    let row_weights = all.input("row_weights", problem.row_weights, Axes::Rows, FLOATS, false);
    let row_mask = all.input("row_mask", problem.row_mask, Axes::Rows, BYTES, false);
    let (mut grad_output, mut gradient) = (None, None);
    if let Some(request) = request {
        let axes = if by_row { Axes::Rows } else { Axes::One };
        grad_output = all.input("grad_output", request.output, axes, FLOATS, false);
        let name = if pass == Pass::Targets { "grad_targets" } else { "grad_logits" };
        gradient = all.output(name, request.logits, Axes::Full, FLOATS, true);
    }
    let lse = match pass {
        Pass::Backward | Pass::Targets if log_probs => None,
        Pass::Backward | Pass::Targets => all.input("lse", results.lse, Axes::Rows, F64_ONLY, true),
        _ => all.output("lse", results.lse, Axes::Rows, F64_ONLY, false),
    };
    all.scalar("loss", results.loss, F64_ONLY);
    let row_losses = all.output("row_losses", results.row_losses, Axes::Rows, LOSSES, false);
    all.scalar("z_loss", results.z_loss, F64_ONLY);
    all.scalar("normalizer", results.normalizer, F64_ONLY);
    all.scalar("z_normalizer", results.z_normalizer, F64_ONLY);
    all.scalar("kept_rows", results.kept_rows, WORDS);
    let argmax = all.output("argmax", results.argmax, Axes::Rows, WORDS, false);
    all.scalar("correct", results.correct, WORDS);
    let entropy = all.output("entropy", results.entropy, Axes::Rows, LOSSES, false);

    all.check_types(&sizes)?;
    // A half's gradient may be kept in f32; that of the targets is in any float.
    let logits_dtype = problem.logits.dtype;
    let grad_dtype = match request {
        Some(request) if pass != Pass::Targets => request.logits.dtype,
        _ => logits_dtype,
    };
    let is_half = matches!(logits_dtype, XENT_BF16 | XENT_F16);
    if grad_dtype != logits_dtype && !(is_half && grad_dtype == XENT_F32) {
        let or = if is_half { ", or F32" } else { "" };
        return Err(Error::Dtype(format!(
            "grad_logits.dtype is {}; for logits of {} it can be that{or}",
            dtype_name(grad_dtype),
            dtype_name(logits_dtype)
        )));
    }
    let in_place =
        all.check_memory(&sizes, |output, other| match (output.name, other.name, accumulate) {
            ("grad_logits", "logits", false) => Ok(()),
            ("grad_logits", "logits", true) => Err("cannot be accumulated in place of"),
            _ => Err("overlaps"),
        })?;

    check_options(problem, pass, results, request, has_indices && targets.is_some())?;
    let isa = match isa {
        Some(isa) => isa,
        None => dispatch::selected().map_err(|why| Error::Param(why.to_string()))?,
    };
    let kernels = dtype_of(logits_dtype).zip(dtype_of(grad_dtype));
    let Some(kernels) = kernels.and_then(|(logits, gradient)| isa.kernels(logits, gradient)) else {
        return Err(Error::Param(format!("this processor does not have {}", isa.name())));
    };

    // Without rows no view is looked at; but `logits` must be something.
    let nothing = View { data: std::ptr::null_mut(), dtype: Dtype::F32, strides: [0; 3] };
    let logits = all.view(logits).unwrap_or(nothing);
    let gradient = all.view(gradient);
    let targets = match all.view(targets) {
        None => Targets::Absent,
        Some(view) if has_indices => Targets::Indices(view),
        Some(view) => Targets::Probabilities(view),
    };
    let short = logits.dtype.has_short_lanes();
    let transforms = problem.logit_scale != 1.0 || problem.softcap > 0.0;
    let mut plan = Plan {
        pass,
        rows: sizes.rows,
        classes: sizes.classes,
        inner: sizes.inner,
        layout: layout(&sizes, &logits, &[]),
        logits,
        targets,
        class_weights: all.view(class_weights),
        weight_total: sizes.classes as f64,
        row_weights: all.view(row_weights),
        row_mask: all.view(row_mask),
        ignore_index: problem.ignore_index,
        label_smoothing: problem.label_smoothing,
        z_loss: problem.z_loss,
        transform: transforms
            .then_some(Transform { scale: problem.logit_scale, cap: problem.softcap }),
        log_probs,
        l: if short { f64::from(f32::L) } else { f64::L },
        row_losses: all.view(row_losses),
        lse: all.view(lse),
        argmax: all.view(argmax),
        correct: !results.correct.is_null(),
        entropy: all.view(entropy),
        gradient: None,
    };

    let mut scan = Scan::default();
    let mut bad = None;
    if !matches!(plan.targets, Targets::Absent) {
        for_blocks(
            team,
            plan.distributions(),
            [SCAN_WORK, plan.distributions().saturating_mul(SCAN_WORK)],
            // SAFETY: rows of the plan.
            |range| unsafe { scan_targets(&kernels, &plan, range) },
            |block| match block {
                Ok(block) => scan.add(&block),
                Err(error) => bad = bad.take().or(Some(error)),
            },
        );
    }
    if let Some(error) = bad {
        return Err(error);
    }

    let spreads = plan.label_smoothing > 0.0 && matches!(plan.targets, Targets::Indices(_));
    if let Some(weights) = plan.class_weights.filter(|_| spreads) {
        let first = At { row: 0, inner: 0 };
        let mut total = CompensatedSum::NONE;
        // SAFETY: the classes of the plan.
        (0..sizes.classes).for_each(|class| total.add(unsafe { weights.real(first, class) }));
        plan.weight_total = total.value();
    }
    let given = |x: f64, usual: f64| if x > 0.0 { x } else { usual };
    let normalizer = given(problem.normalizer, scan.weight);
    let z_normalizer = given(problem.z_normalizer, scan.row_weight);
    if let Some((request, view)) = request.zip(gradient) {
        let output = all.view(grad_output);
        let mut scale = request.scale;
        if let (Some(view), false) = (&output, by_row) {
            // SAFETY: its one element.
            scale *= unsafe { view.real(At { row: 0, inner: 0 }, 0) };
        }
        let is_mean = problem.reduction == XENT_MEAN;
        let bytes = plan.distributions() * plan.classes * view.size();
        plan.gradient = Some(plan::Gradient {
            view,
            in_place,
            accumulate,
            stream: !in_place && !accumulate && view.strides[1] == 1 && bytes >= STREAM_BYTES,
            output: output.filter(|_| by_row),
            scale: if is_mean { scale / normalizer } else { scale },
            z_scale: if is_mean { scale / z_normalizer } else { scale },
        });
    }
    Ok(Valid { plan, kernels, normalizer, z_normalizer, kept: scan.kept })
}

/// Gradients of at least this many bytes are written around the caches; measured in
/// docs/performance.md.
const STREAM_BYTES: usize = 16 << 20;

/// What scanning a row's target costs, in elements of the logits.
const SCAN_WORK: usize = 4;

fn check_options(
    problem: &Problem,
    pass: Pass,
    results: &Results,
    request: Option<&GradientRequest>,
    has_indices: bool,
) -> Result<(), Error> {
    let param = |what: String| Err(Error::Param(what));
    if !(0.0..=1.0).contains(&problem.label_smoothing) {
        return param(format!("label_smoothing = {} is outside [0, 1]", problem.label_smoothing));
    }
    for (name, value) in [
        ("z_loss", problem.z_loss),
        ("softcap", problem.softcap),
        ("normalizer", problem.normalizer),
        ("z_normalizer", problem.z_normalizer),
    ] {
        if !(value >= 0.0 && value.is_finite()) {
            return param(format!("{name} = {value} is not a finite number >= 0"));
        }
    }
    if !(problem.logit_scale > 0.0 && problem.logit_scale.is_finite()) {
        return param(format!("logit_scale = {} is not a finite number > 0", problem.logit_scale));
    }
    if let Some(request) = request
        && !request.scale.is_finite()
    {
        return param(format!("grad_scale = {} is not finite", request.scale));
    }
    match problem.reduction {
        XENT_MEAN | XENT_SUM => {}
        XENT_NONE if results.loss.is_null() && results.z_loss.is_null() => {}
        XENT_NONE => {
            return param("reduction none has no reduced loss; ask for row_losses".to_string());
        }
        other => return param(format!("reduction = {other} is none of mean, sum, none")),
    }
    if problem.flags & XENT_FLAG_LOG_PROBS != 0 {
        let is_forward = !matches!(pass, Pass::Backward | Pass::Targets);
        for (name, asked) in [
            ("z_loss", problem.z_loss != 0.0 || !results.z_loss.is_null()),
            ("softcap", problem.softcap != 0.0),
            ("logit_scale", problem.logit_scale != 1.0),
            ("lse", is_forward && !results.lse.data.is_null()),
            ("entropy", !results.entropy.data.is_null()),
        ] {
            if asked {
                return param(format!("{name} does not go with log-probabilities (LOG_PROBS)"));
            }
        }
    }
    if !results.correct.is_null() && !has_indices && problem.rows * problem.inner > 0 {
        return param("correct needs targets that are class indices".to_string());
    }
    if pass == Pass::Targets && has_indices {
        return param("grad_targets needs targets that are probabilities".to_string());
    }
    Ok(())
}

/// What the targets say about the reduction.
#[derive(Clone, Copy, Default)]
struct Scan {
    kept: u64,
    /// What a mean divides by: Σ r·w_y over kept rows, or Σ r.
    weight: f64,
    /// Σ r over kept rows.
    row_weight: f64,
}

impl Scan {
    fn add(&mut self, other: &Scan) {
        self.kept += other.kept;
        self.weight += other.weight;
        self.row_weight += other.row_weight;
    }
}

/// Checks the targets of a range of rows and adds up their weights.
///
/// # Safety
/// The rows are the plan's; its views were checked, all but the targets' values.
unsafe fn scan_targets(k: &Kernels, plan: &Plan, rows: Range<usize>) -> Result<Scan, Error> {
    let plain =
        plan.row_mask.is_none() && plan.row_weights.is_none() && plan.class_weights.is_none();
    if let Targets::Indices(targets) = &plan.targets
        && plain
        && (if plan.inner == 1 {
            targets.strides[0] == 1
        } else {
            targets.strides[2] == 1 && (plan.rows == 1 || targets.strides[0] == plan.inner as isize)
        })
    {
        // SAFETY: contiguous rows of the view; about the tables (`Kernels`).
        let fast = unsafe {
            (k.lanes.count)(targets, rows.start, rows.len(), plan.ignore_index, plan.classes)
        };
        if let Some(kept) = fast {
            return Ok(Scan { kept, weight: kept as f64, row_weight: kept as f64 });
        }
    }
    let mut scan = Scan::default();
    for row in rows {
        let at = plan.nth(row);
        // SAFETY: a row of the plan; the class is checked before it is used.
        unsafe {
            let weight = match plan.target(at) {
                Target::Class(y) if y >= plan.classes => {
                    return Err(Error::Target { row, value: y as i64, classes: plan.classes });
                }
                Target::Class(y) => plan.class_weight(y),
                Target::Mass => 1.0,
                Target::Absent | Target::Ignored => continue,
            };
            let r = plan.row_weight(at);
            scan.kept += 1;
            scan.row_weight += r;
            scan.weight += if r == 0.0 { 0.0 } else { r * weight };
        }
    }
    Ok(scan)
}

/// Checks and runs a problem: forward with `results` alone, backward with `results.lse` as an
/// input, both with both.
///
/// # Safety
/// Every operand that is not absent covers, with its strides, the shape that the problem gives
/// it, in memory that stays valid for the call and that nobody else writes, or, for outputs,
/// touches.
pub(crate) unsafe fn run(
    problem: &Problem,
    pass: Pass,
    results: &Results,
    request: Option<&GradientRequest>,
    team: &Team,
    isa: Option<Isa>,
) -> Result<(), Error> {
    parallel::fork::watch();
    let valid = validate(problem, pass, results, request, team, isa)?;
    let sums = parallel::run(&valid.plan, &valid.kernels, team);
    let empty = valid.kept == 0 && problem.flags & XENT_FLAG_EMPTY_IS_ZERO != 0;
    let reduced = |sum: f64, normalizer: f64| match problem.reduction {
        XENT_MEAN if empty => 0.0,
        XENT_MEAN => sum / normalizer,
        _ => sum,
    };
    // Off, it is no 0/0 either.
    let z_loss =
        if problem.z_loss == 0.0 { 0.0 } else { reduced(sums.z_loss.value(), valid.z_normalizer) };
    // SAFETY: checked to be aligned and apart; the caller's promise.
    unsafe {
        write(results.loss, reduced(sums.loss.value(), valid.normalizer) + z_loss);
        write(results.z_loss, z_loss);
        write(results.normalizer, valid.normalizer);
        write(results.z_normalizer, valid.z_normalizer);
        write(results.kept_rows, valid.kept);
        write(results.correct, sums.correct);
    }
    Ok(())
}

/// # Safety
/// `to` is null or valid for a write.
unsafe fn write<T>(to: *mut T, value: T) {
    if !to.is_null() {
        // SAFETY: the caller's promise.
        unsafe { *to = value }
    }
}
