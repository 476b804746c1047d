//! Rows whose classes are contiguous: lanes along classes.
//!
//! # Forward: one read, no maximum first
//!
//! ```text
//! anchor: c = integer nearest to L·max of the first 256 classes
//! for each chunk of 2048 classes:
//!     sum = Σ 2^(L·x - c)                       64 lanes, flushed to f64 every 512 classes
//!     if an exponent was out of range:          ("wild": -inf, say)
//!         the same sum again, arguments clamped
//!     if sum is outside the safe range:         (a logit far above the anchor)
//!         c' = integer nearest to L·max of the chunk
//!         sum = Σ 2^(L·x - c')
//!     push (c or c', sum) to the row's state    in class order, f64
//! ```
//!
//! A chunk's result depends on the anchor and on itself alone, so chunks can be computed
//! anywhere, in any order, and redone without touching others. The target's class is left out of
//! all of it: row.rs adds it in f64, which keeps `rest = Σ over the others` as exact as it is small.
//!
//! # Gradient: a second sweep, while the row is in cache
//!
//! `P·p_c = 2^(L·x_c - c)·F`, one factor for the whole row. In place, the first sweep leaves
//! `2^(L·x - c)` where the logits were and the second only multiplies; out of place the
//! exponentials are computed again, from the same reference to the same bits, so that the
//! gradient is written once and can be streamed. Chunks that were redone keep their logits and are computed relative to
//! the reference that the row's sum ended with. See docs/design.md.
//!
//! # Tails and holes
//!
//! Lanes past the end and the target's lane are masked loads of -inf, whose exponential is 0. The
//! block with the target is skipped by the loop (`block + (block ≥ hole)`, no branch) and done last.

use super::Kernels;
use super::online::Partial;
use super::row::{Anchor, Curve, Job, Row, RowGradient, RowSum};
use crate::element::Element;
use crate::math::exp2::{Exp2, Reference, WATCHED};
use crate::plan::{CHUNK, Dtype, Gradient, KEPT_CLASSES, Pass, Plan, SEGMENTS, View};
use crate::simd::{BLOCK, Simd};
use std::mem::MaybeUninit;
use std::ops::Range;

/// Classes that the anchor is taken from.
const HEAD: usize = 4 * BLOCK;

/// Blocks summed in f32 before they are flushed: no more than 8 additions a lane.
const GROUP: usize = 8;

/// Bytes that a sweep prefetches ahead: of 0, 512, 2048, 4096 and 8192 this was mostly the fastest.
const AHEAD: usize = 4096;

/// Bytes of a cache line.
const LINE: usize = 64;

/// A chunk's sum above this is redone: exponentials that are kept for the second sweep then stay
/// far from overflow.
const SAFE_HIGH: f64 = (1u64 << 60) as f64;

/// Without a real anchor, a chunk's sum below this is redone too: what is flushed to 0 beside it
/// is less than 2^-125 of the row.
const SAFE_LOW: f64 = 0.5;

/// What the first sweep adds up besides exponentials: nothing, `Σ (x - center)`, or
/// `Σ w·(x - center)`.
const DOT_NONE: u8 = 0;
const DOT_UNIFORM: u8 = 1;
const DOT_WEIGHTED: u8 = 2;

/// Where the second sweep gets exponentials from.
const KEPT: u8 = 0;
const TAME: u8 = 1;
const NEAR: u8 = 2;
const FAR: u8 = 3;

/// What it subtracts: nothing, a constant, or a multiple of the class weights.
const BIAS_NONE: u8 = 0;
const BIAS_UNIFORM: u8 = 1;
const BIAS_WEIGHTED: u8 = 2;

/// Weights of a block in which every lane counts the same.
static ONES: [f32; BLOCK] = [1.0; BLOCK];

/// The bits of register `i` out of a mask of [`BLOCK`] lanes.
#[inline(always)]
fn lanes_of<S: Simd>(mask: u64, i: usize) -> u32 {
    (mask >> (i * S::LANES)) as u32 & ((1u64 << S::LANES) - 1) as u32
}

/// A mask of the first `n < 64` lanes.
#[inline(always)]
fn first_lanes(n: usize) -> u64 {
    (1u64 << n) - 1
}

/// The masks of the blocks of `len` elements that cannot be loaded whole, and the number of
/// those that can.
#[derive(Clone, Copy)]
struct Blocks {
    /// Blocks with all lanes.
    whole: usize,
    /// The block with the hole (`usize::MAX`: none of the whole ones), to be left out of a loop
    /// over the whole ones.
    hole: usize,
    hole_mask: u64,
    /// Lanes of the block after the last whole one, without the hole.
    tail_mask: u64,
}

