//! `cargo xtask mutants`: wrong versions of the source, and whether the tests see each.
//!
//! To compile every mutant by itself would take days. Here all of them are compiled at once, into
//! a copy of the project in which `a + b` has become
//! `if mutation::is(7) { a - b } else { a + b }`, and each is then run by setting `XENT_MUTANT=7`.
//! A mutant is caught if one of the quick tests fails, crashes or does not end. What a test never
//! comes by it cannot catch: each test runs once to see which mutants it meets, and a mutant is put
//! to those alone, what is cheap and has caught many first. A comparison is met only where it would
//! say something else.
//!
//! Verdicts are kept in `target/mutants/results.txt`, so that a run can be stopped and go on.
//!
//! Mutants come from two places: operators, conditions, calls and statements of the functions in
//! [`SOURCES`], found by a parser; and `tests/mutants.txt`, wrong kernels made by hand, where the
//! parser does not reach (inside macros) or where one change of an operator is not the mistake
//! that somebody would make. What does not compile is left out. `tests/survivors.txt` lists those
//! that no test can catch, each with why it is equivalent.

mod process;
mod programs;
mod results;
mod rewrite;
mod run;
mod sites;

use crate::tool::{Result, make_directory, root, target};
use programs::Which;
use results::{Results, Verdict};
use std::collections::BTreeMap;
use std::fs;

pub const USAGE: &str = "\
usage: cargo xtask mutants [--every N] [--from I] [--only TEXTS] [--by-hand | --by-parser]
                           [--seconds S] [--again | --list | --report]

  --every N    one in N of those that the parser finds (default: all)
  --from I     which begins with the I-th of those (default 0): another I, other mutants
  --only TEXTS those whose description has one of these in it, such as a file's name; with commas
               between them
  --by-hand    those of tests/mutants.txt alone
  --by-parser  the others alone
  --again      runs once more what lived in an earlier run too, kernels on every instruction set
  --seconds S  what the tests of one that lives may take (default 2.5, with --again 30)
  --list       does not run them
  --report     says what became of them so far";

/// Mutants of one build, about: with more, programs get slow, and building them slower still.
const BATCH: usize = 800;

/// Seconds that a mutant's tests may take together, those that see most for their time first; and for
/// one that lived before.
const SHORT: f64 = 2.5;
const LONG: f64 = 30.0;

/// The files that are mutated, what matters most first.
const SOURCES: [&str; 20] = [
    "src/kernels/contiguous.rs",
    "src/kernels/octet.rs",
    "src/kernels/row.rs",
    "src/kernels/tiles.rs",
    "src/kernels/soft.rs",
    "src/kernels/family.rs",
    "src/kernels/online.rs",
    "src/kernels/targets.rs",
    "src/math/exp2.rs",
    "src/math/real.rs",
    "src/math/scalar.rs",
    "src/simd/avx2.rs",
    "src/simd/mod.rs",
    "src/simd/portable.rs",
    "src/plan.rs",
    "src/problem.rs",
    "src/family.rs",
    "src/parallel.rs",
    "src/element.rs",
    AVX512,
];

/// Mutants of other files are put to the tests without this set, which saves a third of the time:
/// what is wrong in a kernel is so on the others too.
const AVX512: &str = "src/simd/avx512.rs";

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
    /// A number for the text of the function around it: a verdict holds as long as that does. Of one
    /// by hand, for that of the file.
    pub around: u64,
    /// A comparison that can be made twice: met only where the two differ.
    pub is_comparison: bool,
}

impl Site {
    /// As the lists and the report call it: no line numbers, which move.
    pub fn name(&self) -> String {
        format!("{}: {}", self.file, self.what)
    }

    /// How the names of its file's unit tests begin.
    fn unit_tests(&self) -> String {
        let module = self.file.trim_start_matches("src/").trim_end_matches(".rs");
        format!("unit tests {}::", module.trim_end_matches("/mod").replace('/', "::"))
    }

