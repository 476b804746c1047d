//! `cargo xtask sanitize`: the programs in C and C++ under sanitizers, with the library
//! instrumented like them, and under valgrind.
//!
//! The compiler's own runtime serves both sides, so that a heap buffer of the program has its red
//! zones in the library's eyes too: a control at the start shows that.

use crate::c::{self, SUITES, Suite, buildable, on_all_cores, programs};
use crate::check::Report;
use crate::dist::{self, SYSTEM_LIBRARIES};
use crate::fuzz;
use crate::tool::{
    C, Compiler, Result, cargo, make_directory, root, run, run_quietly, shown, target,
};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

const TARGET: &str = "x86_64-unknown-linux-gnu";

const ADDRESS: [&str; 2] = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"];

const THREAD: &str = "-fsanitize=thread";
/// Of the portable set alone: masked writes of the others are not instrumented, and threads share the
/// work in the same way on each.
const THREAD_LIBRARY: &str = "-Zsanitizer=thread --cfg xent_portable";

/// Programs with threads of their own that call at once, on one pool and on the process's.
const CONCURRENT: [&str; 2] = ["parallel", "pool"];

/// Programs for valgrind, which takes some thirty times as long: those that are done in seconds.
const MEMCHECK: [&str; 4] = ["log_probs", "options", "overloads", "targets"];

/// A gradient that is one element short.
const OVERFLOW: &str = r#"
#include <stdlib.h>
#include <xent.h>
int main(void) {
  float logits[70] = {0};
  int64_t target = 0;
  float *grad = malloc(69 * sizeof *grad);
  xent_problem problem = XENT_PROBLEM_INIT;
  xent_results results = XENT_RESULTS_INIT;
  xent_output out = {grad, XENT_F32, {0}};
  problem.rows = 1, problem.classes = 70;
  problem.logits = (xent_input){logits, XENT_F32, {0}};
  problem.targets = (xent_input){&target, XENT_I64, {0}};
  return xent_forward_backward(&problem, NULL, 1, &results, &out) != XENT_OK;
}
"#;

/// A call, and a thread that writes what the call writes. It does nothing else: two calls that come one
/// after the other are put in order by what they share within, and after thousands of them the sanitizer
/// has forgotten.
const RACE: &str = r#"
#include <pthread.h>
#include <xent.h>
static float logits[4000], grad[4000];
static int64_t target;
static void *call(void *unused) {
  xent_problem problem = XENT_PROBLEM_INIT;
  xent_results results = XENT_RESULTS_INIT;
  xent_output out = {grad, XENT_F32, {0}};
  problem.rows = 1, problem.classes = 4000;
  problem.logits = (xent_input){logits, XENT_F32, {0}};
  problem.targets = (xent_input){&target, XENT_I64, {0}};
  xent_forward_backward(&problem, NULL, 1, &results, &out);
  return unused;
}
int main(void) {
  pthread_t other;
  if (pthread_create(&other, NULL, call, NULL) != 0) return 2;
  grad[2000] = 1;
  return pthread_join(other, NULL);
}
"#;

/// What runtimes before LLVM 15 have under other names.
const SHIM: &str = r#"
#include <string.h>
#define OLD __attribute__((weak)) void *
OLD __tsan_memcpy(void *to, const void *from, size_t n) { return memcpy(to, from, n); }
OLD __tsan_memmove(void *to, const void *from, size_t n) { return memmove(to, from, n); }
OLD __tsan_memset(void *to, int byte, size_t n) { return memset(to, byte, n); }
"#;

/// `cargo xtask sanitize`.
pub fn run_all() -> Result {
    if !cfg!(all(target_os = "linux", target_arch = "x86_64")) {
        return Err("sanitize knows x86-64 Linux only".to_string());
    }
    let mut report = Report::default();
    let start = Instant::now();
    make_directory(&directory())?;

    println!("== address and undefined behaviour");
    let library = fuzz::library()?;
    let mut count = 0;
    for suite in &SUITES {
        let compiler = compiler(suite)?;
        if suite.language.name == C.name {
            overflow(&compiler, &library)?;
        }
        let all = programs(suite)?;
        let all = buildable(&compiler, &all, &mut report)?;
        let builds =
            all.iter().map(|sources| Program::new(suite, &compiler, sources, &ADDRESS, &library));
        count += each(&builds.collect::<Vec<_>>())?;
    }

    println!("== data races");
    count += races(&mut report)?;

    println!("== valgrind");
    count += memcheck(&mut report)?;

    println!("{count} programs passed in {:.0} s", start.elapsed().as_secs_f64());
    report.skipped.iter().for_each(|what| println!("skipped: {what}"));
    Ok(())
}

