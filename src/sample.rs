//! How much of a long test runs: all of it, but in an emulator.

use std::ops::Range;

/// The blocks that start the range and follow one another, or one in so many of them as
/// `XENT_TEST_STRIDE` says. From which on depends on `turn`, so that in the end every place in a
/// range is met.
pub fn blocks(range: Range<u32>, len: usize, turn: u32) -> impl Iterator<Item = u32> {
    let stride = stride();
    range.step_by(len).skip(turn as usize % stride).step_by(stride)
}

/// All of them, or one in so many, of a test that is long but not exhaustive: in 16 at most.
pub fn some_of<T>(all: Vec<T>) -> impl Iterator<Item = T> {
    all.into_iter().step_by(stride().min(16))
}

fn stride() -> usize {
    match std::env::var("XENT_TEST_STRIDE") {
        Ok(stride) => stride.parse().expect("XENT_TEST_STRIDE is a number"),
        Err(_) => 1,
    }
}
