//! The tests that mutants are put to, one by one.

use super::process::{self, Outcome};
use super::rewrite;
use crate::c::SAMPLED;
use crate::dist::SYSTEM_LIBRARIES;
use crate::tool::{C, Result, output, run_quietly, target};
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};

/// A test program: which one, and what it runs.
struct Quick {
    /// As cargo calls it; empty for the unit tests, a file of `tests/c` for what safe Rust cannot
    /// ask for.
    test: &'static str,
    arguments: &'static [&'static str],
    cases: &'static str,
    /// A variable of its environment: none, a part of the committed hashes, or that it takes samples,
    /// as in an emulator.
    variable: (&'static str, &'static str),
    /// Whether kernels, their arithmetic and vectors are its business.
    kernels: bool,
}

const fn quick(
    test: &'static str,
    arguments: &'static [&'static str],
    cases: &'static str,
) -> Quick {
    Quick { test, arguments, cases, variable: ("", ""), kernels: true }
}

/// The committed bits of a pair of dtypes.
const fn hashes(part: &'static str) -> Quick {
    Quick { variable: ("XENT_HASHES", part), ..quick("hashes", &["golden"], "1") }
}

/// What is quick. Left out is what takes long and sees no more than the others: everything
/// exhaustive, and the golden vectors.
static QUICK: [Quick; 32] = [
    quick("errors", &[], "1"),
    Quick { kernels: false, ..quick("status.c", &[], "1") },
    Quick { kernels: false, ..quick("overlap.c", &[], "1") },
    Quick { kernels: false, ..quick("softmax_errors.c", &[], "1") },
    Quick { kernels: false, ..quick("log_probs.c", &[], "1") },
    Quick { kernels: false, ..quick("layout.c", &[], "1") },
    Quick { kernels: false, ..quick("fork.c", &[], "1") },
    quick("softmax", &["--skip", "threads_do_not_matter"], "3"),
    quick("invariants", &["--skip", "threads_do_not_matter"], "3"),
    quick("combinations", &["random"], "30"),
    // Of what the exhaustive ones go through, `references` and `borders` have the borders.
    quick("", &["--skip", "exhaustive", "--skip", "narrowing"], "1"),
    quick("edges", &[], "1"),
    hashes("f32"),
    hashes("f64"),
    hashes("bf16"),
    hashes("bf16-f32"),
    hashes("f16"),
    hashes("f16-f32"),
    hashes("softmax"),
    Quick { variable: SAMPLED, ..quick("hashes", &["thread_counts"], "1") },
    quick("fuzzed", &[], "1"),
    quick("fenced", &[], "1"),
    quick("combinations", &[], "150"),
    quick("softmax", &["--skip", "threads_do_not_matter"], "40"),
    quick("invariants", &["--skip", "threads_do_not_matter"], "40"),
    quick("bits", &["--skip", "threads"], "40"),
    Quick { variable: SAMPLED, ..quick("bits", &["threads"], "1") },
    quick("halves", &["random", "liger", "keras"], "20"),
    quick("large", &[], "1"),
    // What panics on purpose ends the program, and would pass for a failure.
    quick("bugs", &["--skip", "judge_refuses"], "1"),
    Quick { kernels: false, variable: SAMPLED, ..quick("memory", &["nothing"], "1") },
    Quick { kernels: false, variable: SAMPLED, ..quick("memory", &["jobs"], "1") },
];

/// One test, and what is known of it.
pub struct Test {
    program: PathBuf,
    /// As reports call it.
    pub name: String,
    arguments: Vec<String>,
    quick: &'static Quick,
    /// Seconds of work that it takes.
    pub seconds: f64,
    /// The mutants that it meets.
    pub met: BTreeSet<usize>,
    /// How many it caught, or is thought likely to.
    pub caught: AtomicUsize,
}

impl Test {
    /// With that mutant on; 0 is none.
    fn command(&self, tree: &Path, mutant: usize) -> Command {
        let mut command = Command::new(&self.program);
        command
            .args(&self.arguments)
            .current_dir(tree)
            .env("XENT_MUTANT", mutant.to_string())
            .env("PROPTEST_CASES", self.quick.cases)
            .env("RAYON_NUM_THREADS", "3");
        let (variable, value) = self.quick.variable;
        if !variable.is_empty() {
            command.env(variable, value);
        }
        command
    }

    /// What becomes of it with the mutant, which it catches unless it passes.
    pub fn outcome(&self, tree: &Path, mutant: usize) -> Result<Outcome> {
        process::run(&mut self.command(tree, mutant), self.seconds)
    }

    /// What it costs for its kind: what sees many comes first, and what takes little.
    pub fn price(&self) -> f64 {
        (self.seconds + 0.02) / (1.0 + self.caught.load(Ordering::Relaxed) as f64)
    }