impl Blocks {
    #[inline(always)]
    fn new(len: usize, hole: Option<usize>) -> Self {
        let whole = len / BLOCK;
        let mut blocks =
            Blocks { whole, hole: usize::MAX, hole_mask: 0, tail_mask: first_lanes(len % BLOCK) };
        if let Some(hole) = hole {
            let lane = !(1u64 << (hole % BLOCK));
            if hole / BLOCK < whole {
                blocks.whole -= 1;
                blocks.hole = hole / BLOCK;
                blocks.hole_mask = lane;
            } else {
                blocks.tail_mask &= lane;
            }
        }
        blocks
    }

    /// Element at which the `i`-th block without a hole starts.
    #[inline(always)]
    fn whole_at(&self, i: usize) -> usize {
        (i + usize::from(i >= self.hole)) * BLOCK
    }

    /// The masked blocks: `(first element, mask)`; an empty mask where there is none.
    #[inline(always)]
    fn masked(&self) -> [(usize, u64); 2] {
        let tail = self.whole + usize::from(self.hole != usize::MAX);
        [(self.hole.wrapping_mul(BLOCK), self.hole_mask), (tail * BLOCK, self.tail_mask)]
    }
}

/// Class weights, in units of the plan's.
#[derive(Clone, Copy)]
struct Weights<'a> {
    view: Option<&'a View>,
    factor: f64,
}

impl<'a> Weights<'a> {
    const NONE: Weights<'static> = Weights { view: None, factor: 1.0 };

    #[inline(always)]
    fn of(plan: &'a Plan) -> Self {
        Weights { view: plan.class_weights.as_ref(), factor: 1.0 / plan.weight_unit }
    }

    #[inline(always)]
    fn is_f64(&self) -> bool {
        self.view.is_some_and(|view| view.dtype == Dtype::F64)
    }
}

/// Class weights of the block at `class`, 1 without any; 0 in lanes outside `mask`.
///
/// # Safety
/// `weights` covers the classes of the mask.
#[inline(always)]
unsafe fn load_weights<S: Simd>(s: S, weights: Weights, class: usize, mask: u64) -> S::Block {
    let mut block = s.splat_block(0.0);
    let mut gathered = [0.0f32; BLOCK];
    let p = match weights.view {
        None => ONES.as_ptr(),
        Some(view) if view.dtype == Dtype::F32 && view.strides[1] == 1 => {
            // SAFETY: `class` is in bounds, as the caller promises.
            unsafe { view.row::<f32>(0).add(class).cast_const() }
        }
        Some(view) => {
            for (lane, w) in gathered.iter_mut().enumerate() {
                if mask >> lane & 1 == 1 {
                    // SAFETY: a class of the mask.
                    *w = (unsafe { view.real(0, class + lane) } * weights.factor) as f32;
                }
            }
            gathered.as_ptr()
        }
    };
    for (i, w) in block.as_mut().iter_mut().enumerate() {
        let lanes = lanes_of::<S>(mask, i);
        // SAFETY: `p` holds the weights of the lanes in the mask.
        *w = unsafe { s.load_lanes(p.wrapping_add(i * S::LANES), lanes, 0.0) };
    }
    block
}

/// A chunk's memory: the logits, and where they and their exponentials go if they are kept.
#[derive(Clone, Copy)]
pub struct Chunk<'a, E> {
    x: *const E,
    /// The class of the first element.
    class: usize,
    len: usize,
    hole: Option<usize>,
    /// Where exponentials go, the logits' own place, and a copy of the logits in case they must
    /// be put back. Null unless they are kept.
    kept: *mut E,
    backup: *mut E,
    center: f64,
    weights: Weights<'a>,
    /// The logits of a row to come, to be fetched on the way; null for none.
    next: *const E,
}

/// What a sweep over a chunk adds up.
pub struct Sums {
    /// Σ 2^(L·x − c)
    sum: f64,
    /// Σ w·(x − center)
    dot: f64,
    /// No exponent was out of range.
    tame: bool,
}

