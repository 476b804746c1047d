//! `cargo xtask mutants`: wrong versions of the source, and whether the tests see each.
//!
//! To compile every mutant by itself would take days. Here all of them are compiled at once, into
//! a copy of the project in which `a + b` has become
//! `if mutation::is(7) { a - b } else { a + b }`, and each is then run by setting `XENT_MUTANT=7`.
//! A mutant is caught if one of the quick tests fails, crashes or does not end.
//!
//! Mutants come from two places: operators, conditions, calls and statements of the functions in
//! [`SOURCES`], found by a parser; and `tests/mutants.txt`, wrong kernels made by hand, where the
//! parser does not reach (inside macros) or where one change of an operator is not the mistake
//! that somebody would make. What does not compile is left out. `tests/survivors.txt` lists those
//! that no test can catch, each with why it is equivalent.

mod rewrite;
mod run;
mod sites;

use crate::tool::{Result, make_directory, root, target};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

pub const USAGE: &str = "\
usage: cargo xtask mutants [--every N] [--from I] [--only TEXT] [--by-hand | --by-parser] [--list]

  --every N    one in N of those that the parser finds (default 20)
  --from I     which begins with the I-th of those (default 0): another I, other mutants
  --only TEXT  those whose description has TEXT in it, such as a file's name
  --by-hand    those of tests/mutants.txt alone
  --by-parser  the others alone
  --list       does not run them";

/// The files that are mutated.
const SOURCES: [&str; 20] = [
    "src/problem.rs",
    "src/plan.rs",
    "src/family.rs",
    "src/parallel.rs",
    "src/element.rs",
    "src/kernels/contiguous.rs",
    "src/kernels/family.rs",
    "src/kernels/octet.rs",
    "src/kernels/online.rs",
    "src/kernels/row.rs",
    "src/kernels/soft.rs",
    "src/kernels/targets.rs",
    "src/kernels/tiles.rs",
    "src/math/exp2.rs",
    "src/math/real.rs",
    "src/math/scalar.rs",
    "src/simd/avx2.rs",
    "src/simd/avx512.rs",
    "src/simd/mod.rs",
    "src/simd/portable.rs",
];

/// One change.
#[derive(Clone, Debug)]
pub struct Site {
    pub file: &'static str,
    /// Bytes of the file that it replaces: an expression, or a statement with its semicolon.
    pub start: usize,
    pub end: usize,
    pub replacement: String,
    pub line: usize,
    pub what: String,
    pub by_hand: bool,
}

impl Site {
    /// As the lists and the report call it: no line numbers, which move.
    pub fn name(&self) -> String {
        format!("{}: {}", self.file, self.what)
    }
}

struct Choice<'a> {
    every: usize,
    from: usize,
    only: Option<&'a str>,
    by_hand: bool,
    by_parser: bool,
    list: bool,
}

fn parse<'a>(arguments: &[&'a str]) -> std::result::Result<Choice<'a>, String> {
    let mut choice =
        Choice { every: 20, from: 0, only: None, by_hand: false, by_parser: false, list: false };
    let mut rest = arguments.iter();
    while let Some(argument) = rest.next() {
        match *argument {
            "--every" => {
                let number = rest.next().and_then(|n| n.parse().ok()).filter(|n| *n > 0);
                choice.every = number.ok_or("--every takes a number")?;
            }
            "--from" => {
                let number = rest.next().and_then(|n| n.parse().ok());
                choice.from = number.ok_or("--from takes a number")?;
            }
            "--only" => choice.only = Some(rest.next().ok_or("--only takes a text")?),
            "--by-hand" => choice.by_hand = true,
            "--by-parser" => choice.by_parser = true,
            "--list" => choice.list = true,
            other => return Err(format!("not understood: {other}\n\n{USAGE}")),
        }
    }
    Ok(choice)
}

pub fn run(arguments: &[&str]) -> Result {
    let choice = parse(arguments)?;
    let mut texts = BTreeMap::new();
    for file in SOURCES {
        let text = fs::read_to_string(root().join(file))
            .map_err(|error| format!("cannot read {file}: {error}"))?;
        texts.insert(file, text);
    }
    let mut sites = sites::by_hand(&texts)?;
    if choice.by_parser {
        sites.clear();
    }
    if !choice.by_hand {
        let found = sites::by_parser(&texts)?;
        println!("{} sites found by the parser", found.len());
        // A step that is no multiple of anything in the code spreads evenly over the files.
        sites.extend(found.into_iter().skip(choice.from).step_by(choice.every));
    }
    if let Some(only) = choice.only {
        sites.retain(|site| site.name().contains(only));
    }
    sites::without_crossings(&mut sites);
    println!("{} mutants, {} by hand", sites.len(), sites.iter().filter(|s| s.by_hand).count());
    if choice.list {
        for site in &sites {
            println!("{}:{}: {}", site.file, site.line, site.what);
        }
        return Ok(());
    }
    let tree = target().join("mutants/tree");
    copy_project(&tree)?;
    let left_out = rewrite::compile(&tree, &texts, &mut sites)?;
    println!("{} of them do not compile", left_out.len());
    for site in &left_out {
        println!("  {}:{}: {}", site.file, site.line, site.what);
        if site.by_hand {
            return Err(format!("a mutant by hand does not compile: {}", site.name()));
        }
    }
    run::all(&tree, &sites)
}

/// The files under version control and those that would be, without results of earlier builds.
fn copy_project(to: &Path) -> Result {
    let output = std::process::Command::new("git")
        .args(["ls-files", "--cached", "--others", "--exclude-standard"])
        .current_dir(root())
        .output()
        .map_err(|error| format!("cannot start git: {error}"))?;
    if !output.status.success() {
        return Err("git ls-files failed".to_string());
    }
    for file in String::from_utf8_lossy(&output.stdout).lines() {
        let path = PathBuf::from(file);
        let from = root().join(&path);
        // Deleted, but not yet in the index; or what the tests of Rust do not look at.
        if !from.exists() || path.starts_with("data") {
            continue;
        }
        if let Some(parent) = to.join(&path).parent() {
            make_directory(parent)?;
        }
        let bytes = fs::read(&from).map_err(|error| format!("cannot read {file}: {error}"))?;
        write_if_new(&to.join(&path), &bytes)?;
    }
    Ok(())
}

/// So that cargo builds anew only what changed.
fn write_if_new(path: &Path, bytes: &[u8]) -> Result {
    if fs::read(path).is_ok_and(|old| old == bytes) {
        return Ok(());
    }
    fs::write(path, bytes).map_err(|error| format!("cannot write {}: {error}", path.display()))
}