/// A program to be built and run.
struct Program<'a> {
    name: String,
    suite: &'a Suite,
    compiler: &'a Compiler,
    sources: &'a [PathBuf],
    flags: &'a [&'a str],
    library: &'a Path,
    output: PathBuf,
    /// The instruction set, if not the best.
    set: Option<&'static str>,
    /// Takes samples of what it repeats.
    is_sampled: bool,
}

impl<'a> Program<'a> {
    fn new(
        suite: &'a Suite,
        compiler: &'a Compiler,
        sources: &'a [PathBuf],
        flags: &'a [&'a str],
        library: &'a Path,
    ) -> Program<'a> {
        let stem = sources[0].file_stem().unwrap_or_default().to_string_lossy();
        let sanitizer = flags.first().map_or("", |flag| flag.trim_start_matches("-fsanitize="));
        let file = format!("{stem}-{}-{}-{sanitizer}", suite.language.name, compiler.name);
        let output = directory().join(file.replace(['/', ' ', ','], "-"));
        let name = format!("{} ({})", shown(&sources[0]), compiler.name);
        Program {
            name,
            suite,
            compiler,
            sources,
            flags,
            library,
            output,
            set: None,
            is_sampled: false,
        }
    }

    fn compile(&self) -> Result {
        let mut command = self.compiler.command();
        command
            .arg(format!("-std={}", self.suite.standards[0]))
            .args(["-g1", self.suite.level(), "-Iinclude"])
            .args(self.flags)
            .args(c::flags(&self.sources[0]))
            .args(self.sources)
            .arg(self.library)
            .args(SYSTEM_LIBRARIES)
            .arg("-o")
            .arg(&self.output);
        run_quietly(&mut command)
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.output);
        command.current_dir(root()).env_remove("LD_LIBRARY_PATH");
        self.set.map(|set| command.env("XENT_ISA", set));
        if self.is_sampled {
            command.env(c::SAMPLED.0, c::SAMPLED.1);
        }
        command
    }
}

/// Clang, whose runtime is of the family that instruments the library, or what else there is.
fn compiler(suite: &Suite) -> Result<Compiler> {
    let (compilers, _) = suite.language.compilers()?;
    Ok(compilers.iter().find(|one| one.is_clang()).unwrap_or(&compilers[0]).clone())
}

/// Compiles all and runs each; what a sanitizer finds is a failure.
fn each(all: &[Program]) -> Result<usize> {
    on_all_cores(all, |program| {
        program.compile()?;
        run_quietly(&mut program.command())?;
        println!("ok  {}", program.name);
        Ok(())
    })?;
    Ok(all.len())
}

fn directory() -> PathBuf {
    target().join("sanitize")
}

/// The static library with ThreadSanitizer. Which memory is touched, and by whom, does not depend on how
/// much is optimised: as little as still runs quickly.
fn thread_library(rustc: &Path) -> Result<PathBuf> {
    let to = directory().join("thread");
    let mut command = cargo(["rustc", "--package", "xent", "--lib", "--crate-type", "staticlib"]);
    command
        // The target is named so that build scripts are not instrumented.
        .args(["--release", "--target", TARGET, "--features", "capi"])
        // Without backtraces, whose crates are half of it.
        .args(["-Zbuild-std=std,panic_unwind", "-Zbuild-std-features=panic-unwind"])
        .env("CARGO_TARGET_DIR", &to)
        .env("RUSTC", rustc)
        // The sanitizers are not stable, but in every compiler.
        .env("RUSTC_BOOTSTRAP", "1")
        .env("RUSTFLAGS", THREAD_LIBRARY)
        .env("CARGO_PROFILE_RELEASE_LTO", "off")
        .env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "16")
        .env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "1");
    run(&mut command)?;
    Ok(to.join(TARGET).join("release").join("libxent.a"))
}

fn write(name: &str, text: &str) -> Result<PathBuf> {
    let path = directory().join(name);
    match std::fs::write(&path, text) {
        Ok(()) => Ok(path),
        Err(error) => Err(format!("cannot write {}: {error}", shown(&path))),
    }
}

/// A fault that is committed in the library's own code, on an instruction set, is seen there:
/// without that, nothing else says anything.
fn control(program: &Program, set: &str, fault: &str) -> Result {
    let output = program.command().env("XENT_ISA", set).output();
    let output = output.map_err(|error| format!("cannot start {}: {error}", program.name))?;
    let text = String::from_utf8_lossy(&output.stderr);
    // A set that is not there fails without a word of the sanitizer's.
    let absent = text.is_empty() && set != "portable";
    // Of the library's own functions, by a name that is mangled or is not.
    let seen = !output.status.success()
        && text.contains(fault)
        && (text.contains("xent::") || text.contains("4xent"));
    if absent || seen {
        println!("ok  {} on {set}: {}", program.name, if seen { "seen" } else { "no such set" });
        return Ok(());
    }
    Err(format!("{} on {set}, {}: {fault} went unseen\n{text}", program.name, output.status))
}

