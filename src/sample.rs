//! How much of an exhaustive test runs: all of it, but in an emulator.

use std::ops::Range;

/// The blocks that start the range and follow one another, or one in so many of them as
/// `XENT_TEST_STRIDE` says. From which on depends on `turn`, so that in the end every place in a
/// range is met.
pub fn blocks(range: Range<u32>, len: usize, turn: u32) -> impl Iterator<Item = u32> {
    let stride = match std::env::var("XENT_TEST_STRIDE") {
        Ok(stride) => stride.parse().expect("XENT_TEST_STRIDE is a number"),
        Err(_) => 1,
    };
    range.step_by(len).skip(turn as usize % stride).step_by(stride)
}
