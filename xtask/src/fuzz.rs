//! `cargo xtask fuzz`: every fuzz target for a while, from the committed seeds.
//!
//! Plain cargo builds the targets, with the flags that `cargo fuzz` would hand to the compiler.

use crate::tool::{Result, cargo, make_directory, output, root, run, shown, target};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::{env, fs, thread};

const TARGETS: [&str; 3] = ["problem", "c_abi", "partition"];

const SECONDS: u32 = 30;

/// Counters for libFuzzer at every edge, and AddressSanitizer.
const FLAGS: [&str; 9] = [
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "--cfg",
    "fuzzing",
    // Each condition of several is an edge.
    "-Cllvm-args=-simplifycfg-branch-fold-threshold=0",
    "-Zsanitizer=address",
    // Checked inline, the masked loads and stores of the kernels take minutes to compile.
    "-Cllvm-args=-asan-instrumentation-with-call-threshold=0",
];

/// What `cargo xtask fuzz [SECONDS] [seed=SEED] [TARGET]...` is asked for.
pub struct Plan {
    seconds: u32,
    /// Of libFuzzer's choices, which are others each time without.
    seed: Option<u32>,
    targets: Vec<&'static str>,
}

pub fn parse(arguments: &[&str]) -> Result<Plan> {
    let (seconds, names) = match arguments {
        [first, rest @ ..] if first.starts_with(|c: char| c.is_ascii_digit()) => {
            let seconds = first.parse().ok();
            (seconds.ok_or_else(|| format!("{first} is no number of seconds"))?, rest)
        }
        names => (SECONDS, names),
    };
    let (seed, names) = match names {
        [first, rest @ ..] if first.starts_with("seed=") => {
            let seed = first["seed=".len()..].parse().ok();
            (Some(seed.ok_or_else(|| format!("{first} is no seed"))?), rest)
        }
        names => (None, names),
    };
    if let Some(name) = names.iter().find(|name| !TARGETS.contains(name)) {
        return Err(format!("no fuzz target is called {name}"));
    }
    let targets = TARGETS.into_iter().filter(|target| names.is_empty() || names.contains(target));
    Ok(Plan { seconds, seed, targets: targets.collect() })
}

/// Builds all targets and runs those of the plan side by side.
pub fn run_plan(plan: &Plan) -> Result {
    let compiler = Compiler::find()?;
    if !compiler.has_sanitizer()? {
        println!("skipped: this Rust toolchain comes without AddressSanitizer");
        return Ok(());
    }
    run(&mut cargo(["fmt", "--manifest-path", "fuzz/Cargo.toml", "--", "--check"]))?;
    let programs = build("build", &compiler, &[])?;
    let running: Vec<_> = plan
        .targets
        .iter()
        .map(|&name| {
            let (seconds, seed, program) = (plan.seconds, plan.seed, programs.join(name));
            (name, thread::spawn(move || fuzz(name, &program, seconds, seed)))
        })
        .collect();
    let mut failed = Vec::new();
    for (name, thread) in running {
        let output = thread.join().map_err(|_| format!("{name}: no result"))??;
        let text = String::from_utf8_lossy(&output.stderr);
        if output.status.success() {
            println!("{name:<10} {}", summary(&text));
        } else {
            println!("{text}");
            if let Some(input) = finding(&text) {
                explain(&programs.join(name), &input)?;
            }
            failed.push(name);
        }
    }
    if failed.is_empty() { Ok(()) } else { Err(format!("findings of {}", failed.join(", "))) }
}

/// The static library as the targets have it: with AddressSanitizer, and counters that nobody reads.
pub fn library() -> Result<PathBuf> {
    let what = ["--package", "xent", "--lib", "--crate-type", "staticlib"];
    Ok(build("rustc", &Compiler::find()?, &what)?.join("libxent.a"))
}

/// Compiles the targets, or what is asked for, and returns where they are.
fn build(command: &str, compiler: &Compiler, what: &[&str]) -> Result<PathBuf> {
    let mut command = cargo([command, "--release", "--manifest-path", "fuzz/Cargo.toml"]);
    command.args(what);
    // With a target named, what runs at build time is not instrumented.
    command.args(["--target", &compiler.host]);
    // A sanitizer is all that is asked of nightly, and stable has it under this name.
    command.env("RUSTC_BOOTSTRAP", "1");
    command.env_remove("CARGO_ENCODED_RUSTFLAGS").env("RUSTFLAGS", FLAGS.join(" "));
    if let Some(engine) = engine() {
        command.env("CUSTOM_LIBFUZZER_PATH", engine);
    }
    // In one place, to be removed where disks are small.
    let directory = target().join("fuzz");
    command.env("CARGO_TARGET_DIR", &directory);
    run(&mut command)?;
    Ok(directory.join(&compiler.host).join("release"))
}

