//! `cargo xtask builds`: the two ends of x86-64, beside what `cargo xtask test` runs on this
//! processor.
//!
//! A build for x86-64-v3 has AVX2 and FMA from the start: its portable vectors are fused too, as
//! they are on NEON, and have the bits of every other set. A plain x86-64, which has neither, is
//! emulated: the library as it ships finds that out, and executes nothing that is not there.

use crate::c;
use crate::check::Report;
use crate::dist::{self, SYSTEM_LIBRARIES};
use crate::tool::{C, Compiler, Result, cargo, make_directory, root, run, run_quietly, target};
use std::path::{Path, PathBuf};
use std::process::Command;

const TARGET: &str = "x86_64-unknown-linux-gnu";
const EMULATOR: &str = "qemu-x86_64";

/// A processor with SSE3 at most.
const PLAIN: &str = "qemu64";

/// Programs in C of every dtype and layout that do not take an emulator minutes.
const PROGRAMS: [&str; 6] = ["edges", "isa", "log_probs", "options", "softmax_errors", "targets"];

const WHICH: &str = "#include <stdio.h>\n#include <xent.h>\n\
    int main(void) { return puts(xent_isa()) < 0; }\n";

/// `cargo xtask builds`.
pub fn run_tests() -> Result {
    if !cfg!(all(target_os = "linux", target_arch = "x86_64")) {
        return Err("builds knows x86-64 Linux only".to_string());
    }
    let mut report = Report::default();
    plain(&mut report)?;
    fused(&mut report)
}

fn plain(report: &mut Report) -> Result {
    if Command::new(EMULATOR).arg("--version").output().is_err() {
        report.skip(format!("a plain x86-64: {EMULATOR} not found"));
        return Ok(());
    }
    let compiler = C.compiler()?;
    let directory = directory();
    make_directory(&directory)?;
    // Of its own: other commands may be at the usual one.
    let library = dist::build(&directory.join("dist"))?.static_library();
    let emulated = |program: &str| {
        let mut command = Command::new(EMULATOR);
        command.args(["-cpu", PLAIN]).arg(directory.join(program)).current_dir(root());
        command.env_remove("XENT_ISA").env(c::SAMPLED.0, c::SAMPLED.1);
        command
    };

    let which = directory.join("which.c");
    std::fs::write(&which, WHICH).map_err(|error| format!("cannot write which.c: {error}"))?;
    compile(&compiler, &which, &library, &directory.join("which"))?;
    let output = emulated("which").output();
    let output = output.map_err(|error| format!("cannot start {EMULATOR}: {error}"))?;
    let set = String::from_utf8_lossy(&output.stdout).trim().to_string();
    if set != "portable" {
        return Err(format!("a plain x86-64 is taken for one with {set}"));
    }
    for name in PROGRAMS {
        let source = root().join("tests/c").join(name).with_extension("c");
        compile(&compiler, &source, &library, &directory.join(name))?;
        run_quietly(&mut emulated(name))?;
        println!("ok  tests/c/{name}.c on a plain x86-64");
    }
    Ok(())
}

fn directory() -> PathBuf {
    target().join("builds")
}

/// Statically, since threads of others hang in some versions of the emulator.
fn compile(compiler: &Compiler, source: &Path, library: &Path, to: &Path) -> Result {
    let mut command = compiler.command();
    command.args(["-static", "-std=c11", "-O2", "-Iinclude"]).arg(source).arg(library);
    run_quietly(command.args(SYSTEM_LIBRARIES).arg("-o").arg(to))
}

fn fused(report: &mut Report) -> Result {
    #[cfg(target_arch = "x86_64")]
    let runs = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
    #[cfg(not(target_arch = "x86_64"))]
    let runs = false;
    if !runs {
        report.skip("a build for x86-64-v3 does not run on this processor".to_string());
        return Ok(());
    }
    // The target is named so that the flags are not those of build scripts.
    let mut command = cargo(["test", "--package", "xent"]);
    // Of its own, so that it waits for no other command's builds.
    command.env("CARGO_TARGET_DIR", directory());
    // The other sets are the same there as in every build.
    command.env("RUSTFLAGS", "-C target-cpu=x86-64-v3 --cfg xent_portable --cfg xent_tests_only");
    run(command.args(["--target", TARGET, "--test", "hashes", "--", "golden", "--nocapture"]))
}
