//! `cargo xtask aarch64`: the tests on AArch64, that is on NEON, under emulation: every Rust test
//! and every program in C and C++ but those that are listed here with the reason.
//!
//! Programs are linked statically: with threads, dynamically linked ones hang in some versions of
//! qemu. Rust's standard library for AArch64 is rustup's or Debian's (`.ci/debian-rust`).

use crate::c::{self, SUITES, on_all_cores, programs};
use crate::tool::{
    Result, cargo, executables, make_directory, root, run, run_quietly, shown, target,
};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

const TARGET: &str = "aarch64-unknown-linux-gnu";
const EMULATOR: &str = "qemu-aarch64";

/// For Rust and C, and for C++.
const COMPILERS: [&str; 2] = ["aarch64-linux-gnu-gcc", "aarch64-linux-gnu-g++"];

/// One block in so many of an exhaustive test, and of what else takes long a sample: the arithmetic
/// is the same as everywhere, so a few show that NEON does it.
const STRIDE: &str = "257";

/// What cannot run in the emulator, and why.
const LEFT_OUT: [(&str, &str); 7] = [
    ("tests/c/fork.c", "a child that starts threads stops this emulator"),
    ("tests/c/fork_race.c", "a child that starts threads stops this emulator"),
    ("tests/c/sigwait.c", "a child that starts threads stops this emulator"),
    ("tests/c/heap.c", "it has a malloc of its own, which a statically linked glibc rules out"),
    ("tests/c/pool_free.c", "it has a pthread_create of its own, which glibc rules out likewise"),
    // `tests/memory.rs` counts allocations there.
    ("tests/c/memory.c", "it has a malloc of its own, which a statically linked glibc rules out"),
    // `tests/c/large.c` and `edges` have strides past 2^32 that are few enough.
    (
        "tests/large.rs",
        "its sparse memory takes gigabytes: the emulator keeps a record of each page",
    ),
];

fn is_left_out(name: &str) -> bool {
    LEFT_OUT.iter().any(|(file, _)| *file == name)
}

/// A program to be emulated.
struct Program {
    name: String,
    path: PathBuf,
    /// Says what it tested, line by line, as Rust's harness does.
    counts: bool,
}

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

/// A cargo that builds for AArch64.
fn cross(rustc: &Path, words: &[&str]) -> Command {
    let mut command = cargo(words);
    let variable = |name: &str| format!("CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_{name}");
    command
        // Another compiler's: nothing of it fits, and nothing is to be built anew for it.
        .env("CARGO_TARGET_DIR", directory())
        .env("RUSTC", rustc)
        .env_remove("RUSTFLAGS")
        // Integers are no others there: `cargo xtask test` watches over them.
        .env("CARGO_PROFILE_TEST_OVERFLOW_CHECKS", "false")
        .env("CARGO_PROFILE_TEST_DEBUG_ASSERTIONS", "false")
        .env(variable("LINKER"), COMPILERS[0])
        .env(variable("RUSTFLAGS"), "-C target-feature=+crt-static --cfg xent_tests_only")
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
    COMPILERS.into_iter().chain([EMULATOR]).try_for_each(check_runs)?;
    let start = Instant::now();
    let mut all = rust_tests(&rustc)?;
    all.extend(c_programs(&rustc)?);
    println!("built {} programs in {:.0} s", all.len(), start.elapsed().as_secs_f64());

    on_all_cores(&all, emulate)?;
    println!("AArch64 passed in {:.0} s", start.elapsed().as_secs_f64());
    println!("sampled: properties, exhaustive tests, long loops (XENT_TEST_STRIDE={STRIDE})");
    for (file, reason) in LEFT_OUT {
        if !root().join(file).is_file() {
            return Err(format!("{file} is left out, and does not exist"));
        }
        println!("skipped: {file}: {reason}");
    }
    Ok(())
}

/// The unit tests and every file of `tests/`.
fn rust_tests(rustc: &Path) -> Result<Vec<Program>> {
    let words = ["test", "--package", "xent", "--lib", "--tests", "--no-run"];
    let mut found = Vec::new();
    for path in executables(&mut cross(rustc, &words))? {
        let file = path.file_stem().unwrap_or_default().to_string_lossy();
        let stem = file.rsplit_once('-').map_or(&*file, |(stem, _)| stem);
        let is_file = root().join("tests").join(stem).with_extension("rs").is_file();
        let name = if is_file { format!("tests/{stem}.rs") } else { "unit tests".to_string() };
        if !is_left_out(&name) {
            found.push(Program { name, path, counts: true });
        }
    }
    Ok(found)
}

/// The programs in C and C++.
fn c_programs(rustc: &Path) -> Result<Vec<Program>> {
    let words = ["rustc", "--release", "--package", "xent", "--lib", "--features", "capi"];
    run(cross(rustc, &words).args(["--crate-type", "staticlib"]))?;
    let library = directory().join(TARGET).join("release/libxent.a");
    let mut found = Vec::new();
    for (suite, compiler) in SUITES.iter().zip(COMPILERS) {
        let language = suite.language.name;
        let to = directory().join(language);
        make_directory(&to)?;
        let mut builds = Vec::new();
        for sources in programs(suite)? {
            let name = shown(&sources[0]);
            if !is_left_out(&name) {
                let path = to.join(sources[0].file_stem().unwrap_or_default());
                builds.push((sources, Program { name, path, counts: false }));
            }
        }
        on_all_cores(&builds, |(sources, program)| {
            let mut command = Command::new(compiler);
            let standard = format!("-std={}", suite.standards[0]);
            command.current_dir(root()).args(["-static", "-O2", "-Iinclude", &standard]);
            command.args(c::flags(&sources[0])).args(sources).arg(&library);
            command.args(["-pthread", "-ldl", "-lm", "-o"]).arg(&program.path);
            run_quietly(&mut command)
        })?;
        found.extend(builds.into_iter().map(|(_, program)| program));
    }
    Ok(found)
}

/// Runs a program to its end, which has to be a good one.
fn emulate(program: &Program) -> Result {
    let start = Instant::now();
    let mut command = Command::new(EMULATOR);
    command.arg(&program.path).current_dir(root()).stdin(Stdio::null());
    // As many programs as there are cores run side by side.
    command.env("XENT_TEST_STRIDE", STRIDE).env("RUST_TEST_THREADS", "1");
    let output = command.output().map_err(|error| format!("cannot start {EMULATOR}: {error}"))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let is_pass = |line: &&str| line.starts_with("test ") && line.ends_with("... ok");
    let passed = text.lines().filter(is_pass).count();
    if !output.status.success() || program.counts && passed == 0 {
        let error = String::from_utf8_lossy(&output.stderr);
        let status = output.status;
        return Err(format!(
            "{} on AArch64: {status}, {passed} passed\n{text}{error}",
            program.name
        ));
    }
    let tests = if program.counts { format!("{passed} tests, ") } else { String::new() };
    println!("ok  {} ({tests}{:.1} s)", program.name, start.elapsed().as_secs_f64());
    Ok(())
}
