//! `cargo xtask demo`: the C++ trainer on real text, and the data of the examples.

use crate::dist::{self, SYSTEM_LIBRARIES};
use crate::tool::{self, CPP, Result, make_directory, root, shown, target};
use std::fs::File;
use std::io::{BufReader, BufWriter, Write};
use std::path::PathBuf;
use std::process::Command;

/// Plain loops profit from these too: the comparison in the demo is against the
/// best the compiler makes of them.
const OPTIMISED: [&str; 4] = ["-std=c++17", "-O3", "-march=native", "-ffast-math"];

/// `cargo xtask demo [--full]`.
pub fn run(full: bool) -> Result {
    // Before the long build, so that a missing compiler is told at once.
    let compiler = CPP.compiler()?;
    println!("building the library");
    let dist = dist::build(&target().join("dist"))?;
    let text = decompress("kjv.txt")?;

    let source = root().join("examples/cpp/train_lm.cpp");
    let program = directory()?.join("train_lm");
    println!("compiling {} with {}", shown(&source), compiler.name);
    tool::run(
        compiler
            .command()
            .args(OPTIMISED)
            .arg("-pthread")
            .arg("-I")
            .arg(&dist.include)
            .arg(&source)
            .arg(dist.static_library())
            .args(SYSTEM_LIBRARIES)
            .arg("-o")
            .arg(&program),
    )?;
    println!();
    let mut command = Command::new(&program);
    command.arg(&text);
    if full {
        command.arg("--full");
    }
    tool::run(&mut command)
}

fn directory() -> Result<PathBuf> {
    let directory = target().join("demo");
    make_directory(&directory)?;
    Ok(directory)
}

/// Unpacks `data/<name>.gz` and returns where it is.
pub fn decompress(name: &str) -> Result<PathBuf> {
    let packed = root().join("data").join(format!("{name}.gz"));
    let plain = directory()?.join(name);
    let unpack = || {
        let mut from = flate2::read::MultiGzDecoder::new(BufReader::new(File::open(&packed)?));
        let mut to = BufWriter::new(File::create(&plain)?);
        std::io::copy(&mut from, &mut to)?;
        to.flush()
    };
    unpack().map_err(|error| format!("cannot unpack {}: {error}", shown(&packed)))?;
    Ok(plain)
}