impl<E: Element> Chunk<'_, E> {
    /// The largest logit but the hole's; NaN counts for nothing.
    ///
    /// # Safety
    /// The chunk's logits are readable.
    #[inline(always)]
    unsafe fn max<S: Simd>(&self, s: S) -> f32 {
        let blocks = Blocks::new(self.len, self.hole);
        let mut max = s.splat_block(f32::NEG_INFINITY);
        for i in 0..blocks.whole {
            let p = self.x.wrapping_add(blocks.whole_at(i));
            for (j, m) in max.as_mut().iter_mut().enumerate() {
                // SAFETY: a whole block of the chunk. The bound comes second: NaN loses.
                *m = unsafe { s.max(E::load(s, p.add(j * S::LANES)), *m) };
            }
        }
        for (at, mask) in blocks.masked() {
            let p = self.x.wrapping_add(at);
            for (j, m) in max.as_mut().iter_mut().enumerate() {
                let lanes = lanes_of::<S>(mask, j);
                if lanes == 0 {
                    continue;
                }
                let p = p.wrapping_add(j * S::LANES);
                // SAFETY: the mask keeps to the chunk.
                *m = unsafe { s.max(E::load_lanes(s, p, lanes, f32::NEG_INFINITY), *m) };
            }
        }
        s.max_lane(max)
    }

    /// The sums over the chunk without its hole. Unless `CLAMP`, they are right only if they turn
    /// out to be tame, and then they are those with `CLAMP`, bit for bit.
    ///
    /// # Safety
    /// The logits are readable; with `KEEP`, `kept` and `backup` are writable over the chunk.
    #[inline(always)]
    unsafe fn sum<S: Simd, const FAR: bool, const CLAMP: bool, const KEEP: bool, const DOT: u8>(
        &self,
        s: S,
        reference: Reference,
    ) -> Sums {
        let exp = Exp2::<S, FAR>::new(s, reference);
        let blocks = Blocks::new(self.len, self.hole);
        let (mut totals, mut dots) = (s.totals(), s.totals());
        let mut wide_dot = 0.0;
        let (mut seen, watched) = (s.watch_start(), s.splat(WATCHED));

        let mut i = 0;
        while i < blocks.whole {
            let end = (i + GROUP).min(blocks.whole);
            let mut sum = s.splat_block(0.0);
            while i < end {
                let at = blocks.whole_at(i);
                let p = self.x.wrapping_add(at);
                let mut weights = s.splat_block(0.0);
                if DOT == DOT_WEIGHTED {
                    if self.weights.is_f64() {
                        // SAFETY: a whole block of the chunk.
                        wide_dot += unsafe { self.wide_dot(at, !0) };
                    } else {
                        // SAFETY: a whole block of the chunk's classes.
                        weights = unsafe { load_weights(s, self.weights, self.class + at, !0) };
                    }
                }
                for line in 0..BLOCK * size_of::<E>() / LINE {
                    s.prefetch(p.cast::<u8>().wrapping_add(AHEAD + line * LINE));
                }
                let mut exponents = s.splat_block(0.0);
                for (j, acc) in sum.as_mut().iter_mut().enumerate() {
                    // SAFETY: a whole block of the chunk.
                    let x = unsafe { E::load(s, p.add(j * S::LANES)) };
                    let (mantissa, m) = exp.parts::<CLAMP>(x);
                    let scale = exp.scale(m);
                    exponents.as_mut()[j] = m;
                    *acc = s.mul_add(mantissa, scale, *acc);
                    if KEEP {
                        let e = s.mul(mantissa, scale);
                        // SAFETY: writable over the chunk.
                        unsafe {
                            E::store(s, self.backup.add(at + j * S::LANES), x);
                            E::store(s, self.kept.add(at + j * S::LANES), e);
                        }
                    }
                    match DOT {
                        DOT_NONE => {}
                        DOT_UNIFORM => s.add_centered(&mut dots, j, x, self.center),
                        _ => s.add_weighted(&mut dots, j, x, self.center, weights.as_ref()[j]),
                    }
                }
                if !CLAMP {
                    seen = s.watch(seen, &exponents, watched);
                }
                i += 1;
            }
            totals = s.add_block(totals, sum);
        }

        for (at, mask) in blocks.masked() {
            if mask == 0 {
                continue;
            }
            let p = self.x.wrapping_add(at);
            let mut exponents = s.splat_block(WATCHED);
            let mut sum = s.splat_block(0.0);
            let mut weights = s.splat_block(0.0);
            if DOT == DOT_WEIGHTED && self.weights.is_f64() {
                // SAFETY: the mask keeps to the chunk.
                wide_dot += unsafe { self.wide_dot(at, mask) };
            } else if DOT != DOT_NONE {
                // Weights of 1 are needed here too, to leave the masked lanes out.
                // SAFETY: the mask keeps to the chunk's classes.
                weights = unsafe { load_weights(s, self.weights, self.class + at, mask) };
            }
            for (j, acc) in sum.as_mut().iter_mut().enumerate() {
                let lanes = lanes_of::<S>(mask, j);
                if lanes == 0 {
                    continue;
                }
                let p = p.wrapping_add(j * S::LANES);
                // SAFETY: the mask keeps to the chunk.
                let x = unsafe { E::load_lanes(s, p, lanes, f32::NEG_INFINITY) };
                *acc = exp.value::<true>(x);
                if !CLAMP {
                    // The lanes that are left out must not look wild.
                    // SAFETY: as above.
                    let x = unsafe { E::load_lanes(s, p, lanes, exp.origin()) };
                    exponents.as_mut()[j] = exp.parts::<false>(x).1;
                }
                if KEEP {
                    let at = at + j * S::LANES;
                    // SAFETY: writable over the chunk, which the mask keeps to.
                    unsafe {
                        E::store_lanes(s, self.backup.wrapping_add(at), lanes, x);
                        E::store_lanes(s, self.kept.wrapping_add(at), lanes, *acc);
                    }
                }
                if DOT != DOT_NONE {
                    s.add_weighted(&mut dots, j, x, self.center, weights.as_ref()[j]);
                }
            }
            if !CLAMP {
                seen = s.watch(seen, &exponents, watched);
            }
            totals = s.add_block(totals, sum);
        }
        Sums {
            sum: s.sum(totals),
            dot: if DOT == DOT_NONE { 0.0 } else { s.sum(dots) + wide_dot },
            tame: CLAMP || s.watch_end(seen),
        }
    }

    /// Σ w·(x - center) over the lanes of `mask` with weights in f64, which lanes of f32 would
    /// round. One after the other: such weights are rare beside logits of 32 bits or less.
    ///
    /// # Safety
    /// The mask keeps to the chunk, whose logits are still there.
    #[inline(always)]
    unsafe fn wide_dot(&self, at: usize, mask: u64) -> f64 {
        let Some(weights) = self.weights.view else { return 0.0 };
        let mut sum = 0.0;
        for i in (0..BLOCK).filter(|i| mask >> i & 1 == 1).map(|i| at + i) {
            // SAFETY: a lane of the mask, and its class.
            let (x, w) = unsafe { ((*self.x.add(i)).to_f64(), weights.real(0, self.class + i)) };
            if w != 0.0 {
                sum += w * (x - self.center);
            }
        }
        sum
    }

    /// Puts the logits back that exponentials were written over.
    ///
    /// # Safety
    /// As [`sum`](Self::sum), which ran before.
    #[inline(always)]
    pub unsafe fn restore<S: Simd>(&self, s: S) {
        if self.kept.is_null() {
            return;
        }
        let blocks = Blocks::new(self.len, self.hole);
        for i in 0..blocks.whole {
            // SAFETY: a whole block, which `sum` backed up; the caller's promise.
            unsafe { self.put_back(s, blocks.whole_at(i), !0) };
        }
        for (at, mask) in blocks.masked() {
            // SAFETY: as above; the hole was neither backed up nor overwritten.
            unsafe { self.put_back(s, at, mask) };
        }
    }

    /// The sums of a chunk that is not tame.
    ///
    /// # Safety
    /// As [`sum`](Self::sum).
    #[inline(always)]
    pub unsafe fn clamped<S: Simd>(&self, s: S, reference: Reference, dot: u8) -> Sums {
        // SAFETY: the caller's promise.
        unsafe {
            match (self.kept.is_null(), dot) {
                (true, DOT_NONE) => self.sum::<S, false, true, false, DOT_NONE>(s, reference),
                (true, DOT_UNIFORM) => self.sum::<S, false, true, false, DOT_UNIFORM>(s, reference),
                (true, _) => self.sum::<S, false, true, false, DOT_WEIGHTED>(s, reference),
                (false, DOT_NONE) => self.sum::<S, false, true, true, DOT_NONE>(s, reference),
                (false, DOT_UNIFORM) => self.sum::<S, false, true, true, DOT_UNIFORM>(s, reference),
                (false, _) => self.sum::<S, false, true, true, DOT_WEIGHTED>(s, reference),
            }
        }
    }

    /// The exponentials' sum relative to a reference of the chunk's own, and that reference, when
    /// `sum`, relative to the anchor, left the safe range. Kept logits are put back.
    ///
    /// # Safety
    /// As [`sum`](Self::sum), which ran before.
    #[inline(always)]
    pub unsafe fn redo<S: Simd>(&self, s: S, sum: f64) -> (f64, f64) {
        // SAFETY: the caller's promise.
        unsafe { self.restore(s) };
        if sum.is_nan() {
            // There is a NaN, and `max` does not see it.
            return (0.0, sum);
        }
        // SAFETY: readable, as before.
        let max = unsafe { self.max(s) };
        if max == f32::NEG_INFINITY {
            return (0.0, 0.0);
        }
        if max == f32::INFINITY {
            return (f64::INFINITY, 1.0);
        }
        let own = Reference::at(max);
        // SAFETY: the caller's promise; nothing is kept.
        let sums = unsafe {
            match own {
                Reference::Near(_) => self.sum::<S, false, true, false, DOT_NONE>(s, own),
                Reference::Far(_) => self.sum::<S, true, true, false, DOT_NONE>(s, own),
            }
        };
        (own.log2(), sums.sum)
    }

    /// # Safety
    /// The mask keeps to elements of the chunk that `sum` backed up.
    #[inline(always)]
    unsafe fn put_back<S: Simd>(&self, s: S, at: usize, mask: u64) {
        for j in 0..BLOCK / S::LANES {
            let lanes = lanes_of::<S>(mask, j);
            if lanes == 0 {
                continue;
            }
            let at = at.wrapping_add(j * S::LANES);
            // SAFETY: the caller's promise.
            unsafe {
                let x = E::load_lanes(s, self.backup.wrapping_add(at), lanes, 0.0);
                E::store_lanes(s, self.kept.wrapping_add(at), lanes, x);
            }
        }
    }

    /// Writes `2^(L·x - c)·factor - bias` to `g`.
    ///
    /// # Safety
    /// The logits are readable, `g` is writable over the chunk and apart from the logits or
    /// exactly them.
    #[inline(always)]
    unsafe fn gradient<S: Simd, G: Element, const SOURCE: u8, const BIAS: u8, const SPLIT: bool>(
        &self,
        sweep: &Sweep<S, SOURCE, BIAS, SPLIT>,
        accumulate: bool,
        stream: bool,
        g: *mut G,
    ) {
        let s = sweep.s;
        // Streamed writes are whole cache lines. Those that are not, at both ends, and the
        // target's, which is written once more, go through the cache; ask for them early, for a
        // write that waits for its line holds up all behind it.
        let (mut at, mut through) = (0, usize::MAX);
        if stream {
            // Too short for a whole line: `first_lanes` takes less than a block.
            at = g.align_offset(LINE).min(self.len).min(BLOCK - 1);
            for i in (self.len - (self.len - at) % BLOCK..self.len).step_by(LINE / size_of::<G>()) {
                s.prefetch_write(g.wrapping_add(i).cast());
            }
            if let Some(y) = self.hole {
                s.prefetch_write(g.wrapping_add(y).cast());
                through = g.wrapping_add(y).addr() / LINE;
            }
        }
        // SAFETY: the masks keep to the chunk.
        unsafe { self.gradient_lanes(sweep, 0, first_lanes(at), accumulate, g) };
        while at + BLOCK <= self.len {
            let p = self.x.wrapping_add(at);
            let mut weights = s.splat_block(0.0);
            if BIAS == BIAS_WEIGHTED {
                // SAFETY: a whole block of the chunk's classes.
                weights = unsafe { load_weights(s, self.weights, self.class + at, !0) };
            }
            if !self.next.is_null() {
                let next = self.next.wrapping_add(at).cast::<u8>();
                for line in 0..BLOCK * size_of::<E>() / LINE {
                    s.prefetch_far(next.wrapping_add(line * LINE));
                }
            }
            for (j, &w) in weights.as_ref().iter().enumerate() {
                // SAFETY: a whole block of the chunk; `g` is aligned if it is streamed to.
                unsafe {
                    let to = g.add(at + j * S::LANES);
                    let mut v = sweep.value(E::load(s, p.add(j * S::LANES)), w);
                    if accumulate {
                        v = s.add(G::load(s, to), v);
                    }
                    if stream && to.addr() / LINE != through {
                        G::stream(s, to, v);
                    } else {
                        G::store(s, to, v);
                    }
                }
            }
            at += BLOCK;
        }
        // SAFETY: the mask keeps to the chunk.
        unsafe { self.gradient_lanes(sweep, at, first_lanes(self.len - at), accumulate, g) };
    }

    /// The lanes of `mask` of the block at `at`, as [`gradient`](Self::gradient).
    ///
    /// # Safety
    /// As there; the mask keeps to the chunk.
    #[inline(always)]
    unsafe fn gradient_lanes<
        S: Simd,
        G: Element,
        const SOURCE: u8,
        const BIAS: u8,
        const SPLIT: bool,
    >(
        &self,
        sweep: &Sweep<S, SOURCE, BIAS, SPLIT>,
        at: usize,
        mask: u64,
        accumulate: bool,
        g: *mut G,
    ) {
        if mask == 0 {
            return;
        }
        let s = sweep.s;
        let mut weights = s.splat_block(0.0);
        if BIAS == BIAS_WEIGHTED {
            // SAFETY: the mask keeps to the chunk's classes.
            weights = unsafe { load_weights(s, self.weights, self.class + at, mask) };
        }
        for (j, &w) in weights.as_ref().iter().enumerate() {
            let lanes = lanes_of::<S>(mask, j);
            if lanes == 0 {
                continue;
            }
            let at = at + j * S::LANES;
            // SAFETY: the mask keeps to the chunk.
            unsafe {
                let x = E::load_lanes(s, self.x.wrapping_add(at), lanes, 0.0);
                let mut v = sweep.value(x, w);
                if accumulate {
                    v = s.add(G::load_lanes(s, g.wrapping_add(at), lanes, 0.0), v);
                }
                G::store_lanes(s, g.wrapping_add(at), lanes, v);
            }
        }
    }
}

