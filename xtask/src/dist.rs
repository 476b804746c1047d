//! `cargo xtask dist`: the headers and the C library, laid out for a compiler.

use crate::tool::{Result, root, shell, shown, target};
use anyhow::{Context, ensure};
use std::path::{Path, PathBuf};
use xshell::cmd;

/// The flags that a program needs beside `libxent.a`: the system libraries of Rust's standard library on Linux
/// (`rustc --print native-static-libs`) that a C compiler does not link by itself.
pub const SYSTEM_LIBRARIES: [&str; 3] = ["-lpthread", "-ldl", "-lm"];

/// The name that programs record. Cargo.toml tells cargo-c the same.
const SONAME: &str = "libxent.so.0";

/// An installed library.
pub struct Dist {
    pub include: PathBuf,
    pub lib: PathBuf,
}

impl Dist {
    pub fn static_library(&self) -> PathBuf {
        self.lib.join("libxent.a")
    }
}

/// `cargo xtask dist [--prefix DIR]`.
pub fn install(prefix: Option<&str>) -> Result {
    let prefix = match prefix {
        // Relative to where the command was typed.
        Some(prefix) => std::path::absolute(prefix)
            .with_context(|| format!("cannot use the prefix {prefix}"))?,
        None => target().join("dist"),
    };
    let dist = build(&prefix)?;
    let (include, lib) = (shown(&dist.include), shown(&dist.lib));
    let libraries = SYSTEM_LIBRARIES.join(" ");
    println!("installed xent in {}", shown(&prefix));
    println!("  static: c++ -std=c++17 app.cpp -I{include} {lib}/libxent.a {libraries}");
    println!("  shared: c++ -std=c++17 app.cpp -I{include} -L{lib} -lxent -Wl,-rpath,{lib}");
    Ok(())
}

/// Builds both libraries in release and copies them and the committed headers to `prefix`.
pub fn build(prefix: &Path) -> Result<Dist> {
    ensure!(cfg!(target_os = "linux"), "dist knows the library names of Linux only");
    let sh = shell()?;
    // rayon's workers run the library's code until the process ends: dlclose must not unmap it.
    let link = [format!("-Clink-arg=-Wl,-soname,{SONAME}"), "-Clink-arg=-Wl,-z,nodelete".into()];
    cmd!(sh, "cargo rustc --release --package xent --lib --features capi")
        .args(["--crate-type", "staticlib,cdylib", "--"])
        .args(link)
        .run()?;

    let dist = Dist { include: prefix.join("include"), lib: prefix.join("lib") };
    let copy = |from: &Path, to: &Path| -> Result {
        // A new file, not new content: a running program keeps the library it has.
        sh.remove_path(to)?;
        Ok(sh.copy_file(from, to)?)
    };
    sh.create_dir(&dist.include)?;
    sh.create_dir(&dist.lib)?;
    for header in ["xent.h", "xent.hpp"] {
        copy(&root().join("include").join(header), &dist.include.join(header))?;
    }
    let release = target().join("release");
    let shared = dist.lib.join(SONAME);
    copy(&release.join("libxent.a"), &dist.static_library())?;
    copy(&release.join("libxent.so"), &shared)?;

    // A program that links a library without its soname looks for it under the wrong name.
    let name = format!("{SONAME}\0");
    let named = sh.read_binary_file(&shared)?.windows(name.len()).any(|w| w == name.as_bytes());
    ensure!(named, "{} lacks the soname {SONAME}", shown(&shared));

    let link = dist.lib.join("libxent.so");
    sh.remove_path(&link)?;
    #[cfg(unix)]
    std::os::unix::fs::symlink(SONAME, &link)
        .with_context(|| format!("cannot link {}", shown(&link)))?;
    Ok(dist)
}
