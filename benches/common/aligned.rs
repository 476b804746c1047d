//! Memory that starts on a cache line.

use std::ops::{Deref, DerefMut};

const LINE: usize = 64;

/// Elements that start on a cache line, as an allocator for tensors hands them out.
pub struct Aligned<T> {
    memory: Vec<T>,
    skip: usize,
    len: usize,
}

impl<T: Copy> Aligned<T> {
    /// `len` elements, all of this value.
    pub fn filled(len: usize, value: T) -> Self {
        let memory = vec![value; len + LINE / size_of::<T>()];
        let skip = memory.as_ptr().align_offset(LINE);
        Aligned { memory, skip, len }
    }

    /// A copy.
    pub fn new(from: &[T]) -> Self {
        let mut aligned = Aligned::filled(from.len(), from[0]);
        aligned.copy_from_slice(from);
        aligned
    }
}

impl<T> Deref for Aligned<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        &self.memory[self.skip..self.skip + self.len]
    }
}

impl<T> DerefMut for Aligned<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.memory[self.skip..self.skip + self.len]
    }
}