/// The arithmetic of the second sweep for one curve: `e·factor - bias`, with e kept or computed.
#[derive(Clone, Copy)]
struct Sweep<S: Simd, const SOURCE: u8, const BIAS: u8, const SPLIT: bool> {
    s: S,
    // `SOURCE` says which of the two is used, if any.
    near: Exp2<S, false>,
    far: Exp2<S, true>,
    before: S::Vector,
    after: S::Vector,
    bias: S::Vector,
}

impl<S: Simd, const SOURCE: u8, const BIAS: u8, const SPLIT: bool> Sweep<S, SOURCE, BIAS, SPLIT> {
    #[inline(always)]
    fn new(s: S, curve: &Curve, bias: f64) -> Self {
        let (before, after) = if SPLIT { curve.split() } else { (1.0, curve.factor as f32) };
        Sweep {
            s,
            near: Exp2::new(s, curve.reference),
            far: Exp2::new(s, curve.reference),
            before: s.splat(before),
            after: s.splat(after),
            bias: s.splat(-bias as f32),
        }
    }

    /// The gradient where the logit, or the exponential kept in its place, is `x` and the class
    /// weight `w`.
    #[inline(always)]
    fn value(&self, x: S::Vector, w: S::Vector) -> S::Vector {
        let s = self.s;
        let mut e = match SOURCE {
            KEPT => x,
            TAME => self.near.value::<false>(x),
            NEAR => self.near.value::<true>(x),
            _ => self.far.value::<true>(x),
        };
        if SPLIT {
            e = s.mul(e, self.before);
        }
        match BIAS {
            BIAS_NONE => s.mul(e, self.after),
            BIAS_UNIFORM => s.mul_add(e, self.after, self.bias),
            _ => s.mul_add(e, self.after, s.mul(self.bias, w)),
        }
    }
}

