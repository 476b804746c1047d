//! Times on a machine that other processes disturb.

use std::time::Instant;

/// Seconds of one call.
pub fn seconds(call: impl FnOnce()) -> f64 {
    let start = Instant::now();
    call();
    start.elapsed().as_secs_f64()
}

/// The seconds of the fastest of `calls` calls, each after `restore`.
pub fn fastest<T: ?Sized>(
    calls: usize,
    state: &mut T,
    restore: impl Fn(&mut T),
    call: impl Fn(&mut T),
) -> f64 {
    let times = (0..calls).map(|_| {
        restore(state);
        seconds(|| call(state))
    });
    times.fold(f64::INFINITY, f64::min)
}

/// The middle of the values.
pub fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
