//! `cargo xtask sanitize`: the programs in C and C++ under sanitizers, with the library
//! instrumented like them, and under valgrind.
//!
//! The compiler's own runtime serves both sides, so that a heap buffer of the program has its red
//! zones in the library's eyes too: a control at the start shows that.

use crate::c::{Program, SAMPLED, SUITES, Suite, buildable};
use crate::check::Report;
use crate::dist;
use crate::tool::{
    C, Compiler, Result, directory, has, on_all_cores, output, quietly, root, shell, stem,
};
use anyhow::{bail, ensure};
use std::path::{Path, PathBuf};
use xshell::{Shell, cmd};

const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Instrumented inline, the masked loads and stores of the kernels take minutes to compile.
const ADDRESS_LIBRARY: &str =
    "-Zsanitizer=address -Cllvm-args=-asan-instrumentation-with-call-threshold=0";

/// The portable set alone: ThreadSanitizer does not instrument masked writes, and threads share the work in the
/// same way on each set.
const THREAD_LIBRARY: &str = "-Zsanitizer=thread --cfg xent_portable";

/// Programs with threads of their own that call at once, on one pool and on the process's.
const CONCURRENT: [&str; 2] = ["parallel", "pool"];

/// Programs for valgrind, which takes some thirty times as long: those that are done in seconds.
const MEMCHECK: [&str; 4] = ["log_probs", "options", "overloads", "targets"];

/// `cargo xtask sanitize`.
pub fn run_all() -> Result {
    ensure!(
        cfg!(all(target_os = "linux", target_arch = "x86_64")),
        "sanitize knows x86-64 Linux only"
    );
    let sh = shell()?;
    let mut report = Report::default();
    println!("== address and undefined behaviour");
    let mut count = addresses(&sh, &mut report)?;
    println!("== data races");
    count += races(&sh, &mut report)?;
    println!("== valgrind");
    count += memcheck(&sh, &mut report)?;
    println!("{count} programs passed");
    report.skipped.iter().for_each(|what| println!("skipped: {what}"));
    Ok(())
}

/// Clang, whose runtime is of the family that instruments the library, or else the first compiler.
fn compiler(sh: &Shell, suite: &Suite) -> Result<Compiler> {
    let (compilers, _) = suite.language.compilers(sh)?;
    Ok(compilers.iter().find(|one| one.is_clang()).unwrap_or(&compilers[0]).clone())
}

/// The static library, instrumented, built by `rustc` with these options of cargo's.
fn library(sh: &Shell, name: &str, flags: &str, rustc: &str, options: &[&str]) -> Result<PathBuf> {
    let to = directory("sanitize")?.join(name);
    // With a target named, cargo does not instrument build scripts.
    cmd!(sh, "cargo rustc --release --package xent --lib --crate-type staticlib --features capi")
        .args(["--target", TARGET])
        .args(options)
        .env("CARGO_TARGET_DIR", &to)
        .env("RUSTC", rustc)
        // The sanitizers are not stable, but in every compiler.
        .env("RUSTC_BOOTSTRAP", "1")
        .env("RUSTFLAGS", flags)
        // Optimisation changes no access that matters here, and takes most of the time.
        .env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "1")
        .env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "16")
        .run()?;
    Ok(to.join(TARGET).join("release/libxent.a"))
}

/// Compiles with a sanitizer's flags, which begin with its own.
fn program(
    compiler: &Compiler,
    suite: &Suite,
    flags: &[&str],
    sources: &[PathBuf],
    library: &[String],
) -> Result<Program> {
    // Compiling takes most of the time in C++, running does in C, whose programs compute the right results themselves.
    let level = if suite.language.name == C.name { "-O1" } else { "-O0" };
    let standard = format!("-std={}", suite.standards[0]);
    let label = flags.first().map_or("plain", |flag| flag);
    let flags = [&[&standard, "-g1", level], flags].concat();
    Program::new(compiler, label, &flags, sources, library)
}

/// A fault in the library's own code, on this instruction set, must be seen there; otherwise silence says nothing.
fn control(sh: &Shell, program: &Program, set: &str, fault: &str) -> Result {
    let command = program.command(sh, &[]).env("XENT_ISA", set);
    // The program frees nothing where the call fails for want of the set.
    let command = command.env("ASAN_OPTIONS", "detect_leaks=0");
    let output = command.quiet().ignore_status().output()?;
    let text = String::from_utf8_lossy(&output.stderr);
    // A set that is not there fails without a word of the sanitizer's.
    if text.is_empty() && set != "portable" {
        println!("ok  {} on {set}: no such set", program.name);
        return Ok(());
    }
    // A function of the library's, mangled or not.
    let inside = text.contains("xent::") || text.contains("4xent");
    if output.status.success() || !text.contains(fault) || !inside {
        bail!("{} on {set}, {}: {fault} went unseen\n{text}", program.name, output.status);
    }
    println!("ok  {} on {set}: seen", program.name);
    Ok(())
}