/// The anchor of `row`: see the head of this file.
///
/// # Safety
/// `row < plan.rows`; the processor has what `s` stands for. The same for all below.
#[inline(always)]
pub unsafe fn anchor<S: Simd, E: Element>(
    s: S,
    plan: &Plan,
    row: usize,
    hole: Option<usize>,
) -> Anchor {
    let head = Chunk::<E> {
        // SAFETY: a row of the plan.
        x: unsafe { plan.logits.row::<E>(row) },
        class: 0,
        len: plan.classes.min(HEAD),
        hole: hole.filter(|&y| y < HEAD),
        kept: std::ptr::null_mut(),
        backup: std::ptr::null_mut(),
        center: 0.0,
        weights: Weights::NONE,
        next: std::ptr::null(),
    };
    // SAFETY: within the row.
    let max = unsafe { head.max(s) };
    if max.is_finite()
        && let reference @ Reference::Near(_) = Reference::at(max)
    {
        Anchor { reference, real: true }
    } else {
        Anchor::NONE
    }
}

/// The sums over one segment of `row`, and what its chunks needed.
///
/// # Safety
/// As [`anchor`]; `segment < plan.segments()`; no other thread is in this segment of this row.
#[inline(always)]
pub unsafe fn sum_segment<S: Simd, E: Element>(
    s: S,
    rare: &Rare<E>,
    plan: &Plan,
    row: usize,
    segment: usize,
    sum: &RowSum,
) -> (Partial, Marks) {
    // Halves would round what is kept.
    let keep = E::EXACT && sum.hole.is_some() && keeps(plan);
    // SAFETY: the caller's promise; to keep exponentials in place, `keeps` asked for the plan.
    unsafe {
        match (keep, sum.center.is_some(), &plan.class_weights) {
            (false, false, _) => {
                sum_chunks::<S, E, false, DOT_NONE>(s, rare, plan, row, segment, sum)
            }
            (false, true, None) => {
                sum_chunks::<S, E, false, DOT_UNIFORM>(s, rare, plan, row, segment, sum)
            }
            (false, true, Some(_)) => {
                sum_chunks::<S, E, false, DOT_WEIGHTED>(s, rare, plan, row, segment, sum)
            }
            (true, false, _) => {
                sum_chunks::<S, E, true, DOT_NONE>(s, rare, plan, row, segment, sum)
            }
            (true, true, None) => {
                sum_chunks::<S, E, true, DOT_UNIFORM>(s, rare, plan, row, segment, sum)
            }
            (true, true, Some(_)) => {
                sum_chunks::<S, E, true, DOT_WEIGHTED>(s, rare, plan, row, segment, sum)
            }
        }
    }
}

