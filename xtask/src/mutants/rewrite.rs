//! Sources with every mutant in them.

use super::{SOURCES, Site};
use crate::tool::{Result, cargo, make_directory, output, root, target};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::process::Command;

/// The copy's module `mutation`.
const MUTATION: &str = include_str!("mutation.rs");

/// What else is another in the copy: a file, a text, and what it becomes.
const EDITS: [[&str; 3]; 2] = [
    ["src/lib.rs", "mod math;", "mod math;\nmod mutation;"],
    ["Cargo.toml", r#"["lib", "staticlib", "cdylib"]"#, r#"["lib", "staticlib"]"#],
];

/// And where AVX-512 is left out.
const WITHOUT_AVX512: [[&str; 3]; 2] = [
    ["src/dispatch.rs", "Isa::Avx512 => avx512_entries::detected()", "Isa::Avx512 => false"],
    [
        "src/dispatch.rs",
        "Isa::Avx512 => avx512_entries::kernels(logits, gradient)",
        "Isa::Avx512 => None",
    ],
];

/// The files under version control and those that would be, without results of earlier builds;
/// but for those that mutants go into.
pub fn copy_project(to: &Path, every_set: bool) -> Result {
    let list = output(
        Command::new("git")
            .args(["ls-files", "--cached", "--others", "--exclude-standard"])
            .current_dir(root()),
    )?;
    let edits = EDITS.iter().chain(WITHOUT_AVX512.iter().filter(|_| !every_set));
    for file in list.lines() {
        let from = root().join(file);
        // Deleted, but not yet in the index; or what the tests of Rust do not look at.
        if !from.exists() || file.starts_with("data/") || SOURCES.contains(&file) {
            continue;
        }
        let mut bytes = fs::read(&from).map_err(|error| format!("cannot read {file}: {error}"))?;
        for [_, old, new] in edits.clone().filter(|[edited, ..]| *edited == file) {
            let text = String::from_utf8_lossy(&bytes).into_owned();
            if !text.contains(old) {
                return Err(format!("{file} has no {old:?}"));
            }
            bytes = text.replacen(old, new, 1).into_bytes();
        }
        write_if_new(&to.join(file), &bytes)?;
    }
    write_if_new(&to.join("src/mutation.rs"), MUTATION.as_bytes())
}

/// So that cargo builds anew only what changed.
fn write_if_new(path: &Path, bytes: &[u8]) -> Result {
    if let Some(parent) = path.parent() {
        make_directory(parent)?;
    }
    if fs::read(path).is_ok_and(|old| old == bytes) {
        return Ok(());
    }
    fs::write(path, bytes).map_err(|error| format!("cannot write {}: {error}", path.display()))
}

/// Writes the mutants into the copy; those that do not compile are taken out of `sites` and
/// returned.
pub fn compile(
    tree: &Path,
    texts: &BTreeMap<&'static str, String>,
    sites: &mut Vec<Site>,
) -> Result<Vec<Site>> {
    let mut left_out = Vec::new();
    for _ in 0..20 {
        let mut places = BTreeMap::new();
        for (file, text) in texts {
            let mutants: Vec<(usize, &Site)> =
                sites.iter().enumerate().filter(|(_, site)| site.file == *file).collect();
            let mut writer = Writer { text, out: String::new(), places: Vec::new() };
            writer.write(0, text.len(), &mutants);
            write_if_new(&tree.join(file), writer.out.as_bytes())?;
            places.insert(*file, (writer.out, writer.places));
        }
        let errors = errors(tree)?;
        if errors.is_empty() {
            return Ok(left_out);
        }
        let mut bad = BTreeSet::new();
        for (file, line, column) in &errors {
            let Some((text, places)) = places.get(file.as_str()) else {
                return Err(format!("{file}:{line} does not compile, whatever the mutants are"));
            };
            let before: usize = text.lines().take(line - 1).map(|line| line.len() + 1).sum();
            let line_text = text.lines().nth(line - 1).unwrap_or_default();
            let within = line_text.char_indices().nth(column - 1).map_or(0, |(at, _)| at);
            let at = before + within;
            let around = places.iter().filter(|(_, start, end)| (*start..*end).contains(&at));
            let Some((index, ..)) = around.min_by_key(|(_, start, end)| end - start) else {
                return Err(format!("{file}:{line} does not compile, and no mutant is there"));
            };
            bad.insert(*index);
        }
        for index in bad.into_iter().rev() {
            left_out.push(sites.remove(index));
        }
    }
    Err("there is no end to mutants that do not compile".to_string())
}

/// Where the compiler finds errors: file, line and column.
fn errors(tree: &Path) -> Result<Vec<(String, usize, usize)>> {
    let output = command(tree, &["check", "--lib", "--message-format=short", "--quiet"])
        .output()
        .map_err(|error| format!("cannot start cargo: {error}"))?;
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    if output.status.success() {
        return Ok(Vec::new());
    }
    let mut errors = Vec::new();
    for line in text.lines().filter(|line| line.contains(" error")) {
        let mut parts = line.splitn(4, ':');
        let file = parts.next().unwrap_or_default().to_string();
        let mut number = || parts.next().and_then(|n| n.trim().parse().ok());
        if let (Some(line), Some(column)) = (number(), number()) {
            errors.push((file, line, column));
        }
    }
    if errors.is_empty() { Err(format!("cargo check failed:\n{text}")) } else { Ok(errors) }
}

/// cargo in the copy, with a target directory and a profile of its own.
pub fn command(tree: &Path, arguments: &[&str]) -> Command {
    let mut command = cargo(arguments);
    command
        .current_dir(tree)
        .env("CARGO_TARGET_DIR", target().join("mutants/build"))
        .env("CARGO_PROFILE_TEST_OPT_LEVEL", "1")
        .env("CARGO_PROFILE_TEST_DEBUG", "0")
        // What is hot is inlined by force: a second round over everything gains nothing.
        .env("CARGO_PROFILE_TEST_LTO", "off")
        .env("CARGO_INCREMENTAL", "0")
        .env("RUSTFLAGS", "--cap-lints=allow");
    command
}

struct Writer<'a> {
    text: &'a str,
    out: String,
    /// Mutants and where they are in what was written.
    places: Vec<(usize, usize, usize)>,
}

