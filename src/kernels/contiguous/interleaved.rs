//! The second sweep over one row, block by block along with the first over another. The one works from
//! memory while the other works from the cache, so that neither waits.

use super::block::{Chunk, excluded_in};
use super::gradient::{
    Edges, Fast, GradientChunk, InRange, Source, Stored, Sweep, SweepMode, Writer,
};
use super::reduce::{Long, LongStoring, SumMode, Sums, sum_as};
use crate::element::Element;
use crate::math::exp2::{Base, Shift};
use crate::simd::Simd;
use crate::strategy::CHUNK;
use std::ops::Range;

/// [`sums`](super::reduce::sums) over chunks of one row, and the gradient of as many chunks of another on
/// the way. If the gradient's source is [`Source::Stored`], the sums store their exponentials as
/// [`sum_stored`](super::reduce::sum_stored) does; else both compute theirs. Returns how many chunks were
/// good, and the sums of the last one, which is left to the caller if it was not. The gradient is written
/// in any case.
///
/// # Safety
/// As [`sums`](super::reduce::sums) for `chunks`, whose `stored` goes as far as its logits if the
/// gradient's source is stored, and whose `backup` holds a chunk; as
/// [`gradient`](super::gradient::gradient) for `gradient`, whose source is `Stored` or `InRange`, which
/// [needs no general arithmetic](GradientChunk::is_fast), and whose shift has no logit.
#[inline(always)]
pub unsafe fn sums_and_gradient<S: Simd<Real: Base>, E: Element<S>, G: Element<S>>(
    s: S,
    chunks: &Chunk,
    shift: Shift,
    safe: &Range<f64>,
    gradient: &GradientChunk,
    sums: &mut [f64],
) -> (usize, Sums) {
    // SAFETY: this function's own # Safety, split by the source of the gradient.
    unsafe {
        if E::NATIVE && gradient.source == Source::Stored {
            interleave::<S, E, G, LongStoring, Fast<Stored>>(s, chunks, shift, safe, gradient, sums)
        } else {
            interleave::<S, E, G, Long, Fast<InRange>>(s, chunks, shift, safe, gradient, sums)
        }
    }
}

/// # Safety
/// As [`sums_and_gradient`].
#[inline(always)]
unsafe fn interleave<S, E, G, M, W>(
    s: S,
    chunks: &Chunk,
    shift: Shift,
    safe: &Range<f64>,
    gradient: &GradientChunk,
    sums: &mut [f64],
) -> (usize, Sums)
where
    S: Simd<Real: Base>,
    E: Element<S>,
    G: Element<S>,
    M: SumMode,
    W: SweepMode,
{
    let sweep = Sweep::<S, W>::new(s, gradient);
    let edges = Edges::of::<S, G>(s, gradient);
    // SAFETY: the gradient's chunk is readable and writable as `gradient` asks (# Safety).
    let mut writer = unsafe { Writer::<S, E, G, W>::new(&sweep, gradient, edges) };
    writer.head();
    let (mut count, mut last) = (0, Sums { sum: 0.0, first_moment: 0.0, in_range: true });
    for sum_of in sums {
        let start = count * CHUNK;
        let len = CHUNK.min(chunks.len - start);
        let x = chunks.x.cast::<E>().wrapping_add(start).cast();
        let stored = chunks.stored.cast::<E>().wrapping_add(start).cast();
        let excluded = excluded_in(chunks.excluded, start, len);
        let chunk = Chunk { x, len, excluded, stored, ..*chunks };
        // SAFETY: classes `start..start + len` are among those of `chunks`, which are readable, and
        // writable where exponentials are stored (# Safety).
        last = unsafe { sum_as::<S, E, M, _>(s, &chunk, shift, &mut writer) };
        if !(last.in_range && safe.contains(&last.sum)) {
            break;
        }
        *sum_of = last.sum;
        count += 1;
    }
    writer.finish();
    (count, last)
}
