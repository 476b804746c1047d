//! The second sweep over a chunk: it writes the gradient, or the softmax.

use super::block::Interleaved;
use crate::element::Element;
use crate::kernels::row_math::power_of_2;
use crate::math::exp2::{
    Base, ByExponent, ByLogit, Clamped, Exp2, Shift, Unclamped, exponent, nearest,
};
use crate::math::scalar::{exp2, log2};
use crate::simd::{Real, Simd, up_to};
use crate::strategy::{CHUNK, LINE};
use std::marker::PhantomData;
use std::ops::Range;

/// `P·p_c = 2^t·factor`, with the exponents t counted from the shift.
#[derive(Clone, Copy, Debug)]
pub struct ExpScale {
    /// The shift of the exponentials.
    pub shift: Shift,
    /// What they are multiplied by.
    pub factor: f64,
}

/// What the second sweep subtracts.
#[derive(Clone, Copy, Debug)]
pub enum Bias {
    /// The same from every class; +0 for nothing, which leaves every bit as it is.
    Uniform(f64),
    /// One number of the lanes' type for each class.
    PerClass(*const u8),
}

/// Where the second sweep gets its exponentials from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// They are stored in place of the logits.
    Stored,
    /// Logits whose exponents are known to be in range.
    InRange,
    /// Logits.
    Logits,
    /// Logits, whose exponentials are to be of base e.
    BaseE,
    /// There are none: the gradient is what is subtracted.
    None,
    /// Logits without exponentials: their distance from the shift, less the factor.
    LogSoftmax,
}

/// A chunk in the second sweep.
#[derive(Clone, Copy, Debug)]
pub struct GradientChunk {
    /// The logits, or the exponentials in their place.
    pub x: *const u8,
    /// How many.
    pub len: usize,
    /// Where the gradient goes.
    pub g: *mut u8,
    /// The excluded class, whose entry the driver writes later.
    pub excluded: Option<usize>,
    /// The logits of a row to come, prefetched on the way; null for none.
    pub next: *const u8,
    /// What is computed from `x`.
    pub source: Source,
    /// The shift of the exponentials, and what they are multiplied by.
    pub exps: ExpScale,
    /// What is subtracted then.
    pub bias: Bias,
    /// What the difference is multiplied by.
    pub scale: f64,
    /// What the result is multiplied by class by class, in the lanes' type; null for 1.
    pub slope: *const u8,
    /// The gradient is added to what the memory holds.
    pub accumulate: bool,
    /// Stores bypass the caches.
    pub stream: bool,
}

impl GradientChunk {
    /// Whether one factor, one bias and no scale will do.
    #[inline(always)]
    pub fn is_fast(&self) -> bool {
        let uniform = matches!(self.bias, Bias::Uniform(_)) && self.slope.is_null();
        uniform && is_moderate(self.exps.factor) && self.scale == 1.0
    }

    /// Whether [`sums_and_gradient`](super::interleaved::sums_and_gradient) takes the chunk beside a sum
    /// that stores its exponentials, or does not.
    #[inline(always)]
    pub fn can_interleave(&self, stores: bool) -> bool {
        let source = if stores { Source::Stored } else { Source::InRange };
        let fast = self.is_fast() && !self.exps.shift.is_by_logit();
        self.source == source && fast && !self.accumulate
    }
}

/// Whether a factor is a normal f32 far from the ends of its range, or 0, infinite or NaN.
#[inline(always)]
fn is_moderate(factor: f64) -> bool {
    let size = factor.abs();
    let (low, high) = (power_of_2(-100), power_of_2(100));
    (low..=high).contains(&size) || size == 0.0 || !size.is_finite()
}

/// Two moderate factors whose product is `factor`, the first a power of 2: the product with an
/// exponential may be in range although `factor` is not.
#[inline(always)]
pub fn split_factor(factor: f64) -> (f64, f64) {
    if is_moderate(factor) {
        return (1.0, factor);
    }
    let half = nearest(log2(factor.abs()) * 0.5).clamp(-126.0, 126.0);
    (exp2(half), factor * exp2(-half))
}

/// A [`Source`] as a type.
pub trait SourceType: Copy {
    /// The source.
    const SOURCE: Source;
}

