//! Scratch on the stack.

use std::mem::MaybeUninit;

/// Room for `N` lanes of f64, or of f32, aligned to a cache line.
#[derive(Clone, Copy)]
#[repr(align(64))]
pub struct Scratch<const N: usize>(MaybeUninit<[f64; N]>);

impl<const N: usize> Scratch<N> {
    /// Room that holds nothing yet.
    #[inline(always)]
    pub const fn new() -> Self {
        Scratch(MaybeUninit::uninit())
    }

    /// The first byte.
    pub fn start(&mut self) -> *mut u8 {
        self.0.as_mut_ptr().cast()
    }
}
