//! A validated problem as plain data: pointers, strides and the scalars that all rows share.
//!
//! problem.rs makes plans and nobody else does. What it established is what everything below
//! relies on: every view covers its whole shape in memory that the caller handed over for this
//! call, aligned to its elements; outputs overlap nothing but, where `in_place` says so, the
//! logits; every target is in range or ignored.

use crate::element::Float;
use crate::math::exp2::Shift;

/// What the elements of an operand are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names are the documentation")]
pub enum Dtype {
    F32,
    F64,
    Bf16,
    F16,
    I64,
    I32,
    U8,
    U16,
    U32,
}

impl Dtype {
    /// Bytes of one element, which is also its alignment.
    pub fn size(self) -> usize {
        match self {
            Dtype::F64 | Dtype::I64 => 8,
            Dtype::F32 | Dtype::I32 | Dtype::U32 => 4,
            Dtype::Bf16 | Dtype::F16 | Dtype::U16 => 2,
            Dtype::U8 => 1,
        }
    }

    /// A float that is as it is in lanes.
    #[inline(always)]
    pub fn is_exact(self) -> bool {
        matches!(self, Dtype::F32 | Dtype::F64)
    }

    /// A float that is computed with in lanes of f32.
    #[inline(always)]
    pub fn has_short_lanes(self) -> bool {
        self != Dtype::F64
    }
}

/// One row: one of the `rows·inner` distributions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct At {
    /// Along the first axis.
    pub row: usize,
    /// Along the inner one.
    pub inner: usize,
}

/// Rows that are neighbours along an axis.
#[derive(Clone, Copy, Debug)]
pub struct Run {
    /// The first of them.
    pub first: At,
    /// The axis: 0 for rows, 2 for inner positions.
    pub axis: usize,
    /// How many, eight at most.
    pub len: usize,
}

impl Run {
    /// Row `i` of them.
    #[inline(always)]
    pub fn at(&self, i: usize) -> At {
        let At { row, inner } = self.first;
        if self.axis == 0 { At { row: row + i, inner } } else { At { row, inner: inner + i } }
    }
}

/// An operand in memory: element `(row, class, inner)` is
/// `row·strides[0] + class·strides[1] + inner·strides[2]` elements from `data`.
#[derive(Clone, Copy, Debug)]
pub struct View {
    /// The first element.
    pub data: *mut u8,
    /// The type of the elements.
    pub dtype: Dtype,
    /// Strides of rows, classes and inner positions, in elements.
    pub strides: [isize; 3],
}

impl View {
    /// Bytes of one element.
    #[inline(always)]
    pub fn size(&self) -> usize {
        self.dtype.size()
    }

    /// Class `class` of the row at `at`.
    ///
    /// # Safety
    /// The view covers them, as a plan's views cover its shape.
    #[inline(always)]
    pub unsafe fn at(&self, at: At, class: usize) -> *mut u8 {
        let [rows, classes, inner] = self.strides;
        let offset = at.row as isize * rows + class as isize * classes + at.inner as isize * inner;
        // SAFETY: in bounds as the caller promises; problem.rs checked that the offset of the
        // last element does not overflow.
        unsafe { self.data.offset(offset * self.size() as isize) }
    }

    /// The integer of a row, of an operand without a class axis.
    ///
    /// # Safety
    /// The view covers the row; the dtype is an integer.
    #[inline(always)]
    pub unsafe fn integer(&self, at: At) -> i64 {
        // SAFETY: in bounds and aligned (problem.rs); the dtype says what is there.
        unsafe {
            let p = self.at(at, 0);
            match self.dtype {
                Dtype::I64 => *p.cast::<i64>(),
                Dtype::I32 => i64::from(*p.cast::<i32>()),
                Dtype::U32 => i64::from(*p.cast::<u32>()),
                Dtype::U16 => i64::from(*p.cast::<u16>()),
                _ => i64::from(*p),
            }
        }
    }

