//! `cargo xtask builds`: builds for other processors than the plainest.
//!
//! With AVX2 and FMA from the start, the portable vectors are fused too, as they are on NEON, and
//! have the bits of every other set. (The plain build's are what `cargo xtask test` runs.)

use crate::tool::{Result, cargo, run};

const TARGET: &str = "x86_64-unknown-linux-gnu";

/// `cargo xtask builds`.
pub fn run_tests() -> Result {
    #[cfg(target_arch = "x86_64")]
    let runs = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
    #[cfg(not(target_arch = "x86_64"))]
    let runs = false;
    if !runs {
        println!("skipped: a build for x86-64-v3 does not run on this processor");
        return Ok(());
    }
    // The target is named so that build scripts are not built anew.
    let mut command = cargo(["test", "--package", "xent", "--target", TARGET]);
    command.env("RUSTFLAGS", "-C target-cpu=x86-64-v3");
    run(command.args(["--test", "hashes", "--", "golden", "--nocapture"]))
}
