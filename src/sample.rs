//! Sampling of long tests, for emulators: `XENT_TEST_STRIDE=n` runs one block in n. Without it, a long
//! test runs in full.

use std::ops::Range;

/// Returns the starts of consecutive blocks of `len` in a range, or one block in n with
/// `XENT_TEST_STRIDE=n`. The first block depends on `turn`, so a test that passes different turns covers
/// every place of the range.
pub fn blocks(range: Range<u32>, len: usize, turn: u32) -> impl Iterator<Item = u32> {
    let stride = stride();
    range.step_by(len).skip(turn as usize % stride).step_by(stride)
}

/// Returns all cases of a test that is long but not exhaustive, or one in n with `XENT_TEST_STRIDE=n`, but
/// at least one in 16.
pub fn some_of<T>(all: Vec<T>) -> impl Iterator<Item = T> {
    all.into_iter().step_by(stride().min(16))
}

/// Returns `XENT_TEST_STRIDE`, or 1 if it is not set.
fn stride() -> usize {
    match std::env::var("XENT_TEST_STRIDE") {
        Ok(stride) => stride.parse().expect("XENT_TEST_STRIDE is a number"),
        Err(_) => 1,
    }
}
