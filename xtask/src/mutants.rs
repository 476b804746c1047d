//! `cargo xtask mutants [NAME]...`: applies each patch of `tests/mutants` to a copy of the project and runs the tests
//! that its head names. The tests must fail.
//!
//! Home-made: cargo-mutants does not change intrinsics, masks, constants or what macros expand to. For plain functions
//! there is `cargo mutants` (`.cargo/mutants.toml`).

use crate::tool::{Result, directory, output, root, shell, stem};
use anyhow::{Context, bail, ensure};
use std::path::PathBuf;
use xshell::{Shell, cmd};

/// A wrong version of the source.
struct Mutant {
    patch: PathBuf,
    name: String,
    /// The first line of the patch.
    fault: String,
    /// Arguments of `cargo test`, from the line `tests: ...`.
    tests: String,
}

fn read(sh: &Shell, patch: PathBuf) -> Result<Mutant> {
    let text = sh.read_file(&patch)?;
    let name = stem(&patch);
    let fault = text.lines().next().unwrap_or_default().to_string();
    let tests = text.lines().find_map(|line| line.strip_prefix("tests: "));
    let tests = tests.with_context(|| format!("{name} names no tests"))?.to_string();
    Ok(Mutant { patch, name, fault, tests })
}

/// Whether the tests pass; tests that do not compile are an error.
fn pass(sh: &Shell, tree: &PathBuf, tests: &str) -> Result<bool> {
    let _inside = sh.push_dir(tree);
    sh.set_var("CARGO_TARGET_DIR", directory("mutants")?.join("target"));
    sh.set_var("RUSTFLAGS", "--cfg xent_tests_only");
    let test = "test --quiet --package xent --profile mutants";
    let words: Vec<&str> = test.split(' ').chain(tests.split(' ')).collect();
    output(cmd!(sh, "cargo").args(&words).arg("--no-run"))?;
    // A mutant may loop forever.
    Ok(output(cmd!(sh, "timeout 600 cargo").args(&words)).is_ok())
}

pub fn run(names: &[&str]) -> Result {
    let sh = shell()?;
    let mut mutants = Vec::new();
    for patch in sh.read_dir(root().join("tests/mutants"))? {
        if patch.extension().is_some_and(|is| is == "patch") {
            mutants.push(read(&sh, patch)?);
        }
    }
    mutants.retain(|mutant| names.is_empty() || names.contains(&mutant.name.as_str()));
    ensure!(!mutants.is_empty(), "no such mutant");

    // The tracked files as they are, committed or not.
    let tree = directory("mutants")?.join("tree");
    let stash = output(cmd!(sh, "git stash create"))?;
    let commit = if stash.is_empty() { "HEAD" } else { stash.trim() };
    if tree.exists() {
        output(cmd!(sh, "git worktree remove --force {tree}"))?;
    }
    output(cmd!(sh, "git worktree add --force --detach {tree} {commit}"))?;

    for Mutant { patch, name, .. } in &mutants {
        output(cmd!(sh, "git -C {tree} apply --check {patch}"))
            .with_context(|| format!("{name} does not apply"))?;
    }
    let mut all_tests: Vec<&str> = mutants.iter().map(|mutant| mutant.tests.as_str()).collect();
    all_tests.sort_unstable();
    all_tests.dedup();
    for tests in all_tests {
        ensure!(pass(&sh, &tree, tests)?, "cargo test {tests} fails without a mutant");
    }
    let mut alive = Vec::new();
    for Mutant { patch, name, fault, tests } in &mutants {
        #[cfg(target_arch = "x86_64")]
        if name.starts_with("avx512") && !is_x86_feature_detected!("avx512bw") {
            println!("skipped  {name}: this processor has no AVX-512");
            continue;
        }
        output(cmd!(sh, "git -C {tree} apply {patch}"))?;
        let lives = pass(&sh, &tree, tests).with_context(|| format!("{name} does not compile"))?;
        output(cmd!(sh, "git -C {tree} apply --reverse {patch}"))?;
        println!("{}  {name}: {fault}", if lives { "ALIVE " } else { "caught" });
        if lives {
            alive.push(name.as_str());
        }
    }
    output(cmd!(sh, "git worktree remove --force {tree}"))?;
    if !alive.is_empty() {
        bail!("no test sees {} of {} mutants: {}", alive.len(), mutants.len(), alive.join(", "));
    }
    println!("the tests see {} mutants", mutants.len());
    Ok(())
}
