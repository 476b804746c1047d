//! `cargo xtask builds`: the installed library in every build system, and the two ends of x86-64, beside what
//! `cargo xtask test` runs on this processor.
//!
//! A build for x86-64-v3 has AVX2 and FMA from the start: its portable vectors are fused too, as
//! they are on NEON, and have the bits of every other set. A plain x86-64, which has neither, is
//! emulated: the library as it ships finds that out, and executes nothing that is not there.

use crate::c::{Program, SAMPLED};
use crate::dist;
use crate::tool::{C, Result, directory, has, has_avx2, root, shell, target};
use anyhow::ensure;
use xshell::{Shell, cmd};

const EMULATOR: &str = "qemu-x86_64";

/// Programs in C of every dtype and layout that do not take an emulator minutes.
const PROGRAMS: [&str; 6] = ["edges", "isa", "log_probs", "options", "softmax_errors", "targets"];

const WHICH: &str = "#include <stdio.h>\n#include <xent.h>\n\
    int main(void) { return puts(xent_isa()) < 0; }\n";

/// `cargo xtask builds`.
pub fn run_tests() -> Result {
    let here = cfg!(all(target_os = "linux", target_arch = "x86_64"));
    ensure!(here, "builds knows x86-64 Linux only");
    let sh = shell()?;
    installed(&sh)?;
    if has(&sh, EMULATOR) {
        plain(&sh)?;
    } else {
        println!("skipped: a plain x86-64: {EMULATOR} not found");
    }
    if has_avx2() {
        return fused(&sh);
    }
    println!("skipped: a build for x86-64-v3 does not run on this processor");
    Ok(())
}

/// What a user installs who has named a target in the environment: cargo then builds in another directory.
fn installed(sh: &Shell) -> Result {
    let (xtask, prefix) = (std::env::current_exe()?, directory("builds")?.join("dist"));
    let dist = cmd!(sh, "{xtask} dist --prefix {prefix}");
    dist.env("CARGO_BUILD_TARGET", "x86_64-unknown-linux-gnu").run()?;
    Ok(cmd!(sh, "tests/install/run {prefix}").run()?)
}

/// On a processor with SSE3 at most.
fn plain(sh: &Shell) -> Result {
    let emulator = [EMULATOR, "-cpu", "qemu64"];
    let library = dist::build(&target().join("dist"))?.static_library();
    let library = Program::statically(&library);
    let compiler = C.compiler(sh)?;
    let which = directory("builds")?.join("which.c");
    sh.write_file(&which, WHICH)?;
    let sources = PROGRAMS.map(|name| root().join("tests/c").join(name).with_extension("c"));
    for source in [which].into_iter().chain(sources) {
        // Statically, since threads of dynamically linked programs hang in some versions of the emulator.
        let flags = ["-static", "-std=c11", "-O2"];
        let program = Program::new(&compiler, "plain x86-64", &flags, &[source], &library)?;
        program.compile()?;
        if program.sources[0].ends_with("which.c") {
            let set = program.command(sh, &emulator).env_remove("XENT_ISA").read()?;
            ensure!(set == "portable", "a plain x86-64 is taken for one with {set}");
        } else {
            program.run(&emulator, &[SAMPLED])?;
        }
    }
    Ok(())
}

fn fused(sh: &Shell) -> Result {
    // With a target named, the flags are not those of build scripts.
    cmd!(sh, "cargo test --package xent --target x86_64-unknown-linux-gnu --test hashes -- golden")
        .env("CARGO_TARGET_DIR", directory("builds")?)
        // The other sets are the same there as in every build.
        .env("RUSTFLAGS", "-C target-cpu=x86-64-v3 --cfg xent_portable --cfg xent_tests_only")
        .run()?;
    Ok(())
}
