//! A chunk of a row as the kernels see it, the masks of its blocks, and work that goes along block by
//! block.

use crate::simd::{Simd, all_lanes, first_lanes};

/// Some classes of a row, side by side, of the element type that the entry point is for.
#[derive(Clone, Copy, Debug)]
pub struct Chunk {
    /// The logits.
    pub x: *const u8,
    /// How many.
    pub len: usize,
    /// The class that sums exclude, counted from the first of the chunk.
    pub excluded: Option<usize>,
    /// Where exponentials are stored, the place of the logits; null unless they are stored.
    pub stored: *mut u8,
    /// A copy of the logits in case they have to be put back; null unless exponentials are stored.
    pub backup: *mut u8,
}

impl Chunk {
    /// Logits whose exponentials are not stored.
    #[inline(always)]
    pub fn new(x: *const u8, len: usize, excluded: Option<usize>) -> Chunk {
        Chunk { x, len, excluded, stored: std::ptr::null_mut(), backup: std::ptr::null_mut() }
    }
}

/// Work that a reduction does on the way, one step for each of its blocks.
pub trait Interleaved {
    /// Does the next step, if one is left.
    fn step(&mut self);
}

/// No work.
pub struct NoInterleaved;

impl Interleaved for NoInterleaved {
    #[inline(always)]
    fn step(&mut self) {}
}

/// Where the row's excluded class is in the chunk of `len` classes from `class` on, if it is there.
#[inline(always)]
pub fn excluded_in(excluded: Option<usize>, class: usize, len: usize) -> Option<usize> {
    excluded.and_then(|y| y.checked_sub(class)).filter(|&y| y < len)
}

/// The blocks of a chunk: those that are loaded whole, and the masks of at most two that are not.
#[derive(Clone, Copy)]
pub struct Blocks {
    /// Blocks that are loaded whole.
    pub whole: usize,
    /// The block with the excluded class if it would otherwise be loaded whole; else `usize::MAX`.
    excluded: usize,
    excluded_mask: u64,
    /// Lanes of the block after the last whole one, without the excluded class.
    tail_mask: u64,
}

impl Blocks {
    /// The blocks of `len` classes.
    #[inline(always)]
    pub fn new<S: Simd>(len: usize, excluded: Option<usize>) -> Self {
        let block = S::BLOCK;
        let whole = len / block;
        let mut blocks = Blocks {
            whole,
            excluded: usize::MAX,
            excluded_mask: 0,
            tail_mask: first_lanes(len % block),
        };
        if let Some(excluded) = excluded {
            let lane = !(1u64 << (excluded % block));
            if excluded / block < whole {
                blocks.whole -= 1;
                blocks.excluded = excluded / block;
                blocks.excluded_mask = lane & all_lanes::<S>();
            } else {
                blocks.tail_mask &= lane;
            }
        }
        blocks
    }

    /// The class at which whole block `i` starts.
    #[inline(always)]
    pub fn whole_at<S: Simd>(&self, i: usize) -> usize {
        (i + usize::from(i >= self.excluded)) * S::BLOCK
    }

    /// The masked blocks as `(first class, mask)`; an empty mask where there is none.
    #[inline(always)]
    pub fn masked<S: Simd>(&self) -> [(usize, u64); 2] {
        let tail = self.whole + usize::from(self.excluded != usize::MAX);
        [
            (self.excluded.wrapping_mul(S::BLOCK), self.excluded_mask),
            (tail * S::BLOCK, self.tail_mask),
        ]
    }
}
