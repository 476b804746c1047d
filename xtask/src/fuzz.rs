//! `cargo xtask fuzz`: every fuzz target for a while, from the committed seeds.

use crate::tool::{Result, cargo, make_directory, root, run};
use std::process::{Command, Output, Stdio};
use std::thread;

const TARGETS: [&str; 3] = ["problem", "c_abi", "partition"];

const SECONDS: u32 = 30;

/// Optimised; in several units, and without a call for each comparison, it builds in a third of
/// the time.
const BUILD: [&str; 4] = ["--release", "--codegen-units", "16", "--no-trace-compares"];

/// What `cargo xtask fuzz [SECONDS] [TARGET]...` is asked for.
pub struct Plan {
    seconds: u32,
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
    if let Some(name) = names.iter().find(|name| !TARGETS.contains(name)) {
        return Err(format!("no fuzz target is called {name}"));
    }
    let targets = TARGETS.into_iter().filter(|target| names.is_empty() || names.contains(target));
    Ok(Plan { seconds, targets: targets.collect() })
}

/// Builds all targets and runs those of the plan side by side.
pub fn run_plan(plan: &Plan) -> Result {
    if !has_sanitizer()? {
        println!("skipped: this Rust toolchain comes without AddressSanitizer");
        return Ok(());
    }
    let found = cargo(["fuzz", "--version"]).stdout(Stdio::null()).stderr(Stdio::null()).status();
    if !found.is_ok_and(|status| status.success()) {
        return Err("cargo-fuzz is missing: cargo install cargo-fuzz --locked".to_string());
    }
    run(&mut cargo(["fmt", "--manifest-path", "fuzz/Cargo.toml", "--", "--check"]))?;
    run(fuzz("build").args(BUILD))?;
    let running: Vec<_> = plan
        .targets
        .iter()
        .map(|&target| {
            let seconds = plan.seconds;
            (target, thread::spawn(move || run_target(target, seconds)))
        })
        .collect();
    let mut failed = Vec::new();
    for (target, thread) in running {
        let output = thread.join().map_err(|_| format!("{target}: no result"))??;
        let text = String::from_utf8_lossy(&output.stderr);
        if output.status.success() {
            println!("{target:<10} {}", summary(&text));
        } else {
            println!("{text}");
            failed.push(target);
        }
    }
    if failed.is_empty() { Ok(()) } else { Err(format!("findings of {}", failed.join(", "))) }
}

/// `cargo fuzz` on whatever toolchain runs this.
fn fuzz(command: &str) -> Command {
    let mut cargo = cargo(["fuzz", command]);
    // A sanitizer is all that is asked of nightly, and stable has it under this name.
    cargo.env("RUSTC_BOOTSTRAP", "1");
    // Checked inline, the masked loads and stores of the kernels take minutes to compile.
    cargo.env("RUSTFLAGS", "-Cllvm-args=-asan-instrumentation-with-call-threshold=0");
    cargo
}

fn run_target(target: &str, seconds: u32) -> Result<Output> {
    let (corpus, seeds) = (format!("fuzz/corpus/{target}"), format!("fuzz/seeds/{target}"));
    make_directory(&root().join(&corpus))?;
    let mut command = fuzz("run");
    command.args(BUILD).args([target, &corpus, &seeds, "--"]);
    // Inputs of any length from the start: a choice is a byte, and the last ones count too.
    command.args(["-len_control=0", "-max_len=512", "-timeout=120", "-report_slow_units=60"]);
    command.arg("-print_final_stats=1");
    // Leaks are for valgrind to find; here they would cost half of the executions.
    command.arg("-detect_leaks=0");
    // No seconds at all would be forever.
    command.arg(match seconds {
        0 => "-runs=0".to_string(),
        seconds => format!("-max_total_time={seconds}"),
    });
    command.env("ASAN_OPTIONS", "malloc_context_size=1:quarantine_size_mb=16");
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    command.output().map_err(|error| format!("cannot start cargo fuzz: {error}"))
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

/// Whether the compiler's libraries have a runtime of AddressSanitizer.
fn has_sanitizer() -> Result<bool> {
    let compiler = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let output = Command::new(compiler)
        .args(["--print", "target-libdir"])
        .output()
        .map_err(|error| format!("cannot start rustc: {error}"))?;
    let directory = String::from_utf8_lossy(&output.stdout).trim().to_string();
    let entries = std::fs::read_dir(&directory).map_err(|e| format!("{directory}: {e}"))?;
    Ok(entries.flatten().any(|entry| entry.file_name().to_string_lossy().contains("rt.asan")))
}