/// Where the row's hole is in the chunk of `len` classes from `class` on, if it is there.
#[inline(always)]
fn hole_in(hole: Option<usize>, class: usize, len: usize) -> Option<usize> {
    hole.and_then(|y| y.checked_sub(class)).filter(|&y| y < len)
}

/// Whether the first sweep leaves exponentials in place of the logits.
#[inline(always)]
fn keeps(plan: &Plan) -> bool {
    plan.pass == Pass::ForwardBackward
        && plan.classes <= KEPT_CLASSES
        && plan.gradient.is_some_and(|g| g.in_place)
}

#[inline(always)]
unsafe fn sum_chunks<S: Simd, E: Element, const KEEP: bool, const DOT: u8>(
    s: S,
    rare: &Rare<E>,
    plan: &Plan,
    row: usize,
    segment: usize,
    sum: &RowSum,
) -> (Partial, Marks) {
    let RowSum { hole, anchor, .. } = sum;
    let mut backup = MaybeUninit::<[E; CHUNK]>::uninit();
    let start = segment * plan.segment_len();
    let end = (start + plan.segment_len()).min(plan.classes);
    let (mut partial, mut marks) = (Partial::EMPTY, Marks::default());
    for (i, class) in (start..end).step_by(CHUNK).enumerate() {
        // SAFETY: a class of a row of the plan.
        let x = unsafe { plan.logits.row::<E>(row).add(class) };
        let len = CHUNK.min(end - class);
        let chunk = Chunk {
            x,
            class,
            len,
            hole: hole_in(*hole, class, len),
            kept: if KEEP { x } else { std::ptr::null_mut() },
            backup: if KEEP { backup.as_mut_ptr().cast() } else { std::ptr::null_mut() },
            center: sum.center.unwrap_or(0.0),
            weights: Weights::of(plan),
            next: std::ptr::null(),
        };
        // SAFETY (for all calls below): within the row; `KEEP` says that the gradient replaces
        // these logits, and the backup is a chunk long.
        let mut sums = None;
        if !marks.is_wild(i) {
            // SAFETY: see above.
            let tried = unsafe { chunk.sum::<S, false, false, KEEP, DOT>(s, anchor.reference) };
            if tried.tame {
                sums = Some(tried);
            } else {
                // Where one is masked, others are: the rest of the segment is not tried.
                marks.wild |= !0 << (i % 64);
                // SAFETY: see above.
                unsafe { (rare.restore)(&chunk) };
            }
        }
        // SAFETY: see above.
        let sums = sums.unwrap_or_else(|| unsafe { (rare.clamped)(&chunk, anchor.reference, DOT) });
        let safe = sums.sum < SAFE_HIGH && (anchor.real || sums.sum > SAFE_LOW);
        let (log2, sum) = if safe {
            (anchor.reference.log2(), sums.sum)
        } else {
            marks.redone |= 1 << (i % 64);
            // SAFETY: see above.
            unsafe { (rare.redo)(&chunk, sums.sum) }
        };
        let dot = sums.dot;
        partial.push(Partial { log2, sum, dot });
    }
    (partial, marks)
}

