//! What the machine allows: the least that a kernel has to do with its memory, and nothing else.
//!
//! Each has variants (how far it prefetches, how it stores), since which is fastest depends on the
//! machine and on the size; a bench takes the fastest of all. With AVX-512 where there is any.

use rayon::prelude::*;

/// Bytes that a thread takes at a time.
const BLOCK: usize = 256 << 10;

/// Variants of [`read`], [`scale`] and [`copy`] each.
pub const VARIANTS: usize = 4;

/// Bytes ahead that a variant of `read` and `scale` prefetches.
const AHEAD: [usize; VARIANTS] = [0, 1024, 4096, SPREAD];

/// As the kernels do: the next four pages, 256 bytes of each in turn.
const SPREAD: usize = 16384;

/// Reads every byte and adds it up as f32: the fastest that a forward can be.
pub fn read(variant: usize, threads: u32, x: &[f32]) {
    let block = BLOCK / size_of::<f32>();
    let one = |x: &[f32]| {
        std::hint::black_box(match AHEAD[variant] {
            0 => sum::<0>(x),
            1024 => sum::<1024>(x),
            4096 => sum::<4096>(x),
            _ => sum::<SPREAD>(x),
        });
    };
    if threads == 1 {
        x.chunks(block).for_each(one);
    } else {
        x.par_chunks(block).for_each(one);
    }
}

/// `x[i] *= factor`: the fastest that forward and backward in place can be.
pub fn scale(variant: usize, threads: u32, x: &mut [f32], factor: f32) {
    let block = BLOCK / size_of::<f32>();
    if threads == 1 {
        x.chunks_mut(block).for_each(|x| scale_block(variant, x, factor));
    } else {
        x.par_chunks_mut(block).for_each(|x| scale_block(variant, x, factor));
    }
}

fn scale_block(variant: usize, x: &mut [f32], factor: f32) {
    match AHEAD[variant] {
        0 => multiply::<0>(x, factor),
        1024 => multiply::<1024>(x, factor),
        4096 => multiply::<4096>(x, factor),
        _ => multiply::<SPREAD>(x, factor),
    }
}

/// A copy: plain vectors, vectors that write around the caches, and the C library's.
pub fn copy(variant: usize, threads: u32, from: &[f32], to: &mut [f32]) {
    let block = BLOCK / size_of::<f32>();
    let one = |(to, from): (&mut [f32], &[f32])| match variant {
        0 => copy_block::<false>(from, to),
        1 => copy_block::<true>(from, to),
        _ => to.copy_from_slice(from),
    };
    if threads == 1 {
        to.chunks_mut(block).zip(from.chunks(block)).for_each(one);
    } else {
        to.par_chunks_mut(block).zip(from.par_chunks(block)).for_each(one);
    }
}

/// Sum of `2^x`, with the steps that an accurate exponential cannot do without and no others: the
/// arithmetic's ceiling, on one thread.
pub fn exp(x: &[f32]) -> f32 {
    #[cfg(target_arch = "x86_64")]
    if has_avx512() {
        // SAFETY: detected.
        return unsafe { vectors::exp(x) };
    }
    x.iter().map(|x| x.exp2()).sum()
}

#[cfg(target_arch = "x86_64")]
mod vectors {
    use std::arch::x86_64::*;

    /// Asks for the line that comes in time: it never faults.
    #[inline(always)]
    fn prefetch<const AHEAD: usize>(p: *const f32) {
        let mut next = p.cast::<i8>().wrapping_add(AHEAD);
        if AHEAD == super::SPREAD {
            let at = p.addr() % AHEAD;
            let (block, within) = (at / 256, at % 256);
            next = next.wrapping_sub(at).wrapping_add(block % 4 * 4096 + block / 4 * 256 + within);
        }
        if AHEAD > 0 {
            // SAFETY: a prefetch has no effect but on speed.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(next) };
        }
    }

    /// 8 accumulators: with fewer the latency of an addition shows.
    #[target_feature(enable = "avx512f")]
    pub fn sum<const AHEAD: usize>(x: &[f32]) -> f32 {
        let mut acc = [_mm512_setzero_ps(); 8];
        let mut chunks = x.chunks_exact(128);
        for chunk in &mut chunks {
            for (i, acc) in acc.iter_mut().enumerate() {
                // SAFETY: 16 elements of a chunk of 128.
                unsafe {
                    let p = chunk.as_ptr().add(i * 16);
                    prefetch::<AHEAD>(p);
                    *acc = _mm512_add_ps(*acc, _mm512_loadu_ps(p));
                }
            }
        }
        let total = acc.into_iter().reduce(|a, b| _mm512_add_ps(a, b));
        total.map_or(0.0, |v| _mm512_reduce_add_ps(v)) + chunks.remainder().iter().sum::<f32>()
    }

