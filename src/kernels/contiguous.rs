//! Rows whose classes are contiguous: lanes along classes.
//!
//! # Forward: one read, no maximum first
//!
//! ```text
//! anchor: c = integer nearest to L·max of the first 256 classes
//! for each chunk of 2048 classes:
//!     sum = Σ 2^(L·x - c)                       64 lanes, flushed to f64 every 512 classes
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
//! exponentials are computed again, from the same reference to the same bits, which costs less
//! than writing them. Chunks that were redone keep their logits and are computed from the row's
//! own lse. Measured in docs/design.md.
//!
//! # Tails and holes
//!
//! Lanes past the end and the target's lane are masked loads of -inf, whose exponential is 0. The
//! block with the target is skipped by the loop (`block + (block ≥ hole)`, no branch) and done last.

use super::Kernels;
use super::online::Partial;
use super::row::{Anchor, Curve, Job, Row, RowGradient, RowSum};
use crate::math::exp2::{Exp2, Reference};
use crate::plan::{CHUNK, Dtype, Gradient, KEPT_CLASSES, Pass, Plan, SEGMENTS, View};
use crate::simd::{BLOCK, Simd};
use std::mem::MaybeUninit;
use std::ops::Range;

/// Classes that the anchor is taken from.
const HEAD: usize = 4 * BLOCK;

/// Blocks summed in f32 before they are flushed: no more than 8 additions a lane.
const GROUP: usize = 8;

/// Elements that a sweep prefetches ahead: 2 KiB.
const AHEAD: usize = 512;

/// A chunk's sum above this is redone: exponentials that are kept for the second sweep then stay
/// far from overflow.
const SAFE_HIGH: f64 = (1u64 << 60) as f64;

/// Without a real anchor, a chunk's sum below this is redone too.
const SAFE_LOW: f64 = 1.0 / SAFE_HIGH;

/// What the first sweep adds up besides exponentials: nothing, `Σ (x - center)`, or
/// `Σ w·(x - center)`.
const DOT_NONE: u8 = 0;
const DOT_UNIFORM: u8 = 1;
const DOT_WEIGHTED: u8 = 2;

/// Where the second sweep gets exponentials from.
const KEPT: u8 = 0;
const NEAR: u8 = 1;
const FAR: u8 = 2;

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
pub struct Chunk<'a> {
    x: *const f32,
    /// The class of the first element.
    class: usize,
    len: usize,
    hole: Option<usize>,
    /// Where exponentials go, the logits' own place, and a copy of the logits in case they must
    /// be put back. Null unless they are kept.
    kept: *mut f32,
    backup: *mut f32,
    center: f32,
    weights: Weights<'a>,
}

