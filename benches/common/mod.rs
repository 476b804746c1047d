//! What the benches share: inputs, and the limits of the machine that kernels are held against.

use rayon::prelude::*;

/// Logits as a trainer has them: normal, of standard deviation 2, from a fixed seed.
pub fn logits(n: usize) -> Vec<f32> {
    let mut state = 0x9E37_79B9_7F4A_7C15u64;
    let mut uniform = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 24) as f32
    };
    // Sums of four uniforms are near enough to normal, and cheap.
    (0..n).map(|_| (uniform() + uniform() + uniform() + uniform() - 2.0) * 3.46).collect()
}

/// Targets spread over all classes.
pub fn targets(rows: usize, classes: usize) -> Vec<i32> {
    (0..rows).map(|row| (row * 7919 % classes) as i32).collect()
}

/// Rows that make about `elements` elements.
pub fn rows(classes: usize, elements: usize) -> usize {
    (elements / classes).max(1)
}

/// Elements that one thread of a limit takes at a time.
const BLOCK: usize = 1 << 16;

/// Sum of all elements: the fastest that a forward can be.
pub fn read(x: &[f32]) -> f32 {
    x.par_chunks(BLOCK).map(sum).sum()
}

/// `x[i] *= factor`: the fastest that forward and backward in place can be.
pub fn scale(x: &mut [f32], factor: f32) {
    x.par_chunks_mut(BLOCK).for_each(|x| multiply(x, factor));
}

/// A plain copy: one bound of forward and backward out of place.
pub fn copy(from: &[f32], to: &mut [f32]) {
    let pairs = to.par_chunks_mut(BLOCK).zip(from.par_chunks(BLOCK));
    pairs.for_each(|(to, from)| copy_block::<false>(from, to));
}

/// A copy that writes around the caches: the other.
pub fn copy_streamed(from: &[f32], to: &mut [f32]) {
    let pairs = to.par_chunks_mut(BLOCK).zip(from.par_chunks(BLOCK));
    pairs.for_each(|(to, from)| copy_block::<true>(from, to));
}

#[cfg(target_arch = "x86_64")]
mod vectors {
    use std::arch::x86_64::*;

    /// 8 accumulators and prefetching, as in the kernels: the plain loop is slower.
    #[target_feature(enable = "avx512f")]
    pub fn sum(x: &[f32]) -> f32 {
        let mut acc = [_mm512_setzero_ps(); 8];
        let mut chunks = x.chunks_exact(128);
        for chunk in &mut chunks {
            for (i, acc) in acc.iter_mut().enumerate() {
                // SAFETY: 16 elements of a chunk of 128; a prefetch never faults.
                unsafe {
                    let p = chunk.as_ptr().add(i * 16);
                    _mm_prefetch::<_MM_HINT_T0>(p.wrapping_add(512).cast());
                    *acc = _mm512_add_ps(*acc, _mm512_loadu_ps(p));
                }
            }
        }
        let total = acc.into_iter().reduce(|a, b| _mm512_add_ps(a, b));
        total.map_or(0.0, |v| _mm512_reduce_add_ps(v)) + chunks.remainder().iter().sum::<f32>()
    }

    #[target_feature(enable = "avx512f")]
    pub fn multiply(x: &mut [f32], factor: f32) {
        let f = _mm512_set1_ps(factor);
        let mut chunks = x.chunks_exact_mut(16);
        for chunk in &mut chunks {
            let p = chunk.as_mut_ptr();
            // SAFETY: a chunk of 16 elements.
            unsafe { _mm512_storeu_ps(p, _mm512_mul_ps(_mm512_loadu_ps(p), f)) };
        }
        chunks.into_remainder().iter_mut().for_each(|x| *x *= factor);
    }

    #[target_feature(enable = "avx512f")]
    pub fn copy<const STREAM: bool>(from: &[f32], to: &mut [f32]) {
        let (to_chunks, from_chunks) = (to.chunks_exact_mut(16), from.chunks_exact(16));
        for (to, from) in to_chunks.zip(from_chunks) {
            // SAFETY: chunks of 16 elements; a vector allocated in one piece of this size is
            // aligned to a page but for a header of 16 bytes, so ask before streaming.
            unsafe {
                let v = _mm512_loadu_ps(from.as_ptr());
                if STREAM && to.as_ptr().addr() % 64 == 0 {
                    _mm512_stream_ps(to.as_mut_ptr(), v);
                } else {
                    _mm512_storeu_ps(to.as_mut_ptr(), v);
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
fn has_avx512() -> bool {
    std::arch::is_x86_feature_detected!("avx512f")
}

fn sum(x: &[f32]) -> f32 {
    #[cfg(target_arch = "x86_64")]
    if has_avx512() {
        // SAFETY: detected.
        return unsafe { vectors::sum(x) };
    }
    x.chunks(64).map(|x| x.iter().sum::<f32>()).sum()
}

fn multiply(x: &mut [f32], factor: f32) {
    #[cfg(target_arch = "x86_64")]
    if has_avx512() {
        // SAFETY: detected.
        return unsafe { vectors::multiply(x, factor) };
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

/// Elements that start on a cache line, as an allocator for tensors hands them out.
pub struct Aligned(Vec<f32>, usize, usize);

impl Aligned {
    pub fn new(from: &[f32]) -> Self {
        let mut memory = vec![0.0; from.len() + 16];
        let skip = memory.as_ptr().align_offset(64);
        memory[skip..skip + from.len()].copy_from_slice(from);
        Aligned(memory, skip, from.len())
    }
}

impl std::ops::Deref for Aligned {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        &self.0[self.1..self.1 + self.2]
    }
}

impl std::ops::DerefMut for Aligned {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.0[self.1..self.1 + self.2]
    }
}
