//! Sets `cfg(x86_sets)` for x86-64. With the feature `header`, generates include/xent.h from src/ffi/.

use std::env;
#[cfg(feature = "header")]
use std::{fs, path::Path};

fn main() {
    println!("cargo::rerun-if-changed=src/codes.rs");
    println!("cargo::rerun-if-changed=src/ffi");
    println!("cargo::rerun-if-changed=cbindgen.toml");
    println!("cargo::rerun-if-changed=include/xent.h");
    println!("cargo::rerun-if-env-changed=XENT_CHECK_HEADER");
    // `--cfg xent_portable` builds the portable set alone: ThreadSanitizer does not instrument masked stores.
    // `--cfg xent_c_library` is for the crate as the C library, which has an allocator of its own.
    // `--cfg xent_pairs` is for tests of AVX512_BF16 on processors that are slower with it.
    println!("cargo::rustc-check-cfg=cfg(x86_sets, xent_portable, xent_c_library, xent_pairs)");
    if env::var("CARGO_CFG_TARGET_ARCH").as_deref() == Ok("x86_64")
        && env::var_os("CARGO_CFG_XENT_PORTABLE").is_none()
    {
        println!("cargo::rustc-cfg=x86_sets");
    }
    #[cfg(feature = "header")]
    write_header();
}

#[cfg(feature = "header")]
fn write_header() {
    let header = generate();
    let path = Path::new("include/xent.h");
    if fs::read_to_string(path).is_ok_and(|committed| committed == header) {
        return;
    }
    if env::var_os("XENT_CHECK_HEADER").is_some() {
        panic!("include/xent.h is stale: run `cargo check --features header` and commit it");
    }
    // The sources of a dependency may be read-only: then the header beside them is the right one.
    if let Err(error) = fs::write(path, header) {
        println!("cargo::warning=include/xent.h could not be written: {error}");
    }
}

#[cfg(feature = "header")]
fn generate() -> String {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_else(|e| panic!("{path}: {e}"));
    let mut config = cbindgen::Config::from_file("cbindgen.toml").unwrap_or_else(|e| panic!("{e}"));
    let version = env::var("CARGO_PKG_VERSION").unwrap_or_default();
    let mut parts = version.split('.');
    let mut part = || parts.next().unwrap_or("0");
    let (major, minor, patch) = (part(), part(), part());
    config.header = Some(read("src/ffi/header.txt"));
    config.after_includes = Some(format!(
        "\n#define XENT_VERSION_MAJOR {major}\n#define XENT_VERSION_MINOR {minor}\n#define XENT_VERSION_PATCH {patch}\n\n{}",
        read("src/ffi/initialisers.txt").trim_end()
    ));
    let bindings = cbindgen::Builder::new()
        .with_config(config)
        .with_src("src/codes.rs")
        .with_src("src/ffi/mod.rs")
        .generate()
        .unwrap_or_else(|e| panic!("cbindgen: {e}"));
    let mut header = Vec::new();
    bindings.write(&mut header);
    String::from_utf8(header).expect("cbindgen writes UTF-8")
}