    #[target_feature(enable = "avx512f")]
    pub fn multiply<const AHEAD: usize>(x: &mut [f32], factor: f32) {
        let f = _mm512_set1_ps(factor);
        let mut chunks = x.chunks_exact_mut(64);
        for chunk in &mut chunks {
            for i in 0..4 {
                // SAFETY: 16 elements of a chunk of 64.
                unsafe {
                    let p = chunk.as_mut_ptr().add(i * 16);
                    prefetch::<AHEAD>(p);
                    _mm512_storeu_ps(p, _mm512_mul_ps(_mm512_loadu_ps(p), f));
                }
            }
        }
        chunks.into_remainder().iter_mut().for_each(|x| *x *= factor);
    }

    #[target_feature(enable = "avx512f")]
    pub fn copy<const STREAM: bool>(from: &[f32], to: &mut [f32]) {
        let (to_chunks, from_chunks) = (to.chunks_exact_mut(16), from.chunks_exact(16));
        for (to, from) in to_chunks.zip(from_chunks) {
            // SAFETY: chunks of 16 elements; streamed only where aligned.
            unsafe {
                let v = _mm512_loadu_ps(from.as_ptr());
                if STREAM && to.as_ptr().addr() % 64 == 0 {
                    _mm512_stream_ps(to.as_mut_ptr(), v);
                } else {
                    _mm512_storeu_ps(to.as_mut_ptr(), v);
                }
            }
        }
        let whole = from.len() / 16 * 16;
        to[whole..].copy_from_slice(&from[whole..]);
        // What was streamed is to be in memory when the time is taken.
        _mm_sfence();
    }

    /// One multiplication for the base, a polynomial of degree 6 on the fraction (the lowest that
    /// stays within an ulp), the exponent, the sum.
    #[target_feature(enable = "avx512f,avx512dq")]
    pub fn exp(x: &[f32]) -> f32 {
        // Taylor's: speed is what is wanted here.
        let mut coefficients = [std::f32::consts::LN_2; 6];
        for i in 1..6 {
            coefficients[i] *= coefficients[i - 1] / (i + 1) as f32;
        }
        coefficients.reverse();
        let coefficients = coefficients.map(|c| _mm512_set1_ps(c));
        let (base, one) = (_mm512_set1_ps(std::f32::consts::LOG2_E), _mm512_set1_ps(1.0));
        let mut acc = [_mm512_setzero_ps(); 4];
        for chunk in x.chunks_exact(64) {
            for (i, acc) in acc.iter_mut().enumerate() {
                // SAFETY: 16 elements of a chunk of 64.
                let t = unsafe { _mm512_loadu_ps(chunk.as_ptr().add(i * 16)) };
                let t = _mm512_fmadd_ps(t, base, one);
                let f = _mm512_reduce_ps::<0>(t);
                let mut p = coefficients[0];
                for &c in &coefficients[1..] {
                    p = _mm512_fmadd_ps(p, f, c);
                }
                p = _mm512_fmadd_ps(p, f, one);
                *acc = _mm512_add_ps(*acc, _mm512_scalef_ps(p, t));
            }
        }
        let total = acc.into_iter().reduce(|a, b| _mm512_add_ps(a, b));
        total.map_or(0.0, |v| _mm512_reduce_add_ps(v))
    }
}

#[cfg(target_arch = "x86_64")]
fn has_avx512() -> bool {
    std::arch::is_x86_feature_detected!("avx512f")
        && std::arch::is_x86_feature_detected!("avx512dq")
}

fn sum<const AHEAD: usize>(x: &[f32]) -> f32 {
    #[cfg(target_arch = "x86_64")]
    if has_avx512() {
        // SAFETY: detected.
        return unsafe { vectors::sum::<AHEAD>(x) };
    }
    // Many sums, or the additions wait for each other.
    let mut acc = [0f32; 64];
    for chunk in x.chunks_exact(64) {
        acc.iter_mut().zip(chunk).for_each(|(acc, x)| *acc += x);
    }
    acc.iter().sum()
}

fn multiply<const AHEAD: usize>(x: &mut [f32], factor: f32) {
    #[cfg(target_arch = "x86_64")]
    if has_avx512() {
        // SAFETY: detected.
        return unsafe { vectors::multiply::<AHEAD>(x, factor) };
    }
    x.iter_mut().for_each(|x| *x *= factor);
}

fn copy_block<const STREAM: bool>(from: &[f32], to: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if has_avx512() {
        // SAFETY: detected.
        return unsafe { vectors::copy::<STREAM>(from, to) };
    }
    to.copy_from_slice(from);
}