    /// The real number at a class of a row.
    ///
    /// # Safety
    /// The view covers the element; the dtype is a float.
    #[inline(always)]
    pub unsafe fn real(&self, at: At, class: usize) -> f64 {
        // SAFETY: in bounds and aligned (problem.rs); the dtype says what is there.
        unsafe {
            let p = self.at(at, class);
            match self.dtype {
                Dtype::F64 => *p.cast::<f64>(),
                Dtype::Bf16 => (*p.cast::<half::bf16>()).to_f64(),
                Dtype::F16 => (*p.cast::<half::f16>()).to_f64(),
                _ => f64::from(*p.cast::<f32>()),
            }
        }
    }

    /// Writes a real number, rounded: to f32 first, if it is a half.
    ///
    /// # Safety
    /// As [`real`](Self::real), and no other thread is at the element.
    #[inline(always)]
    pub unsafe fn set_real(&self, at: At, class: usize, value: f64) {
        // SAFETY: as above.
        unsafe {
            let p = self.at(at, class);
            match self.dtype {
                Dtype::F64 => *p.cast::<f64>() = value,
                Dtype::Bf16 => *p.cast::<half::bf16>() = half::bf16::from_f32(value as f32),
                Dtype::F16 => *p.cast::<half::f16>() = half::f16::from_f32(value as f32),
                _ => *p.cast::<f32>() = value as f32,
            }
        }
    }

    /// Where a run of rows begins, and the elements from row to row.
    ///
    /// # Safety
    /// The view covers the rows; its elements are of `T`.
    #[inline(always)]
    pub unsafe fn run<T>(&self, run: &Run) -> (*mut T, isize) {
        let step = if run.axis == 0 { self.strides[0] } else { self.strides[2] };
        // SAFETY: the caller's promise.
        (unsafe { self.at(run.first, 0) }.cast(), step)
    }

    /// The real numbers of a run of rows, of an operand without classes.
    ///
    /// # Safety
    /// As [`real`](Self::real), for each.
    pub unsafe fn column(&self, run: &Run, to: &mut [f64]) {
        // SAFETY: as below.
        unsafe { self.pick(run, &[0.0; 8], to) }
    }

    /// The real numbers of a run of up to eight rows, of one class each; less than 0 is none, and
    /// leaves what is there.
    ///
    /// # Safety
    /// As [`real`](Self::real), for each.
    pub unsafe fn pick(&self, run: &Run, classes: &[f64], to: &mut [f64]) {
        /// # Safety
        /// As above, with elements of `T`.
        #[inline(always)]
        unsafe fn read<T: Float>(view: &View, run: &Run, classes: &[f64], to: &mut [f64]) {
            // SAFETY: the caller's promise.
            let (p, step) = unsafe { view.run::<T>(run) };
            for (i, (to, &class)) in to[..run.len].iter_mut().zip(classes).enumerate() {
                if class >= 0.0 {
                    let at = i as isize * step + class as isize * view.strides[1];
                    // SAFETY: as above.
                    *to = unsafe { *p.wrapping_offset(at) }.to_f64();
                }
            }
        }
        // SAFETY: in bounds and aligned (problem.rs); the dtype says what is there.
        unsafe {
            match self.dtype {
                Dtype::F64 => read::<f64>(self, run, classes, to),
                Dtype::Bf16 => read::<half::bf16>(self, run, classes, to),
                Dtype::F16 => read::<half::f16>(self, run, classes, to),
                _ => read::<f32>(self, run, classes, to),
            }
        }
    }

    /// Writes a number for each row of a run, of an operand of f32 or f64 without classes.
    ///
    /// # Safety
    /// The view covers the rows, and no other thread is at them.
    pub unsafe fn set_column(&self, run: &Run, from: &[f64]) {
        /// # Safety
        /// As above, with elements of `T`.
        #[inline(always)]
        unsafe fn write<T: Float>(view: &View, run: &Run, from: &[f64]) {
            // SAFETY: the caller's promise.
            let (p, step) = unsafe { view.run::<T>(run) };
            for (i, &x) in from[..run.len].iter().enumerate() {
                // SAFETY: as above.
                unsafe { *p.wrapping_offset(i as isize * step) = T::from_f64(x) };
            }
        }
        // SAFETY: in bounds and aligned (problem.rs); the dtype says what is there.
        unsafe {
            match self.dtype {
                Dtype::F64 => write::<f64>(self, run, from),
                _ => write::<f32>(self, run, from),
            }
        }
    }

