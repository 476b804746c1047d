//! `cargo xtask dist`: the headers and the C library, laid out for a compiler. cargo builds it, `packaging/install`
//! lays it out.

use crate::tool::{Result, root, shell, shown, target};
use anyhow::{Context, bail, ensure};
use serde_json::Value;
use std::env;
use std::path::{Path, PathBuf};
use xshell::{Cmd, cmd};

/// The flags that a program needs beside `libxent.a`: the system libraries of Rust's standard library on Linux
/// (`rustc --print native-static-libs`) that a C compiler does not link by itself. The files for pkg-config and
/// CMake in `packaging` name the same.
pub const SYSTEM_LIBRARIES: [&str; 3] = ["-lpthread", "-ldl", "-lm"];

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

/// `cargo xtask dist [--prefix DIR] [--target TRIPLE]`.
pub fn install(options: &[&str]) -> Result {
    let (mut prefix, mut triple) = (target().join("dist"), None);
    for option in options.chunks(2) {
        match option {
            // Relative to where the command was typed.
            ["--prefix", path] if !path.is_empty() => prefix = std::path::absolute(path)?,
            ["--target", name] if !name.is_empty() => triple = Some(*name),
            _ => bail!("dist does not understand {}", option.join(" ")),
        }
    }
    let dist = build_for(triple, &prefix)?;
    println!("installed xent in {}", shown(&prefix));
    println!("  CMake:       -DCMAKE_PREFIX_PATH={}, xent::xent or xent::static", shown(&prefix));
    println!("  pkg-config:  PKG_CONFIG_PATH={}/pkgconfig", shown(&dist.lib));
    Ok(())
}

/// Builds both libraries in release and installs them in `prefix`.
pub fn build(prefix: &Path) -> Result<Dist> {
    build_for(None, prefix)
}

fn build_for(triple: Option<&str>, prefix: &Path) -> Result<Dist> {
    let sh = shell()?;
    let version = cmd!(sh, "cargo pkgid --package xent").read()?;
    let version = version.rsplit(['#', '@']).next().context("cargo names no version")?;
    let build = cmd!(sh, "cargo rustc --release --package xent --lib --features capi")
        .args(["--crate-type", "staticlib,cdylib", "--message-format", "json-render-diagnostics"])
        .args(triple.iter().flat_map(|triple| ["--target", triple]));
    let link = link_arguments(triple, version.split('.').next().unwrap_or_default());
    let libraries =
        &libraries(&without_places(build).args(["--", "--cfg=xent_c_library"]).args(link).read()?)?;

    let mut install = cmd!(sh, "sh packaging/install {prefix} {version} {libraries...}");
    // cargo names the directory after the target if one is chosen, by --target or in its configuration.
    let triple = libraries[0].ancestors().nth(2).and_then(Path::file_name).unwrap_or_default();
    if let Some((arch, _)) = triple.to_string_lossy().split_once("-unknown-linux-")
        && arch != env::consts::ARCH
        && env::var_os("CROSS_COMPILE").is_none()
    {
        install = install.env("CROSS_COMPILE", format!("{arch}-linux-gnu-"));
    }
    install.run()?;
    Ok(Dist { include: prefix.join("include"), lib: prefix.join("lib") })
}

/// What the shared library of a target is linked with: the name that programs record (Cargo.toml tells cargo-c the
/// same), and on ELF that dlclose must not unmap it. rayon's workers run its code until the process ends.
fn link_arguments(triple: Option<&str>, major: &str) -> Vec<String> {
    let chosen = triple.map(str::to_string).or_else(|| env::var("CARGO_BUILD_TARGET").ok());
    let target = chosen.unwrap_or_else(|| env::consts::OS.to_string());
    let is = |names: [&str; 2]| names.iter().any(|name| target.contains(name));
    let arguments = if is(["windows", "cygwin"]) {
        vec![]
    } else if is(["apple", "macos"]) {
        vec![format!("-install_name,@rpath/libxent.{major}.dylib")]
    } else {
        vec![format!("-soname,libxent.so.{major}"), "-z,nodelete".to_string()]
    };
    arguments.iter().map(|argument| format!("-Clink-arg=-Wl,{argument}")).collect()
}

/// Takes the places of the sources on this machine out of panic messages.
fn without_places(build: Cmd) -> Cmd {
    let cargo = env::var_os("CARGO_HOME").map(PathBuf::from);
    let cargo = cargo.or_else(|| Some(env::home_dir()?.join(".cargo"))).unwrap_or_default();
    let places = [(root(), "xent"), (&cargo, "cargo")];
    let flags = places.map(|(from, to)| format!("--remap-path-prefix={}={to}", from.display()));
    for (name, separator) in [("CARGO_ENCODED_RUSTFLAGS", "\x1f"), ("RUSTFLAGS", " ")] {
        // cargo does not look into its configuration then.
        if let Ok(own) = env::var(name) {
            return build.env(name, own + separator + &flags.join(separator));
        }
    }
    build.arg("--config").arg(format!("build.rustflags={flags:?}"))
}

/// The libraries that cargo says it has built.
fn libraries(messages: &str) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for message in messages.lines() {
        let message: Value = serde_json::from_str(message)?;
        let types = message["target"]["crate_types"].as_array();
        if types.is_some_and(|types| types.contains(&"staticlib".into())) {
            let files = message["filenames"].as_array().into_iter().flatten();
            found.push(files.filter_map(Value::as_str).map(PathBuf::from).collect());
        }
    }
    ensure!(found.len() == 1, "cargo built for {} targets: choose one by --target", found.len());
    Ok(found.remove(0))
}