/// Which chunks of a segment need more than the plain sweep.
#[derive(Clone, Copy, Debug, Default)]
pub struct Marks {
    /// Bit i: chunk i has exponents out of range, or may have, and is clamped.
    pub wild: u64,
    /// Bit i: chunk i has a reference of its own.
    pub redone: u64,
}

impl Marks {
    #[inline(always)]
    fn is_wild(self, chunk: usize) -> bool {
        self.wild >> (chunk % 64) & 1 == 1
    }

    #[inline(always)]
    fn is_redone(self, chunk: usize) -> bool {
        self.redone >> (chunk % 64) & 1 == 1
    }
}

/// Entry points out of line: what they do is rare, and large.
pub struct Rare<E> {
    /// See [`Chunk::restore`].
    pub restore: unsafe fn(&Chunk<E>),
    /// See [`Chunk::clamped`].
    pub clamped: unsafe fn(&Chunk<E>, Reference, u8) -> Sums,
    /// See [`Chunk::redo`].
    pub redo: unsafe fn(&Chunk<E>, f64) -> (f64, f64),
}

/// Writes the gradient of one segment of `row`, but for the target's own part; `marks` as
/// [`sum_segment`] returned them. Streamed writes are left for the caller to fence: doing it here,
/// for every row, would wait for memory every time.
///
/// # Safety
/// As [`sum_segment`]; the plan has a gradient.
#[inline(always)]
pub unsafe fn gradient_segment<S: Simd, E: Element, G: Element>(
    s: S,
    plan: &Plan,
    row: usize,
    segment: usize,
    marks: Marks,
    gradient: &RowGradient,
) {
    let Some(output) = &plan.gradient else { return };
    let start = segment * plan.segment_len();
    let end = (start + plan.segment_len()).min(plan.classes);
    let all_own = plan.pass == Pass::Backward || plan.classes > KEPT_CLASSES;
    for (i, class) in (start..end).step_by(CHUNK).enumerate() {
        let len = CHUNK.min(end - class);
        // SAFETY: a class of a row of the plan.
        let (x, g) =
            unsafe { (plan.logits.row::<E>(row).add(class), output.view.row::<G>(row).add(class)) };
        let chunk = Chunk {
            x,
            class,
            len,
            hole: hole_in(Some(gradient.target), class, len),
            kept: std::ptr::null_mut(),
            backup: std::ptr::null_mut(),
            center: 0.0,
            weights: Weights::of(plan),
            next: gradient.next.map_or(std::ptr::null(), |next| {
                // Never read, only prefetched.
                x.wrapping_offset((next - row) as isize * plan.logits.strides[0])
            }),
        };
        let own = all_own || marks.is_redone(i);
        let curve = if own { &gradient.own } else { &gradient.anchored };
        // SAFETY: within the row; problem.rs made sure that the gradient overlaps the logits
        // only by being exactly them.
        unsafe {
            match (own, curve.reference) {
                (false, _) if E::EXACT && keeps(plan) => {
                    gradient_chunk::<S, E, G, KEPT>(s, output, &chunk, curve, gradient.bias, g)
                }
                (false, _) if !marks.is_wild(i) => {
                    gradient_chunk::<S, E, G, TAME>(s, output, &chunk, curve, gradient.bias, g)
                }
                (_, Reference::Near(_)) => {
                    gradient_chunk::<S, E, G, NEAR>(s, output, &chunk, curve, gradient.bias, g)
                }
                (_, Reference::Far(_)) => {
                    gradient_chunk::<S, E, G, FAR>(s, output, &chunk, curve, gradient.bias, g)
                }
            }
        }
    }
}