    /// The real numbers of a row from `class` on.
    ///
    /// # Safety
    /// As [`real`](Self::real), for all of them.
    pub unsafe fn reals(&self, at: At, class: usize, to: &mut [f64]) {
        /// # Safety
        /// `p` is the first of `to.len()` elements of `T`, `stride` apart.
        unsafe fn copy<T: Float>(p: *const u8, stride: isize, to: &mut [f64]) {
            let p = p.cast::<T>();
            if stride == 1 {
                // SAFETY: the caller's promise.
                let from = unsafe { std::slice::from_raw_parts(p, to.len()) };
                for (to, from) in to.iter_mut().zip(from) {
                    *to = from.to_f64();
                }
                return;
            }
            for (i, to) in to.iter_mut().enumerate() {
                // SAFETY: the caller's promise.
                *to = unsafe { (*p.offset(i as isize * stride)).to_f64() };
            }
        }
        if to.is_empty() {
            return;
        }
        let stride = self.strides[1];
        // SAFETY: in bounds and aligned (problem.rs); the dtype says what is there.
        unsafe {
            let p = self.at(at, class);
            match self.dtype {
                Dtype::F64 => copy::<f64>(p, stride, to),
                Dtype::Bf16 => copy::<half::bf16>(p, stride, to),
                Dtype::F16 => copy::<half::f16>(p, stride, to),
                _ => copy::<f32>(p, stride, to),
            }
        }
    }
}

/// Which call this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    /// Losses, lse and statistics.
    Forward,
    /// The gradient, from lse.
    Backward,
    /// Both.
    ForwardBackward,
    /// The gradient with respect to probability targets, from lse.
    Targets,
    /// No cross-entropy at all: the softmax, where a gradient would go.
    Softmax,
    /// Its logarithm.
    LogSoftmax,
}

/// What the logits are to be.
#[derive(Clone, Copy, Debug)]
pub enum Targets {
    /// Nothing is asked of them.
    Absent,
    /// Class indices, `[rows, inner]`.
    Indices(View),
    /// Probabilities, `[rows, classes, inner]`.
    Probabilities(View),
}

/// The gradient's side of a plan.
#[derive(Clone, Copy, Debug)]
pub struct Gradient {
    /// Where it goes.
    pub view: View,
    /// The gradient replaces the logits.
    pub in_place: bool,
    /// It is added to what is there.
    pub accumulate: bool,
    /// Write around the caches: worth it for an output larger than they are.
    pub stream: bool,
    /// One factor per row, under reduction none.
    pub output: Option<View>,
    /// The factor that all rows share: grad_output, grad_scale and the mean's denominator.
    pub scale: f64,
    /// The same for the z-loss part, which has a denominator of its own.
    pub z_scale: f64,
}

/// What a row's target turns out to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// The problem has no targets.
    Absent,
    /// The row is ignored, by ignore_index or by the mask.
    Ignored,
    /// A class.
    Class(usize),
    /// A distribution.
    Mass,
}

/// `x -> scale·x`, then `x -> cap·tanh(x/cap)` unless cap is 0, rounded to the lanes' type.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Transform {
    /// logit_scale
    pub scale: f64,
    /// softcap
    pub cap: f64,
}

/// How the kernels go over the logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// Lanes along the classes, which are contiguous.
    Classes,
    /// Lanes along rows (axis 0) or inner positions (axis 2): classes are few or not contiguous.
    Positions {
        /// The axis.
        axis: usize,
    },
}