/// Compiles and runs each with these variables; a finding is a failure.
fn each(all: &[Program], variables: &[(&str, &str)]) -> Result<usize> {
    on_all_cores(all, |program| {
        program.compile()?;
        program.run(&[], variables)
    })?;
    Ok(all.len())
}

fn addresses(sh: &Shell, report: &mut Report) -> Result<usize> {
    let rustc = std::env::var("RUSTC").unwrap_or_else(|_| "rustc".into());
    let archive = library(sh, "address", ADDRESS_LIBRARY, &rustc, &[])?;
    let archive = Program::statically(&archive);
    let flags = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"];
    let mut count = 0;
    for suite in &SUITES {
        let compiler = compiler(sh, suite)?;
        if suite.language.name == C.name {
            let sources = [root().join("tests/sanitize/overflow.c")];
            let overflow = program(&compiler, suite, &flags, &sources, &archive)?;
            overflow.compile()?;
            for set in ["portable", "avx2", "avx512"] {
                control(sh, &overflow, set, "heap-buffer-overflow")?;
            }
        }
        let all = suite.programs(sh)?;
        let all = buildable(sh, &compiler, &all, report)?;
        let all = all.iter().map(|sources| program(&compiler, suite, &flags, sources, &archive));
        count += each(&all.collect::<Result<Vec<_>>>()?, &[])?;
    }
    Ok(count)
}

/// A rustc that has its standard library's source, which must be instrumented too: otherwise ThreadSanitizer
/// misses the order that locks and threads establish, and reports races that are none.
fn with_source(sh: &Shell) -> Option<String> {
    let own = std::env::var("RUSTC").unwrap_or_else(|_| "rustc".into());
    [own, "/usr/bin/rustc".to_string()].into_iter().find(|rustc| {
        let sysroot = output(cmd!(sh, "{rustc} --print sysroot")).unwrap_or_default();
        Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library/Cargo.lock").is_file()
    })
}

/// ThreadSanitizer, of clang: gcc's is not told of Rust's threads in the same way.
fn races(sh: &Shell, report: &mut Report) -> Result<usize> {
    let Some(rustc) = with_source(sh) else {
        report.skip("data races: no rustc with its standard library's source".to_string());
        return Ok(0);
    };
    let build_std = ["-Zbuild-std=std,panic_unwind", "-Zbuild-std-features=panic-unwind"];
    let archive = library(sh, "thread", THREAD_LIBRARY, &rustc, &build_std)?;
    let mut archive = Program::statically(&archive);
    let (shim, object) = ("tests/sanitize/shim.c", directory("sanitize")?.join("shim.o"));
    archive.insert(0, object.display().to_string());
    let flags = ["-fsanitize=thread"];
    let mut count = 0;
    for suite in &SUITES {
        let compiler = compiler(sh, suite)?;
        if !compiler.is_clang() {
            report.skip(format!("data races in {}: no clang", suite.language.name));
            continue;
        }
        let compile = ["-x", "c", "-O1", "-fno-builtin", "-c", shim, "-o"];
        quietly(compiler.command(sh).args(compile).arg(&object))?;
        if suite.language.name == C.name {
            let sources = [root().join("tests/sanitize/race.c")];
            let race = program(&compiler, suite, &flags, &sources, &archive)?;
            race.compile()?;
            control(sh, &race, "portable", "data race")?;
        }
        let all = suite.programs(sh)?;
        let all = all.iter().filter(|sources| CONCURRENT.contains(&&*stem(&sources[0])));
        let all = all.map(|sources| program(&compiler, suite, &flags, sources, &archive));
        // Threads meet in the same places however often they do.
        count += each(&all.collect::<Result<Vec<_>>>()?, &[("XENT_ISA", "portable"), SAMPLED])?;
    }
    Ok(count)
}

/// memcheck on the library as it ships. It knows processors up to AVX2.
fn memcheck(sh: &Shell, report: &mut Report) -> Result<usize> {
    if !has(sh, "valgrind") {
        report.skip("valgrind not found".to_string());
        return Ok(0);
    }
    let dist = dist::build(&directory("dist")?)?;
    let archive = Program::statically(&dist.static_library());
    let mut programs = Vec::new();
    for suite in &SUITES {
        let compiler = suite.language.compiler(sh)?;
        let all = suite.programs(sh)?;
        for sources in all.iter().filter(|sources| MEMCHECK.contains(&&*stem(&sources[0]))) {
            programs.push(program(&compiler, suite, &[], sources, &archive)?);
        }
    }
    on_all_cores(&programs, Program::compile)?;
    let runs: Vec<_> = programs
        .iter()
        .flat_map(|program| ["avx2", "portable"].map(|set| (program, set)))
        .collect();
    on_all_cores(&runs, |(program, set)| {
        // Other tests compare values; memcheck asks whether what is read was written.
        let kinds = "--errors-for-leak-kinds=definite,indirect";
        let memcheck = ["valgrind", "--quiet", "--error-exitcode=1", "--leak-check=full", kinds];
        program.run(&memcheck, &[("XENT_ISA", set), SAMPLED])
    })?;
    Ok(runs.len())
}