#[inline(always)]
unsafe fn gradient_chunk<S: Simd, E: Element, G: Element, const SOURCE: u8>(
    s: S,
    output: &Gradient,
    chunk: &Chunk<E>,
    curve: &Curve,
    bias: f64,
    g: *mut G,
) {
    let (accumulate, stream) = (output.accumulate, output.stream);
    macro_rules! sweep {
        ($bias:expr, $split:expr) => {{
            let sweep = Sweep::<S, SOURCE, { $bias }, { $split }>::new(s, curve, bias);
            // SAFETY: the caller's promise.
            unsafe { chunk.gradient(&sweep, accumulate, stream, g) }
        }};
    }
    match (curve.is_plain(), bias != 0.0, chunk.weights.view) {
        (true, false, _) => sweep!(BIAS_NONE, false),
        (true, true, None) => sweep!(BIAS_UNIFORM, false),
        (true, true, Some(_)) => sweep!(BIAS_WEIGHTED, false),
        // Rare: not worth a variant for each kind of bias.
        (false, _, _) => sweep!(BIAS_WEIGHTED, true),
    }
}

/// Rows that go through each stage together: what one row waits for (reductions, logarithms) is
/// hidden behind the others' work.
const BATCH: usize = 8;

/// Classes up to which a batch stays in the L1 cache between its sweeps.
const BATCHED_CLASSES: usize = 1280;

/// A range of rows, start to end; returns the sum of their losses.
///
/// # Safety
/// As [`anchor`] for every row of the range; no other thread is in these rows.
#[inline(always)]
pub unsafe fn rows(kernels: &Kernels, plan: &Plan, range: Range<usize>) -> f64 {
    let size = if plan.classes <= BATCHED_CLASSES { BATCH } else { 1 };
    let segments = plan.segments();
    // By row of a batch, or by segment of a single row.
    let mut marks = [Marks::default(); SEGMENTS];
    let mut loss = 0.0;
    for start in range.clone().step_by(size) {
        let count = size.min(range.end - start);
        let mut batch: [MaybeUninit<(Row, RowSum, Partial)>; BATCH] =
            [const { MaybeUninit::uninit() }; BATCH];
        for (i, slot) in batch[..count].iter_mut().enumerate() {
            // SAFETY: a row of the plan, and this thread's alone; so below.
            unsafe {
                let row = Row::read(plan, start + i);
                let anchor = if row.needs_sum(plan) {
                    (kernels.anchor)(plan, start + i, row.hole())
                } else {
                    Anchor::NONE
                };
                slot.write((row, row.sum(plan, anchor), Partial::EMPTY));
            }
        }
        for (i, slot) in batch[..count].iter_mut().enumerate() {
            // SAFETY: written above.
            let (row, sum, total) = unsafe { slot.assume_init_mut() };
            if row.needs_sum(plan) {
                for segment in 0..segments {
                    // SAFETY: see above.
                    let (partial, again) =
                        unsafe { (kernels.sum_segment)(plan, start + i, segment, sum) };
                    total.push(partial);
                    marks[i + segment] = again;
                }
            }
        }
        let mut jobs = [const { MaybeUninit::<Job>::uninit() }; BATCH];
        for (slot, job) in batch[..count].iter_mut().zip(&mut jobs) {
            // SAFETY: see above.
            let (row_loss, todo) = unsafe {
                let (row, sum, total) = slot.assume_init_mut();
                row.finish(plan, row.needs_sum(plan).then_some((&*sum, &*total)))
            };
            loss += row_loss;
            job.write(todo);
        }
        if plan.gradient.is_none() {
            continue;
        }
        for (i, (slot, job)) in batch[..count].iter().zip(&jobs).enumerate() {
            // SAFETY: see above.
            unsafe {
                let (row, ..) = slot.assume_init_ref();
                match job.assume_init_ref() {
                    Job::Nothing => {}
                    Job::Fill(value) => row.fill(plan, *value),
                    Job::Sweep(gradient) => {
                        let next = start + i + size;
                        let fetch = next < plan.rows && plan.fetches_ahead();
                        let gradient = &RowGradient { next: fetch.then_some(next), ..*gradient };
                        for segment in 0..segments {
                            let again = marks[i + segment];
                            (kernels.gradient_segment)(plan, start + i, segment, again, gradient);
                        }
                        row.place_target(plan);
                    }
                }
            }
        }
    }
    if plan.streams() {
        (kernels.fence)();
    }
    loss
}