/// A validated problem.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Which call.
    pub pass: Pass,
    /// N
    pub rows: usize,
    /// C
    pub classes: usize,
    /// K
    pub inner: usize,
    /// How the logits lie.
    pub layout: Layout,
    /// `[rows, classes, inner]`
    pub logits: View,
    /// What they are to be.
    pub targets: Targets,
    /// `[classes]`
    pub class_weights: Option<View>,
    /// Σ of the class weights; the number of classes without them.
    pub weight_total: f64,
    /// `[rows, inner]`
    pub row_weights: Option<View>,
    /// u8 `[rows, inner]`; 0 = ignored.
    pub row_mask: Option<View>,
    /// The target that means "ignore this row".
    pub ignore_index: i64,
    /// ε
    pub label_smoothing: f64,
    /// λ
    pub z_loss: f64,
    /// None where it would change nothing.
    pub transform: Option<Transform>,
    /// The logits are log-probabilities.
    pub log_probs: bool,
    /// log2 e in the lanes' type: what exponentials are the powers of (math/exp2.rs).
    pub l: f64,
    /// Output: f32 or f64 `[rows, inner]`.
    pub row_losses: Option<View>,
    /// f64 `[rows, inner]`: an input of backward, an output of forward.
    pub lse: Option<View>,
    /// Output: i64 `[rows, inner]`.
    pub argmax: Option<View>,
    /// The number of right rows is wanted.
    pub correct: bool,
    /// Output: f32 or f64 `[rows, inner]`.
    pub entropy: Option<View>,
    /// The gradient, but for forward. That of the targets, if the pass says so.
    pub gradient: Option<Gradient>,
}

// SAFETY: a plan is addresses and numbers. Threads that share one read the operands and write
// disjoint rows or disjoint classes of a row of the outputs (parallel.rs).
unsafe impl Sync for Plan {}

/// Classes whose exponentials are summed together and share a shift.
pub const CHUNK: usize = 2048;

/// The most segments a row is cut into, and the most chunks of a segment that are told apart.
pub const SEGMENTS: usize = 64;

/// Classes up to which the fused call keeps the exponentials of its first sweep for the second.
pub const KEPT_CLASSES: usize = SEGMENTS * SEGMENTS * CHUNK;

/// Rows or inner positions that are worked on together where lanes run along them.
pub const TILE: usize = 64;

impl Plan {
    /// N·K
    #[inline(always)]
    pub fn distributions(&self) -> usize {
        self.rows * self.inner
    }

    /// Distribution `index` of N·K, in the order of memory that is packed.
    #[inline(always)]
    pub fn nth(&self, index: usize) -> At {
        if self.inner == 1 {
            At { row: index, inner: 0 }
        } else {
            At { row: index / self.inner, inner: index % self.inner }
        }
    }

    /// Distributions `first..first + len` as runs, and where each begins among them.
    #[inline(always)]
    pub fn runs(&self, first: usize, len: usize) -> impl Iterator<Item = (usize, Run)> {
        let mut start = 0;
        std::iter::from_fn(move || {
            let at = self.nth(first + start);
            let (axis, left) = if self.inner == 1 { (0, len) } else { (2, self.inner - at.inner) };
            let run = Run { first: at, axis, len: left.min(len - start) };
            let found = (start < len).then_some((start, run));
            start += run.len;
            found
        })
    }

    /// Classes of a segment, the unit in which a row is split over threads: a function of C
    /// alone, so that the order of all sums is one too. 64k classes, more past 4M of them.
    #[inline(always)]
    pub fn segment_len(&self) -> usize {
        const LEN: usize = 32 * CHUNK;
        if self.classes <= SEGMENTS * LEN {
            LEN
        } else {
            self.classes.div_ceil(SEGMENTS).next_multiple_of(CHUNK)
        }
    }

    /// Segments of a row, at most [`SEGMENTS`].
    #[inline(always)]
    pub fn segments(&self) -> usize {
        self.classes.div_ceil(self.segment_len())
    }

