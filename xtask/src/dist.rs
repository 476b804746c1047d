//! `cargo xtask dist`: the headers and the C library, laid out for a compiler.

use crate::tool::{Result, cargo, make_directory, root, run, shown, target};
use std::fs;
use std::path::{Path, PathBuf};

/// What a program that links `libxent.a` adds: the system libraries of Rust's
/// standard library on Linux (`rustc --print native-static-libs`), without those
/// that every C compiler links by itself.
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
            .map_err(|error| format!("cannot use the prefix {prefix}: {error}"))?,
        None => target().join("dist"),
    };
    let dist = build(&prefix)?;
    let (include, lib) = (shown(&dist.include), shown(&dist.lib));
    println!("installed xent in {}", shown(&prefix));
    println!(
        "  static: c++ -std=c++17 app.cpp -I{include} {lib}/libxent.a {}",
        SYSTEM_LIBRARIES.join(" ")
    );
    println!("  shared: c++ -std=c++17 app.cpp -I{include} -L{lib} -lxent -Wl,-rpath,{lib}");
    Ok(())
}

/// Builds both libraries in release and copies them and the committed headers to `prefix`.
pub fn build(prefix: &Path) -> Result<Dist> {
    if !cfg!(target_os = "linux") {
        return Err("dist knows the library names of Linux only".to_string());
    }
    // rayon's workers run the library's code until the process ends: dlclose must not unmap it.
    let link =
        [format!("-Clink-arg=-Wl,-soname,{SONAME}"), "-Clink-arg=-Wl,-z,nodelete".to_string()];
    let words = ["rustc", "--release", "--package", "xent", "--lib", "--features", "capi"];
    run(cargo(words).args(["--crate-type", "staticlib,cdylib", "--"]).args(link))?;

    let dist = Dist { include: prefix.join("include"), lib: prefix.join("lib") };
    make_directory(&dist.include)?;
    make_directory(&dist.lib)?;
    for header in ["xent.h", "xent.hpp"] {
        copy(&root().join("include").join(header), &dist.include.join(header))?;
    }
    let release = target().join("release");
    copy(&release.join("libxent.a"), &dist.static_library())?;
    let shared = dist.lib.join(SONAME);
    copy(&release.join("libxent.so"), &shared)?;
    check_soname(&shared)?;

    let link = dist.lib.join("libxent.so");
    remove(&link)?;
    #[cfg(unix)]
    std::os::unix::fs::symlink(SONAME, &link)
        .map_err(|error| format!("cannot link {}: {error}", shown(&link)))?;
    Ok(dist)
}

/// A library without its soname links, but a program would then look for it
/// under the wrong name.
fn check_soname(library: &Path) -> Result {
    let bytes =
        fs::read(library).map_err(|error| format!("cannot read {}: {error}", shown(library)))?;
    let name = [SONAME.as_bytes(), b"\0"].concat();
    if bytes.windows(name.len()).any(|window| window == name) {
        Ok(())
    } else {
        Err(format!("{} lacks the soname {SONAME}", shown(library)))
    }
}

fn copy(from: &Path, to: &Path) -> Result {
    // A new file, not new content: a running program keeps the library it has.
    remove(to)?;
    fs::copy(from, to)
        .map(|_| ())
        .map_err(|error| format!("cannot copy {} to {}: {error}", shown(from), shown(to)))
}

fn remove(path: &Path) -> Result {
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(format!("cannot remove {}: {error}", shown(path)))
        }
        _ => Ok(()),
    }
}