impl Chunk<'_> {
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
                *m = unsafe { s.max(s.load(p.add(j * S::LANES)), *m) };
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
                *m = unsafe { s.max(s.load_lanes(p, lanes, f32::NEG_INFINITY), *m) };
            }
        }
        s.max_lane(max)
    }

    /// `(Σ 2^(L·x - c), Σ w·(x - center))` over the chunk without its hole.
    ///
    /// # Safety
    /// The logits are readable; with `KEEP`, `kept` and `backup` are writable over the chunk.
    #[inline(always)]
    unsafe fn sum<S: Simd, const FAR: bool, const KEEP: bool, const DOT: u8>(
        &self,
        s: S,
        reference: Reference,
    ) -> (f64, f64) {
        let exp = Exp2::<S, FAR>::new(s, reference);
        let center = s.splat(self.center);
        let blocks = Blocks::new(self.len, self.hole);
        let (mut totals, mut dots) = (s.totals(), s.totals());

        let mut i = 0;
        while i < blocks.whole {
            let end = (i + GROUP).min(blocks.whole);
            let mut sum = s.splat_block(0.0);
            while i < end {
                let at = blocks.whole_at(i);
                let p = self.x.wrapping_add(at);
                let mut dot = s.splat_block(0.0);
                if DOT == DOT_WEIGHTED {
                    // SAFETY: a whole block of the chunk's classes.
                    dot = unsafe { load_weights(s, self.weights, self.class + at, !0) };
                }
                for line in 0..BLOCK / 16 {
                    s.prefetch(p.wrapping_add(AHEAD + line * 16).cast());
                }
                for (j, acc) in sum.as_mut().iter_mut().enumerate() {
                    // SAFETY: a whole block of the chunk.
                    let x = unsafe { s.load(p.add(j * S::LANES)) };
                    let (mantissa, scale) = exp.parts(x);
                    *acc = s.mul_add(mantissa, scale, *acc);
                    if KEEP {
                        let e = s.mul(mantissa, scale);
                        // SAFETY: writable over the chunk.
                        unsafe {
                            s.store(self.backup.add(at + j * S::LANES), x);
                            s.store(self.kept.add(at + j * S::LANES), e);
                        }
                    }
                    if DOT != DOT_NONE {
                        let w = &mut dot.as_mut()[j];
                        *w = weigh::<S, DOT>(s, *w, s.sub(x, center));
                    }
                }
                if DOT != DOT_NONE {
                    dots = s.add_block(dots, dot);
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
            let mut sum = s.splat_block(0.0);
            let mut dot = s.splat_block(0.0);
            if DOT != DOT_NONE {
                // Weights of 1 are needed here too, to leave the masked lanes out.
                // SAFETY: the mask keeps to the chunk's classes.
                dot = unsafe { load_weights(s, self.weights, self.class + at, mask) };
            }
            for (j, acc) in sum.as_mut().iter_mut().enumerate() {
                let lanes = lanes_of::<S>(mask, j);
                if lanes == 0 {
                    continue;
                }
                let p = p.wrapping_add(j * S::LANES);
                // SAFETY: the mask keeps to the chunk.
                let x = unsafe { s.load_lanes(p, lanes, f32::NEG_INFINITY) };
                let (mantissa, scale) = exp.parts(x);
                *acc = s.mul(mantissa, scale);
                if KEEP {
                    let at = at + j * S::LANES;
                    // SAFETY: writable over the chunk, which the mask keeps to.
                    unsafe {
                        s.store_lanes(self.backup.wrapping_add(at), lanes, x);
                        s.store_lanes(self.kept.wrapping_add(at), lanes, *acc);
                    }
                }
                if DOT != DOT_NONE {
                    let w = &mut dot.as_mut()[j];
                    *w = weigh::<S, DOT_WEIGHTED>(s, *w, s.sub(x, center));
                }
            }
            totals = s.add_block(totals, sum);
            if DOT != DOT_NONE {
                dots = s.add_block(dots, dot);
            }
        }
        (s.sum(totals), if DOT == DOT_NONE { 0.0 } else { s.sum(dots) })
    }

    /// The exponentials' sum relative to a reference of the chunk's own, when `sum`, relative to
    /// the anchor, left the safe range. Logits that exponentials were written over are put back.
    ///
    /// # Safety
    /// As [`sum`](Self::sum), which ran before.
    #[inline(always)]
    unsafe fn redo<S: Simd>(&self, s: S, sum: f64) -> (f64, f64) {
        if !self.kept.is_null() {
            let blocks = Blocks::new(self.len, self.hole);
            for i in 0..blocks.whole {
                let at = blocks.whole_at(i);
                // SAFETY: a whole block, which `sum` backed up; the caller's promise.
                unsafe { self.put_back(s, at, !0) };
            }
            for (at, mask) in blocks.masked() {
                // SAFETY: as above; the hole was neither backed up nor overwritten.
                unsafe { self.put_back(s, at, mask) };
            }
        }
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
        let (sum, _) = unsafe {
            match own {
                Reference::Near(_) => self.sum::<S, false, false, DOT_NONE>(s, own),
                Reference::Far(_) => self.sum::<S, true, false, DOT_NONE>(s, own),
            }
        };
        (own.log2(), sum)
    }

    /// # Safety
    /// The mask keeps to elements of the chunk that `sum` backed up.
    #[inline(always)]
    unsafe fn put_back<S: Simd>(&self, s: S, at: usize, mask: u64) {
        for j in 0..BLOCK / S::LANES {
            let lanes = lanes_of::<S>(mask, j);
            let at = at.wrapping_add(j * S::LANES);
            // SAFETY: the caller's promise.
            unsafe {
                let x = s.load_lanes(self.backup.wrapping_add(at), lanes, 0.0);
                s.store_lanes(self.kept.wrapping_add(at), lanes, x);
            }
        }
    }

    /// Writes `2^(L·x - c)·factor - bias` to `g`.
    ///
    /// # Safety
    /// The logits are readable, `g` is writable over the chunk and apart from the logits or
    /// exactly them.
    #[inline(always)]
    unsafe fn gradient<S: Simd, const SOURCE: u8, const BIAS: u8, const SPLIT: bool>(
        &self,
        sweep: &Sweep<S, SOURCE, BIAS, SPLIT>,
        accumulate: bool,
        stream: bool,
        g: *mut f32,
    ) {
        let s = sweep.s;
        // Streamed writes are whole cache lines. Those that are not, at both ends, and the
        // target's, which is written once more, go through the cache; ask for them early, for a
        // write that waits for its line holds up all behind it.
        let (mut at, mut through) = (0, std::ptr::null_mut());
        if stream {
            // Too short for a whole line: `first_lanes` takes less than a block.
            at = g.align_offset(64).min(self.len).min(BLOCK - 1);
            s.prefetch_write(g.wrapping_add(self.len - 1).cast());
            if let Some(y) = self.hole {
                s.prefetch_write(g.wrapping_add(y).cast());
                through = g.wrapping_add(at + (y.max(at) - at) / S::LANES * S::LANES);
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
            for (j, &w) in weights.as_ref().iter().enumerate() {
                // SAFETY: a whole block of the chunk; `g` is aligned if it is streamed to.
                unsafe {
                    let to = g.add(at + j * S::LANES);
                    let mut v = sweep.value(s.load(p.add(j * S::LANES)), w);
                    if accumulate {
                        v = s.add(s.load(to), v);
                    }
                    if stream && to != through {
                        s.stream(to, v);
                    } else {
                        s.store(to, v);
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
    unsafe fn gradient_lanes<S: Simd, const SOURCE: u8, const BIAS: u8, const SPLIT: bool>(
        &self,
        sweep: &Sweep<S, SOURCE, BIAS, SPLIT>,
        at: usize,
        mask: u64,
        accumulate: bool,
        g: *mut f32,
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
                let x = s.load_lanes(self.x.wrapping_add(at), lanes, 0.0);
                let mut v = sweep.value(x, w);
                if accumulate {
                    v = s.add(s.load_lanes(g.wrapping_add(at), lanes, 0.0), v);
                }
                s.store_lanes(g.wrapping_add(at), lanes, v);
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
            NEAR => self.near.value(x),
            _ => self.far.value(x),
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

/// `w·d`, but 0 where w is 0 whatever d is; `d` if all weights are 1.
#[inline(always)]
fn weigh<S: Simd, const DOT: u8>(s: S, w: S::Vector, d: S::Vector) -> S::Vector {
    if DOT == DOT_WEIGHTED { s.zero_where_zero(w, s.mul(w, d)) } else { d }
}

/// The anchor of `row`: see the head of this file.
///
/// # Safety
/// `row < plan.rows`; the processor has what `s` stands for. The same for all below.
#[inline(always)]
pub unsafe fn anchor<S: Simd>(s: S, plan: &Plan, row: usize, hole: Option<usize>) -> Anchor {
    let head = Chunk {
        // SAFETY: a row of the plan.
        x: unsafe { plan.logits.row::<f32>(row) },
        class: 0,
        len: plan.classes.min(HEAD),
        hole: hole.filter(|&y| y < HEAD),
        kept: std::ptr::null_mut(),
        backup: std::ptr::null_mut(),
        center: 0.0,
        weights: Weights::NONE,
    };
    // SAFETY: within the row.
    let max = unsafe { head.max(s) };
    if max.is_finite() {
        let reference = Reference::at(max);
        let near = matches!(reference, Reference::Near(_));
        Anchor {
            reference: if near { reference } else { Reference::Near(0.0) },
            center: max,
            real: near,
        }
    } else {
        Anchor { reference: Reference::Near(0.0), center: 0.0, real: false }
    }
}

/// The sums over one segment of `row`; bit `i` of the second result tells that chunk `i` was
/// redone. With `dot`, the sum over the logits too.
///
/// # Safety
/// As [`anchor`]; `segment < plan.segments()`; no other thread is in this segment of this row.
#[inline(always)]
pub unsafe fn sum_segment<S: Simd>(
    s: S,
    kernels: &Kernels,
    plan: &Plan,
    row: usize,
    segment: usize,
    sum: &RowSum,
) -> (Partial, u64) {
    let keep = sum.hole.is_some() && keeps(plan);
    // SAFETY: the caller's promise; to keep exponentials in place, `keeps` asked for the plan.
    unsafe {
        match (keep, sum.dot, &plan.class_weights) {
            (false, false, _) => {
                sum_chunks::<S, false, DOT_NONE>(s, kernels, plan, row, segment, sum)
            }
            (false, true, None) => {
                sum_chunks::<S, false, DOT_UNIFORM>(s, kernels, plan, row, segment, sum)
            }
            (false, true, Some(_)) => {
                sum_chunks::<S, false, DOT_WEIGHTED>(s, kernels, plan, row, segment, sum)
            }
            (true, false, _) => {
                sum_chunks::<S, true, DOT_NONE>(s, kernels, plan, row, segment, sum)
            }
            (true, true, None) => {
                sum_chunks::<S, true, DOT_UNIFORM>(s, kernels, plan, row, segment, sum)
            }
            (true, true, Some(_)) => {
                sum_chunks::<S, true, DOT_WEIGHTED>(s, kernels, plan, row, segment, sum)
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
unsafe fn sum_chunks<S: Simd, const KEEP: bool, const DOT: u8>(
    s: S,
    kernels: &Kernels,
    plan: &Plan,
    row: usize,
    segment: usize,
    sum: &RowSum,
) -> (Partial, u64) {
    let RowSum { hole, anchor, .. } = sum;
    let mut backup = MaybeUninit::<[f32; CHUNK]>::uninit();
    let start = segment * plan.segment_len();
    let end = (start + plan.segment_len()).min(plan.classes);
    let (mut partial, mut redone) = (Partial::EMPTY, 0u64);
    for (i, class) in (start..end).step_by(CHUNK).enumerate() {
        // SAFETY: a class of a row of the plan.
        let x = unsafe { plan.logits.row::<f32>(row).add(class) };
        let len = CHUNK.min(end - class);
        let chunk = Chunk {
            x,
            class,
            len,
            hole: hole_in(*hole, class, len),
            kept: if KEEP { x } else { std::ptr::null_mut() },
            backup: if KEEP { backup.as_mut_ptr().cast() } else { std::ptr::null_mut() },
            center: anchor.center,
            weights: Weights::of(plan),
        };
        // SAFETY: within the row; `KEEP` says that the gradient replaces these logits, and the
        // backup is a chunk long.
        let (sum, dot) = unsafe { chunk.sum::<S, false, KEEP, DOT>(s, anchor.reference) };
        let safe = sum < SAFE_HIGH && (anchor.real || sum > SAFE_LOW);
        let (log2, sum) = if safe {
            (anchor.reference.log2(), sum)
        } else {
            redone |= 1 << (i % 64);
            // SAFETY: the same chunk.
            unsafe { (kernels.redo)(&chunk, sum) }
        };
        partial.push(Partial { log2, sum, dot });
    }
    (partial, redone)
}

/// [`Chunk::redo`], out of line: it is rare, and large.
///
/// # Safety
/// As there.
#[inline(always)]
pub unsafe fn redo<S: Simd>(s: S, chunk: &Chunk, sum: f64) -> (f64, f64) {
    // SAFETY: the caller's promise.
    unsafe { chunk.redo(s, sum) }
}

/// Writes the gradient of one segment of `row`, but for the target's own part; `redone` as
/// [`sum_segment`] returned it. Streamed writes are left for the caller to fence: doing it here,
/// for every row, would wait for memory every time.
///
/// # Safety
/// As [`sum_segment`]; the plan has a gradient.
#[inline(always)]
pub unsafe fn gradient_segment<S: Simd>(
    s: S,
    plan: &Plan,
    row: usize,
    segment: usize,
    redone: u64,
    gradient: &RowGradient,
) {
    let Some(output) = &plan.gradient else { return };
    let start = segment * plan.segment_len();
    let end = (start + plan.segment_len()).min(plan.classes);
    let all_own = plan.pass == Pass::Backward || plan.classes > KEPT_CLASSES;
    let own_curve = if all_own || redone != 0 { gradient.own() } else { gradient.anchored };
    for (i, class) in (start..end).step_by(CHUNK).enumerate() {
        let len = CHUNK.min(end - class);
        // SAFETY: a class of a row of the plan.
        let (x, g) = unsafe {
            (plan.logits.row::<f32>(row).add(class), output.view.row::<f32>(row).add(class))
        };
        let chunk = Chunk {
            x,
            class,
            len,
            hole: hole_in(Some(gradient.target), class, len),
            kept: std::ptr::null_mut(),
            backup: std::ptr::null_mut(),
            center: 0.0,
            weights: Weights::of(plan),
        };
        let own = all_own || redone >> (i % 64) & 1 == 1;
        let curve = if own { &own_curve } else { &gradient.anchored };
        // SAFETY: within the row; problem.rs made sure that the gradient overlaps the logits
        // only by being exactly them.
        unsafe {
            match (own, curve.reference) {
                (false, _) if keeps(plan) => {
                    gradient_chunk::<S, KEPT>(s, output, &chunk, curve, gradient.bias, g)
                }
                (_, Reference::Near(_)) => {
                    gradient_chunk::<S, NEAR>(s, output, &chunk, curve, gradient.bias, g)
                }
                (_, Reference::Far(_)) => {
                    gradient_chunk::<S, FAR>(s, output, &chunk, curve, gradient.bias, g)
                }
            }
        }
    }
}

#[inline(always)]
unsafe fn gradient_chunk<S: Simd, const SOURCE: u8>(
    s: S,
    output: &Gradient,
    chunk: &Chunk,
    curve: &Curve,
    bias: f64,
    g: *mut f32,
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
    let mut redone = [0u64; SEGMENTS];
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
                    redone[i + segment] = again;
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
                        for segment in 0..segments {
                            let again = redone[i + segment];
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