    /// The gradient is written around the caches.
    #[inline(always)]
    pub fn streams(&self) -> bool {
        self.gradient.is_some_and(|gradient| gradient.stream)
    }

    /// A row's logits, and those of the next, fit the second level of cache beside its gradient.
    #[inline(always)]
    pub fn fetches_ahead(&self) -> bool {
        self.classes * self.logits.size() <= 512 * 1024
    }

    /// Nothing is to be done but sum up exponentials in one sweep and multiply them in the other, and
    /// a row leaves the first level of cache between the two: the second sweep over one row then goes
    /// along with the first over the next. Measured in docs/performance.md.
    #[inline(always)]
    pub fn pairs_rows(&self) -> bool {
        self.pass == Pass::ForwardBackward
            && self.has_indices()
            && self.is_plain()
            && self.label_smoothing == 0.0
            && !self.scatters()
            && self.classes * self.logits.size() >= 32 * 1024
    }

    /// Whether the first sweep leaves exponentials in place of the logits: where the lanes' type
    /// holds them, and nothing else needs the logits again.
    #[inline(always)]
    pub fn keeps(&self) -> bool {
        matches!(self.pass, Pass::ForwardBackward | Pass::Softmax)
            && self.classes <= KEPT_CLASSES
            && !self.is_base_e()
            && self.transform.is_none()
            && matches!(self.logits.dtype, Dtype::F32 | Dtype::F64)
            && !matches!(self.targets, Targets::Probabilities(_))
            && self.gradient.is_some_and(|gradient| gradient.in_place)
    }

    /// A softmax whose exponentials are of base e, not of that of the sums: in f32, 88 below the
    /// largest, the two differ by 10 ulp; in f64 by a few. Halves are those of f32, rounded.
    #[inline(always)]
    pub fn is_base_e(&self) -> bool {
        self.pass == Pass::Softmax && self.logits.dtype.has_short_lanes()
    }

    /// Targets are classes.
    #[inline(always)]
    pub fn has_indices(&self) -> bool {
        matches!(self.targets, Targets::Indices(_))
    }

    /// There are targets of some kind.
    #[inline(always)]
    pub fn has_targets(&self) -> bool {
        !matches!(self.targets, Targets::Absent)
    }

    /// Rows start from an lse that is known.
    #[inline(always)]
    pub fn is_from_lse(&self) -> bool {
        matches!(self.pass, Pass::Backward | Pass::Targets)
    }

    /// The call computes losses, and whatever else goes with them.
    #[inline(always)]
    pub fn has_losses(&self) -> bool {
        matches!(self.pass, Pass::Forward | Pass::ForwardBackward)
    }

    /// A mass is spread over the classes, so that their logits are summed up too.
    #[inline(always)]
    pub fn spreads_mass(&self) -> bool {
        match self.targets {
            Targets::Absent => false,
            Targets::Indices(_) => self.label_smoothing > 0.0 && self.pass != Pass::Backward,
            Targets::Probabilities(_) => true,
        }
    }

    /// The sums leave out the largest logit, there being no target to leave out.
    #[inline(always)]
    pub fn leaves_top_out(&self) -> bool {
        let of_mass = matches!(self.targets, Targets::Probabilities(_));
        match self.pass {
            Pass::Softmax | Pass::LogSoftmax => true,
            Pass::Targets => false,
            _ => of_mass && !self.log_probs,
        }
    }

    /// The shift nearest to the logit `x`, which is finite or of no meaning.
    #[inline(always)]
    pub fn shift_at(&self, x: f64) -> Shift {
        if self.logits.dtype.has_short_lanes() { Shift::at(x as f32) } else { Shift::at(x) }
    }

    /// A row needs nothing of its logits but exponentials of them as they are.
    #[inline(always)]
    pub fn is_plain(&self) -> bool {
        self.transform.is_none()
            && self.entropy.is_none()
            && !self.log_probs
            && !self.wants_argmax()
    }

