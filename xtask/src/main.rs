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
mod mutants;
mod peers;
mod picture;
mod sanitize;
mod tool;

use std::process::ExitCode;

const USAGE: &str = "\
usage: cargo xtask <command>

  aarch64              run the tests on AArch64 under emulation
  accuracy             print ulps on every instruction set, beside PyTorch's
  bench [--large]      time the targets; bench grid: a grid of shapes beside plain C;
                       bench peers, bench linear: beside other libraries;
                       bench pictures: draw them
  builds               find and link the installed library in every way, run a plain
                       x86-64 under emulation, and compare x86-64-v3's bits
  counted [--record]   count instructions with valgrind, against benches/counted.txt
  demo [--full]        train a word model in C++ with xent; --full trains longer
  dist [--prefix DIR] [--target TRIPLE]
                       install the C library in DIR (default target/dist)
  fuzz [SECONDS] [seed=SEED] [TARGET]...
                       run the fuzz targets, 30 s each, or over their seeds alone
                       (0): problem linear shards c_abi partition; needs cargo-fuzz
  mutants [NAME]...    run the tests against the wrong versions in tests/mutants
  sanitize             run the C and C++ tests under sanitizers and valgrind
  test [STEP]...       run every check, or only the steps named:
                       header fmt clippy docs rust inline c examples";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let outcome = match arguments.as_slice() {
        ["aarch64"] => aarch64::run_tests(),
        ["accuracy"] => accuracy::table(),
        ["bench", "grid", options @ ..] => bench::grid(options),
        ["bench", "linear", options @ ..] => peers::linear(options),
        ["bench", "peers", options @ ..] => peers::run(options),
        ["bench", "pictures"] => picture::draw(),
        ["bench", options @ ..] => bench::run(options),
        ["builds"] => builds::run_tests(),
        ["counted"] => counted::run(false),
        ["counted", "--record"] => counted::run(true),
        ["demo"] => demo::run(&[]),
        ["demo", "--full"] => demo::run(&["--full"]),
        ["dist", options @ ..] => dist::install(options),
        ["fuzz", arguments @ ..] => fuzz::run(arguments),
        ["mutants", names @ ..] => mutants::run(names),
        ["sanitize"] => sanitize::run_all(),
        ["test", steps @ ..] => check::parse(steps).and_then(|steps| check::run(&steps)),
        ["help" | "--help" | "-h"] => {
            println!("{USAGE}");
            Ok(())
        }
        other => {
            eprintln!("xtask: not understood: {}\n\n{USAGE}", other.join(" "));
            return ExitCode::from(2);
        }
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("\nxtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}
