//! `cargo xtask fuzz`: every fuzz target for a while, from the committed seeds, by cargo-fuzz.

use crate::tool::{Result, directory, has, root, shell};
use anyhow::{Context, ensure};
use xshell::cmd;

const TARGETS: [&str; 5] = ["problem", "linear", "shards", "c_abi", "partition"];

/// libFuzzer's options. A choice is a byte, and the last ones count too: inputs have any length from the start.
/// valgrind looks for leaks; here they would cost half of the executions.
const OPTIONS: &str = "-len_control=0 -max_len=512 -timeout=300 -report_slow_units=60 -detect_leaks=0 \
                       -verbosity=0 -print_final_stats=1";

/// `cargo xtask fuzz [SECONDS] [seed=SEED] [TARGET]...`; no seconds run the seeds alone.
pub fn run(arguments: &[&str]) -> Result {
    let (mut limit, mut seed, mut targets) = ("-max_total_time=30".to_string(), None, Vec::new());
    for argument in arguments {
        if *argument == "0" {
            limit = "-runs=0".to_string();
        } else if let Ok(seconds) = argument.parse::<u32>() {
            limit = format!("-max_total_time={seconds}");
        } else if let Some(number) = argument.strip_prefix("seed=") {
            seed =
                Some(format!("-seed={}", number.parse::<u32>().context("seed= takes a number")?));
        } else {
            ensure!(TARGETS.contains(argument), "no fuzz target is called {argument}");
            targets.push(*argument);
        }
    }
    let sh = shell()?;
    let installed = cmd!(sh, "cargo fuzz --version").quiet().ignore_stderr().read().is_ok();
    ensure!(
        installed && has(&sh, "c++"),
        "fuzz needs a C++ compiler and `cargo install cargo-fuzz --locked`"
    );
    // One of its own, so that a full disk is easy to clear.
    let products = directory("fuzz")?;
    for target in if targets.is_empty() { TARGETS.to_vec() } else { targets } {
        let corpus = format!("fuzz/corpus/{target}");
        sh.create_dir(root().join(&corpus))?;
        let options = OPTIONS.split_whitespace().chain([limit.as_str()]).chain(seed.as_deref());
        cmd!(sh, "cargo fuzz run --release --no-trace-compares --target-dir {products} {target} {corpus} fuzz/seeds/{target} -- {options...}")
            // cargo-fuzz asks for a sanitizer, which stable has under this name.
            .env("RUSTC_BOOTSTRAP", "1")
            // Instrumented inline, the masked loads and stores of the kernels take minutes to compile.
            .env("RUSTFLAGS", "-Cllvm-args=-asan-instrumentation-with-call-threshold=0")
            .env("ASAN_OPTIONS", "malloc_context_size=1:quarantine_size_mb=16")
            .run()?;
    }
    Ok(())
}
