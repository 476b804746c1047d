//! `cargo xtask aarch64`: the tests on AArch64, that is on NEON, under emulation: every Rust test
//! and every program in C and C++ but those that are listed here with the reason.
//!
//! Programs are linked statically: with threads, dynamically linked ones hang in some versions of
//! qemu. Rust's standard library for AArch64 is rustup's or Debian's (`.ci/debian-rust`).

use crate::c::{Program, SUITES};
use crate::tool::{
    Compiler, Result, directory, has, on_all_cores, output, root, shell, shown, stem,
};
use anyhow::{Context, ensure};
use std::path::{Path, PathBuf};
use xshell::{Cmd, Shell, cmd};

const TARGET: &str = "aarch64-unknown-linux-gnu";
const EMULATOR: &str = "qemu-aarch64";

/// For Rust and C, and for C++.
const COMPILERS: [&str; 2] = ["aarch64-linux-gnu-gcc", "aarch64-linux-gnu-g++"];

/// Exhaustive tests take one block in so many, and other long tests a sample: a few blocks show that NEON computes
/// what the other sets do.
const SAMPLED: (&str, &str) = ("XENT_TEST_STRIDE", "257");

/// The tests that cannot run in the emulator, and why.
const LEFT_OUT: [(&str, &str); 8] = [
    ("tests/c/fork.c", "a child that starts threads stops this emulator"),
    ("tests/c/fork_race.c", "a child that starts threads stops this emulator"),
    ("tests/c/sigwait.c", "a child that starts threads stops this emulator"),
    ("tests/c/heap.c", "it has a malloc of its own, which a statically linked glibc rules out"),
    ("tests/c/pool_free.c", "it has a pthread_create of its own, which glibc rules out likewise"),
    ("tests/c/stack.c", "it has a pthread_create of its own, which glibc rules out likewise"),
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

/// `cargo xtask aarch64`.
pub fn run_tests() -> Result {
    if cfg!(target_arch = "aarch64") {
        println!("this processor is an AArch64: `cargo xtask test` runs on it");
        return Ok(());
    }
    let sh = shell()?;
    let hint = "for AArch64 (on Debian 12, .ci/debian-rust installs it)";
    let rustc = rustc(&sh).with_context(|| format!("no rustc with the standard library {hint}"))?;
    for program in COMPILERS.into_iter().chain([EMULATOR]) {
        ensure!(has(&sh, program), "no {program} {hint}");
    }
    let rust = rust_tests(&sh, &rustc)?;
    let c = c_programs(&sh, &rustc)?;
    on_all_cores(&rust, |(name, path)| emulate(name, path))?;
    on_all_cores(&c, |program| {
        program.compile()?;
        program.run(&[EMULATOR], &[SAMPLED])
    })?;
    println!("AArch64 passed: {} Rust programs, {} in C and C++", rust.len(), c.len());
    println!("sampled: properties, exhaustive tests, long loops ({}={})", SAMPLED.0, SAMPLED.1);
    for (file, reason) in LEFT_OUT {
        ensure!(root().join(file).is_file(), "{file} is left out, and does not exist");
        println!("skipped: {file}: {reason}");
    }
    Ok(())
}

/// A rustc that has the standard library for AArch64.
fn rustc(sh: &Shell) -> Option<String> {
    let own = std::env::var("RUSTC").unwrap_or_else(|_| "rustc".into());
    [own, "/usr/bin/rustc".to_string()].into_iter().find(|rustc| {
        let directory = output(cmd!(sh, "{rustc} --print target-libdir --target {TARGET}"));
        let files = sh.read_dir(directory.unwrap_or_default().trim()).unwrap_or_default();
        let mut names = files.iter().map(|path| stem(path));
        names.any(|name| name.starts_with("libstd-"))
    })
}

/// A cargo that builds for AArch64.
fn cross<'a>(sh: &'a Shell, rustc: &str, words: &str) -> Result<Cmd<'a>> {
    let variable = |name: &str| format!("CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_{name}");
    let flags = "-C target-feature=+crt-static --cfg xent_tests_only";
    let command = sh.cmd("cargo").args(words.split(' ')).args(["--package", "xent", "--lib"]);
    Ok(command
        .args(["--target", TARGET])
        // Another compiler's products do not mix with those of the usual one.
        .env("CARGO_TARGET_DIR", directory("aarch64")?)
        .env("RUSTC", rustc)
        .env_remove("RUSTFLAGS")
        // `cargo xtask test` checks for overflow, which is the same there.
        .env("CARGO_PROFILE_TEST_OVERFLOW_CHECKS", "false")
        .env("CARGO_PROFILE_TEST_DEBUG_ASSERTIONS", "false")
        .env(variable("LINKER"), COMPILERS[0])
        .env(variable("RUSTFLAGS"), flags))
}

/// The unit tests and every file of `tests/`, by name.
fn rust_tests(sh: &Shell, rustc: &str) -> Result<Vec<(String, PathBuf)>> {
    let words = "test --tests --no-run --message-format json-render-diagnostics";
    // cargo reports its progress on the standard error.
    let messages = cross(sh, rustc, words)?.read()?;
    let mut found = Vec::new();
    for message in messages.lines() {
        let Some((_, rest)) = message.split_once("\"executable\":\"") else { continue };
        let path = PathBuf::from(rest.split('"').next().unwrap_or_default());
        let file = stem(&path);
        let file = file.rsplit_once('-').map_or(&*file, |(file, _)| file);
        let name = format!("tests/{file}.rs");
        let name = if root().join(&name).is_file() { name } else { "unit tests".to_string() };
        if !is_left_out(&name) {
            found.push((name, path));
        }
    }
    ensure!(!found.is_empty(), "cargo names no test program");
    Ok(found)
}

fn c_programs(sh: &Shell, rustc: &str) -> Result<Vec<Program>> {
    cross(sh, rustc, "rustc --release --features capi --crate-type staticlib")?.run()?;
    let library = directory("aarch64")?.join(TARGET).join("release/libxent.a");
    // As it is installed. An archive that cargo has not written anew is one object already, and stays one.
    cmd!(sh, "packaging/one-object {library}").env("CROSS_COMPILE", "aarch64-linux-gnu-").run()?;
    let library = Program::statically(&library);
    let mut found = Vec::new();
    for (suite, name) in SUITES.iter().zip(COMPILERS) {
        let compiler = Compiler { name: name.to_string(), version: String::new() };
        let flags = ["-static", "-O2", &format!("-std={}", suite.standards[0])];
        for sources in suite.programs(sh)? {
            if !is_left_out(&shown(&sources[0])) {
                found.push(Program::new(&compiler, "static", &flags, &sources, &library)?);
            }
        }
    }
    Ok(found)
}

/// Runs a Rust test program, which has to pass one test at least.
fn emulate(name: &str, path: &Path) -> Result {
    let sh = shell()?;
    // As many programs as there are cores run side by side.
    let command = cmd!(sh, "{EMULATOR} {path}").env("RUST_TEST_THREADS", "1");
    let text = output(command.env(SAMPLED.0, SAMPLED.1))?;
    let is_pass = |line: &&str| line.starts_with("test ") && line.ends_with("... ok");
    let passed = text.lines().filter(is_pass).count();
    ensure!(passed > 0, "{name} on AArch64 passed no test\n{text}");
    println!("ok  {name} ({passed} tests)");
    Ok(())
}
