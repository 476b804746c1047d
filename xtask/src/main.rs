//! The project's commands, as `cargo xtask <command>`: with Rust and a C++
//! compiler installed, nothing else is needed to test, build or try xent.

mod aarch64;
mod accuracy;
mod bench;
mod builds;
mod c;
mod check;
mod counted;
mod demo;
mod dist;
mod fuzz;
mod inline;
mod loops;
mod mutants;
mod peers;
mod picture;
mod sanitize;
mod svg;
mod tool;

use std::process::ExitCode;

const USAGE: &str = "\
usage: cargo xtask <command>

  aarch64              run the tests on AArch64 under emulation
  accuracy             print ulps on every instruction set, beside PyTorch's
  bench [--large]      time the targets; bench peers: beside other libraries;
                       bench pictures: draw what was recorded
  builds               run a plain x86-64 under emulation, and compare x86-64-v3's bits
  counted [--record]   count instructions with valgrind, against benches/counted.txt
  demo [--full]        train a word model in C++ with xent; --full trains longer
  dist [--prefix DIR]  build the C library into DIR (default target/dist)
  fuzz [SECONDS] [seed=SEED] [TARGET]...
                       run the fuzz targets, 30 s each, or over their seeds alone
                       (0): problem c_abi partition
  loops                print the kernels' inner loops, counted; docs/data/loops.txt
  mutants [...]        run the tests against wrong versions of the source; see --help
  sanitize             run the C and C++ tests under sanitizers and valgrind
  test [STEP]...       run every check, or only the steps named:
                       header fmt clippy docs rust inline c examples";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let outcome = match arguments.as_slice() {
        ["aarch64"] => aarch64::run_tests(),
        ["accuracy"] => accuracy::table(),
        ["bench", "peers", options @ ..] => peers::run(options),
        ["bench", "pictures"] => picture::draw(),
        ["bench", options @ ..] => bench::run(options),
        ["builds"] => builds::run_tests(),
        ["counted"] => counted::run(false),
        ["counted", "--record"] => counted::run(true),
        ["demo"] => demo::run(false),
        ["demo", "--full"] => demo::run(true),
        ["dist"] => dist::install(None),
        ["dist", "--prefix", prefix] if !prefix.is_empty() => dist::install(Some(prefix)),
        ["fuzz", arguments @ ..] => match fuzz::parse(arguments) {
            Ok(plan) => fuzz::run_plan(&plan),
            Err(message) => return usage(&message),
        },
        ["loops"] => loops::list(),
        ["mutants", arguments @ ..] => mutants::run(arguments),
        ["sanitize"] => sanitize::run_all(),
        ["test", steps @ ..] => match check::parse(steps) {
            Ok(steps) => check::run(&steps),
            Err(message) => return usage(&message),
        },
        [] => return usage("no command given"),
        ["help" | "--help" | "-h"] => {
            println!("{USAGE}");
            Ok(())
        }
        other => return usage(&format!("not understood: {}", other.join(" "))),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("\nxtask: {message}");
            ExitCode::FAILURE
        }
    }
}

fn usage(message: &str) -> ExitCode {
    eprintln!("xtask: {message}\n\n{USAGE}");
    ExitCode::from(2)
}