macro_rules! source_types {
    ($($name:ident: $source:ident),*) => {
        $(
            #[doc = concat!("[`Source::", stringify!($source), "`]")]
            #[derive(Clone, Copy)]
            pub struct $name;
            impl SourceType for $name {
                const SOURCE: Source = Source::$source;
            }
        )*
    };
}
source_types!(
    Stored: Stored,
    InRange: InRange,
    Logits: Logits,
    BaseE: BaseE,
    NoExps: None,
    LogSoftmax: LogSoftmax
);

/// The compile-time choices of a sweep.
pub trait SweepMode: Copy {
    /// What is computed from the logits: `None` if the chunk says so.
    const SOURCE: Option<Source>;
    /// The shift may have a logit, the factor is applied in two steps, and each class may have a bias and
    /// a slope of its own.
    const GENERAL: bool;
}

/// One factor and one bias for all classes, and a shift without a logit.
#[derive(Clone, Copy)]
pub struct Fast<T>(PhantomData<T>);

/// Everything that a chunk may ask for.
#[derive(Clone, Copy)]
pub struct General<T>(PhantomData<T>);

/// The same, of any source; a shift whose exponents are in range has no logit.
#[derive(Clone, Copy)]
pub struct Any;

impl<T: SourceType> SweepMode for Fast<T> {
    const SOURCE: Option<Source> = Some(T::SOURCE);
    const GENERAL: bool = false;
}

impl<T: SourceType> SweepMode for General<T> {
    const SOURCE: Option<Source> = Some(T::SOURCE);
    const GENERAL: bool = true;
}

impl SweepMode for Any {
    const SOURCE: Option<Source> = None;
    const GENERAL: bool = true;
}

/// Writes `(2^(L·(x - shift.logit) - shift.exponent)·factor - bias)·scale·slope` to `g`, with log2 e for L
/// if the source is `BaseE`.
///
/// # Safety
/// The logits are readable elements of `E`, biases and slopes readable lanes, one per class each; `g` is
/// writable for as many elements of `G`, and is exactly the logits or apart from them; if the chunk is
/// streamed, `G` elements are aligned to their size; the processor has the set of `s`.
#[inline(always)]
pub unsafe fn gradient<S: Simd<Real: Base>, E: Element<S>, G: Element<S>>(
    s: S,
    chunk: &GradientChunk,
) {
    let fast = chunk.is_fast();
    let by_logit = chunk.exps.shift.is_by_logit();
    if !S::FUSED {
        // SAFETY: this function's own # Safety.
        return unsafe { sweep::<S, E, G, Any>(s, chunk) };
    }
    // SAFETY: for every call, the chunk is readable and writable as `sweep` asks (# Safety).
    unsafe {
        match chunk.source {
            Source::Stored if fast && E::NATIVE => sweep::<S, E, G, Fast<Stored>>(s, chunk),
            Source::Stored if E::NATIVE => sweep::<S, E, G, General<Stored>>(s, chunk),
            Source::InRange if fast => sweep::<S, E, G, Fast<InRange>>(s, chunk),
            Source::None => sweep::<S, E, G, General<NoExps>>(s, chunk),
            Source::LogSoftmax => sweep::<S, E, G, Fast<LogSoftmax>>(s, chunk),
            Source::BaseE if fast && !by_logit => sweep::<S, E, G, Fast<BaseE>>(s, chunk),
            Source::BaseE => sweep::<S, E, G, General<BaseE>>(s, chunk),
            Source::Stored | Source::InRange | Source::Logits if fast && !by_logit => {
                sweep::<S, E, G, Fast<Logits>>(s, chunk);
            }
            Source::Stored | Source::InRange | Source::Logits => {
                sweep::<S, E, G, General<Logits>>(s, chunk);
            }
        }
    }
}

/// # Safety
/// As [`gradient`]; the chunk asks for no more than `M` can do.
#[inline(always)]
unsafe fn sweep<S: Simd<Real: Base>, E: Element<S>, G: Element<S>, M: SweepMode>(
    s: S,
    chunk: &GradientChunk,
) {
    let edges = Edges::of::<S, G>(s, chunk);
    let sweep = Sweep::<S, M>::new(s, chunk);
    // SAFETY: the chunk is readable and writable as `Writer::new` asks (# Safety).
    unsafe { Writer::<S, E, G, M>::new(&sweep, chunk, edges) }.whole();
}