fn overflow(compiler: &Compiler, library: &Path) -> Result {
    let sources = [write("overflow.c", OVERFLOW)?];
    let program = Program::new(&SUITES[0], compiler, &sources, &ADDRESS, library);
    program.compile()?;
    for set in ["portable", "avx2", "avx512"] {
        control(&program, set, "heap-buffer-overflow")?;
    }
    Ok(())
}

/// A rustc that has its standard library's source, which must be instrumented too: the order that
/// its locks and threads establish would else go unseen, and be taken for races.
fn with_source() -> Option<PathBuf> {
    let own = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    [PathBuf::from(own), PathBuf::from("/usr/bin/rustc")].into_iter().find(|rustc| {
        let output = Command::new(rustc).args(["--print", "sysroot"]).current_dir(root()).output();
        output.is_ok_and(|output| {
            let sysroot = String::from_utf8_lossy(&output.stdout);
            let source = Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library");
            source.join("Cargo.lock").is_file()
        })
    })
}

/// ThreadSanitizer, of clang: gcc's is not told of what Rust's threads do in the same way.
fn races(report: &mut Report) -> Result<usize> {
    let Some(rustc) = with_source() else {
        report.skip("data races: no rustc with its standard library's source".to_string());
        return Ok(0);
    };
    let library = thread_library(&rustc)?;
    let shim = write("shim.c", SHIM)?;
    let race = [write("race.c", RACE)?];
    let mut count = 0;
    for suite in &SUITES {
        let compiler = compiler(suite)?;
        if !compiler.is_clang() {
            report.skip(format!("data races in {}: no clang", suite.language.name));
            continue;
        }
        let object = directory().join("shim.o");
        let mut command = compiler.command();
        command.args(["-x", "c", "-O1", "-fno-builtin", "-c"]).arg(&shim).arg("-o").arg(&object);
        run_quietly(&mut command)?;
        let object = object.display().to_string();
        let flags = [THREAD, &object];
        if suite.language.name == C.name {
            let race = Program::new(suite, &compiler, &race, &flags, &library);
            race.compile()?;
            control(&race, "portable", "data race")?;
        }
        let all = programs(suite)?;
        let concurrent = all.iter().filter(|sources| is_one_of(sources, &CONCURRENT));
        let builds = concurrent.map(|sources| {
            let program = Program::new(suite, &compiler, sources, &flags, &library);
            // Threads meet in the same places however often they do.
            Program { set: Some("portable"), is_sampled: true, ..program }
        });
        count += each(&builds.collect::<Vec<_>>())?;
    }
    Ok(count)
}

fn is_one_of(sources: &[PathBuf], names: &[&str]) -> bool {
    let stem = sources[0].file_stem().and_then(|stem| stem.to_str());
    stem.is_some_and(|stem| names.contains(&stem))
}

/// memcheck on the library as it ships. It knows processors up to AVX2.
fn memcheck(report: &mut Report) -> Result<usize> {
    if Command::new("valgrind").arg("--version").output().is_err() {
        report.skip("valgrind not found".to_string());
        return Ok(0);
    }
    // Of its own: other commands may be at the usual one.
    let dist = dist::build(&directory().join("dist"))?;
    let mut count = 0;
    for suite in &SUITES {
        let compiler = suite.language.compiler()?;
        let all = programs(suite)?;
        let chosen = all.iter().filter(|sources| is_one_of(sources, &MEMCHECK));
        let library = dist.static_library();
        let builds: Vec<Program> =
            chosen.map(|sources| Program::new(suite, &compiler, sources, &[], &library)).collect();
        on_all_cores(&builds, Program::compile)?;
        let sets = ["avx2", "portable"];
        let runs: Vec<_> =
            builds.iter().flat_map(|program| sets.map(|set| (program, set))).collect();
        on_all_cores(&runs, |(program, set)| {
            let mut command = Command::new("valgrind");
            command
                .args(["--quiet", "--error-exitcode=1", "--leak-check=full"])
                .arg("--errors-for-leak-kinds=definite,indirect")
                .arg(&program.output);
            // Every value is right elsewhere; here it is asked whether what is read was written.
            command.current_dir(root()).env("XENT_ISA", set).env(c::SAMPLED.0, c::SAMPLED.1);
            run_quietly(&mut command)?;
            println!("ok  {} on {set}", program.name);
            Ok(())
        })?;
        count += runs.len();
    }
    Ok(count)
}
