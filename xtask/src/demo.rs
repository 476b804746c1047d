//! `cargo xtask demo`: the C++ trainer on real text, and the data of the examples.

use crate::dist::{self, SYSTEM_LIBRARIES};
use crate::tool::{CPP, Result, directory, root, shell, shown, target};
use anyhow::Context;
use std::fs::File;
use std::io::BufReader;
use std::path::PathBuf;
use xshell::cmd;

/// Flags that make plain loops as fast as the compiler can: the demo times xent beside them.
const OPTIMISED: [&str; 4] = ["-std=c++17", "-O3", "-march=native", "-ffast-math"];

/// `cargo xtask demo [--full]`.
pub fn run(options: &[&str]) -> Result {
    let sh = shell()?;
    // A missing compiler is reported before the long build.
    let compiler = CPP.compiler(&sh)?;
    println!("building the library");
    let dist = dist::build(&target().join("dist"))?;
    let text = decompress("kjv.txt")?;

    let source = root().join("examples/cpp/train_lm.cpp");
    let program = directory("demo")?.join("train_lm");
    println!("compiling {} with {}", shown(&source), compiler.name);
    compiler
        .command(&sh)
        .args(OPTIMISED)
        .args(["-pthread", "-I"])
        .args([&dist.include, &source, &dist.static_library()])
        .args(SYSTEM_LIBRARIES)
        .arg("-o")
        .arg(&program)
        .run()?;
    println!();
    Ok(cmd!(sh, "{program} {text} {options...}").run()?)
}

/// Unpacks `data/<name>.gz` and returns where it is.
pub fn decompress(name: &str) -> Result<PathBuf> {
    let packed = root().join("data").join(format!("{name}.gz"));
    let plain = directory("demo")?.join(name);
    let unpack = || -> std::io::Result<()> {
        let mut from = flate2::read::MultiGzDecoder::new(BufReader::new(File::open(&packed)?));
        std::io::copy(&mut from, &mut File::create(&plain)?).map(drop)
    };
    unpack().with_context(|| format!("cannot unpack {}", shown(&packed)))?;
    Ok(plain)
}