/// The arithmetic of the second sweep.
#[derive(Clone, Copy)]
pub struct Sweep<S: Simd, M> {
    s: S,
    mode: PhantomData<M>,
    // One of the two is used, if any.
    by_exponent: Exp2<S, ByExponent>,
    by_logit: Exp2<S, ByLogit>,
    first_factor: S::Vector,
    factor: S::Vector,
    minus_bias: S::Vector,
    scale: S::Vector,
    biases: *const S::Real,
    slopes: *const S::Real,
    source: Source,
    /// Of a log-softmax: the shift's logit and exponent, minus the distance of the lse from the shift.
    log: [f64; 3],
}

impl<S: Simd<Real: Base>, M: SweepMode> Sweep<S, M> {
    /// The arithmetic for a chunk.
    #[inline(always)]
    pub fn new(s: S, chunk: &GradientChunk) -> Self {
        let ExpScale { shift, factor } = chunk.exps;
        let (first, rest) = if M::GENERAL { split_factor(factor) } else { (1.0, factor) };
        let (bias, biases) = match chunk.bias {
            Bias::Uniform(bias) => (bias, std::ptr::null()),
            Bias::PerClass(biases) => (0.0, biases.cast()),
        };
        Sweep {
            s,
            mode: PhantomData,
            by_exponent: Exp2::new(s, shift),
            by_logit: Exp2::new(s, shift),
            first_factor: s.splat(S::Real::from_f64(first)),
            factor: s.splat(S::Real::from_f64(rest)),
            // +0, since -0 would leave -0 where a term of 0 is multiplied by a negative factor.
            minus_bias: s.splat(S::Real::from_f64(0.0 - bias)),
            scale: s.splat(S::Real::from_f64(chunk.scale)),
            biases,
            slopes: chunk.slope.cast(),
            source: chunk.source,
            log: [shift.logit, shift.exponent, -factor],
        }
    }

    /// The gradient of class `at` and those after it, whose logits, or stored exponentials, are `x`.
    ///
    /// # Safety
    /// Class `at + i` is one of the chunk's for every bit i of `lanes`.
    #[inline(always)]
    unsafe fn value(&self, x: S::Vector, at: usize, lanes: u32) -> S::Vector {
        let s = self.s;
        let source = M::SOURCE.unwrap_or(self.source);
        let e = match source {
            Source::Stored => x,
            Source::InRange => self.by_exponent.value::<Unclamped>(x),
            Source::Logits if M::GENERAL => self.by_logit.value::<Clamped>(x),
            Source::Logits => self.by_exponent.value::<Clamped>(x),
            Source::BaseE if M::GENERAL => self.by_logit.base_e(x),
            Source::BaseE => self.by_exponent.base_e(x),
            Source::None => s.splat(S::Real::ZERO),
            Source::LogSoftmax => {
                let (d, mut wide) = (s.wide(), s.widen(x));
                let [logit, by, minus_lse] = self.log.map(|x| d.splat(x));
                let inverse = d.splat(S::Real::INVERSE.0);
                for x in wide.as_mut() {
                    let above = exponent(s, d.sub(*x, logit), by);
                    *x = d.mul_add(above, inverse, minus_lse);
                }
                return s.narrow(wide);
            }
        };
        if !M::GENERAL {
            return s.mul_add(e, self.factor, self.minus_bias);
        }
        let zero = S::Real::ZERO;
        let minus_bias = if self.biases.is_null() {
            self.minus_bias
        } else {
            // SAFETY: the lanes are classes of the chunk (# Safety), which have a bias each
            // (`gradient`).
            let bias = unsafe { s.load_lanes(self.biases.wrapping_add(at), lanes, zero) };
            s.sub(s.splat(zero), bias)
        };
        let v = if source == Source::None {
            minus_bias
        } else {
            s.mul_add(s.mul(e, self.first_factor), self.factor, minus_bias)
        };
        let v = s.mul(v, self.scale);
        if self.slopes.is_null() {
            return v;
        }
        // SAFETY: the lanes are classes of the chunk (# Safety), which have a slope each (`gradient`).
        s.mul(v, unsafe { s.load_lanes(self.slopes.wrapping_add(at), lanes, zero) })
    }

