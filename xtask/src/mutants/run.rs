//! Runs the tests against each mutant.

use super::{Site, rewrite};
use crate::dist::SYSTEM_LIBRARIES;
use crate::tool::{C, Result, root, run_quietly, target};
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// A test program: which one, what it runs, and for which mutants.
struct Quick {
    /// As cargo calls it; empty for the unit tests, a file of `tests/c` for what safe Rust cannot
    /// ask for.
    test: &'static str,
    arguments: &'static [&'static str],
    cases: &'static str,
    /// Whether kernels, their arithmetic and vectors are its business.
    kernels: bool,
}

const fn quick(
    test: &'static str,
    arguments: &'static [&'static str],
    cases: &'static str,
) -> Quick {
    Quick { test, arguments, cases, kernels: true }
}

/// What is quick, the likeliest to see something for its time first: most mutants are not subtle,
/// and a few random problems see them. Left out is what takes long and sees no more than the
/// others: everything exhaustive, and the golden vectors.
const QUICK: [Quick; 22] = [
    quick("errors", &[], "1"),
    Quick { kernels: false, ..quick("status.c", &[], "1") },
    Quick { kernels: false, ..quick("overlap.c", &[], "1") },
    Quick { kernels: false, ..quick("softmax_errors.c", &[], "1") },
    quick("family", &["--skip", "threads_do_not_matter"], "3"),
    quick("invariants", &["--skip", "threads_do_not_matter"], "3"),
    quick("combinations", &["random"], "30"),
    // Of what the exhaustive ones go through, `references` and `borders` have the borders.
    quick("", &["--skip", "exhaustive", "--skip", "narrowing", "--skip", "reference::"], "1"),
    quick("edges", &[], "1"),
    quick("hashes", &["golden"], "1"),
    quick("combinations", &[], "150"),
    quick("family", &["--skip", "threads_do_not_matter"], "40"),
    quick("invariants", &["--skip", "threads_do_not_matter"], "40"),
    quick("bits", &["--skip", "threads", "rows", "lse", "fma", "streamed"], "40"),
    quick("halves", &["random", "liger", "keras"], "20"),
    quick("large", &[], "1"),
    // What panics on purpose ends the program, and would pass for a failure.
    quick("bugs", &["--skip", "judge_refuses"], "1"),
    Quick { kernels: false, ..quick("hashes", &["thread_counts"], "1") },
    Quick { kernels: false, ..quick("log_probs.c", &[], "1") },
    Quick { kernels: false, ..quick("layout.c", &[], "1") },
    Quick { kernels: false, ..quick("fork.c", &[], "1") },
    Quick { kernels: false, ..quick("memory", &["small"], "1") },
];

/// Seconds of work that a program may take: a mutant that does not end is caught.
const WORK: u64 = 150;

/// The same for one that waits for something that never comes. The machine may be busy otherwise,
/// so this is long.
const WAIT: Duration = Duration::from_secs(1200);

/// Seconds that a child has worked so far; 0 where that cannot be told.
fn work(child: &Child) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{}/stat", child.id())).unwrap_or_default();
    // After the name in parentheses: the 12th and 13th are user and system time, in 1/100 s.
    let rest = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    let ticks = rest.split_whitespace().skip(11).take(2).filter_map(|n| n.parse::<u64>().ok());
    ticks.sum::<u64>() / 100
}

fn programs(tree: &Path) -> Result<Vec<(PathBuf, &'static Quick)>> {
    let mut arguments = vec!["test", "--no-run", "--lib"];
    let tests: BTreeSet<&str> = QUICK.iter().map(|quick| quick.test).collect();
    for test in tests.into_iter().filter(|test| !test.is_empty() && !test.ends_with(".c")) {
        arguments.extend(["--test", test]);
    }
    let output = rewrite::command(tree, &arguments)
        .stderr(Stdio::piped())
        .output()
        .map_err(|error| format!("cannot start cargo: {error}"))?;
    let text = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        return Err(format!("the mutants do not build:\n{text}"));
    }
    QUICK
        .iter()
        .map(|quick| {
            if quick.test.ends_with(".c") {
                return Ok((c_program(tree, quick.test)?, quick));
            }
            let source = match quick.test {
                "" => "unittests src/lib.rs (".to_string(),
                test => format!("tests/{test}.rs ("),
            };
            let line = text.lines().find_map(|line| line.split_once(source.as_str()));
            let (_, rest) = line.ok_or(format!("no program of {source}:\n{text}"))?;
            let path = PathBuf::from(rest.trim_end_matches(')'));
            Ok((if path.is_absolute() { path } else { tree.join(path) }, quick))
        })
        .collect()
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