fn fuzz(name: &str, program: &Path, seconds: u32, seed: Option<u32>) -> Result<Output> {
    let [corpus, seeds, artifacts] =
        ["corpus", "seeds", "artifacts"].map(|kind| format!("fuzz/{kind}/{name}"));
    make_directory(&root().join(&corpus))?;
    make_directory(&root().join(&artifacts))?;
    let mut command = Command::new(program);
    command.current_dir(root()).args([&corpus, &seeds]);
    command.arg(format!("-artifact_prefix={artifacts}/"));
    // Inputs of any length from the start: a choice is a byte, and the last ones count too.
    command.args(["-len_control=0", "-max_len=512", "-timeout=300", "-report_slow_units=60"]);
    command.arg("-print_final_stats=1");
    // Leaks are for valgrind to find; here they would cost half of the executions.
    command.arg("-detect_leaks=0");
    // No seconds at all would be forever.
    command.arg(match seconds {
        0 => "-runs=0".to_string(),
        seconds => format!("-max_total_time={seconds}"),
    });
    if let Some(seed) = seed {
        command.arg(format!("-seed={seed}"));
    }
    command.env("ASAN_OPTIONS", "malloc_context_size=1:quarantine_size_mb=16");
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    command.output().map_err(|error| format!("cannot start {}: {error}", shown(program)))
}

/// Where libFuzzer put the input that failed.
fn finding(text: &str) -> Option<String> {
    let at = text.lines().rev().find_map(|line| line.split_once("Test unit written to "));
    at.map(|(_, path)| path.trim().to_string())
}

/// Prints the input as source.
fn explain(program: &Path, input: &str) -> Result {
    let source = root().join(format!("{input}.rs"));
    let mut command = Command::new(program);
    command.current_dir(root()).arg(input).env("RUST_LIBFUZZER_DEBUG_PATH", &source);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.status().map_err(|error| format!("cannot start {}: {error}", shown(program)))?;
    let text = fs::read_to_string(&source).unwrap_or_default();
    println!("{text}\nthe input: {input}\n");
    Ok(())
}

/// What libFuzzer says at the end, in a line.
fn summary(text: &str) -> String {
    let value = |name: &str| {
        let line = text.lines().rev().find_map(|line| line.strip_prefix(name));
        line.map_or("?", |value| value.trim_start_matches(':').trim()).to_string()
    };
    let covered = text.lines().rev().find_map(|line| {
        let (_, rest) = line.split_once("cov: ")?;
        rest.split_whitespace().next()
    });
    format!(
        "ok  {} executions, {} a second, {} edges covered",
        value("stat::number_of_executed_units"),
        value("stat::average_exec_per_sec"),
        covered.unwrap_or("?")
    )
}

/// clang's libFuzzer, if it is installed: to compile that of libfuzzer-sys, which is the same, takes a fifth
/// of the build.
fn engine() -> Option<PathBuf> {
    let name = format!("libclang_rt.fuzzer-{}.a", env::consts::ARCH);
    let path = output(Command::new("clang").arg(format!("--print-file-name={name}"))).ok()?;
    // The name alone means that there is none.
    Some(PathBuf::from(path.trim())).filter(|path| path.is_absolute() && path.is_file())
}

struct Compiler {
    host: String,
    libraries: PathBuf,
}

impl Compiler {
    fn find() -> Result<Compiler> {
        let ask = |arguments: &[&str]| {
            let compiler = env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
            output(Command::new(compiler).args(arguments).current_dir(root()))
        };
        let version = ask(&["-vV"])?;
        let host = version.lines().find_map(|line| line.strip_prefix("host: "));
        let host = host.ok_or("rustc does not say what it runs on")?.to_string();
        let libraries = ask(&["--print", "target-libdir"])?.trim().into();
        Ok(Compiler { host, libraries })
    }

    /// Whether there is a runtime of AddressSanitizer.
    fn has_sanitizer(&self) -> Result<bool> {
        let error = |error| format!("{}: {error}", self.libraries.display());
        let entries = fs::read_dir(&self.libraries).map_err(error)?;
        Ok(entries.flatten().any(|entry| entry.file_name().to_string_lossy().contains("rt.asan")))
    }
}
