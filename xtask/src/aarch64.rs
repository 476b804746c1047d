//! `cargo xtask aarch64`: the tests on AArch64, that is on NEON, under emulation.
//!
//! Programs are linked statically: with threads, dynamically linked ones hang in some versions of
//! qemu. Rust's standard library for AArch64 is rustup's or Debian's (`.ci/debian-rust`).

use crate::check::Report;
use crate::tool::{Result, cargo, make_directory, root, run, run_quietly, shown, target};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

const TARGET: &str = "aarch64-unknown-linux-gnu";
const LINKER: &str = "aarch64-linux-gnu-gcc";
const EMULATOR: &str = "qemu-aarch64";

/// Cases of a property: it is the same arithmetic as everywhere, so a few show that NEON does it.
const CASES: &str = "24";

/// Rust tests by file. What is left out runs for minutes in an emulator; the hashes, of all options,
/// dtypes and layouts, are held to those of AVX2 and AVX-512 instead.
const SUITES: [(&str, &[&str]); 3] = [
    ("hashes", &["golden", "hashes_see_every_bit", "shuffled_batches"]),
    ("golden", &[]),
    ("combinations", &["random_problems_agree_with_the_oracle", "confident", "far_above"]),
];

/// Programs in C that are about the platform: its floating point, threads, signals.
const PROGRAMS: [&str; 6] = ["edges", "float_state", "isa", "openmp", "options", "signals"];

/// A rustc that has the standard library for AArch64.
fn compiler() -> Result<PathBuf> {
    let own = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    for rustc in [Path::new(&own), Path::new("/usr/bin/rustc")] {
        let output = Command::new(rustc)
            .args(["--print", "target-libdir", "--target", TARGET])
            .current_dir(root())
            .output();
        let Ok(output) = output else { continue };
        let directory = String::from_utf8_lossy(&output.stdout);
        let entries = std::fs::read_dir(directory.trim());
        let is_std = |name: &str| name.starts_with("libstd-") && name.ends_with(".rlib");
        let mut names = entries.into_iter().flatten().flatten();
        if names.any(|entry| is_std(&entry.file_name().to_string_lossy())) {
            return Ok(rustc.to_path_buf());
        }
    }
    Err(missing("a rustc with the standard library"))
}

fn missing(what: &str) -> String {
    format!("finds no {what} for AArch64 (on Debian 12, .ci/debian-rust installs it)")
}

fn check_runs(program: &str) -> Result {
    let output = Command::new(program).arg("--version").output();
    match output {
        Ok(output) if output.status.success() => Ok(()),
        _ => Err(missing(program)),
    }
}

/// A cargo that builds for AArch64 and runs what it built in the emulator.
fn cross(rustc: &Path, words: &[&str]) -> Command {
    let mut command = cargo(words);
    let variable = |name: &str| format!("CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_{name}");
    command
        // Another compiler's: nothing of it fits, and nothing is to be built anew for it.
        .env("CARGO_TARGET_DIR", directory())
        .env("RUSTC", rustc)
        .env_remove("RUSTFLAGS")
        .env(variable("LINKER"), LINKER)
        .env(variable("RUNNER"), EMULATOR)
        .env(variable("RUSTFLAGS"), "-C target-feature=+crt-static")
        .env("PROPTEST_CASES", std::env::var("PROPTEST_CASES").unwrap_or(CASES.to_string()))
        .args(["--target", TARGET]);
    command
}

fn directory() -> PathBuf {
    target().join("aarch64")
}

/// `cargo xtask aarch64`.
pub fn run_tests() -> Result {
    if cfg!(target_arch = "aarch64") {
        println!("this processor is an AArch64: `cargo xtask test` runs on it");
        return Ok(());
    }
    let rustc = compiler()?;
    check_runs(LINKER)?;
    check_runs(EMULATOR)?;
    let mut report = Report::default();
    let start = Instant::now();

    let mut build = cross(&rustc, &["test", "--package", "xent", "--no-run"]);
    for (suite, _) in SUITES {
        build.args(["--test", suite]);
    }
    run(&mut build)?;
    println!("built in {:.0} s", start.elapsed().as_secs_f64());

    for (suite, tests) in SUITES {
        let mut command = cross(&rustc, &["test", "--package", "xent", "--test", suite]);
        run(command.arg("--").args(tests))?;
    }
    programs(&rustc, &mut report)?;
    println!("AArch64 passed in {:.0} s", start.elapsed().as_secs_f64());
    report.skipped.iter().for_each(|what| println!("skipped: {what}"));
    Ok(())
}

/// Programs in C, linked with the library that the tests were linked with.
fn programs(rustc: &Path, report: &mut Report) -> Result {
    run(&mut cross(rustc, &["build", "--package", "xent", "--profile", "test", "--lib"]))?;
    let library = directory().join(TARGET).join("debug/libxent.a");
    let to = directory().join("c");
    make_directory(&to)?;
    for name in PROGRAMS {
        let source = root().join("tests/c").join(name).with_extension("c");
        let program = to.join(name);
        let mut command = Command::new(LINKER);
        command.current_dir(root()).args(["-static", "-std=c11", "-O2", "-g", "-Iinclude"]);
        command.args(crate::c::flags(&source)).arg(&source).arg(&library);
        run_quietly(command.args(["-pthread", "-ldl", "-lm", "-o"]).arg(&program))?;
        let start = Instant::now();
        run_quietly(Command::new(EMULATOR).arg(&program).current_dir(root()))?;
        println!("ok  {} ({:.1} s)", shown(&source), start.elapsed().as_secs_f64());
    }
    report.skip("unit tests, and other Rust tests than these, on AArch64".to_string());
    report.skip("the other programs in C and those in C++ run natively alone".to_string());
    report.skip("fork on AArch64: a child that starts threads stops this emulator".to_string());
    Ok(())
}