/// Whether the program passes with that mutant on.
fn passes(program: &Path, quick: &Quick, tree: &Path, mutant: usize) -> Result<bool> {
    let mut command = Command::new(program);
    command.args(quick.arguments);
    if !quick.test.ends_with(".c") {
        command.arg("--test-threads=1");
    }
    let mut child = command
        .current_dir(tree)
        .env("XENT_MUTANT", mutant.to_string())
        .env("PROPTEST_CASES", quick.cases)
        .env("RAYON_NUM_THREADS", "3")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|error| format!("cannot start {}: {error}", program.display()))?;
    let start = Instant::now();
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return Ok(status.success()),
            Ok(None) if work(&child) > WORK || start.elapsed() > WAIT => {
                // Its own exit is not waited for in vain: it is killed, whatever it does.
                let _ = child.kill();
                let _ = child.wait();
                return Ok(false);
            }
            Ok(None) => std::thread::sleep(Duration::from_millis(20)),
            Err(error) => return Err(format!("cannot wait for {}: {error}", program.display())),
        }
    }
}

/// Mutants that no test can catch, by name; each with a line that says why.
fn survivors() -> Result<BTreeSet<String>> {
    let list = fs::read_to_string(root().join("tests/survivors.txt"))
        .map_err(|error| format!("tests/survivors.txt: {error}"))?;
    let names = list.lines().filter(|line| line.starts_with("src/"));
    Ok(names.map(str::to_string).collect())
}

pub fn all(tree: &Path, sites: &[Site]) -> Result {
    let known = survivors()?;
    println!("building the tests with {} mutants", sites.len());
    let programs = programs(tree)?;
    for (program, quick) in &programs {
        let start = Instant::now();
        if !passes(program, quick, tree, 0)? {
            return Err(format!("{} {} fails without a mutant", program.display(), quick.test));
        }
        let name = if quick.test.is_empty() { "unit tests" } else { quick.test };
        println!("{name:<14} {:6.1} s without a mutant", start.elapsed().as_secs_f64());
    }
    let next = AtomicUsize::new(0);
    let report = Mutex::new(Vec::new());
    let failure = Mutex::new(None);
    let workers = std::thread::available_parallelism().map_or(1, |n| n.get());
    std::thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    let Some(site) = sites.get(index) else { return };
                    let mut caught = None;
                    let kernels = ["kernels", "math", "simd"].map(|part| format!("src/{part}/"));
                    let is_kernel = kernels.iter().any(|part| site.file.starts_with(part));
                    for (program, quick) in &programs {
                        if is_kernel && !quick.kernels {
                            continue;
                        }
                        match passes(program, quick, tree, index + 1) {
                            Ok(true) => {}
                            Ok(false) => {
                                caught = Some(quick.test);
                                break;
                            }
                            Err(error) => {
                                *failure.lock().expect("not poisoned") = Some(error);
                                return;
                            }
                        }
                    }
                    let by = match caught {
                        Some("") => "caught by the unit tests".to_string(),
                        Some(test) => format!("caught by {test}"),
                        None if known.contains(&site.name()) => "equivalent".to_string(),
                        None => "SURVIVES".to_string(),
                    };
                    let line = format!("{by}: {}:{}: {}", site.file, site.line, site.what);
                    println!("{line}");
                    report.lock().expect("not poisoned").push(line);
                }
            });
        }
    });
    if let Some(error) = failure.into_inner().expect("not poisoned") {
        return Err(error);
    }
    let mut report = report.into_inner().expect("not poisoned");
    report.sort();
    let path = target().join("mutants/report.txt");
    fs::write(&path, report.join("\n") + "\n").map_err(|error| format!("the report: {error}"))?;
    let count = |start: &str| report.iter().filter(|line| line.starts_with(start)).count();
    let (caught, equivalent, alive) = (count("caught"), count("equivalent"), count("SURVIVES"));
    println!("{caught} caught, {equivalent} equivalent, {alive} survive; {}", path.display());
    if alive == 0 { Ok(()) } else { Err(format!("{alive} mutants survive")) }
}