impl Writer<'_> {
    /// `start..end` of the text, with the mutants that lie inside.
    fn write(&mut self, start: usize, end: usize, mutants: &[(usize, &Site)]) {
        let mut at = start;
        // The outermost first.
        let mut rest: Vec<(usize, &Site)> = mutants.to_vec();
        rest.sort_by_key(|(index, site)| (site.start, usize::MAX - site.end, *index));
        let mut rest = &rest[..];
        while let Some(((index, site), others)) = rest.split_first() {
            let inside = others.iter().take_while(|(_, other)| other.start < site.end).count();
            let (inside, after) = others.split_at(inside);
            self.out.push_str(&self.text[at..site.start]);
            self.site(*index, site, inside);
            at = site.end;
            rest = after;
        }
        let rest = &self.text[at..end];
        self.out.push_str(rest);
    }

    /// One mutant, with those inside of it.
    fn site(&mut self, index: usize, site: &Site, inside: &[(usize, &Site)]) {
        let from = self.out.len();
        // Numbers count from 1: 0 is none.
        let number = index + 1;
        if site.is_comparison {
            self.out.push_str(&format!("crate::mutation::choose({number}, "));
            self.write(site.start, site.end, inside);
            self.out.push_str(&format!(", {})", site.replacement));
            self.places.push((index, from, self.out.len()));
            return;
        }
        let is_statement = self.text[..site.end].ends_with(';');
        let head = format!("if crate::mutation::is({number})");
        // Within parentheses an expression is one, whatever it begins with.
        let (open, close) = if is_statement { ("", "") } else { ("(", ")") };
        self.out.push_str(&format!("{open}{head} {{ {open}{}{close}", site.replacement));
        // What is wrong in here is this mutant's fault, but for what the rest brings.
        self.places.push((index, from, self.out.len()));
        self.out.push_str(&format!(" }} else {{ {open}"));
        self.write(site.start, site.end, inside);
        self.out.push_str(&format!("{close} }}{close}"));
        self.places.push((index, from, self.out.len()));
    }
}
