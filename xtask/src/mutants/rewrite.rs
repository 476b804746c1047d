//! Sources with every mutant in them.

use super::{Site, write_if_new};
use crate::tool::{Result, cargo, target};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::process::Command;

/// Which mutant is on: read once, before `main`. A test that panics ends its program at once, so
/// that a mutant costs no more than its first failure.
const MUTATION: &str = r#"//! Which mutant is on.

use std::sync::atomic::{AtomicUsize, Ordering};

static ACTIVE: AtomicUsize = AtomicUsize::new(0);

/// Whether it is that one.
#[inline(always)]
pub fn is(mutant: usize) -> bool {
    ACTIVE.load(Ordering::Relaxed) == mutant
}

extern "C" fn start() {
    let number = std::env::var("XENT_MUTANT").ok().and_then(|n| n.parse().ok());
    ACTIVE.store(number.unwrap_or(0), Ordering::Relaxed);
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        usual(panic);
        std::process::exit(101);
    }));
}

// SAFETY: the loader calls what it finds here.
#[used]
#[unsafe(link_section = ".init_array")]
static START: extern "C" fn() = start;
"#;

/// Writes the mutants into the copy; those that do not compile are taken out of `sites` and
/// returned.
pub fn compile(
    tree: &Path,
    texts: &BTreeMap<&'static str, String>,
    sites: &mut Vec<Site>,
) -> Result<Vec<Site>> {
    write_if_new(&tree.join("src/mutation.rs"), MUTATION.as_bytes())?;
    let edit = |file: &str, from: &str, to: &str| -> Result {
        let path = tree.join(file);
        let text = fs::read_to_string(&path).map_err(|error| format!("{file}: {error}"))?;
        if !text.contains(from) {
            return Err(format!("{file} has no {from:?}"));
        }
        write_if_new(&path, text.replacen(from, to, 1).as_bytes())
    };
    edit("src/lib.rs", "mod math;", "mod math;\nmod mutation;")?;
    edit("Cargo.toml", r#"["lib", "staticlib", "cdylib"]"#, r#"["lib", "staticlib"]"#)?;
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
            let is_statement = self.text[..site.end].ends_with(';');
            let from = self.out.len();
            // Numbers count from 1: 0 is none.
            let number = index + 1;
            let head = format!("if crate::mutation::is({number})");
            // Within parentheses an expression is one, whatever it begins with.
            let (open, close) = if is_statement { ("", "") } else { ("(", ")") };
            self.out.push_str(&format!("{open}{head} {{ {open}{}{close}", site.replacement));
            // What is wrong in here is this mutant's fault, but for what the rest brings.
            self.places.push((*index, from, self.out.len()));
            self.out.push_str(&format!(" }} else {{ {open}"));
            self.write(site.start, site.end, inside);
            self.out.push_str(&format!("{close} }}{close}"));
            self.places.push((*index, from, self.out.len()));
            at = site.end;
            rest = after;
        }
        let rest = &self.text[at..end];
        self.out.push_str(rest);
    }
}
