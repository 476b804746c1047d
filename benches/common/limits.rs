//! The limits of the machine: loops that do the least that a kernel has to do with its memory.
//!
//! Each loop has variants, which prefetch and store differently: which is fastest depends on the machine
//! and on the size. A bench takes the fastest. The loops use AVX-512 if the processor has it.

use rayon::prelude::*;

/// Bytes that a thread takes at a time.
const BLOCK: usize = 256 << 10;

/// Variants of [`read`], [`scale`] and [`copy`] each.
pub const VARIANTS: usize = 5;

/// Bytes ahead that a variant of `read` and `scale` prefetches. 16 KiB are, as in the kernels, the next
/// four pages, 256 bytes of each in turn; in the last variant into the second level of cache.
const AHEAD: [usize; VARIANTS] = [0, 1024, 4096, SPREAD, SPREAD];
const SPREAD: usize = 16384;

/// Reads every byte and adds it up as f32: the fastest that a forward can be.
pub fn read(variant: usize, threads: u32, x: &[f32]) {
    let block = BLOCK / size_of::<f32>();
    let one = |x: &[f32]| {
        std::hint::black_box(match variant {
            0 => sum::<0>(x),
            1 => sum::<1>(x),
            2 => sum::<2>(x),
            3 => sum::<3>(x),
            _ => sum::<4>(x),
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
    match variant {
        0 => multiply::<0>(x, factor),
        1 => multiply::<1>(x, factor),
        2 => multiply::<2>(x, factor),
        3 => multiply::<3>(x, factor),
        _ => multiply::<4>(x, factor),
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
        // SAFETY: `is_x86_feature_detected!` found the instruction set.
        return unsafe { vectors::exp(x) };
    }
    x.iter().map(|x| x.exp2()).sum()
}

#[cfg(target_arch = "x86_64")]
mod vectors {
    use std::arch::x86_64::*;

    /// Prefetches the line. A prefetch never faults.
    #[inline(always)]
    fn prefetch<const VARIANT: usize>(p: *const f32) {
        let ahead = super::AHEAD[VARIANT];
        let mut next = p.cast::<i8>().wrapping_add(ahead);
        if ahead == super::SPREAD {
            let at = p.addr() % ahead;
            let (block, within) = (at / 256, at % 256);
            next = next.wrapping_sub(at).wrapping_add(block % 4 * 4096 + block / 4 * 256 + within);
        }
        // SAFETY: a prefetch of any address faults never and changes no memory.
        unsafe {
            match VARIANT {
                0 => {}
                4 => _mm_prefetch::<_MM_HINT_T1>(next),
                _ => _mm_prefetch::<_MM_HINT_T0>(next),
            }
        }
    }

    /// 8 accumulators: with fewer the latency of an addition shows.
    #[target_feature(enable = "avx512f")]
    pub fn sum<const VARIANT: usize>(x: &[f32]) -> f32 {
        let mut acc = [_mm512_setzero_ps(); 8];
        let mut chunks = x.chunks_exact(128);
        for chunk in &mut chunks {
            for (i, acc) in acc.iter_mut().enumerate() {
                // SAFETY: the 16 elements lie within a chunk of 128.
                unsafe {
                    let p = chunk.as_ptr().add(i * 16);
                    prefetch::<VARIANT>(p);
                    *acc = _mm512_add_ps(*acc, _mm512_loadu_ps(p));
                }
            }
        }
        let total = acc.into_iter().reduce(|a, b| _mm512_add_ps(a, b));
        total.map_or(0.0, |v| _mm512_reduce_add_ps(v)) + chunks.remainder().iter().sum::<f32>()
    }

    #[target_feature(enable = "avx512f")]
    pub fn multiply<const VARIANT: usize>(x: &mut [f32], factor: f32) {
        let f = _mm512_set1_ps(factor);
        let mut chunks = x.chunks_exact_mut(64);
        for chunk in &mut chunks {
            for i in 0..4 {
                // SAFETY: the 16 elements lie within a chunk of 64.
                unsafe {
                    let p = chunk.as_mut_ptr().add(i * 16);
                    prefetch::<VARIANT>(p);
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
            // SAFETY: both chunks have 16 elements, and the streamed store is used only where aligned.
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
        // The streamed lines must be in memory when the time is taken.
        _mm_sfence();
    }

    /// The exponent to the nearest eighth, a table of those, a polynomial of degree 3 on what is left
    /// (the lowest that stays within an ulp), the sum.
    #[target_feature(enable = "avx512f")]
    pub fn exp(x: &[f32]) -> f32 {
        let splat = |x: f32| _mm512_set1_ps(x);
        // Coefficients of the Taylor series: only speed matters here.
        let ln_2 = std::f32::consts::LN_2;
        let [c1, c2, c3] = [ln_2, ln_2 * ln_2 / 2.0, ln_2 * ln_2 * ln_2 / 6.0].map(splat);
        let eighths: [u32; 16] = std::array::from_fn(|i| {
            let j = i as u32 % 8;
            (j as f32 / 8.0).exp2().to_bits().wrapping_sub((127 << 23) + (j << 20))
        });
        // SAFETY: source and target have the same size.
        let eighths = unsafe { _mm512_loadu_si512(eighths.as_ptr().cast()) };
        let (base, magic) = (splat(std::f32::consts::LOG2_E), splat(1_572_864.0 + 127.0));
        let mut acc = [_mm512_setzero_ps(); 4];
        for chunk in x.chunks_exact(64) {
            for (i, acc) in acc.iter_mut().enumerate() {
                // SAFETY: the 16 elements lie within a chunk of 64.
                let x = unsafe { _mm512_loadu_ps(chunk.as_ptr().add(i * 16)) };
                let m = _mm512_fmadd_ps(x, base, magic);
                let f = _mm512_fmsub_ps(x, base, _mm512_sub_ps(m, magic));
                let p = _mm512_fmadd_ps(_mm512_fmadd_ps(c3, f, c2), f, c1);
                let bits = _mm512_castps_si512(m);
                let step = _mm512_permutexvar_epi32(bits, eighths);
                let scale = _mm512_add_epi32(_mm512_slli_epi32::<20>(bits), step);
                let scale = _mm512_castsi512_ps(scale);
                *acc = _mm512_add_ps(*acc, _mm512_fmadd_ps(scale, _mm512_mul_ps(p, f), scale));
            }
        }
        let total = acc.into_iter().reduce(|a, b| _mm512_add_ps(a, b));
        total.map_or(0.0, |v| _mm512_reduce_add_ps(v))
    }
}

#[cfg(target_arch = "x86_64")]
fn has_avx512() -> bool {
    std::arch::is_x86_feature_detected!("avx512f")
}

fn sum<const VARIANT: usize>(x: &[f32]) -> f32 {
    #[cfg(target_arch = "x86_64")]
    if has_avx512() {
        // SAFETY: `is_x86_feature_detected!` found the instruction set.
        return unsafe { vectors::sum::<VARIANT>(x) };
    }
    // Many sums, or the additions wait for each other.
    let mut acc = [0f32; 64];
    for chunk in x.chunks_exact(64) {
        acc.iter_mut().zip(chunk).for_each(|(acc, x)| *acc += x);
    }
    acc.iter().sum()
}

fn multiply<const VARIANT: usize>(x: &mut [f32], factor: f32) {
    #[cfg(target_arch = "x86_64")]
    if has_avx512() {
        // SAFETY: `is_x86_feature_detected!` found the instruction set.
        return unsafe { vectors::multiply::<VARIANT>(x, factor) };
    }
    x.iter_mut().for_each(|x| *x *= factor);
}

fn copy_block<const STREAM: bool>(from: &[f32], to: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if has_avx512() {
        // SAFETY: `is_x86_feature_detected!` found the instruction set.
        return unsafe { vectors::copy::<STREAM>(from, to) };
    }
    to.copy_from_slice(from);
}
