//! Another Rust library for a C program, with a standard library of its own.

/// Whether it caught its panic.
#[unsafe(no_mangle)]
pub extern "C" fn other_catches() -> i32 {
    std::panic::catch_unwind(|| std::hint::black_box(&[0u8][..])[std::hint::black_box(1)])
        .is_err()
        .into()
}
