//! A validated problem as plain data: pointers, strides and the scalars that all rows share.
//!
//! problem.rs makes plans and nobody else does. What it established is what everything below
//! relies on: every view covers its whole shape in memory that the caller handed over for this
//! call, aligned to its elements; outputs overlap nothing but, where `in_place` says so, the
//! logits; every target is in range or ignored.

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
}

/// An operand in memory: element `(row, class)` is at `data + (row·strides[0] + class·strides[1])`
/// elements.
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
    /// The first element of `row`.
    ///
    /// # Safety
    /// The view covers `row`, as a plan's views cover its rows.
    #[inline(always)]
    pub unsafe fn row<T>(&self, row: usize) -> *mut T {
        // SAFETY: in bounds as the caller promises; problem.rs checked that the offset of the
        // last element does not overflow.
        unsafe { self.data.cast::<T>().offset(row as isize * self.strides[0]) }
    }

    /// The integer at `row`, of an operand without a class axis.
    ///
    /// # Safety
    /// As [`row`](Self::row); the dtype is an integer.
    #[inline(always)]
    pub unsafe fn integer(&self, row: usize) -> i64 {
        // SAFETY: in bounds and aligned (problem.rs); the dtype says what is there.
        unsafe {
            match self.dtype {
                Dtype::I64 => *self.row::<i64>(row),
                Dtype::I32 => i64::from(*self.row::<i32>(row)),
                Dtype::U32 => i64::from(*self.row::<u32>(row)),
                Dtype::U16 => i64::from(*self.row::<u16>(row)),
                _ => i64::from(*self.row::<u8>(row)),
            }
        }
    }

    /// The real number at `(row, class)`.
    ///
    /// # Safety
    /// The view covers the element; the dtype is a float.
    #[inline(always)]
    pub unsafe fn real(&self, row: usize, class: usize) -> f64 {
        let at = class as isize * self.strides[1];
        // SAFETY: in bounds and aligned (problem.rs); the dtype says what is there.
        unsafe {
            match self.dtype {
                Dtype::F64 => *self.row::<f64>(row).offset(at),
                Dtype::Bf16 => (*self.row::<half::bf16>(row).offset(at)).to_f64(),
                Dtype::F16 => (*self.row::<half::f16>(row).offset(at)).to_f64(),
                _ => f64::from(*self.row::<f32>(row).offset(at)),
            }
        }
    }

    /// Writes a real number to `(row, class)`, rounded: to f32 first, if it is a half.
    ///
    /// # Safety
    /// As [`real`](Self::real), and no other thread is at the element.
    #[inline(always)]
    pub unsafe fn set_real(&self, row: usize, class: usize, value: f64) {
        let at = class as isize * self.strides[1];
        // SAFETY: as above.
        unsafe {
            match self.dtype {
                Dtype::F64 => *self.row::<f64>(row).offset(at) = value,
                Dtype::Bf16 => {
                    *self.row::<half::bf16>(row).offset(at) = half::bf16::from_f32(value as f32);
                }
                Dtype::F16 => {
                    *self.row::<half::f16>(row).offset(at) = half::f16::from_f32(value as f32)
                }
                _ => *self.row::<f32>(row).offset(at) = value as f32,
            }
        }
    }
}

/// Which of the three calls this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    /// Losses and lse.
    Forward,
    /// The gradient, from lse.
    Backward,
    /// Both.
    ForwardBackward,
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
}

/// A validated problem.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Which call.
    pub pass: Pass,
    /// Rows.
    pub rows: usize,
    /// Classes.
    pub classes: usize,
    /// `[rows, classes]`
    pub logits: View,
    /// Class indices, `[rows]`.
    pub targets: Option<View>,
    /// `[classes]`
    pub class_weights: Option<View>,
    /// Σ of the class weights; the number of classes without them.
    pub weight_total: f64,
    /// A power of 2: what f64 class weights are counted in where lanes of f32 hold them (in
    /// gradients), so that they fit. 1 for others.
    pub weight_unit: f64,
    /// `[rows]`
    pub row_weights: Option<View>,
    /// u8 `[rows]`; 0 = ignored.
    pub row_mask: Option<View>,
    /// The target that means "ignore this row".
    pub ignore_index: i64,
    /// ε
    pub label_smoothing: f64,
    /// Output: f32 or f64 `[rows]`.
    pub row_losses: Option<View>,
    /// f64 `[rows]`: an input of backward, an output of the other two.
    pub lse: Option<View>,
    /// The gradient, but for forward.
    pub gradient: Option<Gradient>,
}

// SAFETY: a plan is addresses and numbers. Threads that share one read the operands and write
// disjoint rows or disjoint classes of a row of the outputs (parallel.rs).
unsafe impl Sync for Plan {}

/// Classes whose exponentials are summed together and share a reference.
pub const CHUNK: usize = 2048;

/// The most segments a row is cut into, and the most chunks of a segment that are told apart.
pub const SEGMENTS: usize = 64;

/// Classes up to which the fused call keeps the exponentials of its first sweep for the second.
pub const KEPT_CLASSES: usize = SEGMENTS * SEGMENTS * CHUNK;

impl Plan {
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
        self.classes * self.logits.dtype.size() <= 512 * 1024
    }

    /// What `row` is to predict.
    ///
    /// # Safety
    /// `row < self.rows`, as for all below.
    #[inline(always)]
    pub unsafe fn target(&self, row: usize) -> Target {
        let Some(targets) = &self.targets else {
            return Target::Absent;
        };
        // SAFETY: the views cover all rows.
        let y = unsafe {
            if let Some(mask) = &self.row_mask
                && *mask.row::<u8>(row) == 0
            {
                return Target::Ignored;
            }
            targets.integer(row)
        };
        if y == self.ignore_index { Target::Ignored } else { Target::Class(y as usize) }
    }

    /// r, the weight of `row`.
    ///
    /// # Safety
    /// `row < self.rows`
    #[inline(always)]
    pub unsafe fn row_weight(&self, row: usize) -> f64 {
        match &self.row_weights {
            // SAFETY: the view covers all rows.
            Some(view) => unsafe { view.real(row, 0) },
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
            Some(view) => unsafe { view.real(0, class) },
            None => 1.0,
        }
    }
}