    /// Writes the classes of `range`, register after register.
    ///
    /// # Safety
    /// As [`gradient`]; `range` is within the chunk.
    #[inline(always)]
    unsafe fn part<E: Element<S>, G: Element<S>>(
        &self,
        chunk: &GradientChunk,
        range: Range<usize>,
    ) {
        let (s, zero) = (self.s, S::Real::ZERO);
        let (x, g) = (chunk.x.cast::<E>(), chunk.g.cast::<G>());
        for at in range.clone().step_by(S::LANES) {
            let lanes = up_to::<S>(range.end - at);
            // SAFETY: the lanes are classes of the chunk below `range.end`, which are readable and
            // writable (# Safety).
            unsafe {
                let x = E::load_lanes(s, x.wrapping_add(at), lanes, zero);
                let mut v = self.value(x, at, lanes);
                if chunk.accumulate {
                    v = s.add(G::load_lanes(s, g.wrapping_add(at), lanes, zero), v);
                }
                G::store_lanes(s, g.wrapping_add(at), lanes, v);
            }
        }
    }
}

/// Where the blocks of a chunk start, and which block is not streamed.
#[derive(Clone, Copy)]
pub struct Edges {
    /// The first class of the first block.
    head: usize,
    /// The first class of the block that is not streamed; past every chunk if all are.
    cached: usize,
}

impl Edges {
    /// The edges of a chunk whose gradient is of type `G`. Streamed stores are whole cache lines. What is
    /// not, at both ends, and the block with the excluded class, which is written once more, goes through
    /// the cache; those lines are prefetched here, since a store that waits for its line holds up all
    /// stores behind it.
    #[inline(always)]
    pub fn of<S: Simd, G>(s: S, chunk: &GradientChunk) -> Edges {
        let (g, len) = (chunk.g.cast::<G>(), chunk.len);
        let mut edges = Edges { head: 0, cached: usize::MAX / 2 };
        if chunk.stream || len > CHUNK {
            // In a long chunk no store may be split between two lines, nor, in place, a load. (Memory that
            // is not aligned to its type is never aligned to lines.)
            edges.head = g.align_offset(LINE).min(len).min(S::BLOCK - 1);
        }
        if chunk.stream {
            let fetch = |classes: Range<usize>| {
                for class in classes.step_by(LINE / size_of::<G>()) {
                    s.prefetch_write(g.wrapping_add(class).cast());
                }
            };
            let block_of = |class: usize| class - (class - edges.head) % S::BLOCK;
            fetch(block_of(len)..len);
            if let Some(y) = chunk.excluded.filter(|&y| y >= edges.head) {
                edges.cached = block_of(y);
                fetch(edges.cached..edges.cached + S::BLOCK);
            }
        }
        edges
    }
}

/// A second sweep on its way, block by block.
pub struct Writer<'a, S: Simd, E, G, M> {
    sweep: &'a Sweep<S, M>,
    chunk: &'a GradientChunk,
    /// The first class of the next block.
    at: usize,
    /// The block of the row to come that is prefetched next; null for none.
    next: *const E,
    /// How many classes `next` moves at a time.
    step: usize,
    /// See [`Edges`].
    cached: usize,
    output: PhantomData<G>,
}