    /// Sees which mutants it meets, and how long it takes. What fails without one, as may the bits of a NaN
    /// in code compiled so, says nothing about any.
    fn look(&mut self, tree: &Path, list: &Path, count: usize) -> Result {
        let _ = fs::remove_file(list);
        let mut command = self.command(tree, 0);
        command.env("XENT_MUTANTS_MET", list);
        let (outcome, seconds) = process::timed(&mut command, 60.0)?;
        if outcome != Outcome::Passed {
            println!("left out, since it fails without a mutant: {}", self.name);
            return Ok(());
        }
        self.seconds = seconds;
        let text = fs::read_to_string(list).map_err(|error| format!("{}: {error}", self.name))?;
        let met = text.lines().filter_map(|line| line.parse().ok());
        self.met = met.filter(|mutant| (1..=count).contains(mutant)).collect();
        Ok(())
    }
}

/// Which of them are wanted: the unit tests, those of kernels and nothing else.
#[derive(Clone, Copy)]
pub struct Which {
    pub unit_tests: bool,
    pub kernels_alone: bool,
}

/// Every test, built with `count` mutants.
pub fn all(tree: &Path, count: usize, which: Which) -> Result<Vec<Test>> {
    let mut arguments = vec!["test", "--no-run"];
    if which.unit_tests {
        arguments.push("--lib");
    }
    let names: BTreeSet<&str> = QUICK.iter().map(|quick| quick.test).collect();
    for test in names.into_iter().filter(|test| !test.is_empty() && !test.ends_with(".c")) {
        arguments.extend(["--test", test]);
    }
    let built = rewrite::command(tree, &arguments)
        .stderr(Stdio::piped())
        .output()
        .map_err(|error| format!("cannot start cargo: {error}"))?;
    let text = String::from_utf8_lossy(&built.stderr);
    if !built.status.success() {
        return Err(format!("the mutants do not build:\n{text}"));
    }
    let mut tests = Vec::new();
    let is_wanted = |quick: &&Quick| {
        (which.unit_tests || !quick.test.is_empty()) && (quick.kernels || !which.kernels_alone)
    };
    for quick in QUICK.iter().filter(is_wanted) {
        let mut add = |program: &Path, name: String, arguments: Vec<String>| {
            tests.push(Test {
                program: program.to_path_buf(),
                name,
                arguments,
                quick,
                seconds: 0.0,
                met: BTreeSet::new(),
                // Bits see what bounds allow, and nothing else sees what is read for nothing, or what is
                // allocated: they come early.
                caught: AtomicUsize::new(match quick.test {
                    "hashes" | "fenced" | "memory" => 20,
                    _ => 0,
                }),
            });
        };
        if quick.test.ends_with(".c") {
            add(&c_program(tree, quick.test)?, quick.test.to_string(), Vec::new());
            continue;
        }
        let source = match quick.test {
            "" => "unittests src/lib.rs (".to_string(),
            test => format!("tests/{test}.rs ("),
        };
        let line = text.lines().find_map(|line| line.split_once(source.as_str()));
        let (_, rest) = line.ok_or(format!("no program of {source}:\n{text}"))?;
        let program = tree.join(rest.trim_end_matches(')'));
        let list = output(Command::new(&program).arg("--list").args(quick.arguments))?;
        for test in list.lines().filter_map(|line| line.strip_suffix(": test")) {
            let name = if quick.test.is_empty() { "unit tests" } else { quick.test };
            // The tests of memory have no harness: they take a name, and nothing else.
            let exactly = ["--exact", "--test-threads=1"];
            let flags: &[&str] = if quick.test == "memory" { &[] } else { &exactly };
            let arguments = [test].iter().chain(flags).map(ToString::to_string).collect();
            let (_, value) = quick.variable;
            add(&program, format!("{name} {test} {value}").trim_end().to_string(), arguments);
        }
    }
    // On two threads: every other one each, since the slow ones lie together.
    let (mut even, mut odd): (Vec<_>, Vec<_>) = (Vec::new(), Vec::new());
    for (i, test) in tests.iter_mut().enumerate() {
        (if i % 2 == 0 { &mut even } else { &mut odd }).push(test);
    }
    let look = |tests: Vec<&mut Test>, list: &str| -> Result {
        let list = target().join("mutants").join(list);
        tests.into_iter().try_for_each(|test| test.look(tree, &list, count))
    };
    std::thread::scope(|scope| {
        let others = scope.spawn(|| look(odd, "met-odd.txt"));
        look(even, "met-even.txt").and(others.join().expect("it does not panic"))
    })?;
    Ok(tests)
}

/// A test in C, with the library that the tests in Rust were built with.
fn c_program(tree: &Path, test: &str) -> Result<PathBuf> {
    let build = target().join("mutants/build/debug");
    let program = build.join(test.replace('.', "-"));
    run_quietly(
        C.compiler()?
            .command()
            .arg("-I")
            .arg(tree.join("include"))
            .arg(tree.join("tests/c").join(test))
            .arg(library(&build.join("deps"))?)
            .args(SYSTEM_LIBRARIES)
            .arg("-o")
            .arg(&program),
    )?;
    Ok(program)
}

/// The static library that was built last; cargo gives it a name with a hash.
fn library(directory: &Path) -> Result<PathBuf> {
    let entries = fs::read_dir(directory)
        .map_err(|error| format!("cannot list {}: {error}", directory.display()))?;
    entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            name.starts_with("libxent") && name.ends_with(".a")
        })
        .max_by_key(|path| path.metadata().and_then(|metadata| metadata.modified()).ok())
        .ok_or(format!("no static library in {}", directory.display()))
}