    /// Of the arithmetic, which does not know of threads, errors or memory.
    fn is_kernel(&self) -> bool {
        ["src/kernels/", "src/math/", "src/simd/"].iter().any(|part| self.file.starts_with(part))
    }
}

struct Choice<'a> {
    every: usize,
    from: usize,
    only: Option<Vec<&'a str>>,
    by_hand: bool,
    by_parser: bool,
    again: bool,
    list: bool,
    report: bool,
    seconds: Option<f64>,
}

fn parse<'a>(arguments: &[&'a str]) -> std::result::Result<Choice<'a>, String> {
    let mut choice = Choice {
        every: 1,
        from: 0,
        only: None,
        by_hand: false,
        by_parser: false,
        again: false,
        list: false,
        report: false,
        seconds: None,
    };
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
            "--only" => {
                let texts = rest.next().ok_or("--only takes a text")?;
                choice.only = Some(texts.split(',').collect());
            }
            "--seconds" => {
                let seconds = rest.next().and_then(|n| n.parse().ok()).filter(|n| *n > 0.0);
                choice.seconds = Some(seconds.ok_or("--seconds takes a number")?);
            }
            "--by-hand" => choice.by_hand = true,
            "--by-parser" => choice.by_parser = true,
            "--again" => choice.again = true,
            "--list" => choice.list = true,
            "--report" => choice.report = true,
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
    if let Some(only) = &choice.only {
        sites.retain(|site| only.iter().any(|text| site.name().contains(text)));
    }
    sites::without_crossings(&mut sites);
    println!("{} mutants, {} by hand", sites.len(), sites.iter().filter(|s| s.by_hand).count());
    if choice.list {
        for site in &sites {
            println!("{}:{}: {}", site.file, site.line, site.what);
        }
        return Ok(());
    }
    make_directory(&target().join("mutants"))?;
    let results = Results::read(&sites)?;
    if choice.report {
        return results.report(&sites);
    }
    let open = sites.iter().filter(|site| !results.has(site, choice.again)).cloned();
    for batch in batches(open.collect()) {
        put_to_the_tests(&texts, batch, &results, &choice)?;
    }
    results.report(&sites)
}

/// Whole files together, as far as they fit.
fn batches(sites: Vec<Site>) -> Vec<Vec<Site>> {
    let mut batches: Vec<Vec<Site>> = Vec::new();
    for file in SOURCES {
        let of_file: Vec<Site> = sites.iter().filter(|site| site.file == file).cloned().collect();
        let Some(first) = of_file.first() else { continue };
        let fits = |last: &Vec<Site>| {
            let alike = last[0].is_kernel() == first.is_kernel();
            alike && file != AVX512 && last.len() + of_file.len() <= BATCH
        };
        match batches.last_mut().filter(|last| fits(last)) {
            Some(last) => last.extend(of_file),
            None => batches.push(of_file),
        }
    }
    batches
}

fn put_to_the_tests(
    texts: &BTreeMap<&'static str, String>,
    mut sites: Vec<Site>,
    results: &Results,
    choice: &Choice,
) -> Result {
    let needs_all = |site: &Site| site.file == AVX512 || choice.again && site.is_kernel();
    let every_set = sites.iter().any(needs_all);
    // To build the unit tests is to build all kernels once more.
    let unit_tests = sites.iter().any(|site| texts[site.file].contains("#[cfg(test)]"));
    let kernels_alone = sites.iter().all(Site::is_kernel);
    let tree = target().join("mutants/tree");
    rewrite::copy_project(&tree, every_set)?;
    for site in rewrite::compile(&tree, texts, &mut sites)? {
        if site.by_hand {
            return Err(format!("a mutant by hand does not compile: {}", site.name()));
        }
        results.add(&site, Verdict::DoesNotCompile)?;
    }
    println!("building the tests with {} mutants", sites.len());
    let tests = programs::all(&tree, sites.len(), Which { unit_tests, kernels_alone })?;
    let seconds = choice.seconds.unwrap_or(if choice.again { LONG } else { SHORT });
    run::all(&tree, &sites, results, &tests, seconds)
}