impl<'a, S, E, G, M> Writer<'a, S, E, G, M>
where
    S: Simd<Real: Base>,
    E: Element<S>,
    G: Element<S>,
    M: SweepMode,
{
    /// A sweep that has written nothing yet.
    ///
    /// # Safety
    /// As [`gradient`], for as long as the writer lives; the chunk asks for no more than `M` can do.
    #[inline(always)]
    pub unsafe fn new(sweep: &'a Sweep<S, M>, chunk: &'a GradientChunk, edges: Edges) -> Self {
        let Edges { head, cached } = edges;
        let next = chunk.next.cast::<E>();
        // `next` stays null, or never becomes null. A compiler that knew would compile the loop twice.
        let (next, step) =
            if next.is_null() { (next, 0) } else { (next.wrapping_add(head), S::BLOCK) };
        Writer { sweep, chunk, at: head, next, step, cached, output: PhantomData }
    }

    /// Writes what comes before the first block.
    #[inline(always)]
    pub fn head(&self) {
        // SAFETY: `at` is at most `len` (`Edges::of`); `new` asks for the rest.
        unsafe { self.sweep.part::<E, G>(self.chunk, 0..self.at) };
    }

    /// Writes what is left after the head. Nothing is accumulated.
    #[inline(always)]
    pub fn finish(mut self) {
        while self.at < self.end() {
            self.step();
        }
        // SAFETY: the classes end with the chunk; `new` asks for the rest.
        unsafe { self.sweep.part::<E, G>(self.chunk, self.at..self.chunk.len) };
    }

    /// Writes everything. Both ends go through the same code, of which there is much.
    #[inline(always)]
    fn whole(mut self) {
        let (mut start, mut end) = (0, self.at);
        loop {
            // SAFETY: `start..end` are classes before the first block or after the last; `new` asks for
            // the rest.
            unsafe { self.sweep.part::<E, G>(self.chunk, start..end) };
            if end == self.chunk.len {
                return;
            }
            if M::GENERAL || self.chunk.accumulate {
                self.registers();
            } else {
                self.blocks();
            }
            (start, end) = (self.at, self.chunk.len);
        }
    }

    /// Where the last block ends.
    #[inline(always)]
    fn end(&self) -> usize {
        self.chunk.len - (self.chunk.len - self.at) % S::BLOCK
    }

    /// Writes all blocks, and accumulates nothing.
    #[inline(always)]
    fn blocks(&mut self) {
        let end = self.end();
        while self.at < end {
            // Decided for as many blocks as possible: for each register, the decision would cost as much
            // as some of its arithmetic.
            if self.streams() {
                let cached = if self.at < self.cached { self.cached } else { end };
                while self.at < end.min(cached) {
                    self.block(true);
                }
            } else {
                let some = if self.chunk.stream { self.at + S::BLOCK } else { end };
                while self.at < some {
                    self.block(false);
                }
            }
        }
    }

    /// Writes all blocks, or accumulates them, register after register: general arithmetic does more for
    /// each, and there is much of its code.
    #[inline(always)]
    fn registers(&mut self) {
        let end = self.end();
        while self.at < end {
            if self.at % S::BLOCK < S::LANES {
                self.fetch();
            }
            let stream = self.chunk.stream && self.at.wrapping_sub(self.cached) >= S::BLOCK;
            // SAFETY: `at` is below `end`, so the register is in a block of the chunk.
            unsafe { self.register::<Accumulating>(self.at, stream) };
            self.at += S::LANES;
        }
    }

    /// Whether the next block's stores bypass the caches.
    #[inline(always)]
    fn streams(&self) -> bool {
        self.chunk.stream && self.at != self.cached
    }

    /// Writes a whole block, and accumulates nothing.
    #[inline(always)]
    fn block(&mut self, stream: bool) {
        self.fetch();
        for j in (0..S::BLOCK).step_by(S::LANES) {
            // SAFETY: the callers write blocks that end at or before `end()`.
            unsafe { self.register::<Overwriting>(self.at + j, stream) };
        }
        self.at += S::BLOCK;
    }

    /// Writes a whole register, or accumulates it if `W` may and the chunk asks for it.
    ///
    /// # Safety
    /// The register is in the chunk, and in a block if it is streamed.
    #[inline(always)]
    unsafe fn register<W: WriteMode>(&self, at: usize, stream: bool) {
        let (s, chunk) = (self.sweep.s, self.chunk);
        let (x, to) = (chunk.x.cast::<E>(), chunk.g.cast::<G>().wrapping_add(at));
        // SAFETY: the register is in the chunk (# Safety), which `new` asks to be readable and writable;
        // where it is streamed, blocks start at a cache line (`Edges::of`).
        unsafe {
            let mut v = self.sweep.value(E::load(s, x.add(at)), at, up_to::<S>(S::LANES));
            if W::MAY_ACCUMULATE && chunk.accumulate {
                v = s.add(G::load(s, to), v);
            }
            if stream { G::stream(s, to, v) } else { G::store(s, to, v) }
        }
    }

    /// Prefetches a block of the row to come.
    #[inline(always)]
    fn fetch(&mut self) {
        if !self.next.is_null() {
            for line in 0..S::BLOCK * size_of::<E>() / LINE {
                self.sweep.s.prefetch_l2(self.next.cast::<u8>().wrapping_add(line * LINE));
            }
        }
        self.next = self.next.wrapping_add(self.step);
    }
}

/// Whether a register may be accumulated.
trait WriteMode {
    const MAY_ACCUMULATE: bool;
}

struct Accumulating;
struct Overwriting;

impl WriteMode for Accumulating {
    const MAY_ACCUMULATE: bool = true;
}
impl WriteMode for Overwriting {
    const MAY_ACCUMULATE: bool = false;
}

impl<S, E, G, M> Interleaved for Writer<'_, S, E, G, M>
where
    S: Simd<Real: Base>,
    E: Element<S>,
    G: Element<S>,
    M: SweepMode,
{
    #[inline(always)]
    fn step(&mut self) {
        if self.at < self.end() {
            if self.streams() {
                self.block(true);
            } else {
                self.block(false);
            }
        }
    }
}