    /// The classes of a row have masses of their own.
    #[inline(always)]
    pub fn has_masses(&self) -> bool {
        self.class_weights.is_some() || matches!(self.targets, Targets::Probabilities(_))
    }

    /// What the gradient subtracts, a `bias` for each class's mass, differs by class, or the
    /// logits are not taken as they are.
    #[inline(always)]
    pub fn is_mixed(&self, bias: f64) -> bool {
        self.transform.is_some() || (bias != 0.0 && self.has_masses())
    }

    /// The logits' classes are contiguous, but the gradient's are not.
    #[inline(always)]
    pub fn scatters(&self) -> bool {
        self.gradient.is_some_and(|gradient| gradient.view.strides[1] != 1)
    }

    /// An exponential is taken at all.
    #[inline(always)]
    pub fn has_softmax(&self) -> bool {
        !self.log_probs
    }

    /// The largest logit is looked for.
    #[inline(always)]
    pub fn wants_argmax(&self) -> bool {
        self.pass != Pass::Backward && (self.argmax.is_some() || self.correct)
    }

    /// What a row is to predict.
    ///
    /// # Safety
    /// The row is one of the plan's, as for all below.
    #[inline(always)]
    pub unsafe fn target(&self, at: At) -> Target {
        if let Targets::Absent = self.targets {
            return Target::Absent;
        }
        // SAFETY: the views cover all rows.
        unsafe {
            if let Some(mask) = &self.row_mask
                && *mask.at(at, 0) == 0
            {
                return Target::Ignored;
            }
            match &self.targets {
                Targets::Indices(indices) => match indices.integer(at) {
                    y if y == self.ignore_index => Target::Ignored,
                    y => Target::Class(y as usize),
                },
                _ => Target::Mass,
            }
        }
    }

    /// r, the weight of a row.
    ///
    /// # Safety
    /// See [`target`](Self::target).
    #[inline(always)]
    pub unsafe fn row_weight(&self, at: At) -> f64 {
        match &self.row_weights {
            // SAFETY: the view covers all rows.
            Some(view) => unsafe { view.real(at, 0) },
            None => 1.0,
        }
    }

    /// w_c, the weight of `class`.
    ///
    /// # Safety
    /// `class < self.classes`
    #[inline(always)]
    pub unsafe fn class_weight(&self, class: usize) -> f64 {
        match &self.class_weights {
            // SAFETY: the view covers all classes.
            Some(view) => unsafe { view.real(At { row: 0, inner: 0 }, class) },
            None => 1.0,
        }
    }

    /// The mass of the classes from `class` on: `w_c·t'_c` of probability targets, else `w_c`,
    /// which the smoothing spreads.
    ///
    /// # Safety
    /// The plan has the classes `class..class + to.len()`, and the row.
    pub unsafe fn mass(&self, at: At, class: usize, to: &mut [f64]) {
        let first = At { row: 0, inner: 0 };
        let Targets::Probabilities(targets) = &self.targets else {
            match &self.class_weights {
                // SAFETY: the view covers all classes.
                Some(weights) => unsafe { weights.reals(first, class, to) },
                None => to.fill(1.0),
            }
            return;
        };
        let (keep, spread) =
            (1.0 - self.label_smoothing, self.label_smoothing / self.classes as f64);
        if keep == 0.0 {
            to.fill(spread);
        } else {
            // SAFETY: the view covers all rows and classes.
            unsafe { targets.reals(at, class, to) };
            if self.label_smoothing != 0.0 {
                to.iter_mut().for_each(|t| *t = *t * keep + spread);
            }
        }
        if let Some(weights) = &self.class_weights {
            let mut buffer = [0.0; 256];
            for (i, to) in to.chunks_mut(buffer.len()).enumerate() {
                let w = &mut buffer[..to.len()];
                // SAFETY: the view covers all classes.
                unsafe { weights.reals(first, class + i * 256, w) };
                for (to, w) in to.iter_mut().zip(w) {
                    *to = if *w == 0.0 { 0.0 } else { *to * *w };
                }
            }
        }
    }
}
